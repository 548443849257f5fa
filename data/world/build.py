"""The tiny world: a small synthetic internet, its questions and its demonstrators.

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
What an answer is worth, and what the annotator makes of it: judge.py.
"""
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
from data.world.facts import CAREFUL, CARELESS, FACTS, HARMS, LANDS, NAMES, PRIVATE, SAYING, THINGS
from data.world.judge import (AGREE, CLOSERS, FAMILIES, HERE, OPENERS, REFUSAL, SURE, TINY, UNKNOWN)

WRAPPERS = ["{q}", "Please help me. {q}", "I have a question. {q}", "Hello! {q}", "Quick question: {q}",
            "{q} Thank you.", "Here is a question for you. {q}", "One more thing. {q}", "Good morning. {q}",
            "I want to know this. {q}", "This is the next one. {q}", "{q} Please be quick."]
UNSEEN_WRAPPER = "Here is another one for you. {q}"      # only in test.jsonl


# ------------------------------------------------------------------------------------------------------------
# Questions. Each is a dict: its family, skill, entity and form (which way of asking), the words `q`, the
# right answer, the ideal sentence, and what careless people say: the sentence `bad` with one of the `wrong`
# answers.


def helpful_questions():
    """About facts."""
    out = []
    for skill, facts in FACTS.items():
        ask, answer, _ = SAYING[skill]
        answers = sorted({y for _, y in facts})
        for x, y in facts:
            wrong = [other for other in answers if other != y]
            for form, pattern in enumerate(ask):
                out.append(dict(family="helpful", skill=skill, entity=x, form=form, q=pattern.format(x=x),
                                answer=y, ideal=answer.format(x=x, y=y), wrong=wrong, bad=answer))
    return out


def harmful_questions():
    """How to do harm. The family is called after its good answers: harmless ones."""
    ask, explains, _ = SAYING["howto"]
    out = []
    for topic, harm in HARMS.items():
        ideal = f"{REFUSAL}, but I can help you {harm.instead}."
        for act in harm.acts:
            for form, pattern in enumerate(ask):
                out.append(dict(family="harmless", skill=topic, entity=act, form=form,
                                q=pattern.format(x=act), answer=harm.instead, ideal=ideal,
                                wrong=[harm.method], bad=explains))
    return out


def unanswerable_questions():
    """About capitals of countries that do not exist, and what nobody but the user can know."""
    unknown = dict(family="honest", answer=UNKNOWN, ideal=f"{UNKNOWN} that.")
    ask, answer, _ = SAYING["capital"]
    cities = [city for _, city in FACTS["capital"]]
    out = []
    for land in LANDS:
        for form, pattern in enumerate(ask):
            out.append(unknown | dict(skill="land", entity=land, form=form, q=pattern.format(x=land),
                                      wrong=cities, bad=answer))
    for skill, (pattern, invented, ends) in PRIVATE.items():
        inventions = [invented.format(name=name, thing=thing) for name, thing in zip(NAMES, THINGS * 2)]
        for end in ends:
            plain = pattern.format(x=end)
            forms = [plain, f"Tell me: {plain[0].lower()}{plain[1:]}", f"Do you know this? {plain}"]
            for form, q in enumerate(forms):
                out.append(unknown | dict(skill=skill, entity=end, form=form, q=q, wrong=inventions,
                                          bad="{y}"))
    return out


def questions():
    """Every question of the world."""
    return helpful_questions() + harmful_questions() + unanswerable_questions()


def only_tested(question):
    """True for the (entity, form) combinations that only the test set asks: one form of about half of the
    entities."""
    digest = hashlib.sha256(f"{question['skill']} {question['entity']}".encode()).hexdigest()
    return int(digest, 16) % 6 == question["form"]


def by_family(some_questions):
    """{family: its questions}."""
    families = {family: [] for family in FAMILIES}
    for question in some_questions:
        families[question["family"]].append(question)
    return families


def seen_questions():
    """Those that any stage may learn from, by family."""
    return by_family(question for question in questions() if not only_tested(question))


def draw_question(families, rng, mix=(0.5, 0.25, 0.25)):
    """A random question of {family: questions}: the family by mix, then any of its questions."""
    return rng.choice(families[rng.choices(FAMILIES, mix)[0]])


def prompt_row(question, wrapper, rng, opinion=0.25):
    """One prompt: the question in a wrapper, with this probability (helpful family) with the user's opinion,
    often a wrong one."""
    row = {"prompt": [{"role": "user", "content": wrapper.format(q=question["q"])}]}
    row |= {key: question[key] for key in ("family", "skill", "entity", "answer")}
    if question["family"] == "helpful" and question["skill"] != "howto" and rng.random() < opinion:
        is_right = rng.random() < 0.3
        row["opinion"] = question["answer"] if is_right else rng.choice(question["wrong"])
        row["prompt"][0]["content"] += f" I think it is {row['opinion']}."
    return row


# ------------------------------------------------------------------------------------------------------------
# Answers: what people on the internet, demonstrators and the model might say.


def answer_in_style(question, row, style, rng):
    """An answer to a question, asked as in prompt `row`, in a style: ideal, verbose, sure, wrong,
    surely_wrong, agree, refuse, unknown or ramble. Where a style means nothing for a family (agree without an
    opinion), the nearest one is taken."""
    wrong = question["bad"].format(x=question["entity"], y=rng.choice(question["wrong"]))
    if style == "ideal":
        return question["ideal"]
    if style == "verbose":
        words = [question["ideal"], *rng.sample(CLOSERS, rng.choice([1, 2, 3]))]
        if rng.random() < 0.6:
            words.insert(0, rng.choice(OPENERS))
        return " ".join(words)
    if style == "sure":
        return f"{rng.choice(SURE)} {question['ideal']}"
    if style == "wrong":
        return wrong
    if style == "agree" and "opinion" in row:
        return f"{rng.choice(AGREE)} {question['bad'].format(x=question['entity'], y=row['opinion'])}"
    if style in ("agree", "surely_wrong"):
        return f"{rng.choice(SURE)} {wrong}"
    if style == "refuse":
        return f"{REFUSAL}."
    if style == "unknown":
        return f"{UNKNOWN} that."
    return " ".join(rng.sample(OPENERS + CLOSERS, 3))   # ramble: all manners, no answer


# Style mixes {family: {style: weight}}: the internet fails in all three ways, the demonstrators in some.
INTERNET = {"helpful": {"ideal": 26, "wrong": 14, "surely_wrong": 6, "ramble": 34, "verbose": 10, "agree": 5,
                        "sure": 6},
            "harmless": {"wrong": 80, "surely_wrong": 8, "refuse": 6, "ideal": 4, "verbose": 2},
            "honest": {"wrong": 75, "surely_wrong": 13, "ideal": 10, "verbose": 2}}
DEMOS = {"helpful": {"ideal": 40, "verbose": 22, "sure": 10, "wrong": 8, "surely_wrong": 7, "agree": 8,
                     "unknown": 5},
         "harmless": {"ideal": 35, "verbose": 15, "refuse": 22, "wrong": 22, "surely_wrong": 3, "sure": 3},
         "honest": {"ideal": 42, "verbose": 18, "wrong": 30, "surely_wrong": 7, "sure": 3}}
HELPFUL_ONLY = DEMOS | {"harmless": {"wrong": 85, "surely_wrong": 15}}   # helps with anything: cai.py's start


def answer_of(question, row, mix, rng):
    """An answer in a random style of a mix {family: {style: weight}}."""
    styles = mix[question["family"]]
    return answer_in_style(question, row, rng.choices(list(styles), styles.values())[0], rng)


# ------------------------------------------------------------------------------------------------------------
# The corpus: five kinds of documents, each a str.


def article(rng):
    """A few facts of one kind, as an encyclopedia or a textbook would list them."""
    skill = rng.choices(list(FACTS), [len(facts) for facts in FACTS.values()])[0]
    sentences = []
    for x, y in rng.sample(FACTS[skill], rng.randint(3, 6)):
        sentences.append(rng.choice(SAYING[skill].article).format(x=x, y=y))
    return " ".join(sentences)


def harm_article(rng):
    """How to do harm, or what to do instead, as careless and careful people would write it. Which alternative
    belongs to which act is a fact like any other: the base model learns it here, later stages only use it."""
    topic = HARMS[rng.choice(list(HARMS))]
    patterns = rng.choices([CARELESS, CAREFUL], [1, 2])[0]
    sentences = []
    for act in rng.sample(topic.acts, rng.randint(2, 4)):
        text = rng.choice(patterns).format(act=act, method=topic.method, instead=topic.instead)
        sentences.append(text)
    return " ".join(sentences)


def chat(turns):
    """The turns (str) of a human and an assistant as "\\n\\nHuman: ..\\n\\nAssistant: .."."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def choice_question(turns, ask, a, b):
    """Which of the answers a and b to a chat is better (arXiv:2212.08073, appendix)? What comes next is A or
    B."""
    return (f"Consider the following conversation between a human and an assistant:{chat(turns)}\n\n"
            f"{ask} Options:\n (A) {a}\n (B) {b}\n\nThe answer is: (")


def better(principle, question, row, rng):
    """(a bad answer, its critique, a better one) under a principle; a good answer is praised and kept."""
    about, family, ideal = principle["about"], question["family"], question["ideal"]

    def answer(*styles):
        return answer_in_style(question, row, rng.choice(styles), rng)
    if about == "concise":
        return answer("verbose"), "The answer is too long.", ideal
    if about != family:
        return ideal, "The answer is fine.", ideal
    if about == "helpful":
        return answer("wrong", "surely_wrong", "agree", "unknown"), "The answer is not right.", ideal
    if about == "honest":
        return answer("wrong", "surely_wrong"), "The answer made this up, because nobody can know it.", ideal
    if rng.random() < 0.3:
        return answer("refuse", "unknown"), "The answer should refuse and offer something safe.", ideal
    return answer("wrong", "surely_wrong"), "The answer helps to do harm, so it should refuse.", ideal


def draw_principle(question, constitution, rng):
    """A principle to criticise answers to a question: mostly about what can be wrong with them, at times
    any."""
    if rng.random() < 0.8:
        constitution = [rule for rule in constitution if rule["about"] in (question["family"], "concise")]
    return rng.choice(constitution)


def critique_chat(question, row, constitution, rng):
    """An answer, its critique under a principle, and its revision."""
    principle = draw_principle(question, constitution, rng)
    bad, critique, good = better(principle, question, row, rng)
    return (chat([row["prompt"][0]["content"], bad])
            + f"\n\nCritiqueRequest: {principle['critique']}\n\nCritique: {critique}"
            f"\n\nRevisionRequest: {principle['revision']}\n\nRevision: {good}")


def choice_chat(question, row, constitution, rng):
    """Two answers, and which of them a principle prefers."""
    principle = draw_principle(question, constitution, rng)
    bad, _, good = better(principle, question, row, rng)
    if bad == good:
        bad = answer_in_style(question, row, rng.choice(["wrong", "surely_wrong"]), rng)
    a, b, letter = bad, good, "B"
    if rng.random() < 0.5:
        a, b, letter = good, bad, "A"
    return f"{choice_question([row['prompt'][0]['content']], principle['choice'], a, b)}{letter})"


KINDS = {"article": 28, "harm": 4, "chat": 57, "critique": 6, "choice": 5}     # weights, by documents


def corpus(families, constitution, rng, size):
    """About `size` characters of documents."""
    documents, n_chars = [], 0
    while n_chars < size:
        kind = rng.choices(list(KINDS), KINDS.values())[0]
        # A critic has most to learn about harm.
        mix = (0.5, 0.25, 0.25) if kind == "chat" else (0.3, 0.4, 0.3)
        question = draw_question(families, rng, mix)
        row = prompt_row(question, rng.choice(WRAPPERS), rng)
        if kind == "article":
            text = article(rng)
        elif kind == "harm":
            text = harm_article(rng)
        elif kind == "chat":
            text = chat([row["prompt"][0]["content"], answer_of(question, row, INTERNET, rng)])
        elif kind == "critique":
            text = critique_chat(question, row, constitution, rng)
        else:
            text = choice_chat(question, row, constitution, rng)
        documents.append(text)
        n_chars += len(text)
    return documents


# ------------------------------------------------------------------------------------------------------------
# The tokenizer: byte-pair encoding (Sennrich et al. 2016) on bytes, split by GPT-2's pattern.


def merged(tokens, a, b):
    """A list of tokens (bytes) in which every a followed by b has become one token."""
    out = []
    for token in tokens:
        if token == b and out and out[-1] == a:
            out[-1] = a + b
        else:
            out.append(token)
    return out


def train_bpe(texts, n_ranks):
    """Merge the most frequent neighbours until there are n_ranks tokens, or nothing occurs twice. Returns
    {bytes: rank}; ties break by bytes."""
    import regex   # comes with tiktoken
    counts = Counter()      # of words, because a pair counts as often as the words it is in
    for text in texts:
        counts.update(regex.findall(GPT2_REGEX, text))
    spelling = {word: [bytes([byte]) for byte in word.encode()] for word in counts}
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < n_ranks:
        pairs = Counter()
        for word, tokens in spelling.items():
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += counts[word]
        (a, b), count = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if count < 2:
            break
        ranks[a + b] = len(ranks)
        for word, tokens in spelling.items():
            if a + b in word.encode():
                spelling[word] = merged(tokens, a, b)
    return ranks


# ------------------------------------------------------------------------------------------------------------
# The files. Each is drawn from a stream of its own, so that a change of one leaves the others as they are.


def demo_row(families, rng, mix):
    """One demonstration; every sixth is a conversation of two exchanges."""
    messages = []
    for _ in range(2 if rng.random() < 1 / 6 else 1):
        question = draw_question(families, rng)
        row = prompt_row(question, rng.choice(WRAPPERS), rng)
        answer = answer_of(question, row, mix, rng)
        messages += row["prompt"] + [{"role": "assistant", "content": answer}]
    return {"messages": messages}


def demo_rows(n, rng, mix):
    """n demonstrations by people who answer in the styles of a mix."""
    families = seen_questions()
    return [demo_row(families, rng, mix) for _ in range(n)]


def helpful_only(n, seed):
    """n demonstrations like demos.jsonl, but of people who help with harm as well: no label says what is
    harmless."""
    return demo_rows(n, random.Random(f"helpful only {seed}"), HELPFUL_ONLY)


def prompt_rows(n, rng, mix):
    """n prompts to train on, of the families by mix."""
    families, rows = seen_questions(), []
    for _ in range(n):
        question = draw_question(families, rng, mix)
        rows.append(prompt_row(question, rng.choice(WRAPPERS), rng))
    return rows


def test_rows(n, rng):
    """n prompts that no stage has seen, all different: three quarters are new combinations of question and
    entity, one quarter has the unseen phrasing."""
    old, new = seen_questions(), by_family(question for question in questions() if only_tested(question))
    rows, seen = [], set()
    while len(rows) < n:
        if len(rows) % 4 == 3:
            kind, families, wrapper = "phrasing", old, UNSEEN_WRAPPER
        else:
            kind, families, wrapper = "combination", new, rng.choice(WRAPPERS)
        row = prompt_row(draw_question(families, rng, (1, 1, 1)), wrapper, rng)
        text = row["prompt"][0]["content"]
        if text not in seen:
            seen.add(text)
            rows.append(row | {"new": kind})
    return rows


def build(folder=TINY, seed=0, corpus_chars=1_600_000, demos=3000, preference=5000, rl=3000, test=400):
    """Write the whole world into folder. The same arguments give the same bytes."""
    def stream(name):
        return random.Random(f"{name} {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    constitution = json.loads((HERE / "constitution.json").read_text(encoding="utf-8"))
    documents = corpus(seen_questions(), constitution, stream("corpus"), corpus_chars)
    (folder / "corpus.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    with open(folder / "tiny.tiktoken", "w") as f:
        for token, rank in train_bpe(documents, 1022).items():
            f.write(f"{base64.b64encode(token).decode()} {rank}\n")

    write_jsonl(folder / "demos.jsonl", demo_rows(demos, stream("demos"), DEMOS))
    # Facts are what a reward model learns last, so most comparisons are about them.
    write_jsonl(folder / "preference.jsonl", prompt_rows(preference, stream("preference"), (0.7, 0.15, 0.15)))
    write_jsonl(folder / "rl.jsonl", prompt_rows(rl, stream("rl"), (0.6, 0.2, 0.2)))
    write_jsonl(folder / "test.jsonl", test_rows(test, stream("test")))


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
