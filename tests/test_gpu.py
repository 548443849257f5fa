"""Scripts on a pretended GPU (pretended_gpu.py): no operation meets tensors of two devices, what is logged is
what the CPU logs, and what should run ahead waits for nothing. """
import json
import os
from pathlib import Path

import pytest
from pretended_gpu import why_not

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks"),
              pytest.mark.skipif(bool(why_not()), reason=why_not())]
PRETENDED = Path(__file__).parent / "pretended_gpu.py"
NEVER_WAITS = {"decode", "draw", "forward", "attention", "rotate", "logits", "head_logprobs", "policy_loss",
               "value_loss", "gae", "whiten", "preference_loss", "pair_loss"}


@pytest.mark.parametrize("script, flags", [
    ("sft.py", "--init {}/base"),
    ("ppo.py", "--init {0}/sft --reward {0}/reward --rollouts 16 --minibatches 2 --value_warmup 0 "
               "--max_new 8 --recompute --entropy_coef 0.01 --ptx_coef 0.5"),
], ids=["sft", "ppo"])
def test_on_a_pretended_gpu(suite, chain, tmp_path, script, flags):
    flags = [*flags.format(chain).split(), "--max_steps", 2, "--dtype", "float32"]
    on_cpu, on_gpu = suite.run_all([
        [script, *flags, "--device", "cpu", "--out", tmp_path / "cpu"],
        [PRETENDED, suite.root / script, *flags, "--device", "cuda", "--out", tmp_path / "cuda"]], 120)
    assert on_cpu.rc == 0 and on_cpu.err == "", on_cpu.err
    assert on_gpu.rc == 0 and on_gpu.err == "", on_gpu.err
    assert json.loads((tmp_path / "cuda" / "result.json").read_text())["device"].startswith("cuda")

    logs = []
    for device in ("cpu", "cuda"):
        lines = (tmp_path / device / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for a, b in zip(*logs, strict=True):
        del a["tok_s"], b["tok_s"]
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)

    report = on_gpu.out[on_gpu.out.index("waits for the GPU"):]
    waiting = {line.rpartition(" in ")[2] for line in report.splitlines()}
    assert "generate" in waiting                # rows that have ended: so waits are seen
    assert not waiting & NEVER_WAITS, report
