"""tests/experiments/versus_trl.py: what it would run, and what it makes of planted results. TRL itself is not
needed."""
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hacking
import versus_trl
from data import InputError, read_jsonl, write_jsonl
from data.flags import parse_flags
from model import GPT, GPTConfig

ROOT = Path(versus_trl.__file__).parent


@pytest.fixture
def commands(monkeypatch):
    """[(python, script, its Config, or for TRL its flags)] of what would have run. Each leaves a result, and
    figures as if it had been measured: gold 0.5 and the seed / 4."""
    found = []

    def run_to_end(command, screen):
        python, script, *flags = command
        out = Path(flags[-1])
        if script.endswith("trl_trainers.py"):
            start = flags.index("--links")
            found.append((python, out.name, dict(zip(flags[start::2], flags[start + 1::2]))))
            row = {"objective/scores": 1.0, "objective/kl": 0.5, "gold": 0.25}
        else:
            found.append((python, out.name, parse_flags(import_module(Path(script).stem).Config, "", flags)))
            row = {"reward": 1.0, "kl": 0.5, "gold": 0.25}
        write_jsonl(out / "log.jsonl", [row, row])
        write_jsonl(out / "comparisons.jsonl", [
            {"prompt": [{"role": "user", "content": "Hi?"}], "chosen": "Yes.", "rejected": "No.",
             "label": label}
            for label in (1.0, 0.5)])
        (out / "result.json").write_text("{}")
        return 0, 512.0, 60.0

    def measure(path, folder, links, data):
        assert [row["label"] for row in read_jsonl(data)] == [1.0]                 # the tie is gone
        assert folder == (links / "sft" if path.parent.name == "sft" else path.parent)
        figures = {"gold": 0.5 + int(path.parents[1].name) / 4, "kl": 2.0, "accuracy": 0.75}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(figures))
    monkeypatch.setattr(hacking, "run_to_end", run_to_end)
    monkeypatch.setattr(versus_trl, "measure", measure)
    monkeypatch.setattr(versus_trl.os, "environ", dict(versus_trl.os.environ))
    return found


def test_both_sides_are_asked_for_the_same(commands, tmp_path, capsys):
    """All runs in their order; a flag that a script lacks, a side with other data or another seed, fp32 on
    one side only, figures of a wrong seed in a row, a run that is made twice."""
    cfg = versus_trl.Config(trl="their/python", out=str(tmp_path), seeds="0,2")
    versus_trl.main(cfg)
    for seed in "02":
        data = str(tmp_path / seed / "comparisons.jsonl")
        for python, name, flags in commands:
            if isinstance(flags, dict) and flags["--seed"] == seed:
                assert (python, flags["--data"]) == ("their/python", data)
                assert flags["--links"] == str(tmp_path / seed / "links")
            elif not isinstance(flags, dict) and str(flags.seed) == seed and "links" not in flags.out:
                assert flags.dtype == ("bfloat16" if name == "dpo_bf16" else "float32")
                assert flags.data == data or name.startswith("ppo")
    expected = []
    for name in versus_trl.RUNS:
        if name != "sft" and not name.startswith("reward"):      # reward is made for the links too
            expected += [name] * (1 if name in versus_trl.FIRST_SEED_ONLY else 2)
    assert [name for _, name, _ in commands if not name.startswith("reward")] == expected

    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| sft | 2 | 0.750 (0.500 to 1.000) |" in table
    assert "| ppo_trl | 2 | 0.750 (0.500 to 1.000) |  | 2.000 (2.000 to 2.000) |" in table
    assert "| reward | 2 | 0.750 (0.750 to 0.750) |" in table and "| dpo_trl_defaults | 1 | 0.500" in table
    rows = read_jsonl(tmp_path / "curves.jsonl")
    assert rows[0] == {"seed": "0", "run": "ppo", "episodes": 256, "cpu": 30.0, "reward": 1.0, "kl": 0.5,
                       "gold": 0.25}
    assert [row["cpu"] for row in rows if (row["run"], row["seed"]) == ("ppo_trl", "2")] == [30.0, 60.0]
    if find_spec("matplotlib"):
        assert (tmp_path / "figure.svg").exists()

    commands.clear()
    versus_trl.main(cfg)
    assert commands == []
    for wrong, words in ((versus_trl.Config(trl="x", only="ppo,pppo"), "pppo"),
                         (versus_trl.Config(), "--trl")):
        with pytest.raises(InputError, match=words):
            versus_trl.main(wrong)


def test_flags_of_the_other_side():
    """A flag or a method in RUNS that trl_trainers.py does not take."""
    text = (ROOT / "trl_trainers.py").read_text()
    for command in versus_trl.RUNS.values():
        if command.startswith("trl "):
            for word in command.split()[1:]:
                assert word[0].isdigit() or f'"{word}"' in text, word


def test_kl_of_answers_without_an_end():
    """A share of the mean that is divided by the wrong number, or of the wrong answers."""
    torch.manual_seed(0)
    cfg = GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_inner=32, head_dim=8, max_len=16,
                    vocab_size=12)
    policy, reference, tok = GPT(cfg), GPT(cfg), SimpleNamespace(pad_id=11, eos_ids={10})

    def figures(*ids):
        answers = SimpleNamespace(prompt_ids=[[1, 2]] * len(ids), ids=list(ids))
        with torch.no_grad():
            return versus_trl.of_kl(policy, reference, tok, answers)
    ended, endless = [3, 4, 10], [5, 6, 7, 8]
    one, two, both = figures(ended), figures(endless), figures(ended, endless)
    assert one["kl_endless"] == 0 < one["kl"] and two["kl_endless"] == two["kl"]
    assert both["kl"] == pytest.approx((one["kl"] + two["kl"]) / 2, rel=1e-4)
    assert both["kl_endless"] == pytest.approx(two["kl"] / 2, rel=1e-4)
    assert both["k1"] == pytest.approx((one["k1"] + two["k1"]) / 2, rel=1e-3, abs=1e-5)


def test_measure(chain, tmp_path, monkeypatch):
    """A name that another file no longer has, a figure that is missing, one that is not of this model."""
    monkeypatch.setattr(versus_trl, "DRAWS", 1)
    data = versus_trl.without_ties(tmp_path / "comparisons.jsonl", chain)
    found = {}
    for name in ("sft", "dpo", "reward"):
        found[name] = versus_trl.measure(tmp_path / name / "measured.json", chain / name, chain, data)
        assert versus_trl.measure(tmp_path / name / "measured.json", Path("gone"), chain, data) == found[name]
    policies, rewards = versus_trl.COLUMNS["policies"], versus_trl.COLUMNS["reward models"]
    assert set(policies) - {"cpu"} <= set(found["dpo"]) and set(rewards) - {"cpu"} <= set(found["reward"])
    assert found["sft"]["kl"] == found["sft"]["chosen"] == found["sft"]["rejected"] == 0 < found["dpo"]["kl"]
