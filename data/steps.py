"""The steps of an answer, and rewards that arrive at them (arXiv:2211.14275, arXiv:2305.20050).

A step is a line of the answer or, where the answer is one line, a sentence. Its last token is the one that
holds its last character, even if that token begins the next step; the answer's own last token, its EOS, is
the last one of the last step.

Scores are logits (B, T) at the last tokens of the steps: sigmoid(logit) is the chance that a step is right.
At all other tokens `step_logits` and `implicit_logits` give +inf, "right for sure", so that a product, a sum
of logs or a minimum over all tokens of a row is that over its steps.
"""
import math
import re
from bisect import bisect_left
from itertools import accumulate

import torch
import torch.nn.functional as F

from model import answer_rewards, is_last, token_logprobs, width_of

# In bytes, because a token may hold a part of a character.
LINE = re.compile(rb"[^\n]*\S")
SENTENCE = re.compile(rb"(?=\S).*?(?:[.!?]+(?=\s|\Z)|\Z)", re.DOTALL)


def ends_of_steps(answer):
    """Where the steps of an answer (bytes) end: the number of bytes up to each one's last character."""
    answer = answer.rstrip()
    pattern = LINE if b"\n" in answer.lstrip() else SENTENCE
    return [found.end() for found in pattern.finditer(answer)]


def steps_of(text):
    """The steps of an answer (str), each with the white space before it: together they are the answer, but
    for white space at its end."""
    data = text.encode()
    steps, start = [], 0
    for end in ends_of_steps(data):
        steps.append(data[start: end].decode())
        start = end
    return steps


def last_tokens(tok, answer, ends):
    """The number of the last token of each step in an answer (a list of ids), from where the steps end in
    its bytes. An answer without a step counts as one."""
    total = list(accumulate(tok.byte_counts(answer)))
    return [bisect_left(total, end) for end in ends[:-1]] + [len(answer) - 1]


def step_mask(tok, ids, mask):
    """(B, T), True at the last token of each step of the answers: ids (B, T) where mask (B, T) is True."""
    found = torch.zeros(mask.shape, dtype=torch.bool)
    for b, (row, on) in enumerate(zip(ids.cpu(), mask.cpu())):
        answer = row[on].tolist()
        data = b"".join(tok.bytes_of.get(i, b"") for i in answer)
        places = on.nonzero()[:, 0]                                                              # (R,)
        found[b, places[last_tokens(tok, answer, ends_of_steps(data))]] = True
    return found.to(ids.device)


# ------------------------------------------------------------------------------------------------------------
# Who says it: a model that learned from labelled steps (data/process.py), or two policies.


def token_logits(model, ids, mask):
    """Logits (B, T) of a process reward model at every token up to the last one where mask (B, T) is True,
    0 behind it. They are the head's own output: reward_mean belongs to whole answers, not to steps."""
    T = width_of(mask)
    logits = model.score(model(ids[:, :T])).squeeze(-1).float()                                    # (B, T')
    return F.pad(logits, (0, ids.shape[1] - T))


def step_logits(model, tok, ids, mask):
    """Logits (B, T) of the steps by a process reward model, +inf at other tokens."""
    return token_logits(model, ids, mask).masked_fill(~step_mask(tok, ids, mask), math.inf)


def implicit_logits(policy, reference, beta, tok, ids, mask):
    """Logits (B, T) of the steps without labelled ones (arXiv:2412.01981), +inf at other tokens: a policy
    that DPO or the like has trained from the reference on whole answers says of a step
        sum over its tokens of beta (log pi(y_t) - log pi_ref(y_t))"""
    ratio = beta * (token_logprobs(policy, ids, mask) - token_logprobs(reference, ids, mask))      # (B, T)
    ends = step_mask(tok, ids, mask)
    number = ends.cumsum(1) - ends.long()           # (B, T) of the step that each token is in, from 0
    sums = torch.zeros_like(ratio).scatter_add(1, number, ratio)                  # (B, T) column k: step k
    return sums.gather(1, number).masked_fill(~ends, math.inf)


# ------------------------------------------------------------------------------------------------------------
# Rewards at tokens, whose sum over an answer is its reward.


def rewards_at_tokens(model, tok, ids, mask):
    """Rewards (B, T) of a reward model at the tokens where they arrive. One of whole answers: its reward at
    the last token. One of steps: log P(right) at the last token of each, so that their sum is the log of the
    product of the scores; minus reward_mean at the last token of all."""
    last = is_last(mask).to(ids.device)
    if model.process:
        return F.logsigmoid(step_logits(model, tok, ids, mask)) - model.reward_mean * last
    return torch.where(last, answer_rewards(model, ids, mask)[:, None], 0.0)


def implicit_rewards(policy, reference, beta, tok, ids, mask):
    """Rewards (B, T) from two policies: the logits of the steps, whose sum is the reward that DPO gives the
    whole answer."""
    logits = implicit_logits(policy, reference, beta, tok, ids, mask)
    return logits.masked_fill(logits.isinf(), 0.0)


def carried(said, theirs, ours):
    """What a model with another tokenizer said of answers, rewards (B, T'), as rewards (B, T) at the policy's
    tokens. theirs (B, T') and ours (B, T): step_mask under the two tokenizers. The k-th step is the same text
    under both; where one finds fewer steps, because a token holds the ends of two, the rest goes to the last
    step, so that the sum of an answer's rewards stays what it was."""
    out = torch.zeros(ours.shape, device=said.device)
    for b in range(len(ours)):
        rewards = said[b][theirs[b]]                                                               # (K',)
        places = ours[b].nonzero()[:, 0].to(said.device)                                           # (K,)
        number = torch.arange(len(rewards), device=said.device).clamp(max=len(places) - 1)
        out[b].index_add_(0, places[number], rewards)
    return out
