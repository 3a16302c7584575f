"""Between networks: the line through two (section 6, Fig. 9), the plane through three (section 5).

    theta(gamma) = (1 - gamma) theta_a + gamma theta_b,                      gamma in [0, 1]
    theta(x, y)  = (1 - p - q) theta_0 + p theta_1 + q theta_2,              (p, q) linear in (x, y)

Figs. 5 and 13 to 16 show planes. Batch norm's statistics can be interpolated too, or estimated anew
from training images (``torch.optim.swa_utils.update_bn``): the activations of a mixed network are
not the mix of the networks', so that mixed statistics do not fit them.
"""

import torch

PLANES = ("interpolation", "orthogonal")


def error_barrier(errors):
    """The largest error on the line minus the mean of its ends; ``errors`` in gamma's order."""
    return max(errors) - (errors[0] + errors[-1]) / 2


@torch.no_grad()
def interpolate(a, b, gamma):
    """(1 - gamma) a + gamma b of two state dicts, as a new one; integer buffers are a's.

    At gamma 0 and 1 it returns the ends bit for bit. (b, a) at 1 - gamma gives the same floats as
    (a, b) at gamma. The paper's gamma counts from the other end.
    """
    if gamma in (0, 1):
        return {name: tensor.clone() for name, tensor in (b if gamma else a).items()}
    # two products and a sum, as lerp or a fused multiply-add would round the two sides differently
    return {
        name: x * (1 - gamma) + b[name] * gamma if x.is_floating_point() else x.clone()
        for name, x in a.items()
    }


class Plane:
    """The plane through three networks, with coordinates (x, y) and theta_0 at (0, 0).

    "interpolation": theta_1 lies at (1, 0) and theta_2 at (0, 1), as in Fig. 5. "orthogonal": an
    orthonormal basis of the same plane, so that distances and angles are those of parameter space
    (Figs. 13 to 16); the first axis points from theta_0 to theta_1, the second to theta_2's side.

    A point is a combination of the three with the weights 1 - p - q, p and q. ``to_pq``, (2, 2)
    float64, turns (x, y) into (p, q); basis vectors, as long as a network, are not stored.
    """

    def __init__(self, states, names, kind="interpolation"):
        """states: state dicts of three networks, best on the device of the one to write.

        names: of the parameters, without buffers. Raises ValueError where the three lie on a line.
        """
        if kind not in PLANES:
            raise ValueError(f"kind must be one of {PLANES}, not {kind!r}")
        self.states, self.to_pq = list(states), torch.eye(2, dtype=torch.float64)
        start, *ends = states
        d1, d2 = (
            torch.cat([(end[n].cpu().double() - start[n].cpu().double()).flatten() for n in names])
            for end in ends
        )
        # Gram-Schmidt: e1 = d1 / |d1|, e2 = rest / |rest| with rest = d2 - slope d1
        slope = (d1 @ d2) / (d1 @ d1)
        rest = d2 - slope * d1  # |rest|^2 is not |d2|^2 - slope <d1, d2>, which can cancel
        n1, n2 = d1.norm().item(), rest.norm().item()
        if not (n1 > 0 and n2 > 1e-5 * d2.norm()):
            raise ValueError("the three networks lie on one line and span no plane")
        if kind == "orthogonal":  # x e1 + y e2 = (x / n1 - slope y / n2) d1 + (y / n2) d2
            self.to_pq = torch.tensor([[1 / n1, -slope / n2], [0, 1 / n2]], dtype=torch.float64)

    def corners(self):
        """Coordinates of the three networks: [(x, y)] * 3."""
        return [(0.0, 0.0), *map(tuple, torch.linalg.inv(self.to_pq).T.tolist())]

    @torch.no_grad()
    def write_(self, network, x, y):
        """Put the point (x, y) into ``network``, batch norm's statistics included, in place."""
        p, q = (self.to_pq @ torch.tensor([x, y], dtype=torch.float64)).tolist()
        r = 1 - p - q
        if sorted((r, p, q)) == [0, 0, 1]:  # bit for bit: 0 x -1 + -0 would lose a sign
            network.load_state_dict(self.states[(r, p, q).index(1)])
            return network
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                start, one, two = (state[name] for state in self.states)
                torch.mul(start, r, out=tensor).add_(one, alpha=p).add_(two, alpha=q)
                if name.endswith("running_var"):
                    tensor.clamp_(min=0)  # outside the triangle it could be negative
        return network
