"""Encoders: the paper's parameter counts (Table 5), shapes, and no hidden randomness."""

import pytest
import torch
from torch import nn

from rtd.errors import InputError
from rtd.init import init_encoder_, init_head_
from rtd.models import (
    ENCODERS,
    NORMS,
    build_encoder,
    build_network,
    parameter_count,
)

PARAMETERS_AND_WIDTH = {
    "vgg11": (9_220_480, 512),
    "vgg13": (9_404_992, 512),
    "vgg16": (14_714_688, 512),
    "vgg19": (20_024_384, 512),
    "resnet18": (11_168_832, 512),
    "resnet34": (21_276_992, 512),
    "resnet50": (23_500_352, 2048),
    "resnet20": (271_824, 64),
    "resnet56": (855_120, 64),
    "vit-tiny": (5_379_264, 192),  # these have 8x8 patches and untied blocks, unlike the table's
    "vit-small": (21_375_360, 384),
    "vit-medium": (37_937_664, 512),
    "vit-base": (85_218_048, 768),
}


def random_encoder(generator, name, **options):
    encoder = build_encoder(name, **options).to_empty(device="cpu")
    return init_encoder_(encoder, generator).eval()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_has_table_5s_parameters_and_an_embedding_that_depends_on_the_image(
    name, generator
):
    head = {"hidden_dim": 64, "bottleneck_dim": 16, "out_dim": 16}
    network = build_network(name, **head).to_empty(device="cpu").eval()
    init_encoder_(network.encoder, generator)
    init_head_(network.head, generator)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        features = network.encoder(images)
        assert network(images).shape == (3, 16)
        torch.testing.assert_close(network.bottleneck(images).norm(dim=1), torch.ones(3))
    count, width = PARAMETERS_AND_WIDTH[name]
    assert parameter_count(network.encoder) == count and features.shape == (3, width)
    assert network.encoder.embedding_dim == width
    assert torch.isfinite(features).all()
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_other_sizes_are_taken_and_the_head_follows(generator):
    assert build_network("vgg11", image_size=64).head.mlp[0].in_features == 512 * 2 * 2
    for name, size in (("vgg11", 95), ("vgg16", 64), ("resnet18", 64), ("resnet56", 40)):
        encoder = build_encoder(name, image_size=size)  # without values, so none are computed
        images = torch.empty(2, 3, size, size, device="meta")
        assert encoder(images).shape == (2, encoder.embedding_dim)
    vit = random_encoder(generator, "vit-tiny", image_size=64)
    assert vit.encoder.pos_embedding.shape == (1, 64 + 1, 192)  # patches of 8x8 pixels
    assert len(vit.encoder.layers) == 12
    with torch.no_grad():
        assert vit(torch.randn(2, 3, 64, 64, generator=generator)).shape == (2, 192)


def test_vgg11_is_eight_convolutions_with_no_dropout_and_a_norm_only_before_the_relu():
    kinds = [type(m).__name__ for m in build_encoder("vgg11").modules()]
    assert kinds.count("Conv2d") == 8 and kinds.count("MaxPool2d") == 5
    assert not {"BatchNorm2d", "Dropout", "AdaptiveAvgPool2d", "Linear"} & set(kinds)
    kinds = [type(m).__name__ for m in build_encoder("vgg11", "layer").features]
    assert kinds[:4] == ["Conv2d", "GroupNorm", "ReLU", "MaxPool2d"]
    assert kinds.count("GroupNorm") == 8


def test_resnet18_has_the_cifar_stem():
    encoder, sizes = build_encoder("resnet18"), []
    assert encoder.conv1.kernel_size == (3, 3) and encoder.conv1.stride == (1, 1)
    encoder.layer1.register_forward_hook(lambda *passed: sizes.append(passed[2].shape[2:]))
    encoder(torch.empty(2, 3, 32, 32, device="meta"))
    assert sizes == [(32, 32)]  # no pooling before the first stage


@pytest.mark.parametrize("encoder", ["vgg11", "resnet18", "resnet20"])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_layers_stand_behind_each_convolution_and_normalise(encoder, norm, generator):
    network = random_encoder(generator, encoder, norm=norm)
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == (0 if norm == "none" else len(convolutions))
    for layer, convolution in zip(norms, convolutions, strict=False):
        channels = convolution.out_channels
        assert layer.weight.shape == layer.bias.shape == (channels,)
        if norm != "batch":
            size = {"instance": 1, "group8": 8, "layer": channels}[norm]
            x = torch.randn(2, channels, 5, 5, generator=generator)
            grouped = x.view(2, channels // size, size * 25)
            variance, mean = torch.var_mean(grouped, 2, keepdim=True, correction=0)
            expected = (grouped - mean) / (variance + 1e-5).sqrt()
            torch.testing.assert_close(layer(x), expected.view_as(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("vit-tiny", {"norm": "batch"}, "--norm batch: a ViT has layer norms"),
        ("vit-tiny", {"image_size": 36}, "choose a multiple of 8"),
        ("vgg12", {}, "unknown encoder 'vgg12'"),
    ],
)
def test_what_an_encoder_cannot_be_is_refused(name, options, match):
    with pytest.raises(InputError, match=match):
        build_encoder(name, **options)
