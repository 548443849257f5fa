"""Answers sampled from a policy, and what the annotator says of them."""
from itertools import combinations

from data import world
from data.files.checkpoint import load
from data.parallel import generate_answers
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
        prompts_of_part = [asked[i] for i in part]
        said = generate_answers(model, tok, prompts_of_part, max_new, generator, temperature)[-1]
        for i, answer in zip(part, said):
            answers[i] = answer
    texts = [tok.decode(ids) for ids in answers]
    return texts, asked, answers


def batches_by_length(rows, batch):
    """The numbers of rows (lists), the shortest first, in lists of `batch`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start: start + batch] for start in range(0, len(order), batch)]


def ended(tok, ids):
    """Whether an answer (list of ids) came to an end, instead of being cut off at the longest length."""
    return bool(ids) and ids[-1] in tok.eos_ids


def repeated(rows, k):
    """Each of the rows k times, one after another."""
    out = []
    for row in rows:
        out += [row] * k
    return out


def different_answers(model, tok, rows, k, max_new, generator, temperature=1.0):
    """Up to k different answers to the prompt of each row, finished and not empty: a list of texts per
    row."""
    prompts = repeated([row["prompt"] for row in rows], k)
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
