"""Encoders (paper section 3, Table 5) and the network that distillation trains: encoder, then projection head.

An encoder maps normalised images to an embedding, the representation that the probes judge:

* VGG11, 13, 16, 19 are torchvision's convolutional ``features`` without batch norm, flattened: no average pool, no
  classifier, no dropout (VGG11: 9,220,480 parameters; 512 dimensions at 32x32).
* ResNet18, 34, 50 are torchvision's with the CIFAR stem: a 3x3 convolution of stride 1 instead of 7x7 of stride 2, no
  max pool, no classification layer (ResNet18: 11,168,832 parameters; 512 dimensions, ResNet50 2,048).
* ResNet20, 56 are the narrow three-stage networks that He et al. (2016) made for CIFAR-10, of torchvision's blocks, with
  projection shortcuts (ResNet20: 271,824 parameters; 64 dimensions). They are the ones for quick looks.

Modules are built without drawing a single random number: ``rtd.init`` fills them from a generator of the caller's.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torchvision.models import resnet, vgg

from rtd.errors import InputError
from rtd.head import ProjectionHead


def _vgg(name):
    return nn.Sequential(OrderedDict(features=getattr(vgg, name)(init_weights=False).features, flatten=nn.Flatten()))


def _resnet(name):
    model = getattr(resnet, name)()
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    return model


def _narrow_resnet(blocks):
    """He et al. (2016), section 4.2: 3 stages of ``blocks`` blocks with 16, 32 and 64 channels; 6 blocks + 2 layers."""
    layers = [nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    width = 16
    for planes in (16, 32, 64):
        for _ in range(blocks):
            shortcut = None
            if width != planes:
                shortcut = nn.Sequential(nn.Conv2d(width, planes, 1, stride=2, bias=False), nn.BatchNorm2d(planes))
            layers.append(resnet.BasicBlock(width, planes, 1 if shortcut is None else 2, shortcut))
            width = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


ENCODERS = {
    **{name: partial(_vgg, name) for name in ("vgg11", "vgg13", "vgg16", "vgg19")},
    **{name: partial(_resnet, name) for name in ("resnet18", "resnet34", "resnet50")},
    "resnet20": partial(_narrow_resnet, 3),
    "resnet56": partial(_narrow_resnet, 9),
}


def build_encoder(name):
    """The encoder called ``name``, on the meta device (no memory, no values): see ``materialize``.

    Raises InputError for a name that is not in ``ENCODERS``.
    """
    if name not in ENCODERS:
        raise InputError(f"unknown encoder '{name}': choose one of {', '.join(ENCODERS)}")
    with torch.device("meta"):
        return ENCODERS[name]()


def embedding_dim(encoder, image_size=32):
    """Width of the embedding of (3, image_size, image_size) images; ``encoder`` must still be on the meta device."""
    with torch.no_grad():
        return encoder.eval()(torch.empty(1, 3, image_size, image_size, device="meta")).shape[1]


class Network(nn.Module):
    """Encoder and projection head, the f_theta that is teacher and student alike (section 3, App. E.1)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def bottleneck(self, images):
        """(B, 3, H, W) normalised images -> (B, K) what the head's last layer sees: unit vectors, float32."""
        return self.head.bottleneck(self.encoder(images))

    def forward(self, images):
        """(B, 3, H, W) normalised images -> (B, m) outputs (logits)."""
        return self.head(self.encoder(images))


def build_network(encoder, out_dim=2**16, hidden_dim=2048, bottleneck_dim=256, weight_norm=True, image_size=32):
    """A ``Network`` with encoder ``encoder`` (a name) and the paper's head, on the meta device."""
    encoder = build_encoder(encoder)
    with torch.device("meta"):
        head = ProjectionHead(embedding_dim(encoder, image_size), hidden_dim, bottleneck_dim, out_dim, weight_norm)
    return Network(encoder, head)


def materialize(module, device="cpu"):
    """Give a module from the meta device uninitialised memory on ``device``, convolutions in channels-last layout.

    Channels-last is the layout in which convolutions run fastest on CPUs and tensor cores; it changes no number's meaning.
    """
    return module.to_empty(device=device).to(memory_format=torch.channels_last)


def parameter_count(module):
    """Number of parameters; buffers (batch norm's running statistics) do not count, as in Table 5."""
    return sum(p.numel() for p in module.parameters())
