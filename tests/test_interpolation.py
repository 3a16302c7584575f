"""The line and the plane between networks: exact ends and corners, an orthonormal basis."""

import numpy as np
import pytest
import torch
from torch import nn

from rtd.interpolation import Plane, interpolate


def network(seed):
    """Three layers, one of them a batch norm with statistics of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 5)
        )
    for tensor in module.to_empty(device="cpu").state_dict().values():
        value = torch.rand(tensor.shape, generator=generator) + 0.1
        tensor.copy_(value if tensor.is_floating_point() else torch.tensor(0))
    return module


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
        assert all(torch.equal(x, end[name]) for name, x in interpolate(a, b, gamma).items())
    assert interpolate(a, b, 0)["0.weight"].data_ptr() != a["0.weight"].data_ptr()


def test_corners_of_an_interpolation_plane_are_the_networks_bit_for_bit():
    three = states()
    three[1]["1.bias"].fill_(-0.0)
    plane = Plane(three, names())
    assert plane.corners() == [(0, 0), (1, 0), (0, 1)]
    for state, corner in zip(three, plane.corners(), strict=True):
        written = plane.write_(network(7), *corner).state_dict()
        assert all(torch.equal(written[name], state[name]) for name in state)
        assert torch.equal(written["1.bias"].signbit(), state["1.bias"].signbit())  # 0 == -0


@pytest.mark.parametrize("apart", [1, 3e-5])
def test_orthogonal_basis_is_that_of_the_plane_also_where_directions_are_nearly_parallel(apart):
    t, a, other = states()
    b = a | {name: (1 - apart) * a[name] + apart * other[name] for name in names()}
    plane = Plane([t, a, b], names(), "orthogonal")
    d = np.stack([flat(a) - flat(t), flat(b) - flat(t)], 1).astype(np.longdouble)
    e = d @ plane.to_pq.numpy()  # (parameters, 2)
    atol = 1e-13 / apart  # sums in float64 round, which nearly parallel directions magnify
    np.testing.assert_allclose((e.T @ e).astype(float), np.eye(2), rtol=0, atol=atol)
    assert e[:, 0] @ d[:, 0] > 0 and e[:, 1] @ d[:, 1] > 0  # unique signs
    across = e[:, 1] @ d[:, 0]  # the first axis is along the first difference
    assert abs(across) < atol * np.linalg.norm(d[:, 0])
    assert plane.corners()[0] == (0, 0)
    for state, corner in zip((t, a, b), plane.corners(), strict=True):
        expected = flat(state)
        np.testing.assert_allclose((flat(t) + e @ corner).astype(float), expected, atol=1e-9)
        written = flat(plane.write_(network(7), *corner).state_dict())
        np.testing.assert_allclose(written, expected, atol=1e-6)


def test_statistics_are_interpolated_and_variances_stay_positive():
    three = states()
    plane = Plane(three, names())
    written = plane.write_(network(7), 0.25, 0.5).state_dict()
    t, a, b = (state["1.running_mean"] for state in three)
    torch.testing.assert_close(written["1.running_mean"], 0.25 * t + 0.25 * a + 0.5 * b)
    assert (plane.write_(network(7), -30, -30).state_dict()["1.running_var"] >= 0).all()


def test_three_networks_on_a_line_span_no_plane_and_there_are_two_kinds():
    a, b, _ = states()
    for three in ([a, b, interpolate(a, b, 0.5)], [a, a, b]):
        with pytest.raises(ValueError, match="one line"):
            Plane(three, names())
    with pytest.raises(ValueError, match="orthogonal"):
        Plane(states(), names(), "orthonormal")
