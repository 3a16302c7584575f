"""Distil a student from a random teacher (sections 3 and 4, App. A; Fig. 1, Table 1).

A network at random initialisation is frozen: the teacher. A student that starts next to it learns
to reproduce its outputs, on images alone: no labels, no augmentation. Linear and k-NN probes then
find the student's features much better than the teacher's. At first they are worse, with the
defaults for up to 1,000 steps, with --no-weight-norm for up to 7,000, as is to be expected.

    # on scikit-learn's digits, with nothing to download
    python run_distill.py --out-dim 4096 --batch-size 16 --lr 3e-4 --epochs 6 --probe-epochs 100
    python run_distill.py --dataset cifar10 --data-dir data    # the paper's protocol, 100 epochs
    # a sweep of 18 runs (Figs. 3, 17)
    python run_distill.py --dataset cifar10 --data-dir data --alpha 1e-10 .2 .4 .6 .8 1 --seed 0 1 2
    torchrun --nproc-per-node=4 run_distill.py ...             # on four processes

Writes config.json, log.csv, checkpoint.pt, best.pt and curves.png into the folder --out. log.csv has
a row an epoch: mean loss, KL and entropies of the outputs in nats, distances from the start, probes
in percent, training's images per second, seconds since the start. The flags marked * take several
values: each combination is a run in a folder of its own. summary.csv has mean and deviation over
the seeds of the probes' final and best accuracies and of the final KL and distances.
sweep.png and dynamics.png show them.
"""

import copy
import time
from functools import partial
from pathlib import Path

import torch

from rtd.distill import Distiller, FrozenTeacher, MovingTeacher, adamw, teacher_answers
from rtd.errors import InputError
from rtd.harness import cli, sweeps
from rtd.harness.checkpoint import read_teacher
from rtd.harness.cli import non_negative_float, non_negative_int, positive_float, positive_int
from rtd.harness.console import progress
from rtd.harness.datasets import DATASETS, LABELLED, fingerprints
from rtd.harness.run import Run
from rtd.harness.signals import deferred
from rtd.harness.training import Training, probe_encoder
from rtd.head import PAPER_SLOTS
from rtd.init import init_student_, random_stream
from rtd.last_layer import LOSSES, LastLayerLoss
from rtd.models import ENCODERS, NORMS, build_network, norms, parameter_count, random_network
from rtd.plots import PROBE_TITLES, best_and_final, curves
from rtd.probes import PROBES

COLUMNS = ("epoch", "step", "loss", "kl", "teacher_entropy", "student_entropy", *sweeps.DISTANCES)
COLUMNS += (*sweeps.probe_columns(PROBES), "images_per_second", "seconds")  # student_linear ...
PRODUCTS = ("log.csv", "checkpoint.pt", "best.pt", "curves.*")
NO_WEIGHT_NORM = "-/lb/fn/-/l/-"


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    # fmt: off
    add = parser.group("start with these")
    cli.add_data_flags(add, datasets=DATASETS, star="* ")
    add("--encoder", ENCODERS, "vgg11", "* architecture; in the paper VGG11 ends higher than ResNet18")
    add("--epochs", non_negative_int, 100, "passes over the images; the student gets worse first; 0 only probes the start")
    add("--out", Path, None, "folder of the run; runs/distill-<dataset>-<encoder> by default")
    add = parser.add_file_flags()
    add("--probe-dataset", LABELLED, None, "data set of the probes; by default the one distilled on")
    add("--probe-subset", positive_int, None, "number of images of --probe-dataset on which the probes train; all by default")
    add = parser.group("teacher and student")
    add("--alpha", cli.unit_interval, 1e-10, "* how far from the teacher the student starts: 1 is independent of it, 0 a copy, which may never move without batch norm")
    add("--norm", NORMS, None, "* norm layers; by default VGG has none and ResNet batch")
    add("--out-dim", positive_int, 2**16, "* outputs of the head; below 256 the student improves late, if at all (Fig. 10)")
    add("--head-hidden", positive_int, 2048, "width of the head's two hidden layers")
    add("--bottleneck-dim", positive_int, 256, "width of the head's l2-bottleneck")
    add("--bottleneck", str, PAPER_SLOTS, "* form of the l2-bottleneck (Fig. 12) in six slots: weight norm of the first layer (wn), first "
        "layer (l linear, lb with bias), norm of its output (fn), and the same for the last layer; - is nothing", metavar="SLOTS")
    add("--no-weight-norm", bool, False, "raw last layer, as in the authors' code: learns more slowly and ends higher (Fig. 1); small runs may collapse")
    add("--teacher", str, None, "teacher instead of a random one: run/checkpoint.pt:student (Fig. 18), or "
        "lmc/runs/init0-run0.pt:supervised, which saw labels")
    add("--ema", cli.unit_interval, 0.0, "share of the student mixed into the teacher after each step, 1 - momentum (0.004 for 0.996); above 0, the teacher's outputs are computed in each step")
    add = parser.group("training")
    add("--batch-size", positive_int, 256, "images per step, over all processes; use smaller batches on small data sets")
    add("--lr", positive_float, 0.001, "* learning rate of AdamW, constant")
    add("--seed", non_negative_int, 0, "* seed of all random numbers; several give mean and standard deviation")
    add("--epochs-of", positive_int, None, "images per epoch of --epochs, --probe-every and --save-every, so that subsets of all sizes take about as many steps (Fig. 4); log.csv counts passes")
    add("--loss", LOSSES, "ce", "loss: ce is cross-entropy, kl has the same gradient and is slower, mse is of the outputs")
    add("--beta", non_negative_float, 0.0, "weight of the labels' cross-entropy; 0 sees no label")
    add("--teacher-temperature", positive_float, 1.0, "divisor of the teacher's outputs")
    add("--student-temperature", positive_float, 1.0, "divisor of the student's outputs")
    add("--weight-decay", non_negative_float, 0.0, "weight decay of weights; the paper has none")
    add("--bias-decay", non_negative_float, 0.0, "weight decay of biases and norms; the authors' code had 0.01")
    add("--fp32-steps", non_negative_int, 100, "number of first steps in fp32 whatever --precision is, since bf16 is too coarse for them")
    add("--compile", bool, False, "torch.compile the student; it pays off on GPUs, after a minute")
    parser.add_probe_flags()
    parser.add_device_flags()
    parser.add_output_flags()
    add = parser.group("log")
    add("--probe-every", positive_int, 1, "epochs between two probes; the start and the last epoch are always probed")
    add("--log-every", positive_int, 30, "steps between two computations of KL and entropies, at least 5 an epoch; the loss is the mean over all steps")
    # fmt: on
    args = parser.parse(argv, *sweeps.SWEPT)
    args.out = args.out or Path("runs") / f"distill-{args.dataset[0]}-{args.encoder[0]}"
    if args.no_weight_norm:
        if args.bottleneck not in ([PAPER_SLOTS], [NO_WEIGHT_NORM]):
            parser.error("--no-weight-norm and --bottleneck exclude each other")
        args.bottleneck = [NO_WEIGHT_NORM]
    return args


def main(args, device, world):
    planned = sweeps.expand(args)
    for run in planned:  # refuse what cannot be built before anything is computed
        build_network(**model_of(run))
        if run.teacher is not None:
            read_teacher(run.teacher, model_of(run))
    if args.compile:  # what fails here fails before --overwrite deletes anything
        torch.compile(torch.square)(torch.ones(2, device=device))
    if not sweeps.varied(args):
        distill(planned[0], device, world)
    else:
        heading = title(planned[0], sweeps.varied(args))
        sweeps.run(args, planned, device, world, distill, PRODUCTS, heading)


def model_of(args):
    """The arguments of ``build_network`` that the flags ask for."""
    names = "encoder", "norm", "image_size", "out_dim", "bottleneck_dim", "bottleneck"
    return {name: getattr(args, name) for name in names} | {"hidden_dim": args.head_hidden}


def distill(args, device, world):
    """App. A: a student learns to reproduce a frozen random teacher. Epoch 0 is before any step."""
    data, probed = cli.load_sources(args, world)

    # Teacher: a random network. Student: theta_S(alpha), next to it.
    model = model_of(args)
    teacher = random_network(random_stream(args.seed, "teacher-init"), **model)
    if args.teacher is not None:
        state, source = read_teacher(args.teacher, model)
        teacher.load_state_dict(state, strict=False)  # a classifier has an fc, and no head
        data = data.with_normalization(source)
    probed = probed.with_normalization(data.source)
    student = random_network(random_stream(args.seed, "student-init"), **model)
    init_student_(student, teacher, args.alpha)
    student_init = copy.deepcopy(student.state_dict())

    # The run: refused, begun in its folder, or continued from the checkpoint there.
    reads = fingerprints(data) | fingerprints(probed, " of the probes")
    run = Run(args, device, world, PRODUCTS, ["epochs"], images=reads, networks=[args.teacher])
    run.args = args = epochs_as_passes(args, run, data)  # only now: Run compares flags as given
    teacher.to(device), student.to(device)
    history = {"rows": [], "best": -1, "seconds": 0}
    if saved := run.load("checkpoint.pt", "log.csv", "checkpoint"):
        student.load_state_dict(saved["student"])
        teacher.load_state_dict(saved["teacher"])  # with --ema it has moved
        history = resumed(saved["progress"], run)
    rows = history["rows"]
    if len(rows) > args.epochs:
        run.say("all epochs are done")
        return report(run, rows)
    size = f"{parameter_count(student) / 1e6:.1f}M parameters"
    run.say(f"{title(args)}; {size}; {run.config['device']}")
    shared, data = probed.train is data.train, data.to(device)
    probed = data if shared else probed.to(device)  # not twice in a GPU's memory

    options = {"kind": args.loss, "temperature": args.student_temperature, "beta": args.beta}
    target = make_target(teacher, data, run)
    distiller = Distiller(student, target, data, **options, compiled=args.compile)
    optimizer = adamw(student, args.lr, args.weight_decay, args.bias_decay)
    training = Training(distiller, optimizer, (args.seed,), run, args.out.name)
    if saved:
        training.load_state(history["training"])
        run.say(f"resumed after step {training.step}")
    cli.note_steps(args, probed, world)
    contents = {"student": student.state_dict(), "teacher": teacher.state_dict()}  # not copies
    contents |= {"student_init": student_init, "model": model, "data": data.source}
    train(training, teacher, probed, contents, history)
    report(run, rows)


def train(training, teacher, probed, contents, history):
    """Train and probe what is left of all epochs, log each, keep the best student, save.

    contents: what a checkpoint holds of the run; its networks are the tensors that are trained.
    history: the rows of log.csv, the best accuracy and the seconds of earlier sessions; new rows
    are added to it.
    """
    run, args, student, rows = training.run, training.args, training.loss.student, history["rows"]
    began = time.perf_counter() - history["seconds"]  # as if there had been one session
    better = []  # the best checkpoint, until it is saved
    moving = ("student", "teacher") if args.ema else ("student",)

    def checkpoint():
        """The networks as they are and how far training went."""
        return contents | {"epoch": len(rows) - 1, "step": training.step, "config": run.config}

    def save():
        """best.pt, if there is a better one, and checkpoint.pt, also in the middle of an epoch."""
        if not rows:  # epoch 0 is not over
            return
        if better:
            run.save("best.pt", better[0], "checkpoint")
            better.clear()
        history.update(training=training.state(), seconds=time.perf_counter() - began)
        run.save("checkpoint.pt", checkpoint() | {"progress": history}, "checkpoint")

    @deferred()
    def log(epoch, row):
        """Log the row of an epoch; keep the best student; save where it is due."""
        row |= {"epoch": epoch, "step": training.step, "seconds": time.perf_counter() - began}
        row["images_per_second"] = training.images_per_second
        rows.append(row)
        accuracy = row[f"student_{args.probe[0]}"] if args.probe else None  # the first decides
        if epoch and accuracy is not None and accuracy > history["best"]:
            history["best"] = accuracy
            better[:] = [checkpoint() | copy.deepcopy({name: contents[name] for name in moving})]
        run.say(f"epoch {epoch}/{args.epochs}: {in_words(row)}")
        if epoch and not row["distance_total"]:
            run.say("note: the student has not moved; give an --alpha above 0")
        try:
            if run.save_is_due(epoch, args.epochs):
                save()
        finally:  # a disk too full for a checkpoint may have room for a row
            if (run.folder / "checkpoint.pt").exists():
                run.table("log.csv", COLUMNS, rows)

    encoders = {"student": student.encoder, "teacher": teacher.encoder, "input": None}
    for epoch in range(len(rows), args.epochs + 1):
        with training.saving(save):
            means = training.run_epoch(epoch) if epoch else training.evaluate_start()
            run.world.broadcast(teacher.buffers())  # with --ema each process moves its own
            known = rows[0] if epoch else {}
            row = {c: None if c.startswith(moving) else known.get(c) for c in COLUMNS}
            row |= LastLayerLoss(*means)._asdict()
            row |= norms(student, contents["student_init"], "distance")
            if args.probe and (epoch % args.probe_every == 0 or epoch == args.epochs):
                for name in moving if epoch else encoders:  # what does not move, only once
                    found = probe_encoder(encoders[name], probed, args, run.world)
                    row |= {f"{name}_{probe}": accuracy for probe, accuracy in found.items()}
            log(epoch, row)


def make_target(teacher, data, run):
    """What the student is to reproduce: a ``MovingTeacher`` with --ema, else a ``FrozenTeacher``."""
    if run.args.ema:
        return MovingTeacher(teacher, run.args.ema, run.args.teacher_temperature)
    run.say(f"asking the teacher about {len(data.train)} images")
    shown = partial(progress, description="asking the teacher", unit="batches")
    options = data.mean, data.std, run.args.teacher_temperature
    answer = partial(teacher_answers, teacher, *options, progress=shown)
    # once: images are not augmented, so its answer to an image never changes
    return FrozenTeacher(teacher, run.world.map_rows(answer, data.train.images))


def epochs_as_passes(args, run, data):
    """The flags, with counts of epochs of --epochs-of images as counts of passes over the data."""
    if not args.epochs_of:
        return args
    args = copy.copy(args)
    flags, images = vars(args), len(data.train)
    for name in ("epochs", "probe_every", "save_every"):
        flags[name] = flags[name] and max(1, flags[name] * args.epochs_of // images)
    run.say(f"--epochs-of {args.epochs_of}: {args.epochs} passes over the images")
    return args


def resumed(progress, run):
    """The ``progress`` of earlier sessions; log.csv is written anew from it.

    Refuses fewer --epochs than were begun. If they now end with an epoch that was not probed, its
    row is dropped, so that ``train`` ends it once more, with a probe.
    """
    rows, begun, epochs = progress["rows"], progress["training"]["epoch"], run.args.epochs
    if begun > epochs:
        raise InputError(f"--epochs: {run.folder} has begun epoch {begun}; {epochs} are too few")
    if progress["best"] >= 0 and not (run.folder / "best.pt").exists():
        run.say("note: best.pt is missing; only a better epoch to come will write it again")
    columns = [f"student_{probe}" for probe in run.args.probe]
    if len(rows) > epochs and any(rows[-1][column] is None for column in columns):
        rows.pop()  # train() takes no step for it
    run.table("log.csv", COLUMNS, rows)
    return progress


def in_words(row):
    """A row of log.csv as a person reads it."""
    words = f"loss {row['loss']:.5f}, KL {row['kl']:.2e}, distance {row['distance_total']:.2f}"
    for probe, name in PROBE_TITLES.items():
        if (accuracy := row[f"student_{probe}"]) is not None:
            words += f", {name} {accuracy:.2f} %"
    if speed := row["images_per_second"]:
        words += f", {speed:.0f} img/s"
    return f"{words}, {row['seconds']:.0f} s in all"


def report(run, rows):
    """Draw and say what the finished run has found."""
    run.draw("curves", curves, [rows], title(run.args))
    for probe in run.args.probe if run.world.is_main else ():  # only there are their results
        pixels, teacher = (rows[-1][f"{of}_{probe}"] for of in ("input", "teacher"))
        best, last = best_and_final(rows, f"student_{probe}")
        words = f"input pixels {pixels:.2f}, teacher {teacher:.2f}, student {last:.2f}"
        words += f" (at best {best:.2f}), gain {last - teacher:+.2f}"
        run.say(f"{PROBE_TITLES[probe]}, test accuracy in %: {words}")


def title(args, varied=()):
    """A run, or what all runs of a sweep over the flags ``varied`` have in common, in words."""
    encoder = "encoders" if "encoder" in varied else args.encoder
    dataset = "data sets" if "dataset" in varied else args.dataset
    raw = args.bottleneck == NO_WEIGHT_NORM and "bottleneck" not in varied
    alpha = "" if "alpha" in varied else f", alpha = {args.alpha:g}"
    return f"{encoder} on {dataset}{alpha}{', no weight norm' if raw else ''}"


if __name__ == "__main__":
    cli.run(main, parse_args())
