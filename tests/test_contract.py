"""The contract of all scripts: however stopped and resumed, or shared by processes, a run ends
as an unbroken one, bit for bit but for timings.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    CASES,
    DATA,
    SUPERVISED,
    TINY,
    finish,
    launch,
    one_sentence,
    runs_differ,
    snapshot,
    start,
    start_two,
    state,
    table,
)

SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}
WAYS = """distill: resumed killed terminated interrupted; ema: terminated; shuffle: killed;
    imp: resumed killed shared; lmc: resumed interrupted shared; landscape: terminated shared;
    sweep: shared"""
MORE = """bf16: resumed; sweep: resumed killed shared; shuffle: resumed killed shared;
    distill: many; imp: many; lmc: many; landscape: many"""


def pairs(text):
    """[(name of a case, way of running it)]"""
    lines = (line.split(":") for line in text.split(";"))
    return [(name.strip(), way) for name, ways in lines for way in ways.split()]


def resume(case, flags, folder):
    finish(start(case.script, flags, "--resume --out", folder))


def stopped(case, flags, folder, sent, after):
    """The run is sent a signal ``after`` seconds; returns whether it was stopped by it."""
    process = start(case.script, flags, "--resume --out", folder)
    if sent == signal.SIGINT:  # while Python itself begins, Ctrl-C is a traceback
        process.wait_until(lambda: process.said()[0])
    try:
        result = process.wait(after)
    except subprocess.TimeoutExpired:
        process.send(sent)
        result = process.wait(60)
    assert result.code in (0, 128 + sent), result
    assert result.err.count("\n") <= 1 and "Traceback" not in result.err, result.err
    assert not result.err or "--resume" in result.err
    return result.code != 0


def ends_as_unbroken(finished, folder, name, way, times=1):
    """Run in the given way; where that is a signal, until one has stopped it so many times."""
    case, flags, draw = CASES[name], finished.flags(name), random.Random(f"{name} {way}")
    unbroken, seconds = finished[name], finished.seconds[name]
    for attempt in range(20):
        out = folder / f"{way}{attempt}"
        if way == "resumed":  # begun shorter, continued, and asked to go on with nothing left to do
            finish(start(case.script, flags, case.shorter, "--out", out))
            resume(case, flags, out)
        elif way == "shared":
            finish(*start_two(case.script, flags, "--out", out))
        while times and way in SIGNALS:
            if not stopped(case, flags, out, SIGNALS[way], draw.uniform(0, 0.8) * seconds):
                break  # it came to its end: another is begun
            times -= 1
        resume(case, flags, out)
        assert runs_differ(case, unbroken, out) == ""
        shutil.rmtree(out)
        if not times or way not in SIGNALS:
            return
    raise AssertionError("the runs ended before they could be stopped")


@pytest.mark.parametrize(
    ("name", "way"), pairs(WAYS) + [pytest.param(*p, marks=pytest.mark.slow) for p in pairs(MORE)]
)
def test_a_run_ends_as_an_unbroken_one(finished, tmp_path, name, way):
    for sent, times in {"killed": 5, "terminated": 2}.items() if way == "many" else [(way, 1)]:
        ends_as_unbroken(finished, tmp_path, name, sent, times)


def leaves(tree):
    """The tensors in a tree."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [leaf for part in parts for leaf in leaves(part)]


@pytest.mark.parametrize("name", ["distill", "imp", "lmc"])
def test_the_comparison_sees_one_changed_number(finished, tmp_path, name):
    """Negative control: one weight, one momentum, one cell of one table."""
    case, draw = CASES[name], random.Random(name)
    shutil.copytree(finished[name], tmp_path / "run")
    assert runs_differ(case, finished[name], tmp_path / "run") == ""
    path = sorted((tmp_path / "run").glob(case.states[0]))[0]
    whole = path.read_bytes()
    for which in draw.sample(range(len(leaves(state(path)))), 8):
        contents = state(path)
        tensor = leaves(contents)[which]
        last = (-1,) * tensor.ndim
        tensor[last] = ~tensor[last] if tensor.dtype == torch.bool else tensor[last] + 1
        torch.save(contents, path)
        assert path.name in runs_differ(case, finished[name], tmp_path / "run")
        path.write_bytes(whole)
    path = tmp_path / "run" / case.tables[0]
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1))
    assert path.name in runs_differ(case, finished[name], tmp_path / "run")
    path.unlink()
    assert "files" in runs_differ(case, finished[name], tmp_path / "run")


def test_flags_that_should_change_nothing_change_nothing(finished, tmp_path):
    """torch refuses what has no deterministic algorithm; how often is saved does not matter, nor
    how often the loss is looked at: at least five steps an epoch are, here all three.
    """
    more = "--deterministic --save-every 3 --log-every 1"
    finish(start("distill", CASES["distill"].flags, more, "--out", tmp_path / "run"))
    assert runs_differ(CASES["distill"], finished["distill"], tmp_path / "run") == ""


def test_a_finished_run_of_a_sweep_is_not_begun_again(finished, tmp_path):
    """Two runs are finished, two not begun; nothing happens to the folder without --resume."""
    case, flags, folder = CASES["sweep"], finished.flags("sweep"), tmp_path / "sweep"
    shutil.copytree(finished["sweep"], folder)
    for name in ("alpha0-seed1", "alpha0.5-seed0"):
        shutil.rmtree(folder / name)
    before = snapshot(folder)
    assert one_sentence(start("distill", flags, "--out", folder).wait(), "--resume") == ""
    assert snapshot(folder) == before
    resume(case, flags, folder)
    after = snapshot(folder)
    for name in ("alpha0-seed0", "alpha0.5-seed1"):
        assert after[f"{name}/checkpoint.pt"] == before[f"{name}/checkpoint.pt"]
    assert runs_differ(case, finished["sweep"], folder) == ""
    for path in filter(Path.is_file, folder.iterdir()):
        path.unlink()  # as if each run had been made by itself
    before = snapshot(folder)
    assert one_sentence(start("distill", flags, "--out", folder).wait(), "--resume") == ""
    assert snapshot(folder) == before
    resume(case, flags, folder)
    assert runs_differ(case, finished["sweep"], folder) == ""


# Two processes that train one network together


def test_two_processes_train_as_one(tmp_path):
    """Without batch norm, whose statistics are each CPU process's own; the parts are uneven."""
    flags = f"{TINY} --norm none --alpha 0.5 --epochs 2 --log-every 1 --probe knn --subset 39"
    finish(start("distill", flags, "--out", tmp_path / "one"))
    said = finish(*start_two("distill", flags, "--out", tmp_path / "two"))
    assert said.out.count(str(tmp_path / "two")) == 1, "not one process printed"
    one, two = (table(tmp_path / name / "log.csv") for name in ("one", "two"))
    assert [row["epoch"] for row in two] == [0, 1, 2]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["kl"] == pytest.approx(a["kl"], rel=1e-4 if a["epoch"] < 2 else 1e-2)
        assert b["distance_total"] == pytest.approx(a["distance_total"], rel=1e-3)
        assert b["teacher_knn"] == a["teacher_knn"]


@pytest.mark.slow
def test_two_processes_that_train_together_resume(tmp_path):
    """A signal costs them the epoch at most, and no number."""
    case = CASES["distill"]._replace(states=["checkpoint.pt"])
    flags = f"{TINY} --norm none --alpha 0.5 --probe none --epochs 4"
    finish(*start_two("distill", flags, "--out", tmp_path / "whole"))
    for out, sent in (("a", signal.SIGTERM), ("b", signal.SIGKILL)):
        processes = start_two("distill", flags, "--out", tmp_path / out)
        log = tmp_path / out / "log.csv"
        processes[0].wait_until(lambda log=log: log.exists() and len(table(log)) > 2)
        for process in processes:
            process.send(sent)
        for process in processes:
            assert process.wait().code in (0, 128 + sent)
        finish(*start_two("distill", flags, "--resume --out", tmp_path / out))
        assert [row["epoch"] for row in table(log)] == [0, 1, 2, 3, 4]
        assert runs_differ(case, tmp_path / "whole", tmp_path / out) == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/thread-self/children").exists(), reason="only Linux has them")
def test_under_torchrun_one_process_is_killed(finished, tmp_path):
    case, flags, out = CASES["imp"], finished.flags("imp"), tmp_path / "run"
    launched = launch("imp", flags, "--out", out)
    deadline = time.monotonic() + 120
    while not list(out.glob("chains/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    threads = Path(f"/proc/{launched.pid}/task").glob("*/children")
    _, rank = [int(pid) for path in threads for pid in path.read_text().split()]
    os.kill(rank, signal.SIGKILL)
    launched.communicate(timeout=120)
    assert launched.returncode != 0
    resumed = launch("imp", flags, "--resume --out", out)
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert runs_differ(case, finished["imp"], out) == ""


DIVERGES = f"{SUPERVISED} --epochs 1 --lr 1e30"


@pytest.mark.parametrize(
    ("name", "flags", "code", "said"),
    [
        ("distill", f"{TINY} --subset 5000", 2, "--subset 5000"),
        ("imp", f"{DIVERGES} --rounds 1 --init random:1 random:2", 1, "2 of 2"),
        ("lmc", f"{DIVERGES} --runs 2", 1, "2 of 2"),
    ],
)
def test_what_fails_in_one_of_two_processes_ends_both(tmp_path, name, flags, code, said):
    results = [p.wait() for p in start_two(name, flags, "--out", tmp_path / "run")]
    assert [result.code for result in results] == [code, code]
    assert said in results[0].err and all(r.err.count("\n") <= 1 for r in results)


def test_two_processes_probe_once(finished, tmp_path):
    flags = [finished["a"] / "checkpoint.pt", DATA, "--k 5 --out", tmp_path / "probe.csv"]
    said = finish(*start_two("probe", *flags))
    rows = table(tmp_path / "probe.csv")
    assert [row["network"] for row in rows] == ["teacher", "student", "student-init", "input"]
    assert said.out.count("test accuracy") == 1
