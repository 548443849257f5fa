"""The tables of LOG.md: one command makes what is missing, in order, and writes the rows. By hand, for hours.

    python tests/experiments/evidence.py                              all of it, into runs/SEED/...
    python tests/experiments/evidence.py --only chain --seeds 0,1     one table, two seeds
    python tests/experiments/evidence.py --rows                       run nothing: the rows of what is there

A run that is there (a result.json) is not made again, one that was cut off goes on from its last checkpoint: the
same command again. Each seed has a folder, in which the links of its chain are made once. Tables that need
more than a row of metrics have drivers of their own, which work in the same way: preferences.py (the DPO
family, gold against KL, helpful against harmless), hacking.py (hacking and cures), process.py (rewards of
steps).
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from data import InputError, read_json   # noqa: E402
from data.flags import program   # noqa: E402
from hacking import ROOT, make, spread   # noqa: E402

ESTIMATORS = ("gae", "rloo", "grpo", "dr_grpo", "reinforce++")


@dataclass
class Config:
    """The flags of `python tests/experiments/evidence.py`."""
    # What is run
    only: str = "all"             # which tables, of the names in TABLES
    seeds: str = ""               # which (default: what each table has)
    rows: bool = False            # run nothing, print the rows of what is there and what is missing
    # Where
    out: str = "runs"             # a folder for each seed in it


@dataclass
class Table:
    """One table: a line for each variant, the metrics of its runs as mean (smallest to largest) of the
    seeds."""
    seeds: str
    variants: dict                # {variant, a folder of the seed: script and flags}
    metrics: tuple                # of `after` in result.json


def with_reward(flags):
    """PPO with each estimator and these flags, as {folder: command}."""
    runs = {}
    for name in ESTIMATORS:
        group = "" if name in ("gae", "reinforce++") else " --group 4"
        runs[f"{name}{flags.replace(' --', '_').replace(' ', '')}"] = f"ppo.py --advantage {name}{group}{flags}"
    return runs


POLICY = ("gold", "helpful", "harmless", "honest", "kl", "length", "eos_rate")
TABLES = {
    "chain": Table("0,1,2,3,4,5,6,7,8,9", {"ppo": "ppo.py"}, (*POLICY, "reward")),
    "reward": Table("0,1,2,3,4,5,6,7,8,9", {"reward": "reward.py"}, ("accuracy", "ceiling", "loss")),
    "dpo": Table("0,1,2", {"dpo": "dpo.py", "ipo": "dpo.py --loss ipo", "online": "dpo.py --online --sft_coef 0"},
                 (*POLICY, "accuracy")),
    "estimators": Table("0,1,2", with_reward(""), POLICY),
    "checkable": Table("0,1,2", with_reward(" --reward gold --iterations 30")
                       | with_reward(" --reward gold --iterations 30 --kl_coef 0"), POLICY),
    "cai": Table("0,1,2,3,4", {"cai": "cai.py", "rlhf": "cai.py --labels human"},
                 ("harmless_rate", "gold", "helpful", "harmless", "honest")),
}


def table_of(name, table, seeds, cfg):
    """Make a table's runs, unless --rows, and print its rows in Markdown. Returns the folders that are not
    there."""
    missing, found = [], {variant: [] for variant in table.variants}
    for seed in seeds:
        for variant, command in table.variants.items():
            folder = Path(cfg.out) / str(seed) / variant
            script, *flags = command.split()
            if not cfg.rows:
                make(folder, [ROOT / script, *flags, "--seed", seed])
            if (folder / "result.json").exists():
                found[variant].append(read_json(folder / "result.json", kind=dict)["after"])
            else:
                missing.append(str(folder))

    print(f"\n{name}\n| | seeds | " + " | ".join(table.metrics) + " |")
    print("|---" * (len(table.metrics) + 2) + "|")
    for variant, results in found.items():
        cells = [spread([after.get(metric) for after in results]) for metric in table.metrics]
        print(f"| {variant} | {len(results)} | " + " | ".join(cells) + " |")
    return missing


def main(cfg):
    """Every table, in order."""
    names = list(TABLES) if cfg.only == "all" else cfg.only.split(",")
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise InputError(f"--only: no such table: {', '.join(unknown)}; there are {', '.join(TABLES)}")
    missing = []
    for name in names:
        seeds = (cfg.seeds or TABLES[name].seeds).split(",")
        missing += table_of(name, TABLES[name], seeds, cfg)
    if missing:
        print("\nmissing: " + ", ".join(missing))


if __name__ == "__main__":
    program(main, Config, __doc__)
