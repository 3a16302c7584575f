"""Masks prune exactly as many as asked for, the smallest, for good; pruned weights stay 0."""

import numpy as np
import pytest
import torch

from rtd.models import parameter_count
from rtd.pruning import dense_masks, kept_after, prunable, prune_smallest, remaining
from rtd.supervised import empty_classifier


def some_weights(generator, *sizes):
    return {f"w{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}


def classifier(name):
    return empty_classifier({"encoder": name, "norm": None, "image_size": 32}, 10)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_what_may_be_pruned_are_convolutions_and_linear_layers_or_all():
    model = classifier("resnet18")
    weights, everything = prunable(model, "weights"), prunable(model, "all")
    assert all(name.endswith(".weight") and w.ndim in (2, 4) for name, w in weights.items())
    gains = 4_800  # and as many biases
    assert sum(w.numel() for w in weights.values()) == 11_168_832 + 512 * 10 - 2 * gains
    assert "fc.weight" in weights and "encoder.conv1.weight" in weights
    assert sum(w.numel() for w in everything.values()) == parameter_count(model)
    assert "fc.bias" in everything and "encoder.bn1.weight" in everything
    vit = classifier("vit-tiny")
    names = prunable(vit)
    assert sum(name.endswith("in_proj_weight") for name in names) == 12  # query, key and value too
    others = {k for k, p in vit.named_parameters() if k not in names and p.ndim > 1}
    assert others == {"encoder.class_token", "encoder.encoder.pos_embedding"}
    for network, found in ((model, weights), (model, everything), (vit, names)):
        assert all(weight is network.get_parameter(name) for name, weight in found.items())


@pytest.mark.parametrize("fraction", [0.2, 0.1, 0.37])
def test_after_r_rounds_the_pruned_fraction_is_the_papers(generator, fraction):
    """p_r is the sum of section 6 up to one weight; the largest stay, and masks only shrink."""
    weights = some_weights(generator, (101, 7), (333,))
    masks, total, pruned = dense_masks(weights), 1040, 0.0
    for r in range(1, 15):
        before = masks
        weights = some_weights(generator, (101, 7), (333,))  # "trained" anew
        masks = prune_smallest(before, weights, kept_after(total, fraction, r))
        pruned += (1 - fraction) ** (r - 1) * fraction
        assert abs(total - remaining(masks) - pruned * total) <= 1
        was, now, size = flat(before).numpy(), flat(masks).numpy(), flat(weights).abs().numpy()
        assert not np.any(now & ~was)
        assert size[now].min() >= size[was & ~now].max()  # over all tensors together
        assert [mask.shape for mask in masks.values()] == [w.shape for w in weights.values()]
        assert all(m.untyped_storage().nbytes() == m.numel() for m in masks.values())  # when saved


def test_ties_prune_no_more_than_asked_and_pruned_weights_are_not_counted_again():
    weights = {"w": torch.tensor([1.0, -1] * 5)}
    masks = prune_smallest(dense_masks(weights), weights, 8)
    assert masks["w"].tolist() == [False] * 2 + [True] * 8
    weights = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    masks = prune_smallest(dense_masks(weights), weights, 3)
    assert flat(masks).tolist() == [False] * 4 + [True] * 3
    assert flat(prune_smallest(masks, weights, 0)).tolist() == [False] * 7
    masks = {"w": torch.tensor([False, True, True, True])}
    weights = {"w": torch.tensor([0.0, 3.0, -2.0, 1.0])}
    assert prune_smallest(masks, weights, 2)["w"].tolist() == [False, True, True, False]
    assert masks["w"].tolist() == [False, True, True, True]  # the argument is left alone
    with pytest.raises(ValueError, match="3 are left"):
        prune_smallest(masks, weights, 4)
