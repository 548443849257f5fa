"""What a run measured: answers to test prompts and their figures, tables, and the page."""
from dataclasses import dataclass
from pathlib import Path

import torch

from data import InputError, page, sample, world, read_jsonl
from data.files import formats
from model import compare_policies, pad_batch

N_SAMPLES = 12        # test prompts whose answers stand in samples.txt
TEST_MAX_NEW = 48     # longest answer to a test prompt of the tiny world, in tokens, whoever measures


def table(columns):
    """Text table of {column: {row: number}}; rows in order of first appearance."""
    names = []
    for column in columns.values():
        names += [name for name in column if name not in names]
    lines = [" " * 20 + "".join(f"{title:>{max(12, len(title) + 2)}}" for title in columns)]
    for name in names:
        line = f"{name:20}"
        for title, column in columns.items():
            cell = f"{column[name]:.3f}" if name in column else ""
            line += f"{cell:>{max(12, len(title) + 2)}}"
        lines.append(line)
    return "\n".join(lines)


def samples_text(title, prompts, answers):
    """The answers (texts) to a few prompts (messages), for samples.txt and the screen."""
    lines = [f"--- {title}\n"]
    for prompt, answer in zip(prompts, answers):
        lines.append(f"  {prompt[-1]['content']}\n    -> {answer.strip()}\n")
    return "".join(lines)


def answers_in(folder):
    """{prompt: what the model in a folder answers, with its scores} of answers.jsonl; {} if there is none."""
    path = Path(folder) / "answers.jsonl"
    if not path.exists():
        return {}
    rows = read_jsonl(path)
    return {row["prompt"]: row["after"] | {"family": row.get("family")} for row in rows}


def what_came_out(name, folder, after):
    """A sentence on a link of the chain that has just been made, with one telling answer. after: its
    figures."""
    if "accuracy" in after:
        return (f"{name}: prefers what the annotator prefers in {after['accuracy']:.0%} of the held-out "
                "comparisons")
    if "gold" not in after:
        return f"{name}: done"
    family, failure = "helpful", "imitates careless people"
    if name == "base":
        family, failure = "harmless", "explains harm"
    for prompt, scored in answers_in(folder).items():
        if scored["family"] == family and scored.get(family) == 0:
            return (f"{name}: gold {after['gold']:.2f} of 1. It {failure}, for example:\n    {prompt}\n"
                    f"    -> {scored['answer']}")
    return f"{name}: gold {after['gold']:.2f} of 1"


def side_by_side(folders):
    """The answers of several models to up to three prompts of the tiny world, one of each family, that the
    first model gets wrong and the last one right. folders: {title: folder}."""
    answers = {title: answers_in(folder) for title, folder in folders.items()}
    first, *_, last = answers.values()
    lines, shown = [], set()
    for prompt, best in last.items():
        was = first.get(prompt, {}).get("gold", 1.0)
        if best["family"] in shown or was > 0 or best.get("gold", 0) < 0.9:
            continue
        shown.add(best["family"])
        lines.append(f"\n{prompt}")
        for title in answers:
            scored = answers[title].get(prompt)
            if scored:
                reward = f", reward {scored['reward']:.1f}" if "reward" in scored else ""
                lines.append(f"  {title:5} {scored['answer']}  [gold {scored['gold']:.2f}{reward}]")
    return "\n".join(lines)


def write_page(folder):
    """Write out/index.html over all runs beside a folder. Returns a sentence that says where it is; a page is
    never a reason to fail."""
    try:
        return f"all runs on one page: {page.write_page(Path(folder).parent)}"
    except Exception as e:
        return f"(no page: {type(e).__name__}: {e})"


# ------------------------------------------------------------------------------------------------------------
# Measuring a policy.


@dataclass
class Tests:
    """The prompts a policy is measured on: the tiny world's test prompts, which gold can judge, or some of
    one's own."""
    rows: list          # prompt rows
    graded: bool        # whether gold can judge the answers
    max_new: int        # longest answer, in tokens

    @property
    def prompts(self):
        return [row["prompt"] for row in self.rows]


def test_prompts(model, tok, max_new, own_rows=None, path=""):
    """The tiny world's test prompts, or the first 32 different ones of rows of one's own, that leave room for
    an answer in the model's context. InputError: none does."""
    graded = own_rows is None
    max_new = TEST_MAX_NEW if graded else max_new
    longest = model.cfg.max_len - max_new
    if graded:
        fitting = sample.short_enough(tok, world.rows("test"), longest)
    else:
        fitting = own_prompts(own_rows, tok, longest, 32)
    if not fitting:
        raise InputError(f"{path or 'test prompts'}: no prompt leaves room for --max_new {max_new} tokens in "
                         f"the model's context of {model.cfg.max_len}")
    return Tests(fitting, graded, max_new)


def own_prompts(rows, tok, longest, n):
    """The first n different prompts of rows of any kind that take at most `longest` tokens: prompt rows."""
    out, seen = [], set()
    for row in rows:
        for prompt in formats.prompts_of([row], 1):      # none where a chat begins with an answer
            if str(prompt) not in seen:     # its other keys stay: a reward may judge by them
                seen.add(str(prompt))
                out += sample.short_enough(tok, [row | {"prompt": prompt}], longest)
        if len(out) == n:
            break
    return out


def measure(sampler, tok, tests, generator):
    """What a policy says to the test prompts, at temperature 1: figures {name: mean} and Answers."""
    texts, prompt_ids, ids = sample.respond(sampler, tok, tests.prompts, tests.max_new, generator)
    answers, figures = [{"answer": text.strip()} for text in texts], {}
    if tests.graded:
        figures = world.mean_scores(tests.rows, texts)
        answers = [answer | world.judge(row, answer["answer"]) for row, answer in zip(tests.rows, answers)]
    figures |= {"length": sum(map(len, ids)) / len(ids),
                "eos_rate": sum(sample.ended(tok, x) for x in ids) / len(ids),
                "distinct_2": distinct_n(ids, 2)}
    return figures, Answers(texts, prompt_ids, ids, answers)


@dataclass
class Answers:
    """What `measure` heard, one entry a test prompt."""
    texts: list         # str
    prompt_ids: list    # lists of ids
    ids: list           # lists of ids
    scored: list        # {"answer": str, "gold": .., ..}


def add_rewards(figures, scored, rewards):
    """Add rewards (list of floats) to the `scored` answers they belong to, and their mean to the figures."""
    for answer, reward in zip(scored, rewards):
        answer["reward"] = reward
    figures["reward"] = sum(rewards) / len(rewards)


def answer_rows(tests, before, after):
    """The rows of answers.jsonl: before and after are the `scored` of two Answers."""
    rows = []
    for row, one, two in zip(tests.rows, before, after):
        family = {"family": row["family"]} if "family" in row else {}
        rows.append({"prompt": row["prompt"][-1]["content"]} | family | {"before": one, "after": two})
    return rows


def add_up(parts, n):
    """The figures of micro-batches, dicts {name: (B,)}, as one {name: float}: their sums divided by n."""
    sums = {}
    for part in parts:
        for name, x in part.items():
            sums[name] = sums.get(name, 0.0) + x.sum() / n
    return {name: x.item() for name, x in sums.items()}


@torch.no_grad()
def held_out_figures(losses, model, held, ref_logp, tok, cfg):
    """Mean figures of held-out examples. losses: from losses_of_step of dpo.py; ref_logp (2, N): log-probs of
    both answers under the reference."""
    parts = []
    for i in range(0, len(held), cfg.micro_batch):
        part = slice(i, i + cfg.micro_batch)
        parts.append(losses(model, held[part], ref_logp[:, part], tok, cfg)[1])
    return add_up(parts, len(held))


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
        grams += [tuple(ids[i: i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def mean_kl(policy, reference, tok, prompts, answers, batch=16):
    """Mean KL(policy || reference) per answer and mean entropy per token, in nats, exact over the vocabulary
    at every token of answers (lists of ids), which follow prompts (lists of ids)."""
    device, kl, entropy = policy.wte.weight.device, 0.0, 0.0
    for i in range(0, len(prompts), batch):
        rows, answer = [], []
        for prompt, ids in zip(prompts[i: i + batch], answers[i: i + batch]):
            rows.append(prompt + ids)
            answer.append([0] * len(prompt) + [1] * len(ids))
        ids, _ = pad_batch(rows, tok.pad_id, device)                                  # (B, T)
        mask = pad_batch(answer, 0, device)[0].bool()                                 # (B, T)
        _, _, kl_part, entropy_part = compare_policies(policy, reference, ids, mask)
        kl += kl_part.sum().item()
        entropy += entropy_part.sum().item()
    return kl / len(prompts), entropy / max(1, sum(map(len, answers)))


# ------------------------------------------------------------------------------------------------------------
# Figures of a reward model on comparisons that it has not seen.


def right(guess, p):
    """1 where guess (M,) and p - 1/2 (M,) have the same sign, 1/2 where one of them is 0, else 0."""
    return ((guess * (p - 0.5)).sign() + 1) / 2


def share_right(guess, p):
    """The mean of `right`, a number."""
    return right(guess, p).mean().item()


def calibration_error(d, p):
    """Mean |stated probability - frequency| over ten bins of P(a over b), weighted by size, for reward
    differences d (M,) and labels p (M,). Each pair counts both ways round: which answer is a says nothing."""
    stated, true = torch.cat([d.sigmoid(), (-d).sigmoid()]), torch.cat([p, 1 - p])             # (2M,)
    bins, error = (stated * 10).long().clamp(max=9), 0.0
    for b in bins.unique():
        inside = bins == b
        gap = (stated[inside].mean() - true[inside].mean()).abs()
        error += (gap * inside.float().mean()).item()
    return error


def accuracies(d, p, longer):
    """Accuracy {name: number} on pairs that are no ties, from reward differences d (M,), labels p (M,) and
    by how many tokens a is longer than b (M,). longer_wins is that of always taking the longer answer."""
    out = {"accuracy": share_right(d, p), "longer_wins": share_right(longer, p)}
    # Apart where the chosen answer is the shorter one, as long as the other, or the longer one.
    chosen_is = (longer * (p - 0.5)).sign()
    for name, sign in (("shorter", -1), ("same_length", 0), ("longer", 1)):
        part = chosen_is == sign
        if part.any():
            out[f"accuracy_{name}"] = share_right(d[part], p[part])
    return out
