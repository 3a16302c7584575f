"""Losses at a point against plain float64 formulas; the teacher at KL 0."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rtd import landscape, losses
from rtd.data import Dataset, Split, normalize
from rtd.init import init_student_
from rtd.landscape import MEASURES, Landscape, asymmetry, divergences, teacher_side
from rtd.models import random_network
from rtd.probes import extract_features, probe

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def plain(s, t):
    """The four losses of ``MEASURES`` between logits, of each image: (4, B)."""
    pairs = losses.kl_divergence, losses.cross_entropy, losses.mean_squared_error
    return torch.stack([*(loss(s, t) for loss in pairs), losses.entropy(s)])


@pytest.fixture
def data(generator):
    def split(n):
        images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(n) % 3)

    return Dataset("random", split(23), split(11), 3, MEAN, STD)


def networks(norm="layer"):
    """A random teacher and a student near it, in eval mode."""
    sizes = {"encoder": "resnet20", "out_dim": 300, "hidden_dim": 32, "bottleneck_dim": 16}
    teacher, fresh = (
        random_network(torch.Generator().manual_seed(seed), norm=norm, **sizes).eval()
        for seed in (0, 1)
    )
    return teacher, init_student_(fresh, teacher, 0.3)


def last_layers(generator, batch, outputs, width, distance):
    """Bottleneck vectors and last layers in float64: z, weight, z_t, weight_t."""
    z_t, weight_t, z, weight = (
        torch.randn(n, width, generator=generator, dtype=torch.float64)
        for n in (batch, outputs, batch, outputs)
    )
    student = z_t + distance * z, weight_t + distance * weight
    return [F.normalize(x) for x in (*student, z_t, weight_t)]


def in_float32(*layers):
    single = [x.float() for x in layers]
    return divergences(*single, *teacher_side(*single[2:])).double()


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("block", [100, 300, 1000])
def test_one_pass_gives_the_float64_values(generator, monkeypatch, distance, block):
    monkeypatch.setattr(landscape, "BLOCK", block)
    z, weight, z_t, weight_t = layers = last_layers(generator, 7, 300, 16, distance)
    expected = plain(z @ weight.T, z_t @ weight_t.T).sum(1)
    found = divergences(*layers, *teacher_side(z_t, weight_t))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found, tolerance = in_float32(*layers), 1e-2 if distance < 1e-3 else 1e-4
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-12)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)


def test_a_small_kl_keeps_its_digits(generator):
    """KL 4e-9 of 65,536 outputs in float32, also when all outputs rise, which soft-max undoes."""
    z, weight, z_t, weight_t = last_layers(generator, 3, 2**16, 64, distance=1e-3)
    for rise, tolerance in ((0.0, 5e-5), (0.01, 5e-4)):  # it is 100 times the KL before that
        moved = weight + rise * z.mean(0)
        truth = losses.kl_divergence(z @ moved.T, z_t @ weight_t.T).sum().item()
        assert 1e-9 < truth < 1e-4
        found = in_float32(z, moved, z_t, weight_t)[0].item()
        assert found == pytest.approx(truth, rel=tolerance)


def test_a_large_kl_is_right(generator):
    """Far from the teacher outputs without a norm differ by tens of nats."""
    layers = [8 * x for x in last_layers(generator, 3, 300, 16, distance=1.0)]
    expected = plain(layers[0] @ layers[1].T, layers[2] @ layers[3].T).sum(1)
    assert expected[0] > 20
    torch.testing.assert_close(in_float32(*layers), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder_only", [False, True])
def test_a_point_is_a_mean_and_the_teacher_at_kl_zero(data, encoder_only, precision):
    teacher, student = networks()
    place = Landscape(teacher, data, encoder_only, precision, batch_size=8)
    assert abs(place.evaluate(teacher)["train_kl"]) < 1e-12
    row = place.evaluate(student)
    assert row["train_kl"] > 1e-5
    for split in ("train", "test") * (precision == "fp32"):
        x = normalize(getattr(data, split).images, MEAN, STD)
        with torch.no_grad():
            s, t = ((n.encoder if encoder_only else n)(x).double() for n in (student, teacher))
        found = [row[f"{split}_{name}"] for name in MEASURES]
        assert found == pytest.approx(plain(s, t).mean(1).tolist(), rel=2e-4)


def test_probes_are_those_of_the_encoder_and_what_is_not_finite_is_nan(data):
    teacher, student = networks()
    options = {"probes": ["linear", "knn"], "k": 3, "epochs": 2, "seed": 1}
    row = Landscape(teacher, data).evaluate(student, **options)
    splits = data.train.images, data.test.images
    features = (extract_features(student.encoder, images, MEAN, STD) for images in splits)
    assert {name: row[name] for name in ("linear", "knn")} == probe(*features, data, **options)
    with torch.no_grad():
        student.encoder[0].weight.fill_(float("inf"))
    row = Landscape(teacher, data).evaluate(student, **options)
    assert all(math.isnan(row[name]) for name in ("train_kl", "test_ce", "linear", "knn"))


def test_asymmetry_pairs_points_on_the_axis():
    points = ((-1, 0, 8.0), (1, 0, 2.0), (0, 0, 0.0), (0.5, 0, 1.0), (-1, 1, 9.0))
    rows = [{"x": x, "y": y, "train_kl": kl} for x, y, kl in points]
    assert asymmetry(rows) == [(1, 8.0, 2.0, 4.0)]
    moved = [row | {"y": row["y"] + 1e-9} for row in rows]
    assert asymmetry(moved) == [(1, 8.0, 2.0, 4.0)]
    assert asymmetry([row | {"train_kl": math.nan} for row in rows]) == asymmetry(rows[2:3]) == []
    assert asymmetry([rows[0], rows[1] | {"train_kl": 0.0}]) == []


def test_recomputed_batch_norm_sees_all_classes_in_each_batch(data):
    """Batches of a set sorted by class would miss most of the variance between classes."""
    teacher, student = networks("batch")
    grey = (11 * torch.arange(23)).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 32, 32)
    by_class = replace(data, train=Split(grey, torch.arange(23) // 8))
    place = Landscape(teacher, by_class, batch_size=6)
    place.recompute_batch_norm_(student)
    with torch.no_grad():
        y = student.encoder[0](place.images["train"]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(student.encoder[1].running_mean, y.mean(1), rtol=0.05, atol=0.02)
    torch.testing.assert_close(student.encoder[1].running_var, y.var(1), rtol=0.2, atol=0)
    assert not student.training
