"""What goes wrong in the night: kills, two runs in one folder, numbers that are not finite, full disks, wild
flags.

The suite runs a few of each; FAULTS=20 python -m pytest tests/test_faults.py runs the long version (about
half an hour)."""
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from test_scripts import SCRIPTS, TRAIN, fails, links, log_of, module_of, same, snapshot

from data import InputError, chain as chain_py, world
from data.files.checkpoint import load, load_state, load_weights, save, save_folder, write_state
from data.flags import interrupt, is_lack_of_memory
from data.folder import PART_OF_A_CHAIN
from data.run import Run
from data.screen import Screen
from data.files import CheckpointError
from data.files.tokenizer import tokenizer_from_ranks
from model import GPT, GPTConfig
from sft import Config

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")
TIMES = int(os.environ.get("FAULTS", 1))   # a factor on how often
KILLS = 2 if TIMES == 1 else 20            # of each script


def kill_and_resume(suite, chain, folder, script):
    """Kill runs of a script, resume them and compare them with a whole one. Returns how many kills and runs
    it took."""
    flags = [*TRAIN[script][0], *links(script, chain), "--dtype", "float32", "--save_every", 1,
             "--max_steps", 3 if TIMES == 1 else TRAIN[script][1]]
    start = time.time()
    suite.ok(script, *flags, "--out", folder / "whole")
    seconds, rng, killed, runs = time.time() - start, random.Random(script), 0, 0
    while killed < KILLS:
        out, done, runs = folder / f"cut{runs}", False, runs + 1
        while not done:   # each life ends sooner or later in the run; the last one is let be
            job = suite.start(script, *flags, "--out", out)
            wait, born = rng.uniform(0.1, 0.9) * seconds if killed < KILLS else 999, time.time()
            while not (done := (job / "rc").exists()) and time.time() - born < wait:
                time.sleep(0.005)
            suite.kill(job)
            killed += not done
        r = suite.finish(job)
        assert r.rc == 0 and r.err == "", r.err
        same(folder / "whole", out)
        a, b = (json.loads((folder / x / "result.json").read_text()) for x in ("whole", out.name))
        assert (a["before"], a["after"], a["columns"]) == (b["before"], b["after"], b["columns"])
        answers = [(folder / x / "answers.jsonl").read_text() for x in ("whole", out.name)]
        assert answers[0] == answers[1]
        shutil.rmtree(out)
    return killed, runs


EARLY = {"test_killed_at_any_moment_and_resumed": kill_and_resume}      # see the chain in conftest.py


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_any_moment_and_resumed(early, script):
    """SIGKILL at random moments, a checkpoint after every step, so that many fall into a write: the resumed
    run ends with the weights and the log of a run that nobody killed."""
    _, (killed, runs) = early
    assert killed >= KILLS
    print(f"{script}: {killed} kills in {runs} runs")


@pytest.mark.skipif(TIMES == 1, reason="takes minutes: FAULTS=2 runs it")
def test_constitutional_ai_killed_at_any_moment_and_resumed(suite, chain, tmp_path):
    """The same of cai.py and of the scripts it runs: equal chains, comparisons, weights and figures."""
    flags = ["--prompts", 30, "--helpful_prompts", 40, "--max_steps", 20, "--k", 2, "--critiques", 1,
             "--max_new", 16, "--max_critique", 12, "--dtype", "float32", "--sft_flags",
             "--max_new 16 --warmup 2", "--reward_flags", "--held_out 0.3", "--rl_flags",
             "--iterations 2 --rollouts 16 --max_new 16"]

    def end(name):
        folder, files = tmp_path / name / "cai", ("chains.jsonl", "stage1.jsonl", "comparisons.jsonl")
        # kept ones are not
        rows = [{k: v for k, v in row.items() if k != "critic_asked"} for row in log_of(folder)]
        result = json.loads((folder / "result.json").read_text())
        return (rows, result["before"], result["after"], (folder / "model.safetensors").read_bytes(),
                [(folder / "round1" / f).read_bytes() for f in files])

    def begin(name):
        (tmp_path / name).mkdir(exist_ok=True)
        if not (tmp_path / name / "base").exists():
            (tmp_path / name / "base").symlink_to(chain / "base")
        return suite.start("cai.py", *flags, "--out", tmp_path / name / "cai")
    start = time.time()
    assert suite.finish(begin("whole")).err == ""
    seconds, rng, killed, runs = time.time() - start, random.Random(0), 0, 0
    while killed < KILLS:
        done, runs = False, runs + 1
        while not done:
            job = begin(f"cut{runs}")
            wait, born = rng.uniform(0.1, 0.6) * seconds if killed < KILLS else 999, time.time()
            while not (done := (job / "rc").exists()) and time.time() - born < wait:
                time.sleep(0.005)
            suite.kill(job)
            killed += not done
        r = suite.finish(job)
        assert r.rc == 0 and r.err == "", r.err
        assert end("whole") == end(f"cut{runs}")
    print(f"cai.py: {killed} kills in {runs} runs")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_finishes_the_step_and_saves(suite, chain, tmp_path, signum):
    """One that arrives in the midst of the third step, whatever the machine is busy with."""
    flags = ["--init", chain / "base", "--batch_size", 8, "--warmup", 2, "--max_new", 8, "--dtype", "float32",
             "--max_steps", 6]
    whole = suite.start("sft.py", *flags, "--out", tmp_path / "whole")
    r = suite.finish(suite.start_and_stop(3, "sft.py", *flags, "--out", tmp_path / "cut", signum=signum))
    assert r.rc == 1 and load_state(tmp_path / "cut")["step"] == 3
    assert re.fullmatch(rf"sft: interrupted after step 3, saved in {tmp_path / 'cut'}; .* goes on.*\n", r.err)
    assert "stopping after this step" in r.out and not (tmp_path / "cut" / "result.json").exists()
    suite.ok("sft.py", *flags, "--out", tmp_path / "cut")
    assert suite.finish(whole).rc == 0
    same(tmp_path / "whole", tmp_path / "cut")


def test_two_runs_never_share_a_folder(suite, chain, tmp_path):
    """The second one writes nothing, whatever its flags; the lock dies with its owner."""
    flags = ["reward.py", "--init", chain / "sft", "--prompts", 40, "--held_out", 0.3, "--max_new", 24,
             "--lr", 1e-4, "--bias_length", 0.2, "--save_every", 1000, "--out", tmp_path / "x"]
    job, end = suite.start(*flags, "--epochs", 200), time.time() + 60
    while not (tmp_path / "x" / "log.jsonl").exists() or not log_of(tmp_path / "x"):
        assert time.time() < end and not (job / "rc").exists(), suite.finish(job)
        time.sleep(0.02)
    pairs = tmp_path / "x" / "comparisons.jsonl"
    before = {path: data for path, data in snapshot(tmp_path / "x").items() if path.name != "log.jsonl"}
    for more in ([], ["--seed", 1, "--bias_confidence", 5, "--overwrite"]):
        r = suite.run(*flags, "--epochs", 200, *more)
        assert (r.rc == 1
                and r.err == f"error: {tmp_path / 'x'}: another run is writing there; choose another --out\n")
    after = {path: data for path, data in snapshot(tmp_path / "x").items() if path.name != "log.jsonl"}
    assert before == after and before[pairs]
    suite.kill(job)
    # no checkpoint was saved, but comparisons, which somebody may have paid for
    fails(suite.run(*flags, "--epochs", 200, "--max_steps", 1, "--seed", 1), "--seed was 0, now 1")
    assert pairs.read_bytes() == before[pairs]
    suite.ok(*flags, "--epochs", 200, "--max_steps", 1)      # begins with them
    assert pairs.read_bytes() == before[pairs]
    suite.ok(*flags, "--max_steps", 1, "--seed", 1, "--overwrite")
    assert pairs.read_bytes() != before[pairs]


# ------------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))


def test_what_is_not_finite_never_reaches_the_weights(tmp_path, capsys):
    run, net = Run(Config(out=str(tmp_path), save_every=5), "sft"), Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    run.begin(20, None, model=(net, optimizer))
    inf, nan = float("inf"), float("nan")
    for step, bad in zip(run.steps(), [None, nan, inf, 1e30, None, nan]):     # 1e30 squared is no fp32
        before = [p.clone() for p in net.parameters()]
        (net.a.sum() + net.b.sum()).backward()
        if bad is not None:
            net.b.grad[1] = bad
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if step == 5:
            what = r"gradient of \w and \d more tensors is not finite; examples number \[5, 7\].* fourth"
            with pytest.raises(InputError, match=what):
                run.allows_step(norm, net, [step, 7])
            continue
        good = run.allows_step(norm, net, [step, 7])
        if good:
            optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss=nan if bad else 1.0)
        moved = any(not torch.equal(p, q) for p, q in zip(net.parameters(), before))
        assert moved == good == (bad is None) and all(p.isfinite().all() for p in net.parameters())
        assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values())
    run.log_file.close()
    said = capsys.readouterr().out
    assert said.count("step skipped") == 3 and "the gradient has a norm that is not finite" in said
    rows = log_of(tmp_path)      # strict JSON, without NaN
    assert rows[4] == {"step": 5, "loss": 1.0, "skipped": 3} and "loss" not in rows[2]


def test_a_reward_model_with_a_broken_weight_stops_ppo(suite, chain, tmp_path):
    rm, tok = load(chain / "reward", head="score")
    with torch.no_grad():
        rm.score.weight[0, 3] = float("nan")
    save(tmp_path / "rm", rm, tok)
    r = suite.run("ppo.py", "--init", chain / "sft", "--reward", tmp_path / "rm", "--rollouts", 8,
                  "--max_new", 8, "--eos_penalty", 0, "--out", tmp_path / "ppo")
    assert (r.rc == 1 and "tensor 'score.weight' holds values that are not finite" in r.err
            and "Traceback" not in r.err)
    assert not (tmp_path / "ppo" / "config.json").exists()


def test_out_of_memory_says_where_and_what_to_shrink(suite, chain, tmp_path):
    """A stage that asks for more than there is, as torch's CPU allocator reports it."""
    (tmp_path / "greedy.py").write_text("import torch\ndef f(rows, texts):\n    return torch.empty(2**55)\n")
    r = suite.run("ppo.py", "--init", chain / "sft", "--reward", "greedy:f", "--rollouts", 8, "--max_new", 8,
                  "--out", tmp_path / "ppo", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert (r.rc == 1 and r.err.startswith("error: out of memory at ppo.py:")
            and "--rollouts 8" in r.err), r.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_keeps_the_last_checkpoint(suite, chain, tmp_path):
    """Every write of a file fails as on a full disk: one sentence, and what was there is still there."""
    cfg, state, tok, _ = load_weights(chain / "sft")
    save_folder(tmp_path / "x", cfg, state, tok)
    real = open
    for k in range(6):
        class Full(Exception):
            pass
        count = [0]

        def fail(path, *args, k=k, count=count, **kw):
            if ".new" in str(path) and ("w" in (args[0] if args else kw.get("mode", "r"))):
                count[0] += 1
                if count[0] > k:
                    return real("/dev/full", *args, **kw)
            return real(path, *args, **kw)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.open", fail)
            patch.setattr("io.open", fail)
            try:
                save_folder(tmp_path / "x", cfg, {n: v + 1 for n, v in state.items()}, tok)
            except OSError as e:
                assert "space" in str(e)
            else:
                assert k >= 5 or count[0] <= k
        now = load_weights(tmp_path / "x")[1]
        assert all(torch.equal(v, state[n]) for n, v in now.items()) or count[0] <= k
        save_folder(tmp_path / "x", cfg, state, tok)


def test_a_damaged_checkpoint_is_refused_or_equal(tmp_path):
    """Cut at 50 places, 200 flipped bits: an error that names the file, or weights of the right shapes; no
    traceback of another kind. (Safetensors carries no checksum, so a flip inside the weights cannot be
    seen.)"""
    tok = tokenizer_from_ranks(world.TINY / "tiny.tiktoken")
    save(tmp_path / "x", GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=16,
                                       n_inner=32, head_dim=8)), tok)
    path, rng = tmp_path / "x" / "model.safetensors", random.Random(0)
    shutil.copytree(tmp_path / "x", tmp_path / "whole")
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    cuts = [rng.randrange(len(data)) for _ in range(40)] + [rng.randrange(head) for _ in range(10)]
    for at in cuts:
        path.write_bytes(data[:at])
        with pytest.raises(CheckpointError, match="model.safetensors"):
            load_weights(tmp_path / "x")
    shapes, refused = {n: v.shape for n, v in load_weights(tmp_path / "whole")[1].items()}, 0
    for i in range(200):
        at = rng.randrange(head if i % 2 else len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:])
        try:
            assert {n: v.shape for n, v in load_weights(tmp_path / "x")[1].items()} == shapes
        except CheckpointError as e:
            refused += 1
            assert "model.safetensors" in str(e) or "x" in str(e)
    assert refused > 60      # nearly every flip in the header


def test_a_pickle_is_never_run(chain, tmp_path, monkeypatch):
    shutil.copytree(chain / "sft", tmp_path / "x")
    (tmp_path / "x" / "state.pt").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode()
                                              + b"'\ntR.")
    with pytest.raises(InputError, match="state.pt"):
        load_state(tmp_path / "x")
    assert not (tmp_path / "owned").exists()


VALUES = ["0", "-1", "1", "3", "nan", "inf", "1e400", "1e-3", "abc", "true", "dpo", "../..", "/dev/null",
          "\x00x", "é😀", "None", "99999999999999999999", "0x10", "1_000", "--lr", "[1]"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_random_flags_never_end_in_a_traceback(suite, chain, bad_folder, script):
    """Flags and values at random, on a run of one step: it ends well, or in one sentence."""
    rng, names = random.Random(script), [f.name for f in fields(module_of(script).Config)]
    names = [n for n in names if n not in ("out", "device", "compile")]   # torch warns there
    base = [*TRAIN[script][0], *links(script, chain), "--max_steps", 1, "--out"]
    commands = []
    for i in range(6 if TIMES == 1 else 1000 // len(SCRIPTS)):
        extra = [w for _ in range(rng.choice([1, 1, 2, 3]))
                 for w in (f"--{rng.choice(names)}", rng.choice(VALUES))]
        commands.append([script, *base, bad_folder / f"{script}{i}", *[w.replace("\x00", "") for w in extra]])
    for command, r in zip(commands, suite.run_all(commands, timeout=120, cwd=bad_folder)):
        assert "Traceback" not in r.err, f"{command}\n{r.err}"
        assert r.rc in (0, 1, 2) and (r.rc == 0) == (r.err == ""), f"{command}\n{r.err}"


@pytest.fixture
def bad_folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# What the machine does.

SMALL = ["--batch_size", 8, "--warmup", 2, "--max_new", 8, "--dtype", "float32"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_disk_that_fills_in_the_training_state():
    """An OSError, which ends in one sentence; torch's own writer raises a RuntimeError without the word
    space."""
    with pytest.raises(OSError, match="space"):
        write_state("/dev/full", {"x": torch.zeros(10 ** 6)})


def test_a_clock_that_stands_still(tmp_path, monkeypatch):
    """A coarse clock between two steps: no division by 0, no negative speed."""
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    run, net = Run(Config(out=str(tmp_path)), "sft"), Net()
    run.begin(50, None, model=(net, None))
    for step in run.steps():
        run.log(step, tokens=7, loss=1.0)
    assert run.history[-1]["tok_s"] > 0


@pytest.mark.parametrize("error, is_memory", [
    (RuntimeError("could not create a primitive"), True), (MemoryError(), True),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
    (RuntimeError("shapes differ"), False)])
def test_lack_of_memory_has_several_names(error, is_memory):
    assert is_lack_of_memory(error) == is_memory


def test_memory_that_ends_inside_onednn(suite, chain, tmp_path):
    (tmp_path / "greedy.py").write_text(
        "def f(rows, texts):\n    raise RuntimeError('could not create a primitive')\n")
    r = suite.run("ppo.py", "--init", chain / "sft", "--reward", "greedy:f", "--rollouts", 8, "--max_new", 8,
                  "--out", tmp_path / "ppo", cwd=tmp_path)
    assert r.rc == 1 and "Traceback" not in r.err, r.err


def test_another_precision_is_said(suite, chain, tmp_path):
    """A run that goes on where products are rounded otherwise says so in a line; on the same machine it does
    not."""
    flags = ["sft.py", "--init", chain / "base", *SMALL, "--out", tmp_path / "x"]
    suite.ok(*flags, "--max_steps", 1)
    assert "so far" not in suite.ok(*flags, "--max_steps", 2).out
    state = load_state(tmp_path / "x")
    write_state(tmp_path / "x" / "state.pt", state | {"machine": "cuda in bf16"})
    r = suite.ok(*flags, "--max_steps", 3)
    assert "so far ran on cuda in bf16; the next ones run on cpu in fp32" in r.out


def test_a_script_left_alive_by_its_parent_is_waited_for(suite, chain, tmp_path):
    """cai.py was killed, its sft.py was not: the same command again is told to wait, not to go elsewhere."""
    with open(tmp_path / ".lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        r = suite.run("sft.py", "--init", chain / "base", "--out", tmp_path,
                      env={"RLHF_PART_OF_A_CHAIN": "1"})
        assert r.rc == 1 and "wait until it has ended" in r.err and "another --out" not in r.err


def begin(suite, *args, **kw):
    """A plain process of sft.py in a group of its own, whose output we hold."""
    command = [sys.executable, suite.root / "sft.py", *map(str, args)]
    return subprocess.Popen(list(map(str, command)), env=suite.env, start_new_session=True, text=True, **kw)


def wait_for_a_row(process, folder):
    """Until a process has done a step."""
    end = time.time() + 60
    while not (folder / "log.jsonl").exists() or not log_of(folder):
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGINT, None], ids=["ctrl-c", "head"])
def test_a_broken_pipe_loses_no_step(suite, chain, tmp_path, signum):
    """Ctrl-C behind `| tee` ends tee first, and `| head` reads no further: the run ends its step and
    saves."""
    flags = ["--init", chain / "base", *SMALL, "--epochs", 50, "--save_every", 10 ** 6,
             "--out", tmp_path / "x"]
    process = begin(suite, *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_a_row(process, tmp_path / "x")
    process.stdout.close()
    if signum:
        os.killpg(process.pid, signum)
    error = process.stderr.read()
    assert process.wait(60) == 1
    step = load_state(tmp_path / "x")["step"]
    assert step >= 1 and f"interrupted after step {step}, saved in" in error and "Broken pipe" not in error
    assert "Exception ignored" not in error and len(log_of(tmp_path / "x")) == step


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_lines_that_cannot_be_printed_stop_nothing(suite, chain, tmp_path):
    """The disk under `> log.txt` is full: the run goes on without a word, and ends as any other."""
    flags = ["--init", chain / "base", *SMALL, "--max_steps", 3, "--out"]
    suite.ok("sft.py", *flags, tmp_path / "whole")
    with open("/dev/full", "w") as full:
        process = begin(suite, *flags, tmp_path / "x", stdout=full, stderr=subprocess.PIPE)
        error = process.stderr.read()
    assert process.wait(60) == 0 and error == "", error
    same(tmp_path / "whole", tmp_path / "x")


def test_output_that_is_closed(suite, chain, tmp_path):
    """`>&-`, a daemon, pythonw: sys.stdout is None."""
    command = (f"'{sys.executable}' '{suite.root / 'sft.py'}' --init '{chain / 'nosuch'}' "
               f"--out '{tmp_path / 'x'}' >&-")
    r = subprocess.run(["bash", "-c", command], env=suite.env, capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr == f"error: {chain / 'nosuch'}: no such file or folder\n", r.stderr


def test_ctrl_c_waits_for_the_script_that_runs(tmp_path, monkeypatch):
    """A link of the chain is not killed while it saves; a signal to the parent alone reaches the script as
    well. Otherwise `kill -INT` of a ppo.py that makes its links leaves the base model training to its end."""
    child = tmp_path / "child.py"
    child.write_text("import signal, sys, time\n"
                     "def stop(*_):\n    time.sleep(0.6)\n    open(sys.argv[2] + '/saved', 'w').close()\n"
                     "    sys.exit(1)\n"
                     "signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)\n"
                     "open(sys.argv[2] + '/begun', 'w').close()\ntime.sleep(60)\n")
    monkeypatch.setattr(chain_py, "ROOT", tmp_path)
    for i, (signum, reaches_child) in enumerate(((signal.SIGINT, True), (signal.SIGINT, False),
                                                 (signal.SIGTERM, False))):
        out = tmp_path / str(i)
        out.mkdir()

        def kill(out=out, signum=signum, reaches_child=reaches_child):
            while not (out / "begun").exists():
                time.sleep(0.01)
            if reaches_child:
                os.kill(int(subprocess.check_output(["pgrep", "-f", str(child)]).split()[0]), signum)
            os.kill(os.getpid(), signum)
        old = (signal.signal(signal.SIGINT, signal.default_int_handler),
               signal.signal(signal.SIGTERM, interrupt))
        thread = threading.Thread(target=kill)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                chain_py.run_script(SimpleNamespace(seed=0, dtype="auto", device=""), ["child.py"], out)
        finally:
            signal.signal(signal.SIGINT, old[0]), signal.signal(signal.SIGTERM, old[1])
            thread.join()
        assert (out / "saved").exists()


def test_cai_leaves_signals_to_its_scripts(tmp_path):
    """Otherwise `kill -INT` of a cai.py, which has no steps, waits for sft.py or ppo.py to come to its
    end."""
    before = signal.getsignal(signal.SIGINT)
    Run.open(Config(out=str(tmp_path / "x")), "cai", runs_scripts=True)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("is_part", [True, False])
def test_a_ctrl_c_that_is_passed_on_is_no_second_one(tmp_path, monkeypatch, is_part):
    """Otherwise a terminal's Ctrl-C, which reaches script and parent, stops the script at once and loses its
    steps."""
    monkeypatch.delenv(PART_OF_A_CHAIN, raising=False)
    if is_part:
        monkeypatch.setenv(PART_OF_A_CHAIN, "1")
    run = Run(Config(out=str(tmp_path)), "sft")
    run.stop(signal.SIGINT, None)
    with nullcontext() if is_part else pytest.raises(KeyboardInterrupt):
        run.stop(signal.SIGTERM, None)
    assert run.is_asked_to_stop()
    with pytest.raises(KeyboardInterrupt):      # what somebody presses counts
        run.stop(signal.SIGINT, None)


def test_a_message_never_sticks_to_the_progress_line(monkeypatch, capsys):
    """On a terminal the line is redrawn in place, as wide as that is, and ends before anything else is
    printed."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen = Screen()
    parts = ["ppo 1/70", *[f"figure_{i} 0.123" for i in range(9)], "1,234 tokens/s", "0:14 left"]
    screen.progress(list(parts), is_last=False)
    out = capsys.readouterr().out
    assert out[0] == "\r" and len(out) == 100 and out.rstrip().endswith("| 1,234 tokens/s | 0:14 left")
    screen.say("ppo: interrupted")
    screen.progress(list(parts), is_last=True)
    screen.say("done")
    assert re.fullmatch(r"\nppo: interrupted\n\r.{99}\ndone\n", capsys.readouterr().out)
