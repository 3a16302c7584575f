"""A classifier on an encoder, and the encoders that supervised training starts from (paper section 6).

On command lines a start is ``random`` (also random:1, random:2, ... for further draws of the same seed), or
PATH:student, PATH:teacher or PATH:student-init for a network in a checkpoint of run_distill.py: its encoder with its
buffers; the projection head is dropped and a new linear layer takes its place.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from rtd import checkpoint
from rtd.errors import InputError
from rtd.init import init_encoder_, random_stream
from rtd.models import build_encoder, embedding_dim, materialize


@dataclass(frozen=True)
class Start:
    """Where training starts from: an encoder's weights and buffers, and the normalisation of images that goes with them.

    architecture: arguments of ``rtd.models.build_encoder``. sha256: of the checkpoint; None for a random encoder.
    """

    spec: str
    architecture: dict
    state: dict
    mean: tuple
    std: tuple
    sha256: str | None = None

    @property
    def kind(self):
        """What it is, whatever run or draw it is from: "random", or "student" and the like for a checkpoint."""
        return "random" if self.sha256 is None else self.spec.rpartition(":")[2]


def load_starts(specs, encoder, data, seed):
    """[``Start``] of what --init gives: "random" (or random:1, random:2, ... for further draws) or PATH:NETWORK.

    encoder: the value of --encoder; None is the checkpoints' own, or resnet18 without any. All must be of one architecture.
    Random encoders are normalised for ``data``; those of a checkpoint as they were there.
    """
    is_random = [spec.partition(":")[0] == "random" for spec in specs]
    draws = [_draw(spec) for spec, r in zip(specs, is_random, strict=True) if r]
    if len(set(draws)) < len(draws):
        raise InputError(f"--init {' '.join(specs)}: random is random:0, and each number is one draw; give each once")
    loaded = [None if r else checkpoint.load_spec("--init", spec) for r, spec in zip(is_random, specs, strict=True)]
    architecture = {"encoder": encoder or "resnet18", "norm": None, "image_size": data.train.images.shape[-1]}
    if found := next((found for found in loaded if found), None):
        architecture |= {name: found[0]["model"][name] for name in architecture if name in found[0]["model"]}
    starts = []
    for spec, found in zip(specs, loaded, strict=True):
        if found is None:
            network = init_encoder_(materialize(build_encoder(**architecture)), random_stream(seed, "encoder-init", _draw(spec)))
            starts.append(Start(spec, architecture, network.state_dict(), data.mean, data.std))
            continue
        contents, which = found
        path, model = spec.rpartition(":")[0], contents["model"]
        checkpoint.check_image_size(f"--init {spec}", model, data)
        for flag, wanted in (("encoder", encoder or architecture["encoder"]), ("norm", architecture["norm"])):
            if model.get(flag) != wanted:
                raise InputError(
                    f"--init {spec}: its {flag} is {model.get(flag)}, not {wanted}; --encoder and all of --init must agree"
                )
        state = checkpoint.load_network(contents, which).encoder.state_dict()
        mean, std = tuple(contents["data"]["mean"]), tuple(contents["data"]["std"])
        starts.append(Start(spec, architecture, state, mean, std, checkpoint.sha256(path)))
    return starts


def _draw(spec):
    """random -> 0, random:N -> N."""
    _, colon, number = spec.partition(":")
    if colon and not number.isdecimal():
        raise InputError(f"--init {spec}: give random, random:1, random:2 ... or PATH:NETWORK")
    return int(number or 0)


class Classifier(nn.Module):
    """An encoder and a linear classifier on its embedding."""

    def __init__(self, encoder, fc):
        super().__init__()
        self.encoder = encoder
        self.fc = fc

    def forward(self, images):
        """(B, 3, H, W) normalised images -> (B, classes) logits, float32 also under autocast."""
        return self.fc(self.encoder(images)).float()


def empty_classifier(architecture, num_classes):
    """``Classifier`` with the encoder that ``build_encoder(**architecture)`` makes, on the meta device."""
    encoder = build_encoder(**architecture)
    with torch.device("meta"):
        return Classifier(encoder, nn.Linear(embedding_dim(encoder, architecture.get("image_size", 32)), num_classes))


def build_classifier(start, num_classes, generator):
    """``Classifier`` of the encoder of ``start``, buffers included, and a new fc: U(-1/sqrt(d), 1/sqrt(d)), d its inputs."""
    classifier = materialize(empty_classifier(start.architecture, num_classes))
    classifier.encoder.load_state_dict(start.state)
    bound = 1 / math.sqrt(classifier.fc.in_features)
    for parameter in classifier.fc.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return classifier
