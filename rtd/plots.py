"""Figures, drawn from the CSV logs; matplotlib is an optional extra."""

from rtd.errors import InputError
from rtd.files import atomic_write
from rtd.logs import mean_and_std, read_csv

# Okabe and Ito's colours, which colour-blind readers tell apart.
STUDENT, TEACHER, INPUT, LOSS = "#0072B2", "#D55E00", "#555555", "#009E73"
KINDS = {"student": STUDENT, "random": TEACHER, "student-init": TEACHER, "teacher": LOSS}
STYLES = ("-", "--", "-.", ":")


def available():
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(columns, rows=1, **options):
    """(figure, axes) of ``rows`` x ``columns`` panels, on matplotlib's own canvas: no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), layout="constrained", **options)


def save_figure(figure, path):
    """Write ``figure`` to ``path`` as a PNG and close it."""
    from matplotlib import pyplot

    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})  # the same bytes for the same data
    pyplot.close(figure)


def line(axis, logs, column, color, label, style="-"):
    """Mean over logs of ``column`` against the epochs where all have it, with a band of one standard deviation."""
    found = [{row["epoch"]: row[column] for row in log if row[column] is not None} for log in logs]
    epochs = [epoch for epoch in found[0] if all(epoch in values for values in found)]
    if not epochs:
        return
    values = [[values[epoch] for epoch in epochs] for values in found]
    stats = [mean_and_std(at_epoch) for at_epoch in zip(*values, strict=True)]
    mean = [m for m, _ in stats]
    axis.plot(epochs, mean, style, color=color, label=label, linewidth=1.6)
    if len(logs) > 1:
        axis.fill_between(epochs, [m - s for m, s in stats], [m + s for m, s in stats], color=color, alpha=0.2, linewidth=0)


def plot_curves(path, log_paths, title=""):
    """Fig. 1: test accuracy of both probes for student, teacher and input against the epoch, and the KL, as a PNG.

    ``log_paths``: log.csv of one run, or of several seeds (mean and band).
    """
    logs = [read_csv(p) for p in log_paths]
    if not all(logs):
        raise InputError(f"{log_paths[0]} has no rows to draw")
    figure, axes = new_figure(3)
    for axis, probe, name in zip(axes, ("linear", "knn"), ("linear probe", "k-NN probe"), strict=False):
        line(axis, logs, f"student_{probe}", STUDENT, "student")
        line(axis, logs, f"teacher_{probe}", TEACHER, "teacher", "--")
        line(axis, logs, f"input_{probe}", INPUT, "input pixels", ":")
        axis.set(xlabel="epoch", ylabel="test accuracy (%)", title=name)
        if axis.lines:
            axis.legend(frameon=False)
    trained = [[row for row in log if row["epoch"] > 0] for log in logs]  # at its start a student is its teacher: KL 0
    line(axes[2], trained, "kl", LOSS, "KL")
    axes[2].set(xlabel="epoch", ylabel="KL(teacher || student), nats", title="distillation loss", yscale="log")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)


def plot_imp(path, csv_path, kinds, title=""):
    """Fig. 8: final test accuracy against the weights that remain, a curve for each kind of start and rewind epoch.

    ``kinds``: {init as in the CSV: "student", "random" ...}. Starts of one kind are averaged (mean and band).
    """
    curves = {}  # (kind, rewind epoch) -> {weights left: accuracies}
    for row in read_csv(csv_path):
        curve = curves.setdefault((kinds[row["init"]], row["rewind_epoch"]), {})
        curve.setdefault(100 * (1 - row["sparsity"]), []).append(row["test_accuracy"])
    if not curves:
        raise InputError(f"{csv_path} has no rows to draw")
    rewinds = sorted({rewind for _, rewind in curves})
    figure, axis = new_figure(1)
    for (kind, rewind), curve in curves.items():
        left, stats = list(curve), [mean_and_std(values) for values in curve.values()]
        color, style = KINDS[kind], STYLES[rewinds.index(rewind) % len(STYLES)]
        marker = "s" if kind == "student-init" else "o"
        axis.plot(
            left, [m for m, _ in stats], style + marker, color=color, label=f"{kind}, l = {rewind}", markersize=3, linewidth=1.4
        )
        if all(s is not None for _, s in stats):
            axis.fill_between(left, [m - s for m, s in stats], [m + s for m, s in stats], color=color, alpha=0.2, linewidth=0)
    axis.set(xscale="log", xlabel="weights remaining (%)", ylabel="test accuracy (%)", title=title)
    axis.invert_xaxis()
    left = sorted({left for curve in curves.values() for left in curve}, reverse=True)
    axis.minorticks_off()
    axis.set_xticks(left[:: max(1, round(len(left) / 8))])  # at rounds
    axis.xaxis.set_major_formatter("{x:.3g}")
    axis.legend(frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def plot_lmc(path, csv_path, kinds, title=""):
    """Fig. 9: test error on the line between two runs against gamma: a panel a start, a thin line a pair, their mean thick.

    Batch norm's statistics recomputed if the CSV has that; if it has both, the mean with interpolated ones is dashed.
    """
    rows = read_csv(csv_path)
    if not rows:
        raise InputError(f"{csv_path} has no rows to draw")
    inits = list(dict.fromkeys(row["init"] for row in rows))
    treatments = sorted({row["bn"] for row in rows}, key=["recompute", "interpolate", "none"].index)
    figure, axes = new_figure(len(inits), sharey=True, squeeze=False)
    for axis, init in zip(axes[0], inits, strict=True):
        for bn, style in zip(treatments, STYLES, strict=False):
            lines = {}  # (i, j) -> [(gamma, error)]
            for row in rows:
                if (row["init"], row["bn"]) == (init, bn):
                    lines.setdefault((row["i"], row["j"]), []).append((row["gamma"], row["test_error"]))
            lines = [list(zip(*sorted(line), strict=True)) for line in lines.values()]
            for gamma, error in lines if bn == treatments[0] else ():
                axis.plot(gamma, error, color=KINDS[kinds[init]], alpha=0.4, linewidth=0.7)
            mean = [mean_and_std(errors)[0] for errors in zip(*(error for _, error in lines), strict=True)]
            axis.plot(lines[0][0], mean, style, color=KINDS[kinds[init]], linewidth=2.2, label=f"statistics: {bn}")
        axis.set(xlabel="gamma", title=kinds[init] if len(set(kinds.values())) == len(kinds) else init[-40:])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("test error (%)")
    if treatments != ["none"]:
        axes[0][0].legend(frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)
