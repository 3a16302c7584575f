"""How good are the features? Linear and k-NN probes of an embedding (section 3, App. C.1).

Features are the encoder's output in eval mode, extracted once and not normalised. The linear probe
is a linear layer trained with AdamW (torch's defaults: lr 0.001, weight decay 0.01) for 10 epochs
of batches of 256, as in the authors' code, and judged after the last. The k-NN probe is the
majority of the 20 nearest training features in Euclidean distance. One seed serves all probes of a
run, so that equal features give equal accuracies. The input baseline puts the normalised pixels
through the same two probes.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from rtd.data import normalize
from rtd.init import init_linear_, random_stream
from rtd.models import autocast

PROBES = ("linear", "knn")
CHUNK = 2**26  # distances that the k-NN probe holds at a time on a GPU: 256 MB


@torch.no_grad()
def extract_features(encoder, images, mean, std, batch_size=256, precision="fp32", progress=iter):
    """(N, 3, H, W) uint8 images -> (N, D) float32 outputs of ``encoder`` in eval mode.

    mean, std: of the images it was trained on; a checkpoint has them in its "data". float32 images
    count as normalised already. Raises ValueError for those without a value below 0, which must be
    pixels. The encoder is put back into its mode. progress: iterates over a list, and may show it.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), not {tuple(images.shape)}")
    if images.is_floating_point() and images.min() >= 0:
        raise ValueError("float images must be normalised already, but these look like pixels")
    was_training = encoder.training
    encoder.eval()
    with autocast(images.device, precision):
        batches = progress(images.split(batch_size))
        features = torch.cat([encoder(normalize(x, mean, std)).float() for x in batches])
    encoder.train(was_training)
    return features


def linear_probe(
    train_x, train_y, test_x, test_y, num_classes, generator, epochs=10, batch_size=256
):
    """Test accuracy in percent of a linear classifier on (N, D) features.

    generator: on the CPU; it draws the classifier's start and the order of its batches.
    """
    dim, device = train_x.shape[1], train_x.device
    fc = init_linear_(nn.utils.skip_init(nn.Linear, dim, num_classes), generator).to(device)
    optimizer = torch.optim.AdamW(fc.parameters(), lr=0.001, weight_decay=0.01, fused=True)
    with torch.enable_grad():  # a caller may have turned it off
        for _ in range(epochs):
            order = torch.randperm(len(train_x), generator=generator).to(device)
            for batch in order.split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(fc(train_x[batch]), train_y[batch]).backward()
                optimizer.step()
    hits = (fc(test_x).argmax(1) == test_y).sum()
    return 100 * (hits.item() / len(test_y))


def knn_probe(train_x, train_y, test_x, test_y, k=20):
    """Test accuracy in percent of the majority vote of the ``k`` nearest training features (N, D).

    scikit-learn computes it for features on the CPU, ``knn_probe_torch`` elsewhere. Among classes
    with equally many votes the smallest label wins.
    """
    if train_x.device.type != "cpu":
        return knn_probe_torch(train_x, train_y, test_x, test_y, k)
    from sklearn.neighbors import KNeighborsClassifier  # here, as importing it takes a second

    train_x, test_x = train_x.detach(), test_x.detach()
    classifier = KNeighborsClassifier(k, algorithm="brute")
    with warnings.catch_warnings():  # of many classes among few images
        warnings.simplefilter("ignore", UserWarning)
        classifier.fit(train_x.numpy(), train_y.numpy())
    return 100 * classifier.score(test_x.numpy(), test_y.numpy())


@torch.no_grad()
def knn_probe_torch(train_x, train_y, test_x, test_y, k=20):
    """``knn_probe`` by torch, on any device: nearest are those of least |x|^2 - 2 <q, x>.

    It agrees with scikit-learn where no vote hangs on the rounding of distances to float32. It
    holds a centred copy of the features, and ``CHUNK`` distances at a time.
    """
    scale = 2.0 ** (math.frexp(train_x.abs().max().item())[1] - 1)  # a power of 2 costs no digit
    train_x, test_x = train_x / scale, test_x / scale  # lest a square overflow
    center = train_x.mean(0)  # moves no distance; a common offset would cost the difference digits
    train_x, test_x = train_x.sub_(center), test_x.sub_(center)
    squares, hits, classes = train_x.square().sum(1), 0, int(train_y.max()) + 1
    rows = max(1, CHUNK // len(train_x))
    for query, label in zip(test_x.split(rows), test_y.split(rows), strict=True):
        distance = torch.addmm(squares, query, train_x.T, alpha=-2)  # (rows, N), less |q|^2
        neighbours = train_y[distance.topk(k, largest=False).indices]  # (rows, k) labels
        votes = query.new_zeros(len(query), classes)
        votes.scatter_add_(1, neighbours, query.new_ones(neighbours.shape))
        hits += (votes.argmax(1) == label).sum()  # argmax takes the first of equals
    return 100 * (hits.item() / len(test_y))


def probe(train_x, test_x, data, probes=PROBES, seed=0, k=20, epochs=10, batch_size=256):
    """{"linear": percent, "knn": percent} for the chosen ``probes`` of features of ``data``.

    ``seed`` decides all random numbers, so that equal features give equal accuracies. Features that
    are not finite give nan.
    """
    if not all(features.isfinite().all() for features in (train_x, test_x)):
        return dict.fromkeys(probes, math.nan)
    splits, result = (train_x, data.train.labels, test_x, data.test.labels), {}
    if "linear" in probes:
        generator = random_stream(seed, "probe")
        result["linear"] = linear_probe(*splits, data.num_classes, generator, epochs, batch_size)
    if "knn" in probes:
        result["knn"] = knn_probe(*splits, k)
    return result
