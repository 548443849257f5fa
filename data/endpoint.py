"""Critics: a model of ours, or one behind an OpenAI-compatible address (vLLM, llama.cpp server), and answers
that are paid for once.

A critic takes requests, all of one kind, and gives their answers in order. A request to write is {"prompt",
"max_tokens", "temperature", "seed"} and answered by {"text", "ended"}; a request to choose is {"prompt",
"options": [" (A)", " (B)"]} and answered by {"logp": [l_A, l_B]}. {"refused": why} answers either; None: no
answer could be got.
"""
import hashlib
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from data import InputError
from data.files.checkpoint import load
from data.parallel import RANK
from model import generate, pad_batch, sampling_copy

STOPS = ["\n\nHuman", "\n\nAssistant", "\n\nCritique", "\n\nRevision"]   # where the answer of a critic ends


def cut(text, ended):
    """A completion up to the first stop marker, and whether it came to an end at all."""
    starts = [text.find(stop) for stop in STOPS if stop in text]
    if starts:
        return {"text": text[: min(starts)], "ended": True}
    return {"text": text, "ended": ended}


# ------------------------------------------------------------------------------------------------------------
# A model of ours.


def local_critic(path, device):
    """(name, ask) of a checkpoint; ask(requests) -> answers. The name holds a hash of weights: trained anew,
    it is another critic."""
    model, tok = load(path)
    some = (model.ln_f.weight, model.wte.weight[:8], model.h[0].attn.qkv.weight[:8],
            model.h[-1].mlp.down.weight[:8])
    weights = b"".join(x.detach().numpy().tobytes() for x in some)     # adapters change layers alone
    model = sampling_copy(model).to(device)

    def ask(requests):
        return local_answers(model, tok, requests)
    return f"{path} {hashlib.sha256(weights).hexdigest()[:16]}", ask


def local_answers(model, tok, requests):
    """A model's answers to requests of one kind. The draws of each come from its own seed, whatever is asked
    beside it."""
    # Every request is a document of its own; the tokens of those that the context has room for.
    start = [tok.start_id]
    room = model.cfg.max_len - requests[0].get("max_tokens", 4)        # an option takes 3 or 4 tokens
    answers = [{"refused": "prompt longer than the context"} for _ in requests]
    rows, at = [], []
    for i, request in enumerate(requests):
        row = start + tok.encode(request["prompt"])
        if len(row) <= room:
            rows.append(row)
            at.append(i)

    # Few choices at a time, since their questions may be long.
    if "options" in requests[0]:
        for i in range(0, len(rows), 16):
            found = option_logprobs(model, tok, rows[i: i + 16], requests[0]["options"])
            for j, logp in zip(at[i: i + 16], found):
                answers[j] = {"logp": logp}
    elif rows:
        # A uniform number for every token that may be drawn.
        n, draws = requests[0]["max_tokens"], []
        for i in at:
            generator = torch.Generator().manual_seed(requests[i]["seed"])
            draws.append(torch.rand(n, dtype=torch.float64, generator=generator))
        ids, mask, _ = generate(model, tok, rows, torch.stack(draws), requests[0]["temperature"])    # (B, T)
        for i, x, m in zip(at, ids.cpu(), mask.cpu()):
            answers[i] = completion_of(tok, x[m].tolist(), start)
    return answers


def completion_of(tok, ids, start):
    """The answer that ids spell, up to the token that ends it or begins another document."""
    for n, i in enumerate(ids):
        if i in tok.eos_ids or i in start:
            return cut(tok.decode(ids[:n]), True)
    return cut(tok.decode(ids), False)


@torch.no_grad()
def option_logprobs(model, tok, rows, options):
    """log p(option | row) for each row of ids and each of two options, [[l_A, l_B], ..], in one forward pass:
    options are read up to the first token in which they differ (" (A)" and " (B)": without the closing
    bracket)."""
    a, b = tok.encode(options[0]), tok.encode(options[1])
    n = 0      # how many tokens they share
    while a[n] == b[n]:
        n += 1
    ids, mask = pad_batch([row + a[:n] for row in rows], tok.pad_id, model.wte.weight.device)    # (B, T)
    hidden = model(ids)                                                                        # (B, T, C)

    # Logits at the last n + 1 tokens of each row, where the shared tokens and then the letters are predicted.
    at = mask.sum(1)[:, None] - 1 - torch.arange(n, -1, -1, device=ids.device)                 # (B, n + 1)
    hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))                  # (B, n + 1, C)
    logp = model.logits(hidden).float().log_softmax(-1)                                        # (B, n + 1, V)
    # log p(" (A") = log p(" (") + log p("A" | " ("), and the same with B.
    shared = torch.zeros(len(rows), device=ids.device)
    for i in range(n):
        shared += logp[:, i, a[i]]
    return torch.stack([shared + logp[:, n, a[n]], shared + logp[:, n, b[n]]], dim=1).tolist()


# ------------------------------------------------------------------------------------------------------------
# A model behind an address.


def completion(answer):
    """What a server wrote (JSON), as an answer."""
    choice = answer["choices"][0]
    if choice.get("finish_reason") == "content_filter":
        return {"refused": "content filter"}
    return cut(choice["text"] + "", choice.get("finish_reason") == "stop")


def letters(answer):
    """Log-probs of A and B among a server's likeliest next tokens after " ("; one that is not listed is at
    most as likely as the last that is, and where neither is listed the critic has not answered."""
    choice, listed = answer["choices"][0], {}
    if choice.get("finish_reason") == "content_filter":
        return {"refused": "content filter"}
    # "A", " A" and "A)" are the same letter; the likeliest of them counts.
    for token, logp in choice["logprobs"]["top_logprobs"][0].items():
        letter = token.strip().rstrip(")")
        listed[letter] = max(float(logp), listed.get(letter, -math.inf))
    if "A" not in listed and "B" not in listed:
        return {"logp": [-99.0, -99.0]}
    least = min(listed.values())
    return {"logp": [listed.get("A", least), listed.get("B", least)]}


def model_name(answer):
    """The first model that a server lists."""
    return answer["data"][0]["id"]


class Server:
    """A server at a URL such as http://localhost:8000/v1, asked until it answers. $CRITIC_API_KEY, if set, is
    sent along. counts: what went wrong how often."""

    def __init__(self, url, timeout, retries, counts):
        self.url, self.timeout, self.retries, self.counts = url, timeout, retries, counts
        self.headers = {"Content-Type": "application/json"}
        if os.environ.get("CRITIC_API_KEY"):
            self.headers["Authorization"] = f"Bearer {os.environ['CRITIC_API_KEY']}"

    def post(self, path, body, read):
        """read(the JSON of the answer); {"refused"} if the server will not; None if its answers make no
        sense. Time-outs, 429 (after Retry-After), 5xx and malformed answers are tried again. InputError: the
        server cannot be reached, wants a key, or knows no such address."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            # What comes back, if it can be read, is the answer.
            wait, arrived = 2.0 ** attempt, False
            try:
                request = urllib.request.Request(self.url.rstrip("/") + path, data, self.headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    text = response.read()
                arrived = True
                return read(json.loads(text))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
                if not arrived:      # the address itself makes no sense
                    raise InputError(f"--critic {self.url}: {e}") from None
                problem = f"malformed answer ({type(e).__name__}: {e})"
            except urllib.error.HTTPError as e:
                # It says no for good (refused, or an error), or for now.
                problem = f"HTTP {e.code} {e.reason}"
                if e.code in (400, 413, 422):
                    return {"refused": problem}
                if e.code not in (408, 409, 429) and e.code < 500:
                    raise InputError(f"--critic {self.url}{path}: {problem}") from None
                after = e.headers.get("Retry-After", "")
                if re.fullmatch(r"\d+(\.\d+)?", after):
                    wait = float(after)
            except (OSError, http.client.HTTPException) as e:   # no connection, time-out, half an answer
                problem = f"{type(e).__name__}: {e}"

            # Wait and ask again; in the end an answer without sense is none, and a silent server is an error.
            if attempt < self.retries:
                self.counts["retried"] += 1
                time.sleep(wait)
        if arrived:
            self.counts["malformed"] += 1
            return None
        raise InputError(f"--critic {self.url}: {problem}, {self.retries + 1} times; what was answered is "
                         "kept, run the same command again to go on")

    def answer(self, model, request):
        """One answer of a model to a request."""
        # The letter of an option is its token after " (".
        body = {"model": model, "prompt": request["prompt"]}
        if "options" in request:
            body |= {"prompt": request["prompt"] + " (", "max_tokens": 1, "temperature": 0, "logprobs": 10}
            return self.post("/completions", body, letters)
        body |= {name: request[name] for name in ("max_tokens", "temperature", "seed")}
        return self.post("/completions", body | {"stop": STOPS}, completion)


def connect(url, model, timeout, retries, parallel, counts):
    """(name, ask) of the model at url; ask(requests) yields answers in order, `parallel` asked for at a time.
    retries: further attempts. model "": the first that the server lists."""
    server = Server(url, timeout, retries, counts)
    name = model or server.post("/models", None, model_name)
    if not isinstance(name, str):
        raise InputError(f"--critic {url}/models lists no model; name one with --critic_model")

    def ask(requests):
        failed = None
        with ThreadPoolExecutor(parallel) as pool:
            jobs = [pool.submit(server.answer, name, request) for request in requests]
            for job in jobs:
                failed = failed or job.exception()
                yield None if job.exception() else job.result()
        if failed:   # only now, when the caller has kept the answers that did come
            raise failed
    return name, ask


# ------------------------------------------------------------------------------------------------------------
# Answers kept in a file.


class CachedCritic:
    """critic(requests) -> answers. Every answer of ask(requests) is kept in a file as soon as it is there,
    one JSON line under the hash of model and request: nothing is asked (and paid for) twice, and a run that
    was broken off goes on."""

    def __init__(self, name, ask, file, batch, counts=None):
        """batch: how many requests are asked at a time. counts: a Counter of what was asked, refused, .."""
        self.name, self.ask, self.file, self.batch, self.cache = name, ask, Path(file), batch, {}
        self.counts = Counter() if counts is None else counts
        if not self.file.exists():
            return
        lines, start = self.file.read_bytes().splitlines(), b'{"key": "'
        is_cut_off = len(lines) == 1 and lines[0] != b"" and start.startswith(lines[0])
        if lines and not lines[0].startswith(start) and not is_cut_off:
            raise InputError(f"{file} holds no answers of a critic, and would be added to; choose another "
                             "--out")
        for line in lines:
            try:
                row = json.loads(line)
                self.cache[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                pass   # the line at which an earlier run broke off

    def __call__(self, requests):
        """One answer per request, in order; None where none could be got."""
        # Which answers are in the cache?
        keys, todo = [], {}
        for request in requests:
            text = json.dumps([self.name, request], sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()
            keys.append(key)
            if key not in self.cache:
                todo[key] = request

        # Similar lengths together, so that little is padded.
        order = sorted(todo, key=lambda key: len(todo[key]["prompt"]))
        for i in range(0, len(order), self.batch):
            part = order[i: i + self.batch]
            answers = self.ask([todo[key] for key in part])
            for answer, key in zip(answers, part):     # in this order: a failure comes after the last answer
                if answer is not None:
                    self.keep(key, todo[key], answer)
        self.counts["asked"] += len(todo)
        self.counts["refused"] += sum("refused" in self.cache.get(key, ()) for key in todo)
        return [self.cache.get(key) for key in keys]

    def keep(self, key, request, answer):
        """Add an answer to the file, in a line of its own whatever was there before."""
        row = {"key": key, "model": self.name, "prompt": request["prompt"], "answer": answer}
        if RANK == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as f:
                f.write("\n" * (f.tell() > 0) + json.dumps(row))
        self.cache[key] = answer


def continuations(critic, texts, max_tokens, temperature, rng):
    """What a critic writes after each of the texts; each is drawn from a seed of its own."""
    requests = []
    for text in texts:
        requests.append({"prompt": text, "max_tokens": max_tokens, "temperature": temperature,
                         "seed": rng.randrange(2 ** 40)})
    return critic(requests)


def is_address(path):
    """Whether a critic is a server, and no checkpoint."""
    return path.startswith(("http://", "https://"))


def make_critic(path, cfg, device):
    """The critic at a path or address, as the flags of cai.py say; its answers are kept in a file of
    --out."""
    file, counts = Path(cfg.out) / "critic_answers.jsonl", Counter()
    if is_address(path):
        name, ask = connect(path, cfg.critic_model, cfg.timeout, cfg.retries, cfg.parallel, counts)
        return CachedCritic(name, ask, file, cfg.parallel, counts)
    name, ask = local_critic(path, device)
    return CachedCritic(name, ask, file, 64, counts)
