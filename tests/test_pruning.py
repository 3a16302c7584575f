"""Masks prune exactly as many as asked for, the smallest, for good; pruned weights stay 0."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rtd.init import init_encoder_
from rtd.models import materialize, parameter_count
from rtd.pruning import apply_masks_, dense_masks, kept_after, prunable, prune_smallest, remaining
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


def test_more_than_is_left_cannot_be_kept(generator):
    weights = some_weights(generator, (7, 3, 2), (11,), (5, 5))
    masks = prune_smallest(dense_masks(weights), weights, 8)
    for keep in (9, -1):
        with pytest.raises(ValueError, match="8 are left"):
            prune_smallest(masks, weights, keep)


def test_pruned_weights_are_zero_after_every_step_with_momentum_and_decay(generator):
    model = init_encoder_(materialize(classifier("resnet20")), generator)
    weights = prunable(model)
    masks = prune_smallest(dense_masks(weights), weights, 170_896)
    assert len(pickle.dumps(masks)) < 2 * 270_896, "each mask must have memory of its own"
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    options = {"momentum": 0.9, "weight_decay": 1e-4, "fused": True}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, **options)

    def step():
        optimizer.zero_grad()
        images = torch.randn(8, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (8,), generator=generator)
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()

    step()  # leaves momentum in all weights, as rewinding to a later epoch does
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(start[name])
    apply_masks_(weights, masks)
    assert all(torch.equal(weight, start[name] * masks[name]) for name, weight in weights.items())
    for _ in range(3):
        step()
        assert any((w[~masks[name]] != 0).any() for name, w in weights.items())  # it moves them
        apply_masks_(weights, masks)
        assert all((w[~masks[name]] == 0).all() for name, w in weights.items())
        assert all((w[masks[name]] != 0).any() for name, w in weights.items())
