"""Figures, drawn from the CSV logs; matplotlib is an optional extra."""

from rtd.errors import InputError
from rtd.files import atomic_write
from rtd.logs import mean_and_std, read_csv

# Okabe and Ito's colours, which colour-blind readers tell apart.
STUDENT, TEACHER, INPUT, LOSS = "#0072B2", "#D55E00", "#555555", "#009E73"


def available():
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _figure(columns, **options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(4.2 * columns, 3.3), layout="constrained", **options)


def _save(figure, path):
    from matplotlib import pyplot

    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})  # the same bytes for the same data
    pyplot.close(figure)


def _line(axis, logs, column, color, label, style="-"):
    """Mean over logs of ``column`` against the epoch, with a band of one standard deviation."""
    epochs = [row["epoch"] for row in logs[0] if row[column] is not None]
    values = [[row[column] for row in log if row[column] is not None] for log in logs]
    if not epochs or any(len(v) != len(epochs) for v in values):
        return
    stats = [mean_and_std(at_epoch) for at_epoch in zip(*values, strict=True)]
    mean = [m for m, _ in stats]
    axis.plot(epochs, mean, style, color=color, label=label, linewidth=1.6)
    if len(logs) > 1:
        axis.fill_between(epochs, [m - s for m, s in stats], [m + s for m, s in stats], color=color, alpha=0.2, linewidth=0)


def plot_curves(log_paths, path, title=""):
    """Fig. 1: test accuracy of both probes for student, teacher and input against the epoch, and the KL, as a PNG.

    ``log_paths``: log.csv of one run, or of several seeds (mean and band).
    """
    logs = [read_csv(p) for p in log_paths]
    if not all(logs):
        raise InputError(f"{log_paths[0]} has no rows to draw")
    figure, axes = _figure(3)
    for axis, probe, name in zip(axes, ("linear", "knn"), ("linear probe", "k-NN probe"), strict=False):
        _line(axis, logs, f"student_{probe}", STUDENT, "student")
        _line(axis, logs, f"teacher_{probe}", TEACHER, "teacher", "--")
        _line(axis, logs, f"input_{probe}", INPUT, "input pixels", ":")
        axis.set(xlabel="epoch", ylabel="test accuracy (%)", title=name)
        if axis.lines:
            axis.legend(frameon=False)
    trained = [[row for row in log if row["epoch"] > 0] for log in logs]  # at its start a student is its teacher: KL 0
    _line(axes[2], trained, "kl", LOSS, "KL")
    axes[2].set(xlabel="epoch", ylabel="KL(teacher || student), nats", title="distillation loss", yscale="log")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)
