"""Read the data files people bring: JSON in many shapes goes in, one of four plain row shapes comes out.

    rows, dropped = load("harmless-base.jsonl.gz", "preference")
    print(describe(rows, dropped, "harmless-base.jsonl.gz"))
    train, held_out = split(rows, fraction=0.1, seed=0)

The four kinds; MESSAGES is a list of {"role": "system" | "user" | "assistant", "content": str}:

    sft         {"messages": MESSAGES}                           the last message is the assistant's
    preference  {"prompt": MESSAGES, "chosen": str, "rejected": str, "label": float, "margin": float}
    prompt      {"prompt": MESSAGES, ...}                        further keys of the source row stay
    kto         {"prompt": MESSAGES, "completion": str, "label": bool}

A prompt ends in a user turn and is one list for both sides of a pair; "label" is P(chosen is preferred). Every text is
stripped of surrounding whitespace, and neighbouring turns of one role become one turn with a blank line between.

What a row is shows in its keys and values (the FORMATS table), never in the name of the file. A row that is well formed
but of no use, such as an empty response, is dropped and counted by reason; a malformed one is a DataError.
"""
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter

from data import InputError

KINDS = ("sft", "preference", "prompt", "kto")
MAX_LINE = 16 * 2**20  # bytes; a longer .jsonl line is taken for damage
NOT_JSON = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".zip")


class DataError(InputError):
    """A file that cannot be used. The message starts with `path:line: `, or `path: ` when no line is to blame."""


class Malformed(Exception):
    """A row of wrong shape. Does not leave this file: `load` makes a DataError of it."""


class Unusable(Exception):
    """A well-formed row of no use, and why. Does not leave this file: `load` counts it."""


# ----------------------------------------------- bytes -> (line, dict) -----------------------------------------------

def read_rows(path):
    """Yield (line_number, dict) for every object of a .jsonl file or of a .json list, either one gzipped or not.

    The content decides: gzip by its magic bytes, a list by "[" as the first character. Blank lines are skipped, one
    byte-order mark at the start is allowed. Lines count from 1; an object of a list has the line it starts on.
    Raises DataError at the first spot that is not a JSON object in UTF-8, or when the file cannot be read or is empty.
    """
    if str(path).lower().removesuffix(".gz").endswith(NOT_JSON):
        raise DataError(f"{path}: expected a .json or .jsonl file (or .gz), formats such as CSV are not supported")
    line, empty = 0, True
    try:
        with open(path, "rb") as disk:
            file = gzip.GzipFile(fileobj=disk) if disk.peek(2)[:2] == b"\x1f\x8b" else disk
            if file.peek(3)[:3] == b"\xef\xbb\xbf":
                file.read(3)
            while raw := file.readline(MAX_LINE + 1):
                line += 1
                if empty and raw.lstrip().startswith(b"["):
                    found = _list_rows(path, line, _decode(path, line, raw + file.read()))
                elif len(raw) > MAX_LINE:
                    raise DataError(f"{path}:{line}: expected a line of at most {MAX_LINE:,} bytes, this one is longer")
                else:
                    found = _line_rows(path, line, _decode(path, line, raw).strip())
                for row in found:
                    empty = False
                    yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise DataError(f"{path}:{line + 1}: expected a whole gzip file, this one is cut off or damaged") from exc
    except OSError as exc:
        raise DataError(f"{path}: expected a readable file ({exc.strerror or exc})") from exc
    if empty:
        raise DataError(f"{path}: expected at least one JSON object, the file is empty")


def _decode(path, line, raw):
    """Bytes that start on line `line` -> str."""
    try:
        text = raw.decode("utf-8")
        bad, found = text.find("\0"), "a NUL byte"
        line += text.count("\n", 0, max(bad, 0))
    except UnicodeDecodeError as exc:
        bad, found = exc.start, f"the byte 0x{raw[exc.start]:02x}"
        line += raw.count(b"\n", 0, bad)
    if bad >= 0:
        raise DataError(f"{path}:{line}: expected UTF-8 text, found {found}")
    if text.startswith("\ufeff"):
        raise DataError(f"{path}:{line}: expected at most one byte-order mark, at the start of the file, found another")
    return text


def _line_rows(path, line, text):
    """A stripped .jsonl line -> its one row, or none when it is blank."""
    if text:
        row, end = _parse(path, line, text, 0)
        if end < len(text):
            raise DataError(f"{path}:{line}: expected one JSON object on the line, found more text after it")
        yield line, row


def _list_rows(path, line, text):
    """The text of a file that is one JSON list -> its rows, each with its own line."""
    at, mark, gap = 0, "[", re.compile(r"\s*([][,]?)\s*")  # a gap is "[", "," or "]" with the space around it
    while True:
        found = gap.match(text, at)
        line, at = line + found[0].count("\n"), found.end()
        if mark == "," and found[1] == "]":
            break
        if found[1] != mark:
            raise DataError(f'{path}:{line}: expected "," or "]" after an object of the list')
        row, end = _parse(path, line, text, at)
        yield line, row
        line, at, mark = line + text.count("\n", at, end), end, ","
    if at < len(text):
        raise DataError(f"{path}:{line}: expected the file to end with its list, found more text")


def _parse(path, line, text, at):
    """The JSON object that starts at text[at], which lies on line `line` -> (dict, position behind it)."""
    try:
        row, end = json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as exc:
        line += text.count("\n", at, exc.pos)
        raise DataError(f"{path}:{line}: expected one JSON object per line or a list of them ({exc.msg})") from exc
    except (RecursionError, ValueError) as exc:  # thousands of brackets, or of digits
        raise DataError(f"{path}:{line}: expected a JSON object of sane size ({exc})") from exc
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line}: expected a JSON object, found {_name(row)}")
    return row, end


# -------------------------------------------------- values, checked ---------------------------------------------------

def _name(value):
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _get(row, key, types, expected):
    value = row.get(key)
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise Malformed(f'expected "{key}" to be {expected}, found {_name(value) if key in row else "no such key"}')
    return value


def _text(row, key):
    text = _get(row, key, str, "a string").strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell "\ud83d", half of an emoji, that no tokenizer can encode
        raise Unusable("half a character") from None
    return text


def _number(row, key, low=-1e300, high=1e300):
    value = _get(row, key, (int, float), "a number")
    if not low <= value <= high:  # not `value < low or ..`, so that NaN fails too
        raise Malformed(f'expected "{key}" to be between {low:g} and {high:g}, found another number')
    return float(value)


# ----------------------------------------------- turns of a conversation ----------------------------------------------

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# A role opens a paragraph. "Human:" inside a line, or after a single newline, is something that a speaker wrote.
ROLE_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
TRANSCRIPT = re.compile(r"\n\n(?:Human|Assistant):|\s*Human:.*\n\nAssistant:", re.DOTALL)


def _turn(role, text):
    return {"role": role, "content": text}


def tidy(turns):
    """Turns -> new turns without empty system turns, where neighbours of one role are joined by a blank line."""
    result = []
    for role, text in ((turn["role"], turn["content"]) for turn in turns):
        if result and result[-1]["role"] == role:
            text = "\n\n".join(filter(None, [result.pop()["content"], text]))
        if text or role != "system":
            result.append(_turn(role, text))
    return result


def turns_of_messages(messages):
    """A list of {"role", "content"} or ShareGPT {"from", "value"} -> turns, as many as there are messages."""
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise Malformed(f"expected every message to be an object, found {_name(message)}")
        role, content = ("from", "value") if "from" in message else ("role", "content")
        who = _get(message, role, str, "a string").lower()
        if who in ("tool", "function"):
            raise Unusable("tool turn")
        if who not in ROLES:
            raise Malformed(f'expected "{role}" to be one of {", ".join(ROLES)}, found {json.dumps(who[:40])}')
        turns.append(_turn(ROLES[who], _text(message, content)))
    return turns


def turns_of_transcript(row, key):
    """The hh-rlhf transcript "\\n\\nHuman: .. \\n\\nAssistant: .." under row[key] -> turns, one per role mark."""
    _text(row, key)
    before, *parts = ROLE_MARK.split(row[key])
    if before.strip():
        raise Malformed(f'expected "{key}" to be a transcript that starts with "Human:", found other text first')
    return [_turn(ROLES[who.lower()], said.strip()) for who, said in zip(parts[::2], parts[1::2])]


def is_transcript(value):
    """True for a string that starts as an hh-rlhf transcript does."""
    return isinstance(value, str) and TRANSCRIPT.match(value) is not None


def turns_of_prompt(row):
    """row["prompt"] as a string, a transcript (an open "Assistant:" at its end is cut off) or messages -> turns."""
    value = _get(row, "prompt", (str, list), "a string or a list of messages")
    if isinstance(value, list):
        return turns_of_messages(value)
    if not is_transcript(value):
        return [_turn("user", _text(row, "prompt"))]
    turns = turns_of_transcript(row, "prompt")
    return turns[:-1] if turns[-1] == _turn("assistant", "") else turns


def turns_of_instruction(row, context="input"):
    """row["instruction"] and, after a blank line, its input when there is one -> one user turn in a list."""
    more = _text(row, context) if row.get(context) is not None else ""
    return [_turn("user", "\n\n".join(filter(None, [_text(row, "instruction"), more])))]


def cut(turns):
    """Turns -> {"prompt": tidy turns before the last assistant turn, "completion": its text, None without one}."""
    turns = tidy(turns)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    return {"prompt": turns[:last], "completion": None if last is None else turns[last]["content"]}


def pair(chosen, rejected, row):
    """Turns of both sides of a comparison -> a preference row with the "label" and "margin" of `row`, if it has them.

    The sides are compared before neighbours are joined: they may differ in one turn, the last.
    """
    if not all(turns and turns[-1]["role"] == "assistant" for turns in (chosen, rejected)):
        raise Unusable("last turn is not the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("differ in more than the last turn")
    *prompt, last = tidy(chosen)
    return {"prompt": prompt, "chosen": last["content"], "rejected": tidy(rejected)[-1]["content"],
            "label": _number(row, "label", 0, 1) if "label" in row else 1.0,
            "margin": _number(row, "margin") if "margin" in row else 0.0,
            **({"ceiling": _number(row, "ceiling", 0, 1)} if "ceiling" in row else {})}


# ------------------------------------------ one function for each format ----------------------------------------------

def from_hh(row):
    """hh-rlhf {"chosen", "rejected"}: two whole transcripts."""
    return pair(turns_of_transcript(row, "chosen"), turns_of_transcript(row, "rejected"), row)


def from_hhh(row):
    """Anthropic's HHH comparisons {"text_correct", "text_incorrect"}: two whole transcripts."""
    return from_hh({"chosen": row["text_correct"], "rejected": row["text_incorrect"]})


def from_preference(row):
    """{"chosen", "rejected"} as strings or messages, the prompt in "prompt", in "instruction" or in the messages.

    The margin of UltraFeedback is "score_chosen" - "score_rejected".
    """
    prompt = None
    if row.get("prompt") is not None:
        prompt = turns_of_prompt(row)
    elif "instruction" in row:
        prompt = turns_of_instruction(row)
    if "margin" not in row and "score_chosen" in row and "score_rejected" in row:
        row = {**row, "margin": _number(row, "score_chosen") - _number(row, "score_rejected")}
    return pair(_side(prompt, row, "chosen"), _side(prompt, row, "rejected"), row)


def _side(prompt, row, key):
    """Prompt turns or None, and the answer under row[key] -> all turns of that side of the pair."""
    value = _get(row, key, (str, list), "a string or a list of messages")
    if isinstance(value, str):
        if prompt is None:
            raise Malformed(f'expected a "prompt" beside "{key}", found no such key')
        return prompt + [_turn("assistant", _text(row, key))]
    turns = turns_of_messages(value)
    if prompt and turns and turns[0]["role"] == "assistant":  # the answer alone
        return prompt + turns
    if prompt and prompt[-1] not in turns:  # the whole conversation, as in UltraFeedback, but another one
        raise Unusable("prompt differs from the messages")
    return turns


def from_alpaca_eval(row):
    """AlpacaEval {"instruction", "output_1", "output_2", "preference"}: 1 is for output_1, 2 for output_2.

    Numbers between are soft labels, 1.5 and 0 are ties. "chosen" is the output with P(preferred) >= 0.5.
    """
    if row["preference"] is None:
        raise Unusable("no preference given")
    preference = _number(row, "preference", 0, 2) or 1.5
    if preference < 1:
        raise Malformed('expected "preference" to be 0 or between 1 and 2, found another number')
    first, second = (turns_of_instruction(row) + [_turn("assistant", _text(row, f"output_{i}"))] for i in (1, 2))
    label = 2 - preference  # P(output_1 preferred)
    return pair(first, second, {"label": label}) if label >= 0.5 else pair(second, first, {"label": 1 - label})


def from_tldr(row):
    """TL;DR comparisons {"info": {"subreddit", "title", "post"}, "summaries": two {"text"}, "choice": 0 | 1}."""
    info, summaries = _get(row, "info", dict, "an object"), _get(row, "summaries", list, "a list")
    choice = _get(row, "choice", int, "0 or 1")
    if choice not in (0, 1) or len(summaries) != 2 or not all(isinstance(one, dict) for one in summaries):
        raise Malformed('expected two objects in "summaries" and a "choice" of 0 or 1')
    if info.get("post") is None:  # the set also holds news articles, which have an "article" instead
        raise Unusable("no post")
    subreddit, title, post = (_text(info, key) for key in ("subreddit", "title", "post"))
    prompt = _turn("user", f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:" if post else "")
    sides = [[prompt, _turn("assistant", _text(summary, "text"))] for summary in summaries]
    return pair(sides[choice], sides[1 - choice], {})


def from_alpaca(row):
    """Alpaca {"instruction", "input", "output"}."""
    return {"prompt": turns_of_instruction(row), "completion": _text(row, "output")}


def from_dolly(row):
    """Dolly {"instruction", "context", "response"}."""
    return {"prompt": turns_of_instruction(row, "context"), "completion": _text(row, "response")}


def from_seed_task(row):
    """Self-instruct {"instruction", "instances": [{"input", "output"}, ..]} -> one alpaca row for each instance."""
    instances = _get(row, "instances", list, "a list of objects") or [{"output": ""}]
    if not all(isinstance(one, dict) for one in instances):
        raise Malformed('expected "instances" to be a list of objects')
    return [{"instruction": row["instruction"], "output": None, **one} for one in instances]


def from_messages(row):
    """{"messages": [{"role", "content"}, ..]} or ShareGPT {"conversations": [{"from", "value"}, ..]}."""
    key = "messages" if "messages" in row else "conversations"
    return cut(turns_of_messages(_get(row, key, list, "a list of messages")))


def from_completion(row):
    """{"prompt", "completion"}, each a string or messages."""
    prompt = turns_of_prompt(row)
    if isinstance(_get(row, "completion", (str, list), "a string or a list of messages"), list):
        return cut(prompt + turns_of_messages(row["completion"]))
    return {"prompt": tidy(prompt), "completion": _text(row, "completion")}


def from_kto(row):
    """{"prompt", "completion", "label": true | false}."""
    return {**from_completion(row), "label": _get(row, "label", bool, "true or false")}


def from_red_team(row):
    """Red-team {"transcript"}: the first human turn is the prompt, what came of it is left out."""
    return {"prompt": [turn for turn in tidy(turns_of_transcript(row, "transcript")) if turn["role"] == "user"][:1]}


def from_prompt(row):
    """{"prompt"} as a string or messages. All other keys stay, since the gold judge needs them."""
    return {**row, "prompt": tidy(turns_of_prompt(row))}


def _has(*keys):
    return lambda row: all(key in row for key in keys)


def _is_hh(row):
    sides = [row.get("chosen"), row.get("rejected")]
    bare = row.get("prompt") is None or is_transcript(row["prompt"])
    return bare and all(isinstance(side, str) for side in sides) and any(map(is_transcript, sides))


FORMATS = [  # (what a row is known by, the kind of row it holds, how to convert it); the first that fits is taken
    (_is_hh, "preference", from_hh),
    (_has("text_correct", "text_incorrect"), "preference", from_hhh),
    (_has("chosen", "rejected"), "preference", from_preference),
    (_has("instruction", "output_1", "output_2", "preference"), "preference", from_alpaca_eval),
    (_has("info", "summaries", "choice"), "preference", from_tldr),
    (_has("messages"), "sft", from_messages),
    (_has("conversations"), "sft", from_messages),
    (_has("prompt", "completion", "label"), "kto", from_kto),
    (_has("prompt", "completion"), "sft", from_completion),
    (_has("instruction", "output"), "sft", from_alpaca),
    (_has("instruction", "response"), "sft", from_dolly),
    (_has("transcript"), "prompt", from_red_team),
    (_has("prompt"), "prompt", from_prompt),
]


# --------------------------------------- the four kinds, and what a script calls --------------------------------------

MAKES = {"preference": KINDS, "sft": ("sft", "prompt"), "kto": ("kto", "prompt"), "prompt": ("prompt",)}
NEEDS = {"sft": "a prompt with a response", "preference": "a prompt with a chosen and a rejected response",
         "prompt": "a prompt", "kto": "a prompt with a completion and a true or false label"}


def convert(row, kind):
    """One source row -> the list of rows of `kind` made of it (kto makes two of a pair). Raises Malformed, Unusable."""
    holds, converter = next(((holds, converter) for known, holds, converter in FORMATS if known(row)), (None, None))
    if holds is None:
        keys = ", ".join(json.dumps(key[:40]) for key in list(row)[:8]) or "none"
        raise Malformed(f"expected the keys of a known format, such as prompt, messages or chosen, found {keys}")
    if kind not in MAKES[holds]:
        raise Malformed(f"expected {NEEDS[kind]} for {kind} rows, found {NEEDS[holds]} ({holds})")
    row = converter(row)
    prompt = row["prompt"]
    if not any(turn["content"] for turn in prompt if turn["role"] == "user"):
        raise Unusable("empty prompt")
    if prompt[-1]["role"] != "user":
        raise Unusable("prompt does not end in a user turn")
    if not all(turn["content"] for turn in prompt):
        raise Unusable("empty turn")
    if kind == "prompt":
        return [row if holds == "prompt" else {"prompt": prompt}]
    if kind == "sft":
        best = "completion" if holds == "sft" else "chosen" if row["label"] >= 0.5 else "rejected"
        return [{"messages": prompt + [_turn("assistant", _response(row[best]))]}]
    if holds == "kto":
        return [{**row, "completion": _response(row["completion"])}]
    if _response(row["chosen"]) == _response(row["rejected"]):
        raise Unusable("identical pair")
    if kind == "preference":
        return [row]
    if row["label"] == 0.5:
        raise Unusable("tie")  # neither response is good or bad
    return [{"prompt": prompt, "completion": row[side], "label": (row["label"] > 0.5) == (side == "chosen")}
            for side in ("chosen", "rejected")]


def _response(text):
    if not text:
        raise Unusable("no assistant turn" if text is None else "empty response")
    return text


def load(path, kind, limit=None):
    """Load a file as rows of one kind ("sft", "preference", "prompt" or "kto"), whatever format its rows are in.

    Stops reading once `limit` rows are kept. Returns (rows, dropped): a list of dicts as shown at the top of this file,
    and a Counter {reason: source rows left out}; each instance of a seed task counts as a source row.
    Raises DataError for a damaged file, a malformed row, a row that no `kind` row can be made of, and when no row is
    left; ValueError for an unknown kind or a limit below 1.
    """
    if kind not in KINDS or (limit is not None and limit < 1):
        raise ValueError(f"kind must be one of {', '.join(KINDS)} and limit at least 1, got {kind!r} and {limit!r}")
    rows, dropped = [], Counter()
    for line, row in read_rows(path):
        try:
            for one in from_seed_task(row) if "instances" in row and "instruction" in row else [row]:
                try:
                    rows += convert(one, kind)
                except Unusable as reason:
                    dropped[str(reason)] += 1
        except Malformed as problem:
            raise DataError(f"{path}:{line}: {problem}") from None
        if limit is not None and len(rows) >= limit:
            return rows[:limit], dropped
    if not rows:
        raise DataError(f"{describe(rows, dropped, path)}, expected at least one usable {kind} row")
    return rows, dropped


def describe(rows, dropped, path):
    """What `load` returned -> one line for the screen: how many rows were kept, how many dropped and why."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    return f"{path}: {len(rows):,} rows kept, {sum(dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")


def split(rows, fraction, seed):
    """Rows of any kind -> (train, held_out) in the same order, with about `fraction` of the prompts held out.

    The side of a row depends on its prompt and the seed alone: rows with one prompt stay together, and neither more
    rows nor another order moves any. Raises ValueError unless 0 <= fraction <= 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction!r}")
    train, held_out = [], []
    for row in rows:
        prompt = row["prompt"] if "prompt" in row else cut(row["messages"])["prompt"]
        text = json.dumps([seed, [(turn["role"], turn["content"]) for turn in prompt]])
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48  # uniform in [0, 1)
        (held_out if place < fraction else train).append(row)
    return train, held_out


def prompts_of(rows, n):
    """The first n different prompts of rows of any kind."""
    out = []
    for row in rows:
        prompt = row["prompt"] if "prompt" in row else cut(row["messages"])["prompt"]
        if prompt and prompt not in out:
            out.append(prompt)
        if len(out) == n:
            break
    return out
