"""One distillation step (paper App. A), with what is constant taken out of it.

The teacher is frozen and the images are not augmented, so what the teacher says about an image never changes: its
bottleneck vector (256 numbers, not 65,536 outputs) and the normaliser of its soft-max are computed once, and a step
forms the teacher's outputs from them with one product (``rtd.last_layer``).

Under bf16 the teacher's answers are still computed in float32, and so are the student's first steps: next to its teacher
(alpha = 1e-10) the student differs from it by less than bf16 resolves. There bf16 gives either a gradient of exactly
zero or, against a float32 teacher, one that is all rounding error, and Adam turns either into a first step from which
VGG11 may not recover.
"""

import torch
import torch.nn.functional as F
from torch import nn

from rtd import checkpoint, distributed
from rtd.data import normalize
from rtd.device import autocast
from rtd.errors import InputError
from rtd.init import init_network_, random_stream
from rtd.last_layer import LastLayerLoss, Workspace, last_layer_loss, output_log_mean_exp
from rtd.models import build_network, materialize


def load_teacher(spec, model, seed):
    """The teacher: a random network, or that of ``spec``, and the normalisation that goes with it (None: the data's).

    spec: None; PATH:NETWORK of a distillation; or PATH:supervised, an encoder that run_lmc.py trained with labels under a
    random head. model: arguments of ``build_network``. Raises InputError for a network that was built otherwise.
    """
    drawn = None
    if spec is None or spec.endswith(":supervised"):
        drawn = init_network_(materialize(build_network(**model)), random_stream(seed, "teacher-init"))
    if spec is None:
        return drawn, None
    if drawn:
        path = spec.rpartition(":")[0]
        contents = checkpoint.load_supervised(path)
    else:
        contents, which = checkpoint.load_spec("--teacher", spec, ["supervised"])
    built = contents["model"]
    expected = ("encoder", "norm", "image_size") if drawn else model
    if odd := [f"{name} {built.get(name)}" for name in expected if built.get(name) != model[name]]:
        raise InputError(f"--teacher {spec}: was built with {', '.join(odd)}; give the same flags")
    if not drawn:
        return checkpoint.load_network(contents, which), contents["data"]
    weights = contents["training"].get("classifier", {})
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    checkpoint.check_state(path, "supervised", encoder, drawn.encoder.state_dict())
    drawn.encoder.load_state_dict(encoder)
    return drawn, contents["data"]


class FrozenTeacher:
    """What the teacher says about each of N images, of which only the bottleneck vector and the normaliser are kept.

    answers: (N, K + 1), K of one and one of the other; for 5 million images and K = 256 that is 5 GB. weight: (m, K) last
    layer, normalised.
    """

    @torch.no_grad()
    def __init__(self, teacher, images, mean, std, temperature=1.0, batch_size=256):
        """``teacher``: a Network, used in eval mode, in float32. images: (N, 3, H, W); mean, std: normalisation."""
        teacher.eval()
        self.weight = teacher.head.l2_bottleneck.normalized_weight().contiguous()

        def answer(part):
            answers = None
            for i, x in enumerate(part.split(batch_size)):
                z = teacher.bottleneck(normalize(x, mean, std)) / temperature
                if answers is None:
                    answers = z.new_empty(len(part), z.shape[1] + 1)
                rows = answers[i * batch_size : (i + 1) * batch_size]
                rows[:, :-1], rows[:, -1] = z, output_log_mean_exp(z, self.weight)
            return answers

        self.answers = distributed.map_rows(answer, images)

    def answer(self, images, index):
        """(z_t, weight_t, lme_t) for the images ``index``, as ``last_layer_loss`` takes them."""
        answers = self.answers[index]
        return answers[:, :-1], self.weight, answers[:, -1]


class MovingTeacher:
    """A teacher that follows its student: theta_T <- (1 - gamma) theta_T + gamma theta_S after each step (section 3)."""

    def __init__(self, teacher, gamma, temperature=1.0):
        self.network, self.gamma, self.temperature = teacher.eval(), gamma, temperature

    @torch.no_grad()
    def answer(self, images, index):
        """As ``FrozenTeacher.answer``, but computed now."""
        return self.network.bottleneck(images) / self.temperature, self.network.head.l2_bottleneck.normalized_weight(), None

    @torch.no_grad()
    def follow(self, student):
        """One step towards ``student``; batch norm's running statistics go along."""
        for theta_t, theta_s in zip(self.network.state_dict().values(), student.state_dict().values(), strict=True):
            if theta_t.is_floating_point():  # all but the count of batches
                theta_t.lerp_(theta_s, self.gamma)


class Distiller(nn.Module):
    """The student and its loss against a teacher, as one module, so that data-parallel training can wrap it."""

    def __init__(self, student, teacher, precision="fp32", kind="ce", compiled=False, temperature=1.0, beta=0.0):
        """student: a Network. teacher: a ``FrozenTeacher`` or ``MovingTeacher``. precision: "fp32", or "bf16" for the student's
        forward pass and the last layer's products. kind: the loss, see ``rtd.last_layer``. compiled: run the student through
        torch.compile; the module that is trained and saved stays the plain one. temperature: of the student's outputs.
        beta: weight of the labels' cross-entropy, as section 3 writes it, without temperature: label c is output c of the m."""
        super().__init__()
        self.student = student
        self.precision, self.kind = precision, kind
        self.temperature, self.beta = temperature, beta
        self._teacher = teacher
        self._bottleneck = torch.compile(student.bottleneck) if compiled else student.bottleneck
        self._workspace = Workspace()

    def forward(self, images, index, diagnostics=False, precision=None, labels=None):
        """images: (B, 3, H, W) normalised; index: (B,) which of the teacher's images they are -> ``LastLayerLoss``.

        labels: (B,), needed where beta is not 0.
        """
        precision = precision or self.precision
        with autocast(images.device, precision):
            z = self._bottleneck(images) / self.temperature  # (B, K)
        last = self.student.head.l2_bottleneck
        weight = last.last_layer.weight
        result = last_layer_loss(
            z,
            weight,
            *self._teacher.answer(images, index),
            kind=self.kind,
            weight_norm=last.weight_norm,
            dtype=torch.bfloat16 if precision == "bf16" else None,
            diagnostics=diagnostics,
            workspace=self._workspace if weight.grad is None else None,  # a gradient that is still there lies in it
        )
        if self.beta:
            labelled = F.cross_entropy(F.linear(z * self.temperature, last.normalized_weight()), labels)
            result = result._replace(loss=result.loss + self.beta * labelled)
        return result


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
def evaluate_start(distiller, data, batch_size):
    """{field of ``LastLayerLoss``: mean over the training images}, with batch statistics as in training, but without a step."""
    buffers = {name: buffer.clone() for name, buffer in distiller.student.named_buffers()}
    distiller.train()
    index = torch.arange(len(data.train), device=data.train.images.device).split(batch_size)
    train = data.train
    results = [distiller(normalize(train.images[i], data.mean, data.std), i, True, "fp32", train.labels[i]) for i in index]
    for name, buffer in distiller.student.named_buffers():  # batch norm has moved its running statistics
        buffer.copy_(buffers[name])
    means = weighted_mean(torch.stack([torch.stack(result) for result in results]), [len(i) for i in index])
    return dict(zip(LastLayerLoss._fields, means.tolist(), strict=True))


def weighted_mean(values, weights):
    """Mean over dim 0 of ``values`` (a tensor) with ``weights`` (a list of numbers)."""
    weights = torch.tensor(weights, device=values.device, dtype=values.dtype)
    return torch.tensordot(weights / weights.sum(), values, dims=1)
