"""The figures of a sweep: what the probes found, and how training went, for each value of the flags that varied."""

from rtd import cli
from rtd.errors import InputError
from rtd.logs import mean_and_std, read_csv
from rtd.plots import INPUT, LOSS, STUDENT, STYLES, TEACHER, line, new_figure, plot_curves, save_figure
from rtd.runs import best_and_final
from rtd.sweeps import label

SCALES = {"subset": "log", "lr": "log", "out_dim": "log"}


class _Sweep:
    """Runs by their settings: the last flag that varied is the x axis, each combination of the others a line."""

    def __init__(self, names, groups):
        self.x = names[-1]
        self.logs = {tuple(map(label, values)): [read_csv(path) for path in paths] for values, paths in groups.items()}
        if not all(rows for logs in self.logs.values() for rows in logs):
            raise InputError("a run of the sweep has no rows to draw")
        values = dict.fromkeys(values[-1] for values in groups)  # in the order of the command line
        self.numbers = all(isinstance(value, (int, float)) for value in values)
        self.places = {label(v): v if self.numbers else i for i, v in enumerate(values)}
        self.series = list(dict.fromkeys(key[:-1] for key in self.logs))

    def color(self, key):
        """Bright to dark with the value on the x axis, as in Fig. 3."""
        from matplotlib import colormaps

        index = list(self.places).index(key[-1])
        return colormaps["viridis_r"](0.1 + 0.9 * index / max(1, len(self.places) - 1))

    def style(self, key):
        return STYLES[self.series.index(key[:-1]) % len(STYLES)]

    def curves(self, axis, column, after=-1):
        """``column`` against the epoch, a line for each setting."""
        for key, logs in self.logs.items():
            rows = [[row for row in log if row["epoch"] > after] for log in logs]
            line(axis, rows, column, self.color(key), " ".join(key), self.style(key))
        axis.set(xlabel="epoch")
        if axis.lines and len(self.logs) <= 12:
            axis.legend(edgecolor="none", fontsize="x-small")  # on white, that lets curves shine through

    def summary(self, axis, columns, which):
        """The best (``which`` 0) or final (1) values of ``columns`` {name: (color, label)} against the flag on the x axis."""
        for column, (color, name) in columns.items():
            for series in self.series:
                points = [(self.places[key[-1]], logs) for key, logs in self.logs.items() if key[:-1] == series]
                points = [(x, [best_and_final(rows, column)[which] for rows in logs]) for x, logs in points if _has(logs, column)]
                if not points:
                    continue
                stats = [mean_and_std(values) for _, values in points]
                style = STYLES[self.series.index(series) % len(STYLES)] if self.numbers else ""
                text = " ".join((name, *series))
                at, means, spread = [x for x, _ in points], [m for m, _ in stats], [s or 0 for _, s in stats]
                axis.errorbar(at, means, spread, fmt=style + "o", color=color, label=text, markersize=4, capsize=2, linewidth=1.4)
        axis.set(xlabel=self.x.replace("_", " "))
        if self.numbers:
            axis.set(xscale=SCALES.get(self.x, "linear"))
            axis.minorticks_off()
        if not self.numbers or self.x in SCALES:  # a mark for each value
            axis.set_xticks(list(self.places.values()), list(self.places), rotation=30, ha="right", fontsize="x-small")
        if axis.lines:
            axis.legend(edgecolor="none", fontsize="x-small")  # on white, that lets curves shine through


def _has(logs, column):
    return all(any(row[column] is not None for row in rows) for rows in logs)


def _finish(figure, axes, path):
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def draw(args, names, groups, title):
    """The figures of a sweep into --out: sweep.png and dynamics.png, or for seeds alone (no ``names``) curves.png."""
    if names:
        cli.draw(args, plot_sweep, args.out / "sweep.png", names, groups)
        cli.draw(args, plot_dynamics, args.out / "dynamics.png", names, groups)
    else:
        cli.draw(args, plot_curves, args.out / "curves.png", groups[()], title)


def plot_sweep(path, names, groups):
    """Figs. 3, 4, 10, 11, 12, Table 5: the student's linear probe against the epoch, and both probes' best for each value.

    names, groups: ``rtd.sweeps.groups``. Mean and standard deviation over seeds.
    """
    sweep = _Sweep(names, groups)
    figure, axes = new_figure(3)
    sweep.curves(axes[0], "student_linear")
    axes[0].set(ylabel="test accuracy (%)", title="student, linear probe")
    for axis, probe, title in zip(axes[1:], ("linear", "knn"), ("linear probe", "k-NN probe"), strict=True):
        colors = {"student": STUDENT, "teacher": TEACHER, "input": INPUT}
        sweep.summary(axis, {f"{who}_{probe}": (color, who) for who, color in colors.items()}, 0)
        axis.set(ylabel="test accuracy (%)", title=f"{title}, best epoch")
    _finish(figure, axes, path)


def plot_dynamics(path, names, groups):
    """Fig. 17: KL and distance from the start against the epoch, and the final distances of encoder and head."""
    sweep = _Sweep(names, groups)
    figure, axes = new_figure(3)
    sweep.curves(axes[0], "kl", after=0)
    axes[0].set(ylabel="KL(teacher || student), nats", yscale="log", title="distillation loss")
    sweep.curves(axes[1], "distance_total")
    axes[1].set(ylabel="distance from the start", title="all parameters")
    parts = {"distance_encoder": (STUDENT, "encoder"), "distance_head": (LOSS, "head")}
    sweep.summary(axes[2], parts, 1)
    axes[2].set(ylabel="distance from the start", title="final epoch")
    _finish(figure, axes, path)
