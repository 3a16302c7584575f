"""The paper's figures: rows of CSV logs in, a matplotlib figure out.

Colours are Okabe and Ito's, viridis and cividis, which colour-blind readers tell apart. Bands and
error bars are one sample standard deviation. matplotlib is optional, so functions import it.
"""

import itertools
import re

import numpy as np

from rtd.errors import InputError

# The metadata of each format that would change the bytes from day to day.
FORMATS = {"png": "Software", "pdf": "Creator Producer CreationDate", "svg": "Creator Date"}
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.5,
    "legend.frameon": False,
    "lines.markersize": 5,
    "savefig.bbox": "tight",
    "savefig.dpi": 130,
    "svg.hashsalt": "rtd",
}
BLUE, RED, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
KINDS = {"student": BLUE, "random": RED, "student-init": PINK, "teacher": GREEN}
MARKERS = {"-": "o", "--": "s", ":": "^", "-.": "D"}
LOOKS = [{"linestyle": style, "marker": marker} for style, marker in MARKERS.items()]
FEATURES = {"student": {"color": BLUE}, "teacher": {"color": RED}, "input pixels": {"color": GREY}}
PARTS = {"encoder": {"color": BLUE}, "head": {"color": GREEN}}
PROBE_TITLES = {"linear": "linear probe", "knn": "k-NN probe"}
ACCURACY = "test accuracy (%)"
LABELS = {"kl": "KL(teacher || student), nats", "distance": "distance from the start"}
KL = {"kl": "distillation loss"}


def draw(make, arguments, file, format="png"):
    """Write the figure make(*arguments) into ``file``, a path or binary file.

    The same data give the same bytes, whatever matplotlib's settings are; they stay as they were.
    """
    from matplotlib import style

    with style.context(["default", STYLE]):
        metadata = dict.fromkeys(FORMATS[format].split())
        make(*arguments).savefig(file, format=format, metadata=metadata)


def _figure(columns, title, width=3.6, **options):
    """(figure, its axes side by side), with room for a legend on the right."""
    from matplotlib.figure import Figure

    figure = Figure((width * columns + 2, 3.4), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def _legend(figure, looks, seeds=(1,), place="center"):
    """A legend of ``looks``, {label: look of a line}, on the right of all axes, off the data."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    n = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    title = f"mean and standard\ndeviation, n = {n}" if n != "1" else None
    figure.legend(handles=lines, title=title, loc=f"outside right {place}")


def _line(axis, samples, **look):
    """The mean of ``samples``, {x: [values]}, with a band, or bars if no line joins the points."""
    xs, values = zip(*sorted(samples.items()), strict=True)
    mean, std = np.transpose([(np.mean(v), np.std(v, ddof=len(v) > 1)) for v in values])
    if len(xs) >= 15:
        look["marker"] = ""
    axis.plot(xs, mean, **look)
    if std.any() and look["linestyle"]:
        axis.fill_between(xs, mean - std, mean + std, color=look["color"], alpha=0.2, linewidth=0)
    elif std.any():
        axis.errorbar(xs, mean, std, color=look["color"], fmt="none")


def _samples(rows, x, y, *keys):
    """{values of ``keys``: {x: [y of each row that has one]}}."""
    found = {}
    for row in rows:
        if row[y] is not None:
            series = found.setdefault(tuple(row.get(key) for key in keys), {})
            series.setdefault(row[x], []).append(row[y])
    return found


def _history(logs, column, first=0, x="epoch"):
    """{x: [value of each log]} where all have one, from epoch ``first`` on; or the start alone."""
    rows = [row for log in logs for row in log if row["epoch"] >= first or len(log) == 1]
    found = _samples(rows, x, column).get((), {})
    return {x: values for x, values in found.items() if len(values) == len(logs)}


def best_and_final(rows, column):
    """Maximum over the epochs after training began (what the authors report), and last value."""
    values = [value for (value,) in _history([rows], column, 1).values()]
    return max(values), values[-1]


def _log_scale(axis):
    """A log scale with readable ticks, which cuts off values below 1e-4 of the largest."""
    if axis.dataLim.y1 > 0:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 1e-4 * high))
        axis.yaxis.get_minor_formatter().minor_thresholds = 1.5, 0.5  # decades


def _label(column):
    """What a column measures; those that ``LABELS`` does not name are accuracies."""
    return LABELS.get(column.split("_")[0], ACCURACY)


def _over_time(axis, lines, column, title):
    """``column`` against the epoch, or step if epochs differ in length; lines: (logs, look)."""
    ends = [log[-1] for logs, _ in lines for log in logs]
    x = "step" if len({e["step"] / e["epoch"] for e in ends if e["epoch"]}) > 1 else "epoch"
    for logs, look in lines:  # at the start, next to the teacher, a KL is almost 0
        _line(axis, _history(logs, column, column in KL, x), **look)
    axis.set(title=title, xlabel=x, ylabel=_label(column))
    axis.locator_params("x", integer=True, min_n_ticks=1)
    if column in KL:
        _log_scale(axis)


def _probed(logs, first=0):
    """The probes that all ``logs`` have results of, from epoch ``first`` on."""
    if not logs or not all(logs):
        raise InputError("no picture is drawn: a run has no epoch in its log yet")
    return [p for p in PROBE_TITLES if all(_history([log], f"student_{p}", first) for log in logs)]


def curves(logs, title=""):
    """Fig. 1: both probes of student, teacher and input, and the KL, against the epoch.

    logs: the rows of log.csv of each seed.
    """
    probed = _probed(logs)
    figure, axes = _figure(len(probed) + 1, title)
    _over_time(axes[-1], [(logs, LOOKS[0] | {"color": GREEN})], "kl", KL["kl"])
    for axis, probe in zip(axes, probed, strict=False):
        there = [[row for row in log if row[f"student_{probe}"] is not None] for log in logs]
        for name, color in reversed(FEATURES.items()):  # the student on top
            lines = [(there, LOOKS[0] | color)]
            _over_time(axis, lines, f"{name.split()[0]}_{probe}", PROBE_TITLES[probe])
    if probed:
        _legend(figure, FEATURES, [len(logs)])
    return figure


def short(value):
    """A flag's value as short text; None, which is what no flag gives, as "default"."""
    return "default" if value is None else str(value).removesuffix(".0")


def _sweep(names, groups, title, times, ends, parts):
    """A panel over time for each of ``times``, {column: title}, and one against the last flag for
    each of ``ends``, {title: columns}, of the final accuracies or distances of ``parts``.

    The last flag is the colour over time. The others are line style and marker everywhere.
    """
    from matplotlib import colormaps

    *others, last = (name.replace("_", " ") for name in names)
    values = list(dict.fromkeys(key[-1] for key in groups))
    numbers = all(isinstance(value, (int, float)) for value in values)
    places = dict(zip(values, values if numbers else range(len(values)), strict=True))
    colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(values)))  # as in Fig. 3
    colors = dict(zip(values, colors, strict=True))
    settings = dict.fromkeys(key[:-1] for key in groups)  # values of the other flags
    looks = dict(zip(settings, itertools.cycle(LOOKS), strict=False))
    figure, axes = _figure(len(times) + len(ends), title)
    lines = [(logs, looks[k[:-1]] | {"color": colors[k[-1]]}) for k, logs in groups.items()]
    for axis, panel in zip(axes, times.items(), strict=False):
        _over_time(axis, lines, *panel)
    legend = {f"{last} = {short(value)}": {"color": color} for value, color in colors.items()}
    for setting, look in looks.items() if others else ():
        words = [f"{name} = {short(v)}" for name, v in zip(others, setting, strict=True)]
        legend["\n".join(words)] = look | {"color": GREY}
    _legend(figure, legend, [*map(len, groups.values())], "upper")
    bare = {} if numbers else {"linestyle": ""}  # no line joins categories
    labels = [short(value) for value in values]
    slanted = {"rotation": 30, "ha": "right"} if len("".join(labels)) > 30 else {}
    for axis, (heading, columns) in zip(axes[len(times) :], ends.items(), strict=True):
        for (part, color), (setting, look) in itertools.product(parts.items(), looks.items()):
            column = columns.format(part.split()[0])
            final = {
                places[key[-1]]: [best_and_final(log, column)[1] for log in logs]
                for key, logs in groups.items()
                if key[:-1] == setting
            }
            _line(axis, final, **look | color | bare)
        if numbers and last != "alpha":  # sizes and learning rates vary by factors
            axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(list(places.values()), labels, **slanted)
        axis.set(title=heading, xlabel=last, ylabel=_label(columns))
    if ends:
        shown = {part: LOOKS[0] | color | bare for part, color in parts.items()}
        _legend(figure, shown, place="lower")
    return figure


def sweep(names, groups, title=""):
    """Figs. 3, 4, 10, 11, 12, Table 5: the student over time, and both probes' final values.

    names: the flags that vary, but for the seed. groups: {their values: [rows of each log.csv]}.
    """
    probed = _probed(sum(groups.values(), []), first=1)
    times = {f"student_{p}": f"student, {PROBE_TITLES[p]}" for p in probed[:1]} or KL
    ends = {f"{PROBE_TITLES[p]}, final epoch": f"{{}}_{p}" for p in probed}
    return _sweep(names, groups, title, times, ends, FEATURES)


def dynamics(names, groups, title=""):
    """Fig. 17: KL and distance from the start over time, the distances of both parts in the end."""
    _probed(sum(groups.values(), []))
    times = KL | {"distance_total": "all parameters"}
    return _sweep(names, groups, title, times, {"final epoch": "distance_{}"}, PARTS)


def _with_kind(rows):
    """Rows with the "kind" of their init: PATH:student is a student, and random:1 is random."""
    if not rows:
        raise InputError("no picture is drawn: there are no results yet")
    return [row | {"kind": re.sub(r".*:(?=\D)|:\d+$", "", row["init"])} for row in rows]


def imp(rows, title=""):
    """Fig. 8: test accuracy against the weights that remain, for each kind of start and rewind.

    rows: of imp.csv. Starts of one kind are averaged.
    """
    rows = [row | {"left": 100 * (1 - row["sparsity"])} for row in _with_kind(rows)]
    chains = _samples(rows, "left", "test_accuracy", "kind", "rewind_epoch", "control")
    rewinds = sorted({rewind for _, rewind, _ in chains})
    figure, (axis,) = _figure(1, title, width=5)
    for (kind, rewind, control), chain in chains.items():
        look = LOOKS[rewinds.index(rewind) % len(LOOKS)] | {"color": KINDS[kind]}
        label = f"{kind}, rewound to epoch {rewind}"
        if control:
            look |= {"markerfacecolor": "white", "linewidth": 0.8}
            label += ",\nmasks shuffled"
        if (n := max(map(len, chain.values()))) > 1:
            label += f", mean of {n}"
        _line(axis, chain, label=label, **look)
    axis.set(xscale="log", xlabel="weights remaining (%)", ylabel=ACCURACY)
    axis.invert_xaxis()
    axis.minorticks_off()
    left = sorted({row["left"] for row in rows})
    axis.set_xticks(left[:: -max(1, round(len(left) / 8))])  # at rounds
    axis.xaxis.set_major_formatter("{x:.3g}")
    figure.legend(loc="outside right center")
    return figure


def lmc(rows, title=""):
    """Fig. 9: test error on the line between two runs, a panel for each kind of start.

    rows: of lmc.csv. Pairs of runs are thin and their mean is thick, with a line style for each
    treatment of batch norm.
    """
    rows = _with_kind(rows)
    shown = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = _figure(len(shown), title, sharey=True)
    axes[0].set_ylabel("test error (%)")
    several = len({(row["init"], row["i"], row["j"]) for row in rows}) > len(shown)
    looks = {}
    for pair in [(), ("init", "i", "j")][: 1 + several]:
        lines = _samples(rows, "gamma", "test_error", "bn", "kind", *pair)
        for (bn, kind, *_), line in lines.items():
            look = {"linewidth": 0.6 if pair else 2.2}
            look["linestyle"] = "--" if bn == "interpolate" else "-"
            label = "one pair" if pair or not several else f"mean of {len(line[0])} pairs"
            looks[f"{label},\nbatch norm: {bn}"] = look | {"color": GREY}
            mean = {gamma: [np.mean(errors)] for gamma, errors in line.items()}
            axis = axes[shown.index(kind)]
            _line(axis, mean, color=KINDS[kind], **look)
            axis.set(title=kind, xlabel="position gamma on the line\nbetween two runs")
    _legend(figure, looks)
    return figure


def _map(axis, xs, ys, grid, norms, networks, label, orthogonal):
    """``grid`` (H, W) in colours, contours of ``norms``, and the networks."""
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    look, extend = {"cmap": "cividis"}, "neither"
    if "KL" in label:  # the few points next to the teacher would take the whole scale
        high = np.nanmax(grid, initial=1e-12)
        low = np.clip(np.nanpercentile(grid, 1), 1e-6 * high, high / 2)
        look, extend = {"cmap": "viridis", "norm": LogNorm(low, high, clip=True)}, "min"
    image = axis.pcolormesh(xs, ys, grid, **look)
    axis.figure.colorbar(image, ax=axis, label=label, extend=extend)
    axis.clabel(axis.contour(xs, ys, norms, 5, colors="white", linewidths=0.6), fontsize=7)
    kind = "distance" if orthogonal else "interpolation"
    axis.set(xlabel=f"x ({kind}); contours: |theta|", ylabel=f"y ({kind})")
    axis.set_box_aspect(np.clip(np.ptp(ys) / np.ptp(xs), 0.25, 2) if orthogonal else 1)
    look = {"color": "white", "path_effects": [withStroke(linewidth=2, foreground="black")]}
    look |= {"fontsize": 11, "ha": "center", "va": "center", "textcoords": "offset points"}
    for place, name in networks.items():
        axis.plot(*place, "o", color=RED, markeredgecolor="white", markersize=7)
        away = np.where(place > np.mean([*networks], 0), (9, 13), (-9, -13))  # from each other
        axis.annotate(name, place, away, **look)


def _cut(axis, xs, ys, grid, networks, label):
    """A single row or column of a landscape as a curve; the networks on it are named above."""
    i = int(len(xs) == 1)  # 0: along x, 1: along y
    axis.plot((xs, ys)[i], grid.ravel(), "o-", color=BLUE)
    places = [place[i] for place in networks]
    for place in places:
        axis.axvline(place, color=RED, linewidth=0.8)
    axis.secondary_xaxis("top").set_xticks(places, networks.values())
    axis.set(xlabel="xy"[i], ylabel=label)
    if "KL" in label:
        _log_scale(axis)


def landscapes(panels):
    """Figs. 5, 13 to 16: train KL (log colours) and both probes, a row for each landscape.

    panels: dicts {"rows": of landscape.csv, "points": of points.csv, "orthogonal": whether x and y
    are distances, "loss": what train_kl is, "title": str}. A single row or column is a curve.
    """
    from matplotlib.figure import Figure

    if not all(panel["rows"] for panel in panels):
        raise InputError("no picture is drawn: a landscape has no points yet")
    rows = [row for panel in panels for row in panel["rows"]]
    labels = {"train_kl": ""} | {p: f"{name},\n{ACCURACY}" for p, name in PROBE_TITLES.items()}
    shown = [name for name in labels if any(row[name] is not None for row in rows)]
    figure = Figure((4 * len(shown), 3.4 * len(panels)), layout="compressed")
    figure.suptitle("\n".join(dict.fromkeys(panel["title"] for panel in panels)))
    columns = "x", "y", *shown, "norm_total"
    grid_of_axes = figure.subplots(len(panels), len(shown), squeeze=False)
    for axes, panel in zip(grid_of_axes, panels, strict=True):
        x, y, *found = np.array([[row[c] for c in columns] for row in panel["rows"]], float).T
        (xs, i), (ys, j) = (np.unique(place, return_inverse=True) for place in (x, y))
        grids = np.full((len(found), len(ys), len(xs)), np.nan)
        grids[:, j, i] = found  # points that are missing stay nan
        networks = {}
        for row in panel["points"]:
            if xs[0] <= row["x"] <= xs[-1] and ys[0] <= row["y"] <= ys[-1]:
                name = str(row["name"]).replace("theta", r"\theta").replace("*", "^*")
                networks[row["x"], row["y"]] = f"${name}$"
        for axis, name, grid in zip(axes, shown, grids, strict=False):
            label = labels[name] or f"{panel['loss']}, nats"
            if not np.isfinite(grid).any():
                axis.set_axis_off()
            elif 1 in grid.shape:
                _cut(axis, xs, ys, grid, networks, label)
            else:
                _map(axis, xs, ys, grid, grids[-1], networks, label, panel["orthogonal"])
    return figure
