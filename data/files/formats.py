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

What a row is shows in its keys and values, never in the name of the file. A new format is a function that
reads a row, and a line of FORMATS. A key that is null or NaN counts as absent. A row that is well formed but
of no use, such as an empty response, is dropped and counted by reason; a malformed one is a DataError.
"""
import hashlib
import json
import re
from collections import Counter

from data.files.rows import NAMES, DataError, Malformed, Unusable, number_of, read_rows, text_of, value_of

KINDS = {      # in words, and the kinds of which such rows can be made
    "sft": ("a prompt with a response", ("sft", "kto", "preference")),
    "preference": ("a prompt with a chosen and a rejected response", ("preference",)),
    "prompt": ("a prompt", ("prompt", "sft", "kto", "preference", "process")),
    "kto": ("a prompt with a completion and a true or false label", ("kto", "preference")),
    "process": ("a prompt with the steps of a response and a label for each", ("process",))}
# What is said of rows that are kept; other reasons are why rows are dropped.
INVERTED = "kept, though the chosen answer scores below the rejected one"
THINKS = "kept, with the thoughts that stood beside an answer written before it, as <think>..</think>"
CHOSEN = "kept of a comparison: the chosen answer alone, as a demonstration"
MARKED = "kept, though a chat template's mark, %s, stands in the text and is read as letters; give bare texts"
UNREAD = 'kept, though "%s" is not read, since it is no %s'


# ------------------------------------------------------------------------------------------------------------
# Turns of a conversation: {"role", "content"}, of the assistant perhaps with "train": False and "thoughts".

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),                # OpenAI renamed it
    **dict.fromkeys(("user", "human", "prompter"), "user"),            # ShareGPT, Open Assistant
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "tool_call", "tool_response", "tool_result", "function", "function_call",
                     "function_response", "observation", "ipython"), "tool")}      # these drop the row
TRAIN_KEYS = ("weight", "train", "training", "loss", "loss_weight")    # 0 or false: not to be trained on
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")   # beside the content of an answer
# What a row or a message may hold beside its text; without it the text would mean something else.
NOT_TEXT = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "image, video or audio"),
    **dict.fromkeys(("tools", "functions", "documents"), "tools or documents beside the chat"),
    **dict.fromkeys(("tool_calls", "function_call"), "tool turn")}
EMPTY = (None, False, "", [], {}, "[]", "{}", "null")
# A role opens a paragraph. "Human:" inside a line, or after a single newline, is what a speaker wrote.
ROLE_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
TRANSCRIPT = re.compile(r"\n\n(?:Human|Assistant):|\s*Human:.*\n\nAssistant:", re.DOTALL)


def turn(role, text):
    """A turn of a conversation."""
    return {"role": role, "content": text}


def tidy(turns):
    """The turns without empty system turns, where neighbours of one role are joined by a blank line. A joined
    turn is not trained on if one of its parts is not."""
    result = []
    for one in turns:
        if result and result[-1]["role"] == one["role"]:
            text = "\n\n".join(filter(None, [result[-1]["content"], one["content"]]))
            result[-1] = {**result[-1], **one, "content": text}
        elif one["content"] or one["role"] != "system":
            result.append(one)
    return result


def only_text(row):
    """Unusable: a row or a message holds more than text."""
    for key, why in NOT_TEXT.items():
        if row.get(key) not in EMPTY:
            raise Unusable(why)


def turn_of(message):
    """A message {"role", "content"}, or ShareGPT's {"from", "value"}, as a turn. Unusable: it is or calls a
    tool, has no text or more than text, or its role is unknown."""
    if not isinstance(message, dict):
        raise Malformed(f"expected every message to be an object, found {NAMES[type(message)]}")
    who, what = ("role", "content") if message.get("from") is None else ("from", "value")
    name = value_of(message, who, str)
    role = ROLES.get(name.lower())
    if role is None:
        raise Unusable(f"unknown role {json.dumps(name[:40])}")
    if role == "tool":
        raise Unusable("tool turn")
    only_text(message)
    if message.get(what) is None:      # as beside a call of a tool
        raise Unusable("message without text")
    said = turn(role, content_of(message, what))
    if role != "assistant":
        return said

    # Whether an answer is to be trained on, and what was thought before it.
    for key in TRAIN_KEYS:
        if message.get(key) not in (None, 0, 1):       # false equals 0, true equals 1
            raise Unusable("message weight other than 0 and 1")
        if message.get(key) == 0:
            said["train"] = False
    for key in THOUGHTS:
        if message.get(key) not in EMPTY:
            said["thoughts"] = text_of(message, key)
    return said


def content_of(message, key):
    """The text of a message: a string, or a list of parts as OpenAI writes them, joined by newlines."""
    if not isinstance(message.get(key), list):
        return text_of(message, key)
    texts = []
    for part in message[key]:
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, dict) or part.get("type") not in (None, "text", "input_text", "output_text"):
            raise Unusable("content that is not text")
        texts.append(text_of(part, "text"))
    return "\n".join(texts).strip()


def turns_of_messages(row, key):
    """The list of messages under a key as turns."""
    return [turn_of(message) for message in value_of(row, key, list)]


def turns_of_transcript(row, key):
    """The transcript "\\n\\nHuman: .. \\n\\nAssistant: .." under a key as turns, one for each role mark."""
    text_of(row, key)      # which checks it
    before, *parts = ROLE_MARK.split(row[key])
    if before.strip():
        raise Malformed(f'expected "{key}" to be a transcript that starts with "Human:", found other text')
    return [turn(ROLES[who.lower()], said.strip()) for who, said in zip(parts[::2], parts[1::2])]


def is_transcript(value):
    """Whether a value is a string that begins as an hh-rlhf transcript does."""
    return isinstance(value, str) and TRANSCRIPT.match(value) is not None


def prompt_before(row):
    """The turns of a row's prompt: "prompt" as a string, messages, or a transcript, whose open "Assistant:"
    is cut off; else "conversations"; else "instruction" and after a blank line its "input" or "context"."""
    if row.get("prompt") is not None:
        if isinstance(value_of(row, "prompt", str, list), list):
            return turns_of_messages(row, "prompt")
        if not is_transcript(row["prompt"]):
            return [turn("user", text_of(row, "prompt"))]
        turns = turns_of_transcript(row, "prompt")
        return turns[:-1] if turns[-1] == turn("assistant", "") else turns
    if row.get("conversations") is not None:
        return turns_of_messages(row, "conversations")
    if row.get("instruction") is not None:
        more = text_of(row, "input", default="") or text_of(row, "context", default="")
        return [turn("user", "\n\n".join(filter(None, [text_of(row, "instruction"), more])))]
    return []


def conversation(row, key):
    """All turns of a row's prompt and of the answer under a key: a string, a message, or messages that may
    repeat some of the prompt first."""
    prompt, answer = prompt_before(row), value_of(row, key, str, list, dict)
    if isinstance(answer, str):
        if not prompt:
            raise Malformed(f'expected a "prompt" beside "{key}", found no such key')
        turns = [turn("assistant", text_of(row, key))]
    else:
        turns = turns_of_messages({key: answer if isinstance(answer, list) else [answer]}, key)

    # The messages may hold the whole prompt, perhaps with more before it, as in UltraFeedback; or its end; or
    # they go on after it, which shows in another role.
    if all(one in turns for one in prompt):
        return turns
    start = 0
    while turns[:len(prompt) - start] != prompt[start:]:
        start += 1
    if turns and start == len(prompt) and turns[0]["role"] in ("system", prompt[-1]["role"]):
        given = turns[0]["role"] == "assistant"        # the beginning of the answer
        raise Unusable("prompt does not end in a user turn" if given else "prompt differs from the messages")
    return prompt[:start] + turns


def with_context(row, prompt, notes):
    """A prompt (turns), tidied, after the system message and the history that its row has beside it."""
    before, history = [], []
    for key in ("system", "system_prompt"):
        if isinstance(row.get(key), (str, list)):
            before.append(turn("system", content_of(row, key)))
        elif row.get(key) is not None:
            notes.append(UNREAD % (key, "text"))
    if before == prompt[:1]:       # it stands in both places
        before = []
    if isinstance(row.get("history"), list):
        for one in row["history"]:     # pairs [user, assistant], or messages
            both = isinstance(one, list) and len(one) == 2
            history += [turn("user", one[0]), turn("assistant", one[1])] if both else [one]
    elif row.get("history") not in EMPTY:
        notes.append(UNREAD % ("history", "list of turns"))
    return tidy(before + turns_of_messages({"history": history}, "history") + prompt)


# ------------------------------------------------------------------------------------------------------------
# One function for each format. It is given a row and the keys that the format is known by, and returns
# (prompt, answers, more): turns; turns, none, one, or the better and the worse one; and a dict of what else
# such a row has, as a pair's label.


def before_answer(turns):
    """A conversation (turns): its last assistant turn is the answer, what follows it is left out."""
    turns = tidy(turns)
    for at in reversed(range(len(turns))):
        if turns[at]["role"] == "assistant":
            return turns[:at], [turns[at]], {}
    return turns, [], {}


SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
          ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"))


def pair(better, worse, row):
    """Two conversations (turns) that are compared, with the label, margin and ceiling of their row."""
    if not all(turns and turns[-1]["role"] == "assistant" for turns in (better, worse)):
        raise Unusable("last turn is not the assistant's")
    # Before neighbours are joined: the sides may differ in one turn, the last.
    if better[:-1] != worse[:-1]:
        raise Unusable("differ in more than the last turn")
    better, worse = tidy(better), tidy(worse)

    # Scores give the margin. Equal ones are a tie. A label of another kind, such as a topic, says nothing.
    label, margin = 1.0, 0.0
    for high, low in SCORES:
        if row.get(high) is not None and row.get(low) is not None:
            margin = number_of(row, high) - number_of(row, low)
            label = 0.5 if margin == 0 else 1.0
    margin = number_of(row, "margin", default=margin)
    if type(row.get("label")) in (int, float):
        label = number_of(row, "label", 0, 1)
    if label < 0.5:    # most prefer the other one
        better, worse, label, margin = worse, better, 1 - label, -margin
    more = {"label": label, "margin": margin}
    if row.get("ceiling") is not None:     # the chance to guess this label right, where it is known
        more["ceiling"] = number_of(row, "ceiling", 0, 1)
    return better[:-1], [better[-1], worse[-1]], more


def from_transcripts(row, keys):
    """Two whole transcripts: hh-rlhf {"chosen", "rejected"}, HHH {"text_correct", "text_incorrect"}."""
    better, worse = keys
    return pair(turns_of_transcript(row, better), turns_of_transcript(row, worse), row)


def from_preference(row, keys):
    """Two answers as strings or messages, after a prompt or with it; or two transcripts."""
    better, worse = keys
    bare = row.get("prompt") is None or is_transcript(row["prompt"])       # which transcripts repeat
    texts = isinstance(row[better], str) and isinstance(row[worse], str)
    if bare and texts and (is_transcript(row[better]) or is_transcript(row[worse])):
        return from_transcripts(row, keys)
    return pair(conversation(row, better), conversation(row, worse), row)


def from_alpaca_eval(row, keys):
    """AlpacaEval: "preference" 1 is for output_1, 2 for output_2; between are soft labels, 1.5 and 0 ties."""
    if row.get("preference") is None:
        raise Unusable("no preference given")
    preference = number_of(row, "preference", 0, 2) or 1.5
    if preference < 1:
        raise Malformed('expected "preference" to be 0 or between 1 and 2, found another number')
    _, first, second = keys
    return pair(conversation(row, first), conversation(row, second), {"label": 2 - preference})


def from_tldr(row, keys):
    """TL;DR {"info": {"subreddit", "title", "post"}, "summaries": two {"text"}, "choice": 0 | 1}."""
    info, summaries = value_of(row, "info", dict), value_of(row, "summaries", list)
    choice = value_of(row, "choice", int)
    if choice not in (0, 1) or [type(one) for one in summaries] != [dict, dict]:
        raise Malformed('expected two objects in "summaries" and a "choice" of 0 or 1')
    if info.get("post") is None:       # the set also holds news articles, which have an "article" instead
        raise Unusable("no post")
    subreddit, title = text_of(info, "subreddit"), text_of(info, "title", default="")
    post = text_of(info, "post")
    text = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:" if post else ""
    better, worse = text_of(summaries[choice], "text"), text_of(summaries[1 - choice], "text")
    answers = [turn("assistant", better), turn("assistant", worse)]
    return [turn("user", text)], answers, {"label": 1.0, "margin": 0.0}


def from_messages(row, keys):
    """A chat: OpenAI's "messages" or ShareGPT's "conversations"."""
    return before_answer(turns_of_messages(row, keys[0]))


def from_answer(row, keys):
    """A prompt and its answer: TRL {"prompt", "completion"}, Alpaca {"instruction", "input", "output"}, Dolly
    {"instruction", "context", "response"}."""
    return before_answer(conversation(row, keys[1]))


def tasks_of(row):
    """An alpaca row for each instance of a self-instruct seed task {"instruction", "instances": [{"input",
    "output"}, ..]}; any other row as it is."""
    instances = row.get("instances")
    if not isinstance(instances, list) or row.get("instruction") is None:
        return [row]
    if not all(isinstance(one, dict) for one in instances):
        raise Malformed('expected "instances" to be a list of objects')
    return [{**row, **one} for one in instances or [{"output": ""}]]       # none is counted too


def from_steps(row, keys):
    """TRL's stepwise {"prompt", "completions": [str, ..], "labels": [true | false | number, ..]}. Steps that
    bring white space between them are put together as they are, others as lines. `load` turns labels from -1
    to 1 into P(right)."""
    steps, labels = value_of(row, "completions", list), value_of(row, "labels", list)
    if len(labels) != len(steps):
        raise Malformed(f'expected as many "labels" as "completions", found {len(labels)} and {len(steps)}')
    bare, chances = [text_of({"completions": step}, "completions") for step in steps], []
    for label in labels:
        if label is None:
            raise Unusable("a step without a label")
        if isinstance(label, bool):
            label = int(label)
        chances.append(number_of({"labels": label}, "labels", -1, 1))
    if not bare or not all(bare):
        raise Unusable("empty step" if any(bare) else "empty response")

    # White space before the first and behind the last step is none between steps.
    steps[0] = steps[0].lstrip()
    steps[-1] = steps[-1].rstrip()
    if sum(map(len, steps)) == sum(map(len, bare)):
        steps = bare[:1] + ["\n" + step for step in bare[1:]]
    answer = turn("assistant", "".join(steps))
    return prompt_before(row), [answer], {"completions": steps, "labels": chances}


def from_red_team(row, keys):
    """Red-team {"transcript"}: the first human turn is the prompt, what came of it is left out."""
    asked = [one for one in tidy(turns_of_transcript(row, keys[0])) if one["role"] == "user"]
    return asked[:1], [], {}


def from_prompt(row, keys):
    """{"prompt"} as a string or messages. All other keys stay, since a judge may need them."""
    used = ("prompt", "system", "system_prompt", "history")        # with_context makes turns of them
    return prompt_before(row), [], {key: row[key] for key in row if key not in used}


FORMATS = [    # the keys that a row is known by, what it holds, its reader; the first that fits is taken
    (("text_correct", "text_incorrect"), "preference", from_transcripts),  # Anthropic's HHH
    (("chosen", "rejected"), "preference", from_preference),       # hh-rlhf, UltraFeedback, TRL
    (("instruction", "output_1", "output_2"), "preference", from_alpaca_eval),
    (("info", "summaries", "choice"), "preference", from_tldr),
    (("messages",), "sft", from_messages),                         # OpenAI
    (("conversations",), "sft", from_messages),                    # ShareGPT
    (("prompt", "completion"), "sft", from_answer),                # TRL
    (("prompt", "completions", "labels"), "process", from_steps),  # TRL
    (("instruction", "output"), "sft", from_answer),               # Alpaca
    (("instruction", "response"), "sft", from_answer),             # Dolly
    (("transcript",), "prompt", from_red_team),
    (("prompt",), "prompt", from_prompt),
]      # an "sft" row with a verdict on its answer holds "kto"


# ------------------------------------------------------------------------------------------------------------
# From a source row to rows of a kind.

VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# What a chat template writes around texts. A text that holds one was rendered already.
MARK = re.compile(r"<[|\uff5c][^<>\s]+[|\uff5c]>|\[/?INST\]|</s>|<(?:start|end)_of_turn>|"
                  r"### ?(?:Human|User|Assistant|Instruction|Response):")


def verdict_of(row, kind):
    """Whether the answer of a row is good, True or False; None where the row does not say. A "label" of
    another kind says nothing, and is Malformed only for kto, which needs one."""
    for key in ("label", "kto_tag"):       # the second is llama-factory's name
        value = row.get(key)
        verdict = VERDICTS.get(str(value).lower())
        if verdict is not None:
            return verdict
        if value is not None and kind == "kto":
            raise Malformed(f'expected "{key}" to be true or false, found {NAMES[type(value)]}')
    return None


def format_of(row, kind):
    """(keys, what the row holds, reader) by FORMATS. Malformed: no `kind` row can be made of it."""
    given = {key for key in row if row[key] is not None}
    for keys, holds, reader in FORMATS:
        if given.issuperset(keys):
            break
    else:
        raise Malformed("expected the keys of a known format, such as prompt, messages or chosen, found "
                        f"{names_of(row) or 'none'}")
    if holds == "sft" and kind != "prompt" and verdict_of(row, kind) is not None:
        holds = "kto"
    needed, made_of = KINDS[kind]
    if holds not in made_of:
        # A key that is mistyped stands among those that were not read.
        others = names_of(key for key in row if key not in keys)
        beside = f", and beside it {others}" if others else ""
        raise Malformed(f"expected {needed} for {kind} rows, found {KINDS[holds][0]} ({holds}){beside}")
    return keys, holds, reader


def names_of(keys):
    """Keys of a row in words, "" if there are none: at most eight."""
    return ", ".join(json.dumps(key[:40]) for key in list(keys)[:8])


def convert(row, kind):
    """The rows of a kind that are made of one source row (kto makes two of a pair), and a list of what has to
    be said of them. Malformed, Unusable: there are none."""
    keys, holds, reader = format_of(row, kind)
    only_text(row)
    (asked, answers, more), notes = reader(row, keys), []
    prompt = with_context(row, asked, notes)

    # What every kind needs of a prompt.
    if not any(one["content"] for one in prompt if one["role"] == "user"):
        raise Unusable("empty prompt")
    if prompt[-1]["role"] != "user":
        raise Unusable("prompt does not end in a user turn")
    if not all(one["content"] for one in prompt):
        raise Unusable("empty turn")

    # What has to be said.
    marks = MARK.findall("\n".join(one["content"] for one in prompt + answers))
    if marks:
        notes.append(MARKED % marks[0])
    if holds == "preference" and kind != "prompt" and more["margin"] < 0 and more["label"] > 0.5:
        notes.append(INVERTED)
    if holds == "preference" and kind == "sft":
        notes.append(CHOSEN)
    if any("thoughts" in answer for answer in answers) and kind != "prompt":
        notes.append(THINKS)

    # Thoughts are written into the answer alone. Templates leave out those of earlier turns, which are then
    # no example of an answer. Of the kinds sft alone trains on earlier turns, and needs their mark.
    earlier = []
    for one in prompt:
        earlier.append(turn(one["role"], one["content"]))
        if kind == "sft" and ("train" in one or "thoughts" in one):
            earlier[-1]["train"] = False

    if kind == "prompt" and holds != "prompt":
        more = {}
    if kind in ("prompt", "process"):
        return [{**more, "prompt": earlier}], notes
    if row.get("weight") == 0:
        raise Unusable("row of weight 0")
    goods = [True, False] if holds == "preference" else [verdict_of(row, kind)]
    return rows_of_answers(kind, earlier, list(map(with_thoughts, answers)), goods, more), notes


def rows_of_answers(kind, prompt, answers, goods, more):
    """The sft, preference or kto rows of a prompt and its answers (turns); goods: whether each answer is
    good, None where nobody says. Of a pair the better answer is a demonstration, the other one bad."""
    if kind == "sft":
        answers = answers[:1]
    if not answers:
        raise Unusable("no assistant turn")
    if not all(answer["content"] for answer in answers):
        raise Unusable("empty response")
    trained = [one for one in prompt + answers if one["role"] == "assistant" and "train" not in one]
    if not trained or (kind != "sft" and any("train" in answer for answer in answers)):
        raise Unusable("answer not to be trained on")
    if kind == "sft" and goods[0] is False:
        raise Unusable("answer labelled bad")
    if kind == "sft":
        return [{"messages": prompt + answers}]

    texts = [answer["content"] for answer in answers]
    if len(set(texts)) < len(texts):
        raise Unusable("identical pair")
    if kind == "preference":
        return [{"prompt": prompt, "chosen": texts[0], "rejected": texts[1], **more}]
    if more.get("label") == 0.5:
        raise Unusable("tie")
    return [{"prompt": prompt, "completion": text, "label": good} for text, good in zip(texts, goods)]


def with_thoughts(answer):
    """An answer (a turn) with its thoughts before the content, as Qwen3's template writes them."""
    rest = {key: answer[key] for key in answer if key != "thoughts"}
    if "thoughts" not in answer or not answer["content"] or "<think>" in answer["content"]:
        return rest
    return rest | {"content": f"<think>\n{answer['thoughts']}\n</think>\n\n{answer['content']}"}


# ------------------------------------------------------------------------------------------------------------
# What a script calls.


def load(path, kind, limit=None):
    """Load a file as rows of one of KINDS, in whatever format they are; stop once `limit` rows are kept.

    Returns (rows, dropped): a list of dicts as shown at the top of this file, and a Counter {reason: source
    rows left out}, where a reason that begins with "kept" counts rows that are not. An instance of a seed
    task is a source row. DataError: a damaged file, a malformed row, one of which no `kind` row can be made,
    or no row left. ValueError: a wrong kind, or a limit below 1."""
    if kind not in KINDS or (limit is not None and limit < 1):
        raise ValueError(f"kind must be one of {[*KINDS]} and limit at least 1, got {kind!r} and {limit!r}")
    rows, dropped = [], Counter()
    for place, row in read_rows(path):
        try:
            if not isinstance(row, dict):
                raise Malformed(f"expected a JSON object, found {NAMES[type(row)]}")
            for task in tasks_of(row):
                try:
                    made, notes = convert(task, kind)
                    rows += made
                    dropped.update(notes)
                except Unusable as reason:
                    dropped[str(reason)] += 1
        except Malformed as problem:
            raise DataError(f"{place}: {problem}") from None
        if limit is not None and len(rows) >= limit:
            rows = rows[:limit]
            break
    if not rows:
        raise DataError(f"{describe(rows, dropped, path)}, expected at least one usable {kind} row")
    return as_chances(rows) if kind == "process" else rows, dropped


def as_chances(rows):
    """Process rows with P(right) as labels, where the file has -1 for wrong, as PRM800K. Its 0, a step that
    is neither right nor wrong, becomes 1/2: the loss then draws the score there, so that a needless step
    costs an answer something, but less than a wrong one. In a file without -1, 0 is wrong."""
    if min(min(row["labels"]) for row in rows) >= 0:
        return rows
    return [{**row, "labels": [(label + 1) / 2 for label in row["labels"]]} for row in rows]


def describe(rows, dropped, path):
    """What `load` returned in a line for the screen: rows kept, rows dropped and why, and what is odd in rows
    that are kept (eight of each)."""
    notes = Counter({reason: n for reason, n in dropped.items() if reason.startswith("kept")})
    lost = dropped - notes
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in lost.most_common(8))
    line = f"{path}: {len(rows):,} rows kept, {lost.total():,} dropped" + (f" ({reasons})" if reasons else "")
    return "; ".join([line, *(f"{n:,} {note}" for note, n in notes.most_common(8))])


def as_messages(rows):
    """Preference rows with their answers as messages, as TRL's trainers take them; `load` reads both. TRL
    reads no "label": a tie is a win there, of a side that stands first by chance."""
    out = []
    for row in rows:
        answers = {key: [turn("assistant", row[key])] for key in ("chosen", "rejected")}
        out.append({**row, **answers})
    return out


def prompt_of(row):
    """The prompt (messages) of a row of any kind."""
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def split(rows, fraction, seed):
    """Rows of any kind as (train, held_out) in the same order, with about `fraction` of the talks held out.

    The side of a row depends on its first question and the seed alone: rows that begin alike stay together,
    since one that goes on trains on the answers of one that ends earlier. More rows or another order move
    none. Only where few rows leave one side empty does a question go over to it. ValueError unless
    0 <= fraction <= 1."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction!r}")
    places = []
    for row in rows:
        first = next(one["content"] for one in prompt_of(row) if one["role"] == "user")
        # The hash of a question is the same on every machine, Python's hash() is not.
        text = json.dumps([seed, [("user", first)]])
        digest = hashlib.sha256(text.encode()).digest()
        places.append(int.from_bytes(digest[:6], "big") / 2**48)       # in [0, 1)

    # Held out is what lies below the fraction: of two questions or more at least one, and not all.
    border, different = fraction, sorted(set(places))
    if 0 < fraction < 1 and len(different) > 1:
        border = min(max(border, different[1]), different[-1])
    train, held_out = [], []
    for row, place in zip(rows, places):
        (held_out if place < border else train).append(row)
    return train, held_out
