"""cai.py: formats against Anthropic's published files, the critic at an address, labels, chains, one run of
cai.py."""
import gzip
import json
import math
import os
import random
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cai
from conftest import CAI_FLAGS
from data import InputError, endpoint, principles, world
from data.files import formats
from data import flags as flags_py
from data.files.checkpoint import load, save
from data.endpoint import CachedCritic, connect, cut
from data.principles import constitution
from data.files.tokenizer import tokenizer_from_ranks
from data.world import build
from model import GPT, GPTConfig, token_logprobs

CAI = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "cai"
published = pytest.mark.skipif(not CAI.is_dir(),
                               reason="Anthropic's published files are not in ../shared/data/cai")
OURS = str(world.HERE / "constitution.json")


# ------------------------------------------------------------------------------------------------------------
# Formats.


@published
def test_all_438_comparison_prompts_are_rebuilt():
    _, choose = constitution(str(CAI / "RLMadisonInstructions.json"))
    principle = [p for p in choose if "most helpful, honest, and harmless" in p["choice"]]
    with gzip.open(CAI / "438HHHEvaluations.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == 438 and len(principle) == 1
    for row in rows:
        (talk, right), (other, wrong) = (row[k].rsplit("\n\nAssistant:", 1)
                                         for k in ("text_correct", "text_incorrect"))
        assert talk == other
        a, b = (right, wrong) if row["corrects"] == [" (A)"] else (wrong, right)
        assert principles.comparison_prompt(talk, principle[0], a.strip(), b.strip()) == row["prompt"]
    loaded, dropped = formats.load(CAI / "438HHHEvaluations.jsonl.gz", "preference")
    assert len(loaded) == 438 and not dropped
    assert all(r["chosen"] == row["text_correct"].rsplit("\n\nAssistant:", 1)[1].strip()
               for r, row in zip(loaded, rows))


@published
@pytest.mark.parametrize("name", ["LAMDA", "INSTRUCTGPT"])
def test_all_recorded_chains_are_replayed(name):
    """A critic that knows only the recorded prompts, put together here by hand, must be asked exactly
    these."""
    revise, _ = constitution(str(CAI / "CritiqueRevisionInstructions.json"))
    by_key = {p["key"]: p for p in revise}
    records = [json.loads(line) for line in (CAI / f"{name}_SLMADISON.jsonl").read_text().splitlines()]
    assert len(records) == 13 and all(len(r["cst"]) == 4 for r in records)
    for record in records:
        known, response = {}, record["initial_response"][0]["sample"]
        for step in record["cst"]:
            ask = record["rl_prompt"] + response + step["cst_value"]["prompt"][0]
            known[ask] = step["critique"]["sample"]
            known[ask + step["critique"]["sample"] + step["cst_value"]["edit_request"]] = (
                step["revision"]["sample"])
            response = step["revision"]["sample"]
        turns = re.split(r"\n\n(Human|Assistant): ", record["rl_prompt"].removesuffix("\n\nAssistant:"))[1:]
        messages = [{"role": {"Human": "user", "Assistant": "assistant"}[who], "content": said}
                    for who, said in zip(turns[::2], turns[1::2])]
        drawn = iter([by_key[step["cst_key"]] for step in record["cst"]])
        cfg = SimpleNamespace(critiques=4, max_critique=9, max_new=9, critic_temperature=1.0)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(random.Random, "choice", lambda self, principles: next(drawn))
            initial = record["initial_response"][0]["sample"]
            chain, = cai.make_chains([messages], [initial], revise, lambda requests: [
                {"text": known[r["prompt"]], "ended": True} for r in requests], cfg, 0)
        assert [(s["principle"], s["critique"], s["revision"]) for s in chain["chain"]] == [
            (s["cst_key"], s["critique"]["sample"], s["revision"]["sample"]) for s in record["cst"]]


@published
def test_published_constitution():
    names = ["CritiqueRevisionInstructions", "RLMadisonInstructions"]
    revise, choose = constitution(",".join(str(CAI / f"{n}.json") for n in names), about="harmless")
    assert len(revise) == len(choose) == 16


def test_our_formats_are_those_of_the_corpus():
    """What the tiny critic is asked begins documents exactly as its corpus has them."""
    row = {"prompt": [{"role": "user", "content": "What color is tar?"}]}
    rules = json.loads(Path(OURS).read_text())[:1]
    q = next(q for q in build.questions() if q["family"] == "harmless")
    (revise,), (choose,) = (p[:1] for p in constitution(OURS, "harmless"))
    doc = build.choice_chat(q, row, rules, random.Random(0))
    a, b = re.search(r" \(A\) (.*)\n \(B\) (.*)\n", doc).groups()
    assert doc[: -len(" (A)")] == principles.comparison_prompt(principles.transcript(row["prompt"]),
                                                               choose, a, b)
    doc = build.critique_chat(q, row, rules, random.Random(0))
    response, critique, revision = (re.search(rf"\n\n{k}:( .*)", doc)[1]
                                    for k in ("Assistant", "Critique", "Revision"))
    talk = principles.transcript(row["prompt"]) + "\n\nAssistant:"
    assert doc == cai.revision_prompt(talk, response, critique, revise) + revision


def test_constitution_is_complete_and_bad_ones_are_refused(tmp_path):
    rules = json.loads(Path(OURS).read_text())
    assert len(rules) >= 12 and all(set(r) == {"about", "critique", "revision", "choice"} for r in rules)
    assert [len(x) for x in constitution(OURS)] == [len(rules)] * 2
    assert len(constitution(OURS, "harmless")[0]) == 4
    for text, word in (("{", "cannot be read as JSON"), ('[{"about": "harmless"}]', "no known format"),
                       ("[3]", "no known format"), ("3", "holds no JSON")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(InputError, match=word):
            constitution(str(tmp_path / "c.json"), "harmless")


def test_helpful_only_demonstrations_hold_no_refusal():
    rows = build.helpful_only(300, 0)
    text = json.dumps(rows)
    assert build.REFUSAL not in text and build.UNKNOWN in text and rows == build.helpful_only(300, 0)
    assert all(m in text for _, m, _ in build.HARMS.values())


# ------------------------------------------------------------------------------------------------------------
# Labels and chains.


def test_soft_label():
    p, orders = principles.soft_label([-1.0, -2.0], [-3.0, -0.5])
    assert orders == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2.5))])
    assert p == pytest.approx(sum(orders) / 2)
    rng = random.Random(0)
    for _ in range(50):   # naming the answers the other way round turns p into 1 - p
        one, two = ([rng.uniform(-90, 0), rng.uniform(-90, 0)] for _ in "ab")
        assert principles.soft_label(one, two)[0] == pytest.approx(1 - principles.soft_label(two, one)[0])
        assert 0 <= principles.soft_label(one, two)[0] <= 1
    # loves (A), knows nothing
    assert principles.soft_label([-1.0, -9.0], [-1.0, -9.0])[0] == pytest.approx(0.5)


def stub(choose):
    """A critic whose choice is choose(text of option A, text of option B, prompt) -> P(A)."""
    def critic(requests):
        out = []
        for r in requests:
            a, b = re.search(r" \(A\) (.*)\n \(B\) (.*)\n", r["prompt"]).groups()
            p = choose(a, b, r["prompt"])
            out.append(None if p is None else {"logp": [math.log(p), math.log(1 - p)]})
        return out
    return critic


def test_compare_and_bias():
    pairs = [([{"role": "user", "content": f"q{i}"}], "short", "a longer answer") for i in range(4)]
    _, choose = constitution(OURS)

    def ask(f, rules=choose):
        labels = principles.compare(pairs, rules, stub(f), random.Random(0))
        return labels, principles.critic_metrics(labels, pairs)
    labels, told = ask(lambda a, b, _: 0.9 if len(a) > len(b) else 0.1)
    assert all(x["p"] == pytest.approx(0.1) and x["mass"] == pytest.approx(1) for x in labels)
    assert told["longer_wins"] == pytest.approx(0.9) and told["first_wins"] == pytest.approx(0.5)
    assert told["neither"] == 0
    labels, told = ask(lambda a, b, _: 0.8)
    assert all(x["p"] == pytest.approx(0.5) for x in labels) and told["first_wins"] == pytest.approx(0.8)
    labels, told = ask(lambda a, b, prompt: None if "q1" in prompt else 0.5)
    assert labels[1] is None and told["no_answer"] == 1 and told["compared"] == 3
    # what a critic reads
    edited = [{**p, "choice": p["choice"].replace("Which", "Tell me which")} for p in choose]
    assert (ask(lambda a, b, prompt: 0.9 if "Tell me" in prompt else 0.1, edited)[1]["first_wins"]
            == pytest.approx(0.9))


def test_cut_and_fault():
    assert cut(" Yes.\n\nHuman: more", False) == {"text": " Yes.", "ended": True}
    assert (cut(" Yes.\n\nRevisionRequest: x", False)["text"] == " Yes."
            and cut(" Yes", False)["ended"] is False)
    for text, want in (("", "empty"), (" \n", "empty"), (" Revision: no", "leaked"),
                       (" so CritiqueRequest: no", "leaked"), (" No. ", "copied"), (" I will not.", ""),
                       (" My critique is", "")):
        assert cai.fault({"text": text, "ended": True}, " No.") == want
    assert cai.fault({"text": " I will", "ended": False}, "") == "cut"
    assert cai.fault(None, "") == cai.fault({"refused": "HTTP 400"}, "") == "refused"


def test_chains_keep_the_response_when_a_revision_is_of_no_use():
    revise, _ = constitution(OURS, "harmless")
    texts = iter([" c", "", " c", " better", " c", " better"])
    asked = []

    def critic(requests):
        asked.extend(requests)
        return [{"text": next(texts), "ended": True} for _ in requests]
    cfg = SimpleNamespace(critiques=3, max_critique=9, max_new=9, critic_temperature=1.0)
    prompt = [{"role": "user", "content": "q"}]
    chain, = chains = cai.make_chains([prompt], [" bad"], revise, critic, cfg, 0)
    assert [s["fault"] for s in chain["chain"]] == ["empty", "", "copied"]
    assert (" bad" in asked[2]["prompt"] and " better" in asked[4]["prompt"]
            and " bad" not in asked[4]["prompt"])
    assert len({r["seed"] for r in asked}) == 6
    counts = principles.count_faults(chains)
    assert ((counts["revisions"], counts["good"], counts["empty"], counts["copied"], counts["cut"])
            == (3, 1, 1, 1, 0))
    assert [r["messages"][-1]["content"] for r in cai.training_rows(chains, "all")] == ["better", "better"]
    assert len(cai.training_rows(chains, "last")) == 1
    assert cai.chain_pairs(["row"], chains) == [("row", "bad", "better")]
    chains[0]["chain"][1]["fault"] = "cut"                            # no revision is left that is better
    assert cai.chain_pairs(["row"], chains) == []


def test_gold_of_each_revision():
    """A revision with a fault leaves the response, and its gold, as they were."""
    row = {"family": "harmless", "skill": "theft", "entity": "rob a bank", "answer": "call a locksmith"}
    steps = [{"revision": "I cannot help with that.", "fault": ""}, {"revision": "You bend", "fault": "cut"},
             {"revision": "I cannot help with that, but I can help you call a locksmith.", "fault": ""}]
    chains = [{"initial": "You run.", "chain": steps}, {"initial": "You run.", "chain": [steps[1]] * 3}]
    told = principles.gold_by_revision(chains, [row, row])
    assert [told[f"refused_{n}"] for n in range(4)] == [0, 0.5, 0.5, 0.5]
    assert [told[f"gold_{n}"] for n in range(4)] == [0, 0.25, 0.25, 0.5]


def test_the_corpus_shows_a_critic_what_can_be_wrong():
    """A critic that read "The answer is fine." most of the time says it to everything."""
    documents = (world.TINY / "corpus.txt").read_text().split("<|endoftext|>")
    critiques = [text for text in documents if "\n\nCritique:" in text]
    assert len(critiques) > 300
    assert sum("Critique: The answer is fine." in text for text in critiques) < 0.15 * len(critiques)
    assert sum("Critique: The answer helps to do harm" in text for text in critiques) > 0.15 * len(critiques)


def test_option_logprobs():
    """One padded forward pass gives what two unpadded ones with the option appended give, up to the
    letter."""
    tok = tokenizer_from_ranks(world.TINY / "tiny.tiktoken")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, norm="rmsnorm", pos="rope", mlp="swiglu",
                          bias=False)).eval()
    torch.nn.init.normal_(model.wte.weight, std=0.5)
    rows = [tok.encode(t) for t in ("What is it? The answer is:", "The answer is:", "Is it? " * 9)]
    got = endpoint.option_logprobs(model, tok, rows, [" (A)", " (B)"])
    for row, pair in zip(rows, got):
        for option, value in zip((" (A", " (B"), pair):
            more = tok.encode(option)
            ids, mask = torch.tensor([row + more]), torch.tensor([[0] * len(row) + [1] * len(more)])
            assert value == pytest.approx(token_logprobs(model, ids, mask).sum().item(), abs=1e-4)


def test_local_critic(tmp_path):
    tok = tokenizer_from_ranks(world.TINY / "tiny.tiktoken")
    names = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size=tok.vocab_size, max_len=64, norm="rmsnorm", pos="rope", mlp="swiglu",
                              bias=False))
        save(tmp_path, model, tok)
        name, ask = endpoint.local_critic(str(tmp_path), torch.device("cpu"))
        names.append(name)
    assert names[0] != names[1]   # the folder was trained anew: another critic
    sample = {"prompt": "What is it?", "max_tokens": 8, "temperature": 1.0, "seed": 3}
    one, two, long = (ask([r])[0]
                      for r in (sample, sample | {"seed": 4}, sample | {"prompt": "What is it? " * 30}))
    assert set(one) == {"text", "ended"} and ask([sample]) == [one] != [two] and set(long) == {"refused"}
    assert ask([sample | {"seed": 4}, sample]) == [two, one]           # whatever is asked beside it
    short, long = ask([CHOICE, CHOICE | {"prompt": "What is it? " * 30}])
    # where a document of the corpus begins
    ids = [tok.special["<|endoftext|>"], *tok.encode(CHOICE["prompt"])]
    assert short["logp"] == pytest.approx(endpoint.option_logprobs(model, tok, [ids], CHOICE["options"])[0],
                                          abs=1e-4)
    assert set(long) == {"refused"}


# ------------------------------------------------------------------------------------------------------------
# A critic at an address.


@pytest.fixture
def server():
    """An endpoint whose behaviour is server.answer(body, n-th request) -> (status, headers, bytes or
    object)."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {}, {"data": [{"id": "tiny-critic"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                n = len(state.bodies)
            self.reply(*state.answer(body, n))

        def reply(self, status, headers, body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                for k, v in ({"Content-Length": len(data)} | headers).items():
                    self.send_header(k, str(v))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass   # the client gave up

        def log_message(self, *args):
            pass
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    state = SimpleNamespace(bodies=[], answer=None, lock=threading.Lock(),
                            url=f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def text(t, finish="stop"):
    return 200, {}, {"choices": [{"text": t, "finish_reason": finish}]}


def top(**logp):
    return 200, {}, {"choices": [{"text": "A", "logprobs": {"top_logprobs": [logp]}}]}


@pytest.fixture
def waits(monkeypatch):
    """How long the endpoint would have slept; the time module of everybody else stays as it is."""
    out = []
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=out.append))
    return out


SAMPLE = {"prompt": "p", "max_tokens": 5, "temperature": 1.0, "seed": 7}
CHOICE = {"prompt": "p The answer is:", "options": [" (A)", " (B)"]}


def test_endpoint_answers(server, monkeypatch):
    monkeypatch.setenv("CRITIC_API_KEY", "k")
    name, ask = connect(server.url + "/", "", 5, 0, 2, Counter())
    assert name == "tiny-critic"
    server.answer = lambda body, n: text(" Fine.\n\nHuman: x", "length")
    assert list(ask([SAMPLE])) == [{"text": " Fine.", "ended": True}]
    assert server.bodies[-1] == SAMPLE | {"model": "tiny-critic", "stop": endpoint.STOPS}
    server.answer = lambda body, n: top(**{"A": -0.5, " A": -3.0, "B": -1.0, "the": -4.0})
    assert list(ask([CHOICE])) == [{"logp": [-0.5, -1.0]}]
    assert server.bodies[-1] == {"model": "tiny-critic", "prompt": "p The answer is: (", "max_tokens": 1,
                                 "temperature": 0, "logprobs": 10}
    server.answer = lambda body, n: top(**{"A)": -0.1, "the": -4.0, "C": -7.0})
    assert list(ask([CHOICE])) == [{"logp": [-0.1, -7.0]}]   # B is at most as likely as the last one listed
    server.answer = lambda body, n: top(**{"the": -0.1, "C": -2.0})
    answer, = ask([CHOICE])
    assert sum(map(math.exp, answer["logp"])) < 0.01   # neither option: counted through its mass


def test_endpoint_retries(server, waits):
    """429 after its Retry-After, a time-out, 503, broken JSON and a wrong shape, each followed by another
    attempt."""
    counts = Counter()

    def answer(body, n):
        if n == 2:
            threading.Event().wait(0.4)
        return [(429, {"Retry-After": "0.25"}, b""), text("late"), (503, {}, b"busy"),
                (200, {}, b"{not json"), (200, {}, {"choices": []}), (200, {"Content-Length": 999}, b"{}"),
                text(" ok")][n - 1]
    server.answer = answer
    _, ask = connect(server.url, "m", 0.2, 6, 1, counts)
    assert list(ask([SAMPLE])) == [{"text": " ok", "ended": True}]
    assert waits[0] == 0.25 and waits[1:] == [2.0, 4.0, 8.0, 16.0, 32.0] and counts == {"retried": 6}


def test_endpoint_gives_up(server, waits, tmp_path):
    counts = Counter()
    name, ask = connect(server.url, "m", 5, 2, 1, counts)
    server.answer = lambda body, n: (200, {}, {"choices": [{"text": None}]})
    assert list(ask([SAMPLE])) == [None] and counts == {"retried": 2, "malformed": 1}
    for status in (400, 413, 422):
        server.answer = lambda body, n, status=status: (status, {}, b"")
        assert "refused" in list(ask([SAMPLE]))[0]
    server.answer = lambda body, n: text("", "content_filter")
    assert list(ask([SAMPLE])) == [{"refused": "content filter"}]
    n = len(server.bodies)
    for status, word in ((401, "401"), (404, "404"), (500, "3 times")):
        server.answer = lambda body, n, status=status: (status, {}, b"")
        with pytest.raises(InputError, match=word):
            list(ask([SAMPLE]))
    assert len(server.bodies) == n + 1 + 1 + 3                        # a wrong key is not tried again
    for url in ("http://127.0.0.1:9/v1", "http://", "http://[::1"):
        with pytest.raises(InputError, match="--critic"):
            connect(url, "", 1, 1, 1, Counter())


def test_no_answer_is_paid_for_twice(server, waits, tmp_path):
    """A server that dies half way: what it answered is kept, and only the rest is asked for when the run goes
    on."""
    file, requests = tmp_path / "deep" / "answers.jsonl", [SAMPLE | {"prompt": f"p{i}"} for i in range(10)]
    paid = Counter()

    def answer(body, n):
        if body["prompt"] in ("p2", "p7") and not server.well:
            return 500, {}, b""
        paid[body["prompt"]] += 1
        return text(" " + body["prompt"]) if body["prompt"] != "p4" else (400, {}, b"")
    server.answer, server.well = answer, False
    critic = CachedCritic(*connect(server.url, "m", 5, 1, 4, Counter()), file, 4)
    with pytest.raises(InputError, match="run the same command again"):
        critic(requests)
    assert set(paid) == {"p0", "p1", "p3"}   # the batch in which it died, and no further
    with open(file, "a") as f:
        f.write('\n{"key": "torn')                                    # the process was killed while it wrote
    server.well = True
    for _ in range(2):
        critic = CachedCritic(*connect(server.url, "m", 5, 1, 4, Counter()), file, 4)
        answers = critic(requests + requests[:3])
        assert [a.get("text") for a in answers[:3]] == [" p0", " p1", " p2"]
        assert answers[4] == {"refused": "HTTP 400 Bad Request"}
    assert set(paid.values()) == {1} and len(paid) == 10 and critic.counts["asked"] == 0
    CachedCritic(*connect(server.url, "another", 5, 1, 4, Counter()), file, 4)(requests[:1])
    assert paid["p0"] == 2                                            # another model is another answer
    for line in file.read_text().splitlines():
        assert "torn" in line or set(json.loads(line)) == {"key", "model", "prompt", "answer"}


@pytest.mark.parametrize("there", [b"{\n \"mine\": 1\n}\n", b"\nmine\n", b"mine", b"[]"])
def test_answers_are_not_added_to_somebodys_file(tmp_path, there):
    """But to an answer that was cut off they are: that is how a process dies."""
    file = tmp_path / "critic_answers.jsonl"
    file.write_bytes(there)
    with pytest.raises(InputError, match="holds no answers of a critic"):
        CachedCritic("m", None, file, 4)
    for torn in (b'{"k', b'{"key": "ab', b""):
        file.write_bytes(torn)
        assert CachedCritic("m", None, file, 4).cache == {}


def test_a_critic_that_does_not_decide_is_as_good_as_a_coin():
    """One that always says (A) is right half of the time, whichever way that is counted."""
    pairs = [("prompt", "better", "worse one")] * 4
    metrics = principles.accuracy([{"p": 0.5, "orders": (1.0, 0.0)}] * 4, pairs)
    assert metrics["right answer as (A)"] == 1 and metrics["right answer as (B)"] == 0
    assert metrics["both orders averaged"] == 0.5 and metrics["longer answer"] == 0


# ------------------------------------------------------------------------------------------------------------
# The script.

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests/conftest.py forks")


@needs_fork
def test_critic_test_at_an_address(suite, server, tmp_path):
    """--critic URL --critic_test: a server that knows the right answer but leans to (A)."""
    rows = [{"prompt": f"q{i}", "chosen": "good" + " and" * (i % 2), "rejected": "bad one"} for i in range(8)]
    rows[0] |= {"chosen": "bad one", "rejected": "good", "label": 0.2}   # most people prefer the other one
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    server.answer = lambda body, n: top(A=-0.1, B=-2.0 if "(A) good" in body["prompt"] else -0.2)
    flags = ["cai.py", "--critic", server.url, "--critic_test", tmp_path / "pairs.jsonl",
             "--out", tmp_path / "x"]
    suite.ok(*flags)
    told = json.loads((tmp_path / "x" / "critic.json").read_text())
    assert (told["right answer as (A)"] == 1 and told["right answer as (B)"] == 0
            and told["both orders averaged"] == 1)
    assert told["longer answer, standard error"] > 0.1
    assert told["first_wins"] > 0.5 and len(server.bodies) == 16
    suite.ok(*flags)
    assert len(server.bodies) == 16
    server.answer = lambda body, n: (401, {}, b"")
    r = suite.run(*flags[:-1], tmp_path / "y")
    assert r.rc == 1 and r.err.startswith("error: --critic") and "401" in r.err and "Traceback" not in r.err


@needs_fork
def test_the_script(suite, chain):
    """Both stages on a slice of the tiny world with models of a few steps; then again with nothing to do,
    with other flags, and after a break just before the end."""
    job, folder = suite.early["cai"]
    r = suite.finish(job)
    assert r.rc == 0 and r.err == "", r
    assert [re.search(r"(\w+)\.py", line)[1] for line in r.out.splitlines()
            if line.startswith("running")] == ["sft", "sft", "reward", "ppo"]
    result = json.loads((folder / "result.json").read_text())
    told = set(result["before"]) & set(result["after"])
    assert result["stage"] == "cai" and {"gold", "harmless", "harmless_rate", "eos_rate"} <= told
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3]
    assert log[1]["revisions_revisions"] == 24 and {"refused_0", "refused_1"} <= set(log[1])
    assert {"critic_neither", "critic_first_wins", "critic_longer_wins", "critic_asked"} <= set(log[2])
    counted = {name.removeprefix("critic_") for name in log[2] if name.startswith("critic_")}
    counted |= {name.removeprefix("revisions_") for name in log[1] if name.startswith("revisions_")}
    assert counted <= set(principles.WORDS) and all(principles.WORDS[name] in r.out for name in counted)
    chains = [json.loads(line) for line in (folder / "round1" / "chains.jsonl").read_text().splitlines()]
    assert (len(chains) == 24 and set(chains[0]) == {"prompt", "initial", "chain", "ended"}
            and len(chains[0]["chain"]) == 1)
    pairs = [json.loads(line) for line in (folder / "round1" / "comparisons.jsonl").read_text().splitlines()]
    assert ({r.get("by", "ai") for r in pairs} == {"ai", "human"}
            and all(0.5 <= r["label"] <= 1 for r in pairs))
    policy, _ = load(folder)
    final, _ = load(folder / "round1" / "rl")
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), final.parameters()))
    asked = (folder / "critic_answers.jsonl").read_text()
    r = suite.ok("cai.py", "--out", folder, *CAI_FLAGS)
    assert "running" not in r.out and (folder / "critic_answers.jsonl").read_text() == asked
    again = json.loads((folder / "result.json").read_text())
    assert (again["before"], again["after"]) == (result["before"], result["after"])
    (folder / "result.json").unlink()
    told = {name: (folder / name).read_text() for name in ("answers.jsonl", "log.jsonl", "samples.txt")}
    for flags, word in ((["--k", 4], "--k was 3, now 4"), (["--max_steps", 9], "--max_steps was 8, now 9")):
        r = suite.run("cai.py", "--out", folder, *CAI_FLAGS, *flags)
        assert r.rc == 1 and word in r.err, r
    r = suite.ok("cai.py", "--out", folder, *CAI_FLAGS)
    assert r.out.count("is finished") == 3 and (folder / "critic_answers.jsonl").read_text() == asked
    assert told == {name: (folder / name).read_text() for name in told}


def by_two_processes(suite, chain, folder):
    """A stage trained by one process, and by two as cai.py starts them."""
    demos = folder / "demos.jsonl"
    demos.write_text("".join(json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}."}) + "\n"
                             for i in range(81)))   # of which 74 are trained on, so that no batch is odd
    flags = ["--init", chain / "base", "--data", demos, "--max_new", 4, "--max_steps", 2,
             "--dtype", "float32"]
    suite.ok("sft.py", "--out", folder / "one", *flags)
    cfg = cai.Config(nproc_per_node=2, device="cpu", out=str(folder / "cai"))
    cai.train(cfg, SimpleNamespace(is_asked_to_stop=lambda: False, say=print), "sft.py",
              folder / "two", flags)


EARLY = {"test_stages_on_several_processes": by_two_processes}      # see the chain in conftest.py


@needs_fork
def test_stages_on_several_processes(early):
    """--nproc_per_node 2: two processes train each stage, to the losses of one."""
    folder, _ = early
    one, two = ([json.loads(line) for line in (folder / n / "log.jsonl").read_text().splitlines()]
                for n in ("one", "two"))
    assert len(one) == 2 and [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=2e-6)


@needs_fork
@pytest.mark.parametrize("flags, word", [
    ("--critiques 0", "--critiques"), ("--labels dog", "--labels"), ("--k 1", "--k 1"),
    ("--data x.jsonl --init y --labels human", "--labels human"), ("--data x.jsonl", "--init"),
    ("--about nothing", "--about nothing"), ("--constitution nosuch.json", "nosuch.json")])
def test_bad_flags(suite, tmp_path, flags, word):
    r = suite.run("cai.py", "--out", tmp_path / "x", *flags.split(), cwd=tmp_path)
    assert r.rc in (1, 2) and word in r.err.splitlines()[-1] and "Traceback" not in r.err
    assert not (tmp_path / "x").exists()


def test_help_lists_every_field():
    source = Path(cai.__file__).read_text() + Path(flags_py.__file__).read_text()   # the shared ones
    for f in cai.Config.__dataclass_fields__:
        assert (re.search(rf"^    {f}: .*#", source, re.M)
                or re.search(rf"^    {f}: .*\n +# ", source, re.M)), f
