"""Between networks: the straight line through two (section 6, Fig. 9) and the plane through three (section 5, Figs. 5, 13 to 16).

    theta(gamma) = (1 - gamma) theta_a + gamma theta_b,                      gamma in [0, 1]
    theta(x, y)  = (1 - p - q) theta_0 + p theta_1 + q theta_2,              (p, q) affine in (x, y)

Networks with batch norm carry running statistics beside their parameters. On the line these can be interpolated too, or
estimated anew from training images ("recompute"): activations of a mixture of two networks are not mixtures of theirs.
"""

import math

import torch
from torch.optim.swa_utils import update_bn

from rtd.data import normalize


def error_barrier(errors):
    """The largest error on the line minus the mean of its two ends; ``errors`` in the order of gamma from 0 to 1."""
    return max(errors) - (errors[0] + errors[-1]) / 2


@torch.no_grad()
def interpolate(a, b, gamma):
    """(1 - gamma) a + gamma b of two state dicts, as a new one; whole-number buffers (batch norm's counter) are a's.

    At gamma 0 and 1 the end points bit for bit, and (a, b) at gamma is (b, a) at 1 - gamma.
    """
    if gamma in (0, 1):
        return {name: tensor.clone() for name, tensor in (b if gamma else a).items()}
    # two products and a sum, not lerp or a fused multiply-add, which would round the two sides differently
    return {k: a[k] * (1 - gamma) + b[k] * gamma if a[k].is_floating_point() else a[k].clone() for k in a}


def recompute_batch_norm_(network, images, mean, std, batch_size=256):
    """Estimate the running statistics of all batch norms of ``network`` anew, in place: averages over batches of ``images``.

    images: (N, 3, H, W) uint8. Nothing happens to a network without batch norm. The network's mode is restored.
    """
    update_bn((normalize(batch, mean, std) for batch in images.split(batch_size)), network)


PLANES = ("interpolation", "orthogonal")
CENTERS = ("origin", "mean", "minnorm")


def _dot(u, v):
    """Inner product of two lists of tensors."""
    return sum(torch.dot(a, b).item() for a, b in zip(u, v, strict=True))


class Plane:
    """The plane through three networks, with coordinates (x, y).

    "interpolation": theta_0 at (0, 0), theta_1 at (1, 0), theta_2 at (0, 1), as in Fig. 5. "orthogonal": an orthonormal
    basis of the same plane, so that distances and angles are those of parameter space (Figs. 13 to 16): the first axis
    points from theta_0 to theta_1, the second to theta_2's side; ``center`` says what lies at (0, 0): theta_0 ("origin"), the
    "mean" of the three, or the plane's point of least norm ("minnorm").

    Any point is an affine combination of the three, so no basis vector is ever stored: ``basis`` (2, 2) and ``offset`` (2,),
    both float64, turn (x, y) into (p, q) = basis (x, y) + offset.
    """

    def __init__(self, states, names, kind="interpolation", center="origin"):
        """states: three state dicts of one architecture. names: of the parameters (buffers are no coordinates).

        Raises ValueError where the three lie on one line.
        """
        self.states, self.names = list(states), list(names)
        first, d1, d2 = self._vector(states[0]), self._difference(states[1]), self._difference(states[2])
        g11, g12, g22 = _dot(d1, d1), _dot(d1, d2), _dot(d2, d2)
        slope = g12 / g11 if g11 > 0 else 0.0  # Gram-Schmidt: e1 = d1 / |d1|, e2 = rest / |rest| with rest = d2 - slope d1
        rest = [b - slope * a for a, b in zip(d1, d2, strict=True)]
        height = _dot(rest, rest)  # not g22 - slope g12, which cancels where d1 and d2 are nearly parallel
        if not (g11 > 0 and height > 1e-10 * g22):
            raise ValueError("the three networks lie on one line and span no plane")
        self._inner = torch.tensor([[g11, g12], [g12, g22]], dtype=torch.float64)
        self.basis, self.offset = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        if kind == "orthogonal":
            n1, n2 = math.sqrt(g11), math.sqrt(height)
            self.basis = torch.tensor([[1 / n1, -slope / n2], [0, 1 / n2]], dtype=torch.float64)
            if center == "mean":
                self.offset += 1 / 3
            elif center == "minnorm":
                along = torch.tensor([_dot(first, d1), _dot(first, d2)], dtype=torch.float64)
                self.offset = -self.basis @ (self.basis.T @ along)

    def _vector(self, state):
        return [state[name].cpu().double().flatten() for name in self.names]

    def _difference(self, state):
        return [a - b for a, b in zip(self._vector(state), self._vector(self.states[0]), strict=True)]

    def to(self, device):
        """Move the three networks, so that ``write_`` copies nothing between devices."""
        self.states = [{name: tensor.to(device) for name, tensor in state.items()} for state in self.states]
        return self

    def weights(self, x, y):
        """The three networks' weights at (x, y); they sum to 1, and are exactly 0 and 1 at an interpolation plane's corners."""
        p, q = (self.basis @ torch.tensor([x, y], dtype=torch.float64) + self.offset).tolist()
        return 1 - p - q, p, q

    def corners(self):
        """Coordinates of the three networks: [(x, y)] * 3."""
        inverse = torch.linalg.inv(self.basis)
        points = torch.tensor([[0.0, 0], [1, 0], [0, 1]], dtype=torch.float64)
        return [tuple((inverse @ (point - self.offset)).tolist()) for point in points]

    @torch.no_grad()
    def write_(self, network, x, y):
        """Put the point (x, y) into ``network``, in place; batch norm's statistics are interpolated likewise (variances >= 0)."""
        weights = self.weights(x, y)
        corner = weights.index(1) if sorted(weights) == [0, 0, 1] else None
        for name, tensor in network.state_dict().items():
            if corner is not None:
                tensor.copy_(self.states[corner][name])  # bit for bit: 0 x -1 + -0 would lose a sign
            elif tensor.is_floating_point():
                a, b, c = (state[name] for state in self.states)
                torch.mul(a, weights[0], out=tensor).add_(b, alpha=weights[1]).add_(c, alpha=weights[2])
                if name.endswith("running_var"):
                    tensor.clamp_(min=0)
        return network

    def project(self, state):
        """(x, y) of the point of the plane that is nearest to the parameters in ``state``."""
        difference = self._difference(state)
        along = [_dot(difference, self._difference(other)) for other in self.states[1:]]
        p_q = torch.linalg.solve(self._inner, torch.tensor(along, dtype=torch.float64))
        return tuple(torch.linalg.solve(self.basis, p_q - self.offset).tolist())
