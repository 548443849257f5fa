"""One run of a script: its flags and command line, device and precision, the links of the chain it starts
from, and the folder it leaves, with lock, log, progress line, save and resume.

    cfg = ...                            program(main, Config, doc) fills it from the command line
    device = setup(cfg)                  seeds, precision, processes
    run = Run(cfg, "sft", [data])        locks the folder; an unfinished run with the same flags goes on
    run.begin(n_steps, tok, policy=(model, optimizer))
    for step in run.steps():
        ...
        run.log(step, loss=..., tokens=...)
        if run.due(step):
            run.save(step, before=before)
    run.finish(before, after)
"""
import argparse
import ctypes
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# Large tensors in huge pages: GPT-2 124M trains 1.2x faster. And glibc keeps freed memory instead of fetching
# it anew from the system, page by page, in every step (LOG.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
try:
    for option, value in ((-3, 2 ** 25), (-1, 2 ** 30)):   # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(option, value)
except (OSError, AttributeError):   # another system
    pass

import torch   # noqa: E402

import model as gpt   # noqa: E402
from data import InputError, read_json, report, write_atomic   # noqa: E402
from data.checkpoint import finish_save, load_state, save   # noqa: E402
from data.parallel import (RANK, WORLD, all_sum, barrier, child_environment, full_state,   # noqa: E402
                           load_full_state, load_optimizer_state, optimizer_state, start_processes)

try:
    import fcntl
except ImportError:   # Windows: no lock
    fcntl = None

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------------------
# Flags.


@dataclass
class RunFlags:
    """The flags that every script shares; a script's own Config adds its groups before them."""
    # The run itself (the same in every script)
    out: str = ""   # folder for checkpoint, log and samples (default: out/ and the script's name; with
                                  # data or a model of your own out/mine/ and the name)
    overwrite: bool = False       # begin anew where --out holds a run with other flags
    resume: bool = False   # go on from the checkpoint in --out; an unfinished run with the same flags does so
                                  # by itself
    max_steps: int = 0            # stop after this many steps (0: run all)
    save_every: int = 100         # steps between checkpoints
    seed: int = 0                 # every random draw comes from (seed, step)
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; weights stay fp32
    compile: bool = False         # torch.compile every layer and, on a GPU, decode in CUDA graphs
    recompute: bool = False       # run layers again in the backward pass, for less memory


MAY_BE_0 = ("seed", "max_steps", "warmup", "value_warmup", "relabel", "lora")   # others count from 1
MEMORY = ("micro_batch", "batch_size", "rollouts", "max_len", "max_prompt", "max_new", "length")
SHARES = ("held_out", "agreement", "gamma", "lam", "label_smoothing", "flip_rate")   # between 0 and 1
FREE = ("out", "overwrite", "resume", "max_steps", "save_every", "device", "compile", "recompute",
        "micro_batch", "inspect", "nproc_per_node", "parallel", "timeout",
        "retries")   # a run that goes on may change these


@functools.cache
def described_fields(Config):
    """[(group, field name, comment)] of a Config, in the order of its source, what it inherits last. A group
    is named by a comment line of its own."""
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


def parse_float(text):
    """A flag's finite float; ArgumentTypeError for nan and inf."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return float(text)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def parse_flags(Config, doc, args=None):
    """A Config filled from `--name value` or `--name=value`. Its help is the comment behind each field, in
    groups."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    known, groups = {f.name: f for f in fields(Config)}, {}
    for group, name, comment in described_fields(Config):
        f = known[name]
        kind, options = f.type, {}
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(f.type)
            options["metavar"] = "|".join(options["choices"])
            kind = type(f.default)
        elif kind is bool:
            kind, options["nargs"], options["const"], options["metavar"] = parse_bool, "?", True, "BOOL"
        else:
            options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        if kind is float:
            kind = parse_float
        if f.default not in ("", None):
            comment += f" (default {f.default})"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{name}", type=kind, default=f.default, help=comment.replace("%", "%%"),
                                   **options)

    given, unknown = parser.parse_known_args(args)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], known, 1)
        hint = f", did you mean --{near[0]}?" if near else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    cfg = Config(**vars(given))
    for f in fields(Config):
        if f.type in (int, float) and not f.name.startswith("bias_"):
            check_range(parser, f, getattr(cfg, f.name))
    return cfg


def check_range(parser, f, value):
    """End the program if a number is outside of what its flag can mean."""
    low = int(f.type is int and f.name not in MAY_BE_0)
    high = 1 if f.name in SHARES else 2 ** 31 - 1 if f.type is int else math.inf
    if not low <= value <= high:
        bounds = f"at least {low}" if value < low and high > 1 else f"between {low} and {high}"
        parser.error(f"argument --{f.name}: {value} is not {bounds}")


def program(main, Config, doc):
    """Run main(config) as a program: what a user can mend ends in one sentence and exit code 1, not in a
    traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")   # a terminal that cannot show a character shows "?"
    cfg = parse_flags(Config, doc)
    if hasattr(cfg, "out"):
        cfg.out = cfg.out or default_out(cfg, Path(inspect.getfile(main)).stem)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main(cfg)
    except (InputError, OSError) as e:   # OSError: no such file, no right to write it, disk full, ...
        sys.exit(f"error: {e}")
    except KeyboardInterrupt as e:
        sys.exit(f"{Path(sys.argv[0]).stem}: interrupted{e}")
    except RuntimeError as e:
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise
        at = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == inspect.getfile(main)][-1]
        sizes = [f"--{f.name} {getattr(cfg, f.name)}" for f in fields(cfg) if f.name in MEMORY]
        sys.exit(f"error: out of memory at {Path(at.filename).name}:{at.lineno}, `{at.line}`; what could be "
                 f"smaller: {', '.join(sizes)}")


def default_out(cfg, script):
    """out/<name>, where the tiny chain looks for it; out/mine/<name> with data or a model of one's own."""
    own = getattr(cfg, "data", "") or getattr(cfg, "init", "")
    name = {"pretrain": "base"}.get(script, script)
    if getattr(cfg, "process", False):
        name += "_process"
    return f"out/mine/{name}" if own else f"out/{name}"


def interrupt(signum, frame):
    """A signal handler that does what Ctrl-C does."""
    raise KeyboardInterrupt


def function_of(name, flag):
    """The Python function that a flag names as "module:function" or "FILE.py:function"; the current folder is
    searched. InputError: there is none, or it cannot be imported."""
    where, _, function = name.rpartition(":")
    path = Path(where)
    sys.path.insert(0, str(path.parent if path.suffix == ".py" else Path.cwd()))
    try:
        module = importlib.import_module(path.stem if path.suffix == ".py" else where)
    except Exception as e:   # whatever stands in somebody's file
        raise InputError(f"{flag} {name}: {where} cannot be imported: {type(e).__name__}: {e}") from None
    finally:
        del sys.path[0]
    if not callable(getattr(module, function, None)):
        raise InputError(f"{flag} {name}: {module.__file__} has no function {function!r}")
    return getattr(module, function)


# ------------------------------------------------------------------------------------------------------------
# Device, precision, threads, random numbers, optimizer.


def setup(cfg):
    """Seeds, threads, precision and processes, as the flags say. Returns the device. The numerics of every
    script are fp32 weights and products in bf16 where the hardware has them (model.Linear)."""
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise InputError(f"--device {device}: expected cpu, cuda, cuda:1 or the like")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this torch sees no CUDA device; try --device cpu")
    device = start_processes(device)
    if RANK:
        sys.stdout = open(os.devnull, "w")   # the first rank speaks
    bf16 = cfg.dtype == "bfloat16"
    if cfg.dtype == "auto" and device.startswith("cuda"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif cfg.dtype == "auto" and device == "cpu":
        bf16 = cpu_has_bf16()
    gpt.Linear.compute = torch.bfloat16 if bf16 else None
    if device == "cpu":
        choose_threads()
    if getattr(cfg, "compile", False) and device.startswith("cuda"):
        gpt.compile_decoding()
    return torch.device(device)


def cpu_has_bf16():
    """True where the CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX); emulation would be
    slower."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_threads():
    """As many threads as cores are free just now: two threads on one free core are ten times slower than one
    (LOG.md). OMP_NUM_THREADS overrides. Scripts started from here get the same number, so that equal runs
    give equal bits."""
    if "OMP_NUM_THREADS" in os.environ or WORLD > 1 or not Path("/proc/stat").exists():
        return
    before = idle_seconds()
    time.sleep(0.3)
    free = round((idle_seconds() - before) / 0.3)
    n = max(1, min(torch.get_num_threads(), free))
    if n < torch.get_num_threads():
        print(f"{n} of {torch.get_num_threads()} threads, because other programs use the processor now "
              "(OMP_NUM_THREADS=N overrides)", flush=True)
    torch.set_num_threads(n)
    os.environ["OMP_NUM_THREADS"] = str(n)


def idle_seconds():
    """Seconds that all cores together have been idle (Linux)."""
    numbers = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(numbers[4]) / os.sysconf("SC_CLK_TCK")


MEASURE, RELABEL = 2 ** 31 - 1, 2 ** 20   # streams of random numbers beside those of the steps 0, 1, 2, ...


def seeded(seed, step):
    """A generator for one step's random draws; because of it a resumed run needs no saved state of one."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2 ** 63)


def adamw(model, weight_decay=0.0, eps=1e-8):
    """AdamW with weight decay on matrices only (norms and biases are left alone). Its learning rate is set at
    each step."""
    matrices, vectors = [], []
    for p in model.parameters():
        if p.requires_grad:
            (matrices if p.dim() >= 2 else vectors).append(p)
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=eps, fused=True)


def set_lr(optimizer, lr):
    """Set the learning rate of every group of an optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def cosine(step, steps, warmup, floor=0.1):
    """Learning-rate factor: linear warmup, then a cosine from 1 down to floor. In a run shorter than four
    warmups the warmup shrinks to a quarter of it."""
    warmup = max(1, min(warmup, steps // 4))
    falling = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * falling


def batches(lengths, batch_size, seed, epoch):
    """One pass over examples of these lengths, as lists of their numbers, batch by batch, each of similar
    lengths, so that little is padded: shuffle, sort within windows of 16 batches, shuffle the batches. With
    several processes the last batch loses the examples that do not divide evenly over them. InputError:
    --batch_size does not, or there are fewer examples than processes."""
    if batch_size % WORLD or len(lengths) < WORLD:
        raise InputError(f"--batch_size {batch_size}, {len(lengths)} examples: they do not divide over "
                         f"{WORLD} processes; --batch_size {max(1, batch_size // WORLD) * WORLD} would")
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    out = []
    for start in range(0, len(order), 16 * batch_size):
        window = sorted(order[start: start + 16 * batch_size], key=lambda i: lengths[i])
        out += [window[i: i + batch_size] for i in range(0, len(window), batch_size)]
    out = [batch[: len(batch) // WORLD * WORLD] for batch in rng.sample(out, len(out))]
    return [batch for batch in out if batch]


# ------------------------------------------------------------------------------------------------------------
# The chain: base -> sft -> reward -> ppo and so on.

LINKS = {   # name: (script, the links it starts from, rough seconds on two cores, what it does)
    "base": (["-m", "data.pretrain"], [], 70, "reads the internet of the tiny world"),
    "sft": (["sft.py"], ["base"], 20, "learns to answer from demonstrations"),
    "reward": (["reward.py"], ["sft"], 45, "learns what the annotator prefers"),
}


PART_OF_A_CHAIN = "RLHF_PART_OF_A_CHAIN"   # environment variable of a script that another one runs
NEXT = {   # stage: commands worth trying after it
    "base": ["python -m data.chat {out}", "python sft.py"],
    "sft": ["python -m data.chat {out}", "python reward.py", "python ppo.py"],
    "reward": ["python -m data.vote --reward {out}", "python ppo.py --reward {out}"],
    "ppo": ["python -m data.chat {out}", "python ppo.py --inspect", "python dpo.py"],
    "dpo": ["python -m data.chat {out}", "python dpo.py --loss ipo --out out/ipo",
            "python -m data.evaluate out/base out/sft {out}"],
    "cai": ["python -m data.chat {out}", "python -m data.evaluate out/helpful {out}"],
}


def sibling(cfg, name):
    """The folder of a link of the chain: out/<name> beside this run's own --out (out/mine/ppo starts from
    out/sft)."""
    parent = Path(cfg.out).parent
    return str((parent.parent if parent.name == "mine" else parent) / name)


def unfinished(folder):
    """True where a link has to be made, or its run was cut off (a run.json, but no result.json)."""
    folder = Path(folder)
    cut_off = (folder / "run.json").exists() and not (folder / "result.json").exists()
    return not (folder / "config.json").exists() or cut_off


def need(cfg, *names):
    """Folders of links of the chain, each a name in LINKS; what is missing or unfinished is made first, by
    running its script with the same seed, device and precision, in one process."""
    wanted = []
    for name in names:
        add_link(cfg, name, wanted)
    missing = [name for name in wanted if unfinished(sibling(cfg, name))]
    if RANK == 0 and missing:
        plan = ", ".join(f"{name} ({LINKS[name][2]} s)" for name in missing)
        print(f"to do: {plan}, then {Path(sys.argv[0]).stem}", flush=True)
        for i, name in enumerate(missing):
            script, _, _, does = LINKS[name]
            print(f"\n{i + 1}/{len(missing) + 1} {name}: {does}", flush=True)
            run_script(cfg, script, sibling(cfg, name))
            print(report.what_came_out(name, sibling(cfg, name), result_of(sibling(cfg, name))["after"]))
        print(f"\n{len(missing) + 1}/{len(missing) + 1} {Path(sys.argv[0]).stem}", flush=True)
    barrier()
    for name in names:
        config = run_of(sibling(cfg, name)).get("config", {})
        own = config.get("data") or config.get("init")
        if own:
            print(f"{sibling(cfg, name)} was made with flags of its own, from {own}", flush=True)
    folders = [sibling(cfg, name) for name in names]
    return folders[0] if len(names) == 1 else folders


def add_link(cfg, name, wanted):
    """Add a link, after the links it starts from, to the list of wanted ones. One that is there needs no
    others."""
    if name in wanted:
        return
    if unfinished(sibling(cfg, name)):
        for before in LINKS[name][1]:
            add_link(cfg, before, wanted)
    wanted.append(name)


def run_script(cfg, script, out, flags=(), processes=1):
    """Run another script (a list, such as ["sft.py"]) to its end, its --out being `out`. InputError: it
    failed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [str(ROOT / part) if part.endswith(".py") else part for part in script]
    command += [*script, "--out", str(out), "--seed", str(cfg.seed), "--dtype", cfg.dtype, *map(str, flags)]
    if cfg.device:
        command += ["--device", cfg.device]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))   # for `-m data.pretrain`
    environment = child_environment() | {"PYTHONPATH": path, PART_OF_A_CHAIN: "1"}
    if subprocess.run(command, env=environment).returncode:
        raise InputError(f"{' '.join(script)} failed, so there is no {out} to start from")


def chain_columns(cfg, name, before, after):
    """The closing table's columns: of the tiny chain base | SFT | `name`, else before | `name`. Losses of
    different kinds are not comparable and stay out."""
    columns = {"SFT": before, name: after}
    if cfg.data or cfg.init:
        columns = {"before": before, name: after}
    elif "before" in result_of(sibling(cfg, "sft")):
        columns = {"base": result_of(sibling(cfg, "sft"))["before"]} | columns    # on the same prompts
    return {title: {k: v for k, v in column.items() if k != "loss"} for title, column in columns.items()}


def result_of(folder):
    """The result.json of a finished run, {} if there is none."""
    path = Path(folder) / "result.json"
    return read_json(path, kind=dict) if path.exists() else {}


def run_of(folder):
    """The run.json of a run, finished or not: its stage, flags and inputs; {} if there is none."""
    path = Path(folder) / "run.json"
    return read_json(path, kind=dict) if path.exists() else {}


def fingerprint(path):
    """A hash of a file, or of the weights in a folder: of its size and of its first and last megabyte."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        return "none"
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(2 ** 20)
        f.seek(max(0, size - 2 ** 20))
        return hashlib.sha256(head + f.read() + str(size).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------


LEFT_BY_A_RUN = ("state.pt", "log.jsonl", "samples.txt", "answers.jsonl", "result.json", "comparisons.jsonl",
                 "process.jsonl", "held_out.jsonl", "inspect.json")   # beside the checkpoint and run.json


class Run:
    """The folder of one run, and its voice: it alone writes there and prints. Files: run.json (flags and
    inputs), log.jsonl, samples.txt, answers.jsonl, the checkpoint with state.pt, result.json (its absence
    tells an unfinished run)."""

    def __init__(self, cfg, stage, inputs=(), dry=False, begun="state.pt"):
        """inputs: files and folders that the plan and what is kept between steps depend on. Locks the folder
        before anything is written. A finished run with the same flags shows its table and ends the program;
        one with other flags is an InputError. dry: only look (ppo.py --inspect): take a step or two on from
        what is in the folder, whatever its flags, and write nothing. begun: the file that tells that a run
        has begun."""
        self.cfg, self.stage, self.folder, self.dry, self.begun = cfg, stage, Path(cfg.out), dry, begun
        self.first, self.skipped, self.stopping, self.shown, self.history = 0, 0, False, 0.0, []
        self.start, self.step_seconds, self.slow = time.time(), [], False
        self.line_open, self.warned = False, set()
        flags = {name: value for name, value in asdict(cfg).items() if name not in FREE}
        if begun != "state.pt":      # a run of several scripts: where one of them stops, others begin
            flags["max_steps"] = cfg.max_steps
        told = {"stage": stage, "config": asdict(cfg), "flags": flags,
                "inputs": {str(path): fingerprint(path) for path in inputs}}
        # The first process looks. Where it ends, the others end too: 1 stands for success, 2 for an error.
        ends = 0
        try:
            if RANK == 0 and not dry:
                self.open_folder(told)
        except BaseException as e:
            ends = 1 if isinstance(e, SystemExit) else 2
            raise
        finally:
            ends = all_sum(ends)
        if ends:
            sys.exit(int(ends) - 1)
        self.state = load_state(self.folder)
        self.first = self.state.get("step", 0)
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.stop)

    def open_folder(self, told):
        """Lock the folder and make it ready. Ends the program if the run is finished; InputError if it may
        not begin."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock()
        finish_save(self.folder)      # one that was cut off in the midst counts
        goes_on = self.what_is_there(told)
        for name in ("result.json",) if goes_on else LEFT_BY_A_RUN:
            (self.folder / name).unlink(missing_ok=True)
        write_atomic(self.folder / "run.json", json.dumps(told, indent=1).encode())

    def lock(self):
        """InputError if another run is writing here. The system lets go of the lock when this process
        ends."""
        self.lock_file = open(self.folder / ".lock", "w")
        if fcntl is None:
            return
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another run is writing there; choose another --out") from None
        except OSError as e:
            print(f"{self.folder}: no locks here ({e.strerror}); see that no other run writes there")

    def what_is_there(self, told):
        """Whether the folder holds an unfinished run with the same flags. Ends the program if it is
        finished."""
        result, old = result_of(self.folder), run_of(self.folder)
        is_started = (self.folder / self.begun).exists() or bool(result)
        if not is_started or self.cfg.overwrite:
            return False
        other = self.difference(old, told)
        if other:
            raise InputError(f"{self.folder} holds a run of its own ({other}); choose another --out, or "
                             "--overwrite it")
        theirs, ours = result.get("config", {}).get("max_steps", 0), self.cfg.max_steps
        if result and (theirs == 0 or 0 < ours <= theirs):
            print(f"{self.folder} is finished: a run with the same flags took {result['seconds']:.0f} s "
                  "(--overwrite repeats it)")
            print(report.table(result["columns"]))
            sys.exit(0)
        return True

    def difference(self, old, told):
        """What tells two run.json apart, as a phrase; "" if nothing does."""
        if not old:
            return "no run.json says how it was made"
        if old["stage"] != told["stage"]:
            return f"{old['stage']} made it"
        for name, value in told["flags"].items():
            if old["flags"].get(name) != value:
                return f"--{name} was {old['flags'].get(name)!r}, now {value!r}"
        # By content: where a file lies is told by the flags, and the whole folder may have moved since.
        for (path, value), before in zip(told["inputs"].items(), old["inputs"].values()):
            if before != value:
                return f"{path} has changed since"
        return ""

    def stop(self, signum, frame):
        """Ctrl-C or a polite kill: finish the step and save. A second one ends the run where it is."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.say("stopping after this step; once more stops at once")

    def begin(self, n_steps, tok, **trained):
        """trained: name=(model, optimizer) of all that is trained; the first model is the checkpoint in the
        folder. They are given their state if the run goes on."""
        self.n_steps, self.tok, self.trained = min(n_steps, self.cfg.max_steps or n_steps), tok, trained
        self.step_start = self.loop_start = time.time()
        for name, (model, optimizer) in trained.items():
            if self.first:
                load_full_state(model, self.state["models"][name])
                load_optimizer_state(model, optimizer, self.state["optimizers"][name])
        if self.dry:
            self.n_steps = self.first + (1 if self.first else 2)  # the second one, of a policy that has moved
            return
        path = self.folder / "log.jsonl"
        if self.first and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()[: self.first]
            self.history = [json.loads(line) for line in lines]
        if RANK == 0:
            self.log_file = open(path, "w", encoding="utf-8")
            for row in self.history:
                self.write_row(row)
        if self.first:
            self.say(f"{self.folder}: going on after step {self.first}")

    def steps(self):
        """The numbers of the steps that are left, from 0 on."""
        self.loop_start = time.time()
        for step in range(self.first, self.n_steps):
            self.step_start = time.time()
            yield step

    def finite(self, norm, model, rows):
        """Whether a step may be taken with this gradient norm. One that is not finite is skipped, said and
        counted, with the data rows it came from; the fourth ends the run."""
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if norm.isfinite():
            return True
        bad = []
        for name, p in model.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                bad.append(name)
        self.skipped += 1
        what = (f"step skipped: the gradient of {bad[0]} and {len(bad) - 1} more tensors is not finite; "
                f"data rows {list(rows)[:8]} ...")
        if self.skipped > 3:
            raise InputError(f"{what}. The fourth such step: try a smaller --lr or --dtype float32")
        self.say(what)
        return False

    def moment(self, step, first, ends):
        """The name of a step whose numbers are kept for the page: "first", "middle", "last", or ""."""
        if self.dry or ends or step + 1 == self.n_steps:
            return "last"
        return {first: "first", self.n_steps // 2: "middle"}.get(step, "")

    def check_finite(self, row_of, **tensors):
        """InputError if an entry of a tensor (B, ..) is not finite. row_of: the data row of each of the B."""
        for name, x in tensors.items():
            good = x.reshape(len(x), -1).isfinite().all(1)
            if not good.all():
                bad = [i for i, fine in zip(row_of, good.tolist()) if not fine]
                raise InputError(f"the {name} is not finite for the prompts in rows {bad[:8]}; nothing was "
                                 "updated. Look at that model's weights, and try --dtype float32")

    def log(self, step, tokens=0, show=(), **figures):
        """Record step (from 0), with `tokens` read in it; show the figures named in `show` (default: all) at
        most every few seconds. JSON has no NaN; it is left out."""
        seconds = time.time() - self.step_start
        if tokens:
            figures["tok_s"] = tokens / seconds
        if self.skipped:
            figures["skipped"] = self.skipped
        row = {}
        for name, value in figures.items():
            value = float(value)      # waits for the GPU
            if math.isfinite(value):
                row[name] = float(f"{value:.6g}")
        self.history.append({"step": step + 1} | row)
        if self.dry:
            return
        if RANK == 0:
            self.write_row(self.history[-1])
        self.watch_speed(seconds)
        self.speak_up()
        left = self.n_steps - step - 1
        now, pause = time.time(), 0.2 if sys.stdout.isatty() else 5
        if now - self.shown > pause or left == 0:
            self.shown = now
            remaining = (now - self.loop_start) / (step + 1 - self.first) * left
            shown = {name: row[name] for name in show or row if name in row}
            self.show(step, shown, row.get("tok_s"), remaining)

    def write_row(self, row):
        """Append a row to log.jsonl."""
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()

    def speak_up(self):
        """Say what ails a PPO run, each illness once."""
        if self.stage == "ppo":
            for name, sentence in report.health(self.history, self.cfg).items():
                if name not in self.warned:
                    self.say(f"health, {name}: {sentence}")
                    self.warned.add(name)

    def show(self, step, figures, speed, seconds_left):
        """The progress line: at most 80 columns, redrawn in place on a terminal."""
        parts = [f"{self.stage} {step + 1}/{self.n_steps}"]
        parts += [f"{name} {value:.3g}" for name, value in figures.items() if name != "tok_s"][:5]
        if speed:
            parts.append(f"{speed:,.0f} tokens/s")
        parts.append(f"{seconds_left // 60:.0f}:{seconds_left % 60:02.0f} left")
        while len(" | ".join(parts)) > 79 and len(parts) > 3:
            del parts[-3]
        line = " | ".join(parts)
        if sys.stdout.isatty():
            print(f"\r{line:79}", end="", flush=True)
            self.line_open = step + 1 < self.n_steps
            if not self.line_open:
                print(flush=True)
        else:
            print(line, flush=True)

    def watch_speed(self, seconds):
        """Say once what to do when steps have become several times slower than they were."""
        self.step_seconds.append(seconds)
        if len(self.step_seconds) < 40 or self.slow:
            return
        best = sorted(self.step_seconds)[len(self.step_seconds) // 10]
        now = sorted(self.step_seconds[-10:])[2]
        if now > 4 * best:
            self.slow = True
            self.say(f"steps take {now / best:.0f} times as long as before: others use the processor.\n"
                     "Ctrl-C saves; with OMP_NUM_THREADS=1 before the same command it goes on, often faster")

    def say(self, text):
        """Print a line of its own."""
        if self.line_open:
            print()
            self.line_open = False
        print(text, flush=True)

    def due(self, step):
        """Whether a step ends with a checkpoint: every --save_every steps, at the end, and when asked to
        stop."""
        self.stopping = bool(all_sum(self.stopping))   # all ranks or none
        last = step + 1 == self.n_steps
        return not self.dry and ((step + 1) % self.cfg.save_every == 0 or last or self.stopping)

    def save(self, step, **state):
        """Save the checkpoint after a step, with all that goes on from there: models, optimizers, and
        `state`, tensors, numbers and strings by name, which `self.state` has after a resume. Ends the program
        if it was asked to stop."""
        models, optimizers = {}, {}
        for name, (model, optimizer) in self.trained.items():
            models[name] = full_state(model, trained_only=True)
            optimizers[name] = optimizer_state(model, optimizer)
        state |= {"step": step + 1, "models": models, "optimizers": optimizers}
        main_model = next(iter(self.trained.values()))[0]
        save(self.folder, main_model, self.tok, state)
        if self.stopping:
            raise KeyboardInterrupt(f" after step {step + 1}, saved in {self.folder}; this command goes on")

    def measure(self, title, sampler, tests):
        """What a policy's sampling copy says to the test prompts, the same draws whoever asks: figures and
        Answers (report.measure). A few of the answers go into samples.txt under the title."""
        figures, answers = report.measure(sampler, self.tok, tests, seeded(self.cfg.seed, MEASURE))
        self.samples(title, tests.prompts[: report.PROBES], answers.texts)
        return figures, answers

    def write(self, name, value):
        """Write a JSON file into the folder."""
        write_atomic(self.folder / name, json.dumps(value).encode())

    def samples(self, title, prompts, answers):
        """Append the answers (texts) to a few prompts (messages) to samples.txt."""
        if RANK == 0 and not self.dry:
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as f:
                f.write(report.samples_text(title, prompts, answers))

    def finish(self, before, after, columns=None, answers=(), device=None):
        """answers.jsonl, result.json, the closing table (of `columns` if given) and the page. before, after
        and columns: figures by name; answers: rows as report.measure gives them. device: where it ran, if
        nothing was trained."""
        if RANK:
            return
        self.log_file.close()
        speeds = sorted(row["tok_s"] for row in self.history if "tok_s" in row)
        columns = columns or {"before": before, "after": after}
        for model, _ in self.trained.values():
            device = model.wte.weight.device
        result = {"stage": self.stage, "seed": self.cfg.seed, "config": asdict(self.cfg),
                  "seconds": round(time.time() - self.start, 1), "device": str(device),
                  "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
                  "before": before, "after": after, "columns": columns}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
        write_atomic(self.folder / "answers.jsonl", lines.encode())
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1).encode())
        if len(columns) > 2 and "base" in columns:
            folders = {"base": sibling(self.cfg, "base"), "SFT": sibling(self.cfg, "sft")}
            folders[self.stage] = self.folder
            self.say(report.side_by_side(folders))
        self.say("\n" + report.table(columns))
        if PART_OF_A_CHAIN in os.environ:    # the script that asked for this one goes on
            return
        for command in NEXT.get(self.stage, ()):
            self.say(f"next: {command.format(out=self.folder)}")
        self.say(report.write_page(self.folder))
