"""Direct preference optimisation and its family: learn from comparisons, no reward model, no sampling.

    python dpo.py                                          the tiny world; makes base, sft, reward if missing
    python dpo.py --loss ipo --out out/ipo                 dpo | ipo | simpo | orpo | kto
    python dpo.py --online --out out/online                compare new answers of the policy itself
    python dpo.py --init SFT --data pairs.jsonl --lr 1e-6  your policy, your comparisons (data/formats.py)

The best policy under  E[r(x, y)] - beta KL(pi || pi_ref)  is  pi*(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta). So
a policy is itself a reward model,  r(x, y) = beta log pi(y|x) / pi_ref(y|x) + const(x),  and is fitted to
comparisons as one (arXiv:2305.18290, eq. 4-7). With w the chosen and l the rejected answer, |y| tokens long,

    h = log pi(w|x) / pi_ref(w|x) - log pi(l|x) / pi_ref(l|x)

    DPO    - log sigmoid(beta h)                                                    arXiv:2305.18290, eq. 7
    IPO    (h - 1 / (2 beta))^2,   log-ratios averaged over tokens, as its authors do     2310.12036, eq. 17
    SimPO  - log sigmoid(beta (log pi(w|x) / |w| - log pi(l|x) / |l|) - gamma)            2405.14734, eq. 6
    ORPO   - log pi(w|x) / |w| - lambda log sigmoid(log odds(w|x) - log odds(l|x)),       2403.07691, eq. 6-7
           odds = p / (1 - p), p the geometric mean of the token probabilities
    KTO    1 - sigmoid(beta (r - z)) for a good answer, 1 - sigmoid(beta (z - r)) for a bad one,
           r = log pi / pi_ref, z = max(0, mean r of answers to OTHER prompts), no gradient
                                                                                          2402.01306, eq. 8

If a share p prefers w, the loss of a pair is p L(h) + (1 - p) L(-h). cDPO (--label_smoothing e) says that a
label is wrong with probability e: p (1 - e) + (1 - p) e. rDPO (--flip_rate e, arXiv:2403.00409) undoes that,
for an unbiased loss: (p - e) / (1 - 2e). --sft_coef adds - log pi(w|x) / |w| (arXiv:2404.19733, eq. 1).

One step:
  1. comparisons   the next ones of the data, or (--online) of two new answers to each of some prompts
  2. reference     log pi_ref(y|x) of both answers, computed once for all data and kept: one model in memory
  3. loss          one of the above, the mean over the step
  4. update        AdamW

To add a loss, write its function and its row of LOSSES.
"""
import math
import random
import time
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data import InputError, formats, report, sample, world
from data.checkpoint import load
from data.parallel import WORLD, all_sum, even_share, micro_batches, prepare
from data.rewards import Rewards
from data.run import (Run, RunFlags, adamw, batches, chain_columns, cosine, need, program, seeded,
                      set_lr, setup, sibling)
from model import frozen, logprobs_from, pad_batch, refresh, sampling_copy, token_logprobs, with_lora

# ------------------------------------------------------------------------------------------------------------
# The losses as pure functions: (B,) of h (B,), the implicit reward of the chosen answer minus that of the
# rejected one, without beta. LOSSES says what these rewards are.


def dpo(h, beta, cfg=None):
    """arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(beta * h)


def ipo(h, beta, cfg=None):
    """arXiv:2310.12036, eq. 17."""
    return (h - 1 / (2 * beta)) ** 2


def simpo(h, beta, cfg):
    """arXiv:2405.14734, eq. 6. (The paper's tables give gamma / beta.)"""
    return -F.logsigmoid(beta * h - cfg.gamma)


def log_odds(p):
    """log(e^p / (1 - e^p)) of mean log-probs p < 0, without overflow, or 0 * inf in the gradient."""
    p = p.clamp(max=-1e-7)
    near_0 = p > -math.log(2)
    of_near = torch.log(-torch.expm1(torch.where(near_0, p, -1.0)))
    of_far = torch.log1p(-torch.exp(torch.where(near_0, -1.0, p)))
    return p - torch.where(near_0, of_near, of_far)


def orpo(h, beta, cfg):
    """arXiv:2403.07691, eq. 6, second term; the first one is `nll` of its row."""
    return -cfg.odds_coef * F.logsigmoid(h)


def kto_loss(r, good, z, beta, good_weight=1.0, bad_weight=1.0):
    """arXiv:2402.01306, eq. 8. r (B,): log-ratios; good (B,): 1 or 0; z: the reference point, a number."""
    gain = torch.where(good > 0.5, r - z, z - r)
    return torch.where(good > 0.5, good_weight, bad_weight) * (1 - (beta * gain).sigmoid())


@dataclass
class Loss:
    """A row of LOSSES."""
    rewards: typing.Callable      # (logp, ref, n) -> (2, B): rewards of the chosen (row 0) and the rejected
                                  # answers, from their log-probs (2, B) under policy and reference, summed
                                  # over tokens, and their numbers of tokens (2, B)
    of: typing.Callable           # (h, beta, cfg) -> (B,)
    beta: float                   # default of --beta
    needs_reference: bool
    start: str                    # the link of the chain that it starts from
    nll: float = 0.0              # weight of - log pi(w|x) / |w| that is part of it


LOSSES = {
    #             rewards                                  loss      beta  reference  starts from
    "dpo":   Loss(lambda logp, ref, n: logp - ref,         dpo,      0.3,  True,      "sft"),
    "ipo":   Loss(lambda logp, ref, n: (logp - ref) / n,   ipo,      0.5,  True,      "sft"),
    "simpo": Loss(lambda logp, ref, n: logp / n,           simpo,    2.0,  False,     "sft"),
    "orpo":  Loss(lambda logp, ref, n: log_odds(logp / n), orpo,     1.0,  False,     "base", nll=1.0),
    "kto":   Loss(None,                                    None,     0.3,  True,      "sft"),  # kto_losses
}


@dataclass
class Config(RunFlags):
    """The flags of `python dpo.py`."""
    # Model and data
    init: str = ""                # policy to start from, and the reference (default: sft; orpo: base)
    data: str = ""                # comparisons, for kto also single answers, good or bad (default: those of
                                  # reward); with --online prompts (default: the tiny world's)
    max_prompt: int = 128         # tokens; longer prompts are left out and counted
    max_len: int = 256            # tokens of prompt and answer; longer answers are cut and then carry no EOS
    held_out: float = 0.1         # share of the prompts kept for the report
    max_new: int = 32             # longest sampled answer, in tokens
    lora: int = 0                 # rank of adapters on a frozen trunk, the reference (0: train all)
    # Loss
    loss: typing.Literal[tuple(LOSSES)] = "dpo"   # see the equations above
    beta: float = 0.0             # strength of the pull to the reference (0: what suits the loss, see LOSSES)
    label_smoothing: float = 0.0  # cDPO: chance that a label is wrong, below 0.5
    flip_rate: float = 0.0        # rDPO: the same, but undone
    sft_coef: float = 0.2         # weight of the chosen answer's own - log pi / length (not kto); keeps
                                  # sentences whole
    gamma: float = 1.0            # SimPO: margin that the chosen answer must win by
    odds_coef: float = 1.0        # ORPO: lambda
    good_weight: float = 1.0      # KTO: weight of good answers
    bad_weight: float = 1.0       # KTO: weight of bad answers
    # Online
    online: bool = False          # sample two answers to each prompt of a step and compare those
    judge: str = "annotator"      # annotator (of the tiny world), a reward model, or module:function
    noise: float = 0.05           # of the annotator: 0 always picks the better answer (see reward.py)
    online_steps: int = 150       # steps, each of --batch_size prompts
    # Training
    epochs: int = 2               # passes over the comparisons
    batch_size: int = 64          # pairs (kto: answers) a step
    micro_batch: int = 64         # pairs per forward pass; smaller needs less memory and changes nothing else
    lr: float = 3e-4              # peak learning rate of AdamW (5e-7 to 5e-6 for real models)
    warmup: int = 10              # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.0     # on matrices only
    grad_clip: float = 1.0        # largest gradient norm


def share_preferring(p, label_smoothing=0.0, flip_rate=0.0):
    """What a label p counts as: cDPO pulls it to 1/2, rDPO inverts that. Linear in p: no loss need know."""
    p = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return (p - flip_rate) / (1 - 2 * flip_rate)


def pair_loss(cfg, beta, logp, ref, n, p):
    """Losses (B,) and implicit rewards (2, B) of pairs. logp, ref, n (2, B): see Loss; p (B,): the share of
    people who prefer the chosen answer."""
    spec = LOSSES[cfg.loss]
    p = share_preferring(p, cfg.label_smoothing, cfg.flip_rate)
    rewards = spec.rewards(logp, ref, n)                                            # (2, B)
    h = rewards[0] - rewards[1]
    loss = p * spec.of(h, beta, cfg) + (1 - p) * spec.of(-h, beta, cfg)
    nll_coef = spec.nll + cfg.sft_coef
    if nll_coef:
        loss = loss - nll_coef * logp[0] / n[0]
    return loss, beta * rewards


# ------------------------------------------------------------------------------------------------------------
# Data. An example is (prompt ids, first answer ids, second answer ids, label). Of a pair the second answer is
# the rejected one and the label the share that prefers the first; KTO labels the first answer good or bad.


def encode(rows, tok, max_prompt, max_len):
    """Preference or KTO rows as examples, and a Counter. Prompts of more than max_prompt tokens are left out
    ("long"), never cut: their BOS and headers tell the model what it reads. Answers are cut where prompt and
    answer reach max_len ("cut") and then carry no EOS: a cut is not an end. Pairs whose answers do not differ
    within it would teach nothing and are left out ("equal"). KTO's one answer also stands as the second."""
    out, counts = [], Counter()
    for row in rows:
        answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
        prompt, first = tok.render_answer(row["prompt"], answers[0])
        _, second = tok.render_answer(row["prompt"], answers[-1])
        room = max_len - len(prompt)
        if len(prompt) > max_prompt:
            counts["long"] += 1
        elif len(answers) == 2 and first[:room] == second[:room]:
            counts["equal"] += 1
        else:
            counts["cut"] += max(len(first), len(second)) > room
            out.append((prompt, first[:room], second[:room], float(row["label"])))
    return out, counts


def read_comparisons(path, kind, tok, cfg, max_len):
    """Examples of a file to train on, held-out ones, all its rows, and a sentence on what was left out. kind:
    preference or kto. InputError: nothing to train on or to hold out."""
    rows, dropped = formats.load(path, kind)
    decided = [row for row in rows if row["label"] != 0.5]    # from a tie only DPO would learn
    train_rows, held_rows = formats.split(decided, cfg.held_out, seed=0)
    max_prompt = min(cfg.max_prompt, max_len - 1)
    train, counts = encode(train_rows, tok, max_prompt, max_len)
    held, held_counts = encode(held_rows, tok, max_prompt, max_len)
    counts += held_counts
    n_ties = len(rows) - len(decided)
    told = (f"{len(train):,} to train on, {len(held):,} held out; left out: {n_ties:,} ties, "
            f"{counts['long']:,} with prompts of more than {max_prompt} tokens (--max_prompt), "
            f"{counts['equal']:,} with equal answers; {counts['cut']:,} cut at {max_len} tokens (--max_len)")
    if not train or not held:
        raise InputError(f"{path}: {told}; both need at least one (--held_out)")
    if kind == "kto" and len({label for *_, label in train}) < 2:
        raise InputError(f"{path}: {told}; kto needs good and bad answers to train on")
    return train, held, rows, f"{formats.describe(rows, dropped, path)}\n{told}"


def read_prompts(path, tok, max_prompt):
    """Prompt rows of a file, of at most max_prompt tokens, and a sentence. InputError: there are none."""
    rows, dropped = formats.load(path, "prompt")
    fitting = sample.short_enough(tok, rows, max_prompt)
    told = (f"{len(fitting):,} prompts to answer; {len(rows) - len(fitting):,} left out, of more than "
            f"{max_prompt} tokens (--max_prompt, --max_new)")
    if not fitting:
        raise InputError(f"{path}: {told}")
    return fitting, f"{formats.describe(rows, dropped, path)}\n{told}"


def length_of(example):
    """Tokens of an example, or of (prompt, answer), with its longest answer: what batches are sorted by."""
    return len(example[0]) + max(map(len, example[1:3]))


# ------------------------------------------------------------------------------------------------------------
# Pairs: two answers to one prompt.


def pair_logps(model, examples, tok):
    """Summed log-probs (2, B) of the first and the second answers of examples. Both follow their prompt in
    one row, so that it goes through the model once (arXiv:2410.20305):

        prompt, first answer, the prompt's last token once more, second answer, padding

    Each answer stands where it would alone, and sees the prompt and itself. The prompt's last token predicts
    the first one of an answer, so each answer has its own copy of it."""
    device = model.wte.weight.device
    rows, n_prompt, n_first = [], [], []
    for prompt, first, second, _ in examples:
        rows.append(prompt + first + prompt[-1:] + second)
        n_prompt.append([len(prompt)])
        n_first.append([len(first)])
    length = -(-max(map(len, rows)) // 8) * 8    # a multiple of 8: attention kernels want their masks aligned
    ids, real = pad_batch(rows, tok.pad_id, length=length)                          # (B, U) each
    n_prompt, n_first = torch.tensor(n_prompt), torch.tensor(n_first)               # (B, 1) each

    # Which tokens are the second answer's, which are shared, and where each stands in its own conversation.
    at = torch.arange(ids.shape[1])                                                 # (U,)
    is_second, is_shared = at >= n_prompt + n_first, at < n_prompt - 1              # (B, U) each
    pos = (at - is_second * (n_first + 1)) * real                                   # (B, U)
    is_answer = real & (at >= n_prompt) & (at != n_prompt + n_first)                # (B, U), stays on the CPU
    ids, pos = ids.to(device, non_blocking=True), pos.to(device, non_blocking=True)
    is_second = is_second.to(device, non_blocking=True)
    is_shared = is_shared.to(device, non_blocking=True)

    # Run the model, and add up what it says of each answer.
    sees = is_shared[:, None] | (is_second[:, None] == is_second[:, :, None])       # (B, U, U)
    hidden = model(ids, pos=pos, mask=sees.tril()[:, None])                         # (B, U, C)
    logp = logprobs_from(model, hidden, ids, is_answer)                             # (B, U), 0 elsewhere
    return torch.stack(((logp * ~is_second).sum(1), (logp * is_second).sum(1)))


def pair_losses(model, examples, known, tok, cfg):
    """Losses (B,) of pairs, and what is logged of them, {name: (B,)}, without gradient. known (2, B):
    log-probs of both answers under the reference."""
    n = [[len(first) for _, first, _, _ in examples], [len(second) for _, _, second, _ in examples]]
    n = torch.tensor(n, device=known.device)                                        # (2, B)
    p = torch.tensor([label for *_, label in examples], device=known.device)        # (B,)
    logp = pair_logps(model, examples, tok)                                         # (2, B)
    loss, rewards = pair_loss(cfg, cfg.beta or LOSSES[cfg.loss].beta, logp, known, n, p)
    better, worse = torch.where(p > 0.5, rewards, rewards.flip(0)).detach()         # (B,) each
    right = (better > worse).float() + 0.5 * (better == worse)
    return loss, {"loss": loss.detach(), "accuracy": right, "margin": better - worse,
                  "chosen_reward": better, "rejected_reward": worse}


# ------------------------------------------------------------------------------------------------------------
# KTO: single answers, good or bad. Their second answers belong to other prompts and make the reference point.


def mismatch(examples, seed):
    """Each example gets, as its second answer, one to a different prompt, drawn once and for all, so that the
    reference's log-probs can be kept (arXiv:2402.01306, 4.1: the estimate of the reference point)."""
    n, out = len(examples), list(examples)
    order = random.Random(seed).sample(range(n), n)    # everybody looks for the next one in this order
    for k, i in enumerate(order):
        prompt, answer, _, label = examples[i]
        other = None
        for shift in range(1, n):
            candidate = examples[order[(k + shift) % n]]
            if candidate[0] != prompt:
                other = candidate[1]
                break
        if other is None:
            raise InputError("kto: all rows have the same prompt; its reference point needs answers to other "
                             "prompts")
        out[i] = (prompt, answer, other, label)
    return out


def logps(model, pairs, tok):
    """Summed log-probs (N,) of answers given prompts, [(prompt ids, answer ids)]."""
    rows = [prompt + answer for prompt, answer in pairs]
    marks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs]
    ids, _ = pad_batch(rows, tok.pad_id, model.wte.weight.device)                   # (N, T)
    mask, _ = pad_batch(marks, 0)                                                   # (N, T), on the CPU
    return token_logprobs(model, ids, mask.bool()).sum(1)


def with_reference_point(model, examples, ref, tok, cfg):
    """What kto_losses has to know, (2, B): log-probs of the labelled answers under the reference, and the
    reference point z, the same in each column. ref (2, B): log-probs of both answers under the reference."""
    others = [(prompt, other) for prompt, _, other, _ in examples]
    z = (all_logps(logps, model, others, tok, cfg.micro_batch) - ref[1]).mean().clamp(min=0.0)
    return torch.stack((ref[0], z.expand(len(examples))))


def kto_losses(model, examples, known, tok, cfg):
    """Losses (B,) of labelled answers, and what is logged of them, {name: (B,)}, without gradient. known: see
    with_reference_point."""
    ref, z = known                                                                  # (B,) each
    beta = cfg.beta or LOSSES["kto"].beta
    good = torch.tensor([label for *_, label in examples], device=known.device)     # (B,)
    r = logps(model, [(prompt, answer) for prompt, answer, _, _ in examples], tok) - ref
    loss = kto_loss(r, good, z, beta, cfg.good_weight, cfg.bad_weight)
    gain = torch.where(good > 0.5, r - z, z - r).detach()
    right = (gain > 0).float() + 0.5 * (gain == 0)
    return loss, {"loss": loss.detach(), "accuracy": right, "margin": 2 * beta * gain, "z": z}


def kto_steps(steps, policy, run):
    """Steps as `offline_steps` yields them, with what kto_losses has to know."""
    for step, examples, ref_logp in steps:
        yield step, examples, with_reference_point(policy, examples, ref_logp, run.tok, run.cfg)


# ------------------------------------------------------------------------------------------------------------
# The reference's log-probs, and where the steps come from.


@torch.no_grad()
def all_logps(logps_of, model, items, tok, size, say=None):
    """logps_of(model, items, tok), (.., N), of many items: `size` of similar length at a time, each rank its
    share. Policy and reference must go the same way, so that they start equal. say: prints progress."""
    mine = even_share([length_of(item) for item in items])
    total, times, spoke = None, None, time.time()
    for start in range(0, len(mine), size):
        part = mine[start: start + size]
        logp = logps_of(model, [items[i] for i in part], tok)                       # (.., n)
        if total is None:
            total = logp.new_zeros(logp.shape[:-1] + (len(items),))                 # (.., N)
            times = logp.new_zeros(len(items))
        total[..., part] = logp
        times[part] = 1.0
        if say and time.time() - spoke > 4:
            spoke = time.time()
            say(f"log-probs of the reference: {start * WORLD:,} of {len(items):,}")
    return all_sum(total) / all_sum(times)


def reference_logps(policy, examples, run):
    """Log-probs (2, N) of both answers of examples under the reference, which the policy still is."""
    cfg, start = run.cfg, time.time()
    if not LOSSES[cfg.loss].needs_reference:
        return torch.zeros(2, len(examples), device=policy.wte.weight.device)
    if cfg.loss == "kto":
        own = [(prompt, answer) for prompt, answer, _, _ in examples]
        others = [(prompt, other) for prompt, _, other, _ in examples]
        out = all_logps(logps, policy, own + others, run.tok, cfg.micro_batch, run.say).view(2, -1)
    else:
        out = all_logps(pair_logps, policy, examples, run.tok, cfg.micro_batch, run.say)
    n_bytes = sum(p.nbytes for p in policy.parameters())
    run.say(f"log-probs of the reference: {out.numel():,} answers once, {time.time() - start:.0f} s, "
            f"{out.nbytes:,} bytes kept instead of a second model of {n_bytes:,}")
    return out


def offline_steps(run, plan, train, ref_logp):
    """Yield (step, its examples, the reference's log-probs of them (2, B)) of given comparisons."""
    for step in run.steps():
        yield step, [train[i] for i in plan[step]], ref_logp[:, plan[step]]


def online_steps(run, plan, rows, policy, sampler, reference, judge):
    """Yield (step, examples, the reference's log-probs of them (2, B)) of new answers of the policy to the
    prompts of plan[step] (arXiv:2402.04792). With several processes, the last pairs that do not divide evenly
    over them are left out."""
    cfg = run.cfg
    for step in run.steps():
        refresh(sampler, policy)
        examples = online_pairs(sampler, run.tok, [rows[i] for i in plan[step]], judge, cfg, step)
        examples = examples[: len(examples) // WORLD * WORLD]
        ref_logp = torch.zeros(2, len(examples), device=policy.wte.weight.device)
        if reference is not None and examples:
            ref_logp = all_logps(pair_logps, reference, examples, run.tok, cfg.micro_batch)
        yield step, examples, ref_logp


def online_pairs(policy, tok, rows, judge, cfg, step):
    """Examples: two new answers of the policy to each row's prompt, compared by judge(rows, texts) ->
    utilities. What cannot be compared (equal answers, neither finished, a tie) is left out; an unfinished
    answer loses."""
    twice = []
    for row in rows:
        twice += [row, row]
    texts, prompts, answers = sample.respond(policy, tok, [row["prompt"] for row in twice], cfg.max_new,
                                             seeded(cfg.seed, step))
    utilities, rng, out = judge(twice, texts), random.Random(f"{cfg.seed} {step}"), []
    noise = cfg.noise if cfg.judge == "annotator" else 0.0
    for i in range(0, len(twice), 2):
        first, second = answers[i], answers[i + 1]
        ended = [sample.ended(tok, first), sample.ended(tok, second)]
        if first == second or not any(ended):
            continue
        p = float(ended[0])     # the chance that the first one is preferred
        if all(ended):
            p = world.annotate(utilities[i], utilities[i + 1], noise, rng)
        if p == 1.0:
            out.append((prompts[i], first, second, 1.0))
        elif p == 0.0:
            out.append((prompts[i], second, first, 1.0))
    return out


def judge_of(name, device):
    """judge(rows, texts) -> utilities (list of floats) of answers to prompt rows: the tiny world's annotator,
    or what data/rewards.py knows."""
    if name == "annotator":
        annotator = world.Annotator()
        return lambda rows, texts: [annotator.utility(row, text) for row, text in zip(rows, texts)]
    rewards = Rewards("--judge", name)
    for model in rewards.models():
        frozen(model).to(device)
    return rewards.score_texts


# ------------------------------------------------------------------------------------------------------------


def find_start(cfg):
    """(policy to start from, data): what the flags name, or links of the chain, made if they are missing.
    InputError: flags that do not go together."""
    if cfg.label_smoothing >= 0.5 or cfg.flip_rate >= 0.5:
        raise InputError("--label_smoothing and --flip_rate must be below 0.5: at one half a label says "
                         "nothing")
    if cfg.online and (cfg.loss in ("kto", "orpo") or (cfg.data and cfg.judge == "annotator")):
        raise InputError("--online compares pairs of a policy's answers: it needs --loss dpo, ipo or simpo, "
                         "and for prompts of your own (--data) a --judge that knows them")
    start, links = LOSSES[cfg.loss].start, []
    if not cfg.init:
        links.append(start)
    if not cfg.data and not cfg.online:
        links.append("reward")           # for the comparisons it makes
    if links:
        need(cfg, *links)
    data = Path(sibling(cfg, "reward")) / "comparisons.jsonl"
    if cfg.online:
        data = world.TINY / "rl.jsonl"
    return cfg.init or sibling(cfg, start), cfg.data or data


def add_up(sums, figures, n):
    """Add to sums {name: float tensor} the figures {name: (B,)} of some of n examples, divided by n."""
    for name, x in figures.items():
        sums[name] = sums.get(name, 0.0) + x.sum() / n


@torch.no_grad()
def held_out_figures(losses, policy, held, known, tok, cfg):
    """Means of what `losses` logs of held-out examples. known (2, N): what it has to know of them."""
    sums = {}
    for i in range(0, len(held), cfg.micro_batch):
        part = slice(i, i + cfg.micro_batch)
        _, figures = losses(policy, held[part], known[:, part], tok, cfg)
        add_up(sums, figures, len(held))
    return {name: x.item() for name, x in sums.items() if name != "z"}


def main(cfg):
    """Train a policy on comparisons, given or (--online) of its own answers."""
    device = setup(cfg)
    init, data = find_start(cfg)
    run = Run(cfg, "dpo", [init, data, cfg.judge] if cfg.online else [init, data])
    policy, tok = load(init)
    spec, is_kto = LOSSES[cfg.loss], cfg.loss == "kto"
    losses = kto_losses if is_kto else pair_losses

    # What there is to learn from, and which of it each step reads.
    context, plan, train, held = policy.cfg.max_len, [], [], []
    if cfg.online:
        rows, told = read_prompts(data, tok, min(cfg.max_prompt, context - cfg.max_new))
        for step in range(cfg.online_steps):
            plan.append(random.Random(f"{cfg.seed} {step}").choices(range(len(rows)), k=cfg.batch_size))
    else:
        kind = "kto" if is_kto else "preference"
        train, held, rows, told = read_comparisons(data, kind, tok, cfg, min(cfg.max_len, context))
        if is_kto:
            train, held = mismatch(train, cfg.seed), mismatch(held, cfg.seed)
        for epoch in range(cfg.epochs):
            plan += batches([length_of(example) for example in train], cfg.batch_size, cfg.seed, epoch)
    run.say(told)
    tests = report.test_prompts(policy, tok, cfg.max_new, rows if cfg.data else None, data)

    # The policy on its device and its optimizer. With adapters, its trunk is the reference. Else that is
    # loaded when a model is needed: for new answers, and for the KL at the end.
    reference = None
    if cfg.lora:
        reference = frozen(policy).to(device)
        policy = with_lora(reference, cfg.lora)
    elif cfg.online and spec.needs_reference:
        reference = frozen(load(init)[0]).to(device)
    sampler = sampling_copy(policy).to(device)
    policy = prepare(policy, cfg, device)
    optimizer = adamw(policy, cfg.weight_decay, eps=1e-6)
    run.begin(len(plan), tok, policy=(policy, optimizer))

    # What the reference says of all given comparisons, ref_logp (2, N), and where the steps come from.
    ref_logp = run.state.get("ref_logp")
    if cfg.online:
        known_by = reference if spec.needs_reference else None
        steps = online_steps(run, plan, rows, policy, sampler, known_by, judge_of(cfg.judge, device))
    else:
        if ref_logp is None:
            ref_logp = reference_logps(policy, train + held, run)
        ref_logp = ref_logp.to(device)
        steps = offline_steps(run, plan, train, ref_logp)
        if is_kto:
            steps = kto_steps(steps, policy, run)

    def measure(title):
        """Held-out figures, and what the policy answers to prompts it has not been trained on."""
        refresh(sampler, policy)
        figures, answers = run.measure(title, sampler, tests)
        if held:
            known = ref_logp[:, len(train):]
            if is_kto:
                known = with_reference_point(policy, held, known, tok, cfg)
            figures |= held_out_figures(losses, policy, held, known, tok, cfg)
        return figures, answers

    if run.first:
        before, first_answers = run.state["before"], run.state["answers"]
    else:
        before, answers = measure("before")
        first_answers = answers.scored

    # 1. and 2. Comparisons, and known (2, B): what the reference says of them (kto: and the reference point).
    for step, examples, known in steps:
        # 3. The loss: a mean over the whole step, micro-batch by micro-batch.
        lengths, sums = [length_of(example) for example in examples], {}
        for part in micro_batches(range(len(examples)), lengths, cfg.micro_batch):
            loss, figures = losses(policy, [examples[i] for i in part], known[:, part], tok, cfg)
            (loss.sum() / len(examples)).backward()
            add_up(sums, figures, len(examples))

        # 4. One step of AdamW; a gradient that is not finite never reaches the weights.
        set_lr(optimizer, cfg.lr * cosine(step, len(plan), cfg.warmup))
        norm = clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        if run.finite(norm, policy, plan[step]):
            optimizer.step()
        optimizer.zero_grad()

        # Write the log, save.
        figures = all_sum({name: x.item() for name, x in sums.items()})
        if cfg.online:
            figures["pairs"] = len(examples)
        n_tokens = sum(len(prompt) + len(first) + len(second) for prompt, first, second, _ in examples)
        run.log(step, tokens=n_tokens, **figures, grad_norm=norm.item())
        if run.due(step):
            run.save(step, before=before, answers=first_answers, ref_logp=ref_logp)

    # How good the policy has become, and how far it is from the reference.
    after, answers = measure("after")
    if reference is None:
        reference = frozen(load(init)[0]).to(device)
    after["kl"], _ = report.mean_kl(sampler, reference, tok, answers.prompt_ids, answers.ids)
    if tests.graded:     # share of test prompts on which gold is higher than at first, ties one half
        gold = [(old["gold"], new["gold"]) for old, new in zip(first_answers, answers.scored)]
        after["win_rate"] = sum((new > old) + 0.5 * (new == old) for old, new in gold) / len(gold)
    if after.get("chosen_reward", 0.0) < 0 and spec.needs_reference and not cfg.sft_coef:
        run.say("The chosen answers lost log-probability too: the loss only asks that the rejected ones lose "
                "more, and both share tokens. --sft_coef holds the chosen ones up.")
    columns = None
    if spec.start == "sft" and not cfg.data and not cfg.init:
        columns = chain_columns(cfg, cfg.loss.upper(), before, after)
    run.finish(before, after, columns, report.answer_rows(tests, first_answers, answers.scored))


if __name__ == "__main__":
    program(main, Config, __doc__)
