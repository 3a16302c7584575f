"""Processes killed at random moments, again and again, and resumed until they finish: the same files as an unbroken run."""

import csv
import random
import signal
import subprocess
import time

import pytest
import torch
from conftest import SUPERVISED, TINY
from processes import finish, start
from test_run_distill import assert_same_tree

TIMINGS = ("images_per_second", "seconds")
KILLS = 10  # of each script
RUNS = {
    "run_distill": ([*TINY, "--epochs", "4"], ["log.csv"], ["checkpoint.pt", "best.pt"]),
    "run_imp": ([*SUPERVISED, "--epochs", "3", "--rounds", "3"], ["imp.csv"], ["chains/init0-rewind0.pt"]),
    "run_lmc": (
        [*SUPERVISED, "--epochs", "3", "--runs", "2", "--points", "8"],
        ["lmc.csv", "barriers.csv"],
        ["runs/init0-run1.pt"],
    ),
    "run_landscape": (["--x-range", "-1", "1", "5", "--y-range", "-1", "1", "5", "--probe", "knn"], ["landscape.csv"], []),
}


def rows(path):
    with open(path) as file:
        return [{name: cell for name, cell in row.items() if name not in TIMINGS} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments_ends_as_unbroken(name, tiny_run, tmp_path):
    flags, tables, states = RUNS[name]
    if name == "run_landscape":
        path = tiny_run / "checkpoint.pt"
        other = tmp_path / "other" / "checkpoint.pt"
        finish(start("run_distill", *TINY, "--alpha", "1", "--epochs", "1", "--probe", "none", "--out", other.parent))
        axes = ["--origin", f"{path}:teacher", "--x-axis", f"{path}:student", "--y-axis", f"{other}:student"]
        flags = [*flags, *axes, "--subset", "40", "--test-subset", "30", "--k", "5", "--no-plot"]
    began = time.monotonic()
    finish(start(name, *flags, "--out", tmp_path / "unbroken"))
    duration = time.monotonic() - began

    rng, kills, broken = random.Random(name), 0, 0
    while kills < KILLS:  # a run that is through is compared, and another begun
        folder = tmp_path / f"broken{broken}"
        process = start(name, *flags, "--out", folder, "--resume")
        try:
            process.communicate(timeout=rng.uniform(0.02, 0.6) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            _, err = process.communicate(timeout=60)
            assert process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM, 143), err  # 0: it ended just before
            kills += process.returncode != 0
        if process.returncode == 0 or kills == KILLS:
            finish(start(name, *flags, "--out", folder, "--resume"))
            for table in tables:
                assert rows(folder / table) == rows(tmp_path / "unbroken" / table)
            for state in states:
                assert_same_tree(*(torch.load(f / state, weights_only=True) for f in (folder, tmp_path / "unbroken")))
            broken += 1
