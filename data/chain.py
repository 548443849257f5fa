"""The chain base -> sft -> reward -> ppo and so on: what each link starts from, how a missing one is made,
what a finished one left, and what to try after a run."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from data import InputError, report
from data.folder import PART_OF_A_CHAIN, ROOT, edited_since, result_of, run_of
from data.parallel import RANK, barrier, child_environment

LINKS = {   # name: (script, the links it starts from, what it does)
    "base": (["-m", "data.pretrain"], [], "reads the internet of the tiny world"),
    "sft": (["sft.py"], ["base"], "learns to answer from demonstrations"),
    "reward": (["reward.py"], ["sft"], "learns what the annotator prefers"),
}
SECONDS = {"base": 60, "sft": 20, "reward": 60, "ppo": 180, "dpo": 120, "cai": 180}   # rough, on two cores


def sibling(cfg, name):
    """The folder of a link of the chain: out/<name> beside this run's own --out (out/mine/ppo starts from
    out/sft)."""
    parent = Path(cfg.out).parent
    return str((parent.parent if parent.name == "mine" else parent) / name)


def unfinished(folder):
    """True where a link has to be made, or its run was cut off (a run.json, but no result.json)."""
    folder = Path(folder)
    cut_off = bool(run_of(folder)) and not (folder / "result.json").exists()
    return not (folder / "config.json").exists() or cut_off


def need(cfg, link):
    """Folder of a link of the chain, a name in LINKS. If it is missing or unfinished it is made first, after
    those it starts from, by running its script with the same seed, device and precision, in one process."""
    wanted = []
    add_link(cfg, link, wanted)
    missing = [name for name in wanted if unfinished(sibling(cfg, name))]
    if RANK == 0 and missing:
        last, n = Path(sys.argv[0]).stem, len(missing) + 1
        print(f"to do: {', '.join(timed(name) for name in missing)}, then {timed(last)}", flush=True)
        for i, name in enumerate(missing):
            script, _, does = LINKS[name]
            print(f"\n{i + 1}/{n} {name}: {does}", flush=True)
            run_script(cfg, script, sibling(cfg, name))
            print(report.what_came_out(name, sibling(cfg, name), result_of(sibling(cfg, name))["after"]))
        print(f"\n{n}/{n} {last}", flush=True)
    barrier()
    record = run_of(sibling(cfg, link))
    config = record.get("config", {})
    own = config.get("data") or config.get("init")
    if own:
        print(f"{sibling(cfg, link)} was made with flags of its own, from {own}", flush=True)
    if record and "code" not in record:
        print(f"{sibling(cfg, link)}: what code made it was not recorded", flush=True)
    edited = edited_since(record)
    if edited:
        print(f"{sibling(cfg, link)} was made before {edited} changed; python {' '.join(LINKS[link][0])} "
              f"--overwrite --out {sibling(cfg, link)} makes it anew", flush=True)
    return sibling(cfg, link)


def timed(name):
    """The name of a link or script with the seconds that it takes, where they are known."""
    return f"{name} ({SECONDS[name]} s)" if name in SECONDS else name


def add_link(cfg, name, wanted):
    """Add a link, after the links it starts from, to the list of wanted ones. One that is there needs no
    others."""
    if name in wanted:
        return
    if unfinished(sibling(cfg, name)):
        for before in LINKS[name][1]:
            add_link(cfg, before, wanted)
    wanted.append(name)


def run_script(cfg, script, out, flags=(), processes=1):
    """Run another script (a list, such as ["sft.py"]) to its end, its --out being `out`. Whatever interrupts
    this process stops it too: it ends its step and saves, and is waited for. InputError: it failed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [str(ROOT / part) if part.endswith(".py") else part for part in script]
    command += [*script, "--out", str(out), "--seed", str(cfg.seed), "--dtype", cfg.dtype, *map(str, flags)]
    if cfg.device:
        command += ["--device", cfg.device]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))   # for `-m data.pretrain`
    environment = child_environment() | {"PYTHONPATH": path, PART_OF_A_CHAIN: "1"}
    child = subprocess.Popen(command, env=environment)
    try:
        child.wait()
    except KeyboardInterrupt:
        # A signal to this process alone has not reached it. A terminal's Ctrl-C has, and then this one does
        # not count as a second (Run.stop).
        child.terminate()
        child.wait()      # subprocess.run would kill it after a quarter of a second
        raise
    if child.returncode:
        raise InputError(f"{' '.join(script)} failed, so there is no {out} to start from")


def chain_columns(cfg, name, before, after):
    """The closing table's columns: of the tiny chain base | SFT | `name`, else before | `name`. Losses of
    different kinds are not comparable and stay out."""
    columns = {"SFT": before, name: after}
    if cfg.data or cfg.init:
        columns = {"before": before, name: after}
    elif "before" in result_of(sibling(cfg, "sft")):
        columns = {"base": result_of(sibling(cfg, "sft"))["before"]} | columns    # on the same prompts
    for title, column in columns.items():
        columns[title] = {metric: value for metric, value in column.items() if metric != "loss"}
    return columns


# ------------------------------------------------------------------------------------------------------------
# What next.

NEXT = {   # stage: commands worth trying after it; the default chain needs none of the flags in capitals
    "pretrain": ["python -m data.chat {out}", "python sft.py --init OUT --data DEMONSTRATIONS --out SFT"],
    "sft": ["python -m data.chat {out}", "python reward.py --init OUT --data COMPARISONS --out REWARD",
            "python dpo.py --init OUT --data COMPARISONS --out DPO"],
    "reward": ["python ppo.py --init INIT --reward OUT --data PROMPTS --out PPO",
               "python -m data.vote --policy INIT --reward OUT --data PROMPTS"],
    "ppo": ["python -m data.chat {out}", "python ppo.py --inspect --out OUT"],
    "dpo": ["python -m data.chat {out}",
            "python dpo.py --loss {loss} --out {loss_out} --init INIT --data DATA"],
    "cai": ["python -m data.chat {out}"],
}


def beside(folder, name):
    """A folder for what `name` makes of the run in a folder: out/ppo_fooled beside out/fooled. The default
    one may hold another run, and then the command would be refused."""
    folder = Path(folder)
    return str(folder.with_name(f"{name}_{folder.name}"))


def next_commands(stage, cfg):
    """Commands worth trying after a run, about what it has made. What they need of data is named in capitals
    where this run's were the user's own, too."""
    name, init = {"pretrain": "base"}.get(stage, stage), getattr(cfg, "init", "")
    # What a biased annotator leads to shows where it is not asked again, so that only PPO moves.
    is_biased = any(value and flag.startswith("bias_") for flag, value in vars(cfg).items())
    is_default = cfg.out == f"out/{name}" and not cfg.data and not init and not is_biased
    own = {"OUT": cfg.out, "INIT": init or sibling(cfg, "sft"), "DATA": cfg.data}
    own |= {script.upper(): beside(cfg.out, script) for script in ("sft", "reward", "ppo", "dpo")}
    loss = "simpo" if getattr(cfg, "loss", "") == "ipo" else "ipo"
    commands = []
    for command in NEXT.get(stage, ()):
        command = command.format(out=shlex.quote(cfg.out), loss=loss,
                                 loss_out=shlex.quote(beside(cfg.out, loss)))
        if is_default:
            command = re.sub(r" --\w+ [A-Z]+\b", "", command)
        elif not cfg.data:
            command = re.sub(r" --data [A-Z]+\b", "", command)
        for word, value in own.items():
            command = command.replace(f" {word}", f" {shlex.quote(value)}")
        if is_biased and command.startswith("python ppo.py"):
            command += " --relabel 0"
        commands.append(command)
    sft = sibling(cfg, "sft")
    if stage in ("ppo", "dpo", "cai") and not cfg.data and result_of(sft):
        commands.append(shlex.join(["python", "-m", "data.evaluate", sft, cfg.out,
                                    "--out", beside(cfg.out, "evaluate")]))
    return commands
