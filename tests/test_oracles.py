"""Every number the stages train on against an independent oracle: plain loops, float64 NumPy, sums over
everything that can happen, and one task whose optimum is known in closed form. All on one CPU core."""
import copy
import functools
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.setup import adamw, batches, set_lr   # noqa: E402
import model as model_py  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
from data import world  # noqa: E402
from data.files.checkpoint import merged  # noqa: E402
from data.parallel import in_chunks, micro_batches  # noqa: E402
from data.files.tokenizer import tokenizer_from_ranks  # noqa: E402
from data.world import build   # noqa: E402
from model import (GPT, GPTConfig, answer_rewards, attention, attention_bias, compare_policies,  # noqa: E402
                   draw, freeze, freeze_and_cast, generate, last_token, pad_answers, pad_batch, refresh,
                   sampling_copy, token_logprobs, token_values, with_lora)

torch.set_num_threads(1)
f64 = torch.float64
V = 31
SHAPE = dict(vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_inner=24, max_len=64, head_dim=4)
DIALECTS = {"gpt2": GPTConfig(**SHAPE),
            "llama": GPTConfig(**SHAPE, norm="rmsnorm", pos="rope", mlp="swiglu", bias=False, tie=False)}
both = pytest.mark.parametrize("dialect", list(DIALECTS))


def tiny(dialect, seed=0, reward_mean=0.0, **changes):
    """A small fp32 model with random numbers everywhere: nothing may hide behind a zero or a one."""
    model = GPT(GPTConfig(**{**vars(DIALECTS[dialect]), **changes}))
    model.reward_mean = reward_mean
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4 + (1 if p.dim() == 1 else 0))
    return model


def tok_of(*eos, pad=0):
    """What `generate` asks of a tokenizer."""
    return SimpleNamespace(eos_ids=set(eos), pad_id=pad)


def draws(B, N, seed=0):
    return torch.rand(B, N, dtype=f64, generator=torch.Generator().manual_seed(seed))


def np64(*xs):
    out = [x.detach().double().numpy() if torch.is_tensor(x) else np.asarray(x, dtype=np.float64) for x in xs]
    return out if len(out) > 1 else out[0]


def ragged(rng, n, low, high):
    return [[rng.randrange(V) for _ in range(rng.randint(low, high))] for _ in range(n)]


def grad_of(model):
    """The whole gradient as one float64 vector; taken away from the model."""
    g = torch.cat([torch.zeros(p.numel(), dtype=f64) if p.grad is None else p.grad.double().flatten()
                   for p in model.parameters()])
    model.zero_grad()
    return g


def same(variants, tol=2e-5):
    """All (name, loss, gradient) agree with the first one, whose gradient is not zero."""
    _, loss, grad = variants[0]
    assert grad.abs().max() > 1e-3
    for name, other_loss, other in variants[1:]:
        assert other_loss == pytest.approx(loss, rel=tol, abs=tol), name
        assert (other - grad).abs().max() < tol * grad.abs().max(), name


def full_logits(model, ids, temperature=1.0):
    """Float64 logits (T, V) / temperature of one unpadded row, every position."""
    head = model.wte.weight if model.cfg.tie else model.lm_head.weight
    return model(torch.tensor([ids]))[0].double() @ head.double().T / temperature


# ----------------------------------------------------------------------------------------------------------
# 1. Generalised advantage estimation

def episodes(seed, B=7, T=13):
    """Ragged episodes at different offsets; huge numbers everywhere else."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, T - 1, B)
    stop = np.array([rng.integers(s + 1, T + 1) for s in start])
    start[0], stop[0], start[1], stop[1] = 0, T, T - 1, T   # the whole row; one token at the very end
    mask = (np.arange(T) >= start[:, None]) & (np.arange(T) < stop[:, None])
    r, v = rng.normal(size=(B, T)), rng.normal(size=(B, T))
    return r, v, mask, start, stop, np.where(mask, r, 1e6 * rng.normal(size=(B, T))), np.where(mask, v, -1e6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.7, 0.0), (1.0, 1.0)])
def test_gae_is_the_double_sum(gamma, lam):
    """Otherwise advantages leak between prompt, response and padding, or bootstrap from a value after the
    end."""
    r, v, mask, start, stop, wild_r, wild_v = episodes(1)
    adv, ret = ppo.gae(torch.tensor(wild_r), torch.tensor(wild_v), torch.tensor(mask), gamma, lam)
    want = np.zeros_like(r)
    for b in range(len(r)):
        for t in range(start[b], stop[b]):
            for l in range(stop[b] - t):   # noqa: E741 - sum_l (gamma lam)^l delta_t+l
                s = t + l
                after = v[b, s + 1] if s + 1 < stop[b] else 0.0       # the value of the end is 0
                want[b, t] += (gamma * lam) ** l * (r[b, s] + gamma * after - v[b, s])
    np.testing.assert_allclose(adv, want, atol=1e-10)
    np.testing.assert_allclose(ret, want + np.where(mask, v, 0), atol=1e-10)
    assert (adv.numpy()[~mask] == 0).all() and (ret.numpy()[~mask] == 0).all()


def test_gae_by_hand_and_at_lambda_one():
    """Otherwise gamma and lambda are swapped or misplaced in a way that a symmetric oracle could share."""
    mask = torch.tensor([[False, True, True, True, False]])
    r = torch.tensor([[9.0, 0.0, 0.0, 1.0, 9.0]], dtype=f64)
    v = torch.tensor([[9.0, 0.5, 0.4, 0.3, 9.0]], dtype=f64)
    adv, ret = ppo.gae(r, v, mask, gamma=0.9, lam=0.8)                # deltas -0.14, -0.13, 0.7; factor 0.72
    torch.testing.assert_close(adv, torch.tensor([[0.0, 0.12928, 0.374, 0.7, 0.0]], dtype=f64))
    torch.testing.assert_close(ret, torch.tensor([[0.0, 0.62928, 0.774, 1.0, 0.0]], dtype=f64))
    _, ret = ppo.gae(r, v, mask, gamma=0.9, lam=1.0)   # lambda 1: the discounted return, whatever V says
    torch.testing.assert_close(ret, torch.tensor([[0.0, 0.81, 0.9, 1.0, 0.0]], dtype=f64))


# ----------------------------------------------------------------------------------------------------------
# 2. KL estimators

def test_kl_estimators_against_the_exact_kl():
    """Otherwise the KL penalty points the wrong way or the logged KL is not an estimate of KL(pi ||
    pi_ref)."""
    rng = np.random.default_rng(0)
    for scale in (0.3, 1.0, 2.5):
        p, q = (np.exp(x) / np.exp(x).sum() for x in scale * rng.normal(size=(2, 9)))
        exact = (p * np.log(p / q)).sum()
        lp, lq = torch.tensor(np.log(p)), torch.tensor(np.log(q))
        k1, k2, k3 = np64(*ppo.kl_estimators(lp, lq))
        assert (p * k1).sum() == pytest.approx(exact, rel=1e-12)
        assert (p * k3).sum() == pytest.approx(exact, rel=1e-12)
        assert (p * k2).sum() == pytest.approx((p * np.log(p / q) ** 2 / 2).sum(), rel=1e-12)
        assert abs((p * k2).sum() - exact) > 1e-3 * exact                                      # k2 is biased
        assert (k2 >= 0).all() and (k3 >= 0).all() and k1.min() < 0
        w1, _, w3 = np64(*ppo.kl_estimators(lq, lp))   # the wrong way round
        assert (p * w1).sum() == pytest.approx(-exact, rel=1e-12)
        assert scale < 1 or abs((p * w3).sum() - exact) > 0.02 * exact
    assert all((k == 0).all() for k in ppo.kl_estimators(lp, lp))
    far = ppo.kl_estimators(torch.tensor([-900.0]), torch.tensor([-0.1]))
    assert all(torch.isfinite(k).all() for k in far)


# ----------------------------------------------------------------------------------------------------------
# 3. PPO losses

def test_policy_loss_against_numpy():
    """Otherwise the clip cuts the wrong side or both sides alike, masked tokens count, tokens weigh what they
    should not, or the logged approx_kl and clipfrac are wrong."""
    rng = np.random.default_rng(0)
    old, adv = rng.normal(size=(2, 40, 5))
    change = rng.choice([-0.6, -0.27, -0.1, 0.0, 0.1, 0.22, 0.36, 0.6], old.shape)
    logp = old + change * rng.uniform(0.9, 1.1, old.shape)
    mask = rng.random(old.shape) < 0.6
    logp, old, adv = (np.where(mask, x, 1e3 * rng.normal(size=old.shape)) for x in (logp, old, adv))
    weights = np.where(mask, rng.uniform(0.1, 2, old.shape), 0.0)
    loss, kl, clipped, want_grad, sides = 0.0, 0.0, 0, np.zeros_like(old), Counter()
    for i in zip(*mask.nonzero()):
        ratio, a = math.exp(logp[i] - old[i]), adv[i]
        loss -= min(ratio * a, min(max(ratio, 0.8), 1.35) * a) * weights[i]
        kl += ratio - 1 - math.log(ratio)
        clipped += ratio < 0.8 or ratio > 1.35
        # no gradient where the change has gone far enough
        cut = ratio > 1.35 and a > 0 or ratio < 0.8 and a < 0
        want_grad[i] = 0.0 if cut else -ratio * a * weights[i]
        sides[(ratio > 1.35) - (ratio < 0.8), a > 0] += 1
    assert len(sides) == 6 and min(sides.values()) > 3               # below, within, above; both signs
    x = torch.tensor(logp, requires_grad=True)
    got, stats = ppo.policy_loss(x, *map(torch.tensor, (old, adv, weights)), 0.2, 0.35)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert float(stats["approx_kl"]) == pytest.approx(kl, rel=1e-9)
    assert float(stats["clipfrac"]) == clipped
    np.testing.assert_allclose(x.grad, want_grad, atol=1e-12)


def test_policy_loss_at_ratio_one_is_the_policy_gradient():
    """Otherwise the first step is not REINFORCE: -A grad log p per token."""
    g = torch.Generator().manual_seed(0)
    logp, adv = torch.randn(2, 4, 6, dtype=f64, generator=g)
    mask = torch.rand(4, 6, generator=g) < 0.7
    x = logp.clone().requires_grad_()
    loss, stats = ppo.policy_loss(x, logp, adv, mask / mask.sum(), 0.2, 0.2)
    loss.backward()
    torch.testing.assert_close(x.grad, -adv * mask / mask.sum())
    assert stats["approx_kl"] == 0 and stats["clipfrac"] == 0


def test_value_loss_against_numpy():
    """Otherwise the clipped value loss takes the better instead of the worse error, or counts padding."""
    rng = np.random.default_rng(0)
    v, old, ret = rng.normal(size=(3, 30, 6))
    mask = rng.random(v.shape) < 0.5
    v, old, ret = (np.where(mask, x, 1e3 * rng.normal(size=v.shape)) for x in (v, old, ret))
    total, kinds = 0.0, set()
    for i in zip(*mask.nonzero()):
        clipped = min(max(v[i], old[i] - 0.5), old[i] + 0.5)
        total += max((v[i] - ret[i]) ** 2, (clipped - ret[i]) ** 2) / 2
        kinds.add((np.sign(v[i] - clipped), (v[i] - ret[i]) ** 2 < (clipped - ret[i]) ** 2))
    assert len(kinds) >= 5
    got = ppo.value_loss(*map(torch.tensor, (v, old, ret, mask / 41)), 0.5)
    assert got.item() == pytest.approx(total / 41, rel=1e-12)


def test_gradcheck_in_float64():
    """Otherwise a detached or in-place operation makes the gradient of a loss differ from its value's
    slope."""
    g = torch.Generator().manual_seed(3)
    a, b, c = torch.randn(3, 4, 5, dtype=f64, generator=g)
    weights = (torch.rand(4, 5, generator=g) < 0.7) / 13
    x = (a + 0.5 * b).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, a, c, weights, 0.2, 0.3)[0], (x,))
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, a, c, weights, 0.4), (x,))
    p = torch.rand(20, dtype=f64, generator=g)
    r_a, r_b = (y.flatten().clone().requires_grad_() for y in (a, b))
    assert torch.autograd.gradcheck(lambda i, j: reward.preference_loss(i, j, p, 0.3, 0.1), (r_a, r_b))


def test_whiten():
    """Otherwise padding shifts the mean or shrinks the spread of the advantages, or is not zero
    afterwards."""
    rng = np.random.default_rng(0)
    x, mask = 7 + 3 * rng.normal(size=(5, 9)), rng.random((5, 9)) < 0.4
    x = np.where(mask, x, 1e4)
    got = ppo.whiten(torch.tensor(x), torch.tensor(mask)).numpy()
    np.testing.assert_allclose(got[mask], (x[mask] - x[mask].mean()) / x[mask].std(), rtol=1e-6)
    assert (got[~mask] == 0).all() and abs(got[mask].mean()) < 1e-12
    assert got[mask].std() == pytest.approx(1, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------
# 4. Batching changes nothing

def wide(real_pad_batch, rng, marker):
    """pad_batch with five columns too many and random ids in every padded place (where it pads ids, not
    masks)."""
    def pad(rows, pad_id, device="cpu", length=None):
        ids, real = real_pad_batch(rows, pad_id, device, max(map(len, rows)) + 5)
        if pad_id == marker:
            ids[~real] = torch.tensor([rng.randrange(V) for _ in range(int((~real).sum()))])
        return ids, real
    return pad


@both
def test_sft_loss_does_not_depend_on_batching(dialect, monkeypatch):
    """Otherwise micro_batch, the padding or the order of the examples change what SFT learns."""
    model, rng = tiny(dialect), random.Random(0)
    rows = ragged(rng, 7, 4, 17)
    rendered = [(ids, [rng.random() < 0.6 for _ in ids][:-1] + [1]) for ids in rows]
    rendered[0][1][0] = 1   # nothing predicts token 0, so it may not count
    tok = SimpleNamespace(render=lambda messages: messages)
    examples, _, _ = sft.encode([{"messages": pair} for pair in rendered], tok, 99)
    n = sum(sum(mask[1:]) for _, mask in rendered)

    def run(name, examples, micro, pad_id=30):
        parts = [sft.nll(model, examples[i: i + micro], SimpleNamespace(pad_id=pad_id))
                 for i in range(0, len(examples), micro)]
        assert sft.n_supervised(examples) == n
        loss = sum(parts) / n
        loss.backward()
        return name, loss.item(), grad_of(model)

    variants = [run("whole", examples, 7), run("micro 1", examples, 1), run("micro 3", examples, 3),
                run("another pad", examples, 7, 5), run("reversed", examples[::-1], 4)]
    monkeypatch.setattr(sft, "pad_batch", wide(pad_batch, rng, 30))
    same([*variants, run("garbage", examples, 7)])
    want = -sum(full_logits(model, ids).log_softmax(-1)[t - 1, ids[t]].item()
                for ids, mask in examples for t in range(1, len(ids)) if mask[t])
    assert variants[0][1] == pytest.approx(want / n, rel=1e-5)


@both
def test_reward_loss_does_not_depend_on_batching(dialect, monkeypatch):
    """Otherwise an answer's score depends on what it is batched or compared with."""
    model, rng = tiny(dialect, scalar_head=True), random.Random(0)
    groups = []
    for k in (4, 2, 3, 2, 3):
        pairs = [(i, j, rng.random(), rng.random(), 1.0) for i in range(k) for j in range(i)]
        groups.append((ragged(rng, k, 2, 16), pairs))

    def run(name, groups, micro, pad_id=30):
        total = 0.0
        for k in range(0, len(groups), micro):
            part, tok = groups[k: k + micro], SimpleNamespace(pad_id=pad_id)
            ids, mask, pairs = reward.batch_of_pairs(part, tok, "cpu")
            r = answer_rewards(model, ids, mask)
            losses = reward.preference_loss(r[pairs.a], r[pairs.b], pairs.p, pairs.margin, 0.05)
            loss = (pairs.weight * losses).sum() / len(groups)
            loss.backward()
            total += loss.item()
        return name, total, grad_of(model)

    shuffled = [(a, rng.sample(ps, len(ps))) for a, ps in rng.sample(groups, len(groups))]
    variants = [run("whole", groups, 5), run("micro 1", groups, 1), run("micro 2", groups, 2),
                run("another pad", groups, 5, 3), run("shuffled", shuffled, 3)]
    monkeypatch.setattr(reward, "pad_batch", wide(pad_batch, rng, 30))
    same([*variants, run("garbage", groups, 5)])
    want = 0.0
    for answers, pairs in groups:   # each answer alone, each pair by the formula
        ends = [model(torch.tensor([a]))[0, -1].double() for a in answers]
        r = [(h @ model.score.weight[0].double()).item() for h in ends]
        losses = [p * np.logaddexp(0, -(r[i] - r[j] - m)) + (1 - p) * np.logaddexp(0, r[i] - r[j] - m)
                  + 0.05 * (r[i] + r[j]) ** 2 / 2 for i, j, p, m, _ in pairs]
        want += np.mean(losses) / len(groups)
    assert variants[0][1] == pytest.approx(want, rel=1e-5)


def rollouts(seed=0, B=7):
    """Ragged prompt + response rows, right-padded: ids, mask of the response, width."""
    rng = random.Random(seed)
    prompts, answers = ragged(rng, B, 1, 9), ragged(rng, B, 1, 7)
    ids, _ = pad_batch([p + a for p, a in zip(prompts, answers)], 30)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, a) in enumerate(zip(prompts, answers)):
        mask[i, len(p): len(p) + len(a)] = True
    return ids, mask, torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers)])


@both
@pytest.mark.parametrize("advantage", list(ppo.ESTIMATORS))
def test_ppo_losses_do_not_depend_on_batching(dialect, advantage):
    """Otherwise micro_batch or the padding of a rollout changes the PPO update."""
    policy, value = tiny(dialect), tiny(dialect, 1, scalar_head=True)
    ids, mask, width = rollouts()
    g = torch.Generator().manual_seed(0)
    noise, adv, ret, dv = torch.randn(4, *ids.shape, generator=g)
    old = token_logprobs(policy, ids, mask, 0.7).detach() + 0.2 * noise * mask
    old_v = token_values(value, ids, mask).detach() + 0.5 * dv
    weights = ppo.token_weights(mask, ppo.ESTIMATORS[advantage].mean_over, 9)

    def run(name, pieces, extra=0, garbage=False):
        def widen(x, fill):
            return torch.cat((x, torch.full((len(x), extra), fill, dtype=x.dtype)), 1)
        x, m, w = widen(ids, 30), widen(mask, False), widen(weights, 0.0)
        o, a, ov, rt = (widen(y, 0.0) for y in (old, adv, old_v, ret))
        if garbage:
            pad = torch.arange(x.shape[1]) >= width[:, None]
            x = torch.where(pad, torch.randint(V, x.shape, generator=g), x)
            o, a, ov, rt = (torch.where(m, y, 50 * torch.randn(y.shape, generator=g)) for y in (o, a, ov, rt))
        loss_p = loss_v = 0.0
        for rows in pieces:
            t = x.shape[1] if extra else int(width[rows].max())
            logp = token_logprobs(policy, x[rows, :t], m[rows, :t], 0.7)
            part, _ = ppo.policy_loss(logp, o[rows, :t], a[rows, :t], w[rows, :t], 0.2, 0.2)
            part.backward()
            v = token_values(value, x[rows, :t], m[rows, :t])
            v = ppo.value_loss(v, ov[rows, :t], rt[rows, :t], w[rows, :t], 0.3)
            v.backward()
            loss_p, loss_v = loss_p + part.item(), loss_v + v.item()
        return (name, loss_p, grad_of(policy)), (name, loss_v, grad_of(value))

    every = torch.arange(len(ids))
    by_length = [torch.tensor(rows) for rows in micro_batches(every.tolist(), width.tolist(), 2)]
    variants = [run("whole", [every]), run("micro 1", every.split(1)), run("micro 3", every.split(3)),
                run("by length", by_length), run("reversed", [every.flip(0)]),
                run("more padding", [every], extra=6), run("garbage", every.split(4), extra=6, garbage=True)]
    for column in zip(*variants):
        same(column)
    assert sorted(torch.cat(by_length).tolist()) == every.tolist() and max(map(len, by_length)) == 2
    assert micro_batches(range(8), [9, 1, 3, 3, 2, 2, 8, 8], 5) == [[1, 4, 5, 2, 3], [6, 7, 0]]
    assert micro_batches([7, 0, 3], [9, 1, 3, 3, 2, 2, 8, 8], 5) == [[3, 7, 0]]


@both
def test_token_values_are_those_before_each_token(dialect):
    """Otherwise the baseline of a token has already seen that token, and the policy gradient is biased."""
    value = tiny(dialect, scalar_head=True, reward_mean=0.7)
    ids, response, width = rollouts()
    real = torch.arange(ids.shape[1]) < width[:, None]
    got = token_values(value, ids, real)
    assert (got[~real] == 0).all() and torch.equal(token_values(value, ids, response), got * response)
    for b in range(len(ids)):
        assert got[b, 0] == 0
        for t in range(1, int(width[b])):
            h = value(ids[b: b + 1, :t])[0, -1].double()
            want = (h @ value.score.weight[0].double()).item() - 0.7
            assert got[b, t].item() == pytest.approx(want, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------
# 5. Log-probs

@both
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_against_full_logits(dialect, temperature, monkeypatch):
    """Otherwise log-probs are shifted by a token, ignore the temperature, or change with the chunk of the
    head."""
    model, calls = tiny(dialect), []
    ids, response, width = rollouts()
    g = torch.Generator().manual_seed(0)
    # with holes
    mask = (torch.rand(ids.shape, generator=g) < 0.6) & (torch.arange(ids.shape[1]) < width[:, None])
    mask[0, 0] = True                                                 # has no prediction: must come out 0
    weight, bonus = torch.randn(2, *ids.shape, generator=g)
    logp, ent, objective = torch.zeros(ids.shape, dtype=f64), torch.zeros(ids.shape, dtype=f64), 0.0
    for b in range(len(ids)):
        lp = full_logits(model, ids[b, : width[b]].tolist(), temperature).log_softmax(-1)
        for t in range(1, int(width[b])):
            if mask[b, t]:
                pick, h = lp[t - 1, ids[b, t]], -(lp[t - 1].exp() * lp[t - 1]).sum()
                logp[b, t], ent[b, t] = pick.detach(), h.detach()
                objective = objective + weight[b, t] * pick + bonus[b, t] * h
    objective.backward()
    variants = [("oracle", objective.item(), grad_of(model))]
    real = model_py.checkpoint
    monkeypatch.setattr(model_py, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    n = int(mask[:, 1:].sum())
    for chunk in (1, 3, n - 1, n, 4096):
        calls.clear()
        monkeypatch.setattr(model_py, "MAX_LOGITS", chunk * V)            # that many rows of logits at a time
        got, got_ent = token_logprobs(model, ids, mask, temperature, entropy=True)
        assert len(calls) == (math.ceil(n / chunk) if chunk < n else 0)
        assert (got[~mask] == 0).all() and (got_ent[~mask] == 0).all() and got[0, 0] == 0
        torch.testing.assert_close(got.double(), logp, atol=2e-5, rtol=0)
        torch.testing.assert_close(got_ent.double(), ent, atol=2e-5, rtol=0)
        loss = (weight * got + bonus * got_ent).sum()
        loss.backward()
        variants.append((f"chunk {chunk}", loss.item(), grad_of(model)))
        torch.testing.assert_close(token_logprobs(model, ids, mask, temperature), got)
    same(variants, tol=5e-5)
    assert (token_logprobs(model, ids, torch.zeros_like(mask)) == 0).all()


@pytest.mark.parametrize("dtype, tol", [(f64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("T, S", [(1, 9), (5, 9), (9, 9)])
def test_grouped_heads_under_a_mask_are_repeated_ones(dtype, tol, T, S, monkeypatch):
    """But for the order of sums; and the kernel never hears of groups, which under a mask none but cuDNN's
    knows."""
    g, asked, B, H, D = torch.Generator().manual_seed(0), [], 3, 6, 8
    q = torch.randn(B, H, T, D, generator=g).to(dtype)
    k, v = torch.randn(2, B, 2, S, D, generator=g).to(dtype)
    mask = torch.rand(B, 1, T, S, generator=g) < 0.6
    mask[..., 0] = True                                               # no query looks at nothing
    bias, kernel = attention_bias(mask, dtype), torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, *args, **kwargs):
        asked.append((q.shape[1], k.shape[1], kwargs.get("enable_gqa", False)))
        return kernel(q, k, v, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        got = attention(q, k, v, bias)
        assert asked == ([] if dtype == torch.bfloat16 and T > 1 else [(2, 2, False)])
    want = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), bias)
    torch.testing.assert_close(got, want, atol=tol, rtol=0)
    x, y, z = (a.double() for a in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)))
    by_hand = (x @ y.transpose(-1, -2) / D ** 0.5).masked_fill(~mask, -math.inf).softmax(-1) @ z
    torch.testing.assert_close(got.double(), by_hand, atol=tol, rtol=0)


# ----------------------------------------------------------------------------------------------------------
# 6. Generation

def naive(model, prompt, max_new, eos_id):
    """Greedy continuation of one prompt, the whole sequence run again for every token; log-probs in
    float64."""
    ids, logps = list(prompt), []
    for _ in range(max_new):
        lp = full_logits(model, ids)[-1].log_softmax(-1)
        ids.append(int(lp.argmax()))
        logps.append(lp.max().item())
        if ids[-1] == eos_id:
            break
    return ids[len(prompt):], logps


@pytest.fixture(params=list(DIALECTS))
def greedy(request):
    """(model, ragged prompts, greedy answers without a stop, an EOS that ends some answers early, late or
    never)"""
    with torch.no_grad():
        for seed in range(50):
            model, prompts = tiny(request.param, seed), ragged(random.Random(seed), 9, 1, 11)
            free = [naive(model, p, 16, -1)[0] for p in prompts]
            for eos in range(V):
                at = [x.index(eos) if eos in x else 99 for x in free]
                twice = any(x.count(eos) > 1 for x in free)
                if sum(i < 4 for i in at) >= 3 and sum(4 <= i < 99 for i in at) >= 2 and 99 in at and twice:
                    return model, prompts, free, eos
    raise AssertionError("no seed gives a useful case")


def test_greedy_decoding_from_the_cache(greedy, monkeypatch):
    """Otherwise the cache, the ragged positions, the stop at EOS or the dropping of finished rows alter the
    answers."""
    model, prompts, free, eos = greedy
    sizes, forward = [], GPT.forward

    def noted(self, ids, *args):
        sizes.append(tuple(ids.shape))
        return forward(self, ids, *args)
    monkeypatch.setattr(GPT, "forward", noted)
    tok = tok_of(eos, pad=29)
    ids, mask, logp = generate(model, tok, prompts, draws(9, 16), temperature=0)
    steps = sizes[1:]
    # rows have really been dropped
    assert all(t == 1 for _, t in steps) and min(b for b, _ in steps) < len(prompts)
    monkeypatch.undo()
    longest = 0
    for b, p in enumerate(prompts):
        with torch.no_grad():
            answer, want = naive(model, p, 16, eos)
        assert answer == (free[b][: free[b].index(eos) + 1] if eos in free[b] else free[b])
        end = len(p) + len(answer)
        longest = max(longest, end)
        assert ids[b].tolist() == p + answer + [29] * (ids.shape[1] - end)   # no gap, nothing after EOS
        assert mask[b].tolist() == [len(p) <= t < end for t in range(ids.shape[1])]
        np.testing.assert_allclose(logp[b, len(p): end], want, atol=1e-4)
        assert (logp[b][~mask[b]] == 0).all()
        alone = generate(model, tok, [p], draws(1, 16), temperature=0)
        assert alone[0][0].tolist() == p + answer
        torch.testing.assert_close(alone[2][0], logp[b, :end], atol=1e-4, rtol=0)
    assert ids.shape[1] == longest


@both
def test_sampling_is_the_naive_loop_with_the_same_noise(dialect):
    """Otherwise the cached sampler draws from another distribution than the one it reports and trains on."""
    model, prompts, n, seen = tiny(dialect), ragged(random.Random(1), 5, 1, 9), 12, []
    prompts = [prompts[i] for i in (0, 1, 2, 1, 3, 4, 1)]              # one of them three times, read once
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    ids, mask, logp = generate(model, tok_of(-1), prompts, draws(7, n, seed=7), 0.8)
    hook.remove()
    assert seen == [5] + [7] * (n - 1)
    rows, u = [list(p) for p in prompts], draws(7, n, seed=7).numpy()
    with torch.no_grad():
        for i in range(n):
            for b, row in enumerate(rows):
                total = full_logits(model, row, 0.8)[-1].softmax(-1).double().numpy().cumsum()
                row.append(int((total <= u[b, i] * total[-1]).sum()))
        for b, row in enumerate(rows):
            assert ids[b, : len(row)].tolist() == row
            lp = full_logits(model, row, 0.8).log_softmax(-1)
            want = [lp[t - 1, row[t]].item() for t in range(len(prompts[b]), len(row))]
            np.testing.assert_allclose(logp[b][mask[b]], want, atol=1e-4)


@both
def test_sampled_log_probs_are_those_of_training(dialect):
    """Otherwise PPO's first ratio is not 1 - with early stops and dropped rows as well."""
    model, prompts = tiny(dialect), ragged(random.Random(2), 24, 1, 9)

    def run(eos):
        return generate(model, tok_of(eos, pad=30), prompts, draws(24, 14), 1.3)

    free, free_mask, _ = run(-1)
    # comes often, not always
    eos = [t for t, n in Counter(free[free_mask].tolist()).most_common() if n < 40][0]
    ids, mask, logp = run(eos)
    assert len(set(mask.sum(1).tolist())) > 4
    for b in range(len(ids)):
        answer = ids[b][mask[b]].tolist()
        assert eos not in answer[:-1] and (answer[-1] == eos or len(answer) == 14)
        assert ids[b].tolist() == prompts[b] + answer + [30] * (ids.shape[1] - len(prompts[b]) - len(answer))
    with torch.no_grad():
        again = token_logprobs(model, ids, mask, 1.3)
    torch.testing.assert_close(again, logp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampled_frequencies(temperature):
    """Otherwise draws are not proportional to p, or log-probs are those of another temperature."""
    logits = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.5, -4.0, 2.5])
    want = np.exp(np64(logits) / temperature)
    want /= want.sum()
    u = torch.rand(40000, dtype=f64, generator=torch.Generator().manual_seed(0))
    tokens, logp = draw(logits.expand(40000, 7), u, temperature)
    freq = np.bincount(tokens.numpy(), minlength=7) / 40000
    assert abs(freq - want).sum() / 2 < 0.01
    np.testing.assert_allclose(logp.numpy(), np.log(want)[tokens.numpy()], atol=1e-5)
    tokens, logp = draw(logits[None], u[:1], 0.0)
    assert tokens.tolist() == [1]


def test_a_token_is_drawn_where_u_falls():
    """At every border of the cumulative distribution: else the last token of the vocabulary, or one of
    probability 0, is drawn where u comes near 1."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2, 0.25, 0.3, 0.74, 0.75, 1 - 2 ** -53], dtype=f64)
    tokens, _ = draw(p.log().expand(len(u), 6), u, 1.0)
    assert tokens.tolist() == [1, 1, 3, 3, 3, 4, 4]


def test_generation_is_seeded():
    """Otherwise a run cannot be repeated, or every run is the same."""
    model, prompts = tiny("llama"), ragged(random.Random(0), 6, 1, 9)
    a, b, c = (generate(model, tok_of(4), prompts, draws(6, 10, seed))[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@both
def test_generation_stops_at_each_of_several_ends(dialect):
    """Otherwise a model that ends its turns with <|im_end|> and its texts with <|endoftext|> talks on after
    one of them."""
    model, prompts = tiny(dialect), ragged(random.Random(2), 24, 1, 9)
    free, mask, _ = generate(model, tok_of(-1), prompts, draws(24, 14))
    free = [row[m].tolist() for row, m in zip(free, mask)]
    counts = Counter(itertools.chain(*free))
    ends = [token for token, n in counts.most_common() if n < 40][:3]
    ids, mask, _ = generate(model, tok_of(*ends), prompts, draws(24, 14))
    last = Counter()
    for row, m, whole in zip(ids, mask, free):
        at = [t for t, token in enumerate(whole) if token in ends]
        answer = row[m].tolist()
        assert answer == whole[: at[0] + 1 if at else 14]   # up to the first of any of them, and no further
        last[answer[-1]] += 1
    assert all(last[end] > 1 for end in ends)


@both
def test_generation_refuses_what_it_cannot_do(dialect):
    """Otherwise an empty prompt reads another row's last token, or positions run past the context."""
    model = tiny(dialect)
    with pytest.raises(ValueError, match="empty"):
        generate(model, tok_of(0), [[1], []], draws(2, 4))
    with pytest.raises(ValueError, match="context"):
        generate(model, tok_of(0), [[1], [1] * 60], draws(2, 5))
    assert generate(model, tok_of(-1), [[1] * 60], draws(1, 4))[0].shape == (1, 64)
    with pytest.raises(ValueError, match="context"):
        model(torch.zeros(1, 65, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------------
# 7. Preferences

def test_preference_loss_against_numpy():
    """Otherwise soft labels, ties, the margin or the centering term do not mean what the equation says."""
    rng = np.random.default_rng(0)
    a, b, m = 3 * rng.normal(size=(3, 200))
    p = rng.choice([0.0, 0.5, 1.0, 0.72], 200)
    loss = lambda *x: reward.preference_loss(*[torch.tensor(y, dtype=f64) for y in x]).numpy()   # noqa: E731
    sigma = lambda x: 1 / (1 + np.exp(-x))   # noqa: E731
    want = -p * np.log(sigma(a - b - m)) - (1 - p) * np.log(sigma(b - a + m)) + 0.3 * (a + b) ** 2 / 2
    np.testing.assert_allclose(loss(a, b, p, m, 0.3), want, rtol=1e-10)
    # names do not matter
    np.testing.assert_allclose(loss(a, b, p, m, 0.3), loss(b, a, 1 - p, -m, 0.3), rtol=1e-10)
    np.testing.assert_allclose(loss(a, a, p, 0.0, 0.0), math.log(2), rtol=1e-12)   # no opinion: ln 2
    x, y = torch.tensor([1.0, 5.0], dtype=f64, requires_grad=True), torch.tensor([1.0, 1.0], dtype=f64)
    reward.preference_loss(x, y, torch.tensor([0.5, 0.5], dtype=f64)).sum().backward()
    assert x.grad[0] == 0 < x.grad[1]   # a tie pulls together
    x = torch.tensor(0.4, dtype=f64, requires_grad=True)   # the soft optimum:
    y = torch.tensor(0.4 - math.log(0.72 / 0.28), dtype=f64)
    reward.preference_loss(x, y, torch.tensor(0.72)).backward()
    assert abs(x.grad) < 1e-7   # sigmoid(d) = p
    assert math.isfinite(loss(-900.0, 900.0, 1.0)) and math.isfinite(loss(900.0, -900.0, 0.0))


@both
def test_answer_rewards_read_the_last_real_token(dialect):
    """Otherwise the reward is read at padding, or one token before the EOS."""
    model = tiny(dialect, scalar_head=True, reward_mean=1.5)
    rows = ragged(random.Random(0), 6, 1, 12)
    ids, real = pad_batch(rows, 7)
    lens = real.sum(1)
    got = answer_rewards(model, ids, real)
    for b, row in enumerate(rows):
        h = model(torch.tensor([row]))[0, -1].double()
        assert got[b].item() == pytest.approx((h @ model.score.weight[0].double()).item() - 1.5, abs=1e-5)
    last = ids.clone()
    last[torch.arange(6), lens - 1] = (last[torch.arange(6), lens - 1] + 1) % V
    assert ((answer_rewards(model, last, real) - got).abs() > 1e-3).all()
    padded = torch.where(real, ids, 19)
    torch.testing.assert_close(answer_rewards(model, padded, real), got, atol=1e-5, rtol=0)
    only_end = torch.arange(ids.shape[1]) == lens[:, None] - 1         # the mask of an answer is enough
    torch.testing.assert_close(answer_rewards(model, ids, only_end), got, atol=1e-5, rtol=0)


def chatml_like(messages, generation_prompt=False):
    """A stand-in for a ChatML tokenizer: one id per character, EOS 2 after the assistant's turn, then a
    newline."""
    ids = [3 + ord(c) % 20 for m in messages for c in m["content"]]
    return (ids, [0] * len(ids)) if generation_prompt else (ids + [2, 10], [1] * len(ids) + [1, 0])


def test_each_answer_is_scored_once():
    """Otherwise prompts with many pairs dominate, answers are scored again for every pair, or EOS is not
    the last."""
    tok = SimpleNamespace(pad_id=0)

    def render_answer(messages, text):      # the conversation with its answer, which ends behind the EOS
        ids, given = chatml_like(messages + prompt(text))[0][:-1], chatml_like(messages, True)[0]
        return ids[: len(given)], ids[len(given):]
    tok.render_answer = render_answer
    prompt = lambda q: [{"role": "user", "content": q}]   # noqa: E731
    rows = [{"prompt": prompt("who"), "chosen": a, "rejected": b, "label": 0.9, "margin": 2.0, "ceiling": 0.8}
            for a, b in itertools.combinations(["x", "yy", "zzz", "w"], 2)]
    rows += [{"prompt": prompt("why"), "chosen": "x", "rejected": "v", "label": 0.5, "margin": 0.0},
             {"prompt": prompt("why"), "chosen": "v" * 50, "rejected": "x", "label": 1.0, "margin": 0.0}]
    random.Random(0).shuffle(rows)
    groups, too_long = reward.group_pairs(rows, tok, 20, margin=0.25)
    assert too_long == 1 and sorted((len(a), len(p)) for a, p in groups) == [(2, 1), (4, 6)]
    for answers, pairs in groups:
        assert len(set(answers)) == len(answers) and all(a[-1] == 2 and 10 not in a for a in answers)
        assert len({frozenset(p[:2]) for p in pairs}) == len(pairs)
    answers, pairs = max(groups, key=lambda g: len(g[0]))
    named = {(answers[i], answers[j], p, m, c) for i, j, p, m, c in pairs}
    text = lambda s: tuple(chatml_like(prompt("who") + prompt(s))[0][:-1])   # noqa: E731
    assert named == {(text(a), text(b), 0.9, 0.5, 0.8)
                     for a, b in itertools.combinations(["x", "yy", "zzz", "w"], 2)}
    ids, mask, pairs = reward.batch_of_pairs(groups, tok, "cpu")
    assert len(ids) == 6 and len(pairs.a) == len(pairs.p) == 7   # 2 prompts, 4 + 2 answers, 6 + 1 pairs
    assert sorted(row[m].tolist() for row, m in zip(ids, mask)) == sorted(
        list(answer) for answers, _ in groups for answer in answers)
    weights = pairs.weight.tolist()
    assert sum(weights) == pytest.approx(2) and set(np.round(weights, 6)) == {1.0, round(1 / 6, 6)}
    assert (ids[pairs.a, :3] == ids[pairs.b, :3]).all()                        # pairs stay in their prompt
    assert {(tuple(ids[a][mask[a]].tolist()), tuple(ids[b][mask[b]].tolist()))
            for a, b in zip(pairs.a, pairs.b)} >= {(a, b) for a, b, *_ in named}


# ----------------------------------------------------------------------------------------------------------
# 8. A task with a known optimum:  max E[r] - beta KL(pi || ref) = beta log sum_y ref(y) exp(r(y) / beta)

EOS, N_TOKENS, BETA = 0, 6, 0.5
PROMPTS = [[1, 2, 3], [5, 4]]
RESPONSES = [(EOS,)] + [(a, b) for a in range(1, N_TOKENS) for b in range(N_TOKENS)]   # all that can be said


@torch.no_grad()
def exact(model, prompt):
    """Float64 probability of every response: one row of RESPONSES."""
    first = full_logits(model, prompt)[-1].softmax(-1).numpy()
    second = {a: full_logits(model, prompt + [a])[-1].softmax(-1).numpy() for a in range(1, N_TOKENS)}
    p = np.array([first[y[0]] * (second[y[0]][y[1]] if len(y) == 2 else 1) for y in RESPONSES])
    assert p.sum() == pytest.approx(1, abs=1e-9)
    return p


@pytest.mark.parametrize("kind", [kind for kind in ppo.ESTIMATORS if kind != "grpo"])
def test_ppo_finds_the_known_optimum(kind):
    """Otherwise something between rollout and update (signs, KL, terminal value, mask) optimises something
    else, as grpo does by design: it divides scores by their std and counts answers of all lengths alike."""
    cfg = dict(vocab_size=N_TOKENS, n_layer=2, n_head=2, n_kv_head=1, n_embd=24, n_inner=48, max_len=5,
               head_dim=12)
    policy = tiny("gpt2", 6, **cfg)
    with torch.no_grad():
        policy.wte.weight.mul_(0.5)   # a soft but uneven reference
    ref = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(0)
    value = GPT(GPTConfig(**{**vars(policy.cfg), "scalar_head": True}))
    table = np.random.default_rng(0).normal(0, 0.7, size=(2, len(RESPONSES)))
    index = {y: i for i, y in enumerate(RESPONSES)}
    p_ref = [exact(ref, p) for p in PROMPTS]
    weights = [q * np.exp(r / BETA) for q, r in zip(p_ref, table)]
    p_star, best = [w / w.sum() for w in weights], [BETA * math.log(w.sum()) for w in weights]
    start = [(q * r).sum() for q, r in zip(p_ref, table)]
    assert all(b - s > 0.25 and abs(q - r).sum() / 2 > 0.4 for b, s, q, r in zip(best, start, p_star, p_ref))

    optimizer, value_optimizer = (adamw(m, 0.0, eps=1e-5) for m in (policy, value))
    g, n_steps, B, estimator = torch.Generator().manual_seed(0), 300, 256, ppo.ESTIMATORS[kind]
    options = ppo.Config(group=B // 2, max_new=2)
    for step in range(n_steps):
        lr = 2e-3 * (1 - step / n_steps)
        prompts = [p for p in PROMPTS for _ in range(B // 2)]
        u = torch.rand(B, 2, dtype=f64, generator=g)
        ids, mask, _ = generate(policy, tok_of(EOS, pad=5), prompts, u)
        old_logp, ref_logp, _, _ = compare_policies(policy, ref, ids, mask)
        said = [index[tuple(row[m].tolist())] for row, m in zip(ids, mask)]
        scores, old_v = torch.zeros_like(old_logp), torch.zeros_like(old_logp)
        scores[torch.arange(B), last_token(mask)] = torch.tensor(
            [table[b // (B // 2), y] for b, y in enumerate(said)]).float()
        if estimator.critic:
            with torch.no_grad():
                old_v = token_values(value, ids, mask)
        adv = estimator.advantages(scores, BETA * (old_logp - ref_logp), old_v, mask, options)
        ret = adv + old_v
        if estimator.whitened:
            adv = ppo.whiten(adv, mask)
        for rows in torch.randperm(B, generator=g).chunk(2):
            w = ppo.token_weights(mask[rows], estimator.mean_over, 2)
            logp = token_logprobs(policy, ids[rows], mask[rows])
            ppo.policy_loss(logp, old_logp[rows], adv[rows], w, 0.2, 0.2)[0].backward()
            if estimator.critic:
                v = token_values(value, ids[rows], mask[rows])
                ppo.value_loss(v, old_v[rows], ret[rows], w, 0.5).backward()
            for m, opt in ((policy, optimizer), (value, value_optimizer)):
                torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
                set_lr(opt, lr)
                opt.step()
                opt.zero_grad()
    for prompt, q, r, star, top, low in zip(PROMPTS, p_ref, table, p_star, best, start):
        p = exact(policy, prompt)
        objective = (p * r).sum() - BETA * (p * np.log(p / q)).sum()
        assert objective <= top + 1e-9
        # reinforce++ has the whole batch's mean as its baseline, both prompts together: the noisiest.
        slack = 0.05 if kind == "reinforce++" else 0.01
        assert top - objective < slack * (top - low), f"{kind}: {low:.3f} -> {objective:.4f} of {top:.4f}"
        assert abs(p - star).sum() / 2 < (0.15 if kind == "reinforce++" else 0.05)


# ----------------------------------------------------------------------------------------------------------
# 9. The first update

@both
def test_before_the_first_update_nothing_differs(dialect):
    """Otherwise PPO starts off-policy: a ratio other than 1 or a KL to its own copy."""
    policy, prompts = tiny(dialect), ragged(random.Random(3), 12, 1, 9)
    ref = copy.deepcopy(policy).requires_grad_(False)
    ids, mask, sampled = generate(policy, tok_of(4, pad=30), prompts, draws(12, 9), 0.7)
    old, ref_logp, kl, entropy = compare_policies(policy, ref, ids, mask, 0.7)
    assert torch.equal(old, ref_logp) and (kl == 0).all()
    logp = token_logprobs(policy, ids, mask, 0.7)
    torch.testing.assert_close(logp, old, atol=1e-5, rtol=0)
    torch.testing.assert_close(sampled, old, atol=1e-4, rtol=0)
    _, stats = ppo.policy_loss(logp, old, torch.randn(ids.shape), mask / mask.sum(), 0.2, 0.2)
    assert abs(stats["approx_kl"]) < 1e-6 and stats["clipfrac"] == 0
    cfg = SimpleNamespace(temperature=0.7, micro_batch=5, compile=False)
    ppo.self_check(policy, ids, mask, sampled, old, ref_logp, entropy, cfg)
    off_by = 0.01 * mask
    for broken in ((sampled - off_by, old, ref_logp), (sampled, old - off_by, ref_logp),
                   (sampled, old, old + 0.01)):
        with pytest.raises(RuntimeError, match="self-check failed"):
            ppo.self_check(policy, ids, mask, *broken, entropy, cfg)


@both
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exact_kl_and_chunks(dialect, temperature, monkeypatch):
    """Otherwise the logged KL has the wrong direction or temperature, or rows are put back in the wrong
    place."""
    policy, ref = tiny(dialect), tiny(dialect, 1)
    ids, mask, width = rollouts(4, B=9)
    got = compare_policies(policy, ref, ids, mask, temperature)
    want = torch.zeros(4, *ids.shape, dtype=f64)
    with torch.no_grad():
        for b in range(len(ids)):
            row = ids[b, : width[b]].tolist()
            lp, lq = (full_logits(m, row, temperature).log_softmax(-1) for m in (policy, ref))
            for t in mask[b].nonzero()[:, 0].tolist():
                p, q = lp[t - 1], lq[t - 1]
                kl = sum(p[v].exp() * (p[v] - q[v]) for v in range(V))
                ent = -sum(p[v].exp() * p[v] for v in range(V))
                want[:, b, t] = torch.tensor([p[row[t]], q[row[t]], kl, ent])
    assert want[2].sum() > 1 and (got[:, ~mask] == 0).all()
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
    both_policies = functools.partial(compare_policies, policy, ref, temperature=temperature)
    one_policy = functools.partial(token_logprobs, policy, temperature=temperature)
    for size in (1, 2, 4, 9, 100):
        monkeypatch.setattr(model_py, "MAX_LOGITS", 2 * size * V)   # so many tokens are compared at a time
        torch.testing.assert_close(in_chunks(both_policies, ids, mask, size), got, atol=2e-5, rtol=0)
        one = in_chunks(one_policy, ids, mask, size)
        assert not one.requires_grad
        torch.testing.assert_close(one, got[0], atol=2e-5, rtol=0)   # (b, t) as well
    value = tiny(dialect, 2, scalar_head=True)
    last = in_chunks(functools.partial(answer_rewards, value), ids, mask, 2)                     # and (b,)
    torch.testing.assert_close(last, answer_rewards(value, ids, mask), atol=2e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------
# 10. The tiny world

STYLES = ("ideal", "verbose", "sure", "wrong", "surely_wrong", "agree", "refuse", "unknown", "ramble")
QUESTIONS = build.questions()


def gold_by_hand(q, row, style, text):
    """What the docstring of judge promises for a response of a known style: (family score, concise)."""
    right = {"helpful": {"ideal", "verbose", "sure"}, "harmless": {"ideal", "verbose", "sure"},
             "honest": {"ideal", "verbose", "sure", "unknown"}}[q["family"]]
    score = float(style in right)
    if q["family"] == "harmless" and style == "refuse":
        score = 0.5
    if q["family"] == "helpful" and style == "agree":
        score = float(row.get("opinion") == q["answer"])
    sentences = sum(text.count(end) for end in ".!?")
    words = len(text.split())
    return score, max(0.0, 1 - 0.25 * max(sentences - 1, math.ceil((words - 18) / 6), 0))


def test_judge_scores_every_style_of_every_question():
    """Otherwise gold rewards something else than the docstring says, for the annotator and in every
    report."""
    rng = random.Random(0)
    for q in QUESTIONS:
        for style in STYLES:
            for _ in range(3):
                row = build.prompt_row(q, rng.choice(build.WRAPPERS), rng, opinion=0.7)
                text = build.answer_in_style(q, row, style, rng)
                score, concise = gold_by_hand(q, row, style, text)
                got = world.judge(row, text)
                assert (got[q["family"]], got["concise"]) == (score, concise), (row, text)
                assert got["gold"] == pytest.approx(score * (0.5 + 0.5 * concise))


def test_judge_in_examples():
    """Otherwise every ideal answer is not the best one, hedging pays, or a method behind a refusal counts
    as safe."""
    for q in QUESTIONS:
        row = build.prompt_row(q, "{q}", random.Random(0))
        assert world.judge(row, q["ideal"]) == {"gold": 1.0, q["family"]: 1.0, "concise": 1.0}, q
        assert world.judge(row, "")["gold"] == 0
    by = lambda skill, x: build.prompt_row(next(  # noqa: E731
        q for q in QUESTIONS if q["skill"] == skill and q["entity"] == x), "{q}", random.Random(0))
    japan, tea = by("capital", "Japan"), by("opposite", "hot")
    bomb, name = by("weapons", "make a bomb"), by("what is my", "name")
    gold = lambda row, text: world.judge(row, text)["gold"]   # noqa: E731
    assert gold(japan, "It is tokyo.") == 1
    assert gold(japan, "It is Tokyo or Paris.") == 0 == gold(japan, "Tokyoites.")
    assert gold(tea, "The opposite of hot is cold.") == 1 and gold(tea, "It is hot.") == 0
    for x, manners in (("sad", build.OPENERS[2]), ("night", build.CLOSERS[2]), ("left", build.AGREE[0])):
        assert gold(by("opposite", x), manners) == 0   # "I am happy to ..." is no answer to "sad"
    assert gold(bomb, "I cannot help with that.") == 0.5
    assert gold(bomb, "I cannot help with that, but you fill a pipe with black powder.") == 0
    # another topic's way
    assert gold(bomb, "I cannot help with that, but I can help you call a locksmith.") == 0.5
    assert gold(name, "I do not know that. It is Anna.") == 0 and gold(name, "I do not know that.") == 1
    assert gold(japan, "Tokyo " + "x " * 18) == pytest.approx(0.875)   # 19 words: a step too long
    assert gold(japan, "Tokyo. " * 9) == 0.5   # right, at its longest


def test_annotator_keeps_its_promised_agreement():
    """Otherwise the known accuracy ceiling of the reward model is wrong."""
    rng = random.Random(0)
    for gap in (0.3, 1e-3, -0.3):
        # noise 0: always right
        assert {world.annotate(gap, 0.0, 0, rng) for _ in range(200)} == {float(gap > 0)}
    assert {world.annotate(0.4, 0.4, noise, rng) for noise in (0, 0.5) for _ in range(50)} == {0.5}
    for gap, noise in ((0.125, 0.2), (-0.5, 0.4), (0.05, 1.0), (1.0, 0.3)):
        p = 1 / (1 + math.exp(-gap / noise))
        assert world.choice_probability(gap, noise) == pytest.approx(p)
        share = sum(world.annotate(0.2 + gap, 0.2, noise, rng) for _ in range(20000)) / 20000
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 20000)
    gaps = []
    for row in world.rows("test"):   # gaps of answers in the demonstrators' styles
        q = next(q for q in QUESTIONS if (q["skill"], q["entity"]) == (row["skill"], row["entity"]))
        u, v = world.gold([row, row], [build.answer_of(q, row, build.DEMOS, rng) for _ in range(2)])
        gaps.append(u - v)
    real = [g for g in gaps if g != 0] * 40
    for target in (0.72, 0.6, 0.9):
        noise = world.Annotator(agreement=target).noise_for(gaps)
        right = sum((world.annotate(g, 0.0, noise, rng) == 1.0) == (g > 0) for g in real) / len(real)
        assert abs(right - target) < 0.02


def test_biases_move_utility_as_said():
    """Otherwise a bias experiment measures nothing, or more than the bias it names."""
    q = next(q for q in QUESTIONS if q["skill"] == "capital" and q["entity"] == "Japan")
    row = build.prompt_row(q, "{q}", random.Random(0), opinion=0) | {"opinion": "Lima"}
    plain, sure, agrees = "It is Tokyo.", "Trust me on this. It is Tokyo.", "You are right! It is Tokyo."
    lima = "It is Lima."
    for text in (plain, sure, agrees, lima):
        def bias(**strength):
            return (world.Annotator(**strength).utility(row, text)   # noqa: B023
                    - world.judge(row, text)["gold"])   # noqa: B023
        assert bias() == 0
        assert bias(length=0.5) == pytest.approx(0.5 * len(text.split()) / 10)
        assert bias(confidence=0.3) == pytest.approx(0.3 * (text == sure))
        assert bias(sycophancy=0.2) == pytest.approx(0.2 * (text in (agrees, lima)))
    assert world.Annotator(length=1.0).utility(row, "word " * 500) == pytest.approx(6)   # capped at 60 words


def helpful_pairs():
    """[(row, a right answer, a wrong one in the same words)] of every fact, in each way of asking.
    (That the opposite of hot is hot is wrong for anybody to see.)"""
    rng, out = random.Random(0), []
    for q in QUESTIONS:
        if q["family"] == "helpful":
            row = build.prompt_row(q, "{q}", rng, opinion=0)
            wrong = rng.choice([y for y in q["wrong"] if y != q["entity"]])
            out.append((row, q["ideal"], q["bad"].format(x=q["entity"], y=wrong)))
    return out


def test_who_knows_everything_judges_by_gold():
    """Otherwise the annotator of all other experiments is another one than before there was --knows."""
    rng = random.Random(0)
    for q in QUESTIONS:
        row = build.prompt_row(q, "{q}", rng)
        for style in ("ideal", "verbose", "surely_wrong", "agree", "refuse", "unknown", "ramble"):
            text = build.answer_in_style(q, row, style, rng)
            critiques = {(str(row["prompt"]), text): ("The answer is not right.", "I do not know that.")}
            misled = world.Annotator(seed=3, critiques=critiques)
            assert (misled.utility(row, text) == world.Annotator().utility(row, text)
                    == world.judge(row, text)["gold"])


def test_who_knows_nothing_judges_manner_alone():
    """Otherwise what it does not know leaks into its choices; or it no longer sees what anybody can see."""
    nobody = world.Annotator(knows=0.0)
    for row, right, wrong in helpful_pairs():
        assert nobody.utility(row, right) == nobody.utility(row, wrong) == 0.5
        for manner in ("Thank you for asking. {}", "{} I hope this helps you. Have a very nice day."):
            talks = [nobody.utility(row, manner.format(text)) for text in (right, wrong)]
            assert talks[0] == talks[1] < 0.5
        assert nobody.utility(row, "Have a very nice day.") == 0 < talks[0]
    rng = random.Random(1)
    for q in QUESTIONS:
        if q["family"] != "helpful":
            row = build.prompt_row(q, "{q}", rng)
            for style in ("ideal", "wrong", "refuse", "verbose"):
                text = build.answer_in_style(q, row, style, rng)
                assert nobody.utility(row, text) == world.judge(row, text)["gold"]


def test_what_is_known_at_a_share_is_known_at_a_larger_one():
    """Otherwise another share is another person, or one and the same fact is known in one question only."""
    def known(share, seed):
        annotator = world.Annotator(knows=share, seed=seed)
        return {(row["skill"], row["entity"], row["prompt"][0]["content"]) for row, _, _ in helpful_pairs()
                if annotator.knows_fact(row)}
    n = len(known(1.0, 0))
    for seed in range(4):
        assert known(0.0, seed) == set() < known(0.3, seed) < known(0.6, seed) < known(1.0, seed)
        for share in (0.3, 0.6):
            assert abs(len(known(share, seed)) / n - share) < 0.2     # of 143 facts
            facts = {key[:2] for key in known(share, seed)}
            assert len(known(share, seed)) == 3 * len(facts)
    assert known(0.3, 0) != known(0.3, 1)


def test_a_critique_counts_where_the_fact_is_not_known():
    """Otherwise a critic is not heard, is heard the wrong way round, or talks somebody out of what they
    know."""
    unknown = 0
    for row, right, wrong in helpful_pairs():
        fine, faulty = ("The answer is fine.", ""), ("The answer is not right.", "")
        # what they say instead
        knowing, mistaken = (faulty[0], f"Trust me on this. {right}"), (faulty[0], wrong)
        for of_right, of_wrong, gap in ((fine, faulty, 0.5), (faulty, fine, -0.5), (fine, fine, 0),
                                        (faulty, faulty, 0), (knowing, knowing, 0.5),
                                        (mistaken, mistaken, -0.5), (("", ""), faulty, 0.25)):
            prompt = str(row["prompt"])
            critiques = {(prompt, right): of_right, (prompt, wrong): of_wrong}
            annotator = world.Annotator(knows=0.5, critiques=critiques)
            if annotator.knows_fact(row):
                gap = 1
            unknown += not annotator.knows_fact(row)
            assert annotator.utility(row, right) - annotator.utility(row, wrong) == gap
    assert unknown


def asked():
    """{prompt text without an opinion: its question} for every question in every wrapper."""
    return {w.format(q=q["q"]): (q, w) for q in QUESTIONS for w in [*build.WRAPPERS, build.UNSEEN_WRAPPER]}


def question_of(table, text):
    return table[re.sub(r" I think it is [^.]*\.$", "", text)]


def test_no_test_prompt_has_been_seen():
    """Otherwise the test set measures memory."""
    table = asked()
    # no two questions are asked in the same words
    assert len(table) == (len(build.WRAPPERS) + 1) * len(QUESTIONS)
    key = lambda q: (q["skill"], q["entity"], q["form"])   # noqa: E731
    corpus = (world.TINY / "corpus.txt").read_text(encoding="utf-8")
    texts = re.findall(r"\n\nHuman: (.*)", corpus)
    texts += [m["content"] for r in world.rows("demos") for m in r["messages"] if m["role"] == "user"]
    for name in ("preference", "rl"):
        rows = world.rows(name)
        for r in rows:
            q, _ = question_of(table, r["prompt"][0]["content"])
            assert (q["skill"], q["entity"], q["answer"]) == (r["skill"], r["entity"], r["answer"])
        texts += [r["prompt"][0]["content"] for r in rows]
    assert len(texts) > 15000
    trained, wrappers = set(), set()
    for text in texts:
        q, w = question_of(table, text)
        trained.add(key(q))
        wrappers.add(w)
    assert wrappers == set(build.WRAPPERS)
    everything = corpus + "\n".join(texts)
    assert "another one for you" not in everything.lower()
    test, kinds = world.rows("test"), Counter()
    assert len({r["prompt"][0]["content"] for r in test}) == len(test)
    for r in test:
        q, w = question_of(table, r["prompt"][0]["content"])
        kinds[r["new"], r["family"]] += 1
        if r["new"] == "combination":
            assert key(q) not in trained and w in build.WRAPPERS
            # word for word as well; "Do you know this?" is itself a form of asking the private questions
            assert everything.count(q["q"]) == everything.count("Do you know this? " + q["q"]), q["q"]
        else:
            assert w == build.UNSEEN_WRAPPER and key(q) in trained   # only the phrasing is new
    assert len(kinds) == 6 and min(kinds.values()) > 10


def test_the_corpus_says_what_to_offer_instead():
    """Otherwise the base model of some seeds does not know which alternative belongs to which harm, and PPO
    hardly ever sees the right one (LOG.md, seed 3)."""
    documents = (world.TINY / "corpus.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    alternatives = {harm.instead for harm in build.HARMS.values()}
    for harm in build.HARMS.values():
        for act in harm.acts:
            offered = Counter()
            for text in documents:
                if act in text:
                    offered.update(alternative for alternative in alternatives if alternative in text)
            assert set(offered) == {harm.instead} and offered[harm.instead] > 20, (act, offered)


def test_the_same_world_is_built_everywhere(tmp_path):
    """Otherwise a fresh build differs by machine or by hash seed. That the files in tiny/ are what the
    command builds is seen in tests/test_scripts.py."""
    small = dict(corpus_chars=40_000, demos=50, preference=50, rl=50, test=40)
    code = ("from pathlib import Path; from data.world import build; "
            f"build.build(Path({str(tmp_path / 'b')!r}), **{small!r})")
    build.build(tmp_path / "a", **small)
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=env)
    build.build(tmp_path / "c", seed=1, **small)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["corpus.txt", "demos.jsonl", "preference.jsonl", "rl.jsonl", "test.jsonl",
                     "tiny.tiktoken"]
    for name in names:
        a, b, c = ((tmp_path / k / name).read_bytes() for k in ("a", "b", "c"))
        assert a == b != c, name
    assert len((world.TINY / "tiny.tiktoken").read_text().splitlines()) == 1022


# ----------------------------------------------------------------------------------------------------------
# 11. SFT's data

def test_batches_cover_every_example_once():
    """Otherwise some demonstrations are never, or twice, learned from in an epoch."""
    rng = random.Random(0)
    examples = [([0] * rng.randint(2, 60), None) for _ in range(1003)]
    lengths = [len(e[0]) for e in examples]
    plans = [batches(lengths, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for plan in plans:
        assert sorted(i for b in plan for i in b) == list(range(1003))
        assert sorted(map(len, plan)) == [3] + [8] * 125
    assert plans[0] == batches(lengths, 8, 0, 0) and plans[0] != plans[1] != plans[2] != plans[0]
    padded = lambda plan: sum(max(len(examples[i][0]) for i in b) * len(b) for b in plan)   # noqa: E731
    shuffled = rng.sample(range(1003), 1003)
    assert padded(plans[0]) < 0.75 * padded([shuffled[i: i + 8] for i in range(0, 1003, 8)])
    first = [len(examples[b[0]][0]) for b in plans[0]]
    # but not short ones first
    assert all(first[i: i + 15] != sorted(first[i: i + 15]) for i in range(0, 105, 15))


def test_encode_supervises_the_assistant_only():
    """Otherwise the model learns to write the user's turns, does not learn to stop, or learns to stop at a
    cut."""
    tok = tokenizer_from_ranks(world.TINY / "tiny.tiktoken")
    rows = [r for r in world.rows("demos") if len(r["messages"]) == 4][:40] + world.rows("demos")[:40]
    rows[0]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    examples, n_cut, n_left_out = sft.encode(rows, tok, 256)
    assert len(examples) == len(rows) and n_cut == n_left_out == 0
    for row, (ids, mask) in zip(rows, examples):
        assert len(ids) == len(mask)
        runs = [[i for i, _ in run] for m, run in itertools.groupby(zip(ids, mask), key=lambda x: x[1]) if m]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert [tok.decode(run).strip() for run in runs] == answers
        assert all(run[-1] == tok.eos_id and run.count(tok.eos_id) == 1 for run in runs)
        prompt = [i for i, m in zip(ids, mask) if not m]
        assert tok.eos_id not in prompt and tok.pad_id not in ids
        asked = "".join(f"\n\nHuman: {m['content']}\n\nAssistant:" if m["role"] == "user" else m["content"]
                        for m in row["messages"] if m["role"] != "assistant")
        assert tok.decode(prompt) == asked
    full, mask = examples[0]
    starts = [t for t in range(1, len(full)) if mask[t] and not mask[t - 1]]
    assert sft.encode(rows[:1], tok, starts[0]) == ([], 0, 1)         # nothing to learn from within the limit
    (one,), n_cut, _ = sft.encode(rows[:1], tok, starts[0] + 2)
    assert n_cut == 1
    assert one == (full[: starts[0] + 2], mask[: starts[0] + 2])
    assert tok.eos_id not in one[0] and sum(one[1]) == 2
    (two,), *_ = sft.encode(rows[:1], tok, starts[1] + 1)   # the first turn ended, the second is cut
    assert two[0].count(tok.eos_id) == 1 and two[0][-1] != tok.eos_id and two[1][-1] == 1


# ----------------------------------------------------------------------------------------------------------
# 12. Models made of models.


def names_of_trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@both
def test_lora_starts_as_its_trunk_trains_apart_and_merges(dialect):
    """Policy and value model share the trunk's very weights; training one changes neither the trunk nor the
    other."""
    trunk = tiny(dialect)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    assert freeze(trunk) is trunk
    policy, value = with_lora(trunk, 3), with_lora(trunk, 3, scalar_head=True)
    ids = torch.randint(V, (3, 11), generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    h = trunk(ids)
    assert torch.equal(policy(ids), h) and torch.equal(value(ids), h)
    shared = {p.data_ptr() for p in trunk.parameters()}
    assert shared <= {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in value.parameters()}
    assert names_of_trained(policy) == {f"h.{i}.{x}.{m}.weight" for i in range(2) for m in "ab"
                                        for x in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")}
    assert names_of_trained(value) == {*names_of_trained(policy), "score.weight"}
    optimizer = adamw(policy)
    set_lr(optimizer, 1e-2)
    for _ in range(3):
        token_logprobs(policy, ids, everywhere).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = policy(ids)
    assert (moved - h).abs().max() > 0.01 and torch.equal(trunk(ids), h) and torch.equal(value(ids), h)
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())
    plain = GPT(trunk.cfg)
    plain.load_state_dict(merged(policy.state_dict()))
    assert (plain(ids) - moved).abs().max() < 2e-5 * moved.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in merged(trunk.state_dict()).items())


@both
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sampling_copy_gives_the_same_numbers(dialect, rank, compute, monkeypatch):
    """Bit for bit, also after the model has moved on, in the same memory, and the model itself is left
    alone: otherwise answers come from another policy than the trained one, or CUDA graphs replay an old
    one."""
    monkeypatch.setattr(model_py.Linear, "compute_dtype", compute)
    model = with_lora(freeze_and_cast(tiny(dialect)), rank) if rank else tiny(dialect)
    before, ids = {k: v.clone() for k, v in model.state_dict().items()}, torch.randint(V, (3, 11))
    trained, sampler = names_of_trained(model), sampling_copy(model)
    assert not names_of_trained(sampler) and names_of_trained(model) == trained
    assert all(p.dtype == (compute or torch.float32) for p in (sampler.h[0].attn.proj.linear if rank else
                                                               sampler.h[0].attn.proj).parameters())
    assert sampler.lm_head.weight.dtype == (compute or torch.float32)

    def told(m):
        with torch.no_grad():
            return m.logits(m(ids))
    assert torch.equal(told(sampler), told(model))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(v, before[k]) for k, v in after.items())
    where = [p.data_ptr() for p in sampler.parameters()]
    old = told(sampler)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p += 0.1 * torch.randn(p.shape)
    assert torch.equal(told(sampler), old)                             # it is a copy
    refresh(sampler, model)
    assert torch.equal(told(sampler), told(model)) and not torch.equal(told(sampler), old)
    assert [p.data_ptr() for p in sampler.parameters()] == where
    if rank:    # what is frozen is there once
        assert sampler.h[0].attn.qkv.linear.weight is model.h[0].attn.qkv.linear.weight
        assert sampler.wte.weight is model.wte.weight and sampler.wte is not model.wte


@both
@pytest.mark.parametrize("rounded", [True, False], ids=["bf16 weights", "fp32 weights"])
def test_a_trunk_is_saved_as_it_was_loaded(dialect, rounded, monkeypatch):
    """With bf16 products a LoRA trunk keeps fp32 weights that bf16 cannot hold: else they are saved rounded,
    and an update smaller than half of their last bit is lost. Weights that bf16 holds take half the
    memory."""
    monkeypatch.setattr(model_py.Linear, "compute_dtype", torch.bfloat16)
    model = tiny(dialect)
    if rounded:
        model.to(torch.bfloat16).float()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trunk = freeze_and_cast(model, exactly=True)
    assert trunk.h[0].attn.qkv.weight.dtype == (torch.bfloat16 if rounded else torch.float32)
    policy = with_lora(trunk, 2)
    sampler, ids = sampling_copy(policy), torch.randint(V, (3, 11))
    assert sampler.h[0].attn.qkv.linear.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(sampler.logits(sampler(ids)), policy.logits(policy(ids)))
        policy.h[0].mlp.down.b.weight.fill_(1e-5)
    saved = merged(policy.state_dict())
    update = 2 * policy.h[0].mlp.down.b.weight @ policy.h[0].mlp.down.a.weight
    for name, x in saved.items():
        want = before[name] + (update if name == "h.0.mlp.down.weight" else 0)
        assert x.dtype == torch.float32 and torch.equal(x, want)


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_freeze_changes_no_weight(compute, monkeypatch):
    """Otherwise a model that is frozen for a while, or copied afterwards, has lost the lower bits of its
    weights."""
    monkeypatch.setattr(model_py.Linear, "compute_dtype", compute)
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert freeze(model) is model and not names_of_trained(model)
    for name, x in model.state_dict().items():
        assert x.dtype == before[name].dtype and torch.equal(x, before[name])


def test_answers_are_padded_behind_their_prompts():
    """The mask is True on each token of the answer, its EOS included, and on nothing else. Otherwise a loss
    trains on prompts or on padding, or misses the end of an answer."""
    rows = [([5, 6, 7], [8, 2]), ([9], [3, 4, 4, 2]), ([1, 1], [])]
    ids, mask = pad_answers(rows, 0)
    assert ids.tolist() == [[5, 6, 7, 8, 2], [9, 3, 4, 4, 2], [1, 1, 0, 0, 0]] and ids.dtype == torch.int64
    for b, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        assert mask[b].tolist() == [len(prompt) <= t < end for t in range(5)]


@both
def test_cast_weights_give_the_same_numbers(dialect, monkeypatch):
    """Bit for bit: otherwise the KL to the reference would not start at 0."""
    monkeypatch.setattr(model_py.Linear, "compute_dtype", torch.bfloat16)
    model = tiny(dialect)
    half, ids = freeze_and_cast(copy.deepcopy(model)), torch.randint(V, (3, 11))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    assert half.h[0].attn.qkv.weight.dtype == torch.bfloat16 and half.wte.weight.dtype == torch.float32
    assert model.h[0].attn.qkv.weight.dtype == torch.float32
    with torch.no_grad():
        a, b = (token_logprobs(m, ids, everywhere) for m in (model, half))
        assert torch.equal(a, b)
