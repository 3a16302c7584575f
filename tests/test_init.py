"""Initialisation: distributions, the student next to its teacher, independent random streams."""

import hashlib
import math

import pytest
import torch
from torch import nn

from rtd.init import init_encoder_, init_head_, init_student_, random_stream
from rtd.models import build_network, random_network

HEAD = {"hidden_dim": 512, "bottleneck_dim": 256, "out_dim": 512}


def network(seed, name="resnet20"):
    """A network with every kind of parameter, in no time."""
    return random_network(torch.Generator().manual_seed(seed), encoder=name, **HEAD)


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_convolutions_are_kaiming_fan_out_and_the_heads_weights_normal_with_002(name):
    for module in network(0, name).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            sigma, n = 0.02, module.weight.numel()
            if isinstance(module, nn.Conv2d):
                sigma = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            assert module.weight.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * n))
            assert abs(module.weight.mean().item()) < 5 * sigma / math.sqrt(n)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
            assert not module.running_mean.any() and (module.running_var == 1).all()
            assert module.num_batches_tracked == 0


@pytest.mark.parametrize("encoder", ["vgg11", "resnet18", "vit-tiny"])
def test_every_parameter_and_buffer_is_written(encoder):
    """Nothing is left as the uninitialised memory it starts as."""
    states = []
    for fill in (float("nan"), 7.0):
        module, generator = build_network(encoder, **HEAD), torch.Generator()
        for tensor in module.to_empty(device="cpu").state_dict().values():
            tensor.fill_(0 if tensor.dtype == torch.int64 else fill)
        init_encoder_(module.encoder, generator.manual_seed(3))
        init_head_(module.head, generator)
        states.append(module.state_dict().values())
    assert all(map(torch.equal, *states))


def test_query_key_and_value_are_a_linear_layer_each():
    for name, weight in network(0, "vit-tiny").named_parameters():
        for part in weight.detach().chunk(3) if name.endswith("in_proj_weight") else ():
            assert part.std().item() == pytest.approx((2 / 192) ** 0.5, rel=0.02)


def test_a_layer_that_is_not_known_is_refused(generator):
    for layer in (nn.PReLU(), nn.BatchNorm1d(4, affine=False)):
        with pytest.raises(ValueError, match=type(layer).__name__):
            init_encoder_(nn.Sequential(layer), generator)


@pytest.mark.parametrize("alpha", [0.0, 1e-10, 0.2, 0.5, 0.9, 1.0])
def test_student_is_the_papers_formula_with_buffers_of_its_own(alpha):
    """At the ends it is the teacher or the fresh draw, bit for bit."""
    teacher, fresh = network(0), network(1)
    teacher.encoder[1].running_var.fill_(2)
    student = init_student_(network(1), teacher, alpha)
    delta = math.sqrt(alpha**2 + (1 - alpha) ** 2)
    tolerance = {"rtol": 0, "atol": 0} if alpha in (0, 1) else {"rtol": 1e-6, "atol": 1e-8}
    for s, t, f in zip(student.parameters(), teacher.parameters(), fresh.parameters(), strict=True):
        expected = ((1 - alpha) * t.double() + alpha * f.double()) / delta
        torch.testing.assert_close(s.double(), expected, **tolerance)
    assert (student.encoder[1].running_var == 1).all()


def test_streams_differ_by_seed_and_name_but_not_by_process():
    def draw(*key):
        return torch.randint(2**40, (3,), generator=random_stream(*key)).tolist()

    assert draw(0, "teacher-init") == draw(0, "teacher-init")
    keys = [(seed, name) for seed in (0, 1) for name in ("teacher-init", "student-init")]
    keys += [(0, "batch-order", 1), (0, "batch-order", 11)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    # in every process and for ever: Python's hash() would not do
    digest = hashlib.sha256(b"0/probe").digest()
    assert random_stream(0, "probe").initial_seed() == int.from_bytes(digest[:8], "little")
