"""What the tests of the scripts share: a copy of the suite over a slice of its world, and a quick way to run
a script; and the second process in which the other tests run.

Importing torch takes two seconds and some hundred runs need it, so one server process imports it and forks:
each script still runs as `__main__` of a process of its own, with its own arguments, folder, input, output
and exit code.
"""
import ast
import compileall
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

# What no test may depend on: RLHF_TEST_SEED moves the models of the chain below and their draws,
# RLHF_TEST_THREADS the order of sums. (One thread: the tests' tensors are small, and the other cores have
# scripts to run.)
SEED, THREADS = int(os.environ.get("RLHF_TEST_SEED", 0)), os.environ.get("RLHF_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = THREADS

import pytest   # noqa: E402
import torch    # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# warnings are errors (but for a log left open by an error); a fixed number of threads on the CPU, so that
# equal runs give equal bits; no hub, and nothing written at home
ENV = {**os.environ, "PYTHONWARNINGS": "error,ignore::ResourceWarning", "COLUMNS": "400",
       "CUDA_VISIBLE_DEVICES": "", "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONDONTWRITEBYTECODE": "1"}
SERVER = r"""
import gc, json, os, runpy, signal, sys, traceback
import numpy, tiktoken, torch
# optimizers import the first
import torch._dynamo, torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
sys.modules["matplotlib"] = None                # as if it were not installed: no script needs it
# tests end processes, not the machine, and wait long for a disk
os.fsync = lambda file: None
signal.signal(signal.SIGCHLD, signal.SIG_IGN)          # nobody waits for the forks below
gc.freeze()     # the forks need not go through what is imported here
for line in sys.stdin:
    job = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        with open(job["dir"] + "/pid", "w") as f:
            f.write(str(pid))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(job["dir"] + "/rc.new", "w") as f:
            f.write(str(code))
        os.replace(job["dir"] + "/rc.new", job["dir"] + "/rc")
        os._exit(0)
    os.setpgid(0, 0)                                     # so that what it starts can be ended with it
    write = os.O_WRONLY | os.O_CREAT
    for fd, (name, mode) in enumerate((("in", os.O_RDONLY), ("out", write), ("err", write))):
        os.dup2(os.open(f"{job['dir']}/{name}", mode), fd)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    sys.argv, script = job["argv"], job["argv"][0]
    # else a module, as `python -m` runs it in the suite's folder
    is_file = script.endswith(".py")
    sys.path[0:0] = [os.path.dirname(script) if is_file else job["root"],
                     *filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))]
    code = 0
    try:
        if is_file:
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as e:                              # what the interpreter does with it
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


def copy_suite(folder, **rows):
    """The scripts and the data package over the first rows of the world's files and corpus: byte by byte, but
    for the shape of the tiny model, which has a fifth of the weights."""
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    tiny = folder / "data" / "world" / "tiny"
    for name, n in {"test": 24, "demos": 400, "rl": 200, "preference": 300, **rows}.items():
        lines = (tiny / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tiny / f"{name}.jsonl").write_text("".join(lines[:n]), encoding="utf-8")
    docs = (tiny / "corpus.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    (tiny / "corpus.txt").write_text("<|endoftext|>".join(docs[: len(docs) // 6]), encoding="utf-8")
    pretrain = folder / "data" / "pretrain.py"
    text = pretrain.read_text()
    shape = "n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_inner=344, head_dim=32"
    assert text.count(shape) == 1
    small = "n_layer=2, n_head=4, n_kv_head=4, n_embd=64, n_inner=172, head_dim=16"
    pretrain.write_text(text.replace(shape, small))
    return folder


STOPPER = """
import os, runpy, sys
root, step, signum, script, *flags = sys.argv[1:]
sys.path.insert(0, root)
sys.argv = [script, *flags]
from data.run import Run
log = Run.log

def log_then_stop(self, at, *args, **metrics):
    log(self, at, *args, **metrics)
    if at + 1 == int(step):
        os.kill(os.getpid(), int(signum))

Run.log = log_then_stop
if script.endswith(".py"):
    runpy.run_path(os.path.join(root, script), run_name="__main__")
else:
    runpy.run_module(script, run_name="__main__", alter_sys=True)
"""


class Suite:
    """The copy at `root`; `run` and `start` run its scripts."""

    def __init__(self, folder):
        self.root, self.jobs, self.n, self.early = copy_suite(folder / "suite"), folder / "jobs", 0, {}
        self.jobs.mkdir()
        self.lock, self.background = threading.Lock(), ThreadPoolExecutor(1)
        compileall.compile_dir(self.root, quiet=1)   # once, not in every run
        self.env = ENV | {"NANORLHF_CACHE": str(folder / "cache")}
        with open(folder / "server_errors", "wb") as errors:
            self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, text=True,
                                           env=self.env, stderr=errors)

    def start(self, script, *args, cwd=None, stdin="", env=None):
        """Begin `python SCRIPT ARGS`, or `python -m SCRIPT ARGS` of a module such as data.pretrain;
        finish(job) waits for it."""
        with self.lock:
            self.n += 1
            job = self.jobs / str(self.n)
        job.mkdir(parents=True)
        (job / "in").write_text(stdin)
        script = str(script)
        if script.endswith(".py"):
            script = str(self.root / script)   # an absolute path stays as it is
        told = {"dir": str(job), "cwd": str(cwd or self.root), "env": env or {}, "root": str(self.root),
                "argv": [script, *map(str, args)]}
        with self.lock:
            self.server.stdin.write(json.dumps(told) + "\n")
            self.server.stdin.flush()
        return job

    def start_and_stop(self, step, script, *args, signum=signal.SIGINT, **kw):
        """Begin a script that gets a signal in the midst of this step (from 1), after which it saves and
        ends."""
        path = self.jobs / "stopper.py"
        path.write_text(STOPPER)
        return self.start(path, self.root, step, int(signum), script, *args, **kw)

    def finish(self, job, timeout=300):
        """SimpleNamespace(rc, out, err) of a started job."""
        end = time.time() + timeout
        while not (job / "rc").exists():
            if time.time() > end or self.server.poll() is not None:
                self.kill(job)
                pytest.fail(f"{job}: no end within {timeout} s")
            time.sleep(0.01)
        rc, out, err = ((job / name).read_text() for name in ("rc", "out", "err"))
        return SimpleNamespace(rc=int(rc), out=out, err=err)

    def signal(self, job, signum):
        """Send a signal to a job's process, which has begun."""
        os.kill(int((job / "pid").read_text()), signum)

    def kill(self, job):
        """End a job that has not ended, and all that it started; wait until they and their locks are gone."""
        if (job / "pid").exists() and not (job / "rc").exists():
            group, end = int((job / "pid").read_text()), time.time() + 5
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
                while time.time() < end:
                    time.sleep(0.02)
                    os.killpg(group, 0)

    def run(self, script, *args, **kw):
        return self.finish(self.start(script, *args, **kw))

    def run_all(self, commands, timeout=300, **kw):
        """The results of several [script, *args], in order; two run at a time."""
        jobs = []
        for i in range(len(commands)):
            jobs += [self.start(*command, **kw) for command in commands[len(jobs): i + 2]]
            yield self.finish(jobs[i], timeout)

    def ok(self, script, *args, **kw):
        """Run and insist on success: exit code 0 and not a word, no warning either, on stderr."""
        r = self.run(script, *args, **kw)
        assert r.rc == 0 and r.err == "", f"{script} {args}: exit code {r.rc}\n{r.out[-500:]}\n{r.err}"
        return r


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    suite = Suite(tmp_path_factory.mktemp("scripts"))
    yield suite
    suite.background.shutdown(wait=False, cancel_futures=True)
    for job in suite.jobs.iterdir():
        suite.kill(job)
    suite.server.stdin.close()
    suite.server.wait(10)


CAI_FLAGS = ["--prompts", 24, "--helpful_prompts", 40, "--max_steps", 8, "--k", 3, "--critiques", 1,
             "--max_new", 24, "--max_critique", 16, "--sft_flags", "--max_new 16 --warmup 2",
             "--reward_flags", "--held_out 0.3", "--rl_flags", "--iterations 1 --rollouts 16 --max_new 16"]
CHAIN = {   # folder: the script, its flags
    "base": ["data.pretrain", "--steps", 60],
    "sft": ["sft.py", "--max_steps", 30, "--warmup", 2, "--max_new", 24],
    "reward": ["reward.py", "--prompts", 80, "--epochs", 9, "--max_steps", 4, "--held_out", 0.3,
               "--max_new", 24,
               "--bias_length", 0.2],   # so weak a model scores 0: else all pairs would be ties
    "ppo": ["ppo.py", "--iterations", 3, "--rollouts", 16, "--value_warmup", 1, "--max_new", 16],
    "dpo": ["dpo.py", "--epochs", 9, "--max_steps", 3, "--max_new", 16]}
for command in CHAIN.values():
    command += ["--seed", SEED]


def pytest_collection_modifyitems(items):
    """Last comes what has been running since the chain was made."""
    items.sort(key=lambda item: item.name == "test_the_script")


class Reports:
    """Keeps what becomes of each test in a file, a dict a line (not JSON, which has no tuples)."""

    def __init__(self, config, path):
        self.config, self.file = config, open(path, "w")

    def pytest_runtest_logreport(self, report):
        told = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(f"{told!r}\n")
        self.file.flush()


def run_and_end(config, items, path):
    """In a process that was forked for it: run some tests, leave their reports in a file, and end. (What is
    printed is captured in files, and its files would be those of the parent.)"""
    code = 1
    os.nice(5)      # the other process has more to do
    try:
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Reports(config, path))
        for item, following in zip(items, [*items[1:], None]):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        code = 0
    finally:
        os._exit(code)


def tell(config, path):
    """What another process reported, as if it had been here. Returns the name of the last test that came to
    its end."""
    last = "none"
    for line in path.read_text().splitlines():
        report = config.hook.pytest_report_from_serializable(config=config, data=ast.literal_eval(line))
        if report.when == "setup":
            config.hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        config.hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            config.hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
            last = report.nodeid
    return last


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Of a whole run, the tests that start no script run in a second process, beside those that do: that is
    half of the time on two cores. Not where somebody looks on (-s, -x, --pdb), and not for a few tests."""
    config = session.config
    pure = [item for item in session.items if "suite" not in item.fixturenames]
    rest = [item for item in session.items if "suite" in item.fixturenames]
    looked_on = config.option.capture == "no" or config.option.maxfail or config.option.usepdb
    can_fork = hasattr(os, "fork") and THREADS == "1" and not torch.cuda.is_available()
    if looked_on or not can_fork or min(len(pure), len(rest)) < 100 or config.option.collectonly:
        return (yield)
    config._tmp_path_factory.getbasetemp()      # one for both
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reports"
        path.touch()
        process = os.fork()
        if process == 0:
            run_and_end(config, pure, path)
        try:
            session.items = rest
            result = yield
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        except BaseException:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise
        last = tell(config, path)
        if code != 0:
            raise session.Interrupted(f"the process beside this one ended after {last} (exit code {code})")
    return result


@pytest.fixture(scope="session")
def chain(suite, request, tmp_path_factory):
    """A folder with base, sft, reward, ppo and dpo of a short run through all stages. What takes long and is
    asked for by a test of this session begins early, and runs beside all that follows: fresh_clone, cai.py,
    and what a module's EARLY names, {test: function(suite, chain, folder, parameters of the test)}, one after
    another."""
    folder, items = tmp_path_factory.mktemp("chain"), request.session.items
    if any("fresh_clone" in item.fixturenames for item in items):
        request.getfixturevalue("fresh_clone")
    jobs = {}
    for name, (script, *flags) in CHAIN.items():
        jobs[name] = suite.start(script, "--out", folder / name, *flags)
        if name != "ppo":      # which runs beside dpo.py
            r = suite.finish(jobs[name])
            assert r.rc == 0 and r.err == "", r
        if name == "base" and any(item.name == "test_the_script" for item in items):
            early = tmp_path_factory.mktemp("early")
            (early / "base").symlink_to(folder / "base")
            suite.early["cai"] = suite.start("cai.py", "--out", early / "cai", *CAI_FLAGS), early / "cai"
    r = suite.finish(jobs["ppo"])
    assert r.rc == 0 and r.err == "", r
    # What tests of rewards at ends, of votes and of best-of-N build on: of some ten answers at least one
    # ends.
    result = json.loads((folder / "sft" / "result.json").read_text())
    assert result["after"]["eos_rate"] > 0.5, (
        "the tests' SFT model hardly ever ends an answer: train it longer")
    for item in items:
        begin = getattr(item.module, "EARLY", {}).get(item.originalname)
        if begin:
            own = tmp_path_factory.mktemp("early")
            params = getattr(item, "callspec", SimpleNamespace(params={})).params
            suite.early[item.nodeid] = own, suite.background.submit(begin, suite, folder, own, **params)
    return folder


@pytest.fixture
def early(suite, chain, request):
    """(folder, what it returned) of the function that began this test early."""
    folder, running = suite.early[request.node.nodeid]
    return folder, running.result()


@pytest.fixture(scope="session")
def fresh_clone(suite, tmp_path_factory):
    """`python ppo.py` in a folder with nothing there, a plain process begun early, because it takes long. The
    scripts differ from the suite's in a few default numbers. Gives (the process, the folder)."""
    folder = tmp_path_factory.mktemp("fresh")
    root = copy_suite(folder / "small", rl=40, test=8, demos=200)
    for script, numbers in {"data/pretrain.py": {"steps": 40}, "sft.py": {"epochs": 2, "max_new": 16},
                            "reward.py": {"prompts": 60, "epochs": 1, "max_new": 16, "held_out": 0.3},
                            "ppo.py": {"iterations": 2, "rollouts": 16, "max_new": 8}}.items():
        text = (root / script).read_text()
        for name, x in numbers.items():
            text, n = re.subn(rf"^(    {name}: \w+ = )\S+", rf"\g<1>{x}", text, count=1, flags=re.M)
            assert n == 1, f"{script} has no default for {name}"
        (root / script).write_text(text)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, root / "ppo.py", "--out", "x/ppo"], cwd=folder,
                                   env=suite.env, stdout=log, stderr=subprocess.STDOUT)
    yield process, folder
    process.kill()
