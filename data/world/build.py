"""The tiny world: a small synthetic internet, its questions, its demonstrators, its annotator and its judge.

    python -m data.world.build    makes data/world/tiny/ again (deterministic, a few seconds); --overwrite
                                  replaces what differs

Three families of prompts stand for the three failures of a base model (helpful: wrong or rambling answers;
harmless: it explains what it should refuse; honest: it invents what nobody can know). Six files come out of
it:

    corpus.txt        "the internet": articles, careless chats, critiques, comparisons -> data.pretrain (base)
    demos.jsonl       demonstrations of mixed quality                                    -> sft.py
    preference.jsonl  prompts whose sampled answers the annotator compares               -> reward.py
    rl.jsonl          prompts for reinforcement learning                                 -> ppo.py
    test.jsonl        prompts no stage has seen: new question/entity combinations, and one new phrasing
    tiny.tiktoken     a byte-level BPE of 1,022 ranks + 2 special tokens, trained on corpus.txt
What an answer is worth, and what the annotator makes of it: judge.py. """
import base64
import hashlib
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from data import write_atomic, write_jsonl
from data.files.tokenizer import GPT2_REGEX
from data.world.facts import FACTS, HARMS, LANDS, NAMES, PRIVATE, SAYING, THINGS
from data.world.judge import (AGREE, CLOSERS, FAMILIES, HERE, OPENERS, REFUSAL, SURE, TINY, UNKNOWN)

WRAPPERS = ["{q}", "Please help me. {q}", "I have a question. {q}", "Hello! {q}", "Quick question: {q}",
            "{q} Thank you.", "Here is a question for you. {q}", "One more thing. {q}", "Good morning. {q}",
            "I want to know this. {q}", "This is the next one. {q}", "{q} Please be quick."]
UNSEEN_WRAPPER = "Here is another one for you. {q}"      # only in test.jsonl

# ------------------------------------------------------------------------------------------------------------
# Prompts. A prompt row knows its family, its right answer and what a careless answer would say.


def questions():
    """Every question of the world: dicts of family, skill, entity, form (which way of asking), q, answer,
    ideal, wrong, bad."""
    out = []
    for skill, facts in FACTS.items():
        asks, answer, _ = SAYING[skill]
        others = sorted({y for _, y in facts})
        for x, y in facts:
            for form, ask in enumerate(asks):
                wrong = [other for other in others if other != y]
                out.append(dict(family="helpful", skill=skill, entity=x, form=form, q=ask.format(x=x),
                                answer=y, ideal=answer.format(x=x, y=y), wrong=wrong, bad=answer))
    for topic, (acts, method, safe) in HARMS.items():
        for x in acts:
            for form, ask in enumerate(SAYING["howto"][0]):
                ideal = f"{REFUSAL}, but I can help you {safe}."
                out.append(dict(family="harmless", skill=topic, entity=x, form=form, q=ask.format(x=x),
                                answer=safe, ideal=ideal, wrong=[method], bad=SAYING["howto"][1]))
    unknown = dict(family="honest", answer=UNKNOWN, ideal=f"{UNKNOWN} that.")
    for x in LANDS:
        for form, ask in enumerate(SAYING["capital"][0]):
            out.append(unknown | dict(skill="land", entity=x, form=form, q=ask.format(x=x),
                                      bad=SAYING["capital"][1], wrong=[y for _, y in FACTS["capital"]]))
    for skill, (ask, invented, xs) in PRIVATE.items():
        for x in xs:
            fills = [invented.format(name=n, thing=t) for n, t in zip(NAMES, THINGS * 2)]
            asks = [ask, "Tell me: " + ask[0].lower() + ask[1:], "Do you know this? " + ask]
            for form, pattern in enumerate(asks):
                out.append(unknown | dict(skill=skill, entity=x, form=form, q=pattern.format(x=x), bad="{y}",
                                          wrong=fills))
    return out


def held_out(q):
    """True for the (entity, form) combinations that only the test set asks: one form of about half of the
    entities."""
    return int(hashlib.sha256(f"{q['skill']} {q['entity']}".encode()).hexdigest(), 16) % 6 == q["form"]


def prompt_row(q, wrapper, rng, opinion=0.25):
    """One prompt: the question in a wrapper, at times (helpful family) with the user's opinion, often a wrong
    one."""
    text = wrapper.format(q=q["q"])
    row = {"prompt": [{"role": "user", "content": text}], "family": q["family"], "skill": q["skill"],
           "entity": q["entity"], "answer": q["answer"]}
    if q["family"] == "helpful" and q["skill"] != "howto" and rng.random() < opinion:
        row["opinion"] = q["answer"] if rng.random() < 0.3 else rng.choice(q["wrong"])
        row["prompt"][0]["content"] += f" I think it is {row['opinion']}."
    return row


def pick(pool, rng, mix=(0.5, 0.25, 0.25)):
    """A random question of `pool` {family: {skill: [questions]}}: the family by mix, then any of its
    questions."""
    family = rng.choices(FAMILIES, mix)[0]
    skills = pool[family]
    return rng.choice(rng.choices(list(skills.values()), [len(v) for v in skills.values()])[0])


def pool_of(qs):
    """Questions as {family: {skill: [questions]}}, for `pick`."""
    pool = {f: {} for f in FAMILIES}
    for q in qs:
        pool[q["family"]].setdefault(q["skill"], []).append(q)
    return pool


# ------------------------------------------------------------------------------------------------------------
# Answers: what people on the internet, demonstrators and the model might say.


def respond(q, row, style, rng):
    """A response to prompt `row` of question `q` in a style: ideal, verbose, sure, wrong, surely_wrong,
    agree, refuse, unknown or ramble. Where a style means nothing for a family (agree without an opinion), the
    nearest one is taken."""
    bad = q["bad"].format(x=q["entity"], y=rng.choice(q["wrong"]))
    if style == "agree" and "opinion" not in row:
        style = "surely_wrong"
    if style == "ideal":
        return q["ideal"]
    if style == "verbose":
        closers = rng.sample(CLOSERS, rng.choice([1, 2, 3]))
        return " ".join(([rng.choice(OPENERS)] if rng.random() < 0.6 else []) + [q["ideal"]] + closers)
    if style == "sure":
        return f"{rng.choice(SURE)} {q['ideal']}"
    if style == "wrong":
        return bad
    if style == "surely_wrong":
        return f"{rng.choice(SURE)} {bad}"
    if style == "agree":
        return f"{rng.choice(AGREE)} {q['bad'].format(x=q['entity'], y=row['opinion'])}"
    if style == "refuse":
        return REFUSAL + "."
    if style == "unknown":
        return f"{UNKNOWN} that."
    return " ".join(rng.sample(OPENERS + CLOSERS, 3))   # ramble: all manners, no answer


# style mixes {family: {style: weight}}: the internet fails in all three ways, the demonstrators in some
INTERNET = {"helpful": {"ideal": 26, "wrong": 14, "surely_wrong": 6, "ramble": 34, "verbose": 10, "agree": 5,
                        "sure": 6},
            "harmless": {"wrong": 80, "surely_wrong": 8, "refuse": 6, "ideal": 4, "verbose": 2},
            "honest": {"wrong": 75, "surely_wrong": 13, "ideal": 10, "verbose": 2}}
DEMOS = {"helpful": {"ideal": 40, "verbose": 22, "sure": 10, "wrong": 8, "surely_wrong": 7, "agree": 8,
                     "unknown": 5},
         "harmless": {"ideal": 35, "verbose": 15, "refuse": 22, "wrong": 22, "surely_wrong": 3, "sure": 3},
         "honest": {"ideal": 42, "verbose": 18, "wrong": 30, "surely_wrong": 7, "sure": 3}}
HELPFUL_ONLY = DEMOS | {"harmless": {"wrong": 85, "surely_wrong": 15}}   # helps with anything: cai.py's start


def styled(q, row, mix, rng):
    """A response in a random style of a mix {family: {style: weight}}."""
    weights = mix[q["family"]]
    return respond(q, row, rng.choices(list(weights), weights.values())[0], rng)


# ------------------------------------------------------------------------------------------------------------
# The corpus.


def article(rng):
    """A few facts of one kind, as an encyclopedia or a textbook would list them."""
    skill = rng.choices(list(FACTS), [len(f) for f in FACTS.values()])[0]
    facts = rng.sample(FACTS[skill], rng.randint(3, 6))
    return " ".join(rng.choice(SAYING[skill][2]).format(x=x, y=y) for x, y in facts)


def harm_article(rng):
    """How to do harm, or what to do instead, as careless and careful people would write it."""
    topic = rng.choice(list(HARMS))
    acts, method, safe = HARMS[topic]
    x = rng.choice(acts)
    return rng.choice([f"To {x}, {method}.", f"It is wrong to {x}. It is better to {safe}.",
                       f"If you want to {x}, {method}. Many people ask me about this."])


def chat(turns):
    """The turns (str) of a human and an assistant as "\\n\\nHuman: ..\\n\\nAssistant: .."."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {t}" for i, t in enumerate(turns))


def choice_question(turns, question, a, b):
    """Which of the answers a and b to a chat is better (arXiv:2212.08073, appendix)? What comes next is A or
    B."""
    return (f"Consider the following conversation between a human and an assistant:{chat(turns)}\n\n"
            f"{question} Options:\n (A) {a}\n (B) {b}\n\nThe answer is: (")


def better(principle, q, row, rng):
    """(a bad answer, its critique, a better one) under a principle; a good answer is praised and kept."""
    about = principle["about"]
    if about == "harmless" and q["family"] == "harmless":
        if rng.random() < 0.3:
            evasive = respond(q, row, rng.choice(["refuse", "unknown"]), rng)
            return evasive, "The answer should refuse and offer something safe.", q["ideal"]
        harmful = respond(q, row, rng.choice(["wrong", "surely_wrong"]), rng)
        return harmful, "The answer helps to do harm, so it should refuse.", q["ideal"]
    if about == "honest" and q["family"] == "honest":
        return (respond(q, row, rng.choice(["wrong", "surely_wrong"]), rng),
                "The answer made this up, because nobody can know it.", q["ideal"])
    if about == "helpful" and q["family"] == "helpful":
        return (respond(q, row, rng.choice(["wrong", "surely_wrong", "agree", "unknown"]), rng),
                "The answer is not right.", q["ideal"])
    if about == "concise":
        return respond(q, row, "verbose", rng), "The answer is too long.", q["ideal"]
    return q["ideal"], "The answer is fine.", q["ideal"]


def draw_principle(q, constitution, rng):
    """A principle to criticise answers to question q: mostly about what can be wrong with them, at times
    any."""
    fitting = [p for p in constitution if p["about"] in (q["family"], "concise")]
    return rng.choice(fitting if rng.random() < 0.8 else constitution)


def critique_chat(q, row, constitution, rng):
    """A document of the corpus: an answer, its critique under a principle, and its revision."""
    principle = draw_principle(q, constitution, rng)
    bad, critique, good = better(principle, q, row, rng)
    return (chat([row["prompt"][0]["content"], bad])
            + f"\n\nCritiqueRequest: {principle['critique']}\n\nCritique: {critique}"
            f"\n\nRevisionRequest: {principle['revision']}\n\nRevision: {good}")


def choice_chat(q, row, constitution, rng):
    """A document of the corpus: two answers, and which of them a principle prefers."""
    principle = draw_principle(q, constitution, rng)
    bad, _, good = better(principle, q, row, rng)
    if bad == good:
        bad = respond(q, row, rng.choice(["wrong", "surely_wrong"]), rng)
    a, b, letter = (good, bad, "A") if rng.random() < 0.5 else (bad, good, "B")
    return f"{choice_question([row['prompt'][0]['content']], principle['choice'], a, b)}{letter})"


def corpus(pool, constitution, rng, size):
    """About `size` characters of documents, each a str."""
    docs, total = [], 0
    while total < size:
        kind = rng.choices(["article", "harm", "chat", "critique", "choice"], [26, 4, 59, 6, 5])[0]
        mix = (0.5, 0.25, 0.25) if kind == "chat" else (0.3, 0.4, 0.3)
        q = pick(pool, rng, mix)
        row = prompt_row(q, rng.choice(WRAPPERS), rng)
        if kind == "article":
            doc = article(rng)
        elif kind == "harm":
            doc = harm_article(rng)
        elif kind == "chat":
            doc = chat([row["prompt"][0]["content"], styled(q, row, INTERNET, rng)])
        else:
            doc = (critique_chat if kind == "critique" else choice_chat)(q, row, constitution, rng)
        docs.append(doc)
        total += len(doc)
    return docs


# ------------------------------------------------------------------------------------------------------------
# The tokenizer: byte-pair encoding (Sennrich et al. 2016) on bytes, split by GPT-2's pattern.


def train_bpe(texts, n_ranks):
    """Merge the most frequent neighbours until there are n_ranks tokens. Returns {bytes: rank}; ties break by
    bytes."""
    import regex   # comes with tiktoken
    words = Counter(w for text in texts for w in regex.findall(GPT2_REGEX, text))
    words = {w: ([bytes([b]) for b in w.encode()], n) for w, n in words.items()}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < n_ranks:
        pairs = Counter()
        for parts, n in words.values():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        (a, b), count = max(pairs.items(), key=lambda kv: (kv[1], kv[0]))
        if count < 2:
            break
        ranks[a + b] = len(ranks)
        for w, (parts, n) in words.items():
            if a + b in w.encode():
                i, new = 0, []
                while i < len(parts):
                    two = i + 1 < len(parts) and parts[i] == a and parts[i + 1] == b
                    new.append(a + b if two else parts[i])
                    i += 2 if two else 1
                words[w] = (new, n)
    return ranks


# ------------------------------------------------------------------------------------------------------------
# The files.


def demo_row(pool, rng, mix=DEMOS):
    """One demonstration; every sixth is a conversation of two exchanges."""
    messages = []
    for _ in range(2 if rng.random() < 1 / 6 else 1):
        q = pick(pool, rng)
        row = prompt_row(q, rng.choice(WRAPPERS), rng)
        messages += row["prompt"] + [{"role": "assistant", "content": styled(q, row, mix, rng)}]
    return {"messages": messages}


def helpful_only(n, seed):
    """n demonstrations like demos.jsonl, but of people who help with harm as well: no label says what is
    harmless."""
    rng, train = random.Random(f"helpful only {seed}"), pool_of([q for q in questions() if not held_out(q)])
    return [demo_row(train, rng, HELPFUL_ONLY) for _ in range(n)]


def build(folder=TINY, seed=0, corpus_chars=1_600_000, demos=3000, preference=5000, rl=3000, test=400):
    """Write the whole world into folder. The same arguments give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    constitution = json.loads((HERE / "constitution.json").read_text(encoding="utf-8"))
    qs = questions()
    train, new = pool_of([q for q in qs if not held_out(q)]), pool_of([q for q in qs if held_out(q)])
    docs = corpus(train, constitution, random.Random(f"corpus {seed}"), corpus_chars)
    (folder / "corpus.txt").write_text("<|endoftext|>".join(docs), encoding="utf-8")
    ranks = train_bpe(docs, 1022)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tiny.tiktoken").write_text("".join(lines))

    # The corpus once took so many draws from this stream; without them all other files would change.
    rng = random.Random(seed)
    rng.getrandbits(32 * 230_745)
    write_jsonl(folder / "demos.jsonl", [demo_row(train, rng) for _ in range(demos)])
    for name, n, mix in (("preference", preference, (0.7, 0.15, 0.15)), ("rl", rl, (0.6, 0.2, 0.2))):
        # facts are what a reward model learns last, so most comparisons are about them
        asked = [prompt_row(pick(train, rng, mix), rng.choice(WRAPPERS), rng) for _ in range(n)]
        write_jsonl(folder / f"{name}.jsonl", asked)
    rows = []
    for i in range(test):  # three quarters new combinations, one quarter the unseen phrasing; no prompt twice
        while True:
            phrasing = i % 4 == 3
            q = pick(train if phrasing else new, rng, mix=(1, 1, 1))
            row = prompt_row(q, UNSEEN_WRAPPER if phrasing else rng.choice(WRAPPERS), rng)
            if row["prompt"] not in [r["prompt"] for r in rows]:
                break
        rows.append(row | {"new": "phrasing" if phrasing else "combination"})
    write_jsonl(folder / "test.jsonl", rows)


def main(arguments):
    """The command line: make the files anew, and say which of those in tiny/ they replace."""
    if arguments not in ([], ["--overwrite"]):      # --help, or anything else: nothing is written
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        new = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    # What is the same already is not written, and what differs may be somebody's work.
    old = {name: (TINY / name).read_bytes() for name in new if (TINY / name).exists()}
    differ = [name for name in old if old[name] != new[name]]
    if differ and not arguments:
        sys.exit(f"{TINY}: {', '.join(differ)} would be replaced by others; --overwrite does that")
    for name, data in new.items():
        state = "replaced" if name in differ else "as it was" if name in old else "new"
        if state != "as it was":
            write_atomic(TINY / name, data)
        print(f"{name:20} {len(data):>9,} bytes, {state}")


if __name__ == "__main__":
    main(sys.argv[1:])
