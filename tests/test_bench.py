"""tests/experiments/bench.py: it times what the stages do, and what fails does not take the other rows with
it."""
import json

import pytest
import torch

import bench
import model as model_py
from data import InputError


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """benchmark(flags by name) -> (what it printed, its rows, what it ended with)."""
    monkeypatch.setattr(bench, "limits", lambda device: (1e12, 1e10))    # takes seconds
    monkeypatch.setattr(model_py.Linear, "compute_dtype", None)          # the program changes this and that;
    precision = torch.get_float32_matmul_precision()                     # afterwards both are as before

    def call(**flags):
        small = dict(sizes="tiny", batch=2, length=12, prompt=4, new=3, rounds=1, peers=False, device="cpu",
                     dtype="float32")
        error = ""
        try:
            bench.main(bench.Config(**small | flags))
        except InputError as e:
            error = str(e)
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])["rows"] if out else [], error
    yield call
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("flags", [{}, {"recompute": True, "lora": 2}])
def test_every_stage_is_timed(benchmark, flags):
    """One row each, with the rates that follow from its time, and PPO's three parts, which make up its
    round."""
    out, rows, error = benchmark(**flags)
    assert error == "" and [row["stage"] for row in rows] == ["sft", "reward", "dpo", "sample", "ppo"]
    for row in rows:
        tokens = 2 * (3 if row["stage"] in ("sample", "ppo") else 12)
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    layer = 4 * 128 * 128 + 3 * 128 * 344 + 2 * 128                      # attention, MLP, norms of "tiny"
    body, head, attended = 4 * layer + 128, 1024 * 128, 12 * 4 * 128 * 12
    rates = [row["tokens_per_second"] / 1e12 for row in rows]
    assert rows[0]["mfu"] == pytest.approx((6 * (body + head) + attended) * rates[0])
    assert rows[1]["mfu"] == pytest.approx((6 * body + attended) * rates[1])
    assert rows[3]["mbu"] == pytest.approx(4 * (body + head) * 3 / rows[3]["seconds"] / 1e10)
    assert rows[4]["seconds"] / 2 < sum(rows[4]["split"].values()) <= rows[4]["seconds"]


def test_recomputation_is_switched_on(benchmark, monkeypatch):
    """--recompute runs every layer of a training step twice; what the stages prepare has the flag."""
    seen, prepare = [], bench.prepare

    def watched(model, cfg, device):
        model.h[0].register_forward_pre_hook(lambda *_: seen.append(1))
        return prepare(model, cfg, device)
    monkeypatch.setattr(bench, "prepare", watched)
    benchmark(stages="sft")
    once = len(seen)
    seen.clear()
    benchmark(stages="sft", recompute=True)
    assert once == 3 and len(seen) == 6        # two rounds that do not count, and one that does


def test_a_row_that_fails_is_marked_and_the_others_are_there(benchmark, monkeypatch):
    """No memory for one size, a bug in one stage: the table goes on, in text and in JSON, and the end says
    it."""
    work = bench.STAGES["sft"]

    def too_large(size, cfg, device):
        if size == "8B":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.\nGPU 0 has ..")
        return work(size, cfg, device)

    def broken(size, cfg, device):
        return bench.Work(go=lambda: 1 / 0)
    monkeypatch.setitem(bench.STAGES, "sft", too_large)
    monkeypatch.setitem(bench.STAGES, "reward", broken)
    out, rows, error = benchmark(sizes="tiny,8B,tiny", stages="sft,reward")
    assert [row.get("failed") for row in rows[::2]] == [None, "out of memory", None]
    assert {row["failed"] for row in rows[1::2]} == {"ZeroDivisionError: division by zero"}
    assert rows[0]["seconds"] > 0 and rows[4]["seconds"] > 0 and error == "4 of 6 rows failed, see the table"
    assert "8B      sft     ours                failed   out of memory\n" in out


def test_unknown_names_and_odd_batches_are_told(benchmark):
    assert benchmark(sizes="124M,125M")[2].startswith("no such stage or size: 125M; there are sft, ")
    assert benchmark(batch=3)[2] == "--batch 3: pairs need an even number of sequences"


def test_parties_take_turns_and_the_least_round_counts(monkeypatch):
    """Otherwise another job that wakes up while one party runs would decide the ratio."""
    order = []
    took = {"ours": iter([9, 9, 5, 3, 4]), "theirs": iter([9, 9, 6, 9, 7])}     # two warm-up rounds each
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def party(who):
        def go():
            order.append(who)
            now[0] += next(took[who])
        return lambda: bench.Work(go)

    cfg = bench.Config(rounds=3, batch=2, length=6)
    rows = bench.in_turns({who: party(who) for who in took}, "sft", cfg, torch.device("cpu"))
    assert order == ["ours"] * 2 + ["theirs"] * 2 + ["ours", "theirs"] * 3
    assert rows["ours"]["seconds"] == 3 and rows["theirs"]["seconds"] == 6
    assert rows["ours"]["tokens_per_second"] == 2 * 6 / 3
