"""Checkpoints: folders that transformers opens too, in and out with torch, numpy and the standard library.

A folder holds config.json, model.safetensors and tokenizer.json, and of our own runs state.pt, to go on from.
"""
import functools
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data import InputError
from data.parallel import RANK, barrier, full_state
from data.files import CheckpointError, read_object, require
from data.files.hub import HUB_NAME, fetch_hub
from data.files.safetensors import INDEX, WEIGHTS, plain_names, read_tensors, sync, write_safetensors
from data.files.tokenizer import load_tokenizer, tokenizer_to_json
from model import GPT, GPTConfig


def load(path, device="cpu", head="none"):
    """(GPT, Tokenizer) of one of our folders, a Hugging Face folder or a hub name. head: "none" asks for a
    language model, "score" for a reward model with its trained head, "new" for a reward or value model, whose
    head is drawn if there is none. InputError: it is the other kind, or damaged, or cannot be had."""
    cfg, weights, tok, notes = load_weights(path, head)
    with torch.device("meta"):                        # shapes without memory, which the next line takes once
        model = GPT(cfg)
    model.to_empty(device="cpu").init_weights()
    model.load_state_dict(weights, strict=head != "new")
    model.reward_mean, model.process = notes["reward_mean"], notes["process"]
    model.read_before = notes["read_before"]
    return model.to(device), tok


def merged(state):
    """The state of a plain GPT, {name: tensor} in fp32, of one that may have LoRA's adapters: they are added
    into the weights they belong to (model.LoRA)."""
    out = {}
    for name, x in state.items():
        if name.endswith((".a.weight", ".b.weight")):
            continue
        x = x.float()
        if name.endswith(".linear.weight"):
            layer = name.removesuffix(".linear.weight")
            x = x + 2 * state[f"{layer}.b.weight"].float() @ state[f"{layer}.a.weight"].float()
        out[name.replace(".linear.", ".")] = x
    return out


def save(folder, model, tok, state=None):
    """Save model, tokenizer and the training state {name: tensors, numbers, strings, dicts}: all or nothing.
    Every process calls this; the first one writes."""
    weights = full_state(model)
    if RANK == 0:
        extra = {} if state is None else {"state.pt": functools.partial(write_state, state=state)}
        notes = {}
        if model.cfg.scalar_head:
            notes = {"reward_mean": model.reward_mean, "process": model.process}
            if model.read_before is not None:
                notes["pad_token_id"] = model.read_before
        save_folder(folder, model.cfg, merged(weights), tok, extra, notes)
    barrier()


def write_state(path, state):
    """torch.save to a file that Python opened, so that a full disk is an OSError and no error of torch."""
    with open(path, "wb") as f:
        torch.save(state, f)


def load_state(folder):
    """The training state beside a checkpoint, {} if there is none."""
    path = Path(folder) / "state.pt"
    if RANK == 0:
        finish_save(Path(folder))
    barrier()
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    except Exception as e:
        what = f"no training state of ours ({type(e).__name__})"
        raise InputError(f"{path}: {what}; begin anew with --overwrite") from None


# ------------------------------------------------------------------------------------------------------------
# A folder, read and written.

def find_folder(path):
    """The folder (Path) that a path or a hub name stands for, fetched if it must be."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    require(not folder.exists(), f"{folder}: a file; give the folder that it is in")
    if folder.parent == Path(".") or not folder.parent.is_dir():
        return fetch_hub(str(path))
    hub = HUB_NAME.fullmatch(str(path))
    beside = f" (to have the hub's model of that name, rename the folder {folder.parent})" if hub else ""
    raise CheckpointError(f"{folder}: no such folder{beside}")


def check_folder(folder):
    """CheckpointError if a folder lacks what `load` reads; says what it holds instead, and what to do."""
    names = {path.name for path in folder.iterdir()}
    weights = names & {WEIGHTS, INDEX}
    if "adapter_config.json" in names and not (weights and "config.json" in names):
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(f"{folder}: a LoRA adapter of {base} without that model; merge the two first "
                              "(peft: merge_and_unload) and save the whole")
    kinds = (".bin", ".pth", ".gguf", ".safetensors", ".h5", ".msgpack")
    others = [name for name in sorted(names) if name.endswith(kinds)]
    if others and not weights:
        raise CheckpointError(f"{folder}: has {others[0]} but no {WEIGHTS}, which transformers makes with "
                              "save_pretrained; pickled weights are never opened")
    require(weights, f"{folder}: has no {WEIGHTS}")
    require("config.json" in names, f"{folder}: has no config.json")


def load_weights(path, head=None):
    """(GPTConfig, state dict, Tokenizer, notes) of a folder or a hub model. notes: what config.json says
    beside the model's shape, see `notes_of`. head: as in `load`, or None for what the checkpoint has. With
    "new" the state dict lacks score.weight if the checkpoint does."""
    folder = find_folder(path)
    finish_save(folder)
    check_folder(folder)
    try:
        hf = read_object(folder / "config.json")
        cfg = config_from_hf(hf)
        if head == "none" and cfg.scalar_head:
            raise InputError(f"{folder} is a reward model; a language model is needed here")
        wanted = head != "score" or cfg.scalar_head
        require(wanted, f"{folder} is a language model; a reward model is needed here")
        if head == "new":
            cfg = replace(cfg, scalar_head=True)
        tok = load_tokenizer(folder, cfg.vocab_size)
        require(tok.vocab_size <= cfg.vocab_size,
                f"tokenizer.json has {tok.vocab_size} tokens, config.json says {cfg.vocab_size}")
        notes = notes_of(hf, tok)
        drawn = ["score.weight"] if head == "new" else []
        weights = weights_from_hf(read_tensors(folder), cfg, hf["model_type"], drawn)
        return replace(cfg, tie=cfg.tie and "lm_head.weight" not in weights), weights, tok, notes
    except CheckpointError as e:
        raise e if str(e).startswith(str(folder)) else CheckpointError(f"{folder}: {e}") from None


def save_folder(folder, cfg, state, tok, extra_files={}, notes={}):
    """Save a checkpoint in Hugging Face layout; all of it replaces the one before, or nothing does.

    Beside weights, tokenizer and config, extra_files {name: bytes, str, or a function that writes to the path
    it is given} become part of the same checkpoint; other files stay as they are. notes become fields of
    config.json.
    1. every file is written beside its place as .NAME.new and synced: the last good checkpoint is untouched;
    2. the list of names is renamed to .commit and synced: from here on the new checkpoint counts;
    3. each .NAME.new is renamed into place, the weights first, config.json last, and .commit is removed.
    A crash before 2 leaves the old checkpoint; after 2, the next load or save does 3 (finish_save)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    tok.raw = tok.raw or json.dumps(tokenizer_to_json(tok), ensure_ascii=False).encode()
    name_of = {i: name for name, i in tok.special.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": cfg.max_len,
                "clean_up_tokenization_spaces": False, "chat_template": tok.jinja()}
    for role, i in (("bos", tok.bos_id), ("eos", tok.eos_id), ("pad", tok.pad_id)):
        settings[f"{role}_token"] = name_of.get(i)    # None where it is an ordinary token, or none
    files = {WEIGHTS: functools.partial(write_safetensors, tensors=weights_to_hf(state, cfg)),
             "tokenizer.json": tok.raw, "tokenizer_config.json": json.dumps(settings, indent=2),
             "generation_config.json": json.dumps(ids_to_hf(tok), indent=2), **extra_files,
             "config.json": json.dumps(config_to_hf(cfg, tok) | notes, indent=2)}
    plain_names(files, folder)
    try:
        for name, content in files.items():           # step 1
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
    os.replace(folder / ".commit.new", folder / ".commit")        # step 2
    sync(folder)
    finish_save(folder)                               # step 3


def finish_save(folder):
    """Complete a save that was cut off after it had been committed (see save_folder); else do nothing."""
    commit = Path(folder) / ".commit"
    if commit.exists():
        for name in plain_names(read_object(commit).get("files", []), commit):
            new = commit.with_name(f".{name}.new")
            if new.exists():
                os.replace(new, commit.with_name(name))
        sync(commit.parent)
        commit.unlink(missing_ok=True)
        sync(commit.parent)


# ------------------------------------------------------------------------------------------------------------
# Model families: what a Hugging Face model type calls our fields and tensors, and how it departs from Llama.

LLAMA = {"norm": "rmsnorm", "pos": "rope", "mlp": "swiglu", "bias": False, "qkv_bias": False, "qk_norm": "",
         "post_norm": False}
LLAMA_FIELDS = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim", "n_embd": "hidden_size", "n_inner": "intermediate_size",
    "max_len": "max_position_embeddings", "norm_eps": "rms_norm_eps"}
# Ours is theirs, stacked along the rows where they have several. Within a layer they follow the name of "h".
LLAMA_NAMES = {
    "wte": "model.embed_tokens", "ln_f": "model.norm", "h": "model.layers",
    "ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
    "attn.proj": ["self_attn.o_proj"],
    "mlp.up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down": ["mlp.down_proj"]}
LLAMA_WRITES = {"hidden_act": "silu"}
GPT2_FIELDS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_inner": "n_inner",
               "max_len": "n_positions", "norm_eps": "layer_norm_epsilon"}
GPT2_NAMES = {
    "wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f", "h": "transformer.h",
    "ln_1": ["ln_1"], "ln_2": ["ln_2"], "attn.qkv": ["attn.c_attn"], "attn.proj": ["attn.c_proj"],
    "mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"]}
GPT2_WRITES = {"activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


@dataclass(frozen=True)
class Family:
    """A model type of Hugging Face."""
    name: str                                      # its classes are <name>ForCausalLM and so on
    shape: dict = field(default_factory=dict)      # fields of GPTConfig that are not Llama's
    names: dict = field(default_factory=dict)      # names of tensors that are not Llama's
    defaults: dict = field(default_factory=dict)   # of fields that its config.json may leave out
    fields: dict = field(default_factory=LLAMA_FIELDS.copy)     # our fields: their names in config.json
    writes: dict = field(default_factory=LLAMA_WRITES.copy)     # what its config.json says besides
    head: str = "ForCausalLM"                      # the end of the name of its language model
    tied: bool = False                             # whether the head is the embedding by default
    transposed: bool = False                       # whether matrices are stored as (in, out)


# By model_type. A new family is a row here and, where it computes something new, a field of GPTConfig and the
# lines of model.py that read it; OLMo-2 needed two such fields. Gemma needs more (embeddings scaled by
# sqrt(C), norms that multiply by 1 + weight, GeGLU, soft caps on logits, layers that see a window), and so do
# Phi-3 (whose tensors hold q, k, v and gate, up together) and mixtures of experts. Of two rows of one shape
# the first is the one that is saved: put yours below.
FAMILIES = {
    "llama": Family("Llama"),            # SmolLM2 and many others say that they are of this type
    "mistral": Family("Mistral"),        # the same numbers; saved as llama
    "qwen2": Family("Qwen2", {"qkv_bias": True}),
    "qwen3": Family("Qwen3", {"qk_norm": "head"}, defaults={"head_dim": 128}),
    "olmo2": Family("Olmo2", {"qk_norm": "all", "post_norm": True}, defaults={"norm_eps": 1e-5},
                    names={"ln_1": ["post_attention_layernorm"], "ln_2": ["post_feedforward_layernorm"]}),
    "gpt2": Family("GPT2", {"norm": "layernorm", "pos": "learned", "mlp": "gelu", "bias": True}, GPT2_NAMES,
                   {"max_len": 1024, "norm_eps": 1e-5}, GPT2_FIELDS, GPT2_WRITES, "LMHeadModel", tied=True,
                   transposed=True)}


def family_of(cfg):
    """The model type, as FAMILIES has it, that computes what cfg describes."""
    for kind, family in FAMILIES.items():
        shape = LLAMA | family.shape
        if all(getattr(cfg, name) == value for name, value in shape.items()):
            # GPT-2's config.json has no place for other heads.
            square = cfg.n_kv_head == cfg.n_head and cfg.n_head * cfg.head_dim == cfg.n_embd
            if square or "head_dim" in family.fields:
                return kind
    raise CheckpointError(f"no Hugging Face model type computes this combination: {cfg}")


# ------------------------------------------------------------------------------------------------------------
# config.json, both ways.

ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PLAIN = {   # fields that change what a model computes, and the values with which it is what GPT computes
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "hidden_act": ("silu",),
    "mlp_bias": (False,), "attention_bias": (False,), "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,), "quantization_config": ()}


def check(ok, what):
    """CheckpointError about config.json unless ok."""
    require(ok, f"config.json: {what}")


def is_number(x):
    """Whether a value of a config.json is a finite number."""
    return type(x) in (int, float) and abs(x) < 1e30


def positive(hf, key, default=0):
    """A positive number of a config.json, an int or a float like the default, which stands for null."""
    value = default if hf.get(key) is None else hf[key]
    ok = type(value) is type(default) and 0 < value < 2**31
    check(ok, f"{key} is {hf.get(key)!r}, not a positive {type(default).__name__}")
    return value


def config_from_hf(hf):
    """GPTConfig from the dict in a config.json. CheckpointError: a field would change the outputs in a way
    that this GPT does not implement."""
    kind = hf.get("model_type")
    known = isinstance(kind, str) and kind in FAMILIES
    check(known, f"model_type {kind!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    cfg = LLAMA | family.shape
    for key, values in PLAIN.items():
        if not (key == "attention_bias" and cfg["qkv_bias"]):     # old Qwen2 files say that they have biases
            check(hf.get(key) in (None, *values), f"{key} = {hf.get(key)!r} is not supported")
    cfg |= {"vocab_size": positive(hf, "vocab_size"),
            "tie": bool(hf.get("tie_word_embeddings", family.tied)),
            "scalar_head": is_reward_model(hf)}

    # The sizes. Most have no default: a file that leaves one out is damaged.
    C, H = positive(hf, family.fields["n_embd"]), positive(hf, family.fields["n_head"])
    cfg |= {"n_kv_head": H, "head_dim": C // H, "norm_eps": 1e-6} | family.defaults
    if "head_dim" not in family.fields:     # GPT-2
        check(C % H == 0, f"n_embd {C} is not a multiple of n_head {H}")
        cfg["n_inner"] = 4 * C
    for ours, theirs in family.fields.items():
        cfg[ours] = positive(hf, theirs, cfg.get(ours, 0))
    if cfg["pos"] == "rope":
        cfg["rope_theta"], cfg["rope_scaling"] = rotary_from_hf(hf)

    # Layers that look at a window only; Mistral's is 4096 where it does not say.
    layers, window = hf.get("layer_types") or [], hf.get("sliding_window", 4096)
    full = isinstance(layers, list) and set(map(str, layers)) <= {"full_attention"}
    if kind == "mistral" and window is not None:
        full = full and positive(hf, "sliding_window", 4096) >= cfg["max_len"]
    check(full, "sliding_window attention is not supported")
    return GPTConfig(**cfg)


def notes_of(hf, tok):
    """What config.json says of a reward model beside its shape: reward_mean, which we subtract from its
    scores, because the head has no bias to put it in; whether it scores steps (`process`); and read_before,
    an end token or None."""
    mean, process = hf.get("reward_mean", 0.0), hf.get("process", False)
    check(is_number(mean), f"reward_mean is {mean!r}, not a number")
    check(type(process) is bool, f"process is {process!r}, neither true nor false")
    # transformers reads a reward at the last token that is not padding. Where padding is an end token, as in
    # many models on the hub, that is the token before the end, and there the head has learned to be read.
    pad_id, read_before = hf.get("pad_token_id"), None
    if is_reward_model(hf) and type(pad_id) is int and pad_id in tok.eos_ids:
        read_before = pad_id
    return {"reward_mean": float(mean), "process": process, "read_before": read_before}


def is_reward_model(hf):
    """Whether the dict in a config.json is that of a model with a scalar head."""
    return "ForSequenceClassification" in str(hf.get("architectures"))


def rotary_from_hf(hf):
    """(theta, scaling) of the rotary positions: in one dict (new) or in rope_theta and rope_scaling (old)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    check(isinstance(rope, dict), f"rotary settings {rope!r} are not supported")
    rule = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", hf.get("rope_theta", 1e4))
    scaling = {key: rope.get(key) for key in ROPE_KEYS} if rule == "llama3" else {}
    known = rule in ("default", "llama3") and rope.get("partial_rotary_factor", 1.0) == 1.0
    check(known and all(is_number(x) and x > 0 for x in (theta, *scaling.values())),
          f"rotary settings {rope or theta!r} are not supported, only llama3 with {', '.join(ROPE_KEYS)}")
    return float(theta), scaling or None


def config_to_hf(cfg, tok):
    """The dict for config.json. A scalar head becomes ...ForSequenceClassification, whose one logit is our
    score plus reward_mean."""
    kind = family_of(cfg)
    family = FAMILIES[kind]
    head = "ForSequenceClassification" if cfg.scalar_head else family.head
    hf = {"architectures": [family.name + head], "model_type": kind, "vocab_size": cfg.vocab_size,
          "tie_word_embeddings": cfg.tie, "torch_dtype": "float32", **ids_to_hf(tok)}
    if cfg.scalar_head:
        hf |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    for ours, theirs in family.fields.items():
        hf[theirs] = getattr(cfg, ours)
    if cfg.pos == "rope":
        scaling = {"rope_type": "llama3", **cfg.rope_scaling} if cfg.rope_scaling else None
        hf |= {"rope_theta": cfg.rope_theta, "rope_scaling": scaling, "attention_bias": cfg.qkv_bias}
    return hf | family.writes


def ids_to_hf(tok):
    """The ids with which texts begin and end, for config.json and generation_config.json. Where the
    vocabulary has no padding token it is null: transformers would take real tokens of that id for padding."""
    ends = [tok.eos_id, *sorted(tok.eos_ids - {tok.eos_id})]
    pad_id = tok.pad_id if tok.pad_id in tok.special.values() else None
    return {"bos_token_id": tok.bos_id, "eos_token_id": ends if len(ends) > 1 else tok.eos_id,
            "pad_token_id": pad_id}


# ------------------------------------------------------------------------------------------------------------
# The weights, both ways.


def weight_table(cfg, kind):
    """Yields (our name, [(their name, their shape), ...], transposed) of each tensor of GPT(cfg), by the
    names of a model type."""
    family = FAMILIES[kind]
    names = LLAMA_NAMES | family.names
    q, kv = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    with torch.device("meta"):                        # one layer, as all are alike
        state = GPT(replace(cfg, n_layer=1)).state_dict()
    for name, t in state.items():
        part, kind = name.rsplit(".", 1)              # h.0.attn.qkv, weight
        if not part.startswith("h.0."):
            yield name, [(f"{names.get(part, part)}.{kind}", tuple(t.shape))], False     # part: a head
            continue
        part = part.removeprefix("h.0.")
        theirs = names[part]
        rows = [q, kv, kv] if len(theirs) == 3 else [len(t) // len(theirs)] * len(theirs)
        shapes = [tuple(piece.shape) for piece in t.split(rows)]
        flip = family.transposed and t.dim() == 2
        if flip:
            shapes = [tuple(t.T.shape)]
        for i in range(cfg.n_layer):
            full = [f"{names['h']}.{i}.{x}.{kind}" for x in theirs]
            yield f"h.{i}.{part}.{kind}", list(zip(full, shapes)), flip


def weights_from_hf(tensors, cfg, kind, drawn=()):
    """Our state dict from tensors by the names of a Hugging Face model type. A head that cfg has no use for
    is dropped; one of `drawn` that the file lacks is left out, for the caller to draw. CheckpointError: any
    other tensor is missing, extra or of another shape."""
    names = LLAMA_NAMES | FAMILIES[kind].names
    prefix = names["wte"].partition(".")[0] + "."     # which some files leave out
    buffers = re.compile(r".*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")   # tables in old files
    left = {}                                         # {full name: name in the file}
    for name in tensors:
        has_prefix = name.startswith((prefix, "lm_head.", "score."))
        if not buffers.fullmatch(name):
            left[name if has_prefix else prefix + name] = name

    # A head that differs from the embedding is kept, whatever the config says (transformers does the same).
    # One that a file has in place of the embedding is both.
    embedding = names["wte"] + ".weight"
    if cfg.tie and "lm_head.weight" in left:
        same = left.setdefault(embedding, "lm_head.weight")
        cfg = replace(cfg, tie=torch.equal(tensors[same].float(), tensors["lm_head.weight"].float()))
    ours = {}
    for name, theirs, flip in weight_table(cfg, kind):
        if name in drawn and name not in left:
            continue
        parts = []
        for full, shape in theirs:
            require(full in left, f"tensor {full!r} {shape} is missing")
            key = left.pop(full)
            t = tensors[key]
            require(tuple(t.shape) == shape and t.is_floating_point(),
                    f"tensor {key!r} is {t.dtype} {tuple(t.shape)}, expected floats {shape}")
            require(t.isfinite().all(), f"tensor {key!r} holds values that are not finite")
            parts.append((t.T if flip else t).float())
        ours[name] = torch.cat(parts)
    for key in left.values():
        spare = key in ("lm_head.weight", "score.weight")
        require(spare, f"tensor {key!r} {tuple(tensors[key].shape)} is not of this model")
    return ours


def weights_to_hf(state, cfg):
    """The inverse of weights_from_hf for a full state dict of GPT(cfg), by the names it is saved with."""
    theirs, table = {}, {}
    for name, *rest in weight_table(cfg, family_of(cfg)):     # rest: their names, transposed
        table[name] = rest
    odd = sorted(state.keys() ^ table.keys())
    require(not odd, f"tensors missing, or not of this model: {', '.join(odd[:5])}")
    for name, (parts, flip) in table.items():
        t = state[name].T if flip else state[name]
        rows = [shape[0] for _, shape in parts]
        want = (sum(rows), *parts[0][1][1:])
        require(tuple(t.shape) == want, f"tensor {name!r} is {tuple(t.shape)}, expected {want}")
        for (key, _), piece in zip(parts, t.split(rows)):
            theirs[key] = piece
    return theirs
