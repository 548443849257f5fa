"""Iterated RLHF: the annotator is asked again while PPO runs, and the reward model goes on learning (step 6
of ppo.py).

A reward model is right about answers like those it was trained on. As the policy moves away from them it
finds the ones that the reward model gets wrong; new comparisons of what it says by now close the gap
(arXiv:2204.05862, 4.5). """
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data import report, world
from data.files import formats
from data.chain import result_of
from data.parallel import WORLD, micro_batches
from data.setup import set_lr
from data.sample import all_pairs, annotated, ended
from model import answer_rewards, pad_batch


def encode_pairs(rows, tok):
    """Preference rows -> [(prompt, chosen answer, rejected answer, P(chosen))], tuples of ids."""
    pairs = []
    for row in rows:
        prompt, chosen = tok.render_answer(row["prompt"], row["chosen"])
        _, rejected = tok.render_answer(row["prompt"], row["rejected"])
        pairs.append((tuple(prompt), tuple(chosen), tuple(rejected), row["label"]))
    return pairs


class Relabelling:
    """The annotator that made a reward model's first comparisons compares what the policy says by now, and
    the reward model learns from that, with some older comparisons mixed in so that it does not forget."""

    def __init__(self, run, folder, model, optimizer):
        """run: a Run that has begun. folder: where reward.py made the model, and its comparisons."""
        config = result_of(folder)["config"]
        rows, _ = formats.load(Path(folder) / "comparisons.jsonl", "preference")
        rows = random.Random(run.cfg.seed).sample(rows, min(2000, len(rows)))
        self.run, self.tok, self.model, self.optimizer = run, run.tok, model, optimizer
        self.annotator, self.center = world.annotator_of(config), config["center"]
        self.first_pairs, self.later_pairs = encode_pairs(rows, run.tok), run.state.get("later_pairs", [])

    @staticmethod
    def possible(cfg, folder):
        """Whether there is such an annotator: the tiny world's, and a reward model that reward.py made with
        it."""
        made_here = (Path(folder) / "comparisons.jsonl").exists() and result_of(folder)
        return bool(cfg.relabel and not cfg.data and made_here)

    def step(self, it, rows, answers, lr):
        """answers: some to the prompt of each row, lists of lists of ids. Returns sums over the rank's rows:
        the loss, and the accuracy on the new comparisons, before the steps that learn from them."""
        set_lr(self.optimizer, lr)
        draw, texts = random.Random(f"{self.run.cfg.seed} {it}"), []
        for group in answers:
            finished = [self.tok.decode(ids).strip() for ids in group if ended(self.tok, ids)]
            texts.append([text for text in dict.fromkeys(finished) if text])
        new = encode_pairs(annotated(all_pairs(rows, texts), self.annotator, draw), self.tok)
        old = self.first_pairs + self.later_pairs
        # At least 64 older pairs, and so many that each minibatch divides evenly over 8 processes.
        n_old = 64 + -(len(new) + 64) % (8 * self.run.cfg.minibatches)
        figures = self.learn(new, draw.sample(old, min(n_old, len(old))))
        self.later_pairs = (self.later_pairs + new)[-10000:]     # the newest
        return figures

    def learn(self, new, old):
        """--minibatches optimizer steps, on the new pairs first and then on the older ones. The loss of a
        pair is that of reward.py, but every pair counts one, however many its prompt has:
        L = - p log sigmoid(r_a - r_b) - (1 - p) log sigmoid(r_b - r_a) + c (r_a + r_b)^2 / 2"""
        cfg, device = self.run.cfg, self.model.wte.weight.device
        pairs = [(*pair, 1.0) for pair in new] + [(*pair, 0.0) for pair in old]
        size = -(-len(pairs) // cfg.minibatches)
        loss_sum, right = torch.zeros((), device=device), torch.zeros((), device=device)
        for start in range(0, len(pairs), size):
            batch = pairs[start: start + size]
            batch = batch[: len(batch) // WORLD * WORLD]
            # By length of the prompt, which keeps the pairs of a prompt side by side: a micro-batch scores
            # each answer once.
            lengths = [len(prompt) for prompt, *_ in batch]
            for part in micro_batches(range(len(batch)), lengths, cfg.micro_batch):
                # Every different answer is scored once, r (N,); i and j say which are compared.
                number, i, j = {}, [], []
                for k in part:
                    prompt, chosen, rejected, *_ = batch[k]
                    i.append(number.setdefault(prompt + chosen, len(number)))
                    j.append(number.setdefault(prompt + rejected, len(number)))
                ids, real = pad_batch(list(number), self.tok.pad_id, device)           # (N, T)
                r = answer_rewards(self.model, ids, real)                              # (N,)
                p, is_new = torch.tensor([batch[k][3:] for k in part], device=device).T

                d = r[i] - r[j]
                loss = -p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d)
                loss += self.center * (r[i] + r[j]) ** 2 / 2
                (loss.sum() / len(batch)).backward()
                loss_sum += loss.detach().sum()
                right += (is_new * report.right(d.detach(), p)).sum()
            norm = clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
            if self.run.finite(norm, self.model, range(start, start + size)):
                self.optimizer.step()
            self.optimizer.zero_grad()
        return {"rm_loss": loss_sum / max(1, len(pairs)), "rm_accuracy": right / max(1, len(new))}
