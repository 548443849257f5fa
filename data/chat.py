"""Talk to a checkpoint in the terminal.

    python -m data.chat                             out/ppo
    python -m data.chat out/sft --temperature 0     another one, and always its likeliest answer

An empty line, or Ctrl-D, ends the chat. /base, /sft, ... switch to the checkpoint of that name beside this
one and begin a new conversation, so that all of them can be asked the same.
"""
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

from data import InputError, sample, world
from data.chain import run_of
from data.flags import program
from data.setup import seeded, setup
from data.files.tokenizer import tokenizer_from_ranks
from data.world import build


@dataclass
class Config:
    """The flags of `python -m data.chat`."""
    # Chat
    model: str = "out/ppo"        # checkpoint: a folder of ours, of Hugging Face, or a hub name; may be
                                  # written first, without --model
    temperature: float = 1.0      # of sampling (0: always the likeliest token)
    max_new: int = 64             # longest answer, in tokens
    seed: int = 0                 # every random draw comes from it
    device: str = ""              # cpu, cuda, cuda:1, ... (default: cuda if there is one)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products


def what_it_knows(folder, tok):
    """What a model of the tiny world can be asked, as text; "" for one with another vocabulary or data."""
    tiny = tokenizer_from_ranks(world.TINY / "tiny.tiktoken")
    if tok.bytes_of != tiny.bytes_of or run_of(folder).get("config", {}).get("data"):
        return ""
    examples = {}
    for question in build.questions():      # the first of each family
        examples.setdefault(question["family"], question["q"])
    return (f"It knows nothing but the tiny world. Ask, in the words of data/world/tiny/test.jsonl, for instance:\n"
            f"    {'    '.join(examples.values())}\n")


def ask(question):
    """A line from the terminal, without blanks around it; "" at the end of the input."""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


def main(cfg):
    """Talk until there is an empty line."""
    device, parent = setup(cfg), Path(cfg.model).parent
    model, tok = sample.load_sampler(cfg.model, device)
    names = sorted(path.parent.name for path in parent.glob("*/config.json"))
    print(f"--- {cfg.model}. An empty line ends the chat.")
    if len(names) > 1:
        print(f"/{' /'.join(names)} switch to another model.")
    print(what_it_knows(cfg.model, tok), end="", flush=True)
    messages, turn = [], 0
    while text := ask("you> "):
        # Another model, and a new conversation.
        if text[0] == "/":
            try:
                if text[1:] not in names:
                    raise InputError(f"there is no model {text[1:]} in {parent}")
                model, tok = sample.load_sampler(parent / text[1:], device)
                messages = []
                print(f"--- {text[1:]}")
            except InputError as e:
                print(f"({e})")
            continue

        # What no longer fits into the context is forgotten, the oldest exchange first.
        messages.append({"role": "user", "content": text})
        room = model.cfg.max_len - cfg.max_new
        while len(messages) > 1 and len(tok.render(messages, True)[0]) > room:
            del messages[:2]
        if len(tok.render(messages, True)[0]) > room:
            print(f"(too long: a question and --max_new {cfg.max_new} have to fit into {model.cfg.max_len} "
                  "tokens)")
            messages = []
            continue
        generator, turn = seeded(cfg.seed, turn), turn + 1
        texts, _, _ = sample.sample_answers(model, tok, [messages], cfg.max_new, generator, cfg.temperature)
        answer = texts[0].strip()
        print(f"model> {answer}", flush=True)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--model")
    program(main, Config, __doc__)
