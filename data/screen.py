"""What a run prints: lines, and one progress line that a terminal redraws in place."""
import os
import shutil
import sys
import time


class Screen:
    """Standard output, on which a line that cannot be printed is no reason to stop."""

    def __init__(self):
        self.is_line_open = False     # whether a progress line stands there that has not ended
        self.is_pipe_broken = False   # whether the reader behind `| tee` or `| head` is gone
        self.last_count = 0.0         # when `count` last printed something

    def say(self, text):
        """Print a line of its own."""
        self.end_line()
        self.write(f"{text}\n")

    def count(self, n, total, of_what):
        """Say how far something is that takes long, unless that was said in the last four seconds."""
        if n < total and time.time() - self.last_count > 4:
            self.last_count = time.time()
            self.say(f"... {n:,} of {total:,} {of_what}")

    def progress(self, parts, is_last):
        """Show a list of texts in one line, the first two and the last two at least. A terminal redraws it in
        place, until the last one."""
        width = shutil.get_terminal_size().columns - 1
        while len(" | ".join(parts)) > width and len(parts) > 4:
            del parts[-3]
        line = " | ".join(parts)
        if not sys.stdout.isatty():
            self.say(line)
            return
        self.write(f"\r{line[:width]:{width}}")
        self.is_line_open = True
        if is_last:
            self.end_line()

    def end_line(self):
        """End an open progress line, so that what follows does not stick to it."""
        if self.is_line_open:
            self.is_line_open = False
            self.write("\n")

    def write(self, text):
        """Print as it stands. Where that is impossible (a full disk, a terminal or a reader that is gone) all
        that is printed from now on, by whatever program, goes nowhere."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as e:
            self.is_pipe_broken = isinstance(e, BrokenPipeError)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


SCREEN = Screen()
