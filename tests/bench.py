"""How fast every stage is: against what this machine can multiply and copy, and against transformers and TRL.

    python tests/bench.py                                     GPT-2 124M shapes, batch 8 x 256 tokens, random weights
    python tests/bench.py --sizes 124M,774M,1558M --batch 32 --length 1024 --peers false     on a GPU
    python tests/bench.py --sizes tiny --stages sft,sample

With transformers (and TRL, for its trainers) installed, each runs right after ours, in this process, on the same
shapes. Rates count every token that goes through the model once per pass over the data: for dpo both answers, for
sample and ppo new tokens.
    mfu   (6 N + 12 L C T) x tokens/s over the best rate seen here for large matrix products (arXiv:2204.02311, app. B)
    mbu   bytes of weights read per decoding step over the best rate seen here for copying
Nothing is timed before two warm-up rounds; the figure is the median round. The last line is JSON. Run nothing beside
it.
"""
import json
import statistics
import sys
import tempfile
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import (GPT, SIZES, GPTConfig, frozen, generate, optimizer_for, run, setup,   # noqa: E402, before torch
                   token_logprobs, with_lora)

import torch   # noqa: E402

import dpo   # noqa: E402
import ppo   # noqa: E402
import reward   # noqa: E402
from data import InputError   # noqa: E402

GPT2 = dict(n_inner=None, max_len=1024, vocab_size=50304)
SHAPES = {"tiny": SIZES["tiny"] | {"vocab_size": 1024}}
for name, layers, heads, width in (("124M", 12, 12, 768), ("355M", 24, 16, 1024), ("774M", 36, 20, 1280),
                                   ("1558M", 48, 25, 1600)):
    SHAPES[name] = GPT2 | dict(n_layer=layers, n_head=heads, n_kv_head=heads, n_embd=width, n_inner=4 * width,
                               head_dim=64)
SHAPES["8B"] = dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336, head_dim=128, vocab_size=128256,
                    max_len=1024, norm="rmsnorm", pos="rope", mlp="swiglu", bias=False, tie=False)
STAGES = ("sft", "reward", "dpo", "sample", "ppo")


@dataclass
class Config:
    sizes: str = "124M"           # which, of the shapes at the top of this file
    stages: str = "all"           # which, of sft,reward,dpo,sample,ppo
    batch: int = 8                # sequences
    length: int = 256             # tokens a sequence
    prompt: int = 64              # tokens of a prompt in sample and ppo
    new: int = 64                 # tokens generated for each
    lora: int = 0                 # rank of adapters in ppo (0: four full models)
    rounds: int = 5               # timed rounds of each
    peers: bool = True            # also run transformers and TRL, where they are installed
    seed: int = 0                 # of weights and tokens
    device: str = ""              # cpu, cuda, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products
    compile: bool = False         # torch.compile the training forward


def seconds(f, rounds, device):
    """Median wall time of f(), after two calls that do not count."""
    times = []
    for i in range(rounds + 2):
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def limits(device, autocast):
    """The best rates seen: FLOP/s of a large matrix product in the training dtype, bytes/s of a large copy."""
    with autocast():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    flops = 2 * n ** 3 / min(seconds(lambda: a @ a, 3, device) for _ in range(5))
    x = torch.empty(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)
    y = torch.empty_like(x)
    return flops, 2 * x.nbytes / min(seconds(lambda: y.copy_(x), 3, device) for _ in range(5))


def trainer(model, optimizer, loss):
    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def ours(shape, cfg, device, autocast):
    """{stage: (a function that does one round, tokens of a round)} of this suite."""
    torch.manual_seed(cfg.seed)
    new = lambda **kw: GPT(GPTConfig(**{**SHAPES[shape], **kw})).to(device)   # noqa: E731
    V, B, T, tok = SHAPES[shape]["vocab_size"], cfg.batch, cfg.length, SimpleNamespace(pad_id=0, decode=lambda ids: "")
    rows = torch.randint(V, (B, T)).tolist()
    forward = torch.compile(token_logprobs) if cfg.compile else token_logprobs

    def sft():
        model = new()
        ids = torch.tensor(rows, device=device)

        def loss():
            with autocast():
                return -forward(model, ids, torch.ones_like(ids))[:, 1:].mean()
        return trainer(model, optimizer_for(model, 1e-5, 0.0), loss), B * T

    def reward_():
        model = new(scalar_head=True)
        groups = [([tuple(rows[i]), tuple(rows[i + 1])], [(0, 1, 1.0, 0.0, 1.0)]) for i in range(0, B, 2)]

        def loss():
            with autocast():
                r, (i, j), p, m, *_ = reward.group_scores(model, groups, tok, device)
            return reward.preference_loss(r[i], r[j], p, m).mean()
        return trainer(model, optimizer_for(model, 1e-5, 0.0), loss), B * T

    def dpo_():   # with the pass of the reference, which happens once per pair and run
        model = new()
        examples = [(rows[i][:T // 2], rows[i][T // 2:], rows[i + 1][T // 2:], 1.0) for i in range(0, B, 2)]
        options = dpo.Config(sft_coef=0.0)

        def loss():
            ref = dpo.all_logps(model, examples, tok, device, autocast, B).to(device)
            with autocast():
                logp, n = (t.view(2, -1) for t in dpo.logps(model, dpo.both(examples), tok, device, forward))
            return dpo.pair_loss(options, 0.1, logp, ref, n, torch.ones(B // 2, device=device))[0].mean()
        return trainer(model, optimizer_for(model, 1e-6, 0.0), loss), B * T

    prompts = torch.randint(V, (B, cfg.prompt)).tolist()

    def sample():
        model = new().requires_grad_(False)

        def go():
            with autocast():
                generate(model, prompts, cfg.new, eos_id=-1)
        return go, B * cfg.new

    def ppo_():
        policy, rm = new(), new(scalar_head=True)
        if cfg.lora:
            ref = frozen(policy, autocast)
            policy, value = with_lora(ref, cfg.lora), with_lora(ref, cfg.lora, scalar_head=True)
        else:
            ref, value = frozen(new(), autocast), new(scalar_head=True)
        frozen(rm, autocast)
        options = ppo.Config(rollouts=B, group=1, epochs=4, minibatches=1, micro_batch=B, max_new=cfg.new,
                             value_warmup=0, lr=1e-6, value_lr=1e-6, iterations=10 ** 6)
        optimizers = [optimizer_for(m, 1e-6, 0.0) for m in (policy, value)]
        tok.eos_id = -1
        rng, split = torch.Generator().manual_seed(0), {"generate": [], "score": [], "train": []}

        def score(b):
            with torch.no_grad(), autocast():
                return reward.final_scores(rm, b.ids, b.width)

        def update(step, model, optimizer, lr, batch):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        def go():
            clock = [time.perf_counter()]
            b = ppo.rollout(policy, tok, [{}] * B, prompts, options, 0, rng, autocast)
            clock.append(time.perf_counter())
            ppo.score(b, policy, ref, value, tok, score, options, autocast)
            ppo.credit(b, 0.05, options)
            clock.append(time.perf_counter())
            ppo.update(b, policy, value, *optimizers, forward, ppo.token_values, None, options, 0, rng, autocast,
                       SimpleNamespace(update=update))
            clock.append(time.perf_counter())
            for name, x, y in zip(split, clock, clock[1:]):
                split[name].append(y - x)
        go.split = split
        return go, B * cfg.new
    return {"sft": sft, "reward": reward_, "dpo": dpo_, "sample": sample, "ppo": ppo_}


def theirs(shape, cfg, device, autocast):
    """{(stage, peer): the same, on the same shapes}; GPT-2 shapes only, what is not installed is left out."""
    try:
        import transformers
    except ImportError:
        return {}
    s = SHAPES[shape]
    if s.get("norm") == "rmsnorm":
        return {}
    B, T, V = cfg.batch, cfg.length, s["vocab_size"]
    torch.manual_seed(cfg.seed)
    rows = torch.randint(V - 1, (B, T))
    config = transformers.GPT2Config(vocab_size=V, n_positions=s["max_len"], n_embd=s["n_embd"], n_layer=s["n_layer"],
                                     n_head=s["n_head"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                     bos_token_id=V - 1, eos_token_id=V - 1)

    def sft():
        model = transformers.GPT2LMHeadModel(config).to(device).train()
        ids = rows.to(device)

        def loss():
            with autocast():
                return model(input_ids=ids, labels=ids).loss
        return trainer(model, torch.optim.AdamW(model.parameters(), 1e-5, fused=True), loss), B * T

    def sample():
        model = transformers.GPT2LMHeadModel(config).to(device).eval()
        prompts = rows[:, : cfg.prompt].to(device)

        def go():
            with torch.no_grad(), autocast():
                model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=cfg.new,
                               min_new_tokens=cfg.new, do_sample=True, top_k=0, pad_token_id=0)
        return go, B * cfg.new

    out = {("sft", "transformers"): sft, ("sample", "transformers"): sample}
    try:
        import trl
        from datasets import Dataset
    except ImportError:
        return out
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=letters(V), eos_token="e", pad_token="p", unk_token="u")
    bf16 = cfg.dtype != "float32"
    shared = dict(per_device_train_batch_size=B, max_steps=cfg.rounds + 2, report_to=[], output_dir=tempfile.mkdtemp(),
                  save_strategy="no", bf16=bf16, use_cpu=device.type == "cpu", logging_steps=10 ** 6,
                  disable_tqdm=True, gradient_checkpointing=False)
    scored = transformers.GPT2Config.from_dict(config.to_dict())
    scored.num_labels, scored.pad_token_id = 1, 0
    words = lambda ids: " ".join(f"w{i}" for i in ids)   # noqa: E731

    def timed(trainer, tokens):
        """A trainer runs by itself: the median time between its steps, as a function that was called already."""
        marks = []

        class Marks(transformers.TrainerCallback):
            def on_step_end(self, *args, **kw):
                marks.append(time.perf_counter())
        trainer.add_callback(Marks())
        trainer.train()
        gaps = [b - a for a, b in zip(marks[1:], marks[2:])]
        return SimpleNamespace(measured=statistics.median(gaps)), tokens

    def trl_sft():
        data = Dataset.from_dict({"input_ids": rows.repeat(cfg.rounds + 2, 1).tolist()})
        args = trl.SFTConfig(max_length=T, **shared)
        return timed(trl.SFTTrainer(transformers.GPT2LMHeadModel(config), args=args, train_dataset=data,
                                    processing_class=tok), B * T)

    def pairs(whole=False):
        """Answers of T/2 tokens to prompts of T/2; `whole`: of T tokens to none, RewardTrainer reads no prompt."""
        n = (cfg.rounds + 2) * B // 2
        sizes = (0, T - 1, T - 1) if whole else (T // 2, T // 2 - 1, T // 2 - 1)
        names = ("prompt", "chosen", "rejected")
        return Dataset.from_list([
            {k: words(torch.randint(10, V - 10, (m,)).tolist()) for k, m in zip(names, sizes) if m} for _ in range(n)])

    def trl_dpo():
        args = trl.DPOConfig(**(shared | {"per_device_train_batch_size": B // 2}), max_length=T,
                             max_prompt_length=T // 2)
        policy, ref = (transformers.GPT2LMHeadModel(config) for _ in range(2))
        return timed(trl.DPOTrainer(policy, ref_model=ref, args=args, train_dataset=pairs(), processing_class=tok),
                     B * T)

    def trl_reward():
        model = transformers.GPT2ForSequenceClassification(scored)
        args = trl.RewardConfig(**(shared | {"per_device_train_batch_size": B // 2}), max_length=T)
        return timed(trl.RewardTrainer(model, args=args, train_dataset=pairs(True), processing_class=tok), B * T)

    def trl_ppo():
        lm, scorer = transformers.GPT2LMHeadModel, transformers.GPT2ForSequenceClassification
        data = Dataset.from_dict({"input_ids": rows[:, : cfg.prompt].repeat(cfg.rounds + 2, 1).tolist()})
        args = trl.PPOConfig(**{k: v for k, v in shared.items() if k != "max_steps"}, num_ppo_epochs=4,
                             total_episodes=B * (cfg.rounds + 2), num_mini_batches=1, response_length=cfg.new,
                             local_rollout_forward_batch_size=B, temperature=1.0, num_sample_generations=0,
                             gradient_accumulation_steps=1)
        return timed(trl.PPOTrainer(args, tok, lm(config), lm(config), scorer(scored), data, scorer(scored),
                                    eval_dataset=data), B * cfg.new)
    if hasattr(trl, "PPOTrainer"):   # until 0.21 or so
        out[("ppo", "TRL")] = trl_ppo
    return out | {("sft", "TRL"): trl_sft, ("dpo", "TRL"): trl_dpo, ("reward", "TRL"): trl_reward}


def letters(V):
    """A tokenizer of V words w0, w1, ... for the peers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocab = {"p": 0, "e": V - 1, "u": V - 2} | {f"w{i}": i for i in range(1, V - 2)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="u"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tok


def main(cfg):
    device, autocast = setup(cfg)
    stages = STAGES if cfg.stages == "all" else cfg.stages.split(",")
    sizes = cfg.sizes.split(",")
    if unknown := [x for x in stages if x not in STAGES] + [x for x in sizes if x not in SHAPES]:
        raise InputError(f"no such stage or size: {', '.join(unknown)}; there are {', '.join([*STAGES, *SHAPES])}")
    if cfg.batch % 2:
        raise InputError(f"--batch {cfg.batch}: pairs need an even number of sequences")
    flops, copy = limits(device, autocast)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: {flops / 1e12:.2f} TFLOP/s in large matrix products, {copy / 1e9:.1f} GB/s in large copies\n")
    table = []
    print(f"{'size':8}{'stage':8}{'who':14}{'tokens/s':>12}{'s/round':>10}{'mfu':>8}{'mbu':>8}{'ratio':>8}   peak GB")
    for size in sizes:
        s = SHAPES[size]
        with torch.device("meta"):
            weights = sum(p.numel() for p in GPT(GPTConfig(**s)).parameters())
        body = weights - s["vocab_size"] * s["n_embd"] * (1 if s.get("tie", True) else 2)   # without embedding and head
        attended = 12 * s["n_layer"] * s["n_head"] * s["head_dim"] * cfg.length
        mine = ours(size, cfg, device, autocast)
        peers = theirs(size, cfg, device, autocast) if cfg.peers else {}
        for stage in stages:
            rate = None
            for who, make in [("ours", mine[stage]), *((w, f) for (st, w), f in peers.items() if st == stage)]:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                go, tokens = make()
                t = go.measured if hasattr(go, "measured") else seconds(go, cfg.rounds, device)
                row = {"size": size, "stage": stage, "who": who, "tokens_per_second": tokens / t, "seconds": t}
                if stage in ("sft", "reward"):
                    row["mfu"] = (6 * (weights if stage == "sft" else body) + attended) * tokens / t / flops
                if stage == "sample":   # one decoding step reads all weights once
                    row["mbu"] = weights * (2 if cfg.dtype != "float32" else 4) * cfg.new / t / copy
                if who == "ours":
                    rate = row["tokens_per_second"]
                else:
                    row["ratio"] = rate / row["tokens_per_second"]
                if device.type == "cuda":
                    row["gb"] = torch.cuda.max_memory_allocated() / 1e9
                if split := getattr(go, "split", None):
                    row["split"] = {k: statistics.median(v[2:]) for k, v in split.items()}
                table.append(row)
                cell = lambda k, f: format(row[k], f) if k in row else ""   # noqa: E731
                print(f"{size:8}{stage:8}{who:14}{row['tokens_per_second']:>12.0f}{t:>10.3f}{cell('mfu', '.2f'):>8}"
                      f"{cell('mbu', '.2f'):>8}{cell('ratio', '.2f'):>8}   {cell('gb', '.1f')} "
                      + " ".join(f"{k} {v:.2f} s" for k, v in row.get("split", {}).items()), flush=True)
                del go
    print(json.dumps({"device": name, "flops": flops, "bytes_per_second": copy, "rows": table}))


if __name__ == "__main__":
    run(main, Config, __doc__)
