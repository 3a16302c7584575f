"""Variants of distillation through the command line: a given teacher, one that moves, labels, other image sizes."""

import json

import pytest
import torch
from conftest import SUPERVISED, TINY
from test_run_distill import assert_same_run, assert_same_tree

from rtd import checkpoint, distill
from rtd.logs import read_csv


def last(folder):
    return read_csv(folder / "log.csv")[-1]


def test_a_student_becomes_the_teacher_of_a_second_round(script, tiny_run, tmp_path):
    spec = f"{tiny_run / 'checkpoint.pt'}:student"
    result = script("run_distill", *TINY, "--epochs", 2, "--teacher", spec, "--alpha", 0, "--out", tmp_path / "second")
    assert result.code == 0, result.err
    first, second = (checkpoint.load_checkpoint(folder / "checkpoint.pt") for folder in (tiny_run, tmp_path / "second"))
    assert_same_tree(dict(first["student"]), second["teacher"])  # its buffers too
    for name, value in second["student_init"].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, first["student"][name])
    assert last(tmp_path / "second")["teacher_knn"] == last(tiny_run)["student_knn"]
    assert not torch.equal(second["student"]["encoder.0.weight"], second["teacher"]["encoder.0.weight"])


def test_a_network_trained_with_labels_becomes_the_teacher(script, tmp_path):
    flags = [*SUPERVISED, "--runs", 2, "--points", 2, "--epochs", 1, "--init", "random"]
    assert script("run_lmc", *flags, "--out", tmp_path / "lmc").code == 0
    path = tmp_path / "lmc" / "runs" / "init0-run1.pt"
    spec = f"{path}:supervised"
    result = script("run_distill", *TINY, "--epochs", 1, "--teacher", spec, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    teacher = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["teacher"]
    trained = torch.load(path, weights_only=True)["training"]["classifier"]
    for name, value in teacher.items():
        if name.startswith("encoder."):
            assert torch.equal(value, trained[name]), name
    script("run_distill", *TINY, "--epochs", 0, "--out", tmp_path / "random")  # the head is a random teacher's
    random = checkpoint.load_checkpoint(tmp_path / "random" / "checkpoint.pt")["teacher"]
    assert all(torch.equal(value, random[name]) for name, value in teacher.items() if name.startswith("head."))

    result = script("run_distill", *TINY, "--encoder", "resnet56", "--teacher", spec, "--out", tmp_path / "other")
    assert result.code == 2 and "was built with encoder resnet20; give the same flags" in result.err
    state = torch.load(path, weights_only=True)
    del state["training"]["classifier"]["encoder.0.weight"]
    torch.save(state, path)
    result = script("run_distill", *TINY, "--teacher", spec, "--out", tmp_path / "other")
    assert result.code == 2 and "do not fit its architecture" in result.err


def test_a_teacher_of_another_architecture_is_refused(script, tiny_run, tmp_path):
    spec = f"{tiny_run / 'checkpoint.pt'}:student"
    result = script("run_distill", *TINY, "--out-dim", 32, "--norm", "layer", "--teacher", spec, "--out", tmp_path / "run")
    assert result.code == 2
    assert "was built with out_dim 64, norm None; give the same flags" in result.err
    assert not (tmp_path / "run").exists()


def test_a_changed_teacher_is_noticed_on_resume(script, tiny_run, tmp_path):
    path = tmp_path / "teacher.pt"
    path.write_bytes((tiny_run / "checkpoint.pt").read_bytes())
    flags = [*TINY, "--teacher", f"{path}:student", "--out", tmp_path / "run"]
    assert script("run_distill", *flags, "--epochs", 1).code == 0
    path.write_bytes((tiny_run / "best.pt").read_bytes())
    result = script("run_distill", *flags, "--epochs", 2, "--resume")
    assert result.code == 2
    assert "changed since" in result.err


@pytest.mark.slow
def test_a_moving_teacher_goes_on_where_it_stood(script, tmp_path):
    flags = [*TINY, "--ema", 0.3, "--lr", 0.01]
    script("run_distill", *flags, "--epochs", 3, "--out", tmp_path / "whole")
    script("run_distill", *flags, "--epochs", 1, "--out", tmp_path / "parts")
    result = script("run_distill", *flags, "--epochs", 3, "--resume", "--out", tmp_path / "parts")
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    script("run_distill", *TINY, "--lr", 0.01, "--epochs", 3, "--out", tmp_path / "frozen")
    moved, frozen = (checkpoint.load_checkpoint(tmp_path / name / "checkpoint.pt")["teacher"] for name in ("whole", "frozen"))
    assert not torch.equal(moved["encoder.0.weight"], frozen["encoder.0.weight"])
    rows = read_csv(tmp_path / "whole" / "log.csv")
    assert rows[0]["teacher_entropy"] != rows[-1]["teacher_entropy"]
    script("run_distill", *flags, "--epochs", 3, "--probe-every", 2, "--out", tmp_path / "seldom")
    seldom = read_csv(tmp_path / "seldom" / "log.csv")
    assert [row["teacher_knn"] for row in seldom] == [
        rows[0]["teacher_knn"],
        None,
        rows[2]["teacher_knn"],
        rows[3]["teacher_knn"],
    ]


def test_labels_change_the_loss(script, tiny_run, tmp_path):
    script("run_distill", *TINY, "--epochs", 1, "--beta", 0.5, "--out", tmp_path / "beta")
    without, with_labels = (read_csv(folder / "log.csv")[0] for folder in (tiny_run, tmp_path / "beta"))
    assert with_labels["loss"] - without["loss"] == pytest.approx(0.5 * without["loss"], rel=0.1)  # both near log 64
    assert with_labels["kl"] == without["kl"]


@pytest.mark.parametrize(
    ("flags", "decays", "lr"),
    [
        ([], (0, 0), 0.001),
        (["--weight-decay", 0.1, "--bias-decay", 0.01, "--lr", 0.02], (0.1, 0.01), 0.02),
    ],
)
def test_the_optimizers_flags_reach_it(script, tmp_path, monkeypatch, flags, decays, lr):
    """No decay of anything unless asked for; of weights and of biases and norms apart."""
    made, plain = [], torch.optim.AdamW

    def watched(groups, **options):
        made.append((groups, options))
        return plain(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    assert script("run_distill", *TINY, *flags, "--probe", "none", "--epochs", 1, "--out", tmp_path / "run").code == 0
    ((weights, others), options), *rest = made
    assert not rest and options["lr"] == lr and set(options) == {"lr", "fused"}  # betas and eps are torch's
    assert (weights["weight_decay"], others["weight_decay"]) == decays
    assert {p.ndim for p in weights["params"]} == {2, 4} and {p.ndim for p in others["params"]} == {1}


def test_bf16_starts_in_float32(script, tmp_path, monkeypatch):
    """--fp32-steps of them, with TF32 off, as it is between steps and in the next run; and every step is in training mode."""
    seen, forward = [], distill.Distiller.forward
    answered, answer = [], distill.FrozenTeacher.__init__

    def watched(distiller, images, index, diagnostics=False, precision=None, labels=None):
        seen.append((precision, distiller.student.training, torch.backends.cuda.matmul.allow_tf32))
        return forward(distiller, images, index, diagnostics, precision, labels)

    def answering(*args, **options):
        answered.append(torch.backends.cuda.matmul.allow_tf32)
        answer(*args, **options)

    monkeypatch.setattr(distill.Distiller, "forward", watched)
    monkeypatch.setattr(distill.FrozenTeacher, "__init__", answering)
    for precision in ("bf16", "tf32"):
        seen.clear()
        flags = [*TINY, "--precision", precision, "--fp32-steps", 4, "--epochs", 2, "--probe", "none", "--seed", 0, 1]
        assert script("run_distill", *flags, "--out", tmp_path / precision).code == 0
        assert len(seen) == 2 * 9  # for each seed three of epoch 0, then two epochs of three steps
        assert [which for which, *_ in seen] == 2 * (["fp32"] * 7 + [precision] * 2)
        assert all(training for _, training, _ in seen)
        assert [tf32 for *_, tf32 in seen] == 2 * ([False] * 7 + [precision == "tf32"] * 2)
        assert not any(answered) and not torch.backends.cuda.matmul.allow_tf32


def test_epochs_of_is_written_down_as_given(script, tmp_path):
    flags = [*TINY, "--epochs", 1, "--epochs-of", 80, "--probe", "none", "--out", tmp_path / "run"]
    assert script("run_distill", *flags).code == 0
    assert len(read_csv(tmp_path / "run" / "log.csv")) == 3  # two epochs of 40 images
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["epochs"] == 1
    assert checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["config"]["flags"]["epochs"] == 1
    assert script("run_distill", *flags, "--resume").code == 0  # nothing is left to do


def test_save_every_saves_that_often_and_at_the_end(script, tmp_path):
    script("run_distill", *TINY, "--epochs", 3, "--save-every", 2, "--out", tmp_path / "run")
    contents = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert contents["epoch"] == 3
    script("run_distill", *TINY, "--epochs", 5, "--save-every", 9, "--resume", "--out", tmp_path / "run")
    assert checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] == 5


@pytest.mark.slow
def test_images_of_64_pixels_go_through_every_script(script, tmp_path):
    """The flag must be repeated: what was learnt at 64 pixels is refused at 32."""
    script("run_distill", *TINY, "--epochs", 1, "--image-size", 64, "--norm", "layer", "--out", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    data = ["--subset", 40, "--test-subset", 30, "--device", "cpu"]
    supervised = [*SUPERVISED, "--init", f"{path}:student", "random", "--epochs", 1]
    for name, flags in (
        ("run_probe", [path, *data, "--k", 5, "--out", tmp_path / "probe.csv"]),
        ("run_imp", [*supervised, "--rounds", 1, "--out", tmp_path / "imp"]),
        ("run_lmc", [*supervised, "--runs", 2, "--points", 2, "--out", tmp_path / "lmc"]),
        (
            "run_landscape",
            [*data, "--k", 5, "--origin", f"{path}:teacher", "--x-axis", f"{path}:student", "--y-axis", f"{path}:student-init"]
            + ["--no-plot", "--x-range", 0, 1, 2, "--y-range", 0, 1, 2, "--out", tmp_path / "landscape"],
        ),
    ):
        result = script(name, *flags)
        assert result.code == 2
        assert "give --image-size 64, not 32" in result.err
        result = script(name, *flags, "--image-size", 64, *(["--overwrite"] if name == "run_probe" else []))
        assert result.code == 0, f"{name}: {result.err}"


def test_starts_of_other_norm_layers_do_not_mix(script, tiny_run, tmp_path):
    script("run_distill", *TINY, "--epochs", 0, "--norm", "layer", "--out", tmp_path / "run")
    starts = [f"{tmp_path / 'run' / 'checkpoint.pt'}:student", f"{tiny_run / 'checkpoint.pt'}:student"]
    result = script("run_imp", *SUPERVISED, "--init", *starts, "--epochs", 1, "--out", tmp_path / "imp")
    assert result.code == 2
    assert "its norm is None, not layer" in result.err
