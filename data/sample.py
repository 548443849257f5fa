"""Answers sampled from a policy, rewards of answers as text, and what the annotator says of them."""
from functools import partial
from itertools import combinations

import torch

from data import InputError, parallel, world
from data.files import formats
from data.files.checkpoint import load
from data.process import rewards_at_tokens, steps_of
from model import freeze, pad_batch, sampling_copy


def load_sampler(path, device):
    """(the policy at a path, frozen, to sample from; its tokenizer)."""
    model, tok = load(path)
    return sampling_copy(freeze(model)).to(device), tok


def respond(model, tok, prompts, max_new, generator, temperature=1.0, batch=256):
    """One answer per prompt (lists of messages), of at most max_new tokens. Returns texts, prompts as ids and
    answers as ids, lists in the order of the prompts; batches are sorted by length so that little is padded.
    All draws come from generator, a CPU one."""
    rows = [tok.render(prompt, generation_prompt=True)[0] for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    answers = [None] * len(rows)
    for start in range(0, len(order), batch):
        part = order[start: start + batch]
        draws = torch.rand(len(part), max_new, dtype=torch.float64, generator=generator)
        ids, mask, _ = parallel.generate_in_shares(model, tok, [rows[i] for i in part], draws, temperature)
        for i, x, m in zip(part, ids.cpu(), mask.cpu()):
            answers[i] = x[m].tolist()
    return [tok.decode(ids) for ids in answers], rows, answers


def ended(tok, ids):
    """Whether an answer (list of ids) came to an end, instead of being cut off at the longest length."""
    return bool(ids) and ids[-1] in tok.eos_ids


def short_enough(tok, rows, longest):
    """The rows whose prompt takes at most `longest` tokens."""
    return [row for row in rows if len(tok.render(row["prompt"], generation_prompt=True)[0]) <= longest]


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


def different_answers(model, tok, rows, k, max_new, generator, temperature=1.0):
    """Up to k different answers to the prompt of each row, finished and not empty: a list of texts per
    row."""
    at = []
    for i in range(len(rows)):
        at += [i] * k
    texts, _, ids = respond(model, tok, [rows[i]["prompt"] for i in at], max_new, generator, temperature)
    found = [[] for _ in rows]
    for i, text, answer in zip(at, texts, ids):
        text = text.strip()
        if ended(tok, answer) and text and text not in found[i]:
            found[i].append(text)
    return found


def all_pairs(rows, answers):
    """[(row, a, b)] of every two of the different answers to each row's prompt."""
    pairs = []
    for row, texts in zip(rows, answers):
        pairs += [(row, a, b) for a, b in combinations(texts, 2)]
    return pairs


def preference_row(row, a, b, p, **more):
    """A comparison row for reward.py and dpo.py; p is the share of people who prefer a."""
    if p < 0.5:
        a, b, p = b, a, 1 - p
    return {"prompt": row["prompt"], "chosen": a, "rejected": b, "label": p} | more


def annotated(pairs, annotator, rng):
    """Preference rows of pairs [(row, a, b)] by the tiny world's annotator. "ceiling" is its own chance to
    choose right, which bounds what any reward model can reach."""
    utilities = [(annotator.utility(row, a), annotator.utility(row, b)) for row, a, b in pairs]
    noise = annotator.noise_for([u - v for u, v in utilities])
    rows = []
    for (row, a, b), (u, v) in zip(pairs, utilities):
        p = world.annotate(u, v, noise, rng)
        sure = world.choice_probability(u - v, noise)
        rows.append(preference_row(row, a, b, p, ceiling=max(sure, 1 - sure)))
    return rows


def annotated_steps(rows, answers, annotator, rng):
    """Process rows (data/files/formats.py) of the different answers (lists of texts) to each row's prompt: the tiny
    world's annotator says of each step whether it is better than 1/2, half way between wrong and right."""
    judged = []
    for row, texts in zip(rows, answers):
        for text in texts:
            steps = steps_of(text)
            judged.append((row, steps, annotator.step_utilities(row, steps)))
    gaps = []
    for _, _, utilities in judged:
        gaps += [u - 0.5 for u in utilities]
    noise, out = annotator.noise_for(gaps), []
    for row, steps, utilities in judged:
        labels = [world.annotate(u, 0.5, noise, rng) for u in utilities]
        out.append({"prompt": row["prompt"], "completions": steps, "labels": labels})
    return out


@torch.no_grad()
def read_texts(read, tok, prompts, texts, device, longest, batch=64):
    """read(ids, mask) -> (B, T) applied to one finished answer (str) to each prompt (messages): a list of
    tensors (T,). Prompt, answer and EOS are cut at `longest` tokens, all that the model can read."""
    rows, before = [], []
    for prompt, text in zip(prompts, texts):
        given, answer = tok.render_answer(prompt, text.strip())
        rows.append((given + answer)[:longest])
        before.append(len(given))
    out, order = [None] * len(rows), sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch):
        part = order[start: start + batch]
        ids, real = pad_batch([rows[i] for i in part], tok.pad_id, device)
        prompt = torch.tensor([before[i] for i in part], device=device)[:, None]
        mask = real & (torch.arange(ids.shape[1], device=device) >= prompt)                        # (B, T)
        for i, values in zip(part, read(ids, mask).cpu()):
            out[i] = values
    return out


def rewards(model, tok, prompts, texts, batch=64):
    """Rewards (list of floats) of one answer (str) to each prompt (messages) by a reward model."""
    read = partial(rewards_at_tokens, model, tok)
    values = read_texts(read, tok, prompts, texts, model.wte.weight.device, model.cfg.max_len, batch)
    return [x.sum().item() for x in values]

