"""Several values of a flag on one command line: a run for each combination, each in its own folder, summed up in one table."""

import argparse
import itertools

from rtd import cli, logs
from rtd.runs import best_and_final

SWEPT = ("dataset", "encoder", "norm", "bottleneck", "out_dim", "subset", "lr", "alpha", "seed")
ONLY_FINAL = ("kl", "distance_encoder", "distance_head", "distance_total")


def check(parser, args):
    """Refuse a value that is given twice."""
    for name in SWEPT:
        cli.check_distinct(parser, f"--{name.replace('_', '-')}", getattr(args, name))


def varied(args):
    """The names of the flags that were given several values."""
    return [name for name in SWEPT if len(getattr(args, name)) > 1]


def expand(args):
    """The flags of each run, an argparse namespace with single values; in a sweep ``out`` is a folder within --out."""
    several = varied(args)
    expanded = []
    for values in itertools.product(*(getattr(args, name) for name in SWEPT)):
        settings = dict(zip(SWEPT, values, strict=True))
        folder = "-".join(f"{name.replace('_', '')}{label(settings[name])}" for name in several)
        out = args.out / folder.replace("/", ".") if several else args.out
        expanded.append(argparse.Namespace(**{**vars(args), **settings, "out": out}))
    return expanded


def label(value):
    """A value of a flag as short text: None, which is what no flag gives, as "default"."""
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def groups(runs, several):
    """Runs that differ in their seed alone, together: {their values of the other flags ``several``: [log.csv]}."""
    names = [name for name in several if name != "seed"]
    found = {}
    for run in runs:
        found.setdefault(tuple(getattr(run, name) for name in names), []).append(run.out / "log.csv")
    return names, found


def summarize(path, runs, several, probed):
    """Write summary.csv, and say it: mean, standard deviation and number over the seeds of each group of runs.

    Of the probes (columns ``probed``) the best and the final epoch, of the KL and of the distances from the start the final.
    """
    names, found = groups(runs, several)
    summary = []
    for values, paths in found.items():
        tables = [logs.read_csv(log) for log in paths]
        setting = dict(zip(names, map(label, values), strict=True))
        for column in (*probed, *ONLY_FINAL):
            for i, when in enumerate(("best", "final")):
                if when == "best" and column in ONLY_FINAL:
                    continue
                mean, std = logs.mean_and_std([best_and_final(rows, column)[i] for rows in tables])
                summary.append(setting | {"quantity": column, "epoch": when, "mean": mean, "std": std, "n": len(tables)})
    logs.CsvLog(path, (*names, "quantity", "epoch", "mean", "std", "n")).start(summary)
    cli.say(f"\n{path}: mean and standard deviation over {len(next(iter(found.values())))} seeds")
    for row in summary:
        if row["quantity"].startswith("student"):
            spread = "" if row["std"] is None else f" +- {row['std']:.2f}"
            setting = "".join(f"{name} {row[name]:<10} " for name in names)
            cli.say(f"  {setting}{row['quantity']:<15} {row['epoch']:<6} {row['mean']:6.2f}{spread}")
