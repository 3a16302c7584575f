"""Loss and probes at points of parameter space around a random teacher (paper section 5, Figs. 5, 13 to 16).

At each point theta the network is judged against the teacher on training and test images, and its features are probed.
What does not depend on theta is computed once: normalised images, and of the teacher its bottleneck vectors, normalisers
and entropies. With t the teacher's and s the network's outputs, d = s - t, p_t = softmax(t) and phi(x) = exp(x) - 1 - x, one
pass over blocks of outputs that stay in the cache gives

    A = sum p_t d,   B = sum p_t phi(d);   the ratio of the two normalisers is sum p_t exp(d) = 1 + A + B, hence
    KL = log(1 + A + B) - A = B - phi(log(1 + A + B))

In the last form B and phi are of the size of the KL, so nothing cancels where that is 1e-7. At the teacher d = 0 and KL = 0.
"""

import math

import torch
from torch.optim.swa_utils import update_bn

from rtd import losses, probes
from rtd.data import normalize
from rtd.device import autocast
from rtd.last_layer import output_log_mean_exp

LOSSES = ("kl", "ce", "mse", "student_entropy")
BLOCK = (
    512  # outputs per block on a CPU: five such blocks for 256 images are 2.5 MB, about a core's cache; GPUs take 32 at a time
)


def _blocks(device, *weights):
    size = BLOCK if device.type == "cpu" else 32 * BLOCK
    return zip(*(weight.split(size) for weight in weights), strict=True)


@torch.no_grad()
def teacher_side(z_t, weight_t):
    """(B, K) bottleneck vectors, (m, K) normalised last layer -> log-mean-exp and entropy of the teacher's outputs, both (B,)."""
    lme_t, inner = output_log_mean_exp(z_t, weight_t), torch.zeros_like(z_t[:, 0])
    for (rows_t,) in _blocks(z_t.device, weight_t):
        t = rows_t @ z_t.T  # (block, B)
        inner += (t - lme_t).exp_().mul_(t).sum(0)
    return lme_t, lme_t - inner / len(weight_t) + math.log(len(weight_t))


@torch.no_grad()
def divergences(z, weight, z_t, weight_t, lme_t, entropy_t):
    """Sums over images of KL, cross-entropy, MSE and student entropy (``LOSSES``), from the last layers' inputs: (4,).

    z, z_t: (B, K) bottleneck vectors. weight, weight_t: (m, K) last layers, normalised. lme_t, entropy_t: ``teacher_side``.
    """
    m, a, b, square, inner = len(weight), *(torch.zeros_like(lme_t) for _ in range(4))
    blocks = list(_blocks(z.device, weight, weight_t))
    workspace = z.new_empty(5, len(blocks[0][0]), len(z))  # fresh memory for every block costs more than the arithmetic
    for rows, rows_t in blocks:
        s, p_t, delta, e, product = workspace[:, : len(rows)]  # (block, B) each
        torch.mm(rows, z.T, out=s)
        t = torch.mm(rows_t, z_t.T, out=p_t)
        torch.sub(s, t, out=delta)
        p_t = t.sub_(lme_t).exp_()  # m p_t: of order 1
        square += torch.mul(delta, delta, out=product).sum(0)
        a += torch.mul(delta, p_t, out=product).sum(0)
        torch.expm1(delta, out=e)
        inner += torch.mul(e, p_t, out=product).mul_(s).sum(0)
        # phi by one subtraction: each term is off by rounding of d, without a bias, which the sum of m of them averages out
        b += e.sub_(delta).mul_(p_t).sum(0)
    a, b = a / m, b / m
    ratio = torch.log1p(a + b)
    kl = b - losses.exp_minus_one_minus(ratio)
    constant = lme_t + math.log(m)  # the teacher's log-sum-exp; its sum p_t t is that less its entropy
    entropy = constant + ratio - (constant - entropy_t + a + inner / m) / (1 + a + b)
    return torch.stack([kl, kl + entropy_t, square / m, entropy]).sum(1)


@torch.no_grad()
def embedding_divergences(f, f_t):
    """The same four sums between the soft-maxes of two (B, D) embeddings (Figs. 15, 16)."""
    values = [losses.kl_divergence(f, f_t), losses.cross_entropy(f, f_t), losses.mean_squared_error(f, f_t), losses.entropy(f)]
    return torch.stack(values).sum(1)


class Landscape:
    """Evaluates a network, whatever weights it holds at the moment, against a fixed teacher on fixed images."""

    @torch.no_grad()
    def __init__(self, teacher, data, encoder_only=False, precision="fp32", batch_size=256):
        """teacher: a Network in eval mode, on the device of ``data``. precision: of encoder and hidden layers, the teacher's too:
        bf16's error is then common to both sides and the KL at the teacher is 0, but a KL below about 1e-4 elsewhere is mostly
        rounding error."""
        self.data, self.encoder_only, self.precision, self.batch_size = data, encoder_only, precision, batch_size
        self.images = {name: normalize(getattr(data, name).images, data.mean, data.std) for name in ("train", "test")}
        self.weight_t = None if encoder_only else teacher.head.l2_bottleneck.normalized_weight()
        self.sides = {name: [self._side(teacher, x) for x in self.batches(name)] for name in self.images}

    def batches(self, name):
        return self.images[name].split(self.batch_size)

    def _side(self, teacher, x):
        """What is kept of the teacher for a batch: arguments of ``embedding_divergences`` or ``divergences``."""
        f, z = self._forward(teacher, x)
        return (f,) if self.encoder_only else (z, self.weight_t, *teacher_side(z, self.weight_t))

    def _forward(self, network, x):
        """(B, 3, H, W) -> embedding (B, D) and, unless encoder_only, bottleneck (B, K), float32."""
        with autocast(x.device, self.precision):
            f = network.encoder(x)
            z = None if self.encoder_only else network.head.bottleneck(f)
        return f.float(), z

    def recompute_batch_norm_(self, network):
        """Estimate the statistics of the encoder's batch norms anew from the training images, in place.

        Each batch takes images from all over the set, which may be sorted by class.
        """
        parts = len(self.sides["train"])
        update_bn((self.images["train"][i::parts] for i in range(parts)), network.encoder)

    @torch.no_grad()
    def evaluate(self, network, **probing):
        """{"train_kl": ..., "test_student_entropy": ..., "linear": ..., "knn": ...}: means over the images, and the probes.

        network: in eval mode. probing: arguments of ``rtd.probes.probe``; no probes without. nan where not finite.
        """
        means, features = [], []
        weight = None if self.encoder_only else network.head.l2_bottleneck.normalized_weight()
        for name, images in self.images.items():
            total, kept = torch.zeros(len(LOSSES), device=images.device), []
            for x, side in zip(self.batches(name), self.sides[name], strict=True):
                f, z = self._forward(network, x)
                total += embedding_divergences(f, *side) if self.encoder_only else divergences(z, weight, *side)
                kept.append(f)
            means.append(total / len(images))
            features.append(torch.cat(kept))
        values = torch.cat(means).tolist()  # the one time that a GPU is waited for
        row = dict(zip([f"{name}_{loss}" for name in self.images for loss in LOSSES], values, strict=True))
        row = {name: value if math.isfinite(value) else math.nan for name, value in row.items()}
        if probing.get("probes"):
            finite = all(f.isfinite().all() for f in features)
            row |= probes.probe(*features, self.data, **probing) if finite else dict.fromkeys(probing["probes"], math.nan)
        return row


def norms(network):
    """{"norm_encoder", "norm_head", "norm_total"}: Euclidean norms of the parameters."""
    squares = [sum(p.square().sum() for p in part.parameters()).item() for part in (network.encoder, network.head)]
    return {"norm_encoder": squares[0] ** 0.5, "norm_head": squares[1] ** 0.5, "norm_total": sum(squares) ** 0.5}


def asymmetry(rows, teacher=(0.0, 0.0)):
    """[(eps, KL at -eps, KL at +eps, their ratio)] along x on both sides of the teacher, nearest first (Fig. 5's valley).

    rows: of landscape.csv. teacher: its coordinates. Only points with a mirror image and a finite KL above 0 count; coordinates
    agree to 9 digits, as in the file.
    """
    scale = 1e-7 * max((abs(row["x"] - teacher[0]) for row in rows), default=0) or 1.0
    on_axis = {round((r["x"] - teacher[0]) / scale): r for r in rows if abs(r["y"] - teacher[1]) < scale}
    pairs = [(on_axis[-k], on_axis[k]) for k in sorted(on_axis) if k > 0 and -k in on_axis]
    kls = [(plus["x"] - teacher[0], minus["train_kl"], plus["train_kl"]) for minus, plus in pairs]
    return [(eps, minus, plus, minus / plus) for eps, minus, plus in kls if minus > 0 and plus > 0]  # nan is not
