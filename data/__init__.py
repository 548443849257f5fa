"""Everything that is neither the model nor the algorithm of a stage.

    setup, parallel          device, seeds, optimizer, batches; several processes
    run, folder, screen      a run's log, save and resume; whose files lie in its folder; what it prints
    flags, chain             the command line; making the links that a script starts from
    prompts                  what a run trains on and is measured on; a text as ids
    sample, comparisons      answers of a policy; pairs of them, from people, from the annotator
    prefix_sharing           both answers of a pair in one row, for dpo.py: faster, the same numbers
    rewards, relabel         what scores answers; asking the annotator again
    steps                    the steps of an answer, and where rewards arrive
    report, health, page     measures, tables; what is wrong, and one PPO iteration; out/index.html
    pretrain, process, chat, vote, evaluate     commands: `python -m data.pretrain`, ...
    principles, endpoint     constitutions, and critics behind a URL (cai.py)
    world/                   the tiny world: gold judge, annotator, texts
    files/                   data sets, tokenizers and checkpoints that people have, in and out
"""
import json
import os
from pathlib import Path


class InputError(ValueError):
    """Something the user can fix: the message is one sentence that names the file, line, flag or tensor."""


def write_atomic(path, data):
    """Write bytes so that the file is either the old or the new one, never half of it. Of several processes
    (torchrun) the first one writes."""
    if int(os.environ.get("RANK", 0)):
        return
    # Written beside its place and on the disk before it takes the place, in one step of the file system.
    new = Path(path).with_name(f".{Path(path).name}.new")
    with open(new, "wb") as f:
        f.write(data)
        # A rename may reach the disk before what it renames does.
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path)


def unique_keys(pairs):
    """A JSON object's (key, value) pairs as a dict. ValueError: a key is given twice."""
    # Two values for one key are two opinions of what was meant, and dict would take the last.
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def read_json(path, data=None, kind=object):
    """The JSON value in a file, or in `data` (bytes that were read from it). `kind` is the type it must have,
    such as dict. InputError: it cannot be read, is no JSON, is of another type, or gives a key twice."""
    try:
        data = Path(path).read_bytes() if data is None else data
        value = json.loads(data, object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(value, kind):
        wanted = {dict: "object", list: "list"}.get(kind, "value")
        raise InputError(f"{path}: holds no JSON {wanted}")
    return value


def write_json(path, value):
    """Write a JSON value; the file is either the old or the whole new one, never half of it."""
    write_atomic(path, json.dumps(value, indent=1).encode())


def write_jsonl(path, rows):
    """Write rows as JSON lines; the file is either the old or the whole new one, never half of it."""
    write_atomic(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())


def read_jsonl(path):
    """The rows of a file that `write_jsonl` wrote."""
    # By line feeds alone, which `for line in f` does and str.splitlines does not: a text may hold U+2028.
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]
