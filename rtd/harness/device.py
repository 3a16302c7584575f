"""Where and in which precision a run computes."""

import contextlib
import os
import platform

import torch

from rtd.errors import InputError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("fp32", "tf32", "bf16")


def pick_device(name, deterministic=False, launched=False, local_rank=0):
    """The torch.device for ``--device``; auto takes CUDA, then MPS, then the CPU.

    deterministic: torch may use only algorithms that give the same bits each time, in the whole
    process. On CPUs all that are used here do anyway; on GPUs some faster ones do not. launched:
    whether torchrun started this process, which then takes the GPU number ``local_rank``. Raises
    InputError for a device that is not there or cannot be used.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # none is read
    if name == "mps" and launched:
        raise InputError(
            "--device mps: torchrun's processes cannot exchange tensors there (gloo has no MPS); "
            "give --device cpu, or start the script without torchrun"
        )
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind in has if has[kind] and not (launched and kind == "mps")]
    if name == "auto":
        name = available[0]
    if name not in available:
        raise InputError(
            f"--device {name}: torch sees no such device here; available: {', '.join(available)}"
        )
    gpus = torch.cuda.device_count()
    if name == "cuda" and launched and local_rank >= gpus:
        raise InputError(
            f"torchrun: --nproc-per-node must be at most {gpus}, the number of GPUs here"
        )
    _allow_tf32(False)  # torch's default has it on for convolutions and off for matrix products
    # Sums of rounded partial sums of bfloat16 products would not resolve a KL of 1e-5.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = not deterministic  # the fastest convolution of each shape
    if name == "cuda" and launched:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(name)


@contextlib.contextmanager
def tf32(precision):
    """With precision "tf32", CUDA rounds the factors of float32 products to 10 bits in the block.

    Training runs in such a block; everywhere else TF32 is off.
    """
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
