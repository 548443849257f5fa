"""How fast every stage is: against what this machine can multiply and copy, and against transformers and TRL.

    python tests/experiments/bench.py                  GPT-2 124M shapes, batch 8 x 256 tokens, random weights
    python tests/experiments/bench.py --sizes tiny --stages sft,sample
    python tests/experiments/bench.py --sizes 124M,355M --batch 32 --length 1024 --compile   on a GPU of 80 GB
    python tests/experiments/bench.py --sizes 774M,1558M --batch 32 --length 1024 --compile --recompute \\
        --peers false
    python tests/experiments/bench.py --sizes 8B --stages ppo --lora 16 --recompute --peers false

With transformers (and TRL, for its trainers) installed, they do the same work in this process, on the same
shapes. All take turns, round by round, and the least round of each counts: what else the machine does then
costs nobody more than the others. Rates count every token that goes through the model once per pass over the
data: for dpo both answers, for sample and ppo new tokens.
    mfu   (6 N + 12 L C T) x tokens/s over the best rate seen here for large matrix products
          (arXiv:2204.02311, app. B); what --recompute computes again does not count
    mbu   bytes of weights read per decoding step over the best rate seen here for copying
Nothing is timed before two warm-up rounds. A row that fails, as a size does that needs more memory than there
is, is marked, and the others go on. Peak memory is that of the two warm-up rounds, less what was there
before. The last line is JSON. Run nothing beside it.
"""
import functools
import gc
import json
import sys
import tempfile
import threading
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import dpo   # noqa: E402
import ppo   # noqa: E402
import reward   # noqa: E402
import sft   # noqa: E402
from data import InputError, pretrain   # noqa: E402
from data.flags import program   # noqa: E402
from data.parallel import generate_in_shares, in_chunks, micro_batches, prepare   # noqa: E402
from data.setup import adamw, set_lr, setup   # noqa: E402
from model import (GPT, GPTConfig, Linear, answer_rewards, compare_policies, last_token,   # noqa: E402
                   refresh, sampling_copy, token_logprobs, token_values)

SHAPES = {"tiny": pretrain.SIZES["tiny"] | {"vocab_size": 1024}}
for name, layers, heads, width in (("124M", 12, 12, 768), ("355M", 24, 16, 1024), ("774M", 36, 20, 1280),
                                   ("1558M", 48, 25, 1600)):
    SHAPES[name] = dict(n_layer=layers, n_head=heads, n_kv_head=heads, n_embd=width, n_inner=4 * width,
                        head_dim=64, max_len=1024, vocab_size=50304)
SHAPES["8B"] = dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336, head_dim=128,
                    max_len=1024, vocab_size=128256, norm="rmsnorm", pos="rope", mlp="swiglu", bias=False,
                    tie=False)
TRAIN_ON = ("sft", "reward", "dpo")   # stages whose rounds read --batch x --length tokens; others write --new


@dataclass
class Config:
    """The flags of `python tests/experiments/bench.py`."""
    # What is timed
    sizes: str = "124M"           # which, of the shapes at the top of this file
    stages: str = "all"           # which, of sft,reward,dpo,sample,ppo
    batch: int = 8                # sequences
    length: int = 256             # tokens a sequence
    prompt: int = 64              # tokens of a prompt in sample and ppo
    new: int = 64                 # tokens generated for each
    lora: int = 0                 # rank of adapters in ppo (0: four full models)
    rounds: int = 5               # timed rounds of each
    peers: bool = True            # also run transformers and TRL, where they are installed
    # How
    seed: int = 0                 # of weights and tokens
    device: str = ""              # cpu, cuda, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products
    compile: bool = False         # torch.compile every layer and, on a GPU, decode in CUDA graphs
    recompute: bool = False       # layers run again in the backward pass, for less memory


# ------------------------------------------------------------------------------------------------------------
# Clocks.


def wait(device):
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, device):
    """Wall time of one call of f()."""
    start = time.perf_counter()
    f()
    wait(device)
    return time.perf_counter() - start


def least(f, device, calls=15):
    """The shortest of several calls of f()."""
    return min(seconds(f, device) for _ in range(calls))


def limits(device):
    """The best rates seen: FLOP/s of a large product of matrices in the dtype of ours, bytes/s of a copy."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=Linear.compute_dtype or torch.float32)
    flops = 2 * n ** 3 / least(lambda: a @ a, device)
    x = torch.empty(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)
    y = torch.empty_like(x)
    return flops, 2 * x.nbytes / least(lambda: y.copy_(x), device)


# ------------------------------------------------------------------------------------------------------------
# Ours: one round of every stage, made of the stage's own functions, on random tokens.


@dataclass
class Work:
    """What a row of the table times."""
    go: typing.Callable                   # does one round
    parts: dict | None = None             # {part of a round: seconds, one number a round}, filled by go
    end: typing.Callable | None = None    # lets a trainer that waits for its turn come to its end


class NoTokenizer:
    """All that the stages ask of a tokenizer. No answer ends by itself."""
    pad_id, eos_ids = 0, {-1}


TOK = NoTokenizer()


def new_model(size, device, scalar_head=False):
    """A model of random weights, on the CPU. A GPU draws 8e9 of them sooner."""
    with torch.device(device):
        model = GPT(GPTConfig(**SHAPES[size], scalar_head=scalar_head))
    return model.cpu()


def random_rows(size, n, length):
    """n lists of `length` random ids."""
    return torch.randint(SHAPES[size]["vocab_size"], (n, length)).tolist()


def training(model, optimizer, loss):
    """Work of one optimizer step on loss(), as every stage takes it."""
    def go():
        loss().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Work(go)


def trained(size, cfg, device, scalar_head=False):
    """A new model and its optimizer, with a learning rate that changes next to nothing."""
    model = prepare(new_model(size, device, scalar_head), cfg, device)
    optimizer = adamw(model)
    set_lr(optimizer, 1e-6)
    return model, optimizer


def sft_work(size, cfg, device):
    """A step of sft.py: every token of every row is supervised."""
    model, optimizer = trained(size, cfg, device)
    examples = [(row, [1] * cfg.length) for row in random_rows(size, cfg.batch, cfg.length)]

    def loss():
        n_tokens = cfg.batch * cfg.length
        return sft.nll(model, examples, TOK) / n_tokens
    return training(model, optimizer, loss)


def reward_work(size, cfg, device):
    """A step of reward.py: two answers to each prompt."""
    model, optimizer = trained(size, cfg, device, scalar_head=True)
    rows, groups = random_rows(size, cfg.batch, cfg.length), []
    for i in range(0, cfg.batch, 2):
        groups.append(([tuple(rows[i]), tuple(rows[i + 1])], [(0, 1, 1.0, 0.0, 1.0)]))

    def loss():
        ids, mask, pairs = reward.batch_of_pairs(groups, TOK, device)            # (N, T), (N, T), M pairs
        r = answer_rewards(model, ids, mask)                                     # (N,)
        each = reward.preference_loss(r[pairs.a], r[pairs.b], pairs.p, pairs.margin, 0.01)
        return (pairs.weight * each).sum() / len(groups)
    return training(model, optimizer, loss)


def dpo_work(size, cfg, device):
    """A step of dpo.py: prompts of half the length with two answers of the other half. It includes the pass
    of the reference, which happens once per pair and run."""
    model, optimizer = trained(size, cfg, device)
    rows, half, examples = random_rows(size, cfg.batch, cfg.length), cfg.length // 2, []
    for i in range(0, cfg.batch, 2):
        examples.append((rows[i][:half], rows[i][half:], rows[i + 1][half:], 1.0))
    options, p = dpo.Config(beta=0.1, sft_coef=0.0), torch.ones(len(examples), device=device)

    def loss():
        known = dpo.all_logps(model, examples, TOK, cfg.batch)                   # (2, B / 2)
        logp, n = dpo.answer_logps(model, examples, TOK)                         # (2, B / 2) each
        return dpo.labelled_loss(logp, known, n, p, options)[0].mean()
    return training(model, optimizer, loss)


def sample_work(size, cfg, device):
    """Answers of --new tokens to --batch prompts, by a copy that is brought up to date before, as in every
    stage."""
    model = prepare(new_model(size, device), cfg, device)
    sampler = sampling_copy(model).to(device)
    prompts = random_rows(size, cfg.batch, cfg.prompt)

    def go():
        refresh(sampler, model)
        generate_in_shares(sampler, TOK, prompts, torch.rand(cfg.batch, cfg.new, dtype=torch.float64))
    return Work(go)


def ppo_work(size, cfg, device):
    """An iteration of ppo.py with its four models, 4 epochs of one minibatch; no relabelling."""
    B = cfg.batch
    options = ppo.Config(rollouts=B, group=1, epochs=4, minibatches=1, micro_batch=B, max_new=cfg.new,
                         lora=cfg.lora, compile=cfg.compile, recompute=cfg.recompute)
    reward_model = new_model(size, device, scalar_head=True)
    policy, reference, value = ppo.load_models(new_model(size, device), "", reward_model, options)
    sampler = sampling_copy(policy).to(device)
    trained_models = ppo.prepare_models(policy, reference, value, [reward_model], False, options, device)
    for _, optimizer in trained_models.values():
        set_lr(optimizer, 1e-6)
    prompts, parts = random_rows(size, B, cfg.prompt), {"generate": [], "score": [], "train": []}

    def generate(step):
        """1. of ppo.py: ids (B, T), mask (B, T), and the answers as lists of ids."""
        refresh(sampler, policy)
        ids, mask, _, said = ppo.rollout(sampler, TOK, prompts, options, step)
        return ids, mask, said

    def score(ids, mask, said):
        """2. to 4. of ppo.py: what the four models say of the answers, rewards, advantages; (B, T) each."""
        ended = torch.tensor([answer[-1] in TOK.eos_ids for answer in said], device=device)      # (B,)
        scores = in_chunks(functools.partial(answer_rewards, reward_model), ids, mask, B)        # (B,)
        scores = torch.where(ended, scores, -options.eos_penalty)
        compared = functools.partial(compare_policies, policy, reference)
        old_logp, ref_logp, *_ = in_chunks(compared, ids, mask, B)
        old_values = in_chunks(functools.partial(token_values, value), ids, mask, B)
        kl, _, _ = ppo.kl_estimators(old_logp, ref_logp)
        token_rewards = -0.05 * kl
        token_rewards[torch.arange(B), last_token(mask)] += scores
        advantages, returns = ppo.gae(token_rewards, old_values, mask, options.gamma, options.lam)
        return old_logp, old_values, ppo.whiten(advantages, mask), returns

    def train(ids, mask, old_logp, old_values, advantages, returns):
        """5. of ppo.py: four steps of policy and value model."""
        widths, weights = (last_token(mask) + 1).tolist(), ppo.token_weights(mask, "tokens", cfg.new)
        for _ in range(options.epochs):
            for part in micro_batches(range(B), widths, options.micro_batch):
                x, m, w = ids[part], mask[part], weights[part]
                logp = token_logprobs(policy, x, m, options.temperature)
                loss, _ = ppo.policy_loss(logp, old_logp[part], advantages[part], w, options.clip,
                                          options.clip)
                loss.backward()
                v = token_values(value, x, m)
                ppo.value_loss(v, old_values[part], returns[part], w, options.value_clip).backward()
            for model, optimizer in trained_models.values():
                clip_grad_norm_(model.parameters(), options.grad_clip)
                optimizer.step()
                optimizer.zero_grad()

    def timed(name, f, *inputs):
        """f(*inputs), and its seconds in `parts`."""
        start = time.perf_counter()
        out = f(*inputs)
        wait(device)
        parts[name].append(time.perf_counter() - start)
        return out

    def go():
        ids, mask, said = timed("generate", generate, len(parts["generate"]))
        numbers = timed("score", score, ids, mask, said)
        timed("train", train, ids, mask, *numbers)
    return Work(go, parts=parts)


STAGES = {"sft": sft_work, "reward": reward_work, "dpo": dpo_work, "sample": sample_work, "ppo": ppo_work}

# ------------------------------------------------------------------------------------------------------------
# Theirs: the same work by transformers and TRL.


def peers_of(size, stage, cfg, device):
    """{name: function that makes its Work} of the peers that are installed and do this stage; GPT-2 shapes
    only."""
    try:
        import transformers
    except ImportError:
        return {}
    if SHAPES[size].get("norm") == "rmsnorm":
        return {}
    found = {}
    for who, table in (("transformers", {"sft": hf_sft, "sample": hf_sample}), ("TRL", trl_stages())):
        if stage in table:
            found[who] = functools.partial(table[stage], hf_config(transformers, size), cfg, device)
    return found


def hf_config(transformers, size):
    """The size as a configuration of transformers."""
    s = SHAPES[size]
    end = s["vocab_size"] - 1
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2Config(vocab_size=s["vocab_size"], n_positions=s["max_len"], n_embd=s["n_embd"],
                                   n_layer=s["n_layer"], n_head=s["n_head"], bos_token_id=end,
                                   eos_token_id=end, **no_dropout)


def autocast(device):
    """Products in the same dtype as ours."""
    return torch.autocast(device.type, torch.bfloat16, enabled=Linear.compute_dtype is not None)


def hf_rows(config, n, length):
    """Random ids (n, length) without the end token."""
    return torch.randint(config.vocab_size - 1, (n, length))


def hf_sft(config, cfg, device):
    """A plain loop around transformers' GPT-2."""
    import transformers
    model = transformers.GPT2LMHeadModel(config).to(device).train()
    ids = hf_rows(config, cfg.batch, cfg.length).to(device)

    def loss():
        with autocast(device):
            return model(input_ids=ids, labels=ids).loss
    return training(model, torch.optim.AdamW(model.parameters(), 1e-6, fused=True), loss)


def hf_sample(config, cfg, device):
    """transformers' generate."""
    import transformers
    model = transformers.GPT2LMHeadModel(config).to(device).eval()
    prompts = hf_rows(config, cfg.batch, cfg.prompt).to(device)

    def go():
        with torch.no_grad(), autocast(device):
            model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=cfg.new,
                           min_new_tokens=cfg.new, do_sample=True, top_k=0, pad_token_id=0)
    return Work(go)


def trl_stages():
    """{stage: function} of TRL's trainers, {} if it is not installed. PPOTrainer was there until 0.21."""
    try:
        import datasets   # noqa: F401
        import trl
    except ImportError:
        return {}
    table = {"sft": trl_sft, "dpo": trl_dpo, "reward": trl_reward}
    if hasattr(trl, "PPOTrainer"):
        table["ppo"] = trl_ppo
    return table


def trl_flags(cfg, device, batch):
    """The arguments that all of TRL's trainers share."""
    return dict(per_device_train_batch_size=batch, max_steps=cfg.rounds + 2, report_to=[], save_strategy="no",
                output_dir=tempfile.mkdtemp(), bf16=Linear.compute_dtype is not None,
                use_cpu=device.type == "cpu", logging_steps=10 ** 6, disable_tqdm=True,
                gradient_checkpointing=cfg.recompute)


def trl_tokenizer(vocab_size):
    """A tokenizer of the words w0, w1, ..."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocab = {"p": 0, "e": vocab_size - 1, "u": vocab_size - 2}
    vocab |= {f"w{i}": i for i in range(1, vocab_size - 2)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="u"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(eos_token="e", pad_token="p", unk_token="u")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, **names)


def trl_pairs(config, n, sizes):
    """n comparisons of random words; sizes: {"prompt" or "chosen" or "rejected": words}."""
    from datasets import Dataset
    rows = []
    for _ in range(n):
        row = {}
        for column, size in sizes.items():
            ids = torch.randint(10, config.vocab_size - 10, (size,)).tolist()
            row[column] = " ".join(f"w{i}" for i in ids)
        rows.append(row)
    return Dataset.from_list(rows)


def trl_timed(trainer):
    """Work of a trainer. It runs in a thread of its own, which waits for its turn after every step."""
    import transformers
    its_turn, stepped, failed = threading.Semaphore(0), threading.Semaphore(0), []
    n_threads = torch.get_num_threads()

    class TakeTurns(transformers.TrainerCallback):
        """Waits between two steps."""

        def on_step_end(self, *args, **more):
            """Called by the trainer."""
            stepped.release()
            its_turn.acquire()

    def train():
        torch.set_num_threads(n_threads)     # a new thread starts with another number
        its_turn.acquire()
        try:
            trainer.train()
        except Exception as e:
            failed.append(e)
        stepped.release()

    def go():
        its_turn.release()
        stepped.acquire()
        if failed:
            raise failed[0]

    trainer.add_callback(TakeTurns())
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    return Work(go, end=its_turn.release)


def trl_scorer(config):
    """A reward or value model of transformers."""
    import transformers
    config = transformers.GPT2Config.from_dict(config.to_dict())
    config.num_labels, config.pad_token_id = 1, 0
    return transformers.GPT2ForSequenceClassification(config)


def trl_sft(config, cfg, device):
    """TRL's SFTTrainer."""
    import transformers
    import trl
    from datasets import Dataset
    rows = hf_rows(config, cfg.batch, cfg.length).repeat(cfg.rounds + 2, 1)
    args = trl.SFTConfig(max_length=cfg.length, **trl_flags(cfg, device, cfg.batch))
    return trl_timed(trl.SFTTrainer(transformers.GPT2LMHeadModel(config), args=args,
                                    train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
                                    processing_class=trl_tokenizer(config.vocab_size)))


def trl_dpo(config, cfg, device):
    """TRL's DPOTrainer: answers of half the length to prompts of half the length."""
    import transformers
    import trl
    n_pairs, half = cfg.batch // 2, cfg.length // 2
    sizes = {"prompt": half, "chosen": half - 1, "rejected": half - 1}     # TRL adds the end
    data = trl_pairs(config, (cfg.rounds + 2) * n_pairs, sizes)
    args = trl.DPOConfig(**trl_flags(cfg, device, n_pairs), max_length=cfg.length)
    return trl_timed(trl.DPOTrainer(transformers.GPT2LMHeadModel(config), args=args, train_dataset=data,
                                    ref_model=transformers.GPT2LMHeadModel(config),
                                    processing_class=trl_tokenizer(config.vocab_size)))


def trl_reward(config, cfg, device):
    """TRL's RewardTrainer, which reads no prompt: its answers have the whole length."""
    import trl
    n_pairs, length = cfg.batch // 2, cfg.length - 1
    data = trl_pairs(config, (cfg.rounds + 2) * n_pairs, {"chosen": length, "rejected": length})
    args = trl.RewardConfig(**trl_flags(cfg, device, n_pairs), max_length=cfg.length)
    return trl_timed(trl.RewardTrainer(trl_scorer(config), args=args, train_dataset=data,
                                       processing_class=trl_tokenizer(config.vocab_size)))


def trl_ppo(config, cfg, device):
    """TRL's PPOTrainer, with the same epochs and minibatches as ours."""
    import transformers
    import trl
    from datasets import Dataset
    language_model = transformers.GPT2LMHeadModel
    rows = hf_rows(config, cfg.batch, cfg.prompt).repeat(cfg.rounds + 2, 1)
    data = Dataset.from_dict({"input_ids": rows.tolist()})
    flags = trl_flags(cfg, device, cfg.batch)
    del flags["max_steps"]
    args = trl.PPOConfig(**flags, num_ppo_epochs=4, total_episodes=len(rows), num_mini_batches=1,
                         response_length=cfg.new, local_rollout_forward_batch_size=cfg.batch, temperature=1.0,
                         num_sample_generations=0, gradient_accumulation_steps=1)
    trainer = trl.PPOTrainer(args, trl_tokenizer(config.vocab_size), language_model(config),
                             language_model(config), trl_scorer(config), data, trl_scorer(config),
                             eval_dataset=data)
    return trl_timed(trainer)


# ------------------------------------------------------------------------------------------------------------
# The table.

HEAD = (f"{'size':8}{'stage':8}{'who':14}{'tokens/s':>12}{'s/round':>10}{'mfu':>8}{'mbu':>8}{'ratio':>8}"
        "   peak GB")


def warmed_up(make, cfg, device):
    """(Work, peak GB or None) of what make() gives, after the two rounds that do not count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    torch.manual_seed(cfg.seed)
    work = make()
    for _ in range(2):
        work.go()
    if device.type != "cuda":
        return work, None
    return work, (torch.cuda.max_memory_allocated() - before) / 1e9


def why(e):
    """A reason for the table, of an exception."""
    text = str(e).strip() or type(e).__name__
    if "out of memory" in text or "can't allocate memory" in text:
        return "out of memory"
    return f"{type(e).__name__}: {text.splitlines()[0]}"


def in_turns(makers, stage, cfg, device):
    """{who: row} of the parties {who: function that makes its Work}: {name: number}, or {"failed": why} of
    what does not fit, or does not run. The other rows are still wanted."""
    if cfg.compile:
        torch.compiler.reset()     # lets go of the last model's graphs
    rows, works, times = {who: {} for who in makers}, {}, {}
    for who, make in makers.items():
        try:
            works[who], gb = warmed_up(make, cfg, device)
            times[who] = []
            if gb is not None:
                rows[who]["gb"] = gb
        except Exception as e:
            rows[who] = {"failed": why(e)}

    # Each does one round, then each the next one.
    for _ in range(cfg.rounds):
        for who, work in works.items():
            if "failed" in rows[who]:
                continue
            try:
                times[who].append(seconds(work.go, device))
            except Exception as e:
                rows[who] = {"failed": why(e)}

    tokens = cfg.batch * (cfg.length if stage in TRAIN_ON else cfg.new)
    for who, work in works.items():
        if work.end:
            work.end()
        if "failed" in rows[who]:
            continue
        best = min(times[who])
        rows[who] |= {"tokens_per_second": tokens / best, "seconds": best}
        if work.parts:
            at = times[who].index(best) + 2     # the same round
            rows[who]["split"] = {part: took[at] for part, took in work.parts.items()}
    return rows


def shares(row, size, stage, cfg, best):
    """Share of the machine's best rates (FLOP/s, bytes/s) that a row reached: {"mfu": ..}, {"mbu": ..} or
    {}."""
    s = SHAPES[size]
    with torch.device("meta"):
        weights = sum(p.numel() for p in GPT(GPTConfig(**SHAPES[size])).parameters())
    flops, copy = best
    if not s.get("tie", True):    # an embedding that is not the head too is looked up, row by row
        weights -= s["vocab_size"] * s["n_embd"]
    if stage in ("sft", "reward"):
        n = weights
        if stage == "reward":     # no head multiplies
            n -= s["vocab_size"] * s["n_embd"]
        attended = 12 * s["n_layer"] * s["n_head"] * s["head_dim"] * cfg.length
        return {"mfu": (6 * n + attended) * row["tokens_per_second"] / flops}
    if stage == "sample":         # one decoding step reads all weights once
        n_bytes = weights * (2 if Linear.compute_dtype else 4)
        return {"mbu": n_bytes * cfg.new / row["seconds"] / copy}
    return {}


def as_text(row):
    """A row of the table as a line."""
    start = f"{row['size']:8}{row['stage']:8}{row['who']:14}"
    if "failed" in row:
        return f"{start}{'failed':>12}   {row['failed']}"
    line = f"{start}{row['tokens_per_second']:>12.0f}{row['seconds']:>10.3f}"
    for name in ("mfu", "mbu", "ratio"):
        line += f"{row[name]:>8.2f}" if name in row else " " * 8
    line += f"   {row['gb']:.1f}" if "gb" in row else ""
    return line + "".join(f"  {part} {t:.2f} s" for part, t in row.get("split", {}).items())


def main(cfg):
    """Time every stage of every size, and print the table."""
    device = setup(cfg)
    stages = list(STAGES) if cfg.stages == "all" else cfg.stages.split(",")
    sizes = cfg.sizes.split(",")
    unknown = [x for x in stages if x not in STAGES] + [x for x in sizes if x not in SHAPES]
    if unknown:
        raise InputError(f"no such stage or size: {', '.join(unknown)}; there are "
                         f"{', '.join([*STAGES, *SHAPES])}")
    if cfg.batch % 2:
        raise InputError(f"--batch {cfg.batch}: pairs need an even number of sequences")

    best = limits(device)
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    print(f"{machine}: {best[0] / 1e12:.2f} TFLOP/s in large matrix products, {best[1] / 1e9:.1f} GB/s in "
          f"large copies\n\n{HEAD}", flush=True)

    table = []
    for size in sizes:
        for stage in stages:
            ours = functools.partial(STAGES[stage], size, cfg, device)
            makers = {"ours": ours} | (peers_of(size, stage, cfg, device) if cfg.peers else {})
            rows = in_turns(makers, stage, cfg, device)
            for who, row in rows.items():
                row = {"size": size, "stage": stage, "who": who} | row
                if "failed" not in row:
                    row |= shares(row, size, stage, cfg, best)
                    if who != "ours" and "failed" not in rows["ours"]:
                        row["ratio"] = row["seconds"] / rows["ours"]["seconds"]
                table.append(row)
                print(as_text(row), flush=True)
    print(json.dumps({"device": machine, "flops": best[0], "bytes_per_second": best[1], "rows": table}))
    failed = [row for row in table if "failed" in row]
    if failed:
        raise InputError(f"{len(failed)} of {len(table)} rows failed, see the table")


if __name__ == "__main__":
    program(main, Config, __doc__)
