"""Constitutional AI: a model made harmless by its own critiques and by AI feedback, without a human label of harm.

    python cai.py                                  the tiny world; makes the base and a helpful-only model if missing
    python cai.py --init out/ppo --out out/safe    safety fine-tuning of a model that is aligned already
    python cai.py --critic http://localhost:8000/v1 ...                    a server as critic (vLLM, llama.cpp)
    python cai.py --critic MODEL --critic_test pairs.jsonl                 only measure how well a critic chooses
    python cai.py --init MODEL --data red_team.jsonl --helpful prompts.jsonl --human helpful_pairs.jsonl \\
        --constitution CritiqueRevisionInstructions.json,RLMadisonInstructions.json \\
        --few_shots CritiqueRevisionFewShotPrompts.json --sft_flags "--lr 1e-5" --rl_flags "--lr 1e-6"

Stage 1, SL-CAI (Bai et al. 2022, arXiv:2212.08073, section 3). The model answers a red-team prompt; `critiques` times a
principle is drawn with replacement, the critic is shown
    prompt + response + "CritiqueRequest: .. Critique:"            and samples a critique, then
    prompt + response + critique + "RevisionRequest: .. Revision:"  and samples a revision, which replaces the response.
Of --candidates tries the critic keeps the one whose revision it prefers to the response, asked as in stage 2 (with
--candidates 1 it is the paper's; a small critic tells a better answer more reliably than it writes one).
sft.py then trains the model on the revisions, and on its own answers to harmless prompts, so that it stays helpful.

Stage 2, RLAIF (section 4; arXiv:2309.00267). The stage-1 model answers every red-team prompt k times. For two answers
and one principle, the critic is asked "Options: (A) .. (B) .. The answer is:", and
    p(a over b) = ( s(l_A - l_B) + s(l'_B - l'_A) ) / 2,    s = sigmoid, l_A = log p_critic(" (A)"), l' after a swap,
is the label (the paper asks once; small critics love one letter: averaging both orders removes that). reward.py learns
from these soft labels, and from human comparisons of answers to the other prompts; ppo.py or dpo.py does the rest.
--cot lets the critic think aloud first; its labels are then too sure, hence --clamp 0.4: p within [0.4, 0.6].

Stages 1 and 2 make a round; with --rounds 2 the aligned model is the next generator and, without --critic, the critic.
Left out: red-team prompts written by a model; several principles per label; chat-only endpoints; other critic formats.
Expect on the tiny world (seeds 0, 1, 2): of the harmful test requests 0 are refused at the start, 0.80 to 1.00 after
stage 1, 0.94 to 0.98 after stage 2. The critic knows refusing from helping (right in 0.95 to 1.00 of such pairs), but
not which safe alternative a refusal should offer (0.38 to 0.56), so the gold score of refusals stays near 0.55. A
critic that cannot tell better from worse (see --critic_test) teaches nothing, whatever the losses say.
"""
import hashlib
import json
import math
import random
import re
import shlex
import subprocess
import sys
import typing
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from data import InputError, formats, world
from data.endpoint import Kept, connect, cut
from data.principles import constitution, examples, read_json
from model import (WORLD, Run, distinct_2, generate, load, need, pad_batch, respond, run, save, seeded, setup, sibling,
                   write_atomic)


@dataclass
class Config:
    """The flags of `python cai.py`."""
    init: str = ""                # the model to make harmless (default: helpful beside --out, a helpful-only model)
    critic: str = ""              # who critiques, revises and chooses: a model or http://HOST/v1 (default: base beside
                                  # --out in round 1 of the tiny world, else the model itself, in its present state)
    critic_model: str = ""        # name of the model to ask a server for (default: the first it lists)
    constitution: str = ""        # principles: FILE or FILE,FILE, ours or Anthropic's (default: data/constitution.json)
    about: str = "harmless"       # use principles about this; those that say nothing of the kind are always used
    few_shots: str = ""           # examples to show the critic first: FILE or FILE,FILE in Anthropic's formats
    data: str = ""                # red-team prompts (default: the tiny world's)
    helpful: str = ""             # harmless prompts, on whose answers the model should not change (default likewise)
    human: str = ""               # human comparisons of helpfulness for the reward model (default likewise, simulated)
    out: str = "out/cai"          # folder for the final model, all rounds, log, samples and plot
    rounds: int = 1               # of stage 1 + stage 2
    critiques: int = 2            # critiques and revisions of a response
    candidates: int = 4           # tries of each, of which the critic keeps the one whose revision it prefers most to
                                  # the response (1: the paper; a small critic chooses better than it writes)
    revisions: typing.Literal["all", "last"] = "all"   # which of them stage 1 trains on
    labels: typing.Literal["ai", "human"] = "ai"   # who compares in stage 2; human: the tiny world's annotator (RLHF)
    rl: typing.Literal["ppo", "dpo"] = "ppo"       # how stage 2 uses the comparisons
    cot: bool = False             # the critic thinks step by step before it chooses
    clamp: float = 0.0            # labels are kept within [clamp, 1 - clamp] (0.4 with --cot in the paper)
    prompts: int = 800            # red-team prompts a stage
    helpful_prompts: int = 1600   # harmless prompts a stage
    k: int = 4                    # answers per prompt in stage 2; all pairs of different ones are compared
    max_new: int = 32             # longest response and revision, in tokens
    max_critique: int = 32        # longest critique or chain of thought, in tokens
    temperature: float = 1.0      # of the model's answers
    critic_temperature: float = 0.4   # of critiques, revisions and thoughts (1 in the paper; a small critic rambles)
    noise: float = 0.05           # of the tiny world's annotator (see reward.py)
    against: str = ""             # a model to compare the final one with, answer by answer, by the gold judge
    chains_only: bool = False     # stop after the first chains, to read them before anything is trained
    critic_test: str = ""         # only measure the critic on these comparisons, then stop
    sft_flags: str = ""           # more flags for sft.py, such as "--lr 1e-5 --epochs 1"
    reward_flags: str = ""        # more flags for reward.py
    rl_flags: str = ""            # more flags for ppo.py or dpo.py
    parallel: int = 8             # requests at a time to a server
    timeout: float = 60.0         # seconds to wait for a server's answer
    retries: int = 5              # further attempts at a request that failed, after 1, 2, 4, ... seconds
    nproc_per_node: int = 1       # processes for every training script, as torchrun would start them, one on each GPU
    max_steps: int = 0            # stop every training run after this many steps (0: run all)
    resume: bool = False          # keep what an earlier run finished in --out
    seed: int = 0                 # every random draw comes from (seed, round, place)
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; weights stay fp32
    compile: bool = False         # torch.compile in the training scripts


# ---------------------------------------------------------------------------------------------------------------------
# The constitution and the prompts, character for character as in Anthropic's published files.

MARKERS = re.compile(r"(Human|Assistant|Critique|Revision|CritiqueRequest|RevisionRequest):")   # no revision


def transcript(messages):
    """Messages as "\\n\\nHuman: ..\\n\\nAssistant: ..", the format of the critic's prompts and of hh-rlhf."""
    start = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    return "".join(start[m["role"]] + m["content"] for m in messages)


def critique_prompt(conversation, response, principle):
    """What a critique is sampled from; conversation ends in "\\n\\nAssistant:", texts keep their leading space."""
    return conversation + response + principle["critique"]


def revision_prompt(conversation, response, critique, principle):
    """What a revision is sampled from."""
    return critique_prompt(conversation, response, principle) + critique + principle["revision"]


def comparison_prompt(conversation, principle, a, b):
    """The multiple-choice question about answers a and b; its continuation is " (A)" or " (B)"."""
    p = principle
    return (f"{p['head']}Consider the following conversation between a human and an assistant:{conversation}\n\n"
            f"{p['choice']}\n (A) {p['left']}{a}{p['right']}\n (B) {p['left']}{b}{p['right']}\n\nThe answer is:")


def thinking_prompt(conversation, principle, a, b):
    """The same with a chain of thought, as a chat between H and A inside a chat (arXiv:2212.08073, appendix E)."""
    inner = conversation.replace("\n\nHuman:", "\n\nH:").replace("\n\nAssistant:", "\n\nA:")
    return ("\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):"
            f"{inner}\n\n{principle['choice'].strip()}\n (A) [[[{a}]]]\n (B) [[[{b}]]]"
            "\n\nAssistant: Let's think step by step:")


AFTER_THINKING = "\n\nHuman:\nSo the answer is:"   # what its thoughts are followed by, before " (A)" or " (B)"


def few_shots(examples, principles):
    """{"critique", "choice", "thinking"}: the text to put before prompts of each kind. Comparisons are shown with the
    principles in turn, the better answer first in every other one."""
    shown = []
    for i, (talk, better, worse) in enumerate(examples["choice"]):
        pair, letter = ((worse, better), " (B)") if i % 2 else ((better, worse), " (A)")
        shown.append(comparison_prompt(talk, principles[i % len(principles)], *pair) + letter)
    thoughts = [text.replace("{}", principles[i % len(principles)]["choice"].strip())
                for i, text in enumerate(examples["thinking"])]
    return {"critique": "".join(examples["critique"]), "choice": "".join(shown), "thinking": "".join(thoughts)}


# ---------------------------------------------------------------------------------------------------------------------
# The critic. A request is {"prompt", "max_tokens", "temperature", "seed"} and answered by {"text", "ended"}, or it is
# {"prompt", "options": [" (A)", " (B)"]} and answered by {"logp": [l_A, l_B]}; {"refused": why} answers either.


def local_critic(path, device, autocast):
    """(name, ask) of a checkpoint; ask(requests of one kind) -> answers."""
    model, tok = load(path, device, scalar_head=False)
    model.eval()
    start = [i for i in (tok.bos_id, tok.special.get("<|endoftext|>")) if i is not None][:1]   # of a document
    weights = model.ln_f.weight.detach().cpu().numpy().tobytes() + model.wte.weight[:8].detach().cpu().numpy().tobytes()
    name = f"{path} {hashlib.sha256(weights).hexdigest()[:16]}"   # another training run is another critic

    def ask(requests):
        first, rows = requests[0], [start + tok.encode(r["prompt"]) for r in requests]
        room = model.cfg.max_len - first.get("max_tokens", 4)   # an option takes 3 or 4
        out = [{"refused": "prompt longer than the context"} if len(row) > room else None for row in rows]
        at = [i for i, answer in enumerate(out) if answer is None]
        with torch.no_grad(), autocast():
            if "options" in first:
                for some in (at[i: i + 16] for i in range(0, len(at), 16)):   # few at a time: prompts may be long
                    for i, logp in zip(some, option_logprobs(model, tok, [rows[i] for i in some], first["options"])):
                        out[i] = {"logp": logp}
            elif at:
                ids, mask, _ = generate(model, [rows[i] for i in at], first["max_tokens"], tok.eos_id, tok.pad_id,
                                        first["temperature"], generator=seeded(first["seed"], 0, device))
                for i, x, m in zip(at, ids.cpu(), mask.cpu()):
                    new = x[m].tolist()
                    end = next((n for n, t in enumerate(new) if t in tok.eos_ids or t in start), None)
                    out[i] = cut(tok.decode(new[:end]), end is not None)
        return out
    return name, ask


def option_logprobs(model, tok, rows, options):
    """log p(option | row) for every row of ids and each of two options, [[l_A, l_B], ..], in one forward pass: options
    are read up to the first token in which they differ (" (A)" and " (B)": without the closing bracket)."""
    a, b = (tok.encode(o) for o in options)
    n = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)                       # tokens they share
    ids, mask = pad_batch([row + a[:n] for row in rows], tok.pad_id, model.wte.weight.device)   # (B, T)
    last = mask.sum(1) - 1                                                            # (B,)
    hidden = model(ids)                                                               # (B, T, C)
    at = last[:, None] - torch.arange(n, -1, -1, device=ids.device)                   # (B, n + 1)
    logp = model.logits(hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))).float().log_softmax(-1)
    shared = sum((logp[:, i, a[i]] for i in range(n)), torch.zeros_like(logp[:, 0, 0]))          # (B,)
    return torch.stack([shared + logp[:, n, a[n]], shared + logp[:, n, b[n]]], 1).tolist()


def make_critic(path, cfg, device, autocast):
    """The critic at a path or address: critic(requests) -> answers, kept in out/answers.jsonl; critic.counts."""
    file, counts = Path(cfg.out) / "answers.jsonl", Counter()
    if path.startswith(("http://", "https://")):
        connection = connect(path, cfg.critic_model, cfg.timeout, cfg.retries, cfg.parallel, counts)
        return Kept(*connection, file, cfg.parallel, counts)
    return Kept(*local_critic(path, device, autocast), file, 64, counts)


def samples(texts, max_tokens, temperature, where, shots=""):
    """Requests to continue texts, each with a seed of its own that depends on where in the run it is."""
    at = int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:5], "big")
    return [{"prompt": shots + text, "max_tokens": max_tokens, "temperature": temperature, "seed": at + i}
            for i, text in enumerate(texts)]


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: chains of critiques and revisions.


def fault(answer, response):
    """What is wrong with a revision (an answer) of a response: "", or one of refused, cut, leaked, empty, copied."""
    if answer is None or "refused" in answer:
        return "refused"
    if not answer["text"].strip():
        return "empty"
    if MARKERS.search(answer["text"]):
        return "leaked"
    if not answer["ended"]:
        return "cut"
    return "copied" if answer["text"].strip() == response.strip() else ""


def speak(path, rows, cfg, seed, device, autocast):
    """[(text, whether it ended)]: what the model at `path` answers to prompt rows."""
    model, tok = load(path, device, scalar_head=False)
    with autocast():
        texts, _, ids = respond(model, tok, [r["prompt"] for r in rows], cfg.max_new, temperature=cfg.temperature,
                                generator=seeded(seed, 0, device))
    return [(text.strip(), tok.eos_id in x) for text, x in zip(texts, ids)]


def make_chains(prompts, responses, principles, choices, critic, cfg, seed, shots):
    """Chains {"prompt": messages, "initial": str, "chain": [{"principle", "critique", "revision", "fault"}]} of
    `cfg.critiques` steps. A revision replaces the response unless it is refused, cut, leaked or empty. Each step is the
    best of `cfg.candidates` tries, with a principle each, by the critic's own p(revision over response) under one of
    `choices`, and the response stays if it prefers that to all of them (a fault: worse)."""
    rng = random.Random(f"{seed} principles")
    chains = [{"prompt": p, "initial": r, "chain": []} for p, r in zip(prompts, responses)]
    now = list(responses)
    for step in range(cfg.critiques):
        talks, tries = [transcript(c["prompt"]) + "\n\nAssistant:" for c in chains], []
        for n in range(cfg.candidates):
            drawn, at = [rng.choice(principles) for _ in chains], (seed, step, n)
            asks = [critique_prompt(t, r, p) for t, r, p in zip(talks, now, drawn)]
            critiques = critic(samples(asks, cfg.max_critique, cfg.critic_temperature, (at, "critique"),
                                       shots["critique"]))
            texts = [(c or {}).get("text", "") for c in critiques]
            asks = [revision_prompt(t, r, c, p) for t, r, c, p in zip(talks, now, texts, drawn)]
            revisions = critic(samples(asks, cfg.max_new, cfg.critic_temperature, (at, "revision"), shots["critique"]))
            tries.append([{"principle": p["key"], "critique": c, "revision": (r or {}).get("text", ""),
                           "fault": fault(r, before)} for p, c, r, before in zip(drawn, texts, revisions, now)])
        if cfg.candidates > 1:
            flat = [(chain["prompt"], x, before) for some in tries for chain, x, before in zip(chains, some, now)]
            pairs = [(prompt, x["revision"].strip(), before.strip()) for prompt, x, before in flat]
            for (_, x, _), told in zip(flat, compare(pairs, choices, critic, cfg, f"{seed} {step}", shots)):
                x["p"] = told["p"] if told else 0.0
                x["fault"] = x["fault"] or ("worse" if x["p"] < 0.5 else "")
        for i, steps in enumerate(zip(*tries)):
            best = max(steps, key=lambda x: (x["fault"] in ("", "copied"), x.get("p", 0.0)))   # the first, if several
            chains[i]["chain"].append(best)
            if best["fault"] in ("", "copied"):
                now[i] = best["revision"]
    return chains


def training_rows(chains, which):
    """Conversations for sft.py: prompt and revision, for every usable revision of a chain or for its last one."""
    out = []
    for c in chains:
        good = [s["revision"].strip() for s in c["chain"] if s["fault"] in ("", "copied")]
        out += [{"messages": c["prompt"] + [{"role": "assistant", "content": text}]}
                for text in (good if which == "all" else good[-1:])]
    return out


def count_faults(chains):
    """{"revisions": how many there are in the chains, "good": n, "copied": n, ..}."""
    found = [s["fault"] or "good" for c in chains for s in c["chain"]]
    kinds = ("good", "copied", "worse", "empty", "leaked", "cut", "refused")
    return {"revisions": len(found)} | {k: found.count(k) for k in kinds}


def rounds_curve(chains, rows):
    """{"refused_0": share of initial responses that refuse, "gold_0": their gold, "refused_1": the same after one
    revision, ..}: figure 5 of the paper, with the tiny world's judge."""
    row_of, out = {str(r["prompt"]): r for r in rows}, {}
    now = [c["initial"] for c in chains]
    for i in range(1 + len(chains[0]["chain"])):
        if i:
            steps = [c["chain"][i - 1] for c in chains]
            now = [s["revision"] if s["fault"] in ("", "copied") else text for s, text in zip(steps, now)]
        scores = [world.judge(row_of[str(c["prompt"])], text) for c, text in zip(chains, now)]
        out[f"refused_{i}"] = sum(s["harmless"] > 0 for s in scores) / len(scores)
        out[f"gold_{i}"] = sum(s["gold"] for s in scores) / len(scores)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: comparisons by the critic.


def soft_label(logp, swapped, clamp=0.0):
    """P(a over b) from [l_A, l_B] with a as option (A), and `swapped` with b as (A): the equation at the top. Each
    order is first kept within [clamp, 1 - clamp] (arXiv:2212.08073, section 4.1, for chains of thought)."""
    orders = [1 / (1 + math.exp(min(50.0, max(-50.0, y - x)))) for x, y in (logp, swapped[::-1])]
    orders = [min(1 - clamp, max(clamp, p)) if clamp else p for p in orders]
    return sum(orders) / 2, orders


def compare(pairs, principles, critic, cfg, seed, shots):
    """Labels of pairs [(messages, a, b)]: {"p", "orders", "mass", "principle"} each, or None where there is no answer.
    mass: what the two options have of the critic's probability; next to nothing means it answered something else."""
    rng, asks, keys = random.Random(f"{seed} choices"), [], []
    for messages, a, b in pairs:
        principle = rng.choice(principles)
        build = thinking_prompt if cfg.cot else comparison_prompt
        asks += [build(transcript(messages), principle, *order) for order in ((a, b), (b, a))]
        keys.append(principle["key"])
    asks = [shots["thinking" if cfg.cot else "choice"] + text for text in asks]
    if cfg.cot:
        thoughts = critic(samples(asks, cfg.max_critique, cfg.critic_temperature, (seed, "thoughts")))
        asks = [text + (t or {}).get("text", "") + AFTER_THINKING for text, t in zip(asks, thoughts)]
    answers = critic([{"prompt": text, "options": [" (A)", " (B)"]} for text in asks])
    out = []
    for key, one, two in zip(keys, answers[::2], answers[1::2]):
        if not all(x and "logp" in x for x in (one, two)):
            out.append(None)
            continue
        p, orders = soft_label(one["logp"], two["logp"], cfg.clamp)
        mass = sum(math.exp(v) for x in (one, two) for v in x["logp"]) / 2
        out.append({"p": p, "orders": orders, "mass": mass, "principle": key})
    return out


def bias(labels, pairs):
    """How a critic chooses, whatever is right: figures over labels that are not None."""
    kept = [(x, *pair[1:]) for x, pair in zip(labels, pairs) if x is not None]
    n = max(1, len(kept))
    longer = [x["p"] if len(a) > len(b) else 1 - x["p"] for x, a, b in kept if len(a) != len(b)]
    return {"compared": len(kept), "no_answer": len(labels) - len(kept),
            "neither": sum(x["mass"] < 0.01 for x, *_ in kept), "mass": sum(x["mass"] for x, *_ in kept) / n,
            "first_wins": sum(x["orders"][0] + 1 - x["orders"][1] for x, *_ in kept) / 2 / n,
            "longer_wins": sum(longer) / max(1, len(longer))}


def sample_pairs(path, rows, cfg, seed, device, autocast):
    """k answers per row from the model at `path`: all pairs of different, finished ones, [(row, a, b)]."""
    answers = [{} for _ in rows]
    at = [i for i in range(len(rows)) for _ in range(cfg.k)]
    for i, (text, ended) in zip(at, speak(path, [rows[i] for i in at], cfg, seed, device, autocast)):
        if ended and text:
            answers[i][text] = None
    return [(row, a, b) for row, found in zip(rows, answers) for a, b in combinations(found, 2)]


def preference_row(row, a, b, p, **more):
    """A comparison as reward.py and dpo.py read it, of which a share p prefers a."""
    a, b, p = (a, b, p) if p >= 0.5 else (b, a, 1 - p)
    return {"prompt": row["prompt"], "chosen": a, "rejected": b, "label": p} | more


def human_row(row, a, b, noise, rng):
    """The same by the tiny world's annotator."""
    p = world.annotate(world.utility(row, a), world.utility(row, b), noise, rng)
    return preference_row(row, a, b, p, by="human")


def agreement(pairs, labels, rng, noise):
    """Share of pairs on which two judges agree, for AI labels (p of a over b), the simulated human and gold, over the
    pairs in which gold sees a difference. Only the tiny world knows gold."""
    hits = {"ai_gold": [], "human_gold": [], "ai_human": []}
    for (row, a, b), x in zip(pairs, labels):
        u, v = world.utility(row, a), world.utility(row, b)
        if x is not None and abs(u - v) > 1e-6:
            human = world.annotate(u, v, noise, rng) > 0.5
            for name, one, two in (("ai_gold", x["p"] > 0.5, u > v), ("human_gold", human, u > v),
                                   ("ai_human", x["p"] > 0.5, human)):
                hits[name].append(one == two)
    return {"differing_pairs": len(hits["ai_gold"])} | {k: sum(v) / len(v) for k, v in hits.items() if v}


# ---------------------------------------------------------------------------------------------------------------------


def stage(cfg, script, out, *flags):
    """Run another script's command line, unless --resume finds it finished. Returns the folder of what it made."""
    out = str(out)
    if cfg.resume and (Path(out) / "result.json").exists():
        return out
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cfg.nproc_per_node}"]
    command = [sys.executable, *(torchrun if cfg.nproc_per_node > 1 else []), str(Path(__file__).parent / script),
               "--out", out, "--seed", str(cfg.seed), "--dtype", cfg.dtype, *map(str, flags)]
    command += ["--device", cfg.device] if cfg.device else []
    command += [f"--{name}" for name in ("resume", "compile") if getattr(cfg, name)]
    command += ["--max_steps", str(cfg.max_steps)] if cfg.max_steps else []
    print(f"running {' '.join(command[1:])}", flush=True)
    if subprocess.run(command).returncode:
        raise InputError(f"{script} failed, so there is no {out}")
    return out


def test_critic(cfg, critic, choose, shots):
    """--critic_test: accuracy on comparisons in each order and averaged, beside two baselines; also into --out."""
    rows, dropped = formats.load(cfg.critic_test, "preference")
    print(formats.describe(rows, dropped, cfg.critic_test))
    rows = [r for r in rows if r["label"] != 0.5]
    pairs = [(r["prompt"], r["chosen"], r["rejected"]) for r in rows]
    labels = compare(pairs, choose, critic, cfg, cfg.seed, shots)
    kept = [(x, len(a) > len(b)) for x, (_, a, b) in zip(labels, pairs) if x is not None]
    out = {f"{name}{i}": value for name, right in (
        ("right answer as (A)", [x["orders"][0] > 0.5 for x, _ in kept]),
        ("right answer as (B)", [x["orders"][1] > 0.5 for x, _ in kept]),
        ("both orders averaged", [x["p"] > 0.5 for x, _ in kept]), ("longer answer", [longer for _, longer in kept]))
        for i, value in (("", sum(right) / max(1, len(kept))),
                         (", standard error", (sum(right) * (len(kept) - sum(right)) / max(1, len(kept)) ** 3) ** 0.5))}
    out |= bias(labels, pairs)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    write_atomic(Path(cfg.out) / "critic.json", json.dumps(out | {"critic": critic.name}, indent=1).encode())
    print("\n".join(f"{name:38} {value:.4g}" for name, value in out.items()))


def main(cfg):
    """Stage 1 and stage 2, as often as --rounds says; or --critic_test."""
    if WORLD > 1:
        raise InputError("cai.py runs the other scripts: start it as one process, with --nproc_per_node N for several")
    device, autocast = setup(cfg)
    if cfg.k < 2 or cfg.clamp > 0.5:
        raise InputError(f"--k {cfg.k} must be at least 2 and --clamp {cfg.clamp} at most 0.5")
    if cfg.data and not cfg.init:
        raise InputError("--data brings red-team prompts of your own: name the model to make harmless with --init")
    if cfg.data and cfg.labels == "human":
        raise InputError("--labels human asks the tiny world's annotator, who knows nothing of your --data")
    revise, choose = constitution(cfg.constitution or str(world.HERE / "constitution.json"), cfg.about)
    if not choose or not (revise or cfg.critic_test):
        raise InputError(f"--constitution: {len(revise)} principles for revisions and {len(choose)} for choices "
                         f"(--about {cfg.about}); both need at least one")
    shots = few_shots(examples(cfg.few_shots), choose)
    if cfg.critic_test:
        critic = make_critic(cfg.critic or sibling(cfg, "base"), cfg, device, autocast)
        return test_critic(cfg, critic, choose, shots)
    # ---- the model to start from, and the prompts
    out, graded = Path(cfg.out), not cfg.data   # the tiny world knows the gold score: it is reported, never trained on
    out.mkdir(parents=True, exist_ok=True)
    if graded and not (cfg.init and cfg.critic):
        need(sibling(cfg, "base"), "model.py", cfg)
    model = cfg.init or sibling(cfg, "helpful")
    if not cfg.init and not (Path(model) / "result.json").exists():
        demos = out / "helpful_demos.jsonl"
        world.write_jsonl(demos, world.helpful_only(3000, 0))
        stage(cfg, "sft.py", model, "--init", sibling(cfg, "base"), "--data", demos)
    asked = world.rows("preference")
    red = formats.load(cfg.data, "prompt")[0] if cfg.data else [r for r in asked if r["family"] == "harmless"]
    helpful = [r for r in asked if r["family"] != "harmless"] if graded else []
    helpful = formats.load(cfg.helpful, "prompt")[0] if cfg.helpful else helpful
    if not helpful:
        print("no --helpful prompts: nothing keeps the model from refusing everything")
    tests = world.rows("test") if graded else red[:32]

    def measure(path):
        """What the model at path says to the test prompts: figures and texts."""
        said = speak(path, tests, cfg, cfg.seed, device, autocast)
        texts, words = [text for text, _ in said], [text.split() for text, _ in said]
        result = {"words": sum(map(len, words)) / len(words), "eos_rate": sum(ended for _, ended in said) / len(said),
                  "distinct_2": distinct_2(words)}
        if graded:   # harmless is gold: a refusal without the right alternative is worth half. harmless_rate: refusals
            refused = [world.judge(r, t)["harmless"] > 0 for r, t in zip(tests, texts) if r["family"] == "harmless"]
            result |= world.report(tests, texts) | {"harmless_rate": sum(refused) / len(refused)}
        return result, texts

    log = Run(cfg, "cai", 1 + 2 * cfg.rounds)
    before, texts = measure(model)
    columns, probes = {"start": before}, [r["prompt"] for r in tests[:12]]
    log.step(0, **before)
    log.samples("start", probes, texts[:12])

    for n in range(1, cfg.rounds + 1):
        folder, seed = out / f"round{n}", cfg.seed * 1000 + n
        folder.mkdir(exist_ok=True)
        draw = lambda rows, n, what: random.Random(f"{seed} {what}").sample(rows, min(n, len(rows)))   # noqa: E731
        judge = cfg.critic or (sibling(cfg, "base") if graded and n == 1 else model)
        print(f"round {n}: generator {model}, critic {judge}", flush=True)
        # ---- stage 1: critiques and revisions, then SFT on them and on the model's own answers to harmless prompts
        chains_file, rows_file = folder / "chains.jsonl", folder / "stage1.jsonl"
        if not (cfg.resume and rows_file.exists()):
            some = draw(red, cfg.prompts, "red 1")
            others = 2 * draw(helpful, cfg.helpful_prompts, "helpful 1")   # answered twice, as in the paper
            said = speak(model, some + others, cfg, seed, device, autocast)
            chains = make_chains([r["prompt"] for r in some], [" " + text for text, _ in said[: len(some)]], revise,
                                 choose, make_critic(judge, cfg, device, autocast), cfg, seed, shots)
            world.write_jsonl(chains_file, chains)
            world.write_jsonl(rows_file, training_rows(chains, cfg.revisions) + [
                {"messages": r["prompt"] + [{"role": "assistant", "content": text}]}
                for r, (text, ended) in zip(others, said[len(some):]) if ended and text])
        counts = count_faults(chains := world.read_jsonl(chains_file))
        print(f"{chains_file}: {len(chains)} chains, " + ", ".join(f"{k} {v}" for k, v in counts.items()), flush=True)
        if cfg.chains_only:
            return
        sl = stage(cfg, "sft.py", folder / "sl", "--init", model, "--data", rows_file, "--epochs", 2,
                   *shlex.split(cfg.sft_flags))
        columns[f"{n}: SL"], texts = measure(sl)
        log.samples(f"round {n}, stage 1", probes, texts[:12])
        log.step(2 * n - 1, **columns[f"{n}: SL"], **{f"revisions_{k}": v for k, v in counts.items()},
                 **(rounds_curve(chains, red) if graded else {}))
        log.saved(2 * n - 1)
        # ---- stage 2: comparisons by the critic (red team) and by people (the rest), reward model, RL
        pairs_file, told_file = folder / "comparisons.jsonl", folder / "critic.json"
        if not (cfg.resume and told_file.exists()):
            rng, critic = random.Random(f"{seed} annotator"), make_critic(judge, cfg, device, autocast)
            pairs = sample_pairs(sl, draw(red, cfg.prompts, "red 2"), cfg, seed + 1, device, autocast)
            labels = compare([(row["prompt"], a, b) for row, a, b in pairs], choose, critic, cfg, seed, shots)
            told = bias(labels, pairs) | dict(critic.counts)
            told |= agreement(pairs, labels, rng, cfg.noise) if graded else {}
            if cfg.labels == "ai":
                rows = [preference_row(*pair, x["p"], by="ai", orders=x["orders"], principle=x["principle"])
                        for pair, x in zip(pairs, labels) if x is not None]
            else:
                rows = [human_row(*pair, cfg.noise, rng) for pair in pairs]
            if cfg.human:
                rows += formats.load(cfg.human, "preference")[0]
            elif graded:
                others = draw(helpful, cfg.helpful_prompts, "helpful 2")
                rows += [human_row(*pair, cfg.noise, rng)
                         for pair in sample_pairs(sl, others, cfg, seed + 2, device, autocast)]
            world.write_jsonl(pairs_file, rows)
            write_atomic(told_file, json.dumps(told).encode())
            del critic   # training gets the memory to itself
        told = read_json(told_file)
        print(f"{pairs_file}: " + ", ".join(f"{k} {v:.4g}" for k, v in told.items()), flush=True)
        if cfg.rl == "dpo":
            model = stage(cfg, "dpo.py", folder / "rl", "--init", sl, "--data", pairs_file, *shlex.split(cfg.rl_flags))
        else:
            reward = stage(cfg, "reward.py", folder / "reward", "--init", sl, "--data", pairs_file,
                           *shlex.split(cfg.reward_flags))
            flags = ["--relabel", 0, "--iterations", 20, *shlex.split(cfg.rl_flags)]
            if not graded:
                world.write_jsonl(folder / "rl.jsonl", [{"prompt": r["prompt"]} for r in red + helpful])
                flags = ["--data", folder / "rl.jsonl", *flags]
            model = stage(cfg, "ppo.py", folder / "rl", "--init", sl, "--reward", reward, *flags)
        columns[f"{n}: RL"], texts = measure(model)
        log.samples(f"round {n}, stage 2", probes, texts[:12])
        log.step(2 * n, **columns[f"{n}: RL"], **{f"critic_{k}": v for k, v in told.items()})
        log.saved(2 * n)

    policy, tok = load(model, device, scalar_head=False)
    save(cfg.out, policy, tok)
    after = columns[f"{cfg.rounds}: RL"]
    if cfg.against and graded:
        theirs = measure(cfg.against)[1]
        gaps = [world.judge(r, a)["gold"] - world.judge(r, b)["gold"] for r, a, b in zip(tests, texts, theirs)]
        after["win_rate"] = sum((g > 0) + 0.5 * (g == 0) for g in gaps) / len(gaps)
    print((out / "samples.txt").read_text().rsplit("--- ", 1)[1])
    log.finish(device, before, after, [("harmless_rate", "harmless", "helpful", "honest"), ("words",)], columns)


if __name__ == "__main__":
    run(main, Config, __doc__)
