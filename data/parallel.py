"""Several processes: `torchrun --nproc_per_node=8 ppo.py`, one on each GPU.

Every rank draws the same batches and computes an even share of their rows. Models that are trained, and
frozen ones, are cut over the ranks by PyTorch's FSDP2 (arXiv:2304.11277), which sums their gradients. Losses
are normalised over the whole step, so the sum is what one process would compute. With one process all of this
is the plain thing. """
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)

from data import InputError
from data.screen import SCREEN
from model import generate, last_token

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_processes(device):
    """Join the group of processes that torchrun started. `device` is what --device says or the best there is;
    returns the device of this rank. InputError: flags or variables that cannot work."""
    if WORLD == 1:
        return device
    gpu = device.startswith("cuda")
    if gpu:
        if ":" in device:
            raise InputError(f"--device {device} puts all {WORLD} processes on one GPU; say --device cuda")
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
        if local is None:
            raise InputError("LOCAL_RANK is not set: start the processes with torchrun, which sets it")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    # numbers and lists travel on the CPU, tensors of the models on the GPU; the first rank may have a chain
    # to make
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    return device


def end_processes():
    """Leave that group, at the end of a run that went well. Else a thread of gloo may be alive while Python
    ends, which then aborts (pytorch#190489), and torchrun says that the run has failed."""
    if dist.is_initialized():
        dist.destroy_process_group()


def child_environment():
    """os.environ for a script run by one rank alone."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def barrier():
    """Wait until all ranks are here."""
    all_sum(0)


def all_sum(x):
    """The sum over all ranks of a tensor (in place), of a number, or of each number of a dict."""
    if WORLD == 1:
        return x
    if isinstance(x, dict):
        return {name: all_sum(value) for name, value in x.items()}
    if not torch.is_tensor(x):
        return all_sum(torch.tensor(float(x), dtype=torch.float64)).item()
    dist.all_reduce(x)
    return x


# ------------------------------------------------------------------------------------------------------------
# Models.


def prepare(model, cfg, device):
    """The model, loaded on the CPU, as the flags want it: on its device, compiled block by block (--compile),
    running layers again in the backward pass (--recompute), cut over the ranks. Call it before making the
    optimizer."""
    model.recompute = cfg.recompute
    if cfg.compile:
        # Fixed or dynamic shapes, with or without gradients, frozen or not: each is compiled once. Past this
        # limit torch runs eagerly.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in model.h:
            block.compile()          # in place: no tensor changes its name
    if WORLD == 1:
        return model.to(device)

    from torch.distributed.fsdp import fully_shard
    mesh = dist.device_mesh.init_device_mesh(device.type, (WORLD,))
    # Adapters share their frozen trunk with other models, so it stays whole on every rank and they alone are
    # cut.
    frozen = {p for p in model.parameters() if not p.requires_grad}
    if len(frozen) == len(list(model.parameters())):
        frozen = set()
    if frozen:
        model.to(device)
    for part in (*model.h, model):
        fully_shard(part, mesh=mesh, ignored_params=frozen)
        part.set_gradient_divide_factor(1.0)             # gradients are summed, not averaged
        part.set_force_sum_reduction_for_comms(True)   # gloo has no average and says nothing (pytorch#162338)
    return model


def full_state(model, trained_only=False):
    """The whole state dict of a model, {name: tensor} on the CPU, on the first rank; trained_only: without
    what is frozen, such as the trunk of adapters."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)


def load_full_state(model, state):
    """Give a model what `full_state` returned, in however many processes that was."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def optimizer_state(model, optimizer):
    """The whole state of a model's optimizer by the names of its parameters, on the first rank; {} before its
    first step, because asking PyTorch for it then would count as one."""
    if not optimizer.state:
        return {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer_state(model, optimizer, state):
    """Give a model's optimizer what `optimizer_state` returned."""
    if state:
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        set_optimizer_state_dict(model, optimizer, state, options=options)


# ------------------------------------------------------------------------------------------------------------
# Rows.


def micro_batches(rows, lengths, size):
    """This rank's share of a step's rows (a list of row numbers), cut into lists of at most `size` rows of
    similar length. lengths: of every row, by its number. InputError: the rows do not divide evenly over the
    ranks, which FSDP needs."""
    if len(rows) % WORLD:
        n = len(rows) // WORLD * WORLD
        would = f"{n} or {n + WORLD}" if n else WORLD
        raise InputError(f"{len(rows)} rows a step do not divide evenly over {WORLD} processes; {would} "
                         "would (--batch_size, or --rollouts and --minibatches)")
    in_order = sorted(rows, key=lambda i: lengths[i])
    mine = in_order[RANK::WORLD]
    return [mine[i: i + size] for i in range(0, len(mine), size)]


def filled_up(n, world=WORLD):
    """For a step of n rows that need not divide evenly over the ranks: row numbers that do, because row 0 may
    stand there several times, and what each row then counts, (n,), so that a weighted sum over these numbers
    is the sum over the n rows."""
    numbers = list(range(n))
    numbers += numbers[:1] * (-n % world)
    return numbers, 1 / torch.tensor(numbers, dtype=torch.long).bincount()


def even_share(lengths):
    """This rank's share of rows of these lengths, similar ones side by side, for passes without gradients.
    All ranks get the same number, which FSDP needs, so some rows are computed twice; whoever adds the shares
    up has to divide."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    order += (order * WORLD)[: -len(order) % WORLD]
    return order[RANK::WORLD]


@torch.no_grad()
def in_shares(f, lengths, size, say=False):
    """f(rows) over all rows, whose lengths are given: `size` of similar length at a time, each rank its
    share. f takes a list of row numbers and returns (.., n), the rows last. The result is the same with all N
    rows, (.., N), in fp32 and without gradients, on every rank. say: whether to print how far it is."""
    mine = even_share(lengths)
    total, counts = None, None
    for start in range(0, len(mine), size):
        rows = mine[start: start + size]
        part = f(rows).float()                                                     # (.., n)
        if total is None:
            total = part.new_zeros(part.shape[:-1] + (len(lengths),))              # (.., N)
            counts = part.new_zeros(len(lengths))
        total[..., rows] = part
        counts[rows] = 1.0
        if say:
            SCREEN.count((start + len(rows)) * WORLD, len(lengths), "rows read")
    return all_sum(total) / all_sum(counts)


def in_chunks(f, ids, mask, size):
    """f(ids, mask) over all rows of ids, mask (B, T), as `in_shares` does it. f returns (b,), (b, T) or
    (k, b, T) for b rows; the result is the same with b = B."""
    def part(rows):
        out = f(ids[rows], mask[rows])
        return out if out.dim() == 1 else out.transpose(-2, -1)                    # rows last

    out = in_shares(part, last_token(mask).tolist(), size)
    return out if out.dim() == 1 else out.transpose(-2, -1).contiguous()


def generate_in_shares(model, tok, prompts, draws, temperature=1.0):
    """`model.generate`, each rank a share of the prompts: the same tensors on every rank. The numbers that
    decide a row are in draws, so who samples it plays no part."""
    if WORLD == 1:
        return generate(model, tok, prompts, draws, temperature)
    mine, parts = range(RANK, len(prompts), WORLD), [None] * WORLD
    part = None
    if len(mine):
        part = generate(model, tok, [prompts[i] for i in mine], draws[RANK::WORLD], temperature)
        part = [x.cpu() for x in part]
    dist.all_gather_object(parts, part)

    # Put the shares together, padded to the longest row of all.
    T = max(part[0].shape[1] for part in parts if part is not None)
    ids = torch.full((len(prompts), T), tok.pad_id)
    mask, logp = torch.zeros(len(prompts), T, dtype=torch.bool), torch.zeros(len(prompts), T)
    for rank, part in enumerate(parts):
        if part is not None:
            for whole, x in zip((ids, mask, logp), part):
                whole[rank::WORLD, : x.shape[1]] = x
    device = model.wte.weight.device
    return ids.to(device), mask.to(device), logp.to(device)


def generate_answers(model, tok, prompts, max_new, generator, temperature=1.0):
    """One answer to each prompt (lists of ids), of at most max_new tokens: ids (B, T), mask and logp as
    `model.generate` returns them, and the answers as lists of ids. Each process samples its share."""
    # A number for every token that may come, drawn in fp64 on the CPU: the same on every machine.
    draws = torch.rand(len(prompts), max_new, dtype=torch.float64, generator=generator)
    ids, mask, logp = generate_in_shares(model, tok, prompts, draws, temperature)
    return ids, mask, logp, [row[on].tolist() for row, on in zip(ids.cpu(), mask.cpu())]
