"""dpo.py against float64 NumPy, against closed forms, and against everything that must change nothing."""
import copy
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from test_oracles import (BETA, N_TOKENS, PROMPTS, RESPONSES, both, exact, full_logits, grad_of, ragged, same,
                          tiny, wide)

import dpo
import model
from data import InputError, comparisons, health, prefix_sharing, report, world
from data.files import formats
from data.files.checkpoint import load, save
from data.setup import adamw, set_lr
from data.files.tokenizer import GPT2_REGEX, Tokenizer, tokenizer_from_ranks
from model import GPT, GPTConfig, pad_answers, pad_batch, token_logprobs

f64 = torch.float64
PAIRED = [name for name, row in dpo.LOSSES.items() if row.paired]


def config(**changes):
    cfg = dpo.Config(**{"sft_coef": 0.0, **changes})
    cfg.beta = cfg.beta or dpo.LOSSES[cfg.loss].beta     # as main does
    return cfg


def numbers(seed=0, N=50):
    """Log-probs, reference log-probs (2, N), lengths and labels: short and long, likely and unlikely, all
    labels."""
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 40, size=(2, N)).astype(float)
    logp, ref = -n * rng.exponential(0.7, size=(2, N)) - 1e-3, -n * rng.exponential(0.7, size=(2, N)) - 1e-3
    p = np.where(rng.random(N) < 0.5, 1.0, rng.random(N))
    return logp, ref, n, p


def logps(model, pairs, tok):
    """Summed log-probs (N,) of answers given prompts, [(prompt ids, answer ids)], each in a row of its
    own."""
    ids, mask = pad_answers(pairs, tok.pad_id)
    return token_logprobs(model, ids, mask).sum(1)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_odds(x):
    return math.log(math.exp(x) / -math.expm1(x))


# The loss of one pair where all prefer the first answer, written from the papers: pi, ref and n are the
# log-probs and the numbers of tokens of the two answers.
ORACLES = {
    "dpo": lambda pi, ref, n, beta, gamma: -log_sigmoid(beta * ((pi[0] - ref[0]) - (pi[1] - ref[1]))),
    "dpo_norm": lambda pi, ref, n, beta, gamma: -log_sigmoid(
        beta / n[0] * (pi[0] - ref[0]) - beta / n[1] * (pi[1] - ref[1])),
    "ipo": lambda pi, ref, n, beta, gamma: (
        (pi[0] - ref[0]) / n[0] - (pi[1] - ref[1]) / n[1] - 1 / (2 * beta)) ** 2,
    "apo_zero": lambda pi, ref, n, beta, gamma: (
        1 - sigmoid(beta * (pi[0] - ref[0])) + sigmoid(beta * (pi[1] - ref[1]))),
    "simpo": lambda pi, ref, n, beta, gamma: -log_sigmoid(beta / n[0] * pi[0] - beta / n[1] * pi[1] - gamma),
    "orpo": lambda pi, ref, n, beta, gamma: -beta * log_sigmoid(
        log_odds(pi[0] / n[0]) - log_odds(pi[1] / n[1])),
}


def oracle(loss, logp, ref, n, p, cfg):
    """Losses (N,), one pair at a time, with plain math on Python floats; p: the share that prefers the first
    answer."""
    out = []
    for i in range(len(p)):
        pair = logp[:, i], ref[:, i], n[:, i]
        win = ORACLES[loss](*pair, cfg.beta, cfg.simpo_gamma)
        lose = ORACLES[loss](*(x[::-1] for x in pair), cfg.beta, cfg.simpo_gamma)
        smooth, flip = cfg.label_smoothing, cfg.flip_rate
        if smooth:      # cDPO: the label is wrong with this probability
            win, lose = (1 - smooth) * win + smooth * lose, (1 - smooth) * lose + smooth * win
        elif flip:      # rDPO, arXiv:2403.00409, eq. 13
            win, lose = (((1 - flip) * a - flip * b) / (1 - 2 * flip) for a, b in ((win, lose), (lose, win)))
        value = p[i] * win + (1 - p[i]) * lose
        out.append(value - (cfg.sft_coef + (loss == "orpo")) * logp[0, i] / n[0, i])
    return np.array(out)


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1}, {"flip_rate": 0.2}, {"sft_coef": 0.3}])
@pytest.mark.parametrize("loss", PAIRED)
def test_pair_losses_against_numpy(loss, extra):
    """Every row of the table against its paper's equation in float64; a row without one here says so."""
    if loss not in ORACLES:
        pytest.fail(f"{loss} has no line in ORACLES: write its paper's equation there, with plain numbers")
    logp, ref, n, p = numbers()
    cfg = config(loss=loss, beta=0.3 if loss != "simpo" else 2.0, simpo_gamma=0.7, **extra)
    got, w, l = dpo.labelled_loss(*(torch.from_numpy(x) for x in (logp, ref, n, p)), cfg)
    want = oracle(loss, logp, ref, n, p, cfg)
    assert np.abs(got.numpy() - want).max() < 1e-10 * max(1, np.abs(want).max())
    assert w.shape == l.shape == (50,)
    if loss == "dpo":
        assert np.abs(torch.stack((w, l)).numpy() - (logp - ref)).max() < 1e-12


def test_kto_loss_against_numpy():
    logp, ref, n, p = numbers()
    r, good, z, beta = (logp - ref)[0], (p > 0.7).astype(float), 0.8, 0.2
    want = [(1.5 if g else 0.5) * (1 - sigmoid(beta * ((x - z) if g else (z - x)))) for x, g in zip(r, good)]
    cfg = config(loss="kto", beta=beta, desirable_weight=1.5, undesirable_weight=0.5, sft_coef=0.3)
    one = (torch.from_numpy(x[:1]) for x in (logp, ref, n))
    got, w, l = dpo.labelled_loss(*one, torch.from_numpy(good), cfg, torch.tensor(z, dtype=f64))
    assert 0 < good.sum() < len(good) and np.abs(got.numpy() - want).max() < 1e-10
    assert np.abs(w.numpy() - r).max() < 1e-12 and (l == z).all()


def test_kto_with_flipped_labels_is_right_on_average():
    """rDPO's mean over the flips is the loss of clean labels, also where good and bad answers have different
    weights; and a soft label is that share of both."""
    logp, ref, n, _ = (torch.from_numpy(x[:1]) for x in numbers())
    flags, z = dict(loss="kto", desirable_weight=1.5, undesirable_weight=0.5), torch.tensor(0.3, dtype=f64)

    def losses(label, **more):
        p = torch.full_like(logp[0], label)
        return dpo.labelled_loss(logp, ref, n, p, config(**flags, **more), z)[0].numpy()
    for label in (0.0, 1.0):
        flipped = 0.8 * losses(label, flip_rate=0.2) + 0.2 * losses(1 - label, flip_rate=0.2)
        assert np.abs(flipped - losses(label)).max() < 1e-12
    assert np.abs(losses(0.7) - 0.7 * losses(1.0) - 0.3 * losses(0.0)).max() < 1e-12


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_gradcheck(loss):
    """Of every row of the table, at labels between 0 and 1 as well."""
    logp, ref, n, p = (torch.from_numpy(x[..., :6]) for x in numbers(3))
    p[0] = 0.25
    cfg, z = config(loss=loss, beta=0.4, sft_coef=0.1), None
    if loss == "kto":
        logp, ref, n, z = logp[:1], ref[:1], n[:1], torch.tensor(0.3, dtype=f64)
        cfg = config(loss="kto", beta=0.2, desirable_weight=1.2, undesirable_weight=0.7)
    logp.requires_grad_(True)
    f = lambda x: dpo.labelled_loss(x, ref, n, p, cfg, z)[0].sum()   # noqa: E731
    assert torch.autograd.gradcheck(f, (logp,), eps=1e-6, atol=1e-6)


def test_log_odds_at_the_edges():
    """p -> 0 and p -> -inf: finite values and gradients, where the textbook form gives inf - inf."""
    p = torch.tensor([-1e-12, -1e-6, -0.3, -math.log(2), -0.7, -30.0, -500.0], dtype=f64, requires_grad=True)
    out = dpo.log_odds(p)
    out.sum().backward()
    assert out.isfinite().all() and p.grad.isfinite().all()
    want = [math.log(math.exp(x) / -math.expm1(x)) for x in (-1e-6, -0.3, -math.log(2), -0.7, -30.0)]
    assert np.abs(out.detach().numpy()[1:6] - want).max() < 1e-9 and out[6].item() == pytest.approx(-500)


def test_at_the_start_the_loss_is_ln_2():
    logp, _, n, p = (torch.from_numpy(x) for x in numbers())
    for extra in ({}, {"label_smoothing": 0.2}, {"flip_rate": 0.2}):
        for name in ("dpo", "dpo_norm"):
            loss, w, l = dpo.labelled_loss(logp, logp, n, p, config(loss=name, beta=0.1, **extra))
            assert (loss - math.log(2)).abs().max() < 1e-15 and w.abs().max() == l.abs().max() == 0
    for name, start in (("ipo", 4), ("apo_zero", 1)):
        loss, _, _ = dpo.labelled_loss(logp, logp, n, p, config(loss=name, beta=0.25))
        assert (loss - start).abs().max() < 1e-15
    kto = dpo.labelled_loss(logp[:1], logp[:1], n[:1], p, config(loss="kto", beta=0.1),
                            torch.tensor(0.0, dtype=f64))
    assert (kto[0] - 0.5).abs().max() < 1e-15


def test_rdpo_is_unbiased_under_flips_and_cdpo_is_not():
    """The mean over flipped labels of the rDPO loss is the loss on clean ones: values and gradients,
    exactly."""
    logp, ref, n, _ = (torch.from_numpy(x) for x in numbers(1))
    logp.requires_grad_(True)
    one, eps = torch.ones(50, dtype=f64), 0.3

    def of(p, **extra):
        loss = dpo.labelled_loss(logp, ref, n, p, config(beta=0.2, **extra))[0].sum()
        return torch.cat((loss.view(1), torch.autograd.grad(loss, logp)[0].flatten()))

    clean = of(one)
    noisy = {k: (1 - eps) * of(one, **{k: eps}) + eps * of(0 * one, **{k: eps})
             for k in ("flip_rate", "label_smoothing")}
    assert (noisy["flip_rate"] - clean).abs().max() < 1e-10
    assert (noisy["label_smoothing"] - clean).abs().max() > 0.1


def test_labels_are_symmetric():
    """Chosen and rejected exchanged with label 1 - p is the same pair, for every loss without an SFT part."""
    logp, ref, n, p = (torch.from_numpy(x) for x in numbers(2))
    for loss in PAIRED:
        if dpo.LOSSES[loss].nll:
            continue
        a = dpo.labelled_loss(logp, ref, n, p, config(loss=loss, beta=0.5))[0]
        b = dpo.labelled_loss(logp.flip(0), ref.flip(0), n.flip(0), 1 - p, config(loss=loss, beta=0.5))[0]
        assert (a - b).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------------


def some_examples(rng, n, label=lambda: 1.0, longest=12):
    """n examples of random ids."""
    texts = zip(ragged(rng, n, 1, 9), ragged(rng, n, 1, longest), ragged(rng, n, 1, longest))
    return [(x, a, b, label()) for x, a, b in texts]


def step_loss(policy, ref_model, examples, numbers, weight, micro, cfg):
    """(loss, gradient) of a step as dpo.main computes it, `micro` of the numbered examples at a time."""
    tok, side = SimpleNamespace(pad_id=30), dpo.BOTH if dpo.LOSSES[cfg.loss].paired else dpo.FIRST
    with torch.no_grad():
        ref, _ = dpo.answer_logps(ref_model, examples, tok)
    z = dpo.reference_point(policy, examples, ref, tok, cfg)
    total = 0.0
    for k in range(0, len(numbers), micro):
        part = numbers[k: k + micro]
        batch = [examples[i] for i in part]
        logp, n = dpo.answer_logps(policy, batch, tok, side)
        p = torch.tensor([label for *_, label in batch])
        losses, _, _ = dpo.labelled_loss(logp, ref[:, part], n, p, cfg, z)
        loss = (weight[part] * losses).sum() / len(examples)
        loss.backward()
        total += loss.item()
    return total, grad_of(policy)


@both
@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_the_loss_does_not_depend_on_batching(dialect, loss, monkeypatch):
    """Of every row of the table. Otherwise --micro_batch, the padding, the order of the pairs or the number
    of processes change what is learnt."""
    policy, ref, rng = tiny(dialect), tiny(dialect, 1), random.Random(0)
    examples = some_examples(rng, 7, label=rng.random)
    cfg = config(loss=loss, micro_batch=4)
    once, twice = torch.ones(7), dpo.filled_up(7, 3)

    def run(name, examples, micro, numbers=range(7), weight=once):
        return name, *step_loss(policy, ref, examples, list(numbers), weight, micro, cfg)

    variants = [run("whole", examples, 7), run("micro 1", examples, 1), run("micro 3", examples, 3),
                run("reversed", examples[::-1], 4), run("filled up for three processes", examples, 3, *twice)]
    for room in (model, prefix_sharing):
        monkeypatch.setattr(room, "pad_batch", wide(pad_batch, rng, 30))
    same([*variants, run("garbage in the padding", examples, 7)])


def test_rows_are_filled_up_for_every_number_of_processes():
    """As many rows for each process, and together they count as the rows that there are: no pair is left out
    or counts twice."""
    for processes in (1, 2, 3, 8):
        for n in range(20):
            numbers, weight = dpo.filled_up(n, processes)
            assert (len(numbers) % processes == 0 and n <= len(numbers) < n + processes
                    and set(numbers) == set(range(n)))
            counted = torch.zeros(n)
            for i in numbers:
                counted[i] += weight[i]
            assert torch.allclose(counted, torch.ones(n))


@both
def test_logps_are_of_the_answer_only(dialect):
    """Equal to the sum over single tokens of an unpadded row; the prompt's own log-probs play no part. Also
    for a prompt of one token, and where prompt and both answers together exceed the context."""
    gpt, rng, tok = tiny(dialect, max_len=24), random.Random(1), SimpleNamespace(pad_id=3)
    prompts = [[5], *ragged(rng, 5, 1, 9), [7] * 12]
    examples = [(x, a, b, 1.0) for x, a, b in zip(prompts, ragged(rng, 7, 1, 12), ragged(rng, 7, 1, 12))]
    got, n = dpo.answer_logps(gpt, examples, tok)
    for i, (x, *answers, _) in enumerate(examples):
        for side, y in enumerate(answers):
            lp = full_logits(gpt, x + y).log_softmax(-1)
            want = sum(lp[len(x) + t - 1, token].item() for t, token in enumerate(y))
            assert got[side, i].item() == pytest.approx(want, rel=1e-5) and n[side, i] == len(y)
    assert torch.allclose(dpo.all_logps(gpt, examples, tok, 4), got.detach(), rtol=1e-5)


@both
def test_a_shared_prompt_changes_nothing(dialect):
    """data/prefix_sharing.py against the plain way, both answers in one row behind their prompt or each in a
    row of its own: the same log-probs, numbers of tokens and gradients. Also for a prompt of one token, and
    where prompt and both answers together exceed the context."""
    gpt, rng, tok = tiny(dialect, max_len=24), random.Random(2), SimpleNamespace(pad_id=3)
    prompts = [[5], *ragged(rng, 5, 1, 9), [7] * 12]
    examples = [(x, a, b, 1.0) for x, a, b in zip(prompts, ragged(rng, 7, 1, 12), ragged(rng, 7, 1, 12))]
    weight = torch.tensor([[rng.gauss(0, 1) for _ in examples] for _ in range(2)])
    together, n = prefix_sharing.pair_logps(gpt, examples, tok.pad_id)
    (together * weight).sum().backward()
    grad = grad_of(gpt)
    plain = [dpo.answer_logps(gpt, examples, tok, side) for side in (dpo.FIRST, dpo.SECOND)]
    apart = torch.cat([logp for logp, _ in plain])
    (apart * weight).sum().backward()
    assert torch.equal(n, torch.cat([n_one for _, n_one in plain]))
    assert torch.allclose(together, apart, rtol=1e-5, atol=1e-5)
    assert (grad_of(gpt) - grad).abs().max() < 2e-5 * grad.abs().max()


@both
@pytest.mark.parametrize("loss", ["dpo", "dpo_norm"])
def test_the_first_loss_is_ln_2(dialect, loss):
    """Policy and reference go the same way, also where the reference's batches are others than those of
    training."""
    gpt, rng, tok = tiny(dialect), random.Random(3), SimpleNamespace(pad_id=3)
    examples = some_examples(rng, 9)
    known, cfg = dpo.all_logps(gpt, examples, tok, 4), config(loss=loss)
    logp, n = dpo.answer_logps(gpt, examples[2:6], tok)
    losses, w, l = dpo.labelled_loss(logp, known[:, 2:6], n, torch.ones(4), cfg)
    assert (losses - math.log(2)).abs().max() < 1e-5 and (w - l).abs().max() < 1e-4
    logp, n = dpo.answer_logps(gpt, examples, tok)
    losses, w, l = dpo.labelled_loss(logp, logp.detach(), n, torch.ones(9), cfg)
    assert w.abs().max() == l.abs().max() == 0


def test_a_label_below_a_half_swaps_the_answers(tmp_path):
    """Else the terms that hold up the chosen answer by itself, ORPO's and --sft_coef's, teach the worse
    one."""
    tok = SimpleNamespace(render_answer=lambda prompt, answer: ([1, 2], [*answer.encode(), 0]))
    one = {"prompt": "x", "chosen": "b", "rejected": "a", "label": 0.25}
    other = {"prompt": "x", "chosen": "a", "rejected": "b", "label": 0.75}
    found = []
    for row in (one, other):
        (tmp_path / "pair.jsonl").write_text(json.dumps(row))
        found.append(dpo.encode(formats.load(tmp_path / "pair.jsonl", "preference")[0], tok, 8, 8)[0])
    assert found[0] == found[1] == [([1, 2], [97, 0], [98, 0], 0.75)]


def test_kto_needs_one_held_out_prompt(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "ab"[i % 2], "label": bool(i % 2)} for i in range(8)]
    data = tmp_path / "kto.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tok = SimpleNamespace(
        render_answer=lambda prompt, answer: ([*str(prompt).encode()][-9:], [*answer.encode(), 0]))
    run = SimpleNamespace(cfg=config(loss="kto"), say=lambda text: None)
    train, held, _ = dpo.read_examples(run, data, False, tok, 64)
    assert len(held) == 1 and len(train) == 7


@both
def test_the_first_loss_of_kto_is_a_half(dialect):
    """Although the reference reads both answers, and the policy the labelled ones and the others apart."""
    gpt, rng, tok = tiny(dialect), random.Random(3), SimpleNamespace(pad_id=3)
    labels = iter([0.0, 1.0] * 5)
    examples, cfg = some_examples(rng, 9, lambda: next(labels)), config(loss="kto", micro_batch=2)
    ref = dpo.all_logps(gpt, examples, tok, 4)
    metrics = dpo.held_out_metrics(gpt, examples, ref, tok, cfg)
    assert 0 <= metrics["z"] < 1e-5 and abs(metrics["loss"] - 0.5) < 1e-6 and abs(metrics["margin"]) < 1e-5


@both
def test_the_reference_point_is_the_mean_of_the_step(dialect):
    """max(0, mean of log pi / pi_ref) of the other answers behind these prompts, however the step is cut."""
    gpt, ref_model, rng, tok = tiny(dialect), tiny(dialect, 1), random.Random(5), SimpleNamespace(pad_id=3)
    examples = some_examples(rng, 7)
    others = [(x, b) for x, _, b, _ in examples]
    want = (logps(gpt, others, tok) - logps(ref_model, others, tok)).mean().item()
    for one, other, z in ((gpt, ref_model, max(0.0, want)), (ref_model, gpt, max(0.0, -want))):
        ref = dpo.all_logps(other, examples, tok, 4)
        for size in (1, 3, 7):
            found = dpo.reference_point(one, examples, ref, tok, config(loss="kto", micro_batch=size))
            assert found.item() == pytest.approx(z, abs=1e-4)
    assert abs(want) > 1e-2


def test_a_loss_is_one_row(monkeypatch):
    """What the header says of adding one: NCA (arXiv:2402.05369), a loss of the two rewards that their
    difference does not decide, is a function and a row."""
    def nca(w, l, cfg):
        w, l = cfg.beta * w, cfg.beta * l
        return -(w.sigmoid().log() + 0.5 * (-w).sigmoid().log() + 0.5 * (-l).sigmoid().log())

    monkeypatch.setitem(dpo.LOSSES, "nca", dpo.Loss(dpo.log_ratio, nca, 0.1, True, "sft"))
    logp, ref, n, p = (torch.from_numpy(x) for x in numbers(5))
    cfg = config(loss="nca")
    got, w, l = dpo.labelled_loss(logp, ref, n, p, cfg)
    (rw, rl), want = (0.1 * (logp - ref)).tolist(), []
    for share, a, b in zip(p.tolist(), rw, rl):
        first, second = (-log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y)
                         for x, y in ((a, b), (b, a)))
        want.append(share * first + (1 - share) * second)
    assert np.abs(got.numpy() - want).max() < 1e-12 and cfg.beta == 0.1
    # Both log-ratios higher by 1: the difference, and DPO's loss with it, stays; this one moves.
    more = [dpo.labelled_loss(logp + 1, ref, n, p, config(loss=name, beta=0.1))[0] for name in ("dpo", "nca")]
    less = [dpo.labelled_loss(logp, ref, n, p, config(loss=name, beta=0.1))[0] for name in ("dpo", "nca")]
    assert torch.allclose(more[0], less[0]) and (more[1] - less[1]).abs().min() > 1e-3


def test_the_prompt_mask_changes_no_dpo_loss_but_the_rewards():
    """With one prompt for both answers the prompt's terms cancel in w - l: what the blog post's code gets
    right by luck. They do not where a loss looks at w and l apart, or at their length: both are asked of the
    loss itself, so that this holds for a row that somebody adds."""
    gpt, ref, rng = tiny("llama"), tiny("llama", 1), random.Random(4)
    examples = [(x, a, b, 1.0)
                for x, a, b in zip(ragged(rng, 5, 2, 9), ragged(rng, 5, 1, 9), ragged(rng, 5, 1, 9))]
    # the prompt counted as part of the answer
    moved = [(x[:1], x[1:] + a, x[1:] + b, p) for x, a, b, p in examples]

    def read(examples):
        (logp, n), (known, _) = (dpo.answer_logps(m, examples, SimpleNamespace(pad_id=3)) for m in (gpt, ref))
        return logp.double(), known.double(), n

    for loss in PAIRED:
        spec, cfg = dpo.LOSSES[loss], config(loss=loss, beta=0.1)
        logp, known, n = read(examples)
        a, wa, la = dpo.labelled_loss(logp, known, n, torch.ones(5), cfg)
        b, wb, lb = dpo.labelled_loss(*read(moved), torch.ones(5), cfg)
        # What a prompt adds to both answers: two tokens of log-prob -1, and the rewards gain alike or not.
        gain_w, gain_l = spec.reward(logp - 1, known, n + 2) - spec.reward(logp, known, n)
        of_difference = torch.allclose(spec.loss(wa + 1, la + 1, cfg), spec.loss(wa, la, cfg), atol=1e-5)
        cancels = torch.allclose(gain_w, gain_l) and of_difference and spec.nll == 0
        assert torch.allclose(a, b, atol=1e-5) == cancels, loss
        assert cancels or loss != "dpo"
        assert not torch.allclose(wa, wb, atol=1e-3) and not torch.allclose(la, lb, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------


def test_kto_never_pairs_a_prompt_with_its_own_completion():
    rng = random.Random(0)
    for n_prompts in (2, 3, 10):
        examples = [([rng.randrange(n_prompts)], [i, 7], [i, 7], 1.0) for i in range(60)]
        examples[0], examples[1] = ([0], [0, 7], [0, 7], 1.0), ([1], [1, 7], [1, 7], 0.0)
        prompt_of = {tuple(a): x for x, a, _, _ in examples}
        out = comparisons.mismatch(examples, 3, 9)
        assert [(x, a, p) for x, a, _, p in out] == [(x, a, p) for x, a, _, p in examples]
        assert all(prompt_of[tuple(b)] != x for x, _, b, _ in out)
        if n_prompts == 10:   # where prompts seldom meet, nearly all answers serve once
            assert len({tuple(b) for *_, b, _ in out}) > 45
    with pytest.raises(InputError, match="same prompt"):
        comparisons.mismatch([([1], [i], [i], 1.0) for i in range(5)], 0, 9)


def test_kto_cuts_the_answer_to_another_prompt_too():
    """Behind a longer prompt than its own, an answer that was cut at max_len would leave the context."""
    # 9 tokens each
    examples = [([i] * (i + 1), [20 + i] * (8 - i), [20 + i] * (8 - i), 1.0) for i in range(6)]
    out = comparisons.mismatch(examples, 0, 9)
    lengths = [len(prompt) + len(other) for prompt, _, other, _ in out]
    assert max(lengths) == 9 and min(len(other) for *_, other, _ in out) > 0
    for prompt, _, other, _ in out:      # from the front, and all that there is room for
        assert set(other) == {other[0]} and len(other) == min(9 - len(prompt), 8 - (other[0] - 20))


def test_encode_leaves_out_and_counts():
    """Prompts that are too long and equal answers are left out, answers are cut: nothing of it in silence."""
    tok = tokenizer_from_ranks(world.TINY / "tiny.tiktoken")
    row = {"prompt": [{"role": "user", "content": "What is the capital of France? " * 2}],
           "chosen": "It is Paris.", "rejected": "It is Paris. " * 20 + "No.", "label": 1.0}
    whole = tok.render(row["prompt"], True)[0]
    n = len(whole)
    (x, w, l, p), = dpo.encode([row], tok, n, n + 20)[0]
    assert x == whole and tok.decode(w[:-1]).strip() == "It is Paris." and w[-1] == tok.eos_id and p == 1.0
    assert len(l) == 20 and tok.eos_id not in l                      # cut: it does not end
    assert dpo.encode([row], tok, n, n + 20)[1] == {"cut": 1}
    assert dpo.encode([row], tok, n - 1, n + 20) == ([], {"long": 1})
    assert dpo.encode([row | {"chosen": row["rejected"] + " More."}], tok, n, n + 20) == ([], {"equal": 1})
    single = {"prompt": row["prompt"], "completion": "It is Paris.", "label": False}
    (x, a, b, p), = dpo.encode([single], tok, 200, 256)[0]
    assert x == whole and a == b == w and p == 0.0


def chat_tokenizer():
    """Bytes and the special tokens of Llama 3."""
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ranks, special = {bytes([b]): b for b in range(256)}, {name: 256 + i for i, name in enumerate(names)}
    return Tokenizer(tiktoken.Encoding("tiny", pat_str=GPT2_REGEX, mergeable_ranks=ranks,
                                       special_tokens=special))


def test_no_prompt_loses_its_beginning():
    """A prompt that was too long kept its end alone: no BOS, no system message, no header of the user's
    turn."""
    tok = chat_tokenizer()
    rows = [{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "word " * n}],
             "chosen": "a", "rejected": "b", "label": 1.0} for n in (1, 100, 2)]
    examples, counts = dpo.encode(rows, tok, 80, 120)
    assert len(examples) == 2 and counts["long"] == 1 and counts.total() == 1
    for row, (prompt, *_) in zip((rows[0], rows[2]), examples):
        assert prompt == tok.render(row["prompt"], True)[0] and prompt[0] == tok.bos_id


# ------------------------------------------------------------------------------------------------------------
# A task where everything that can be said can be counted: pi* ~ pi_ref exp(r / beta) is known.


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_known_optimum_is_reached(loss):
    """All pairs of answers, labelled with the exact Bradley-Terry probabilities: DPO must end at pi*. IPO
    must end where every log-ratio difference is what its own label asks for: (2p - 1) / (2 beta) for
    consistent labels."""
    policy = tiny("gpt2", 6, vocab_size=N_TOKENS, n_layer=2, n_head=2, n_kv_head=1, n_embd=24, n_inner=48,
                  max_len=5, head_dim=12)
    with torch.no_grad():
        policy.wte.weight.mul_(0.5)
    ref, rng = copy.deepcopy(policy).requires_grad_(False), np.random.default_rng(0)
    table = rng.normal(0, 0.7, size=(2, len(RESPONSES)))
    p_ref = [exact(ref, p) for p in PROMPTS]
    pairs = [(k, i, j) for k in range(2) for i in range(len(RESPONSES)) for j in range(i)]
    tok, answers = SimpleNamespace(pad_id=5), [list(y) for y in RESPONSES]
    n = torch.tensor([len(y) for y in answers])
    k, i, j = (torch.tensor(x) for x in zip(*pairs))
    gap = torch.tensor([table[a, b] - table[a, c] for a, b, c in pairs])
    # IPO's label: averaged log-ratios of pi* differ by q, so P = 1/2 + beta q asks for exactly pi*
    star = [q * np.exp(r / BETA) for q, r in zip(p_ref, table)]
    p_star = [s / s.sum() for s in star]
    ratio = torch.tensor(np.array([np.log(s / q) for s, q in zip(p_star, p_ref)])) / n
    beta = BETA if loss == "dpo" else 0.02
    label = gap.sigmoid() if loss == "dpo" else 0.5 + beta * (ratio[k, i] - ratio[k, j])
    assert label.min() > 0 and label.max() < 1
    flat = [(x, y) for x in PROMPTS for y in answers]
    with torch.no_grad():
        known = logps(ref, flat, tok).view(2, -1)
    optimizer, n_steps = adamw(policy), 200
    for step in range(n_steps):
        logp = logps(policy, flat, tok).view(2, -1)                 # every answer once, then every pair
        take = lambda t: torch.stack((t[k, i], t[k, j]))   # noqa: E731
        n_both, cfg = torch.stack((n[i], n[j])), config(loss=loss, beta=beta)
        out, _, _ = dpo.labelled_loss(take(logp), take(known), n_both, label, cfg)
        out.mean().backward()
        set_lr(optimizer, 1e-2 * (1 - step / n_steps))
        optimizer.step()
        optimizer.zero_grad()
    for x, q, s in zip(PROMPTS, p_ref, p_star):
        assert abs(q - s).sum() / 2 > 0.3                                # there was something to learn
        assert abs(exact(policy, x) - s).sum() / 2 < 0.01


# ------------------------------------------------------------------------------------------------------------
# The script (its flags, resume, seeds and bad input: tests/test_scripts.py).

KTO = [{"prompt": f"What is {i}?", "completion": f"It is {i}." if i % 3 else "Who knows?",
        "label": bool(i % 3)}
       for i in range(40)]


def rows_of(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def learn_politeness(suite, chain, folder, loss):
    """What dpo.py prints while it learns a rule that a small model can learn at once; its run is folder/x."""
    rows = [{"prompt": f"Question number {i}", "chosen": f"Yes, please, number {i}.",
             "rejected": f"Go away, {i}!"}
            for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return suite.ok("dpo.py", "--init", chain / "sft", "--data", folder / "pairs.jsonl", "--loss", loss,
                    "--out", folder / "x", "--batch_size", 16, "--epochs", 4, "--warmup", 2, "--max_new", 8,
                    "--held_out", 0.2, "--sft_coef", 0.1)


EARLY = {"test_every_loss_learns_its_comparisons": learn_politeness}      # see the chain in conftest.py


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_every_loss_learns_its_comparisons(early, loss):
    """Politeness is learnt by each of them: training accuracy rises."""
    folder, r = early
    log = rows_of(folder / "x")
    assert (log[-1]["accuracy"] >= 0.95 and log[-1]["loss"] < log[0]["loss"]
            and log[-1]["margin"] > log[0]["margin"])
    if loss == "dpo":
        assert abs(log[0]["margin"]) < 1e-3 and "instead of a second model" in r.out
    result = json.loads((folder / "x" / "result.json").read_text())
    assert result["stage"] == "dpo" and result["after"]["kl"] > 0.01 and result["after"]["accuracy"] >= 0.95
    # says which beta it was, for --reward implicit:
    run = json.loads((folder / "x" / "run.json").read_text())
    assert run["config"]["beta"] == dpo.LOSSES[loss].beta


def test_adapters_train_alone_and_resume(suite, chain, tmp_path):
    """--lora: the checkpoint is a plain one; a run cut in two ends as the whole one does."""
    flags = ["--init", chain / "sft", "--data", chain / "reward" / "comparisons.jsonl", "--lora", 2,
             "--batch_size", 8, "--warmup", 1, "--max_new", 8, "--dtype", "float32"]
    flags += ["--max_steps", 4, "--out"]
    stopped = suite.start_and_stop(2, "dpo.py", *flags, tmp_path / "b")
    suite.ok("dpo.py", *flags, tmp_path / "a")
    assert "after step 2" in suite.finish(stopped).err
    suite.ok("dpo.py", *flags, tmp_path / "b")
    files = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert files[0] == files[1] and len(files[0]) == len((chain / "sft" / "model.safetensors").read_bytes())
    state = torch.load(tmp_path / "a" / "state.pt", weights_only=True)["models"]["policy"]
    assert state and all(name.endswith((".a.weight", ".b.weight")) for name in state)
    assert json.loads((tmp_path / "a" / "result.json").read_text())["after"]["kl"] > 0


def test_a_run_names_adapters_below_the_rounding(suite, chain, tmp_path):
    """Once, at its last save."""
    r = suite.ok("dpo.py", "--init", chain / "sft", "--data", chain / "reward" / "comparisons.jsonl",
                 "--lora", 2, "--batch_size", 8, "--max_new", 4, "--dtype", "bfloat16", "--lr", 1e-6,
                 "--max_steps", 2, "--out", tmp_path / "x")
    assert r.out.count("health, adapters: ") == 1


def test_adapters_below_the_rounding_are_named(monkeypatch):
    """Otherwise the closing table is of a policy that nobody gets: read in bf16, its saved weights are those
    of before."""
    torch.manual_seed(0)
    trunk = model.freeze(
        model.GPT(model.GPTConfig(vocab_size=64, n_layer=1, n_embd=32, n_inner=64, max_len=8)))
    policy = model.with_lora(trunk, 2)
    state = {name: x for name, x in policy.state_dict().items() if name.endswith((".a.weight", ".b.weight"))}

    def said(dtype, update):
        monkeypatch.setattr(model.Linear, "compute_dtype", dtype)
        for name, x in state.items():
            if name.endswith(".b.weight"):
                x.fill_(update)
        return health.of_adapters(policy, state)

    assert "off by" in said(torch.bfloat16, 1e-7)["adapters"]
    assert said(torch.bfloat16, 0.1) == said(torch.bfloat16, 0.0) == said(None, 1e-7) == {}
    assert health.of_adapters(trunk, {}) == {}


def test_kto_on_unpaired_data(suite, chain, tmp_path):
    path = tmp_path / "kto.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in KTO))
    suite.ok("dpo.py", "--init", chain / "sft", "--data", path, "--loss", "kto", "--out", tmp_path / "x",
             "--batch_size", 16, "--epochs", 6, "--warmup", 2, "--max_new", 8, "--held_out", 0.2)
    log = rows_of(tmp_path / "x")
    assert (log[-1]["accuracy"] > 0.9 and all(row["z"] >= 0 for row in log)
            and any(row["z"] > 0 for row in log))
    path.write_text("".join(json.dumps(r | {"label": True}) + "\n" for r in KTO))
    r = suite.run("dpo.py", "--init", chain / "sft", "--data", path, "--loss", "kto", "--out", tmp_path / "y")
    assert r.rc == 1 and "good and bad" in r.err and "Traceback" not in r.err


@pytest.mark.parametrize("judge", ["annotator", "rm", "mine:score"])
def test_online(suite, chain, tmp_path, judge):
    (tmp_path / "mine.py").write_text("def score(rows, texts):\n    return [-len(t) for t in texts]\n")
    flags = ["--online", "true", "--online_steps", 3, "--batch_size", 12, "--max_new", 12,
             "--init", chain / "sft", "--judge", chain / "reward" if judge == "rm" else judge]
    suite.ok("dpo.py", *flags, "--out", tmp_path / "x", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert [row["step"] for row in rows_of(tmp_path / "x")] == [1, 2, 3]
    assert all(0 <= row["pairs"] <= 12 for row in rows_of(tmp_path / "x"))


def test_online_pairs_are_what_the_policy_said(chain, tmp_path):
    """The judge's order decides, unfinished answers lose, equal ones are left out."""
    policy, tok = load(chain / "sft")
    rows = world.rows("rl")[:24]
    seen = {}

    def score(rows, texts):
        seen.update({t: len(t) for t in texts})
        return [len(t) for t in texts]

    cfg = config(judge="mine:score", max_new=14)
    out = comparisons.online_pairs(policy, tok, rows, score, cfg, 0)
    assert 0 < len(out) <= 24
    for x, w, l, p in out:
        assert p == 1.0 and w != l and tok.eos_id in w
        assert tok.eos_id not in l or seen[tok.decode(w)] > seen[tok.decode(l)]


def test_an_error_in_a_judge_is_shown_with_its_place(suite, chain, tmp_path):
    """Also one that would be a sentence without a traceback if it were ours, such as a file that is not
    there."""
    (tmp_path / "mine.py").write_text("def score(rows, texts):\n    return open('nosuch.txt').read()\n"
                                      "def nan(rows, texts):\n    return [float('nan') for _ in texts]\n")
    flags = ["--online", "--batch_size", 4, "--max_new", 4, "--init", chain / "sft",
             "--out", tmp_path / "x", "--judge"]
    r = suite.run("dpo.py", *flags, "mine:score", cwd=tmp_path)
    assert (r.rc == 1 and "mine.py\", line 2, in score" in r.err
            and "--judge mine:score failed: FileNotFound" in r.err)
    r = suite.run("dpo.py", *flags, "mine:nan", cwd=tmp_path)
    assert r.rc == 1 and "Traceback" not in r.err and "--judge mine:nan: expected 8 finite numbers" in r.err


def test_health_says_what_is_wrong_and_nothing_else():
    """Each warning where its trouble is, none in a run that learns, none before there is enough to judge
    by."""
    def log(margin, chosen, n=80):
        return [{"loss": 0.7, "accuracy": 1.0, "margin": margin * i / n, "chosen_reward": chosen * i / n,
                 "rejected_reward": (chosen - margin) * i / n} for i in range(n)]

    def found(history, before=10.0, after=10.0):
        return set(health.of_preferences(history, {"length": before}, {"length": after}))

    assert found(log(2.0, 0.5)) == set() and found(log(0.0, 0.0, 49)) == set()
    assert found(log(0.01, 0.0)) == {"loss"}
    assert found(log(2.0, -1.0)) == {"chosen answers"}
    assert found(log(2.0, 0.5), 10.0, 16.0) == {"length"}
    # Steps of online DPO that found no pair log none of this; KTO logs no reward of a chosen answer.
    assert found([*log(2.0, 0.5), {"pairs": 0}]) == set()
    assert found([{"accuracy": 0.5, "margin": 0.0, "z": 0.0}] * 60) == {"loss"}


def test_win_rate():
    before = [{"gold": x} for x in (0.0, 0.5, 1.0, 0.2)]
    assert report.win_rate(before, [{"gold": x} for x in (1.0, 0.5, 0.0, 0.3)]) == 2.5 / 4


# ------------------------------------------------------------------------------------------------------------
# Files that people have, with a model that needs no chain.


@pytest.fixture
def small(tmp_path):
    """A folder with a small untrained chat model."""
    torch.manual_seed(0)
    tok = chat_tokenizer()
    shape = dict(vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16,
                 n_inner=32, head_dim=8)
    save(tmp_path / "model",
         GPT(GPTConfig(**shape, norm="rmsnorm", pos="rope", mlp="swiglu", bias=False)), tok)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(i, words=1):
    return {"prompt": f"Number {i}? " + "word " * words, "chosen": f"Yes, {i}.", "rejected": f"No. {i * i}"}


def test_prompts_longer_than_the_context(suite, small):
    """All of them: one sentence that says how many and what limits them. Some of them, the first ones: they
    are counted, and test prompts are taken from the others."""
    flags = ["--init", small / "model", "--max_new", 8, "--held_out", 0.2, "--max_steps", 1]
    path = write(small / "long.jsonl", [pair(i, 90) for i in range(40)])
    r = suite.run("dpo.py", *flags, "--data", path, "--out", small / "x")
    assert r.rc == 1 and "Traceback" not in r.err and len(r.err.strip().splitlines()) == 1
    assert f"{path}: " in r.err and "40 with prompts of more than 128 tokens (--max_prompt)" in r.err
    path = write(small / "some.jsonl", [pair(i, 90) for i in range(40)] + [pair(i) for i in range(40, 60)])
    r = suite.ok("dpo.py", *flags, "--data", path, "--out", small / "y")
    assert "40 with prompts of more than 128 tokens" in r.out and len(rows_of(small / "y")) == 1


def test_one_pair_is_enough(suite, small):
    """A step in each pass, and a checkpoint at the end."""
    path = write(small / "two.jsonl", [pair(1), pair(2)])
    r = suite.ok("dpo.py", "--init", small / "model", "--data", path, "--max_new", 4, "--out", small / "x")
    assert "1 to train on, 1 held out" in r.out and len(rows_of(small / "x")) == 2
    assert (small / "x" / "model.safetensors").exists()


@pytest.mark.parametrize("script", ["dpo.py", "sft.py", "reward.py"])
def test_a_short_trial_has_the_schedule_of_its_own_steps(suite, small, script):
    """--max_steps 5 of a long run is a run of 5 steps: otherwise it ends within the warm-up of the long
    one."""
    rows = [pair(i) for i in range(24)]
    if script == "sft.py":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    flags = ["--init", small / "model", "--data", write(small / "rows.jsonl", rows), "--batch_size", 4,
             "--held_out", 0.2, "--warmup", 30, "--max_new", 4, "--lr", 1e-3, "--dtype", "float32", "--out"]
    suite.ok(script, *flags, small / "whole", "--epochs", 1)
    n = len(rows_of(small / "whole"))
    suite.ok(script, *flags, small / "short", "--epochs", 9, "--max_steps", n)
    files = [(small / x / "model.safetensors").read_bytes() for x in ("whole", "short")]
    assert files[0] == files[1] and len(rows_of(small / "short")) == n


@pytest.mark.parametrize("change", ["reordered", "one_removed", "appended", "same"])
def test_what_is_kept_belongs_to_its_data(suite, small, change):
    """The reference's log-probs are kept by row number: with other rows they would be those of other answers.
    The run is refused then, and goes on with the same rows."""
    rows = [pair(i) for i in range(30)]
    data, out = write(small / "a.jsonl", rows), small / "x"
    flags = ["--init", small / "model", "--data", data, "--batch_size", 4, "--held_out", 0.2, "--max_new", 4,
             "--lr", 1e-3, "--warmup", 0, "--dtype", "float32", "--sft_coef", 0, "--max_steps", 4, "--out"]
    assert "after step 2" in suite.finish(suite.start_and_stop(2, "dpo.py", *flags, out)).err
    state = (out / "state.pt").read_bytes()
    changed = {"reordered": rows[::-1], "one_removed": rows[1:], "appended": [*rows, pair(99)], "same": rows}
    write(data, changed[change])
    r = suite.run("dpo.py", *flags, out)
    if change == "same":
        whole = suite.ok("dpo.py", *flags, small / "whole")
        told = "instead of a second model"
        assert r.rc == 0 and told in whole.out and told not in r.out
        for row, other in zip(rows_of(out), rows_of(small / "whole"), strict=True):
            assert row | {"tok_s": 0} == other | {"tok_s": 0}
        assert ((out / "model.safetensors").read_bytes()
                == (small / "whole" / "model.safetensors").read_bytes())
    else:
        assert (r.rc == 1 and str(data) in r.err and "changed" in r.err
                and len(r.err.strip().splitlines()) == 1)
        assert (out / "state.pt").read_bytes() == state and len(rows_of(out)) == 2
