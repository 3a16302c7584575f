"""run_lmc.py through its command line: the lines' ends, what is trained apart, killing and resuming, redrawing, refusing."""

import csv
import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import SUPERVISED
from processes import finish, kill_when, start, start_two
from test_run_distill import assert_same_tree

from rtd import logs, plots
from rtd.classifier import empty_classifier
from rtd.data import normalize, take
from rtd.datasets import load_dataset
from rtd.logs import read_csv
from rtd.models import materialize
from run_lmc import COLUMNS, batch_norm_images

FLAGS = [*SUPERVISED, "--epochs", "2", "--runs", "3", "--points", "5", "--bn-statistics", "recompute", "interpolate"]
FLAGS += ["--line-subset", "20"]
ENDS = [f"runs/init0-run{run}.pt" for run in range(3)]


@pytest.fixture(scope="module")
def lmc_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmc") / "run"
    out, _ = finish(start("run_lmc", *FLAGS, "--out", folder))
    (folder / "said").write_text(out)
    return folder


def test_all_pairs_at_all_points_and_the_ends_are_the_trained_networks(lmc_run):
    rows = read_csv(lmc_run / "lmc.csv")
    assert len(rows) == 3 * 2 * 5
    assert {(row["i"], row["j"]) for row in rows} == {(0, 1), (0, 2), (1, 2)}
    assert sorted({row["gamma"] for row in rows}) == [0, 0.25, 0.5, 0.75, 1]
    said = (lmc_run / "said").read_text()
    for run, name in enumerate(ENDS):
        accuracy = torch.load(lmc_run / name, weights_only=True)["training"]["accuracies"][-1]
        assert f"run {run}: test accuracy {accuracy:.2f} %" in said
        at_end = [
            row["test_error"]
            for row in rows
            if row["bn"] == "interpolate" and ((row["i"] == run and row["gamma"] == 0) or (row["j"] == run and row["gamma"] == 1))
        ]
        assert at_end == pytest.approx([100 - accuracy] * 2)
    losses = {row["gamma"]: row["test_loss"] for row in rows if (row["i"], row["j"], row["bn"]) == (0, 1, "recompute")}
    assert len(set(losses.values())) == 5


@pytest.mark.parametrize("bn", ["recompute", "interpolate"])
def test_a_point_is_the_mixture_of_its_ends_judged_on_both_splits(lmc_run, bn):
    """Written out with torch's own functions: weights by lerp, batch norm by averages over augmentation-free training images."""
    data = load_dataset("digits", subset=40, test_subset=30)
    ends = [torch.load(lmc_run / name, weights_only=True)["training"]["classifier"] for name in ENDS[:2]]
    network = materialize(empty_classifier({"encoder": "resnet20", "norm": None, "image_size": 32}, 10))
    network.load_state_dict({k: torch.lerp(a, ends[1][k], 0.25) if a.is_floating_point() else a for k, a in ends[0].items()})
    if bn == "recompute":
        images = batch_norm_images(data.train.images, 20, 16)
        assert len(images) == 32 and len(batch_norm_images(data.train.images, 1, 16)) == 16
        train = {tuple(image.flatten().tolist()) for image in data.train.images}
        assert len({tuple(image.flatten().tolist()) for image in images} & train) == 32
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # a plain average
        network.train()
        for batch in images.split(16):
            network(normalize(batch, data.mean, data.std))
    rows = read_csv(lmc_run / "lmc.csv")
    [row] = [r for r in rows if (r["bn"], r["i"], r["j"], r["gamma"]) == (bn, 0, 1, 0.25)]
    for name, split in (("train", take(data.train, 20, "line")), ("test", data.test)):
        with torch.no_grad():
            logits = network.eval()(normalize(split.images, data.mean, data.std))
        assert row[f"{name}_loss"] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-4)
        assert row[f"{name}_error"] == pytest.approx(100 * (logits.argmax(1) != split.labels).double().mean().item())
    assert row["train_loss"] != row["test_loss"]


def test_barriers_are_the_rise_over_the_mean_of_the_ends(lmc_run):
    rows = read_csv(lmc_run / "lmc.csv")
    found = {(row["bn"], row["statistic"], row["i"], row["j"]): row for row in read_csv(lmc_run / "barriers.csv")}
    for bn in ("recompute", "interpolate"):
        for split in ("train", "test"):
            barriers = []
            for i, j in ((0, 1), (0, 2), (1, 2)):
                line = [row[f"{split}_error"] for row in rows if (row["bn"], row["i"], row["j"]) == (bn, i, j)]
                barriers.append(max(line) - (line[0] + line[-1]) / 2)
                assert found[bn, "pair", i, j][f"{split}_barrier"] == pytest.approx(barriers[-1], abs=1e-6)
            assert found[bn, "mean", None, None][f"{split}_barrier"] == pytest.approx(sum(barriers) / 3, abs=1e-6)
            assert found[bn, "std", None, None][f"{split}_barrier"] == pytest.approx(statistics.stdev(barriers), abs=1e-6)


def test_the_figure_has_the_mean_of_the_pairs(tmp_path, monkeypatch):
    """Two starts with two pairs each, in panels of one scale: a thin line a pair and their mean."""
    rows = [
        dict.fromkeys(COLUMNS, 0)
        | {"init": init, "i": 0, "j": j, "gamma": gamma, "bn": "recompute", "test_error": base + j * gamma}
        for init, base in (("random", 10), ("x:student", 5))
        for j in (1, 2)
        for gamma in (0.0, 1.0)
    ]
    logs.CsvLog(tmp_path / "lmc.csv", COLUMNS).start(rows)
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plots.plot_lmc(tmp_path / "lmc.png", tmp_path / "lmc.csv", {"random": "random", "x:student": "student"})
    panels = drawn[0].axes
    assert [axis.get_title() for axis in panels] == ["random", "student"]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    for axis, base in zip(panels, (10, 5), strict=True):
        found = [line.get_ydata() for line in sorted(axis.lines, key=lambda line: line.get_linewidth())]
        assert [list(y) for y in found] == [[base, base + 1], [base, base + 2], [base, base + 1.5]]


def test_without_batch_norm_there_is_nothing_to_recompute(script, tmp_path):
    flags = [*SUPERVISED, "--encoder", "vgg11", "--epochs", 1, "--runs", 2, "--points", 2, "--lr", 0.01]
    flags += ["--bn-statistics", "recompute", "interpolate", "--out", tmp_path / "run"]
    assert script("run_lmc", *flags).code == 0
    assert [row["bn"] for row in read_csv(tmp_path / "run" / "lmc.csv")] == ["none"] * 2


def test_runs_share_the_start_and_differ_in_order_and_augmentation_alone(script, tmp_path, monkeypatch):
    from rtd.train import Trainer

    seen, run_epoch = [], Trainer.run_epoch

    def watched(trainer):
        if trainer.epoch == 0:
            seen.append((trainer.state()["classifier"], trainer.stream))
        run_epoch(trainer)

    monkeypatch.setattr(Trainer, "run_epoch", watched)
    flags = [*SUPERVISED, "--epochs", "1", "--runs", "2", "--points", "2", "--out", tmp_path / "run"]
    assert script("run_lmc", *flags).code == 0
    assert len(seen) == 2
    assert_same_tree(seen[0][0], seen[1][0])
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize("epoch_of_run", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_unbroken(lmc_run, tmp_path, epoch_of_run):
    kill_when(start("run_lmc", *FLAGS, "--out", tmp_path / "run"), (tmp_path / "run" / ENDS[epoch_of_run]).exists)
    finish(start("run_lmc", *FLAGS, "--out", tmp_path / "run", "--resume"))
    for name in ("lmc.csv", "barriers.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (lmc_run / name).read_bytes()
    for name in ENDS:
        one, two = (torch.load(folder / name, weights_only=True)["training"] for folder in (lmc_run, tmp_path / "run"))
        for part in ("classifier", "optimizer", "accuracies"):
            assert_same_tree(one[part], two[part])


@pytest.mark.slow
def test_lines_are_redrawn_without_training_and_a_trained_end_that_changed_is_seen(lmc_run, script, tmp_path):
    flags = [*FLAGS, "--out", tmp_path / "run"]
    assert script("run_lmc", *flags).code == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ENDS}
    assert script("run_lmc", *flags, "--points", 3, "--resume").code == 0
    rows = read_csv(tmp_path / "run" / "lmc.csv")
    assert sorted({row["gamma"] for row in rows}) == [0, 0.5, 1]
    assert {name: (tmp_path / "run" / name).read_bytes() for name in ENDS} == before
    path = tmp_path / "run" / ENDS[1]  # the negative control
    contents = torch.load(path, weights_only=True)
    contents["training"]["classifier"]["fc.weight"].mul_(-1)
    torch.save(contents, path)
    assert script("run_lmc", *flags, "--resume").code == 0
    with open(tmp_path / "run" / "lmc.csv") as ours, open(lmc_run / "lmc.csv") as theirs:
        pairs = [
            (a, b) for a, b in zip(csv.DictReader(ours), csv.DictReader(theirs), strict=True) if a["test_loss"] != b["test_loss"]
        ]
    assert {(a["i"], a["j"]) for a, _ in pairs} == {("0", "1"), ("1", "2")}


@pytest.mark.slow
def test_two_processes_share_runs_and_lines(lmc_run, tmp_path):
    flags = [*SUPERVISED, "--epochs", "1", "--runs", "2", "--points", "3"]
    finish(start("run_lmc", *flags, "--out", tmp_path / "one", OMP_NUM_THREADS="1"))
    finish(*start_two("run_lmc", *flags, "--out", tmp_path / "two"))
    assert (tmp_path / "one" / "barriers.csv").read_text().count("pair") == 1
    ours, theirs = (read_csv(tmp_path / name / "lmc.csv") for name in ("one", "two"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-4)


def test_figure_is_drawn_for_several_starts(script, tmp_path):
    flags = [flag for flag in SUPERVISED if flag != "--no-plot"]
    flags += ["--init", "random", "random:1", "--epochs", 1, "--runs", 2, "--points", 3]
    assert script("run_lmc", *flags, "--out", tmp_path / "run").code == 0
    assert (tmp_path / "run" / "lmc.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--runs", "1"], "--runs 1"),
        (["--points", "1"], "--points 1"),
        (["--bn-statistics", "none"], "--bn-statistics"),
        (["--bn-batches", "0"], "--bn-batches"),
        (["--line-subset", "41"], "--line-subset 41"),
        (["--init", "random", "random"], "--init"),
        (["--init", "random:x"], "--init random:x"),
        (["--epochs", "0"], "--epochs"),
        (["--resume", "--overwrite"], "--resume"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(script, tmp_path, flags, said):
    result = script("run_lmc", *FLAGS, "--out", tmp_path / "run", *flags)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
