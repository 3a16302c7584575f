"""Encoders (section 4, Table 5) and the network that is distilled: encoder, projection head.

An encoder maps normalised images to an embedding, the representation that the probes judge:

* VGG11, 13, 16, 19 are torchvision's convolutional ``features``, flattened: no average pool, no
  classifier, no dropout (VGG11: 9,220,480 parameters; 512 dimensions at 32x32).
* ResNet18, 34, 50 are torchvision's with the CIFAR stem: a 3x3 convolution of stride 1 instead of
  7x7 of stride 2, no max pool, no classifier (ResNet18: 11,168,832 parameters; 512 dimensions,
  ResNet50 2,048).
* ResNet20, 56 are the narrow networks that He et al. (2016) made for CIFAR-10, but with projection
  shortcuts (ResNet20: 271,824 parameters; 64 dimensions). They are the ones for quick looks.
* ViT-Tiny, Small, Medium, Base are torchvision's with 8x8 patches, 12 blocks and no classifier
  (ViT-Tiny: 5,379,264 parameters; 192 dimensions). Table 5's counts (594,048) are those of 16x16
  patches and one block whose weights all 12 share; the text says patches of 8.

Norm layers (Fig. 11) stand between convolution and ReLU. VGG has none and ResNet batch norm unless
another is asked for.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn

from rtd.errors import InputError
from rtd.head import ProjectionHead
from rtd.init import init_encoder_, init_head_

# torchvision is imported where it is used: that takes as long as torch, and --help needs none.

NORMS = {  # layers of C channels; all but "none" have a gain and a bias for each
    "batch": nn.BatchNorm2d,
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "group8": lambda channels: nn.GroupNorm(channels // 8, channels),  # 8 channels a group
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "none": nn.Identity,
}


def _vgg(name, norm, image_size):
    from torchvision.models import vgg

    name += "" if norm in (None, "none") else "_bn"
    layers = getattr(vgg, name)(init_weights=False).features
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            layers[i] = NORMS[norm](layer.num_features)
    encoder = nn.Sequential(OrderedDict(features=layers, flatten=nn.Flatten()))
    encoder.embedding_dim = 512 * (image_size // 32) ** 2  # five poolings halve the sides
    return encoder


def _resnet(name, norm, image_size):
    from torchvision.models import resnet

    model = getattr(resnet, name)(norm_layer=NORMS[norm or "batch"])
    model.embedding_dim = model.fc.in_features
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = model.fc = nn.Identity()
    return model


def _narrow_resnet(blocks, norm, image_size):
    """3 stages of ``blocks`` blocks with 16, 32, 64 channels (He et al. 2016, section 4.2)."""
    from torchvision.models.resnet import BasicBlock

    norm = NORMS[norm or "batch"]
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(inplace=True)]
    width = 16
    for planes in [16] * blocks + [32] * blocks + [64] * blocks:
        stride, shortcut = planes // width, None  # 2 where a stage begins, at half the resolution
        if stride == 2:
            shortcut = nn.Sequential(nn.Conv2d(width, planes, 1, 2, bias=False), norm(planes))
        layers.append(BasicBlock(width, planes, stride, shortcut, norm_layer=norm))
        width = planes
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.embedding_dim = 64
    return encoder


def _vit(width, heads, norm, image_size):
    from torchvision.models import VisionTransformer

    if norm:
        raise InputError(f"--norm {norm}: a ViT has layer norms of its own; leave it out")
    if image_size % 8:
        raise InputError(f"--image-size {image_size}: ViT patches are 8x8; choose a multiple of 8")
    sizes = {"num_heads": heads, "hidden_dim": width, "mlp_dim": 4 * width}
    model = VisionTransformer(image_size, patch_size=8, num_layers=12, **sizes)
    model.embedding_dim = width
    model.heads = nn.Identity()
    return model


# name: a function (norm or None for its own, image_size) -> module from images to embeddings that
# has their width as ``embedding_dim`` and whose layers ``init_encoder_`` knows
ENCODERS = {
    **{name: partial(_vgg, name) for name in ("vgg11", "vgg13", "vgg16", "vgg19")},
    **{name: partial(_resnet, name) for name in ("resnet18", "resnet34", "resnet50")},
    "resnet20": partial(_narrow_resnet, 3),
    "resnet56": partial(_narrow_resnet, 9),
    "vit-tiny": partial(_vit, 192, 3),
    "vit-small": partial(_vit, 384, 6),
    "vit-medium": partial(_vit, 512, 8),
    "vit-base": partial(_vit, 768, 12),
}


def build_encoder(encoder, norm=None, image_size=32):
    """The encoder called ``encoder``, on the meta device: it has shapes, but no values.

    norm: one of ``NORMS``, or None for the architecture's own. image_size: side of the images in
    pixels, at least 32 for a VGG. The encoder's ``embedding_dim`` is the width of its output.
    Raises InputError for unknown names, and for norms and sizes that a ViT cannot have.
    """
    if encoder not in ENCODERS:
        raise InputError(f"unknown encoder '{encoder}': choose one of {', '.join(ENCODERS)}")
    if norm not in (None, *NORMS):
        raise InputError(f"unknown norm '{norm}': choose one of {', '.join(NORMS)}")
    with torch.device("meta"):
        return ENCODERS[encoder](norm, image_size)


class Network(nn.Module):
    """Encoder and projection head: f_theta of teacher and student alike (section 3, App. E.1)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def bottleneck(self, images):
        """(B, 3, H, W) normalised images -> (B, K) float32, the input of the head's last layer."""
        return self.head.bottleneck(self.encoder(images))

    def forward(self, images):
        """(B, 3, H, W) normalised images -> (B, m) outputs (logits)."""
        return self.head(self.encoder(images))


def build_network(encoder, norm=None, image_size=32, **head):
    """A ``Network`` of a ``build_encoder`` and the paper's head, without values.

    head: out_dim, hidden_dim, bottleneck_dim and bottleneck of the ``ProjectionHead``. Raises
    InputError as ``build_encoder`` does, and for slots that do not go together.
    """
    encoder = build_encoder(encoder, norm, image_size)
    with torch.device("meta"):
        return Network(encoder, ProjectionHead(encoder.embedding_dim, **head))


def materialize(module):
    """Give a module without values uninitialised memory on the CPU.

    Convolutions are channels-last, which is fastest on CPUs and tensor cores.
    """
    return module.to_empty(device="cpu").to(memory_format=torch.channels_last)


def random_network(generator, **model):
    """A ``Network`` at random initialisation (INIT in section 4): first its encoder, then its head.

    model: arguments of ``build_network``. generator: a CPU ``torch.Generator``.
    """
    network = materialize(build_network(**model))
    init_encoder_(network.encoder, generator)
    init_head_(network.head, generator)
    return network


def autocast(device, precision):
    """A context in which, with precision "bf16", convolutions and linear layers run in bfloat16.

    Parameters, their gradients, the optimizer's state, bottleneck vectors and losses stay float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def parameter_count(module):
    """Number of parameters, as in Table 5, without buffers such as running statistics."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def norms(network, start=None, name="norm"):
    """{"norm_encoder", "norm_head", "norm_total"}: Euclidean norms of a ``Network``'s parameters.

    start: a state dict, if the distance from it is asked for (Fig. 17). name: keys begin with it.
    """
    squares = [
        (p if start is None else p - start[key].to(p.device)).square().sum()
        for key, p in network.named_parameters()  # first the encoder's
    ]
    # torch sums each tensor pairwise, Python the sums in doubles; a GPU is waited for once
    squares, n = torch.stack(squares).tolist(), len([*network.encoder.parameters()])
    parts = {"encoder": sum(squares[:n]), "head": sum(squares[n:]), "total": sum(squares)}
    return {f"{name}_{part}": value**0.5 for part, value in parts.items()}
