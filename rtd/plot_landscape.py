"""Pictures of landscape.csv: Fig. 5's panels, train KL above and probe accuracy below, and the KL as a surface."""

import math
import re
from pathlib import Path

from rtd.errors import InputError
from rtd.logs import read_csv, read_json
from rtd.plots import new_figure, save_figure

DRAWN = ("train_kl", "linear", "knn", "norm_total")
FLOOR = 1e-12  # of the KL on the log scale: at the teacher it is 0


def _numbers(path, rows, columns):
    """Refuse what a hand may have written into ``columns`` of ``rows``: they hold numbers, or nothing."""
    if any(not isinstance(row[column], (int, float, type(None))) for row in rows for column in columns):
        raise InputError(f"{path} holds text where numbers belong; was it edited?")


def _grid(path):
    """(x values, y values, {column: rows of values}) of a landscape.csv; points that are missing are nan."""
    rows = read_csv(path)
    if not rows or not {"i", "j", "x", "y", *DRAWN} <= set(rows[0]):
        raise InputError(f"{path} holds no landscape to draw")
    _numbers(path, rows, ("i", "j", "x", "y", *DRAWN))
    xs = {row["i"]: row["x"] for row in rows}
    ys = {row["j"]: row["y"] for row in rows}
    values = {}
    for column in DRAWN:
        found = {(row["i"], row["j"]): row[column] for row in rows}
        grid = [[found.get((i, j)) for i in sorted(xs)] for j in sorted(ys)]
        values[column] = [[math.nan if v is None else v for v in line] for line in grid]
    return [xs[i] for i in sorted(xs)], [ys[j] for j in sorted(ys)], values


def _points(path):
    """[(name, x, y)] of the three networks, from points.csv beside the landscape."""
    beside = Path(path).with_name("points.csv")
    rows = read_csv(beside, ("name", "x", "y")) if beside.exists() else []
    _numbers(beside, rows, ("x", "y"))
    return [(str(row["name"]), row["x"], row["y"]) for row in rows]


def _orthogonal(path):
    """Whether the plane's distances are those of parameter space, from config.json beside the landscape."""
    config = read_json(Path(path).with_name("config.json"))
    flags = config.get("flags") if isinstance(config, dict) else None
    return isinstance(flags, dict) and flags.get("plane") == "orthogonal"


def _math(name):
    """theta*_S(0) as matplotlib sets formulas; what is no such name stays text."""
    if not re.fullmatch(r"theta\*?_[TS](\([-+.\w]*\))?", name):
        return name.replace("$", r"\$")
    return "$" + name.replace("theta*", r"\theta^*").replace("theta_", r"\theta_") + "$"


def _finite(grid):
    return [v for line in grid for v in line if math.isfinite(v)]


def _map(figure, axis, xs, ys, grid, norms, points, unit, **colours):
    """One panel: ``grid`` in colours, contours of ``norms``, the three networks where they lie inside."""
    from matplotlib.patheffects import withStroke

    image = axis.pcolormesh(xs, ys, grid, shading="nearest", **colours)
    figure.colorbar(image, ax=axis, label=unit)
    lines = axis.contour(xs, ys, norms, levels=6, colors="white", linewidths=0.6, alpha=0.8)
    axis.clabel(lines, fontsize="x-small", fmt="%.4g")
    for name, x, y in points:
        if xs[0] <= x <= xs[-1] and ys[0] <= y <= ys[-1]:
            axis.plot(x, y, "o", color="#D55E00", markeredgecolor="white", markersize=6)
            left = x > (xs[0] + xs[-1]) / 2
            # below where a neighbour to the left, at about the same height, has its name above
            below = any(x0 < x and abs(y0 - y) < 0.1 * (ys[-1] - ys[0]) for _, x0, y0 in points)
            place = {"xytext": (-6 if left else 6, -6 if below else 6), "textcoords": "offset points"}
            place |= {"ha": "right" if left else "left", "va": "top" if below else "bottom"}
            axis.annotate(_math(name), (x, y), color="white", path_effects=[withStroke(linewidth=2, foreground="black")], **place)
    axis.set(xlabel="x", ylabel="y")


def _curve(axis, xs, ys, grid, points, unit, log):
    """One panel of a landscape that is a single row or column of points: a curve, with the networks on it as lines."""
    along, values = (xs, grid[0]) if len(ys) == 1 else (ys, [line[0] for line in grid])
    axis.plot(along, values, "o-", color="#0072B2", markersize=3, linewidth=1.4)
    for name, *place in points:
        here, across = place if len(ys) == 1 else place[::-1]
        other = ys[0] if len(ys) == 1 else xs[0]
        if along[0] <= here <= along[-1] and abs(across - other) <= 1e-6 * (abs(other) + 1):
            axis.axvline(here, color="#D55E00", linewidth=0.8)
            axis.annotate(_math(name), (here, 1), (3, -12), xycoords=("data", "axes fraction"), textcoords="offset points")
    axis.set(xlabel="x" if len(ys) == 1 else "y", ylabel=unit, yscale="log" if log else "linear")


def plot(path, csv_paths):
    """One column for each landscape.csv: train KL (log colours) above, probe accuracy below, contours of |theta|.

    An orthogonal plane has equal scales on both axes. A landscape of one row or column of points is drawn as a curve.
    """
    from matplotlib.colors import LogNorm

    figure, axes = new_figure(len(csv_paths), rows=2, squeeze=False)
    for column, csv_path in enumerate(csv_paths):
        xs, ys, values = _grid(csv_path)
        points = _points(csv_path)
        probe = next((name for name in ("knn", "linear") if _finite(values[name])), None)
        for axis, name, title in ((axes[0][column], "train_kl", "train KL"), (axes[1][column], probe, f"{probe} probe")):
            if name is None:
                axis.set_axis_off()
                continue
            grid, unit, log = values[name], "nats" if name == "train_kl" else "test accuracy (%)", name == "train_kl"
            axis.set_title(f"{Path(csv_path).resolve().parent.name}: {title}")
            if len(xs) == 1 or len(ys) == 1:
                _curve(axis, xs, ys, grid, points, unit, log)
                continue
            colours = {"cmap": "cividis"}
            if log:
                positive = sorted(v for v in _finite(grid) if v > FLOOR) or [FLOOR, 1.0]
                low = min(max(positive[0], 1e-4 * positive[-1]), 0.5 * positive[-1])
                colours = {"cmap": "viridis", "norm": LogNorm(low, positive[-1])}
                grid = [[max(v, FLOOR) for v in line] for line in grid]
            _map(figure, axis, xs, ys, grid, values["norm_total"], points, unit, **colours)
            if _orthogonal(csv_path):
                axis.set_aspect("equal")
    save_figure(figure, path)


def plot_surface(path, csv_path):
    """The train KL over the plane as a surface in three dimensions, its height on a log scale."""
    import numpy as np

    xs, ys, values = _grid(csv_path)
    if len(xs) < 2 or len(ys) < 2:
        raise InputError(f"{csv_path}: a surface needs at least 2 x 2 points")
    figure, axis = new_figure(1, subplot_kw={"projection": "3d"})
    height = np.log10(np.maximum(np.array(values["train_kl"]), FLOOR))
    height = np.maximum(height, np.nanmax(height) - 4)  # the teacher's 0 would be a hole without a bottom
    axis.plot_surface(*np.meshgrid(xs, ys), height, cmap="viridis", linewidth=0)
    axis.set(xlabel="x", ylabel="y", zlabel="log10 of the train KL")
    save_figure(figure, path)
