"""Direct preference optimisation and its family: learn from comparisons, no reward model, no sampling.

    python dpo.py                                          the tiny world; makes base, sft, reward if missing
    python dpo.py --loss ipo --out out/ipo                 any loss of the table below
    python dpo.py --online --out out/online                compare new answers of the policy itself
    python dpo.py --init SFT --data pairs.jsonl --lr 1e-6  your policy, your comparisons

The best policy under  E[r(x, y)] - beta KL(pi || pi_ref)  is  pi*(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta). So
a policy is itself a reward model,  r(x, y) = beta log pi(y|x) / pi_ref(y|x) + const(x),  and is fitted to
comparisons as one (arXiv:2305.18290, eq. 4-7). Every loss is a function of w and l, the policy's rewards of
the chosen answer y_w and the rejected one y_l, without beta. |y| is the number of tokens of an answer.

    loss       reward of an answer y       L(w, l)
    dpo        log pi(y|x) / pi_ref(y|x)   - log sigmoid(beta (w - l))                      2305.18290, eq. 7
    dpo_norm   the same, over |y|          - log sigmoid(beta (w - l))                    2411.15124 (Tulu 3)
    ipo        the same, over |y|          (w - l - 1 / (2 beta))^2                        2310.12036, eq. 17
    apo_zero   log pi(y|x) / pi_ref(y|x)   1 - sigmoid(beta w) + sigmoid(beta l)            2408.06266, eq. 7
    simpo      log pi(y|x) / |y|           - log sigmoid(beta (w - l) - gamma)              2405.14734, eq. 6
    orpo       log odds of pi(y|x)         - log pi(y_w|x) / |y_w| - beta log sigmoid(w - l)    2403.07691
    kto        log pi(y|x) / pi_ref(y|x)   1 - sigmoid(beta (w - l))                        2402.01306, eq. 8

ipo averages over tokens as its authors do. orpo's odds are p / (1 - p), p the geometric mean of the token
probabilities. kto has single answers: a good one is w, a bad one is l, and the other side of either is
z = max(0, mean reward of answers to OTHER prompts).

If a share p prefers y_w, the loss of a pair is p L(w, l) + (1 - p) L(l, w). cDPO (--label_smoothing e) says
that a label is wrong with probability e: p (1 - e) + (1 - p) e. rDPO (--flip_rate e, arXiv:2403.00409) undoes
that, for an unbiased loss: (p - e) / (1 - 2e). --sft_coef c, 0.2 unless you say 0, adds - c log pi(y_w|x) /
|y_w| (arXiv:2404.19733, eq. 1) to all but kto: with --sft_coef 0 the losses are those of the papers.

One step:
  1. comparisons   the next ones of the data, or (--online) of two new answers to each of some prompts
  2. reference     log pi_ref(y|x) of both answers, computed once for all data and kept: one model in memory
  3. loss          one of the above, the mean over the step
  4. update        AdamW

To add a loss, write its function and its row of LOSSES.

What to conclude: from the same comparisons, without new ones, DPO reaches 0.945 of gold in this world, PPO
0.873, and 0.958 against a reward model of six passes instead of two; with new comparisons PPO reaches 0.952
and online DPO 0.961, in a seventh of PPO's time. So where answers are compared, begin here. PPO needs no
pairs: it takes any number as a reward, also one for every step of an answer, and looks beyond the data
(LOG.md).
"""
import math
import random
import typing
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data import InputError, health, report, world
from data.chain import need
from data.comparisons import mismatch, online_pairs
from data.files import formats
from data.files.checkpoint import load
from data.flags import RunFlags, given_flags, program
from data.parallel import all_sum, filled_up, in_shares, micro_batches, prepare
from data.prefix_sharing import pair_logps
from data.prompts import read_prompts, test_prompts
from data.rewards import scorer_on
from data.run import Run
from data.setup import adamw, cosine, plan_of, set_lr, setup
from model import freeze_and_cast, pad_answers, refresh, sampling_copy, token_logprobs, with_lora

# ------------------------------------------------------------------------------------------------------------
# Rewards of answers, without beta, as pure functions of their log-probs under policy and reference, summed
# over tokens, and their numbers of tokens: three tensors of one shape.


def log_ratio(logp, ref, n):
    """log pi(y|x) / pi_ref(y|x)."""
    return logp - ref


def mean_log_ratio(logp, ref, n):
    """The same, averaged over tokens: a long answer is not rewarded more because it is long."""
    return (logp - ref) / n


def mean_logp(logp, ref, n):
    """log pi(y|x) / |y|: no reference."""
    return logp / n


def mean_log_odds(logp, ref, n):
    """log odds of the geometric mean of the token probabilities: no reference."""
    return log_odds(logp / n)


def log_odds(p):
    """log(e^p / (1 - e^p)) of mean log-probs p < 0, without overflow, or 0 * inf in the gradient."""
    # log(1 - e^p) has two forms, each of them exact on its own side of e^p = 1/2.
    p = p.clamp(max=-1e-7)
    near_0 = p > -math.log(2)
    of_near = torch.log(-torch.expm1(torch.where(near_0, p, -1.0)))
    of_far = torch.log1p(-torch.exp(torch.where(near_0, -1.0, p)))
    return p - torch.where(near_0, of_near, of_far)


# ------------------------------------------------------------------------------------------------------------
# Losses as pure functions: (B,) of the rewards w and l, (B,) each; see LOSSES.


def dpo(w, l, cfg):
    """arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(cfg.beta * (w - l))


def ipo(w, l, cfg):
    """arXiv:2310.12036, eq. 17."""
    return (w - l - 1 / (2 * cfg.beta)) ** 2


def apo_zero(w, l, cfg):
    """arXiv:2408.06266, eq. 7: the chosen answer becomes likelier, the rejected one less likely, each by
    itself and not only beside the other."""
    return 1 - (cfg.beta * w).sigmoid() + (cfg.beta * l).sigmoid()


def simpo(w, l, cfg):
    """arXiv:2405.14734, eq. 6. (The paper's tables give gamma / beta.)"""
    return -F.logsigmoid(cfg.beta * (w - l) - cfg.simpo_gamma)


def orpo(w, l, cfg):
    """arXiv:2403.07691, eq. 6, second term; the first one is `nll` of its row. beta is the paper's lambda."""
    return -cfg.beta * F.logsigmoid(w - l)


def kto(w, l, cfg):
    """arXiv:2402.01306, eq. 8; w or l is the reference point z."""
    return 1 - (cfg.beta * (w - l)).sigmoid()


@dataclass
class Loss:
    """A row of LOSSES."""
    reward: typing.Callable       # (logp, ref, n) -> rewards of answers
    loss: typing.Callable         # (w, l, cfg) -> losses (B,)
    beta: float                   # default of --beta
    needs_reference: bool
    start: str                    # the link of the chain that it starts from
    nll: float = 0.0              # weight of - log pi(y_w|x) / |y_w| that is part of it
    paired: bool = True           # whether it compares two answers to one prompt


LOSSES = {
    #                 reward          loss      beta  reference  starts from
    "dpo":      Loss(log_ratio,       dpo,      0.3,  True,      "sft"),
    "dpo_norm": Loss(mean_log_ratio,  dpo,      5.0,  True,      "sft"),
    "ipo":      Loss(mean_log_ratio,  ipo,      0.5,  True,      "sft"),
    "apo_zero": Loss(log_ratio,       apo_zero, 0.3,  True,      "sft"),
    "simpo":    Loss(mean_logp,       simpo,    2.0,  False,     "sft"),
    "orpo":     Loss(mean_log_odds,   orpo,     1.0,  False,     "base", nll=1.0),
    "kto":      Loss(log_ratio,       kto,      0.3,  True,      "sft", paired=False),
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
    sft_coef: float = 0.2         # weight of - log pi(y_w|x) / |y_w|, added to every loss but kto (0: the
                                  # paper's loss); keeps sentences whole
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


def check_flags(cfg):
    """InputError: flags that do not go together."""
    if max(cfg.label_smoothing, cfg.flip_rate) >= 0.5:
        raise InputError("--label_smoothing and --flip_rate must be below 0.5: at 0.5 a label says nothing")
    if not cfg.online:
        return
    fit = [name for name, row in LOSSES.items() if row.paired and row.start == "sft"]
    if cfg.loss not in fit:
        raise InputError(f"--online compares pairs of a policy's answers; --loss {cfg.loss} does not learn "
                         f"from those alone: {', '.join(fit)} do")
    if cfg.data and cfg.judge in ("annotator", "gold"):
        raise InputError(f"--judge {cfg.judge} knows the prompts of the tiny world alone; prompts of your "
                         "own (--data) need a reward model or a function of yours as --judge")


# ------------------------------------------------------------------------------------------------------------
# Comparisons as ids. An example is (prompt ids, first answer ids, second answer ids, label). Of a pair the
# second answer is the rejected one and the label the share that prefers the first. Of KTO's single answers
# the label says whether the first answer is good (1) or bad (0), and the second one belongs to ANOTHER
# prompt: put behind this one, these make the reference point z.


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
        label, room = float(row["label"]), max_len - len(prompt)
        if len(prompt) > max_prompt:
            counts["long"] += 1
        elif len(answers) == 2 and first[:room] == second[:room]:
            counts["equal"] += 1
        else:
            counts["cut"] += max(len(first), len(second)) > room
            out.append((prompt, first[:room], second[:room], label))
    return out, counts


def read_examples(run, path, paired, tok, max_len):
    """Examples of a file to train on, held-out ones, and the rows of both, held-out ones first; run: the Run,
    whose flags they follow and which says what was left out. InputError: nothing to train on or to hold
    out."""
    cfg = run.cfg
    rows, dropped = formats.load(path, "preference" if paired else "kto")
    run.say(formats.describe(rows, dropped, path))
    decided = [row for row in rows if row["label"] != 0.5]    # a tie only asks that w = l

    # As ids, some of the prompts held out.
    max_prompt = min(cfg.max_prompt, max_len - 1)
    train_rows, held_rows = formats.split(decided, cfg.held_out, seed=0)
    train, counts = encode(train_rows, tok, max_prompt, max_len)
    held, held_counts = encode(held_rows, tok, max_prompt, max_len)
    counts += held_counts

    # What is there now, and what is missing.
    n_ties = len(rows) - len(decided)
    message = (f"{len(train):,} to train on, {len(held):,} held out; left out: {n_ties:,} ties, "
               f"{counts['long']:,} with prompts of more than {max_prompt} tokens (--max_prompt), "
               f"{counts['equal']:,} with equal answers; {counts['cut']:,} cut at {max_len} tokens "
               "(--max_len)")
    if not train or not held:
        raise InputError(f"{path}: {message}; both need at least one (--held_out)")
    run.say(message)
    if not paired:
        if len({label for *_, label in train}) < 2:
            raise InputError(f"{path}: {message}; kto needs good and bad answers to train on")
        held = mismatch(held + train, cfg.seed, max_len)[: len(held)]    # one held-out prompt may do
        train = mismatch(train, cfg.seed, max_len)
    return train, held, held_rows + train_rows


def lengths_of(examples):
    """Tokens of each example with its longer answer: what batches are sorted by."""
    return [len(prompt) + max(len(first), len(second)) for prompt, first, second, _ in examples]


# ------------------------------------------------------------------------------------------------------------
# What the models say of the answers, and the loss of that.

BOTH, FIRST, SECOND = 0, 1, 2      # answers of an example, and where it keeps them


def answer_logps(model, examples, tok, side=BOTH):
    """Summed log-probs (2, B) of the first (row 0) and second answers of B examples under the model, and
    their numbers of tokens (2, B). side: those of one side alone, (1, B) each."""
    if side == BOTH:      # the same numbers as of each side alone, sooner: the model reads the prompt once
        return pair_logps(model, examples, tok.pad_id)
    rows = [(example[0], example[side]) for example in examples]
    ids, mask = pad_answers(rows, tok.pad_id)                                       # (B, T) each
    device = model.wte.weight.device
    logp = token_logprobs(model, ids.to(device), mask)                              # (B, T), 0 elsewhere
    return logp.sum(1)[None], mask.sum(1)[None].to(device)


def all_logps(model, examples, tok, size, side=BOTH, say=False):
    """The log-probs of `answer_logps` of many examples, without gradients, `size` at a time, in shares."""
    def logps(rows):
        return answer_logps(model, [examples[i] for i in rows], tok, side)[0]

    return in_shares(logps, lengths_of(examples), size, say)


def reference_logps(reference, examples, tok, cfg, say=None):
    """Log-probs (2, N) of both answers of examples under the reference; 0 for a loss without one."""
    if not LOSSES[cfg.loss].needs_reference or not examples:
        return torch.zeros(2, len(examples), device=reference.wte.weight.device)
    if say:
        n_bytes = sum(p.nbytes for p in reference.parameters())
        say(f"the reference reads {len(examples):,} examples once; {8 * len(examples):,} bytes are kept "
            f"instead of a second model of {n_bytes:,}")
    return all_logps(reference, examples, tok, cfg.micro_batch, say=bool(say))


def reference_point(policy, examples, ref_logp, tok, cfg):
    """KTO's z, (): the mean log-ratio of the answers to OTHER prompts in the whole step, at least 0, without
    gradient. ref_logp (2, B): see reference_logps. None for pairs, which need none."""
    if LOSSES[cfg.loss].paired:
        return None
    logp = all_logps(policy, examples, tok, cfg.micro_batch, SECOND)                # (1, B)
    return (logp - ref_logp[1]).mean().clamp(min=0.0)


def labelled_loss(logp, ref_logp, n, p, cfg, z=None):
    """Losses (B,) of examples with labels p (B,), and their rewards w and l, (B,) each, without beta.
    logp, n (2, B): log-probs of both answers under the policy and their numbers of tokens, or of KTO's single
    ones, (1, B); ref_logp (2, B): under the reference; z: KTO's reference point."""
    spec = LOSSES[cfg.loss]
    rewards = spec.reward(logp, ref_logp[: len(logp)], n)                           # (2, B), KTO: (1, B)
    w = rewards[0]
    l = rewards[1] if spec.paired else z.expand_as(w)

    # What a label counts for either side: cDPO pulls it to 1/2, rDPO inverts that. The loss is linear in p.
    p = p * (1 - cfg.label_smoothing) + (1 - p) * cfg.label_smoothing
    p = (p - cfg.flip_rate) / (1 - 2 * cfg.flip_rate)
    good, bad = (1, 1) if spec.paired else (cfg.desirable_weight, cfg.undesirable_weight)
    loss = p * good * spec.loss(w, l, cfg) + (1 - p) * bad * spec.loss(l, w, cfg)

    # Of pairs the SFT term on the chosen answer, so that dpo begins at ln 2 = 0.693 and a little more.
    if spec.paired:
        loss = loss - (spec.nll + cfg.sft_coef) * (logp[0] / n[0])
    return loss, w, l


def wins(x):
    """1 where x (B,) is above 0, 1/2 where it is 0 up to rounding, else 0."""
    return (x > 1e-5).float() + 0.5 * (x.abs() <= 1e-5)


@torch.no_grad()
def add_metrics(total, weight, loss, w, l, p, cfg):
    """Add what is logged of examples to total, {name: sum over examples}; weight (B,): what each counts, the
    others: see labelled_loss."""
    # Is the chosen answer rewarded more, and by how much? Of a bad answer alone, KTO's, z should be more.
    w, l = cfg.beta * w, cfg.beta * l
    margin = (w - l) * torch.where(p < 0.5, -1.0, 1.0)
    metrics = {"loss": loss, "accuracy": wins(margin), "margin": margin}
    if LOSSES[cfg.loss].paired:
        metrics |= {"chosen_reward": w, "rejected_reward": l}
    else:
        metrics["z"] = l / cfg.beta
    for name, x in metrics.items():
        total[name] = total.get(name, 0.0) + (weight * x).sum()


def means(total, n):
    """The mean {name: float} of sums over n examples (see add_metrics)."""
    return {name: (x / n).item() for name, x in total.items()}


@torch.no_grad()
def held_out_metrics(policy, held, ref_logp, tok, cfg):
    """Mean metrics {name: float} of held-out examples. ref_logp (2, N): their log-probs under the
    reference."""
    z = reference_point(policy, held, ref_logp, tok, cfg)
    side, total = BOTH if LOSSES[cfg.loss].paired else FIRST, {}
    for start in range(0, len(held), cfg.micro_batch):
        some = slice(start, start + cfg.micro_batch)
        logp, n = answer_logps(policy, held[some], tok, side)
        p = torch.tensor([label for *_, label in held[some]], device=logp.device)
        loss, w, l = labelled_loss(logp, ref_logp[:, some], n, p, cfg, z)
        add_metrics(total, 1.0, loss, w, l, p, cfg)
    return means(total, len(held))


# ------------------------------------------------------------------------------------------------------------


def main(cfg):
    """Train a policy on comparisons, given or (--online) of its own answers."""
    device = setup(cfg)
    check_flags(cfg)
    spec, given = LOSSES[cfg.loss], given_flags(cfg)
    cfg = replace(cfg, beta=cfg.beta or spec.beta)      # run.json says which beta it was

    # What the run reads. A link of the chain that is missing is trained first, by its own script: minutes.
    if cfg.online:
        data = cfg.data or world.TINY / "rl.jsonl"
    else:
        data = cfg.data or Path(need(cfg, "reward")) / "comparisons.jsonl"      # makes the SFT model too
    init = cfg.init or need(cfg, spec.start)
    run = Run.open(cfg, "dpo", [init, data, cfg.judge] if cfg.online else [init, data])
    run.given = given       # without the beta that suits the loss
    policy, tok = load(init)

    # What there is to learn from, and which of it each step reads.
    plan, train, held = [], [], []
    if cfg.online:
        # The annotator judges as gold does, with some errors.
        judge = scorer_on("--judge", "gold" if cfg.judge == "annotator" else cfg.judge, device)
        rows, tests = read_prompts(run, data, tok, policy, judge)
        for step in range(cfg.online_steps):
            plan.append(random.Random(f"{cfg.seed} {step}").choices(range(len(rows)), k=cfg.batch_size))
    else:
        train, held, own = read_examples(run, data, spec.paired, tok, min(cfg.max_len, policy.cfg.max_len))
        tests = test_prompts(policy, tok, cfg.max_new, own if cfg.data else None, data)
        plan = plan_of(lengths_of(train), cfg)

    # The policy on its device and its optimizer. With adapters, its frozen trunk is the reference. Else the
    # reference is a second model, loaded when one is needed: for new answers, and for the KL at the end.
    reference = None
    if cfg.lora:
        reference = policy.to(device)
        policy = with_lora(reference, cfg.lora)
    elif cfg.online:
        reference = freeze_and_cast(load(init)[0]).to(device)
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
        """Held-out metrics, and what the policy answers to test prompts (--data: to held-out ones first)."""
        refresh(sampler, policy)
        metrics, answers = run.measure(title, sampler, tests)
        if held:
            metrics |= held_out_metrics(policy, held, all_ref_logp[:, len(train):], tok, cfg)
        return metrics, answers

    before, first_answers = run.before(measure)
    side = BOTH if spec.paired else FIRST
    for step in run.steps():
        # 1. Comparisons: the next ones of the data, or of two new answers to each of some prompts.
        # 2. Reference: its log-probs of both answers, (2, B).
        if cfg.online:
            refresh(sampler, policy)
            asked = [rows[i] for i in plan[step]]
            examples = online_pairs(sampler, tok, asked, judge.score_texts, cfg, step)
            ref_logp = reference_logps(reference, examples, tok, cfg)
        else:
            examples, ref_logp = [train[i] for i in plan[step]], all_ref_logp[:, plan[step]]

        # 3. Loss: a mean over the whole step, micro-batch by micro-batch. z is of the whole step too.
        z = reference_point(policy, examples, ref_logp, tok, cfg)
        numbers, weight = filled_up(len(examples))
        weight, total = weight.to(device), {}
        for part in micro_batches(numbers, lengths_of(examples), cfg.micro_batch):
            batch = [examples[i] for i in part]
            logp, n = answer_logps(policy, batch, tok, side)                         # (2, b), KTO: (1, b)
            p = torch.tensor([label for *_, label in batch], device=device)          # (b,)
            loss, w, l = labelled_loss(logp, ref_logp[:, part], n, p, cfg, z)        # (b,) each
            ((weight[part] * loss).sum() / len(examples)).backward()
            add_metrics(total, weight[part], loss, w, l, p, cfg)

        # 4. Update: one step of AdamW. A gradient that is not finite never reaches the weights.
        set_lr(optimizer, cfg.lr * cosine(step, run.n_steps, cfg.warmup))
        norm = clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        if run.allows_step(norm, policy, plan[step]):
            optimizer.step()
        optimizer.zero_grad()

        metrics = all_sum(means(total, len(examples)))
        if cfg.online:
            metrics["pairs"] = len(examples)
        n_tokens = sum(len(prompt) + len(first) + len(second) for prompt, first, second, _ in examples)
        run.log(step, tokens=n_tokens, **metrics, grad_norm=norm.item())
        run.save_when_due(step, ref_logp=all_ref_logp)

    # How good the policy has become, and how far it is from the reference.
    after, answers = measure("after")
    if reference is None:
        reference = freeze_and_cast(load(init)[0]).to(device)
    after["kl"], _ = report.mean_kl(sampler, reference, tok, answers.prompt_ids, answers.ids)
    if tests.graded:
        after["win_rate"] = report.win_rate(first_answers, answers.scored)
    run.say_health(health.of_preferences(run.history, before, after))
    is_of_chain = spec.start == "sft" and not cfg.data and not cfg.init
    answers = report.answer_rows(tests, first_answers, answers.scored)
    run.finish(before, after, answers, cfg.loss.upper() if is_of_chain else "")


if __name__ == "__main__":
    program(main, Config, __doc__)
