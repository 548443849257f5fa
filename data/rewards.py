"""What scores answers: a reward model, two policies, a Python function, the gold judge, or several of them.

A reward arrives at tokens: that of a whole answer at its last one, that of a step at the step's last one
(data/steps.py). Where a reward model has the policy's tokenizer it reads the sampled tokens themselves, so
that nothing is lost on the way through text. With another tokenizer, as most public ones have, it reads the
answer's text in its own tokens and chat template, and what it says is carried to the policy's tokens.
"""
import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data import InputError, world
from data.folder import run_of
from data.files.checkpoint import load
from data.flags import function_of, names_in
from data.parallel import RANK, all_sum, in_chunks
from data.prompts import short_enough
from data.steps import (carried, implicit_logits, implicit_rewards, rewards_at_tokens, step_logits,
                        step_mask)
from model import freeze_and_cast, is_last, pad_answers

BETA = 0.3    # of an implicit reward if the policy's run.json names none: dpo.py's default
OF_MEANS = ("dpo_norm", "ipo", "simpo", "orpo")    # losses of dpo.py whose beta weighs means over tokens
AT_ONCE = 64  # answers given as text that a model reads in one pass


# ------------------------------------------------------------------------------------------------------------
# Answers given as text.


def encode_answers(tok, prompts, texts, longest, device):
    """One finished answer (str) to each prompt (messages) as ids (B, T), and a mask (B, T) that is True on
    the answers, their EOS included. What a model cannot read, behind `longest` tokens, is cut off."""
    rows = []
    for prompt, text in zip(prompts, texts):
        given, answer = tok.render_answer(prompt, text.strip())
        given = given[: longest - 1]      # of the answer one token at least is left, where a reward is read
        rows.append((given, answer[: longest - len(given)]))
    return pad_answers(rows, tok.pad_id, device)


def rewards_of_texts(model, tok, prompts, texts):
    """Rewards (list of floats) of one finished answer (str) to each prompt (messages) by a reward model."""
    ids, mask = encode_answers(tok, prompts, texts, model.cfg.max_len, model.wte.weight.device)
    return in_chunks(partial(rewards_at_tokens, model, tok), ids, mask, AT_ONCE).sum(1).tolist()


# ------------------------------------------------------------------------------------------------------------
# One reward.


@dataclass
class Source:
    """One reward: models that read tokens, or a function that reads texts."""
    name: str                         # as the flag has it
    models: list                      # that it reads with; [] of a function
    tok: typing.Any = None            # the models' tokenizer
    read: typing.Callable = None      # models: (ids, mask) -> rewards at tokens (B, T)
    logits: typing.Callable = None    # models: (ids, mask) -> logits of steps (B, T), if it scores steps
    function: typing.Callable = None  # function: (rows, texts) -> list of floats

    def encode(self, rows, texts):
        """Finished answers (texts) to prompt rows in the models' own tokens: ids (B, T) and mask (B, T)."""
        longest = min(model.cfg.max_len for model in self.models)
        prompts = [row["prompt"] for row in rows]
        return encode_answers(self.tok, prompts, texts, longest, self.models[0].wte.weight.device)

    def check_knows(self, ids, flag):
        """InputError if one of the policy's ids is beyond a model's vocabulary: those of the policy may be
        padded to a round number, and then it can draw an id that stands for nothing."""
        n, highest = min(model.cfg.vocab_size for model in self.models), int(ids.max())
        if highest >= n:
            raise InputError(f"{flag} {self.name}: the policy said token {highest}, which its tokenizer does "
                             f"not have, nor this model's vocabulary of {n}")


def source_of(name, flag):
    """The Source that a flag names. InputError: there is none."""
    if name == "gold":
        return Source(name, [], function=world.gold)
    if name.startswith("implicit:"):
        return implicit_source(name, flag)
    if ":" in name and not Path(name).is_dir():
        return Source(name, [], function=function_of(name, flag))
    model, tok = load(name, head="score")
    source = Source(name, [model], tok, read=partial(rewards_at_tokens, model, tok))
    if model.process:
        source.logits = partial(step_logits, model, tok)
    return source


def implicit_source(name, flag):
    """The Source "implicit:POLICY:REFERENCE": the log-ratio of two policies (data/steps.py)."""
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
    config = run_of(first).get("config", {})
    beta = config.get("beta") or BETA
    if config.get("loss") in OF_MEANS:      # ours weighs the sum
        beta = BETA
    both = (policy, reference, beta, tok)
    return Source(name, [policy, reference], tok, partial(implicit_rewards, *both),
                  partial(implicit_logits, *both))


# ------------------------------------------------------------------------------------------------------------
# One or several.


def weights_of(text, n):
    """"1,0.5" as (n,) numbers with mean 1; equal ones where text is "". InputError: not n numbers, or a
    sum that is not above 0."""
    if not text:
        return torch.ones(n)
    try:
        weights = torch.tensor([float(weight) for weight in text.split(",")])
    except ValueError:
        weights = torch.zeros(0)
    if len(weights) != n or not 0 < weights.sum() < torch.inf:
        raise InputError(f"--reward_weights {text}: expected {n} numbers with commas between")
    return weights * n / weights.sum()


class Scorer:
    """What gives answers their rewards, as a flag names it: a reward model, "implicit:POLICY:REFERENCE",
    "gold", or module:function, a function(rows, texts) -> list of floats; or several, "A,B". rows are rows of
    --data, such as {"prompt": [{"role": "user", "content": "Name the capital of Kenya."}],
    "family": "helpful", ...}."""

    def __init__(self, flag, text, tok=None, weights="", ensemble="mean"):
        """flag and text: such as "--reward" and what follows it. tok: the policy's tokenizer, in whose tokens
        `score` is given answers. InputError: no such reward, or some that do not go together."""
        self.flag, self.tok, self.ensemble = flag, tok, ensemble
        self.sources = [source_of(name, flag) for name in names_in(text)]
        self.weights = weights_of(weights, len(self.sources))
        # Comparing two large vocabularies takes a while, so this is asked once. Which read the policy's ids?
        self.same_tokens = [bool(tok and source.tok and tok.same_as(source.tok)) for source in self.sources]
        kinds = {source.logits is None for source in self.sources}
        if ensemble == "min" and len(kinds) > 1:
            raise InputError(f"{flag} {text}: the smallest of rewards of steps and of answers says nothing; "
                             "name one kind, or take their mean")

    def models(self):
        """All models among them."""
        models = []
        for source in self.sources:
            models += source.models
        return models

    @property
    def value_start(self):
        """The reward model that a value model can start from: it has a scalar head, and it reads the policy's
        own tokens. None if no reward is one."""
        for source, same in zip(self.sources, self.same_tokens):
            if same and source.models[0].cfg.scalar_head:
                return source.models[0]
        return None

    def check_prompts(self, rows):
        """InputError if gold is among them and does not know the prompt of one of the rows."""
        if any(source.name == "gold" for source in self.sources) and not all(map(world.knows, rows)):
            raise InputError(f"{self.flag} gold judges the tiny world's prompts only")

    def readable(self, rows, max_new):
        """The prompt rows that leave every model room for an answer of max_new of its tokens, and its EOS."""
        for source in self.sources:
            if source.models:
                longest = min(model.cfg.max_len for model in source.models)
                rows = short_enough(source.tok, rows, longest - max_new - 1)
        return rows

    def score(self, rows, texts, ids, mask, size):
        """Rewards (B, T) of one response a row, at the tokens where they arrive. The responses are given
        twice, as texts and as the policy's ids (B, T) where mask (B, T) is True. Models read `size` rows at a
        time.

        One text has one reward: whichever of its EOS the policy chose, a reward model reads the one that it
        was trained on."""
        if self.tok:
            ends = torch.tensor(sorted(self.tok.eos_ids), device=ids.device)
            ids = torch.where(mask & torch.isin(ids, ends), self.tok.eos_id, ids)
        each = []
        for source, same in zip(self.sources, self.same_tokens):
            if source.function:
                whole = self.call(source, rows, texts).to(ids.device)                              # (B,)
                each.append(torch.where(is_last(mask), whole[:, None], 0.0))
            elif same:
                source.check_knows(ids, self.flag)
                each.append(in_chunks(source.read, ids, mask, size))
            else:
                each.append(self.read_as_text(source, rows, texts, ids, mask, size))
        return self.combined(torch.stack(each))

    def read_as_text(self, source, rows, texts, ids, mask, size):
        """`score` of a Source with another tokenizer: read in its tokens, carried to the policy's."""
        their_ids, their_mask = source.encode(rows, texts)                                         # (B, T')
        said = in_chunks(source.read, their_ids, their_mask, size)                                 # (B, T')
        if source.logits is None:
            return torch.where(is_last(mask), said.sum(1)[:, None], 0.0)
        return carried(said, step_mask(source.tok, their_ids, their_mask), step_mask(self.tok, ids, mask))

    def score_texts(self, rows, texts):
        """Rewards (list of floats) of finished responses of which the tokens are not at hand."""
        each = []
        for source in self.sources:
            if source.function:
                whole = self.call(source, rows, texts)                                             # (B,)
            else:
                ids, mask = source.encode(rows, texts)                                         # (B, T)
                n_cut = int((ids[is_last(mask)] != source.tok.eos_id).sum())
                if n_cut:
                    print(f"{self.flag} {source.name}: {n_cut} of {len(texts)} answers are longer than its "
                          "context, and are scored as if they ended there")
                whole = in_chunks(source.read, ids, mask, AT_ONCE).sum(1)                      # (B,)
            if not whole.isfinite().all():
                raise InputError(f"{self.flag} {source.name}: gives scores that are not finite; a weight of "
                                 "it is broken")
            each.append(whole.cpu())
        return self.combined(torch.stack(each)).tolist()

    def step_scores(self, rows, texts):
        """The scores of the steps of finished responses, a list of numbers from 0 to 1 for each, by the one
        reward that there is; None if it is no process reward."""
        [source, *others] = self.sources
        if others or source.logits is None:
            return None
        logits = in_chunks(source.logits, *source.encode(rows, texts), AT_ONCE)                    # (B, T)
        return [at_tokens[at_tokens.isfinite()].sigmoid().tolist() for at_tokens in logits]

    def combined(self, each):
        """Several rewards (K, ..) as one (..): the mean, or the smallest, of the weighted rewards
        (arXiv:2310.02743, eq. 4-5)."""
        each = each * self.weights.to(each.device).view(-1, *[1] * (each.dim() - 1))
        if self.ensemble == "mean":
            return each.mean(0)
        # The smallest is chosen by whole answers, (K, B).
        whole = each
        if each.dim() == 3:
            whole = each.sum(2)
        return each[whole.argmin(0), torch.arange(each.shape[1], device=each.device)]

    def call(self, source, rows, texts):
        """Rewards (B,) of a Python function, which the first rank asks. InputError: not one finite number a
        response."""
        if RANK:
            return all_sum(torch.zeros(len(rows)))
        named = f"{self.flag} {source.name}"
        try:
            answer = source.function(rows, [text.strip() for text in texts])     # as in the closing table
        except (InputError, OSError) as e:   # elsewhere one sentence is enough; here its place is wanted
            raise RuntimeError(f"{named} failed: {type(e).__name__}: {e}") from e
        try:
            rewards = torch.as_tensor(answer, dtype=torch.float)
        except (TypeError, ValueError, RuntimeError) as e:
            raise InputError(f"{named}: expected a list of {len(rows)} numbers ({e})") from None
        if rewards.shape != (len(rows),) or not rewards.isfinite().all():
            raise InputError(f"{named}: expected {len(rows)} finite numbers for as many responses")
        return all_sum(rewards)


def scorer_on(flag, name, device):
    """The Scorer that a flag names, to judge with: its models frozen and on the device."""
    scorer = Scorer(flag, name)
    for model in scorer.models():
        freeze_and_cast(model).to(device)
    return scorer
