"""Pretraining: a GPT learns to continue text, from random weights.

    python -m data.pretrain                                     the tiny world's internet, about a minute
    python -m data.pretrain --size gpt2 --data mine.txt --length 1024 --lr 6e-4    your text, a GPT-2 of 124M

Equation (Radford et al. 2019), x a window of N + 1 tokens of text:

    L(theta) = - sum_t log p_theta(x_t | x_<t) / N

Left out: text too large for memory, an evaluation during the run, a schedule of batch sizes.
The tiny world's internet leaves a base model with three failures, which the later stages mend: it answers
with something wrong, helps with harm, and invents what nobody can know.
"""
import typing
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from data import InputError, report, world
from data.flags import RunFlags, program
from data.parallel import all_sum, generate_answers, micro_batches, prepare
from data.prompts import TEST_MAX_NEW, Tests, read_corpus, test_prompts
from data.run import Run
from data.setup import MEASURE, adamw, cosine, seeded, set_lr, setup
from data.files.tokenizer import gpt2_tokenizer, tokenizer_from_ranks
from model import GPT, GPTConfig, refresh, sampling_copy, token_logprobs

SIZES = {   # name: fields of GPTConfig; any other shape is a row here
    "tiny": dict(n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_inner=344, head_dim=32, max_len=256,
                 norm="rmsnorm", pos="rope", mlp="swiglu", bias=False),
    "gpt2": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_inner=3072, head_dim=64, max_len=1024),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_kv_head=16, n_embd=1024, n_inner=4096, head_dim=64,
                        max_len=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_kv_head=20, n_embd=1280, n_inner=5120, head_dim=64,
                       max_len=1024),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_kv_head=25, n_embd=1600, n_inner=6400, head_dim=64,
                    max_len=1024),
}


@dataclass
class Config(RunFlags):
    """The flags of `python -m data.pretrain`."""
    # Model and data
    size: typing.Literal[tuple(SIZES)] = "tiny"   # shape of the model, a row of SIZES
    data: str = ""                # text file, documents separated by <|endoftext|>
                                  # (default: the tiny world's corpus)
    length: int = 128             # tokens a sequence
    # Training
    steps: int = 1600             # optimizer steps
    batch_size: int = 8           # sequences a step
    micro_batch: int = 32         # sequences per forward pass; changes memory and nothing else
    lr: float = 4e-3              # peak learning rate of AdamW (6e-4 for gpt2)
    warmup: int = 40              # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.1     # on matrices only
    grad_clip: float = 1.0        # largest gradient norm
    # The run itself (the same in every script)
    save_every: int = 400         # steps between checkpoints


def continue_texts(sampler, tok, starts, seed):
    """How a model goes on after starts (n, 16), beginnings of text: report.Answers."""
    prompts, generator = starts.tolist(), seeded(seed, MEASURE)
    _, _, _, said = generate_answers(sampler, tok, prompts, TEST_MAX_NEW, generator)
    texts = [tok.decode(ids) for ids in said]
    return report.Answers(texts, prompts, said, [{"answer": text} for text in texts])


def main(cfg):
    """Pretrain a base model from scratch."""
    device = setup(cfg)
    data = cfg.data or world.TINY / "corpus.txt"
    run = Run.open(cfg, "pretrain", [data])

    # The text as ids, and a model of random weights for its vocabulary.
    tok = tokenizer_from_ranks(world.TINY / "tiny.tiktoken") if cfg.size == "tiny" else gpt2_tokenizer()
    train, test = read_corpus(data, tok, cfg.length, min_windows=4)   # (N,), (M,)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, **SIZES[cfg.size]))
    if not 16 <= cfg.length <= model.cfg.max_len:
        raise InputError(f"--length {cfg.length} is not between 16 and the context of {model.cfg.max_len} "
                         f"tokens that --size {cfg.size} has")
    n_weights = sum(p.numel() for p in model.parameters())
    run.say(f"{n_weights / 1e6:.1f} million weights; {len(train):,} tokens of {data} to train on, "
            f"{len(test):,} held out")

    # What it will be asked: the tiny world's test prompts, or to continue one's own held-out text.
    starts = test[: len(test) // 16 * 16].view(-1, 16)[: report.N_SAMPLES]   # (n, 16)
    if cfg.data:
        rows = [{"prompt": [{"role": "user", "content": tok.decode(start)}]} for start in starts]
        tests = Tests(rows, graded=False, max_new=TEST_MAX_NEW)
    else:
        tests = test_prompts(model, tok, TEST_MAX_NEW)

    # The model on its device, and its optimizer.
    sampler = sampling_copy(model).to(device)
    model = prepare(model, cfg, device)
    optimizer = adamw(model, cfg.weight_decay)
    run.begin(cfg.steps, tok, model=(model, optimizer))

    def measure(title):
        """Compression of the held-out text, and what the model says: metrics and report.Answers."""
        refresh(sampler, model)
        bits = {"bits_per_byte": report.bits_per_byte(model, tok, test.to(device), cfg.length)}
        if cfg.data:
            answers = continue_texts(sampler, tok, starts, cfg.seed)
            run.samples(title, tests.prompts, answers.texts)
            return bits, answers
        metrics, answers = run.measure(title, sampler, tests)
        return bits | metrics, answers

    before, first_answers = run.before(measure)
    for step in run.steps():
        # 1. Windows of text, at places drawn anew in every step.
        generator = seeded(cfg.seed, step)
        at = torch.randint(len(train) - cfg.length + 1, (cfg.batch_size,), generator=generator)   # (B,)
        windows = train[at[:, None] + torch.arange(cfg.length)]   # (B, T)

        # 2. L = - sum log p / N over the whole step, micro-batch by micro-batch. Nothing predicts the first
        #    token of a window.
        n_tokens = cfg.batch_size * (cfg.length - 1)
        total = torch.zeros((), device=device)
        for part in micro_batches(range(cfg.batch_size), [cfg.length] * cfg.batch_size, cfg.micro_batch):
            x = windows[part]   # (b, T)
            everywhere = torch.ones(x.shape, dtype=torch.bool)
            loss = -token_logprobs(model, x.to(device), everywhere).sum() / n_tokens
            loss.backward()
            total += loss.detach()

        # 3. One step of AdamW; a gradient that is not finite never reaches the weights.
        set_lr(optimizer, cfg.lr * cosine(step, run.n_steps, cfg.warmup))
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if run.allows_step(norm, model, at.tolist()):
            optimizer.step()
        optimizer.zero_grad()

        run.log(step, tokens=windows.numel(), loss=all_sum(total.item()), grad_norm=norm.item())
        run.save_when_due(step)

    after, answers = measure("after")
    run.finish(before, after, answers=report.answer_rows(tests, first_answers, answers.scored))


if __name__ == "__main__":
    program(main, Config, __doc__)
