"""Bad input: one sentence on stderr that names it, exit code 2, no traceback, nothing written and nothing overwritten."""

import os
import platform
import shutil

import pytest
import torch
from conftest import TINY

from rtd import checkpoint

DATA = ("--subset", "40", "--test-subset", "30", "--k", "5")


def snapshot(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if not p.is_dir()}


def assert_refused(result, words, folder, before):
    assert result.code == 2, result.err or result.out
    lines = result.err.strip().split("\n")
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, f"{word!r} is not in: {result.err}"
    assert snapshot(folder) == before


FLAGS = [
    ("run_distill", "--epochs -1", ["--epochs", "'-1'", "at least 0"]),
    ("run_distill", "--epochs two", ["--epochs", "'two'"]),
    ("run_distill", "--epochs 1.5", ["--epochs", "'1.5'"]),
    ("run_distill", "--batch-size 0", ["--batch-size", "at least 1"]),
    ("run_distill", "--batch-size -3", ["--batch-size"]),
    ("run_distill", "--lr 0", ["--lr", "above 0"]),
    ("run_distill", "--lr nan", ["--lr"]),
    ("run_distill", "--lr inf", ["--lr"]),
    ("run_distill", "--lr -0.1", ["--lr"]),
    ("run_distill", "--weight-decay -1", ["--weight-decay"]),
    ("run_distill", "--bias-decay nan", ["--bias-decay"]),
    ("run_distill", "--alpha 1.5", ["--alpha", "0 to 1"]),
    ("run_distill", "--alpha -0.1", ["--alpha"]),
    ("run_distill", "--alpha nan", ["--alpha"]),
    ("run_distill", "--out-dim 0", ["--out-dim"]),
    ("run_distill", "--bottleneck-dim 0", ["--bottleneck-dim"]),
    ("run_distill", "--head-hidden 0", ["--head-hidden"]),
    ("run_distill", "--encoder vgg12", ["--encoder", "vgg12", "vgg11"]),
    ("run_distill", "--dataset imagenet", ["--dataset", "imagenet", "digits"]),
    ("run_distill", "--loss huber", ["--loss", "huber"]),
    ("run_distill", "--precision fp16", ["--precision", "fp16"]),
    ("run_distill", "--device gpu", ["--device", "gpu"]),
    ("run_distill", "--seed", ["--seed"]),
    ("run_distill", "--seed -1", ["--seed"]),
    ("run_distill", "--seed 1 1", ["--seed", "once"]),
    ("run_distill", "--probe svm", ["--probe", "svm"]),
    ("run_distill", "--probe none knn", ["--probe", "none"]),
    ("run_distill", "--probe-every 0", ["--probe-every"]),
    ("run_distill", "--probe-epochs 0", ["--probe-epochs"]),
    ("run_distill", "--log-every 0", ["--log-every"]),
    ("run_distill", "--fp32-steps -1", ["--fp32-steps"]),
    ("run_distill", "--k 0", ["--k", "at least 1"]),
    ("run_distill", "--k 41 --subset 40", ["--k 41", "40"]),
    ("run_distill", "--subset 0", ["--subset"]),
    ("run_distill", "--subset 5000", ["--subset 5000", "1347"]),
    ("run_distill", "--test-subset 451", ["--test-subset 451", "450"]),
    ("run_distill", "--resume --overwrite", ["--resume", "--overwrite"]),
    ("run_distill", "--epoch 3", ["--epoch"]),  # abbreviations would make flags ambiguous later
    ("run_distill", "--dataset cifar10", ["--data-dir", "cifar10"]),
    ("run_distill", "--dataset cifar10 --data-dir nowhere", ["nowhere", "--download"]),
    ("run_distill", "--dataset folder --data-dir nowhere", ["nowhere", "train"]),
    ("run_distill", "--download", ["--download", "digits"]),
    ("run_distill", "--alpha 0 0", ["--alpha", "once"]),
    ("run_distill", "--bottleneck -/l/fn", ["--bottleneck -/l/fn", "-/lb/fn/wn/l/-"]),
    ("run_distill", "--no-weight-norm --bottleneck -/lb/fn/wn/l/fn", ["--no-weight-norm", "--bottleneck"]),
    ("run_distill", "--norm batch --encoder vit-tiny", ["--norm batch", "vit-tiny"]),
    ("run_distill", "--image-size 16", ["--image-size", "at least 32"]),
    ("run_distill", "--image-size 36 --encoder vit-tiny", ["--image-size 36", "multiple of 8"]),
    ("run_distill", "--probe-subset 5", ["--probe-subset 5", "--probe-dataset"]),
    ("run_distill", "--teacher nowhere.pt:student", ["nowhere.pt"]),
    ("run_distill", "--teacher nowhere.pt", ["PATH:NETWORK"]),
    ("run_distill", "--ema 2", ["--ema", "0 to 1"]),
    ("run_distill", "--student-temperature 0", ["--student-temperature", "above 0"]),
    ("run_distill", "--beta 1 --out-dim 8", ["--beta 1", "--out-dim"]),
    ("run_distill", "--beta 1 --dataset noise --probe-dataset digits", ["--beta 1", "noise"]),
    ("run_distill", "--dataset noise", ["--data-dir"]),
    ("run_distill", "--dataset tinyimagenet --data-dir nowhere", ["nowhere", "tiny-imagenet-200"]),
    ("run_distill", "--out-dim 99999999999999999999", ["--out-dim", "below 2^31"]),
    ("run_distill", "--image-size 100000", ["--image-size", "up to 1024"]),
    ("run_distill", "--teacher x.pt:pupil", ["--teacher", "supervised"]),
    ("run_distill", "--dataset cifar5m --data-dir nowhere", ["nowhere", "cifar-10-batches-py"]),
    ("run_probe", "{run}/checkpoint.pt --dataset noise", ["--dataset", "noise"]),
    ("run_distill", "--out {file}", ["--out", "is a file"]),
    ("run_distill", "--out {file}/run", ["file"]),
    ("run_distill", "--out {run}", ["--out", "--resume", "--overwrite"]),
    ("run_distill", "--out {run} --resume --lr 0.5", ["--lr was 0.001, is 0.5"]),
    ("run_distill", "--out {run} --resume --seed 3", ["--seed was 0, is 3"]),
    ("run_distill", "--out {run} --resume --encoder vgg11", ["--encoder was resnet20, is vgg11"]),
    ("run_distill", "--out {run} --resume --epochs 2", ["--epochs 2", "5 epochs"]),
    ("run_distill", "--out {other} --resume", ["--resume", "config.json"]),
    ("run_probe", "", ["CHECKPOINT"]),
    ("run_probe", "{run}/missing.pt", ["missing.pt", "no such checkpoint"]),
    ("run_probe", "{run}", ["run"]),
    ("run_probe", "{run}/log.csv", ["log.csv", "not a checkpoint"]),
    ("run_probe", "{run}/best.pt {file}", ["file", "not a checkpoint"]),
    ("run_probe", "{run}/best.pt --probe none", ["--probe none"]),
    ("run_probe", "{run}/best.pt --network tutor", ["--network", "tutor"]),
    ("run_probe", "{run}/best.pt --k 41", ["--k 41", "40"]),
    ("run_probe", "{run}/best.pt --out {file}", ["file", "--overwrite"]),
    ("run_probe", "{run}/best.pt --out {run}/nowhere/probe.csv", ["nowhere"]),
    ("run_probe", "{run}/best.pt --dataset cifar10", ["--data-dir"]),
    ("run_probe", "{run}/best.pt --seed x", ["--seed", "'x'"]),
]


@pytest.mark.parametrize(("name", "flags", "words"), FLAGS, ids=[f"{name} {flags}" for name, flags, _ in FLAGS])
def test_wrong_flags_are_refused(script, tiny_run, tmp_path, monkeypatch, name, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear\n")
    shutil.copytree(tiny_run, tmp_path / "run")
    names = {"file": tmp_path / "file", "run": tmp_path / "run", "other": tmp_path / "other"}
    given = flags.format(**names).split()
    base = [] if name == "run_probe" else [x for x in TINY if x not in given]
    if name == "run_distill":  # a value left behind by a flag that the case gives itself
        base = without(TINY, given)
        base += [] if "--epochs" in given else ["--epochs", "5"]
    elif "best.pt" in flags:
        base = without(DATA, given)
    before = snapshot(tmp_path)
    assert_refused(script(name, *base, *given), words, tmp_path, before)


def without(flags, given):
    """``flags`` less those that are in ``given``, with their values."""
    kept, skipping = [], False
    for word in flags:
        if word.startswith("--"):
            skipping = word in given
        if not skipping:
            kept.append(word)
    return kept


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("DEFAULT", True), ("AVX512", False)])
def test_bf16_without_instructions_for_it_is_said(script, tmp_path, monkeypatch, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    result = script("run_distill", *TINY, "--epochs", 0, "--probe", "none", "--precision", "bf16", "--out", tmp_path / "run")
    assert result.code == 0 and ("no instructions for it" in result.out) == warned


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["run_distill", "run_probe"])
def test_no_gpu_where_one_is_asked_for(script, tiny_run, tmp_path, name):
    given = [tiny_run / "best.pt"] if name == "run_probe" else []
    result = script(name, *given, "--device", "cuda", "--out", tmp_path / "run")
    assert_refused(result, ["--device cuda", "available: cpu"], tmp_path, {})


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"weights": torch.zeros(3)}, path)


def a_tensor(path):
    torch.save(torch.zeros(3), path)


def edited(change):
    def edit(path):
        contents = torch.load(path, weights_only=True)
        change(contents)
        torch.save(contents, path)

    return edit


def set_student(name, value):
    def change(contents):
        contents["student"][name] = value(contents["student"][name])

    return edited(change)


CONV, COUNTER = "encoder.0.weight", "encoder.1.num_batches_tracked"
DAMAGES = {
    "truncated": (truncated, "damaged"),
    "empty": (empty, "damaged"),
    "foreign": (foreign, "format mark"),
    "a tensor": (a_tensor, "format mark"),
    "no format": (edited(lambda c: c.pop("format")), "format mark"),
    "no teacher": (edited(lambda c: c.pop("teacher")), "some of its parts"),
    "unknown encoder": (edited(lambda c: c["model"].update(encoder="alexnet")), "unknown encoder"),
    "model is text": (edited(lambda c: c.update(model="vgg11")), "unknown encoder"),
    "other architecture": (edited(lambda c: c["model"].update(encoder="vgg11")), "do not fit"),
    "other width": (edited(lambda c: c["model"].update(out_dim=65)), "do not fit"),
    "huge width": (edited(lambda c: c["model"].update(out_dim=2**50)), "do not fit"),
    "width is text": (edited(lambda c: c["model"].update(out_dim="64")), "do not fit"),
    "unknown option": (edited(lambda c: c["model"].update(depth=3)), "do not fit"),
    "weight missing": (edited(lambda c: c["student"].pop(CONV)), "do not fit"),
    "weight too many": (edited(lambda c: c["student"].update(more=torch.zeros(1))), "do not fit"),
    "wrong shape": (set_student(CONV, lambda w: w[:8]), "do not fit"),
    "wrong dtype": (set_student(CONV, lambda w: w.to(torch.int64)), "do not fit"),
    "not a tensor": (set_student(CONV, lambda w: w.tolist()), "do not fit"),
    "not finite": (set_student(CONV, lambda w: torch.full_like(w, float("nan"))), "not finite"),
    "counter not whole": (set_student(COUNTER, lambda w: w.float()), "do not fit"),
    "weights are text": (edited(lambda c: c.update(student="weights")), "do not fit"),
    "no normalisation": (edited(lambda c: c.update(data={"name": "digits"})), "normalisation"),
    "std of zero": (edited(lambda c: c["data"].update(std=[0.0, 1.0, 1.0])), "normalisation"),
    "mean is text": (edited(lambda c: c["data"].update(mean="half")), "normalisation"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(script, tiny_run, tmp_path, damage):
    path = tmp_path / "best.pt"
    shutil.copy(tiny_run / "best.pt", path)
    change, word = DAMAGES[damage]
    change(path)
    before = snapshot(tmp_path)
    assert_refused(script("run_probe", path, *DATA), ["best.pt", word], tmp_path, before)


def progress_edited(change):
    return edited(lambda contents: change(contents["progress"]))


RESUME_DAMAGES = {
    "truncated": (truncated, "checkpoint.pt"),
    "no progress": (edited(lambda c: c.pop("progress")), "no optimizer state"),
    "no optimizer": (progress_edited(lambda p: p.pop("optimizer")), "cannot be resumed"),
    "an older format": (edited(lambda c: c.update(format="rtd-checkpoint-2")), "older version"),
    "other optimizer": (progress_edited(lambda p: p["optimizer"]["param_groups"].pop()), "cannot be resumed"),
    "weight missing": (edited(lambda c: c["student"].pop(CONV)), "do not fit"),
    "student not finite": (set_student(CONV, lambda w: w * float("inf")), "not finite"),
}


@pytest.mark.parametrize("damage", RESUME_DAMAGES)
def test_resuming_from_a_damaged_checkpoint_is_refused(script, tiny_run, tmp_path, damage):
    shutil.copytree(tiny_run, tmp_path / "run")
    change, word = RESUME_DAMAGES[damage]
    change(tmp_path / "run" / "checkpoint.pt")
    before = snapshot(tmp_path)
    result = script("run_distill", *TINY, "--epochs", 6, "--out", tmp_path / "run", "--resume")
    assert_refused(result, [word, "checkpoint.pt"], tmp_path, before)


LOG_EDITS = {
    "missing": lambda text: None,
    "empty": lambda text: "",
    "no header": lambda text: text.split("\n", 1)[1],
    "other columns": lambda text: text.replace("epoch,step", "epoch,steps", 1),
    "row deleted": lambda text: "\n".join(text.split("\n")[:2] + text.split("\n")[3:]),
    "row doubled": lambda text: text + text.split("\n")[-2] + "\n",
    "cell deleted": lambda text: text.replace(",", "", 20),
    "epoch is text": lambda text: text.replace("\n2,", "\ntwo,"),
    "loss is text": lambda text: text.replace("\n2,6,", "\n2,six,"),
}


@pytest.mark.parametrize("edit", LOG_EDITS)
def test_a_log_edited_by_hand_is_refused_on_resume(script, tiny_run, tmp_path, edit):
    shutil.copytree(tiny_run, tmp_path / "run")
    log = tmp_path / "run" / "log.csv"
    text = LOG_EDITS[edit](log.read_text())
    log.unlink() if text is None else log.write_text(text)
    before = snapshot(tmp_path)
    result = script("run_distill", *TINY, "--epochs", 6, "--out", tmp_path / "run", "--resume")
    assert_refused(result, ["log.csv"], tmp_path, before)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"flags": 3}', "{}"])
def test_a_damaged_config_is_refused_on_resume(script, tiny_run, tmp_path, text):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    before = snapshot(tmp_path)
    result = script("run_distill", *TINY, "--epochs", 6, "--out", tmp_path / "run", "--resume")
    assert_refused(result, ["config.json"], tmp_path, before)


def test_a_checkpoint_cannot_run_code(script, tmp_path):
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"format": checkpoint.FORMAT, "student": Payload()}, tmp_path / "evil.pt")
    before = snapshot(tmp_path)
    assert_refused(script("run_probe", tmp_path / "evil.pt"), ["evil.pt"], tmp_path, before)
    assert not marker.exists()
