"""Compare any checkpoints: what they score, whom they beat, what they lost on the way.

    python -m data.evaluate out/base out/sft out/ppo                        judged by the tiny world's gold judge
    python -m data.evaluate out/sft out/ppo --judge out/reward --best_of 1,4,16,64
    python -m data.evaluate out/sft out/ppo --judge ai:out/base             the base model picks (A) or (B)
    python -m data.evaluate SFT PPO --data prompts.jsonl --judge RM         your models, prompts and reward model

Every model answers the same prompts once. What is measured:
    gold, families   the tiny world's exact judge (data/world.py); skill: the share of right answers of the helpful
                     family, however long
    kl               sum_t KL(model(. | y_<t) || reference(. | y_<t)) over the model's own answers, in nats per answer
    distinct_n       different n-grams / all n-grams over all answers (arXiv:1510.03055); unique: the same of answers
    bits_per_byte    on the last 2 % of the corpus, which pretraining did not see: the alignment tax (arXiv:2203.02155)
    win rate         share of the prompts on which the judge prefers one model's answer to the other's, ties one half,
                     with a 95 % interval from a bootstrap over prompts
    length-controlled win rate (arXiv:2404.04475):  P(a over b) = sigmoid(theta + phi tanh(dlen / std(dlen)))  fitted to
                     the preferences, read at dlen = 0: what it would be if both answers were equally long (where one
                     model is always the longer one this is an extrapolation)
    best-of-N        mean over prompts of the best of N answers by reward, at KL = log N - (N - 1) / N
                     (arXiv:2009.01325, appendix G.3), estimated without bias from one set of S >= N answers:
                     the i-th smallest of S is the best of N of them with probability C(i - 1, N - 1) / C(S, N)
At the bottom stands a control that says the same polite nothing to every prompt. A judge it wins with is broken.

Leaves --out with result.json, generations.jsonl (every answer) and plot.png.
"""
import json
import math
import random
import sys
import time
import typing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data import InputError, formats, world
from model import (bits_per_byte, load, pad_batch, read_corpus, respond, result_of, run, seeded, setup, table,
                   write_atomic)

CONTROL = "That is a great question! Thank you for asking. I hope this helps you."


@dataclass
class Config:
    """The flags of `python -m data.evaluate`."""
    models: str = ""              # policies to compare, A,B,C; may also be written first, with spaces between
    judge: str = "gold"           # gold, annotator, a reward model, or ai:CHECKPOINT: a language model picks A or B
    reward: str = ""              # reward model for the reward row and --best_of (default: the judge if it is one)
    reference: str = ""           # the KL is to this policy (default: the first that sft.py made, else the first)
    data: str = ""                # prompts (default: the tiny world's test prompts)
    prompts: int = 400            # use the first so many
    corpus: str = ""              # text for bits_per_byte, its last 2 % (default: the tiny world's corpus)
    out: str = "out/evaluate"     # folder for result.json, generations.jsonl and plot.png
    max_new: int = 48             # longest answer, in tokens
    temperature: float = 1.0      # of sampling
    best_of: str = ""             # N or N,N,...: best-of-N answers of the reference by the reward model
    noise: float = 0.05           # of the annotator, as in reward.py
    bias_length: float = 0.0      # annotator: extra utility per ten words
    bias_confidence: float = 0.0  # annotator: extra utility for sounding sure
    bias_sycophancy: float = 0.0  # annotator: extra utility for agreeing with the user
    seed: int = 0                 # every random draw comes from it
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products


# ---------------------------------------------------------------------------------------------------------------------
# Statistics, as pure functions.


def distinct(responses, n):
    """Different n-grams / all n-grams over responses (lists of ids) (Li et al. 2016, arXiv:1510.03055)."""
    grams = [tuple(ids[i: i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def bootstrap(prefs, seed=0, draws=1000):
    """95 % interval (low, high) of the mean of prefs (N,): percentiles of the means of resampled prompts."""
    prefs = np.asarray(prefs, dtype=float)
    at = np.random.default_rng(seed).integers(len(prefs), size=(draws, len(prefs)))
    return tuple(float(x) for x in np.percentile(prefs[at].mean(1), [2.5, 97.5]))


def length_controlled(prefs, dlen, ridge=1e-2):
    """Win rate at equal length (arXiv:2404.04475): fits prefs (N,) in [0, 1] by sigmoid(theta + phi tanh(dlen / std))
    with Newton's method and returns sigmoid(theta). The ridge keeps theta finite when one side always wins."""
    prefs, dlen = np.asarray(prefs, dtype=float), np.asarray(dlen, dtype=float)
    x = np.stack([np.ones_like(dlen), np.tanh(dlen / max(dlen.std(), 1e-9))], 1)      # (N, 2)
    w = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))                                                  # (N,)
        gradient = x.T @ (prefs - p) - ridge * w
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(2), gradient)
    return float(1 / (1 + np.exp(-w[0])))


def best_of_n(proxy, values, n):
    """Mean over prompts of `values` (P, S) at the best by `proxy` (P, S) of n answers, over all choices of n from S."""
    S = proxy.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(S, n) for i in range(S)])     # of the i-th smallest, from 0
    return float((np.take_along_axis(values, proxy.argsort(1, kind="stable"), 1) @ weights).mean())


# ---------------------------------------------------------------------------------------------------------------------
# The models at work.


@torch.no_grad()
def kl_and_entropy(model, ref, prompts, responses, tok, device, batch=16):
    """Mean KL(model || ref) per response and mean entropy per token, in nats, exact over the vocabulary at every token
    of `responses`, which follow `prompts` (lists of ids). ref None: the entropy alone, KL nan."""
    kl, entropy, n = math.nan if ref is None else 0.0, 0.0, 0
    for k in range(0, len(prompts), batch):
        part = list(zip(prompts[k: k + batch], responses[k: k + batch]))
        ids, _ = pad_batch([p + r for p, r in part], tok.pad_id, device)              # (B, T)
        mask = pad_batch([[0] * len(p) + [1] * len(r) for p, r in part], 0, device)[0][:, 1:].bool()
        logp = model.logits(model(ids)[:, :-1][mask]).float().log_softmax(-1)         # (tokens, V)
        entropy -= (logp.exp() * logp).sum().item()
        if ref is not None:
            ref_logp = ref.logits(ref(ids)[:, :-1][mask]).float().log_softmax(-1)
            kl += (logp.exp() * (logp - ref_logp)).sum().item()
        n += int(mask.sum())
    return kl / len(prompts), entropy / max(1, n)


def load_reward(path, device):
    """(reward model, its tokenizer). InputError: a language model."""
    rm, tok = load(path, device)
    if not rm.cfg.scalar_head:
        raise InputError(f"{path} is a language model, no reward model; as a judge it is called ai:{path}")
    return rm, tok


@torch.no_grad()
def rewards(rm, tok, rows, texts, device, batch=64):
    """Reward (list of floats) of one answer per prompt row, read at the EOS."""
    pairs = [tok.render_answer(r["prompt"], t.strip()) for r, t in zip(rows, texts)]
    flat, out = [x + y for x, y in pairs], [0.0] * len(texts)
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    for part in (order[k: k + batch] for k in range(0, len(order), batch)):
        ids, real = pad_batch([flat[i] for i in part], tok.pad_id, device)
        scores = rm.scores(rm(ids)[torch.arange(len(part), device=device), real.sum(1) - 1])
        for i, s in zip(part, scores.tolist()):
            out[i] = s
    return out


def comparison(prompt, question, a, b):
    """The text in which an AI judge compares two answers to a prompt (messages), as the corpus does."""
    turns = [m["content"] for m in prompt if m["role"] != "system"]
    return world.choice_question(turns, question, a.strip(), b.strip())


@torch.no_grad()
def prefers_a(judge, tok, rows, a, b, seed, device, batch=32):
    """P(a preferred to b) (list of floats) by a language model, for one pair of answers per prompt row: sigmoid of
    log P("A") - log P("B"), averaged over both orders (arXiv:2309.00267), under a principle of the constitution drawn
    for each prompt."""
    rng, flat = random.Random(seed), []
    constitution = json.loads((world.HERE / "constitution.json").read_text(encoding="utf-8"))
    for row, x, y in zip(rows, a, b):
        question = rng.choice(constitution)["choice"]
        flat += [[tok.eos_id, *tok.encode(comparison(row["prompt"], question, *pair))] for pair in ((x, y), (y, x))]
    letters, gaps = [tok.encode(letter)[0] for letter in "AB"], []
    for k in range(0, len(flat), batch):
        ids, real = pad_batch(flat[k: k + batch], tok.pad_id, device)
        last = judge(ids)[torch.arange(len(ids), device=device), real.sum(1) - 1]    # (B, C)
        logits = judge.logits(last).float()
        gaps += (logits[:, letters[0]] - logits[:, letters[1]]).tolist()
    return [1 / (1 + math.exp(-(first - second) / 2)) for first, second in zip(gaps[::2], gaps[1::2])]


def tail_of(path, tok, length=128):
    """Ids of the last 2 % of a corpus, as model.py holds them out, and their length in bytes."""
    ids = read_corpus(path, tok, length, least=1)[1]
    return ids, len(tok.decode(ids.tolist()).encode())


def labels(paths):
    """A short name per path: its last part, or as much of the end as it takes to tell it from the others."""
    parts = [Path(p).parts for p in (*paths, "control")]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names[:-1]
    raise InputError(f"--models {','.join(paths)}: the same checkpoint twice")


def plot(path, metrics, lengths, wins, best):
    """One picture: scores by family, lengths, win rates, and best-of-N if asked for."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"(no {path}: matplotlib is not installed)")
        return
    names = list(metrics)
    fig, axes = plt.subplots(1, 3 + bool(best), figsize=(4.5 * (3 + bool(best)), 3.6), layout="constrained")
    keys = [k for k in ("gold", *world.FAMILIES) if k in metrics["control"]] or ["reward"]
    keys = [k for k in keys if k in metrics["control"]] or ["unique"]
    for i, name in enumerate(names):
        at = np.arange(len(keys)) + 0.8 * i / len(names)
        axes[0].bar(at, [metrics[name][k] for k in keys], 0.8 / len(names), label=name)
        axes[1].hist(lengths[name], bins=range(0, 2 + max(map(max, lengths.values()))), histtype="step", label=name)
    axes[0].set_xticks(np.arange(len(keys)) + 0.4 - 0.4 / len(names), keys)
    axes[0].set_title("mean score of the answers")
    axes[1].set(title="length of the answers", xlabel="words", ylabel="answers")
    axes[0].legend(), axes[1].legend()
    grid = np.array([[0.5 if a == b else wins[a][b]["win_rate"] for b in names] for a in names])
    axes[2].imshow(grid, vmin=0, vmax=1, cmap="RdYlGn")
    for (i, j), x in np.ndenumerate(grid):
        axes[2].text(j, i, f"{x:.2f}", ha="center", va="center")
    axes[2].set_xticks(range(len(names)), names, rotation=45)
    axes[2].set_yticks(range(len(names)), names)
    axes[2].set_title("row wins against column")
    if best:
        at = [b["kl"] ** 0.5 for b in best]
        for key in ("reward", "gold"):
            axes[3].plot(at, [b[key] for b in best], "o-", label=key) if key in best[0] else None
        axes[3].set(title="best of N", xlabel="sqrt(KL) in nats, KL = log N - (N - 1) / N")
        axes[3].legend(), axes[3].grid(alpha=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------


def main(cfg):
    """Have every model answer, judge the answers, report."""
    start = time.time()
    device, autocast = setup(cfg)
    paths = [p for p in cfg.models.split(",") if p]
    if not paths:
        raise InputError("no models to compare, e.g. python -m data.evaluate out/base out/sft out/ppo")
    names = labels(paths)
    try:
        ns = sorted({int(n) for n in cfg.best_of.split(",") if n})
    except ValueError:
        ns = [0]
    if ns and ns[0] < 1:
        raise InputError(f"--best_of {cfg.best_of}: expected whole numbers from 1, with commas between")
    plain = cfg.judge in ("gold", "annotator")
    ai = cfg.judge.removeprefix("ai:") if cfg.judge.startswith("ai:") else ""
    path = cfg.reward or ("" if plain or ai else cfg.judge)
    if ns and not path:
        raise InputError(f"--best_of {cfg.best_of} needs a reward model: --reward")
    rm, rm_tok = load_reward(path, device) if path else (None, None)
    judge, judge_tok = ((None, None) if plain else load(ai, device, scalar_head=False) if ai else
                        (rm, rm_tok) if path == cfg.judge else load_reward(cfg.judge, device))
    data = cfg.data or world.TINY / "test.jsonl"
    rows, dropped = formats.load(data, "prompt", cfg.prompts)
    print(formats.describe(rows, dropped, data))
    graded = all("family" in r for r in rows)   # the tiny world knows its prompts' right answers
    if plain and not graded:
        raise InputError(f"{data}: --judge {cfg.judge} knows the tiny world's prompts only; "
                         "give a reward model or ai:CHECKPOINT")
    reference = cfg.reference or next((p for p in paths if result_of(p).get("stage") == "sft"), paths[0])
    loaded = {p: load(p, device, scalar_head=False) for p in dict.fromkeys([reference, *paths])}
    fits = lambda r: all(len(tok.render(r["prompt"], True)[0]) + cfg.max_new <= m.cfg.max_len   # noqa: E731
                         for m, tok in loaded.values())
    n_all, rows = len(rows), [r for r in rows if fits(r)]
    print(f"{len(rows)} prompts, {n_all - len(rows)} too long for a model's context left out; KL to {reference}")
    if not rows:
        raise InputError(f"{data}: no prompt leaves room for --max_new {cfg.max_new} tokens in every model's context")
    prompts = [r["prompt"] for r in rows]
    ref, ref_tok = loaded[reference]

    # ---- every model answers; what can be said of it alone
    texts, metrics, wins = {}, {}, {}
    for name, model_path in zip(names, paths):
        model, tok = loaded[model_path]
        same = (tok.enc._mergeable_ranks, tok.special) == (ref_tok.enc._mergeable_ranks, ref_tok.special)
        tail, n_bytes = tail_of(cfg.corpus or world.TINY / "corpus.txt", tok)
        with torch.no_grad(), autocast():
            texts[name], asked, ids = respond(model, tok, prompts, cfg.max_new, temperature=cfg.temperature,
                                              generator=seeded(cfg.seed, 0, device))
            kl, entropy = kl_and_entropy(model, ref if same else None, asked, ids, tok, device)
            bpb = bits_per_byte(model, tail.to(device), n_bytes)
        metrics[name] = ({} if math.isnan(kl) else {"kl": kl}) | {
            "entropy": entropy, "length": sum(map(len, ids)) / len(ids), "bits_per_byte": bpb,
            "eos_rate": sum(tok.eos_id in x for x in ids) / len(ids),
            **{f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)}}
    texts["control"], metrics["control"] = [CONTROL] * len(rows), {}
    lengths = {name: [len(t.split()) for t in answers] for name, answers in texts.items()}
    for name, answers in texts.items():
        scores = {}
        if graded:
            scores |= world.report(rows, answers)
            right = [world.judge(r, t)["helpful"] for r, t in zip(rows, answers) if r["family"] == "helpful"]
            scores |= {"skill": sum(right) / len(right)} if right else {}
        if rm is not None:
            with autocast():
                r = rewards(rm, rm_tok, rows, answers, device)
            scores["reward"] = sum(r) / len(r)
        unique = len({t.strip() for t in answers}) / len(answers)
        metrics[name] = scores | metrics[name] | {"unique": unique, "words": sum(lengths[name]) / len(rows)}

    # ---- every model against every other and against the control
    bias = dict(length=cfg.bias_length, confidence=cfg.bias_confidence, sycophancy=cfg.bias_sycophancy)
    utility = {}
    for name, answers in texts.items():
        if plain:
            utility[name] = [world.utility(r, t, **(bias if cfg.judge == "annotator" else {}))
                             for r, t in zip(rows, answers)]
        elif not ai:
            with autocast():
                utility[name] = rewards(judge, judge_tok, rows, answers, device)
    everyone = list(texts)
    for i, a in enumerate(everyone):
        for b in everyone[i + 1:]:
            if ai:
                with autocast():
                    p = prefers_a(judge, judge_tok, rows, texts[a], texts[b], cfg.seed, device)
                prefs = [float(x > 0.5) if x != 0.5 else 0.5 for x in p]
            else:
                rng, noise = random.Random(f"{cfg.seed} {a} {b}"), cfg.noise if cfg.judge == "annotator" else 0
                prefs = [world.annotate(u, v, noise, rng) for u, v in zip(utility[a], utility[b])]
            prefs = [0.5 if x.strip() == y.strip() else p for x, y, p in zip(texts[a], texts[b], prefs)]
            low, high = bootstrap(prefs, cfg.seed)
            dlen = [len(x) - len(y) for x, y in zip(texts[a], texts[b])]
            rate, even = sum(prefs) / len(prefs), length_controlled(prefs, dlen)
            wins.setdefault(a, {})[b] = {"win_rate": rate, "low": low, "high": high, "length_controlled": even}
            wins.setdefault(b, {})[a] = {"win_rate": 1 - rate, "low": 1 - high, "high": 1 - low,
                                         "length_controlled": 1 - even}

    # ---- best of N answers of the reference, by the reward model
    best = []
    if ns:
        many = [r for r in rows for _ in range(ns[-1])]
        with torch.no_grad(), autocast():
            answers = respond(ref, ref_tok, [r["prompt"] for r in many], cfg.max_new, temperature=cfg.temperature,
                              generator=seeded(cfg.seed, 1, device))[0]
            proxy = np.array(rewards(rm, rm_tok, many, answers, device)).reshape(len(rows), -1)
        gold = np.array(world.gold(many, answers)).reshape(proxy.shape) if graded else None
        for n in ns:
            best.append({"n": n, "kl": math.log(n) - (n - 1) / n, "reward": best_of_n(proxy, proxy, n)}
                        | ({"gold": best_of_n(proxy, gold, n)} if graded else {}))

    # ---- the report
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    world.write_jsonl(folder / "generations.jsonl", [{"model": name, "prompt": r["prompt"], "response": t}
                                                     for name in texts for r, t in zip(rows, texts[name])])
    result = {"stage": "evaluate", "seed": cfg.seed, "config": asdict(cfg), "seconds": round(time.time() - start, 1),
              "device": str(device), "models": metrics, "wins": wins, "best_of": best}
    write_atomic(folder / "result.json", json.dumps(result, indent=1).encode())
    print(table(metrics))
    print(f"\nwin rate of the row against the column, judged by {cfg.judge}, {len(rows)} prompts")
    print(table({b: {a: 0.5 if a == b else wins[a][b]["win_rate"] for a in everyone} for b in everyone}))
    for i, a in enumerate(everyone):
        for b in everyone[i + 1:]:
            w = wins[a][b]
            print(f"{a} against {b}: {w['win_rate']:.3f} [{w['low']:.3f}, {w['high']:.3f}], "
                  f"length-controlled {w['length_controlled']:.3f}")
    for name in names:
        if wins["control"][name]["low"] > 0.5:
            print(f"THE JUDGE IS BROKEN: {cfg.judge} prefers \"{CONTROL}\", said to every prompt, to {name} "
                  f"({wins['control'][name]['win_rate']:.3f})")
    if best:
        print(f"\nbest of N answers of {reference} by {path}")
        print(table({f"N={b['n']}": {k: v for k, v in b.items() if k != "n"} for b in best}))
    plot(folder / "plot.png", metrics, lengths, wins, best)


if __name__ == "__main__":
    at = next((i for i, a in enumerate(sys.argv) if i and a.startswith("-")), len(sys.argv))
    if at > 1:   # paths before the first flag
        sys.argv[1:at] = ["--models", ",".join(sys.argv[1:at])]
    run(main, Config, __doc__)
