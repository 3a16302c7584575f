"""The landscape of loss and probes in a plane around a random teacher (section 5; Figs. 5, 13-16).

The plane goes through three networks: the teacher and two students, or one student before and
after training. The teacher lies in an asymmetric valley: the loss rises slowly towards a student
that started next to it, steeply the other way.

    # first: run_distill.py ... --out runs/a, and the same with --alpha 1 --out runs/b
    python run_landscape.py --data-dir data --subset 1000 --test-subset 1000 --out runs/shared \\
        --x-axis runs/a/checkpoint.pt:student --y-axis runs/b/checkpoint.pt:student
    python run_landscape.py --data-dir data --subset 1000 --test-subset 1000 --out runs/nonlocal \\
        --x-axis runs/b/checkpoint.pt:student-init --y-axis runs/b/checkpoint.pt:student
    python run_landscape.py --plot-only runs/nonlocal runs/shared --out fig5.png
    torchrun --nproc-per-node=4 run_landscape.py ...               # the processes share the rows

Writes config.json, landscape.csv (a row a point: its place in grid and plane, losses and entropy in
nats but for MSE, probes in percent, norms of the parameters), points.csv (the three networks) and
landscape.png.
"""

from pathlib import Path

import numpy as np
import torch

from rtd import plots
from rtd.errors import InputError
from rtd.harness import cli, files
from rtd.harness.checkpoint import check_model, load_network, load_spec, path_of
from rtd.harness.console import progress
from rtd.harness.datasets import LABELLED, fingerprints
from rtd.harness.run import Run, check_output
from rtd.harness.training import probe_options
from rtd.interpolation import PLANES, Plane
from rtd.landscape import MEASURES, Landscape, asymmetry
from rtd.models import norms
from rtd.probes import PROBES

COLUMNS = ("i", "j", "x", "y", *(f"{a}_{b}" for a in ("train", "test") for b in MEASURES))
COLUMNS += (*PROBES, "norm_encoder", "norm_head", "norm_total")
POINTS = ("name", "x", "y")
PRODUCTS = ("landscape.csv", "landscape.*", "landscape.row*.pt", "points.csv")
TEACHER = "theta_T"
PROBE_BATCH = 512  # images per step of the linear probes, which are many


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    # fmt: off
    add = parser.group("start with these")
    add("--x-axis", str, None, "network that the x axis points to, at (1,0) of the interpolation plane: PATH:student, PATH:student-init or PATH:teacher of a checkpoint; needed, but for --plot-only")
    add("--y-axis", str, None, "third network, at (0,1) of the interpolation plane; needed likewise")
    cli.add_data_flags(add, default=None)
    add("--out", Path, None, "folder of the run, runs/landscape by default; with --plot-only the picture")
    add("--plot-only", Path, None, "folders of landscapes to draw, one below the other, into --out; nothing is computed", nargs="+")
    parser.add_file_flags()
    add = parser.group("plane")
    add("--origin", str, None, "network at (0,0); by default the teacher of --x-axis")
    add("--plane", PLANES, "interpolation", "coordinates: interpolation has the three networks at (0,0), (1,0), (0,1), as in Fig. 5; "
        "orthogonal has true distances and angles, as in Figs. 13 to 16")
    for axis in "xy":
        add(f"--{axis}-range", cli.finite_float, None, f"N points in {axis}; 25 around the three networks by default", nargs=3, metavar=("MIN", "MAX", "N"))
    add("--encoder-only", bool, False, "loss between softmaxed embeddings, without the heads (Figs. 15, 16)")
    add("--bn-statistics", ("interpolate", "recompute"), "interpolate", "statistics of batch norm at each point")
    add("--batch-size", cli.positive_int, 256, "images per forward pass; it changes round-off, and what --bn-statistics recompute estimates")
    add("--seed", cli.non_negative_int, 0, "seed of the linear probes")
    parser.add_probe_flags()
    parser.add_device_flags()
    parser.add_output_flags(save_every=False)
    # fmt: on
    args = parser.parse(argv)
    for name, value in vars(args).items() if args.plot_only else ():
        if value != parser.get_default(name) and name not in ("plot_only", "out", "overwrite"):
            parser.error(f"--plot-only draws what is there; leave out --{name.replace('_', '-')}")
    args.out = args.out or Path("runs/landscape" + (".png" if args.plot_only else ""))
    for axis in "xy":
        if not args.plot_only and getattr(args, f"{axis}_axis") is None:
            parser.error(f"--{axis}-axis is missing: a plane goes through three networks")
        if given := getattr(args, f"{axis}_range"):
            low, high, n = given
            if not (-1e9 < low <= high < 1e9 and n in range(1, 10_001) and (low < high) == (n > 1)):
                what = f"--{axis}-range {low:g} {high:g} {n:g}"
                parser.error(f"{what}: give smaller end, larger end and number, such as -1 2 25")
            setattr(args, f"{axis}_range", [low + 0.0, high + 0.0, int(n)])  # a CSV has no -0
    if args.origin is None and args.x_axis:
        args.origin = f"{path_of(args.x_axis) or args.x_axis}:teacher"
    return args


def main(args, device, world):
    if args.plot_only:
        return world.in_main(lambda: draw_only(args, world))
    specs = {"--origin": args.origin, "--x-axis": args.x_axis, "--y-axis": args.y_axis}
    origin, states, names = load_networks(specs, device)
    source = origin["data"]
    if source["name"] not in LABELLED:
        raise InputError(f"--origin {args.origin}: {source['name']} has no test images")
    args.dataset, args.encoder = args.dataset or source["name"], origin["model"]["encoder"]
    if args.dataset != source["name"]:
        raise InputError(f"--dataset {args.dataset}: give the networks' own, {source['name']}")
    check_model(f"--origin {args.origin}", origin["model"], vars(args))  # with its --image-size
    data = cli.load_data(args, world).with_normalization(source)
    # the second only lends its modules to the weights of each point
    teacher, network = (load_network(origin, which, device) for which in ("teacher", "student"))
    parameters = [name for name, _ in network.named_parameters()]
    try:
        plane = Plane(states, parameters, args.plane)
    except ValueError as error:
        raise InputError(f"--origin, --x-axis, --y-axis: {error}") from error
    run = Run(args, device, world, PRODUCTS, (), fingerprints(data), specs.values())
    run.say(f"{data}; {run.config['device']}")
    cli.note_steps(args, data, world, PROBE_BATCH)
    data, grid = data.to(device), make_grid(args, plane)
    landscape = Landscape(teacher, data, args.encoder_only, args.precision, args.batch_size)

    def do(points, run):
        name = state_file(points)
        done = (run.load(name) or {"points": []})["points"]
        for i, j, x, y in progress(points[len(done) :], "landscape", "points"):
            plane.write_(network, x, y)
            if args.bn_statistics == "recompute":
                landscape.recompute_batch_norm_(network)
            found = landscape.evaluate(network, **probe_options(args), batch_size=PROBE_BATCH)
            row = {"i": i, "j": j, "x": x, "y": y} | found | norms(network)
            done.append(dict.fromkeys(COLUMNS) | row)
            run.save(name, {"points": done})

    run.for_each(grid, do, "row of the grid")
    rows = [row for points in grid for row in run.load(state_file(points))["points"]]
    world.in_main(lambda: report(run, rows, plane, names))


def state_file(points):
    """The name of the state file of a row of the grid."""
    return f"landscape.row{points[0][1]}.pt"


def load_networks(specs, device):
    """The checkpoint of the origin, three state dicts and names; specs: {flag: PATH:NETWORK}.

    Raises InputError for networks that do not lie in one space, or have different teachers.
    """
    loaded = [load_spec(flag, spec) for flag, spec in specs.items()]
    origin = loaded[0][0]
    for (contents, _), (flag, spec) in zip(loaded, specs.items(), strict=True):
        check_model(f"{flag} {spec}", contents["model"], origin["model"])
        same = [torch.equal(x, contents["teacher"][k]) for k, x in origin["teacher"].items()]
        same += [contents["data"][key] == origin["data"][key] for key in ("mean", "std")]
        if not all(same):
            raise InputError(
                f"--origin {specs['--origin']} and {flag} {spec} have different teachers, or images "
                "that are normalised differently; use one --seed and --dataset, and no --ema"
            )
    states = [load_network(*network, device).state_dict() for network in loaded]
    return origin, states, [label(*network) for network in loaded]


def label(contents, which):
    """A network's name in the paper: theta_T, theta_S(alpha) before training, theta*_S(alpha) after."""
    if which == "teacher":
        return TEACHER
    alpha = round(contents["config"]["flags"]["alpha"], 6)  # 1e-10 is 0, as the paper writes it
    return f"{'theta*_S' if which == 'student' else 'theta_S'}({alpha:g})"


def make_grid(args, plane):
    """Rows of points (i, j, x, y), by default around the networks with a margin of a quarter."""
    axes = []
    for wanted, *values in zip((args.x_range, args.y_range), *plane.corners(), strict=True):
        margin = 0.25 * (max(values) - min(values))
        low, high, n = wanted or (min(values) - margin, max(values) + margin, 25)
        steps = max(1, n - 1)
        # in this form the teacher, at 0, is met exactly wherever rounding allows it
        axes.append([(low * (steps - k) + high * k) / steps for k in range(n)])
    return [[(i, j, x, y) for i, x in enumerate(axes[0])] for j, y in enumerate(axes[1])]


def report(run, rows, plane, names):
    """Write the tables, draw, and say how asymmetric the valley around the teacher is."""
    run.table("landscape.csv", COLUMNS, rows)
    points = zip(names, plane.corners(), strict=True)
    points = [{"name": name, "x": x, "y": y} for name, (x, y) in points]
    run.table("points.csv", POINTS, points)
    valley = asymmetry(rows)[:3] if names[0] == TEACHER else ()
    for eps, minus, plus, ratio in valley:
        words = f"{minus:.3e} on the far side, {plus:.3e} towards {names[1]}, ratio {ratio:.2f}"
        run.say(f"train KL at {eps:g} from the teacher along x: {words}")
    run.draw("landscape", plots.landscapes, [panel(run.folder)])


def panel(folder):
    """What ``rtd.plots.landscapes`` draws of the run in ``folder``."""
    tables = []
    for name, columns in {"landscape.csv": COLUMNS, "points.csv": POINTS}.items():
        rows = files.read_csv(folder / name, columns)
        with files.reading(folder / name, "of a landscape"):
            numbers = np.array([[row[c] for c in columns if c != "name"] for row in rows], float)
            if not (rows and np.isfinite(numbers[:, :4]).all()):
                raise ValueError("a place is missing or infinite")
        tables.append(rows)
    with files.reading(folder / "config.json", "of a landscape"):
        flags = files.read_json(folder / "config.json")["flags"]
        title = f"{flags['encoder']}, {flags['dataset']}, {flags['plane']} plane"
        alone, orthogonal = flags["encoder_only"], flags["plane"] == "orthogonal"
    return {
        "rows": tables[0],
        "points": tables[1],
        "orthogonal": orthogonal,
        "loss": "KL of embeddings" if alone else "train KL",
        "title": title + ", encoder alone" * alone,
    }


def draw_only(args, world):
    """--plot-only: one picture of several landscapes."""
    check_output(args)
    if args.out.suffix[1:] not in plots.FORMATS:
        raise InputError(f"--out {args.out}: give a file that ends in .{', .'.join(plots.FORMATS)}")
    panels = [panel(folder) for folder in args.plot_only]
    with files.atomic_write(args.out) as file:
        plots.draw(plots.landscapes, [panels], file, args.out.suffix[1:])
    world.say(f"picture: {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
