"""The step with the cached teacher against the plain one: teacher forward every time, log-softmax on both sides, AdamW."""

import copy

import pytest
import torch
from torch import nn

from rtd.data import normalize
from rtd.distill import Distiller, FrozenTeacher, MovingTeacher, distance
from rtd.init import init_network_, init_student_
from rtd.last_layer import output_log_mean_exp
from rtd.models import build_network, materialize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pair(name="resnet20", alpha=0.5, dtype=torch.float32, **options):
    """(teacher, student) of a small network; images are cast to its dtype on the way in."""
    networks = []
    for seed in (0, 1):
        network = materialize(build_network(name, **{"out_dim": 500, "hidden_dim": 48, "bottleneck_dim": 24, **options}))
        init_network_(network, torch.Generator().manual_seed(seed)).to(dtype)
        network.encoder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
        networks.append(network)
    return networks[0].eval(), init_student_(networks[1], networks[0], alpha).train()


def some_images(n, generator):
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


def plain_loss(teacher, student, x):
    with torch.no_grad():
        p_t = teacher(x).softmax(1)
    return -(p_t * student(x).log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("bottleneck", ["-/lb/fn/wn/l/-", "-/lb/fn/-/l/-", "wn/lb/-/wn/l/fn", "-/-/-/-/l/fn"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cached_step_is_the_plain_step(generator, dtype, tolerance, bottleneck):
    teacher, student = pair(dtype=dtype, bottleneck=bottleneck)
    twin = copy.deepcopy(student)
    images = some_images(12, generator)
    index = torch.tensor([7, 2, 11, 5, 0])
    x = normalize(images[index], MEAN, STD)
    expected = plain_loss(teacher, twin, x)
    expected.backward()
    loss = Distiller(student, FrozenTeacher(teacher, images, MEAN, STD))(x, index).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for (name, p), q in zip(student.named_parameters(), twin.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max() / q.grad.abs().max().clamp_min(1e-9)
        # a float32 gradient that is a difference of probabilities carries their rounding: hence the float64 run
        assert error < (100 * tolerance if dtype == torch.float32 else 10 * tolerance), name


def test_gradients_add_up_over_batches_and_are_not_confused(generator):
    """The last layer's gradient lies in memory that the next step uses again, unless it is still there."""
    teacher, student = pair("resnet20")
    images = some_images(12, generator)
    distiller = Distiller(student.eval(), FrozenTeacher(teacher, images, MEAN, STD))
    weight = student.head.l2_bottleneck.last_layer.weight
    batches, single = torch.arange(12).split(6), []
    for index in batches:
        student.zero_grad()
        distiller(normalize(images[index], MEAN, STD), index).loss.backward()
        single.append(weight.grad.clone())
    student.zero_grad()
    for index in batches:
        distiller(normalize(images[index], MEAN, STD), index).loss.backward()
    torch.testing.assert_close(weight.grad, single[0] + single[1])
    student.zero_grad()
    losses = [distiller(normalize(images[index], MEAN, STD), index).loss for index in batches]
    with pytest.raises(RuntimeError, match="same workspace"):
        losses[0].backward()


@pytest.mark.slow
def test_fifty_steps_from_alpha_05_end_at_the_plain_loss(generator):
    teacher, student = pair()
    twin = copy.deepcopy(student)
    images = some_images(64, generator)
    distiller = Distiller(student, FrozenTeacher(teacher, images, MEAN, STD))
    fused = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    kl = []
    for _ in range(50):
        index = torch.randperm(64, generator=generator)[:16]
        x = normalize(images[index], MEAN, STD)
        result = distiller(x, index, diagnostics=True)
        expected = plain_loss(teacher, twin, x)
        for optimizer, loss in ((fused, result.loss), (plain, expected)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        kl.append(result.kl.item())
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-3)
    entropy = result.teacher_entropy.item()
    assert result.kl.item() == pytest.approx(expected.item() - entropy, rel=0.02, abs=2e-6)
    assert kl[-1] < kl[0] / 2  # and there was something to learn


def test_bf16_changes_the_loss_little_and_the_teachers_side_not_at_all(generator):
    teacher, student = pair(dtype=torch.float32)
    images = some_images(16, generator)
    frozen = FrozenTeacher(teacher, images, MEAN, STD)
    with torch.no_grad():
        z = teacher.bottleneck(normalize(images, MEAN, STD))
    torch.testing.assert_close(frozen.answer(None, slice(None))[0], z)
    torch.testing.assert_close(frozen.answer(None, slice(None))[2], output_log_mean_exp(z, frozen.weight))
    index = torch.arange(16)
    x = normalize(images, MEAN, STD)
    kl = {p: Distiller(student, frozen, p)(x, index, diagnostics=True).kl.item() for p in ("fp32", "bf16")}
    assert kl["bf16"] == pytest.approx(kl["fp32"], rel=0.1)
    assert kl["bf16"] != kl["fp32"]


@pytest.mark.slow
def test_compiled_student_gives_the_same_loss_and_no_prefixed_weights(generator):
    teacher, student = pair()
    for network in (teacher, student):  # one convolution is compiled in seconds
        network.encoder = nn.Sequential(network.encoder[0], nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    images = some_images(8, generator)
    frozen = FrozenTeacher(teacher, images, MEAN, STD)
    x, index = normalize(images, MEAN, STD), torch.arange(8)
    twin = copy.deepcopy(student)
    losses = []
    for network, compiled in ((student, False), (twin, True)):
        loss = Distiller(network, frozen, compiled=compiled)(x, index).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert list(student.state_dict()) == list(twin.state_dict())
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-9


def test_a_teacher_that_moves_by_nothing_is_the_frozen_one_and_by_all_the_student(generator):
    teacher, student = pair()
    images, index = some_images(6, generator), torch.arange(6)
    x = normalize(images, MEAN, STD)
    frozen = Distiller(student, FrozenTeacher(teacher, images, MEAN, STD))(x, index).loss.item()
    for gamma in (0.0, 1.0):
        moving = MovingTeacher(copy.deepcopy(teacher), gamma)
        moving.follow(student)
        moved = moving.network.state_dict()
        like = (student if gamma else teacher).state_dict()
        assert all(torch.equal(moved[name], like[name]) for name in moved if "tracked" not in name)
        if gamma == 0:
            assert Distiller(student, moving)(x, index).loss.item() == pytest.approx(frozen, rel=1e-6)


def test_distance_is_over_encoder_head_and_all():
    teacher, student = pair()
    start = teacher.state_dict()
    found = distance(student, start)
    parts = {"encoder": 0.0, "head": 0.0}
    for name, p in student.named_parameters():
        parts[name.split(".")[0]] += ((p - start[name]).double() ** 2).sum().item()
    assert found["distance_encoder"] == pytest.approx(parts["encoder"] ** 0.5, rel=1e-5)
    assert found["distance_head"] == pytest.approx(parts["head"] ** 0.5, rel=1e-5)
    assert found["distance_total"] == pytest.approx((parts["encoder"] + parts["head"]) ** 0.5, rel=1e-5)


def test_adamw_is_what_the_textbook_says(generator):
    """Three steps of the optimizer as run_distill.py makes it, against the update written out in numpy, in float64."""
    parameter = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    gradients = torch.randn(3, 7, 5, dtype=torch.float64, generator=generator)
    lr, decay, beta1, beta2, eps = 0.01, 0.1, 0.9, 0.999, 1e-8
    theta, m, v = parameter.numpy().copy(), 0.0, 0.0
    optimizer = torch.optim.AdamW([{"params": [parameter], "weight_decay": decay}], lr=lr, fused=True)
    for t, gradient in enumerate(gradients, start=1):
        parameter.grad = gradient
        optimizer.step()
        g = gradient.numpy()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        theta = (1 - lr * decay) * theta - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + eps)
        torch.testing.assert_close(parameter, torch.from_numpy(theta), rtol=1e-12, atol=1e-14)


def test_temperatures_and_labels_enter_the_loss_as_written(generator):
    """d(f_S / tau_S, f_T / tau_T) + beta l(f_S, y), in float64 (section 3)."""
    teacher, student = pair(dtype=torch.float64)
    twin = copy.deepcopy(student)
    images, labels = some_images(6, generator), torch.tensor([3, 1, 0, 499, 2, 2])
    index = torch.arange(6)
    x = normalize(images, MEAN, STD)
    with torch.no_grad():
        p_t = (teacher(x) / 0.5).softmax(1)
    outputs = twin(x) / 0.1
    expected = -(p_t * outputs.log_softmax(1)).sum(1).mean() - 0.7 * twin(x).log_softmax(1)[index, labels].mean()
    expected.backward()
    frozen = FrozenTeacher(teacher, images, MEAN, STD, temperature=0.5)
    loss = Distiller(student, frozen, temperature=0.1, beta=0.7)(x, index, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13)


def test_a_teacher_that_moves_answers_anew_and_follows_its_student(generator):
    teacher, student = pair(dtype=torch.float64)
    moving = MovingTeacher(teacher, 0.25)
    before = copy.deepcopy(teacher.state_dict())
    for value in student.buffers():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator))
    moving.follow(student)
    for name, value in teacher.state_dict().items():
        mean = 0.75 * before[name] + 0.25 * student.state_dict()[name] if value.is_floating_point() else before[name]
        torch.testing.assert_close(value, mean)
    images = some_images(6, generator)
    x, index = normalize(images, MEAN, STD), torch.arange(6)
    loss = Distiller(student, moving)(x, index).loss
    torch.testing.assert_close(loss, Distiller(student, FrozenTeacher(teacher, images, MEAN, STD))(x, index).loss)
    torch.testing.assert_close(loss, plain_loss(teacher, student, x))
