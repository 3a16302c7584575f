"""Random initialisation of encoders, head, and a student next to its teacher (section 4).

Every draw comes from an explicit ``torch.Generator``; ``random_stream`` names one for each purpose,
so that changing one (the probe's, say) does not move another (the batch order).
"""

import hashlib
import math

import torch
from torch import nn


def random_stream(seed, *names):
    """A CPU generator for the stream ``names`` (integers, strings without /) of ``seed``.

    Equal arguments give equal draws, in every process (Python's hash() would not).
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def init_encoder_(encoder, generator):
    """Kaiming initialisation, in place: N(0, 2 / fan_out) for all weights, biases 0.

    Fan-out mode and the gain sqrt(2) are torchvision's for ResNet. Norm layers start as the
    identity, also at the end of a residual branch. In a ViT, query, key and value are a linear
    layer each; the class token starts at 0 and the position embedding as N(0, 0.02^2),
    torchvision's. Raises ValueError for other layers with parameters or buffers.
    """
    options = {"mode": "fan_out", "nonlinearity": "relu", "generator": generator}
    for module in encoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, **options)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):  # its output projection is an nn.Linear
            for weight in module.in_proj_weight.chunk(3):
                nn.init.kaiming_normal_(weight, **options)
            nn.init.zeros_(module.in_proj_bias)
        elif hasattr(module, "class_token"):  # torchvision's VisionTransformer
            nn.init.zeros_(module.class_token)
            nn.init.normal_(module.encoder.pos_embedding, std=0.02, generator=generator)
        elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)):
            module.reset_parameters()  # draws nothing
        elif hasattr(module, "pos_embedding"):  # set with the class token
            continue
        elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            raise ValueError(f"{type(module).__name__} has tensors that nobody initialises")
    return encoder


def init_head_(head, generator):
    """Truncated normal with sigma = 0.02 for the head's weights, biases 0, in place (App. E.1).

    The cut-off is torch's default of +-2, or 100 sigma, as in DINO and the authors' code, so that
    nothing is cut in effect.
    """
    for parameter in head.parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.zeros_(parameter)
    return head


def init_linear_(layer, generator):
    """U(-1/sqrt(d), 1/sqrt(d)) for weights and biases, d inputs: torch's default, in place."""
    bound = 1 / math.sqrt(layer.in_features)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer


@torch.no_grad()
def init_student_(student, teacher, alpha):
    """theta_S(alpha) = ((1 - alpha) theta_T + alpha theta~) / delta, in place (section 4).

    ``student`` comes in as the fresh draw theta~ and leaves as theta_S(alpha), alpha in [0, 1].
    delta = sqrt(alpha^2 + (1 - alpha)^2) keeps the variance of each weight. All parameters are
    mixed (so a batch norm's gain, 1 in both, becomes 1 / delta); buffers keep their fresh values.
    In float32, alpha = 1e-10 leaves all but about 0.15 % of the entries equal to the teacher's.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    delta = math.sqrt(alpha**2 + (1 - alpha) ** 2)
    for theta, theta_t in zip(student.parameters(), teacher.parameters(), strict=True):
        theta.mul_(alpha).add_(theta_t, alpha=1 - alpha).div_(delta)
    return student
