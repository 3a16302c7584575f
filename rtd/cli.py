"""What the scripts' command lines share: flags that mean the same everywhere, and errors a person can act on."""

import argparse
import math
import os
import re
import sys
from pathlib import Path

import torch

from rtd import distributed, plots, stopping
from rtd.datasets import DOWNLOADABLE, LABELLED, PROBED_ON, load_dataset
from rtd.device import DEVICES, PRECISIONS
from rtd.errors import Diverged, InputError
from rtd.models import ENCODERS
from rtd.probes import PROBES


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults and the script's docstring, and reports a bad flag in one sentence with exit code 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)
        # argparse takes -1 for a number but -1e-3 for a flag, and -0.001 is what a crop around a teacher begins with;
        # nor is -/lb/fn/wn/l/-, a bottleneck, a flag
        self._negative_number_matcher = re.compile(r"^-((\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|/)", re.IGNORECASE)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        default = action.default[0] if isinstance(action.default, list) and len(action.default) == 1 else action.default
        if default is None or default is False:  # "no" needs no mention
            return action.help
        return super()._get_help_string(action).replace("%(default)s", str(default))


def _number(kind, description, accept):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accept(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not {description}")
        return value

    return parse


positive_int = _number(int, "a whole number of at least 1, below 2^31", lambda x: 1 <= x < 2**31)
non_negative_int = _number(int, "a whole number of at least 0, below 2^31", lambda x: 0 <= x < 2**31)
positive_float = _number(float, "a number above 0", lambda x: 0 < x < math.inf)
non_negative_float = _number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
unit_interval = _number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
image_side = _number(int, "a whole number of at least 32, up to 1024", lambda x: 32 <= x <= 1024)


def add_data_flags(parser):
    """--dataset, --subset and those of ``add_file_flags``."""
    group = add_file_flags(parser)
    group.add_argument("--dataset", choices=LABELLED, default="digits", help="digits needs no files; the others need --data-dir")
    group.add_argument("--subset", type=positive_int, metavar="N", help="use N training images, class-balanced; all by default")


def add_file_flags(parser):
    """--data-dir, --download, --test-subset, --image-size; returns the group."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="folder in torchvision's layout, or of train/ and test/ trees")
    group.add_argument("--download", action="store_true", help="fetch a published set into --data-dir if it is not there")
    group.add_argument("--test-subset", type=positive_int, metavar="N", help="use N test images, class-balanced; all by default")
    group.add_argument(
        "--image-size", type=image_side, default=32, metavar="PIXELS", help="side that images are resized to, once"
    )
    return group


def load_data(args):
    """The data set that the flags of ``add_data_flags`` ask for."""
    _check_download(args, args.dataset)
    with distributed.main_first():
        return load_dataset(args.dataset, args.data_dir, args.download, args.subset, args.test_subset, args.image_size)


def _check_download(args, *names):
    if args.download and not set(names) & set(DOWNLOADABLE):
        raise InputError(f"--download: {names[0]} has no download")


def load_sources(args):
    """(what run_distill.py's student is distilled on, what the probes judge on): often the same."""
    files = args.data_dir, args.download
    other = args.probe_dataset or PROBED_ON.get(args.dataset)
    _check_download(args, args.dataset, other)
    if args.probe_subset and not other:
        raise InputError(f"--probe-subset {args.probe_subset}: goes with --probe-dataset; without, --subset decides for both")
    with distributed.main_first():
        probed = other and load_dataset(other, *files, args.probe_subset, args.test_subset, args.image_size)
        data = load_dataset(args.dataset, *files, args.subset, None if probed else args.test_subset, args.image_size, probed)
    if args.beta and (data.train.labels.min() < 0 or args.out_dim < data.num_classes):
        raise InputError(
            f"--beta {args.beta}: needs labels, which {data.name} may lack, and an --out-dim of at least their number"
        )
    return data, probed or data


def add_device_flags(parser):
    """--device, --precision, --deterministic."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU where there is one")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="bf16 runs convolutions and matrix products in bfloat16: twice as fast on hardware that has it, else far slower; "
        "tf32, on CUDA, rounds the factors of products in training steps to 10 bits",
    )
    group.add_argument("--deterministic", action="store_true", help="the same bits on every run on a GPU too; slower there")


def add_training_flags(parser):
    """--init, --encoder, --epochs, --batch-size, --lr, --seed: of supervised training, ``rtd.train``."""
    group = parser.add_argument_group("supervised training")
    group.add_argument(
        "--init",
        nargs="+",
        default=["random"],
        metavar="START",
        help="random (random:1, random:2 for more draws) or PATH:student, PATH:teacher, PATH:student-init; compare student "
        "with student-init, the random start it was distilled from",
    )
    group.add_argument("--encoder", choices=ENCODERS, help="of random starts; by default the checkpoints' own, else resnet18")
    group.add_argument(
        "--epochs", type=positive_int, default=160, help="of the schedule: lr falls tenfold after a half and after three quarters"
    )
    group.add_argument("--batch-size", type=positive_int, default=256, help="images a step; smaller sets want smaller batches")
    group.add_argument("--lr", type=positive_float, default=0.1, help="of SGD, at first; VGG, without batch norm, wants 0.01")
    group.add_argument("--seed", type=non_negative_int, default=0, help="of random encoders, fc, batch order and augmentation")


def add_output_flags(parser, folder=None):
    """--out, --resume, --overwrite, --save-every, --no-plot; ``folder`` is the default of --out, None run_distill.py's."""
    by_default = "" if folder else "; by default runs/distill-<dataset>-<encoder>"
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, default=folder and Path(folder), help=f"run folder{by_default}")
    group.add_argument("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    group.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in --out")
    group.add_argument(
        "--save-every",
        type=positive_int,
        default=1,
        metavar="EPOCHS",
        help="how often to save what --resume needs; more where an epoch takes seconds",
    )
    group.add_argument("--no-plot", action="store_true", help="do not draw the figure")


def add_probe_flags(parser):
    """--probe, --k, --probe-epochs, --standardize."""
    group = parser.add_argument_group("probes")
    group.add_argument("--probe", nargs="+", choices=(*PROBES, "none"), default=list(PROBES), help="how to judge features")
    group.add_argument("--k", type=positive_int, default=20, help="neighbours of the k-NN probe; the paper's 20")
    group.add_argument(
        "--probe-epochs",
        type=positive_int,
        default=10,
        help="epochs of the linear probe; the paper's 10 are 1,960 steps on CIFAR-10, a small set needs more to tell anything",
    )
    group.add_argument("--standardize", action="store_true", help="standardise features before probing; the paper does not")


def chosen_probes(parser, names):
    """The probes that --probe asks for, as a list in a fixed order; [] for none."""
    if "none" in names and len(names) > 1:
        parser.error("--probe: none goes without other probes")
    return [name for name in PROBES if name in names]


def check_output_flags(parser, args):
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")


def check_distinct(parser, flag, values):
    """Refuse a list flag that names something twice."""
    if len(set(values)) < len(values):
        parser.error(f"{flag}: give each value once")


def check_k(args, data):
    """Refuse, before anything is computed, a --k larger than the training split."""
    if "knn" in args.probe and args.k > len(data.train):
        raise InputError(f"--k {args.k}: there are {len(data.train)} training images; choose 1 to {len(data.train)}")


def say(*words):
    """print, in the main process only, at once."""
    if distributed.is_main():
        print(*words, flush=True)


def draw(args, plot, path, *arguments):
    """plot(path, *arguments), unless --no-plot; without matplotlib say so."""
    if args.no_plot:
        return
    if not plots.available():
        say(f"{path.name} is not drawn: matplotlib is missing (pip install -e '.[full]')")
        return
    plot(path, *arguments)
    say(f"figure: {path}")


def _reason(error):
    """What a person can do about an error of torch's; None if it is none of those that a flag or the machine brings about."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text:
        return f"the memory does not hold it; give smaller sizes, batches or subsets ({text[:200]})"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile: torch.compile does not work here, where it may lack a compiler; leave it out ({text[:200]})"
    return None


def run(main, args):
    """Call main(args); turn bad input, a diverged loss, a failing write and signals into one sentence and an exit code.

    2: bad input, a file that cannot be written, or too little memory; 1: the loss is not finite; 130: Ctrl-C; 143: SIGTERM
    (``rtd.stopping``). All results up to the last checkpoint stand in any case.
    """
    script = os.path.basename(sys.argv[0])
    try:
        with stopping.on_signals():
            main(args)
    except InputError as error:
        code, message = 2, error
    except Diverged as error:
        code, message = 1, error
    except OSError as error:
        code, message = 2, f"{error.filename or 'a file'}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        code, message = 2, _reason(error)
        if message is None:
            raise
    except stopping.Stopped as stop:
        code, message = 128 + stop.number, "stopped; --resume continues from the last checkpoint"
    else:
        return
    if distributed.is_main():
        print(f"{script}: error: {message}", file=sys.stderr)
    sys.exit(code)


def probe_options(args):
    """The arguments of ``rtd.probes.probe`` that the flags decide."""
    options = {"probes": args.probe, "k": args.k, "epochs": args.probe_epochs, "standardized": args.standardize}
    return options | {"seed": args.seed}
