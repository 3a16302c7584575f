"""The data sets by name: scikit-learn's digits, published sets, image folders, images to distil on.

``stl10-unlabelled``, ``cifar5m`` and ``noise`` have no test images of their own: a student is
distilled on them, and its features are probed on another data set (paper Fig. 4).

Image files are decoded and resized once, into a cache in their folder. torchvision, PIL and
scikit-learn are imported where they are used, because a script's --help should not wait for them.
"""

import contextlib
import hashlib
import os
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F

from rtd.data import Dataset, Split, channel_statistics, resize, take
from rtd.errors import InputError
from rtd.harness.console import progress
from rtd.harness.files import atomic_write, reading
from rtd.init import random_stream

CIFAR = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # mean and standard deviation
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Number of classes and normalisation; the paper uses CIFAR-10's for CIFAR-100 too.
PUBLISHED = {"cifar10": (10, *CIFAR), "cifar100": (100, *CIFAR), "stl10": (10, *IMAGENET)}
LABELLED = ("digits", *PUBLISHED, "tinyimagenet", "folder")
# The data set that supplies the test images, unless another is asked for.
PROBED_ON = {"stl10-unlabelled": "stl10", "cifar5m": "cifar10", "noise": "cifar10"}
DATASETS = (*LABELLED, *PROBED_ON)
DOWNLOADABLE = (*PUBLISHED, *PROBED_ON)  # for cifar5m and noise, the CIFAR-10 that goes with them


def load_dataset(
    name,
    data_dir=None,
    download=False,
    subset=None,
    test_subset=None,
    image_size=32,
    probed=None,
    say=lambda text: None,
):
    """The data set ``name``, in main memory, cut to class-balanced subsets where those are given.

    image_size: side in pixels that images are brought to. probed: the ``Dataset`` that supplies the
    test split of one of ``PROBED_ON``, and for noise the shape and normalisation. say: called with
    a line of text before anything that takes seconds. Raises InputError with a sentence that names
    the flag or file and says what is expected.
    """
    if name not in DATASETS:
        raise InputError(f"--dataset '{name}': choose one of {', '.join(DATASETS)}")
    published = partial(_published_split, data_dir, download, image_size, say)
    if name == "noise":
        return load_noise(subset, probed)
    if name == "digits":
        data = load_digits(image_size)
    elif data_dir is None:
        raise InputError(f"--dataset {name} needs --data-dir, the folder that holds it")
    elif not (download or Path(data_dir).is_dir()):
        raise InputError(f"--data-dir {data_dir}: there is no such folder")
    elif name == "cifar5m":
        if image_size != 32:
            raise InputError(f"--image-size {image_size}: cifar5m is read as it is, 32x32")
        train = load_cifar5m(data_dir, subset, published("cifar10", "train"), say)
        return Dataset(name, train, probed.test, 10, *CIFAR)
    elif name == "folder":
        data = load_folder(data_dir, image_size, say)
    elif name == "tinyimagenet":
        data = load_tinyimagenet(data_dir, image_size, say)
    elif name == "stl10-unlabelled":
        train = published("stl10", "unlabeled")
        data = Dataset(name, train, probed.test, probed.num_classes, *IMAGENET)
    else:
        train, test = published(name, "train"), published(name, "test")
        data = Dataset(name, train, test, *PUBLISHED[name])
    for which, flag, n in (("train", "--subset", subset), ("test", "--test-subset", test_subset)):
        try:
            data = replace(data, **{which: take(getattr(data, which), n, which)})
        except InputError as error:
            raise InputError(f"{flag} {n}, --dataset {name}: {error}") from error
    return data


def fingerprints(data, of=""):
    """{"the training images", "the test images": SHA-256 of all labels and some 1,000 images}.

    of: words to add to the names.
    """

    def digest(split):
        some = split.images[:: max(1, len(split) // 1000)].contiguous()
        return hashlib.sha256(b"".join([split.labels.numpy(), some.numpy()])).hexdigest()

    splits = {"training": data.train, "test": data.test}
    return {f"the {name} images{of}": digest(split) for name, split in splits.items()}


def load_digits(size):
    """scikit-learn's 1,347 + 450 digits, 8x8 with 17 grey levels, brought to (3, size, size)."""
    from sklearn import datasets, model_selection

    pixels, labels = map(torch.from_numpy, datasets.load_digits(return_X_y=True))
    grey = pixels.float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(grey, size, mode="bilinear").round().byte().repeat(1, 3, 1, 1)
    parts = model_selection.train_test_split(range(len(labels)), stratify=labels, random_state=0)
    train, test = (Split(images[part], labels[part].long()) for part in parts)
    return Dataset("digits", train, test, 10, *channel_statistics(train.images))


def load_noise(n, like):
    """``n`` images, or as many as ``like`` has, of Gaussian noise, already normalised (Fig. 4)."""
    n = n or len(like.train)
    generator = random_stream(0, "noise")
    images = torch.randn(n, *like.train.images.shape[1:], generator=generator)
    return replace(like, name="noise", train=Split(images, torch.full((n,), -1)))


def _published_split(data_dir, download, size, say, name, which):
    """A split of one of ``PUBLISHED``, verified by torchvision, at ``size``."""
    import torchvision

    source, stl10 = getattr(torchvision.datasets, name.upper()), name == "stl10"
    say(f"reading the {which} images of {name} from {data_dir}")
    try:
        found = source(data_dir, which if stl10 else which == "train", download=download)
    except (URLError, ConnectionError, TimeoutError) as error:
        raise InputError(f"--download: {source.url} cannot be fetched ({error})") from error
    except RuntimeError as error:  # which does not say which file
        folder = Path(data_dir, source.base_folder)
        way = "try again" if download else "--download fetches it"
        raise InputError(
            f"--data-dir {data_dir}: {folder} is missing, or not what {source.url} has; {way}"
        ) from error
    images, labels = torch.from_numpy(found.data), found.labels if stl10 else found.targets
    images = images if stl10 else images.permute(0, 3, 1, 2).contiguous()
    return Split(resize(images, size), torch.as_tensor(labels, dtype=torch.int64))


def _tensor(path, key):
    """The array ``key`` of the .npz file ``path``; InputError if that is missing or damaged."""
    with reading(path, f"an .npz file with {key}"), zipfile.ZipFile(path) as archive:
        file = archive.open(f"{key}.npy")
        array = np.lib.format.read_array(file)  # which refuses pickled objects
        file.read()  # to the end, where the zip's checksum is compared
        return torch.from_numpy(array)


def load_cifar5m(data_dir, n, cifar10, say):
    """The first ``n`` images of CIFAR-10's training split followed by CIFAR-5M's parts in order.

    Up to CIFAR-10's size it is a class-balanced subset of CIFAR-10 alone (Fig. 4, authors' code).
    Parts (cifar5m_part0.npz ...) are read as far as needed, one at a time: this takes the memory of
    the (n, 3, 32, 32) bytes returned, 15.4 GB for 5 million, and 3 GB for a part.
    """
    done = len(cifar10)
    if n is not None and n <= done:
        return take(cifar10, n, "train")
    parts = {}
    while (path := Path(data_dir, f"cifar5m_part{len(parts)}.npz")).exists():
        given = _tensor(path, "Y")
        if not np.isin(given, range(10)).all():
            raise InputError(f"{path} is damaged: a label is not one of CIFAR-10's; fetch it again")
        parts[path] = given.long().ravel()
    labels = torch.cat([cifar10.labels, *parts.values()])
    if not parts or (n or 0) > len(labels):
        raise InputError(
            f"--data-dir {data_dir}: CIFAR-10 and the {len(parts)} parts of CIFAR-5M here have "
            f"{len(labels)} images; choose a --subset of 1 to {len(labels)}, or get more "
            "(cifar5m_part0.npz, ...) from https://github.com/preetum/cifar5m"
        )
    labels = labels[:n]
    images = torch.empty(len(labels), 3, 32, 32, dtype=torch.uint8)
    images[:done] = cifar10.images
    for path, given in parts.items():
        out = images[done:][: len(given)]
        done += len(given)
        if len(out):
            say(f"reading {path}")
            found = _tensor(path, "X")
            if (found.dtype, found.shape) != (torch.uint8, (len(given), 32, 32, 3)):
                raise InputError(
                    f"{path} is damaged: X is of type {found.dtype} and shape "
                    f"{tuple(found.shape)}, and there are {len(given)} labels; fetch it again"
                )
            out[:] = found[: len(out)].permute(0, 3, 1, 2)
            del found  # so that only one part at a time takes memory
    return Split(images, labels)


def load_folder(data_dir, size, say):
    """Any images: ``data_dir``/train and ``data_dir``/test (or val) hold a folder for each class.

    Normalisation constants are those of the training images.
    """
    root = Path(data_dir)
    held_out = "test" if (root / "test").is_dir() else "val"
    classes, train = _class_folders(root / "train")
    same, test = _class_folders(root / held_out)
    if odd := {*classes} ^ {*same}:
        raise InputError(f"--data-dir {root}: only train or {held_out} has the class {min(odd)}")
    train = _decoded(root, "train", train, size, say)
    test = _decoded(root, held_out, test, size, say)
    return Dataset("folder", train, test, len(classes), *channel_statistics(train.images))


def load_tinyimagenet(data_dir, size, say):
    """TinyImageNet as its archive unpacks, normalised as ImageNet; its val is the test split.

    ``data_dir``: the folder tiny-imagenet-200, or the one it is in.
    """
    inside = Path(data_dir, "tiny-imagenet-200")
    root = inside if inside.is_dir() else Path(data_dir)
    annotations = root / "val/val_annotations.txt"
    if not annotations.exists():
        raise InputError(
            f"--data-dir {data_dir}: {annotations} is missing; unpack tiny-imagenet-200.zip there"
        )
    classes, train = _class_folders(root / "train")
    with reading(annotations, "lines of a file name, a tab and one of the classes"):
        lines = annotations.read_text(encoding="utf-8").splitlines() or [""]
        named = [line.split("\t")[:2] for line in lines]
        held_out = [(root / "val/images" / file, classes.index(wnid)) for file, wnid in named]
    train = _decoded(root, "train", train, size, say)
    test = _decoded(root, "val", sorted(held_out), size, say)
    return Dataset("tinyimagenet", train, test, len(classes), *IMAGENET)


def _class_folders(root):
    """The names of the class folders in ``root``, and [(path, label)] of their images, by path.

    A label is its class's place among the names. What is hidden, or no image, is ignored, and links
    to folders within a class are not followed: torchvision's ImageFolder would take them for more.
    """
    from torchvision.datasets.folder import is_image_file

    def shown(names):
        return [name for name in names if not name.startswith(".")]

    def fail(error):
        raise error  # os.walk would skip a folder that cannot be read

    folders = next(os.walk(root, onerror=fail))[1] if root.is_dir() else []
    classes, images = sorted(shown(folders)), []
    for label, name in enumerate(classes):
        found = []
        for folder, inside, files in os.walk(root / name, onerror=fail):
            inside[:] = shown(inside)
            found += [Path(folder, file) for file in filter(is_image_file, shown(files))]
        if not found:
            what = "no image (.png, .jpg, ...) in the folder"
            raise InputError(f"--data-dir: {what} {root / name}; add some")
        images += [(path, label) for path in sorted(found)]
    if len(classes) < 2:
        raise InputError(
            f"--data-dir {root.parent}: train and test (or val) need a folder of images for each "
            f"class, at least two; {root} holds {len(classes)}"
        )
    return classes, images


def _decoded(root, split, files, size, say):
    """The ``Split`` of the images [(path, label)] at ``size``, or what a cache has of them.

    The cache, ``root``/.rtd-<split>-<size>.npz, is made anew if a path, its size, its time of
    modification or its label changes.
    """
    cache, digest = root / f".rtd-{split}-{size}.npz", hashlib.sha256(f"{size}".encode())
    for path, label in files:
        with reading(path):
            found = os.stat(path)
        size_and_time = f"{found.st_size} {found.st_mtime_ns}"
        digest.update(f"\n{path.relative_to(root)!a} {size_and_time} {label}".encode())
    with contextlib.suppress(InputError, MemoryError):  # no cache, or a damaged one
        labels = _tensor(cache, digest.hexdigest())  # of other files, there is no array so named
        return Split(_tensor(cache, "images"), labels)
    say(f"decoding the {len(files)} images of {root / split}")
    shown = progress(files, f"decoding {split}", "images")
    images = torch.stack([_decode(path, size) for path, _ in shown])
    labels = torch.tensor([label for _, label in files])
    try:
        for temporary in root.glob(f".{cache.name}.*.tmp"):
            temporary.unlink()  # of a process that was killed while it wrote
        with atomic_write(cache) as file:
            np.savez(file, images=images, **{digest.hexdigest(): labels})
    except OSError as error:
        say(f"the {size}x{size} images are not cached ({error})")
    return Split(images, labels)


def _decode(path, size):
    """(3, size, size) uint8: the shorter side brought to ``size`` with antialiasing, the centre."""
    from PIL import Image, ImageOps
    from torchvision.transforms import functional

    with reading(path, "an image"), Image.open(path) as image:
        if image.mode[0] in "IF":
            raise InputError(f"{path} has more than 8 bits a channel; convert it to 8")
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright = functional.center_crop(functional.resize(upright, size), size)
    return functional.pil_to_tensor(upright)
