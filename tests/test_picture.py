"""tests/experiments/picture.py: the moving picture says what the log files say, and is one safe file."""
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from data import InputError
import picture

HOSTILE = "</text><script>alert(1)</script> & \x00 \u202e"


def write_run(folder, golds, rewards, answers):
    """log.jsonl and answers.jsonl of a PPO run; answers: [(prompt, before, its gold, after, its gold)]."""
    folder.mkdir(parents=True)
    log = [{"step": i + 1, "gold": gold, "reward": reward}
           for i, (gold, reward) in enumerate(zip(golds, rewards))]
    rows = []
    for prompt, one, gold_one, two, gold_two in answers:
        before = {"answer": one, "gold": gold_one, "helpful": gold_one, "reward": -1.5}
        after = {"answer": two, "gold": gold_two, "helpful": gold_two, "reward": 2.5}
        rows.append({"prompt": prompt, "family": "helpful", "before": before, "after": after})
    for name, lines in (("log", log), ("answers", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "base", [], [], [("What is 1?", "", 0.0, f"I ramble. {HOSTILE}", 0.0)])
    write_run(tmp_path / "ppo", [0.5, 0.25, 0.75, 1.0], [0.0, 1.0, 0.5, 2.0],
              [("What is 1?", "Maybe.", 0.0, "One.", 1.0)])
    write_run(tmp_path / "hacked", [0.5, 0.9, 0.125], [0.0, 1.0, 3.0],
              [("What is 2?", "Two.", 1.0, "Trust me. " * 40, 0.0)])
    return tmp_path


def test_the_picture_says_what_the_files_say(runs):
    """Both questions, the answers with their scores, and a point of each curve for every iteration."""
    svg = picture.picture(runs / "ppo", runs / "hacked")
    root = ElementTree.fromstring(svg)      # well-formed, whatever a model has said
    words = " ".join(element.text or "" for element in root.iter() if element.tag.endswith("}text"))
    for part in ("What is 1?", "I ramble.", "Maybe. [gold 0.00]", "One. [gold 1.00]", "What is 2?",
                 "0.50 to 1.00", "Two. [gold 1.00, reward -1.50]", "Trust me.", "0.50 to 0.12",
                 "0.00 to 3.00"):
        assert part in words, part
    curves = [path.get("d") for path in root.iter() if path.tag.endswith("}path")]
    assert [d.count("L") + 1 for d in curves] == [4, 4, 3, 3]
    gold = next(path.get("d") for path in root.iter() if path.get("class") == "gold")
    heights = [float(point.split()[1]) for point in gold[1:].split("L")]
    # y grows downwards
    assert heights[1] == max(heights) and heights[3] == min(heights) and heights[0] > heights[2]


def test_the_picture_is_safe_and_small(runs):
    """No script, nothing from elsewhere, all inside of its frame, and whole where nothing moves."""
    svg = picture.picture(runs / "ppo", runs / "hacked")
    assert "<script" not in svg and "\x00" not in svg and "\u202e" not in svg and len(svg) < 100_000
    assert set(re.findall(r"https?://[^\"]+", svg)) == {"http://www.w3.org/2000/svg"}
    for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"', svg):
        assert 0 < float(x) < picture.WIDTH and 0 < float(y) < picture.HALF
    still = svg[: svg.index("@media (prefers-reduced-motion")]
    assert "opacity" not in still and "dash" not in still


def test_the_picture_needs_a_run(runs, tmp_path):
    with pytest.raises(InputError, match="no finished PPO run"):
        picture.picture(tmp_path / "absent", runs / "hacked")
