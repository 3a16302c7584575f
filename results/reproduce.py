"""Regenerate the paper's tables and figures, one row of claims.ini at a time.

    python results/reproduce.py                                       # list rows and costs
    python results/reproduce.py fig10 --scale small --data-dir data   # run or continue a row
    python results/reproduce.py all --scale paper --device cuda       # every row in turn
    python results/reproduce.py fig9 --collect DIR                    # copy what DIR holds of it
    python results/reproduce.py --page                                # write the pages anew
    python results/reproduce.py --redraw                              # draw the pictures anew

A row's commands are the scripts' own command lines. They write into runs/reproduce/ROW-SCALE/;
their CSVs and config.json are then copied into results/ROW/SCALE/, from which the pictures are
drawn and results/README.md and the table in README.md are written. A command that was stopped
continues when its row is asked for again.
"""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from claims import RESULTS, ROOT, ROWS, SCALES, commands, config, lines_of, pictures, spread, text

VGG11 = 3.5  # hours on two cores with bf16 for one run of the paper's protocol: the unit V
# Hours on a GPU for one on two cores, at most: each of Fig. 1's six runs and of Table 1's four
# small ones took so long on an H200 while all ten shared it.
GPU = {"paper": 0.18 / VGG11, "small": 0.22 / 1.7}
MARKS = "<!-- results/reproduce.py writes this -->", "<!-- and ends here -->"

# ---------------------------------------------------------------------------------------- running


def in_order(name, scale):
    """The row ``name`` after those whose runs its commands read."""
    read = {*re.findall(r"\{(\w+)\}", text(name, f"run.{scale}"))} & {*ROWS} - {name}
    before = [row for other in sorted(read) for row in in_order(other, scale)]
    return list(dict.fromkeys([*before, name]))


def hours(name, scale):
    amount, unit = text(name, f"cost.{scale}").split()
    return float(amount) * (VGG11 if unit == "V" else 1)


def run(name, args):
    """Run a row's commands in turn; one that fails ends everything with its exit code."""
    data = shlex.quote(os.path.relpath(args.data_dir, ROOT))  # the commands run there
    for command in commands(name, args.scale, data):
        words = shlex.split(command)
        words.append("--overwrite" if words[0] == "run_probe.py" else "--resume")
        words += ["--device", args.device] if args.device else []
        (ROOT / words[words.index("--out") + 1]).parent.mkdir(parents=True, exist_ok=True)
        print(f"\n$ python {shlex.join(words)}", flush=True)
        with subprocess.Popen([sys.executable, *words], cwd=ROOT) as process:
            signal.signal(signal.SIGTERM, lambda *_, to=process: sys.exit(to.terminate() or 143))
            try:
                code = process.wait()
            except KeyboardInterrupt:  # the script was told too; it saves before it ends
                code = process.wait() or 130
        if code:
            sys.exit(code if code > 0 else 128 - code)


def collect(name, scale, folder):
    """Copy CSVs and config.json of a row's runs into results/. Returns how many runs."""
    runs = re.findall(r"--out runs/reproduce/[^\s/]+/([^\s/]+)", " ".join(commands(name, scale)))
    found = {part: folder / part for part in runs if [*(folder / part).rglob("*.csv")]}
    for part, source in found.items():
        target = RESULTS / name / scale / part
        shutil.rmtree(target, ignore_errors=True)
        for path in source.rglob("*.*"):
            inside = path.relative_to(source)
            detail = {"chains", "lines"} & set(inside.parts)
            if path.name == "config.json" or (path.suffix == ".csv" and not detail):
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / inside)
    return len(found)


# ---------------------------------------------------------------------------------------- writing


def filled(template, table):
    """``template`` with each {label}, {label|best} and {label|paper} looked up."""

    def look_up(match):
        pattern, _, which = match[1].partition("|")
        for label, paper, ours in table:
            if fnmatchcase(ours[0].label if ours else label, pattern.replace("[", "[[]")):
                mine, best = (str(ours[0]), ours[0].best) if ours else ("", "")
                if found := {"paper": paper, "best": best}.get(which, mine):
                    return found
        return "not run"

    return re.sub(r"\{([^{}]+)\}", look_up, template)


def verdict(name, table):
    there = [found.runs[0].parent.name for _, _, ours in table for found in ours]
    best = next((scale for scale in SCALES if scale in there), None)
    if best is None:
        return "Not run yet."
    found = text(name, f"verdict.{best}")
    return filled(found, table) if found else f"Nobody has judged the results at scale {best} yet."


def short(name, table):
    """A verdict's first words, up to a colon, a comma or the end of the sentence."""
    first = re.split(r"[:;,] |\.(?= \D|$)", verdict(name, table))[0]
    return first[0].lower() + first[1:]


def origin(run):
    link = "[{0}]({0})".format(run.relative_to(RESULTS).as_posix())
    if "command" in (found := config(run)):
        configs = [json.loads(path.read_text()) for path in sorted(run.rglob("config.json"))]
        # a sweep's own config.json is of one session, in which some of its runs may have been made
        made = [one for one in configs if "flags that vary" not in one.get("identity", {})]
        made += [session for one in made for session in one.get("earlier", [])]
        commits = {re.sub("(?<=^.{7})[0-9a-f]*", "", one["commit"] or "unknown") for one in made}
        devices = " / ".join(sorted({one["device"] for one in made if "device" in one}))
        return f"{link}: `{found['command']}`, commit {', '.join(sorted(commits))}; {devices}"
    return f"{link}: made by the command below"


def standard_errors(numbers):
    """The largest sqrt(p (1 - p) / N), in points, for each number N of test images."""
    errors = {}
    for found in numbers:
        if n := found.test_images:
            p = min(found.mean / 100, 1)
            errors[n] = max(errors.get(n, 0), 100 * math.sqrt(p * (1 - p) / n))
    return ", ".join(f"{error:.1f} points (N = {n:,})" for n, error in sorted(errors.items()))


def section(name):
    """A row's part of results/README.md."""
    title, table = text(name, "title"), lines_of(name)
    numbers = [found for _, _, ours in table for found in ours]
    said = [f'<a id="{name}"></a>\n\n## {title}', f"**Claim.** {text(name, 'claim')}"]
    for paths in zip(*(pictures(name, scale) for scale in SCALES), strict=True):
        there = [path.relative_to(RESULTS).as_posix() for path in paths if path.exists()]
        said += [f"![{title}]({path})" for path in there[:1]]
    cells = ["| | paper | ours, final | ours, best on test | n | final epoch | run |"]
    cells.append("|---|---:|---:|---:|---:|---:|---|")
    for label, paper, ours in table:
        cells += [] if ours else [f"| {label} | {paper} | not run | | | | |"]
        for found in ours:
            mine = f"{spread(found.mean, found.std)} | {found.best}"
            n = found.n if found.n > 1 else "**1**"
            where = f"{found.epoch} | {found.runs[0].parent.name}/{found.runs[0].name}"
            cells.append(f"| {found.label} | {paper} | {mine} | {n} | {where} |")
    said.append("\n".join(cells) if table else "")
    if errors := standard_errors(numbers):
        said.append(f"The standard error of one accuracy is at most {errors}.")
    said.append(text(name, "note"))
    said.append(f"**Verdict.** {verdict(name, table)}")
    runs = dict.fromkeys(run for found in numbers for run in found.runs)
    said.append("\n".join(["**Runs.**", "", *(f"* {origin(run)}" for run in runs)]) if runs else "")
    here = not commands(name, "small") or (RESULTS / name / "small").exists()
    note = "" if here else " These runs are not here yet."
    said.append(f"**At the small scale.** {text(name, 'small')}{note}")
    for scale in ("small", "paper"):
        if lines := commands(name, scale):
            time = hours(name, scale)
            gpu = max(time * GPU[scale], 0.01)
            call = f"python results/reproduce.py {name} --scale {scale} --data-dir data"
            cost = f"{time:,.{time < 10:d}f} h on two cores"
            cost += f", at most {gpu:,.{2 * (gpu < 1)}f} h on a GPU"
            said.append(f"Scale `{scale}`, {cost} (estimate):\n\n    {call}")
            listed = "\n".join(f"python {line}" for line in lines)
            said.append(f"<details><summary>its runs</summary>\n\n```\n{listed}\n```\n\n</details>")
    return "\n\n".join(filter(None, said))


def headlines():
    """The table of README.md: the rows that have a headline."""
    cells = ["| claim | paper | ours | verdict |", "|---|---|---|---|"]
    for name in ROWS:
        if text(name, "headline.ours"):
            table = lines_of(name)
            title = text(name, "title").partition(":")[0]
            claim = f"[{title}](results/README.md#{name}): {text(name, 'headline.claim')}"
            paper, ours = (
                filled(text(name, f"headline.{whose}"), table) for whose in ("paper", "ours")
            )
            said = short(name, table)
            if "not run" in ours:
                ours, said = "", "not run yet"
            cells.append(f"| {claim} | {paper} | {ours} | {said} |")
    return "\n".join(cells)


def index():
    """A line for each row: where it stands on the page, and how it went."""
    lines = []
    for name in ROWS:
        place, _, title = text(name, "title").partition(": ")
        table = lines_of(name)
        said = short(name, table)
        if {found.n for _, _, ours in table for found in ours} == {1}:
            said += " (one run each)"
        lines.append(f"* [{place}](#{name}){title and f', {title}'}: {said}")
    return "\n".join(lines)


def write_pages():
    """Write what lies between the two marks in README.md and in results/README.md."""
    pages = {
        ROOT / "README.md": headlines(),
        RESULTS / "README.md": "\n\n".join([index(), *map(section, ROWS)]),
    }
    for path, written in pages.items():
        page = path.read_text(encoding="utf-8")
        before, after = page.partition(MARKS[0])[0], page.partition(MARKS[1])[2]
        path.write_text(f"{before}{MARKS[0]}\n{written}\n{MARKS[1]}{after}", encoding="utf-8")


# ---------------------------------------------------------------------------------------- drawing


def redraw(names):
    """Draw the pictures of these rows from the CSVs and config.json beside them."""
    sys.path.insert(0, str(ROOT))
    from rtd import plots
    from rtd.harness import console, files, run, sweeps
    from run_distill import title
    from run_landscape import panel

    plots.KINDS["longer student"] = plots.GREEN
    listed = {path: (name, s) for name in names for s in SCALES for path in pictures(name, s)}
    for path, (name, scale) in listed.items():
        folder = path.parent
        if not any(folder.rglob("*.csv")):
            continue
        flags = config(folder)["flags"]
        if path.stem in ("imp", "lmc"):
            tables, rows = sorted(folder.rglob(f"{path.stem}.csv")), []  # of several runs
            for table in tables:
                of = ":longer student" if "-longer" in f"{table}" else ":student"
                read = files.read_csv(table)
                rows += [r | {"init": re.sub(":student$", of, r["init"])} for r in read]
            encoder = re.search(r"resnet\d+", " ".join(commands(name, scale)))[0]
            seeds = sorted({str(config(table.parent)["flags"]["seed"]) for table in tables})
            word = "seeds" if len(seeds) > 1 else "seed"
            drawn = [rows, f"{encoder} on {flags['dataset']}, {word} {', '.join(seeds)}"]
        elif "plane" in flags:
            drawn = [[panel(table.parent) for table in sorted(folder.rglob("landscape.csv"))]]
        else:
            values = {key: flags[key] for key in sweeps.SWEPT if isinstance(flags[key], list)}
            varied = [key for key in values if len(values[key]) > 1 and key != "seed"]
            groups = {setting: [] for setting in itertools.product(*(values[k] for k in varied))}
            for log in sorted(folder.rglob("log.csv")):
                setting = tuple(config(log.parent)["flags"][key] for key in varied)
                groups.setdefault(setting, []).append(files.read_csv(log))
            about = argparse.Namespace(**flags | {key: values[key][0] for key in values})
            groups = {setting: logs for setting, logs in groups.items() if logs}
            drawn = [varied, groups, title(about, varied)] if varied else [groups[()], title(about)]
        run.draw(path, console.say, getattr(plots, path.stem, plots.landscapes), *drawn)


def list_rows():
    for name in ROWS:
        scales = [scale for scale in ("small", "paper") if commands(name, scale)]
        costs = ", ".join(f"{scale} {hours(name, scale):,.1f} h" for scale in scales)
        there = [scale for scale in SCALES if (RESULTS / name / scale).is_dir()]
        print(f"{name:<7} {text(name, 'title')}")
        print(f"{'':<7} {costs or 'reads the runs of other rows'}; here: {', '.join(there) or '-'}")
    less = " and ".join(f"1/{1 / GPU[scale]:.0f} ({scale})" for scale in ("small", "paper"))
    print(f"Hours are for two cores with bf16; a GPU takes at most {less} of them (estimate).")


def parse_args():
    format_ = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=format_)
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="rows to run, or all; without any they are listed")
    add("--scale", choices=SCALES, default="small", help="size of the runs (default: small)")
    add("--data-dir", default="data", help="folder of the data sets (default: data)")
    add("--device", help="device of every command; by default each takes a GPU where there is one")
    add("--collect", type=Path, metavar="DIR", help="copy a row's runs from DIR and run nothing")
    add("--page", action="store_true", help="write the two pages anew and run nothing")
    add("--redraw", action="store_true", help="draw the pictures of results/ anew and run nothing")
    args = parser.parse_args()
    if unknown := set(args.rows) - {*ROWS, "all"}:
        parser.error(f"{min(unknown)} is no row; the rows are {', '.join(ROWS)}, or all")
    if args.collect and RESULTS in args.collect.resolve().parents:
        parser.error(f"--collect {args.collect} is where it copies to; give the folder of the runs")
    if args.rows and not args.collect and (args.page or args.redraw):
        parser.error("--page and --redraw run nothing; leave out the rows")
    if args.collect and (len(args.rows) != 1 or "all" in args.rows):
        parser.error("--collect: name one of the rows, the one whose runs the folder holds")
    args.rows = ROWS if "all" in args.rows else args.rows
    return args


def main(args):
    rows = args.rows
    if not args.collect:  # each once, after those whose runs it reads
        rows = dict.fromkeys(row for name in rows for row in in_order(name, args.scale))
    for row in rows:
        if not args.collect:
            run(row, args)
        folder = args.collect or ROOT / f"runs/reproduce/{row}-{args.scale}"
        count = collect(row, args.scale, folder)
        if not count and args.collect:
            sys.exit(f"--collect {folder}: it holds no run of {row} at scale {args.scale}")
        said = f"{count} run folders copied" if commands(row, args.scale) else "no runs of its own"
        print(f"results/{row}/{args.scale}: {said}")
        redraw([row])
    if args.redraw:
        redraw(ROWS)
    if args.rows or args.page:
        write_pages()
    elif not args.redraw:
        list_rows()


if __name__ == "__main__":
    main(parse_args())
