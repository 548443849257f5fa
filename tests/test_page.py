"""data/page.py: the page shows what the files say, no text of a data set can run, and nothing missing stops it."""
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from data import page

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)> & \"quotes\" 'single' `tick` ${1}",
           "<!--<script>", "\u2028line\u2029paragraph", "\u202eright to left override", "مرحبا بالعالم שלום", "👩‍👩‍👧 🏳️‍🌈",
           "{{DATA}}", "back\\slash\\", "nul\x00 and \ud800 half a pair", "a" * 400, "\n\nHuman: two\n\nAssistant: turns"]


# ---------------------------------------------------------------------------------------------------------------------
# A folder of runs as the scripts leave it, of realistic size, with hostile texts among the answers.


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(out, name, stage, steps, figures, before, after, config=None):
    """log.jsonl and result.json of one run; figures {name: function of the share that is done}."""
    rows = [{"step": n + 1, **{key: f(n / steps) for key, f in figures.items()}} for n in range(steps)]
    write_lines(out / name / "log.jsonl", rows)
    result = {"stage": stage, "seed": 0, "config": config or {}, "seconds": 144.4, "device": "cpu", "before": before,
              "after": after}
    (out / name / "result.json").write_text(json.dumps(result, indent=1))


def gold_figures(gold):
    return {"gold": gold, "helpful": gold - 0.1, "harmless": gold + 0.02, "honest": gold + 0.07, "length": 11.4}


def fake_answers(rng, level):
    """answers.jsonl of a policy of this quality, on the tiny world's test prompts."""
    rows = []
    for i, line in enumerate((ROOT / "data" / "tiny" / "test.jsonl").read_text().splitlines()):
        row = json.loads(line)
        family, sides = row["family"], []
        for quality in (level / 2, level):
            right = float(rng.random() < quality)
            text = f"It is {row['answer']}." if right else "It is a very great question, and many people ask me this."
            sides.append({"answer": rng.choice(HOSTILE) if i % 9 == 0 else text, "gold": right * 0.75, family: right,
                          "concise": 0.5, "reward": rng.gauss(right * 2, 0.5)})
        rows.append({"prompt": row["prompt"][-1]["content"], "family": family, "before": sides[0], "after": sides[1]})
    return rows


def fake_pairs(rng, many):
    rows = []
    for i in range(many):
        gold = [rng.choice([0, 0.5, 0.75, 1]) for _ in range(2)]
        r = [g * 3 - 1 + rng.gauss(0, 0.8) for g in gold]
        text = [rng.choice(HOSTILE) if i % 7 == 0 else "It is Paris." + " Have a very nice day." * rng.randint(0, 2)
                for _ in range(2)]
        rows.append({"prompt": [{"role": "user", "content": f"What is the capital of land {i}?"}], "a": text[0],
                     "b": text[1], "label": 0.5 if gold[0] == gold[1] else float(gold[0] > gold[1]),
                     "r_a": r[0], "r_b": r[1], "gold_a": gold[0], "gold_b": gold[1]})
    return rows


def fake_iteration(rng, n, responses=4):
    """One iteration whose numbers satisfy the equations of PPO."""
    out = {"iteration": n, "beta": 0.1, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "advantage": "gae", "mean": 0.1, "std": 0.8}
    out["responses"] = []
    for i in range(responses):
        tokens = ["I", " cannot", " help", " with", " that", HOSTILE[i], ".", "<eos>"]
        size, score = len(tokens), rng.gauss(1, 1)
        logp = [-abs(rng.gauss(0, 0.6)) for _ in tokens]
        ref = [x + rng.gauss(0, 0.1) for x in logp]
        reward = [-0.1 * (x - y) for x, y in zip(logp, ref)]
        reward[-1] += score
        value = [rng.gauss(0.5, 0.3) for _ in tokens]
        advantage, later = [0.0] * size, 0.0
        for t in reversed(range(size)):
            delta = reward[t] + (value[t + 1] if t + 1 < size else 0.0) - value[t]
            later = advantage[t] = delta + 0.95 * later
        whitened = [(x - 0.1) / 0.8 for x in advantage]
        ratio = [math.exp(rng.gauss(0, 0.12)) for _ in tokens]
        clipped = [(w > 0 and q > 1.2) or (w < 0 and q < 0.8) for w, q in zip(whitened, ratio)]
        out["responses"].append({
            "prompt": f"How do I steal a bike {i}?", "response": "".join(tokens[:-1]), "score": score, "ended": True,
            "tokens": tokens,
            "before": {"logp": logp, "ref_logp": ref, "reward": reward, "value": value, "advantage": advantage,
                       "whitened": whitened, "return": [a + v for a, v in zip(advantage, value)]},
            "after": {"logp": [x + math.log(q) for x, q in zip(logp, ratio)], "value": [v + 0.02 for v in value],
                      "ratio": ratio, "clipped": clipped}})
    return out


def make_out(out):
    """A whole OUT: the chain, DPO and IPO, a hacked policy, Constitutional AI, and what tests/hacking.py leaves."""
    rng = random.Random(0)
    falling = {"loss": lambda x: 6 * math.exp(-5 * x) + 0.4}
    rising = {"reward": lambda x: 0.6 + 1.2 * x, "gold": lambda x: 0.55 + 0.4 * x * (2 - x), "kl": lambda x: 0.9 * x,
              "kl_exact": lambda x: 0.92 * x, "entropy": lambda x: 0.27 - 0.2 * x, "length": lambda x: 11 + x,
              "eos_rate": lambda x: 0.95 + 0.05 * x}
    hacked = {**rising, "reward": lambda x: 0.3 + 3 * x, "gold": lambda x: 0.55 + x - 1.3 * x * x, "kl": lambda x: 9 * x,
              "kl_exact": lambda x: 9 * x}
    pairs = {"loss": lambda x: 0.69 - 0.5 * x, "accuracy": lambda x: 0.5 + 0.45 * x, "margin": lambda x: 3 * x,
             "chosen_reward": lambda x: 0.8 * x, "rejected_reward": lambda x: -2.2 * x}
    write_run(out, "base", "pretrain", 1600, falling, {"bits_per_byte": 3.0657}, {"bits_per_byte": 0.1931})
    write_run(out, "sft", "sft", 267, falling, gold_figures(0.25), gold_figures(0.55875))
    write_run(out, "reward", "reward", 344, pairs, {"accuracy": 0.511, "loss": 0.6955}, {"accuracy": 0.850, "loss": 0.463})
    write_run(out, "ppo", "ppo", 70, rising, gold_figures(0.55), {**gold_figures(0.938), "kl": 0.93, "reward": 1.8},
              {"advantage": "gae"})
    write_run(out, "dpo", "dpo", 260, pairs, gold_figures(0.55), {**gold_figures(0.941), "kl": 1.33, "win_rate": 0.785},
              {"loss": "dpo"})
    write_run(out, "ipo", "dpo", 260, pairs, gold_figures(0.55), {**gold_figures(0.9), "kl": 1.1}, {"loss": "ipo"})
    write_run(out, "hacked", "ppo", 30, hacked, gold_figures(0.55), gold_figures(0.5), {"advantage": "gae"})
    write_run(out, "cai", "cai", 3, {"gold": lambda x: x}, gold_figures(0.5), {**gold_figures(0.8), "harmless_rate": 0.96})
    levels = {"sft": 0.55, "ppo": 0.94, "dpo": 0.93, "ipo": 0.9, "hacked": 0.5, "cai": 0.8}
    for name, level in levels.items():
        write_lines(out / name / "answers.jsonl", fake_answers(rng, level))
    write_lines(out / "reward" / "held_out.jsonl", fake_pairs(rng, 200))
    write_lines(out / "reward" / "comparisons.jsonl", [{"chosen": "x" * 200}] * 9000)
    for name in ("ppo", "hacked"):
        iterations = {"first": fake_iteration(rng, 1), "last": fake_iteration(rng, 70)}
        (out / name / "inspect.json").write_text(json.dumps(iterations))
    folder, chains, chosen = out / "cai" / "round1", [], []
    for i in range(800):
        prompt = [{"role": "user", "content": f"How do I do harm {i}?"}]
        steps = [{"principle": "constitution 1", "critique": HOSTILE[i % len(HOSTILE)], "revision": "I cannot help with that.",
                  "fault": "worse" if n == i % 2 else "", "p": 0.6} for n in range(2)]
        chains.append({"prompt": prompt, "initial": " You mix it.", "chain": steps})
        chosen.append({"prompt": prompt, "chosen": "I cannot.", "rejected": "You mix it.", "label": 0.8, "by": "ai",
                       "orders": [0.3, 0.1], "principle": "constitution 0"})
    write_lines(folder / "chains.jsonl", chains)
    write_lines(folder / "comparisons.jsonl", chosen)
    (folder / "critic.json").write_text(json.dumps({"ai_gold": 0.62, "human_gold": 0.99, "first_wins": 0.55}))
    for seed in range(2):
        write_run(out / "hacking" / f"confidence{seed}", "none", "ppo", 60, hacked, {}, {})
    told = out / "hacking" / "confidence0" / "evaluate_none"
    told.mkdir()
    best = [{"n": n, "kl": math.log(n) - (n - 1) / n, "reward": 0.5 + 0.3 * math.log(n), "gold": 0.6} for n in (1, 2, 4, 8, 64)]
    (told / "result.json").write_text(json.dumps({"best_of": best}))
    cures = [{"bias": "confidence", "seed": s, "cure": c, "reward": 3.8, "gold": 0.406, "kl": 11.0, "lost": 0.2, "cured": None}
             for s in range(2) for c in ("none", "kl")]
    (out / "hacking" / "cures.json").write_text(json.dumps(cures))
    return out
