"""CSV logs and run folders: one flushed row at a time, never a second header, cut back to the checkpoint on resume."""

import csv
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from rtd.errors import InputError
from rtd.files import atomic_write


def format_value(value):
    """A CSV cell: 9 significant digits (a float32 exactly) for floats, nothing for None."""
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


class CsvLog:
    """A CSV file with fixed columns, written row by row."""

    def __init__(self, path, fields):
        self.path, self.fields = Path(path), tuple(fields)

    def start(self, rows=()):
        """Write the header and ``rows`` (dicts), replacing what is there."""
        with atomic_write(self.path, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.fields)
            writer.writerows([format_value(row[field]) for field in self.fields] for row in rows)

    def append(self, row):
        """Add one row (a dict with exactly the columns), on the disk when this returns."""
        if set(row) != set(self.fields):
            raise ValueError(f"row does not have the columns of {self.path}: {sorted(set(row) ^ set(self.fields))}")
        try:
            with open(self.path, "a") as file:
                csv.writer(file, lineterminator="\n").writerow([format_value(row[field]) for field in self.fields])
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise

    def cut(self, last, column="epoch", text=()):
        """Keep the rows up to the epoch ``last``, or whatever ``column`` counts; InputError unless those are 0 to ``last``,
        and all but the columns ``text`` hold numbers, or nothing."""
        rows = read_csv(self.path, self.fields)
        if odd := [name for row in rows for name in self.fields if name not in text and isinstance(row[name], str)]:
            raise InputError(f"{self.path} holds text where numbers belong (column {odd[0]}); was it edited?")
        kept = [row for row in rows if not isinstance(row[column], int) or row[column] <= last]
        if [row[column] for row in kept] != list(range(last + 1)):
            raise InputError(f"{self.path} does not hold one row for each {column} from 0 to {last}, as the checkpoint asks")
        self.start(kept)


def read_csv(path, fields=None):
    """The rows of a CSV log as dicts: whole numbers as int, other numbers as float, empty cells as None, else text.

    Raises InputError if the file is missing, or its columns are not ``fields``, or a complete row does not fit the
    header. A last line that was cut off in the middle of being written is left out.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a CSV log ({error})") from error
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not lines or (fields is not None and lines[0] != list(fields)):
        raise InputError(f"{path} does not start with the expected columns {','.join(fields or [])}")
    if any(len(line) != len(lines[0]) for line in lines):
        raise InputError(f"{path} has a row whose number of cells is not that of its header")
    return [dict(zip(lines[0], map(_parse, line), strict=True)) for line in lines[1:]]


def concatenate(path, fields, parts):
    """Write to ``path`` the rows of those of the CSV logs ``parts`` that exist yet, in their order; returns them."""
    rows = [row for part in parts if Path(part).exists() for row in read_csv(part, fields)]
    CsvLog(path, fields).start(rows)
    return rows


def _parse(cell):
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None


def mean_and_std(values):
    """Mean and sample standard deviation (n - 1); the latter is None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def flags(args):
    """The flags as plain types, by name; paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in sorted(vars(args).items())}


def provenance(args, device):
    """What a reader needs to make a run again: flags, command, versions, commit, device, start time; plain types only."""
    packages = ("torch", "torchvision", "numpy", "scikit-learn")
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "flags": flags(args),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "commit": commit,
        "device": str(device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_json(path, value):
    """``value`` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path):
    """The value in a JSON file; None if there is no such file or it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
