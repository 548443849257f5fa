"""Constitutional AI: a model made harmless by its own critiques and by AI feedback, without a human label of harm.

    python cai.py                                  the tiny world; makes the base and a helpful-only model if missing
    python cai.py --init out/ppo --out out/safe    safety fine-tuning of a model that is aligned already
    python cai.py --critic http://localhost:8000/v1 ...                    a server as critic (vLLM, llama.cpp)
    python cai.py --critic MODEL --critic_test pairs.jsonl                 only measure how well a critic chooses
    python cai.py --init MODEL --data red_team.jsonl --helpful prompts.jsonl --human helpful_pairs.jsonl \\
        --constitution CritiqueRevisionInstructions.json,RLMadisonInstructions.json \\
        --few_shots CritiqueRevisionFewShotPrompts.json --sft_flags "--lr 1e-5" --rl_flags "--lr 1e-6"

Stage 1, SL-CAI (Bai et al. 2022, arXiv:2212.08073, section 3), x a red-team prompt:
  1. answer     y ~ model(. | x)
  2. critique   c ~ critic(. | x, y, "CritiqueRequest: .. Critique:"), the request being a principle drawn at random
  3. revise     y' ~ critic(. | x, y, c, "RevisionRequest: .. Revision:") takes the place of y; 2 and 3 again, --critiques times
  4. train      sft.py:  L = - sum_t log p(y'_t | x, y'_<t) / N, on revisions and on own answers to harmless prompts
Of --candidates tries of 2 and 3 the critic keeps the one that it prefers to y, asked as in stage 2 (1: the paper).

Stage 2, RLAIF (section 4; arXiv:2309.00267):
  1. answer     --k answers of the stage-1 model to each red-team prompt, every two of them a pair a, b
  2. label      the critic reads x, a principle and "Options: (A) a (B) b The answer is:", and once more with a and b
                swapped (the paper asks once, but small critics love one letter):
                    p(a over b) = ( s(l_A - l_B) + s(l'_B - l'_A) ) / 2,   s = sigmoid, l_A = log p_critic(" (A)")
  3. reward     reward.py:  L = - p log s(r_a - r_b) - (1 - p) log s(r_b - r_a), on these and on human comparisons of
                helpfulness
  4. RL         ppo.py or dpo.py

Both stages make a round; with --rounds 2 the aligned model is the next generator and, without --critic, the critic.
Left out: red-team prompts written by a model, several principles per label, chains of thought, chat-only servers.
"""
import hashlib
import json
import random
import re
import shlex
import shutil
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from data import InputError, formats, read_json, report, world, write_atomic
from data.checkpoint import load, save
from data.endpoint import Kept, connect, local_critic
from data.parallel import WORLD
from data.principles import compare, constitution, few_shots, transcript
from data.run import MEASURE, Run, RunFlags, need, program, run_script, seeded, setup, sibling, unfinished
from data.sample import all_pairs, annotated, different_answers, ended, preference_row, respond, short_enough
from model import sampling_copy


@dataclass
class Config(RunFlags):
    """The flags of `python cai.py`."""
    # Model, critic and principles
    init: str = ""                # the model to make harmless (default: helpful, a helpful-only model)
    critic: str = ""              # who critiques, revises and chooses: a model or http://HOST/v1 (default: base in
                                  # round 1 of the tiny world, else the model itself, in its present state)
    constitution: str = ""        # principles: FILE or FILE,FILE, ours or Anthropic's (default: data/constitution.json)
    about: str = "harmless"       # use principles about this; those that say nothing of the kind are always used
    few_shots: str = ""           # examples to show the critic first: FILE or FILE,FILE in Anthropic's formats
    critic_test: str = ""         # only measure the critic on these comparisons, then stop
    # Prompts
    data: str = ""                # red-team prompts (default: the tiny world's)
    helpful: str = ""             # harmless prompts, on whose answers the model should not change (default likewise)
    human: str = ""               # human comparisons of helpfulness for the reward model (default likewise, simulated)
    prompts: int = 800            # red-team prompts a stage
    helpful_prompts: int = 1600   # harmless prompts a stage
    # Rounds and stages
    rounds: int = 1               # of stage 1 + stage 2
    critiques: int = 2            # critiques and revisions of a response
    candidates: int = 4           # tries of each; a small critic chooses better than it writes (1: the paper)
    revisions: typing.Literal["all", "last"] = "all"   # which of them stage 1 trains on
    k: int = 4                    # answers per prompt in stage 2; all pairs of different ones are compared
    labels: typing.Literal["ai", "human"] = "ai"   # who compares in stage 2; human: the tiny world's annotator (RLHF)
    rl: typing.Literal["ppo", "dpo"] = "ppo"       # how stage 2 uses the comparisons
    # Sampling
    max_new: int = 32             # longest response and revision, in tokens
    max_critique: int = 32        # longest critique, in tokens
    temperature: float = 1.0      # of the model's answers
    critic_temperature: float = 0.4   # of critiques and revisions (1 in the paper; a small critic rambles)
    # The training scripts
    sft_flags: str = ""           # more flags for sft.py, such as "--lr 1e-5 --epochs 1"
    reward_flags: str = ""        # more flags for reward.py
    rl_flags: str = ""            # more flags for ppo.py or dpo.py
    nproc_per_node: int = 1       # processes for each of them, as torchrun would start them, one on each GPU
    # A critic behind a URL
    critic_model: str = ""        # name of the model to ask for (default: the first that the server lists)
    parallel: int = 8             # requests at a time
    timeout: float = 60.0         # seconds to wait for an answer
    retries: int = 5              # further attempts at a request that failed, after 1, 2, 4, ... seconds


@dataclass
class Setting:
    """What every round works with."""
    device: torch.device
    revise: list        # principles of stage 1
    choose: list        # principles of stage 2
    shots: dict         # examples that the critic is shown first, one text for each kind of question
    red: list           # rows of red-team prompts
    helpful: list       # rows of harmless prompts
    graded: bool        # whether they are the tiny world's: gold is then reported, and never trained on


def read_setting(cfg, device):
    """The Setting that the flags describe. InputError: flags that contradict each other, files that cannot be used."""
    if cfg.k < 2:
        raise InputError(f"--k {cfg.k}: stage 2 compares answers to the same prompt, so it needs at least 2")
    if cfg.data and not cfg.init:
        raise InputError("--data brings red-team prompts of your own: name the model to make harmless with --init")
    if cfg.data and cfg.labels == "human":
        raise InputError("--labels human asks the tiny world's annotator, who knows nothing of your --data")
    revise, choose = constitution(cfg.constitution or str(world.HERE / "constitution.json"), cfg.about)
    if not choose or not (revise or cfg.critic_test):
        raise InputError(f"--constitution: {len(revise)} principles for revisions and {len(choose)} for choices "
                         f"(--about {cfg.about}); both need at least one")
    shots = few_shots(cfg.few_shots, choose)

    # The tiny world's harmful requests are the red team; its other prompts are to stay as well answered as they are.
    asked = world.rows("preference")
    red = [row for row in asked if row["family"] == "harmless"]
    helpful = [row for row in asked if row["family"] != "harmless"]
    if cfg.data:
        red, helpful = formats.load(cfg.data, "prompt")[0], []
    if cfg.helpful:
        helpful = formats.load(cfg.helpful, "prompt")[0]
    return Setting(device, revise, choose, shots, red, helpful, graded=not cfg.data)


def draw(rows, n, seed):
    """n of the rows, or all if there are not so many, in random order."""
    return random.Random(seed).sample(rows, min(n, len(rows)))


def load_sampler(path, device):
    """(the model at a path, frozen, to sample from; its tokenizer)."""
    model, tok = load(path)
    return sampling_copy(model).to(device), tok


# ------------------------------------------------------------------------------------------------------------
# The critic.


def critique_prompt(conversation, response, principle):
    """What a critique is sampled from; conversation ends in "\\n\\nAssistant:", texts keep their leading space."""
    return conversation + response + principle["critique"]


def revision_prompt(conversation, response, critique, principle):
    """What a revision is sampled from."""
    return critique_prompt(conversation, response, principle) + critique + principle["revision"]


@dataclass
class Critic:
    """critic(requests) -> answers (data/endpoint.py), each asked behind the examples for its kind of question."""
    kept: Kept
    shots: dict

    def __call__(self, requests):
        shown = []
        for request in requests:
            kind = "choice" if "options" in request else "critique"
            shown.append(request | {"prompt": self.shots[kind] + request["prompt"]})
        return self.kept(shown)


def make_critic(path, cfg, setting):
    """The critic at a path or address. Its answers are kept in a file of --out, so that none is asked for twice."""
    file, counts = Path(cfg.out) / "critic_answers.jsonl", Counter()
    if path.startswith(("http://", "https://")):
        name, ask = connect(path, cfg.critic_model, cfg.timeout, cfg.retries, cfg.parallel, counts)
        return Critic(Kept(name, ask, file, cfg.parallel, counts), setting.shots)
    name, ask = local_critic(path, setting.device)
    return Critic(Kept(name, ask, file, 64, counts), setting.shots)


def write_requests(texts, max_tokens, temperature, where):
    """Requests to continue texts, each with a seed of its own that depends on where in the run it is."""
    at = int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:5], "big")
    requests = []
    for i, text in enumerate(texts):
        requests.append({"prompt": text, "max_tokens": max_tokens, "temperature": temperature, "seed": at + i})
    return requests


def critic_figures(labels, pairs):
    """How a critic chooses, whatever is right: figures over its labels of pairs [(prompt, a, b)] that are not None."""
    kept, longer_wins = [], []
    for label, (_, a, b) in zip(labels, pairs):
        if label is not None:
            kept.append(label)
            if len(a) != len(b):
                longer_wins.append(label["p"] if len(a) > len(b) else 1 - label["p"])
    n = max(1, len(kept))
    return {"compared": len(kept), "no_answer": len(labels) - len(kept),
            "neither": sum(label["mass"] < 0.01 for label in kept),
            "mass": sum(label["mass"] for label in kept) / n,
            "first_wins": sum(label["orders"][0] + 1 - label["orders"][1] for label in kept) / 2 / n,
            "longer_wins": sum(longer_wins) / max(1, len(longer_wins))}


def agreement(pairs, labels, annotator, rng):
    """Share of pairs [(row, a, b)] on which two judges agree, for the AI's labels, the simulated human and gold, over the
    pairs in which gold sees a difference. Only the tiny world knows gold."""
    hits = {"ai_gold": [], "human_gold": [], "ai_human": []}
    for (row, a, b), label in zip(pairs, labels):
        u, v = world.utility(row, a), world.utility(row, b)
        if label is None or abs(u - v) < 1e-6:
            continue
        ai, gold = label["p"] > 0.5, u > v
        human = world.annotate(u, v, annotator.noise, rng) > 0.5
        hits["ai_gold"].append(ai == gold)
        hits["human_gold"].append(human == gold)
        hits["ai_human"].append(ai == human)
    figures = {"differing_pairs": len(hits["ai_gold"])}
    for name, found in hits.items():
        if found:
            figures[name] = sum(found) / len(found)
    return figures


def measure_critic(cfg, setting):
    """--critic_test: how often a critic is right about comparisons, in each order and averaged, beside two baselines."""
    rows, dropped = formats.load(cfg.critic_test, "preference")
    print(formats.describe(rows, dropped, cfg.critic_test))
    critic = make_critic(cfg.critic or need(cfg, "base"), cfg, setting)
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows if row["label"] != 0.5]
    labels = compare(pairs, setting.choose, critic, random.Random(f"{cfg.seed} choices"))

    # The chosen answer is a, so P(a over b) should be above 0.5 in every column.
    right = {"right answer as (A)": [], "right answer as (B)": [], "both orders averaged": [], "longer answer": []}
    for label, (_, chosen, rejected) in zip(labels, pairs):
        if label is not None:
            right["right answer as (A)"].append(label["orders"][0] > 0.5)
            right["right answer as (B)"].append(label["orders"][1] > 0.5)
            right["both orders averaged"].append(label["p"] > 0.5)
            right["longer answer"].append(len(chosen) > len(rejected))
    figures = {}
    for name, hits in right.items():
        n = max(1, len(hits))
        share = sum(hits) / n
        figures[name] = share
        figures[f"{name}, standard error"] = (share * (1 - share) / n) ** 0.5
    figures |= critic_figures(labels, pairs)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    told = figures | {"critic": critic.kept.name}
    write_atomic(Path(cfg.out) / "critic.json", json.dumps(told, indent=1).encode())
    for name, value in figures.items():
        print(f"{name:38} {value:.4g}")


# ------------------------------------------------------------------------------------------------------------
# Stage 1.

MARKERS = re.compile(r"(Human|Assistant|Critique|Revision|CritiqueRequest|RevisionRequest):")   # no revision
USABLE = ("", "copied")     # faults of revisions that are trained on


def fault(answer, response):
    """What is wrong with a revision (an answer of the critic) of a response: "", or one of refused, empty, leaked, cut,
    copied."""
    if answer is None or "refused" in answer:
        return "refused"
    if not answer["text"].strip():
        return "empty"
    if MARKERS.search(answer["text"]):
        return "leaked"
    if not answer["ended"]:
        return "cut"
    return "copied" if answer["text"].strip() == response.strip() else ""


def revise_once(talks, responses, principles, critic, cfg, where):
    """One critique and revision of each response under a principle each: [{"principle", "critique", "revision", "fault"}].
    talks end in "\\n\\nAssistant:"; where: what the critic's random draws depend on."""
    prompts = []
    for talk, response, principle in zip(talks, responses, principles):
        prompts.append(critique_prompt(talk, response, principle))
    answers = critic(write_requests(prompts, cfg.max_critique, cfg.critic_temperature, (where, "critique")))
    critiques = [(answer or {}).get("text", "") for answer in answers]

    prompts = []
    for talk, response, critique, principle in zip(talks, responses, critiques, principles):
        prompts.append(revision_prompt(talk, response, critique, principle))
    answers = critic(write_requests(prompts, cfg.max_new, cfg.critic_temperature, (where, "revision")))

    steps = []
    for response, principle, critique, answer in zip(responses, principles, critiques, answers):
        steps.append({"principle": principle["key"], "critique": critique,
                      "revision": (answer or {}).get("text", ""), "fault": fault(answer, response)})
    return steps


def make_chains(prompts, responses, revise, choose, critic, cfg, seed):
    """Chains {"prompt": messages, "initial": str, "chain": [{"principle", "critique", "revision", "fault"}]} of
    `cfg.critiques` steps. A revision replaces the response unless it is refused, cut, leaked or empty. Each step is the
    best of `cfg.candidates` tries, with a principle each, by the critic's own "p" (revision over response); if it prefers
    the response to all of them, that stays (fault: worse)."""
    rng = random.Random(f"{seed} principles")
    chains = [{"prompt": p, "initial": r, "chain": []} for p, r in zip(prompts, responses)]
    talks = [transcript(prompt) + "\n\nAssistant:" for prompt in prompts]
    now = list(responses)
    for step in range(cfg.critiques):
        # Some tries at each response.
        tries = []                                                             # tries[n][i]: try n at response i
        for n in range(cfg.candidates):
            principles = [rng.choice(revise) for _ in now]
            tries.append(revise_once(talks, now, principles, critic, cfg, (seed, step, n)))

        # What the critic thinks of each, beside the response.
        if cfg.candidates > 1:
            found, pairs = [], []
            for steps in tries:
                found += steps
                for prompt, one, response in zip(prompts, steps, now):
                    pairs.append((prompt, one["revision"].strip(), response.strip()))
            labels = compare(pairs, choose, critic, random.Random(f"{seed} {step} choices"))
            for one, label in zip(found, labels):
                one["p"] = label["p"] if label else 0.0
                if one["p"] < 0.5:
                    one["fault"] = one["fault"] or "worse"

        # The best one is the step, the first if several are.
        for i, chain in enumerate(chains):
            steps = [some[i] for some in tries]
            best = max(steps, key=lambda one: (one["fault"] in USABLE, one.get("p", 0.0)))
            chain["chain"].append(best)
            if best["fault"] in USABLE:
                now[i] = best["revision"]
    return chains


def conversation(prompt, text):
    """A row for sft.py: a prompt (messages) and what to answer."""
    return {"messages": prompt + [{"role": "assistant", "content": text.strip()}]}


def training_rows(chains, which):
    """Conversations for sft.py: prompt and revision, for every usable revision of a chain or for its last one."""
    rows = []
    for chain in chains:
        usable = [step["revision"] for step in chain["chain"] if step["fault"] in USABLE]
        if which == "last":
            usable = usable[-1:]
        rows += [conversation(chain["prompt"], text) for text in usable]
    return rows


def count_faults(chains):
    """{"revisions": how many there are in the chains, "good": n, "copied": n, ..}."""
    counts = dict.fromkeys(("revisions", "good", "copied", "worse", "empty", "leaked", "cut", "refused"), 0)
    for chain in chains:
        for step in chain["chain"]:
            counts["revisions"] += 1
            counts[step["fault"] or "good"] += 1
    return counts


def gold_by_revision(chains, rows):
    """{"refused_0": share of initial responses that refuse, "gold_0": their gold, "refused_1": the same after one
    revision, ..}: figure 5 of the paper, with the tiny world's judge. rows: those of the prompts."""
    row_of = {str(row["prompt"]): row for row in rows}
    now, figures = [chain["initial"] for chain in chains], {}
    for n in range(1 + len(chains[0]["chain"])):
        refused, gold = 0, 0.0
        for i, chain in enumerate(chains):
            if n and chain["chain"][n - 1]["fault"] in USABLE:
                now[i] = chain["chain"][n - 1]["revision"]
            scores = world.judge(row_of[str(chain["prompt"])], now[i])
            refused += scores["harmless"] > 0
            gold += scores["gold"]
        figures |= {f"refused_{n}": refused / len(chains), f"gold_{n}": gold / len(chains)}
    return figures


# ------------------------------------------------------------------------------------------------------------
# The two stages. What they have made already is kept, so that a run that was broken off goes on.


def train(cfg, run, script, out, flags):
    """Run another script to its end with --out `out` and with what cai.py's own flags say of every run. One that is
    finished ends at once, one that was broken off goes on. Returns its folder."""
    if run.stopping:
        raise KeyboardInterrupt("; the same command goes on from there")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()     # what the critic took is the script's now
    flags = list(flags) + ["--compile", cfg.compile, "--recompute", cfg.recompute]
    if cfg.max_steps:
        flags += ["--max_steps", cfg.max_steps]
    if cfg.save_every != Config.save_every:
        flags += ["--save_every", cfg.save_every]
    run.say(f"running {script} --out {out}")
    run_script(cfg, [script], out, flags, cfg.nproc_per_node)
    return str(out)


def helpful_model(cfg, run):
    """The folder of a model that helps with anything, harm included: sft.py makes it of the base model if missing."""
    folder = sibling(cfg, "helpful")
    if unfinished(folder):
        demos = f"{folder}_demos.jsonl"
        world.write_jsonl(demos, world.helpful_only(3000, 0))
        train(cfg, run, "sft.py", folder, ["--init", need(cfg, "base"), "--data", demos])
    return folder


def stage1(cfg, run, setting, n, model, judge):
    """SL-CAI of round n: the model is trained on what the critic, `judge`, makes of its answers (model, judge: paths).
    Returns the folder of the result, and figures of the revisions."""
    folder, seed = Path(cfg.out) / f"round{n}", cfg.seed * 1000 + n
    folder.mkdir(exist_ok=True)
    chains_file, rows_file = folder / "chains.jsonl", folder / "stage1.jsonl"
    if not rows_file.exists():
        # 1. The model answers red-team prompts, and harmless ones twice, as in the paper.
        red = draw(setting.red, cfg.prompts, f"{seed} red 1")
        harmless = draw(setting.helpful, cfg.helpful_prompts, f"{seed} helpful 1") * 2
        sampler, tok = load_sampler(model, setting.device)
        prompts = [row["prompt"] for row in red + harmless]
        texts, _, ids = respond(sampler, tok, prompts, cfg.max_new, seeded(seed, 0), cfg.temperature)

        # 2. and 3. The critic criticises and revises what the red team was told.
        critic = make_critic(judge, cfg, setting)
        responses = [" " + text.strip() for text in texts[: len(red)]]
        chains = make_chains(prompts[: len(red)], responses, setting.revise, setting.choose, critic, cfg, seed)

        # What to train on: revisions, and the model's own finished answers to the harmless prompts.
        rows = training_rows(chains, cfg.revisions)
        for i in range(len(red), len(prompts)):
            if ended(tok, ids[i]) and texts[i].strip():
                rows.append(conversation(prompts[i], texts[i]))
        world.write_jsonl(chains_file, chains)
        world.write_jsonl(rows_file, rows)
        del sampler, critic      # training gets the memory to itself

    chains = world.read_jsonl(chains_file)
    counts = count_faults(chains)
    run.say(f"{chains_file}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    figures = {f"revisions_{kind}": count for kind, count in counts.items()}
    if setting.graded:
        figures |= gold_by_revision(chains, setting.red)

    # 4. Supervised training.
    flags = ["--init", model, "--data", rows_file, "--epochs", 2] + shlex.split(cfg.sft_flags)
    return train(cfg, run, "sft.py", folder / "sl", flags), figures


def stage2(cfg, run, setting, n, model, judge):
    """RLAIF of round n: the stage-1 model learns from what the critic, `judge`, prefers (model, judge: paths). Returns the
    folder of the result, and figures of the critic."""
    folder, seed = Path(cfg.out) / f"round{n}", cfg.seed * 1000 + n
    pairs_file, figures_file = folder / "comparisons.jsonl", folder / "critic.json"
    if not figures_file.exists():
        # 1. The model answers red-team prompts k times; every two different, finished answers are compared.
        sampler, tok = load_sampler(model, setting.device)
        red = draw(setting.red, cfg.prompts, f"{seed} red 2")
        answers = different_answers(sampler, tok, red, [cfg.k] * len(red), cfg.max_new, seeded(seed, 1), cfg.temperature)
        pairs = all_pairs(red, answers)

        # 2. The critic's labels; --labels human: the annotator's in their place.
        critic = make_critic(judge, cfg, setting)
        asked = [(row["prompt"], a, b) for row, a, b in pairs]
        labels = compare(asked, setting.choose, critic, random.Random(f"{seed} choices"))
        figures = critic_figures(labels, pairs) | dict(critic.kept.counts)
        annotator, rng = world.Annotator(), random.Random(f"{seed} annotator")
        if setting.graded:
            figures |= agreement(pairs, labels, annotator, rng)
        rows = []
        if cfg.labels == "human":
            rows += annotated(pairs, annotator, rng)
        else:
            for (row, a, b), label in zip(pairs, labels):
                if label is not None:
                    rows.append(preference_row(row, a, b, label["p"], by="ai", orders=label["orders"],
                                               principle=label["principle"]))

        # Helpfulness is for people to judge.
        if cfg.human:
            rows += formats.load(cfg.human, "preference")[0]
        elif setting.graded and not cfg.helpful:
            asked = draw(setting.helpful, cfg.helpful_prompts, f"{seed} helpful 2")
            counts = [cfg.k] * len(asked)
            answers = different_answers(sampler, tok, asked, counts, cfg.max_new, seeded(seed, 2), cfg.temperature)
            rows += annotated(all_pairs(asked, answers), annotator, rng)
        world.write_jsonl(pairs_file, rows)
        write_atomic(figures_file, json.dumps(figures).encode())
        del sampler, critic      # training gets the memory to itself
    figures = read_json(figures_file, kind=dict)
    run.say(f"{pairs_file}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    figures = {f"critic_{name}": value for name, value in figures.items()}

    # 3. The reward model, and 4. reinforcement learning; DPO needs only the comparisons.
    if cfg.rl == "dpo":
        flags = ["--init", model, "--data", pairs_file] + shlex.split(cfg.rl_flags)
        return train(cfg, run, "dpo.py", folder / "rl", flags), figures
    flags = ["--init", model, "--data", pairs_file] + shlex.split(cfg.reward_flags)
    reward = train(cfg, run, "reward.py", folder / "reward", flags)
    flags = ["--init", model, "--reward", reward, "--relabel", 0, "--iterations", 20]
    if not setting.graded:
        world.write_jsonl(folder / "rl.jsonl", [{"prompt": row["prompt"]} for row in setting.red + setting.helpful])
        flags += ["--data", folder / "rl.jsonl"]
    return train(cfg, run, "ppo.py", folder / "rl", flags + shlex.split(cfg.rl_flags)), figures


def measure(path, tests, cfg, device):
    """Figures of what the model at a path says to the test prompts, and report.Answers."""
    sampler, tok = load_sampler(path, device)
    figures, answers = report.measure(sampler, tok, tests, seeded(cfg.seed, MEASURE))
    if tests.graded:
        # "harmless" is gold: a refusal without the right safe alternative is worth half. This is the share of refusals.
        refused = [scores["harmless"] > 0 for scores in answers.scored if "harmless" in scores]
        figures["harmless_rate"] = sum(refused) / max(1, len(refused))
    return figures, answers


def main(cfg):
    """Stage 1 and stage 2, as often as --rounds says; or --critic_test."""
    if WORLD > 1:
        raise InputError("cai.py runs the other scripts: start it as one process, with --nproc_per_node N for several")
    device = setup(cfg)
    setting = read_setting(cfg, device)
    if cfg.critic_test:
        return measure_critic(cfg, setting)

    # The folder, the model to start from, and what it is measured on.
    if setting.graded and not (cfg.init and cfg.critic):
        need(cfg, "base")
    files = [cfg.init, cfg.critic, cfg.data, cfg.helpful, cfg.human, *cfg.constitution.split(","),
             *cfg.few_shots.split(",")]
    run = Run(cfg, "cai", filter(None, files), begun="round1")
    if cfg.overwrite:
        for old in Path(cfg.out).glob("round*"):
            shutil.rmtree(old)
    model = cfg.init or helpful_model(cfg, run)
    start, tok = load(model)
    longest = start.cfg.max_len - cfg.max_new
    setting.red, setting.helpful = short_enough(tok, setting.red, longest), short_enough(tok, setting.helpful, longest)
    tests = report.test_prompts(start, tok, cfg.max_new, None if setting.graded else setting.red, cfg.data)
    if not setting.helpful:
        run.say("no --helpful prompts: nothing keeps the model from refusing everything")
    run.begin(1 + 2 * cfg.rounds, tok)

    probes = tests.prompts[: report.PROBES]
    figures_shown = ("gold", "harmless_rate", "helpful", "honest", "length")
    before, first = measure(model, tests, cfg, device)
    run.samples("start", probes, first.texts)
    run.log(0, show=figures_shown, **before)
    columns = {"start": before}

    for n in range(1, cfg.rounds + 1):
        judge = cfg.critic or (need(cfg, "base") if setting.graded and n == 1 else model)
        run.say(f"round {n}: generator {model}, critic {judge}")

        # 1. The model learns to answer as the critic revises.
        model_1, found = stage1(cfg, run, setting, n, model, judge)
        columns[f"{n}: SL"], answers = measure(model_1, tests, cfg, device)
        run.samples(f"round {n}, stage 1", probes, answers.texts)
        run.log(2 * n - 1, show=figures_shown, **columns[f"{n}: SL"], **found)

        # 2. It learns what the critic prefers.
        model, found = stage2(cfg, run, setting, n, model_1, judge)
        columns[f"{n}: RL"], answers = measure(model, tests, cfg, device)
        run.samples(f"round {n}, stage 2", probes, answers.texts)
        run.log(2 * n, show=figures_shown, **columns[f"{n}: RL"], **found)

    policy, tok = load(model)
    save(cfg.out, policy, tok)
    run.finish(before, columns[f"{cfg.rounds}: RL"], columns, report.answer_rows(tests, first.scored, answers.scored), device)


if __name__ == "__main__":
    program(main, Config, __doc__)
