"""Read the data files people bring: JSON in many shapes goes in, one of five plain row shapes comes out.

    rows, dropped = load("harmless-base.jsonl.gz", "preference")
    print(describe(rows, dropped, "harmless-base.jsonl.gz"))
    train, held_out = split(rows, fraction=0.1, seed=0)

The five kinds; MESSAGES is a list of {"role": "system" | "user" | "assistant", "content": str}:

    sft         {"messages": MESSAGES}                           the last message is the assistant's
    preference  {"prompt": MESSAGES, "chosen": str, "rejected": str, "label": float, "margin": float}
    prompt      {"prompt": MESSAGES, ...}                        further keys of the source row stay
    kto         {"prompt": MESSAGES, "completion": str, "label": bool}
    process     {"prompt": MESSAGES, "completions": [str], "labels": [float]}      the steps of one answer

A prompt ends in a user turn and is one list for both sides of a pair; "label" is P(chosen is preferred), and
never below 1/2: a row that says less has its sides exchanged. In an sft row an assistant message with a third
key, "train": False, is not to be trained on. Texts are stripped of surrounding space, and neighbouring turns
of one role become one turn with a blank line between. The steps of a process row give the answer when they
are put together as they are; a label is P(the step is right).

What a row is shows in its keys and values (the FORMATS table), never in the name of the file. A key that is
null or NaN counts as absent. A row that is well formed but of no use, such as an empty response, is dropped
and counted by reason; a malformed one is a DataError.
"""
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter

from data import InputError
from data.files.tokenizer import BLANK, MAX_BLANKS

KINDS = ("sft", "preference", "prompt", "kto", "process")
MAX_LINE = 16 * 2**20  # bytes; a longer .jsonl line is taken for damage
INVERTED = "the chosen answer scores below the rejected one"  # such rows are counted, and kept
# How a file begins that is not JSON: its first bytes -> what it is, and what to do.
NOT_JSON = {
    b"\x28\xb5\x2f\xfd": "a zstandard file; unpack it with zstd -d",
    b"\xfd7zXZ\0": "an xz file; unpack it with unxz",
    b"BZh": "a bzip2 file; unpack it with bunzip2",
    b"\x1f\x8b": "a gzip file inside a gzip file; unpack it once with gunzip",
    b"7z\xbc\xaf": "a 7z archive; unpack it with 7z x",
    b"PK\3\4": "a zip archive or a spreadsheet; unpack it, or save the sheet as JSON",
    b"PAR1": 'a parquet file; convert it: pandas.read_parquet(..).to_json(.., orient="records", lines=True)',
    b"ARROW1": "an arrow file; convert it: datasets.Dataset.from_file(..).to_json(..)",
    b"\xff\xff\xff\xff": "an arrow file; convert it: datasets.Dataset.from_file(..).to_json(..)",
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch them with git lfs pull",
    b"<": "a web page (HTML); fetch the file itself, on the hub by the link with /resolve/, not /blob/",
}


class DataError(InputError):
    """A file that cannot be used. The message starts with `path:line: `, or with `path: ` alone."""


class Malformed(Exception):
    """A row of wrong shape. Does not leave this file: `load` makes a DataError of it."""


class Unusable(Exception):
    """A well-formed row of no use, and why. Does not leave this file: `load` counts it."""


# ------------------------------------------ bytes -> (line, dict) -------------------------------------------

def read_rows(path):
    """Yield (line_number, dict) for every object of a .jsonl file or of a .json list, either may be gzipped.

    The content decides: gzip by its magic bytes, a list by "[" as the first character. Blank lines are
    skipped, one byte-order mark at the start is allowed, NaN is null. Lines count from 1; an object of a list
    has the line it starts on. Raises DataError at the first spot that is not a JSON object in UTF-8, or when
    the file cannot be read, is empty, or is no JSON file at all.
    """
    if str(path).lower().removesuffix(".gz").endswith((".csv", ".tsv")):  # their bytes do not tell
        raise DataError(f"{path}: expected a .json or .jsonl file, formats such as CSV are not supported")
    line, empty = 0, True
    try:
        with open(path, "rb") as disk:
            file = gzip.GzipFile(fileobj=disk) if disk.peek(2)[:2] == b"\x1f\x8b" else disk
            if file.peek(3)[:3] == b"\xef\xbb\xbf":  # a byte-order mark
                file.read(3)
            _refuse_other_files(path, file.peek(512))
            while raw := file.readline(MAX_LINE + 1):
                line += 1
                # A list is read whole, since its objects may span lines.
                if empty and raw.lstrip().startswith(b"["):
                    empty = False
                    yield from _list_rows(path, line, _decode(path, line, raw + file.read()))
                    break
                if len(raw) > MAX_LINE:
                    raise DataError(f"{path}:{line}: expected at most {MAX_LINE:,} bytes a line, found more")
                text = _decode(path, line, raw).strip()
                if text:
                    empty = False
                    row, end = _parse(path, line, text, 0)
                    if end < len(text):
                        raise DataError(f"{path}:{line}: expected one JSON object on the line, found more")
                    yield line, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise DataError(f"{path}:{line + 1}: expected a whole gzip file, this is cut off or damaged") from exc
    except OSError as exc:
        raise DataError(f"{path}: expected a readable file ({exc.strerror or exc})") from exc
    if empty:
        raise DataError(f"{path}: expected at least one JSON object, the file is empty")


def _refuse_other_files(path, start):
    """DataError if the first bytes of a file are those of another kind of file."""
    found = ""
    for magic, what in NOT_JSON.items():
        if magic in (start[:len(magic)], start.lstrip()[:len(magic)]):  # a page may begin with blank lines
            found = what
    if start[257:262] == b"ustar":  # which stands behind the name of a first file
        found = "a tar archive; unpack it with tar -xf"
    if found:
        raise DataError(f"{path}: expected JSON lines or a JSON list, found {found}")


def _decode(path, line, raw):
    """Bytes that start on line `line` -> str."""
    bad, found = raw.find(b"\0"), "a NUL byte"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        bad, found = exc.start, f"the byte 0x{raw[exc.start]:02x}"
    if bad >= 0:
        line += raw.count(b"\n", 0, bad)
        raise DataError(f"{path}:{line}: expected UTF-8 text, found {found}")
    if text.startswith("\ufeff"):
        raise DataError(f"{path}:{line}: expected at most one byte-order mark, where the file begins")
    return text


def _list_rows(path, line, text):
    """The text of a file that is one JSON list -> its rows, each with its own line."""
    at, mark = 0, "["
    gap = re.compile(r"\s*([][,]?)\s*")  # between objects: "[", "," or "]" with the space around it
    while True:
        found = gap.match(text, at)
        line, at = line + found[0].count("\n"), found.end()
        if mark == "," and found[1] == "]":
            break
        if found[1] != mark:
            raise DataError(f'{path}:{line}: expected "," or "]" after an object of the list')
        row, end = _parse(path, line, text, at)
        yield line, row
        # After the first object each gap is a comma, or the end.
        line, at, mark = line + text.count("\n", at, end), end, ","
    if at < len(text):
        raise DataError(f"{path}:{line}: expected the file to end with its list, found more text")


# NaN is how pandas writes a missing value. The other constants are Infinity and -Infinity.
DECODER = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))


def _parse(path, line, text, at):
    """The JSON object that starts at text[at], which lies on line `line` -> (dict, position behind it)."""
    try:
        row, end = DECODER.raw_decode(text, at)
    except json.JSONDecodeError as exc:
        line += text.count("\n", at, exc.pos)
        problem = f"expected one JSON object per line or a list of them ({exc.msg})"
        raise DataError(f"{path}:{line}: {problem}") from exc
    except (RecursionError, ValueError) as exc:  # thousands of brackets, or of digits
        raise DataError(f"{path}:{line}: expected a JSON object of sane size ({exc})") from exc
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line}: expected a JSON object, found {_name(row)}")
    return row, end


# --------------------------------------------- values, checked ----------------------------------------------

def _name(value):
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")  # int or float


def _get(row, key, types, expected, default=None):
    """row[key] if it is of these types. A key that is absent or null has the default, where there is one."""
    value = row.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        found = _name(value) if key in row else "no such key"
        raise Malformed(f'expected "{key}" to be {expected}, found {found}')
    return value


def _text(row, key, default=None):
    text = _get(row, key, str, "a string", default).strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell "\ud83d", half of an emoji, that no tokenizer can encode
        raise Unusable("half a character") from None
    if len(text) > MAX_BLANKS and BLANK.search(text):  # damage, which no tokenizer can split
        raise Unusable(f"run of {MAX_BLANKS:,} blanks")
    return text


def _number(row, key, low=-1e300, high=1e300, default=None):
    value = _get(row, key, (int, float), "a number", default)
    if not low <= value <= high:  # Infinity is too high for all
        raise Malformed(f'expected "{key}" to be between {low:g} and {high:g}, found another number')
    return float(value)


def _refuse_media(row):
    """Unusable for a row or a message that has more than text: the text alone would mean something else."""
    for key in ("image", "images", "video", "videos", "audio", "audios"):
        if row.get(key):
            raise Unusable("image, video or audio")


# ----------------------------------------- turns of a conversation ------------------------------------------

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),  # OpenAI renamed it
    **dict.fromkeys(("user", "human", "prompter"), "user"),  # ShareGPT, Open Assistant
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "tool_call", "tool_response", "tool_result", "function", "function_call",
                     "function_response", "observation", "ipython"), "tool"),  # these drop the row
}
TRAIN_KEYS = ("weight", "train", "training", "loss", "loss_weight")  # 0 or false: do not train on the message
# A role opens a paragraph. "Human:" inside a line, or after a single newline, is what a speaker wrote.
ROLE_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
TRANSCRIPT = re.compile(r"\n\n(?:Human|Assistant):|\s*Human:.*\n\nAssistant:", re.DOTALL)


def _turn(role, text):
    return {"role": role, "content": text}


def tidy(turns):
    """Turns -> those without empty system turns, where neighbours of one role are joined by a blank line.

    A joined turn is not trained on if one of its parts is not.
    """
    result = []
    for turn in turns:
        if result and result[-1]["role"] == turn["role"]:
            text = "\n\n".join(filter(None, [result[-1]["content"], turn["content"]]))
            result[-1] = {**result[-1], **turn, "content": text}
        elif turn["content"] or turn["role"] != "system":
            result.append(turn)
    return result


def turns_of_messages(messages):
    """A list of {"role", "content"} or ShareGPT {"from", "value"} -> turns, as many as there are messages."""
    # All roles come first: beside a tool call the text may be null.
    roles = [_role(message) for message in messages]
    turns = []
    for role, message in zip(roles, messages):
        turn = _turn(role, _content(message, "content" if message.get("from") is None else "value"))
        for key in TRAIN_KEYS:
            if message.get(key) not in (None, 0, 1):  # false equals 0, true equals 1
                raise Unusable("message weight other than 0 and 1")
            if message.get(key) == 0 and role == "assistant":
                turn["train"] = False
        turns.append(turn)
    return turns


def _role(message):
    """The role of a message. Unusable: it is or calls a tool, has more than text, or its role is unknown."""
    if not isinstance(message, dict):
        raise Malformed(f"expected every message to be an object, found {_name(message)}")
    name = _get(message, "role" if message.get("from") is None else "from", str, "a string")
    role = ROLES.get(name.lower())
    if role == "tool" or message.get("tool_calls") or message.get("function_call"):
        raise Unusable("tool turn")
    if role is None:
        raise Unusable(f"unknown role {json.dumps(name[:40])}")
    _refuse_media(message)
    return role


def _content(message, key):
    """The text of a message: a string, or a list of parts as OpenAI writes them, joined by newlines."""
    if not isinstance(message.get(key), list):
        return _text(message, key)
    texts = []
    for part in message[key]:
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, dict) or part.get("type") not in (None, "text", "input_text", "output_text"):
            raise Unusable("content that is not text")
        texts.append(_text(part, "text"))
    return "\n".join(texts).strip()


def turns_of_transcript(row, key):
    """The transcript "\\n\\nHuman: .. \\n\\nAssistant: .." under row[key] -> turns, one per role mark."""
    _text(row, key)
    before, *parts = ROLE_MARK.split(row[key])
    if before.strip():
        raise Malformed(f'expected "{key}" to be a transcript that starts with "Human:", found other text')
    return [_turn(ROLES[who.lower()], said.strip()) for who, said in zip(parts[::2], parts[1::2])]


def is_transcript(value):
    """True for a string that starts as an hh-rlhf transcript does."""
    return isinstance(value, str) and TRANSCRIPT.match(value) is not None


def turns_of_prompt(row):
    """row["prompt"] as a string, messages, or a transcript, whose open "Assistant:" is cut off -> turns."""
    value = _get(row, "prompt", (str, list), "a string or a list of messages")
    if isinstance(value, list):
        return turns_of_messages(value)
    if not is_transcript(value):
        return [_turn("user", _text(row, "prompt"))]
    turns = turns_of_transcript(row, "prompt")
    return turns[:-1] if turns[-1] == _turn("assistant", "") else turns


def turns_of_instruction(row):
    """row["instruction"] and, after a blank line, its "input" or "context" -> one user turn in a list."""
    more = _text(row, "input", default="") or _text(row, "context", default="")
    return [_turn("user", "\n\n".join(filter(None, [_text(row, "instruction"), more])))]


def with_context(row, prompt):
    """Prompt turns -> tidy turns after the system message and the history that the row has beside them."""
    system, history = [], []
    for key in ("system", "system_prompt"):
        if row.get(key) is not None:
            system.append(_turn("system", _content(row, key)))
    if system == prompt[:1]:  # it stands in both places
        system = []
    if row.get("history"):
        for one in _get(row, "history", list, "a list of [user, assistant] pairs or of messages"):
            if isinstance(one, list) and len(one) == 2:
                history += [_turn("user", one[0]), _turn("assistant", one[1])]
            else:
                history.append(one)
    return tidy(system + turns_of_messages(history) + prompt)


def continued(prompt, turns):
    """Prompt turns, and the messages that answer it and may repeat some of it first -> all turns."""
    # The messages may begin at any turn of the prompt.
    for start in range(len(prompt)):
        repeated = prompt[start:]
        if turns[:len(repeated)] == repeated:
            return prompt[:start] + turns
    # They may begin after it, which shows in another role, or long before it, as in UltraFeedback.
    if prompt and turns and turns[0]["role"] not in ("system", prompt[-1]["role"]):
        return prompt + turns
    if turns and not all(turn in turns for turn in prompt):
        raise Unusable("prompt differs from the messages")
    return turns


def before_answer(turns):
    """Turns -> {"prompt": tidy turns before the last assistant turn, "answer": that turn or None}."""
    turns = tidy(turns)
    for at in reversed(range(len(turns))):
        if turns[at]["role"] == "assistant":
            return {"prompt": turns[:at], "answer": turns[at]}
    return {"prompt": turns, "answer": None}


SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
          ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"))


def pair(chosen, rejected, row):
    """Turns of both sides of a comparison -> a preference row with label, margin and ceiling of `row`."""
    if not all(turns and turns[-1]["role"] == "assistant" for turns in (chosen, rejected)):
        raise Unusable("last turn is not the assistant's")
    # Before neighbours are joined: the sides may differ in one turn, the last.
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("differ in more than the last turn")
    chosen, rejected = tidy(chosen), tidy(rejected)
    if "train" in chosen[-1] or "train" in rejected[-1]:
        raise Unusable("answer not to be trained on")

    # Scores give the margin. Equal ones are a tie.
    label, margin = 1.0, 0.0
    for high, low in SCORES:
        if row.get(high) is not None and row.get(low) is not None:
            margin = _number(row, high) - _number(row, low)
            label = 0.5 if margin == 0 else 1.0
    label, margin = _number(row, "label", 0, 1, label), _number(row, "margin", default=margin)
    if label < 0.5:  # most prefer the other one
        chosen, rejected, label, margin = rejected, chosen, 1 - label, -margin
    found = {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"],
             "label": label, "margin": margin}
    if row.get("ceiling") is not None:  # the chance to guess this label right, where it is known
        found["ceiling"] = _number(row, "ceiling", 0, 1)
    return found


# --------------------------------------- one function for each format ---------------------------------------

def from_hh(row):
    """hh-rlhf {"chosen", "rejected"}: two whole transcripts."""
    return pair(turns_of_transcript(row, "chosen"), turns_of_transcript(row, "rejected"), row)


def from_hhh(row):
    """Anthropic's HHH comparisons {"text_correct", "text_incorrect"}: two whole transcripts."""
    return pair(turns_of_transcript(row, "text_correct"), turns_of_transcript(row, "text_incorrect"), row)


def from_preference(row):
    """{"chosen", "rejected"} as strings or messages, after "prompt", "instruction" or "conversations"."""
    sides = (row["chosen"], row["rejected"])
    bare = row.get("prompt") is None or is_transcript(row["prompt"])  # which the transcripts repeat
    if bare and all(isinstance(side, str) for side in sides) and any(is_transcript(side) for side in sides):
        return from_hh(row)
    prompt = []
    if row.get("prompt") is not None:
        prompt = turns_of_prompt(row)
    elif row.get("instruction") is not None:
        prompt = turns_of_instruction(row)
    elif row.get("conversations") is not None:
        prompt = turns_of_messages(_get(row, "conversations", list, "a list of messages"))
    return pair(_side(prompt, row, "chosen"), _side(prompt, row, "rejected"), row)


def _side(prompt, row, key):
    """Prompt turns, if any, and the answer under row[key] -> all turns of that side of the pair."""
    value = _get(row, key, (str, list, dict), "a string or a list of messages")
    if not isinstance(value, str):  # llama-factory has one message instead of a list
        return continued(prompt, turns_of_messages(value if isinstance(value, list) else [value]))
    if not prompt:
        raise Malformed(f'expected a "prompt" beside "{key}", found no such key')
    return prompt + [_turn("assistant", _text(row, key))]


def from_alpaca_eval(row):
    """AlpacaEval {"instruction", "output_1", "output_2", "preference"}: 1 is for output_1, 2 for output_2.

    Numbers between are soft labels, 1.5 and 0 are ties.
    """
    if row.get("preference") is None:
        raise Unusable("no preference given")
    preference = _number(row, "preference", 0, 2) or 1.5
    if preference < 1:
        raise Malformed('expected "preference" to be 0 or between 1 and 2, found another number')
    first = turns_of_instruction(row) + [_turn("assistant", _text(row, "output_1"))]
    second = turns_of_instruction(row) + [_turn("assistant", _text(row, "output_2"))]
    return pair(first, second, {"label": 2 - preference})  # P(output_1 preferred)


def from_tldr(row):
    """TL;DR {"info": {"subreddit", "title", "post"}, "summaries": two {"text"}, "choice": 0 | 1}."""
    info, summaries = _get(row, "info", dict, "an object"), _get(row, "summaries", list, "a list")
    choice = _get(row, "choice", int, "0 or 1")
    if choice not in (0, 1) or len(summaries) != 2 or not all(isinstance(one, dict) for one in summaries):
        raise Malformed('expected two objects in "summaries" and a "choice" of 0 or 1')
    if info.get("post") is None:  # the set also holds news articles, which have an "article" instead
        raise Unusable("no post")
    subreddit, title, post = _text(info, "subreddit"), _text(info, "title", default=""), _text(info, "post")
    text = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:" if post else ""
    sides = [[_turn("user", text), _turn("assistant", _text(summary, "text"))] for summary in summaries]
    return pair(sides[choice], sides[1 - choice], {})


def from_instruction(row):
    """Alpaca {"instruction", "input", "output"} or Dolly {"instruction", "context", "response"}."""
    key = "response" if row.get("output") is None and "response" in row else "output"
    return {"prompt": turns_of_instruction(row), "answer": _turn("assistant", _text(row, key))}


def tasks_of(row):
    """Self-instruct {"instruction", "instances": [{"input", "output"}, ..]} -> an alpaca row for each."""
    if row.get("instruction") is None or row.get("instances") is None:
        return [row]
    instances = _get(row, "instances", list, "a list of objects") or [{"output": ""}]  # none is counted too
    if not all(isinstance(one, dict) for one in instances):
        raise Malformed('expected "instances" to be a list of objects')
    return [{**row, "output": None, **one} for one in instances]


def from_messages(row):
    """{"messages": [{"role", "content"}, ..]} or ShareGPT {"conversations": [{"from", "value"}, ..]}."""
    key = "conversations" if row.get("messages") is None and "conversations" in row else "messages"
    return before_answer(turns_of_messages(_get(row, key, list, "a list of messages")))


def from_completion(row):
    """{"prompt", "completion"}, each a string or messages."""
    prompt = turns_of_prompt(row)
    if isinstance(_get(row, "completion", (str, list), "a string or a list of messages"), list):
        return before_answer(continued(prompt, turns_of_messages(row["completion"])))
    return {"prompt": prompt, "answer": _turn("assistant", _text(row, "completion"))}


def from_steps(row):
    """TRL's stepwise {"prompt", "completions": [str, ..], "labels": [true | false | number, ..]}.

    Steps that bring white space between them are put together as they are, others as lines. `load` turns
    labels from -1 to 1 into P(right).
    """
    steps = _get(row, "completions", list, "a list of strings")
    labels = _get(row, "labels", list, "a list of numbers, or of true and false")
    if len(labels) != len(steps):
        raise Malformed(f'expected as many "labels" as "completions", found {len(labels)} and {len(steps)}')
    steps = [{"completions": step} for step in steps]     # each as an object, which _text and _number read
    bare = [_text(step, "completions") for step in steps]
    for label in labels:
        if label is None:
            raise Unusable("a step without a label")
        if not isinstance(label, bool):
            _number({"labels": label}, "labels", -1, 1)
    if not steps or not all(bare):
        raise Unusable("empty response" if not any(bare) else "empty step")

    # White space before the first and behind the last step is none between steps.
    given = [step["completions"] for step in steps]
    text = "".join(given).strip()
    given[0], given[-1] = given[0].lstrip(), given[-1].rstrip()
    if len(text) == sum(map(len, bare)):
        given = bare[:1] + ["\n" + step for step in bare[1:]]
    return {"prompt": turns_of_prompt(row), "completions": given, "labels": [float(y) for y in labels]}


def from_red_team(row):
    """Red-team {"transcript"}: the first human turn is the prompt, what came of it is left out."""
    asked = [turn for turn in tidy(turns_of_transcript(row, "transcript")) if turn["role"] == "user"]
    return {"prompt": asked[:1]}


def from_prompt(row):
    """{"prompt"} as a string or messages. All other keys stay, since the gold judge needs them."""
    used = ("system", "system_prompt", "history")  # with_context makes turns of them
    rest = {key: row[key] for key in row if key not in used}
    return {**rest, "prompt": turns_of_prompt(row)}


FORMATS = [  # (the keys a row is known by, what it holds, how to read it); the first that fits is taken
    (("text_correct", "text_incorrect"), "preference", from_hhh),
    (("chosen", "rejected"), "preference", from_preference),  # hh-rlhf, UltraFeedback, TRL, llama-factory
    (("instruction", "output_1", "output_2"), "preference", from_alpaca_eval),
    (("info", "summaries", "choice"), "preference", from_tldr),
    (("messages",), "sft", from_messages),  # OpenAI
    (("conversations",), "sft", from_messages),  # ShareGPT
    (("prompt", "completion"), "sft", from_completion),  # TRL
    (("prompt", "completions", "labels"), "process", from_steps),  # TRL
    (("instruction", "output"), "sft", from_instruction),  # Alpaca
    (("instruction", "response"), "sft", from_instruction),  # Dolly
    (("transcript",), "prompt", from_red_team),
    (("prompt",), "prompt", from_prompt),
]  # an "sft" row with a verdict on its answer holds "kto"


# --------------------------------- the five kinds, and what a script calls ----------------------------------

# What a row holds -> the kinds that can be made of it, and a kind in words.
MAKES = {"sft": ("sft", "prompt"), "prompt": ("prompt",), "kto": ("kto", "sft", "prompt"),
         "preference": ("sft", "preference", "prompt", "kto"), "process": ("process", "prompt")}
NEEDS = {"sft": "a prompt with a response", "preference": "a prompt with a chosen and a rejected response",
         "prompt": "a prompt", "kto": "a prompt with a completion and a true or false label",
         "process": "a prompt with the steps of a response and a label for each"}


def _verdict(row):
    """Is the one answer of a row good? None: the row does not say. "kto_tag" is llama-factory's name."""
    for key in ("label", "kto_tag"):
        if row.get(key) is not None:
            return _get(row, key, bool, "true or false")
    return None


def _format_of(row, kind):
    """A row -> (what it holds, how to read it), by FORMATS. Malformed: no `kind` row can be made of it."""
    # The first format all of whose keys have a value.
    given = {key for key in row if row[key] is not None}
    fits = [(holds, reader) for keys, holds, reader in FORMATS if given.issuperset(keys)]
    holds, reader = fits[0] if fits else (None, None)
    if holds == "sft" and kind != "prompt" and _verdict(row) is not None:
        holds = "kto"
    if holds is not None and kind in MAKES[holds]:
        return holds, reader

    # One null may be all that is amiss: then the reader of its format says which.
    for keys, other, reader in FORMATS:
        missing = set(keys) - given
        if kind in MAKES[other] and len(missing) == 1 and missing.issubset(row):
            return other, reader
    if holds is not None:
        raise Malformed(f"expected {NEEDS[kind]} for {kind} rows, found {NEEDS[holds]} ({holds})")
    names = ", ".join(json.dumps(key[:40]) for key in list(row)[:8]) or "none"
    raise Malformed(f"expected the keys of a known format, such as prompt, messages or chosen, found {names}")


def convert(row, kind, notes=None):
    """One source row -> the list of rows of `kind` made of it (kto makes two of a pair).

    Raises Malformed, Unusable. A pair with INVERTED scores is counted in `notes`, a Counter, if there is one.
    """
    holds, reader = _format_of(row, kind)
    _refuse_media(row)
    found = reader(row)
    prompt = with_context(row, found["prompt"])

    # What every kind needs of a prompt.
    if not any(turn["content"] for turn in prompt if turn["role"] == "user"):
        raise Unusable("empty prompt")
    if prompt[-1]["role"] != "user":
        raise Unusable("prompt does not end in a user turn")
    if not all(turn["content"] for turn in prompt):
        raise Unusable("empty turn")

    # Only sft trains on turns of the prompt, and needs their "train" marks.
    if kind != "sft":
        prompt = [_turn(turn["role"], turn["content"]) for turn in prompt]
    if kind == "prompt":
        return [{**found, "prompt": prompt} if holds == "prompt" else {"prompt": prompt}]
    if kind == "process":
        return [{**found, "prompt": prompt}]
    if holds != "preference":
        return [_row_of_answer(prompt, found["answer"], _verdict(row), kind)]

    # A pair: its better answer is a demonstration, and for kto the other one a bad answer.
    label, chosen, rejected = found["label"], found["chosen"], found["rejected"]
    if kind == "sft":
        rows = [_row_of_answer(prompt, _turn("assistant", chosen), True, kind)]
    elif not chosen or not rejected:
        raise Unusable("empty response")
    elif chosen == rejected:
        raise Unusable("identical pair")
    elif kind == "preference":
        rows = [{**found, "prompt": prompt}]
    elif label == 0.5:
        raise Unusable("tie")
    else:
        rows = [{"prompt": prompt, "completion": chosen, "label": True},
                {"prompt": prompt, "completion": rejected, "label": False}]
    if notes is not None and found["margin"] < 0 and label > 0.5:
        notes[INVERTED] += 1
    return rows


def _row_of_answer(prompt, answer, good, kind):
    """Prompt turns, an answer turn or None, and if it is good (None: nobody says) -> an sft or a kto row."""
    if answer is None:
        raise Unusable("no assistant turn")
    if not answer["content"]:
        raise Unusable("empty response")
    trained = [turn for turn in prompt + [answer] if turn["role"] == "assistant" and "train" not in turn]
    if not trained or (kind == "kto" and "train" in answer):
        raise Unusable("answer not to be trained on")
    if kind == "kto":
        return {"prompt": prompt, "completion": answer["content"], "label": good}
    if good is False:
        raise Unusable("answer labelled bad")
    return {"messages": prompt + [answer]}


def load(path, kind, limit=None):
    """Load a file as rows of one of KINDS, in whatever format they are.

    Stops reading once `limit` rows are kept. Returns (rows, dropped): a list of dicts as shown at the top of
    this file, and a Counter {reason: source rows left out}, where INVERTED alone counts rows that are kept.
    An instance of a seed task is a source row. Raises DataError for a damaged file, a malformed row, a row of
    which no `kind` row can be made, and when no row is left; ValueError for a wrong kind or a limit below 1.
    """
    if kind not in KINDS or (limit is not None and limit < 1):
        raise ValueError(f"kind must be one of {KINDS} and limit at least 1, got {kind!r} and {limit!r}")
    rows, dropped = [], Counter()
    for line, row in read_rows(path):
        try:
            for task in tasks_of(row):
                try:
                    rows += convert(task, kind, dropped)
                except Unusable as reason:
                    dropped[str(reason)] += 1
        except Malformed as problem:
            raise DataError(f"{path}:{line}: {problem}") from None
        if limit is not None and len(rows) >= limit:
            rows = rows[:limit]
            break
    if not rows:
        raise DataError(f"{describe(rows, dropped, path)}, expected at least one usable {kind} row")
    return _as_chances(rows) if kind == "process" else rows, dropped


def _as_chances(rows):
    """Process rows -> the same, with P(right) as labels where the file has -1 for wrong, as PRM800K.

    Its 0, a step that is neither right nor wrong, becomes 1/2: the loss then draws the score there, so that a
    needless step costs an answer something, but less than a wrong one. In a file without -1, 0 is wrong.
    """
    if min(min(row["labels"]) for row in rows) >= 0:
        return rows
    return [{**row, "labels": [(label + 1) / 2 for label in row["labels"]]} for row in rows]


def describe(rows, dropped, path):
    """What `load` returned -> one line for the screen: rows kept, rows dropped, and why (eight reasons)."""
    lost = Counter(dropped)
    inverted = lost.pop(INVERTED, 0)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common(8))
    line = f"{path}: {len(rows):,} rows kept, {lost.total():,} dropped" + (f" ({reasons})" if reasons else "")
    return line + (f"; in {inverted:,} pairs {INVERTED}" if inverted else "")


def _prompt_of(row):
    return row["prompt"] if "prompt" in row else before_answer(row["messages"])["prompt"]


def split(rows, fraction, seed):
    """Rows of any kind -> (train, held_out) in the same order, with about `fraction` of the prompts held out.

    The side of a row depends on its prompt and the seed alone: rows with one prompt stay together, and more
    rows or another order move none. Only where few rows leave one side empty does a prompt go over to it.
    Raises ValueError unless 0 <= fraction <= 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction!r}")
    places = []
    for row in rows:
        # The hash of a prompt is the same on every machine, Python's hash() is not.
        text = json.dumps([seed, [(turn["role"], turn["content"]) for turn in _prompt_of(row)]])
        places.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48)  # in [0, 1)

    # Held out is what lies below the fraction: of two prompts or more at least one, and not all.
    border, different = fraction, sorted(set(places))
    if 0 < fraction < 1 and len(different) > 1:
        border = min(max(border, different[1]), different[-1])
    train = [row for row, place in zip(rows, places) if place >= border]
    held_out = [row for row, place in zip(rows, places) if place < border]
    return train, held_out


def prompts_of(rows, n):
    """The first n different prompts of rows of any kind."""
    prompts = []
    for row in rows:
        prompt = _prompt_of(row)
        if prompt and prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == n:
            break
    return prompts
