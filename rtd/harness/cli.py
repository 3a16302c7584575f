"""What the scripts' command lines share: flags that mean the same everywhere, and exit codes."""

import argparse
import math
import os
import re
import sys
from functools import partial
from pathlib import Path

from rtd.errors import Diverged, InputError
from rtd.harness import console, distributed, files, signals
from rtd.harness.datasets import DOWNLOADABLE, LABELLED, PROBED_ON, load_dataset
from rtd.harness.device import DEVICES, PRECISIONS, pick_device
from rtd.models import ENCODERS
from rtd.plots import FORMATS
from rtd.probes import PROBES


class Parser(argparse.ArgumentParser):
    """argparse with docstring, defaults and shared flags; a bad one is one sentence, exit code 2."""

    def __init__(self, doc):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=raw, allow_abbrev=False)
        # argparse takes -1 for a number but -1e-3 for a flag, and a crop around a teacher begins
        # with -0.001; nor is -/lb/fn/wn/l/-, a bottleneck, a flag
        self._negative_number_matcher = re.compile(r"(?i)^-((\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|/)")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def group(self, title):
        """A function add(flag, kind, default, help, ...) that adds flags to a new group.

        kind: bool for a switch, a collection of choices, or a function that parses one value; str
        is for PATH:NETWORK. Flags whose help begins with * take several values.
        """
        group = self.add_argument_group(title)

        def add(flag, kind, default, help, **more):
            if kind is bool:
                group.add_argument(flag, action="store_true", help=help)
                return
            if help.startswith("*"):
                self.epilog = "Flags marked * take several values, and each is run."
                more, default = more | {"nargs": "+"}, [default]
            if callable(kind):
                metavar = {Path: "DIR", str: "PATH:NETWORK"}.get(kind) or kind.metavar
                more = {"type": kind, "metavar": metavar} | more
            else:
                more |= {"choices": kind, "metavar": "NAME"}
                help += f" ({'any' if 'nargs' in more else 'one'} of {', '.join(kind)})"
            shown = default if isinstance(default, list) else [default]
            note = "" if shown == [None] else f" (default: {', '.join(map(str, shown))})"
            group.add_argument(flag, default=default, help=help + note, **more)

        return add

    # fmt: off
    def add_file_flags(self):
        """--test-subset, --image-size, --download; returns the group's add."""
        add = self.group("data")
        add("--test-subset", positive_int, None, "number of test images, class-balanced; all by default")
        add("--image-size", image_side, 32, "side in pixels to which images are resized")
        add("--download", bool, False, "fetch a published data set into --data-dir if it is not there")
        return add

    def add_training_flags(self):
        """--encoder, --batch-size, --lr, --seed of supervised training."""
        add = self.group("supervised training")
        add("--encoder", ENCODERS, None, "encoder of random starts; the checkpoints' own by default, else resnet18")
        add("--batch-size", positive_int, 256, "images per step; use smaller batches on small data sets")
        add("--lr", positive_float, 0.1, "first learning rate of SGD; use 0.01 for VGG, which has no batch norm")
        add("--seed", non_negative_int, 0, "seed of random encoders, fc, batch order and augmentation")

    def add_probe_flags(self):
        """--probe, --k, --probe-epochs."""
        add = self.group("probes")
        add("--probe", (*PROBES, "none"), list(PROBES), "classifiers that measure the features", nargs="+")
        add("--k", positive_int, 20, "neighbours of the k-NN probe")
        add("--probe-epochs", positive_int, 10, "epochs of the linear probe; raise it on small sets: below 500 steps it underfits")

    def add_device_flags(self):
        """--device, --precision, --deterministic."""
        add = self.group("device")
        add("--device", DEVICES, "auto", "processor; auto takes a GPU where there is one")
        add("--precision", PRECISIONS, "fp32", "number format of convolutions and matrix products: bf16 is twice as fast on hardware "
            "that has it and far slower elsewhere; tf32, on CUDA, rounds factors in training steps to 10-bit mantissas")
        add("--deterministic", bool, False, "bit-identical results on GPUs too; slower there")

    def add_output_flags(self, save_every=True):
        """--resume, --overwrite, --save-every, --no-plot, --plot-format."""
        add = self.group("output")
        add("--resume", bool, False, "continue the run in --out, or start it if there is none")
        add("--overwrite", bool, False, "delete what an earlier run left in --out")
        if save_every:
            add("--save-every", positive_int, None, "epochs between two saves; by default saving takes a tenth of the time at most")
        add("--no-plot", bool, False, "no picture")
        add("--plot-format", FORMATS, ["png"], "formats of the picture", nargs="+")
    # fmt: on

    def parse(self, argv, *distinct):
        """The flags, with --probe in a fixed order; ``distinct`` ones may not repeat a value."""
        args = self.parse_args(argv)
        if getattr(args, "resume", False) and args.overwrite:
            self.error("--resume and --overwrite exclude each other")
        for name in distinct:
            if len(set(getattr(args, name))) < len(getattr(args, name)):
                self.error(f"--{name.replace('_', '-')}: give each value once")
        if "probe" in args:
            if "none" in args.probe and len(args.probe) > 1:
                self.error("--probe: none goes without other probes")
            args.probe = [name for name in PROBES if name in args.probe]
        return args


def _number(kind, description, accept):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accept(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not {description}")
        return value

    parse.metavar = "N" if kind is int else "X"
    return parse


# fmt: off
def at_least(n):
    """A parser of whole numbers from n on."""
    return _number(int, f"a whole number of at least {n}, below 2^31", lambda x: n <= x < 2**31)


positive_int, non_negative_int = at_least(1), at_least(0)
finite_float = _number(float, "a number", math.isfinite)
positive_float = _number(float, "a number above 0", lambda x: 0 < x < math.inf)
non_negative_float = _number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
fraction = _number(float, "a number between 0 and 1", lambda x: 0 < x < 1)
unit_interval = _number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
image_side = _number(int, "a whole number of at least 32, up to 1024", lambda x: 32 <= x <= 1024)


def add_data_flags(add, default="digits", datasets=LABELLED, star=""):
    """--dataset, --data-dir, --subset; star: "* " where they take several values."""
    add("--dataset", datasets, default, f"{star}data set; digits needs no files, the others need --data-dir" + ("" if default else "; that of the checkpoints by default"))
    add("--data-dir", str, None, "folder that holds the data set, in torchvision's layout or as train/ and test/ trees", metavar="DIR")
    add("--subset", positive_int, None, f"{star}number of training images, class-balanced; all by default")


def add_init_flags(add):
    """--init and --epochs of supervised training."""
    add("--init", str, "random", "* starts: random (random:1, random:2 for more draws) or PATH:student, PATH:teacher, "
        "PATH:student-init of a checkpoint; compare student with student-init, the random start it was distilled from", metavar="START")
    add("--epochs", positive_int, 160, "epochs of the schedule; lr falls tenfold after 1/2 and after 3/4 of them")


# fmt: on


def note_steps(args, data, world, batch_size=256):
    """Say it where a linear probe of ``data`` takes few steps."""
    steps = math.ceil(len(data.train) / batch_size) * args.probe_epochs
    if "linear" in args.probe and steps < 500:
        world.say(
            f"note: {steps} steps (under 500) underfit the linear probe; raise --probe-epochs"
        )


def load_data(args, world, other=None, probed=None):
    """The data set that --dataset and the flags of ``add_file_flags`` ask for.

    other: the name of one that is read with the same flags. probed: see ``load_dataset``.
    """
    if args.download and not {args.dataset, other} & set(DOWNLOADABLE):
        raise InputError(f"--download: {args.dataset} has no download")
    subsets = args.subset, None if probed else args.test_subset
    where = args.dataset, args.data_dir, args.download, *subsets, args.image_size, probed
    load = partial(load_dataset, *where, say=world.say)
    data = world.in_main(load) or load()  # the others find what the main one downloads and caches
    if "knn" in getattr(args, "probe", ()) and args.k > (n := len((probed or data).train)):
        raise InputError(f"--k {args.k}: there are {n} training images; choose 1 to {n}")
    return data


def load_sources(args, world):
    """(what run_distill.py's student is distilled on, what the probes judge on): often the same."""
    other, probed = args.probe_dataset or PROBED_ON.get(args.dataset), None
    if other:
        flags = vars(args) | {"dataset": other, "subset": args.probe_subset}
        try:
            probed = load_data(argparse.Namespace(**flags), world, args.dataset)
        except InputError as error:  # which names --subset or --dataset
            error.args = (re.sub("--(subset|dataset)", r"--probe-\1", f"{error}"),)
            raise
    elif args.probe_subset:
        raise InputError(f"--probe-subset {args.probe_subset}: give --probe-dataset, or --subset")
    data = load_data(args, world, other, probed)
    if args.beta and (data.train.labels.min() < 0 or args.out_dim < data.num_classes):
        raise InputError(
            f"--beta needs labels, and --out-dim at least {data.num_classes} for {data.name}"
        )
    return data, probed or data


def run(main, args):
    """Call main(args, device, world); what ends it early becomes a sentence and an exit code.

    2: bad input, a file that cannot be written, or too little memory; 1: the loss is not finite;
    130: Ctrl-C; 143: SIGTERM. All results up to the last save stand in any case.
    """
    console.prepare()
    received, world = [], None
    try:
        with signals.raising(received):
            check_torchvision()
            torchrun = map(os.environ.get, ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
            device = pick_device(args.device, args.deterministic, *torchrun)
            with distributed.process_group(device) as world:
                main(args, device, world)
    except BaseException as error:
        code, text = 2, files.one_line(error)
        if received:  # torch may turn what a signal raises into another error
            code, message = 128 + received[0], "stopped"
            lost = error if isinstance(error, OSError) else error.__context__
            if getattr(lost, "filename", None):  # of a save that failed meanwhile
                message += f" without saving {lost.filename}: {lost.strerror or lost}"
            if "resume" in args:
                instead = " instead of --overwrite" if args.overwrite else ""
                message += f"; the same command with --resume{instead} goes on"
        elif isinstance(error, (InputError, Diverged)):
            code, message = 1 if isinstance(error, Diverged) else 2, error
        elif re.search("MemoryError|out of memory|DefaultCPUAll|Storage size", repr(error)):
            text = " ".join(f"{error}".split())[:200]
            message = f"the memory does not hold it; give smaller sizes, batches, subsets ({text})"
        elif isinstance(error, ImportError):
            message = f"{text}; pip install -e '.[full]' installs all that is optional"
        elif isinstance(error, OSError):
            message = f"{error.filename or 'a file'}: {error.strerror or error}"
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            message = f"--compile: torch.compile does not work here; leave it out ({text})"
        else:
            raise
        everywhere = getattr(error, "everywhere", world is None)
        if int(os.environ.get("RANK", 0)) == 0 or not everywhere:
            console.say(f"{os.path.basename(sys.argv[0])}: error: {message}", to="stderr")
        sys.exit(code)


def check_torchvision():
    """Raise InputError where torchvision is missing, or was built for another torch."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # its operators then fail in one way or another
        raise InputError(
            f"torchvision does not work with the installed torch ({files.one_line(error)}); "
            "pip install --upgrade torch torchvision installs two that do"
        ) from error
