"""ppo.py's table of estimators against float64 loops over every answer and token; its check before the first
update against planted bugs; step 6 against a sum over pairs."""
import copy
import dataclasses
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_oracles import both, draws, ragged, tiny, tok_of

import ppo
from data import relabel, world, write_jsonl
from model import GPT, GPTConfig, Linear, freeze_and_cast, generate, sampling_copy, token_logprobs
from reward import group_pairs, learn_comparisons

B, T, GROUP, BETA, GAMMA, LAM, MAX_NEW = 12, 9, 3, 0.1, 0.9, 0.8, 11
CFG = SimpleNamespace(group=GROUP, gamma=GAMMA, lam=LAM)
every_estimator = pytest.mark.parametrize("kind", list(ppo.ESTIMATORS))


def batch(seed):
    """Answers of 1 to 6 tokens behind prompts of 1 to 3, with scores at one or several tokens, as a process
    reward gives them: scores, k1, values, mask, (B, T) each, 0 outside the answers."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((B, T), dtype=bool)
    for row in mask:
        start = rng.integers(1, 4)
        row[start: start + rng.integers(1, 7)] = True
    scores = 2 * rng.normal(size=(B, T)) * (rng.random((B, T)) < 0.4)
    for i in range(B):
        scores[i, np.flatnonzero(mask[i])[-1]] = rng.normal()
    return scores * mask, rng.normal(size=(B, T)) * mask, rng.normal(size=(B, T)) * mask, mask


def looped_advantages(kind, scores, k1, values, mask):
    """The equations of the papers, one answer and one token at a time."""
    out = np.zeros((B, T))
    for i in range(B):
        tokens = np.flatnonzero(mask[i])
        members = range(i // GROUP * GROUP, i // GROUP * GROUP + GROUP)
        score = {j: scores[j].sum() for j in members}
        kl = {j: k1[j].sum() for j in members}
        for t in tokens:
            if kind == "gae":            # sum_k (gamma lam)^k delta_(t + k)
                for k, s in enumerate(tokens[tokens >= t]):
                    after = values[i, s + 1] if s < tokens[-1] else 0.0
                    delta = scores[i, s] - BETA * k1[i, s] + GAMMA * after - values[i, s]
                    out[i, t] += (GAMMA * LAM) ** k * delta
            elif kind == "reinforce++":  # what is still to come
                for k, s in enumerate(tokens[tokens >= t]):
                    out[i, t] += GAMMA ** k * (scores[i, s] - BETA * k1[i, s])
            elif kind == "rloo":
                others = [score[j] - BETA * kl[j] for j in members if j != i]
                out[i, t] = score[i] - BETA * kl[i] - np.mean(others)
            elif kind == "dr_grpo":
                out[i, t] = score[i] - BETA * kl[i] - np.mean([score[j] - BETA * kl[j] for j in members])
            elif kind == "grpo":
                all_scores = list(score.values())
                out[i, t] = (score[i] - np.mean(all_scores)) / (np.std(all_scores, ddof=1) + 1e-4)
                out[i, t] -= BETA * (kl[i] - np.mean(list(kl.values())))
            else:
                pytest.fail(f"{kind} has no equation here: write its paper's")
    return out


@every_estimator
def test_advantages_are_those_of_the_papers(kind):
    """Otherwise a baseline contains the answer itself, groups mix prompts, beta is divided by the std of the
    scores, or a reward of a step reaches tokens behind it."""
    for seed in range(3):
        scores, k1, values, mask = batch(seed)
        if not ppo.ESTIMATORS[kind].critic:
            values = np.zeros_like(values)
        want = looped_advantages(kind, scores, k1, values, mask)
        got = ppo.ESTIMATORS[kind].advantages(*map(torch.tensor, (scores, BETA * k1, values, mask)), CFG)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


def test_beta_weighs_the_same_in_a_group_of_equal_scores():
    """Otherwise grpo divides the KL by a std of 0, and beta cancels."""
    scores, k1, values, mask = map(torch.tensor, batch(0))
    scores = torch.zeros_like(scores)
    got = [ppo.grpo(scores, beta * k1, values, mask, CFG) for beta in (0.1, 0.2)]
    torch.testing.assert_close(got[1], 2 * got[0])
    assert got[0].abs().max() < 0.1 * k1.sum(1).abs().max() * 2


def looped_loss(mean_over, loss_of_token, mask):
    """The loss of a minibatch, from that of each token (m, T): the sum in the order of the papers."""
    total, n_tokens = 0.0, int(mask.sum())
    for row, m in zip(loss_of_token, mask):
        of_answer = sum(row[t] for t in np.flatnonzero(m))
        if mean_over == "answers":
            total += of_answer / m.sum() / len(mask)
        elif mean_over == "tokens":
            total += of_answer / n_tokens
        else:
            total += of_answer / MAX_NEW / len(mask)
    return total


@every_estimator
def test_what_a_token_counts(kind):
    """Otherwise the loss of grpo is no mean of means, the lengths of others change what a token of dr_grpo
    counts, padding counts, or micro-batches of any size add up to something else than the whole minibatch."""
    mean_over = ppo.ESTIMATORS[kind].mean_over
    rng = np.random.default_rng(1)
    _, _, _, mask = batch(1)
    old, adv = rng.normal(size=(2, B, T))
    logp, v = old + 0.3 * rng.normal(size=(B, T)), rng.normal(size=(B, T))
    ratio = np.exp(logp - old)
    surrogate = np.minimum(ratio * adv, np.clip(ratio, 0.8, 1.2) * adv)
    want = -looped_loss(mean_over, surrogate, mask)
    want_value = looped_loss(mean_over, 0.5 * (v - adv) ** 2, mask)
    logp, old, adv, mask, v = map(torch.tensor, (logp, old, adv, mask, v))
    weights = ppo.token_weights(mask, mean_over, MAX_NEW).double()
    assert (weights > 0).equal(mask)
    for size in (1, 5, B):
        loss = value_loss = 0.0
        for rows in torch.randperm(B).split(size):
            part, _ = ppo.policy_loss(logp[rows], old[rows], adv[rows], weights[rows], 0.2, 0.2)
            loss += part.item()
            value_loss += ppo.value_loss(v[rows], v[rows], adv[rows], weights[rows], 1.0).item()
        assert loss == pytest.approx(want, rel=1e-6)
        assert value_loss == pytest.approx(want_value, rel=1e-6)


def test_an_estimator_needs_no_docstring():
    """Otherwise a row that somebody adds ends after the first update, where the page asks what it is."""
    def mine(scores, penalty, values, mask, cfg):
        return scores

    row = ppo.ESTIMATORS["rloo"]
    assert dataclasses.replace(row, advantages=mine).in_words() == "mine"
    assert row.in_words().startswith("The whole answer's reward, minus the mean of the other answers")


def test_equal_groups_and_mismatch_answer_by_answer():
    """Otherwise groups mix prompts, rewards of steps with equal sums differ, or padding thins out the
    mismatch."""
    rng = np.random.default_rng(3)
    scores, logp, _, mask = batch(3)
    # equal in the first and third group
    for i, total in zip(range(B), (2, 2, 2, 1, 3, 3, -1, -1, -1, 4, 4, 5)):
        last = np.flatnonzero(mask[i])[-1]
        scores[i, last] += total - scores[i].sum()
    sampled = logp + rng.normal(size=(B, T)) * mask
    equal = 0
    for start in range(0, B, GROUP):
        sums = [scores[i].sum() for i in range(start, start + GROUP)]
        equal += max(sums) - min(sums) < 1e-9
    apart = [abs(sampled[i, t] - logp[i, t]) for i, t in zip(*np.nonzero(mask))]

    seen = {"score": scores, "logp": logp, "sampled_logp": sampled, "ref_logp": logp, "kl": logp,
            "entropy": logp}
    seen = {name: torch.tensor(x) for name, x in seen.items()}
    cfg = SimpleNamespace(group=GROUP, advantage="grpo", data="mine.jsonl")
    metrics = ppo.metrics_of(seen, torch.tensor(mask), torch.ones(B, dtype=bool), [], ["a", "b"], cfg)
    assert metrics["equal_groups"].item() == equal / (B // GROUP) == 0.5
    assert metrics["mismatch"].item() == pytest.approx(np.mean(apart))
    assert metrics["mismatch_max"].item() == pytest.approx(max(apart))


# ------------------------------------------------------------------------------------------------------------
# The check before the first update.


def hot(model, ids, mask, temperature=1.0):
    """Log-probs at a temperature one percent too high."""
    return token_logprobs(model, ids, mask, 1.01 * temperature)


def misplaced(model, ids, mask, temperature=1.0):
    """Log-probs, those of the first row as if it stood one position further on."""
    out = token_logprobs(model, ids, mask, temperature)
    row, on = torch.cat((ids[:1, :1], ids[:1]), 1), torch.cat((torch.zeros_like(mask[:1, :1]), mask[:1]), 1)
    out[0] = token_logprobs(model, row, on, temperature)[0, 1:]
    return out


def dropped(model, ids, mask, temperature=1.0):
    """Log-probs with noise in the first block, as dropout would make."""
    hook = model.h[0].register_forward_hook(lambda block, args, x: x * (1 + 0.02 * torch.randn_like(x)))
    out = token_logprobs(model, ids, mask, temperature)
    hook.remove()
    return out


@both
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_planted_bugs_are_found_before_the_first_update(dialect, compute, monkeypatch):
    """Otherwise rounding of bf16 hides a wrong position of one row, a temperature of 1.01 or dropout in the
    pass that trains; or such a temperature in the sampler; or sound runs are refused."""
    monkeypatch.setattr(Linear, "compute_dtype", compute)
    torch.manual_seed(0)
    policy, tok = tiny(dialect), tok_of(4, pad=30)
    reference, sampler = freeze_and_cast(copy.deepcopy(policy)), sampling_copy(policy)
    prompts, cfg = (ragged(random.Random(3), 64, 1, 9),
                    SimpleNamespace(temperature=0.9, micro_batch=16, compile=False))

    def check(temperature=0.9, sampled=None):
        """Answers of the sampler at a temperature, with other log-probs if they are given."""
        ids, mask, logp = generate(sampler, tok, prompts, draws(64, 12), temperature)
        old, ref_logp, _, entropy, _ = ppo.read_by_models(policy, reference, None, ids, mask, cfg)
        if sampled:
            logp = sampled(policy, ids, mask, 0.9).detach()
        return ppo.self_check(policy, ids, mask, logp, old, ref_logp, entropy, cfg)
    assert check().count("\n") == 4
    for planted in (hot, misplaced, dropped):
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "token_logprobs", planted)
            with pytest.raises(RuntimeError, match="self-check failed: ratio = 1"):
                check()
        if not compute:      # in the sampler
            with pytest.raises(RuntimeError, match="self-check failed: log-probs from the cache"):
                check(sampled=planted)
    with pytest.raises(RuntimeError,
                       match="temperature of the sampler" if compute else "log-probs from the cache"):
        check(temperature=0.909)


# ------------------------------------------------------------------------------------------------------------
# Step 6: the annotator is asked again.

TOLD = {"noise": 0.2, "agreement": 0.0, "bias_length": -0.5, "bias_confidence": 1.0, "bias_sycophancy": 0.25,
        "center": 0.01}


def render_answer(prompt, text):
    """Words are ids."""
    return [[int(word) for word in part.split()] for part in (prompt[0]["content"], text)]


WORDS = SimpleNamespace(eos_ids={0}, pad_id=1, decode=lambda ids: " ".join(map(str, ids)),
                        render_answer=render_answer)


def asked(text):
    return {"prompt": [{"role": "user", "content": text}]}


def group(rows):
    """Preference rows as groups."""
    return group_pairs(rows, WORDS, 16)[0]


def again_in(folder, minibatches=2, later=()):
    """A Relabelling after a run of reward.py in a folder, with one comparison of each of 100 prompts."""
    (folder / "result.json").write_text(json.dumps({"config": TOLD}))
    rows = [{"prompt": f"2 {k}", "chosen": "6 0", "rejected": "7 0"} for k in range(100, 200)]
    write_jsonl(folder / "comparisons.jsonl", rows)
    return relabel.Relabelling(ppo.Config(minibatches=minibatches), folder, WORDS, group, list(later))


def test_asking_again_asks_the_same_annotator(tmp_path, monkeypatch):
    """Otherwise answers that are cut off or the same are compared, or the annotator of the first comparisons
    had another noise or other biases."""
    again = again_in(tmp_path)
    assert again.center == 0.01 and len(again.first) == 100
    assert ([(2, 150, 6, 0), (2, 150, 7, 0)], [(0, 1, 1.0, 0.0, 1.0)]) in again.first

    # Whom: only the annotator of one reward model, that reads the policy's tokens, in the tiny world.
    model = SimpleNamespace(cfg=SimpleNamespace(max_len=16))
    one, two = [SimpleNamespace(models=lambda n=n: [model] * n, value_start=model) for n in (1, 2)]
    stranger = SimpleNamespace(models=one.models, value_start=None)
    for cfg, scorer, is_asked in ((ppo.Config(), one, True), (ppo.Config(relabel=0), one, False),
                                  (ppo.Config(data="mine.jsonl"), one, False), (ppo.Config(), two, False),
                                  (ppo.Config(), stranger, False)):
        found = relabel.relabelling_of(cfg, tmp_path, WORDS, scorer, group_pairs, [])
        assert (found is not None) == is_asked
        assert not is_asked or found.first == again.first
    # who is gone
    (tmp_path / "result.json").write_text(json.dumps({"config": TOLD | {"critique": "out/base"}}))
    assert relabel.relabelling_of(ppo.Config(), tmp_path, WORDS, one, group_pairs, []) is None

    # Two prompts; the other answer to the first one repeats the second, the first one to the second does not
    # end.
    seen, rows = [], [asked("2 3"), asked("4")]

    def utility(annotator, row, text):
        seen.append((row, text, (annotator.length, annotator.confidence, annotator.sycophancy)))
        return len(seen)
    monkeypatch.setattr(world.Annotator, "utility", utility)
    monkeypatch.setattr(world, "annotate", lambda u, v, noise, rng: noise if u < v else -noise)
    groups = again.compare(3, rows, [[5, 0], [6, 0], [7, 8], [7, 0]], [[6, 0], [9, 0]])
    bias = (-0.5, 1.0, 0.25)
    assert seen == [(rows[0], "5 0", bias), (rows[0], "6 0", bias), (rows[1], "7 0", bias),
                    (rows[1], "9 0", bias)]
    # The annotator said 0.2 for the other order.
    compared = [(answers, [pair[:3] for pair in pairs]) for answers, pairs in again.later]
    assert compared == [([(2, 3, 6, 0), (2, 3, 5, 0)], [(0, 1, 0.8)]),
                        ([(4, 9, 0), (4, 7, 0)], [(0, 1, 0.8)])]
    assert all(new in groups for new in again.later)


def test_older_comparisons_are_mixed_in(tmp_path):
    """Otherwise new comparisons are lost or learned twice, a step does not divide over processes, or a run
    that goes on mixes otherwise than one without a break."""
    again = again_in(tmp_path)
    for it in range(3):
        new = [([(it, k)], []) for k in range(20 + it)]
        before = list(again.later)
        groups = again.mixed(new, random.Random(it))
        older = [group for group in groups if group not in new]
        assert (all(groups.count(group) == 1 for group in groups)
                and len(older) == len(groups) - len(new) >= 32)
        assert len(groups) % 16 == 0 and groups[: len(new)] != new
        assert all(group in again.first + before for group in older) and again.later == before + new
        assert again_in(tmp_path, later=before).mixed(new, random.Random(it)) == groups


def test_step_6_is_the_update_of_a_reward_model():
    """Otherwise a pair counts more than its prompt, an answer's score is that of another row, or no step is
    taken."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=12, n_layer=1, max_len=16, scalar_head=True))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    run = SimpleNamespace(cfg=ppo.Config(minibatches=1, micro_batch=3), tok=WORDS,
                          allows_step=lambda *args: True)
    rows = []
    for prompt, better, worse, label in (("2 3", "5 0", "6 0", 1.0), ("2 3", "5 0", "7 7 0", 0.9),
                                         ("2 3", "6 0", "7 7 0", 0.5), ("4", "7 0", "9 0", 1.0)):
        rows.append(asked(prompt) | {"chosen": better, "rejected": worse, "label": label})
    groups, _ = group_pairs(rows, WORDS, 16)

    def reward_of(row, text):
        prompt, answer = render_answer(row["prompt"], text)
        return model.scores(model(torch.tensor([prompt + answer])))[0, -1].item()
    losses, right = {}, {}
    for row in rows:
        r, s, p = reward_of(row, row["chosen"]), reward_of(row, row["rejected"]), row["label"]
        loss = p * np.logaddexp(0, s - r) + (1 - p) * np.logaddexp(0, r - s) + 0.25 * (r + s) ** 2 / 2
        losses.setdefault(str(row["prompt"]), []).append(loss)
        right.setdefault(str(row["prompt"]), []).append(0.5 if p == 0.5 else float(r > s))
    once = learn_comparisons(run, model, optimizer, groups, 0.25)
    assert once["rm_loss"].item() == pytest.approx(np.mean([np.mean(x) for x in losses.values()]), rel=1e-5)
    assert once["rm_accuracy"].item() == pytest.approx(np.mean([np.mean(x) for x in right.values()]))
    for _ in range(40):
        last = learn_comparisons(run, model, optimizer, groups, 0.25)
    assert last["rm_loss"] < 0.7 * once["rm_loss"] and reward_of(rows[3], "7 0") > reward_of(rows[3], "9 0")


# ------------------------------------------------------------------------------------------------------------
# Runs.


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_short_trial_trains(suite, chain, tmp_path):
    """Otherwise --max_steps 4 spends all of them on the value model; or more steps go back into the warm-up,
    or begin with its length of their own."""
    flags = ["ppo.py", "--init", chain / "sft", "--reward", chain / "reward", "--rollouts", 8,
             "--minibatches", 1, "--max_new", 8, "--relabel", 0, "--value_warmup", 4, "--iterations", 40]
    out = suite.ok(*flags, "--out", tmp_path / "x", "--max_steps", 4).out
    assert "the first 1 iterations train the value model alone" in out and "the KL is 0" not in out
    assert ["policy_loss" in row for row in log_of(tmp_path / "x")] == [False, True, True, True]
    suite.ok(*flags, "--out", tmp_path / "x", "--max_steps", 6)
    assert ["policy_loss" in row for row in log_of(tmp_path / "x")][4:] == [True, True]
    out = suite.ok(*flags, "--out", tmp_path / "y", "--max_steps", 2, "--lr", 0).out
    assert "the KL is 0: nothing changed the policy" in out


@every_estimator
def test_every_estimator_runs(suite, chain, tmp_path, kind):
    """With its least group, all of its columns in the log, and the share of groups that teach nothing."""
    estimator = ppo.ESTIMATORS[kind]
    suite.ok("ppo.py", "--init", chain / "sft", "--reward", chain / "reward", "--rollouts", 8,
             "--minibatches", 2, "--max_new", 8, "--value_warmup", 0, "--iterations", 2, "--clip_high", 0.3,
             "--advantage", kind, "--group", estimator.least_group, "--out", tmp_path / "x")
    for row in log_of(tmp_path / "x"):
        assert ("value_loss" in row) == ("explained_var" in row) == estimator.critic
        assert 0 <= row["mismatch"] <= row["mismatch_max"] < 1
        assert ("equal_groups" in row) == (estimator.least_group > 1) and 0 <= row.get("equal_groups", 0) <= 1
        assert {"policy_loss", "approx_kl", "clipfrac", "rm_loss", "rm_accuracy"} <= set(row)
