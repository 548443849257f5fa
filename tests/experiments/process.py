"""Process against outcome rewards: what a label of a step buys, and what a comparison of two answers. By
hand, for hours.

    python tests/experiments/process.py                              3 seeds
    python tests/experiments/process.py --seeds 0 --prompts 500 --ppo_flags="--iterations 20"

For each seed the SFT model answers the same prompts once. Rewards that learn from these answers:
    comparisons   reward.py on every two different answers to a prompt: one reward for an answer
    steps         data/process.py on every step of the same answers, and of those that had no other one to be
                  compared with: as many ANSWERS
    fewer steps   (or fewer comparisons) the one of the two that has more labels, on so few of its rows that
                  it has as many LABELS as the other: a comparison is one, a step is one
    implicit      dpo.py on the same comparisons; its log-ratio to the SFT model, step by step
ppo.py climbs each (--relabel 0), data/evaluate.py takes the best of N answers of the SFT model by each, and
on the answers to held-out prompts each says which step is the first wrong one. A run that is there already is
not made again.

It leaves --out/process.json with a row for each seed and reward, and process.txt, the means over seeds (and
smallest to largest), of
    labels, answers         what it learned from, without those of the prompts that it holds out
    gold_10, gold_20, ..    gold on the training prompts, the mean of the five iterations up to that one
    gold                    on the test prompts, at the end
    best, product, smallest gold of the best of N: by the reward, and by the product and the smallest of the
                            step scores (for data/process.py the product is the reward)
    first_error, no_error   data/process.py; comparisons: the reward of the answer cut off behind each step,
                            a reward below 0 calling it wrong
"""
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from data import process, read_jsonl, write_atomic, write_json, write_jsonl   # noqa: E402
from data.files import formats   # noqa: E402
from data.flags import program   # noqa: E402
from data.rewards import Scorer   # noqa: E402
from hacking import ROOT, make, spread   # noqa: E402

REWARD, PROCESS = [ROOT / "reward.py"], ["-m", "data.process"]
HELD_OUT = 0.1    # of the prompts, which none of the rewards learns from: the default of reward.py and dpo.py
FIGURES = ("labels", "answers", "gold_10", "gold_20", "gold_40", "gold_70", "gold", "best", "product",
           "smallest", "first_error", "no_error")


@dataclass
class Config:
    """The flags of `python tests/experiments/process.py`."""
    # What is run
    seeds: str = "0,1,2"          # which
    prompts: int = 4000           # prompts that are answered, --k times each (reward.py)
    best_of: int = 16             # N of best-of-N
    # Where, and with which flags
    out: str = "out/process"      # folder for all runs and tables
    links: str = ""               # folder that holds (or gets) base and sft of a seed, {seed} stands for it
    reward_flags: str = ""        # more flags for every reward.py
    process_flags: str = ""       # more flags for every data.process
    dpo_flags: str = ""           # more flags for every dpo.py
    ppo_flags: str = ""           # more flags for every ppo.py
    evaluate_flags: str = ""      # more flags for every data.evaluate


def n_labels(row):
    """How many labels a row of comparisons.jsonl or process.jsonl is."""
    return len(row.get("labels", [0]))


def first_rows(rows, n):
    """The first of some rows, of n labels together or a few fewer."""
    kept, total = [], 0
    for row in rows:
        total += n_labels(row)
        if total > n:
            break
        kept.append(row)
    return kept


def learn(cfg, here, sft, seed):
    """All rewards of a seed: {name: (what --reward takes, the rows it learned from)}."""
    common = ["--init", sft, "--seed", seed, "--held_out", HELD_OUT]
    asked = [*common, "--prompts", cfg.prompts]
    make(here / "comparisons", [*REWARD, *asked], cfg.reward_flags)
    make(here / "steps", [*PROCESS, *asked], cfg.process_flags)
    pairs, _ = formats.load(here / "comparisons" / "comparisons.jsonl", "preference")
    steps = read_jsonl(here / "steps" / "process.jsonl")
    found = {"comparisons": (here / "comparisons", pairs), "steps": (here / "steps", steps)}

    # As many labels as the other one has.
    totals = [sum(map(n_labels, rows)) for rows in (pairs, steps)]
    if totals[1] > totals[0]:
        name, folder, rows = "fewer steps", here / "fewer_steps", first_rows(steps, totals[0])
        script, flags = PROCESS, cfg.process_flags
    else:
        name, folder, rows = "fewer comparisons", here / "fewer_comparisons", first_rows(pairs, totals[1])
        script, flags = REWARD, cfg.reward_flags
    data = folder.with_suffix(".jsonl")
    write_jsonl(data, rows)
    make(folder, [*script, *common, "--data", data], flags)
    found[name] = folder, rows

    # No labelled steps: a policy that DPO has trained on the comparisons.
    data = here / "comparisons" / "comparisons.jsonl"
    make(here / "dpo", [ROOT / "dpo.py", *common, "--data", data], cfg.dpo_flags)
    return found | {"implicit": (f"implicit:{here / 'dpo'}:{sft}", pairs)}


def answers_in(rows):
    """How many different answers there are in comparisons or process rows."""
    answers = set()
    for row in rows:
        texts = ["".join(row["completions"])] if "labels" in row else [row["chosen"], row["rejected"]]
        answers |= {(str(row["prompt"]), text) for text in texts}
    return len(answers)


def errors(source, rows):
    """Whether a reward finds the first wrong step of the answers in process rows:
    data.process.errors_found."""
    rewards, texts = Scorer("--reward", str(source)), ["".join(row["completions"]) for row in rows]
    scores = rewards.step_scores(rows, texts)
    if scores is None:
        # A reward of answers.
        scores = []
        for row in rows:
            cut = list(itertools.accumulate(row["completions"]))      # the answer up to each step
            said = rewards.score_texts([row] * len(cut), cut)
            scores.append([1 / (1 + math.exp(-r)) for r in said])
    return process.errors_found([(said, row["labels"]) for said, row in zip(scores, rows)])


def climb(cfg, here, sft, seed, name, source):
    """What PPO, best-of-N and the step scores of one reward come to: {figure: number}."""
    short = name.replace(" ", "_")
    command = [ROOT / "ppo.py", "--init", sft, "--seed", seed, "--relabel", 0, "--reward", source]
    figures = {"gold": make(here / f"ppo_{short}", command, cfg.ppo_flags)["after"]["gold"]}
    gold = [row["gold"] for row in read_jsonl(here / f"ppo_{short}" / "log.jsonl")]
    for n in (10, 20, 40, 70):
        if n <= len(gold):
            figures[f"gold_{n}"] = sum(gold[n - 5: n]) / 5

    command = ["-m", "data.evaluate", sft, "--reward", source, "--best_of", f"1,{cfg.best_of}",
               "--seed", seed]
    best = make(here / f"evaluate_{short}", command, cfg.evaluate_flags)["best_of"][-1]
    for title, figure in (("best", "gold"), ("product", "gold_product"), ("smallest", "gold_smallest")):
        if figure in best:
            figures[title] = best[figure]
    return figures


def main(cfg):
    """All rewards on every seed; then the table."""
    table = []
    for seed in cfg.seeds.split(","):
        here = Path(cfg.out) / f"seed{seed}"
        sft = Path((cfg.links or f"{here}").format(seed=seed)) / "sft"
        make(sft, [ROOT / "sft.py", "--seed", seed])
        sources = learn(cfg, here, sft, seed)
        labelled, _ = formats.load(here / "steps" / "process.jsonl", "process")
        held = formats.split(labelled, HELD_OUT, seed=0)[1]
        for name, (source, rows) in sources.items():
            learned = formats.split(rows, HELD_OUT, seed=0)[0]
            if name == "implicit":
                learned = [row for row in learned if row["label"] != 0.5]       # dpo.py leaves out ties
            figures = {"labels": sum(map(n_labels, learned)), "answers": answers_in(learned)}
            figures |= climb(cfg, here, sft, seed, name, source) | errors(source, held)
            table.append({"seed": int(seed), "reward": name} | figures)
            print(table[-1], flush=True)

    lines = [f"{'':20}" + "".join(f"{figure:>36}" for figure in FIGURES)]
    for name in dict.fromkeys(row["reward"] for row in table):
        line, rows = f"{name:20}", [row for row in table if row["reward"] == name]
        for figure in FIGURES:
            line += f"{spread([row.get(figure) for row in rows]):>36}"
        lines.append(line)
    write_json(Path(cfg.out) / "process.json", table)
    write_atomic(Path(cfg.out) / "process.txt", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    program(main, Config, __doc__)
