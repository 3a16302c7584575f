"""Images in memory: the digits, normalisation, class-balanced subsets."""

import numpy as np
import pytest
import torch

from rtd import data
from rtd.datasets import load_dataset
from rtd.errors import InputError


def test_digits_are_three_equal_channels_of_32x32_in_ten_classes():
    digits = load_dataset("digits")
    assert digits.train.images.shape == (1347, 3, 32, 32)
    assert digits.test.images.shape == (450, 3, 32, 32)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255
    assert torch.equal(digits.train.images[:, 0], digits.train.images[:, 2])
    counts = torch.bincount(digits.test.labels)
    assert len(counts) == digits.num_classes == 10
    assert counts.min() >= 43


def test_digits_splits_share_no_image():
    digits = load_dataset("digits")
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
        load_dataset("digits", **{flag: n})
