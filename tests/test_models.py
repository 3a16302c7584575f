"""Encoders: the paper's parameter counts (Table 5), shapes, and no hidden randomness."""

import pytest
import torch
from torch import nn

from rtd.errors import InputError
from rtd.init import init_encoder_, init_head_
from rtd.models import (
    ENCODERS,
    NORMS,
    Network,
    build_encoder,
    build_network,
    embedding_dim,
    parameter_count,
)

COUNTS = {
    "vgg11": 9_220_480,
    "vgg13": 9_404_992,
    "vgg16": 14_714_688,
    "vgg19": 20_024_384,
    "resnet18": 11_168_832,
    "resnet34": 21_276_992,
    "resnet50": 23_500_352,
    "resnet20": 271_824,
    "resnet56": 855_120,
    "vit-tiny": 5_379_264,  # these have 8x8 patches and untied blocks, unlike the table's
    "vit-small": 21_375_360,
    "vit-medium": 37_937_664,
    "vit-base": 85_218_048,
}
DIMENSIONS = {
    "resnet50": 2048,
    "resnet20": 64,
    "resnet56": 64,
    "vit-tiny": 192,
    "vit-small": 384,
    "vit-base": 768,
}


def initialised(module, generator):
    """A module without values, an encoder or a network, with random ones and in eval mode."""
    module = module.to_empty(device="cpu")
    if isinstance(module, Network):
        init_encoder_(module.encoder, generator)
        init_head_(module.head, generator)
    else:
        init_encoder_(module, generator)
    return module.eval()


@pytest.mark.parametrize("name", ENCODERS)
def test_parameter_count_is_table_5s(name):
    assert parameter_count(build_encoder(name)) == COUNTS[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_embedding_has_its_width_and_depends_on_the_image(name, generator):
    network = initialised(build_network(name, out_dim=16), generator)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        features = network.encoder(images)
        assert features.shape == (3, DIMENSIONS.get(name, 512))
        assert (features[0] - features[1]).abs().max() > 1e-3
        assert network(images).shape == (3, 16)
        torch.testing.assert_close(network.bottleneck(images).norm(dim=1), torch.ones(3))
    assert torch.isfinite(features).all()


def test_vgg_takes_other_sizes_and_the_head_follows():
    assert embedding_dim(build_encoder("vgg11"), 64) == 512 * 2 * 2
    assert embedding_dim(build_encoder("resnet18"), 64) == 512
    assert build_network("vgg11", image_size=64).head.mlp[0].in_features == 2048


def test_vgg11_is_eight_convolutions_with_no_batch_norm_and_no_dropout():
    kinds = [type(m).__name__ for m in build_encoder("vgg11").modules()]
    assert kinds.count("Conv2d") == 8
    assert kinds.count("MaxPool2d") == 5
    assert not {"BatchNorm2d", "Dropout", "AdaptiveAvgPool2d", "Linear"} & set(kinds)


def test_resnet18_has_the_cifar_stem():
    encoder = build_encoder("resnet18")
    assert encoder.conv1.kernel_size == (3, 3)
    assert encoder.conv1.stride == (1, 1)
    features = {}
    encoder.layer1.register_forward_hook(
        lambda module, inputs, output: features.update(size=output.shape[2:])
    )
    encoder(torch.empty(2, 3, 32, 32, device="meta"))
    assert features["size"] == (32, 32)  # no pooling before the first stage


@pytest.mark.parametrize("encoder", ["vgg11", "resnet18", "resnet20"])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_layers_stand_behind_each_convolution_and_normalise(encoder, norm, generator):
    network = initialised(build_encoder(encoder, norm), generator)
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == (0 if norm == "none" else len(convolutions))
    x = torch.randn(2, 3, 32, 32, generator=generator)
    for layer, convolution in zip(norms, convolutions, strict=False):
        channels = convolution.out_channels
        assert layer.weight.shape == layer.bias.shape == (channels,)
        if norm != "batch":
            size = {"instance": 1, "group8": 8, "layer": channels}[norm]
            x = torch.randn(2, channels, 5, 5, generator=generator)
            grouped = x.view(2, channels // size, size * 25)
            expected = (grouped - grouped.mean(2, keepdim=True)) / (
                grouped.var(2, keepdim=True, correction=0) + 1e-5
            ).sqrt()
            torch.testing.assert_close(layer(x), expected.view_as(x), rtol=1e-3, atol=1e-5)


def test_other_norms_of_vgg_stand_between_convolution_and_relu():
    kinds = [type(m).__name__ for m in build_encoder("vgg11", "layer").features]
    assert kinds[:4] == ["Conv2d", "GroupNorm", "ReLU", "MaxPool2d"]
    assert kinds.count("GroupNorm") == 8


def test_vit_has_patches_of_8_pixels_and_takes_other_sizes(generator):
    encoder = initialised(build_encoder("vit-tiny", image_size=64), generator)
    assert encoder.encoder.pos_embedding.shape == (1, 64 + 1, 192)
    assert len(encoder.encoder.layers) == 12
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, 64, 64, generator=generator)).shape == (2, 192)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"norm": "batch"}, "--norm batch: vit-tiny has layer norms"),
        ({"image_size": 36}, "choose a multiple of 8"),
    ],
)
def test_what_a_vit_cannot_be_is_refused(options, match):
    with pytest.raises(InputError, match=match):
        build_encoder("vit-tiny", **options)


def test_unknown_encoder_is_refused():
    with pytest.raises(InputError, match="unknown encoder 'vgg12'"):
        build_encoder("vgg12")
