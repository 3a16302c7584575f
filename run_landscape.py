"""The landscape of loss and probes in a plane around a random teacher (paper section 5; Figs. 5, 13 to 16).

The plane goes through three networks: the teacher and two students. In it the teacher sits at the edge of an asymmetric
valley: the loss rises slowly towards the student, steeply the other way.

    python run_landscape.py --dataset cifar10 --data-dir data --subset 1000 --test-subset 1000 \\
        --origin runs/a/checkpoint.pt:teacher --x-axis runs/a/checkpoint.pt:student --y-axis runs/b/checkpoint.pt:student
    python run_landscape.py --plot-only runs/nonlocal/landscape.csv runs/shared/landscape.csv --out fig5.png
    torchrun --nproc-per-node=4 run_landscape.py ...                     # the points are shared among the processes

Writes config.json, landscape.csv (a row for each grid point) and landscape.png.
"""

from pathlib import Path

import torch

from rtd import checkpoint, cli, distributed, logs, plot_landscape, plots, runs
from rtd.device import describe, pick_device
from rtd.errors import InputError
from rtd.interpolation import CENTERS, PLANES, Plane
from rtd.landscape import LOSSES, Landscape, asymmetry, norms
from rtd.progress import progress

MEASURED = tuple(f"{split}_{loss}" for split in ("train", "test") for loss in LOSSES)
COLUMNS = ("i", "j", "x", "y", *MEASURED, "linear", "knn", "norm_encoder", "norm_head", "norm_total")
POINTS = ("name", "x", "y")
PRODUCTS = ("config.json", "landscape*.csv", "points.csv", "landscape*.png")
MAY_CHANGE = ("out", "resume", "overwrite", "no_plot", "surface", "data_dir", "download", "device")  # on --resume
AXES = ("origin", "x_axis", "y_axis")
TEACHER = "theta_T"


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("plane").add_argument
    for axis in AXES:
        add(f"--{axis.replace('_', '-')}", metavar="NETWORK", help="PATH:teacher, PATH:student or PATH:student-init")
    add("--plane", choices=PLANES, default="interpolation", help="interpolation: the three at (0,0), (1,0), (0,1), as in Fig. 5; "
        "orthogonal: true distances and angles, as in Figs. 13 to 16")  # fmt: skip
    add("--center", choices=CENTERS, default="origin", help="what lies at (0,0) of an orthogonal plane")
    for axis in "xy":
        add(f"--{axis}-range", nargs=3, metavar=("MIN", "MAX", "N"), help="N points; by default 25, around the three networks")
    add("--encoder-only", action="store_true", help="KL between softmaxed embeddings, without the head (Figs. 15, 16)")
    add(
        "--bn-statistics",
        choices=("interpolate", "recompute"),
        default="interpolate",
        help="of batch norm, where there is any: interpolate keeps the three networks as they are, with KL 0 at the teacher; "
        "recompute estimates them from the training images at each point, the teacher's included, who was used without",
    )
    add("--batch-size", type=cli.positive_int, default=256, help="images at a time; changes the speed alone")
    add("--seed", type=cli.non_negative_int, default=0, help="of the linear probes")
    cli.add_data_flags(parser)
    cli.add_probe_flags(parser)
    cli.add_device_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, help="run folder, by default runs/landscape; with --plot-only the picture, by default beside the CSV")
    add("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
    add("--no-plot", action="store_true", help="do not draw landscape.png")
    add("--surface", action="store_true", help="also draw the train KL as a surface in three dimensions")
    add("--plot-only", nargs="+", type=Path, metavar="CSV", help="compute nothing: draw these, side by side, into --out")
    args = parser.parse_args(argv)
    args.probe = cli.chosen_probes(parser, args.probe)
    args.out = args.out or (args.plot_only[0].with_suffix(".png") if args.plot_only else Path("runs/landscape"))
    cli.check_output_flags(parser, args)
    if args.plot_only is None:
        for axis in AXES:
            if getattr(args, axis) is None:
                parser.error(f"--{axis.replace('_', '-')} is missing: a plane goes through three networks")
    for flag in ("x_range", "y_range"):
        if getattr(args, flag) is not None:
            setattr(args, flag, parse_range(parser, f"--{flag.replace('_', '-')}", getattr(args, flag)))
    return args


def parse_range(parser, flag, words):
    """["MIN", "MAX", "N"] -> [min, max, n]; one point may have MIN = MAX."""
    try:
        low, high, n = float(words[0]), float(words[1]), int(words[2])
        if not (-1e9 < low <= high < 1e9 and 1 <= n <= 10_000 and (low < high or n == 1)):
            raise ValueError
    except ValueError:
        parser.error(f"{flag} {' '.join(words)}: give two numbers, the smaller first, and how many points, such as -1 2 25")
    return [low + 0.0, high, n]  # -0 would be read back from the CSV as 0


def main(args):
    if args.plot_only is not None:
        draw_only(args)
        return
    device = pick_device(args.device, args.deterministic)
    with distributed.process_group(device):
        contents, states, names = load_networks(args)
        data = cli.load_data(args)
        cli.check_k(args, data)
        checkpoint.check_image_size(f"--origin {args.origin}", contents["model"], data)
        if data.name != contents["data"].get("name"):
            raise InputError(
                f"--dataset {data.name}: --origin {args.origin} was distilled on {contents['data'].get('name')}; give that"
            )
        reads = data.fingerprints()
        data = data.with_normalization(contents["data"]).to(device)
        teacher = checkpoint.load_network(contents, "teacher", device)
        network = checkpoint.load_network(contents, "student", device)
        try:
            plane = Plane(states, [name for name, _ in network.named_parameters()], args.plane, args.center).to(device)
        except ValueError as error:
            raise InputError(f"--origin, --x-axis, --y-axis: {error}") from error
        grid = make_grid(args, plane)
        reads |= {getattr(args, axis): checkpoint.sha256(path_of(getattr(args, axis))) for axis in AXES}
        continued = runs.open_folder(args.out, args, device, MAY_CHANGE, PRODUCTS, reads)
        cli.say(f"{data.name}: {len(data.train)} training and {len(data.test)} test images; {describe(device, args.precision)}")

        landscape = Landscape(teacher, data, args.encoder_only, args.precision, args.batch_size)
        done, log = open_log(args.out, grid, continued)
        missing = [point for point in grid if point[:2] not in done]
        if done:
            cli.say(f"resumed: {len(done)} of {len(grid)} points are done")
        for i, j, x, y in progress(distributed.units(missing), "points", "points", len(missing)):
            plane.write_(network, x, y)
            if args.bn_statistics == "recompute":
                landscape.recompute_batch_norm_(network)
            row = dict.fromkeys(COLUMNS) | {"i": i, "j": j, "x": x, "y": y} | norms(network)
            log.append(row | landscape.evaluate(network, name="landscape", batch_size=512, **cli.probe_options(args)))
        if distributed.is_main():
            finish(args, grid, plane, names)


def path_of(spec):
    return spec.rpartition(":")[0]


def load_networks(args):
    """The origin's checkpoint, whose teacher is everyone's, and the state dicts of the three networks and their names."""
    loaded = [checkpoint.load_spec(f"--{axis.replace('_', '-')}", getattr(args, axis)) for axis in AXES]
    origin = loaded[0][0]
    for (contents, _), axis in zip(loaded[1:], AXES[1:], strict=True):
        both = f"--origin {args.origin} and --{axis.replace('_', '-')} {getattr(args, axis)}"
        if contents["model"] != origin["model"]:
            raise InputError(f"{both} are of different architectures: {origin['model']} and {contents['model']}")
        if any(contents["data"][key] != origin["data"][key] for key in ("mean", "std")):
            raise InputError(f"{both} were distilled on differently normalised images")
        if any(not torch.equal(tensor, origin["teacher"][name]) for name, tensor in contents["teacher"].items()):
            raise InputError(
                f"{both} have different teachers, so the loss would not be that of both; distil with the same --seed"
            )
    names = {axis: label(*network) for axis, network in zip(AXES, loaded, strict=True)}
    return origin, [contents[which.replace("-", "_")] for contents, which in loaded], names


def make_grid(args, plane):
    """[(i, j, x, y)]: row by row, y first; by default around the three networks with a margin of a quarter."""
    corners, axes = plane.corners(), []
    for axis, given in enumerate((args.x_range, args.y_range)):
        values = [corner[axis] for corner in corners]
        margin = 0.25 * (max(values) - min(values))
        low, high, n = given or (min(values) - margin, max(values) + margin, 25)
        # in this form the teacher, at 0, is met exactly wherever rounding allows it
        axes.append([(low * (n - 1 - k) + high * k) / (n - 1) if n > 1 else low for k in range(n)])
    return [(i, j, x, y) for j, y in enumerate(axes[1]) for i, x in enumerate(axes[0])]


def open_log(folder, grid, continued):
    """What is done already, as {(i, j)}, and this process's CSV: landscape.csv, or a part of it under torchrun."""
    rows = saved_rows(folder, grid) if continued else []
    distributed.barrier()  # all have read before anyone writes
    if distributed.is_main():
        write_rows(folder, rows)
    distributed.barrier()
    log = logs.CsvLog(folder / "landscape.csv", COLUMNS)
    if distributed.world_size() > 1:
        log = logs.CsvLog(folder / f"landscape.part{distributed.rank()}.csv", COLUMNS)
        log.start()
    return {(row["i"], row["j"]) for row in rows}, log


def saved_rows(folder, grid):
    """The rows of landscape.csv and its parts, in the order of the grid; InputError if they are not points of this grid."""
    points = {(i, j): (logs.format_value(x), logs.format_value(y)) for i, j, x, y in grid}
    rows = {}
    for path in sorted(folder.glob("landscape*.csv")):
        for row in logs.read_csv(path, COLUMNS):
            key = row["i"], row["j"]
            numbers = all(isinstance(row[name], (int, float)) for name in ("x", "y", *MEASURED))
            if not numbers or points.get(key) != (logs.format_value(float(row["x"])), logs.format_value(float(row["y"]))):
                raise InputError(f"{path} has a row that is no point of this grid (i {row['i']}, j {row['j']}); was it edited?")
            rows[key] = row
    return [rows[key] for key in points if key in rows]


def write_rows(folder, rows):
    """All rows into landscape.csv; the parts are not needed any more."""
    logs.CsvLog(folder / "landscape.csv", COLUMNS).start(rows)
    for part in folder.glob("landscape.part*.csv"):
        part.unlink()


def finish(args, grid, plane, names):
    """Merge, draw, and say how asymmetric the valley is."""
    rows = saved_rows(args.out, grid)
    write_rows(args.out, rows)
    corners = plane.corners()
    points = [{"name": names[axis], "x": x, "y": y} for axis, (x, y) in zip(AXES, corners, strict=True)]
    logs.CsvLog(args.out / "points.csv", POINTS).start(points)
    for eps, minus, plus, ratio in asymmetry(rows, corners[0])[:3] if names["origin"] == TEACHER else ():
        cli.say(f"train KL at {eps:g} from the teacher along x: {minus:.3e} on the far side, {plus:.3e} towards "
                f"{names['x_axis']}; ratio {ratio:.2f}")  # fmt: skip
    cli.draw(args, plot_landscape.plot, args.out / "landscape.png", [args.out / "landscape.csv"])
    if args.surface:
        cli.draw(args, plot_landscape.plot_surface, args.out / "landscape-surface.png", args.out / "landscape.csv")


def label(contents, which):
    """A network's name as in the paper: theta_T, theta_S(alpha) before training, theta*_S(alpha) after."""
    if which == "teacher":
        return TEACHER
    name, config = "theta*_S" if which == "student" else "theta_S", contents["config"]
    flags = config.get("flags") if isinstance(config, dict) else None
    alpha = flags.get("alpha") if isinstance(flags, dict) else None
    if not isinstance(alpha, (int, float)):
        return name
    return f"{name}({0 if alpha < 1e-6 else alpha:g})"  # 1e-10 is 0, as the paper writes it


def draw_only(args):
    if not plots.available():
        raise InputError("--plot-only needs matplotlib: pip install -e '.[full]'")
    if args.out.exists() and not args.overwrite:
        raise InputError(f"--out {args.out} exists already: --overwrite replaces it, or give another file")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent}")
    plot_landscape.plot(args.out, args.plot_only)
    cli.say(f"figure: {args.out}")
    if args.surface:
        surface = args.out.with_name(f"{args.out.stem}-surface.png")
        plot_landscape.plot_surface(surface, args.plot_only[0])
        cli.say(f"figure: {surface}")


if __name__ == "__main__":
    cli.run(main, parse_args())
