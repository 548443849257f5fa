"""Iterated RLHF: who is asked again while PPO runs, and which older comparisons are mixed in (step 6 of
ppo.py).

A reward model is right about answers like those it was trained on. As the policy moves away from them it
finds the ones that the reward model gets wrong; new comparisons of what it says by now close the gap
(arXiv:2204.05862, 4.5)."""
import random
from pathlib import Path

from data import world
from data.folder import result_of
from data.files import formats
from data.sample import all_pairs, annotated, ended

FIRST = 500       # prompts of reward.py's whose comparisons are mixed in
LATER = 4000      # the same of this run, the newest


class Relabelling:
    """The annotator behind a reward model, and what it has compared: groups, one a prompt, as
    `reward.group_pairs` makes them, `first` by reward.py, `later` in this run."""

    def __init__(self, cfg, folder, tok, group, later):
        """folder: where reward.py made the reward model. group: preference rows -> groups. later: a list, to
        which `compare` adds."""
        config = result_of(folder)["config"]
        self.cfg, self.tok, self.group, self.later = cfg, tok, group, later
        self.annotator, self.center = world.annotator_of(config), config["center"]

        # Some prompts with all their comparisons: a prompt counts one in the loss, however many it has.
        rows, _ = formats.load(Path(folder) / "comparisons.jsonl", "preference")
        prompts = sorted({str(row["prompt"]) for row in rows})
        kept = set(random.Random(cfg.seed).sample(prompts, min(FIRST, len(prompts))))
        self.first = group([row for row in rows if str(row["prompt"]) in kept])

    def compare(self, it, rows, answers, others):
        """The groups to learn from in an iteration: new ones, of the answers (lists of ids) to each row's
        prompt that ended and differ, --group by the policy, which follow one another, and one other; and some
        older ones."""
        texts, size = [], self.cfg.group
        for k, other in enumerate(others):
            said = answers[k * size: (k + 1) * size] + [other]
            # dict.fromkeys drops repeated answers and keeps their order.
            finished = [self.tok.decode(ids).strip() for ids in said if ended(self.tok, ids)]
            texts.append([text for text in dict.fromkeys(finished) if text])
        rng = random.Random(f"{self.cfg.seed} {it}")
        return self.mixed(self.group(annotated(all_pairs(rows, texts), self.annotator, rng)), rng)

    def mixed(self, new, rng):
        """New groups and some older ones, so that the reward model does not forget, in random order. The new
        ones are kept."""
        # At least 32 older ones, and so many that each minibatch divides evenly over 8 processes.
        older = self.first + self.later
        n = 32 + -(len(new) + 32) % (8 * self.cfg.minibatches)
        groups = new + rng.sample(older, min(n, len(older)))
        rng.shuffle(groups)
        self.later += new
        del self.later[:-LATER]
        return groups


def relabelling_of(cfg, folder, tok, scorer, group_pairs, later):
    """The Relabelling of a run whose one reward model, which reads the policy's tokens, reward.py made in a
    folder, from comparisons in which no critic had a part (it is not there any more); None where that is not
    so, or --relabel 0. group_pairs: of reward.py; later: see Relabelling."""
    config = result_of(folder).get("config", {})
    made_here = (Path(folder) / "comparisons.jsonl").exists() and config and not config.get("critique")
    is_one = len(scorer.models()) == 1 and scorer.value_start is not None
    if not cfg.relabel or cfg.data or not made_here or not is_one:
        return None

    def group(rows):
        """Preference rows as reward.py groups them."""
        return group_pairs(rows, tok, scorer.value_start.cfg.max_len)[0]
    return Relabelling(cfg, folder, tok, group, later)
