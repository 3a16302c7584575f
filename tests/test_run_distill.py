"""run_distill.py and run_probe.py through their command lines: what a run leaves, resuming, repeating, refusing."""

import csv
import json
import os
import signal

import pytest
import torch
from conftest import TINY
from PIL import Image
from processes import finish, kill_when, start, start_two, wait_until

from rtd import checkpoint
from rtd.logs import read_csv

TIMINGS = ("images_per_second", "seconds")
COLUMNS = (
    "epoch,step,loss,kl,teacher_entropy,student_entropy,distance_encoder,distance_head,distance_total,student_linear,student_knn,"
    "teacher_linear,teacher_knn,input_linear,input_knn,images_per_second,seconds"
)


def rows_without_timings(folder):
    with open(folder / "log.csv") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def assert_same_run(a, b):
    """The same log, timings aside, and the same networks and optimizer state, bit for bit."""
    assert rows_without_timings(a) == rows_without_timings(b)
    for name in ("checkpoint.pt", "best.pt"):
        assert_same_tree(*(torch.load(folder / name, weights_only=True) for folder in (a, b)))


def assert_same_tree(a, b, ignore=("config", "seconds")):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ignore:
                assert_same_tree(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same_tree(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_run_folder_holds_what_the_readme_says(tiny_run):
    assert (tiny_run / "log.csv").read_text().split("\n")[0] == COLUMNS
    rows = read_csv(tiny_run / "log.csv")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12, 15]
    start_row = rows[0]
    assert start_row["distance_total"] == 0
    assert 1e-6 < start_row["kl"] < 0.1  # of batch statistics against the teacher's running ones; alpha is 1e-10
    assert start_row["images_per_second"] is None
    for row in rows[1:]:
        assert row["distance_total"] == pytest.approx((row["distance_encoder"] ** 2 + row["distance_head"] ** 2) ** 0.5)
        assert row["loss"] >= row["teacher_entropy"] - 1e-5  # cross-entropy is entropy plus KL
        assert row["teacher_linear"] == start_row["teacher_linear"]
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["flags"]["alpha"] == 1e-10
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert "run_distill.py" in config["command"]


def test_checkpoint_loads_with_weights_only_and_holds_the_three_networks(tiny_run):
    contents = torch.load(tiny_run / "checkpoint.pt", weights_only=True)
    assert contents["epoch"] == 5
    assert {"optimizer", "baselines"} <= set(contents["progress"])
    teacher, student, before = (checkpoint.load_network(contents, who) for who in checkpoint.NETWORKS)
    pairs = list(zip(teacher.parameters(), before.parameters(), student.parameters(), strict=True))
    assert all((t - b).abs().max() < 1e-6 for t, b, _ in pairs)  # alpha = 1e-10
    assert all((s - b).abs().max() > 1e-6 for _, b, s in pairs)
    best = torch.load(tiny_run / "best.pt", weights_only=True)
    rows = read_csv(tiny_run / "log.csv")[1:]
    assert best["epoch"] == max(rows, key=lambda row: (row["student_linear"], -row["epoch"]))["epoch"]


def test_logged_distance_is_between_the_saved_networks(tiny_run):
    contents = checkpoint.load_checkpoint(tiny_run / "checkpoint.pt")
    student, before = (checkpoint.load_network(contents, who) for who in ("student", "student-init"))
    squares = [((s - b).double() ** 2).sum().item() for s, b in zip(student.parameters(), before.parameters(), strict=True)]
    assert read_csv(tiny_run / "log.csv")[-1]["distance_total"] == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


def test_output_starts_with_the_folder_and_ends_with_the_gain(script, tmp_path):
    result = script("run_distill", *TINY, "--epochs", 1, "--out", tmp_path / "run")
    lines = result.out.strip().split("\n")
    assert lines[0] == str(tmp_path / "run")
    assert lines[-1].startswith("gain, final")
    table = {line[:18].strip(): [float(x) for x in line[18:].split()] for line in lines[-4:]}
    for gain, student, teacher in zip(table["gain, final"], table["student, final"], table["teacher"], strict=True):
        assert gain == pytest.approx(student - teacher, abs=0.02)


@pytest.mark.parametrize("flags", [("--encoder", "vgg11"), ("--precision", "bf16", "--fp32-steps", "2")])
def test_same_flags_same_bytes(script, tmp_path, flags):
    for name in ("a", "b"):
        assert script("run_distill", *TINY, "--epochs", 1, *flags, "--out", tmp_path / name).code == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    if "vgg11" in flags:  # without batch norm, alpha = 1e-10 starts at the teacher
        assert 0 <= read_csv(tmp_path / "a" / "log.csv")[0]["kl"] < 1e-12


def test_deterministic_algorithms_are_all_there_are(tiny_run, tmp_path):
    """torch refuses what it has no deterministic algorithm for; on a CPU the flag changes nothing."""
    finish(start("run_distill", *TINY, "--epochs", 5, "--deterministic", "--out", tmp_path / "run"))
    assert_same_run(tmp_path / "run", tiny_run)


def has_epoch(log, epoch):
    return log.exists() and any(line.startswith(f"{epoch},") for line in log.read_text().split("\n"))


@pytest.mark.parametrize("epoch", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_unbroken(tiny_run, tmp_path, epoch):
    """SIGKILL right after the log row of an epoch, which is before or while its checkpoint is written."""
    flags = (*TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume")
    kill_when(start("run_distill", *flags), lambda: has_epoch(tmp_path / "run" / "log.csv", epoch))
    finish(start("run_distill", *flags))
    assert_same_run(tmp_path / "run", tiny_run)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 2), (signal.SIGTERM, 3), (signal.SIGINT, 7)])
def test_a_signal_within_an_epoch_loses_no_step(tiny_run, script, tmp_path, monkeypatch, number, step):
    """An epoch has three steps; the signal comes while the optimizer is at work."""
    calls, plain = iter(range(1, 100)), torch.optim.AdamW.step

    def signalled(optimizer, *arguments):
        plain(optimizer, *arguments)
        if len(optimizer.param_groups) == 2 and next(calls) == step:  # the student's, not a probe's
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalled)
    flags = (*TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume")
    result = script("run_distill", *flags)
    assert (result.code, result.err.count("\n")) == (128 + number, 1)
    saved = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == step and len(saved["progress"]["so_far"]["losses"]) == (step - 1) % 3 + 1
    result = script("run_distill", *flags)
    assert result.code == 0 and f", step {step}" in result.out
    assert_same_run(tmp_path / "run", tiny_run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_stops_in_a_sentence_and_the_run_resumes(tiny_run, script, tmp_path, number, code):
    flags = (*TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume")
    process = start("run_distill", *flags)
    wait_until(process, lambda: has_epoch(tmp_path / "run" / "log.csv", 1))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert len(err.strip().split("\n")) == 1
    assert "--resume" in err
    assert script("run_distill", *flags).code == 0
    assert_same_run(tmp_path / "run", tiny_run)


def test_what_a_kill_left_half_written_is_removed(script, tmp_path):
    flags = (*TINY, "--probe", "none", "--out", tmp_path / "run")
    script("run_distill", *flags, "--epochs", 1)
    (tmp_path / "run" / ".checkpoint.pt.123.tmp").touch()
    (tmp_path / "run" / "other").mkdir()
    (tmp_path / "run" / "other" / ".checkpoint.pt.456.tmp").touch()  # another's, who may be at work
    assert script("run_distill", *flags, "--epochs", 2, "--resume").code == 0
    assert [path.name for path in (tmp_path / "run").rglob(".*")] == [".checkpoint.pt.456.tmp"]


def test_resuming_on_other_images_is_refused(script, tmp_path):
    for folder, shade in (("one", 50), ("two", 51)):
        for name in ("train/a", "train/b", "test/a", "test/b"):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (shade, 9 * i, 0)).save(tmp_path / folder / name / f"{i}.png")
    flags = ["--encoder", "resnet20", "--out-dim", 8, "--batch-size", 4, "--probe", "none", "--no-plot", "--dataset", "folder"]
    flags += ["--out", tmp_path / "run"]
    assert script("run_distill", *flags, "--epochs", 1, "--data-dir", tmp_path / "one").code == 0
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    assert script("run_distill", *flags, "--epochs", 2, "--data-dir", tmp_path / "elsewhere", "--resume").code == 0
    result = script("run_distill", *flags, "--epochs", 3, "--data-dir", tmp_path / "two", "--resume")
    assert result.code == 2 and "the training images changed since" in result.err


def test_two_processes_probe_once(tiny_run, tmp_path):
    flags = [tiny_run / "checkpoint.pt", "--subset", 40, "--test-subset", 30, "--k", 5, "--device", "cpu"]
    out, _ = finish(*start_two("run_probe", *flags, "--out", tmp_path / "probe.csv"))
    assert [row["network"] for row in read_csv(tmp_path / "probe.csv")] == ["teacher", "student", "student-init", "input"]
    assert out.count("test accuracy") == 1


def test_resume_with_another_momentum_is_caught(tiny_run, script, tmp_path):
    """Negative control of the test above: it does see an optimizer that was not restored."""
    script("run_distill", *TINY, "--epochs", 2, "--out", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    contents = torch.load(path, weights_only=True)
    contents["progress"]["optimizer"]["state"][0]["exp_avg"] += 1e-6
    torch.save(contents, path)
    assert script("run_distill", *TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume").code == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", tiny_run)


def test_more_epochs_continue_a_finished_run(tiny_run, script, tmp_path):
    assert script("run_distill", *TINY, "--epochs", 3, "--out", tmp_path / "run").code == 0
    assert script("run_distill", *TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume").code == 0
    assert_same_run(tmp_path / "run", tiny_run)


def test_probe_seed_and_probing_do_not_move_training(tiny_run, script, tmp_path):
    assert script("run_distill", *TINY, "--epochs", 5, "--probe", "none", "--out", tmp_path / "run").code == 0
    probed, silent = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (tiny_run, tmp_path / "run"))
    assert_same_tree(probed["student"], silent["student"])


def test_kl_falls_when_the_student_starts_apart(script, tmp_path):
    flags = ("--subset", 64, "--test-subset", 30, "--out-dim", 128, "--batch-size", 16, "--alpha", 0.5, "--epochs", 3)
    script("run_distill", *flags, "--log-every", 1, "--probe", "none", "--no-plot", "--out", tmp_path / "run")
    kl = [row["kl"] for row in read_csv(tmp_path / "run" / "log.csv")]
    assert kl[3] < kl[0] / 3


def test_several_seeds_are_summed_up(script, tmp_path):
    result = script("run_distill", *TINY, "--epochs", 2, "--seed", 0, 1, "--out", tmp_path / "run")
    assert result.code == 0
    logs = [read_csv(tmp_path / "run" / f"seed{seed}" / "log.csv") for seed in (0, 1)]
    assert logs[0][1]["loss"] != logs[1][1]["loss"]
    summary = {(row["quantity"], row["epoch"]): row for row in read_csv(tmp_path / "run" / "summary.csv")}
    finals = [log[-1]["student_knn"] for log in logs]
    bests = [max(row["student_knn"] for row in log[1:]) for log in logs]
    assert summary["student_knn", "final"]["mean"] == pytest.approx(sum(finals) / 2)
    assert summary["student_knn", "best"]["mean"] == pytest.approx(sum(bests) / 2)
    assert summary["student_knn", "final"]["std"] == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5, rel=1e-6)
    assert summary["teacher_linear", "final"]["n"] == 2


def test_curves_are_drawn(script, tmp_path):
    flags = [flag for flag in TINY if flag != "--no-plot"]
    script("run_distill", *flags, "--epochs", 1, "--seed", 0, 1, "--out", tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "run" / "seed1"):
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_run_probe_reproduces_the_log_and_averages_checkpoints(tiny_run, script, tmp_path):
    data = ("--subset", 40, "--test-subset", 30, "--k", 5, "--device", "cpu")
    paths = (tiny_run / "checkpoint.pt", tiny_run / "best.pt")
    result = script("run_probe", *paths, *data, "--out", tmp_path / "probe.csv")
    assert result.code == 0, result.err
    rows = read_csv(tmp_path / "probe.csv")
    assert [row["network"] for row in rows] == ["teacher", "student", "student-init", "input"] * 2
    last = read_csv(tiny_run / "log.csv")[-1]
    found = {row["network"]: row for row in rows[:4]}
    assert found["student"]["knn"] == pytest.approx(last["student_knn"])
    assert found["teacher"]["linear"] == pytest.approx(last["teacher_linear"])
    assert found["input"]["linear"] == pytest.approx(last["input_linear"])
    assert rows[0]["sha256"] == checkpoint.sha256(paths[0]) != rows[4]["sha256"] == checkpoint.sha256(paths[1])
    assert "+-" in result.out


def test_transfer_uses_the_sources_normalisation(tiny_run, script, tmp_path):
    contents = torch.load(tiny_run / "checkpoint.pt", weights_only=True)
    contents["data"]["mean"] = [5.0, 5.0, 5.0]
    contents["data"]["name"] = "elsewhere"
    torch.save(contents, tmp_path / "moved.pt")
    data = ("--subset", 40, "--test-subset", 30, "--k", 5, "--probe", "knn", "--network", "teacher")
    for path, out in ((tiny_run / "checkpoint.pt", "a.csv"), (tmp_path / "moved.pt", "b.csv")):
        assert script("run_probe", path, *data, "--out", tmp_path / out).code == 0
    a, b = (read_csv(tmp_path / name)[0] for name in ("a.csv", "b.csv"))
    assert (b["trained_on"], b["probed_on"]) == ("elsewhere", "digits")
    assert a["knn"] != b["knn"]
