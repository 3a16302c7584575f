"""The projection head and its l2-bottleneck (paper App. A and E.1).

    MLP:           h = gelu(W2 gelu(W1 x + b1) + b2)                  512 -> 2048 -> 2048
    l2-bottleneck: z = W^T h + b,  z~ = z / |z|,  y = V~^T z~         2048 -> 256 -> 2^16

The columns of V~ have unit norm, so the outputs are the cosines between the bottleneck vector z~
and 2^16 directions. (The authors' code computes that normalisation but does not use it; the slots
"-/lb/fn/-/l/-" leave it out, y = V^T z~ with the raw V, and reach the numbers that the paper
prints: results/README.md, Fig. 1.)

Fig. 12 takes the bottleneck apart into six slots, ``wn1/lin1/fn1/wn2/lin2/fn2``: weight norm of the
first layer ("wn"), the first layer ("l" linear, "lb" with bias), norm of its output ("fn"), and the
same for the last layer; "-" is nothing.
"""

import re

import torch.nn.functional as F
from torch import nn

from rtd.errors import InputError

PAPER_SLOTS = "-/lb/fn/wn/l/-"
SLOTS = "(?!wn/-)(-|wn)/(-|lb?)/(-|fn)/(-|wn)/l/(-|fn)"


def parse_slots(text):
    """All slots but lin2 of a text like "-/lb/fn/wn/l/-"; InputError where they do not fit."""
    if not (slots := re.fullmatch(SLOTS, text)):
        raise InputError(
            f"--bottleneck {text}: give wn1/lin1/fn1/wn2/lin2/fn2, which are wn or -, l or lb or -,"
            f" fn or -, wn or -, l, fn or -, and no wn1 without lin1; the paper's is {PAPER_SLOTS}"
        )
    return slots.groups()


class L2Bottleneck(nn.Module):
    """x -> V~^T z~ with z~ = (W^T x + b) / |W^T x + b| and |V~_{:,i}| = 1 (App. A; Fig. 12).

    ``linear`` holds W (stored transposed, as torch does) and b; row i of ``last_layer.weight`` is
    the paper's column V_{:,i}. Without a first layer, the last one sees all of x.
    """

    def __init__(self, in_dim, bottleneck_dim, out_dim, slots=PAPER_SLOTS):
        super().__init__()
        wn1, first, fn1, wn2, fn2 = parse_slots(slots)
        self.first_weight_norm, self.feature_norm = wn1 == "wn", fn1 == "fn"
        self.weight_norm, self.output_norm = wn2 == "wn", fn2 == "fn"
        if first == "-":
            self.linear, bottleneck_dim = nn.Identity(), in_dim
        else:
            self.linear = nn.Linear(in_dim, bottleneck_dim, bias=first == "lb")
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)

    def bottleneck(self, x):
        """(B, in_dim) -> (B, bottleneck_dim) what the last layer sees: the paper's unit vectors.

        They have the parameters' precision also under autocast. Slot fn2 divides the outputs
        y = V^T z by |y|. As y / |y| = V^T (z / |y|), z is divided instead, so that the head's
        outputs are always one product away.
        """
        if self.first_weight_norm:
            x = F.linear(x, F.normalize(self.linear.weight, dim=1), self.linear.bias)
        else:
            x = self.linear(x)
        z = x.to(self.last_layer.weight.dtype)
        if self.feature_norm:
            z = F.normalize(z, dim=1)
        if self.output_norm:
            outputs = F.linear(z, self.normalized_weight()).to(z.dtype)
            z = z / outputs.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return z

    def normalized_weight(self):
        """(out_dim, bottleneck_dim): V~, or V where it is raw. (In training, the student's is
        normalised in ``rtd.last_layer``.)
        """
        weight = self.last_layer.weight
        return F.normalize(weight, dim=1) if self.weight_norm else weight

    def forward(self, x):
        """(B, in_dim) -> (B, out_dim)."""
        return F.linear(self.bottleneck(x), self.normalized_weight())


class ProjectionHead(nn.Module):
    """The head of App. E.1: two hidden layers with GELU, no batch norm, then the l2-bottleneck.

    With the paper's widths (512, 2048, 256, 2^16) it has 22,548,736 parameters.
    """

    def __init__(
        self, in_dim, hidden_dim=2048, bottleneck_dim=256, out_dim=2**16, bottleneck=PAPER_SLOTS
    ):
        """bottleneck: the six slots of its ``L2Bottleneck``."""
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU()
        )
        self.l2_bottleneck = L2Bottleneck(hidden_dim, bottleneck_dim, out_dim, bottleneck)

    def bottleneck(self, x):
        """(B, in_dim) embeddings -> (B, bottleneck_dim) what the last layer sees."""
        return self.l2_bottleneck.bottleneck(self.mlp(x))

    def forward(self, x):
        """(B, in_dim) embeddings -> (B, out_dim) outputs."""
        return self.l2_bottleneck(self.mlp(x))
