"""Image files: class folders and TinyImageNet, decoded once into a cache."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from rtd import decoded
from rtd.datasets import load_dataset
from rtd.errors import InputError


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
    loaded = load_dataset("folder", tree)
    assert loaded.num_classes == 2
    assert loaded.train.images.shape == (6, 3, 32, 32)
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]
    shades = loaded.train.images.float().mean((1, 2, 3))
    assert (shades[:3] < 80).all()
    assert (shades[3:] > 160).all()
    np.testing.assert_allclose(loaded.mean, (loaded.train.images.numpy() / 255).mean((0, 2, 3)))


def test_folder_is_decoded_once_and_again_when_a_file_changes(tree, monkeypatch):
    first = load_dataset("folder", tree)
    read = []
    decode = decoded._decode
    monkeypatch.setattr(decoded, "_decode", lambda path, size: read.append(path) or decode(path, size))
    assert torch.equal(load_dataset("folder", tree).train.images, first.train.images)
    assert read == []
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tree / "val" / "bee" / "0.jpg")
    again = load_dataset("folder", tree)
    assert len(read) == 4  # the split that changed
    assert again.test.images[2, 0].float().mean() > 240
    whole = (tree / ".rtd-train-32.npz").read_bytes()
    for damaged in (b"damaged", whole[:-50], whole[:100], whole[:2000] + b"x" * 100 + whole[2100:], b""):
        (tree / ".rtd-train-32.npz").write_bytes(damaged)
        assert torch.equal(load_dataset("folder", tree).train.images, first.train.images)


def test_whichever_byte_of_a_cache_is_changed_it_is_made_anew(tmp_path):
    """All of the zip's and numpy's headers, each with an exception of its own, and some of the images' bytes."""
    split = decoded.Split(torch.arange(5880).to(torch.uint8).view(10, 3, 14, 14), torch.arange(10))
    source, cache = tmp_path / "source", tmp_path / "cache.npz"
    source.touch()
    decoded.cached(cache, [source], 14, lambda: split)
    whole = cache.read_bytes()
    for i in [*range(300), *range(300, 5900, 97), *range(5900, len(whole))]:
        for changed in {whole[i] ^ 255, whole[i] ^ 1}:
            cache.write_bytes(whole[:i] + bytes([changed]) + whole[i + 1 :])
            found = decoded.cached(cache, [source], 14, lambda: split)
            assert torch.equal(found.images, split.images) and torch.equal(found.labels, split.labels), i


def test_a_cache_with_a_pickle_in_it_is_not_opened(tree):
    load_dataset("folder", tree)
    marker = tree / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    with open(tree / ".rtd-train-32.npz", "wb") as file:
        np.savez(file, images=np.array([Payload()], dtype=object), labels=np.zeros(1), fingerprint="x")
    load_dataset("folder", tree)
    assert not marker.exists()


def test_folder_mistakes_are_named(tree):
    (tree / "train" / "ant" / "2.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"2\.png does not decode"):
        load_dataset("folder", tree)
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(tree / "train" / "ant" / "2.png")
    with pytest.raises(InputError, match=r"2\.png has more than 8 bits a channel"):
        load_dataset("folder", tree)
    (tree / "train" / "cat").mkdir()
    with pytest.raises(InputError, match="do not have the same class folders"):
        load_dataset("folder", tree)
    (tree / "val" / "cat").mkdir()
    with pytest.raises(InputError, match=r"no image .* in the class folder .*cat"):
        load_dataset("folder", tree)
    with pytest.raises(InputError, match="train and test"):
        load_dataset("folder", tree / "train")


@pytest.fixture
def tiny_imagenet(tmp_path, generator):
    """Two classes in the published layout, 64x64 JPEGs: three training images each, four for validation."""
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n02\nn01\n")
    for name, shade in (("n01", 40), ("n02", 200)):
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (shade, shade, 0)).save(root / "train" / name / "images" / f"{name}_{i}.JPEG")
    lines = []
    for i, (name, shade) in enumerate([("n02", 200), ("n01", 40), ("n02", 200), ("n02", 200)]):
        Image.new("RGB", (64, 64), (shade, shade, 0)).save(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("size", [32, 64])
def test_tinyimagenet_is_read_as_it_is_published(tiny_imagenet, size):
    before = sorted(path for path in tiny_imagenet.rglob("*") if path.is_file())
    for root in (tiny_imagenet, tiny_imagenet / "tiny-imagenet-200"):
        loaded = load_dataset("tinyimagenet", root, image_size=size)
        assert loaded.train.images.shape == (6, 3, size, size)
        assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert loaded.test.labels.tolist() == [1, 0, 1, 1]
        assert loaded.mean == (0.485, 0.456, 0.406)
        dark = loaded.test.images[:, 0].float().mean((1, 2)) < 100
        assert dark.tolist() == [False, True, False, False]
    after = sorted(path for path in tiny_imagenet.rglob("*") if path.is_file())
    assert [path.name for path in after if path not in before] == [f".rtd-train-{size}.npz", f".rtd-val-{size}.npz"]


def test_tinyimagenets_labels_are_read_again_when_the_annotations_change(tiny_imagenet):
    load_dataset("tinyimagenet", tiny_imagenet)
    annotations = tiny_imagenet / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("val_0.JPEG\tn02", "val_0.JPEG\tn01"))
    assert load_dataset("tinyimagenet", tiny_imagenet).test.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, b"BM" + b"\xff" * 60, b"P6 99999 99999 255 ", b""])
def test_whatever_pil_raises_names_the_file(tree, content):
    (tree / "train" / "ant" / "2.png").write_bytes(content)
    with pytest.raises(InputError, match=r"2\.png does not decode"):
        load_dataset("folder", tree)


def test_what_tinyimagenet_lacks_is_named(tiny_imagenet):
    root = tiny_imagenet / "tiny-imagenet-200"
    (root / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(InputError, match=r"val_annotations.txt, line 3: .*val_2.JPEG is missing"):
        load_dataset("tinyimagenet", tiny_imagenet)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG n02\n")
    with pytest.raises(InputError, match="line 1: expected are a file name, a tab and one of the 2 classes"):
        load_dataset("tinyimagenet", tiny_imagenet)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(InputError, match="val_annotations.txt is missing; .*tiny-imagenet-200.zip"):
        load_dataset("tinyimagenet", tiny_imagenet)
    (root / "val" / "val_annotations.txt").touch()
    (root / "val" / "val_annotations.txt").write_bytes(b"val_0.JPEG\t\xff\xfe")
    with pytest.raises(InputError, match="val_annotations.txt is damaged: it is not a text file"):
        load_dataset("tinyimagenet", tiny_imagenet)
    (root / "wnids.txt").write_text("n01\nn02\nn03\n")
    with pytest.raises(InputError, match="the class n03 is only in one of .*wnids.txt"):
        load_dataset("tinyimagenet", tiny_imagenet)
