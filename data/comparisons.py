"""Answers that the tiny world's annotator compares (reward.py), comparisons to look at and to vote on, and
pairs of a policy's own new answers (dpo.py --online)."""
import random
from dataclasses import asdict

from data import InputError, sample, world
from data.endpoint import CachedCritic, continuations, local_critic
from data.principles import constitution, critique_prompt, revision_prompt, transcript
from data.prompts import short_enough
from data.rewards import rewards_of_texts
from data.screen import SCREEN
from data.setup import seeded


def answer_prompts(run, path, device):
    """The policy at `path` answers each prompt of the tiny world --k times. Returns prompt rows and, for
    each, a list of its answers (texts) that end, say something and differ. InputError: no prompt fits."""
    # The policy, and the prompts that leave it room for an answer.
    cfg = run.cfg
    policy, tok = sample.load_sampler(path, device)
    rows = world.rows("preference")
    rows = random.Random(cfg.seed).sample(rows, min(cfg.prompts, len(rows)))
    fitting = short_enough(tok, rows, policy.cfg.max_len - cfg.max_new)
    if not fitting:
        raise InputError(f"{path}: no prompt leaves room for --max_new {cfg.max_new} tokens in its context "
                         f"of {policy.cfg.max_len}")
    n_long = len(rows) - len(fitting)
    run.say(f"{path} answers {len(fitting):,} prompts {cfg.k} times each; {n_long:,} left out that leave no "
            f"room for --max_new {cfg.max_new} tokens")

    # Some prompts at a time, so that something can be said in between.
    generator, answers = seeded(cfg.seed, 0), []
    for start in range(0, len(fitting), 64):
        part = fitting[start: start + 64]
        answers += sample.different_answers(policy, tok, part, cfg.k, cfg.max_new, generator,
                                            cfg.temperature)
        SCREEN.count(len(answers), len(fitting), "prompts answered")

    n_answers = sum(len(texts) for texts in answers)
    n_alone = sum(len(texts) < 2 for texts in answers)
    run.say(f"{n_answers:,} of {cfg.k * len(fitting):,} answers end, say something and differ; {n_alone:,} "
            f"prompts have no two such answers")
    return fitting, answers


def compare_answers(run, path, device):
    """Preference rows (data/files/formats.py) of the tiny world: the annotator compares every two different
    answers of the policy at `path` to a prompt. InputError: there are no two."""
    cfg = run.cfg
    rows, answers = answer_prompts(run, path, device)
    pairs = sample.all_pairs(rows, answers)
    # reward.py counts different prompts, and some of the world's are asked more than once.
    n_compared = sum(len(texts) > 1 for texts in answers)
    n_different = len({str(row["prompt"]) for row, _, _ in pairs})
    run.say(f"the annotator compares {len(pairs):,} pairs, of {n_different:,} different prompts "
            f"(and {n_compared - n_different:,} repeats of them)")
    if not pairs:
        raise InputError(f"{path}: gives no prompt two different answers that end within --max_new "
                         f"{cfg.max_new} tokens; after longer training, or to more --prompts, it may")
    annotator = world.annotator_of(asdict(cfg))
    if cfg.critique:
        annotator.critiques = criticised(run, pairs, annotator, device)
    return sample.annotated(pairs, annotator, random.Random(cfg.seed))


def criticised(run, pairs, annotator, device):
    """{(prompt, answer): (critique, revision)} of the answers in pairs [(row, a, b)] that state what the
    annotator does not know, by the model at --critique, asked as in cai.py under a principle of helpfulness
    that is drawn for each. All that it wrote is in critic_answers.jsonl."""
    # Each doubtful answer once, however often it is compared.
    cfg, doubtful = run.cfg, {}
    for row, a, b in pairs:
        for answer in (a, b):
            if annotator.doubtful_claim(row, answer):
                doubtful[str(row["prompt"]), answer] = row
    run.say(f"{cfg.critique} criticises {len(doubtful):,} answers of whose facts the annotator knows nothing")

    name, ask = local_critic(cfg.critique, device)
    run.make_room()
    critic = CachedCritic(name, ask, run.folder / "critic_answers.jsonl", batch=256)

    # A critique of each, of at most 12 tokens at temperature 0.4, and then a revision, of at most 16.
    principles, _ = constitution(str(world.HERE / "constitution.json"), "helpful")
    rng, asked = random.Random(f"{cfg.seed} critiques"), []
    for (_, answer), row in doubtful.items():
        asked.append((transcript(row["prompt"]) + "\n\nAssistant:", f" {answer}", rng.choice(principles)))
    texts = [critique_prompt(*parts) for parts in asked]
    critiques = [written.get("text", "") for written in continuations(critic, texts, 12, 0.4, rng)]
    texts = []
    for (talk, answer, principle), critique in zip(asked, critiques):
        texts.append(revision_prompt(talk, answer, critique, principle))
    revisions = [written.get("text", "") for written in continuations(critic, texts, 16, 0.4, rng)]
    return dict(zip(doubtful, zip(critiques, revisions)))


# ------------------------------------------------------------------------------------------------------------
# Pairs to look at, which reward.py shows and people vote on (data/vote.py). A pair is {"prompt": messages,
# "a": str, "b": str}; it may have a "label", P(a over b).


def fits(pair, tok, max_len):
    """Whether both answers of a pair, each behind the prompt, are at most max_len tokens."""
    for text in (pair["a"], pair["b"]):
        prompt, answer = tok.render_answer(pair["prompt"], text)
        if len(prompt) + len(answer) > max_len:
            return False
    return True


def pairs_to_show(rows, tok, max_len, seed, n=60):
    """Labelled pairs of preference rows: of each of the first n prompts the first comparison that fits into
    max_len tokens. Which of its answers is a is drawn, so that one can vote on them."""
    rng, seen, found = random.Random(seed), set(), []
    for row in rows:
        pair = {"prompt": row["prompt"], "a": row["chosen"], "b": row["rejected"], "label": row["label"]}
        prompt = str(row["prompt"])
        if len(found) == n:
            break
        if prompt in seen or not fits(pair, tok, max_len):
            continue
        seen.add(prompt)

        # Half of them the other way round, or the preferred answer would always stand first.
        if rng.random() < 0.5:
            pair |= {"a": row["rejected"], "b": row["chosen"], "label": 1 - row["label"]}
        found.append(pair)
    return found


def with_rewards(pairs, model, tok):
    """The same pairs with a reward model's rewards "r_a" and "r_b" and, where the prompt is the tiny world's,
    with its "family" and the gold "gold_a" and "gold_b"."""
    prompts = [pair["prompt"] for pair in pairs]
    r_a = rewards_of_texts(model, tok, prompts, [pair["a"] for pair in pairs])
    r_b = rewards_of_texts(model, tok, prompts, [pair["b"] for pair in pairs])

    # What gold judges by, such as the right answer, stands in the world's own rows.
    known, out = {str(row["prompt"]): row for row in world.rows("preference")}, []
    for i, pair in enumerate(pairs):
        pair = pair | {"r_a": r_a[i], "r_b": r_b[i]}
        row = known.get(str(pair["prompt"]))
        if row:
            gold_a, gold_b = world.gold([row, row], [pair["a"], pair["b"]])
            pair |= {"family": row["family"], "gold_a": gold_a, "gold_b": gold_b}
        out.append(pair)
    return out


def gold_accuracy(rows, model, tok, max_len):
    """{"gold_accuracy": the share of preference rows of the tiny world in which a reward model prefers the
    answer that gold prefers}, whoever labelled them, of those in which gold sees a difference; {} if it
    sees none."""
    hits = []
    for pair in with_rewards(pairs_to_show(rows, tok, max_len, 0, n=len(rows)), model, tok):
        gap = pair["gold_a"] - pair["gold_b"]
        if gap:
            hits.append((pair["r_a"] > pair["r_b"]) == (gap > 0))
    return {"gold_accuracy": sum(hits) / len(hits)} if hits else {}


def pair_text(pair):
    """The answers of a scored and labelled pair with their rewards, the chosen one first, for samples.txt."""
    sides = ("a", "b") if pair["label"] >= 0.5 else ("b", "a")
    names = ("tie", "tie") if pair["label"] == 0.5 else ("chosen", "rejected")
    lines = []
    for side, name in zip(sides, names):
        text = pair[side].strip().replace("\n", "\n" + " " * 24)
        lines.append(f"{name:9}{pair['r_' + side]:+6.2f}  {text}")
    return "\n       ".join(lines)


# ------------------------------------------------------------------------------------------------------------
# For dpo.py, as ids: (prompt ids, first answer ids, second answer ids, label).


def mismatch(examples, seed, max_len):
    """KTO's examples, each with an answer to a different prompt as its second one, cut at max_len tokens and
    drawn once and for all, so that the reference's log-probs can be kept. InputError: there is one prompt
    only."""
    n, out = len(examples), list(examples)
    order = random.Random(seed).sample(range(n), n)
    for k, i in enumerate(order):
        # The next one in this order that has another prompt.
        prompt, answer, _, label = examples[i]
        shift = 1
        while shift < n and examples[order[(k + shift) % n]][0] == prompt:
            shift += 1
        if shift == n:
            raise InputError("kto: all rows have the same prompt; its reference point needs answers to other "
                             "prompts")
        other = examples[order[(k + shift) % n]][1]
        out[i] = (prompt, answer, other[: max_len - len(prompt)], label)
    return out


def online_pairs(policy, tok, rows, judge, cfg, step):
    """Examples of two new answers of the policy to each row's prompt, compared by judge(rows, texts) ->
    utilities. What cannot be compared (equal answers, neither finished, a tie) is left out; an unfinished
    answer loses."""
    # Two answers to each prompt, side by side, and what the judge thinks of them.
    twice = sample.repeated(rows, 2)
    texts, prompts, answers = sample.sample_answers(policy, tok, [row["prompt"] for row in twice],
                                                    cfg.max_new, seeded(cfg.seed, step))
    utilities, rng, out = judge(twice, texts), random.Random(f"{cfg.seed} {step}"), []
    noise = cfg.noise if cfg.judge == "annotator" else 0.0

    for i in range(0, len(twice), 2):
        first, second = answers[i], answers[i + 1]
        ended = [sample.ended(tok, first), sample.ended(tok, second)]
        if first == second or not any(ended):
            continue
        p = float(ended[0])     # the chance that the first one is preferred
        if all(ended):
            p = world.annotate(utilities[i], utilities[i + 1], noise, rng)
        if p == 1.0:
            out.append((prompts[i], first, second, 1.0))
        elif p == 0.0:
            out.append((prompts[i], second, first, 1.0))
    return out
