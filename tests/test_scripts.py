"""What each script computes and writes, checked against formulas of these tests' own."""

import hashlib
import itertools
import json
import math
import re
import shutil
import statistics
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, DATA, ROOT, SCRIPTS, SUPERVISED, TINY, difference, state, table, well
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import rtd
from rtd import models

DEVICE = "deterministic device precision data-dir dataset download image-size subset test-subset"
OUTPUT = f"batch-size no-plot out overwrite plot-format resume seed {DEVICE}"
PROBES = "k probe probe-epochs"
TRAINING = f"encoder epochs init lr save-every {OUTPUT}"
FLAGS = {
    "distill": "alpha beta bias-decay bottleneck bottleneck-dim compile ema encoder epochs "
    "epochs-of fp32-steps head-hidden log-every loss lr no-weight-norm norm out-dim probe-dataset "
    "probe-every probe-subset save-every student-temperature teacher teacher-temperature "
    f"weight-decay {PROBES} {OUTPUT}",
    "probe": f"network out overwrite seed {PROBES} {DEVICE}",
    "imp": f"control prune prune-fraction rewind-epoch rounds {TRAINING}",
    "lmc": f"bn-batches bn-statistics line-subset points runs {TRAINING}",
    "landscape": "bn-statistics encoder-only origin plane plot-only x-axis x-range y-axis y-range "
    f"{PROBES} {OUTPUT}",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_flags_are_these(script, name):
    result = well(script(name, "--help"))
    assert result.err == "" and f"python run_{name}.py" in result.out
    shown = {*re.findall(r"^ +(?:-h, )?--([a-z0-9-]+)", result.out, re.MULTILINE)}
    assert shown == {"help", *FLAGS[name].split()}


@pytest.mark.parametrize("name", ["distill", "imp", "lmc", "landscape"])
def test_config_says_how_to_make_the_run_again(finished, name):
    config = json.loads((finished[name] / "config.json").read_text())
    command = ["python", f"run_{name}.py", *finished.flags(name).split(), "--out", finished[name]]
    assert config["command"] == " ".join(helpers.words(command))
    assert config["flags"]["test_subset"] == 30 and config["flags"]["seed"] == 0
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert config["device"].startswith("cpu, 1 thread, ") and {"commit", "started"} <= {*config}
    assert not [*finished[name].glob("*.png")]  # --no-plot


# run_distill.py


def vector(tensors):
    """Their entries one after the other, in float64: a copy."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def weights(states):
    """The entries of a state dict that are no buffers, as a ``vector``."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return vector(value for name, value in states.items() if not name.endswith(buffers))


def part(states, prefix):
    return {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}


def watch_steps(monkeypatch, kind=torch.optim.SGD):
    """A list to which each step of such an optimizer adds itself, its rate, and its weights."""
    steps, plain = [], kind.step

    def step(optimizer, *arguments):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = vector(parameters)
        plain(optimizer, *arguments)
        lr = optimizer.param_groups[0]["lr"]
        one = {"optimizer": optimizer, "lr": lr, "before": before, "after": vector(parameters)}
        steps.append(SimpleNamespace(**one))

    monkeypatch.setattr(kind, "step", step)
    return steps


def is_drawn(path):
    return path.read_bytes().startswith(b"\x89PNG")


def log(script, folder, *flags):
    well(script("distill", TINY, *flags, "--out", folder))
    return table(folder / "log.csv")


def test_the_log_of_a_distillation_and_the_gain_that_it_says(finished):
    rows = table(finished["distill"] / "log.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(e, 3 * e) for e in range(5)]
    assert rows[0]["distance_total"] == 0 and rows[0]["images_per_second"] is None
    assert 1e-6 < rows[0]["kl"] < 0.1  # batch statistics against the teacher's running ones
    for row in rows[1:]:
        squares = row["distance_encoder"] ** 2 + row["distance_head"] ** 2
        assert row["distance_total"] == pytest.approx(squares**0.5)
        # cross-entropy is entropy plus KL; so early, the teacher's is that of a uniform answer
        assert row["loss"] == pytest.approx(row["teacher_entropy"] + row["kl"], abs=1e-5)
        assert row["teacher_entropy"] == pytest.approx(math.log(64), rel=0.01)
        assert row["teacher_linear"] == rows[0]["teacher_linear"]
    assert table(finished["ema"] / "log.csv")[0]["kl"] > 0
    said = " ".join(line for line in finished.said["distill"].split("\n") if "gain" in line)
    for probe in ("linear", "knn"):
        assert f"{row[f'student_{probe}'] - row[f'teacher_{probe}']:+.2f}" in said


def test_distances_and_best_epoch_are_those_of_the_saved_networks(finished):
    contents = state(finished["distill"] / "checkpoint.pt")
    last = table(finished["distill"] / "log.csv")[-1]
    for name, prefix in (("encoder", "encoder."), ("head", "head."), ("total", "")):
        one, two = (weights(part(contents[who], prefix)) for who in ("student", "student_init"))
        assert last[f"distance_{name}"] == pytest.approx((one - two).norm().item(), rel=1e-5)
    near = weights(contents["teacher"]) - weights(contents["student_init"])
    assert 0 < near.abs().max() < 1e-6  # alpha is 1e-10
    rows = table(finished["distill"] / "log.csv")[1:]
    best = max(rows, key=lambda row: (row["student_linear"], -row["epoch"]))["epoch"]
    assert state(finished["distill"] / "best.pt")["epoch"] == best


@pytest.mark.slow
def test_the_student_overtakes_its_teacher(script, tmp_path):
    """The paper's claim, on the digits: the features get worse at first, then better."""
    flags = "--out-dim 4096 --batch-size 16 --lr 3e-4 --epochs 4 --probe linear --probe-epochs 100"
    well(script("distill", flags, "--no-plot --out", tmp_path))
    accuracies = [row["student_linear"] for row in table(tmp_path / "log.csv")]
    teacher, first, *_, last = accuracies
    assert first < teacher - 10 and last > teacher + 2, accuracies


def test_probing_does_not_move_training(script, finished, tmp_path):
    log(script, tmp_path, "--epochs 4 --probe none")
    one, two = (state(f / "checkpoint.pt")["student"] for f in (finished["distill"], tmp_path))
    assert difference(one, two) == ""


def test_labels_change_the_loss_and_temperatures_the_answers(script, tmp_path):
    def start(more=""):
        flags = "--epochs 0 --probe none --norm none --alpha 0.5"
        (row,) = log(script, tmp_path / f"run {more}", flags, more)
        return row

    plain, beta, kl = start(), start("--beta 0.5"), start("--loss kl")
    assert beta["loss"] - plain["loss"] == pytest.approx(0.5 * math.log(64), rel=0.05)
    assert kl["loss"] == pytest.approx(plain["kl"], rel=1e-4)
    assert beta["kl"] == kl["kl"] == plain["kl"]
    assert 0 < start("--loss mse")["loss"] < 1
    one, two = start("--teacher-temperature 0.1"), start("--student-temperature 0.1")
    assert one["teacher_entropy"] < plain["teacher_entropy"] - 0.1
    assert one["student_entropy"] == plain["student_entropy"]
    assert two["student_entropy"] < plain["student_entropy"] - 0.1


def test_a_student_becomes_the_teacher_of_a_second_round(script, finished, tmp_path):
    path = finished["distill"] / "checkpoint.pt"
    rows = log(script, tmp_path, f"--epochs 1 --alpha 0 --teacher {path}:student")
    first, second = state(path), state(tmp_path / "checkpoint.pt")
    assert difference(first["student"], second["teacher"]) == ""  # its buffers too
    assert torch.equal(weights(first["student"]), weights(second["student_init"]))
    assert rows[-1]["teacher_knn"] == table(path.with_name("log.csv"))[-1]["student_knn"]


def test_a_network_trained_with_labels_becomes_the_teacher(script, finished, tmp_path):
    path = finished["lmc"] / "runs" / "init0-run1.pt"
    log(script, tmp_path, f"--epochs 0 --probe none --teacher {path}:supervised")
    teacher, random = (state(f / "checkpoint.pt")["teacher"] for f in (tmp_path, finished["a"]))
    trained = state(path)["training"]["classifier"]
    assert difference(part(trained, "encoder."), part(teacher, "encoder.")) == ""
    assert difference(part(random, "head."), part(teacher, "head.")) == ""


def test_a_moving_teacher_moves_and_is_probed(script, finished, tmp_path):
    early, late = (state(finished[name] / "checkpoint.pt") for name in ("half ema", "ema"))
    assert not torch.equal(weights(early["teacher"]), weights(late["teacher"]))
    rows = table(finished["ema"] / "log.csv")
    assert rows[0]["teacher_entropy"] != rows[-1]["teacher_entropy"]
    seldom = log(script, tmp_path, CASES["ema"].flags, "--probe-every 2")
    probed = [rows[0]["teacher_knn"], None, rows[2]["teacher_knn"], rows[3]["teacher_knn"]]
    assert [row["teacher_knn"] for row in seldom] == probed


DECAYS = "--lr 0.02 --weight-decay 0.1 --bias-decay 0.01"


@pytest.mark.parametrize("flags, lr, decays", [("", 0.001, [0, 0]), (DECAYS, 0.02, [0.1, 0.01])])
def test_the_optimizers_flags_reach_it(script, tmp_path, monkeypatch, flags, lr, decays):
    """No decay unless asked for; of weights, and of biases and norms, apart."""
    steps = watch_steps(monkeypatch, torch.optim.AdamW)
    log(script, tmp_path, "--epochs 1 --probe none", flags)
    groups = steps[0].optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == decays
    assert [{p.ndim for p in group["params"]} for group in groups] == [{2, 4}, {1}]
    options = [(group["lr"], group["betas"], group["eps"]) for group in groups]
    assert options == [(lr, (0.9, 0.999), 1e-8)] * 2


def test_lower_precision_begins_in_float32(script, finished, tmp_path, monkeypatch):
    """--fp32-steps of them, without TF32, which holds for training steps alone."""
    flags, whole = "--epochs 2 --probe none --precision", table(finished["distill"] / "log.csv")
    late = log(script, tmp_path / "late", flags, "bf16 --fp32-steps 3")
    bf16 = log(script, tmp_path / "bf16", flags, "bf16")
    fp32, late, bf16 = ([row["loss"] for row in rows[:3]] for rows in (whole, late, bf16))
    assert fp32[:2] == late[:2] and fp32[2] != late[2]
    assert bf16 == fp32  # by default the first 100 steps
    seen, backward = [], torch.Tensor.backward

    def watched(*arguments, **options):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        backward(*arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    log(script, tmp_path / "tf32", flags, "tf32 --fp32-steps 4")
    assert seen == [False] * 4 + [True] * 2 and not torch.backends.cuda.matmul.allow_tf32


def test_images_of_an_epoch_and_of_the_probes_are_chosen(script, finished, tmp_path):
    """Fig. 4: int(3 * 20 / 10) epochs of 10 images of noise, all probes on the same 40 digits."""
    flags = "--dataset noise --subset 10 --epochs-of 20 --batch-size 5 --probe-every 3"
    flags += " --probe-dataset digits --probe-subset 40 --probe knn --epochs"
    rows = log(script, tmp_path, flags, 3)
    assert [row["step"] for row in rows] == [2 * epoch for epoch in range(7)]
    result = script("distill", TINY, flags, 1, "--resume --out", tmp_path)
    assert helpers.one_sentence(result, "--epochs", "epoch 6", "2 are too few") == ""
    assert {row["epoch"] for row in rows if row["student_knn"] is not None} == {0, 6}
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["epochs"] == 3
    assert rows[0]["teacher_knn"] == table(finished["distill"] / "log.csv")[0]["teacher_knn"]


def test_a_student_that_cannot_move_is_said(script, tmp_path):
    """An exact copy without batch norm, whose outputs here are the teacher's to the bit."""
    flags = f"{TINY} --subset 16 --probe none --epochs 1 --alpha 0 --norm"
    for norm, said in (("none", True), ("batch", False)):
        assert (
            "not moved" in well(script("distill", flags, norm, "--out", tmp_path / norm)).out
        ) == said


def test_a_sweep_has_a_run_for_each_combination(script, finished, tmp_path):
    names = [f"alpha{alpha}-seed{seed}" for alpha in (0, 0.5) for seed in (0, 1)]
    folders = [path.name for path in finished["sweep"].iterdir() if path.is_dir()]
    assert sorted(folders) == names
    assert len({(finished["sweep"] / name / "log.csv").read_text() for name in names}) == 4
    alone = log(script, tmp_path, "--probe knn --epochs 2 --alpha 0.5 --seed 1")
    assert difference(alone, table(finished["sweep"] / names[3] / "log.csv")) == ""
    shutil.copytree(finished["sweep"], tmp_path / "more")
    flags = CASES["sweep"].flags.replace("--alpha 0 0.5", "--alpha 0 1")
    assert "2 other runs" in well(script("distill", flags, "--resume --out", tmp_path / "more")).out


def test_summary_is_of_the_seeds_of_each_setting(finished):
    summary = table(finished["sweep"] / "summary.csv")
    assert {(row["alpha"], row["n"]) for row in summary} == {(0, 2), (0.5, 2)}
    found = {(row["alpha"], row["quantity"], row["epoch"]): row for row in summary}
    for alpha, quantity in itertools.product((0, 0.5), ("student_knn", "kl", "distance_total")):
        logs = [table(finished["sweep"] / f"alpha{alpha}-seed{s}" / "log.csv") for s in (0, 1)]
        values = np.array([[row[quantity] for row in rows[1:]] for rows in logs])
        for epoch, picked in (("best", values.max(1)), ("final", values[:, -1])):
            if quantity != "student_knn" and epoch == "best":
                assert (alpha, quantity, epoch) not in found
                continue
            row = found[alpha, quantity, epoch]
            assert row["mean"] == pytest.approx(picked.mean())
            assert row["std"] == pytest.approx(picked.std(ddof=1))


SWEEPS = {
    "--alpha 1e-10 0.9999999": "alpha1e-10 alpha0.9999999",
    "--norm none layer --seed 0 1": "normnone-seed0 normnone-seed1 normlayer-seed0",
    "--bottleneck -/lb/fn/-/l/- -/-/-/-/l/fn": "bottleneck-.lb.fn.-.l.- bottleneck-.-.-.-.l.fn",
}


@pytest.mark.parametrize("flags", SWEEPS)
def test_sweeps_are_named_summed_up_and_drawn(script, tmp_path, flags):
    folders = [tmp_path / "sweep" / name for name in SWEEPS[flags].split()]
    plotted = TINY.replace("--no-plot", "--epochs 1 --probe knn")
    well(script("distill", plotted, flags, "--out", tmp_path / "sweep"))
    assert all(is_drawn(folder / "curves.png") for folder in folders)
    assert all(is_drawn(tmp_path / "sweep" / name) for name in ("sweep.png", "dynamics.png"))
    assert table(tmp_path / "sweep" / "summary.csv")
    if "--bottleneck" in flags:
        raw = log(script, tmp_path / "raw", "--epochs 1 --probe knn --no-weight-norm")
        assert difference(raw, table(folders[0] / "log.csv")) == ""


# run_probe.py


def test_folders_and_files_have_names_by_default(script, tmp_path, monkeypatch):
    flags, run = TINY.replace("--no-plot", "--plot-format svg pdf"), "runs/distill-digits-resnet20"
    monkeypatch.chdir(tmp_path)
    well(script("distill", flags, "--epochs 0 --probe none"))
    well(script("probe", f"{run}/checkpoint.pt", DATA, "--k 5 --probe knn"))
    for name in ("log.csv", "curves.svg", "curves.pdf", "probe-digits.csv"):
        assert (tmp_path / run / name).exists()


def test_probing_reproduces_the_log(script, finished, tmp_path):
    paths = [finished["distill"] / name for name in ("checkpoint.pt", "best.pt")]
    result = well(script("probe", paths, DATA, "--k 5 --out", tmp_path / "probe.csv"))
    rows = table(tmp_path / "probe.csv")
    assert [r["network"] for r in rows] == ["teacher", "student", "student-init", "input"] * 2
    log = table(finished["distill"] / "log.csv")
    for row in rows:
        name = row["network"].removesuffix("-init")
        logged = log[row["epoch"] if row["network"] == "student" else 0]
        for probe in ("linear", "knn"):
            assert row[probe] == logged[f"{name}_{probe}"]
    assert len({row["sha256"] for row in rows}) == 2 and "+-" in result.out


def test_pixels_are_probed_as_scikit_learn_does(script, finished, tmp_path, monkeypatch):
    path = finished["elsewhere"] / "checkpoint.pt"
    images = helpers.image_folder(tmp_path / "images", train=60, test=40)
    steps = watch_steps(monkeypatch, torch.optim.AdamW)
    flags = f"--dataset folder --data-dir {images} --network input --k 3 --probe-epochs 4"
    for seed in (0, 1):
        out = tmp_path / f"{seed}.csv"
        well(script("probe", path, flags, f"--device cpu --seed {seed} --out", out))
    (x, y), (u, v) = (read_images(images / s, state(path)["data"]) for s in ("train", "test"))
    knn = KNeighborsClassifier(3).fit(x.flatten(1), y).score(u.flatten(1), v)
    assert table(tmp_path / "0.csv")[0]["knn"] == pytest.approx(100 * knn)
    assert len(steps) == 8 and not torch.equal(steps[0].before, steps[4].before)


def test_transfer_uses_the_sources_normalisation(script, finished, tmp_path):
    """The same random teacher, on the same digits, normalised for digits and for noise images."""
    found, teachers = [], []
    for name in ("a", "elsewhere"):
        path, out = finished[name] / "checkpoint.pt", tmp_path / f"{name}.csv"
        flags = "--k 5 --probe-epochs 40 --network teacher --dataset digits --out"
        well(script("probe", path, DATA, flags, out))
        found += table(out)
        teachers.append(state(path)["teacher"])
    trained = [(row["trained_on"], row["probed_on"]) for row in found]
    assert trained == [("digits", "digits"), ("folder", "digits")]
    assert difference(*teachers) == "" and found[0]["linear"] != found[1]["linear"]


# run_imp.py

WEIGHTS = 270_896  # of ResNet20's convolutions and its classifier


def test_each_round_prunes_a_fifth_of_what_is_left(finished):
    rows = table(finished["imp"] / "imp.csv")
    assert [(r["init"], r["rewind_epoch"], r["round"]) for r in rows] == [
        ("random", rewind, r) for rewind in (0, 1) for r in range(3)
    ]
    for row in rows:
        assert row["sparsity"] == pytest.approx(1 - 0.8 ** row["round"], abs=1 / WEIGHTS)
        assert row["sparsity"] == pytest.approx(1 - row["remaining_parameters"] / WEIGHTS, abs=1e-8)
        assert row["epochs"] == (3 if row["round"] == 0 else 3 - row["rewind_epoch"])
        assert 0 <= row["test_accuracy"] <= row["test_accuracy_best"] <= 100


@pytest.mark.parametrize("epoch", [0, 1])
def test_each_round_starts_at_mask_times_rewind_weights(script, tmp_path, monkeypatch, epoch):
    """Bit for bit; and what is pruned is exactly 0 whenever a step begins."""
    steps = watch_steps(monkeypatch)
    flags = f"{SUPERVISED} --epochs 3 --rounds 2 --rewind-epoch {epoch} --out {tmp_path}"
    well(script("imp", flags))
    contents = state(tmp_path / "chains" / f"init0-rewind{epoch}.pt")
    rewind, masks = contents["rewind"]["classifier"], contents["masks"]
    rewound, again = weights(rewind), 3 * (3 - epoch)
    may = weights({name: torch.full_like(w, name in masks) for name, w in rewind.items()}) == 1
    assert torch.equal(steps[3 * epoch].before, rewound)
    kept = torch.ones_like(may)
    for first in (9, 9 + again):
        before, kept = kept, (steps[first].before != 0) | ~may
        assert torch.equal(steps[first].before, rewound * kept)
        assert not (kept & ~before).any()  # a mask only shrinks
        assert all((step.before[~kept] == 0).all() for step in steps[first : first + again])
    assert (weights(contents["training"]["classifier"])[~kept] == 0).all()  # after the last one
    assert torch.equal(kept[may], vector(masks.values()) == 1) and len(steps) == 9 + 2 * again


def test_a_round_that_prunes_nothing_repeats_the_first(script, tmp_path, monkeypatch):
    """Weights, momentum, schedule, batches and augmentation are those of the first, to the bit."""
    steps = watch_steps(monkeypatch)
    flags = "--epochs 4 --rounds 1 --prune-fraction 1e-9 --rewind-epoch 1 --out"
    well(script("imp", SUPERVISED, flags, tmp_path))
    first, again = steps[3:12], steps[12:]
    assert [one.lr for one in steps[:12]] == pytest.approx([0.1] * 6 + [0.01] * 3 + [0.001] * 3)
    for a, b in zip(first, again, strict=True):
        assert a.lr == b.lr and torch.equal(a.after, b.after)


def test_pruned_are_the_smallest_of_the_trained_weights(script, tmp_path, monkeypatch):
    steps = watch_steps(monkeypatch)
    flags = f"{SUPERVISED} --epochs 1 --rounds 1 --prune all --prune-fraction 0.5 --out {tmp_path}"
    well(script("imp", flags))
    masks = state(tmp_path / "chains" / "init0-rewind0.pt")["masks"]
    trained, kept = steps[2].after.abs(), vector(masks.values()) == 1
    assert trained[kept].min() >= trained[~kept].max()
    assert len(kept) == 272_474 and (~kept).sum() == 272_474 // 2
    assert "encoder.1.weight" in masks and "fc.bias" in masks
    assert table(tmp_path / "imp.csv")[-1]["remaining_parameters"] == 272_474 // 2


def test_the_control_shuffles_masks_within_their_layers(script, finished, tmp_path):
    """The same number of weights in each layer, other ones; the same rewind point.

    Its rows stay where the run is continued without it.
    """
    rows, chains = table(finished["shuffle"] / "imp.csv"), finished["shuffle"] / "chains"
    kinds = {(row["rewind_epoch"], row["control"]) for row in rows}
    assert kinds == {(0, None), (0, "shuffle"), (1, None), (1, "shuffle")} and len(rows) == 12
    assert len({(row["round"], row["remaining_parameters"]) for row in rows}) == 3
    plain, control = (state(chains / f"init0-rewind0{name}.pt") for name in ("", "-shuffle"))
    assert difference(plain["rewind"]["classifier"], control["rewind"]["classifier"]) == ""
    for name, mask in plain["masks"].items():
        assert not torch.equal(mask, control["masks"][name])
        assert mask.sum() == control["masks"][name].sum()
    shutil.copytree(finished["shuffle"], tmp_path / "run")
    flags = CASES["shuffle"].flags.replace("--control shuffle", "--resume --out")
    well(script("imp", flags, tmp_path / "run"))
    assert table(tmp_path / "run" / "imp.csv") == rows


def test_starts_are_recorded_and_drawn(script, finished, tmp_path):
    path = finished["distill"] / "checkpoint.pt"
    starts = [f"{path}:student", f"{path}:student-init", "random", "random:1"]
    flags = SUPERVISED.replace("--no-plot", "").replace("--encoder resnet20", "")
    for name, more in (("imp", "--rounds 1"), ("lmc", "--runs 2 --points 3")):
        out = tmp_path / name
        well(script(name, flags, more, "--epochs 1 --out", out, "--init", starts))
        assert list(dict.fromkeys(row["init"] for row in table(out / f"{name}.csv"))) == starts
        assert is_drawn(out / f"{name}.png")
        config = (out / "config.json").read_text()
        assert all(json.dumps(start) in config for start in starts[:2])
        assert hashlib.sha256(path.read_bytes()).hexdigest() in config
    chains = [state(tmp_path / "imp" / "chains" / f"init{i}-rewind0.pt") for i in range(4)]
    student, _, one, two = (part(chain["rewind"]["classifier"], "encoder.") for chain in chains)
    assert difference(student, part(state(path)["student"], "encoder.")) == ""
    assert not torch.equal(weights(one), weights(two))  # random and random:1


# run_lmc.py


def pairs_of(rows, **wanted):
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def test_only_lines_are_walked_anew_that_must_be(script, finished, tmp_path, monkeypatch):
    """Not for another order of the treatments; and --runs trains only runs that are not there."""
    run = shutil.copytree(finished["lmc"], tmp_path / "run")
    states, rows = [helpers.snapshot(run / "lines")], table(run / "lmc.csv")
    flags = CASES["lmc"].flags.replace("recompute interpolate", "interpolate recompute")
    well(script("lmc", flags, "--resume --out", run))
    states.append(helpers.snapshot(run / "lines"))
    first, second = ({k: v for k, v in one.items() if k.endswith(".pt")} for one in states)
    assert first and first == second and table(run / "lmc.csv") == rows
    assert all((row["train_error"] / 5).is_integer() for row in rows)  # of 20 images
    steps, more = watch_steps(monkeypatch), finished.flags("lmc").replace("--runs 3", "--runs 4")
    well(script("lmc", more, "--bn-batches 1 --resume --out", run))
    assert len(steps) == 6  # of the fourth run
    old = [row for row in table(run / "lmc.csv") if row["j"] < 3]
    changed = {a["bn"] for a, b in zip(old, rows, strict=True) if a != b}
    assert changed == {"recompute"}


def test_barriers_are_the_rise_over_the_mean_of_the_ends(finished):
    rows = table(finished["lmc"] / "lmc.csv")
    found = table(finished["lmc"] / "barriers.csv")
    for bn, split in itertools.product(("recompute", "interpolate"), ("train", "test")):
        barriers = []
        for i, j in ((0, 1), (0, 2), (1, 2)):
            line = [row[f"{split}_error"] for row in pairs_of(rows, bn=bn, i=i, j=j)]
            assert len(line) == 5
            barriers.append(max(line) - (line[0] + line[-1]) / 2)
            (row,) = pairs_of(found, bn=bn, statistic="pair", i=i, j=j)
            assert row[f"{split}_barrier"] == pytest.approx(barriers[-1], abs=1e-6)
        for name, statistic in (("mean", statistics.mean), ("std", statistics.stdev)):
            (row,) = pairs_of(found, bn=bn, statistic=name)
            assert row[f"{split}_barrier"] == pytest.approx(statistic(barriers), abs=1e-6)


def read_images(folder, data):
    """(images, normalised with the mean and std of ``data``; labels) of a split of a folder."""
    paths = sorted(folder.rglob("*.png"))
    images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    labels = torch.tensor([["one", "two"].index(path.parent.name) for path in paths])
    return (images.permute(0, 3, 1, 2) / 255 - mean) / std, labels


@torch.no_grad()
def plain_average(encoder, images):
    """Batch norm's statistics become those of the images."""
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    encoder.train()(images)
    encoder.eval()


def test_runs_share_their_start_and_a_point_mixes_its_ends(script, finished, tmp_path, monkeypatch):
    """Written out with torch alone: weights by lerp, batch norm's statistics interpolated, or plain
    averages over the training images without augmentation; both splits. Each run has two steps.
    The start is a student of other images, whose normalisation it keeps.
    """
    steps = watch_steps(monkeypatch)
    images = helpers.image_folder(tmp_path / "images", train=16)
    flags = f"{SUPERVISED} --dataset folder --data-dir {images} --subset 16 --test-subset 8"
    flags += " --epochs 2 --runs 2 --points 5 --bn-statistics recompute interpolate"
    flags += f" --init {finished['a']}/checkpoint.pt:student"
    well(script("lmc", flags, "--out", tmp_path / "run"))
    assert len(steps) == 4 and torch.equal(steps[0].before, steps[2].before)
    assert not torch.equal(steps[0].after, steps[2].after), "the same images in the same way"
    saved = [state(tmp_path / "run" / "runs" / f"init0-run{run}.pt") for run in (0, 1)]
    one, two = (contents["training"]["classifier"] for contents in saved)
    mixed = {k: torch.lerp(a, two[k], 0.25) if a.is_floating_point() else a for k, a in one.items()}
    encoder = models.build_encoder("resnet20").to_empty(device="cpu").eval()
    encoder.load_state_dict(part(mixed, "encoder."))
    splits = {name: read_images(images / name, saved[0]["data"]) for name in ("train", "test")}
    for bn in ("interpolate", "recompute"):
        if bn == "recompute":
            plain_average(encoder, splits["train"][0])
        (row,) = pairs_of(table(tmp_path / "run" / "lmc.csv"), bn=bn, gamma=0.25)
        for name, (x, labels) in splits.items():
            with torch.no_grad():
                logits = F.linear(encoder.eval()(x), mixed["fc.weight"], mixed["fc.bias"])
            loss = F.cross_entropy(logits, labels).item()
            assert row[f"{name}_loss"] == pytest.approx(loss, rel=1e-4)
            error = 100 * (logits.argmax(1) != labels).double().mean().item()
            assert row[f"{name}_error"] == pytest.approx(error)


@pytest.mark.parametrize(
    "name, bn", [("layer", {"none"}), ("elsewhere", {"recompute", "interpolate"})]
)
def test_a_start_brings_its_normalisations(script, finished, tmp_path, name, bn):
    path = finished[name] / "checkpoint.pt"
    flags = f"{SUPERVISED} --init {path}:student --epochs 1 --runs 2 --points 3"
    well(script("lmc", flags, "--bn-statistics recompute interpolate --out", tmp_path))
    rows = table(tmp_path / "lmc.csv")
    assert {row["bn"] for row in rows} == bn and len(rows) == 3 * len(bn)
    one, two = (state(p)["data"] for p in (path, tmp_path / "runs" / "init0-run1.pt"))
    assert (one["mean"], one["std"]) == (two["mean"], two["std"])


# run_landscape.py


def test_the_plane_goes_through_the_three_networks(finished):
    rows = table(finished["landscape"] / "landscape.csv")
    assert [(row["i"], row["j"]) for row in rows] == [(i, j) for j in range(3) for i in range(5)]
    assert [row["x"] for row in rows[:5]] == [-1, -0.5, 0, 0.5, 1]
    at = {(row["x"], row["y"]): row for row in rows}
    assert abs(at[0, 0]["train_kl"]) < 1e-12
    assert all(row["train_kl"] > 1e-7 for place, row in at.items() if place != (0, 0))
    assert all(row["linear"] is None and 0 <= row["knn"] <= 100 for row in rows)
    a, b = (state(finished[name] / "checkpoint.pt") for name in ("a", "b"))
    networks = {(0, 0): a["teacher"], (1, 0): a["student"], (0, 1): b["student"]}
    for place, network in networks.items():
        for name, prefix in (("encoder", "encoder."), ("head", "head."), ("total", "")):
            norm = weights(part(network, prefix)).norm().item()
            assert at[place][f"norm_{name}"] == pytest.approx(norm, rel=1e-5)
    points = [tuple(row.values()) for row in table(finished["landscape"] / "points.csv")]
    assert points == [("theta_T", 0, 0), ("theta*_S(0.1)", 1, 0), ("theta*_S(1)", 0, 1)]


@pytest.mark.parametrize(
    ("more", "bn"), [("", "interpolate"), ("--encoder-only", "interpolate"), ("", "recompute")]
)
def test_the_loss_at_a_corner_is_that_of_its_network(script, finished, tmp_path, more, bn):
    """KL of the teacher's and the student's softmaxed outputs, with and without the head."""
    path, images = finished["elsewhere"] / "checkpoint.pt", finished["images"]
    flags = [dict(helpers.readers(path))["landscape"], helpers.IMAGES.format(images=images), more]
    flags.append(f"--probe none --bn-statistics {bn} --out")
    well(script("landscape", flags, tmp_path))
    (row,) = pairs_of(table(tmp_path / "landscape.csv"), x=1, y=0)
    both = [rtd.load_network(path, name) for name in ("teacher", "student")]
    if bn == "recompute":
        plain_average(both[1].encoder, read_images(images / "train", state(path)["data"])[0])
    for split in ("train", "test"):
        x, _ = read_images(images / split, state(path)["data"])
        with torch.no_grad():
            log_p, log_q = ((n.encoder if more else n)(x).double().log_softmax(1) for n in both)
        kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
        assert row[f"{split}_kl"] == pytest.approx(kl, rel=1e-3)


def test_how_uneven_the_valley_is_is_said(script, finished, tmp_path):
    flags = finished.flags("landscape").replace("--no-plot", "")
    for ranges, points in (("--x-range -1 1 3 --y-range 0 0 1", 3), ("--x-range -0 -0 1", 1)):
        out = tmp_path / str(points)
        for more in ("", "--resume"):
            said = well(script("landscape", flags, ranges, more, "--out", out)).out
            if points == 3:
                low, _, high = (row["train_kl"] for row in table(out / "landscape.csv"))
                assert f"{low / high:.2f}" in said
        assert is_drawn(out / "landscape.png")


@pytest.mark.parametrize("more", ["--probe none", "--probe linear --bn-statistics recompute"])
def test_an_orthogonal_plane_is_true_to_scale(script, finished, tmp_path, more):
    flags = finished.flags("landscape").replace("--no-plot", "")
    more = f"--plane orthogonal {more} --x-range -1 1 2 --y-range -1e-3 1E-3 2 --out {tmp_path}"
    well(script("landscape", flags, more))
    assert len(table(tmp_path / "landscape.csv")) == 4
    _, *places = (complex(row["x"], row["y"]) for row in table(tmp_path / "points.csv"))
    one, two = (weights(state(finished[name] / "checkpoint.pt")["student"]) for name in ("a", "b"))
    assert abs(places[0] - places[1]) == pytest.approx((one - two).norm().item(), rel=1e-4)
    assert is_drawn(tmp_path / "landscape.png")


def test_plot_only_draws_planes_side_by_side(script, finished, tmp_path):
    one, two, three = (tmp_path / f"{name}.png" for name in ("one", "two", "three"))
    plane = shutil.copytree(finished["landscape"], tmp_path / "plane")
    points = (plane / "points.csv").read_text()
    (plane / "points.csv").write_text(points.replace("theta_T", "7"))  # a name that is a number
    for picture, count in ((one, 1), (two, 2), (three, 2)):
        well(script("landscape", "--plot-only", [plane] * count, "--out", picture))
        assert is_drawn(picture)
    assert one.read_bytes() != two.read_bytes() == three.read_bytes()


# All of them


@pytest.mark.slow
def test_images_of_64_pixels_go_through_every_script(script, tmp_path):
    """The flag must be repeated: what was learnt at 64 pixels is refused at 32."""
    log(script, tmp_path / "run", "--epochs 1 --image-size 64 --norm layer --probe none")
    for name, flags in helpers.readers(tmp_path / "run" / "checkpoint.pt"):
        result = script(name, flags, "--out", tmp_path / name)
        assert helpers.one_sentence(result, "--image-size 64") == ""
        well(script(name, flags, "--image-size 64 --out", tmp_path / name))


def test_the_readmes_python_runs(finished, tmp_path, monkeypatch):
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())
    block, n = re.subn("# a trained one: ", "", block)
    assert n == 1
    for path in re.findall(r"[\"']([^\"']+\.pt)[\"']", block):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished["distill"] / "best.pt", tmp_path / path)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
