"""The contract of all scripts: however stopped and resumed, or shared by processes, a run ends
as an unbroken one, bit for bit but for timings.
"""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from helpers import CASES, DATA, SUPERVISED, TINY, finish, one_sentence, runs_differ, start, table

KILL, TERMINATE, INTERRUPT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def ends_as_unbroken(finished, name, folder):
    """With --resume, whatever was done before."""
    finish(start(CASES[name].script, finished.flags(name), "--resume --out", folder))
    assert runs_differ(CASES[name], finished[name], folder) == ""


@pytest.mark.parametrize("name", ["distill", slow("bf16"), slow("sweep"), slow("shuffle")])
def test_a_run_that_was_begun_shorter_ends_as_an_unbroken_one(finished, tmp_path, name):
    run = shutil.copytree(finished[f"half {name}"], tmp_path / "run")
    for _ in range(2):  # the second time nothing is left to do
        ends_as_unbroken(finished, name, run)


@pytest.mark.parametrize("name", ["imp", "lmc", "landscape", "sweep", slow("shuffle")])
def test_a_run_that_two_processes_share_ends_as_an_unbroken_one(finished, tmp_path, name):
    finish(*helpers.start_two(CASES[name].script, finished.flags(name), "--out", tmp_path / "run"))
    ends_as_unbroken(finished, name, tmp_path / "run")


STOPPED = [("distill", KILL, 1), ("imp", KILL, 1), ("lmc", INTERRUPT, 1), ("ema", TERMINATE, 1)]
STOPPED += [("landscape", TERMINATE, 1), slow("distill", INTERRUPT, 1), slow("sweep", KILL, 1)]
STOPPED += [slow(n, KILL, 5) for n in ("distill", "shuffle", "lmc", "landscape")]
STOPPED += [slow(n, TERMINATE, 2) for n in ("distill", "imp", "lmc")]


@pytest.mark.parametrize(("name", "number", "times"), STOPPED)
def test_a_stopped_run_ends_as_an_unbroken_one(finished, tmp_path, name, number, times):
    case, draw, run = CASES[name], random.Random(f"{name} {number}"), tmp_path / "run"
    unbroken, left = finished[name], times
    for _ in range(20 * times):
        process = start(case.script, finished.flags(name), "--resume --out", run)
        if number == INTERRUPT:  # while Python itself begins, Ctrl-C is a traceback
            process.wait_until(lambda process=process: process.said()[0])
        try:
            result = process.wait(draw.uniform(0, 0.8) * finished.seconds[name])
        except subprocess.TimeoutExpired:
            process.send(number)
            result = process.wait(60)
        assert result.code in (0, 128 + number) and "Traceback" not in result.err, result
        assert not result.err or "--resume" in result.err and result.err.count("\n") == 1
        left -= result.code != 0
        if not left:
            return ends_as_unbroken(finished, name, run)
        if result.code == 0:  # it came to its end: another is begun
            assert runs_differ(case, unbroken, run) == ""
            shutil.rmtree(run)
    raise AssertionError("the runs ended before they could be stopped")


def test_the_comparison_sees_one_changed_number(finished, tmp_path):
    """Negative control: one weight, one cell of a table, a missing file."""
    run = shutil.copytree(finished["distill"], tmp_path / "run")

    def found():
        return runs_differ(CASES["distill"], finished["distill"], run)

    assert found() == ""
    helpers.change(run / "checkpoint.pt", lambda c: c["student"]["head.mlp.0.bias"][-1:].add_(1))
    assert "checkpoint.pt" in found()
    (run / "log.csv").write_text((run / "log.csv").read_text().replace("1", "2", 1))
    assert "log.csv" in found()
    (run / "log.csv").unlink()
    assert "files" in found()


def test_flags_that_should_change_nothing_change_nothing(finished, tmp_path):
    """torch refuses what has no deterministic algorithm; how often is saved does not matter, nor
    how often the loss is looked at: at least five steps an epoch are, here all three.
    """
    more = "--deterministic --save-every 3 --log-every 1"
    finish(start("distill", CASES["distill"].flags, more, "--out", tmp_path / "run"))
    assert runs_differ(CASES["distill"], finished["distill"], tmp_path / "run") == ""


def test_a_finished_run_of_a_sweep_is_not_begun_again(finished, tmp_path):
    """Two runs are finished, two not begun; nothing happens to the folder without --resume."""
    flags, folder = finished.flags("sweep"), tmp_path / "sweep"
    shutil.copytree(finished["sweep"], folder)
    for name in ("alpha0-seed1", "alpha0.5-seed0"):
        shutil.rmtree(folder / name)
    before = helpers.snapshot(folder)
    assert one_sentence(start("distill", flags, "--out", folder).wait(), "--resume") == ""
    assert helpers.snapshot(folder) == before
    ends_as_unbroken(finished, "sweep", folder)
    after = helpers.snapshot(folder)
    for name in ("alpha0-seed0", "alpha0.5-seed1"):
        assert after[f"{name}/checkpoint.pt"] == before[f"{name}/checkpoint.pt"]
    for path in filter(Path.is_file, folder.iterdir()):
        path.unlink()  # as if each run had been made by itself
    before = helpers.snapshot(folder)
    assert one_sentence(start("distill", flags, "--out", folder).wait(), "--resume") == ""
    assert helpers.snapshot(folder) == before
    ends_as_unbroken(finished, "sweep", folder)


# Two processes that train one network together


def test_two_processes_train_as_one(tmp_path):
    """Without batch norm, whose statistics are each CPU process's own; the parts are uneven."""
    flags = f"{TINY} --norm none --alpha 0.5 --epochs 2 --log-every 1 --probe knn --subset 39"
    finish(start("distill", flags, "--out", tmp_path / "one"))
    said = finish(*helpers.start_two("distill", flags, "--out", tmp_path / "two"))
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
    """A signal costs them the epoch at most, and no number, also if a last epoch ends anew."""
    case = CASES["distill"]._replace(states=["checkpoint.pt"])
    flags = f"{TINY} --ema 0.3 --alpha 0.5 --probe knn --probe-every 40 --save-every 1 --epochs 40"
    finish(*helpers.start_two("distill", flags, "--out", tmp_path / "whole"))
    for out, sent in (("a", signal.SIGTERM), ("b", signal.SIGKILL)):
        processes = helpers.start_two("distill", flags, "--out", tmp_path / out)
        log = tmp_path / out / "log.csv"
        processes[0].wait_until(lambda log=log: log.exists() and len(table(log)) > 2)
        for process in processes:
            process.send(sent)
        for process in processes:
            assert process.wait().code == 128 + sent
        early, last = tmp_path / f"early-{out}", helpers.state(log.with_name("checkpoint.pt"))
        shutil.copytree(log.parent, early)
        flags_of_early = f"{flags} --epochs {last['epoch']} --resume --out {early}"
        finish(*helpers.start_two("distill", flags_of_early))
        rows, wanted = table(early / "log.csv"), last["progress"]["rows"]
        assert rows[-1]["student_knn"] is not None and wanted[-1]["student_knn"] is None
        assert [(row["loss"], row["kl"]) for row in rows] == [
            (pytest.approx(row["loss"]), pytest.approx(row["kl"])) for row in wanted
        ]
        finish(*helpers.start_two("distill", flags, "--resume --out", tmp_path / out))
        assert [row["epoch"] for row in table(log)] == [*range(41)]
        assert runs_differ(case, tmp_path / "whole", tmp_path / out) == ""


@pytest.mark.slow
def test_two_processes_under_torchrun_itself_end_as_one(finished, tmp_path):
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2"
    result = helpers.shell(f"{torchrun} run_imp.py {finished.flags('imp')} --out {tmp_path}/run")
    assert result.code == 0, result
    assert runs_differ(CASES["imp"], finished["imp"], tmp_path / "run") == ""


DIVERGES = f"{SUPERVISED} --epochs 1 --lr 1e30"
FAILS = [("distill", f"{TINY} --subset 5000", 2, "--subset 5000")]
FAILS += [("imp", f"{DIVERGES} --rounds 1 --init random:1 random:2", 1, "2 of 2")]
FAILS += [("lmc", f"{DIVERGES} --runs 2", 1, "2 of 2")]
FAILS += [("distill", f"{TINY} --probe none --epochs 1 --lr 1e30", 1, "not finite")]


@pytest.mark.parametrize(("name", "flags", "code", "said"), FAILS)
def test_what_fails_in_one_of_two_processes_ends_both(tmp_path, name, flags, code, said):
    results = [p.wait() for p in helpers.start_two(name, flags, "--out", tmp_path / "run")]
    assert [result.code for result in results] == [code, code]
    assert said in results[0].err and sum(r.err.count("\n") for r in results) == 1


def test_two_processes_probe_once(finished, tmp_path):
    flags = [finished["a"] / "checkpoint.pt", DATA, "--k 5 --out", tmp_path / "probe.csv"]
    said = finish(*helpers.start_two("probe", *flags))
    rows = table(tmp_path / "probe.csv")
    assert [row["network"] for row in rows] == ["teacher", "student", "student-init", "input"]
    assert said.out.count("test accuracy") == 1
