"""How far the estimates of KL are from the exact KL while ppo.py trains. By hand; reads runs that are there.

    python tests/experiments/kl_estimates.py --links 'runs/{seed}' --seeds 0,1,2

Of each seed's ppo.py (made if it is not there) the last iterations. Each figure of log.jsonl is a sum over an
answer's tokens, averaged over the answers of an iteration, in nats: of log(p / p_ref) of the sampled token in
`kl` (k1), of (r - 1) - log r with r = p_ref / p in `kl_k3` (http://joschu.net/blog/kl-approx.html), and in
`kl_exact` of the KL over the whole vocabulary where that token was sampled. So the exact one is exact for the
answers that were drawn: which ones those are is chance in all three. Leaves --out/kl_estimates.json, and
prints a line for each estimate.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from data import read_jsonl, write_json   # noqa: E402
from data.flags import program   # noqa: E402
from hacking import ROOT, make   # noqa: E402


@dataclass
class Config:
    """The flags of `python tests/experiments/kl_estimates.py`."""
    # What is read
    seeds: str = "0,1,2"          # which
    last: int = 30                # iterations of each run, counted from its end
    # Where
    out: str = "out/kl_estimates"   # folder for the figures
    links: str = "runs/{seed}"    # folder of a seed, {seed} stands for it: holds (or gets) ppo


def errors_of(estimates, exact):
    """Figures of some estimates (N,) of the exact values (N,): mean and standard deviation of the error, and
    the share of estimates that are below the exact value."""
    error = np.asarray(estimates) - np.asarray(exact)
    return {"mean": error.mean().item(), "std": error.std(ddof=1).item(), "below": (error < 0).mean().item()}


def main(cfg):
    """One line for each estimate, over all seeds and iterations."""
    rows, exact_of_seeds = [], []
    for seed in cfg.seeds.split(","):
        run = Path(cfg.links.format(seed=seed)) / "ppo"
        make(run, [ROOT / "ppo.py", "--seed", seed])
        last = read_jsonl(run / "log.jsonl")[-cfg.last:]
        exact_of_seeds.append(np.mean([row["kl_exact"] for row in last]).item())
        rows += last
    exact = [row["kl_exact"] for row in rows]
    figures = {"exact": {"smallest": min(exact_of_seeds), "largest": max(exact_of_seeds)}}
    print(f"the exact KL, mean of a seed: {min(exact_of_seeds):.3f} to {max(exact_of_seeds):.3f} "
          f"({len(rows)} iterations)")
    for name, column in (("k1", "kl"), ("k3", "kl_k3")):
        figures[name] = errors_of([row[column] for row in rows], exact)
        print(f"{name} less the exact KL: mean {figures[name]['mean']:.3f}, standard deviation "
              f"{figures[name]['std']:.3f}, below it in {figures[name]['below']:.0%} of the iterations")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(cfg.out) / "kl_estimates.json", figures)


if __name__ == "__main__":
    program(main, Config, __doc__)
