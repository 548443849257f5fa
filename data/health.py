"""Is a run healthy, in words; and one iteration of PPO, token by token (ppo.py --inspect, the page)."""
import math
from functools import partial

import torch

from data import InputError
from data.parallel import in_chunks
from model import Linear, LoRA, token_values


# ------------------------------------------------------------------------------------------------------------
# Health of a PPO run, in words.


def means(rows):
    """Mean of every figure of the last of some log rows, over the rows that have it."""
    out = {}
    for name in rows[-1]:
        values = [row[name] for row in rows if name in row]
        out[name] = sum(values) / len(values)
    return out


def health(history, cfg=None):
    """What is wrong with a PPO run, {name: sentence}, from its log rows so far (list of dicts). Compares the
    last five with the first five, and says nothing while there are fewer than ten (of the value model:
    twenty). No advice names what cfg has on already."""
    if len(history) < 10:
        return {}
    old, now, warnings = means(history[:5]), means(history[-5:]), {}
    if now["kl"] < -0.1:
        warnings["negative KL"] = (
            f"the KL is estimated at {now['kl']:.2f}, and no KL is negative: the log-probs are not those of "
            "what was sampled from; see the checks before the first update, try --dtype float32")
    if now.get("mismatch", 0) > max(0.02, 3 * old.get("mismatch", 0)):
        warnings["mismatch"] = (
            f"the sampler's log-probs are {now['mismatch']:.3f} nats a token off those of a whole pass, it "
            f"was {old['mismatch']:.3f}: what is sampled is no longer what is trained; try --dtype float32, "
            "and without --compile")
    if now["eos_rate"] < min(0.9, old["eos_rate"] - 0.1):
        warnings["EOS rate"] = (
            f"only {now['eos_rate']:.2f} of the responses end, it was {old['eos_rate']:.2f}: rambling pays; "
            "try a larger --eos_penalty, or a larger --max_new if good answers need it")
    elif now["eos_rate"] < 0.5:
        warnings["EOS rate"] = (
            f"only {now['eos_rate']:.2f} of the responses end: the others are cut off, and judged for that; "
            "try a larger --max_new, or sft.py first, from which a model learns to end its answers")
    if now["entropy"] < 0.05 * old["entropy"]:
        warnings["entropy"] = (
            f"it fell from {old['entropy']:.3f} to {now['entropy']:.3f} nats per token: the policy has "
            "stopped exploring; try --entropy_coef 0.01, a larger --kl_coef or a smaller --lr")
    if now.get("unique", 1) < 0.3 * old.get("unique", 1):
        warnings["identical responses"] = (
            f"only {now['unique']:.2f} of them differ, it was {old['unique']:.2f}: one answer pays for many "
            "prompts; read the samples, try a larger --kl_coef or --entropy_coef 0.01")
    if now["length"] > 1.5 * old["length"]:
        warnings["length"] = (
            f"it grew from {old['length']:.1f} to {now['length']:.1f} tokens: the reward pays for talk; try "
            "a larger --kl_coef, or a --reward function that takes something off for length")
    if now["length"] < 0.5 * old["length"]:
        warnings["length"] = (
            f"it shrank from {old['length']:.1f} to {now['length']:.1f} tokens: the reward pays for brevity; "
            "read the samples, try a larger --kl_coef or a smaller --eos_penalty")
    if now.get("clipfrac", 0) > 0.3 or now.get("approx_kl", 0) > 0.1:
        warnings["ratio"] = (
            f"{now['clipfrac']:.2f} of the ratios are clipped and approx_kl is {now['approx_kl']:.3f}: the "
            "steps are too large; try a smaller --lr or fewer --epochs")
    if len(history) >= 20 and "value_loss" in now and now["explained_var"] <= 0:
        warnings["value model"] = (
            f"it explains {now['explained_var']:.2f} of the variance of the returns, where a constant "
            "explains 0: try a larger --value_lr or --value_warmup, or do without a value model: "
            "--advantage rloo --group 4")
    same = reward_of_all(history, cfg)
    if same is not None:
        warnings["equal rewards"] = (
            f"every answer that ends gets the same reward, {same:.4g}: there is nothing to learn but to end; "
            "look at --reward, which has to tell answers apart")
    elif "gold" in now:
        hacking = reward_hacking(history, now, cfg)
        if hacking:
            warnings["reward hacking"] = hacking
    return warnings


def reward_of_all(history, cfg):
    """The reward that every answer which ended got so far, or None where they got different ones."""
    if cfg is None:
        return None
    # The logged mean holds the penalty of those that did not end. Without it the mean stands still only where
    # all are equal: other rewards move it with every new batch.
    means_of_ended = []
    for row in history:
        if row["eos_rate"] > 0:
            penalty = cfg.eos_penalty * (1 - row["eos_rate"])
            means_of_ended.append((row["reward"] + penalty) / row["eos_rate"])
    if len(means_of_ended) < 10:
        return None
    low, high = min(means_of_ended), max(means_of_ended)
    return high if high - low < 1e-4 * max(1.0, abs(high)) else None


def reward_hacking(history, now, cfg):
    """A sentence where gold has fallen since its best five iterations in a row while the reward rose; else
    ""."""
    golds = [row["gold"] for row in history]
    starts = range(len(golds) - 4)
    at = max(starts, key=lambda i: sum(golds[i: i + 5]))
    best = means(history[at: at + 5])
    if now["gold"] >= best["gold"] - 0.05 or now["reward"] <= best["reward"]:
        return ""
    cures = ["a larger --kl_coef"]
    if cfg is None or not cfg.kl_budget:
        cures.insert(0, f"--kl_budget {max(0.1, best['kl_exact']):.1f}")      # 0 would be no limit
    if cfg is None or not cfg.relabel:
        cures.insert(0, "--relabel 1")
    if cfg is None or cfg.ensemble != "min":
        cures.append("several reward models with --ensemble min")
    said = f"{', '.join(cures[:-1])}, or {cures[-1]}" if len(cures) > 1 else cures[0]
    return (f"gold fell from {best['gold']:.2f} to {now['gold']:.2f} while the reward rose from "
            f"{best['reward']:.2f} to {now['reward']:.2f}: the policy exploits the reward model (Goodhart's "
            f"law); try {said}")


def check_finite(row_of, **tensors):
    """InputError if an entry of a tensor (B, ..) is not finite. row_of: the number of each one's prompt."""
    for name, x in tensors.items():
        good = x.reshape(len(x), -1).isfinite().all(1)
        if not good.all():
            bad = [i for i, fine in zip(row_of, good.tolist()) if not fine]
            raise InputError(f"the {name} is not finite for prompts number {bad[:8]} of those kept; nothing "
                             "was updated. Look at that model's weights, and try --dtype float32")


# ------------------------------------------------------------------------------------------------------------
# Health of a reward model, in words.


def of_reward_model(history, held_out):
    """What is wrong with a reward model, {name: sentence}, from the log rows of its training (list of dicts)
    and its metrics on held-out comparisons (reward.py)."""
    warnings = {}
    # Equal rewards for all answers have the loss ln 2; it takes some steps to do better. Labels near 1/2, or
    # --margin, make a loss as large, but then the model is right more often.
    if len(history) >= 50:
        loss = means(history[-20:])["loss"]
        if loss > 0.98 * math.log(2) and held_out.get("accuracy", 0.5) < 0.55:
            warnings["loss"] = (
                f"after {len(history)} steps it is {loss:.3f}, and guessing has ln 2 = {math.log(2):.3f}: "
                "the model tells no answer from another; try a larger --lr. Else the labels may be random, "
                "or the two answers the same to it")
    # By length alone: always the longer answer, or always the shorter one.
    if "longer_wins" in held_out:
        by_length = max(held_out["longer_wins"], 1 - held_out["longer_wins"])
        if by_length > 0.55 and held_out["accuracy"] < by_length + 0.02:
            warnings["length"] = (
                f"it is right in {held_out['accuracy']:.0%} of the held-out comparisons, and whoever only "
                f"counts words in {by_length:.0%}: it may have learned no more than length; look at "
                "accuracy_shorter and accuracy_longer, try comparisons of answers of equal length")
    return warnings


# ------------------------------------------------------------------------------------------------------------
# Health of a policy that learns from comparisons, in words.


def of_preferences(history, before, after):
    """What is wrong with a run of dpo.py, {name: sentence}, from its log rows (list of dicts) and its metrics
    before and after. Says nothing of the training while there are fewer than 50 rows."""
    warnings = {}
    history = [row for row in history if "margin" in row]      # online a step may find no pair
    if len(history) >= 50:
        old, now = means(history[:5]), means(history[-20:])
        # The start of every loss is where chosen and rejected answers gain alike; DPO's is ln 2 there.
        if now["margin"] - old["margin"] < 0.03:
            warnings["loss"] = (
                f"after {len(history)} steps the chosen answers lead by {now['margin']:.3f}, at first by "
                f"{old['margin']:.3f}: the loss is still that of the start (dpo: ln 2 = 0.693); try a larger "
                "--lr. Else the labels may be random, or the two answers the same to the model")
        # The loss asks for a distance between the two answers, which may grow while both get less likely.
        if "chosen_reward" in now and now["chosen_reward"] < old["chosen_reward"] - 0.1:
            warnings["chosen answers"] = (
                f"they get less likely too: {now['accuracy']:.2f} of the pairs are in order, and their "
                f"reward fell from {old['chosen_reward']:.2f} to {now['chosen_reward']:.2f}. The loss only "
                "asks that the rejected ones lose more, and both share tokens; try a larger --sft_coef, "
                "fewer --epochs or --loss apo_zero")
    if after["length"] > 1.5 * before["length"]:
        warnings["length"] = (
            f"answers grew from {before['length']:.1f} to {after['length']:.1f} tokens: longer ones were "
            "chosen more often, or sums over tokens favour them; try --loss dpo_norm or simpo")
    return warnings


@torch.no_grad()
def of_adapters(model, state):
    """What is wrong with a trained model that may have LoRA's adapters, {name: sentence}. The sum of weights
    and adapters is saved in fp32, and whoever reads it multiplies in bf16, where an update that is smaller
    than its weight's rounding is lost. state: the trained tensors by name."""
    if Linear.compute_dtype is None:
        return {}
    learnt = missed = 0.0      # squared norms
    for name, layer in model.named_modules():
        if isinstance(layer, LoRA):
            w = layer.linear.weight.float()                                                # (out, in)
            update = 2 * (state[f"{name}.b.weight"] @ state[f"{name}.a.weight"]).to(w.device)
            kept = (w + update).to(Linear.compute_dtype).float() - w.to(Linear.compute_dtype).float()
            learnt += update.square().sum().item()
            missed += (kept - update).square().sum().item()
    share = math.sqrt(missed / max(learnt, 1e-30))
    if share < 0.5:
        return {}
    return {"adapters": (
        "what they learnt is smaller than bf16 rounds the weights that they are added to: read in bf16, the "
        f"saved model is off by {share:.2g} times that; try a larger --lr, or --dtype float32 for whatever "
        "reads it")}


# ------------------------------------------------------------------------------------------------------------
# One PPO iteration, token by token.


def name_of_kept(step, warmup, n_steps, is_last):
    """The name of an iteration whose numbers are kept for the page: "early", "middle", "last", or "". Early:
    the third that trains the policy, which has left the reference by then and still takes large steps."""
    if is_last or step + 1 == n_steps:
        return "last"
    return {warmup + 2: "early", n_steps // 2: "middle"}.get(step, "")


INSPECTED = 3     # responses, to as many prompts
BEFORE = ("logp", "ref_logp", "paid", "score", "reward", "value", "advantage", "whitened", "return")
KL_FORMULAS = {"k1": "logp - ref", "k2": "(logp - ref)^2 / 2", "k3": "exp(ref - logp) - 1 + logp - ref"}


def inspection(value, tok, rows, batch, numbers, after, estimates, cfg):
    """The numbers of a response to each of INSPECTED prompts of an iteration, for inspect.json: first those
    with the most clipped tokens, where one sees what PPO does.

    rows: the prompt rows of all B responses; batch: (ids, mask), (B, T) each. numbers: tensors (B, T) of
    before the update by name, those of BEFORE but "paid"; after: "logp" and "ratio" of after it, the ratio as
    the loss has it. estimates: k1, k2 and k3 of before, (B, T) each. value: the model of after the update."""
    (ids, mask), numbers = batch, dict(numbers)
    # What the reward took off for the KL, per beta: from the numbers, so that an edit of the loop shows here.
    numbers["paid"] = (numbers["score"] - numbers["reward"]) / cfg.kl_coef if cfg.kl_coef else 0 * mask
    kl_name = name_of_kl(numbers["paid"], estimates, mask)

    # clipped: clip(ratio) A is the smaller one in min(ratio A, clip(ratio) A), so that the token has no
    # gradient.
    ratio, clip_high = after["ratio"], cfg.clip_high or cfg.clip                                   # (B, T)
    clipped = torch.where(numbers["whitened"] > 0, ratio > 1 + clip_high, ratio < 1 - cfg.clip) & mask

    # One answer to each prompt: those to a prompt follow one another.
    firsts = torch.arange(0, len(ids), cfg.group, device=ids.device)
    some = firsts[clipped[firsts].sum(1).argsort(descending=True, stable=True)][:INSPECTED]        # (n,)
    values = torch.zeros_like(ratio)
    if value is not None:
        values[some] = in_chunks(partial(token_values, value), ids[some], mask[some], cfg.micro_batch)
    after = after | {"value": values, "clipped": clipped}

    responses = []
    for i in some.tolist():
        answer = ids[i][mask[i]].tolist()
        tokens = ["<eos>" if t in tok.eos_ids else tok.decode([t]) for t in answer]
        responses.append({
            "prompt": rows[i]["prompt"][-1]["content"], "response": tok.decode(answer).strip(),
            "tokens": tokens, "score": numbers["score"][i].sum().item(), "ended": tokens[-1] == "<eos>",
            "before": {name: numbers[name][i][mask[i]].tolist() for name in BEFORE},
            "after": {name: x[i][mask[i]].tolist() for name, x in after.items()}})
    raw = numbers["advantage"][mask]     # of all response tokens
    return {"beta": cfg.kl_coef, "gamma": cfg.gamma, "lam": cfg.lam, "clip": cfg.clip,
            "clip_high": clip_high, "advantage": cfg.advantage, "mean": raw.mean().item(),
            "std": raw.std(correction=0).item(), "bf16": Linear.compute_dtype is not None,
            "kl": {"name": kl_name, "formula": KL_FORMULAS.get(kl_name, "of this code's own")},
            "responses": responses}


def name_of_kl(paid, estimates, mask):
    """Which of the estimates (k1, k2, k3) of the KL was paid for, by its numbers (B, T) each: "k1", "k2",
    "k3", or "KL" where it is none of them."""
    for name, estimate in zip(KL_FORMULAS, estimates):
        if (paid - estimate)[mask].abs().max() < 1e-3:
            return name
    return "KL"


def inspection_text(page):
    """One response of an `inspection` as text of 100 columns: the numbers behind every equation of ppo.py,
    with as many digits as they have."""
    response, kl, low, high = page["responses"][0], page["kl"], 1 - page["clip"], 1 + page["clip_high"]
    lines = [response["prompt"], f"    -> {response['response']}", "",
             f"iteration {page['iteration']}: score r(x, y) = {response['score']:.4g}, "
             f"beta = {page['beta']:g}, gamma = {page['gamma']:g}, lam = {page['lam']:g}, "
             f"eps = {page['clip']:g}",
             f"R_t = r_t - beta {kl['name']},  {kl['name']} = {kl['formula']}, r_t: the score, at the last "
             "token (of each step)",
             f"A, {page['advantage']}: {page['how']}"]
    if page["whitened"]:
        lines.append(f"A -> whitened: minus the mean {page['mean']:.4g}, over the standard deviation "
                     f"{page['std']:.4g} of all tokens; below 0 is worse than this batch")
    lines += [f"return = A + V;  ratio: that of the loss (ppo.log_ratio), clipped where A pushes it out of "
              f"{low:g} to {high:g};", f"the loss is a mean over {page['mean_over']}"]
    if page["bf16"]:
        lines.append("products are in bf16: three digits of a number are known")
    titles = {"logp": "logp", "ref_logp": "ref", "paid": kl["name"], "reward": "R", "value": "V",
              "advantage": "A", "whitened": "whitened", "return": "return"}
    if not page["whitened"]:
        del titles["whitened"]
    lines += ["", "before the update", *columns(response, "before", titles, page["bf16"])]
    after = {"logp": "logp", "value": "V", "ratio": "ratio"}
    lines += ["", "after it"]
    clipped = ["clipped", *["yes" if hit else "no" for hit in response["after"]["clipped"]]]
    for line, word in zip(columns(response, "after", after, page["bf16"]), clipped):
        lines.append(f"{line}    {word}")
    return "\n".join(lines)


def columns(response, when, titles, bf16):
    """The tokens of a response with their numbers of before or after the update (when), as lines of text; the
    first one has the titles {name: title}."""
    lines = [f"{'t':>3} {'token':14}" + "".join(f"{title:>10}" for title in titles.values())]
    for t, token in enumerate(response["tokens"]):
        line = f"{t:>3} {token!r:14.14}"
        for name in titles:
            x = response[when][name][t] + 0.0      # no -0
            line += f"{x:>10.3g}" if bf16 else f"{x:>10.5f}"
        lines.append(line)
    return lines
