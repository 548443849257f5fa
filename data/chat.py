"""Talk to a checkpoint in the terminal.

    python -m data.chat                             out/ppo
    python -m data.chat out/sft --temperature 0     another one, and always its likeliest answer
    python -m data.chat chat_model --keep           one that was trained on conversations

Every line is answered afresh, because the models made here have learned from single questions: with an
earlier exchange before it the same question gets another answer, and a wrong one. /keep carries the
conversation along from then on, and once more /keep ends that. /base, /sft, ... switch to the checkpoint of
that name beside this one, so that all of them can be asked the same. An empty line, or Ctrl-D, ends the chat.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from data import InputError, read_json, report, sample, world
from data.folder import run_of
from data.files.tokenizer import tokenizer_from_ranks
from data.flags import ToolFlags, program
from data.setup import seeded, setup
from data.world import build


@dataclass
class Config(ToolFlags):
    """The flags of `python -m data.chat`."""
    # Chat
    model: str = "out/ppo"        # checkpoint: a folder of ours, of Hugging Face, or a hub name; may be
                                  # written first, without --model
    keep: bool = False            # carry the conversation along, as /keep does
    temperature: float = 1.0      # of sampling (0: always the likeliest token)
    max_new: int = 64             # longest answer, in tokens


def models_beside(folder):
    """The names of the checkpoints in a folder that can talk, which reward models cannot."""
    names = []
    for path in sorted(Path(folder).glob("*/config.json")):
        try:
            kinds = read_json(path, kind=dict).get("architectures") or []
        except InputError:      # somebody's file
            continue
        if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
            names.append(path.parent.name)
    return names


def what_it_knows(folder, tok):
    """What a model of the tiny world can be asked, as text; "" for one with another vocabulary or data."""
    tiny = tokenizer_from_ranks(world.TINY / "tiny.tiktoken")
    if tok.bytes_of != tiny.bytes_of or run_of(folder).get("config", {}).get("data"):
        return ""
    examples = []
    for family in report.FAMILIES:
        # A question that it has answered well, if it has left its answers; else one of the world's.
        good = []
        for row in report.rows_in(folder):
            if row.get("family") == family and row["after"].get("gold", 0) >= 0.9:
                good.append(row)
        known = [question["q"] for question in build.questions() if question["family"] == family]
        examples.append(report.shortest(good)["prompt"] if good else known[0])
    lines = "\n    ".join(examples)
    return ("It knows nothing but the tiny world. Ask in the words of data/world/tiny/test.jsonl, such as\n"
            f"    {lines}\n")


def read_line(question):
    """A line from the terminal, without blanks around it; "" at the end of the input."""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


def cut_to_fit(messages, tok, room):
    """Messages without the oldest exchanges, so that they take at most `room` tokens; [] if the last question
    alone takes more."""
    while messages and len(tok.render(messages, generation_prompt=True)[0]) > room:
        messages = messages[2:]
    return messages


def main(cfg):
    """Talk until there is an empty line."""
    device, parent = setup(cfg), Path(cfg.model).parent
    model, tok = sample.load_sampler(cfg.model, device)
    names = models_beside(parent)
    print(f"--- {cfg.model}. An empty line ends the chat.")
    if not cfg.keep:
        print("Every line is answered afresh; /keep carries the conversation along.")
    if len(names) > 1:
        print(f"/{' /'.join(names)} switch to another model.")
    print(what_it_knows(cfg.model, tok), end="", flush=True)

    keep, messages, turn = cfg.keep, [], 0
    while text := read_line("you> "):
        if text == "/keep":
            keep, messages = not keep, []
            print(f"--- {'a conversation begins' if keep else 'every line is answered afresh'}")
            continue
        if text[0] == "/":
            try:
                model, tok = sample.load_sampler(another_model(text[1:], parent), device)
                messages = []
                print(f"--- {text[1:]}")
            except InputError as e:
                print(f"({e})")
            continue

        # What no longer fits into the context is forgotten, the oldest exchange first.
        earlier = messages if keep else []
        room = model.cfg.max_len - cfg.max_new
        messages = cut_to_fit([*earlier, {"role": "user", "content": text}], tok, room)
        if not messages:
            print(f"(too long: a question and --max_new {cfg.max_new} have to fit into {model.cfg.max_len} "
                  "tokens)")
            continue
        generator, turn = seeded(cfg.seed, turn), turn + 1
        texts, _, _ = sample.sample_answers(model, tok, [messages], cfg.max_new, generator, cfg.temperature)
        answer = texts[0].strip()
        print(f"model> {answer}", flush=True)
        messages.append({"role": "assistant", "content": answer})


def another_model(name, parent):
    """The folder of the checkpoint of a name beside this one. InputError: there is none."""
    if not (parent / name / "config.json").exists():
        raise InputError(f"there is no model {name} in {parent}")
    return parent / name


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--model")
    program(main, Config, __doc__)
