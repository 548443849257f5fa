"""Files of tensors: safetensors in and out, whole or in shards, without a package for it.

A .safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
raw numbers (github.com/huggingface/safetensors).
"""
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from data.files import CheckpointError, read_object, require, wrong_kind

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def read_tensors(folder):
    """All tensors of a folder: model.safetensors, or the shards named in model.safetensors.index.json."""
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)
    where, tensors = read_index(folder / INDEX), {}

    # A folder that somebody else made must not reach out of itself. In a hub cache the files of a snapshot
    # link to blobs/, two folders above.
    here = folder.resolve()
    allowed = (here, here.parent.parent / "blobs")
    for name in sorted(set(where.values())):
        require((folder / name).resolve().parent in allowed, f"{folder / name}: a link out of its folder")
        # A tensor may stand in several shards: the index says in which one it counts.
        for key, t in read_safetensors(folder / name).items():
            if where.get(key) == name:
                tensors[key] = t
    for key in where:
        require(key in tensors, f"{folder / where[key]}: tensor {key!r} is not in it, though {INDEX} says so")
    return tensors


def read_index(path):
    """{tensor: file} of a model.safetensors.index.json; the files are plain names."""
    where = read_object(path).get("weight_map")
    require(isinstance(where, dict) and where, f"{path}: has no weight_map")
    plain_names(where.values(), path)
    return where


def read_safetensors(path):
    """{name: tensor} of a .safetensors file (format: github.com/huggingface/safetensors), mapped into memory
    copy-on-write, so that only what is used is read, once. Every claim of the header is checked against the
    size of the file before anything is mapped or allocated; CheckpointError if one does not hold."""
    # The header, whose length is the first claim that has to fit the file.
    require(Path(path).is_file(), f"{path}: no such file")
    size = Path(path).stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        fits = size >= 8 and n <= min(size - 8, 10**8)
        require(fits, f"{path}: {wrong_kind(path) or f'a header of {n} bytes in a file of {size}'}")
        header = read_object(path, f.read(n))
    header.pop("__metadata__", None)

    # What each entry claims. Numbers are bounded before they are multiplied.
    spans, end = [], 0
    for name, info in header.items():
        where = f"{path}: tensor {name!r}"
        try:
            kind, shape, (a, b) = info["dtype"], info["shape"], info["data_offsets"]
            dims = [*shape, a, b]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{where} lacks a dtype, a shape or two offsets") from None
        require(isinstance(kind, str) and kind in DTYPES, f"{where} has the unsupported dtype {kind!r}")
        possible = len(dims) < 16 and all(type(d) is int and 0 <= d < 2**48 for d in dims)
        possible = possible and math.prod(max(d, 1) for d in shape) < 2**60
        require(possible, f"{where} has an impossible shape or offset")
        size_is = math.prod(shape) * DTYPES[kind].itemsize
        require(b - a == size_is, f"{where} is {kind}{shape} in {b - a} bytes")
        spans.append((a, b, name, DTYPES[kind], shape))

    # The tensors lie side by side and fill the file, so that none reads another's bytes.
    for a, b, name, *_ in sorted(spans, key=lambda span: span[:3]):
        require(a == end, f"{path}: tensor {name!r} starts at byte {a}, the one before it ends at {end}")
        end = b
    require(end == size - 8 - n, f"{path}: the header describes {end} bytes, the file has {size - 8 - n}")

    # Views of the mapped file: a model that is cast or copied on loading takes no more memory than itself.
    data, tensors = torch.from_numpy(np.memmap(path, np.uint8, "c"))[8 + n:], {}
    for a, b, name, dtype, shape in spans:
        raw = data[a:b]
        if raw.storage_offset() % dtype.itemsize:     # a view needs an aligned start
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} and wait until the disk has it."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # The widest numbers first: then each tensor starts at a multiple of its own width.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in names:
        t = tensors[name]
        require(t.dtype in kinds, f"tensor {name!r}: {t.dtype} cannot be stored in a safetensors file")
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            f.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        f.flush()
        os.fsync(f.fileno())


def sync(path):
    """Wait until the disk has a file or a folder's list of names (Windows can do neither this way)."""
    if os.name != "nt":
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def plain_names(names, where):
    """The names, if each is that of a file in a folder and leads nowhere else."""
    for name in names:
        plain = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)
        require(plain, f"{where}: {name!r} is not a plain file name")
    return names
