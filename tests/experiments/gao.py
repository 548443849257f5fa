"""Gold and proxy against d = sqrt(KL): the laws of over-optimisation (Gao et al., arXiv:2210.10760), fitted.

    python tests/experiments/gao.py --links 'runs/{seed}'      5 KL weights x 3 seeds of ppo.py, and best-of-N

A policy is pulled away from the SFT model, by PPO against a reward model that stands still or by taking the
best of N answers. With R the gold that it has gained, they find

    best of N   R = d (a - b d)           KL = log N - (N - 1) / N
    RL          R = d (a - b log d)

and that a KL penalty in RL moves no frontier of gold: at equal d it has as much gold as without one, it only
stops earlier. This fits both forms by least squares, also to the gain in proxy (what the reward model says),
and compares the weights at equal d.

A point of PPO is one iteration, on its training prompts, less the mean of the iterations before the first
update, whose answers are the SFT model's; its proxy has the penalty for answers that do not end. A point of
best-of-N is on the test prompts, and its KL an upper bound (data/best_of.py). Leaves --out/gao.md (two
tables), gao.png (if matplotlib is installed) and gao.json (all points).
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from data import InputError, read_jsonl, write_atomic, write_json   # noqa: E402
from data.flags import program   # noqa: E402
from hacking import FIGURES, ROOT, make, pyplot, spread   # noqa: E402

MEASURES = {"gold": 2, "proxy": 1}       # and their columns in the points; column 0 is d
BEST_OF_N = "best of N"                  # what is compared beside the KL weights


@dataclass
class Config:
    """The flags of `python tests/experiments/gao.py`."""
    # What is run
    seeds: str = "0,1,2"          # which
    kl_coefs: str = "0,0.01,0.03,0.1,0.3"     # weights of the KL penalty; the first is what others are beside
    best_of: str = "1,2,4,8,16,32,64"         # N of the best-of-N points
    # Where, and with which flags
    out: str = "out/gao"          # folder for tables and plot
    links: str = ""               # folder of a seed, {seed} stands for it: holds (or gets) base, sft, reward
                                  # and all runs
    ppo_flags: str = "--iterations 40"        # more flags for every ppo.py
    evaluate_flags: str = ""      # more flags for every data.evaluate


# ------------------------------------------------------------------------------------------------------------
# The fits, as pure functions of d (N,) and a gain R (N,).


def terms_of_best_of_n(d):
    """d (a - b d) is linear in a and b: what they are multiplied by, (N, 2)."""
    return np.stack([d, -d * d], 1)


def terms_of_rl(d):
    """The same of d (a - b log d), whose limit at d = 0 is 0."""
    return np.stack([d, -d * np.log(d.clip(min=1e-12))], 1)


def fit(terms, gain):
    """(a, b, R squared) of the least squares fit of a gain (N,) by terms (N, 2)."""
    coefficients = np.linalg.lstsq(terms, gain, rcond=None)[0]
    left = ((gain - terms @ coefficients) ** 2).sum()
    return *coefficients.tolist(), 1 - float(left / ((gain - gain.mean()) ** 2).sum())


def difference(d, gain, d_other, gain_other):
    """Mean of gain - gain_other at equal d, over the d that both have; None where they share none."""
    low, high = max(d.min(), d_other.min()), min(d.max(), d_other.max())
    if low >= high:
        return None
    at, order, order_other = np.linspace(low, high, 50), d.argsort(), d_other.argsort()
    mine = np.interp(at, d[order], gain[order])
    others = np.interp(at, d_other[order_other], gain_other[order_other])
    return float((mine - others).mean())


# ------------------------------------------------------------------------------------------------------------


def points_of(rows):
    """(d, gain of the reward, gain of gold) of rows (N, 3) of KL, reward and gold, the first of which, with a
    KL of 0, are the SFT model: (N - how many those are, 3). InputError: there are none, or no others."""
    moved = rows[:, 0] > 0
    n = int(moved.argmax())
    if n == 0:
        raise InputError("the first point has to be the SFT model, with a KL of 0, and another one to follow")
    points = rows[n:] - rows[:n].mean(0)
    points[:, 0] = np.sqrt(rows[n:, 0].clip(min=0))
    return points


def runs_of(cfg, seed):
    """{name: points} of each KL weight and of best-of-N, for one seed."""
    links, found = Path((cfg.links or f"{cfg.out}/links{{seed}}").format(seed=seed)), {}
    # The runs of PPO are those of preferences.py --frontier, where it has the same weights.
    for weight in cfg.kl_coefs.split(","):
        command = [ROOT / "ppo.py", "--seed", seed, "--relabel", 0, "--kl_coef", weight]
        make(links / f"ppo_kl_coef{weight}", command, cfg.ppo_flags)
        log = read_jsonl(links / f"ppo_kl_coef{weight}" / "log.jsonl")
        found[f"beta {weight}"] = points_of(np.array([[row[name] for name in FIGURES] for row in log]))
    command = ["-m", "data.evaluate", links / "sft", "--reference", links / "sft", "--seed", seed]
    command += ["--reward", links / "reward", "--best_of", cfg.best_of]
    best = make(links / "gao_best_of", command, cfg.evaluate_flags)["best_of"]
    found[BEST_OF_N] = points_of(np.array([[point[x] for x in ("kl", "reward", "gold")] for point in best]))
    return found


def fits_table(runs):
    """Rows in Markdown: the coefficients of each measure, a fit a seed."""
    lines = ["| | seeds | of | a | b | R squared | d at the end | gain at the end |",
             "|---|---|---|---|---|---|---|---|"]
    for name in runs[0]:
        # The end: the largest N, or PPO's last five iterations.
        terms, n_last = (terms_of_best_of_n, 1) if name == BEST_OF_N else (terms_of_rl, 5)
        for measure, column in MEASURES.items():
            numbers = []
            for run in runs:
                d, gain = run[name][:, 0], run[name][:, column]
                numbers.append((*fit(terms(d), gain), d[-n_last:].mean(), gain[-n_last:].mean()))
            cells = [spread(values) for values in zip(*numbers)]
            lines.append(f"| {name} | {len(runs)} | {measure} | " + " | ".join(cells) + " |")
    return lines


def frontier_table(runs):
    """Rows in Markdown: what each weight, and best-of-N, gains beyond the first weight at equal d."""
    first, *others = runs[0]
    lines = [f"| at equal d, less {first} | gold | proxy | gold on one side in all seeds |",
             "|---|---|---|---|"]
    for name in others:
        cells, one_sided = [], False
        for measure, column in MEASURES.items():
            gaps = []
            for run in runs:
                (d, gain), (d_first, gain_first) = run[name][:, [0, column]].T, run[first][:, [0, column]].T
                gap = difference(d, gain, d_first, gain_first)
                if gap is not None:
                    gaps.append(gap)
            cells.append(spread(gaps))
            if measure == "gold":
                one_sided = bool(gaps) and (min(gaps) > 0 or max(gaps) < 0)
        lines.append(f"| {name} | {' | '.join(cells)} | {'yes' if one_sided else 'no'} |")
    return lines


def plot(path, runs):
    """Gains against d: a dot an iteration, a colour a weight; best-of-N with its fit, dashed."""
    plt = pyplot(path)
    if plt is None:
        return
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, (measure, column) in zip(axes, MEASURES.items()):
        for i, name in enumerate(runs[0]):
            for run in runs:
                d, gain = run[name][:, 0], run[name][:, column]
                mark = "o" if name == BEST_OF_N else "."
                ax.plot(d, gain, mark, color=f"C{i}", label=name if run is runs[0] else None)
        d = np.concatenate([run[BEST_OF_N][:, 0] for run in runs])
        gain = np.concatenate([run[BEST_OF_N][:, column] for run in runs])
        a, b, _ = fit(terms_of_best_of_n(d), gain)
        at = np.linspace(0, d.max(), 50)
        ax.plot(at, at * (a - b * at), "k--", linewidth=1, label="d (a - b d)")
        ax.set(title=measure, xlabel="d = sqrt(KL to SFT)", ylabel="gain over SFT")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(cfg):
    """All runs; then the fits, the frontier and the plot."""
    out, runs = Path(cfg.out), [runs_of(cfg, seed) for seed in cfg.seeds.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*fits_table(runs), "", *frontier_table(runs), ""])
    print(text)
    write_atomic(out / "gao.md", text.encode())
    plot(out / "gao.png", runs)
    points = []
    for seed, run in zip(cfg.seeds.split(","), runs):
        for name, rows in run.items():
            points.append({"seed": int(seed), "name": name, "d_proxy_gold": rows.tolist()})
    write_json(out / "gao.json", points)


if __name__ == "__main__":
    program(main, Config, __doc__)
