"""Image files, decoded and resized once into a cache: any tree of class folders, and TinyImageNet as it is published."""

import contextlib
import hashlib
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from rtd.data import Dataset, Split, channel_statistics
from rtd.errors import InputError
from rtd.files import atomic_write
from rtd.progress import progress

IMAGE_ENDINGS = torchvision.datasets.folder.IMG_EXTENSIONS
IMAGENET_CONSTANTS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std


def cached(cache, files, size, make, labels=()):
    """The ``Split`` that ``make()`` returns, or the one in the file ``cache`` if that was made from exactly these files.

    files: the paths it is made from, of which none may have changed its size or its time of modification since.
    size: of its images. labels: of each file, where ``make`` does not read them from the files.
    """
    stamps = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    fingerprint = hashlib.sha256("\n".join([str(size), *stamps, *map(str, labels)]).encode()).hexdigest()
    if cache.exists():
        with contextlib.suppress(Exception):  # whatever a changed byte somewhere raises: a damaged cache is made anew
            with zipfile.ZipFile(cache) as archive:
                whole = archive.testzip() is None  # by checksums, which numpy does not see to where headers lie
            with np.load(cache, allow_pickle=False) as stored:
                if whole and str(stored["fingerprint"]) == fingerprint:
                    return Split(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]))
    split = make()
    try:
        with atomic_write(cache) as file:
            np.savez(file, images=split.images.numpy(), labels=split.labels.numpy(), fingerprint=np.array(fingerprint))
    except OSError as error:
        warnings.warn(f"the {size}x{size} images are not cached ({error})", stacklevel=2)
    return split


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
            if image.mode.startswith(("I", "F")):
                raise InputError(f"--data-dir: {path} has more than 8 bits a channel; convert it to 8")
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises, by format
        raise InputError(f"--data-dir: {path} does not decode as an image ({error})") from error
    image = torchvision.transforms.functional.resize(image, size, antialias=True)
    image = torchvision.transforms.functional.center_crop(image, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _decode_all(files, size, name):
    images = torch.stack([_decode(path, size) for path, _ in progress(files, f"decoding {name}", "images")])
    return Split(images, torch.tensor([label for _, label in files]))


def _load_files(files, size, cache):
    """``Split`` of [(path, label)], decoded, or read from ``cache``."""
    paths, labels = zip(*files, strict=True)
    return cached(cache, paths, size, lambda: _decode_all(files, size, cache.parent.name), labels)


def load_folder(data_dir, size):
    """Any images: ``data_dir``/train and ``data_dir``/test (or val), each with one folder a class, the same in both.

    Decoded and resized once into ``data_dir``/.rtd-<split>-<size>.npz, which is read instead while no file's name, size or
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
        _load_files(_image_files(data_dir / name, classes), size, data_dir / f".rtd-{name}-{size}.npz")
        for name in ("train", held_out)
    )
    return Dataset("folder", train, test, len(classes), *channel_statistics(train.images))


def _text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: it is not a text file ({error}); unpack it again") from error


def load_tinyimagenet(data_dir, size):
    """TinyImageNet as its archive unpacks: train/<wnid>/images, val/images and val/val_annotations.txt (the test split).

    ``data_dir``: the folder tiny-imagenet-200, or the one it is in. Nothing is moved; resized images are cached as
    ``load_folder``'s are. Normalised with ImageNet's constants.
    """
    root = Path(data_dir)
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    annotations = root / "val" / "val_annotations.txt"
    for expected in (root / "train", root / "val" / "images", annotations):
        if not expected.exists():
            raise InputError(
                f"--data-dir {data_dir}: {expected} is missing; expected is the folder tiny-imagenet-200 as "
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip unpacks"
            )
    classes = _class_folders(root / "train")
    listed = sorted(_text(root / "wnids.txt").split()) if (root / "wnids.txt").is_file() else classes
    if listed != classes:
        odd = sorted(set(listed) ^ set(classes))[0]
        raise InputError(f"--data-dir {data_dir}: the class {odd} is only in one of {root / 'wnids.txt'} and {root / 'train'}")
    labels = {name: label for label, name in enumerate(classes)}
    held_out = []
    for number, line in enumerate(_text(annotations).splitlines(), 1):
        cells = line.split("\t")
        if len(cells) < 2 or cells[1] not in labels:
            raise InputError(
                f"{annotations}, line {number}: expected are a file name, a tab and one of the {len(classes)} classes"
            )
        path = root / "val" / "images" / cells[0]
        if not path.is_file():
            raise InputError(f"{annotations}, line {number}: {path} is missing")
        held_out.append((path, labels[cells[1]]))
    if not held_out:
        raise InputError(f"{annotations} is empty")
    train = _load_files(_image_files(root / "train", classes), size, root / f".rtd-train-{size}.npz")
    test = _load_files(sorted(held_out), size, root / f".rtd-val-{size}.npz")
    return Dataset("tinyimagenet", train, test, len(classes), *IMAGENET_CONSTANTS)
