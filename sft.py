"""Supervised fine-tuning: the base model learns to answer, from demonstrations.

    python sft.py                                           the tiny world, from out/base (made first if missing)
    python sft.py --init gpt2 --data alpaca.json --lr 2e-5  your model, your data (formats: data/formats.py)

Equation (Ouyang et al. 2022, arXiv:2203.02155, section 3.5): L(theta) = - sum_t log p_theta(y_t | x, y_<t), where x is
the conversation so far and y an assistant turn. The sum runs over the assistant's tokens only, each turn's EOS
included, and is divided by their number in the whole optimizer step, so that the loss does not depend on how a step is
cut into micro-batches. Long conversations are cut at the end and then carry no EOS: a cut is not an end.

Left out: packing (length buckets waste little and need no block-diagonal mask), dropout, multiple workers.
On the tiny world SFT ends far above the base model and far below the ceiling: it imitates careless demonstrators too.
"""
import time
import typing
from dataclasses import dataclass

import torch

from data import InputError, formats, world
from model import (Run, batches, cosine, distinct_2, for_training, home, load, load_optimizer, load_state, need,
                   optimizer_for, pad_batch, pieces, respond, run, save, seeded, setup, sibling, summed, token_logprobs)


@dataclass
class Config:
    """The flags of `python sft.py`."""
    init: str = ""                # base model: a folder of ours, of Hugging Face, or a hub name (default: base)
    data: str = ""                # demonstrations (default: the tiny world's)
    out: str = "out/sft"          # folder for the checkpoint, log, samples and plot
    epochs: int = 3               # passes over the data
    batch_size: int = 32          # conversations a step
    micro_batch: int = 32         # conversations per forward pass; smaller needs less memory and changes nothing else
    max_len: int = 256            # tokens a conversation, longer ones are cut
    lr: float = 1e-3              # peak learning rate of AdamW (1e-5 to 2e-5 for real models)
    warmup: int = 20              # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.01    # on matrices only
    grad_clip: float = 1.0        # largest gradient norm
    held_out: float = 0.05        # share of the prompts kept for the held-out loss
    max_new: int = 48             # longest sampled answer, in tokens
    save_every: int = 100         # steps between checkpoints
    max_steps: int = 0            # stop after this many steps (0: run all)
    resume: bool = False          # go on from the last checkpoint in --out
    seed: int = 0                 # every random draw comes from (seed, step)
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; weights stay fp32
    compile: bool = False         # torch.compile the training forward, and on a GPU the decoding step
    recompute: bool = False       # activation checkpointing: layers run again in the backward pass, for less memory
    fsdp: bool = False            # with torchrun: cut weights, gradients and optimizer state over the processes


def encode(rows, tok, max_len):
    """[(ids, mask)] of conversations; those without a supervised token within max_len are left out."""
    out = []
    for row in rows:
        ids, mask = tok.render(row["messages"])
        if any(mask[1:max_len]):
            out.append((ids[:max_len], mask[:max_len]))
    return out


def nll(model, examples, tok, device, forward=token_logprobs):
    """Summed negative log-likelihood of the supervised tokens of examples [(ids, mask)], and how many they are."""
    ids, _ = pad_batch([ids for ids, _ in examples], tok.pad_id, device)              # (B, T)
    mask, _ = pad_batch([mask for _, mask in examples], 0)       # (B, T), on the CPU: nothing has to wait for its sum
    mask[:, 0] = 0   # nothing predicts the first token
    return -forward(model, ids, mask).sum(), int(mask.sum())


def main(cfg):
    """Fine-tune a model on demonstrations."""
    device, autocast = setup(cfg)
    init = cfg.init or sibling(cfg, "base")
    if not cfg.init:
        need(init, "model.py", cfg)
    model, tok = load(init, home(cfg, device), scalar_head=False)
    path = cfg.data or world.TINY / "demos.jsonl"
    rows, dropped = formats.load(path, "sft")
    print(formats.describe(rows, dropped, path))
    max_len = min(cfg.max_len, model.cfg.max_len)
    train, held = (encode(part, tok, max_len) for part in formats.split(rows, cfg.held_out, seed=0))
    if not train or not held:
        raise InputError(f"{path}: {len(train)} conversations within --max_len {max_len} tokens to train on, "
                         f"{len(held)} held out (--held_out); both need at least one")

    state = load_state(cfg.out) if cfg.resume else {}
    if state:
        model.load_state_dict(state["model"])
    model = for_training(model, cfg, device)
    optimizer, first = optimizer_for(model, cfg.lr, cfg.weight_decay), state.get("step", 0)
    if state:
        load_optimizer(optimizer, state["optimizer"])
    forward = torch.compile(token_logprobs) if cfg.compile else token_logprobs
    lengths = [len(ids) for ids, _ in train]
    plan = [b for epoch in range(cfg.epochs) for b in batches(lengths, cfg.batch_size, cfg.seed, epoch)]
    n_steps = min(len(plan), cfg.max_steps or len(plan))
    tests = world.rows("test") if not cfg.data else [{"prompt": p} for p in formats.prompts_of(rows, 32)]
    tests = [r for r in tests if len(tok.render(r["prompt"], True)[0]) + cfg.max_new <= model.cfg.max_len]
    if not tests:
        raise InputError(f"{path}: no prompt leaves room for --max_new {cfg.max_new} tokens in the model's context of "
                         f"{model.cfg.max_len}")
    prompts = [r["prompt"] for r in tests]

    def measure():
        """Held-out loss, and what the model answers to prompts it has not been trained on."""
        model.eval()
        with torch.no_grad(), autocast():
            parts = [nll(model, held[i: i + 64], tok, device) for i in range(0, len(held), 64)]
            texts, _, ids = respond(model, tok, prompts, cfg.max_new, generator=seeded(cfg.seed, 0, device))
        model.train()
        out = {} if cfg.data else world.report(tests, texts)
        return out | {"loss": sum(p[0].item() for p in parts) / sum(p[1] for p in parts),
                      "length": sum(map(len, ids)) / len(ids), "eos_rate": sum(tok.eos_id in x for x in ids) / len(ids),
                      "distinct_2": distinct_2(ids)}, texts

    log = Run(cfg, "sft", n_steps, first)
    before, texts = (state["before"], None) if first else measure()
    if not first:
        log.samples("before", prompts[:12], texts[:12])
    for step in range(first, n_steps):
        start = time.time()
        examples = [train[i] for i in plan[step]]
        n_tokens = sum(sum(mask[1:]) for _, mask in examples)
        total = torch.zeros((), device=device)
        for part, real in pieces(examples, cfg.micro_batch):
            with autocast():
                # L = - sum log p / N over the whole step, Eq. above
                loss = real * nll(model, part, tok, device, forward)[0] / n_tokens
            loss.backward()
            total += loss.detach()
        lr = cfg.lr * cosine(step, len(plan), cfg.warmup)
        norm = log.update(step, model, optimizer, lr, {"rows": plan[step], "examples": examples})
        n_seen = sum(len(x) for x, _ in examples)
        log.step(step, loss=summed(total.item()), grad_norm=norm, tok_s=n_seen / (time.time() - start))
        if log.save_now(step):
            save(cfg.out, model, tok, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                       "step": step + 1, "before": before})
            log.saved(step)
    after, texts = measure()
    print(log.samples("after", prompts[:12], texts[:12]))
    log.finish(device, before, after, [("loss",), ("grad_norm",)])


if __name__ == "__main__":
    run(main, Config, __doc__)
