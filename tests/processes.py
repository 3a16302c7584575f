"""Scripts as processes of their own, to be killed, signalled and launched in twos.

Importing torch and scikit-learn takes seconds, a tiny run less than one. So one server process imports them once, and each
script is a fork of it: a real process with its own signals, files and random state, but without the seconds.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torchvision", "sklearn.neighbors", "sklearn.datasets", "sklearn.model_selection"])


def _script(name, flags, out, err, env):
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = [f"{name}.py", *flags]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


class Script:
    """A running script, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, name, flags, env):
        self._folder = tempfile.TemporaryDirectory(prefix="rtd-test-")
        self._files = [Path(self._folder.name, kind) for kind in ("out", "err")]
        self._process = _context.Process(target=_script, args=(name, list(map(str, flags)), *map(str, self._files), env))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def communicate(self, timeout=None):
        """(stdout, stderr) when it has ended; subprocess.TimeoutExpired, and it goes on, if that takes too long."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return tuple(path.read_text() if path.exists() else "" for path in self._files)

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(name, *flags, **env):
    """The script ``name`` with ``flags``, begun; ``env``: environment variables."""
    return Script(name, flags, env)


def start_two(name, *flags):
    """The script on two processes of one thread each, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [start(name, *flags, RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(2)]


def finish(*processes):
    """(stdout, stderr) of all together, when all have ended well."""
    answers = [process.communicate(timeout=300) for process in processes]
    out, err = map("".join, zip(*answers, strict=True))
    assert all(process.returncode == 0 for process in processes), err
    return out, err


def torchrun(name, *flags):
    """[the script under torchrun itself, on two processes of one thread each]."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / f"{name}.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen([*command, *map(str, flags)], **pipes, text=True, env=env, cwd=ROOT)]


def wait_until(process, condition, timeout=240):
    """Return as soon as ``condition()`` holds, or the process has ended."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline and not condition():
        os.sched_yield()


def kill_when(process, condition):
    """SIGKILL as soon as ``condition()`` holds."""
    wait_until(process, condition)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
