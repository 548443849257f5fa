"""data/page.py: the page says what the files say, no text of a data set can run, nothing missing stops it."""
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from data import InputError, page

ROOT = Path(__file__).resolve().parents[1]
TEST_PROMPTS = ROOT / "data" / "world" / "tiny" / "test.jsonl"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--<script>",
           "\"quotes\" 'single' `tick` ${1}", "\u2028line\u2029paragraph", "\u202eright to left override",
           "مرحبا بالعالم שלום", "👩‍👩‍👧 🏳️‍🌈", "{{DATA}}", "back\\slash\\", "a" * 400,
           "nul\x00 and \ud800 half a pair", "\n\nHuman: two\n\nAssistant: turns", "&lt;b&gt; <b>bold</b>"]


# ------------------------------------------------------------------------------------------------------------
# A folder of runs as the scripts leave it, of realistic size, with hostile texts among the answers.


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def between(points, share):
    """The value at a share (0 to 1) of the way along points, with straight lines from one to the next."""
    at = min(int(share * (len(points) - 1)), len(points) - 2)
    return points[at] + (points[at + 1] - points[at]) * (share * (len(points) - 1) - at)


def write_run(folder, stage, steps, figures, before, after, config=None, planned=None, given=None):
    """log.jsonl and result.json of a run. Each of the figures {name: points} goes along its points. planned:
    the steps that a run which was cut short should have had; given: its flags."""
    rows = []
    for n in range(steps):
        row = {"step": n + 1}
        for name, points in figures.items():
            row[name] = between(points, n / (steps - 1))
        rows.append(row)
    write_lines(folder / "log.jsonl", rows)
    result = {"stage": stage, "seed": 0, "config": config or {}, "seconds": 144.4, "device": "cpu",
              "steps": steps, "planned": planned or steps, "given": given or {}, "before": before,
              "after": after}
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def scores(gold, **more):
    """Figures of a policy of this quality, as result.json has them."""
    return {"gold": gold, "helpful": gold - 0.1, "harmless": gold + 0.02, "honest": gold + 0.03, **more}


def fake_answers(rng, level):
    """answers.jsonl of a policy of this quality, on the tiny world's test prompts."""
    rows = []
    for i, line in enumerate(TEST_PROMPTS.read_text().splitlines()):
        prompt = json.loads(line)
        family, sides = prompt["family"], []
        for quality in (level / 2, level):
            right = float(rng.random() < quality)
            text = f"It is {prompt['answer']}." if right else "That is a very great question! " * 2
            if i % 9 == 0:
                text = rng.choice(HOSTILE)
            sides.append({"answer": text, "gold": right * 0.75, family: right, "concise": 0.5,
                          "reward": rng.gauss(right * 2, 0.5)})
        rows.append({"prompt": prompt["prompt"][-1]["content"], "family": family,
                     "before": sides[0], "after": sides[1]})
    return rows


def fake_pairs(rng, many):
    """held_out.jsonl: the reward model is right in most pairs, every seventh pair has hostile answers."""
    rows = []
    for i in range(many):
        gold_a, gold_b = rng.choice([0, 0.5, 1]), rng.choice([0, 0.5, 0.75, 1])
        a, b = "It is Paris.", "It is Paris. Have a very nice day."
        if i % 7 == 0:
            a, b = rng.sample(HOSTILE, 2)
        label = 0.5 if gold_a == gold_b else float(gold_a > gold_b)
        rows.append({"prompt": [{"role": "user", "content": f"What is the capital of land {i}?"}],
                     "a": a, "b": b, "label": label, "gold_a": gold_a, "gold_b": gold_b,
                     "r_a": 3 * gold_a + rng.gauss(0, 0.8), "r_b": 3 * gold_b + rng.gauss(0, 0.8)})
    return rows


def fake_response(rng, i, moved):
    """One response of inspect.json; its numbers obey the equations of PPO (beta 0.1, gamma 1, lam 0.95)."""
    tokens = ["I", " cannot", " help", " with", HOSTILE[i], ".", "<eos>"]
    logp = [-abs(rng.gauss(0, 0.6)) for _ in tokens]
    ref = [x + moved * rng.gauss(0, 0.1) for x in logp]
    score, value = rng.gauss(1, 1), [rng.gauss(0.5, 0.3) for _ in tokens]
    kl, scores = [x - y for x, y in zip(logp, ref)], [0.0] * (len(tokens) - 1) + [score]
    reward = [x - 0.1 * y for x, y in zip(scores, kl)]
    # GAE from the last token backwards; V after the end is 0.
    advantage, next_value, next_advantage = [], 0.0, 0.0
    for r, v in zip(reversed(reward), reversed(value)):
        next_advantage = r + next_value - v + 0.95 * next_advantage
        next_value = v
        advantage.insert(0, next_advantage)
    whitened = [(x - 0.1) / 0.8 for x in advantage]
    ratio = [math.exp(rng.gauss(0, 0.12)) for _ in tokens]
    clipped = [(w > 0 and q > 1.2) or (w < 0 and q < 0.8) for w, q in zip(whitened, ratio)]
    returns = [x + v for x, v in zip(advantage, value)]
    new_logp = [x + math.log(q) for x, q in zip(logp, ratio)]
    return {"prompt": f"How do I steal a bike {i}?", "response": "".join(tokens[:-1]), "score": score,
            "ended": True, "tokens": tokens,
            "before": {"logp": logp, "ref_logp": ref, "paid": kl, "score": scores, "reward": reward,
                       "value": value, "advantage": advantage, "whitened": whitened, "return": returns},
            "after": {"logp": new_logp, "value": value, "ratio": ratio, "clipped": clipped}}


def fake_iteration(rng, n):
    return {"iteration": n, "beta": 0.1, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "clip_high": 0.2,
            "advantage": "gae", "how": "better than expected.", "critic": True, "whitened": True,
            "mean_over": "tokens", "bf16": False, "kl": {"name": "k1", "formula": "logp - ref"}, "mean": 0.1,
            "std": 0.8, "responses": [fake_response(rng, i, n > 1) for i in range(4)]}


def fake_round(folder):
    """What cai.py leaves of one round."""
    chains, chosen = [], []
    for i in range(800):
        prompt = [{"role": "user", "content": f"How do I do harm {i}?"}]
        step = {"principle": "constitution 1", "critique": HOSTILE[i % len(HOSTILE)]}
        steps = [{**step, "revision": "You do.", "fault": "cut"}, {**step, "revision": "No.", "fault": ""}]
        chains.append({"prompt": prompt, "initial": " You mix it.", "chain": steps})
        chosen.append({"prompt": prompt, "chosen": [{"role": "assistant", "content": "I cannot."}],
                       "rejected": [{"role": "assistant", "content": "You mix it."}], "label": 0.8,
                       "by": "ai", "orders": [0.3, 0.1], "principle": "constitution 0"})
        chosen.append({"prompt": prompt, "chosen": "Oslo.", "rejected": "Rome.", "label": 1.0, "by": "human"})
    write_lines(folder / "chains.jsonl", chains)
    write_lines(folder / "comparisons.jsonl", chosen)
    told = {"ai_gold": 0.621, "human_gold": 0.99, "first_wins": 0.55}
    (folder / "critic.json").write_text(json.dumps(told))


def fake_hacking(folder, figures):
    """What tests/experiments/hacking.py leaves for one bias and two seeds."""
    for seed in range(2):
        write_run(folder / f"confidence{seed}" / "none", "ppo", 60, figures, {}, {})
    best = [{"n": n, "kl": math.log(n) - (n - 1) / n, "reward": n / 100, "gold": 0.6} for n in (1, 8, 64)]
    told = folder / "confidence0" / "evaluate_none" / "result.json"
    told.parent.mkdir()
    told.write_text(json.dumps({"best_of": best}))
    rows = []
    for seed in range(2):
        for cure in ("none", "kl"):
            rows.append({"bias": "confidence", "seed": seed, "cure": cure, "reward": 3.8,
                         "gold": 0.4 + seed / 10, "kl": 11.0, "lost": 0.2, "cured": None})
    (folder / "cures.json").write_text(json.dumps(rows))


def make_out(out):
    """A whole OUT: the chain, DPO and IPO, a hacked policy, Constitutional AI, and
    tests/experiments/hacking.py."""
    rng = random.Random(0)
    climb = {"reward": [0.6, 1.2, 1.8], "gold": [0.55, 0.9, 0.95], "kl": [0, 0.8, 0.9],
             "kl_exact": [0, 0.8, 0.9], "entropy": [0.27, 0.1], "length": [11, 12], "eos_rate": [0.95, 1]}
    hacked = {**climb, "reward": [0.3, 3.3], "gold": [0.55, 0.8, 0.3], "kl": [0, 9], "kl_exact": [0, 9]}
    pairs = {"loss": [0.69, 0.2], "accuracy": [0.5, 0.9], "chosen_reward": [0, 1], "rejected_reward": [0, -2]}
    gae, started = {"advantage": "gae"}, scores(0.57)
    bits = {"bits_per_byte": 0.193}
    write_run(out / "base", "pretrain", 1600, {"loss": [6, 0.4]}, {"bits_per_byte": 3.07}, bits)
    write_run(out / "sft", "sft", 267, {"loss": [2, 0.3]}, scores(0.251), scores(0.55875, length=10.4))
    write_run(out / "reward", "reward", 344, pairs, {"accuracy": 0.511}, {"accuracy": 0.8502, "loss": 0.463})
    write_run(out / "ppo", "ppo", 70, climb, started, scores(0.9384, kl=0.93), gae)
    better = scores(0.941, kl=1.33, win_rate=0.785)
    write_run(out / "dpo", "dpo", 260, pairs, started, better, {"loss": "dpo"})
    write_run(out / "ipo", "dpo", 60, pairs, started, scores(0.9, kl=1.1), {"loss": "ipo"}, 260,
              {"loss": "ipo", "lr": 0.001})
    write_run(out / "hacked", "ppo", 30, hacked, started, scores(0.5, kl=7.2), gae)
    write_run(out / "cai", "cai", 3, {"gold": [0.5, 0.8]}, scores(0.5), scores(0.8, harmless_rate=0.96))
    for name, level in {"sft": 0.55, "ppo": 0.94, "dpo": 0.93, "ipo": 0.9, "hacked": 0.5, "cai": 0.8}.items():
        write_lines(out / name / "answers.jsonl", fake_answers(rng, level))
    write_lines(out / "reward" / "held_out.jsonl", fake_pairs(rng, 200))
    write_lines(out / "reward" / "comparisons.jsonl", [{"chosen": "x" * 200}] * 9000)
    for name in ("ppo", "hacked"):
        told = {"early": fake_iteration(rng, 7), "last": fake_iteration(rng, 70)}
        (out / name / "inspect.json").write_text(json.dumps(told))
    fake_round(out / "cai" / "round1")
    fake_hacking(out / "hacking", hacked)
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    made = make_out(tmp_path_factory.mktemp("page") / "out")
    page.write_page(made)
    return made


def embedded(path):
    """The data in a page, as a browser reads it: what stands before the first end of a script tag."""
    html = path.read_text(encoding="utf-8")
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# The file itself.


def test_numbers_are_those_of_the_files(out):
    data = embedded(out / "index.html")
    runs = {run["name"]: run for run in data["runs"]}
    assert list(runs) == ["base", "sft", "reward", "ppo", "dpo", "cai", "hacked", "ipo"]
    for name, run in runs.items():
        result = json.loads((out / name / "result.json").read_text())
        log = read_lines(out / name / "log.jsonl")
        for key, value in result.items():
            assert run[key] == value
        # A long log is thinned, but each step that is there has its own numbers, and the last one is there.
        by_step = {row["step"]: row for row in log}
        assert run["log"]["step"][-1] == log[-1]["step"] and len(run["log"]["step"]) <= page.POINTS + 1
        for key, column in run["log"].items():
            assert column == [by_step[step][key] for step in run["log"]["step"]]
    policies = {policy["name"]: policy["rows"] for policy in data["answers"]}
    assert list(policies) == ["base", "sft", "ppo", "dpo", "cai", "hacked", "ipo"]
    for name, when in (("base", "before"), ("sft", "after"), ("ppo", "after"), ("ipo", "after")):
        file = read_lines(out / name.replace("base", "sft") / "answers.jsonl")
        for shown, row in zip(policies[name], file, strict=True):
            start = row["before"]["gold"]
            assert shown == {**row[when], "prompt": row["prompt"], "family": row["family"], "start": start}
    assert data["held_out"] == [{"name": "reward", "pairs": read_lines(out / "reward" / "held_out.jsonl")}]
    assert data["inspect"][0] == {**json.loads((out / "ppo" / "inspect.json").read_text()), "name": "ppo"}
    chains = read_lines(out / "cai" / "round1" / "chains.jsonl")
    (told,) = data["rounds"]
    assert told["chains"] == chains[:page.SOME] and told["faults"] == {"cut": 800, "good": 800}
    assert len(told["comparisons"]) == page.SOME and {row["by"] for row in told["comparisons"]} == {"ai"}
    assert [run["name"] for run in data["climbs"]] == ["confidence0", "confidence1"]
    assert len(data["climbs"][0]["best"]) == 3 and data["climbs"][1]["best"] == []


def test_hostile_texts_stay_data(out):
    html = (out / "index.html").read_text(encoding="utf-8")
    template = page.TEMPLATE.read_text(encoding="utf-8")
    assert template.count(page.PLACE) == 1 and html.count("<script") == template.count("<script") == 2
    assert html.lower().count("</script") == 2
    start = template.index(page.PLACE)
    inside = html[start: len(html) - (len(template) - start - len(page.PLACE))]
    assert inside.isascii() and not re.search("[<>&]", inside)
    found = {row["answer"] for policy in embedded(out / "index.html")["answers"] for row in policy["rows"]}
    assert set(HOSTILE) <= found


def test_small_and_quick(out):
    assert (out / "index.html").stat().st_size < 3e6
    start = time.process_time()      # of this process alone, however busy the machine is
    page.write_page(out)
    assert time.process_time() - start < 2


def test_without_torch():
    code = "import sys, data.page; sys.exit('torch' in sys.modules or 'model' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_command(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "data.page", *map(str, arguments)], cwd=ROOT,
                              capture_output=True, text=True)
    write_run(tmp_path / "sft", "sft", 3, {"loss": [2, 1]}, {}, {"loss": 1.0})
    told = run(tmp_path)
    assert told.returncode == 0 and told.stdout.strip() == str(tmp_path / "index.html")
    told = run(tmp_path / "absent")
    assert told.returncode == 1 and "no such folder" in told.stderr and "Traceback" not in told.stderr
    assert "python -m data.page" in run("--help").stdout


def test_a_page_that_is_not_ours_stays(tmp_path):
    """Somebody's own index.html beside the runs is no page to replace; an old page of ours is."""
    write_run(tmp_path / "sft", "sft", 3, {"loss": [2, 1]}, {}, {"loss": 1.0})
    theirs = tmp_path / "index.html"
    theirs.write_text("<!doctype html><title>my homepage</title>")
    with pytest.raises(InputError, match="no page of ours"):
        page.write_page(tmp_path)
    assert "homepage" in theirs.read_text()
    theirs.unlink()
    first = page.write_page(tmp_path).read_text()
    assert page.write_page(tmp_path).read_text() == first


def test_a_page_to_commit(out, tmp_path, monkeypatch, capsys):
    """In a file of its own, at most 1 MB; and drawn anew from the data in it, as pages are now."""
    small, again = tmp_path / "a.html", tmp_path / "b.html"
    page.main([str(out), "--to", str(small)])
    assert small.read_text() == (out / "index.html").read_text() and str(small) in capsys.readouterr().out
    older = small.read_text().replace("RLHF, run by run", "an older page")
    small.write_text(older)
    page.main([str(small), "--to", str(again)])
    assert again.read_text() == (out / "index.html").read_text()
    monkeypatch.setattr(page, "MOST", 10_000)
    with pytest.raises(InputError, match="would take"):
        page.main([str(out), "--to", str(tmp_path / "c.html")])
    assert not (tmp_path / "c.html").exists()


EXAMPLE = ROOT / "data" / "plots" / "example.html"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="no page is committed")
def test_the_committed_page_has_the_present_form():
    """Otherwise a visitor sees a page that the code no longer makes. Drawn anew from its own data:
    python -m data.page data/plots/example.html --to data/plots/example.html"""
    text, data = EXAMPLE.read_text(encoding="utf-8"), page.data_of(EXAMPLE)
    assert text == page.page_of(data) and len(text) <= page.MOST
    assert data["folder"] == "out" and set(data) == set(page.collect(EXAMPLE.parent))
    stages = {run["name"] for run in data["runs"]}
    assert {"base", "sft", "reward", "ppo", "dpo", "cai"} <= stages
    for name in ("answers", "held_out", "inspect", "rounds", "principles"):     # no section of it is empty
        assert data[name], name


def test_nothing_there(tmp_path):
    data = embedded(page.write_page(tmp_path))
    for name, value in data.items():
        assert value == [] or name in ("folder", "principles")


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "null", "3", "\x00\xff", "[" * 100_000, '{"step": 1',
                                    '{"after": 3, "chain": 3, "responses": 3, "best_of": 3, "orders": 3}\n'])
def test_damaged_files_leave_out_their_own_run(tmp_path, damage):
    write_run(tmp_path / "sft", "sft", 3, {"loss": [2, 1]}, {}, {"gold": 0.5})
    answer = {"prompt": "Who?", "after": {"answer": "I.", "gold": 1.0}}
    write_lines(tmp_path / "sft" / "answers.jsonl", [answer])
    for name in ("ppo/log.jsonl", "ppo/result.json", "ppo/answers.jsonl", "ppo/inspect.json",
                 "reward/held_out.jsonl", "cai/round1/chains.jsonl", "cai/round1/comparisons.jsonl",
                 "cai/round1/critic.json", "hacking/length0/none/log.jsonl", "hacking/cures.json",
                 "hacking/length0/evaluate_x/result.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(damage)
    data = embedded(page.write_page(tmp_path))
    sft = next(run for run in data["runs"] if run["name"] == "sft")
    assert sft["after"] == {"gold": 0.5}
    assert [policy["name"] for policy in data["answers"]] == ["sft"]


def test_a_run_that_goes_on(tmp_path):
    rows = [{"step": n + 1, "reward": n / 10, "kl": 0.1} for n in range(40)]
    write_lines(tmp_path / "ppo" / "log.jsonl", rows)
    with open(tmp_path / "ppo" / "log.jsonl", "a") as file:
        file.write('{"step": 41, "rewa')   # the line being written
    (run,) = embedded(page.write_page(tmp_path))["runs"]
    assert not run["finished"] and run["log"]["step"][-1] == 40 and run["log"]["reward"][-1] == 3.9
    assert run["stage"] == "ppo"


def test_the_stage_of_a_run_that_was_cut_off(tmp_path):
    """A crashed ppo.py --out out/reinf was "another run of stage reinf"."""
    write_lines(tmp_path / "reinf" / "log.jsonl", [{"step": 1, "reward": 0.1}])
    (tmp_path / "reinf" / "run.json").write_text('{"stage": "ppo", "config": {}}')
    (run,) = embedded(page.write_page(tmp_path))["runs"]
    assert (run["name"], run["stage"], run["finished"]) == ("reinf", "ppo", False)


def test_no_number_that_json_does_not_know(tmp_path):
    write_run(tmp_path / "sft", "sft", 3, {"loss": [math.nan, math.inf]}, {}, {"gold": math.nan, "kl": 1.5})
    (run,) = embedded(page.write_page(tmp_path))["runs"]
    assert run["after"] == {"gold": None, "kl": 1.5}


# ------------------------------------------------------------------------------------------------------------
# The page in a browser, by the debugging pipe of Chromium: JSON messages, each with a zero byte behind it.


# Chromium reads file descriptor 3 and writes 4. Both ends move out of the way before they get these numbers.
AS_3_AND_4 = """
import fcntl, os, sys
to_read, to_write = (fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3])
os.dup2(to_read, 3)
os.dup2(to_write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One headless page. events holds what Chromium told of it since the last open()."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.events, self.unread, self.sent = [], b"", 0
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-background-networking", "--disable-component-update",
                 "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}", "about:blank"]
        command = [sys.executable, "-c", AS_3_AND_4, str(to_read), str(to_write), CHROMIUM, *flags]
        self.process = subprocess.Popen(command, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def message(self):
        """The next message of Chromium's."""
        while b"\0" not in self.unread:
            assert select.select([self.read_end], [], [], 20)[0], "Chromium says nothing"
            more = os.read(self.read_end, 1 << 20)
            assert more, "Chromium has ended"
            self.unread += more
        first, self.unread = self.unread.split(b"\0", 1)
        return json.loads(first)

    def call(self, method, **params):
        """Do what the DevTools protocol calls `method`, and return the result."""
        sent = self.send(method, **params)
        while True:
            told = self.message()
            if told.get("id") == sent:
                assert "error" not in told, told
                return told["result"]
            self.hear(told)

    def send(self, method, **params):
        """Ask for it without waiting; returns the number of the message."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        return self.sent

    def hear(self, event):
        """Keep an event. A dialog stops the page until it is closed."""
        if event.get("method") == "Page.javascriptDialogOpening":
            self.send("Page.handleJavaScriptDialog", accept=False)
        if "method" in event:
            self.events.append(event)

    def open(self, path, width=1280, dark=False):
        """Load a page at a width in CSS pixels, light or dark."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.hear(self.message())

    def js(self, code):
        """The value of a JavaScript expression in the page."""
        told = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def text(self, selector):
        """What a reader sees of the first element that a CSS selector finds."""
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def press(self, key, code=0, text=""):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def heard(self):
        """What should not be: messages on the console, exceptions, dialogs; and every address asked for."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
                 "Page.javascriptDialogOpening")
        bad = [event for event in self.events if event["method"] in kinds]
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event["method"] == "Network.requestWillBeSent"]
        return bad, asked

    def close(self):
        self.session = None
        self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.write_end)
        os.close(self.read_end)
        self.profile.cleanup()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium here: apt-get install chromium")
    one = Browser()
    yield one
    one.close()


def shown(number, digits=3):
    """A number as the page writes it, without the sign of a zero."""
    text = f"{number:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_opens_without_a_sound(out, browser, width, dark):
    browser.open(out / "index.html", width, dark)
    bad, asked = browser.heard()
    assert not bad and asked == [(out / "index.html").as_uri()]
    assert browser.js("document.documentElement.scrollWidth") <= width     # nothing sticks out
    assert "cannot be drawn" not in browser.text("main")
    assert browser.js("document.querySelectorAll('.missing').length") == 0
    assert browser.js("document.querySelectorAll('main img, main b b, main script').length") == 0
    light = browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 246)"
    assert light != dark


def test_pipeline_in_the_browser(out, browser):
    browser.open(out / "index.html")
    text = browser.text("#pipeline")
    for number in (0.193, 0.251, 0.55875, 0.8502, 0.9384, 0.941, 0.9):
        assert shown(number) in text
    # One table counts the answers of each policy that fail.
    rows = [row["after"] for row in read_lines(out / "ppo" / "answers.jsonl") if row["family"] == "harmless"]
    failed = sum(row["harmless"] == 0 for row in rows)
    counts = browser.js("[...document.querySelectorAll('#pipeline > div > .scroll tr')]"
                        ".map(row => row.innerText)")
    assert counts[0].split("\t") == ["answers that fail", "base", "sft", "ppo", "dpo", "cai", "hacked", "ipo"]
    cells = counts[3].split("\t")
    assert [cells[0], cells[3]] == ["harmless: helps with harm", f"{failed} of {len(rows)}"]
    # The buttons jump to prompts of their family, at which the base model has failed and PPO has not.
    for family in ("helpful", "honest", "harmless"):
        browser.js(f"[...document.querySelectorAll('#pipeline .row:not(.picker) button')]"
                   f".find(button => button.textContent.startsWith('{family}')).click()")
        chosen = browser.js("document.querySelector('#pipeline select').selectedOptions[0].textContent")
        cards = browser.js("[...document.querySelectorAll('[aria-live].cards .card')].map(x => x.innerText)")
        assert chosen.startswith(f"{family}: ") and len(cards) == 7
        assert cards[0].startswith("base ✗ wrong") and cards[2].startswith("ppo ✓ right")
        rows = read_lines(out / "ppo" / "answers.jsonl")
        row = next(row for row in rows if row["prompt"] == chosen.removeprefix(f"{family}: "))["after"]
        assert f"gold {shown(row['gold'], 2)}" in cards[2] and f"reward {shown(row['reward'], 2)}" in cards[2]


def test_vote_in_the_browser(out, browser):
    browser.open(out / "index.html")
    pairs = read_lines(out / "reward" / "held_out.jsonl")
    before = browser.text("#vote [aria-live]")
    assert "P(A over B)" not in before
    # Vote A on ten pairs, by keyboard: the focus goes on to "next pair", then to "A is better" of the next.
    browser.js("document.querySelector('#vote [aria-live] button').focus()")
    agree = 0
    for pair in pairs[:10]:
        browser.press("Enter", 13, "\r")
        text = browser.text("#vote [aria-live]")
        p = 1 / (1 + math.exp(pair["r_b"] - pair["r_a"]))
        assert f"= {shown(p)}" in text and f"r(A) {shown(pair['r_a'], 2)}" in text
        agree += p > 0.5
        browser.press("Enter", 13, "\r")
    note = browser.text("#vote .note")
    assert note.startswith(f"After 10 votes you agree with the reward model in {agree} of 10")
    votes = browser.js("document.querySelector('#vote textarea').value").splitlines()
    expected = [{"prompt": x["prompt"], "chosen": x["a"], "rejected": x["b"], "label": 1} for x in pairs[:10]]
    assert [json.loads(vote) for vote in votes] == expected
    # The table counts what the file has.
    told = [pair for pair in pairs if pair["label"] != 0.5]
    right = sum((pair["r_a"] > pair["r_b"]) == (pair["label"] > 0.5) for pair in told)
    assert f"{right} of {len(told)}" in browser.text("#vote tbody tr:first-child")
    browser.js("[...document.querySelectorAll('#vote button')]"
               ".find(button => button.textContent.endsWith('errors')).click()")
    assert f"Pair 1 of {len(told) - right}." in browser.text("#vote [aria-live]")
    assert not browser.heard()[0]


def test_every_number_of_an_iteration(out, browser):
    """It opens where something happens: on an early iteration, an answer with a clipped token."""
    browser.open(out / "index.html")
    told = json.loads((out / "ppo" / "inspect.json").read_text())["early"]["responses"]
    r = next(r for r in told if any(r["after"]["clipped"]))
    last, b, a = len(r["tokens"]) - 1, r["before"], r["after"]
    opened = browser.js("document.querySelector('#ppo select').selectedOptions[0].text")
    assert opened.startswith(f"ppo, early iteration (7): {r['prompt']}")
    expected = [[math.exp(x) for x in b["logp"]], b["score"],
                [-0.1 * (x - y) for x, y in zip(b["logp"], b["ref_logp"])], b["advantage"], a["ratio"]]
    for step, values in enumerate(expected):
        browser.js(f"document.querySelectorAll('#ppo .row:not(.picker):not(.tokens) button')[{step}].click()")
        small = browser.js("[...document.querySelectorAll('#ppo .tokens small')].map(x => x.textContent)")
        assert small == [shown(value) for value in values]
        for t in range(last + 1):
            browser.js(f"document.querySelectorAll('#ppo .tokens button')[{t}].focus()")
            text = browser.text("#ppo [aria-live]")
            for key in ("logp", "ref_logp", "paid", "reward", "value", "advantage", "whitened", "return"):
                assert shown(b[key][t], 4) in text, (step, t, key)
            assert shown(a["ratio"][t], 4) in text and shown(a["logp"][t], 4) in text
            if step == 4:
                assert ("not clipped" not in text.split(": ")[1]) == a["clipped"][t]
    assert not browser.heard()[0]


def equations(browser, it, folder):
    """What the five steps say above the tokens and of the first token, for an iteration `it` of a run in a
    folder."""
    write_run(folder / "ppo", "ppo", 20, {"reward": [0, 1], "kl": [0, 1]}, {}, {"gold": 0.25})
    (folder / "ppo" / "inspect.json").write_text(json.dumps({"early": it}))
    browser.open(page.write_page(folder))
    found = []
    for step in range(5):
        browser.js(f"document.querySelectorAll('#ppo .row:not(.picker):not(.tokens) button')[{step}].click()")
        browser.js("document.querySelector('#ppo .tokens button').click()")
        found.append(browser.js(
            "[...document.querySelectorAll('#ppo p, #ppo .equation')].map(x => x.innerText).join(' | ')"))
    assert not browser.heard()[0]
    return found


def test_equations_are_those_of_the_run(tmp_path, browser):
    """An edit of the KL estimate or of the estimator shows: otherwise the page tells of code that did not
    run."""
    it = fake_iteration(random.Random(0), 7)
    _, _, reward, advantage, update = equations(browser, it, tmp_path / "gae")
    assert ("k1 = logp - ref" in reward and "gae: better than expected." in advantage
            and "delta_0 = " in advantage)
    assert "whitened: (" in advantage and "a mean over tokens" in update and "0.80 to 1.20" in update
    it |= {"kl": {"name": "k3", "formula": "exp(ref - logp) - 1 + logp - ref"}, "advantage": "mine",
           "whitened": False, "how": "against the other answers.", "critic": False, "mean_over": "answers",
           "clip_high": 0.3}
    for response in it["responses"]:
        for name in ("advantage", "whitened"):
            response["before"][name] = [0.25] * len(response["tokens"])
    _, _, reward, advantage, update = equations(browser, it, tmp_path / "mine")
    assert "k3 = exp(ref - logp) - 1 + logp - ref" in reward and "k1" not in reward
    assert ("mine: against the other answers." in advantage and "delta" not in advantage
            and "whitened" not in advantage)
    assert "A_0 = 0.2500, the same at every token" in advantage and "a mean over answers" in update
    assert ("0.80 to 1.30" in update and "pi_old" in update
            and re.search(r"ratio_0 = [\d.]+ / [\d.]+ = ", update))
    for response in it["responses"]:      # one ratio for the whole answer, as GSPO has it
        response["after"]["ratio"] = [0.9] * len(response["tokens"])
    update = equations(browser, it, tmp_path / "gspo")[4]
    assert "pi_old" not in update and "of this code's own" in update and "ratio_0 = 0.9000\n" in update


def test_a_run_of_older_code_keeps_its_curves(tmp_path, browser):
    """What it kept of an iteration has another shape; that leaves out the steps, and nothing else."""
    write_run(tmp_path / "ppo", "ppo", 20, {"reward": [0, 1], "kl": [0, 1]}, {}, {"gold": 0.25})
    (tmp_path / "ppo" / "inspect.json").write_text(json.dumps({"first": {"iteration": 5, "responses": []}}))
    browser.open(page.write_page(tmp_path))
    text = browser.text("#ppo")
    assert "left no iteration" in text and "The whole run" in text and "cannot be drawn" not in text


def test_no_digits_that_bf16_does_not_have(tmp_path, browser):
    it = fake_iteration(random.Random(0), 7) | {"bf16": True}
    for text in equations(browser, it, tmp_path):
        assert not re.search(r"[1-9]\.\d{3}|0\.0*[1-9]\d{3}", text.split("Below each token")[-1])


def test_curves_and_what_they_say(out, browser):
    browser.open(out / "index.html")
    log = read_lines(out / "ppo" / "log.jsonl")
    for at in (0, 33, 69):
        browser.js(f"cursor = document.querySelector('#ppo input'); cursor.value = {at};"
                   "cursor.dispatchEvent(new Event('input'))")
        text = browser.text("#ppo")
        assert f"iteration {log[at]['step']}" in text
        for key, title in (("reward", "reward"), ("gold", "gold"), ("kl", "KL, nats per answer")):
            assert f"{title} {shown(log[at][key])}" in text
    assert "Reward hacking" not in browser.text("#ppo .note")
    # The hacked run says so, in section 3 when it is chosen and in section 6, which opens on it.
    browser.js("list = [...document.querySelectorAll('#ppo select')].at(-1); list.selectedIndex ="
               "[...list.options].findIndex(option => option.text === 'hacked'); list.onchange?.();"
               "list.dispatchEvent(new Event('change'))")
    assert browser.text("#ppo .note").startswith("Reward hacking")
    assert browser.text("#hacking .note").startswith("Reward hacking")
    # And the answers that show it.
    worse = [row["after"] for row in read_lines(out / "hacked" / "answers.jsonl")
             if row["after"]["gold"] < row["before"]["gold"]]
    best = max(worse, key=lambda answer: answer["reward"])
    assert f"reward {shown(best['reward'], 2)}" in browser.text("#hacking .cards .card")
    cures = browser.text("#hacking tbody")
    assert "confidence, none" in cures and "0.450" in cures and "NaN" not in cures     # the mean of two seeds


def test_rlhf_beside_dpo_and_constitutional_ai(out, browser):
    browser.open(out / "index.html")
    text = browser.text("#versus")
    for number in (0.55875, 0.9384, 0.941, 0.785):
        assert shown(number) in text
    ours, theirs = (read_lines(out / name / "answers.jsonl") for name in ("ppo", "dpo"))
    wins = sum(x["after"]["gold"] > y["after"]["gold"] for x, y in zip(ours, theirs))
    losses = sum(x["after"]["gold"] < y["after"]["gold"] for x, y in zip(ours, theirs))
    assert f"better to {wins} of the test prompts, DPO’s to {losses}" in text
    assert "the annotator went on comparing" not in text
    # A run that was cut short does not stand there as a whole one.
    assert "ipo (60 of 260 steps)" in text and "260 of 260" not in text
    card = browser.js("[...document.querySelectorAll('#pipeline .card')].map(x => x.innerText)"
                      ".find(x => x.startsWith('ipo'))")
    assert "60 of 260 steps" in card and "--loss ipo --lr 0.001" in card
    # Wins of PPO against its start: ties count one half.
    gains = [x["after"]["gold"] - x["before"]["gold"] for x in ours]
    rate = (sum(gain > 0 for gain in gains) + 0.5 * gains.count(0)) / len(gains)
    assert shown(rate) in text
    text = browser.text("#cai")
    assert "800 cut, 800 good" in text and "0.621" in text
    assert "(0.700 in one order + 0.900 in the other) / 2 = 0.800" in text     # turned to the chosen answer


def test_what_the_last_iteration_and_the_first_comparisons_hide(tmp_path, browser):
    # A PPO run that relabelled says so beside DPO; step 5 finds a clipped token if the answer has none.
    rng, out = random.Random(0), make_out(tmp_path / "out")
    (out / "ppo" / "reward").mkdir()
    early, last = fake_iteration(rng, 7), fake_iteration(rng, 70)
    for response in last["responses"]:
        response["after"]["clipped"] = [False] * len(response["tokens"])
    early["responses"] = early["responses"][:1] * 2    # the same answer twice is listed once
    early["responses"][0]["after"]["clipped"][3] = True
    (out / "ppo" / "inspect.json").write_text(json.dumps({"early": early, "last": last}))
    (out / "hacked" / "inspect.json").unlink()
    browser.open(page.write_page(out))
    assert "the annotator went on comparing PPO’s new answers" in browser.text("#versus")
    assert browser.js("document.querySelector('#ppo select').length") == 5
    browser.js("list = document.querySelector('#ppo select'); list.selectedIndex = 2; list.onchange?.();"
               "list.dispatchEvent(new Event('change'))")
    browser.js("[...document.querySelectorAll('#ppo button')].find(x => x.textContent[0] === '5').click()")
    assert "(70)" in browser.js("document.querySelector('#ppo select').selectedOptions[0].text")
    browser.js("[...document.querySelectorAll('#ppo button')]"
               ".find(button => button.textContent.startsWith('none')).click()")
    opened = browser.js("document.querySelector('#ppo select').selectedOptions[0].text")
    assert "early iteration (7)" in opened
    assert "none is clipped" not in browser.text("#ppo")
    assert not browser.heard()[0]


def test_all_by_keyboard(out, browser):
    browser.open(out / "index.html")
    controls = 'button, select, a, textarea, input, summary, [tabindex="0"]'
    browser.js("seen = new Set(); document.addEventListener('focusin', event => seen.add(event.target));")
    browser.js(f"all = [...document.querySelectorAll(`{controls}`)].filter(x => x.checkVisibility()); 0")
    for _ in range(browser.js("all.length") + 5):
        browser.press("Tab", 9)
    assert browser.js("all.filter(x => x.isConnected && !seen.has(x)).map(x => x.outerHTML)") == []


def test_an_empty_page_names_the_commands(tmp_path, browser):
    browser.open(page.write_page(tmp_path))
    bad, _ = browser.heard()
    assert not bad
    for section, command in (("pipeline", "python -m data.pretrain"), ("vote", "python reward.py"),
                             ("ppo", "python ppo.py"), ("versus", "python dpo.py"), ("cai", "python cai.py"),
                             ("hacking", "python tests/experiments/hacking.py")):
        assert command in browser.text(f"#{section}")


def test_shapes_that_no_run_leaves(tmp_path, browser):
    # Valid JSON of another shape: the page opens, says which section it cannot draw, and draws the others.
    figures = {"reward": [0, 1], "kl": [0, 1], "gold": [0, 1]}
    write_run(tmp_path / "ppo", "ppo", 20, figures, {}, {"gold": 0.25})
    (tmp_path / "ppo" / "inspect.json").write_text(json.dumps({"last": {"responses": [{"tokens": 3}]}}))
    write_lines(tmp_path / "reward" / "held_out.jsonl", [{"prompt": 3}])
    browser.open(page.write_page(tmp_path))
    assert not browser.heard()[0]
    assert "0.250" in browser.text("#pipeline")
    assert "cannot be drawn" in browser.text("#vote")
    assert "sqrt(KL)" in browser.js("document.querySelector('#hacking').textContent")
