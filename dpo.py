"""Direct preference optimisation and its family: learn from comparisons, no reward model, no sampling.

    python dpo.py                                          the tiny world; makes base, sft, reward if missing
    python dpo.py --loss ipo --out out/ipo                 dpo | ipo | simpo | orpo | kto
    python dpo.py --online --out out/online                compare new answers of the policy itself
    python dpo.py --init SFT --data pairs.jsonl --lr 1e-6  your policy, your comparisons (data/files/formats.py)

The best policy under  E[r(x, y)] - beta KL(pi || pi_ref)  is  pi*(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta). So
a policy is itself a reward model,  r(x, y) = beta log pi(y|x) / pi_ref(y|x) + const(x),  and is fitted to
comparisons as one (arXiv:2305.18290, eq. 4-7). With w the chosen and l the rejected answer, |y| tokens long,

    h = log pi(w|x) / pi_ref(w|x) - log pi(l|x) / pi_ref(l|x)

    DPO    - log sigmoid(beta h)                                                    arXiv:2305.18290, eq. 7
    IPO    (h - 1 / (2 beta))^2,   log-ratios averaged over tokens, as its authors do     2310.12036, eq. 17
    SimPO  - log sigmoid(beta (log pi(w|x) / |w| - log pi(l|x) / |l|) - gamma)            2405.14734, eq. 6
    ORPO   - log pi(w|x) / |w| - beta log sigmoid(log odds(w|x) - log odds(l|x)),         2403.07691, eq. 6-7
           odds = p / (1 - p), p the geometric mean of the token probabilities
    KTO    1 - sigmoid(beta (r - z)) for a good answer, 1 - sigmoid(beta (z - r)) for a bad one,
           r = log pi / pi_ref, z = max(0, mean r of answers to OTHER prompts)            2402.01306, eq. 8

If a share p prefers w, the loss of a pair is p L(h) + (1 - p) L(-h). cDPO (--label_smoothing e) says that a
label is wrong with probability e: p (1 - e) + (1 - p) e. rDPO (--flip_rate e, arXiv:2403.00409) undoes that,
for an unbiased loss: (p - e) / (1 - 2e). --sft_coef c, 0.2 unless you say 0, adds - c log pi(w|x) / |w|
(arXiv:2404.19733, eq. 1) to all but KTO: with --sft_coef 0 the losses are those of the papers.

One step:
  1. comparisons   the next ones of the data, or (--online) of two new answers to each of some prompts
  2. reference     log pi_ref(y|x) of both answers, computed once for all data and kept: one model in memory
  3. loss          one of the above, the mean over the step
  4. update        AdamW

To add a loss, write its function and its row of LOSSES.
"""
import math
import random
import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data import InputError, report, world
from data.chain import chain_columns, need
from data.files.checkpoint import load
from data.comparisons import lengths_of, online_pairs, read_examples
from data.flags import RunFlags, program
from data.parallel import WORLD, all_sum, in_shares, micro_batches, prepare
from data.rewards import judge_of
from data.run import Run
from data.setup import adamw, batches, cosine, set_lr, setup
from data.sample import read_prompts
from model import (cast_weights, freeze, logprobs_from, pad_batch, refresh, sampling_copy, token_logprobs,
                   with_lora)

# ------------------------------------------------------------------------------------------------------------
# The losses as pure functions: (B,) of h (B,), the chosen answer's implicit reward minus the rejected one's,
# without beta; see LOSSES.


def dpo(h, cfg):
    """arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(cfg.beta * h)


def ipo(h, cfg):
    """arXiv:2310.12036, eq. 17."""
    return (h - 1 / (2 * cfg.beta)) ** 2


def simpo(h, cfg):
    """arXiv:2405.14734, eq. 6. (The paper's tables give gamma / beta.)"""
    return -F.logsigmoid(cfg.beta * h - cfg.simpo_gamma)


def log_odds(p):
    """log(e^p / (1 - e^p)) of mean log-probs p < 0, without overflow, or 0 * inf in the gradient."""
    # log(1 - e^p) has two forms, each of them exact on its own side of e^p = 1/2.
    p = p.clamp(max=-1e-7)
    near_0 = p > -math.log(2)
    of_near = torch.log(-torch.expm1(torch.where(near_0, p, -1.0)))
    of_far = torch.log1p(-torch.exp(torch.where(near_0, -1.0, p)))
    return p - torch.where(near_0, of_near, of_far)


def orpo(h, cfg):
    """arXiv:2403.07691, eq. 6, second term; the first one is `nll` of its row."""
    return -cfg.beta * F.logsigmoid(h)     # beta is the paper's lambda


@dataclass
class Loss:
    """A row of LOSSES."""
    reward: typing.Callable       # (logp, ref, n) -> (2, B): rewards, without beta, of the chosen (row 0) and
                                  # the rejected answers, from their log-probs (2, B) under policy and
                                  # reference, summed over tokens, and their numbers of tokens (2, B)
    loss: typing.Callable         # (h, cfg) -> (B,)
    beta: float                   # default of --beta
    needs_reference: bool
    start: str                    # the link of the chain that it starts from
    nll: float = 0.0              # weight of - log pi(w|x) / |w| that is part of it


LOSSES = {
    #             reward                                   loss      beta  reference  starts from
    "dpo":   Loss(lambda logp, ref, n: logp - ref,         dpo,      0.3,  True,      "sft"),
    "ipo":   Loss(lambda logp, ref, n: (logp - ref) / n,   ipo,      0.5,  True,      "sft"),
    "simpo": Loss(lambda logp, ref, n: logp / n,           simpo,    2.0,  False,     "sft"),
    "orpo":  Loss(lambda logp, ref, n: log_odds(logp / n), orpo,     1.0,  False,     "base", nll=1.0),
    "kto":   Loss(None,                                    None,     0.3,  True,      "sft"),   # kto_losses
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
    beta: float = 0.0             # strength of the pull to the reference, for orpo the weight of the odds (0:
                                  # what suits the loss, see LOSSES)
    label_smoothing: float = 0.0  # cDPO: chance that a label is wrong, below 0.5
    flip_rate: float = 0.0        # rDPO: the same, but undone
    sft_coef: float = 0.2         # weight of - log pi(w|x) / |w|, added to every loss but kto (0: the paper's
                                  # loss); keeps sentences whole
    simpo_gamma: float = 1.0      # SimPO: margin that the chosen answer must win by
    desirable_weight: float = 1.0     # KTO: weight of good answers
    undesirable_weight: float = 1.0   # KTO: weight of bad answers
    # Online
    online: bool = False          # sample two answers to each prompt of a step and compare those
    judge: str = "annotator"      # annotator or gold (of the tiny world), a reward model, or module:function
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


def pair_loss(cfg, logp, ref, n, p):
    """Losses (B,) and implicit rewards (2, B) of pairs. logp, ref, n (2, B): see Loss; p (B,): the share of
    people who prefer the chosen answer."""
    # What a label counts as: cDPO pulls it to 1/2, rDPO inverts that. The loss is linear in p.
    p = p * (1 - cfg.label_smoothing) + (1 - p) * cfg.label_smoothing
    p = (p - cfg.flip_rate) / (1 - 2 * cfg.flip_rate)

    # The loss, and the SFT term on the chosen answer.
    spec = LOSSES[cfg.loss]
    rewards = spec.reward(logp, ref, n)                                             # (2, B)
    h = rewards[0] - rewards[1]
    loss = p * spec.loss(h, cfg) + (1 - p) * spec.loss(-h, cfg)
    nll = -logp[0] / n[0]
    return loss + (spec.nll + cfg.sft_coef) * nll, cfg.beta * rewards


def wins(x):
    """1 where x (B,) is above 0, 1/2 where it is 0 up to rounding, else 0."""
    return (x > 1e-5).float() + 0.5 * (x.abs() <= 1e-5)


# ------------------------------------------------------------------------------------------------------------
# Pairs. An example is (prompt ids, chosen answer ids, rejected answer ids, share that prefers the first one).


def pair_logps(model, examples, tok):
    """Summed log-probs (2, B) of the first and the second answers of examples. Both follow their prompt in
    one row, so that it goes through the model once (arXiv:2410.20305):

        prompt, first answer, the prompt's last token once more, second answer, padding

    Each answer stands where it would alone, and sees the prompt and itself. The prompt's last token predicts
    the first one of an answer, so each answer has its own copy of it."""
    # The rows. U is a multiple of 8, because attention kernels want their masks aligned.
    rows = [prompt + first + prompt[-1:] + second for prompt, first, second, _ in examples]
    length = -(-max(map(len, rows)) // 8) * 8
    ids, real = pad_batch(rows, tok.pad_id, length=length)                          # (B, U) each
    n_prompt = torch.tensor([[len(prompt)] for prompt, _, _, _ in examples])        # (B, 1)
    n_first = torch.tensor([[len(first)] for _, first, _, _ in examples])           # (B, 1)

    # Which tokens are the second answer's, which are shared, and where each stands in its own conversation.
    at = torch.arange(ids.shape[1])                                                 # (U,)
    is_second, is_shared = at >= n_prompt + n_first, at < n_prompt - 1              # (B, U) each
    pos = (at - is_second * (n_first + 1)) * real                                   # (B, U)
    is_answer = real & (at >= n_prompt) & (at != n_prompt + n_first)                # (B, U), stays on the CPU

    # Run the model, and add up what it says of each answer. Token i sees what is shared and its own answer.
    device = model.wte.weight.device
    for_model = (ids, pos, is_second, is_shared)
    ids, pos, is_second, is_shared = [x.to(device, non_blocking=True) for x in for_model]
    attends = is_shared[:, None] | (is_second[:, None] == is_second[:, :, None])    # (B, U, U)
    hidden = model(ids, pos=pos, attn_mask=attends.tril()[:, None])                 # (B, U, C)
    logp = logprobs_from(model, hidden, ids, is_answer)                             # (B, U), 0 elsewhere
    return torch.stack(((logp * ~is_second).sum(1), (logp * is_second).sum(1)))


def all_logps(model, examples, tok, size, say=None):
    """`pair_logps` of many examples, (2, N), without gradients and `size` at a time."""
    def of(rows):
        return pair_logps(model, [examples[i] for i in rows], tok)

    return in_shares(of, lengths_of(examples), size, say)


def pair_losses(model, examples, ref_logp, tok, cfg):
    """Losses (B,) of pairs, and what is logged of them, {name: (B,)}, without gradient. ref_logp (2, B):
    log-probs of both answers under the reference."""
    n = [[len(first) for _, first, _, _ in examples], [len(second) for _, _, second, _ in examples]]
    n = torch.tensor(n, device=ref_logp.device)                                     # (2, B)
    p = torch.tensor([label for *_, label in examples], device=ref_logp.device)     # (B,)
    logp = pair_logps(model, examples, tok)                                         # (2, B)
    loss, rewards = pair_loss(cfg, logp, ref_logp, n, p)

    # For the log: is the chosen answer rewarded more, and by how much?
    chosen, rejected = rewards.detach()                                             # (B,) each
    margin = chosen - rejected
    return loss, {"loss": loss.detach(), "accuracy": wins(margin), "margin": margin, "chosen_reward": chosen,
                  "rejected_reward": rejected}


# ------------------------------------------------------------------------------------------------------------
# KTO: single answers. An example is (prompt ids, answer ids, ids of an answer to ANOTHER prompt, label 1 for
# good or 0 for bad). These other answers, put behind this prompt, make the reference point z.


def kto_loss(r, good, z, cfg):
    """arXiv:2402.01306, eq. 8. r (B,): log-ratios; good (B,): 1 or 0; z: the reference point, a number."""
    gain = torch.where(good > 0.5, r - z, z - r)
    weight = torch.where(good > 0.5, cfg.desirable_weight, cfg.undesirable_weight)
    return weight * (1 - (cfg.beta * gain).sigmoid())


def answer_logps(model, examples, which, tok):
    """Summed log-probs (B,) of the labelled (which = 1) or the other answers (2) of examples."""
    rows = [example[0] + example[which] for example in examples]
    ids, real = pad_batch(rows, tok.pad_id)                                         # (B, T) each
    n_prompt = torch.tensor([[len(prompt)] for prompt, *_ in examples])             # (B, 1)
    mask = real & (torch.arange(ids.shape[1]) >= n_prompt)                          # (B, T)
    return token_logprobs(model, ids.to(model.wte.weight.device), mask).sum(1)


def kto_z(model, examples, ref_logp, tok, cfg):
    """KTO's reference point z, (): the mean log-ratio of the answers to OTHER prompts in the whole step, at
    least 0, without gradient. ref_logp (B,): their log-probs under the reference."""
    def of(rows):
        return answer_logps(model, [examples[i] for i in rows], 2, tok)

    logp = in_shares(of, lengths_of(examples), cfg.micro_batch)     # (B,)
    return (logp - ref_logp).mean().clamp(min=0.0)


def kto_losses(model, examples, ref_logp, tok, cfg, z):
    """The same as pair_losses, of labelled answers. z: of kto_z."""
    good = torch.tensor([label for *_, label in examples], device=ref_logp.device)  # (B,)
    r = answer_logps(model, examples, 1, tok) - ref_logp[0]                         # (B,)
    loss = kto_loss(r, good, z, cfg)

    # For the log: does a good answer gain more than z, a bad one less? Twice the mean gain is the reward of
    # good answers minus that of bad ones, where there are as many.
    gain = torch.where(good > 0.5, r - z, z - r).detach()
    return loss, {"loss": loss.detach(), "accuracy": wins(gain), "margin": 2 * cfg.beta * gain,
                  "z": z.expand(len(examples))}


def losses_of_step(model, examples, ref_logp, tok, cfg):
    """The function that gives the losses of a step's examples, micro-batch by micro-batch: pair_losses, or
    kto_losses with z of the whole step, which is known before the first of them. ref_logp: (2, B)."""
    if cfg.loss != "kto":
        return pair_losses
    return partial(kto_losses, z=kto_z(model, examples, ref_logp[1], tok, cfg))


# ------------------------------------------------------------------------------------------------------------
# Where a run starts from, and the training itself.


def find_start(cfg):
    """(policy to start from, data): what the flags name, or links of the chain, made if they are missing.
    InputError: flags that do not go together."""
    if max(cfg.label_smoothing, cfg.flip_rate) >= 0.5:
        raise InputError("--label_smoothing and --flip_rate must be below 0.5: at 0.5 a label says nothing")
    if cfg.online and (cfg.loss in ("kto", "orpo") or (cfg.data and cfg.judge in ("annotator", "gold"))):
        raise InputError("--online compares pairs of a policy's answers: it needs --loss dpo, ipo or simpo, "
                         "and for prompts of your own (--data) a --judge that knows them")
    data = cfg.data
    if not data and cfg.online:
        data = world.TINY / "rl.jsonl"
    elif not data:
        data = Path(need(cfg, "reward")) / "comparisons.jsonl"       # makes the SFT model too
    return cfg.init or need(cfg, LOSSES[cfg.loss].start), data


def reference_logps(reference, examples, tok, cfg, say=None):
    """Log-probs (2, N) of both answers of examples under the reference; 0 for a loss without one."""
    if not LOSSES[cfg.loss].needs_reference or not examples:
        return torch.zeros(2, len(examples), device=reference.wte.weight.device)
    if say:
        n_bytes = sum(p.nbytes for p in reference.parameters())
        say(f"the reference reads {len(examples):,} examples once; {8 * len(examples):,} bytes are kept "
            f"instead of a second model of {n_bytes:,}")
    return all_logps(reference, examples, tok, cfg.micro_batch, say)


def main(cfg):
    """Train a policy on comparisons, given or (--online) of its own answers."""
    device = setup(cfg)
    cfg.beta = cfg.beta or LOSSES[cfg.loss].beta
    init, data = find_start(cfg)
    run = Run.open(cfg, "dpo", [init, data, cfg.judge] if cfg.online else [init, data])
    policy, tok = load(init)

    # What there is to learn from, and which of it each step reads.
    context, plan, train, held = policy.cfg.max_len, [], [], []
    if cfg.online:
        rows = read_prompts(run, data, tok, min(cfg.max_prompt, context - cfg.max_new))
        judge = judge_of("--judge", cfg.judge, device)
        if WORLD > 1:
            run.say(f"a step's last pairs that do not divide evenly over {WORLD} processes are left out; "
                    "log.jsonl counts them, pairs_left_over")
        for step in range(cfg.online_steps):
            plan.append(random.Random(f"{cfg.seed} {step}").choices(range(len(rows)), k=cfg.batch_size))
    else:
        kind = "kto" if cfg.loss == "kto" else "preference"
        train, held, rows = read_examples(run, data, kind, tok, min(cfg.max_len, context))
        for epoch in range(cfg.epochs):
            plan += batches(lengths_of(train), cfg.batch_size, cfg.seed, epoch)
    tests = report.test_prompts(policy, tok, cfg.max_new, rows if cfg.data else None, data)

    # The policy on its device and its optimizer. With adapters, its frozen trunk is the reference. Else the
    # reference is a second model, loaded when one is needed: for new answers, and for the KL at the end.
    reference = None
    if cfg.lora:
        reference = cast_weights(freeze(policy)).to(device)
        policy = with_lora(reference, cfg.lora)
    elif cfg.online:
        reference = cast_weights(freeze(load(init)[0])).to(device)
    sampler = sampling_copy(policy).to(device)
    policy = prepare(policy, cfg, device)
    optimizer = adamw(policy, cfg.weight_decay, eps=1e-6)
    run.begin(len(plan), tok, policy=(policy, optimizer))

    # The reference's log-probs of all given comparisons, (2, N), computed once: the policy still is the
    # reference.
    all_ref_logp = run.state.get("ref_logp")
    if not cfg.online:
        if all_ref_logp is None:
            all_ref_logp = reference_logps(policy, train + held, tok, cfg, run.say)
        all_ref_logp = all_ref_logp.to(device)

    def measure(title):
        """Held-out figures, and what the policy answers to test prompts (--data: to held-out ones first)."""
        refresh(sampler, policy)
        figures, answers = run.measure(title, sampler, tests)
        if held:
            ref_logp = all_ref_logp[:, len(train):]
            losses = losses_of_step(policy, held, ref_logp, tok, cfg)
            figures |= report.held_out_figures(losses, policy, held, ref_logp, tok, cfg)
        return figures, answers

    before, first_answers = run.before(measure)
    for step in run.steps():
        # 1. and 2. Comparisons, the next ones of the data or of two new answers to each of some prompts, and
        #    the reference's log-probs of both answers, ref_logp (2, B).
        if cfg.online:
            refresh(sampler, policy)
            found = online_pairs(sampler, tok, [rows[i] for i in plan[step]], judge, cfg, step)
            examples = found[: len(found) // WORLD * WORLD]     # as many for each process
            ref_logp = reference_logps(reference, examples, tok, cfg)
        else:
            examples, ref_logp = [train[i] for i in plan[step]], all_ref_logp[:, plan[step]]

        # 3. Loss: a mean over the whole step, micro-batch by micro-batch.
        losses = losses_of_step(policy, examples, ref_logp, tok, cfg)
        lengths, parts = lengths_of(examples), []
        for part in micro_batches(range(len(examples)), lengths, cfg.micro_batch):
            loss, figures = losses(policy, [examples[i] for i in part], ref_logp[:, part], tok, cfg)
            (loss.sum() / len(examples)).backward()
            parts.append(figures)

        # 4. Update: one step of AdamW. A gradient that is not finite never reaches the weights.
        set_lr(optimizer, cfg.lr * cosine(step, len(plan), cfg.warmup))
        norm = clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        if run.finite(norm, policy, plan[step]):
            optimizer.step()
        optimizer.zero_grad()

        # 5. Write the log, save.
        figures = all_sum(report.add_up(parts, len(examples)))
        if cfg.online:
            figures |= {"pairs": len(examples), "pairs_left_over": len(found) - len(examples)}
        n_tokens = sum(len(prompt) + len(first) + len(second) for prompt, first, second, _ in examples)
        run.log(step, tokens=n_tokens, **figures, grad_norm=norm.item())
        if run.due(step):
            run.save(step, ref_logp=all_ref_logp)

    # How good the policy has become, and how far it is from the reference.
    after, answers = measure("after")
    if reference is None:
        reference = cast_weights(freeze(load(init)[0])).to(device)
    after["kl"], _ = report.mean_kl(sampler, reference, tok, answers.prompt_ids, answers.ids)
    if tests.graded:
        after["win_rate"] = report.win_rate(first_answers, answers.scored)
    if after.get("chosen_reward", 0.0) < 0 and LOSSES[cfg.loss].needs_reference and not cfg.sft_coef:
        run.say("The chosen answers lost log-probability too: the loss only asks that the rejected ones lose "
                "more, and both share tokens. --sft_coef holds the chosen ones up.")
    columns = None
    if LOSSES[cfg.loss].start == "sft" and not cfg.data and not cfg.init:
        columns = chain_columns(cfg, cfg.loss.upper(), before, after)
    run.finish(before, after, columns, report.answer_rows(tests, first_answers, answers.scored))


if __name__ == "__main__":
    program(main, Config, __doc__)
