"""Scripts on a pretended GPU (pretended_gpu.py): no operation meets tensors of two devices, what is logged is
what the CPU logs, and what should run ahead waits for nothing. Where there is a real one, all scripts on it.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import CAI_FLAGS
from pretended_gpu import why_not

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PRETENDED = Path(__file__).parent / "experiments" / "pretended_gpu.py"
NEVER_WAITS = {"decode", "draw", "forward", "attention", "rotate", "logits", "head_logprobs", "policy_loss",
               "value_loss", "gae", "whiten", "preference_loss", "pair_loss"}


def on_both(suite, chain, folder, script, flags):
    """A script on the CPU and on the pretended GPU, both finished."""
    flags = [*flags.format(chain).split(), "--max_steps", 2, "--dtype", "float32"]
    return list(suite.run_all([
        [script, *flags, "--device", "cpu", "--out", folder / "cpu"],
        [PRETENDED, suite.root / script, *flags, "--device", "cuda", "--out", folder / "cuda"]], 120))


EARLY = {} if why_not() else {"test_on_a_pretended_gpu": on_both}      # see the chain in conftest.py


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("script, flags", [
    ("sft.py", "--init {}/base"),
    ("ppo.py", "--init {0}/sft --reward {0}/reward --rollouts 16 --minibatches 2 --value_warmup 0 "
               "--max_new 8 --recompute --entropy_coef 0.01 --ptx_coef 0.5"),
], ids=["sft", "ppo"])
def test_on_a_pretended_gpu(early, script, flags):
    folder, (on_cpu, on_gpu) = early
    assert on_cpu.rc == 0 and on_cpu.err == "", on_cpu.err
    assert on_gpu.rc == 0 and on_gpu.err == "", on_gpu.err
    assert json.loads((folder / "cuda" / "result.json").read_text())["device"].startswith("cuda")

    logs = []
    for device in ("cpu", "cuda"):
        lines = (folder / device / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for a, b in zip(*logs, strict=True):
        del a["tok_s"], b["tok_s"]
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)

    report = on_gpu.out[on_gpu.out.index("waits for the GPU"):]
    waiting = {line.rpartition(" in ")[2] for line in report.splitlines()}
    assert "generate" in waiting                # rows that have ended: so waits are seen
    assert not waiting & NEVER_WAITS, report


# ----------------------------------------------------------------------------------------------------------
# On a real GPU: every script at once, each a process of its own, beside the same command on the CPU.

RL = "ppo.py --init {0}/sft --reward {0}/reward --rollouts 16 --minibatches 2 --value_warmup 0 --max_new 8 "
PAIRS = "--data {0}/reward/comparisons.jsonl --max_new 8 "
COMMANDS = {    # with --max_steps 2 --dtype float32 --out ...
    "pretrain": "data.pretrain --steps 20",
    "sft": "sft.py --init {0}/base",
    "reward": "reward.py --init {0}/sft " + PAIRS,
    "process": "data.process --init {0}/sft --prompts 80 --max_new 8",
    "dpo": "dpo.py --init {0}/sft " + PAIRS,
    "dpo_lora": "dpo.py --init {0}/sft --lora 4 " + PAIRS,
    "kto": "dpo.py --loss kto --init {0}/sft " + PAIRS,
    "online": "dpo.py --online --init {0}/sft --batch_size 8 --max_new 8",
    "ppo": RL + "--recompute --entropy_coef 0.01 --ptx_coef 0.5",
    "ppo_lora": RL + "--lora 4 --relabel 0",
    "grpo": RL + "--advantage grpo --group 4 --relabel 0",
}
COMPILED = {"sft_compiled": "sft", "ppo_compiled": "ppo"}     # the same with --compile, on the GPU alone


def run(suite, script, *flags):
    """A script or module of the suite in a process of its own, which may see the GPU; finished."""
    # fp32 on both sides: what the matrix units take for fp32 has ten bits less.
    env = suite.env | {"NVIDIA_TF32_OVERRIDE": "0"}
    del env["CUDA_VISIBLE_DEVICES"], env["PYTHONWARNINGS"]
    start = [suite.root / script] if script.endswith(".py") else ["-m", script]
    command = [sys.executable, *start, *flags]
    return subprocess.run(list(map(str, command)), cwd=suite.root, env=env, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture(scope="module")
def all_scripts(suite, chain, tmp_path_factory):
    """{(name, "cpu" or "cuda"): (finished process, its --out)} of COMMANDS and COMPILED."""
    folder, jobs = tmp_path_factory.mktemp("gpu"), {}
    with ThreadPoolExecutor(12) as pool:
        for name in [*COMPILED, *COMMANDS]:
            command = COMMANDS[COMPILED.get(name, name)].format(chain) + " --max_steps 2 --dtype float32"
            flags = command.split() + ["--compile"] * (name in COMPILED)
            for device in ["cuda"] if name in COMPILED else ["cuda", "cpu"]:
                out = folder / name / device
                jobs[name, device] = pool.submit(run, suite, *flags, "--device", device, "--out", out), out
    return {key: (job.result(), out) for key, (job, out) in jobs.items()}


def logged(done):
    """What a finished run has logged, without its speed; it must have ended well."""
    process, out = done
    assert process.returncode == 0, process.stdout[-500:] + process.stderr[-2000:]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "tok_s"} for row in rows]


@needs_gpu
@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_gpu_as_on_the_cpu(all_scripts, name):
    on_gpu, on_cpu = (logged(all_scripts[name, device]) for device in ("cuda", "cpu"))
    for a, b in zip(on_gpu, on_cpu, strict=True):
        for figure in {"accuracy", "clipfrac"} & set(b):   # shares: of what is nearly a tie, rounding decides
            assert a.pop(figure) == pytest.approx(b.pop(figure), abs=0.1)
        assert a == pytest.approx(b, rel=5e-3, abs=1e-3)


@needs_gpu
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_on_a_gpu(all_scripts, name):
    """Fused kernels round otherwise, which may tip a drawn token: the losses stay close, not equal."""
    compiled, eager = logged(all_scripts[name, "cuda"]), logged(all_scripts[COMPILED[name], "cuda"])
    for a, b in zip(compiled, eager, strict=True):
        for figure in {"loss", "kl", "value_loss"} & set(b):
            assert a[figure] == pytest.approx(b[figure], rel=0.05, abs=0.05)


@needs_gpu
def test_cai_on_a_gpu(suite, chain, tmp_path):
    (tmp_path / "base").symlink_to(chain / "base")
    done = run(suite, "cai.py", "--out", tmp_path / "cai", *CAI_FLAGS)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "cai" / "result.json").read_text())["device"].startswith("cuda")
