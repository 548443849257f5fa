"""Tokenizers from outside: byte-level BPE by tiktoken, from a tokenizer.json or a rank file, and back."""
import base64
import functools
import json
import re
import typing
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from data import InputError
from data.files import CheckpointError, read_object, require

# ------------------------------------------------------------------------------------------------------------
# How a chat is written. A new template is a function and a row of TEMPLATES.


@dataclass
class Template:
    """How a chat is written, by special tokens that must be in the vocabulary."""
    needs: tuple                 # those tokens, the one that ends a turn first; (): any that ends a text
    opening: typing.Callable     # what stands before a turn, by its role: pieces of text and names of tokens
    lead: str                    # what stands between the opening of an answer and its text
    closing: str                 # what stands behind the token that ends a turn
    users_end: bool              # whether turns of the user and the system end with that token as well
    word: str                    # by which a chat template of this kind is known
    jinja: str                   # the same as a chat template of Hugging Face, without BOS


def open_plain(role):
    """hh-rlhf's transcripts: a system message has no mark."""
    return [{"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant:"}[role]]


def open_chatml(role):
    """Of Qwen, SmolLM2 and many others."""
    return ["<|im_start|>", role + "\n"]


def open_llama3(role):
    """Of Llama 3."""
    return ["<|start_header_id|>", role, "<|end_header_id|>", "\n\n"]


TEMPLATES = {    # the last one whose tokens are there is taken
    "plain": Template(
        (), open_plain, " ", "", False, "Human:",
        r"{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
        r"{% elif m['role'] == 'user' %}{{ '\n\nHuman: ' + m['content'] }}"
        r"{% else %}{{ '\n\nAssistant: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"),
    "llama3": Template(
        ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"), open_llama3, "", "",
        True, "<|start_header_id|>",
        r"{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        r"m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    "chatml": Template(
        ("<|im_end|>", "<|im_start|>"), open_chatml, "", "\n", True, "<|im_start|>",
        r"{% for m in messages %}"
        r"{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")}

# Tokens that end a text, and tokens to pad with, the best first.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>")
PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")


# ------------------------------------------------------------------------------------------------------------
# The tokenizer. Text never becomes a special token; only `render` places those.

# GPT-2's pattern, possessive where that changes no split but saves backtracking; and the same after numbers,
# or single digits as in SmolLM2, were cut out: white space before a number is then a piece by itself.
GPT2_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIGITS_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}%s| ?[^\s\p{L}\p{N}]++|\s++(?![^\s\p{N}])|\s+(?!\S)|\s"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MAX_BLANKS = 500_000   # characters; tiktoken's Rust code panics at a million of white space in a row
BLANK = re.compile(r"(?<!\s)\s{%d}" % MAX_BLANKS)


class Tokenizer:
    """A tiktoken Encoding plus what a chat model needs.

    template: of TEMPLATES, whichever the special tokens allow. bos_id begins every document, None if there is
    none; start_id is what stood before a document in pretraining. eos_id ends a turn; eos_ids are all that
    end a text, with those that the checkpoint declares (`ends`, ids or names). pad_id is none of them: a
    token of its own or, as with GPT-2, an ordinary one, which is fine because masks are explicit everywhere.
    visible: names of added tokens that are ordinary text, such as Qwen3's <think>. pre, nfc, raw: the
    pre-tokenizer as tokenizer.json has it, whether text is normalised to NFC, the bytes of that file."""

    def __init__(self, enc, pre=BYTE_LEVEL, nfc=False, raw=None, visible=(), vocab_size=None, ends=()):
        self.enc, self.pre, self.nfc, self.raw = enc, pre, nfc, raw
        self.special = enc._special_tokens
        self.vocab_size = vocab_size or enc.n_vocab   # ids from here on stand for bytes that it cannot spell
        for name, template in TEMPLATES.items():
            if self.special.keys() >= set(template.needs):
                self.template = name
        self.style = TEMPLATES[self.template]
        self.bos_id = self.special.get("<|begin_of_text|>")
        self.choose_ends(ends)

        # The added tokens that `encode` looks for in a text: visible, and none that steers a chat.
        steering = {*self.steering(), *self.eos_ids, self.pad_id}
        self.visible = {}
        for name in sorted(visible, key=len, reverse=True):   # the longer one of two that begin alike
            if self.special[name] not in steering:
                self.visible[name] = self.special[name]
        self.added = re.compile(f"({'|'.join(map(re.escape, self.visible))})") if self.visible else None

        # What each id stands for; ids of special tokens stand for no text.
        self.bytes_of = {i: token for token, i in enc._mergeable_ranks.items() if i < self.vocab_size}
        for name, i in self.visible.items():
            self.bytes_of[i] = name.encode()

    def choose_ends(self, declared):
        """Set eos_id, eos_ids and pad_id; declared: what the checkpoint's own files call its EOS."""
        ends = [self.special[name] for name in ENDS if name in self.special]
        chosen = []
        for end in declared:
            i = self.special.get(end, end)
            if type(i) is int and 0 <= i < self.vocab_size:
                chosen.append(i)
        turn_ends = [i for i in chosen if i in self.special.values()] + ends
        if self.style.needs:
            turn_ends = [self.special[self.style.needs[0]]]
        require(turn_ends, f"{self.enc.name}: no end-of-text token (one of {', '.join(ENDS)})")
        self.eos_id = turn_ends[0]

        # <|endoftext|> may be the padding where nothing says that it ends a text; else an ordinary token is.
        ends, pads = {*ends, *chosen}, []
        for name in PADS:
            i = self.special.get(name)
            if i not in (None, self.eos_id, *chosen):
                pads.append(i)
        self.pad_id = pads[0] if pads else min(set(range(len(ends) + 1)) - ends)
        self.eos_ids = ends - {self.pad_id}

    @property
    def start_id(self):
        """What stood before each document in pretraining: BOS, or the token that ends documents where a chat
        model has another one for turns."""
        starts = [self.special[name] for name in ("<|endoftext|>", "<|end_of_text|>") if name in self.special]
        if self.bos_id is not None:
            return self.bos_id
        return (starts + [self.eos_id])[0]

    def encode(self, text):
        """Ids of a text. Special tokens in it are spelled out, so that users cannot inject them; a visible
        added token, such as <think>, is one id. InputError: too much white space in a row."""
        if self.added is None:
            return self.spell(text)
        ids = []
        for i, piece in enumerate(self.added.split(text)):   # text, token, text, token, ..., text
            ids += [self.special[piece]] if i % 2 else self.spell(piece)
        return ids

    def spell(self, text):
        """Ids of a text by the rules of BPE alone; bytes that the vocabulary lacks are dropped."""
        if len(text) > MAX_BLANKS and BLANK.search(text):
            what = f"has {MAX_BLANKS} characters of white space in a row, which tiktoken cannot split"
            raise InputError(f"the text that begins {text[:30]!r} {what}; shorten it or leave it out")
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        ids = self.enc.encode_ordinary(text)
        if self.vocab_size == self.enc.n_vocab:
            return ids
        return [i for i in ids if i < self.vocab_size]

    def decode(self, ids):
        """Text of ids without special tokens and ids beyond the vocabulary; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes_of.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def byte_counts(self, ids):
        """How many bytes of text each of some ids (a list) stands for; none for an EOS."""
        return [len(self.bytes_of.get(i, b"")) for i in ids]

    def steering(self):
        """The ids of the special tokens that the chat template places, but for BOS."""
        return [self.special[name] for name in self.style.needs] + [self.eos_id]

    def same_as(self, other):
        """Whether another tokenizer gives every text and every chat the same ids. What it has beside, such as
        a [PAD] of its own, occurs in neither."""
        of_texts = (self.enc._mergeable_ranks, split_regex(self.pre), self.nfc, self.visible)
        of_chats = (self.template, self.steering(), self.bos_id)
        return (of_texts == (other.enc._mergeable_ranks, split_regex(other.pre), other.nfc, other.visible)
                and of_chats == (other.template, other.steering(), other.bos_id))

    def render(self, messages, generation_prompt=False):
        """(ids, mask), lists of int, of a chat [{"role": "system"|"user"|"assistant", "content": str}, ...].

        mask is 1 exactly on the tokens of assistant contents and on the token that ends each assistant turn,
        but 0 in a turn with "train": False. generation_prompt opens an assistant turn at the end. No default
        system message is added (SmolLM2 and Qwen2.5 have one). ValueError: unknown role, or content that is
        no str.

        What stands between two special tokens is encoded as a whole, as a library does that fills in the
        saved chat template: "?" and the line breaks before the next turn may be one token. It is cut only
        where an answer begins, so that a prompt is always a prefix of prompt + answer."""
        ids, mask, waiting = [], [], ""      # waiting: text that is not encoded yet

        def add(new, train=False):
            """Add what waits, and then new ids."""
            nonlocal waiting
            before, waiting = self.encode(waiting), ""
            ids.extend(before + new)
            mask.extend([0] * len(before) + [int(train)] * len(new))

        def open_turn(role):
            nonlocal waiting
            for piece in self.style.opening(role):
                if piece in self.style.needs:
                    add([self.special[piece]])
                else:
                    waiting += piece

        if self.bos_id is not None:
            add([self.bos_id])
        for m in messages:
            role, content = m.get("role"), m.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise ValueError(f"a message needs a role (system, user, assistant) and a text content: {m}")
            open_turn(role)
            if role == "assistant":
                add([])
                add(self.encode(self.style.lead + content) + [self.eos_id], m.get("train") is not False)
            else:
                waiting += content
                if self.style.users_end:
                    add([self.eos_id])
            waiting += self.style.closing
        if generation_prompt:
            open_turn("assistant")
        add([])
        return ids, mask

    def render_answer(self, prompt, text):
        """(prompt ids, answer ids) of an assistant's answer (str) to a prompt (messages): what is given, and
        what is scored or trained. The answer ends with the EOS; ChatML's newline after it is left off."""
        answer = self.encode(self.style.lead + text) + [self.eos_id]
        return self.render(prompt, generation_prompt=True)[0], answer

    def jinja(self):
        """`render` as a chat template of Hugging Face."""
        return ("" if self.bos_id is None else "{{ bos_token }}") + self.style.jinja


# ------------------------------------------------------------------------------------------------------------
# tokenizer.json, both ways. In it a printable character stands for each byte (GPT-2's table).


def byte_chars():
    """{byte: the character that stands for it}: itself where it is printable, else one from 256 on."""
    chars = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    for i, byte in enumerate(sorted(set(range(256)) - chars.keys())):
        chars[byte] = chr(256 + i)
    return chars


def merge_parts(token, ranks):
    """What BPE makes of token (bytes) with only the merges older than it: normally the pair it comes from."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while True:
        # Join the neighbours whose union has the lowest rank, as tiktoken does.
        best, at = ranks[token], None
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], best)
            if rank < best:
                best, at = rank, i
        if at is None:
            return parts
        parts[at:at + 2] = [parts[at] + parts[at + 1]]


def split_regex(pre):
    """One regex that splits text as the pre_tokenizer of a tokenizer.json does; None for unknown kinds."""
    *first, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    use_regex = last.get("use_regex", True)
    if last["type"] != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    if not first:
        return GPT2_REGEX if use_regex else None
    rule = first[0]
    if rule["type"] == "Digits" and use_regex:
        return DIGITS_REGEX % ("" if rule.get("individual_digits") else "++")
    isolated = rule.get("behavior") == "Isolated" and not rule.get("invert")
    if rule["type"] == "Split" and isolated and not use_regex:
        return rule["pattern"].get("Regex")
    return None


def first_token(post):
    """The special token that the post_processor of a tokenizer.json puts before each text, or None."""
    for part in post.get("processors", [post]):
        if part.get("type") == "TemplateProcessing":
            return part["single"][0].get("SpecialToken", {}).get("id")
    return None


def tokenizer_from_json(path, ends=()):
    """Tokenizer from a Hugging Face tokenizer.json with byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2, ...);
    ends: what other files of the checkpoint call its EOS, ids or names. CheckpointError: what only the
    library `tokenizers` can do, or a damaged file."""
    try:
        return build_tokenizer(path, read_object(path), ends)
    except CheckpointError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        what = f"{type(e).__name__}: {e}"
        raise CheckpointError(f"{path}: not a byte-level BPE tokenizer.json ({what})") from None


def build_tokenizer(path, hf, ends):
    """tokenizer_from_json of the object hf; an error other than CheckpointError says that it is malformed."""
    # Around the vocabulary.
    norm, pre = hf.get("normalizer"), hf.get("pre_tokenizer")
    known = norm in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []})
    require(known, f"{path}: normalizer {norm} is not supported")
    regex = pre and split_regex(pre)
    require(regex, f"{path}: pre_tokenizer {json.dumps(pre)} is not supported")

    # The vocabulary: added tokens {name: id}, of which some are visible, and the others {bytes: id}.
    tokens = hf.get("added_tokens") or []
    added = added_ids(path, hf["model"]["vocab"], tokens)
    visible = [token["content"] for token in tokens if not token.get("special", True)]
    require(all(map(str.strip, visible)), f"{path}: added tokens made of white space are not supported")
    ranks, size = read_ranks(path, hf["model"], added)

    # tiktoken needs all 256 bytes: those that are missing get ids past the end, which `spell` drops.
    holes = [byte for byte in range(256) if bytes([byte]) not in ranks]
    require(not (holes and hf["model"].get("unk_token")), f"{path}: an unknown token is not supported")
    every_byte = dict(ranks)
    for i, byte in enumerate(holes):
        every_byte[bytes([byte])] = size + i
    try:
        enc = tiktoken.Encoding(str(path), pat_str=regex, special_tokens=added, mergeable_ranks=every_byte)
    except ValueError as e:
        raise CheckpointError(f"{path}: the pre_tokenizer's regex is not supported ({e})") from None
    tok = Tokenizer(enc, pre, norm == {"type": "NFC"}, Path(path).read_bytes(), visible, size, ends)
    bos = first_token(hf.get("post_processor") or {})
    if bos is not None:
        tok.bos_id = added[bos]

    # Tokens that are found in texts or placed by a template: the library would take white space with them.
    met = {*tok.visible.values(), *tok.steering(), tok.bos_id}
    for token in tokens:
        odd = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        require(not odd or token["id"] not in met,
                f"{path}: added token {token['content']!r} with {' and '.join(odd)} is not supported")

    # A regex that skips some text would lose it.
    probe = "".join(map(chr, range(256))) + " \u0394\u6f22 12345 it's  \r\n\n\t x"
    want = bytes(byte for byte in probe.encode() if byte not in holes)
    got = b"".join(tok.bytes_of[i] for i in tok.spell(probe))
    require(got == want, f"{path}: the pre_tokenizer's regex loses text")
    return tok


def added_ids(path, vocab, tokens):
    """{name: id} of a tokenizer.json's added tokens. CheckpointError: the library would read other ids."""
    added, free = {}, len(vocab)
    for token in tokens:
        # The library goes on from the first free id, whatever the file says.
        name, i = token["content"], token["id"]
        want = vocab.get(name, free)
        require(i == want, f"{path}: added token {name!r} has the id {i}, the library reads it as {want}")
        added[name], free = i, max(free, i + 1)
    return added


def read_ranks(path, model, added):
    """{bytes: id} of a tokenizer.json's model without its added tokens, and the number of ids.

    tiktoken knows no merge list: it joins the pair whose union has the lowest id. CheckpointError unless this
    rule, run on every token, ends with a merge the file lists, in the file's order."""
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
           if model.get(key)]
    require(model.get("type", "BPE") == "BPE" and not odd, f"{path}: not a byte-level BPE")
    byte_of = {char: byte for byte, char in byte_chars().items()}

    def spell(string):
        return bytes(byte_of[char] for char in string)

    ranks = {spell(name): i for name, i in model["vocab"].items() if name not in added}
    ids = [*ranks.values(), *added.values()]
    unique = len(set(ids)) == len(ids) and min(ids) >= 0 and max(ids) < 2**30
    require(unique, f"{path}: an id is out of range or used twice")

    # Merges stand in the order of the ids.
    merges, made = set(), []
    for pair in model["merges"]:
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        merges.add((spell(first), spell(second)))
        made.append(ranks[spell(first) + spell(second)])
    ordered = made == sorted(made)
    require(ordered, f"{path}: the order of the merges is not the order of the ids, which tiktoken needs")

    # Each token comes from one of them as tiktoken would make it.
    for token in ranks:
        parts = tuple(merge_parts(token, ranks))
        whole = model.get("ignore_merges") and len(parts) > 2     # looked up first, as tiktoken does
        require(len(token) == 1 or parts in merges or whole,
                f"{path}: token {token!r} does not come from a merge that tiktoken's rule would make")
    return ranks, max(ids) + 1


def tokenizer_to_json(tok):
    """The dict for a tokenizer.json that encodes as tok does; the merges are recovered from the ranks."""
    chars = byte_chars()

    def write(token):
        return "".join(chars[byte] for byte in token)

    # Oldest first.
    ranks = {token: i for token, i in tok.enc._mergeable_ranks.items() if i < tok.vocab_size}
    vocab, merges, added = {}, [], []
    for token in sorted(ranks, key=ranks.get):
        vocab[write(token)] = ranks[token]
        if len(token) > 1:
            parts = merge_parts(token, ranks)
            require(len(parts) == 2, f"{tok.enc.name}: has tokens that no merge makes")
            merges.append([write(part) for part in parts])
    for name, i in sorted(tok.special.items(), key=lambda both: both[1]):
        vocab[name] = i
        added.append({"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": i not in tok.bytes_of})
    return {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"} if tok.nfc else None,
            "pre_tokenizer": tok.pre, "post_processor": None, "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


# ------------------------------------------------------------------------------------------------------------
# The tokenizer of a checkpoint's folder, GPT-2's, and one from a rank file.


@functools.cache
def say_once(sentence):
    """Print a sentence, but only the first time."""
    print(sentence, flush=True)


def load_tokenizer(folder, vocab_size):
    """The Tokenizer of a checkpoint's folder (Path), with every EOS that its config files declare. Says once
    which chat template is taken if the checkpoint's own is another. CheckpointError: no tokenizer of ours."""
    def optional(name):
        return read_object(folder / name) if (folder / name).exists() else {}

    if not (folder / "tokenizer.json").exists():
        if vocab_size == 50257:
            return gpt2_tokenizer()
        slow = [name for name in ("vocab.json", "merges.txt", "tokenizer.model") if (folder / name).exists()]
        has = f"{' and '.join(slow)} but " if slow else ""
        raise CheckpointError(f"{folder}: has {has}no tokenizer.json; transformers makes it: "
                              "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")

    # Every EOS: a name in tokenizer_config.json, one id or several in the other two.
    settings, ends = optional("tokenizer_config.json"), []
    for eos in (settings.get("eos_token"), optional("config.json").get("eos_token_id"),
                optional("generation_config.json").get("eos_token_id")):
        if isinstance(eos, dict):
            eos = eos.get("content")
        ends += eos if isinstance(eos, list) else [eos]
    tok = tokenizer_from_json(folder / "tokenizer.json", ends)

    # The checkpoint's own template, in either of two places, with a word by which to know it, such as [INST].
    own = str(settings.get("chat_template") or "")
    if (folder / "chat_template.jinja").exists():
        own = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if own and tok.style.word not in own:
        words = re.findall(r"\[INST\]|<[|\uff5c][^<>]+[|\uff5c]>|<\w+>", own) or ["?"]
        say_once(f"{folder}: chats are written as {tok.template} ({tok.style.word}), not as in its own chat "
                 f"template ({words[0]})")
    return tok


def gpt2_tokenizer():
    """GPT-2's own tokenizer; tiktoken downloads it once, or reads it from the folder TIKTOKEN_CACHE_DIR."""
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except OSError as e:   # requests' errors are OSErrors
        raise CheckpointError(f"the GPT-2 vocabulary cannot be downloaded ({type(e).__name__}); set "
                              "TIKTOKEN_CACHE_DIR to a folder that has it") from None


def tokenizer_from_ranks(path):
    """Tokenizer from a tiktoken rank file: lines of base64(token), space, rank, from 0 up; <|endoftext|> and
    <|pad|> take the next two ids. CheckpointError names the line that is wrong."""
    ranks = {}
    try:
        for n, line in enumerate(Path(path).read_bytes().splitlines()):
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if int(rank) != n or token in ranks:
                raise ValueError
            ranks[token] = n
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError:
        raise CheckpointError(f"{path}:{n + 1}: expected a new token in base64 and the rank {n}") from None
    require(all(bytes([b]) in ranks for b in range(256)), f"{path}: not all of the 256 bytes are tokens")
    special = {"<|endoftext|>": len(ranks), "<|pad|>": len(ranks) + 1}
    enc = tiktoken.Encoding(str(path), pat_str=GPT2_REGEX, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(enc)
