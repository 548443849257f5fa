"""PPO: reinforcement learning from human feedback, with the four models of InstructGPT.

    python ppo.py                                            the tiny world; makes base, sft and reward if missing
    python ppo.py --init SFT --reward RM --data prompts.jsonl --lr 1e-6 --value_lr 1e-5      your models, your prompts
    python ppo.py --reward mymodule:score                    any Python function(rows, responses) -> list of floats
    python ppo.py --inspect                                  every number of one response, before and after an update

Objective (arXiv:2203.02155, eq. 2 with gamma = 0):  max_pi  E[ r(x, y) ] - beta KL(pi || pi_ref)
One iteration:
  1. rollout    y ~ pi(. | x) at --temperature, from the KV cache; no top-k or top-p: pi_old is what is sampled from
  2. score      r(x, y) by the reward model, read at EOS; a response without EOS gets -eos_penalty instead
  3. reward     R_t = -beta (log pi(y_t) - log pi_ref(y_t))  +  [t is the last token] r       (k1 estimate, no gradient)
  4. advantage  delta_t = R_t + gamma V_t+1 - V_t,   A_t = delta_t + gamma lam A_t+1,   V after the end = 0
                (GAE, arXiv:1506.02438, eq. 11-16); returns = A + V; then A is whitened over the batch's response tokens
  5. update     epochs x minibatches:  ratio = pi / pi_old,
                L = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)                            (arXiv:1707.06347, eq. 7)
                L_V = max((V - ret)^2, (clip(V, V_old - eps_v, V_old + eps_v) - ret)^2) / 2
  6. ask        the annotator compares the answers to each prompt, and the reward model takes a step on that (--relabel)
Against reward hacking (data/evaluate.py shows it): several reward models at once (--reward A,B,C --ensemble uwo),
--kl_budget, --kl adaptive, --length_penalty, --entropy_coef, --relabel. Against forgetting: pretraining text mixed in,
    L - ptx_coef E[ log pi(x) ]  over the corpus (arXiv:2203.02155, eq. 2). A run that goes wrong says so (health).

All temperatures divide logits in pi, pi_old and pi_ref alike. All means are over response tokens, EOS included, and use
the token count of the whole minibatch, so a minibatch may be cut into micro-batches freely.

Four models: policy (trained), reference (frozen policy), reward model (frozen unless the annotator is asked again),
value model (trained, starts as the reward model). A prompt with several answers goes through each of them once.
Memory: a trained model takes 16 bytes a weight (it, its gradient and Adam's two moments in fp32), a frozen one 2 to 4
(its layers are kept in bf16), the copy that samples 2; so four models of N weights take 37 to 39 N bytes (4.9 GB for
GPT-2 124M), with --lora 16 5 to 6.5 N, and the activations of one micro-batch, of which --recompute keeps a part.
--advantage rloo or grpo needs no value model: the other answers to the same prompt are the baseline.
"""
import copy
import json
import random
import shutil
import tempfile
import time
import typing
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import InputError, formats, function_of, world
from model import (RANK, Run, distinct_2, for_training, frozen, generate, home, load, load_optimizer, load_state, need,
                   optimizer_for, pad_batch, pieces, read_corpus, respond, result_of, run, save, seeded, setup, sharded,
                   share, sibling, summed, token_logprobs, trained, with_lora, with_shared_prompts, write_atomic)


@dataclass
class Config:
    """The flags of `python ppo.py`."""
    init: str = ""                # policy to start from and to stay close to (default: sft beside --out)
    reward: str = ""              # reward model, or "gold", or module:function, or several: A,B,C (default: reward
                                  # beside --out)
    ensemble: typing.Literal["mean", "min", "uwo"] = "mean"   # what several rewards become: their mean, the smallest,
                                  # or uwo: mean - uwo_coef x variance (arXiv:2310.02743)
    uwo_coef: float = 0.5         # of the variance
    reward_weights: str = ""      # of several rewards, 1,0.5 (default: equal), e.g. of a helpful and a harmless one
    data: str = ""                # prompts (default: the tiny world's)
    out: str = "out/ppo"          # folder for the checkpoint, log, samples and plot
    iterations: int = 70          # rollout + update
    relabel: int = 1              # every so many iterations have the answers to each prompt, and one of --init,
                                  # compared, and the reward model learn from that (0: never); needs the tiny world's
                                  # annotator and one reward model of ours
    reward_lr: float = 1e-3       # of the reward model then
    rollouts: int = 256           # responses an iteration
    epochs: int = 1               # passes over each batch of rollouts
    minibatches: int = 4          # optimizer steps per pass
    micro_batch: int = 32         # sequences per forward pass; smaller needs less memory and changes nothing else
    max_prompt: int = 128         # longer prompts are left out and counted, in tokens
    max_new: int = 32             # longest response, in tokens
    temperature: float = 1.0      # of sampling and of every log-prob
    advantage: typing.Literal["gae", "rloo", "grpo"] = "gae"   # gae uses the value model, the others --group answers
    group: int = 2                # answers per prompt (rloo and grpo need at least 2)
    gamma: float = 1.0            # discount
    lam: float = 0.95             # GAE lambda
    lr: float = 2e-4              # of the policy, falling linearly to a third (1e-6 to 1e-5 for real models)
    value_lr: float = 5e-4        # of the value model
    value_warmup: int = 4         # first iterations that train only the value model
    clip: float = 0.2             # eps of the ratio
    value_clip: float = 0.5       # eps_v of the values, in units of reward
    entropy_coef: float = 0.0     # weight of an entropy bonus
    length_penalty: float = 0.0   # taken off the score for every token of the response
    ptx_coef: float = 0.0         # weight of the pretraining loss mixed into every step (arXiv:2203.02155, eq. 2)
    ptx_data: str = ""            # its text, documents separated by <|endoftext|> (default: the tiny world's corpus)
    kl_coef: float = 0.1          # beta (the initial one if adaptive)
    kl: typing.Literal["fixed", "adaptive"] = "fixed"   # adaptive: steer beta to --kl_target (arXiv:1909.08593)
    kl_target: float = 4.0        # nats per response
    kl_horizon: float = 10000.0   # responses over which beta may change e-fold, roughly
    kl_budget: float = 0.0        # stop where the exact KL reaches so many nats per response (0: no limit)
    eos_penalty: float = 4.0      # a response that does not end gets minus this instead of its score
    grad_clip: float = 1.0        # largest gradient norm, for each model by itself
    save_every: int = 25          # iterations between checkpoints
    inspect: bool = False         # do not train: print one response token by token, before and after one iteration's
                                  # update (with --resume: of the policy in --out)
    lora: int = 0                 # rank of the adapters of policy and value model on a frozen trunk (0: train all)
    max_steps: int = 0            # stop after this many iterations (0: run all)
    resume: bool = False          # go on from the last checkpoint in --out
    seed: int = 0                 # every random draw comes from (seed, iteration)
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; weights stay fp32
    compile: bool = False         # torch.compile the training forward, and on a GPU the decoding step
    recompute: bool = False       # activation checkpointing: layers run again in the backward pass, for less memory
    fsdp: bool = False            # with torchrun: cut weights, gradients and optimizer state over the processes


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm as pure functions. All tensors (B, T), index t is token t, mask is 1 on response tokens (contiguous).


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Advantages and returns (B, T) from rewards and values (value of the state before token t). What lies outside the
    mask is ignored and comes out 0; the value after the last response token is 0 (arXiv:1506.02438, eq. 16)."""
    rewards, values = rewards * mask, values * mask
    advantages, last = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(last)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = (delta + gamma * lam * last) * mask[:, t]
        advantages[:, t] = last
    return advantages, advantages + values


def group_advantages(scores, group, kind):
    """Advantages (B,) of sequence rewards (B,) in consecutive groups of answers to one prompt.
    rloo: minus the mean of the others (arXiv:2402.14740, eq. 7). grpo: (r - mean) / std (arXiv:2402.03300, 4.1.2)."""
    r = scores.view(-1, group)
    if kind == "rloo":
        return ((r - r.mean(1, keepdim=True)) * group / (group - 1)).flatten()
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).flatten()


def whiten(x, mask):
    """(x - mean) / std over the masked entries; 0 elsewhere."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    var = ((x - mean) ** 2 * mask).sum() / n
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def policy_loss(logp, old_logp, advantages, mask, clip, n_tokens):
    """Clipped surrogate (arXiv:1707.06347, eq. 7), summed over response tokens, divided by n_tokens. Returns the loss
    and sums over tokens for the log: approx_kl = (ratio - 1) - log ratio (joschu.net/blog/kl-approx.html), clipfrac."""
    logratio = ((logp - old_logp) * mask).clamp(-20, 20)
    ratio = logratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        stats = {"approx_kl": (ratio - 1 - logratio).sum() / n_tokens,
                 "clipfrac": (((ratio - 1).abs() > clip) * mask).sum() / n_tokens}
    return -(surrogate * mask).sum() / n_tokens, stats


def value_loss(values, old_values, returns, mask, clip, n_tokens):
    """Clipped value loss: the worse of the plain and the clipped squared error, halved, per response token."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (worse * mask).sum() / n_tokens


def kl_estimators(logp, ref_logp):
    """Three estimates of KL(pi || pi_ref) from samples of pi (joschu.net/blog/kl-approx.html), elementwise:
    k1 = log pi - log ref, unbiased but noisy; k2 = k1^2 / 2, biased; k3 = ref / pi - 1 + k1, unbiased and never < 0."""
    k1 = logp - ref_logp
    return k1, k1 ** 2 / 2, torch.expm1(-k1.clamp(min=-20)) + k1


def adapt_kl_coef(beta, kl, target, n, horizon):
    """Proportional controller in log space (arXiv:1909.08593, section 2.2): beta grows while kl is above target."""
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


def ensemble(rewards, kind, coef):
    """One reward (B,) of those of K models (K, B) that err differently (arXiv:2310.02743, eq. 4-6): their mean, the
    smallest (min), or uncertainty-weighted (uwo), mean - coef x variance between the models."""
    if kind == "min":
        return rewards.min(0).values
    return rewards.mean(0) - (coef * rewards.var(0, correction=0) if kind == "uwo" else 0)


def health(history):
    """What is wrong with a run, in words: {name: sentence}, from its log rows so far (list of dicts). Compares the last
    five with the first five, and says nothing while there are fewer than ten."""
    if len(history) < 10:
        return {}

    def means(rows):
        return {k: sum(r[k] for r in rows if k in r) / sum(k in r for r in rows) for k in rows[-1]}
    old, now, said = means(history[:5]), means(history[-5:]), {}
    if now["kl"] < -0.1:
        said["negative KL"] = f"""the KL is estimated at {now['kl']:.2f}, and no KL is negative: the log-probs are not
            those of what was sampled from; see the checks before the first update, try --dtype float32"""
    if now["eos_rate"] < min(0.9, old["eos_rate"] - 0.1):
        said["EOS rate"] = f"""only {now['eos_rate']:.2f} of the responses end, it was {old['eos_rate']:.2f}: rambling
            pays; try a larger --eos_penalty, or a larger --max_new if good answers need it"""
    if now["entropy"] < 0.05 * old["entropy"]:
        said["entropy"] = f"""it fell from {old['entropy']:.3f} to {now['entropy']:.3f} nats per token: the policy has
            stopped exploring; try --entropy_coef 0.01, a larger --kl_coef or a smaller --lr"""
    if now.get("unique", 1) < 0.3 * old.get("unique", 1):
        said["identical responses"] = f"""only {now['unique']:.2f} of them differ, it was {old['unique']:.2f}: one
            answer pays for many prompts; read the samples, try a larger --kl_coef or --entropy_coef 0.01"""
    if now["length"] > 1.5 * old["length"]:
        said["length"] = f"""it grew from {old['length']:.1f} to {now['length']:.1f} tokens: the reward pays for talk;
            try --length_penalty 0.05"""
    if now["length"] < 0.5 * old["length"]:
        said["length"] = f"""it shrank from {old['length']:.1f} to {now['length']:.1f} tokens: the reward pays for
            brevity; read the samples, try a larger --kl_coef or a smaller --eos_penalty"""
    if now.get("clipfrac", 0) > 0.3 or now.get("approx_kl", 0) > 0.1:
        said["ratio"] = f"""{now['clipfrac']:.2f} of the ratios are clipped and approx_kl is {now['approx_kl']:.3f}: the
            steps are too large; try a smaller --lr or fewer --epochs"""
    if len(history) >= 20 and "value_loss" in now and now["explained_var"] <= 0:
        said["value model"] = f"""it explains {now['explained_var']:.2f} of the variance of the returns, where a
            constant explains 0: try a larger --value_lr or --value_warmup, or do without: --advantage rloo --group 4"""
    if "gold" in now:   # the best five iterations in a row against the last five
        golds = [row["gold"] for row in history]
        at = max(range(len(golds) - 4), key=lambda i: sum(golds[i: i + 5]) / 5)
        best = means(history[at: at + 5])
        if now["gold"] < best["gold"] - 0.05 and now["reward"] > best["reward"]:
            said["reward hacking"] = f"""gold fell from {best['gold']:.2f} to {now['gold']:.2f} while the reward rose
                from {best['reward']:.2f} to {now['reward']:.2f}: the policy exploits the reward model (Goodhart's law);
                try --relabel 1, --kl_budget {best['kl_exact']:.1f}, a larger --kl_coef, or --ensemble uwo"""
    return {name: " ".join(sentence.split()) for name, sentence in said.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The four models at work.


def token_values(model, ids, mask=None, prompt=None):
    """Values (B, T): entry t is the value of the state before token t, read at token t - 1; entry 0 is 0. mask (B, T)
    and prompt (B,) as in model.with_shared_prompts, here and below."""
    v = model.scores(with_shared_prompts(model, ids, mask, prompt))
    return torch.cat((torch.zeros_like(v[:, :1]), v[:, :-1]), dim=1)


@torch.no_grad()
def compare(policy, ref, ids, mask, temperature, prompt=None):
    """log-probs of policy and reference, the exact KL(policy || reference) over the whole vocabulary and the policy's
    entropy at every response token: four (B, T) tensors, 0 outside the mask."""
    out = torch.zeros(4, *ids.shape, device=ids.device)
    m, parts = mask[:, 1:], []
    hidden, ref_hidden = (with_shared_prompts(model, ids, mask, prompt)[:, :-1][m] for model in (policy, ref))
    y = ids[:, 1:][m]
    for h, g, y in zip(hidden.split(4096), ref_hidden.split(4096), y.split(4096)):
        lp = (policy.logits(h).float() / temperature).log_softmax(-1)                 # (n, V)
        lr = (ref.logits(g).float() / temperature).log_softmax(-1)
        p = lp.exp()
        pick = lambda x: x.gather(1, y[:, None])[:, 0]   # noqa: E731
        parts.append(torch.stack((pick(lp), pick(lr), (p * (lp - lr)).sum(1), -(p * lp).sum(1))))
    out[:, :, 1:][:, m] = torch.cat(parts, 1)
    return out


def by_length(width, cfg):
    """Responses of these widths (B,) in pieces of about micro_batch rows: [(rows, prompt, 1.0 or 0.0)]. Answers to one
    prompt, `group` neighbours, stay together, beside others of similar length, so that little is padded. prompt numbers
    them for model.with_shared_prompts, or is None: single answers, and such as may be longer than their prompt, go
    through the models by themselves. The last number is as in model.pieces."""
    width, out = width.view(-1, cfg.group).amax(1), []
    shared = cfg.group > 1 and cfg.max_new <= cfg.max_prompt
    for k, real in pieces(width.argsort(), max(1, cfg.micro_batch // cfg.group)):
        rows = (k[:, None] * cfg.group + torch.arange(cfg.group, device=k.device)).flatten()
        out.append((rows, rows // cfg.group if shared else None, real))
    return out


def in_pieces(f, ids, mask, width, cfg):
    """f(ids, mask, prompt) over pieces of rows, put together again; f gives (..., b, t) tensors."""
    out = None
    for rows, prompt, real in by_length(width, cfg):
        t = int(width[rows].max())
        part = f(ids[rows, :t], mask[rows, :t], prompt)
        if out is None:
            out = torch.zeros(*part.shape[:-2], *ids.shape, device=ids.device)
        if real:
            out[..., rows, :t] = part.float()
    return summed(out)


def final_scores(rm, ids, width, mask=None, prompt=None):
    """Reward (B,) of right-padded ids (B, T): the scalar head at the last real token, position width - 1."""
    hidden = with_shared_prompts(rm, ids, mask, prompt)
    return rm.scores(hidden[torch.arange(len(ids), device=ids.device), width - 1])


def one_reward(name, cfg, device, autocast):
    """(score(b) -> (B,), reward model or None, its tokenizer or None) of one --reward; b: see `rollout`."""
    if name == "gold" or ":" in name:
        f = world.gold if name == "gold" else function_of(name, "--reward")

        def call(b):
            if RANK:   # of several processes the first one asks
                return summed(torch.zeros(len(b.rows), device=device))
            out = torch.as_tensor(f(b.rows, b.texts), dtype=torch.float, device=device)
            if out.shape != (len(b.rows),) or not out.isfinite().all():
                raise InputError(f"--reward {name}: expected {len(b.rows)} finite numbers for as many responses")
            return summed(out)
        return call, None, None
    rm, tok = load(name, home(cfg, device))
    if not rm.cfg.scalar_head:
        raise InputError(f"{name} is a language model; --reward needs a reward model")

    @torch.no_grad()
    def score(b):
        out = torch.zeros(len(b.ids), device=device)
        for r, prompt, real in by_length(b.width, cfg):
            t = int(b.width[r].max())
            with autocast():
                part = final_scores(rm, b.ids[r, :t], b.width[r], b.mask[r, :t], prompt)
            if real:
                out[r] = part
        return summed(out)
    return score, rm, tok


def reward_function(cfg, device, autocast):
    """(score(b) -> (B,), [(reward model, its tokenizer)]) of all of --reward together."""
    path = cfg.reward or sibling(cfg, "reward")
    if not cfg.reward:
        need(path, "reward.py", cfg)
    names = path.split(",")
    try:
        weights = [float(w) for w in cfg.reward_weights.split(",")] if cfg.reward_weights else [1.0] * len(names)
    except ValueError:
        weights = []
    if len(weights) != len(names) or not 0 < sum(weights) < torch.inf:
        raise InputError(f"--reward_weights {cfg.reward_weights}: expected {len(names)} numbers with commas between")
    functions, *models = zip(*(one_reward(name, cfg, device, autocast) for name in names))
    weights = torch.tensor(weights, device=device)[:, None] * len(names) / sum(weights)       # (K, 1), 1 on average

    def score(b):
        return ensemble(torch.stack([f(b) for f in functions]) * weights, cfg.ensemble, cfg.uwo_coef)
    return score, [(rm, tok) for rm, tok in zip(*models) if rm is not None]


def self_check(policy, ids, mask, width, sampled_logp, old_logp, ref_logp, cfg, autocast):
    """What must hold before the first update, printed: the largest deviation at any response token. bf16 products
    differ in the third digit between a cached step and a whole sequence, so it gets a wide tolerance."""
    i = int(width.argmin())                                   # the shortest row carries the most padding
    with torch.no_grad(), autocast():
        again = in_pieces(lambda x, m, prompt: token_logprobs(policy, x, m, cfg.temperature, prompt=prompt),
                          ids, mask, width, cfg)
        alone = token_logprobs(policy, ids[i: i + 1, : width[i]], mask[i: i + 1, : width[i]], cfg.temperature)
        bf16 = torch.is_autocast_enabled(ids.device.type)
    for name, value in (("ratio = 1", ((again - old_logp).exp() - 1) * mask),
                        ("log-ratio to the reference = 0", (old_logp - ref_logp) * mask),
                        ("log-probs from the cache = from a whole pass", (sampled_logp - old_logp) * mask),
                        ("log-probs without padding = with padding", alone - old_logp[i: i + 1, : width[i]])):
        worst = value.abs().max().item()
        print(f"check before the first update: {name:46} max deviation {worst:.1e}")
        if not worst < (0.3 if bf16 else 1e-3):
            raise RuntimeError(f"self-check failed: {name}; nothing learned from here on could be trusted")


# ---------------------------------------------------------------------------------------------------------------------
# One iteration: rollout, score, credit (reward and advantage), update. What is known of its B responses is collected in
# one namespace b, all tensors (B, T) or (B,).


def rollout(policy, tok, rows, prompts, cfg, step, rng, autocast):
    """1. Responses of the policy to this iteration's prompts: ids (B, T), mask, sampled_logp, width, ended (B,), and
    their rows and prompts, lists of B."""
    n_prompts = cfg.rollouts // cfg.group    # if there are fewer, each comes more than once
    at = torch.cat([torch.randperm(len(rows), generator=rng) for _ in range(0, n_prompts, len(rows))])[:n_prompts]
    at = at.sort().values.repeat_interleave(cfg.group).tolist()
    device = policy.wte.weight.device
    with autocast():
        ids, mask, logp = generate(policy, [prompts[i] for i in at], cfg.max_new, tok.eos_id, tok.pad_id,
                                   cfg.temperature, generator=seeded(cfg.seed, step, device))
    width = torch.tensor([len(prompts[i]) for i in at], device=device) + mask.sum(1)          # (B,) prompt + response
    ended = ids.gather(1, (width - 1)[:, None])[:, 0] == tok.eos_id                           # (B,)
    return SimpleNamespace(at=at, rows=[rows[i] for i in at], prompts=[prompts[i] for i in at], ids=ids, mask=mask,
                           sampled_logp=logp, width=width, ended=ended)


def score(b, policy, ref, value, tok, reward, cfg, autocast):
    """2. Scores (B,) of the responses, and at every token what policy, reference and value model say of them."""
    b.texts = [tok.decode(x[m].tolist()) for x, m in zip(b.ids, b.mask)]
    b.scores = torch.where(b.ended, reward(b), -cfg.eos_penalty)
    with torch.no_grad(), autocast():
        b.old_logp, b.ref_logp, b.exact_kl, b.entropy = in_pieces(
            lambda x, m, prompt: compare(policy, ref, x, m, cfg.temperature, prompt), b.ids, b.mask, b.width, cfg)
        b.old_values = b.mask * in_pieces(lambda x, m, prompt: token_values(value, x, m, prompt), b.ids, b.mask,
                                          b.width, cfg)
    for name, x in (("score", b.scores[:, None]), ("log-prob of the policy", b.old_logp), ("value", b.old_values),
                    ("log-prob of the reference", b.ref_logp)):
        if not x.isfinite().all():
            bad = [i for i, row in zip(b.at, x) if not row.isfinite().all()]
            raise InputError(f"a {name} is not finite for the prompts in rows {bad[:8]}; nothing was updated. Look at "
                             "that model's weights, and try --dtype float32")


def credit(b, beta, cfg):
    """3. reward: -beta k1 at every token, the score (less what its length costs) on the last one.
    4. advantage: raw, and as the update uses it."""
    b.kl, _, b.kl_k3 = kl_estimators(b.old_logp, b.ref_logp)                                  # (B, T), 0 off the mask
    b.rewards = -beta * b.kl
    b.rewards.scatter_add_(1, (b.width - 1)[:, None], (b.scores - cfg.length_penalty * b.mask.sum(1))[:, None])
    if cfg.advantage == "gae":
        b.raw_advantages, b.returns = gae(b.rewards, b.old_values, b.mask, cfg.gamma, cfg.lam)
        b.advantages = whiten(b.raw_advantages, b.mask)
    else:
        b.raw_advantages = group_advantages(b.rewards.sum(1), cfg.group, cfg.advantage)[:, None] * b.mask
        b.advantages, b.returns = b.raw_advantages, b.old_values


def update(b, policy, value, optimizer, value_optimizer, logprobs, values, corpus, cfg, step, rng, autocast, log):
    """5. Epochs x minibatches of the clipped losses. Returns their means and those of approx_kl and clipfrac."""
    scale, sums = 1 - 2 / 3 * step / cfg.iterations, {}
    trains_policy = step >= cfg.value_warmup or cfg.advantage != "gae"
    for epoch in range(cfg.epochs):
        for mb in torch.randperm(len(b.ids) // cfg.group, generator=rng).chunk(cfg.minibatches):
            mb = (mb[:, None] * cfg.group + torch.arange(cfg.group)).flatten().to(b.ids.device)   # whole groups
            n_tokens = b.mask[mb].sum()
            for r, prompt, real in by_length(b.width[mb], cfg):
                r = mb[r]
                t = int(b.width[r].max())
                x, m = b.ids[r, :t], b.mask[r, :t]
                if trains_policy:
                    with autocast():
                        out = logprobs(policy, x, m, cfg.temperature, cfg.entropy_coef != 0, prompt)
                    logp, ent = out if cfg.entropy_coef else (out, None)
                    loss, stats = policy_loss(logp, b.old_logp[r, :t], b.advantages[r, :t], m * real, cfg.clip,
                                              n_tokens)
                    if cfg.entropy_coef:
                        loss = loss - cfg.entropy_coef * real * ent.sum() / n_tokens
                    loss.backward()
                    for k, v in {"policy_loss": loss.detach(), **stats}.items():
                        sums[k] = sums.get(k, 0.0) + v / (cfg.epochs * cfg.minibatches)
                if cfg.advantage == "gae":
                    with autocast():
                        v = values(value, x, m, prompt)
                    loss = value_loss(v, b.old_values[r, :t], b.returns[r, :t], m * real, cfg.value_clip,
                                      n_tokens)
                    loss.backward()
                    part = loss.detach() / (cfg.epochs * cfg.minibatches)
                    sums["value_loss"] = sums.get("value_loss", 0.0) + part
            if cfg.ptx_coef and trains_policy:   # 8 windows of text: L_ptx = - mean log pi(x_t | x_<t)
                at = torch.randint(corpus.shape[0], (8,), generator=rng)
                x = corpus[share(at.tolist())].to(b.ids.device)                                        # (8, T)
                with autocast():
                    ptx_loss = -logprobs(policy, x, torch.ones_like(x)).sum() / (len(at) * (x.shape[1] - 1))
                (cfg.ptx_coef * ptx_loss).backward()
                sums["ptx_loss"] = sums.get("ptx_loss", 0.0) + ptx_loss.detach() / (cfg.epochs * cfg.minibatches)
            batch = {"rows": [b.at[i] for i in mb.tolist()], "ids": b.ids[mb], "scores": b.scores[mb]}
            log.update(step, policy, optimizer, cfg.lr * scale, batch)
            log.update(step, value, value_optimizer, cfg.value_lr * scale, batch)
    return summed(sums)


def ask(b, ref, told, tok, cfg, step, autocast):
    """6. The annotator compares the answers to each prompt, one of the reference among them, that end and differ:
    [(prompt, answer, answer: tuples of ids, p: 1.0 where the first is preferred, 0.0 or 0.5)]. told: its noise and
    biases, flags of reward.py by name."""
    rng, firsts = random.Random(f"{cfg.seed} {step}"), b.prompts[:: cfg.group]
    with autocast():
        ids, mask, _ = generate(ref, firsts, cfg.max_new, tok.eos_id, tok.pad_id, cfg.temperature,
                                generator=seeded(cfg.seed, step + 2 ** 20, b.ids.device))
    said = [(k // cfg.group, x[m].tolist()) for k, (x, m) in enumerate(zip(b.ids, b.mask))]
    said += [(k, x[m].tolist()) for k, (x, m) in enumerate(zip(ids, mask))]
    answers = [{} for _ in firsts]   # {text: ids} for each prompt
    for k, y in said:
        if y[-1] == tok.eos_id:
            answers[k][tok.decode(y)] = tuple(y)
    bias, pairs = [told[f"bias_{name}"] for name in ("length", "confidence", "sycophancy")], []
    for row, x, texts in zip(b.rows[:: cfg.group], firsts, answers):
        u = {text: world.utility(row, text, *bias) for text in texts}
        pairs += [(tuple(x), texts[y], texts[z], u[y], u[z]) for y, z in combinations(texts, 2)]
    noise = world.noise_for(told["agreement"], [u - v for *_, u, v in pairs]) if told["agreement"] else told["noise"]
    return [(x, y, z, world.annotate(u, v, noise, rng)) for x, y, z, u, v in pairs]


def learn(new, old, rm, optimizer, center, tok, cfg, step, autocast, log):
    """7. Steps of the reward model on new comparisons and on some old ones, lest it forget: it stays right about what
    the policy says by now (arXiv:2203.02155, 3.1, and arXiv:2204.05862, 4.5, in rounds; here a little at a time). The
    loss is that of reward.py. Returns it, and the accuracy on the new ones, each before the step that it is part of."""
    device, lr = rm.wte.weight.device, cfg.reward_lr * (1 - 2 / 3 * step / cfg.iterations)
    rows, total, right = [(*row, 1.0) for row in new] + [(*row, 0.0) for row in old], *torch.zeros(2, device=device)
    prompts = {x: n for n, x in enumerate(dict.fromkeys(row[0] for row in rows))}
    for k in range(cfg.minibatches):   # the comparisons of one prompt stay together, each answer is scored once
        batch = sorted((row for row in rows if prompts[row[0]] % cfg.minibatches == k), key=lambda x: (len(x[0]), x))
        for part, real in pieces(batch, cfg.micro_batch) if batch else ():
            number = {key: n for n, key in enumerate(sorted({(x, y) for x, *ys in part for y in ys[:2]}))}
            ids, there = pad_batch([x + y for x, y in number], tok.pad_id, device)
            start, prompt = torch.tensor([(len(x), prompts[x]) for x, _ in number], device=device).T
            mask = there & (torch.arange(ids.shape[1], device=device) >= start[:, None])
            with autocast():
                r = final_scores(rm, ids, there.sum(1), mask, prompt)
            i, j = ([number[row[0], row[k]] for row in part] for k in (1, 2))
            p, is_new = torch.tensor([row[3:] for row in part], device=device).T
            d, both = r[i] - r[j], r[i] + r[j]
            loss = -p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d) + center * both ** 2 / 2
            (real * loss.sum() / len(batch)).backward()
            total += real * loss.detach().sum() / len(rows)
            hit = torch.where(p == 0.5, 0.5, ((d > 0) == (p > 0.5)).float())
            right += real * (is_new * hit).sum() / max(1, len(new))
        if batch:
            log.update(step, rm, optimizer, lr, {"comparisons": batch})
    return summed({"rm_loss": total, "rm_accuracy": right})


def windows(path, tok, length):
    """A text as rows of `length` ids (N, length), without the last 2 %, which measure the alignment tax."""
    ids, _ = read_corpus(path, tok, length, least=2)
    return ids[: len(ids) // length * length].view(-1, length)


def token_table(b, logp, values, tok, cfg):
    """Response 0 of b token by token, as text, with the log-probs and values (B, T) that the models give it by now."""
    names = ("logp", "old", "ref", "logp-ref", "reward", "value", "adv", "whitened", "return", "ratio")
    lines = [f"{'t':>3} {'token':14}" + "".join(f"{name:>10}" for name in names) + "  clipped"]
    ratio = (logp - b.old_logp).exp()
    for t in b.mask[0].nonzero()[:, 0].tolist():
        row = [x[0, t].item() for x in (logp, b.old_logp, b.ref_logp, logp - b.ref_logp, b.rewards, values,
                                        b.raw_advantages, b.advantages, b.returns, ratio)]
        # clipped: clip(ratio) A is the smaller one in min(ratio A, clip(ratio) A), so that the token has no gradient
        cut = row[9] > 1 + cfg.clip if row[7] > 0 else row[9] < 1 - cfg.clip
        token = "<eos>" if b.ids[0, t] == tok.eos_id else repr(tok.decode([int(b.ids[0, t])]))
        lines.append(f"{t:>3} {token:14.14}" + "".join(f"{round(x, 5) + 0.0:>10.5f}" for x in row)
                     + ("  yes" if cut else "  no"))
    return "\n".join(lines)


def look_inside(b, before, after, beta, cfg):
    """What --inspect prints of one iteration: the numbers behind every equation at the top of this file."""
    raw = b.raw_advantages[b.mask]
    return f"""{b.rows[0]["prompt"][-1]["content"]}
    -> {b.texts[0].strip()}

score r(x, y) = {b.scores[0]:.5f}, beta = {beta:g}, gamma = {cfg.gamma:g}, lam = {cfg.lam:g}, eps = {cfg.clip:g}
R_t = -beta (old - ref), plus r (less the length penalty) at the last token;  return = A + V;  ratio = exp(logp - old)
gae: delta_t = R_t + gamma V_t+1 - V_t,  A_t = delta_t + gamma lam A_t+1;  rloo and grpo: A from the sum of R_t
whitened (gae) = (A - mean) / std over {len(raw)} tokens: mean = {raw.mean():.5f}, std = {raw.std(correction=0):.5f}

before the update, logp = old
{before}

after {cfg.epochs * cfg.minibatches} optimizer steps on {len(b.ids)} responses; logp, value and ratio are new
{after}
"""


def main(cfg):
    """Train a policy against a reward; or --inspect one iteration."""
    device, autocast = setup(cfg)
    if cfg.advantage != "gae" and cfg.group < 2:
        raise InputError(f"--advantage {cfg.advantage} compares answers to one prompt: --group must be at least 2")
    if cfg.rollouts % (cfg.group * cfg.minibatches):
        raise InputError(f"--rollouts {cfg.rollouts} must be a multiple of --group x --minibatches")
    if cfg.temperature == 0:
        raise InputError("--temperature 0: a policy that always says the same has nothing to learn from")
    init = cfg.init or sibling(cfg, "sft")
    if not cfg.init:
        need(init, "sft.py", cfg)
    policy, tok = load(init, home(cfg, device), scalar_head=False)
    reward, rms = reward_function(cfg, device, autocast)
    if any((t.enc._mergeable_ranks, t.special) != (tok.enc._mergeable_ranks, tok.special) for _, t in rms):
        raise InputError(f"{cfg.reward or 'the reward model'} and {init} have different tokenizers")
    if cfg.lora:   # one trunk: the reference is the policy without its adapters, the value model has others
        ref = frozen(policy, autocast)
        policy, value = with_lora(ref, cfg.lora), with_lora(ref, cfg.lora, scalar_head=True)
    else:
        ref = frozen(copy.deepcopy(policy), autocast)
        value = copy.deepcopy(rms[0][0]) if rms else load(init, home(cfg, device), scalar_head=True)[0]
    data = cfg.data or world.TINY / "rl.jsonl"
    rows, dropped = formats.load(data, "prompt")
    print(formats.describe(rows, dropped, data))
    if "gold" in cfg.reward.split(",") and not all("family" in r for r in rows):
        raise InputError(f"{data}: --reward gold judges the tiny world's prompts only")
    path = Path(cfg.reward or sibling(cfg, "reward"))
    prompts = [tok.render(r["prompt"], generation_prompt=True)[0] for r in rows]
    room = min(cfg.max_prompt, *(m.cfg.max_len - cfg.max_new for m in (policy, *(rm for rm, _ in rms))))
    fit = [(r, p) for r, p in zip(rows, prompts) if len(p) <= room]
    print(f"{len(rows) - len(fit)} prompts longer than {room} tokens left out (--max_prompt, --max_new, model context)")
    if not fit:
        raise InputError(f"{data}: no prompt of at most {room} tokens (--max_prompt, --max_new, the models' context)")
    rows, prompts = zip(*fit)
    graded = not cfg.data   # the tiny world knows the gold score; it goes into the log, never into the update
    told = result_of(path).get("config")   # how its comparisons were made
    asks = cfg.relabel and graded and len(rms) == 1 and told and (path / "comparisons.jsonl").exists()
    corpus = None
    if cfg.ptx_coef:
        corpus = windows(cfg.ptx_data or world.TINY / "corpus.txt", tok, min(128, policy.cfg.max_len))

    if asks:
        rm, rows_ = rms[0][0], formats.load(path / "comparisons.jsonl", "preference")[0]
        rows_ = random.Random(cfg.seed).sample(rows_, min(2000, len(rows_)))
        compared = [(tuple(x), tuple(y), tuple(tok.render_answer(r["prompt"], r["rejected"])[1]), r["label"])
                    for r in rows_ for x, y in [tok.render_answer(r["prompt"], r["chosen"])]]
    state = load_state(cfg.out) if cfg.resume else {}
    if state:
        for name, model in (("policy", policy), ("value", value)):
            model.load_state_dict(state[name], strict=not cfg.lora)   # the trunk is not in it
        if asks:
            rm.load_state_dict(state["reward"])
            compared = state["compared"]
    policy, value = for_training(policy, cfg, device), for_training(value, cfg, device)
    ref = sharded(ref, cfg, device)
    for model, _ in rms:
        if asks:
            for_training(model, cfg, device)
        else:
            sharded(frozen(model, autocast), cfg, device)
    optimizer = optimizer_for(policy, cfg.lr, 0.0, (0.9, 0.95), 1e-5)
    value_optimizer = optimizer_for(value, cfg.value_lr, 0.0, (0.9, 0.95), 1e-5)
    rm_optimizer = optimizer_for(rm, cfg.reward_lr, 0.01) if asks else None
    beta, first = state.get("beta", cfg.kl_coef), state.get("step", 0)
    if state:
        load_optimizer(optimizer, state["optimizer"])
        load_optimizer(value_optimizer, state["value_optimizer"])
        if asks:
            load_optimizer(rm_optimizer, state["reward_optimizer"])
    logprobs, values = (torch.compile(f) if cfg.compile else f for f in (token_logprobs, token_values))
    if cfg.inspect:
        rng, cfg.value_warmup = seeded(cfg.seed, first), 0
        b = rollout(policy, tok, rows, prompts, cfg, first, rng, autocast)
        score(b, policy, ref, value, tok, reward, cfg, autocast)
        credit(b, beta, cfg)
        old = copy.copy(b)
        log = Run(replace(cfg, out=tempfile.mkdtemp()), "ppo", 1)   # --out keeps the log of its own run
        update(b, policy, value, optimizer, value_optimizer, logprobs, values, corpus, cfg, first, rng, autocast, log)
        if not log.skipped:   # else the bad batch is there
            shutil.rmtree(log.folder)
        score(b, policy, ref, value, tok, reward, cfg, autocast)
        tables = (token_table(old, x.old_logp, x.old_values, tok, cfg) for x in (old, b))
        text = look_inside(old, *tables, beta, cfg)
        print(text)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(cfg.out) / "inspect.txt", text.encode())
        return
    n_steps = min(cfg.iterations, cfg.max_steps or cfg.iterations)
    log = Run(cfg, "ppo", n_steps, first)
    tests = world.rows("test") if graded else list(rows[:32])

    def measure():
        with torch.no_grad(), autocast():
            texts, ps, rs = respond(policy, tok, [r["prompt"] for r in tests], cfg.max_new,
                                    generator=seeded(cfg.seed, -1 % 2**31, device), temperature=cfg.temperature)
        out = world.report(tests, texts) if graded else {}
        return out | {"length": sum(map(len, rs)) / len(rs), "eos_rate": sum(tok.eos_id in r for r in rs) / len(rs),
                      "distinct_2": distinct_2(rs)}, texts

    before, texts = (state["before"], None) if first else measure()
    warned = set()
    history = [json.loads(line) for line in (log.folder / "log.jsonl").read_text().splitlines()]   # before --resume
    if not first:
        log.samples("before", [r["prompt"] for r in tests[:12]], texts[:12])
    for step in range(first, n_steps):
        clock, rng = [time.time()], seeded(cfg.seed, step)
        b = rollout(policy, tok, rows, prompts, cfg, step, rng, autocast)
        clock.append(time.time())
        score(b, policy, ref, value, tok, reward, cfg, autocast)
        if step == 0:
            self_check(policy, b.ids, b.mask, b.width, b.sampled_logp, b.old_logp, b.ref_logp, cfg, autocast)
        credit(b, beta, cfg)
        clock.append(time.time())
        spent = cfg.kl_budget and b.exact_kl.sum(1).mean() >= cfg.kl_budget
        sums = {}
        if not spent:
            sums = update(b, policy, value, optimizer, value_optimizer, logprobs, values, corpus, cfg, step, rng,
                          autocast, log)
        if asks and not spent and (step + 1) % cfg.relabel == 0:
            new = ask(b, ref, told, tok, cfg, step, autocast)
            old = random.Random(f"{cfg.seed} {step}").sample(compared, min(len(compared), 64))
            if new:
                sums |= learn(new, old, rm, rm_optimizer, told["center"], tok, cfg, step, autocast, log)
            compared[2000:] = (compared[2000:] + new)[-10000:]   # the reward model's first ones, and the latest
        clock.append(time.time())
        n = b.mask.sum()
        err = ((b.returns - b.old_values) * b.mask).sum() / n
        explained = 1 - (((b.returns - b.old_values - err) * b.mask) ** 2).sum() / \
            (((b.returns - (b.returns * b.mask).sum() / n) * b.mask) ** 2).sum().clamp(min=1e-8)
        metrics = {"reward": b.scores.mean(), "kl": b.kl.sum(1).mean(), "kl_k3": b.kl_k3.sum(1).mean(),
                   "kl_exact": b.exact_kl.sum(1).mean(), "beta": beta, "entropy": b.entropy.sum() / n,
                   "length": b.mask.sum(1).float().mean(), "eos_rate": b.ended.float().mean(),
                   "unique": len(set(b.texts)) / len(b.texts),
                   "explained_var": explained, **sums, "t_gen": clock[1] - clock[0], "t_score": clock[2] - clock[1],
                   "t_train": clock[3] - clock[2], "tok_s": b.width.sum() / (clock[3] - clock[0])}
        if graded:
            metrics |= world.report(b.rows, b.texts)
        history.append({k: float(v) for k, v in metrics.items()})
        log.step(step, **history[-1])
        for name, sentence in health(history).items():
            if name not in warned:
                print(f"health, {name}: {sentence}", flush=True)
                warned.add(name)
        if cfg.kl == "adaptive":
            beta = adapt_kl_coef(beta, float(metrics["kl"]), cfg.kl_target, cfg.rollouts, cfg.kl_horizon)
        if log.save_now(step) or spent:
            state = {"policy": trained(policy), "value": trained(value), "beta": beta, "step": step + 1,
                     "optimizer": optimizer.state_dict(), "value_optimizer": value_optimizer.state_dict(),
                     "before": before}
            if asks:
                save(Path(cfg.out) / "reward", rm, tok)
                state |= {"reward": trained(rm), "reward_optimizer": rm_optimizer.state_dict(), "compared": compared}
            save(cfg.out, policy, tok, state)
            log.saved(step)
        if spent:
            print(f"--kl_budget {cfg.kl_budget:g} is spent: KL {metrics['kl_exact']:.2f} after {step} iterations")
            break
    after, texts = measure()
    print(log.samples("after", [r["prompt"] for r in tests[:12]], texts[:12]))
    if history:   # as the log has it: this may be --resume after the last step
        after |= {k: float(f"{history[-1][k]:.6g}") for k in ("reward", "kl", "entropy") if k in history[-1]}
    columns = {"SFT": before, "PPO": after}
    told = result_of(sibling(cfg, "sft"))
    if told and not cfg.init:   # sft.py measured the base model on the same prompts
        columns = {"base": told["before"]} | columns
    log.finish(device, before, after, [("reward", "gold") if graded else ("reward",), ("kl", "kl_exact"),
                                       ("helpful", "harmless", "honest") if graded else ("entropy",)], columns)


if __name__ == "__main__":
    run(main, Config, __doc__)
