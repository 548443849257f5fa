"""One run of a script: what its folder keeps, its log, progress line, save and resume.

    device = setup(cfg)                  seeds, precision, processes (data/setup.py)
    run = Run.open(cfg, "sft", [data])   locks the folder; an unfinished run with the same flags goes on
    run.begin(n_steps, tok, policy=(model, optimizer))      deletes what --overwrite replaces
    before, answers = run.before(measure)
    for step in run.steps():
        ...
        if run.allows_step(norm, model, batch):
            optimizer.step()
        run.log(step, loss=..., tokens=...)
        run.save_when_due(step)
    run.finish(before, after)
"""
import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import model as gpt
from data import InputError, report, write_atomic, write_json, write_jsonl
from data.chain import chain_columns, next_commands, sibling
from data.files.checkpoint import finish_save, load_state, save
from data.flags import given_flags, parse_flags
from data.folder import (CHECKPOINT, PART_OF_A_CHAIN, changed_code, check_same, claim, missing, record_of,
                         remove, result_of, run_of, sign)
from data.health import of_adapters
from data.parallel import RANK, all_sum, full_state, load_full_state, load_optimizer_state, optimizer_state
from data.screen import SCREEN
from data.setup import MEASURE, seeded


def flags_of_its_run(cfg):
    """The flags of the command line once more, and where it gives none those of the run in --out, from its
    run.json: so that ppo.py --inspect --out out/mine needs no others."""
    kept = run_of(cfg.out).get("config", {})
    for name in ("out", "overwrite", "device", "inspect"):
        kept.pop(name, None)
    theirs = parse_flags(type(cfg), "", defaults=kept)
    theirs.out = cfg.out
    return theirs


# Of every run. They are deleted in this order: without result.json a run is not finished.
FILES = ("result.json", *CHECKPOINT, "log.jsonl", "samples.txt", "answers.jsonl")
TO_GO_ON = "the same command with a larger --max_steps, or without it, goes on"     # of one cut short


class Run:
    """One run: its folder, log and messages. Files: run.json (flags and inputs), log.jsonl, samples.txt,
    answers.jsonl, the checkpoint with state.pt, result.json (its absence tells an unfinished run)."""

    def __init__(self, cfg, stage, dry=False, runs_scripts=False):
        """The object alone, which touches nothing. Scripts call `open`, where the arguments are described."""
        self.cfg, self.stage, self.folder = cfg, stage, Path(cfg.out)
        self.dry, self.runs_scripts = dry, runs_scripts
        self.goes_on = False                          # whether a checkpoint, or a round of cai.py, is there
        self.state, self.first = {}, 0                # of the checkpoint; the number of the next step
        self.record, self.replaced = None, []         # what make_room writes as run.json; files it deletes
        self.given = given_flags(cfg)                 # {name: value} that are not at their defaults
        self.health = None                            # a stage's own function of the log: {name: warning}
        self.skipped, self.stopping = 0, False        # steps not taken; whether to end after this one
        self.shown, self.warned, self.history = 0.0, set(), []    # history: the rows of log.jsonl
        self.start, self.seconds_before = time.perf_counter(), 0.0

    @classmethod
    def open(cls, cfg, stage, inputs=(), writes=(), dry=False, runs_scripts=False):
        """A Run that has the folder cfg.out to itself: locks it, and reads the state that an unfinished run
        with the same flags left. What --overwrite replaces is there until `make_room`. From here on Ctrl-C
        lets a step end, but not in cai.py, which has none.

        A finished run with the same flags shows its table and ends the program. InputError: a run with other
        flags is there, files that are not ours, or another process. inputs: files and folders that the plan
        and what is kept between steps depend on ("" is none). writes: what the stage writes there besides
        FILES, folders with a "/" at the end. dry: only look (ppo.py --inspect): take the first steps of such
        a run, and write nothing. runs_scripts: cai.py, whose folder holds those of the scripts that it
        starts."""
        run = cls(cfg, stage, dry, runs_scripts)
        # The first process looks. Where it ends, the others end too: 1 stands for success, 2 for an error.
        ends = 0
        try:
            if RANK == 0 and not dry:
                run.open_folder([name for name in inputs if name], [*FILES, *writes])
        except BaseException as e:
            ends = 1 if isinstance(e, SystemExit) else 2
            raise
        finally:
            ends = all_sum(ends)
        if ends:
            sys.exit(int(ends) - 1)
        run.goes_on = bool(all_sum(run.goes_on))
        run.state = load_state(run.folder) if run.goes_on else {}
        run.first = run.state.get("step", 0)
        # The seconds of earlier sessions are the run's too; those after the last save are in result.json.
        run.start -= max(run.seconds_before, run.state.get("seconds", 0.0))
        if not runs_scripts:      # else they reach the script that runs, which has the steps (data/chain.py)
            run.catch_signals()
        return run

    def open_folder(self, inputs, files):
        """Lock the folder, and note what this run may replace there. Ends the program if the run is finished;
        InputError if it may not begin."""
        absent = missing(inputs)
        if absent:
            raise InputError(f"{absent}: no such file or folder")
        claim(self.folder, files, inputs)
        finish_save(self.folder)      # a save that was cut off after its commit still counts
        old, record = run_of(self.folder), record_of(self.cfg, self.stage, inputs, files, self.runs_scripts)
        if self.runs_scripts:         # where one of its scripts stops, others begin
            record["flags"]["max_steps"] = self.cfg.max_steps
        self.goes_on = self.is_begun() and not self.cfg.overwrite
        left = {name for name in old.get("files", ()) if (self.folder / name).exists()}
        self.record, self.replaced = record, old.get("files", files) if old else []
        if self.goes_on:
            self.check_that_it_goes_on(old, record)
            self.seconds_before = result_of(self.folder).get("seconds", 0.0)
            self.replaced = ["result.json"]
        elif left - {"log.jsonl", "samples.txt"} and not self.cfg.overwrite:
            check_same(self.folder, old, record)
            # Left before its first checkpoint, such as the comparisons of reward.py, which took minutes.
            if not changed_code(old, record):
                self.replaced = FILES

    def has(self, name):
        """Whether this run made the file of this name before it was interrupted. All processes ask."""
        is_there = (self.folder / name).exists() and name not in self.replaced
        return bool(all_sum(RANK == 0 and is_there))      # the first one alone knows what is replaced

    def make_room(self):
        """Delete what this run replaces, and write its run.json. `begin` does it; a script that writes into
        the folder earlier calls it before. Until then a mistake in a flag, or in a file that is read, has
        cost nothing, nor has Ctrl-C. All processes call it; the first one writes."""
        record, self.record = self.record, None
        loses = bool(record) and any((self.folder / name).exists() for name in self.replaced)
        if all_sum(loses and self.is_asked_to_stop()):
            raise KeyboardInterrupt(" before it replaced anything")
        if record is None:      # done before; or another process does it; or dry
            return
        remove(self.folder, self.replaced)
        samples = self.folder / "samples.txt"
        if samples.exists():      # it is added to, and a backup may share its bytes (cp -l)
            write_atomic(samples, samples.read_bytes())
        sign(self.folder, record)

    def is_begun(self):
        """Whether the folder holds what a run of ours has made: a checkpoint, or a round of cai.py."""
        signs = [self.folder / name for name in ("state.pt", "config.json", "result.json", "round1")]
        return any(path.exists() for path in signs)

    def check_that_it_goes_on(self, old, record):
        """InputError if the run in the folder, whose run.json is `old`, is not this one or cannot go on. Ends
        the program if it is finished."""
        check_same(self.folder, old, record)
        result, edited = result_of(self.folder), changed_code(old, record)
        theirs, ours = result.get("config", {}).get("max_steps", 0), self.cfg.max_steps
        if result and (theirs == 0 or 0 < ours <= theirs):
            cut = report.cut_short(result)
            short = f", but cut short after {cut}" if cut else ""
            SCREEN.say(f"{self.folder} is finished{short}: a run with the same flags took "
                       f"{result['seconds']:.0f} s (--overwrite repeats it)")
            if cut and theirs and PART_OF_A_CHAIN not in os.environ:
                SCREEN.say(TO_GO_ON)
            if edited:
                SCREEN.say(f"{edited} changed since: --overwrite or another --out runs it anew")
            if "code" not in old:
                SCREEN.say("what code made it was not recorded")
            SCREEN.say(report.table(result["columns"]))
            sys.exit(0)
        if edited:
            raise InputError(f"{self.folder}: {edited} changed since its run began; --overwrite or another "
                             f"--out begins anew (to go on with both, delete \"code\" from its run.json)")
        if not self.runs_scripts and not (self.folder / "state.pt").exists():
            raise InputError(f"{self.folder} has no state.pt, without which its run cannot go on; choose "
                             "another --out, or --overwrite it")

    def catch_signals(self):
        """From here on Ctrl-C, a polite kill and a terminal that closes let the step end, and save."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)       # Windows has no SIGHUP
            under_nohup = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
            if number and not under_nohup:
                signal.signal(number, self.stop)

    def stop(self, signum, frame):
        """Finish the step and save. A second signal ends the run where it is."""
        if self.stopping:
            # But not the SIGTERM with which a script that runs this one passes Ctrl-C on (data/chain.py).
            if signum == signal.SIGTERM and PART_OF_A_CHAIN in os.environ:
                return
            raise KeyboardInterrupt
        self.stopping = True
        with suppress(RuntimeError):      # the signal fell into the midst of another print
            self.say("stopping after this step; once more stops at once")

    def begin(self, n_steps, tok, **trained):
        """All is ready for the first step: make_room, and the log is opened. trained: name=(model, optimizer)
        of all that is trained; the first model is the checkpoint in the folder. They are given their state if
        the run goes on."""
        self.n_planned = self.n_steps = n_steps
        if self.cfg.max_steps and not self.runs_scripts:      # whose steps it counts
            self.n_steps = min(n_steps, self.cfg.max_steps)
        self.tok, self.trained = tok, trained
        self.step_start = self.loop_start = time.perf_counter()
        if self.first:
            self.load_trained()
        self.make_room()
        if self.dry:
            # Early, where tokens are clipped; and not the very first, where the KL is still 0.
            self.n_steps = min(3, self.n_steps)
            return
        path = self.folder / "log.jsonl"
        if self.first and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()[: self.first]
            self.history = [json.loads(line) for line in lines]
        if RANK == 0:
            # A new file at once: a backup may share the old one's bytes, and a kill here loses no row.
            write_jsonl(path, self.history)
            self.log_file = open(path, "a", encoding="utf-8")
        if self.first:
            self.say(f"{self.folder}: going on after step {self.first}")
            before, now = self.state.get("machine"), self.machine()
            if before and before != now:
                self.say(f"the steps so far ran on {before}; the next ones run on {now}, and differ by "
                         "rounding")

    def machine(self):
        """Where and how precisely the products of this run are computed, in words."""
        device = next(iter(self.trained.values()))[0].wte.weight.device.type
        dtype = "bf16" if gpt.Linear.compute_dtype else "fp32"
        return f"{device} in {dtype}"

    def load_trained(self):
        """Give all that is trained its state in the checkpoint. InputError: that is of other models."""
        for name, (model, optimizer) in self.trained.items():
            wanted = {part for part, p in model.named_parameters() if p.requires_grad}
            if not wanted <= self.state["models"].get(name, {}).keys():
                raise InputError(f"{self.folder}: its run trained {', '.join(self.state['models'])}, and not "
                                 f"the {name} of these flags; begin anew with --overwrite")
            load_full_state(model, self.state["models"][name])
            load_optimizer_state(model, optimizer, self.state["optimizers"][name])

    def steps(self):
        """The numbers of the steps that are left, from 0 on."""
        self.loop_start = time.perf_counter()
        for step in range(self.first, self.n_steps):
            self.step_start = time.perf_counter()
            yield step

    def allows_step(self, norm, model, rows):
        """Whether a step may be taken with this gradient norm: not if it is infinite or NaN. Such a step is
        counted, and said with the examples it came from; the fourth is an InputError. rows: their numbers,
        among those trained on."""
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if norm.isfinite():
            return True
        bad = []
        for name, p in model.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                bad.append(name)
        self.skipped += 1
        place = "has a norm that"      # finite entries, too large to be squared
        if bad:
            place = f"of {bad[0]} and {len(bad) - 1} more tensors"
        what = f"step skipped: the gradient {place} is not finite; examples number {list(rows)[:8]} ..."
        if self.skipped > 3:
            raise InputError(f"{what}. The fourth such step: try a smaller learning rate or --dtype float32")
        self.say(what)
        return False

    # --------------------------------------------------------------------------------------------------------
    # Log and screen.

    def say(self, text):
        """Print a line of its own."""
        SCREEN.say(text)

    def log(self, step, tokens=0, show=(), done=None, **metrics):
        """Record step (from 0), with `tokens` read in it; show the metrics named in `show` (default: all) at
        most every few seconds. done: the share of the run that is behind it, where steps differ in length.
        JSON has no NaN; it is left out."""
        seconds = time.perf_counter() - self.step_start
        if tokens:
            metrics["tok_s"] = tokens / max(seconds, 1e-9)      # a coarse clock may stand still
        if self.skipped:
            metrics["skipped"] = self.skipped
        row = {}
        for name, value in metrics.items():
            value = float(value)      # waits for the GPU
            if math.isfinite(value):
                row[name] = float(f"{value:.6g}")
        self.history.append({"step": step + 1} | row)
        if self.dry:
            return
        if RANK == 0:
            self.write_row(self.history[-1])
        if self.health:
            self.say_health(self.health(self.history))
        if done is None:
            done = (step + 1 - self.first) / (self.n_steps - self.first)
        shown = {name: row[name] for name in show or row if name in row}
        self.show_progress(step, done, shown, row.get("tok_s"))

    def write_row(self, row):
        """Append a row to log.jsonl."""
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()

    def show_progress(self, step, done, metrics, speed):
        """Show the progress line, redrawn in place on a terminal, else one every few seconds."""
        now, is_last = time.perf_counter(), step + 1 == self.n_steps
        pause = 0.2 if sys.stdout.isatty() else 5
        if now - self.shown < pause and not is_last:
            return
        self.shown = now
        parts = [f"{self.stage} {step + 1}/{self.n_steps}"]
        parts += [f"{name} {value:.3g}" for name, value in metrics.items() if name != "tok_s"][:5]
        if speed:
            parts.append(f"{speed:,.0f} tokens/s")
        minutes, seconds = divmod(round((now - self.loop_start) * (1 - done) / done), 60)
        parts.append(f"{minutes}:{seconds:02} left")
        SCREEN.progress(parts, is_last)

    def say_health(self, warnings):
        """Print warnings {name: sentence}, but none of a name that was printed before."""
        for name, sentence in warnings.items():
            if name not in self.warned:
                self.warned.add(name)
                self.say(f"health, {name}: {sentence}")

    # --------------------------------------------------------------------------------------------------------
    # What is kept.

    def is_asked_to_stop(self):
        """Whether the run shall end: by a signal, or because nobody reads what it prints."""
        return self.stopping or SCREEN.is_pipe_broken

    def save_when_due(self, step, now=False, **state):
        """Save after a step if it is one of every --save_every, the last, one after which to stop, or `now`.
        All processes call it, and save together. state: see `save`."""
        self.stopping = bool(all_sum(self.is_asked_to_stop()))   # all ranks or none
        is_last = step + 1 == self.n_steps
        if not self.dry and ((step + 1) % self.cfg.save_every == 0 or is_last or self.stopping or now):
            self.save(step, **state)

    def save(self, step, **state):
        """Save a checkpoint after a step: models, optimizers, and `state` (tensors, numbers and strings by
        name), which is `self.state` when the run goes on. Ends the program if it was asked to stop."""
        models, optimizers = {}, {}
        for name, (model, optimizer) in self.trained.items():
            models[name] = full_state(model, trained_only=True)
            optimizers[name] = optimizer_state(model, optimizer)
        kept = {name: self.state[name] for name in ("before", "answers") if name in self.state}
        kept |= state | {"step": step + 1, "models": models, "optimizers": optimizers}
        kept |= {"machine": self.machine(), "seconds": time.perf_counter() - self.start}
        name, (main_model, _) = next(iter(self.trained.items()))
        save(self.folder, main_model, self.tok, kept)
        if step + 1 == self.n_steps and RANK == 0:
            self.say_health(of_adapters(main_model, models[name]))
        if self.stopping:
            raise KeyboardInterrupt(f" after step {step + 1}, saved in {self.folder}; this command goes on")

    def before(self, measure):
        """measure("before") -> (metrics, Answers): these metrics, and the answers as `scored`. They are
        measured now or, if the run goes on, come from the checkpoint, in which `save` keeps them."""
        if not self.first and not self.dry:
            metrics, answers = measure("before")
            self.state |= {"before": metrics, "answers": answers.scored}
        return self.state.get("before"), self.state.get("answers")

    def measure(self, title, sampler, tests):
        """What a policy's sampling copy says to the test prompts, the same draws whoever asks: metrics and
        Answers (report.test_policy). A few of the answers go into samples.txt under the title."""
        metrics, answers = report.test_policy(sampler, self.tok, tests, seeded(self.cfg.seed, MEASURE))
        self.samples(title, tests.prompts[: report.N_SAMPLES], answers.texts)
        return metrics, answers

    def samples(self, title, prompts, answers):
        """Append the answers (texts) to a few prompts (messages) to samples.txt."""
        if RANK == 0 and not self.dry:
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as f:
                f.write(report.samples_text(title, prompts, answers))

    def finish(self, before, after, answers=(), title="", columns=None, device=None):
        """answers.jsonl, result.json, the closing table and the page. before, after: metrics by name;
        answers: rows as report.answer_rows gives them. title: of a link of the tiny chain that starts from
        SFT. columns: other ones of the table. device: where it ran, if nothing was trained."""
        if RANK:
            return
        self.log_file.close()
        speeds = sorted(row["tok_s"] for row in self.history if "tok_s" in row)
        if not columns:
            columns = {"before": before, "after": after}
            if title:
                columns = chain_columns(self.cfg, title, before, after)
        for model, _ in self.trained.values():
            device = model.wte.weight.device
        result = {"stage": self.stage, "seed": self.cfg.seed, "config": asdict(self.cfg),
                  "seconds": round(time.perf_counter() - self.start, 1), "device": str(device),
                  "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
                  "steps": len(self.history), "planned": self.n_planned, "given": self.given,
                  "before": before, "after": after, "columns": columns}
        write_jsonl(self.folder / "answers.jsonl", answers)
        write_json(self.folder / "result.json", result)
        if answers and PART_OF_A_CHAIN not in os.environ:
            own_reward = bool(getattr(self.cfg, "reward", ""))
            self.say(report.closing_samples(answers, list(columns), sibling(self.cfg, "base"), own_reward))
            self.say(f"more of them: {self.folder / 'samples.txt'}")
        self.say("\n" + report.table(columns, explained=True))
        runs = {"base": result_of(sibling(self.cfg, "base")), "SFT": result_of(sibling(self.cfg, "sft")),
                list(columns)[-1]: result}
        for name, its_result in runs.items():
            if name in columns and report.cut_short(its_result):
                self.say(f"{name} was cut short: {report.cut_short(its_result)}")
        if PART_OF_A_CHAIN in os.environ:    # the script that asked for this one goes on
            return
        if self.n_steps < self.n_planned:
            self.say(TO_GO_ON)
        for command in next_commands(self.stage, self.cfg):
            self.say(f"next: {command}")
        self.say(report.write_page(self.folder))
