"""Ready for GPUs: what can be tested without one, and a run of all scripts where there is one.

Tensors on the meta device have no values: whatever waits for a value, or mixes them with tensors of
the CPU elementwise, fails there as it would wait or fail on a GPU.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from rtd import interpolation, landscape, last_layer, losses, probes, pruning
from rtd.data import Dataset, Split, normalize
from rtd.errors import InputError
from rtd.harness import device as devices
from rtd.harness.device import describe, lacks_bf16, pick_device, tf32
from rtd.init import init_encoder_, init_head_
from rtd.models import autocast, build_network, materialize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
ROOT = Path(__file__).resolve().parent.parent
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def small_network(encoder="resnet20"):
    """Without values, on the meta device."""
    return build_network(encoder, out_dim=300, hidden_dim=32, bottleneck_dim=16)


def some_images(device, n=8):
    return torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device=device)


def waits(function):
    """How often a GPU would be waited for: reads of values, and shapes that depend on values."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return sum(event.count for event in profiler.key_averages() if event.key in WAITS)


class _StrictDraws(TorchFunctionMode):
    """The generators here are the CPU's, with which a GPU draws nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("generator") is not None:
            assert result.device.type == "cpu", func
        return result


@pytest.fixture
def meta(monkeypatch):
    """The device "meta", strict about generators; autocast, which it has not, does nothing."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    with _StrictDraws():
        yield torch.device("meta")


@pytest.fixture
def settings(monkeypatch):
    """What ``pick_device`` sets for the whole process is as before after the test."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = "allow_tf32", "allow_bf16_reduced_precision_reduction"
    before = [(matmul, name, getattr(matmul, name)) for name in names]
    before += [(cudnn, name, getattr(cudnn, name)) for name in ("allow_tf32", "benchmark")]
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    for module, name, value in before:
        setattr(module, name, value)
    torch.use_deterministic_algorithms(deterministic)


def machine(monkeypatch, gpus=0, mps=False):
    """A machine with so many GPUs, and with MPS or without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch, settings):
    for gpus, mps, expected in ((1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        machine(monkeypatch, gpus, mps)
        assert pick_device("auto").type == expected


def test_torchrun_gives_each_process_a_gpu_and_never_mps(monkeypatch, settings):
    machine(monkeypatch, gpus=2)
    assert pick_device("auto", launched=True, local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(InputError, match="--nproc-per-node must be at most 2"):
        pick_device("cuda", launched=True, local_rank=2)
    machine(monkeypatch, mps=True)
    assert pick_device("auto", launched=True).type == "cpu"
    with pytest.raises(InputError, match="--device mps.*torchrun"):
        pick_device("mps", launched=True)
    assert pick_device("mps").type == "mps"


def test_a_device_that_is_not_there_is_refused(monkeypatch, settings):
    machine(monkeypatch)
    for name in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"--device {name}.*available: cpu"):
            pick_device(name)


def test_products_keep_their_digits_and_deterministic_runs_choose_no_algorithm_by_time(settings):
    pick_device("cpu")
    matmul = torch.backends.cuda.matmul
    assert not (matmul.allow_bf16_reduced_precision_reduction or matmul.allow_tf32)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    pick_device("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


def test_tf32_is_on_within_its_block_alone(settings):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    for precision in devices.PRECISIONS:
        with contextlib.suppress(KeyError), tf32(precision):
            assert all(flag.allow_tf32 is (precision == "tf32") for flag in flags)
            raise KeyError
        assert not any(flag.allow_tf32 for flag in flags)


def test_a_cpu_without_bf16_is_warned_about(monkeypatch):
    cpu = torch.device("cpu")
    for capability, lacks in (("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
        assert lacks_bf16(cpu) is lacks
        assert ("fp32 is many times as fast" in describe(cpu, "bf16")) is lacks
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not lacks_bf16(cpu)


def test_outputs_come_in_blocks_on_cpus_and_all_at_once_on_gpus():
    """A GPU has no cache to fit them into, and each launch costs as much as several blocks."""
    found = [last_layer.blocks(300, 200, torch.device(name)) for name in ("cpu", "cuda")]
    assert found == [[slice(0, 200), slice(200, 300)], [slice(0, 300)]]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("encoder", ["resnet20", "vgg11", "vit-tiny"])
def test_a_step_stays_on_its_device_and_waits_for_nothing(meta, encoder, dtype):
    network = small_network(encoder).train()
    last = network.head.l2_bottleneck
    teacher = last.normalized_weight().detach()
    for kind in last_layer.LOSSES:
        network.zero_grad()
        z = network.bottleneck(normalize(some_images(meta), MEAN, STD))
        z_t = z.detach()
        options = {"kind": kind, "dtype": dtype, "diagnostics": True}
        lme_t = last_layer.output_log_mean_exp(z_t, teacher)
        result = last_layer.last_layer_loss(
            z, last.last_layer.weight, z_t, teacher, lme_t, **options
        )
        result.loss.backward()
        assert all(value.device == meta for value in result)
        assert all(p.grad.device == meta for p in network.parameters())


def test_statistics_of_batch_norm_are_estimated_without_a_wait(meta):
    network = small_network()
    batches = normalize(some_images(meta), MEAN, STD).split(3)
    interpolation.recompute_batch_norm_(network, batches)
    assert all(tensor.device == meta for tensor in network.state_dict().values())


def test_planes_masks_and_divergences_stay_on_their_device(meta):
    network = small_network().eval()
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    assert all(x.device == meta for x in interpolation.interpolate(state, state, 0.3).values())
    weights = pruning.prunable(network)
    masks = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
    pruning.Masking(weights, masks)()  # read from a file, they are on the CPU
    f = probes.extract_features(network.encoder, some_images(meta), MEAN, STD, batch_size=3)
    z, weight = torch.empty(8, 16, device=meta), torch.empty(300, 16, device=meta)
    sides = landscape.teacher_side(z, weight)
    found = landscape.divergences(z, weight, z, weight, *sides)
    assert {x.device for x in (f, *sides, found, landscape.embedding_divergences(f, f))} == {meta}


def test_a_point_of_a_landscape_is_waited_for_once_and_one_of_a_line_never():
    generator = torch.Generator().manual_seed(0)
    network = materialize(small_network()).eval()
    init_encoder_(network.encoder, generator)
    init_head_(network.head, generator)
    split = Split(some_images("cpu"), torch.arange(8) % 2)
    place = landscape.Landscape(network, Dataset("black", split, split, 2, MEAN, STD), batch_size=2)
    assert waits(lambda: place.recompute_batch_norm_(network)) == 0
    assert waits(lambda: place.evaluate(network)) <= 1  # tolist on the CPU counts as none
    state = network.state_dict()
    assert waits(lambda: interpolation.interpolate(state, state, 0.3)) == 0


def test_knn_waits_twice_whatever_the_number_of_chunks(monkeypatch):
    x, y = torch.randn(600, 4, generator=torch.Generator().manual_seed(0)), torch.arange(600) % 3
    monkeypatch.setattr(probes, "CHUNK", 600 * 50)  # chunks of 50 images
    assert waits(lambda: probes.knn_probe_torch(x, y, x, y)) == 2  # classes, hits


def test_the_linear_probe_trains_where_its_features_are(meta, monkeypatch):
    """Its generator is the CPU's, and it waits but once, for its accuracy."""
    x, y = torch.empty(60, 4, device=meta), torch.zeros(60, dtype=torch.long, device=meta)
    plain = torch.optim.AdamW  # meta has no fused one
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, fused, **options: plain(parameters, **options)
    )
    seen = []
    monkeypatch.setattr(torch.Tensor, "item", lambda self: seen.append(self.device) or 0.5)
    assert probes.linear_probe(x, y, x, y, 3, torch.Generator(), batch_size=20) == 50
    assert seen.count(meta) == 1  # the others are the optimizer's, of its counts on the CPU


def test_scikit_learn_sees_features_of_the_cpu_alone(meta, monkeypatch):
    monkeypatch.setattr(probes, "knn_probe_torch", lambda *arguments: arguments[-1])
    x = torch.empty(60, 4, device=meta)
    assert probes.knn_probe(x, x, x, x, k=7) == 7  # .numpy() would have failed


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
    network = materialize(small_network())
    init_encoder_(network.encoder, torch.Generator().manual_seed(0))
    init_head_(network.head, torch.Generator().manual_seed(1))
    network, last = network.cuda().train(), network.head.l2_bottleneck
    images, teacher = some_images("cuda"), last.normalized_weight().detach()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # at first all may wait
        try:
            optimizer.zero_grad()
            with autocast(images.device, precision):
                z = network.bottleneck(normalize(images, MEAN, STD))
            dtype = torch.bfloat16 if precision == "bf16" else None
            arguments = z, last.last_layer.weight, z.detach(), teacher
            last_layer.last_layer_loss(*arguments, dtype=dtype).loss.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def run(script, *flags, device="cuda"):
    command = [sys.executable, f"{script}.py", *map(str, flags), "--device", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_all_five_scripts_run_on_cuda(tmp_path, precision):
    every_script_runs(tmp_path, precision)


def every_script_runs(folder, precision, device="cuda"):
    """A tiny distillation, probes of it, tickets and lines from its student, and its landscape."""
    data = f"--subset 40 --test-subset 30 --precision {precision}".split()
    small = "--encoder resnet20 --head-hidden 32 --bottleneck-dim 16 --out-dim 64"
    networks = folder / "distill" / "checkpoint.pt"

    def out(name):
        return "--no-plot", "--out", folder / name

    def on(script, *flags):
        run(script, *data, *flags, device=device)

    distill = (*small.split(), "--alpha", 1, "--batch-size", 16, "--k", 5, "--epochs", 2)
    on("run_distill", *distill, *out("distill"))
    on("run_distill", *distill, "--ema", 0.1, "--epochs", 1, *out("ema"))
    run("run_distill", *data, *distill, "--epochs", 3, *out("distill"), "--resume", device=device)
    on("run_probe", networks, "--k", 5, "--out", folder / "probe.csv")
    supervised = "--init", f"{networks}:student", "--batch-size", 16, "--epochs", 2
    on("run_imp", *supervised, "--rounds", 1, *out("imp"))
    lines = "--runs", 2, "--points", 3, "--bn-statistics", "recompute", "interpolate"
    on("run_lmc", *supervised, *lines, *out("lmc"))
    plane = "--origin", f"{networks}:teacher", "--x-axis", f"{networks}:student"
    plane += "--y-axis", f"{networks}:student-init", "--bn-statistics", "recompute", "--k", 5
    grid = "--x-range", 0, 1, 2, "--y-range", 0, 1, 2
    on("run_landscape", *plane, *grid, *out("landscape"))
