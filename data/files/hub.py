"""The hub: models by name, fetched to a cache with the standard library, resumable, size and hash checked.

Environment: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE or HF_HOME, and NANORLHF_CACHE.
"""
import hashlib
import http.client
import math
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from data.files import CheckpointError, require
from data.files.safetensors import INDEX, WEIGHTS, read_index, sync

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
NEEDED = ("config.json", "tokenizer.json")
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
WHY = {401: " (no such model, or a gated one: accept its licence on the hub and set HF_TOKEN)",
       403: " (a gated model: accept its licence on the hub, with the account of HF_TOKEN)",
       404: " (no such model, or one without config.json, tokenizer.json and safetensors: a LoRA adapter?)"}


def fetch_hub(name):
    """Folder with a hub model such as 'gpt2' or 'Qwen/Qwen2.5-0.5B-Instruct': in the cache of Hugging Face's
    libraries, or in ours, to which what is missing is downloaded. CheckpointError: it cannot be had."""
    require(HUB_NAME.fullmatch(name) and ".." not in name,
            f"{name!r} is neither a folder nor the name of a hub model")
    home = os.path.expanduser("~")                    # stays "~" for a user without a home folder
    snapshot = hf_snapshot(name, home)
    if snapshot:
        return snapshot
    cache = os.environ.get("NANORLHF_CACHE") or os.path.join(home, ".cache", "nanorlhf")
    require(cache[0] != "~", f"{name}: there is no home folder to keep it in; set NANORLHF_CACHE to a folder")
    folder = Path(cache) / name.replace("/", "--")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    base = f"{endpoint.rstrip('/')}/{name}/resolve/main/"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in NEEDED:
            download(base + file, folder / file)

        # The weights come last, so that nothing is asked for once they are there. Big models have shards.
        if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
            for file in (*OPTIONAL, WEIGHTS):
                download(base + file, folder / file, needed=False)
        if not (folder / WEIGHTS).exists():
            download(base + INDEX, folder / INDEX)
            for file in sorted(set(read_index(folder / INDEX).values())):
                download(base + file, folder / file)
    except (OSError, http.client.HTTPException) as e:
        why = f"{e}{WHY.get(getattr(e, 'code', 0), '')}"
        what = f"{name} is no folder here and cannot be fetched from {getattr(e, 'url', base)}: {why}"
        by_hand = f"To do it by hand, put {', '.join(NEEDED)} and {WEIGHTS} into {folder}"
        raise CheckpointError(f"{what}. {by_hand}") from None
    return folder


def hf_snapshot(name, home):
    """The newest version of a hub model in the cache of Hugging Face's libraries, None unless it is whole."""
    hf_home = os.environ.get("HF_HOME") or os.path.join(home, ".cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(hf_home, "hub"))
    folder = cache / f"models--{name.replace('/', '--')}"
    newest = folder / "refs" / "main"                 # holds the name of a folder in snapshots/
    if not os.path.isfile(newest):
        return None
    snapshot = folder / "snapshots" / newest.read_text().strip()
    whole = all(os.path.isfile(snapshot / file) for file in NEEDED)
    weights = os.path.isfile(snapshot / WEIGHTS) or os.path.isfile(snapshot / INDEX)
    return snapshot if whole and weights else None


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, never from https to anything else, and notes a file's size and hash, which the hub
    sends with the redirect to it."""

    def __init__(self):
        self.noted = {}

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        secure = newurl.startswith(req.full_url.partition(":")[0])
        require(secure, f"{req.full_url}: redirected to {newurl}, which is not https")
        self.noted |= {key.lower(): x for key, x in headers.items() if key.lower().startswith("x-linked-")}
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url, path, needed=True):
    """Fetch url to path, unless it is there, or the server has none and it is not needed. A broken transfer
    leaves PATH.part, which the next call continues; the file gets its name only when its size is right, and
    its SHA-256 if the server states it. One process at a time.
    Raises OSError or http.client.HTTPException (network), CheckpointError (wrong content)."""
    part, redirects = path.with_name(path.name + ".part"), Redirects()
    if path.exists():
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError("HF_HUB_OFFLINE is set")
    start = max(part.stat().st_size - 1, 0) if part.exists() else 0   # one byte back: never an empty range
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:                                         # for the hub alone: redirects go on without it
        require(token.isascii() and token.isprintable(), "HF_TOKEN has characters that are in no token")
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 404 and not needed:
            return
        same_host = urllib.parse.urlsplit(e.url)[:2] == urllib.parse.urlsplit(url)[:2]
        if e.code == 401 and token and same_host and e.url != url:
            return download(e.url, path, needed)      # the hub has moved the file, and wants the token again
        if e.code != 416:                             # 416: PATH.part is longer than the file
            raise
        part.unlink()
        return download(url, path, needed)
    with response:
        headers = {key.lower(): x for key, x in response.headers.items()} | redirects.noted
        want = re.fullmatch('"?([0-9a-f]{64})"?', headers.get("x-linked-etag") or headers.get("etag", ""))
        resumed = response.status == 206
        if resumed and not (want and headers.get("content-range", "").startswith(f"bytes {start}-")):
            part.unlink()                             # without a hash two versions of a file could be mixed
            return download(url, path, needed)
        if not resumed:
            start = 0
        total = response.length and start + response.length       # None: the server does not say
        if headers.get("x-linked-size", "").isdecimal():
            total = int(headers["x-linked-size"])

        # Hash what is there already; write and hash what comes.
        sha = hashlib.sha256()
        with open(part, "r+b" if start else "wb") as f:
            while f.tell() < start:
                sha.update(f.read(min(1 << 20, start - f.tell())))
            while (block := response.read(1 << 20)) and f.tell() <= (total or math.inf):
                f.write(block)
                sha.update(block)
                shown = f"{f.tell() / 1e6:.1f} of {(total or 0) / 1e6:.1f} MB"
                print(f"\r{path.name}: {shown}", end="", file=sys.stderr)
            done = f.tell()
        print(file=sys.stderr)
    require(not total or done >= total, f"{url}: stopped at {done} of {total} bytes; run again to continue")
    if total and done != total or want and sha.hexdigest() != want[1]:
        part.unlink()
        raise CheckpointError(f"{url}: size or SHA-256 is not what the server announced; deleted, run again")
    sync(part)
    os.replace(part, path)
