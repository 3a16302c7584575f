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
    SUPERVISED,
    TINY,
    change,
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

SHARED = ("sweep", "imp", "lmc", "landscape")  # work in units, which processes share
WAYS = ("resumed", "killed", "shared")
SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}


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


def run_in_a_way(case, flags, folder, way, seconds, draw, times):
    """Runs in ``folder`` that end in the given way; returns how often they were stopped."""
    if way == "resumed":  # begun shorter, continued, and asked to go on when nothing is left to do
        finish(start(case.script, flags, case.shorter, "--out", folder))
        resume(case, flags, folder)
    elif way == "shared":
        finish(*start_two(case.script, flags, "--out", folder))
    done, sent = 0, SIGNALS.get(way)
    while sent and done < times:
        if not stopped(case, flags, folder, sent, draw.uniform(0, 0.8) * seconds):
            break  # it came to its end: another is begun
        done += 1
    resume(case, flags, folder)
    return done if sent else times


def ends_as_unbroken(finished, folder, name, way, times=1):
    case, flags, unbroken = CASES[name], finished.flags(name), finished[name]
    draw = random.Random(f"{name} {way}")
    for attempt in range(20):
        out = folder / f"run{attempt}"
        times -= run_in_a_way(case, flags, out, way, finished.seconds[name], draw, times)
        assert runs_differ(case, unbroken, out) == ""
        shutil.rmtree(out)
        if times <= 0:
            return
    raise AssertionError("the runs ended before they could be stopped")


ONCE = [("distill", way) for way in ("resumed", *SIGNALS)] + [("ema", "terminated")]
ONCE += [("imp", "resumed"), ("imp", "killed"), ("lmc", "resumed"), ("lmc", "interrupted")]
ONCE += [("landscape", "terminated"), *((name, "shared") for name in SHARED)]
ONCE += [("shuffle", "killed")]
TWICE = [("bf16", "resumed"), *((name, way) for name in ("sweep", "shuffle") for way in WAYS)]


@pytest.mark.parametrize(("name", "way"), ONCE)
def test_a_run_ends_as_an_unbroken_one(finished, tmp_path, name, way):
    ends_as_unbroken(finished, tmp_path, name, way)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), TWICE)
def test_so_do_some_more(finished, tmp_path, name, way):
    ends_as_unbroken(finished, tmp_path, name, way)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill", "imp", "lmc", "landscape"])
def test_many_random_kills_change_nothing(finished, tmp_path, name):
    ends_as_unbroken(finished, tmp_path, name, "killed", times=5)
    ends_as_unbroken(finished, tmp_path, name, "terminated", times=2)


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

        def edit(contents, which=which):
            tensor = leaves(contents)[which]
            last = (-1,) * tensor.ndim
            tensor[last] = ~tensor[last] if tensor.dtype == torch.bool else tensor[last] + 1

        change(path, edit)
        assert path.name in runs_differ(case, finished[name], tmp_path / "run")
        path.write_bytes(whole)
    path = tmp_path / "run" / case.tables[0]
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1))
    assert path.name in runs_differ(case, finished[name], tmp_path / "run")
    path.unlink()
    assert "files" in runs_differ(case, finished[name], tmp_path / "run")


def test_the_comparison_sees_another_seed(finished):
    assert "log.csv" in runs_differ(CASES["distill"], finished["distill"], finished["seed1"])


def test_a_flag_that_should_change_nothing_changes_nothing(finished, tmp_path):
    """torch refuses what has no deterministic algorithm; how often is saved does not matter."""
    more = "--deterministic --save-every 3"
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


def children(pid):
    """The processes that process ``pid`` has begun."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        found += [int(path.parent.name)] * (parent == pid)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux lists processes so")
def test_under_torchrun_one_process_is_killed(finished, tmp_path):
    case, flags = CASES["imp"], finished.flags("imp")
    unbroken, out = finished["imp"], tmp_path / "run"
    launched = launch("imp", flags, "--out", out)
    deadline = time.monotonic() + 120
    while not list(out.glob("chains/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks = children(launched.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    launched.communicate(timeout=120)
    assert launched.returncode != 0
    resumed = launch("imp", flags, "--resume --out", out)
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert runs_differ(case, unbroken, out) == ""


def test_what_is_wrong_in_one_of_two_processes_ends_both(tmp_path):
    processes = start_two("distill", TINY, "--subset 5000 --out", tmp_path / "run")
    results = [process.wait() for process in processes]
    assert [result.code for result in results] == [2, 2]
    assert "--subset 5000" in results[0].err and all(r.err.count("\n") <= 1 for r in results)


@pytest.mark.parametrize(
    ("name", "flags"), [("imp", "--rounds 1 --init random:1 random:2"), ("lmc", "--runs 2")]
)
def test_what_diverges_in_one_of_two_processes_is_known_in_both(tmp_path, name, flags):
    flags = f"{SUPERVISED} {flags} --epochs 1 --lr 1e30"
    results = [p.wait() for p in start_two(name, flags, "--out", tmp_path / "run")]
    assert [result.code for result in results] == [1, 1]
    assert "2 of 2" in results[0].err and all(r.err.count("\n") <= 1 for r in results)


def test_two_processes_probe_once(finished, tmp_path):
    flags = [finished["a"] / "checkpoint.pt", "--subset 40 --test-subset 30 --k 5 --device cpu"]
    said = finish(*start_two("probe", *flags, "--out", tmp_path / "probe.csv"))
    rows = table(tmp_path / "probe.csv")
    assert [row["network"] for row in rows] == ["teacher", "student", "student-init", "input"]
    assert said.out.count("test accuracy") == 1
