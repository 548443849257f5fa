"""Votes: python -m data.vote through a pseudo-terminal, and the pairs that people vote on."""
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from data import comparisons, world
from data.files.checkpoint import load
from data.rewards import rewards_of_texts
from test_scripts import fails, result_of, user, write

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")


class Terminal:
    """A process whose terminal we are."""

    def __init__(self, command, **kw):
        import fcntl
        import pty
        import termios
        self.ours, theirs = pty.openpty()

        def begin():   # who runs the tests in the background has Ctrl-C ignored, and would pass that on
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs,
                                        start_new_session=True, preexec_fn=begin, **kw)
        os.close(theirs)
        self.shown = ""

    def until(self, text, timeout=60):
        """What is printed up to `text`, which must come."""
        end = time.time() + timeout
        while text not in self.shown:
            assert time.time() < end, self.shown
            if select.select([self.ours], [], [], 0.1)[0]:
                with suppress(OSError):   # on Linux: the process has ended
                    self.shown += os.read(self.ours, 9999).decode().replace("\r\n", "\n")
        out, self.shown = self.shown.split(text, 1)
        return out

    def type(self, text):
        os.write(self.ours, text.encode())

    def interrupt(self, text):
        """Ctrl-C, and what is printed up to `text`. Pressed again where nothing comes: Python's input() does
        not hear one that arrives after its prompt and before it reads (3 of 1,500)."""
        for _ in range(5):
            self.type("\x03")
            with suppress(AssertionError):
                return self.until(text, timeout=20)
        raise AssertionError(self.shown)


def votes_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def vote_twenty_times(suite, chain, folder):
    """In three sessions: the first ended by Ctrl-C, the second killed, the third by the end of the input."""
    file, sessions, rng, want, agreed = folder / "mine" / "votes.jsonl", [], random.Random(0), [], []

    def session():
        agreed.clear()
        sessions.append(Terminal([sys.executable, "-m", "data.vote", "--policy", chain / "sft", "--reward",
                                  chain / "reward", "--out", folder / "mine", "--max_new", "24", "--k", "8"],
                                 cwd=suite.root, env=suite.env))
        return sessions[-1]

    def opinion(t, key):
        """The reward model's opinion adds up: its probability, and how often it agreed with us in this
        session."""
        told = t.until("\n\n")
        r_1, r_2, p, rest = re.fullmatch(r"1 (\S+), 2 (\S+), P\(1 over 2\) = ([\d.]+)(.*)", told).groups()
        difference = float(r_1) - float(r_2)
        assert float(p) == pytest.approx(world.choice_probability(difference, 1), abs=0.01)
        if key == "t":
            agreed.append(None)
            assert rest == ", and you called it a tie"
        elif abs(difference) > 0.011:      # else what is shown does not tell which is larger
            agreed.append((difference > 0) == (key == "1"))
            told = re.fullmatch("; it agreed with you in (.*) of (.*)", rest).groups()
            assert told == (str(agreed.count(True)), str(len(agreed) - agreed.count(None)))
        else:
            agreed.append(int(rest.split()[6]) > agreed.count(True))

    def vote(t, key):
        screen = t.until("q(uit)> ").split("user: ")[1]
        prompt, first, second = (x.strip() for x in screen.split("\n\n")[:3])
        assert first[:3] == "1  " and second[:3] == "2  "
        first, second = first[3:].replace("\n     ", "\n"), second[3:].replace("\n     ", "\n")  # as indented
        t.type(key + "\n")
        if key in "12t":
            t.until("reward model: ")
            chosen, rejected = (second, first) if key == "2" else (first, second)
            label = 0.5 if key == "t" else 1.0
            want.append({"prompt": user(prompt), "chosen": chosen, "rejected": rejected, "label": label})
            assert votes_in(file) == want   # on the disk by the time the reward model's opinion is shown
            opinion(t, key)
        return prompt

    try:
        t = session()
        prompt = vote(t, "u")                         # nothing to take back yet: asked again
        assert vote(t, "1") == prompt
        for key in "2t2112":
            vote(t, key)
        vote(t, "s")
        vote(t, "u")                                  # takes back the seventh, and asks it again
        taken = want.pop()
        agreed.pop()
        assert f"[{len(want)} votes]" in t.until("q(uit)> ")
        t.type("x\n\n2\n")                            # neither x nor an empty line is a vote
        t.until("reward model: ")
        opinion(t, "2")
        want.append(votes_in(file)[-1])
        assert votes_in(file) == want
        assert {want[-1]["chosen"], want[-1]["rejected"]} == {taken["chosen"], taken["rejected"]}
        t.until("q(uit)> ")
        assert f"7 votes in {file}" in t.interrupt("--init") and t.process.wait(60) == 0

        t = session()
        for key in "22t12":
            vote(t, key)
        t.process.kill()
        t.process.wait(60)
        file.write_bytes(file.read_bytes()[:-1])      # and the disk lost the last newline

        t = session()
        vote(t, "u")                                  # the last vote of the session before
        want.pop()
        for key in rng.choices("12t", k=9):
            vote(t, key)
        t.until("q(uit)> ")
        t.type("\x04")
        # not out/mine/reward, which may be another's
        made = file.parent.with_name(f"reward_{file.parent.name}")
        assert f"20 votes in {file}" in t.until(f"--out {made}") and t.process.wait(60) == 0
    finally:
        for t in sessions:
            t.process.kill()
            os.close(t.ours)
    r = suite.ok("reward.py", "--init", chain / "reward", "--data", file, "--out", folder / "rm",
                 "--held_out", 0.3, "--batch_size", 4, "--warmup", 1)
    return want, votes_in(file), r.out


EARLY = {"test_no_vote_is_lost": vote_twenty_times}      # see the chain in conftest.py


@needs_fork
def test_no_vote_is_lost(early):
    """Twenty votes, each on the disk when it is answered, and none twice, however a session ends; reward.py
    learns from all."""
    folder, (want, votes, screen) = early
    assert votes == want and len(want) == 20
    assert len({str(vote["prompt"]) for vote in votes}) == 20
    assert "20 rows kept, 0 dropped" in screen and result_of(folder / "rm")["after"]["loss"] > 0


@needs_fork
def test_voting_says_where_a_file_is_broken(suite, chain, tmp_path):
    path = {"PYTHONPATH": str(suite.root)}
    (tmp_path / "votes.jsonl").write_text(
        '{"prompt": "Hi", "chosen": "a", "rejected": "b", "label": 1.0}\n{"prompt": "H')
    r = suite.run("data/vote.py", "--policy", chain / "sft", "--reward", chain / "reward",
                  "--out", tmp_path, env=path)
    fails(r, f"{tmp_path / 'votes.jsonl'}:2: ")
    r = suite.run("data/vote.py", "--policy", chain / "sft", "--reward", chain / "base",
                  "--out", tmp_path / "w", env=path)
    fails(r, f"{chain / 'base'} is a language model")


@needs_fork
def test_voting_between_two_policies_without_a_reward_model(suite, chain, tmp_path):
    """The answers are those of both; several lines are indented; what no longer has two answers is not
    asked."""
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Hi\nthere"}, {"prompt": "much too long " * 99}])
    both = f"{chain / 'sft'},{chain / 'base'}"
    r = suite.ok("data/vote.py", "--policy", both, "--data", prompts, "--out", tmp_path / "v",
                 "--max_new", 60, "--k", 40, stdin="t\n", env={"PYTHONPATH": str(suite.root)})
    assert "user: Hi\nthere" in r.out and "reward model" not in r.out and "no prompt is left" in r.out
    [row] = votes_in(tmp_path / "v" / "votes.jsonl")
    assert row["label"] == 0.5 and f"  1  {row['chosen']}\n" in r.out.replace("\n     ", "\n")
    r = suite.ok("data/vote.py", "--policy", both, "--data", prompts, "--out", tmp_path / "v",
                 "--max_new", 60, stdin="1\n", env={"PYTHONPATH": str(suite.root)})
    assert "user" not in r.out and "1 votes" in r.out        # voted on already
    r = suite.run("data/vote.py", "--policy", f"{chain / 'sft'},{tmp_path / 'nosuch'}",
                  "--out", tmp_path / "v", env={"PYTHONPATH": str(suite.root)})
    fails(r, str(tmp_path / "nosuch"))


# ------------------------------------------------------------------------------------------------------------
# The pairs that reward.py leaves for the page, and for samples.txt.


def test_pairs_to_show_are_one_a_prompt_with_sides_drawn(chain):
    """Otherwise the preferred answer always stands first, and voting on the page is no test."""
    _, tok = load(chain / "sft")
    rows = []
    for i in range(40):
        for bad in ("no", "never", "word " * 40):
            rows.append({"prompt": user(f"Question {i}?"), "chosen": f"yes {i}", "rejected": bad,
                         "label": 0.9})
    rows = rows[2:] + rows[:2]      # of the first prompt, the pair with the long answer comes first
    pairs = comparisons.pairs_to_show(rows, tok, 40, seed=0, n=30)
    assert len({str(pair["prompt"]) for pair in pairs}) == len(pairs) == 30
    first = [pair for pair in pairs if pair["a"].startswith("yes")]
    assert 5 < len(first) < 25 and all(pair["label"] == 0.9 and pair["b"] == "no" for pair in first)
    for pair in pairs:
        assert pair in first or pair["label"] == pytest.approx(0.1) and pair["b"].startswith("yes")
    assert comparisons.pairs_to_show(rows, tok, 40, seed=0, n=30) == pairs
    assert comparisons.pairs_to_show(rows, tok, 40, seed=1, n=30) != pairs


def test_scored_pairs_say_reward_and_gold(chain):
    model, tok = load(chain / "reward", head="score")
    row = next(row for row in world.rows("preference") if row["family"] == "honest")
    known = {"prompt": row["prompt"], "a": "I do not know that.", "b": "It is Jack.", "label": 1.0}
    mine = {"prompt": user("Well?"), "a": "Two\nlines", "b": "One", "label": 0.0}
    one, two = comparisons.with_rewards([known, mine], model, tok)
    assert one["gold_a"] == 1 and one["gold_b"] == 0 and one["family"] == "honest" and "gold_a" not in two
    rewards = []
    for pair, side in ((known, "a"), (known, "b"), (mine, "a"), (mine, "b")):
        rewards += rewards_of_texts(model, tok, [pair["prompt"]], [pair[side]])
    assert [one["r_a"], one["r_b"], two["r_a"], two["r_b"]] == pytest.approx(rewards, abs=1e-4)
    first, second, third = comparisons.pair_text(two).split("\n")
    assert first == f"chosen   {two['r_b']:+6.2f}  One" and third.strip() == "lines"
    assert second.split() == ["rejected", f"{two['r_a']:+.2f}", "Two"]
    assert comparisons.pair_text(one | {"label": 0.5}).count("tie ") == 2
