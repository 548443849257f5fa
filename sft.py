"""Supervised fine-tuning: the base model learns to answer, from demonstrations.

    python sft.py                                             the tiny world, from out/base
    python sft.py --init gpt2 --data alpaca.json --lr 2e-5    your model, your data (data/files/formats.py)

Equation (Ouyang et al. 2022, arXiv:2203.02155, section 3.5), x the conversation so far, y an assistant turn:

    L(theta) = - sum_t log p_theta(y_t | x, y_<t) / N

The sum runs over the assistant's tokens only, each turn's EOS included. N is their number in the whole
optimizer step, so that the loss does not depend on how a step is cut into micro-batches. Long conversations
are cut at the end and then carry no EOS: a cut is not an end.

Left out: packing (batches of similar length waste little and need no block-diagonal mask), dropout,
data-loader workers. On the tiny world SFT ends far above the base model and far below the ceiling: it
imitates careless demonstrators too. """
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from data import InputError, report, world
from data.files import formats
from data.chain import need
from data.files.checkpoint import load
from data.flags import RunFlags, program
from data.parallel import all_sum, micro_batches, prepare
from data.prompts import test_prompts
from data.run import Run
from data.setup import adamw, cosine, plan_of, set_lr, setup
from model import pad_batch, refresh, sampling_copy, token_logprobs, with_lora


@dataclass
class Config(RunFlags):
    """The flags of `python sft.py`."""
    # Model and data
    init: str = ""   # base model: a folder of ours, of Hugging Face, or a hub name (default: base)
    data: str = ""                # demonstrations (default: the tiny world's)
    max_len: int = 256            # tokens a conversation; longer ones are cut
    held_out: float = 0.05        # share of the prompts kept for the held-out loss
    max_new: int = 48             # longest sampled answer, in tokens
    lora: int = 0                 # rank of adapters on a frozen trunk (0: train all)
    # Training
    epochs: int = 3               # passes over the data
    batch_size: int = 32          # conversations a step
    micro_batch: int = 32         # conversations per forward pass; changes memory and nothing else
    lr: float = 1e-3              # peak learning rate of AdamW (1e-5 to 2e-5 for real models)
    warmup: int = 20              # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.01    # on matrices only
    grad_clip: float = 1.0        # largest gradient norm


def encode(rows, tok, max_len):
    """[(ids, mask)] of conversations, cut to max_len tokens, and how many were cut and how many left out,
    because they have no supervised token within it."""
    out, n_cut, n_left_out = [], 0, 0
    for row in rows:
        ids, mask = tok.render(row["messages"])
        mask = [0, *mask[1:max_len]]    # nothing predicts the first token
        if any(mask):
            out.append((ids[:max_len], mask))
            n_cut += len(ids) > max_len
        else:
            n_left_out += 1
    return out, n_cut, n_left_out


def nll(model, examples, tok):
    """Summed negative log-likelihood of the supervised tokens of examples [(ids, mask)]: a number on the
    model's device."""
    # An answer may stand between other turns, so each example brings the mask of its supervised tokens.
    ids, _ = pad_batch([ids for ids, _ in examples], tok.pad_id, model.wte.weight.device)      # (B, T)
    mask, _ = pad_batch([mask for _, mask in examples], 0)                           # (B, T), on the CPU
    return -token_logprobs(model, ids, mask.bool()).sum()


def n_supervised(examples):
    """How many supervised tokens examples [(ids, mask)] have."""
    return sum(sum(mask) for _, mask in examples)


@torch.no_grad()
def held_out_loss(model, examples, tok):
    """Mean negative log-likelihood per supervised token, in nats."""
    total = 0.0
    for i in range(0, len(examples), 64):
        total += nll(model, examples[i: i + 64], tok).item()
    return total / n_supervised(examples)


def main(cfg):
    """Fine-tune a model on demonstrations."""
    device = setup(cfg)
    init = cfg.init or need(cfg, "base")
    data = cfg.data or world.TINY / "demos.jsonl"
    run = Run.open(cfg, "sft", [init, data])
    model, tok = load(init)
    if cfg.lora:
        model = with_lora(model, cfg.lora)

    # The demonstrations as ids, some of them held out.
    rows, dropped = formats.load(data, "sft")
    run.say(formats.describe(rows, dropped, data))
    max_len = min(cfg.max_len, model.cfg.max_len)
    train_rows, held_rows = formats.split(rows, cfg.held_out, seed=0)
    train, n_cut, n_left_out = encode(train_rows, tok, max_len)
    held, held_cut, held_left_out = encode(held_rows, tok, max_len)
    run.say(f"{len(train)} conversations to train on, {len(held)} held out; {n_cut + held_cut} cut at "
            f"{max_len} tokens, {n_left_out + held_left_out} without an answer in them left out (--max_len)")
    if not train or not held:
        raise InputError(f"{data}: {len(train)} conversations within --max_len {max_len} tokens to train on, "
                         f"{len(held)} held out (--held_out); both need at least one")
    tests = test_prompts(model, tok, cfg.max_new, held_rows + train_rows if cfg.data else None, data)

    # The model on its device, its optimizer, and which conversations each step reads.
    sampler = sampling_copy(model).to(device)
    model = prepare(model, cfg, device)
    optimizer = adamw(model, cfg.weight_decay)
    lengths = [len(ids) for ids, _ in train]
    plan = plan_of(lengths, cfg)
    run.begin(len(plan), tok, model=(model, optimizer))

    def measure(title):
        """Held-out loss, and what the model answers to test prompts (--data: to held-out ones first)."""
        refresh(sampler, model)
        metrics, answers = run.measure(title, sampler, tests)
        return metrics | {"loss": held_out_loss(model, held, tok)}, answers

    before, first_answers = run.before(measure)
    for step in run.steps():
        # 1. This step's conversations, and how many supervised tokens they have: N of the equation.
        batch = plan[step]
        n_tokens = n_supervised([train[i] for i in batch])

        # 2. L = - sum log p / N over the whole step, micro-batch by micro-batch. Divided by N here and not by
        #    the micro-batch's own count, or a token would count more in a micro-batch that has few.
        total = torch.zeros((), device=device)
        for part in micro_batches(batch, lengths, cfg.micro_batch):
            loss = nll(model, [train[i] for i in part], tok) / n_tokens
            loss.backward()
            total += loss.detach()

        # 3. One step of AdamW; a gradient that is not finite never reaches the weights.
        set_lr(optimizer, cfg.lr * cosine(step, run.n_steps, cfg.warmup))
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if run.allows_step(norm, model, batch):
            optimizer.step()
        optimizer.zero_grad()

        n_read = sum(lengths[i] for i in batch)
        run.log(step, tokens=n_read, loss=all_sum(total.item()), grad_norm=norm.item())
        run.save_when_due(step)

    after, answers = measure("after")
    run.finish(before, after, answers=report.answer_rows(tests, first_answers, answers.scored))


if __name__ == "__main__":
    program(main, Config, __doc__)
