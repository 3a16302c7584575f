"""Images as one uint8 tensor on the device: no worker processes, no decoding during training.

A data set is two splits of (N, 3, 32, 32) uint8 images with labels, the number of classes, and the mean and standard
deviation that normalise a batch. CIFAR-10 takes 184 MB this way; a batch is a slice of a permutation.
"""

import hashlib
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from rtd.errors import InputError
from rtd.files import atomic_write
from rtd.init import random_stream
from rtd.progress import progress

IMAGE_SIZE = 32
IMAGE_ENDINGS = torchvision.datasets.folder.IMG_EXTENSIONS


@dataclass(frozen=True)
class Split:
    """images: (N, 3, H, W) uint8. labels: (N,) int64. Both on one device."""

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


def normalize(images, mean, std):
    """(B, 3, H, W) uint8 -> float32 (images / 255 - mean) / std, in channels-last layout."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(3, 1, 1)
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)


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


def load_digits():
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, brought to 3x32x32; 1,347 train, 450 test."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8)
    images = F.interpolate(grey, size=IMAGE_SIZE, mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(np.arange(len(labels)), stratify=digits.target, random_state=0)
    train, test = Split(images[train].contiguous(), labels[train]), Split(images[test].contiguous(), labels[test])
    return Dataset("digits", train, test, 10, *channel_statistics(train.images))


CIFAR_CONSTANTS = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # mean and std; CIFAR-10's, which the paper uses for both
IMAGENET_CONSTANTS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED = {  # torchvision's class, what it expects in --data-dir, number of classes, normalisation
    "cifar10": ("CIFAR10", "cifar-10-batches-py with data_batch_1 to data_batch_5 and test_batch", 10, CIFAR_CONSTANTS),
    "cifar100": ("CIFAR100", "cifar-100-python with train, test and meta", 100, CIFAR_CONSTANTS),
    "stl10": ("STL10", "stl10_binary with train_X.bin, train_y.bin, test_X.bin and test_y.bin", 10, IMAGENET_CONSTANTS),
}


def load_published(name, data_dir, download=False):
    """One of ``PUBLISHED`` through torchvision, checksums verified, brought to 32x32; without STL-10's unlabelled images."""
    kind, expected, num_classes, constants = PUBLISHED[name]
    splits = []
    for which in ("train", "test"):
        part = {"split": which} if name == "stl10" else {"train": which == "train"}
        try:
            source = getattr(torchvision.datasets, kind)(data_dir, download=download, **part)
        except RuntimeError as error:
            raise InputError(
                f"--data-dir {data_dir}: no intact {kind} here. Expected is the folder {expected}; --download fetches it"
            ) from error
        images = torch.from_numpy(source.data)
        if name == "stl10":  # (N, 3, 96, 96), the others (N, 32, 32, 3)
            images, labels = shrink(images), source.labels
        else:
            images, labels = images.permute(0, 3, 1, 2).contiguous(), source.targets
        splits.append(Split(images, torch.as_tensor(labels, dtype=torch.int64)))
    return Dataset(name, *splits, num_classes, *constants)


def shrink(images, size=IMAGE_SIZE):
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, bilinear with antialiasing."""
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255).to(torch.uint8)
        for part in images.split(1000)
    ]
    return torch.cat(parts)


def _class_folders(root):
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"--data-dir: {root} must hold one folder of images a class, at least two; it holds {len(classes)}")
    return classes


def _image_files(root, classes):
    """[(path, label)] of all images below root/class, sorted; each class must have one."""
    files = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
        if not found:
            raise InputError(f"--data-dir: no image ({', '.join(IMAGE_ENDINGS)}) in the class folder {root / name}")
        files += [(path, label) for path in found]
    return files


def _decode(path, size):
    """A (3, size, size) uint8 tensor: shorter side to ``size`` with antialiasing, then the centre."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except OSError as error:
        raise InputError(f"--data-dir: {path} does not decode as an image ({error})") from error
    image = torchvision.transforms.functional.resize(image, size, antialias=True)
    image = torchvision.transforms.functional.center_crop(image, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _load_tree(root, classes, size, cache):
    """Decode the images of one split, or read them from ``cache`` if it was made from exactly these files."""
    files = _image_files(root, classes)
    stamps = [f"{path.relative_to(root)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path, _ in files]
    fingerprint = hashlib.sha256("\n".join([str(size), *stamps]).encode()).hexdigest()
    if cache.exists():
        try:
            with np.load(cache, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) == fingerprint:
                    return Split(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]))
        except (OSError, ValueError, KeyError, EOFError):
            pass  # a damaged cache is decoded anew
    images = torch.stack([_decode(path, size) for path, _ in progress(files, f"decoding {root.name}", "images")])
    labels = torch.tensor([label for _, label in files])
    try:
        with atomic_write(cache) as file:
            np.savez(file, images=images.numpy(), labels=labels.numpy(), fingerprint=np.array(fingerprint))
    except OSError as error:
        warnings.warn(f"the decoded images are not cached ({error})", stacklevel=2)
    return Split(images, labels)


def load_folder(data_dir, size=IMAGE_SIZE):
    """Any images: ``data_dir``/train and ``data_dir``/test (or val), each with one folder a class, the same in both.

    Decoded and resized once into ``data_dir``/.rtd-<split>-32.npz, which is read instead while no file's name, size or
    modification time has changed. Normalisation constants are those of the training images.
    """
    data_dir = Path(data_dir)
    held_out = next((name for name in ("test", "val") if (data_dir / name).is_dir()), None)
    if not (data_dir / "train").is_dir() or held_out is None:
        raise InputError(f"--data-dir {data_dir}: expected are the folders train and test (or val) with a folder a class in each")
    classes = _class_folders(data_dir / "train")
    if _class_folders(data_dir / held_out) != classes:
        raise InputError(f"--data-dir {data_dir}: train and {held_out} do not have the same class folders")
    train, test = (
        _load_tree(data_dir / name, classes, size, data_dir / f".rtd-{name}-{size}.npz") for name in ("train", held_out)
    )
    return Dataset("folder", train, test, len(classes), *channel_statistics(train.images))


DATASETS = ("digits", *PUBLISHED, "folder")


def load_dataset(name, data_dir=None, download=False, subset=None, test_subset=None):
    """The data set ``name``, in main memory, cut to class-balanced subsets where those are given.

    Raises InputError with a sentence that names the flag and what is expected.
    """
    if name not in DATASETS:
        raise InputError(f"--dataset: unknown data set '{name}': choose one of {', '.join(DATASETS)}")
    if name != "digits" and data_dir is None:
        raise InputError(f"--dataset {name} needs --data-dir, the folder that holds it")
    if download and name not in PUBLISHED:
        raise InputError(f"--download: {name} has no download")
    if name == "digits":
        data = load_digits()
    elif name in PUBLISHED:
        if not download and not os.path.isdir(data_dir):
            raise InputError(f"--data-dir {data_dir}: no such folder; --download makes it and fetches {name}")
        data = load_published(name, data_dir, download)
    else:
        data = load_folder(data_dir)
    for flag, split, n in (("--subset", data.train, subset), ("--test-subset", data.test, test_subset)):
        if n is not None and not 1 <= n <= len(split):
            raise InputError(f"{flag} {n}: {name} has {len(split)} such images; choose 1 to {len(split)}")
    return replace(data, train=take(data.train, subset, "train"), test=take(data.test, test_subset, "test"))
