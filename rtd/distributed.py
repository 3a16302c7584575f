"""One run on several processes, started by torchrun: who am I, my share of the work, and putting results together.

Without torchrun every function here does the obvious thing for a single process. Gradients are averaged by torch's
DistributedDataParallel; these are the few lines around it. Work that comes in independent units (``units``) is shared
as whole units where there are enough of them, which needs no communication at all.
"""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

_alone = False  # within ``units``, while each process works on units of its own


def launched():
    """Whether this process was started by torchrun (or anything that sets its environment variables)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def rank():
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def is_main():
    """True in the one process that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device):
    """Join torchrun's other processes for the duration of the block: nccl on CUDA, gloo elsewhere."""
    if not launched():
        yield
        return
    patience = datetime.timedelta(days=30)  # waiting is normal: for the main process to probe, for others to end their units
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(batch):
    """My part of a global batch (a tensor of indices), and the factor that makes averaged gradients those of the whole.

    Every image is in one part. DistributedDataParallel divides the sum of gradients by the number of processes, while a
    process's loss is the mean over its part: part * processes / whole undoes both, also for uneven parts. A process
    whose part is empty gets one image with factor 0, so that it joins in the averaging.
    """
    processes = world_size()
    if processes == 1:
        return batch, 1.0
    mine = batch.tensor_split(processes)[rank()]
    factor = len(mine) * processes / len(batch)
    return (mine, factor) if len(mine) else (batch[:1], 0.0)


def units(work):
    """Those of ``work`` (a list of independent units, the same in all processes) that this process is to do, one by one.

    At least as many units as processes: every process gets units of its own and, while it is at them, is as alone as
    without torchrun: the main process of one, who trains, prints and writes. Fewer: all processes do all units together.
    Either way, all processes must come to the end, where they wait for each other.
    """
    global _alone
    processes, mine = world_size(), work
    if len(work) >= processes > 1:
        mine, _alone = work[rank() :: processes], True
    try:
        yield from mine
    finally:
        _alone = False
    barrier()


def data_parallel(module):
    """``module``, whose gradients are averaged over the processes if there are several.

    On CUDA its batch norms then see the whole batch (they become SyncBatchNorm); on the CPU, where torch has none, each
    process's see its own part.
    """
    if world_size() == 1:
        return module
    if next(module.parameters()).device.type == "cuda":
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    elif is_main() and any(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules()):
        print("note: on CPUs each process's batch norm sees its own part of a batch, so results are not a single process's")
    return DistributedDataParallel(module)


def broadcast_tensors(tensors):
    """Give all processes the main process's values of ``tensors``, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def average(tensor):
    """Mean over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def map_rows(function, rows):
    """function(rows) -> tensor with as many rows, computed in shares by all processes; each gets the whole result."""
    processes = world_size()
    if processes == 1:
        return function(rows)
    bounds = torch.arange(len(rows)).tensor_split(processes)
    mine = function(rows[bounds[rank()]]) if len(bounds[rank()]) else None
    example = mine if mine is not None else function(rows[:1])
    whole = example.new_empty(len(rows), *example.shape[1:])
    for source, index in enumerate(bounds):
        if len(index):
            part = mine.contiguous() if source == rank() else whole.new_empty(len(index), *whole.shape[1:])
            dist.broadcast(part, source)
            whole[index] = part
    return whole


def broadcast_object(value):
    """The main process's ``value`` (any picklable object), in every process."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def gather(values):
    """The lists ``values`` of all processes (of any picklable objects) as one, each value once, in every process."""
    lists = [values]
    if world_size() > 1:
        lists = [None] * world_size()
        dist.all_gather_object(lists, values)
    return list(dict.fromkeys(value for one in lists for value in one))


@contextlib.contextmanager
def main_first():
    """The block runs in the main process, then in the others: what one downloads or caches, the others find.

    What is wrong with it is an error in each of them, by itself.
    """
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def barrier():
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()
