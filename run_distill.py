"""Distil a student from a random teacher (paper section 3, App. A; Fig. 1, Table 1).

A network at random initialisation is frozen: the teacher. A student that starts next to it learns to reproduce its
outputs, on images alone: no labels, no augmentation. Linear and k-NN probes then find the student's features much
better than the teacher's. They get worse first: a dip in the first few hundred steps belongs to the method.

    python run_distill.py                                      # digits, nothing to download
    python run_distill.py --dataset cifar10 --data-dir data    # the paper's protocol: VGG11 on CIFAR-10, 100 epochs
    torchrun --nproc-per-node=4 run_distill.py ...             # the same on four processes

Writes config.json, log.csv (a row an epoch), checkpoint.pt, best.pt and curves.png into the folder --out.
"""

import argparse
import functools
import math
import time
from pathlib import Path

import torch

from rtd import checkpoint, cli, distributed, logs, plots, runs, stopping
from rtd.data import load_dataset, normalize
from rtd.device import describe, pick_device
from rtd.distill import Distiller, FrozenTeacher, distance, evaluate_start, weighted_mean
from rtd.errors import Diverged, InputError
from rtd.init import init_network_, init_student_, random_stream
from rtd.last_layer import LOSSES, LastLayerLoss
from rtd.models import ENCODERS, build_network, materialize, parameter_count
from rtd.probes import probe_encoder, probe_input
from rtd.progress import progress

TRAINING = LastLayerLoss._fields
DISTANCES = ("distance_encoder", "distance_head", "distance_total")
PROBED = tuple(f"{who}_{probe}" for who in ("student", "teacher", "input") for probe in ("linear", "knn"))
COLUMNS = ("epoch", "step", *TRAINING, *DISTANCES, *PROBED, "images_per_second", "seconds")
PRODUCTS = ("config.json", "log.csv", "checkpoint.pt", "best.pt", "curves.png")
MAY_CHANGE = ("epochs", "out", "resume", "overwrite", "no_plot", "data_dir", "download", "device")  # on --resume


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    add = parser.add_argument_group("teacher and student").add_argument
    add("--encoder", choices=ENCODERS, default="vgg11", help="vgg11 gets further, resnet18 gets there earlier")
    add("--out-dim", type=cli.positive_int, default=2**16, help="outputs of the head; below 256 the effect is lost")
    add("--bottleneck-dim", type=cli.positive_int, default=256, help="width of the head's l2-bottleneck")
    add("--head-hidden", type=cli.positive_int, default=2048, help="width of the head's two hidden layers")
    add("--no-weight-norm", action="store_true", help="raw last layer, as in the authors' code; small runs may collapse")
    add("--alpha", type=cli.unit_interval, default=1e-10, help="0: the student starts at the teacher; 1: independent, worse")
    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs",
        type=cli.non_negative_int,
        default=100,
        help="passes over the images; under 1000 steps expect the dip; 0: probe only",
    )
    add("--batch-size", type=cli.positive_int, default=256, help="images a step, over all processes together")
    add("--lr", type=cli.positive_float, default=0.001, help="of AdamW, constant")
    add("--weight-decay", type=cli.non_negative_float, default=0.0, help="of weights; the paper has none")
    add("--bias-decay", type=cli.non_negative_float, default=0.0, help="of biases and norms; the authors' code had 0.01")
    add("--loss", choices=LOSSES, default="ce", help="ce and kl have the same gradient; ce is cheaper")
    add("--seed", type=cli.non_negative_int, nargs="+", default=[0], help="several: one run each, and a summary")
    add("--fp32-steps", type=cli.non_negative_int, default=100, metavar="N", help="under bf16, N first steps in fp32 (README)")
    add("--compile", action="store_true", help="torch.compile the student; pays off on GPUs, after a minute")
    cli.add_probe_flags(parser)
    cli.add_device_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, help="run folder; by default runs/distill-DATASET-ENCODER")
    add("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
    add("--probe-every", type=cli.positive_int, default=1, metavar="EPOCHS", help="also before training and after the last epoch")
    add("--log-every", type=cli.positive_int, default=30, metavar="STEPS", help="KL and entropies on every n-th step")
    add("--no-plot", action="store_true", help="do not draw curves.png")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / f"distill-{args.dataset}-{args.encoder}"
    args.probe = cli.chosen_probes(parser, args.probe)
    cli.check_output_flags(parser, args)
    cli.check_distinct(parser, "--seed", args.seed)
    return args


def main(args):
    device = pick_device(args.device, args.deterministic)
    with distributed.process_group(device):
        data = load_dataset(args.dataset, args.data_dir, args.download, args.subset, args.test_subset)
        cli.check_k(args, data)
        data = data.to(device)
        several = len(args.seed) > 1
        folders = [args.out / f"seed{seed}" if several else args.out for seed in args.seed]
        for seed, folder in zip(args.seed, folders, strict=True):
            distill(argparse.Namespace(**{**vars(args), "seed": seed, "out": folder}), data, device)
        if several and distributed.is_main():
            log_paths = [folder / "log.csv" for folder in folders]
            if args.probe:
                columns = [column for column in PROBED if column.split("_")[1] in args.probe]
                runs.summarize(args.out / "summary.csv", log_paths, columns)
            cli.draw(args, plots.plot_curves, args.out / "curves.png", log_paths, title(args))


def distill(args, data, device):
    """One run: the algorithm of App. A with its probes, one epoch after the other; epoch 0 is before training."""
    folder = args.out
    resumed = None
    if runs.open_folder(folder, args, device, MAY_CHANGE, PRODUCTS) and (folder / "checkpoint.pt").exists():
        resumed = load_progress(folder / "checkpoint.pt", args)
    began = time.perf_counter()
    cli.say(f"{data.name}: {len(data.train)} training and {len(data.test)} test images, {data.num_classes} classes")

    # Teacher: a random network. Student: theta_S(alpha), next to it.
    model = {"encoder": args.encoder, "out_dim": args.out_dim, "hidden_dim": args.head_hidden}
    model |= {"bottleneck_dim": args.bottleneck_dim, "weight_norm": not args.no_weight_norm}
    teacher = init_network_(materialize(build_network(**model)), random_stream(args.seed, "teacher-init"))
    student = init_network_(materialize(build_network(**model)), random_stream(args.seed, "student-init"))
    init_student_(student, teacher, args.alpha)
    student_init = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.to(device)
    cli.say(f"{args.encoder} with head: {parameter_count(student) / 1e6:.1f}M parameters; {describe(device)}, {args.precision}")

    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": args.bias_decay},
        ],
        lr=args.lr,
        fused=device.type != "mps",
    )
    batch_order = random_stream(args.seed, "batch-order")
    done, best, seconds, baselines, so_far = -1, -math.inf, 0.0, None, None
    if resumed is not None:
        done = resumed["epoch"]
        best, seconds, baselines, so_far = restore(resumed, student, optimizer, batch_order, folder)
        cli.say(f"resumed after epoch {done}" + (f", step {resumed['step']}" if so_far["losses"] else ""))

    # What the frozen teacher says about each image, once; then the teacher itself is not needed any more.
    teacher_state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.to(device)
    if baselines is None:
        baselines = baseline_probes(teacher.encoder, data, args)
    distiller = Distiller(
        student, FrozenTeacher(teacher, data.train.images, data.mean, data.std), args.precision, args.loss, args.compile
    )
    del teacher
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
            "config": logs.provenance(args, device),
        }

    def save(epoch, stream, so_far):
        """checkpoint.pt, after an epoch and maybe some steps of the next: ``so_far``, in an order drawn from ``stream``."""
        step = epoch * steps + len(so_far["losses"])
        saved = {"optimizer": optimizer.state_dict(), "generators": {"batch-order": stream}, "so_far": so_far}
        saved |= {"baselines": baselines, "best": best, "seconds": seconds + time.perf_counter() - began}
        checkpoint.save_checkpoint(folder / "checkpoint.pt", contents(epoch, step) | {"progress": saved})

    steps = math.ceil(len(data.train) / args.batch_size)  # of an epoch
    for epoch in range(done + 1, args.epochs + 1):
        row = dict.fromkeys(COLUMNS) | baselines | {"epoch": epoch}
        if epoch == 0:
            row |= evaluate_start(distiller, data)
        else:
            training_began = time.perf_counter()
            so_far = so_far or nothing_yet()
            stream = batch_order.get_state()
            order = torch.randperm(len(data.train), generator=batch_order)
            with stopping.saving(functools.partial(save, epoch - 1, stream, so_far)):
                row |= train_epoch(trained, optimizer, data, order, epoch, args, so_far)
            row["images_per_second"] = len(data.train) / (time.perf_counter() - training_began)
            so_far = None
        row |= {"step": epoch * steps} | distance(student, student_init)
        if args.probe and (epoch % args.probe_every == 0 or epoch == args.epochs):
            options = cli.probe_options(args) | {"name": f"student-{epoch}"}
            row |= prefixed("student", probe_encoder(student.encoder, data, args.precision, **options))
        if not distributed.is_main():
            continue
        row["seconds"] = seconds + time.perf_counter() - began
        log.append(row)
        cli.say(runs.table_line(row, args.probe))
        judged = row[f"student_{args.probe[0]}"] if args.probe else None
        if epoch > 0 and judged is not None and judged > best:
            best = judged
            checkpoint.save_checkpoint(folder / "best.pt", contents(epoch, epoch * steps))
        save(epoch, batch_order.get_state(), nothing_yet())

    if distributed.is_main():
        cli.draw(args, plots.plot_curves, folder / "curves.png", [log.path], title(args))
        if args.probe:
            runs.say_result(logs.read_csv(log.path, COLUMNS), args.probe)


def load_progress(path, args):
    """The checkpoint from which --resume goes on."""
    resumed = checkpoint.load_checkpoint(path, mmap=False)
    if "progress" not in resumed:
        raise InputError(f"{path} cannot be resumed: it holds networks, but no optimizer state")
    if resumed["epoch"] > args.epochs:
        raise InputError(f"--epochs {args.epochs}: {path} has already run {resumed['epoch']} epochs")
    return resumed


def restore(resumed, student, optimizer, batch_order, folder):
    """Put back where training stood. Returns the best probe so far, the seconds spent, the baselines' probes and what
    training had gathered of the next epoch, if it was stopped there."""
    try:
        saved = resumed["progress"]
        student.load_state_dict(resumed["student"])
        optimizer.load_state_dict(saved["optimizer"])
        if any(t.ndim and t.shape != p.shape for p, state in optimizer.state.items() for t in state.values()):
            raise ValueError("its optimizer's state is of another network")
        batch_order.set_state(saved["generators"]["batch-order"])
        device = next(student.parameters()).device
        so_far = {name: [torch.as_tensor(value).to(device) for value in saved["so_far"][name]] for name in nothing_yet()}
        for name, shape in (("losses", ()), ("watched", (3,))):
            if any(value.shape != shape or not value.is_floating_point() for value in so_far[name]):
                raise ValueError(f"its {name} are not numbers")
        return float(saved["best"]), float(saved["seconds"]), dict(saved["baselines"]), so_far
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'checkpoint.pt'} cannot be resumed: {' '.join(str(error).split())[:200]}") from error


def nothing_yet():
    """What ``train_epoch`` gathers, at the start of an epoch: each step's loss; KL and entropies of the steps watched."""
    return {"losses": [], "watched": []}


def train_epoch(trained, optimizer, data, order, epoch, args, so_far):
    """One pass over the images in the given order. Returns the epoch's means for the log.

    ``so_far``: ``nothing_yet()``, or what an earlier process gathered of this epoch, whose steps are then left out.
    """
    trained.train()
    device = data.train.images.device
    batches = order.split(args.batch_size)
    losses, watched = so_far["losses"], so_far["watched"]
    first, done = (epoch - 1) * len(batches), len(losses)
    to_watch = [i for i in range(len(batches)) if i == 0 or (first + i) % args.log_every == 0]
    bar = progress(batches[done:], f"epoch {epoch}", "steps") if distributed.is_main() else batches[done:]
    for i, batch in enumerate(stopping.steps(bar), done):
        step = first + i
        mine, factor = distributed.share(batch)  # all of the batch, and 1, in a single process
        mine = mine.to(device)
        images = normalize(data.train.images[mine], data.mean, data.std)
        diagnostics = i in to_watch
        result = trained(images, mine, diagnostics, "fp32" if step < args.fp32_steps else args.precision)
        loss = factor * result.loss
        if device.type == "cpu" and not torch.isfinite(loss):
            stop_diverged(epoch, step + 1, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # of the student alone
        losses.append(loss.detach())  # read once, at the end of the epoch: on a GPU, reading waits
        if diagnostics:
            watched.append(factor * torch.stack(result[1:]))
            if hasattr(bar, "set_postfix"):
                bar.set_postfix(loss=f"{loss.item():.4f}")
    loss = distributed.average(weighted_mean(torch.stack(losses), [len(batch) for batch in batches]))
    if not all(tensor.isfinite().all() for tensor in (loss, *trained.parameters())):  # the last step may have done it
        stop_diverged(epoch, first + len(batches), args)
    means = distributed.average(weighted_mean(torch.stack(watched), [len(batches[i]) for i in to_watch]))
    return dict(zip(TRAINING, [loss.item(), *means.tolist()], strict=True))


def stop_diverged(epoch, step, args):
    raise Diverged(
        f"the loss is not finite in epoch {epoch}, step {step}; the last checkpoint stands. "
        f"Try a smaller --lr than {args.lr}{', or --precision fp32' if args.precision == 'bf16' else ''}"
    )


def baseline_probes(encoder, data, args):
    """What the student is to beat: probes of the teacher's features and of the pixels; they never change."""
    if not args.probe:
        return {}
    options = cli.probe_options(args)
    teacher = probe_encoder(encoder, data, args.precision, name="teacher", **options)
    return prefixed("teacher", teacher) | prefixed("input", probe_input(data, name="input", **options))


def prefixed(prefix, values):
    return {f"{prefix}_{name}": value for name, value in values.items()}


def title(args):
    return f"{args.encoder} on {args.dataset}, alpha = {args.alpha:g}"


if __name__ == "__main__":
    cli.run(main, parse_args())
