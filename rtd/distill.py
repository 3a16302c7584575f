"""The distillation loss (section 3, App. A), with what is constant taken out of it.

The teacher is frozen, in eval mode, and images are not augmented, so what it says about an image
never changes: its bottleneck vector (256 numbers, not 65,536 outputs) and the log-mean-exp of its
outputs are computed once, and a step forms the teacher's outputs from them with one product
(``rtd.last_layer``). The student is in train mode: its batch norm, where it has one, sees the
batch. A step of the algorithm is

    distiller(index).loss.backward()
    optimizer.step()
    distiller.after_step()      # drops the gradients; a MovingTeacher follows

Under bf16 the teacher's answers are still computed in float32, and so are the student's first
steps: next to its teacher (alpha = 1e-10) the student differs from it by less than bf16 resolves.
In bf16 its gradient would be zero or all rounding error, which Adam scales up to full steps, from
which VGG11 may not recover.
"""

import torch
import torch.nn.functional as F
from torch import nn

from rtd.data import normalize
from rtd.last_layer import Workspace, last_layer_loss, output_log_mean_exp
from rtd.models import autocast


def adamw(student, lr=0.001, weight_decay=0.0, bias_decay=0.0):
    """The optimizer of App. E.4: AdamW at a constant rate, in the paper without weight decay.

    bias_decay: the weight decay of biases and of norms' gains; the authors' code had torch's 0.01.
    """
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": bias_decay},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


@torch.no_grad()
def teacher_answers(teacher, mean, std, temperature, images, batch_size=256, progress=iter):
    """What ``teacher`` says about (N, 3, H, W) images, in float32 and eval mode: (N, K + 1).

    The first K numbers are the bottleneck vector divided by the temperature, the last is the
    log-mean-exp of the outputs. A million images take 1 GB for K = 256. mean, std: of the images.
    progress: iterates over a list, and may say how far it is.
    """
    teacher.eval()
    weight = teacher.head.l2_bottleneck.normalized_weight()
    answers = weight.new_empty(len(images), weight.shape[1] + 1)
    batches = progress(images.split(batch_size))
    for x, rows in zip(batches, answers.split(batch_size), strict=True):
        z = teacher.bottleneck(normalize(x, mean, std)) / temperature  # (B, K)
        rows[:, :-1], rows[:, -1] = z, output_log_mean_exp(z, weight)
    return answers


class FrozenTeacher:
    """A teacher that never changes, of which only its answers and its last layer are kept."""

    def __init__(self, teacher, answers):
        """answers: (N, K + 1) of ``teacher_answers``, for all training images."""
        self.weight = teacher.head.l2_bottleneck.normalized_weight().detach()
        self.answers = answers

    def answer(self, images, index):
        """(z_t, weight_t, lme_t) for the images ``index``, as ``last_layer_loss`` takes them."""
        answers = self.answers[index]
        return answers[:, :-1], self.weight, answers[:, -1]

    def follow(self, student):
        """Nothing: it is frozen."""


class MovingTeacher:
    """Follows its student after each step: theta_T <- (1 - gamma) theta_T + gamma theta_S."""

    def __init__(self, teacher, gamma, temperature=1.0):
        self.network, self.gamma, self.temperature = teacher.eval(), gamma, temperature

    @torch.no_grad()
    def answer(self, images, index):
        """As ``FrozenTeacher.answer``, but computed now from the normalised ``images``."""
        weight = self.network.head.l2_bottleneck.normalized_weight()
        return self.network.bottleneck(images) / self.temperature, weight, None

    @torch.no_grad()
    def follow(self, student):
        """One step towards ``student``; batch norm's running statistics go along."""
        theta_s = student.state_dict()
        for name, theta_t in self.network.state_dict().items():
            if theta_t.is_floating_point():  # all but the count of batches
                theta_t.lerp_(theta_s[name], self.gamma)


class Distiller(nn.Module):
    """The student and its loss against a teacher, as one module to be trained."""

    def __init__(
        self, student, teacher, data, kind="ce", temperature=1.0, beta=0.0, compiled=False
    ):
        """student: a Network. teacher: a ``FrozenTeacher`` or ``MovingTeacher``.

        data: the ``Dataset``. kind: the loss, see ``rtd.last_layer``. temperature: of the student's
        outputs. beta: weight of the labels' cross-entropy (section 3), in which label c is output c
        of the m, without temperature. compiled: whether the student runs through torch.compile.
        """
        super().__init__()
        self.student, self.teacher, self.data = student, teacher, data
        self.kind, self.temperature, self.beta = kind, temperature, beta
        forward = student.bottleneck
        self._bottleneck = torch.compile(forward, dynamic=False) if compiled else forward
        self._workspace = Workspace()

    def begin_epoch(self, epoch):
        """Nothing: images are not augmented."""

    def after_step(self):
        """Let the teacher follow; drop the gradients, whose memory the next forward pass needs."""
        self.teacher.follow(self.student)
        self.zero_grad()

    def forward(self, index, observe=False, precision="fp32"):
        """(B,) positions of training images -> ``LastLayerLoss``; ``observe`` adds diagnostics."""
        train = self.data.train
        images = self.data.normalize(train.images[index])
        with autocast(images.device, precision):
            z = self._bottleneck(images) / self.temperature  # (B, K)
        last = self.student.head.l2_bottleneck
        weight = last.last_layer.weight
        workspace = self._workspace if weight.grad is None else None  # else it holds that gradient
        dtype = torch.bfloat16 if precision == "bf16" else None  # of products with the weights
        options = self.kind, last.weight_norm, dtype, observe, workspace
        z_t, weight_t, lme_t = self.teacher.answer(images, index)
        result = last_layer_loss(z, weight, z_t, weight_t, lme_t, *options)
        if self.beta:
            logits = F.linear(z * self.temperature, last.normalized_weight())
            labelled = F.cross_entropy(logits, train.labels[index])
            result = result._replace(loss=result.loss + self.beta * labelled)
        return result
