"""Reward hacking on demand, and what cures it: the runs behind the over-optimisation plots. By hand, for
hours.

    python tests/experiments/hacking.py                                    3 biases x 3 seeds x all cures
    python tests/experiments/hacking.py --biases length --seeds 0 --cures none,kl,min
    python tests/experiments/hacking.py --ppo_flags="--iterations 5" ...   more flags for every run of a
                                                                           script: with "="

For each bias of the annotator (reward.py --bias_length, --bias_confidence, --bias_sycophancy) and each seed:
    1. the biased annotator's comparisons make a reward model (some cures need further ones)
    2. ppo.py climbs it with next to no KL penalty and without new labels: the proxy rises, gold rises and
       then falls (Goodhart's law, arXiv:2210.10760); once more with each cure
    3. data/evaluate.py compares all these policies by the one reward model, and adds best-of-N of the SFT
       model
A run that is there already (a result.json) is not made again, one cut off goes on from its last checkpoint.

It leaves --out/BIAS.png (proxy and gold against sqrt(KL), the band spans the seeds; if matplotlib is
installed), cures.json with a row for each bias, seed and cure, and cures.txt, a table of the means over seeds
(and smallest to largest), of
    proxy, gold, kl  on the test prompts, by the reward model that the run without a cure climbed
    lost             the fall of gold from its best five iterations to the last five, on the training prompts
                     (the first four points of a curve are of fewer)
    cured            the share of the fall without a cure that is absent with it: 1 where gold ends at that
                     peak
out/index.html shows them where --out is out/hacking.
"""
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data import InputError, read_json, read_jsonl, report, write_atomic, write_json   # noqa: E402
from data.flags import program   # noqa: E402

BIASES = {"length": 0.7, "confidence": 1.0, "sycophancy": 2.0}    # --bias_NAME of reward.py
REWARDS = {   # reward models: flags of reward.py ({seed}1 and {seed}2: other comparisons, another head)
    "reward": "--seed {seed}", "second": "--seed {seed}1", "third": "--seed {seed}2",
    "center": "--seed {seed} --center 0.2"}
CURES = {     # flags of ppo.py; {reward} and the like are paths of the reward models above
    "none": "--reward {reward}",
    "kl": "--reward {reward} --kl_coef 0.3",
    "budget": "--reward {reward} --kl_budget 0.7",
    "entropy": "--reward {reward} --entropy_coef 0.02",
    "min": "--reward {reward},{second},{third} --ensemble min",
    "center": "--reward {center}",
    "relabel": "--reward {reward} --relabel 1"}


@dataclass
class Config:
    """The flags of `python tests/experiments/hacking.py`."""
    # What is run
    biases: str = "length,confidence,sycophancy"   # which
    strength: float = 1.0         # of the biases, times the values at the top of this file
    seeds: str = "0,1,2"          # which
    cures: str = "all"            # which, of the names at the top of this file
    kl_coef: float = 0.01         # of ppo.py where a cure says nothing else
    best_of: str = "1,2,4,8,16,32,64"   # N of the best-of-N points
    # Where, and with which flags
    out: str = "out/hacking"      # folder for all runs, plots and tables
    links: str = ""               # folder that holds (or gets) base and sft of a seed, {seed} stands for it
    reward_flags: str = ""        # more flags for every reward.py
    ppo_flags: str = "--iterations 60"   # more flags for every ppo.py
    evaluate_flags: str = ""      # more flags for every data.evaluate


# ------------------------------------------------------------------------------------------------------------
# Running scripts, for the other drivers too.


def run_to_end(command, screen):
    """Run a command (a list), its output going to the file `screen`. Returns how it ended (0: well), its peak
    memory in MB (as Linux counts it) and its processor seconds."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(screen, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            raise
        process.returncode = status
    return status, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def asked(words):
    """What a command (a list) asks for, in whatever order: {flag: its value}. Of paths the last name alone,
    since folders may be moved."""
    found, flag = {"": []}, ""
    for word in words:
        word = re.sub(r"[^,:=]*/", "", word)
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            found[flag] = [value] if value else []
        else:
            found[flag].append(word)
    return found


def make(folder, command, more="", python=sys.executable):
    """Run a script (list of its name and flags) into a folder, unless its result is there. Returns
    result.json, with what the run cost: seconds, processor seconds (cpu) and MB (of one that was cut off: its
    last part). InputError: it fails, or another command made what is there."""
    folder, command = Path(folder), [*map(str, command), *shlex.split(more)]
    if not (folder / "result.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(shlex.join([*command, "--out", str(folder)]), flush=True)
        start = time.time()
        run = [str(python), *command, "--out", str(folder)]
        status, mb, cpu = run_to_end(run, folder / "screen.txt")
        if status:
            raise InputError(f"{command[0]} failed, see {folder}/screen.txt")
        cost = {"seconds": time.time() - start, "mb": mb, "cpu": cpu, "command": command}
        print(f"    {cost['seconds']:.0f} s", flush=True)
        write_json(folder / "cost.json", cost)
    cost = read_json(folder / "cost.json") if (folder / "cost.json").exists() else {}
    made_by = cost.pop("command", command)      # a run that was made by hand says nothing of it
    if asked(made_by) != asked(command):
        raise InputError(f"{folder} is of another command: {shlex.join(made_by)}; choose another folder, or "
                         f"remove it. Now asked for: {shlex.join(command)}")
    return read_json(folder / "result.json", kind=dict) | cost


def spread(numbers, none=""):
    """Mean (smallest to largest) of the numbers that there are, as text; of one that number, of none
    `none`."""
    numbers = [x for x in numbers if x is not None]
    if not numbers:
        return none
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    return f"{sum(numbers) / len(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"


# ------------------------------------------------------------------------------------------------------------
# What a run did.


FIGURES = ("kl_exact", "reward", "gold")     # of log.jsonl: the columns of a curve


def curve(folder):
    """KL, reward and gold of a PPO run's N iterations, each the mean of the last five up to it: (N, 3)."""
    rows = []
    for row in read_jsonl(folder / "log.jsonl"):
        rows.append([row[name] for name in FIGURES])
    return np.array([np.mean(rows[max(0, i - 4): i + 1], axis=0) for i in range(len(rows))])


def cured(gold, without):
    """The share of gold's fall without a cure, `without`, that is absent from `gold` with it (one number
    an iteration); None where there was next to nothing to cure."""
    peak, end = max(without), without[-1]
    return (gold[-1] - end) / (peak - end) if peak - end > 0.02 else None


def pyplot(path):
    """matplotlib.pyplot, for pictures without a screen; None, and a line on the screen that says which
    picture is missing, if it is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print(f"(no {path}: matplotlib is not installed)")
        return None
    return plt


def plot(path, bias, curves, best):
    """Proxy and gold against sqrt(KL): the `curve` of each seed, and its best-of-N points
    [{"n", "kl", "reward", "gold"}]."""
    plt = pyplot(path)
    if plt is None:
        return
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    curves = np.stack(curves)                                                         # (seeds, N, 3)
    for ax, name, title in zip(axes, ("reward", "gold"), ("proxy: the reward model", "gold")):
        # PPO: the mean of the seeds, and a band from the smallest to the largest.
        x, y = np.sqrt(curves[:, :, 0].clip(min=0)).mean(0), curves[:, :, FIGURES.index(name)]
        ax.plot(x, y.mean(0), label=f"PPO, {len(curves)} seeds")
        ax.fill_between(x, y.min(0), y.max(0), alpha=0.25)

        # The best of N answers, whose KL is known.
        x, y = np.sqrt([point["kl"] for point in best[0]]), 0
        for points in best:
            y = y + np.array([point[name] for point in points]) / len(best)
        ax.plot(x, y, "o--", label="best of N, SFT")
        ax.set(title=title, xlabel="sqrt(KL to SFT in nats)")
        ax.grid(alpha=0.3)
        ax.legend()
    fig.suptitle(f"annotator with a bias for {bias}")
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------------


def climb(cfg, bias, seed, cures):
    """All runs of one bias and one seed. Returns the row of cures.json of each cure, the curve of the run
    without one, and the best-of-N points."""
    sft = Path((cfg.links or f"{cfg.out}/seed{{seed}}").format(seed=seed)) / "sft"
    make(sft, [ROOT / "sft.py", "--seed", seed])
    here = Path(cfg.out) / f"{bias}{seed}"
    paths = {name: here / f"rm_{name}" for name in REWARDS}
    for cure in cures:
        # The reward models that this cure names, and the policy that climbs them.
        for name in re.findall(r"{(\w+)}", CURES[cure]):
            flags = ["--init", sft, f"--bias_{bias}", BIASES[bias] * cfg.strength]
            flags += REWARDS[name].format(seed=seed).split()
            make(paths[name], [ROOT / "reward.py", *flags], cfg.reward_flags)
        flags = ["--init", sft, "--seed", seed, "--relabel", 0, "--kl_coef", cfg.kl_coef]
        flags += [flag.format(**paths) for flag in CURES[cure].split()]
        make(here / cure, [ROOT / "ppo.py", *flags], cfg.ppo_flags)

    # All policies side by side, scored by the one reward model.
    flags = ["--reference", sft, "--reward", paths["reward"], "--best_of", cfg.best_of, "--seed", seed]
    result = make(here / f"evaluate_{'_'.join(cures)}",
                  ["-m", "data.evaluate", sft, *[here / cure for cure in cures], *flags], cfg.evaluate_flags)
    rows, without = [], curve(here / "none")
    for cure in cures:
        gold = curve(here / cure)[:, 2]
        figures = {name: result["models"][cure][name] for name in ("reward", "gold", "kl")}
        rows.append({"bias": bias, "seed": int(seed), "cure": cure} | figures
                    | {"lost": max(gold) - gold[-1], "cured": cured(gold, without[:, 2])})
    return rows, without, result["best_of"]


def main(cfg):
    """All biases, seeds and cures; then tables and plots."""
    seeds, biases = cfg.seeds.split(","), cfg.biases.split(",")
    cures = list(CURES) if cfg.cures == "all" else cfg.cures.split(",")
    unknown = [x for x in biases if x not in BIASES] + [x for x in cures if x not in CURES]
    if unknown:
        raise InputError(f"no such bias or cure: {', '.join(unknown)}; there are "
                         f"{', '.join([*BIASES, *CURES])}")
    cures = ["none"] + [cure for cure in cures if cure != "none"]   # what the others are compared with

    table, lines = [], []
    for bias in biases:
        rows, curves, best = [], [], []
        for seed in seeds:
            some, points, best_of = climb(cfg, bias, seed, cures)
            rows += some
            curves.append(points)
            best.append(best_of)
        plot(Path(cfg.out) / f"{bias}.png", bias, curves, best)
        table += rows
        titles = ("proxy", "gold", "kl", "lost", "cured")
        lines += ["", f"{bias:12}" + "".join(f"{title:>26}" for title in titles)]
        for cure in cures:
            line = f"{cure:12}"
            for name in ("reward", "gold", "kl", "lost", "cured"):
                numbers = [row[name] for row in rows if row["cure"] == cure]
                line += f"{spread(numbers, none='nothing to cure'):>26}"
            lines.append(line)
    write_json(Path(cfg.out) / "cures.json", table)
    write_atomic(Path(cfg.out) / "cures.txt", "\n".join(lines[1:] + [""]).encode())
    print("\n".join(lines))
    print(report.write_page(cfg.out))


if __name__ == "__main__":
    program(main, Config, __doc__)
