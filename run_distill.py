"""Distil a student from a random teacher (paper section 3, App. A; Fig. 1, Table 1).

A network at random initialisation is frozen: the teacher. A student that starts next to it learns to reproduce its
outputs, on images alone: no labels, no augmentation. Linear and k-NN probes then find the student's features much
better than the teacher's. They get worse first: a dip in the first few hundred steps belongs to the method.

    python run_distill.py                                      # digits, nothing to download
    python run_distill.py --dataset cifar10 --data-dir data    # the paper's protocol: VGG11 on CIFAR-10, 100 epochs
    python run_distill.py --alpha 0 .2 .4 .6 .8 1 --seed 0 1 2 # a sweep: 18 runs, a table and figures (Figs. 3, 17)
    torchrun --nproc-per-node=4 run_distill.py ...             # on four processes

Writes config.json, log.csv (a row an epoch), checkpoint.pt, best.pt and curves.png into the folder --out. The flags marked *
take several values: each combination is a run in a folder of its own, summed up in summary.csv and two figures.
"""

import argparse
import contextlib
import functools
import math
import time
from pathlib import Path

import torch

from rtd import checkpoint, cli, distributed, logs, plot_sweep, plots, runs, stopping, sweeps
from rtd.data import normalize
from rtd.datasets import DATASETS, LABELLED
from rtd.device import describe, pick_device, tf32
from rtd.distill import Distiller, FrozenTeacher, MovingTeacher, distance, evaluate_start, load_teacher, weighted_mean
from rtd.errors import Diverged
from rtd.head import PAPERS, parse_slots
from rtd.init import init_network_, init_student_, random_stream
from rtd.last_layer import LOSSES, LastLayerLoss
from rtd.models import ENCODERS, NORMS, build_network, materialize, parameter_count
from rtd.probes import prefixed, probe_baselines, probe_encoder
from rtd.progress import progress

TRAINING = LastLayerLoss._fields
DISTANCES = ("distance_encoder", "distance_head", "distance_total")
PROBED = tuple(f"{who}_{probe}" for who in ("student", "teacher", "input") for probe in ("linear", "knn"))
COLUMNS = ("epoch", "step", *TRAINING, *DISTANCES, *PROBED, "images_per_second", "seconds")
PRODUCTS = ("config.json", "log.csv", "checkpoint.pt", "best.pt", "curves.png", sweeps.DIVERGED)
MAY_CHANGE = ("epochs", "out", "resume", "overwrite", "save_every", "no_plot", "data_dir", "download", "device")  # on --resume
NO_WEIGHT_NORM = "-/lb/fn/-/l/-"


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = cli.add_file_flags(parser).add_argument
    of, further = "one of %(choices)s", "vgg11 gets further, resnet18 gets there earlier"
    add("--dataset", nargs="+", choices=DATASETS, metavar="NAME", default=["digits"], help=f"* digits needs no files; {of}")
    add("--subset", type=cli.positive_int, nargs="+", default=[None], metavar="N", help="* use N training images, class-balanced")
    add("--probe-dataset", choices=LABELLED, help="what the probes judge on; by default what is distilled on, subsets alike")
    add("--probe-subset", type=cli.positive_int, metavar="N", help="of --probe-dataset, use N training images")
    add = parser.add_argument_group("teacher and student").add_argument
    add("--encoder", nargs="+", choices=ENCODERS, metavar="NAME", default=["vgg11"], help=f"* {further}; {of}")
    add("--norm", nargs="+", choices=NORMS, metavar="NAME", default=[None], help=f"* VGG has none, ResNet batch; {of}")
    add("--out-dim", type=cli.positive_int, nargs="+", default=[2**16], help="* outputs of the head; below 256 the effect goes")
    add("--bottleneck-dim", type=cli.positive_int, default=256, help="width of the head's l2-bottleneck")
    add("--head-hidden", type=cli.positive_int, default=2048, help="width of the head's two hidden layers")
    add("--bottleneck", nargs="+", default=[PAPERS], metavar="SLOTS", help="* wn1/lin1/fn1/wn2/lin2/fn2, as in Fig. 12")
    add("--no-weight-norm", action="store_true", help="raw last layer, as in the authors' code; small runs may collapse")
    add("--alpha", type=cli.unit_interval, nargs="+", default=[1e-10], help="* 0: starts at the teacher; 1: independent, worse")
    given = "not a random one: run/checkpoint.pt:student (Fig. 18); lmc/runs/init0-run0.pt:supervised for one that saw labels"
    add("--teacher", metavar="PATH:NETWORK", help=given)
    add("--ema", type=cli.unit_interval, default=0.0, metavar="GAMMA", help="the teacher follows the student; slower: no cache")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=cli.non_negative_int, default=100, help="under 1000 steps expect the dip; 0: probe only")
    counted = "an epoch, of --probe-every and --save-every too, is N images whatever --subset is (Fig. 4: 50000)"
    add("--epochs-of", type=cli.positive_int, metavar="N", help=counted)
    add("--batch-size", type=cli.positive_int, default=256, help="images a step, over all processes together")
    add("--lr", type=cli.positive_float, nargs="+", default=[0.001], help="* of AdamW, constant")
    add("--weight-decay", type=cli.non_negative_float, default=0.0, help="of weights; the paper has none")
    add("--bias-decay", type=cli.non_negative_float, default=0.0, help="of biases and norms; the authors' code had 0.01")
    add("--loss", choices=LOSSES, default="ce", help="ce and kl have the same gradient; ce is cheaper")
    add("--beta", type=cli.non_negative_float, default=0.0, help="weight of the labels' cross-entropy; 0 sees no label")
    add("--teacher-temperature", type=cli.positive_float, default=1.0, help="the teacher's outputs are divided by it")
    add("--student-temperature", type=cli.positive_float, default=1.0, help="the student's outputs are divided by it")
    add("--seed", type=cli.non_negative_int, nargs="+", default=[0], help="* several: mean and standard deviation")
    add("--fp32-steps", type=cli.non_negative_int, default=100, help="first steps in fp32 whatever --precision is (README)")
    add("--compile", action="store_true", help="torch.compile the student; pays off on GPUs, after a minute")
    cli.add_probe_flags(parser)
    cli.add_device_flags(parser)
    cli.add_output_flags(parser)
    add = parser.add_argument_group("log").add_argument
    add("--probe-every", type=cli.positive_int, default=1, metavar="EPOCHS", help="also before training and after the last epoch")
    add("--log-every", type=cli.positive_int, default=30, metavar="N", help="KL and entropies every n steps, 5 an epoch at least")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / f"distill-{args.dataset[0]}-{args.encoder[0]}"
    args.probe = cli.chosen_probes(parser, args.probe)
    cli.check_output_flags(parser, args)
    sweeps.check(parser, args)
    if args.no_weight_norm:
        if args.bottleneck not in ([PAPERS], [NO_WEIGHT_NORM]):
            parser.error("--no-weight-norm and --bottleneck exclude each other")
        args.bottleneck = [NO_WEIGHT_NORM]
    return args


def main(args):
    device = pick_device(args.device, args.deterministic)
    several, planned = sweeps.varied(args), sweeps.expand(args)
    for run in planned:  # refuse what cannot be built before anything is computed
        parse_slots(run.bottleneck)
        load_teacher(args.teacher, model_of(run), run.seed) if args.teacher else build_network(**model_of(run))
    with distributed.process_group(device):
        if several:
            sweeps.check_folders(args, planned, several)
            sweeps.check_data(planned)
            sweeps.clear_folder(args)
        for run in distributed.units(planned):
            with sweeps.noting_divergence(run.out) if several else contextlib.nullcontext():
                distill(run, device)
        if several and distributed.is_main():
            conclude(args, several, *sweeps.split_off_diverged(planned))


def conclude(args, several, finished, diverged):
    """Sum up and draw a sweep's ``finished`` runs; Diverged names the others."""
    if finished:
        columns = [column for column in PROBED if column.split("_")[1] in args.probe]
        sweeps.summarize(args.out / "summary.csv", finished, several, columns)
        plot_sweep.draw(args, *sweeps.groups(finished, several), title(finished[0]))
    if diverged:
        folders = ", ".join(run.out.name for run in diverged)
        raise Diverged(f"of {len(finished) + len(diverged)} runs, {len(diverged)} diverged and were left out: {folders}")


def model_of(args):
    """The arguments of ``build_network`` that the flags ask for."""
    model = {"encoder": args.encoder, "out_dim": args.out_dim, "hidden_dim": args.head_hidden, "image_size": args.image_size}
    return model | {"bottleneck_dim": args.bottleneck_dim, "bottleneck": args.bottleneck, "norm": args.norm}


def distill(args, device):
    """One run: the algorithm of App. A with its probes, one epoch after the other; epoch 0 is before training."""
    folder = args.out
    data, probed = cli.load_sources(args)
    cli.check_k(args, probed)
    given = args
    if args.epochs_of:
        counted = {name: getattr(args, name) for name in ("epochs", "probe_every", "save_every")}
        counted = {name: n and max(1, int(n * args.epochs_of / len(data.train))) for name, n in counted.items()}  # 0 stays 0
        args = argparse.Namespace(**vars(args) | counted)

    # Teacher: a random network. Student: theta_S(alpha), next to it.
    model = model_of(args)
    teacher, normalization = load_teacher(args.teacher, model, args.seed)
    data = data.with_normalization(normalization) if normalization else data
    probed = probed.with_normalization({"mean": data.mean, "std": data.std})
    reads = {args.teacher: checkpoint.sha256(args.teacher.rpartition(":")[0])} if args.teacher else {}
    reads |= data.fingerprints() | {f"{name} of the probes": digest for name, digest in probed.fingerprints().items()}
    resumed = None
    if runs.open_folder(folder, given, device, MAY_CHANGE, PRODUCTS, reads) and (folder / "checkpoint.pt").exists():
        resumed = runs.load_progress(folder / "checkpoint.pt", args.epochs)
    if resumed is not None and resumed["epoch"] == args.epochs:  # nothing is left to do: one of a sweep's finished runs
        if distributed.is_main():
            logs.CsvLog(folder / "log.csv", COLUMNS).cut(args.epochs)
        report(args)
        return
    began, config = time.perf_counter(), logs.provenance(given, device)
    cli.say(f"{data.name}: {len(data.train)} training images; {probed.name}: {len(probed.test)} test images")
    student = init_network_(materialize(build_network(**model)), random_stream(args.seed, "student-init"))
    init_student_(student, teacher, args.alpha)
    student_init = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.to(device)
    cli.say(f"{args.encoder} with head: {parameter_count(student) / 1e6:.1f}M parameters; {describe(device, args.precision)}")

    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": args.bias_decay},
        ],
        lr=args.lr,
        fused=device.type != "mps",
    )
    done, best, seconds, baselines, so_far = -1, -math.inf, 0.0, None, None
    if resumed is not None:
        done = resumed["epoch"]
        best, seconds, baselines, so_far = runs.restore(resumed, student, optimizer, folder)
        teacher.load_state_dict(resumed["teacher"])  # with --ema it has moved
        cli.say(f"resumed after epoch {done}" + (f", step {resumed['step']}" if so_far["losses"] else ""))

    # What the frozen teacher says about each image, once; then the teacher itself is not needed any more.
    data, probed = data.to(device), probed.to(device)
    teacher_state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.to(device)
    if baselines is None:
        options = cli.probe_options(args)
        baselines = probe_baselines(teacher.encoder, probed, args.precision, **options) if args.probe else {}
    standing = {name: value for name, value in baselines.items() if not (args.ema and name.startswith("teacher"))}
    if args.ema:
        followed = MovingTeacher(teacher, args.ema, args.teacher_temperature)
        teacher_state = teacher.state_dict()  # shares its memory: what is saved is the teacher as it then is
    else:
        followed = FrozenTeacher(teacher, data.train.images, data.mean, data.std, args.teacher_temperature)
        del teacher
    distiller = Distiller(student, followed, args.precision, args.loss, args.compile, args.student_temperature, args.beta)
    trained = distributed.data_parallel(distiller)

    log = logs.CsvLog(folder / "log.csv", COLUMNS)
    if distributed.is_main():
        if resumed is None:
            log.start()
        else:
            log.cut(done)
    cli.say(runs.table_header(args.probe))

    def contents(epoch, step):
        return {
            "model": model,
            "teacher": teacher_state,
            "student": student.state_dict(),
            "student_init": student_init,
            "data": {"name": data.name, "mean": list(data.mean), "std": list(data.std)},
            "epoch": epoch,
            "step": step,
            "config": config,
        }

    def save(epoch, so_far):
        """checkpoint.pt, after an epoch and maybe some steps of the next: ``so_far``."""
        step = epoch * steps + len(so_far["losses"])
        saved = {"optimizer": optimizer.state_dict(), "so_far": so_far}
        saved |= {"baselines": baselines, "best": best, "seconds": seconds + time.perf_counter() - began}
        checkpoint.save_checkpoint(folder / "checkpoint.pt", contents(epoch, step) | {"progress": saved})

    steps = math.ceil(len(data.train) / args.batch_size)  # of an epoch
    for epoch in range(done + 1, args.epochs + 1):
        row = dict.fromkeys(COLUMNS) | standing | {"epoch": epoch}
        if epoch == 0:
            row |= evaluate_start(distiller, data, args.batch_size)
        else:
            training_began = time.perf_counter()
            so_far = so_far or runs.nothing_yet()
            order = torch.randperm(len(data.train), generator=random_stream(args.seed, "batch-order", epoch))
            with stopping.saving(functools.partial(save, epoch - 1, so_far)):
                row |= train_epoch(trained, optimizer, data, order, epoch, args, so_far, followed)
            row["images_per_second"] = len(data.train) / (time.perf_counter() - training_began)
            so_far = None
        row |= {"step": epoch * steps} | distance(student, student_init)
        if args.probe and (epoch % args.probe_every == 0 or epoch == args.epochs):
            options = cli.probe_options(args) | {"name": f"student-{epoch}"}
            row |= prefixed("student", probe_encoder(student.encoder, probed, args.precision, **options))
            if args.ema:
                row |= prefixed("teacher", probe_encoder(teacher.encoder, probed, args.precision, **options))
        if not distributed.is_main():
            continue
        row["seconds"] = seconds + time.perf_counter() - began
        log.append(row)
        cli.say(runs.table_line(row, args.probe))
        judged = row[f"student_{args.probe[0]}"] if args.probe else None
        if epoch > 0 and judged is not None and judged > best:
            best = judged
            checkpoint.save_checkpoint(folder / "best.pt", contents(epoch, epoch * steps))
        if epoch % args.save_every == 0 or epoch == args.epochs:
            save(epoch, runs.nothing_yet())
    report(args)


def report(args):
    """Draw and say what the finished run in --out has found."""
    if distributed.is_main():
        path = args.out / "log.csv"
        rows = logs.read_csv(path, COLUMNS)
        cli.draw(args, plots.plot_curves, args.out / "curves.png", [path], title(args))
        if args.probe:
            runs.say_result(rows, args.probe)


def title(args):
    return f"{args.encoder} on {args.dataset}, alpha = {args.alpha:g}"


def train_epoch(trained, optimizer, data, order, epoch, args, so_far, teacher):
    """One pass over the images in the given order. Returns the epoch's means for the log.

    ``so_far``: ``runs.nothing_yet()``, or what an earlier process gathered of this epoch, whose steps are then left out.
    """
    trained.train()
    device = data.train.images.device
    batches = order.to(device).split(args.batch_size)
    losses, watched = so_far["losses"], so_far["watched"]
    first, done = (epoch - 1) * len(batches), len(losses)
    every = min(args.log_every, max(1, (len(batches) - 1) // 4))  # a short epoch is looked at five times too
    to_watch = sorted({*range(0, len(batches), every), len(batches) - 1})
    bar = progress(batches[done:], f"epoch {epoch}", "steps") if distributed.is_main() else batches[done:]
    for i, batch in enumerate(stopping.steps(bar), done):
        step = first + i
        mine, factor = distributed.share(batch)  # all of the batch, and 1, in a single process
        images = normalize(data.train.images[mine], data.mean, data.std)
        diagnostics = i in to_watch
        precision = "fp32" if step < args.fp32_steps else args.precision
        optimizer.zero_grad()
        with tf32(precision):
            result = trained(images, mine, diagnostics, precision, data.train.labels[mine])
            loss = factor * result.loss
            if device.type == "cpu" and distributed.world_size() == 1 and not torch.isfinite(loss):
                stop_diverged(epoch, step + 1, args)
            loss.backward()
        optimizer.step()  # of the student alone
        if args.ema:
            teacher.follow(getattr(trained, "module", trained).student)
        losses.append(loss.detach())  # read once, at the end of the epoch: on a GPU, reading waits
        if diagnostics:
            watched.append(factor * torch.stack(result[1:]))
            if hasattr(bar, "set_postfix") and device.type != "cuda":
                bar.set_postfix(loss=f"{loss.item():.4f}")
    loss = distributed.average(weighted_mean(torch.stack(losses), [len(batch) for batch in batches]))
    if not all(tensor.isfinite().all() for tensor in (loss, *trained.parameters())):  # in all processes alike
        stop_diverged(epoch, first + len(batches), args)
    means = distributed.average(weighted_mean(torch.stack(watched), [len(batches[i]) for i in to_watch]))
    return dict(zip(TRAINING, [loss.item(), *means.tolist()], strict=True))


def stop_diverged(epoch, step, args):
    raise Diverged(
        f"the loss is not finite in epoch {epoch}, step {step}; what was saved before stands. "
        f"Try a smaller --lr than {args.lr}{', or --precision fp32' if args.precision == 'bf16' else ''}"
    )


if __name__ == "__main__":
    cli.run(main, parse_args())
