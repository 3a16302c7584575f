"""The head's last layer and the distillation loss in one pass, in blocks of outputs that stay in the cache.

A batch of 256 images has 256 x 65,536 outputs. Written plainly, a step makes about ten tensors of that size (outputs,
log-softmaxes, probabilities, products, for both networks, and their gradients) and moves each through memory. But all
that leaves the last layer is a loss and two gradients:

    s = V~_s z_s,  t = V~_t z_t          logits of student and teacher, V~ = V / |V| row by row
    G = softmax(s) - softmax(t)          gradient of the cross-entropy (and the KL) with respect to s
    dL/dz_s = V~_s^T G,  dL/dV~_s = G z_s^T

so the student's logits are kept once, as (outputs, images), and all else lives for one block of outputs. The teacher's
normaliser depends on the image alone and comes in precomputed where the teacher is frozen (``rtd.distill``).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from rtd.losses import kl_terms

BLOCK = 2048  # outputs per block: 2048 x 256 images x 4 bytes = 2 MB, about one core's cache
LOSSES = ("ce", "kl", "mse")


class LastLayerLoss(NamedTuple):
    """Means over the batch, each a scalar tensor; the last three are None unless diagnostics were asked for."""

    loss: torch.Tensor
    kl: torch.Tensor | None
    teacher_entropy: torch.Tensor | None
    student_entropy: torch.Tensor | None


def _blocks(rows, device):
    size = BLOCK if device.type == "cpu" else 8 * BLOCK
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class Workspace:
    """Memory for large tensors that one call leaves to the next: getting it afresh costs more than filling it."""

    def __init__(self):
        self.turn = 0  # of how many gradients it has held
        self._buffers = {}

    def empty(self, name, shape, like):
        """An uninitialised tensor of dtype and device of ``like``, in the same memory as the last one of this name."""
        size, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)


def _by_convolution(a, b):
    """Whether to form a product as a 1x1 convolution. On CPUs oneDNN does those with vectors as wide as the processor has,
    float32 products of matrices go to MKL, which on some processors with AVX-512 uses half of that and takes twice as long."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()


def _image(rows):
    """(P, C) as one image of 1 x P pixels and C channels, channels last, in the same memory."""
    return rows[None, None].permute(0, 3, 1, 2)


def _mm(a, b, out):
    """a @ b in the dtype of ``a`` and ``b``, written to ``out`` in out's."""
    if _by_convolution(a, b):
        return out.copy_(F.conv2d(_image(a), b.T[:, :, None, None])[0, :, 0].T)
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(torch.mm(a, b))


def _mm_transposed(a, b):
    """a.T @ b, as the gradient of a convolution with respect to its weight where ``_mm`` is a convolution."""
    if _by_convolution(a, b):
        return conv2d_weight(_image(b), (a.shape[1], b.shape[1], 1, 1), _image(a))[:, :, 0, 0]
    return torch.mm(a.T, b)


def _logits(weight, z, dtype, out):
    """(block, K) weights and (B, K) bottleneck vectors -> (block, B) logits in ``out``; the product is formed in ``dtype``."""
    return _mm(weight.to(dtype), z.to(dtype).T, out)


class _OnlineLogMeanExp:
    """log(mean(exp(s))) over dim 0 of blocks of rows, one at a time: a running maximum and a rescaled running sum."""

    def __init__(self, like):
        self.highest, self.total, self.count = torch.full_like(like, -torch.inf), torch.zeros_like(like), 0

    def add(self, block, scratch):
        highest = torch.maximum(self.highest, block.amax(0))
        exp = torch.sub(block, highest, out=scratch[: len(block)]).exp_()
        self.total = self.total * (self.highest - highest).exp() + exp.sum(0)
        self.highest, self.count = highest, self.count + len(block)

    def result(self):
        return self.highest + (self.total / self.count).log()


@torch.no_grad()
def output_log_mean_exp(z, weight, dtype=None):
    """(B, K) bottleneck vectors, (m, K) normalised weight -> (B,) log-mean-exp of the outputs, block by block.

    dtype: in which the products are formed; by default z's.
    """
    dtype = dtype or z.dtype
    normaliser = _OnlineLogMeanExp(z[:, 0])
    blocks = _blocks(len(weight), z.device)
    block = z.new_empty(blocks[0].stop, len(z))
    for rows in blocks:
        logits = _logits(weight[rows], z, dtype, out=block[: rows.stop - rows.start])
        normaliser.add(logits, scratch=logits)
    return normaliser.result()


def _unit_rows(weight, norm, rows, out):
    """Rows ``rows`` of V~ = V / |V|, or of V where there is no weight normalisation (norm None)."""
    return weight[rows] if norm is None else torch.div(weight[rows], norm[rows], out=out[: rows.stop - rows.start])


def _forward_backward(z, weight, z_t, weight_t, lme_t, kind, weight_norm, dtype, diagnostics, workspace, with_grad):
    """Loss, diagnostics, dloss/dz and dloss/dweight; see ``last_layer_loss`` for the arguments.

    Each pass works in place on two or three blocks, allocated once.
    """
    m, batch = len(weight), len(z)
    blocks = _blocks(m, z.device)
    norm = weight.norm(dim=1, keepdim=True).clamp_min_(1e-12) if weight_norm else None  # F.normalize's eps
    logits = workspace.empty("logits", (m, batch), z)
    block_a, block_b = z.new_empty(2, blocks[0].stop, batch)
    block_unit = z.new_empty(blocks[0].stop, z.shape[1])

    normaliser = _OnlineLogMeanExp(z[:, 0])
    for rows in blocks:
        unit = _unit_rows(weight, norm, rows, block_unit)
        normaliser.add(_logits(unit, z, dtype, out=logits[rows]), block_a)
    lme = normaliser.result()

    scale = (2 if kind == "mse" else 1) / (m * batch)
    scaled_z = (z * scale).to(dtype)
    grad_z = torch.zeros_like(z) if with_grad else None
    grad_weight = workspace.empty("gradient", weight.shape, weight) if with_grad else None
    value = torch.zeros_like(lme)  # of each image: sum over outputs of m p_t s (ce), m p_t phi (kl), (s - t)^2 (mse)
    kl, inner_t, inner_s = torch.zeros_like(lme), torch.zeros_like(lme), torch.zeros_like(lme)
    for rows in blocks:
        s = logits[rows]  # (block, B); each turns into m (p_s - p_t), the gradient with respect to s, below
        t = _logits(weight_t[rows], z_t, dtype, out=block_a[: len(s)])
        product = block_b[: len(s)]
        if diagnostics or kind == "kl":
            ratio_s, ratio_t = s - lme, t - lme_t  # log(m p_s), log(m p_t)
            p_s, p_t = ratio_s.exp(), ratio_t.exp()  # times m, as everywhere here
            kl += kl_terms(p_s, p_t, ratio_s.sub_(ratio_t)).sum(0)
            inner_t += p_t.mul_(t).sum(0)
            inner_s += p_s.mul_(s).sum(0)
        if kind == "mse":
            grad = s.sub_(t)
            value += torch.mul(grad, grad, out=product).sum(0)
        else:
            p_t = t.sub_(lme_t).exp_()  # m p_t: of order 1, where p_t is of order 1e-5
            value += torch.mul(p_t, s, out=product).sum(0)
            grad = s.sub_(lme).exp_().sub_(p_t)
        if with_grad:
            unit, grad = _unit_rows(weight, norm, rows, block_unit), grad.to(dtype)
            grad_z += _mm_transposed(grad, unit.to(dtype))
            grad_unit = _mm(grad, scaled_z, out=grad_weight[rows])  # (block, K)
            if weight_norm:  # through V~ = V / |V|: remove the radial part, divide by the norm
                radial = (grad_unit * unit).sum(1, keepdim=True)
                grad_unit.addcmul_(unit, radial, value=-1).div_(norm[rows])
    if with_grad:
        grad_z *= scale

    def mean_over_images(log_mean_exp, inner):
        return (log_mean_exp - inner / m).mean() + math.log(m)

    loss = {"ce": lambda: mean_over_images(lme, value), "kl": lambda: kl.mean() / m, "mse": lambda: value.mean() / m}
    result = LastLayerLoss(loss[kind](), None, None, None)
    if diagnostics:
        entropies = mean_over_images(lme_t, inner_t), mean_over_images(lme, inner_s)
        result = LastLayerLoss(result.loss, kl.mean() / m, *entropies)
    return result, grad_z, grad_weight


class _Function(torch.autograd.Function):
    """Forms the gradients in the forward pass, where the blocks are at hand; backward hands them out, scaled."""

    @staticmethod
    def forward(ctx, z, weight, *arguments):
        ctx.workspace = arguments[-1]
        ctx.workspace.turn = ctx.turn = ctx.workspace.turn + 1
        result, grad_z, grad_weight = _forward_backward(z, weight, *arguments, with_grad=True)
        ctx.gradients = grad_z, grad_weight  # not save_for_backward: autograd may then take them over without a copy
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        return tuple(result)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.turn != ctx.workspace.turn:
            raise RuntimeError("another loss was computed in the same workspace before this one's backward: call that first")
        grad_z, grad_weight = ctx.gradients
        del ctx.gradients
        return (grad_z.mul_(grad_loss), grad_weight.mul_(grad_loss)) + (None,) * 8


def last_layer_loss(
    z,
    weight,
    z_t,
    weight_t,
    lme_t=None,
    kind="ce",
    weight_norm=True,
    dtype=None,
    diagnostics=False,
    workspace=None,
):
    """Loss between the outputs of the student's last layer and the teacher's, with gradients for the student.

    z, z_t: (B, K) bottleneck vectors of student and teacher. weight: (m, K) the student's raw last layer, normalised here
    unless ``weight_norm`` is False. weight_t: (m, K) the teacher's, normalised already (``L2Bottleneck.normalized_weight``).
    lme_t: (B,) the teacher's ``output_log_mean_exp`` where it is known. kind: "ce", "kl" or "mse" (``rtd.losses``).
    dtype: in which the products with the weights are formed, by default z's; everything else is in z's dtype. workspace: a
    ``Workspace`` to reuse, in which the weight's gradient will lie, so that the next call with it overwrites that.

    Returns a ``LastLayerLoss``. Backward may be called once (the weight's gradient is handed out without a copy), and, with a
    workspace, before the next call: else it raises RuntimeError.
    """
    if kind not in LOSSES:
        raise ValueError(f"kind must be one of {LOSSES}, not {kind!r}")
    dtype = dtype or z.dtype
    if lme_t is None:
        lme_t = output_log_mean_exp(z_t, weight_t, dtype)
    arguments = (z_t, weight_t, lme_t, kind, weight_norm, dtype, diagnostics, workspace or Workspace())
    with torch.autocast(z.device.type, enabled=False):
        if torch.is_grad_enabled():
            return LastLayerLoss(*_Function.apply(z, weight, *arguments))
        return _forward_backward(z, weight, *arguments, with_grad=False)[0]
