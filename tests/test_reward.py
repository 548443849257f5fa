"""What reward.py reports of a reward model, and what is left when a run is refused, cut off or goes on."""
import json
import math
import os
import random
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reward
import sft
from data import comparisons, health, report, sample, world
from data.files import formats
from data.files.checkpoint import load
from data.principles import transcript
from data.rewards import rewards_of_texts
from test_oracles import helpful_pairs
from test_scripts import fails, log_of, result_of, same, write

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")


# ------------------------------------------------------------------------------------------------------------
# Figures.


def test_accuracy_counts_no_opinion_as_half():
    """Otherwise a model that gives everything the same reward is right never, or always."""
    p = torch.tensor([1.0, 0.0, 0.8, 0.3])
    assert report.right(torch.tensor([2.0, -1.0, 0.5, -3.0]), p).mean() == 1
    assert report.right(torch.tensor([2.0, 1.0, -0.5, 3.0]), p).mean() == 0.25
    assert report.right(torch.zeros(4), p).mean() == 0.5
    assert (report.right(torch.tensor([2.0, 2.0, 2.0, 0.0]), torch.tensor([0.8, 0.2, 0.5, 0.2])).tolist()
            == [1, 0, 0.5, 0.5])


def test_accuracy_by_length():
    """Otherwise a reward model that has learned length alone looks like one that has learned what is good."""
    longer = torch.tensor([3, -2, 0, 5, -4, 1])               # tokens by which a is longer
    p = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0])          # chosen: longer, shorter, same, shorter,
                                                              # longer ..
    likes_length = reward.accuracies(longer.float(), p, longer)
    assert likes_length == pytest.approx({"accuracy": 3.5 / 6, "longer_wins": 3.5 / 6,
                                          "accuracy_shorter": 0.0, "accuracy_same_length": 0.5,
                                          "accuracy_longer": 1.0})
    knows = reward.accuracies(p - 0.5, p, longer)
    assert {knows[name] for name in knows if name != "longer_wins"} == {1.0} and knows["longer_wins"] < 1
    # there is no such pair
    assert "accuracy_longer" not in reward.accuracies(p[:1] - 0.5, p[:1], -longer[:1])


def test_calibration_error_against_numpy():
    rng = np.random.default_rng(0)
    d, p = 2 * rng.normal(size=4000), rng.choice([0.0, 0.5, 1.0, 0.7], 4000)
    stated = np.concatenate([1 / (1 + np.exp(-d)), 1 / (1 + np.exp(d))])
    true, want = np.concatenate([p, 1 - p]), 0.0
    for low in range(10):
        inside = np.floor(stated * 10) == low
        want += abs(stated[inside].sum() - true[inside].sum()) / len(stated)
    got = reward.calibration_error(torch.tensor(d), torch.tensor(p))
    assert got == pytest.approx(want, abs=1e-6) and got > 0.1
    assert reward.calibration_error(-torch.tensor(d), 1 - torch.tensor(p)) == pytest.approx(got, abs=1e-9)
    sure = torch.full((1000,), math.log(9.0))                 # P = 0.9, and it is right in 0.9 of the pairs
    label = (torch.arange(1000) < 900).float()
    assert reward.calibration_error(sure, label) < 1e-5 < 0.39 < reward.calibration_error(sure, 1 - label)


def rows_of_a_run(loss, n=60):
    """Log rows of a run whose loss falls from 0.7 to `loss`."""
    return [{"step": i + 1, "loss": 0.7 + (loss - 0.7) * min(1, i / 20), "accuracy": 0.5} for i in range(n)]


def test_health_in_words():
    """What has learned nothing, or length alone, is told from what is well."""
    well = {"accuracy": 0.9, "longer_wins": 0.7}
    assert health.of_reward_model(rows_of_a_run(0.3), well) == {}
    assert health.of_reward_model(rows_of_a_run(0.3), {}) == {}              # all held-out pairs are ties
    assert health.of_reward_model(rows_of_a_run(0.693)[:49], well) == {}     # too early to say
    assert list(health.of_reward_model(rows_of_a_run(0.693), {"accuracy": 0.52})) == ["loss"]
    assert health.of_reward_model(rows_of_a_run(0.693), well) == {}          # labels of 0.55, all learned
    for longer_wins in (0.7, 0.3):      # the longer one, or the shorter one
        counts_words = {"accuracy": 0.7, "longer_wins": longer_wins}
        assert list(health.of_reward_model(rows_of_a_run(0.6), counts_words)) == ["length"]
    assert health.of_reward_model(rows_of_a_run(0.6), {"accuracy": 0.5, "longer_wins": 0.5}) == {}


def reward_alone(model, tok, row, side):
    """The reward of one side of a preference row, by itself, at its last token."""
    prompt, answer = tok.render_answer(row["prompt"], row[side])
    with torch.no_grad():
        return model.scores(model(torch.tensor([prompt + answer])))[0, -1].item()


@needs_fork
def test_evaluate_says_what_the_pairs_say(chain):
    """All its figures once more, pair by pair, with every answer scored alone."""
    model, tok = load(chain / "reward", head="score")
    rows, _ = formats.load(chain / "reward" / "comparisons.jsonl", "preference", 60)
    groups, _ = reward.group_pairs(rows, tok, 256)
    metrics = reward.held_out_metrics(model, groups, tok)

    def alone(row, side):
        return reward_alone(model, tok, row, side), len(tok.render_answer(row["prompt"], row[side])[1])
    told = [(*alone(row, "chosen"), *alone(row, "rejected"), row) for row in rows]
    answers = {}
    for r_chosen, _, r_rejected, _, row in told:
        answers[str(row["prompt"]), row["chosen"]] = r_chosen
        answers[str(row["prompt"]), row["rejected"]] = r_rejected
    choices = [x for x in told if x[4]["label"] != 0.5]
    assert metrics["reward_mean"] == pytest.approx(np.mean(list(answers.values())), abs=1e-4)
    within_rounding = np.mean([abs(x[0] - x[2]) < 1e-4 for x in choices])
    assert metrics["accuracy"] == pytest.approx(np.mean([x[0] > x[2] for x in choices]),
                                                abs=within_rounding + 1e-6)
    assert metrics["margin"] == pytest.approx(np.mean([x[0] - x[2] for x in choices]), abs=1e-4)
    assert metrics["ceiling"] == pytest.approx(np.mean([x[4]["ceiling"] for x in choices]), abs=1e-6)
    assert metrics["longer_wins"] == pytest.approx(
        np.mean([0.5 + 0.5 * np.sign(x[1] - x[3]) for x in choices]), abs=1e-6)
    loss = [-x[4]["label"] * math.log(world.choice_probability(x[0] - x[2], 1))
            - (1 - x[4]["label"]) * math.log(world.choice_probability(x[2] - x[0], 1)) for x in told]
    assert metrics["loss"] == pytest.approx(np.mean(loss), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Scalable oversight: an annotator with a critic (what the annotator makes of it: tests/test_oracles.py).


def test_a_critic_reads_the_answers_that_the_annotator_doubts(tmp_path, monkeypatch):
    """Otherwise it is asked about what is known, twice about the same, or in other words than in cai.py; or
    what it says goes to another answer, and never reaches the comparisons."""
    pairs, asked = helpful_pairs()[::9], []
    ideal = {transcript(row["prompt"]) + "\n\nAssistant:": right for row, right, _ in pairs}

    def ask(requests):
        """A critic who finds fault with everything, and then says what is right."""
        asked.extend(requests)
        for request in requests:
            talk = re.match(r"(?s).*?\n\nAssistant:", request["prompt"])[0]
            text = (f" {ideal[talk]}" if request["prompt"].endswith("Revision:")
                    else " The answer is not right.")
            yield {"text": text, "ended": True}
    monkeypatch.setattr(comparisons, "local_critic", lambda path, device: ("somebody", ask))
    run = SimpleNamespace(cfg=reward.Config(critique="somebody"), folder=tmp_path, say=print,
                          make_room=lambda: None)
    annotator = world.Annotator(noise=0.0, knows=0.5)
    doubted = {(str(row["prompt"]), text) for row, *texts in pairs
               for text in texts if not annotator.knows_fact(row)}
    alone = sample.annotated(pairs, annotator, random.Random(0))
    annotator.critiques = comparisons.criticised(run, pairs + pairs, annotator, "cpu")
    helped = sample.annotated(pairs, annotator, random.Random(0))

    assert set(annotator.critiques) == doubted and 0 < len(doubted) < 2 * len(pairs)
    assert len(asked) == 2 * len(doubted) and len({request["seed"] for request in asked}) > len(doubted)
    for (row, right, wrong), before, after in zip(pairs, alone, helped):
        assert before["label"] == (1.0 if annotator.knows_fact(row) else 0.5)
        assert (after["chosen"], after["rejected"], after["label"]) == (right, wrong, 1.0)


def test_counts_of_prompts_add_up(monkeypatch, capsys):
    """A prompt that the world has twice is one group of pairs: the screen says of how many different prompts
    the pairs are. Otherwise 300 prompts, 25 of them without two answers, leave 271 groups and nobody knows
    why."""
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in "abcad"]
    answers = [["1", "2", "3"], ["1"], ["1", "2"], ["1", "4"], []]
    monkeypatch.setattr(comparisons, "answer_prompts", lambda run, path, device: (rows, answers))
    monkeypatch.setattr(sample, "annotated", lambda pairs, annotator, rng: pairs)
    pairs = comparisons.compare_answers(SimpleNamespace(cfg=reward.Config(), say=print), "somebody", "cpu")
    assert len(pairs) == 5
    # 5 prompts, 2 of them without two answers: 2 and 1 repeat.
    assert capsys.readouterr().out.endswith(
        "compares 5 pairs, of 2 different prompts (and 1 repeats of them)\n")


def test_gold_accuracy(monkeypatch):
    """The share of right choices by gold, whatever the label says and whichever side is a; pairs without a
    better answer do not count."""
    def scored(pairs, model, tok):
        return [pair | {"r_a": r_a, "r_b": 0.0, "gold_a": gold_a, "gold_b": 0.5}
                for pair, r_a, gold_a in zip(pairs, (1, -1, 1, -1, 1), (1.0, 0.0, 0.0, 1.0, 0.5))]
    monkeypatch.setattr(comparisons, "pairs_to_show", lambda rows, *args, **more: rows)
    monkeypatch.setattr(comparisons, "with_rewards", scored)
    rows = [{"label": 1.0}] * 5
    assert comparisons.gold_accuracy(rows, None, None, 9) == {"gold_accuracy": 0.5}
    assert comparisons.gold_accuracy([], None, None, 9) == {}


@needs_fork
def test_a_critic_needs_something_that_is_not_known(suite, tmp_path):
    for more in ([], ["--knows", 0.5, "--data", write(tmp_path / "x.jsonl", [])]):
        fails(suite.run("reward.py", "--critique", "x", *more, "--out", tmp_path / "x"),
              "give --knows, less than 1")


# ------------------------------------------------------------------------------------------------------------
# Runs.

FLAGS = ["--prompts", 60, "--k", 3, "--max_new", 24, "--held_out", 0.3, "--batch_size", 4, "--warmup", 2,
         "--dtype", "float32"]


@needs_fork
def test_the_loss_of_a_step_is_the_equation(suite, chain, tmp_path):
    """A step over all prompts, in micro-batches: what it logs, once more, answer by answer and pair by
    pair."""
    rows, _ = formats.load(chain / "reward" / "comparisons.jsonl", "preference", 80)
    for i, row in enumerate(rows):
        row |= {"label": [1.0, 0.5, 0.8][i % 3], "margin": i % 4}
    data = write(tmp_path / "pairs.jsonl", rows)
    r = suite.ok("reward.py", "--init", chain / "sft", "--data", data, "--out", tmp_path / "rm",
                 "--dtype", "float32", "--seed", 3, "--held_out", 0.2, "--batch_size", 99, "--epochs", 1,
                 "--micro_batch", 5, "--margin", 0.3, "--center", 0.2)
    train, held = formats.split(rows, 0.2, seed=0)
    torch.manual_seed(3)
    model, tok = load(chain / "sft", head="new")
    losses, right = {}, {}
    for row in train:
        a, b = [reward_alone(model, tok, row, side) for side in ("chosen", "rejected")]
        p, d = row["label"], a - b - 0.3 * row["margin"]
        loss = p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)) + 0.2 * (a + b) ** 2 / 2
        losses.setdefault(str(row["prompt"]), []).append(loss)
        right.setdefault(str(row["prompt"]), []).append(0.5 if p == 0.5 else a > b)
    [step] = log_of(tmp_path / "rm")
    assert step["loss"] == pytest.approx(np.mean([np.mean(x) for x in losses.values()]), rel=1e-4)
    assert step["accuracy"] == pytest.approx(np.mean([np.mean(x) for x in right.values()]), rel=1e-4)
    n_held = len({str(row["prompt"]) for row in held})
    assert (f"{len(losses)} prompts to train on, {n_held} held out" in r.out
            and len({*map(len, losses.values())}) > 1)


@needs_fork
def test_held_out_pairs_and_the_mean(suite, chain, tmp_path):
    """held_out.jsonl has the rewards of the checkpoint, whose held-out answers average 0."""
    folder = tmp_path / "reward"
    r = suite.ok("reward.py", "--init", chain / "sft", "--out", folder, *FLAGS, "--max_steps", 6)
    assert "answers 60 prompts 3 times each; 0 left out" in r.out and "of 180 answers end" in r.out
    result = result_of(folder)
    mean = json.loads((folder / "config.json").read_text())["reward_mean"]
    assert mean == result["after"]["reward_mean"] != 0
    model, tok = load(folder, head="score")
    rows, _ = formats.load(folder / "comparisons.jsonl", "preference")
    groups, _ = reward.group_pairs(formats.split(rows, 0.3, seed=0)[1], tok, 256)
    metrics = reward.held_out_metrics(model, groups, tok)
    assert metrics["reward_mean"] == pytest.approx(0, abs=1e-4)
    assert metrics["loss"] == pytest.approx(result["after"]["loss"], abs=1e-4)

    pairs = [json.loads(line)
             for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({str(pair["prompt"]) for pair in pairs}) == len(pairs) == len(groups)
    known = {str(row["prompt"]): row for row in world.rows("preference")}
    for pair in pairs:
        row = known[str(pair["prompt"])]
        assert [pair["gold_a"], pair["gold_b"]] == world.gold([row] * 2, [pair["a"], pair["b"]])
        for side in "ab":
            assert pair[f"r_{side}"] == pytest.approx(
                rewards_of_texts(model, tok, [pair["prompt"]], [pair[side]])[0], abs=1e-4)
    samples = (folder / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("--- before") == samples.count("--- after") == 1
    assert re.search(r"    -> (chosen|tie) +[+-]", samples)


@needs_fork
def test_a_second_run_changes_nothing_of_the_first(suite, chain, tmp_path):
    """Neither while the first is at work, nor with other flags after it has been interrupted: its comparisons
    stay."""
    folder = tmp_path / "reward"
    first = ["reward.py", "--init", chain / "sft", "--out", folder, *FLAGS, "--epochs", 500]
    other = ["reward.py", "--init", chain / "sft", "--out", folder, *FLAGS, "--seed", 1,
             "--bias_confidence", 5]
    job = suite.start(*first)
    end = time.time() + 60
    while not (folder / "log.jsonl").exists() or not (folder / "log.jsonl").read_text():
        assert time.time() < end, (job / "err").read_text()
        time.sleep(0.05)
    comparisons = (folder / "comparisons.jsonl").read_bytes()
    fails(suite.run(*other), "another run is writing there")
    fails(suite.run(*other, "--overwrite"), "another run is writing there")
    os.kill(int((job / "pid").read_text()), signal.SIGTERM)
    r = suite.finish(job)
    assert r.rc == 1 and "interrupted after step" in r.err
    fails(suite.run(*other), "--seed was 0, now 1")
    assert (folder / "comparisons.jsonl").read_bytes() == comparisons
    suite.ok(*other, "--overwrite", "--max_steps", 1)
    assert (folder / "comparisons.jsonl").read_bytes() != comparisons and len(log_of(folder)) == 1


@needs_fork
def test_a_run_cut_off_before_the_mean_is_saved_is_mended(suite, chain, tmp_path):
    """The mean is saved after the last step; whoever is killed in between must not be left with rewards off
    centre."""
    command = ["reward.py", "--init", chain / "sft", *FLAGS, "--epochs", 1]
    suite.ok(*command, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"reward_mean": 0.0}, indent=2))
    for name in ("result.json", "held_out.jsonl"):
        (tmp_path / "cut" / name).unlink()
    r = suite.ok(*command, "--out", tmp_path / "cut")
    assert "going on after step" in r.out and "answers 60 prompts" not in r.out
    same(tmp_path / "whole", tmp_path / "cut")
    for name in ("config.json", "held_out.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert result_of(tmp_path / "whole")["after"] == result_of(tmp_path / "cut")["after"]


@needs_fork
@pytest.mark.parametrize("script", ["reward.py", "sft.py"])
def test_lora_is_saved_merged(suite, chain, tmp_path, script):
    """The checkpoint is a plain one that measures what the adapters measured; what they do not touch is as it
    was; and a run cut in two ends as the whole one does."""
    flags = ["--lora", 2, "--batch_size", 8, "--warmup", 1, "--lr", 0.01, "--dtype", "float32",
             "--held_out", 0.3]
    if script == "reward.py":
        flags += ["--init", chain / "sft", "--data", chain / "reward" / "comparisons.jsonl"]
    else:
        flags += ["--init", chain / "base",
                  "--data", write(tmp_path / "demos.jsonl", world.rows("demos")[:60])]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stopped = suite.start_and_stop(2, script, *flags, "--max_steps", 4, "--out", cut)
    suite.ok(script, *flags, "--max_steps", 4, "--out", whole)
    assert "after step 2" in suite.finish(stopped).err
    suite.ok(script, *flags, "--max_steps", 4, "--out", cut)
    same(whole, cut)

    after = result_of(whole)["after"]
    if script == "reward.py":
        model, tok = load(whole, head="score")
        rows, _ = formats.load(flags[-1], "preference")
        groups, _ = reward.group_pairs(formats.split(rows, 0.3, seed=0)[1], tok, 256)
        metrics = reward.held_out_metrics(model, groups, tok)
        assert metrics["loss"] == pytest.approx(after["loss"], abs=1e-5)
        assert metrics["reward_mean"] == pytest.approx(0, abs=1e-4)
    else:
        model, tok = load(whole)
        rows, _ = formats.load(flags[-1], "sft")
        held, _, _ = sft.encode(formats.split(rows, 0.3, seed=0)[1], tok, 256)
        assert sft.held_out_loss(model, held, tok) == pytest.approx(after["loss"], abs=1e-5)
    before, now = load(flags[-3])[0].state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], now[name])}
    assert changed == {name for name in before if ".attn." in name or ".mlp." in name}
