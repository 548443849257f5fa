"""The other side of versus_trl.py, which starts this with the interpreter that has TRL: trainers of trl 0.21,
the last with a readable PPOTrainer, on our checkpoints. What is not set here is TRL's default.

    python tests/experiments/trl_trainers.py ppo --links out --data pairs.jsonl --out /tmp/x --steps 2

`check` trains nothing. It asserts that trl has our ids, and our log-probs, rewards and DPO loss to 1e-4.
"""
import argparse
import json
import os
import random
import sys
from pathlib import Path
from statistics import mean

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch   # noqa: E402
import trl   # noqa: E402
from datasets import Dataset   # noqa: E402
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,   # noqa: E402
                          AutoTokenizer, TrainerCallback, set_seed)
from trl.trainer.utils import forward, get_reward   # noqa: E402

import dpo   # noqa: E402
from data import world   # noqa: E402
from data.files import formats   # noqa: E402
from data.files.checkpoint import load   # noqa: E402
from model import answer_rewards, pad_answers, token_logprobs   # noqa: E402

TRAINERS = {"dpo": (trl.DPOTrainer, trl.DPOConfig), "kto": (trl.KTOTrainer, trl.KTOConfig),
            "orpo": (trl.ORPOTrainer, trl.ORPOConfig), "reward": (trl.RewardTrainer, trl.RewardConfig)}
# fp32, in which ours are told to train too, and nothing shown or saved in between.
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}


def policy(folder):
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)


def scorer(folder):
    """A reward model, or a language model with a new head. Our reward_mean, which transformers does not read,
    becomes a bias of the head: it counts beside the penalty of an answer that does not end."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32,
                                                               num_labels=1)
    if hasattr(model.config, "reward_mean"):
        model.score.bias = torch.nn.Parameter(torch.tensor([-model.config.reward_mean]))
    return model


def prompt_ids(tok):
    """Ids (a tuple) of each of the prompts to learn from, by transformers' tokenizer."""
    return [tuple(tok.apply_chat_template(row["prompt"], add_generation_prompt=True))
            for row in world.rows("rl")]


class Log(TrainerCallback):
    """What a trainer logs, and `more`, as JSON lines."""

    def __init__(self, folder):
        self.file, self.more = open(Path(folder) / "log.jsonl", "w"), {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.file.write(json.dumps({"step": state.global_step} | logs | self.more) + "\n")
        self.file.flush()


# ------------------------------------------------------------------------------------------------------------
# PPO.


def like_ours(model, value, lr, n_steps):
    """Optimizer and schedule of ppo.py for PPOTrainer: two learning rates that fall to a third, that of the
    policy being 0 in the first four iterations (in which, unlike ours, Adam's averages already move)."""
    groups = [{"params": model.parameters(), "lr": lr}, {"params": value.parameters(), "lr": 5e-4}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)

    def of_value(step):
        return 1 - 2 / 3 * step / n_steps

    def of_policy(step):
        return of_value(step) if step >= min(4, n_steps // 4) else 0.0
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [of_policy, of_value])


def ppo_trainer(a, tok):
    """A PPOTrainer for 30 x 256 episodes."""
    model, value, reward = policy(a.links / "sft"), scorer(a.links / "reward"), scorer(a.links / "reward")
    log, n_steps = Log(a.out), a.steps if a.steps > 0 else 30
    prompts = Dataset.from_dict({"input_ids": prompt_ids(tok)})
    optimizers, more = (None, None), {}
    if a.like_ours:
        optimizers = like_ours(model, value, a.lr, n_steps)
        more = {"cliprange_value": 0.5, "vf_coef": 1.0}
    # With accumulation accelerate would make one step of all minibatches; 256 rows at once are the fastest.
    args = trl.PPOConfig(
        output_dir=a.out, seed=a.seed, total_episodes=256 * n_steps, per_device_train_batch_size=256,
        local_rollout_forward_batch_size=256, gradient_accumulation_steps=1, num_ppo_epochs=a.epochs,
        num_mini_batches=a.minibatches, learning_rate=a.lr, kl_coef=0.1, response_length=32, temperature=1.0,
        stop_token="eos", missing_eos_penalty=4.0, num_sample_generations=0, **QUIET, **more)

    # The reward model reads every sampled answer, so that gold can judge it here, for the log.
    known = dict(zip(prompt_ids(tok), world.rows("rl")))

    def gold_of(ids):
        n = next(n for n in range(len(ids)) if tuple(ids[:n]) in known)
        return world.judge(known[tuple(ids[:n])], tok.decode(ids[n:], skip_special_tokens=True))["gold"]

    def judge(module, args, kwargs):
        rows = zip(kwargs["input_ids"], kwargs["attention_mask"].bool())
        log.more["gold"] = mean(gold_of(ids[real].tolist()) for ids, real in rows)
    reward.base_model.register_forward_pre_hook(judge, with_kwargs=True)
    return trl.PPOTrainer(
        args=args, processing_class=tok, model=model, ref_model=policy(a.links / "sft"), reward_model=reward,
        value_model=value, train_dataset=prompts, eval_dataset=prompts.select(range(8)),
        callbacks=[log], optimizers=optimizers)


# ------------------------------------------------------------------------------------------------------------
# Comparisons.


def dataset(method, pairs, tok, seed):
    """Comparisons as the trainer of a method takes them. All but RewardTrainer get text: to messages they
    would give two EOS, the template's and their own."""
    rows = []
    for pair in pairs:
        prompt, longer = pair["prompt"], max(pair["chosen"], pair["rejected"], key=len)
        row = {"length": len(str(prompt) + longer)}      # in letters: it only puts like rows together
        if method == "reward":
            for side in ("chosen", "rejected"):
                row[side] = prompt + [{"role": "assistant", "content": pair[side]}]
        else:
            row["prompt"] = tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            row |= {"chosen": " " + pair["chosen"], "rejected": " " + pair["rejected"]}
        rows.append(row)
    if method == "kto":     # single answers, mixed, for KTOTrainer reads them in the order given
        pairs, rows = rows, []
        for pair in pairs:
            for side in ("chosen", "rejected"):
                rows.append({"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"})
        random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def trainer_of(method, a, tok, pairs, model, reference=None):
    """The trainer of a method on comparisons (rows), with the optimizer and the schedule of dpo.py or
    reward.py unless --defaults. reference: None if it is what `model` is now."""
    Trainer, Args = TRAINERS[method]
    flags = {"learning_rate": a.lr, "per_device_train_batch_size": 64, "num_train_epochs": 2,
             "max_length": 256, "max_steps": a.steps, "logging_steps": 10, "gradient_checkpointing": False,
             "remove_unused_columns": False, **QUIET}
    if not a.defaults:
        flags |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                  "adam_beta2": 0.95, "adam_epsilon": 1e-6, "warmup_steps": 10, "max_grad_norm": 1.0}
    if a.by_length:     # rows of like length together as in ours; but from long to short, four times an epoch
        flags |= {"group_by_length": True, "length_column_name": "length"}
    if method == "orpo":
        flags |= {"beta": 1.0}
    more = {}
    if method in ("dpo", "kto"):
        flags |= {"beta": 0.3, "precompute_ref_log_probs": reference is None}
        more = {"ref_model": reference}
    if method == "dpo":
        flags |= {"use_logits_to_keep": True}
    if method == "reward":   # mean((r_a + r_b)^2) * 0.005 is reward.py's c = 0.01
        flags |= {"center_rewards_coefficient": 0.005, "weight_decay": 0.01, "adam_epsilon": 1e-8,
                  "warmup_steps": 20}
    return Trainer(model=model, args=Args(output_dir=a.out, seed=a.seed, **flags), processing_class=tok,
                   train_dataset=dataset(method, pairs, tok, a.seed), callbacks=[Log(a.out)], **more)


# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check(a, tok, pairs):
    """Largest differences {what: number} of trl from ours on some pairs. AssertionError: other ids, or more
    than 1e-4."""
    (ours, our_tok), (base, _) = load(a.links / "sft"), load(a.links / "base")
    our_reward, _ = load(a.links / "reward", head="score")
    prompts = [tuple(our_tok.render(row["prompt"], generation_prompt=True)[0]) for row in world.rows("rl")]
    assert prompts == prompt_ids(tok), "other ids of prompts"
    sides = {}
    for side in ("chosen", "rejected"):
        sides[side] = [our_tok.render_answer(row["prompt"], row[side]) for row in pairs]
        for row, (given, answer) in zip(pairs, sides[side]):
            text = tok.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            whole = tok.apply_chat_template(row["prompt"] + [{"role": "assistant", "content": row[side]}])
            in_parts = tok(text)["input_ids"] + tok(" " + row[side])["input_ids"] + [tok.eos_token_id]
            assert given + answer == whole == in_parts, row
    ids, mask = pad_answers(sides["chosen"], our_tok.pad_id)

    # Theirs: padded on the left of the prompt and on the right of the answer, as in PPOTrainer.
    pad, rows = tok.pad_token_id, []
    width, longest = [max(map(len, part)) for part in zip(*sides["chosen"])]
    for given, answer in sides["chosen"]:
        rows.append([pad] * (width - len(given)) + given + answer + [pad] * (longest - len(answer)))
    padded, sft, reward = torch.tensor(rows), policy(a.links / "sft"), scorer(a.links / "reward")
    answers = padded[:, width:]
    logits = forward(sft, padded, pad).logits[:, width - 1: -1]
    logp = logits.log_softmax(-1).gather(2, answers[..., None])[..., 0] * (answers != pad)
    found = {"log-prob": logp.sum(1) - token_logprobs(ours, ids, mask).sum(1),
             "reward": get_reward(reward, padded, pad, width)[1] - answer_rewards(our_reward, ids, mask)}

    # DPO's loss of the SFT model with the base model as its reference: are the same tokens counted?
    trainer = trainer_of("dpo", a, tok, pairs, sft, policy(a.links / "base"))
    [batch] = trainer.get_train_dataloader()
    examples, _ = dpo.encode(pairs, our_tok, 128, 256)
    logp, n = dpo.answer_logps(ours, examples, our_tok)
    ref_logp, _ = dpo.answer_logps(base, examples, our_tok)
    cfg = dpo.Config(beta=0.3, sft_coef=0.0)
    loss, _, _ = dpo.labelled_loss(logp, ref_logp, n, torch.ones(len(examples)), cfg)
    found["loss of dpo"] = trainer.compute_loss(sft, batch) - loss.mean()
    found = {what: difference.abs().max().item() for what, difference in found.items()}
    assert max(found.values()) < 1e-4, found
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=["check", "ppo", *TRAINERS])
    parser.add_argument("--links", type=Path, required=True, help="folder that holds base, sft and reward")
    parser.add_argument("--data", type=Path, required=True, help="comparisons without ties")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=-1, help="fewer than all")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--epochs", type=int, default=1, help="of ppo")
    parser.add_argument("--minibatches", type=int, default=4, help="of ppo")
    parser.add_argument("--like_ours", action="store_true", help="ppo: optimizer and warm-up of ppo.py")
    parser.add_argument("--by_length", action="store_true", help="dpo, reward: rows of like length together")
    parser.add_argument("--defaults", action="store_true", help="the others: TRL's optimizer and schedule")
    a = parser.parse_args()
    set_seed(a.seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    Path(a.out).mkdir(parents=True, exist_ok=True)
    start = a.links / ("base" if a.method == "orpo" else "sft")
    side = "right" if a.method == "reward" else "left"
    tok, result = AutoTokenizer.from_pretrained(start, padding_side=side), {}
    pairs, _ = formats.split(formats.load(a.data, "preference")[0], 0.1, seed=0)      # as dpo.py holds out
    if a.method == "check":
        result = check(a, tok, pairs[:64])
        print(result)
    else:
        if a.method == "ppo":
            trainer = ppo_trainer(a, tok)
        else:
            model = scorer(start) if a.method == "reward" else policy(start)
            trainer = trainer_of(a.method, a, tok, pairs, model)
        trainer.train()
        trainer.save_model(a.out)
    (Path(a.out) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
