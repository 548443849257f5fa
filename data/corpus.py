"""A text to pretrain on, as ids; and how well a model compresses it."""
import math
from pathlib import Path

import torch

from data import InputError
from model import token_logprobs


def read_corpus(path, tok, length, min_windows):
    """Ids of a text, before each document the token that stands there in pretraining (Tokenizer.start_id):
    train (N,) and held out (M,), the last 2 %, at least `length` tokens. InputError: no such file, not UTF-8,
    fewer than `min_windows` x `length` tokens."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such text file")
    try:
        documents = Path(path).read_text(encoding="utf-8").split("<|endoftext|>")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e})") from None
    ids = torch.cat([torch.tensor([tok.start_id, *tok.encode(text)]) for text in documents])
    if len(ids) < min_windows * length:
        raise InputError(f"{path}: {len(ids)} tokens are too few for sequences of {length}; add text")
    held_out = max(length, len(ids) // 50)
    return ids[:-held_out], ids[-held_out:]


@torch.no_grad()
def bits_per_byte(model, tok, ids, length=128, batch=32):
    """Compression of a text: total -log2 p of its ids (N,), cut into windows, divided by the bytes of those
    that are predicted: not the first of a window, nor what is left behind the last window."""
    ids = ids[: len(ids) // length * length].view(-1, length)
    n_bytes = sum(tok.byte_counts(ids[:, 1:].flatten().tolist()))
    nll = 0.0
    for x in ids.split(batch):
        nll -= token_logprobs(model, x, torch.ones_like(x, dtype=torch.bool)).cpu().double().sum().item()
    return nll / math.log(2) / n_bytes
