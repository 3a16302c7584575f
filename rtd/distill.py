"""One distillation step (paper App. A), with what is constant taken out of it.

The teacher is frozen and the images are not augmented, so what the teacher says about an image never changes: its
bottleneck vector (256 numbers, not 65,536 outputs) and the normaliser of its soft-max are computed once, and a step
forms the teacher's outputs from them with one product (``rtd.last_layer``).

Under bf16 the teacher's side is still computed in float32, and so are the student's first steps: next to its teacher
(alpha = 1e-10) the student differs from it by less than bf16 resolves. There bf16 gives either a gradient of exactly
zero or, against a float32 teacher, one that is all rounding error, and Adam turns either into a first step from which
VGG11 may not recover.
"""

import torch
from torch import nn

from rtd import distributed
from rtd.data import normalize
from rtd.device import autocast
from rtd.last_layer import LastLayerLoss, last_layer_loss, output_log_mean_exp


class FrozenTeacher:
    """What the teacher says about each of N images.

    bottleneck: (N, K) unit vectors. log_mean_exp: (N,). weight: (m, K) last layer, normalised.
    """

    @torch.no_grad()
    def __init__(self, teacher, images, mean, std, batch_size=256):
        """``teacher``: a Network, used in eval mode, in float32. images: (N, 3, H, W) uint8; mean, std: normalisation."""
        teacher.eval()
        self.weight = teacher.head.l2_bottleneck.normalized_weight().contiguous()

        def answer(part):
            rows = []
            for x in part.split(batch_size):
                z = teacher.bottleneck(normalize(x, mean, std))
                rows.append(torch.cat([z, output_log_mean_exp(z, self.weight).unsqueeze(1)], dim=1))
            return torch.cat(rows)

        answers = distributed.map_rows(answer, images)
        self.bottleneck, self.log_mean_exp = answers[:, :-1].contiguous(), answers[:, -1].contiguous()


class Distiller(nn.Module):
    """The student and its loss against a frozen teacher, as one module, so that data-parallel training can wrap it."""

    def __init__(self, student, teacher, precision="fp32", kind="ce", compiled=False):
        """student: a Network. teacher: a ``FrozenTeacher``. precision: "fp32", or "bf16" for the student's forward pass and
        the last layer's products. kind: the loss, see ``rtd.last_layer``. compiled: run the student through
        torch.compile; the module that is trained and saved stays the plain one."""
        super().__init__()
        self.student = student
        self.precision, self.kind = precision, kind
        self._teacher = teacher
        self._bottleneck = torch.compile(student.bottleneck) if compiled else student.bottleneck
        self._workspace = None

    def forward(self, images, index, diagnostics=False, precision=None):
        """images: (B, 3, H, W) normalised; index: (B,) which of the teacher's images they are -> ``LastLayerLoss``."""
        precision = precision or self.precision
        with autocast(images.device, precision):
            z = self._bottleneck(images)  # (B, K)
        weight = self.student.head.l2_bottleneck.last_layer.weight
        if self._workspace is None or self._workspace.numel() < len(weight) * len(z):
            self._workspace = z.new_empty(len(weight) * len(z))
        return last_layer_loss(
            z,
            weight,
            self._teacher.bottleneck[index],
            self._teacher.weight,
            self._teacher.log_mean_exp[index],
            kind=self.kind,
            weight_norm=self.student.head.l2_bottleneck.weight_norm,
            dtype=torch.bfloat16 if precision == "bf16" else None,
            diagnostics=diagnostics,
            workspace=self._workspace,
        )


@torch.no_grad()
def distance(network, start):
    """|theta - theta_start|_2 over the parameters of encoder, head and all (App. D, Fig. 17): distance_encoder, _head, _total.

    ``start``: the network's state dict at the start.
    """
    squares = {"encoder": 0.0, "head": 0.0}
    for name, parameter in network.named_parameters():
        difference = parameter - start[name].to(parameter.device)
        squares[name.split(".")[0]] += difference.square().sum().item()  # pairwise summation; vector_norm's is plainer
    return {f"distance_{part}": value**0.5 for part, value in (squares | {"total": sum(squares.values())}).items()}


@torch.no_grad()
def evaluate_start(distiller, data, batch_size=256):
    """{field of ``LastLayerLoss``: mean over the training images}, with batch statistics as in training, but without a step."""
    buffers = {name: buffer.clone() for name, buffer in distiller.student.named_buffers()}
    distiller.train()
    index = torch.arange(len(data.train), device=data.train.images.device).split(batch_size)
    results = [distiller(normalize(data.train.images[i], data.mean, data.std), i, True, "fp32") for i in index]
    for name, buffer in distiller.student.named_buffers():  # batch norm has moved its running statistics
        buffer.copy_(buffers[name])
    means = weighted_mean(torch.stack([torch.stack(result) for result in results]), [len(i) for i in index])
    return dict(zip(LastLayerLoss._fields, means.tolist(), strict=True))


def weighted_mean(values, weights):
    """Mean over dim 0 of ``values`` (a tensor) with ``weights`` (a list of numbers)."""
    weights = torch.tensor(weights, device=values.device, dtype=values.dtype)
    return torch.tensordot(weights / weights.sum(), values, dims=1)
