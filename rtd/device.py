"""Where and in which precision a run computes."""

import os

import torch

from rtd import distributed
from rtd.errors import InputError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("fp32", "bf16")


def pick_device(name, deterministic=False):
    """The torch.device for ``--device``; auto takes CUDA, then MPS, then the CPU. Under torchrun each process its own GPU.

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
    if name == "cuda" and distributed.launched():
        device = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def autocast(device, precision):
    """A context in which, with precision "bf16", convolutions and linear layers run in bfloat16.

    Parameters, gradients, optimizer state, norms, soft-maxes and losses stay float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def describe(device):
    """A few words on the device, for logs."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
