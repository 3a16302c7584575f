"""Losses against float64 numpy, at the size and the smallness they are used at."""

import numpy as np
import pytest
import torch

from rtd import losses

M = 2**16


def numpy_losses(s, t):
    """All of them in float64, straight from the definitions."""
    s, t = np.asarray(s, dtype=np.float64), np.asarray(t, dtype=np.float64)
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (t, s))
    p, q = np.exp(log_p), np.exp(log_q)
    return {
        "ce": -(p * log_q).sum(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "ht": -(p * log_p).sum(-1),
        "hs": -(q * log_q).sum(-1),
        "mse": ((s - t) ** 2).mean(-1),
    }


def logits(generator, kl, batch=8):
    """Teacher logits as of cosines (deviation 1/16), and a student's at about the given KL."""
    t = torch.randn(batch, M, generator=generator, dtype=torch.float64) / 16
    d = torch.randn(batch, M, generator=generator, dtype=torch.float64) * (2 * kl) ** 0.5
    return t + d, t


@pytest.mark.parametrize("kl", [1e-9, 1e-7, 1e-5, 1e-3, 1e-1, 5.0])
def test_float32_agrees_with_float64(generator, kl):
    s, t = (x.float() for x in logits(generator, kl))  # the same float32 numbers go both ways
    expected = numpy_losses(s, t)
    # near-uniform outputs, the case here, are exact to the last bit of 11.09
    rtol = 5e-7 if kl < 1 else 2e-5
    np.testing.assert_allclose(losses.kl_divergence(s, t), expected["kl"], rtol=1e-4)
    np.testing.assert_allclose(losses.cross_entropy(s, t), expected["ce"], rtol=rtol)
    np.testing.assert_allclose(losses.entropy(t), expected["ht"], rtol=rtol)
    np.testing.assert_allclose(losses.entropy(s), expected["hs"], rtol=rtol)
    np.testing.assert_allclose(losses.mean_squared_error(s, t), expected["mse"], rtol=1e-5)


def test_kl_of_equal_logits_is_exactly_zero_never_negative_and_blind_to_shifts(generator):
    t = torch.randn(4, M, generator=generator)
    assert torch.equal(losses.kl_divergence(t, t), torch.zeros(4))
    assert (losses.kl_divergence(t + 1e-6 * torch.randn(4, M, generator=generator), t) >= 0).all()
    s, t = logits(generator, 1e-3, batch=2)
    moved, kl = losses.kl_divergence(s + 3, t - 5), losses.kl_divergence(s, t)
    torch.testing.assert_close(moved, kl, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1, 500])  # exp of a difference overflows at 709
@pytest.mark.parametrize("name", ["cross_entropy", "kl_divergence", "mean_squared_error"])
def test_gradients_are_those_of_the_textbook(generator, name, scale):
    s, t = scale * torch.randn(2, 3, 50, generator=generator, dtype=torch.float64)
    s.requires_grad_()
    getattr(losses, name)(s, t).sum().backward()
    with torch.no_grad():
        softmaxes = s.softmax(-1) - t.softmax(-1)
        expected = (s - t) * 2 / 50 if name == "mean_squared_error" else softmaxes
    torch.testing.assert_close(s.grad, expected, rtol=0, atol=1e-10)


def test_phi_is_smooth_across_the_switch_from_its_series():
    x = torch.tensor([-30.0, -1.0, -0.0501, -0.0499, -1e-3, 0.0, 1e-6, 0.0499, 0.0501, 2.0])
    y = x.double().numpy()
    # float64 itself cancels for the smallest: its series is exact there
    exact = np.where(np.abs(y) < 1e-4, y**2 / 2 * (1 + y / 3), np.expm1(y) - y)
    np.testing.assert_allclose(losses.exp_minus_one_minus(x), exact, rtol=1e-5, atol=0)


def test_kl_of_distributions_far_apart_is_finite_and_right():
    teacher = torch.tensor([[0.0, 200.0, -300.0], [50.0, 0.0, 0.0]])
    student = torch.tensor([[0.0, 0.0, 300.0], [-50.0, 10.0, 0.0]])
    log_p, log_q = (x.double().log_softmax(1) for x in (teacher, student))
    found = losses.kl_divergence(student, teacher).double()
    torch.testing.assert_close(found, (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-6, atol=0)
