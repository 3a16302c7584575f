"""Run folders: opened safely, continued only as the same experiment, and summed up in a few lines of text."""

import json
import shutil
import warnings
from pathlib import Path

import torch

from rtd import checkpoint, cli, distributed, logs
from rtd.errors import InputError


def open_folder(folder, args, device, may_change, products, reads=None):
    """Say the run folder and make it ready, with a config.json. Returns whether an earlier run is being continued.

    ``may_change``: names of flags that may differ between a run and its --resume; any other would make the rest a
    different experiment. ``products``: glob patterns of the files that --overwrite deletes. ``reads``: {name: SHA-256} of
    the checkpoints and images the run reads, which config.json records. Raises InputError for a folder that holds a run already
    (without --resume or --overwrite), or was run with other flags, checkpoints or images.
    """
    folder = Path(folder)
    cli.say(folder)
    config = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; give a folder")
    used = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if used and not (args.resume or args.overwrite):
        raise InputError(f"--out {folder} holds a run already: --resume continues it, --overwrite starts again")
    if used and args.resume and not config.exists():
        raise InputError(f"--resume: {folder} holds files but no run (config.json is missing); give another --out")
    continued = args.resume and config.exists()
    if continued:
        _check_same_run(config, args, may_change, reads)
    distributed.barrier()  # all have looked before the main process writes
    if distributed.is_main():
        for pattern in map(Path, products):
            for path in folder.glob(str(pattern)) if args.overwrite and used else ():
                path.unlink()
            for half_written in folder.glob(str(pattern.with_name(f".{pattern.name}.*.tmp"))):  # by ``atomic_write``, if killed
                half_written.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        if not continued:
            logs.write_json(config, logs.provenance(args, device) | ({"reads": reads} if reads else {}))
        if shutil.disk_usage(folder).free < 2**30:
            warnings.warn(f"less than 1 GB is free on the disk of {folder}", stacklevel=2)
    distributed.barrier()
    return continued


def _check_same_run(config, args, may_change, reads):
    try:
        contents = json.loads(config.read_text())
        then, read = contents["flags"], contents.get("reads", {})
        now = json.loads(json.dumps(logs.flags(args)))
        changed = [name for name in now if name not in may_change and then.get(name) != now[name]]
        replaced = [name for name, digest in (reads or {}).items() if read.get(name, digest) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{config} is damaged, so --resume cannot tell which run this is; give another --out") from error
    if changed:
        was = ", ".join(f"--{name.replace('_', '-')} was {then.get(name)}, is {now[name]}" for name in changed)
        raise InputError(f"--resume: {config.parent} was run with other flags ({was}); use those, or another --out")
    if replaced:
        raise InputError(f"--resume: {replaced[0]} changed since {config.parent} was begun; give another --out")


def load_progress(path, epochs):
    """The distillation checkpoint from which --resume goes on, up to ``epochs``."""
    resumed = checkpoint.load_checkpoint(path, mmap=False)
    if "progress" not in resumed:
        raise InputError(f"{path} cannot be resumed: it holds networks, but no optimizer state")
    if resumed["epoch"] > epochs:
        raise InputError(f"--epochs {epochs}: {path} has already run {resumed['epoch']} epochs")
    return resumed


def restore(resumed, student, optimizer, folder):
    """Put back where training stood. Returns the best probe so far, the seconds spent, the baselines' probes and what
    training had gathered of the next epoch, if it was stopped there."""
    try:
        saved = resumed["progress"]
        student.load_state_dict(resumed["student"])
        optimizer.load_state_dict(saved["optimizer"])
        if any(t.ndim and t.shape != p.shape for p, state in optimizer.state.items() for t in state.values()):
            raise ValueError("its optimizer's state is of another network")
        device = next(student.parameters()).device
        so_far = {name: [torch.as_tensor(value).to(device) for value in saved["so_far"][name]] for name in nothing_yet()}
        for name, shape in (("losses", ()), ("watched", (3,))):
            if any(value.shape != shape or not value.is_floating_point() for value in so_far[name]):
                raise ValueError(f"its {name} are not numbers")
        return float(saved["best"]), float(saved["seconds"]), dict(saved["baselines"]), so_far
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'checkpoint.pt'} cannot be resumed: {' '.join(str(error).split())[:200]}") from error


def nothing_yet():
    """What ``train_epoch`` of run_distill.py gathers of each step's loss, and of KL and entropies, at the start of an epoch."""
    return {"losses": [], "watched": []}


def table_header(probes):
    """Column names of ``table_line``."""
    names = {"linear": "linear %", "knn": "k-NN %"}
    probed = "".join(f" {names[probe]:>9}" for probe in probes)
    return f"{'epoch':>5} {'step':>7} {'loss':>9} {'KL':>9} {'distance':>8}{probed}   img/s  seconds"


def table_line(row, probes):
    """A row of run_distill.py's log as one aligned line."""
    values = [row[f"student_{probe}"] for probe in probes]
    probed = "".join(f" {'' if value is None else f'{value:.2f}':>9}" for value in values)
    speed = "" if row["images_per_second"] is None else f"{row['images_per_second']:.0f}"
    start = f"{row['epoch']:5d} {row['step']:7d} {row['loss']:9.5f} {row['kl']:9.2e} {row['distance_total']:8.2f}"
    return f"{start}{probed} {speed:>7} {row['seconds']:8.1f}"


def best_and_final(rows, column):
    """Maximum over the epochs after training began (what the authors report), and the last epoch's value."""
    values = [row[column] for row in rows if (row["epoch"] > 0 or len(rows) == 1) and row[column] is not None]
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
    cli.say(f"{'gain, final':<18}" + "".join(f"{s[1] - t:+9.2f}" for s, t in zip(student, teacher, strict=True)))
