"""The data sets by name: published ones, what is only distilled on, image files and caches."""

import errno
import hashlib
import os
import shutil
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import helpers
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from rtd.data import channel_statistics, normalize
from rtd.errors import InputError
from rtd.harness.datasets import DATASETS, fingerprints, load_dataset

REAL = Path(os.environ.get("RTD_DATA_DIR", helpers.ROOT / "data"))
DENIED = PermissionError(errno.EACCES, "Permission denied", "data_batch_3")


@pytest.fixture
def publish(monkeypatch):
    """Let torchvision's class ``kind`` read random images; returns them and what was read."""

    def call(kind, **sizes):
        source, held = getattr(torchvision.datasets, kind), {"read": []}
        shape = (3, 96, 96) if kind == "STL10" else (32, 32, 3)
        for split, n in sizes.items():
            images = np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)
            held[split] = images, np.full(n, -1) if split == "unlabeled" else np.arange(n) % 10

        class Source(source):
            def __init__(self, root, split="train", download=False):
                held["read"].append({True: "train", False: "test"}.get(split, split))
                self.data, self.labels = held[held["read"][-1]]
                self.targets = self.labels.tolist()

        monkeypatch.setattr(torchvision.datasets, kind, Source)
        return held

    return call


def changed(path, skip, step=1):
    """Change one byte at a time: each ``step``-th of zip's and numpy's headers, others sparsely."""
    whole = path.read_bytes()
    headers = {*range(0, 300, step), *range(len(whole) - 330, len(whole), step)}
    for i in headers | {*range(0, len(whole), skip)}:
        for byte in {whole[i] ^ 1, 14} - {whole[i]}:  # another digit of a shape; a compression
            path.write_bytes(whole[:i] + bytes([byte]) + whole[i + 1 :])
            yield i


def refusal(*args, **options):
    """The sentence with which ``load_dataset`` refuses."""
    with pytest.raises(InputError) as info:
        load_dataset(*args, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_digits_are_three_equal_channels_of_32x32_in_ten_classes():
    digits = load_dataset("digits")
    assert digits.train.images.shape == (1347, 3, 32, 32)
    assert digits.test.images.shape == (450, 3, 32, 32)
    assert digits.train.images.dtype == torch.uint8 and digits.train.images.max() == 255
    assert torch.equal(digits.train.images[:, 0], digits.train.images[:, 2])
    counts = torch.bincount(digits.test.labels)
    assert len(counts) == digits.num_classes == 10 and counts.min() >= 43
    train, test = ({i.numpy().tobytes() for i in s.images} for s in (digits.train, digits.test))
    assert not train & test
    some = load_dataset("digits", subset=1000)
    assert torch.bincount(some.train.labels).tolist() == [100] * 10
    found = fingerprints(some)
    hashed = digits.test.labels.numpy().tobytes() + digits.test.images.numpy().tobytes()
    assert found["the test images"] == hashlib.sha256(hashed).hexdigest()
    assert {**found, "the training images": fingerprints(digits)["the training images"]} != found


def test_flags_that_do_not_fit_are_named(tmp_path):
    assert "'mnist': choose one of digits, " in refusal("mnist")
    for name in set(DATASETS) - {"digits", "noise"}:
        assert f"--dataset {name} needs --data-dir" in refusal(name)
    assert "--image-size 64: cifar5m" in refusal("cifar5m", tmp_path, image_size=64)


def test_cifar10_through_torchvision():
    if not (REAL / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {REAL} (set RTD_DATA_DIR)")
    whole = load_dataset("cifar10", REAL)
    assert whole.train.images.shape == (50_000, 3, 32, 32) and len(whole.test) == 10_000
    np.testing.assert_allclose(channel_statistics(whole.train.images)[0], whole.mean, atol=1e-4)


def test_where_published_files_are_missing_or_damaged_is_said(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("stl10", "stl10_binary")):
        message = refusal(name, tmp_path)
        assert f"{tmp_path / folder} is missing, or not what" in message
        assert "--download" in message


def test_a_download_that_fails_names_its_address(tmp_path, monkeypatch):
    for error, kind, said in (
        (urllib.error.URLError("no such name"), InputError, "--download: https.* no such name"),
        (RuntimeError("corrupted."), InputError, "python is missing, or not what https.* has"),
        (DENIED, PermissionError, "data_batch_3"),  # which is not blamed on the download
    ):
        name = "download_and_extract_archive"
        monkeypatch.setattr(torchvision.datasets.cifar, name, Mock(side_effect=error))
        with pytest.raises(kind, match=said):
            load_dataset("cifar100", tmp_path, download=True)


@pytest.mark.parametrize(("name", "size"), [("cifar100", 64), ("stl10", 32)])
def test_published_images_are_torchvisions_at_the_size_asked_for(tmp_path, publish, name, size):
    held, said = publish(name.upper(), train=1030, test=10, unlabeled=5), []
    data = load_dataset(name, tmp_path, image_size=size, say=said.append)
    assert held["read"] == ["train", "test"] and [name in line for line in said] == [True, True]
    assert data.train.images.shape == (1030, 3, size, size)
    assert data.num_classes == (100 if name == "cifar100" else 10)
    assert data.train.labels.tolist() == held["train"][1].tolist()
    image = held["train"][0][1020]  # more than 1,000, which are resized at once
    image = Image.fromarray(image if name == "cifar100" else image.transpose(1, 2, 0))
    expected = np.asarray(image.resize((size, size), Image.BILINEAR), dtype=int)  # antialiases
    assert np.abs(data.train.images[1020].permute(1, 2, 0).numpy() - expected).max() <= 1
    if name == "stl10":
        test, data = data.test, load_dataset("stl10-unlabelled", tmp_path, probed=data)
        assert held["read"] == ["train", "test", "unlabeled"] and data.test is test
        assert data.train.images.shape == (5, 3, 32, 32) and data.train.labels.tolist() == [-1] * 5


@pytest.fixture
def cifar10(publish):
    """The data set of 60 and 20 images that stand in for CIFAR-10."""
    publish("CIFAR10", train=60, test=20)
    return load_dataset("cifar10", ".")


@pytest.fixture
def parts(tmp_path):
    """Images and labels of CIFAR-5M in parts of 100 and 30, as published, in ``tmp_path``."""
    x = np.random.default_rng(1).integers(0, 256, (130, 32, 32, 3), dtype=np.uint8)
    y = np.arange(130) // 2 % 10
    np.savez(tmp_path / "cifar5m_part0.npz", X=x[:100], Y=y[:100])
    np.savez(tmp_path / "cifar5m_part1.npz", X=x[100:], Y=y[100:].astype(np.uint16))
    return x, y


@pytest.mark.parametrize("n", [165, None])  # 5 of the second part; all
def test_cifar5m_is_cifar10_first_then_the_parts_in_order(cifar10, parts, tmp_path, n):
    said = []
    data = load_dataset("cifar5m", tmp_path, subset=n, probed=cifar10, say=said.append)
    count = (n or 190) - 60
    assert torch.equal(data.train.images[:60], cifar10.train.images)
    assert torch.equal(data.train.labels[:60], cifar10.train.labels)
    np.testing.assert_array_equal(data.train.images[60:].permute(0, 2, 3, 1), parts[0][:count])
    np.testing.assert_array_equal(data.train.labels[60:], parts[1][:count])
    assert data.test is cifar10.test and "cifar5m_part1.npz" in said[-1]


def test_only_as_much_of_cifar5m_is_needed_as_is_asked_for(cifar10, parts, tmp_path):
    first, second, third = (tmp_path / f"cifar5m_part{i}.npz" for i in range(3))
    np.savez(second, X=np.zeros(3), Y=parts[1][100:])
    assert len(load_dataset("cifar5m", tmp_path, subset=160, probed=cifar10).train) == 160
    assert f"{second} is damaged" in refusal("cifar5m", tmp_path, subset=161, probed=cifar10)
    second.rename(third)  # of parts 0 and 2, the order is not known
    message = refusal("cifar5m", tmp_path, subset=161, probed=cifar10)
    assert "the 1 parts" in message and "choose a --subset of 1 to 160" in message
    first.unlink()
    for n in (161, None):
        assert "cifar5m_part0.npz, " in refusal("cifar5m", tmp_path, subset=n, probed=cifar10)
    balanced = load_dataset("cifar5m", tmp_path, subset=30, probed=cifar10).train
    assert torch.bincount(balanced.labels).tolist() == [3] * 10


def test_a_part_that_is_none_is_named(cifar10, parts, tmp_path):
    x, y = (array[100:] for array in parts)
    for said, part in (
        ("(30, 32, 32, 3), and there are 29 labels", {"X": x, "Y": y[:29]}),
        ("a label is not one of", {"X": x, "Y": y + 10}),
        ("a label is not one of", {"X": x, "Y": y + 0.5}),
        ("Y", {"X": x, "Y": y.astype(str)}),
        ("of type torch.uint16", {"X": x.astype(np.uint16), "Y": y}),
        ("shape (30, 3, 32, 32)", {"X": x.transpose(0, 3, 1, 2), "Y": y}),
        ("Y.npy", {"X": x}),
    ):
        np.savez(tmp_path / "cifar5m_part1.npz", **part)
        message = refusal("cifar5m", tmp_path, probed=cifar10)
        assert "cifar5m_part1.npz is damaged" in message and said in message


def test_whichever_byte_of_a_part_is_changed_it_is_named_or_read_rightly(cifar10, tmp_path):
    images, labels, refused = np.arange(6144, dtype=np.uint8).reshape(2, 32, 32, 3), [3, 7], 0
    np.savez(part := tmp_path / "cifar5m_part0.npz", X=images, Y=labels)
    for i in changed(part, skip=97):
        try:
            found = load_dataset("cifar5m", tmp_path, probed=cifar10).train
        except InputError as error:
            refused += str(part) in str(error)
        else:
            np.testing.assert_array_equal(found.images[60:].permute(0, 2, 3, 1), images, str(i))
            assert found.labels[60:].tolist() == labels, i
    assert refused > 300


def test_noise_is_standard_normal_after_normalisation_and_always_the_same(cifar10):
    noise, again = (load_dataset("noise", subset=n, probed=cifar10) for n in (None, 60))
    assert torch.equal(noise.train.images, again.train.images)
    assert noise.train.images.shape == (60, 3, 32, 32)
    x = normalize(noise.train.images, noise.mean, noise.std)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1  # not cut off
    assert noise.test is cifar10.test and noise.train.labels.unique().tolist() == [-1]
    assert not torch.equal(noise.train.images[0], noise.train.images[1])


@pytest.fixture
def tree(tmp_path):
    """train/ and val/ of two classes, with 3 and 2 images each; one is grey and no square."""
    (helpers.image_folder(tmp_path, train=6, test=4) / "test").rename(tmp_path / "val")
    grey = Image.open(tmp_path / "train" / "two" / "1.png").resize((60, 50)).convert("L")
    grey.save(tmp_path / "train" / "two" / "1.JPG")
    (tmp_path / "train" / "two" / "1.png").unlink()
    return tmp_path


def test_folder_is_decoded_once_and_again_when_a_file_changes(tree, monkeypatch):
    said, killed = [], tree / "..rtd-val-32.npz.123.tmp"
    monkeypatch.chdir(tree.parent)
    first, data = (load_dataset("folder", path, say=said.append) for path in (tree, tree.name))
    assert said == [f"decoding the {n} images of {tree / s}" for n, s in ((6, "train"), (4, "val"))]
    assert data.num_classes == 2 and torch.equal(first.train.images, data.train.images)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(data.mean, (data.train.images.numpy() / 255).mean((0, 2, 3)))
    grey = Image.open(tree / "train" / "two" / "1.JPG").resize((38, 32), Image.BILINEAR)
    expected = np.asarray(grey.crop((3, 0, 35, 32)))[None].repeat(3, 0)  # the centre
    np.testing.assert_array_equal(data.train.images[4], expected)
    killed.touch()  # by a process that was killed while it wrote a cache
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tree / "val" / "two" / "0.png")
    again = load_dataset("folder", tree, say=said.append)
    assert said[2:] == said[1:2] and not killed.exists()  # the split that changed
    assert again.test.images[2, 0].float().mean() == 255
    assert torch.equal(again.train.images, first.train.images)


def test_what_is_hidden_or_no_image_is_ignored_and_links_are_not_followed(tree):
    for folder in ("one/inside", "one/.hidden", ".checkpoints"):
        (tree / "train" / folder).mkdir()
    for name in ("a.gif", "Thumbs.db", "../notes.txt", "inside/b.gif", ".c.png", ".hidden/0.png"):
        (tree / "train" / "one" / name).touch()
    (tree / "train" / "one" / "linked").symlink_to(tree / "train", target_is_directory=True)
    assert load_dataset("folder", tree).train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_images_that_cameras_turned_are_turned_back(tree):
    """EXIF orientation 6: what is stored is the picture turned by a quarter to the left."""
    upright = load_dataset("folder", tree).train.images
    for path in tree.rglob("*.png"):
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert torch.equal(load_dataset("folder", tree).train.images, upright)


def test_whichever_byte_of_a_cache_is_changed_it_is_made_anew(tree, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds are written
    images, said = load_dataset("folder", tree, image_size=14).train.images, []
    for i in changed(tree / ".rtd-train-14.npz", skip=997, step=3):
        found = load_dataset("folder", tree, image_size=14, say=said.append).train
        assert torch.equal(found.images, images) and found.labels.tolist() == [0, 0, 0, 1, 1, 1], i
    assert len(said) > 130


def test_a_cache_with_a_pickle_in_it_is_not_opened(tree):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tree / "executed"),)

    load_dataset("folder", tree)
    with np.load(tree / ".rtd-train-32.npz") as stored:
        arrays = {name: np.array([Payload()], dtype=object) for name in stored}
    np.savez(tree / ".rtd-train-32.npz", **arrays)
    assert len(load_dataset("folder", tree).train) == 6 and not (tree / "executed").exists()


def test_a_cache_that_cannot_be_written_is_said(tree, monkeypatch):
    said = []
    error = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(os, "replace", Mock(side_effect=error))
    assert len(load_dataset("folder", tree, say=said.append).train) == 6
    assert sum("not cached" in line and "Read-only" in line for line in said) == 2


def test_folder_mistakes_are_named(tree):
    for split in ("train", "val"):
        (tree / split / "cat").mkdir()
        assert f"in the folder {tree / split / 'cat'}" in refusal("folder", tree)
        Image.new("RGB", (9, 9)).save(tree / split / "cat" / "0.png")
    (tree / "val" / "cat").rename(tree / "val" / "dog")
    assert "only train or val has the class cat" in refusal("folder", tree)
    for name in ("cat", "one"):
        shutil.rmtree(tree / "train" / name)
    for root in (tree, tree / "train"):
        assert "train and test (or val) need" in refusal("folder", root)


@pytest.fixture
def tiny(tmp_path):
    """TinyImageNet's layout with two classes: three training images each, four for validation."""
    root, lines = tmp_path / "tiny-imagenet-200", []
    shades = {f"val/images/val_{i}.JPEG": n for i, n in enumerate((2, 1, 2, 2))}
    shades |= {f"train/n0{n}/images/n0{n}_{i}.JPEG": n for i in range(3) for n in (1, 2)}
    for name, n in shades.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (90 * n, 0, 0)).save(root / name)
        lines += [f"{Path(name).name}\tn0{n}\t0\t62\n"] if name.startswith("val") else []
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "train" / "n01" / "n01_boxes.txt").touch()
    (root / "train" / "n01" / "images" / "._n01_0.JPEG").touch()  # as a Mac leaves them
    return root


@pytest.mark.parametrize("size", [32, 64])
def test_tinyimagenet_is_read_as_it_is_published(tiny, size):
    before, said = {*tiny.rglob("*")}, []
    for root in (tiny, tiny.parent):
        data = load_dataset("tinyimagenet", root, image_size=size, say=said.append)
        assert data.train.images.shape == (6, 3, size, size)
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.test.labels.tolist() == [1, 0, 1, 1] and data.mean == (0.485, 0.456, 0.406)
        assert (data.test.images[:, 0, 5, 5] > 120).tolist() == [True, False, True, True]
    made = {path.name for path in {*tiny.rglob("*")} - before}
    assert made == {f".rtd-train-{size}.npz", f".rtd-val-{size}.npz"}
    assert [line.split()[0] for line in said] == ["decoding"] * 2  # boxes are not worth a word
    annotations = tiny / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("val_0.JPEG\tn02", "val_0.JPEG\tn01"))
    assert load_dataset("tinyimagenet", tiny, image_size=size).test.labels.tolist() == [0, 0, 1, 1]


def test_what_tinyimagenet_lacks_is_named(tiny):
    annotations = tiny / "val" / "val_annotations.txt"
    (tiny / "val" / "images" / "val_2.JPEG").unlink()
    assert "val_2.JPEG" in refusal("tinyimagenet", tiny)
    for content in (b"val_0.JPEG n02\n", b""):
        annotations.write_bytes(content)
        said = f"{annotations} is damaged or not lines of a file name, a tab and one of the classes"
        assert said in refusal("tinyimagenet", tiny)
    annotations.write_bytes(b"val_0.JPEG\t\xff\xfe")
    assert f"{annotations} is damaged or not lines" in refusal("tinyimagenet", tiny)
    annotations.unlink()
    assert f"{annotations} is missing" in refusal("tinyimagenet", tiny)
