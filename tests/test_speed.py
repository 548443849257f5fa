"""What makes it fast must not change a number: compiled = eager, in pieces = whole, on the GPU = in float64 on the CPU.

    python -m pytest tests/test_speed.py -s && python tests/bench.py       on a GPU: checks, then the table of speeds

Without a GPU its tests are skipped and the others run on the CPU.
"""
import copy
import itertools
import random
from types import SimpleNamespace

import pytest
import torch

import model as model_py
from data import InputError
from model import GPT, GPTConfig, generate, token_logprobs

V = 97
DIALECTS = {"gpt2": {}, "llama": dict(norm="rmsnorm", pos="rope", mlp="swiglu", bias=False, n_kv_head=1, tie=False)}
both = pytest.mark.parametrize("dialect", DIALECTS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def small(dialect, dtype=torch.float32, **more):
    """A model whose distributions are far from uniform."""
    torch.manual_seed(0)
    cfg = dict(vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, n_inner=64, max_len=128, head_dim=16)
    gpt = GPT(GPTConfig(**{**cfg, **DIALECTS[dialect], **more})).to(dtype)
    for p in gpt.parameters():
        p.data.mul_(6 if p.dim() == 2 else 1)
    return gpt


def batch(B=6, T=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, T), generator=g), torch.rand(B, T, generator=g) < 0.5


def gradients(gpt, loss):
    gpt.zero_grad()
    loss.backward()
    return torch.cat([p.grad.double().cpu().flatten() for p in gpt.parameters()])


def close(a, b, rel):
    assert (a - b).norm() <= rel * b.norm(), ((a - b).norm() / b.norm()).item()


@both
def test_recomputed_layers_give_the_same_gradients(dialect):
    """Bit for bit; and each layer runs twice where a gradient is wanted, once where none is."""
    gpt, (ids, mask), runs = small(dialect), batch(), []
    gpt.h[0].register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients(gpt, token_logprobs(gpt, ids, mask).sum())
    gpt.cfg.recompute = True
    runs.clear()
    again = gradients(gpt, token_logprobs(gpt, ids, mask).sum())
    assert torch.equal(plain, again) and len(runs) == 2
    with torch.no_grad():
        token_logprobs(gpt, ids, mask)
    assert len(runs) == 3


@both
def test_compiled_log_probs_and_gradients_are_the_eager_ones(dialect):
    """Traced forward and backward, for two lengths; the compiler stops once, where it cannot know how many tokens there
    are, and never again."""
    gpt, f = small(dialect), torch.compile(token_logprobs, backend="aot_eager")
    assert torch._dynamo.explain(token_logprobs)(gpt, *batch()).graph_break_count == 1
    for T, entropy in itertools.product((40, 24), (False, True)):
        ids, mask = batch(T=T)
        a, b = (torch.stack(g(gpt, ids, mask, 0.7, True) if entropy else (g(gpt, ids, mask, 0.7),))
                for g in (token_logprobs, f))
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
        close(gradients(gpt, b.sum()), gradients(gpt, a.sum()), 1e-5)


@both
def test_decoding_is_one_graph_per_shape(dialect, monkeypatch):
    """Without a break, so that CUDA graphs can hold it; rows in powers of two, the cache in blocks; nothing is compiled
    again for the next batch; the same tokens and log-probs as eagerly."""
    gpt, rng, shapes = small(dialect), random.Random(0), []
    prompts = [[rng.randrange(1, V) for _ in range(rng.randint(1, 9))] for _ in range(37)]

    def go(seed):
        return generate(gpt, prompts, 40, eos, generator=torch.Generator().manual_seed(seed))

    def backend(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if torch.is_tensor(x) and x.dim() == 6][0])
        return graph
    eos = -1
    free = go(0)[0].flatten().tolist()
    eos = max(range(1, V), key=free.count)                             # comes often
    eager = go(1), go(2)
    compiled = torch.compile(model_py.decode, backend=backend, fullgraph=True, dynamic=False)
    monkeypatch.setattr(model_py, "decode", compiled)
    monkeypatch.setattr(model_py, "GRAPHS", True)
    with torch._dynamo.config.patch(recompile_limit=64):
        compiled = go(1), go(2)
    for a, b in zip(itertools.chain(*eager), itertools.chain(*compiled)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert len(set(shapes)) == len(shapes) > 3                         # each shape compiled once
    assert {n for _, _, n, *_ in shapes} <= {37, 32, 16, 8, 4, 2, 1} and {S % 8 for *_, S, _ in shapes[:-1]} == {0}


@both
def test_a_padded_vocabulary_changes_nothing(dialect, monkeypatch):
    """In bf16 the head has rows of 0 up to a multiple of 64: none is drawn, none has a share in a probability, no
    gradient leaves them, also after the weights have moved on under the twin that decodes."""
    gpt, (ids, mask), prompts = small(dialect), batch(), [[1, 2, 3], [4, 5]]
    alone = property(lambda self: lambda: (self.wte if self.cfg.tie else self.lm_head).weight.bfloat16())

    def go():
        out = generate(gpt, prompts, 60, -1, generator=torch.Generator().manual_seed(0))
        logp, ent = token_logprobs(gpt, ids, mask, entropy=True)
        return logp, ent, gradients(gpt, logp.sum() + ent.sum()), *out
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert len(gpt.head()) == 128 and gpt.logits(gpt(ids)).shape[-1] == V
            padded = go()
            with monkeypatch.context() as m:
                m.setattr(GPT, "head", alone)
                m.setattr(model_py, "TWINS", {})
                plain = go()
            for a, b in zip(padded, plain):
                torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
            with torch.no_grad():
                for p in gpt.parameters():
                    p += 0.05 * torch.randn(p.shape)


def test_fsdp_needs_several_processes():
    with pytest.raises(InputError, match="torchrun"):
        model_py.setup(SimpleNamespace(seed=0, device="cpu", dtype="auto", fsdp=True))


def test_pieces_are_as_many_on_every_process(monkeypatch):
    """Otherwise a sharded model waits for a process that has nothing to do; what only fills up must not count."""
    for world, n, size in itertools.product((1, 2, 3, 5), (1, 2, 7, 16), (1, 3, 50)):
        parts = []
        for rank in range(world):
            monkeypatch.setattr(model_py, "RANK", rank), monkeypatch.setattr(model_py, "WORLD", world)
            parts.append(model_py.pieces(list(range(n)), size))
        assert len({len(p) for p in parts}) == 1
        assert all(0 < len(piece) <= size for p in parts for piece, _ in p)
        assert sorted(i for p in parts for piece, real in p if real == 1.0 for i in piece) == list(range(n))
        assert {real for p in parts for _, real in p} <= {0.0, 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU.


@needs_gpu
@both
def test_gpu_against_float64(dialect):
    """fp32 to 1e-3, bf16 to what its eight bits allow: log-probs and gradients."""
    (ids, mask), exact = batch(), small(dialect, torch.float64)
    want = token_logprobs(exact, ids, mask)
    grad = gradients(exact, want.sum())
    ids = ids.cuda()
    gpt = copy.deepcopy(exact).float().cuda()
    got = token_logprobs(gpt, ids, mask)
    torch.testing.assert_close(got.double().cpu(), want.double(), atol=1e-3, rtol=1e-3)
    close(gradients(gpt, got.sum()), grad, 1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        half = token_logprobs(gpt, ids, mask)
    close(half.double().cpu(), want.double(), 0.05)
    close(gradients(gpt, half.sum()), grad, 0.1)


@needs_gpu
@both
def test_gpu_compiled_is_eager(dialect):
    (ids, mask), gpt = batch(), small(dialect).cuda()
    a, b = (f(gpt, ids.cuda(), mask) for f in (token_logprobs, torch.compile(token_logprobs)))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    close(gradients(gpt, b.sum()), gradients(gpt, a.sum()), 1e-3)


@needs_gpu
@both
def test_gpu_graphs_are_eager_and_cached_is_uncached(dialect, monkeypatch):
    gpt, rng = small(dialect).cuda(), random.Random(0)
    prompts = [[rng.randrange(1, V) for _ in range(rng.randint(1, 9))] for _ in range(37)]
    go = lambda: generate(gpt, prompts, 40, 5, generator=torch.Generator().manual_seed(1))   # noqa: E731
    eager = go()
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(gpt, *eager[:2]), eager[2], atol=1e-3, rtol=0)
    monkeypatch.setattr(model_py, "decode", torch.compile(model_py.decode, mode="reduce-overhead", fullgraph=True,
                                                          dynamic=False))
    monkeypatch.setattr(model_py, "GRAPHS", True)
    for _ in range(3):                                                 # recorded, then replayed
        with torch._dynamo.config.patch(recompile_limit=64):
            ids, mask, logp = go()
        with torch.no_grad():
            torch.testing.assert_close(token_logprobs(gpt, ids, mask), logp, atol=1e-3, rtol=0)
        T = min(ids.shape[1], eager[0].shape[1])
        assert (ids[:, :T] == eager[0][:, :T]).float().mean() > 0.9    # rounding may tip a draw
