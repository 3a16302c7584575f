"""The data sets by name: scikit-learn's digits, those that torchvision reads, image folders, and images to distil on.

``stl10-unlabelled``, ``cifar5m`` and ``noise`` have no test images of their own: they are what a student is distilled on, and
its features are probed on another data set (paper Fig. 4).
"""

import contextlib
import math
import os
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.datasets.utils import check_integrity

from rtd.data import Dataset, Split, channel_statistics, resize, take
from rtd.decoded import IMAGENET_CONSTANTS, cached, load_folder, load_tinyimagenet
from rtd.errors import InputError
from rtd.init import random_stream

CIFAR_CONSTANTS = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # mean and std; CIFAR-10's, which the paper uses for both
PUBLISHED = {  # torchvision's class, what it expects in --data-dir, number of classes, normalisation
    "cifar10": ("CIFAR10", "cifar-10-batches-py with data_batch_1 to 5, test_batch and batches.meta", 10, CIFAR_CONSTANTS),
    "cifar100": ("CIFAR100", "cifar-100-python with train, test and meta", 100, CIFAR_CONSTANTS),
    "stl10": ("STL10", "stl10_binary with X and y .bin files of train and test, and unlabeled_X.bin", 10, IMAGENET_CONSTANTS),
}
LABELLED = ("digits", *PUBLISHED, "tinyimagenet", "folder")
PROBED_ON = {"stl10-unlabelled": "stl10", "cifar5m": "cifar10", "noise": "cifar10"}  # what they go with by default
DATASETS = (*LABELLED, *PROBED_ON)
DOWNLOADABLE = (*PUBLISHED, *PROBED_ON)  # of cifar5m and noise, the CIFAR-10 that goes with them


def load_digits(size):
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, brought to (3, size, size); 1,347 train, 450 test."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8)
    images = F.interpolate(grey, size=size, mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(np.arange(len(labels)), stratify=digits.target, random_state=0)
    train, test = Split(images[train].contiguous(), labels[train]), Split(images[test].contiguous(), labels[test])
    return Dataset("digits", train, test, 10, *channel_statistics(train.images))


def _source(name):
    """torchvision's class of one of ``PUBLISHED``."""
    return getattr(torchvision.datasets, PUBLISHED[name][0])


def _missing(name, data_dir):
    kind, expected, _, _ = PUBLISHED[name]
    return f"--data-dir {data_dir}: no complete {kind} here. Expected is the folder {expected}; --download fetches it"


def _published_split(name, data_dir, download, which):
    """(images, labels) of one split: (N, 3, H, W) uint8 and (N,); InputError names the file that is missing or damaged."""
    source = _source(name)
    part = {"split": which} if name == "stl10" else {"train": which == "train"}
    try:
        found = source(data_dir, download=download, **part)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise InputError(f"--download: {source.url} cannot be fetched ({error})") from error
    except RuntimeError as error:
        folder = Path(data_dir, source.base_folder)
        meta = getattr(source, "meta", None)
        for file, md5 in (*source.train_list, *source.test_list, *([(meta["filename"], meta["md5"])] if meta else ())):
            if (folder / file).exists() and not check_integrity(folder / file, md5):
                raise InputError(f"{folder / file} is damaged: it is not the file that was published; fetch it again") from error
        if download:
            raise InputError(f"--download: what {source.url} sent is not what was published ({error}); try again") from error
        raise InputError(_missing(name, data_dir)) from error
    images = torch.from_numpy(found.data)
    if name == "stl10":
        return images, torch.as_tensor(found.labels, dtype=torch.int64)
    return images.permute(0, 3, 1, 2).contiguous(), torch.as_tensor(found.targets, dtype=torch.int64)


def load_published(name, data_dir, download, size):
    """One of ``PUBLISHED`` through torchvision, checksums verified."""
    _, _, num_classes, constants = PUBLISHED[name]
    splits = [_resized_split(name, data_dir, download, which, size) for which in ("train", "test")]
    return Dataset(name, *splits, num_classes, *constants)


def _resized_split(name, data_dir, download, which, size):
    """One split of ``PUBLISHED`` as a ``Split``; where it has another size, resized once into a cache beside it."""

    def make():
        images, labels = _published_split(name, data_dir, download, which)
        return Split(resize(images, size), labels)

    source = _source(name)
    files = source.test_list if which == "test" else source.train_list
    if name == "stl10":
        files = [file for file in files if file[0].startswith(which)]
    files = [Path(data_dir, source.base_folder, file) for file, _ in files]
    if size == (96 if name == "stl10" else 32) or not all(file.is_file() for file in files):
        return make()
    return cached(Path(data_dir, f".rtd-{name}-{which}-{size}.npz"), files, size, make)


def load_unlabelled(data_dir, download, size, probed):
    """STL-10's 100,000 images without labels (-1); the test split is that of ``probed``."""
    train = _resized_split("stl10", data_dir, download, "unlabeled", size)
    return Dataset("stl10-unlabelled", train, probed.test, probed.num_classes, *IMAGENET_CONSTANTS)


@contextlib.contextmanager
def _npz_array(path, key, shape):
    """Opens the array ``key`` of an .npz file, to be read row by row: (file, number of rows, dtype); rows are of ``shape``."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            (rows, *rest), fortran, dtype = read_header(file)
            if tuple(rest) != shape or fortran or dtype.kind not in "ui" or (shape and dtype != np.uint8):
                raise ValueError(f"{key} is of shape {(rows, *rest)} and type {dtype}")
            if file.tell() + rows * math.prod(shape) * dtype.itemsize != archive.getinfo(f"{key}.npy").file_size:
                raise ValueError(f"{key} does not hold the {rows} rows that it says")
            yield file, rows, dtype
    except Exception as error:  # a damaged file can make its readers fail in any way
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged or not a part of CIFAR-5M ({reason}); fetch it again") from error


def _npz_rows(path, key, shape):
    with _npz_array(path, key, shape) as (_, rows, _):
        return rows


def _read_npz(path, key, out):
    """The first rows of the array ``key`` of an .npz file into the numpy array ``out``, a few at a time."""
    with _npz_array(path, key, out.shape[1:]) as (file, total, dtype):
        for start in range(0, len(out), 10_000):
            rows = out[start : start + 10_000]
            rows[...] = np.frombuffer(file.read(rows.size * dtype.itemsize), dtype).reshape(rows.shape)
        if len(out) == total:
            file.read()  # up to the end, where the zip's checksum is compared


def load_cifar5m(data_dir, n, cifar10):
    """The first ``n`` images of CIFAR-10's training split followed by CIFAR-5M's parts in order (Fig. 4, authors' code).

    Up to CIFAR-10's size it is a class-balanced subset of CIFAR-10 alone. The parts, cifar5m_part0.npz ..., are read
    only as far as needed, into the (n, 3, 32, 32) bytes that are returned: 15.4 GB for 5 million.
    """
    if n is not None and n <= len(cifar10.train):
        return replace(cifar10, name="cifar5m", train=take(cifar10.train, n, "train"))
    paths = []
    while (path := Path(data_dir, f"cifar5m_part{len(paths)}.npz")).exists():
        paths.append(path)
    if not paths:
        raise InputError(
            f"--data-dir {data_dir}: no cifar5m_part0.npz, cifar5m_part1.npz, ... here, of which all but the first "
            f"{len(cifar10.train)} images come; https://github.com/preetum/cifar5m says where to get them"
        )
    sizes = [_npz_rows(path, "X", (32, 32, 3)) for path in paths]
    for path, rows in zip(paths, sizes, strict=True):
        if (named := _npz_rows(path, "Y", ())) != rows:
            raise InputError(f"{path} is damaged: it holds {rows} images and {named} labels; fetch it again")
    total = len(cifar10.train) + sum(sizes)
    n = total if n is None else n
    if n > total:
        raise InputError(
            f"--subset {n}: CIFAR-10 and the parts of CIFAR-5M in {data_dir}, up to {paths[-1].name}, have {total} images; "
            f"choose 1 to {total}"
        )
    images, labels = torch.empty(n, 3, 32, 32, dtype=torch.uint8), torch.empty(n, dtype=torch.int64)
    done = len(cifar10.train)
    images[:done], labels[:done] = cifar10.train.images, cifar10.train.labels
    for path, rows in zip(paths, sizes, strict=True):
        part = slice(done, min(done + rows, n))
        _read_npz(path, "X", images[part].permute(0, 2, 3, 1).numpy())
        _read_npz(path, "Y", labels[part].numpy())
        if not 0 <= labels[part].min() <= labels[part].max() < cifar10.num_classes:
            raise InputError(f"{path} is damaged: a label is not one of CIFAR-10's classes; fetch it again")
        done = part.stop
        if done == n:
            break
    return replace(cifar10, name="cifar5m", train=Split(images, labels))


def load_noise(n, like):
    """``n`` Gaussian images, sigma = 1 after normalisation, drawn once, in the shape and number of ``like``'s (Fig. 4)."""
    n = n or len(like.train)
    images = torch.randn(n, *like.train.images.shape[1:], generator=random_stream(0, "noise"))
    return replace(like, name="noise", train=Split(images, torch.full((n,), -1)))


def load_dataset(name, data_dir=None, download=False, subset=None, test_subset=None, image_size=32, probed=None):
    """The data set ``name``, in main memory, cut to class-balanced subsets where those are given.

    image_size: side in pixels that images are brought to. probed: the ``Dataset`` whose test split, and for noise shape and
    normalisation, one of ``PROBED_ON`` takes. Raises InputError with a sentence that names the flag and what is expected.
    """
    if name not in DATASETS:
        raise InputError(f"--dataset: unknown data set '{name}': choose one of {', '.join(DATASETS)}")
    if name not in ("digits", "noise") and data_dir is None:
        raise InputError(f"--dataset {name} needs --data-dir, the folder that holds it")
    if name in PUBLISHED and not download and not os.path.isdir(data_dir):
        raise InputError(_missing(name, data_dir))
    if name == "noise":
        return load_noise(subset, probed)
    if name == "cifar5m":
        if image_size != 32:
            raise InputError(f"--image-size {image_size}: cifar5m is read as it is, 32x32")
        return replace(load_cifar5m(data_dir, subset, load_published("cifar10", data_dir, download, 32)), test=probed.test)
    data = {
        "digits": lambda: load_digits(image_size),
        "folder": lambda: load_folder(data_dir, image_size),
        "tinyimagenet": lambda: load_tinyimagenet(data_dir, image_size),
        "stl10-unlabelled": lambda: load_unlabelled(data_dir, download, image_size, probed),
    }.get(name, lambda: load_published(name, data_dir, download, image_size))()
    for flag, split, n in (("--subset", data.train, subset), ("--test-subset", data.test, test_subset)):
        if n is not None and not 1 <= n <= len(split):
            raise InputError(f"{flag} {n}: {name} has {len(split)} such images; choose 1 to {len(split)}")
    return replace(data, train=take(data.train, subset, "train"), test=take(data.test, test_subset, "test"))
