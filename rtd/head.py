"""The projection head and its l2-bottleneck (paper App. A and E.1).

    MLP:           h = W2 gelu(W1 x + b1) + b2, gelu                  512 -> 2048 -> 2048
    l2-bottleneck: z = W^T h + b,  z~ = z / |z|,  y = V~^T z~         2048 -> 256 -> 2^16

The columns of V~ have unit norm, so the outputs are the cosines between the bottleneck vector z~ and 2^16 directions.
(The authors' released code computes that weight normalisation and then does not use it; ``weight_norm=False``
reproduces what it did: y = V^T z~ with the raw V.)
"""

import torch.nn.functional as F
from torch import nn


class L2Bottleneck(nn.Module):
    """x -> V~^T z~ with z~ = (W^T x + b) / |W^T x + b| and |V~_{:,i}| = 1 (App. A).

    ``linear`` holds W (stored transposed, as torch does) and b; row i of ``last_layer.weight`` is the paper's column V_{:,i}.
    """

    def __init__(self, in_dim, bottleneck_dim, out_dim, weight_norm=True):
        super().__init__()
        self.linear = nn.Linear(in_dim, bottleneck_dim)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        self.weight_norm = weight_norm

    def bottleneck(self, x):
        """(B, in_dim) -> (B, bottleneck_dim) unit vectors, in the parameters' precision also under autocast."""
        return F.normalize(self.linear(x).to(self.linear.weight.dtype), dim=1)

    def normalized_weight(self):
        """(out_dim, bottleneck_dim): V~ (or the raw V without weight normalisation), normalised at every call."""
        weight = self.last_layer.weight
        return F.normalize(weight, dim=1) if self.weight_norm else weight

    def forward(self, x):
        """(B, in_dim) -> (B, out_dim)."""
        return F.linear(self.bottleneck(x), self.normalized_weight())


class ProjectionHead(nn.Module):
    """The 3-layer head of App. E.1: two hidden layers with GELU and no batch norm, then the l2-bottleneck.

    With the paper's widths (512, 2048, 256, 2^16) it has 22,548,736 parameters.
    """

    def __init__(self, in_dim, hidden_dim=2048, bottleneck_dim=256, out_dim=2**16, weight_norm=True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU())
        self.l2_bottleneck = L2Bottleneck(hidden_dim, bottleneck_dim, out_dim, weight_norm)

    def bottleneck(self, x):
        """(B, in_dim) embeddings -> (B, bottleneck_dim) unit vectors."""
        return self.l2_bottleneck.bottleneck(self.mlp(x))

    def forward(self, x):
        """(B, in_dim) embeddings -> (B, out_dim) outputs."""
        return self.l2_bottleneck(self.mlp(x))
