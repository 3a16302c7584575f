"""Where and in which precision a run computes."""

import contextlib
import os
import platform

import torch

from rtd import distributed
from rtd.errors import InputError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("fp32", "tf32", "bf16")


def pick_device(name, deterministic=False):
    """The torch.device for ``--device``; auto takes CUDA, then MPS, then the CPU. Under torchrun each process its own GPU.

    TF32 is off but within ``tf32``: torch's own default has it on for convolutions and off for matrix products.
    deterministic: let torch use only algorithms that give the same bits each time, for the whole process. On CPUs all that is
    used here do anyway; on GPUs some faster ones do not.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for; read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # every buffer here is written before it is read
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        available = ", ".join(kind for kind in has if has[kind])
        raise InputError(f"--device {name}: torch sees no such device here; available: {available}")
    _allow_tf32(False)
    if name == "cuda" and distributed.launched():
        if distributed.local_rank() >= torch.cuda.device_count():
            raise InputError(f"torchrun: --nproc-per-node must be at most {torch.cuda.device_count()}, the number of GPUs here")
        device = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


@contextlib.contextmanager
def tf32(precision):
    """Within the block, of training, with precision "tf32", CUDA rounds the factors of float32 products to TF32's 10 bits."""
    _allow_tf32(precision == "tf32")
    try:
        yield
    finally:
        _allow_tf32(False)


def _allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def autocast(device, precision):
    """A context in which, with precision "bf16", convolutions and linear layers run in bfloat16.

    Parameters, gradients, optimizer state, norms, soft-maxes and losses stay float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def lacks_bf16(device):
    """Whether it is a CPU on which bf16 products take many times what fp32 takes: of Intel's or AMD's, without AVX-512."""
    x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return x86 and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def describe(device, precision):
    """A few words on how a run computes, for logs."""
    words = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        words += f", {torch.get_num_threads()} threads"
    if precision == "bf16" and lacks_bf16(device):
        precision += " (this processor has no instructions for it: fp32 would be many times as fast)"
    return f"{words}, {precision}"
