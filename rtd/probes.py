"""How good are the features? Linear and k-NN probes of an encoder's embedding (paper sections 3 and C.1).

Features are the encoder's output in eval mode, extracted once, not normalised. The protocol is the paper's: a linear
classifier trained with AdamW (torch's defaults: lr 0.001, weight decay 0.01) for 10 epochs of batches of 256, judged
on the test split after the last; and the majority among the 20 nearest training features in Euclidean distance. The
input baseline puts the flattened, normalised pixels through the same two probes.
"""

import math

import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from rtd import distributed
from rtd.data import normalize
from rtd.device import autocast
from rtd.errors import InputError
from rtd.init import random_stream

PROBES = ("linear", "knn")


@torch.no_grad()
def extract_features(encoder, images, mean, std, batch_size=256, precision="fp32"):
    """(N, 3, H, W) uint8 images -> (N, D) float32 embeddings, in eval mode; the encoder's mode is restored.

    Under torchrun the images are shared among the processes, and each gets all features.
    """

    def embed(part):
        with autocast(images.device, precision):
            return torch.cat([encoder(normalize(x, mean, std)).float() for x in part.split(batch_size)])

    was_training = encoder.training
    encoder.eval()
    features = distributed.map_rows(embed, images)
    encoder.train(was_training)
    return features


def flat_pixels(images, mean, std):
    """(N, 3, H, W) uint8 -> (N, 3 H W) float32 normalised pixels: the input baseline's features."""
    return normalize(images, mean, std).flatten(1).contiguous()


def standardize(train_x, test_x):
    """Both splits' features with the training split's mean 0 and deviation 1 in each dimension (an option, off by default)."""
    mean, std = train_x.mean(0), train_x.std(0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)  # a dimension that does not vary, up to rounding, stays as it is
    return (train_x - mean) / std, (test_x - mean) / std


def linear_probe(train_x, train_y, test_x, test_y, num_classes, generator, epochs=10, batch_size=256):
    """Test accuracy in percent of a linear classifier on (N, D) features, initialised and shuffled by ``generator``."""
    dim, device = train_x.shape[1], train_x.device
    bound = 1 / math.sqrt(dim)  # torch's own initialisation of nn.Linear, weight and bias alike
    weight = torch.empty(num_classes, dim).uniform_(-bound, bound, generator=generator).to(device).requires_grad_()
    bias = torch.empty(num_classes).uniform_(-bound, bound, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=0.001, weight_decay=0.01, fused=device.type != "mps")
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(train_x), generator=generator).to(device)
            for batch in order.split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(F.linear(train_x[batch], weight, bias), train_y[batch]).backward()
                optimizer.step()
    with torch.no_grad():
        hits = F.linear(test_x, weight, bias).argmax(1) == test_y
    return 100 * hits.float().mean().item()


def knn_probe(train_x, train_y, test_x, test_y, k=20):
    """Test accuracy in percent of the majority vote of the ``k`` nearest training features (scikit-learn, brute force)."""
    if not 1 <= k <= len(train_x):
        raise InputError(f"--k {k}: the k-NN probe has {len(train_x)} training images; choose 1 to {len(train_x)}")
    classifier = KNeighborsClassifier(n_neighbors=k, algorithm="brute")
    classifier.fit(train_x.cpu().numpy(), train_y.cpu().numpy())
    return 100 * classifier.score(test_x.cpu().numpy(), test_y.cpu().numpy())


def probe(train_x, test_x, data, probes=PROBES, seed=0, name="", k=20, epochs=10, batch_size=256, standardized=False):
    """{"linear": percent, "knn": percent} for the chosen ``probes`` of features of the data set ``data``.

    ``name`` tells apart the streams of random numbers of one seed: each probe starts afresh.
    """
    if standardized:
        train_x, test_x = standardize(train_x, test_x)
    train_y, test_y = data.train.labels, data.test.labels
    result = {}
    if "linear" in probes:
        generator = random_stream(seed, "probe", name)
        result["linear"] = linear_probe(train_x, train_y, test_x, test_y, data.num_classes, generator, epochs, batch_size)
    if "knn" in probes:
        result["knn"] = knn_probe(train_x, train_y, test_x, test_y, k)
    return result


def probe_encoder(encoder, data, precision="fp32", **options):
    """``probe`` of an encoder's features; under torchrun the main process probes, the others return {}."""
    train_x, test_x = (
        extract_features(encoder, split.images, data.mean, data.std, precision=precision) for split in (data.train, data.test)
    )
    return probe(train_x, test_x, data, **options) if distributed.is_main() else {}


def probe_input(data, **options):
    """``probe`` of the normalised pixels themselves."""
    pixels = (flat_pixels(split.images, data.mean, data.std) for split in (data.train, data.test))
    return probe(*pixels, data, **options) if distributed.is_main() else {}


def probe_baselines(encoder, data, precision="fp32", **options):
    """What a student is to beat: ``probe`` of the teacher's encoder and of the pixels, as teacher_linear ... input_knn."""
    teacher = probe_encoder(encoder, data, precision, name="teacher", **options)
    return prefixed("teacher", teacher) | prefixed("input", probe_input(data, name="input", **options))


def prefixed(prefix, values):
    return {f"{prefix}_{name}": value for name, value in values.items()}
