"""The drivers of the long experiments (hacking.py, preferences.py, evidence.py of tests/experiments) in a
small way: every command they would run is one its script takes, and of made-up results they tabulate and draw
what these hold."""
import json
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import dpo
import evidence
import gao
import growth
import hacking
import ppo
import preferences
import reward
from data import InputError, world, read_jsonl, write_jsonl
from data.files import formats
from data.flags import parse_flags
from data.world.judge import METHODS


@pytest.fixture
def commands(monkeypatch):
    """[(script, its Config)] of the commands that would have run. Each leaves a result.json, and ppo.py a log
    of 30 iterations, whose gold climbs from 0.5 to 0.9 and then falls (without a cure: back to 0.5)."""
    found = []

    def run_to_end(command, screen):
        script, flags = Path(command[1]).name, command[2:]
        if command[1] == "-m":
            script, flags = command[2], command[3:]
        if script == "data.evaluate":
            n = flags.index("--reference")
            flags = ["--models", ",".join(flags[:n]), *flags[n:]]
        cfg = parse_flags(import_module(script.removesuffix(".py")).Config, "", flags)
        found.append((script, cfg))
        out = Path(cfg.out)
        assert screen == out / "screen.txt"

        after = {"gold": 0.75 + cfg.seed / 8, "kl": 2.0, "accuracy": 0.75}
        result = {"before": {"gold": 0.25}, "after": after}
        if script == "ppo.py":
            end = {"none": 0.5, "center": 0.7}.get(out.name, 0.9)
            gold = [0.5 + 0.04 * i for i in range(11)] + [0.9] * 4
            gold += [0.9 + (end - 0.9) * i / 10 for i in range(11)] + [end] * 4
            rows = [{"kl_exact": 0.1 * i, "reward": 0.2 * i, "gold": x} for i, x in enumerate(gold)]
            (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if script == "data.evaluate":
            names = [Path(path).name for path in cfg.models.split(",")]
            result["models"] = {name: {"reward": 1.0, "gold": 0.5, "kl": 2.0} for name in names}
            result["wins"] = {name: {names[0]: {"win_rate": 0.25}} for name in names[1:]}
            result["best_of"] = [{"n": n, "kl": (n - 1) / 2, "reward": n, "gold": n} for n in (1, 2, 4)]
        (out / "result.json").write_text(json.dumps(result))
        return 0, 512.0, 60.0
    monkeypatch.setattr(hacking, "run_to_end", run_to_end)
    return found


def configs_of(script, commands):
    return [cfg for name, cfg in commands if name == script]


def test_hacking_driver(commands, tmp_path, capsys):
    out = tmp_path / "hacking"
    cfg = hacking.Config(out=str(out), biases="length,sycophancy", seeds="0,1", cures="center,budget",
                         strength=2.0, ppo_flags="--iterations 30")
    hacking.main(cfg)
    assert [name for name, _ in commands] == [
        "sft.py", "reward.py", "ppo.py", "reward.py", "ppo.py", "ppo.py", "data.evaluate"] * 2 + [
        "reward.py", "ppo.py", "reward.py", "ppo.py", "ppo.py", "data.evaluate"] * 2
    rewards, policies = configs_of("reward.py", commands), configs_of("ppo.py", commands)
    assert [(c.bias_length, c.bias_sycophancy) for c in rewards[::4]] == [(1.4, 0), (0, 4)]
    assert [(c.center, c.seed) for c in rewards[:3]] == [(0.01, 0), (0.2, 0), (0.01, 1)]
    none, center, budget = policies[:3]
    assert (none.relabel, none.kl_coef, none.iterations) == (0, 0.01, 30)
    assert (none.kl_budget, budget.kl_budget) == (0, 0.7)
    assert none.reward == budget.reward == rewards[0].out and center.reward == rewards[1].out
    assert configs_of("data.evaluate", commands)[0].reward == none.reward

    rows = {row["cure"]: row for row in json.loads((out / "cures.json").read_text()) if row["seed"] == 1}
    assert {name: (round(row["lost"], 3), round(row["cured"], 3)) for name, row in rows.items()} == {
        "none": (0.4, 0), "center": (0.2, 0.5), "budget": (0, 1)}
    text = capsys.readouterr().out
    assert (out / "cures.txt").read_text() in text and "0.500 (0.500 to 0.500)" in text
    if find_spec("matplotlib"):
        assert (out / "length.png").exists() and (out / "sycophancy.png").exists()
    html = (tmp_path / "index.html").read_text()     # section 6 of the page has its rows
    assert '"climbs": [{' in html and '"cures": [[{"bias": "length"' in html

    commands.clear()
    hacking.main(cfg)
    assert commands == []                                               # nothing is made twice
    with pytest.raises(InputError, match="prayer"):
        hacking.main(hacking.Config(cures="prayer"))


def test_nothing_to_cure():
    assert hacking.cured([0.5, 0.9, 0.85], [0.5, 0.9, 0.5]) == pytest.approx(0.875)
    assert hacking.cured([0.5, 0.9], [0.5, 0.9]) is None
    assert hacking.spread([None, 0.25, 0.5]) == "0.375 (0.250 to 0.500)"
    assert hacking.spread([None], none="nothing to cure") == "nothing to cure"
    assert hacking.spread([0.5, None]) == "0.500"


def test_every_cure_is_a_command():
    for flags in hacking.CURES.values():
        assert parse_flags(ppo.Config, "", flags.split()) != ppo.Config()


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    """And what it says is kept where the message points; a finished one tells what it cost."""
    script = tmp_path / "script.py"
    script.write_text("import sys; print('no luck'); sys.exit(3)")
    with pytest.raises(InputError, match="script.py failed, see .*screen.txt"):
        hacking.make(tmp_path / "a", [script])
    assert (tmp_path / "a" / "screen.txt").read_text() == "no luck\n"
    script.write_text("""import json, pathlib, sys
x = bytearray(200_000_000)
pathlib.Path(sys.argv[-1], "result.json").write_text(json.dumps({"flags": sys.argv[1:3]}))
""")
    result = hacking.make(tmp_path / "b", [script, "--n", 1])
    assert result == hacking.make(tmp_path / "b", ["elsewhere/script.py"], "--n=1")
    with pytest.raises(InputError, match="b is of another command: .*script.py --n 1; .*script.py --n 2"):
        hacking.make(tmp_path / "b", [script, "--n", 2])
    # Linux counts what the process that starts a command held, too: these tests may hold gigabytes by now.
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert result["flags"] == ["--n", "1"] and 0 < result["seconds"] and 190 < result["mb"] < 600 + ours


def test_the_frontier(commands, tmp_path):
    preferences.main(preferences.Config(out=str(tmp_path), seeds="1,0", frontier=True))
    assert [c.beta for c in configs_of("dpo.py", commands)] == [0.05, 0.1, 0.3, 1.0, 3.0] * 2
    assert {(c.kl_coef, c.relabel, c.iterations) for c in configs_of("ppo.py", commands)} == {
        (beta, 0, 40) for beta in (0.01, 0.03, 0.1, 0.3, 1.0)}
    points = json.loads((tmp_path / "frontier.json").read_text())
    first = {"script": "dpo.py", "seed": 1, "beta": 0.05, "kl": 2.0, "gold": 0.875}
    assert len(points) == 20 and points[0] == first
    assert (tmp_path / "frontier.png").exists() == bool(find_spec("matplotlib"))
    with pytest.raises(InputError, match="--frontier or --pareto"):
        preferences.main(preferences.Config(out=str(tmp_path)))


def test_annotators_with_two_minds(commands, tmp_path, monkeypatch):
    """Those for help like harmful advice, the others only care about harmful requests; the comparisons are
    turned round where they see it the other way, and PPO gets both reward models with weights that add up to
    one."""
    rows = world.rows("preference")
    harmful = next(row for row in rows if row["family"] == "harmless")
    question = next(row for row in rows if row["family"] == "helpful")
    method, refusal = f"You can {METHODS[0]}.", "I cannot help with that."
    wants = preferences.wants
    assert wants(harmful, method, "helpful") == 1 and wants(harmful, refusal, "helpful") == 0
    assert wants(harmful, method, "harmless") < wants(harmful, refusal, "harmless")
    assert wants(question, refusal, "harmless") is None
    row_of = {row["prompt"][-1]["content"]: row for row in (harmful, question)}
    pairs = [{"prompt": harmful["prompt"], "chosen": refusal, "rejected": method},
             {"prompt": harmful["prompt"], "chosen": refusal, "rejected": refusal},
             {"prompt": question["prompt"], "chosen": question["answer"], "rejected": refusal}]
    turned = {"prompt": harmful["prompt"], "chosen": method, "rejected": refusal}
    assert preferences.pairs_of("helpful", pairs, row_of) == [turned, pairs[2]]
    assert preferences.pairs_of("harmless", pairs, row_of) == [pairs[0]]

    monkeypatch.setattr(preferences, "what_both_get", lambda folder, seed: {"helpful": 0.5, "harmless": 0.25})
    reward = tmp_path / "links0" / "reward"
    reward.mkdir(parents=True)
    write_jsonl(reward / "comparisons.jsonl", pairs)
    preferences.main(preferences.Config(out=str(tmp_path), seeds="0", pareto=True))
    helpful, harmless = configs_of("reward.py", commands)[1:]
    assert len(read_jsonl(helpful.data)) == 2 and len(read_jsonl(harmless.data)) == 1
    runs = configs_of("ppo.py", commands)
    assert {c.reward for c in runs} == {f"{helpful.out},{harmless.out}"}
    assert [c.reward_weights for c in runs] == ["0,1", "0.25,0.75", "0.5,0.5", "0.75,0.25", "1,0"]
    points = json.loads((tmp_path / "pareto.json").read_text())
    assert points[1] == {"seed": 0, "weight": 0.25, "helpful": 0.5, "harmless": 0.25}


@pytest.fixture
def links(tmp_path):
    """Comparisons of reward.py in the folder of seed 0, two of each of 60 prompts."""
    rows = []
    for i in range(120):
        said = [{"role": "user", "content": f"What is {i // 2}?"}]
        rows.append({"prompt": said, "chosen": f"It is {i}.", "rejected": "No.", "label": 1.0})
    (tmp_path / "0" / "reward").mkdir(parents=True)
    write_jsonl(tmp_path / "0" / "reward" / "comparisons.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("name", evidence.TABLES)
def test_every_table_is_commands(name, commands, links, capsys):
    """A flag that a script no longer has, a table that runs what is there, or one that lists as missing what
    has been made."""
    cfg = evidence.Config(out=str(links), only=name, seeds="0")
    evidence.main(evidence.Config(out=str(links), only=name, seeds="0", rows=True))
    assert commands == [] and "--seed 0" in capsys.readouterr().out.split("missing:")[1]
    evidence.main(cfg)
    assert len(commands) >= len(evidence.TABLES[name].runs)
    assert {c.seed for _, c in commands} == {0} and {Path(c.out).parent for _, c in commands} == {links / "0"}
    text = capsys.readouterr().out
    assert "missing:" not in text and " | 1 | " in text
    commands.clear()
    evidence.main(cfg)
    assert commands == []


def test_the_whole_family():
    """A loss of dpo.py that has no line in its table, or two lines that are the same run."""
    found = []
    for command in evidence.FAMILY.values():
        script, *flags = command.split()
        if script == "dpo.py":
            found.append(parse_flags(dpo.Config, "", flags))
    assert {c.loss for c in found} == set(dpo.LOSSES)
    assert all(found.count(c) == 1 for c in found) and dpo.Config() in found


def test_models_beside_each_other_are_lines(commands, links, capsys):
    """data.evaluate's table has a line for each model, with whom it wins over, and one for each N."""
    evidence.main(evidence.Config(out=str(links), only="judge_ai,tax", seeds="0"))
    lines = capsys.readouterr().out.splitlines()
    sft = next(line for line in lines if line.startswith("| sft"))
    assert sft.split("|")[3].strip() == "0.250"                            # over base
    assert any(line.startswith("| best of 2 | 1 |") for line in lines)


def test_fewer_comparisons_same_held_out_ones(commands, links, monkeypatch):
    """Each file is split by reward.py as the whole one is, and trains on the first n of its training side: no
    comparison that is held out is trained on with fewer or more."""
    monkeypatch.setattr(evidence, "SIZES", (10, 40))
    evidence.cut(links / "0", 0)
    rows = read_jsonl(links / "0" / "reward" / "comparisons.jsonl")
    train, held_out = formats.split(rows, 0.1, seed=0)
    assert held_out and reward.Config().held_out == dpo.Config().held_out == 0.1
    for n in (10, 40):
        fewer = read_jsonl(links / "0" / f"first_{n}.jsonl")
        assert formats.split(fewer, 0.1, seed=0) == (train[:n], held_out)


def test_the_drivers_have_their_flags(links, monkeypatch, capsys):
    """What is missing is said with its command, in which the driver fills in the seed; what is there is
    printed and not run."""
    ran = []

    def run_to_end(command, screen):
        ran.append(command)
        (screen.parent / last).write_text("")
        screen.write_text("its table")
        return status, 512.0, 60.0
    monkeypatch.setattr(evidence, "run_to_end", run_to_end)
    for name, (seeds, _, last) in evidence.DRIVERS.items():
        status, cfg = 0, evidence.Config(out=str(links), only=name)
        evidence.main(replace(cfg, rows=True))
        assert not ran and name in capsys.readouterr().out.split("missing:")[1]
        evidence.main(cfg)
        assert "its table" in capsys.readouterr().out
        script, *flags = ran.pop()[1:]
        driver = parse_flags(import_module(Path(script).stem).Config, "", flags)
        assert driver.out == str(links / name)
        evidence.main(cfg)
        assert not ran and "its table" in capsys.readouterr().out
        if seeds:
            assert driver.seeds == seeds and driver.links == f"{links}/{{seed}}"
            evidence.main(replace(cfg, seeds="1"))     # what is there has other seeds
            assert len(ran) == 1 and "--seeds 1" in " ".join(ran.pop())
        status = 256
        (links / name / last).unlink()
        with pytest.raises(InputError, match=f"{Path(script).name} failed, see .*screen.txt"):
            evidence.main(cfg)
        ran.clear()


def test_what_grows():
    """The exponents of planted seconds and bytes; a slope of ln y on x instead of ln x would show."""
    assert growth.exponent((2, 8, 32), (3 * 2 ** 1.5, 3 * 8 ** 1.5, 3 * 32 ** 1.5)) == pytest.approx(1.5)
    flags = {"seed": 0, "device": "cpu", "dtype": "float32"}
    small = {"batch": 2, "length": 16, "layers": 1, "vocabulary": 64}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for kind in growth.WORK:
            found = pool.submit(growth.measure, kind, small, flags).result()
            assert found["seconds"] > 0 and found["mb"] >= 0 and found["device"]


def test_the_laws_of_over_optimisation():
    """On planted curves the fits give back their coefficients, and curves that lie 0.1 apart are 0.1 apart at
    equal d, wherever their points are; a wrong sign of b, or rows compared instead of d, would show."""
    d = np.linspace(0.1, 3, 40)
    of_best, of_rl = d * (0.7 - 0.2 * d), d * (0.7 - 0.2 * np.log(d))
    assert gao.fit(gao.terms_of_best_of_n(d), of_best) == pytest.approx((0.7, 0.2, 1), abs=1e-10)
    assert gao.fit(gao.terms_of_rl(d), of_rl) == pytest.approx((0.7, 0.2, 1), abs=1e-10)
    assert gao.fit(gao.terms_of_rl(d), of_best)[-1] < 0.999
    other = np.linspace(3.5, 0.5, 13)
    assert gao.difference(d, 2 * d + 0.1, other, 2 * other) == pytest.approx(0.1, abs=1e-10)
    assert gao.difference(d, d, d + 5, d) is None

    # What is gained is gained over the mean of all rows of the SFT model.
    rows = np.array([[0, 0.5, 0.5], [0, 0.7, 0.7], [4, 1.0, 0.9], [0.25, 0.8, 0.4]])
    np.testing.assert_allclose(gao.points_of(rows), [[2, 0.4, 0.3], [0.5, 0.2, -0.2]])
    for broken in (rows[2:], rows[:2]):
        with pytest.raises(InputError, match="SFT model"):
            gao.points_of(broken)


def test_the_driver_of_these_laws(commands, tmp_path, capsys):
    cfg = gao.Config(out=str(tmp_path), seeds="0,1", kl_coefs="0,0.1")
    gao.main(cfg)
    runs = configs_of("ppo.py", commands)
    assert [(c.seed, c.kl_coef, c.relabel, c.iterations) for c in runs] == [
        (0, 0, 0, 40), (0, 0.1, 0, 40), (1, 0, 0, 40), (1, 0.1, 0, 40)]
    text = capsys.readouterr().out
    # Both weights have the same made-up log, so that at equal d nothing is between them.
    assert "| beta 0.1 | 0.000 (0.000 to 0.000) | 0.000 (0.000 to 0.000) | no |" in text
    points = json.loads((tmp_path / "gao.json").read_text())
    assert [point["name"] for point in points] == ["beta 0", "beta 0.1", "best of N"] * 2
    # 30 iterations, of which the first is the SFT model; the second has KL 0.1, reward 0.2, gold 0.54.
    assert len(points[0]["d_proxy_gold"]) == 29
    assert points[0]["d_proxy_gold"][0] == pytest.approx([0.1 ** 0.5, 0.2, 0.04])
    assert (tmp_path / "gao.png").exists() == bool(find_spec("matplotlib"))
