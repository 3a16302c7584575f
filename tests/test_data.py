"""Data sets: shapes, normalisation, class-balanced subsets, folders of images and their cache."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rtd import data
from rtd.errors import InputError

CIFAR10 = Path(os.environ.get("RTD_DATA_DIR", Path(__file__).resolve().parent.parent / "data"))
needs_cifar10 = pytest.mark.skipif(
    not (CIFAR10 / "cifar-10-batches-py").is_dir(), reason=f"CIFAR-10 is not in {CIFAR10} (set RTD_DATA_DIR)"
)


def test_digits_are_three_equal_channels_of_32x32_in_ten_classes():
    digits = data.load_dataset("digits")
    assert digits.train.images.shape == (1347, 3, 32, 32)
    assert digits.test.images.shape == (450, 3, 32, 32)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255
    assert torch.equal(digits.train.images[:, 0], digits.train.images[:, 2])
    counts = torch.bincount(digits.test.labels)
    assert len(counts) == digits.num_classes == 10
    assert counts.min() >= 43


def test_digits_splits_share_no_image():
    digits = data.load_dataset("digits")
    train = {image.numpy().tobytes() for image in digits.train.images}
    assert not [1 for image in digits.test.images if image.numpy().tobytes() in train]


def test_normalize_is_pixels_over_255_minus_mean_over_std(generator):
    images = torch.randint(256, (5, 3, 6, 7), dtype=torch.uint8, generator=generator)
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3, 0.4])
    expected = (images.numpy() / 255 - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    found = data.normalize(images, tuple(mean), tuple(std))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_channel_statistics_are_numpys(generator):
    images = torch.randint(256, (50, 3, 6, 7), dtype=torch.uint8, generator=generator)
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images.numpy() / 255).mean((0, 2, 3)))
    np.testing.assert_allclose(std, (images.numpy() / 255).std((0, 2, 3)))


@pytest.mark.parametrize("n", [1, 7, 10, 33, 150, 199, 200])
def test_subset_is_balanced_as_far_as_the_classes_reach(n):
    labels = torch.tensor([0] * 100 + [1] * 60 + [2] * 40)
    index = data.balanced_subset(labels, n, torch.Generator().manual_seed(1))
    assert len(index.unique()) == n
    assert torch.equal(index, index.sort().values)
    counts = torch.bincount(labels[index], minlength=3)
    have = torch.tensor([100, 60, 40])
    short = counts < have
    if short.any():  # classes with images left differ by one at most, and no exhausted class has more
        assert counts[short].max() - counts[short].min() <= 1
        assert (counts[~short] <= counts[short].max()).all()


def test_smaller_subsets_lie_in_larger_ones_and_draws_differ():
    labels = torch.arange(100) % 10

    def draw(n, seed):
        return set(data.balanced_subset(labels, n, torch.Generator().manual_seed(seed)).tolist())

    assert draw(20, 0) < draw(50, 0)
    assert draw(20, 0) != draw(20, 1)


@pytest.mark.parametrize(("flag", "n"), [("subset", 1348), ("test_subset", 451)])
def test_subset_larger_than_the_data_is_refused(flag, n):
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} {n}"):
        data.load_dataset("digits", **{flag: n})


@pytest.fixture
def tree(tmp_path, generator):
    """train/ and val/ with classes ant and bee: 3 and 2 images each, of several sizes and modes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for shade, name in ((40, "ant"), (200, "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(shade - 30, shade + 30, (40 + 10 * i, 60, 3), dtype=np.uint8)
                image = Image.fromarray(pixels)
                (image.convert("L") if i == 2 else image).save(tmp_path / split / name / f"{i}.{'png' if i else 'jpg'}")
    return tmp_path


def test_folder_reads_class_trees(tree):
    loaded = data.load_dataset("folder", tree)
    assert loaded.num_classes == 2
    assert loaded.train.images.shape == (6, 3, 32, 32)
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]
    shades = loaded.train.images.float().mean((1, 2, 3))
    assert (shades[:3] < 80).all()
    assert (shades[3:] > 160).all()
    np.testing.assert_allclose(loaded.mean, (loaded.train.images.numpy() / 255).mean((0, 2, 3)))


def test_folder_is_decoded_once_and_again_when_a_file_changes(tree, monkeypatch):
    first = data.load_dataset("folder", tree)
    decoded = []
    decode = data._decode
    monkeypatch.setattr(data, "_decode", lambda path, size: decoded.append(path) or decode(path, size))
    assert torch.equal(data.load_dataset("folder", tree).train.images, first.train.images)
    assert decoded == []
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tree / "val" / "bee" / "0.jpg")
    again = data.load_dataset("folder", tree)
    assert len(decoded) == 4  # the split that changed
    assert again.test.images[2, 0].float().mean() > 240
    (tree / ".rtd-train-32.npz").write_bytes(b"damaged")
    assert torch.equal(data.load_dataset("folder", tree).train.images, first.train.images)


def test_a_cache_with_a_pickle_in_it_is_not_opened(tree):
    data.load_dataset("folder", tree)
    marker = tree / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    with open(tree / ".rtd-train-32.npz", "wb") as file:
        np.savez(file, images=np.array([Payload()], dtype=object), labels=np.zeros(1), fingerprint="x")
    data.load_dataset("folder", tree)
    assert not marker.exists()


def test_folder_mistakes_are_named(tree):
    (tree / "train" / "ant" / "2.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"2\.png does not decode"):
        data.load_dataset("folder", tree)
    (tree / "train" / "cat").mkdir()
    with pytest.raises(InputError, match="do not have the same class folders"):
        data.load_dataset("folder", tree)
    (tree / "val" / "cat").mkdir()
    with pytest.raises(InputError, match=r"no image .* in the class folder .*cat"):
        data.load_dataset("folder", tree)
    with pytest.raises(InputError, match="train and test"):
        data.load_dataset("folder", tree / "train")


@needs_cifar10
def test_cifar10_through_torchvision():
    loaded = data.load_dataset("cifar10", CIFAR10, subset=1000, test_subset=100)
    assert torch.bincount(loaded.train.labels).tolist() == [100] * 10
    whole = data.load_published("cifar10", CIFAR10)
    assert whole.train.images.shape == (50_000, 3, 32, 32)
    np.testing.assert_allclose(data.channel_statistics(whole.train.images)[0], whole.mean, atol=1e-4)


def test_missing_or_damaged_cifar10_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder; --download"):
        data.load_dataset("cifar10", tmp_path / "nowhere")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    with pytest.raises(InputError, match="data_batch_1 to data_batch_5"):
        data.load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("cifar100", "CIFAR100"), ("stl10", "STL10")])
def test_published_sets_are_read_as_torchvision_gives_them(tmp_path, monkeypatch, name, kind):
    """What torchvision's classes hold, which are replaced here: the images of one are channels-last, of the other 96x96."""
    rng = np.random.default_rng(0)

    class Source:
        def __init__(self, root, download=False, **part):
            n = 30 if part in ({"train": True}, {"split": "train"}) else 10
            assert root == tmp_path and part in ({"train": n == 30}, {"split": "train" if n == 30 else "test"})
            shape = (n, 32, 32, 3) if kind == "CIFAR100" else (n, 3, 96, 96)
            self.data = rng.integers(0, 256, shape, dtype=np.uint8)
            self.targets, self.labels = list(range(n)), np.arange(n, dtype=np.uint8)
            sources.append(self)

    sources = []
    monkeypatch.setattr(data.torchvision.datasets, kind, Source)
    loaded = data.load_dataset(name, tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.num_classes) == (30, 10, 100 if name == "cifar100" else 10)
    assert loaded.train.images.shape == (30, 3, 32, 32) and loaded.train.labels.tolist() == list(range(30))
    image = sources[1].data[4] if kind == "CIFAR100" else sources[1].data[4].transpose(1, 2, 0)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR), dtype=int)  # which antialiases
    assert np.abs(loaded.test.images[4].permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize(("name", "file"), [("cifar100", "cifar-100-python"), ("stl10", "train_X.bin")])
def test_a_missing_published_set_is_named(tmp_path, name, file):
    with pytest.raises(InputError, match=f"{file}.*--download fetches it"):
        data.load_dataset(name, tmp_path)
