"""Pictures of landscape.csv: Fig. 5's panels, train KL above and probe accuracy below, and the KL as a surface."""

import math
from pathlib import Path

from rtd.errors import InputError
from rtd.logs import read_csv
from rtd.plots import new_figure, save_figure

FLOOR = 1e-12  # of the KL on the log scale: at the teacher it is 0


def _grid(path):
    """(x values, y values, {column: rows of values}) of a landscape.csv; points that are missing are nan."""
    rows = read_csv(path)
    if not rows or not {"i", "j", "x", "y", "train_kl", "norm_total"} <= set(rows[0]):
        raise InputError(f"{path} holds no landscape to draw")
    xs = {row["i"]: row["x"] for row in rows}
    ys = {row["j"]: row["y"] for row in rows}
    values = {}
    for column in ("train_kl", "linear", "knn", "norm_total"):
        found = {(row["i"], row["j"]): row.get(column) for row in rows}
        grid = [[found.get((i, j)) for i in sorted(xs)] for j in sorted(ys)]
        values[column] = [[math.nan if v is None else v for v in line] for line in grid]
    return [xs[i] for i in sorted(xs)], [ys[j] for j in sorted(ys)], values


def _points(path):
    """[(name, x, y)] of the three networks, from points.csv beside the landscape."""
    beside = Path(path).with_name("points.csv")
    return [(row["name"], row["x"], row["y"]) for row in read_csv(beside)] if beside.exists() else []


def _math(name):
    """theta*_S(0) as matplotlib sets formulas."""
    return "$" + name.replace("theta*", r"\theta^*").replace("theta_", r"\theta_") + "$"


def _finite(grid):
    return [v for line in grid for v in line if math.isfinite(v)]


def plot(path, csv_paths, orthogonal=False):
    """One column for each landscape.csv: train KL (log colours) above, probe accuracy below, contours of |theta|.

    orthogonal: equal scales on both axes, as distances are those of parameter space.
    """
    from matplotlib.colors import LogNorm

    figure, axes = new_figure(len(csv_paths), rows=2, squeeze=False)
    for column, csv_path in enumerate(csv_paths):
        xs, ys, values = _grid(csv_path)
        probe = next((name for name in ("knn", "linear") if _finite(values[name])), None)
        for axis, name, title in ((axes[0][column], "train_kl", "train KL"), (axes[1][column], probe, f"{probe} probe")):
            if name is None:
                axis.set_axis_off()
                continue
            grid = values[name]
            if name == "train_kl":
                grid = [[max(v, FLOOR) for v in line] for line in grid]
                positive = sorted(v for v in _finite(grid) if v > FLOOR) or [FLOOR, 1.0]
                low = max(positive[0], 1e-4 * positive[-1])
                image = axis.pcolormesh(xs, ys, grid, norm=LogNorm(low, positive[-1]), cmap="viridis", shading="nearest")
            else:
                image = axis.pcolormesh(xs, ys, grid, cmap="cividis", shading="nearest")
            figure.colorbar(image, ax=axis, label="nats" if name == "train_kl" else "test accuracy (%)")
            if len(xs) > 1 and len(ys) > 1:
                lines = axis.contour(xs, ys, values["norm_total"], levels=6, colors="white", linewidths=0.6, alpha=0.8)
                axis.clabel(lines, fontsize="x-small", fmt="%.0f")
            for label, x, y in _points(csv_path):
                inside = xs[0] <= x <= xs[-1] and ys[0] <= y <= ys[-1]
                if inside:
                    axis.plot(x, y, "o", color="#D55E00", markeredgecolor="white", markersize=6)
                    left = x > (xs[0] + xs[-1]) / 2
                    place = {"xytext": (-6 if left else 6, 6), "textcoords": "offset points", "ha": "right" if left else "left"}
                    axis.annotate(_math(label), (x, y), color="white", **place)
            axis.set(title=f"{Path(csv_path).parent.name}: {title}", xlabel="x", ylabel="y")
            if orthogonal:
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
