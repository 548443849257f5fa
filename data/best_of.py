"""Best of N: keep the answer that a reward likes best, and fine-tune on that (rejection sampling).

    python -m data.best_of                                    out/sft answers, out/reward chooses
    python sft.py --init out/sft --data out/best_of/demos.jsonl --lr 2e-4 --out out/best_of_sft
    python -m data.best_of --pick random --out out/any_of     the control: any one of the N

The rung between SFT and PPO: a reward, and no reinforcement learning (arXiv:2112.09332; Llama 2,
arXiv:2307.09288, section 3.2.3). The policy answers each prompt N times; the answer with the largest reward
becomes a demonstration for sft.py. However much the reward likes it, the best of N is at most a KL of
log N - (N - 1) / N nats away from the policy (arXiv:2009.01325, appendix G.3), and "kl" in its result is
that bound; PPO can go further, for better and for worse.

The control tells selection apart from training on one's own answers: --pick random keeps as many
demonstrations, of the same answers, and its reward only measures.
"""
import math
import random
import time
import typing
from dataclasses import asdict, dataclass
from pathlib import Path

from data import InputError, report, world, write_json, write_jsonl
from data.chain import need
from data.files import formats
from data.flags import ToolFlags, program
from data.folder import take
from data.prompts import short_enough
from data.rewards import scorer_on
from data.sample import ended, load_sampler, repeated, sample_answers
from data.screen import SCREEN
from data.setup import seeded, setup

AT_ONCE = 64      # prompts between two messages


@dataclass
class Config(ToolFlags):
    """The flags of `python -m data.best_of`."""
    # Who answers what
    policy: str = ""              # model that answers (default: sft)
    data: str = ""                # prompts (default: the tiny world's for PPO)
    prompts: int = 2240           # the first so many; times --n 8 that is as many answers as PPO's
    n: int = 8                    # answers to each prompt
    max_new: int = 32             # longest answer, in tokens
    temperature: float = 1.0      # of sampling
    # Which answer is kept
    reward: str = ""              # what chooses: anything that ppo.py --reward takes (default: reward)
    pick: typing.Literal["best", "random"] = "best"   # of the answers to a prompt that end
    # The run itself (the same in every script)
    out: str = ""   # folder of demos.jsonl (default: out/best_of; with your data out/mine/best_of)
    overwrite: bool = False       # replace what other flags left there


def choose(texts, ids, scores, tok, rng):
    """The number of the answer that is kept of those to one prompt (texts, and as ids): the one with the
    largest of the scores or, where scores is None, any. None: no answer ends and says something."""
    whole = []
    for i, text in enumerate(texts):
        # An answer that was cut off would teach not to end.
        if ended(tok, ids[i]) and text.strip():
            whole.append(i)
    if not whole:
        return None
    if scores is None:
        return rng.choice(whole)
    return max(whole, key=lambda i: scores[i])


def metrics_of(rows, texts, scores, graded):
    """Mean reward of one answer to each row's prompt and, in the tiny world, what gold says: {name: mean}."""
    metrics = world.mean_scores(rows, texts) if graded else {}
    return metrics | {"reward": sum(scores) / len(scores)}


def main(cfg):
    """Write demonstrations: of N answers to each prompt, one."""
    start, device = time.perf_counter(), setup(cfg)
    reward_name, policy_name = cfg.reward or need(cfg, "reward"), cfg.policy or need(cfg, "sft")
    policy, tok = load_sampler(policy_name, device)
    reward = scorer_on("--reward", reward_name, device)

    # The prompts that leave room for an answer.
    data = cfg.data or world.TINY / "rl.jsonl"
    rows, dropped = formats.load(data, "prompt", cfg.prompts)
    print(formats.describe(rows, dropped, data))
    reward.check_prompts(rows)
    rows = reward.readable(short_enough(tok, rows, policy.cfg.max_len - cfg.max_new), cfg.max_new)
    graded = all(map(world.knows, rows))
    if not rows:
        raise InputError(f"{data}: no prompt leaves room for --max_new {cfg.max_new} tokens")

    folder = Path(cfg.out)
    take(cfg, "best_of", ["demos.jsonl", "result.json"], [policy_name, reward_name, data])

    # All answers, and those that are kept: lists of (row, text, score).
    answers, kept = [], []
    generator, rng = seeded(cfg.seed, 0), random.Random(cfg.seed)
    for at in range(0, len(rows), AT_ONCE):
        asked = repeated(rows[at: at + AT_ONCE], cfg.n)
        prompts = [row["prompt"] for row in asked]
        texts, _, ids = sample_answers(policy, tok, prompts, cfg.max_new, generator, cfg.temperature)
        scored = list(zip(asked, texts, reward.score_texts(asked, texts)))
        answers += scored
        for first in range(0, len(asked), cfg.n):
            group = slice(first, first + cfg.n)
            scores = [score for _, _, score in scored[group]] if cfg.pick == "best" else None
            i = choose(texts[group], ids[group], scores, tok, rng)
            if i is not None:
                kept.append(scored[first + i])
        SCREEN.count(len(answers) // cfg.n, len(rows), "prompts answered")
    if not kept:
        raise InputError(f"{policy_name}: none of {len(answers):,} answers ends within --max_new "
                         f"{cfg.max_new} tokens, so there is nothing to learn from")

    # Demonstrations, and how far choosing alone gets.
    demos = []
    for row, text, score in kept:
        said = {"role": "assistant", "content": text.strip()}
        demos.append({"messages": [*row["prompt"], said], "reward": score})
    write_jsonl(folder / "demos.jsonl", demos)
    before, after = metrics_of(*zip(*answers), graded), metrics_of(*zip(*kept), graded)
    if cfg.pick == "best":
        after["kl"] = math.log(cfg.n) - (cfg.n - 1) / cfg.n
    result = {"stage": "best_of", "seed": cfg.seed, "config": asdict(cfg), "device": str(device),
              "seconds": round(time.perf_counter() - start, 1), "before": before, "after": after}
    write_json(folder / "result.json", result)
    print(report.table({"all answers": before, f"{cfg.pick} of {cfg.n}": after}, explained=True))
    path, n_without = folder / "demos.jsonl", len(rows) - len(demos)
    print(f"{len(demos):,} demonstrations in {path}; {n_without:,} prompts have no answer that ends")
    print(f"next: python sft.py --init {policy_name} --data {path} --lr 2e-4 --out {folder}_sft")


if __name__ == "__main__":
    program(main, Config, __doc__)
