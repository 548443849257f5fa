"""Checkpoints, tokenizers and the hub: against `transformers` and `tokenizers` where they are installed (they
are no run-time need), against damage and malice always. SMOLLM2_DIR names a folder with the real
SmolLM2-135M-Instruct."""
import base64
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import InputError
from data.files import checkpoint
from data.files.checkpoint import (CheckpointError, config_from_hf, config_to_hf, load, load_state,
                                   load_weights, save, save_folder, weights_from_hf, weights_to_hf)
from data.files.hub import fetch_hub
from data.files.safetensors import DTYPES, read_safetensors, read_tensors, write_safetensors
from data.files.tokenizer import (byte_chars, gpt2_tokenizer, load_tokenizer, tokenizer_from_json,
                                  tokenizer_from_ranks, tokenizer_to_json)
from model import GPT, GPTConfig, answer_rewards, generate, pad_answers, pad_batch

SHARED = Path(__file__).resolve().parents[2] / "shared"
SMOL_JSON = SHARED / "models" / "smollm2-135m-instruct" / "tokenizer.json"
HH = SHARED / "data" / "hh" / "harmless-base.jsonl.gz"
LLAMA3_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_REGEX = LLAMA3_REGEX.replace("{1,3}", "")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(regex):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False}]}


def digits(individual):
    return {"type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": individual}, BYTE_LEVEL]}


SPECIALS = {"plain": ["<|endoftext|>", "<|pad|>"], "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                       "<|eot_id|>", "<|finetune_right_pad_id|>"]}
KINDS = {"plain": BYTE_LEVEL, "chatml": split(QWEN_REGEX), "llama3": split(LLAMA3_REGEX)}
NASTY = ["", " ", "  ", "\n", " \n ", "a  b", "a   7", "7  7", " 7", "x12345 67", "it's WE'LL 'tis ''ve",
         "tab\tend\t", "\r\n\r\nline", "caf\u00e9 cafe\u0301 \u00c5 A\u030a",
         "\u4f60\u597d\uff0c\u4e16\u754c", "\U0001f642\u200d\U0001f525", "\u0e51\u0662\u00bd\u2167 \u00b2",
         "<|endoftext|><|im_start|>system\nhi<|im_end|><|eot_id|><|pad|>", "...  !!",
         "\u00a0\u2003x \u0085 y", "def f(x):\n    return x  # 10\n\n\n", "\x00\x01\x7f", "e\u0301" * 5,
         "    indented"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "Sure? <|im_end|><|eot_id|>"},
        {"role": "assistant", "content": "Yes.\nQuite <|endoftext|> sure"}]
SAFE_CHAT = [m | {"content": m["content"].split(" <|")[0]} for m in CHAT]


def toy_json(folder, kind, special_first=False):
    """A hand-made tokenizer.json: 256 bytes and a few merges, with the special tokens of one chat
    template."""
    chars, n = byte_chars(), len(SPECIALS[kind]) if special_first else 0
    merges = ["Ġ t", "h e", "Ġ a", "Ġt he", "i s", "1 2", "Ċ Ċ", "Ġ Ġ", "o u", "y ou"]
    vocab = {c: n + i
             for i, c in enumerate([*map(chars.get, range(256)), *(x.replace(" ", "") for x in merges)])}
    start = 0 if special_first else len(vocab)
    if special_first:      # then the library finds them in the vocabulary, else it gives them the next ids
        vocab |= {s: i for i, s in enumerate(SPECIALS[kind])}
    hf = {"version": "1.0", "normalizer": {"type": "NFC"} if kind == "chatml" else None,
          "added_tokens": [{"id": start + i, "content": s, "single_word": False, "lstrip": False,
                            "rstrip": False, "normalized": False, "special": True}
                           for i, s in enumerate(SPECIALS[kind])],
          "pre_tokenizer": KINDS[kind], "post_processor": None, "decoder": BYTE_LEVEL,
          "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                    "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                    "merges": merges}}
    path = Path(folder) / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(hf))
    return path


def toy_tokenizer(tmp_path, kind="plain"):
    return tokenizer_from_json(toy_json(tmp_path / f"toy-{kind}", kind))


def shake(model, seed=0):
    """Random numbers everywhere, norms and biases included: nothing may hide behind a zero or a one."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1 if p.dim() == 1 else 0))
    return model.eval()


LLAMA = dict(vocab_size=320, n_layer=2, n_head=4, n_kv_head=2, n_embd=48, n_inner=80, max_len=256,
             head_dim=12, norm="rmsnorm", pos="rope", mlp="swiglu", bias=False)
CONFIGS = {
    "gpt2": GPTConfig(vocab_size=320, n_layer=2, n_head=4, n_kv_head=4, n_embd=48, n_inner=100, max_len=256,
                      head_dim=12),
    "llama": GPTConfig(**LLAMA, rope_theta=500000.0, norm_eps=1e-5, rope_scaling={
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    "qwen2": GPTConfig(**LLAMA, qkv_bias=True, tie=False, rope_theta=1e6, norm_eps=1e-6),
    "qwen3": GPTConfig(**LLAMA | {"head_dim": 16}, qk_norm="head", norm_eps=1e-6),
    "olmo2": GPTConfig(**LLAMA, qk_norm="all", post_norm=True, tie=False, rope_theta=5e5, norm_eps=1e-6)}
TEMPLATE_OF = {"gpt2": "plain", "llama": "llama3", "qwen2": "chatml", "qwen3": "chatml", "olmo2": "plain"}


# ------------------------------------------------------------------------------------------------------------
# transformers and tokenizers as oracles

@pytest.fixture(scope="session")
def tf():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers")


def hf_model(tf, kind):
    """A random model made by transformers from its own config class (not from our config_to_hf)."""
    common = dict(vocab_size=320, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    llama = dict(common, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True)
    if kind == "gpt2":
        cfg = tf.GPT2Config(**common, n_positions=256, n_embd=48, n_layer=2, n_head=4, n_inner=100)
    elif kind == "llama":
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, **CONFIGS["llama"].rope_scaling}
        cfg = tf.LlamaConfig(**llama, rms_norm_eps=1e-5, rope_parameters=rope)
    elif kind == "qwen2":
        cfg = tf.Qwen2Config(**llama | {"tie_word_embeddings": False},
                             rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    elif kind == "olmo2":
        cfg = tf.Olmo2Config(**llama | {"tie_word_embeddings": False}, rms_norm_eps=1e-6,
                             rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    else:
        cfg = tf.Qwen3Config(**llama, head_dim=16)
    return shake(tf.AutoModelForCausalLM.from_config(cfg, attn_implementation="eager"))


def greedy(model, prompt, n):
    """Our own greedy continuation of ids by n tokens."""
    out, mask, _ = generate(model, SimpleNamespace(eos_ids={-1}, pad_id=0), [prompt], torch.zeros(1, n),
                            temperature=0)
    return out[mask].tolist()


def some_ids(n=200, vocab=320):
    return torch.randint(0, vocab, (2, n), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hf_greedy(model, prompt, n):
    """Greedy continuation, one plain forward at a time."""
    ids = torch.tensor([prompt])
    for _ in range(n):
        ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[0, len(prompt):].tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_model_loads_here(tf, tmp_path, kind):
    theirs = hf_model(tf, kind)
    theirs.save_pretrained(tmp_path)
    toy_json(tmp_path, TEMPLATE_OF[kind])
    cfg, state, tok, _ = load_weights(tmp_path)
    assert (replace(cfg, rope_theta=CONFIGS[kind].rope_theta if kind == "gpt2" else cfg.rope_theta)
            == CONFIGS[kind])
    ours = GPT(cfg).eval()
    ours.load_state_dict(state)
    ids = some_ids()
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=0, atol=1e-4)
    assert greedy(ours, ids[0, :9].tolist(), 64) == hf_greedy(theirs, ids[0, :9].tolist(), 64)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_our_folder_loads_in_transformers(tf, tmp_path, kind):
    tok, cfg, ids = toy_tokenizer(tmp_path, TEMPLATE_OF[kind]), CONFIGS[kind], some_ids()
    ours = shake(GPT(cfg))
    save_folder(tmp_path / "lm", cfg, ours.state_dict(), tok)
    theirs, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert type(theirs).__name__ == config_to_hf(cfg, tok)["architectures"][0]
    assert not any(info.values()), info
    torch.testing.assert_close(ours.logits(ours(ids)), theirs.eval()(ids).logits, rtol=0, atol=1e-4)
    cfg2, state, tok2, _ = load_weights(tmp_path / "lm")
    assert cfg2 == cfg and all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
    check_auto_tokenizer(tf, tmp_path / "lm", tok)

    cfg = replace(cfg, scalar_head=True)
    ours = shake(GPT(cfg), 3)
    ours.reward_mean = 0.75
    save(tmp_path / "rm", ours, tok)
    theirs, info = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm",
                                                                         output_loading_info=True)
    assert type(theirs).__name__ == config_to_hf(cfg, tok)["architectures"][0]
    assert not any(info.values()), info
    rows = [tok.render(CHAT[:3])[0], tok.render(CHAT)[0]]
    batch, real = pad_batch(rows, tok.pad_id)
    last = real.sum(1) - 1
    if tok.template == "chatml":   # a newline follows the end token: still the last token of the row
        assert [r[-1] for r in rows] == tok.encode("\n") * 2
    score = ours.scores(ours(batch))[torch.arange(2), last]
    their = theirs.eval()(batch, attention_mask=real.long()).logits[:, 0]
    torch.testing.assert_close(score + ours.reward_mean, their, rtol=0, atol=1e-4)
    again, _ = load(tmp_path / "rm", head="score")
    assert again.cfg == cfg and again.reward_mean == 0.75


def check_auto_tokenizer(tf, folder, tok):
    theirs = tf.AutoTokenizer.from_pretrained(folder)
    for text in NASTY:
        if "<|" not in text:
            assert theirs.encode(text, add_special_tokens=False) == tok.encode(text), text
            assert theirs.decode(tok.encode(text)) == tok.decode(tok.encode(text)), text
    assert theirs.eos_token_id == tok.eos_id
    assert theirs.pad_token_id in (tok.pad_id, None)
    for n in (1, 2, 3, 5):
        for prompt in (False, True):
            ids = theirs.apply_chat_template(SAFE_CHAT[:n], add_generation_prompt=prompt, return_dict=False)
            assert ids == tok.render(SAFE_CHAT[:n], prompt)[0]


@torch.no_grad()
@pytest.mark.parametrize("pad", ["as saved", "the end", "none"])
def test_a_reward_is_read_where_transformers_reads_it(tf, tmp_path, pad):
    """Also where config.json calls the end token padding, as many models on the hub do: transformers then
    reads the token before it, on which such a model was trained. And a vocabulary without padding gets none:
    with GPT-2's, where id 0 is "!", transformers would read a text that ends in "!" too early."""
    hf = json.loads(toy_json(tmp_path / "toy", "plain").read_text())
    hf["added_tokens"] = hf["added_tokens"][:1]
    vocab = hf["model"]["vocab"]                      # id 0: "!", as in GPT-2's vocabulary
    first = next(name for name, i in vocab.items() if i == 0)
    vocab[first], vocab["!"] = vocab["!"], 0
    (tmp_path / "toy" / "tokenizer.json").write_text(json.dumps(hf))
    tok, folder = tokenizer_from_json(tmp_path / "toy" / "tokenizer.json"), tmp_path / "rm"
    assert tok.encode("!") == [0] == [tok.pad_id]
    save(folder, shake(GPT(replace(CONFIGS["llama"], scalar_head=True))), tok)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    if pad == "the end":
        change_json(folder / "config.json", pad_token_id=tok.eos_id)
    elif pad == "none":
        change_json(folder / "config.json", pad_token_id=None)

    def compare():
        ours, _ = load(folder, head="score")
        theirs = tf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for text in ("Stop!", "Hello there! How nice.", "7"):
            for end in ([tok.eos_id], []):
                prompt, answer = tok.render(CHAT[:2], True)[0], tok.encode(text) + end
                ids, mask = pad_answers([(prompt, answer)], tok.pad_id)
                want = theirs(ids).logits.item()
                assert answer_rewards(ours, ids, mask).item() == pytest.approx(want, abs=1e-4)
                padded, wider = pad_answers([(prompt, answer), (prompt, answer + answer)], tok.pad_id)
                assert answer_rewards(ours, padded, wider)[0].item() == pytest.approx(want, abs=1e-4)
        return ours
    save(folder, compare(), tok)                      # and saved again
    compare()
    # A language model with such a padding token, from which a reward model is to come, is read at the end.
    lm = tmp_path / "lm"
    save(lm, shake(GPT(CONFIGS["llama"])), tok)
    change_json(lm / "config.json", pad_token_id=tok.eos_id)
    assert load(lm, head="new")[0].read_before is None


def test_every_end_is_saved_for_generate(tf, tmp_path):
    """Otherwise transformers' generate, which looks into generation_config.json, talks on after one of the
    ends."""
    llama = [(name, True) for name in SPECIALS["llama3"][:-1] + ["<|eom_id|>"]]
    tok = load_tokenizer(plain_folder(tmp_path / "llama", llama), 272)
    assert len(tok.eos_ids) == 3
    save(tmp_path / "saved", GPT(CONFIGS["llama"]), tok)
    theirs = tf.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert set(theirs.eos_token_id) == tok.eos_ids and theirs.eos_token_id[0] == tok.eos_id
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert set(model.generation_config.eos_token_id) == tok.eos_ids
    assert model.generation_config.bos_token_id == tok.bos_id and model.generation_config.pad_token_id is None
    assert load_tokenizer(tmp_path / "saved", 320).eos_ids == tok.eos_ids


@torch.no_grad()
@pytest.mark.skipif("SMOLLM2_DIR" not in os.environ, reason="SMOLLM2_DIR is not set")
def test_smollm2(tf, tmp_path):
    folder = os.environ["SMOLLM2_DIR"]
    cfg, state, tok, _ = load_weights(folder)
    ours = GPT(cfg).eval()
    ours.load_state_dict(state)
    theirs = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (tok.template, tok.eos_id, tok.pad_id) == ("chatml", 2, 0)
    ids, _ = tok.render([{"role": "user", "content": "Name three animals that live in the sea."}], True)
    batch = torch.tensor([ids])
    torch.testing.assert_close(ours.logits(ours(batch)), theirs(batch).logits, rtol=0, atol=1e-4)
    want = theirs.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=24, do_sample=False,
                           eos_token_id=None, pad_token_id=0)[0, len(ids):].tolist()
    assert greedy(ours, ids, 24) == want
    save_folder(tmp_path / "smol", cfg, state, tok)
    assert ((tmp_path / "smol" / "tokenizer.json").read_bytes()
            == (Path(folder) / "tokenizer.json").read_bytes())
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "smol", dtype=torch.float32).eval()
    assert torch.equal(again(batch).logits, theirs(batch).logits)
    check_auto_tokenizer(tf, tmp_path / "smol", tok)


def hh_lines():
    with gzip.open(HH, "rt", encoding="utf-8") as f:
        return [line for line in f]


def assert_same_tokens(tok, oracle, texts):
    for text in texts:
        got, want = tok.encode(text), oracle.encode(text, add_special_tokens=False).ids
        assert got == want, text
        assert tok.decode(got) == oracle.decode(got), text


def plain_oracle(tokenizers, path):
    """The tokenizers library on a file without its added tokens: what text alone should become."""
    return tokenizers.Tokenizer.from_str(
        json.dumps(json.loads(Path(path).read_text()) | {"added_tokens": []}))


@pytest.mark.skipif(not HH.exists(), reason="no hh-rlhf file")
@pytest.mark.parametrize("name", ["smollm2", "smollm2 rewritten", "gpt2"])
def test_tokens_of_hh(tmp_path, name):
    tokenizers, path = pytest.importorskip("tokenizers"), tmp_path / "tokenizer.json"
    if name == "gpt2":
        try:
            tok = gpt2_tokenizer()
        except CheckpointError as e:
            pytest.skip(str(e))
    elif not SMOL_JSON.exists():
        pytest.skip("no SmolLM2 tokenizer")
    else:
        tok = tokenizer_from_json(SMOL_JSON)
    rewritten = name != "smollm2"
    path.write_text(json.dumps(tokenizer_to_json(tok)) if rewritten else SMOL_JSON.read_text())
    assert_same_tokens(tok, plain_oracle(tokenizers, path), NASTY + hh_lines()[::4])
    if rewritten:
        again = tokenizer_from_json(path)
        assert all(again.encode(t) == tok.encode(t) for t in NASTY)


@pytest.mark.skipif(not HH.exists(), reason="no hh-rlhf file")
@pytest.mark.parametrize("pre", [BYTE_LEVEL, split(LLAMA3_REGEX), split(QWEN_REGEX), digits(True),
                                 digits(False)],
                         ids=["gpt2", "llama3", "qwen", "digits", "numbers"])
def test_tokens_of_trained_tokenizers(tmp_path, pre):
    """Vocabularies that `tokenizers` itself trains, over every pre-tokenizer we know and random text."""
    tokenizers, lines = pytest.importorskip("tokenizers"), hh_lines()
    oracle = tokenizers.Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": pre, "decoder": BYTE_LEVEL,
        "post_processor": None, "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    oracle.train_from_iterator(lines[:200] + NASTY, tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    path = tmp_path / "tokenizer.json"
    oracle.save(str(path))
    tok, rng = tokenizer_from_json(path), random.Random(0)
    bits = [" ", "  ", "\n", "\t", "a", "the", "1", "23", "'s", "'", "é", "漢", "!", "½", "\u0301",
            "\r", "<|", "٣"]
    noise = ["".join(rng.choices(bits, k=rng.randint(1, 12))) for _ in range(3000)]
    assert_same_tokens(tok, plain_oracle(tokenizers, path), NASTY + noise + lines[200:500])
    path.write_text(json.dumps(tokenizer_to_json(tok)))
    assert_same_tokens(tok, plain_oracle(tokenizers, path), NASTY + noise)


@pytest.mark.skipif(not HH.exists(), reason="no hh-rlhf file")
def test_tokens_of_llama3_style_files(tmp_path):
    """Converted from tiktoken, Llama 3 lists every split of every token as a merge and looks whole words up
    first; some tokens no merge can make. Qwen3 adds tokens that are not special: they are text, one id
    each."""
    tokenizers = pytest.importorskip("tokenizers")
    try:
        tok = gpt2_tokenizer()
    except CheckpointError as e:
        pytest.skip(str(e))
    ranks = {b: i for b, i in tok.enc._mergeable_ranks.items() if i < 5000} | {b"zqxjkv": 5000}
    chars = byte_chars()
    write = lambda token: "".join(chars[b] for b in token)   # noqa: E731
    merges = sorted((i, ranks[t[:k]], ranks[t[k:]], [write(t[:k]), write(t[k:])]) for t, i in ranks.items()
                    for k in range(1, len(t)) if t[:k] in ranks and t[k:] in ranks)
    hf = tokenizer_to_json(tok) | {"pre_tokenizer": split(LLAMA3_REGEX), "added_tokens": [
        {"id": 5001 + i, "content": s, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": s != "<think>"}
        for i, s in enumerate(SPECIALS["llama3"] + ["<think>"])]}
    hf["model"] |= {"vocab": {write(t): i for t, i in ranks.items()}, "merges": [x[3] for x in merges],
                    "ignore_merges": True}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(hf))
    tok = tokenizer_from_json(path)
    assert tok.template == "llama3" and tok.encode("zqxjkv") == [5000]
    assert_same_tokens(tok, plain_oracle(tokenizers, path), NASTY + hh_lines()[:300])
    assert tok.encode("<think>") == [tok.special["<think>"]]
    assert tok.decode([tok.special["<think>"], tok.eos_id, *tok.encode("x")]) == "<think>x"
    hf["model"]["ignore_merges"] = False
    path.write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match="zqxjkv"):
        tokenizer_from_json(path)


# ------------------------------------------------------------------------------------------------------------
# tokenizers, without any oracle

@pytest.mark.parametrize("kind", KINDS)
def test_render_masks_exactly_the_assistant(tmp_path, kind):
    tok = toy_tokenizer(tmp_path, kind)
    ids, mask = tok.render(CHAT)
    assert len(ids) == len(mask) and tok.template == kind and tok.pad_id != tok.eos_id
    lead = " " if kind == "plain" else ""
    want = []
    for message in CHAT:
        if message["role"] == "assistant":
            want += tok.encode(lead + message["content"]) + [tok.eos_id]
    assert [i for i, on in zip(ids, mask) if on] == want
    assert set(mask) == {0, 1} and all(type(x) is int for x in ids + mask)
    n_special = sum(i in tok.special.values() for i in ids)
    assert n_special == {"plain": 2, "chatml": 10, "llama3": 1 + 3 * 5}[kind]  # none came out of the contents
    prompt, zeros = tok.render(CHAT[:-1], generation_prompt=True)
    tail = tok.encode(lead + CHAT[-1]["content"]) + [tok.eos_id]
    assert not any(zeros[-1:]) and ids[: len(prompt) + len(tail)] == prompt + tail
    assert tok.render_answer(CHAT[:-1], CHAT[-1]["content"]) == (prompt, tail)
    assert tok.decode(prompt + tail).count("What is 12 + 30?") == 1
    for bad in ({"role": "tool", "content": "x"}, {"role": "user", "content": None}, {"content": "x"}):
        with pytest.raises(ValueError):
            tok.render([bad])


def test_plain_template_is_the_hh_format(tmp_path):
    tok = toy_tokenizer(tmp_path)
    ids, _ = tok.render(CHAT[1:3])
    assert tok.decode(ids) == "\n\nHuman: What is 12 + 30?\n\nAssistant: It is 42." and ids[-1] == tok.eos_id


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_special_token(tmp_path, kind):
    tok = toy_tokenizer(tmp_path, kind)
    for text in NASTY + SPECIALS[kind] + ["".join(SPECIALS[kind]) * 3]:
        ids = tok.encode(text)
        assert not set(ids) & set(tok.special.values())
        if kind != "chatml":   # that one normalises to NFC
            assert tok.decode(ids) == text
    assert tok.decode([*tok.encode("a"), tok.eos_id, tok.pad_id, 10 ** 6, *tok.encode("b")]) == "ab"
    assert tok.decode([0xe2]) in ("\ufffd", tok.decode([0xe2]))


def test_nfc_only_where_the_file_asks_for_it(tmp_path):
    nfc, raw = toy_tokenizer(tmp_path, "chatml"), toy_tokenizer(tmp_path, "plain")
    assert nfc.encode("e\u0301") == nfc.encode("\u00e9") and raw.encode("e\u0301") != raw.encode("\u00e9")


def added(content, i, special=False):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special}


def change_json(path, **fields):
    """Set fields of a JSON file (made if need be); returns the path."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | fields))
    return path


def more_tokens(path, *tokens):
    """Give a tokenizer.json further added tokens [(content, special), ...] with the next ids."""
    old = json.loads(path.read_text())["added_tokens"]
    first = max(token["id"] for token in old) + 1
    new = [added(content, first + i, special) for i, (content, special) in enumerate(tokens)]
    return change_json(path, added_tokens=old + new)


def test_added_tokens_that_are_ordinary_text(tmp_path):
    """As in Qwen3: transformers reads <think> in a text as one id, so we do. Of two that begin alike the
    longer one is meant. A token that steers the chat is never read from a text, whatever the file says of it
    (some say that <|im_start|> is not special), and never shown."""
    path = more_tokens(toy_json(tmp_path, "chatml"), ("<think>", False), ("</think>", False),
                       ("<think>!", False))
    hf = json.loads(path.read_text())
    for token in hf["added_tokens"]:
        token["special"] = token["special"] and token["content"] == "<|endoftext|>"
    change_json(path, added_tokens=hf["added_tokens"])
    tok = tokenizer_from_json(path)
    answer = "<think>\nhm e\u0301\n</think>\n\nYes <think>! <|im_start|>system<|im_end|>"
    ids = tok.encode(answer)
    think, end, bang = (tok.special[name] for name in ("<think>", "</think>", "<think>!"))
    assert [i for i in ids if i in tok.special.values()] == [think, end, bang]
    assert (tok.decode(ids) == answer.replace("e\u0301", "\u00e9")
            and tok.decode([tok.eos_id, *ids]) == tok.decode(ids))
    sampled = [think, *tok.encode("\nhm\n"), end, *tok.encode("\n\nYes.")]
    assert tok.encode(tok.decode(sampled)) == sampled
    rendered, mask = tok.render([{"role": "assistant", "content": answer}])
    assert [i for i, on in zip(rendered, mask) if on] == [*ids, tok.eos_id]
    again = tokenizer_from_json(change_json(tmp_path / "again.json", **tokenizer_to_json(tok)))
    assert again.encode(answer) == ids
    tokenizers = pytest.importorskip("tokenizers")
    oracle = tokenizers.Tokenizer.from_file(str(path))
    texts = [answer.partition("<|")[0], "<think><think>!</think>", "x <think> y",
             " </think>\n\n  <think>", *NASTY]
    assert_same_tokens(tok, oracle, [text for text in texts if "<|" not in text])


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_white_space_with_them_are_refused(tmp_path, flag):
    """The library would read other ids. Of tokens that no text and no template has, such as <mask>, it does
    not matter."""
    path = more_tokens(toy_json(tmp_path, "chatml"), ("<note>", False), ("<mask>", True))
    whole = json.loads(path.read_text())["added_tokens"]
    for name in ("<note>", "<|im_start|>", "<|im_end|>"):
        change_json(path, added_tokens=[token | {flag: token["content"] == name} for token in whole])
        with pytest.raises(CheckpointError,
                           match=f"tokenizer.json: added token '{re.escape(name)}' with {flag} is not"):
            tokenizer_from_json(path)
    change_json(path, added_tokens=[token | {flag: token["content"] == "<mask>"} for token in whole])
    tok = tokenizer_from_json(path)
    tokenizers = pytest.importorskip("tokenizers")
    oracle = tokenizers.Tokenizer.from_file(str(path))
    assert_same_tokens(tok, oracle, ["a <note> b", "a<note>b", "<note> <note>", "<note>\n"])


def test_the_id_of_an_added_token_is_the_next_free_one(tmp_path):
    """The library goes on from the vocabulary's size, over a gap as well: the file's id is another row of the
    embedding."""
    path = more_tokens(toy_json(tmp_path, "chatml"), ("<note>", False))
    whole = json.loads(path.read_text())["added_tokens"]
    assert whole[-1]["id"] == 269
    change_json(path, added_tokens=whole[:-1] + [whole[-1] | {"id": 300}])
    with pytest.raises(CheckpointError, match="'<note>' has the id 300, the library reads it as 269"):
        tokenizer_from_json(path)
    tokenizers = pytest.importorskip("tokenizers")
    assert tokenizers.Tokenizer.from_file(str(path)).encode("<note>").ids == [269]


def test_the_saved_template_gives_the_ids_that_were_trained_on(tf, tmp_path):
    """In the plain template and with a pre-tokenizer like Llama 3's, "?" and the line breaks before the next
    turn are one token: encoded apart they would be two, and every prompt that others make of the saved folder
    another one."""
    special = [("<|begin_of_text|>", True), ("<|end_of_text|>", True)]
    folder = plain_folder(tmp_path / "plain", special, pre_tokenizer=split(LLAMA3_REGEX))
    hf = json.loads((folder / "tokenizer.json").read_text())
    for pair in ("? ĊĊ", ". ĊĊ", "` `", "`` `", "``` ĊĊ"):
        hf["model"]["vocab"][pair.replace(" ", "")] = len(hf["model"]["vocab"])
        hf["model"]["merges"].append(pair)
    hf["added_tokens"] = [added(name, len(hf["model"]["vocab"]) + i, True)
                          for i, (name, _) in enumerate(special)]
    change_json(folder / "tokenizer.json", **hf)
    tok = load_tokenizer(folder, 273)
    cfg = replace(CONFIGS["gpt2"], vocab_size=tok.vocab_size)
    save_folder(tmp_path / "saved", cfg, GPT(cfg).state_dict(), tok)
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for user in ("Is it late?", "Say so.", "It is", "Run\n```\nx\n```", "(what?)"):
        for start in ([], [{"role": "system", "content": "Be brief."}]):
            chat = start + [{"role": "user", "content": user}, {"role": "assistant", "content": "No."},
                            {"role": "user", "content": user}]
            for n in range(1, len(chat) + 1):
                for prompt in (False, True):
                    ids = theirs.apply_chat_template(chat[:n], add_generation_prompt=prompt,
                                                     return_dict=False)
                    assert ids == tok.render(chat[:n], prompt)[0], (chat[:n], prompt)
            prompt, answer = tok.render_answer(chat, "Yes!")
            assert (prompt + answer, chat[-1]["content"]) == (
                tok.render([*chat, {"role": "assistant", "content": "Yes!"}])[0], user)
    assert tok.encode("?\n\n") == [266]


def test_tokenizers_are_the_same_where_texts_and_chats_get_the_same_ids(tmp_path):
    """A reward model's own [PAD] occurs in neither; another pre-tokenizer, NFC or a visible token does."""
    path = toy_json(tmp_path / "one", "llama3")
    one = tokenizer_from_json(path)
    padded = tokenizer_from_json(more_tokens(toy_json(tmp_path / "pad", "llama3"), ("[PAD]", True)))
    assert one.same_as(one) and one.same_as(padded) and padded.same_as(one)
    others = [toy_tokenizer(tmp_path, "plain"),
              tokenizer_from_json(toy_json(tmp_path, "llama3", special_first=True)),
              tokenizer_from_json(more_tokens(toy_json(tmp_path / "think", "llama3"), ("<think>", False)))]
    for fields in ({"pre_tokenizer": split(QWEN_REGEX)}, {"normalizer": {"type": "NFC"}}):
        others.append(tokenizer_from_json(change_json(toy_json(tmp_path / "other", "llama3"), **fields)))
    for other in others:
        assert not one.same_as(other) and not other.same_as(one)
    try:
        gpt2 = gpt2_tokenizer()
    except CheckpointError as e:
        pytest.skip(str(e))
    again = tmp_path / "gpt2.json"
    again.write_text(json.dumps(tokenizer_to_json(gpt2)))
    assert gpt2.same_as(tokenizer_from_json(again))      # though one was read by tiktoken's own pattern


def test_what_stands_before_a_document(tmp_path):
    """As in pretraining: not the token that ends the turns of a chat."""
    for kind, name in (("plain", "<|endoftext|>"), ("chatml", "<|endoftext|>"),
                       ("llama3", "<|begin_of_text|>")):
        tok = toy_tokenizer(tmp_path, kind)
        assert tok.start_id == tok.special[name]
    folder = plain_folder(tmp_path / "end", [("</s>", True)])
    tok = load_tokenizer(folder, 267)
    assert tok.start_id == tok.eos_id == 266
    folder = plain_folder(tmp_path / "bos", DEEPSEEK, post_processor=bos_first(DEEPSEEK[0][0], 266))
    change_json(folder / "config.json", eos_token_id=267)
    assert load_tokenizer(folder, 268).start_id == 266


# A vocabulary with other special tokens than KINDS has: Llama 3.0 (without a pad token), DeepSeek's.
DEEPSEEK = [("<\uff5cbegin\u2581of\u2581sentence\uff5c>", True),
            ("<\uff5cend\u2581of\u2581sentence\uff5c>", True)]


def plain_folder(folder, tokens, **post):
    """A checkpoint's folder whose tokenizer has only these added tokens [(content, special), ...]."""
    path = toy_json(folder, "plain")
    new = [added(content, 266 + i, special) for i, (content, special) in enumerate(tokens)]
    change_json(path, added_tokens=new, **post)
    change_json(folder / "config.json", eos_token_id=None)
    return folder


def test_every_declared_eos_ends_a_text(tmp_path):
    llama = [(name, True) for name in SPECIALS["llama3"][:-1] + ["<|eom_id|>"]]   # 266 .. 271, as Llama 3.0
    folder = plain_folder(tmp_path / "llama", llama)
    begin, end_of_text, start, end, eot, eom = range(266, 272)
    tok = load_tokenizer(folder, 272)
    assert tok.eos_id == eot and tok.eos_ids == {eot, eom, end_of_text} and tok.pad_id not in tok.eos_ids
    change_json(folder / "config.json", eos_token_id=[end_of_text, eot])
    change_json(folder / "generation_config.json", eos_token_id=[eot, 65, -1, 999, None, "x"])
    tok = load_tokenizer(folder, 272)
    assert tok.eos_id == eot and tok.eos_ids == {eot, eom, end_of_text, 65} and tok.pad_id not in tok.eos_ids

    # ChatML: <|endoftext|> is the pad (as always) until somebody says that it ends a text, as Qwen2.5 does.
    toy_json(tmp_path / "qwen", "chatml")
    change_json(tmp_path / "qwen" / "config.json", eos_token_id=268)
    tok = load_tokenizer(tmp_path / "qwen", 269)
    assert (tok.eos_id, tok.eos_ids, tok.pad_id) == (268, {268}, 266)
    change_json(tmp_path / "qwen" / "generation_config.json", eos_token_id=[268, 266])
    tok = load_tokenizer(tmp_path / "qwen", 269)
    assert (tok.eos_id, tok.eos_ids) == (268, {268, 266}) and tok.pad_id not in (266, 267, 268)

    # A name that we do not know, declared as an id, or as a name or a dict in tokenizer_config.json.
    folder = plain_folder(tmp_path / "deepseek", DEEPSEEK)
    with pytest.raises(CheckpointError, match="no end-of-text token"):
        load_tokenizer(folder, 268)
    for eos in (DEEPSEEK[1][0], {"content": DEEPSEEK[1][0], "__type": "AddedToken"}):
        change_json(folder / "tokenizer_config.json", eos_token=eos)
        assert load_tokenizer(folder, 268).eos_ids == {267}
    change_json(folder / "tokenizer_config.json", eos_token=None)
    change_json(folder / "config.json", eos_token_id=267)
    assert load_tokenizer(folder, 268).eos_id == 267

    # All of them are saved again, and sampling ends at each.
    tok = load_tokenizer(tmp_path / "llama", 272)
    save_folder(tmp_path / "saved", CONFIGS["gpt2"], GPT(CONFIGS["gpt2"]).state_dict(), tok)
    model, again = load(tmp_path / "saved")
    assert (again.eos_id, again.eos_ids, again.pad_id) == (tok.eos_id, tok.eos_ids, tok.pad_id)
    prompt = tok.render(CHAT[:2], True)[0]
    for eos in tok.eos_ids:
        shake(model)
        with torch.no_grad():
            model.wte.weight[eos] = 100 * model(torch.tensor([prompt]))[0, -1]
        ids, mask, _ = generate(model, again, [prompt], torch.zeros(1, 5), temperature=0)
        assert ids[mask].tolist() == [eos]


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_blanks_are_refused_in_one_sentence(tmp_path, kind, capfd):
    """tiktoken panics, which is a BaseException and writes to stderr; so it is not asked."""
    tok = toy_tokenizer(tmp_path, kind)
    for blank in (" ", "\t", "\u3000", " \n"):
        with pytest.raises(InputError, match="text that begins 'ab.*500000 characters of white space"):
            tok.encode("ab" + blank * 1_100_000 + "c")
    text = "a" + " " * 400_000 + "b\n" + "\t" * 400_000 + "c"
    same = tok.decode(tok.encode(text)) == text
    assert same and capfd.readouterr() == ("", "")
    with pytest.raises(InputError):
        tok.render([{"role": "user", "content": " " * 10 ** 6}])


@pytest.mark.parametrize("kind", KINDS)
def test_turns_that_are_not_trained(tmp_path, kind):
    tok = toy_tokenizer(tmp_path, kind)
    ids, mask = tok.render(CHAT)
    marked = [m | {"train": False} if i == 2 else m | {"train": True} for i, m in enumerate(CHAT)]
    ids2, mask2 = tok.render(marked)
    assert ids2 == ids and tok.render([m | {"train": None} for m in CHAT])[1] == mask
    last = tok.render_answer(CHAT[:-1], CHAT[-1]["content"])[1]
    assert [i for i, on in zip(ids, mask2) if on] == last and sum(mask) > sum(mask2)
    assert all(type(x) is int for x in mask2)


def bos_first(token, i):
    """A post_processor that puts a token before each text, as Llama 3's, Mistral's and DeepSeek's do."""
    one = {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": token, "type_id": 0}}, one],
             "pair": [one, one], "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}}}]}


def test_documents_begin_with_bos_where_the_vocabulary_says_so(tf, tmp_path):
    bos = DEEPSEEK[0][0]
    folder = plain_folder(tmp_path / "plain", DEEPSEEK, post_processor=bos_first(bos, 266))
    change_json(folder / "config.json", eos_token_id=267)
    both = plain_folder(tmp_path / "both",
                        [(name, True) for name in SPECIALS["llama3"] + SPECIALS["chatml"][1:]])
    for tok, template in ((load_tokenizer(folder, 268), "plain"), (load_tokenizer(both, 276), "chatml"),
                          (toy_tokenizer(tmp_path, "llama3"), "llama3")):
        assert tok.template == template
        for prompt in (False, True):
            ids, mask = tok.render(CHAT, prompt)
            assert ids[0] == tok.bos_id and ids.count(tok.bos_id) == 1 and mask[0] == 0
        assert tok.render_answer(CHAT[:2], "x")[0][0] == tok.bos_id not in tok.render_answer(CHAT[:2], "x")[1]
        cfg = replace(CONFIGS["gpt2"], vocab_size=tok.vocab_size)
        save_folder(tmp_path / "saved", cfg, GPT(cfg).state_dict(), tok)
        theirs = tf.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert theirs.apply_chat_template(SAFE_CHAT, return_dict=False) == tok.render(SAFE_CHAT)[0]
        assert theirs.bos_token_id == tok.bos_id
    for kind in ("plain", "chatml"):      # others have none: GPT-2 and Qwen
        assert toy_tokenizer(tmp_path, kind).bos_id is None


@pytest.mark.parametrize("kind, template, mark", [
    ("plain", "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "[INST]"),
    ("plain", "{% if m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}{% endif %}",
     "<\uff5cUser\uff5c>"),
    ("llama3", "{{ '<|im_start|>' + m.role }}", "<|im_start|>"),
    ("chatml", "{{ '<start_of_turn>' }}", "<start_of_turn>"),
    ("plain", [{"name": "default", "template": "<|user|>\n"}], "<|user|>"), ("plain", "{{ m.content }}", "?"),
    ("chatml", "{{ '<|im_start|>' }}", None), ("llama3", "{{ '<|start_header_id|>' }}", None),
    ("plain", None, None)])
def test_another_chat_template_is_said(tmp_path, capsys, kind, template, mark):
    """Once, and not where it is the one that we write."""
    toy_json(tmp_path, kind)
    for where in ("tokenizer_config.json", "chat_template.jinja"):
        folder = tmp_path / where
        toy_json(folder, kind)
        if where == "tokenizer_config.json":
            change_json(folder / where, chat_template=template)
        elif isinstance(template, str):
            (folder / where).write_text(template, encoding="utf-8")
        else:
            continue
        for _ in range(2):
            tok = load_tokenizer(folder, 999)
        out = capsys.readouterr().out
        assert out.count("\n") == (mark is not None) and tok.template == kind
        if mark:
            assert str(folder) in out and f"written as {kind}" in out and f"({mark})" in out
    change_json(folder / "tokenizer_config.json", chat_template=tok.jinja())
    if mark is None:
        load_tokenizer(folder, 999)
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("first", [False, True])
def test_tokenizer_json_variants(tmp_path, first):
    path = toy_json(tmp_path, "plain", first)
    tok, hf = tokenizer_from_json(path), json.loads(path.read_text())
    assert tok.raw == path.read_bytes() and tok.vocab_size == 268
    old = json.loads(path.read_text())   # the oldest style: no model type, specials in vocab, pairs as lists
    del old["model"]["type"], old["pre_tokenizer"]["use_regex"]
    old["model"]["vocab"] |= {t["content"]: t["id"] for t in old["added_tokens"]}
    old["model"]["merges"] = [pair.split() for pair in old["model"]["merges"]]
    path.write_text(json.dumps(old))
    assert all(tokenizer_from_json(path).encode(t) == tok.encode(t) for t in NASTY)
    path.write_text(json.dumps(tokenizer_to_json(tok)))
    assert all(tokenizer_from_json(path).encode(t) == tok.encode(t) for t in NASTY)

    def broken(*keys, value):
        bad = json.loads(json.dumps(hf))
        at = bad
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        path.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match="tokenizer.json"):
            tokenizer_from_json(path)

    broken("model", "type", value="Unigram")
    broken("model", "merges", value=hf["model"]["merges"][::-1])
    broken("model", "merges", value=hf["model"]["merges"][1:])
    broken("model", "merges", value=["Ġ nothere"])
    broken("model", "merges", value=[7])
    broken("model", "vocab", "a", value="a")
    broken("model", "vocab", "a", value=hf["model"]["vocab"]["b"])
    broken("model", "vocab", "\u4f60", value=400)
    broken("model", "byte_fallback", value=True)
    broken("model", value=[])
    broken("normalizer", value={"type": "Lowercase"})
    broken("pre_tokenizer", value={"type": "Whitespace"})
    broken("pre_tokenizer", value=None)
    broken("pre_tokenizer", value=BYTE_LEVEL | {"add_prefix_space": True})
    broken("pre_tokenizer", value=split("("))
    broken("pre_tokenizer", value=split(r"\p{L}+"))
    broken("added_tokens", value=[])
    broken("added_tokens", value=[{"content": "x"}])


def test_merges_that_tiktoken_would_not_make_are_refused(tmp_path):
    """Ids in order, but 'abc' is listed as a + bc where the older merge a + b always comes first."""
    path = toy_json(tmp_path, "plain")
    hf = json.loads(path.read_text())
    vocab = {c: i for i, c in enumerate(byte_chars().values())}
    hf["model"] |= {"vocab": vocab | {"ab": 256, "bc": 257, "abc": 258}, "merges": ["a b", "b c", "a bc"]}
    hf["added_tokens"][0]["id"], hf["added_tokens"][1]["id"] = 259, 260
    path.write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match="abc"):
        tokenizer_from_json(path)
    hf["model"]["merges"][2] = "ab c"
    path.write_text(json.dumps(hf))
    assert tokenizer_from_json(path).encode("abcbc") == [258, 257]


def test_bytes_that_the_vocabulary_lacks_are_dropped(tmp_path):
    path = toy_json(tmp_path, "plain")
    hf = json.loads(path.read_text())
    del hf["model"]["vocab"]["z"]
    hf["model"]["vocab"] |= {"<|endoftext|>": 266, "<|pad|>": 267}
    path.write_text(json.dumps(hf))
    tok = tokenizer_from_json(path)
    assert tok.decode(tok.encode("size of a zebra")) == "sie of a ebra" and tok.vocab_size == 268
    assert max(tok.encode("zzz z")) < tok.vocab_size and "z" not in tokenizer_to_json(tok)["model"]["vocab"]


def test_rank_file(tmp_path):
    path, tokens = tmp_path / "tiny.tiktoken", [bytes([b]) for b in range(256)] + [b" t", b"he", b" the"]
    lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")
    tok = tokenizer_from_ranks(path)
    assert (tok.template, tok.eos_id, tok.pad_id, tok.vocab_size) == ("plain", 259, 260, 261)
    assert tok.encode(" the") == [258] and tok.decode(tok.encode("the \u00e9t\u00e9")) == "the \u00e9t\u00e9"
    for bad in (lines[:-1] + ["!!! 258"], lines[:-1] + [lines[0]], lines[1:], lines[:100],
                lines + ["x"], [""]):
        path.write_text("\n".join(bad))
        with pytest.raises(CheckpointError, match="tiny.tiktoken"):
            tokenizer_from_ranks(path)
    with pytest.raises(CheckpointError):
        tokenizer_from_ranks(tmp_path / "none")


# ------------------------------------------------------------------------------------------------------------
# safetensors and config.json

def example_tensors():
    torch.manual_seed(0)
    out = {f"t.{d}": torch.arange(-6, 6).reshape(3, 4).to(d) for d in DTYPES.values()}
    return out | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3),
                  "odd": torch.arange(5).to(torch.int8), "view": torch.randn(4, 6).T[1:],
                  "name with \"quotes\" \u00e9": torch.randn(2)}


def test_safetensors_round_trip(tmp_path):
    path, tensors = tmp_path / "x.safetensors", example_tensors()
    write_safetensors(path, tensors)
    back = read_safetensors(path)
    assert back.keys() == tensors.keys()
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name], t), name
    back["scalar"].fill_(9)                                         # the mapping is private
    assert read_safetensors(path)["scalar"] == 1.5
    write_safetensors(path, {})
    assert read_safetensors(path) == {}
    with pytest.raises(CheckpointError, match="odd"):
        write_safetensors(path, {"odd": torch.zeros(2, dtype=torch.complex64)})


def test_safetensors_and_the_library_read_each_other(tmp_path):
    st, path, tensors = (pytest.importorskip("safetensors.torch"), tmp_path / "x.safetensors",
                         example_tensors())
    write_safetensors(path, tensors)
    theirs = st.load_file(path)
    assert all(torch.equal(theirs[k], t) for k, t in tensors.items()) and theirs.keys() == tensors.keys()
    st.save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    assert all(torch.equal(read_safetensors(path)[k], t) for k, t in tensors.items())


def raw_file(path, header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("header", [
    b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100000, b'{"a": ' * 100000, b"9" * 5000,
    b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, '
    b'"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
    {"a": 7}, {"a": None}, {"a": []}, {"a": {"dtype": "F32"}}, {"a": entry(dtype="F8_E4M3")},
    {"a": entry(dtype=["F32"])},
    {"a": entry(shape=(-1,))}, {"a": entry(shape=(2,))}, {"a": entry(shape=(1.0,))},
    {"a": entry(shape=(True,))}, {"a": entry(shape=("1",))}, {"a": entry() | {"shape": "1"}},
    {"a": entry() | {"shape": {"1": 1}}}, {"a": entry(shape=(2 ** 60,), offsets=(0, 2 ** 62))},
    {"a": entry(shape=(2 ** 62, 4), offsets=(0, 0))},
    {"a": entry(shape=(0, 2 ** 40, 2 ** 40), offsets=(0, 0)), "b": entry()}, {"a": entry(shape=(1,) * 100)},
    {"a": entry(offsets=(4, 8))}, {"a": entry(offsets=(-4, 0))}, {"a": entry(offsets=(4, 0))},
    {"a": entry(offsets=(0,))},
    {"a": entry(offsets=(0, 4, 8))}, {"a": entry(offsets=(0.0, 4.0))}, {"a": entry(), "b": entry()},
    {"a": entry("U8", (2,), (0, 2)), "b": entry("U8", (1,), (3, 4))},
    {"a": entry("U8", (3,), (0, 3)), "b": entry("U8", (2,), (2, 4))}, {"a": entry("U8", (3,), (0, 3))}, {}])
def test_safetensors_refuses_false_headers(tmp_path, header):
    with pytest.raises(CheckpointError, match="bad.safetensors"):
        read_safetensors(raw_file(tmp_path / "bad.safetensors", header, b"\0" * 4))


def test_safetensors_refuses_false_lengths(tmp_path):
    path = tmp_path / "bad.safetensors"
    for data in (b"", b"\0" * 7, (2 ** 60).to_bytes(8, "little"), (2 ** 63).to_bytes(8, "little") + b"{}",
                 b"\xff" * 8, (3).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="bad.safetensors"):
            read_safetensors(path)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError):
            read_safetensors(missing)


def test_safetensors_damage(tmp_path):
    """Every cut is an error; a flipped bit is an error or leaves tensors that can be used."""
    path, rng = tmp_path / "x.safetensors", random.Random(0)
    write_safetensors(path, example_tensors())
    good = path.read_bytes()
    for n in {*range(0, len(good), 7), len(good) - 1}:
        path.write_bytes(good[:n])
        with pytest.raises(CheckpointError):
            read_safetensors(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError):
        read_safetensors(path)
    for _ in range(1500):
        bad = bytearray(good)
        bad[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            [t.clone().float().sum() for t in read_safetensors(path).values()]
        except CheckpointError:
            pass


def test_shards(tmp_path):
    tok, cfg = toy_tokenizer(tmp_path), CONFIGS["gpt2"]
    state = GPT(cfg).state_dict()
    folder, index = tmp_path / "lm", tmp_path / "lm" / "model.safetensors.index.json"
    save_folder(folder, cfg, state, tok)
    tensors = read_safetensors(folder / "model.safetensors")
    names = sorted(tensors)
    write_safetensors(folder / "a.safetensors", {n: tensors[n] for n in names[:9]})
    write_safetensors(folder / "b.safetensors", {n: tensors[n] for n in names[9:]})
    (folder / "model.safetensors").unlink()
    where = {n: "ab"[i >= 9] + ".safetensors" for i, n in enumerate(names)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    back = load_weights(folder)[1]
    assert all(torch.equal(back[k], v) for k, v in state.items())
    values = ("../a.safetensors", "/a.safetensors", "..\\a.safetensors", "b.safetensors",
              "c.safetensors", 7, "..")
    for bad in [{**where, "x": v} for v in values] + [{n: where[n] for n in names[1:]}, {}, None, [1]]:
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(CheckpointError):
            load_weights(folder)
    index.write_text(json.dumps({"weight_map": where}))
    (folder / "b.safetensors").rename(tmp_path / "b.safetensors")
    (folder / "b.safetensors").symlink_to(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="link"):
        load_weights(folder)


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_and_weights_round_trip(tmp_path, kind):
    tok = toy_tokenizer(tmp_path, TEMPLATE_OF[kind])
    for cfg in (CONFIGS[kind], replace(CONFIGS[kind], scalar_head=True)):
        hf = json.loads(json.dumps(config_to_hf(cfg, tok)))
        assert config_from_hf(hf) == cfg
        state = GPT(cfg).state_dict()
        back = weights_from_hf(weights_to_hf(state, cfg), cfg, hf["model_type"])
        assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


def test_two_families_of_one_shape(tmp_path, monkeypatch):
    """Each is read by its own names of tensors, not by those of the row above, and saved as that one."""
    names = {"wte": "gpt.words", "ln_f": "gpt.last_norm", "h": "gpt.blocks", "ln_1": ["first_norm"]}
    monkeypatch.setitem(checkpoint.FAMILIES, "mine", checkpoint.Family("Mine", names=names))
    cfg, tok = CONFIGS["llama"], toy_tokenizer(tmp_path, TEMPLATE_OF["llama"])
    save(tmp_path / "m", shake(GPT(cfg)), tok)
    want = load(tmp_path / "m")[0].state_dict()
    tensors = {}
    for key, x in read_tensors(tmp_path / "m").items():
        for old, new in (("model.embed_tokens", "gpt.words"), ("model.norm", "gpt.last_norm"),
                         ("model.layers", "gpt.blocks"), ("input_layernorm", "first_norm")):
            key = key.replace(old, new)
        tensors[key] = x.clone()
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors)
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf | {"model_type": "mine"}))
    model, tok = load(tmp_path / "m")
    assert model.cfg == cfg and all(torch.equal(x, want[key]) for key, x in model.state_dict().items())
    save(tmp_path / "again", model, tok)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llama"


def test_a_language_model_becomes_a_scalar_model_and_back(tmp_path):
    for kind in ("gpt2", "qwen2"):
        tok, cfg = toy_tokenizer(tmp_path), CONFIGS[kind]
        state = GPT(cfg).state_dict()
        save_folder(tmp_path / kind, cfg, state, tok)
        got, loaded, *_ = load_weights(tmp_path / kind, head="new")
        assert got == replace(cfg, scalar_head=True) and set(loaded) == set(state) - {"lm_head.weight"}
        assert GPT(got).load_state_dict(loaded, strict=False).missing_keys == ["score.weight"]
        save_folder(tmp_path / kind, got, GPT(got).state_dict(), tok)
        assert load_weights(tmp_path / kind)[0].scalar_head
        tensors = read_tensors(tmp_path / kind)
        if cfg.tie:
            assert weights_from_hf(tensors, cfg, kind).keys() == state.keys()
        else:
            with pytest.raises(CheckpointError, match="lm_head.weight"):
                weights_from_hf(tensors, cfg, kind)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_that_are_not_finite_are_named(tmp_path, kind, bad):
    """When they are read: later the sampler draws nonsense from them, a judge or the learning rate is
    blamed."""
    model = shake(GPT(CONFIGS[kind]))
    with torch.no_grad():
        model.h[1].mlp.down.weight[3, 4] = bad
    save(tmp_path / "m", model, toy_tokenizer(tmp_path))
    name = {"gpt2": "transformer.h.1.mlp.c_proj.weight", "llama": "model.layers.1.mlp.down_proj.weight"}[kind]
    for head in ("none", "new"):
        with pytest.raises(CheckpointError, match=f"m: tensor '{name}' holds values that are not finite"):
            load(tmp_path / "m", head=head)


def test_weights_by_other_names():
    """GPT-2 on the hub has no prefix, carries mask buffers and sometimes the tied head; bf16 files become
    fp32."""
    cfg = CONFIGS["gpt2"]
    state = GPT(cfg).state_dict()
    hf = weights_to_hf(state, cfg)
    assert hf["transformer.h.0.attn.c_attn.weight"].shape == (48, 144)
    bare = {k.removeprefix("transformer."): v for k, v in hf.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 9, 9), "h.1.attn.masked_bias": torch.tensor(-1e4),
             "lm_head.weight": hf["transformer.wte.weight"]}
    assert all(torch.equal(v, state[k]) for k, v in weights_from_hf(bare, cfg, "gpt2").items())
    half = weights_from_hf({k: v.bfloat16() for k, v in bare.items()}, cfg, "gpt2")
    assert all(v.dtype == torch.float32 and torch.equal(v, state[k].bfloat16().float())
               for k, v in half.items())
    for change, words in (({"h.0.ln_1.bias": None}, ["h.0.ln_1.bias", "missing", "(48,)"]),
                          ({"h.2.ln_1.bias": torch.zeros(48)}, ["h.2.ln_1.bias", "not of this model"]),
                          ({"wpe.weight": torch.zeros(99, 48)}, ["wpe.weight", "(99, 48)", "(256, 48)"]),
                          ({"wte.weight": torch.zeros(320, 48, dtype=torch.int8)}, ["wte.weight", "int8"])):
        bad = {k: v for k, v in (bare | change).items() if v is not None}
        with pytest.raises(CheckpointError) as e:
            weights_from_hf(bad, cfg, "gpt2")
        assert all(w in str(e.value) for w in words), e.value
    for bad in ({k: v for k, v in state.items() if "ln_f" not in k}, state | {"more": torch.zeros(1)},
                state | {"wte.weight": torch.zeros(3, 3)}):
        with pytest.raises(CheckpointError):
            weights_to_hf(bad, cfg)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_head_that_contradicts_the_config(tmp_path, kind, tf):
    """config.json says tied. A head that differs is kept, as transformers does; an equal one may go; and a
    file that has the head alone, from which safetensors' save_model has removed the embedding as a double, is
    whole."""
    tok, cfg = toy_tokenizer(tmp_path), CONFIGS[kind]
    model = shake(GPT(cfg))
    ids = some_ids(9)
    save_folder(tmp_path / "m", cfg, model.state_dict(), tok)
    path = tmp_path / "m" / "model.safetensors"
    tensors = {name: t.clone() for name, t in read_safetensors(path).items()}
    embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"

    write_safetensors(path, tensors | {"lm_head.weight": tensors[embedding] + 1})
    got = load(tmp_path / "m")[0]
    assert not got.cfg.tie and torch.equal(got.lm_head.weight, model.wte.weight + 1)
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(got.logits(got(ids)), theirs.eval()(ids).logits, rtol=0, atol=1e-4)
    save(tmp_path / "again", got, tok)
    assert torch.equal(load(tmp_path / "again")[0].lm_head.weight, model.wte.weight + 1)
    assert load(tmp_path / "m", head="new")[0].cfg.scalar_head

    for head in (tensors[embedding], tensors[embedding].double()):
        write_safetensors(path, tensors | {"lm_head.weight": head})
        assert load(tmp_path / "m")[0].cfg.tie
    alone = {name: t for name, t in tensors.items() if name != embedding}
    write_safetensors(path, alone | {"lm_head.weight": tensors[embedding]})
    got = load(tmp_path / "m")[0]
    assert got.cfg.tie and torch.equal(got.wte.weight, model.wte.weight)
    for bad, words in (({"lm_head.weight": torch.ones(3, 48)}, "lm_head.weight"), ({}, embedding)):
        write_safetensors(path, (tensors if bad else alone) | bad)
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "m")


def test_what_a_model_is_needed_for(tmp_path):
    """A reward model that is asked must have its head: one drawn at random would be another judge for every
    seed."""
    tok, cfg = toy_tokenizer(tmp_path), CONFIGS["qwen2"]
    lm, rm, headless = tmp_path / "lm", tmp_path / "rm", tmp_path / "headless"
    save(lm, GPT(cfg), tok)
    trained = shake(GPT(replace(cfg, scalar_head=True)))
    trained.reward_mean = 0.5
    for folder in (rm, headless):
        save(folder, trained, tok)
    tensors = {k: t.clone() for k, t in read_safetensors(rm / "model.safetensors").items()
               if k != "score.weight"}
    write_safetensors(headless / "model.safetensors", tensors)

    model, _ = load(lm)
    assert not model.cfg.scalar_head and hasattr(model, "lm_head")
    for folder in (rm, headless):
        with pytest.raises(InputError, match="is a reward model; a language model is needed"):
            load(folder)
    model, _ = load(rm, head="score")
    assert torch.equal(model.score.weight, trained.score.weight) and model.cfg == trained.cfg
    assert model.reward_mean == 0.5
    with pytest.raises(CheckpointError, match="lm is a language model; a reward model is needed"):
        load(lm, head="score")
    with pytest.raises(CheckpointError, match=r"headless: tensor 'score.weight' \(1, 48\) is missing"):
        load(headless, head="score")
    for folder in (lm, rm, headless):
        heads = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model, _ = load(folder, head="new")
            assert torch.equal(model.ln_f.weight, load_weights(folder)[1]["ln_f.weight"] if folder != headless
                               else trained.ln_f.weight)
            heads.append(model.score.weight)
        assert torch.equal(*heads) == (folder == rm) and heads[0].std() > 0


def test_training_state_beside_a_checkpoint(tmp_path):
    tok, folder = toy_tokenizer(tmp_path), tmp_path / "lr=1e-5,seed=0" / "2025-01-31_12:30"
    assert load_state(folder) == {}
    model = shake(GPT(CONFIGS["llama"]))
    state = {"step": 7, "models": {"policy": model.state_dict()}, "beta": 0.1, "names": ["a"]}
    save(folder, model, tok, state)
    got, _ = load(str(folder))        # a folder that exists is one, whatever its name has in it
    assert all(torch.equal(t, got.state_dict()[name]) for name, t in model.state_dict().items())
    back = load_state(folder)
    assert back.keys() == state.keys() and back["step"] == 7
    assert torch.equal(back["models"]["policy"]["wte.weight"], model.wte.weight)
    save(folder, model, tok)
    assert load_state(folder)["step"] == 7
    (folder / "state.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="state.pt: no training state of ours"):
        load_state(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head>" + b" " * 999
# what a folder holds: {file: its bytes, or the name of the file it was before, or None}, and what is said
UNCLEAR = {
    "lfs": ({"model.safetensors": LFS}, ["model.safetensors: a Git LFS pointer", "git lfs pull"]),
    "lfs tokenizer": ({"tokenizer.json": LFS}, ["tokenizer.json: a Git LFS pointer", "git lfs pull"]),
    "html": ({"model.safetensors": HTML}, ["model.safetensors: a web page", "download"]),
    "html config": ({"config.json": b"\n" + HTML}, ["config.json: a web page", "download"]),
    "pickle": ({"model.safetensors": b"PK\3\4\0\0\x08\x08" + b"\0" * 99}, ["pickled", "safetensors"]),
    "bin": ({"pytorch_model.bin": "model.safetensors"},
            ["pytorch_model.bin but no model.safetensors", "never opened"]),
    "bin shards": ({"pytorch_model-00001-of-00002.bin": "model.safetensors",
                    "pytorch_model.bin.index.json": b"{}"},
                   ["pytorch_model-00001-of-00002.bin but no model.safetensors"]),
    "tensorflow": ({"tf_model.h5": "model.safetensors"}, ["tf_model.h5 but no model.safetensors"]),
    "flax": ({"flax_model.msgpack": "model.safetensors"}, ["flax_model.msgpack but no model.safetensors"]),
    "gguf": ({"m.Q4_K.gguf": "model.safetensors"},
             ["m.Q4_K.gguf but no model.safetensors", "save_pretrained"]),
    "adapter": ({"config.json": None, "adapter_model.safetensors": "model.safetensors",
                 "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'},
                ["a LoRA adapter of org/base", "merge"]),
    "adapter with a config": ({"adapter_model.safetensors": "model.safetensors",
                               "adapter_config.json": b"{}"},
                              ["a LoRA adapter", "merge"]),
    "slow tokenizer": ({"tokenizer.json": None, "vocab.json": b"{}", "merges.txt": b"#version: 0.2\n"},
                       ["has vocab.json and merges.txt but no tokenizer.json", "AutoTokenizer"]),
    "sentencepiece": ({"tokenizer.json": None, "tokenizer.model": b"x"},
                      ["has tokenizer.model but no tokenizer.json"]),
    "no tokenizer": ({"tokenizer.json": None}, ["has no tokenizer.json", "AutoTokenizer"]),
    "no config": ({"config.json": None}, ["has no config.json"]),
    "no weights": ({"model.safetensors": None}, ["has no model.safetensors"]),
    "gemma": ({"config.json": b'{"model_type": "gemma3_text"}'},
              ["config.json: model_type 'gemma3_text'", "llama"])}


@pytest.mark.parametrize("case", UNCLEAR)
def test_folders_that_are_no_checkpoint_say_what_they_are(tmp_path, case):
    folder, (files, words) = tmp_path / "folder", UNCLEAR[case]
    save(folder, GPT(CONFIGS["llama"]), toy_tokenizer(tmp_path))
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, str):
            (folder / content).rename(folder / name)
        else:
            (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError) as e:
        load(folder)
    assert str(e.value).startswith(str(folder)) and "\n" not in str(e.value)
    assert all(word in str(e.value) for word in words), e.value


def test_a_tensor_is_named_as_in_the_file(tmp_path):
    """trl's value head; a name without the prefix that all others of the file lack too."""
    tok, cfg = toy_tokenizer(tmp_path), CONFIGS["llama"]
    save(tmp_path / "m", GPT(cfg), tok)
    path = tmp_path / "m" / "model.safetensors"
    tensors = {name: t.clone() for name, t in read_safetensors(path).items()}
    write_safetensors(path, tensors | {"v_head.summary.weight": torch.ones(1, 48)})
    with pytest.raises(CheckpointError,
                       match=r"m: tensor 'v_head.summary.weight' \(1, 48\) is not of this model"):
        load(tmp_path / "m")
    bare = {name.removeprefix("model."): t for name, t in tensors.items()}
    write_safetensors(path, bare | {"norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"tensor 'norm.weight' is torch.float32 \(3,\)"):
        load(tmp_path / "m")


def test_paths_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    with pytest.raises(CheckpointError,
                       match="Qwen/Qwen2.5-0.5B: no such folder .*hub.* rename the folder Qwen"):
        load("Qwen/Qwen2.5-0.5B")
    with pytest.raises(CheckpointError, match="no such folder$"):
        load(tmp_path / "Qwen" / "x")
    (tmp_path / "Qwen" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a file; give the folder"):
        load("Qwen/model.safetensors")
    for name in ("runs/2025-01-31_12:30/reward", "C:\\models\\x", "a:b", "a,b"):
        with pytest.raises(CheckpointError, match="neither a folder nor the name of a hub model"):
            load(name)


def test_configs_in_either_style_and_unsupported_ones(tmp_path):
    tok = toy_tokenizer(tmp_path)
    base = {k: json.loads(json.dumps(config_to_hf(c, tok))) for k, c in CONFIGS.items()}
    old = base["llama"]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert config_from_hf(new) == config_from_hf(old) == CONFIGS["llama"]
    oldest = old | {"rope_scaling": {("type" if k == "rope_type" else k): v
                                     for k, v in old["rope_scaling"].items()}}
    assert config_from_hf(oldest) == CONFIGS["llama"]
    mistral = old | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert config_from_hf(mistral) == CONFIGS["llama"]
    assert config_from_hf(base["gpt2"] | {"n_inner": None}).n_inner == 4 * 48
    less = {k: v for k, v in base["qwen2"].items()
            if k not in ("head_dim", "tie_word_embeddings", "rope_scaling")}
    assert config_from_hf(less) == CONFIGS["qwen2"]
    for kind, change in [
            ("gpt2", {"activation_function": "relu"}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
            ("gpt2", {"n_embd": 50}), ("gpt2", {"n_layer": "2"}), ("gpt2", {"n_layer": 0}),
            ("gpt2", {"n_layer": True}), ("gpt2", {"model_type": "gptj"}), ("gpt2", {"model_type": None}),
            ("llama", {"hidden_act": "gelu"}), ("llama", {"attention_bias": True}),
            ("llama", {"mlp_bias": True}), ("llama", {"hidden_size": None}),
            ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            ("llama", {"rope_scaling": "x"}),
            ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            ("llama", {"rope_theta": "1"}),
            ("llama", {"quantization_config": {"bits": 4}}),
            ("llama", {"model_type": "mistral", "sliding_window": 64}),
            ("llama", {"model_type": "mistral", "max_position_embeddings": 8192}),
            ("qwen2", {"use_sliding_window": True}),
            ("qwen3", {"attention_bias": True}),
            ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]})]:
        with pytest.raises(CheckpointError, match="config.json"):
            config_from_hf(base[kind] | change)
    for hf in base.values():   # any field of a wrong kind: a config or a clear error
        for key in hf:
            for junk in (None, -1, 0, "x", [], [3], {}, {"x": 1}, True, 1.5, 10 ** 400):
                try:
                    config_from_hf(hf | {key: junk})
                except CheckpointError:
                    pass
    for kind, change in [("gpt2", {"n_kv_head": 2}), ("gpt2", {"pos": "rope"}), ("llama", {"bias": True}),
                         ("qwen2", {"qk_norm": "head"}), ("olmo2", {"post_norm": False}),
                         ("llama", {"mlp": "gelu"})]:
        with pytest.raises(CheckpointError):
            config_to_hf(replace(CONFIGS[kind], **change), tok)


# ------------------------------------------------------------------------------------------------------------
# saving

def test_save_is_all_or_nothing(tmp_path):
    """Whatever step a save dies in, the folder holds the old checkpoint or, once committed, the new one; logs
    stay."""
    tok, cfg, folder = toy_tokenizer(tmp_path), CONFIGS["gpt2"], tmp_path / "out"
    old, new = shake(GPT(cfg), 1).state_dict(), shake(GPT(cfg), 2).state_dict()
    folder.mkdir()
    (folder / "log.jsonl").write_text("kept")
    steps, real = [], {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}

    class Crash(BaseException):
        pass

    def save(state, step):
        extra = {"train.pt": lambda path: torch.save({"step": step}, path), "note.txt": str(step)}
        save_folder(folder, cfg, state, tok, extra)

    def run(limit):
        """Save `new`, dying before the limit-th operation on the disk; as kill -9 would, with no clean-up
        after it."""
        steps.clear()

        def spy(name):
            def call(*args, **kw):
                steps.append(name)
                if len(steps) > limit:
                    raise Crash
                return real[name](*args, **kw)
            return call
        with pytest.MonkeyPatch.context() as patch:
            for name in real:
                patch.setattr(os, name, spy(name))
            save(new, 2)

    save(old, 1)
    run(10 ** 6)
    seen, total = set(), len(steps)
    assert total > 15
    for limit in range(total):
        save(old, 1)
        with pytest.raises(Crash):
            run(limit)
        state = load_weights(folder)[1]
        step = torch.load(folder / "train.pt", weights_only=True)["step"]
        want = (old, new)[step - 1]
        assert (all(torch.equal(state[k], v) for k, v in want.items())
                and (folder / "note.txt").read_text() == str(step))
        assert (folder / "log.jsonl").read_text() == "kept"
        seen.add(step)
    assert seen == {1, 2}
    save_folder(folder, cfg, new, tok)
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    for name in ("../x", "a/b", "", ".."):
        with pytest.raises(ValueError):
            save_folder(folder, cfg, old, tok, {name: "x"})
    assert all(torch.equal(v, new[k]) for k, v in load_weights(folder)[1].items())
    (folder / ".commit").write_text(json.dumps({"files": ["../x"]}))
    with pytest.raises(CheckpointError):
        load_weights(folder)


def test_load_errors_name_the_file(tmp_path):
    tok, cfg, folder = toy_tokenizer(tmp_path), CONFIGS["gpt2"], tmp_path / "out"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        save_folder(folder, cfg, GPT(cfg).state_dict(), tok)
        (folder / name).write_bytes(b"{}")
        with pytest.raises(CheckpointError, match=name.split(".")[0]):
            load_weights(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=name.split(".")[0]):
            load_weights(folder)
    save_folder(folder, replace(cfg, vocab_size=100), GPT(replace(cfg, vocab_size=100)).state_dict(), tok)
    with pytest.raises(CheckpointError, match="268 tokens"):
        load_weights(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_weights(tmp_path / "nothing")


def test_killed_while_saving(tmp_path):
    """The real thing once: kill -9 in the middle of writing an extra file."""
    tok, cfg, folder = toy_tokenizer(tmp_path), CONFIGS["gpt2"], tmp_path / "out"
    state = shake(GPT(cfg), 1).state_dict()
    save_folder(folder, cfg, state, tok)
    code = ("import os, signal, sys\nfrom data.files.checkpoint import load_weights, save_folder\n"
            "cfg, state, tok, _ = load_weights(sys.argv[1])\n"
            "save_folder(sys.argv[1], cfg, {k: v + 1 for k, v in state.items()}, tok,"
            " {'x': lambda path: os.kill(os.getpid(), signal.SIGKILL)})")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    assert subprocess.run([sys.executable, "-c", code, str(folder)], env=env).returncode == -9
    assert all(torch.equal(v, state[k]) for k, v in load_weights(folder)[1].items())
    save_folder(folder, cfg, state, tok)
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


# ------------------------------------------------------------------------------------------------------------
# the hub, played by a local server

class Hub(http.server.BaseHTTPRequestHandler):
    files, log, hashes, lie, cut, ranges, code = {}, [], True, 0, None, True, None
    # where large files are and where config.json has gone; the token it wants
    cdn, moved, gate = "", None, None
    tokens = None                        # (host, path, token) of each request

    def do_GET(self):
        self.log.append((self.path, self.headers.get("Range")))
        self.tokens.append((self.headers["Host"], self.path, self.headers.get("Authorization")))
        if self.path.startswith("/cdn/"):
            return self.send_file(self.files[self.path.removeprefix("/cdn/")])
        if self.gate and self.headers.get("Authorization") != f"Bearer {self.gate}":
            return self.send_error(401)
        if self.moved and self.path.endswith("/resolve/main/config.json"):
            self.send_response(307)
            self.send_header("Location", f"{self.moved}/api/resolve-cache/config.json")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        name = self.path.partition("/resolve/main/")[2] or self.path.rpartition("/resolve-cache/")[2]
        if self.code or name not in self.files:
            return self.send_error(self.code or 404)
        if name.endswith(".safetensors"):   # like the hub: size and hash come with a redirect
            self.send_response(302)
            self.send_header("Location", f"{self.cdn}/cdn/{name}")
            if self.hashes:
                digest = hashlib.sha256(self.files[name]).hexdigest() if self.hashes is True else self.hashes
                self.send_header("X-Linked-ETag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(self.files[name]) + self.lie))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_file(self.files[name])

    def send_file(self, data):
        start = 0
        if self.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start + (self.lie if not self.hashes else 0)))
        self.send_header("ETag", 'W/"abc"')
        self.end_headers()
        self.wfile.write(data[start:][: self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one small model, the handler class whose fields make it misbehave, and our cache."""
    tok, cfg = toy_tokenizer(tmp_path), CONFIGS["gpt2"]
    state = shake(GPT(cfg)).state_dict()
    save_folder(tmp_path / "src", cfg, state, tok)
    files = {name: (tmp_path / "src" / name).read_bytes()
             for name in ("config.json", "model.safetensors", "tokenizer.json")}
    handler = type("H", (Hub,), {"files": files, "log": [], "tokens": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NANORLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE", "HF_HUB_CACHE",
                 "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    handler.folder, handler.state = tmp_path / "cache" / "org--toy", state
    yield handler
    server.shutdown()
    server.server_close()


def test_hub_download(hub, capsys):
    cfg, state, tok, _ = load_weights("org/toy")
    assert all(torch.equal(v, hub.state[k]) for k, v in state.items())
    assert "model.safetensors" in capsys.readouterr().err
    assert sorted(p.name for p in hub.folder.iterdir()) == ["config.json", "model.safetensors",
                                                            "tokenizer.json"]
    n = len(hub.log)
    hub.code = 500                              # complete: no request at all, so it works offline
    assert load_weights("org/toy")[0] == cfg and len(hub.log) == n


def test_hub_resumes(hub):
    hub.cut = 5000
    with pytest.raises(CheckpointError, match="stopped"):
        fetch_hub("org/toy")
    part = hub.folder / "model.safetensors.part"
    assert part.stat().st_size == 5000 and not (hub.folder / "model.safetensors").exists()
    hub.cut = None
    hub.log.clear()
    fetch_hub("org/toy")
    assert ("/cdn/model.safetensors", "bytes=4999-") in hub.log and not part.exists()
    assert (hub.folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize("start", ["whole", "too long", "other file", "no ranges", "no hash", "empty"])
def test_hub_resumes_from_anything(hub, start):
    data = hub.files["model.safetensors"]
    hub.folder.mkdir(parents=True)
    part = hub.folder / "model.safetensors.part"
    begun = {"whole": data, "too long": data + b"xx", "other file": b"x" * 3000, "empty": b""}
    part.write_bytes(begun.get(start, data[:999]))
    hub.ranges, hub.hashes = start != "no ranges", start != "no hash"
    if start == "other file":
        with pytest.raises(CheckpointError, match="SHA-256"):
            fetch_hub("org/toy")
        assert not part.exists()
    fetch_hub("org/toy")
    assert (hub.folder / "model.safetensors").read_bytes() == data and not part.exists()


@pytest.mark.parametrize("fields, words", [
    ({"hashes": "0" * 64}, "SHA-256"), ({"lie": 10}, "stopped"), ({"lie": -10}, "size"),
    ({"hashes": False, "lie": 10}, "stopped"), ({"code": 404}, "no such model"), ({"code": 401}, "licence"),
    ({"code": 403}, "licence"), ({"code": 500}, "Error 500")])
def test_hub_trouble(hub, fields, words):
    for key, value in fields.items():
        setattr(hub, key, value)
    with pytest.raises(CheckpointError, match=words):
        fetch_hub("org/toy")
    assert not (hub.folder / "model.safetensors").exists()


def test_hub_shards(hub):
    tensors = hub.files.pop("model.safetensors")
    hub.files["model-00001.safetensors"] = tensors
    names = [k for k in json.loads(tensors[8:8 + int.from_bytes(tensors[:8], "little")])
             if k != "__metadata__"]
    for bad in ("../x.safetensors", "/x.safetensors", "x/y.safetensors", "..", "", None, 3):
        hub.files["model.safetensors.index.json"] = json.dumps(
            {"weight_map": dict.fromkeys(names, bad)}).encode()
        with pytest.raises(CheckpointError, match="plain file name"):
            fetch_hub("org/toy")
        (hub.folder / "model.safetensors.index.json").unlink()
    hub.files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": dict.fromkeys(names, "model-00001.safetensors")}).encode()
    assert all(torch.equal(v, hub.state[k]) for k, v in load_weights("org/toy")[1].items())
    hub.code = 500
    load_weights("org/toy")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b/c", "/etc", "a/..", "a..b", "a b", "-x", ".x", "a/",
                                  "a\n", "a?b", "\u00e9"])
def test_hub_refuses_names(hub, name):
    with pytest.raises(CheckpointError):
        fetch_hub(name)
    assert hub.log == []


def test_hub_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NANORLHF_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="by hand") as e:
        load_weights("org/toy")
    assert str(tmp_path / "org--toy") in str(e.value)


def test_hub_token_goes_to_the_hub_alone(hub, monkeypatch):
    """A gated model: the hub gets the token, the host that it sends us to for the weights does not, nor does
    the same host along with a redirect. Only a page of the hub's own that refuses is asked with it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Other", (hub,), {}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        hub.cdn, hub.gate = f"http://127.0.0.1:{server.server_port}", "hf_example"
        for token in ("", "hf_wrong"):
            monkeypatch.setenv("HF_TOKEN", token)
            with pytest.raises(CheckpointError, match="401.*accept its licence on the hub and set HF_TOKEN"):
                fetch_hub("org/toy")
        monkeypatch.setenv("HF_TOKEN", "hf_example\n")
        hub.tokens.clear()
        assert all(torch.equal(v, hub.state[k]) for k, v in load_weights("org/toy")[1].items())
        sent = {(path.startswith("/cdn/"), token) for _, path, token in hub.tokens}
        assert sent == {(False, "Bearer hf_example"), (True, None)}

        # The hub moves a small file to another page of its own, or to another host.
        for moved, wanted in (("", [None, "Bearer hf_example"]), (hub.cdn, [None])):
            (hub.folder / "config.json").unlink()
            hub.moved = moved or os.environ["HF_ENDPOINT"]
            hub.tokens.clear()
            if moved:
                with pytest.raises(CheckpointError, match="401"):
                    fetch_hub("org/toy")
                (hub.folder / "config.json").write_bytes(hub.files["config.json"])
            else:
                fetch_hub("org/toy")
            assert [token for _, path, token in hub.tokens if "resolve-cache" in path] == wanted
        for bad in ("a\nb", "\u2019"):
            monkeypatch.setenv("HF_TOKEN", bad)
            (hub.folder / "config.json").unlink(missing_ok=True)
            with pytest.raises(CheckpointError, match="HF_TOKEN"):
                fetch_hub("org/toy")
    finally:
        server.shutdown()
        server.server_close()


def hf_cache(root, name, files, revision="0123abc"):
    """Files of a model as Hugging Face's libraries keep them: snapshots of links to blobs."""
    repo = root / f"models--{name.replace('/', '--')}"
    for folder in ("blobs", "refs", f"snapshots/{revision}"):
        (repo / folder).mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(revision)
    for file, content in files.items():
        (repo / "blobs" / hashlib.sha256(content).hexdigest()).write_bytes(content)
        (repo / "snapshots" / revision / file).symlink_to(
            f"../../blobs/{hashlib.sha256(content).hexdigest()}")
    return repo / "snapshots" / revision


@pytest.mark.parametrize("where", ["HF_HOME", "HF_HUB_CACHE", "HOME"])
@pytest.mark.parametrize("shards", [False, True])
def test_hub_model_in_the_cache_of_other_libraries(hub, tmp_path, monkeypatch, where, shards):
    """Read there, links and shards included, without a request."""
    root = {"HF_HOME": tmp_path / "x" / "hub", "HF_HUB_CACHE": tmp_path / "x",
            "HOME": tmp_path / "x" / ".cache" / "huggingface" / "hub"}[where]
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(where, str(tmp_path / "x"))
    files = dict(hub.files)
    if shards:
        tensors = read_safetensors(tmp_path / "src" / "model.safetensors")
        names = sorted(tensors)
        for shard, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
            write_safetensors(tmp_path / shard, {name: tensors[name] for name in part})
            files[shard] = (tmp_path / shard).read_bytes()
        where_is = {name: "ab"[i >= 9] + ".safetensors" for i, name in enumerate(names)}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": where_is}).encode()
        del files["model.safetensors"]
    snapshot = hf_cache(root, "org/toy", files)
    assert (snapshot / "config.json").is_symlink()
    for path in ("org/toy", snapshot):
        assert all(torch.equal(v, hub.state[k]) for k, v in load_weights(path)[1].items())
    assert hub.log == []
    (snapshot / "tokenizer.json").unlink()  # incomplete, as after AutoConfig.from_pretrained: fetched to ours
    load_weights("org/toy")
    assert hub.log and (hub.folder / "tokenizer.json").exists()


def test_hub_offline_by_request(hub, monkeypatch):
    for value in ("1", "true", "YES", "on"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set.*by hand"):
            load_weights("org/toy")
    assert hub.log == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    load_weights("org/toy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_weights("org/toy")


def test_hub_files_that_may_be_missing(hub):
    """EOS ids and the chat template are fetched where the hub has them, and asked for once where it has
    not."""
    hub.files["generation_config.json"] = b'{"eos_token_id": [266, 267]}'
    tok = load_weights("org/toy")[2]
    assert tok.eos_ids == {266, 267} and (hub.folder / "generation_config.json").exists()
    asked = [path.rpartition("/")[2] for path, _ in hub.log if "/resolve/" in path]
    assert sorted(asked) == sorted(["config.json", "tokenizer.json", "generation_config.json",
                                    "tokenizer_config.json", "chat_template.jinja", "model.safetensors"])
    del hub.files["tokenizer.json"]
    (hub.folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError,
                       match="tokenizer.json: HTTP Error 404.*no such model, or one without"):
        load_weights("org/toy")


def test_no_home_folder(hub, monkeypatch):
    """As in a container whose user has neither HOME nor a name."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("HF_HOME")
    load_weights("org/toy")
    monkeypatch.delenv("NANORLHF_CACHE")
    with pytest.raises(CheckpointError, match="no home folder.*set NANORLHF_CACHE"):
        load_weights("org/toy")
