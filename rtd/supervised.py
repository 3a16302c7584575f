"""Supervised training from a given encoder, for Figs. 8 and 9 (section 6, App. E.5).

A fresh linear classifier ``fc`` goes on top of the encoder and both are trained with SGD: momentum
0.9, weight decay 1e-4 on all parameters, learning rate 0.1, a tenth of it after half of the epochs
and a hundredth after three quarters (80 and 120 of the paper's 160), batches of 256, random flips
and 4-pixel padded crops.
"""

import torch
import torch.nn.functional as F
from torch import nn

from rtd.init import init_linear_, random_stream
from rtd.models import autocast, build_encoder, materialize
from rtd.pruning import apply_masks_

PADDING = 4  # pixels


def learning_rate(done, epochs, lr=0.1):
    """lr after ``done`` of ``epochs`` epochs; it falls tenfold after 1/2 and after 3/4."""
    return lr * 0.1 ** ((2 * done >= epochs) + (4 * done >= 3 * epochs))


def sgd(classifier, lr):
    """The optimizer of App. E.5 for all parameters of ``classifier``."""
    return torch.optim.SGD(classifier.parameters(), lr, momentum=0.9, weight_decay=1e-4, fused=True)


def draw_augmentation(n, generator):
    """(n, 3): for each image the crop's top and left, in 0 ... 2 PADDING, and a flip, 0 or 1."""
    corners = torch.randint(2 * PADDING + 1, (n, 2), generator=generator)
    return torch.cat([corners, torch.randint(2, (n, 1), generator=generator)], 1)


def augment(images, draws):
    """(B, 3, H, W) uint8 -> the same: a crop of each image padded with black, mirrored where drawn.

    draws: (B, 3) of ``draw_augmentation``, on the images' device. The result is channels-last.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (PADDING,) * 4)
    top, left, flip = draws.unsqueeze(2).unbind(1)  # (B, 1) each
    rows = top + torch.arange(height, device=images.device)  # (B, H)
    columns = left + torch.arange(width, device=images.device)  # (B, W)
    columns = torch.where(flip == 1, columns.flip(1), columns)
    each = torch.arange(len(images), device=images.device)
    # one gather for all: (B, H, W, 3), whose permutation is laid out channels-last
    crops = padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2)


class Classifier(nn.Module):
    """An encoder and a linear classifier on its embedding."""

    def __init__(self, encoder, fc):
        super().__init__()
        self.encoder, self.fc = encoder, fc

    def forward(self, images):
        """(B, 3, H, W) normalised images -> (B, classes) logits, float32 also under autocast."""
        return self.fc(self.encoder(images)).float()


def empty_classifier(architecture, num_classes):
    """``Classifier`` with the encoder ``build_encoder(**architecture)`` makes, without values."""
    encoder = build_encoder(**architecture)
    return Classifier(encoder, nn.Linear(encoder.embedding_dim, num_classes, device="meta"))


def build_classifier(architecture, encoder_state, num_classes, generator):
    """``Classifier`` of an encoder's state dict and a new fc, drawn by ``init_linear_``."""
    classifier = materialize(empty_classifier(architecture, num_classes))
    classifier.encoder.load_state_dict(encoder_state)
    init_linear_(classifier.fc, generator)
    return classifier


class SupervisedLoss(nn.Module):
    """Cross-entropy of a classifier on augmented training images, as one module to be trained."""

    def __init__(self, classifier, data, stream):
        """data: a ``Dataset`` on the classifier's device. stream: seed and names of a stream."""
        super().__init__()
        self.classifier, self.data, self.stream = classifier, data, stream
        self.pruned = {}, {}  # arguments of ``apply_masks_``, for a lottery ticket

    def begin_epoch(self, epoch):
        """Draw the augmentation of ``epoch``, from 1; row i is for image i in any batch order."""
        generator = random_stream(*self.stream, "augmentation", epoch)
        images = self.data.train.images
        self.draws = draw_augmentation(len(images), generator).to(images.device)

    def after_step(self):
        """What is pruned becomes 0 again."""
        apply_masks_(*self.pruned)

    def forward(self, index, observe=False, precision="fp32"):
        """index: (B,) positions of training images -> (mean cross-entropy,)."""
        data = self.data
        images = augment(data.train.images[index], self.draws[index])
        with autocast(images.device, precision):
            logits = self.classifier(data.normalize(images))
        return (F.cross_entropy(logits, data.train.labels[index]),)
