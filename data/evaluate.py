"""Compare any checkpoints: what they score, whom they beat, what they lost on the way.

    python -m data.evaluate out/base out/sft out/ppo                   judged by the tiny world's gold judge
    python -m data.evaluate out/sft out/ppo --judge out/reward --best_of 1,4,16,64
    python -m data.evaluate out/sft out/ppo --judge ai:out/base        the base model picks (A) or (B)
    python -m data.evaluate SFT PPO --data prompts.jsonl --judge RM    your models, prompts and reward model

Every model answers the same prompts once. What is measured:
    gold, families   the tiny world's exact judge (data/world/judge.py); skill: the share of right answers of
                     the helpful family, however long
    kl               sum_t KL(model(. | y_<t) || reference(. | y_<t)) over the model's own answers, in nats
                     per answer, both at temperature 1
    distinct_n       different n-grams / all n-grams over all answers (arXiv:1510.03055); unique: of answers
    bits_per_byte    on the last 2 % of the corpus, which pretraining did not see: the alignment tax
                     (arXiv:2203.02155)
    win rate         share of the prompts on which the judge prefers one model's answer to the other's, ties
                     one half, with a 95 % interval from a bootstrap over prompts
    length-controlled win rate (arXiv:2404.04475):  P(a over b) = sigmoid(theta + phi tanh(dlen / std(dlen)))
                     fitted to the preferences, read at dlen = 0: what it would be if both answers were
                     equally long (where one model is always the longer one this is an extrapolation). The
                     paper's third term, how hard each instruction is, needs many models and is left out
    best-of-N        mean over prompts of the best of N of the reference's answers by reward, at a KL of at
                     most log N - (N - 1) / N (arXiv:2009.01325, appendix G.3; less where answers come
                     twice), estimated without bias from one set of S >= N answers: the i-th smallest of S is
                     the best of N of them with probability C(i - 1, N - 1) / C(S, N). A reward of steps also
                     chooses by the product and by the smallest of an answer's step scores
                     (arXiv:2305.20050). An answer that --max_new cut off may be the best, too
At the bottom stands a control that says the same polite nothing to every prompt. A judge it wins with is
broken.

Leaves --out with result.json and generations.jsonl (every answer).
"""
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data import InputError, report, world, write_json, write_jsonl
from data.files import formats
from data.folder import result_of, take
from data.endpoint import local_critic
from data.flags import ToolFlags, names_in, program
from data.principles import compare, constitution
from data.prompts import read_corpus, short_enough
from data.rewards import scorer_on
from data.setup import seeded, setup
from data.sample import load_sampler, repeated, sample_answers

CONTROL = "That is a great question! Thank you for asking. I hope this helps you."


@dataclass
class Config(ToolFlags):
    """The flags of `python -m data.evaluate`."""
    # What is compared, on what
    models: str = ""              # policies to compare, A,B,C; may also be written first, with spaces between
    reference: str = ""   # the KL is to this policy (default: the first that sft.py made, else the first)
    data: str = ""                # prompts (default: the tiny world's test prompts)
    prompts: int = 400            # use the first so many
    corpus: str = ""              # text for bits_per_byte, its last 2 % (default: the tiny world's corpus)
    max_new: int = 48             # longest answer, in tokens
    temperature: float = 1.0      # of sampling
    # Who judges
    judge: str = "gold"   # gold, annotator, a reward model, or ai:CHECKPOINT: a language model picks A or B
    reward: str = ""   # reward model, or implicit:POLICY:REFERENCE, for the reward row and --best_of
                                  # (default: the judge if it is one)
    best_of: str = ""             # N or N,N,...: best-of-N answers of the reference by the reward model
    noise: float = 0.05           # of the annotator, as in reward.py
    bias_length: float = 0.0      # annotator: extra utility per ten words
    bias_confidence: float = 0.0  # annotator: extra utility for sounding sure
    bias_sycophancy: float = 0.0  # annotator: extra utility for agreeing with the user
    # The run itself (the same in every script)
    out: str = "out/evaluate"     # folder for result.json and generations.jsonl
    overwrite: bool = False       # replace what an evaluation with other flags left there


# ------------------------------------------------------------------------------------------------------------
# Statistics, as pure functions.


def bootstrap(prefs, seed=0, draws=1000):
    """95 % interval (low, high) of the mean of prefs (N,): percentiles of the means of resampled prompts."""
    prefs = np.asarray(prefs, dtype=float)
    at = np.random.default_rng(seed).integers(len(prefs), size=(draws, len(prefs)))
    return tuple(float(x) for x in np.percentile(prefs[at].mean(1), [2.5, 97.5]))


def length_controlled(prefs, dlen, ridge=1e-2):
    """Win rate at equal length (arXiv:2404.04475): fits prefs (N,) in [0, 1] by sigmoid(theta + phi tanh(dlen
    / std)) with Newton's method and returns sigmoid(theta). The ridge keeps theta finite when one side always
    wins."""
    prefs, dlen = np.asarray(prefs, dtype=float), np.asarray(dlen, dtype=float)
    x = np.stack([np.ones_like(dlen), np.tanh(dlen / max(dlen.std(), 1e-9))], 1)      # (N, 2)
    w = np.zeros(2)                                                                   # theta, phi
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))                                                  # (N,)
        gradient = x.T @ (prefs - p) - ridge * w
        curvature = x.T @ (x * (p * (1 - p))[:, None]) + ridge * np.eye(2)
        w += np.linalg.solve(curvature, gradient)
    return float(1 / (1 + np.exp(-w[0])))


def best_of_n(proxy, values, n):
    """Mean over prompts of `values` (P, S) at the best by `proxy` (P, S) of n answers, over all choices of n
    from S."""
    S = proxy.shape[1]
    # weights[i]: the chance that the one with i below it is the best of n: the others are n - 1 of the i.
    weights = np.array([math.comb(i, n - 1) / math.comb(S, n) for i in range(S)])
    order = proxy.argsort(1, kind="stable")
    return float((np.take_along_axis(values, order, 1) @ weights).mean())


# ------------------------------------------------------------------------------------------------------------
# Judges: score(rows, texts) gives an answer a number; an AI judge compares two answers directly.


def load_scorers(cfg, reward, device):
    """{name: Scorer} of the reward (a path, or "") and of the judge that the flags name, each loaded once."""
    scorers = {}
    if reward:
        scorers[reward] = scorer_on("--reward", reward, device)
    if cfg.judge not in ("annotator", reward) and not cfg.judge.startswith("ai:"):
        scorers[cfg.judge] = scorer_on("--judge", cfg.judge, device)
    return scorers


def score_by(judge, scorers, cfg):
    """The function (rows, texts) -> list of floats of a judge named in the flags; None for an AI judge."""
    if judge.startswith("ai:"):
        return None
    if judge == "annotator":
        annotator = world.Annotator(cfg.noise, 0.0, cfg.bias_length, cfg.bias_confidence, cfg.bias_sycophancy)
        return annotator.utilities
    return scorers[judge].score_texts


def choices_of_ai(path, cfg, device):
    """prefers(rows, a, b) -> P(a preferred to b), a list of floats, by a language model that picks (A) or (B)
    under a principle of the constitution, averaged over both orders; None where it cannot read the two."""
    _, ask = local_critic(path, device)
    _, choose = constitution(str(world.HERE / "constitution.json"))

    def prefers(rows, a, b):
        pairs = []
        for row, x, y in zip(rows, a, b):
            pairs.append((row["prompt"], x.strip(), y.strip()))
        chances = []
        for label in compare(pairs, choose, ask, random.Random(cfg.seed)):
            chances.append(None if label is None else label["p"])
        return chances
    return prefers


def choices(judge, score, cfg, device):
    """prefers(rows, texts, a, b) -> 1.0 (a), 0.0 (b), 0.5 (a tie) or None (not judged) for the answers
    texts[a] and texts[b] of two models to each prompt. score: what score_by gives for the judge."""
    ai = choices_of_ai(judge.removeprefix("ai:"), cfg, device) if score is None else None
    scored = {}     # {model: the scores of its answers}, computed once
    noise = cfg.noise if judge == "annotator" else 0.0

    def prefers(rows, texts, a, b):
        if ai:
            chosen = []
            for p in ai(rows, texts[a], texts[b]):
                chosen.append(None if p is None else float(np.sign(p - 0.5) + 1) / 2)
        else:
            for name in (a, b):
                if name not in scored:
                    scored[name] = score(rows, texts[name])
            rng = random.Random(f"{cfg.seed} {a} {b}")
            chosen = [world.annotate(u, v, noise, rng) for u, v in zip(scored[a], scored[b])]
        # The same words are a tie, whoever judges.
        for i, (x, y) in enumerate(zip(texts[a], texts[b])):
            if x.strip() == y.strip():
                chosen[i] = 0.5
        return chosen
    return prefers


# ------------------------------------------------------------------------------------------------------------
# What can be said of one model, of two, and of best-of-N.


def short_names(paths):
    """A short name per path: its last part, or as much of the end as it takes to tell it from the others."""
    parts = [Path(path).parts for path in (*paths, "control")]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names[:-1]
    raise InputError(f"--models {','.join(paths)}: the same checkpoint twice")


def answer_and_measure(model, tok, reference, rows, cfg):
    """A model's answers (texts) to the prompts, and what can be said of it without a judge: {name: number}.
    reference: (model, tokenizer) that the KL is to."""
    prompts = [row["prompt"] for row in rows]
    texts, asked, ids = sample_answers(model, tok, prompts, cfg.max_new, seeded(cfg.seed, 0), cfg.temperature)
    metrics = {}
    ref, ref_tok = reference
    # The KL is over tokens: between models with other vocabularies there is none.
    if tok.same_as(ref_tok):
        metrics["kl"], metrics["entropy"] = report.mean_kl(model, ref, tok, asked, ids)
    else:
        _, metrics["entropy"] = report.mean_kl(model, model, tok, asked, ids)
    # The last 2 %, which pretraining holds out.
    _, tail = read_corpus(cfg.corpus or world.TINY / "corpus.txt", tok, 128, min_windows=1)
    metrics["bits_per_byte"] = report.bits_per_byte(model, tok, tail.to(model.wte.weight.device))
    metrics |= report.metrics_of_ids(tok, ids)
    for n in (1, 3):
        metrics[f"distinct_{n}"] = report.distinct_n(ids, n)
    return texts, metrics


def describe_answers(rows, texts, graded, reward):
    """Metrics of answers, whoever gave them: gold and families, skill, reward, how many differ, words."""
    metrics = {}
    if graded:
        metrics |= world.mean_scores(rows, texts)
        right = []
        for row, text in zip(rows, texts):
            if row["family"] == "helpful":
                right.append(world.judge(row, text)["helpful"])
        if right:
            metrics["skill"] = sum(right) / len(right)
    if reward:
        scores = reward.score_texts(rows, texts)
        metrics["reward"] = sum(scores) / len(scores)
    metrics["unique"] = len({text.strip() for text in texts}) / len(texts)
    metrics["words"] = sum(len(text.split()) for text in texts) / len(texts)
    return metrics


def win_rates(texts, rows, prefers, seed):
    """{a: {b: {"win_rate", "low", "high", "length_controlled", "not_judged"}}} of every two models' answers,
    both ways. What a judge could not read is no tie: it is left out and counted. InputError: nothing is
    left."""
    names, wins = list(texts), {name: {} for name in texts}
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            prefs, longer = [], []
            for p, x, y in zip(prefers(rows, texts, a, b), texts[a], texts[b]):
                if p is not None:
                    prefs.append(p)
                    longer.append(len(x) - len(y))     # characters
            if not prefs:
                raise InputError(f"--judge can read none of {len(rows)} comparisons of {a} and {b}: they are "
                                 "too long for its context")
            low, high = bootstrap(prefs, seed)
            rate, even = sum(prefs) / len(prefs), length_controlled(prefs, longer)
            n_lost = len(rows) - len(prefs)
            wins[a][b] = {"win_rate": rate, "low": low, "high": high, "length_controlled": even,
                          "not_judged": n_lost}
            wins[b][a] = {"win_rate": 1 - rate, "low": 1 - high, "high": 1 - low,
                          "length_controlled": 1 - even, "not_judged": n_lost}
    return wins


def best_answers(model, tok, rows, reward, ns, graded, cfg):
    """Rows {"n", "kl", "reward", "gold"}: the mean best of n answers by a reward (a Scorer), for each n. One
    of steps also has "gold_product" and "gold_smallest", chosen by the product and the smallest of the
    answer's step scores."""
    many = repeated(rows, ns[-1])
    texts, _, _ = sample_answers(model, tok, [row["prompt"] for row in many], cfg.max_new,
                                 seeded(cfg.seed, 1), cfg.temperature)

    # Every n is drawn from the same answers (P, S), S as many as the largest n. What chooses, by the name of
    # the gold score it leads to:
    chosen_by = {"gold": reward.score_texts(many, texts)}
    steps = reward.step_scores(many, texts)
    if steps:
        chosen_by["gold_product"] = [math.prod(scores) for scores in steps]
        chosen_by["gold_smallest"] = [min(scores) for scores in steps]
    shape = (len(rows), ns[-1])
    proxy = np.array(chosen_by["gold"]).reshape(shape)
    gold = np.array(world.gold(many, texts)).reshape(shape) if graded else None
    found = []
    for n in ns:
        best = {"n": n, "kl": math.log(n) - (n - 1) / n, "reward": best_of_n(proxy, proxy, n)}
        if graded:
            for name, scores in chosen_by.items():
                best[name] = best_of_n(np.array(scores).reshape(shape), gold, n)
        found.append(best)
    return found


def numbers_of(text):
    """The whole numbers of --best_of, in order. InputError: others stand there."""
    try:
        ns = sorted({int(n) for n in text.split(",") if n})
    except ValueError:
        ns = [0]
    if ns and ns[0] < 1:
        raise InputError(f"--best_of {text}: expected whole numbers from 1, with commas between")
    return ns


def show(metrics, wins, best, n_prompts, judge):
    """Print what was found."""
    print(report.table(metrics, explained=True))
    print(f"\nwin rate of the row against the column, judged by {judge}, {n_prompts} prompts, ties count one "
          "half")
    names, grid = list(wins), {}
    for b in names:
        grid[b] = {}
        for a in names:
            grid[b][a] = wins[a][b]["win_rate"] if a != b else 0.5
    print(report.table(grid))
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            w = wins[a][b]
            print(f"{a} against {b}: {w['win_rate']:.3f} [{w['low']:.3f}, {w['high']:.3f}], "
                  f"length-controlled {w['length_controlled']:.3f}")
            if w["not_judged"]:
                print(f"    without {w['not_judged']} of {n_prompts} comparisons, too long for the judge")
    for name in names[:-1]:
        if wins["control"][name]["low"] > 0.5:
            print(f"THE JUDGE IS BROKEN: {judge} prefers \"{CONTROL}\", said to every prompt, to {name} "
                  f"({wins['control'][name]['win_rate']:.3f})")
    if best:
        print("\nbest of N answers of the reference by the reward model")
        columns = {f"N={row['n']}": row for row in best}
        print(report.table(columns, leave_out=("n",)))


# ------------------------------------------------------------------------------------------------------------
# The command.


def read_flags(cfg):
    """(paths of the models, numbers N of --best_of, reward model or "") that the flags name. InputError:
    flags that do not go together."""
    paths = [path for path in names_in(cfg.models) if path]
    if not paths:
        raise InputError("no models to compare, e.g. python -m data.evaluate out/base out/sft out/ppo")
    ns, reward = numbers_of(cfg.best_of), cfg.reward
    judged_by_reward = cfg.judge not in ("gold", "annotator") and not cfg.judge.startswith("ai:")
    if judged_by_reward and not reward:
        reward = cfg.judge
    if ns and not reward:
        raise InputError(f"--best_of {cfg.best_of} needs a reward model: --reward")
    return paths, ns, reward


def reference_of(cfg, paths):
    """The path of the policy that the KL is to: --reference, or the first one that sft.py made, or the
    first."""
    for path in paths:
        if not cfg.reference and result_of(path).get("stage") == "sft":
            return path
    return cfg.reference or paths[0]


def load_all(paths, scorers, rows, data, cfg, device):
    """{path: (model, tokenizer)} of the paths, and the prompt rows that leave room for an answer in the
    context of every one of them, and of what judges (Scorers). InputError: none does."""
    loaded, fitting = {}, rows
    for scorer in scorers:
        fitting = scorer.readable(fitting, cfg.max_new)
    for path in dict.fromkeys(paths):
        model, tok = load_sampler(path, device)
        loaded[path] = (model, tok)
        fitting = short_enough(tok, fitting, model.cfg.max_len - cfg.max_new)
    print(f"{len(fitting)} prompts, {len(rows) - len(fitting)} too long for a model's context left out; "
          f"KL to {paths[0]}")
    if not fitting:
        raise InputError(f"{data}: no prompt leaves room for --max_new {cfg.max_new} tokens in every model's "
                         "context")
    return loaded, fitting


@torch.no_grad()
def main(cfg):
    """Have every model answer, judge the answers, report."""
    start, device = time.perf_counter(), setup(cfg)
    paths, ns, reward_path = read_flags(cfg)
    names, folder = short_names(paths), Path(cfg.out)

    # The prompts, and whether the tiny world knows their right answers.
    data = cfg.data or world.TINY / "test.jsonl"
    rows, dropped = formats.load(data, "prompt", cfg.prompts)
    print(formats.describe(rows, dropped, data))
    graded = all(map(world.knows, rows))
    if cfg.judge in ("gold", "annotator") and not graded:
        raise InputError(f"{data}: --judge {cfg.judge} knows the tiny world's prompts only; "
                         "give a reward model or ai:CHECKPOINT")

    # Judge, reward and models.
    scorers = load_scorers(cfg, reward_path, device)
    reward, score = scorers.get(reward_path), score_by(cfg.judge, scorers, cfg)
    prefers = choices(cfg.judge, score, cfg, device)
    reference = reference_of(cfg, paths)
    loaded, rows = load_all([reference, *paths], scorers.values(), rows, data, cfg, device)

    # The folder is taken here, so that what was refused so far has left none.
    inputs = [*paths, reference, cfg.judge, cfg.reward, cfg.data, cfg.corpus]
    take(cfg, "evaluate", ["result.json", "generations.jsonl"], inputs)

    # Every model answers; the control says the same to everybody.
    texts, metrics = {}, {}
    for name, path in zip(names, paths):
        texts[name], metrics[name] = answer_and_measure(*loaded[path], loaded[reference], rows, cfg)
    texts["control"], metrics["control"] = [CONTROL] * len(rows), {}
    for name in texts:
        metrics[name] = describe_answers(rows, texts[name], graded, reward) | metrics[name]

    # Every model against every other and against the control; best of N.
    wins = win_rates(texts, rows, prefers, cfg.seed)
    best = best_answers(*loaded[reference], rows, reward, ns, graded, cfg) if ns else []

    lines = []
    for name in texts:
        for row, text in zip(rows, texts[name]):
            lines.append({"model": name, "prompt": row["prompt"], "response": text})
    write_jsonl(folder / "generations.jsonl", lines)
    result = {"stage": "evaluate", "seed": cfg.seed, "config": asdict(cfg), "device": str(device),
              "seconds": round(time.perf_counter() - start, 1), "models": metrics, "wins": wins,
              "best_of": best}
    write_json(folder / "result.json", result)
    show(metrics, wins, best, len(rows), cfg.judge)
    for name, path in zip(names, paths):
        note = report.run_note(result_of(path))
        if note:
            print(f"{name}: {note}")


if __name__ == "__main__":
    # Paths before the first flag are --models.
    at = 1
    while at < len(sys.argv) and not sys.argv[at].startswith("-"):
        at += 1
    if at > 1:
        sys.argv[1:at] = ["--models", ",".join(sys.argv[1:at])]
    program(main, Config, __doc__)
