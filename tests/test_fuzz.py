"""Thousands of damaged files: each is read right or refused in a sentence; nothing else, and never code that is run."""

import io
import random

import pytest
import torch
from torch import nn

from rtd import checkpoint, models
from rtd.errors import InputError
from rtd.init import init_network_
from rtd.logs import CsvLog, read_csv

ROUNDS = 2500


@pytest.fixture
def small_checkpoint(tmp_path, monkeypatch, generator):
    """A checkpoint of a few kilobytes, so that thousands of copies are read in seconds."""
    monkeypatch.setitem(models.CONVOLUTIONAL, "tiny", lambda: nn.Sequential(nn.Conv2d(3, 2, 3, stride=16), nn.Flatten()))
    for module in (models, checkpoint):
        monkeypatch.setattr(module, "ENCODERS", ("tiny",))
    spec = {"encoder": "tiny", "out_dim": 4, "hidden_dim": 4, "bottleneck_dim": 2}
    network = init_network_(models.materialize(models.build_network(**spec)), generator)
    states = dict.fromkeys(("teacher", "student", "student_init"), network.state_dict())
    rest = {"epoch": 1, "step": 2, "config": {}, "data": {"name": "x", "mean": [0.0] * 3, "std": [1.0] * 3}}
    checkpoint.save_checkpoint(tmp_path / "good.pt", {"model": spec, **states, **rest})
    checkpoint.load_checkpoint(tmp_path / "good.pt")
    return tmp_path / "good.pt"


def mutate(content, rng):
    content = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        del content[rng.randrange(len(content)) :]
    elif kind == 1:
        for _ in range(rng.choice((1, 1, 4, 64))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 2:
        start = rng.randrange(len(content))
        del content[start : start + rng.choice((1, 8, 200))]
    else:
        start = rng.randrange(len(content))
        content[start:start] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 200))))
    return bytes(content)


def test_mutated_checkpoints(small_checkpoint, tmp_path):
    rng = random.Random(0)
    content = small_checkpoint.read_bytes()
    assert len(content) < 50_000
    good = checkpoint.load_checkpoint(small_checkpoint)
    refused = 0
    for _ in range(ROUNDS):
        (tmp_path / "bad.pt").write_bytes(mutate(content, rng))
        try:
            found = checkpoint.load_checkpoint(tmp_path / "bad.pt", mmap=rng.random() < 0.5)
        except InputError as error:
            assert str(tmp_path / "bad.pt") in str(error)
            assert "\n" not in str(error)
            refused += 1
        else:
            for which in checkpoint.NETWORKS:  # what is accepted can be used
                assert checkpoint.load_network(found, which)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
            assert found.keys() >= good.keys()
    assert refused > ROUNDS / 4


def test_mutated_csv_logs(tmp_path):
    rng = random.Random(0)
    rows = [{"epoch": i, "loss": 11.0 + i / 7, "name": None if i % 2 else "a"} for i in range(6)]
    CsvLog(tmp_path / "good.csv", ("epoch", "loss", "name")).start(rows)
    content = (tmp_path / "good.csv").read_bytes()
    refused = 0
    for _ in range(ROUNDS):
        (tmp_path / "bad.csv").write_bytes(mutate(content, rng))
        try:
            found = read_csv(tmp_path / "bad.csv", ("epoch", "loss", "name"))
        except InputError as error:
            assert "bad.csv" in str(error)
            refused += 1
        else:
            assert all(set(row) == {"epoch", "loss", "name"} for row in found)
    assert refused > ROUNDS / 10


def test_an_unbroken_file_is_read(small_checkpoint):
    with io.BytesIO(small_checkpoint.read_bytes()) as file:  # the negative control: torch itself reads it
        assert torch.load(file, weights_only=True)["format"] == checkpoint.FORMAT
