"""What a run measured: answers to test prompts and their figures, tables, health in words, one PPO iteration
token by token, and the page."""
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data import InputError, page, process, sample, world, read_jsonl
from data.files import formats
from model import compare_policies, pad_batch, token_logprobs, token_values

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


@torch.no_grad()
def bits_per_byte(model, tok, ids, length=128, batch=32):
    """Compression of a text: total -log2 p of its ids (N,), cut into windows, divided by the bytes of those
    that are predicted: not the first of a window, nor what is left behind the last window."""
    ids = ids[: len(ids) // length * length].view(-1, length)
    n_bytes = sum(process.byte_counts(tok, ids[:, 1:].flatten().tolist()))
    nll = 0.0
    for x in ids.split(batch):
        nll -= token_logprobs(model, x, torch.ones_like(x, dtype=torch.bool)).double().sum().item()
    return nll / math.log(2) / n_bytes


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


# ------------------------------------------------------------------------------------------------------------
# Health of a PPO run, in words.


def means(rows):
    """Mean of every figure of the last of some log rows, over the rows that have it."""
    out = {}
    for name in rows[-1]:
        values = [row[name] for row in rows if name in row]
        out[name] = sum(values) / len(values)
    return out


def health(history, cfg=None):
    """What is wrong with a PPO run, {name: sentence}, from its log rows so far (list of dicts). Compares the
    last five with the first five, and says nothing while there are fewer than ten (of the value model:
    twenty). No advice names what cfg has on already."""
    if len(history) < 10:
        return {}
    old, now, warnings = means(history[:5]), means(history[-5:]), {}
    if now["kl"] < -0.1:
        warnings["negative KL"] = (
            f"the KL is estimated at {now['kl']:.2f}, and no KL is negative: the log-probs are not those of "
            "what was sampled from; see the checks before the first update, try --dtype float32")
    if now["eos_rate"] < min(0.9, old["eos_rate"] - 0.1):
        warnings["EOS rate"] = (
            f"only {now['eos_rate']:.2f} of the responses end, it was {old['eos_rate']:.2f}: rambling pays; "
            "try a larger --eos_penalty, or a larger --max_new if good answers need it")
    if now["entropy"] < 0.05 * old["entropy"]:
        warnings["entropy"] = (
            f"it fell from {old['entropy']:.3f} to {now['entropy']:.3f} nats per token: the policy has "
            "stopped exploring; try --entropy_coef 0.01, a larger --kl_coef or a smaller --lr")
    if now.get("unique", 1) < 0.3 * old.get("unique", 1):
        warnings["identical responses"] = (
            f"only {now['unique']:.2f} of them differ, it was {old['unique']:.2f}: one answer pays for many "
            "prompts; read the samples, try a larger --kl_coef or --entropy_coef 0.01")
    if now["length"] > 1.5 * old["length"]:
        warnings["length"] = (
            f"it grew from {old['length']:.1f} to {now['length']:.1f} tokens: the reward pays for talk; try "
            "a larger --kl_coef, or a --reward function that takes something off for length")
    if now["length"] < 0.5 * old["length"]:
        warnings["length"] = (
            f"it shrank from {old['length']:.1f} to {now['length']:.1f} tokens: the reward pays for brevity; "
            "read the samples, try a larger --kl_coef or a smaller --eos_penalty")
    if now.get("clipfrac", 0) > 0.3 or now.get("approx_kl", 0) > 0.1:
        warnings["ratio"] = (
            f"{now['clipfrac']:.2f} of the ratios are clipped and approx_kl is {now['approx_kl']:.3f}: the "
            "steps are too large; try a smaller --lr or fewer --epochs")
    if len(history) >= 20 and "value_loss" in now and now["explained_var"] <= 0:
        warnings["value model"] = (
            f"it explains {now['explained_var']:.2f} of the variance of the returns, where a constant "
            "explains 0: try a larger --value_lr or --value_warmup, or do without a value model: "
            "--advantage rloo --group 4")
    if "gold" in now:
        hacking = reward_hacking(history, now, cfg)
        if hacking:
            warnings["reward hacking"] = hacking
    return warnings


def reward_hacking(history, now, cfg):
    """A sentence where gold has fallen since its best five iterations in a row while the reward rose; else
    ""."""
    golds = [row["gold"] for row in history]
    starts = range(len(golds) - 4)
    at = max(starts, key=lambda i: sum(golds[i: i + 5]))
    best = means(history[at: at + 5])
    if now["gold"] >= best["gold"] - 0.05 or now["reward"] <= best["reward"]:
        return ""
    cures = [f"--kl_budget {best['kl_exact']:.1f}", "a larger --kl_coef",
             "several reward models with --ensemble min"]
    if cfg is None or not cfg.relabel:
        cures.insert(0, "--relabel 1")
    return (f"gold fell from {best['gold']:.2f} to {now['gold']:.2f} while the reward rose from "
            f"{best['reward']:.2f} to {now['reward']:.2f}: the policy exploits the reward model (Goodhart's "
            f"law); try {', '.join(cures[:-1])}, or {cures[-1]}")


# ------------------------------------------------------------------------------------------------------------
# One PPO iteration, token by token.

INSPECTED = 3     # responses, to as many prompts


def inspection(policy, value, tok, rows, batch, numbers, cfg):
    """The numbers of a response to each of the first prompts of an iteration, for inspect.json. rows: the
    prompt rows of all B responses; batch: (ids, mask), (B, T) each. numbers: {"score": (B,), and (B, T)
    tensors of before the update: "logp", "ref_logp", "reward", "value", "advantage", "whitened", "return"};
    the models are those of after the update."""
    raw = numbers["advantage"][batch[1]]     # of all response tokens
    some = slice(0, INSPECTED * cfg.group, cfg.group)     # the answers to a prompt follow one another
    ids, mask, rows = batch[0][some], batch[1][some], rows[some]
    numbers = {name: x[some] for name, x in numbers.items()}
    with torch.no_grad():
        logp = token_logprobs(policy, ids, mask, cfg.temperature)                     # (n, T)
        values = torch.zeros_like(logp) if value is None else token_values(value, ids, mask)
    ratio = (logp - numbers["logp"]).exp()
    # clipped: clip(ratio) A is the smaller one in min(ratio A, clip(ratio) A), so that the token has no
    # gradient
    up = numbers["whitened"] > 0
    clipped = torch.where(up, ratio > 1 + cfg.clip, ratio < 1 - cfg.clip)

    # To the CPU once, not number by number.
    ids, mask, logp, values, ratio, clipped = (x.cpu() for x in (ids, mask, logp, values, ratio, clipped))
    numbers = {name: x.cpu() for name, x in numbers.items()}
    responses = []
    for i in range(len(ids)):
        m = mask[i]
        tokens = ["<eos>" if t in tok.eos_ids else tok.decode([t]) for t in ids[i][m].tolist()]
        before = {name: x[i][m].tolist() for name, x in numbers.items() if name != "score"}
        after = {"logp": logp[i][m].tolist(), "value": values[i][m].tolist(), "ratio": ratio[i][m].tolist(),
                 "clipped": clipped[i][m].tolist()}
        text = tok.decode(ids[i][m].tolist()).strip()
        responses.append({"prompt": rows[i]["prompt"][-1]["content"], "response": text, "tokens": tokens,
                          "score": numbers["score"][i].item(), "ended": tokens[-1] == "<eos>",
                          "before": before, "after": after})
    return {"gamma": cfg.gamma, "lam": cfg.lam, "clip": cfg.clip, "advantage": cfg.advantage,
            "mean": raw.mean().item(), "std": raw.std(correction=0).item(), "responses": responses}


def inspection_text(page):
    """One response of an `inspection` as text of 100 columns: the numbers behind every equation of ppo.py."""
    response = page["responses"][0]
    before, after = response["before"], response["after"]
    lines = [response["prompt"], f"    -> {response['response']}", "",
             f"iteration {page['iteration']}: score r(x, y) = {response['score']:.4f}, "
             f"beta = {page['beta']:g}, gamma = {page['gamma']:g}, lam = {page['lam']:g}, "
             f"eps = {page['clip']:g}",
             "R_t = -beta (logp - ref), plus r at the last token (of each step);  return = A + V;  "
             "ratio = exp(new logp - logp)",
             f"A -> whitened (gae): minus the mean {page['mean']:.4f}, over the standard deviation "
             f"{page['std']:.4f} of all tokens", "",
             "before the update"]
    names = ("logp", "ref_logp", "reward", "value", "advantage", "whitened", "return")
    titles = ("logp", "ref", "R", "V", "A", "whitened", "return")
    lines.append(f"{'t':>3} {'token':14}" + "".join(f"{title:>11}" for title in titles))
    for t, token in enumerate(response["tokens"]):
        cells = "".join(f"{before[name][t] + 0.0:>11.5f}" for name in names)
        lines.append(f"{t:>3} {token!r:14.14}{cells}")
    lines += ["", "after it", f"{'t':>3} {'token':14}{'logp':>11}{'V':>11}{'ratio':>11}    clipped"]
    for t, token in enumerate(response["tokens"]):
        cells = "".join(f"{after[name][t] + 0.0:>11.5f}" for name in ("logp", "value", "ratio"))
        lines.append(f"{t:>3} {token!r:14.14}{cells}    {'yes' if after['clipped'][t] else 'no'}")
    return "\n".join(lines)
