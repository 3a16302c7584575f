"""The scripts as a user meets them: command lines, exit codes, and the files that they leave.

Nothing here, nor in the tests that use it, names a function of what carries a run. Importing torch
takes seconds, a tiny run less than one. So one server process imports it once and each script is a
fork of it: a real process with its own signals, files and random state, but without the seconds.
"""

import contextlib
import csv
import itertools
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("distill", "probe", "imp", "lmc", "landscape")

# A run of seconds. The narrow encoder and head make small checkpoints: their fsync is what tests
# would wait for.
DATA = "--subset 40 --test-subset 30 --device cpu"
TINY = f"{DATA} --encoder resnet20 --head-hidden 32 --bottleneck-dim 16 --out-dim 64"
TINY += " --batch-size 16 --k 5 --no-plot"
SUPERVISED = f"{DATA} --encoder resnet20 --batch-size 16 --no-plot"  # of the scripts with labels
PLANE = f"--origin {{0}}:teacher --x-axis {{0}}:student --y-axis {{1}} {DATA} --k 5 --no-plot"


class Case(NamedTuple):
    """A command line of seconds, what it leaves, and flags with which it is begun to be continued.

    tables, states: glob patterns of the CSV files and the state files that must come out the same,
    however the run was stopped. {name} in flags stands for the folder of another case.
    """

    script: str
    flags: str
    tables: list = []
    states: list = []
    shorter: str = ""


# fmt: off
LOG, CHAINS = (["log.csv"], ["*.pt"]), (["imp.csv", "chains/*.csv"], ["chains/*.pt"])
MOVING = "--norm none --ema 0.3 --alpha 0.5 --lr 0.01"
ROUNDS, GRID = "--rounds 2 --rewind-epoch 0 1", "--x-range -1 1 5 --y-range 0 1 3"
CORNERS = PLANE.format("{a}/checkpoint.pt", "{b}/checkpoint.pt:student")
LINES = "--points 5 --line-subset 20 --bn-statistics recompute interpolate"
IMAGES = "--dataset folder --data-dir {images} --subset 12 --test-subset 8"
CASES = {
    "distill": Case("distill", f"{TINY} --epochs 4", *LOG, "--epochs 2"),
    "ema": Case("distill", f"{TINY} {MOVING} --epochs 3", *LOG, "--epochs 1"),
    "bf16": Case("distill", f"{TINY} --precision bf16 --fp32-steps 4 --epochs 3", *LOG,
                 "--epochs 2"),
    "sweep": Case("distill", f"{TINY} --probe knn --epochs 2 --alpha 0 0.5 --seed 0 1",
                  ["summary.csv", "*/log.csv"], ["*/*.pt"], "--epochs 1"),
    "imp": Case("imp", f"{SUPERVISED} --epochs 3 {ROUNDS}", *CHAINS, "--rounds 1"),
    "shuffle": Case("imp", f"{SUPERVISED} --epochs 2 {ROUNDS} --control shuffle", *CHAINS,
                    "--rounds 1"),
    "lmc": Case("lmc", f"{SUPERVISED} --epochs 2 --runs 3 {LINES}",
                ["lmc.csv", "barriers.csv"], ["runs/*.pt"], "--points 3"),
    "landscape": Case("landscape", f"{CORNERS} --probe knn {GRID}",
                      ["landscape.csv", "points.csv"]),
    # what others read, and what is only refused
    "a": Case("distill", f"{TINY} --alpha 0.1 --epochs 1 --probe none"),
    "b": Case("distill", f"{TINY} --alpha 1 --epochs 1 --probe none"),
    "seed1": Case("distill", f"{TINY} --seed 1 --epochs 4"),
    "narrow": Case("distill", f"{TINY} --out-dim 32 --epochs 0 --probe none"),
    "layer": Case("distill", f"{TINY} --norm layer --epochs 0 --probe none"),
    "noise": Case("distill", f"{TINY} --dataset noise --probe-dataset digits --epochs 1"),
    "elsewhere": Case("distill", f"{TINY} {IMAGES} --alpha 1 --epochs 1 --probe none"),
}
# fmt: on


def readers(path):
    """(script, flags) of the other scripts, which read the networks of a distillation."""
    starts = f"{SUPERVISED} --init {path}:student random --epochs 1"
    yield "probe", f"{path} {DATA} --k 5"
    yield "imp", f"{starts} --rounds 1"
    yield "lmc", f"{starts} --runs 2 --points 3 --bn-statistics recompute interpolate"
    grid = "--bn-statistics recompute --x-range 0 1 2 --y-range 0 1 2"
    yield "landscape", f"{PLANE.format(path, f'{path}:student-init')} {grid}"


def words(flags):
    """The words of a command line: text is split at spaces, paths and numbers stay as they are."""
    for flag in flags:
        if isinstance(flag, (list, tuple)):
            yield from words(flag)
        elif isinstance(flag, str):
            yield from flag.split()
        else:
            yield str(flag)


def number(cell):
    """A cell of a table as int, float, None for nothing, or str."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return cell or None


def table(path):
    """The rows of a CSV file as dicts."""
    with open(path, newline="") as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def state(path):
    """The contents of a state file."""
    return torch.load(path, map_location="cpu", weights_only=True)


def change(path, edit):
    """Apply ``edit`` to the contents of a state file, in place."""
    contents = state(path)
    edit(contents)
    torch.save(contents, path)


# What two equal runs need not share.
OWN = {"config", "identity", "seconds", "images_per_second"}


def leaves(tree, where=""):
    """{place in the tree: what is there, in words, to the bit}, but for ``OWN``."""
    if isinstance(tree, (dict, list, tuple)):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        found = (leaves(part, f"{where}/{key}") for key, part in parts if key not in OWN)
        return dict.fromkeys([f"{where}/"]) | dict(itertools.chain(*map(dict.items, found)))
    if isinstance(tree, torch.Tensor):
        content = tree.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {where: (tree.dtype, tree.shape, content)}
    return {where: repr(tree)}


def difference(a, b):
    """The first place where two trees of plain types and tensors differ; "" if there is none."""
    a, b = leaves(a), leaves(b)
    return next((place for place in a | b if a.get(place, "") != b.get(place, "")), "")


def runs_differ(case, a, b):
    """Where the folders ``a`` and ``b`` of two runs of ``case`` differ first; "" if they do not."""
    for read, patterns in ((table, case.tables), (state, case.states)):
        for pattern in patterns:
            names = [{str(p.relative_to(f)) for p in f.glob(pattern)} for f in (a, b)]
            if names[0] != names[1] or not names[0]:
                return f"files {names}"
            for name in sorted(names[0]):
                if found := difference(read(a / name), read(b / name)):
                    return f"{name}: {found}"
    return ""


def snapshot(folder):
    """What would change if anything in ``folder`` were written: locks aside."""
    files = (p for p in sorted(folder.rglob("*")) if not (p.is_dir() or p.name.endswith(".lock")))
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in files}


def image_folder(path, seed=0, train=12, test=8):
    """Noise of two classes as PNG files, the way --dataset folder wants them; returns ``path``."""
    draw = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for name in ("one", "two"):
            (path / split / name).mkdir(parents=True)
            for i in range(count // 2):
                pixels = draw.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{i}.png")
    return path


class Result(NamedTuple):
    code: int
    out: str
    err: str


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torchvision", "sklearn.neighbors", "sklearn.datasets", "sklearn.model_selection"]
)


def _script(out, err, name, flags, before, env):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = [f"run_{name}.py", *flags]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    exec(before, globals())
    runpy.run_path(f"run_{name}.py", run_name="__main__")


class Script:
    """A running script, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, *arguments):
        self.folder = tempfile.mkdtemp(prefix="rtd-test-")
        self._files = [Path(self.folder, kind) for kind in ("out", "err")]
        self._process = _context.Process(target=_script, args=(*self._files, *arguments))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """As a shell says it: 143 after SIGTERM, whether the script answered to it or not."""
        code = self._process.exitcode
        return 128 - code if code is not None and code < 0 else code

    def said(self):
        """(stdout, stderr) so far."""
        return [path.read_text() if path.exists() else "" for path in self._files]

    def wait(self, timeout=300):
        """The ``Result``; subprocess.TimeoutExpired, and it goes on, if that takes too long."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        said = self.said()
        shutil.rmtree(self.folder, ignore_errors=True)
        return Result(self.returncode, *said)

    def wait_until(self, condition, timeout=240):
        """Return as soon as ``condition()`` holds or the process has ended."""
        deadline = time.monotonic() + timeout
        while self.returncode is None and time.monotonic() < deadline and not condition():
            time.sleep(0.001)

    def send(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)


def well(*results):
    """The ``Result`` of all together, all of which must have ended well."""
    assert all(result.code == 0 for result in results), results
    return Result(0, "".join(r.out for r in results), "".join(r.err for r in results))


def start(name, *flags, before="", **env):
    """The script ``name`` with ``flags``, begun; ``before``: Python code that it executes first."""
    return Script(name, list(words(flags)), before, env)


def start_two(name, *flags):
    """The script on two processes, with the environment that torchrun gives them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [start(name, *flags, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]


def finish(*processes):
    """The ``Result`` of all together, when all have ended, and must have ended well."""
    return well(*(process.wait() for process in processes))


def shell(command, **env):
    """A shell's command line run to its end: the real thing, seconds of imports included."""
    options = {"env": {**os.environ, **env}, "cwd": ROOT, "timeout": 300}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, **options)
    return Result(done.returncode, done.stdout, done.stderr)


def one_sentence(result, *mentioned, code=2):
    """What is wrong with a refusal: exit code and one line that mentions these words; or ""."""
    if result.code != code:
        return f"exit code {result.code}: {result.err or result.out}"
    if result.err.strip("\n").count("\n") or not result.err or "Traceback" in result.err:
        return f"not one line: {result.err}"
    missing = [word for word in map(str, mentioned) if word not in result.err]
    return f"{missing} not in: {result.err}" if missing else ""
