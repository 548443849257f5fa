"""The chain base -> sft -> reward -> ppo and so on: what each link starts from, how a missing one is made,
and what a finished one left."""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from data import InputError, read_json, report
from data.parallel import RANK, barrier, child_environment

ROOT = Path(__file__).parents[1]

LINKS = {   # name: (script, the links it starts from, rough seconds on two cores, what it does)
    "base": (["-m", "data.pretrain"], [], 70, "reads the internet of the tiny world"),
    "sft": (["sft.py"], ["base"], 20, "learns to answer from demonstrations"),
    "reward": (["reward.py"], ["sft"], 45, "learns what the annotator prefers"),
}


PART_OF_A_CHAIN = "RLHF_PART_OF_A_CHAIN"   # environment variable of a script that another one runs
NEXT = {   # stage: commands worth trying after it
    "base": ["python -m data.chat {out}", "python sft.py"],
    "sft": ["python -m data.chat {out}", "python reward.py", "python ppo.py"],
    "reward": ["python -m data.vote --reward {out}", "python ppo.py --reward {out}"],
    "ppo": ["python -m data.chat {out}", "python ppo.py --inspect", "python dpo.py"],
    "dpo": ["python -m data.chat {out}", "python dpo.py --loss ipo --out out/ipo",
            "python -m data.evaluate out/base out/sft {out}"],
    "cai": ["python -m data.chat {out}", "python -m data.evaluate out/helpful {out}"],
}


def sibling(cfg, name):
    """The folder of a link of the chain: out/<name> beside this run's own --out (out/mine/ppo starts from
    out/sft)."""
    parent = Path(cfg.out).parent
    return str((parent.parent if parent.name == "mine" else parent) / name)


def unfinished(folder):
    """True where a link has to be made, or its run was cut off (a run.json, but no result.json)."""
    folder = Path(folder)
    cut_off = (folder / "run.json").exists() and not (folder / "result.json").exists()
    return not (folder / "config.json").exists() or cut_off


def need(cfg, link):
    """Folder of a link of the chain, a name in LINKS. If it is missing or unfinished it is made first, after
    those it starts from, by running its script with the same seed, device and precision, in one process."""
    wanted = []
    add_link(cfg, link, wanted)
    missing = [name for name in wanted if unfinished(sibling(cfg, name))]
    if RANK == 0 and missing:
        plan = ", ".join(f"{name} ({LINKS[name][2]} s)" for name in missing)
        print(f"to do: {plan}, then {Path(sys.argv[0]).stem}", flush=True)
        for i, name in enumerate(missing):
            script, _, _, does = LINKS[name]
            print(f"\n{i + 1}/{len(missing) + 1} {name}: {does}", flush=True)
            run_script(cfg, script, sibling(cfg, name))
            print(report.what_came_out(name, sibling(cfg, name), result_of(sibling(cfg, name))["after"]))
        print(f"\n{len(missing) + 1}/{len(missing) + 1} {Path(sys.argv[0]).stem}", flush=True)
    barrier()
    config = run_of(sibling(cfg, link)).get("config", {})
    own = config.get("data") or config.get("init")
    if own:
        print(f"{sibling(cfg, link)} was made with flags of its own, from {own}", flush=True)
    return sibling(cfg, link)


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
    """Run another script (a list, such as ["sft.py"]) to its end, its --out being `out`. InputError: it
    failed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [str(ROOT / part) if part.endswith(".py") else part for part in script]
    command += [*script, "--out", str(out), "--seed", str(cfg.seed), "--dtype", cfg.dtype, *map(str, flags)]
    if cfg.device:
        command += ["--device", cfg.device]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))   # for `-m data.pretrain`
    environment = child_environment() | {"PYTHONPATH": path, PART_OF_A_CHAIN: "1"}
    if subprocess.run(command, env=environment).returncode:
        raise InputError(f"{' '.join(script)} failed, so there is no {out} to start from")


def chain_columns(cfg, name, before, after):
    """The closing table's columns: of the tiny chain base | SFT | `name`, else before | `name`. Losses of
    different kinds are not comparable and stay out."""
    columns = {"SFT": before, name: after}
    if cfg.data or cfg.init:
        columns = {"before": before, name: after}
    elif "before" in result_of(sibling(cfg, "sft")):
        columns = {"base": result_of(sibling(cfg, "sft"))["before"]} | columns    # on the same prompts
    return {title: {k: v for k, v in column.items() if k != "loss"} for title, column in columns.items()}


def result_of(folder):
    """The result.json of a finished run, {} if there is none."""
    path = Path(folder) / "result.json"
    return read_json(path, kind=dict) if path.exists() else {}


def run_of(folder):
    """The run.json of a run, finished or not: its stage, flags and inputs; {} if there is none."""
    path = Path(folder) / "run.json"
    return read_json(path, kind=dict) if path.exists() else {}


def fingerprint(path):
    """Tells whether an input has changed: a hash of a file's content and size; of a folder, of the size and
    the first and last megabyte of its model.safetensors; "none" if there is none. A name with colons, such
    as FILE.py:function, gives one hash a part."""
    path = Path(path)
    if not path.exists() and path.with_name(path.name + ".py").is_file():      # the module of module:function
        path = path.with_name(path.name + ".py")
    if ":" in str(path) and not path.exists():
        return " ".join(fingerprint(part) for part in str(path).split(":"))
    is_folder = path.is_dir()
    if is_folder:
        path = path / "model.safetensors"
    if not path.is_file():
        return "none"
    sha, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as f:
        while block := f.read(2 ** 20):
            sha.update(block)
            if is_folder:     # weights are long, and training changes all of them
                f.seek(max(f.tell(), size - 2 ** 20))
    sha.update(str(size).encode())
    return sha.hexdigest()[:16]
