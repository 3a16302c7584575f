"""Loss and probes at points of parameter space around a random teacher (section 5, Fig. 5).

At each point theta the network is judged against the teacher on training and test images, and its
features are probed (also Figs. 13 to 16). What does not depend on theta is computed once: the
normalised images, and the teacher's bottleneck vectors, normalisers and entropies. With t the
teacher's and s the network's outputs, d = s - t, p_t = softmax(t) and phi(x) = exp(x) - 1 - x, one
pass over blocks of outputs that stay in the cache gives

    A = sum p_t d,  B = sum p_t phi(d);  the ratio of the normalisers is sum p_t exp(d) = 1 + A + B,
    KL = log(1 + A + B) - A = B - phi(log(1 + A + B))

In the last form B and phi are of the KL's size unless all outputs rise together, so nothing cancels
at a KL of 1e-7; in the first form nothing cancels where A and B are large. At the teacher d = 0.
"""

import math

import torch
from torch.optim.swa_utils import update_bn

from rtd import losses
from rtd.last_layer import blocks
from rtd.models import autocast
from rtd.probes import probe

MEASURES = ("kl", "ce", "mse", "student_entropy")
BLOCK = 512  # outputs per block: five blocks for 256 images are 2.5 MB, about one core's cache


@torch.no_grad()
def teacher_side(z_t, weight_t):
    """Log-mean-exp and entropy of the teacher's outputs, each (B,).

    z_t: (B, K) bottleneck vectors. weight_t: (m, K) last layer, normalised.
    """
    t = z_t @ weight_t.T  # (B, m), whole, as this is done once
    return losses.log_mean_exp(t), losses.entropy(t)


@torch.no_grad()
def divergences(z, weight, z_t, weight_t, lme_t, entropy_t):
    """Sums over images of KL, cross-entropy, MSE and student entropy (``MEASURES``): (4,).

    z, z_t: (B, K) bottleneck vectors. weight, weight_t: (m, K) last layers, normalised. lme_t,
    entropy_t: ``teacher_side``. (``last_layer_loss`` would take several times as long.)
    """
    m, a, b, square, inner = len(weight), *(torch.zeros_like(lme_t) for _ in range(4))
    slices = blocks(m, BLOCK, z.device)
    # one workspace, as fresh memory for every block costs more than the arithmetic
    workspace = z.new_empty(5, slices[0].stop, len(z))
    for rows in slices:
        s, t, d, e, product = workspace[:, : rows.stop - rows.start]  # (block, B) each
        torch.mm(weight[rows], z.T, out=s)
        torch.mm(weight_t[rows], z_t.T, out=t)
        torch.sub(s, t, out=d)
        p_t = t.sub_(lme_t).exp_()  # m p_t, of order 1, in t's memory
        square += torch.mul(d, d, out=product).sum(0)
        a += torch.mul(d, p_t, out=product).sum(0)
        torch.expm1(d, out=e)
        inner += torch.mul(e, p_t, out=product).mul_(s).sum(0)
        # phi by a subtraction: its error is the rounding of d, which a mean of m terms averages out
        b += e.sub_(d).mul_(p_t).sum(0)
    a, b = a / m, b / m
    log_ratio = torch.log1p(a + b)
    kl = torch.where(log_ratio.abs() < 1, b - losses.exp_minus_one_minus(log_ratio), log_ratio - a)
    constant = lme_t + math.log(m)  # the teacher's log-sum-exp: sum p_t t = constant - entropy_t
    # H(p_s) = log-sum-exp of s - sum p_s s, with p_s = p_t exp(d) / (1 + A + B)
    entropy = constant + log_ratio - (constant - entropy_t + a + inner / m) / (1 + a + b)
    return torch.stack([kl, kl + entropy_t, square / m, entropy]).sum(1)


@torch.no_grad()
def embedding_divergences(f, f_t):
    """The same four sums with (B, D) embeddings in place of the outputs (Figs. 15, 16)."""
    pairs = losses.kl_divergence, losses.cross_entropy, losses.mean_squared_error
    return torch.stack([*(loss(f, f_t) for loss in pairs), losses.entropy(f)]).sum(1)


class Landscape:
    """Evaluates a network, whatever weights it holds at the moment, against a fixed teacher."""

    @torch.no_grad()
    def __init__(self, teacher, data, encoder_only=False, precision="fp32", batch_size=256):
        """teacher: a Network in eval mode. data: the ``Dataset`` of the images, on its device.

        precision: of encoder and hidden layers, also the teacher's, so that the KL at the teacher
        is 0. With bf16, a KL below about 1e-4 elsewhere is mostly rounding error.
        """
        self.data, self.encoder_only, self.precision = data, encoder_only, precision
        self.images = {
            "train": data.normalize(data.train.images),
            "test": data.normalize(data.test.images),
        }
        self.batch_size, self.sides = batch_size, []  # of each batch, what is kept of the teacher
        for _, _, outputs in self._outputs(teacher):
            self.sides.append(outputs if encoder_only else (*outputs, *teacher_side(*outputs)))

    def _outputs(self, network):
        """For each batch its split, its embedding (B, D), and what the divergences take.

        That is the embedding if encoder_only, else the bottleneck (B, K) and the last layer.
        """
        if not self.encoder_only:
            weight = network.head.l2_bottleneck.normalized_weight()
        for name, images in self.images.items():
            for x in images.split(self.batch_size):
                with autocast(x.device, self.precision):
                    f = network.encoder(x).float()
                    outputs = (f,) if self.encoder_only else (network.head.bottleneck(f), weight)
                yield name, f, outputs

    def recompute_batch_norm_(self, network):
        """Estimate the statistics of the encoder's batch norms anew from the training images."""
        images = self.images["train"]
        count = math.ceil(len(images) / self.batch_size)
        # each batch takes images from all over the set, which may be sorted by class
        with autocast(images.device, self.precision):
            update_bn((images[i::count] for i in range(count)), network.encoder)

    @torch.no_grad()
    def evaluate(self, network, probes=(), **options):
        """{"train_kl": ..., "test_student_entropy": ..., "linear": ..., "knn": ...}.

        Means over the images come first, then ``probes`` with ``options`` of ``rtd.probes.probe``;
        what is not finite becomes nan. network: in eval mode.
        """
        totals, features = dict.fromkeys(self.images, 0), {name: [] for name in self.images}
        compare = embedding_divergences if self.encoder_only else divergences
        for (name, f, outputs), side in zip(self._outputs(network), self.sides, strict=True):
            totals[name] += compare(*outputs, *side)
            features[name].append(f)
        means = torch.cat([total / len(self.images[name]) for name, total in totals.items()])
        means = means.where(means.isfinite(), math.nan).tolist()  # a GPU is waited for once
        names = [f"{name}_{loss}" for name in totals for loss in MEASURES]
        features = [torch.cat(parts) for parts in features.values()]
        return dict(zip(names, means, strict=True)) | probe(*features, self.data, probes, **options)


def asymmetry(rows):
    """[(eps, KL at -eps, KL at +eps, their ratio)] along x around the teacher (Fig. 5's valley).

    rows: of landscape.csv, the teacher at (0, 0). The nearest come first. Only points with a mirror
    image, to 6 digits, and a finite KL above 0 count.
    """
    near = 1e-7 * max(abs(row["x"]) for row in rows)
    on_axis = [row for row in rows if abs(row["y"]) <= near]
    kl = {float(f"{row['x']:.6g}"): row["train_kl"] for row in on_axis}
    pairs = [(eps, kl[-eps], kl[eps]) for eps in sorted(kl) if eps > 0 and -eps in kl]
    return [(eps, a, b, a / b) for eps, a, b in pairs if a > 0 and b > 0]  # nan is not
