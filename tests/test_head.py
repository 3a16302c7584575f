"""Projection head and l2-bottleneck against numpy in float64."""

import numpy as np
import pytest
import torch
from scipy.special import erf

from rtd.head import PAPER_SLOTS, L2Bottleneck, ProjectionHead
from rtd.init import init_head_
from rtd.models import materialize, parameter_count


def float64_head(generator, slots=PAPER_SLOTS):
    """A small head, and embeddings for it."""
    with torch.device("meta"):
        module = ProjectionHead(12, 20, 6, 40, slots)
    module = init_head_(materialize(module).double(), generator)
    for parameter in module.parameters():  # biases and larger weights, so that every term shows
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(noise, alpha=0.3)
    return module, torch.randn(5, 12, generator=generator, dtype=torch.float64)


def numpy_head(state, x, slots):
    """What the last layer of the head sees, and the head's outputs."""
    wn1, lin1, fn1, wn2, _, fn2 = slots.split("/")

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    def unit_rows(x):
        return x / np.sqrt((x**2).sum(1, keepdims=True))

    state = {name: value.numpy() for name, value in state.items()}
    z = x
    for name in ("mlp.0", "mlp.2"):
        z = gelu(z @ state[f"{name}.weight"].T + state[f"{name}.bias"])
    if lin1 != "-":
        w = state["l2_bottleneck.linear.weight"]
        z = z @ (unit_rows(w) if wn1 == "wn" else w).T
    if lin1 == "lb":
        z = z + state["l2_bottleneck.linear.bias"]
    if fn1 == "fn":
        z = unit_rows(z)
    v = state["l2_bottleneck.last_layer.weight"]
    y = z @ (unit_rows(v) if wn2 == "wn" else v).T
    norm = np.sqrt((y**2).sum(1, keepdims=True)) if fn2 == "fn" else 1.0
    return z / norm, y / norm


FIG_12 = """-/lb/fn/wn/l/- wn/lb/-/wn/l/- -/lb/fn/-/l/fn -/lb/-/-/l/fn -/lb/-/-/l/- -/-/-/-/l/fn
    -/-/-/-/l/-"""


@pytest.mark.parametrize("slots", [*FIG_12.split(), "-/lb/fn/-/l/-", "wn/l/fn/wn/l/fn"])
def test_each_head_equals_numpy_and_is_one_product_from_its_bottleneck(generator, slots):
    module, x = float64_head(generator, slots)
    last = module.l2_bottleneck
    assert last.last_layer.in_features == (20 if slots.split("/")[1] == "-" else 6)
    z, y = numpy_head(module.state_dict(), x.numpy(), slots)
    with torch.no_grad():
        np.testing.assert_allclose(module.bottleneck(x), z, rtol=1e-12)
        np.testing.assert_allclose(module(x), y, rtol=1e-12)
        np.testing.assert_allclose(module.bottleneck(x) @ last.normalized_weight().T, y, rtol=1e-11)


def test_papers_head_has_22548736_parameters():
    with torch.device("meta"):
        assert parameter_count(ProjectionHead(512)) == 22_548_736
        assert parameter_count(L2Bottleneck(2048, 256, 2**16)) == 2048 * 256 + 256 + 256 * 2**16
