"""Probes against brute force and scikit-learn, and the protocol's fine print."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from rtd import probes
from rtd.data import Dataset, Split, normalize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
KNN = {"scikit-learn": probes.knn_probe, "torch": probes.knn_probe_torch}


def clusters(generator, n=600, dim=20, classes=4, spread=0.5):
    """Gaussian clusters as the probes take them: train_x, train_y, test_x, test_y."""
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(2 * n) % classes
    x = centres[labels] + spread * torch.randn(2 * n, dim, generator=generator)
    return x[:n], labels[:n], x[n:], labels[n:]


@pytest.mark.parametrize("knn", KNN.values(), ids=KNN)
def test_knn_is_brute_force_by_euclidean_distance(generator, knn):
    train_x, train_y, test_x, test_y = clusters(generator, n=200, spread=2.0)
    differences = test_x.double().numpy()[:, None] - train_x.double().numpy()[None]
    order = np.argsort((differences**2).sum(2), axis=1)
    for k in (1, 5, 20, 200):
        votes = train_y.numpy()[order[:, :k]]
        predicted = np.array([np.bincount(row, minlength=4).argmax() for row in votes])
        expected = 100 * (predicted == test_y.numpy()).mean()
        assert knn(train_x, train_y, test_x, test_y, k) == pytest.approx(expected)
    assert knn(train_x.requires_grad_(), train_y, train_x, train_y, 1) == 100
    # two classes that differ in length alone, which cosines cannot tell apart
    x = torch.cat([torch.linspace(1, 2, 50), torch.linspace(5, 6, 50)])[:, None] * torch.ones(8)
    y = torch.arange(100) // 50
    for scale in (1, 1e30, 1e-30):  # the squares of the last two are no float32
        assert knn(scale * x, y, scale * x, y, k=5) == 100


@pytest.mark.parametrize("offset", [0, 30, 1000])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_knn_by_torch_has_exactly_the_accuracy_of_scikit_learn(generator, monkeypatch, offset, k):
    """Also with many classes and even k, where votes are tied, and far from the origin."""
    monkeypatch.setattr(probes, "CHUNK", 64 * 900)  # several chunks, the last of them smaller
    train_x, train_y, test_x, test_y = clusters(generator, 900, 100, classes=30, spread=3.0)
    data = train_x + offset, train_y, test_x + offset, test_y
    assert probes.knn_probe_torch(*data, k) == probes.knn_probe(*data, k)


def test_linear_probe_is_torchs_linear_layer_under_adamw(generator, monkeypatch):
    """The same steps through nn.Linear and torch's default AdamW, from the same draws."""
    train_x, train_y, test_x, test_y = clusters(generator, n=300, spread=2.0)
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
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda p, **options: trained.extend(p) or plain(trained, **options)
    )
    generator.manual_seed(5)
    with torch.no_grad():  # as a caller may have it
        found = probes.linear_probe(train_x, train_y, test_x, test_y, 4, generator, epochs=30)
    for ours, expected in zip(trained, layer.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    hits = (layer(test_x).argmax(1) == test_y).float()
    assert found == 100 * (hits.sum().item() / 300)


class Colour(nn.Module):
    """An encoder that shows its mode: mean colour, plus 1000 in training mode."""

    def forward(self, x):
        return x.mean((2, 3)) + 1000 * self.training


@pytest.mark.parametrize("mode", [True, False])
def test_features_are_extracted_in_eval_mode_which_is_undone(generator, mode):
    """Float images are taken as normalised, unless they look like pixels."""
    encoder = Colour().train(mode)
    images = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8, generator=generator)
    noise = torch.randn(10, 3, 4, 4, generator=generator)
    for given, x in ((images, normalize(images, MEAN, STD)), (noise, noise)):
        features = probes.extract_features(encoder, given, MEAN, STD, batch_size=3)
        assert encoder.training is mode and not features.requires_grad
        torch.testing.assert_close(features, x.mean((2, 3)))
    for pixels in (torch.rand(10, 3, 4, 4, generator=generator), 255 * noise.abs()):
        with pytest.raises(ValueError, match="normalised"):
            probes.extract_features(encoder, pixels, MEAN, STD)


def test_probing_depends_on_the_seed_alone_and_is_nan_where_features_are(generator):
    train_x, train_y, test_x, test_y = clusters(generator, spread=2.5)
    data = Dataset("made", Split(train_x, train_y), Split(test_x, test_y), 4, MEAN, STD)

    def linear(seed):
        return probes.probe(train_x, test_x, data, ("linear",), seed=seed)["linear"]

    assert linear(0) == linear(0) and len({linear(seed) for seed in range(9)}) > 3
    for value in (math.nan, math.inf):
        test_x[3, 5] = value
        found = probes.probe(train_x, test_x, data)
        assert set(found) == {"linear", "knn"} and all(map(math.isnan, found.values()))
