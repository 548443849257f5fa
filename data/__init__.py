"""What the world gives: the tiny world, loaders for the files people bring, checkpoints and tokenizers from outside."""
import importlib
import os
from pathlib import Path


class InputError(ValueError):
    """Something the user can mend: the message is one sentence that names the file, line, flag or tensor."""


def write_atomic(path, data):
    """Write bytes so that the file is either the old or the new one, never half of it. Of several processes (torchrun)
    the first one writes."""
    if int(os.environ.get("RANK", 0)):
        return
    new = Path(path).with_name(Path(path).name + ".new")
    with open(new, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path)


def function_of(name, flag):
    """The Python function that a flag names as "module:function". InputError: there is none."""
    module, function = name.rsplit(":", 1)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f"{flag} {name}: {e}") from None
