"""Is a run healthy, in words; and one iteration of PPO, token by token (ppo.py --inspect, the page)."""
import math

import torch

from model import token_logprobs, token_values


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
    if "gold" in now:
        hacking = reward_hacking(history, now, cfg)
        if hacking:
            warnings["reward hacking"] = hacking
    return warnings


def reward_hacking(history, now, cfg):
    """A sentence where gold has fallen since its best five iterations in a row while the reward rose; else
    ""."""
    golds = [row["gold"] for row in history]
    starts = range(len(golds) - 4)
    at = max(starts, key=lambda i: sum(golds[i: i + 5]))
    best = means(history[at: at + 5])
    if now["gold"] >= best["gold"] - 0.05 or now["reward"] <= best["reward"]:
        return ""
    cures = [f"--kl_budget {best['kl_exact']:.1f}", "a larger --kl_coef",
             "several reward models with --ensemble min"]
    if cfg is None or not cfg.relabel:
        cures.insert(0, "--relabel 1")
    return (f"gold fell from {best['gold']:.2f} to {now['gold']:.2f} while the reward rose from "
            f"{best['reward']:.2f} to {now['reward']:.2f}: the policy exploits the reward model (Goodhart's "
            f"law); try {', '.join(cures[:-1])}, or {cures[-1]}")


# ------------------------------------------------------------------------------------------------------------
# Health of a reward model, in words.


def of_reward_model(history, held_out):
    """What is wrong with a reward model, {name: sentence}, from the log rows of its training (list of dicts)
    and its metrics on held-out comparisons (reward.py)."""
    warnings = {}
    # Equal rewards for all answers have the loss ln 2; it takes some steps to do better.
    if len(history) >= 50:
        loss = means(history[-20:])["loss"]
        if loss > 0.98 * math.log(2):
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


# ------------------------------------------------------------------------------------------------------------
# One PPO iteration, token by token.

INSPECTED = 3     # responses, to as many prompts
BEFORE = ("logp", "ref_logp", "reward", "value", "advantage", "whitened", "return")


def inspection(policy, value, tok, rows, batch, numbers, cfg):
    """The numbers of a response to each of the first prompts of an iteration, for inspect.json. rows: the
    prompt rows of all B responses; batch: (ids, mask), (B, T) each. numbers: tensors (B, T) of before the
    update by name, "score" and those of BEFORE; the models are those of after the update."""
    raw = numbers["advantage"][batch[1]]     # of all response tokens
    some = slice(0, INSPECTED * cfg.group, cfg.group)     # the answers to a prompt follow one another
    ids, mask, rows = batch[0][some], batch[1][some], rows[some]
    numbers = {name: x[some] for name, x in numbers.items()}
    with torch.no_grad():
        logp = token_logprobs(policy, ids, mask, cfg.temperature)                     # (n, T)
        values = torch.zeros_like(logp) if value is None else token_values(value, ids, mask)
    ratio = (logp - numbers["logp"]).exp()
    # clipped: clip(ratio) A is the smaller one in min(ratio A, clip(ratio) A), so that the token has no
    # gradient
    up, clip_high = numbers["whitened"] > 0, cfg.clip_high or cfg.clip
    clipped = torch.where(up, ratio > 1 + clip_high, ratio < 1 - cfg.clip)

    # To the CPU once, not number by number.
    ids, mask, logp, values, ratio, clipped = (x.cpu() for x in (ids, mask, logp, values, ratio, clipped))
    numbers = {name: x.cpu() for name, x in numbers.items()}
    responses = []
    for i in range(len(ids)):
        m = mask[i]
        tokens = ["<eos>" if t in tok.eos_ids else tok.decode([t]) for t in ids[i][m].tolist()]
        before = {name: numbers[name][i][m].tolist() for name in BEFORE}
        after = {"logp": logp[i][m].tolist(), "value": values[i][m].tolist(), "ratio": ratio[i][m].tolist(),
                 "clipped": clipped[i][m].tolist()}
        text = tok.decode(ids[i][m].tolist()).strip()
        responses.append({"prompt": rows[i]["prompt"][-1]["content"], "response": text, "tokens": tokens,
                          "score": numbers["score"][i].sum().item(), "ended": tokens[-1] == "<eos>",
                          "before": before, "after": after})
    return {"beta": cfg.kl_coef, "gamma": cfg.gamma, "lam": cfg.lam, "clip": cfg.clip,
            "clip_high": clip_high, "advantage": cfg.advantage, "mean": raw.mean().item(),
            "std": raw.std(correction=0).item(), "responses": responses}


def inspection_text(page):
    """One response of an `inspection` as text of 100 columns: the numbers behind every equation of ppo.py."""
    response = page["responses"][0]
    before, after = response["before"], response["after"]
    lines = [response["prompt"], f"    -> {response['response']}", "",
             f"iteration {page['iteration']}: score r(x, y) = {response['score']:.4f}, "
             f"beta = {page['beta']:g}, gamma = {page['gamma']:g}, lam = {page['lam']:g}, "
             f"eps = {page['clip']:g}",
             "R_t = -beta (logp - ref), plus r at the last token (of each step);  return = A + V;  "
             "ratio = exp(new logp - logp)",
             f"A, {page['advantage']}: {page['how']}",
             f"A -> whitened (gae, reinforce++): minus the mean {page['mean']:.4f}, over the standard "
             f"deviation {page['std']:.4f} of all tokens", "",
             "before the update"]
    titles = ("logp", "ref", "R", "V", "A", "whitened", "return")
    lines.append(f"{'t':>3} {'token':14}" + "".join(f"{title:>11}" for title in titles))
    for t, token in enumerate(response["tokens"]):
        cells = "".join(f"{before[name][t] + 0.0:>11.5f}" for name in BEFORE)
        lines.append(f"{t:>3} {token!r:14.14}{cells}")
    lines += ["", "after it", f"{'t':>3} {'token':14}{'logp':>11}{'V':>11}{'ratio':>11}    clipped"]
    for t, token in enumerate(response["tokens"]):
        cells = "".join(f"{after[name][t] + 0.0:>11.5f}" for name in ("logp", "value", "ratio"))
        lines.append(f"{t:>3} {token!r:14.14}{cells}    {'yes' if after['clipped'][t] else 'no'}")
    return "\n".join(lines)
