"""Process rewards: a score for each step of an answer (arXiv:2211.14275, arXiv:2305.20050).

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

from model import answer_rewards, last_token, pad_batch, token_logprobs, width_of

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
    ends = ends_of_steps(data)
    return [data[start: end].decode() for start, end in zip([0, *ends], ends)]


def ends_of_given(tok, answer, steps):
    """Where given steps (strs, together the answer) end in the bytes of the answer's ids, which the chat
    template may begin with a space."""
    ends, at = [], 0
    for step in steps:
        ends.append(at + sum(tok.byte_counts(tok.encode(step.rstrip()))))
        at += sum(tok.byte_counts(tok.encode(step)))
    before = sum(tok.byte_counts(answer)) - at
    return [before + end for end in ends]


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
# Who says it: a model that learned from labelled steps, or two policies.


def all_logits(model, ids, mask):
    """Logits (B, T) of a process reward model at every token up to the last one where mask (B, T) is True,
    0 behind it. reward_mean is that of answers, not of steps."""
    T = width_of(mask)
    logits = model.scores(model(ids[:, :T])) + model.cfg.reward_mean                               # (B, T')
    return F.pad(logits, (0, ids.shape[1] - T))


def step_logits(model, tok, ids, mask):
    """Logits (B, T) of the steps by a process reward model, +inf at other tokens."""
    return all_logits(model, ids, mask).masked_fill(~step_mask(tok, ids, mask), math.inf)


def implicit_logits(policy, reference, beta, tok, ids, mask):
    """Logits (B, T) of the steps without labelled ones (arXiv:2412.01981), +inf at other tokens: a policy
    that DPO or the like has trained from the reference on whole answers says of a step
        sum over its tokens of beta (log pi(y_t) - log pi_ref(y_t))"""
    ratio = beta * (token_logprobs(policy, ids, mask) - token_logprobs(reference, ids, mask))      # (B, T)
    ends = step_mask(tok, ids, mask)
    step = ends.cumsum(1) - ends.long()             # (B, T) the number of the step that each token is in
    sums = torch.zeros_like(ratio).scatter_add(1, step, ratio)                  # (B, steps)
    return sums.gather(1, step).masked_fill(~ends, math.inf)


# ------------------------------------------------------------------------------------------------------------
# Rewards at tokens, whose sum over an answer is its reward.


def rewards_at_tokens(model, tok, ids, mask):
    """Rewards (B, T) of a reward model at the tokens where they arrive. One of whole answers: its reward at
    the last token. One of steps: log P(right) at the last token of each, so that their sum is the log of the
    product of the scores; minus reward_mean at the last token of all."""
    b, last = torch.arange(len(ids), device=ids.device), last_token(mask).to(ids.device)
    if model.cfg.process:
        out = F.logsigmoid(step_logits(model, tok, ids, mask))
        out[b, last] -= model.cfg.reward_mean
    else:
        out = torch.zeros(ids.shape, device=ids.device)
        out[b, last] = answer_rewards(model, ids, mask)
    return out


def implicit_rewards(policy, reference, beta, tok, ids, mask):
    """Rewards (B, T) from two policies: the logits of the steps, whose sum is the reward that DPO gives the
    whole answer."""
    logits = implicit_logits(policy, reference, beta, tok, ids, mask)
    return logits.masked_fill(logits.isinf(), 0.0)


# ------------------------------------------------------------------------------------------------------------


def errors_found(answers):
    """How often the first wrong step is found, from [(scores, labels)] of answers, two lists with a number
    for each step. A step is called wrong where its score is below 1/2; steps labelled 1/2 count neither way.
        first_error   share of the answers with a wrong step whose first one is the first one called so
        no_error      share of the others in which no step is called wrong"""
    hits = {"first_error": [], "no_error": []}
    for scores, labels in answers:
        judged = [k for k, label in enumerate(labels) if label != 0.5]
        called = next((k for k in judged if scores[k] < 0.5), None)
        wrong = next((k for k in judged if labels[k] < 0.5), None)
        hits["no_error" if wrong is None else "first_error"].append(called == wrong)
    return {name: sum(some) / len(some) for name, some in hits.items() if some}


# ------------------------------------------------------------------------------------------------------------
# Labelled steps as ids, for reward.py --process.


def group_steps(rows, tok, max_len, margin=0.0):
    """Process rows -> one element per prompt: (its answers as ids, prompt included, its steps as [(number of
    the answer, position of the step's last token, label)]). Also the number of rows left out because the
    answer does not fit into max_len tokens."""
    groups, n_too_long = {}, 0
    for row in rows:
        prompt, answer = tok.render_answer(row["prompt"], "".join(row["completions"]))
        if len(prompt) + len(answer) > max_len:
            n_too_long += 1
            continue
        answers, steps = groups.setdefault(str(row["prompt"]), ([], []))
        ends = ends_of_given(tok, answer, row["completions"])
        for t, label in zip(last_tokens(tok, answer, ends), row["labels"]):
            steps.append((len(answers), len(prompt) + t, label))
        answers.append((*prompt, *answer))
    return list(groups.values()), n_too_long


def batch_of_steps(groups, tok, device):
    """All answers of some groups as the rows of one batch, ids and mask of real tokens (N, T), and of each
    of their steps the row, the position, the label and 1 / (steps of that prompt), (M,) each."""
    rows, columns = [], []
    for answers, steps in groups:
        columns += [(len(rows) + i, t, label, 1 / len(steps)) for i, t, label in steps]
        rows += answers
    ids, mask = pad_batch(rows, tok.pad_id, device)
    return ids, mask, [torch.tensor(column).to(device, non_blocking=True) for column in zip(*columns)]


@torch.no_grad()
def show_steps(model, tok, rows, n, cfg):
    """No rows for a file, and [(prompt, text)] for samples.txt of the first n process rows: what the steps of
    an answer score, and their labels."""
    texts = []
    for row in rows[:n]:
        groups, _ = group_steps([row], tok, min(cfg.max_len, model.cfg.max_len))
        lines = []
        for answers, steps in groups:     # one, or none if it is too long
            z = all_logits(model, *pad_batch(answers, tok.pad_id, model.wte.weight.device))[0]
            for (_, t, label), text in zip(steps, row["completions"]):
                lines.append(f"score {z[t].sigmoid():.2f}, label {label:.2f}  {text.strip()}")
        texts.append((row["prompt"], "\n       ".join(lines)))
    return [], texts
