"""Run folders: opened safely, continued only as the same experiment, and summed up in a few lines of text."""

import shutil
import warnings
from pathlib import Path

from rtd import checkpoint, cli, distributed, logs
from rtd.errors import InputError


def open_folder(folder, args, may_change, products):
    """Say the run folder and make it ready. Returns the checkpoint to resume from, or None for a fresh start.

    ``may_change``: names of flags that may differ between a run and its --resume; any other would make the rest a
    different experiment. ``products``: file names that --overwrite deletes. Raises InputError for a folder that holds a
    run already (without --resume or --overwrite) or was run with other flags.
    """
    folder = Path(folder)
    cli.say(folder)
    resumed = None
    path = folder / "checkpoint.pt"
    if args.resume and path.exists():
        resumed = checkpoint.load_checkpoint(path, mmap=False)
        if "progress" not in resumed:
            raise InputError(f"{path} cannot be resumed: it holds networks, but no optimizer state")
        _check_same_flags(folder, resumed, args, may_change)
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; give a folder")
    if distributed.is_main():
        if resumed is None and folder.is_dir() and any(folder.iterdir()):
            if args.overwrite:
                for name in products:
                    (folder / name).unlink(missing_ok=True)
            elif not args.resume:
                raise InputError(f"--out {folder} holds a run already: --resume continues it, --overwrite starts again")
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 2**30:
            warnings.warn(f"less than 1 GB is free on the disk of {folder}", stacklevel=2)
    distributed.barrier()
    return resumed


def _check_same_flags(folder, resumed, args, may_change):
    then, now = resumed["config"]["flags"], vars(args)
    changed = [name for name in now if name not in may_change and then.get(name) != now[name]]
    if changed:
        was = ", ".join(f"--{name.replace('_', '-')} was {then.get(name)}, is {now[name]}" for name in changed)
        raise InputError(f"--resume: {folder} was run with other flags ({was}); use those, or another --out")
    if resumed["epoch"] > args.epochs:
        raise InputError(f"--epochs {args.epochs}: {folder} has already run {resumed['epoch']} epochs")


def best_and_final(rows, column):
    """Maximum over the epochs after training began (what the authors report), and the last epoch's value."""
    values = [row[column] for row in rows if row["epoch"] > 0 and row[column] is not None]
    return max(values), values[-1]


def say_result(rows, probes):
    """The run's result as a small table: input, teacher, student (best and final epoch) and the gain."""
    final = rows[-1]
    student = [best_and_final(rows, f"student_{p}") for p in probes]
    teacher = [final[f"teacher_{p}"] for p in probes]
    cli.say(f"\n{'test accuracy, %':<18}" + "".join(f"{probe:>9}" for probe in probes))
    for name, values in (
        ("input pixels", [final[f"input_{p}"] for p in probes]),
        ("teacher", teacher),
        ("student, best", [best for best, _ in student]),
        ("student, final", [last for _, last in student]),
    ):
        cli.say(f"{name:<18}" + "".join(f"{value:9.2f}" for value in values))
    cli.say(f"{'gain over teacher':<18}" + "".join(f"{s[1] - t:+9.2f}" for s, t in zip(student, teacher, strict=True)))


def summarize(path, log_paths, columns):
    """Write summary.csv: mean, standard deviation and number over runs, of the best and the final epoch, and say it."""
    runs = [logs.read_csv(log) for log in log_paths]
    summary = []
    for column in columns:
        for i, when in enumerate(("best", "final")):
            mean, std = logs.mean_and_std([best_and_final(rows, column)[i] for rows in runs])
            summary.append({"quantity": column, "epoch": when, "mean": mean, "std": std, "n": len(runs)})
    logs.CsvLog(path, ("quantity", "epoch", "mean", "std", "n")).start(summary)
    cli.say(f"\n{path}: mean and standard deviation over {len(runs)} seeds")
    for row in summary:
        cli.say(f"  {row['quantity']:<15} {row['epoch']:<6} {row['mean']:6.2f} +- {row['std']:.2f}")
