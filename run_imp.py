"""Lottery tickets by iterative magnitude pruning (paper section 6, App. E.5; Fig. 8).

Train with labels, prune the fifth of the weights that are smallest, rewind the rest to where they were at epoch l, train
again. A random start keeps its accuracy only if it is rewound to an epoch l > 0; the paper finds that a student
distilled without labels can be rewound to its very start, l = 0.

    python run_imp.py                                                    # digits, a random ResNet18; slow without a GPU
    python run_imp.py --dataset cifar10 --data-dir data --precision bf16 --rounds 15 \\
        --init runs/x/checkpoint.pt:student-init runs/x/checkpoint.pt:student --rewind-epoch 0 1 2 5
    torchrun --nproc-per-node=4 run_imp.py ...                           # chains are shared among the processes

Each start and rewind epoch is a chain. Writes config.json, imp.csv (a row a round), imp.png and, in chains/, what --resume needs.
"""

from dataclasses import replace
from functools import partial

import torch

from rtd import checkpoint, cli, distributed, logs, plots, pruning, runs, stopping
from rtd.classifier import build_classifier, empty_classifier, load_starts
from rtd.device import describe, pick_device
from rtd.errors import Diverged, InputError
from rtd.init import random_stream
from rtd.train import Trainer

COLUMNS = ("init", "rewind_epoch", "round", "sparsity", "remaining_parameters", "test_accuracy", "test_accuracy_best")
COLUMNS += ("epochs", "seconds")
PRODUCTS = ("config.json", "imp.csv", "imp.png", "chains/init*-rewind*")
MAY_CHANGE = ("rounds", "out", "resume", "overwrite", "save_every", "no_plot", "data_dir", "download", "device")  # on --resume
FORMAT = "rtd-imp-2"
KEYS = {"round", "masks", "rewind", "training", "config"}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_training_flags(parser)
    add = parser.add_argument_group("pruning").add_argument
    add("--rounds", type=cli.non_negative_int, default=10, help="of pruning; 10 leave a tenth, 20 a hundredth; --resume adds")
    add("--prune-fraction", type=cli.unit_interval, default=0.2, metavar="K", help="of what remains, pruned in each round")
    add(
        "--rewind-epoch",
        type=cli.non_negative_int,
        nargs="+",
        default=[0],
        metavar="L",
        help="0: back to the start; the paper has 0, 1, 2, 5. Several: one chain each",
    )
    add("--prune", choices=pruning.PRUNE, default="weights", help="of convolutions and linear layers; or all, as the authors")
    cli.add_device_flags(parser)
    cli.add_output_flags(parser, "runs/imp")
    args = parser.parse_args(argv)
    cli.check_output_flags(parser, args)
    cli.check_distinct(parser, "--init", args.init)
    cli.check_distinct(parser, "--rewind-epoch", args.rewind_epoch)
    if not 0 < args.prune_fraction < 1:
        parser.error(f"--prune-fraction {args.prune_fraction:g}: must lie between 0 and 1; the paper's is 0.2")
    if max(args.rewind_epoch) >= args.epochs:
        parser.error(f"--rewind-epoch {max(args.rewind_epoch)}: training has {args.epochs} epochs; rewind to an earlier one")
    return args


def main(args):
    device = pick_device(args.device, args.deterministic)
    with distributed.process_group(device):
        data = cli.load_data(args)
        starts = load_starts(args.init, args.encoder, data, args.seed)
        check_rounds(args, starts[0].architecture, data.num_classes)
        reads = {start.spec: start.sha256 for start in starts if start.sha256} | data.fingerprints()
        runs.open_folder(args.out, args, device, MAY_CHANGE, PRODUCTS, reads)
        cli.say(f"{data.name}: {len(data.train)} training and {len(data.test)} test images, {data.num_classes} classes")
        encoder = starts[0].architecture["encoder"]
        cli.say(f"{encoder}; {describe(device, args.precision)}")
        data = data.to(device)

        chains = [
            (args.out / "chains" / f"init{i}-rewind{rewind_epoch}.csv", start, rewind_epoch)
            for i, start in enumerate(starts)
            for rewind_epoch in args.rewind_epoch
        ]
        table = [path for path, *_ in chains]
        cli.say(f"{'round':>5} {'remaining':>10} {'accuracy':>9} {'best':>7} {'seconds':>8}  start, rewind epoch")
        diverged = []
        for path, start, rewind_epoch in distributed.units(chains):
            try:
                for row in run_chain(path, start, rewind_epoch, data, args, device):
                    say_row(row)
                    logs.concatenate(args.out / "imp.csv", COLUMNS, table)
            except Diverged as error:
                diverged.append(str(error))  # the error itself would hold on to the network
        diverged = distributed.gather(diverged)
        if distributed.is_main():
            kinds = {start.spec: start.kind for start in starts}
            if logs.concatenate(args.out / "imp.csv", COLUMNS, table):
                cli.draw(args, plots.plot_imp, args.out / "imp.png", args.out / "imp.csv", kinds, f"{encoder} on {data.name}")
        distributed.barrier()  # an error ends all processes at once
        if diverged:
            raise Diverged(f"{len(diverged)} of {len(chains)} chains stopped early: {'; '.join(diverged)}")


def check_rounds(args, architecture, num_classes):
    """Refuse, before anything is computed, to prune more than there is."""
    weights = pruning.prunable(empty_classifier(architecture, num_classes), args.prune)
    total = sum(weight.numel() for weight in weights.values())
    if pruning.kept_after(total, args.prune_fraction, args.rounds) < 1:
        raise InputError(f"--rounds {args.rounds}: nothing would be left of {total} weights; choose fewer")


def run_chain(path, start, rewind_epoch, data, args, device):
    """Train, prune, rewind, train again: one curve of Fig. 8. Yields, in the main process, the CSV row of each round.

    ``path``: the chain's own CSV; what --resume needs is beside it, saved between epochs.
    """
    data = replace(data, mean=start.mean, std=start.std)
    classifier = build_classifier(start, data.num_classes, random_stream(args.seed, "fc-init")).to(device)
    trainer = Trainer(classifier, data, args.epochs, (args.seed,), args.lr, args.batch_size, args.precision)
    weights = pruning.prunable(classifier, args.prune)
    masks = pruning.dense_masks(weights)
    total = pruning.remaining(masks)
    first, rewind = 0, None
    config = logs.provenance(args, device)

    saved, log = path.with_suffix(".pt"), logs.CsvLog(path, COLUMNS)
    resumed = args.resume and saved.exists()
    distributed.barrier()  # all have looked before the main process writes
    if resumed:
        first, masks, rewind = load_progress(saved, trainer, weights, rewind_epoch, args)
        cli.say(f"{start.spec}, rewind {rewind_epoch}: resumed in round {first} after epoch {trainer.epoch}")
    if distributed.is_main():
        path.parent.mkdir(exist_ok=True)
        if resumed:
            log.cut(first - 1, "round", text=("init",))
        else:
            log.start()

    for round_ in range(first, args.rounds + 1):
        trainer.name = f"{start.spec}, rewind {rewind_epoch}, round {round_}"
        if round_ > first:  # prune the smallest of the trained weights; the others go back to where they were at epoch l
            count = pruning.remaining(masks) - pruning.kept_after(total, args.prune_fraction, round_)
            masks = pruning.prune_smallest(masks, weights, count)
            trainer.load_state(rewind)
            trainer.after_step = pruning.Masking(weights, masks)
            trainer.after_step()
        while trainer.epoch < args.epochs:
            if rewind is None and trainer.epoch == rewind_epoch:
                rewind = trainer.state()
            save = partial(save_progress, saved, trainer, {"round": round_, "masks": masks, "rewind": rewind, "config": config})
            with stopping.saving(save):
                trainer.run_epoch()
            if distributed.is_main() and (trainer.epoch % args.save_every == 0 or trainer.epoch == args.epochs):
                save()
        if distributed.is_main():
            left = pruning.remaining(masks)
            new = trainer.accuracies[rewind_epoch if round_ else 0 :]  # of this round's epochs
            seconds = trainer.seconds - (rewind["seconds"] if round_ else 0)
            row = {"init": start.spec, "rewind_epoch": rewind_epoch, "round": round_, "sparsity": 1 - left / total}
            row |= {"remaining_parameters": left, "test_accuracy": new[-1], "test_accuracy_best": max(new)}
            row |= {"epochs": len(new), "seconds": seconds}
            log.append(row)
            yield row


def save_progress(path, trainer, contents):
    checkpoint.save_state(path, {**contents, "training": trainer.state()}, FORMAT)


def load_progress(path, trainer, weights, rewind_epoch, args):
    """Put ``trainer`` back to where the file ``path`` stands; returns its round, masks and rewind point."""
    contents = checkpoint.load_state(path, FORMAT, KEYS, "run_imp.py", mmap=False)
    round_ = contents["round"]
    if not isinstance(round_, int) or round_ < 0 or (round_ and contents["rewind"] is None):
        raise InputError(f"{path} cannot be resumed: it has no rewind point for its round {round_}")
    if round_ > args.rounds:
        raise InputError(f"--rounds {args.rounds}: {path} is already in round {round_}")
    for state in (contents["rewind"], contents["training"]):
        if state is not None:
            trainer.resume(state, path)
    if contents["rewind"] is not None and contents["rewind"]["epoch"] != rewind_epoch:
        raise InputError(f"{path} cannot be resumed: its rewind point is not epoch {rewind_epoch}")
    try:
        masks = {name: contents["masks"][name].to(weight.device) for name, weight in weights.items()}
        left = pruning.kept_after(sum(mask.numel() for mask in masks.values()), args.prune_fraction, round_)
        if any(mask.dtype != torch.bool for mask in masks.values()) or pruning.remaining(masks) != left:
            raise ValueError(f"they do not keep {left} weights")
        trainer.after_step = pruning.Masking(weights, masks) if round_ else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be resumed: its masks do not fit ({error})") from error
    return round_, masks, contents["rewind"]


def say_row(row):
    accuracies = f"{row['test_accuracy']:9.2f} {row['test_accuracy_best']:7.2f}"
    where = f"{row['init']}, {row['rewind_epoch']}"
    cli.say(f"{row['round']:5d} {1 - row['sparsity']:10.2%} {accuracies} {row['seconds']:8.1f}  {where}")


if __name__ == "__main__":
    cli.run(main, parse_args())
