"""Supervised training against independent formulas: augmentation, schedule, SGD."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import functional as TF

from rtd import supervised
from rtd.data import Dataset, Split, normalize
from rtd.init import init_encoder_, random_stream
from rtd.models import build_encoder, materialize
from rtd.supervised import SupervisedLoss, augment, draw_augmentation


def small_data(generator, n=20):
    images = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    train = Split(images, torch.arange(n) % 4)
    return Dataset("made-up", train, train, 4, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def linear_model(generator):
    encoder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.BatchNorm1d(48))
    fc = init_encoder_(materialize(nn.Linear(48, 4, device="meta")), generator)
    return supervised.Classifier(encoder, fc)


def plain_logits(state, images, data):
    """What the linear model says in float64, its batch norm with the batch's moments."""
    x = F.avg_pool2d(normalize(images, data.mean, data.std).double(), 8).flatten(1)
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    x = x * state["encoder.2.weight"] + state["encoder.2.bias"]
    return x @ state["fc.weight"].double().T + state["fc.bias"]


def test_augmentation_is_torchvisions_pad_crop_and_flip(generator):
    images = torch.randint(256, (30, 3, 32, 24), generator=generator, dtype=torch.uint8)
    draws = draw_augmentation(30, generator)
    drawn = [column.unique().tolist() for column in draw_augmentation(300, generator).T]
    assert drawn == [[*range(9)], [*range(9)], [0, 1]]
    result = augment(images, draws)
    for image, (top, left, flip), got in zip(images, draws.tolist(), result, strict=True):
        expected = TF.crop(TF.pad(image, [4, 4, 4, 4]), top, left, 32, 24)
        assert torch.equal(got, TF.hflip(expected) if flip else expected)
    assert result.dtype == torch.uint8 and result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, torch.tensor([[4, 4, 0]]).expand(30, 3)), images)


def test_learning_rate_falls_after_a_half_and_three_quarters():
    found = {n: [supervised.learning_rate(done, n, 1.0) for done in range(n)] for n in (8, 3, 1)}
    falling = [1.0] * 4 + [0.1] * 2 + [0.01] * 2
    assert found == {8: pytest.approx(falling), 3: pytest.approx([1, 1, 0.1]), 1: [1]}
    assert supervised.learning_rate(0, 160) == 0.1


def test_steps_are_plain_sgd_over_augmented_batches_of_which_the_last_is_smaller(generator):
    data, model = small_data(generator), linear_model(generator)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    plain = torch.optim.SGD(weights.values(), 0.05, momentum=0.9, weight_decay=1e-4)
    loss, optimizer = SupervisedLoss(model, data, (7, 2)), supervised.sgd(model, 0.05)
    for epoch in (1, 2):
        loss.begin_epoch(epoch)
        draws = draw_augmentation(20, random_stream(7, 2, "augmentation", epoch))
        for index in torch.randperm(20, generator=generator).split(8):
            logits = plain_logits(weights, augment(data.train.images[index], draws[index]), data)
            values = loss(index)[0], F.cross_entropy(logits, data.train.labels[index])
            assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
            for value, steps in zip(values, (optimizer, plain), strict=True):
                steps.zero_grad()
                value.backward()
                steps.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.double(), weights[name], rtol=1e-4, atol=1e-6)


def test_bf16_stays_near_fp32(generator):
    loss = SupervisedLoss(linear_model(generator), small_data(generator), (0,))
    loss.begin_epoch(1)
    fp32, bf16 = (loss(torch.arange(20), precision=p)[0].item() for p in ("fp32", "bf16"))
    assert fp32 != bf16 == pytest.approx(fp32, rel=0.02)


def test_classifier_keeps_the_encoder_and_draws_fc_from_its_generator_alone(generator):
    architecture = {"encoder": "resnet20", "norm": None, "image_size": 32}
    encoder = init_encoder_(materialize(build_encoder(**architecture)), generator)
    state = encoder.state_dict()
    state["1.running_mean"].add_(1.0)  # buffers come along
    a, b = (
        supervised.build_classifier(architecture, state, 10, generator.manual_seed(4))
        for _ in range(2)
    )
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    for name, value in state.items():
        assert torch.equal(a.encoder.state_dict()[name], value)
    fc = a.fc.weight.detach().flatten()  # U(-1/8, 1/8), for 64 inputs
    assert fc.abs().max() <= 1 / 8 and fc.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
