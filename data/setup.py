"""What a script sets up before it begins: device, precision, threads, random numbers, optimizer, schedule,
batches."""
import ctypes
import math
import os
import random
import re
import sys
import time
from pathlib import Path

import torch

import model as gpt
from data import InputError
from data.parallel import RANK, WORLD, start_processes


def setup(cfg):
    """Make this process ready, as the flags say: memory, seeds, processes, precision, threads. Returns the
    device. Weights are fp32; products run in bf16 where --dtype says so (auto: where the hardware has it)."""
    keep_memory()
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")     # TF32 on GPUs
    device = start_processes(device_named(cfg.device))
    if RANK:
        silence_this_process()
    gpt.Linear.compute_dtype = torch.bfloat16 if uses_bf16(cfg.dtype, device) else None
    if device == "cpu":
        choose_threads()
    # cuDNN plans anew for every new shape, and answers differ in length: up to a second a step (LOG.md).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if getattr(cfg, "compile", False) and device.startswith("cuda"):
        gpt.compile_decoding()
    return torch.device(device)


def device_named(name):
    """The device that --device names, or the best there is. InputError: there is none of that name."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise InputError(f"--device {device}: expected cpu, cuda, cuda:1 or the like")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this torch sees no CUDA device; try --device cpu")
    if device.startswith("mps"):
        if not torch.backends.mps.is_available():
            raise InputError(f"--device {device}: this torch sees no Apple GPU; try --device cpu")
        print("--device mps has never been tried by us; with PYTORCH_ENABLE_MPS_FALLBACK=1 the CPU does what "
              "it lacks", flush=True)
    return device


def uses_bf16(dtype, device):
    """Whether products run in bf16, by --dtype and the device."""
    if dtype != "auto":
        return dtype == "bfloat16"
    # Emulated bf16 is right and slow, so only hardware that has it counts.
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and cpu_has_bf16()


def silence_this_process():
    """What it prints goes nowhere: of several processes the first one speaks."""
    sys.stdout = open(os.devnull, "w")


# ------------------------------------------------------------------------------------------------------------
# Memory, bf16 and threads of a CPU.


def keep_memory():
    """Large tensors in huge pages: GPT-2 124M trains 1.2x faster. And glibc keeps freed memory instead of
    fetching it anew from the system, page by page, in every step (LOG.md)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        for option, value in ((-3, 2 ** 25), (-1, 2 ** 30)):   # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, value)
    except (OSError, AttributeError):   # another system
        pass


def cpu_has_bf16():
    """True where the CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX) and oneDNN, which does it,
    may use that (ONEDNN_MAX_CPU_ISA); emulation would be slower."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_threads():
    """As many threads as cores are free just now: two threads on one free core are ten times slower than one.
    OMP_NUM_THREADS overrides. Scripts started from here get the same number, so that equal runs give equal
    bits."""
    if "OMP_NUM_THREADS" in os.environ or WORLD > 1 or not Path("/proc/stat").exists():
        return
    before = idle_seconds()
    time.sleep(0.3)
    free = round((idle_seconds() - before) / 0.3)
    n = max(1, min(torch.get_num_threads(), free))
    if n < torch.get_num_threads():
        print(f"{n} of {torch.get_num_threads()} threads, because other programs use the processor now "
              "(OMP_NUM_THREADS=N overrides)", flush=True)
    torch.set_num_threads(n)
    os.environ["OMP_NUM_THREADS"] = str(n)


def idle_seconds():
    """Seconds that all cores together have been idle (Linux)."""
    numbers = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(numbers[4]) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------------------
# Random draws, the optimizer, its schedule, and which examples a step reads.

MEASURE = 2 ** 31 - 1     # a stream of random numbers beside those of the steps 0, 1, 2, ...


def seeded(seed, step):
    """A generator for one step's random draws; because of it a resumed run needs no saved state of one."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2 ** 63)


def adamw(model, weight_decay=0.0, eps=1e-8):
    """AdamW with weight decay on matrices only (norms and biases are left alone). Its learning rate is set at
    each step."""
    matrices, vectors = [], []
    for p in model.parameters():
        if p.requires_grad:
            (matrices if p.dim() >= 2 else vectors).append(p)
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=eps, fused=True)


def set_lr(optimizer, lr):
    """Set the learning rate of every group of an optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def cosine(step, steps, warmup):
    """Learning-rate factor of a step, of those that will run (Run.n_steps): linear warmup, then a cosine from
    1 down to 0.1. In a run shorter than four warmups the warmup shrinks to a quarter of it."""
    warmup = max(1, min(warmup, steps // 4))
    falling = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * falling


def batches(lengths, batch_size, seed, epoch):
    """One pass over examples of these lengths: lists of example numbers, one a batch, of similar length to
    save padding: shuffle, sort within windows of 16 batches, shuffle the batches. With several processes the
    one short batch drops what does not divide evenly: other examples in each pass, and fewer than processes.
    InputError: --batch_size does not divide, or there are fewer examples than processes."""
    if batch_size % WORLD or len(lengths) < WORLD:
        would = max(1, batch_size // WORLD) * WORLD
        raise InputError(f"--batch_size {batch_size}, {len(lengths)} examples: they do not divide over "
                         f"{WORLD} processes; with at least {WORLD} examples --batch_size {would} would")
    # One stream an epoch, so that a resumed run finds its place again without a saved one.
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    out = []
    for start in range(0, len(order), 16 * batch_size):
        window = sorted(order[start: start + 16 * batch_size], key=lambda i: lengths[i])
        out += [window[i: i + batch_size] for i in range(0, len(window), batch_size)]
    out = [batch[: len(batch) // WORLD * WORLD] for batch in rng.sample(out, len(out))]
    return [batch for batch in out if batch]


def plan_of(lengths, cfg):
    """Which examples of these lengths each step of a run reads: the `batches` of --epochs passes."""
    plan = []
    for epoch in range(cfg.epochs):
        plan += batches(lengths, cfg.batch_size, cfg.seed, epoch)
    return plan
