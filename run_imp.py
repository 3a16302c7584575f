"""Lottery tickets by iterative magnitude pruning (paper section 6, App. E.5; Fig. 8).

Train with labels, prune the smallest weights, rewind the others to where they were at epoch l,
train again. From a random start, a sparse network keeps its accuracy only with l > 0; from a
student, distilled without labels, the paper finds that l = 0 suffices: its weights already hold the
winning tickets.

    python run_imp.py --encoder resnet20 --epochs 4 --rounds 3           # digits, about a minute
    # first: run_distill.py --dataset cifar10 --data-dir data --encoder resnet18 --out runs/r18
    python run_imp.py --dataset cifar10 --data-dir data --rewind-epoch 0 1 2 5 \\
        --init runs/r18/checkpoint.pt:student-init runs/r18/checkpoint.pt:student
    torchrun --nproc-per-node=4 run_imp.py ...            # the processes share the chains

Each start and rewind epoch make a chain; --control shuffle adds one with its masks shuffled.
Writes config.json, imp.csv (a row a round), imp.png and, in chains/, what --resume needs. In
imp.csv, sparsity and remaining_parameters count only what --prune says may be pruned; epochs and
seconds are the round's, test_accuracy is of its last epoch, test_accuracy_best of its best.
"""

import itertools
from functools import partial
from pathlib import Path

from rtd import plots, pruning
from rtd.errors import InputError
from rtd.harness import cli
from rtd.harness.checkpoint import load_starts, say_starts
from rtd.harness.datasets import fingerprints
from rtd.harness.run import Run
from rtd.harness.training import SupervisedTraining
from rtd.supervised import empty_classifier

COLUMNS = ("init", "rewind_epoch", "control", "round", "sparsity", "remaining_parameters")
COLUMNS += ("test_accuracy", "test_accuracy_best", "epochs", "seconds")
CONTROLS = (None, "shuffle")
PRODUCTS = ("imp.csv", "imp.*", "chains/init*-rewind*")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    # fmt: off
    add = parser.group("start with these")
    cli.add_data_flags(add)
    cli.add_init_flags(add)
    add("--rounds", cli.non_negative_int, 10, "rounds of pruning; with --prune-fraction 0.2, 10 leave a tenth of the weights, 20 a hundredth; --resume can add some")
    add("--out", Path, Path("runs/imp"), "folder of the run")
    parser.add_file_flags()
    add = parser.group("pruning")
    add("--rewind-epoch", cli.non_negative_int, 0, "* epoch to which a round rewinds weights, batch norm, momentum and schedule; 0 is the start; the paper has 0, 1, 2, 5; each is a chain")
    add("--prune-fraction", cli.fraction, 0.2, "share of the remaining weights that a round prunes")
    add("--prune", pruning.PRUNE, "weights", "parameters that may be pruned: weights of convolutions and linear layers, or all, as the authors did; the smallest go first")
    add("--control", ("none", "shuffle"), "none", "further chains with each mask shuffled within its layers: if they do as well, the mask does not matter")
    parser.add_training_flags()
    parser.add_device_flags()
    parser.add_output_flags()
    # fmt: on
    args = parser.parse(argv, "init", "rewind_epoch")
    if (last := max(args.rewind_epoch)) >= args.epochs:
        parser.error(f"--rewind-epoch {last}: give one before the end, --epochs {args.epochs}")
    return args


def main(args, device, world):
    data = cli.load_data(args, world)
    starts = load_starts(args, data)
    classifier = empty_classifier(starts[0].architecture, data.num_classes)
    weights = pruning.prunable(classifier, args.prune).values()
    total = sum(weight.numel() for weight in weights)
    if pruning.kept_after(total, args.prune_fraction, args.rounds) < 1:
        raise InputError(f"--rounds {args.rounds} leave none of {total} weights; choose fewer")
    run = Run(args, device, world, PRODUCTS, ("rounds", "control"), fingerprints(data), args.init)
    title = say_starts(run, starts, data)
    data = data.to(device)
    chains = list(itertools.product(starts, args.rewind_epoch))
    tables = [f"{file_of(*chain, control)}.csv" for control in CONTROLS for chain in chains]

    def do(chain, run):  # and then its control, in the same process, which needs its state
        for control in CONTROLS if args.control == "shuffle" else [None]:
            join = partial(run.concatenate, "imp.csv", COLUMNS, tables)
            run_chain(*chain, control, data, run, after_round=join)

    def finish(diverged):
        if rows := run.concatenate("imp.csv", COLUMNS, tables):
            run.draw("imp", plots.imp, rows, title)

    run.for_each(chains, do, "chain", finish)


def file_of(start, rewind_epoch, control):
    """The path of a chain's files, without suffix."""
    name = f"chains/{start.name}-rewind{rewind_epoch}"
    return f"{name}-{control}" if control else name


def run_chain(start, rewind_epoch, control, data, run, after_round):
    """A curve of Fig. 8: train, prune, rewind, train again. control: None, or "shuffle"."""
    args, file = run.args, file_of(start, rewind_epoch, control)
    title = f"{start.kind}, rewind {rewind_epoch}" + ", masks shuffled" * bool(control)
    training = SupervisedTraining(start, data, (args.seed,), run, title)
    weights = pruning.prunable(training.classifier, args.prune)
    masks, rewind = pruning.dense_masks(weights), None
    total = pruning.remaining(masks)
    rows, kept = [], []  # of each round: a row, and how many weights of each layer are kept
    # a control begins with round 0 of its chain, so that its table may be there before its state
    saved = run.load(f"{file}.pt", None if control else f"{file}.csv")
    if control:  # it keeps as many weights of each layer as that chain
        controlled = run.load(f"{file_of(start, rewind_epoch, None)}.pt")
        first = controlled | {"rows": [controlled["rows"][0] | {"control": control}]}
        saved = (saved or first) | {"kept": controlled["kept"]}
    if saved:
        rows, rewind, masks, kept = (saved[k] for k in ("rows", "rewind", "masks", "kept"))
        masks = {name: mask.to(run.device) for name, mask in masks.items()}
        training.load_state(saved["training"])
        if (done := len(rows) - 1) > args.rounds:
            raise InputError(f"--rounds {args.rounds}: {file} has run {done} already")
        run.say(f"{title}: {len(rows)} of {args.rounds + 1} rounds are done")
        run.table(f"{file}.csv", COLUMNS, rows)

    def save():
        state = {"rows": rows, "rewind": rewind, "masks": masks, "kept": kept}
        run.save(f"{file}.pt", state | {"training": training.state()})

    for round_ in range(len(rows), args.rounds + 1):
        if len(training.accuracies) == args.epochs:  # the round before is over
            # Prune the smallest of the trained weights. Restore all as it was at the end of epoch l
            # (weights, fc, batch norm's statistics, momentum), then zero what the new mask prunes.
            # Batches and augmentation repeat the first round's.
            if control:
                masks = pruning.random_masks(kept[round_], weights, args.seed, round_)
            else:
                left = pruning.kept_after(total, args.prune_fraction, round_)
                masks = pruning.prune_smallest(masks, weights, left)
            training.load_state(rewind)
        if round_:  # from here on, after every step too
            training.loss.pruned = weights, masks
            training.loss.after_step()
        for done in training.epochs(save):
            if done == rewind_epoch and rewind is None:
                rewind = training.state()
            if done == args.epochs:  # in the loop, as the save that follows must hold the row
                new = training.accuracies[rewind_epoch if round_ else 0 :]  # of this round
                left = pruning.remaining(masks)
                before = rewind["seconds"] if round_ else 0
                row = start.spec, rewind_epoch, control, round_, 1 - left / total
                row += left, new[-1], max(new), len(new), training.seconds - before
                rows.append(dict(zip(COLUMNS, row, strict=True)))
                if not control:
                    kept.append({name: int(mask.sum()) for name, mask in masks.items()})
                words = f"{left / total:.1%} of the weights, test accuracy {new[-1]:.2f} %"
                run.say(f"{title}, round {round_}: {words} (best {max(new):.2f} %)")
        run.table(f"{file}.csv", COLUMNS, rows)
        after_round()


if __name__ == "__main__":
    cli.run(main, parse_args())
