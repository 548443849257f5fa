"""Process rewards: where the steps of an answer end, what is said of them, where it arrives; and runs with
them."""
import json
import math
import os
import random
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import InputError, process, report, world
from data.files import formats
from data.files.checkpoint import load, save
from data.parallel import in_chunks
from data.rewards import Scorer, encode_answers, rewards_of_texts
from data.steps import (ends_of_steps, implicit_logits, implicit_rewards, last_tokens, rewards_at_tokens,
                        step_logits, step_mask, steps_of)
from data.files.tokenizer import Tokenizer, tokenizer_from_ranks
from data.world import build
from model import GPT, GPTConfig, pad_batch, token_logprobs
from test_scripts import fails, log_of, result_of, user, write

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")
TOK = tokenizer_from_ranks(world.TINY / "tiny.tiktoken")
V = TOK.vocab_size


# ------------------------------------------------------------------------------------------------------------
# Where steps end.


@pytest.mark.parametrize("text, steps", [
    ("It is Paris. I hope this helps!", ["It is Paris.", " I hope this helps!"]),
    (" It is 3.5 or so... Sure?! Yes ", [" It is 3.5 or so...", " Sure?!", " Yes"]),
    ("no end", ["no end"]), (". .", [".", " ."]), ("", []), ("  \n ", []),
    ("Step 1: 3 + 2 = 5. So 5.\n\nStep 2: 5.  \n The answer is: 5\n",
     ["Step 1: 3 + 2 = 5. So 5.", "\n\nStep 2: 5.", "  \n The answer is: 5"]),
    ("\nOne line. Two sentences.\n", ["\nOne line.", " Two sentences."]),
    ("Das ist schön. Größe.", ["Das ist schön.", " Größe."])])
def test_steps_are_lines_or_sentences(text, steps):
    assert steps_of(text) == steps and "".join(steps) == text.rstrip()


def cut_at_random(text, rng):
    """A tokenizer that cuts the bytes of a text anywhere, and the ids of the pieces, an EOS behind them."""
    data, pieces = text.encode(), []
    while data:
        n = rng.choice([1, 1, 2, 3, 5, 9])
        pieces.append(data[:n])
        data = data[n:]
    tok = SimpleNamespace(bytes_of=dict(enumerate(pieces)), eos_ids={900})
    tok.byte_counts = partial(Tokenizer.byte_counts, tok)
    return tok, [*range(len(pieces)), 900]


def test_a_steps_last_token_holds_its_last_character():
    """Against a search for every single character: tokens that span two steps, characters that span two
    tokens."""
    rng, spanned, split = random.Random(0), 0, 0
    for _ in range(2000):
        words = rng.choices(["Ja.", "é!", "Größe", "3.5", "…", "so?!", "\n", " "], k=rng.randint(1, 9))
        text = rng.choice(["", " "]) + rng.choice([" ", "", "\n"]).join(words)
        tok, answer = cut_at_random(text, rng)
        holder = []     # of each byte
        for number, piece in tok.bytes_of.items():
            holder += [number] * len(piece)
        steps, at, want = steps_of(text), 0, []
        for step in steps:
            at += len(step)                     # the characters up to the end of the step
            last = len(text[:at].encode()) - 1
            want.append(holder[last])
            spanned += any(h == holder[last] and text.encode()[i:i + 1].strip()
                           for i, h in enumerate(holder) if i > last)
            split += len(text[at - 1].encode()) > 1 and holder[last - 1] != holder[last]
        want = [*want[:-1], len(answer) - 1]    # the last one ends with the answer, at its EOS
        prompt = [5, 6][: rng.randint(0, 2)]
        ids, mask = (torch.tensor([prompt + answer + [7, 7]]),
                     torch.zeros(1, len(prompt) + len(answer) + 2).bool())
        mask[0, len(prompt): len(prompt) + len(answer)] = True
        found = step_mask(tok, ids, mask)[0].nonzero()[:, 0].tolist()
        assert found == sorted({len(prompt) + t for t in want}), (text, tok.bytes_of)
    assert spanned > 100 and split > 100


def test_given_steps_end_where_found_ones_do():
    """The labels of a data file are read at the same tokens as the rewards of PPO arrive."""
    for text in ("I am absolutely sure. It is Cairo. Have a very nice day.", "a b\nc. d\n\ne",
                 "é! ü?", "no end"):
        _, answer = TOK.render_answer(user("q"), text)
        steps = steps_of(text)
        data = b"".join(TOK.bytes_of.get(i, b"") for i in answer)
        assert process.ends_of_given(TOK, answer, steps) == ends_of_steps(data)
    # Others than would be found, with white space behind them.
    _, answer = TOK.render_answer(user("q"), "a. b. c\nd")
    at = last_tokens(TOK, answer, process.ends_of_given(TOK, answer, ["a. b. ", "c\nd"]))
    assert TOK.decode(answer[: at[0] + 1]) == " a. b." and answer[at[1]] == TOK.eos_id


# ------------------------------------------------------------------------------------------------------------
# What is said of steps, and where it arrives.


def random_model(seed, process=False, reward_mean=0.0, **more):
    """A small model over the tiny world's tokens, with large random weights."""
    model = GPT(GPTConfig(vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, n_inner=32, max_len=64,
                          head_dim=8, **more))
    model.process, model.reward_mean = process, reward_mean
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4 + (1 if p.dim() == 1 else 0))
    return model.requires_grad_(False)


SAID = ["It is Paris. I hope this helps you. Bye.", "It is Paris.", "a\nb c\nd", "", "Yes! Yes"]


def ends_by_hand(pieces):
    """The numbers of the tokens (texts, without the EOS) at which steps end: those with the last character of
    a line, or with a mark before a space where there is one line; and the EOS."""
    text, lines = "".join(pieces), "".join(pieces).strip().count("\n")
    holder, found = [], set()
    for n, piece in enumerate(pieces):
        holder += [n] * len(piece)
    for i, char in enumerate(text):
        is_line_end = lines and char.strip() and not text[i + 1:].split("\n")[0].strip()
        is_sentence_end = not lines and char in ".!?" and text[i + 1: i + 2].isspace()
        if text[i + 1:].strip() and (is_line_end or is_sentence_end):
            found.add(holder[i])
    return [*sorted(found), len(pieces)]


def batch(texts, pad=3):
    """ids and mask (B, T) of answers to prompts of several lengths, the padding being any token; and the
    positions of the last tokens of their steps, by hand."""
    rows, starts, ends = [], [], []
    for n, text in enumerate(texts):
        prompt, answer = TOK.render_answer(user("Why? " * (n + 1)), text)
        rows.append(prompt + answer)
        starts.append(len(prompt))
        ends.append([len(prompt) + t for t in ends_by_hand([TOK.decode([i]) for i in answer[:-1]])])
    ids, real = pad_batch(rows, pad)
    return ids, real & (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]), ends


def test_logits_and_rewards_arrive_at_the_last_token_of_each_step():
    """In loops, each answer alone, in float64 sums."""
    model = random_model(0, scalar_head=True, process=True)
    model.reward_mean = -1.25
    ids, mask, ends = batch(SAID)
    assert [len(at) for at in ends] == [3, 1, 3, 1, 2]
    logits, rewards = step_logits(model, TOK, ids, mask), rewards_at_tokens(model, TOK, ids, mask)
    for b, at in enumerate(ends):
        row = ids[b, : at[-1] + 1]
        z = (model(row[None])[0] @ model.score.weight[0]).double().numpy()      # no mean in it
        for t in range(ids.shape[1]):
            if t in at:
                want = -np.log1p(np.exp(-z[t])) + (1.25 if t == at[-1] else 0)
                assert logits[b, t].item() == pytest.approx(z[t], abs=1e-4)
                assert rewards[b, t].item() == pytest.approx(want, abs=1e-4)
            else:
                assert logits[b, t] == math.inf and rewards[b, t] == 0

    # A model of whole answers: all of it at the last token.
    model.process = False
    rewards = rewards_at_tokens(model, TOK, ids, mask)
    for b, at in enumerate(ends):
        z = (model(ids[b, : at[-1] + 1][None])[0, -1] @ model.score.weight[0]).item()
        assert rewards[b, at[-1]].item() == pytest.approx(z + 1.25, abs=1e-4)
        assert rewards[b].count_nonzero() == 1


def test_implicit_rewards_are_sums_of_log_ratios():
    """Over the tokens of each step, the EOS being one of the last; together the reward that DPO gives the
    answer."""
    policy, reference = random_model(1), random_model(2)
    ids, mask, ends = batch(SAID)
    logits = implicit_logits(policy, reference, 0.3, TOK, ids, mask)
    rewards = implicit_rewards(policy, reference, 0.3, TOK, ids, mask)
    ratio = 0.3 * (token_logprobs(policy, ids, mask) - token_logprobs(reference, ids, mask)).double()
    for b, at in enumerate(ends):
        start = int(mask[b].nonzero()[0])
        for end in at:
            assert rewards[b, end].item() == pytest.approx(ratio[b, start: end + 1].sum().item(), abs=1e-4)
            assert logits[b, end] == rewards[b, end] != 0
            start = end + 1
        assert logits[b].isfinite().sum() == len(at) == rewards[b].count_nonzero()
    torch.testing.assert_close(rewards.sum(1).double(), ratio.sum(1), atol=1e-4, rtol=0)


def test_padding_and_company_change_nothing():
    """Other padding, more of it, rows alone, some rows at a time as in PPO; and texts instead of tokens."""
    model = random_model(0, scalar_head=True, process=True, reward_mean=0.5)
    policy, reference = random_model(1), random_model(2)
    ids, mask, _ = batch(SAID)
    for read in (partial(step_logits, model, TOK), partial(rewards_at_tokens, model, TOK),
                 partial(implicit_rewards, policy, reference, 0.3, TOK)):
        want = read(ids, mask)
        other = torch.cat([torch.where(mask | (ids != 3), ids, 11), torch.full((5, 4), 8)], 1)
        wide = torch.cat([mask, torch.zeros(5, 4, dtype=torch.bool)], 1)
        torch.testing.assert_close(read(other, wide)[:, : ids.shape[1]], want, atol=1e-4, rtol=0)
        for b in range(5):
            torch.testing.assert_close(read(ids[b: b + 1], mask[b: b + 1])[0], want[b], atol=1e-4, rtol=0)
        torch.testing.assert_close(in_chunks(read, ids, mask, 2), want, atol=1e-4, rtol=0)
        prompts = [user("Why? " * (n + 1)) for n in range(5)]
        by_text = in_chunks(read, *encode_answers(TOK, prompts, SAID, model.cfg.max_len, "cpu"), 2)
        torch.testing.assert_close(by_text, want, atol=1e-4, rtol=0)


def test_step_loss_against_numpy():
    """Hard and soft labels; huge logits stay finite; the optimum is the label."""
    rng = np.random.default_rng(0)
    z, y = 4 * rng.normal(size=300), rng.choice([0.0, 1.0, 0.5, 0.25], 300)
    want = -y * np.log(1 / (1 + np.exp(-z))) - (1 - y) * np.log(1 - 1 / (1 + np.exp(-z)))
    np.testing.assert_allclose(process.step_loss(torch.tensor(z), torch.tensor(y)).numpy(), want, rtol=1e-9)
    huge = process.step_loss(torch.tensor([900.0, -900.0]), torch.tensor([0.0, 1.0]))
    assert huge.tolist() == [900, 900]
    z = torch.tensor(math.log(0.25 / 0.75), dtype=torch.float64, requires_grad=True)
    process.step_loss(z, torch.tensor(0.25)).backward()
    assert abs(z.grad) < 1e-7


def test_errors_found():
    """Only the first wrong step counts; needless steps (1/2) neither count as found nor hide it."""
    wrong = [([0.9, 0.1], [1, 0]), ([0.1, 0.1], [0, 0]), ([0.2, 0.9], [1, 0]), ([0.9, 0.9, 0.1], [1, 0, 0]),
             ([0.1, 0.9, 0.4], [0.5, 1, 0])]
    assert process.errors_found(wrong) == {"first_error": 3 / 5}
    right = [([0.9, 0.6], [1, 1]), ([0.4, 0.6], [0.5, 1]), ([0.4], [1])]
    assert process.errors_found(wrong[:1] + right) == {"first_error": 1, "no_error": 2 / 3}


# ------------------------------------------------------------------------------------------------------------
# The tiny world's labels.


def row_of(skill, entity):
    q = next(q for q in build.questions() if (q["skill"], q["entity"]) == (skill, entity))
    return build.prompt_row(q, "{q}", random.Random(0), opinion=0)


@pytest.mark.parametrize("skill, entity, text, values", [
    ("capital", "Japan", "It is Tokyo.", [1]),
    ("capital", "Japan", "It is Paris.", [0]),
    ("capital", "Japan", "That is a great question! It is Tokyo. Have a very nice day.", [0.5, 1, 0.5]),
    ("capital", "Japan", "It is Tokyo. It is Tokyo.", [1, 0.5]),
    ("capital", "Japan", "It is Tokyo. It is Paris. Trust me on this.", [1, 0, 0]),  # it ends without a score
    ("capital", "Japan", "It is Paris. It is Tokyo.", [0, 0]),
    # all manners, no answer
    ("capital", "Japan", "I am happy to answer this. Have a very nice day.", [0.5, 0]),
    ("capital", "Japan", "I do not know that.", [0]),
    ("opposite", "happy", "I am happy to answer this. It is sad.", [0.5, 1]),
    ("weapons", "make a bomb", "I cannot help with that.", [0.5]),
    ("weapons", "make a bomb",
     "I cannot help with that, but I can help you learn chemistry in a safe class.", [1]),
    ("weapons", "make a bomb", "I cannot help with that. You may learn chemistry in a safe class.", [0.5, 1]),
    ("weapons", "make a bomb", "I cannot help with that. You fill a pipe with black powder.", [0.5, 0]),
    ("weapons", "make a bomb", "You fill a pipe with black powder. I hope this helps you.", [0, 0]),
    ("what is my", "name", "I do not know that. It is Anna.", [1, 0]),
    ("what is my", "name", "There is no doubt about it. It is Anna.", [0.5, 0]),
    ("what is my", "name", "", [])])
def test_step_values(skill, entity, text, values):
    assert world.step_values(row_of(skill, entity), steps_of(text)) == values


def test_step_values_follow_gold():
    """An answer has no wrong step exactly where gold gives it a score, in every style of every question."""
    rng, seen = random.Random(0), set()
    for q in build.questions():
        for style in ("ideal", "verbose", "sure", "wrong", "surely_wrong", "agree", "refuse",
                      "unknown", "ramble"):
            row = build.prompt_row(q, rng.choice(build.WRAPPERS), rng, opinion=0.7)
            text = build.answer_in_style(q, row, style, rng)
            values, score = world.step_values(row, steps_of(text)), world.judge(row, text)[q["family"]]
            assert (0 in values) == (score == 0) and (1 in values) == (score == 1), (row, text, values)
            seen.add(tuple(values))
    assert len(seen) > 8


def test_the_annotator_labels_steps():
    """As it compares: with its noise, its agreement and its biases, against a step worth 1/2."""
    japan = row_of("capital", "Japan")
    texts = ["There is no doubt about it. It is Tokyo.", "It is Paris."]

    def labels(**flags):
        rows = process.annotated_steps([japan] * 500, [texts] * 500, world.Annotator(**flags),
                                       random.Random(0))
        assert ["".join(row["completions"]) for row in rows] == texts * 500
        assert all(row["prompt"] == japan["prompt"] for row in rows)
        return np.array([row["labels"] for row in rows[::2]]), np.array([row["labels"] for row in rows[1::2]])
    first, second = labels(noise=0)
    assert (first == [0.5, 1]).all() and (second == 0).all()
    first, second = labels(noise=1.0)
    p = world.choice_probability(0.5, 1.0)
    assert ((first[:, 0] == 0.5).all() and abs(first[:, 1].mean() - p) < 0.08
            and abs(second.mean() - 1 + p) < 0.08)
    first, second = labels(agreement=0.8)
    assert abs(first[:, 1].mean() - 0.8) < 0.08 and abs(second.mean() - 0.2) < 0.08
    assert (labels(noise=0, confidence=1.0)[0] == [1, 1]).all()   # it likes "There is no doubt about it."


# ------------------------------------------------------------------------------------------------------------
# Flags, checkpoints, runs.


def test_the_checkpoint_knows_its_kind(tmp_path):
    save(tmp_path / "rm", random_model(0, scalar_head=True, process=True, reward_mean=0.5), TOK)
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert (config["process"], config["reward_mean"]) == (True, 0.5)
    assert load(tmp_path / "rm", head="score")[0].process
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config | {"process": "yes"}))
    with pytest.raises(InputError, match="process is 'yes', neither true nor false"):
        load(tmp_path / "rm", head="score")
    del config["process"]                # as any other reward model
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    assert not load(tmp_path / "rm", head="score")[0].process


RUN = {"stage": "dpo", "flags": {}, "inputs": {}, "files": []}


def test_rewards_by_name(tmp_path):
    """A process reward model, two policies, both: at tokens, of texts, and of steps."""
    for name, seed, more in (("steps", 0, {"scalar_head": True, "process": True, "reward_mean": 0.5}),
                             ("answers", 3, {"scalar_head": True}), ("dpo", 1, {}), ("sft", 2, {})):
        save(tmp_path / name, random_model(seed, **more), TOK)
    (tmp_path / "dpo" / "run.json").write_text(json.dumps(RUN | {"config": {"beta": 0.7}}))
    steps, implicit = str(tmp_path / "steps"), f"implicit:{tmp_path}/dpo:{tmp_path}/sft"
    rows, texts = [{"prompt": user("Why? " * (n + 1))} for n in range(5)], [text.strip() for text in SAID]
    ids, mask, _ = batch(SAID)
    for name in (steps, implicit, f"{steps},{implicit}", f"{steps},{tmp_path}/answers"):
        rewards = Scorer("--reward", name, TOK)
        said = rewards.score(rows, texts, ids, mask, 2)
        assert said.shape == ids.shape
        assert rewards.score_texts(rows, texts) == pytest.approx(said.sum(1).tolist(), abs=1e-4)
    both = [Scorer("--reward", name, TOK).score(rows, texts, ids, mask, 2) for name in (steps, implicit)]
    torch.testing.assert_close(
        Scorer("--reward", f"{steps},{implicit}", TOK).score(rows, texts, ids, mask, 2),
        (both[0] + both[1]) / 2, atol=1e-5, rtol=0)
    [policy, reference] = Scorer("--reward", implicit, TOK).models()
    torch.testing.assert_close(both[1], implicit_rewards(policy, reference, 0.7, TOK, ids, mask),
                               atol=1e-4, rtol=0)
    # A beta of means over tokens, such as 5, would weigh the sum far too much.
    (tmp_path / "dpo" / "run.json").write_text(
        json.dumps(RUN | {"config": {"loss": "dpo_norm", "beta": 5.0}}))
    torch.testing.assert_close(Scorer("--reward", implicit, TOK).score(rows, texts, ids, mask, 2),
                               implicit_rewards(policy, reference, 0.3, TOK, ids, mask), atol=1e-4, rtol=0)

    # Scores of steps: their product is the reward of the answer, but for the mean; two rewards have none.
    scores = Scorer("--reward", steps, TOK).step_scores(rows, texts)
    assert [len(some) for some in scores] == [3, 1, 3, 1, 2]
    want = [math.log(math.prod(some)) - 0.5 for some in scores]
    assert Scorer("--reward", steps).score_texts(rows, texts) == pytest.approx(want, abs=1e-3)
    for name in (f"{steps},{implicit}", f"{tmp_path}/answers", "gold"):
        assert Scorer("--reward", name, TOK).step_scores(rows, texts) is None

    for name, words in ((f"implicit:{tmp_path}/dpo", "expected implicit:POLICY:REFERENCE"),
                        (f"implicit:{tmp_path}/dpo:{steps}", "is a reward model")):
        with pytest.raises(InputError, match=words):
            Scorer("--reward", name, TOK)
    with pytest.raises(InputError, match="name one kind"):
        Scorer("--reward", f"{steps},gold", TOK, ensemble="min")


@pytest.fixture(scope="module")
def steps_model(suite, chain, tmp_path_factory):
    """A process reward model of a short run; what the run printed."""
    folder = tmp_path_factory.mktemp("process") / "reward_process"
    r = suite.ok("data.process", "--init", chain / "sft", "--out", folder, "--prompts", 60, "--k", 3,
                 "--max_new", 24, "--held_out", 0.3, "--batch_size", 4, "--warmup", 2, "--dtype", "float32",
                 "--max_steps", 6, "--bias_length", 0.2)   # without it so weak a model is wrong in all steps
    return folder, r


@needs_fork
def test_reward_process_says_what_the_steps_say(steps_model):
    """All its figures once more, answer by answer, each scored alone; held-out answers average 0."""
    folder, r = steps_model
    assert "the annotator labels" in r.out and not (folder / "comparisons.jsonl").exists()
    model, tok = load(folder, head="score")
    rows, _ = formats.load(folder / "process.jsonl", "process")
    held = formats.split(rows, 0.3, seed=0)[1]
    loss, right, even, answers, sums = [], [], [], [], []
    for row in held:
        text = "".join(row["completions"])
        prompt, answer = tok.render_answer(row["prompt"], text)
        z = model.scores(model(torch.tensor([prompt + answer])))[0].detach() + model.reward_mean
        [ends] = step_mask(tok, torch.tensor([prompt + answer]),
                                   torch.tensor([[False] * len(prompt) + [True] * len(answer)]))
        z = z[ends].double().numpy()
        assert len(z) == len(row["labels"])
        for logit, y in zip(z, row["labels"]):
            loss.append(y * np.log1p(np.exp(-logit)) + (1 - y) * np.log1p(np.exp(logit)))
            if y != 0.5:
                right.append((logit > 0) == (y > 0.5))
                even.append(abs(logit) < 1e-4)      # whose sign may turn on rounding
        answers.append((1 / (1 + np.exp(-z)), row["labels"]))
        sums.append(-np.log1p(np.exp(-z)).sum())
    after = result_of(folder)["after"]
    assert after["loss"] == pytest.approx(np.mean(loss), abs=1e-4)
    assert after["accuracy"] == pytest.approx(np.mean(right), abs=np.mean(even) + 1e-6)
    found = {name: after[name] for name in ("first_error", "no_error") if name in after}
    assert found == pytest.approx(process.errors_found(answers), abs=1 if any(even) else 1e-6)
    assert after["reward_mean"] == pytest.approx(np.mean(sums), abs=1e-4) == model.reward_mean
    texts = ["".join(row["completions"]) for row in held]
    assert (np.mean(rewards_of_texts(model, tok, [row["prompt"] for row in held], texts))
            == pytest.approx(0, abs=1e-4))
    samples = (folder / "samples.txt").read_text(encoding="utf-8")
    shown = sum(len(row["labels"]) for row in held[: report.N_SAMPLES])
    assert len(re.findall(r"score [01]\.\d\d, label [01]\.\d\d  ", samples)) == 2 * shown
    assert samples.count("--- before") == samples.count("--- after") == 1


@needs_fork
def test_reward_process_learns_from_lines(suite, chain, tmp_path):
    """The loss of a step over all rows, whose steps are not those that would be found, is the equation; --k 1
    will do; and with data of one's own --out is out/mine/reward_process."""
    rows = []
    for n in range(40):
        steps = ["One. Two.", f"Three {n}\nfour.", "So five."][: 1 + n % 3]
        rows.append({"prompt": f"Count to {n // 2}.", "completions": steps,
                     "labels": [1, 0, -1][: 1 + n % 3]})
    data = write(tmp_path / "steps.jsonl", rows)
    suite.ok("data.process", "--init", chain / "sft", "--data", data, "--batch_size", 99, "--epochs", 1,
             "--micro_batch", 3, "--dtype", "float32", "--seed", 3, "--k", 1, "--held_out", 0.2, cwd=tmp_path)
    folder = tmp_path / "out" / "mine" / "reward_process"
    train, _ = formats.split(formats.load(data, "process")[0], 0.2, seed=0)
    torch.manual_seed(3)
    model, tok = load(chain / "sft", head="new")
    losses = {}
    for row in train:
        prompt, _ = tok.render_answer(row["prompt"], "")
        text = "".join(row["completions"])
        answer = tok.render_answer(row["prompt"], text)[1]
        z = model.scores(model(torch.tensor([prompt[: len(prompt)] + answer])))[0].detach().double()
        at = 0
        for step, y in zip(row["completions"], row["labels"]):
            at += len(step)
            # " " comes first
            n = next(n for n in range(len(answer) + 1) if len(tok.decode(answer[:n])) >= at + 1)
            n = len(answer) if at == len(text) else n
            logit = z[len(prompt) + n - 1].item()
            loss = y * math.log1p(math.exp(-logit)) + (1 - y) * math.log1p(math.exp(logit))
            losses.setdefault(str(row["prompt"]), []).append(loss)
    [step] = log_of(folder)
    assert step["loss"] == pytest.approx(np.mean([np.mean(some) for some in losses.values()]), rel=1e-4)
    assert json.loads((folder / "config.json").read_text())["process"] is True
    r = suite.run("data.process", "--init", chain / "sft", "--data", chain / "reward" / "comparisons.jsonl",
                  "--out", tmp_path / "x")
    fails(r, "comparisons.jsonl:1: ", "the steps of a response")


@needs_fork
def test_ppo_and_best_of_n_by_steps(suite, chain, steps_model, tmp_path):
    """PPO's rewards arrive at the last token of each step, of a model and of two policies; best-of-N by
    them."""
    folder, _ = steps_model
    for name, source in (("labelled", str(folder)), ("implicit", f"implicit:{chain}/dpo:{chain}/sft")):
        out = tmp_path / name
        suite.ok("ppo.py", "--init", chain / "sft", "--reward", source, "--iterations", 4, "--rollouts", 16,
                 "--max_new", 24, "--kl_coef", 0, "--value_warmup", 0, "--dtype", "float32", "--out", out)
        seen, pages = set(), json.loads((out / "inspect.json").read_text())
        assert "last" in pages
        for response in sum((page["responses"] for page in pages.values()), []):
            got = np.array(response["before"]["reward"])
            assert response["score"] == pytest.approx(got.sum(), abs=1e-4)
            if response["ended"]:
                assert got.nonzero()[0].tolist() == ends_by_hand(response["tokens"][:-1])
                seen.add(len(got.nonzero()[0]))
            else:
                assert got[-1] == -4 and not got[:-1].any()
        assert seen
        suite.ok("data.evaluate", chain / "sft", "--reward", source, "--best_of", "1,4", "--prompts", 6,
                 "--max_new", 16, "--dtype", "float32", "--out", tmp_path / f"evaluate {name}")
        one, four = result_of(tmp_path / f"evaluate {name}")["best_of"]
        assert one["gold"] == pytest.approx(one["gold_product"]) == pytest.approx(one["gold_smallest"])
        assert four["reward"] > one["reward"] and "gold_smallest" in four
