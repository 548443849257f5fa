"""Rewards of answers: from a reward model, two policies, a Python function, the gold judge, or several of
them."""
import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data import InputError, sample, world
from data.chain import run_of
from data.files.checkpoint import load
from data.flags import function_of, names_in
from data.parallel import RANK, all_sum, in_chunks
from data.process import implicit_logits, implicit_rewards, rewards_at_tokens, step_logits
from model import cast_weights, freeze, last_token

BETA = 0.3    # of an implicit reward if the policy's run.json names none: dpo.py's default


def weights_of(text, n):
    """"1,0.5" as (n,) numbers with mean 1; equal ones where text is "". InputError: not n numbers, or a
    sum that is not above 0."""
    try:
        weights = torch.tensor([float(w) for w in text.split(",")] if text else [1.0] * n)
    except ValueError:
        weights = torch.zeros(0)
    if len(weights) != n or not 0 < weights.sum() < torch.inf:
        raise InputError(f"--reward_weights {text}: expected {n} numbers with commas between")
    return weights * n / weights.sum()


@dataclass
class Source:
    """One reward: models that read tokens, or a function that reads texts."""
    models: list
    tok: typing.Any = None            # the models' tokenizer
    rewards: typing.Any = None        # (ids, mask) -> rewards at tokens (B, T), of models
    steps: typing.Any = None          # (ids, mask) -> logits of steps (B, T), where it scores steps
    function: typing.Any = None       # (rows, texts) -> list of floats


def source_of(name, flag):
    """The Source that a flag names. InputError: there is none."""
    if name == "gold":
        return Source([], function=world.gold)
    if name.startswith("implicit:"):
        return implicit_source(name, flag)
    if ":" in name and not Path(name).is_dir():
        return Source([], function=function_of(name, flag))
    model, tok = load(name, head="score")
    steps = partial(step_logits, model, tok) if model.cfg.process else None
    return Source([model], tok, partial(rewards_at_tokens, model, tok), steps)


def implicit_source(name, flag):
    """The Source "implicit:POLICY:REFERENCE": the log-ratio of two policies (data/process.py)."""
    parts = name.split(":")[1:]
    splits = [(":".join(parts[:n]), ":".join(parts[n:])) for n in range(1, len(parts))]
    folders = [both for both in splits if Path(both[0]).is_dir() and Path(both[1]).is_dir()]
    if len(splits) > 1 and folders:      # a folder may have a colon in its name
        splits = folders[:1]
    if len(splits) != 1:
        raise InputError(f"{flag} {name}: expected implicit:POLICY:REFERENCE, a policy and what it began as")
    first, second = splits[0]
    (policy, tok), (reference, other) = load(first), load(second)
    if not tok.same_as(other):
        raise InputError(f"{flag} {name}: the two have different tokenizers")
    beta = run_of(first).get("config", {}).get("beta") or BETA
    both = (policy, reference, beta, tok)
    return Source([policy, reference], tok, partial(implicit_rewards, *both), partial(implicit_logits, *both))


class Rewards:
    """One or several rewards, as a flag names them: a reward model (of the tokenizer `tok`, if one is given),
    "implicit:POLICY:REFERENCE", "gold", or module:function, a function(rows, texts) -> list of floats. rows
    are rows of --data, such as {"prompt": [{"role": "user", "content": "Name the capital of Kenya."}],
    "family": "helpful", ...}."""

    def __init__(self, flag, text, tok=None, weights="", ensemble="mean"):
        self.flag, self.ensemble, self.named = flag, ensemble, {}
        for name in names_in(text):
            source = source_of(name, flag)
            if tok is not None and source.models and not tok.same_as(source.tok):
                raise InputError(f"{flag} {name} has another tokenizer than the policy")
            self.named[name] = source
        self.weights = weights_of(weights, len(self.named))
        kinds = {source.steps is None for source in self.named.values()}
        if ensemble == "min" and len(kinds) > 1:
            raise InputError(f"{flag} {text}: the smallest of rewards of steps and of answers says nothing; "
                             "name one kind, or take their mean")

    def models(self):
        """All models among them."""
        out = []
        for source in self.named.values():
            out += source.models
        return out

    def score(self, rows, texts, ids, mask, size):
        """Rewards (B, T) of one response a row, at the tokens where they arrive: the last one, or each step's
        last. The responses are given twice, as texts and as ids (B, T) where mask (B, T) is True. Models
        read `size` rows at a time."""
        each = []
        for name, source in self.named.items():
            if source.models:
                each.append(in_chunks(source.rewards, ids, mask, size))
            else:
                at_tokens = torch.zeros(ids.shape, device=ids.device)
                called = self.call(name, source.function, rows, texts).to(ids.device)
                at_tokens[torch.arange(len(ids), device=ids.device), last_token(mask)] = called
                each.append(at_tokens)
        return self.combined(torch.stack(each))

    def score_texts(self, rows, texts):
        """Rewards (list of floats) of finished responses of which the tokens are not at hand."""
        each = []
        for name, source in self.named.items():
            if source.models:
                at_tokens = self.read(source, source.rewards, rows, texts)
                each.append(torch.stack([x.sum() for x in at_tokens]))
            else:
                each.append(self.call(name, source.function, rows, texts))
            if not each[-1].isfinite().all():
                raise InputError(f"{self.flag} {name}: gives scores that are not finite; a weight of it is "
                                 "broken")
        return self.combined(torch.stack(each)).tolist()

    def step_scores(self, rows, texts):
        """The scores of the steps of finished responses, a list of numbers from 0 to 1 for each, by the one
        reward that there is; None if it is no process reward."""
        [source, *others] = self.named.values()
        if others or source.steps is None:
            return None
        return [x[x.isfinite()].sigmoid().tolist() for x in self.read(source, source.steps, rows, texts)]

    def read(self, source, what, rows, texts):
        """What a Source's function (ids, mask) -> (B, T) says of finished responses: tensors (T,)."""
        device = source.models[0].wte.weight.device
        longest = min(model.cfg.max_len for model in source.models)
        prompts = [row["prompt"] for row in rows]
        return sample.read_texts(what, source.tok, prompts, texts, device, longest)

    def combined(self, each):
        """Several rewards (K, ..) as one (..): the mean, or the smallest, of the weighted rewards
        (arXiv:2310.02743, eq. 4-5)."""
        each = each * self.weights.to(each.device).view(-1, *[1] * (each.dim() - 1))
        if self.ensemble == "mean":
            return each.mean(0)
        whole = each if each.dim() == 2 else each.sum(2)      # (n, B), of whole answers
        return each[whole.argmin(0), torch.arange(each.shape[1], device=each.device)]

    def call(self, name, function, rows, texts):
        """Rewards (B,) of a Python function, which the first rank asks. InputError: not one finite number a
        response."""
        if RANK:
            return all_sum(torch.zeros(len(rows)))
        try:
            answer = function(rows, texts)
        except (InputError, OSError) as e:   # elsewhere one sentence is enough; here its place is wanted
            raise RuntimeError(f"{self.flag} {name} failed: {type(e).__name__}: {e}") from e
        try:
            out = torch.as_tensor(answer, dtype=torch.float)
        except (TypeError, ValueError, RuntimeError) as e:
            raise InputError(f"{self.flag} {name}: expected a list of {len(rows)} numbers ({e})") from None
        if out.shape != (len(rows),) or not out.isfinite().all():
            raise InputError(f"{self.flag} {name}: expected {len(rows)} finite numbers for as many responses")
        return all_sum(out)


def rewards_on(flag, name, device):
    """The Rewards that a flag names, to judge with: their models frozen and on the device."""
    rewards = Rewards(flag, name)
    for model in rewards.models():
        cast_weights(freeze(model)).to(device)
    return rewards


def judge_of(flag, name, device):
    """judge(rows, texts) -> utilities (list of floats) of answers to prompt rows: the tiny world's annotator,
    or whatever Rewards knows."""
    if name == "annotator":
        return world.Annotator().utilities
    return rewards_on(flag, name, device).score_texts
