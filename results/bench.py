"""Time what the scripts do, against the least it can cost and against a plain implementation.

    python results/bench.py                     # about ten minutes on two idle cores
    python results/bench.py --only step --encoder vgg11

It prints tables in Markdown. The images are random, since their contents cost nothing. The rows of
a table are measured in turn, round after round, and their medians are compared: ratios carry over
from machine to machine better than seconds do.
"""

import argparse
import copy
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rtd import pruning
from rtd.data import Dataset, Split, normalize
from rtd.distill import Distiller, FrozenTeacher, adamw, teacher_answers
from rtd.harness.datasets import CIFAR
from rtd.harness.device import DEVICES, describe, lacks_bf16, pick_device
from rtd.harness.distributed import World
from rtd.harness.training import Training
from rtd.init import init_student_, random_stream
from rtd.interpolation import Plane
from rtd.landscape import Landscape
from rtd.last_layer import last_layer_loss, output_log_mean_exp
from rtd.models import ENCODERS, autocast, build_network, norms, random_network
from rtd.probes import extract_features, knn_probe, linear_probe
from rtd.supervised import SupervisedLoss, build_classifier, sgd

BARE = "bare encoder, forward + backward"


def random_data(train, test, device):
    """A ``Dataset`` of random images."""
    generator = torch.Generator().manual_seed(0)
    splits = []
    for n in (train, test):
        images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
        splits.append(Split(images, torch.arange(n) % 10))
    return Dataset("random", *splits, 10, *CIFAR).to(device)


def teacher_and_student(args, device):
    model = {"encoder": args.encoder, "out_dim": args.out_dim}
    teacher, student = (random_network(random_stream(seed), **model) for seed in (0, 1))
    return teacher.to(device).eval(), init_student_(student, teacher, 0.5).to(device).train()


def medians(rows, rounds, device):
    """{name: median seconds} of {name: function}: all once to warm up, then in turn."""
    times = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, function in rows.items():
            began = time.perf_counter()
            function()
            getattr(torch, device.type).synchronize()  # a GPU still works when the call returns
            if turn > 0:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(header, rows):
    """A table in Markdown; all columns but the first hold numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    print("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), flush=True)


def print_ratios(seconds, of, base):
    """A table of {name: seconds}, in ms and against those of the first row."""
    first = next(iter(seconds.values()))
    rows = [(name, f"{1000 * s:.0f}", f"{s / first:.2f}") for name, s in seconds.items()]
    print_table(("", f"ms, {of}", f"x {base}"), rows)


# ---------------------------------------------------------------------------------- distillation


def bare_step(args, device, data, precision="fp32"):
    """The least: forward and backward of the student's encoder alone."""
    _, student = teacher_and_student(args, device)
    x = normalize(data.train.images[: args.batch_size], *CIFAR)

    def step():
        with autocast(device, precision):
            features = student.encoder(x)
        features.backward(torch.ones_like(features))
        student.zero_grad()

    return step


def our_step(args, device, data, precision="fp32"):
    """A step of run_distill.py."""
    teacher, student = teacher_and_student(args, device)
    frozen = FrozenTeacher(teacher, teacher_answers(teacher, *CIFAR, 1.0, data.train.images))
    del teacher
    distiller = Distiller(student, frozen, data, compiled=args.compile)
    optimizer = adamw(student)
    index = some_indices(args, data)

    def step():
        optimizer.zero_grad()
        distiller(index, precision=precision).loss.backward()
        optimizer.step()

    return step


def plain_step(args, device, data, precision="fp32"):
    """The same step as one would first write it: two networks, soft-max chains, diagnostics."""
    teacher, student = (
        network.to(memory_format=torch.contiguous_format)
        for network in teacher_and_student(args, device)
    )
    optimizer = torch.optim.AdamW(student.parameters(), 0.001, weight_decay=0.0, foreach=False)
    index = some_indices(args, data)

    def step():
        x = normalize(data.train.images[index], *CIFAR).contiguous()
        with autocast(device, precision):
            with torch.no_grad():
                t = teacher(x)
            s = student(x)
        log_p_t, log_p_s = t.float().log_softmax(1), s.float().log_softmax(1)
        loss = -(log_p_t.exp() * log_p_s).sum(1).mean()
        with torch.no_grad():
            entropy, _ = (
                -(log_p.exp() * log_p).sum(1).mean().item() for log_p in (log_p_t, log_p_s)
            )
        assert loss.item() - entropy > -1e-3  # the KL
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def some_indices(args, data):
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    return order[: args.batch_size].to(data.train.images.device)


STEPS = {
    BARE: (bare_step, "fp32"),
    "step": (our_step, "fp32"),
    "plain step": (plain_step, "fp32"),
    "bare encoder, bf16": (bare_step, "bf16"),
    "step, bf16": (our_step, "bf16"),
}


def bench_step(args, device):
    """A step of distillation."""
    data = random_data(2 * args.batch_size, args.batch_size, device)
    rows = {
        name: make(args, device, data, precision)
        for name, (make, precision) in STEPS.items()
        if precision == "fp32" or not lacks_bf16(device)
    }
    seconds, rows = medians(rows, args.rounds, device), []
    for name, s in seconds.items():
        ratios = f"{s / seconds[BARE]:.2f}", f"{seconds['plain step'] / s:.2f}"
        rows.append((name, f"{1000 * s:.0f}", *ratios, f"{args.batch_size / s:.0f}"))
    print_table(("", "ms", "x bare", "plain / this", "images/s"), rows)


def in_child(function, *arguments):
    """function(*arguments) in a fresh process, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def own_peak_megabytes():
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent process had at the start
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_memory(args, name, images):
    """(peak MB beyond the imported libraries, or of the GPU; seconds a step) of three steps."""
    device, (make, precision) = pick_device(args.device), STEPS[name]
    build_network(args.encoder)  # it imports torchvision
    libraries = own_peak_megabytes()
    step = make(args, device, random_data(images, args.batch_size, device), precision)
    seconds = medians({name: step}, 3, device)[name]
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20, seconds
    return own_peak_megabytes() - libraries, seconds


def bench_memory(args, device):
    """Memory of a step, beyond that of the imported libraries."""
    names = "step", "plain step"
    found = {name: in_child(peak_memory, args, name, args.batch_size)[0] for name in names}
    rows = [(name, f"{size:.0f}", f"{size / found[names[1]]:.2f}") for name, size in found.items()]
    print_table(("", "peak MB", "x plain"), rows)


def bench_scaling(args, device):
    """Time and memory against the number of training images."""
    rows = []
    for images in args.images:
        size, seconds = in_child(peak_memory, args, "step", images)
        own = images * 3 * 32 * 32 / 2**20
        rows.append(
            (images, f"{1000 * seconds / args.batch_size:.2f}", f"{size:.0f}", f"{own:.0f}")
        )
    print_table(("images", "ms per image", "peak MB", "images' own MB"), rows)


# --------------------------------------------------------------------------- the other experiments


def bench_probe(args, device):
    """Both probes, against the extraction of their features."""
    data = random_data(*args.probe_images, device)
    _, student = teacher_and_student(args, device)
    splits, features = (data.train, data.test), {}

    def extract():
        for name, split in zip(("train", "test"), splits, strict=True):
            features[name] = extract_features(student.encoder, split.images, *CIFAR)

    def both(probe, *more):
        return probe(features["train"], splits[0].labels, features["test"], splits[1].labels, *more)

    rows = {"feature extraction": extract, "20-NN probe": lambda: both(knn_probe)}
    rows["linear probe"] = lambda: both(linear_probe, 10, torch.Generator().manual_seed(0))
    of = "{} training and {} test images".format(*args.probe_images)
    print_ratios(medians(rows, 1, device), of, "extraction")


def bench_imp(args, device):
    """A step of supervised training with augmentation, dense and masked."""
    batches = 4
    data = random_data(batches * args.batch_size, args.batch_size, device)
    flags = SimpleNamespace(batch_size=args.batch_size, precision="fp32", lr=1e-4)
    run = SimpleNamespace(args=flags, world=World(), device=device)
    rows = {BARE: bare_step(args, device, data)}
    for name in ("supervised step", "supervised step, masked"):
        encoder = teacher_and_student(args, "cpu")[1].encoder.state_dict()
        start = {"encoder": args.encoder, "image_size": 32}, encoder
        classifier = build_classifier(*start, data.num_classes, random_stream(0)).to(device)
        loss = SupervisedLoss(classifier, data, (0,))
        if "masked" in name:
            weights = pruning.prunable(classifier)
            masks = pruning.dense_masks(weights)
            masks = pruning.prune_smallest(masks, weights, pruning.remaining(masks) // 2)
            loss.pruned = weights, masks
        training = Training(loss, sgd(classifier, flags.lr), (0,), run, name)
        rows[name] = lambda to=training: to.run_epoch(to.epoch + 1)
    seconds = medians(rows, args.rounds, device)
    print_ratios({k: s / (1 if k == BARE else batches) for k, s in seconds.items()}, "step", "bare")


def bench_landscape(args, device):
    """A point of a landscape without probes, against a forward pass over the same images."""
    data = random_data(7 * args.batch_size, args.batch_size, device)
    teacher, student = teacher_and_student(args, device)
    states = [copy.deepcopy(network.state_dict()) for network in (teacher, student)]
    states.append({k: -x if x.is_floating_point() else x for k, x in states[0].items()})
    plane = Plane(states, [name for name, _ in student.named_parameters()])
    landscape = Landscape(teacher, data, batch_size=args.batch_size)
    student.eval()

    @torch.no_grad()
    def forward():
        for images in landscape.images.values():
            for x in images.split(args.batch_size):
                student(x)

    def point():
        norms(plane.write_(student, 0.3, 0.2))
        landscape.evaluate(student)

    rows = {"bare forward in eval mode": forward, "point": point}
    print_ratios(medians(rows, args.rounds, device), f"{8 * args.batch_size} images", "bare")


def bench_precision(args, device):
    """What float32 and bf16 leave of a small KL and of its gradient, against float64."""
    generator, double = torch.Generator().manual_seed(0), torch.float64
    sizes = (64, 256), (args.out_dim, 256)
    start, move = (
        [torch.randn(size, generator=generator, dtype=double) for size in sizes] for _ in range(2)
    )
    z_t, weight_t = map(F.normalize, start)
    rows = []
    for distance in (1.0, 0.1, 0.01, 0.001):
        z, weight = F.normalize(start[0] + distance * move[0]), start[1] + distance * move[1]
        kls, gradients = [], []
        for kind, products in ((double, None), (None, None), (None, torch.bfloat16)):
            inputs = [x.to(kind or torch.float32).clone() for x in (z, weight, z_t, weight_t)]
            inputs[0].requires_grad_()
            lme_t = output_log_mean_exp(*inputs[2:])  # as of a frozen teacher
            result = last_layer_loss(*inputs, lme_t, dtype=products, diagnostics=True)
            result.loss.backward()
            kls.append(result.kl.item())
            gradients.append(inputs[0].grad.double().flatten())
        s, t = z.float() @ F.normalize(weight).float().T, z_t.float() @ weight_t.float().T
        terms = (-(t.softmax(1) * x.log_softmax(1)).sum(1) for x in (s, t))
        kls.insert(1, (next(terms) - next(terms)).mean().item())
        cosines = (F.cosine_similarity(g, gradients[0], dim=0).item() for g in gradients[1:])
        rows.append([*(f"{kl:.2e}" for kl in kls), *(f"{cosine:.4f}" for cosine in cosines)])
    header = ["KL", "CE - H, float32", "ours, float32", "ours, bf16 products"]
    print_table([*header, "gradient's cosine, float32", "bf16"], rows)


PARTS = {
    "precision": bench_precision,
    "step": bench_step,
    "memory": bench_memory,
    "scaling": bench_scaling,
    "probe": bench_probe,
    "imp": bench_imp,
    "landscape": bench_landscape,
}


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (all)")
    add("--encoder", nargs="+", choices=ENCODERS, default=["vgg11", "resnet18"])
    add("--batch-size", type=int, default=256)
    add("--out-dim", type=int, default=2**16)
    add("--rounds", type=int, default=5, help="how often each row is measured")
    add("--images", type=int, nargs="+", default=[2000, 8000, 32000], help="numbers for scaling")
    sizes = {"nargs": 2, "default": [50_000, 10_000], "metavar": ("TRAIN", "TEST")}
    add("--probe-images", type=int, help="numbers for probe", **sizes)
    add("--device", choices=DEVICES, default="auto")
    add("--compile", action="store_true", help="torch.compile of the student in our step")
    return parser.parse_args()


def main(args):
    device = pick_device(args.device)
    about = (
        describe(device, platform.machine()),
        f"{os.cpu_count()} cores",
        f"torch {torch.__version__}",
    )
    print(", ".join([*about, f"{args.rounds} rounds"]))
    for encoder in args.encoder:
        one = argparse.Namespace(**vars(args) | {"encoder": encoder})
        for name in args.only:
            if name in ("step", "imp", "landscape") or encoder == args.encoder[0]:
                sizes = f"{encoder}, batch {args.batch_size}, {args.out_dim} outputs"
                words = PARTS[name].__doc__.partition("\n")[0]
                print(f"\n### {name}: {sizes}\n\n{words}\n", flush=True)
                PARTS[name](one, device)


if __name__ == "__main__":
    main(parse_args())
