"""Images as one uint8 tensor on the device: no worker processes, no decoding during training.

CIFAR-10 takes 184 MB this way, and a batch is a slice of a permutation. ``rtd.harness.datasets``
loads the data sets.
"""

import functools
from dataclasses import dataclass, replace

import torch

from rtd.errors import InputError
from rtd.init import random_stream


@dataclass(frozen=True)
class Split:
    """images: (N, 3, H, W) uint8, or float32 that is normalised already. labels: (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.images)

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Two splits of images. mean, std: of each channel, in units of [0, 1] pixels."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self):
        return f"{self.name}, {len(self.train)} training and {len(self.test)} test images"

    def to(self, device):
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    @property
    def source(self):
        """What a checkpoint says of the data set that its networks were trained on."""
        return {"name": self.name, "mean": list(self.mean), "std": list(self.std)}

    def with_normalization(self, source):
        """The same images, to be normalised with the mean and std of ``source``."""
        return replace(self, mean=tuple(source["mean"]), std=tuple(source["std"]))

    def normalize(self, images):
        """``normalize`` with this data set's mean and std."""
        return normalize(images, self.mean, self.std)


def normalize(images, mean, std):
    """(B, 3, H, W) uint8 -> float32 (images / 255 - mean) / std, in channels-last layout.

    float32 images are normalised already, and stay as they are.
    """
    if images.is_floating_point():
        return images.contiguous(memory_format=torch.channels_last)
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)


@functools.cache  # a GPU is waited for whenever a tensor is copied to it
def _scale_and_shift(mean, std, device):
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def balanced_subset(labels, n, generator):
    """Indices (n,) of a random subset in which class counts differ by one at most, ascending.

    Larger classes make up for those that run out. A smaller subset from the same generator state
    lies inside a larger one. Raises InputError for n outside [1, N].
    """
    labels = labels.cpu()
    if not 1 <= n <= len(labels):
        raise InputError(f"a subset of {n} images cannot be taken: choose 1 to {len(labels)}")
    order = torch.randperm(len(labels), generator=generator)
    # an image's turn within its class: all first turns are taken before any second
    turn = torch.empty_like(labels)
    for c in labels.unique():
        members = order[labels[order] == c]
        turn[members] = torch.arange(len(members))
    return order[turn[order].argsort(stable=True)][:n].sort().values


def take(split, n, which):
    """The class-balanced subset of ``n`` images of ``split``, or all of them if n is None.

    which: a name for the draw, which is the same for every seed of a run.
    """
    if n is None:
        return split
    index = balanced_subset(split.labels, n, random_stream(0, "subset", which))
    return Split(split.images[index], split.labels[index])


def channel_statistics(images):
    """(mean, std) of each channel of (N, 3, H, W) uint8 images, in units of [0, 1] pixels."""
    counts = [c.flatten().bincount(minlength=256) for c in images.unbind(1)]
    counts = torch.stack(counts).double()  # (3, 256)
    values = torch.arange(256).double() / 255
    mean, square = ((counts * x).sum(1) / counts.sum(1) for x in (values, values**2))
    std = (square - mean**2).clamp_min(1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def resize(images, size):
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, bilinear with antialiasing."""
    if images.shape[2:] == (size, size):
        return images
    from torchvision.transforms import functional  # here, as importing it takes a second

    # in parts, because a float takes four times a byte's memory
    return torch.cat([functional.resize(part, [size, size]) for part in images.split(1000)])
