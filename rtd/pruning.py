"""Global magnitude pruning: which weights a lottery ticket keeps (section 6, Fig. 8, App. E.5).

A mask holds one bool for each weight that may be pruned: True is kept. Each round takes the
fraction k of what is left, the smallest in magnitude over all layers together, so that after r
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
    """How many of ``total`` weights ``rounds`` rounds leave: total (1 - k)^r, rounded once."""
    return round(total * (1 - fraction) ** rounds)


@torch.no_grad()
def prune_smallest(masks, weights, count):
    """New masks, in which exactly ``count`` of the weights kept so far, the smallest, are pruned.

    masks, weights: tensors of the same shapes by the same names. Of equal magnitudes the first go,
    in the dict's and in row-major order. Raises ValueError for more than is left.
    """
    if odd := masks.keys() ^ weights.keys():
        raise ValueError(f"masks and weights have different names: {sorted(odd)}")
    if not 0 <= count <= remaining(masks):
        raise ValueError(f"{count} weights cannot be pruned: {remaining(masks)} are left")
    magnitudes = torch.cat([weight.flatten() for weight in weights.values()]).abs()
    flat = torch.cat([masks[name].flatten() for name in weights]).to(magnitudes.device)
    left = flat.nonzero().squeeze(1)  # positions of the weights kept so far
    flat[left[magnitudes[left].argsort(stable=True)[:count]]] = False
    # each in memory of its own: pickle would send all of ``flat`` with every view
    parts = map(torch.clone, flat.split([weight.numel() for weight in weights.values()]))
    return {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}


def shuffled(kept, weights, seed, round_):
    """The control: masks that keep as many weights of a layer as ``kept`` says, anywhere in it."""
    masks = {}
    for name, weight in weights.items():
        generator = random_stream(seed, "shuffle", round_, name)
        order = torch.randperm(weight.numel(), generator=generator)
        masks[name] = (order < kept[name]).view(weight.shape).to(weight.device)
    return masks


class Masking:
    """Keeps the pruned weights of a network at exactly 0: to be called after every optimizer step.

    Whatever momentum and weight decay made of a pruned weight is undone before it is used. Masks
    are kept as factors of the weights' type and layout, so that a call is one pass over them.
    """

    @torch.no_grad()
    def __init__(self, weights, masks):
        """weights: {name: parameter}. masks: {name: bool tensor of its shape}, on any device."""
        if {k: mask.shape for k, mask in masks.items()} != {k: w.shape for k, w in weights.items()}:
            raise ValueError("the masks do not fit the weights")
        self._weights = list(weights.values())
        self._factors = [torch.empty_like(w).copy_(masks[name]) for name, w in weights.items()]

    @torch.no_grad()
    def __call__(self):
        torch._foreach_mul_(self._weights, self._factors)
