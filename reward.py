"""Reward modelling: learn what people prefer, from comparisons of two answers.

    python reward.py                                 the tiny world: sample from out/sft, compare, train
    python reward.py --init SFT --data pairs.jsonl   your policy, your comparisons (formats: data/files/formats.py)
    python reward.py --init out/reward --data out/vote/votes.jsonl   go on with your votes (data/vote.py)
    python reward.py --process                       a process reward model: each step of an answer is scored

Equations. Of two answers a and b to a prompt x, people prefer a with the probability
sigmoid(r(x, a) - r(x, b)) (Bradley & Terry 1952). With p the share who prefer a (1 or 0 for a plain choice,
1/2 for a tie, anything between for a soft label) and m the margin by which a is better (arXiv:2307.09288,
eq. 2), a pair's loss is

    l = - p log sigmoid(r_a - r_b - m) - (1 - p) log sigmoid(r_b - r_a + m)  +  c (r_a + r_b)^2 / 2

Its last term (centering, arXiv:2312.09244) holds down the constant that the others leave free. K answers to a
prompt make up to K (K - 1) / 2 pairs. They are not independent, so they always share an optimizer step and
count as one (arXiv:2203.02155, eq. 1):

    L(theta) = mean over the step's prompts ( mean over a prompt's pairs ( l ) )

The reward is read at the last token of an answer, its EOS, by a scalar head on the SFT model. After training
reward_mean is set so that held-out answers average 0, which is where PPO starts.

A process reward model (arXiv:2211.14275, arXiv:2305.20050) reads the same head, z, at the last token of each
step (data/process.py) and learns from a label y for each step, the share who call it right:

    l = - y log sigmoid(z) - (1 - y) log sigmoid(-z),      averaged as above, with the steps as the pairs

Left out: ranking losses over more than two answers, reward models that write text.
"""
import functools
import typing
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data import InputError, comparisons, process, report, world, write_jsonl
from data.files import formats
from data.chain import need
from data.files.checkpoint import load
from data.flags import RunFlags, program
from data.parallel import all_sum, barrier, in_chunks, micro_batches, prepare
from data.run import Run
from data.setup import adamw, batches, cosine, set_lr, setup
from model import answer_rewards, pad_batch


@dataclass
class Config(RunFlags):
    """The flags of `python reward.py`."""
    # Model and data
    process: bool = False         # learn from labelled steps and score steps, not from comparisons of answers
    init: str = ""                # model to start from, a policy or a reward model (default: sft)
    data: str = ""                # comparisons, or labelled steps (default: the tiny world's annotator)
    max_len: int = 256            # tokens of a prompt and an answer; longer pairs are left out and counted
    held_out: float = 0.1         # share of the prompts kept for the report
    # Answers to be compared or labelled, where there is no --data
    policy: str = ""              # model that answers (default: --init)
    prompts: int = 4000           # prompts of the tiny world
    k: int = 4                    # answers per prompt; every two different ones are compared
    max_new: int = 48             # longest answer, in tokens
    temperature: float = 1.0      # of sampling
    # The tiny world's annotator
    noise: float = 0.05           # P(a over b) = sigmoid(gap in utility / noise); 0: it never errs
    agreement: float = 0.0        # set the noise so that this share of choices is right, such as 0.72
                                  # (0: use --noise)
    bias_length: float = 0.0      # utility beside gold, per ten words of an answer
    bias_confidence: float = 0.0  # utility beside gold, for sounding sure
    bias_sycophancy: float = 0.0  # utility beside gold, for agreeing with the user
    # Training
    epochs: int = 2               # passes over the comparisons
    batch_size: int = 16          # prompts a step, with all their answers
    micro_batch: int = 16         # prompts per forward pass; changes memory and nothing else
    lr: float = 1e-3              # peak learning rate of AdamW (5e-6 to 2e-5 for real models)
    warmup: int = 20              # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.01    # on matrices only
    grad_clip: float = 1.0        # largest gradient norm
    margin: float = 0.0           # m = this times the margin that a comparison states, if it states one
    center: float = 0.01          # c, weight of the centering term


def preference_loss(r_a, r_b, p, margin=0.0, center=0.0):
    """Loss per pair (M,) of rewards r_a, r_b (M,) when a share p (M,) prefers a: l of the equations."""
    d = r_a - r_b - margin
    return -p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d) + center * (r_a + r_b) ** 2 / 2


def step_loss(z, y):
    """Loss per step (M,) of logits z (M,) when a share y (M,) calls the step right: binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(z, y, reduction="none")


# ------------------------------------------------------------------------------------------------------------
# Comparisons of answers.


def group_pairs(rows, tok, max_len, margin=0.0):
    """Preference rows -> one element per prompt: (its different answers as ids, prompt included, its pairs as
    [(i, j, p, m, ceiling)]), where a share p prefers answer i to answer j by a margin m. Also the number of
    rows left out because an answer does not fit into max_len tokens."""
    groups, n_too_long = {}, 0
    for row in rows:
        # Both sides as ids, the prompt with them.
        sides = []
        for name in ("chosen", "rejected"):
            prompt, answer = tok.render_answer(row["prompt"], row[name])
            sides.append((*prompt, *answer))
        if max(len(ids) for ids in sides) > max_len:
            n_too_long += 1
            continue

        # The prompt's answers so far, {ids: number}, each only once, and its pairs.
        answers, pairs = groups.setdefault(str(row["prompt"]), ({}, []))
        i, j = [answers.setdefault(ids, len(answers)) for ids in sides]
        pairs.append((i, j, row["label"], margin * row["margin"], row.get("ceiling", 1.0)))
    return [(list(answers), pairs) for answers, pairs in groups.values()], n_too_long


@dataclass
class Pairs:
    """The comparisons in a batch: tensors (M,), one entry a pair."""
    a: torch.Tensor         # row of answer a
    b: torch.Tensor         # row of answer b
    p: torch.Tensor         # share who prefer a
    margin: torch.Tensor    # m of the equations
    ceiling: torch.Tensor   # the annotator's own chance to choose right (1: unknown)
    weight: torch.Tensor    # 1 / (pairs of that prompt)


def batch_of_pairs(groups, tok, device):
    """All answers of some groups as the rows of one batch, ids and mask of real tokens (N, T), and Pairs."""
    rows, columns = [], []
    for answers, pairs in groups:
        # The answers of a group follow one another, so its pairs are moved by the number of rows before it.
        start = len(rows)
        rows += answers
        for i, j, p, margin, ceiling in pairs:
            columns.append((start + i, start + j, p, margin, ceiling, 1 / len(pairs)))
    ids, mask = pad_batch(rows, tok.pad_id, device)
    tensors = [torch.tensor(column).to(device, non_blocking=True) for column in zip(*columns)]
    return ids, mask, Pairs(*tensors)


def pair_losses(model, groups, tok, cfg):
    """Sums over some prompts (groups): of the mean loss of a prompt's pairs, and of the share of them whose
    preferred answer has the larger reward."""
    ids, mask, pairs = batch_of_pairs(groups, tok, model.wte.weight.device)         # (N, T), (N, T), M pairs
    r = answer_rewards(model, ids, mask)                                            # (N,)
    r_a, r_b = r[pairs.a], r[pairs.b]                                               # (M,) each
    loss = (pairs.weight * preference_loss(r_a, r_b, pairs.p, pairs.margin, cfg.center)).sum()
    return loss, (pairs.weight * report.right((r_a - r_b).detach(), pairs.p)).sum()


@torch.no_grad()
def evaluate_pairs(model, groups, tok):
    """Figures {name: number} of held-out groups, every pair counting one and the loss without centering, and
    the mean reward of all their answers."""
    # Every answer once, 64 at a time, each process its share.
    ids, mask, pairs = batch_of_pairs(groups, tok, model.wte.weight.device)
    r = in_chunks(functools.partial(answer_rewards, model), ids, mask, 64)                     # (N,)
    r_a, r_b, length = r[pairs.a], r[pairs.b], mask.sum(1)                                     # (M,) and (N,)
    d, longer, p = r_a - r_b, length[pairs.a] - length[pairs.b], pairs.p                       # (M,) each
    figures = {"loss": preference_loss(r_a, r_b, p, pairs.margin).mean().item()}

    # Among the pairs that are no ties: accuracy, the annotator's own (ceiling), mean difference of reward.
    choice = p != 0.5
    if choice.any():
        figures |= report.accuracies(d[choice], p[choice], longer[choice])
        ceiling = pairs.ceiling[choice].mean().item()
        if ceiling < 1:     # else nobody knows it, or the annotator never errs
            figures["ceiling"] = ceiling
        figures["margin"] = d[choice].mean().item()     # a is what most prefer (data/files/formats.py)
    figures["calibration_error"] = report.calibration_error(d, p)
    return figures, r.mean().item()


def show_pairs(model, tok, rows, n, cfg):
    """Some comparisons of preference rows with their rewards, and n of them as [(prompt, text)] for
    samples.txt."""
    max_len = min(cfg.max_len, model.cfg.max_len)
    pairs = comparisons.pairs_to_show(rows, tok, max_len, cfg.seed)
    pairs = comparisons.with_rewards(pairs, model, tok)
    return pairs, [(pair["prompt"], comparisons.pair_text(pair)) for pair in pairs[:n]]


# ------------------------------------------------------------------------------------------------------------
# Labelled steps: the same for a process reward model.


def step_losses(model, groups, tok, cfg):
    """Sums over some prompts (groups): of the mean loss of a prompt's steps, and of the share of them whose
    score is on the label's side of 1/2 (one half where score or label is exactly 1/2)."""
    ids, mask, (row, at, y, weight) = process.batch_of_steps(groups, tok, model.wte.weight.device)
    z = process.all_logits(model, ids, mask)[row, at]                               # (M,)
    return (weight * step_loss(z, y)).sum(), (weight * report.right(z.detach(), y)).sum()


@torch.no_grad()
def evaluate_steps(model, groups, tok):
    """Figures {name: number} of held-out groups, and the mean of sum_k log sigmoid(z_k) over their
    answers."""
    ids, mask, (row, at, y, _) = process.batch_of_steps(groups, tok, model.wte.weight.device)
    z = in_chunks(functools.partial(process.all_logits, model), ids, mask, 64)[row, at]        # (M,)
    figures = {"loss": step_loss(z, y).mean().item()}
    choice = y != 0.5
    if choice.any():
        figures["accuracy"] = report.share_right(z[choice], y[choice])

    # Answer by answer: is the first wrong step found?
    answers = []
    for i in range(len(ids)):
        answers.append((z[row == i].sigmoid().tolist(), y[row == i].tolist()))
    return figures | process.errors_found(answers), F.logsigmoid(z).sum().item() / len(ids)


@dataclass
class Supervision:
    """What a reward model learns from: labels of whole answers, or of their steps (arXiv:2305.20050)."""
    file: str                     # in --out, for the labels of the tiny world's annotator
    kind: str                     # of its rows (data/files/formats.py)
    ask: typing.Callable          # the annotator: (run, path of the policy, device) -> these rows
    group: typing.Callable        # (rows, tok, max_len, margin) -> one group per prompt, rows left out
    losses: typing.Callable       # (model, groups, tok, cfg) -> sums over prompts: loss, share right
    evaluate: typing.Callable     # (model, groups, tok) -> figures, mean reward of an answer
    show: typing.Callable         # (model, tok, rows, n, cfg) -> rows for held_out.jsonl, n (prompt, text)


OUTCOME = Supervision("comparisons.jsonl", "preference", comparisons.compare_answers, group_pairs,
                      pair_losses, evaluate_pairs, show_pairs)
PROCESS = Supervision("process.jsonl", "process", comparisons.label_steps, process.group_steps, step_losses,
                      evaluate_steps, process.show_steps)


def main(cfg):
    """Have answers compared, or their steps labelled, unless that is done, and train a reward model on it."""
    device = setup(cfg)
    supervision = PROCESS if cfg.process else OUTCOME
    if cfg.k < 2 and not cfg.process and not cfg.data:
        raise InputError(f"--k {cfg.k}: a comparison needs at least 2 answers")
    init = cfg.init or need(cfg, "sft")
    policy = cfg.policy or init
    run = Run.open(cfg, "reward", [init, policy, cfg.data or world.TINY / "preference.jsonl"])

    # The labels: one's own, those that this run was given before it was interrupted, or new ones.
    path = cfg.data or run.folder / supervision.file
    if not cfg.data and not (run.first and path.exists()):
        write_jsonl(path, supervision.ask(run, policy, device))
        barrier()
    rows, dropped = formats.load(path, supervision.kind)
    run.say(formats.describe(rows, dropped, path))

    # The model. Seeded here, so that a new head does not depend on whether answers were sampled before.
    torch.manual_seed(cfg.seed)
    model, tok = load(init, head="new")
    model.cfg.reward_mean, model.cfg.process = 0.0, cfg.process

    # The rows by prompt, some prompts held out.
    max_len = min(cfg.max_len, model.cfg.max_len)
    train_rows, held_rows = formats.split(rows, cfg.held_out, seed=0)
    train, n_long = supervision.group(train_rows, tok, max_len, cfg.margin)
    held, n_held_long = supervision.group(held_rows, tok, max_len, cfg.margin)
    n_long += n_held_long
    run.say(f"{len(train):,} prompts to train on, {len(held):,} held out; {n_long:,} rows longer than "
            f"{max_len} tokens left out (--max_len)")
    if not train or not held:
        raise InputError(f"{path}: {len(train)} prompts within --max_len {max_len} tokens to train on, "
                         f"{len(held)} held out by --held_out {cfg.held_out}; both need at least one")

    # The model on its device, its optimizer, and which prompts each step reads.
    model = prepare(model, cfg, device)
    optimizer = adamw(model, cfg.weight_decay)
    longest = [max(len(ids) for ids in answers) for answers, _ in train]
    n_tokens = [sum(len(ids) for ids in answers) for answers, _ in train]
    plan = []
    for epoch in range(cfg.epochs):
        plan += batches(longest, cfg.batch_size, cfg.seed, epoch)
    run.begin(len(plan), tok, model=(model, optimizer))

    def show_held_out(title):
        """Write some held-out rows with their scores to samples.txt; returns rows for held_out.jsonl."""
        scored, texts = supervision.show(model, tok, held_rows, report.N_SAMPLES, cfg)
        run.samples(title, *zip(*texts))
        return scored

    # How good it is before its first step.
    if run.first:
        before = run.state["before"]
    else:
        before, _ = supervision.evaluate(model, held, tok)
        show_held_out("before")

    for step in run.steps():
        # 1. This step's prompts.
        prompts = plan[step]

        # 2. L over the whole step, micro-batch by micro-batch: all answers to some prompts make a batch.
        total, right = torch.zeros(2, device=device)
        for part in micro_batches(prompts, longest, cfg.micro_batch):
            loss, n_right = supervision.losses(model, [train[i] for i in part], tok, cfg)
            (loss / len(prompts)).backward()
            total += loss.detach() / len(prompts)
            right += n_right / len(prompts)

        # 3. One step of AdamW; a gradient that is not finite never reaches the weights.
        set_lr(optimizer, cfg.lr * cosine(step, len(plan), cfg.warmup))
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if run.finite(norm, model, prompts):
            optimizer.step()
        optimizer.zero_grad()

        # 4. Write the log, save.
        run.log(step, tokens=sum(n_tokens[i] for i in prompts), loss=all_sum(total.item()),
                accuracy=all_sum(right.item()), grad_norm=norm.item())
        if run.due(step):
            run.save(step, before=before)

    # Shift rewards so that held-out answers average 0, and save once more as the last step. A run that is cut
    # off before does this when it goes on.
    after, mean = supervision.evaluate(model, held, tok)
    model.cfg.reward_mean = mean
    run.save(max(run.first, run.n_steps) - 1, before=before)
    write_jsonl(run.folder / "held_out.jsonl", show_held_out("after"))
    run.finish(before, after | {"reward_mean": mean})


if __name__ == "__main__":
    program(main, Config, __doc__)
