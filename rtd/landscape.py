"""Loss and probes at points of parameter space around a random teacher (paper section 5, Figs. 5, 13 to 16).

At each point theta the network is judged against the teacher on training and test images, and its features are probed.
All that does not depend on theta is computed once: normalised images and the teacher's side. With t the teacher's and s the
network's outputs, delta = s - t and p_t = softmax(t), one pass over blocks of outputs gives

    A = sum p_t delta,   B = sum p_t phi(delta),   phi(x) = exp(x) - 1 - x
    KL = log(1 + A + B) - A,    since sum p_t exp(delta) = 1 + A + B is the ratio of the two normalisers

which loses nothing where the KL is 1e-7, and no second pass is needed to normalise s.
"""

import math

import torch

from rtd import losses, probes
from rtd.data import normalize
from rtd.device import autocast
from rtd.last_layer import BLOCK, output_log_mean_exp

LOSSES = ("kl", "ce", "mse", "student_entropy")


@torch.no_grad()
def divergences(z, weight, z_t, weight_t, lme_t):
    """Sums over images of KL, cross-entropy, MSE and student entropy (``LOSSES``), from the last layer's inputs: (4,).

    z, z_t: (B, K) bottleneck vectors. weight, weight_t: (m, K) last layers, normalised. lme_t: (B,) the teacher's log-mean-exp.
    """
    m = len(weight)
    a, b, square, inner_t, inner_s = (torch.zeros_like(lme_t) for _ in range(5))
    block = BLOCK if z.device.type == "cpu" else 8 * BLOCK
    for rows, rows_t in zip(weight.split(block), weight_t.split(block), strict=True):
        t = rows_t @ z_t.T  # (block, B)
        s = rows @ z.T
        p_t = torch.sub(t, lme_t).exp_()  # m p_t
        delta = s - t
        phi = losses.exp_minus_one_minus(delta)
        square += delta.square().sum(0)
        inner_t += (p_t * t).sum(0)
        a += (p_t * delta).sum(0)
        b += phi.mul_(p_t).sum(0)  # m p_t phi
        inner_s += s.mul_(phi.add_(delta.add_(1).mul_(p_t))).sum(0)  # s m p_t exp(delta)
    a, b = a / m, b / m
    kl = torch.log1p(a + b) - a
    entropy_t = lme_t - inner_t / m + math.log(m)
    entropy_s = lme_t + torch.log1p(a + b) - inner_s / m / (1 + a + b) + math.log(m)
    return torch.stack([kl, kl + entropy_t, square / m, entropy_s]).sum(1)


@torch.no_grad()
def embedding_divergences(f, f_t):
    """The same four sums between the soft-maxes of two (B, D) embeddings (Figs. 15, 16)."""
    values = [losses.kl_divergence(f, f_t), losses.cross_entropy(f, f_t), losses.mean_squared_error(f, f_t), losses.entropy(f)]
    return torch.stack(values).sum(1)


class Landscape:
    """Evaluates a network, whatever weights it holds at the moment, against a fixed teacher on fixed images."""

    @torch.no_grad()
    def __init__(self, teacher, data, encoder_only=False, precision="fp32", batch_size=256):
        """teacher: a Network in eval mode, on the device of ``data``. precision: of the encoders' and heads' forward passes; the
        teacher's is the same, so that bf16's error is common to both sides and the KL at the teacher is 0."""
        self.data, self.encoder_only, self.precision = data, encoder_only, precision
        self.batches = {}  # split -> [(images, teacher's side)]
        self.weight_t = teacher.head.l2_bottleneck.normalized_weight()
        for name in ("train", "test"):
            self.batches[name] = []
            for images in getattr(data, name).images.split(batch_size):
                x = normalize(images, data.mean, data.std)
                f, z = self._forward(teacher, x)
                lme = None if encoder_only else output_log_mean_exp(z, self.weight_t)
                self.batches[name].append((x, f if encoder_only else z, lme))

    def _forward(self, network, x):
        """(B, 3, H, W) -> embedding (B, D) and, unless encoder_only, bottleneck (B, K), float32."""
        with autocast(x.device, self.precision):
            f = network.encoder(x)
            z = None if self.encoder_only else network.head.bottleneck(f)
        return f.float(), z

    @torch.no_grad()
    def evaluate(self, network, **probing):
        """{"train_kl": ..., "test_student_entropy": ..., "linear": ..., "knn": ...}: means over the images, and the probes.

        network: in eval mode. probing: arguments of ``rtd.probes.probe``; no probes without. nan where not finite.
        """
        sums, features = [], []
        weight = None if self.encoder_only else network.head.l2_bottleneck.normalized_weight()
        for batches in self.batches.values():
            total, kept = torch.zeros(len(LOSSES), device=batches[0][0].device), []
            for x, side, lme in batches:
                f, z = self._forward(network, x)
                total += embedding_divergences(f, side) if self.encoder_only else divergences(z, weight, side, self.weight_t, lme)
                kept.append(f)
            sums.append(total / sum(len(x) for x, *_ in batches))
            features.append(torch.cat(kept))
        values = torch.cat(sums).tolist()  # the one time that a GPU is waited for
        row = dict(zip([f"{split}_{loss}" for split in self.batches for loss in LOSSES], values, strict=True))
        row = {name: value if math.isfinite(value) else math.nan for name, value in row.items()}
        if probing.get("probes"):
            finite = all(f.isfinite().all() for f in features)
            row |= probes.probe(*features, self.data, **probing) if finite else dict.fromkeys(probing["probes"], math.nan)
        return row


def norms(network):
    """{"norm_encoder", "norm_head", "norm_total"}: Euclidean norms of the parameters."""
    squares = [sum(p.square().sum() for p in part.parameters()).item() for part in (network.encoder, network.head)]
    return {"norm_encoder": squares[0] ** 0.5, "norm_head": squares[1] ** 0.5, "norm_total": sum(squares) ** 0.5}


def asymmetry(rows):
    """[(eps, KL at -eps, KL at +eps)] for the points of the x axis that have a mirror image, nearest first (Fig. 5's valley).

    rows: of landscape.csv. Coordinates agree to rounding.
    """
    on_axis = {round(row["x"], 9): row["train_kl"] for row in rows if abs(row["y"]) < 1e-9}
    return [(x, on_axis[-x], on_axis[x]) for x in sorted(on_axis) if x > 0 and -x in on_axis]
