"""Linear mode connectivity: is there a barrier between two runs from one start (section 6; Fig. 9)?

Train several times from one start with labels, each time in another batch order and with other
augmentation, then walk on the straight line between each two results. From a random start the test
error rises between them; from a student distilled without labels, the paper finds, it hardly does.

    python run_lmc.py --encoder resnet20 --epochs 4 --runs 2 --points 7   # digits, about a minute
    # first: run_distill.py --dataset cifar10 --data-dir data --encoder resnet18 --out runs/r18
    python run_lmc.py --dataset cifar10 --data-dir data --bn-statistics recompute interpolate \\
        --init runs/r18/checkpoint.pt:student-init runs/r18/checkpoint.pt:student
    torchrun --nproc-per-node=4 run_lmc.py ...       # the processes share the runs, then the lines

Recomputing batch norm's statistics changes the ends too: their weights are those of the trained
networks, but their errors need not be. Without batch norm the column bn says none.

Writes config.json, lmc.csv (a row a point), barriers.csv (of each pair of runs, then their mean and
std) and lmc.png; the trained networks into runs/: with --resume, other flags of the group "lines"
and more --runs train none of them again.
"""

import itertools
from operator import itemgetter
from pathlib import Path

import torch
from torch.optim.swa_utils import update_bn

from rtd import plots
from rtd.data import take
from rtd.errors import InputError
from rtd.harness import cli
from rtd.harness.checkpoint import SUPERVISED, load_starts, say_starts
from rtd.harness.console import progress
from rtd.harness.datasets import fingerprints
from rtd.harness.files import sha256
from rtd.harness.run import Run
from rtd.harness.sweeps import mean_and_std, plus_minus
from rtd.harness.training import SupervisedTraining, evaluate
from rtd.init import random_stream
from rtd.interpolation import error_barrier, interpolate
from rtd.models import autocast, materialize
from rtd.supervised import empty_classifier

COLUMNS = ("init", "i", "j", "gamma", "bn", "train_error", "test_error", "train_loss", "test_loss")
BARRIERS = ("init", "bn", "statistic", "i", "j", "train_barrier", "test_barrier")
PRODUCTS = ("barriers.csv", "lmc.csv", "lmc.*", "runs/init*-run*", "lines/init*")
LINES = ("points", "bn_statistics", "bn_batches", "line_subset")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    # fmt: off
    add = parser.group("start with these")
    cli.add_data_flags(add)
    cli.add_init_flags(add)
    add("--runs", cli.at_least(2), 5, "runs from each start; 5 make 10 pairs, 3 make 3; --resume can add some")
    add("--out", Path, Path("runs/lmc"), "folder of the run")
    parser.add_file_flags()
    add = parser.group("lines")
    add("--points", cli.at_least(3), 50, "points of a line, ends included; 11 suffice for a barrier")
    add("--bn-statistics", ("recompute", "interpolate"), "recompute",
        "* statistics of batch norm on the line: estimated anew from training images, or interpolated, which shows higher barriers")
    add("--bn-batches", cli.positive_int, 20, "batches from which these statistics are estimated")
    add("--line-subset", cli.positive_int, None,
        "training images, class-balanced, for the training error on the line; 10,000 by default, or all if fewer")
    parser.add_training_flags()
    parser.add_device_flags()
    parser.add_output_flags()
    # fmt: on
    args = parser.parse(argv, "init", "bn_statistics")
    args.bn_statistics.sort(reverse=True)  # recompute first, in whatever order they are given
    return args


def main(args, device, world):
    data = cli.load_data(args, world)
    if (args.line_subset or 0) > len(data.train):
        raise InputError(f"--line-subset {args.line_subset}: choose 1 to {len(data.train)}")
    starts = load_starts(args, data)
    run = Run(args, device, world, PRODUCTS, (*LINES, "runs"), fingerprints(data), args.init)
    title = say_starts(run, starts, data)
    data = data.to(device)

    # Train --runs times from each start.
    ends = list(itertools.product(starts, range(args.runs)))
    run.for_each(ends, lambda end, run: train(*end, data, run), "training run")

    # Walk between each two results of one start.
    pairs = itertools.combinations(range(args.runs), 2)
    lines = [(start, *pair) for start, pair in itertools.product(starts, pairs)]
    tables = [f"lines/{start.name}-{a}-{b}.csv" for start, a, b in lines]
    if not any(name.endswith("running_mean") for name in starts[0].state):
        args.bn_statistics = ["none"]  # without batch norm the flag has no meaning

    def finish(_):
        rows = run.concatenate("lmc.csv", COLUMNS, tables)
        summarize(run, rows)
        run.draw("lmc", plots.lmc, rows, title)

    run.for_each(lines, lambda line, run: walk(*line, data, run), "line", finish)


def train(start, number, data, run):
    """Train from a start; the runs of one start differ in batch order and augmentation alone."""
    stream, title = (run.args.seed, number), f"{start.kind}, run {number}"
    training = SupervisedTraining(start, data, stream, run, title)
    name = f"runs/{start.name}-run{number}.pt"
    contents = {"model": start.architecture, "data": training.data.source, "config": run.config}

    def save():
        run.save(name, contents | {"training": training.state()}, SUPERVISED)

    if saved := run.load(name, kind=SUPERVISED):
        training.load_state(saved["training"])
    for _ in training.epochs(save):
        pass
    final, best = training.accuracies[-1], max(training.accuracies)
    run.say(f"{title}: test accuracy {final:.2f} % (best {best:.2f} %), {training.seconds:.1f} s")


@torch.no_grad()
def walk(start, a, b, data, run):
    """Errors and losses between runs ``a`` and ``b`` of a start at all gamma."""
    args, file = run.args, f"lines/{start.name}-{a}-{b}"
    data = data.with_normalization(start.source)
    names = [f"runs/{start.name}-run{n}.pt" for n in (a, b)]
    states = [run.load(name, kind=SUPERVISED)["training"]["classifier"] for name in names]
    settings = {flag: getattr(args, flag) for flag in LINES}
    settings["ends"] = [sha256(run.folder / name) for name in names]
    line = run.load(f"{file}.pt")  # where its flags or its ends changed, it is walked anew
    rows = line["rows"] if line and line["settings"] == settings else []

    network = materialize(empty_classifier(start.architecture, data.num_classes)).to(run.device)
    train = take(data.train, args.line_subset or min(10_000, len(data.train)), "line")
    images = batch_norm_images(data.train.images, args.bn_batches, args.batch_size)
    gammas = torch.linspace(0, 1, args.points, dtype=torch.float64).tolist()
    points = list(itertools.product(args.bn_statistics, gammas))[len(rows) :]
    for bn, gamma in progress(points, f"{start.kind}, line {a}-{b}", "points"):
        network.load_state_dict(interpolate(*states, gamma))
        if bn == "recompute":
            batches = (data.normalize(x) for x in images.split(args.batch_size))
            with autocast(run.device, args.precision):
                update_bn(batches, network)
        row = dict(zip(COLUMNS, (start.spec, a, b, gamma, bn), strict=False))
        for name, split in (("train", train), ("test", data.test)):
            accuracy, loss = evaluate(network, split, data, args.precision, run.world)
            row |= {f"{name}_error": 100 - accuracy, f"{name}_loss": loss}
        rows.append(row)
        run.save(f"{file}.pt", {"settings": settings, "rows": rows})
    run.table(f"{file}.csv", COLUMNS, rows)


def batch_norm_images(images, batches, batch_size):
    """``batches`` full batches of images, the same for every line; all images if they fill none."""
    whole = len(images) // batch_size * batch_size  # images in full batches
    count = min(batches * batch_size, whole or len(images))
    order = torch.randperm(len(images), generator=random_stream(0, "batch-norm"))
    return images[order[:count].to(images.device)]


def summarize(run, rows):
    """Write the barrier of each pair, and say mean and deviation over those of a start."""
    barriers, summary = {}, []
    for (init, i, j, bn), line in itertools.groupby(rows, itemgetter("init", "i", "j", "bn")):
        errors = zip(*map(itemgetter("train_error", "test_error"), line), strict=True)
        cells = "pair", i, j, *map(error_barrier, errors)
        barriers.setdefault((init, bn), []).append(cells)
    for of, pairs in barriers.items():
        *_, train, test = zip(*pairs, strict=True)
        means, stds = zip(mean_and_std(train), mean_and_std(test), strict=True)
        cells = [*pairs, ("mean", None, None, *means), ("std", None, None, *stds)]
        summary += [dict(zip(BARRIERS, of + values, strict=True)) for values in cells]
        barrier = f"test error barrier {plus_minus(test)} points, n = {len(pairs)}"
        run.say(f"{of[0]}, statistics {of[1]}: {barrier}")
    run.table("barriers.csv", BARRIERS, summary)


if __name__ == "__main__":
    cli.run(main, parse_args())
