"""Tokenizers from outside: byte-level BPE through tiktoken, from a tokenizer.json or a rank file, and back."""
import base64
import json
import unicodedata
from pathlib import Path

import tiktoken

from data import InputError


class CheckpointError(InputError):
    """A file that is missing, damaged, unsafe or of a kind we do not support; the message names the file or tensor."""


def require(ok, message):
    """CheckpointError(message) unless ok."""
    if not ok:
        raise CheckpointError(message)


def read_json(path, data=None):
    """The JSON object in a file (or in data, bytes of it). CheckpointError: unreadable, no object, or a key twice."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)
    try:
        obj = json.loads(Path(path).read_bytes() if data is None else data, object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read as JSON ({e})") from None
    require(isinstance(obj, dict), f"{path}: holds no JSON object")
    return obj


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: byte-level BPE through tiktoken. Text never becomes a special token; only `render` places those.

# GPT-2's pattern, possessive where that changes no split but saves backtracking; and the same after numbers, or single
# digits as in SmolLM2, have been cut out first: white space before a number is then a piece by itself
GPT2_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIGITS_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}%s| ?[^\s\p{L}\p{N}]++|\s++(?![^\s\p{N}])|\s+(?!\S)|\s"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>")
PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|end_of_text|>")
JINJA = {   # what `render` does, in the language of Hugging Face chat templates
    "plain": r"{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}"
             r"{{ '\n\nHuman: ' + m['content'] }}{% else %}{{ '\n\nAssistant: ' + m['content'] + eos_token }}"
             r"{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}",
    "chatml": r"{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
              r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": r"{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
              r"'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
              r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"}


class Tokenizer:
    """A tiktoken Encoding plus what a chat model needs.

    eos_id ends a turn; eos_ids are all tokens that end a text. pad_id is a token of its own where the vocabulary has
    one, never eos_id; GPT-2 has none and gets 0, an ordinary token, which is fine because masks are explicit
    everywhere. template: 'chatml', 'llama3' or 'plain', whichever the special tokens allow.
    pre, nfc, raw: the pre-tokenizer as tokenizer.json writes it, whether text is NFC-normalised, the original file."""

    def __init__(self, enc, pre=BYTE_LEVEL, nfc=False, raw=None, visible=(), vocab_size=None):
        self.enc, self.pre, self.nfc, self.raw, self.special = enc, pre, nfc, raw, enc._special_tokens
        self.vocab_size = vocab_size or enc.n_vocab       # ids from here on stand for bytes the vocabulary cannot spell
        self.bytes_of = {i: b for b, i in enc._mergeable_ranks.items() if i < self.vocab_size}
        self.bytes_of |= {self.special[name]: name.encode() for name in visible}
        if {"<|im_start|>", "<|im_end|>"} <= self.special.keys():
            self.template = "chatml"
        elif {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= self.special.keys():
            self.template = "llama3"
        else:
            self.template = "plain"
        ends = [self.special[name] for name in ENDS if name in self.special]
        require(ends, f"{enc.name}: no end-of-text token (one of {', '.join(ENDS)})")
        self.eos_id = ends[0]
        pads = [self.special[name] for name in PADS if name in self.special]
        self.pad_id = next(i for i in pads + [0, 1] if i != self.eos_id)
        self.eos_ids = set(ends) - {self.pad_id}
        self.bos_id = self.special.get("<|begin_of_text|>")

    def encode(self, text):
        """Ids of a text. '<|endoftext|>' and the like in it are spelled out, so users cannot inject special tokens."""
        ids = self.enc.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)
        return ids if self.vocab_size == self.enc.n_vocab else [i for i in ids if i < self.vocab_size]

    def decode(self, ids):
        """Text of ids; special tokens and ids beyond the vocabulary are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes_of.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def render(self, messages, generation_prompt=False):
        """A chat [{"role": "system" | "user" | "assistant", "content": str}, ...] as (ids, mask), both lists of ints.

        mask is 1 exactly on the tokens of assistant contents and on the token that ends each assistant turn. Pieces are
        encoded one by one, so a prompt is always a prefix of prompt + response. generation_prompt opens an assistant
        turn at the end. No default system message is added (the templates of SmolLM2 and Qwen2.5 do add one).
        ValueError: unknown role or a content that is not a string."""
        kind, special, ids, mask = self.template, self.special, [], []

        def add(new, train=0):
            ids.extend(new)
            mask.extend([train] * len(new))

        def opening(role):
            if kind == "plain":
                return self.encode({"system": "", "user": "\n\nHuman:", "assistant": "\n\nAssistant:"}[role])
            if kind == "chatml":
                return [special["<|im_start|>"], *self.encode(role + "\n")]
            start, end = special["<|start_header_id|>"], special["<|end_header_id|>"]
            return [start, *self.encode(role), end, *self.encode("\n\n")]

        add([self.bos_id] if kind == "llama3" else [])
        for m in messages:
            role, content = m.get("role"), m.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise ValueError(f"a message needs a role (system, user, assistant) and a text content: {m}")
            train = int(role == "assistant")
            add(opening(role))
            add(self.encode(" " + content if kind == "plain" and role != "system" else content), train)
            add([self.eos_id] if train or kind != "plain" else [], train)
            add(self.encode("\n") if kind == "chatml" else [])
        if generation_prompt:
            add(opening("assistant"))
        return ids, mask

    def render_answer(self, prompt, text):
        """(prompt ids, answer ids) of an assistant's answer (str) to a prompt (messages): what is given and what is
        scored or trained. The answer ends with the EOS; what a template writes after it (ChatML: a newline) is left
        off."""
        turn, mask = self.render([{"role": "assistant", "content": text}])
        return self.render(prompt, generation_prompt=True)[0], [i for i, m in zip(turn, mask) if m]


def byte_chars():
    """{byte: the printable character that stands for it in a tokenizer.json}: GPT-2's table."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*plain}))}


def merge_parts(token, ranks):
    """What BPE makes of token (bytes) with only the merges older than it: normally the pair whose merge it is."""
    parts, limit = [token[i:i + 1] for i in range(len(token))], ranks[token]
    while True:
        best, at = limit, None
        for i in range(len(parts) - 1):
            if (rank := ranks.get(parts[i] + parts[i + 1], limit)) < best:
                best, at = rank, i
        if at is None:
            return parts
        parts[at:at + 2] = [parts[at] + parts[at + 1]]


def split_regex(pre):
    """One regex that splits text as the pre_tokenizer of a tokenizer.json does; None for kinds we do not know."""
    *first, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    use_regex = last.get("use_regex", True)
    if last["type"] != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    if not first:
        return GPT2_REGEX if use_regex else None
    if first[0]["type"] == "Digits" and use_regex:
        return DIGITS_REGEX % ("" if first[0].get("individual_digits") else "++")
    if first[0]["type"] == "Split" and not use_regex and first[0].get("behavior") == "Isolated" \
            and not first[0].get("invert"):
        return first[0]["pattern"].get("Regex")


def tokenizer_from_json(path):
    """Tokenizer from a Hugging Face tokenizer.json with byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2, ...).

    tiktoken knows no merge list: it joins the pair whose union has the lowest id. The file is accepted only if this
    rule, run on every token, ends with a merge the file lists, in the file's order. CheckpointError otherwise."""
    def check(ok, what):
        require(ok, f"{path}: {what}")

    hf = read_json(path)
    try:
        model, norm, pre = hf["model"], hf.get("normalizer"), hf.get("pre_tokenizer")
        added = {t["content"]: t["id"] for t in hf.get("added_tokens") or []}
        visible = [t["content"] for t in hf.get("added_tokens") or [] if not t.get("special", True)]
        check(model.get("type", "BPE") == "BPE" and not any(model.get(k) for k in (
            "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")), "not a byte-level BPE")
        check(norm is None or norm == {"type": "NFC"} or norm == {"type": "Sequence", "normalizers": []},
              f"normalizer {norm} is not supported")
        regex = split_regex(pre) if pre else None
        check(regex, f"pre_tokenizer {json.dumps(pre)} is not supported")
        check(all(name.strip() for name in visible), "added tokens made of white space are not supported")
        byte_of = {c: b for b, c in byte_chars().items()}
        spell = lambda s: bytes(byte_of[c] for c in s)   # noqa: E731
        ranks = {spell(s): i for s, i in model["vocab"].items() if s not in added}
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        merges = [(spell(a), spell(b)) for a, b in pairs]
        made = [ranks[a + b] for a, b in merges]
        ids = [*ranks.values(), *added.values()]
        size = max(ids) + 1
        check(len(set(ids)) == len(ids) and min(ids) >= 0 and size < 2**30, "an id is out of range or used twice")
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise CheckpointError(f"{path}: not a byte-level BPE tokenizer.json ({type(e).__name__}: {e})") from None
    check(made == sorted(made), "the order of the merges is not the order of the ids, which tiktoken needs")
    known = set(merges)
    for token in ranks:
        if len(token) > 1:
            parts = merge_parts(token, ranks)   # with ignore_merges whole words are looked up first, as tiktoken does
            check(tuple(parts) in known or model.get("ignore_merges") and len(parts) > 2,
                  f"token {token!r} does not come from a merge that tiktoken's rule would make")
    holes = [b for b in range(256) if bytes([b]) not in ranks]   # HF drops such bytes; so does our encode
    check(not (holes and model.get("unk_token")), "an unknown token is not supported")
    try:
        enc = tiktoken.Encoding(str(path), pat_str=regex, special_tokens=added,
                                mergeable_ranks=ranks | {bytes([b]): size + i for i, b in enumerate(holes)})
    except ValueError as e:
        raise CheckpointError(f"{path}: the pre_tokenizer's regex is not supported ({e})") from None
    tok = Tokenizer(enc, pre, bool(norm and norm["type"] == "NFC"), Path(path).read_bytes(), visible, size)
    probe = "".join(map(chr, range(256))) + " \u0394\u6f22 12345 it's  \r\n\n\t x"
    want = bytes(b for b in probe.encode() if b not in holes)
    check(b"".join(tok.bytes_of[i] for i in tok.encode(probe)) == want, "the pre_tokenizer's regex loses text")
    return tok


def tokenizer_to_json(tok):
    """The dict for a tokenizer.json that encodes as tok does; the merges are recovered from the ranks."""
    chars, ranks = byte_chars(), {b: i for b, i in tok.enc._mergeable_ranks.items() if i < tok.vocab_size}
    write = lambda token: "".join(chars[b] for b in token)   # noqa: E731
    merges = [list(map(write, merge_parts(t, ranks))) for t in sorted(ranks, key=ranks.get) if len(t) > 1]
    require(all(len(pair) == 2 for pair in merges), f"{tok.enc.name}: has tokens that no merge makes")
    special = sorted(tok.special.items(), key=lambda item: item[1])
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": i not in tok.bytes_of} for name, i in special],
            "normalizer": {"type": "NFC"} if tok.nfc else None, "pre_tokenizer": tok.pre, "post_processor": None,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {write(t): i for t, i in ranks.items()} | dict(special), "merges": merges}}


def gpt2_tokenizer():
    """GPT-2's own tokenizer; tiktoken downloads it once (or reads it from the folder in TIKTOKEN_CACHE_DIR)."""
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except OSError as e:   # requests' errors are OSErrors
        raise CheckpointError("the GPT-2 vocabulary is not at hand and cannot be downloaded "
                              f"({type(e).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it") from None


def tokenizer_from_ranks(path):
    """Tokenizer from a tiktoken rank file: lines of base64(token), space, rank, from 0 up; <|endoftext|> and <|pad|>
    take the next two ids. CheckpointError names the line that is wrong."""
    ranks = {}
    try:
        for n, line in enumerate(Path(path).read_bytes().splitlines()):
            token, rank = line.split()
            if int(rank) != n or ranks.setdefault(base64.b64decode(token, validate=True), n) != n:
                raise ValueError
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError:
        raise CheckpointError(f"{path}:{n + 1}: expected a new token in base64 and the rank {n}") from None
    require(all(bytes([b]) in ranks for b in range(256)), f"{path}: not every one of the 256 bytes is a token")
    special = {"<|endoftext|>": len(ranks), "<|pad|>": len(ranks) + 1}
    return Tokenizer(tiktoken.Encoding(str(path), pat_str=GPT2_REGEX, mergeable_ranks=ranks, special_tokens=special))
