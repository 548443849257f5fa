"""Learning of ours beside TRL's on the same task: PPO, DPO, KTO, ORPO, reward model. By hand, for hours.

    python tests/experiments/versus_trl.py --trl VENV/bin/python --links runs/{seed}
    python tests/experiments/versus_trl.py --trl VENV/bin/python --only check,ppo,ppo_trl --seeds 0

VENV has trl: pip install tiktoken trl==0.21 transformers==4.55.4. Both sides start from the same base, SFT
and reward model of a seed, read the same prompts and comparisons (without ties), train in fp32 with as many
threads, and are measured by one measure, ours: means over DRAWS samplings of the 400 test prompts. `check`
asserts that trl has our ids, and our log-probs, rewards and DPO loss to 1e-4.

Mended so that TRL is at no disadvantage: our reward_mean is a bias of its heads; PPO's minibatches are not
accumulated to one step, and its rollout is read at once; the answers for KTO are mixed, which its trainer
does not do; memory is kept as data/setup.py keeps it. PPO gets TRL's defaults at lr 2e-4 and 1 epoch x 4
minibatches, the same with our optimizer and warm-up (like_ours), and in the first seed the search of RUNS.

Not equal. PPOTrainer reads score and value one token behind the EOS, subtracts the penalty of an endless
answer from its score (ours: instead of it), clips no gradient norm, and asks 256 prompts once where ours asks
128 twice. By default it has one learning rate for policy and value, falling to 0 (ours: to a third), betas
(0.9, 0.999), eps 1e-8, cliprange_value 0.2, vf_coef 0.1 and no warm-up of the value model; ppo_like_trl is
ours, as near to that as its flags come. ORPOTrainer's likelihood counts the prompt too. RewardTrainer takes
64 random pairs where ours takes 16 prompts with all their pairs, reads an answer once for each of its pairs
where ours reads it once, and its head starts smaller. KTOTrainer has one order for all epochs. Ours puts
pairs of like length together, which saves it padding; in TRL that would also order them (by_length).
DPOTrainer reads the prompt twice. All random numbers differ.

A run that is there is not made again. After each, --out/table.md and curves.jsonl (reward, KL and gold of
every iteration of PPO, against episodes and the processor seconds of the whole command, spread evenly) are
written anew, and at the end, if matplotlib is installed, figure.svg.
"""
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import dpo   # noqa: E402
from data import (InputError, read_json, read_jsonl, report, write_atomic, write_json,   # noqa: E402
                  write_jsonl)
from data.files import formats   # noqa: E402
from data.files.checkpoint import load   # noqa: E402
from data.flags import program   # noqa: E402
from data.prompts import test_prompts   # noqa: E402
from data.rewards import rewards_of_texts   # noqa: E402
from data.setup import MEASURE, seeded   # noqa: E402
from hacking import ROOT, make, pyplot, spread   # noqa: E402
from model import compare_policies, freeze, pad_answers, sampling_copy   # noqa: E402
from reward import group_pairs, held_out_metrics   # noqa: E402

DRAWS = 5
PPO = "ppo.py --dtype float32 --relabel 0 --iterations 30 --init {sft} --reward {reward}"
DPO = "dpo.py --sft_coef 0 --data {data}"
RUNS = {   # name, which is a folder of the seed: a script of ours, or "trl", with its flags. In this order.
    "check": "trl check",
    "sft": "",      # what all but orpo start from: measured alone
    "ppo": PPO,
    "ppo_trl": "trl ppo",
    "ppo_trl_like_ours": "trl ppo --like_ours",
    "dpo": f"{DPO} --dtype float32 --init {{sft}}",
    "dpo_trl": "trl dpo --lr 3e-4",
    "reward": "reward.py --dtype float32 --data {data} --init {sft}",
    "reward_trl": "trl reward --lr 1e-3",
    "kto": f"{DPO} --dtype float32 --init {{sft}} --loss kto",
    "kto_trl": "trl kto --lr 3e-4",
    "orpo": f"{DPO} --dtype float32 --init {{base}} --loss orpo --lr 1e-3",
    "orpo_trl": "trl orpo --lr 1e-3",
    # Why is PPO like ours under TRL better, if it is? Ours without the differences that flags can remove.
    "ppo_group_1": f"{PPO} --group 1",
    "ppo_like_trl": f"{PPO} --group 1 --value_lr 2e-4 --value_warmup 0 --value_clip 0.2 --grad_clip 1e9",
    # Why did DPO's KL differ in a first comparison? There ours was in bf16, and TRL's rows were by length.
    "dpo_trl_by_length": "trl dpo --lr 3e-4 --by_length",
    "dpo_bf16": f"{DPO} --dtype bfloat16 --init {{sft}}",
    # Why is RewardTrainer better after as many passes? Ours with as many processor seconds.
    "reward_5_epochs": "reward.py --dtype float32 --data {data} --init {sft} --epochs 5",
    # The search for TRL.
    "ppo_trl_1e-4": "trl ppo --lr 1e-4",
    "ppo_trl_5e-4": "trl ppo --lr 5e-4",
    "ppo_trl_4x1": "trl ppo --epochs 4 --minibatches 1",
    "dpo_trl_defaults": "trl dpo --lr 3e-4 --defaults",
}
FIRST_SEED_ONLY = ("ppo_trl_1e-4", "ppo_trl_5e-4", "ppo_trl_4x1", "dpo_trl_defaults")
COLUMNS = {"policies": ("gold", "reward", "kl", "kl_median", "kl_endless", "k1", "length", "eos_rate",
                        "accuracy", "chosen", "rejected", "cpu"),
           "reward models": ("accuracy", "loss", "margin", "calibration_error", "cpu")}


@dataclass
class Config:
    """The flags of `python tests/experiments/versus_trl.py`."""
    # What is run
    trl: str = ""                 # interpreter that has trl 0.21
    only: str = "all"             # which, of the names in RUNS
    seeds: str = "0,1,2"          # which
    # Where
    out: str = "out/versus_trl"   # folder for all runs, table and figure
    links: str = ""               # folder that holds (or gets) base, sft and reward of a seed, {seed} stands
                                  # for it


def without_ties(path, links):
    """The comparisons of a seed that are no ties, in a file: what both sides read."""
    if not path.exists():
        rows, _ = formats.load(links / "reward" / "comparisons.jsonl", "preference")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [row for row in rows if row["label"] != 0.5])
    return path


# ------------------------------------------------------------------------------------------------------------
# What came out.


@torch.no_grad()
def measure(path, folder, links, data):
    """Figures {name: number} of the model in a folder, kept in a file at `path`."""
    if path.exists():
        return read_json(path)
    rows, _ = formats.load(data, "preference")
    _, held = formats.split(rows, 0.1, seed=0)
    if folder.name.startswith("reward"):
        model, tok = load(folder, head="score")
        figures = held_out_metrics(freeze(model), group_pairs(held, tok, 256)[0], tok)
    else:
        figures = of_policy(folder, links, held)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)
    return figures


def of_policy(folder, links, held):
    """Figures of a policy, means over DRAWS samplings, the same draws for everybody. held: comparisons."""
    policy, tok = load(folder)
    reference, reward = load(links / "sft")[0], load(links / "reward", head="score")[0]
    for model in (policy, reference, reward):
        freeze(model)
    sampler, tests, draws = sampling_copy(policy), test_prompts(policy, tok, 32), []
    for draw in range(DRAWS):
        found, answers = report.test_policy(sampler, tok, tests, seeded(draw, MEASURE))
        found["reward"] = statistics.mean(rewards_of_texts(reward, tok, tests.prompts, answers.texts))
        draws.append(found | of_kl(policy, reference, tok, answers))
    figures = {name: statistics.mean(found[name] for found in draws) for name in draws[0]}

    # Log-ratios of held-out answers to the SFT model, and how often that of the chosen one is higher.
    examples, _ = dpo.encode(held, tok, 128, 256)
    chosen, rejected = dpo.all_logps(policy, examples, tok, 64) - dpo.all_logps(reference, examples, tok, 64)
    return figures | {"accuracy": dpo.wins(chosen - rejected).mean().item(), "chosen": chosen.mean().item(),
                      "rejected": rejected.mean().item()}


def of_kl(policy, reference, tok, answers):
    """KL of answers to the reference, in nats an answer: exact (kl), its median, the part of the mean that
    comes from answers without an end, and as TRL estimates it, from the sampled tokens alone (k1)."""
    parts = []
    for i in range(0, len(answers.ids), 50):
        rows = list(zip(answers.prompt_ids[i: i + 50], answers.ids[i: i + 50]))
        logp, ref_logp, kl, _ = compare_policies(policy, reference, *pad_answers(rows, tok.pad_id))
        parts.append(torch.stack([kl.sum(1), (logp - ref_logp).sum(1)]))
    kl, k1 = torch.cat(parts, dim=1)                                                             # (N,) each
    endless = torch.tensor([ids[-1] not in tok.eos_ids for ids in answers.ids])
    return {"kl": kl.mean().item(), "kl_median": kl.median().item(),
            "kl_endless": (kl * endless).mean().item(), "k1": k1.mean().item()}


def curve(folder):
    """A row of curves.jsonl for each iteration of a PPO run of either side."""
    log, cpu, rows = read_jsonl(folder / "log.jsonl"), read_json(folder / "cost.json")["cpu"], []
    for i, row in enumerate(log):
        reward, kl = row.get("reward", row.get("objective/scores")), row.get("kl", row.get("objective/kl"))
        rows.append({"seed": folder.parent.name, "run": folder.name, "episodes": 256 * (i + 1),
                     "cpu": cpu * (i + 1) / len(log), "reward": reward, "kl": kl, "gold": row["gold"]})
    return rows


def table(found):
    """Markdown of the figures {run: [those of each seed]}."""
    lines = []
    for kind, columns in COLUMNS.items():
        lines += [f"| {kind} | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
        for name, seeds in found.items():
            if name.startswith("reward") == (kind == "reward models"):
                cells = [spread([figures.get(column) for figures in seeds]) for column in columns]
                lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(path, curves, found):
    """PPO's gold against episodes and processor seconds, its reward against KL, and what every run reached.
    curves: rows of curves.jsonl."""
    plt = pyplot(path)
    if plt is None:
        return
    fig, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for ax, x, y in zip(axes.flat, ("episodes", "cpu", "kl"), ("gold", "gold", "reward")):
        for color, name in enumerate(("ppo", "ppo_trl", "ppo_trl_like_ours")):
            rows = [row for row in curves if row["run"] == name]
            for seed in sorted({row["seed"] for row in rows}):
                points = [(row[x], row[y]) for row in rows if row["seed"] == seed]
                ax.plot(*zip(*points), color=f"C{color}", label=f"{name}, seed {seed}", alpha=0.8)
        ax.set(xlabel={"cpu": "processor seconds"}.get(x, x), ylabel=f"{y} on training prompts")
    last, names = axes[1, 1], [name for name in found if not name.startswith("reward")]
    for i, name in enumerate(names):
        last.plot([figures["gold"] for figures in found[name]], [i] * len(found[name]), "o")
    last.set(xlabel="gold on test prompts, each seed", yticks=range(len(names)), yticklabels=names)
    if curves:
        axes[0, 0].legend(fontsize=7)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    fig.savefig(path)
    plt.close(fig)


def show(cfg, seeds):
    """Write table and curves of all runs that are there. Returns the table and what `draw` draws."""
    found, curves = {}, []
    for name in RUNS:
        for seed in seeds:
            folder = Path(cfg.out) / seed / name
            if (folder / "measured.json").exists():
                cost = {} if name == "sft" else read_json(folder / "cost.json")
                found.setdefault(name, []).append(read_json(folder / "measured.json") | cost)
                curves += curve(folder) if name.startswith("ppo") else []
    text = table(found)
    write_atomic(Path(cfg.out) / "table.md", text.encode())
    write_jsonl(Path(cfg.out) / "curves.jsonl", curves)
    return text, curves, found


# ------------------------------------------------------------------------------------------------------------


def run(cfg, name, folder, links):
    """Make a run, unless it is there, and measure it."""
    data, seed = without_ties(folder.parent / "comparisons.jsonl", links), folder.parent.name
    script, *flags = RUNS[name].split() or [""]
    if script == "trl":
        command = [ROOT / "tests" / "experiments" / "trl_trainers.py", *flags]
        make(folder, [*command, "--links", links, "--data", data, "--seed", seed], python=cfg.trl)
    elif script:
        paths = {"base": links / "base", "sft": links / "sft", "reward": links / "reward", "data": data}
        flags = [flag.format(**paths) for flag in flags]
        make(folder, [ROOT / script, *flags, "--seed", seed])
    if name != "check":
        model = links / "sft" if name == "sft" else folder
        print(f"    {measure(folder / 'measured.json', model, links, data)}", flush=True)


def main(cfg):
    """All runs, in order."""
    names, seeds = list(RUNS) if cfg.only == "all" else cfg.only.split(","), cfg.seeds.split(",")
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        raise InputError(f"--only: no such run: {', '.join(unknown)}; there are {', '.join(RUNS)}")
    if not cfg.trl:
        raise InputError("--trl: which python has trl? (pip install tiktoken trl==0.21 transformers==4.55.4)")
    # The same for both sides: threads, and memory that is kept as data/setup.py keeps it.
    both = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_THRESHOLD_": str(2 ** 25),
            "MALLOC_TRIM_THRESHOLD_": str(2 ** 30)}
    for variable, value in both.items():
        os.environ.setdefault(variable, value)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    for name in names:
        for seed in seeds[:1] if name in FIRST_SEED_ONLY else seeds:
            folder = Path(cfg.out) / seed / name
            links = Path((cfg.links or f"{cfg.out}/{{seed}}/links").format(seed=seed))
            make(links / "reward", [ROOT / "reward.py", "--seed", seed])
            run(cfg, name, folder, links)
            text, curves, found = show(cfg, seeds)
    draw(Path(cfg.out) / "figure.svg", curves, found)
    print(text)


if __name__ == "__main__":
    program(main, Config, __doc__)
