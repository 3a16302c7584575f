"""What claims.ini says and what the CSVs beside it hold: a row's commands, pictures and numbers.

reproduce.py runs the commands and writes the pages.
"""

import configparser
import csv
import itertools
import json
import re
import statistics
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
SCALES = ("paper", "small", "toy")  # the best evidence first; toy serves a test
TEST_IMAGES = dict(digits=450, cifar10=10000, cifar100=10000, stl10=8000, tinyimagenet=10000)
TEST_IMAGES |= dict(folder=2000)  # the part of CIFAR-100 that Tables 2 and 4 probe
ACCURACIES = ("linear", "knn", "accuracy", "error")

CLAIMS = configparser.ConfigParser(
    interpolation=configparser.ExtendedInterpolation(), delimiters="=", comment_prefixes="#"
)
CLAIMS.read(RESULTS / "claims.ini", encoding="utf-8")
ROWS = CLAIMS.sections()


def text(name, key):
    """A value of claims.ini as one line."""
    return " ".join(CLAIMS[name].get(key, "").split())


def repeated(value):
    """The lines of a value, each split at its semicolons, once for all values of its NAME=a b c."""
    for line in filter(None, value.splitlines()):
        parts = re.split(r"\s*;\s*", line)
        loops = [part.split("=") for part in parts if re.match("[A-Z]+=", part)]
        for values in itertools.product(*(words.split() for _, words in loops)):
            one = parts[: len(parts) - len(loops)]
            for (name, _), value in zip(loops, values, strict=True):
                lower = value.lower().replace("/", ".")
                one = [p.replace(f"{{{name}}}", value) for p in one]
                one = [p.replace(f"{{{name.lower()}}}", lower) for p in one]
            yield one


def commands(name, scale, data="data"):
    """A row's command lines, as they are typed in the repository's root."""
    folders = {row: f"runs/reproduce/{row}-{scale}" for row in ROWS}
    lines = repeated(CLAIMS[name].get(f"run.{scale}", ""))
    return [line.format(out=folders[name], data=data, **folders) for [line] in lines]


def pictures(name, scale):
    """The files of a row's pictures at a scale, there or not."""
    listed = text(name, "pictures").split()
    return [RESULTS / path.replace("/", f"/{scale}/", 1) for path in listed]


class Number(NamedTuple):
    """Mean and standard deviation (None for one value) of n values of the runs of one scale."""

    label: str
    runs: list[Path]
    mean: float
    std: float | None
    n: int
    best: str  # over the epochs of each run
    epoch: str
    test_images: int | None  # None: no accuracy

    def __str__(self):
        return spread(self.mean, self.std) + f" (n = {self.n})" * (self.n > 1)


def shown(value):
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.{1 if abs(value) >= 1 else 2}f}"


def spread(mean, std):
    if std is None:
        return shown(mean)
    small = std < 0.01 <= mean  # no place for exponents beside a mean without one
    return f"{shown(mean)} ± {f'{std:.2f}' if small else shown(std)}"


def mean_and_std(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def highest(path, places, column):
    """The row of a landscape next to a place, the highest on the way between two (a>b), or of all.

    places: x,y or names of networks, or of a column, the one in which the row is the highest.
    """
    rows, points = read_csv(path), read_csv(path.with_name("points.csv"))
    if places in rows[0]:
        return [max(rows, key=lambda row: float(row[places] or "-inf"))]
    named = {row["name"]: (row["x"], row["y"]) for row in points}
    ends = [named.get(place) or place.split(",") for place in places.split(">")]
    there = np.array([(row["x"], row["y"]) for row in rows], float)
    way = np.linspace(*np.array([ends[0], ends[-1]], float), 101)
    near = {np.linalg.norm(there - at, axis=1).argmin() for at in way}
    found = (rows[i] for i in near if rows[i][column])
    return sorted(found, key=lambda row: float(row[column]))[-1:]


def holds(row, condition):
    name, sign, wanted = re.fullmatch(r"(\w+)([=~])(.*)", condition).groups()
    value = row.get(name) or ""
    return value == wanted if sign == "=" else fnmatchcase(value, wanted)


def rows_of(path, where, column):
    """The rows of a CSV that hold the values wanted: of a run's log, all epochs after the start."""
    if where.startswith("@"):
        rows = highest(path, where[1:], column)
    else:
        conditions = where[1:-1].split(",") if where else []
        rows = [row for row in read_csv(path) if all(holds(row, c) for c in conditions)]
    rows = [row for row in rows if row.get(column)]
    return rows[1:] if len(rows) > 1 and "step" in rows[0] and rows[0]["epoch"] == "0" else rows


def number(label, sources, scale):
    """What stands for a line at a scale, as a Number, or None."""
    for source in re.split(r"\s*\|\s*", sources):
        parsed = re.fullmatch(r"(\w+)/(.+?\.csv)(\[.*\]|@.*|):(\w+)", source)
        name, pattern, where, column = parsed.groups()
        folder = RESULTS / name / scale
        tables = {path: rows_of(path, where, column) for path in sorted(folder.glob(pattern))}
        tables = {path: rows for path, rows in tables.items() if rows}
        if not tables:
            continue
        begun = {path: rows for path, rows in tables.items() if rows[-1].get("epoch") != "0"}
        tables = begun or tables  # a run without an epoch yet counts among its like alone
        runs = [*dict.fromkeys(folder / path.relative_to(folder).parts[0] for path in tables)]
        run, row = runs[0], next(iter(tables.values()))[-1]
        epoch, best = "", []
        if "step" in row:  # epochs of runs; stopped ones are compared at the last that all have
            last = min(int(rows[-1]["epoch"]) for rows in tables.values())
            if column.startswith("student"):
                best = [max(float(row[column]) for row in rows) for rows in tables.values()]
            epoch = "" if column.startswith(("teacher", "input")) else reached(last, run)
            ends = [[r for r in rows if int(r["epoch"]) <= last][-1] for rows in tables.values()]
        else:
            ends = list(itertools.chain(*tables.values()))
            best = [float(row[f"{column}_best"]) for row in ends if f"{column}_best" in row]
        final = [float(row[column]) for row in ends]
        return Number(
            label.replace("{kept}", shown(100 - 100 * float(row.get("sparsity") or 0))),
            runs,
            *mean_and_std(final),
            len(final),
            spread(*mean_and_std(best)) if best else "",
            epoch,
            test_images(run, row) if column.endswith(ACCURACIES) else None,
        )
    return None


def reached(last, run):
    """An epoch as text, with the number planned where a run is not done."""
    flags = config(run)["flags"]
    planned = 0 if flags.get("epochs_of") else flags.get("epochs", 0)
    return f"{last} of {planned}" if last < planned else str(last)


def config(run):
    path = min(run.rglob("config.json"), key=lambda path: (len(path.parts), path), default=None)
    return json.loads(path.read_text()) if path else {"flags": {}}


def test_images(run, row):
    if "probed_on" in row:
        return int(row.get("test_images") or TEST_IMAGES[row["probed_on"]])
    flags = config(run)["flags"]
    data = flags.get("probe_dataset") or flags["dataset"]
    data = data[0] if isinstance(data, list) else data  # a sweep's; all its test images are equal
    return flags["test_subset"] or TEST_IMAGES[data]


def lines_of(name):
    """[(label, what the paper prints or "", [our Numbers, the best evidence first])] of a row."""
    paper = {}
    for row in read_csv(RESULTS / "paper.csv"):
        for who in ("teacher", "student", "input"):
            paper[f"{row['source']}/{row['dataset']}/{row['model']}/{who}"] = row[who]
    table = []
    for label, printed, source in repeated(CLAIMS[name]["lines"]):
        ours = [found for scale in SCALES if (found := number(label, source, scale))]
        if ours or paper.get(printed):
            table.append((label, paper.get(printed, ""), ours))
    return table
