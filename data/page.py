"""One page over all runs: reads what the runs under OUT left, writes OUT/index.html.

    python -m data.page                           of the runs in out; then open out/index.html in a browser
    python -m data.page OUT --to FILE             of those in OUT, to send or to commit: at most 1 MB
    python -m data.page FILE --to FILE            the data of a page that is there, drawn as pages are now

The page is one file: data/page.html with the data in place of its one placeholder. It needs no network and no
package, so it can be mailed, and opened years later. Every script writes it anew at its end. Its sections,
and the files that they are made from:
    1. pipeline, prompt picker      OUT/*/result.json, log.jsonl, answers.jsonl
    2. vote                         OUT/*/held_out.jsonl, of a reward model
    3. one PPO iteration            OUT/*/inspect.json, log.jsonl
    4. RLHF beside DPO              as 1
    5. Constitutional AI            OUT/*/round*/chains.jsonl, comparisons.jsonl, critic.json
    6. reward hacking               OUT/*/log.jsonl, and OUT/hacking, if tests/experiments/hacking.py was run
Numbers go into the page as the files have them; the page's own JavaScript draws them and does the sums. A
file that is absent, half written or of another shape only leaves out what would have been shown of it.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

from data import InputError, read_json, write_atomic
from data.world import HERE

TEMPLATE = Path(__file__).with_name("page.html")
CONSTITUTION = HERE / "constitution.json"
PLACE = "{{DATA}}"              # stands in the template once, between the following two
START, END = '<script type="application/json" id="data">', "</script>"
TITLE = "<title>RLHF, run by run</title>"      # tells our page from another one
MOST = 1_000_000                # bytes of a page to commit
CHAIN = ["base", "sft", "reward", "ppo", "dpo", "cai"]   # order on the page; other folders follow by name
CURVES = ["reward", "gold", "kl", "kl_exact", "entropy", "length", "eos_rate", "accuracy", "chosen_reward",
          "rejected_reward"]    # the figures of log.jsonl that the page draws
POINTS = 300                    # of a curve, at most; the 1,600 steps of pretraining need no more
ROWS = 500                      # of answers.jsonl and held_out.jsonl, at most
SOME = 60                       # chains, and comparisons of a critic, at most


def write_page(out_folder):
    """Write out_folder/index.html over all runs in it, and return its path. Cheap: every script calls it at
    its end. What cannot be read is left out. InputError: an index.html is there that is no page of ours.
    OSError: the page cannot be written."""
    out = Path(out_folder)
    return write(out / "index.html", page_of(collect(out)))


def page_of(data):
    """The page (str) that shows data as `collect` gives it."""
    # The data stands in the page as JSON in a script tag that no browser runs; the page's script reads it.
    # json.dumps writes ASCII alone, so U+2028 is escaped too; without < no text can end the script tag.
    text = json.dumps(data, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def write(path, page):
    """Write a page (str), over an older one if there is one, and return its path. InputError: something else
    is there."""
    if os.path.lexists(path) and not is_ours(path):
        raise InputError(f"{path} is no page of ours; another place: python -m data.page OUT --to FILE")
    write_atomic(path, page.encode())
    return path


def is_ours(path):
    """Whether a page at a path is one that this module wrote."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return START in text and TITLE in text and START + PLACE not in text      # not the template


def data_of(path):
    """The data in a page. InputError: it is none of ours."""
    _, found, rest = path.read_text(encoding="utf-8", errors="replace").partition(START)
    if not found:
        raise InputError(f"{path} is no page of ours")
    return json.loads(rest.partition(END)[0])


def collect(out):
    """All data of the page: lists with one object a folder, {"runs": [..], "answers": [..], ..}."""
    # The chain's folders come first and in its order, all others behind them by name.
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    folders.sort(key=lambda path: CHAIN.index(path.name) if path.name in CHAIN else len(CHAIN))
    sft = [path for path in folders if path.name == "sft"]
    return {"folder": str(out),
            "runs": each(run, folders),
            "answers": each(first_answers, sft) + each(answers, folders),
            "held_out": each(held_out, folders),
            "inspect": each(inspect, folders),
            "rounds": each(constitutional_round, sorted(out.glob("*/round*"))),
            "climbs": each(climb, sorted(out.glob("hacking/*/none"))),
            "cures": each(read_json, [out / "hacking" / "cures.json"]),
            "principles": each(read_json, [CONSTITUTION])}


def each(read, paths):
    """[read(path)] of the paths for which there is something to read. A run that is going on, or an old one,
    may have left anything, and a page is never a reason to fail: whatever goes wrong leaves out one path."""
    found = []
    for path in paths:
        try:
            value = finite(read(path))
        except Exception:
            continue
        if value:
            found.append(value)
    return found


def finite(value):
    """The same JSON value with None for NaN and infinities, which Python reads and JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def lines(path, most=sys.maxsize):
    """The first JSON objects of a .jsonl file, [] if there is none. Broken lines are left out: so is the last
    one while it is being written."""
    found = []
    if not path.is_file():
        return found
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                found.append(row)
            if len(found) == most:
                break
    return found


# ------------------------------------------------------------------------------------------------------------
# One function for each kind of thing on the page. It takes a folder; None says that there is no such thing.


def run(folder):
    """What result.json says, and the curves. Without a result.json the run goes on, or was cut off; its
    curves are there all the same."""
    result = each(read_json, [folder / "result.json"])
    log = curves(folder)
    if not result and not log:
        return None
    # What the page asks for without asking whether it is there has a value here. The stage of a run that was
    # cut off stands in run.json, which is written first.
    started = each(read_json, [folder / "run.json"])
    stage = started[0].get("stage", folder.name) if started else folder.name
    found = {"stage": stage, "before": {}, "after": {}}
    for key in ("stage", "seed", "seconds", "device", "config", "steps", "planned", "given", "before",
                "after"):
        if result and key in result[0]:
            found[key] = result[0][key]
    # A PPO run whose reward model went on learning (--relabel) has saved it beside the policy.
    relabelled = (folder / "reward").is_dir() and bool((found.get("config") or {}).get("relabel", True))
    return {**found, "name": folder.name, "finished": bool(result), "relabelled": relabelled, "log": log}


def curves(folder):
    """log.jsonl as {"step": [n, ..], "gold": [number or None, ..], ..}: about POINTS steps, and the last."""
    rows = lines(folder / "log.jsonl")
    # Every n-th row, and the last one in any case: it is where the run ended.
    thin = rows[::math.ceil(len(rows) / POINTS) or 1]
    if thin and thin[-1] is not rows[-1]:
        thin.append(rows[-1])
    # Rows become columns. A figure that some rows lack has a gap there, one that all lack is left out.
    found = {}
    for key in ["step", *CURVES]:
        column = [row.get(key) for row in thin]
        if any(value is not None for value in column):
            found[key] = column
    return found


def answers(folder, when="after"):
    """What a finished policy says to the test prompts, and the gold of what it said before training: {"name",
    "rows": [{"prompt", "family", "answer", its scores .., "start"}]}."""
    # Answers of a run that has not ended would be those of an older run.
    if not (folder / "result.json").is_file():
        return None
    # The scores of an answer differ between data sets: whatever the row has goes along.
    found = []
    for row in lines(folder / "answers.jsonl", ROWS):
        if isinstance(row.get("prompt"), str) and isinstance(row.get(when), dict):
            start = (row.get("before") or {}).get("gold")
            found.append({**row[when], "prompt": row["prompt"], "family": row.get("family"), "start": start})
    return {"name": folder.name, "rows": found} if found else None


def first_answers(folder):
    """The same of the base model, from the folder of SFT, which began with it."""
    if (folder.parent / "base" / "answers.jsonl").is_file():
        return None
    return {**answers(folder, "before"), "name": "base"}


def held_out(folder):
    """Comparisons that a reward model has not learned from, with its rewards: {"name", "pairs"}."""
    pairs = lines(folder / "held_out.jsonl", ROWS)
    return {"name": folder.name, "pairs": pairs} if pairs else None


def inspect(folder):
    """Every number of a few responses, in the first and in the last iteration of a PPO run."""
    return {**read_json(folder / "inspect.json"), "name": folder.name}


def said(answer):
    """The text of an answer in comparisons.jsonl: a list of one message, or a string."""
    return answer[0]["content"] if isinstance(answer, list) else answer


def constitutional_round(folder):
    """Some chains and comparisons of one round of cai.py, and what was wrong with how many revisions."""
    # The faults are counted over all revisions, since only some of the chains go into the page.
    chains, faults = lines(folder / "chains.jsonl"), {}
    for chain in chains:
        for step in chain["chain"]:
            kind = step["fault"] or "good"
            faults[kind] = faults.get(kind, 0) + 1
    # The file also holds what people, not the critic, compared; those rows have no orders.
    by_critic = []
    for row in lines(folder / "comparisons.jsonl"):
        if "orders" in row:
            answers = {"chosen": said(row["chosen"]), "rejected": said(row["rejected"])}
            by_critic.append(row | answers)
    if not chains and not by_critic:
        return None
    return {"name": f"{folder.parent.name}/{folder.name}", "chains": chains[:SOME], "faults": faults,
            "comparisons": by_critic[:SOME], "critic": each(read_json, [folder / "critic.json"])}


def climb(folder):
    """A run of tests/experiments/hacking.py without a cure, and the best-of-N points of the model that it
    began with."""
    best = []
    for result in each(read_json, sorted(folder.parent.glob("evaluate_*/result.json"))):
        best += result["best_of"]
    return {"name": folder.parent.name, "log": curves(folder), "best": best}


def main(arguments):
    """The command line: `python -m data.page [OUT] [--to FILE]`."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("out", nargs="?", default="out", help="folder of runs, or a page (default: out)")
    parser.add_argument("--to", help="the page (default: index.html in the folder)")
    given = parser.parse_args(arguments)
    out = Path(given.out)
    if out.is_dir():
        data = collect(out)
    elif out.is_file() and given.to:
        data = data_of(out)
    else:
        raise InputError(f"{out}: no such folder; name the one that holds the runs, or run ppo.py first")
    page = page_of(data)
    if given.to and len(page) > MOST:
        raise InputError(f"the page would take {len(page):,} bytes, and {MOST:,} is the most for a file to "
                         f"commit; leave only the runs in {out} that it needs")
    print(write(Path(given.to or out / "index.html"), page))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
