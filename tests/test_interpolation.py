"""The line and the plane between networks: exact ends and corners, an orthonormal basis, projection as the inverse."""

import numpy as np
import pytest
import torch
from torch import nn

from rtd.interpolation import Plane, error_barrier, interpolate, recompute_batch_norm_


def network(seed):
    """Three layers, one of them a batch norm with statistics of its own."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 5))
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module


@pytest.fixture(autouse=True)
def constructors_may_draw():
    with torch.random.fork_rng():
        yield


def states():
    return [network(seed).state_dict() for seed in range(3)]


def names():
    return [name for name, _ in network(0).named_parameters()]


def flat(state):
    return np.concatenate([state[name].double().numpy().ravel() for name in names()])


def test_ends_of_the_line_are_the_networks_bit_for_bit_and_sides_may_be_swapped():
    a, b, _ = states()
    for gamma in [k / 64 for k in range(65)]:
        there, back = interpolate(a, b, gamma), interpolate(b, a, 1 - gamma)
        for name in names():
            assert torch.equal(there[name], back[name])
            expected = (1 - gamma) * a[name].double() + gamma * b[name].double()
            torch.testing.assert_close(there[name].double(), expected, rtol=1e-6, atol=0)
    for gamma, end in ((0, a), (1, b)):
        assert all(torch.equal(tensor, end[name]) for name, tensor in interpolate(a, b, gamma).items())
    assert interpolate(a, b, 0)["0.weight"].data_ptr() != a["0.weight"].data_ptr()


def test_error_barrier_is_the_rise_over_the_mean_of_the_ends():
    assert error_barrier([10, 30, 50, 20]) == 35
    assert error_barrier([10, 10, 10]) == 0


def test_recomputed_statistics_are_those_of_the_images(generator):
    module = network(0).train()
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    x = images.float() / 255
    recompute_batch_norm_(module, images, (0, 0, 0), (1, 1, 1), batch_size=6)
    with torch.no_grad():
        y = module[0](x).double()
    torch.testing.assert_close(module[1].running_mean.double(), y.mean((0, 2, 3)), rtol=1e-5, atol=0)
    parts = torch.stack([part.var((0, 2, 3)) for part in y.split(6)]).mean(0)
    torch.testing.assert_close(module[1].running_var.double(), parts, rtol=1e-5, atol=0)
    assert module.training and module[1].momentum == 0.1


def test_corners_of_an_interpolation_plane_are_the_networks_bit_for_bit():
    three = states()
    plane = Plane(three, names())
    assert plane.corners() == [(0, 0), (1, 0), (0, 1)]
    for state, corner in zip(three, plane.corners(), strict=True):
        written = plane.write_(network(7), *corner).state_dict()
        assert all(torch.equal(written[name], state[name]) for name in written if "num_batches" not in name)


@pytest.mark.parametrize("center", ["origin", "mean", "minnorm"])
def test_orthogonal_basis(center):
    three = states()
    plane = Plane(three, names(), "orthogonal", center)
    t, a, b = (flat(state) for state in three)
    d = np.stack([a - t, b - t], 1)  # (parameters, 2)
    e = d @ plane.basis.numpy()
    np.testing.assert_allclose(e.T @ e, np.eye(2), atol=1e-10)
    assert e[:, 0] @ d[:, 0] > 0 and e[:, 1] @ d[:, 1] > 0  # unique signs
    assert abs(e[:, 1] @ d[:, 0]) < 1e-9  # the first axis is along the first difference
    offset = t + d @ plane.offset.numpy()
    expected = {"origin": t, "mean": (t + a + b) / 3, "minnorm": t - d @ np.linalg.lstsq(d, t, rcond=None)[0]}[center]
    np.testing.assert_allclose(offset, expected, atol=1e-9)
    for state, corner in zip(three, plane.corners(), strict=True):
        np.testing.assert_allclose(offset + e @ corner, flat(state), atol=1e-9)
        np.testing.assert_allclose(flat(plane.write_(network(7), *corner).state_dict()), flat(state), atol=1e-6)


def test_a_corner_keeps_the_sign_of_zero():
    three = states()
    three[1]["1.bias"].fill_(-0.0)
    assert Plane(three, names()).write_(network(7), 1, 0).state_dict()["1.bias"].signbit().all()


def test_nearly_parallel_directions_give_an_orthonormal_basis():
    t, a, other = states()
    b = {name: a[name] + 1e-4 * other[name] if name in names() else a[name] for name in a}
    plane = Plane([t, a, b], names(), "orthogonal")
    t, a, b = flat(t), flat(a), flat(b)
    e = np.stack([a - t, b - t], 1).astype(np.longdouble) @ plane.basis.numpy()
    np.testing.assert_allclose((e.T @ e).astype(float), np.eye(2), atol=1e-10)


@pytest.mark.parametrize("kind", ["interpolation", "orthogonal"])
def test_projecting_undoes_mapping_and_is_least_squares(kind):
    plane = Plane(states(), names(), kind, "mean")
    for point in ((0.3, -0.7), (2.0, 1.0), (-0.1, 0.0)):
        assert plane.project(plane.write_(network(7), *point).state_dict()) == pytest.approx(point, abs=1e-5)
    elsewhere = network(9).state_dict()
    t, a, b = (flat(state) for state in plane.states)
    d = np.stack([a - t, b - t], 1)
    center = t + d @ plane.offset.numpy()
    solution = np.linalg.lstsq(d @ plane.basis.numpy(), flat(elsewhere) - center, rcond=None)[0]
    assert plane.project(elsewhere) == pytest.approx(tuple(solution), abs=1e-9)


def test_statistics_are_interpolated_and_variances_stay_positive():
    three = states()
    plane = Plane(three, names())
    written = plane.write_(network(7), 0.25, 0.5).state_dict()
    mixed = 0.25 * three[0]["1.running_mean"] + 0.25 * three[1]["1.running_mean"] + 0.5 * three[2]["1.running_mean"]
    torch.testing.assert_close(written["1.running_mean"], mixed)
    assert (plane.write_(network(7), -30, -30).state_dict()["1.running_var"] >= 0).all()


def test_three_networks_on_a_line_span_no_plane():
    a, b, _ = states()
    with pytest.raises(ValueError, match="one line"):
        Plane([a, b, interpolate(a, b, 0.5)], names())
    with pytest.raises(ValueError, match="one line"):
        Plane([a, a, b], names())
