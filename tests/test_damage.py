"""Damage of every kind around a run: files, disks, terminals, signals, two of a kind at once.

Whatever happens, a command ends with exit code 0 and the right numbers, or with one sentence.
"""

import errno
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CASES,
    DATA,
    IMAGES,
    SUPERVISED,
    TINY,
    Result,
    change,
    finish,
    image_folder,
    one_sentence,
    runs_differ,
    shell,
    snapshot,
    start,
    state,
    table,
)
from PIL import Image

DELETED = object()
VALUES = [DELETED, None, "text", [1, 2], {}, -5, 0, 2.5, float("nan"), 1e300, 10**400, True]
TENSORS = [
    lambda t: t[None],
    lambda t: t.flatten()[:1].clone(),
    lambda t: t.to(torch.int32),
    lambda t: t + 1,
    lambda t: t.double() * float("nan"),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.tolist(),
]


def places(tree, where=()):
    """Where all that is in a tree lies; of many things side by side, the first and the last two."""
    keys = list(tree) if isinstance(tree, dict) else []
    keys = list(range(len(tree))) if isinstance(tree, (list, tuple)) else keys
    for key in keys if len(keys) <= 20 else [*keys[:2], *keys[-2:]]:
        yield (*where, key)
        yield from places(tree[key], (*where, key))


def mutate_value(path, draw):
    """Change one thing in a state file; returns what, for the test's message."""
    contents = state(path)
    *where, key = draw.choice(list(places(contents)))
    parent = contents
    for step in where:
        parent = parent[step]
    old = parent[key]
    edits = TENSORS if isinstance(old, torch.Tensor) and draw.random() < 0.7 else VALUES
    new = draw.choice(edits)
    new = new(old) if callable(new) else new
    if new is DELETED:
        del parent[key]
    else:
        parent[key] = new
    torch.save(contents, path)
    return f"{[*where, key]}: {old!r:.40} became {new!r:.40}"


def mutate_bytes(path, draw):
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    kind = draw.choice(["cut", "flip", "flip", "drop", "insert"])
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        for _ in range(draw.choice((1, 64))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "drop":
        del content[at : at + draw.choice((1, 8, 200))]
    else:
        content[at:at] = draw.randbytes(draw.choice((1, 8, 200)))
    path.write_bytes(content)
    return f"{kind} at {at}"


def outcome(script, name, *flags):
    """``Result``, also of a traceback, which is exit code 1."""
    try:
        return script(name, *flags)
    except Exception as error:
        return Result(1, "", f"Traceback: {type(error).__name__}: {error}")


READERS = [("distill", "checkpoint.pt"), ("imp", "chains/init0-rewind1.pt")]
READERS += [("lmc", "runs/init0-run1.pt"), ("landscape", "landscape.part0.pt")]


@pytest.mark.parametrize(("name", "file"), READERS)
@pytest.mark.parametrize("mutate", [mutate_value, mutate_bytes])
@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_damaged_state_is_not_resumed(script, finished, tmp_path, name, file, mutate, count):
    case, flags, wrong = CASES[name], finished.flags(name), []
    draw = random.Random(f"{name} {mutate.__name__} {count}")
    for i in range(count):
        out = Path(shutil.copytree(finished[f"half {name}"], tmp_path / f"run{i}"))
        what = mutate(out / file, draw)
        result = outcome(script, case.script, flags, "--resume --out", out)
        found = one_sentence(result, out / file)
        if result.code == 0:
            found = runs_differ(case, finished[name], out)
        wrong += [f"{what}: {found}"] * bool(found)
        shutil.rmtree(out)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("mutate", [mutate_value, mutate_bytes])
def test_a_damaged_checkpoint_is_not_probed(script, finished, tmp_path, mutate):
    flags = [tmp_path / "best.pt", DATA, "--k 5 --probe knn --overwrite --out"]
    draw, wrong = random.Random(mutate.__name__), []
    shutil.copy(finished["distill"] / "best.pt", tmp_path)
    script("probe", flags, tmp_path / "good.csv")
    good = [row["knn"] for row in table(tmp_path / "good.csv")]
    for _ in range(25):
        shutil.copy(finished["distill"] / "best.pt", tmp_path)
        what = mutate(tmp_path / "best.pt", draw)
        result = outcome(script, "probe", flags, tmp_path / "probe.csv")
        if result.code == 0:
            same = [row["knn"] for row in table(tmp_path / "probe.csv")] == good
            wrong += [f"{what}: another number"] * (not same)
        elif found := one_sentence(result, "best.pt"):
            wrong.append(f"{what}: {found}")
    assert not wrong, "\n".join(wrong)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "another file": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "no format": lambda path: change(path, lambda c: c.pop("format")),
    "older": lambda path: change(path, lambda c: c.update(format="rtd-checkpoint-2")),
    "newer": lambda path: change(path, lambda c: c.update(format="rtd-checkpoint-99")),
    "code": lambda path: torch.save({"format": "rtd-checkpoint-4", "student": Payload()}, path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_refused(script, finished, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copytree(finished["half distill"], tmp_path / "run")) / "checkpoint.pt"
    FOREIGN[kind](path)
    before = snapshot(tmp_path)
    mentioned = [path.name, *(["rtd", kind] if kind in ("older", "newer") else [])]
    for name, flags in (
        ("probe", path),
        ("distill", f"{CASES['distill'].flags} --resume --out run"),
        ("imp", f"{SUPERVISED} --out new --init {path}:student"),
    ):
        assert one_sentence(script(name, flags), *mentioned) == ""
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("sweep", "alpha0-seed0/checkpoint.pt", "alpha0-seed1/checkpoint.pt"),
        ("sweep", "alpha0-seed0/checkpoint.pt", "alpha0.5-seed0/checkpoint.pt"),
        ("imp", "chains/init0-rewind0.pt", "chains/init0-rewind1.pt"),
        ("lmc", "runs/init0-run0.pt", "runs/init0-run2.pt"),
        ("lmc", "lines/init0-0-1.pt", "lines/init0-0-2.pt"),
    ],
)
def test_swapped_states_are_noticed(script, finished, tmp_path, name, one, two):
    out = tmp_path / "run"
    shutil.copytree(finished[f"half {name}"], out)
    for a, b in ((one, "third"), (two, one), ("third", two)):
        os.rename(out / a, out / b)
    result = script(CASES[name].script, finished.flags(name), "--resume --out", out)
    assert one_sentence(result, out) == ""


def test_a_missing_checkpoint_is_not_started_over(script, finished, tmp_path):
    for name, file in (("distill", "checkpoint.pt"), ("imp", "chains/init0-rewind0.pt")):
        out = tmp_path / name
        shutil.copytree(finished[f"half {name}"], out)
        (out / file).unlink()
        before = snapshot(out)
        result = script(CASES[name].script, finished.flags(name), "--resume --out", out)
        assert one_sentence(result, file) == ""
        assert snapshot(out) == before


def test_a_missing_best_checkpoint_is_said(script, finished, tmp_path):
    shutil.copytree(finished["half distill"], tmp_path / "run")
    (tmp_path / "run" / "best.pt").unlink()
    result = script("distill", CASES["distill"].flags, "--resume --out", tmp_path / "run")
    assert result.code in (0, 2) and "best.pt" in result.out + result.err


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("distill", f"{TINY} --epochs 1 --teacher {{run}}/checkpoint.pt:student --out {{run}}"),
        ("distill", f"{TINY} --alpha 0 0.5 --teacher {{run}}/best.pt:student --out {{run}}/.."),
        ("probe", f"{{run}}/best.pt {DATA} --k 5 --out {{run}}/best.pt"),
        ("landscape", "--plot-only {run} --out {run}/log.csv"),
    ],
)
def test_overwrite_does_not_delete_what_is_read(script, finished, tmp_path, name, flags):
    run = tmp_path / "alpha0"  # also that of a sweep's first run
    shutil.copytree(finished["distill"], run)
    before = snapshot(tmp_path)
    result = outcome(script, name, flags.format(run=run), "--overwrite")
    assert one_sentence(result, run) == ""
    assert snapshot(tmp_path) == before


LONG = "1" * 131_073
LOG_EDITS = {
    "missing": lambda text: None,
    "empty": lambda text: "",
    "a row less": lambda text: "\n".join(text.split("\n")[:2] + text.split("\n")[3:]),
    "text": lambda text: text.replace("\n2,", "\ntwo,"),
    "quote": lambda text: text.replace("\n2,", f'\n"2,{LONG}'),
    "digits": lambda text: text.replace("\n2,", f"\n{LONG[:400]},"),
}


@pytest.mark.parametrize("edit", LOG_EDITS)
def test_a_table_is_written_again_from_the_state(script, finished, tmp_path, edit):
    shutil.copytree(finished["half distill"], tmp_path / "run")
    log = tmp_path / "run" / "log.csv"
    text = LOG_EDITS[edit](log.read_text())
    log.unlink() if text is None else log.write_text(text)
    result = script("distill", CASES["distill"].flags, "--resume --out", tmp_path / "run")
    assert result.code == 0, result.err
    assert runs_differ(CASES["distill"], finished["distill"], tmp_path / "run") == ""


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("landscape.csv", ("0.5,", "much,")),
        ("landscape.csv", ("\n1,", f'\n"1,{LONG}')),
        ("landscape.csv", ("\n1,", f"\n{LONG[:400]},")),
        ("points.csv", ("theta_T,0", "theta_T,left")),
        ("points.csv", ("x", "z")),
    ],
)
def test_a_damaged_table_is_not_drawn(script, finished, tmp_path, file, edit):
    shutil.copytree(finished["landscape"], tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_text(path.read_text().replace(*edit))
    flags = ["--plot-only", tmp_path / "run", "--out", tmp_path / "x.png"]
    assert one_sentence(outcome(script, "landscape", *flags), file) == ""
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"flags": 3}', "{}", "\x00"])
def test_a_damaged_config_is_refused(script, finished, tmp_path, text):
    shutil.copytree(finished["half distill"], tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    before = snapshot(tmp_path)
    result = script("distill", CASES["distill"].flags, "--resume --out", tmp_path / "run")
    assert one_sentence(result, "config.json") == ""
    assert snapshot(tmp_path) == before


def test_other_inputs_are_noticed(script, finished, tmp_path):
    """Other images, another teacher, another start; not that they lie elsewhere."""
    images = [image_folder(tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2))]
    flags = f"{TINY} {IMAGES} --probe none --out {tmp_path}/run".format(images=images[0])
    assert script("distill", flags, "--epochs 1").code == 0
    moved = images[0].rename(tmp_path / "elsewhere")
    assert script("distill", flags, "--epochs 2 --resume --data-dir", moved).code == 0
    result = script("distill", flags, "--epochs 3 --resume --data-dir", images[1])
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


# Two at once


@pytest.mark.parametrize("name", ["distill", "sweep", "imp", "lmc", "landscape"])
def test_of_two_in_one_folder_one_is_refused(finished, tmp_path, name):
    case, flags = CASES[name], [finished.flags(name), "--resume --out", tmp_path / "run"]
    processes = [start(case.script, *flags) for _ in range(2)]
    results = [process.wait() for process in processes]
    assert sorted(result.code for result in results) == [0, 2], results
    refused = results[0].code == 2
    assert one_sentence(results[not refused], str(processes[refused].pid)) == ""
    assert runs_differ(case, finished[name], tmp_path / "run") == ""
    finish(start(case.script, *flags))  # the lock went with its process


# Disks


def at_fsync(monkeypatch, name, action):
    """``action()`` whenever a file whose path contains ``name`` is flushed to the disk."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("only Linux tells which file a descriptor is")
    plain = os.fsync

    def fsync(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            action()
        return plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def fail():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("distill", "config.json"),
        ("distill", "log.csv"),
        ("distill", "checkpoint.pt"),
        ("imp", "init0-rewind0.pt"),
        ("imp", "imp.csv"),
        ("lmc", "barriers.csv"),
    ],
)
def test_a_full_disk_loses_nothing(script, finished, tmp_path, monkeypatch, name, file):
    """The disk does not take one of the files; what stood before still does."""
    case, out = CASES[name], tmp_path / "run"
    flags = [finished.flags(name), "--resume --out", out]
    if file != "config.json":
        shutil.copytree(finished[f"half {name}"], out)
    before = {path: path.read_bytes() for path in out.rglob(file)}
    with monkeypatch.context() as patch:
        at_fsync(patch, file, fail)
        assert one_sentence(script(case.script, *flags), file, "No space left on device") == ""
    assert not list(out.rglob(".*.tmp"))
    assert {path: path.read_bytes() for path in before} == before
    assert script(case.script, *flags).code == 0
    assert runs_differ(case, finished[name], out) == ""


def test_a_disk_that_fills_within_a_checkpoint(script, finished, tmp_path):
    """A write in the midst of torch.save fails, here at a limit of the size of a file."""
    flags = [CASES["distill"].flags, "--resume --out", tmp_path / "run"]
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        result = script("distill", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert one_sentence(result, "checkpoint.pt", "File too large") == ""
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert script("distill", *flags).code == 0
    assert runs_differ(CASES["distill"], finished["distill"], tmp_path / "run") == ""


def test_a_nearly_full_disk_is_said_in_words(tmp_path):
    before = "import shutil, types; space = types.SimpleNamespace(total=1, used=1, free=1)"
    before += "; shutil.disk_usage = lambda path: space"
    flags = f"{TINY} --probe none --epochs 0 --out {tmp_path}/run"
    result = finish(start("distill", flags, before=before))
    said = result.out + result.err
    assert (
        "free" in said and "warn" not in said.lower().replace("warning:", "") and ".py" not in said
    )


def test_what_kills_left_half_written_is_removed(script, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished["half distill"], out)
    for name in ("checkpoint.pt", "best.pt", "log.csv", "curves.png", "config.json"):
        (out / f".{name}.123.tmp").touch()
    (out / "other").mkdir()
    (out / "other" / ".checkpoint.pt.456.tmp").touch()  # another's, who may be at work
    assert script("distill", CASES["distill"].flags, "--resume --out", out).code == 0
    assert [path.name for path in out.rglob(".*.tmp")] == [".checkpoint.pt.456.tmp"]


def test_no_permission_is_not_called_damage(finished):
    before = "if os.getuid() == 0: os.setegid(65534); os.seteuid(65534)"  # root may read all
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(shutil.copy(finished["a"] / "checkpoint.pt", folder))
        path.chmod(0)
        result = start("probe", path, DATA, "--out", path.with_name("x.csv"), before=before).wait()
    assert one_sentence(result, "checkpoint.pt", "ermission") == ""
    assert "damaged" not in result.err


# Terminals and pictures

ONE = f"{TINY} --probe none --epochs 1"


@pytest.mark.parametrize(
    "command",
    [
        "python {script} --out {out} 2>&-",
        "python {script} --out {out} | head -1; exit ${{PIPESTATUS[0]}}",
        "python {script} --out {out}é",
        pytest.param("python {script} --out {out} >&- 2>&-", marks=pytest.mark.slow),
        "trap '' INT; python {script} --out {out}",
    ],
)
def test_whoever_reads_the_output_or_does_not(tmp_path, command):
    command = command.format(script=f"run_distill.py {ONE}", out=tmp_path / "run")
    result = shell(command.replace("python", sys.executable), PYTHONIOENCODING="ascii")
    assert result.code == 0, result
    assert "Traceback" not in result.err and "Exception" not in result.err
    (log,) = tmp_path.glob("*/log.csv")
    assert [row["epoch"] for row in table(log)] == [0, 1]


@pytest.mark.parametrize("how", ["backend", "package"])
def test_a_picture_that_cannot_be_drawn_costs_no_number(finished, tmp_path, how):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise RuntimeError('broken')")
    before = f"sys.path.insert(0, {str(tmp_path)!r})" if how == "package" else ""
    flags = CASES["distill"].flags.replace("--no-plot", "")
    process = start("distill", flags, "--out", tmp_path / "run", before=before, MPLBACKEND="foo")
    result = finish(process)
    assert "curves.png" in result.out + result.err
    assert runs_differ(CASES["distill"], finished["distill"], tmp_path / "run") == ""


def test_odd_characters_in_paths_come_back_from_the_tables(finished, tmp_path):
    out = tmp_path / "a\nb\u2028c\x0bd, \"e'"
    flags = [f"{TINY} --epochs 1 --out", out]
    finish(start("distill", *flags))
    finish(start("distill", *flags, "--resume"))
    finish(start("probe", out / "checkpoint.pt", DATA, "--k 5 --out", out / "probe.csv"))
    assert {row["checkpoint"] for row in table(out / "probe.csv")} == {str(out / "checkpoint.pt")}
    starts = [Path(f"{out}/checkpoint.pt:{which}") for which in ("student", "student-init")]
    for name, more in (("imp", "--rounds 1"), ("lmc", "--runs 2 --points 2")):
        flags = [SUPERVISED, "--epochs 1", more, "--init", *starts, "--out", out / name]
        finish(start(name, *flags))
        finish(start(name, *flags, "--resume"))
        rows = table(out / name / f"{name}.csv")
        assert {row["init"] for row in rows} == set(map(str, starts))


# Signals


@pytest.mark.parametrize(
    ("name", "number", "step"),
    [
        ("distill", signal.SIGTERM, 2),
        ("distill", signal.SIGTERM, 3),
        ("distill", signal.SIGINT, 7),
        ("imp", signal.SIGTERM, 14),
        ("lmc", signal.SIGINT, 5),
    ],
)
def test_a_signal_in_an_epoch_loses_no_step(
    script, finished, tmp_path, monkeypatch, name, number, step
):
    """An epoch has three steps. Every step is done once, whatever is done again."""
    case, optimizer = CASES[name], torch.optim.AdamW if name == "distill" else torch.optim.SGD
    flags = [finished.flags(name), "--resume --out", tmp_path / "run"]
    steps, plain = itertools.count(), optimizer.step

    def counted(self, *arguments):
        trained = name != "distill" or len(self.param_groups) == 2  # the student's, not a probe's
        if trained and next(steps) == step - 1:
            signal.raise_signal(number)
        plain(self, *arguments)

    monkeypatch.setattr(optimizer, "step", counted)
    result = script(case.script, *flags)
    assert (result.code, result.err.count("\n")) == (128 + number, 1), result
    assert "--resume" in result.err
    result = script(case.script, *flags)
    assert result.code == 0, result.err
    assert runs_differ(case, finished[name], tmp_path / "run") == ""
    done = {"distill": 4 * 3, "imp": (3 + 3 + 3) * 3 + (3 + 2 + 2) * 3, "lmc": 3 * 2 * 3}[name]
    assert next(steps) == done


@pytest.mark.parametrize(("number", "signals"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_in_a_checkpoint(script, finished, tmp_path, monkeypatch, number, signals):
    """What is being written is finished first; a second signal leaves what stood before."""
    flags = [CASES["distill"].flags, "--resume --out", tmp_path / "run"]
    shutil.copytree(finished["half distill"], tmp_path / "run")
    left = [number] * signals

    def interrupt():
        while left:
            signal.raise_signal(left.pop())

    with monkeypatch.context() as patch:
        at_fsync(patch, ".checkpoint.pt", interrupt)
        result = script("distill", *flags)
    assert (result.code, result.err.count("\n")) == (128 + number, 1), result
    assert state(tmp_path / "run" / "checkpoint.pt")["epoch"] == (3 if signals == 1 else 2)
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert script("distill", *flags).code == 0
    assert runs_differ(CASES["distill"], finished["distill"], tmp_path / "run") == ""


@pytest.mark.parametrize("name", ["distill", "imp", "lmc", "landscape"])
def test_sigterm_while_a_network_is_built(script, finished, tmp_path, monkeypatch, name):
    """Also on the meta device, where torch turns what a handler raises into an error of its own."""
    flags = [finished.flags(name), "--out", tmp_path / "run"]
    plain, calls = torch.nn.init.kaiming_uniform_, itertools.count()

    def signalled(tensor, *arguments, **options):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return plain(tensor, *arguments, **options)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", signalled)
    result = outcome(script, CASES[name].script, *flags)
    assert result.code == 143 and result.err.count("\n") == 1, result


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


def test_a_loss_that_diverges_is_a_sentence_and_keeps_the_checkpoint(script, tmp_path):
    flags = f"{TINY} --probe none --lr 1e30 --epochs 3 --out {tmp_path}"
    for more in ("", "--resume"):
        result = script("distill", flags, more)
        assert result.code == 1 and result.err.count("\n") == 1
        assert all(word in result.err for word in ("not finite", "epoch", "step", "--lr"))
        assert state(tmp_path / "checkpoint.pt")["epoch"] == 0


def test_a_run_of_a_sweep_that_diverges_does_not_end_it(script, tmp_path):
    flags = f"{TINY} --epochs 2 --lr 1e30 0.001 --out {tmp_path}"
    for more in ("", "--resume"):
        result = script("distill", flags, more)
        assert result.code == 1 and result.err.count("\n") == 1
        assert "diverged" in result.err and "lr1e+30" in result.err
        assert {row["lr"] for row in table(tmp_path / "summary.csv")} == {0.001}
        assert table(tmp_path / "lr0.001" / "log.csv")[-1]["epoch"] == 2


def test_a_chain_that_diverges_does_not_end_the_others(script, tmp_path, monkeypatch):
    plain, calls = torch.optim.SGD.step, itertools.count()

    def spoiled(optimizer, *arguments):
        plain(optimizer, *arguments)
        if next(calls) == 1:
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.SGD, "step", spoiled)
    flags = f"{SUPERVISED} --init random:1 random:2 --epochs 1 --rounds 1 --out {tmp_path}"
    result = script("imp", flags)
    assert result.code == 1 and result.err.count("\n") == 1
    assert all(word in result.err for word in ("1 of 2", "random:1", "not finite", "--lr"))
    assert [row["init"] for row in table(tmp_path / "imp.csv")] == ["random:2"] * 2


INDUCTOR = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "memory"),
        (MemoryError(), "memory"),
        (INDUCTOR("no g++"), "--compile"),
        (RuntimeError("a bug"), None),
    ],
)
def test_what_the_machine_lacks_is_a_sentence_and_a_bug_a_traceback(
    script, tmp_path, monkeypatch, error, said
):
    def fails(*_):
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    flags = ["distill", f"{ONE} --out", tmp_path / "run"]
    if said is None:
        with pytest.raises(RuntimeError, match="a bug"):
            script(*flags)
    else:
        assert one_sentence(script(*flags), said) == ""


def test_a_torchvision_of_another_torch_is_named(tmp_path):
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision.py").write_text(broken)
    result = shell(f"{sys.executable} run_distill.py", PYTHONPATH=str(tmp_path))
    assert one_sentence(result, "torchvision does not work with the installed torch", "nms") == ""


# Images


def distill_images(script, folder, out, more="--epochs 0 --probe none"):
    return script("distill", TINY, IMAGES.format(images=folder), more, "--out", out)


@pytest.mark.parametrize("kind", ["dangling", "folder", "text", "deep"])
def test_an_image_that_cannot_be_read_is_refused_by_name(script, tmp_path, kind):
    path = image_folder(tmp_path / "images") / "train" / "one" / "x.png"
    if kind == "dangling":
        path.symlink_to("nowhere.png")
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not an image")
    else:
        Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(path)
    assert (
        one_sentence(distill_images(script, tmp_path / "images", tmp_path / "run"), "x.png") == ""
    )


def test_other_files_among_the_images_are_counted(script, tmp_path):
    images = image_folder(tmp_path / "images")
    for i in range(3):
        Image.new("RGB", (32, 32)).save(images / "train" / "one" / f"x{i}.gif")
    result = distill_images(script, images, tmp_path / "run")
    assert result.code == 0 and re.search(r"\b3 .*file", result.out + result.err), result


def test_images_that_cameras_turned_are_turned_back(script, tmp_path):
    """EXIF orientation 6: what is stored is the picture turned by a quarter to the left."""
    upright = image_folder(tmp_path / "upright")
    turned = Path(shutil.copytree(upright, tmp_path / "turned"))
    for path in turned.rglob("*.png"):
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    logs = []
    for folder in (upright, turned):
        out = tmp_path / f"{folder.name}-run"
        assert distill_images(script, folder, out, "--epochs 1 --probe none").code == 0
        logs.append([row["loss"] for row in table(out / "log.csv")])
    assert logs[0] == logs[1]


def test_a_control_chain_goes_on_without_a_state_of_its_own(script, finished, tmp_path):
    """Its first table is written before its first state: a kill in between loses nothing."""
    shutil.copytree(finished["shuffle"], tmp_path / "run")
    (tmp_path / "run" / "chains" / "init0-rewind0-shuffle.pt").unlink()
    result = script("imp", CASES["shuffle"].flags, "--resume --out", tmp_path / "run")
    assert result.code == 0, result.err
    assert runs_differ(CASES["shuffle"], finished["shuffle"], tmp_path / "run") == ""
