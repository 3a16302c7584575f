"""Images as one uint8 tensor on the device: no worker processes, no decoding during training.

A data set is two splits of (N, 3, 32, 32) uint8 images with labels, the number of classes, and the mean and standard
deviation that normalise a batch. CIFAR-10 takes 184 MB this way; a batch is a slice of a permutation. ``rtd.datasets`` loads
them.
"""

import functools
import hashlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from rtd.errors import InputError
from rtd.init import random_stream


@dataclass(frozen=True)
class Split:
    """images: (N, 3, H, W) uint8, or float32 where they are normalised already. labels: (N,) int64. Both on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.images)

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training and test split, class count, and per-channel normalisation constants in units of [0, 1] pixels."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to(self, device):
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def with_normalization(self, source):
        """The same images, normalised with the "mean" and "std" of ``source``, a checkpoint's "data"."""
        return replace(self, mean=tuple(source["mean"]), std=tuple(source["std"]))

    def fingerprints(self):
        """{"the training images": SHA-256, "the test images": SHA-256}, of all labels and about a thousand images of each."""
        return {f"the {name} images": _fingerprint(split) for name, split in (("training", self.train), ("test", self.test))}


def _fingerprint(split):
    some = split.images[:: max(1, len(split) // 1000)].contiguous()
    return hashlib.sha256(split.labels.numpy().tobytes() + some.numpy().tobytes()).hexdigest()


def normalize(images, mean, std):
    """(B, 3, H, W) uint8 -> float32 (images / 255 - mean) / std, in channels-last layout; float32 images stay as they are."""
    if images.is_floating_point():
        return images.contiguous(memory_format=torch.channels_last)
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)


@functools.cache  # a GPU is waited for whenever a tensor is copied to it
def _scale_and_shift(mean, std, device):
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(3, 1, 1)
    return scale, shift


def balanced_subset(labels, n, generator):
    """Indices (n,) of a class-balanced random subset, in ascending order: class counts differ by one at most.

    Classes that run out are filled up from the others, so any n up to all works; a smaller subset from the same
    generator state lies inside a larger one. Raises InputError for n outside [1, N].
    """
    labels = labels.cpu()
    if not 1 <= n <= len(labels):
        raise InputError(f"a subset of {n} images was asked for, but the split has {len(labels)}: choose 1 to {len(labels)}")
    order = torch.randperm(len(labels), generator=generator)
    turn = torch.empty_like(labels)  # an image's turn within its class; all first turns are taken before any second
    for c in labels.unique():
        members = order[labels[order] == c]
        turn[members] = torch.arange(len(members))
    return order[torch.sort(turn[order], stable=True).indices][:n].sort().values


def take(split, n, which):
    """The class-balanced subset of ``n`` images of ``split`` (all if n is None): the same for every seed of a run."""
    if n is None:
        return split
    index = balanced_subset(split.labels, n, random_stream(0, "subset", which))
    return Split(split.images[index], split.labels[index])


def channel_statistics(images):
    """Mean and standard deviation of each channel of (N, 3, H, W) uint8 images, in units of [0, 1] pixels."""
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    std = ((counts * values**2).sum(1) / counts.sum(1) - mean**2).clamp_min(1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def resize(images, size):
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, bilinear with antialiasing."""
    if images.shape[2:] == (size, size):
        return images
    resized = images.new_empty(len(images), 3, size, size)
    for start in range(0, len(images), 1000):
        part = F.interpolate(images[start : start + 1000].float(), size=(size, size), mode="bilinear", antialias=True)
        resized[start : start + 1000] = part.round_().clamp_(0, 255)
    return resized
