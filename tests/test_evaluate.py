"""Evaluation, the inside of a PPO step, its health, the cures of reward hacking, and asking the annotator
again."""
import itertools
import json
import math
import os
import random
import re
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppo
from data import InputError, evaluate, principles, prompts, report, world
from data.files.checkpoint import load, save
from data.flags import names_in
from data.health import BEFORE, KL_FORMULAS, health, inspection, inspection_text, name_of_kl
from data.rewards import Scorer, scorer_on
from data.world import build
from model import GPT, GPTConfig
from test_scripts import fails, log_of, other_tokenizer, result_of, snapshot, user, write

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")


# ------------------------------------------------------------------------------------------------------------
# 1. data/evaluate.py: the statistics.


def test_distinct_n():
    rows = [[1, 2, 3], [1, 2, 4], [5]]
    assert (report.distinct_n(rows, 1) == 5 / 7 and report.distinct_n(rows, 3) == 1
            and report.distinct_n([[1]], 2) == 0)
    assert report.distinct_n(rows, 2) == 3 / 4


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
    # no spread, one winner: finite all the same
    assert evaluate.length_controlled([1.0] * 99, [0] * 99) > 0.99


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    for n in (1, 2, 5, 7):
        want = np.mean(
            [[gold[p, max(c, key=lambda i: proxy[p, i])] for c in itertools.combinations(range(7), n)]
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
    got = report.mean_kl(model, ref, tok, prompts, responses, batch=2)
    assert got == pytest.approx((kl / 3, entropy / 6), rel=1e-4) and kl > 0
    assert report.mean_kl(model, model, tok, prompts, responses)[0] == 0


def test_the_ai_judge_asks_as_the_corpus_does():
    """The comparison is, letter by letter, the beginning of a document the base model was trained on."""
    constitution = json.loads((world.HERE / "constitution.json").read_text())
    q = next(q for q in build.questions() if q["skill"] == "capital")
    doc = build.choice_chat(q, row := build.prompt_row(q, "{q}", random.Random(1)), constitution,
                            random.Random(1))
    _, choose = principles.constitution(str(world.HERE / "constitution.json"))
    a, b = doc.split("\n (A) ")[1].split("\n\nThe answer")[0].split("\n (B) ")
    talk = principles.transcript(row["prompt"])
    asked = [principles.comparison_prompt(talk, principle, a, b) for principle in choose]
    assert doc in [text + option for text in asked for option in principles.OPTIONS]


def test_short_names_are_different():
    assert evaluate.short_names(["out/sft", "out/ppo"]) == ["sft", "ppo"]
    assert evaluate.short_names(["a/1/ppo", "a/2/ppo/"]) == ["1/ppo", "2/ppo"]
    assert evaluate.short_names(["out/control"]) == ["out/control"]      # not to be taken for the control
    with pytest.raises(InputError, match="twice"):
        evaluate.short_names(["a/ppo", "a/ppo"])


# ------------------------------------------------------------------------------------------------------------
# 2. data/evaluate.py: the command.


@pytest.fixture
def compare(suite, tmp_path):
    """compare(flags...) -> (what it printed, result.json)."""
    def call(*flags):
        r = suite.ok("data.evaluate", *flags, "--out", tmp_path / "e")
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
        assert (w["low"] <= w["win_rate"] <= w["high"]
                and w["win_rate"] + wins[b][a]["win_rate"] == pytest.approx(1))
    rows = [json.loads(line) for line in (tmp_path / "e" / "generations.jsonl").read_text().splitlines()]
    assert (len(rows) == 4 * 24
            and {r["response"] for r in rows if r["model"] == "control"} == {evaluate.CONTROL})
    gold = world.mean_scores(world.rows("test")[:24], [r["response"] for r in rows if r["model"] == "ppo"])
    assert models["ppo"]["gold"] == gold["gold"]
    matrix = out.split("judged by gold")[1].splitlines()
    assert matrix[5].split()[0] == "control" and "BROKEN" not in out


@needs_fork
def test_no_kl_between_models_of_different_tokenizers(compare, chain, tmp_path):
    shutil.copytree(chain / "sft", tmp_path / "other")
    other_tokenizer(tmp_path / "other")
    _, result = compare(chain / "sft", tmp_path / "other", "--max_new", 4, "--prompts", 6)
    assert result["models"]["sft"]["kl"] == 0 and "kl" not in result["models"]["other"]
    assert result["models"]["other"]["entropy"] > 0


@needs_fork
def test_evaluate_with_a_reward_model_on_ones_own_prompts(compare, chain, tmp_path):
    rows = [{"prompt": f"What is {i}?"} for i in range(9)] + [{"prompt": "word " * 300}]
    out, result = compare(chain / "sft", "--data", write(tmp_path / "p.jsonl", rows),
                          "--judge", chain / "reward", "--best_of", "1,2,4", "--max_new", 8)
    assert "9 prompts, 1 too long" in out and "gold" not in result["models"]["sft"]
    assert [b["n"] for b in result["best_of"]] == [1, 2, 4] and result["best_of"][0]["kl"] == 0
    rewards = [b["reward"] for b in result["best_of"]]
    assert rewards == sorted(rewards) and result["best_of"][2]["kl"] == pytest.approx(math.log(4) - 3 / 4)


@needs_fork
def test_evaluate_folders_with_a_comma(compare, chain, tmp_path):
    folder = tmp_path / "lr=1e-5,seed=0"
    folder.mkdir()
    for name in ("sft", "ppo"):
        (folder / name).symlink_to(chain / name)
    for flags in ([folder / "sft", folder / "ppo"], ["--models", f"{folder / 'sft'},{folder / 'ppo'}"]):
        _, result = compare(*flags, "--max_new", 4, "--prompts", 6)
        assert list(result["models"]) == ["sft", "ppo", "control"]


def test_names_in_keeps_what_exists_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b" / "c,d").mkdir(parents=True)
    (tmp_path / "x,y.json").write_text("[]")
    for text, names in (("", [""]), ("p", ["p"]), ("p,q", ["p", "q"]), ("a,b", ["a,b"]),
                        ("a,b,a", ["a,b", "a"]), ("q,a,b/c,d,x,y.json", ["q", "a,b/c,d", "x,y.json"]),
                        ("a,b/c", ["a", "b/c"])):
        assert names_in(text) == names


def test_scores_that_are_not_finite_are_refused(chain, tmp_path):
    """Else every comparison with them would be a tie or a loss."""
    rm, tok = load(chain / "reward", head="score")
    with torch.no_grad():
        rm.score.weight.fill_(3e38)      # some channel is above 1.2: a score is infinite, or not a number
    save(tmp_path / "rm", rm, tok)
    judge = scorer_on("--judge", str(tmp_path / "rm"), "cpu").score_texts
    with pytest.raises(InputError, match="--judge .*rm: gives scores that are not finite"):
        judge([{"prompt": [{"role": "user", "content": "Hi"}]}], ["Hello"])


def test_what_a_judge_cannot_read_is_no_tie():
    """It is left out and counted; where nothing is left there is no win rate."""
    rows, texts = [{}] * 5, {"x": ["a", "b", "c", "d", "e"], "y": ["ab", "bc", "cd", "de", "ef"]}
    wins = evaluate.win_rates(texts, rows, lambda *_: [1.0, None, 0.0, None, 1.0], 0)
    assert wins["x"]["y"]["win_rate"] == pytest.approx(2 / 3) and wins["x"]["y"]["not_judged"] == 2
    assert wins["y"]["x"]["win_rate"] == pytest.approx(1 / 3) and wins["y"]["x"]["not_judged"] == 2
    with pytest.raises(InputError, match="can read none of 5 comparisons of x and y"):
        evaluate.win_rates(texts, rows, lambda *_: [None] * 5, 0)


def test_rows_of_ones_own_may_have_a_family():
    """Otherwise the gold judge is asked about them, and ends in a KeyError after all models have answered."""
    prompt = {"prompt": [{"role": "user", "content": "What is it?"}]}
    own = [{"family": "worm"}, {"family": "helpful"}, {"family": ["helpful"]}, {}, {"family": None},
           {"family": "helpful", "skill": "chess", "entity": "a", "answer": "b"},
           {"family": "honest", "skill": 3, "entity": "a", "answer": "b"}]
    assert not any(world.knows(prompt | row) for row in own)
    for name in ("test", "rl", "preference"):
        assert all(map(world.knows, world.rows(name)))
    tests = SimpleNamespace(rows=[prompt | own[0], world.rows("test")[0]])
    shown = report.answer_rows(tests, [{}] * 2, [{}] * 2)
    assert ["family" in row for row in shown] == [False, True]


def test_prompts_of_ones_own_are_held_out_to_measure_on():
    said = []
    run = SimpleNamespace(say=said.append)
    rows = [{"prompt": [{"role": "user", "content": f"Question {i}"}]} for i in range(2000)]
    train, held = prompts.hold_out(run, rows)
    assert 15 < len(held) < 60 and len(train) + len(held) == 2000 and not any(row in train for row in held)
    train, held = prompts.hold_out(run, rows[:40])
    assert len(train) + len(held) == 40 and held and not any(row in train for row in held)
    assert prompts.hold_out(run, rows[:1]) == (rows[:1], rows[:1]) and "too few prompts" in said[-1]


@needs_fork
def test_a_judge_that_prefers_nothing_said_at_length_is_called_broken(compare, chain):
    out, result = compare(chain / "sft", "--judge", "annotator", "--bias_length", 5, "--noise", 0,
                          "--max_new", 8)
    assert "THE JUDGE IS BROKEN: annotator" in out and result["wins"]["control"]["sft"]["win_rate"] > 0.9


@needs_fork
def test_the_ai_judge_judges(compare, chain):
    _, result = compare(chain / "sft", "--judge", f"ai:{chain / 'base'}", "--max_new", 8, "--prompts", 12)
    assert 0 <= result["wins"]["sft"]["control"]["win_rate"] <= 1


def test_swapping_the_answers_swaps_the_ai_judges_mind(chain):
    prefers = evaluate.choices_of_ai(str(chain / "base"), evaluate.Config(), torch.device("cpu"))
    rows, a, b = ([{"prompt": user("What is a dog?")}] * 3, ["A dog.", "It is it.", "No."],
                  ["I do not know that."] * 3)
    there, back = prefers(rows, a, b), prefers(rows, b, a)
    assert there == pytest.approx([1 - p for p in back], abs=1e-5) and any(abs(p - 0.5) > 1e-4 for p in there)


@needs_fork
@pytest.mark.parametrize("flags, word", [
    ("", "no models"), ("{chain}/sft {chain}/sft", "twice"),
    ("{chain}/sft --judge {chain}/base", "is a language model"),
    ("{chain}/reward", "is a reward model"), ("{chain}/sft --best_of 4", "--reward"),
    ("{chain}/sft --best_of 4,x --reward {chain}/reward", "--best_of 4,x"),
    ("{chain}/sft --judge nosuch", "nosuch"), ("{chain}/sft --max_new 256", "--max_new 256"),
    ("{chain}/sft --data {tmp}/p.jsonl", "--judge gold")])
def test_evaluate_refuses_in_one_sentence(suite, chain, tmp_path, flags, word):
    write(tmp_path / "p.jsonl", [{"prompt": "Hi"}])
    r = suite.run("data.evaluate", *flags.format(chain=chain, tmp=tmp_path).split(), "--out", tmp_path / "e")
    assert not (tmp_path / "e").exists()
    fails(r, word)


# ------------------------------------------------------------------------------------------------------------
# 3. ppo.py --inspect.


def read_inspection(text):
    """What is printed, as inspect.json has it: one iteration with one response."""
    iteration, score, beta, gamma, lam, eps = re.search(
        r"iteration (\d+): score .* = (\S+), beta = (\S+), gamma = (\S+), lam = (\S+), eps = (\S+)",
        text).groups()
    found = re.search(r"mean (\S+), over the standard deviation (\S+)", text)
    mean, std = map(float, found.groups()) if found else (0.0, 1.0)
    before, after = text.split("before the update\n")[1].split("\n\nafter it\n")
    columns = []
    for table in (before, after):
        rows = [re.fullmatch(r" *\d+ .{14}(.*)", line)[1].split()
                for line in table.strip("\n").splitlines()[1:]]
        columns.append(list(zip(*rows)))
    names = ["logp", "ref_logp", "paid", "reward", "value", "advantage", "whitened", "return"]
    if "A -> whitened" not in text:
        names.remove("whitened")
    response = {"score": float(score)}
    for part, titles, table in zip(("before", "after"), (names, ("logp", "value", "ratio")), columns):
        response[part] = {name: [*map(float, column)] for name, column in zip(titles, table)}
    response["after"]["clipped"] = [{"yes": True, "no": False}[word] for word in columns[1][3]]
    if not found:
        response["before"]["whitened"] = response["before"]["advantage"]
    return {"iteration": int(iteration), "beta": float(beta), "gamma": float(gamma), "lam": float(lam),
            "clip": float(eps), "mean": mean, "std": std, "responses": [response]}


def adds_up(page, advantage, digits):
    """Every number follows from those before it, by the equations of ppo.py, to so many digits."""
    near, rounded = 10.0 ** -digits, 10.0 ** (1 - digits)
    for response in page["responses"]:
        before, after = (
            SimpleNamespace(**{k.replace("return", "returns"): v for k, v in response[name].items()})
            for name in ("before", "after"))
        n = len(before.logp)
        assert n == len(after.logp) >= 1
        A, value_after = 0.0, 0.0
        for t in reversed(range(n)):
            k1 = before.logp[t] - before.ref_logp[t]
            assert before.paid[t] == pytest.approx(k1, abs=rounded)
            reward = -page["beta"] * k1 + (response["score"] if t == n - 1 else 0)
            assert before.reward[t] == pytest.approx(reward, abs=rounded)
            if advantage == "rloo":
                assert before.whitened[t] == before.advantage[t] == before.advantage[0]
                assert before.returns[t] == before.advantage[t]        # V = 0
            else:
                A = before.reward[t] + page["gamma"] * (value_after + page["lam"] * A) - before.value[t]
                assert before.advantage[t] == pytest.approx(A, abs=10 * near)
                assert before.returns[t] == pytest.approx(before.advantage[t] + before.value[t], abs=3 * near)
                whitened = (before.advantage[t] - page["mean"]) / page["std"]
                assert before.whitened[t] == pytest.approx(whitened, abs=2 * rounded)
            value_after = before.value[t]
            ratio = math.exp(after.logp[t] - before.logp[t])
            assert after.ratio[t] == pytest.approx(ratio, rel=1e-3, abs=near)
            # Clipped where the ratio has gone too far in the direction of the advantage. Rounding may have
            # taken the sign of that away, or leave open whether it is too far.
            up, moved, eps = before.whitened[t] > 0, after.ratio[t] - 1, page["clip"]
            if abs(moved) < eps - near:
                assert not after.clipped[t]
            elif abs(moved) > eps + near and before.whitened[t] != 0:
                assert after.clipped[t] == (up == (moved > 0))


def inspect(suite, chain, folder, flags):
    """What --inspect prints, beside a trained model where there are no flags; nothing is written. In fp32: in
    bf16 it prints no more digits than there are."""
    if not flags:
        shutil.copytree(chain / "ppo", folder / "ppo")
    before = snapshot(folder)
    # At 0.01 the answers of a group may become equal, and their advantages 0.
    lr = 0.001 if "rloo" in flags else 0.01
    r = suite.ok("ppo.py", "--init", chain / "sft", "--reward", chain / "reward", "--rollouts", 16,
                 "--max_new", 12, "--out", folder / "ppo", "--inspect", "--lr", lr,
                 "--dtype", "float32", *flags)
    assert snapshot(folder) == before and (folder / "ppo").exists() == (not flags)
    return r.out


EARLY = {"test_inspect_adds_up": inspect}      # see the chain in conftest.py


@needs_fork
@pytest.mark.parametrize("flags", [[], ["--lam", 0.8, "--gamma", 0.9, "--kl_coef", 0.3, "--clip", 0.01],
                                   ["--advantage", "rloo", "--group", 4, "--clip", 0.001]],
                         ids=["trained", "fresh", "rloo"])
def test_inspect_adds_up(early, flags):
    """Everything in the tables follows from the columns before it, by the equations printed above them."""
    page = read_inspection(early[1])
    adds_up(page, "rloo" if "rloo" in flags else "gae", 4)
    assert "R_t = r_t - beta k1,  k1 = logp - ref" in early[1]
    [response] = page["responses"]
    assert page["iteration"] == 3
    if "--clip" in flags:      # so small that every ratio but 1 is outside of it
        assert any(response["after"]["clipped"])                                # where something happens
    assert any(x != y for x, y in zip(response["before"]["logp"], response["before"]["ref_logp"]))
    assert any(ratio != 1 for ratio in response["after"]["ratio"])
    if "rloo" not in flags:
        assert response["before"]["value"] != response["after"]["value"]   # the values moved too
    if "fresh" in flags:
        assert (page["gamma"], page["lam"], page["beta"], page["clip"]) == (0.9, 0.8, 0.3, 0.01)


def test_what_a_run_keeps_to_look_at_adds_up(chain):
    """inspect.json: an early iteration, the middle one and the last, three responses each."""
    kept = json.loads((chain / "ppo" / "inspect.json").read_text())
    assert kept["last"]["iteration"] == 3 and kept["last"]["beta"] == 0.1
    for page in kept.values():
        adds_up(page, "gae", 5)
        assert len(page["responses"]) == 3 and page["advantage"] == "gae" and page["kl"]["name"] == "k1"
        hits = [sum(response["after"]["clipped"]) for response in page["responses"]]
        assert hits == sorted(hits, reverse=True)       # first where tokens are clipped
        for response in page["responses"]:
            assert len(response["tokens"]) == len(response["before"]["logp"])
            assert response["ended"] == (response["tokens"][-1] == "<eos>") and response["prompt"]


def test_the_estimate_of_the_kl_is_told_by_its_numbers():
    """Otherwise an edit of one line of ppo.py leaves --inspect and the page lying."""
    torch.manual_seed(0)
    logp, ref = torch.randn(2, 4, 5).unbind(0)
    mask = torch.rand(4, 5) < 0.7
    estimates = ppo.kl_estimators(logp, ref)
    for name, estimate in zip(("k1", "k2", "k3"), estimates):
        assert name_of_kl(torch.where(mask, estimate, 99.0), estimates, mask) == name
    assert name_of_kl(2 * estimates[0], estimates, mask) == "KL"
    values = {"logp": logp.double(), "ref": ref.double(), "exp": torch.exp}
    for formula, estimate in zip(KL_FORMULAS.values(), estimates):      # and is written down rightly
        k = eval(formula.replace("^", "**"), values)
        assert torch.allclose(k, estimate.double(), atol=1e-5)


def test_the_ratio_that_is_shown_is_that_of_the_loss():
    """Otherwise --inspect shows a ratio a token, and clipped ones, where policy_loss has one an answer."""
    cfg = SimpleNamespace(kl_coef=0.1, clip=0.2, clip_high=0.0, group=1, gamma=1.0, lam=1.0, advantage="gae")
    ids, mask = (torch.arange(8).view(2, 4),
                 torch.tensor([[False, True, True, True], [False, True, True, False]]))
    numbers = {name: torch.ones(2, 4) for name in BEFORE if name != "paid"}
    ratio = torch.tensor([[1.0] + [1.3] * 3, [1.0] + [0.9] * 2 + [1.0]])
    tok = SimpleNamespace(eos_ids={3}, decode=lambda ids: " ".join(map(str, ids)))
    page = inspection(None, tok, [{"prompt": [{"content": "?"}]}] * 2, (ids, mask), numbers,
                      {"logp": torch.zeros(2, 4), "ratio": ratio}, (torch.zeros(2, 4),) * 3, cfg)
    shown = [response["after"] for response in page["responses"]]
    assert [after["ratio"] for after in shown] == [pytest.approx([1.3] * 3), pytest.approx([0.9] * 2)]
    assert [after["clipped"] for after in shown] == [[True] * 3, [False] * 2]


def test_bf16_is_printed_with_the_digits_it_has():
    """Three of them; otherwise V is 2.67039 at two tokens, of which five digits are noise."""
    before = {name: [2.671875, -0.0123456] for name in BEFORE}
    after = {"logp": [-1.2345678, 0.0], "value": [1.0, 2.0], "ratio": [1.0003, 1.26],
             "clipped": [False, True]}
    response = {"prompt": "p", "response": "r", "tokens": ["a", "<eos>"], "score": 2.671875, "ended": True,
                "before": before, "after": after}
    page = {"responses": [response], "iteration": 3, "beta": 0.1, "gamma": 1.0, "lam": 0.95, "clip": 0.2,
            "clip_high": 0.2, "advantage": "gae", "how": "so.", "whitened": True, "mean_over": "tokens",
            "mean": 0.1, "std": 0.5, "bf16": True, "kl": {"name": "k1", "formula": "logp - ref"}}
    table = inspection_text(page).split("before the update")[1]
    assert "2.67 " in table and "-0.0123" in table and "1.26" in table and "yes" in table
    for number in re.findall(r"\d+\.\d+", table):
        assert len(number.replace(".", "").lstrip("0")) <= 3, number
    assert max(map(len, table.splitlines())) <= 100
    table = inspection_text(page | {"bf16": False}).split("before the update")[1]
    assert "2.67188" in table and "-0.01235" in table


# ------------------------------------------------------------------------------------------------------------
# 4. The health of a run.


def rows_of_a_run(n=50, **changed):
    """log.jsonl of a healthy run on the tiny world (the figures of one, every curve straightened), with some
    columns (start, end) replaced. The policy is trained from the fifth iteration on."""
    columns = {"reward": (0.26, 2.3), "kl": (0.0, 0.95), "kl_k3": (0.0, 0.9), "kl_exact": (0.0, 0.93),
               "beta": (0.1, 0.1), "entropy": (0.28, 0.045), "length": (10.4, 10.8), "eos_rate": (0.985, 1.0),
               "unique": (0.54, 0.36),
               "explained_var": (-0.33, 0.75), "value_loss": (2.0, 0.2), "policy_loss": (-0.01, -0.002),
               "approx_kl": (0.001, 0.0002), "clipfrac": (0.01, 0.001), "tok_s": (3000, 3000),
               "gold": (0.53, 0.94), "helpful": (0.6, 0.9), "harmless": (0.4, 0.97), "honest": (0.5, 0.98),
               "concise": (0.9, 1.0)} | changed
    rows = [{"step": i + 1} | {k: a + (b - a) * i / (n - 1) for k, (a, b) in columns.items()}
            for i in range(n)]
    for row in rows[:4]:
        del row["policy_loss"], row["approx_kl"], row["clipfrac"]
    return rows


def test_a_healthy_run_is_silent():
    rows = rows_of_a_run()
    assert all(health(rows[:n]) == {} for n in range(51))
    del rows[0]["harmless"]                                             # a batch may lack a family
    graded = ("gold", "helpful", "harmless", "honest", "concise")
    ungraded = [{k: v for k, v in row.items() if k not in graded} for row in rows]
    assert health(rows) == health(ungraded) == {}
    # of before there was such a column
    old = [{k: v for k, v in row.items() if k != "unique"} for row in rows[:20]]
    assert health(old + rows[20:]) == {}


@pytest.mark.parametrize("name, changed, flag", [
    ("negative KL", {"kl": (0.0, -0.5)}, "--dtype"),
    ("mismatch", {"mismatch": (0.001, 0.1)}, "--dtype"),
    ("EOS rate", {"eos_rate": (0.98, 0.5)}, "--eos_penalty"),
    ("EOS rate", {"eos_rate": (0.2, 0.2)}, "--max_new"),
    ("reward hacking", {"gold": (0.9, 0.6), "reward": (0.3, 2.5), "kl_exact": (0, 0.9)}, "--kl_budget 0.1"),
    ("entropy", {"entropy": (0.28, 0.001)}, "--entropy_coef"),
    ("identical responses", {"unique": (0.54, 0.01)}, "--kl_coef"),
    ("length", {"length": (10.0, 30.0)}, "--reward"),
    ("length", {"length": (10.0, 3.0)}, "--kl_coef"),
    ("ratio", {"clipfrac": (0.01, 0.6)}, "--lr"),
    ("ratio", {"approx_kl": (0.001, 0.4)}, "--lr"),
    ("value model", {"explained_var": (-0.3, -0.1)}, "--value_lr"),
    ("reward hacking", {"gold": (0.9, 0.6), "reward": (0.3, 2.5)}, "--kl_budget")])
def test_each_illness_is_named_with_a_cure(name, changed, flag):
    said = health(rows_of_a_run(**changed))
    assert list(said) == [name] and flag in said[name] and "\n" not in said[name]
    for word in re.findall(r"--(\w+)", said[name]):
        assert word in {f.name for f in fields(ppo.Config)}, word
    assert health(rows_of_a_run(**changed)[:9]) == {}


def test_a_mismatch_speaks_when_it_grows():
    """Otherwise the sampler may leave the policy unseen, or rounding, of which bf16 has more from the start,
    is an illness."""
    # fp32, next to nothing, bf16 of a large model
    for first, last in ((1e-7, 2e-7), (1e-4, 1e-2), (0.1, 0.1)):
        assert health(rows_of_a_run(mismatch=(first, last))) == {}
    rows = rows_of_a_run()
    for row in rows:
        row["mismatch"] = 0.002
    assert health(rows) == {}
    for row in rows[-5:]:
        row["mismatch"] = 0.05
    [sentence] = health(rows).values()
    assert "0.050 nats" in sentence and "was 0.002" in sentence


def test_no_advice_names_what_is_on():
    rows = rows_of_a_run(gold=(0.9, 0.6), reward=(0.3, 2.5))
    assert "--relabel 1" in health(rows, ppo.Config(relabel=0))["reward hacking"]
    assert "--relabel" not in health(rows, ppo.Config(relabel=1))["reward hacking"]
    rows = rows_of_a_run(explained_var=(-0.3, -0.1))
    assert "rloo" in health(rows, ppo.Config())["value model"]


def test_a_reward_that_is_the_same_for_all_is_named_and_no_hacking():
    """Where all answers get 1 the logged mean still rises, since fewer get the penalty for not ending; with a
    gold that falls this was called hacking."""
    cfg = ppo.Config(relabel=0)
    reward = tuple(rate - cfg.eos_penalty * (1 - rate) for rate in (0.985, 1.0))
    rows = rows_of_a_run(gold=(0.9, 0.6), reward=reward)
    for row in rows:      # with the six digits of the log
        row["reward"], row["eos_rate"] = float(f"{row['reward']:.6g}"), float(f"{row['eos_rate']:.6g}")
    said = health(rows, cfg)
    assert list(said) == ["equal rewards"] and "same reward, 1:" in said["equal rewards"]
    rows[20]["reward"] += 0.01      # one batch with another mean: answers do differ
    assert list(health(rows, cfg)) == ["reward hacking"]
    assert health(rows_of_a_run(), cfg) == {}


def test_health_looks_for_the_peak_of_gold():
    """A gold score that rose first and fell later is hacking, although it ends above its start."""
    up = rows_of_a_run(30, gold=(0.5, 0.95))
    down = rows_of_a_run(30, gold=(0.95, 0.7), reward=(2.3, 3.0), entropy=(0.05, 0.05))
    assert list(health(up + down)) == ["reward hacking"] and "0.9" in health(up + down)["reward hacking"]
    # both fall: something else
    honest = rows_of_a_run(30, gold=(0.95, 0.7), reward=(2.3, 1.0), entropy=(0.05, 0.05))
    assert health(up + honest) == {}


# ------------------------------------------------------------------------------------------------------------
# 5. The cures, flags of ppo.py.


def test_the_least_of_rewards_of_steps_is_of_whole_answers():
    """Not token by token: a sum of the least of each would be less than any of the rewards."""
    each = torch.tensor([[[3.0, 0.0]], [[1.0, 1.0]]])   # two rewards of one answer, at two tokens
    least = Scorer.combined(SimpleNamespace(weights=torch.ones(2), ensemble="min"), each)
    assert least.tolist() == [[1.0, 1.0]]


def test_ensemble():
    r = torch.tensor([[1.0, 2.0, 5.0], [1.0, 4.0, -1.0], [1.0, 0.0, 2.0]])

    def combined(each, kind):
        return Scorer.combined(SimpleNamespace(weights=torch.ones(len(each)), ensemble=kind), each)
    assert combined(r, "mean").tolist() == [1, 2, 2] and combined(r, "min").tolist() == [1, 0, -1]
    for kind in ("mean", "min"):
        assert torch.equal(combined(r[:1], kind), r[0])        # one model is no ensemble


@pytest.fixture
def train(suite, chain, tmp_path):
    """train(name, flags...) -> (what ppo.py printed, its log)."""
    def call(name, *flags):
        r = suite.ok("ppo.py", "--init", chain / "sft", "--rollouts", 8, "--minibatches", 2, "--max_new", 8,
                     "--dtype", "float32", "--relabel", 0, "--value_warmup", 0,
                     "--out", tmp_path / name, *flags)
        return r.out, log_of(tmp_path / name) if (tmp_path / name / "log.jsonl").exists() else []
    return call


@needs_fork
def test_several_reward_models(train, chain, tmp_path):
    """Twice the same one is the same as one."""
    one, again = chain / "reward", tmp_path / "again"
    again.symlink_to(one)
    logs = [train(name, "--iterations", 2, "--reward", *flags)[1] for name, *flags in (
        ("one", one), ("two", f"{one},{again}", "--ensemble", "min", "--reward_weights", "0.2,0.2"))]
    assert logs[0] == logs[1]


def test_weights_of_several_rewards(tmp_path, monkeypatch):
    (tmp_path / "some_rewards.py").write_text("def one(rows, texts):\n    return [1.0] * len(texts)\n"
                                              "def three(rows, texts):\n    return [3.0] * len(texts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for flags, want in (({}, 2), ({"weights": "3,1"}, 1.5), ({"ensemble": "min"}, 1)):
        rewards = Scorer("--reward", "some_rewards:one,some_rewards:three", **flags)
        ids = torch.zeros(2, 3, dtype=torch.long)
        assert rewards.score([{}] * 2, ["a", "b"], ids, ids > 0, 8).sum(1).tolist() == [want, want]
        assert rewards.score_texts([{}] * 2, ["a", "b"]) == [want, want] and rewards.models() == []


@needs_fork
def test_kl_budget(train, tmp_path):
    flags = ["--reward", "gold", "--iterations", 9, "--lr", 0.01, "--save_every", 99]
    out, log = train("ppo", *flags, "--kl_budget", 0.05)
    assert 2 <= len(log) < 9 and "--kl_budget 0.05 is spent" in out
    assert all(row["kl_exact"] < 0.05 and "policy_loss" in row for row in log[:-1])
    assert log[-1]["kl_exact"] >= 0.05 and "policy_loss" not in log[-1]   # the last one was not learned from
    assert result_of(tmp_path / "ppo")["after"] and (tmp_path / "ppo" / "model.safetensors").exists()
    out, again = train("ppo", *flags, "--kl_budget", 0.05)
    assert again == log and "is finished" in out                                # nothing to go on with
    weights = (tmp_path / "ppo" / "model.safetensors").read_bytes()
    (tmp_path / "ppo" / "result.json").unlink()       # as if killed after the last iteration: it is the last
    out, again = train("ppo", *flags, "--kl_budget", 0.05)
    assert again == log and (tmp_path / "ppo" / "model.safetensors").read_bytes() == weights


@needs_fork
def test_ptx(train):
    """Pretraining text in the mix: its loss is in the log and falls, and falls only because of it."""
    flags = ["--reward", "gold", "--iterations", 6, "--lr", 0.003]
    losses = {x: [row["ptx_loss"] for row in train(f"ptx{x}", *flags, "--ptx_coef", x)[1]]
              for x in (1e-9, 10)}
    assert losses[10][-1] < losses[10][0] - 0.1 and losses[10][-1] < losses[1e-9][-1] - 0.1


def test_ptx_leaves_the_held_out_text_alone(chain):
    _, tok = load(chain / "base")
    text, held = world.TINY / "corpus.txt", prompts.read_corpus(world.TINY / "corpus.txt", tok, 128, 1)[1]
    rows = ppo.ptx_windows(ppo.Config(), tok, 256)
    ids = [i for doc in text.read_text().split("<|endoftext|>") for i in [tok.eos_id, *tok.encode(doc)]]
    assert rows.flatten().tolist() == ids[: rows.numel()] and held.tolist() == ids[-len(held):]
    assert 0 <= len(ids) - rows.numel() - len(held) < 128


@needs_fork
def test_health_speaks_up_once(train):
    # so large steps are clipped
    out, log = train("ill", "--reward", "gold", "--iterations", 12, "--lr", 0.1, "--epochs", 2)
    said = re.findall(r"^health, (.*?): ", out, re.M)
    assert said and len(said) == len(set(said)) and all("unique" in row for row in log)
