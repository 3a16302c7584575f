"""What goes wrong around a run, through no fault of its flags: a loss that diverges, a full disk, a broken installation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

from rtd import files, logs


def test_a_run_that_diverges_keeps_its_last_checkpoint(script, tmp_path):
    flags = [*TINY, "--encoder", "vgg11", "--alpha", "0.5", "--probe", "none", "--out", tmp_path / "run"]
    assert script("run_distill", *flags, "--epochs", 1).code == 0
    path = tmp_path / "run" / "checkpoint.pt"
    contents = torch.load(path, weights_only=True)
    for group in contents["progress"]["optimizer"]["param_groups"]:
        group["lr"] = 1e30
    torch.save(contents, path)
    saved = path.read_bytes()
    result = script("run_distill", *flags, "--epochs", 3, "--resume")
    assert result.code == 1
    assert len(result.err.strip().split("\n")) == 1
    for word in ("not finite", "epoch", "step", "--lr"):
        assert word in result.err
    assert path.read_bytes() == saved


@pytest.mark.parametrize("failing", ["log.csv", "checkpoint.pt", "config.json"])
def test_a_full_disk_stops_in_a_sentence_and_loses_nothing(script, tiny_run, tmp_path, monkeypatch, failing):
    """Writing fails as on a full disk (ENOSPC); what stood before still does, and --resume ends as an unbroken run."""
    if failing != "config.json":
        assert script("run_distill", *TINY, "--epochs", 2, "--out", tmp_path / "run").code == 0
    good = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*")}
    real = os.fsync

    def full(descriptor):
        if failing in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device", failing)
        return real(descriptor)

    if not Path("/proc/self/fd").is_dir():
        return  # only Linux tells which file a descriptor is
    for module in (files, logs):
        monkeypatch.setattr(module.os, "fsync", full)
    flags = [*TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume"]
    result = script("run_distill", *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "No space left on device" in result.err
    if failing == "checkpoint.pt":
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good["checkpoint.pt"]
    assert not list((tmp_path / "run").glob(".*.tmp"))
    monkeypatch.undo()
    assert script("run_distill", *flags).code == 0
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True)["student"] for f in (tmp_path / "run", tiny_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_torchvision_of_another_torch_is_named(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "run_distill.py"], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "torchvision does not work with the installed torch" in result.stderr and "nms" in result.stderr
