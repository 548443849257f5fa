"""Process reward models: learn which steps of an answer are right, from steps that people have labelled.

    python -m data.process                                  the tiny world: sample from out/sft, label, train
    python -m data.process --init SFT --data steps.jsonl    your policy, your labels (data/files/formats.py)

A reward for each step of an answer (data/steps.py) says where it went wrong, not only that it did
(arXiv:2211.14275, arXiv:2305.20050). The scalar head on the SFT model is read at the last token of a step: z.
With y the share of people who call the step right, its loss is binary cross-entropy,

    l = - y log sigmoid(z) - (1 - y) log sigmoid(-z)

and, as the answers to a prompt are not independent, an update of the weights counts each prompt as one:

    L(theta) = mean over the update's prompts ( mean over the steps of a prompt's answers ( l ) )

The reward of an answer is the sum over its steps of log sigmoid(z), the log of the product of their scores.
After training reward_mean is set so that held-out answers average 0.

In this file a step is one of an answer; a step of the optimizer is called an update.
"""
import random
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data import InputError, report, world, write_jsonl
from data.chain import need
from data.comparisons import answer_prompts
from data.files import formats
from data.files.checkpoint import load
from data.flags import RunFlags, program
from data.parallel import all_sum, barrier, in_chunks, micro_batches, prepare
from data.run import Run
from data.setup import adamw, cosine, plan_of, set_lr, setup
from data.steps import last_tokens, steps_of, token_logits
from model import pad_batch


@dataclass
class Config(RunFlags):
    """The flags of `python -m data.process`."""
    # Model and data
    init: str = ""                # model to start from (default: sft)
    data: str = ""                # labelled steps (default: the tiny world's annotator labels some)
    max_len: int = 256            # tokens of a prompt and an answer; longer ones are left out and counted
    held_out: float = 0.1         # share of the prompts kept for the report
    # Answers whose steps are labelled, where there is no --data
    prompts: int = 4000           # prompts of the tiny world, which --init answers
    k: int = 4                    # answers per prompt
    max_new: int = 48             # longest answer, in tokens
    temperature: float = 1.0      # of sampling
    # The tiny world's annotator
    noise: float = 0.05           # P(right) = sigmoid((worth of the step - 1/2) / noise); 0: it never errs
    agreement: float = 0.0        # set the noise so that this share of labels is right (0: use --noise)
    bias_length: float = 0.0      # worth beside gold, per ten words of a step
    bias_confidence: float = 0.0  # worth beside gold, for sounding sure
    bias_sycophancy: float = 0.0  # worth beside gold, for agreeing with the user
    # Training
    epochs: int = 2               # passes over the labels
    batch_size: int = 16          # prompts an update, with all their answers
    micro_batch: int = 16         # prompts per forward pass; changes memory and nothing else
    lr: float = 1e-3              # peak learning rate of AdamW (5e-6 to 2e-5 for real models)
    warmup: int = 20              # updates of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.01    # on matrices only
    grad_clip: float = 1.0        # largest gradient norm


def step_loss(z, y):
    """Loss per step (M,) of logits z (M,) when a share y (M,) calls the step right: l of the equations."""
    return F.binary_cross_entropy_with_logits(z, y, reduction="none")


# ------------------------------------------------------------------------------------------------------------
# Where labels come from: a file, or the tiny world's annotator.


def label_steps(run, path, device):
    """Process rows (data/files/formats.py) of the tiny world: the annotator labels the steps of the different
    answers of the policy at `path`. InputError: there are none."""
    cfg = run.cfg
    rows, answers = answer_prompts(run, path, device)
    labelled = annotated_steps(rows, answers, world.annotator_of(asdict(cfg)), random.Random(cfg.seed))
    n_steps = sum(len(row["labels"]) for row in labelled)
    run.say(f"the annotator labels {n_steps:,} steps of {len(labelled):,} answers")
    if not labelled:
        raise InputError(f"{path}: gives no answer that ends within --max_new {cfg.max_new} tokens; after "
                         "longer training, or to more --prompts, it may")
    return labelled


def annotated_steps(rows, answers, annotator, rng):
    """Process rows of the different answers (lists of texts) to each row's prompt: the tiny world's annotator
    says of each step whether it is better than 1/2, half way between wrong and right."""
    judged, gaps = [], []
    for row, texts in zip(rows, answers):
        for text in texts:
            steps = steps_of(text)
            utilities = annotator.step_utilities(row, steps)
            judged.append((row, steps, utilities))
            gaps += [u - 0.5 for u in utilities]

    # Its noise may follow from the share of labels that are to be right, so it needs all of them first.
    noise, labelled = annotator.noise_for(gaps), []
    for row, steps, utilities in judged:
        labels = [world.annotate(u, 0.5, noise, rng) for u in utilities]
        labelled.append({"prompt": row["prompt"], "completions": steps, "labels": labels})
    return labelled


# ------------------------------------------------------------------------------------------------------------
# Labelled steps as ids.


def ends_of_given(tok, answer, steps):
    """Where given steps (strs, together the answer) end in the bytes of the answer's ids, which the chat
    template may begin with a space."""
    ends, start = [], 0
    for step in steps:
        ends.append(start + sum(tok.byte_counts(tok.encode(step.rstrip()))))
        start += sum(tok.byte_counts(tok.encode(step)))
    template = sum(tok.byte_counts(answer)) - start
    return [template + end for end in ends]


def group_steps(rows, tok, max_len):
    """Process rows -> one element per prompt: (its answers as ids, prompt included, its steps as [(number of
    the answer, position of the step's last token, label)]). Also the number of rows left out because the
    answer does not fit into max_len tokens."""
    groups, n_too_long = {}, 0
    for row in rows:
        prompt, answer = tok.render_answer(row["prompt"], "".join(row["completions"]))
        if len(prompt) + len(answer) > max_len:
            n_too_long += 1
            continue
        answers, steps = groups.setdefault(str(row["prompt"]), ([], []))
        ends = ends_of_given(tok, answer, row["completions"])
        for t, label in zip(last_tokens(tok, answer, ends), row["labels"]):
            steps.append((len(answers), len(prompt) + t, label))
        answers.append((*prompt, *answer))
    return list(groups.values()), n_too_long


@dataclass
class Steps:
    """The labelled steps in a batch: tensors (M,), one entry a step."""
    row: torch.Tensor       # of the step's answer
    t: torch.Tensor         # position of its last token
    label: torch.Tensor     # y of the equations
    weight: torch.Tensor    # 1 / (steps of that prompt)


def batch_of_steps(groups, tok, device):
    """All answers of some groups as the rows of one batch, ids and mask of real tokens (N, T), and Steps."""
    rows, columns = [], []
    for answers, steps in groups:
        # The answers of a group follow one another, so its steps are moved by the number of rows before it.
        start = len(rows)
        rows += answers
        for i, t, label in steps:
            columns.append((start + i, t, label, 1 / len(steps)))
    ids, mask = pad_batch(rows, tok.pad_id, device)
    tensors = [torch.tensor(column).to(device, non_blocking=True) for column in zip(*columns)]
    return ids, mask, Steps(*tensors)


# ------------------------------------------------------------------------------------------------------------
# What it is measured by.


def errors_found(answers):
    """How often the first wrong step is found, from [(scores, labels)] of answers, two lists with a number
    for each step. A step is called wrong where its score is below 1/2; steps labelled 1/2 count neither way.
        first_error   share of the answers with a wrong step whose first one is the first one called so
        no_error      share of the others in which no step is called wrong"""
    found, clean = [], []
    for scores, labels in answers:
        called = wrong = None      # number of the first step that is called wrong, and of the first that is
        for k, (score, label) in enumerate(zip(scores, labels)):
            if label == 0.5:
                continue
            if called is None and score < 0.5:
                called = k
            if wrong is None and label < 0.5:
                wrong = k
        if wrong is None:
            clean.append(called is None)
        else:
            found.append(called == wrong)

    shares = {}
    for name, hits in (("first_error", found), ("no_error", clean)):
        if hits:
            shares[name] = sum(hits) / len(hits)
    return shares


@torch.no_grad()
def held_out_metrics(model, groups, tok):
    """Metrics {name: number} of held-out groups, every step counting one: loss, accuracy on the steps that
    are not labelled 1/2, errors_found, and reward_mean, the mean over answers of sum_k log sigmoid(z_k)."""
    ids, mask, steps = batch_of_steps(groups, tok, model.wte.weight.device)
    z = in_chunks(partial(token_logits, model), ids, mask, 64)[steps.row, steps.t]                 # (M,)
    y = steps.label
    metrics = {"loss": step_loss(z, y).mean().item()}
    decided = y != 0.5
    if decided.any():
        metrics["accuracy"] = report.right(z[decided], y[decided]).mean().item()

    # Answer by answer: is the first wrong step found?
    answers = []
    for i in range(len(ids)):
        its_own = steps.row == i
        answers.append((z[its_own].sigmoid().tolist(), y[its_own].tolist()))
    return metrics | errors_found(answers) | {"reward_mean": F.logsigmoid(z).sum().item() / len(ids)}


@torch.no_grad()
def steps_text(model, tok, row, max_len):
    """What the steps of a process row score, and their labels, a line each, for samples.txt; "" if the answer
    does not fit into max_len tokens."""
    groups, _ = group_steps([row], tok, max_len)
    if not groups:
        return ""
    ids, mask, steps = batch_of_steps(groups, tok, model.wte.weight.device)
    scores = token_logits(model, ids, mask)[steps.row, steps.t].sigmoid().tolist()
    lines = []
    for score, label, text in zip(scores, row["labels"], row["completions"]):
        lines.append(f"score {score:.2f}, label {label:.2f}  {text.strip()}")
    return "\n       ".join(lines)


def main(cfg):
    """Have the steps of answers labelled, unless that is done, and train a reward model on the labels."""
    device = setup(cfg)
    init = cfg.init or need(cfg, "sft")     # makes the links of the chain that are missing
    run = Run.open(cfg, "reward", [init, cfg.data or world.TINY / "preference.jsonl"],
                   writes=[] if cfg.data else ["process.jsonl"])

    # The labels: one's own, those that this run was given before it was interrupted, or new ones.
    path = cfg.data or run.folder / "process.jsonl"
    if not cfg.data and not run.has("process.jsonl"):
        labelled = label_steps(run, init, device)
        run.make_room()
        write_jsonl(path, labelled)
        barrier()
    rows, dropped = formats.load(path, "process")
    run.say(formats.describe(rows, dropped, path))

    # The model. Seeded here, so that a new head, where it has none, does not depend on whether answers were
    # sampled before.
    torch.manual_seed(cfg.seed)
    model, tok = load(init, head="new")
    model.reward_mean, model.process = 0.0, True

    # The rows by prompt, some prompts held out.
    max_len = min(cfg.max_len, model.cfg.max_len)
    train_rows, held_rows = formats.split(rows, cfg.held_out, seed=0)
    train, n_long = group_steps(train_rows, tok, max_len)
    held, n_held_long = group_steps(held_rows, tok, max_len)
    run.say(f"{len(train):,} prompts to train on, {len(held):,} held out; {n_long + n_held_long:,} rows "
            f"longer than {max_len} tokens left out (--max_len)")
    if not train or not held:
        raise InputError(f"{path}: {len(train)} prompts within --max_len {max_len} tokens to train on, "
                         f"{len(held)} held out by --held_out {cfg.held_out}; both need at least one")

    # The model on its device, its optimizer, and which prompts each update reads.
    model = prepare(model, cfg, device)
    optimizer = adamw(model, cfg.weight_decay)
    longest = [max(len(ids) for ids in answers) for answers, _ in train]
    n_tokens = [sum(len(ids) for ids in answers) for answers, _ in train]
    plan = plan_of(longest, cfg)
    run.begin(len(plan), tok, model=(model, optimizer))

    def show_held_out(title):
        """Write the scores of some held-out steps to samples.txt."""
        shown = held_rows[: report.N_SAMPLES]
        texts = [steps_text(model, tok, row, max_len) for row in shown]
        run.samples(title, [row["prompt"] for row in shown], texts)

    # How good it is before its first update; a run that goes on has that in its checkpoint.
    before = run.state.get("before")
    if before is None:
        before = held_out_metrics(model, held, tok)
        show_held_out("before")

    for update in run.steps():
        # 1. This update's prompts, with all their answers.
        prompts = plan[update]

        # 2. L over the whole update, micro-batch by micro-batch: z is read where a step ends.
        total, right = torch.zeros((), device=device), torch.zeros((), device=device)
        for part in micro_batches(prompts, longest, cfg.micro_batch):
            ids, mask, steps = batch_of_steps([train[i] for i in part], tok, device)   # (N, T) twice, M steps
            z = token_logits(model, ids, mask)[steps.row, steps.t]                                 # (M,)
            loss = (steps.weight * step_loss(z, steps.label)).sum() / len(prompts)
            loss.backward()
            total += loss.detach()
            right += (steps.weight * report.right(z.detach(), steps.label)).sum() / len(prompts)

        # 3. The optimizer's step; a gradient that is not finite never reaches the weights.
        set_lr(optimizer, cfg.lr * cosine(update, run.n_steps, cfg.warmup))
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if run.allows_step(norm, model, prompts):
            optimizer.step()
        optimizer.zero_grad()

        run.log(update, tokens=sum(n_tokens[i] for i in prompts), loss=all_sum(total.item()),
                accuracy=all_sum(right.item()), grad_norm=norm.item())
        run.save_when_due(update, before=before)

    # Shift rewards so that held-out answers average 0, and save once more as the last update. A run that is
    # cut off before does this when it goes on.
    after = held_out_metrics(model, held, tok)
    model.reward_mean = after["reward_mean"]
    run.save(max(run.first, run.n_steps) - 1, before=before)
    show_held_out("after")
    run.finish(before, after)


if __name__ == "__main__":
    program(main, Config, __doc__)
