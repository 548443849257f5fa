"""The questions for a critic (constitutions, ours and Anthropic's published ones, and which of two answers is
better), the labels made of its answers, and how good these are. Used by cai.py, reward.py --critique and
data/evaluate.py.
"""
import math
from pathlib import Path

from data import InputError, read_json, world
from data.flags import names_in

OPTIONS = [" (A)", " (B)"]     # what the answer to a comparison begins with


# ------------------------------------------------------------------------------------------------------------
# Files.


def constitution(paths, about=""):
    """Principles [{"key", "critique", "revision"}] for stage 1 and [{"key", "choice", "head", "left",
    "right"}] for stage 2, out of "FILE,FILE": data/world/constitution.json (a list of objects),
    CritiqueRevisionInstructions.json ({key: {"prompt", "edit_request"}}) or RLMadisonInstructions.json (a
    list of strings). `about` selects ours. InputError: a principle of no known format."""
    revise, choose = [], []
    for path in names_in(paths):
        # A list of principles has no names: they are called by the file and their place in it.
        rows = read_json(path, kind=(list, dict))
        if isinstance(rows, list):
            rows = {f"{Path(path).stem} {i}": row for i, row in enumerate(rows)}
        for key, row in rows.items():
            try:
                if isinstance(row, str):            # Anthropic's for stage 2
                    choose.append({"key": key, "choice": row, "head": "\n\n", "left": "[[[", "right": "]]]"})
                elif "edit_request" in row:         # Anthropic's for stage 1
                    revise.append({"key": key, "critique": row["prompt"][0], "revision": row["edit_request"]})
                elif not about or row["about"] == about:   # ours, for both
                    revise.append({"key": key,
                                   "critique": f"\n\nCritiqueRequest: {row['critique']}\n\nCritique:",
                                   "revision": f"\n\nRevisionRequest: {row['revision']}\n\nRevision:"})
                    choose.append({"key": key, "choice": f"{row['choice']} Options:",
                                   "head": "", "left": "", "right": ""})
            except (KeyError, TypeError, IndexError):
                raise InputError(f"{path}: principle {key} is of no known format (ours: about, critique, "
                                 "revision, choice; Anthropic's: prompt and edit_request, or a "
                                 "string)") from None
    return revise, choose


# ------------------------------------------------------------------------------------------------------------
# The questions, and the label.


def transcript(messages):
    """Messages as "\\n\\nHuman: ..\\n\\nAssistant: ..", the format of all that a critic reads, and of
    hh-rlhf."""
    start = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    return "".join(start[m["role"]] + m["content"] for m in messages)


def critique_prompt(conversation, response, principle):
    """What a critique is sampled from, as in Anthropic's published files, character for character;
    conversation ends in "\\n\\nAssistant:", texts keep their leading space."""
    return conversation + response + principle["critique"]


def revision_prompt(conversation, response, critique, principle):
    """What a revision is sampled from."""
    return critique_prompt(conversation, response, principle) + critique + principle["revision"]


def comparison_prompt(conversation, principle, a, b):
    """The multiple-choice question about answers a and b; its continuation is one of OPTIONS."""
    left, right = principle["left"], principle["right"]
    return (f"{principle['head']}Consider the following conversation between a human and an assistant:"
            f"{conversation}\n\n{principle['choice']}\n"
            f" (A) {left}{a}{right}\n (B) {left}{b}{right}\n\nThe answer is:")


def soft_label(logp, swapped):
    """P(a over b), and the same in either order, from log-probs [l_A, l_B] of the options with a as (A), and
    `swapped` with b as (A):  p = ( s(l_A - l_B) + s(l'_B - l'_A) ) / 2,  s = sigmoid  (arXiv:2309.00267,
    section 2)."""
    # a is (A) in the first question and (B) in the second.
    orders = []
    for gap in (logp[0] - logp[1], swapped[1] - swapped[0]):
        orders.append(1 / (1 + math.exp(-max(-50.0, min(50.0, gap)))))
    return sum(orders) / 2, orders


def compare(pairs, principles, critic, rng):
    """Labels of pairs [(messages, a, b)] by a critic (data/endpoint.py), each under a principle that rng
    draws and in both orders: {"p": P(a over b), "orders": the same in each, "mass", "principle": key}; None:
    there is no answer. mass: what both options have of the critic's probability; next to nothing means that
    it answered something else."""
    # Two questions a pair.
    requests, keys = [], []
    for messages, a, b in pairs:
        principle = rng.choice(principles)
        keys.append(principle["key"])
        for first, second in ((a, b), (b, a)):
            text = comparison_prompt(transcript(messages), principle, first, second)
            requests.append({"prompt": text, "options": OPTIONS})

    # And their answers.
    answers, labels = critic(requests), []
    for key, one, two in zip(keys, answers[::2], answers[1::2]):
        if not one or not two or "logp" not in one or "logp" not in two:
            labels.append(None)
            continue
        p, orders = soft_label(one["logp"], two["logp"])
        mass = sum(math.exp(logp) for logp in one["logp"] + two["logp"]) / 2
        labels.append({"p": p, "orders": orders, "mass": mass, "principle": key})
    return labels


# ------------------------------------------------------------------------------------------------------------
# What is counted, in half a sentence each.

WORDS = {
    # Of the revisions.
    "revisions": "all that the critic wrote",
    "good": "took the answer's place",
    "copied": "changed nothing",
    "empty": "hold no text",
    "leaked": "begin another turn",
    "cut": "did not come to an end",
    "refused": "requests that the critic refused",
    # Of the comparisons.
    "compared": "pairs that the critic compared",
    "no_answer": "pairs without an answer",
    "neither": "of those compared: it meant neither (A) nor (B)",
    "mass": "mean probability that it gave (A) and (B) together",
    "first_wins": "mean probability of what stands as (A); 0.5: it likes no letter",
    "longer_wins": "mean probability of the longer answer",
    "asked": "questions that were not answered before",
    "retried": "requests sent again",
    "malformed": "requests whose answers made no sense",
    "differing_pairs": "pairs of which gold likes one answer better; of these",
    "ai_gold": "the critic agrees with gold",
    "human_gold": "the simulated people agree with gold",
    "ai_human": "the critic agrees with these people",
}


def explained(metrics):
    """Metrics as lines of text: name, value, and what it counts."""
    width, lines = max(map(len, metrics)), []
    for name, value in metrics.items():
        lines.append(f"    {name:{width}} {value:8.4g}   {WORDS.get(name, '')}".rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# How good the revisions are: metrics over the chains of cai.py.


def count_faults(chains):
    """{"revisions": how many there are in the chains, "good": n, "copied": n, ..}."""
    counts = dict.fromkeys(("revisions", "good", "copied", "empty", "leaked", "cut", "refused"), 0)
    for chain in chains:
        for step in chain["chain"]:
            counts["revisions"] += 1
            counts[step["fault"] or "good"] += 1
    return counts


def gold_by_revision(chains, rows):
    """{"refused_0": share of initial responses that refuse, "gold_0": their gold, "refused_1": the same after
    one revision, ..}: figure 5 of the paper, by the tiny world's judge. rows: the prompt row of each
    chain."""
    now, metrics = [chain["initial"] for chain in chains], {}
    for n in range(1 + len(chains[0]["chain"])):
        scores = []
        for i, chain in enumerate(chains):
            if n and not chain["chain"][n - 1]["fault"]:
                now[i] = chain["chain"][n - 1]["revision"]
            scores.append(world.judge(rows[i], now[i]))
        metrics[f"refused_{n}"] = sum(score["harmless"] > 0 for score in scores) / len(chains)
        metrics[f"gold_{n}"] = sum(score["gold"] for score in scores) / len(chains)
    return metrics


# ------------------------------------------------------------------------------------------------------------
# How good the labels are: metrics over those that are not None.


def critic_metrics(labels, pairs):
    """How a critic chooses in pairs [(prompt, a, b)], whatever is right."""
    kept, longer_wins = [], []
    for label, (_, a, b) in zip(labels, pairs):
        if label is not None:
            kept.append(label)
            if len(a) != len(b):
                longer_wins.append(label["p"] if len(a) > len(b) else 1 - label["p"])

    # first_wins: mean probability of what stands as (A), 0.5 for a critic who likes no letter.
    n = max(1, len(kept))
    return {"compared": len(kept), "no_answer": len(labels) - len(kept),
            "neither": sum(label["mass"] < 0.01 for label in kept),
            "mass": sum(label["mass"] for label in kept) / n,
            "first_wins": sum(label["orders"][0] + 1 - label["orders"][1] for label in kept) / 2 / n,
            "longer_wins": sum(longer_wins) / max(1, len(longer_wins))}


def accuracy(labels, pairs):
    """How often a critic is right about pairs [(prompt, better, worse)], in each order and averaged, beside a
    judge who likes the longer answer; with standard errors."""
    hits = {"right answer as (A)": [], "right answer as (B)": [], "both orders averaged": [],
            "longer answer": []}
    for label, (_, better, worse) in zip(labels, pairs):
        if label is not None:
            first, second = label["orders"]
            for name, p in zip(hits, (first, second, label["p"])):
                hits[name].append(0.5 if p == 0.5 else p > 0.5)      # undecided: as good as a coin
            hits["longer answer"].append(len(better) > len(worse))
    metrics = {}
    for name, found in hits.items():
        n = max(1, len(found))
        share = sum(found) / n
        metrics[name] = share
        metrics[f"{name}, standard error"] = (share * (1 - share) / n) ** 0.5
    return metrics


def agreement(labels, pairs, noise, rng):
    """Shares of pairs [(row, a, b)] on which two judges agree, of a critic, the tiny world's annotator with
    this noise, and gold, over the pairs in which gold sees a difference."""
    hits = {"ai_gold": [], "human_gold": [], "ai_human": []}
    for label, (row, a, b) in zip(labels, pairs):
        u, v = world.gold([row, row], [a, b])
        if label is None or abs(u - v) < 1e-6:
            continue
        # Who prefers a?
        ai, gold = label["p"] > 0.5, u > v
        human = world.annotate(u, v, noise, rng) > 0.5
        hits["ai_gold"].append(ai == gold)
        hits["human_gold"].append(human == gold)
        hits["ai_human"].append(ai == human)
    metrics = {"differing_pairs": len(hits["ai_gold"])}
    for name, found in hits.items():
        if found:
            metrics[name] = sum(found) / len(found)
    return metrics
