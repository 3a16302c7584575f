"""Damage of every kind around a run: files, disks, terminals, signals, two of a kind at once.

Whatever happens, a command ends with exit code 0 and the right numbers, or with one sentence.
"""

import errno
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import helpers
import numpy as np
import pytest
import torch
from helpers import CASES, DATA, SUPERVISED, TINY, finish, one_sentence, snapshot, start, table
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier


class Run:
    """A case in the folder ``out``, to be damaged there or stopped, and resumed.

    begun: "new NAME", of which there is nothing yet; or "NAME" or "half NAME", a copy of it.
    """

    def __init__(self, script, finished, out, begun):
        self.finished, self.name, self.out = finished, begun.split()[-1], out
        self.case = CASES[self.name]
        self.command = self.case.script, finished.flags(self.name), "--resume --out", out
        self.resume = functools.partial(script, *self.command)
        if not begun.startswith("new "):
            shutil.copytree(finished[begun], out)

    def differs(self):
        """Where it differs from the unbroken run; "" if nowhere."""
        return helpers.runs_differ(self.case, self.finished[self.name], self.out)

    def ends_wrong(self):
        """What is wrong with it after a last --resume; "" if nothing is."""
        result = self.resume()
        return f"exit code {result.code}: {result.err}" if result.code else self.differs()


@pytest.fixture
def run_of(script, finished, tmp_path):
    """run_of("half distill") -> ``Run``, and so on."""
    return functools.partial(Run, script, finished, tmp_path / "run")


def written(content):
    return lambda path: path.write_bytes(content)


def edited(old, new):
    return lambda path: path.write_text(re.sub(old, new, path.read_text()))


def swapped(other):
    def swap(path):
        content = path.read_bytes()
        shutil.copy(path.parent / other, path)
        (path.parent / other).write_bytes(content)

    return swap


# Files


def mutate_bytes(path, draw):
    content = bytearray(path.read_bytes())
    at, new = draw.randrange(len(content)), draw.randbytes(8)
    kind, end, new = draw.choice(
        [("cut", None, b""), ("drop", at + 8, b""), ("insert", at, new), ("change", at + 8, new)]
    )
    content[at:end] = new
    path.write_bytes(content)
    return f"{kind} at {at}"


READERS = [("distill", "checkpoint.pt"), ("imp", "chains/init0-rewind1.pt")]
READERS += [("lmc", "runs/init0-run1.pt"), ("landscape", "landscape.row0.pt")]


@pytest.mark.parametrize(("name", "file"), READERS)
@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_damaged_state_is_not_resumed(run_of, name, file, count):
    draw, wrong = random.Random(f"{name} {count}"), []
    for _ in range(count):
        run = run_of(f"half {name}")
        what = mutate_bytes(run.out / file, draw)
        result = run.resume()
        found = one_sentence(result, run.out / file) if result.code else run.differs()
        wrong += [f"{what}: {found}"] * bool(found)
        shutil.rmtree(run.out)
    assert not wrong, "\n".join(wrong)


class Payload:
    def __reduce__(self):
        return open, ("executed", "w")


LONG = "1" * 131_073
FOREIGN = {
    "empty": written(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "missing": Path.unlink,
    "another file": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "no format": lambda path: helpers.change(path, lambda c: c.pop("format")),
    "older": lambda path: helpers.change(path, lambda c: c.update(format="rtd-checkpoint-2")),
    "newer": lambda path: helpers.change(path, lambda c: c.update(format="rtd-checkpoint-99")),
    "code": lambda path: torch.save({"format": "rtd-checkpoint-5", "student": Payload()}, path),
}
UNREADABLE = {
    "dangling": lambda path: path.symlink_to("nowhere.png"),
    "empty": written(b""),
    "text": written(b"not an image"),
    "png": written(b"\x89PNG\r\n\x1a\n" + bytes(40)),
    "bmp": written(b"BM" + b"\xff" * 60),
    "ppm": written(b"P6 99999 99999 255 "),
    "deep": lambda path: Image.fromarray(np.zeros((32, 32), np.uint16)).save(path),
}
SWEPT = "alpha0-seed0/checkpoint.pt"
CONFIGS = (b"", b"{", b"[]", b'{"flags": 3}', b"{}", b"\x00")
# what happens | to a copy of this | to this file in it | how
DAMAGES = [(kind, "half distill", "checkpoint.pt", damage) for kind, damage in FOREIGN.items()]
DAMAGES += [(kind, "images", "train/one/x.png", damage) for kind, damage in UNREADABLE.items()]
DAMAGES += [("text", "half distill", "config.json", written(content)) for content in CONFIGS]
DAMAGES += [
    ("missing", "half imp", "chains/init0-rewind0.pt", Path.unlink),
    ("swapped", "half imp", "chains/init0-rewind0.pt", swapped("init0-rewind1.pt")),
    ("swapped", "half lmc", "runs/init0-run0.pt", swapped("init0-run2.pt")),
    ("swapped", "half lmc", "lines/init0-0-1.pt", swapped("init0-0-2.pt")),
    ("swapped", "half sweep", SWEPT, swapped(f"../{SWEPT.replace('seed0', 'seed1')}")),
    ("swapped", "half sweep", SWEPT, swapped(f"../{SWEPT.replace('alpha0', 'alpha0.5')}")),
    ("text", "landscape", "landscape.csv", edited("0.5,", "much,")),
    ("quote", "landscape", "landscape.csv", edited("\n1,", f'\n"1,{LONG}')),
    ("digits", "landscape", "landscape.csv", edited("\n1,", f"\n{LONG[:400]},")),
    ("text", "landscape", "points.csv", edited("theta_T,0", "theta_T,left")),
    ("column", "landscape", "points.csv", edited("x", "z")),
]
SAID = dict.fromkeys(("older", "newer"), "another version of rtd made it")
SAID["deep"] = "has more than 8 bits a channel; convert it to 8"
COMMANDS = {f"half {n}": f"{c.script} {c.flags} --resume --out run" for n, c in CASES.items()}
COMMANDS["landscape"] = "landscape --plot-only run --out x.png"
COMMANDS["images"] = f"distill {TINY} {helpers.IMAGES} --epochs 0 --out new".format(images="run")
OTHERS = ["probe run/checkpoint.pt", f"imp {SUPERVISED} --out new --init run/checkpoint.pt:student"]


@pytest.mark.parametrize(("kind", "begun", "file", "damage"), DAMAGES)
def test_what_is_damaged_is_refused_and_nothing_is_written(
    script, finished, tmp_path, monkeypatch, kind, begun, file, damage
):
    """Nor is a run without its checkpoint started over, or a state taken for another's."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[begun], "run")
    damage(Path("run", file))
    before = snapshot(tmp_path)
    for command in [COMMANDS[begun], *(OTHERS if file == "checkpoint.pt" else [])]:
        assert one_sentence(script(*command.split(" ", 1)), file, SAID.get(kind, "")) == ""
        assert snapshot(tmp_path) == before


def test_a_missing_best_checkpoint_is_said(run_of):
    run = run_of("half distill")
    (run.out / "best.pt").unlink()
    result = run.resume()
    assert result.code in (0, 2) and "best.pt" in result.out + result.err


READ = [
    ("distill", f"{TINY} --epochs 1 --teacher {{run}}/checkpoint.pt:student --out {{run}}"),
    ("distill", f"{TINY} --alpha 0 0.5 --teacher {{run}}/best.pt:student --out {{run}}/.."),
    ("probe", f"{{run}}/best.pt {DATA} --k 5 --out {{run}}/best.pt"),
    ("landscape", "--plot-only {run} --out {run}/log.csv"),
]


@pytest.mark.parametrize(("name", "flags"), READ)
def test_overwrite_does_not_delete_what_is_read(script, finished, tmp_path, name, flags):
    run = tmp_path / "alpha0"  # also that of a sweep's first run
    shutil.copytree(finished["distill"], run)
    before = snapshot(tmp_path)
    assert one_sentence(script(name, flags.format(run=run), "--overwrite"), run) == ""
    assert snapshot(tmp_path) == before


def test_the_way_out_of_a_missing_state_keeps_all_other_runs(run_of):
    run = run_of("sweep")
    (run.out / SWEPT).unlink()
    others = {n: at for n, at in snapshot(run.out).items() if n.endswith("checkpoint.pt")}
    Path(re.search(r"move (\S+) away", run.resume().err)[1]).unlink()
    assert run.resume().code == 0 and run.differs() == ""
    assert len(others) == 3 and others.items() <= snapshot(run.out).items()


LOST = [Path.unlink, written(b""), edited("\n1,.*", ""), edited("\n2,", "\ntwo,")]
LOST += [edited("\n2,", f'\n"2,{LONG}'), edited("\n2,", f"\n{LONG[:400]},")]
MADE_ANEW = [("half distill", "log.csv", damage) for damage in LOST]
# a control's first table is written before its first state, and a kill may come in between
MADE_ANEW += [("shuffle", "chains/init0-rewind0-shuffle.pt", Path.unlink)]


@pytest.mark.parametrize(("begun", "file", "damage"), MADE_ANEW)
def test_what_follows_from_other_files_is_made_anew(run_of, begun, file, damage):
    run = run_of(begun)
    damage(run.out / file)
    assert run.ends_wrong() == ""


def test_other_inputs_are_noticed(script, finished, tmp_path):
    """Other images, another teacher, another start; not that they lie elsewhere."""
    one, two = (helpers.image_folder(tmp_path / str(seed), seed) for seed in (1, 2))
    flags = [TINY, helpers.IMAGES.format(images=one), "--probe none --out", tmp_path / "run"]
    assert script("distill", flags, "--epochs 1").code == 0
    moved = one.rename(tmp_path / "elsewhere")
    assert script("distill", flags, "--epochs 2 --resume --data-dir", moved).code == 0
    config = (tmp_path / "run" / "config.json").read_text()
    assert (
        script("distill", flags, "--epochs 2 --resume --data-dir", moved).code == 0
    )  # all is done
    assert (tmp_path / "run" / "config.json").read_text() == config
    config = json.loads(config)
    assert config["flags"]["epochs"] == 2 and "--epochs 1" in config["earlier"][0]["command"]
    result = script("distill", flags, "--epochs 3 --resume --data-dir", two)
    assert one_sentence(result, "training images") == ""
    path = tmp_path / "copy.pt"
    for name, flags in (
        ("distill", f"{TINY} --probe none --epochs 1 --teacher {path}:student"),
        ("imp", f"{SUPERVISED} --epochs 1 --rounds 0 --init {path}:student"),
    ):
        shutil.copy(finished["a"] / "checkpoint.pt", path)
        assert script(name, flags, "--out", tmp_path / name).code == 0
        shutil.copy(finished["b"] / "checkpoint.pt", path)
        assert one_sentence(script(name, flags, "--resume --out", tmp_path / name), path) == ""


@pytest.mark.parametrize("name", ["distill", "sweep", "landscape"])
def test_of_two_in_one_folder_one_is_refused(run_of, name):
    run = run_of(f"new {name}")
    processes = [start(*run.command) for _ in range(2)]
    results = [process.wait() for process in processes]
    assert sorted(result.code for result in results) == [0, 2], results
    refused = results[0].code == 2
    assert one_sentence(results[not refused], f"--out {run.out}") == ""
    # the first may have been there for a moment only, or have written already
    other = "by another process|--resume continues its run"
    assert re.search(f"by process {processes[refused].pid}|{other}", results[not refused].err)
    assert run.differs() == ""
    assert run.ends_wrong() == ""  # the lock went with its process


# Disks


TERMINATE = functools.partial(signal.raise_signal, signal.SIGTERM)
INTERRUPT = functools.partial(signal.raise_signal, signal.SIGINT)


def before_each(monkeypatch, owner, name, action):
    """``action`` of the arguments is called before each call of a function."""
    plain = getattr(owner, name)

    def called(*arguments, **options):
        action(*arguments)
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


def test_runs_are_saved_and_torch_is_deterministic_as_asked(script, tmp_path, monkeypatch):
    saved, deterministic = [], []

    def replace(temporary, path):
        if Path(path).name == "checkpoint.pt":
            saved.append(helpers.state(temporary)["epoch"])

    before_each(monkeypatch, os, "replace", replace)
    enabled = torch.are_deterministic_algorithms_enabled
    before_each(monkeypatch, torch.optim.AdamW, "step", lambda *_: deterministic.append(enabled()))
    flags = "--probe none --epochs 5 --save-every 2 --deterministic --out"
    try:
        assert script("distill", TINY, flags, tmp_path).code == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert saved == [0, 2, 4, 5] and deterministic == [True] * 15


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


FILES = [("distill", "config.json"), ("distill", "log.csv"), ("distill", "checkpoint.pt")]
FILES += [("imp", "init0-rewind0.pt"), ("imp", "imp.csv"), ("lmc", "barriers.csv")]
FLUSHED = [(*file, [full], 2) for file in FILES]
FLUSHED += [("distill", "checkpoint.pt", [INTERRUPT] * 2, 130)]
FLUSHED += [("distill", "checkpoint.pt", [full, full, INTERRUPT], 130)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells what is flushed")
@pytest.mark.parametrize(("name", "file", "events", "code"), FLUSHED)
def test_a_flush_interrupted_loses_nothing(run_of, monkeypatch, name, file, events, code):
    """A full disk leaves what stood before; signals wait, also a second one."""
    run = run_of(f"half {name}" if file != "config.json" else "new distill")
    before, left = {path: path.read_bytes() for path in run.out.rglob(file)}, list(events)

    def happen(descriptor):
        while left and file in os.readlink(f"/proc/self/fd/{descriptor}"):
            left.pop()()

    with monkeypatch.context() as patch:
        before_each(patch, os, "fsync", happen)
        result = run.resume()
    said = [file, "No space left on device"] * (full in events)
    assert one_sentence(result, *said, code=code) == ""
    assert not list(run.out.rglob(".*.tmp"))
    if full not in events:
        assert helpers.state(run.out / file)["epoch"] == 3
    else:
        assert {path: path.read_bytes() for path in before} == before
    if (name, file) == ("distill", "checkpoint.pt"):  # the row of an epoch has room in any case
        assert [row["epoch"] for row in table(run.out / "log.csv")] == [0, 1, 2, 3]
    assert run.ends_wrong() == ""


def test_a_disk_that_fills_within_a_checkpoint(run_of):
    """A write in the midst of torch.save fails, here at a limit of the size of a file."""
    run = run_of("new distill")
    limited = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000))"
    result = start(*run.command, before=limited).wait()
    assert one_sentence(result, "checkpoint.pt", "File too large") == ""
    assert "epoch 0/4: loss" in result.out  # what was computed is said
    assert not list(run.out.glob(".*.tmp"))
    assert run.ends_wrong() == ""


def test_a_nearly_full_disk_is_said_in_words(tmp_path):
    before = "import shutil, types; space = types.SimpleNamespace(total=1, used=1, free=1)"
    before += "; shutil.disk_usage = lambda path: space"
    flags = f"{TINY} --probe none --epochs 0 --out {tmp_path}/run"
    said = "".join(finish(start("distill", flags, before=before))[1:])
    assert "free" in said and ".py" not in said and not re.search("(?i)warn(?!ing:)", said)


def test_what_kills_left_half_written_is_removed(run_of):
    run = run_of("half distill")
    (run.out / "other").mkdir()
    for name in ("checkpoint.pt", "best.pt", "log.csv", "curves.png", "config.json"):
        (run.out / f".{name}.123.tmp").touch()
    (run.out / "other" / ".checkpoint.pt.456.tmp").touch()  # another's, who may be at work
    assert run.ends_wrong() == ""
    assert [path.name for path in run.out.rglob(".*.tmp")] == [".checkpoint.pt.456.tmp"]


NOBODY = """import torchvision; from PIL import Image; Image.init()  # for nobody may import them
if os.getuid() == 0: os.setegid(65534); os.seteuid(65534)"""  # root may read all
CLOSED = [("probe", "checkpoint.pt"), ("distill", "train/two"), ("distill", "train/two/0.png")]


@pytest.mark.parametrize(("name", "closed"), CLOSED)
def test_no_permission_is_not_called_damage(finished, name, closed):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        images = helpers.image_folder(Path(folder, "images"))
        path = Path(shutil.copy(finished["a"] / "checkpoint.pt", images))
        reading = {"probe": [path, DATA], "distill": [TINY, helpers.IMAGES.format(images=images)]}
        (images / closed).chmod(0)
        result = start(name, reading[name], "--out", Path(folder, "x"), before=NOBODY).wait()
    assert one_sentence(result, closed, "ermission") == ""
    assert "damaged" not in result.err


# Terminals and pictures

ONE = f"{TINY} --probe none --epochs 1"
IN_A_SHELL = [
    "python {script} --out {out} 2>&-",
    "python {script} --out {out} | head -1; exit ${{PIPESTATUS[0]}}",
    "python {script} --out {out}é",
    pytest.param("python {script} --out {out} >&- 2>&-", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("command", IN_A_SHELL)
def test_whoever_reads_the_output_or_does_not(tmp_path, command):
    command = command.format(script=f"run_distill.py {ONE}", out=tmp_path / "run")
    result = helpers.shell(command.replace("python", sys.executable), PYTHONIOENCODING="ascii")
    assert result.code == 0, result
    assert "Traceback" not in result.err and "Exception" not in result.err
    (log,) = tmp_path.glob("*/log.csv")
    assert [row["epoch"] for row in table(log)] == [0, 1]


@pytest.mark.parametrize("how", ["backend", "package"])
def test_a_picture_that_cannot_be_drawn_costs_no_number(run_of, tmp_path, how):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise RuntimeError('broken')")
    before = f"sys.path.insert(0, {str(tmp_path)!r})" if how == "package" else ""
    run = run_of("new distill")
    name, flags, *out = run.command
    flags = flags.replace("--no-plot", "")
    result = finish(start(name, flags, *out, before=before, MPLBACKEND="foo"))
    assert "curves.png" in result.out + result.err
    assert run.differs() == ""


def test_odd_characters_in_paths_come_back_from_the_tables(tmp_path):
    out = tmp_path / "a\nb\u2028c\x0bd, \"e'"
    starts = [Path(f"{out}/checkpoint.pt:{which}") for which in ("student", "student-init")]
    flags = [SUPERVISED, "--epochs 1 --init", *starts, "--out"]
    for more in ("", "--resume"):
        finish(start("distill", TINY, "--epochs 1 --out", out, more))
        finish(start("imp", flags, out / "imp", "--rounds 1", more))
        finish(start("lmc", flags, out / "lmc", "--runs 2 --points 3", more))
    finish(start("probe", out / "checkpoint.pt", DATA, "--k 5 --out", out / "probe.csv"))
    assert {row["checkpoint"] for row in table(out / "probe.csv")} == {str(out / "checkpoint.pt")}
    for name in ("imp", "lmc"):
        assert {row["init"] for row in table(out / name / f"{name}.csv")} == {*map(str, starts)}


# Signals

STEPS = [("distill", signal.SIGTERM, 2), ("distill", signal.SIGTERM, 3)]
STEPS += [("distill", signal.SIGINT, 7), ("imp", signal.SIGTERM, 14), ("lmc", signal.SIGINT, 5)]
# in the linear probe of epoch 1, after thirty steps of the first probes; in a test
STEPS += [("distill", signal.SIGTERM, -31), ("lmc", signal.SIGTERM, -4)]
STEPS += [("distill", signal.SIGTERM, -5)]  # in the first probe of all


@pytest.mark.parametrize(("name", "number", "step"), STEPS)
def test_signals_in_an_epoch_lose_no_step(run_of, monkeypatch, name, number, step):
    """An epoch has three steps. Every step is done once, whatever is done again.

    Two signals come in a step, or at a call of cross-entropy if ``step`` is below 0.
    """
    run, steps, calls = run_of(f"new {name}"), itertools.count(), itertools.count(1)

    def stop():
        for _ in range(2):
            signal.raise_signal(number)

    def count(optimizer, *_):
        trained = name != "distill" or len(optimizer.param_groups) == 2  # the student, not a probe
        if trained and next(steps) == step - 1:
            stop()

    optimizer = torch.optim.AdamW if name == "distill" else torch.optim.SGD
    before_each(monkeypatch, optimizer, "step", count)
    entropy = torch.nn.functional
    before_each(monkeypatch, entropy, "cross_entropy", lambda *_: next(calls) == -step and stop())
    assert one_sentence(run.resume("--save-every 9"), "--resume", code=128 + number) == ""
    assert run.ends_wrong() == ""
    assert len(json.loads((run.out / "config.json").read_text())["earlier"]) == 1
    done = {"distill": 4 * 3, "imp": (3 + 3 + 3) * 3 + (3 + 2 + 2) * 3, "lmc": 3 * 2 * 3}[name]
    assert next(steps) == done


def test_an_overwritten_sweep_leaves_nothing_behind(run_of, script, monkeypatch):
    run, calls = run_of("sweep"), itertools.count()
    before = snapshot(run.out)
    with monkeypatch.context() as patch:
        before_each(patch, torch.optim.AdamW, "step", lambda *_: next(calls) or TERMINATE())
        result = script(*run.command[:2], "--overwrite --out", run.out)
        assert one_sentence(result, "--resume instead of --overwrite", code=143) == ""
    assert run.ends_wrong() == ""
    states = [name for name in before if name.endswith(".pt")]
    assert states and all(snapshot(run.out)[name] != before[name] for name in states)


def test_overwrite_deletes_no_file_of_somebody_else(run_of, script):
    run = run_of("new distill")
    run.out.mkdir()
    (run.out / "log.csv").write_text("mine")
    command = *run.command[:2], "--overwrite --out", run.out
    assert one_sentence(script(*command), "log.csv") == ""
    assert (run.out / "log.csv").read_text() == "mine"
    for name in ("curves.ipynb", "curves.csv"):
        (run.out / name).write_text("mine")
    (run.out / "log.csv").unlink()
    for _ in range(2):
        assert script(*command).code == 0 and len(list(run.out.glob("curves.*"))) == 2


def test_whole_runs_become_a_sweep_and_others_files_do_not(run_of, script):
    run = run_of("sweep")
    for name in ("config.json", "summary.csv"):
        (run.out / name).unlink()
    (notes := run.out / "alpha0.5-seed1" / "notes.txt").write_text("mine")
    command = *run.command[:2], "--overwrite --out", run.out
    assert script(*command).code == 0 and notes.read_text() == "mine"
    notes.unlink()
    assert run.differs() == ""
    shutil.rmtree(mine := run.out / "alpha0.5-seed1")
    mine.mkdir()
    (mine / "log.csv").write_text("mine")
    assert one_sentence(script(*command), mine / "log.csv") == ""
    assert (mine / "log.csv").read_text() == "mine"


def test_a_table_of_probes_stands_until_another_is_whole(script, finished, tmp_path, monkeypatch):
    path, calls = tmp_path / "probe.csv", itertools.count()
    flags = finished["a"] / "checkpoint.pt", DATA, "--k 5 --probe knn --out", path
    assert script("probe", flags).code == 0
    before = path.read_bytes()
    before_each(
        monkeypatch, KNeighborsClassifier, "fit", lambda *_: next(calls) % 2 and TERMINATE()
    )
    assert script("probe", flags, "--overwrite").code == 143
    assert path.read_bytes() == before
    path.unlink()
    assert script("probe", flags).code == 143
    assert [row["network"] for row in table(path)] == ["teacher"]


def test_a_sweep_that_was_made_longer_and_stopped_says_so(run_of, monkeypatch):
    run, calls = run_of("half sweep"), itertools.count()
    before_each(monkeypatch, torch.optim.AdamW, "step", lambda *_: next(calls) == 3 and TERMINATE())
    assert run.resume().code == 143  # in the second of four runs, as an epoch has three steps
    assert json.loads((run.out / "config.json").read_text())["flags"]["epochs"] == 2


def test_a_shorter_run_is_what_it_says(script, tmp_path, monkeypatch):
    """One that stopped in epoch 2 has no epoch 1 left; one that stopped there gets its probe."""
    flags, calls = [TINY, "--probe knn --probe-every 9 --save-every 1 --out", tmp_path], [0]

    def stop(optimizer, *_):
        calls[0] += len(optimizer.param_groups) == 2
        if calls[0] == 4:
            raise RuntimeError  # nothing is saved then
        if calls[0] == 6:
            TERMINATE()

    before_each(monkeypatch, torch.optim.AdamW, "step", stop)
    assert script("distill", flags, "--epochs 5").code == 1
    shutil.copytree(tmp_path, copy := tmp_path.with_name("copy"))
    assert script("distill", flags, "--epochs 5 --resume").code == 143
    assert one_sentence(script("distill", flags, "--epochs 1 --resume"), "epoch 2") == ""
    assert script("distill", flags[:-1], copy, "--epochs 1 --resume").code == 0
    rows = table(copy / "log.csv")
    assert [row["epoch"] for row in rows] == [0, 1] and rows[1]["student_knn"] is not None


@pytest.mark.parametrize("name", ["distill", "imp", "lmc", "landscape"])
def test_sigterm_while_a_network_is_built(run_of, monkeypatch, name):
    """Also on the meta device, where torch turns what a handler raises into an error of its own."""
    run, calls = run_of(f"new {name}"), itertools.count()
    owner, name = torch.nn.init, "kaiming_uniform_"
    before_each(monkeypatch, owner, name, lambda *_: next(calls) == 3 and TERMINATE())
    assert one_sentence(run.resume(), code=143) == ""


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """As in the background of a shell's script, where SIGTERM is what stops a run."""
    before = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    process = start("distill", TINY, "--epochs 50 --out", tmp_path / "run", before=before)
    log = tmp_path / "run" / "log.csv"
    process.wait_until(lambda: log.exists() and len(table(log)) > 1)
    process.send(signal.SIGINT)
    seen = len(table(log))
    process.wait_until(lambda: len(table(log)) > seen + 1)
    assert process.returncode is None
    process.send(signal.SIGTERM)
    assert process.wait().code == 143


# Failures of other kinds


def test_what_diverges_is_a_sentence_and_costs_no_checkpoint_and_no_other_run(script, tmp_path):
    one, sweep = tmp_path / "one", tmp_path / "sweep"
    for more in ("", "--resume"):
        result = script("distill", TINY, "--probe none --lr 1e30 --epochs 3 --out", one, more)
        assert one_sentence(result, "not finite", "epoch", "step", "--lr", code=1) == ""
        assert helpers.state(one / "checkpoint.pt")["epoch"] == 0
        result = script("distill", TINY, "--epochs 2 --lr 1e30 0.001 --out", sweep, more)
        assert one_sentence(result, "diverged", "lr1e+30", code=1) == ""
        assert {row["lr"] for row in table(sweep / "summary.csv")} == {0.001}
        assert table(sweep / "lr0.001" / "log.csv")[-1]["epoch"] == 2


def test_a_chain_that_diverges_does_not_end_the_others(script, tmp_path, monkeypatch):
    calls = itertools.count()

    def spoil(optimizer, *_):
        if next(calls) == 1:
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    before_each(monkeypatch, torch.optim.SGD, "step", spoil)
    flags = f"{SUPERVISED} --init random:1 random:2 --epochs 1 --rounds 1 --out {tmp_path}"
    result = script("imp", flags)
    assert one_sentence(result, "1 of 2", "random:1", "not finite", "--lr", code=1) == ""
    assert [row["init"] for row in table(tmp_path / "imp.csv")] == ["random:2"] * 2


INDUCTOR = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
ERRORS = [
    (RuntimeError("enforce fail. DefaultCPUAllocator: can't allocate memory"), 2, "memory"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "memory"),
    (MemoryError(), 2, "memory"),
    (INDUCTOR("no g++"), 2, "--compile"),
    (RuntimeError("a bug"), 1, "RuntimeError: a bug"),
]


@pytest.mark.parametrize(("error", "code", "said"), ERRORS)
def test_only_a_bug_is_a_traceback(script, tmp_path, monkeypatch, error, code, said):
    monkeypatch.setattr(torch.optim.AdamW, "step", Mock(side_effect=error))
    result = script("distill", f"{ONE} --out", tmp_path / "run")
    assert result.code == code and said in result.err
    assert (one_sentence(result) == "") == (code == 2)


def test_compile_is_tried_before_anything_is_deleted(run_of, script, monkeypatch):
    run = run_of("distill")
    before = snapshot(run.out)
    monkeypatch.setattr(torch, "compile", Mock(side_effect=INDUCTOR("no g++")))
    result = script(*run.command[:2], "--compile --overwrite --out", run.out)
    assert one_sentence(result, "--compile") == "" and snapshot(run.out) == before


def test_a_torchvision_of_another_torch_is_named(tmp_path):
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision.py").write_text(broken)
    result = helpers.shell(f"{sys.executable} run_distill.py", PYTHONPATH=str(tmp_path))
    assert one_sentence(result, "torchvision does not work with the installed torch", "nms") == ""
