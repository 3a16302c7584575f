"""The blocked last layer against the plain one: same loss and gradients, at every boundary."""

import math

import pytest
import torch
import torch.nn.functional as F

from rtd import last_layer, losses
from rtd.last_layer import Workspace, last_layer_loss, output_log_mean_exp

PLAIN = {"ce": losses.cross_entropy, "kl": losses.kl_divergence, "mse": losses.mean_squared_error}


def inputs(generator, dtype, batch=7, dim=16, outputs=333):
    z, z_t, weight, weight_t = (
        torch.randn(n, dim, generator=generator, dtype=dtype)
        for n in (batch, batch, outputs, outputs)
    )
    z, weight = F.normalize(z).requires_grad_(), weight.mul_(0.02).requires_grad_()
    return z, weight, F.normalize(z_t), F.normalize(weight_t)


@pytest.mark.parametrize("block", [1, 100, 111, 333, 1000])
@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("kind", last_layer.LOSSES)
def test_loss_and_gradients_equal_the_plain_ones(generator, monkeypatch, kind, weight_norm, block):
    """In float64, to rounding, whatever the gradient that comes from above."""
    monkeypatch.setattr(last_layer, "BLOCK", block)
    z, weight, z_t, weight_t = inputs(generator, torch.float64)
    s, t = F.linear(z, F.normalize(weight) if weight_norm else weight), F.linear(z_t, weight_t)
    plain = PLAIN[kind](s, t).mean()
    options = {"kind": kind, "weight_norm": weight_norm, "diagnostics": True}
    result = last_layer_loss(z, weight, z_t, weight_t, **options)
    (3 * result.loss).backward()
    expected = torch.autograd.grad(3 * plain, (z, weight))
    for grad, reference in zip((z.grad, weight.grad), expected, strict=True):
        assert (grad - reference).abs().max() <= 1e-12 * reference.abs().max() + 1e-15
    means = losses.kl_divergence(s, t).mean(), losses.entropy(t).mean(), losses.entropy(s).mean()
    for found, expected in zip(result, (plain, *means), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_float32_gradients_agree_with_float64_to_1e5(generator, monkeypatch, capability):
    """With products of matrices and with convolutions, whatever this processor would be given."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    z, weight, z_t, weight_t = inputs(generator, torch.float64, batch=8, dim=32, outputs=5000)
    last_layer_loss(z, weight, z_t, weight_t).loss.backward()
    z32, weight32 = (x.detach().float().requires_grad_() for x in (z, weight))
    last_layer_loss(z32, weight32, z_t.float(), weight_t.float()).loss.backward()
    for grad, reference in ((z32.grad, z.grad), (weight32.grad, weight.grad)):
        assert (grad - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_a_workspace_diagnostics_and_no_gradients_change_nothing(generator):
    z, weight, *teacher = inputs(generator, torch.float32)
    used, found = Workspace(), []
    for name in ("logits", "gradient"):
        used.empty(name, (333 * 7 + 5,), z).fill_(torch.nan)
        assert used.empty(name, (333 * 7,), z.double()).dtype == torch.float64
    for options in ({"diagnostics": True}, {}, {"workspace": used}):
        z.grad = weight.grad = None
        result = last_layer_loss(z, weight, *teacher, **options)
        result.loss.backward()
        found.append((result, z.grad, weight.grad.clone()))
    first, *gradients = found[0]
    for result, *others in found[1:]:
        assert all(map(torch.equal, others, gradients)) and torch.equal(result.loss, first.loss)
    with torch.no_grad():
        quiet = last_layer_loss(z, weight, *teacher, diagnostics=True)
    assert not quiet.loss.requires_grad and all(map(torch.equal, quiet, first))


def test_what_backward_does_not_compute_is_refused(generator):
    z, weight, *teacher = inputs(generator, torch.float32)
    loss = last_layer_loss(z, weight, *teacher).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, z, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once"):
        loss.backward()


def test_log_mean_exp_by_blocks_survives_large_logits(generator, monkeypatch):
    monkeypatch.setattr(last_layer, "BLOCK", 7)
    z = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weight = 500 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    expected = torch.logsumexp(F.linear(z, weight), 1) - math.log(50)
    torch.testing.assert_close(output_log_mean_exp(z, weight, torch.float64), expected)


@pytest.mark.parametrize(("kl", "tolerance"), [(1e-6, 0.05), (1e-4, 0.02)])
def test_bf16_products_keep_a_small_kl_and_its_gradient(generator, kl, tolerance):
    """bf16 rounds logits of deviation 1/16 by about 1e-4; a KL of 1e-6 has differences of 1e-3."""
    z_t, noise, weight_t = (
        F.normalize(torch.randn(n, 256, generator=generator)) for n in (16, 16, 2**14)
    )
    z = F.normalize(z_t + 16 * (2 * kl) ** 0.5 * noise).requires_grad_()
    weight = weight_t.clone().requires_grad_()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        result = last_layer_loss(z, weight, z_t, weight_t, dtype=dtype, diagnostics=True)
        found[dtype] = (result.kl.item(), torch.autograd.grad(result.loss, z)[0].flatten())
    (exact, exact_grad), (rounded, rounded_grad) = found.values()
    z, z_t, weight = (x.detach().double() for x in (z, z_t, weight))
    truth = losses.kl_divergence(z @ weight.T, z_t @ weight.T).mean().item()
    assert exact == pytest.approx(truth, rel=1e-3) and 0.8 * kl < truth < 1.2 * kl
    assert rounded == pytest.approx(exact, rel=tolerance)
    assert F.cosine_similarity(exact_grad, rounded_grad, dim=0) > 0.99
