"""Shared by all tests: running the scripts through their command lines, in this process or in a fresh one."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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


def start(name, *flags, launcher=()):
    """A fresh process of a script; stdout and stderr are pipes."""
    command = [*(launcher or [sys.executable]), str(ROOT / f"{name}.py"), *map(str, flags)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(1 if launcher else torch.get_num_threads())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished run of 5 tiny epochs, not to be changed by tests."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    process = start("run_distill", *TINY, "--epochs", 5, "--out", folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
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
