"""Reward modelling: learn what people prefer from comparisons of two answers.

    python reward.py                                   the tiny world: sample from out/sft, have it compared, train
    python reward.py --init SFT --data pairs.jsonl     your policy, your comparisons (formats: data/formats.py)
    python reward.py --vote                            you are the annotator: two answers, pick one, see what it says
    python reward.py --init out/reward --data out/reward/votes.jsonl --out out/mine    go on from there with your votes

Equations: P(a over b | x) = sigmoid(r(x, a) - r(x, b)) (Bradley & Terry 1952), so with p the share who prefer a
(1 or 0 for a plain choice, 1/2 for a tie, anything between for a soft label) and m a margin (arXiv:2307.09288, eq. 2)
    L = - p log sigmoid(r_a - r_b - m) - (1 - p) log sigmoid(r_b - r_a + m)  +  c (r_a + r_b)^2 / 2
The last term (centering, arXiv:2312.09244) holds down the constant that the first two leave free. All comparisons of
one prompt go through the model together, prompt and answers once each, their losses averaged over the K-choose-2 pairs
(arXiv:2203.02155, eq. 1). The reward is read at the last token, the EOS, from a scalar head on the SFT model. After
training, reward_mean is set so that the answers in the comparisons average 0.

Left out: ranking losses over more than two, generative reward models.
"""
import json
import os
import random
import time
import typing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F

from data import InputError, formats, world
from model import (Run, batches, cosine, for_training, home, load, load_optimizer, load_state, meet, need,
                   optimizer_for, pad_batch, pieces, respond, run, save, seeded, setup, sibling, summed,
                   with_shared_prompts, write_atomic)


@dataclass
class Config:
    """The flags of `python reward.py`."""
    init: str = ""                # model to start from: a policy or a reward model (default: sft beside --out)
    policy: str = ""              # policies to sample from, A or A,B: the k answers are shared out (default: --init)
    data: str = ""                # comparisons; default: made by sampling --init and asking the tiny world's annotator
    add: str = ""                 # more comparisons to train on, e.g. those of an earlier round
    out: str = "out/reward"       # folder for the checkpoint, comparisons, log, samples and plot
    vote: bool = False            # do not train: compare answers yourself, then see what the reward model in --out says
    votes: str = ""               # file that the votes go to (default: votes.jsonl in --out)
    prompts: int = 4000           # prompts to sample answers for
    k: int = 4                    # answers per prompt; all pairs of different ones are compared
    temperature: float = 1.0      # of that sampling
    noise: float = 0.05           # annotator: 0 always picks the better answer, larger errs more (sigmoid(gap / noise))
    agreement: float = 0.0        # set the noise so that this share of choices is right, e.g. 0.72 (0: use --noise)
    bias_length: float = 0.0      # annotator: extra utility per ten words
    bias_confidence: float = 0.0  # annotator: extra utility for sounding sure
    bias_sycophancy: float = 0.0  # annotator: extra utility for agreeing with the user
    epochs: int = 2               # passes over the comparisons
    batch_size: int = 16          # prompts a step, with all their answers
    micro_batch: int = 16         # prompts per forward pass
    max_len: int = 256            # tokens per prompt and answer; longer comparisons are left out and counted
    max_new: int = 48             # longest sampled answer, in tokens
    lr: float = 1e-3              # peak learning rate of AdamW (5e-6 to 2e-5 for real models)
    warmup: int = 20              # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.01    # on matrices only
    grad_clip: float = 1.0        # largest gradient norm
    margin: float = 0.0           # m = this times the margin a comparison states, if it states one
    center: float = 0.01          # c, weight of the centering term
    held_out: float = 0.1         # share of the prompts kept for the report
    save_every: int = 100         # steps between checkpoints
    max_steps: int = 0            # stop after this many steps (0: run all)
    resume: bool = False          # go on from the last checkpoint in --out
    seed: int = 0                 # every random draw comes from (seed, step)
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; weights stay fp32
    compile: bool = False         # torch.compile the training forward, and on a GPU the decoding step
    recompute: bool = False       # activation checkpointing: layers run again in the backward pass, for less memory
    fsdp: bool = False            # with torchrun: cut weights, gradients and optimizer state over the processes


# ---------------------------------------------------------------------------------------------------------------------


def preference_loss(r_a, r_b, p, margin=0.0, center=0.0):
    """Loss per pair (N,) of rewards r_a, r_b (N,) when a share p (N,) prefers a: the equation above."""
    d = r_a - r_b - margin
    return -p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d) + center * (r_a + r_b) ** 2 / 2


def final_scores(model, ids, lens, mask=None, prompt=None):
    """Reward (B,) of right-padded ids (B, T): the scalar head at the last real token, position lens - 1. mask (B, T)
    and prompt (B,): what goes through the model once for several rows (model.with_shared_prompts)."""
    hidden = with_shared_prompts(model, ids, mask, prompt)                            # (B, T, C)
    return model.scores(hidden[torch.arange(len(ids), device=ids.device), lens - 1])


def label(paths, rows, cfg, device, autocast):
    """Sample k answers per prompt from the policies at `paths` and compare every pair of different, finished ones.
    Returns preference rows (see data/formats.py), each with the annotator's chance to choose right as its "ceiling"."""
    answers_of = [{} for _ in rows]
    for n, path in enumerate(paths):
        policy, tok = load(path, device, scalar_head=False)
        at = [i for i in range(len(rows)) for _ in range(cfg.k // len(paths) + (n < cfg.k % len(paths)))]
        with autocast():
            texts, _, ids = respond(policy, tok, [rows[i]["prompt"] for i in at], cfg.max_new,
                                    temperature=cfg.temperature, generator=seeded(cfg.seed, n, device))
        for i, text, x in zip(at, texts, ids):
            if tok.eos_id in x and text.strip():
                answers_of[i][text.strip()] = None
    bias = dict(length=cfg.bias_length, confidence=cfg.bias_confidence, sycophancy=cfg.bias_sycophancy)
    pairs = []
    for row, answers in zip(rows, answers_of):
        utility = {t: world.utility(row, t, **bias) for t in answers}
        pairs += [(row, a, b, utility[a], utility[b]) for a, b in combinations(answers, 2)]
    noise = world.noise_for(cfg.agreement, [u - v for *_, u, v in pairs]) if cfg.agreement else cfg.noise
    rng, out = random.Random(cfg.seed), []
    for row, a, b, u, v in pairs:
        p = world.annotate(u, v, noise, rng)
        # the annotator's own error rate on this pair bounds what any reward model can reach
        sure = max(q := world.choice_probability(u - v, noise), 1 - q)
        a, b, p = (a, b, p) if p >= 0.5 else (b, a, 1 - p)
        out.append({"prompt": row["prompt"], "chosen": a, "rejected": b, "label": p, "ceiling": sure})
    return out


def group(rows, tok, max_len, margin=0.0):
    """Preference rows -> one element per prompt: (list of answers' ids, [(i, j, p, margin, ceiling)]), and a count of
    the rows left out because an answer does not fit into max_len tokens."""
    groups, too_long = {}, 0
    for row in rows:
        sides = [tok.render_answer(row["prompt"], row[side]) for side in ("chosen", "rejected")]
        sides = [(*x, *y) for x, y in sides]
        if max(map(len, sides)) > max_len:
            too_long += 1
            continue
        answers, pairs = groups.setdefault(str(row["prompt"]), ({}, []))
        i, j = (answers.setdefault(s, len(answers)) for s in sides)
        pairs.append((i, j, row["label"], margin * row["margin"], row.get("ceiling", 1.0)))
    return [(list(answers), pairs) for answers, pairs in groups.values()], too_long


def group_scores(model, groups, tok, device, forward=final_scores):
    """Rewards of all answers of some groups (N,), and their pairs as tensors over them: (i, j, p, margin, ceiling, w);
    w is 1 / (pairs of the prompt), the weight of a pair in the loss."""
    flat = [list(a) for answers, _ in groups for a in answers]
    ids, real = pad_batch(flat, tok.pad_id)                                           # (N, T)
    pairs, prompt, common, saved = [], [], [], 0
    for n, (answers, ps) in enumerate(groups):
        start = len(prompt)
        pairs += [(start + i, start + j, p, m, c, 1 / len(ps)) for i, j, p, m, c in ps]
        prompt += [n] * len(answers)
        # what all begin with, the prompt at least, goes through the model once; a last token is nobody else's
        common += [min(len(os.path.commonprefix(answers)), min(map(len, answers)) - 1)] * len(answers)
        saved += common[-1] * (len(answers) - 1)
    own = real & (torch.arange(ids.shape[1]) >= torch.tensor(common)[:, None])
    i, j, *rest = zip(*pairs)
    rest = [torch.tensor(x, device=device) for x in rest]
    prompt = torch.tensor(prompt, device=device) if 5 * saved > sum(map(len, flat)) else None   # worth it: a fifth
    r = forward(model, *(x.to(device) for x in (ids, real.sum(1), own)), prompt)
    return r, torch.tensor([i, j], device=device), *rest, [len(x) for x in flat]


@torch.no_grad()
def shown(model, groups, tok, device, autocast):
    """For samples.txt: the conversations of a few groups, and the reward of each as text."""
    with autocast():
        rewards = group_scores(model, groups, tok, device)[0].tolist()
    texts = [tok.decode(list(a)).strip().replace("\n\n", "\n  ") for answers, _ in groups for a in answers]
    return [[{"role": "user", "content": text}] for text in texts], [f"reward {r:.2f}" for r in rewards]


@torch.no_grad()
def evaluate(model, groups, tok, device, autocast):
    """Held-out figures {name: number} over the pairs that are not ties, and the mean reward of all answers."""
    d, p, ceiling, longer, rewards, nll = [], [], [], [], [], []
    for k in range(0, len(groups), 32):
        with autocast():
            r, (i, j), pk, mk, ck, _, lens = group_scores(model, groups[k: k + 32], tok, device)
        lens = torch.tensor(lens)
        d.append((r[i] - r[j]).cpu()), p.append(pk.cpu()), ceiling.append(ck.cpu()), rewards.append(r.cpu())
        nll.append(preference_loss(r[i], r[j], pk, mk).cpu())
        longer.append((lens[i.cpu()] - lens[j.cpu()]).float())
    d, p, ceiling, longer, nll = (torch.cat(x) for x in (d, p, ceiling, longer, nll))
    choice = p != 0.5
    right = lambda guess: ((guess * (p - 0.5) > 0).float() + 0.5 * (guess == 0))[choice].mean().item()   # noqa: E731
    out = {"loss": nll.mean().item(), "accuracy": right(d), "ceiling": ceiling[choice].mean().item(),
           "longer_wins": right(longer), "shorter_wins": right(-longer), "margin": d[choice].mean().item()}
    for name, part in (("shorter", longer < 0), ("same_length", longer == 0), ("longer", longer > 0)):
        part = part & choice
        if part.any():
            out[f"accuracy_{name}"] = ((d > 0).float() + 0.5 * (d == 0))[part].mean().item()
    # calibration: mean |stated probability - frequency| over ten bins of P(a over b), weighted by size
    stated, true = torch.cat([d.sigmoid(), (-d).sigmoid()]), torch.cat([p, 1 - p])
    bins = (stated * 10).long().clamp(max=9)
    out["calibration_error"] = sum((stated[bins == b].mean() - true[bins == b].mean()).abs().item()
                                   * (bins == b).float().mean().item() for b in bins.unique())
    out = {k: v for k, v in out.items() if v == v}   # where all pairs are ties, nothing can be said of choices
    return out, torch.cat(rewards).mean().item()


def pairs_to_vote_on(paths, rows, cfg, device, autocast):
    """One prompt with two different, finished answers of the policies at `paths` at a time: (prompt, text, text)."""
    policies = [load(path, device, scalar_head=False) for path in paths]
    for prompt in (row["prompt"] for row in rows):
        rng, answers = random.Random(f"{cfg.seed} {prompt}"), {}
        for n, (policy, tok) in enumerate(policies):
            many = [prompt] * (cfg.k // len(paths) + (n < cfg.k % len(paths)))
            if len(tok.render(prompt, generation_prompt=True)[0]) + cfg.max_new > policy.cfg.max_len:
                continue
            with autocast():
                texts, _, ids = respond(policy, tok, many, cfg.max_new, temperature=cfg.temperature,
                                        generator=seeded(rng.getrandbits(32), 0, device))
            answers |= {t.strip(): None for t, x in zip(texts, ids) if tok.eos_id in x and t.strip()}
        if len(answers) > 1:
            yield prompt, *rng.sample(list(answers), 2)


def vote(cfg, init, device, autocast):
    """A person compares answers in the terminal. Each vote is on the disk before the next question is asked, and the
    next session leaves out the prompts voted on, so that Ctrl-C or a lost connection costs nothing."""
    path = Path(cfg.votes or Path(cfg.out) / "votes.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as f:
        if f.tell() and (f.seek(-1, 2), f.read())[1] != b"\n":
            f.write(b"\n")   # a line that a power cut left half written shall not swallow the next vote
    votes = formats.load(path, "preference")[0] if path.stat().st_size else []
    rm, tok = load(cfg.out, device) if (Path(cfg.out) / "config.json").exists() else (None, None)
    if rm and not rm.cfg.scalar_head:
        raise InputError(f"{cfg.out} is a language model; --vote asks the reward model in --out")
    rows = formats.load(cfg.data or world.TINY / "preference.jsonl", "prompt")[0]
    seen = [v["prompt"] for v in votes]
    rows = [r for r in random.Random(cfg.seed).sample(rows, len(rows)) if r["prompt"] not in seen]
    pairs, again = pairs_to_vote_on((cfg.policy or init).split(","), rows, cfg, device, autocast), []
    try:
        while pair := again.pop() if again else next(pairs, None):
            prompt, *answers = pair
            print("\n" + "\n".join(f"{m['role']}: {m['content']}" for m in prompt), *answers, sep="\n\n    ")
            key = ""
            while key not in ("1", "2", "t", "s", "u", "q"):
                key = input(f"\n[{len(votes)} votes] 1 (upper), 2 (lower), t(ie), s(kip), u(ndo), q(uit)> ").strip()[:1]
            if key == "q":
                break
            if key == "s":
                continue
            if key == "u":
                again += [pair]
                if votes:   # take back the last vote, also one of an earlier session, and ask again
                    write_atomic(path, b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
                    last = votes.pop()
                    again += [(last["prompt"], *sorted((last["chosen"], last["rejected"])))]
                continue
            chosen, rejected = answers[::-1] if key == "2" else answers
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": 0.5 if key == "t" else 1.0}
            with open(path, "ab") as f:
                f.write(json.dumps(row).encode() + b"\n")
                f.flush()
                os.fsync(f.fileno())
            votes.append(row)
            groups = group([row | {"margin": 0.0}], tok, rm.cfg.max_len)[0] if rm else []
            if groups:   # P(chosen over rejected) = sigmoid(r_chosen - r_rejected), Bradley & Terry
                with torch.no_grad(), autocast():
                    r = group_scores(rm, groups, tok, device)[0]
                print(f"\n    {r[0]:+.2f} {chosen}\n    {r[1]:+.2f} {rejected}\n    reward model: P(chosen) = "
                      f"{(r[0] - r[1]).sigmoid():.2f}" + (", and you called it a tie" if key == "t" else ""))
    except (EOFError, KeyboardInterrupt):
        print()
    print(f"{len(votes)} votes in {path}; to learn from them: "
          f"python reward.py --init {cfg.out if rm else init} --data {path} --out {sibling(cfg, 'mine')}")


def main(cfg):
    """Make the comparisons unless there are some, and train a reward model on them; or --vote."""
    device, autocast = setup(cfg)
    if cfg.k < 2:
        raise InputError(f"--k {cfg.k}: a comparison needs at least 2 answers")
    init = cfg.init or sibling(cfg, "sft")
    if not cfg.init:
        need(init, "sft.py", cfg)
    if cfg.vote:
        if not cfg.init:
            need(cfg.out, "reward.py", cfg)
        return vote(cfg, init, device, autocast)
    path = cfg.data or Path(cfg.out) / "comparisons.jsonl"
    if not cfg.data and not (cfg.resume and path.exists()):
        start, rows = time.time(), world.rows("preference")
        rows = random.Random(cfg.seed).sample(rows, min(cfg.prompts, len(rows)))
        rows = label((cfg.policy or init).split(","), rows, cfg, device, autocast)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        world.write_jsonl(path, rows)
        meet()   # of several processes the first one writes
        print(f"sampled {cfg.k} answers to each of {cfg.prompts} prompts, compared them: {len(rows)} pairs in {path} "
              f"({time.time() - start:.0f} s)")
    torch.manual_seed(cfg.seed)   # a new head is drawn alike whether comparisons were made just now or found there
    model, tok = load(init, home(cfg, device), scalar_head=True)
    model.cfg.reward_mean = 0.0   # a reward model to go on from has one; it is measured anew at every save
    rows, dropped = formats.load(path, "preference")
    print(formats.describe(rows, dropped, path))
    train, held = formats.split(rows, cfg.held_out, seed=0)
    if cfg.add:
        train += formats.split(formats.load(cfg.add, "preference")[0], cfg.held_out, seed=0)[0]
    max_len = min(cfg.max_len, model.cfg.max_len)
    (train, cut), (held, held_cut) = (group(part, tok, max_len, cfg.margin) for part in (train, held))
    print(f"{len(train)} prompts to train on, {len(held)} held out; "
          f"{cut + held_cut} pairs longer than {max_len} tokens left out")
    if not train or not held:
        raise InputError(f"{path}: needs comparisons of two prompts or more within --max_len {max_len} tokens, one of "
                         f"them in the {cfg.held_out:.0%} held out (--held_out)")

    state = load_state(cfg.out) if cfg.resume else {}
    if state:
        model.load_state_dict(state["model"])
    model = for_training(model, cfg, device)
    optimizer, first = optimizer_for(model, cfg.lr, cfg.weight_decay), state.get("step", 0)
    if state:
        load_optimizer(optimizer, state["optimizer"])
    forward = torch.compile(final_scores) if cfg.compile else final_scores
    lengths = [max(map(len, answers)) for answers, _ in train]
    plan = [b for epoch in range(cfg.epochs) for b in batches(lengths, cfg.batch_size, cfg.seed, epoch)]
    n_steps = min(len(plan), cfg.max_steps or len(plan))
    log = Run(cfg, "reward", n_steps, first)
    if first:
        before, after, mean = state["before"], state["after"], load(cfg.out)[0].cfg.reward_mean
    else:
        before, mean = evaluate(model, held, tok, device, autocast)
        after = dict(before)
        log.samples("before", *shown(model, held[:5], tok, device, autocast))
    for step in range(first, n_steps):
        start = time.time()
        groups = sorted((train[i] for i in plan[step]), key=lambda g: len(g[0][0]))
        total, right, n_tokens = *torch.zeros(2, device=device), 0
        for part, real in pieces(groups, cfg.micro_batch):
            with autocast():
                r, (i, j), p, margin, _, w, lens = group_scores(model, part, tok, device, forward)
            w = real * w / len(groups)
            loss = (w * preference_loss(r[i], r[j], p, margin, cfg.center)).sum()
            loss.backward()
            total += loss.detach()
            right += (w * ((r[i] > r[j]).float() + 0.5 * (r[i] == r[j]))).sum()
            n_tokens += real * sum(lens)
        lr = cfg.lr * cosine(step, len(plan), cfg.warmup)
        norm = log.update(step, model, optimizer, lr, {"rows": plan[step], "groups": groups})
        log.step(step, loss=summed(total.item()), accuracy=summed(right.item()), grad_norm=norm,
                 tok_s=summed(n_tokens) / (time.time() - start))
        if log.save_now(step):
            after, mean = evaluate(model, held, tok, device, autocast)
            model.cfg.reward_mean = mean
            save(cfg.out, model, tok, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                       "step": step + 1, "before": before, "after": after})
            model.cfg.reward_mean = 0.0
            log.saved(step)
    log.samples("after", *shown(model, held[:5], tok, device, autocast))
    log.finish(device, before, after | {"reward_mean": mean}, [("loss",), ("accuracy",), ("grad_norm",)])


if __name__ == "__main__":
    run(main, Config, __doc__)
