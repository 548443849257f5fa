"""PPO: reinforcement learning from human feedback, with the four models of InstructGPT.

    python ppo.py                              the tiny world; makes base, sft and reward if missing
    python ppo.py --init SFT --reward RM --data prompts.jsonl --lr 1e-6 --value_lr 1e-5      your own
    python ppo.py --reward mymodule:score      any Python function(rows, responses) -> list of floats
    python ppo.py --inspect                    every number of one response, before and after an update: the
                                               next one of a run, the second one where there is no run yet

Objective (arXiv:2203.02155, eq. 2): max_pi  E[ r(x, y) ] - beta KL(pi || pi_ref) + ptx_coef E[ log pi(text) ]

One iteration:
  1. rollout    y ~ pi(. | x) at --temperature; no top-k or top-p: pi_old is what is sampled from
  2. score      r(x, y) by the reward model, read at EOS; a response without EOS gets -eos_penalty instead.
                Also log pi and log pi_ref of its tokens, and their values V, before anything is updated
  3. reward     R_t = -beta (log pi(y_t) - log pi_ref(y_t)) + [t is the last token] r       (k1, no gradient)
                a process reward model (data/process.py) gives r for each step, at the step's last token
  4. advantage  delta_t = R_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  V after the end = 0
                (GAE, arXiv:1506.02438, eq. 11-16); returns = A + V; then A is whitened over response tokens.
                rloo, grpo: the response's whole reward, compared with those of the same prompt, at each token
  5. update     epochs x minibatches:  ratio = pi / pi_old,
                L = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)                (arXiv:1707.06347, eq. 7)
                L_V = max((V - ret)^2, (clip(V, V_old - eps_v, V_old + eps_v) - ret)^2) / 2
  6. relabel    the annotator compares the answers to each prompt, and the reward model learns from that

Step 6 in every iteration, the default, is iterated RLHF (arXiv:2204.05862, 4.5; data/relabel.py). --relabel 0
is the paper's loop, whose reward model stays as it is. Losses are means over the response tokens, EOS
included, of a whole minibatch.

Four models: policy (trained), reference (frozen policy), reward model, value model (trained; starts as the
reward model, but with --lora, or where no reward has a scalar head, as the policy with a new head).
--advantage rloo or grpo needs no value model: the other answers to a prompt are the baseline.
"""
import copy
import json
import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from data import InputError, health, report, world, write_atomic
from data.chain import chain_columns, need
from data.corpus import read_corpus
from data.files.checkpoint import load, save
from data.flags import RunFlags, names_in, program
from data.parallel import RANK, WORLD, all_sum, generate_in_shares, in_chunks, micro_batches, prepare
from data.relabel import Relabelling
from data.rewards import Scorer
from data.run import Run
from data.setup import RELABEL, adamw, seeded, set_lr, setup
from data.sample import read_prompts
from model import (cast_weights, compare_policies, freeze, last_token, refresh, sampling_copy, token_logprobs,
                   token_values, with_lora)


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
    inspect: bool = False         # do not train: print one response of the next iteration, token by token
    # Rollout
    iterations: int = 70          # rollout + update
    rollouts: int = 256           # responses an iteration
    group: int = 2                # answers per prompt (rloo and grpo need at least 2)
    max_new: int = 32             # longest response, in tokens
    temperature: float = 1.0      # of sampling and of every log-prob
    # Reward and advantage
    kl_coef: float = 0.1          # beta
    kl_target: float = 0.0        # nats per response, to which beta is steered (0: beta stays as it is)
    kl_horizon: float = 10000.0   # with --kl_target: responses over which beta may change by a fifth
    kl_budget: float = 0.0        # stop where the exact KL reaches so many nats per response (0: no limit)
    eos_penalty: float = 4.0      # a response that does not end gets minus this instead of its score
    advantage: typing.Literal["gae", "rloo", "grpo"] = "gae"   # rloo and grpo compare --group answers
    gamma: float = 1.0            # discount
    lam: float = 0.95             # lambda of GAE
    # Update
    epochs: int = 1               # passes over each batch of rollouts
    minibatches: int = 4          # optimizer steps per pass
    micro_batch: int = 64   # sequences per forward pass; smaller needs less memory and changes nothing else
    lr: float = 2e-4              # of the policy, falling linearly to a third (1e-6 to 1e-5 for real models)
    value_lr: float = 5e-4        # of the value model, likewise
    value_warmup: int = 4         # first iterations that train only the value model, at most a quarter of all
    clip: float = 0.2             # eps of the ratio
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


def group_advantages(scores, group, kind):
    """Advantages (B,) of sequence rewards (B,) in consecutive groups of answers to one prompt. rloo: minus
    the mean of the others (arXiv:2402.14740, eq. 7). grpo: (r - mean) / std (arXiv:2402.03300, 4.1.2; of
    GRPO's loss, its KL term and its mean over each response are left out)."""
    r = scores.view(-1, group)
    if kind == "rloo":
        others = (r.sum(1, keepdim=True) - r) / (group - 1)
        return (r - others).flatten()
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).flatten()


def whiten(x, mask):
    """(x - mean) / std over the masked entries; 0 elsewhere."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    var = ((x - mean) ** 2 * mask).sum() / n
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def policy_loss(logp, old_logp, advantages, mask, clip, n_tokens):
    """Clipped surrogate (arXiv:1707.06347, eq. 7), summed over response tokens, divided by n_tokens. Returns
    the loss and sums over tokens for the log: approx_kl = (ratio - 1) - log ratio
    (joschu.net/blog/kl-approx.html), clipfrac."""
    logratio = ((logp - old_logp) * mask).clamp(-20, 20)     # exp must not overflow
    ratio = logratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        stats = {"approx_kl": (ratio - 1 - logratio).sum() / n_tokens,
                 "clipfrac": (((ratio - 1).abs() > clip) * mask).sum() / n_tokens}
    return -(surrogate * mask).sum() / n_tokens, stats


def value_loss(values, old_values, returns, mask, clip, n_tokens):
    """Clipped value loss: the worse of the plain and the clipped squared error, halved, per response
    token."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (worse * mask).sum() / n_tokens


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


def adapt_kl_coef(beta, kl, target, n, horizon):
    """Proportional controller in log space (arXiv:1909.08593, section 2.2): beta grows while kl is above
    target."""
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


# ------------------------------------------------------------------------------------------------------------
# Before, between and after the steps of the loop.


def find_start(cfg):
    """(policy to start from, reward, prompts): what the flags name, or links of the chain, made if they are
    missing. InputError: flags that do not go together."""
    if cfg.advantage != "gae" and cfg.group < 2:
        raise InputError(f"--advantage {cfg.advantage} compares answers: --group must be at least 2")
    for name, n in (("--group", cfg.group), ("--minibatches times processes", cfg.minibatches * WORLD)):
        if cfg.rollouts % n:
            raise InputError(f"--rollouts {cfg.rollouts} must be a multiple of {name}, which is {n}; "
                             f"{max(1, cfg.rollouts // n) * n} would be")
    if cfg.ptx_coef and 8 % WORLD:
        raise InputError(f"--ptx_coef reads 8 windows a step, which do not divide over {WORLD} processes")
    if cfg.kl_target and not cfg.kl_horizon:
        raise InputError("--kl_target needs a --kl_horizon above 0")
    if cfg.temperature == 0:
        raise InputError("--temperature 0: a policy that always says the same has nothing to learn from")
    reward = cfg.reward or need(cfg, "reward")      # makes the SFT model too, if that is missing
    return cfg.init or need(cfg, "sft"), reward, cfg.data or world.TINY / "rl.jsonl"


def load_prompts(run, path, tok, models):
    """Prompt rows of a file, and their ids; left out are those longer than --max_prompt, and those that leave
    a model's context no room for an answer."""
    context = min(model.cfg.max_len for model in models)
    rows = read_prompts(run, path, tok, min(run.cfg.max_prompt, context - run.cfg.max_new))
    if "gold" in names_in(run.cfg.reward) and not all("family" in row for row in rows):
        raise InputError(f"{path}: --reward gold judges the tiny world's prompts only")
    return rows, [tok.render(row["prompt"], generation_prompt=True)[0] for row in rows]


def pick(n_rows, n, rng):
    """n row numbers below n_rows, sorted. Each is drawn once before any is drawn again."""
    rounds = [torch.randperm(n_rows, generator=rng) for _ in range(0, n, n_rows)]
    return torch.cat(rounds)[:n].sort().values.tolist()


def self_check(policy, ids, mask, sampled_logp, old_logp, ref_logp, cfg):
    """Four identities that must hold before the first update, as lines of text with the largest deviation at
    any response token. RuntimeError: one fails. In bf16 a cached step differs from a whole pass in the third
    digit, hence the wide tolerance."""
    logprobs = partial(token_logprobs, policy, temperature=cfg.temperature)
    again = in_chunks(logprobs, ids, mask, cfg.micro_batch)
    i = int(last_token(mask).argmin())                      # the shortest row carries the most padding
    T = int(last_token(mask)[i]) + 1
    with torch.no_grad():
        alone = token_logprobs(policy, ids[i: i + 1, :T], mask[i: i + 1, :T], cfg.temperature)
    lines, tolerance = [], 1e-3 if policy.head().dtype == torch.float32 else 0.3
    for name, value in (("ratio = 1", (again - old_logp).exp() - 1),
                        ("log-ratio to the reference = 0", old_logp - ref_logp),
                        ("log-probs from the cache = from a whole pass", sampled_logp - old_logp),
                        ("log-probs without padding = with padding", alone - old_logp[i: i + 1, :T])):
        worst = value.abs().max().item()
        lines.append(f"check before the first update: {name:46} max deviation {worst:.1e}")
        if not worst < tolerance:
            raise RuntimeError(f"self-check failed: {name}; nothing learned from here on could be trusted")
    return "\n".join(lines)


def add_mean(sums, n, **figures):
    """Add 1/n of each figure to the sum of that name."""
    for name, value in figures.items():
        sums[name] = sums.get(name, 0.0) + value.detach() / n


def load_models(policy, init, value_start, cfg):
    """(policy, reference, value model or None), still on the CPU, of a policy that was loaded from init. The
    value model is copied from value_start, a reward model whose weights are not cast yet; where that is None,
    from the policy."""
    use_value, value = cfg.advantage == "gae", None
    if cfg.lora:
        # One frozen trunk: the reference is the policy without its adapters, the value model has its own.
        reference = cast_weights(freeze(policy), exactly=True)
        policy = with_lora(reference, cfg.lora)
        if use_value:
            value = with_lora(reference, cfg.lora, scalar_head=True)
    else:
        reference = cast_weights(freeze(copy.deepcopy(policy)))
        if use_value:
            value = copy.deepcopy(value_start) if value_start else load(init, head="new")[0]
    return policy, reference, value


def prepare_models(policy, reference, value, reward_models, relabels, cfg, device):
    """Put all models where and how the flags want them. Returns what is trained, {name: (model, optimizer)}:
    the policy, the value model if there is one, and a reward model that the annotator goes on teaching."""
    trained = {"policy": (prepare(policy, cfg, device), adamw(policy, eps=1e-5))}
    if value is not None:
        trained["value"] = (prepare(value, cfg, device), adamw(value, eps=1e-5))
    for model in reward_models:
        if not relabels:
            cast_weights(freeze(model))
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
    of ids."""
    draws = torch.rand(len(prompts), cfg.max_new, dtype=torch.float64, generator=seeded(cfg.seed, step))
    ids, mask, logp = generate_in_shares(sampler, tok, prompts, draws, cfg.temperature)
    return ids, mask, logp, [x[m].tolist() for x, m in zip(ids.cpu(), mask.cpu())]


def logprobs_and_bonus(policy, ids, mask, cfg):
    """Log-probs (B, T) of the responses, and --entropy_coef times the sum of the entropies."""
    if not cfg.entropy_coef:
        return token_logprobs(policy, ids, mask, cfg.temperature), 0.0
    logp, entropy = token_logprobs(policy, ids, mask, cfg.temperature, entropy=True)
    return logp, cfg.entropy_coef * entropy.sum()


def token_figures(mask, k1, k3, exact_kl, entropy):
    """For the log, from (B, T) tensors: KL and length per response, entropy per token."""
    return {"kl": k1.sum(1).mean(), "kl_k3": k3.sum(1).mean(), "kl_exact": exact_kl.sum(1).mean(),
            "length": mask.sum(1).float().mean(), "entropy": entropy.sum() / mask.sum()}


def ptx_windows(cfg, tok, max_len):
    """The text of --ptx_coef as rows of ids (N, T), without the last 2 %, which measure the alignment tax."""
    length = min(128, max_len)
    ids, _ = read_corpus(cfg.ptx_data or world.TINY / "corpus.txt", tok, length, min_windows=2)
    return ids[: len(ids) // length * length].view(-1, length)


def ptx_loss(policy, corpus, rng):
    """- mean log pi(x_t | x_<t) over 8 windows of the text, rows of corpus (N, T): L_ptx of the objective."""
    window = torch.randint(len(corpus), (8,), generator=rng)[RANK::WORLD]
    x = corpus[window].to(policy.wte.weight.device)                                  # (8 / processes, T)
    every = torch.ones(x.shape, dtype=torch.bool)
    return -token_logprobs(policy, x, every).sum() / (8 * (x.shape[1] - 1))


def main(cfg):
    """Train a policy against a reward; or --inspect one iteration."""
    device = setup(cfg)
    init, reward_name, data = find_start(cfg)
    run = Run.open(cfg, "ppo", [init, *names_in(reward_name), data], dry=cfg.inspect)

    # The models, on the CPU still; prompts to learn from, and to be measured on.
    policy, tok = load(init)
    rewards = Scorer("--reward", reward_name, tok, cfg.reward_weights, cfg.ensemble)
    reward_models = rewards.models()
    policy, reference, value = load_models(policy, init, rewards.value_start, cfg)
    rows, prompts = load_prompts(run, data, tok, [policy, *reward_models])
    tests = report.test_prompts(policy, tok, cfg.max_new, rows if cfg.data else None, cfg.data)
    corpus = ptx_windows(cfg, tok, policy.cfg.max_len) if cfg.ptx_coef else None

    # Frozen copies to sample from; `refresh` copies the policy's current weights into one. Then all models
    # move to their device.
    can_learn = len(reward_models) == 1 and rewards.value_start is not None    # one, of the policy's tokens
    relabels = can_learn and Relabelling.possible(cfg, reward_name)
    sampler = sampling_copy(policy).to(device)
    ref_sampler = sampling_copy(reference).to(device) if relabels else None
    trained = prepare_models(policy, reference, value, reward_models, relabels, cfg, device)
    run.begin(cfg.iterations, tok, **trained)
    relabelling = Relabelling(run, reward_name, *trained["reward_model"]) if relabels else None
    beta, inspected = run.state.get("beta", cfg.kl_coef), run.state.get("inspected", {})

    measure = partial(run.measure, sampler=sampler, tests=tests)
    before, first_answers = run.before(measure)

    warmup = min(cfg.value_warmup, cfg.iterations // 4) if value is not None else 0
    if run.first < warmup and not cfg.inspect:
        run.say(f"the first {warmup} iterations train the value model alone: the KL stays 0 (--value_warmup)")

    for it in run.steps():
        # Everything random follows from (seed, iteration). Learning rates fall to a third.
        rng = seeded(cfg.seed, it)
        decay = 1 - 2 / 3 * it / cfg.iterations

        # 1. Rollout: `group` answers to each prompt, B in all. ids (B, T) is prompt, answer, padding; mask
        #    (B, T) is True on the answer and its EOS. Index t is token t in every tensor below.
        refresh(sampler, policy)
        asked = pick(len(rows), cfg.rollouts // cfg.group, rng)
        row_of = torch.tensor(asked).repeat_interleave(cfg.group).tolist()
        ids, mask, sampled_logp, answers = rollout(sampler, tok, [prompts[i] for i in row_of], cfg, it)
        texts, batch_rows = [tok.decode(answer) for answer in answers], [rows[i] for i in row_of]
        last = last_token(mask)                                                                  # (B,)
        is_last = torch.arange(ids.shape[1], device=device) == last[:, None]                     # (B, T)
        ended = torch.tensor([answer[-1] in tok.eos_ids for answer in answers], device=device)   # (B,)

        # 2. Score, by all models before any is updated. An unfinished answer gets -eos_penalty instead.
        scores = rewards.score(batch_rows, texts, ids, mask, cfg.micro_batch)                    # (B, T)
        scores = torch.where(ended[:, None], scores, -cfg.eos_penalty * is_last)
        compare = partial(compare_policies, policy, reference, temperature=cfg.temperature)
        old_logp, ref_logp, exact_kl, entropy = in_chunks(compare, ids, mask, cfg.micro_batch)   # (B, T) each
        old_values = torch.zeros_like(old_logp)
        if value is not None:
            old_values = in_chunks(partial(token_values, value), ids, mask, cfg.micro_batch)     # (B, T)
        run.check_finite(row_of, score=scores, policy=old_logp, reference=ref_logp, value=old_values)
        if it == 0 and not cfg.inspect:
            run.say(self_check(policy, ids, mask, sampled_logp, old_logp, ref_logp, cfg))

        # 3. Reward: -beta k1 at every token, plus the score at the last token of the answer or of each step.
        k1, _, k3 = kl_estimators(old_logp, ref_logp)                                            # (B, T)
        token_rewards = scores - beta * k1                                                       # (B, T)

        # 4. Advantage: how much better than expected, by the value model or by the other answers to the
        #    prompt; then it needs no whitening, a group's mean is subtracted already.
        if value is not None:
            raw_advantages, returns = gae(token_rewards, old_values, mask, cfg.gamma, cfg.lam)   # (B, T) each
            advantages = whiten(raw_advantages, mask)
        else:
            advantages = group_advantages(token_rewards.sum(1), cfg.group, cfg.advantage)[:, None] * mask
            raw_advantages, returns = advantages, torch.zeros_like(advantages)

        # 5. Update. A minibatch is one optimizer step. Micro-batches only bound the memory: every loss is
        #    divided by the tokens of the whole minibatch, so that their gradients add up to the same sum.
        over_budget = bool(cfg.kl_budget and exact_kl.sum(1).mean() >= cfg.kl_budget and not cfg.inspect)
        trains_policy = it >= warmup or cfg.inspect
        widths = (last + 1).tolist()                                   # columns that each row needs
        sums, n_updates = {}, cfg.epochs * cfg.minibatches             # figures for the log, and their number
        for _ in range(0 if over_budget else cfg.epochs):
            for mini in torch.randperm(len(ids), generator=rng).chunk(cfg.minibatches):
                n_tokens = mask[mini].sum()
                for part in micro_batches(mini.tolist(), widths, cfg.micro_batch):
                    x, m = ids[part], mask[part]                                                 # (b, T)
                    if trains_policy:
                        logp, bonus = logprobs_and_bonus(policy, x, m, cfg)                      # (b, T), ()
                        old, adv = old_logp[part], advantages[part]
                        loss, stats = policy_loss(logp, old, adv, m, cfg.clip, n_tokens)
                        (loss - bonus / n_tokens).backward()
                        add_mean(sums, n_updates, policy_loss=loss, **stats)
                    if value is not None:
                        v = token_values(value, x, m)
                        loss = value_loss(v, old_values[part], returns[part], m, cfg.value_clip, n_tokens)
                        loss.backward()
                        add_mean(sums, n_updates, value_loss=loss)
                if corpus is not None and trains_policy:
                    loss = ptx_loss(policy, corpus, rng)
                    (cfg.ptx_coef * loss).backward()
                    add_mean(sums, n_updates, ptx_loss=loss)
                for name, lr in (("policy", cfg.lr), ("value", cfg.value_lr)):
                    if name in trained:
                        model, optimizer = trained[name]
                        set_lr(optimizer, lr * decay)
                        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
                        if run.finite(norm, model, [row_of[i] for i in mini]):
                            optimizer.step()
                        optimizer.zero_grad()

        # 6. Relabel (iterated RLHF): the annotator compares each prompt's answers, and one more by the
        #    reference; the reward model trains on that.
        if relabelling and not over_budget and (it + 1) % cfg.relabel == 0:
            _, _, _, others = rollout(ref_sampler, tok, [prompts[i] for i in asked], cfg, RELABEL + it)
            groups = [answers[k * cfg.group: (k + 1) * cfg.group] + [other] for k, other in enumerate(others)]
            sums |= relabelling.step(it, [rows[i] for i in asked], groups, cfg.reward_lr * decay)

        # Log; keep the first, the middle and the last iteration for the page; adapt beta; save.
        figures = {"reward": scores.sum(1).mean(), "beta": beta, "eos_rate": ended.float().mean(),
                   "unique": len(set(texts)) / len(texts)} | all_sum(sums)
        figures |= token_figures(mask, k1, k3, exact_kl, entropy)
        if value is not None:
            figures["explained_var"] = explained_variance(old_values, returns, mask)
        if not cfg.data:    # the tiny world knows the gold score, which is shown and never trained on
            figures |= world.mean_scores(batch_rows, texts)
        run.log(it, tokens=sum(widths), show=("reward", "gold", "kl", "length", "eos_rate"), **figures)
        moment = run.moment(it, warmup, over_budget)
        if moment:
            numbers = {"score": scores.sum(1), "logp": old_logp, "ref_logp": ref_logp,
                       "reward": token_rewards, "value": old_values, "advantage": raw_advantages,
                       "whitened": advantages, "return": returns}
            inspected[moment] = health.inspection(policy, value, tok, batch_rows, (ids, mask), numbers, cfg)
            inspected[moment] |= {"iteration": it + 1, "beta": beta}
        if cfg.kl_target:
            beta = adapt_kl_coef(beta, k1.sum(1).mean().item(), cfg.kl_target, cfg.rollouts, cfg.kl_horizon)
        if run.due(it) or over_budget:
            later_pairs = relabelling.later_pairs if relabelling else []
            run.save(it, beta=beta, later_pairs=later_pairs, inspected=inspected)
        if over_budget:
            run.say(f"--kl_budget {cfg.kl_budget:g} is spent after {it} iterations")
            break

    if cfg.inspect:
        run.say(health.inspection_text(inspected["last"]))
        return
    # The closing figures. First and last answers are both scored by the final reward model.
    refresh(sampler, policy)
    after, closing = measure("after")
    after["kl"], after["entropy"] = report.mean_kl(policy, reference, tok, closing.prompt_ids, closing.ids)
    for figures, scored in ((before, first_answers), (after, closing.scored)):
        report.add_rewards(figures, scored, rewards.score_texts(tests.rows, [x["answer"] for x in scored]))
    if relabelling:
        save(Path(cfg.out) / "reward", reward_models[0], tok)
    write_atomic(run.folder / "inspect.json", json.dumps(inspected).encode())
    run.finish(before, after, chain_columns(cfg, "PPO", before, after),
               report.answer_rows(tests, first_answers, closing.scored))


if __name__ == "__main__":
    program(main, Config, __doc__)
