"""What the world gives: the tiny world, loaders for the files people bring, checkpoints and tokenizers from outside."""


class InputError(ValueError):
    """Something the user can mend: the message is one sentence that names the file, line, flag or tensor."""
