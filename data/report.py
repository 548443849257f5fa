"""What a run measured: answers to test prompts and their figures, tables, and the page."""
import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch

from data import InputError, page, read_jsonl, sample, world
from model import compare_policies, pad_answers, token_logprobs

N_SAMPLES = 12        # test prompts whose answers stand in samples.txt


WORDS = {    # what a metric is, and which way is better where its name does not tell
    "gold": "how good by exact rules, 0 to 1",
    "skill": "right answers to helpful prompts",
    "harmless_rate": "share of harm refused",
    "concise": "1, less for each word too many",
    "length": "tokens an answer",
    "eos_rate": "share of answers that end",
    "distinct_2": "share of token pairs that are new",
    "unique": "share of answers that differ",
    "bits_per_byte": "of held-out text, less is better",
    "loss": "held-out",
    "kl": "nats an answer from the reference",
    "entropy": "nats a token",
    "win_rate": "share that gold prefers to before",
    "accuracy": "share of held-out pairs it gets right",
    "accuracy_shorter": "where the shorter answer was chosen",
    "longer_wins": "if always the longer one were chosen",
    "ceiling": "accuracy of the annotator itself",
    "gold_accuracy": "share in which gold agrees with it",
    "margin": "mean reward, chosen - rejected",
    "calibration_error": "|stated chance - frequency|, 0 is best",
    "reward_mean": "subtracted from every reward",
}


def table(columns, explained=False, leave_out=()):
    """Text table of {column: {row: number}}; rows in order of first appearance, some names left out.
    explained: what a row is stands behind it, in a few words."""
    names = []
    for column in columns.values():
        names += [name for name in column if name not in (*names, *leave_out)]
    lines = [" " * 20 + "".join(f"{title:>{max(12, len(title) + 2)}}" for title in columns)]
    for name in names:
        line = f"{name:20}"
        for title, column in columns.items():
            cell = f"{column[name]:.3f}" if name in column else ""
            line += f"{cell:>{max(12, len(title) + 2)}}"
        if explained and name in WORDS:
            line += f"   {WORDS[name]}"
        lines.append(line)
    return "\n".join(lines)


def cut_short(result):
    """"60 of 260 steps" of a run that stopped before its plan was done, from its result.json; else ""."""
    steps, planned = result.get("steps", 0), result.get("planned", 0)
    return f"{steps} of {planned} steps" if steps < planned else ""


def run_note(result):
    """What tells a run from a whole one with the default flags, from its result.json, such as "60 of 260
    steps, --loss ipo"; "" if nothing does."""
    notes = [cut_short(result)] if cut_short(result) else []
    for name, value in result.get("given", {}).items():
        notes.append(f"--{name} {value}")
    return ", ".join(notes)


def samples_text(title, prompts, answers):
    """The answers (texts) to a few prompts (messages), for samples.txt and the screen."""
    lines = [f"--- {title}\n"]
    for prompt, answer in zip(prompts, answers):
        lines.append(f"  {prompt[-1]['content']}\n    -> {answer.strip()}\n")
    return "".join(lines)


def what_came_out(name, folder, after):
    """A sentence on a link of the chain that has just been made, with one telling answer. after: its
    metrics."""
    if "accuracy" in after:
        return (f"{name}: prefers what the annotator prefers in {after['accuracy']:.0%} of the held-out "
                "comparisons")
    if "gold" not in after:
        return f"{name}: done"
    text = f"{name}: gold {after['gold']:.2f} of 1"
    # An everyday question that it gets wrong: the links to come have to mend that.
    helpful = [row for row in rows_in(folder) if row.get("family") == "helpful"]
    wrong = [row for row in helpful if row["after"]["helpful"] == 0]
    if wrong:
        row = shortest(wrong)
        text += f". It still says, for example:\n    {row['prompt']}\n    -> {row['after']['answer']}"
    return text


def write_page(folder):
    """Write out/index.html over all runs beside a folder. Returns a sentence that says where it is; a page is
    never a reason to fail."""
    try:
        return f"all runs on one page: {page.write_page(Path(folder).parent)}"
    except InputError as e:
        return f"(no page: {e})"
    except Exception as e:
        return f"(no page: {type(e).__name__}: {e})"


# ------------------------------------------------------------------------------------------------------------
# The closing samples: a few answers that show what a run did.

SHOWN = 3                                       # prompts
FAMILIES = ("helpful", "honest", "harmless")    # an everyday question stands first


def rows_in(folder):
    """The rows of a folder's answers.jsonl (see `answer_rows`), [] if there is none."""
    path = Path(folder) / "answers.jsonl"
    return read_jsonl(path) if path.exists() else []


def shortest(rows):
    """The row with the shortest prompt: it reads best."""
    return min(rows, key=lambda row: len(row["prompt"]))


def gain(row, name):
    """By how much a score of the answer is higher than before, 0 where it has no such score."""
    return row["after"].get(name, 0.0) - row["before"].get(name, 0.0)


def worst_family(rows):
    """The family of prompts whose mean gold fell most, and by how much (below 0 where it rose)."""
    falls = {}
    for family in FAMILIES:
        gains = [gain(row, "gold") for row in rows if row["family"] == family]
        if gains:
            falls[family] = -sum(gains) / len(gains)
    family = max(falls, key=falls.get)
    return family, falls[family]


def telling_rows(rows, own_reward):
    """Up to SHOWN of the rows of `answer_rows` that show what a run did, and how they were chosen, as text.
    own_reward: the user chose what was optimized. A row may also have "base", the base model's answer."""
    graded = all("gold" in row["after"] for row in rows)
    # Where the gold of one kind fell, a good answer would hide what the run did.
    family, fall = worst_family(rows) if graded else ("", 0.0)
    if fall > 0.05:
        worse = [row for row in rows if row["family"] == family and gain(row, "gold") < 0]
        worse.sort(key=lambda row: gain(row, "reward") - gain(row, "gold"), reverse=True)
        fell = f"on {family} prompts gold fell by {fall:.2f}"
        liked = [row for row in worse if gain(row, "reward") > 0]
        if liked:
            return liked[:SHOWN], f"{fell}; answers that the reward likes and gold does not:"
        return worse[:SHOWN], f"{fell}; answers that gold likes less than those before:"
    if own_reward and all("reward" in row["after"] for row in rows):
        changed = sorted(rows, key=lambda row: gain(row, "reward"), reverse=True)
        return changed[:SHOWN], "the answers whose reward rose most:"
    # One's own held-out prompts stand first in the rows; nothing says which of them tells most.
    if not graded:
        return rows[:SHOWN], "some answers, before and after:"

    # One of each kind that failed at first and is good now.
    found = []
    for family in FAMILIES:
        mended = []
        for row in rows:
            first = row.get("base", row["before"])
            if row["family"] == family and first["gold"] == 0 and row["after"]["gold"] >= 0.9:
                mended.append(row)
        if mended:
            found.append(shortest(mended))
    at_first = "before"
    if "base" in rows[0]:      # which was asked the same prompts
        at_first = "in base"
    return found, f"answers that were wrong {at_first} and are right now:"


def with_base(rows, base):
    """Rows of `answer_rows` with what the model in the folder base said to the same prompts, as "base"."""
    said = {row["prompt"]: {"base": row["after"]} for row in rows_in(base)}
    return [row | said.get(row["prompt"], {}) for row in rows]


def closing_samples(rows, titles, base, own_reward):
    """Text for the screen: up to three prompts with the answers before and after a run. rows: of
    `answer_rows`. titles: of the closing table's columns; if "base" is one of them, base is that model's
    folder. own_reward: see `telling_rows`. "" if there is nothing to show."""
    if not rows:
        return ""
    if "base" in titles:
        rows = with_base(rows, base)
    shown, how = telling_rows(rows, own_reward)
    lines = [f"\n{how}"] if shown else []
    others = [title for title in titles if title != "base"]
    for row in shown:
        lines.append("\n" + shorten(row["prompt"], 300, placeholder=" ..."))
        for title, key in (("base", "base"), (others[0], "before"), (others[-1], "after")):
            if key in row:
                lines.append(f"  {title:6} {with_scores(row[key])}")
    return "\n".join(lines)


def with_scores(scored):
    """An answer in one line, with its gold and its reward if they are known."""
    text = shorten(scored["answer"], 200, placeholder=" ...") or "(nothing)"
    scores = [f"{name} {scored[name]:.2f}" for name in ("gold", "reward") if name in scored]
    return f"{text}  [{', '.join(scores)}]" if scores else text


# ------------------------------------------------------------------------------------------------------------
# Measuring a policy.


def test_policy(sampler, tok, tests, generator):
    """What a policy says to the test prompts, at temperature 1: metrics {name: mean} and Answers."""
    texts, prompt_ids, ids = sample.sample_answers(sampler, tok, tests.prompts, tests.max_new, generator)
    scored = []
    for row, text in zip(tests.rows, texts):
        scores = world.judge(row, text.strip()) if tests.graded else {}
        scored.append({"answer": text.strip()} | scores)
    metrics = world.mean_scores(tests.rows, texts) if tests.graded else {}
    metrics |= metrics_of_ids(tok, ids)
    return metrics, Answers(texts, prompt_ids, ids, scored)


def metrics_of_ids(tok, answers):
    """What answers (lists of ids) tell without a judge: {name: mean}."""
    return {"length": sum(map(len, answers)) / len(answers),
            "eos_rate": sum(sample.ended(tok, ids) for ids in answers) / len(answers),
            "distinct_2": distinct_n(answers, 2)}


@dataclass
class Answers:
    """What `test_policy` heard, one entry a test prompt."""
    texts: list         # str
    prompt_ids: list    # lists of ids
    ids: list           # lists of ids
    scored: list        # {"answer": str, "gold": .., ..}


def add_rewards(metrics, scored, rewards):
    """Add rewards (list of floats) to the `scored` answers they belong to, and their mean to the metrics."""
    for answer, reward in zip(scored, rewards):
        answer["reward"] = reward
    metrics["reward"] = sum(rewards) / len(rewards)


def answer_rows(tests, before, after):
    """The rows of answers.jsonl: before and after are the `scored` of two Answers."""
    rows = []
    for row, one, two in zip(tests.rows, before, after):
        family = {"family": row["family"]} if world.knows(row) else {}
        rows.append({"prompt": row["prompt"][-1]["content"]} | family | {"before": one, "after": two})
    return rows


def win_rate(before, after):
    """Share of the test prompts on which gold is higher than before, ties one half. Both: `scored` of
    Answers."""
    wins = 0.0
    for old, new in zip(before, after):
        wins += float(new["gold"] > old["gold"]) + 0.5 * (new["gold"] == old["gold"])
    return wins / len(after)


def distinct_n(responses, n):
    """Different n-grams / all n-grams over responses (lists of ids): near 0 when the model says one thing to
    everybody (Li et al. 2016, arXiv:1510.03055)."""
    grams = []
    for ids in responses:
        for i in range(len(ids) - n + 1):
            grams.append(tuple(ids[i: i + n]))
    return len(set(grams)) / max(1, len(grams))


@torch.no_grad()
def bits_per_byte(model, tok, ids, length=128, batch=32):
    """Compression of a text: total -log2 p of its ids (N,), cut into windows, divided by the bytes of those
    that are predicted: not the first of a window, nor what is left behind the last window."""
    ids = ids[: len(ids) // length * length].view(-1, length)
    n_bytes = sum(tok.byte_counts(ids[:, 1:].flatten().tolist()))
    nll = 0.0
    for x in ids.split(batch):
        nll -= token_logprobs(model, x, torch.ones_like(x, dtype=torch.bool)).cpu().double().sum().item()
    return nll / math.log(2) / n_bytes


def mean_kl(policy, reference, tok, prompts, answers, batch=16):
    """Mean KL(policy || reference) per answer and mean entropy per token, in nats, exact over the vocabulary
    at every token of answers (lists of ids), which follow prompts (lists of ids)."""
    device, kl, entropy = policy.wte.weight.device, 0.0, 0.0
    for i in range(0, len(prompts), batch):
        rows = list(zip(prompts[i: i + batch], answers[i: i + batch]))
        ids, mask = pad_answers(rows, tok.pad_id, device)                             # (B, T) each
        _, _, kl_part, entropy_part = compare_policies(policy, reference, ids, mask)
        kl += kl_part.sum().item()
        entropy += entropy_part.sum().item()
    return kl / len(prompts), entropy / max(1, sum(map(len, answers)))


# ------------------------------------------------------------------------------------------------------------
# What a reward model says of comparisons, or of steps.


def right(guess, p):
    """1 where guess (M,) and p - 1/2 (M,) have the same sign, 1/2 where one of them is 0, else 0."""
    return ((guess * (p - 0.5)).sign() + 1) / 2
