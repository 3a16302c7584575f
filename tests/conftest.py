"""Shared by all tests: small runs, and the scripts' command lines in this process."""

import gc
import os
import runpy
import signal
import sys
import time
import traceback

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: runs are small, tests two at a time
import torch  # noqa: E402
from helpers import CASES, ROOT, Result, finish, image_folder, start, words  # noqa: E402

sys.path.insert(0, str(ROOT))
# A shell ignores Ctrl-C in background jobs, which their children inherit; here it must arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def script(monkeypatch, capsys):
    """script("distill", *flags) -> Result of ``python run_distill.py flags``, in this process."""

    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"run_{name}.py", *words(flags)])
        capsys.readouterr()
        if {"--resume", "--overwrite"} & {*sys.argv}:
            gc.collect()  # closes files, and with them locks, that an earlier call left open
        code = 0
        try:
            runpy.run_path(str(ROOT / f"run_{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = 1
            traceback.print_exc()
        return Result(code, *capsys.readouterr())

    return call


class Finished(dict):
    """{name of a case: folder of its unbroken run}, made when it is asked for; not to be changed.

    "half NAME" is a run that was begun shorter. seconds: how long each took; said: its output.
    """

    def __init__(self, folder):
        self.folder, self.seconds, self.said = folder, {}, {}

    def flags(self, name):
        """The words of a case's command line."""
        return CASES[name].flags.format_map(self)

    def __missing__(self, name):
        path = self.folder / name.replace(" ", "-")
        if name == "images":
            return self.setdefault(name, image_folder(path))
        whole = name.removeprefix("half ")
        flags = [self.flags(whole), CASES[whole].shorter * (name != whole)]  # may make others first
        began = time.monotonic()
        self.said[name] = finish(start(CASES[whole].script, flags, "--out", path)).out
        self.seconds[name] = time.monotonic() - began
        return self.setdefault(name, path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("finished"))


@pytest.fixture(autouse=True)
def nobody_touches_the_global_generator():
    """Every draw comes from an explicit generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
