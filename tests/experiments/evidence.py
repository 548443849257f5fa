"""The tables of LOG.md: one command makes what is missing, in order, and writes the rows. By hand, for hours.

    python tests/experiments/evidence.py                              all of it, into runs/SEED/...
    python tests/experiments/evidence.py --only chain --seeds 0,1     one table, two seeds
    python tests/experiments/evidence.py --rows                       run nothing: the rows of what is there,
                                                                      and the commands of what is missing

A run that is there (a result.json) is not made again, one that was cut off goes on from its last checkpoint:
the same command again. Each seed has a folder, in which the links of its chain are made once. Tables that
need more than a row of metrics have drivers of their own, which work in the same way (DRIVERS).

The tables real, steps, arithmetic and critic read a folder --files: smollm2/ (SmolLM2-135M-Instruct from
the hub), harmless-base.jsonl.gz (of hh-rlhf), alpaca-eval-pairs.jsonl.gz (AlpacaEval's annotations as JSON
lines), 438HHHEvaluations.jsonl.gz (of Constitutional AI).
"""
import random
import shlex
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import arithmetic   # noqa: E402
from data import InputError, read_json, read_jsonl, write_json, write_jsonl   # noqa: E402
from data.files import formats   # noqa: E402
from data.flags import program   # noqa: E402
from hacking import ROOT, asked, make, run_to_end, spread   # noqa: E402

ESTIMATORS = ("gae", "rloo", "grpo", "dr_grpo", "reinforce++")


@dataclass
class Config:
    """The flags of `python tests/experiments/evidence.py`."""
    # What is run
    only: str = "all"             # which tables, of the names in TABLES and DRIVERS
    seeds: str = ""               # which (default: what each table has)
    rows: bool = False            # run nothing, print the rows of what is there and what is missing
    # Where
    out: str = "runs"             # a folder for each seed in it
    files: str = "files"          # a folder with what the tables of a real model read


@dataclass
class Table:
    """One table: the metrics of its runs as mean (smallest to largest) of the seeds. A run is a line; one of
    data.evaluate is a line for each model and each N of best-of-N. {run} in a command: the seed's folder,
    {files}: --files, {root}: where the scripts are."""
    seeds: str
    runs: dict                    # {run, a folder of the seed: script and flags}
    metrics: tuple                # of `after` in result.json, or of data.evaluate's models
    first: dict = field(default_factory=dict)   # runs that the others need, which are no lines
    prepare: typing.Callable | None = None      # (folder of the seed, seed): writes what the runs read
    before: bool = False          # a line for the metrics before training, too
    apart: bool = False           # a line for each seed, too


def with_each_estimator(flags, estimators=ESTIMATORS):
    """PPO with each of some estimators and these flags, as {folder: command}."""
    runs = {}
    for name in estimators:
        group = "" if name in ("gae", "reinforce++") else " --group 4"
        folder = name + flags.replace(" --", "_").replace(" ", "")
        runs[folder] = f"ppo.py --advantage {name}{group}{flags}"
    return runs


def oversight():
    """An annotator who knows a share of the facts, alone and with the base model's critiques: the reward
    model and PPO against it, as {folder: command}."""
    runs = {}
    for share in ("0", "0.3", "0.6", "1"):
        flags = {f"knows{share}": f"--prompts 2000 --knows {share}"}
        if share != "1":
            flags[f"knows{share}_critique"] = flags[f"knows{share}"] + " --critique {run}/base"
        for name, more in flags.items():
            runs[f"reward_{name}"] = f"reward.py {more}"
            runs[f"ppo_{name}"] = f"ppo.py --reward {{run}}/reward_{name} --relabel 0 --iterations 30"
    return runs


def cut(run, seed):
    """Files with fewer comparisons of a seed's reward.py: the first so many of those it trains on, and all
    that it holds out. Which are held out depends on the prompt alone: the same ones of each file. A quarter
    are ties, from which reward.py learns, too, and dpo.py does not."""
    make(run / "reward", [ROOT / "reward.py", "--seed", seed])
    rows = read_jsonl(run / "reward" / "comparisons.jsonl")
    train, held_out = formats.split(rows, 0.1, seed=0)      # as reward.py and dpo.py do
    for n in SIZES:
        write_jsonl(run / f"first_{n}.jsonl", held_out + train[:n])


def learned_from(n, epochs):
    """The runs that learn from n comparisons, as {folder: command}."""
    flags = f"--data {{run}}/first_{n}.jsonl --epochs {epochs}"
    return {f"reward_{n}": f"reward.py {flags}", f"dpo_{n}": f"dpo.py {flags}"}


def problems(run, seed):
    """Arithmetic word problems as a file."""
    if not (run / "problems.jsonl").exists():
        write_jsonl(run / "problems.jsonl", arithmetic.problems(600))


def stated(total, is_right, rng):
    """The total of a sum if the step is right, else a number near it."""
    return total if is_right else total + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))


def sums(run, seed):
    """Sums of three numbers in two steps, each wrong with probability 1/2, as a file of labelled steps."""
    if (run / "sums.jsonl").exists():
        return
    rng, rows = random.Random(seed), []
    for _ in range(1500):
        a, b, c = rng.sample(range(2, 30), 3)
        right = [rng.random() < 0.5, rng.random() < 0.5]
        first = stated(a + b, right[0], rng)
        second = stated(first + c, right[1], rng)
        rows.append({"prompt": f"What is {a} + {b} + {c}? Work it out in two steps.", "labels": right,
                     "completions": [f"{a} + {b} = {first}.\n", f"{first} + {c} = {second}."]})
    write_jsonl(run / "sums.jsonl", rows)


# Comparisons, and passes over them: so few need more than two, to get 40 steps or more.
SIZES = {100: 20, 300: 10, 1000: 4, 3000: 2, 10000: 2}
SIZED = {"reward": "reward.py", "dpo": "dpo.py"}
for n, epochs in SIZES.items():
    SIZED |= learned_from(n, epochs)
# Three times as many passes over the same comparisons, and PPO against either reward model, without new ones.
PASSES = {"reward": "reward.py", "reward_6": "reward.py --data {run}/reward/comparisons.jsonl --epochs 6",
          "ppo_still": "ppo.py --relabel 0 --iterations 62",
          "ppo_6": "ppo.py --reward {run}/reward_6 --relabel 0 --iterations 62"}
CHAIN = {"base": "-m data.pretrain", "sft": "sft.py", "ppo": "ppo.py"}
POLICY = ("gold", "helpful", "harmless", "honest", "kl", "length", "eos_rate")
FAMILY = {
    "sft": "sft.py", "dpo": "dpo.py", "dpo_plain": "dpo.py --sft_coef 0",
    "dpo_norm": "dpo.py --loss dpo_norm", "cdpo": "dpo.py --label_smoothing 0.05",
    "rdpo": "dpo.py --flip_rate 0.05", "ipo": "dpo.py --loss ipo",
    "apo_zero": "dpo.py --loss apo_zero", "simpo": "dpo.py --loss simpo",
    "orpo": "dpo.py --loss orpo --lr 1e-3", "kto": "dpo.py --loss kto",
    "online": "dpo.py --online --sft_coef 0", "ppo": "ppo.py"}
# Equal numbers of sampled answers: the comparisons behind reward and dpo are of 4,000 x 4 = 16,000, best-of-N
# samples 2,000 x 8 = 16,000, PPO 62 x 256 = 15,872. Best-of-N and PPO have the reward model besides; ppo and
# online ask for new labels.
LADDER = {
    "any": "-m data.best_of --prompts 2000 --n 8 --pick random",
    "best": "-m data.best_of --prompts 2000 --n 8",
    "any_sft": "sft.py --init {run}/sft --data {run}/any/demos.jsonl --lr 2e-4",
    "best_sft": "sft.py --init {run}/sft --data {run}/best/demos.jsonl --lr 2e-4",
    "dpo": "dpo.py", "ppo": "ppo.py", "online": "dpo.py --online --sft_coef 0"} | PASSES
RUNGS = ("{run}/sft {run}/any_sft {run}/best_sft {run}/dpo {run}/ppo_still {run}/ppo_6 {run}/ppo "
         "{run}/online --reference {run}/sft")
STAGES = {"ppo": "ppo.py", "ptx": "ppo.py --ptx_coef 0.5", "dpo": "dpo.py", "kto": "dpo.py --loss kto",
          "cai": "cai.py"}
# Of hh-rlhf's 1,161 pairs within 192 tokens 581 are held out (standard error 0.020), of AlpacaEval's 1,916
# 1,012 (0.015, if those of one instruction were independent). AlpacaEval asks some 97 instructions about 20
# times each, and a prompt's pairs share a step: hence its small batches.
SMOLLM2 = "reward.py --init {files}/smollm2 --lr 3e-5 --max_len 192"
REAL = {"hh": SMOLLM2 + " --epochs 1 --batch_size 8 --micro_batch 8 --data {files}/harmless-base.jsonl.gz"
              " --held_out 0.5",
        "alpaca_eval": SMOLLM2 + " --epochs 2 --batch_size 2 --micro_batch 1"
                       " --data {files}/alpaca-eval-pairs.jsonl.gz --held_out 0.6"}
STEPS = ("-m data.process --init {files}/smollm2 --data {run}/sums.jsonl --lr 3e-5 --epochs 2 --batch_size 8 "
         "--micro_batch 8 --held_out 0.4")
ARITHMETIC = (
    "ppo.py --init {files}/smollm2 --data {run}/problems.jsonl --advantage grpo "
    "--reward {root}/tests/experiments/arithmetic.py:score --group 8 --rollouts 32 --minibatches 2 "
    "--micro_batch 8 --max_prompt 96 --max_new 48 --lr 2e-5 --kl_coef 0.02 --eos_penalty 0 --iterations 40")
ALL = "{run}/base {run}/sft {run}/ppo {run}/ptx {run}/dpo {run}/kto {run}/cai --reference {run}/sft"
OVER = tuple(f"over {name}" for name in ("base", "sft", *STAGES, "control"))    # win rates


def judged(name, flags, metrics=OVER):
    """The table of all stages' policies beside each other, by the judge that the flags name."""
    return Table("0,1,2", {name: f"-m data.evaluate {ALL} {flags}"}, metrics, first=STAGES)


TABLES = {
    "chain": Table("0,1,2,3,4,5,6,7,8,9", CHAIN, (*POLICY, "reward"), apart=True),
    "reward": Table("0,1,2,3,4,5,6,7,8,9", {"reward": "reward.py"}, ("accuracy", "ceiling", "loss")),
    "dpo": Table("0,1,2", FAMILY, (*POLICY, "accuracy")),
    "ladder": Table("0,1,2", {"ladder": f"-m data.evaluate {RUNGS} --reward {{run}}/reward --best_of 8"},
                    ("gold", "kl", "reward", "words", "unique", "over sft"), first=LADDER),
    "sizes": Table("0,1,2", SIZED, ("accuracy", "loss"), prepare=cut),
    "passes": Table("0,1,2", PASSES, ("accuracy", "loss", "calibration_error", *POLICY)),
    "estimators": Table("0,1,2", {"ppo": "ppo.py"} | with_each_estimator("", ESTIMATORS[1:]), POLICY),
    "checkable": Table("0,1,2", with_each_estimator(" --reward gold --iterations 30")
                       | with_each_estimator(" --reward gold --iterations 30 --kl_coef 0"), POLICY),
    "cai": Table("0,1,2,3,4", {"cai": "cai.py", "rlhf": "cai.py --labels human"},
                 ("harmless_rate", "gold", "helpful", "harmless", "honest")),
    "oversight": Table("0,1,2", oversight(), ("gold_accuracy", "accuracy", *POLICY)),
    "tax": judged("tax", "--reward {run}/reward --best_of 1,4,16,64",
                  ("bits_per_byte", "skill", "gold", "kl", "reward", "unique", *OVER)),
    "judge_annotator": judged("judge_annotator", "--judge annotator"),
    "judge_reward": judged("judge_reward", "--judge {run}/reward"),
    "judge_ai": judged("judge_ai", "--judge ai:{run}/base"),
    "real": Table("0,1,2", REAL, ("accuracy", "longer_wins", "accuracy_shorter", "accuracy_longer", "loss"),
                  before=True),
    "steps": Table("0,1,2", {"steps": STEPS}, ("accuracy", "first_error", "no_error", "loss"), prepare=sums,
                   before=True),
    "arithmetic": Table("0", {"arithmetic": ARITHMETIC}, ("reward", "length", "eos_rate", "kl"),
                        prepare=problems, before=True),
}
CHAINS = ["--links", "{out}/{seed}", "--seeds", "{seeds}"]      # {seed} is filled in by the driver itself
HERE = "tests/experiments/"
DRIVERS = {   # {name: (seeds, command, a file that it leaves when it has ended)}
    "kl_estimates": (TABLES["chain"].seeds, [HERE + "kl_estimates.py", *CHAINS], "kl_estimates.json"),
    "gao": ("0,1,2", [HERE + "gao.py", *CHAINS], "gao.json"),
    "process": ("0,1,2", [HERE + "process.py", *CHAINS], "process.txt"),
    "hacking": ("0,1,2", [HERE + "hacking.py", *CHAINS, "--cures", "none,relabel,budget,kl"], "cures.txt"),
    "frontier": ("0,1,2", [HERE + "preferences.py", "--frontier", *CHAINS], "frontier.json"),
    "pareto": ("0,1,2", [HERE + "preferences.py", "--pareto", *CHAINS], "pareto.json"),
    "growth": ("", [HERE + "growth.py"], "growth.json"),
    "critic": ("", ["cai.py", "--critic", "{files}/smollm2", "--critic_test",
                    "{files}/438HHHEvaluations.jsonl.gz"], "critic.json"),
}


def command_of(text, run, files):
    """A command of the tables as a list."""
    words = [word.format(run=run, files=files, root=ROOT) for word in text.split()]
    if words[0] != "-m":
        words[0] = ROOT / words[0]
    return words


def lines_of(result, name, before):
    """{line of the table: {metric: number}} of a result.json. before: with the metrics before training."""
    lines = {}
    if "models" not in result:
        if before:
            lines[f"{name}, before"] = result["before"]
        return lines | {name: result["after"]}
    for model, metrics in result["models"].items():
        lines[model] = dict(metrics)
        for other, win in result["wins"].get(model, {}).items():
            lines[model][f"over {other}"] = win["win_rate"]
    for point in result["best_of"]:
        lines[f"best of {point['n']}"] = point
    return lines


def table_of(name, table, seeds, cfg):
    """Make a table's runs, unless --rows, and print its rows in Markdown. Returns the commands of the runs
    that are not there."""
    missing, found, apart = [], {}, {}
    for seed in seeds:
        run = Path(cfg.out) / str(seed)
        if table.prepare and not cfg.rows:
            run.mkdir(parents=True, exist_ok=True)
            table.prepare(run, seed)
        for folder, text in (table.first | table.runs).items():
            command = [*command_of(text, run, cfg.files), "--seed", seed]
            if not cfg.rows:
                make(run / folder, command)
            if not (run / folder / "result.json").exists():
                missing.append(shlex.join(map(str, ["python", *command, "--out", run / folder])))
            elif folder in table.runs:
                result = read_json(run / folder / "result.json", kind=dict)
                lines = lines_of(result, folder, table.before)
                for line, metrics in lines.items():
                    found.setdefault(line, []).append(metrics)
                    if table.apart:
                        apart[f"{line}, seed {seed}"] = [metrics]

    print(f"\n{name}\n| | seeds | " + " | ".join(table.metrics) + " |")
    print("|---" * (len(table.metrics) + 2) + "|")
    for line, results in (found | apart).items():
        cells = []
        for metric in table.metrics:
            cells.append(spread([metrics.get(metric) for metrics in results]))
        print(f"| {line} | {len(results)} | " + " | ".join(cells) + " |")
    return missing


def driver_of(name, cfg):
    """Run a driver to its end, unless --rows or this command has ended before, and print what it said.
    Returns its command, in a list, if it has not ended. InputError: it fails."""
    seeds, (script, *flags), last = DRIVERS[name]
    folder = Path(cfg.out) / name
    command = [str(ROOT / script)]
    for flag in flags:
        command.append(flag.format(out=cfg.out, files=cfg.files, seeds=cfg.seeds or seeds, seed="{seed}"))
    command += ["--out", str(folder)]
    record = folder / "command.json"      # not there where it was run by hand
    has_ended = (folder / last).exists() and (
        not record.exists() or asked(read_json(record)) == asked(command))
    if not cfg.rows and not has_ended:
        print(shlex.join(command), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        status, _, _ = run_to_end([sys.executable, *command], folder / "screen.txt")
        if status:
            raise InputError(f"{script} failed, see {folder}/screen.txt")
        write_json(record, command)
        has_ended = True
    if not has_ended:
        return [shlex.join(["python", *command])]
    said = folder / "screen.txt"      # not there where it was run by hand
    print(f"\n{name}\n" + (said.read_text() if said.exists() else f"see {folder / last}"))
    return []


def main(cfg):
    """Every table, in order."""
    names = [*TABLES, *DRIVERS] if cfg.only == "all" else cfg.only.split(",")
    unknown = [name for name in names if name not in TABLES and name not in DRIVERS]
    if unknown:
        raise InputError(f"--only: no such table: {', '.join(unknown)}; there are "
                         f"{', '.join([*TABLES, *DRIVERS])}")
    missing = []
    for name in names:
        if name in DRIVERS:
            missing += driver_of(name, cfg)
        else:
            seeds = (cfg.seeds or TABLES[name].seeds).split(",")
            missing += table_of(name, TABLES[name], seeds, cfg)
    if missing:
        print("\nmissing:\n" + "\n".join(dict.fromkeys(missing)))


if __name__ == "__main__":
    program(main, Config, __doc__)
