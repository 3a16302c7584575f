"""Initialisation: distributions, the student next to its teacher, independent random streams."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rtd.head import ProjectionHead
from rtd.init import init_encoder_, init_head_, init_student_, random_stream
from rtd.models import Network, build_network

ROOT = Path(__file__).resolve().parent.parent


def initialised(module, seed):
    """A network without values, with random ones."""
    module, generator = module.to_empty(device="cpu"), torch.Generator().manual_seed(seed)
    init_encoder_(module.encoder, generator)
    init_head_(module.head, generator)
    return module


def network(seed, name="resnet18", out_dim=512):
    return initialised(build_network(name, out_dim=out_dim), seed)


def small(seed):
    """A network with every kind of parameter, in no time."""
    with torch.device("meta"):
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        return initialised(Network(encoder, ProjectionHead(32, 64, 16, 200)), seed)


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_convolutions_are_kaiming_fan_out(name):
    for module in network(0, name).encoder.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(
                math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * n)
            )
            assert abs(module.weight.mean().item()) < 5 * math.sqrt(2 / fan_out / n)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert not module.running_mean.any()
            assert (module.running_var == 1).all()
            assert module.num_batches_tracked == 0


def test_head_weights_are_normal_with_002_and_biases_zero():
    head = network(0, out_dim=4096).head
    for module in head.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.01)
            assert module.bias is None or not module.bias.any()


def test_every_parameter_and_buffer_is_written():
    """Nothing is left as the uninitialised memory it starts as."""
    networks = [network(0, out_dim=64) for _ in range(2)]
    for fill, module in zip((float("nan"), 7.0), networks, strict=True):
        for tensor in module.state_dict().values():
            tensor.fill_(0 if tensor.dtype == torch.int64 else fill)
        generator = torch.Generator().manual_seed(3)
        init_encoder_(module.encoder, generator)
        init_head_(module.head, generator)
    one, two = (module.state_dict().values() for module in networks)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_layer_that_is_not_known_is_refused(generator):
    with pytest.raises(ValueError, match="PReLU"):
        init_encoder_(nn.Sequential(nn.PReLU()), generator)


def test_student_at_the_ends_of_alpha_is_the_teacher_or_the_fresh_draw():
    teacher, fresh = small(0), small(1)
    for alpha, source in ((0.0, teacher), (1.0, fresh)):
        student = init_student_(small(1), teacher, alpha)
        for a, b in zip(student.parameters(), source.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("alpha", [1e-10, 0.2, 0.5, 0.9])
def test_student_between_is_the_papers_formula(alpha):
    teacher, fresh = small(0), small(1)
    student = init_student_(small(1), teacher, alpha)
    delta = math.sqrt(alpha**2 + (1 - alpha) ** 2)
    for s, t, f in zip(student.parameters(), teacher.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(
            s.double(),
            ((1 - alpha) * t.double() + alpha * f.double()) / delta,
            rtol=1e-6,
            atol=1e-8,
        )


def test_variance_does_not_depend_on_alpha():
    for alpha in (0.1, 0.3, 0.5, 0.8):
        draws = []
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            layers = [
                init_head_(nn.Linear(50, 40, device="meta").to_empty(device="cpu"), generator)
                for _ in range(2)
            ]
            draws.append(init_student_(layers[1], layers[0], alpha).weight.detach())
        assert torch.stack(draws).std().item() == pytest.approx(0.02, rel=0.01)


def test_alpha_1e_10_changes_about_one_entry_in_a_thousand():
    teacher = network(0, "vgg11")
    student = init_student_(network(1, "vgg11"), teacher, 1e-10)
    changed = sum(
        (a != b).sum().item()
        for a, b in zip(student.parameters(), teacher.parameters(), strict=True)
    )
    assert 5e-4 < changed / sum(p.numel() for p in teacher.parameters()) < 3e-3


def test_batch_norm_gain_becomes_one_over_delta_and_buffers_stay():
    student = init_student_(small(1), small(0), 0.5)
    assert student.encoder[1].weight[0].item() == pytest.approx(math.sqrt(2))
    assert (student.encoder[1].running_var == 1).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must lie in"):
        init_student_(small(1), small(0), alpha)


def test_streams_differ_by_seed_and_name_but_not_by_process():
    def draw(*key):
        return torch.randint(2**40, (3,), generator=random_stream(*key)).tolist()

    assert draw(0, "teacher-init") == draw(0, "teacher-init")
    keys = [
        (0, "teacher-init"),
        (1, "teacher-init"),
        (0, "student-init"),
        (0, "probe", "student-1"),
        (0, "probe", "student-11"),
    ]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    program = """if True:
        import torch
        from rtd.init import random_stream
        print(torch.randint(2**40, (3,), generator=random_stream(0, "probe", "x")).tolist())"""
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True
    ).stdout
    assert printed.strip() == str(draw(0, "probe", "x"))
