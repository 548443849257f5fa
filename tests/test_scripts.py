"""The scripts as a user meets them: each runs as a process of its own (tests/conftest.py) on a slice of the
world."""
import ast
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tokenize
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch

from conftest import CHAIN, ROOT, SEED, copy_suite
from data import (InputError, chain as chain_py, flags as flags_py, folder as folder_py, read_jsonl,
                  run as run_py, world)
from data.chain import need
from data.files.checkpoint import load, load_state, save
from data.flags import CLIPS, MAY_BE_0, SHARES, parse_flags
from data.rewards import Scorer
from data.files.safetensors import read_safetensors
from data.files.tokenizer import Tokenizer, tokenizer_from_json, tokenizer_to_json
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")
SCRIPTS = ["data.pretrain", "sft.py", "reward.py", "ppo.py", "dpo.py"]
FOLDERS = {"data.pretrain": "base", "sft.py": "sft", "reward.py": "reward", "ppo.py": "ppo", "dpo.py": "dpo"}
TIMES = ("tok_s", "t_gen", "t_score", "t_train")


def log_of(folder):
    """The rows of log.jsonl without what a clock measured. JSON has no NaN: one is an error here."""
    def constant(name):
        raise ValueError(f"{name} is not JSON")
    rows = [json.loads(line, parse_constant=constant)
            for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def result_of(folder):
    text = (folder / "result.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in result.json"))


def same(a, b):
    """Equal bits in the weights, equal numbers in the log."""
    assert log_of(a) == log_of(b)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def snapshot(folder):
    """{path: bytes} of all files in a folder, and below."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def module_of(script):
    """The module of "sft.py" or "data.pretrain"."""
    return import_module(script.removesuffix(".py"))


def fails(r, *words):
    """One sentence, no traceback, exit code not 0."""
    assert r.rc not in (0, None) and r.rc > 0, r
    assert "Traceback" not in r.err and "Warning" not in r.err, r.err
    assert re.fullmatch(r"(.*\w: )?error: \S.*\n", r.err), r.err
    for word in words:
        assert str(word) in r.err, f"{word!r} is not in: {r.err}"


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def user(text):
    return [{"role": "user", "content": text}]


# ------------------------------------------------------------------------------------------------------------
# 1. The chain.


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_stage_leaves_its_files(chain, script):
    folder, stage = chain / FOLDERS[script], script.removesuffix(".py").removeprefix("data.")
    n = {"pretrain": 60, "sft": 30, "reward": 4, "ppo": 3, "dpo": 3}[stage]
    assert [row["step"] for row in log_of(folder)] == list(range(1, n + 1))
    result = result_of(folder)
    assert set(result) == {"stage", "seed", "config", "seconds", "device", "tokens_per_second", "steps",
                           "planned", "given", "before", "after", "columns"}
    assert (result["stage"], result["seed"], result["config"]["out"]) == (stage, SEED, str(folder))
    assert result["steps"] == n <= result["planned"]
    assert "beta" not in result["given"] and ("epochs" in result["given"]) == (stage in ("reward", "dpo"))
    assert set(result["config"]) == {f.name for f in fields(module_of(script).Config)}
    told = json.loads((folder / "run.json").read_text())
    assert ((told["stage"], told["config"]) == (stage, result["config"])
            and "none" not in told["inputs"].values())
    wanted = {"pretrain": {"bits_per_byte"},
              "sft": {"gold", "helpful", "harmless", "honest", "loss", "length", "eos_rate"},
              "reward": {"loss", "accuracy"},
              "ppo": {"gold", "helpful", "harmless", "honest", "length", "eos_rate"},
              "dpo": {"gold", "loss", "accuracy", "length", "eos_rate"}}[stage]
    assert wanted <= set(result["before"]) and wanted <= set(result["after"])
    assert all(isinstance(v, (int, float)) for part in ("before", "after") for v in result[part].values())
    assert (folder / "samples.txt").exists() and "->" in (folder / "samples.txt").read_text()
    assert {"config.json", "tokenizer.json", "state.pt"} <= {p.name for p in folder.iterdir()}
    assert ([p.name for p in folder.iterdir() if p.name.startswith(".") or p.name.endswith(".new")]
            == [".lock"])
    answers = read_jsonl(folder / "answers.jsonl")
    assert len(answers) == (0 if stage == "reward" else 24)
    for row in answers:
        assert (isinstance(row["before"]["answer"], str) and row["family"] in row["after"]
                and "gold" in row["after"])
        assert ("reward" in row["before"] and "reward" in row["after"]) == (stage == "ppo")
    gpt, tok = load(folder, head="score" if stage == "reward" else "none")
    assert gpt.cfg.scalar_head == (stage == "reward") and tok.vocab_size == 1024
    assert all(p.isfinite().all() for p in gpt.parameters())


def test_training_trains(chain):
    """Each stage moved the weights it was given, and the losses of the first two fell."""
    base, sft, ppo = (read_safetensors(chain / name / "model.safetensors") for name in ("base", "sft", "ppo"))
    key = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(base[key], sft[key]) and not torch.equal(sft[key], ppo[key])
    for name, metric in (("base", "bits_per_byte"), ("sft", "loss")):
        assert result_of(chain / name)["after"][metric] < result_of(chain / name)["before"][metric]
    before, after = (read_safetensors(chain / name / "model.safetensors")
                     for name in ("reward", "ppo/reward"))
    # it learned from new ones
    assert before.keys() == after.keys() and not torch.equal(before[key], after[key])
    assert all("rm_accuracy" in row for row in log_of(chain / "ppo"))


def test_one_model_has_one_gold_number(chain):
    """The same prompts, draws and lengths, whoever measures: sft.py at its end, ppo.py and dpo.py at their
    start."""
    sft = result_of(chain / "sft")["after"]
    for name in ("ppo", "dpo"):
        before, columns = result_of(chain / name)["before"], result_of(chain / name)["columns"]
        assert {k: v for k, v in sft.items() if k in before and k != "loss"}.items() <= before.items()
        assert list(columns) == ["base", "SFT", name.upper()]
        base = result_of(chain / "base")["after"]
        assert columns["base"]["length"] == base["length"] and columns["base"]["gold"] == base["gold"]
        assert "loss" not in columns[name.upper()]           # losses of different kinds are not comparable


def test_ppo_makes_what_is_missing(fresh_clone):
    """Down to the base model, in this order; nothing goes wrong on the way."""
    process, folder = fresh_clone
    assert process.wait(300) == 0, (folder / "log").read_text()[-999:]
    out = (folder / "log").read_text()
    assert re.search(r"^to do: base \(\d+ s\), sft \(\d+ s\), reward \(\d+ s\), then ppo \(\d+ s\)$", out,
                     re.M)
    assert re.findall(r"^(\d/4 \w+)", out, re.M) == ["1/4 base", "2/4 sft", "3/4 reward", "4/4 ppo"]
    assert not re.search("error:|Error|Warning|Traceback", out), out
    done = [(folder / "x" / name / "result.json").stat().st_mtime_ns
            for name in ("base", "sft", "reward", "ppo")]
    assert done == sorted(done)
    for name in ("base", "sft", "ppo"):
        load(folder / "x" / name)
    load(folder / "x" / "reward", head="score")
    assert (folder / "x" / "index.html").exists()


RUN_JSON = '{"stage": "sft", "config": {}, "flags": {}, "inputs": {}, "files": []}'


@pytest.fixture
def link(tmp_path, monkeypatch):
    """link(returncode) -> (the Config of a run in out/mine, the list of commands that need() runs, which end
    so)."""
    commands = []

    def get(code):
        def pretend(command, env):
            commands.append(command)
            out = Path(command[command.index("--out") + 1])
            out.mkdir(exist_ok=True)
            (out / "result.json").write_text('{"after": {"gold": 0.25}}')
            return SimpleNamespace(returncode=code, wait=lambda: code)
        monkeypatch.setattr(chain_py.subprocess, "Popen", pretend)
        out = str(tmp_path / "mine" / "x")      # what is in mine/ starts from the links beside mine/
        return SimpleNamespace(out=out, seed=7, dtype="bfloat16", device="cpu"), commands
    return get


@pytest.mark.parametrize("there, runs", [((), True), (("config.json", "run.json"), True),
                                         (("config.json",), False),
                                         (("config.json", "run.json", "result.json"), False)])
def test_need(tmp_path, link, capsys, there, runs):
    """A link is made if it is missing, finished if it was stopped half way, left alone if it is whole or not
    ours."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").touch()
    (tmp_path / "sft").mkdir()
    for name in there:
        (tmp_path / "sft" / name).write_text(RUN_JSON)
    cfg, commands = link(0)
    assert need(cfg, "sft") == str(tmp_path / "sft")
    want = f"{chain_py.ROOT / 'sft.py'} --out {tmp_path / 'sft'} --seed 7 --dtype bfloat16 --device cpu"
    assert [c[1:] for c in commands] == [want.split()] * runs
    # Of one that is there, and ours, it is said that nobody knows by what code it was made.
    assert ("what code made it was not recorded" in capsys.readouterr().out) == ("run.json" in there)
    cfg, _ = link(1)
    if runs:
        (tmp_path / "sft" / "result.json").unlink()
    with pytest.raises(InputError, match="sft.py failed") if runs else nullcontext():
        need(cfg, "sft")


def test_need_of_a_whole_chain(tmp_path, link, capsys):
    """Each link once, after those it starts from; one that was made with flags of its own is named."""
    cfg, commands = link(0)
    assert need(cfg, "reward") == str(tmp_path / "reward")
    made = [command[command.index("--out") + 1] for command in commands]
    assert made == [str(tmp_path / name) for name in ("base", "sft", "reward")]
    assert commands[0][1:3] == ["-m", "data.pretrain"]
    out = capsys.readouterr().out
    assert ("flags of its own" not in out
            and all(f"{name}: gold 0.25" in out for name in ("base", "sft", "reward")))
    (tmp_path / "sft" / "config.json").touch()
    record = json.loads(RUN_JSON) | {"config": {"data": "mine.jsonl", "init": ""}}
    (tmp_path / "sft" / "run.json").write_text(json.dumps(record))
    assert need(cfg, "sft") == str(tmp_path / "sft") and len(commands) == 3
    assert f"{tmp_path / 'sft'} was made with flags of its own, from mine.jsonl" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# 2. The command line.


SHARED = "The run itself (the same in every script)"


def groups_of(script):
    """{heading: {field: its comment, over all its lines}} of a script's Config, what all scripts share last,
    read without the code under test."""
    out, seen = {}, set()
    own = script.removesuffix(".py").replace(".", "/") + ".py"
    parts = [(own, "class Config")]
    text = (ROOT / own).read_text()
    if "class Config(RunFlags):" in text:
        parts.append(("data/flags.py", "class RunFlags"))
    if "class Config(RunFlags):" in text or "class Config(ToolFlags):" in text:
        parts.append(("data/flags.py", "class ToolFlags"))
    for path, start in parts:
        lines = iter((ROOT / path).read_text().splitlines())
        while not next(lines).startswith(start):
            pass
        next(lines)                                                  # its docstring
        heading, name = None, None
        for line in lines:
            if found := re.match(r"    # (.*)", line):
                heading = out.setdefault(found[1], {})
            elif found := re.match(r"    (\w+): [^#]*# *(.*)", line):
                name = found[1] if found[1] not in seen else None    # else a script has its own default
                if name:
                    seen.add(name)
                    heading[name] = found[2]
            elif found := re.match(r" +# *(.*)", line):
                if name:
                    heading[name] += " " + found[1]
            elif line.strip():
                break
    return out | {SHARED: out.pop(SHARED)} if SHARED in out else out


@pytest.mark.parametrize("script", [*SCRIPTS, "cai.py", "data.chat", "data.vote", "data.evaluate",
                                    "data.best_of"])
def test_help_lists_every_field_with_its_comment(suite, script):
    """In groups under headings, those of all scripts last."""
    r = suite.run(script, "--help")
    assert r.rc == 0 and r.err == ""
    shown, module, groups = " ".join(r.out.split()), module_of(script), groups_of(script)
    assert " ".join(module.__doc__.split()) in shown
    at = [r.out.index(f"\n{heading}:\n") for heading in groups]
    assert at == sorted(at)
    by_name, n_fields = {f.name: f for f in fields(module.Config)}, 0
    for (heading, comments), start, end in zip(groups.items(), at, [*at[1:], None]):
        part = r.out[start:end]
        assert re.findall(r"^  --(\w+) ", part, re.M) == list(comments), heading
        for name, comment in comments.items():
            f, n_fields = by_name[name], n_fields + 1
            default = "" if f.default == "" else f" (default {f.default})"
            value = "|".join(getattr(f.type, "__args__", ())) or r"\S+"
            text = re.escape(comment + default)
            assert re.search(rf" --{name} \[?{value}\]? " + text, " ".join(part.split())), name
    assert n_fields == len(by_name)
    if script in [*SCRIPTS, "cai.py"]:
        assert list(groups)[-1] == SHARED and len(groups) >= 3
        assert {"seed", "max_steps", "overwrite", "device", "dtype"} <= set(groups[SHARED])


BAD_FLAGS = [("--learning_rate 1", "--learning_rate"), ("--max_step 3", "--max_step"), ("--lr abc", "--lr"),
             ("--lr nan", "--lr"), ("--lr=-1", "--lr"), ("--lr inf", "--lr"), ("--seed 1.5", "--seed"),
             ("--max_steps many", "--max_steps"), ("--resume", "unknown argument --resume"),
             ("--dtype half", "--dtype"), ("--lr", "--lr"), ("--save_every 0", "--save_every"),
             ("--out", "--out"), ("stray", "stray"), ("--max_step 3", "did you mean --max_steps?"),
             ("--grad-clip=1", "did you mean --grad_clip?"),
             ("--overwrite perhaps", "--overwrite"), ("--fsdp", "unknown argument --fsdp")]
OWN_FLAGS = {"data.pretrain": [("--size huge", "--size"), ("--steps 1.5", "--steps"),
                               ("--steps 0", "--steps")],
             "sft.py": [("--batch_size 0", "--batch_size"), ("--held_out 1.5", "--held_out"),
                        ("--epochs -1", "--epochs")],
             "reward.py": [("--prompts 0", "--prompts"), ("--max_new 0", "--max_new"),
                           ("--agreement 2", "--agreement")],
             "dpo.py": [("--loss dppo", "--loss"), ("--label_smoothing 1.5", "--label_smoothing"),
                        ("--beta=-1", "--beta"), ("--online_steps 0", "--online_steps"),
                        ("--sft_coeff 1", "did you mean --sft_coef?")],
             "ppo.py": [("--advantage sarsa", "--advantage"), ("--ensemble max", "--ensemble"),
                        ("--rollouts 0", "--rollouts"),
                        ("--iterations 1e3", "--iterations"), ("--lam 1.1", "--lam"),
                        ("--clip=-0.1", "--clip"), ("--klcoef 1", "did you mean --kl_coef?")]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_flags_are_refused(suite, tmp_path, script, capsys):
    """In one line on stderr, before anything is made; a few of them by the program itself."""
    cases = BAD_FLAGS + OWN_FLAGS[script]
    commands = [[script, *flags.split()] if i % 2 else [script, "--out", tmp_path / "x" / "y", *flags.split()]
                for i, (flags, _) in enumerate(cases)]
    few = slice(SCRIPTS.index(script), None, len(SCRIPTS))
    for (flags, name), r in zip(cases[few], suite.run_all(commands[few], cwd=tmp_path), strict=True):
        assert r.rc == 2, flags
        fails(r, name)
    assert list(tmp_path.iterdir()) == []
    for (flags, name), (_, *args) in zip(cases, commands):
        with pytest.raises(SystemExit) as e:
            parse_flags(module_of(script).Config, "", [str(arg) for arg in args])
        fails(SimpleNamespace(rc=e.value.code, err=capsys.readouterr().err), name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_its_range(script, capsys):
    """0 and negative numbers for every flag: either the Config holds them, or the message names the flag."""
    Config = module_of(script).Config

    def parse(*argv):
        try:
            return parse_flags(Config, "", argv)
        except SystemExit as e:
            assert e.code == 2 and f"--{argv[0][2:].split('=')[0]}:" in capsys.readouterr().err, argv
    for f in fields(Config):
        if f.type in (int, float):
            free = f.name.startswith("bias_")
            assert (parse(f"--{f.name}=-1") is not None) == free, f.name
            may_be_0 = f.name in MAY_BE_0 if f.type is int else f.name not in CLIPS
            assert (parse(f"--{f.name}=0") is not None) == may_be_0, f.name
            assert (parse(f"--{f.name}=3") is not None) == (f.name not in SHARES), f.name
        more = str(f.default + 1) if f.type is int else ""
        value = {bool: "true", int: more, float: "0.375", str: "a=b c"}.get(f.type)
        value = value or [v for v in f.type.__args__ if v != f.default][0]
        assert parse(f"--{f.name}={value}") == parse(f"--{f.name}", value) != Config(), f.name


# ------------------------------------------------------------------------------------------------------------
# 3 and 4. --max_steps, going on, --seed.

TRAIN = {   # flags of a short run, its length in steps, and where it is cut
    "data.pretrain": (["--steps", 7, "--warmup", 2, "--length", 64], 7, 3),
    "sft.py": (["--batch_size", 8, "--warmup", 2, "--max_new", 8], 6, 2),
    "reward.py": (["--prompts", 40, "--epochs", 9, "--batch_size", 4, "--micro_batch", 3, "--warmup", 2,
                   "--held_out", 0.3, "--max_new", 16, "--bias_length", 0.2], 5, 2),
    "dpo.py": (["--epochs", 9, "--batch_size", 8, "--micro_batch", 3, "--warmup", 2, "--max_new", 8], 6, 2),
    "ppo.py": (["--iterations", 5, "--rollouts", 24, "--minibatches", 2, "--value_warmup", 1, "--relabel", 2,
                "--max_new", 12, "--epochs", 2], 5, 3)}


def links(script, chain):
    return {"data.pretrain": [], "sft.py": ["--init", chain / "base"], "reward.py": ["--init", chain / "sft"],
            "ppo.py": ["--init", chain / "sft", "--reward", chain / "reward"],
            "dpo.py": ["--init", chain / "sft", "--data", chain / "reward" / "comparisons.jsonl"]}[script]


WHOLE = [(script, "float32") for script in SCRIPTS] + [("data.pretrain", "bfloat16"), ("ppo.py", "bfloat16")]


def steps_of(script, dtype):
    """The length of a short run, and where it is cut; bf16 is slow where it is emulated."""
    return TRAIN[script][1:] if dtype == "float32" else (3, 2)


def whole_and_cut(suite, chain, folder, script, dtype):
    """A run of n steps, one that is stopped after k of them, and one of two steps with another seed; returns
    their flags."""
    n, k = steps_of(script, dtype)
    flags = [*TRAIN[script][0], *links(script, chain), "--dtype", dtype]
    jobs = [suite.start(script, *flags, "--out", folder / "whole", "--max_steps", n),
            suite.start_and_stop(k, script, *flags, "--out", folder / "cut", "--max_steps", n),
            suite.start(script, *flags, "--out", folder / "other", "--max_steps", 2, "--seed", 1)]
    return flags, [suite.finish(job) for job in jobs]


@pytest.mark.parametrize("script, dtype", WHOLE)
def test_resume_equals_a_run_without_a_break(suite, early, script, dtype):
    """And the seed decides: the same one gives the same steps in another process, another one none of
    them."""
    path, (flags, results) = early
    folder, cut, other, (n, k) = path / "whole", path / "cut", path / "other", steps_of(script, dtype)
    whole, stopped, short = results
    assert [r.rc for r in results] == [0, 1, 0] and whole.err == short.err == "", results
    assert f"interrupted after step {k}, saved in {cut}" in stopped.err
    assert len(log_of(folder)) == n and len(log_of(cut)) == k and log_of(cut) == log_of(folder)[:k]
    assert len(log_of(other)) == result_of(other)["config"]["max_steps"] == 2   # early, but cleanly
    assert all(a != b for a, b in zip(log_of(other), log_of(folder)[:2], strict=True))
    assert (cut / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
    r = suite.ok(script, *flags, "--out", cut, "--max_steps", n)
    assert f"{cut}: going on after step {k}\n" in r.out
    assert f" {k}/{n} " not in r.out and f" {n}/{n} " in r.out       # the first steps were not done again
    same(folder, cut)
    if script == "ppo.py":
        relabelled = [i for i, row in enumerate(log_of(folder)) if "rm_loss" in row]
        assert relabelled == [i for i in (1, 3) if i < n]            # in fp32 before and after the cut
        a, b = (read_safetensors(x / "reward" / "model.safetensors") for x in (folder, cut))
        assert all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------
# 5. Bad input.


def other_tokenizer(folder, extra=0):
    """A tokenizer.json like ours in folder, but with another last merge and `extra` more merges."""
    tok = tokenizer_from_json(folder / "tokenizer.json")
    ranks = dict(sorted(tok.enc._mergeable_ranks.items(), key=lambda item: item[1]))
    ranks.pop(list(ranks)[-1])
    for i in range(extra + 1):
        ranks[bytes([1, i % 256, 1 + i // 256][: 2 + (i > 255)])] = len(ranks)
    special = {"<|endoftext|>": len(ranks), "<|pad|>": len(ranks) + 1}
    enc = tiktoken.Encoding("other", pat_str=tok.enc._pat_str, mergeable_ranks=ranks, special_tokens=special)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_to_json(Tokenizer(enc))))


def put_what_is_refused(chain, d):
    """Things that scripts must refuse, in a folder d."""
    d.mkdir()
    for name, source in {"cut": "sft", "bigger": "sft", "no_tok": "sft", "no_config": "sft",
                         "json": "sft", "cut_rm": "reward"}.items():
        shutil.copytree(chain / source, d / name)
    for name in ("cut", "cut_rm"):
        data = (d / name / "model.safetensors").read_bytes()
        (d / name / "model.safetensors").write_bytes(data[:len(data) // 2])
    (d / "json" / "config.json").write_text('{"model_type": "llama", ')
    (d / "no_tok" / "tokenizer.json").unlink()
    (d / "no_config" / "config.json").unlink()
    other_tokenizer(d / "bigger", extra=76)
    (d / "empty.jsonl").write_text("")
    (d / "latin.txt").write_bytes(b"caf\xe9 " * 999)
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    (d / "broken.jsonl").write_text(json.dumps(good) + '\n{"prompt": "Hi", \n')
    write(d / "wrong_keys.jsonl", [good, good, {"question": "Hi"}])
    write(d / "unusable.jsonl", [{"prompt": " ", "chosen": "a", "rejected": "b"}] * 3)
    write(d / "same.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "a"}] * 3)
    write(d / "sft.jsonl", [{"messages": user("Hi") + [{"role": "assistant", "content": "Hello"}]}] * 3)
    write(d / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(9)])
    long = " ".join(f"word{i}" for i in range(400))
    write(d / "long.jsonl", [{"prompt": f"{i} {long}", "chosen": "a", "rejected": "b"} for i in range(40)])
    half = " a" * 225   # fits the context of 256, with the answer, but not 48 more
    write(d / "half.jsonl", [{"prompt": f"{i}{half}", "completion": "b"} for i in range(40)])
    write(d / "pairs.jsonl", [good | {"prompt": f"Question {i}?"} for i in range(12)])
    (d / "rewards.py").write_text("def one(rows, texts):\n    return [1.0]\n"
                                  "def none(rows, texts):\n    pass\n"
                                  "def words(rows, texts):\n    return ['a'] * len(texts)\n"
                                  "def nan(rows, texts):\n    return [float('nan')] * len(texts)\n")
    (d / "file").write_text("in the way")


INIT, PPO = "--init {chain}/sft ", "--init {chain}/sft --reward {chain}/reward --rollouts 8 --max_new 8 "
DPO = INIT + "--data {bad}/pairs.jsonl "
BAD_INPUT = [   # script, flags, what the message must hold
    ("sft.py", "--init {bad}/nosuch", "{bad}/nosuch: no such file or folder"),
    ("sft.py", "--init nosuch-model", "nosuch-model"),
    ("reward.py", "--init {bad}/nosuch", "{bad}/nosuch"),
    ("reward.py", INIT + "--policy {bad}/nosuch", "{bad}/nosuch"),
    ("ppo.py", PPO + "--reward {bad}/nosuch", "{bad}/nosuch"),
    ("data.chat", "{bad}/nosuch", "{bad}/nosuch"),
    ("sft.py", "--init {bad}/cut", "{bad}/cut/model.safetensors"),
    ("ppo.py", PPO + "--reward {bad}/cut_rm", "{bad}/cut_rm/model.safetensors"),
    ("reward.py", "--init {bad}/bigger", "tokenizer.json has 1100 tokens"),
    ("sft.py", "--init {bad}/no_tok", "{bad}/no_tok: has no tokenizer.json"),
    ("sft.py", "--init {bad}/no_config", "{bad}/no_config: has no config.json"),
    ("sft.py", "--init {bad}/json", "{bad}/json/config.json"),
    ("ppo.py", PPO + "--reward {chain}/sft", "is a language model"),
    ("ppo.py", PPO + "--init {chain}/reward", "is a reward model"),
    ("data.chat", "--model {chain}/reward", "is a reward model"),
    ("data.pretrain", "--data {bad}/nosuch.txt", "{bad}/nosuch.txt"),
    ("data.pretrain", "--data {bad}/empty.jsonl", "{bad}/empty.jsonl"),
    ("data.pretrain", "--data {bad}/latin.txt", "{bad}/latin.txt"),
    ("data.pretrain", "--length 257", "context of 256"),
    ("data.pretrain", "--length 15", "is not between 16 and"),
    ("sft.py", INIT + "--data {bad}/empty.jsonl", "{bad}/empty.jsonl"),
    ("reward.py", INIT + "--data {bad}/empty.jsonl", "{bad}/empty.jsonl"),
    ("ppo.py", PPO + "--data {bad}/empty.jsonl", "{bad}/empty.jsonl"),
    ("sft.py", INIT + "--data {bad}/nosuch.jsonl", "{bad}/nosuch.jsonl"),
    ("reward.py", INIT + "--data {bad}/nosuch.jsonl", "{bad}/nosuch.jsonl"),
    ("ppo.py", PPO + "--data {bad}/nosuch.jsonl", "{bad}/nosuch.jsonl"),
    ("sft.py", INIT + "--data {bad}", "{bad}"),
    ("sft.py", INIT + "--data {bad}/broken.jsonl", "{bad}/broken.jsonl:2: "),
    ("reward.py", INIT + "--data {bad}/wrong_keys.jsonl", "{bad}/wrong_keys.jsonl:3: "),
    ("ppo.py", PPO + "--data {bad}/broken.jsonl", "{bad}/broken.jsonl:2: "),
    ("sft.py", INIT + "--data {bad}/unusable.jsonl", "3 empty prompt"),
    ("reward.py", INIT + "--data {bad}/same.jsonl", "3 identical pair"),
    ("ppo.py", PPO + "--data {bad}/unusable.jsonl", "3 empty prompt"),
    ("reward.py", INIT + "--data {bad}/sft.jsonl", "{bad}/sft.jsonl:1: "),
    ("sft.py", INIT + "--data {bad}/prompts.jsonl", "{bad}/prompts.jsonl:1: "),
    ("sft.py", INIT + "--data {bad}/long.jsonl --held_out 0.5", "{bad}/long.jsonl: 0 conversations"),
    ("sft.py", INIT + "--data {bad}/half.jsonl --held_out 0.5", "--max_new"),
    ("sft.py", INIT + "--data {bad}/sft.jsonl", "--held_out"),
    ("reward.py", INIT + "--data {bad}/long.jsonl", "--max_len"),
    ("ppo.py", PPO + "--data {bad}/long.jsonl --max_prompt 9999", "--max_prompt"),
    ("ppo.py", PPO + "--max_new 256", "--max_new"),
    ("reward.py", INIT + "--prompts 4 --max_new 250", "context of 256"),
    ("reward.py", INIT + "--k 1", "--k 1"),
    ("ppo.py", PPO + "--reward nomodule:f", "nomodule"),
    ("ppo.py", PPO + "--reward json:nofunction", "nofunction"),
    ("ppo.py", PPO + "--reward :f", "--reward :f"),
    ("ppo.py", PPO + "--reward rewards:one", "--reward rewards:one: expected 8 finite numbers"),
    ("ppo.py", PPO + "--reward rewards:none", "--reward rewards:none: expected a list of 8 numbers"),
    ("ppo.py", PPO + "--reward rewards:words", "--reward rewards:words: expected a list of 8 numbers"),
    ("ppo.py", PPO + "--reward rewards:nan", "--reward rewards:nan: expected 8 finite numbers"),
    ("ppo.py", PPO + "--reward gold --data {bad}/prompts.jsonl", "--reward gold"),
    ("ppo.py", PPO + "--rollouts 10", "--rollouts 10"),
    ("ppo.py", PPO + "--reward gold,{chain}/reward --reward_weights 1",
     "--reward_weights 1: expected 2 numbers"),
    ("ppo.py", PPO + "--reward_weights x", "--reward_weights x"),
    ("ppo.py", PPO + "--reward gold,{bad}/nosuch", "{bad}/nosuch"),
    ("ppo.py", PPO + "--reward implicit:{chain}/sft", "expected implicit:POLICY:REFERENCE"),
    ("data.process", INIT + "--data {bad}/pairs.jsonl", "{bad}/pairs.jsonl:1: "),
    ("ppo.py", PPO + "--ptx_coef 1 --ptx_data {bad}/nosuch.txt", "{bad}/nosuch.txt"),
    ("ppo.py", PPO + "--ptx_coef 1 --ptx_data {bad}/empty.jsonl", "{bad}/empty.jsonl"),
    ("ppo.py", PPO + "--advantage grpo --group 1", "--group"),
    ("ppo.py", PPO + "--advantage rloo --group 1", "--group"),
    ("ppo.py", PPO + "--temperature 0", "--temperature"),
    ("ppo.py", "--advantage grpo --group 1", "--group"),  # told before anything missing is made
    ("reward.py", "--k 1", "--k 1"),
    ("dpo.py", DPO + "--label_smoothing 0.5", "--label_smoothing"),
    ("dpo.py", DPO + "--loss kto --online true", "--online"),
    ("dpo.py", DPO + "--online true --data {bad}/prompts.jsonl", "--judge"),
    ("dpo.py", DPO + "--online true --judge gold --data {bad}/prompts.jsonl", "--judge"),
    ("dpo.py", INIT + "--online true --judge {chain}/sft", "is a language model"),
    ("dpo.py", INIT + "--online true --judge nomodule:f", "nomodule"),
    ("dpo.py", INIT + "--data {bad}/same.jsonl", "3 identical pair"),
    ("dpo.py", INIT + "--data {bad}/empty.jsonl", "{bad}/empty.jsonl"),
    ("dpo.py", INIT + "--data {bad}/broken.jsonl", "{bad}/broken.jsonl:2: "),
    ("dpo.py", INIT + "--data {bad}/sft.jsonl", "{bad}/sft.jsonl:1: "),
    ("dpo.py", DPO + "--held_out 0", "--held_out"),
    ("dpo.py", DPO + "--held_out 0.5 --max_new 256", "--max_new 256"),
    ("dpo.py", "--init {chain}/reward --data {bad}/pairs.jsonl", "is a reward model"),
    ("data.pretrain", "--device gpu", "--device gpu"),
    ("sft.py", INIT + "--device cuda:x", "--device cuda:x"),
    ("sft.py", INIT + "--out {bad}/file/x", "{bad}/file"),
    ("data.pretrain", "--steps 2 --out {bad}/file", "{bad}/file"),
]


def run_bad_input(suite, chain, folder):
    """What becomes of all these commands; they run in folder/runs."""
    bad, runs = folder / "bad", folder / "runs"
    put_what_is_refused(chain, bad)
    runs.mkdir()
    commands = [[script, *flags.format(chain=chain, bad=bad).split()] for script, flags, _ in BAD_INPUT]
    for i, command in enumerate(commands):
        if "--out" not in command and command[0] in SCRIPTS:
            command += ["--out", runs / str(i) / "out"]
    return list(suite.run_all(commands, cwd=runs, env={"PYTHONPATH": str(bad)}))


def test_bad_input_ends_in_one_sentence(early, chain):
    (folder, results), wrong = early, []
    for i, ((script, flags, words), r) in enumerate(zip(BAD_INPUT, results, strict=True)):
        try:
            fails(r, words.format(chain=chain, bad=folder / "bad"))
            assert not (folder / "runs" / str(i) / "out" / "config.json").exists(), "left a checkpoint behind"
        except AssertionError as e:
            wrong.append(f"{script} {flags}: {e}")
    assert not wrong, "\n\n".join(wrong)
    assert not list(folder.glob("runs/**/*.safetensors")) and not list(folder.glob("runs/**/state.pt"))


def test_a_broken_state_is_named(suite, chain, tmp_path):
    flags = ["sft.py", "--init", chain / "base", "--out", tmp_path / "x", "--max_new", 8, "--max_steps"]
    suite.ok(*flags, 1)
    (tmp_path / "x" / "state.pt").write_bytes(b"not a state")
    fails(suite.run(*flags, 2), tmp_path / "x" / "state.pt", "no training state of ours")


def test_a_broken_link_of_the_chain_is_named(suite, tmp_path):
    """sft.py makes the missing base model, which here cannot be: the error of the one and of the other are
    shown."""
    (tmp_path / "base").write_text("a file in the way")
    r = suite.run("sft.py", "--out", tmp_path / "sft")
    assert r.rc == 1 and "Traceback" not in r.err
    assert f"error: -m data.pretrain failed, so there is no {tmp_path / 'base'}" in r.err.splitlines()[-1]
    assert str(tmp_path / "base") in r.err.splitlines()[0] and not (tmp_path / "sft").exists()


# ------------------------------------------------------------------------------------------------------------
# 6. At the terminal.


@pytest.mark.parametrize("end", ["\n\nnot read\n", ""], ids=["empty line", "end of file"])
def test_chat(suite, chain, end):
    r = suite.ok("data.chat", chain / "sft", "--max_new", 6, "--temperature", 0,
                 stdin=f"Hello\nWhat is a dog?{end}")
    assert r.out.count("model> ") == 2 and r.out.count("you> ") == 3


def test_a_chat_longer_than_the_context_goes_on(suite, chain):
    r = suite.ok("data.chat", "--model", chain / "sft", "--max_new", 20,
                 stdin="Tell me everything about the goose, please.\n" * 14)
    assert r.out.count("model> ") == 14


def test_chat_asks_several_models_the_same(suite, chain, tmp_path):
    """Base and SFT are one model and its negative, so that the likeliest token of one is the other's least
    likely."""
    model, tok = load(chain / "sft")
    save(tmp_path / "sft", model, tok)
    model.ln_f.weight.data.neg_()
    save(tmp_path / "base", model, tok)
    shutil.copytree(chain / "reward", tmp_path / "reward")
    r = suite.ok("data.chat", tmp_path / "sft", "--max_new", 6, "--temperature", 0,
                 stdin="Hello\n/base\nHello\n/nosuch\n/reward\nHello\n/sft\nHello\n")
    sft, base, still_base, again = re.findall("model> (.*)", r.out)
    assert sft == again and base == still_base != sft   # a new conversation, no memory of the other model
    assert "no model nosuch" in r.out and "is a reward model" in r.out
    offered = re.search("(/base .*) switch", r.out)[1].split()       # only what can talk
    assert "/sft" in offered and "/reward" not in offered and "/nosuch" not in offered


def test_a_line_of_a_chat_is_answered_afresh(suite, chain):
    """The same question gets the same answer whatever was asked before, until /keep. Otherwise the capital of
    France is a farmer, after one odd line, in a model that knows it."""
    question = "What is the capital of France?"
    odd = "hi, who are you? " * 8

    def said(lines, *flags):
        r = suite.ok("data.chat", chain / "sft", "--max_new", 12, "--temperature", 0, *flags,
                     stdin="\n".join(lines))
        return re.findall("model> (.*)", r.out)
    first, _, after, _, kept, again = said([question, odd, question, "/keep", odd, question,
                                            "/keep", question])
    assert first == after == again
    assert said([odd, question], "--keep")[1] == kept


@pytest.mark.parametrize("script", ["data.pretrain", "ppo.py"])
def test_ctrl_c(suite, chain, tmp_path, script):
    flags = ["--out", tmp_path / "out", "--save_every", 2]
    if script == "ppo.py":
        flags += ["--reward", "gold", "--init", chain / "sft", "--rollouts", 8, "--max_new", 8]
    job, end = suite.start(script, *flags), time.time() + 60
    while not (tmp_path / "out" / "config.json").exists():
        assert not (job / "rc").exists() and time.time() < end, suite.finish(job)
        time.sleep(0.02)
    suite.signal(job, signal.SIGINT)
    r = suite.finish(job)
    gpt, tok = load(tmp_path / "out")
    assert gpt(torch.tensor([tok.encode("Hello")])).isfinite().all()
    step, name = load_state(tmp_path / "out")["step"], script.removesuffix(".py").removeprefix("data.")
    assert r.rc == 1 and r.err.startswith(f"{name}: interrupted after step {step}, saved")
    assert step >= 2 and len(log_of(tmp_path / "out")) == step
    assert not (tmp_path / "out" / "result.json").exists()   # so that the chain knows it for unfinished


# ------------------------------------------------------------------------------------------------------------
# 7. Rewards of one's own.

MINE = """
import json, os
def letters(rows, texts):
    with open(os.environ["SEEN"], "a") as f:
        f.write(json.dumps([[r["prompt"][-1]["content"] for r in rows], texts,
                            [r.get("n") for r in rows]]) + chr(10))
    return [sum(c in "aeiou" for c in t) / 10 for t in texts]
"""


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_reward_of_ones_own(suite, chain, tmp_path, advantage):
    (tmp_path / "mine.py").write_text(MINE)
    flags = ["--init", chain / "sft", "--reward", "mine:letters", "--advantage", advantage, "--group", 4,
             "--rollouts", 16, "--max_new", 12, "--minibatches", 1, "--eos_penalty", 0,
             "--iterations", 3, "--dtype", "float32", "--lr", 1e-3]

    def start(name, *more):
        env = {"PYTHONPATH": str(tmp_path), "SEEN": str(tmp_path / f"{name}.seen")}
        return suite.start("ppo.py", *flags, "--out", tmp_path / name, *more, cwd=tmp_path, env=env)

    jobs = [start("cool", "--temperature", 0.7, "--entropy_coef", 0.5), start("warm"),
            start("plain", "--temperature", 0.7, "--max_steps", 2)]
    for job in jobs:
        assert (r := suite.finish(job)).rc == 0 and r.err == "", r.err
    cool, warm, plain = (log_of(tmp_path / name) for name in ("cool", "warm", "plain"))
    seen = [json.loads(line) for line in (tmp_path / "cool.seen").read_text().splitlines()]
    # at last those measured
    assert len(cool) == 3 and [len(texts) for _, texts, _ in seen] == [16, 16, 16, 24, 24]
    for prompts, texts, _ in seen[:3]:   # four answers to each of four prompts, in a row
        assert (len(texts) == 16 and [prompts[i // 4 * 4] for i in range(16)] == prompts
                and len(set(prompts)) == 4)
        assert len(set(texts)) > 4
    assert cool[0]["entropy"] < warm[0]["entropy"]                    # the temperature reaches the policy
    assert cool[0]["entropy"] == plain[0]["entropy"] and cool[0]["policy_loss"] == plain[0]["policy_loss"]
    assert cool[1]["entropy"] > plain[1]["entropy"] + 0.01            # and the bonus its first step
    assert cool[0]["kl"] == 0 < abs(cool[2]["kl"])
    assert 0 < cool[0]["reward"] <= sum(sum(c in "aeiou" for c in t) / 10 for t in seen[0][1]) / 16 + 1e-6
    for column, (_, texts, _) in zip(("before", "after"), seen[3:]):
        mean = sum(sum(c in "aeiou" for c in t) / 10 for t in texts) / 24
        assert result_of(tmp_path / "cool")[column]["reward"] == pytest.approx(mean)
    state, with_value = load_state(tmp_path / "cool"), load_state(chain / "ppo")
    # no value model is built, saved, trained
    assert set(state["models"]) == set(state["optimizers"]) == {"policy"}
    assert set(with_value["models"]) == set(with_value["optimizers"]) == {"policy", "value", "reward_model"}
    assert not {"value_loss", "explained_var"} & set(cool[-1])


def test_reward_gold(suite, chain, tmp_path):
    suite.ok("ppo.py", "--init", chain / "sft", "--reward", "gold", "--iterations", 2, "--rollouts", 16,
             "--max_new", 12, "--eos_penalty", 0, "--value_warmup", 0, "--out", tmp_path / "ppo")
    log = log_of(tmp_path / "ppo")
    # 0 without EOS, else gold
    assert len(log) == 2 and all(abs(row["reward"]) <= row["gold"] + 1e-6 for row in log)


def test_where_a_function_is_found(suite, chain, tmp_path):
    """In a module or a file of the current folder, also where its name is that of a file of ours."""
    write(tmp_path / "p.jsonl", [{"prompt": f"What is {i}?"} for i in range(20)])
    flags = ["--init", chain / "sft", "--data", "p.jsonl", "--rollouts", 8, "--minibatches", 1,
             "--max_new", 4, "--iterations", 1, "--eos_penalty", 0]
    names = {"mine:score": "mine.py", "reward:score": "reward.py", "./mine.py:score": "mine.py",
             "sub/more.py:score": "sub/more.py"}
    (tmp_path / "sub").mkdir()
    for path in set(names.values()):
        (tmp_path / path).write_text(f"def score(rows, texts):\n    print('asked', {path!r})\n"
                                     "    return [float(len(t)) for t in texts]\n")
    (tmp_path / "broken.py").write_text("def score(rows, texts):\n    return [1.0\n")
    commands = [["ppo.py", *flags, "--reward", name, "--out", tmp_path / str(i)]
                for i, name in enumerate(names)]
    commands += [["ppo.py", *flags, "--reward", name, "--out", tmp_path / f"bad{i}"]
                 for i, name in enumerate(("mine:nothing", "broken:score", "./nosuch.py:score"))]
    *good, nothing, broken, nosuch = suite.run_all(commands, cwd=tmp_path)
    for path, r in zip(names.values(), good):
        assert r.rc == 0 and r.err == "" and f"asked {path}" in r.out, r
    fails(nothing, "--reward mine:nothing", tmp_path / "mine.py", "has no function 'nothing'")
    fails(broken, "--reward broken:score", "cannot be imported: SyntaxError")
    fails(nosuch, "--reward ./nosuch.py:score", "cannot be imported: FileNotFoundError")


def test_a_function_of_a_file_is_that_files(tmp_path, monkeypatch):
    """Also where a module of that name has been imported, from Python, from here, or from another folder."""
    monkeypatch.chdir(tmp_path)
    names = ("mine.py", "a/mine.py", "b/mine.py", "json.py", "model.py")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                        f"@dataclass\nclass Own:\n    x: int = 0\ndef where():\n    return {name!r}\n")
    for name in names:
        assert flags_py.function_of(f"{name}:where", "--reward")() == name
        assert flags_py.function_of(f"{tmp_path / name}:where", "--reward")() == name
    for name in ("mine", "json", "model"):       # the current folder comes first
        assert flags_py.function_of(f"{name}:where", "--reward")() == f"{name}.py"
    assert flags_py.function_of("data.world:gold", "--reward") is world.gold
    with pytest.raises(InputError, match="mine.py has no function 'dumps'"):
        flags_py.function_of("./mine.py:dumps", "--reward")
    assert sys.modules["json"] is json


def test_two_policies_in_folders_with_colons(chain, tmp_path):
    here = tmp_path / "2025-01-31_12:30"
    here.mkdir()
    for name in ("ppo", "sft"):
        (here / name).symlink_to(chain / name)
    rows, texts = [{"prompt": user("Hi")}], ["Hello"]
    plain = Scorer("--reward", f"implicit:{chain / 'ppo'}:{chain / 'sft'}").score_texts(rows, texts)
    assert Scorer("--reward", f"implicit:{here / 'ppo'}:{here / 'sft'}").score_texts(rows, texts) == plain


def test_fingerprint_sees_every_byte_of_a_file(tmp_path):
    """And which megabyte of long weights has changed, of every file of a model, and each part of
    FILE.py:function."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(bytes(5 * 2 ** 20))
    before = folder_py.fingerprint(path)
    with open(path, "r+b") as file:
        file.seek(5 * 2 ** 19)
        file.write(b"x")
    assert folder_py.fingerprint(path) != before
    (tmp_path / "m").mkdir()
    seen = set()
    for name in ("model-1.safetensors", "model-2.safetensors"):
        for at in (0, 2 ** 20 - 7, 3 * 2 ** 20, 4 * 2 ** 20):
            data = bytearray(5 * 2 ** 20)
            data[at: at + 2 ** 20] = b"x" * 2 ** 20
            (tmp_path / "m" / name).write_bytes(data)
            seen.add(folder_py.fingerprint(tmp_path / "m"))
        (tmp_path / "m" / name).write_bytes(data[:-1])
        seen.add(folder_py.fingerprint(tmp_path / "m"))
    assert len(seen) == 10 and folder_py.fingerprint(tmp_path / "nosuch") == "none"
    own = f"{tmp_path / 'mine.py'}:score"
    (tmp_path / "mine.py").write_text("def score(rows, texts): return [1.0]")
    before = folder_py.fingerprint(own)
    (tmp_path / "mine.py").write_text("def score(rows, texts): return [2.0]")
    assert folder_py.fingerprint(own) != before


def test_colons_and_commas_in_paths(suite, chain, tmp_path):
    """A folder that exists is a folder: a time stamp is no module, a list of settings no list of models."""
    here = tmp_path / "2025-01-31_12:30" / "lr=1e-5,seed=0"
    here.mkdir(parents=True)
    for name in ("base", "sft", "reward"):
        (here / name).symlink_to(chain / name)
    flags = ["--max_new", 4, "--max_steps", 1, "--out"]
    for r in suite.run_all([["ppo.py", "--rollouts", 8, *flags, here / "ppo"],
                            ["dpo.py", "--online", "--judge", here / "reward", *flags, here / "dpo"],
                            ["reward.py", "--policy", here / "sft", "--prompts", 40, "--held_out", 0.3,
                             "--max_new", 24, "--max_steps", 1, "--out", here / "again"]]):
        assert r.rc == 0 and r.err == "", r
    made_of = json.loads((here / "ppo" / "run.json").read_text())["inputs"]
    assert made_of[str(here / "reward")] not in ("none", made_of[str(here / "sft")])


# ------------------------------------------------------------------------------------------------------------
# 8. Data of one's own.


def test_sft_on_alpaca(suite, chain, tmp_path):
    rows = [{"instruction": f"Say the number {i}.", "input": "In words." * (i % 2), "output": f"It is {i}."}
            for i in range(40)]
    rows.append({"instruction": "Say no.", "input": "", "output": ""})
    (tmp_path / "alpaca.json").write_text(json.dumps(rows, indent=1))
    r = suite.ok("sft.py", "--init", chain / "base", "--data", tmp_path / "alpaca.json",
                 "--out", tmp_path / "sft", "--held_out", 0.2, "--batch_size", 8, "--warmup", 2,
                 "--max_new", 8)
    assert "alpaca.json: 40 rows kept, 1 dropped (1 empty response)" in r.out
    result = result_of(tmp_path / "sft")
    assert result["after"]["loss"] < 0.8 * result["before"]["loss"] and "gold" not in result["after"]
    assert "Say the number" in (tmp_path / "sft" / "samples.txt").read_text()


def test_sft_leaves_long_prompts_out_of_the_samples(suite, chain, tmp_path):
    rows = [{"prompt": f"{i}" + " a" * (225 if i % 2 else 1), "completion": "b"} for i in range(30)]
    suite.ok("sft.py", "--init", chain / "base", "--data", write(tmp_path / "d.jsonl", rows),
             "--out", tmp_path / "sft", "--held_out", 0.3, "--max_steps", 1)
    samples = (tmp_path / "sft" / "samples.txt").read_text()
    assert "  2 a\n" in samples and "  1 a a a" not in samples


def test_sft_says_what_it_leaves_out(suite, chain, tmp_path):
    """Conversations whose answer begins behind --max_len, and those that are cut, so that nothing teaches to
    stop."""
    long = " word" * 100
    for name, rows, counts in (
            ("prompts", [{"prompt": f"{i}{long if i % 4 else ''}", "completion": "b"} for i in range(40)],
             (10, 0, 30)),
            ("answers", [{"prompt": str(i), "completion": f"{i}{long}"} for i in range(40)], (40, 40, 0))):
        r = suite.ok("sft.py", "--init", chain / "base", "--data", write(tmp_path / f"{name}.jsonl", rows),
                     "--out", tmp_path / name, "--max_new", 4, "--held_out", 0.3, "--max_steps", 1,
                     "--max_len", 64)
        told = r"(\d+) conversations to train on, (\d+) held out; (\d+) cut at 64 tokens, (\d+) .*left out"
        n_train, n_held, n_cut, n_left_out = map(int, re.search(told, r.out).groups())
        assert (n_train + n_held, n_cut, n_left_out) == counts


def test_reward_on_preferences(suite, chain, tmp_path):
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is the number {i}.", "rejected": f"Go away {i}!"}
            for i in range(40)]
    r = suite.ok("reward.py", "--init", chain / "sft", "--data", write(tmp_path / "pairs.jsonl", rows),
                 "--out", tmp_path / "rm", "--held_out", 0.3, "--batch_size", 4, "--epochs", 3, "--warmup", 2)
    assert "pairs.jsonl: 40 rows kept, 0 dropped" in r.out
    assert result_of(tmp_path / "rm")["after"]["accuracy"] > 0.9
    mean = json.loads((tmp_path / "rm" / "config.json").read_text())["reward_mean"]
    assert mean == pytest.approx(result_of(tmp_path / "rm")["after"]["reward_mean"]) and mean != 0


def test_reward_on_ties_alone(suite, chain, tmp_path):
    rows = [{"prompt": f"What is {i}?", "chosen": "This.", "rejected": f"That {i}.", "label": 0.5}
            for i in range(20)]
    suite.ok("reward.py", "--init", chain / "sft", "--data", write(tmp_path / "ties.jsonl", rows),
             "--out", tmp_path / "rm", "--held_out", 0.3)
    assert "loss" in result_of(tmp_path / "rm")["after"]             # and no NaN: result_of looks


def test_a_run_does_not_replace_what_it_reads(suite, chain, tmp_path):
    """answers.jsonl is what every run leaves in --out; here it is the user's data."""
    data = tmp_path / "answers.jsonl"
    text = (chain / "reward" / "comparisons.jsonl").read_text()
    data.write_text(text)
    r = suite.run("dpo.py", "--init", chain / "sft", "--data", data, "--out", tmp_path)
    assert r.rc == 1 and "answers.jsonl" in r.err and "another --out" in r.err and "Traceback" not in r.err, r
    assert data.read_text() == text


def test_inspect_starts_anew_whatever_is_in_the_folder(suite, chain, tmp_path):
    """Of an early iteration by the flags given, also where a run with other models lies in --out; that
    stays."""
    flags = ["--init", chain / "sft", "--reward", chain / "reward", "--rollouts", 16, "--max_new", 8,
             "--out", tmp_path / "x"]
    suite.ok("ppo.py", *flags, "--advantage", "rloo", "--group", 2, "--relabel", 0, "--iterations", 1)
    before = snapshot(tmp_path)
    r = suite.ok("ppo.py", *flags, "--advantage", "gae", "--iterations", 5, "--inspect")
    assert "iteration 3: " in r.out and "A, gae: " in r.out and snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["prompts", "preferences"])
def test_ppo_on_ones_own_prompts(suite, chain, tmp_path, kind):
    (tmp_path / "mine.py").write_text(MINE)
    rows = [{"prompt": f"What is {i}?", "n": i}
            | ({} if kind == "prompts" else {"chosen": "a", "rejected": "b"})
            for i in range(10)]
    rows.append(rows[0] | {"prompt": "much too long " * 99})
    r = suite.ok("ppo.py", "--init", chain / "sft", "--reward", "mine:letters",
                 "--data", write(tmp_path / "p.jsonl", rows), "--iterations", 2, "--rollouts", 16,
                 "--group", 1, "--max_new", 8, "--value_warmup", 0, "--out", tmp_path / "ppo",
                 env={"PYTHONPATH": str(tmp_path), "SEEN": str(tmp_path / "seen")})
    assert ("p.jsonl: 11 rows kept" in r.out
            and "10 prompts to answer; 1 left out, of more than 128 tokens" in r.out)
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    prompts = [prompts for prompts, _, _ in seen]
    for asked, _, n in seen if kind == "prompts" else []:   # a row keeps its other keys, before and after too
        assert asked == [f"What is {i}?" for i in n]
    assert ([(len(p), len(set(p))) for p in prompts[:2]] == [(16, 9)] * 2
            and all(len(p) < 20 for p in prompts[0]))
    assert prompts[2] == prompts[3] and len(prompts[2]) == 1   # before and after: a tenth is not trained on
    assert not set(prompts[2]) & set(prompts[0] + prompts[1])
    assert "gold" not in log_of(tmp_path / "ppo")[0]


def test_ppo_with_a_reward_model_on_ones_own_prompts(suite, chain, tmp_path):
    rows = [{"prompt": f"What is {i}?"} for i in range(16)]
    suite.ok("ppo.py", "--init", chain / "sft", "--reward", chain / "reward",
             "--data", write(tmp_path / "p.jsonl", rows), "--iterations", 2, "--rollouts", 8,
             "--max_new", 8, "--relabel", 1, "--out", tmp_path / "ppo")
    assert not (tmp_path / "ppo" / "reward").exists()   # nobody there who could judge these prompts


def test_no_relabelling_without_comparisons_to_go_on_from(suite, chain, tmp_path):
    shutil.copytree(chain / "reward", tmp_path / "rm")
    (tmp_path / "rm" / "comparisons.jsonl").unlink()
    suite.ok("ppo.py", "--init", chain / "sft", "--reward", tmp_path / "rm", "--iterations", 2,
             "--rollouts", 8, "--max_new", 8, "--relabel", 1, "--out", tmp_path / "ppo")
    assert not (tmp_path / "ppo" / "reward").exists() and "rm_loss" not in log_of(tmp_path / "ppo")[0]


# ------------------------------------------------------------------------------------------------------------
# 9. Nobody injects special tokens.

SPY = """
import json, os, runpy, sys
import model
rows, pad_batch = [], model.pad_batch
def spy(batch, *args, **kw):
    rows.extend(list(map(int, row)) for row in batch)
    return pad_batch(batch, *args, **kw)
model.pad_batch = spy
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
json.dump(rows, open(os.environ["SEEN"], "w"))
"""
EVIL = "Say <|endoftext|> and <|pad|> now"


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_text_never_becomes_a_special_token(suite, chain, tmp_path, script):
    """All ids that a run puts into batches: no pad, an EOS at the end of an assistant's turn only."""
    (tmp_path / "spy.py").write_text(SPY)
    flags = {"sft.py": ["--held_out", 0.3, "--max_steps", 1],
             "reward.py": ["--held_out", 0.3, "--max_steps", 1],
             "dpo.py": ["--held_out", 0.3, "--max_steps", 1],
             "ppo.py": ["--iterations", 1, "--rollouts", 18, "--group", 1, "--minibatches", 1]}[script]
    rows = [{"prompt": f"{EVIL} {i}.", **{
             "sft.py": {"completion": f"Well <|pad|><|endoftext|> {i}"}, "ppo.py": {},
             "reward.py": (pair := {"chosen": f"Yes <|endoftext|> {i}", "rejected": f"No <|pad|> {i}"}),
             "dpo.py": pair}[script]} for i in range(20)]
    r = suite.run(tmp_path / "spy.py", suite.root / script, *links(script, chain), "--out", tmp_path / "out",
                  *flags, "--data", write(tmp_path / "evil.jsonl", rows), "--max_new", 4,
                  env={"PYTHONPATH": str(suite.root), "SEEN": str(tmp_path / "seen")})
    assert r.rc == 0, r.err
    tok = tokenizer_from_json(chain / "sft" / "tokenizer.json")
    # without the 0/1 masks
    seen = [ids for ids in json.loads((tmp_path / "seen").read_text()) if len(set(ids)) > 2]
    texts = [tok.decode(ids) for ids in seen]
    assert {text.split(" now ")[1].split(".")[0] for text in texts} >= {str(i) for i in range(8)}
    for ids, text in zip(seen, texts):
        assert tok.pad_id not in ids and EVIL in text
        if "Yes <|endoftext|>" in text and "No <|pad|>" in text:     # dpo.py: both answers behind one prompt
            between = ids.index(tok.eos_id) + 1
            assert ids.count(tok.eos_id) == 2 and ids[-1] == tok.eos_id and script == "dpo.py"
            # the prompt's last token stands there again
            assert tok.decode(ids[between:]).startswith(": No <|pad|>")
            continue
        # dpo.py and ppo.py also look at what their policy said, which may end at once or be cut
        ends = ids[-1] == tok.eos_id if script in ("dpo.py", "ppo.py") else "\n\nAssistant: " in text
        assert ids.count(tok.eos_id) == ends and (ids[-1] == tok.eos_id) == ends


# ------------------------------------------------------------------------------------------------------------
# 10. Several processes, as torchrun starts them.


# A share may turn on a tie within rounding: by one of the things counted. What it is a share of is held by
# the losses.
ONE_OF = {"accuracy": 1 / 8, "rm_accuracy": 1 / 32, "clipfrac": 0.01}


def close(a, b):
    """Equal weights to 1e-5, but for a few where a gradient is next to nothing and Adam divides it by
    itself."""
    d = (a - b).abs()
    return bool(d.mean() < 1e-7 and d.max() < 1e-3)


def together(start, n, *args):
    """The jobs of n processes of one run (gloo on this machine). start: a method of the suite, for one of
    them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [start(*args, env={"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(n),
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for i in range(n)]


def one_and_two(suite, chain, folder, script, flags):
    """The same run by one process and by two."""
    short = [] if script == "data.pretrain" else ["--max_new", 12]
    # 36 prompts to train on: every batch, the last one too, divides over two processes.
    pairs, groups, lines = [], [], []
    for i in range(40):
        pair = {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No, {i} is it."}
        other = {"prompt": f"Say {i}.", "chosen": "I do not know.", "rejected": f"It is {i}.", "label": 0.8}
        pairs.append(pair)
        groups += [pair, other][: 1 + i % 2]
        lines.append({"prompt": f"Say {i}.", "completions": ["Well.", f"It is {i}."][: 1 + i % 2],
                      "labels": [False, True][: 1 + i % 2]})
    files = {name: write(folder / f"{name}.jsonl", rows)
             for name, rows in (("pairs", pairs), ("groups", groups), ("lines", lines))}
    flags = [*short, "--max_steps", 3, "--dtype", "float32", *flags.format(chain=chain, **files).split()]
    jobs = [suite.start(script, *flags, "--out", folder / "one")]
    jobs += together(suite.start, 2, script, *flags, "--out", folder / "two")
    return [suite.finish(job) for job in jobs]


@pytest.mark.parametrize("script, flags", [
    ("data.pretrain", "--steps 4"),
    ("sft.py", "--init {chain}/base --micro_batch 3 --batch_size 14"),
    ("reward.py", "--init {chain}/sft --data {groups} --batch_size 8 --held_out 0.1 --micro_batch 3"),
    ("data.process", "--init {chain}/sft --data {lines} --batch_size 8 --held_out 0.1"),
    ("dpo.py", "--init {chain}/sft --data {pairs} --batch_size 8 --micro_batch 3"),
    ("dpo.py", "--init {chain}/sft --data {pairs} --loss kto --batch_size 8"),
    ("dpo.py", "--init {chain}/sft --online --batch_size 15 --max_new 24 --max_steps 2"),
    # one pair a step, or none
    ("dpo.py", "--init {chain}/sft --online --batch_size 1 --max_new 32 --max_steps 4"),
    ("ppo.py", "--init {chain}/sft --reward {chain}/reward --rollouts 16 --minibatches 2 --micro_batch 3 "
               "--value_warmup 1 --ptx_coef 0.1 --relabel 2 --recompute --max_steps 4"),
    ("ppo.py", "--init {chain}/sft --reward {chain}/reward --rollouts 16 --minibatches 2 --micro_batch 3 "
               "--advantage grpo --group 4 --relabel 0 --max_steps 2"),
    ("ppo.py", "--init {chain}/sft --reward implicit:{chain}/sft:{chain}/base --rollouts 16 --minibatches 2 "
               "--value_warmup 1"),
    ("ppo.py", "--init {chain}/sft --reward {chain}/reward --rollouts 16 --minibatches 2 --value_warmup 1 "
               "--lora 4 --max_steps 2")])
def test_two_processes_are_one(early, script, flags):
    """The same losses and the same checkpoint, whoever computes which rows and keeps which weights."""
    folder, results = early
    for r in results:
        assert r.rc == 0 and r.err == "", r
    for a, b in zip(log_of(folder / "one"), log_of(folder / "two"), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=5e-6 + ONE_OF.get(name, 0)), (name, a, b)
        # The log keeps six digits, and the last one may differ by one: up to 1e-5 of a number that begins
        # with 1.
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1.01e-5)
    one, two = (read_safetensors(folder / n / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(close(one[k], two[k]) for k in one)
    assert {p.name for p in (folder / "one").iterdir()} == {p.name for p in (folder / "two").iterdir()}
    assert result_of(folder / "one")["after"].keys() == result_of(folder / "two")["after"].keys()


def two_and_then_one(suite, chain, folder, script, flags):
    """A run of four steps, and one whose first two are done by two processes, the others by one."""
    flags = [*flags.format(chain=chain).split(), "--dtype", "float32", "--max_new", 12, "--max_steps", 4]
    whole = suite.start(script, *flags, "--out", folder / "whole")
    jobs = together(suite.start_and_stop, 2, 2, script, *flags, "--out", folder / "cut")
    stopped = [suite.finish(job) for job in jobs]
    n = len(log_of(folder / "cut"))
    assert [r.rc for r in stopped] == [1, 1] and "interrupted after step 2" in stopped[0].err, stopped
    return n, [suite.finish(whole), suite.run(script, *flags, "--out", folder / "cut")]


@pytest.mark.parametrize("script, flags", [
    ("sft.py", "--init {chain}/base --batch_size 14"),
    ("ppo.py", "--init {chain}/sft --reward {chain}/reward --rollouts 16 --minibatches 2 --value_warmup 1 "
               "--relabel 2")])
def test_a_run_goes_on_in_another_number_of_processes(early, script, flags):
    """Two steps by two processes, the others by one: the losses of a run without a break. Otherwise a state
    is lost on the way: without the optimizers' the four of PPO differ by 6e-4, 3e-2, 8e-2 and 0.3."""
    folder, (n, results) = early
    for r in results:
        assert r.rc == 0 and r.err == "", r
    assert n == 2 and "going on after step 2" in results[-1].out
    losses = {"sft.py": ["loss"], "ppo.py": ["policy_loss", "value_loss", "rm_loss", "kl"]}[script]
    whole, cut = log_of(folder / "whole"), log_of(folder / "cut")
    # Means of terms of about 1 that cancel, such as advantages with mean 0: rounding is to be measured by the
    # terms. Seen were 1e-6, and 5e-5 once; without the optimizers it is 6e-4 at least.
    near_0 = ("policy_loss", "kl")
    for name in losses:
        assert [row[name] for row in whole if name in row] == pytest.approx(
            [row[name] for row in cut if name in row], rel=1e-5, abs=1e-4 if name in near_0 else 1e-6), name
    assert {"sft.py": 4, "ppo.py": 3}[script] == sum(losses[0] in row for row in cut)


def test_a_sharded_model_in_bf16(suite, chain, tmp_path):
    """Sampling from its whole twin, before and after, leaves it fit to train: as one process does, to
    rounding."""
    flags = ["sft.py", "--init", chain / "base", "--max_steps", 3, "--dtype", "bfloat16",
             "--max_new", 12, "--out"]
    jobs = [suite.start(*flags, tmp_path / "one"), *together(suite.start, 2, *flags, tmp_path / "two")]
    for r in map(suite.finish, jobs):
        assert r.rc == 0 and r.err == "", r
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
    assert result_of(tmp_path / "two")["after"]["loss"] < result_of(tmp_path / "two")["before"]["loss"]


def test_what_is_finished_or_refused_ends_in_all_processes(suite, chain):
    """The first process looks into the folder; the others end as it does, not in a wait or a traceback."""
    before, (script, *flags) = snapshot(chain / "sft"), CHAIN["sft"]
    for r in map(suite.finish, together(suite.start, 2, script, *flags, "--out", chain / "sft")):
        assert r.rc == 0 and r.err == "", r
    for r in map(suite.finish, together(suite.start, 2, script, *flags, "--out", chain / "sft", "--seed", 5)):
        assert r.rc == 1 and "Traceback" not in r.err, r
    assert snapshot(chain / "sft") == before


def kill_one_of_two(suite, chain, folder):
    """Two processes of one run, of which one is killed; gives (exit code, what they printed)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
               "data.pretrain", "--steps", 4000, "--save_every", 5, "--out", folder / "x"]
    process = subprocess.Popen([str(c) for c in command], env=suite.env, cwd=suite.root,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    state, end = folder / "x" / "state.pt", time.time() + 120
    while not state.exists() and process.poll() is None and time.time() < end:
        time.sleep(0.2)
    assert state.exists(), process.communicate()[0][-2000:]
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


@dataclass
class NoFlags:
    """None."""


@pytest.mark.parametrize("code", [None, 0, 1])
def test_a_run_that_went_well_leaves_its_group(tmp_path, monkeypatch, code):
    """Otherwise Python may abort at its end, and torchrun calls a run that is saved a failure."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    old = signal.getsignal(signal.SIGTERM)

    def main(cfg):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
        if code is not None:
            sys.exit(code)
    try:
        with suppress(SystemExit):
            flags_py.program(main, NoFlags, "A program.")
        assert torch.distributed.is_initialized() == (code == 1)
    finally:
        signal.signal(signal.SIGTERM, old)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_process_that_dies_ends_the_run(early):
    """With an error, not in a wait without end; what the first process saved is whole."""
    folder, (code, out) = early
    assert code != 0 and "Signal 9" in out
    gpt, _ = load(folder / "x")
    assert all(p.isfinite().all() for p in gpt.parameters())


EARLY = {"test_resume_equals_a_run_without_a_break": whole_and_cut,      # see the chain in conftest.py
         "test_bad_input_ends_in_one_sentence": run_bad_input, "test_two_processes_are_one": one_and_two,
         "test_a_run_goes_on_in_another_number_of_processes": two_and_then_one,
         "test_a_process_that_dies_ends_the_run": kill_one_of_two}


def test_what_several_processes_cannot_share(suite, chain, tmp_path):
    """Rows that do not divide evenly: which numbers would, where there are no such."""
    pairs = ["--data", chain / "reward" / "comparisons.jsonl"]
    for script, flags, *words in (
            ("data.pretrain", ["--batch_size", 1], "1 rows a step", "2 would (--batch_size"),
            ("cai.py", [], "one process"),
            ("sft.py", ["--init", chain / "base", "--batch_size", 15], "--batch_size 15",
             "--batch_size 14 would"),
            ("dpo.py", ["--init", chain / "sft", *pairs, "--loss", "kto", "--batch_size", 9],
             "--batch_size 8 would"),
            ("dpo.py", ["--init", chain / "sft", *pairs, "--batch_size", 9], "--batch_size 9",
             "--batch_size 8 would"),
            ("ppo.py", ["--init", chain / "sft", "--reward", "gold", "--rollouts", 20],
             "--rollouts 20", "16 would")):
        for r in map(suite.finish, together(suite.start, 2, script, *flags, "--out", tmp_path / script)):
            assert r.rc == 1 and all(word in r.err for word in words) and "Traceback" not in r.err, r
        assert not (tmp_path / script / "config.json").exists()


# ------------------------------------------------------------------------------------------------------------
# 11. The rule of runs: nothing is overwritten, nothing is lost.


def command_of(chain, name):
    """What made a folder of the chain."""
    script, *flags = CHAIN[name]
    return [script, "--out", chain / name, *flags]


@pytest.mark.parametrize("name", CHAIN)
def test_a_second_run_does_not_start_over(suite, chain, name):
    """One with the same flags shows the table and ends; one with others is refused in one sentence that says
    which. No byte in the folder changes."""
    before = snapshot(chain / name)
    flags = {"base": "--steps 40", "ppo": "--kl_coef 0.2"}.get(name, "--lr 0.002").split()
    commands = [command_of(chain, name), [*command_of(chain, name), "--save_every", 7],
                [*command_of(chain, name), *flags], [*command_of(chain, name), "--seed", SEED + 3]]
    same_flags, also, other_flags, other_seed = [suite.run(*command) for command in commands]
    for r in (same_flags, also):
        assert r.rc == 0 and r.err == "" and f"{chain / name} is finished" in r.out, r
        rows = dict(line.split(maxsplit=1) for line in r.out.splitlines()[-20:] if line[:1].strip())
        assert (f"{result_of(chain / name)['after']['length' if name != 'reward' else 'accuracy']:.3f}"
                in rows["length" if name != "reward" else "accuracy"])
    fails(other_flags, chain / name, flags[0], flags[1], "--out", "--overwrite")
    fails(other_seed, chain / name, f"--seed was {SEED}, now {SEED + 3}")
    assert snapshot(chain / name) == before


def test_overwrite_begins_anew(suite, chain, tmp_path):
    """As if the folder were empty, whatever run it holds."""
    flags = ["sft.py", "--init", chain / "base", "--max_steps", 2, "--max_new", 8, "--dtype", "float32"]
    shutil.copytree(chain / "sft", tmp_path / "x")
    suite.ok(*flags, "--out", tmp_path / "new")
    suite.ok(*flags, "--out", tmp_path / "x", "--overwrite")
    same(tmp_path / "new", tmp_path / "x")
    assert (tmp_path / "new" / "samples.txt").read_text() == (tmp_path / "x" / "samples.txt").read_text()
    fails(suite.run("dpo.py", "--init", chain / "sft", "--data", chain / "reward" / "comparisons.jsonl",
                    "--out", tmp_path / "x"), "sft made it")


def test_own_data_leaves_the_chain_alone(suite, chain, tmp_path):
    """`python sft.py --data mine.jsonl` writes to out/mine/sft, from where `python reward.py` does not
    start."""
    (tmp_path / "out").mkdir()
    shutil.copytree(chain / "base", tmp_path / "out" / "base")
    shutil.copytree(chain / "sft", tmp_path / "out" / "sft")
    before = snapshot(tmp_path / "out")
    write(tmp_path / "mine.jsonl", [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(40)])
    r = suite.ok("sft.py", "--data", "mine.jsonl", "--held_out", 0.2, "--max_steps", 1, "--max_new", 8,
                 cwd=tmp_path)
    assert "out/mine/sft" in r.out and (tmp_path / "out" / "mine" / "sft" / "result.json").exists()
    assert {path: data for path, data in snapshot(tmp_path / "out").items()
            if "mine" not in path.parts} == before
    for script, flags, out in (("sft.py", {}, "out/sft"), ("sft.py", {"data": "x"}, "out/mine/sft"),
                               ("ppo.py", {"init": "gpt2"}, "out/mine/ppo"),
                               ("data.pretrain", {}, "out/base"),
                               ("data.pretrain", {"data": "x.txt"}, "out/mine/base"),
                               ("cai.py", {}, "out/cai")):
        module = module_of(script)
        assert flags_py.default_out(module.Config(**flags),
                                    script.removesuffix(".py").removeprefix("data.")) == out


@pytest.mark.parametrize("script", [*SCRIPTS, "cai.py"])
def test_a_second_run_beside_the_first_writes_nothing(suite, chain, tmp_path, script):
    """While another run holds the folder, not even --overwrite touches a file in it."""
    folder = tmp_path / "x"
    shutil.copytree(chain / FOLDERS.get(script, "ppo"), folder)
    (folder / "round1").mkdir(exist_ok=True)
    (folder / "round1" / "chains.jsonl").write_text("")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(
        json.dumps(record | {"files": record["files"] + ["round1/chains.jsonl"]}))
    (tmp_path / "base").symlink_to(chain / "base")
    before = snapshot(folder)
    with open(folder / ".lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        own = [] if script == "cai.py" else links(script, chain)
        r = suite.run(script, *own, "--out", folder, "--seed", 9, "--overwrite")
        assert r.err == f"error: {folder}: another run is writing there; choose another --out\n" and r.rc == 1
        assert snapshot(folder) == before


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_run_with_other_data_is_refused(suite, chain, tmp_path, script):
    """What has been kept belongs to the rows of the data, the flags and the models it was made with."""
    rows = [{"prompt": f"What is {i}?"} for i in range(40)]
    for i, row in enumerate(rows):
        if script == "sft.py":
            row["completion"] = f"It is {i}."
        elif script != "ppo.py":
            row |= {"chosen": f"It is {i}.", "rejected": f"No {i}."}
    shutil.copytree(chain / "sft", tmp_path / "init")
    data, out = write(tmp_path / "d.jsonl", rows), tmp_path / "x"
    flags = [script, "--init", tmp_path / "init", "--data", data, "--out", out, "--max_new", 8]
    flags += ["--reward", chain / "reward", "--rollouts", 8] if script == "ppo.py" else ["--held_out", 0.2]
    suite.ok(*flags, "--max_steps", 1)
    before = snapshot(out)

    # Reordered, one fewer, one more; then another flag, another model, and at last the same again, which goes
    # on.
    for other in ([*rows[1:], rows[0]], rows[:-1], [*rows, rows[0] | {"prompt": "And?"}]):
        write(data, other)
        fails(suite.run(*flags, "--max_steps", 2), out, f"{data} has changed since")
    write(data, rows)
    fails(suite.run(*flags, "--max_steps", 2, "--max_new", 9), "--max_new was 8, now 9")
    shutil.copy(chain / "dpo" / "model.safetensors", tmp_path / "init" / "model.safetensors")
    fails(suite.run(*flags, "--max_steps", 2), f"{tmp_path / 'init'} has changed since")
    assert snapshot(out) == before
    shutil.copy(chain / "sft" / "model.safetensors", tmp_path / "init" / "model.safetensors")
    suite.ok(*flags, "--max_steps", 2)
    assert len(log_of(out)) == 2


def half_saved(folder):
    """Undo the last moves of a save: as if the process had been killed in the midst of it, after it
    counted."""
    (folder / "state.pt").rename(folder / ".state.pt.new")
    (folder / ".commit").write_text(json.dumps({"files": ["state.pt"]}))


def test_a_save_that_was_cut_off_is_no_new_run(suite, chain, tmp_path):
    """It counts for the rule as well: other flags are refused, the same go on, --overwrite begins anew."""
    flags = ["sft.py", "--init", chain / "base", "--max_new", 8, "--dtype", "float32", "--save_every", 1,
             "--max_steps", 3]
    suite.ok(*flags, "--out", tmp_path / "whole")
    assert "after step 2" in suite.finish(suite.start_and_stop(2, *flags, "--out", tmp_path / "x")).err
    half_saved(tmp_path / "x")
    fails(suite.run(*flags, "--out", tmp_path / "x", "--seed", 1), "--seed was 0, now 1")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    if not (tmp_path / "y" / ".commit").exists():
        half_saved(tmp_path / "y")
    r = suite.ok(*flags, "--out", tmp_path / "x")
    assert "going on after step 2" in r.out
    same(tmp_path / "whole", tmp_path / "x")
    suite.ok(*flags, "--out", tmp_path / "y", "--overwrite")
    same(tmp_path / "whole", tmp_path / "y")


def test_a_longer_run_is_not_finished_while_it_goes_on(suite, chain, tmp_path):
    """result.json, which tells a finished run, is that of the checkpoint beside it."""
    flags = ["--init", chain / "base", "--max_new", 8, "--epochs", 50, "--save_every", 1,
             "--out", tmp_path / "x"]
    suite.ok("sft.py", *flags, "--max_steps", 1)
    job, end = suite.start("sft.py", *flags), time.time() + 60
    while load_step(tmp_path / "x") < 2:
        assert time.time() < end and not (job / "rc").exists()
        time.sleep(0.01)
    suite.kill(job)
    assert not (tmp_path / "x" / "result.json").exists() and chain_py.unfinished(tmp_path / "x")


def load_step(folder):
    """How many rows the log has."""
    return len((folder / "log.jsonl").read_text().splitlines())


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """Such as the scratch space of many clusters: said, and the run goes on."""
    def flock(file, how):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(run_py.Run, "catch_signals", lambda run: None)
    run_py.Run.open(module_of("sft.py").Config(out=str(tmp_path / "x")), "sft").make_room()
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'x'}: ") and "locks" in said and "Function not implemented" in said
    assert (tmp_path / "x" / "run.json").exists()


def test_the_time_left_knows_that_steps_differ(tmp_path, capsys):
    """Ten seconds for a tenth of the run leave ninety, whatever share of the steps that was."""
    run = run_py.Run(module_of("cai.py").Config(out=str(tmp_path)), "cai")
    run.begin(3, tok=None)
    for gone, done, left in ((10, 0.1, "1:30 left"), (10, None, "0:20 left"), (59.7, 0.5, "1:00 left")):
        run.loop_start, run.shown = time.perf_counter() - gone, 0
        run.log(0, done=done, gold=0.5)
        assert left in capsys.readouterr().out      # the last one was "0:60 left"


def test_the_seconds_of_earlier_sessions_count(tmp_path, monkeypatch):
    """A run that was broken off 100 s after its start and goes on took those 100 s too: only the last session
    counted."""
    monkeypatch.setattr(folder_py, "lock", lambda folder: None)      # this process has it twice
    monkeypatch.setattr(run_py.Run, "catch_signals", lambda run: None)
    monkeypatch.setattr(run_py, "save",
                        lambda folder, model, tok, state: torch.save(state, folder / "state.pt"))
    model = GPT(GPTConfig(n_layer=1, n_embd=32))
    for session in (1, 2):
        run = run_py.Run.open(module_of("sft.py").Config(out=str(tmp_path / "x")), "sft")
        assert run.first == session - 1
        run.begin(9, None, policy=(model, torch.optim.SGD(model.parameters())))
        run.start -= 100
        run.save(run.first)
        assert 100 * session <= load_state(tmp_path / "x")["seconds"] < 100 * session + 90

    # One that --max_steps ended measured for 40 s after its last save.
    (tmp_path / "x" / "result.json").write_text('{"seconds": 240, "config": {"max_steps": 2}}')
    run = run_py.Run.open(module_of("sft.py").Config(out=str(tmp_path / "x")), "sft")
    assert 240 <= time.perf_counter() - run.start < 330


# ------------------------------------------------------------------------------------------------------------
# 12. README, and the sizes that keep the files readable.

COMMANDS = sorted({m[0] for m in re.findall(r"((python|torchrun) [^`\n]+?\.?)(?=`|\n| && )",
                                            (ROOT / "README.md").read_text(encoding="utf-8"))})


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_are_understood(command):
    """Every flag of every command in README exists and takes the value shown, in the script that it names."""
    words = shlex.split(re.sub(r"\b(N|M)\b", "1", command))
    if words[0] == "torchrun":
        words = ["python"] + [w for w in words[1:] if not w.startswith("--nproc_per_node")]
    if words[1:3] in (["-m", "pytest"], ["-m", "data.world.build"], ["-m", "data.page"]):
        return
    is_module = words[1] == "-m"
    module, args = ((words[2], words[3:]) if is_module
                    else (words[1].removesuffix(".py").replace("/", "."), words[2:]))
    assert is_module or (ROOT / words[1]).exists()
    if module in ("data.chat", "data.evaluate"):   # which take paths first
        while args and not args[0].startswith("-"):
            args = args[1:]
    parse_flags(import_module(module).Config, "", args)


@pytest.mark.parametrize("start, stdin, word", [
    ("python -m data.chat", "What is the capital of Kenya?\n", "model>"),
    ("python ppo.py --inspect", "", "whitened"),
    ("python -m data.vote", "q\n", "votes in"),
    ("python -m data.evaluate out/base out/sft out/ppo", "", "gold")])
def test_quick_readme_commands_run(suite, chain, tmp_path, start, stdin, word):
    """As printed, in a folder where out/ holds a finished chain."""
    words = next((command for command in COMMANDS if command.startswith(start)), start).split()[1:]
    if words[0] == "-m":
        words = words[1:]
    shutil.copytree(chain, tmp_path / "out")
    r = suite.ok(*words, cwd=tmp_path, stdin=stdin)
    assert word in r.out, r.out[-500:]


def test_the_world_is_made_by_a_command(suite, tmp_path):
    root = copy_suite(tmp_path / "suite")
    r = subprocess.run([sys.executable, "-m", "data.world.build", "--overwrite"], cwd=root, env=suite.env,
                       capture_output=True, text=True)
    assert r.returncode == 0 and "corpus.txt" in r.stdout and r.stderr == "", r
    for path in (ROOT / "data" / "world" / "tiny").iterdir():
        assert (root / "data" / "world" / "tiny" / path.name).read_bytes() == path.read_bytes()


STAGES = ["sft", "reward", "ppo", "dpo", "cai"]
FRONT = [f"{name}.py" for name in ["model", *STAGES]]                  # what is read first
BEHIND = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "data").rglob("*.py"))


def parts_of(tree, *kinds):
    """The nodes of some kinds in a syntax tree."""
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def tree_of(path):
    """The syntax tree of one of our files."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_name(path):
    """data.run for data/run.py, data for data/__init__.py."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


OURS = {module_name(path) for path in FRONT + BEHIND}


def modules_imported(tree):
    """The modules that a file imports, anywhere in it, by their full names."""
    names = set()
    for node in parts_of(tree, ast.Import):
        names |= {alias.name for alias in node.names}
    for node in parts_of(tree, ast.ImportFrom):
        inside = {f"{node.module}.{alias.name}" for alias in node.names} & OURS      # from data import run
        names |= inside or {node.module}
    return names


def too_hard_to_read(path):
    """What is wrong with a file, in sentences: loose bounds on what makes it hard to read (the tight ones are
    a matter of taste)."""
    text, tree, wrong = (ROOT / path).read_text(encoding="utf-8"), tree_of(path), []
    most_dense, least_comments = (6, 12) if path in FRONT else (8, 5)
    lines, loops = (text.splitlines(),
                    parts_of(tree, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
    functions = parts_of(tree, ast.FunctionDef)
    dense = len(loops) + len(parts_of(tree, ast.IfExp))
    if 100 * dense / len(lines) >= most_dense:
        wrong.append(f"{dense} comprehensions and conditional expressions in {len(lines)} lines")
    with open(ROOT / path, encoding="utf-8") as f:
        comments = {token.start[0] for token in tokenize.generate_tokens(f.readline)
                    if token.type == tokenize.COMMENT}
    if len(lines) > 60 and 100 * len(comments) / len(lines) <= least_comments:
        wrong.append(f"{len(comments)} of {len(lines)} lines have a comment")
    wrong += [f"line {i} is longer than 110 columns" for i, line in enumerate(lines, 1) if len(line) > 110]
    wrong += [f"line {node.lineno}: a comprehension with two `for`s"
              for node in loops if len(node.generators) > 1]
    wrong += [f"line {node.lineno}: a lambda kept in a name" for node in parts_of(tree, ast.Assign)
              if isinstance(node.value, ast.Lambda)]
    for call in parts_of(tree, ast.Call):
        if any(isinstance(arg, ast.NamedExpr) for arg in call.args):
            wrong.append(f"line {call.lineno}: a walrus in an argument")
    for node in functions:
        names = [arg.arg for arg in node.args.args + node.args.kwonlyargs if arg.arg not in ("self", "cls")]
        if len(names) > 8:
            wrong.append(f"{node.name} has {len(names)} parameters")
        n_lines = node.end_lineno - node.lineno + 1
        # steps and comments of one iteration
        if n_lines > (128 if path == "ppo.py" and node.name == "main" else 120):
            wrong.append(f"{node.name} has {n_lines} lines")
    return wrong


@pytest.mark.parametrize("path", FRONT + BEHIND)
def test_a_file_is_readable_in_one_sitting(path):
    """The stages and model.py, and what they call in data/, which otherwise becomes denser than they are."""
    wrong = too_hard_to_read(path)
    assert not wrong, wrong


# What Python's own library got after 3.10, by the names that are new.
NEWER = set("""tomllib ExceptionGroup BaseExceptionGroup TaskGroup UTC StrEnum ReprEnum Self LiteralString
    Never override assert_never reveal_type Required NotRequired Unpack TypeVarTuple TypeAliasType batched
    sumprod cbrt exp2 file_digest add_note binomialvariate full_match from_uri is_junction
    isjunction walk_up onexc process_cpu_count""".split())


def test_every_file_runs_on_the_oldest_python():
    """Otherwise syntax or a call of a newer Python is only noticed where the old one is installed."""
    [oldest] = re.findall(r'^requires-python = ">=3\.(\d+),<', (ROOT / "pyproject.toml").read_text(), re.M)
    assert oldest == "10", "NEWER is what came after 3.10"
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, int(oldest)))
        names = ({node.attr for node in parts_of(tree, ast.Attribute)}
                 | {node.id for node in parts_of(tree, ast.Name)})
        names |= {node.arg for node in parts_of(tree, ast.keyword)}
        for node in parts_of(tree, ast.Import, ast.ImportFrom):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        assert not names & NEWER, f"{path}: {names & NEWER}"
        for node in parts_of(tree, ast.Attribute):   # Path.walk came in 3.12; those of os and ast are older
            assert node.attr != "walk" or ast.unparse(node.value) in ("os", "ast"), f"{path}:{node.lineno}"


def test_versions_stand_in_one_place():
    """pyproject.toml has the ranges; the pinned torch and what runs here lie within them, and README names no
    other."""
    text = (ROOT / "pyproject.toml").read_text()
    [pin] = re.findall(r"^torch==(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), re.M)
    here = re.match(r"(\d+)\.(\d+)", torch.__version__).groups()
    for name, versions in (("requires-python = ", [sys.version_info[:2]]), ('"torch', [pin, here])):
        [bounds] = re.findall(rf'{name}"?>=(\d+)\.(\d+),<(\d+)\.(\d+)"', text)
        low, high = tuple(map(int, bounds[:2])), tuple(map(int, bounds[2:]))
        assert all(low <= tuple(map(int, version)) < high for version in versions), (name, versions)
        readme = (ROOT / "README.md").read_text()
        told = re.findall(r"Python (\d+)\.(\d+) to (\d+)\.(\d+)" if "python" in name else
                          r"torch (\d+)\.(\d+) to (\d+)\.(\d+)", readme)
        for a, b, c, d in told:
            assert (int(a), int(b)) == low and (int(c), int(d) + 1) == high, readme


def test_imports_run_one_way():
    """Stages import data and model, data imports model and no stage, model imports torch alone: otherwise
    nothing can be read by itself. ppo.py's sixth step is reward.py's update, so it may import that."""
    # regex comes with tiktoken
    libraries = set(sys.stdlib_module_names) | {"torch", "numpy", "tiktoken", "regex"}
    for path in FRONT + BEHIND:
        name, imported = module_name(path), modules_imported(tree_of(path))
        roots = {other.split(".")[0] for other in imported}
        if name == "model":
            assert roots <= {"torch", *sys.stdlib_module_names}
        elif name == "ppo":
            assert roots <= libraries | {"model", "data", "reward"}
        else:
            assert roots <= libraries | {"model", "data"}, f"{path} imports {roots & set(STAGES)}"


def test_no_circles():
    """Otherwise none of the modules of a circle can be understood before the others."""
    below = {module_name(path): modules_imported(tree_of(path)) & OURS for path in FRONT + BEHIND}
    while free := {name for name, imported in below.items() if not imported - {name}}:
        below = {name: imported - free for name, imported in below.items() if name not in free}
    assert not below, f"these import each other: {below}"


def test_the_loop_is_in_sight():
    """Backward pass, clip and optimizer step stand in the main of every stage that has a loop of its own."""
    for name in STAGES[:-1]:
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        [main] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        called = {ast.unparse(node.func).split(".")[-1] for node in parts_of(main, ast.Call)}
        assert {"backward", "clip_grad_norm_", "step", "zero_grad", "set_lr"} <= called, name
    assert {path.name for path in ROOT.glob("*.py")} == {f"{name}.py" for name in ["model", *STAGES]}
