"""Global magnitude pruning: which weights a lottery ticket keeps (section 6, Fig. 8, App. E.5).

A mask holds one bool for each weight that may be pruned: True is kept. Each round prunes
the fraction k of what is left, the smallest in magnitude over all layers together, so that after r
rounds

    p_r = sum_{i<r} (1 - k)^i k = 1 - (1 - k)^r

are pruned. The weights of all convolutions and linear layers may be pruned, as in Frankle et al.'s
code, but not biases and batch norm. The authors of the paper prune every parameter tensor ("all").
Masks are multiplied into the weights, so a pruned network costs what a dense one costs.
"""

import torch

from rtd.init import random_stream

PRUNE = ("weights", "all")


def prunable(model, prune="weights"):
    """{name: parameter} of what may be pruned in ``model``, in its order; prune: of ``PRUNE``."""
    return {
        name: p
        for name, p in model.named_parameters()
        if prune == "all" or (p.ndim > 1 and name.endswith("weight"))
    }


def dense_masks(weights):
    """Masks that keep all of ``weights`` (a dict of tensors)."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def remaining(masks):
    """How many weights ``masks`` keep."""
    return sum(int(mask.sum()) for mask in masks.values())


def kept_after(total, fraction, rounds):
    """How many weights are left after ``rounds`` rounds: total (1 - k)^r, rounded once."""
    return round(total * (1 - fraction) ** rounds)


@torch.no_grad()
def prune_smallest(masks, weights, keep):
    """New masks, which keep the largest ``keep`` of the weights that ``masks`` keep.

    masks, weights: tensors of the same shapes by the same names, on one device. Of equal magnitudes
    the first are pruned, in the dict's and in row-major order. Raises ValueError for a ``keep``
    below 0 or above what is left.
    """
    magnitudes = torch.cat([weight[masks[name]] for name, weight in weights.items()]).abs()
    if not 0 <= keep <= len(magnitudes):
        raise ValueError(f"{keep} weights cannot be kept: {len(magnitudes)} are left")
    kept = torch.zeros_like(magnitudes, dtype=torch.bool)
    kept[magnitudes.argsort(stable=True)[len(kept) - keep :]] = True
    parts = kept.split([int(masks[name].sum()) for name in weights])
    return {n: masks[n].masked_scatter(masks[n], p) for n, p in zip(weights, parts, strict=True)}


def random_masks(kept, weights, seed, round_):
    """The control: masks that keep ``kept[name]`` weights of a layer at random places.

    Masks of two rounds are unrelated: a pruned weight may return.
    """
    masks = {}
    for name, weight in weights.items():
        generator = random_stream(seed, "shuffle", round_, name)
        order = torch.randperm(weight.numel(), generator=generator)
        masks[name] = (order < kept[name]).view(weight.shape).to(weight.device)
    return masks


@torch.no_grad()
def apply_masks_(weights, masks):
    """Set what ``masks`` prune of ``weights`` to exactly 0, in place: after every optimizer step.

    Whatever momentum and weight decay made of a pruned weight is undone before it is used.
    """
    for name, weight in weights.items():
        weight.mul_(masks[name])
