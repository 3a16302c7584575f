"""Probe the networks of one or more checkpoints of run_distill.py (paper sections 3 and C.1; Tables 1 to 4).

Linear and k-NN probes of teacher, student, student-init (the student before training) and of the pixels themselves, on
any data set. Images are normalised with the constants of the data set that the student was distilled on, also where
another one is probed (transfer, Tables 2 and 4).

    python run_probe.py runs/distill-digits-vgg11/checkpoint.pt
    python run_probe.py runs/a/checkpoint.pt runs/b/checkpoint.pt --dataset cifar10 --data-dir data

    torchrun --nproc-per-node=4 run_probe.py ...                    # the images are shared among the processes

Prints a table, mean +- standard deviation over the checkpoints, and writes a row for each network to --out.
"""

from pathlib import Path

from rtd import checkpoint, cli, distributed, logs
from rtd.device import pick_device
from rtd.errors import InputError
from rtd.probes import probe_encoder, probe_input

WHO = (*checkpoint.NETWORKS, "input")
COLUMNS = ("checkpoint", "sha256", "epoch", "trained_on", "probed_on", "network", "linear", "knn")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoint.pt or best.pt of a run")
    cli.add_data_flags(parser)
    cli.add_probe_flags(parser)
    parser.add_argument("--network", nargs="+", choices=WHO, default=list(WHO), help="what to probe")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="of the linear probes")
    cli.add_device_flags(parser)
    parser.add_argument("--out", type=Path, help="CSV file; by default probe.csv beside the first checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the CSV file if there is one")
    args = parser.parse_args(argv)
    args.probe = cli.chosen_probes(parser, args.probe)
    if not args.probe:
        parser.error("--probe none leaves nothing to do")
    args.out = args.out or Path(args.checkpoints[0]).parent / "probe.csv"
    return args


def main(args):
    device = pick_device(args.device, args.deterministic)
    with distributed.process_group(device):
        probe_checkpoints(args, device)


def probe_checkpoints(args, device):
    """Probe, write a row at a time, and say mean and deviation; under torchrun the main process writes and says."""
    if args.out.exists() and not args.overwrite:
        raise InputError(f"--out {args.out} exists already: --overwrite replaces it, or give another file")
    loaded = [checkpoint.load_checkpoint(path) for path in args.checkpoints]  # all, before anything is computed
    data = cli.load_data(args)
    cli.check_k(args, data)
    for path, contents in zip(args.checkpoints, loaded, strict=True):
        checkpoint.check_image_size(path, contents["model"], data)
    data = data.to(device)

    distributed.barrier()  # all have looked before the main process writes
    log = logs.CsvLog(args.out, COLUMNS)
    if distributed.is_main():
        log.start()
    results, pixels = {who: [] for who in WHO if who in args.network}, {}
    for path, contents in zip(args.checkpoints, loaded, strict=True):
        source = contents["data"]
        normalised = data.with_normalization(source)
        origin = {"checkpoint": path, "sha256": checkpoint.sha256(path), "epoch": contents["epoch"]}
        origin |= {"trained_on": source["name"], "probed_on": data.name}
        for who, found in results.items():
            options = cli.probe_options(args) | {"name": who}
            if who != "input":
                encoder = checkpoint.load_network(contents, who, device).encoder
                values = probe_encoder(encoder, normalised, args.precision, **options)
            elif (constants := (*normalised.mean, *normalised.std)) in pixels:  # the same for most checkpoints
                values = pixels[constants]
            else:
                values = pixels[constants] = probe_input(normalised, **options)
            found.append(values)
            if distributed.is_main():
                log.append(dict.fromkeys(COLUMNS) | origin | {"network": who} | values)

    if not distributed.is_main():
        return
    cli.say(f"test accuracy on {data.name}, %" + (f", mean +- std over {len(loaded)} checkpoints" if len(loaded) > 1 else ""))
    cli.say(f"{'':<14}" + "".join(f"{probe:>18}" for probe in args.probe))
    for who, found in results.items():
        cli.say(f"{who:<14}" + "".join(f"{cell([values[probe] for values in found]):>18}" for probe in args.probe))
    cli.say(f"rows: {args.out}")


def cell(values):
    mean, std = logs.mean_and_std(values)
    return f"{mean:.2f}" if std is None else f"{mean:.2f} +- {std:.2f}"


if __name__ == "__main__":
    cli.run(main, parse_args())
