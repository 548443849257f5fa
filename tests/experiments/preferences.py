"""The frontier of gold against KL, and helpfulness against harmlessness: the runs behind two plots. By
hand, for hours.

    python tests/experiments/preferences.py --frontier    dpo.py and ppo.py, pull to the reference swept
    python tests/experiments/preferences.py --pareto      ppo.py on two reward models, weights swept: one of
                                              people who want every request met, also harmful ones, one of
                                              people who only want harmful ones refused
    python tests/experiments/preferences.py --pareto --links 'runs/{seed}' --seeds 0

PPO asks for no new labels and runs for 40 iterations. A run that is there already is not made again. Leaves
--out/frontier.json and .png, or pareto.json and .png (plots if matplotlib is installed). The family of DPO
side by side: evidence.py --only dpo.
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from data import InputError, world, write_json, write_jsonl   # noqa: E402
from data.files import formats   # noqa: E402
from data.files.checkpoint import load   # noqa: E402
from data.flags import program   # noqa: E402
from data.prompts import TEST_MAX_NEW   # noqa: E402
from data.setup import seeded   # noqa: E402
from data.sample import sample_answers   # noqa: E402
from data.world.judge import METHODS, mentions   # noqa: E402
from hacking import ROOT, make, pyplot   # noqa: E402
from model import sampling_copy   # noqa: E402

WEIGHTS = (0, 0.25, 0.5, 0.75, 1)   # of the helpful reward model; the harmless one has the rest
STILL = ["--relabel", 0, "--iterations", 40]     # of ppo.py, as in gao.py, which shares some runs
PULLS = {   # to the reference, swept
    "dpo.py": ([], "--beta", (0.05, 0.1, 0.3, 1, 3)),
    "ppo.py": (STILL, "--kl_coef", (0.01, 0.03, 0.1, 0.3, 1))}


@dataclass
class Config:
    """The flags of `python tests/experiments/preferences.py`."""
    # What is run
    seeds: str = "0,1,2"          # which
    frontier: bool = False        # sweep beta of DPO and PPO
    pareto: bool = False          # sweep the weights of a helpful and a harmless reward model
    # Where, and with which flags
    out: str = "out/preferences"  # folder for the points and the plot
    links: str = ""               # folder of a seed, {seed} stands for it: holds (or gets) base, sft, reward
                                  # and all runs
    reward_flags: str = ""        # more flags for every reward.py
    dpo_flags: str = ""           # more flags for every dpo.py
    ppo_flags: str = ""           # more flags for every ppo.py


def frontier(cfg, seeds, folder_of):
    """What a nat of KL buys: dpo.py and ppo.py with more and less pull to the reference."""
    points, lines, more = [], {}, {"dpo.py": cfg.dpo_flags, "ppo.py": cfg.ppo_flags}
    for seed in seeds:
        links = folder_of(seed)
        make(links / "reward", [ROOT / "reward.py", "--seed", seed], cfg.reward_flags)
        for script, (flags, flag, values) in PULLS.items():
            line = []
            for value in values:
                command = [ROOT / script, "--seed", seed, *flags, flag, value]
                after = make(links / f"{script[:3]}_{flag[2:]}{value}", command, more[script])["after"]
                points.append({"script": script, "seed": seed, "beta": value, "kl": after["kl"],
                               "gold": after["gold"]})
                line.append((after["kl"], after["gold"], value))
                print(points[-1], flush=True)
            lines[f"{script}, seed {seed}"] = sorted(line)
    lines = dict(sorted(lines.items()))      # all of a script's seeds side by side
    draw(Path(cfg.out) / "frontier", points, lines, xscale="log", title="what KL buys",
         xlabel="KL to SFT, nats per answer", ylabel="gold on test prompts")


def draw(path, points, lines, **axes):
    """points to path.json; lines {name: [(x, y, label)]} to path.png."""
    write_json(path.with_suffix(".json"), points)
    plt = pyplot(path.with_suffix(".png"))
    if plt is None:
        return
    fig, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for (name, line), mark in zip(lines.items(), itertools.cycle("osD^v*")):
        ax.plot([x for x, _, _ in line], [y for _, y, _ in line], f"{mark}-", label=name)
        for x, y, label in line:
            ax.annotate(f"{label:g}", (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    ax.set(**axes)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------------
# Annotators with two minds (arXiv:2204.05862, 4.3): the front between what both want.


def wants(row, text, judge):
    """What annotators of one kind, "helpful" or "harmless", feel about an answer, 0 to 1; None for prompts
    that do not concern them."""
    is_harmful = row["family"] == "harmless"
    if judge == "harmless":
        return world.judge(row, text)["gold"] if is_harmful else None
    if is_harmful:
        return float(bool(mentions(text, METHODS)))   # says how it is done
    return world.judge(row, text)["gold"]


def pairs_of(kind, pairs, row_of):
    """The comparisons as annotators of one kind would have made them, without those that they do not care
    about. row_of: rows of the world by the text of their prompt."""
    rows = []
    for pair in pairs:
        row = row_of[pair["prompt"][-1]["content"]]
        chosen, rejected = wants(row, pair["chosen"], kind), wants(row, pair["rejected"], kind)
        if chosen is None or chosen == rejected:
            continue
        better, worse = pair["chosen"], pair["rejected"]
        if chosen < rejected:
            better, worse = worse, better
        rows.append({"prompt": pair["prompt"], "chosen": better, "rejected": worse})
    return rows


def what_both_get(folder, seed):
    """Mean of what both kinds feel about a policy's answers to the test prompts: {kind: 0 to 1}."""
    tests, (policy, tok) = world.rows("test"), load(folder)
    texts, _, _ = sample_answers(sampling_copy(policy), tok, [row["prompt"] for row in tests], TEST_MAX_NEW,
                                 seeded(seed, 1))
    means = {}
    for kind in ("helpful", "harmless"):
        felt = [wants(row, text, kind) for row, text in zip(tests, texts)]
        felt = [x for x in felt if x is not None]
        means[kind] = sum(felt) / len(felt)
    return means


def pareto(cfg, seeds, folder_of):
    """A reward model of each kind of annotator, and ppo.py on both with their weights swept."""
    row_of = {row["prompt"][-1]["content"]: row for row in world.rows("preference")}
    points, lines = [], {}
    for seed in seeds:
        links = folder_of(seed)
        make(links / "reward", [ROOT / "reward.py", "--seed", seed], cfg.reward_flags)
        pairs, models = formats.load(links / "reward" / "comparisons.jsonl", "preference")[0], []
        for kind in ("helpful", "harmless"):
            data, model = links / f"{kind}_pairs.jsonl", links / f"rm_{kind}"
            write_jsonl(data, pairs_of(kind, pairs, row_of))
            command = [ROOT / "reward.py", "--seed", seed, "--init", links / "sft", "--data", data]
            make(model, command, cfg.reward_flags)
            models.append(str(model))

        line = []
        for weight in WEIGHTS:
            folder = links / f"pareto_{weight:g}"
            command = [ROOT / "ppo.py", "--seed", seed, "--init", links / "sft", "--reward", ",".join(models)]
            command += ["--reward_weights", f"{weight:g},{1 - weight:g}", *STILL, "--kl_coef", 0.2]
            make(folder, command, cfg.ppo_flags)
            points.append({"seed": seed, "weight": weight} | what_both_get(folder, seed))
            line.append((points[-1]["helpful"], points[-1]["harmless"], weight))
            print(points[-1], flush=True)
        lines[f"seed {seed}"] = line
    draw(Path(cfg.out) / "pareto", points, lines, title="two reward models, weight of the helpful one",
         xlabel="what people who want help get", ylabel="what people who want no harm get")


def main(cfg):
    """The frontier or the front, as the flags say."""
    def folder_of(seed):
        """Where a seed's base, sft, reward and all its runs are."""
        return Path((cfg.links or f"{cfg.out}/links{{seed}}").format(seed=seed))
    if cfg.frontier == cfg.pareto:
        raise InputError("give --frontier or --pareto")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    study = frontier if cfg.frontier else pareto
    study(cfg, [int(seed) for seed in cfg.seeds.split(",")], folder_of)


if __name__ == "__main__":
    program(main, Config, __doc__)
