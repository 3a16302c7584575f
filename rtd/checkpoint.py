"""Checkpoints: plain dicts of tensors and plain types, written atomically, read with ``weights_only=True`` and checked.

On command lines a network in one is PATH:teacher, PATH:student or PATH:student-init (``load_spec``). A distillation
checkpoint holds:

    format          "rtd-checkpoint-1"
    model           arguments of ``rtd.models.build_network``
    teacher, student, student_init      state dicts of the ``Network``
    data            {"name", "mean", "std"}: what it was distilled on, and the normalisation that belongs to the weights
    epoch, step     how far training went
    config          flags, versions, command: ``rtd.logs.provenance``
    progress        only in checkpoint.pt, for --resume: optimizer, generators, results so far
"""

import hashlib
import pickle
import zipfile

import torch

from rtd.errors import InputError
from rtd.files import atomic_write
from rtd.models import ENCODERS, build_network, materialize

FORMAT = "rtd-checkpoint-1"
NETWORKS = ("teacher", "student", "student-init")
KEYS = {"format", "model", "teacher", "student", "student_init", "data", "epoch", "step", "config"}


def save_state(path, state, format):
    """Write the dict ``state`` to ``path``, marked as ``format``: whole or not at all."""
    with atomic_write(path) as file:  # a file object, not a path: torch would store the temporary's name
        torch.save({"format": format, **state}, file)


def load_state(path, format, keys, of, mmap=True):
    """The dict at ``path``, on the CPU (``mmap``: tensors read on demand).

    Raises InputError unless it bears the mark ``format`` and has ``keys``; ``of`` says in the error whose file it should be.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; it should be of {of}") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is damaged or not a checkpoint of {of} ({reason[:120]})") from error
    if not isinstance(state, dict) or state.get("format") != format or not set(state) >= set(keys):
        raise InputError(f"{path} is not a checkpoint of {of} (it lacks the format mark {format} or some of its parts)")
    return state


def save_checkpoint(path, checkpoint):
    """Write the distillation checkpoint ``checkpoint`` (a dict with the keys above) to ``path``."""
    save_state(path, checkpoint, FORMAT)


def load_checkpoint(path, mmap=True):
    """The distillation checkpoint at ``path``; InputError unless it is one and its encoder is known."""
    checkpoint = load_state(path, FORMAT, KEYS, "run_distill.py (checkpoint.pt or best.pt)", mmap)
    if not isinstance(checkpoint["model"], dict) or checkpoint["model"].get("encoder") not in ENCODERS:
        raise InputError(f"{path} holds an unknown encoder; known are {', '.join(ENCODERS)}")
    return checkpoint


def load_spec(flag, spec):
    """("PATH:NETWORK" as given to ``flag``) -> (checkpoint, NETWORK); NETWORK is one of ``NETWORKS``."""
    path, colon, which = spec.rpartition(":")
    if not colon or which not in NETWORKS:
        raise InputError(f"{flag} {spec}: give PATH:NETWORK, where NETWORK is one of {', '.join(NETWORKS)}")
    return load_checkpoint(path), which


def load_network(checkpoint, which, device="cpu", path="checkpoint"):
    """The ``Network`` called ``which`` ("teacher", "student" or "student-init") of a loaded checkpoint, in eval mode."""
    if which not in NETWORKS:
        raise InputError(f"{path} has no network '{which}': choose one of {', '.join(NETWORKS)}")
    try:
        network = materialize(build_network(**checkpoint["model"]), device)
        network.load_state_dict(checkpoint[which.replace("-", "_")])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: the weights of '{which}' do not fit its architecture ({reason[:200]})") from error
    return network.eval()


def sha256(path):
    """Hex digest of a file, to say which checkpoint a number came from."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
