"""Probes against brute force and scikit-learn, and the protocol's fine print."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from rtd import probes
from rtd.data import Dataset, Split, normalize
from rtd.datasets import load_digits
from rtd.errors import InputError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def clusters(generator, n=600, dim=20, classes=4, spread=0.5):
    """Gaussian clusters: ((train_x, train_y), (test_x, test_y))."""
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(2 * n) % classes
    x = centres[labels] + spread * torch.randn(2 * n, dim, generator=generator)
    return (x[:n], labels[:n]), (x[n:], labels[n:])


def test_knn_equals_brute_force(generator):
    (train_x, train_y), (test_x, test_y) = clusters(generator, n=200, spread=2.0)
    for k in (1, 5, 20, 200):
        distances = ((test_x.double().numpy()[:, None] - train_x.double().numpy()[None]) ** 2).sum(2)
        votes = train_y.numpy()[np.argsort(distances, axis=1)[:, :k]]
        predicted = np.array([np.bincount(row, minlength=4).argmax() for row in votes])
        assert probes.knn_probe(train_x, train_y, test_x, test_y, k) == pytest.approx(100 * (predicted == test_y.numpy()).mean())


def test_knn_does_not_normalise(generator):
    """Two classes that differ in length alone: Euclidean neighbours tell them apart, cosine ones could not."""
    direction = torch.ones(1, 8)
    x = torch.cat([direction * s for s in torch.linspace(1, 2, 50)] + [direction * s for s in torch.linspace(5, 6, 50)])
    y = torch.arange(100) // 50
    assert probes.knn_probe(x, y, x, y, k=5) == 100


@pytest.mark.parametrize("k", [0, 601])
def test_k_outside_the_data_is_refused(generator, k):
    (train_x, train_y), (test_x, test_y) = clusters(generator)
    with pytest.raises(InputError, match="--k"):
        probes.knn_probe(train_x, train_y, test_x, test_y, k)


def test_linear_probe_agrees_with_logistic_regression_on_separable_data(generator):
    (train_x, train_y), (test_x, test_y) = clusters(generator, n=3000, spread=0.9)
    reference = 100 * LogisticRegression(max_iter=1000).fit(train_x, train_y).score(test_x, test_y)
    found = probes.linear_probe(train_x, train_y, test_x, test_y, 4, generator, epochs=100)
    assert reference > 90
    assert found == pytest.approx(reference, abs=1.0)


def test_linear_probe_is_torchs_linear_layer_under_adamw(generator, monkeypatch):
    """The same steps through nn.Linear and torch's default AdamW, from the same draws."""
    (train_x, train_y), (test_x, test_y) = clusters(generator, n=300, spread=2.0)
    draws = torch.Generator().manual_seed(5)
    layer = nn.Linear(20, 4, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(20**-0.5), 20**-0.5, generator=draws)
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(30):
        for batch in torch.randperm(300, generator=draws).split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
    trained, plain = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda layer, **options: trained.extend(layer) or plain(layer, **options))
    found = probes.linear_probe(train_x, train_y, test_x, test_y, 4, torch.Generator().manual_seed(5), epochs=30)
    for ours, expected in zip(trained, layer.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert found == pytest.approx(100 * (layer(test_x).argmax(1) == test_y).float().mean().item())


def test_linear_probe_trains_even_where_gradients_are_off(generator):
    (train_x, train_y), (test_x, test_y) = clusters(generator)
    with torch.no_grad():
        assert probes.linear_probe(train_x, train_y, test_x, test_y, 4, generator, epochs=40) > 80


class Halves(nn.Module):
    """An encoder that shows its mode: mean colour, plus 1000 in training mode."""

    def forward(self, x):
        return x.mean((2, 3)) + 1000 * self.training


def test_features_are_extracted_in_eval_mode_and_the_mode_is_restored(generator):
    images = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8, generator=generator)
    for mode in (True, False):
        encoder = Halves().train(mode)
        features = probes.extract_features(encoder, images, MEAN, STD, batch_size=3)
        assert encoder.training is mode
        torch.testing.assert_close(features, normalize(images, MEAN, STD).mean((2, 3)))
    assert not features.requires_grad


def test_probing_depends_on_seed_and_name_alone(generator):
    (train_x, train_y), (test_x, test_y) = clusters(generator, spread=2.5)
    data = Dataset("made", Split(train_x, train_y), Split(test_x, test_y), 4, MEAN, STD)

    def linear(**options):
        return probes.probe(train_x, test_x, data, probes=("linear",), **options)["linear"]

    assert linear(seed=0, name="a") == linear(seed=0, name="a")
    others = {linear(seed=seed, name=name) for seed in (0, 1, 2) for name in "abc"}
    assert len(others) > 3


def test_standardize_uses_the_training_split_alone(generator):
    train_x, test_x = 3 + 2 * torch.randn(500, 4, generator=generator), torch.randn(50, 4, generator=generator)
    a, b = probes.standardize(train_x, test_x)
    torch.testing.assert_close(a.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.std(0), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(b, (test_x - train_x.mean(0)) / train_x.std(0))


def test_standardize_leaves_dimensions_that_do_not_vary(generator):
    train_x = torch.stack([torch.full((100,), 0.1), torch.randn(100, generator=generator), torch.zeros(100)], 1)
    a, b = probes.standardize(train_x, train_x[:10] + 1e-4)
    assert a.abs().max() < 10 and b.abs().max() < 10


def test_input_baseline_is_the_pixels(generator):
    data = load_digits(32)
    from sklearn.neighbors import KNeighborsClassifier

    def flat(split):
        mean, std = (np.array(x).reshape(3, 1, 1) for x in (data.mean, data.std))
        return ((split.images.numpy() / 255 - mean) / std).reshape(len(split), -1)

    expected = KNeighborsClassifier(20).fit(flat(data.train), data.train.labels).score(flat(data.test), data.test.labels)
    found = probes.probe_input(data, probes=("knn",))
    assert found == {"knn": pytest.approx(100 * expected, abs=0.3)}  # float32 against float64 may break a tie
