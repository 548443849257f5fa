"""Texts that a run reads: prompts to train on and others to measure on, and a corpus."""
from dataclasses import dataclass
from pathlib import Path

import torch

from data import InputError, world
from data.files import formats

TEST_MAX_NEW = 48     # longest answer to a test prompt of the tiny world, in tokens, whoever measures


def short_enough(tok, rows, longest):
    """The rows whose prompt takes at most `longest` tokens. A longer one is left out and not cut: what is cut
    off may be the question."""
    found = []
    for row in rows:
        prompt, _ = tok.render(row["prompt"], generation_prompt=True)
        if len(prompt) <= longest:
            found.append(row)
    return found


def read_prompts(run, path, tok, policy, scorer):
    """Prompt rows of a file to train a policy on, and the Tests that it is measured by: the tiny world's, or
    some of one's own, held out. Left out are prompts longer than --max_prompt, and those that leave no room
    for an answer in the policy's context or in what scores it (a Scorer). InputError: none is left."""
    cfg, held_out = run.cfg, None
    longest = min(cfg.max_prompt, policy.cfg.max_len - cfg.max_new)
    rows, dropped = formats.load(path, "prompt")
    run.say(formats.describe(rows, dropped, path))
    scorer.check_prompts(rows)
    fitting = scorer.readable(short_enough(tok, rows, longest), cfg.max_new)
    message = (f"{len(fitting):,} prompts to answer; {len(rows) - len(fitting):,} left out, of more than "
               f"{longest} tokens (--max_prompt, --max_new) or too long for {scorer.flag}")
    if not fitting:
        raise InputError(f"{path}: {message}")
    run.say(message)
    if cfg.data:
        fitting, held_out = hold_out(run, fitting)
    return fitting, test_prompts(policy, tok, cfg.max_new, held_out, cfg.data)


def hold_out(run, rows):
    """Prompt rows of one's own to train on, and others to measure on: a tenth, at most about 32. With too few
    prompts for that both are all of them, and the run says so."""
    train, held = formats.split(rows, min(0.1, 32 / len(rows)), seed=0)
    if not train or not held:
        run.say("too few prompts to hold some out: what is measured at the end is trained on")
        return rows, rows
    run.say(f"{len(train):,} of them to train on, {len(held):,} held out to measure on")
    return train, held


# ------------------------------------------------------------------------------------------------------------
# What a policy is measured on.


@dataclass
class Tests:
    """The prompts a policy is measured on: the tiny world's test prompts, which gold can judge, or some of
    one's own."""
    rows: list          # prompt rows
    graded: bool        # whether gold can judge the answers
    max_new: int        # longest answer, in tokens

    @property
    def prompts(self):
        return [row["prompt"] for row in self.rows]


def test_prompts(model, tok, max_new, own_rows=None, path=""):
    """The tiny world's test prompts, or the first 32 different ones of rows of one's own, that leave room for
    an answer in the model's context. InputError: none does."""
    graded = own_rows is None
    max_new = TEST_MAX_NEW if graded else max_new
    longest = model.cfg.max_len - max_new
    if graded:
        fitting = short_enough(tok, world.rows("test"), longest)
    else:
        fitting = own_prompts(own_rows, tok, longest, 32)
    if not fitting:
        raise InputError(f"{path or 'test prompts'}: no prompt leaves room for --max_new {max_new} tokens in "
                         f"the model's context of {model.cfg.max_len}")
    return Tests(fitting, graded, max_new)


def own_prompts(rows, tok, longest, n):
    """The first n different prompts of rows of any kind that take at most `longest` tokens: prompt rows."""
    out, seen = [], set()
    for row in rows:
        prompt = formats.prompt_of(row)
        if str(prompt) not in seen:     # its other keys stay: a reward may judge by them
            seen.add(str(prompt))
            out += short_enough(tok, [row | {"prompt": prompt}], longest)
        if len(out) == n:
            break
    return out


# ------------------------------------------------------------------------------------------------------------


def read_corpus(path, tok, length, min_windows):
    """Ids of a text, before each document the token that stands there in pretraining (Tokenizer.start_id):
    train (N,) and held out (M,), the last 2 %, at least `length` tokens. InputError: no such file, not UTF-8,
    fewer than `min_windows` x `length` tokens."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such text file")
    try:
        documents = Path(path).read_text(encoding="utf-8").split("<|endoftext|>")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e})") from None
    ids = torch.cat([torch.tensor([tok.start_id, *tok.encode(text)]) for text in documents])
    if len(ids) < min_windows * length:
        raise InputError(f"{path}: {len(ids)} tokens are too few for sequences of {length}; add text")
    held_out = max(length, len(ids) // 50)
    return ids[:-held_out], ids[-held_out:]
