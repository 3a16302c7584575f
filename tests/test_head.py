"""Projection head and l2-bottleneck against numpy in float64."""

import numpy as np
import torch
from scipy.special import erf

from rtd.head import L2Bottleneck, ProjectionHead
from rtd.init import init_head_
from rtd.models import parameter_count


def float64_head(generator, **options):
    with torch.device("meta"):
        module = ProjectionHead(12, 20, 6, 40, **options)
    module = init_head_(module.to_empty(device="cpu").double(), generator)
    for parameter in module.parameters():  # biases and larger weights, so that every term shows
        parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return module


def numpy_head(state, x, weight_norm=True):
    def linear(name, x):
        return x @ state[f"{name}.weight"].numpy().T + state[f"{name}.bias"].numpy()

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    h = gelu(linear("mlp.2", gelu(linear("mlp.0", x))))
    z = linear("l2_bottleneck.linear", h)
    z = z / np.sqrt((z**2).sum(1, keepdims=True))
    v = state["l2_bottleneck.last_layer.weight"].numpy().T  # the paper's V: (bottleneck, outputs)
    if weight_norm:
        v = v / np.sqrt((v**2).sum(0, keepdims=True))
    return z, z @ v


def test_head_equals_numpy(generator):
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    for weight_norm in (True, False):
        module = float64_head(generator, weight_norm=weight_norm)
        z, y = numpy_head(module.state_dict(), x.numpy(), weight_norm)
        with torch.no_grad():
            np.testing.assert_allclose(module(x), y, rtol=1e-12)
            np.testing.assert_allclose(module.bottleneck(x), z, rtol=1e-12)


def test_outputs_are_cosines_and_the_norm_of_v_does_not_matter(generator):
    module = float64_head(generator)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
        assert before.abs().max() <= 1 + 1e-12
        module.l2_bottleneck.last_layer.weight.mul_(7)
        torch.testing.assert_close(module(x), before)
        torch.testing.assert_close(module.l2_bottleneck.normalized_weight().norm(dim=1), torch.ones(40, dtype=torch.float64))


def test_weight_norm_takes_part_in_the_gradient(generator):
    """True weight normalisation: no gradient along a row of V, which would only change its norm."""
    module = float64_head(generator)
    module(torch.randn(5, 12, generator=generator, dtype=torch.float64)).square().sum().backward()
    weight = module.l2_bottleneck.last_layer.weight
    assert (weight * weight.grad).sum(1).abs().max() < 1e-9
    assert weight.grad.abs().max() > 1e-3


def test_papers_head_has_22548736_parameters():
    with torch.device("meta"):
        assert parameter_count(ProjectionHead(512)) == 22_548_736
        assert parameter_count(L2Bottleneck(2048, 256, 2**16)) == 2048 * 256 + 256 + 256 * 2**16
