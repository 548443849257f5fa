"""The command line: the flags that every script shares, a Config filled from `--name value`, and `program`,
which runs a script's main with it."""
import argparse
import difflib
import functools
import importlib.util
import inspect
import os
import re
import signal
import sys
import traceback
import typing
from dataclasses import dataclass, fields
from pathlib import Path

from data import InputError
from data.parallel import end_processes
from data.screen import SCREEN


@dataclass
class ToolFlags:
    """The flags that every script and every command has; a Config adds its own groups before them."""
    # The run itself (the same in every script)
    seed: int = 0                 # every random draw comes from it
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; weights stay fp32


@dataclass
class RunFlags(ToolFlags):
    """The flags that every script which trains has besides."""
    # The run itself (the same in every script)
    out: str = ""   # folder for checkpoint, log and samples (default: out/ and the script's name; with
                                  # data or a model of your own out/mine/ and the name)
    overwrite: bool = False       # start over, whatever run --out holds
    max_steps: int = 0            # stop after this many steps (0: run all)
    save_every: int = 100         # steps between checkpoints
    compile: bool = False         # torch.compile every layer and, on a GPU, decode in CUDA graphs
    recompute: bool = False       # run layers again in the backward pass, for less memory


MAY_BE_0 = ("seed", "max_steps", "warmup", "value_warmup", "relabel", "lora", "retries")   # of the integers
MEMORY = ("micro_batch", "batch_size", "rollouts", "max_len", "max_prompt", "max_new", "length")
SHARES = ("held_out", "agreement", "knows", "gamma", "lam", "label_smoothing", "flip_rate")   # from 0 to 1
CLIPS = ("grad_clip", "value_clip")       # 0 would stop all learning
FREE = ("out", "overwrite", "max_steps", "save_every", "device", "compile", "recompute",
        "micro_batch", "inspect", "nproc_per_node", "parallel", "timeout",
        "retries")   # a run that goes on may change these


def given_flags(cfg):
    """{name: value} of the flags that are not at their defaults, but for those that change no result."""
    changed = {}
    for f in fields(cfg):
        if f.name not in FREE and getattr(cfg, f.name) != f.default:
            changed[f.name] = getattr(cfg, f.name)
    return changed


@functools.cache
def described_fields(Config):
    """[(group, field name, comment)] of a Config, read from its source: its own fields, then inherited ones.
    A line that is only a comment begins a group."""
    found = []
    for cls in (c for c in Config.__mro__ if "__dataclass_fields__" in vars(c)):
        group = "flags"
        for line in inspect.getsource(cls).splitlines():
            heading = re.fullmatch(r"    # (.*)", line)
            field = re.match(r"    (\w+): .*?#\s*(.*)", line)
            more = re.fullmatch(r"\s{30,}# (.*)", line)
            if heading:
                group = heading[1]
            elif field and field[1] not in [name for _, name, _ in found]:   # else a script has its own
                found.append([group, field[1], field[2]])
            elif more and found and not field:
                found[-1][2] += " " + more[1]
    return found


def parse_bool(text):
    """A flag's bool; ArgumentTypeError for what is neither."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def parse_flags(Config, doc, args=None, defaults={}):
    """A Config filled from `--name value` or `--name=value`, and where a flag is not given from `defaults`
    {name: value}, else from the Config's own. Its help is the comment behind each field, in groups."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    known, groups = {f.name: f for f in fields(Config)}, {}
    for group, name, comment in described_fields(Config):
        f = known[name]
        kind, options = f.type, {"metavar": "TEXT"}
        if f.type in (int, float):
            options = {"metavar": "N" if f.type is int else "X"}
        elif typing.get_origin(f.type) is typing.Literal:
            choices = typing.get_args(f.type)
            kind, options = type(f.default), {"choices": choices, "metavar": "|".join(choices)}
        elif f.type is bool:
            kind, options = parse_bool, {"nargs": "?", "const": True, "metavar": "BOOL"}
        if f.default not in ("", None):
            comment += f" (default {f.default})"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{name}", type=kind, default=defaults.get(name, f.default),
                                   help=comment.replace("%", "%%"), **options)

    given, unknown = parser.parse_known_args(args)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], known, 1)
        hint = f", did you mean --{near[0]}?" if near else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    cfg = Config(**vars(given))
    for f in fields(Config):
        if f.type in (int, float):
            check_range(parser, f, getattr(cfg, f.name))
    return cfg


def check_range(parser, f, value):
    """End the program if a number is outside of what its flag can mean, or is none (nan)."""
    low, high = int(f.type is int and f.name not in MAY_BE_0), 2 ** 31 - 1
    if f.name in SHARES:
        high = 1
    if f.name.startswith("bias_"):
        low = -high
    if f.name in CLIPS and value == 0:
        parser.error(f"argument --{f.name}: 0 would let nothing be learned; a large number clips nothing")
    if not low <= value <= high:
        bounds = f"at least {low}" if value < low and high > 1 else f"between {low} and {high}"
        parser.error(f"argument --{f.name}: {value} is not {bounds}")


# ------------------------------------------------------------------------------------------------------------
# A program.


def program(main, Config, doc):
    """Run main(config) as a program: what a user can fix ends in one sentence and exit code 1, not in a
    traceback."""
    prepare_streams()
    cfg = parse_flags(Config, doc)
    if hasattr(cfg, "out"):
        cfg.out = cfg.out or default_out(cfg, Path(inspect.getfile(main)).stem)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main(cfg)
        end_processes()
    except SystemExit as e:
        if not e.code:      # the run was finished already
            end_processes()
        raise
    except (InputError, OSError) as e:   # OSError: no such file, no right to write it, disk full, ...
        sys.exit(f"error: {e}")
    except KeyboardInterrupt as e:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)     # of a parent that passes the same Ctrl-C on
        sys.exit(f"{Path(sys.argv[0]).stem}: interrupted{e}")
    except (RuntimeError, MemoryError) as e:
        if not is_lack_of_memory(e):
            raise
        at = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == inspect.getfile(main)][-1]
        sizes = [f"--{f.name} {getattr(cfg, f.name)}" for f in fields(cfg) if f.name in MEMORY]
        sys.exit(f"error: out of memory at {Path(at.filename).name}:{at.lineno}, `{at.line}`; what could be "
                 f"smaller: {', '.join(sizes)}")
    finally:
        SCREEN.end_line()


def prepare_streams():
    """Output that is closed goes nowhere, and a terminal that cannot show a character shows "?"."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:      # `>&-`, a daemon, pythonw
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")


def is_lack_of_memory(error):
    """Whether this error is one of the ways in which torch says that there is no memory left."""
    words = ("out of memory", "can't allocate memory")
    text = str(error)
    # The last one is oneDNN's; where it goes on, "... descriptor for a ...", something is not supported.
    return (isinstance(error, MemoryError) or any(word in text for word in words)
            or text.strip().endswith("could not create a primitive"))


def default_out(cfg, script):
    """out/<name>, where the tiny chain looks for it; out/mine/<name> with data or a model of one's own."""
    own = getattr(cfg, "data", "") or getattr(cfg, "init", "")
    name = {"pretrain": "base", "process": "reward_process"}.get(script, script)
    if getattr(cfg, "critic_test", ""):
        name = "critic_test"
    return f"out/mine/{name}" if own else f"out/{name}"


def interrupt(signum, frame):
    """A signal handler that does what Ctrl-C does."""
    raise KeyboardInterrupt


def names_in(text):
    """The parts of "A,B,C", in order. The name of an existing file or folder may have commas itself."""
    names, rest = [], text.split(",")
    while rest:
        n = len(rest)      # the next name is the longest run of parts that exists, else one part
        while n > 1 and not Path(",".join(rest[:n])).exists():
            n -= 1
        names.append(",".join(rest[:n]))
        rest = rest[n:]
    return names


def function_of(name, flag):
    """The Python function that a flag names as "module:function" or "FILE.py:function"; the current folder is
    searched first. InputError: there is none, or it cannot be imported."""
    where, _, function = name.rpartition(":")
    is_file = where.endswith(".py")
    path = Path(where if is_file else f"{where}.py")
    sys.path.insert(0, str(path.parent if is_file else Path.cwd()))
    try:
        # A file is read as itself: a module of its name, such as our reward.py, may be there already.
        if is_file or path.is_file():
            module = module_of_file(path)
        else:
            module = importlib.import_module(where)
    except Exception as e:   # whatever stands in somebody's file
        raise InputError(f"{flag} {name}: {where} cannot be imported: {type(e).__name__}: {e}") from None
    finally:
        del sys.path[0]
    if not callable(getattr(module, function, None)):
        found = getattr(module, "__file__", None) or where
        raise InputError(f"{flag} {name}: {found} has no function {function!r}")
    return getattr(module, function)


def module_of_file(path):
    """The module that a Python file is, called by its whole path."""
    name = str(path.resolve())
    spec = importlib.util.spec_from_file_location(name, name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)     # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
