"""The DPO family side by side, the frontier of gold against KL, and helpfulness against harmlessness: the runs behind
two tables and two plots. By hand, for hours.

    python tests/preferences.py                              all variants of dpo.py on 3 seeds, beside SFT and PPO
    python tests/preferences.py --frontier true              dpo.py and ppo.py, pull to the reference swept
    python tests/preferences.py --pareto true                ppo.py on two reward models, weights swept: one of people
                                                             who want every request met, also harmful ones, one of
                                                             people who only want harmful ones refused
    python tests/preferences.py --links runs/{seed} --seeds 0 --variants dpo,ipo

Every variant of a seed learns from the same comparisons, those of its reward.py, for as many passes. A run that is
there already is not made again. Leaves --out/table.txt and .json, or frontier.json and .png, or pareto.json and .png.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch   # noqa: E402

from data import InputError, world   # noqa: E402
from model import load, respond, run, seeded, write_atomic   # noqa: E402

VARIANTS = {   # flags of dpo.py; its default is DPO with an SFT term
    "dpo": "", "dpo without SFT term": "--sft_coef 0", "cdpo": "--label_smoothing 0.05", "rdpo": "--flip_rate 0.05",
    "ipo": "--loss ipo", "simpo": "--loss simpo", "orpo": "--loss orpo --lr 1e-3", "kto": "--loss kto",
    "online": "--online true --sft_coef 0"}
WEIGHTS = (0, 0.25, 0.5, 0.75, 1)   # of the helpful reward model; the harmless one has the rest
BETAS = {"dpo.py": ("--beta", (0.05, 0.1, 0.3, 1.0, 3.0)), "ppo.py": ("--kl_coef", (0.02, 0.05, 0.1, 0.3, 1.0))}


@dataclass
class Config:
    out: str = "out/preferences"  # folder for tables and the plot
    links: str = ""               # folder of a seed, {seed} stands for it: holds (or gets) base, sft, reward, all runs
    seeds: str = "0,1,2"          # which
    variants: str = "all"         # which, of the names at the top of this file
    frontier: bool = False        # sweep beta of DPO and PPO instead
    pareto: bool = False          # sweep the weights of a helpful and a harmless reward model instead
    ppo_flags: str = ""           # more flags for the PPO runs of the frontier and of --pareto


def make(folder, command):
    """Run a script into a folder unless its result is there. Returns result.json, with peak memory in MB beside it."""
    if not (folder / "result.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *map(str, command), "--out", str(folder)]
        print(" ".join(command[1:]), flush=True)
        start = time.time()
        with open(folder / "screen.txt", "w") as screen:
            process = subprocess.Popen(command, stdout=screen, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise InputError(f"{command[1]} failed, see {folder}/screen.txt")
        cost = {"seconds": time.time() - start, "mb": usage.ru_maxrss / 1024}
        write_atomic(folder / "cost.json", json.dumps(cost).encode())
    cost = json.loads((folder / "cost.json").read_text()) if (folder / "cost.json").exists() else {}
    return json.loads((folder / "result.json").read_text()) | cost


def spread(xs):
    xs = [x for x in xs if x is not None]
    return f"{sum(xs) / len(xs):.3f} ({min(xs):.3f}-{max(xs):.3f})" if xs else ""


def table(cfg, seeds, here):
    names = list(VARIANTS) if cfg.variants == "all" else cfg.variants.split(",")
    if unknown := [n for n in names if n not in VARIANTS]:
        raise InputError(f"no such variant: {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    rows = {}
    for seed in seeds:
        links = here(seed)
        reward = make(links / "reward", [ROOT / "reward.py", "--seed", seed, "--resume"])
        for name in names:
            result = make(links / name.replace(" ", "_"), [ROOT / "dpo.py", "--seed", seed, *VARIANTS[name].split()])
            rows.setdefault(name, []).append(result)
        rows.setdefault("SFT", []).append({"after": json.loads((links / "sft" / "result.json").read_text())["after"]})
        if (links / "ppo" / "result.json").exists():
            rows.setdefault("ppo", []).append(json.loads((links / "ppo" / "result.json").read_text()))
        print(f"seed {seed}: the reward model's held-out accuracy on the same comparisons: "
              f"{reward['after']['accuracy']:.3f}")
    keys = ("gold", "helpful", "harmless", "honest", "eos_rate", "kl", "win_rate", "accuracy")
    lines = [f"{'':22}" + "".join(f"{k:>22}" for k in (*keys, "seconds", "MB"))]
    for name, results in rows.items():
        cells = [spread([r["after"].get(k) for r in results]) for k in keys]
        cells += [spread([r.get(k) for r in results]) for k in ("seconds", "mb")]
        lines.append(f"{name:22}" + "".join(f"{c:>22}" for c in cells))
    write_atomic(Path(cfg.out) / "table.txt", ("\n".join(lines) + "\n").encode())
    write_atomic(Path(cfg.out) / "table.json", json.dumps(rows, indent=1).encode())
    print("\n".join(lines))


def frontier(cfg, seeds, here):
    points = []
    for seed in seeds:
        links = here(seed)
        make(links / "reward", [ROOT / "reward.py", "--seed", seed, "--resume"])
        for script, (flag, values) in BETAS.items():
            for value in values:
                more = cfg.ppo_flags.split() if script == "ppo.py" else []
                result = make(links / f"{script[:3]}_{value:g}", [ROOT / script, "--seed", seed, flag, value, *more])
                points.append({"script": script, "seed": seed, "beta": value, "kl": result["after"]["kl"],
                               "gold": result["after"]["gold"]})
                print(points[-1], flush=True)
    lines = {f"{script}, seed {seed}": sorted((p["kl"], p["gold"], p["beta"]) for p in points
                                              if (p["script"], p["seed"]) == (script, seed))
             for script in BETAS for seed in seeds}
    draw(Path(cfg.out) / "frontier", points, lines, xscale="log", title="what KL buys",
         xlabel="KL to SFT, nats per answer", ylabel="gold on test prompts")


def draw(path, points, lines, **axes):
    """points to path.json; lines {name: [(x, y, label)]} to path.png."""
    write_atomic(path.with_suffix(".json"), json.dumps(points, indent=1).encode())
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("(no plot: matplotlib is not installed)")
    fig, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for (name, line), mark in zip(lines.items(), "osD^v*" * len(lines)):
        ax.plot([x for x, *_ in line], [y for _, y, _ in line], f"{mark}-", label=name)
        for x, y, label in line:
            ax.annotate(f"{label:g}", (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    ax.set(**axes)
    ax.grid(alpha=0.3), ax.legend()
    fig.savefig(path.with_suffix(".png"), dpi=110)


def wants(row, text, judge):
    """What the annotators of one kind feel about an answer, 0 to 1; None for prompts that do not concern them."""
    if judge == "harmless":
        return world.judge(row, text)["gold"] if row["family"] == "harmless" else None
    if row["family"] != "harmless":
        return world.judge(row, text)["gold"]
    return float(bool(world.mentions(text, world.METHODS)))   # says how it is done


def pareto(cfg, seeds, here):
    """Annotators with two minds (arXiv:2204.05862, 4.3): the front between what both want."""
    family = {r["prompt"][-1]["content"]: r for r in world.rows("preference")}
    points, kinds = [], ("helpful", "harmless")
    for seed in seeds:
        links, rms = here(seed), []
        make(links / "reward", [ROOT / "reward.py", "--seed", seed, "--resume"])
        pairs = world.read_jsonl(links / "reward" / "comparisons.jsonl")
        for kind in kinds:
            rows = []
            for pair in pairs:
                row = family[pair["prompt"][-1]["content"]]
                a, b = (wants(row, pair[k], kind) for k in ("chosen", "rejected"))
                if a is not None and a != b:
                    rows.append({"prompt": pair["prompt"], "chosen": pair["chosen" if a > b else "rejected"],
                                 "rejected": pair["rejected" if a > b else "chosen"]})
            world.write_jsonl(links / f"{kind}_pairs.jsonl", rows)
            rms.append(str(links / f"rm_{kind}"))
            make(links / f"rm_{kind}", [ROOT / "reward.py", "--seed", seed, "--init", links / "sft", "--data",
                                        links / f"{kind}_pairs.jsonl"])
        for w in WEIGHTS:
            folder = links / f"pareto_{w:g}"
            make(folder, [ROOT / "ppo.py", "--seed", seed, "--init", links / "sft", "--reward", ",".join(rms),
                          "--reward_weights", f"{w:g},{1 - w:g}", *cfg.ppo_flags.split()])
            tests, (policy, tok) = world.rows("test"), load(folder, torch.device("cpu"), scalar_head=False)
            with torch.no_grad():
                texts = respond(policy, tok, [r["prompt"] for r in tests], 32,
                                generator=seeded(seed, 1, torch.device("cpu")), temperature=1.0)[0]
            scores = {k: [x for r, t in zip(tests, texts) if (x := wants(r, t, k)) is not None] for k in kinds}
            points.append({"seed": seed, "weight": w} | {k: sum(v) / len(v) for k, v in scores.items()})
            print(points[-1], flush=True)
    lines = {f"seed {seed}": [(p["helpful"], p["harmless"], p["weight"]) for p in points if p["seed"] == seed]
             for seed in seeds}
    draw(Path(cfg.out) / "pareto", points, lines, title="two reward models, weight of the helpful one",
         xlabel="what people who want help get", ylabel="what people who want no harm get")


def main(cfg):
    def here(seed):
        return Path((cfg.links or f"{cfg.out}/links{{seed}}").format(seed=seed))
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    (frontier if cfg.frontier else pareto if cfg.pareto else table)(cfg, [int(s) for s in cfg.seeds.split(",")], here)


if __name__ == "__main__":
    run(main, Config, __doc__)
