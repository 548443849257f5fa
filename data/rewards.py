"""Whatever says how good an answer is: a reward model, a Python function, the gold judge, or several of
them."""
from functools import partial
from pathlib import Path

import torch

from data import InputError, sample, world
from data.checkpoint import load
from data.flags import function_of
from data.parallel import RANK, all_sum, in_chunks
from model import answer_rewards, frozen


def names_in(text):
    """The parts of "A,B". A folder that exists is one name, whatever characters it has."""
    return [text] if Path(text).is_dir() else text.split(",")


def weights_of(text, n):
    """"1,0.5" as (n,) numbers with mean 1; equal ones where text is "". InputError: not n numbers, one of
    them above 0."""
    try:
        weights = torch.tensor([float(w) for w in text.split(",")] if text else [1.0] * n)
    except ValueError:
        weights = torch.zeros(0)
    if len(weights) != n or not 0 < weights.sum() < torch.inf:
        raise InputError(f"--reward_weights {text}: expected {n} numbers with commas between")
    return weights * n / weights.sum()


class Rewards:
    """One or several rewards, as a flag names them: a reward model (of the tokenizer `tok`, if one is given),
    "gold", or module:function, a function(rows, texts) -> list of floats. rows are rows of --data, such as
    {"prompt": [{"role": "user", "content": "Name the capital of Kenya."}], "family": "helpful", ...}."""

    def __init__(self, flag, text, tok=None, weights="", ensemble="mean"):
        self.flag, self.ensemble, self.named = flag, ensemble, {}
        for name in names_in(text):
            if name == "gold":
                self.named[name] = (None, None, world.gold)
            elif ":" in name and not Path(name).is_dir():
                self.named[name] = (None, None, function_of(name, flag))
            else:
                model, model_tok = load(name, head="score")
                if tok is not None and not tok.same_as(model_tok):
                    raise InputError(f"{flag} {name} has another tokenizer than the policy")
                self.named[name] = (model, model_tok, None)
        self.weights = weights_of(weights, len(self.named))

    def models(self):
        """The reward models among them."""
        return [model for model, _, _ in self.named.values() if model is not None]

    def score(self, rows, texts, ids, mask, size):
        """Scores (B,) of one response to each row: texts, and the same as tokens ids (B, T) where mask (B, T)
        is True. Reward models read `size` rows at a time."""
        each = []
        for name, (model, _, function) in self.named.items():
            if model is None:
                each.append(self.call(name, function, rows, texts).to(ids.device))
            else:
                each.append(in_chunks(partial(answer_rewards, model), ids, mask, size))
        return self.combined(torch.stack(each))

    def score_texts(self, rows, texts):
        """The same of finished responses of which the tokens are not at hand: a list of floats."""
        each = []
        for name, (model, tok, function) in self.named.items():
            if model is None:
                each.append(self.call(name, function, rows, texts))
            else:
                prompts = [row["prompt"] for row in rows]
                each.append(torch.tensor(sample.rewards(model, tok, prompts, texts)))
        return self.combined(torch.stack(each)).tolist()

    def combined(self, each):
        """Several rewards (K, B) as one (B,): their weighted mean, or the smallest (arXiv:2310.02743, eq.
        4-5)."""
        each = each * self.weights[:, None].to(each.device)
        return each.min(0).values if self.ensemble == "min" else each.mean(0)

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


def judge_of(flag, name, device):
    """judge(rows, texts) -> utilities (list of floats) of answers to prompt rows: the tiny world's annotator,
    or whatever Rewards knows."""
    if name == "annotator":
        return world.Annotator().utilities
    rewards = Rewards(flag, name)
    for model in rewards.models():
        frozen(model).to(device)
    return rewards.score_texts
