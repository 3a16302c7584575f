"""Linear mode connectivity: is there a barrier between two runs from the same start (paper section 6; Fig. 9)?

Train several times from one start with labels, each time in another batch order and with other augmentation, then walk on
the straight line between each two results. From a random start the test error rises between them; from a student
distilled without labels, the paper finds, it hardly does.

    python run_lmc.py                                                    # digits, a random ResNet18; slow without a GPU
    python run_lmc.py --dataset cifar10 --data-dir data --precision bf16 --bn-statistics recompute interpolate \\
        --init runs/x/checkpoint.pt:student-init runs/x/checkpoint.pt:student
    torchrun --nproc-per-node=4 run_lmc.py ...                           # runs, then lines, are shared among the processes

With statistics recomputed, they are so at the ends too: the weights there are the trained networks' bit for bit, their errors
need not be. Networks without batch norm have none ("none" in the CSV).

Writes config.json, lmc.csv (a row for each point of a line), barriers.csv and lmc.png; the trained networks into runs/, from
which --resume redraws the lines, also with other flags of the group "lines", without training again.
"""

import itertools
from dataclasses import replace

import torch

from rtd import checkpoint, cli, distributed, logs, plots, runs, stopping
from rtd.classifier import build_classifier, empty_classifier, load_starts
from rtd.data import take
from rtd.device import autocast, describe, pick_device
from rtd.errors import Diverged, InputError
from rtd.init import random_stream
from rtd.interpolation import error_barrier, interpolate, recompute_batch_norm_
from rtd.train import Trainer, evaluate

MEASURED = ("train_error", "test_error", "train_loss", "test_loss")
COLUMNS = ("init", "i", "j", "gamma", "bn", *MEASURED)
BARRIERS = ("init", "bn", "statistic", "i", "j", "train_barrier", "test_barrier")
BATCH_NORM = ("recompute", "interpolate")
PRODUCTS = ("config.json", "lmc.csv", "barriers.csv", "lmc.png", "runs/init*-run*", "lines/*")
LINES = ("points", "bn_statistics", "bn_batches", "line_subset")
MAY_CHANGE = (*LINES, "out", "resume", "overwrite", "save_every", "no_plot", "data_dir", "download", "device")  # on --resume


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_training_flags(parser)
    add = parser.add_argument_group("lines").add_argument
    add("--runs", type=cli.positive_int, default=5, help="from each start; 5 make 10 pairs, 3 make 3")
    add("--points", type=cli.positive_int, default=50, help="values of gamma, ends included; 11 show a barrier as well")
    add(
        "--bn-statistics",
        nargs="+",
        choices=BATCH_NORM,
        default=["recompute"],
        help="of batch norm on the line: estimated anew from training images, or interpolated, which shows higher barriers",
    )
    add("--bn-batches", type=cli.positive_int, default=20, metavar="N", help="batches to estimate them from")
    add(
        "--line-subset",
        type=cli.positive_int,
        metavar="N",
        help="training images, class-balanced, for the training error on the line; by default 10,000, or all of fewer",
    )
    cli.add_device_flags(parser)
    cli.add_output_flags(parser, "runs/lmc")
    args = parser.parse_args(argv)
    cli.check_output_flags(parser, args)
    cli.check_distinct(parser, "--init", args.init)
    args.bn_statistics = [name for name in BATCH_NORM if name in args.bn_statistics]
    for flag, value in (("--runs", args.runs), ("--points", args.points)):
        if value < 2:
            parser.error(f"{flag} {value}: a line has two ends; give at least 2")
    return args


def main(args):
    device = pick_device(args.device, args.deterministic)
    with distributed.process_group(device):
        data = cli.load_data(args)
        if args.line_subset is not None and args.line_subset > len(data.train):
            raise InputError(f"--line-subset {args.line_subset}: there are {len(data.train)} training images")
        starts = load_starts(args.init, args.encoder, data, args.seed)
        reads = {start.spec: start.sha256 for start in starts if start.sha256} | data.fingerprints()
        runs.open_folder(args.out, args, device, MAY_CHANGE, PRODUCTS, reads)
        cli.say(f"{data.name}: {len(data.train)} training and {len(data.test)} test images, {data.num_classes} classes")
        encoder = starts[0].architecture["encoder"]
        cli.say(f"{encoder}; {describe(device, args.precision)}")
        data = data.to(device)

        # Train --runs times from each start.
        ends = [(i, run, start) for i, start in enumerate(starts) for run in range(args.runs)]
        diverged = []
        for i, run, start in distributed.units(ends):
            try:
                train_run(end_path(args, i, run), start, run, data, args, device)
            except Diverged as error:
                diverged.append(str(error))  # the error itself would hold on to the network
        if diverged := distributed.gather(diverged):
            raise Diverged(f"{len(diverged)} of {len(ends)} runs have no end: {'; '.join(diverged)}")

        modules = empty_classifier(starts[0].architecture, data.num_classes).modules()
        if not any(isinstance(module, torch.nn.BatchNorm2d) for module in modules):
            args.bn_statistics = ["none"]  # are there to treat in one way or another

        # Walk from each result to each other one of the same start.
        pairs = [(i, *pair) for i in range(len(starts)) for pair in itertools.combinations(range(args.runs), 2)]
        parts = [args.out / "lines" / f"init{i}-{a}-{b}.csv" for i, a, b in pairs]
        if distributed.is_main():
            forget_other_lines(args, [end_path(args, i, run) for i, run, _ in ends])
        distributed.barrier()
        for (i, a, b), path in distributed.units(list(zip(pairs, parts, strict=True))):
            evaluate_line(path, starts[i], i, a, b, data, args)
            if distributed.is_main():
                logs.concatenate(args.out / "lmc.csv", COLUMNS, parts)

        if distributed.is_main():
            summarize(logs.concatenate(args.out / "lmc.csv", COLUMNS, parts), args.out / "barriers.csv")
            kinds = {start.spec: start.kind for start in starts}
            cli.draw(args, plots.plot_lmc, args.out / "lmc.png", args.out / "lmc.csv", kinds, f"{encoder} on {data.name}")


def end_path(args, i, run):
    return args.out / "runs" / f"init{i}-run{run}.pt"


def train_run(path, start, run, data, args, device):
    """Train from ``start``; runs of one start differ in batch order and augmentation alone. Saved to ``path`` between epochs."""
    data = replace(data, mean=start.mean, std=start.std)
    classifier = build_classifier(start, data.num_classes, random_stream(args.seed, "fc-init")).to(device)
    trainer = Trainer(classifier, data, args.epochs, (args.seed, run), args.lr, args.batch_size, args.precision)
    trainer.name = f"{start.spec}, run {run}"
    contents = {"config": logs.provenance(args, device), "model": start.architecture}
    contents["data"] = {"name": data.name, "mean": list(data.mean), "std": list(data.std)}

    def save():
        path.parent.mkdir(exist_ok=True)
        checkpoint.save_state(path, {"training": trainer.state(), **contents}, checkpoint.SUPERVISED)

    resumed = args.resume and path.exists()
    distributed.barrier()  # all have looked before the main process writes
    if resumed:
        trainer.resume(checkpoint.load_supervised(path)["training"], path)
    while trainer.epoch < args.epochs:
        with stopping.saving(save):
            trainer.run_epoch()
        if distributed.is_main() and (trainer.epoch % args.save_every == 0 or trainer.epoch == args.epochs):
            save()
    final, best = trainer.accuracies[-1], max(trainer.accuracies)
    cli.say(f"{trainer.name}: test accuracy {final:.2f} % (best {best:.2f} %), {trainer.seconds:.1f} s")


def forget_other_lines(args, ends):
    """Remove what lines/ holds unless it was computed with the same flags between the same networks (main process only)."""
    settings = {name: getattr(args, name) for name in LINES}
    settings["reads"] = {path.name: checkpoint.sha256(path) for path in ends}
    folder = args.out / "lines"
    folder.mkdir(exist_ok=True)
    record = folder / "config.json"
    if logs.read_json(record) != settings:
        for path in folder.glob("*.csv"):
            path.unlink()
        logs.write_json(record, settings)


@torch.no_grad()
def evaluate_line(path, start, i, a, b, data, args):
    """Errors and losses between runs ``a`` and ``b`` of start ``i`` for all gamma and treatments of batch norm, into ``path``.

    Rows that it has already are kept.
    """
    gammas = torch.linspace(0, 1, args.points, dtype=torch.float64).tolist()
    wanted = [(bn, gamma) for bn in args.bn_statistics for gamma in gammas]
    rows = logs.read_csv(path, COLUMNS) if path.exists() else []
    found = [(row["init"], row["i"], row["j"], row["bn"], logs.format_value(row["gamma"])) for row in rows]
    expected = [(start.spec, a, b, bn, logs.format_value(gamma)) for bn, gamma in wanted[: len(found)]]
    if found != expected or any(isinstance(row[name], str) for row in rows for name in MEASURED):
        raise InputError(f"{path} does not hold the points of this line in their order; delete it to have them computed again")
    distributed.barrier()  # all have looked before the main process writes
    log = logs.CsvLog(path, COLUMNS)
    if distributed.is_main():
        log.start(rows)

    device = data.train.images.device
    network = build_classifier(start, data.num_classes, random_stream(args.seed, "fc-init")).to(device)
    ends = []
    for run in (a, b):
        saved = checkpoint.load_supervised(end_path(args, i, run))
        ends.append({name: tensor.to(device) for name, tensor in saved["training"]["classifier"].items()})
    train = take(data.train, args.line_subset or min(10_000, len(data.train)), "line")
    images = batch_norm_images(data.train.images, args.bn_batches, args.batch_size)
    for bn, gamma in wanted[len(rows) :]:
        network.load_state_dict(interpolate(*ends, gamma))
        if bn == "recompute":
            with autocast(device, args.precision):
                recompute_batch_norm_(network, images, start.mean, start.std, args.batch_size)
        row = {"init": start.spec, "i": a, "j": b, "gamma": gamma, "bn": bn}
        for name, split in (("train", train), ("test", data.test)):
            accuracy, loss = evaluate(network, split, start.mean, start.std, args.precision)
            row |= {f"{name}_error": 100 - accuracy, f"{name}_loss": loss}
        if distributed.is_main():
            log.append(row)


def batch_norm_images(images, batches, batch_size):
    """``batches`` full batches of training images, the same for every line and seed; as many as there are of a small set."""
    count = min(batches * batch_size, len(images) // batch_size * batch_size or len(images))
    return images[torch.randperm(len(images), generator=random_stream(0, "batch-norm"))[:count].to(images.device)]


def summarize(rows, path):
    """Write and say the error barrier of each pair, and mean and standard deviation over the pairs of each start."""
    lines, summary = {}, []
    for row in rows:
        lines.setdefault((row["init"], row["bn"]), {}).setdefault((row["i"], row["j"]), []).append(row)
    for (init, bn), pairs in lines.items():
        common = {"init": init, "bn": bn, "i": None, "j": None}
        measured = {"train_barrier": [], "test_barrier": []}
        for (i, j), line in pairs.items():
            for split, barriers in measured.items():
                barriers.append(error_barrier([point[split.replace("barrier", "error")] for point in line]))
            values = {split: barriers[-1] for split, barriers in measured.items()}
            summary.append(common | {"statistic": "pair", "i": i, "j": j} | values)
        stats = {split: logs.mean_and_std(barriers) for split, barriers in measured.items()}
        for k, statistic in enumerate(("mean", "std")):
            summary.append(common | {"statistic": statistic} | {split: stats[split][k] for split in measured})
        mean, std = stats["test_barrier"]
        spread = "" if std is None else f" +- {std:.2f}"
        cli.say(f"{init}, statistics {bn}: test error barrier {mean:.2f}{spread} points over {len(pairs)} pairs")
    logs.CsvLog(path, BARRIERS).start(summary)


if __name__ == "__main__":
    cli.run(main, parse_args())
