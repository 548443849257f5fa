"""A language model behind an OpenAI-compatible address (vLLM, llama.cpp server), and answers that are paid for once.

A request is {"prompt", "max_tokens", "temperature", "seed"} and answered by {"text", "ended"}, or it is
{"prompt", "options": [" (A)", " (B)"]} and answered by {"logp": [l_A, l_B]}; {"refused": why} answers either.
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

from data import InputError

STOPS = ["\n\nHuman", "\n\nAssistant", "\n\nCritique", "\n\nRevision"]   # where the answer of a critic ends


def cut(text, ended):
    """A completion up to the first stop marker, and whether it came to an end at all."""
    stop = min((i for s in STOPS if (i := text.find(s)) >= 0), default=None)
    return {"text": text[:stop], "ended": ended or stop is not None}


def connect(url, model, timeout, retries, parallel, counts):
    """(name, ask) of the model at url, such as http://localhost:8000/v1; ask(requests) yields answers in order.

    Time-outs, 429 (after Retry-After), 5xx and malformed answers are tried again up to `retries` times and counted in
    `counts`; what stays malformed is answered None. $CRITIC_API_KEY, if set, is sent along. InputError: the server
    cannot be reached, wants a key, or knows no such address."""
    base, key = url.rstrip("/"), os.environ.get("CRITIC_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def post(path, body=None, read=lambda answer: answer):
        """read(the JSON of the answer); {"refused"} if the server will not; None if its answers make no sense."""
        for attempt in range(retries + 1):
            wait, malformed = 2.0 ** attempt, False
            try:
                data = None if body is None else json.dumps(body).encode()
                with urllib.request.urlopen(urllib.request.Request(base + path, data, headers), timeout=timeout) as r:
                    text = r.read()
                malformed = True
                return read(json.loads(text))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:   # a 200 that makes no sense
                if not malformed:
                    raise InputError(f"--critic {url}: {e}") from None
                problem = f"malformed answer ({type(e).__name__}: {e})"
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code} {e.reason}"
                if e.code in (400, 413, 422):
                    return {"refused": problem}
                if e.code not in (408, 409, 429) and e.code < 500:
                    raise InputError(f"--critic {url}{path}: {problem}") from None
                if re.fullmatch(r"\d+(\.\d+)?", after := e.headers.get("Retry-After", "")):
                    wait = float(after)
            except (OSError, http.client.HTTPException) as e:   # no connection, time-out, half an answer
                problem = f"{type(e).__name__}: {e}"
            if attempt < retries:
                counts["retried"] += 1
                time.sleep(wait)
        if malformed:
            counts["malformed"] += 1
            return None
        raise InputError(f"--critic {url}: {problem}, {retries + 1} times; what was answered is kept, run the "
                         "same command again to go on")

    def completion(answer):
        choice = answer["choices"][0]
        if choice.get("finish_reason") == "content_filter":
            return {"refused": "content filter"}
        return cut(choice["text"] + "", choice.get("finish_reason") == "stop")

    def letters(answer):
        """Log-probs of A and B among the likeliest next tokens after " ("; one that is not listed is at most as likely
        as the last that is, and where neither is listed the critic has not answered."""
        choice, top = answer["choices"][0], {}
        if choice.get("finish_reason") == "content_filter":
            return {"refused": "content filter"}
        for token, logp in choice["logprobs"]["top_logprobs"][0].items():
            letter = token.strip().rstrip(")")
            top[letter] = max(float(logp), top.get(letter, -math.inf))
        if not {"A", "B"} & set(top):
            return {"logp": [-99.0, -99.0]}
        return {"logp": [top.get(letter, min(top.values())) for letter in "AB"]}

    def one(request):
        body = {"model": name, "prompt": request["prompt"]}
        if "options" in request:
            body |= {"prompt": request["prompt"] + " (", "max_tokens": 1, "temperature": 0, "logprobs": 10}
            return post("/completions", body, letters)
        body |= {k: request[k] for k in ("max_tokens", "temperature", "seed")} | {"stop": STOPS}
        return post("/completions", body, completion)

    name = model or post("/models", read=lambda answer: answer["data"][0]["id"])
    if not isinstance(name, str):
        raise InputError(f"--critic {url}/models lists no model; name one with --critic_model")

    def ask(requests):
        with ThreadPoolExecutor(parallel) as pool:
            jobs = [pool.submit(one, r) for r in requests]
        failed = [job.exception() for job in jobs if job.exception()]
        yield from (None if job.exception() else job.result() for job in jobs)
        if failed:   # only now, when the caller has kept the answers that did come
            raise failed[0]
    return name, ask


class Kept:
    """ask(requests), whose every answer is kept in a file as soon as it is there, one JSON line under the hash of model
    and request: nothing is asked (and paid for) twice, and a run that was broken off continues."""

    def __init__(self, name, ask, file, batch, counts=None):
        self.name, self.ask, self.file, self.batch, self.known = name, ask, Path(file), batch, {}
        self.counts = Counter() if counts is None else counts
        for line in self.file.read_bytes().splitlines() if self.file.exists() else []:
            try:
                row = json.loads(line)
                self.known[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                pass   # the line at which an earlier run broke off

    def __call__(self, requests):
        """One answer per request, in order; None where none could be got."""
        keys = [hashlib.sha256(json.dumps([self.name, r], sort_keys=True).encode()).hexdigest() for r in requests]
        todo = {k: r for k, r in zip(keys, requests) if k not in self.known}
        order = sorted(todo, key=lambda k: len(todo[k]["prompt"]))   # similar lengths together: little is padded
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for batch in (order[i: i + self.batch] for i in range(0, len(order), self.batch)):
            for answer, k in zip(self.ask([todo[k] for k in batch]), batch):
                if answer is not None:
                    row = {"key": k, "model": self.name, "prompt": todo[k]["prompt"], "answer": answer}
                    with open(self.file, "a", encoding="utf-8") as f:   # a line of its own, whatever was there before
                        f.write("\n" * (f.tell() > 0) + json.dumps(row))
                    self.known[k] = answer
        self.counts["asked"] += len(todo)
        self.counts["refused"] += sum("refused" in self.known.get(k, ()) for k in todo)
        return [self.known.get(k) for k in keys]
