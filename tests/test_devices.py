"""Ready for GPUs: what can be tested without one, and a run of all scripts where there is one.

Tensors on the meta device have no values: whatever waits for a value, or mixes them with tensors of
the CPU elementwise, fails there as it would wait or fail on a GPU.
"""

import contextlib
import platform

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, finish, readers, start
from torch.overrides import TorchFunctionMode

from rtd import distill, interpolation, landscape, last_layer, losses, probes, pruning
from rtd.data import Dataset, Split
from rtd.errors import InputError
from rtd.harness import device as devices
from rtd.models import build_network, random_network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL = {"encoder": "resnet20", "out_dim": 300, "hidden_dim": 32, "bottleneck_dim": 16}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def black(device):
    """A data set of 8 images."""
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device)
    split = Split(images, torch.arange(8, device=device) % 2)
    return Dataset("black", split, split, 2, MEAN, STD)


def student_of_itself(network, data, kind="ce"):
    answers = distill.teacher_answers(network, MEAN, STD, 1.0, data.train.images)
    return distill.Distiller(network.train(), distill.FrozenTeacher(network, answers), data, kind)


class _StrictDraws(TorchFunctionMode):
    """The generators here are the CPU's, with which a GPU draws nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        assert kwargs.get("generator") is None or result.device.type == "cpu", func
        return result


@pytest.fixture
def meta(monkeypatch):
    """The device "meta", strict about generators; autocast, which it has not, does nothing."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    with _StrictDraws():
        yield torch.device("meta")


@pytest.fixture
def settings(monkeypatch):
    """(matmul, cudnn): what ``pick_device`` sets for the whole process is as before afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for flags in (matmul, cudnn):
        for name in ("allow_tf32", "allow_bf16_reduced_precision_reduction", "benchmark"):
            if hasattr(flags, name):
                monkeypatch.setattr(flags, name, getattr(flags, name))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield matmul, cudnn
    monkeypatch.undo()  # torch imports more below, which would not like what is patched
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize(
    ("name", "gpus", "mps", "rank", "expected"),
    [
        ("auto", 1, True, None, "cuda"),
        ("auto", 0, True, None, "mps"),
        ("auto", 0, False, None, "cpu"),
        ("mps", 0, True, None, "mps"),
        ("cuda", 0, False, None, "--device cuda.*available: cpu"),
        ("mps", 0, False, None, "--device mps.*available: cpu"),
        # torchrun gives a rank
        ("auto", 2, False, 1, "cuda:1"),
        ("cuda", 1, False, 0, "--nproc-per-node must be at most 1"),
        ("auto", 0, True, 0, "cpu"),
        ("mps", 0, True, 0, "--device mps.*torchrun"),
    ],
)
def test_a_device_is_picked_or_refused(monkeypatch, settings, name, gpus, mps, rank, expected):
    """auto takes CUDA, then MPS, then the CPU; torchrun gives each process a GPU, and never MPS."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    refused = expected.startswith("--")  # in these words
    with pytest.raises(InputError, match=expected) if refused else contextlib.nullcontext():
        assert devices.pick_device(name, False, rank, 2) == torch.device(expected)


def test_products_keep_their_digits_and_deterministic_runs_choose_no_algorithm_by_time(settings):
    matmul, cudnn = settings
    devices.pick_device("cpu")
    assert not matmul.allow_bf16_reduced_precision_reduction and cudnn.benchmark
    with devices.tf32("tf32"):
        assert matmul.allow_tf32 and cudnn.allow_tf32
    assert not (matmul.allow_tf32 or cudnn.allow_tf32)
    devices.pick_device("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and not cudnn.benchmark


@pytest.mark.parametrize(
    ("machine", "capability", "slow"),
    [("x86_64", "AVX2", True), ("x86_64", "AVX512", False), ("arm64", "DEFAULT", False)],
)
def test_a_processor_without_bf16_is_said(monkeypatch, machine, capability, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    said = devices.describe(torch.device("cpu"), "bf16")
    assert ("no instructions for it: fp32 is many times as fast" in said) == slow


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder", ["resnet20", "vgg11", "vit-tiny"])
def test_a_step_stays_on_its_device_and_waits_for_nothing(meta, encoder, precision):
    network, index = build_network(**SMALL | {"encoder": encoder}), torch.arange(8, device=meta)
    for kind in last_layer.LOSSES:
        distiller = student_of_itself(network, black(meta), kind)
        result = distiller(index, observe=True, precision=precision)
        result.loss.backward()
        assert all(value.device == meta for value in result)
        assert all(p.grad.device == meta for p in network.parameters())
        distiller.after_step()


def test_lines_masks_and_divergences_stay_on_their_device_and_wait_for_nothing(meta):
    network, images = build_network(**SMALL).eval(), black(meta).train.images
    state = network.state_dict()
    mixed = interpolation.interpolate(state, state, 0.3)
    assert {x.device for x in (*state.values(), *mixed.values())} == {meta}
    weights = pruning.prunable(network)
    pruning.apply_masks_(weights, pruning.dense_masks(weights))
    f = probes.extract_features(network.encoder, images, MEAN, STD, batch_size=3)
    z, weight = torch.empty(8, 16, device=meta), torch.empty(300, 16, device=meta)
    sides = landscape.teacher_side(z, weight)
    found = landscape.divergences(z, weight, z, weight, *sides)
    assert {x.device for x in (f, *sides, found, landscape.embedding_divergences(f, f))} == {meta}


def test_the_linear_probe_trains_where_its_features_are(meta, monkeypatch):
    """Its generator is the CPU's, and it waits but once, for its accuracy."""
    x, y = torch.empty(60, 4, device=meta), torch.zeros(60, dtype=torch.long, device=meta)
    plain = torch.optim.AdamW  # meta has no fused one
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, fused, **options: plain(parameters, **options)
    )
    seen = []
    monkeypatch.setattr(torch.Tensor, "item", lambda self: seen.append(self.device) or 0.5)
    found = probes.linear_probe(x, y, x, y, 3, torch.Generator(), batch_size=20)
    assert found == 100 * (0.5 / 60)
    assert seen.count(meta) == 1  # the others are the optimizer's, of its counts on the CPU


@cuda
def test_cuda_gives_the_cpus_numbers():
    """Loss and gradients in fp32 and bf16 against float64, and k-NN against scikit-learn."""
    generator = torch.Generator().manual_seed(0)
    z, z_t, weight, weight_t = (
        F.normalize(torch.randn(n, 64, generator=generator, dtype=torch.float64))
        for n in (32, 32, 20_000, 20_000)
    )
    plain = z.clone().requires_grad_(), weight.clone().requires_grad_()
    last_layer.last_layer_loss(*plain, z_t, weight_t).loss.backward()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        z_c, weight_c, *teacher = (x.float().cuda() for x in (z, weight, z_t, weight_t))
        z_c.requires_grad_(), weight_c.requires_grad_()
        result = last_layer.last_layer_loss(z_c, weight_c, *teacher, dtype=dtype, diagnostics=True)
        result.loss.backward()
        expected = losses.kl_divergence(z @ weight.T, z_t @ weight_t.T).mean().item()
        assert result.kl.item() == pytest.approx(expected, rel=tolerance)
        for ours, reference in ((z_c.grad, plain[0].grad), (weight_c.grad, plain[1].grad)):
            assert (ours.cpu() - reference).abs().max() <= tolerance * reference.abs().max()
    x, y = torch.randn(2000, 64, generator=generator) + 30, torch.arange(2000) % 10
    data = x[:1500], y[:1500], x[1500:], y[1500:]
    assert probes.knn_probe(*(part.cuda() for part in data)) == probes.knn_probe(*data)


@cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_is_not_waited_for_within_a_step(precision):
    """Forward, backward and optimizer; torch itself tells."""
    network = random_network(torch.Generator().manual_seed(0), **SMALL).cuda()
    distiller, index = student_of_itself(network, black("cuda")), torch.arange(8, device="cuda")
    optimizer = distill.adamw(network)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # at first all may wait
        try:
            distiller(index, precision=precision).loss.backward()
            optimizer.step()
            distiller.after_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_all_five_scripts_run_on_cuda(tmp_path, precision):
    """A tiny distillation, probes of it, tickets and lines from its student, and its landscape."""
    lines = [("distill", f"{TINY} --alpha 1 --epochs {more}") for more in ("2", "3 --resume")]
    lines += (readings := [*readers(tmp_path / "distill" / "checkpoint.pt")])
    lines += [(n, f"{f} --rounds 2 --resume") for n, f in readings if n == "imp"]
    lines.append(("distill", f"{TINY} --alpha 1 --ema 0.1 --epochs 1 --overwrite"))
    for name, flags in lines:
        finish(start(name, flags, f"--device cuda --precision {precision} --out", tmp_path / name))
