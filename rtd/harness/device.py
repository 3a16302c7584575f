"""Where and in which precision a run computes."""

import contextlib
import os
import platform

import torch

from rtd.errors import InputError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("fp32", "tf32", "bf16")


def pick_device(name, deterministic=False, local_rank=None, processes=None):
    """The torch.device for ``--device``; auto takes CUDA, then MPS, then the CPU.

    deterministic: torch may use only algorithms that give the same bits each time, in the whole
    process; on CPUs all that are used here do anyway. local_rank: the number of this process on its
    machine, and of the GPU that it takes, if torchrun started it and others, ``processes`` in all.
    Raises InputError for a device that cannot be used.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # none is read
    alone = local_rank is None
    mps = torch.backends.mps.is_available() and alone  # gloo, torchrun's way, has no MPS
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
    if name == "auto":
        name = available[0]
    if name not in available:
        torchrun = "" if alone else " under torchrun"
        raise InputError(f"--device {name}: none here{torchrun}; available: {', '.join(available)}")
    _allow_tf32(False)  # torch's default has it on for convolutions and off for matrix products
    # Sums of rounded partial sums of bfloat16 products would not resolve a KL of 1e-5.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = not deterministic  # the fastest convolution of each shape
    if name == "cuda" and not alone:
        if int(processes or 1) > (gpus := torch.cuda.device_count()):
            raise InputError(f"torchrun: --nproc-per-node must be at most {gpus}, the GPUs here")
        name = f"cuda:{local_rank}"
        torch.cuda.set_device(name)
    return torch.device(name)


@contextlib.contextmanager
def tf32(precision):
    """In the block, with "tf32", CUDA rounds float32 products' factors to 10-bit mantissas."""
    _allow_tf32(precision == "tf32")
    try:
        yield
    finally:
        _allow_tf32(False)


def _allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def lacks_bf16(device):
    """Whether it is an Intel or AMD CPU without AVX-512: bf16 takes many times as long as fp32."""
    x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return x86 and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def describe(device, precision):
    """A few words on how a run computes, for logs."""
    words = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        n = torch.get_num_threads()
        words += f", {n} thread" + "s" * (n > 1)
    if precision == "bf16" and lacks_bf16(device):
        precision += " (this processor has no instructions for it: fp32 is many times as fast)"
    return f"{words}, {precision}"
