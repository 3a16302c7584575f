"""Images in memory: normalisation, resizing, class-balanced subsets."""

import numpy as np
import pytest
import torch

from rtd import data


def test_normalize_is_pixels_over_255_minus_mean_over_std(generator):
    images = torch.randint(256, (50, 3, 6, 7), dtype=torch.uint8, generator=generator)
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3, 0.4])
    expected = (images.numpy() / 255 - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    found = data.normalize(images, tuple(mean), tuple(std))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(data.normalize(found, tuple(mean), tuple(std)), found)  # is normalised
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images.numpy() / 255).mean((0, 2, 3)))
    np.testing.assert_allclose(std, (images.numpy() / 255).std((0, 2, 3)))


@pytest.mark.parametrize("n", [1, 7, 10, 33, 150, 199, 200])
def test_subset_is_balanced_as_far_as_the_classes_reach(n, generator):
    labels = torch.tensor([0] * 100 + [1] * 60 + [2] * 40)
    index = data.balanced_subset(labels, n, generator)
    assert len(index.unique()) == n
    assert torch.equal(index, index.sort().values)
    counts = torch.bincount(labels[index], minlength=3)
    short = counts < torch.tensor([100, 60, 40])
    if short.any():  # classes with images left differ by one at most, and no exhausted one has more
        assert counts[short].max() - counts[short].min() <= 1
        assert (counts[~short] <= counts[short].max()).all()


def test_smaller_subsets_lie_in_larger_ones_and_draws_differ(generator):
    def draw(n, seed):
        labels = torch.arange(100) % 10
        return set(data.balanced_subset(labels, n, generator.manual_seed(seed)).tolist())

    assert draw(20, 0) < draw(50, 0)
    assert draw(20, 0) != draw(20, 1)


def test_what_is_taken_keeps_its_labels_and_is_always_the_same():
    labels = torch.arange(100) % 10
    split = data.Split(labels.view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels)
    some = data.take(split, 20, "train")
    assert torch.bincount(some.labels).tolist() == [2] * 10
    assert torch.equal(some.images[:, 0, 0, 0], some.labels)
    assert torch.equal(some.images, data.take(split, 20, "train").images)
    assert data.take(split, None, "train") is split
