"""data/best_of.py: of N answers the best becomes a demonstration; the control keeps any one."""
import json
import math
import os
import random
from types import SimpleNamespace

import pytest

from data import best_of
from data.files import formats
from test_scripts import fails, result_of, write

TOK = SimpleNamespace(eos_ids={0})
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")


def test_the_best_that_ends_is_kept():
    """Otherwise sft.py learns from answers that were cut off, or from the wrong one."""
    texts, ids = ["a", "b", " ", "d"], [[5, 0], [5, 5], [0], [7, 0]]   # b was cut off, the third one is empty
    rng = random.Random(0)
    for scores, want in (([1.0, 9.0, 9.0, 2.0], 3), ([3.0, 9.0, 9.0, 2.0], 0)):
        assert best_of.choose(texts, ids, scores, TOK, rng) == want
    assert best_of.choose(texts[1:3], ids[1:3], [1.0, 2.0], TOK, rng) is None
    drawn = [best_of.choose(texts, ids, None, TOK, rng) for _ in range(400)]
    assert set(drawn) == {0, 3} and 120 < drawn.count(0) < 280               # five standard deviations


@pytest.fixture
def keep(suite, chain, tmp_path):
    """keep(flags..) -> (its demonstrations, result.json, what it printed)."""
    (tmp_path / "short.py").write_text(
        "def score(rows, responses):\n    return [-len(text) for text in responses]\n")

    def call(*flags):
        r = suite.ok("data.best_of", "--policy", chain / "sft", "--prompts", 12, "--n", 4, "--max_new", 12,
                     *flags, "--reward", f"{tmp_path / 'short.py'}:score", "--out", tmp_path / "b")
        rows, _ = formats.load(tmp_path / "b" / "demos.jsonl", "sft")
        return rows, result_of(tmp_path / "b"), r.out
    return call


@needs_fork
def test_demonstrations(keep, suite, chain, tmp_path):
    """One a prompt, in a form that sft.py reads; the control has the same answers to choose from."""
    best, told, out = keep()
    assert 0 < len(best) <= 12 and len({str(row["messages"][:-1]) for row in best}) == len(best)
    kept = [json.loads(line) for line in (tmp_path / "b" / "demos.jsonl").read_text().splitlines()]
    for row in kept:
        assert row["messages"][-1]["role"] == "assistant" and row["messages"][-1]["content"]
        assert -row["reward"] >= len(row["messages"][-1]["content"])         # before its blanks were stripped
    assert told["after"]["reward"] == pytest.approx(sum(row["reward"] for row in kept) / len(kept))
    assert told["after"]["reward"] >= told["before"]["reward"] and 0 <= told["after"]["gold"] <= 1
    assert told["after"]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert f"{len(best):,} demonstrations" in out and "python sft.py --init" in out

    # What was made with other flags is replaced only when asked for.
    r = suite.run("data.best_of", "--policy", chain / "sft", "--reward", "gold", "--pick", "random",
                  "--out", tmp_path / "b")
    assert "--overwrite" in r.err and (tmp_path / "b" / "demos.jsonl").read_text().count("\n") == len(kept)
    fails(r, "choose another --out")
    any_one, control, _ = keep("--pick", "random", "--overwrite")
    assert control["before"] == told["before"] and len(any_one) == len(best)
    assert control["after"]["reward"] <= told["after"]["reward"] and "kl" not in control["after"]
    suite.ok("sft.py", "--init", chain / "sft", "--data", tmp_path / "b" / "demos.jsonl", "--max_steps", 2,
             "--batch_size", 4, "--held_out", 0.3, "--max_new", 8, "--out", tmp_path / "sft")


@needs_fork
@pytest.mark.parametrize("flags, word", [
    ("--reward gold --data {tmp}/p.jsonl", "judges the tiny world's prompts"),
    ("--max_new 256", "leaves room for --max_new 256"),
    ("--reward nosuch", "nosuch"), ("--pick worst", "--pick")])
def test_refused_in_one_sentence(suite, chain, tmp_path, flags, word):
    write(tmp_path / "p.jsonl", [{"prompt": "Hi"}])
    given = ["--policy", chain / "sft", "--reward", chain / "reward", *flags.format(tmp=tmp_path).split()]
    r = suite.run("data.best_of", *given, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    fails(r, word)
