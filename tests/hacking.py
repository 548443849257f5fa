"""Reward hacking on demand, and what cures it: the runs behind the over-optimisation plots. Run by hand; takes hours.

    python tests/hacking.py                                        3 biases x 3 seeds x all cures, minutes each
    python tests/hacking.py --biases length --seeds 0 --cures none,kl,uwo
    python tests/hacking.py --ppo_flags="--iterations 5" ...       more flags for every run of a script: with the "="

For each bias of the annotator (reward.py --bias_length, --bias_confidence, --bias_sycophancy) and each seed:
    1. the biased annotator's comparisons make a reward model (some cures need further ones)
    2. ppo.py climbs it with next to no KL penalty and without new labels: the proxy rises, gold rises and then falls
       (Goodhart's law, arXiv:2210.10760); once more with each cure
    3. data/evaluate.py compares all these policies by the one reward model, and adds best-of-N of the SFT model
A run that is there already (a result.json) is not made again, one cut off goes on from its last checkpoint.

It leaves --out/BIAS.png (proxy and gold against sqrt(KL), the band spans the seeds), --out/cures.txt and cures.json:
per bias and cure, the mean over seeds (and smallest to largest) of
    proxy, gold, kl  on the test prompts, by the reward model that the run without a cure climbed
    lost             the fall of gold from its best five iterations to the last five, on the training prompts
    cured            the share of the fall without a cure that is absent with it: 1 where gold ends at that peak
"""
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import InputError   # noqa: E402
from model import run, write_atomic   # noqa: E402

BIASES = {"length": 0.7, "confidence": 1.0, "sycophancy": 2.0}    # --bias_NAME of reward.py
REWARDS = {   # reward models: flags of reward.py
    "reward": "--seed {seed}", "second": "--seed {seed}1", "third": "--seed {seed}2",
    "center": "--seed {seed} --center 0.2"}
CURES = {     # flags of ppo.py; {reward} and the like are paths of the reward models above
    "none": "--reward {reward}",
    "kl": "--reward {reward} --kl_coef 0.3",
    "adaptive": "--reward {reward} --kl adaptive --kl_target 0.7 --kl_horizon 300",
    "budget": "--reward {reward} --kl_budget 0.7",
    "entropy": "--reward {reward} --entropy_coef 0.02",
    "length": "--reward {reward} --length_penalty 0.3",
    "min": "--reward {reward},{second},{third} --ensemble min",
    "uwo": "--reward {reward},{second},{third} --ensemble uwo",
    "center": "--reward {center}",
    "relabel": "--reward {reward} --relabel 1"}


@dataclass
class Config:
    out: str = "out/hacking"      # folder for all runs, plots and tables
    links: str = ""               # folder that holds (or gets) base and sft of a seed, {seed} stands for it
    biases: str = "length,confidence,sycophancy"   # which
    strength: float = 1.0         # of the biases, times the values at the top of this file
    seeds: str = "0,1,2"          # which
    cures: str = "all"            # which, of the names at the top of this file
    kl_coef: float = 0.01         # of ppo.py where a cure says nothing else
    best_of: str = "1,2,4,8,16,32,64"   # N of the best-of-N points
    reward_flags: str = ""        # more flags for every reward.py
    ppo_flags: str = "--iterations 60"   # more flags for every ppo.py
    evaluate_flags: str = ""      # more flags for every data.evaluate


def make(folder, command, more=""):
    """Run a script (list of its name and flags) into a folder, unless its result is there."""
    if (folder / "result.json").exists():
        return
    command = [sys.executable, *map(str, command), *shlex.split(more), "--out", str(folder)]
    start = time.time()
    print(" ".join(command[1:]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "screen.txt", "w") as screen:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if subprocess.run(command, stdout=screen, stderr=subprocess.STDOUT, env=env).returncode:
            raise InputError(f"{command[1]} failed, see {folder}/screen.txt")
    print(f"    {time.time() - start:.0f} s", flush=True)


def curve(folder):
    """[(KL, reward, gold)] of a PPO run's iterations, each the mean of the last five up to it."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    parts = [rows[max(0, i - 4): i + 1] for i in range(len(rows))]
    return [tuple(sum(r[k] for r in part) / len(part) for k in ("kl_exact", "reward", "gold")) for part in parts]


def plot(path, bias, curves, best):
    """Proxy and gold against sqrt(KL): curves [[(KL, reward, gold)]] of the seeds, best-of-N points of the seeds."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"(no {path}: matplotlib is not installed)")
        return
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    steps = list(zip(*curves))   # iterations, each of all seeds
    for ax, k, name in zip(axes, (1, 2), ("proxy: the reward model", "gold")):
        x = [sum(max(0, row[0]) ** 0.5 for row in step) / len(step) for step in steps]
        ys = [[row[k] for row in step] for step in steps]
        ax.plot(x, [sum(y) / len(y) for y in ys], label=f"PPO, {len(curves)} seeds")
        ax.fill_between(x, [min(y) for y in ys], [max(y) for y in ys], alpha=0.25)
        points = list(zip(*best))   # N, each of all seeds
        ax.plot([p[0]["kl"] ** 0.5 for p in points],
                [sum(b[("reward", "gold")[k - 1]] for b in p) / len(p) for p in points], "o--", label="best of N, SFT")
        ax.set(title=name, xlabel="sqrt(KL to SFT), nats")
        ax.grid(alpha=0.3), ax.legend()
    fig.suptitle(f"annotator with a bias for {bias}")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def spread(xs):
    """Mean (smallest to largest) of the numbers that there are."""
    xs = [x for x in xs if x is not None]
    return f"{sum(xs) / len(xs):.3f} ({min(xs):.3f} to {max(xs):.3f})" if xs else "nothing to cure"


def main(cfg):
    seeds, biases = cfg.seeds.split(","), cfg.biases.split(",")
    cures = list(CURES) if cfg.cures == "all" else cfg.cures.split(",")
    if unknown := [x for x in biases if x not in BIASES] + [x for x in cures if x not in CURES]:
        raise InputError(f"no such bias or cure: {', '.join(unknown)}; there are {', '.join([*BIASES, *CURES])}")
    cures = ["none"] + [c for c in cures if c != "none"]   # what the others are compared with
    links = cfg.links or f"{cfg.out}/seed{{seed}}"
    lines, table = [], []
    for bias in biases:
        ends, curves, best = {c: [] for c in cures}, [], []
        for seed in seeds:
            sft = Path(links.format(seed=seed)) / "sft"
            make(sft, [ROOT / "sft.py", "--seed", seed, "--resume"])
            here = Path(cfg.out) / f"{bias}{seed}"
            paths = {name: here / f"rm_{name}" for name in REWARDS}
            for cure in cures:
                for name in re.findall(r"{(\w+)}", CURES[cure]):
                    make(paths[name], [ROOT / "reward.py", "--init", sft, f"--bias_{bias}", BIASES[bias] * cfg.strength,
                                       "--resume", *REWARDS[name].format(seed=seed).split()], cfg.reward_flags)
                flags = [x.format(**paths) for x in CURES[cure].split()]
                make(here / cure, [ROOT / "ppo.py", "--init", sft, "--seed", seed, "--relabel", 0, "--kl_coef",
                                   cfg.kl_coef, "--resume", *flags], cfg.ppo_flags)
            told = here / f"evaluate_{'_'.join(cures)}"
            make(told, ["-m", "data.evaluate", sft, *(here / c for c in cures), "--reference", sft, "--reward",
                        paths["reward"], "--best_of", cfg.best_of, "--seed", seed], cfg.evaluate_flags)
            result = json.loads((told / "result.json").read_text())
            curves.append(curve(here / "none"))
            best.append(result["best_of"])
            peak, end = max(row[2] for row in curves[-1]), curves[-1][-1][2]
            for cure in cures:
                gold = [row[2] for row in curve(here / cure)]
                row = {k: result["models"][cure][k] for k in ("reward", "gold", "kl")}
                cured = (gold[-1] - end) / (peak - end) if peak - end > 0.02 else None   # nothing to cure
                ends[cure].append(row | {"lost": max(gold) - gold[-1], "cured": cured})
                table.append({"bias": bias, "seed": int(seed), "cure": cure} | ends[cure][-1])
        plot(Path(cfg.out) / f"{bias}.png", bias, curves, best)
        lines += ["", f"{bias:12}" + "".join(f"{name:>26}" for name in ("proxy", "gold", "kl", "lost", "cured"))]
        for cure, rows in ends.items():
            lines.append(f"{cure:12}" + "".join(f"{spread([r[k] for r in rows]):>26}" for k in rows[0]))
    write_atomic(Path(cfg.out) / "cures.json", json.dumps(table, indent=1).encode())
    write_atomic(Path(cfg.out) / "cures.txt", "\n".join(lines[1:] + [""]).encode())
    print("\n".join(lines))


if __name__ == "__main__":
    run(main, Config, __doc__)
