"""Vote in the terminal: which of two answers is better?

    python -m data.vote                                   answers of out/sft; out/reward says what it thinks
    python -m data.vote --policy gpt2 --data mine.jsonl   your policy and prompts (data/files/formats.py)

Each vote is a line of votes.jsonl in --out, on the disk before the next question is asked, so that Ctrl-C or
a lost connection costs nothing. The next session leaves out the prompts voted on. reward.py and dpo.py learn
from that file.
"""
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from data import InputError, comparisons, sample, world
from data.files import formats
from data.chain import beside, need
from data.files.checkpoint import load
from data.flags import ToolFlags, names_in, program
from data.folder import lock
from data.prompts import short_enough
from data.rewards import rewards_of_texts
from data.setup import seeded, setup
from model import freeze_and_cast

KEYS = "1, 2, t(ie), s(kip), u(ndo), q(uit)"


@dataclass
class Config(ToolFlags):
    """The flags of `python -m data.vote`."""
    # Who answers what, and who is asked what it thinks of it
    policy: str = ""              # models that answer, A or A,B (default: sft)
    reward: str = ""              # reward model (default: reward; with a --policy of your own: none)
    k: int = 4                    # answers per question, shared among the policies; two are shown
    max_new: int = 48             # longest answer, in tokens
    temperature: float = 1.0      # of sampling
    data: str = ""                # prompts (default: the tiny world's)
    # The run itself (the same in every script)
    out: str = ""                 # folder of votes.jsonl (default: out/vote; with your data out/mine/vote)


# ------------------------------------------------------------------------------------------------------------
# The terminal.


def questions(policies, rows, cfg):
    """Pairs to vote on, made one at a time: two different answers of policies [(model, tok)] to the prompt of
    each of rows. A prompt that is too long, or has no two different answers that end, is passed over."""
    for row in rows:
        # Draws of its own for every prompt, so that it gets the same answers whatever was asked before.
        rng, answers = random.Random(f"{cfg.seed} {row['prompt']}"), []
        for n, (model, tok) in enumerate(policies):
            count = cfg.k // len(policies) + (n < cfg.k % len(policies))
            if not short_enough(tok, [row], model.cfg.max_len - cfg.max_new):
                continue
            generator = seeded(rng.getrandbits(32), 0)
            [texts] = sample.different_answers(model, tok, [row], count, cfg.max_new, generator,
                                               cfg.temperature)
            answers += [text for text in texts if text not in answers]
        if len(answers) > 1:
            a, b = rng.sample(answers, 2)
            yield {"prompt": row["prompt"], "a": a, "b": b}


def read_votes(path):
    """The votes in a file, [] if there is none yet. A last line without its end, which a power cut may leave,
    gets one, or the next vote would be written into it. InputError: a line is broken, or no vote."""
    there = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(there.split(b"\n"), 1):
        if line.strip() and not is_vote(line):
            raise InputError(f"{path}:{number}: no vote of this program, which adds to the file and takes "
                             "back from it; choose another --out")
    if there and not there.endswith(b"\n"):
        write_line(path, b"")
    return formats.load(path, "preference")[0] if there else []


def is_vote(line):
    """Whether a line of a file (bytes) is one that this program wrote."""
    try:
        return json.loads(line).keys() == {"prompt", "chosen", "rejected", "label"}
    except (ValueError, AttributeError):
        return False


def write_line(path, line):
    """Append a line (bytes) and wait until the disk has it."""
    with open(path, "ab") as f:
        f.write(line + b"\n")
        f.flush()
        os.fsync(f.fileno())


def take_back(path):
    """Remove the last vote from the end of the file; what stands before it is not written again."""
    os.truncate(path, path.read_bytes().rstrip().rfind(b"\n") + 1)


def ask(pair, n_votes):
    """Show a pair and wait for one of the keys. EOFError: the input has ended."""
    print()
    for turn in pair["prompt"]:
        print(f"{turn['role']}: {turn['content']}")
    for number, side in (("1", "a"), ("2", "b")):
        text = pair[side].replace("\n", "\n     ")
        print(f"\n  {number}  {text}")

    # Anything that is no key is asked again.
    key = ""
    while key not in ("1", "2", "t", "s", "u", "q"):
        key = input(f"\n[{n_votes} votes] {KEYS}> ").strip()[:1].lower()
    return key


def opinion(pair, model, tok, agreed):
    """What a reward model thinks of a pair that has been voted on, as text. agreed: whether it did with the
    votes so far, None for ties; this one is appended."""
    # Nothing can be said of what it cannot read.
    if not comparisons.fits(pair, tok, model.cfg.max_len):
        agreed.append(None)
        return f"(longer than the {model.cfg.max_len} tokens that the reward model reads)"

    # Its two rewards, and whether the larger one is that of the chosen answer.
    r_a, r_b = rewards_of_texts(model, tok, [pair["prompt"]] * 2, [pair["a"], pair["b"]])
    tie = pair["label"] == 0.5
    agreed.append(None if tie else (r_a > r_b) == (pair["label"] > 0.5))
    p = world.choice_probability(r_a - r_b, noise=1)      # sigmoid (Bradley & Terry 1952)
    text = f"reward model: 1 {r_a:+.2f}, 2 {r_b:+.2f}, P(1 over 2) = {p:.2f}"
    if tie:
        return f"{text}, and you called it a tie"
    return f"{text}; it agreed with you in {agreed.count(True)} of {len(agreed) - agreed.count(None)}"


def main(cfg):
    """Ask for votes until no prompt is left, or whoever votes has had enough."""
    # The votes so far, and who takes part. Links of the chain that are missing are made first.
    device = setup(cfg)
    path = Path(cfg.out) / "votes.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock(path.parent)      # of two sessions one would take back the other's votes
    votes = read_votes(path)
    reward = cfg.reward or ("" if cfg.policy else need(cfg, "reward"))
    names = names_in(cfg.policy or need(cfg, "sft"))

    # The models, and the prompts that have no vote yet.
    policies = [sample.load_sampler(name, device) for name in names]
    if reward:
        reward_model, reward_tok = load(reward, head="score")
        reward_model = freeze_and_cast(reward_model).to(device)
    rows, _ = formats.load(cfg.data or world.TINY / "preference.jsonl", "prompt")
    seen = [vote["prompt"] for vote in votes]
    rows = [row for row in random.Random(cfg.seed).sample(rows, len(rows)) if row["prompt"] not in seen]
    new, again, agreed = questions(policies, rows, cfg), [], []     # again: asked anew, the last one first

    try:
        while True:
            pair = again.pop() if again else next(new, None)
            if pair is None:
                print("\nno prompt is left that has two different answers")
                break
            key = ask(pair, len(votes))
            if key == "q":
                break
            if key == "s":
                continue

            # Take back the last vote, also one of an earlier session, and ask it again, then this one.
            if key == "u":
                again.append(pair)
                if votes:
                    take_back(path)
                    last = votes.pop()
                    a, b = sorted((last["chosen"], last["rejected"]))
                    again.append({"prompt": last["prompt"], "a": a, "b": b})
                    agreed = agreed[:-1]
                continue

            # A vote, on the disk before the reward model says what it thinks.
            chosen, rejected = (pair["b"], pair["a"]) if key == "2" else (pair["a"], pair["b"])
            label = 0.5 if key == "t" else 1.0
            votes.append({"prompt": pair["prompt"], "chosen": chosen, "rejected": rejected, "label": label})
            write_line(path, json.dumps(votes[-1]).encode())
            if reward:
                pair["label"] = {"1": 1.0, "2": 0.0, "t": 0.5}[key]
                print("\n    " + opinion(pair, reward_model, reward_tok, agreed), flush=True)
    except (EOFError, KeyboardInterrupt):
        print()
    start = names[0]
    if reward and not reward_model.process:     # which did not learn from comparisons
        start = reward
    print(f"{len(votes)} votes in {path}; to learn from them: "
          f"python reward.py --init {start} --data {path} --out {beside(path.parent, 'reward')}")


if __name__ == "__main__":
    program(main, Config, __doc__)
