"""Several values of a flag: a run for each combination, in a folder of its own, and a summary.

The runs may also be made one by one, on several GPUs say; the sweep with --resume sums them up.
"""

import argparse
import itertools

import numpy as np

from rtd import plots
from rtd.harness import cli, files
from rtd.harness.run import Run, lock

SWEPT = ("dataset", "encoder", "norm", "bottleneck", "out_dim", "subset", "lr", "alpha", "seed")
DISTANCES = ("distance_encoder", "distance_head", "distance_total")
PRODUCTS = ("summary.csv", "sweep.*", "dynamics.*", "curves.*")


def probe_columns(probes):
    """The columns of log.csv that the ``probes`` fill."""
    return [f"{of}_{probe}" for of in ("student", "teacher", "input") for probe in probes]


def varied(args):
    """The names of the flags that were given several values."""
    return [name for name in SWEPT if len(getattr(args, name)) > 1]


def expand(args):
    """The flags of each run, with single values; in a sweep ``out`` is a folder within --out."""
    expanded = []
    for values in itertools.product(*(getattr(args, name) for name in SWEPT)):
        flags = vars(args) | dict(zip(SWEPT, values, strict=True))
        parts = [f"{name.replace('_', '')}{plots.short(flags[name])}" for name in varied(args)]
        flags["out"] = args.out / "-".join(parts).replace("/", ".")  # of a single run, --out itself
        expanded.append(argparse.Namespace(**flags))
    return expanded


def run(args, planned, device, world, do, products, title):
    """Do all ``planned`` runs, do(args, device, world), and sum up those that do not diverge.

    products: glob patterns of the files of each.
    """
    # refuse images that a later run would miss before the first begins
    for one in {(one.dataset, one.subset, one.out_dim): one for one in planned}.values():
        cli.load_sources(one, world)
    names = [name for name in varied(args) if name != "seed"]
    # what varied may get more values when a sweep is continued, but names of folders stay
    same = {"flags that vary": varied(args)}
    # old runs go now, lest one that is not done anew be taken for done
    there = [one.out for one in planned if args.overwrite and (one.out / "config.json").exists()]
    world.in_main(lambda: [lock(folder / ".lock", f"--out {folder}") for folder in there])
    old = [f"{folder.name}/{file}" for folder in there for file in (*products, "config.json")]
    may_change = ("epochs", *varied(args))
    sweep = Run(args, device, world, (*PRODUCTS, *old), may_change, same, [args.teacher])

    def finish(diverged):
        groups = {}
        for one in [one for i, one in enumerate(planned) if i not in diverged]:
            setting = tuple(getattr(one, name) for name in names)
            groups.setdefault(setting, []).append(files.read_csv(one.out / "log.csv"))
        others = {log.parent for log in args.out.glob("*/log.csv")} - {one.out for one in planned}
        if others:
            sweep.say(f"note: {len(others)} other runs in {args.out} are not summed up")
        if not groups:
            return
        summarize(sweep, names, groups, args.probe)
        if names:
            sweep.draw("sweep", plots.sweep, names, groups, title)
            sweep.draw("dynamics", plots.dynamics, names, groups, title)
        else:
            sweep.draw("curves", plots.curves, groups[()], title)

    def do_one(one, run):
        do(one, device, run.world)
        sweep.keep_config()

    sweep.for_each(planned, do_one, finish=finish)


def summarize(sweep, names, groups, probes):
    """Write and say summary.csv: mean, deviation, n of final values, and of probes' best ones."""
    probed = probe_columns(probes)
    columns, rows = (*names, "quantity", "epoch", "mean", "std", "n"), []
    sweep.say(f"\n{sweep.folder / 'summary.csv'}: mean and standard deviation over n seeds")
    for values, logs in groups.items():
        setting = dict(zip(names, map(plots.short, values), strict=True))
        for column in (*probed, "kl", *DISTANCES):
            both = zip(*(plots.best_and_final(log, column) for log in logs), strict=True)
            for epoch, found in zip(("best", "final"), both, strict=True):
                if epoch == "best" and column not in probed:
                    continue
                cells = *setting.values(), column, epoch, *mean_and_std(found), len(logs)
                rows.append(dict(zip(columns, cells, strict=True)))
                if column.startswith("student"):
                    words = "".join(f"{name} {value:<10} " for name, value in setting.items())
                    words += f"{column:<15} {epoch:<6} {plus_minus(found)} (n = {len(logs)})"
                    sweep.say(f"  {words}")
    sweep.table("summary.csv", columns, rows)


def mean_and_std(values):
    """Mean and sample standard deviation (n - 1); the latter is None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def plus_minus(values):
    """``mean_and_std`` in words."""
    mean, std = mean_and_std(values)
    return f"{mean:.2f}" if std is None else f"{mean:.2f} +- {std:.2f}"
