"""Encoders: the paper's parameter counts (Table 5), shapes, and no hidden randomness."""

import pytest
import torch

from rtd.errors import InputError
from rtd.init import init_network_
from rtd.models import ENCODERS, build_encoder, build_network, embedding_dim, materialize, parameter_count

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
}
DIMENSIONS = {"resnet50": 2048, "resnet20": 64, "resnet56": 64}


@pytest.mark.parametrize("name", ENCODERS)
def test_parameter_count_is_table_5s(name):
    assert parameter_count(build_encoder(name)) == COUNTS[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_embedding_has_its_width_and_depends_on_the_image(name, generator):
    network = init_network_(materialize(build_network(name, out_dim=16)), generator).eval()
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
    encoder.layer1.register_forward_hook(lambda module, inputs, output: features.update(size=output.shape[2:]))
    encoder(torch.empty(2, 3, 32, 32, device="meta"))
    assert features["size"] == (32, 32)  # no pooling before the first stage


def test_unknown_encoder_is_refused():
    with pytest.raises(InputError, match="unknown encoder 'vgg12'"):
        build_encoder("vgg12")
