"""The step with the cached teacher against the plain one: teacher forward, log-softmax."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rtd.data import Dataset, Split, normalize
from rtd.distill import Distiller, FrozenTeacher, MovingTeacher, teacher_answers
from rtd.harness.distributed import World
from rtd.harness.training import Training
from rtd.init import init_student_
from rtd.models import random_network

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PAPERS = "-/lb/fn/wn/l/-"


def small(generator, n, dtype=torch.float32, bottleneck=PAPERS, tau_t=1.0, **options):
    """A teacher, a student's loss against it and n normalised images; the labels are outputs."""
    sizes = {"out_dim": 500, "hidden_dim": 48, "bottleneck_dim": 24, "bottleneck": bottleneck}
    networks = []
    for seed in (0, 1):
        draws = torch.Generator().manual_seed(seed)
        networks.append(random_network(draws, encoder="resnet20", **sizes).to(dtype))
        networks[-1].encoder.register_forward_pre_hook(lambda _, x: (x[0].to(dtype),))
    teacher, student = networks[0].eval(), init_student_(networks[1], networks[0], 0.5).train()
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, 499 - torch.arange(n) % 5)
    data = Dataset("made-up", split, split, 500, MEAN, STD)
    distiller = Distiller(student, frozen(teacher, data, tau_t), data, **options)
    return teacher, distiller, normalize(images, MEAN, STD)


def frozen(teacher, data, temperature=1.0):
    answers = teacher_answers(teacher, MEAN, STD, temperature, data.train.images)
    return FrozenTeacher(teacher, answers)


def plain_loss(teacher, student, x, labels=None, tau_t=1.0, temperature=1.0, beta=0.0):
    """d(f_S / tau_S, f_T / tau_T) + beta l(f_S, y), as section 3 writes it."""
    with torch.no_grad():
        p_t = (teacher(x) / tau_t).softmax(1)
    outputs = student(x)
    loss = -(p_t * (outputs / temperature).log_softmax(1)).sum(1).mean()
    if beta:
        loss = loss - beta * outputs.log_softmax(1)[torch.arange(len(x)), labels].mean()
    return loss


def assert_gradients_are_close(found, expected, tolerance):
    """Of each parameter, relative to its largest entry."""
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max() / q.grad.abs().max().clamp_min(1e-9)
        assert error < tolerance, name


OTHERS = ["-/lb/fn/-/l/-", "wn/lb/-/wn/l/fn", "-/-/-/-/l/fn"]
OPTIONS = {"tau_t": 0.5, "temperature": 0.1, "beta": 0.7}


@pytest.mark.parametrize(
    ("bottleneck", "options"), [(PAPERS, {}), *((slots, {}) for slots in OTHERS), (PAPERS, OPTIONS)]
)
@pytest.mark.parametrize(  # a float32 gradient, a difference of probabilities, has their rounding
    ("dtype", "tolerance", "of_gradients"),
    [(torch.float64, 1e-12, 1e-11), (torch.float32, 1e-5, 1e-3)],
)
def test_the_step_is_the_plain_one(generator, dtype, tolerance, of_gradients, bottleneck, options):
    teacher, distiller, x = small(generator, 12, dtype, bottleneck, **options)
    twin = copy.deepcopy(distiller.student)
    index = torch.tensor([7, 2, 11, 5, 0])
    expected = plain_loss(teacher, twin, x[index], distiller.data.train.labels[index], **options)
    expected.backward()
    loss = distiller(index).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert_gradients_are_close(distiller.student, twin, of_gradients)


def test_gradients_add_up_over_batches_and_are_not_confused(generator):
    """The last layer's gradient lies in memory that the next step uses again, if it is gone."""
    _, distiller, _ = small(generator, 12)
    weight = distiller.eval().student.head.l2_bottleneck.last_layer.weight
    batches, single = torch.arange(12).split(6), []
    for index in batches:
        distiller.zero_grad()
        distiller(index).loss.backward()
        single.append(weight.grad.clone())
    distiller.zero_grad()
    for index in batches:
        distiller(index).loss.backward()
    torch.testing.assert_close(weight.grad, single[0] + single[1])
    distiller.zero_grad()
    losses = [distiller(index).loss for index in batches]
    with pytest.raises(RuntimeError, match="call backward once"):
        losses[0].backward()


def test_bf16_changes_the_loss_little_and_the_teachers_side_not_at_all(generator):
    teacher, distiller, x = small(generator, 16)
    index = torch.arange(16)
    fp32, bf16 = (distiller(index, True, p).kl.item() for p in ("fp32", "bf16"))
    assert fp32 != bf16 == pytest.approx(fp32, rel=0.1)
    z, _, log_mean_exp = distiller.teacher.answer(None, index)
    with torch.no_grad():
        torch.testing.assert_close(z, teacher.bottleneck(x))
        torch.testing.assert_close(log_mean_exp, teacher(x).exp().mean(1).log())


@pytest.mark.slow
def test_compiled_student_gives_the_same_loss_and_no_prefixed_weights(generator):
    teacher, distiller, _ = small(generator, 8)
    student, data, losses = distiller.student, distiller.data, []
    for network in (teacher, student):  # one convolution is compiled in seconds
        first = network.encoder[0]
        network.encoder = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    fixed, twin = frozen(teacher, data), copy.deepcopy(student)
    for network, compiled in ((student, False), (twin, True)):
        loss = Distiller(network, fixed, data, compiled=compiled)(torch.arange(8)).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert list(student.state_dict()) == list(twin.state_dict())
    assert_gradients_are_close(twin, student, 1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_a_teacher_that_moves_follows_its_student_and_answers_anew(generator, gamma):
    """By nothing it is the frozen one, by all the student."""
    teacher, distiller, x = small(generator, 6, torch.float64)
    student, data, index = distiller.student, distiller.data, torch.arange(6)
    for value in student.buffers():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator))
    before, after = copy.deepcopy(teacher.state_dict()), student.state_dict()
    moving = MovingTeacher(teacher, gamma)
    moving.follow(student)
    for name, value in moving.network.state_dict().items():
        share = gamma if value.is_floating_point() else 0
        exact = {"rtol": 0, "atol": 0} if share in (0, 1) else {}
        expected = (1 - share) * before[name] + share * after[name]
        torch.testing.assert_close(value, expected.to(value.dtype), **exact)
    loss = Distiller(student, moving, data)(index).loss
    fixed = frozen(moving.network, data)
    torch.testing.assert_close(loss, Distiller(student, fixed, data)(index).loss)
    torch.testing.assert_close(loss, plain_loss(moving.network, student, x))


def test_the_start_is_judged_with_batch_statistics_and_changes_nothing(generator):
    teacher, distiller, x = small(generator, 10)
    student, args = distiller.student, SimpleNamespace(batch_size=6)
    before = copy.deepcopy(student.state_dict())
    run = SimpleNamespace(args=args, world=World(), device=torch.device("cpu"))
    loss, kl, entropy, _ = Training(distiller, None, (0,), run, "").evaluate_start()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    parts = torch.arange(10).split(6)
    expected = sum(len(i) * plain_loss(teacher, student, x[i]).item() for i in parts) / 10
    assert loss == pytest.approx(expected, rel=1e-5)
    assert kl == pytest.approx(loss - entropy, rel=1e-2, abs=1e-5)
