"""Evaluation, votes, the inside of a PPO step, its health and the cures of reward hacking."""
import itertools
import json
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hacking
import ppo
from data import InputError, evaluate, world
from model import GPT, GPTConfig, cli, distinct_2, pad_batch
from test_scripts import fails, log_of, result_of, user, write

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")


# ---------------------------------------------------------------------------------------------------------------------
# 1. data/evaluate.py: the statistics.


def test_distinct_n():
    rows = [[1, 2, 3], [1, 2, 4], [5]]
    assert evaluate.distinct(rows, 1) == 5 / 7 and evaluate.distinct(rows, 3) == 1 and evaluate.distinct([[1]], 2) == 0
    assert evaluate.distinct(rows, 2) == distinct_2(rows) == 3 / 4


def test_bootstrap_is_as_wide_as_the_standard_error():
    prefs = np.random.default_rng(0).integers(0, 2, 400)
    low, high = evaluate.bootstrap(prefs, draws=4000)
    width = 2 * 1.96 * prefs.std() / 20
    assert low < prefs.mean() < high and high - low == pytest.approx(width, rel=0.06)
    assert evaluate.bootstrap(prefs, 3) == evaluate.bootstrap(prefs, 3) != evaluate.bootstrap(prefs, 4)
    assert evaluate.bootstrap([1.0] * 9) == (1.0, 1.0)


def test_length_controlled_win_rate():
    rng = np.random.default_rng(0)
    dlen = rng.normal(8, 10, 20000)                         # a is longer on average
    x = np.tanh(dlen / dlen.std())
    for theta, phi in ((0.0, 2.0), (0.7, -1.0), (-0.4, 0.0)):
        prefs = rng.random(len(dlen)) < 1 / (1 + np.exp(-theta - phi * x))
        assert evaluate.length_controlled(prefs, dlen) == pytest.approx(1 / (1 + math.exp(-theta)), abs=0.02)
        other = evaluate.length_controlled(1 - prefs, -dlen)
        assert other == pytest.approx(1 - evaluate.length_controlled(prefs, dlen))
    assert evaluate.length_controlled([0.5] * 8, range(8)) == pytest.approx(0.5)
    assert evaluate.length_controlled([1.0] * 99, [0] * 99) > 0.99      # no spread, one winner: finite all the same


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    for n in (1, 2, 5, 7):
        want = np.mean([[gold[p, max(c, key=lambda i: proxy[p, i])] for c in itertools.combinations(range(7), n)]
                        for p in range(3)])
        assert evaluate.best_of_n(proxy, gold, n) == pytest.approx(want)
    assert evaluate.best_of_n(proxy, proxy, 7) == pytest.approx(proxy.max(1).mean())


def test_kl_and_entropy_by_hand():
    """Against one sequence at a time, in double precision, summed over the vocabulary."""
    torch.manual_seed(0)
    cfg = dict(vocab_size=11, n_layer=1, n_head=2, n_kv_head=2, n_embd=8, n_inner=8, head_dim=4, max_len=16)
    model, ref = GPT(GPTConfig(**cfg)), GPT(GPTConfig(**cfg))
    for p in [*model.parameters(), *ref.parameters()]:
        torch.nn.init.normal_(p, std=0.5)
    tok = type("Tok", (), {"pad_id": 10})
    prompts, responses, kl, entropy = [[1], [2, 3, 4], [5, 6]], [[7, 8, 9], [1], [2, 3]], 0.0, 0.0
    for p, r in zip(prompts, responses):
        at = slice(len(p) - 1, len(p) + len(r) - 1)
        a, b = (m.logits(m(torch.tensor([p + r])))[0, at].double().log_softmax(-1) for m in (model, ref))
        kl, entropy = kl + (a.exp() * (a - b)).sum().item(), entropy - (a.exp() * a).sum().item()
    got = evaluate.kl_and_entropy(model, ref, prompts, responses, tok, "cpu", batch=2)
    assert got == pytest.approx((kl / 3, entropy / 6), rel=1e-4) and kl > 0
    assert evaluate.kl_and_entropy(model, model, prompts, responses, tok, "cpu")[0] == 0
    assert math.isnan(evaluate.kl_and_entropy(model, None, prompts, responses, tok, "cpu")[0])


def test_the_ai_judge_asks_as_the_corpus_does():
    """The comparison is, letter by letter, the beginning of a document the base model was trained on."""
    constitution = json.loads((world.HERE / "constitution.json").read_text())
    q = next(q for q in world.questions() if q["skill"] == "capital")
    doc = world.choice_chat(q, row := world.prompt_row(q, "{q}", random.Random(1)), constitution, random.Random(1))
    question = next(p["choice"] for p in constitution if p["choice"] in doc)
    a, b = doc.split("\n (A) ")[1].split("\n\nThe answer")[0].split("\n (B) ")
    assert doc in [evaluate.comparison(row["prompt"], question, a, b) + letter + ")" for letter in "AB"]


def test_labels_are_short_and_different():
    assert evaluate.labels(["out/sft", "out/ppo"]) == ["sft", "ppo"]
    assert evaluate.labels(["a/1/ppo", "a/2/ppo/"]) == ["1/ppo", "2/ppo"]
    assert evaluate.labels(["out/control"]) == ["out/control"]           # not to be taken for the control
    with pytest.raises(evaluate.InputError, match="twice"):
        evaluate.labels(["a/ppo", "a/ppo"])


# ---------------------------------------------------------------------------------------------------------------------
# 2. data/evaluate.py: the command.


@pytest.fixture
def compare(suite, tmp_path):
    """compare(flags...) -> (what it printed, result.json)."""
    def call(*flags):
        r = suite.ok("data/evaluate.py", *flags, "--out", tmp_path / "e", env={"PYTHONPATH": str(suite.root)})
        return r.out, result_of(tmp_path / "e")
    return call


@needs_fork
def test_evaluate_with_the_gold_judge(compare, chain, tmp_path):
    out, result = compare(chain / "base", chain / "sft", chain / "ppo", "--max_new", 16)
    assert f"KL to {chain / 'sft'}" in out                     # found by its result.json
    models, wins = result["models"], result["wins"]
    assert list(models) == list(wins) == ["base", "sft", "ppo", "control"] and models["sft"]["kl"] == 0
    assert models["base"]["kl"] > 0 and models["control"]["gold"] == 0 and models["control"]["unique"] < 0.05
    before_sft = result_of(chain / "base")["after"]["bits_per_byte"]
    assert models["base"]["bits_per_byte"] == pytest.approx(before_sft, abs=1e-6)
    for a, b in itertools.permutations(models, 2):
        w = wins[a][b]
        assert w["low"] <= w["win_rate"] <= w["high"] and w["win_rate"] + wins[b][a]["win_rate"] == pytest.approx(1)
    rows = [json.loads(line) for line in (tmp_path / "e" / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 24 and {r["response"] for r in rows if r["model"] == "control"} == {evaluate.CONTROL}
    gold = world.report(world.rows("test")[:24], [r["response"] for r in rows if r["model"] == "ppo"])
    assert models["ppo"]["gold"] == gold["gold"]
    matrix = out.split("judged by gold")[1].splitlines()
    assert matrix[5].split()[0] == "control" and "BROKEN" not in out


@needs_fork
def test_evaluate_with_a_reward_model_on_ones_own_prompts(compare, chain, tmp_path):
    rows = [{"prompt": f"What is {i}?"} for i in range(9)] + [{"prompt": "word " * 300}]
    out, result = compare(chain / "sft", "--data", write(tmp_path / "p.jsonl", rows), "--judge", chain / "reward",
                          "--best_of", "1,2,4", "--max_new", 8)
    assert "9 prompts, 1 too long" in out and "gold" not in result["models"]["sft"]
    assert [b["n"] for b in result["best_of"]] == [1, 2, 4] and result["best_of"][0]["kl"] == 0
    rewards = [b["reward"] for b in result["best_of"]]
    assert rewards == sorted(rewards) and result["best_of"][2]["kl"] == pytest.approx(math.log(4) - 3 / 4)


@needs_fork
def test_a_judge_that_prefers_nothing_said_at_length_is_called_broken(compare, chain):
    out, result = compare(chain / "sft", "--judge", "annotator", "--bias_length", 5, "--noise", 0, "--max_new", 8)
    assert "THE JUDGE IS BROKEN: annotator" in out and result["wins"]["control"]["sft"]["win_rate"] > 0.9


@needs_fork
def test_the_ai_judge_judges(compare, chain):
    _, result = compare(chain / "sft", "--judge", f"ai:{chain / 'base'}", "--max_new", 8, "--prompts", 12)
    assert 0 <= result["wins"]["sft"]["control"]["win_rate"] <= 1


def test_swapping_the_answers_swaps_the_ai_judges_mind(chain):
    judge, tok = evaluate.load(chain / "base")
    rows, a, b = [{"prompt": user("What is a dog?")}] * 3, ["A dog.", "It is it.", "No."], ["I do not know that."] * 3
    there, back = (evaluate.prefers_a(judge, tok, rows, *pair, 0, "cpu") for pair in ((a, b), (b, a)))
    assert there == pytest.approx([1 - p for p in back], abs=1e-5) and any(abs(p - 0.5) > 1e-4 for p in there)


@needs_fork
@pytest.mark.parametrize("flags, word", [
    ("", "no models"), ("{chain}/sft {chain}/sft", "twice"), ("{chain}/sft --judge {chain}/base", "ai:"),
    ("{chain}/reward", "is a reward model"), ("{chain}/sft --best_of 4", "--reward"),
    ("{chain}/sft --best_of 4,x --reward {chain}/reward", "--best_of 4,x"), ("{chain}/sft --judge nosuch", "nosuch"),
    ("{chain}/sft --max_new 256", "--max_new 256"), ("{chain}/sft --data {tmp}/p.jsonl", "--judge gold")])
def test_evaluate_refuses_in_one_sentence(suite, chain, tmp_path, flags, word):
    write(tmp_path / "p.jsonl", [{"prompt": "Hi"}])
    r = suite.run("data/evaluate.py", *flags.format(chain=chain, tmp=tmp_path).split(), "--out", tmp_path / "e",
                  env={"PYTHONPATH": str(suite.root)})
    assert not (tmp_path / "e").exists()
    fails(r, word)


# ---------------------------------------------------------------------------------------------------------------------
# 3. reward.py --vote, through a pseudo-terminal.


class Terminal:
    """A process whose terminal we are."""

    def __init__(self, command, env):
        import fcntl
        import pty
        import termios
        self.ours, theirs = pty.openpty()

        def begin():   # who runs the tests in the background has Ctrl-C ignored, and would pass that on
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env,
                                        start_new_session=True, preexec_fn=begin)
        os.close(theirs)
        self.shown = ""

    def until(self, text, timeout=60):
        """What is printed up to `text`, which must come."""
        end = time.time() + timeout
        while text not in self.shown:
            assert time.time() < end, self.shown
            if select.select([self.ours], [], [], 0.1)[0]:
                with suppress(OSError):   # on Linux: the process has ended
                    self.shown += os.read(self.ours, 9999).decode().replace("\r\n", "\n")
        out, self.shown = self.shown.split(text, 1)
        return out

    def type(self, text):
        os.write(self.ours, text.encode())


def votes_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@needs_fork
def test_no_vote_is_lost(suite, chain, tmp_path):
    """20 votes in three sessions: the first ended by Ctrl-C, the second killed, the third by the end of the input."""
    file, sessions, rng, want = tmp_path / "mine" / "v.jsonl", [], random.Random(0), []

    def session():
        sessions.append(Terminal([sys.executable, suite.root / "reward.py", "--vote", "--init", chain / "sft", "--out",
                                  chain / "reward", "--votes", file, "--max_new", "24"], suite.env))
        return sessions[-1]

    def vote(t, key):
        screen = t.until("q(uit)> ").split("user: ")[1]
        prompt, upper, lower = (x.strip() for x in screen.split("\n\n")[:3])
        t.type(key + "\n")
        if key in "12t":
            t.until("P(chosen) = ")
            chosen, rejected = (lower, upper) if key == "2" else (upper, lower)
            label = 0.5 if key == "t" else 1.0
            want.append({"prompt": user(prompt), "chosen": chosen, "rejected": rejected, "label": label})
            assert votes_in(file) == want             # on the disk by the time the reward model's opinion is shown

    try:
        t = session()
        vote(t, "u")                                  # nothing to take back yet
        for key in "12t2112":
            vote(t, key)
        vote(t, "s")
        vote(t, "u")                                  # takes back the seventh, and asks it again
        taken = want.pop()
        assert f"[{len(want)} votes]" in t.until("q(uit)> ")
        t.type("x\n\n2\n")                            # neither x nor an empty line is a vote
        t.until("P(chosen) = ")
        want.append(votes_in(file)[-1])
        assert votes_in(file) == want
        assert {want[-1]["chosen"], want[-1]["rejected"]} == {taken["chosen"], taken["rejected"]}
        t.until("q(uit)> ")
        t.type("\x03")
        assert f"7 votes in {file}" in t.until("--out") + "--out" and t.process.wait(20) == 0

        t = session()
        for key in "22t12":
            vote(t, key)
        t.process.kill()
        t.process.wait(20)
        file.write_bytes(file.read_bytes()[:-1])      # and the disk lost the last newline

        t = session()
        vote(t, "u")                                  # the last vote of the session before
        want.pop()
        for key in rng.choices("12t", k=9):
            vote(t, key)
        t.until("q(uit)> ")
        t.type("\x04")
        assert f"20 votes in {file}" in t.until("--out") + "--out" and t.process.wait(20) == 0
    finally:
        for t in sessions:
            t.process.kill()
            os.close(t.ours)
    assert len({str(v["prompt"]) for v in want}) == 20 == len(votes_in(file))
    r = suite.ok("reward.py", "--init", chain / "reward", "--data", file, "--out", tmp_path / "rm", "--held_out", 0.3,
                 "--batch_size", 4, "--warmup", 1)
    assert "20 rows kept, 0 dropped" in r.out and result_of(tmp_path / "rm")["after"]["loss"] > 0
    r = suite.ok("reward.py", "--init", chain / "sft", "--data", chain / "reward" / "comparisons.jsonl", "--add", file,
                 "--out", tmp_path / "rm2", "--max_steps", 1, "--held_out", 0.3)


@needs_fork
def test_voting_says_where_a_file_is_broken(suite, chain, tmp_path):
    (tmp_path / "v.jsonl").write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n{"prompt": "H')
    r = suite.run("reward.py", "--vote", "--init", chain / "sft", "--out", chain / "reward", "--votes",
                  tmp_path / "v.jsonl")
    fails(r, f"{tmp_path / 'v.jsonl'}:2: ")
    r = suite.run("reward.py", "--vote", "--init", chain / "sft", "--out", chain / "base", "--votes",
                  tmp_path / "w.jsonl")
    fails(r, f"{chain / 'base'} is a language model")


# ---------------------------------------------------------------------------------------------------------------------
# 4. ppo.py --inspect.


@needs_fork
@pytest.mark.parametrize("flags", [["--resume"], ["--lam", 0.8, "--gamma", 0.9, "--kl_coef", 0.3, "--clip", 0.01],
                                   ["--advantage", "rloo", "--group", 4]], ids=["trained", "fresh", "rloo"])
def test_inspect_adds_up(suite, chain, tmp_path, flags):
    """Everything in the table follows from the columns before it, by the equations printed above it."""
    if flags == ["--resume"]:
        shutil.copytree(chain / "ppo", tmp_path / "ppo")
    files = {p: p.read_bytes() for p in (tmp_path / "ppo").glob("*") if p.is_file()}
    r = suite.ok("ppo.py", "--init", chain / "sft", "--reward", chain / "reward", "--rollouts", 16, "--max_new", 12,
                 "--out", tmp_path / "ppo", "--inspect", "--lr", 0.01, *flags)
    assert files == {p: p.read_bytes() for p in (tmp_path / "ppo").glob("*") if p.name != "inspect.txt" and p.is_file()}
    assert (tmp_path / "ppo" / "inspect.txt").read_text() in r.out
    score, beta, gamma, lam, eps = map(float, re.search(
        r"score .* = (\S+), beta = (\S+), gamma = (\S+), lam = (\S+), eps = (\S+)", r.out).groups())
    mean, std = map(float, re.search(r"mean = (\S+), std = (\S+)", r.out).groups())
    tables = []
    for text in r.out.split("clipped\n")[1:]:
        rows = [line.split()[-11:] for line in text.split("\n\n")[0].strip().splitlines()]
        tables.append([(*map(float, row[:10]), row[10]) for row in rows])
    before, after = tables
    assert len(before) == len(after) >= 1
    A, value_after = 0.0, 0.0
    for i, row in reversed(list(enumerate(before))):
        logp, old, ref, kl, reward, value, adv, whitened, ret, ratio, clipped = row
        assert logp == old and ratio == 1 and clipped == "no" and kl == pytest.approx(old - ref, abs=2e-5)
        assert reward == pytest.approx(-beta * kl + (score if i == len(before) - 1 else 0), abs=2e-5)
        if "rloo" in flags:
            assert whitened == adv == before[0][6]
        else:
            A = reward + gamma * value_after - value + gamma * lam * A
            assert adv == pytest.approx(A, abs=1e-4) and ret == pytest.approx(adv + value, abs=2e-5)
            assert whitened == pytest.approx((adv - mean) / std, abs=1e-4)
        value_after = value
    assert any(row[3] for row in before) == (flags == ["--resume"])       # KL: none before the first update
    for old_row, row in zip(before, after):
        assert (row[1], row[2], row[4], *row[6:9]) == (old_row[1], old_row[2], old_row[4], *old_row[6:9])
        assert row[9] == pytest.approx(math.exp(row[0] - row[1]), rel=1e-3, abs=1e-5)
        outside = row[9] > 1 + eps + 1e-5 if row[7] > 0 else row[9] < 1 - eps - 1e-5
        assert (row[10] == "yes") == outside
    assert any(row[9] != 1 for row in after)
    if "rloo" not in flags:
        assert any(row[5] != old_row[5] for old_row, row in zip(before, after))     # the values moved too


# ---------------------------------------------------------------------------------------------------------------------
# 5. ppo.health.


def rows_of_a_run(n=50, **changed):
    """log.jsonl of a healthy run on the tiny world (the figures of one, every curve straightened), with some columns
    (start, end) replaced. The policy is trained from the fifth iteration on."""
    columns = {"reward": (0.26, 2.3), "kl": (0.0, 0.95), "kl_k3": (0.0, 0.9), "kl_exact": (0.0, 0.93),
               "beta": (0.1, 0.1), "entropy": (0.28, 0.045), "length": (10.4, 10.8), "eos_rate": (0.985, 1.0),
               "unique": (0.54, 0.36),
               "explained_var": (-0.33, 0.75), "value_loss": (2.0, 0.2), "policy_loss": (-0.01, -0.002),
               "approx_kl": (0.001, 0.0002), "clipfrac": (0.01, 0.001), "tok_s": (3000, 3000), "gold": (0.53, 0.94),
               "helpful": (0.6, 0.9), "harmless": (0.4, 0.97), "honest": (0.5, 0.98), "concise": (0.9, 1.0)} | changed
    rows = [{"step": i + 1} | {k: a + (b - a) * i / (n - 1) for k, (a, b) in columns.items()} for i in range(n)]
    for row in rows[:4]:
        del row["policy_loss"], row["approx_kl"], row["clipfrac"]
    return rows


def test_a_healthy_run_is_silent():
    rows = rows_of_a_run()
    assert all(ppo.health(rows[:n]) == {} for n in range(51))
    del rows[0]["harmless"]                                             # a batch may lack a family
    graded = ("gold", "helpful", "harmless", "honest", "concise")
    ungraded = [{k: v for k, v in row.items() if k not in graded} for row in rows]
    assert ppo.health(rows) == ppo.health(ungraded) == {}
    old = [{k: v for k, v in row.items() if k != "unique"} for row in rows[:20]]     # of before there was such a column
    assert ppo.health(old + rows[20:]) == {}


@pytest.mark.parametrize("name, changed, flag", [
    ("negative KL", {"kl": (0.0, -0.5)}, "--dtype"),
    ("EOS rate", {"eos_rate": (0.98, 0.5)}, "--eos_penalty"),
    ("entropy", {"entropy": (0.28, 0.001)}, "--entropy_coef"),
    ("identical responses", {"unique": (0.54, 0.01)}, "--kl_coef"),
    ("length", {"length": (10.0, 30.0)}, "--length_penalty"),
    ("length", {"length": (10.0, 3.0)}, "--kl_coef"),
    ("ratio", {"clipfrac": (0.01, 0.6)}, "--lr"),
    ("ratio", {"approx_kl": (0.001, 0.4)}, "--lr"),
    ("value model", {"explained_var": (-0.3, -0.1)}, "--value_lr"),
    ("reward hacking", {"gold": (0.9, 0.6), "reward": (0.3, 2.5)}, "--kl_budget")])
def test_each_illness_is_named_with_a_cure(name, changed, flag):
    said = ppo.health(rows_of_a_run(**changed))
    assert list(said) == [name] and flag in said[name] and "\n" not in said[name]
    for word in re.findall(r"--(\w+)", said[name]):
        assert word in {f.name for f in fields(ppo.Config)}, word
    assert ppo.health(rows_of_a_run(**changed)[:9]) == {}


def test_health_looks_for_the_peak_of_gold():
    """A gold score that rose first and fell later is hacking, although it ends above its start."""
    up = rows_of_a_run(30, gold=(0.5, 0.95))
    down = rows_of_a_run(30, gold=(0.95, 0.7), reward=(2.3, 3.0), entropy=(0.05, 0.05))
    assert list(ppo.health(up + down)) == ["reward hacking"] and "0.9" in ppo.health(up + down)["reward hacking"]
    honest = rows_of_a_run(30, gold=(0.95, 0.7), reward=(2.3, 1.0), entropy=(0.05, 0.05))   # both fall: something else
    assert ppo.health(up + honest) == {}


# ---------------------------------------------------------------------------------------------------------------------
# 6. The cures, flags of ppo.py.


def test_ensemble():
    r = torch.tensor([[1.0, 2.0, 5.0], [1.0, 4.0, -1.0], [1.0, 0.0, 2.0]])
    assert ppo.ensemble(r, "mean", 9).tolist() == [1, 2, 2] and ppo.ensemble(r, "min", 9).tolist() == [1, 0, -1]
    assert ppo.ensemble(r, "uwo", 0.5).tolist() == pytest.approx([1, 2 - 0.5 * 8 / 3, 2 - 0.5 * 6])
    for kind in ("mean", "min", "uwo"):
        assert torch.equal(ppo.ensemble(r[:1], kind, 0.5), r[0])        # one model is no ensemble


@pytest.fixture
def train(suite, chain, tmp_path):
    """train(name, flags...) -> (what ppo.py printed, its log)."""
    def call(name, *flags):
        r = suite.ok("ppo.py", "--init", chain / "sft", "--rollouts", 8, "--minibatches", 2, "--max_new", 8, "--dtype",
                     "float32", "--relabel", 0, "--value_warmup", 0, "--out", tmp_path / name, *flags)
        return r.out, log_of(tmp_path / name) if (tmp_path / name / "log.jsonl").exists() else []
    return call


@needs_fork
def test_several_reward_models(train, chain):
    """Twice the same one is the same as one."""
    one = chain / "reward"
    logs = [train(name, "--iterations", 2, "--reward", *flags)[1] for name, *flags in (
        ("one", one), ("two", f"{one},{one}", "--ensemble", "uwo", "--reward_weights", "0.2,0.2"))]
    assert logs[0] == logs[1]


def test_weights_of_several_rewards(tmp_path, monkeypatch):
    (tmp_path / "some_rewards.py").write_text("def one(rows, texts):\n    return [1.0] * len(texts)\n"
                                              "def three(rows, texts):\n    return [3.0] * len(texts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for flags, want in (({}, 2), ({"reward_weights": "3,1"}, 1.5), ({"ensemble": "min"}, 1),
                        ({"ensemble": "uwo", "uwo_coef": 0.25}, 1.75)):
        cfg = ppo.Config(reward="some_rewards:one,some_rewards:three", **flags)
        score, models = ppo.reward_function(cfg, torch.device("cpu"), None)
        assert score(SimpleNamespace(rows=[{}] * 2, texts=["a", "b"])).tolist() == [want, want] and models == []


@needs_fork
def test_kl_budget(train, tmp_path):
    flags = ["--reward", "gold", "--iterations", 9, "--lr", 0.01, "--save_every", 99]
    out, log = train("ppo", *flags, "--kl_budget", 0.05)
    assert 2 <= len(log) < 9 and "--kl_budget 0.05 is spent" in out
    assert all(row["kl_exact"] < 0.05 and "policy_loss" in row for row in log[:-1])
    assert log[-1]["kl_exact"] >= 0.05 and "policy_loss" not in log[-1]         # the last one was not learned from
    assert result_of(tmp_path / "ppo")["after"] and (tmp_path / "ppo" / "model.safetensors").exists()
    out, again = train("ppo", *flags, "--kl_budget", 0.05, "--resume")
    assert len(again) == len(log) + 1 and "is spent" in out                     # nothing to go on with


@needs_fork
def test_length_penalty(train, chain):
    outs = [train(f"ppo{x}", "--reward", chain / "reward", "--inspect", "--length_penalty", x)[0] for x in (0, 0.5)]
    tables = [[line.split()[-11:] for line in out.split("clipped\n")[1].split("\n\n")[0].splitlines()] for out in outs]
    assert tables[0][:-1] and [row[:5] for row in tables[0][:-1]] == [row[:5] for row in tables[1][:-1]]
    cost = float(tables[0][-1][4]) - float(tables[1][-1][4])
    assert cost == pytest.approx(0.5 * len(tables[0]), abs=1e-4)                # on the last token, for each of them


@needs_fork
def test_ptx(train):
    """Pretraining text in the mix: its loss is in the log and falls, and falls only because of it."""
    flags = ["--reward", "gold", "--iterations", 3, "--lr", 0.003]
    losses = {x: [row["ptx_loss"] for row in train(f"ptx{x}", *flags, "--ptx_coef", x)[1]] for x in (1e-9, 10)}
    assert losses[10][-1] < losses[10][0] - 0.1 and losses[10][-1] < losses[1e-9][-1] - 0.1


def test_ptx_leaves_the_held_out_text_alone(chain):
    tok = evaluate.load(chain / "base")[1]
    text, held = world.TINY / "corpus.txt", evaluate.tail_of(world.TINY / "corpus.txt", tok)[0]
    rows = ppo.windows(text, tok, 128)
    ids = [i for doc in text.read_text().split("<|endoftext|>") for i in [tok.eos_id, *tok.encode(doc)]]
    assert rows.flatten().tolist() == ids[: rows.numel()] and held.tolist() == ids[-len(held):]
    assert 0 <= len(ids) - rows.numel() - len(held) < 128


@needs_fork
def test_health_speaks_up_once(train):
    out, log = train("ill", "--reward", "gold", "--iterations", 12, "--lr", 0.1, "--rollouts", 4)
    said = re.findall(r"^health, (.*?): ", out, re.M)
    assert said and len(said) == len(set(said)) and all("unique" in row for row in log)


# ---------------------------------------------------------------------------------------------------------------------
# 7. tests/hacking.py, the driver of the long runs, in a small way.


def test_hacking_driver(tmp_path, monkeypatch, capsys):
    """Every command it would run is one its script takes; of made-up logs it draws and tabulates what they hold."""
    commands = []

    def pretend(command, **kw):
        script, argv = Path(command[1]).name, command[2:]
        if command[1] == "-m":
            script, n = command[2], command.index("--reference")
            argv = ["--models", ",".join(command[3:n]), *command[n:]]
        monkeypatch.setattr(sys, "argv", [script, *argv])
        cfg = cli(import_module(script.removesuffix(".py")).Config, "")
        commands.append((script, cfg))
        out, result = Path(cfg.out), {}
        if script == "ppo.py":   # gold 0.5 -> 0.9 -> its end, over 30 iterations
            end = {"none": 0.5, "budget": 0.9, "center": 0.7}[out.name]
            gold = [0.5 + 0.04 * i for i in range(11)] + [0.9] * 4
            gold += [0.9 + (end - 0.9) * i / 10 for i in range(11)] + [end] * 4
            write(out / "log.jsonl", [{"kl_exact": 0.1 * i, "reward": 0.2 * i, "gold": x} for i, x in enumerate(gold)])
        if script == "data.evaluate":
            result = {"models": {Path(p).name: {"reward": 1.0, "gold": 0.5, "kl": 2.0} for p in cfg.models.split(",")},
                      "best_of": [{"n": n, "kl": n / 2, "reward": n, "gold": n} for n in (1, 2)]}
        (out / "result.json").write_text(json.dumps(result))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(hacking.subprocess, "run", pretend)
    cfg = hacking.Config(out=str(tmp_path), biases="length,sycophancy", seeds="0,1", cures="center,budget",
                         strength=2.0, ppo_flags="--iterations 30")
    hacking.main(cfg)
    assert [name for name, _ in commands] == [
        "sft.py", "reward.py", "ppo.py", "reward.py", "ppo.py", "ppo.py", "data.evaluate"] * 2 + [
        "reward.py", "ppo.py", "reward.py", "ppo.py", "ppo.py", "data.evaluate"] * 2
    configs = {name: [c for n, c in commands if n == name] for name in ("reward.py", "ppo.py", "data.evaluate")}
    assert [(c.bias_length, c.bias_sycophancy) for c in configs["reward.py"][::4]] == [(1.4, 0), (0, 4)]
    assert [(c.center, c.seed) for c in configs["reward.py"][:3]] == [(0.01, 0), (0.2, 0), (0.01, 1)]
    none, center, budget = configs["ppo.py"][:3]
    assert (none.relabel, none.kl_coef, none.iterations, none.kl_budget, budget.kl_budget) == (0, 0.01, 30, 0, 0.7)
    assert none.reward == budget.reward == configs["reward.py"][0].out and center.reward == configs["reward.py"][1].out
    assert configs["data.evaluate"][0].reward == none.reward
    rows = {row["cure"]: row for row in json.loads((tmp_path / "cures.json").read_text()) if row["seed"] == 1}
    assert {c: (round(r["lost"], 3), round(r["cured"], 3)) for c, r in rows.items()} == {
        "none": (0.4, 0), "center": (0.2, 0.5), "budget": (0, 1)}
    text = capsys.readouterr().out
    assert (tmp_path / "cures.txt").read_text() in text + "\n" and "0.500 (0.500 to 0.500)" in text
    if find_spec("matplotlib"):
        assert (tmp_path / "length.png").exists() and (tmp_path / "sycophancy.png").exists()
    commands.clear()
    hacking.main(cfg)
    assert commands == []                                               # nothing is made twice
    with pytest.raises(InputError, match="prayer"):
        hacking.main(hacking.Config(cures="prayer"))


def test_every_cure_is_a_command(monkeypatch):
    for flags in hacking.CURES.values():
        monkeypatch.setattr(sys, "argv", ["ppo.py", *flags.split()])
        assert cli(ppo.Config, "") != ppo.Config()


def test_asking_again_asks_the_same_annotator(monkeypatch):
    """About the answers of policy and reference that end and differ, with the noise and the biases of the first
    comparisons; and the reward model learns what is preferred."""
    tok = SimpleNamespace(eos_id=0, pad_id=1, decode=lambda ids: " ".join(map(str, ids)))
    prompts, says = [[2, 3], [2, 3], [4], [4]], [[5, 0], [6, 0], [7, 8], [7, 0]]          # the third one does not end
    ids, real = pad_batch([p + a for p, a in zip(prompts, says)], 1)
    mask = real & (torch.arange(4) >= torch.tensor([len(p) for p in prompts])[:, None])
    b = SimpleNamespace(ids=ids, mask=mask, prompts=prompts, rows=["who", "who", "why", "why"])
    other, _ = pad_batch([[2, 3, 6, 0], [4, 9, 0]], 1)
    said = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]) > 0
    monkeypatch.setattr(ppo, "generate", lambda model, prompts, *a, **kw: (
        (other, said, None) if prompts == [[2, 3], [4]] else None))
    asked = []
    monkeypatch.setattr(ppo.world, "utility", lambda row, text, *bias: asked.append((row, text, bias)) or len(asked))
    monkeypatch.setattr(ppo.world, "annotate", lambda u, v, noise, rng: noise if u < v else -noise)
    told = {"noise": 0.2, "agreement": 0.0, "bias_length": -0.5, "bias_confidence": 1.0, "bias_sycophancy": 0.25}
    off, cfg = lambda: torch.autocast("cpu", enabled=False), ppo.Config(group=2, minibatches=1)   # noqa: E731
    new = ppo.ask(b, None, told, tok, cfg, 3, off)
    assert new == [((2, 3), (5, 0), (6, 0), 0.2), ((4,), (7, 0), (9, 0), 0.2)]
    assert asked == [("who", "5 0", (-0.5, 1.0, 0.25)), ("who", "6 0", (-0.5, 1.0, 0.25)),
                     ("why", "7 0", (-0.5, 1.0, 0.25)), ("why", "9 0", (-0.5, 1.0, 0.25))]
    torch.manual_seed(0)
    rm = GPT(GPTConfig(vocab_size=12, n_layer=1, max_len=16, scalar_head=True))
    optimizer, log = torch.optim.AdamW(rm.parameters(), 1e-3), SimpleNamespace()

    def update(step, model, optimizer, lr, batch):
        optimizer.step()
        optimizer.zero_grad()
    log.update = update
    new, old = [((2, 3), (5, 0), (6, 0), 1.0), ((4,), (7, 0), (9, 0), 0.0)], [((2, 3), (6, 0), (7, 0), 1.0)]
    r = lambda *row: rm.scores(rm(torch.tensor([row])))[0, -1].item()   # noqa: E731
    d = [r(2, 3, 5, 0) - r(2, 3, 6, 0), r(4, 7, 0) - r(4, 9, 0), r(2, 3, 6, 0) - r(2, 3, 7, 0)]
    both = [r(2, 3, 5, 0) + r(2, 3, 6, 0), r(4, 7, 0) + r(4, 9, 0), r(2, 3, 6, 0) + r(2, 3, 7, 0)]
    want = np.mean([np.logaddexp(0, -x if k != 1 else x) + 0.005 * y ** 2 for k, (x, y) in enumerate(zip(d, both))])
    first = ppo.learn(new, old, rm, optimizer, 0.01, tok, cfg, 0, off, log)
    assert first["rm_loss"].item() == pytest.approx(want, rel=1e-5)
    assert first["rm_accuracy"].item() == pytest.approx(((d[0] > 0) + (d[1] < 0)) / 2)
    for step in range(30):
        last = ppo.learn(new, old, rm, optimizer, 0.01, tok, cfg, step, off, log)
    assert last["rm_loss"] < 0.2 * first["rm_loss"] and last["rm_accuracy"] == 1
