"""Direct preference optimisation and its family: learn from comparisons without a reward model and without sampling.

    python dpo.py                                            the tiny world; makes base, sft and reward if missing
    python dpo.py --loss ipo --out out/ipo                   dpo | ipo | simpo | orpo | kto, also cDPO, rDPO, + SFT term
    python dpo.py --online true --out out/online             compare new answers of the policy itself, step by step
    python dpo.py --init SFT --data pairs.jsonl --lr 1e-6    your policy, your comparisons (formats: data/formats.py)

The best policy under  E[r(x, y)] - beta KL(pi || pi_ref)  is  pi*(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta). So a policy
is itself a reward model,  r(x, y) = beta log pi(y|x) / pi_ref(y|x) + const(x),  and can be fitted to comparisons as one
(arXiv:2305.18290, eq. 4-7). With w the chosen and l the rejected answer, |y| the length of y in tokens, and

    h = log pi(w|x) / pi_ref(w|x) - log pi(l|x) / pi_ref(l|x)

    DPO    - log sigmoid(beta h)                                                          arXiv:2305.18290, eq. 7
    IPO    (h - 1 / (2 beta))^2          log-ratios averaged over tokens, as its authors do   arXiv:2310.12036, eq. 17
    SimPO  - log sigmoid(beta (log pi(w|x) / |w| - log pi(l|x) / |l|) - gamma)            arXiv:2405.14734, eq. 6
    ORPO   - log pi(w|x) / |w|  -  lambda log sigmoid(log odds(w|x) - log odds(l|x)),     arXiv:2403.07691, eq. 6-7
           odds = p / (1 - p), p the geometric mean of the token probabilities; starts from the base model
    KTO    1 - sigmoid(beta (r - z)) for a good answer, 1 - sigmoid(beta (z - r)) for a bad one, r = log pi / pi_ref,
           z = max(0, mean of r over answers to OTHER prompts), no gradient               arXiv:2402.01306, eq. 8

SimPO and ORPO need no reference. If a share p prefers w, a pairwise loss is p L(h) + (1 - p) L(-h). cDPO
(--label_smoothing e) says that a label is wrong with probability e: p (1 - e) + (1 - p) e. rDPO (--flip_rate e,
arXiv:2403.00409) knows it and undoes it, so that the loss is unbiased: (p - e) / (1 - 2e), maybe outside [0, 1].
--sft_coef adds - log pi(w|x) / |w| (arXiv:2404.19733, eq. 1).

The log-probs of the reference never change: they are computed once, kept as two numbers a pair, and the reference is
dropped, so that one model is in memory. Left out: packing; the dozens of further variants, each a line of `pair_loss`.
"""
import math
import random
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import InputError, formats, function_of, world
from data.evaluate import kl_and_entropy
from model import (Run, batches, cosine, distinct_2, for_training, frozen, home, load, load_optimizer, load_state, need,
                   optimizer_for, pad_batch, pieces, respond, result_of, run, save, seeded, setup, sharded, sibling,
                   summed, token_logprobs, trained, with_lora)


@dataclass
class Config:
    """The flags of `python dpo.py`."""
    init: str = ""                # policy to start from, and the reference (default: sft beside --out; orpo: base)
    data: str = ""                # comparisons; for kto also single answers, good or bad (default: reward.py's)
    out: str = "out/dpo"          # folder for the checkpoint, log, samples and plot
    loss: typing.Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"   # see the equations above
    beta: float = 0.0             # strength of the pull to the reference; 0: what suits the loss (see BETAS)
    label_smoothing: float = 0.0  # cDPO: chance that a label is wrong, below 0.5
    flip_rate: float = 0.0        # rDPO: the same, but undone
    sft_coef: float = 0.2         # weight of the chosen answer's own - log pi / length; keeps sentences whole
    gamma: float = 1.0            # SimPO: margin that the chosen answer must win by
    odds_coef: float = 1.0        # ORPO: lambda
    good_weight: float = 1.0      # KTO: weight of good answers
    bad_weight: float = 1.0       # KTO: weight of bad answers
    online: bool = False          # sample two answers per prompt from the policy at each step and compare those
    judge: str = "annotator"      # of --online: annotator (of the tiny world), a reward model, or module:function
    noise: float = 0.05           # of the annotator: 0 always picks the better answer (see reward.py)
    online_steps: int = 150       # of --online
    epochs: int = 2               # passes over the comparisons
    batch_size: int = 64          # pairs (kto: answers) a step
    micro_batch: int = 64         # pairs per forward pass; smaller needs less memory and changes nothing else
    max_prompt: int = 128         # tokens of a prompt; longer ones lose their beginning, for both answers alike
    max_len: int = 256            # tokens of prompt and answer; longer answers are cut and then carry no EOS
    lr: float = 3e-4              # peak learning rate of AdamW (5e-7 to 5e-6 for real models)
    warmup: int = 10              # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.0     # on matrices only
    grad_clip: float = 1.0        # largest gradient norm
    held_out: float = 0.1         # share of the prompts kept for the report
    max_new: int = 32             # longest sampled answer, in tokens
    save_every: int = 100         # steps between checkpoints
    lora: int = 0                 # rank of adapters on a frozen, shared trunk (0: train all weights)
    max_steps: int = 0            # stop after this many steps (0: run all)
    resume: bool = False          # go on from the last checkpoint in --out
    seed: int = 0                 # every random draw comes from (seed, step)
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; weights stay fp32
    compile: bool = False         # torch.compile the training forward, and on a GPU the decoding step
    recompute: bool = False       # activation checkpointing: layers run again in the backward pass, for less memory
    fsdp: bool = False            # with torchrun: cut weights, gradients and optimizer state over the processes


BETAS = {"dpo": 0.3, "ipo": 0.5, "simpo": 2.0, "orpo": 1.0, "kto": 0.3}   # orpo has none; 1 keeps its rewards readable


# ---------------------------------------------------------------------------------------------------------------------
# The losses as pure functions, elementwise over (N,) tensors. Only `pair_loss` and `kto_loss` are called by the loop.


def dpo(h, beta):
    """arXiv:2305.18290, eq. 7; h is the difference of the log-ratios, summed over response tokens."""
    return -F.logsigmoid(beta * h)


def ipo(h, beta):
    """arXiv:2310.12036, eq. 17; h as in DPO, but of log-ratios averaged over tokens."""
    return (h - 1 / (2 * beta)) ** 2


def simpo(d, beta, gamma):
    """arXiv:2405.14734, eq. 6; d is the difference of the mean log-probs. (The paper's tables give gamma / beta.)"""
    return -F.logsigmoid(beta * d - gamma)


def log_odds(p):
    """log(e^p / (1 - e^p)) of mean log-probs p < 0 without overflow or 0 * inf in the gradient of the other branch."""
    p = p.clamp(max=-1e-7)
    near_0 = p > -math.log(2)
    log1mexp = torch.where(near_0, torch.log(-torch.expm1(torch.where(near_0, p, -1.0))),
                           torch.log1p(-torch.exp(torch.where(near_0, -1.0, p))))
    return p - log1mexp


def share_preferring(p, label_smoothing=0.0, flip_rate=0.0):
    """What a label p counts as: cDPO pulls it to 1/2, rDPO inverts that. Linear in p, so losses need not know."""
    p = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return (p - flip_rate) / (1 - 2 * flip_rate)


def pair_loss(cfg, beta, logp, ref, n, p):
    """Losses (B,) and implicit rewards (2, B) of pairs. logp, ref: summed log-probs (2, B) of the chosen (row 0) and
    the rejected answers under policy and reference; n (2, B): their lengths in tokens; p (B,): share for the chosen."""
    p, mean = share_preferring(p, cfg.label_smoothing, cfg.flip_rate), logp / n
    if cfg.loss == "dpo":
        rewards, each = logp - ref, lambda h: dpo(h, beta)
    elif cfg.loss == "ipo":
        rewards, each = (logp - ref) / n, lambda h: ipo(h, beta)
    elif cfg.loss == "simpo":
        rewards, each = mean, lambda d: simpo(d, beta, cfg.gamma)
    else:
        rewards, each = log_odds(mean), lambda d: -cfg.odds_coef * F.logsigmoid(d)
    h = rewards[0] - rewards[1]
    loss = p * each(h) + (1 - p) * each(-h)
    nll_coef = cfg.sft_coef + (cfg.loss == "orpo")
    return loss - nll_coef * mean[0] if nll_coef else loss, beta * rewards


def kto_loss(r, good, z, beta, good_weight=1.0, bad_weight=1.0):
    """arXiv:2402.01306, eq. 8. r (B,): log-ratios; good (B,): 1 or 0; z: the reference point, a number."""
    gain = torch.where(good > 0.5, r - z, z - r)
    return torch.where(good > 0.5, good_weight, bad_weight) * (1 - (beta * gain).sigmoid())


# ---------------------------------------------------------------------------------------------------------------------


def encode(rows, tok, max_prompt, max_len):
    """Preference or KTO rows -> [(prompt ids, first answer, second answer, label)]. The second answer of a pair is the
    rejected one; KTO has one answer only (mismatch adds the other). Left out and counted: pairs whose answers do not
    differ within max_len, which would teach nothing. Returns the list and that count."""
    out, same = [], 0
    for row in rows:
        keys = ("completion",) if "completion" in row else ("chosen", "rejected")
        sides = [tok.render_answer(row["prompt"], row[key]) for key in keys]
        prompt = sides[0][0]
        answers = [ids[: max_len - min(len(prompt), max_prompt)] for _, ids in sides]
        if len(answers) == 2 and answers[0] == answers[1]:
            same += 1
            continue
        out.append((prompt[-max_prompt:], answers[0], answers[-1], float(row["label"])))
    return out, same


def mismatch(examples, seed):
    """KTO's other answers: each prompt gets, as its second one, the answer to a different prompt, drawn once and for
    all, so that the reference's log-probs can be kept (arXiv:2402.01306, 4.1: the estimate of the reference point)."""
    n, out = len(examples), list(examples)
    order = random.Random(seed).sample(range(n), n)
    for k, i in enumerate(order):
        prompt, answer, _, label = examples[i]
        others = (order[(k + shift) % n] for shift in range(1, n))   # the next one in random order, as a rule
        other = next((j for j in others if examples[j][0] != prompt), None)
        if other is None:
            raise InputError("kto: all rows have the same prompt; its reference point needs answers to other prompts")
        out[i] = (prompt, answer, examples[other][1], label)
    return out


def logps(model, pairs, tok, device, forward=token_logprobs):
    """Summed log-probs (N,) of answers given prompts, [(prompt ids, answer ids)], and the answers' lengths (N,). A
    prompt with several answers goes through the model once."""
    order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])                      # equal prompts side by side
    rows, back = [pairs[i] for i in order], torch.tensor(order).argsort().to(device)
    number = {x: n for n, x in enumerate(dict.fromkeys(tuple(x) for x, _ in rows))}
    prompt = torch.tensor([number[tuple(x)] for x, _ in rows], device=device) if len(number) < len(rows) else None
    ids, real = pad_batch([x + y for x, y in rows], tok.pad_id)                       # (N, T)
    mask = real & (torch.arange(ids.shape[1]) >= torch.tensor([len(x) for x, _ in rows])[:, None])
    logp = forward(model, ids.to(device), mask, prompt=prompt).sum(1)                 # (N,)
    return logp[back], mask.sum(1).to(device)[back]


def both(examples):
    """All first answers, then all second ones: chosen and rejected go through the model in one batch."""
    return [(x, a) for x, a, _, _ in examples] + [(x, b) for x, _, b, _ in examples]


@torch.no_grad()
def all_logps(model, examples, tok, device, autocast, batch, paired=True):
    """Summed log-probs (2, N) of both answers of all examples, similar lengths together. A pair goes through the model
    as it will in training, so that policy and reference start equal: its prompt once, or (kto) each answer alone."""
    out = torch.zeros(2, len(examples))
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i][:3])))
    for rows, real in pieces(order, batch) if order else ():
        with autocast():
            pairs = both([examples[i] for i in rows])
            halves = [pairs] if paired else [pairs[: len(rows)], pairs[len(rows):]]
            part = torch.cat([logps(model, half, tok, device)[0] for half in halves]).view(2, -1).cpu()
        if real:
            out[:, rows] = part
    return summed(out)


def judge_function(cfg, device, autocast):
    """score(rows, texts) -> list of utilities, by which --online compares."""
    if cfg.judge == "annotator":
        return lambda rows, texts: [world.utility(r, t) for r, t in zip(rows, texts)]
    if ":" in cfg.judge:
        return function_of(cfg.judge, "--judge")
    rm, tok = load(cfg.judge, device)
    if not rm.cfg.scalar_head:
        raise InputError(f"{cfg.judge} is a language model; --judge needs a reward model")

    @torch.no_grad()
    def score(rows, texts):
        pairs = [tok.render_answer(r["prompt"], t) for r, t in zip(rows, texts)]
        ids, real = pad_batch([x + y for x, y in pairs], tok.pad_id, device)
        with autocast():
            return rm.scores(rm(ids)[torch.arange(len(ids), device=device), real.sum(1) - 1]).tolist()
    return score


def online_pairs(policy, tok, rows, score, cfg, step, device, autocast):
    """Two new answers of the policy to each row's prompt, compared by the judge: examples as `encode` makes them. What
    cannot be compared (equal answers, neither finished, a tie) is left out; an unfinished answer loses."""
    rows = [r for r in rows for _ in range(2)]
    with autocast():
        texts, prompts, ids = respond(policy, tok, [r["prompt"] for r in rows], cfg.max_new,
                                      generator=seeded(cfg.seed, step, device))
    utility, rng, out = score(rows, texts), random.Random(f"{cfg.seed} {step}"), []
    for i in range(0, len(rows), 2):
        ended = [tok.eos_id in ids[j] for j in (i, i + 1)]
        if ids[i] == ids[i + 1] or not any(ended):
            continue
        p = float(ended[0]) if not all(ended) else world.annotate(
            utility[i], utility[i + 1], cfg.noise if cfg.judge == "annotator" else 0.0, rng)
        if p != 0.5:
            w, l = (i, i + 1) if p else (i + 1, i)
            out.append((prompts[i], ids[w], ids[l], 1.0))
    return out


def main(cfg):
    """Train a policy on comparisons, given or (--online) of its own answers."""
    device, autocast = setup(cfg)
    if cfg.label_smoothing >= 0.5 or cfg.flip_rate >= 0.5:
        raise InputError("--label_smoothing and --flip_rate must be below 0.5: at one half a label says nothing")
    if cfg.online and (cfg.loss in ("kto", "orpo") or (cfg.data and cfg.judge == "annotator")):
        raise InputError("--online compares pairs of a policy's answers: it needs --loss dpo, ipo or simpo, and for "
                         "prompts of your own (--data) a --judge that knows them")
    beta = cfg.beta or BETAS[cfg.loss]
    start_from = "base" if cfg.loss == "orpo" else "sft"
    init = cfg.init or sibling(cfg, start_from)
    if not cfg.init:
        need(init, {"base": "model.py", "sft": "sft.py"}[start_from], cfg)
    if not cfg.data and not cfg.online:
        need(sibling(cfg, "reward"), "reward.py", cfg)   # for the comparisons it makes
    policy, tok = load(init, home(cfg, device), scalar_head=False)
    max_len = min(cfg.max_len, policy.cfg.max_len)
    max_prompt = min(cfg.max_prompt, max_len - 1, policy.cfg.max_len - cfg.max_new)
    if max_prompt < 1:
        raise InputError(f"--max_len {cfg.max_len}, --max_prompt {cfg.max_prompt} and --max_new {cfg.max_new} leave no "
                         f"room for a prompt in the model's context of {policy.cfg.max_len}")
    held = []
    if cfg.online:
        score = judge_function(cfg, device, autocast)
        path = cfg.data or world.TINY / "rl.jsonl"
        rows, dropped = formats.load(path, "prompt")
        print(formats.describe(rows, dropped, path))
        rows = [r for r in rows if len(tok.render(r["prompt"], True)[0]) <= max_prompt]
        if not rows:
            raise InputError(f"{path}: no prompt of at most {max_prompt} tokens (--max_prompt, --max_new)")
        plan = [random.Random(f"{cfg.seed} {step}").choices(range(len(rows)), k=cfg.batch_size)
                for step in range(cfg.online_steps)]
    else:
        path = cfg.data or Path(sibling(cfg, "reward")) / "comparisons.jsonl"
        rows, dropped = formats.load(path, "kto" if cfg.loss == "kto" else "preference")
        ties = sum(r["label"] == 0.5 for r in rows)   # nothing to learn from for any of the losses but DPO
        print(formats.describe(rows, dropped, path) + (f"; {ties:,} ties left out" if ties else ""))
        parts = formats.split([r for r in rows if r["label"] != 0.5], cfg.held_out, seed=0)
        (train, cut), (held, held_cut) = (encode(part, tok, max_prompt, max_len) for part in parts)
        print(f"{len(train)} to train on, {len(held)} held out; {cut + held_cut} left out: equal within --max_len")
        labels = [{e[3] > 0.5 for e in part} for part in (train, held)]
        if not train or not held or cfg.loss == "kto" and {True, False} not in labels[:1]:
            raise InputError(f"{path}: {len(train)} comparisons to train on and {len(held)} held out (--held_out); "
                             "both need at least one" + (", kto good and bad answers" if cfg.loss == "kto" else ""))
        if cfg.loss == "kto":
            train, held = mismatch(train, cfg.seed), mismatch(held, cfg.seed)
        lengths = [len(x) + max(len(a), len(b)) for x, a, b, _ in train]
        plan = [b for epoch in range(cfg.epochs) for b in batches(lengths, cfg.batch_size, cfg.seed, epoch)]

    trunk = frozen(policy, autocast) if cfg.lora else None   # without its adapters the policy is the reference
    policy = with_lora(trunk, cfg.lora) if cfg.lora else policy
    state = load_state(cfg.out) if cfg.resume else {}
    if state:
        policy.load_state_dict(state["model"], strict=not cfg.lora)   # the trunk is not in it
    policy = for_training(policy, cfg, device)
    optimizer = optimizer_for(policy, cfg.lr, cfg.weight_decay, (0.9, 0.95), 1e-6)
    first, ref_logp = state.get("step", 0), state.get("ref_logp")
    if state:
        load_optimizer(optimizer, state["optimizer"])
    needs_ref = cfg.loss in ("dpo", "ipo", "kto")
    if not cfg.online and ref_logp is None:
        ref_logp = torch.zeros(2, len(train) + len(held))
        if needs_ref:   # the policy is still the reference: its log-probs, once, and no second model
            start = time.time()
            ref_logp = all_logps(policy, train + held, tok, device, autocast, cfg.micro_batch, cfg.loss != "kto")
            print(f"log-probs of the reference: {2 * len(train + held):,} answers once, {time.time() - start:.0f} s, "
                  f"{ref_logp.nbytes:,} bytes kept instead of a second model of "
                  f"{sum(p.nbytes for p in policy.parameters()):,}")

    def reference():
        """The frozen model that the policy started as, and with adapters still has as its trunk."""
        return trunk or sharded(frozen(load(init, home(cfg, device), scalar_head=False)[0], autocast), cfg, device)

    ref = reference() if cfg.online and needs_ref else None
    forward = torch.compile(token_logprobs) if cfg.compile else token_logprobs
    n_steps = min(len(plan), cfg.max_steps or len(plan))
    log = Run(cfg, "dpo", n_steps, first)
    graded = not cfg.data
    tests = world.rows("test") if graded else [{"prompt": p} for p in formats.prompts_of(rows, 32)]
    tests = [r for r in tests if len(tok.render(r["prompt"], True)[0]) + cfg.max_new <= policy.cfg.max_len]

    def losses(examples, ref_logp, forward=forward, z=0.0):
        """Losses (B,), implicit rewards (2, B) and labels (B,) of examples; kto: its second answer plays no part."""
        p = torch.tensor([e[3] for e in examples], device=device)
        with autocast():
            if cfg.loss == "kto":
                logp, _ = logps(policy, [(x, a) for x, a, _, _ in examples], tok, device, forward)
                r = logp - ref_logp[0]
                return kto_loss(r, p, z, beta, cfg.good_weight, cfg.bad_weight), beta * torch.stack((r - z, z - r)), p
            logp, n = (t.view(2, -1) for t in logps(policy, both(examples), tok, device, forward))
        return *pair_loss(cfg, beta, logp, ref_logp, n, p), p

    @torch.no_grad()
    def reference_point(examples, ref_logp):
        """KTO's z: mean log-ratio of answers to other prompts, at least 0."""
        with autocast():
            pieces = [logps(policy, [(x, b) for x, _, b, _ in examples[k: k + cfg.micro_batch]], tok, device)[0]
                      for k in range(0, len(examples), cfg.micro_batch)]
        return (torch.cat(pieces) - ref_logp[1]).mean().clamp(min=0.0)

    def figures(loss, rewards, p):
        """Sums over examples of what is logged. dpo, ipo, kto: rewards are relative to the reference."""
        w, l = torch.where(p > 0.5, rewards, rewards.flip(0))
        right = (w > l).float() + 0.5 * (w == l)
        sums = {"loss": loss.sum(), "accuracy": right.sum(), "margin": (w - l).sum()}
        if cfg.loss == "kto":
            return sums
        return sums | {"chosen_reward": w.sum(), "rejected_reward": l.sum()}

    def measure():
        """Held-out figures, and what the policy says to prompts it was not trained on."""
        out = {}
        for k in range(0, len(held), cfg.micro_batch):
            part, at = held[k: k + cfg.micro_batch], slice(len(train) + k, len(train) + k + cfg.micro_batch)
            known = ref_logp[:, at].to(device)
            with torch.no_grad():
                z = reference_point(part, known) if cfg.loss == "kto" else 0.0
                for name, value in figures(*losses(part, known, token_logprobs, z)).items():
                    out[name] = out.get(name, 0.0) + value.item() / len(held)
        with autocast():
            texts, prompts, ids = respond(policy, tok, [r["prompt"] for r in tests], cfg.max_new,
                                          generator=seeded(cfg.seed, -1 % 2**31, device))
        return (world.report(tests, texts) if graded else {}) | out | {
            "length": sum(map(len, ids)) / len(ids), "eos_rate": sum(tok.eos_id in x for x in ids) / len(ids),
            "distinct_2": distinct_2(ids)}, texts, prompts, ids

    before, before_texts = (state["before"], state["before_texts"]) if first else measure()[:2]
    if not first:
        log.samples("before", [r["prompt"] for r in tests[:12]], before_texts[:12])
    for step in range(first, n_steps):
        start = time.time()
        if cfg.online:
            examples = online_pairs(policy, tok, [rows[i] for i in plan[step]], score, cfg, step, device, autocast)
            known = all_logps(ref, examples, tok, device, autocast, cfg.micro_batch) if ref else torch.zeros(
                2, len(examples))
        else:
            examples, known = [train[i] for i in plan[step]], ref_logp[:, plan[step]]
        known = known.to(device)
        order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i][:3])))
        z = reference_point(examples, known) if cfg.loss == "kto" else 0.0
        sums = {}
        for rows_, real in pieces(order, cfg.micro_batch) if order else ():
            loss, rewards, p = losses([examples[i] for i in rows_], known[:, rows_], z=z)
            (real * loss.sum() / len(examples)).backward()   # mean over the whole step, however it is cut
            for name, value in figures(loss.detach(), rewards.detach(), p).items():
                sums[name] = sums.get(name, 0.0) + real * value / len(examples)
        lr = cfg.lr * cosine(step, len(plan), cfg.warmup)
        norm = log.update(step, policy, optimizer, lr, {"rows": plan[step], "examples": examples})
        n_tokens = sum(len(x) + len(y) for x, y in both(examples))
        extra = {"z": float(z)} if cfg.loss == "kto" else {"pairs": len(examples)} if cfg.online else {}
        log.step(step, **summed(sums), **extra, grad_norm=norm, tok_s=n_tokens / (time.time() - start))
        if log.save_now(step):
            save(cfg.out, policy, tok, {"model": trained(policy), "optimizer": optimizer.state_dict(),
                                        "step": step + 1, "ref_logp": ref_logp, "before": before,
                                        "before_texts": before_texts})
            log.saved(step)
    after, texts, prompts, ids = measure()
    ref = ref or reference()
    with autocast():
        after["kl"], _ = kl_and_entropy(policy, ref, prompts, ids, tok, device)
    if graded:   # head to head with where it started: share of test prompts on which gold is higher, ties one half
        a, b = (torch.tensor(world.gold(tests, t)) for t in (texts, before_texts))
        after["win_rate"] = ((a > b).float() + 0.5 * (a == b)).mean().item()
    print(log.samples("after", [r["prompt"] for r in tests[:12]], texts[:12]))
    if after.get("chosen_reward", 0.0) < 0 and needs_ref:
        print(f"The chosen answers lost log-probability too (reward {after['chosen_reward']:.2f}): the loss only asks "
              "that the rejected ones lose more, and both share tokens. --sft_coef holds the chosen ones up.")
    columns = {start_from.replace("sft", "SFT"): before, cfg.loss.upper(): after}
    told = result_of(sibling(cfg, "sft"))
    if told and not cfg.init and start_from == "sft":   # sft.py measured the base model on the same prompts
        columns = {"base": told["before"]} | columns
    log.finish(device, before, after, [("loss",), ("accuracy",), ("chosen_reward", "rejected_reward")
                                       if cfg.loss != "kto" else ("margin",)], columns)


if __name__ == "__main__":
    run(main, Config, __doc__)
