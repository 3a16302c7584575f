"""run_distill.py and run_lmc.py save networks in state files; a flag names one as PATH:NETWORK.

A checkpoint of run_distill.py (checkpoint.pt, best.pt) holds

    model           arguments of ``rtd.models.build_network``
    teacher, student, student_init      state dicts of the ``Network``
    data            {"name", "mean", "std"}: what it was distilled on, and its normalisation
    epoch, step     how far training went
    config          flags, versions, command: ``rtd.harness.files.provenance``
    progress        in checkpoint.pt alone, for --resume
"""

import re
from typing import NamedTuple

from rtd.errors import InputError
from rtd.harness import files
from rtd.init import init_encoder_, random_stream
from rtd.models import build_encoder, build_network, materialize

ROLES = ("teacher", "student", "student-init")
SUPERVISED = "supervised"  # the kind of state file, and the network in it, that run_lmc.py saves


def load_checkpoint(path):
    """The distillation checkpoint at ``path``, a dict; InputError if it is none or damaged."""
    return files.load_state(path, "checkpoint")


def load_network(checkpoint, which="student", device="cpu"):
    """The network ``which``, one of ``ROLES``, of a checkpoint (a path or a dict), in eval mode."""
    if which not in ROLES:
        raise InputError(f"'{which}' is no network of a checkpoint: give one of {', '.join(ROLES)}")
    if not isinstance(checkpoint, dict):
        checkpoint = load_checkpoint(checkpoint)
    network = materialize(build_network(**checkpoint["model"]))
    network.load_state_dict(checkpoint[which.replace("-", "_")])
    return network.to(device).eval()


def path_of(spec):
    """The path in PATH:NETWORK."""
    return spec.rpartition(":")[0]


def load_spec(flag, spec, others=""):
    """PATH:NETWORK, given to ``flag`` -> (checkpoint, NETWORK); others: what else may be given."""
    path, _, which = spec.rpartition(":")
    if not path or which not in ROLES:
        known = ", ".join(ROLES)
        raise InputError(f"{flag} {spec}: give PATH:NETWORK, NETWORK one of {known}{others}")
    return load_checkpoint(path), which


def check_model(what, model, wanted):
    """Refuse a network ``what`` that was built with other arguments than those ``wanted``."""
    odd = []
    for name, value in model.items():
        if wanted.get(name, value) != value:
            flag = "--" + name.replace("hidden_dim", "head_hidden").replace("_", "-")
            odd.append(f"no {flag}" if value is None else f"{flag} {value}")
    if odd:
        raise InputError(f"{what} was built with {', '.join(odd)}; flags and networks must agree")


def read_teacher(spec, model):
    """(state dict, normalisation of its images) of the network that --teacher ``spec`` names.

    spec: PATH:NETWORK of a distillation, or PATH:supervised, an encoder that run_lmc.py trained
    with labels. Raises InputError for one that differs from ``model``.
    """
    if spec.endswith(f":{SUPERVISED}"):
        contents = files.load_state(path_of(spec), SUPERVISED)
        state = contents["training"]["classifier"]
    else:
        contents, which = load_spec("--teacher", spec, f" or {SUPERVISED}")
        state = contents[which.replace("-", "_")]
    check_model(f"--teacher {spec}", contents["model"], model)
    return state, contents["data"]


class Start(NamedTuple):
    """Where supervised training starts: an encoder and its images' normalisation.

    name: init0, init1 ... spec: of --init. kind: random (also random:1 ...), student and the like.
    architecture: arguments of ``rtd.models.build_encoder``. source: {"mean", "std"}.
    """

    name: str
    spec: str
    kind: str
    architecture: dict
    state: dict
    source: dict


def load_starts(args, data):
    """[``Start``] of what --init gives: "random", "random:1" and further draws, or PATH:NETWORK.

    --encoder None is the checkpoints' own, or resnet18 without any. All are of one architecture.
    Random encoders are normalised for ``data``, others as they were.
    """
    others = ", or random, random:1 ..."
    loaded = {
        spec: load_spec("--init", spec, others)
        for spec in args.init
        if not re.fullmatch(r"random(:[1-9]\d*)?", spec)
    }
    default = {"encoder": "resnet18", "norm": None}
    first = next((contents["model"] for contents, _ in loaded.values()), default)
    wanted = {"encoder": args.encoder or first["encoder"], "norm": first["norm"]}
    wanted["image_size"] = args.image_size
    starts = []
    for i, spec in enumerate(args.init):
        if spec in loaded:
            contents, which = loaded[spec]
            check_model(f"--init {spec}", contents["model"], wanted)
            encoder, source = load_network(contents, which).encoder, contents["data"]
        else:
            encoder = materialize(build_encoder(**wanted))
            draw = spec.partition(":")[2] or 0
            init_encoder_(encoder, random_stream(args.seed, "encoder-init", draw))
            which, source = spec, data.source
        starts.append(Start(f"init{i}", spec, which, wanted, encoder.state_dict(), source))
    return starts


def say_starts(run, starts, data):
    """Say what is trained from where; returns a picture's title."""
    encoder = starts[0].architecture["encoder"]
    run.say(f"{encoder} on {data}; {run.config['device']}")
    for start in starts:
        run.say(f"{start.name}: {start.spec}")
    return f"{encoder} on {data.name}, seed {run.args.seed}"
