"""The files people have, in and out; nothing in here is about RLHF.

    formats        the data sets people bring, as five kinds of rows
    rows           the JSON that they are made of, and its values, checked
    tokenizer      tokenizer.json and chat templates
    checkpoint     Hugging Face folders: config and weights, and what a resumed run needs
    safetensors    the tensors in them
    hub            folders fetched from the hub, kept in a cache
"""
from pathlib import Path

from data import InputError, read_json


class CheckpointError(InputError):
    """A file that is missing, damaged, unsafe or of a kind we do not support; names the file or tensor."""


def require(ok, message):
    """Raise CheckpointError(message) unless ok."""
    if not ok:
        raise CheckpointError(message)


# How a file begins that stands in the place of JSON or safetensors: what it is, and what to do about it.
WRONG_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder",
    b"<": "a web page, not the file itself; download the file again",
    b"PK": "a zip archive, as pickled weights are, which are never opened; unpack it, or save the model with "
           "safetensors"}


def wrong_kind(path):
    """What a file is instead of JSON or safetensors, and what to do; "" if its first bytes do not tell."""
    with open(path, "rb") as f:
        start = f.read(100).lstrip()
    for first, what in WRONG_KINDS.items():
        if start.startswith(first):
            return what
    return ""


def read_object(path, data=None):
    """The JSON object in a file, or in `data` (bytes of it). CheckpointError: there is none."""
    require(Path(path).is_file(), f"{path}: no such file")
    try:
        return read_json(path, data, dict)
    except InputError as e:
        what = wrong_kind(path)
        raise CheckpointError(f"{path}: {what}" if what else str(e)) from None
