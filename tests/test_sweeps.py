"""Several values of a flag on one command line: a run each, a table, figures; stopped and continued, shared by processes."""

import shutil
import statistics

import pytest
from conftest import TINY
from processes import finish, start, start_two
from test_run_distill import assert_same_run, rows_without_timings

from rtd.logs import read_csv
from rtd.sweeps import label

SWEEP = [*TINY, "--epochs", 2, "--alpha", 0, 0.5, "--seed", 0, 1]
FOLDERS = ["alpha0-seed0", "alpha0-seed1", "alpha0.5-seed0", "alpha0.5-seed1"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a finished sweep of four runs, by two processes that share them."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    out, _ = finish(*start_two("run_distill", *SWEEP, "--out", folder))
    assert all(out.count(f"{folder / name}\n") == 1 for name in FOLDERS), "a run was done twice, or not at all"
    return folder


def test_each_combination_is_a_run_of_its_own(sweep, tmp_path):
    assert sorted(path.name for path in sweep.iterdir()) == [*FOLDERS, "summary.csv"]
    flags = [*TINY, "--epochs", 2, "--alpha", 0.5, "--seed", 1, "--out", tmp_path / "alone"]
    finish(start("run_distill", *flags, OMP_NUM_THREADS="1"))
    assert rows_without_timings(tmp_path / "alone")[0] == rows_without_timings(sweep / "alpha0.5-seed1")[0]
    assert len({(sweep / name / "log.csv").read_text() for name in FOLDERS}) == 4


def test_summary_is_of_the_seeds_of_each_setting(sweep):
    summary = read_csv(sweep / "summary.csv")
    assert list(summary[0]) == ["alpha", "quantity", "epoch", "mean", "std", "n"]
    assert {(row["alpha"], row["n"]) for row in summary} == {(0, 2), (0.5, 2)}
    for alpha in (0, 0.5):
        logs = [read_csv(sweep / f"alpha{alpha}-seed{seed}" / "log.csv") for seed in (0, 1)]
        for when, pick in (("best", max), ("final", lambda values: values[-1])):
            values = [pick([row["student_knn"] for row in log[1:]]) for log in logs]
            [row] = [r for r in summary if (r["alpha"], r["quantity"], r["epoch"]) == (alpha, "student_knn", when)]
            assert row["mean"] == pytest.approx(statistics.fmean(values))
            assert row["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        [row] = [r for r in summary if (r["alpha"], r["quantity"]) == (alpha, "distance_total")]
        assert row["epoch"] == "final"
        assert row["mean"] == pytest.approx(statistics.fmean(log[-1]["distance_total"] for log in logs))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--subset", 40, 5000], "--subset 5000: digits has 1347"),
        (["--subset", 40, 4], "--k 5: there are 4"),
        (["--dataset", "digits", "cifar10"], "--data-dir"),
    ],
)
def test_what_a_later_run_would_miss_is_refused_before_the_first(script, tmp_path, flags, said):
    result = script("run_distill", *TINY, *flags, "--epochs", 1, "--out", tmp_path / "sweep")
    assert result.code == 2 and said in result.err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_where_it_was(script, sweep, tmp_path):
    """One run finished, one in its first epoch, two not begun."""
    folder = tmp_path / "sweep"
    shutil.copytree(sweep / FOLDERS[0], folder / FOLDERS[0])
    script("run_distill", *TINY, "--epochs", 1, "--alpha", 0, "--seed", 1, "--out", folder / FOLDERS[1])
    before = (folder / FOLDERS[0] / "checkpoint.pt").stat().st_mtime_ns
    result = script("run_distill", *SWEEP, "--out", folder)
    assert result.code == 2 and "--resume" in result.err  # not without being asked to
    result = script("run_distill", *SWEEP, "--out", folder, "--resume")
    assert result.code == 0, result.err
    assert "resumed after epoch 1" in result.out
    assert result.out.count("training images") == 3, "a finished run was begun again"
    assert (folder / FOLDERS[0] / "checkpoint.pt").stat().st_mtime_ns == before
    script("run_distill", *SWEEP, "--out", tmp_path / "whole")
    for name in FOLDERS[1:]:
        assert_same_run(folder / name, tmp_path / "whole" / name)


@pytest.mark.parametrize("flags", ["--alpha 0 0.5", "--norm batch none --seed 0 1", "--out-dim 8 64 --norm batch layer"])
def test_sweeps_are_drawn(script, tmp_path, flags):
    tiny = [flag for flag in TINY if flag != "--no-plot"]
    result = script("run_distill", *tiny, "--epochs", 1, *flags.split(), "--out", tmp_path)
    assert result.code == 0, result.err
    for name in ("sweep.png", "dynamics.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_does_not_end_the_sweep(script, tmp_path):
    flags = [*TINY, "--epochs", 2, "--lr", 1e30, 0.001]
    for more in ([], ["--resume"]):
        result = script("run_distill", *flags, *more, "--out", tmp_path / "sweep")
        assert result.code == 1
        assert "of 2 runs, 1 diverged and were left out: lr1e+30" in result.err
        assert {row["lr"] for row in read_csv(tmp_path / "sweep" / "summary.csv")} == {0.001}
        assert read_csv(tmp_path / "sweep" / "lr0.001" / "log.csv")[-1]["epoch"] == 2
        assert "not finite" in (tmp_path / "sweep" / "lr1e+30" / "diverged.txt").read_text()


def test_overwriting_deletes_the_old_summary(script, tmp_path):
    flags = [*TINY, "--epochs", 1, "--out", tmp_path / "sweep"]
    assert script("run_distill", *flags, "--lr", 0.001, 0.002).code == 0
    assert script("run_distill", *flags, "--lr", 0.001, "--subset", 40, 5000, "--overwrite").code == 2
    assert (tmp_path / "sweep" / "summary.csv").exists()
    assert script("run_distill", *flags, "--lr", 1e30, 1e29, "--overwrite").code == 1
    assert not (tmp_path / "sweep" / "summary.csv").exists()


def test_a_used_folder_is_refused_before_the_first_run(script, sweep, tiny_run, tmp_path):
    before = (sweep / "summary.csv").read_bytes()
    result = script("run_distill", *TINY, "--epochs", 2, "--lr", 0.1, 0.2, "--out", sweep)
    assert result.code == 2 and "holds summary.csv already: --resume" in result.err
    assert (sweep / "summary.csv").read_bytes() == before
    for flag in ("--resume", "--overwrite"):
        result = script("run_distill", *SWEEP, "--out", tiny_run, flag)
        assert result.code == 2 and "holds a single run; give a sweep another folder" in result.err
    result = script("run_distill", *TINY, "--epochs", 2, "--norm", "batch", "none", "--out", sweep, "--resume")
    assert result.code == 2 and "is of a sweep over other flags than ['norm']" in result.err
    shutil.copytree(sweep / FOLDERS[3], tmp_path / FOLDERS[3])
    result = script("run_distill", *SWEEP, "--out", tmp_path)
    assert result.code == 2 and f"holds {FOLDERS[3]} already" in result.err
    assert [path.name for path in tmp_path.iterdir()] == [FOLDERS[3]]


def test_values_that_differ_have_folders_that_differ():
    assert [label(value) for value in (0.2, 1.0, 1e-10, 0.9999999, None, "wn", 3)] == [
        "0.2", "1", "1e-10", "0.9999999", "default", "wn", "3",
    ]  # fmt: skip


def test_bottlenecks_are_swept_by_their_slots(script, tmp_path):
    slots = ["-/lb/fn/-/l/-", "-/-/-/-/l/fn"]
    result = script("run_distill", *TINY, "--epochs", 1, "--bottleneck", *slots, "--out", tmp_path / "sweep")
    assert result.code == 0, result.err
    assert {row["bottleneck"] for row in read_csv(tmp_path / "sweep" / "summary.csv")} == set(slots)
    script("run_distill", *TINY, "--epochs", 1, "--no-weight-norm", "--out", tmp_path / "raw")
    assert_same_run(tmp_path / "raw", tmp_path / "sweep" / "bottleneck-.lb.fn.-.l.-")


@pytest.mark.slow
def test_steps_stay_the_same_when_the_number_of_images_grows(script, tmp_path):
    """Fig. 4: int(3 * 20 / n) epochs of n images, the probes on all 40 images of their own set."""
    flags = ["--dataset", "digits", "noise", "--subset", 10, 20, 39, "--epochs", 3, "--epochs-of", 20, "--batch-size", 5]
    flags += ["--probe-dataset", "digits", "--probe-subset", 40, "--probe-every", 3, "--probe", "knn"]
    result = script("run_distill", *TINY, *flags, "--out", tmp_path)
    assert result.code == 0, result.err
    epochs = {10: 6, 20: 3, 39: 1}
    for n, count in epochs.items():
        logs = [read_csv(tmp_path / f"dataset{name}-subset{n}" / "log.csv") for name in ("digits", "noise")]
        for rows in logs:
            assert [row["epoch"] for row in rows] == list(range(count + 1))
            assert rows[-1]["step"] == count * -(-n // 5)
            assert {row["epoch"] for row in rows if row["student_knn"] is not None} == {0, count}
            assert rows[0]["teacher_knn"] == logs[0][0]["teacher_knn"]
        assert logs[0][-1]["loss"] != logs[1][-1]["loss"]
    assert len({read_csv(tmp_path / f"datasetdigits-subset{n}" / "log.csv")[0]["input_knn"] for n in epochs}) == 1
