"""A GPT in one file: two dialects, a KV cache, sampling, log-probs, checkpoints, tokenizers - and Phase 0, pretraining.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary, P prompt, R response, L layers.
"""
import argparse
import copy
import ctypes
import inspect
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import typing
import weakref
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")   # threads that wait for work sleep sooner: 100x faster on a busy CPU
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")   # large tensors in huge pages: GPT-2 124M trains 1.2x faster
try:   # glibc keeps freed memory instead of fetching it anew from the system, page by page, in every step (LOG.md)
    for option, value in ((-3, 2 ** 25), (-1, 2 ** 30)):   # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(option, value)
except (OSError, AttributeError):   # another system
    pass
import torch   # noqa: E402
import torch.nn as nn   # noqa: E402
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import InputError, write_atomic

try:
    import fcntl
except ImportError:   # Windows: no lock
    fcntl = None

# ---------------------------------------------------------------------------------------------------------------------
# The model. GPT-2 (Radford et al. 2019) and the Llama family (Touvron et al. 2023) differ only in the fields below.


@dataclass
class GPTConfig:
    """A model's shape and dialect; the defaults are a small GPT-2."""
    vocab_size: int = 1024
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4            # fewer than n_head: grouped-query attention (arXiv:2305.13245)
    n_embd: int = 128
    n_inner: int = 512            # width of the MLP
    max_len: int = 256            # context length in tokens
    head_dim: int = 32
    norm: str = "layernorm"       # "layernorm" (GPT-2) or "rmsnorm" (Llama)
    pos: str = "learned"          # "learned" (GPT-2) or "rope" (arXiv:2104.09864)
    mlp: str = "gelu"             # "gelu" (GPT-2) or "swiglu" (arXiv:2002.05202)
    bias: bool = True             # biases in every linear layer and norm (GPT-2)
    qkv_bias: bool = False        # biases in q, k, v only (Qwen2.5)
    qk_norm: bool = False         # RMSNorm on each head's q and k (Qwen3)
    tie: bool = True              # the output head is the token embedding
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # llama3 rule: factor, low_freq_factor, high_freq_factor, original_max_...
    recompute: bool = False       # keep only each layer's input for the backward pass, and run the layer again there
    scalar_head: bool = False     # reward and value models: one number per position instead of V logits
    reward_mean: float = 0.0      # subtracted from every score, so that reference responses average 0


def rope_table(cfg, device=None):
    """cos and sin of every position's rotary angles, (max_len, 1, D) each, the sign of the rotation in the first half
    of sin (arXiv:2104.09864, halves rotated together)."""
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim)   # (D/2,)
    if cfg.rope_scaling:   # Llama 3.1: stretch slow waves by `factor`, keep fast ones, blend in between
        s = cfg.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)   # full turns within the old context
        blend = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freq = freq * (blend + (1 - blend) / s["factor"])
    angle = torch.outer(torch.arange(cfg.max_len, device=device).float(), freq)[:, None]   # (S, 1, D/2)
    return angle.cos().repeat(1, 1, 2), torch.cat((-angle.sin(), angle.sin()), dim=-1)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, H, D) by cos, sin (T, 1, D) or (B, 1, 1, D)."""
    full = x.to(torch.promote_types(x.dtype, cos.dtype))
    return torch.addcmul(full * cos, full.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight in fp32 (arXiv:1910.07467), handed on in the dtype it came in."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def make_norm(cfg, size):
    """The norm of the config's dialect over `size` numbers."""
    if cfg.norm == "layernorm":
        return nn.LayerNorm(size, eps=cfg.norm_eps, bias=cfg.bias)
    return RMSNorm(size, cfg.norm_eps)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v; q (B, H, T, D), k and v (B, Hkv, S, D). Without a mask, causal: each position sees
    those up to its own, and S = T. With one, True (B, 1, T, S) where a query may look."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:   # written out, because the CPU's fused bf16 kernels are
        if q.shape[1] != k.shape[1]:                           # 2 to 5 times slower than this (LOG.md)
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()         # (T, T)
        scores = q.mul(q.shape[-1] ** -0.5).contiguous() @ k.contiguous().transpose(-1, -2)   # (B, H, T, S)
        scores += torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
        return scores.softmax(-1) @ v.contiguous()             # softmax: sums in fp32, rounds its result to bf16
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Causal self-attention (B, T, C) -> (B, T, C), with rotary positions, grouped queries and the cache if wanted."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.qkv = nn.Linear(cfg.n_embd, (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim, bias=cfg.bias or cfg.qkv_bias)
        self.proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=cfg.bias)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)

    def forward(self, x, rope, mask, cache, pos):
        B, T, H, Hkv, D = *x.shape[:2], self.cfg.n_head, self.cfg.n_kv_head, self.cfg.head_dim
        qk, v = self.qkv(x).view(B, T, -1, D).split([H + Hkv, Hkv], dim=2)         # (B, T, H + Hkv, D), (B, T, Hkv, D)
        if self.cfg.qk_norm:
            q, k = qk.split([H, Hkv], dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k, v = (z.transpose(1, 2) for z in (*qk.split([H, Hkv], dim=2), v))     # (B, H, T, D), (B, Hkv, T, D)
        if cache is not None and pos is None:
            cache[0][:, :, :T], cache[1][:, :, :T] = k, v
        elif cache is not None:   # one new token per row, written at the row's own position
            for kv, new in zip(cache, (k, v)):
                kv[torch.arange(B, device=x.device), :, pos[:, 0]] = new[:, :, 0].to(kv.dtype)
            k, v = cache[0].to(q.dtype), cache[1].to(q.dtype)
        y = attention(q, k, v, mask)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))                      # (B, T, C)


class MLP(nn.Module):
    """The position-wise network (B, T, C) -> (B, T, C): down(gelu(up x)) or down(silu(gate x) * up x)."""

    def __init__(self, cfg):
        super().__init__()
        self.swiglu = cfg.mlp == "swiglu"
        self.up = nn.Linear(cfg.n_embd, cfg.n_inner * (2 if self.swiglu else 1), bias=cfg.bias)
        self.down = nn.Linear(cfg.n_inner, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        x = self.up(x)
        if self.swiglu:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """A layer (B, T, C) -> (B, T, C): attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, cfg):
        super().__init__()
        self.ln_1, self.attn = make_norm(cfg, cfg.n_embd), Attention(cfg)
        self.ln_2, self.mlp = make_norm(cfg, cfg.n_embd), MLP(cfg)

    def forward(self, x, *where):
        x = x + self.attn(self.ln_1(x), *where)
        return x + self.mlp(self.ln_2(x))


def init_score(weight):
    """Draw the weight (1, C) of a scalar head: N(0, 1 / (C + 1)) (arXiv:2009.01325, appendix B.1)."""
    nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1] + 1))


class GPT(nn.Module):
    """Decoder-only transformer. `model(ids)` gives hidden states; `logits` and `score` turn them into outputs, so that
    a caller pays for the head only at the positions it needs."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.pos == "learned":
            self.wpe = nn.Embedding(cfg.max_len, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = make_norm(cfg, cfg.n_embd)
        if cfg.scalar_head:
            self.score = nn.Linear(cfg.n_embd, 1, bias=False)
        elif not cfg.tie:
            self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        for name, p in self.named_parameters():   # GPT-2's init: N(0, 0.02), residual outputs scaled by 1/sqrt(2L)
            if name == "score.weight":
                init_score(p)
            elif p.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.cfg.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)
        if self.cfg.pos == "rope":                # recomputed from the config, never saved
            self.rope = rope_table(self.cfg, self.wte.weight.device)

    def forward(self, ids, cache=None, pos=None, mask=None):
        """Hidden states (B, T, C) of ids (B, T), rows right-padded with anything: causal attention hides the padding.

        With a `cache` (L, 2, B, Hkv, S, D) keys and values are also stored; with pos (B, 1) as well, T is 1 and row b's
        token stands at position pos[b] < S: it is written there and attends to positions <= pos[b]. Without a cache,
        pos (B, T) and mask (B, 1, T, T) say where each token stands and which others it sees."""
        T = ids.shape[1]
        if pos is None and T > self.cfg.max_len:
            raise InputError(f"a sequence of {T} tokens is longer than the model's context of {self.cfg.max_len}")
        if cache is not None and pos is not None:
            mask = torch.arange(cache.shape[-2], device=ids.device) <= pos[:, None, None]          # (B, 1, 1, S)
        x, rope, where = self.wte(ids), None, slice(0, T) if pos is None else pos                   # (B, T, C)
        if self.cfg.pos == "learned":
            x = x + self.wpe.weight[where]
        else:
            if self.rope[0].device != x.device:
                self.rope = [table.to(x.device) for table in self.rope]
            rope = [table[where] for table in self.rope]                            # (T, 1, D) or (B, T, 1, D)
        for i, block in enumerate(self.h):
            if self.cfg.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, None, None, use_reentrant=False)   # arXiv:1604.06174
            else:
                x = block(x, rope, mask, None if cache is None else cache[i], pos)
        return self.ln_f(x)

    def head(self):
        """The matrix (V', C) whose rows the logits are products with, in the precision of products. In bf16 V' is V
        rounded up to a multiple of 64 by rows of 0, which GPUs multiply with faster (50,257 tokens: 50,304 rows)."""
        w = self.wte.weight if self.cfg.tie else self.lm_head.weight
        if torch.is_autocast_enabled(w.device.type):
            w = w.to(torch.get_autocast_dtype(w.device.type))
        return F.pad(w, (0, 0, 0, -len(w) % 64)) if w.dtype == torch.bfloat16 and len(w) % 64 else w

    def logits(self, hidden):
        """Next-token logits (..., V) of hidden states (..., C)."""
        return F.linear(hidden, self.head())[..., : self.cfg.vocab_size]

    def scores(self, hidden):
        """Scalar per position (...,) of hidden states (..., C), fp32: a reward at the last token, a value anywhere."""
        return self.score(hidden).squeeze(-1).float() - self.cfg.reward_mean

    def new_cache(self, B, S):
        c, w = self.cfg, self.wte.weight
        dtype = torch.get_autocast_dtype(w.device.type) if torch.is_autocast_enabled(w.device.type) else w.dtype
        return torch.zeros(c.n_layer, 2, B, c.n_kv_head, S, c.head_dim, device=w.device, dtype=dtype)


def frozen(model, autocast):
    """The model without gradients. Under bf16 autocast its linear layers are kept in bf16, which they would be cast to
    anyway: half the memory and the same numbers. For what is never trained: reference, reward model, LoRA's trunk."""
    with autocast():
        bf16 = torch.is_autocast_enabled(model.wte.weight.device.type)
    for layer in model.h.modules():
        if bf16 and isinstance(layer, nn.Linear):
            layer.bfloat16()
    return model.requires_grad_(False)


TWINS = weakref.WeakKeyDictionary()   # model: its twin for decoding


@torch.no_grad()
def for_decoding(model):
    """A twin of the model on the same weights, but under bf16 autocast with its matrices (a tied head too) in bf16:
    they are cast once per call, not anew for every token, each of which reads all of them. It is made once and stays
    where it is, so that CUDA graphs of it stay valid. A sharded model's twin is whole, and made for one call."""
    device = model.wte.weight.device.type
    bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    if not bf16 and not hasattr(model, "unshard"):
        return model
    weights = dict(model.named_parameters())
    if hasattr(model, "unshard"):
        with torch.device("meta"):
            twin = GPT(copy.deepcopy(model.cfg))
        for name, x in weights.items():   # gathered, and cast, one by one
            matrix = bf16 and isinstance(twin.get_submodule(name.rpartition(".")[0]), nn.Linear)
            twin.load_state_dict({name: whole(x).to(torch.bfloat16 if matrix else x.dtype)}, strict=False, assign=True)
        twin.rope = getattr(model, "rope", None)
    elif model in TWINS:
        twin = TWINS[model]
        weights["lm_head.weight"] = weights.get("lm_head.weight", model.wte.weight)
        for name, p in twin.named_parameters():
            if p.dtype != weights[name].dtype:
                p[: len(weights[name])] = weights[name]   # the head may have more rows (GPT.head)
        return twin
    else:
        twin = TWINS[model] = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    if bf16:
        for layer in twin.modules():
            if isinstance(layer, nn.Linear):
                for name, p in list(layer.named_parameters()):
                    setattr(layer, name, nn.Parameter(p.bfloat16(), requires_grad=False))
        head = twin.head()
        twin.cfg.tie, twin.lm_head = False, nn.Linear(1, 1, bias=False)
        twin.lm_head.weight = nn.Parameter(head, requires_grad=False)
    return twin


class LoRA(nn.Module):
    """A frozen linear layer plus a trained low-rank one: W x + 2 B A x, B = 0 at first (arXiv:2106.09685, eq. 3)."""

    def __init__(self, linear, rank):
        super().__init__()
        device, std = linear.weight.device, linear.in_features ** -0.5
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, device=device) * std)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x):
        return self.linear(x) + 2 * F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def with_lora(trunk, rank, scalar_head=False):
    """A model of its own adapters on the weights of a frozen `trunk`, which are shared, not copied: the trunk itself is
    the reference, and policy and value model cost little more than nothing beside it."""
    model = copy.deepcopy(trunk, {id(p): p for p in trunk.parameters()})
    for block in model.h:
        for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "up"), (block.mlp, "down")):
            setattr(part, name, LoRA(getattr(part, name), rank))
    if scalar_head:
        model.cfg.scalar_head, model.cfg.reward_mean = True, 0.0
        model.score = nn.Linear(trunk.cfg.n_embd, 1, bias=False, device=trunk.wte.weight.device)
        init_score(model.score.weight)
    return model


def trained(model):
    """The part of a model's state that training changes: all of it, or the adapters."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def merged(state):
    """The state of a plain GPT, {name: tensor} in fp32, of one that may have adapters: they are added into the weights
    they belong to."""
    state, out = {name: x.float() for name, x in state.items()}, {}
    for name, x in state.items():
        if name.endswith(".linear.weight"):
            layer = name.removesuffix(".linear.weight")
            x = x + 2 * state[f"{layer}.b"] @ state[f"{layer}.a"]
        if not re.search(r"(qkv|proj|up|down)\.[ab]$", name):
            out[name.replace(".linear.", ".")] = x
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun --nproc_per_node=N ppo.py). Each draws the same batches, computes its share of their rows,
# and gradients are summed. Losses are normalised over the whole step, so the sum is what one process would compute.
# With --fsdp each process also keeps only its part of the trained weights, their gradients and optimizer state.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ALONE = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}   # environment of a script run by one


def share(items):
    """This process's part of a list: one of every WORLD items."""
    return list(items[RANK::WORLD])


def pieces(items, size):
    """This process's part of a list or tensor in pieces of at most `size`: [(piece, 1.0)]. All processes get as many,
    since a sharded model needs all of them in each pass; where items run out, the first ones come again with a 0.0."""
    size = min(size, -(-len(items) // WORLD))
    cut = [items[i: i + size] for i in range(0, len(items), size)]
    mine = [(piece, 1.0) for piece in cut[RANK::WORLD]]
    return mine + [(cut[0], 0.0)] * (-(-len(cut) // WORLD) - len(mine))


def home(cfg, device):
    """Where a model is loaded to: the CPU if it is to be sharded, which moves it, else the device."""
    return "cpu" if cfg.fsdp else device


def for_training(model, cfg, device):
    """The model as --recompute and --fsdp want it trained. Before its optimizer is made."""
    model.cfg.recompute = cfg.recompute
    return sharded(model, cfg, device)


def sharded(model, cfg, device):
    """With --fsdp: the model cut over all processes, layer by layer (FSDP2, arXiv:2304.11277), each of which is moved
    to the device just before, so that a model loaded on the CPU need never fit there whole. Else the model as it is."""
    if cfg.fsdp:
        from torch.distributed.fsdp import fully_shard
        mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (WORLD,))
        for part in (*model.h, model):
            fully_shard(part, mesh=mesh)
            part.set_gradient_divide_factor(1.0)             # gradients are summed, not averaged
            part.set_force_sum_reduction_for_comms(True)     # gloo has no average and says nothing (pytorch#162338)
    return model


def whole(x, to_first=False):
    """A tensor, or a nested dict or list of them, with what is sharded gathered on every process, or one by one
    in the main memory of the first process alone."""
    if isinstance(x, dict):
        return {k: whole(v, to_first) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(whole(v, to_first) for v in x)
    if hasattr(x, "full_tensor"):
        x = x.full_tensor()
        return x if not to_first else x.cpu() if RANK == 0 else None
    return x


def load_optimizer(optimizer, state):
    """Give an optimizer the state_dict of one that was not sharded, whether or not its own parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        for name, x in state["state"].get(i, {}).items():
            if hasattr(p, "full_tensor") and x.shape == p.shape:
                from torch.distributed.tensor import distribute_tensor
                state["state"][i][name] = distribute_tensor(x.to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(state)


def summed(x):
    """The sum over all processes of a tensor (in place), a number, or a dict of numbers."""
    if WORLD == 1:
        return x
    if isinstance(x, dict):
        parts = [None] * WORLD
        torch.distributed.all_gather_object(parts, {k: float(v) for k, v in x.items()})
        return {k: sum(part.get(k, 0.0) for part in parts) for part in parts for k in part}
    if not torch.is_tensor(x):
        return summed(torch.tensor(float(x))).item()
    torch.distributed.all_reduce(x)
    return x


def meet():
    """Wait until all processes are here."""
    summed(0)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and scoring. A "mask" is True on the tokens of a response (its EOS included); index t always means token t.


def pad_batch(rows, pad_id, device="cpu", length=None):
    """Lists of ids -> right-padded (B, T) int64 and the mask of real tokens (B, T)."""
    T = length or max(map(len, rows))
    ids = torch.full((len(rows), T), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    lens = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(T) < lens[:, None]).to(device)


def sample(logits, u, top_k=0, top_p=1.0):
    """One token per row of logits (B, V), already divided by the temperature, where u (B,), uniform in [0, 1), falls in
    the cumulative distribution: nothing waits for the host. Truncation: the top_k largest (0: all), then the smallest
    set whose probability reaches top_p (nucleus, arXiv:1904.09751)."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        p = sorted_logits.softmax(-1)
        drop = (p.cumsum(-1) - p >= top_p).scatter(1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    total = logits.softmax(-1).cumsum(-1, dtype=u.dtype)                              # (B, V)
    return torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def decode(model, token, cache, pos, u, temperature, top_k, top_p):
    """One step of `generate`: reads tokens (n,) at positions pos (n,) and the cache (L, 2, n, Hkv, S, D), and draws the
    next tokens (n,), with their log-probs (n,). Its shapes depend on n and S alone, and nothing in it waits for the
    host: with --compile on a GPU each such pair becomes a CUDA graph (setup)."""
    return draw(model.logits(model(token[:, None], cache, pos[:, None])[:, 0]), u, temperature, top_k, top_p)


def draw(logits, u, temperature, top_k, top_p):
    """Tokens (n,) drawn from logits (n, V), or the likeliest ones at temperature 0, and their log-probs (n,)."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)                    # (n, V)
    token = sample(logp, u, top_k, top_p) if temperature else logp.argmax(-1)
    return token, logp.gather(1, token[:, None])[:, 0]


def prefill(model, prompts, P, room, pad_id):
    """Reads n prompts of at most P tokens, one that comes several times only once. Returns the hidden state (n, C) of
    the last token of each, and a cache (L, 2, n, Hkv, room, D) with all of them, room >= P."""
    distinct = {x: u for u, x in enumerate(dict.fromkeys(map(tuple, prompts)))}       # U prompts
    which = torch.tensor([distinct[tuple(x)] for x in prompts], device=model.wte.weight.device)      # (n,)
    cache = read = model.new_cache(len(prompts), room)
    if len(distinct) < len(prompts):
        read = model.new_cache(len(distinct), P)
    hidden = model(pad_batch(list(distinct), pad_id, which.device, P)[0], read)       # (U, P, C)
    if read is not cache:
        cache[..., :P, :] = read[:, :, which]
    return hidden[which, torch.tensor([len(x) - 1 for x in prompts], device=which.device)], cache


GRAPHS = False   # whether decode has been compiled to CUDA graphs (setup)


@torch.no_grad()
def generate(model, prompts, max_new, eos_id, pad_id=0, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Continue ragged prompts (lists of ids) until EOS or max_new tokens.

    Returns ids (B, T): prompt, response, padding, in that order without gaps; mask (B, T): True on response tokens, EOS
    included; logp (B, T): log-prob of each response token under softmax(logits / temperature), 0 elsewhere - also with
    top_k or top_p, because that is the distribution training uses. temperature 0 is greedy (log-probs at 1). A prompt
    that comes several times is read once. Of several processes each continues its share of the prompts, and all return
    everything."""
    model, device = for_decoding(model), model.wte.weight.device
    P, B, block = max(map(len, prompts)), len(prompts), 8 if device.type == "cpu" else 64
    if min(map(len, prompts)) == 0:
        raise InputError("an empty prompt: generation needs at least one token to start from")
    if P + max_new > model.cfg.max_len:
        raise InputError(f"a prompt of {P} + {max_new} new tokens exceeds the model's context of {model.cfg.max_len}")
    exact = torch.float32 if device.type == "mps" else torch.float64   # MPS has no float64
    u = torch.rand(B, max_new, dtype=torch.float64, generator=generator, device=generator and generator.device)
    u = u.to(device, exact)                        # all draws at once: a row's do not depend on how long others last
    lens = torch.tensor([len(p) for p in prompts], device=device)
    new, logp = torch.zeros(B, max_new, dtype=torch.long, device=device), torch.zeros(B, max_new, device=device)
    wrote = torch.zeros_like(new)                                                     # 1 where a row wrote a token
    row = torch.tensor(share(range(B)), dtype=torch.long, device=device)   # the rows still being written
    if len(row):
        hidden, cache = prefill(model, [prompts[i] for i in row.tolist()], P, P + max_new if GRAPHS else P, pad_id)
        token, lp = draw(model.logits(hidden), u[row, 0], temperature, top_k, top_p)
        done = torch.zeros(len(row), dtype=torch.bool, device=device)
    for i in range(max_new if len(row) else 0):
        new[row, i], logp[row, i], wrote[row, i] = token, lp, (~done).long()
        done = done | (token == eos_id)
        if i % 4 == 3:   # the only wait for the GPU: rows that have ended are dropped where that saves a quarter
            keep = (~done).nonzero()[:, 0]
            if len(keep) == 0:
                break
            n = 1 << (len(keep) - 1).bit_length() if GRAPHS else len(keep)   # graphs: few shapes, powers of two
            if n <= 0.75 * len(row):
                keep = torch.cat((keep, done.nonzero()[: n - len(keep), 0]))
                row, token, done = row[keep], token[keep], done[keep]
                if GRAPHS:   # it stays where it is
                    cache[:, :, :n] = cache[:, :, keep]
                cache = cache[:, :, :n] if GRAPHS else cache[:, :, keep]
        if i + 1 < max_new:
            S = min(-(-(P + i + 1) // block) * block, P + max_new)   # the cache is read, and grows, block by block
            if S > cache.shape[-2]:
                cache = F.pad(cache, (0, 0, 0, S - cache.shape[-2]))
            filled = cache[..., :S, :]
            if GRAPHS:
                torch._dynamo.mark_static_address(filled, guard=False)   # to be used in place, not copied
                torch.compiler.cudagraph_mark_step_begin()
            token, lp = decode(model, token, filled, lens[row] + i, u[row, i + 1], temperature, top_k, top_p)
            if GRAPHS:
                token, lp = token.clone(), lp.clone()   # the next replay writes over the graph's own
    if WORLD > 1:   # what others wrote is still 0 here
        new, logp, wrote = summed(new), summed(logp), summed(wrote)
    ids, at = pad_batch(prompts, pad_id, device, P + max_new)[0], lens[:, None] + torch.arange(max_new, device=device)
    ids.scatter_(1, at, torch.where(wrote > 0, new, pad_id))                          # (B, T)
    T = int((lens + wrote.sum(1)).max())
    return (ids[:, :T], torch.zeros_like(ids, dtype=torch.bool).scatter_(1, at, wrote > 0)[:, :T],
            torch.zeros(ids.shape, device=device).scatter_(1, at, logp * wrote)[:, :T])


class HeadLogProbs(torch.autograd.Function):
    """log softmax(h w^T / temperature)[y] and the entropy of that distribution, (N,) each in fp32, for hidden states h
    (N, C), the first V rows of a head w (V', C), and tokens y (N,). The logits are kept in h's precision; in fp32 only
    a few rows exist at a time, which stay in the CPU's cache: with 50,304 tokens 1.4 times faster than
    F.cross_entropy (LOG.md)."""

    @staticmethod
    def few_rows(temperature, z, *tensors):
        """Logits z (N, V) in fp32, over the temperature, and other tensors (N, ..), a few rows at a time."""
        rows = max(1, 2 ** (19 if z.device.type == "cpu" else 31) // z.shape[1])
        for z_, *rest in zip(z.split(rows), *(x.split(rows) for x in tensors)):
            z_ = z_.to(torch.float32, copy=True)                                      # (n, V)
            yield z_ if temperature == 1 else z_.div_(temperature), *rest

    @staticmethod
    def forward(ctx, h, w, y, V, temperature, entropy):
        z = h @ w.T                                                                   # (N, V')
        logp, ent = (torch.zeros(len(y), device=h.device) for _ in range(2))
        for z_, y_, logp_, ent_ in HeadLogProbs.few_rows(temperature, z[:, :V], y, logp, ent):
            lp = z_.log_softmax(1)                                                    # (n, V)
            logp_.copy_(lp.gather(1, y_[:, None])[:, 0])
            if entropy:
                ent_.copy_(-(lp.exp() * lp).sum(1))
        ctx.save_for_backward(h, w, y, z, ent)
        ctx.V, ctx.temperature, ctx.entropy = V, temperature, entropy
        return logp, ent

    @staticmethod
    def backward(ctx, g, g_ent):
        """With p the softmax: d logp / dz = onehot(y) - p, d entropy / dz = -p (log p + entropy)."""
        h, w, y, z, ent = ctx.saved_tensors
        dz, V = torch.empty_like(z), ctx.V
        dz[:, V:] = 0
        for z_, y_, ent_, g_, g_ent_, dz_ in HeadLogProbs.few_rows(ctx.temperature, z[:, :V], y, ent, g, g_ent,
                                                                   dz[:, :V]):
            p, g_ = z_.softmax(1), g_[:, None]                                        # (n, V), (n, 1)
            scale = g_ + g_ent_[:, None] * (z_.log_softmax(1) + ent_[:, None]) if ctx.entropy else g_
            d = p.mul_(-scale).scatter_add_(1, y_[:, None], g_)
            dz_.copy_(d if ctx.temperature == 1 else d.div_(ctx.temperature))
        return dz @ w, dz.T @ h, None, None, None, None


def with_shared_prompts(model, ids, mask, prompt):
    """What model(ids) gives, (B, T, C), when rows of equal prompt (B,), all neighbours, begin with the same tokens
    and go on with their own, mask (B, T): the prompt goes through the model once. The rows' answers follow it one
    after the other, each at the positions of its own row, seeing the prompt and itself alone (arXiv:2410.20305).
    Without prompt it is model(ids). Not for answers much longer than prompts: all share one (B, 1, U, U) mask."""
    if prompt is None:
        return model(ids)
    mask = mask.to(ids.device)
    row = (prompt != prompt.roll(1)).cumsum(0) - (prompt[0] != prompt[-1]).long()     # (B,) 0, 0, 1, 1, 1, ..
    P, n, t = mask.long().argmax(1), mask.sum(1), torch.arange(ids.shape[1], device=ids.device)    # (B,), (B,), (T,)
    start = n.cumsum(0) - n                                                           # tokens of all answers before
    start = start - start[torch.searchsorted(row, row)]                               # .. in the same row
    rows, length = int(row[-1]) + 1, -(-int((P + start + n).max()) // 8) * 8          # (S, U): what goes in
    at = t + start[:, None] * (t >= P[:, None])                                       # (B, T) place in its row
    at = torch.where(t < (P + n)[:, None], at, length)                                # padding: one past the end
    part = torch.where(t < P[:, None], 0, torch.arange(1, len(ids) + 1, device=ids.device)[:, None])   # 0: the prompt
    packed = torch.zeros(3, rows, length + 1, dtype=torch.long, device=ids.device)
    packed[:, row[:, None], at] = torch.stack((ids, t.expand_as(ids), part))
    x, pos, part = packed[:, :, :length]                                              # (S, U)
    sees = (part[:, None] == 0) | (part[:, None] == part[:, :, None])                 # (S, U, U)
    hidden = model(x, pos=pos, mask=sees.tril()[:, None])                             # (S, U, C)
    return hidden.flatten(0, 1)[row[:, None] * length + at.clamp(max=length - 1)]


def token_logprobs(model, ids, mask, temperature=1.0, entropy=False, prompt=None, chunk=8192):
    """Log-prob (B, T) of every token under the model where mask is True, 0 elsewhere; fp32. ids, mask: (B, T).

    logp[b, t] = log softmax(logits[b, t-1] / temperature)[ids[b, t]]: SFT, DPO, PPO and CAI all train on this number.
    The head runs on the masked rows only, and where they are many, `chunk` at a time and again in the backward pass, so
    that no (B, T, V) tensor ever exists. entropy=True also returns the entropy (B, T) in nats of each distribution. A
    mask on the CPU says which rows these are without waiting for the GPU. Rows with equal numbers in prompt (B,) share
    their prompt (see with_shared_prompts)."""
    B, T = ids.shape
    at = mask[:, 1:].bool().flatten().nonzero()[:, 0].to(ids.device)                  # (N,): b (T - 1) + t - 1
    h = with_shared_prompts(model, ids, mask, prompt)                                 # (B, T, C)
    h, y = h[:, :-1].flatten(0, 1)[at], ids[:, 1:].flatten()[at]                      # (N, C), (N,)
    recompute = torch.is_grad_enabled() and len(y) > chunk
    run = lambda *x: HeadLogProbs.apply(*x, model.cfg.vocab_size, temperature, entropy)   # noqa: E731
    w = model.head()                                                                  # (V', C)
    h = h.to(w.dtype)
    parts = [checkpoint(run, a, w, b, use_reentrant=False) if recompute else run(a, w, b)
             for a, b in zip(h.split(chunk), y.split(chunk))]
    logp, ent = (F.pad(torch.zeros(B * (T - 1), device=ids.device).scatter(0, at, torch.cat(x)).view(B, T - 1), (1, 0))
                 for x in zip(*parts))
    return (logp, ent) if entropy else logp


def batches(lengths, batch_size, seed, epoch):
    """One pass over examples of these lengths, as lists of their numbers, batch by batch, each of similar lengths, so
    that little is padded: shuffle, sort within windows of 16 batches, shuffle the batches."""
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    window = 16 * batch_size
    windows = (order[w: w + window] for w in range(0, len(order), window))
    order = [i for w in windows for i in sorted(w, key=lambda i: lengths[i])]
    out = [order[i: i + batch_size] for i in range(0, len(order), batch_size)]
    return rng.sample(out, len(out))


def respond(model, tok, prompts, max_new, batch=256, **kw):
    """Sample one response per prompt (lists of messages). Returns the texts and (ids, mask) of each row, as lists, in
    the order of the prompts; batches are sorted by length so that little is padded."""
    rows = [tok.render(p, generation_prompt=True)[0] for p in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = [None] * len(rows)
    for chunk in (order[i: i + batch] for i in range(0, len(order), batch)):
        ids, mask, _ = generate(model, [rows[i] for i in chunk], max_new, tok.eos_id, tok.pad_id, **kw)
        for i, x, m in zip(chunk, ids.cpu(), mask.cpu()):
            out[i] = x[m].tolist()
    return [tok.decode(x) for x in out], rows, out


def distinct_2(responses):
    """Different bigrams / all bigrams over responses (lists of ids): near 0 when the model says one thing to everybody
    (Li et al. 2016, arXiv:1510.03055)."""
    bigrams = [pair for ids in responses for pair in zip(ids, ids[1:])]
    return len(set(bigrams)) / max(1, len(bigrams))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a folder that transformers opens too (data/checkpoint.py), plus state.pt for --resume.


def load(path, device="cpu", scalar_head=None):
    """(GPT, Tokenizer) of one of our folders, a Hugging Face folder or a hub name; scalar_head=True makes a reward or
    value model of it (with a fresh score head unless the checkpoint has one), False insists on a language model."""
    from data.checkpoint import load_weights
    cfg, weights, tok = load_weights(path, scalar_head or None)
    if scalar_head is False and cfg.scalar_head:
        raise InputError(f"{path} is a reward model; a language model is needed here")
    with torch.device("meta"):
        model = GPT(cfg)
    model.to_empty(device="cpu").init_weights()
    model.load_state_dict(weights, strict=False)   # names and shapes were checked; only score.weight may be missing
    return model.to(device), tok


def save(folder, model, tok, state=None):
    """Save model, tokenizer and, for --resume, training state {name: tensors, numbers, strings}: all or nothing."""
    from data.checkpoint import save_folder
    state, weights = whole(state, to_first=True), whole(model.state_dict(), to_first=True)
    extra = {} if state is None else {"state.pt": lambda path: torch.save(state, path)}
    if RANK == 0:
        save_folder(folder, model.cfg, merged(weights), tok, extra)
    meet()


def load_state(folder):
    """The training state beside a checkpoint, or {} if there is none."""
    from data.checkpoint import finish_save
    path = Path(folder) / "state.pt"
    if RANK == 0:
        finish_save(Path(folder))   # a save that was cut off after its point of no return
    meet()
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    except Exception as e:
        raise InputError(f"{path}: no training state of ours ({type(e).__name__}); start without --resume") from None


# ---------------------------------------------------------------------------------------------------------------------
# What every script starts and ends with.


MAY_BE_0 = ("seed", "max_steps", "warmup", "value_warmup", "relabel", "lora")   # all other whole numbers count from 1
MEMORY = ("micro_batch", "batch_size", "rollouts", "max_len", "max_prompt", "max_new", "length")   # what costs memory
SHARES = ("held_out", "agreement", "gamma", "lam", "label_smoothing", "flip_rate")   # between 0 and 1; none is negative


def cli(Config, doc):
    """A Config dataclass filled from `--name value` or `--name=value`. Help text is the comment behind each field."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*(?:\n +# .*)*)$", inspect.getsource(Config), re.MULTILINE))
    comments = {name: re.sub(r"\n +#", "", text) for name, text in comments.items()}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for f in fields(Config):
        kind, options = f.type, {}
        if typing.get_origin(kind) is typing.Literal:
            names = typing.get_args(f.type)
            kind, options = type(f.default), {"choices": names, "metavar": "|".join(names)}
        if kind is bool:
            kind, options = parse_bool, {"nargs": "?", "const": True}
        elif kind is float:
            kind = parse_float
        shown = "" if f.default in ("", None) else f" (default {f.default})"
        options = {"metavar": f.name.split("_")[-1].upper()} | options
        parser.add_argument(f"--{f.name}", type=kind, default=f.default,
                            help=comments.get(f.name, "").replace("%", "%%") + shown, **options)
    cfg = Config(**vars(parser.parse_args()))
    for f in (f for f in fields(Config) if f.type in (int, float) and not f.name.startswith("bias_")):
        value, low = getattr(cfg, f.name), int(f.type is int and f.name not in MAY_BE_0)
        high = 1 if f.name in SHARES else 2 ** 31 - 1 if f.type is int else math.inf
        if not low <= value <= high:
            bounds = f"at least {low}" if value < low and high > 1 else f"between {low} and {high}"
            parser.error(f"argument --{f.name}: {value} is not {bounds}")
    return cfg


def parse_bool(text):
    """A flag's bool; ArgumentTypeError for what is neither."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def parse_float(text):
    """A flag's finite float; ArgumentTypeError for nan and inf."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return float(text)


def run(main, Config, doc):
    """Run main(config) as a program: what a user can mend ends in one sentence and exit code 1, not in a traceback."""
    cfg = cli(Config, doc)
    signal.signal(signal.SIGTERM, interrupt)   # as Ctrl-C
    try:
        main(cfg)
    except (InputError, OSError) as e:   # OSError: no such file, no right to write it, disk full, ...
        sys.exit(f"error: {e}")
    except KeyboardInterrupt as e:
        sys.exit(f"interrupted{e}")
    except RuntimeError as e:
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise
        at = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == inspect.getfile(main)][-1]
        sizes = [f"--{f.name} {getattr(cfg, f.name)}" for f in fields(cfg) if f.name in MEMORY]
        sys.exit(f"error: out of memory at {Path(at.filename).name}:{at.lineno}, `{at.line}`; what could be smaller: "
                 f"{', '.join(sizes)}")


def interrupt(signum, frame):
    """A signal handler that does what Ctrl-C does."""
    raise KeyboardInterrupt


def setup(cfg):
    """Seeds, device, precision, and the group of processes if torchrun started several. Returns (device, autocast): the
    training numerics of every script are fp32 weights under `with autocast():`, which is bf16 where the hardware
    multiplies bf16 natively and fp32 elsewhere."""
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this torch sees no CUDA device; try --device cpu")
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise InputError(f"--device {device}: expected cpu, cuda, cuda:1 or the like")
    if cfg.dtype == "auto":
        bf16 = torch.cuda.is_bf16_supported() if device.startswith("cuda") else cpu_has_bf16()
    else:
        bf16 = cfg.dtype == "bfloat16"
    if getattr(cfg, "fsdp", False):
        if WORLD == 1:
            raise InputError("--fsdp cuts a model over several processes: start them with torchrun --nproc_per_node=N")
        if getattr(cfg, "lora", 0):
            raise InputError("--fsdp cuts what is trained, and --lora trains next to nothing: leave one of them out")
    if WORLD > 1:
        for name in ("batch_size", "rollouts"):
            if getattr(cfg, name, WORLD) < WORLD:
                raise InputError(f"--{name} {getattr(cfg, name)}: fewer than the {WORLD} processes")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(timeout=timedelta(hours=2))   # the first may have a chain to make
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    if getattr(cfg, "compile", False) and device.startswith("cuda"):
        global decode, GRAPHS
        torch._dynamo.config.recompile_limit = 64   # a graph for each number of rows and of positions read
        decode, GRAPHS = torch.compile(decode, mode="reduce-overhead", fullgraph=True, dynamic=False), True
    return torch.device(device), lambda: torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16)


def cpu_has_bf16():
    """True where the CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX); emulation would be slower."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def need(folder, script, cfg):
    """Make a missing link of the chain first, or finish a run that was cut off (a state.pt, but no result.json):
    run its script with the same seed, device and precision, in one process."""
    there = {name for name in ("config.json", "state.pt", "result.json") if (Path(folder) / name).exists()}
    if RANK == 0 and ("config.json" not in there or there == {"config.json", "state.pt"}):
        command = [sys.executable, str(Path(__file__).parent / script), "--out", str(folder), "--seed", str(cfg.seed),
                   "--dtype", cfg.dtype, "--resume"] + (["--device", cfg.device] if cfg.device else [])
        print(f"{folder} is missing or unfinished: running {' '.join(command[1:])}", flush=True)
        if subprocess.run(command, env=ALONE).returncode:
            raise InputError(f"{script} failed, so there is no {folder} to start from")
    meet()


def sibling(cfg, name):
    """out/<name> beside this run's own --out."""
    return str(Path(cfg.out).parent / name)


def result_of(folder):
    """The result.json of a finished run, {} if there is none."""
    path = Path(folder) / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


class Run:
    """The files a run leaves: log.jsonl, samples.txt, result.json, plot.png; and its progress line on the screen."""

    def __init__(self, cfg, stage, steps, resumed_at=0):
        self.cfg, self.stage, self.folder, self.steps = cfg, stage, Path(cfg.out), steps
        if RANK:   # the first of several processes leaves the files; those of the others go when they end
            self.scratch = tempfile.TemporaryDirectory()
            self.folder = Path(self.scratch.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start, self.first, self.shown, self.skipped, self.stopping = time.time(), resumed_at, 0.0, 0, False
        self.log = open(self.folder / "log.jsonl", "a+")
        if fcntl:
            try:   # the system lets go of the lock when this process ends, however it ends
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.folder}: another run is writing there; choose another --out") from None
        self.log.seek(0)
        old = self.log.read().splitlines()[:resumed_at]
        self.log.seek(0)
        self.log.truncate()
        self.log.writelines(line + "\n" for line in old)
        self.log.flush()
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.stop)
        (self.folder / "result.json").unlink(missing_ok=True)   # its absence tells an unfinished run
        if not resumed_at:
            (self.folder / "samples.txt").write_text("")

    def stop(self, signum, frame):
        """Ctrl-C or a polite kill: finish the step and save. A second one ends the run where it is."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        print("stopping after this step; once more stops at once", flush=True)

    def update(self, i, model, optimizer, lr, batch):
        """The optimizer step of step i: clips and applies the gradient, clears it, returns its norm before clipping.
        A gradient that is not finite never reaches the weights: the step is skipped, its batch {name: ids, rows, ...}
        saved, and with the fourth such step the run ends."""
        params = [p for p in model.parameters() if p.requires_grad]
        if WORLD > 1 and not hasattr(model, "unshard") and summed(any(p.grad is not None for p in params)):
            for p in params:   # a process whose share was empty has none
                p.grad = summed(torch.zeros_like(p) if p.grad is None else p.grad)
        norm = whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        if norm.isfinite():
            nn.utils.clip_grads_with_norm_(model.parameters(), self.cfg.grad_clip, norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        else:
            bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            path = self.folder / f"bad_step_{i + 1}.pt"
            torch.save(batch, path)
            self.skipped += 1
            what = (f"step {i + 1}: the gradient of {bad[0]} and {len(bad) - 1} more is not finite; "
                    f"rows {batch.get('rows', [])[:8]} ..., the whole batch is in {path}")
            if self.skipped > 3:
                raise InputError(f"{what}. The fourth such step: try a smaller --lr or --dtype float32")
            print(f"{what}. Skipped", flush=True)
        optimizer.zero_grad()
        return norm.item()

    def save_now(self, i):
        """Whether step i ends with a checkpoint: every --save_every steps, at the end, and when asked to stop."""
        self.stopping = bool(summed(self.stopping))   # all processes or none
        return (i + 1) % self.cfg.save_every == 0 or i + 1 == self.steps or self.stopping

    def saved(self, i):
        """After the checkpoint of step i: end here if asked to."""
        if self.stopping:
            raise KeyboardInterrupt(f" after step {i + 1}, saved in {self.folder}; --resume goes on from there")

    def step(self, i, **metrics):
        """Record step i (from 0); show it at most every two seconds. JSON has no NaN; it is left out."""
        metrics |= {"skipped": self.skipped} if self.skipped else {}
        metrics = {k: float(f"{v:.6g}") for k, v in metrics.items() if math.isfinite(v)}
        self.log.write(json.dumps({"step": i + 1} | metrics) + "\n")
        self.log.flush()
        now, left = time.time(), self.steps - i - 1
        if now - self.shown > 2 or left == 0:
            eta = (now - self.start) / (i + 1 - self.first) * left
            line = " | ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            print(f"{self.stage} {i + 1}/{self.steps} | {line} | eta {eta:.0f}s", flush=True)
            self.shown = now

    def samples(self, title, prompts, responses):
        """Append the same few prompts' responses to samples.txt; returns them as text for the screen."""
        text = "".join(f"  {p[-1]['content']}\n    -> {r}\n" for p, r in zip(prompts, responses))
        with open(self.folder / "samples.txt", "a") as f:
            f.write(f"--- {title}\n{text}")
        return text

    def finish(self, device, before, after, panels, columns=None):
        """result.json, the closing table (of `columns` if given), and plot.png with one panel per tuple of log keys."""
        self.log.close()
        if RANK:
            return
        rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        speeds = sorted(r["tok_s"] for r in rows if "tok_s" in r)
        after |= {"tokens_per_second": speeds[len(speeds) // 2]} if speeds else {}
        result = {"stage": self.stage, "seed": self.cfg.seed, "config": asdict(self.cfg),
                  "seconds": round(time.time() - self.start, 1), "device": str(device),
                  "before": before, "after": after}
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1).encode())
        print(table(columns or {"before": before, "after": after}))
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            print(f"(no {self.folder / 'plot.png'}: matplotlib is not installed)")
            return
        fig, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
        for ax, keys in zip(axes if len(panels) > 1 else [axes], panels):
            for key in keys:
                points = [(r["step"], r[key]) for r in rows if key in r]
                ax.plot(*zip(*points), label=key) if points else None
            ax.set_xlabel("step")
            ax.legend()
            ax.grid(alpha=0.3)
        fig.suptitle(f"{self.stage}, seed {self.cfg.seed}")
        fig.savefig(self.folder / "plot.png", dpi=110)
        plt.close(fig)


def table(columns):
    """Text table of {column: {row: number}}; rows in order of first appearance."""
    rows = list(dict.fromkeys(k for c in columns.values() for k in c))
    widths = [max(12, len(name) + 2) for name in columns]
    lines = [f"{'':20}" + "".join(f"{name:>{w}}" for name, w in zip(columns, widths))]
    for k in rows:
        cells = (f"{c[k]:.3f}" if k in c else "" for c in columns.values())
        lines.append(f"{k:20}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Phase 0: pretraining. L(theta) = - sum_t log p_theta(x_t | x_<t) over "the internet".

SIZES = {   # name: fields of GPTConfig; any other shape is a row here
    "tiny": dict(n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_inner=344, head_dim=32, max_len=256,
                 norm="rmsnorm", pos="rope", mlp="swiglu", bias=False),
    "gpt2": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_inner=3072, head_dim=64, max_len=1024),
}


@dataclass
class Config:
    """The flags of `python model.py`."""
    data: str = ""                # text file, documents separated by <|endoftext|> (default: the tiny world's corpus)
    out: str = "out/base"         # folder for the checkpoint, log, samples and plot
    size: typing.Literal["tiny", "gpt2"] = "tiny"   # shape of the model, a row of SIZES
    steps: int = 1600             # optimizer steps
    batch_size: int = 8           # sequences a step
    length: int = 128             # tokens a sequence
    lr: float = 4e-3              # peak learning rate of AdamW, after warmup, decaying to a tenth along a cosine
    warmup: int = 40              # steps of linear warmup
    weight_decay: float = 0.1     # on matrices only
    grad_clip: float = 1.0        # largest gradient norm
    save_every: int = 400         # steps between checkpoints
    max_steps: int = 0            # stop after this many steps (0: run all)
    resume: bool = False          # go on from the last checkpoint in --out
    seed: int = 0                 # every random draw comes from (seed, step)
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; weights stay fp32
    compile: bool = False         # torch.compile the training forward, and on a GPU the decoding step
    recompute: bool = False       # activation checkpointing: layers run again in the backward pass, for less memory
    fsdp: bool = False            # with torchrun: cut weights, gradients and optimizer state over the processes
    chat: str = ""                # do not train: talk to this checkpoint
    temperature: float = 1.0      # of sampling in --chat
    max_new: int = 64             # longest answer in --chat, in tokens


def optimizer_for(model, lr, weight_decay, betas=(0.9, 0.95), eps=1e-8):
    """AdamW with weight decay on matrices only (norms and biases are left alone)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p.requires_grad]
    vectors = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def cosine(step, steps, warmup, floor=0.1):
    """Learning-rate factor: linear warmup, then a cosine from 1 down to floor."""
    return min(1.0, (step + 1) / max(1, warmup)) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def read_corpus(path, tok, length, least):
    """Ids of a text: all but the last 2 % (N,), which are for training, and those (M,), at least `length` of them.
    InputError: no such file, not UTF-8, fewer than `least` x `length` tokens."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such text file")
    try:
        docs = Path(path).read_text(encoding="utf-8").split("<|endoftext|>")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e})") from None
    ids = torch.tensor([i for doc in docs for i in [tok.eos_id, *tok.encode(doc)]])
    if len(ids) < least * length:
        raise InputError(f"{path}: {len(ids)} tokens are too few for sequences of {length}")
    held = max(length, len(ids) // 50)
    return ids[:-held], ids[-held:]


@torch.no_grad()
def bits_per_byte(model, ids, n_bytes, length=128, batch=32):
    """Compression of a text: total -log2 p of its ids (N,), cut into windows, divided by its length in bytes."""
    ids = ids[: len(ids) // length * length].view(-1, length)
    nll = sum(-token_logprobs(model, x, torch.ones_like(x)).double().sum().item() for x in ids.split(batch))
    return nll / math.log(2) / n_bytes


def ask(question):
    """A line from the terminal; "" at the end of the input."""
    try:
        return input(question).strip()
    except EOFError:
        return ""


def chat(cfg):
    """Talk to a checkpoint in the terminal; an empty line or the end of the input ends it."""
    device, autocast = setup(cfg)
    model, tok = load(cfg.chat, device, scalar_head=False)
    messages = []
    while text := ask("you> "):
        messages.append({"role": "user", "content": text})
        while len(messages) > 1 and len(tok.render(messages, True)[0]) + cfg.max_new > model.cfg.max_len:
            del messages[:2]   # out of context: forget the oldest exchange
        with autocast():
            answer = respond(model, tok, [messages], cfg.max_new, temperature=cfg.temperature)[0][0].strip()
        print(f"model> {answer}")
        messages.append({"role": "assistant", "content": answer})


def main(cfg):
    """Pretrain a base model from scratch."""
    from data import world
    from data.tokenizer import gpt2_tokenizer, tokenizer_from_ranks
    if cfg.chat:
        return chat(cfg)
    device, autocast = setup(cfg)
    tok = tokenizer_from_ranks(world.TINY / "tiny.tiktoken") if cfg.size == "tiny" else gpt2_tokenizer()
    ids, test = read_corpus(cfg.data or world.TINY / "corpus.txt", tok, cfg.length, least=4)      # (N,), (M,)
    test = test.to(device)
    test_bytes = len(tok.decode(test.tolist()).encode())

    model = GPT(GPTConfig(vocab_size=tok.vocab_size, **SIZES[cfg.size])).to(home(cfg, device))
    state = load_state(cfg.out) if cfg.resume else {}
    if state:
        model.load_state_dict(state["model"])
    model = for_training(model, cfg, device)
    optimizer, first = optimizer_for(model, cfg.lr, cfg.weight_decay), state.get("step", 0)
    if state:
        load_optimizer(optimizer, state["optimizer"])
    forward = torch.compile(token_logprobs) if cfg.compile else token_logprobs
    n_steps = min(cfg.steps, cfg.max_steps or cfg.steps)
    log = Run(cfg, "pretrain", n_steps, first)
    probes = [r["prompt"] for r in world.rows("test")[:6]]

    def measure():
        model.eval()
        with autocast():
            bpb = bits_per_byte(model, test, test_bytes, cfg.length)
            texts = respond(model, tok, probes, 32, generator=torch.Generator(device).manual_seed(cfg.seed))[0]
        model.train()
        return {"bits_per_byte": bpb}, texts

    before, texts = (state["before"], None) if first else measure()
    if not first:
        log.samples("step 0", probes, texts)
    for step in range(first, n_steps):
        start = time.time()
        at = torch.randint(len(ids) - cfg.length + 1, (cfg.batch_size,), generator=seeded(cfg.seed, step)).tolist()
        batch = torch.stack([ids[i: i + cfg.length] for i in share(at)]).to(device)               # (B, T)
        with autocast():
            loss = -forward(model, batch, torch.ones_like(batch)).sum() / (cfg.batch_size * (cfg.length - 1))
        loss.backward()
        norm = log.update(step, model, optimizer, cfg.lr * cosine(step, cfg.steps, cfg.warmup), {"rows": at})
        log.step(step, loss=summed(loss.item()), grad_norm=norm,
                 tok_s=cfg.batch_size * cfg.length / (time.time() - start))
        if log.save_now(step):
            save(cfg.out, model, tok, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                       "step": step + 1, "before": before})
            log.saved(step)
    after, texts = measure()
    print(log.samples(f"step {n_steps}", probes, texts))
    log.finish(device, before, after, [("loss",), ("grad_norm",)])


def seeded(seed, step, device="cpu"):
    """A generator for one step's random draws; because of it a resumed run needs no saved RNG state."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


if __name__ == "__main__":
    run(main, Config, __doc__)
