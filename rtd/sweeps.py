"""Several values of a flag on one command line: a run for each combination, each in its own folder, summed up in one table."""

import argparse
import contextlib
import itertools

from rtd import cli, distributed, logs
from rtd.errors import Diverged, InputError
from rtd.runs import best_and_final

SWEPT = ("dataset", "encoder", "norm", "bottleneck", "out_dim", "subset", "lr", "alpha", "seed")
PRODUCTS = ("summary.csv", "sweep.png", "dynamics.png", "curves.png")  # in --out itself
DIVERGED = "diverged.txt"  # in a run's folder: why it is not in the summary
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
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def check_folders(args, planned, several):
    """Refuse, before the first run, folders that hold something already; with --resume or --overwrite that is meant."""
    if (args.out / "config.json").exists():
        raise InputError(f"--out {args.out} holds a single run; give a sweep another folder")
    summary = args.out / "summary.csv"
    used = [path for path in (*(run.out for run in planned), summary) if path.is_file() or path.is_dir() and any(path.iterdir())]
    if used and not (args.resume or args.overwrite):
        raise InputError(f"--out {args.out} holds {used[0].name} already: --resume continues the sweep, --overwrite starts again")
    names = [name for name in several if name != "seed"]
    if args.resume and summary.exists() and (rows := logs.read_csv(summary)):
        over = list(rows[0])[: list(rows[0]).index("quantity")] if "quantity" in rows[0] else None
        if over != names:
            raise InputError(f"--resume: {summary} is of a sweep over other flags than {names or ['seed']}; give another --out")


def check_data(planned):
    """Refuse, before the first run, images that a later one would miss, or that are too few for it."""
    seen = set()
    for run in planned:
        if (key := (run.dataset, run.subset, run.out_dim)) not in seen:
            seen.add(key)
            cli.check_k(run, cli.load_sources(run)[1])


def clear_folder(args):
    """With --overwrite, delete what an earlier sweep's summing up left in --out."""
    distributed.barrier()  # all have looked before the main process deletes, or anyone begins
    if args.overwrite and distributed.is_main():
        for product in PRODUCTS:
            (args.out / product).unlink(missing_ok=True)


@contextlib.contextmanager
def noting_divergence(folder):
    """A run whose loss is not finite any more leaves a note in its ``folder``, and the sweep goes on."""
    note = folder / DIVERGED
    try:
        yield
    except Diverged as error:
        cli.say(error)
        if distributed.is_main():
            note.write_text(f"{error}\n")
    else:
        if distributed.is_main():
            note.unlink(missing_ok=True)


def split_off_diverged(planned):
    """(the runs of a sweep that came to their end, those that diverged)."""
    diverged = [run for run in planned if (run.out / DIVERGED).exists()]
    return [run for run in planned if run not in diverged], diverged


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
    cli.say(f"\n{path}: mean and standard deviation over n seeds")
    for row in summary:
        if row["quantity"].startswith("student"):
            spread = "" if row["std"] is None else f" +- {row['std']:.2f}"
            setting = "".join(f"{name} {row[name]:<10} " for name in names)
            cli.say(f"  {setting}{row['quantity']:<15} {row['epoch']:<6} {row['mean']:6.2f}{spread} (n = {row['n']})")
