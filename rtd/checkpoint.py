"""Checkpoints: plain dicts of tensors and plain types, written atomically, read with ``weights_only=True`` and checked.

On command lines a network in one is PATH:teacher, PATH:student or PATH:student-init (``load_spec``). A distillation
checkpoint holds:

    format          "rtd-checkpoint-3"
    model           arguments of ``rtd.models.build_network``
    teacher, student, student_init      state dicts of the ``Network``
    data            {"name", "mean", "std"}: what it was distilled on, and the normalisation that belongs to the weights
    epoch, step     how far training went
    config          flags, versions, command: ``rtd.logs.provenance``
    progress        only in checkpoint.pt, for --resume: optimizer, results so far, of an unfinished epoch too
"""

import hashlib
import sys

import torch

from rtd import stopping
from rtd.errors import InputError
from rtd.files import atomic_write
from rtd.models import ENCODERS, build_network, materialize

FORMAT = "rtd-checkpoint-3"
SUPERVISED = "rtd-supervised-2"  # a network that run_lmc.py trains
NETWORKS = ("teacher", "student", "student-init")
KEYS = {"format", "model", "teacher", "student", "student_init", "data", "epoch", "step", "config"}


def save_state(path, state, format):
    """Write the dict ``state`` to ``path``, marked as ``format``: whole or not at all."""
    handled = sys.exc_info()[1]  # a checkpoint may be written because something else happened
    with stopping.finishing(), atomic_write(path) as file:  # a file object: of a path, torch would store the temporary's name
        try:
            torch.save({"format": format, **state}, file)
        except RuntimeError as error:  # torch closes what it was writing, which fails too and hides why: a full disk, say
            why = error.__context__
            raise error if why is None or why is handled else why from None


def load_state(path, format, keys, of, mmap=True):
    """The dict at ``path``, on the CPU (``mmap``: tensors read on demand).

    Raises InputError unless it bears the mark ``format`` and has ``keys``; ``of`` says in the error whose file it should be.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; it should be of {of}") from error
    except Exception as error:  # a damaged file can make the unpickler fail in any way
        raise InputError(f"{path} is damaged or not a checkpoint of {of} ({_one_line(error)[:120]})") from error
    mark = state.get("format") if isinstance(state, dict) else None
    if isinstance(mark, str) and mark != format and mark.rpartition("-")[0] == format.rpartition("-")[0]:
        by = "an older" if mark < format else "a newer"
        raise InputError(f"{path} was made by {by} version of rtd ({mark}; here it is {format}): use that one, or make it again")
    if mark != format or not set(state) >= set(keys):
        raise InputError(f"{path} is not a checkpoint of {of} (it lacks the format mark {format} or some of its parts)")
    return state


def save_checkpoint(path, checkpoint):
    """Write the distillation checkpoint ``checkpoint`` (a dict with the keys above) to ``path``."""
    save_state(path, checkpoint, FORMAT)


def load_checkpoint(path, mmap=True):
    """The distillation checkpoint at ``path``; InputError unless all that is in it fits together and is finite."""
    checkpoint = load_state(path, FORMAT, KEYS, "run_distill.py (checkpoint.pt or best.pt)", mmap)
    model, data = checkpoint["model"], checkpoint["data"]
    if not isinstance(model, dict) or model.get("encoder") not in ENCODERS:
        raise InputError(f"{path} holds an unknown encoder; known are {', '.join(ENCODERS)}")
    try:
        expected = build_network(**model).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its model settings do not fit together ({_one_line(error)})") from error
    for which in NETWORKS:
        check_state(path, which, checkpoint[which.replace("-", "_")], expected)
    check_normalization(path, data)
    return checkpoint


def load_supervised(path):
    """The state that run_lmc.py saved of a training run at ``path``: a dict with training, model, data and config.

    model: arguments of ``rtd.models.build_encoder``. training: ``rtd.train.Trainer.state``, which is not checked.
    """
    state = load_state(path, SUPERVISED, {"training", "model", "data", "config"}, "run_lmc.py (runs/*.pt)", mmap=False)
    if not all(isinstance(state[name], dict) for name in ("training", "model")):
        raise InputError(f"{path} is not a checkpoint of run_lmc.py (runs/*.pt): its parts are not dicts")
    check_normalization(path, state["data"])
    return state


def check_normalization(path, data):
    """Raise InputError unless ``data``, of the file ``path``, holds a mean and a deviation for each channel."""
    try:
        constants = torch.tensor([data["mean"], data["std"]], dtype=torch.float64)
        sound = constants.shape == (2, 3) and bool(constants.isfinite().all()) and bool((constants[1] > 0).all())
    except (KeyError, TypeError, ValueError, RuntimeError):
        sound = False
    if not sound:
        raise InputError(f"{path}: its normalisation is not a mean and a deviation above 0 for each of three channels")


def check_state(path, which, state, expected):
    """Raise InputError unless the state dict ``state`` has the keys, shapes and dtypes of ``expected`` and is finite."""
    wrong = "it is not a dict of tensors"
    if isinstance(state, dict):
        wrong = ", ".join(sorted(map(str, state.keys() ^ expected.keys()))[:3])
        wrong = wrong and f"missing or unknown: {wrong}"
        for name in () if wrong else expected:
            value, like = state[name], expected[name]
            if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
                wrong = f"{name} is not a tensor of shape {list(like.shape)} and {like.dtype}"
            elif not value.isfinite().all():
                raise InputError(f"{path}: the weights of '{which}' are not finite ({name})")
    if wrong:
        raise InputError(f"{path}: the weights of '{which}' do not fit its architecture ({wrong})")


def check_image_size(what, model, data):
    """Refuse the network ``what``, built with the arguments ``model``, for images of another size than those of ``data``."""
    size, wanted = data.train.images.shape[-1], model.get("image_size", 32)
    if size != wanted:
        raise InputError(f"{what}: it takes images of {wanted}x{wanted}; give --image-size {wanted}, not {size}")


def _one_line(error):
    return " ".join(str(error).split())[:200]


def load_spec(flag, spec, others=()):
    """("PATH:NETWORK" as given to ``flag``) -> (checkpoint, NETWORK); NETWORK is one of ``NETWORKS``.

    others: further ones that ``flag`` takes, for the error's sentence.
    """
    path, colon, which = spec.rpartition(":")
    if not colon or which not in NETWORKS:
        raise InputError(f"{flag} {spec}: give PATH:NETWORK, where NETWORK is one of {', '.join((*NETWORKS, *others))}")
    return load_checkpoint(path), which


def load_network(checkpoint, which, device="cpu"):
    """The ``Network`` called ``which`` ("teacher", "student" or "student-init") of a loaded checkpoint, in eval mode."""
    network = materialize(build_network(**checkpoint["model"]), device)
    network.load_state_dict(checkpoint[which.replace("-", "_")])
    return network.eval()


def sha256(path):
    """Hex digest of a file, to say which checkpoint a number came from."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
