"""Shared by all tests: small runs, and the scripts' command lines in this process."""

import importlib
import os
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the tests run in two processes, and their runs are small
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from processes import finish, start  # noqa: E402

from rtd import cli  # noqa: E402

# A run of seconds. The narrow encoder and head make small checkpoints: their fsync is what tests would wait for.
TINY = "--subset 40 --test-subset 30 --encoder resnet20 --head-hidden 32 --bottleneck-dim 16 --out-dim 64 --batch-size 16 --k 5"
TINY = [*TINY.split(), "--device", "cpu", "--no-plot"]

# The same for the scripts that train with labels.
SUPERVISED = "--subset 40 --test-subset 30 --encoder resnet20 --batch-size 16 --device cpu --no-plot"
SUPERVISED = SUPERVISED.split()


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def script(monkeypatch, capsys):
    """script("run_distill", *flags) -> Result: the script as ``python run_distill.py flags`` runs it, in this process."""

    def call(name, *flags):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            cli.run(module.main, module.parse_args())
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished run of 5 tiny epochs, not to be changed by tests."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    finish(start("run_distill", *TINY, "--epochs", 5, "--out", folder))
    return folder


@pytest.fixture(autouse=True)
def nobody_touches_the_global_generator():
    """Every draw in rtd comes from an explicit generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
