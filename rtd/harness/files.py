"""Files are written whole or not at all; a damaged one raises an InputError of one sentence.

A *state file* (.pt) holds what a run resumes from, or a network: tensors and plain types, a format
mark and the identity of the run that wrote it. A *table* (.csv) is output.
"""

import contextlib
import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch

from rtd.errors import InputError
from rtd.harness.device import describe
from rtd.harness.signals import deferred

VERSION = 5  # of state files
KINDS = {  # of state files, and who writes them
    "checkpoint": "run_distill.py (checkpoint.pt or best.pt)",
    "supervised": "run_lmc.py (runs/*.pt)",
    "state": "a run, for --resume",
}
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """A file whose content stands at ``path`` after the block, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else TEXT)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the name, lest a crash leave an empty file under it
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write, as to a full disk, fails without saying where
        raise


@contextlib.contextmanager
def reading(path, expected="what it should be"):
    """Within the block, in which ``path`` is read, all that goes wrong becomes one InputError.

    Too little memory does not.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make its reader fail in any way
        raise InputError(f"{path} is damaged or not {expected} ({one_line(error)})") from error


def one_line(error):
    """The first sentence of an error's message, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0][:160]


def save_state(path, kind, contents):
    """Write a dict of tensors and plain types as a state file of ``kind``; signals wait for it."""
    state = {"format": f"rtd-{kind}-{VERSION}", **contents}
    # a file, as torch would store the name of a path, the temporary's
    with deferred(), atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch closes its file, which fails too and hides why
            raise (error.__context__ or error) from None


def load_state(path, kind, mmap=True):
    """The contents of a state file of ``kind``, on the CPU.

    mmap: tensors are read from the disk when they are used. Raises InputError for a file that is
    missing, damaged, or of another kind or version.
    """
    expected = f"a state file of {KINDS[kind]}"
    with reading(path, expected), zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # which compares the checksums that torch.save wrote
            raise ValueError(f"{damaged} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if state.get("format") != f"rtd-{kind}-{VERSION}":
            raise InputError(f"{path} is not {expected}, or another version of rtd made it")
    return state


def write_csv(path, columns, rows):
    """The table ``rows`` (dicts with at least ``columns``) as a CSV file, whole or not at all.

    Floats get 9 significant digits, which say a float32 exactly; None is an empty cell.
    """
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = (row[column] for column in columns)
            writer.writerow(f"{v:.9g}" if isinstance(v, float) else v for v in values)


def read_csv(path, columns=None):
    """A table's rows of int, float, str and None; InputError if damaged or without ``columns``."""
    with reading(path, "a CSV table"), open(path, **TEXT) as file:
        header, *lines = csv.reader(file, strict=True)
        if columns and header != list(columns):
            raise InputError(f"{path} does not have the columns {','.join(columns)}")
        return [dict(zip(header, map(_parse, line), strict=True)) for line in lines]


def _parse(cell):
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return cell or None


def read_json(path):
    """The value in a JSON file; InputError if it is missing or damaged."""
    with reading(path, "a JSON file"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path):
    """Hex digest of a file, to say which checkpoint a number came from."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def provenance(args, device):
    """What makes a run again, in JSON's types: flags, command, versions, commit, device, time."""
    git, commit = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.check_output(
            git, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "scikit-learn"):
        versions[package] = importlib.metadata.version(package)
    return {
        "flags": json.loads(json.dumps(vars(args), sort_keys=True, default=str)),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions,
        "commit": commit,
        "device": describe(device, args.precision),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
