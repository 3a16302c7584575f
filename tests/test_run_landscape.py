"""run_landscape.py through its command line: the CSV, the teacher's point, killing, sharing, redrawing, refusing."""

import csv
import json
import os

import pytest
import torch
from conftest import TINY
from processes import finish, kill_when, start, start_two

from rtd import checkpoint, probes
from rtd.logs import read_csv

DATA = ["--subset", "40", "--test-subset", "30", "--k", "5", "--device", "cpu"]
GRID = ["--x-range", "-1", "1", "5", "--y-range", "0", "1", "3"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Paths of checkpoints of two students of one teacher, at alpha 0.1 and 1."""
    folder = tmp_path_factory.mktemp("students")
    for name, alpha in (("a", "0.1"), ("b", "1")):
        finish(start("run_distill", *TINY, "--alpha", alpha, "--epochs", 1, "--probe", "none", "--out", folder / name))
    return folder / "a" / "checkpoint.pt", folder / "b" / "checkpoint.pt"


def plane(pair):
    a, b = pair
    axes = ["--origin", f"{a}:teacher", "--x-axis", f"{a}:student", "--y-axis", f"{b}:student"]
    return [*axes, *DATA, "--probe", "knn"]


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("landscape") / "run"
    out, _ = finish(start("run_landscape", *plane(pair), *GRID, "--no-plot", "--out", folder))
    (folder / "said").write_text(out)
    return folder


def content(folder):
    return (folder / "landscape.csv").read_text()


def test_rows_are_the_grid_and_the_teacher_is_at_kl_zero(finished, pair):
    rows = read_csv(finished / "landscape.csv")
    assert [(row["i"], row["j"]) for row in rows] == [(i, j) for j in range(3) for i in range(5)]
    assert [row["x"] for row in rows[:5]] == [-1, -0.5, 0, 0.5, 1]
    at = {(row["x"], row["y"]): row for row in rows}
    assert abs(at[0, 0]["train_kl"]) < 1e-12
    assert all(row["train_kl"] > 1e-7 for place, row in at.items() if place != (0, 0))
    assert all(row["linear"] is None and 0 <= row["knn"] <= 100 for row in rows)
    for place, path, which in (((0, 0), pair[0], "teacher"), ((1, 0), pair[0], "student"), ((0, 1), pair[1], "student")):
        parameters = checkpoint.load_network(checkpoint.load_checkpoint(path), which).parameters()
        norm = sum((p.double() ** 2).sum().item() for p in parameters) ** 0.5
        assert at[place]["norm_total"] == pytest.approx(norm, rel=1e-5)
    points = read_csv(finished / "points.csv")
    assert [(row["name"], row["x"], row["y"]) for row in points] == [
        ("theta_T", 0, 0),
        ("theta*_S(0.1)", 1, 0),
        ("theta*_S(1)", 0, 1),
    ]
    said = (finished / "said").read_text()
    ratio = at[-0.5, 0]["train_kl"] / at[0.5, 0]["train_kl"]
    assert f"ratio {ratio:.2f}" in said
    assert json.loads((finished / "config.json").read_text())["reads"][f"{pair[0]}:teacher"] == checkpoint.sha256(pair[0])


@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_unbroken(finished, pair, tmp_path, rows):
    flags = [*plane(pair), *GRID, "--no-plot", "--out", tmp_path / "run", "--resume"]
    log = tmp_path / "run" / "landscape.csv"
    kill_when(start("run_landscape", *flags), lambda: log.exists() and log.read_text().count("\n") > rows)
    with open(log, "a") as file:
        file.write("3,2,0.5")  # as if in the middle of a row
    out, _ = finish(start("run_landscape", *flags))
    assert "resumed: " in out
    assert content(tmp_path / "run") == content(finished)


def test_a_wrong_row_is_seen(finished, pair, script, tmp_path):
    """Negative control: a row that is not this point's is refused, and one with another value makes another file."""
    flags = [*plane(pair), *GRID, "--no-plot", "--out", tmp_path / "run"]
    assert script("run_landscape", *flags).code == 0
    lines = content(tmp_path / "run").split("\n")
    for change in (("1,0,-0.5", "1,0,-0.4"), ("1,0,-0.5", "9,0,-0.5")):
        (tmp_path / "run" / "landscape.csv").write_text("\n".join(lines[:4]).replace(*change) + "\n")
        result = script("run_landscape", *flags, "--resume")
        assert result.code == 2 and "no point of this grid" in result.err
    cells = lines[2].split(",")
    cells[4] = "0.5"
    (tmp_path / "run" / "landscape.csv").write_text("\n".join([*lines[:2], ",".join(cells)]) + "\n")
    assert script("run_landscape", *flags, "--resume").code == 0
    assert content(tmp_path / "run") != content(finished)


def test_two_processes_share_the_points(pair, tmp_path):
    flags = [*plane(pair), "--x-range", "0", "1", "3", "--y-range", "0", "0", "1", "--no-plot"]
    finish(start("run_landscape", *flags, "--out", tmp_path / "one", OMP_NUM_THREADS="1"))
    finish(*start_two("run_landscape", *flags, "--out", tmp_path / "two"))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(os.listdir(tmp_path / "two")) == ["config.json", "landscape.csv", "points.csv"]


def test_orthogonal_encoder_only_recomputed_and_drawn(pair, script, tmp_path):
    a, b = pair
    flags = ["--origin", f"{a}:teacher", "--x-axis", f"{a}:student", "--y-axis", f"{b}:student", *DATA, "--encoder-only"]
    flags += ["--bn-statistics", "recompute"]
    flags += ["--plane", "orthogonal", "--center", "mean", "--probe", "none", "--surface", "--out", tmp_path / "run"]
    result = script("run_landscape", *flags, "--x-range", "-1", "1", "2", "--y-range", "-1", "1", "2")
    assert result.code == 0, result.err
    with open(tmp_path / "run" / "landscape.csv") as file:
        assert len(list(csv.DictReader(file))) == 4
    corners = [(row["x"], row["y"]) for row in read_csv(tmp_path / "run" / "points.csv")]
    assert sum(x for x, _ in corners) == pytest.approx(0, abs=1e-5)  # the mean of the three is at (0, 0)
    for name in ("landscape.png", "landscape-surface.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_plot_only_redraws_from_csvs(finished, script, tmp_path):
    csvs = [finished / "landscape.csv"] * 2
    result = script("run_landscape", "--plot-only", *csvs, "--out", tmp_path / "fig5.png")
    assert result.code == 0, result.err
    assert (tmp_path / "fig5.png").read_bytes().startswith(b"\x89PNG")
    result = script("run_landscape", "--plot-only", *csvs, "--out", tmp_path / "fig5.png")
    assert result.code == 2 and "--overwrite" in result.err
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    result = script("run_landscape", "--plot-only", tmp_path / "bad.csv", "--out", tmp_path / "x.png")
    assert result.code == 2 and "bad.csv" in result.err


def test_what_is_not_a_landscape_is_not_drawn(finished, script, tmp_path):
    for name, change in (
        ("landscape.csv", ("0.5,", "much,")),
        ("points.csv", ("theta_T,0", "theta_T,left")),
        ("points.csv", ("x", "z")),
    ):
        folder = tmp_path / name / change[1]
        folder.mkdir(parents=True)
        for file in ("landscape.csv", "points.csv"):
            text = (finished / file).read_text()
            (folder / file).write_text(text.replace(*change) if file == name else text)
        result = script("run_landscape", "--plot-only", folder / "landscape.csv")
        assert result.code == 2 and name in result.err and result.err.count("\n") == 1, result.err
        assert not (folder / "landscape.png").exists()
    result = script("run_landscape", "--plot-only", finished / "landscape.csv", "--out", tmp_path / "no" / "x.png")
    assert result.code == 2 and "no folder" in result.err


@pytest.mark.parametrize(
    "ranges", [("--x-range", "-1e-3", "1E-3", 3, "--y-range", 0, 0, 1), ("--x-range", "-0", "-0", 1, "--y-range", 0, 1, 2)]
)
def test_a_line_of_points_is_drawn_as_a_curve_and_resumes(pair, script, tmp_path, ranges):
    flags = [*plane(pair), *ranges, "--out", tmp_path / "run"]
    for more in ((), ("--resume",)):
        result = script("run_landscape", *flags, *more)
        assert result.code == 0, result.err
        assert ("ratio" in result.out) == (ranges[3] == 3)
    assert (tmp_path / "run" / "landscape.png").read_bytes().startswith(b"\x89PNG")


def test_each_point_is_probed_with_batches_of_512_and_the_same_draws(pair, script, tmp_path, monkeypatch):
    seen, probe = [], probes.linear_probe

    def watched(*arguments):
        seen.append((arguments[5].get_state(), arguments[7]))
        return probe(*arguments)

    monkeypatch.setattr(probes, "linear_probe", watched)
    flags = [
        *plane(pair),
        "--probe",
        "linear",
        "--x-range",
        0,
        1,
        2,
        "--y-range",
        0,
        0,
        1,
        "--no-plot",
        "--out",
        tmp_path / "run",
    ]
    assert script("run_landscape", *flags).code == 0
    assert [size for _, size in seen] == [512, 512] and torch.equal(seen[0][0], seen[1][0])


def edited(path, target, change):
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, target)
    return target


def test_networks_that_do_not_fit_are_refused_by_name(pair, script, tmp_path):
    a, b = pair
    other = edited(b, tmp_path / "teacher.pt", lambda c: c["teacher"]["encoder.0.weight"].add_(1))
    scaled = edited(b, tmp_path / "scaled.pt", lambda c: c["data"].update(std=[1.0, 1.0, 1.0]))
    cases = [
        ([f"{a}:teacher", f"{a}:student", f"{other}:student"], ["teacher.pt", "different teachers"]),
        ([f"{a}:teacher", f"{a}:student", f"{scaled}:student"], ["scaled.pt", "normalised"]),
        ([f"{a}:teacher", f"{a}:student", f"{a}:student"], ["one line"]),
        ([f"{a}:teacher", f"{a}:tutor", f"{b}:student"], ["--x-axis", "tutor", "student-init"]),
        ([f"{a}:teacher", str(a), f"{b}:student"], ["--x-axis", "PATH:NETWORK"]),
        ([f"{a}:teacher", f"{tmp_path}/no.pt:student", f"{b}:student"], ["no.pt"]),
    ]
    elsewhere = edited(a, tmp_path / "elsewhere.pt", lambda c: c["data"].update(name="cifar10"))
    cases.append(([f"{elsewhere}:teacher", f"{a}:student", f"{b}:student"], ["--dataset digits", "cifar10", "elsewhere.pt"]))
    for (origin, x_axis, y_axis), words in cases:
        flags = ["--origin", origin, "--x-axis", x_axis, "--y-axis", y_axis, *DATA, "--out", tmp_path / "run"]
        result = script("run_landscape", *flags)
        assert result.code == 2 and result.err.count("\n") == 1, result.err
        assert all(word in result.err for word in words), result.err
        assert not (tmp_path / "run").exists()


def test_another_architecture_is_refused(pair, script, tmp_path):
    finish(start("run_distill", *TINY, "--out-dim", 32, "--epochs", 0, "--probe", "none", "--out", tmp_path / "c"))
    axes = ["--origin", f"{pair[0]}:teacher", "--x-axis", f"{pair[0]}:student", "--y-axis", f"{tmp_path}/c/checkpoint.pt:student"]
    result = script("run_landscape", *axes, *DATA, "--out", tmp_path / "run")
    assert result.code == 2 and "different architectures" in result.err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--x-range", "1", "0", "5"], "--x-range"),
        (["--x-range", "0", "1", "0"], "--x-range"),
        (["--x-range", "0", "0", "2"], "--x-range"),
        (["--y-range", "a", "1", "5"], "--y-range"),
        (["--y-range", "nan", "1", "5"], "--y-range"),
        (["--plane", "curved"], "--plane"),
        (["--center", "left"], "--center"),
        (["--bn-statistics", "none"], "--bn-statistics"),
        (["--k", "41", "--probe", "knn"], "--k 41"),
        (["--subset", "5000"], "--subset"),
        (["--resume", "--overwrite"], "--resume"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(pair, script, tmp_path, flags, word):
    result = script("run_landscape", *plane(pair), "--out", tmp_path / "run", *flags)
    assert result.code == 2 and word in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_plane_without_networks_is_refused(script):
    result = script("run_landscape")
    assert result.code == 2 and "--origin is missing" in result.err
