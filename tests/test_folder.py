"""Whose files lie in a folder: nothing that is not ours is ever replaced, by whatever program; and what a run
notices of its code, its inputs and its flags when it goes on."""
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import InputError, folder as folder_py, page, vote, write_atomic
from data.chain import need, next_commands
from data.flags import ToolFlags
from data.folder import (claim, code, edited_since, foreign, lock, meaning, missing, python, record_of,
                         remove, run_of)
from data.run import FILES, Run, flags_of_its_run
from data.world import build
from dpo import Config as DPOConfig
from ppo import Config as PPOConfig
from reward import Config as RewardConfig
from sft import Config
from test_scripts import FOLDERS, fails, links, log_of, result_of, snapshot, write

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")
NAMES = [*FILES, "comparisons.jsonl", "held_out.jsonl", "process.jsonl", "inspect.json", "votes.jsonl",
         "generations.jsonl", "critic.json"]


def hashes(folder):
    """All there is in a folder: files and links with what they hold, folders with nothing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[path] = (os.readlink(path) if path.is_symlink()
                       else path.read_bytes() if path.is_file() else None)
    return found


# ------------------------------------------------------------------------------------------------------------
# The function that decides.


def put(path, kind, elsewhere):
    """Something that somebody left at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text(f"mine {path.name}")
    elif kind == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    else:      # a link to a file, or to nothing
        target = elsewhere / f"{path.name}.target"
        if kind == "link":
            target.write_text("mine, elsewhere")
        path.symlink_to(target)


def test_two_hundred_folders(tmp_path, monkeypatch):
    """A folder with some of a run's names in it, each a file, a link, a dangling link, a folder or nothing;
    with no run.json, one of another program, or one of ours that lists some of the names. What a run then
    deletes and writes never touches what is not listed; where it refuses, nothing at all has changed."""
    monkeypatch.setattr(Run, "catch_signals", lambda run: None)
    monkeypatch.setattr(folder_py, "lock", lambda folder: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)      # thousands of files
    refused = 0
    for i in range(200):
        rng, folder, elsewhere = random.Random(i), tmp_path / f"{i}" / "x", tmp_path / f"{i}" / "elsewhere"
        folder.mkdir(parents=True)
        elsewhere.mkdir()
        kinds = {}
        for name in rng.sample(NAMES, rng.randrange(5)):
            kinds[name] = rng.choice(["file", "file", "link", "dangling", "folder"])
            put(folder / name, kinds[name], elsewhere)
        record, ours = rng.choice(["none", "theirs", "ours", "ours"]), set()
        if record == "ours":
            listed = (rng.sample(list(kinds), rng.randrange(len(kinds) + 1)) if rng.random() < 0.5
                      else list(kinds))
            ours = {folder / name for name in listed if kinds[name] == "file"}
            old = {"stage": "sft", "config": {}, "flags": {}, "inputs": {}, "files": listed}
            (folder / "run.json").write_text(json.dumps(old))
            ours.add(folder / "run.json")
            for path in ours - {folder / "run.json"}:      # a result.json of ours, for one, is JSON
                path.write_text("{}")
        elif record == "theirs":
            (folder / "run.json").write_text(rng.choice(["{}", "[1]", "not JSON", '{"stage": "x"}']))
        before = hashes(tmp_path / f"{i}")
        try:
            cfg = Config(out=str(folder), overwrite=rng.random() < 0.7)
            run = Run.open(cfg, "sft", writes=["held_out.jsonl"])
            run.make_room()
        except InputError as e:
            refused += 1
            assert "--out" in str(e) and hashes(tmp_path / f"{i}") == before
            continue
        for name in [*FILES, "held_out.jsonl"]:
            write_atomic(run.folder / name, b"written")
        after = hashes(tmp_path / f"{i}")
        for path, data in before.items():
            assert path in ours or after[path] == data, path
    assert 40 < refused < 180


def test_a_file_system_that_ignores_case(tmp_path, monkeypatch):
    """There LOG.JSONL is log.jsonl: the file system is asked for each name, no list of names is compared."""
    (tmp_path / "LOG.JSONL").write_text("mine")
    assert foreign(tmp_path, ["log.jsonl"]) == [] or (tmp_path / "log.jsonl").exists()

    def exists(path):
        return Path(path).name.lower() in [x.name.lower() for x in Path(path).parent.iterdir()]
    monkeypatch.setattr(folder_py.os.path, "lexists", exists)
    assert foreign(tmp_path, ["log.jsonl", "samples.txt"]) == ["log.jsonl"]


def test_a_file_or_a_link_where_a_folder_should_be(tmp_path):
    """Also below the folder, and a link to somebody's folder inside ours."""
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="notes is a file; choose another --out"):
        claim(tmp_path / "notes", FILES)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "round1").write_text("mine")
    assert foreign(tmp_path / "x", ["round1/chains.jsonl"]) == ["round1"]
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "reward").symlink_to(tmp_path)
    assert foreign(tmp_path / "y", ["reward/"]) == ["reward/"]
    (tmp_path / "link").symlink_to(tmp_path / "y")      # a link to a folder is that folder
    assert foreign(tmp_path / "link", ["reward/", "log.jsonl"]) == ["reward/"]


def test_what_is_removed_is_what_a_run_made(tmp_path):
    """Runs inside a run go with it; what somebody put beside their files stays."""
    for name in ("round1/sl", "round1/reward"):
        (tmp_path / name).mkdir(parents=True)
    record = {"stage": "sft", "config": {}, "flags": {}, "inputs": {}, "files": ["log.jsonl"]}
    (tmp_path / "round1/sl/run.json").write_text(json.dumps(record))
    for name in ("log.jsonl", "round1/chains.jsonl", "round1/sl/log.jsonl", "round1/reward/model.safetensors",
                 "round1/notes.txt", "round1/sl/samples.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "round1/reward/config.json").write_text('{"reward_mean": 0.5}')
    remove(tmp_path, ["log.jsonl", "round1/chains.jsonl", "round1/sl/", "round1/reward/", "round1/rl/"])
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"round1/notes.txt", "round1/sl/samples.txt"}


def record_with(folder, files, stage="sft"):
    """A run.json in a folder, which says that a run of ours made these files."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "config": {}, "flags": {}, "inputs": {}, "files": files}
    (folder / "run.json").write_text(json.dumps(record))


def test_what_a_run_reads_is_not_deleted_by_it(tmp_path):
    """--overwrite deletes what the run before it made, also files that the new one does not write:
    comparisons of reward.py that --data names, a model in a round of cai.py that --init names."""
    record_with(tmp_path, ["comparisons.jsonl", "round2/rl/"])
    (tmp_path / "comparisons.jsonl").write_text("x")
    record_with(tmp_path / "round2/rl", ["answers.jsonl"])
    (tmp_path / "round2/rl/answers.jsonl").write_text("x")
    for name in ("comparisons.jsonl", "round2/rl", "round2/rl/answers.jsonl"):
        with pytest.raises(InputError, match=f"{name} is read by this run"):
            claim(tmp_path, ["log.jsonl"], [tmp_path / name])
    claim(tmp_path, ["log.jsonl"], [tmp_path.parent])


def test_a_script_that_outlived_cai_keeps_its_folder(tmp_path):
    """cai.py was killed, the sft.py that it had started was not: its folder is not deleted meanwhile."""
    for name in ("x", "y"):
        record_with(tmp_path / name, ["round1/sl/"], "cai")
        record_with(tmp_path / name / "round1/sl", ["log.jsonl"])
    handle = lock(tmp_path / "x/round1/sl")
    with pytest.raises(InputError, match="sl: another run is writing there"):
        claim(tmp_path / "x", ["round1/sl/"])
    os.close(handle)
    claim(tmp_path / "y", ["round1/sl/"])
    os.close(lock(tmp_path / "y/round1/sl"))       # and it is free for the next script


@dataclass
class ToolConfig(ToolFlags):
    out: str = ""
    overwrite: bool = False


def test_a_command_without_steps_replaces_its_files_only_when_asked(tmp_path, monkeypatch):
    """The same command again replaces them, each by a new one; other flags, another input and another stage
    need --overwrite. One that has written nothing leaves no run.json, by which a file that somebody puts
    there would be ours."""
    at_exit = []
    monkeypatch.setattr(folder_py.atexit, "register", lambda f, *args: at_exit.append((f, args)))
    monkeypatch.setattr(folder_py, "lock", lambda folder: os.open("/dev/null", os.O_RDONLY))
    out, prompts = tmp_path / "mine", tmp_path / "prompts.jsonl"
    prompts.write_text("1")

    def start(stage="best_of", **flags):
        folder_py.take(ToolConfig(out=str(out), **flags), stage, ["demos.jsonl"], ["", str(prompts)])
        return at_exit.pop()

    end, args = start()
    assert run_of(out)["files"] == ["demos.jsonl"]
    end(*args)
    assert run_of(out) == {}
    (out / "demos.jsonl").write_text("mine")
    with pytest.raises(InputError, match="demos.jsonl, which no run of ours made"):
        start()
    (out / "demos.jsonl").unlink()

    end, args = start()
    (out / "demos.jsonl").write_text("ours")
    end(*args)
    start()
    assert (out / "demos.jsonl").read_text() == "ours"
    for stage, flags in (("best_of", {"seed": 1}), ("critic_test", {})):
        with pytest.raises(InputError, match="holds a run of its own"):
            start(stage, **flags)
    prompts.write_text("2")
    with pytest.raises(InputError, match="prompts.jsonl has changed since"):
        start()
    start(overwrite=True)
    assert not (out / "demos.jsonl").exists()


def test_a_run_does_not_replace_what_a_tool_made(tmp_path):
    """critic.json of cai.py --critic_test, comparisons of a reward.py that was killed before its first
    checkpoint: another stage, or other flags, need --overwrite."""
    record_with(tmp_path, ["critic.json", "log.jsonl"], "critic_test")
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "critic.json").write_text("{}")
    with pytest.raises(InputError, match="critic_test made it"):
        Run(Config(out=str(tmp_path)), "sft").open_folder([], FILES)
    assert (tmp_path / "critic.json").exists()


def test_ctrl_c_before_the_first_step_costs_nothing(tmp_path, monkeypatch):
    """Models take a while to load, and whoever notices the wrong --out meanwhile keeps what is there. Where
    nothing is lost the run takes its step and saves, so that comparisons which took long are kept, too."""
    monkeypatch.setattr(Run, "catch_signals", lambda run: None)
    record_with(tmp_path, FILES)
    for name in ("result.json", "model.safetensors", "log.jsonl"):
        (tmp_path / name).write_text("{}")
    before = hashes(tmp_path)
    run = Run.open(Config(out=str(tmp_path), overwrite=True), "sft")
    run.stop(None, None)
    with pytest.raises(KeyboardInterrupt, match="before it replaced anything"):
        run.begin(5, None)
    (tmp_path / ".lock").unlink()
    assert hashes(tmp_path) == before

    run = Run.open(Config(out=str(tmp_path / "new")), "sft")
    run.stop(None, None)
    run.begin(5, None)
    assert run_of(tmp_path / "new") and run.is_asked_to_stop()


def test_comparisons_of_a_run_without_a_checkpoint(tmp_path, monkeypatch):
    """The same command has them; --overwrite, or edited code, has not: they are deleted."""
    monkeypatch.setattr(Run, "catch_signals", lambda run: None)
    monkeypatch.setattr(folder_py, "lock", lambda folder: None)      # this process has it several times
    own = ["comparisons.jsonl"]

    def opened(**flags):
        run = Run.open(RewardConfig(out=str(tmp_path), **flags), "reward", writes=own)
        had = run.has("comparisons.jsonl")
        run.make_room()
        assert (tmp_path / "comparisons.jsonl").exists() == had
        return had

    def left_behind():
        write(tmp_path / "comparisons.jsonl", [{}])
        write(tmp_path / "log.jsonl", [])
    assert not opened()
    left_behind()
    assert opened() and not (tmp_path / "log.jsonl").exists()
    assert not opened(overwrite=True)
    left_behind()
    with pytest.raises(InputError, match="--seed was 0, now 1"):
        opened(seed=1)
    monkeypatch.setattr("data.run.changed_code", lambda old, new: "reward.py")
    assert not opened()


def test_other_functions_of_a_file_and_other_addresses_are_other_flags(tmp_path):
    """But not the same files elsewhere."""
    (tmp_path / "mine.py").write_text("def brief(rows, texts): return [0] * len(texts)")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "mine.py", tmp_path / "elsewhere" / "mine.py")

    def record(**flags):
        return record_of(PPOConfig(**flags), "ppo", [x for x in flags.values() if type(x) is str], FILES)
    path = str(tmp_path / "mine.py")
    for was, now in ((f"{path}:brief", f"{path}:other"), ("hub/a,hub/b", "hub/c,hub/d"),
                     ("http://a:8000/v1", "http://b:9999/v1")):
        assert f"--reward was '{was}'" in folder_py.difference(record(reward=was), record(reward=now))
    assert folder_py.difference(record(data=path), record(data=str(tmp_path / "elsewhere" / "mine.py"))) == ""
    # A flag that one stage has and the other has not: data/process.py and reward.py are both "reward".
    old, new = record(lam=0.9), record()
    del new["flags"]["lam"]
    assert "--lam was 0.9" in folder_py.difference(old, new)


def test_somebodys_generation_config(tmp_path):
    """Every checkpoint has one: a run does not begin over somebody's, and deletes its own."""
    (tmp_path / "generation_config.json").write_text("mine")
    assert foreign(tmp_path, FILES) == ["generation_config.json"]
    record_with(tmp_path, [name for name in FILES if name != "generation_config.json"])     # of an older run
    assert foreign(tmp_path, FILES) == []


def test_somebodys_model_in_a_folder_that_a_run_lists(tmp_path):
    """run.json lists reward/ or round1/sl/, but no run of ours has written it yet, and the user's only copy
    of a model lies there: it would have been replaced, and deleted by --overwrite."""
    record = {"stage": "ppo", "config": {}, "flags": {}, "inputs": {}, "files": ["log.jsonl", "reward/"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "reward").mkdir()
    assert foreign(tmp_path, ["log.jsonl", "reward/"]) == []   # empty, as after a kill
    (tmp_path / "reward" / "notes.txt").write_text("mine")
    assert foreign(tmp_path, ["log.jsonl", "reward/"]) == []   # nothing that we would replace
    (tmp_path / "reward" / "model.safetensors").write_text("mine")
    for config in (None, '{"model_type": "llama"}', "not JSON"):
        if config:
            (tmp_path / "reward" / "config.json").write_text(config)
        found = ["reward/model.safetensors"] + ["reward/config.json"] * bool(config)
        assert foreign(tmp_path, ["log.jsonl", "reward/"]) == found
        with pytest.raises(InputError, match="reward/model.safetensors.*no run of ours made"):
            claim(tmp_path, ["log.jsonl", "reward/"])
        remove(tmp_path, ["reward/"])
        assert (tmp_path / "reward" / "model.safetensors").read_text() == "mine"

    # Ours: what ppo.py saves, also if that was cut off.
    (tmp_path / "reward" / ".commit").write_text("{}")
    assert foreign(tmp_path, ["reward/"]) == []
    (tmp_path / "reward" / ".commit").unlink()
    (tmp_path / "reward" / "config.json").write_text('{"reward_mean": 0.5}')
    assert foreign(tmp_path, ["reward/"]) == []
    remove(tmp_path, ["reward/"])
    assert [path.name for path in (tmp_path / "reward").iterdir()] == ["notes.txt"]


@needs_fork
def test_a_model_put_into_a_run_stays(suite, chain, tmp_path):
    """A PPO run that never wrote reward/, into which the user copied a model: neither the same command, nor a
    longer run or --overwrite touches it."""
    flags = ["ppo.py", "--init", chain / "sft", "--reward", "gold", "--iterations", 1, "--rollouts", 8,
             "--max_new", 8, "--out", tmp_path / "x"]
    suite.ok(*flags)
    shutil.copytree(chain / "base", tmp_path / "x" / "reward",
                    ignore=shutil.ignore_patterns("run.json", ".lock"))
    before = hashes(tmp_path)
    for more in ([], ["--overwrite"], ["--seed", 1, "--overwrite"]):
        fails(suite.run(*flags, *more), tmp_path / "x", "reward/model.safetensors", "no run of ours made")
        assert hashes(tmp_path) == before


@pytest.mark.parametrize("name", ["../diary", "/tmp/diary", "sl/../../diary", 3])
def test_a_run_json_cannot_list_what_lies_elsewhere(tmp_path, name):
    """A folder that somebody was sent, and --overwrite: no file outside of it is ours to delete."""
    record = {"stage": "sft", "config": {}, "flags": {}, "inputs": {}, "files": ["log.jsonl", name]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert run_of(tmp_path) == {} and foreign(tmp_path, ["log.jsonl"]) == ["run.json"]


# ------------------------------------------------------------------------------------------------------------
# Every program that writes.

PROGRAMS = {"data.pretrain": [], "sft.py": [], "reward.py": [], "ppo.py": [], "dpo.py": [],
            "data.process": ["--init", "{chain}/sft"],
            "cai.py": ["--init", "{chain}/sft", "--critic", "{chain}/base"],
            "data.evaluate": ["--models", "{chain}/base,{chain}/sft", "--prompts", "4", "--max_new", "8"]}


def command_for(program, chain):
    """The program and flags with which it would begin at once."""
    own = (links(program, chain) if program in ("data.pretrain", "sft.py", "reward.py", "ppo.py", "dpo.py")
           else [])
    return [program, *own, *[flag.format(chain=chain) for flag in PROGRAMS[program]]]


@needs_fork
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_leaves_foreign_files_alone(suite, chain, tmp_path, program):
    """A model, notes called like our files, a link, another program's run.json, a file: whatever --overwrite
    says, one sentence names them, and every byte stays."""
    mine = "result.json" if program == "data.evaluate" else "log.jsonl"
    shutil.copytree(chain / "base", tmp_path / "model", ignore=shutil.ignore_patterns("run.json", ".lock"))
    for name in ("notes", "linked", "other", "kind"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes" / mine).write_text("my diary")
    (tmp_path / "diary").write_text("my diary")
    (tmp_path / "linked" / mine).symlink_to(tmp_path / "diary")
    (tmp_path / "other" / "run.json").write_text('{"run": "of another program"}')
    (tmp_path / "kind" / mine).mkdir()
    (tmp_path / "file").write_text("my diary")
    before = hashes(tmp_path)
    named = {"model": "result.json" if program == "data.evaluate" else "model.safetensors", "notes": mine,
             "linked": mine, "other": "run.json", "kind": mine, "file": "is a file"}
    commands = []
    for name in named:
        commands.append([*command_for(program, chain), "--out", tmp_path / name])
        commands.append([*commands[-1], "--overwrite"])
    for i, r in enumerate(suite.run_all(commands, cwd=tmp_path)):
        name = list(named)[i // 2]
        fails(r, tmp_path / name, named[name], "choose another --out")
    assert hashes(tmp_path) == before


def test_a_run_that_wrote_nothing_owns_nothing(suite, chain, tmp_path):
    """It ends at a bad row; a model that somebody then puts into its folder is not replaced by the next
    try."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "rejectd": "Go away."}\n')
    # a plain process: the suite's forks end without what atexit holds
    command = [sys.executable, "dpo.py", "--init", chain / "sft", "--data", tmp_path / "rows.jsonl",
               "--out", tmp_path / "x"]
    r = subprocess.run(list(map(str, command)), cwd=suite.root, env=suite.env, capture_output=True, text=True)
    assert r.returncode and "rows.jsonl:1" in r.stderr and not (tmp_path / "x" / "run.json").exists()
    (tmp_path / "x" / "model.safetensors").write_text("my only copy")
    fails(suite.run(*command[1:]), tmp_path / "x", "model.safetensors", "choose another --out")
    assert (tmp_path / "x" / "model.safetensors").read_text() == "my only copy"


@needs_fork
@pytest.mark.parametrize("script, flag", [("sft.py", "--init"), ("reward.py", "--init"), ("dpo.py", "--init"),
                                          ("ppo.py", "--init"), ("ppo.py", "--reward")])
def test_out_is_what_the_run_reads(suite, chain, tmp_path, script, flag):
    """The user's only copy of a model, by its path, another path and a link; and a finished run of ours,
    which --overwrite would replace before it is read."""
    source = chain / ("reward" if flag == "--reward" else "sft")
    shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("run.json", ".lock"))
    shutil.copytree(source, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before, commands = hashes(tmp_path), []
    for read, out in (("model", "model"), ("model", "link"), ("link", "model"), ("model", "run/../model"),
                      ("run", "run")):
        commands.append([script, *links(script, chain), flag, tmp_path / read, "--out", tmp_path / out,
                         "--overwrite"])
    for r in suite.run_all(commands):
        fails(r, "is read by this run and would be replaced by it; choose another --out")
    assert hashes(tmp_path) == before


@needs_fork
def test_a_mistake_beside_overwrite_costs_nothing(suite, chain, tmp_path):
    """A mistyped model, which may be a name on the hub; a model of the wrong kind; a line of data that cannot
    be read; a context that is too short. The old run is there afterwards, byte for byte, and the right
    command replaces it."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Hi"\n')
    few = ["--prompts", 4]
    mistakes = [("data.pretrain", ["--length", 4096], "--length"), ("sft.py", ["--init", "oout/base"], "oout"),
                ("sft.py", ["--data", bad], "bad.jsonl"), ("reward.py", ["--init", "oout/sft"], "oout"),
                ("reward.py", ["--data", bad], "bad.jsonl"), ("reward.py", ["--policy", "oout/sft"], "oout"),
                ("reward.py", [*few, "--knows", 0.3, "--critique", chain / "reward"], "is a reward model"),
                ("reward.py", ["--init", chain / "reward"], "is a reward model"),
                ("reward.py", ["--max_new", 5000], "--max_new"),
                ("ppo.py", ["--reward", "oout/reward"], "oout"), ("ppo.py", ["--data", bad], "bad.jsonl"),
                ("dpo.py", ["--data", bad], "bad.jsonl"), ("data.process", ["--init", "oout/sft"], "oout"),
                ("cai.py", ["--init", "oout/sft", "--critic", chain / "base"], "oout"),
                ("cai.py", ["--init", chain / "sft", "--critic", "oout/base"], "oout")]
    commands = []
    for i, (script, flags, _) in enumerate(mistakes):
        out = tmp_path / f"{i}"
        if script in FOLDERS:
            shutil.copytree(chain / FOLDERS[script], out)
            flags = [*links(script, chain), *flags]
        else:
            record_with(out, ["comparisons.jsonl", "result.json", "round1/sl/"], "cai")
            record_with(out / "round1/sl", ["log.jsonl"])
            for name in ("comparisons.jsonl", "result.json", "round1/sl/log.jsonl"):
                (out / name).write_text("{}")
        commands.append([script, *flags, "--out", out, "--overwrite"])
    before = hashes(tmp_path)
    for r, (_, _, named) in zip(suite.run_all(commands, env={"HF_HUB_OFFLINE": "1"}), mistakes):
        fails(r, named)
    after = hashes(tmp_path)
    assert {path for path in after.keys() - before.keys() if path.name != ".lock"} == set()
    assert {path: after[path] for path in before} == before
    suite.ok("sft.py", *links("sft.py", chain), "--out", tmp_path / "1", "--overwrite", "--max_steps", 1)
    assert result_of(tmp_path / "1")["steps"] == 1


@needs_fork
def test_a_judge_of_two_policies_is_read_as_well(suite, chain, tmp_path):
    """implicit:POLICY:REFERENCE; and what a PPO run would write into a folder below its own."""
    shutil.copytree(chain / "dpo", tmp_path / "dpo")
    shutil.copytree(chain / "reward", tmp_path / "x" / "reward")
    before = hashes(tmp_path)
    flags = ["--init", chain / "sft", "--reward", f"implicit:{tmp_path / 'dpo'}:{chain / 'sft'}"]
    r = suite.run("ppo.py", *flags, "--out", tmp_path / "dpo", "--overwrite")
    fails(r, tmp_path / "dpo", "is read by this run")
    fails(suite.run("ppo.py", *links("ppo.py", chain), "--out", tmp_path / "x"), tmp_path / "x", "reward/")
    fails(suite.run("ppo.py", "--init", chain / "sft", "--reward", tmp_path / "x" / "reward",
                    "--out", tmp_path / "x"), "is read by this run")
    assert hashes(tmp_path) == before


@needs_fork
def test_an_evaluation_is_replaced_by_the_same_or_when_asked(suite, chain, tmp_path):
    flags = [*command_for("data.evaluate", chain), "--out", tmp_path / "e"]
    suite.ok(*flags)
    before = hashes(tmp_path)
    fails(suite.run(*flags, "--seed", 1), tmp_path / "e", "--seed was 0, now 1", "--overwrite")
    assert hashes(tmp_path) == before
    suite.ok(*flags)
    suite.ok(*flags, "--seed", 1, "--overwrite")
    assert result_of(tmp_path / "e")["seed"] == 1
    fails(suite.run(*command_for("data.evaluate", chain), "--out", chain / "ppo"), "ppo made it")
    before = hashes(chain / "dpo")
    fails(suite.run(*command_for("data.evaluate", chain), "--reference", chain / "dpo", "--out",
                    chain / "dpo", "--overwrite"), chain / "dpo", "is read by this run")
    assert hashes(chain / "dpo") == before


@needs_fork
def test_votes_are_never_lost(suite, chain, tmp_path):
    """A file of other rows is refused; a vote taken back leaves the bytes before it alone; two sessions never
    share."""
    flags = ["data/vote.py", "--policy", chain / "sft", "--reward", chain / "reward", "--max_new", 16,
             "--out", tmp_path]
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": "b", "source": "mine"}]
    before = write(tmp_path / "votes.jsonl", rows).read_bytes()
    path = {"PYTHONPATH": str(suite.root)}
    fails(suite.run(*flags, env=path), f"{tmp_path / 'votes.jsonl'}:1: no vote of this program")
    assert (tmp_path / "votes.jsonl").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "votes.jsonl").write_text("no line end")
    with pytest.raises(InputError, match="votes.jsonl:1: no vote"):
        vote.read_votes(tmp_path / "notes" / "votes.jsonl")
    assert (tmp_path / "notes" / "votes.jsonl").read_text() == "no line end"
    votes = [{"prompt": [{"role": "user", "content": f"{i}?"}], "chosen": "a", "rejected": "b", "label": 1.0}
             for i in range(3)]
    write(tmp_path / "votes.jsonl", votes)
    os.link(tmp_path / "votes.jsonl", tmp_path / "other_name")   # would be left behind by a file written anew
    r = suite.ok(*flags, stdin="u\nq\n", env=path)
    assert (tmp_path / "votes.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in votes[:2])
    assert (tmp_path / "other_name").samefile(tmp_path / "votes.jsonl") and "2 votes" in r.out
    with open(tmp_path / ".lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        fails(suite.run(*flags, env=path), "another run is writing there")


def test_the_page_of_somebody_else_is_left_alone(tmp_path):
    """No page where another index.html stands, a link included; ours is written anew."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<title>My holidays</title>")
    with pytest.raises(InputError, match="no page of ours"):
        page.write_page(tmp_path / "site")
    assert (tmp_path / "site" / "index.html").read_text() == "<title>My holidays</title>"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "index.html").symlink_to(tmp_path / "site" / "index.html")
    with pytest.raises(InputError):
        page.write_page(tmp_path / "linked")
    with pytest.raises(InputError, match="no page of ours"):
        page.write(page.TEMPLATE, "no template any more")
    (tmp_path / "out").mkdir()
    first = page.write_page(tmp_path / "out").read_bytes()
    assert page.write_page(tmp_path / "out").read_bytes() == first


def test_the_world_says_what_it_would_replace(tmp_path, monkeypatch, capsys):
    """A file of it that somebody changed stays, unless --overwrite says otherwise."""
    def small(folder):
        (folder / "demos.jsonl").write_text("made\n")
        (folder / "corpus.txt").write_text("made\n")
    monkeypatch.setattr(build, "build", small)
    monkeypatch.setattr(build, "TINY", tmp_path)
    (tmp_path / "demos.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit, match="demos.jsonl would be replaced by others; --overwrite"):
        build.main([])
    assert (tmp_path / "demos.jsonl").read_text() == "mine\n" and not (tmp_path / "corpus.txt").exists()
    build.main(["--overwrite"])
    assert (tmp_path / "demos.jsonl").read_text() == "made\n"
    assert [line.split(", ")[1] for line in capsys.readouterr().out.splitlines()] == ["new", "replaced"]
    build.main([])
    assert capsys.readouterr().out.count("as it was") == 2


@needs_fork
def test_backups_by_hard_links_keep_their_bytes(suite, chain, tmp_path):
    """`cp -al out backup`, and the run goes on: what the backup holds stays."""
    flags = ["sft.py", "--init", chain / "base", "--max_new", 8, "--save_every", 1, "--out", tmp_path / "x"]
    suite.ok(*flags, "--max_steps", 1)
    shutil.copytree(tmp_path / "x", tmp_path / "backup", copy_function=os.link)
    before = snapshot(tmp_path / "backup")
    suite.ok(*flags, "--max_steps", 2)
    assert snapshot(tmp_path / "backup") == before and len(log_of(tmp_path / "x")) == 2


# ------------------------------------------------------------------------------------------------------------
# What a run that goes on notices: its code, moved inputs, missing ones.


def test_meaning_is_what_counts(tmp_path):
    """A comment, a docstring or a line break is no other program; a number is."""
    def of(text):
        (tmp_path / "x.py").write_text(text)
        return meaning(tmp_path / "x.py")
    plain = of("def f(x):\n    return x + 1\n")
    assert (of('"""New."""\n# new\ndef f(x):\n    """Says so."""\n\n    return (x\n            + 1)  # new\n')
            == plain)
    assert of("def f(x):\n    return x + 2\n") != plain
    assert of('class A:\n    """Only this."""\n') == of('class A:\n    """Or this."""\n')


def test_a_link_whose_code_has_changed_is_named(tmp_path, monkeypatch, capsys):
    """Otherwise one edits sft.py, starts ppo.py, and a policy of the old code is trained on without a
    word."""
    (tmp_path / "data").mkdir()
    (tmp_path / "out" / "sft").mkdir(parents=True)
    for name in ("sft.py", "data/a.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(folder_py, "ROOT", tmp_path)
    names = {name: meaning(tmp_path / name) for name in ("sft.py", "data/a.py")}
    record = {"stage": "sft", "config": {}, "flags": {}, "inputs": {}, "files": [],
              "code": {"python": python(), **names}}

    def said():
        capsys.readouterr()
        need(SimpleNamespace(out=str(tmp_path / "out" / "ppo")), "sft")
        return capsys.readouterr().out

    write_atomic(tmp_path / "out" / "sft" / "run.json", json.dumps(record).encode())
    for name in ("config.json", "result.json"):
        write_atomic(tmp_path / "out" / "sft" / name, b"{}")
    (tmp_path / "ppo.py").write_text("x = 2\n")                     # no file of that run
    (tmp_path / "sft.py").write_text("x = 1      # a comment\n")
    assert said() == ""
    (tmp_path / "sft.py").write_text("x = 2\n")
    assert f"{tmp_path / 'out' / 'sft'} was made before sft.py changed; python sft.py --overwrite" in said()
    (tmp_path / "data/a.py").unlink()
    assert "before data/a.py, sft.py changed" in said()
    record["code"]["python"] = "3.9"   # whose syntax trees are others: nobody can tell
    assert edited_since(record) == edited_since({}) == ""


def test_the_code_of_a_run_is_its_own(tmp_path):
    """The scripts and modules that it has imported, and nothing of torch or of the tests."""
    names = set(code())
    assert {"python", "model.py", "sft.py", "data/run.py", "data/world/judge.py"} <= names
    assert all(name == "python" or "/" not in name or name.startswith("data/") for name in names)


@needs_fork
def test_edited_code_is_noticed(suite, chain, tmp_path):
    """A finished run says that its script has changed since; an unfinished one is not continued without a
    word."""
    root = tmp_path / "suite"
    shutil.copytree(suite.root, root)
    flags = [root / "sft.py", "--init", chain / "base", "--max_new", 8, "--batch_size", 8, "--warmup", 2,
             "--dtype", "float32", "--out", tmp_path / "x"]
    suite.ok(*flags, "--max_steps", 2)
    text = (root / "sft.py").read_text()
    (root / "sft.py").write_text(text.replace('"""Supervised', '"""A comment.\n\nSupervised')
                                 + "# and another\n")
    r = suite.ok(*flags, "--max_steps", 2)
    assert "is finished" in r.out and "changed since" not in r.out
    suite.ok(*flags, "--max_steps", 3)                               # goes on
    (root / "sft.py").write_text(text.replace("total += loss.detach()", "total += 2 * loss.detach()"))
    r = suite.ok(*flags, "--max_steps", 3)
    assert "sft.py changed since: --overwrite or another --out runs it anew" in r.out
    before = snapshot(tmp_path / "x")
    fails(suite.run(*flags, "--max_steps", 4), tmp_path / "x", "sft.py changed since its run began",
          "--overwrite")
    assert snapshot(tmp_path / "x") == before
    record = json.loads((tmp_path / "x" / "run.json").read_text())
    del record["code"]
    (tmp_path / "x" / "run.json").write_text(json.dumps(record))
    assert "going on after step 3" in suite.ok(*flags, "--max_steps", 4).out
    assert "sft.py" in run_of(tmp_path / "x")["code"]


def test_what_a_finished_run_says_of_itself(tmp_path, capsys):
    """One that --max_steps ended was "finished" without a word of how it goes on, and one of unknown code
    without a word of that."""
    cfg = Config(out=str(tmp_path), max_steps=3)
    record = record_of(cfg, "sft", [], [])
    unknown = {name: value for name, value in record.items() if name != "code"}

    def said(old, steps, max_steps):
        """By Run.check_that_it_goes_on."""
        result = {"seconds": 23.0, "steps": steps, "planned": 30, "config": {"max_steps": max_steps},
                  "columns": {"x": {}}}
        (tmp_path / "result.json").write_text(json.dumps(result))
        with pytest.raises(SystemExit):
            Run(cfg, "sft").check_that_it_goes_on(old, record)
        return capsys.readouterr().out
    cut, whole, of_unknown_code = said(record, 3, 3), said(record, 30, 0), said(unknown, 30, 0)
    assert "is finished, but cut short after 3 of 30 steps: a run with the same flags took 23 s" in cut
    assert "the same command with a larger --max_steps, or without it, goes on" in cut
    assert "is finished: a run" in whole and "goes on" not in whole
    assert "what code made it was not recorded" in of_unknown_code and "recorded" not in cut + whole


@needs_fork
def test_a_model_that_moved_is_the_same_model(suite, chain, tmp_path):
    """An absolute --init whose folder has another name now: by its content, not by its path."""
    flags = ["sft.py", "--max_new", 8, "--batch_size", 8, "--warmup", 2, "--out", tmp_path / "x"]
    shutil.copytree(chain / "base", tmp_path / "old")
    suite.ok(*flags, "--init", tmp_path / "old", "--max_steps", 1)
    (tmp_path / "old").rename(tmp_path / "new")
    assert "going on after step 1" in suite.ok(*flags, "--init", tmp_path / "new", "--max_steps", 2).out
    fails(suite.run(*flags, "--init", chain / "sft", "--max_steps", 3), f"--init was '{tmp_path / 'new'}'")


@needs_fork
def test_missing_inputs_are_said_before_folders_are_compared(suite, chain, tmp_path):
    """A typo in --init is no other run."""
    flags = ["sft.py", "--max_new", 8, "--out", tmp_path / "x"]
    suite.ok(*flags, "--init", chain / "base", "--max_steps", 1)
    fails(suite.run(*flags, "--init", chain / "bsae"), f"{chain / 'bsae'}: no such file or folder")
    fails(suite.run(*flags, "--init", chain / "base", "--data", "nosuch.jsonl"), "nosuch.jsonl: no such file")
    assert missing(["gpt2", "HuggingFaceTB/SmolLM2-135M", "gold", "rewards:words",
                    "http://localhost:8000/v1"]) is None
    assert missing([f"implicit:{chain / 'dpo'}:{chain / 'sft'}", tmp_path]) is None
    assert missing([f"implicit:{chain / 'dpo'}:{chain / 'nosuch'}"]) == chain / "nosuch"


def test_inspect_takes_the_flags_of_its_run(tmp_path, monkeypatch):
    """All but where it is and where it runs; what the command line says counts more."""
    kept = {"lr": 0.5, "advantage": "rloo", "seed": 3, "device": "cuda", "inspect": False, "of_yesterday": 1}
    record = {"stage": "ppo", "config": kept, "flags": {}, "inputs": {}, "files": []}
    (tmp_path / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--inspect", "--seed", "0", "--out", str(tmp_path)])
    cfg = flags_of_its_run(PPOConfig(inspect=True, out=str(tmp_path)))
    told = (cfg.lr, cfg.advantage, cfg.seed, cfg.device, cfg.inspect, cfg.out)
    assert told == (0.5, "rloo", 0, "", True, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--inspect"])
    cfg = flags_of_its_run(PPOConfig(inspect=True, out=str(tmp_path / "nosuch")))
    assert cfg == PPOConfig(inspect=True, out=str(tmp_path / "nosuch"))


def test_next_speaks_of_this_run(tmp_path, monkeypatch):
    """The default chain by its names; a run of one's own with its folders; no tiny world after data of one's
    own."""
    monkeypatch.chdir(tmp_path)
    assert next_commands("sft", Config(out="out/sft")) == ["python -m data.chat out/sft", "python reward.py",
                                                           "python dpo.py"]
    assert next_commands("sft", Config(out="out/mine/sft", data="a.jsonl")) == [
        "python -m data.chat out/mine/sft",
        "python reward.py --init out/mine/sft --data COMPARISONS --out out/mine/reward_sft",
        "python dpo.py --init out/mine/sft --data COMPARISONS --out out/mine/dpo_sft"]
    assert next_commands("ppo", PPOConfig(out="out/hacked")) == ["python -m data.chat out/hacked",
                                                                 "python ppo.py --inspect --out out/hacked"]
    after = next_commands("dpo", DPOConfig(out="out/ipo", loss="ipo"))
    assert ("python dpo.py --loss simpo --out out/simpo_ipo --init out/sft" in after
            and " ipo --out" not in str(after))
    after = next_commands("dpo", DPOConfig(out="my dpo", init="my model", data="p.jsonl"))
    assert after == ["python -m data.chat 'my dpo'",
                     "python dpo.py --loss ipo --out 'ipo_my dpo' --init 'my model' --data p.jsonl"]


def test_next_goes_where_no_other_run_is(tmp_path, monkeypatch):
    """The default folder of a command may hold another run, and the command would be refused: a reward model
    of a biased annotator got the out/ppo of the honest one, and every comparison with SFT the same
    out/evaluate."""
    monkeypatch.chdir(tmp_path)
    assert next_commands("reward", RewardConfig(out="out/reward"))[0] == "python ppo.py"
    first = "python ppo.py --init out/sft --reward"
    assert (next_commands("reward", RewardConfig(out="out/short"))[0]
            == f"{first} out/short --out out/ppo_short")
    assert next_commands("reward", RewardConfig(out="out/fooled", bias_confidence=1.0))[:2] == [
        f"{first} out/fooled --out out/ppo_fooled --relabel 0",
        "python -m data.vote --policy out/sft --reward out/fooled"]
    (tmp_path / "out/sft").mkdir(parents=True)
    (tmp_path / "out/sft/result.json").write_text("{\"after\": {}}")
    after = next_commands("ppo", PPOConfig(out="out/short"))
    assert after[-1] == "python -m data.evaluate out/sft out/short --out out/evaluate_short"


def test_nothing_is_left_open(tmp_path):
    """The lock is held to the end of the process, and no warning says so."""
    program = f"from data.folder import lock; lock({str(tmp_path)!r})"
    r = subprocess.run([sys.executable, "-W", "always", "-X", "dev", "-c", program], capture_output=True,
                       text=True, cwd=Path(folder_py.__file__).parents[1])
    assert r.returncode == 0 and r.stderr == "", r.stderr
