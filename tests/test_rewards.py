"""What scores answers, where its tokenizer is not the policy's: texts are read again, rewards carried
back."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import InputError
from data.files.checkpoint import save
from data.files.tokenizer import tokenizer_from_json
from data.rewards import Scorer
from data.steps import carried, ends_of_steps, last_tokens, step_mask, steps_of
from model import GPT, GPTConfig
from test_hf import hf_model, shake, toy_json, toy_tokenizer
from test_process import SAID, TOK, batch, cut_at_random, needs_fork, random_model
from test_scripts import result_of, user


def cut_and_mask(text, rng, pad):
    """A text cut anywhere into tokens, as a row of ids with a prompt before and padding behind: tokenizer,
    ids and mask (1, T)."""
    tok, answer = cut_at_random(text, rng)
    start = rng.randint(1, 3)
    ids = torch.tensor([[7] * start + answer + [7] * pad])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, start: start + len(answer)] = True
    return tok, ids, mask


def test_rewards_are_carried_to_the_tokens_that_end_the_same_step():
    """Against the bytes of each step, under two random tokenizers: otherwise a step's reward arrives at
    another step, or a part of the answer's reward is lost where one token holds the ends of two steps."""
    rng, together = random.Random(0), 0
    for _ in range(1000):
        words = rng.choices(["Ja.", "é!", "Größe", "3.5", "so?!"], k=rng.randint(1, 7))
        text = rng.choice([" ", "\n"]).join(words)
        their_tok, their_ids, theirs = cut_and_mask(text, rng, 2)
        our_tok, our_ids, ours = cut_and_mask(text, rng, 0)
        their_ends, our_ends = step_mask(their_tok, their_ids, theirs), step_mask(our_tok, our_ids, ours)
        said = torch.where(their_ends, torch.rand(their_ends.shape), 0.0)
        got = carried(said, their_ends, our_ends)
        assert got.shape == our_ids.shape and not got[~our_ends].any()
        assert got.sum().item() == pytest.approx(said.sum().item(), rel=1e-5)
        n_steps = len(steps_of(text))
        if their_ends.sum() != n_steps or our_ends.sum() != n_steps:
            together += 1
            continue

        # Step by step: the token that holds its last byte, or the EOS.
        answer, start = our_ids[ours].tolist(), int(ours[0].nonzero()[0])
        at = [start + t for t in last_tokens(our_tok, answer, ends_of_steps(text.encode()))]
        assert got[0, at].tolist() == pytest.approx(said[their_ends].tolist())
    assert 0 < together < 900


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Two reward models of whole answers and of steps over a tokenizer with another vocabulary and template
    than the policy's, and one with the policy's: {name: folder}, the models, their tokenizer."""
    folder = tmp_path_factory.mktemp("strangers")
    tok = toy_tokenizer(folder, "chatml")
    shape = dict(vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, n_inner=32,
                 max_len=128, head_dim=8, scalar_head=True)
    answers, steps = shake(GPT(GPTConfig(**shape)), 1), shake(GPT(GPTConfig(**shape)), 2)
    answers.reward_mean, steps.reward_mean, steps.process = 0.25, -0.5, True
    save(folder / "answers", answers, tok)
    save(folder / "steps", steps, tok)
    save(folder / "own", random_model(3, scalar_head=True), TOK)
    return {name: str(folder / name) for name in ("answers", "steps", "own")}, answers, steps, tok


@torch.no_grad()
def test_a_reward_model_with_another_tokenizer_reads_the_text(strangers):
    """Each answer alone, written by hand in the reward model's own chat template; what it says of a step
    arrives at the policy's last token of that step. Otherwise ids of one vocabulary are read as those of
    another."""
    folders, answers, steps, tok = strangers
    texts = [text.strip() for text in SAID]
    rows = [{"prompt": user("Why? " * (n + 1))} for n in range(len(texts))]
    ids, mask, ends = batch(texts)
    by_answers = Scorer("--reward", folders["answers"], TOK).score(rows, texts, ids, mask, 2)
    by_steps = Scorer("--reward", folders["steps"], TOK).score(rows, texts, ids, mask, 2)
    for b, (row, text) in enumerate(zip(rows, texts)):
        chat = [tok.special["<|im_start|>"], *tok.encode("user\n" + row["prompt"][0]["content"])]
        chat += [tok.special["<|im_end|>"], *tok.encode("\n"), tok.special["<|im_start|>"],
                 *tok.encode("assistant\n")]
        answer = [*tok.encode(text), tok.special["<|im_end|>"]]
        hidden = answers(torch.tensor([chat + answer]))[0, -1]
        want = torch.zeros(ids.shape[1])
        want[ends[b][-1]] = hidden @ answers.score.weight[0] - 0.25
        torch.testing.assert_close(by_answers[b], want, atol=1e-4, rtol=0)

        z = (steps(torch.tensor([chat + answer]))[0] @ steps.score.weight[0]).double().numpy()
        places = [len(chat) + t for t in last_tokens(tok, answer, ends_of_steps(text.encode()))]
        want = np.zeros(ids.shape[1])
        want[ends[b]] = -np.log1p(np.exp(-z[places]))
        want[ends[b][-1]] += 0.5
        np.testing.assert_allclose(by_steps[b].numpy(), want, atol=1e-4)

    # As texts, and with a reward that reads the policy's own tokens.
    for name, said in (("answers", by_answers), ("steps", by_steps)):
        assert Scorer("--reward", folders[name], TOK).score_texts(rows, texts) == pytest.approx(
            said.sum(1).tolist(), abs=1e-4)
    own = Scorer("--reward", folders["own"], TOK).score(rows, texts, ids, mask, 2)
    both = Scorer("--reward", f"{folders['own']},{folders['steps']}", TOK).score(rows, texts, ids, mask, 2)
    torch.testing.assert_close(both, (own + by_steps) / 2, atol=1e-5, rtol=0)


def test_an_id_that_stands_for_nothing_is_named(strangers):
    """A policy whose vocabulary is padded to a round number can draw one: a sentence, no error of an
    index."""
    folders, _, _, _ = strangers
    ids, mask, _ = batch(["Yes."])
    rows, n = [{"prompt": user("Why?")}], TOK.vocab_size
    scorer = Scorer("--reward", folders["own"], TOK)
    ids[0, -2] = n - 1
    scorer.score(rows, ["Yes."], ids, mask, 2)
    ids[0, -2] = n
    with pytest.raises(InputError,
                       match=f"own: the policy said token {n}, which its tokenizer does not have"):
        scorer.score(rows, ["Yes."], ids, mask, 2)


@torch.no_grad()
def test_one_text_has_one_reward_whichever_token_ends_it(tmp_path):
    """Otherwise a policy can learn the end that pays. Llama 3 has two, of which reward models are trained on
    one."""
    tok = toy_tokenizer(tmp_path, "llama3")
    model = shake(GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=16,
                                n_inner=32, max_len=128, head_dim=8, scalar_head=True)), 5)
    save(tmp_path / "rm", model, tok)
    scorer = Scorer("--reward", str(tmp_path / "rm"), tok)
    prompt, answer = tok.render_answer(user("Name an animal."), "A horse.")
    mask = torch.tensor([[False] * len(prompt) + [True] * len(answer)])
    rows, said = [{"prompt": user("Name an animal.")}], []
    for end in sorted(tok.eos_ids):
        ids = torch.tensor([prompt + answer[:-1] + [end]])
        before = ids.clone()
        said.append(scorer.score(rows, ["A horse."], ids, mask, 8).sum().item())
        assert torch.equal(ids, before)       # the policy's own tokens stay what they were
    assert (len(said) >= 2
            and said == pytest.approx([scorer.score_texts(rows, ["A horse."])[0]] * len(said), abs=1e-5))


def test_prompts_that_leave_a_reward_model_no_room(strangers):
    """Otherwise the end of the prompt is scored, and every answer to it alike."""
    folders, _, _, tok = strangers
    rows = [{"prompt": user("why " * n)} for n in range(1, 40)]
    scorer = Scorer("--judge", f"gold,{folders['answers']},{folders['steps']}")
    want = [row for row in rows if len(tok.render(row["prompt"], True)[0]) + 20 + 1 <= 128]
    assert 0 < len(want) < len(rows) and scorer.readable(rows, 20) == want
    assert Scorer("--judge", "gold").readable(rows, 20) == rows


@torch.no_grad()
def test_answers_that_are_cut_are_said(strangers, capsys):
    folders, *_ = strangers
    rows = [{"prompt": user("why?")}] * 3
    Scorer("--judge", folders["answers"]).score_texts(rows, ["yes", "no " * 60, "so"])
    assert "1 of 3 answers are longer than its context" in capsys.readouterr().out
    Scorer("--judge", folders["answers"]).score_texts(rows, ["yes", "no", "so"])
    assert capsys.readouterr().out == ""


def test_a_value_model_starts_only_from_what_reads_the_policys_tokens(strangers):
    folders, *_ = strangers
    assert Scorer("--reward", folders["answers"], TOK).value_start is None
    assert Scorer("--reward", "gold", TOK).value_start is None
    scorer = Scorer("--reward", f"gold,{folders['steps']},{folders['own']}", TOK)
    assert scorer.value_start is scorer.models()[1]


@torch.no_grad()
def test_answers_behind_the_context_are_cut(strangers):
    """Of a prompt that fills the reward model's context, one token of the answer is still read."""
    folders, answers, _, tok = strangers
    rows, texts = [{"prompt": user("why " * n)} for n in (5, 31, 300)], ["It is so."] * 3
    for row, text, said in zip(rows, texts, Scorer("--reward", folders["answers"]).score_texts(rows, texts)):
        prompt, answer = tok.render_answer(row["prompt"], text)
        prompt = prompt[:127]
        read = torch.tensor([(prompt + answer)[:128]])
        assert said == pytest.approx(answers.scores(answers(read))[0, -1].item(), abs=1e-4)


@torch.no_grad()
def test_a_reward_model_made_by_transformers(tmp_path):
    """Its logits at the end of the chat, as its own chat template writes it, are the rewards here."""
    tf = pytest.importorskip("transformers")
    lm = hf_model(tf, "llama")
    theirs = shake(tf.LlamaForSequenceClassification(tf.LlamaConfig(**lm.config.to_dict() | {
        "num_labels": 1, "pad_token_id": 0})), 4)
    theirs.save_pretrained(tmp_path)
    tok = tokenizer_from_json(toy_json(tmp_path, "llama3"))
    texts = [text.strip() for text in SAID]
    rows = [{"prompt": user("Why? " * (n + 1))} for n in range(len(texts))]
    ids, mask, ends = batch(texts)
    said = Scorer("--reward", str(tmp_path), TOK).score(rows, texts, ids, mask, 2)
    for b, (row, text) in enumerate(zip(rows, texts)):
        chat, _ = tok.render([*row["prompt"], {"role": "assistant", "content": text}])
        want = theirs(torch.tensor([chat]), attention_mask=torch.ones(1, len(chat))).logits[0, 0].item()
        assert said[b, ends[b][-1]].item() == pytest.approx(want, abs=1e-4)
        assert said[b].count_nonzero() == 1


@needs_fork
def test_ppo_with_a_reward_model_of_another_tokenizer(suite, chain, strangers, tmp_path):
    """It runs, its value model starts from the policy, and the closing rewards are those of the texts."""
    folders, *_ = strangers
    for name in ("answers", "steps"):
        out = tmp_path / name
        suite.ok("ppo.py", "--init", chain / "sft", "--reward", folders[name], "--iterations", 2,
                 "--rollouts", 16, "--minibatches", 2, "--max_new", 16, "--value_warmup", 0,
                 "--dtype", "float32", "--out", out)
        assert result_of(out)["after"]["reward"] != 0


def test_a_function_reads_what_is_said_without_spaces_around_it():
    """Otherwise one that looks at the first word has another reward in training, where a template's space
    stands before the answer, than in the closing table."""
    source = SimpleNamespace(name="f", function=lambda rows, texts: [text.startswith("I ") for text in texts])
    scorer = SimpleNamespace(flag="--reward")
    assert Scorer.call(scorer, source, [{}] * 2, [" I do.", "No. I do."]).tolist() == [1, 0]
