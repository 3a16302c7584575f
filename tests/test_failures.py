"""What goes wrong around a run, through no fault of its flags: a loss that diverges, a full disk, a broken installation."""

import errno
import io
import itertools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SUPERVISED, TINY
from processes import start_two

from rtd import checkpoint, cli, files, logs, stopping


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


@pytest.mark.parametrize(("name", "what"), [("run_imp", "chains stopped early"), ("run_lmc", "runs have no end")])
def test_what_diverges_in_one_of_two_processes_is_known_in_both(tmp_path, name, what):
    more = ["--rounds", 1, "--init", "random:1", "random:2"] if name == "run_imp" else ["--runs", 2]
    processes = start_two(name, *SUPERVISED, *more, "--epochs", 1, "--lr", 1e30, "--out", tmp_path / "run")
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1 and f"2 of 2 {what}" in err and err.count("\n") == 1


def test_bad_data_is_a_sentence_in_each_of_two_processes(tmp_path):
    for process in start_two("run_distill", *TINY, "--subset", 5000, "--out", tmp_path / "run"):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2 and "--subset 5000" in err and err.count("\n") == 1


def test_a_checkpoint_that_fails_after_a_signal_is_not_called_a_stop(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("this is why")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RuntimeError, match="this is why"), stopping.saving(lambda: checkpoint.save_state(tmp_path / "x", {}, "")):
        raise stopping.Stopped(signal.SIGINT, between_steps=True)


@pytest.mark.parametrize("failing", ["log.csv", "checkpoint.pt", "config.json"])
def test_a_failing_disk_stops_in_a_sentence_and_loses_nothing(script, tiny_run, tmp_path, monkeypatch, failing):
    """The disk does not take what it is given; what stood before still does, and --resume ends as an unbroken run."""
    if failing != "config.json":
        assert script("run_distill", *TINY, "--epochs", 2, "--out", tmp_path / "run").code == 0
    good = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*")}
    real = os.fsync

    def full(descriptor):
        if failing in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    if not Path("/proc/self/fd").is_dir():
        return  # only Linux tells which file a descriptor is
    for module in (files, logs):
        monkeypatch.setattr(module.os, "fsync", full)
    flags = [*TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume"]
    result = script("run_distill", *flags)
    assert_names(result, tmp_path / "run" / failing, "No space left on device")
    if failing == "checkpoint.pt":
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good["checkpoint.pt"]
    monkeypatch.undo()
    assert_resumes(script, flags, tiny_run)


def assert_names(result, path, reason):
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert str(path) in result.err and reason in result.err
    assert not list(path.parent.glob(".*.tmp"))


def assert_resumes(script, flags, unbroken):
    assert script("run_distill", *flags).code == 0
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True)["student"] for f in (flags[-2], unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_disk_that_is_full_within_a_checkpoint(script, tiny_run, tmp_path):
    """A write in the midst of torch.save fails: here at the process's limit of a file's size, which Python takes as an error."""
    flags = [*TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume"]
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        result = script("run_distill", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert_names(result, tmp_path / "run" / "checkpoint.pt", "File too large")
    assert_resumes(script, flags, tiny_run)


@pytest.mark.parametrize(("number", "signals"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_within_a_checkpoint(script, tiny_run, tmp_path, monkeypatch, number, signals):
    """What is being written is finished first; a second signal leaves the checkpoint that stood before."""
    flags = [*TINY, "--epochs", 5, "--out", tmp_path / "run", "--resume"]
    assert script("run_distill", *flags[:-1], "--epochs", 1).code == 0
    calls = itertools.count()

    class Signalling(io.BufferedWriter):
        def write(self, data):
            if next(calls) in range(5, 5 + signals):
                signal.raise_signal(number)  # not os.kill: of two in quick succession, that may deliver one
            return super().write(data)

    def opened(path, mode):
        return Signalling(io.FileIO(path, "w")) if ".checkpoint.pt" in path.name else open(path, mode)

    monkeypatch.setattr(files, "open", opened, raising=False)
    result = script("run_distill", *flags)
    assert (result.code, result.err.count("\n")) == (128 + number, 1), result.err
    monkeypatch.undo()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == (2 if signals == 1 else 1)
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert_resumes(script, flags, tiny_run)


def test_too_little_memory_and_a_compiler_that_fails_are_sentences(capsys):
    inductor = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    for error, said in (
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the memory does not hold it"),
        (torch.OutOfMemoryError("CUDA out of memory."), "the memory does not hold it"),
        (inductor("no g++"), "--compile: torch.compile does not work here"),
    ):

        def main(_, error=error):
            raise error

        with pytest.raises(SystemExit) as stop:
            cli.run(main, None)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")), None)


def test_a_torchvision_of_another_torch_is_named(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "run_distill.py"], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "torchvision does not work with the installed torch" in result.stderr and "nms" in result.stderr
