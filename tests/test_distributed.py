"""torchrun with two processes: the same training as one process, written once."""

import os

import pytest
import torch
from conftest import TINY
from processes import finish, start_two, torchrun

from rtd import distributed
from rtd.logs import read_csv


def test_shares_partition_the_batch_and_their_factors_restore_its_mean(monkeypatch):
    values = torch.arange(10.0) ** 2
    for size in (1, 2, 7, 10):
        for processes in (1, 2, 3, 4):
            monkeypatch.setattr(distributed, "world_size", lambda processes=processes: processes)
            seen, total = [], 0.0
            for rank in range(processes):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                mine, factor = distributed.share(torch.arange(size))
                seen += mine.tolist() if factor else []
                total += factor * values[mine].mean().item() / processes  # as DistributedDataParallel averages
            assert sorted(seen) == list(range(size))
            assert total == pytest.approx(values[:size].mean().item())


@pytest.mark.parametrize(("encoder", "begin"), [pytest.param("vgg11", start_two, marks=pytest.mark.slow), ("resnet20", torchrun)])
def test_two_processes_train_as_one(script, tmp_path, encoder, begin):
    """VGG11 to 1e-4; with batch norm each CPU process has its own batch statistics, so only the promise of a note holds."""
    flags = [*TINY, "--encoder", encoder, "--alpha", "0.5", "--epochs", "2", "--log-every", "1", "--probe", "knn"]
    flags += ["--subset", "39"]  # uneven parts: 16 + 16 + 7 images
    out, _ = finish(*begin("run_distill", *flags, "--out", tmp_path / "two"))
    assert out.count(str(tmp_path / "two")) == 1, "more than one process printed"
    assert ("batch norm" in out) == (encoder == "resnet20")
    assert sorted(os.listdir(tmp_path / "two")) == ["best.pt", "checkpoint.pt", "config.json", "log.csv"]
    two = read_csv(tmp_path / "two" / "log.csv")
    assert [row["epoch"] for row in two] == [0, 1, 2]
    if encoder == "vgg11":
        assert script("run_distill", *flags, "--out", tmp_path / "one").code == 0
        one = read_csv(tmp_path / "one" / "log.csv")
        for a, b in zip(one, two, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
            assert b["kl"] == pytest.approx(a["kl"], rel=1e-4 if a["epoch"] < 2 else 1e-2)
            assert b["distance_total"] == pytest.approx(a["distance_total"], rel=1e-3)
            assert b["teacher_knn"] == a["teacher_knn"]


@pytest.mark.slow
def test_a_run_on_two_processes_resumes(tmp_path):
    flags = [*TINY, "--encoder", "vgg11", "--alpha", "0.5", "--probe", "none", "--resume", "--out", tmp_path / "run"]
    for epochs in ("1", "2"):
        out, _ = finish(*start_two("run_distill", *flags, "--epochs", epochs))
    assert "resumed after epoch 1" in out
    assert [row["epoch"] for row in read_csv(tmp_path / "run" / "log.csv")] == [0, 1, 2]
