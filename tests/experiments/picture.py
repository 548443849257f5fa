"""The moving picture at the top of README: an SVG, drawn from the log files of two runs and nothing else.

    python tests/experiments/picture.py                              out/ppo and out/hacked, to
                                                                     data/plots/runs.svg
    python tests/experiments/picture.py out/ppo out/hacked FILE      others, to another place

Upper half: one question answered by base, SFT and PPO, and below it reward and gold of every iteration of
PPO. Lower half: the run that hacks its reward, and an answer which that reward likes and gold does not. The
curves are drawn as the iterations go by. Where nothing moves (a print, a reader who wants it so) all of it is
shown.

The picture is one file without scripts. It brings its own paper, light or dark, so that it does not depend on
what it is shown on, and animates by CSS, which GitHub plays in an <img>.
"""
import sys
from pathlib import Path
from textwrap import shorten, wrap
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data import InputError, read_jsonl, report, write_atomic   # noqa: E402

WIDTH, HALF, EDGE = 600, 396, 24     # of the picture, of a half, of the margin, in its own units
PLOT = (EDGE, 220, 470, 345)         # left, top, right, bottom of a chart in its half;
                                     # names stand to its right
LETTERS = 60                         # of an answer in one line
SECONDS = 12                         # from one beginning to the next

STYLE = """
svg { --paper: #fbfaf6; --ink: #1c1d22; --soft: #5b5e68; --line: #d8d5cb;
      --blue: #1f55b5; --orange: #b8480b; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #14161b; --ink: #e8e8ea; --soft: #a3a7b3; --line: #3a3e49;
        --blue: #8ab4ff; --orange: #ffa05c; }
}
rect { fill: var(--paper); }
text { fill: var(--ink); font: 16px system-ui, sans-serif; }
.title { font-weight: 700; font-size: 19px; }
.soft { fill: var(--soft); font-size: 14px; }
.who { font-weight: 700; }
line { stroke: var(--line); }
path { fill: none; stroke: var(--blue); stroke-width: 3; stroke-linejoin: round; }
path.gold { stroke: var(--orange); }
.name { fill: var(--blue); font-weight: 700; }
.name.gold { fill: var(--orange); }
@media (prefers-reduced-motion: no-preference) {
  path { stroke-dasharray: 1; animation: draw SECONDSs linear infinite; }
  .after { animation: come SECONDSs linear infinite; }
  .later { animation: late SECONDSs linear infinite; }
}
@keyframes draw { 0%, 8% { stroke-dashoffset: 1; } 60%, 100% { stroke-dashoffset: 0; } }
@keyframes come { 0%, 8% { opacity: 0; } 12%, 100% { opacity: 1; } }
@keyframes late { 0%, 60% { opacity: 0; } 64%, 100% { opacity: 1; } }
""".replace("SECONDS", str(SECONDS))


def text(x, y, words, kind=""):
    """A line of text."""
    clean = "".join(letter for letter in words if letter.isprintable())
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(clean)}</text>'


def said(y, who, scored, names, kind):
    """What somebody answered, with the scores of these names, in at most two lines from y on; and the y below
    it."""
    scores = ", ".join(f"{name} {scored[name]:.2f}" for name in names if name in scored)
    answer = shorten(scored["answer"], 2 * LETTERS - len(scores) - 8, placeholder=" ...") or "(nothing)"
    parts = [text(EDGE, y, who, "who")]
    for line in wrap(f"{answer} [{scores}]", LETTERS):
        parts.append(text(EDGE + 48, y, line))
        y += 20
    return f'<g class="{kind}">{"".join(parts)}</g>', y + 8


def curve(values, name):
    """One number an iteration as a curve as high as the chart, with its name and its ends behind it."""
    left, top, right, bottom = PLOT
    low, high = min(values), max(values)
    step, points = (right - left) / max(1, len(values) - 1), []
    for i, value in enumerate(values):
        share = (value - low) / (high - low or 1)
        points.append(f"{left + i * step:.1f} {bottom - share * (bottom - top):.1f}")
    path = f'<path class="{name}" pathLength="1" d="M{" L".join(points)}"/>'
    y = max(top + 12, min(bottom - 14, float(points[-1].split()[1])))
    return path, y, [text(right + 8, 0, name, f"name {name}"),
                     text(right + 8, 0, f"{values[0]:.2f} to {values[-1]:.2f}", "soft")]


def chart(rows):
    """Reward and gold of a run from the rows of its log.jsonl, each on a scale of its own."""
    left, top, right, bottom = PLOT
    parts = [f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>',
             f'<line x1="{left}" y1="{top}" x2="{left}" y2="{bottom}"/>',
             text(left, bottom + 20, "iteration 1; each curve on a scale of its own", "soft"),
             text(right - 20, bottom + 20, str(len(rows)), "soft")]
    curves = [curve([row[name] for row in rows], name) for name in ("reward", "gold")]
    # The names stand where the curves end, one below the other if they end close together.
    curves.sort(key=lambda one: one[1])
    above, below = curves[0][1], max(curves[1][1], curves[0][1] + 42)
    for (path, _, labels), y in zip(curves, (above, below)):
        parts.append(path)
        for i, label in enumerate(labels):
            parts.append(label.replace('y="0"', f'y="{y + 17 * i:g}"'))
    return "".join(parts)


def half(top, title, prompt, answers, rows):
    """One half of the picture. answers: [(who, scored, names of scores, class)]."""
    parts = [text(EDGE, 38, title, "title"),
             text(EDGE, 66, f"“{shorten(prompt, LETTERS, placeholder=' ...')}”")]
    y = 94
    for answer in answers:
        part, y = said(y, *answer)
        parts.append(part)
    return f'<g transform="translate(0 {top})">{"".join(parts)}{chart(rows)}</g>'


def telling(folder):
    """The row of `report.answer_rows` that tells most of what a PPO run did, and the rows of its log.
    InputError: it has left nothing of the kind."""
    rows, log = report.rows_in(folder), Path(folder) / "log.jsonl"
    if not rows or not log.exists():
        raise InputError(f"{folder}: no finished PPO run is there")
    rows = report.with_base(rows, Path(folder).with_name("base"))
    found, _ = report.telling_rows(rows, own_reward=False)
    if not found:
        raise InputError(f"{folder}: no answer there tells what the run did")
    return found[0], read_jsonl(log)


def picture(trained, hacked):
    """The SVG (str) of two folders of PPO runs: one that went well, and one whose gold fell."""
    row, log = telling(trained)
    answers = [("base", row.get("base", row["before"]), ["gold"], ""),
               ("SFT", row["before"], ["gold"], "after"), ("PPO", row["after"], ["gold"], "later")]
    upper = half(0, "PPO: gold rises with the reward", row["prompt"], answers, log)
    row, log = telling(hacked)
    answers = [("SFT", row["before"], ["gold", "reward"], ""),
               ("PPO", row["after"], ["gold", "reward"], "later")]
    lower = half(HALF, "Reward hacking: gold falls while the reward rises", row["prompt"], answers, log)
    height = 2 * HALF
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-label="Reward and gold of two PPO runs">'
            f'<style>{STYLE}</style><rect width="{WIDTH}" height="{height}" rx="10"/>{upper}'
            f'<line x1="{EDGE}" y1="{HALF}" x2="{WIDTH - EDGE}" y2="{HALF}"/>{lower}</svg>\n')


def main(trained="out/ppo", hacked="out/hacked", to=ROOT / "data" / "plots" / "runs.svg"):
    """The command line: `python tests/experiments/picture.py [TRAINED HACKED [FILE]]`."""
    write_atomic(to, picture(trained, hacked).encode())
    print(to)


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit()
    try:
        main(*sys.argv[1:])
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
