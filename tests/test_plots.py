"""The figures: what they draw is what the rows hold, and what is drawn is named."""

import io
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from rtd import plots
from rtd.errors import InputError

matplotlib = pytest.importorskip("matplotlib")
NETWORKS = ["student", "teacher", "input pixels"]


def log(seed=0, epochs=6, steps=10, probes=("linear", "knn")):
    """Rows of a log.csv of a student that starts as its teacher and is probed every other epoch."""
    rng, rows = np.random.default_rng(seed), []
    for epoch in range(epochs + 1):
        row = {"epoch": epoch, "step": steps * epoch, "kl": epoch and rng.uniform(2e-5, 9e-5)}
        row |= {f"distance_{part}": epoch + seed for part in ("encoder", "head", "total")}
        for name in (f"{name.split()[0]}_{p}" for name in NETWORKS for p in ("linear", "knn")):
            known = name.split("_")[1] in probes and not (name[0] == "s" and epoch % 2)
            row[name] = rng.uniform(20, 50) if known else None
        rows.append(row)
    return rows


def results(init, values, **more):
    """Rows of imp.csv and lmc.csv, as far as they are drawn."""
    row = {"init": init, "rewind_epoch": 0, "bn": "recompute", "i": 0, "j": 1} | more
    rows = [row | {"test_accuracy": value, "test_error": value} for value in values]
    return [row | {"sparsity": 1 - 0.8**i, "gamma": i / 2} for i, row in enumerate(rows)]


def panel(xs=(-1, 0, 1), ys=(0, 2, 4), linear=None, orthogonal=False):
    grid = [(x, y) for x in xs for y in ys]
    rows = [{"x": x, "y": y, "train_kl": 1e-4 * (x * x + y), "linear": linear} for x, y in grid]
    rows = [row | {"knn": 20 + row["x"] + row["y"], "norm_total": 6 + row["y"]} for row in rows]
    points = [{"name": name, "x": x, "y": 0} for x, name in enumerate(("theta_T", "theta*_S(0)"))]
    return {"rows": rows, "points": points, "orthogonal": orthogonal, "loss": "KL", "title": ""}


RUNS = {5: [log(1, 6, 10)], 50: [log(0, 3, 20)]}  # epochs of 10 and of 20 steps
SWEEP = {(data, n): RUNS[n] for data in ("cifar10", "noise") for n in RUNS}
NORMS = {("none",): [log(0), log(1)], (None,): [log(2), log(4)]}
FIGURES = {  # arguments that draw something, and that do not
    "curves": (([log(0), log(1), log(2)], "VGG11 on CIFAR-10"), ([log(), []],)),
    "sweep": ((["dataset", "out_dim"], SWEEP), (["lr"], {})),
    "dynamics": ((["norm"], NORMS), (["lr"], {(1.0,): [[]]})),
    "imp": ((results("a:student", (50, 40)),), ([],)),
    "lmc": ((results("random", (1, 2)),), ([],)),
    "landscapes": (([panel()],), ([panel() | {"rows": []}],)),
}


def drawn(axis):
    """{(colour, style): points} of the lines that have points; a legend's entries have none."""
    lines = [one for one in axis.lines if len(one.get_xdata())]
    return {(str(one.get_color()), one.get_linestyle()): one.get_xydata() for one in lines}


def words(texts):
    return [text.get_text() for text in texts]


def legends(figure):
    """Their texts, after a look whether they cover any data."""
    figure.draw_without_rendering()
    right = max(axis.get_tightbbox().x1 for axis in figure.axes)
    assert all(right <= legend.get_window_extent().x0 for legend in figure.legends)
    return [words(legend.get_texts()) for legend in figure.legends]


def test_curves_are_mean_and_band_of_the_seeds_with_whole_epochs_and_readable_ticks():
    figure = plots.curves(*FIGURES["curves"][0])
    assert legends(figure) == [NETWORKS] and figure.get_suptitle() == "VGG11 on CIFAR-10"
    assert words(axis.title for axis in figure.axes)[:2] == ["linear probe", "k-NN probe"]
    for axis, probe in zip(figure.axes, ("linear", "knn"), strict=False):
        edges = np.concatenate([band.get_paths()[0].vertices for band in axis.collections])[:, 1]
        networks = reversed(NETWORKS)  # the student on top
        for name, points in zip(networks, drawn(axis).values(), strict=True):
            logs, column = FIGURES["curves"][0][0], f"{name.split()[0]}_{probe}"
            values = np.array([[row[column] for row in rows[::2]] for rows in logs])
            np.testing.assert_allclose(points, np.transpose([(0, 2, 4, 6), values.mean(0)]))
            for edge in np.outer((-1, 1), values.std(0, ddof=1)) + values.mean(0):
                assert np.isclose(edges[:, None], edge).any(0).all()
    kl = figure.axes[2]
    assert kl.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5, 6]  # the start's KL of 0 is no loss
    for epochs, probes in ((0, ("knn",)), (1, ())):  # no panel for what was not probed
        figure = plots.curves([log(epochs=epochs, probes=probes)])
        figure.draw_without_rendering()
        assert len(figure.axes) == 1 + len(probes)
        assert "." not in "".join(words(figure.axes[0].get_xticklabels()))


def test_two_flags_are_colour_and_style_and_runs_of_unequal_epochs_are_drawn_over_steps():
    figure = plots.sweep(*FIGURES["sweep"][0])
    first, _, knn = figure.axes
    colors, styles = (set(part) for part in zip(*drawn(first), strict=True))
    assert len(colors) == 2 and styles == {"-", "--"} and len(drawn(first)) == 4
    assert {tuple(points[:, 0]) for points in drawn(first).values()} == {(0, 20, 40, 60), (0, 40)}
    flags = ["dataset = cifar10", "dataset = noise"]
    assert legends(figure) == [["out dim = 5", "out dim = 50", *flags], NETWORKS]
    final = [[n, RUNS[n][0][2::2][-1]["student_knn"]] for n in (5, 50)]
    assert drawn(knn)[plots.BLUE, "--"].tolist() == final and first.get_xlabel() == "step"
    figure = plots.sweep(["alpha"], {(0.0,): [log(probes=())]})  # without probes: the KL
    assert figure.axes[0].get_yscale() == "log" and legends(figure) == [["alpha = 0"]]
    # Categories have bars and no line that joins them.
    figure = plots.dynamics(*FIGURES["dynamics"][0])
    assert legends(figure) == [["norm = none", "norm = default"], ["encoder", "head"]]
    assert {style for _, style in drawn(figure.axes[2])} == {"None"}
    bars = [path.vertices[:, 1] for path in figure.axes[2].collections[0].get_paths()]
    assert np.allclose(bars, [[6.5 - 0.5**0.5, 6.5 + 0.5**0.5], [9 - 2**0.5, 9 + 2**0.5]])


def test_tickets_are_means_of_starts_and_lines_between_runs_are_thin_and_their_mean_thick():
    rows = results("a:student", (50, 40)) + results("b:student", (54, 44))
    rows += results("random:1", (30, 20)) + results("a:student", (60, 40), rewind_epoch=2)
    rows += results("a:student", (9, 8), control="shuffle")
    figure = plots.imp(rows)
    name, (axis,) = "student, rewound to epoch", figure.axes
    found = {f"{name} 0, mean of 2", f"{name} 2", f"{name} 0,\nmasks shuffled"}
    assert set(legends(figure)[0]) == found | {"random, rewound to epoch 0"}
    values = sorted(one.get_ydata().tolist() for one in axis.lines if len(one.get_xdata()))
    assert sorted(map(sorted, values)) == [[8, 9], [20, 30], [40, 60], [42, 52]]
    (band,) = axis.collections  # one start alone has none
    assert np.isclose(band.get_paths()[0].vertices, (100, 52 + 8**0.5)).all(1).any()
    rows = results("random", (1, 5)) + results("random", (3, 9), j=2)
    rows += results("x:student", (0, 99), bn="none")
    figure = plots.lmc(rows)
    left, right = figure.axes
    assert words((left.title, right.title)) == ["random", "student"]
    assert left.get_ylim() == right.get_ylim() and "gamma on the line" in left.get_xlabel()
    found = sorted((one.get_linewidth() > 1, *one.get_ydata()) for one in left.lines)
    assert found == [(False, 1, 5), (False, 3, 9), (True, 2, 7)]
    names = {"mean of 2 pairs,\nbatch norm: recompute", "one pair,\nbatch norm: none"}
    assert names < set(legends(figure)[0])


def test_planes_show_kl_and_the_probes_there_are_with_the_networks_named():
    for orthogonal, linear, shape in ((False, 7.0, 1), (True, None, 2)):
        figure = plots.landscapes([panel(linear=linear, orthogonal=orthogonal)] * 2)
        maps = [axis for axis in figure.axes if axis.texts]
        assert len(maps) == (6 if linear else 4) and maps[0].get_box_aspect() == shape
        knn, norm = maps[-1].collections[0].get_array(), maps[0].collections[0].norm
        assert knn.tolist() == [[20 + x + y for x in (-1, 0, 1)] for y in (0, 2, 4)]
        assert norm.vmax == pytest.approx(5e-4) and 1e-10 < norm.vmin < 1e-4, "not the teacher's 0"
        *norms, first, second = sorted(words(maps[0].texts), key=len)
        assert {first, second} == {r"$\theta_T$", r"$\theta^*_S(0)$"} and "8.0" in norms
    for cut in {"ys": (0,)}, {"xs": (1,)}, {"xs": (0,), "ys": (0,)}:  # curves
        kl, knn = plots.landscapes([panel(**cut)]).axes
        assert kl.get_xlabel() == ("y" if "xs" in cut else "x")
        assert knn.lines[0].get_ydata().tolist() == [row["knn"] for row in panel(**cut)["rows"]]
        probed, *_ = plots.landscapes([panel(**cut), panel(**cut, linear=7.0)]).axes[1::3]
        assert not probed.axison  # a cut without this probe


@pytest.mark.parametrize("draw", FIGURES)
def test_same_data_give_same_bytes_nothing_global_changes_and_no_rows_are_refused(
    monkeypatch, draw
):
    before, make = dict(matplotlib.rcParams), getattr(plots, draw)
    arguments, nothing = FIGURES[draw]
    for form in plots.FORMATS if draw == "imp" else ["png"]:
        files = [io.BytesIO(), io.BytesIO()]
        for file, when in zip(files, ("0", "86400"), strict=True):
            monkeypatch.setenv("SOURCE_DATE_EPOCH", when)
            plots.draw(make, arguments, file, form)
        assert files[0].getvalue() == files[1].getvalue()
    assert dict(matplotlib.rcParams) == before and before["svg.hashsalt"] is None
    with pytest.raises(InputError, match="no picture is drawn: "):
        make(*nothing)


def test_importing_waits_for_no_library_and_pyplot_is_not_needed():
    code = """if True:
        import io, sys; from rtd import plots; import rtd.harness.datasets
        assert not {"matplotlib", "torchvision", "PIL", "sklearn"} & {*sys.modules}
        row = dict(init="a:student", sparsity=0, rewind_epoch=0, test_accuracy=1)
        plots.draw(plots.imp, [[row]], io.BytesIO())
        assert "matplotlib.pyplot" not in sys.modules """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
