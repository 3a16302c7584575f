"""The landscape of loss and probes in a plane around a random teacher (section 5; Figs. 5, 13-16).

The plane goes through three networks: the teacher and two students. In it the teacher sits at the
edge of an asymmetric valley: the loss rises slowly towards the student, steeply the other way.

    python run_landscape.py --data-dir data --subset 1000 --test-subset 1000 \\
        --x-axis runs/a/checkpoint.pt:student --y-axis runs/b/checkpoint.pt:student
    python run_landscape.py --plot-only runs/nonlocal runs/shared --out fig5.png
    torchrun --nproc-per-node=4 run_landscape.py ...               # the processes share the points

Writes config.json, landscape.csv (a row for each grid point), points.csv (where the three networks
lie) and landscape.png.
"""

from pathlib import Path

from rtd import plots
from rtd.errors import InputError
from rtd.harness import cli, files, probing
from rtd.harness.checkpoint import check_image_size, load_network, load_spec, path_of
from rtd.harness.console import progress
from rtd.harness.datasets import fingerprints
from rtd.harness.device import describe
from rtd.harness.run import Run, check_output, draw
from rtd.interpolation import PLANES, Plane
from rtd.landscape import MEASURES, Landscape, asymmetry, norms
from rtd.probes import PROBES

MEASURED = tuple(f"{split}_{loss}" for split in ("train", "test") for loss in MEASURES)
COLUMNS = ("i", "j", "x", "y", *MEASURED, *PROBES)
COLUMNS += ("norm_encoder", "norm_head", "norm_total")
POINTS = ("name", "x", "y")
PRODUCTS = ("landscape.*", "points.csv")
TEACHER = "theta_T"
PROBE_BATCH = 512  # images per step of the linear probes, which are many


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    # fmt: off
    add = parser.group("start with these")
    add("--x-axis", str, None, "network at (1,0): PATH:student, PATH:student-init or PATH:teacher of a checkpoint; needed, but for --plot-only")
    add("--y-axis", str, None, "network at (0,1); needed likewise")
    cli.add_data_flags(add, default=None)
    add("--out", Path, None, "folder of the run, runs/landscape by default; with --plot-only the picture")
    add("--plot-only", Path, None, "folders of landscapes to draw, one below the other, into --out; nothing is computed", nargs="+")
    cli.add_file_flags(parser)
    add = parser.group("plane")
    add("--origin", str, None, "network at (0,0); by default the teacher of --x-axis")
    add("--plane", PLANES, "interpolation", "coordinates: interpolation has the three networks at (0,0), (1,0), (0,1), as in Fig. 5; "
        "orthogonal has true distances and angles, as in Figs. 13 to 16")
    for axis in "xy":
        add(f"--{axis}-range", cli.finite_float, None, f"N points in {axis}; 25 around the three networks by default", nargs=3, metavar=("MIN", "MAX", "N"))
    add("--encoder-only", bool, False, "loss between softmaxed embeddings, without the heads (Figs. 15, 16)")
    add("--bn-statistics", ("interpolate", "recompute"), "interpolate", "statistics of batch norm at each point")
    add("--batch-size", cli.positive_int, 256, "images per forward pass; it changes no number but round-off")
    add("--seed", cli.non_negative_int, 0, "seed of the linear probes")
    cli.add_probe_flags(parser)
    cli.add_device_flags(parser)
    cli.add_output_flags(parser, save_every=False)
    # fmt: on
    args = cli.parse(parser, argv)
    args.out = args.out or Path("runs/landscape" + (".png" if args.plot_only else ""))
    for axis in "xy":
        if not args.plot_only and getattr(args, f"{axis}_axis") is None:
            parser.error(f"--{axis}-axis is missing: a plane goes through three networks")
        if given := getattr(args, f"{axis}_range"):
            low, high, n = given
            if not (-1e9 < low <= high < 1e9 and n in range(1, 10_001) and (low < high or n == 1)):
                parser.error(
                    f"--{axis}-range {low:g} {high:g} {n:g}: give the smaller end, the larger one "
                    "and how many points, such as -1 2 25"
                )
            setattr(args, f"{axis}_range", [low + 0.0, high, int(n)])  # a CSV has no -0
    if args.origin is None and args.x_axis:
        args.origin = f"{path_of(args.x_axis) or args.x_axis}:teacher"
    return args


def main(args, device, world):
    if args.plot_only:
        return draw_only(args, world)
    specs = {"--origin": args.origin, "--x-axis": args.x_axis, "--y-axis": args.y_axis}
    origin, states, names = load_networks(specs)
    source = origin["data"]
    args.dataset, args.encoder = args.dataset or source["name"], origin["model"]["encoder"]
    if args.dataset != source["name"]:
        raise InputError(
            f"--dataset {args.dataset}: {args.origin} was distilled on {source['name']}; give that"
        )
    data = cli.load_data(args, world).with_normalization(source)
    cli.check_k(args, data)
    check_image_size(f"--origin {args.origin}", origin["model"], data)
    # the second only lends its modules to the weights of each point
    teacher, network = (load_network(origin, which, device) for which in ("teacher", "student"))
    parameters = [name for name, _ in network.named_parameters()]
    try:
        plane = Plane(states, parameters, args.plane).to(device)
    except ValueError as error:
        raise InputError(f"--origin, --x-axis, --y-axis: {error}") from error
    run = Run(args, device, world, PRODUCTS, (), fingerprints(data), specs.values())
    run.say(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images; "
        f"{describe(device, args.precision)}"
    )
    cli.note_steps(args, data, world, PROBE_BATCH)
    data, grid, done = data.to(device), make_grid(args, plane), load_points(run)
    landscape = Landscape(teacher, data, args.encoder_only, args.precision, args.batch_size)
    missing = [point for point in grid if point[:2] not in done]
    if done:
        run.say(f"resumed: {len(done)} of {len(grid)} points are done")

    def do(part, run):
        name = f"landscape.part{part}.pt"
        rows = (run.load(name) or {"rows": []})["rows"]
        for i, j, x, y in progress(missing[part :: world.size], "landscape", "points"):
            plane.write_(network, x, y)
            if args.bn_statistics == "recompute":
                landscape.recompute_batch_norm_(network)
            options = probing.options(args) | {"batch_size": PROBE_BATCH}
            found = landscape.evaluate(network, **options) | norms(network)
            rows.append(dict.fromkeys(COLUMNS) | {"i": i, "j": j, "x": x, "y": y} | found)
            run.save(name, {"rows": rows})

    run.for_each(range(world.size), do)
    points = load_points(run)
    world.in_main(lambda: report(run, [points[point[:2]] for point in grid], plane, names))


def load_points(run):
    """{(i, j): row} of the points that are done, by whatever process."""
    names = run.world.decide(lambda: sorted(p.name for p in run.folder.glob("landscape.part*.pt")))
    return {(row["i"], row["j"]): row for name in names for row in run.load(name)["rows"]}


def load_networks(specs):
    """The origin's checkpoint, the state dicts of the three networks, and their names.

    specs: {flag: PATH:NETWORK} of the three. Raises InputError where they do not lie in one space,
    or have different teachers.
    """
    loaded = [load_spec(flag, spec) for flag, spec in specs.items()]
    origin = loaded[0][0]
    for (contents, _), (flag, spec) in zip(loaded, specs.items(), strict=True):
        odd = None
        if contents["model"] != origin["model"]:
            both = zip(origin["model"].items(), contents["model"].values(), strict=True)
            odd = [f"{name} {a}, {b}" for (name, a), b in both if a != b]
            odd = f"are of different architectures ({'; '.join(odd)})"
        elif any(contents["data"][key] != origin["data"][key] for key in ("mean", "std")):
            odd = "were distilled on differently normalised images"
        elif files.checksum(contents["teacher"]) != files.checksum(origin["teacher"]):
            odd = "have different teachers, so the loss would not be that of both; "
            odd += "distil with the same --seed"
        if odd:
            raise InputError(f"--origin {specs['--origin']} and {flag} {spec} {odd}")
    states = [contents[which.replace("-", "_")] for contents, which in loaded]
    return origin, states, [label(*network) for network in loaded]


def label(contents, which):
    """A network's name in the paper: theta_T, theta_S(alpha) before, theta*_S(alpha) after."""
    if which == "teacher":
        return TEACHER
    alpha = contents["config"]["flags"]["alpha"]
    shown = 0 if alpha < 1e-6 else alpha  # 1e-10 is 0, as the paper writes it
    return f"{'theta*_S' if which == 'student' else 'theta_S'}({shown:g})"


def make_grid(args, plane):
    """[(i, j, x, y)], row by row; by default around the networks with a margin of a quarter."""
    axes = []
    for values, given in zip(
        zip(*plane.corners(), strict=True), (args.x_range, args.y_range), strict=True
    ):
        low, high = min(values), max(values)
        margin = 0.25 * (high - low)
        low, high, n = given or (low - margin, high + margin, 25)
        steps = max(1, n - 1)
        # in this form the teacher, at 0, is met exactly wherever rounding allows it
        axes.append([(low * (steps - k) + high * k) / steps for k in range(n)])
    return [(i, j, x, y) for j, y in enumerate(axes[1]) for i, x in enumerate(axes[0])]


def report(run, rows, plane, names):
    """Write the tables, draw, and say the range of the results and how asymmetric the valley is."""
    run.table("landscape.csv", COLUMNS, rows)
    corners = plane.corners()
    points = [(name, *corner) for name, corner in zip(names, corners, strict=True)]
    run.table("points.csv", POINTS, [dict(zip(POINTS, point, strict=True)) for point in points])
    for column in ("train_kl", *PROBES):
        if values := [row[column] for row in rows if row[column] is not None]:
            run.say(f"{column}: {min(values):.4g} to {max(values):.4g} over {len(values)} points")
    valley = asymmetry(rows, corners[0])[:3] if names[0] == TEACHER else ()
    for eps, minus, plus, ratio in valley:
        run.say(
            f"train KL at {eps:g} from the teacher along x: {minus:.3e} on the far side, "
            f"{plus:.3e} towards {names[1]}; ratio {ratio:.2f}"
        )
    run.draw("landscape", plots.landscapes, [panel(run.folder)])


def panel(path):
    """What ``rtd.plots.landscapes`` draws of a landscape.csv, or of the folder that it is in."""
    path = path / "landscape.csv" if path.is_dir() else path
    config, beside = path.with_name("config.json"), path.with_name("points.csv")
    flags = {}
    if config.exists():
        with files.reading(config, "of a landscape"):
            flags = dict(files.read_json(config)["flags"])
    rows = files.read_csv(path, COLUMNS)
    points = files.read_csv(beside, POINTS) if beside.exists() else []
    places = {path: [row[k] for row in rows for k in ("i", "j", "x", "y")] or [None]}
    places[beside] = [point[k] for point in points for k in ("x", "y")]
    for file, numbers in places.items():
        sound = all(isinstance(x, (int, float)) and abs(x) < 1e9 for x in numbers)
        if not sound or any(isinstance(x, str) for row in rows for x in row.values()):
            raise InputError(f"{file} holds no landscape, but nothing, or other than numbers")
    points = [point | {"name": str(point["name"])} for point in points]
    known = [flags.get("encoder"), flags.get("dataset"), f"{flags.get('plane', '')} plane"]
    known += ["encoder alone"] if flags.get("encoder_only") else []
    return {
        "rows": rows,
        "points": points,
        "orthogonal": flags.get("plane") == "orthogonal",
        "loss": "KL of embeddings" if flags.get("encoder_only") else "train KL",
        "title": ", ".join(filter(None, known)),
    }


def draw_only(args, world):
    """--plot-only: one picture of several landscapes."""
    check_output(args)
    if args.out.suffix[1:] not in plots.FORMATS:
        raise InputError(f"--out {args.out}: give a file that ends in .{', .'.join(plots.FORMATS)}")
    draw(args.out, world.say, plots.landscapes, [panel(folder) for folder in args.plot_only])


if __name__ == "__main__":
    cli.run(main, parse_args())
