"""run_lmc.py through its command line: the lines' ends, what is trained apart, killing and resuming, redrawing, refusing."""

import csv

import pytest
import torch
from conftest import SUPERVISED
from processes import finish, kill_when, start, start_two
from test_run_distill import assert_same_tree

from rtd.logs import read_csv

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


def test_barriers_are_the_rise_over_the_mean_of_the_ends(lmc_run):
    rows = read_csv(lmc_run / "lmc.csv")
    found = {(row["bn"], row["statistic"], row["i"], row["j"]): row for row in read_csv(lmc_run / "barriers.csv")}
    for bn in ("recompute", "interpolate"):
        barriers = []
        for i, j in ((0, 1), (0, 2), (1, 2)):
            line = [row["test_error"] for row in rows if (row["bn"], row["i"], row["j"]) == (bn, i, j)]
            barriers.append(max(line) - (line[0] + line[-1]) / 2)
            assert found[bn, "pair", i, j]["test_barrier"] == pytest.approx(barriers[-1], abs=1e-6)
        assert found[bn, "mean", None, None]["test_barrier"] == pytest.approx(sum(barriers) / 3, abs=1e-6)


def test_runs_share_the_start_and_differ_in_order_and_augmentation_alone(script, tmp_path, monkeypatch):
    from rtd.train import Trainer

    seen, run_epoch = [], Trainer.run_epoch

    def watched(trainer):
        if trainer.epoch == 0:
            seen.append((trainer.state()["classifier"], {k: g.get_state() for k, g in trainer.generators.items()}))
        run_epoch(trainer)

    monkeypatch.setattr(Trainer, "run_epoch", watched)
    flags = [*SUPERVISED, "--epochs", "1", "--runs", "2", "--points", "2", "--out", tmp_path / "run"]
    assert script("run_lmc", *flags).code == 0
    assert len(seen) == 2
    assert_same_tree(seen[0][0], seen[1][0])
    for name in ("batch-order", "augmentation"):
        assert not torch.equal(seen[0][1][name], seen[1][1][name])


@pytest.mark.parametrize("epoch_of_run", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_unbroken(lmc_run, tmp_path, epoch_of_run):
    kill_when(start("run_lmc", *FLAGS, "--out", tmp_path / "run"), (tmp_path / "run" / ENDS[epoch_of_run]).exists)
    finish(start("run_lmc", *FLAGS, "--out", tmp_path / "run", "--resume"))
    for name in ("lmc.csv", "barriers.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (lmc_run / name).read_bytes()
    for name in ENDS:
        one, two = (torch.load(folder / name, weights_only=True)["training"] for folder in (lmc_run, tmp_path / "run"))
        for part in ("classifier", "optimizer", "generators", "accuracies"):
            assert_same_tree(one[part], two[part])


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
