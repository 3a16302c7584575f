"""Encoders: the paper's parameter counts (Table 5), shapes, and no hidden randomness."""

import pytest
import torch
from torch import nn

from rtd.errors import InputError
from rtd.init import init_encoder_, init_head_
from rtd.models import ENCODERS, NORMS, build_encoder, build_network, parameter_count

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
}
for name, w in (("tiny", 192), ("small", 384), ("medium", 512), ("base", 768)):
    # 12 blocks; 64 pixels a patch, 17 positions, class token, last norm (the table's share a block)
    PARAMETERS_AND_WIDTH[f"vit-{name}"] = (12 * (12 * w * w + 13 * w) + (3 * 64 + 21) * w, w)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_has_table_5s_parameters_and_tells_images_apart(name, generator):
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


def test_other_sizes_are_taken_and_the_head_follows():
    assert build_network("vgg11", image_size=64).head.mlp[0].in_features == 512 * 2 * 2
    sizes = {"vgg11": 95, "vgg16": 64, "resnet18": 64, "resnet56": 40, "vit-tiny": 64}
    for name, size in sizes.items():  # without values, so none are computed
        encoder = build_encoder(name, image_size=size)
        images = torch.empty(2, 3, size, size, device="meta")
        assert encoder(images).shape == (2, encoder.embedding_dim)
    assert encoder.encoder.pos_embedding.shape == (1, 64 + 1, 192)  # patches of 8x8 pixels


def test_unknown_names_are_refused_with_those_that_are_known():
    for names in ({"encoder": "vgg12"}, {"encoder": "vgg11", "norm": "bach"}):
        with pytest.raises(InputError, match="batch|vgg13"):
            build_network(**names)


def test_vgg11_has_no_dropout_and_a_norm_only_before_the_relu():
    kinds = [type(m).__name__ for m in build_encoder("vgg11").modules()]
    assert not {"BatchNorm2d", "Dropout", "AdaptiveAvgPool2d", "Linear"} & set(kinds)
    kinds = [type(m).__name__ for m in build_encoder("vgg11", "layer").features]
    assert kinds[:4] == ["Conv2d", "GroupNorm", "ReLU", "MaxPool2d"]


def test_resnet18_does_not_pool_before_its_first_stage():
    encoder, images = build_encoder("resnet18"), torch.empty(2, 3, 32, 32, device="meta")
    assert encoder.maxpool(encoder.conv1(images)).shape == (2, 64, 32, 32)


GROUPED = {"instance": 1, "group8": 8, "layer": None}  # channels that share mean and variance


@pytest.mark.parametrize("encoder", ["vgg11", "resnet18", "resnet20"])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_layers_stand_behind_each_convolution_with_groups_of_the_size_asked_for(
    encoder, norm, generator
):
    modules = [*build_encoder(encoder, norm).modules()]
    channels = [m.out_channels for m in modules if isinstance(m, nn.Conv2d)]
    norms = [m for m in modules if isinstance(m, (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm))]
    assert [m.weight.numel() for m in norms] == channels * (norm != "none")
    for layer, n in zip(norms, channels, strict=norm != "none"):
        if norm not in GROUPED:
            continue
        images = torch.randn(2, n, 3, 3, generator=generator)
        groups = images.double().reshape(2, -1, GROUPED[norm] or n, 9)
        var, mean = torch.var_mean(groups, (2, 3), correction=0, keepdim=True)
        expected = ((groups - mean) / (var + 1e-5).sqrt()).reshape(images.shape)
        layer.to_empty(device="cpu").reset_parameters()
        torch.testing.assert_close(layer(images).double(), expected, rtol=1e-4, atol=1e-5)
