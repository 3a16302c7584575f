"""results/reproduce.py: its commands are real, a row runs and is collected, pages are current."""

import csv
import importlib
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPTS

PAGES = ("README.md", "results/README.md")


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository, in which rows may run and pages be written."""
    skipped = shutil.ignore_patterns(".*", "runs", "data", "__pycache__", "*.egg-info")
    return shutil.copytree(ROOT, tmp_path / "lines", ignore=skipped)  # as a folder of run_lmc.py


@pytest.fixture
def idle(clone):
    """A clone without results, whose scripts do nothing."""
    for script in clone.glob("run_*.py"):
        script.write_text(f'if __name__ == "__main__":\n    raise SystemExit\n{script.read_text()}')
    for row in filter(Path.is_dir, clone.glob("results/*")):
        shutil.rmtree(row)
    return clone


def reproduce(folder, *flags, code=0):
    call = [sys.executable, "results/reproduce.py", *flags]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_the_pages_are_current(clone):
    reproduce(clone, "--page")
    for page in PAGES:
        assert (clone / page).read_text() == (ROOT / page).read_text(), "run reproduce.py --page"


def test_every_table_and_figure_has_a_row_with_claim_and_verdict():
    figures = (1, 3, 4, 5, *range(8, 19))
    names = [f"Table {i}" for i in range(1, 6)] + [f"Fig. {i}" for i in figures]
    sections = re.split(r"(?m)^## ", (ROOT / PAGES[1]).read_text())[1:]
    assert [section.partition(":")[0] for section in sections][: len(names)] == names
    for section in sections:
        for said in ("Claim", "Verdict"):
            sentence = re.search(rf"\*\*{said}\.\*\* (.*)", section)[1]
            assert sentence.endswith(".") and "{" not in sentence


def test_what_the_pages_link_to_is_there():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
        local = [link for link in links if "://" not in link]
        assert local and all(((ROOT / page).parent / link).exists() for link in local)


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_what_a_command_reads_was_made_before(idle, scale):
    for rows in ("fig9", "fig18"), ("all",):
        done, made = reproduce(idle, *rows, "--scale", scale), []
        for command in re.findall(r"(?m)^\$ python (.*)", done.stdout):
            words = command.split()
            out = words[words.index("--out") + 1]
            paths = re.findall(r"runs/[^\s:]+", command.replace(out, ""))
            assert all(any(f"{path}/".startswith(f"{run}/") for run in made) for path in paths)
            made.append(out)
        assert len(made) == len({*made}) > 1  # each once


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_command_is_one_that_its_script_takes(script):
    """Those of both pages, and of its --help."""
    module = importlib.import_module(f"run_{script}")
    text = "\n".join([*((ROOT / page).read_text() for page in PAGES), module.__doc__])
    found = re.findall(rf"python run_{script}\.py ((?:\\\n|[^\n`#|])*)", text)
    for flags in found:
        module.parse_args(flags.replace("\\\n", " ").split())
    assert len(found) > 2


def test_flags_that_run_nothing_take_no_rows_and_those_that_copy_need_some(idle):
    for flags in "fig8 --page", "fig8 --redraw", "--collect runs", "fig3 fig4 --collect runs":
        assert "rows" in reproduce(idle, *flags.split(), code=2).stderr


def test_probes_that_have_no_config_are_taken_over(clone, tmp_path):
    """And a folder without tables replaces nothing."""
    (tmp_path / "empty" / "probes-0").mkdir(parents=True)
    reproduce(clone, "table2", "--collect", tmp_path / "empty", code=1)
    found = shutil.copytree(clone / "results/table2/small", tmp_path / "found")
    (found / "probes-0/config.json").unlink()
    reproduce(clone, "table2", "--collect", "results/table2/small", code=2)  # its own source
    reproduce(clone, "table2", "--collect", found)
    assert len([*clone.glob("results/table2/small/probes-*/*.csv")]) == 4


def test_a_row_runs_resumes_and_can_be_taken_over(clone):
    row = ("fig10", "--scale", "toy", "--device", "cpu")
    reproduce(clone, *row)
    logs = sorted(clone.glob("results/fig10/toy/sweep/outdim16-seed*/log.csv"))
    assert len(logs) == 2 and all((log.parent / "config.json").exists() for log in logs)
    assert (clone / "results/fig10/toy/sweep/sweep.png").exists()
    rows = [list(csv.DictReader(log.read_text().splitlines())) for log in logs]
    last = [float(row[-1]["student_linear"]) for row in rows]
    mean, std = statistics.mean(last), statistics.stdev(last)
    page = (clone / PAGES[1]).read_text()
    assert f"| 16 outputs |  | {mean:.1f} ± {std:{'.1f' if std >= 1 else '.2f'}} | " in page
    before = {log: log.read_text() for log in logs}
    reproduce(clone, *row)  # without --resume the scripts would refuse
    assert {log: log.read_text() for log in logs} == before
    shutil.rmtree(clone / "results/fig10/toy")
    reproduce(clone, *row, "--collect", "runs/reproduce/fig10-toy")
    assert {log: log.read_text() for log in logs} == before
    assert (clone / PAGES[1]).read_text() == page
    # runs that stopped at different epochs are compared at the last that all have
    later = rows[0][-1] | {"epoch": "2", "student_linear": "0"}
    logs[0].write_text(before[logs[0]] + ",".join(later.values()) + "\n")
    reproduce(clone, "--page")
    assert (clone / PAGES[1]).read_text() == page
    logs[0].write_text("\n".join(before[logs[0]].splitlines()[:2]))  # one is only begun
    reproduce(clone, "--page")
    assert f"| 16 outputs |  | {last[1]:.1f} |" in (clone / PAGES[1]).read_text()
