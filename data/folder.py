"""A run's folder: whose files lie in it, who may write there, and what its run was made from.

Nothing that is not ours is ever replaced. A program names the files that it may write. Those that are there
already are its to replace if the run.json beside them lists them, for then a run of ours made them; a run
with other flags needs the user's --overwrite besides. `foreign` decides this for all that leave a run.json.
"""
import ast
import atexit
import functools
import hashlib
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from data import InputError, read_json, write_json
from data.flags import FREE, names_in

try:
    import fcntl
except ImportError:   # Windows: no lock
    fcntl = None

ROOT = Path(__file__).parents[1]
CHECKPOINT = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
              "tokenizer_config.json", "state.pt")
DATA = (".jsonl", ".json", ".gz", ".txt", ".csv", ".tsv", ".parquet")      # what a file of data ends in
PART_OF_A_CHAIN = "RLHF_PART_OF_A_CHAIN"   # environment variable of a script that another one runs


# ------------------------------------------------------------------------------------------------------------
# Whose files.


def run_of(folder):
    """The run.json of a run of ours, finished or not: its stage, flags, inputs and files; {} if there is
    none."""
    try:
        record = read_json(Path(folder) / "run.json", kind=dict)
    except InputError:
        return {}
    is_ours = record.keys() >= {"stage", "config", "flags", "inputs"}
    return record if is_ours and all(is_inside(name) for name in record.get("files", ())) else {}


def is_inside(name):
    """Whether a name that a run.json lists, and that may be deleted, lies in its folder."""
    return type(name) is str and not Path(name).is_absolute() and ".." not in Path(name).parts


def result_of(folder):
    """The result.json of a finished run, {} if there is none."""
    path = Path(folder) / "result.json"
    return read_json(path, kind=dict) if path.exists() else {}


def foreign(folder, names):
    """Those of the names that a program must not write or delete in a folder, because something is there that
    no run of ours made. Names end in "/" where they are folders of checkpoints or runs. The file system is
    asked for each, so that it decides whether Log.jsonl is log.jsonl; links are somebody's, wherever they
    lead."""
    record = run_of(folder)
    made = ["run.json", *record.get("files", names)] if record else []
    if "config.json" in made:
        made.append("generation_config.json")      # which older runs wrote beside it and did not list
    found = []
    for name in ("run.json", *names, *made):
        path = Path(folder) / name
        is_right_kind = path.is_dir() == name.endswith("/") and not path.is_symlink()
        if os.path.lexists(path) and not (name in made and is_right_kind):
            found.append(name)
        elif path.parent.exists() and not path.parent.is_dir():
            found.append(str(Path(name).parent))
        elif name.endswith("/") and path.is_dir() and not is_ours(path):
            # A run lists the folder, but somebody else has put a model there.
            found += [name + part for part in CHECKPOINT if os.path.lexists(path / part)]
    return list(dict.fromkeys(found))


def is_ours(path):
    """Whether a folder inside a run's own holds a run of ours, or a reward model as ppo.py saves it."""
    # That one has no run.json. reward_mean is a field that only we write; and a save that was cut off left
    # .commit (data/files/checkpoint.py).
    try:
        config = read_json(path / "config.json", kind=dict)
    except InputError:
        config = {}
    return bool(run_of(path)) or "reward_mean" in config or (path / ".commit").exists()


def remove(folder, names):
    """Delete what a run of ours left in a folder: the files of these names, and in a folder of them that is
    ours what its own run.json lists, or a checkpoint. Whatever else lies there stays."""
    for name in names:
        path = Path(folder) / name
        if name.endswith("/"):
            if path.is_dir() and is_ours(path):
                remove(path, [*run_of(path).get("files", CHECKPOINT), "run.json", ".lock"])
                with suppress(OSError):      # not empty
                    path.rmdir()
        else:
            path.unlink(missing_ok=True)


def would_be_replaced(folder, names, inputs):
    """The first of the inputs (paths, or names of other kinds) that a program which writes or deletes these
    names in a folder would replace, or None: the folder itself, such as a model that --init names, what is in
    it, or what is in a folder of these names."""
    targets, folders = [Path(folder)], []
    for name in names:
        targets += [Path(folder) / name, (Path(folder) / name).parent]
        if name.endswith("/"):
            folders.append((Path(folder) / name).resolve())
    targets = [path for path in targets if path.exists()]
    for name in inputs:
        for part in parts_of(name):
            if not part.exists():
                continue
            is_target = any(part.samefile(target) for target in targets)
            if is_target or any(path in part.resolve().parents for path in folders):
                return part
    return None


def claim(folder, names, inputs=()):
    """Take a folder for a program that writes these names in it, until this process ends; the folder is made
    if it is missing. InputError: it is a file, holds foreign files of these names, is read by this program,
    or another run is writing there. Nothing is changed then."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    made = [*names, *run_of(folder).get("files", ())]     # what an older run made is deleted with --overwrite
    lost = would_be_replaced(folder, made, inputs)
    if lost:
        raise InputError(f"{lost} is read by this run and would be replaced by it; choose another --out")
    found = foreign(folder, names)
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise InputError(f"{folder} holds {', '.join(found[:4])}{more}, which no run of ours made; choose "
                         "another --out, or move them away")
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    # A script that cai.py ran may have outlived it, and still write in its own folder.
    for name in made:
        if name.endswith("/") and (folder / name / ".lock").exists():
            os.close(lock(folder / name))      # nobody holds it; whoever runs there next may have it


def take(cfg, stage, files, inputs=()):
    """Claim cfg.out for a command without steps, and leave its run.json there; --overwrite deletes what is
    there. InputError: as `claim`, or what it would replace came from other flags or inputs, and --overwrite
    is not given."""
    inputs = [name for name in inputs if name]
    claim(cfg.out, files, inputs)
    old, record = run_of(cfg.out), record_of(cfg, stage, inputs, files)
    if old and not cfg.overwrite:
        check_same(cfg.out, old, record)
    else:
        remove(cfg.out, old.get("files", files))
    sign(cfg.out, record)


def sign(folder, record):
    """Write a run's run.json, by which the files that it names are ours; `withdraw` it at the end."""
    write_json(Path(folder) / "run.json", record)
    atexit.register(withdraw, folder, record["files"])


def withdraw(folder, files):
    """A run that ended before it wrote any of its files leaves no run.json, which would make those ours that
    somebody puts there later."""
    if not any((Path(folder) / name).exists() for name in files):
        (Path(folder) / "run.json").unlink(missing_ok=True)


def lock(folder):
    """Keep other runs out of a folder until this process ends, or closes what this returns. InputError: one
    is writing there."""
    # A bare file number, which nobody has to close: the system does, when the process ends, however it ends.
    handle = os.open(Path(folder) / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is None:
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        advice = "choose another --out"
        if PART_OF_A_CHAIN in os.environ:    # left behind where its parent was killed: soon it is done
            advice = "wait until it has ended, then give the same command again"
        raise InputError(f"{folder}: another run is writing there; {advice}") from None
    except OSError as e:
        print(f"{folder}: no locks here ({e.strerror}); see that no other run writes there")
    return handle


# ------------------------------------------------------------------------------------------------------------
# What a run is made from: flags, inputs, code.


def record_of(cfg, stage, inputs, files, all_scripts=False):
    """What run.json says of a run: its flags, the fingerprints of its inputs and of the code, and the
    names of the files that it may write."""
    flags = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    return {"stage": stage, "config": asdict(cfg), "flags": flags,
            "inputs": {str(name): fingerprint(name) for name in inputs},
            "code": code(all_scripts), "files": list(files)}


def difference(old, new):
    """What tells two run.json apart, their code aside, as a phrase; "" if nothing does."""
    if not old:
        return "no run.json says how it was made"
    if old["stage"] != new["stage"]:
        return f"{old['stage']} made it"
    for name in new["flags"] | old["flags"]:
        was, value = old["flags"].get(name), new["flags"].get(name)
        read = old["inputs"].get(was, "none")      # a fingerprint
        # The same bytes elsewhere. Not so where a part of the name is no file, as in FILE.py:function.
        is_moved = "none" not in read.split() and read == new["inputs"].get(value)
        if was != value and not is_moved:
            return f"--{name} was {was!r}, now {value!r}"
    # By content: where a file lies is told by the flags, and the whole folder may have moved since.
    for (path, value), before in zip(new["inputs"].items(), old["inputs"].values()):
        if before != value:
            return f"{path} has changed since"
    return ""


def check_same(folder, old, new):
    """InputError unless the runs of two run.json are the same, their code aside. `old` lies in the folder."""
    other = difference(old, new)
    if other:
        raise InputError(f"{folder} holds a run of its own ({other}); choose another --out, or --overwrite "
                         "it")


def changed_code(old, new):
    """The names of the files of ours whose meaning has changed between two run.json, as a phrase; "" if none
    has, or if nobody can tell."""
    before, now = old.get("code", {}), new["code"]
    if before.get("python") != now["python"]:
        return ""
    return ", ".join(name for name in sorted(before | now) if before.get(name) != now.get(name))


def edited_since(record):
    """The files of ours whose meaning has changed since a run wrote this run.json, as a phrase; "" if none
    has, or if nobody can tell."""
    # Of its files, not of those that the present script has imported: another stage needs others.
    before = record.get("code", {})
    now = {"python": python()}
    for name in before.keys() - now.keys():
        now[name] = meaning(ROOT / name) if (ROOT / name).is_file() else "gone"
    return changed_code({"code": before}, {"code": now})


def python():
    """The version of Python, such as 3.11: another one has another syntax tree for the same text."""
    return "{}.{}".format(*sys.version_info)


def code(all_scripts=False):
    """{file: fingerprint of its meaning} of the running script and of our modules that it has imported; with
    all_scripts of every script, for a run that starts others. A comment or a docstring changes nothing."""
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    # torch has thousands, and each Path costs
    paths = {Path(file) for file in files if file.endswith(".py") and file.startswith(str(ROOT))}
    if all_scripts:
        paths |= set(ROOT.glob("*.py"))
    found = {"python": python()}
    for path in sorted(paths):
        if path.parent == ROOT or ROOT / "data" in path.parents:
            found[str(path.relative_to(ROOT))] = meaning(path)
    return found


def meaning(path):
    """A hash of the syntax tree of a Python file without its docstrings."""
    return meaning_of(path.read_bytes())


@functools.lru_cache(None)      # a stage asks for its own code and for that of its links
def meaning_of(source):
    """The same of the bytes of a Python file."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def fingerprint(name):
    """Tells whether an input (a path, or a name of paths as in `parts_of`) has changed: a hash of each file's
    content and size; of a folder, of the size of its weights and of one eighth of their bytes; "none" where
    there is none."""
    return " ".join(fingerprint_of_path(path) for path in parts_of(name))


def fingerprint_of_path(path):
    """The fingerprint of one file or folder."""
    # Weights are long, and training changes whole layers: 128 KB of each megabyte.
    paths, gap = ([path], 0) if path.is_file() else (sorted(path.glob("*.safetensors")), 7 * 2 ** 17)
    if not paths:
        return "none"
    sha = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as f:
            while block := f.read(2 ** 17):
                sha.update(block)
                f.seek(gap, os.SEEK_CUR)
        sha.update(str(size).encode())
    return sha.hexdigest()[:16]


def missing(names):
    """The first path among inputs (as in `parts_of`) that is not there and can be nothing else, such as a
    hub's model or an address; None if there is none."""
    for name in names:
        for part in parts_of(name):
            is_path = part.suffix in DATA or (part.parent != Path(".") and part.parent.is_dir())
            if is_path and "://" not in str(name) and not part.exists():
                return part
    return None


def parts_of(name):
    """The paths in the name of an input: itself, or its parts where it has commas, as A,B has, or colons,
    such as FILE.py:function and implicit:A:B; the file of the module of module:function."""
    first, *others = names_in(str(name))
    if others:
        return parts_of(first) + parts_of(",".join(others))
    path = Path(name)
    if not path.exists() and path.with_name(path.name + ".py").is_file():
        path = path.with_name(path.name + ".py")
    if ":" not in str(path) or path.exists():
        return [path]
    found = []
    for part in str(path).split(":"):
        found += parts_of(part)
    return found
