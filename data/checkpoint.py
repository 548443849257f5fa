"""Checkpoints from outside: Hugging Face folders in and out with torch, numpy and the standard library."""
import hashlib
import http.client
import json
import math
import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import (JINJA, CheckpointError, gpt2_tokenizer, read_json, require, tokenizer_from_json,
                            tokenizer_to_json)
from model import GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw numbers.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file (format: github.com/huggingface/safetensors), mapped into memory
    copy-on-write, so that only what is used is read, once. Every claim of the header is checked against the size of
    the file before anything is mapped or allocated; CheckpointError if one does not hold."""
    require(Path(path).is_file(), f"{path}: no such file")
    size = Path(path).stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        require(size >= 8 and n <= min(size - 8, 10**8), f"{path}: a header of {n} bytes in a file of {size}")
        header = read_json(path, f.read(n))
    header.pop("__metadata__", None)
    spans, end = [], 0
    for name, info in header.items():
        where = f"{path}: tensor {name!r}"
        try:
            kind, shape, (a, b) = info["dtype"], info["shape"], info["data_offsets"]
            dims = [*shape, a, b]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{where} lacks a dtype, a shape or two offsets") from None
        require(isinstance(kind, str) and kind in DTYPES, f"{where} has the unsupported dtype {kind!r}")
        require(len(dims) < 16 and all(type(d) is int and 0 <= d < 2**48 for d in dims)
                and math.prod(max(d, 1) for d in shape) < 2**60, f"{where} has an impossible shape or offset")
        require(b - a == math.prod(shape) * DTYPES[kind].itemsize, f"{where} is {kind}{shape} in {b - a} bytes")
        spans.append((a, b, name, DTYPES[kind], shape))
    for a, b, name, *_ in sorted(spans, key=lambda span: span[:3]):
        require(a == end, f"{path}: tensor {name!r} starts at byte {a}, the one before it ends at {end}")
        end = b
    require(end == size - 8 - n, f"{path}: the header describes {end} bytes of data, the file has {size - 8 - n}")
    data, tensors = torch.from_numpy(np.memmap(path, np.uint8, "c"))[8 + n:], {}
    for a, b, name, dtype, shape in spans:
        raw = data[a:b]
        raw = raw.clone() if raw.storage_offset() % dtype.itemsize else raw   # a view needs an aligned start
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} and wait until the disk has it."""
    kinds, header, end = {v: k for k, v in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())   # large items first keep all aligned
    for name in names:
        t = tensors[name]
        require(t.dtype in kinds, f"tensor {name!r}: {t.dtype} cannot be stored in a safetensors file")
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            f.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        f.flush()
        os.fsync(f.fileno())


def plain_names(names, where):
    """The names, if each is that of a file in a folder and leads nowhere else."""
    for name in names:
        plain = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)
        require(plain, f"{where}: {name!r} is not a plain file name")
    return names


def read_index(path):
    """{tensor: file} of a model.safetensors.index.json; the files are plain names."""
    where = read_json(path).get("weight_map")
    require(isinstance(where, dict) and where, f"{path}: has no weight_map")
    plain_names(where.values(), path)
    return where


def read_tensors(folder):
    """All tensors of a folder: model.safetensors, or the shards named in model.safetensors.index.json."""
    index, tensors = folder / "model.safetensors.index.json", {}
    if (folder / "model.safetensors").exists() or not index.exists():
        return read_safetensors(folder / "model.safetensors")
    where = read_index(index)
    for name in sorted(set(where.values())):
        require((folder / name).resolve().parent == folder.resolve(), f"{folder / name}: a link out of its folder")
        tensors |= {key: t for key, t in read_safetensors(folder / name).items() if where.get(key) == name}
    for key in where:
        require(key in tensors, f"{folder / where[key]}: tensor {key!r} is not in it, though {index.name} says so")
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# config.json and the names of the weights, both ways, for GPT-2, Llama (and Mistral), Qwen2.5 and Qwen3.

HF_CLASS = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_hf(hf):
    """GPTConfig from the dict in a config.json (old or new way of writing the rotary settings). A field that would
    change the outputs in a way this GPT does not implement raises CheckpointError."""
    def check(ok, what):
        require(ok, f"config.json: {what}")

    def get(key, default=None, kind=int):
        value = default if hf.get(key) is None else hf[key]
        check(type(value) is kind and 0 < value < 2**31, f"{key} is {hf.get(key)!r}, not a positive {kind.__name__}")
        return value

    def number(x):
        return type(x) in (int, float) and abs(x) < 1e30

    kind = hf.get("model_type")
    check(kind in (*HF_CLASS, "mistral"), f"model_type {kind!r} is not one of {', '.join(HF_CLASS)}, mistral")
    plain = {"quantization_config": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
             "add_cross_attention": False, "hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0,
             "use_sliding_window": False, "attention_bias": kind == "qwen2"}   # elsewhere it means o_proj has one too
    for key, value in plain.items():
        check(hf.get(key) in (None, value) or (kind, key) == ("qwen2", "attention_bias"),
              f"{key} = {hf.get(key)!r} is not supported, only {value!r}")
    mean = hf.get("reward_mean", 0.0)
    check(number(mean), f"reward_mean is {mean!r}, not a number")
    scalar = "ForSequenceClassification" in str(hf.get("architectures"))
    common = dict(vocab_size=get("vocab_size"), tie=bool(hf.get("tie_word_embeddings", kind == "gpt2")),
                  scalar_head=scalar, reward_mean=float(mean))
    if kind == "gpt2":
        act, C, H = hf.get("activation_function", "gelu_new"), get("n_embd"), get("n_head")
        check(act in ("gelu_new", "gelu_pytorch_tanh"), f"activation_function {act!r} is not supported, only gelu_new")
        check(C % H == 0, f"n_embd {C} is not a multiple of n_head {H}")
        return GPTConfig(n_layer=get("n_layer"), n_head=H, n_kv_head=H, n_embd=C, n_inner=get("n_inner", 4 * C),
                         max_len=get("n_positions", 1024), head_dim=C // H,
                         norm_eps=get("layer_norm_epsilon", 1e-5, float), **common)
    C, H, S = get("hidden_size"), get("num_attention_heads"), get("max_position_embeddings")
    check(kind != "mistral" or hf.get("sliding_window", 4096) is None or get("sliding_window", 4096) >= S,
          "sliding_window attention is not supported")
    layers = hf.get("layer_types") or ["full_attention"]
    check(isinstance(layers, list) and all(x == "full_attention" for x in layers), f"layer_types: {layers!r}")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    check(isinstance(rope, dict), f"rotary settings {rope!r} are not supported")
    rule, theta = rope.get("rope_type", rope.get("type", "default")), rope.get("rope_theta", hf.get("rope_theta", 1e4))
    scaling = {key: rope.get(key) for key in ROPE_KEYS} if rule == "llama3" else None
    numbers = [theta, *(scaling or {}).values()]
    check(rule in ("default", "llama3") and rope.get("partial_rotary_factor", 1.0) == 1.0
          and all(number(x) and x > 0 for x in numbers),
          f"rotary settings {rope or theta!r} are not supported, only the llama3 rule with {', '.join(ROPE_KEYS)}")
    return GPTConfig(n_layer=get("num_hidden_layers"), n_head=H, n_kv_head=get("num_key_value_heads", H), n_embd=C,
                     n_inner=get("intermediate_size"), max_len=S, norm="rmsnorm", pos="rope", mlp="swiglu", bias=False,
                     head_dim=get("head_dim", 128 if kind == "qwen3" else C // H), qkv_bias=kind == "qwen2",
                     qk_norm=kind == "qwen3", norm_eps=get("rms_norm_eps", 1e-6, float), rope_theta=float(theta),
                     rope_scaling=scaling, **common)


def dialect(cfg):
    """'gpt2', 'llama', 'qwen2' or 'qwen3': the Hugging Face model type that computes what cfg describes."""
    parts = (cfg.norm, cfg.pos, cfg.mlp, cfg.bias)
    square = cfg.n_kv_head == cfg.n_head and cfg.n_head * cfg.head_dim == cfg.n_embd
    if parts == ("layernorm", "learned", "gelu", True) and square and not cfg.qk_norm:
        return "gpt2"
    if parts == ("rmsnorm", "rope", "swiglu", False) and not (cfg.qkv_bias and cfg.qk_norm):
        return "qwen2" if cfg.qkv_bias else "qwen3" if cfg.qk_norm else "llama"
    raise CheckpointError(f"no Hugging Face model type computes this combination: {cfg}")


def config_to_hf(cfg, tok):
    """The dict for config.json. A scalar head becomes ...ForSequenceClassification, whose one logit is our score plus
    reward_mean (kept in an extra field: their head has no bias to put it in)."""
    kind = dialect(cfg)
    hf = {"architectures": [HF_CLASS[kind] + ("ForSequenceClassification" if cfg.scalar_head else
                                              "LMHeadModel" if kind == "gpt2" else "ForCausalLM")],
          "model_type": kind, "vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tie, "torch_dtype": "float32",
          "bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.pad_id}
    if cfg.scalar_head:
        hf |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "reward_mean": cfg.reward_mean}
    if kind == "gpt2":
        return hf | {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd, "n_inner": cfg.n_inner,
                     "n_positions": cfg.max_len, "activation_function": "gelu_new", "layer_norm_epsilon": cfg.norm_eps,
                     "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    scaling = {"rope_type": "llama3", **cfg.rope_scaling} if cfg.rope_scaling else None
    return hf | {"num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head, "hidden_size": cfg.n_embd,
                 "num_key_value_heads": cfg.n_kv_head, "head_dim": cfg.head_dim, "intermediate_size": cfg.n_inner,
                 "max_position_embeddings": cfg.max_len, "hidden_act": "silu", "rms_norm_eps": cfg.norm_eps,
                 "rope_theta": cfg.rope_theta, "rope_scaling": scaling, "attention_bias": kind == "qwen2"}


def weight_table(cfg):
    """Yields (our name, [(their name, their shape), ...], transposed): ours is theirs stacked along the rows."""
    C, V, N = cfg.n_embd, cfg.vocab_size, cfg.n_inner
    q, kv = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    if dialect(cfg) == "gpt2":   # its matrices are stored (in, out)
        yield "wte.weight", [("transformer.wte.weight", (V, C))], False
        yield "wpe.weight", [("transformer.wpe.weight", (cfg.max_len, C))], False
        for i in range(cfg.n_layer):
            for ours, theirs, rows, cols in (("attn.qkv", "attn.c_attn", 3 * C, C), ("attn.proj", "attn.c_proj", C, C),
                                             ("mlp.up", "mlp.c_fc", N, C), ("mlp.down", "mlp.c_proj", C, N)):
                yield f"h.{i}.{ours}.weight", [(f"transformer.h.{i}.{theirs}.weight", (cols, rows))], True
                yield f"h.{i}.{ours}.bias", [(f"transformer.h.{i}.{theirs}.bias", (rows,))], False
            for name in (f"h.{i}.ln_{k}.{x}" for k in (1, 2) for x in ("weight", "bias")):
                yield name, [("transformer." + name, (C,))], False
        yield "ln_f.weight", [("transformer.ln_f.weight", (C,))], False
        yield "ln_f.bias", [("transformer.ln_f.bias", (C,))], False
    else:
        yield "wte.weight", [("model.embed_tokens.weight", (V, C))], False
        for i in range(cfg.n_layer):
            h, m = f"h.{i}.", f"model.layers.{i}."
            qkv = [(f"{m}self_attn.{x}_proj.", n) for x, n in (("q", q), ("k", kv), ("v", kv))]
            yield h + "ln_1.weight", [(m + "input_layernorm.weight", (C,))], False
            yield h + "attn.qkv.weight", [(name + "weight", (n, C)) for name, n in qkv], False
            if cfg.qkv_bias:
                yield h + "attn.qkv.bias", [(name + "bias", (n,)) for name, n in qkv], False
            for x in ("q_norm", "k_norm") if cfg.qk_norm else ():
                yield f"{h}attn.{x}.weight", [(f"{m}self_attn.{x}.weight", (cfg.head_dim,))], False
            yield h + "attn.proj.weight", [(m + "self_attn.o_proj.weight", (C, q))], False
            yield h + "ln_2.weight", [(m + "post_attention_layernorm.weight", (C,))], False
            yield h + "mlp.up.weight", [(f"{m}mlp.{x}_proj.weight", (N, C)) for x in ("gate", "up")], False
            yield h + "mlp.down.weight", [(m + "mlp.down_proj.weight", (C, N))], False
        yield "ln_f.weight", [("model.norm.weight", (C,))], False
    if cfg.scalar_head:
        yield "score.weight", [("score.weight", (1, C))], False
    elif not cfg.tie:
        yield "lm_head.weight", [("lm_head.weight", (V, C))], False


def weights_from_hf(tensors, cfg, dtype=torch.float32):
    """Our state dict from Hugging Face names. A head that cfg has no use for is dropped; a `score` that the file does
    not have is left out, for the caller to initialise. Any other missing, extra or wrong-shaped tensor is an error."""
    prefix = "transformer." if dialect(cfg) == "gpt2" else "model."
    buffers = re.compile(r".*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")   # tables that old files carry along
    left = {name if name.startswith((prefix, "lm_head.", "score.")) else prefix + name: t
            for name, t in tensors.items() if not buffers.fullmatch(name)}
    ours = {}
    for name, theirs, flip in weight_table(cfg):
        if name == "score.weight" and name not in left:
            continue
        parts = []
        for key, shape in theirs:
            require(key in left, f"tensor {key!r} {shape} is missing")
            part = left.pop(key)
            require(tuple(part.shape) == shape and part.is_floating_point(),
                    f"tensor {key!r} is {part.dtype} {tuple(part.shape)}, expected floats {shape}")
            parts.append((part.T if flip else part).to(dtype))
        ours[name] = torch.cat(parts)
    for key, t in left.items():
        require(key in ("lm_head.weight", "score.weight"), f"tensor {key!r} {tuple(t.shape)} is not of this model")
    return ours


def weights_to_hf(state, cfg):
    """The inverse of weights_from_hf for a full state dict of GPT(cfg)."""
    theirs, table = {}, {name: rest for name, *rest in weight_table(cfg)}
    odd = sorted(state.keys() ^ table.keys())
    require(not odd, f"tensors missing, or not of this model: {', '.join(odd[:5])}")
    for name, (parts, flip) in table.items():
        t, rows = state[name].T if flip else state[name], [shape[0] for _, shape in parts]
        want = (sum(rows), *parts[0][1][1:])
        require(tuple(t.shape) == want, f"tensor {name!r} is {tuple(t.shape)}, expected {want}")
        theirs |= {key: piece for (key, _), piece in zip(parts, t.split(rows))}
    return theirs


# ---------------------------------------------------------------------------------------------------------------------
# Folders: fetch one from the hub, load one, save one.

def sync(path):
    """Wait until the disk has a file or a folder's list of names (Windows can do neither this way)."""
    if os.name != "nt":
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def download(url, path):
    """Fetch url to path, unless it is there. A broken transfer leaves PATH.part, which the next call continues; the
    file gets its name only when its size, and its SHA-256 where the server states it, are right. One process at a time.
    Raises OSError or http.client.HTTPException (network), CheckpointError (wrong content)."""
    part, noted = path.with_name(path.name + ".part"), {}
    if path.exists():
        return
    redirects = urllib.request.HTTPRedirectHandler()
    follow = redirects.redirect_request

    def note(req, fp, code, msg, headers, target):   # size and hash come with the hub's redirect, not with the file
        require(target.startswith(url.partition(":")[0]), f"{url}: redirected to {target}, which is not https")
        noted.update((k.lower(), v) for k, v in headers.items())
        return follow(req, fp, code, msg, headers, target)

    redirects.redirect_request = note
    start = max(part.stat().st_size - 1, 0) if part.exists() else 0   # one byte back: never an empty range
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=30)
    except urllib.error.HTTPError as e:
        if e.code != 416:   # 416: PATH.part is longer than the file
            raise
        part.unlink()
        return download(url, path)
    with response as r:
        etag = noted.get("x-linked-etag") or r.headers.get("x-linked-etag") or r.headers.get("etag") or ""
        size = noted.get("x-linked-size") or r.headers.get("x-linked-size") or ""
        want = re.fullmatch('"?([0-9a-f]{64})"?', etag)
        if r.status == 206 and not (want and r.headers.get("content-range", "").startswith(f"bytes {start}-")):
            part.unlink()      # without a hash two versions of a file could be mixed: start over
            return download(url, path)
        start = start if r.status == 206 else 0
        total = int(size) if size.isdecimal() else r.length and start + r.length   # None if nobody says
        sha = hashlib.sha256()
        with open(part, "r+b" if start else "wb") as f:
            while f.tell() < start:
                sha.update(f.read(min(1 << 20, start - f.tell())))
            while (block := r.read(1 << 20)) and f.tell() <= (total or math.inf):
                f.write(block)
                sha.update(block)
                print(f"\r{path.name}: {f.tell() / 1e6:.1f} of {(total or 0) / 1e6:.1f} MB", end="", file=sys.stderr)
            done = f.tell()
        print(file=sys.stderr)
    require(not total or done >= total, f"{url}: stopped at {done} of {total} bytes; run again to continue")
    if total and done != total or want and sha.hexdigest() != want[1]:
        part.unlink()
        raise CheckpointError(f"{url}: size or SHA-256 is not what the server announced; deleted, run again")
    sync(part)
    os.replace(part, path)


def fetch_hub(name):
    """Folder with config.json, tokenizer.json and the weights of a hub model such as 'gpt2' or
    'Qwen/Qwen2.5-0.5B-Instruct', downloaded where it is not complete. Environment: HF_ENDPOINT (default
    https://huggingface.co), NANORLHF_CACHE (default ~/.cache/nanorlhf). CheckpointError if it cannot be had."""
    require(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII) and ".." not in name,
            f"{name!r} is neither a folder nor the name of a hub model")
    folder = Path(os.environ.get("NANORLHF_CACHE") or Path.home() / ".cache" / "nanorlhf") / name.replace("/", "--")
    base = f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{name}/resolve/main/"
    one, index = "model.safetensors", "model.safetensors.index.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "tokenizer.json"):
            download(base + file, folder / file)
        try:
            if not (folder / index).exists():
                download(base + one, folder / one)
        except urllib.error.HTTPError as e:
            if e.code != 404:
                raise
            download(base + index, folder / index)   # a big model comes in shards
        for file in [] if (folder / one).exists() else sorted(set(read_index(folder / index).values())):
            download(base + file, folder / file)
    except (OSError, http.client.HTTPException) as e:
        why = {401: " (no such model, or its licence must be accepted)", 403: " (its licence must be accepted)",
               404: " (no such model, or none in safetensors format)"}.get(getattr(e, "code", None), "")
        raise CheckpointError(f"{name} is no folder here and cannot be fetched from {base}: {e}{why}. To do it by "
                              f"hand, put config.json, tokenizer.json and model.safetensors into {folder}") from None
    return folder


def load_weights(path_or_name, scalar_head=None, dtype=torch.float32):
    """(GPTConfig, state dict, Tokenizer) of a folder with config.json, model.safetensors and tokenizer.json, or else of
    a hub model. scalar_head: None as the checkpoint has it; True for a reward or value model (the state dict lacks
    score.weight if the checkpoint does); False for a language model. CheckpointError says what is wrong."""
    folder = Path(path_or_name)
    if not folder.is_dir():
        require(folder.parent == Path(".") or not folder.parent.is_dir(), f"{folder}: no such folder")
        folder = fetch_hub(str(path_or_name))
    finish_save(folder)
    cfg = config_from_hf(read_json(folder / "config.json"))
    if scalar_head is not None:
        cfg = replace(cfg, scalar_head=scalar_head)
    if (folder / "tokenizer.json").exists() or cfg.vocab_size != 50257:
        tok = tokenizer_from_json(folder / "tokenizer.json")
    else:
        tok = gpt2_tokenizer()
    require(tok.vocab_size <= cfg.vocab_size, f"{folder}: tokenizer.json has {tok.vocab_size} tokens, "
                                              f"config.json says {cfg.vocab_size}")
    try:
        return cfg, weights_from_hf(read_tensors(folder), cfg, dtype), tok
    except CheckpointError as e:
        raise e if str(folder) in str(e) else CheckpointError(f"{folder}: {e}") from None


def save_folder(folder, cfg, state, tok, extra_files={}):
    """Save a checkpoint in Hugging Face layout; all of it replaces the one before, or nothing does.

    Beside model.safetensors, tokenizer.json, tokenizer_config.json and config.json, extra_files {name: bytes, str, or a
    function that writes to the path it is given} become part of the same checkpoint; other files stay as they are.
    1. every file is written beside its place as .NAME.new and synced: the last good checkpoint is still untouched;
    2. the list of names is renamed to .commit and synced: from here on the new checkpoint counts;
    3. each .NAME.new is renamed into place, model.safetensors first, config.json last, and .commit is removed.
    A crash before 2 leaves the old checkpoint; after 2, the next finish_save (every load and save calls it) does 3."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    tok.raw = tok.raw or json.dumps(tokenizer_to_json(tok), ensure_ascii=False).encode()
    name_of = {i: name for name, i in tok.special.items()}
    tok_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name_of.get(tok.bos_id),
                  "eos_token": name_of[tok.eos_id], "pad_token": name_of.get(tok.pad_id),
                  "model_max_length": cfg.max_len, "clean_up_tokenization_spaces": False,
                  "chat_template": JINJA[tok.template]}
    weights = weights_to_hf(state, cfg)
    files = {"model.safetensors": lambda path: write_safetensors(path, weights), "tokenizer.json": tok.raw,
             "tokenizer_config.json": json.dumps(tok_config, indent=2), **extra_files,
             "config.json": json.dumps(config_to_hf(cfg, tok), indent=2)}
    plain_names(files, folder)
    try:
        for name, content in files.items():
            path = folder / f".{name}.new"
            if callable(content):
                content(path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(path)
        (folder / ".commit.new").write_text(json.dumps({"files": list(files)}))
        sync(folder / ".commit.new")
        sync(folder)
    except BaseException:
        for name in [*files, "commit"]:
            (folder / f".{name}.new").unlink(missing_ok=True)
        raise
    os.replace(folder / ".commit.new", folder / ".commit")
    sync(folder)
    finish_save(folder)


def finish_save(folder):
    """Complete a save that was cut off after it had been committed (see save_folder); else do nothing."""
    commit = Path(folder) / ".commit"
    if commit.exists():
        for name in plain_names(read_json(commit).get("files", []), commit):
            if (new := commit.with_name(f".{name}.new")).exists():
                os.replace(new, commit.with_name(name))
        sync(commit.parent)
        commit.unlink(missing_ok=True)
        sync(commit.parent)
