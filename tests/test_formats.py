"""data/files/formats.py: every format by a small example, every known trap, damaged files, the real files
when present."""
import bz2
import gzip
import json
import lzma
import math
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.files.formats import (CHOSEN, INVERTED, KINDS, MARKED, THINKS, as_messages, convert,  # noqa: E402
                                describe, load, prompt_of, split)
from data.files.rows import DataError, read_rows  # noqa: E402

REAL = Path(os.environ.get("RLHF_DATA", ROOT.parent / "shared" / "data"))


def S(text):
    return {"role": "system", "content": text}


def U(text):
    return {"role": "user", "content": text}


def A(text, **mark):
    return {"role": "assistant", "content": text, **mark}


def G(who, text, **more):
    """A message as ShareGPT spells it."""
    return {"from": who, "value": text, **more}


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def save(folder, content, name="rows.jsonl"):
    """Bytes, or a list of rows, -> path of a file that holds them."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else jsonl(content))
    return path


def check(row, kind):
    """Is this exactly what data/files/formats.py promises of a row of this kind?"""
    keys = {"sft": {"messages"}, "preference": {"prompt", "chosen", "rejected", "label", "margin"},
            "prompt": {"prompt"}, "kto": {"prompt", "completion", "label"},
            "process": {"prompt", "completions", "labels"}}[kind]
    assert set(row) >= keys if kind == "prompt" else set(row) - {"ceiling"} == keys
    turns = row["messages"] if kind == "sft" else row["prompt"]
    for turn in turns:
        marked = kind == "sft" and turn["role"] == "assistant" and turn.get("train") is False
        assert set(turn) == {"role", "content"} | ({"train"} if marked else set())
        assert turn["role"] in ("system", "user", "assistant")
    if kind == "sft":
        assert any(turn["role"] == "assistant" and "train" not in turn for turn in turns)
    texts = ([turn["content"] for turn in turns]
             + [row[k] for k in ("chosen", "rejected", "completion") if k in keys])
    for text in texts:
        assert isinstance(text, str) and text and text == text.strip() and text.encode()
    assert all(one["role"] != two["role"] for one, two in zip(turns, turns[1:]))
    assert turns[-1]["role"] == ("assistant" if kind == "sft" else "user")
    assert any(turn["role"] == "user" for turn in turns)
    if kind == "preference":
        assert row["chosen"] != row["rejected"]
        assert type(row["label"]) is float and 0 <= row["label"] <= 1
        assert type(row["margin"]) is float and math.isfinite(row["margin"])
    if kind == "kto":
        assert type(row["label"]) is bool
    if kind == "process":
        text = "".join(row["completions"])
        assert text == text.strip() and all(step.strip() for step in row["completions"])
        assert len(row["labels"]) == len(row["completions"]) > 0
        assert all(type(label) is float and 0 <= label <= 1 for label in row["labels"])


def pref(prompt, chosen, rejected, label=1.0, margin=0.0):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": label, "margin": margin}


HH = {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
TLDR = {"info": {"id": "x", "subreddit": "cats", "title": "My cat", "post": "It sleeps.\n\nA lot."},
        "summaries": [{"text": " dog", "policy": "a"}, {"text": " cat sleeps"}], "choice": 1}
EVAL = {"instruction": "q", "output_1": "one", "output_2": "two", "generator_1": "m"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ANSWER = {"prompt": "a", "completion": "b"}
TALK = {"messages": [U("a"), A("b")]}
STEPS = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}
SHARED = {"conversations": [G("human", "a"), G("gpt", "b")]}

FORMATS = {
    "hh": (HH, "preference", [pref([U("hi")], "yes", "no")]),
    "hh, several turns": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"},
        "preference", [pref([U("a"), A("b"), U("c")], "d", "e")]),
    "hh, responses with a common start": (  # a character prefix would move "I do n" into the prompt
        {"chosen": "\n\nHuman: a\n\nAssistant: I do not", "rejected": "\n\nHuman: a\n\nAssistant: I do now"},
        "preference", [pref([U("a")], "I do not", "I do now")]),
    "hh, a role name inside a line is text": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b  Human: c\nAssistant: d",
         "rejected": "\n\nHuman: a\n\nAssistant: e"},
        "preference", [pref([U("a")], "b  Human: c\nAssistant: d", "e")]),
    "hh, turns that do not alternate are joined": (
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d",
         "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: e"},
        "preference", [pref([U("a\n\nb")], "c\n\nd", "c\n\ne")]),
    "hh, paragraphs stay in their turn": (
        {"chosen": "\n\nHuman: a\n\nb\n\nAssistant: c\n\nd", "rejected": "\n\nHuman: a\n\nb\n\nAssistant: e"},
        "preference", [pref([U("a\n\nb")], "c\n\nd", "e")]),
    "hh beside its own prompt": ({**HH, "prompt": "\n\nHuman: hi\n\nAssistant:"}, "preference",
                                 [pref([U("hi")], "yes", "no")]),
    "hh with label and margin": ({**HH, "label": 0.75, "margin": 2}, "preference",
                                 [pref([U("hi")], "yes", "no", 0.75, 2.0)]),
    "hh to sft": (HH, "sft", [{"messages": [U("hi"), A("yes")]}]),
    "hh to prompt": (HH, "prompt", [{"prompt": [U("hi")]}]),
    "hh to kto": (HH, "kto", [{"prompt": [U("hi")], "completion": "yes", "label": True},
                              {"prompt": [U("hi")], "completion": "no", "label": False}]),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": " 3 "},
        "sft", [{"messages": [U("Add.\n\n1 2"), A("3")]}]),
    "alpaca without input": (
        {"instruction": "Hi", "input": "", "output": "Yo"},
        "sft", [{"messages": [U("Hi"), A("Yo")]}]),
    "alpaca, null input": ({"instruction": "Hi", "input": None, "output": "Yo"}, "prompt",
                           [{"prompt": [U("Hi")]}]),
    "alpaca, a prompt needs no output": ({"instruction": "Hi", "output": ""}, "prompt",
                                         [{"prompt": [U("Hi")]}]),
    "alpaca with a pair": ({"instruction": "Hi", "input": "x", "output": "o", "chosen": "c", "rejected": "r"},
                           "preference", [pref([U("Hi\n\nx")], "c", "r")]),
    "dolly": ({"instruction": "Who?", "context": "Ann.", "response": "Ann", "category": "qa"}, "sft",
              [{"messages": [U("Who?\n\nAnn."), A("Ann")]}]),
    "seed task": (
        {"id": "s", "instruction": "Up",
         "instances": [{"input": "a", "output": "A"}, {"input": "", "output": "-"}]},
        "sft", [{"messages": [U("Up\n\na"), A("A")]}, {"messages": [U("Up"), A("-")]}]),
    "messages": ({"messages": [S("s"), U("a"), A("b"), U("c"), A("d")]}, "sft",
                 [{"messages": [S("s"), U("a"), A("b"), U("c"), A("d")]}]),
    "messages to prompt": (
        {"messages": [U("a"), A("b"), U("c"), A("d")]},
        "prompt", [{"prompt": [U("a"), A("b"), U("c")]}]),
    "messages without an answer to prompt": ({"messages": [S("s"), U("a")]}, "prompt",
                                             [{"prompt": [S("s"), U("a")]}]),
    "messages, what follows the last answer goes": ({"messages": [U("a"), A("b"), U("c")]}, "sft",
                                                    [{"messages": [U("a"), A("b")]}]),
    "messages, empty system": ({"messages": [S(" "), U("a"), A("b")]}, "sft",
                               [{"messages": [U("a"), A("b")]}]),
    "sharegpt": ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                                    {"from": "gpt", "value": "b"}]}, "sft",
                 [{"messages": [S("s"), U("a"), A("b")]}]),
    "completion": ({"prompt": "a", "completion": " b"}, "sft", [{"messages": [U("a"), A("b")]}]),
    "completion, lists": (
        {"prompt": [S("s"), U("a")], "completion": [A("b")]},
        "sft", [{"messages": [S("s"), U("a"), A("b")]}]),
    "completion, several turns": ({"prompt": "a", "completion": [A("b"), U("c"), A("d")]}, "sft",
                                  [{"messages": [U("a"), A("b"), U("c"), A("d")]}]),
    "pair of strings": ({"prompt": "a", "chosen": "b\n", "rejected": "\n c"}, "preference",
                        [pref([U("a")], "b", "c")]),
    "pair, an answer may look like a transcript": (
        {"prompt": "Write a chat", "chosen": "Human: x\n\nAssistant: y", "rejected": "no"}, "preference",
        [pref([U("Write a chat")], "Human: x\n\nAssistant: y", "no")]),
    "pair, soft": ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 0.25, "margin": -1}, "preference",
                   [pref([U("a")], "c", "b", 0.75, 1.0)]),
    "pair, soft, to kto": ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 0.25}, "kto",
                           [{"prompt": [U("a")], "completion": "c", "label": True},
                            {"prompt": [U("a")], "completion": "b", "label": False}]),
    "pair, soft, to sft": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "label": 0.25},
        "sft", [{"messages": [U("a"), A("c")]}]),
    "pair, transcript as prompt": (
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": "d", "rejected": "e"},
        "preference", [pref([U("a"), A("b"), U("c")], "d", "e")]),
    "pair, lists with explicit prompt": (
        {"prompt": [U("a"), A("b"), U("c")], "chosen": [A("d")], "rejected": [A("e")]},
        "preference", [pref([U("a"), A("b"), U("c")], "d", "e")]),
    "pair, lists with implicit prompt": ({"chosen": [U("a"), A("b"), U("c"), A("d")],
                                          "rejected": [U("a"), A("b"), U("c"), A("e")]},
                                         "preference", [pref([U("a"), A("b"), U("c")], "d", "e")]),
    "ultrafeedback": (
        {"prompt": "c", "prompt_id": "x", "messages": [U("c"), A("d")],
         "chosen": [U("a"), A("b"), U("c"), A("d")],
         "rejected": [U("a"), A("b"), U("c"), A("e")], "score_chosen": 8.5, "score_rejected": 6},
        "preference", [pref([U("a"), A("b"), U("c")], "d", "e", 1.0, 2.5)]),
    "ultrafeedback with a system message": (
        {"prompt": "a", "chosen": [S("s"), U("a"), A("d")], "rejected": [S("s"), U("a"), A("e")]},
        "preference", [pref([S("s"), U("a")], "d", "e")]),
    "tldr": (
        TLDR, "preference",
        [pref([U("SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It sleeps.\n\nA lot.\n\nTL;DR:")],
              "cat sleeps", "dog")]),
    "tldr, the first is chosen": (
        {**TLDR, "info": {"subreddit": "a", "title": "", "post": "p"}, "choice": 0}, "preference",
        [pref([U("SUBREDDIT: r/a\n\nTITLE: \n\nPOST: p\n\nTL;DR:")], "dog", "cat sleeps")]),
    "kto": (
        {"prompt": "a", "completion": "b", "label": False},
        "kto", [{"prompt": [U("a")], "completion": "b", "label": False}]),
    "kto, lists": ({"prompt": [U("a")], "completion": [A("b")], "label": True}, "kto",
                   [{"prompt": [U("a")], "completion": "b", "label": True}]),
    "kto to prompt": ({"prompt": "a", "completion": "b", "label": True}, "prompt", [{"prompt": [U("a")]}]),
    "alpaca eval, first": ({**EVAL, "preference": 1.0}, "preference", [pref([U("q")], "one", "two")]),
    "alpaca eval, second": ({**EVAL, "preference": 2}, "preference", [pref([U("q")], "two", "one")]),
    "alpaca eval, soft first": ({**EVAL, "preference": 1.25}, "preference",
                                [pref([U("q")], "one", "two", 0.75)]),
    "alpaca eval, soft second": ({**EVAL, "preference": 1.75}, "preference",
                                 [pref([U("q")], "two", "one", 0.75)]),
    "alpaca eval, tie": ({**EVAL, "preference": 1.5}, "preference", [pref([U("q")], "one", "two", 0.5)]),
    "alpaca eval, tie to sft": ({**EVAL, "preference": 1.5}, "sft", [{"messages": [U("q"), A("one")]}]),
    "alpaca eval, tie as 0": ({**EVAL, "preference": 0}, "preference", [pref([U("q")], "one", "two", 0.5)]),
    "red team": (
        {"transcript": "\n\nHuman: bad?\n\nAssistant: no\n\nHuman: go on", "rating": 1},
        "prompt", [{"prompt": [U("bad?")]}]),
    "prompt": ({"prompt": " a ", "family": "honest", "answer": ["x"]}, "prompt",
               [{"prompt": [U("a")], "family": "honest", "answer": ["x"]}]),
    "prompt, list": ({"prompt": [S("s"), U("a")], "id": 3}, "prompt",
                     [{"prompt": [S("s"), U("a")], "id": 3}]),
    "prompt, transcript": ({"prompt": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}, "prompt",
                           [{"prompt": [U("a"), A("b"), U("c")]}]),
    "prompt, transcript without an open turn": ({"prompt": "\n\nHuman: a"}, "prompt", [{"prompt": [U("a")]}]),
    # Null and NaN mean absent.
    "pair, nulls": ({**PAIR, "label": None, "margin": None, "ceiling": None, "system": None,
                     "score_chosen": None, "score_rejected": 3, "history": None, "images": None},
                    "preference", [pref([U("a")], "b", "c")]),
    "pair, NaN": ({**PAIR, "label": math.nan, "margin": math.nan},
                  "preference", [pref([U("a")], "b", "c")]),
    "pair, a null margin beside scores": (
        {**PAIR, "margin": None, "score_chosen": 3, "score_rejected": 1},
        "preference", [pref([U("a")], "b", "c", margin=2.0)]),
    "alpaca, NaN input": ({"instruction": "Hi", "input": math.nan, "output": "Yo"}, "sft",
                          [{"messages": [U("Hi"), A("Yo")]}]),
    "tldr, null title": (
        {**TLDR, "info": {"subreddit": "a", "title": None, "post": "p"}}, "preference",
        [pref([U("SUBREDDIT: r/a\n\nTITLE: \n\nPOST: p\n\nTL;DR:")], "cat sleeps", "dog")]),
    "messages, null names of ShareGPT": (
        {"messages": [{**U("a"), "from": None, "value": None}, {**A("b"), "from": None, "value": None}]},
        "sft", [TALK]),
    "sharegpt, null names of OpenAI": (
        {"conversations": [G("human", "a", role=None, content=None), G("gpt", "b", role=None, weight=None)]},
        "sft", [TALK]),
    "completion beside the null columns of all formats": (
        {**ANSWER, "chosen": None, "rejected": None, "messages": None, "conversations": None,
         "label": None, "kto_tag": None, "instances": None, "instruction": None, "transcript": None,
         "text_correct": None, "text_incorrect": math.nan},
        "sft", [TALK]),
    "messages beside null conversations": ({"conversations": None, "messages": [U("a"), A("b")]}, "sft",
                                           [TALK]),
    "conversations beside null messages": ({**SHARED, "messages": None},
                                           "sft", [TALK]),
    "hh beside a null prompt": ({**HH, "prompt": None, "margin": None}, "preference",
                                [pref([U("hi")], "yes", "no")]),
    "prompt beside a null answer": ({"prompt": "a", "completion": None}, "prompt",
                                    [{"prompt": [U("a")], "completion": None}]),
    "seed task beside nulls": (
        {"instruction": "Up", "instances": [{"input": None, "output": "A"}], "messages": None, "info": None},
        "sft", [{"messages": [U("Up"), A("A")]}]),
    # Names of roles
    "role developer": (
        {"messages": [{"role": "developer", "content": "s"}, {"role": "prompter", "content": "a"}, A("b")]},
        "sft", [{"messages": [S("s"), U("a"), A("b")]}]),
    # Content in parts
    "parts of text": (
        {"messages": [U([{"type": "text", "text": "Look: "}, {"type": "text", "text": "x?"}]),
                      A([{"type": "output_text", "text": " b "}])]},
        "sft", [{"messages": [U("Look:\nx?"), A("b")]}]),
    "parts that are strings, or say null": (
        {"prompt": [U(["a", {"type": "input_text", "text": "b", "image_url": None}])],
         "completion": [A([{"type": None, "text": "c"}, ""])]},
        "sft", [{"messages": [U("a\nb"), A("c")]}]),
    "a system message in parts": (
        {"system": [{"type": "text", "text": "s"}], "prompt": "a", "completion": "b"},
        "sft", [{"messages": [S("s"), U("a"), A("b")]}]),
    # What stands beside a prompt
    "alpaca with system and history": (
        {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]},
        "sft", [{"messages": [S("s"), U("a"), A("b"), U("c"), A("d")]}]),
    "alpaca with empty system and history": (
        {"instruction": "c", "input": "", "output": "d", "system": " ", "history": []},
        "sft", [{"messages": [U("c"), A("d")]}]),
    "pair with system": ({"system": "s", "prompt": "a", "chosen": "b", "rejected": "c"}, "preference",
                         [pref([S("s"), U("a")], "b", "c")]),
    "hh with system": ({**HH, "system_prompt": "s"}, "kto",
                       [{"prompt": [S("s"), U("hi")], "completion": "yes", "label": True},
                        {"prompt": [S("s"), U("hi")], "completion": "no", "label": False}]),
    "prompt with history in messages": (
        {"prompt": "c", "history": [U("a"), A("b", weight=0)], "system": "s", "id": 1},
        "prompt", [{"prompt": [S("s"), U("a"), A("b"), U("c")], "id": 1}]),
    "prompt with an empty history": ({"prompt": "c", "history": ""}, "prompt", [{"prompt": [U("c")]}]),
    "sharegpt with system and tools": (
        {**SHARED, "system": "s", "tools": "[]"},
        "sft", [{"messages": [S("s"), U("a"), A("b")]}]),
    "system in both places": ({"system": "s", "messages": [S(" s"), U("a"), A("b")]}, "sft",
                              [{"messages": [S("s"), U("a"), A("b")]}]),
    "another system in both places": ({"system": "s", "messages": [S("t"), U("a"), A("b")]}, "sft",
                                      [{"messages": [S("s\n\nt"), U("a"), A("b")]}]),
    "seed task with system": (
        {"system": "s", "instruction": "Up", "instances": [{"input": "a", "output": "A"}]},
        "sft", [{"messages": [S("s"), U("Up\n\na"), A("A")]}]),
    "pair, the sides begin after the system turn": (
        {"prompt": [S("s"), U("a")], "chosen": [U("a"), A("b")], "rejected": [U("a"), A("c")]},
        "preference", [pref([S("s"), U("a")], "b", "c")]),
    "pair, the sides begin in the middle of the prompt": (
        {"prompt": [S("s"), U("a"), A("b"), U("c")],
         "chosen": [U("c"), A("d")], "rejected": [A("b"), U("c"), A("e")]},
        "preference", [pref([S("s"), U("a"), A("b"), U("c")], "d", "e")]),
    "pair, one side repeats the prompt": (
        {"prompt": [S("s"), U("a")], "chosen": [S("s"), U("a"), A("b")], "rejected": [A("c")]},
        "preference", [pref([S("s"), U("a")], "b", "c")]),
    "completion that repeats the prompt": (
        {"prompt": [S("s"), U("a")], "completion": [U("a"), A("b")]},
        "sft", [{"messages": [S("s"), U("a"), A("b")]}]),
    "completion after a system turn": ({"prompt": [S("s")], "completion": [U("a"), A("b")]}, "sft",
                                       [{"messages": [S("s"), U("a"), A("b")]}]),
    "pair of llama-factory": (
        {"conversations": [G("human", "a")], "chosen": G("gpt", "b"), "rejected": G("gpt", "c"),
         "system": "s"},
        "preference", [pref([S("s"), U("a")], "b", "c")]),
    # Verdicts on an answer
    "kto of llama-factory": ({**TALK, "kto_tag": False, "label": None}, "kto",
                             [{"prompt": [U("a")], "completion": "b", "label": False}]),
    "kto to sft": ({**ANSWER, "label": True}, "sft", [TALK]),
    "kto, 1": ({**ANSWER, "label": 1}, "kto", [{"prompt": [U("a")], "completion": "b", "label": True}]),
    "kto, 0": ({**ANSWER, "label": 0.0}, "kto", [{"prompt": [U("a")], "completion": "b", "label": False}]),
    "kto, text": ({**TALK, "kto_tag": "False"}, "kto",
                  [{"prompt": [U("a")], "completion": "b", "label": False}]),
    "a label of another kind, as text": ({**ANSWER, "label": "positive"}, "sft", [TALK]),
    "a label of another kind, a number": ({**ANSWER, "label": 3}, "sft", [TALK]),
    "a label of another kind, a share": ({**ANSWER, "label": 0.7}, "sft", [TALK]),
    "a label of another kind, a list": ({**ANSWER, "label": ["a", "b"]}, "sft", [TALK]),
    "a pair's label of another kind": ({**PAIR, "label": "maths"}, "preference", [pref([U("a")], "b", "c")]),
    "a pair's label is a verdict": ({**PAIR, "label": True}, "preference", [pref([U("a")], "b", "c")]),
    "numbers as text": ({**PAIR, "score_chosen": "8.5", "score_rejected": "6"}, "preference",
                        [pref([U("a")], "b", "c", margin=2.5)]),
    "alpaca eval, a number as text": ({**EVAL, "preference": "2"}, "preference",
                                      [pref([U("q")], "two", "one")]),
    "a label does not matter to prompts": ({**TALK, "label": "maths"}, "prompt",
                                           [{"prompt": [U("a")]}]),
    # Turns that are not to be trained on
    "weight 0": ({"messages": [U("a"), A("b", weight=0), U("c"), A("d", weight=1)]}, "sft",
                 [{"messages": [U("a"), A("b", train=False), U("c"), A("d")]}]),
    "weight 0, the last turn": ({"messages": [U("a"), A("b"), U("c"), A("d", weight=0)]}, "sft",
                                [{"messages": [U("a"), A("b"), U("c"), A("d", train=False)]}]),
    "weight 0, turns that are joined": (
        {"messages": [U("a"), A("b"), A("c", weight=0), U("d"), A("e", train=False), A("f"), U("g"), A("h")]},
        "sft", [{"messages": [U("a"), A("b\n\nc", train=False), U("d"), A("e\n\nf", train=False), U("g"),
                              A("h")]}]),
    "weight 0 in a pair": (
        {"chosen": [U("a"), A("b", weight=0), U("c"), A("d")],
         "rejected": [U("a"), A("b", weight=0), U("c"), A("e")]},
        "preference", [pref([U("a"), A("b"), U("c")], "d", "e")]),
    "weight 0 in a pair, to sft": (
        {"chosen": [U("a"), A("b", weight=0), U("c"), A("d")],
         "rejected": [U("a"), A("b", weight=0), U("c"), A("e")]},
        "sft", [{"messages": [U("a"), A("b", train=False), U("c"), A("d")]}]),
    "weight 0 in the prompt of a verdict": (
        {"messages": [U("a"), A("b", weight=0), U("c"), A("d")], "label": True},
        "kto", [{"prompt": [U("a"), A("b"), U("c")], "completion": "d", "label": True}]),
    # Scores of a pair
    "a label beside equal scores": (
        {**PAIR, "label": 0.75, "score_chosen": 1, "score_rejected": 1},
        "preference", [pref([U("a")], "b", "c", 0.75, 0.0)]),
    "a label that goes with inverted scores": (
        {**PAIR, "label": 0.25, "score_chosen": 1, "score_rejected": 3},
        "preference", [pref([U("a")], "c", "b", 0.75, 2.0)]),
    "a tie of scores, to sft": ({**PAIR, "score_chosen": 1, "score_rejected": 1},
                                "sft", [TALK]),
    "pair with ceiling": ({**PAIR, "ceiling": 0.9}, "preference",
                          [{**pref([U("a")], "b", "c"), "ceiling": 0.9}]),
    "steps, TRL": (    # which bring the white space between them
        {"prompt": "Blue light", "completions": [" scatters more in air,", " so the sky is green."],
         "labels": [True, False]}, "process",
        [{"prompt": [U("Blue light")], "completions": ["scatters more in air,", " so the sky is green."],
          "labels": [1.0, 0.0]}]),
    "steps, Math-Shepherd": (    # lines without their ends; a step may have several
        {"prompt": "Tom has 3 pens and buys 2. How many?",
         "completions": ["Step 1: He has 3.0 pens.", "Step 2: 3 + 2 = 6.\n  That is all.",
                         "The answer is: 6"],
         "labels": [True, False, False], "index": 7}, "process",
        [{"prompt": [U("Tom has 3 pens and buys 2. How many?")],
          "completions": ["Step 1: He has 3.0 pens.", "\nStep 2: 3 + 2 = 6.\n  That is all.",
                          "\nThe answer is: 6"],
          "labels": [1.0, 0.0, 0.0]}]),
    "steps, PRM800K": (    # right, neither, wrong
        {"prompt": [S("s"), U("a")], "completions": ["b\n\n", "c\n\n", "d"], "labels": [1, 0, -1]}, "process",
        [{"prompt": [S("s"), U("a")], "completions": ["b\n\n", "c\n\n", "d"], "labels": [1.0, 0.5, 0.0]}]),
    "steps, 0 and 1": ({**STEPS, "labels": [1, 0]}, "process",
                       [{"prompt": [U("a")], "completions": ["b", "\nc"], "labels": [1.0, 0.0]}]),
    "steps, a transcript and chances": (
        {"prompt": "\n\nHuman: a\n\nAssistant:", "completions": [" b "], "labels": [0.25], "system": "s"},
        "process", [{"prompt": [S("s"), U("a")], "completions": ["b"], "labels": [0.25]}]),
    "steps to prompt": (STEPS, "prompt", [{"prompt": [U("a")]}]),
    "empty tool calls and images": (
        {"messages": [U("a"), A("b", tool_calls=[], function_call=None, images=[])], "images": [],
         "audio": ""},
        "sft", [TALK]),
    "prompt that only quotes a transcript": ({"prompt": "Judge this:\n\nHuman: a\n\nAssistant: b"}, "prompt",
                                             [{"prompt": [U("Judge this:\n\nHuman: a\n\nAssistant: b")]}]),
}
for who in ("chatgpt", "bing", "bard", "bot", "model", "ai", "GPT"):
    FORMATS[f"role {who}"] = ({"conversations": [G("HUMAN", "a"), G(who, "b")]}, "sft",
                              [TALK])
for key, value in (("train", False), ("training", False), ("loss", False), ("loss_weight", 0.0)):
    FORMATS[f"{key} {value}"] = (
        {"conversations": [G("human", "a", **{key: value}), G("gpt", "b", **{key: value}), G("human", "c"),
                           G("gpt", "d", **{key: True})]},
        "sft", [{"messages": [U("a"), A("b", train=False), U("c"), A("d")]}])
for high, low in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
                  ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating")):
    FORMATS[f"{high}, a tie"] = ({**PAIR, high: 8, low: 8.0}, "preference",
                                 [pref([U("a")], "b", "c", 0.5, 0.0)])
for answered in (TALK, {"conversations": [G("user", "a"), G("gpt", "b")]},
                 {"instruction": "a", "output": "b"}, {"instruction": "a", "response": "b"}):
    for good in (False, True):
        FORMATS[f"kto, {list(answered)}, {good}"] = (
            {**answered, "label": good}, "kto", [{"prompt": [U("a")], "completion": "b", "label": good}])


@pytest.mark.parametrize("name", FORMATS)
def test_format(tmp_path, name):
    source, kind, expected = FORMATS[name]
    rows, dropped = load(save(tmp_path, [source]), kind)
    of_pairs = kind == "sft" and any(source.get(key) is not None for key in ("chosen", "preference"))
    assert rows == expected and dropped == ({CHOSEN: len(rows)} if of_pairs else {})
    for row in rows:
        check(row, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_output_loads_as_itself(tmp_path, kind):
    rows = [row for source, k, expected in FORMATS.values() if k == kind for row in expected]
    assert len(rows) >= 4 and load(save(tmp_path, rows), kind) == (rows, Counter())


UNUSABLE = [
    # The beginning of an answer is given: with a blank line after it, it would be another answer.
    ({"prompt": [U("a"), A("It is")], "chosen": "late.", "rejected": "not."}, "preference",
     "prompt does not end in a user turn"),
    ({"prompt": [U("a"), A("It is")], "chosen": [A("late.")], "rejected": [A("not.")]}, "kto",
     "prompt does not end in a user turn"),
    ({"prompt": [U("a"), A("It is")], "completion": [A("late.")]}, "sft",
     "prompt does not end in a user turn"),
    ({**STEPS, "prompt": [U("a"), A("It is")]}, "process", "prompt does not end in a user turn"),
    ({**TALK, "tools": [{"type": "function"}]}, "sft", "tools or documents beside the chat"),
    ({**SHARED, "tools": '[{"name": "add"}]'}, "prompt", "tools or documents beside the chat"),
    ({**PAIR, "functions": [{"name": "add"}]}, "preference", "tools or documents beside the chat"),
    ({**ANSWER, "label": True, "documents": ["d"]}, "kto", "tools or documents beside the chat"),
    ({**TALK, "weight": 0}, "sft", "row of weight 0"),
    ({**PAIR, "weight": 0.0}, "preference", "row of weight 0"),
    ({"messages": [U("a"), A("", reasoning="t")]}, "sft", "empty response"),
    ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
     "preference", "empty response"),
    ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "preference", "empty response"),
    ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "kto", "empty response"),
    ({"instruction": "a", "output": " "}, "sft", "empty response"),
    ({"prompt": "a", "completion": "", "label": True}, "kto", "empty response"),
    ({"prompt": "a", "chosen": "b", "rejected": " b"}, "preference", "identical pair"),
    ({**EVAL, "output_2": "one\n", "preference": 1.5}, "preference", "identical pair"),
    ({**EVAL, "preference": 1.5}, "kto", "tie"),
    ({**EVAL, "preference": None}, "preference", "no preference given"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"}, "preference",
     "differ in more than the last turn"),
    # The labeller pasted a question inline on one side: joined, the prompts would look equal.
    ({"chosen": "\n\nHuman: a\n\nAssistant: b  Human: c?\n\nAssistant: d",
      "rejected": "\n\nHuman: a\n\nAssistant: e"},
     "preference", "differ in more than the last turn"),
    ({"chosen": [U("a"), A("b"), U("c"), A("d")], "rejected": [U("a"), A("x"), U("c"), A("e")]}, "preference",
     "differ in more than the last turn"),
    ({"prompt": "a", "chosen": [U("z"), A("d")], "rejected": [U("z"), A("e")]},
     "preference", "prompt differs from the messages"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: b"},
     "preference", "last turn is not the assistant's"),
    ({"chosen": "", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "preference",
     "last turn is not the assistant's"),
    ({"chosen": [], "rejected": []}, "preference", "last turn is not the assistant's"),
    ({"messages": [U("a")]}, "sft", "no assistant turn"),
    ({"messages": []}, "sft", "empty prompt"),
    ({"messages": [A("b")]}, "sft", "empty prompt"),
    ({"messages": [S("s"), U(" "), A("b")]}, "sft", "empty prompt"),
    ({"prompt": ""}, "prompt", "empty prompt"),
    ({"transcript": "\n\nAssistant: hello"}, "prompt", "empty prompt"),
    ({"messages": [U("a"), A(""), U("c"), A("d")]}, "sft", "empty turn"),
    ({"messages": [U("a"), {"role": "tool", "content": "7"}, A("b")]}, "sft", "tool turn"),
    ({"messages": [U("a"), A(None), {"role": "tool", "content": "7"}, A("b")]}, "sft",
     "message without text"),
    ({"messages": [U("a"), {"role": "assistant"}]}, "sft", "message without text"),
    ({"conversations": [{"from": "human"}]}, "sft", "message without text"),
    ({**ANSWER, "history": [["a", None]]}, "sft", "message without text"),
    ({"messages": [U("a"), {**A("I look."), "tool_calls": [{"id": "c"}]}]}, "sft", "tool turn"),
    ({"messages": [U("a"), {**A(None), "function_call": {"name": "f"}}]}, "prompt", "tool turn"),
    ({"conversations": [G("human", "a"), G("function_call", "{}"), G("observation", "1"), G("gpt", "b")]},
     "sft", "tool turn"),
    ({"messages": [U("a"), {"role": "wizard", "content": "x"}, A("b")]}, "sft", 'unknown role "wizard"'),
    ({**PAIR, "chosen": [G("w" * 99, "x")]}, "kto", 'unknown role "' + "w" * 40 + '"'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}, A("b")]},
     "sft", "content that is not text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, A("b")]},
     "sft", "content that is not text"),
    ({**SHARED, "image": "x.jpg"}, "prompt", "image, video or audio"),
    ({"messages": [{**U("a"), "images": ["x"]}, A("b")]}, "sft", "image, video or audio"),
    ({**HH, "audio": {"path": "x"}}, "preference", "image, video or audio"),
    ({**ANSWER, "label": False}, "sft", "answer labelled bad"),
    ({**TALK, "label": False}, "sft", "answer labelled bad"),
    ({**SHARED, "kto_tag": False}, "sft", "answer labelled bad"),
    ({"instruction": "a", "output": "b", "kto_tag": False}, "sft", "answer labelled bad"),
    ({"messages": [U("a"), A("b", weight=0)]}, "sft", "answer not to be trained on"),
    ({"messages": [U("a"), A("b", weight=0), U("c"), A("d", train=False)]},
     "sft", "answer not to be trained on"),
    ({"messages": [U("a"), A("b"), U("c"), A("d", weight=0)], "label": True},
     "kto", "answer not to be trained on"),
    ({**PAIR, "chosen": [A("b", weight=0)]}, "sft", "answer not to be trained on"),
    ({"messages": [U("a"), A("b", weight=0.5)]}, "sft", "message weight other than 0 and 1"),
    ({"messages": [U("a"), A("b", weight="0")]}, "sft", "message weight other than 0 and 1"),
    ({**PAIR, "score_chosen": 2, "score_rejected": 2}, "kto", "tie"),
    ({**EVAL, "preference": math.nan}, "preference", "no preference given"),
    (EVAL, "preference", "no preference given"),
    ({"prompt": [U("a"), A("b"), U("c")], "chosen": [U("a"), A("x"), U("c"), A("d")], "rejected": [A("e")]},
     "preference", "prompt differs from the messages"),
    ({"prompt": "a", "completion": [U("z"), A("b")]}, "sft", "prompt differs from the messages"),
    ({"instruction": "c", "output": "d", "history": [["a", ""]]}, "sft", "empty turn"),
    ({"prompt": [U("a"), A("b")]}, "prompt", "prompt does not end in a user turn"),
    ({"prompt": "\n\nHuman: a\n\nAssistant: Sure,"}, "prompt", "prompt does not end in a user turn"),
    ({"prompt": [U("a"), A("Sure,")], "completion": "b"}, "sft", "prompt does not end in a user turn"),
    ({"prompt": "half an emoji \ud83d"}, "prompt", "half a character"),
    ({**TLDR, "info": {"article": "news", "title": "t"}}, "preference", "no post"),
    ({**TLDR, "info": {**TLDR["info"], "post": " "}}, "preference", "empty prompt"),
    ({"instruction": "a", "instances": []}, "sft", "empty response"),
    ({**STEPS, "completions": [], "labels": []}, "process", "empty response"),
    ({**STEPS, "completions": ["", " \n"]}, "process", "empty response"),
    ({**STEPS, "completions": ["b", " "]}, "process", "empty step"),
    ({**STEPS, "labels": [1, None]}, "process", "a step without a label"),
    ({**STEPS, "completions": ["b", "\ud83d"]}, "process", "half a character"),
    ({**STEPS, "prompt": " "}, "process", "empty prompt"),
    ({**STEPS, "images": ["x"]}, "process", "image, video or audio"),
    ({"prompt": " " * 500_000}, "prompt", "empty prompt"),
    ({**ANSWER, "completion": "\t" * 600_000}, "sft", "empty response"),
    ({"prompt": "a" + " " * 500_000 + "b"}, "prompt", "run of 500,000 blanks"),
    ({"messages": [U("a"), A("b" + "\n" * 600_000 + "c")]}, "sft", "run of 500,000 blanks"),
    ({**HH, "chosen": HH["chosen"] + "\t" * 500_000 + "x"}, "preference", "run of 500,000 blanks"),
    ({**STEPS, "completions": ["b", "c" + " " * 500_000 + "d"]}, "process", "run of 500,000 blanks"),
]
for role in ("tool", "function", "ipython", "Observation"):
    called = {**A(None), "tool_calls": [{"id": "c"}]}
    messages = [U("a"), called, {"role": role, "content": None}, A("b")]
    UNUSABLE.append(({"messages": messages}, "sft", "tool turn"))
for key, value in (("image", "x.jpg"), ("images", ["x"]), ("videos", [{"bytes": "x"}]), ("audios", ["x"])):
    UNUSABLE.append(({**ANSWER, key: value}, "sft", "image, video or audio"))


@pytest.mark.parametrize("source, kind, reason", UNUSABLE)
def test_unusable_row_is_dropped_and_counted(tmp_path, source, kind, reason):
    good = {"preference": HH, "sft": TALK, "prompt": {"prompt": "p"}, "kto": HH, "process": STEPS}[kind]
    expected = load(save(tmp_path, [good]), kind)[0]
    assert load(save(tmp_path, [source, good, source]), kind) == (expected, Counter({reason: 2}))


def test_labels_of_a_file_have_one_scale(tmp_path):
    """0 is wrong among 0 and 1, and neither right nor wrong where another row of the file has -1."""
    rows = [{**STEPS, "labels": [1, 0]}, {**STEPS, "labels": [0.5, -1]}]
    labels = [[row["labels"] for row in load(save(tmp_path, some), "process")[0]]
              for some in (rows[:1], rows)]
    assert labels == [[[1.0, 0.0]], [[1.0, 0.5], [0.75, 0.0]]]
    assert load(save(tmp_path, rows), "process", 1)[0][0]["labels"] == [1.0, 0.0]      # it has read one row


MALFORMED = [
    ({"text": "x"}, "sft", 'known format, such as prompt, messages or chosen, found "text"'),
    ({}, "sft", "known format, such as prompt, messages or chosen, found none"),
    ({"chosen": "a", "rejected": "b"}, "preference", 'expected a "prompt" beside "chosen"'),
    ({"chosen": HH["chosen"], "rejected": "b"}, "preference", 'expected "rejected" to be a transcript'),
    ({"prompt": "a", "chosen": 3, "rejected": "b"},
     "preference", '"chosen" to be a string, a list or an object, found a number'),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "preference",
     "for preference rows, found a prompt (prompt)"),
    ({"prompt": {"a": 1}, "chosen": "b", "rejected": "c"}, "preference",
     'expected "prompt" to be a string or a list'),
    ({"prompt": ["a"]}, "prompt", "expected every message to be an object, found a string"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 1.5}, "preference",
     '"label" to be between 0 and 1'),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.inf}, "preference",
     '"margin" to be between'),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "preference",
     '"margin" to be between'),
    ({"instruction": "a", "output": 3}, "sft",
     'expected "output" to be a string, a list or an object, found a number'),
    ({"instruction": "a", "input": ["x"], "output": "b"}, "sft",
     'expected "input" to be a string, found a list'),
    ({"instruction": "a", "instances": ["x"]}, "sft", '"instances" to be a list of objects'),
    ({"instruction": "a", "instances": [{"input": "x"}]}, "sft",
     'known format, such as prompt, messages or chosen'),
    ({"messages": "hi"}, "sft", '"messages" to be a list, found a string'),
    ({"messages": [U([{"type": "text"}])]}, "sft", '"text" to be a string, found no such key'),
    ({**TALK, "label": 0.7}, "kto", '"label" to be true or false, found a number'),
    ({**TALK, "label": "bad"}, "kto", '"label" to be true or false, found a string'),
    ({**TALK, "kto_tag": [True]}, "kto", '"kto_tag" to be true or false, found a list'),
    ({**TALK, "label": None}, "kto", "found a prompt with a response (sft)"),
    ({**TALK, "label": False}, "preference", "found a prompt with a completion and a true"),
    ({"prompt": "a", "completion": math.nan}, "sft", "for sft rows, found a prompt (prompt)"),
    ({"messages": None}, "sft", 'known format, such as prompt, messages or chosen, found "messages"'),
    ({"text_correct": HH["chosen"], "text_incorrect": None}, "preference", "known format"),
    ({**PAIR, "score_chosen": "high", "score_rejected": 2},
     "preference", '"score_chosen" to be a number, found a string'),
    ({**ANSWER, "history": [["a"]]}, "sft", "every message to be an object, found a list"),
    ({**EVAL, "preference": "first"}, "preference", '"preference" to be a number, found a string'),
    ({**EVAL, "preference": False}, "preference",
     '"preference" to be a number or a string, found true or false'),
    ({**EVAL, "preference": 0.5}, "preference", '"preference" to be 0 or between 1 and 2'),
    ({**EVAL, "preference": 2.5}, "preference", '"preference" to be between 0 and 2'),
    ({**TLDR, "choice": 2}, "preference", 'a "choice" of 0 or 1'),
    ({**TLDR, "choice": True}, "preference", '"choice" to be a number, found true or false'),
    ({**TLDR, "summaries": [{"text": "x"}]}, "preference", 'two objects in "summaries"'),
    ({**TLDR, "info": {"post": "p", "title": 1, "subreddit": "s"}},
     "preference", '"title" to be a string, found a number'),
    ({"transcript": "hello"}, "prompt", '"transcript" to be a transcript that starts with "Human:"'),
    ({**STEPS, "labels": [True]}, "process", 'as many "labels" as "completions", found 1 and 2'),
    ({**STEPS, "labels": [1, "-"]}, "process", '"labels" to be a number, found a string'),
    ({**STEPS, "labels": [1, -2]}, "process", '"labels" to be between -1 and 1'),
    ({**STEPS, "labels": True}, "process", '"labels" to be a list, found true'),
    ({**STEPS, "completions": "b"}, "process", '"completions" to be a list, found a string'),
    ({**STEPS, "completions": ["b", 3]}, "process", '"completions" to be a string, found a number'),
    ({**STEPS, "labels": None}, "process", "for process rows, found a prompt (prompt)"),
    (ANSWER, "process", "a prompt with the steps of a response and a label for each for process rows, found"),
    (STEPS, "preference", "found a prompt with the steps of a response"),
    # A kind that cannot be made of the row: the message says what is there and what is needed.
    ({"instruction": "a", "output": "b"}, "preference",
     "expected a prompt with a chosen and a rejected response for "
     "preference rows, found a prompt with a response (sft)"),
    ({"instruction": "a", "output": "b"},
     "kto", "expected a prompt with a completion and a true or false label for kto"),
    # And which key is mistyped.
    ({"prompt": "a", "choosen": "b", "rejected": "c"}, "preference",
     'found a prompt (prompt), and beside it "choosen", "rejected"'),
    ({"prompt": "a"}, "sft", "expected a prompt with a response for sft rows, found a prompt (prompt)"),
    ({"prompt": "a", "completion": "b", "label": True}, "preference",
     "found a prompt with a completion and a true"),
]


@pytest.mark.parametrize("source, kind, phrase", MALFORMED)
def test_malformed_row_is_an_error_with_its_line(tmp_path, source, kind, phrase):
    good = {"prompt": {"prompt": "p"}, "process": STEPS}.get(kind, HH)
    path = save(tmp_path, jsonl([good]) + b"\n" + jsonl([source]))
    with pytest.raises(DataError) as error:
        load(path, kind)
    assert (str(error.value).startswith(f"{path}:3: ") and phrase in str(error.value)
            and "\n" not in str(error.value))


GOOD = b'{"prompt": "a"}\n'
UTF_8, OBJECT = "which is not UTF-8 text", "expected a JSON object, found"
DAMAGE = {     # the bytes, the line (or the object of a list) that is at fault, and what is said
    "bad UTF-8": (GOOD + b'\n{"prompt": "\xff"}\n', 3, f"the byte 0xff, {UTF_8}"),
    "bad UTF-8 in a list": (b'[{"prompt": "a"},\n{"prompt": "\xff"}]', 2, UTF_8),
    "UTF-16": ("\ufeff{}".encode("utf-16-le"), 1, UTF_8),
    "NUL": (GOOD + b'{"prompt": "\0"}\n', 2, "Invalid control character"),
    "not JSON": (GOOD + b"hello\n", 2,
                 "expected JSON, an object a line or a list of them, found something else (Exp"),
    "CSV": (b"prompt,answer\na,b\n", 1, "found something else"),
    "cut line": (GOOD + b'{"prompt": "a', 2, "Unterminated string"),
    "cut line among others": (GOOD + b'{"prompt": "a", \n' + GOOD, 2, "Expecting property name"),
    "cut list": (b'[{"prompt": "a"},\n{"prompt": "b"}\n', 3, "delimiter"),
    "list cut in an object": (b'[{"prompt": "a"},\n{"prompt":\n "b', 3, "Unterminated string"),
    "list with a missing comma": (b'[{"prompt": "a"}\n{"prompt": "b"}]', 2, "delimiter"),
    "text after a list": (b'[{"prompt": "a"}]\n{}', 2, "Extra data"),
    "empty list": (b"[]", None, "expected at least one JSON object"),
    "two objects on a line": (GOOD + b'{"prompt": "a"} {"prompt": "b"}', 2, "Extra data"),
    "deep nesting": (GOOD + b'{"prompt": ' + b"[" * 100_000, 2, "no value of sane size"),
    "endless number": (GOOD + b'{"prompt": ' + b"1" * 5000 + b"}", 2, "no value of sane size"),
    "a number": (GOOD + b"3\n", 2, f"{OBJECT} a number"),
    "a list on a line": (GOOD + b"[1]\n", 2, f"{OBJECT} a list"),
    "a list of strings": (b'["a",\n"b"]', "object 1 of the list", f"{OBJECT} a string"),
    "the second of a list": (b'[{"prompt": "a"},\n"b"]', "object 2 of the list", f"{OBJECT} a string"),
    "two byte-order marks": (b"\xef\xbb\xbf" * 2 + GOOD, 1, "found something else"),
    "empty": (b"", None, "expected at least one JSON object"),
    "blank": (b"\n \n\r\n", None, "expected at least one JSON object"),
    "only a byte-order mark": (b"\xef\xbb\xbf", None, "expected at least one JSON object"),
    "cut gzip": (gzip.compress(GOOD * 9)[:-9], 10, "expected a whole gzip file"),
    "gzip with a wrong checksum": (gzip.compress(GOOD * 2)[:-8] + b"12345678", 3,
                                   "expected a whole gzip file"),
    "gzip header only": (b"\x1f\x8b", 1, "expected a whole gzip file"),
    "gzip of bad bytes": (gzip.compress(GOOD * 2 + b"\xfe\n"), 3, UTF_8),
    "gzip in gzip": (gzip.compress(gzip.compress(GOOD)), 1, UTF_8),
    # Files that are no JSON at all: what they are, or what to do with packed ones.
    "zstandard": (b"\x28\xb5\x2f\xfd\x04\x00\x41", 1, "zstd, xz, zip or parquet has to be unpacked"),
    "xz": (lzma.compress(GOOD), 1, "has to be unpacked"),
    "bzip2": (bz2.compress(GOOD), 1, "has to be unpacked"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 123\n", 1,
                "git lfs pull"),
    "page": (b"<!DOCTYPE html>\n<html><title>rows.jsonl</title></html>\n", 1,
             "a web page, not the file itself"),
    "page after blank lines": (b"\n\n  <html>", 3, "a web page, not the file itself"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_an_error_with_file_and_line(tmp_path, name):
    content, place, phrase = DAMAGE[name]
    path = save(tmp_path, content)
    with pytest.raises(DataError) as error:
        load(path, "prompt")
    start = {None: f"{path}: ", str: f"{path}, {place}: ", int: f"{path}:{place}: "}
    assert str(error.value).startswith(start[place if place is None else type(place)])
    assert phrase in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, phrase", [("missing.jsonl", "No such file"), ("folder", "directory")])
def test_path_that_is_no_data_file(tmp_path, name, phrase):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as error:
        load(tmp_path / name, "prompt")
    assert str(error.value).startswith(f"{tmp_path / name}: ") and phrase in str(error.value)


def test_content_decides_and_not_the_name(tmp_path):
    rows = [{"prompt": "é\u2028 1"}, {"prompt": "2"}, {"prompt": "3"}]
    lines = "\n".join(["", *(json.dumps(row, ensure_ascii=False) for row in rows)]).encode()
    table = json.dumps(rows, indent=2).encode()
    for name in ("a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "harmless", "alpaca.txt", "rows.parquet"):
        for content in (lines, b"\xef\xbb\xbf" + lines, lines.replace(b"\n", b"\r\n"), gzip.compress(lines)):
            path = save(tmp_path, content, name)
            assert list(read_rows(path)) == [(f"{path}:{n}", row) for n, row in zip([2, 3, 4], rows)]
        for content in (table, b"\xef\xbb\xbf" + table, gzip.compress(table), b"\n  \n" + table):
            path = save(tmp_path, content, name)
            assert list(read_rows(path)) == [(f"{path}, object {n} of the list", row)
                                             for n, row in enumerate(rows, 1)]


def test_formats_may_mix_in_one_file(tmp_path):
    sources = [HH, {"messages": [U("a"), A("b")]}, {"prompt": "c", "k": 1}]
    rows, dropped = load(save(tmp_path, sources, "alpaca.json"), "prompt")
    assert rows == [{"prompt": [U("hi")]}, {"prompt": [U("a")]}, {"prompt": [U("c")], "k": 1}] and not dropped


def test_limit_stops_reading(tmp_path):
    path = save(tmp_path, jsonl([{"prompt": ""}] + [{"prompt": str(i)} for i in range(9)]) + b"damage")
    assert load(path, "prompt", limit=3) == ([{"prompt": [U(str(i))]} for i in range(3)],
                                             Counter({"empty prompt": 1}))
    assert [len(load(path, "prompt", limit=n)[0]) for n in (1, 9)] == [1, 9]  # 9: the damage is not reached
    with pytest.raises(DataError, match=":11: "):
        load(path, "prompt", limit=10)
    assert len(load(save(tmp_path, [HH, HH]), "kto", limit=3)[0]) == 3
    for kind, limit in (("prompt", 0), ("prompts", None)):
        with pytest.raises(ValueError, match="must be"):
            load(path, kind, limit)


def test_no_row_left_is_an_error(tmp_path):
    path = save(tmp_path, [{"prompt": ""}, {"prompt": " "}])
    with pytest.raises(DataError) as error:
        load(path, "prompt")
    assert str(error.value) == (
        f"{path}: 0 rows kept, 2 dropped (2 empty prompt), expected at least one usable prompt row")


def test_inverted_scores_are_kept_and_said(tmp_path):
    def scored(high, low, **more):
        return {**PAIR, "prompt": f"{high} {low}", "score_chosen": high, "score_rejected": low, **more}

    sources = [scored(9, 3), scored(4, 6), scored(5, 5), scored(1, 2, label=0.25), scored(1, 3, label=1)]
    path = save(tmp_path, sources)
    for kind, n in (("preference", 5), ("sft", 5), ("kto", 8)):
        rows, dropped = load(path, kind)
        assert len(rows) == n and dropped[INVERTED] == 2
        assert sum(dropped.values()) == 2 + {"preference": 0, "sft": 5, "kto": 1}[kind]
    assert load(path, "prompt")[1] == {}
    rows, dropped = load(path, "preference")
    assert [(row["label"], row["margin"]) for row in rows] == [(1, 6), (1, -2), (0.5, 0), (0.75, 1), (1, -2)]
    assert load(save(tmp_path, rows, "again.jsonl"), "preference") == (rows, dropped)  # said again
    line = describe(*load(path, "kto"), "x")
    assert line == f"x: 8 rows kept, 1 dropped (1 tie); 2 {INVERTED}"
    dropped_too = [scored(4, 6, rejected="b"), scored(4, 6, rejected=""), scored(9, 1)]
    assert INVERTED not in load(save(tmp_path, dropped_too), "preference")[1]
    assert convert(scored(4, 6), "preference") == ([pref([U("4 6")], "b", "c", 1.0, -2.0)], [INVERTED])


def test_demonstrations_of_comparisons_are_said(tmp_path):
    """Otherwise sft.py learns from the chosen answers of a file of pairs without a word. A demonstration, and
    a comparison that is read as one, are nothing to speak of."""
    path = save(tmp_path, [HH, TALK, HH])
    rows, dropped = load(path, "sft")
    assert len(rows) == 3 and dropped == {CHOSEN: 2}
    assert describe(rows, dropped, "x") == f"x: 3 rows kept, 0 dropped; 2 {CHOSEN}"
    path = save(tmp_path, [HH, HH])
    assert load(path, "preference")[1] == load(path, "kto")[1] == load(path, "prompt")[1] == {}


def test_thoughts_stand_before_the_answer_that_they_led_to(tmp_path):
    """Otherwise a model is trained to answer without them. In earlier turns templates leave them out, and a
    turn that is trained on without its thoughts would teach the same."""
    def written(thoughts, answer):
        return f"<think>\n{thoughts}\n</think>\n\n{answer}"      # as Qwen3's template has it

    for key in ("reasoning_content", "reasoning", "thinking", "thought"):
        path = save(tmp_path, [{"messages": [U("a"), A("b", **{key: " 1 + 1 "})]}])
        rows, dropped = load(path, "sft")
        assert rows == [{"messages": [U("a"), A(written("1 + 1", "b"))]}] and dropped == {THINKS: 1}
        assert load(path, "prompt") == ([{"prompt": [U("a")]}], {})
    for nothing in ("", None, []):
        assert (load(save(tmp_path, [{"messages": [U("a"), A("b", reasoning=nothing)]}]), "sft")
                == ([TALK], {}))
    talk = [U("a"), A("b", thinking="x"), U("c"), A("d", thinking="y")]
    assert load(save(tmp_path, [{"messages": talk}]), "sft")[0] == [
        {"messages": [U("a"), A("b", train=False), U("c"), A(written("y", "d"))]}]
    sides = {"chosen": [U("a"), A("b", thinking="x")], "rejected": [U("a"), A("c", thinking="z")]}
    assert load(save(tmp_path, [sides]), "preference") == (
        [pref([U("a")], written("x", "b"), written("z", "c"))], {THINKS: 1})
    assert [row["completion"] for row in load(save(tmp_path, [sides]), "kto")[0]] == [
        written("x", "b"), written("z", "c")]
    inside = A(written("x", "b"), reasoning="x")       # some files have them in both places
    assert load(save(tmp_path, [{"messages": [U("a"), inside]}]), "sft")[0] == [
        {"messages": [U("a"), A(written("x", "b"))]}]


@pytest.mark.parametrize("mark, source, kind", [
    ("<|im_start|>",
     {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "completion": "Yo"}, "sft"),
    ("<|im_start|>", {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}, "prompt"),
    ("<|endoftext|>", {"instruction": "Hi", "output": "Yo<|endoftext|>"}, "sft"),
    ("</s>", {"prompt": "Hi", "chosen": "Yo</s>", "rejected": "No</s>"}, "preference"),
    ("[INST]", {"prompt": "[INST] Hi [/INST]", "chosen": "Yo", "rejected": "No"}, "preference"),
    ("### Human:", {"messages": [U("### Human: Hi\n### Assistant:"), A("Yo")]}, "sft"),
    ("<start_of_turn>", {"prompt": "<start_of_turn>user\nHi", "completion": "Yo", "label": True}, "kto"),
    ("<\uff5cUser\uff5c>", {**STEPS, "prompt": "<\uff5cUser\uff5c>Hi"}, "process")])
def test_a_template_that_was_applied_already_is_said(tmp_path, mark, source, kind):
    """A second template would be put around the first one, whose marks are letters then; the row is kept,
    since somebody may ask about tokens."""
    good = {"prompt": {"prompt": "p"}, "sft": TALK, "process": STEPS}.get(kind, HH)
    path = save(tmp_path, [source, good, source])
    rows, dropped = load(path, kind)
    n = len(load(save(tmp_path, [good], "good.jsonl"), kind)[0])
    assert len(rows) == 2 + n and dropped == {MARKED % mark: 2}
    assert describe(rows, dropped, "x") == f"x: {2 + n} rows kept, 0 dropped; 2 {MARKED % mark}"


def test_columns_that_are_not_what_their_name_says(tmp_path):
    """A file is not refused for a column that nobody needs; what is not read is said."""
    rows = [{**ANSWER, "history": "of Spain"}, {**ANSWER, "system": True},
            {**ANSWER, "system": 3, "history": {"a": 1}}]
    kept, dropped = load(save(tmp_path, rows), "sft")
    assert kept == [TALK] * 3
    assert dropped == {'kept, though "history" is not read, since it is no list of turns': 2,
                       'kept, though "system" is not read, since it is no text': 2}


def test_preference_rows_are_written_as_trl_reads_them(tmp_path):
    """All three as lists of messages: TRL applies the chat template to prompt + chosen, which a string is
    not. Read again they are what they were."""
    rows = [pref([S("s"), U("a")], "b", "c"),
            {**pref([U("a"), A("b"), U("c")], "d", "e", 0.5), "ceiling": 0.75}]
    written = as_messages(rows)
    for row in written:
        for turns in (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]):
            assert (turns[-1]["role"] == "assistant"
                    and all(set(turn) == {"role", "content"} for turn in turns))
    assert [row["chosen"] for row in written] == [[A("b")], [A("d")]] and written[1]["label"] == 0.5
    assert load(save(tmp_path, written), "preference") == (rows, Counter())
    assert rows[0]["chosen"] == "b"


def test_one_role_that_nobody_knows_does_not_cost_the_file(tmp_path):
    odd = {"conversations": [G("human", "a"), G("narrator", "x"), G("gpt", "b")]}
    rows, dropped = load(save(tmp_path, [TALK] * 5 + [odd] + [TALK]), "sft")
    assert len(rows) == 6 and dropped == {'unknown role "narrator"': 1}
    path = save(tmp_path, [odd] * 3)
    with pytest.raises(DataError, match='0 rows kept, 3 dropped .3 unknown role "narrator".'):
        load(path, "sft")
    names = [{"messages": [{"role": f"elf {i}", "content": "x"}, A("b")]} for i in range(99)]
    line = describe(*load(save(tmp_path, names + [TALK]), "sft"), "x")
    assert line.startswith("x: 1 rows kept, 99 dropped (") and line.count("unknown role") == 8


def test_a_label_decides_between_demonstration_and_bad_answer(tmp_path):
    rows = [{"messages": [U("a"), A("lie")], "label": False},
            {"messages": [U("a"), A("truth")], "label": True},
            {"messages": [U("a"), A("unjudged")], "label": None}]
    kept, dropped = load(save(tmp_path, rows), "sft")
    assert [row["messages"][-1]["content"] for row in kept] == ["truth", "unjudged"]
    assert dropped == {"answer labelled bad": 1}


def test_prompt_of_and_split_take_rows_with_marks():
    rows = [{"messages": [U("a"), A("b", train=False), U("c"), A("d")]}, {"messages": [U("e"), A("f")]}]
    first, second = map(prompt_of, rows)
    assert [turn["content"] for turn in first] == ["a", "b", "c"] and second == [U("e")]
    plain = [{"messages": [U("a"), A("b"), U("c"), A("d")]}, rows[1]]
    for seed in range(9):  # the mark does not move a row
        (train, held_out), (train_too, held_out_too) = split(rows, 0.5, seed), split(plain, 0.5, seed)
        assert len(train) == len(train_too) and len(held_out) == len(held_out_too)


def test_describe():
    assert (describe([{}] * 1903, Counter(a=4, b=5), "x.jsonl")
            == "x.jsonl: 1,903 rows kept, 9 dropped (5 b, 4 a)")
    assert describe([{}], Counter(), "x") == "x: 1 rows kept, 0 dropped"


def test_split_is_by_prompt_and_stable():
    def row(i, side):
        return pref([U(f"question {i}")], f"good {side}", "bad")

    rows = [row(i, side) for i in range(1000) for side in range(3)]
    train, held_out = split(rows, 0.2, seed=1)
    assert Counter(map(str, train + held_out)) == Counter(map(str, rows))
    prompts = [{str(r["prompt"]) for r in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1] and 150 < len(prompts[1]) < 250  # 200 +- 4 standard deviations
    assert train == [r for r in rows if r in train]  # order is kept
    more = split([row(i, 0) for i in range(5000, 4000, -1)] + rows[::-1], 0.2, seed=1)
    assert all(r in more[0] for r in train[::50]) and all(r in more[1] for r in held_out[::50])
    assert split(rows, 0.2, seed=1) == (train, held_out) and split(rows, 0.2, seed=2) != (train, held_out)
    as_sft = split([{"messages": r["prompt"] + [A(r["chosen"])]} for r in rows], 0.2, seed=1)
    # the same side in every kind
    assert [r["messages"][0] for r in as_sft[1]] == [r["prompt"][0] for r in held_out]
    assert split(rows, 0, 1) == (rows, []) and split(rows, 1, 1) == ([], rows)
    with pytest.raises(ValueError, match="fraction"):
        split(rows, 1.5, 1)
    # pinned: the same on every machine and in every process
    assert split(rows[:1], 0.5, seed=0) == ([], rows[:1])


def test_rows_of_one_talk_are_on_one_side():
    """Otherwise a held-out answer is trained on, word for word, in a row that goes on after it."""
    talks = []
    for i in range(200):
        turns = [S(f"system {i % 3}")] * (i % 2)
        for n in range(3):
            turns = turns + [U(f"question {i} {n}"), A(f"answer {i} {n}")]
            talks.append({"messages": turns})
        talks.append(
            {"messages": [S("another system"), *[turn for turn in turns if turn["role"] != "system"]]})
    train, held_out = split(talks, 0.2, seed=0)
    sides = [{row["messages"][-1]["content"].split()[1] for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(train) + len(held_out) == 800 and 20 < len(sides[1]) < 60
    pairs = [pref(row["messages"][:-1], row["messages"][-1]["content"], "bad") for row in talks]
    assert ([row["prompt"] for row in split(pairs, 0.2, seed=0)[1]]
            == [row["messages"][:-1] for row in held_out])


def test_values_of_any_type_give_rows_or_a_data_error(tmp_path):
    """Rows in which one value, however deep, has become another one, or one key another key."""
    values = [None, math.nan, 0, 1, -7.5, True, False, "", "x", "Human: a\n\nAssistant: b", [], {}, [[]],
              [None], ["x"], [["a", "b"]], {"a": 1}, [{}], U("u"), [U("u"), A("b")],
              {"type": "text", "text": 3}]
    keys = ["label", "kto_tag", "weight", "system", "history", "images", "type", "text", "role", "from",
            "value", "messages", "conversations", "tool_calls", "score_chosen", "score_rejected",
            "instances", "choice"]
    sources = [(source, kind) for source, kind, _ in FORMATS.values()]
    rng, outcomes = random.Random(1), Counter()
    for _ in range(2000 * int(os.environ.get("FAULTS", 1))):
        source, kind = rng.choice(sources)
        row = json.loads(json.dumps(source))
        # Walk down to a random place and put something else there.
        place, above = row, None
        while isinstance(place, (dict, list)) and place and (above is None or rng.random() < 0.7):
            above = place
            at = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            place = place[at]
        if rng.random() < 0.3 and isinstance(above, dict):
            at = rng.choice(keys)
        above[at] = rng.choice(values)
        path = save(tmp_path, [row])
        try:
            rows, dropped = load(path, kind)
        except DataError as error:
            assert re.fullmatch(re.escape(str(path)) + r":(\d+:)? .+", str(error)), row
            outcomes["error"] += 1
        else:
            assert describe(rows, dropped, path).startswith(f"{path}: {len(rows)} rows kept, ")
            for one in rows:
                check(one, kind)
            outcomes["rows"] += 1
    assert outcomes["error"] > 500 and outcomes["rows"] > 200, outcomes


@pytest.mark.parametrize("name, kind, kept, reasons", [
    ("hh/harmless-base.jsonl.gz", "preference", 1903,
     {"differ in more than the last turn": 5, "empty response": 4}),
    ("hh/harmless-base.jsonl.gz", "sft", 1903, {"differ in more than the last turn": 5, "empty response": 4}),
    ("hh/harmless-base.jsonl.gz", "prompt", 1907, {"differ in more than the last turn": 5}),
    ("misc/alpaca-eval-pairs.jsonl.gz", "preference", 5849, {"identical pair": 151}),
    ("misc/alpaca-style-1100.json.gz", "sft", 1100, {}),
    ("misc/seed_tasks.jsonl", "sft", 175, {}),
])
def test_real_file(name, kind, kept, reasons):
    path = REAL / name
    if not path.exists():
        pytest.skip(f"no {name} in the folder RLHF_DATA (or ../shared/data)")
    rows, dropped = load(path, kind)
    print(describe(rows, dropped, name))
    total = sum(len(row["instances"]) if "instances" in row else 1 for _, row in read_rows(path))
    lost = {reason: n for reason, n in dropped.items() if not reason.startswith("kept")}
    assert len(rows) + sum(lost.values()) == total and (len(rows), lost) == (kept, reasons)
    for row in rows:
        check(row, kind)


def test_mutated_bytes_give_rows_or_a_data_error(tmp_path):
    sources = [(source, kind) for source, kind, _ in FORMATS.values()]
    files = []
    for kind in KINDS:
        rows = [source for source, k in sources if k == kind]
        lines = jsonl(rows)
        files += [(lines, kind), (json.dumps(rows, indent=1).encode(), kind), (gzip.compress(lines), kind)]
        files += [(jsonl(rows[i:i + 1]), kind) for i in range(len(rows))]
    rng, outcomes = random.Random(0), Counter()
    for _ in range(2000 * int(os.environ.get("FAULTS", 1))):
        content, kind = rng.choice(files)
        content = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 6])):
            at, byte = (rng.randrange(len(content) + 1),
                        rng.choice([rng.randrange(256), *b'abcdef", {}[]:\\0\n']))
            content[at:at + rng.choice([0, 1, 1, 3])] = bytes([byte] * rng.choice([0, 1, 1, 2]))
        if rng.random() < 0.05:
            del content[rng.randrange(len(content) + 1):]
        path = save(tmp_path, bytes(content))
        try:
            rows, _ = load(path, kind)
        except DataError as error:
            place = r"(, object \d+ of the list)?:(\d+:)? .+"
            assert re.fullmatch(re.escape(str(path)) + place, str(error)), bytes(content)
            outcomes["error"] += 1
        else:
            for row in rows:
                check(row, kind)
            outcomes["rows"] += 1
    assert outcomes["error"] > 500 and outcomes["rows"] > 200, outcomes  # both ways out are taken
