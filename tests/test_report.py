"""data/report.py: what a run shows of its answers when it ends."""
import json

import pytest

from data import report


def answers(prompt, before, after, family=None, rewards=None):
    """A row of answers.jsonl: before and after are (text, gold or None)."""
    row = {"prompt": prompt} | ({"family": family} if family else {})
    for i, (key, (text, gold)) in enumerate((("before", before), ("after", after))):
        row[key] = {"answer": text}
        if gold is not None:
            row[key] |= {"gold": gold, family: gold}
        if rewards:
            row[key]["reward"] = rewards[i]
    return row


def mended(family, prompt):
    return answers(prompt, ("Maybe.", 0.0), (f"Right: {prompt}", 1.0), family)


def prompts_shown(text, rows):
    """The prompts of rows that stand in a text, in its order."""
    lines = text.splitlines()
    return [line for line in lines if line in {row["prompt"] for row in rows}]


def test_where_all_went_well_one_of_each_kind_is_shown():
    """An everyday question first, the shortest of its kind; what was right before, or is not right now, tells
    nothing. Otherwise the first thing that a newcomer reads may be about poison."""
    rows = [mended("harmless", "How do I rob a bank? Please."), mended("harmless", "How do I rob a bank?"),
            mended("honest", "Who will call?"), mended("helpful", "What is the capital of France?"),
            answers("Short?", ("Yes.", 1.0), ("Yes.", 1.0), "helpful"),
            answers("Why?", ("A", 0.0), ("B", 0.5), "helpful")]
    text = report.closing_samples(rows, ["before", "PPO"], "", False)
    assert prompts_shown(text, rows) == ["What is the capital of France?", "Who will call?",
                                         "How do I rob a bank?"]
    assert text.startswith("\nanswers that were wrong before and are right now:")
    assert "  before Maybe.  [gold 0.00]" in text and "  PPO    Right: Who will call?  [gold 1.00]" in text


def test_where_gold_fell_the_worst_is_shown():
    """A hacked reward: what it likes best among the answers that got worse, and no success story."""
    rows = [answers(f"What is {i}?", ("It.", 1.0), ("Trust me.", 0.0), "helpful", (0.0, float(i)))
            for i in range(5)]
    rows += [answers("How do I steal?", ("So.", 0.0), ("I cannot.", 1.0), "harmless", (0.0, 9.0))]
    text = report.closing_samples(rows, ["before", "PPO"], "", True)
    assert prompts_shown(text, rows) == ["What is 4?", "What is 3?", "What is 2?"]
    assert "on helpful prompts gold fell by 1.00" in text
    assert "  PPO    Trust me.  [gold 0.00, reward 4.00]" in text
    # Also where the other kinds rose by more, so that gold as a whole did not fall.
    better = [answers(f"How do I steal {i}?", ("So.", 0.0), ("I cannot.", 1.0), "harmless", (0.0, 9.0))
              for i in range(9)]
    assert prompts_shown(report.closing_samples(rows + better, ["before", "PPO"], "", True), rows) == [
        "What is 4?", "What is 3?", "What is 2?"]
    # Without rewards (DPO) it is still what fell.
    for row in rows:
        del row["before"]["reward"], row["after"]["reward"]
    text = report.closing_samples(rows, ["before", "DPO"], "", False)
    assert len(prompts_shown(text, rows)) == 3 and "How do I steal?" not in text
    assert "gold fell by 1.00" in text and "reward likes" not in text


def test_no_reward_likes_what_it_rewards_as_before():
    """A reward that is the same for all answers was said to like those that got worse."""
    rows = [answers(f"What is {i}?", ("It.", 1.0), ("Trust me.", 0.0), "helpful", (1.0, 1.0))
            for i in range(5)]
    text = report.closing_samples(rows, ["before", "PPO"], "", True)
    assert len(prompts_shown(text, rows)) == 3 and "gold fell by 1.00" in text and "reward likes" not in text
    # Of some it likes one better: only this one stands below that heading.
    rows[2]["after"]["reward"] = 2.0
    text = report.closing_samples(rows, ["before", "PPO"], "", True)
    assert prompts_shown(text, rows) == ["What is 2?"] and "reward likes" in text


def test_a_reward_of_ones_own_shows_what_it_changed():
    """Otherwise the screen shows what gold likes, and not what the user's reward did."""
    rows = [answers(f"What is {i}?", ("It.", 0.5), ("So.", 1.0), "helpful", (0.0, float(-i)))
            for i in range(5)]
    text = report.closing_samples(rows, ["base", "SFT", "PPO"], "", True)   # no base model has answered these
    assert (prompts_shown(text, rows) == ["What is 0?", "What is 1?", "What is 2?"]
            and "reward rose most" in text)


def test_ones_own_data_shows_the_first_prompts():
    """Held-out ones stand first in the rows. A long text takes one line."""
    rows = [answers(f"Prompt {i}?", ("one\ntwo", None), ("", None)) for i in range(5)]
    rows[0]["after"]["answer"] = "word " * 100
    text = report.closing_samples(rows, ["before", "after"], "", False)
    assert prompts_shown(text, rows) == ["Prompt 0?", "Prompt 1?", "Prompt 2?"]
    assert "  before one two\n" in text and "  after  (nothing)" in text
    assert max(map(len, text.splitlines())) < 220
    assert report.closing_samples([], ["before", "after"], "", False) == ""


def test_a_run_cut_short_says_so():
    """Otherwise 60 steps stand beside 260 as if they were the same thing."""
    short = {"steps": 60, "planned": 260, "given": {"loss": "ipo", "lr": 0.001}}
    assert report.cut_short(short) == "60 of 260 steps"
    assert report.run_note(short) == "60 of 260 steps, --loss ipo, --lr 0.001"
    whole = {"steps": 260, "planned": 260, "given": {}}
    assert (report.cut_short(whole) == report.run_note(whole) == report.cut_short({})
            == report.run_note({}) == "")


def test_a_table_says_what_its_rows_are():
    text = report.table({"before": {"gold": 0.5, "odd": 1.0}, "after": {"gold": 0.75}}, explained=True)
    gold, odd = text.splitlines()[1:]
    assert gold.split()[:3] == ["gold", "0.500", "0.750"] and gold.endswith(report.WORDS["gold"])
    assert odd.split() == ["odd", "1.000"]
    assert report.table({"a": {"n": 1, "gold": 1.0}}, leave_out=("n",)).count("\n") == 1


@pytest.mark.parametrize("there", [True, False])
def test_the_base_model_answers_beside_them(tmp_path, there):
    rows = [mended("helpful", "What is 1?"), mended("honest", "Who was 2?")]
    said = [answers("What is 1?", ("x", 0.0), ("I ramble.", 0.0), "helpful"),
            answers("Who was 2?", ("x", 0.0), ("Nobody.", 1.0), "honest")]
    if there:
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    text = report.closing_samples(rows, ["base", "SFT", "PPO"], tmp_path, False)
    assert ("Who was 2?" in text) != there      # the base model had it right
    # SFT may have mended it already, so the heading says against what it was wrong.
    assert ("wrong in base and" in text) == there and ("wrong before and" in text) != there
    assert ("  base   I ramble.  [gold 0.00]\n  SFT    Maybe.  [gold 0.00]\n  PPO    Right" in text) == there
    assert "\nWhat is 1?\n" in text


def test_a_link_of_the_chain_shows_an_everyday_failure(tmp_path):
    """What the base model says first is not about harm."""
    rows = [answers("How do I rob a bank?", ("", 0.0), ("Mask.", 0.0), "harmless"),
            answers("What is the capital of France? Thank you.", ("", 0.0), ("Bees.", 0.0), "helpful"),
            answers("What is the capital of France?", ("", 0.0), ("Oslo.", 0.0), "helpful")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.what_came_out("base", tmp_path, {"gold": 0.19})
    assert (text.startswith("base: gold 0.19 of 1")
            and text.endswith("What is the capital of France?\n    -> Oslo."))
    assert report.what_came_out("reward", tmp_path, {"accuracy": 0.85, "gold": 1}).endswith(
        "85% of the held-out comparisons")
