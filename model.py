"""A GPT in one file: GPT-2 and the Llama family, LoRA, the KV cache and sampling, and the numbers that RLHF
is made of: log-probs of tokens, values of tokens, rewards of answers.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary, P prompt, S positions of the cache.
Index t of a tensor (B, T) always means token t. A `mask` (B, T) is True on the tokens of an answer, its EOS
included. For rewards any mask will do that ends with the answer. """
import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
# The model. GPT-2 (Radford et al. 2019) and the Llama family (Touvron et al. 2023) differ only in these
# fields.


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
    qk_norm: str = ""             # RMSNorm of q and k: "head", of each (Qwen3); "all" as one (OLMo-2)
    post_norm: bool = False       # norms behind attention and MLP instead of before them (OLMo-2)
    tie: bool = True              # the output head is the token embedding
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # Llama 3.1's rule and its four numbers (rope_tables)
    scalar_head: bool = False     # reward and value models: one number per position instead of V logits


class Linear(nn.Linear):
    """A linear layer whose matrix product runs in Linear.compute_dtype, one setting for all layers: bfloat16
    where the hardware has it; None: the weights' own. Weights, gradients and optimizer stay in fp32."""
    compute_dtype = None

    def forward(self, x):
        dtype = self.compute_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class Attention(nn.Module):
    """Self-attention (B, T, C) -> (B, T, C), with rotary positions, grouped queries and the cache if there
    are any."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        n_rows = (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim
        self.qkv = Linear(cfg.n_embd, n_rows, bias=cfg.bias or cfg.qkv_bias)
        self.proj = Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=cfg.bias)
        if cfg.qk_norm:
            q_heads, k_heads = (cfg.n_head, cfg.n_kv_head) if cfg.qk_norm == "all" else (1, 1)
            self.q_norm = RMSNorm(q_heads * cfg.head_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(k_heads * cfg.head_dim, cfg.norm_eps)

    def forward(self, x, rope, bias, cache=None, pos=None):
        # q, k and v of all heads in one product; k and v may have fewer heads.
        B, T, _ = x.shape
        H, Hkv, D = self.cfg.n_head, self.cfg.n_kv_head, self.cfg.head_dim
        qk, v = self.qkv(x).view(B, T, H + 2 * Hkv, D).split([H + Hkv, Hkv], dim=2)
        if self.cfg.qk_norm:
            q, k = qk.split([H, Hkv], dim=2)
            qk = torch.cat((norm_heads(self.q_norm, q), norm_heads(self.k_norm, k)), dim=2)
        if rope is not None:
            qk = rotate(qk, *rope)                                                     # q and k at once
        q, k = qk.split([H, Hkv], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)              # (B, H or Hkv, T, D)

        # Keys and values of earlier tokens come from the cache, to which the new ones are added.
        if cache is not None:
            keys, values = cache                                                       # (B, Hkv, S, D) each
            if pos is None:     # prompts fill the cache from its start
                keys[:, :, :T], values[:, :, :T] = k, v
            else:               # one new token a row, written at the row's own position
                rows = torch.arange(B, device=x.device)
                keys[rows, :, pos[:, 0]] = k[:, :, 0]
                values[rows, :, pos[:, 0]] = v[:, :, 0]
                S = bias.shape[-1]
                k, v = keys[:B, :, :S], values[:B, :, :S]

        # Every query takes its mix of the values; the heads side by side are the output.
        y = attention(q, k, v, bias)                                                   # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))


def attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(D) + bias) v; q (B, H, T, D), k and v (B, Hkv, S, D). The bias (B, 1, T, S) is 0
    where a query may look and -inf elsewhere. Without one, attention is causal and S = T. -> (B, H, T, D)"""
    B, H, T, D = q.shape
    group = H // k.shape[1]
    # On the CPU the fused bf16 kernels are 2 to 5 times slower than the three lines below, except for a
    # single query.
    written_out = q.device.type == "cpu" and q.dtype == torch.bfloat16 and T > 1
    if written_out and bias is None:
        bias = attention_bias(torch.ones(T, T, dtype=torch.bool).tril()[None, None], q.dtype)
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)

    # Query heads that share keys become further queries of one head, so no kernel needs to know of groups.
    q = q.reshape(B, H // group, group * T, D)                                        # (B, Hkv, group T, D)
    bias = bias.repeat(1, 1, group, 1)                                                # (B, 1, group T, S)
    if written_out:
        scores = (q * D ** -0.5).contiguous() @ k.contiguous().transpose(-1, -2)      # (B, Hkv, group T, S)
        scores += bias
        y = scores.softmax(-1) @ v.contiguous()         # softmax sums in fp32 and rounds its result to bf16
    else:
        y = F.scaled_dot_product_attention(q, k, v, bias)
    return y.reshape(B, H, T, D)


def attention_bias(attn_mask, dtype):
    """Where a query may look (True), as numbers to add to the scores: 0 there and -inf elsewhere."""
    zeros = torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device)
    return zeros.masked_fill(~attn_mask, -math.inf)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, H, D) by cos, sin (T, 1, D) or (B, T, 1, D)."""
    full = x.to(torch.promote_types(x.dtype, cos.dtype))
    return torch.addcmul(full * cos, full.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def rope_tables(cfg, device):
    """cos and sin of every position's rotary angles, (max_len, 1, D) each (arXiv:2104.09864). Channels i and
    i + D/2 are rotated together: x_i cos - x_{i+D/2} sin and x_{i+D/2} cos + x_i sin. The first half of sin
    carries the minus."""
    exponents = torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim     # (D/2,)
    freq = cfg.rope_theta ** -exponents
    if cfg.rope_scaling:
        # Llama 3.1: stretch slow waves by `factor`, keep fast ones, blend in between
        s = cfg.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)    # in the old context
        blend = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        blend = blend.clamp(0, 1)
        freq = freq * (blend + (1 - blend) / s["factor"])
    angle = torch.outer(torch.arange(cfg.max_len, device=device).float(), freq)[:, None]   # (max_len, 1, D/2)
    return angle.cos().repeat(1, 1, 2), torch.cat((-angle.sin(), angle.sin()), dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight in fp32 (arXiv:1910.07467), handed on in the dtype it came in."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def norm_heads(norm, x):
    """The norm of heads x (B, T, H, D), each by itself or as one, whichever the norm has weights for."""
    return norm(x.flatten(2).unflatten(2, (-1, len(norm.weight)))).view_as(x)


def make_norm(cfg):
    """The norm of the config's dialect over the C channels."""
    if cfg.norm == "layernorm":
        return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)
    return RMSNorm(cfg.n_embd, cfg.norm_eps)


class MLP(nn.Module):
    """The position-wise network (B, T, C) -> (B, T, C): down(gelu(up x)) or down(silu(gate x) * up x)."""

    def __init__(self, cfg):
        super().__init__()
        self.swiglu = cfg.mlp == "swiglu"
        self.up = Linear(cfg.n_embd, cfg.n_inner * (2 if self.swiglu else 1), bias=cfg.bias)
        self.down = Linear(cfg.n_inner, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        x = self.up(x)   # (B, T, I), or twice as wide: gate and value side by side
        if self.swiglu:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """A layer (B, T, C) -> (B, T, C): attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, cfg):
        super().__init__()
        self.post_norm = cfg.post_norm
        self.ln_1, self.attn = make_norm(cfg), Attention(cfg)
        self.ln_2, self.mlp = make_norm(cfg), MLP(cfg)

    def forward(self, x, rope, bias, cache=None, pos=None):
        if self.post_norm:    # what is added is normed, not what is read
            x = x + self.ln_1(self.attn(x, rope, bias, cache, pos))
            return x + self.ln_2(self.mlp(x))
        x = x + self.attn(self.ln_1(x), rope, bias, cache, pos)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Decoder-only transformer. `model(ids)` gives hidden states; `logits` and `scores` turn them into
    outputs, so that a caller pays for the head only at the positions it needs."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.recompute = False    # run layers again in the backward pass, for less memory
        self.kept_cache = None    # of `generate`, for CUDA graphs
        self.reward_mean = 0.0    # subtracted from every score: held-out answers average 0 (reward.py)
        self.process = False      # scores the steps of an answer (data/process.py); kept here for config.json
        self.read_before = None   # an end token before which rewards are read, instead of at it
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.pos == "learned":
            self.wpe = nn.Embedding(cfg.max_len, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = make_norm(cfg)
        if cfg.scalar_head:
            self.score = Linear(cfg.n_embd, 1, bias=False)
        elif not cfg.tie:
            self.lm_head = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Draw all weights, GPT-2's N(0, 0.02) with the outputs of each layer scaled by 1 / sqrt(2 L), and
        compute the rotary tables, which are never saved."""
        for name, p in self.named_parameters():
            if name == "score.weight":
                init_score(p)
            elif p.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.cfg.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)
        if self.cfg.pos == "rope":
            cos, sin = rope_tables(self.cfg, self.wte.weight.device)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, cache=None, pos=None, attn_mask=None):
        """Hidden states (B, T, C) of ids (B, T), right-padded with anything: attention is causal.

        cache, one (keys, values) a layer, takes up those of this call:
            alone: these are prompts, written from position 0 on.
            with pos (B, 1) and attn_mask (B, 1, 1, S): one token a row, written at position pos[b]. It
            attends to those of the first S positions where attn_mask is True.
        pos (B, T) and attn_mask (B, 1, T, T) without a cache: positions and attention are the caller's."""
        T = ids.shape[1]
        if pos is None and T > self.cfg.max_len:
            raise ValueError(f"{T} tokens are longer than the model's context of {self.cfg.max_len}")

        # Token embeddings, and where each token stands: added here (GPT-2), or turned into q and k (Llama).
        x, rope = self.wte(ids), None   # (B, T, C)
        if self.cfg.pos == "learned":
            x = x + (self.wpe.weight[:T] if pos is None else self.wpe.weight[pos])
        elif pos is None:
            rope = self.cos[:T], self.sin[:T]   # (T, 1, D)
        else:
            rope = self.cos[pos], self.sin[pos]   # (B, T, 1, D)

        # The layers, all with the same bias.
        bias = None
        if attn_mask is not None:
            bias = attention_bias(attn_mask, Linear.compute_dtype or x.dtype)
        for i, block in enumerate(self.h):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, bias, use_reentrant=False)   # arXiv:1604.06174
            else:
                x = block(x, rope, bias, cache[i] if cache else None, pos)
        return self.ln_f(x)

    def head(self):
        """The output head's weight (V', C), in the dtype of products. In bf16 rows of 0 pad it to a multiple
        of 64, V', which is faster (50,257 tokens: 50,304)."""
        w = self.wte.weight if self.cfg.tie else self.lm_head.weight
        w = w.to(Linear.compute_dtype or w.dtype)
        if w.dtype == torch.bfloat16 and len(w) % 64:
            w = F.pad(w, (0, 0, 0, -len(w) % 64))
        return w

    def logits(self, hidden):
        """Next-token logits (..., V) of hidden states (..., C)."""
        w = self.head()
        return F.linear(hidden.to(w.dtype), w)[..., : self.cfg.vocab_size]

    def scores(self, hidden):
        """One number per position (...,) of hidden states (..., C), fp32: a reward at the last token, a value
        anywhere."""
        return self.score(hidden).squeeze(-1).float() - self.reward_mean


def init_score(weight):
    """Draw the weight (1, C) of a scalar head: N(0, 1 / (C + 1)) (arXiv:2009.01325, appendix B.1)."""
    nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1] + 1))


# ------------------------------------------------------------------------------------------------------------
# Frozen models, copies to sample from, adapters.


def freeze(model):
    """Set requires_grad to False for every parameter of a model. Returns the model."""
    return model.requires_grad_(False)


def freeze_and_cast(model, exactly=False):
    """Freeze a model, and cast the weights of its linear layers to the dtype of their products, for which
    they would be cast in every call anyway: half the memory, the same numbers. exactly: only those that lose
    nothing by it, in what is saved again, as LoRA's trunk is with its adapters. Returns the model."""
    freeze(model)
    for layer in model.h.modules():
        if isinstance(layer, Linear) and Linear.compute_dtype:
            for name, p in list(layer.named_parameters()):
                cast = p.to(Linear.compute_dtype)
                if cast.dtype != p.dtype and not (exactly and (cast != p).any()):
                    setattr(layer, name, nn.Parameter(cast, requires_grad=False))
    return model


def sampling_copy(model):
    """A frozen copy of the model to sample from, its weights and its head cast once instead of for every
    token. `refresh` brings it up to date."""
    # Copy what is trained or has to be cast, share the rest.
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    sampler = freeze_and_cast(copy.deepcopy(model, shared))

    # Its head is a layer of its own, which the embedding does not share any more.
    head = sampler.head().detach().clone()
    sampler.cfg = replace(sampler.cfg, tie=False)
    sampler.lm_head = Linear(1, 1, bias=False)
    sampler.lm_head.weight = nn.Parameter(head, requires_grad=False)
    return sampler


@torch.no_grad()
def refresh(sampler, model):
    """Copy the weights of a model into its sampling copy, in place, so that CUDA graphs find them where they
    were."""
    weights = dict(model.named_parameters())
    for name, p in sampler.named_parameters():
        tied = name == "lm_head.weight" and model.cfg.tie
        new = weights["wte.weight" if tied else name]
        if hasattr(new, "full_tensor"):   # cut over several processes (FSDP2): gathered, one tensor at a time
            new = new.full_tensor()
        if new is not p:
            p[: len(new)].copy_(new)        # the head may have more rows (GPT.head)


class LoRA(nn.Module):
    """A frozen linear layer plus a trained low-rank one: W x + (alpha / r) B A x with alpha / r = 2, and
    B = 0 at first (arXiv:2106.09685, eq. 3)."""

    def __init__(self, linear, rank):
        super().__init__()
        n_out, n_in = linear.weight.shape
        self.linear = linear
        self.a = Linear(n_in, rank, bias=False, device=linear.weight.device)
        self.b = Linear(rank, n_out, bias=False, device=linear.weight.device)
        nn.init.normal_(self.a.weight, std=n_in ** -0.5)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.linear(x) + 2 * self.b(self.a(x))


def with_lora(trunk, rank, scalar_head=False):
    """A model with its own LoRA adapters on `trunk`, which is frozen by this, and whose weights are shared,
    not copied. The trunk itself is the reference; policy and value model cost little memory beside it."""
    # The same weights, not a copy of them, inside new layers.
    freeze_and_cast(trunk, exactly=True)
    model = copy.deepcopy(trunk, {id(p): p for p in trunk.parameters()})
    for block in model.h:
        block.attn.qkv, block.attn.proj = LoRA(block.attn.qkv, rank), LoRA(block.attn.proj, rank)
        block.mlp.up, block.mlp.down = LoRA(block.mlp.up, rank), LoRA(block.mlp.down, rank)
    if scalar_head:
        model.cfg = replace(model.cfg, scalar_head=True)
        model.score = Linear(trunk.cfg.n_embd, 1, bias=False, device=trunk.wte.weight.device)
        init_score(model.score.weight)
    return model


# ------------------------------------------------------------------------------------------------------------
# Sampling.


def pad_batch(rows, pad_id, device="cpu", length=None):
    """Lists of ids -> right-padded (B, T) int64, and which of them are real (B, T), no padding."""
    T = length or max(len(row) for row in rows)
    ids = torch.full((len(rows), T), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    lens = torch.tensor([len(row) for row in rows])
    real = torch.arange(T) < lens[:, None]
    return ids.to(device, non_blocking=True), real.to(device, non_blocking=True)


def pad_answers(rows, pad_id, device="cpu"):
    """Rows (prompt, answer), two lists of ids each -> right-padded ids (B, T) int64, prompt before answer,
    and a mask (B, T) that is True on the answers."""
    ids, real = pad_batch([prompt + answer for prompt, answer in rows], pad_id, device)
    starts = torch.tensor([len(prompt) for prompt, _ in rows], device=device)
    return ids, real & (torch.arange(ids.shape[1], device=device) >= starts[:, None])


def draw(logits, u, temperature):
    """Tokens (n,) drawn from logits (n, V) by u (n,), uniform in [0, 1), or the likeliest ones at temperature
    0, and their log-probs (n,) under softmax(logits / temperature). Nothing waits for the host."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)                                 # (n, V)
    if temperature == 0:
        token = logp.argmax(-1)
    else:
        # The first token whose cumulative probability exceeds u.
        total = logp.softmax(-1).cumsum(-1, dtype=u.dtype)                                         # (n, V)
        token = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(1, token[:, None])[:, 0]


def decode(model, token, cache, S, pos):
    """One step of `generate`: reads tokens (n,) at positions pos (n,) and S positions of the cache. Returns
    the logits (n, V) of the next ones. Its shapes depend on n and S alone and nothing in it waits for the
    host, so that on a GPU each such pair can become a CUDA graph (compile_decoding)."""
    # Pass the whole cache: given slices, compiled code would copy them and copy them back.
    attn_mask = (torch.arange(S, device=token.device) <= pos[:, None])[:, None, None]   # (n, 1, 1, S)
    hidden = model(token[:, None], cache, pos[:, None], attn_mask)                      # (n, 1, C)
    return model.logits(hidden[:, 0])


# `decode` compiled to CUDA graphs, or None. A graph belongs to one pair (n, S) and to the addresses of its
# tensors: the cache is kept from call to call and rows move inside it; n is B, then powers of two; S is whole
# blocks.
GRAPHS = None


def compile_decoding():
    """From now on `generate` decodes in CUDA graphs, one for each number of rows and of positions read."""
    global GRAPHS
    # Beyond these limits fullgraph=True is an error; there are log2(rows) x blocks of positions shapes.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    GRAPHS = torch.compile(decode, mode="reduce-overhead", fullgraph=True, dynamic=False)


def new_cache(model, B, S):
    """An empty cache for B rows and S positions: one (keys, values) a layer, (B, Hkv, S, D) each."""
    cfg, weight = model.cfg, model.wte.weight
    shape, dtype = (B, cfg.n_kv_head, S, cfg.head_dim), Linear.compute_dtype or weight.dtype
    cache = []
    for _ in range(cfg.n_layer):
        keys = torch.zeros(shape, device=weight.device, dtype=dtype)
        cache.append((keys, torch.zeros_like(keys)))
    return cache


def kept_cache(model, B, S):
    """The cache of the call before, for CUDA graphs, which want their tensors where they were; a larger one
    if it is too small. It still holds that call's numbers: every position is written before it is read."""
    rows = positions = 0
    if model.kept_cache:
        rows, _, positions, _ = model.kept_cache[0][0].shape
    if rows < B or positions < S:
        # Both at least as before, else calls of different shapes would replace it in turn.
        model.kept_cache = new_cache(model, max(B, rows), max(S, positions))
        for keys, values in model.kept_cache:
            torch._dynamo.mark_static_address(keys, guard=False)     # to be written in place, not copied
            torch._dynamo.mark_static_address(values, guard=False)
    return model.kept_cache


def read_prompts(model, tok, prompts, N):
    """A cache that holds B prompts (lists of ids) and has room for N more tokens a row, and the hidden states
    (B, C) of the prompts' last tokens. ValueError: an empty or too long prompt."""
    B, P, device = len(prompts), max(len(prompt) for prompt in prompts), model.wte.weight.device
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("an empty prompt: generation needs at least one token to start from")
    if P + N > model.cfg.max_len:
        raise ValueError(f"a prompt of {P} + {N} new tokens exceeds the context of {model.cfg.max_len}")

    # Every different prompt is read once, U of them, into a cache of its own.
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    which = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)             # (B,)
    ids, real = pad_batch(list(number), tok.pad_id, device)                                        # (U, P)
    read = new_cache(model, len(number), P)
    hidden = model(ids, read)                                                                      # (U, P, C)

    # Its keys and values are copied to all its rows.
    cache = kept_cache(model, B, whole_blocks(P + N)) if GRAPHS else new_cache(model, B, P + N)
    for (keys, values), (prompt_keys, prompt_values) in zip(cache, read):
        keys[:B, :, :P], values[:B, :, :P] = prompt_keys[which], prompt_values[which]
    last = real.sum(1) - 1                                                                         # (U,)
    return cache, hidden[which, last[which]]


def whole_blocks(S):
    """Positions of the cache to read for S of them: with CUDA graphs whole blocks of 64, for few shapes."""
    return -(-S // 64) * 64 if GRAPHS else S


def drop_ended(cache, row, token, done):
    """The rows that are still being written, their newest tokens, and whether they are done, (n,) each,
    without those that are, if that saves a quarter of the rows. The cache's rows move with them."""
    keep = (~done).nonzero()[:, 0]
    n = len(keep)
    if GRAPHS and n:
        n = 1 << (n - 1).bit_length()                          # the next power of two, for few shapes
    if n > 0.75 * len(row):
        return row, token, done
    keep = torch.cat((keep, done.nonzero()[: n - len(keep), 0]))     # rows that are done fill up n
    for keys, values in cache:
        keys[:n], values[:n] = keys[keep], values[keep]
    return row[keep], token[keep], done[keep]


@torch.no_grad()
def generate(model, tok, prompts, draws, temperature=1.0):
    """Continue ragged prompts (B lists of ids) until one of tok.eos_ids, by at most N tokens.

    draws (B, N): a uniform number in [0, 1) for every token that may be drawn. temperature 0 is greedy.
    Returns ids (B, T): prompt, answer, padding, in that order without gaps; mask (B, T): True on the answer,
    EOS included; logp (B, T): log-prob of each token of the answer under softmax(logits / temperature), 0
    elsewhere. ValueError: an empty or too long prompt."""
    # The first token follows from the hidden state of the last one of the prompt.
    (B, N), device = draws.shape, model.wte.weight.device
    draws = draws.to(device, torch.float32 if device.type == "mps" else torch.float64)
    cache, hidden = read_prompts(model, tok, prompts, N)                                           # (B, C)
    token, lp = draw(model.logits(hidden), draws[:, 0], temperature)                               # (B,)

    # The answers so far, and the rows still being written.
    lens = torch.tensor([len(prompt) for prompt in prompts], device=device)                        # (B,)
    longest, eos = max(map(len, prompts)), torch.tensor(sorted(tok.eos_ids), device=device)
    new, logp = torch.zeros(B, N, dtype=torch.long, device=device), torch.zeros(B, N, device=device)
    wrote = torch.zeros(B, N, dtype=torch.bool, device=device)
    row = torch.arange(B, device=device)       # (n,) the rows still being written, in the cache's order
    done = torch.zeros(B, dtype=torch.bool, device=device)
    for i in range(N):
        # Keep the drawn tokens of all rows that have not ended before.
        new[row, i], logp[row, i], wrote[row, i] = token, lp, ~done
        done = done | torch.isin(token, eos)
        if i + 1 == N:
            break
        if i % 4 == 3:      # the only wait for the GPU
            row, token, done = drop_ended(cache, row, token, done)
            if len(row) == 0:
                break

        # Read the newest token and draw the next one.
        if GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
        step, S = GRAPHS or decode, whole_blocks(longest + i + 1)
        logits = step(model, token, cache, S, lens[row] + i)                                       # (n, V)
        token, lp = draw(logits, draws[row, i + 1], temperature)                                   # (n,)
    return put_together(prompts, lens, new, logp, wrote, tok.pad_id)


def put_together(prompts, lens, new, logp, wrote, pad_id):
    """What `generate` returns, of prompts (B lists of ids) of lengths lens (B,) and their answers: ids `new`
    and log-probs (B, N), which count where `wrote` is True."""
    N, device = new.shape[1], new.device
    at = lens[:, None] + torch.arange(N, device=device)                                            # (B, N)
    ids, _ = pad_batch(prompts, pad_id, device, max(map(len, prompts)) + N)
    ids = ids.scatter(1, at, torch.where(wrote, new, pad_id))
    mask = torch.zeros_like(ids, dtype=torch.bool).scatter(1, at, wrote)
    logp = torch.zeros(ids.shape, device=device).scatter(1, at, logp * wrote)
    T = int((lens + wrote.sum(1)).max())
    return ids[:, :T], mask[:, :T], logp[:, :T]


# ------------------------------------------------------------------------------------------------------------
# What a model says of tokens and answers. Each reads only as many columns as the longest answer needs.

MAX_LOGITS = 2 ** 28   # at a time: 1 GB in fp32


def last_token(mask):
    """Position (B,) of the last True of each row of a mask (B, T); T - 1 in a row without one."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def is_last(mask):
    """(B, T), True at the last token of each row where mask (B, T) is True: an answer's EOS."""
    return torch.arange(mask.shape[1], device=mask.device) == last_token(mask)[:, None]


def width_of(mask):
    """Number of columns of a mask (B, T) up to the last True of any row."""
    return int(last_token(mask).max()) + 1


def head_logprobs(hidden, w, ids, V, temperature, entropy):
    """For hidden (N, C), a head w (V', C) of which the first V rows count, and ids (N,):
    log softmax(hidden w^T / temperature)[ids] as (1, N), fp32. entropy=True: (2, N), the second row is the
    entropy in nats."""
    logits, out = F.linear(hidden.to(w.dtype), w)[:, :V], []                                       # (N, V)
    # In fp32 a few rows at a time, which stay in a CPU's cache: 1.5 times faster steps with 50,304 tokens.
    rows = max(1, 2 ** 20 // V) if logits.device.type == "cpu" else len(ids)
    for z, y in zip(logits.split(rows), ids.split(rows)):
        z = z.float()
        if temperature != 1:
            z = z / temperature
        logp = z.log_softmax(-1)                                                                   # (n, V)
        part = [logp.gather(1, y[:, None])[:, 0]]
        if entropy:
            part.append(-(logp.exp() * logp).sum(-1))
        out.append(torch.stack(part))
    return torch.cat(out, dim=1)


def logprobs_from(model, hidden, ids, mask, temperature=1.0, entropy=False):
    """`token_logprobs` of hidden states (B, T, C) that the model has computed already."""
    B, T = ids.shape
    # Token t is predicted at t - 1. at (N,) numbers the masked tokens: row x (T - 1) + t - 1.
    at = mask[:, 1:].bool().flatten().nonzero()[:, 0].to(ids.device, non_blocking=True)
    h, y = hidden[:, :-1].flatten(0, 1)[at], ids[:, 1:].flatten()[at]    # (N, C), (N,)
    w, V = model.head(), model.cfg.vocab_size

    # Some rows at a time. If there are several parts, the backward pass recomputes their logits.
    rows = max(1, MAX_LOGITS // V)
    recompute = torch.is_grad_enabled() and len(y) > rows
    parts = []
    for h_part, y_part in zip(h.split(rows), y.split(rows)):
        inputs = (h_part, w, y_part, V, temperature, entropy)
        if recompute:
            parts.append(checkpoint(head_logprobs, *inputs, use_reentrant=False))
        else:
            parts.append(head_logprobs(*inputs))

    # Back to where the tokens stand.
    found = torch.cat(parts, dim=1)                                            # (1, N), with entropy (2, N)
    flat = torch.zeros(len(found), B * (T - 1), device=ids.device).index_copy(1, at, found)
    out = F.pad(flat.view(-1, B, T - 1), (1, 0))                               # (1, B, T) or (2, B, T)
    return out if entropy else out[0]


def token_logprobs(model, ids, mask, temperature=1.0, entropy=False):
    """Log-prob (B, T) of every token under the model where mask is True, 0 elsewhere; fp32. ids, mask: (B,
    T).

    logp[b, t] = log softmax(logits[b, t - 1] / temperature)[ids[b, t]]: SFT, DPO, PPO and CAI all train on
    this number. The head runs on the masked positions only, so that no (B, T, V) tensor ever exists.
    entropy=True gives (2, B, T): these, and the entropy in nats of each distribution. A mask on the CPU
    spares a wait for the GPU."""
    T = width_of(mask)
    out = logprobs_from(model, model(ids[:, :T]), ids[:, :T], mask[:, :T], temperature, entropy)
    return F.pad(out, (0, ids.shape[1] - T))


def token_values(model, ids, mask):
    """Values (B, T) of a value model where mask is True, 0 elsewhere. Entry t is the value of the state
    before token t, read at token t - 1. ids, mask: (B, T)."""
    T = width_of(mask)
    v = model.scores(model(ids[:, :T]))                                                            # (B, T)
    return F.pad(v[:, :-1], (1, ids.shape[1] - T)) * mask


def answer_rewards(model, ids, mask):
    """Rewards (B,) of a reward model, read at the last token where mask (B, T) is True: the answer's EOS."""
    hidden = model(ids[:, : width_of(mask)])                                                       # (B, T, C)
    row, last = torch.arange(len(ids), device=ids.device), last_token(mask).to(ids.device)
    if model.read_before is not None:
        last = last - (ids[row, last] == model.read_before).long()
    return model.scores(hidden[row, last])


@torch.no_grad()
def compare_policies(policy, reference, ids, mask, temperature=1.0):
    """Four (B, T) tensors, 0 outside the mask: log-probs of policy and reference, the exact KL(policy ||
    reference) over the whole vocabulary, and the policy's entropy, in nats."""
    # Hidden states of both at the positions where a masked token is predicted.
    T = width_of(mask)
    rows, before = mask[:, 1:T].nonzero(as_tuple=True)   # (N,) each; `before` is where token t is predicted
    hidden, ref_hidden = policy(ids[:, :T])[rows, before], reference(ids[:, :T])[rows, before]     # (N, C)
    y = ids[rows, before + 1][:, None]                                                             # (N, 1)

    # Both distributions over the whole vocabulary, some positions at a time.
    out = torch.zeros(4, *ids.shape, device=ids.device)
    n = max(1, MAX_LOGITS // (2 * policy.cfg.vocab_size))
    for i in range(0, len(y), n):
        here = slice(i, i + n)
        logp = (policy.logits(hidden[here]).float() / temperature).log_softmax(-1)                 # (n, V)
        ref_logp = (reference.logits(ref_hidden[here]).float() / temperature).log_softmax(-1)
        p = logp.exp()
        four = (logp.gather(1, y[here])[:, 0], ref_logp.gather(1, y[here])[:, 0],
                (p * (logp - ref_logp)).sum(1), -(p * logp).sum(1))                                # (n,) each
        out[:, rows[here], before[here] + 1] = torch.stack(four)
    return out
