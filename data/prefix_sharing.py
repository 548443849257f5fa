"""Prefix sharing (arXiv:2410.20305): the two answers of a pair in one row behind their prompt, so that the
model reads the prompt once. dpo.answer_logps takes this way for pairs; tests/test_dpo.py holds it equal to
the plain one, an answer a row."""
import torch

from model import logprobs_from, pad_batch

# With an answer a row a step of dpo.py (forward, backward, AdamW) takes 1.35 times as long in the tiny world
# in fp32 and 1.41 times in bf16 (prompts and answers of 22 tokens; one core of a Xeon).


def pair_logps(model, examples, pad_id):
    """Summed log-probs (2, B) of the first and the second answers of B examples (prompt ids, first answer
    ids, second answer ids, ..) under the model, and their numbers of tokens (2, B). Both follow their prompt
    in one row:

        prompt, first answer, the prompt's last token once more, second answer, padding

    Each answer stands where it would alone, and sees the prompt and itself. The prompt's last token predicts
    the first one of an answer, so each answer has its own copy of it."""
    # The rows. U is a multiple of 8, because attention kernels want their masks aligned.
    rows, sizes = [], []
    for prompt, first, second, *_ in examples:
        rows.append(prompt + first + prompt[-1:] + second)
        sizes.append([[len(prompt)], [len(first)], [len(second)]])
    length = -(-max(map(len, rows)) // 8) * 8
    ids, real = pad_batch(rows, pad_id, length=length)                              # (B, U) each
    n_prompt, n_first, n_second = torch.tensor(sizes).unbind(1)                     # (B, 1) each

    # Which tokens are the second answer's, which are shared, and where each stands in its own conversation.
    at = torch.arange(ids.shape[1])                                                 # (U,)
    is_second, is_shared = at >= n_prompt + n_first, at < n_prompt - 1              # (B, U) each
    pos = (at - is_second * (n_first + 1)) * real                                   # (B, U)
    is_answer = real & (at >= n_prompt) & (at != n_prompt + n_first)                # (B, U), stays on the CPU

    # Run the model, and add up what it says of each answer. Token i sees what is shared and its own answer.
    device = model.wte.weight.device
    for_model = (ids, pos, is_second, is_shared)
    ids, pos, is_second, is_shared = [x.to(device, non_blocking=True) for x in for_model]
    attends = is_shared[:, None] | (is_second[:, None] == is_second[:, :, None])    # (B, U, U)
    hidden = model(ids, pos=pos, attn_mask=attends.tril()[:, None])                 # (B, U, C)
    logp = logprobs_from(model, hidden, ids, is_answer)                             # (B, U), 0 elsewhere
    of_second = (logp * is_second).sum(1)                                           # (B,)
    of_first = (logp * ~is_second).sum(1)
    return torch.stack((of_first, of_second)), torch.cat((n_first, n_second), dim=1).T.to(device)
