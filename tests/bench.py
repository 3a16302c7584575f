"""Time what the scripts do against the floor and against a plain implementation; prints Markdown tables of ratios.

    python tests/bench.py                     # about ten minutes on two cores; leave the machine alone meanwhile
    python tests/bench.py --only step --encoder vgg11

Everything runs on random images: the cost does not depend on what is in them. In each table all rows are measured in turn,
round after round, and the medians compared; ratios carry over from machine to machine better than seconds do.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rtd import pruning  # noqa: E402
from rtd.classifier import build_classifier, load_starts  # noqa: E402
from rtd.data import Dataset, Split, normalize  # noqa: E402
from rtd.device import autocast, describe, lacks_bf16, pick_device  # noqa: E402
from rtd.distill import Distiller, FrozenTeacher  # noqa: E402
from rtd.init import init_network_, init_student_  # noqa: E402
from rtd.interpolation import Plane  # noqa: E402
from rtd.landscape import Landscape, norms  # noqa: E402
from rtd.last_layer import last_layer_loss, output_log_mean_exp  # noqa: E402
from rtd.models import ENCODERS, build_network, materialize  # noqa: E402
from rtd.probes import extract_features, knn_probe, linear_probe  # noqa: E402
from rtd.train import Trainer  # noqa: E402

BF16 = torch.bfloat16
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


def some_data(train, test, device):
    """A ``Dataset`` of random images and labels."""
    generator = torch.Generator().manual_seed(0)
    splits = [
        Split(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(n) % 10)
        for n in (train, test)
    ]
    return Dataset("random", *splits, 10, MEAN, STD).to(device)


def teacher_and_student(args, device):
    networks = [
        init_network_(materialize(build_network(args.encoder, out_dim=args.out_dim)), torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    ]
    teacher, student = networks
    return teacher.to(device).eval(), init_student_(student, teacher, 0.5).to(device).train()


def medians(rows, rounds, device):
    """{name: median seconds} of {name: function}: all rows once to warm up, then in turn."""
    times = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, function in rows.items():
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 0:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def bare_encoder(args, device, data, precision="fp32"):
    """The floor: forward and backward of the student's encoder alone."""
    _, student = teacher_and_student(args, device)
    x = normalize(data.train.images[: args.batch_size], MEAN, STD)

    def step():
        with autocast(device, precision):
            features = student.encoder(x)
        features.backward(torch.ones_like(features))
        student.zero_grad()

    return step


def our_step(args, device, data, precision="fp32"):
    """A step as run_distill.py does it."""
    teacher, student = teacher_and_student(args, device)
    frozen = FrozenTeacher(teacher, data.train.images, MEAN, STD)
    distiller = Distiller(student, frozen, precision, compiled=args.compile)
    del teacher
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.001, weight_decay=0.0, fused=device.type != "mps")
    index = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: args.batch_size].to(device)

    def step():
        optimizer.zero_grad()
        distiller(normalize(data.train.images[index], MEAN, STD), index).loss.backward()
        optimizer.step()

    return step


def plain_step(args, device, data, precision="fp32"):
    """The same step as one would first write it: both networks run, soft-max chains, diagnostics every time."""
    teacher, student = (network.to(memory_format=torch.contiguous_format) for network in teacher_and_student(args, device))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.001, weight_decay=0.0, foreach=False, fused=False)
    index = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: args.batch_size].to(device)

    def step():
        x = normalize(data.train.images[index], MEAN, STD).contiguous()
        with autocast(device, precision):
            with torch.no_grad():
                t = teacher(x)
            s = student(x)
        log_p_t, log_p_s = t.float().log_softmax(1), s.float().log_softmax(1)
        loss = -(log_p_t.exp() * log_p_s).sum(1).mean()
        with torch.no_grad():
            entropies = [-(log_p.exp() * log_p).sum(1).mean().item() for log_p in (log_p_t, log_p_s)]
            assert loss.item() - entropies[0] > -1e-3  # the KL
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


STEPS = {
    "bare encoder, forward + backward": (bare_encoder, "fp32"),
    "step": (our_step, "fp32"),
    "plain step": (plain_step, "fp32"),
    "bare encoder, bf16": (bare_encoder, "bf16"),
    "step, bf16": (our_step, "bf16"),
}


def bench_step(args, device):
    data = some_data(2 * args.batch_size, args.batch_size, device)
    precisions = ("fp32",) if lacks_bf16(device) else ("fp32", "bf16")
    rows = {name: make(args, device, data, precision) for name, (make, precision) in STEPS.items() if precision in precisions}
    seconds = medians(rows, args.rounds, device)
    bare, plain = seconds["bare encoder, forward + backward"], seconds["plain step"]
    print("| | ms | x bare | plain / this | images/s |\n|---|---:|---:|---:|---:|")
    for name, s in seconds.items():
        print(f"| {name} | {1000 * s:.0f} | {s / bare:.2f} | {plain / s:.2f} | {args.batch_size / s:.0f} |")


def in_child(function, *arguments):
    """function(*arguments) in a fresh process, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def own_peak_megabytes():
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent process had when it started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_memory(args, name, images):
    """(peak megabytes beyond the imported libraries, or of the GPU; seconds per step) of a process that takes three steps."""
    device = pick_device(args.device)
    libraries = own_peak_megabytes()
    data = some_data(images, args.batch_size, device)
    step = STEPS[name][0](args, device, data, STEPS[name][1])
    times = medians({name: step}, 3, device)[name]
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20, times
    return own_peak_megabytes() - libraries, times


def bench_memory(args, _):
    found = {name: in_child(peak_memory, args, name, args.batch_size)[0] for name in ("step", "plain step")}
    print("Memory beyond that of the imported libraries.\n")
    print("| | peak MB | x plain |\n|---|---:|---:|")
    for name, size in found.items():
        print(f"| {name} | {size:.0f} | {size / found['plain step']:.2f} |")


def bench_scaling(args, _):
    print("| images | ms per image | peak MB | images' own MB |\n|---:|---:|---:|---:|")
    for images in args.images:
        size, seconds = in_child(peak_memory, args, "step", images)
        print(f"| {images} | {1000 * seconds / args.batch_size:.2f} | {size:.0f} | {images * 3 * 32 * 32 / 2**20:.0f} |")


def bench_probe(args, device):
    train, test = args.probe_images
    data = some_data(train, test, device)
    _, student = teacher_and_student(args, device)
    features = {}

    def extract():
        features["train"], features["test"] = (
            extract_features(student.encoder, split.images, MEAN, STD) for split in (data.train, data.test)
        )

    def both(probe, *options):
        return lambda: probe(features["train"], data.train.labels, features["test"], data.test.labels, *options)

    rows = {"feature extraction": extract, "20-NN probe": both(knn_probe)}
    rows["linear probe"] = lambda: both(linear_probe, 10, torch.Generator().manual_seed(0))()
    seconds = medians(rows, 1, device)
    print(f"\n{train} training and {test} test images:\n\n| | s | x extraction |\n|---|---:|---:|")
    for name, s in seconds.items():
        print(f"| {name} | {s:.1f} | {s / seconds['feature extraction']:.2f} |")


def bench_imp(args, device):
    """A step of supervised training, augmentation included, dense and masked, against the bare encoder."""
    batches = 4
    data = some_data(batches * args.batch_size, args.batch_size, device)
    rows = {"bare encoder, forward + backward": bare_encoder(args, device, data)}
    for name in ("supervised step", "supervised step, masked"):
        (start,) = load_starts(["random"], args.encoder, data, 0)
        classifier = build_classifier(start, data.num_classes, torch.Generator().manual_seed(0)).to(device)
        trainer = Trainer(classifier, data, 10**6, (0,), lr=1e-4, batch_size=args.batch_size)
        if "masked" in name:
            weights = pruning.prunable(classifier)
            masks = pruning.dense_masks(weights)
            masks = pruning.prune_smallest(masks, weights, pruning.remaining(masks) // 2)
            trainer.after_step = pruning.Masking(weights, masks)
        rows[name] = trainer.train_epoch
    seconds = medians(rows, args.rounds, device)
    seconds = {name: s / (1 if "bare" in name else batches) for name, s in seconds.items()}
    print_ratios(seconds, "step")


def bench_landscape(args, device):
    """A point of a landscape, without probes, against a bare eval forward of the same network over the same images."""
    data = some_data(7 * args.batch_size, args.batch_size, device)
    teacher, student = teacher_and_student(args, device)
    states = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in (teacher, student)]
    states.append({name: -tensor if tensor.is_floating_point() else tensor for name, tensor in states[0].items()})
    plane = Plane(states, [name for name, _ in student.named_parameters()])
    landscape = Landscape(teacher, data)
    student.eval()

    @torch.no_grad()
    def forward():
        for name in ("train", "test"):
            for x in landscape.batches(name):
                student(x)

    def point():
        norms(plane.write_(student, 0.3, 0.2))
        landscape.evaluate(student)

    print_ratios(medians({"bare eval forward": forward, "point": point}, args.rounds, device), f"{8 * args.batch_size} images")


def print_ratios(seconds, of):
    """A table of seconds against those of the first row."""
    print(f"| | ms a {of} | x bare |\n|---|---:|---:|" if of == "step" else f"| | ms, {of} | x bare |\n|---|---:|---:|")
    for name, s in seconds.items():
        print(f"| {name} | {1000 * s:.0f} | {s / next(iter(seconds.values())):.2f} |")


def bench_precision(args, device):
    """What float32 and bf16 leave of a small KL and of its gradient; the truth is float64's."""
    generator = torch.Generator().manual_seed(0)
    draw = {name: torch.randn(n, 256, generator=generator, dtype=torch.float64) for name, n in (("z", 64), ("w", args.out_dim))}
    move = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in draw.items()}
    z_t, weight_t = F.normalize(draw["z"]), F.normalize(draw["w"])
    print("| KL | CE - H, float32 | ours, float32 | ours, bf16 products | gradient's cosine, float32 | bf16 |")
    print("|---:|---:|---:|---:|---:|---:|")
    for distance in (1.0, 0.1, 0.01, 0.001):
        z, weight = F.normalize(draw["z"] + distance * move["z"]), draw["w"] + distance * move["w"]
        found = {}
        for name, kind, products in (("true", torch.float64, None), ("fp32", torch.float32, None), ("bf16", torch.float32, BF16)):
            inputs = [x.to(kind).clone() for x in (z, weight, z_t, weight_t)]
            inputs[0].requires_grad_()
            lme_t = output_log_mean_exp(inputs[2], inputs[3])  # as of a frozen teacher
            result = last_layer_loss(*inputs, lme_t, dtype=products, diagnostics=True)
            result.loss.backward()
            found[name] = (result.kl.item(), inputs[0].grad.double().flatten())
        s, t = z.float() @ F.normalize(weight).float().T, z_t.float() @ weight_t.float().T
        naive = (-(t.softmax(1) * s.log_softmax(1)).sum(1) + (t.softmax(1) * t.log_softmax(1)).sum(1)).mean().item()
        cosine = {name: F.cosine_similarity(grad, found["true"][1], dim=0).item() for name, (_, grad) in found.items()}
        values = [f"{x:.2e}" for x in (found["true"][0], naive, found["fp32"][0], found["bf16"][0])]
        print("| " + " | ".join([*values, f"{cosine['fp32']:.4f}", f"{cosine['bf16']:.4f}"]) + " |")


PARTS = {"precision": bench_precision, "step": bench_step, "memory": bench_memory, "scaling": bench_scaling, "probe": bench_probe}
PARTS |= {"imp": bench_imp, "landscape": bench_landscape}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure; default all")
    parser.add_argument("--encoder", nargs="+", choices=ENCODERS, default=["vgg11", "resnet18"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out-dim", type=int, default=2**16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 8000, 32000])
    parser.add_argument("--probe-images", type=int, nargs=2, default=[50_000, 10_000], metavar=("TRAIN", "TEST"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile the student in our step")
    args = parser.parse_args()
    device = pick_device(args.device)
    print(f"{describe(device, platform.machine())}, {os.cpu_count()} cores, torch {torch.__version__}, {args.rounds} rounds")
    for encoder in args.encoder:
        one = argparse.Namespace(**{**vars(args), "encoder": encoder})
        for name in args.only:
            if name in ("step", "imp", "landscape") or encoder == args.encoder[0]:
                print(f"\n### {name}: {encoder}, batch {args.batch_size}, {args.out_dim} outputs\n", flush=True)
                PARTS[name](one, device)


if __name__ == "__main__":
    main()
