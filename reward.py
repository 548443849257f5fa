"""Reward modelling: learn what people prefer, from comparisons of two answers.

    python reward.py                                 the tiny world: sample from out/sft, compare, train
    python reward.py --init SFT --data pairs.jsonl   your policy, your comparisons (data/files/formats.py)
    python reward.py --init out/reward --data out/vote/votes.jsonl   go on with your votes (data/vote.py)
    python reward.py --knows 0.3 --critique out/base --out out/helped   who knows little, helped by a critic

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

Left out: ranking losses over more than two answers, reward models that write text. Rewards for the single
steps of an answer: python -m data.process.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data import InputError, comparisons, health, report, world, write_jsonl
from data.files import formats
from data.chain import need
from data.files.checkpoint import load
from data.flags import RunFlags, program
from data.parallel import WORLD, all_sum, barrier, in_chunks, micro_batches, prepare
from data.run import Run
from data.setup import adamw, cosine, plan_of, set_lr, setup
from model import answer_rewards, pad_batch, with_lora


@dataclass
class Config(RunFlags):
    """The flags of `python reward.py`."""
    # Model and data
    init: str = ""                # model to start from, a policy or a reward model (default: sft)
    data: str = ""                # comparisons (default: the tiny world's annotator makes some)
    max_len: int = 256            # tokens of a prompt and an answer; longer pairs are left out and counted
    held_out: float = 0.1         # share of the prompts kept for the report
    lora: int = 0                 # rank of adapters, trained with the head on a frozen trunk (0: train all)
    # Answers to be compared, where there is no --data
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
    knows: float = 1.0            # share of the facts that it knows; of others it judges manner alone
    critique: str = ""            # model whose critique of an answer it reads where it does not know
    # Training
    epochs: int = 2               # passes over the comparisons (6: much better, in three times the time)
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
        pairs.append((i, j, row["label"], margin * row.get("margin", 0.0), row.get("ceiling", 1.0)))
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


def learn_comparisons(run, model, optimizer, groups, center):
    """Step 6 of ppo.py: the update of `main` below, --minibatches times, each over some of the groups.
    Returns sums over the rank's prompts for the log: the loss, and the share of pairs that the model gets
    right before it learns from them."""
    cfg, sums = run.cfg, {"rm_loss": 0.0, "rm_accuracy": 0.0}
    longest = [max(len(ids) for ids in answers) for answers, _ in groups]
    # Prompts per forward pass: as many as have about --micro_batch answers. Equal answers are one row.
    n_answers = sum(len(answers) for answers, _ in groups)
    size = max(1, cfg.micro_batch * len(groups) // n_answers)
    for mini in torch.arange(len(groups)).chunk(cfg.minibatches):
        mini = mini[: len(mini) // WORLD * WORLD].tolist()          # each rank the same number
        for part in micro_batches(mini, longest, size):
            ids, mask, pairs = batch_of_pairs([groups[i] for i in part], run.tok, model.wte.weight.device)
            r = answer_rewards(model, ids, mask)                                                 # (N,)
            r_a, r_b = r[pairs.a], r[pairs.b]                                                    # (M,) each
            loss = (pairs.weight * preference_loss(r_a, r_b, pairs.p, pairs.margin, center)).sum()
            (loss / len(mini)).backward()
            sums["rm_loss"] += loss.detach() / len(groups)
            right = report.right((r_a - r_b).detach(), pairs.p)
            sums["rm_accuracy"] += (pairs.weight * right).sum() / len(groups)
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if run.allows_step(norm, model, mini):
            optimizer.step()
        optimizer.zero_grad()
    return sums


# ------------------------------------------------------------------------------------------------------------
# Held-out comparisons.


def accuracies(d, p, longer):
    """Accuracy {name: number} on pairs that are no ties, from reward differences d (M,), labels p (M,) and
    by how many tokens a is longer than b (M,). longer_wins is that of always taking the longer answer."""
    metrics = {"accuracy": report.right(d, p).mean().item(),
               "longer_wins": report.right(longer, p).mean().item()}
    # Apart where the chosen answer is the shorter one, as long as the other, or the longer one.
    chosen_is = (longer * (p - 0.5)).sign()
    for name, sign in (("shorter", -1), ("same_length", 0), ("longer", 1)):
        part = chosen_is == sign
        if part.any():
            metrics[f"accuracy_{name}"] = report.right(d[part], p[part]).mean().item()
    return metrics


def calibration_error(d, p):
    """Mean |stated probability - frequency| over ten bins of P(a over b), weighted by size, for reward
    differences d (M,) and labels p (M,). Each pair counts both ways round: which answer is a says nothing."""
    stated, true = torch.cat([d.sigmoid(), (-d).sigmoid()]), torch.cat([p, 1 - p])             # (2M,)
    bins, error = (stated * 10).long().clamp(max=9), 0.0
    for b in bins.unique():
        inside = bins == b
        gap = (stated[inside].mean() - true[inside].mean()).abs()
        error += (gap * inside.float().mean()).item()
    return error


@torch.no_grad()
def held_out_metrics(model, groups, tok):
    """Metrics {name: number} of held-out groups, every pair counting one and the loss without centering;
    reward_mean is the mean reward of all their answers."""
    # Every answer once, 64 at a time, each process its share.
    ids, mask, pairs = batch_of_pairs(groups, tok, model.wte.weight.device)
    r = in_chunks(partial(answer_rewards, model), ids, mask, 64)                               # (N,)
    r_a, r_b, length = r[pairs.a], r[pairs.b], mask.sum(1)                                     # (M,) and (N,)
    d, longer, p = r_a - r_b, length[pairs.a] - length[pairs.b], pairs.p                       # (M,) each
    metrics = {"loss": preference_loss(r_a, r_b, p, pairs.margin).mean().item()}

    # Among the pairs that are no ties: accuracy, the annotator's own (ceiling), mean difference of reward.
    choice = p != 0.5
    if choice.any():
        metrics |= accuracies(d[choice], p[choice], longer[choice])
        ceiling = pairs.ceiling[choice].mean().item()
        if ceiling < 1:     # else nobody knows it, or the annotator never errs
            metrics["ceiling"] = ceiling
        metrics["margin"] = d[choice].mean().item()     # a is what most prefer (data/files/formats.py)
    return metrics | {"calibration_error": calibration_error(d, p), "reward_mean": r.mean().item()}


def main(cfg):
    """Have answers compared, unless that is done, and train a reward model on the comparisons."""
    device = setup(cfg)
    if cfg.k < 2 and not cfg.data:
        raise InputError(f"--k {cfg.k}: a comparison needs at least 2 answers")
    if cfg.critique and (cfg.data or cfg.knows == 1):
        raise InputError("--critique helps the tiny world's annotator where it does not know: give --knows, "
                         "less than 1, and no --data")
    init = cfg.init or need(cfg, "sft")     # makes the links of the chain that are missing
    policy = cfg.policy or init
    files = [init, policy, cfg.data or world.TINY / "preference.jsonl", cfg.critique]
    own = ["held_out.jsonl", "comparisons.jsonl", "critic_answers.jsonl"]
    run = Run.open(cfg, "reward", filter(None, files), own[:1] if cfg.data else own)

    # The comparisons: one's own, those that this run was given before it was interrupted, or new ones.
    path = cfg.data or run.folder / "comparisons.jsonl"
    if not cfg.data and not run.has("comparisons.jsonl"):
        compared = comparisons.compare_answers(run, policy, device)
        run.make_room()
        write_jsonl(path, formats.as_messages(compared))
        barrier()
    rows, dropped = formats.load(path, "preference")
    run.say(formats.describe(rows, dropped, path))

    # The model. Seeded here, so that a new head, where it has none, does not depend on whether answers were
    # sampled before.
    torch.manual_seed(cfg.seed)
    model, tok = load(init, head="new")
    model.reward_mean, model.process = 0.0, False
    if cfg.lora:
        # Adapters on a frozen trunk; a new head begins at random, so it is trained as a whole.
        model = with_lora(model, cfg.lora)
        model.score.requires_grad_(True)

    # The rows by prompt, some prompts held out.
    max_len = min(cfg.max_len, model.cfg.max_len)
    train_rows, held_rows = formats.split(rows, cfg.held_out, seed=0)
    train, n_long = group_pairs(train_rows, tok, max_len, cfg.margin)
    held, n_held_long = group_pairs(held_rows, tok, max_len, cfg.margin)
    run.say(f"{len(train):,} prompts to train on, {len(held):,} held out; {n_long + n_held_long:,} rows "
            f"longer than {max_len} tokens left out (--max_len)")
    if not train or not held:
        raise InputError(f"{path}: {len(train)} prompts within --max_len {max_len} tokens to train on, "
                         f"{len(held)} held out by --held_out {cfg.held_out}; both need at least one")

    # The model on its device, its optimizer, and which prompts each step reads.
    model = prepare(model, cfg, device)
    optimizer = adamw(model, cfg.weight_decay)
    longest = [max(len(ids) for ids in answers) for answers, _ in train]
    n_tokens = [sum(len(ids) for ids in answers) for answers, _ in train]
    plan = plan_of(longest, cfg)
    run.begin(len(plan), tok, model=(model, optimizer))

    def show_held_out(title):
        """Some held-out comparisons with their rewards, the first of which go into samples.txt."""
        pairs = comparisons.pairs_to_show(held_rows, tok, max_len, cfg.seed)
        pairs = comparisons.with_rewards(pairs, model, tok)
        shown = pairs[: report.N_SAMPLES]
        texts = [comparisons.pair_text(pair) for pair in shown]
        run.samples(title, [pair["prompt"] for pair in shown], texts)
        return pairs

    # How good it is before its first step; a run that goes on has that in its checkpoint.
    before = run.state.get("before")
    if before is None:
        before = held_out_metrics(model, held, tok)
        show_held_out("before")

    for step in run.steps():
        # 1. This step's prompts, with all their answers and comparisons.
        prompts = plan[step]

        # 2. L over the whole step, micro-batch by micro-batch. The answers are the rows of a batch: each is
        #    read once, however many others it is compared with.
        total, right = torch.zeros((), device=device), torch.zeros((), device=device)
        for part in micro_batches(prompts, longest, cfg.micro_batch):
            ids, mask, pairs = batch_of_pairs([train[i] for i in part], tok, device)   # (N, T) twice, M pairs
            r = answer_rewards(model, ids, mask)                                                   # (N,)
            r_a, r_b = r[pairs.a], r[pairs.b]                                                      # (M,) each
            losses = preference_loss(r_a, r_b, pairs.p, pairs.margin, cfg.center)                  # (M,)
            # Every prompt counts one: the weights of a prompt's pairs add up to 1.
            loss = (pairs.weight * losses).sum() / len(prompts)
            loss.backward()
            total += loss.detach()
            right += (pairs.weight * report.right((r_a - r_b).detach(), pairs.p)).sum() / len(prompts)

        # 3. One step of AdamW; a gradient that is not finite never reaches the weights.
        set_lr(optimizer, cfg.lr * cosine(step, run.n_steps, cfg.warmup))
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if run.allows_step(norm, model, prompts):
            optimizer.step()
        optimizer.zero_grad()

        run.log(step, tokens=sum(n_tokens[i] for i in prompts), loss=all_sum(total.item()),
                accuracy=all_sum(right.item()), grad_norm=norm.item())
        run.save_when_due(step, before=before)

    # The constant that Bradley-Terry leaves free: shift rewards so that held-out answers average 0, and save
    # once more as the last step. A run that is cut off before does this when it goes on.
    after = held_out_metrics(model, held, tok)
    if not cfg.data:
        after |= comparisons.gold_accuracy(held_rows, model, tok, max_len)
    model.reward_mean = after["reward_mean"]
    run.save(max(run.first, run.n_steps) - 1, before=before)
    write_jsonl(run.folder / "held_out.jsonl", show_held_out("after"))
    run.say_health(health.of_reward_model(run.history, after))
    run.finish(before, after)


if __name__ == "__main__":
    program(main, Config, __doc__)
