"""The head's last layer, the distillation loss and gradients, by blocks of outputs in the cache.

A batch of 256 images has 256 x 65,536 outputs. Written plainly, a step moves about ten tensors of
that size through memory (outputs, soft-maxes, products and gradients). But all that leaves the last
layer is a loss and two gradients:

    s = U_s z_s,  t = U_t z_t            logits (m, B); U is (m, K), with unit rows u = v / |v|
    G = (softmax(s) - softmax(t)) / B    gradient of ce and kl for s; mse has 2 (s - t) / (m B)
    dL/dz_s = U_s^T G,  dL/dU_s = G z_s^T,  dL/dv = (g - (g.u) u) / |v| for each row g of dL/dU_s

so the student's logits are kept once, as (outputs, images), and all else lives for one block of
outputs. A frozen teacher's normaliser comes in precomputed (``rtd.distill``).
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from rtd.losses import kl_terms

BLOCK = 2048  # outputs per block: 2048 x 256 images x 4 bytes = 2 MB, about one core's cache
LOSSES = ("ce", "kl", "mse")


class LastLayerLoss(NamedTuple):
    """Means over the batch as scalar tensors; the last three are None without diagnostics."""

    loss: torch.Tensor
    kl: torch.Tensor | None
    teacher_entropy: torch.Tensor | None
    student_entropy: torch.Tensor | None


def blocks(rows, size, device):
    """Slices of ``size`` of ``rows`` rows; on GPUs, where each launch costs time, a single one."""
    size = size if device.type == "cpu" else rows
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class Workspace:
    """Memory that one call leaves to the next: to get it afresh costs more than to fill it."""

    def __init__(self):
        self.turn = 0  # how many calls have used it
        self._buffers = {}

    def empty(self, name, shape, like):
        """An uninitialised tensor of ``like``'s type, in the memory of the last of this name."""
        size, key = math.prod(shape), (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = like.new_empty(size)
        return buffer[:size].view(shape)


def _by_convolution(a):
    """Whether to form a product with ``a`` as a 1x1 convolution.

    On CPUs oneDNN does those with vectors as wide as the processor has. float32 products of
    matrices go to MKL, which on some AVX-512 processors uses half of that and takes twice as long.
    """
    if a.device.type != "cpu" or a.dtype != torch.float32:
        return False
    cpu = torch.backends.cpu.get_cpu_capability()
    return torch.backends.mkldnn.is_available() and "AVX512" in cpu


@functools.cache
def _wide(dtype, device):
    """{"out_dtype": float32} where torch.mm takes it (on CUDA from torch 2.8), else {}."""
    options, x = {"out_dtype": torch.float32}, torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(x, x, **options)
    except (TypeError, RuntimeError):  # the argument or its kernel is missing
        return {}
    return options


def _image(rows):
    """(P, C) as one image of 1 x P pixels and C channels, channels last, in the same memory."""
    return rows[None, None].permute(0, 3, 1, 2)


def _mm(a, b, out):
    """a @ b, written to ``out``, whose dtype may be another than that of ``a`` and ``b``."""
    if _by_convolution(a):
        return out.copy_(F.conv2d(_image(a), b.T[:, :, None, None])[0, :, 0].T)
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    wide = _wide(a.dtype, a.device)
    return torch.mm(a, b, out=out, **wide) if wide else out.copy_(torch.mm(a, b))


def _mm_transposed(a, b, dtype):
    """a.T @ b, in ``dtype`` if that can be; as a gradient of the weight where ``_mm`` convolves."""
    if _by_convolution(a):
        return conv2d_weight(_image(b), (a.shape[1], b.shape[1], 1, 1), _image(a))[:, :, 0, 0]
    return torch.mm(a.T, b, **({} if a.dtype == dtype else _wide(a.dtype, a.device)))


def _logits(weight, z, dtype, out):
    """(block, K) weights, (B, K) vectors -> (block, B) logits in ``out``, formed in ``dtype``."""
    return _mm(weight.to(dtype), z.to(dtype).T, out[: len(weight)])


def _log_mean_exp(parts, scratch):
    """log(mean(exp(s))) over dim 0 of rows that come in parts, by a running maximum and sum."""
    highest, total, count = torch.full_like(scratch[0], -torch.inf), 0, 0
    for part in parts:
        before, highest = highest, torch.maximum(highest, part.amax(0))
        exp = torch.sub(part, highest, out=scratch[: len(part)]).exp_()
        total = total * (before - highest).exp() + exp.sum(0)
        count += len(part)
    return highest + (total / count).log()


@torch.no_grad()
def output_log_mean_exp(z, weight, dtype=None):
    """(B, K) bottleneck vectors, (m, K) normalised weight -> (B,) log-mean-exp of the outputs.

    dtype: in which the products are formed, by default z's.
    """
    slices, dtype = blocks(len(weight), BLOCK, z.device), dtype or z.dtype
    block = z.new_empty(slices[0].stop, len(z))
    return _log_mean_exp((_logits(weight[rows], z, dtype, block) for rows in slices), block)


def _unit_rows(weight, norm, rows, out):
    """Rows ``rows`` of U = V / |V|, or of V where there is no weight normalisation (norm None)."""
    if norm is None:
        return weight[rows]
    return torch.div(weight[rows], norm[rows], out=out[: rows.stop - rows.start])


def _diagnostics(s, t, lme, lme_t):
    """(3, B): m times a block's sums of KL terms, of p_t t and of p_s s; s, t: (block, B)."""
    log_s, log_t = s - lme, t - lme_t  # log(m p_s), log(m p_t)
    p_s, p_t = log_s.exp(), log_t.exp()  # times m, as everywhere here
    terms = kl_terms(p_s, p_t, log_s.sub_(log_t)), p_t.mul_(t), p_s.mul_(s)
    return torch.stack([term.sum(0) for term in terms])


def _forward_backward(
    z, weight, z_t, weight_t, lme_t, kind, weight_norm, dtype, diagnostics, with_grad, workspace
):
    """Loss, diagnostics, dloss/dz and dloss/dweight; see ``last_layer_loss`` for the arguments."""
    m, batch, norm = len(weight), len(z), None
    if weight_norm:
        norm = weight.norm(dim=1, keepdim=True).clamp_min_(1e-12)  # F.normalize's eps
    slices = blocks(m, BLOCK, z.device)
    logits = workspace.empty("logits", (m, batch), z)
    # each pass works in place on two or three blocks, allocated once
    block_a, block_b = z.new_empty(2, slices[0].stop, batch)
    block_unit = z.new_empty(slices[0].stop, z.shape[1])

    units = ((rows, _unit_rows(weight, norm, rows, block_unit)) for rows in slices)
    parts = (_logits(unit, z, dtype, logits[rows]) for rows, unit in units)
    lme = _log_mean_exp(parts, block_a)

    scale = (2 if kind == "mse" else 1) / (m * batch)
    scaled_z, grad_z, grad_weight = (z * scale).to(dtype), None, None
    if with_grad:
        grad_z, grad_weight = torch.zeros_like(z), workspace.empty("gradient", weight.shape, weight)
    # sums over outputs for each image; value: of m p_t s (ce) or (s - t)^2 (mse)
    value, diagnosed = torch.zeros_like(lme), z.new_zeros(3, batch)
    for rows in slices:
        s = logits[rows]  # (block, B), which turns into m (p_s - p_t), the gradient for s, below
        t = _logits(weight_t[rows], z_t, dtype, block_a)
        product = block_b[: len(s)]
        if diagnostics or kind == "kl":
            diagnosed += _diagnostics(s, t, lme, lme_t)
        if kind == "mse":
            grad = s.sub_(t)
            value += torch.mul(grad, grad, out=product).sum(0)
        else:
            p_t = t.sub_(lme_t).exp_()  # m p_t: of order 1, where p_t is of order 1e-5
            value += torch.mul(p_t, s, out=product).sum(0)
            grad = s.sub_(lme).exp_().sub_(p_t)
        if with_grad:
            unit, grad = _unit_rows(weight, norm, rows, block_unit), grad.to(dtype)
            grad_z += _mm_transposed(grad, unit.to(dtype), z.dtype)
            grad_unit = _mm(grad, scaled_z, out=grad_weight[rows])  # (block, K)
            if weight_norm:  # through u = v / |v|: remove the radial part, divide by the norm
                radial = (grad_unit * unit).sum(1, keepdim=True)
                grad_unit.addcmul_(unit, radial, value=-1).div_(norm[rows])
    if with_grad:
        grad_z *= scale

    def mean_over_images(log_mean_exp, inner):
        return (log_mean_exp - inner / m).mean() + math.log(m)

    kl, inner_t, inner_s = diagnosed
    means = {"ce": mean_over_images(lme, value), "kl": kl.mean() / m, "mse": value.mean() / m}
    extras = None, None, None
    if diagnostics:
        extras = kl.mean() / m, mean_over_images(lme_t, inner_t), mean_over_images(lme, inner_s)
    return LastLayerLoss(means[kind], *extras), grad_z, grad_weight


class _Function(torch.autograd.Function):
    """Forms the gradients in its forward pass, which has the blocks; backward scales them."""

    @staticmethod
    def forward(ctx, z, weight, *arguments):
        ctx.workspace = arguments[-1]
        ctx.workspace.turn = ctx.turn = ctx.workspace.turn + 1
        # not save_for_backward, so that autograd may keep them uncopied
        result, *ctx.gradients = _forward_backward(z, weight, *arguments)
        ctx.mark_non_differentiable(*filter(torch.is_tensor, result[1:]))
        return tuple(result)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.turn != ctx.workspace.turn or torch.is_grad_enabled():  # for second derivatives
            raise RuntimeError(
                "call backward once, without create_graph, before the next loss in a workspace"
            )
        ctx.turn, (grad_z, grad_weight) = None, ctx.gradients
        del ctx.gradients
        return grad_z.mul_(grad_loss), grad_weight.mul_(grad_loss), *(None,) * 9


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
    """Loss between the outputs of the student's and the teacher's last layer, with gradients.

    z, z_t: (B, K) bottleneck vectors of student and teacher. weight: (m, K) the student's raw last
    layer, normalised here unless ``weight_norm`` is False. weight_t: (m, K) the teacher's, already
    normalised (``L2Bottleneck.normalized_weight``). lme_t: (B,) the teacher's
    ``output_log_mean_exp`` where it is known. kind: one of ``LOSSES`` (``rtd.losses``). dtype: in
    which products with the weights are formed, by default z's, which everything else has.
    workspace: a ``Workspace`` to reuse; the next call with it overwrites the weight's gradient.

    Returns a ``LastLayerLoss``. Backward may be called once, as gradients are handed out uncopied.
    It raises RuntimeError for second derivatives, and if another call has used the workspace since.
    """
    if kind not in LOSSES:
        raise ValueError(f"kind must be one of {LOSSES}, not {kind!r}")
    dtype, workspace = dtype or z.dtype, workspace or Workspace()
    if lme_t is None:
        lme_t = output_log_mean_exp(z_t, weight_t, dtype)
    options = kind, weight_norm, dtype, diagnostics, torch.is_grad_enabled(), workspace
    with torch.autocast(z.device.type, enabled=False):
        return LastLayerLoss(*_Function.apply(z, weight, z_t, weight_t, lme_t, *options))
