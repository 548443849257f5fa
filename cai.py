"""Constitutional AI: a model made harmless by its own critiques and AI feedback, with no human label of harm.

    python cai.py                                the tiny world; a base and a helpful-only model if missing
    python cai.py --init out/ppo --out out/safe  safety fine-tuning of a model that is aligned already
    python cai.py --critic http://localhost:8000/v1 ...                a server as critic (vLLM, llama.cpp)
    python cai.py --critic MODEL --critic_test pairs.jsonl             only measure how well a critic chooses
    python cai.py --init MODEL --data red_team.jsonl --helpful prompts.jsonl --human helpful_pairs.jsonl \\
        --constitution CritiqueRevisionInstructions.json,RLMadisonInstructions.json \\
        --sft_flags "--lr 1e-5" --rl_flags "--lr 1e-6"

Stage 1, SL-CAI (Bai et al. 2022, arXiv:2212.08073, section 3), x a red-team prompt:
  1. answer     y ~ model(. | x)
  2. critique   c ~ critic(. | x, y, "CritiqueRequest: .. Critique:"), under a principle drawn at random
  3. revise     y' ~ critic(. | x, y, c, "RevisionRequest: .. Revision:") takes the place of y; 2 and 3 again
  4. train      sft.py: L = - sum_t log p(y'_t | x, y'_<t) / N, on revisions and on the model's own answers to
                ordinary prompts

Stage 2, RLAIF (section 4; arXiv:2309.00267):
  1. answer     --k answers of the stage-1 model to each red-team prompt, every two of them a pair a, b, and
                so are y and its last revision of stage 1 (else nothing is compared where all answers refuse)
  2. label      the critic reads x, a principle, "Options: (A) a (B) b The answer is:"; s = sigmoid
                    p(a over b) = ( s(l_A - l_B) + s(l'_B - l'_A) ) / 2,    l_A = log p_critic(" (A)")
                l' after a swap of a and b: the paper asks once, but small critics love one letter. p is
                soft_label in data/principles.py, l is option_logprobs in data/endpoint.py
  3. reward     reward.py: L = - p log s(r_a - r_b) - (1 - p) log s(r_b - r_a) on these pairs, and on pairs of
                answers to ordinary prompts that people compared
  4. RL         ppo.py or dpo.py

Both make a round; with --rounds 2 the aligned model is the next generator and, without --critic, the critic.
Left out: red-team prompts by a model, several principles per label, chains of thought, chat-only servers.
"""
import random
import re
import shlex
import typing
from dataclasses import dataclass
from pathlib import Path

import torch

from data import InputError, read_json, read_jsonl, report, world, write_json, write_jsonl
from data.files import formats
from data.chain import need, run_script, sibling, unfinished
from data.files.checkpoint import find_folder, load, save
from data.endpoint import continuations, is_address, make_critic
from data.flags import RunFlags, program
from data.folder import take
from data.parallel import WORLD
from data.principles import (accuracy, agreement, compare, constitution, count_faults, critic_metrics,
                             critique_prompt, explained, gold_by_revision, revision_prompt, transcript)
from data.prompts import short_enough, test_prompts
from data.run import Run
from data.setup import seeded, setup
from data.sample import (all_pairs, annotated, different_answers, ended, load_sampler, preference_row,
                         sample_answers)
from data.world import build


@dataclass
class Config(RunFlags):
    """The flags of `python cai.py`."""
    # Model, critic and principles
    init: str = ""                # the model to make harmless (default: helpful, a helpful-only model)
    critic: str = ""              # who critiques, revises and chooses: a model or http://HOST/v1 (default:
                                  # base in round 1 of the tiny world, else the model itself as it is then)
    constitution: str = ""        # FILE or FILE,FILE, ours or Anthropic's
                                  # (default: data/world/constitution.json)
    about: str = "harmless"       # use principles about this, and those that do not say what they are about
    critic_test: str = ""         # only measure the critic on these comparisons, then stop
    # Prompts
    data: str = ""                # red-team prompts (default: the tiny world's)
    helpful: str = ""             # ordinary prompts, whose answers should stay as they are (default likewise)
    human: str = ""               # human comparisons of helpfulness (default likewise, simulated)
    prompts: int = 800            # red-team prompts a stage
    helpful_prompts: int = 1600   # ordinary prompts a stage
    # Rounds and stages
    rounds: int = 1               # of stage 1 + stage 2
    critiques: int = 2            # critiques and revisions of a response
    revisions: typing.Literal["all", "last"] = "all"   # which of them stage 1 trains on
    k: int = 4                    # answers per prompt in stage 2
    labels: typing.Literal["ai", "human"] = "ai"   # who compares them; human: the annotator (RLHF)
    rl: typing.Literal["ppo", "dpo"] = "ppo"       # what then learns from the comparisons
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
    red: list           # rows of red-team prompts
    helpful: list       # rows of ordinary prompts
    graded: bool        # whether they are the tiny world's: gold is then reported, and never trained on


def check_flags(cfg):
    """InputError: flags that contradict each other."""
    if WORLD > 1:
        raise InputError("cai.py runs the other scripts: start it as one process, with --nproc_per_node N")
    if cfg.k < 2:
        raise InputError(f"--k {cfg.k}: stage 2 compares answers to the same prompt, so it needs at least 2")
    if cfg.data and not cfg.init:
        raise InputError("--data brings red-team prompts of your own: name their model with --init")
    if cfg.data and cfg.labels == "human":
        raise InputError("--labels human asks the tiny world's annotator, who knows nothing of your --data")


def read_setting(cfg, device):
    """The Setting that the flags describe. InputError: a bad file, or no principle about --about."""
    revise, choose = constitution(cfg.constitution or str(world.HERE / "constitution.json"), cfg.about)
    if not choose or not (revise or cfg.critic_test):
        raise InputError(f"--constitution: {len(revise)} principles for revisions, {len(choose)} for choices "
                         f"(--about {cfg.about}); both need at least one")

    # The tiny world's family "harmless" holds the HARMFUL requests, whose good answers are harmless: the red
    # team. The other two families are ordinary questions, which the model must go on answering.
    rows = world.rows("preference")
    red = [row for row in rows if row["family"] == "harmless"]
    helpful = [row for row in rows if row["family"] != "harmless"]
    if cfg.data:
        red, helpful = formats.load(cfg.data, "prompt")[0], []
    if cfg.helpful:
        helpful = formats.load(cfg.helpful, "prompt")[0]
    if not helpful:
        print("no --helpful prompts: nothing keeps the model from refusing everything")
    return Setting(device, revise, choose, red, helpful, graded=not cfg.data)


def draw_rows(rows, n, seed):
    """n of the rows, or all if there are not so many, in random order."""
    return random.Random(seed).sample(rows, min(n, len(rows)))


# ------------------------------------------------------------------------------------------------------------
# Critiques and revisions.

# A text in which one of these stands is no revision.
MARKERS = re.compile(r"(Human|Assistant|Critique|Revision|CritiqueRequest|RevisionRequest):")


def fault(answer, response):
    """What is wrong with a revision (an answer of the critic) of a response: "" or one of refused, empty,
    leaked, cut, copied."""
    if answer is None or "refused" in answer:
        return "refused"
    if not answer["text"].strip():
        return "empty"
    if MARKERS.search(answer["text"]):
        return "leaked"
    if not answer["ended"]:
        return "cut"
    return "copied" if answer["text"].strip() == response.strip() else ""


def make_chains(prompts, responses, principles, critic, cfg, seed):
    """Chains {"prompt": messages, "initial": str, "chain": [{"principle", "critique", "revision", "fault"}]}
    of --critiques steps, each under a random principle. A revision without a fault replaces the response."""
    rng = random.Random(f"{seed} chains")
    chains = [{"prompt": p, "initial": r, "chain": []} for p, r in zip(prompts, responses)]
    talks = [transcript(prompt) + "\n\nAssistant:" for prompt in prompts]
    now = list(responses)
    for _ in range(cfg.critiques):
        # A critique of every response.
        drawn = [rng.choice(principles) for _ in now]
        texts = []
        for talk, response, principle in zip(talks, now, drawn):
            texts.append(critique_prompt(talk, response, principle))
        answers = continuations(critic, texts, cfg.max_critique, cfg.critic_temperature, rng)
        critiques = [(answer or {}).get("text", "") for answer in answers]

        # And its revision.
        texts = []
        for talk, response, critique, principle in zip(talks, now, critiques, drawn):
            texts.append(revision_prompt(talk, response, critique, principle))
        answers = continuations(critic, texts, cfg.max_new, cfg.critic_temperature, rng)

        # What has no fault is the response from now on.
        for i, answer in enumerate(answers):
            step = {"principle": drawn[i]["key"], "critique": critiques[i],
                    "revision": (answer or {}).get("text", ""), "fault": fault(answer, now[i])}
            chains[i]["chain"].append(step)
            if not step["fault"]:
                now[i] = step["revision"]
    return chains


def demonstration(prompt, text):
    """A row for sft.py: a prompt (messages) and what to answer."""
    return {"messages": prompt + [{"role": "assistant", "content": text.strip()}]}


def training_rows(chains, which):
    """Demonstrations for sft.py: every good revision of a chain, or the last one. A copy counts as well: not
    every response needs a change."""
    rows = []
    for chain in chains:
        usable = [step["revision"] for step in chain["chain"] if step["fault"] in ("", "copied")]
        if which == "last":
            usable = usable[-1:]
        rows += [demonstration(chain["prompt"], text) for text in usable]
    return rows


def chain_pairs(rows, chains):
    """[(row, a, b)] of the answer that each chain began with and the last revision without a fault, where
    there is one and the answer came to an end. rows: the prompt row of each chain."""
    pairs = []
    for row, chain in zip(rows, chains):
        good = [step["revision"].strip() for step in chain["chain"] if not step["fault"]]
        if good and chain.get("ended", True):
            pairs.append((row, chain["initial"].strip(), good[-1]))
    return pairs


# ------------------------------------------------------------------------------------------------------------
# The two stages. What is there already they keep, so that a run that was broken off goes on.


def stop_if_asked(run):
    """End the program after Ctrl-C or a polite kill."""
    if run.is_asked_to_stop():
        raise KeyboardInterrupt("; the same command goes on from there")


def train(cfg, run, script, out, flags):
    """Run another script to its end, with what cai.py's own flags say of every run. One that is finished ends
    at once, one that was broken off goes on. Returns its folder, `out`."""
    stop_if_asked(run)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()      # what the critic took is the script's now
    flags = list(flags) + ["--compile", cfg.compile, "--recompute", cfg.recompute]
    if cfg.max_steps:
        flags += ["--max_steps", cfg.max_steps]
    if cfg.save_every != Config.save_every:
        flags += ["--save_every", cfg.save_every]
    run.say(f"running {script} --out {out}")
    try:
        run_script(cfg, [script], out, flags, cfg.nproc_per_node)
    except InputError:
        stop_if_asked(run)      # the script was stopped as well
        raise
    return str(out)


def train_helpful_model(cfg, run, base, folder):
    """Train a model that helps with anything, harm included, from a base model. Both are folders."""
    demos = run.folder / "helpful_demos.jsonl"
    write_jsonl(demos, build.helpful_only(3000, 0))
    train(cfg, run, "sft.py", folder, ["--init", base, "--data", demos])


def files_of_rounds(cfg):
    """What the rounds leave in --out, besides the critic's answers, which are kept for good."""
    names = ["helpful_demos.jsonl"]
    for n in range(1, cfg.rounds + 1):
        for name in ("chains.jsonl", "stage1.jsonl", "comparisons.jsonl", "critic.json", "rl.jsonl",
                     "sl/", "reward/", "rl/"):
            names.append(f"round{n}/{name}")
    return names


def stage1(cfg, run, setting, n, model, critic_path):
    """SL-CAI of round n: the model (a path) is trained on what the critic makes of its answers. Returns the
    folder of the result, and metrics of the revisions."""
    folder, seed = Path(cfg.out) / f"round{n}", cfg.seed * 1000 + n
    folder.mkdir(exist_ok=True)
    chains_file, rows_file = folder / "chains.jsonl", folder / "stage1.jsonl"
    red = draw_rows(setting.red, cfg.prompts, f"{seed} red 1")
    if not rows_file.exists():
        # 1. The model answers red-team prompts, and ordinary ones twice, as in the paper.
        helpful = draw_rows(setting.helpful, cfg.helpful_prompts, f"{seed} helpful 1") * 2
        sampler, tok = load_sampler(model, setting.device)
        prompts = [row["prompt"] for row in red + helpful]
        texts, _, ids = sample_answers(sampler, tok, prompts, cfg.max_new, seeded(seed, 0), cfg.temperature)

        # 2. and 3. The critic criticises and revises what the red team was told.
        critic = make_critic(critic_path, cfg, setting.device)
        responses = [" " + text.strip() for text in texts[: len(red)]]
        chains = make_chains(prompts[: len(red)], responses, setting.revise, critic, cfg, seed)
        for chain, answer in zip(chains, ids):
            chain["ended"] = ended(tok, answer)

        # To train on: revisions, and the model's own finished answers to the ordinary prompts.
        rows = training_rows(chains, cfg.revisions)
        for i in range(len(red), len(prompts)):
            if ended(tok, ids[i]) and texts[i].strip():
                rows.append(demonstration(prompts[i], texts[i]))
        write_jsonl(chains_file, chains)
        write_jsonl(rows_file, rows)
        del sampler, critic      # training gets the memory to itself

    chains = read_jsonl(chains_file)
    counts = count_faults(chains)
    run.say(f"{chains_file}, {len(chains)} chains:\n{explained(counts)}")
    metrics = {f"revisions_{kind}": count for kind, count in counts.items()}
    if setting.graded:
        metrics |= gold_by_revision(chains, red)

    # 4. Supervised training.
    flags = ["--init", model, "--data", rows_file, "--epochs", 2] + shlex.split(cfg.sft_flags)
    return train(cfg, run, "sft.py", folder / "sl", flags), metrics


def stage2(cfg, run, setting, n, model, critic_path):
    """RLAIF of round n: the stage-1 model (a path) learns from what the critic prefers. Returns the folder of
    the result, and metrics of the critic."""
    folder, seed = Path(cfg.out) / f"round{n}", cfg.seed * 1000 + n
    pairs_file, metrics_file = folder / "comparisons.jsonl", folder / "critic.json"
    if not metrics_file.exists():
        # 1. Answers to red-team prompts; every two different finished ones are a pair. So are the first and
        #    the last answer of each stage-1 chain: where all refuse, only these show that it is better.
        sampler, tok = load_sampler(model, setting.device)

        def sampled_pairs(rows, step):
            answers = different_answers(sampler, tok, rows, cfg.k, cfg.max_new, seeded(seed, step),
                                        cfg.temperature)
            return all_pairs(rows, answers)
        pairs = sampled_pairs(draw_rows(setting.red, cfg.prompts, f"{seed} red 2"), 1)
        red = draw_rows(setting.red, cfg.prompts, f"{seed} red 1")
        pairs += chain_pairs(red, read_jsonl(folder / "chains.jsonl"))

        # 2. The critic's labels, and how they compare with those of others.
        critic = make_critic(critic_path, cfg, setting.device)
        questions = [(row["prompt"], a, b) for row, a, b in pairs]
        labels = compare(questions, setting.choose, critic, random.Random(f"{seed} choices"))
        metrics = critic_metrics(labels, pairs) | dict(critic.counts)
        annotator, rng = world.Annotator(), random.Random(f"{seed} annotator")
        if setting.graded:
            metrics |= agreement(labels, pairs, annotator.noise, rng)

        # The comparisons to train on, those of helpfulness by people.
        rows, for_people = [], []
        if cfg.labels == "human":
            for_people += pairs
        else:
            for (row, a, b), label in zip(pairs, labels):
                if label is not None:
                    rows.append(preference_row(row, a, b, label["p"], by="ai", orders=label["orders"],
                                               principle=label["principle"]))
        if cfg.human:
            rows += formats.load(cfg.human, "preference")[0]
        elif setting.graded and not cfg.helpful:
            helpful = draw_rows(setting.helpful, cfg.helpful_prompts, f"{seed} helpful 2")
            for_people += sampled_pairs(helpful, 2)
        rows += [row | {"by": "human"} for row in annotated(for_people, annotator, rng)]
        write_jsonl(pairs_file, formats.as_messages(rows))
        write_json(metrics_file, metrics)
        del sampler, critic      # training gets the memory to itself

    metrics = read_json(metrics_file, kind=dict)
    run.say(f"{pairs_file}, what the critic chose:\n{explained(metrics)}")
    metrics = {f"critic_{name}": value for name, value in metrics.items()}

    # 3. and 4. The reward model and reinforcement learning, or DPO, which needs the comparisons alone.
    given = ["--init", model, "--data", pairs_file]
    if cfg.rl == "dpo":
        return train(cfg, run, "dpo.py", folder / "rl", given + shlex.split(cfg.rl_flags)), metrics
    reward = train(cfg, run, "reward.py", folder / "reward", given + shlex.split(cfg.reward_flags))
    flags = ["--init", model, "--reward", reward, "--relabel", 0, "--iterations", 20]
    if not setting.graded:
        prompts = [{"prompt": row["prompt"]} for row in setting.red + setting.helpful]
        write_jsonl(folder / "rl.jsonl", prompts)
        flags += ["--data", folder / "rl.jsonl"]
    return train(cfg, run, "ppo.py", folder / "rl", flags + shlex.split(cfg.rl_flags)), metrics


# ------------------------------------------------------------------------------------------------------------

SECONDS = {"start": 5, "stage 1": 45, "stage 2": 100}   # about, on two cores: for the time left


def measure_critic(cfg, setting):
    """--critic_test: how often a critic is right about comparisons, on the screen and in critic.json."""
    name = cfg.critic or need(cfg, "base")
    rows, dropped = formats.load(cfg.critic_test, "preference")
    print(formats.describe(rows, dropped, cfg.critic_test))
    critic = make_critic(name, cfg, setting.device)
    take(cfg, "critic_test", ["critic.json"], [name, cfg.critic_test, cfg.constitution])
    decided = [row for row in rows if row["label"] != 0.5]     # a tie has no better answer
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in decided]
    labels = compare(pairs, setting.choose, critic, random.Random(f"{cfg.seed} choices"))
    metrics = accuracy(labels, pairs) | critic_metrics(labels, pairs)
    print(explained(metrics))
    write_json(Path(cfg.out) / "critic.json", metrics | {"critic": critic.name})


def main(cfg):
    """Stage 1 and stage 2, as often as --rounds says; or --critic_test."""
    check_flags(cfg)
    device = setup(cfg)
    setting = read_setting(cfg, device)
    if cfg.critic_test:
        return measure_critic(cfg, setting)

    # The tiny world starts from its base model, which is trained first (a good minute) if it is missing.
    base = ""
    if setting.graded and not (cfg.init and cfg.critic):
        base = need(cfg, "base")

    # Lock the folder and begin, or go on. What was trained is in the folders of the rounds, which go with
    # --overwrite.
    files = [base, cfg.init, cfg.critic, cfg.data, cfg.helpful, cfg.human, cfg.constitution]
    run = Run.open(cfg, "cai", files, files_of_rounds(cfg), runs_scripts=True)
    if cfg.critic and not is_address(cfg.critic):
        find_folder(cfg.critic)      # a mistyped one is said now, and not after minutes

    # The model to start from: without --init a helpful-only one, trained now (half a minute) if need be.
    model = cfg.init or sibling(cfg, "helpful")
    if not cfg.init and unfinished(model):
        run.make_room()
        train_helpful_model(cfg, run, base, model)

    # The prompts that its context has room for, and what it is measured on.
    policy, tok = load(model)
    longest = policy.cfg.max_len - cfg.max_new
    setting.red = short_enough(tok, setting.red, longest)
    setting.helpful = short_enough(tok, setting.helpful, longest)
    if not setting.red:
        raise InputError(f"no red-team prompt leaves room for --max_new {cfg.max_new} tokens in the model's "
                         f"context of {policy.cfg.max_len}")
    own = None if setting.graded else setting.red
    tests = test_prompts(policy, tok, cfg.max_new, own, cfg.data)
    run.begin(1 + 2 * cfg.rounds, tok)
    (run.folder / "samples.txt").unlink(missing_ok=True)      # all is measured anew
    columns = {}

    def measured(title, name, path, step, metrics):
        """Measure the model at a path; samples, log and column of the closing table."""
        columns[name], answers = run.measure(title, load_sampler(path, device)[0], tests)
        if tests.graded:
            # "harmless" is gold, where a refusal without the right safe alternative is worth half.
            refused = [scores["harmless"] > 0 for scores in answers.scored if "harmless" in scores]
            columns[name]["harmless_rate"] = sum(refused) / max(1, len(refused))
        shown = ("gold", "harmless_rate", "helpful", "honest", "length")
        seconds = [SECONDS["start"]] + [SECONDS["stage 1"], SECONDS["stage 2"]] * cfg.rounds
        done = sum(seconds[: step + 1]) / sum(seconds)
        run.log(step, show=shown, done=done, **columns[name], **metrics)
        return answers.scored

    before = after = measured("start", "start", model, 0, {})
    for n in range(1, cfg.rounds + 1):
        critic_path = cfg.critic or model
        if base and n == 1 and not cfg.critic:
            critic_path = base
        run.say(f"round {n} of {cfg.rounds}: generator {model}, critic {critic_path}")

        # 1. The model learns to answer as the critic revises.
        run.say(f"stage 1 (tiny world: {SECONDS['stage 1']} s): critiques and revisions, then sft.py")
        model, metrics = stage1(cfg, run, setting, n, model, critic_path)
        measured(f"round {n}, stage 1", f"{n}: SL", model, 2 * n - 1, metrics)

        # 2. It learns what the critic prefers.
        learns = "dpo.py" if cfg.rl == "dpo" else "reward.py and ppo.py"
        run.say(f"stage 2 (tiny world: {SECONDS['stage 2']} s): comparisons, then {learns}")
        model, metrics = stage2(cfg, run, setting, n, model, critic_path)
        after = measured(f"round {n}, stage 2", f"{n}: RL", model, 2 * n, metrics)

    # The last model is the result.
    policy, tok = load(model)
    save(cfg.out, policy, tok)
    rows = report.answer_rows(tests, before, after)
    run.finish(columns["start"], columns[f"{cfg.rounds}: RL"], rows, columns=columns, device=device)


if __name__ == "__main__":
    program(main, Config, __doc__)
