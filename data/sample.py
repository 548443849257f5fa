"""Answers sampled from a policy, and what the annotator says of them."""
from itertools import combinations

import torch

from data import InputError, parallel, world
from data.files import formats
from data.files.checkpoint import load
from model import freeze, sampling_copy

# ------------------------------------------------------------------------------------------------------------
# Answers of a policy.


def load_sampler(path, device):
    """(the policy at a path, frozen, to sample from; its tokenizer)."""
    model, tok = load(path)
    return sampling_copy(freeze(model)).to(device), tok


def sample_answers(model, tok, prompts, max_new, generator, temperature=1.0, batch=256):
    """One answer per prompt (lists of messages), of at most max_new tokens. Returns texts, prompts as ids and
    answers as ids, lists in the order of the prompts. All draws come from generator, a CPU one."""
    asked = [tok.render(prompt, generation_prompt=True)[0] for prompt in prompts]
    answers = [None] * len(asked)
    # Prompts of similar length are answered together, so that little is padded.
    for part in batches_by_length(asked, batch):
        # A number for every token that may come, drawn in fp64 on the CPU: the same on every machine.
        draws = torch.rand(len(part), max_new, dtype=torch.float64, generator=generator)
        ids, mask, _ = parallel.generate_in_shares(model, tok, [asked[i] for i in part], draws, temperature)
        for i, row, on in zip(part, ids.cpu(), mask.cpu()):
            answers[i] = row[on].tolist()
    texts = [tok.decode(ids) for ids in answers]
    return texts, asked, answers


def batches_by_length(rows, batch):
    """The numbers of rows (lists), the shortest first, in lists of `batch`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start: start + batch] for start in range(0, len(order), batch)]


def ended(tok, ids):
    """Whether an answer (list of ids) came to an end, instead of being cut off at the longest length."""
    return bool(ids) and ids[-1] in tok.eos_ids


def short_enough(tok, rows, longest):
    """The rows whose prompt takes at most `longest` tokens. A longer one is left out and not cut: what is cut
    off may be the question."""
    found = []
    for row in rows:
        prompt, _ = tok.render(row["prompt"], generation_prompt=True)
        if len(prompt) <= longest:
            found.append(row)
    return found


def read_prompts(run, path, tok, longest):
    """Prompt rows of a file, of at most `longest` tokens. InputError: there are none."""
    rows, dropped = formats.load(path, "prompt")
    run.say(formats.describe(rows, dropped, path))
    fitting = short_enough(tok, rows, longest)
    message = (f"{len(fitting):,} prompts to answer; {len(rows) - len(fitting):,} left out, of more than "
               f"{longest} tokens (--max_prompt, --max_new)")
    if not fitting:
        raise InputError(f"{path}: {message}")
    run.say(message)
    return fitting


def hold_out(run, rows):
    """Prompt rows of one's own to train on, and others to measure on: a tenth, at most about 32. With too few
    prompts for that both are all of them, and the run says so."""
    train, held = formats.split(rows, min(0.1, 32 / len(rows)), seed=0)
    if not train or not held:
        run.say("too few prompts to hold some out: what is measured at the end is trained on")
        return rows, rows
    run.say(f"{len(train):,} of them to train on, {len(held):,} held out to measure on")
    return train, held


def different_answers(model, tok, rows, k, max_new, generator, temperature=1.0):
    """Up to k different answers to the prompt of each row, finished and not empty: a list of texts per
    row."""
    prompts = []
    for row in rows:
        prompts += [row["prompt"]] * k
    texts, _, ids = sample_answers(model, tok, prompts, max_new, generator, temperature)   # k of a row each

    # One that was cut off says less of the policy than of max_new; nobody can choose between equal ones.
    found = []
    for start in range(0, len(prompts), k):
        different = []
        for text, answer in zip(texts[start: start + k], ids[start: start + k]):
            text = text.strip()
            if ended(tok, answer) and text and text not in different:
                different.append(text)
        found.append(different)
    return found


# ------------------------------------------------------------------------------------------------------------
# What the tiny world's annotator says of answers.


def all_pairs(rows, answers):
    """[(row, a, b)] of every two of the different answers to each row's prompt."""
    pairs = []
    for row, texts in zip(rows, answers):
        for a, b in combinations(texts, 2):
            pairs.append((row, a, b))
    return pairs


def preference_row(row, a, b, p, **more):
    """A comparison row for reward.py and dpo.py; p is the share of people who prefer a."""
    # Both files want the preferred answer first, as data sets of comparisons have it.
    if p < 0.5:
        a, b, p = b, a, 1 - p
    return {"prompt": row["prompt"], "chosen": a, "rejected": b, "label": p} | more


def annotated(pairs, annotator, rng):
    """Preference rows of pairs [(row, a, b)] by the tiny world's annotator. "ceiling" is its own chance to
    choose right, which bounds what any reward model can reach."""
    utilities = [(annotator.utility(row, a), annotator.utility(row, b)) for row, a, b in pairs]
    # The noise is such that the annotator agrees with itself as often as asked for, over all of these pairs.
    noise, rows = annotator.noise_for([u - v for u, v in utilities]), []
    for (row, a, b), (u, v) in zip(pairs, utilities):
        p = world.annotate(u, v, noise, rng)
        sure = world.choice_probability(u - v, noise)
        rows.append(preference_row(row, a, b, p, ceiling=max(sure, 1 - sure)))
    return rows
