"""PPO: reinforcement learning from human feedback, with the four models of InstructGPT.

    python ppo.py                              the tiny world; makes base, sft and reward if missing
    python ppo.py --init SFT --reward RM --data prompts.jsonl --lr 1e-6 --value_lr 1e-5      your own
    python ppo.py --reward mymodule:score      any Python function(rows, responses) -> list of floats
    python ppo.py --inspect                    every number of one response, before and after an update, of
                                               an early iteration, where tokens are clipped (later ones: page)

Objective (arXiv:2203.02155, eq. 2): max_pi  E[ r(x, y) ] - beta KL(pi || pi_ref) + ptx_coef E[ log pi(text) ]

One iteration:
  1. rollout    y ~ pi(. | x) at --temperature; no top-k or top-p: pi_old is what is sampled from
  2. score      r(x, y) by the reward model, read at EOS; a response without EOS gets -eos_penalty instead.
                Also log pi and log pi_ref of its tokens, and their values V, before anything is updated
  3. reward     R_t = -beta (log pi(y_t) - log pi_ref(y_t)) + [t is the last token] r       (k1, no gradient)
                a process reward model (data/process.py) gives r for each step, at the step's last token
  4. advantage  delta_t = R_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  V after the end = 0
                (GAE, arXiv:1506.02438, eq. 11-16); returns = A + V; then A is whitened over response tokens.
                Without a value model (--advantage rloo, grpo, dr_grpo, reinforce++): a row of ESTIMATORS
  5. update     epochs x minibatches:  ratio = pi / pi_old,
                L = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)                (arXiv:1707.06347, eq. 7)
                L_V = max((V - ret)^2, (clip(V, V_old - eps_v, V_old + eps_v) - ret)^2) / 2
  6. relabel    the annotator compares the answers to each prompt, and the reward model learns from that

Losses are means over the response tokens, EOS included, of a whole minibatch; for grpo and dr_grpo see
`token_weights`. Four models: policy (trained), reference (frozen policy), reward model, value model (trained;
starts as the reward model, but with --lora, or where no reward has a scalar head that reads the policy's own
tokens, as the policy with a new head).

What is not as in InstructGPT, and why:
  - Step 6 (iterated RLHF, arXiv:2204.05862, 4.5): the policy finds what a reward model that stands still gets
    wrong; the annotator, asked again, puts it right. --relabel 0 is the paper's loop.
  - An unfinished answer loses its score: the reward model has only seen whole ones and may like half of one.
  - The value model learns alone in the first iterations: until V is right, A is mostly V's error.
  - No pretraining gradients unless --ptx_coef asks for them, so that the price of RL alone is seen.

To add an estimator, write its function and its row of ESTIMATORS.
"""
import copy
import typing
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.utils import clip_grad_norm_

from data import InputError, health, report, world, write_json
from data.chain import need
from data.files.checkpoint import load, save
from data.flags import RunFlags, program
from data.parallel import WORLD, all_sum, generate_answers, in_chunks, micro_batches, prepare
from data.prompts import read_corpus, read_prompts
from data.relabel import relabelling_of
from data.rewards import Scorer
from data.run import Run, flags_of_its_run
from data.setup import adamw, seeded, set_lr, setup
from model import (compare_policies, freeze_and_cast, is_last, last_token, refresh, sampling_copy,
                   token_logprobs, token_values, with_lora)
from reward import group_pairs, learn_comparisons

OWN_FILES = ["inspect.json", "reward/"]      # beside those of every run
OTHERS = 2 ** 20    # stream of random numbers for the reference's answers, beside those of the iterations


# ------------------------------------------------------------------------------------------------------------
# The algorithm as pure functions. Index t of a tensor (B, T) is token t; a mask is True on response tokens.


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Advantages and returns (B, T) from rewards and values (value of the state before token t). What lies
    outside the mask is ignored and comes out 0; the value after the last response token is 0
    (arXiv:1506.02438, eq. 16)."""
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])     # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(x, mask):
    """(x - mean) / std over the masked entries; 0 elsewhere."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    var = ((x - mean) ** 2 * mask).sum() / n
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def log_ratio(logp, old_logp, mask):
    """log pi / pi_old of each token (B, T), 0 outside the mask."""
    # A ratio per answer, as GSPO has it (arXiv:2507.18071), would be another one here: the mean over the
    # answer's tokens, 0 outside them, but each token's own gradient; with a far smaller --clip.
    return ((logp - old_logp) * mask).clamp(-20, 20)     # exp must not overflow


def policy_loss(logp, old_logp, advantages, weights, clip, clip_high):
    """Clipped surrogate (arXiv:1707.06347, eq. 7; its upper end apart: arXiv:2503.14476, eq. 10), summed with
    weights that are 0 outside the responses (token_weights). Returns the loss and, for the log, sums over
    response tokens: approx_kl = (ratio - 1) - log ratio (joschu.net/blog/kl-approx.html), clipfrac."""
    logratio = log_ratio(logp, old_logp, weights > 0)
    ratio = logratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages)
    with torch.no_grad():
        outside = (ratio < 1 - clip) | (ratio > 1 + clip_high)
        stats = {"approx_kl": (ratio - 1 - logratio).sum(), "clipfrac": outside.sum()}
    return -(surrogate * weights).sum(), stats


def value_loss(values, old_values, returns, weights, clip):
    """Clipped value loss: the worse of the plain and the clipped squared error, halved, summed with
    weights."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (worse * weights).sum()


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over response tokens: 1 is perfect, 0 no better than a
    constant."""
    n = mask.sum()
    error, mean = returns - values, (returns * mask).sum() / n
    error_var = ((error - (error * mask).sum() / n) ** 2 * mask).sum()
    return 1 - error_var / ((returns - mean) ** 2 * mask).sum().clamp(min=1e-8)


def kl_estimators(logp, ref_logp):
    """Three estimates of KL(pi || pi_ref) from samples of pi (joschu.net/blog/kl-approx.html), elementwise:
    k1 = log pi - log ref, unbiased but noisy; k2 = k1^2 / 2, biased; k3 = ref / pi - 1 + k1, unbiased and
    never < 0."""
    k1 = logp - ref_logp
    return k1, k1 ** 2 / 2, torch.expm1(-k1.clamp(min=-20)) + k1


# ------------------------------------------------------------------------------------------------------------
# Advantages A (B, T), 0 outside the answers, from the scores of each token, its KL penalty beta k1 and its
# value V, (B, T) each. Scores stand at the last token of an answer or, of a process reward, of each step.


def by_value_model(scores, penalty, values, mask, cfg):
    """PPO: how much better than what the value model expected (arXiv:1506.02438)."""
    return gae(scores - penalty, values, mask, cfg.gamma, cfg.lam)[0]


def reward_to_go(scores, penalty, values, mask, cfg):
    """REINFORCE++: all that is still to come, from this token on (arXiv:2501.03262). There is no value model,
    so values are 0; the baseline is the batch's mean, which whitening subtracts."""
    return gae(scores - penalty, values, mask, cfg.gamma, 1.0)[0]


def rloo(scores, penalty, values, mask, cfg):
    """The whole answer's reward, minus the mean of the other answers to the prompt (arXiv:2402.14740,
    eq. 7)."""
    r = (scores - penalty).sum(1).view(-1, cfg.group)                           # (prompts, group)
    others = (r.sum(1, keepdim=True) - r) / (cfg.group - 1)
    return (r - others).view(-1, 1) * mask


def grpo(scores, penalty, values, mask, cfg):
    """The whole answer's score, normalised within its group (arXiv:2402.03300, 4.1.2), minus its KL penalty,
    which is not divided: where scores are equal their std is 0, and beta would lose its meaning.

    The paper adds beta k3 to the loss instead. With samples of pi its gradient is that of KL(pi_ref || pi),
    the other direction, token by token (arXiv:2506.09477); k1 in the reward has that of the objective."""
    r, kl = scores.sum(1).view(-1, cfg.group), penalty.sum(1).view(-1, cfg.group)
    # 1e-4, so that scores which differ by rounding stay near 0.
    normalised = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    return (normalised - (kl - kl.mean(1, keepdim=True))).view(-1, 1) * mask


def dr_grpo(scores, penalty, values, mask, cfg):
    """GRPO without the division by the std, which weighs up prompts whose answers score almost alike
    (arXiv:2503.20783)."""
    r = (scores - penalty).sum(1).view(-1, cfg.group)
    return (r - r.mean(1, keepdim=True)).view(-1, 1) * mask


@dataclass
class Estimator:
    """A row of ESTIMATORS."""
    advantages: typing.Callable   # (scores, penalty, values, mask, cfg) -> A (B, T), of the whole batch
    critic: bool                  # whether a value model is trained beside the policy
    least_group: int              # answers to a prompt that it needs
    whitened: bool                # whether A is whitened over the response tokens of the batch
    mean_over: str                # what the loss is a mean over: see token_weights

    def in_words(self):
        """The first sentence of the function's docstring, or its name, for --inspect and the page."""
        words = self.advantages.__doc__ or self.advantages.__name__
        return " ".join(words.split()).split(". ")[0]


ESTIMATORS = {
    #                        advantages       critic  least_group  whitened  mean_over
    "gae":         Estimator(by_value_model,  True,   1,           True,     "tokens"),
    "rloo":        Estimator(rloo,            False,  2,           False,    "tokens"),
    "grpo":        Estimator(grpo,            False,  2,           False,    "answers"),
    "dr_grpo":     Estimator(dr_grpo,         False,  2,           False,    "answers of max_new tokens"),
    "reinforce++": Estimator(reward_to_go,    False,  1,           True,     "tokens"),
}


def token_weights(mask, mean_over, max_new):
    """What each response token of a minibatch counts in its losses, (m, T) from its mask (m, T); 0 elsewhere.
    tokens: all the same, so a long answer counts more than a short one. answers: each answer the same, so a
    token of a long one counts less. answers of max_new tokens: a constant, so a token counts the same
    whatever the lengths are (arXiv:2503.20783, 3.2)."""
    if mean_over == "answers":
        return mask / (len(mask) * mask.sum(1, keepdim=True))
    if mean_over == "answers of max_new tokens":
        return mask / (len(mask) * max_new)
    return mask / mask.sum()


@dataclass
class Config(RunFlags):
    """The flags of `python ppo.py`."""
    # Models and data
    init: str = ""                # policy to start from and to stay close to (default: sft)
    reward: str = ""              # a reward model, or "gold", or module:function, or the log-ratio of two
                                  # policies, implicit:POLICY:REFERENCE; or several, A,B,C (default: reward)
    ensemble: typing.Literal["mean", "min"] = "mean"   # how several rewards are combined
    reward_weights: str = ""      # weights of several rewards, such as 1,0.5 (default: equal)
    data: str = ""                # prompts (default: the tiny world's)
    max_prompt: int = 128         # tokens; longer prompts are left out and counted
    lora: int = 0   # rank of adapters of policy and value model on one frozen trunk (0: train all)
    inspect: bool = False         # keep nothing: print one response of the third iteration, token by token
    # Rollout
    iterations: int = 70          # rollout + update
    rollouts: int = 256           # responses an iteration
    group: int = 2                # answers per prompt; rloo, grpo and dr_grpo compare them
    max_new: int = 32             # longest response, in tokens
    temperature: float = 1.0      # of sampling and of every log-prob
    # Reward and advantage
    kl_coef: float = 0.1          # beta
    kl_budget: float = 0.0        # stop where the exact KL reaches so many nats per response (0: no limit)
    eos_penalty: float = 4.0      # a response that does not end gets minus this instead of its score
    advantage: typing.Literal[tuple(ESTIMATORS)] = "gae"   # see the table ESTIMATORS
    gamma: float = 1.0            # discount
    lam: float = 0.95             # lambda of GAE
    # Update
    epochs: int = 1               # passes over each batch of rollouts
    minibatches: int = 4          # optimizer steps per pass
    micro_batch: int = 64   # sequences per forward pass; smaller needs less memory and changes nothing else
    lr: float = 2e-4              # of the policy, falling linearly to a third (1e-6 to 1e-5 for real models)
    value_lr: float = 5e-4        # of the value model, likewise
    value_warmup: int = 4         # first iterations that train only the value model, at most a quarter of
                                  # those that will run
    clip: float = 0.2             # eps of the ratio
    clip_high: float = 0.0        # eps of its upper end, such as 0.28 (0: the same as --clip)
    value_clip: float = 0.5       # eps_v of the values, in units of reward
    entropy_coef: float = 0.0     # weight of an entropy bonus
    ptx_coef: float = 0.0         # weight of the pretraining loss mixed into every step (against forgetting)
    ptx_data: str = ""   # its text, documents separated by <|endoftext|> (default: the tiny world's corpus)
    grad_clip: float = 1.0        # largest gradient norm, for each model by itself
    # Relabelling
    relabel: int = 1   # every N iterations the annotator compares new answers and the reward model learns
                                  # from that (0: never); needs the tiny world and one reward model made by
                                  # reward.py
    reward_lr: float = 1e-3       # learning rate of the reward model then
    # The run itself (the same in every script)
    save_every: int = 25          # iterations between checkpoints


# ------------------------------------------------------------------------------------------------------------
# Before, between and after the steps of the loop.


def check_flags(cfg):
    """InputError: flags that do not go together."""
    least = ESTIMATORS[cfg.advantage].least_group
    if cfg.group < least:
        raise InputError(f"--advantage {cfg.advantage} compares answers: --group must be at least {least}")
    for name, n in (("--group", cfg.group), ("--minibatches times processes", cfg.minibatches * WORLD)):
        if cfg.rollouts % n:
            raise InputError(f"--rollouts {cfg.rollouts} must be a multiple of {name}, which is {n}; "
                             f"{max(1, cfg.rollouts // n) * n} would be")
    if cfg.ptx_coef and 8 % WORLD:
        raise InputError(f"--ptx_coef reads 8 windows a step, which do not divide over {WORLD} processes")
    if cfg.temperature == 0:
        raise InputError("--temperature 0: a policy that always says the same has nothing to learn from")


def pick(n_rows, n, rng):
    """n row numbers below n_rows, sorted. Each is drawn once before any is drawn again."""
    rounds = [torch.randperm(n_rows, generator=rng) for _ in range(0, n, n_rows)]
    return torch.cat(rounds)[:n].sort().values.tolist()


def self_check(policy, ids, mask, sampled_logp, old_logp, ref_logp, entropy, cfg):
    """Five identities that must hold before the first update, as lines of text with the largest deviation at
    any response token. RuntimeError: one fails.

    Two of them compare a pass with the same pass, which is exact, unless --compile makes other code for other
    shapes. Two compare passes that multiply in another order: fp32 leaves a millionth of a nat; bf16 up to a
    tenth at the worst token, a thousandth in the mean, so the mean has a bound as well. The last one sees
    through bf16: at a temperature (1 + e) times too high log pi is off by -e (log pi + H), and so e is the
    slope of a regression."""
    logprobs = partial(token_logprobs, policy, temperature=cfg.temperature)
    again = in_chunks(logprobs, ids, mask, cfg.micro_batch)
    i = int(last_token(mask).argmin())                      # the shortest row carries the most padding
    T = int(last_token(mask)[i]) + 1
    with torch.no_grad():
        alone = token_logprobs(policy, ids[i: i + 1, :T], mask[i: i + 1, :T], cfg.temperature)
    x, off = (old_logp + entropy) * mask, sampled_logp - old_logp                                # (B, T) each
    squares = x.square().sum().clamp(min=1e-6)
    hotter = (off * x).sum() / squares
    noise = (off.square().sum() / mask.sum() / squares).sqrt()       # standard error of that slope

    # (largest deviation, largest mean of the deviations)
    is_fp32 = policy.head().dtype == torch.float32
    rounding = (1e-3, 1e-4) if is_fp32 else (0.3, 0.05)
    exact = rounding if cfg.compile else (1e-5, 1e-5)
    slope = (1e-4 if is_fp32 else 2e-3) + 5 * noise.item()
    lines = []
    for name, value, (largest, mean) in (
            ("ratio = 1", (again - old_logp).exp() - 1, exact),
            ("log-ratio to the reference = 0", old_logp - ref_logp, exact),
            ("log-probs from the cache = from a whole pass", off, rounding),
            ("log-probs without padding = with padding", alone - old_logp[i: i + 1, :T], rounding),
            ("temperature of the sampler = of that pass", hotter, (slope, slope))):
        worst = value.abs().max().item()
        lines.append(f"check before the first update: {name:46} off by {worst:.1e}, may be {largest:.0e}")
        n = mask.sum() if value.dim() else 1
        if not (worst < largest and value.abs().sum() / n < mean):
            raise RuntimeError(f"self-check failed: {name}, off by {worst:.1e}; nothing learned from here on "
                               "could be trusted")
    return "\n".join(lines)


def add_mean(sums, n, **metrics):
    """Add 1/n of each metric to the sum of that name."""
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + value.detach() / n


def load_models(policy, init, value_start, cfg):
    """(policy, reference, value model or None), still on the CPU, of a policy that was loaded from init. The
    value model is copied from value_start, a reward model whose weights are not cast yet; where that is None,
    from the policy."""
    critic, value = ESTIMATORS[cfg.advantage].critic, None
    if cfg.lora:
        # One frozen trunk: the reference is the policy without its adapters, the value model has its own.
        reference, policy = policy, with_lora(policy, cfg.lora)
        if critic:
            value = with_lora(reference, cfg.lora, scalar_head=True)
    else:
        reference = freeze_and_cast(copy.deepcopy(policy))
        if critic:
            value = copy.deepcopy(value_start) if value_start else load(init, head="new")[0]
    return policy, reference, value


def prepare_models(policy, reference, value, reward_models, relabels, cfg, device):
    """Put all models where and how the flags want them. Returns what is trained, {name: (model, optimizer)}:
    the policy, the value model if there is one, and a reward model that the annotator goes on teaching."""
    # First the model, then its optimizer: `prepare` may replace the tensors that the optimizer steps.
    policy = prepare(policy, cfg, device)
    trained = {"policy": (policy, adamw(policy, eps=1e-5))}
    if value is not None:
        value = prepare(value, cfg, device)
        trained["value"] = (value, adamw(value, eps=1e-5))
    for model in reward_models:
        if not relabels:
            freeze_and_cast(model)
        prepare(model, cfg, device)
    if relabels:
        trained["reward_model"] = (reward_models[0], adamw(reward_models[0], weight_decay=0.01))
    if cfg.lora:    # the trunk that the adapters share: not sharded
        reference.to(device)
    else:
        prepare(reference, cfg, device)
    return trained


def rollout(sampler, tok, prompts, cfg, step):
    """Answers to prompts (lists of ids): ids (B, T), mask, logp as `model.generate` returns them, and lists
    of ids. At the temperature of all log-probs, without top-k or top-p."""
    return generate_answers(sampler, tok, prompts, cfg.max_new, seeded(cfg.seed, step), cfg.temperature)


def score(rewards, rows, texts, ids, mask, tok, cfg):
    """Scores (B, T) of the answers, and which of them ended (B,). One that did not gets -eos_penalty at its
    last token instead: the reward model has only ever seen whole answers."""
    last = is_last(mask)                                                                         # (B, T)
    ended = torch.isin(ids[last], torch.tensor(sorted(tok.eos_ids), device=ids.device))          # (B,)
    scores = rewards.score(rows, texts, ids, mask, cfg.micro_batch)                              # (B, T)
    return torch.where(ended[:, None], scores, -cfg.eos_penalty * last), ended


def read_by_models(policy, reference, value, ids, mask, cfg):
    """What the models say of the answers, (B, T) each: log-probs of policy and reference, exact KL and
    entropy (model.compare_policies), and values, which are 0 without a value model."""
    compare = partial(compare_policies, policy, reference, temperature=cfg.temperature)
    logp, ref_logp, exact_kl, entropy = in_chunks(compare, ids, mask, cfg.micro_batch)
    values = torch.zeros_like(logp)
    if value is not None:
        values = in_chunks(partial(token_values, value), ids, mask, cfg.micro_batch)
    return logp, ref_logp, exact_kl, entropy, values


def logprobs_and_bonus(policy, ids, mask, weights, cfg):
    """Log-probs (B, T) of the responses, and --entropy_coef times the weighted sum of the entropies."""
    if not cfg.entropy_coef:
        return token_logprobs(policy, ids, mask, cfg.temperature), 0.0
    logp, entropy = token_logprobs(policy, ids, mask, cfg.temperature, entropy=True)
    return logp, cfg.entropy_coef * (entropy * weights).sum()


def metrics_of(seen, mask, ended, rows, texts, cfg):
    """For the log, from (B, T) tensors `seen` in an iteration, by name (see main): reward, KL and length per
    response, entropy per token, the share of responses that end, and of different texts. mismatch: how far
    the sampler's log-probs are from those of a whole pass. equal_groups: the share of groups whose answers
    all got the same reward, which teach rloo and grpo nothing."""
    n_tokens, apart = mask.sum(), (seen["sampled_logp"] - seen["logp"]).abs()
    k1, _, k3 = kl_estimators(seen["logp"], seen["ref_logp"])
    r = seen["score"].sum(1).view(-1, cfg.group)                                 # (prompts, group)
    metrics = {"reward": r.mean(), "kl": k1.sum(1).mean(), "kl_k3": k3.sum(1).mean(),
               "kl_exact": seen["kl"].sum(1).mean(), "length": mask.sum(1).float().mean(),
               "entropy": seen["entropy"].sum() / n_tokens, "eos_rate": ended.float().mean(),
               "unique": len(set(texts)) / len(texts),
               "mismatch": apart.sum() / n_tokens, "mismatch_max": apart.max()}
    if cfg.group > 1:
        metrics["equal_groups"] = (r.amax(1) - r.amin(1) < 1e-4).float().mean()
    if ESTIMATORS[cfg.advantage].critic:
        metrics["explained_var"] = explained_variance(seen["value"], seen["return"], mask)
    if not cfg.data:    # the tiny world knows the gold score, which is shown and never trained on
        metrics |= world.mean_scores(rows, texts)
    return metrics


def what_is_kept(run, n_steps):
    """What an iteration leaves to those after it, and every checkpoint holds: {"warmup": the number of first
    iterations that train the value model alone, "inspected": numbers for the page, "compared": groups of step
    6, "over_budget": whether --kl_budget is spent}. A run that goes on, be it with another --max_steps, keeps
    the warm-up that it began with."""
    kept = {"warmup": 0, "inspected": {}, "compared": [], "over_budget": False}
    if ESTIMATORS[run.cfg.advantage].critic:
        kept["warmup"] = min(run.cfg.value_warmup, n_steps // 4)
    for name in kept:
        kept[name] = run.state.get(name, kept[name])
    if run.first < kept["warmup"] and not run.cfg.inspect:
        run.say(f"the first {kept['warmup']} iterations train the value model alone: the KL stays 0 "
                "(--value_warmup)")
    return kept


def is_over_budget(run, it, exact_kl):
    """Whether answers with this KL (B, T) have spent --kl_budget, after `it` iterations; it says so."""
    cfg = run.cfg
    if not cfg.kl_budget or cfg.inspect or exact_kl.sum(1).mean() < cfg.kl_budget:
        return False
    run.say(f"--kl_budget {cfg.kl_budget:g} is spent after {it} iterations")
    return True


def decay(it, n_steps):
    """Factor of the learning rates in an iteration. It falls to a third and not to 0: the reward model learns
    until the end, and the policy has to follow it."""
    return 1 - 2 / 3 * it / n_steps


def learning_rates(cfg, it, n_steps, warmup):
    """Learning rates {name: number} of the models that step 5 trains in an iteration: in the first ones
    (warmup) the value model alone."""
    rates = {}
    if it >= warmup or cfg.inspect:
        rates["policy"] = cfg.lr * decay(it, n_steps)
    if ESTIMATORS[cfg.advantage].critic:
        rates["value"] = cfg.value_lr * decay(it, n_steps)
    return rates


def ptx_windows(cfg, tok, max_len):
    """The text of --ptx_coef as rows of ids (N, T), without the last 2 %, which measure the alignment tax."""
    length = min(128, max_len)
    ids, _ = read_corpus(cfg.ptx_data or world.TINY / "corpus.txt", tok, length, min_windows=2)
    return ids[: len(ids) // length * length].view(-1, length)


def ptx_loss(policy, corpus, rng):
    """- mean log pi(x_t | x_<t) over 8 windows of the text, rows of corpus (N, T): L_ptx of the objective."""
    window = torch.randint(len(corpus), (8,), generator=rng).tolist()
    [mine] = micro_batches(window, [corpus.shape[1]] * len(corpus), 8)               # this rank's share
    x = corpus[mine].to(policy.wte.weight.device)                                    # (8 / processes, T)
    every = torch.ones(x.shape, dtype=torch.bool)
    return -token_logprobs(policy, x, every).sum() / (8 * (x.shape[1] - 1))


def page_of(run, it, name, policy, value, rows, answers, seen):
    """{name: what the page and --inspect show of iteration `it`}, {} if that has no name. answers: ids and
    mask, (B, T) each; seen: tensors (B, T) by name, as they were before the update. The models are those of
    after it."""
    if not name:
        return {}
    cfg, estimator, (ids, mask) = run.cfg, ESTIMATORS[run.cfg.advantage], answers
    logp = in_chunks(partial(token_logprobs, policy, temperature=cfg.temperature), ids, mask, cfg.micro_batch)
    after = {"logp": logp, "ratio": log_ratio(logp, seen["logp"], mask).exp()}
    estimates = kl_estimators(seen["logp"], seen["ref_logp"])
    page = health.inspection(value, run.tok, rows, answers, seen, after, estimates, cfg)
    page |= {"iteration": it + 1, "how": estimator.in_words(), "critic": estimator.critic,
             "whitened": estimator.whitened, "mean_over": estimator.mean_over}
    return {name: page}


def finish(run, sampler, policy, reference, rewards, tests, start, inspected):
    """Measure the policy, save what lies beside it, and end the run. start: metrics and answers of before.
    First and last answers, at temperature 1, are both scored by the final reward model, each as if it had
    ended."""
    refresh(sampler, policy)
    (before, first_answers), (after, last) = start, run.measure("after", sampler, tests)
    after["kl"], after["entropy"] = report.mean_kl(policy, reference, run.tok, last.prompt_ids, last.ids)
    if after["kl"] == 0:
        run.say("the KL is 0: nothing changed the policy, and both columns are of the one it started as")
    for metrics, scored in ((before, first_answers), (after, last.scored)):
        report.add_rewards(metrics, scored, rewards.score_texts(tests.rows, [x["answer"] for x in scored]))
    if "reward_model" in run.trained:
        save(run.folder / "reward", rewards.models()[0], run.tok)
    write_json(run.folder / "inspect.json", inspected)
    run.finish(before, after, report.answer_rows(tests, first_answers, last.scored), "PPO")


def main(cfg):
    """Train a policy against a reward; or --inspect one iteration."""
    if cfg.inspect:
        cfg = flags_of_its_run(cfg)
    device = setup(cfg)
    check_flags(cfg)
    estimator = ESTIMATORS[cfg.advantage]

    # What is missing of the chain is made first: `need` runs its scripts, for minutes, and says so.
    reward_name = cfg.reward or need(cfg, "reward")
    init = cfg.init or need(cfg, "sft")
    data = cfg.data or world.TINY / "rl.jsonl"
    run = Run.open(cfg, "ppo", [init, reward_name, data, cfg.ptx_data], OWN_FILES, cfg.inspect)
    run.health = partial(health.health, cfg=cfg)
    n_steps = min(cfg.iterations, cfg.max_steps or cfg.iterations)     # those that will run
    kept = what_is_kept(run, n_steps)

    # The models, on the CPU still; prompts to learn from, and to be measured on.
    policy, tok = load(init)
    rewards = Scorer("--reward", reward_name, tok, cfg.reward_weights, cfg.ensemble)
    policy, reference, value = load_models(policy, init, rewards.value_start, cfg)
    rows, tests = read_prompts(run, data, tok, policy, rewards)
    prompts = [tok.render(row["prompt"], generation_prompt=True)[0] for row in rows]
    corpus = ptx_windows(cfg, tok, policy.cfg.max_len) if cfg.ptx_coef else None
    relabelling = relabelling_of(cfg, reward_name, tok, rewards, group_pairs, kept["compared"])

    # Copies to sample from, whose weights `refresh` brings up to date. Then all models move to their device.
    sampler = sampling_copy(policy).to(device)
    ref_sampler = sampling_copy(reference).to(device) if relabelling else None
    trained = prepare_models(policy, reference, value, rewards.models(), bool(relabelling), cfg, device)
    run.begin(cfg.iterations, tok, **trained)
    start = run.before(partial(run.measure, sampler=sampler, tests=tests))

    for it in () if kept["over_budget"] else run.steps():
        rng = seeded(cfg.seed, it)      # everything random follows from (seed, iteration)
        rates = learning_rates(cfg, it, n_steps, kept["warmup"])

        # 1. Rollout: `group` answers to each prompt, B in all. ids (B, T) is prompt, answer, padding; mask
        #    (B, T) is True on the answer and its EOS. Index t is token t in every tensor below.
        refresh(sampler, policy)
        asked = pick(len(rows), cfg.rollouts // cfg.group, rng)
        row_of = torch.tensor(asked).repeat_interleave(cfg.group).tolist()
        ids, mask, sampled_logp, answers = rollout(sampler, tok, [prompts[i] for i in row_of], cfg, it)
        texts, batch_rows = [tok.decode(answer) for answer in answers], [rows[i] for i in row_of]
        widths = (last_token(mask) + 1).tolist()                       # columns that each row needs

        # 2. Score, by all models before any is updated. log pi is computed again, although the sampler gave
        #    it: a cache rounds differently, and the ratio has to be 1 before the first step of the update.
        scores, ended = score(rewards, batch_rows, texts, ids, mask, tok, cfg)             # (B, T) and (B,)
        old_logp, ref_logp, exact_kl, entropy, old_values = read_by_models(                      # (B, T) each
            policy, reference, value, ids, mask, cfg)
        health.check_finite(row_of, score=scores, policy=old_logp, reference=ref_logp, value=old_values)
        if it == 0 and not cfg.inspect:
            run.say(self_check(policy, ids, mask, sampled_logp, old_logp, ref_logp, entropy, cfg))

        # 3. Reward: -beta k1 at every token, plus the score at the last token of the answer or of each step.
        #    k1 and not k3: both are unbiased, but as a reward only k1 has the gradient of the objective's KL,
        #    and k3, where pi has left what pi_ref says, is mostly too small, seldom far too large (LOG.md).
        k1, _, _ = kl_estimators(old_logp, ref_logp)                                             # (B, T)
        penalty = cfg.kl_coef * k1                                                               # (B, T)

        # 4. Advantage: how much better than expected. Whitened over the whole batch and not by minibatch, so
        #    that all minibatches have one scale and one baseline; then --lr need not know the reward's unit.
        raw_advantages = estimator.advantages(scores, penalty, old_values, mask, cfg)            # (B, T)
        advantages = whiten(raw_advantages, mask) if estimator.whitened else raw_advantages      # (B, T)
        returns = raw_advantages + old_values                                                    # (B, T)

        # 5. Update. A minibatch is one optimizer step. Micro-batches only bound the memory: the weights of
        #    tokens are those of the whole minibatch, so that the gradients add up to the same sum. In the
        #    first minibatch the ratio is 1, since nothing has changed yet. There the loss is near 0, because
        #    A has mean 0, and its gradient is not: a policy gradient's loss says nothing of how it learns.
        over_budget = kept["over_budget"] = is_over_budget(run, it, exact_kl)
        sums, n_updates = {}, cfg.epochs * cfg.minibatches             # for the log
        weights = torch.zeros_like(old_logp)                                                     # (B, T)
        for _ in range(0 if over_budget else cfg.epochs):
            for mini in torch.randperm(len(ids), generator=rng).chunk(cfg.minibatches):
                weights[mini] = token_weights(mask[mini], estimator.mean_over, cfg.max_new)
                for part in micro_batches(mini.tolist(), widths, cfg.micro_batch):
                    x, m, w = ids[part], mask[part], weights[part]                               # (b, T) each
                    if "policy" in rates:
                        logp, bonus = logprobs_and_bonus(policy, x, m, w, cfg)                   # (b, T), ()
                        old, adv = old_logp[part], advantages[part]
                        loss, stats = policy_loss(logp, old, adv, w, cfg.clip, cfg.clip_high or cfg.clip)
                        (loss - bonus).backward()
                        add_mean(sums, n_updates, policy_loss=loss)
                        add_mean(sums, n_updates * mask[mini].sum(), **stats)
                    if "value" in rates:
                        v = token_values(value, x, m)                                            # (b, T)
                        loss = value_loss(v, old_values[part], returns[part], w, cfg.value_clip)
                        loss.backward()
                        add_mean(sums, n_updates, value_loss=loss)
                if cfg.ptx_coef and "policy" in rates:
                    loss = ptx_loss(policy, corpus, rng)
                    (cfg.ptx_coef * loss).backward()
                    add_mean(sums, n_updates, ptx_loss=loss)
                # Each model's gradient is clipped by itself: the value loss is a square of rewards, and one
                # norm over both would let it shrink the policy's step.
                for name, lr in rates.items():
                    model, optimizer = trained[name]
                    set_lr(optimizer, lr)
                    norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
                    if run.allows_step(norm, model, [row_of[i] for i in mini]):
                        optimizer.step()
                    optimizer.zero_grad()

        # 6. Relabel: the annotator compares all answers to a prompt, one more of the reference among them.
        if relabelling and not over_budget and (it + 1) % cfg.relabel == 0:
            _, _, _, others = rollout(ref_sampler, tok, [prompts[i] for i in asked], cfg, OTHERS + it)
            groups = relabelling.compare(it, [rows[i] for i in asked], answers, others)
            model, optimizer = trained["reward_model"]
            set_lr(optimizer, cfg.reward_lr * decay(it, n_steps))
            sums |= learn_comparisons(run, model, optimizer, groups, relabelling.center)

        # Log; keep an early, the middle and the last iteration for the page; save.
        seen = {"sampled_logp": sampled_logp, "logp": old_logp, "ref_logp": ref_logp, "kl": exact_kl,
                "entropy": entropy, "score": scores, "reward": scores - penalty, "value": old_values,
                "advantage": raw_advantages, "whitened": advantages, "return": returns}
        metrics = all_sum(sums) | metrics_of(seen, mask, ended, batch_rows, texts, cfg)
        run.log(it, tokens=sum(widths), show=("reward", "gold", "kl", "length", "eos_rate"), **metrics)
        name = health.name_of_kept(it, kept["warmup"], n_steps, over_budget or it + 1 == run.n_steps)
        kept["inspected"] |= page_of(run, it, name, policy, value, batch_rows, (ids, mask), seen)
        run.save_when_due(it, now=over_budget, **kept)
        if over_budget:
            break

    if cfg.inspect:
        return run.say(health.inspection_text(kept["inspected"]["last"]))
    finish(run, sampler, policy, reference, rewards, tests, start, kept["inspected"])


if __name__ == "__main__":
    program(main, Config, __doc__)
