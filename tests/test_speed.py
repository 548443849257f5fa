"""What makes it fast must not change a number: compiled = eager, in chunks = whole, on the GPU = in float64
on the CPU.

    python -m pytest tests/test_speed.py -s && python tests/experiments/bench.py   on a GPU: checks, then the
                                                                                   table of speeds

Without a GPU its tests are skipped and the others run on the CPU. """
import copy
import functools
import io
import itertools
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import model as model_py
from data import InputError, parallel
from data import setup as setup_py
from model import (GPT, GPTConfig, Linear, answer_rewards, compare_policies, freeze, generate,
                   sampling_copy, token_logprobs, token_values, with_lora)

V = 97
DIALECTS = {"gpt2": {},
            "llama": dict(norm="rmsnorm", pos="rope", mlp="swiglu", bias=False, n_kv_head=1, tie=False)}
both = pytest.mark.parametrize("dialect", DIALECTS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def small(dialect, dtype=torch.float32, **more):
    """A model whose distributions are far from uniform."""
    torch.manual_seed(0)
    cfg = dict(vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, n_inner=64, max_len=128,
               head_dim=16)
    gpt = GPT(GPTConfig(**{**cfg, **DIALECTS[dialect], **more})).to(dtype)
    for p in gpt.parameters():
        p.data.mul_(6 if p.dim() == 2 else 1)
    return gpt


def batch(B=6, T=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, T), generator=g), torch.rand(B, T, generator=g) < 0.5


def tok_of(*eos):
    """What `generate` asks of a tokenizer."""
    return SimpleNamespace(eos_ids=set(eos), pad_id=0)


def draws(B, N, seed=0):
    return torch.rand(B, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compile_blocks(gpt, backend):
    """What `prepare` does under --compile, with a compiler that counts or needs no C++."""
    for block in gpt.h:
        block.compile(backend=backend, fullgraph=True)
    return gpt


@pytest.fixture
def counter():
    """A compiler that counts what it is asked to compile and changes nothing."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


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
    gpt.recompute = True
    runs.clear()
    again = gradients(gpt, token_logprobs(gpt, ids, mask).sum())
    assert torch.equal(plain, again) and len(runs) == 2
    with torch.no_grad():
        token_logprobs(gpt, ids, mask)
    assert len(runs) == 3


@both
def test_compiled_blocks_give_the_eager_log_probs_and_gradients(dialect):
    """Traced forward and backward without a break, for two lengths; and no parameter changes its name."""
    torch._dynamo.reset()
    plain, gpt = small(dialect), compile_blocks(small(dialect), "aot_eager")
    assert list(gpt.state_dict()) == list(plain.state_dict())
    for T, entropy in itertools.product((40, 24), (False, True)):
        ids, mask = batch(T=T)
        a, b = (token_logprobs(m, ids, mask, 0.7, entropy) for m in (plain, gpt))
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
        close(gradients(gpt, b.sum()), gradients(plain, a.sum()), 1e-5)


@both
def test_ten_lengths_compile_at_most_twice(dialect, counter):
    """All blocks of a model share what is compiled: once for the first length, once for any other. A slice
    of a table that fixes its length would compile again for each, and after the eighth fall back to eager
    without a word."""
    gpt = compile_blocks(small(dialect, n_layer=3), counter)
    for T in (40, 24, 25, 31, 56, 64, 77, 80, 101, 128):
        ids, mask = batch(T=T)
        mask[:, -1] = True   # else the batch is cut where its mask ends
        token_logprobs(gpt, ids, mask).sum().backward()
    assert 1 <= counter.frame_count <= 2


@both
def test_compiled_models_of_ppo_are_never_run_eagerly(dialect, counter, monkeypatch):
    """Policy, reference, value and reward model, trained and asked, over many shapes and a single row: more
    than the eight variants that the compiler allows by itself, after which it gives up without a word."""
    counted = functools.partialmethod(torch.nn.Module.compile, backend=counter)
    monkeypatch.setattr(model_py.Block, "compile", counted)
    cfg = SimpleNamespace(compile=True, recompute=False)
    policy, value, reward = small(dialect), small(dialect, scalar_head=True), small(dialect, scalar_head=True)
    reference = freeze(copy.deepcopy(policy))
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit,
                                    fail_on_recompile_limit_hit=True):
        for gpt in (policy, reference, value, reward):
            assert parallel.prepare(gpt, cfg, torch.device("cpu")) is gpt
        for T, B in itertools.product((40, 24, 77), (6, 4, 1)):
            ids, mask = batch(B, T)
            mask[:, -1] = True
            compare_policies(policy, reference, ids, mask)
            with torch.no_grad():
                token_values(value, ids, mask)
                answer_rewards(reward, ids, mask)
                token_logprobs(policy, ids, mask)
            token_logprobs(policy, ids, mask, entropy=True)[0].sum().backward()
            (token_values(value, ids, mask).sum() + answer_rewards(reward, ids, mask).sum()).backward()
        assert 2 < counter.frame_count < torch._dynamo.config.recompile_limit / 2


@pytest.fixture
def shapes(monkeypatch, counter):
    """`decode` compiled as on a GPU, but by a compiler that does nothing; the (rows, positions) of each of
    its calls."""
    calls, compiled = [], torch.compile(model_py.decode, backend=counter, fullgraph=True, dynamic=False)

    def noted(model, token, cache, S, pos):
        calls.append((len(token), S))
        return compiled(model, token, cache, S, pos)
    monkeypatch.setattr(model_py, "GRAPHS", noted)
    with torch._dynamo.config.patch(recompile_limit=64):
        yield calls


def frequent(gpt, prompts, N):
    """A tokenizer whose ends come often."""
    free = generate(gpt, tok_of(-1), prompts, draws(len(prompts), N))[0].flatten().tolist()
    return tok_of(*sorted(range(1, V), key=free.count)[-4:])


@both
def test_decoding_is_one_graph_per_shape(dialect, request, counter):
    """Without a break, so that CUDA graphs can hold it; rows in powers of two, the cache in blocks; nothing
    is compiled again for the next batch; the same tokens and log-probs as eagerly."""
    gpt, rng = small(dialect), random.Random(0)
    prompts = [[rng.randrange(1, V) for _ in range(rng.randint(1, 9))] for _ in range(37)]
    tok = frequent(gpt, prompts, 70)

    def go(seed):
        return generate(gpt, tok, prompts, draws(37, 70, seed))
    eager = go(1), go(2)
    calls = request.getfixturevalue("shapes")
    compiled = go(1), go(2)
    for a, b in zip(itertools.chain(*eager), itertools.chain(*compiled)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert counter.frame_count == len(set(calls)) > 3                  # each shape compiled once
    assert {n for n, _ in calls} <= {37, 32, 16, 8, 4, 2, 1} and {S for _, S in calls} == {64, 128}


@both
def test_many_prompts_need_few_graphs(dialect, shapes, counter):
    """Whatever the prompts' lengths; and the cache stays where it is once it is large enough, also for
    calls of which one has more rows and another more positions: else graphs are recorded anew in each, and
    pile up."""
    gpt, rng = small(dialect, n_layer=1), random.Random(0)
    tok = tok_of(*range(5, 12))

    def go(B, longest):
        prompts = [[rng.randrange(1, V) for _ in range(rng.randint(1, longest))] for _ in range(B - 1)]
        generate(gpt, tok, [*prompts, [1] * longest], draws(B, 24, longest))
        return [x.data_ptr() for pair in gpt.kept_cache for x in pair]
    for longest in range(2, 41, 3):
        where = go(16, longest)
    first = counter.frame_count
    assert len({n for n, _ in shapes}) > 2 and first == len(set(shapes)) < 10
    assert go(16, 3) == where == go(2, 9)
    wide, tall = go(16, 60), go(40, 4)
    assert go(16, 60) == go(40, 4) == go(2, 90) == tall != wide != where
    assert counter.frame_count < 32                                    # half of what compile_decoding allows


@both
def test_compiled_decoding_writes_into_the_cache_in_place(dialect):
    """In what Inductor would compile, no buffer is as large as a layer's keys: it copied the whole cache,
    once a layer."""
    graph = pytest.importorskip("torch._inductor.graph").GraphLowering
    n, S, codes = 16, 128, []

    def stop(code):
        codes.append(code)
        raise NotImplementedError("enough: no C++ compiler is needed to see it")
    torch._dynamo.reset()
    gpt = sampling_copy(small(dialect))
    cache = model_py.new_cache(gpt, n + 2, S + 64)
    token, pos = torch.zeros(n, dtype=torch.long), torch.arange(n) + 3
    with pytest.MonkeyPatch.context() as m, torch.no_grad(), pytest.raises(Exception, match="enough: no C"):
        m.setattr(graph, "save_output_code", stop)
        compiled = torch.compile(model_py.decode, fullgraph=True, dynamic=False)
        compiled(gpt, token, cache, S, pos)
    torch._dynamo.reset()
    buffers = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", "".join(codes))
    sizes = [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in buffers]
    assert sizes and max(sizes) < n * gpt.cfg.n_kv_head * S * gpt.cfg.head_dim


@both
def test_a_padded_vocabulary_changes_nothing(dialect, monkeypatch):
    """In bf16 the head has rows of 0 up to a multiple of 64: none is drawn, none has a share in a
    probability, no gradient leaves them, also in a sampling copy and after the weights have moved on under
    it."""
    monkeypatch.setattr(Linear, "compute_dtype", torch.bfloat16)
    gpt, (ids, mask), prompts = small(dialect), batch(), [[1, 2, 3], [4, 5]]
    sampler = sampling_copy(gpt)
    alone = lambda self: (self.wte if self.cfg.tie else self.lm_head).weight.bfloat16()   # noqa: E731

    def go(sampler):
        out = generate(sampler, tok_of(-1), prompts, draws(2, 60))
        logp, ent = token_logprobs(gpt, ids, mask, entropy=True)
        return logp, ent, gradients(gpt, logp.sum() + ent.sum()), *out
    for _ in range(2):
        assert len(gpt.head()) == len(sampler.head()) == 128 and gpt.logits(gpt(ids)).shape[-1] == V
        padded = go(sampler)
        with monkeypatch.context() as m:
            m.setattr(GPT, "head", alone)
            plain = go(gpt)
        for a, b in zip(padded, plain):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
        with torch.no_grad():
            for p in gpt.parameters():
                p += 0.05 * torch.randn(p.shape)
        model_py.refresh(sampler, gpt)


# ----------------------------------------------------------------------------------------------------------
# Device and precision, with a GPU that is only pretended.


def pretend_gpu(monkeypatch, capability):
    """This torch believes in one GPU, which can do bf16 in hardware (8.0 and later) or only emulate it."""
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor)
    for name, value in {"is_available": lambda: True, "current_device": lambda: 0,
                        "get_device_properties": lambda device=None: properties,
                        "get_device_capability": lambda device=None: capability,
                        "_check_bf16_tensor_supported": lambda device: True}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize("capability, bf16",
                         [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_is_chosen_where_the_hardware_has_it(capability, bf16, monkeypatch):
    """Not on a V100 or T4, which emulate it many times slower than fp32."""
    pretend_gpu(monkeypatch, capability)
    monkeypatch.setattr(Linear, "compute_dtype", None)
    state, precision = random.getstate(), torch.get_float32_matmul_precision()
    try:
        for dtype, want in (("auto", bf16), ("float32", False), ("bfloat16", True)):
            device = setup_py.setup(SimpleNamespace(seed=0, device="", dtype=dtype))
            assert (device == torch.device("cuda")
                    and Linear.compute_dtype == (torch.bfloat16 if want else None))
        with pytest.raises(InputError, match="--device gpu"):
            setup_py.setup(SimpleNamespace(seed=0, device="gpu", dtype="auto"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(InputError, match="--device cpu"):
            setup_py.setup(SimpleNamespace(seed=0, device="cuda", dtype="auto"))
    finally:
        random.setstate(state)
        torch.set_float32_matmul_precision(precision)


def test_apples_gpu_is_named_untried(monkeypatch, capsys):
    """One line says so, and one that there is none."""
    monkeypatch.setattr(Linear, "compute_dtype", None)
    state, precision = random.getstate(), torch.get_float32_matmul_precision()
    try:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.raises(InputError, match="--device mps: this torch sees no Apple GPU"):
            setup_py.setup(SimpleNamespace(seed=0, device="mps", dtype="auto"))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert setup_py.setup(SimpleNamespace(seed=0, device="mps", dtype="auto")) == torch.device("mps")
        assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in capsys.readouterr().out and Linear.compute_dtype is None
    finally:
        random.setstate(state)
        torch.set_float32_matmul_precision(precision)


def test_several_processes_have_a_backend_for_both_kinds_of_tensors(monkeypatch):
    """Numbers travel on the CPU also where models are on GPUs; each process has a GPU of its own, whoever
    started it."""
    groups, gpus = [], []
    pretend_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend=None, **_: groups.append(backend))
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    assert parallel.start_processes("cuda:0") == "cuda:0" and parallel.start_processes("cpu") == "cpu"
    assert not groups
    monkeypatch.setattr(parallel, "WORLD", 2)
    assert parallel.start_processes("cpu") == "cpu" and groups == ["gloo"] and not gpus
    with pytest.raises(InputError, match="LOCAL_RANK"):
        parallel.start_processes("cuda")
    with pytest.raises(InputError, match="one GPU"):
        parallel.start_processes("cuda:0")
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert parallel.start_processes("cuda") == "cuda:3"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.start_processes("cuda") == "cuda:1"
    assert [str(gpu) for gpu in gpus] == ["cuda:3", "cuda:1"]
    assert groups == ["gloo"] + ["cpu:gloo,cuda:nccl"] * 2


# ----------------------------------------------------------------------------------------------------------
# Several processes, one after the other.


def test_micro_batches_are_as_many_on_every_process(monkeypatch):
    """Otherwise a sharded model waits for a process that has nothing to do."""
    rng = random.Random(0)
    for world, n, size in itertools.product((1, 2, 3, 5), (1, 2, 7, 15, 30), (1, 3, 50)):
        lengths, parts, rows = [rng.randint(1, 40) for _ in range(40)], [], rng.sample(range(40), n)
        monkeypatch.setattr(parallel, "WORLD", world)
        for rank in range(world):
            monkeypatch.setattr(parallel, "RANK", rank)
            if n % world:
                with pytest.raises(InputError, match=f"{n} rows .* {world} processes"):
                    parallel.micro_batches(rows, lengths, size)
            else:
                parts.append(parallel.micro_batches(rows, lengths, size))
        assert len({tuple(map(len, part)) for part in parts}) <= 1
        assert all(0 < len(piece) <= size for part in parts for piece in part)
        assert sorted(i for part in parts for piece in part for i in piece) == (sorted(rows) if parts else [])


def in_turn(monkeypatch, world, work):
    """work() on each of `world` processes, which run one after the other: the first time round what they
    sum is noted, the second time they are given the sums."""
    noted, results = [], []
    monkeypatch.setattr(parallel, "WORLD", world)
    for rank in range(world):
        mine = []
        monkeypatch.setattr(parallel, "RANK", rank)
        monkeypatch.setattr(parallel, "all_sum", lambda x: mine.append(x.clone()) or x)
        work()
        noted.append(mine)
    assert len({len(mine) for mine in noted}) == 1
    sums = [sum(parts) for parts in zip(*noted)]
    for rank in range(world):
        left = list(sums)
        monkeypatch.setattr(parallel, "RANK", rank)
        monkeypatch.setattr(parallel, "all_sum", lambda x: left.pop(0))
        results.append(work())
    return results


@pytest.mark.parametrize("world", [2, 3, 5])
def test_chunks_of_several_processes_are_the_whole(world, monkeypatch):
    """Also where rows do not divide evenly: those that only fill up must not count, nor be missing."""
    policy, reference, value = small("llama"), small("gpt2"), small("llama", scalar_head=True)
    ids, mask = batch(B=7)
    functions = [functools.partial(compare_policies, policy, reference),
                 functools.partial(token_logprobs, policy), functools.partial(answer_rewards, value)]
    for f in functions:
        with torch.no_grad():
            want = f(ids, mask)
        for size in (1, 2, 50):
            for got in in_turn(monkeypatch, world, lambda: parallel.in_chunks(f, ids, mask, size)):
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("world, B", [(2, 7), (3, 5), (3, 1)])
def test_sampling_in_shares_is_sampling_as_a_whole(world, B, monkeypatch):
    """Each process continues some of the prompts, the last one here perhaps none, and all get all answers."""
    class Waiting(Exception):
        pass

    def gather(parts, part):
        if len(shares) < world:   # the first time round: wait for the others
            shares.append(part)
            raise Waiting
        parts[:] = shares
    gpt, rng, shares = small("llama"), random.Random(0), []
    prompts = [[rng.randrange(1, V) for _ in range(rng.randint(1, 9))] for _ in range(B)]
    want = parallel.generate_in_shares(gpt, tok_of(5, 6), prompts, draws(B, 12))
    monkeypatch.setattr(parallel, "WORLD", world)
    monkeypatch.setattr(parallel.dist, "all_gather_object", gather)
    for rank in range(world):
        monkeypatch.setattr(parallel, "RANK", rank)
        with pytest.raises(Waiting):
            parallel.generate_in_shares(gpt, tok_of(5, 6), prompts, draws(B, 12))
    assert [part is None for part in shares] == [rank >= B for rank in range(world)]
    for rank in range(world):
        monkeypatch.setattr(parallel, "RANK", rank)
        for got, whole in zip(parallel.generate_in_shares(gpt, tok_of(5, 6), prompts, draws(B, 12)), want):
            torch.testing.assert_close(got, whole, atol=1e-4, rtol=0)


def train(gpt, optimizer, seeds):
    """Some steps; the loss of each."""
    losses = []
    setup_py.set_lr(optimizer, 1e-2)
    for seed in seeds:
        ids, mask = batch(seed=seed)
        loss = token_logprobs(gpt, ids, mask).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@both
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("n_steps", [0, 3])
def test_state_of_model_and_optimizer_goes_round(dialect, rank, n_steps, monkeypatch):
    """Through a file, into a fresh model and optimizer that go on to the same bits; also of an optimizer
    that has not stepped (a policy during its value model's warm-up), which stays that way. Adapters travel
    without their trunk."""
    def fresh():
        gpt = small(dialect)
        gpt = with_lora(freeze(gpt), rank) if rank else gpt
        torch.manual_seed(5)
        with torch.no_grad():
            for name, p in gpt.named_parameters():
                if name.endswith(".a.weight"):
                    p.copy_(torch.randn(p.shape) / 6)
        return gpt, setup_py.adamw(gpt, weight_decay=0.01)

    gpt, optimizer = fresh()
    train(gpt, optimizer, range(n_steps))
    weights = {name: x.clone() for name, x in gpt.state_dict().items()}
    file = io.BytesIO()
    torch.save({"model": parallel.full_state(gpt, trained_only=True),
                "optimizer": parallel.optimizer_state(gpt, optimizer)}, file)
    # to ask changes nothing
    assert all(torch.equal(x, weights[name]) for name, x in gpt.state_dict().items())
    assert bool(optimizer.state) == (n_steps > 0)
    whole = parallel.full_state(gpt)
    assert list(whole) == list(weights) and all(torch.equal(x, weights[name]) for name, x in whole.items())
    want = train(gpt, optimizer, range(7, 10))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    trained = {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert set(state["model"]) == trained and (rank == 0) == (trained == set(weights))
    assert (state["optimizer"] == {}) == (n_steps == 0)
    other, other_optimizer = fresh()
    parallel.load_full_state(other, state["model"])
    parallel.load_optimizer_state(other, other_optimizer, state["optimizer"])
    assert bool(other_optimizer.state) == (n_steps > 0)
    assert train(other, other_optimizer, range(7, 10)) == want and len(set(want)) == 3
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in gpt.state_dict().items())


# ----------------------------------------------------------------------------------------------------------
# On a GPU.


@needs_gpu
@both
def test_gpu_against_float64(dialect, monkeypatch):
    """fp32 to 1e-3, bf16 to what its eight bits allow: log-probs and gradients."""
    (ids, mask), exact = batch(), small(dialect, torch.float64)
    want = token_logprobs(exact, ids, mask)
    grad = gradients(exact, want.sum())
    ids = ids.cuda()
    gpt = copy.deepcopy(exact).float().cuda()
    got = token_logprobs(gpt, ids, mask)
    torch.testing.assert_close(got.double().cpu(), want.double(), atol=1e-3, rtol=1e-3)
    close(gradients(gpt, got.sum()), grad, 1e-3)
    monkeypatch.setattr(Linear, "compute_dtype", torch.bfloat16)
    half = token_logprobs(gpt, ids, mask)
    close(half.double().cpu(), want.double(), 0.05)
    close(gradients(gpt, half.sum()), grad, 0.1)


@needs_gpu
@both
def test_gpu_compiled_is_eager(dialect):
    (ids, mask), gpt, compiled = batch(), small(dialect).cuda(), small(dialect).cuda()
    for block in compiled.h:
        block.compile()
    a, b = (token_logprobs(m, ids.cuda(), mask) for m in (gpt, compiled))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    close(gradients(compiled, b.sum()), gradients(gpt, a.sum()), 1e-3)


@needs_gpu
@both
def test_gpu_graphs_are_eager_and_cached_is_uncached(dialect, monkeypatch):
    gpt, rng = sampling_copy(small(dialect).cuda()), random.Random(0)
    prompts = [[rng.randrange(1, V) for _ in range(rng.randint(1, 9))] for _ in range(37)]
    go = lambda: generate(gpt, tok_of(5), prompts, draws(37, 40, seed=1))   # noqa: E731
    eager = go()
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(gpt, *eager[:2]), eager[2], atol=1e-3, rtol=0)
    monkeypatch.setattr(model_py, "GRAPHS", None)                      # put back afterwards
    with torch._dynamo.config.patch(recompile_limit=64):
        model_py.compile_decoding()
        for _ in range(3):                                             # recorded, then replayed
            ids, mask, logp = go()
            with torch.no_grad():
                torch.testing.assert_close(token_logprobs(gpt, ids, mask), logp, atol=1e-3, rtol=0)
            T = min(ids.shape[1], eager[0].shape[1])
            assert (ids[:, :T] == eager[0][:, :T]).float().mean() > 0.9    # rounding may tip a draw
