"""Probe the networks of checkpoints of run_distill.py (section 3, App. C.1; Tables 1 to 4).

Linear and k-NN probes of teacher, student, student-init (the student before training) and of the
pixels themselves, on any data set. Images are normalised with the constants of the data set that
the student was distilled on, also where another one is probed (transfer, Tables 2 and 4).

    python run_probe.py runs/distill-digits-vgg11/checkpoint.pt
    python run_probe.py runs/a/best.pt runs/b/best.pt --dataset cifar10 --data-dir data
    torchrun --nproc-per-node=4 run_probe.py ...          # the processes share the images

Prints a table, mean +- standard deviation over the checkpoints. The CSV file --out gets a
row for each network: accuracies in percent, the checkpoint's epoch and SHA-256, the settings.
"""

from pathlib import Path

from rtd.errors import InputError
from rtd.harness import cli, files
from rtd.harness.checkpoint import ROLES, check_model, load_checkpoint, load_network
from rtd.harness.run import check_output, lock
from rtd.harness.sweeps import plus_minus
from rtd.harness.training import probe_encoder
from rtd.probes import PROBES

PROBED = (*ROLES, "input")
COLUMNS = ("checkpoint", "sha256", "epoch", "trained_on", "probed_on", "network", *PROBES)
COLUMNS += ("train_images", "test_images", "k", "probe_epochs", "seed", "precision")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    # fmt: off
    add = parser.group("start with these")
    add("checkpoints", str, None, "checkpoint.pt or best.pt of runs of run_distill.py", nargs="+", metavar="CHECKPOINT")
    cli.add_data_flags(add)
    add("--out", Path, None, "CSV file; probe-<dataset>.csv beside the first checkpoint by default", metavar="FILE")
    add("--overwrite", bool, False, "replace the CSV file if there is one")
    parser.add_file_flags()
    parser.add_probe_flags()
    add = parser.group("networks")
    add("--network", PROBED, list(PROBED), "networks to probe; input is the pixels", nargs="+")
    add("--seed", cli.non_negative_int, 0, "seed of the linear probes")
    parser.add_device_flags()
    # fmt: on
    args = parser.parse(argv)
    if not args.probe:
        parser.error("--probe none leaves nothing to do")
    name = f"probe-{args.dataset}"
    if args.dataset == "folder" and args.data_dir:  # two folders are two data sets
        name += f"-{Path(args.data_dir).resolve().name}"
    args.out = args.out or Path(args.checkpoints[0]).parent / f"{name}.csv"
    return args


def main(args, device, world):
    # all, before anything is computed
    loaded = [(path, load_checkpoint(path)) for path in args.checkpoints]
    for path, contents in loaded:
        check_model(path, contents["model"], vars(args))  # --image-size must be the model's
    args.lock = world.in_main(lambda: lock_table(args))  # it is held as long as this lives
    data = cli.load_data(args, world)
    cli.note_steps(args, data, world)
    data, rows, pixels = data.to(device), [], {}  # pixels: their accuracies by normalisation
    replaces = args.out.exists()  # a table, which stands until the new one is whole
    settings = len(data.train), len(data.test), args.k, args.probe_epochs, args.seed, args.precision
    for path, contents in loaded:
        normalised = data.with_normalization(contents["data"])
        origin = (path, files.sha256(path), contents["epoch"], contents["data"]["name"], data.name)
        for network in [name for name in PROBED if name in args.network]:
            if network == "input":
                key = normalised.mean, normalised.std  # most checkpoints have the same
                if key not in pixels:
                    pixels[key] = probe_encoder(None, normalised, args, world)
                values = pixels[key]
            else:
                encoder = load_network(contents, network, device).encoder
                values = probe_encoder(encoder, normalised, args, world)
            found = [values.get(probe) for probe in PROBES]
            rows.append(dict(zip(COLUMNS, (*origin, network, *found, *settings), strict=True)))
            said = (f"{probe} {value:.2f}" for probe, value in values.items())
            world.say(f"{network} of {path}: {', '.join(said)}")
            if world.is_main and not replaces:
                files.write_csv(args.out, COLUMNS, rows)
    if world.is_main:
        files.write_csv(args.out, COLUMNS, rows)
        say_table(args, rows, data.name, world)


def lock_table(args):
    """Lock the CSV file --out. Refuse one that exists, with --overwrite one of something else."""
    check_output(args)
    if args.out.exists() and "sha256" not in (files.read_csv(args.out) or [""])[0]:
        raise InputError(f"--overwrite: {args.out} is no table of probes; give another --out")
    return lock(args.out.with_name(f".{args.out.name}.lock"), f"--out {args.out}")


def say_table(args, rows, name, world):
    """Mean and standard deviation over the checkpoints, a line for each network."""
    note = f", mean +- std over {n} checkpoints" if (n := len(args.checkpoints)) > 1 else ""
    world.say(f"test accuracy on {name}, %{note}")
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        cells = [f"{probe} {plus_minus([row[probe] for row in mine])}" for probe in args.probe]
        world.say(f"{network:<14}{', '.join(cells)}")
    world.say(f"rows: {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
