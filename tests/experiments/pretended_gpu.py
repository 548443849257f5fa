"""A pretended GPU, for checks on machines without one:

    python tests/experiments/pretended_gpu.py sft.py --device cuda --max_steps 2

With a CPU build of torch the script runs unchanged. Its tensors say "cuda:0", keep their numbers on the CPU,
and refuse what CUDA refuses: tensors of two devices in one operation, CUDA indices of a CPU tensor. At the
end it says which lines waited for the GPU. Several processes (set RANK, WORLD_SIZE and so on as torchrun
does) get gloo in NCCL's place and a plain sum of gradients in FSDP2's. There are no streams, graphs or
kernels: nothing here speaks of speed. It rests on the inner layout of torch 2.13 on Linux; elsewhere it ends
with exit code 77 and the reason. """
import atexit
import collections
import ctypes
import os
import runpy
import sys

import torch
import torch._dynamo    # noqa: F401  it looks for a GPU when it is imported: before there seems to be one
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
MOVES = (aten._to_copy, aten.copy_)
INDEXES = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_)
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)   # for the host
WAITS = collections.Counter()   # "file:line in function" -> how often it waited
KEPT = []                       # what C++ points to


class Cuda(torch.Tensor):
    """A tensor of the pretended GPU around `inner`, one on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, inner):
        x = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device="cuda:0",
            storage_offset=inner.storage_offset())
        x.inner = inner
        return x

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def tolist(self):      # torch does this and the next for plain tensors only
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.item(), spec)


class Everywhere(TorchDispatchMode):
    """Sees the operations that no Cuda tensor takes part in: those that may make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def call(func, args, kwargs):
    """One operation of torch, on the CPU's numbers. RuntimeError: CUDA would refuse it."""
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    gpu = [x for x in tensors if isinstance(x, Cuda)]
    to = kwargs.get("device")
    if not gpu and not is_cuda(to):
        return func(*args, **kwargs)

    # From where to where. A single number may come from the CPU, and so may indices.
    op, first = func.overloadpacket, args[0] if args else None
    is_move, is_index = op in MOVES, op in INDEXES
    here = isinstance(first, Cuda)
    there = is_cuda(to) if to is not None else here or not is_move
    indices = [x for x in args[1] if x is not None] if is_index else []
    strangers = [x for x in tensors if not isinstance(x, Cuda) and x.dim()]
    strangers = [x for x in strangers if not any(x is i for i in indices)]
    if gpu and not is_move and (strangers or is_index and not here):
        raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU, of {[list(x.shape) for x in tensors]}")

    # Who waits: who reads numbers or moves them, unless the copy may go on by itself.
    moves = is_move and here != there and not (there and kwargs.get("non_blocking"))
    if op in READS or moves or any(x.dtype == torch.bool for x in indices):
        WAITS[calling_line()] += 1

    args_, kwargs_ = tree_unflatten([x.inner if isinstance(x, Cuda) else x for x in flat], spec)
    if to is not None:
        kwargs_["device"] = "cpu"
    if op is aten._to_copy:
        kwargs_.setdefault("dtype", first.dtype)
    out = func(*args_, **kwargs_)
    if not there:
        return out
    out = tree_map(lambda x: Cuda(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if gpu else out


def calling_line():
    """"file:line in function" of the innermost line that is neither torch's nor this file's."""
    frame = sys._getframe(2)
    while frame.f_back and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def why_not():
    """Why there can be no pretended GPU here; "" if there can."""
    if not sys.platform.startswith("linux") or not torch.__version__.startswith("2.13."):
        return f"made for torch 2.13 on Linux, not for {torch.__version__} on {sys.platform}"
    if torch.version.cuda or torch.version.hip:
        return "made for a CPU build of torch"
    try:
        find_symbols()
    except (OSError, AttributeError, ValueError) as e:
        return f"this torch is laid out differently: {e}"
    return ""


def find_symbols():
    """The table of device guards, and the function that returns CUDA's hooks, of C++."""
    lib = os.path.dirname(torch.__file__) + "/lib/"
    registry = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 22).in_dll(ctypes.CDLL(lib + "libc10.so"), registry)
    get_hooks = ctypes.CDLL(lib + "libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    return guards, get_hooks


def answer_no(*args, **flags):
    return 0


def answer_yes(*args, **flags):
    return 1


def install():
    """Make torch believe in the device."""
    integer_function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    no, yes = integer_function(answer_no), integer_function(answer_yes)
    no_address, yes_address = (ctypes.cast(f, ctypes.c_void_p).value for f in (no, yes))
    guards, get_hooks = find_symbols()

    # A device guard that counts 0 devices: torch then puts its own guard, which does nothing, in its place.
    table = (ctypes.c_void_p * 64)(*[no_address] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(table))
    guards[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()

    # A copy of the table of CUDA's hooks in which the questions "is it built, is it there" are answered.
    pointer = ctypes.c_void_p.from_address(get_hooks())
    before = pointer.value
    hooks = (ctypes.c_void_p * 82)(*(ctypes.c_void_p * 82).from_address(before - 16))
    for slot in (2, 3, 4, 6, 16):
        hooks[2 + slot] = yes_address
    hooks[2 + 5] = no_address
    pointer.value = ctypes.addressof(hooks) + 16
    KEPT.extend([no, yes, table, guard, hooks])
    atexit.register(setattr, pointer, "value", before)

    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for name in ("_lazy_init", "set_device", "synchronize"):
        setattr(torch.cuda, name, answer_no)
    for name in ("is_available", "is_bf16_supported"):
        setattr(torch.cuda, name, answer_yes)
    Everywhere().__enter__()


def install_processes():
    """gloo for NCCL, which a CPU build lacks, and a stand-in for FSDP2: whole models, summed gradients."""
    join = dist.init_process_group

    def init_process_group(backend, **more):
        join(backend.replace("nccl", "gloo"), **more)

    def init_device_mesh(kind, shape):
        return kind

    def fully_shard(part, mesh, ignored_params):
        if next(part.parameters()).device.type != mesh:
            part.to(mesh)
        for p in part.parameters():
            if p.requires_grad and p not in ignored_params and not hasattr(p, "is_summed"):
                p.is_summed = True
                p.register_hook(summed)
        part.set_gradient_divide_factor = part.set_force_sum_reduction_for_comms = answer_no

    dist.init_process_group, fsdp.fully_shard = init_process_group, fully_shard
    dist.device_mesh.init_device_mesh = init_device_mesh


def summed(grad):
    """The sum of a gradient over all ranks."""
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad


if __name__ == "__main__":
    if why_not():
        print(why_not(), file=sys.stderr)
        sys.exit(77)
    install()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        install_processes()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    try:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.path[0] = os.getcwd()    # a module, as `python -m` runs it
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        print(f"{sum(WAITS.values())} waits for the GPU:")
        for line, n in WAITS.most_common():
            print(f"{n:6} {line}")
