"""Published data sets, and the images that are only distilled on: unlabelled STL-10, CIFAR-5M and noise."""

import errno
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from rtd import datasets
from rtd.data import Dataset, Split, channel_statistics, normalize
from rtd.datasets import load_dataset
from rtd.errors import InputError

CIFAR10 = Path(os.environ.get("RTD_DATA_DIR", Path(__file__).resolve().parent.parent / "data"))
needs_cifar10 = pytest.mark.skipif(
    not (CIFAR10 / "cifar-10-batches-py").is_dir(), reason=f"CIFAR-10 is not in {CIFAR10} (set RTD_DATA_DIR)"
)


@needs_cifar10
def test_cifar10_through_torchvision():
    loaded = load_dataset("cifar10", CIFAR10, subset=1000, test_subset=100)
    assert torch.bincount(loaded.train.labels).tolist() == [100] * 10
    whole = datasets.load_published("cifar10", CIFAR10, False, 32)
    assert whole.train.images.shape == (50_000, 3, 32, 32)
    np.testing.assert_allclose(channel_statistics(whole.train.images)[0], whole.mean, atol=1e-4)


def test_missing_or_damaged_cifar10_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no complete CIFAR10 here.*batches.meta; --download"):
        load_dataset("cifar10", tmp_path / "nowhere")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    with pytest.raises(InputError, match="data_batch_1 is damaged: .*fetch it again"):
        load_dataset("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").unlink()
    with pytest.raises(InputError, match="data_batch_1 to 5"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("cifar100", "CIFAR100"), ("stl10", "STL10")])
def test_published_sets_are_read_as_torchvision_gives_them(tmp_path, monkeypatch, name, kind):
    """What torchvision's classes hold, which are replaced here: the images of one are channels-last, of the other 96x96."""
    rng = np.random.default_rng(0)

    class Source(getattr(torchvision.datasets, kind)):
        def __init__(self, root, download=False, **part):
            n = 30 if part in ({"train": True}, {"split": "train"}) else 10
            assert root == tmp_path and part in ({"train": n == 30}, {"split": "train" if n == 30 else "test"})
            shape = (n, 32, 32, 3) if kind == "CIFAR100" else (n, 3, 96, 96)
            self.data = rng.integers(0, 256, shape, dtype=np.uint8)
            self.targets, self.labels = list(range(n)), np.arange(n, dtype=np.uint8)
            sources.append(self)

    sources = []
    monkeypatch.setattr(datasets.torchvision.datasets, kind, Source)
    loaded = load_dataset(name, tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.num_classes) == (30, 10, 100 if name == "cifar100" else 10)
    assert loaded.train.images.shape == (30, 3, 32, 32) and loaded.train.labels.tolist() == list(range(30))
    image = sources[1].data[4] if kind == "CIFAR100" else sources[1].data[4].transpose(1, 2, 0)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR), dtype=int)  # which antialiases
    assert np.abs(loaded.test.images[4].permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (urllib.error.URLError("Name or service not known"), "cannot be fetched .*Name or service not known"),
        (RuntimeError("File not found or corrupted."), "sent is not what was published .*corrupted"),
    ],
)
def test_a_download_that_fails_names_its_address(tmp_path, monkeypatch, error, said):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(InputError, match=f"--download.*https://www.cs.toronto.edu/.*{said}"):
        load_dataset("cifar100", tmp_path, download=True)


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_download(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "data_batch_3")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", refuse)
    for download in (False, True):
        with pytest.raises(PermissionError, match="data_batch_3"):
            load_dataset("cifar10", tmp_path, download=download)


def test_images_of_another_size_are_resized_once(tmp_path, monkeypatch):
    class Source(torchvision.datasets.CIFAR100):
        def __init__(self, root, download=False, train=True):
            calls.append(train)
            self.data, self.targets = np.full((4, 32, 32, 3), 50 + train, np.uint8), [1, 2, 3, 4]

    calls = []
    monkeypatch.setattr(datasets.torchvision.datasets, "CIFAR100", Source)
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"stands for the images")
    for _ in range(2):
        loaded = load_dataset("cifar100", tmp_path, image_size=64)
        assert loaded.train.images.shape == (4, 3, 64, 64) and (loaded.test.images == 50).all()
    assert calls == [True, False]


@pytest.mark.parametrize(("name", "file"), [("cifar100", "cifar-100-python"), ("stl10", "unlabeled_X.bin")])
def test_a_missing_published_set_is_named(tmp_path, name, file):
    with pytest.raises(InputError, match=f"{file}.*--download fetches it"):
        load_dataset(name, tmp_path)


@pytest.fixture
def cifar10(generator, monkeypatch):
    """60 images that stand in for CIFAR-10."""
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(60) % 10)
    whole = Dataset("cifar10", split, Split(images[:20], split.labels[:20]), 10, *datasets.CIFAR_CONSTANTS)
    monkeypatch.setattr(datasets, "load_published", lambda *_: whole)
    return whole


@pytest.fixture
def cifar5m(tmp_path):
    """Two published parts of 25,000 and 30 images; (folder, all of their images and labels)."""
    rng = np.random.default_rng(0)
    parts = [
        {"X": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), "Y": rng.integers(0, 10, n, dtype=np.int64)}
        for n in (25_000, 30)
    ]
    for i, part in enumerate(parts):
        np.savez(tmp_path / f"cifar5m_part{i}.npz", **part)
    return tmp_path, *(np.concatenate([part[key] for part in parts]) for key in "XY")


def test_cifar5m_is_cifar10_first_then_the_parts_in_order(cifar10, cifar5m):
    folder, images, labels = cifar5m
    for n in (25_065, None):  # 5 of the second part; all
        loaded = load_dataset("cifar5m", folder, subset=n, probed=cifar10).train
        count = (n or 25_090) - 60
        assert len(loaded) == 60 + count
        assert torch.equal(loaded.images[:60], cifar10.train.images)
        np.testing.assert_array_equal(loaded.images[60:].permute(0, 2, 3, 1), images[:count])
        np.testing.assert_array_equal(loaded.labels[60:], labels[:count])
    np.savez(folder / "cifar5m_part1.npz", X=images[25_000:], Y=labels[25_000:].astype(np.int32))  # any integers
    np.testing.assert_array_equal(load_dataset("cifar5m", folder, probed=cifar10).train.labels[60:], labels)


def test_below_cifar10s_size_cifar5m_is_a_balanced_part_of_it(cifar10, tmp_path):
    loaded = load_dataset("cifar5m", tmp_path, subset=30, probed=cifar10)
    assert torch.bincount(loaded.train.labels).tolist() == [3] * 10
    assert loaded.test is cifar10.test


def test_cifar5m_reads_only_what_is_asked_for(cifar10, cifar5m):
    folder, *_ = cifar5m
    (folder / "cifar5m_part1.npz").write_bytes((folder / "cifar5m_part1.npz").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"cifar5m_part1\.npz is damaged .*fetch it again"):
        load_dataset("cifar5m", folder, subset=100, probed=cifar10)
    (folder / "cifar5m_part1.npz").unlink()
    assert len(load_dataset("cifar5m", folder, subset=100, probed=cifar10).train) == 100
    with pytest.raises(InputError, match="--subset 25061: .* have 25060 images"):
        load_dataset("cifar5m", folder, subset=25_061, probed=cifar10)


def test_of_a_part_only_the_rows_asked_for_are_read(cifar10, cifar5m, monkeypatch):
    given, read = [], datasets.zipfile.ZipExtFile.read

    def counted(file, n=-1):
        given.append(len(data := read(file, n)))
        return data

    monkeypatch.setattr(datasets.zipfile.ZipExtFile, "read", counted)
    assert len(load_dataset("cifar5m", cifar5m[0], subset=160, probed=cifar10).train) == 160
    assert 100 * 3080 <= sum(given) < 100 * 3080 + 5000  # 100 images and labels, and headers; the part has 25,000


def test_a_part_that_does_not_fit_the_others_is_named(cifar10, cifar5m):
    folder, images, labels = cifar5m
    first, second = (folder / f"cifar5m_part{i}.npz" for i in (0, 1))
    np.savez(second, X=images[:30], Y=labels[:29])
    with pytest.raises(InputError, match=r"cifar5m_part1\.npz is damaged: it holds 30 images and 29 labels"):
        load_dataset("cifar5m", folder, probed=cifar10)
    np.savez(second, X=images[:30], Y=labels[:30] + 10)
    with pytest.raises(InputError, match=r"cifar5m_part1\.npz is damaged: a label is not one of"):
        load_dataset("cifar5m", folder, probed=cifar10)
    np.savez(second, X=images[:30].astype(np.uint16), Y=labels[:30])
    with pytest.raises(InputError, match="X is of shape .* and type uint16"):
        load_dataset("cifar5m", folder, probed=cifar10)
    second.rename(folder / "cifar5m_part2.npz")  # of parts 0 and 2, the order is not known
    with pytest.raises(InputError, match=r"up to cifar5m_part0\.npz, have 25060 images"):
        load_dataset("cifar5m", folder, subset=25_061, probed=cifar10)
    first.unlink()
    with pytest.raises(InputError, match="no cifar5m_part0.npz"):
        load_dataset("cifar5m", folder, subset=100, probed=cifar10)


def test_what_is_not_cifar5m_is_named(cifar10, tmp_path):
    with pytest.raises(InputError, match="no cifar5m_part0.npz"):
        load_dataset("cifar5m", tmp_path, subset=100, probed=cifar10)
    np.savez(tmp_path / "cifar5m_part0.npz", X=np.zeros((5, 3, 32, 32), np.uint8), Y=np.zeros(5, np.int64))
    with pytest.raises(InputError, match=r"cifar5m_part0\.npz is damaged or not a part of CIFAR-5M \(X is of shape"):
        load_dataset("cifar5m", tmp_path, subset=61, probed=cifar10)
    np.savez(tmp_path / "cifar5m_part0.npz", X=np.zeros((5, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match="Y.npy"):
        load_dataset("cifar5m", tmp_path, subset=61, probed=cifar10)


def test_noise_is_standard_normal_after_normalisation_and_always_the_same(cifar10):
    noise, again = (load_dataset("noise", subset=n, probed=cifar10) for n in (None, 60))
    assert torch.equal(noise.train.images, again.train.images)
    assert noise.train.images.shape == (60, 3, 32, 32)
    x = normalize(noise.train.images, noise.mean, noise.std)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1  # not cut off
    assert noise.test is cifar10.test
    assert not torch.equal(noise.train.images[0], noise.train.images[1])


def test_unlabelled_images_are_resized_once(tmp_path, cifar10, monkeypatch):
    rng = np.random.default_rng(0)

    class Source(torchvision.datasets.STL10):
        def __init__(self, root, download=False, split="train"):
            calls.append(split)
            self.data, self.labels = rng.integers(0, 256, (12, 3, 96, 96), dtype=np.uint8), np.full(12, -1, np.int8)

    calls = []
    monkeypatch.setattr(datasets.torchvision.datasets, "STL10", Source)
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").write_bytes(b"stands for the images")
    first, again = (load_dataset("stl10-unlabelled", tmp_path, probed=cifar10) for _ in range(2))
    assert calls == ["unlabeled"]
    assert torch.equal(first.train.images, again.train.images)
    assert first.train.images.shape == (12, 3, 32, 32)
    assert first.train.labels.tolist() == [-1] * 12
    assert first.test is cifar10.test


def test_whichever_byte_of_a_part_is_changed_the_file_is_named_or_its_rows_are_read(tmp_path):
    """Of a small one: most of its bytes are the zip's and numpy's headers, each with an exception of its own."""
    part, rows = tmp_path / "part.npz", np.arange(700) % 10
    np.savez(part, Y=rows)
    whole, refused = part.read_bytes(), 0
    for i in [*range(300), *range(300, len(whole) - 200, 97), *range(len(whole) - 200, len(whole))]:
        for changed in {whole[i] ^ 255, whole[i] ^ 1, 14}:  # 14: a way of compression
            part.write_bytes(whole[:i] + bytes([changed]) + whole[i + 1 :])
            found = np.empty(700, np.int64)
            try:
                datasets._read_npz(part, "Y", found)
                assert (found == rows).all(), i
            except InputError as error:
                assert str(part) in str(error)
                refused += 1
    assert refused > 300
