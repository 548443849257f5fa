"""The constitution and the examples of a critic: ours (data/constitution.json) and Anthropic's published files."""
import json
from pathlib import Path

from data import InputError


def read_json(path):
    """The JSON value in a file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None


def constitution(paths, about=""):
    """Principles [{"key", "critique", "revision"}] for stage 1 and [{"key", "choice", "head", "left", "right"}] for
    stage 2, out of "FILE,FILE": data/constitution.json (a list of objects), CritiqueRevisionInstructions.json
    ({key: {"prompt", "edit_request"}}) or RLMadisonInstructions.json (a list of strings). `about` selects ours."""
    revise, choose = [], []
    for path in paths.split(","):
        rows = read_json(path)
        named = rows.items() if isinstance(rows, dict) else ((f"{Path(path).stem} {i}", r) for i, r in enumerate(rows))
        for key, r in named:
            try:
                if isinstance(r, str):
                    choose.append({"key": key, "choice": r, "head": "\n\n", "left": "[[[", "right": "]]]"})
                elif "edit_request" in r:
                    revise.append({"key": key, "critique": r["prompt"][0], "revision": r["edit_request"]})
                elif not about or r["about"] == about:
                    revise.append({"key": key, "critique": f"\n\nCritiqueRequest: {r['critique']}\n\nCritique:",
                                   "revision": f"\n\nRevisionRequest: {r['revision']}\n\nRevision:"})
                    choice = f"{r['choice']} Options:"
                    choose.append({"key": key, "choice": choice, "head": "", "left": "", "right": ""})
            except (KeyError, TypeError, IndexError):
                raise InputError(f"{path}: principle {key} is of no known format (ours: about, critique, revision, "
                                 "choice; Anthropic's: prompt and edit_request, or a string)") from None
    return revise, choose


def examples(paths):
    """{"critique": [dialogue], "choice": [(conversation, better, worse)], "thinking": [dialogue]} out of "FILE,FILE":
    lists of strings, of {"prompt", "corrects", "incorrects"}, and of {"prompt"} with a {} in place of the principle."""
    out = {"critique": [], "choice": [], "thinking": []}
    for path in filter(None, paths.split(",")):
        for i, shot in enumerate(read_json(path)):
            try:
                if isinstance(shot, str):   # most, not all, of Anthropic's end in an opened turn
                    out["critique"].append("\n\n" + shot.strip().removesuffix("\n\nHuman:").strip())
                elif "corrects" in shot:
                    out["choice"].append((shot["prompt"].removesuffix("\n\nAssistant:"), shot["corrects"][0].strip(),
                                          shot["incorrects"][0].strip()))
                else:
                    text = shot["prompt"].strip()
                    out["thinking"].append("\n\n" + ("" if text.startswith("Human:") else "Human: ") + text)
            except (KeyError, TypeError, AttributeError, IndexError):
                raise InputError(f"{path}: example {i} is of no known format") from None
    return out
