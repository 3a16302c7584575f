"""How the processes of a run share its work and results; without torchrun there is one."""

import contextlib
import datetime
import os
import time
import warnings

import torch
import torch.distributed as dist

from rtd.errors import Diverged, InputError
from rtd.harness import console


@contextlib.contextmanager
def process_group(device):
    """A ``World`` of torchrun's processes for the block, by nccl on CUDA and gloo elsewhere."""
    if "LOCAL_RANK" not in os.environ:  # which torchrun sets
        yield World()
        return
    patience = datetime.timedelta(days=30)  # waiting for the main process to probe is normal
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=patience, device_id=device_id)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        # Gloo's thread needs Python's lock to drop the last tensor that it sent. Older versions of
        # torch hold the lock while they wait for the thread's end, so it gets some time before.
        time.sleep(0.2)
        dist.destroy_process_group()


class World:
    """The processes of a run as one of them sees them; ``World()`` is one without torchrun."""

    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size
        self.is_main = rank == 0  # in the one process that prints and writes

    def say(self, *words):
        """Print, in the main process."""
        if self.is_main:
            console.say(*words)

    def share(self, batch):
        """My part of a batch, and the factor for my loss that makes averaged gradients the batch's.

        DistributedDataParallel divides the sum of gradients by the number of processes, while a
        process's loss is the mean over its part: part * processes / whole undoes both, also for
        uneven parts. A process whose part is empty takes one image with factor 0 and joins in.
        """
        mine = batch.tensor_split(self.size)[self.rank]
        return mine if len(mine) else batch[:1], len(mine) * self.size / len(batch)

    def units(self, count):
        """(which of ``count`` independent units I do, the ``World`` that does each of them).

        With at least as many units as processes, each process does its own units as if it had been
        started without torchrun; with fewer, all processes do each unit together.
        """
        if count < self.size:
            return range(count), self
        return range(self.rank, count, self.size), World()

    def data_parallel(self, module):
        """``module``, its gradients averaged over processes; on CUDA norms see whole batches."""
        if self.size == 1:
            return module
        if next(module.parameters()).device.type == "cuda":
            module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
        elif any(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules()):
            self.say("note: on CPUs each process's batch norm sees its own part of a batch only")
        with warnings.catch_warnings():  # newer versions of torch rename the flag
            warnings.simplefilter("ignore", FutureWarning)
            return torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    def broadcast(self, tensors):
        """Give all processes the main process's values of ``tensors``, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def average(self, tensor):
        """Mean over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def map_rows(self, function, rows):
        """function(rows), a tensor with as many rows: made in shares, whole in each process."""
        if self.size == 1:
            return function(rows)
        count = -(-len(rows) // self.size)
        mine = torch.arange(self.rank * count, (self.rank + 1) * count)
        part = function(rows[mine % len(rows)])  # the last begin again, as all must have one size
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts)[: len(rows)]

    def gather(self, values):
        """The dicts ``values`` of all processes as one, in every process."""
        parts = [values] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, values)
        return {key: part[key] for part in parts for key in part}

    def in_main(self, function):
        """What ``function()`` returns in the main process, None in the others, which wait.

        What it raises there is raised in all.
        """
        if self.size == 1:
            return function()
        result, box = None, [None]
        if self.is_main:
            try:
                result = function()
            except (InputError, Diverged, OSError) as error:
                box = [error]
        dist.broadcast_object_list(box, 0)
        if box[0] is not None:
            box[0].everywhere = True  # one process is enough to print it
            raise box[0]
        return result
