"""Supervised training against independent formulas: augmentation, schedule, SGD."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import functional as TF

from rtd.data import Dataset, Split, normalize
from rtd.init import init_encoder_, random_stream
from rtd.models import build_encoder, materialize
from rtd.probes import extract_features
from rtd.supervised import (
    Classifier,
    SupervisedLoss,
    augment,
    build_classifier,
    draw_augmentation,
    empty_classifier,
    learning_rate,
    sgd,
)


def small_data(generator, n=20):
    images = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    train = Split(images, torch.arange(n) % 4)
    return Dataset("made-up", train, train, 4, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def linear_model(generator):
    encoder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.BatchNorm1d(48))
    fc = init_encoder_(materialize(nn.Linear(48, 4, device="meta")), generator)
    return Classifier(encoder, fc)


def plain_logits(state, images, data, moments=None):
    """What the linear model says in float64; moments: of its batch norm, by default the batch's."""
    x = F.avg_pool2d(normalize(images, data.mean, data.std).double(), 8).flatten(1)
    mean, variance = moments or (x.mean(0), x.var(0, unbiased=False))
    x = (x - mean) / (variance + 1e-5).sqrt()
    x = x * state["encoder.2.weight"] + state["encoder.2.bias"]
    return x @ state["fc.weight"].double().T + state["fc.bias"]


def test_augmentation_is_torchvisions_pad_crop_and_flip(generator):
    images = torch.randint(256, (30, 3, 32, 24), generator=generator, dtype=torch.uint8)
    draws = draw_augmentation(30, generator)
    result = augment(images, draws)
    for image, (top, left, flip), got in zip(images, draws.tolist(), result, strict=True):
        expected = TF.crop(TF.pad(image, [4, 4, 4, 4]), top, left, 32, 24)
        assert torch.equal(got, TF.hflip(expected) if flip else expected)
    assert result.dtype == torch.uint8 and result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, torch.tensor([[4, 4, 0]]).expand(30, 3)), images)


def test_augmentation_draws_all_offsets_evenly(generator):
    draws = draw_augmentation(9000, generator).numpy()
    for column, values in ((0, 9), (1, 9), (2, 2)):
        counts, expected = np.bincount(draws[:, column]), 9000 / values
        assert len(counts) == values
        assert abs(counts - expected).max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("epochs", [160, 8, 3, 1])
def test_learning_rate_falls_after_a_half_and_three_quarters(epochs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    milestones = [math.ceil(epochs / 2), math.ceil(3 * epochs / 4)]  # 80 and 120 of 160
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for epoch in range(epochs):
        expected = pytest.approx(schedule.get_last_lr()[0])
        assert learning_rate(epoch, epochs) == learning_rate(epoch, epochs, 0.1) == expected
        optimizer.step()
        schedule.step()


def test_steps_are_sgd_by_hand(generator):
    """v <- 0.9 v + g + 1e-4 w, w <- w - lr v, over augmented batches; the last batch is smaller."""
    data, model = small_data(generator), linear_model(generator)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    loss, optimizer = SupervisedLoss(model, data, (7, 2)), sgd(model, 0.05)
    for epoch in (1, 2):
        loss.begin_epoch(epoch)
        draws = draw_augmentation(20, random_stream(7, 2, "augmentation", epoch))
        for index in torch.randperm(20, generator=generator).split(8):
            optimizer.zero_grad()
            value = loss(index)[0]
            value.backward()
            optimizer.step()
            logits = plain_logits(weights, augment(data.train.images[index], draws[index]), data)
            expected = F.nll_loss(F.log_softmax(logits, 1), data.train.labels[index])
            assert value.item() == pytest.approx(expected.item(), rel=1e-5)
            gradients = torch.autograd.grad(expected, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                velocity[name] = 0.9 * velocity[name] + gradient + 1e-4 * weights[name].detach()
                weights[name] = (weights[name] - 0.05 * velocity[name]).detach().requires_grad_()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.double(), weights[name], rtol=1e-4, atol=1e-6)


def test_predictions_are_in_eval_mode_and_leave_the_classifier_alone(generator):
    data, model = small_data(generator), linear_model(generator).train()
    model.encoder[2].running_mean.normal_(generator=generator)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = extract_features(model, data.train.images, data.mean, data.std, batch_size=6)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    moments = before["encoder.2.running_mean"], before["encoder.2.running_var"]
    expected = plain_logits(before, data.train.images, data, moments)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)


def test_bf16_stays_near_fp32(generator):
    loss = SupervisedLoss(linear_model(generator), small_data(generator), (0,))
    loss.begin_epoch(1)
    fp32, bf16 = (loss(torch.arange(20), precision=p)[0].item() for p in ("fp32", "bf16"))
    assert fp32 != bf16 == pytest.approx(fp32, rel=0.02)


def test_classifier_keeps_the_encoder_and_draws_fc_from_its_generator_alone(generator):
    architecture = {"encoder": "resnet20", "norm": None, "image_size": 32}
    encoder = init_encoder_(materialize(build_encoder(**architecture)), generator)
    encoder.state_dict()["1.running_mean"].add_(1.0)  # buffers come along
    a, b = (
        build_classifier(architecture, encoder.state_dict(), 10, torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    for name, value in encoder.state_dict().items():
        assert torch.equal(a.encoder.state_dict()[name], value)
    fc = a.fc.weight.detach().flatten()  # U(-1/8, 1/8), for 64 inputs
    assert fc.abs().max() <= 1 / 8 and fc.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert empty_classifier(architecture | {"encoder": "vgg11"}, 7).fc.weight.shape == (7, 512)
