"""The step with the cached teacher against the plain one: teacher forward, log-softmax, AdamW."""

import copy

import pytest
import torch
from torch import nn

from rtd.data import Dataset, Split, normalize
from rtd.distill import (
    Distiller,
    FrozenTeacher,
    MovingTeacher,
    adamw,
    distance,
    evaluate_start,
    teacher_answers,
)
from rtd.init import init_student_
from rtd.last_layer import output_log_mean_exp
from rtd.models import random_network

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pair(name="resnet20", alpha=0.5, dtype=torch.float32, **options):
    """(teacher, student) of a small network; images are cast to its dtype on the way in."""
    options = {"out_dim": 500, "hidden_dim": 48, "bottleneck_dim": 24} | options
    networks = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        network = random_network(generator, encoder=name, **options).to(dtype)
        network.encoder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
        networks.append(network)
    return networks[0].eval(), init_student_(networks[1], networks[0], alpha).train()


def some_data(n, generator, labels=None):
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(n) % 5 if labels is None else labels)
    return Dataset("made-up", split, split, 5, MEAN, STD)


def frozen(teacher, data, temperature=1.0):
    return FrozenTeacher(
        teacher, teacher_answers(teacher, MEAN, STD, temperature, data.train.images)
    )


def plain_loss(teacher, student, x):
    with torch.no_grad():
        p_t = teacher(x).softmax(1)
    return -(p_t * student(x).log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize(
    "bottleneck", ["-/lb/fn/wn/l/-", "-/lb/fn/-/l/-", "wn/lb/-/wn/l/fn", "-/-/-/-/l/fn"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cached_step_is_the_plain_step(generator, dtype, tolerance, bottleneck):
    teacher, student = pair(dtype=dtype, bottleneck=bottleneck)
    twin = copy.deepcopy(student)
    data = some_data(12, generator)
    index = torch.tensor([7, 2, 11, 5, 0])
    x = normalize(data.train.images[index], MEAN, STD)
    expected = plain_loss(teacher, twin, x)
    expected.backward()
    loss = Distiller(student, frozen(teacher, data), data)(index).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for (name, p), q in zip(student.named_parameters(), twin.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max() / q.grad.abs().max().clamp_min(1e-9)
        # a float32 gradient, a difference of probabilities, carries their rounding
        assert error < (100 * tolerance if dtype == torch.float32 else 10 * tolerance), name


def test_gradients_add_up_over_batches_and_are_not_confused(generator):
    """The last layer's gradient lies in memory that the next step uses again, if it is gone."""
    teacher, student = pair("resnet20")
    data = some_data(12, generator)
    distiller = Distiller(student.eval(), frozen(teacher, data), data)
    weight = student.head.l2_bottleneck.last_layer.weight
    batches, single = torch.arange(12).split(6), []
    for index in batches:
        student.zero_grad()
        distiller(index).loss.backward()
        single.append(weight.grad.clone())
    student.zero_grad()
    for index in batches:
        distiller(index).loss.backward()
    torch.testing.assert_close(weight.grad, single[0] + single[1])
    student.zero_grad()
    losses = [distiller(index).loss for index in batches]
    with pytest.raises(RuntimeError, match="same workspace"):
        losses[0].backward()


@pytest.mark.slow
def test_fifty_steps_from_alpha_05_end_at_the_plain_loss(generator):
    teacher, student = pair()
    twin = copy.deepcopy(student)
    data = some_data(64, generator)
    distiller = Distiller(student, frozen(teacher, data), data)
    fused = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    kl = []
    for _ in range(50):
        index = torch.randperm(64, generator=generator)[:16]
        x = normalize(data.train.images[index], MEAN, STD)
        result = distiller(index, observe=True)
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
    data = some_data(16, generator)
    fixed = frozen(teacher, data)
    with torch.no_grad():
        z = teacher.bottleneck(normalize(data.train.images, MEAN, STD))
    torch.testing.assert_close(fixed.answer(None, slice(None))[0], z)
    torch.testing.assert_close(
        fixed.answer(None, slice(None))[2], output_log_mean_exp(z, fixed.weight)
    )
    index = torch.arange(16)
    distiller = Distiller(student, fixed, data)
    kl = {p: distiller(index, True, p).kl.item() for p in ("fp32", "bf16")}
    assert kl["bf16"] == pytest.approx(kl["fp32"], rel=0.1)
    assert kl["bf16"] != kl["fp32"]


@pytest.mark.slow
def test_compiled_student_gives_the_same_loss_and_no_prefixed_weights(generator):
    teacher, student = pair()
    for network in (teacher, student):  # one convolution is compiled in seconds
        network.encoder = nn.Sequential(
            network.encoder[0], nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
    data = some_data(8, generator)
    fixed = frozen(teacher, data)
    index = torch.arange(8)
    twin = copy.deepcopy(student)
    losses = []
    for network, compiled in ((student, False), (twin, True)):
        loss = Distiller(network, fixed, data, compiled=compiled)(index).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert list(student.state_dict()) == list(twin.state_dict())
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-9


def test_a_teacher_that_moves_by_nothing_is_the_frozen_one_and_by_all_the_student(generator):
    teacher, student = pair()
    data, index = some_data(6, generator), torch.arange(6)
    expected = Distiller(student, frozen(teacher, data), data)(index).loss.item()
    for gamma in (0.0, 1.0):
        moving = MovingTeacher(copy.deepcopy(teacher), gamma)
        moving.follow(student)
        moved = moving.network.state_dict()
        like = (student if gamma else teacher).state_dict()
        assert all(torch.equal(moved[name], like[name]) for name in moved if "tracked" not in name)
        if gamma == 0:
            loss = Distiller(student, moving, data)(index).loss.item()
            assert loss == pytest.approx(expected, rel=1e-6)


def test_distance_is_over_encoder_head_and_all():
    teacher, student = pair()
    start = teacher.state_dict()
    found = distance(student, start)
    parts = {"encoder": 0.0, "head": 0.0}
    for name, p in student.named_parameters():
        parts[name.split(".")[0]] += ((p - start[name]).double() ** 2).sum().item()
    assert found["distance_encoder"] == pytest.approx(parts["encoder"] ** 0.5, rel=1e-5)
    assert found["distance_head"] == pytest.approx(parts["head"] ** 0.5, rel=1e-5)
    assert found["distance_total"] == pytest.approx(
        (parts["encoder"] + parts["head"]) ** 0.5, rel=1e-5
    )


def test_adamw_is_what_the_textbook_says(generator):
    """Three steps against the update written out; weights and biases decay by their own rates."""
    _, student = pair(dtype=torch.float64)
    lr, beta1, beta2, eps = 0.01, 0.9, 0.999, 1e-8
    optimizer = adamw(student, lr, weight_decay=0.1, bias_decay=0.02)
    expected = [p.detach().clone() for p in student.parameters()]
    m, v = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for t in range(1, 4):
        for i, p in enumerate(student.parameters()):
            g = p.grad = torch.empty_like(p).normal_(generator=generator)  # laid out as p is
            m[i], v[i] = beta1 * m[i] + (1 - beta1) * g, beta2 * v[i] + (1 - beta2) * g * g
            decay = 0.1 if p.ndim > 1 else 0.02
            step = (m[i] / (1 - beta1**t)) / ((v[i] / (1 - beta2**t)).sqrt() + eps)
            expected[i] = (1 - lr * decay) * expected[i] - lr * step
        optimizer.step()
    for p, q in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-14)


def test_the_start_is_judged_with_batch_statistics_and_changes_nothing(generator):
    teacher, student = pair()
    data = some_data(10, generator)
    before = copy.deepcopy(student.state_dict())
    batches = torch.arange(10).split(6)
    found = evaluate_start(Distiller(student, frozen(teacher, data), data), batches)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    for (loss, kl, entropy, _), index in zip(found, batches, strict=True):
        x = normalize(data.train.images[index], MEAN, STD)
        assert loss.item() == pytest.approx(plain_loss(teacher, student, x).item(), rel=1e-5)
        assert kl.item() == pytest.approx((loss - entropy).item(), rel=1e-2, abs=1e-5)


def test_temperatures_and_labels_enter_the_loss_as_written(generator):
    """d(f_S / tau_S, f_T / tau_T) + beta l(f_S, y), in float64 (section 3)."""
    teacher, student = pair(dtype=torch.float64)
    twin = copy.deepcopy(student)
    labels = torch.tensor([3, 1, 0, 499, 2, 2])
    data = some_data(6, generator, labels)
    index = torch.arange(6)
    x = normalize(data.train.images, MEAN, STD)
    with torch.no_grad():
        p_t = (teacher(x) / 0.5).softmax(1)
    outputs = twin(x) / 0.1
    expected = (
        -(p_t * outputs.log_softmax(1)).sum(1).mean()
        - 0.7 * twin(x).log_softmax(1)[index, labels].mean()
    )
    expected.backward()
    fixed = frozen(teacher, data, temperature=0.5)
    loss = Distiller(student, fixed, data, temperature=0.1, beta=0.7)(index).loss
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
        mean = (
            0.75 * before[name] + 0.25 * student.state_dict()[name]
            if value.is_floating_point()
            else before[name]
        )
        torch.testing.assert_close(value, mean)
    data = some_data(6, generator)
    x, index = normalize(data.train.images, MEAN, STD), torch.arange(6)
    loss = Distiller(student, moving, data)(index).loss
    torch.testing.assert_close(loss, Distiller(student, frozen(teacher, data), data)(index).loss)
    torch.testing.assert_close(loss, plain_loss(teacher, student, x))
