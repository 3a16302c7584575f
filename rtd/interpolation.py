"""Between networks: the straight line through two (paper section 6, Fig. 9).

    theta(gamma) = (1 - gamma) theta_a + gamma theta_b,   gamma in [0, 1]

Networks with batch norm carry running statistics beside their parameters. On the line these can be interpolated too, or
estimated anew from training images ("recompute"): activations of a mixture of two networks are not mixtures of theirs.
"""

import torch
from torch.optim.swa_utils import update_bn

from rtd.data import normalize


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
