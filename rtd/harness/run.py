"""The folder of one run: refused if it holds another one, locked, continued exactly by --resume."""

import copy
import json
import os
import shutil
import sys
import time
from pathlib import Path

from rtd import plots
from rtd.errors import Diverged, InputError
from rtd.harness import console, files
from rtd.harness.checkpoint import path_of

try:
    import fcntl
except ImportError:  # on Windows nothing stops two processes from writing into one folder
    fcntl = None

RUNNING = ("out", "resume", "overwrite", "save_every", "no_plot", "plot_format", "data_dir")
RUNNING += ("download", "device")  # flags that may differ between a run and its --resume
PICTURES = [f".{kind}" for kind in plots.FORMATS]


def lock(path, flag):
    """A file that keeps ``path`` locked while it is open; InputError names who holds it already."""
    try:
        file = open(path, "a+")  # noqa: SIM115 (the lock lives as long as the file)
    except OSError as error:
        raise InputError(f"{flag} cannot be written: {error.strerror}") from error
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        pid = file.read().strip()  # nothing, if it has the lock for less than a moment
        holder = f"process {pid}" if pid else "another process"
        raise InputError(f"{flag} is in use by {holder}; wait for its end") from None
    except OSError:  # a file system that has no locks
        pass
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def check_output(args):
    """Refuse an --out, a file, that exists (without --overwrite) or has no folder."""
    if args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder; give a file")
    if args.out.exists() and not args.overwrite:
        raise InputError(f"--out {args.out} exists; --overwrite replaces a file")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent}")


def kind_of(identity):
    """Which script a run's identity is of, and whether of several runs."""
    count = "several runs" if "flags that vary" in identity else "one run"
    return f"{count} of {identity['the script']}"


class Run:
    """A run's folder, its lock, config.json, tables and state files, and how it is continued.

    products: glob patterns of the files that it may write besides config.json, which --overwrite
    deletes; NAME.* are pictures. may_change: flags besides ``RUNNING`` that may differ on --resume.
    images: {name: SHA-256} of the images that it reads. networks: what it reads as PATH:NETWORK;
    entries that name no file are ignored. Raises InputError for a folder that holds a run already
    (without --resume or --overwrite), was run with other flags, checkpoints or images, or is in
    use.
    """

    def __init__(self, args, device, world, products, may_change, images, networks=()):
        self.folder, self.args, self.device, self.world = args.out, args, device, world
        self.config = files.provenance(args, device)
        self.identity = {"the script": Path(sys.argv[0]).name}
        for name, value in self.config["flags"].items():
            if name not in (*RUNNING, *may_change):
                self.identity[f"--{name.replace('_', '-')}"] = value
        read = [spec for spec in networks if spec and Path(path_of(spec)).is_file()]
        self.identity |= images | {spec: files.sha256(path_of(spec)) for spec in read}
        self.config["identity"] = self.identity
        self.config["device"] += f", {world.size} processes" * (world.size > 1)
        self._saved, self._cost = time.monotonic(), 0.0  # when, and how many seconds it took
        self._changed = False  # whether config.json is to be written anew
        self._idle = False  # whether this session continues a run and has computed nothing yet
        world.in_main(lambda: self._open(products, may_change, map(path_of, read)))

    def _open(self, products, may_change, read):
        folder, args, config = self.folder, self.args, self.folder / "config.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {folder} cannot be a folder: {error.strerror}") from error
        inside = list(folder.glob("[!.]*"))
        # a folder of nothing but whole runs is that of a new sweep, which takes them up
        runs_only = all((path / "config.json").exists() for path in inside)
        if inside and not (args.resume or args.overwrite):
            way = "--resume continues its run, --overwrite replaces it"
            way = way if config.exists() or runs_only else "give an empty or a new one"
            raise InputError(f"--out {folder} is not empty; {way}")
        if config.exists():
            with files.reading(config, "of a run"):
                before = kind_of(files.read_json(config)["identity"])
            if before != kind_of(self.identity):  # whose other files would stay
                raise InputError(f"--out {folder} holds {before}; give another one")
        continued = args.resume and not runs_only
        if continued and not config.exists():
            raise InputError(f"--resume: {folder} has no config.json; give another --out")
        self._lock = lock(folder / ".lock", f"--out {folder}")
        if continued:
            before, flags = files.read_json(config), self.config["flags"]
            self._check(config, before)
            with files.reading(config, "of a run"):
                keys = "command", "commit", "device", "started"
                session = {key: before[key] for key in keys}
                self.config["earlier"] = [*before.get("earlier", []), session]
                self._idle = True
                self._changed = any(before["flags"].get(name) != flags[name] for name in may_change)
        old = []
        for pattern in products if args.overwrite else ():
            kinds = PICTURES if pattern.endswith(".*") else (".csv", ".json", ".pt")
            old += [p for p in folder.glob(pattern) if p.suffix in kinds and not p.is_dir()]
        foreign = [p for p in old if not (config.exists() or p.with_name(config.name).exists())]
        if foreign:
            raise InputError(f"--overwrite would delete {min(foreign)}, of no run; move it")
        if lost := {path.resolve() for path in old} & {Path(path).resolve() for path in read}:
            raise InputError(f"--overwrite would delete {min(lost)}, which this run reads; move it")
        # and what ``atomic_write`` leaves if it is killed
        for pattern in map(Path, (*products, "config.json")):
            old += folder.glob(str(pattern.with_name(f".{pattern.name}.*.tmp")))
        for path in old:
            path.unlink(missing_ok=True)
        if not continued:
            self._changed = True
            self.keep_config()
        self.say(f"run folder: {folder}")
        if shutil.disk_usage(folder).free < 2**30:
            self.say(f"note: less than 1 GB is free on the disk of {folder}")

    def keep_config(self):
        """Write config.json anew if need be: once something was done, no flag is refused."""
        if self._changed:  # in the main process alone, which opened the folder
            with files.atomic_write(self.folder / "config.json", "w") as file:
                file.write(json.dumps(self.config, indent=2) + "\n")
            self._changed = False

    def _check(self, path, contents, **unit):
        """Raise InputError unless ``contents``, of a file, belong to this run and ``unit``."""
        with files.reading(path, "of a run"):
            found, wanted = contents["identity"], self.identity | unit
            odd = [
                f"{name} was {found.get(name)!s:.60}, is {value!s:.60}"
                for name, value in wanted.items()
                if found.get(name) != value
            ]
        if odd:
            raise InputError(f"--resume: in {path}, {', '.join(odd[:3])}; give another --out")

    def say(self, *words):
        """Print, in the main process."""
        self.world.say(*words)

    def save(self, name, contents, kind="state"):
        """Write a state file of this run, with its identity; like all that writes, in main."""
        if self.world.is_main:
            began, path = time.monotonic(), self.folder / name
            path.parent.mkdir(exist_ok=True)
            contents = contents | {"identity": self.identity | {"unit": name}}
            files.save_state(path, kind, contents)
            self._saved = time.monotonic()
            self._cost = self._saved - began
            if self._idle:  # what the folder holds is now of this session too
                self._idle, self._changed = False, True
                self.keep_config()

    def save_is_due(self, done, last):
        """Whether to save after ``done`` of ``last`` epochs.

        By default, saving takes a tenth of the time at most.
        """
        if self.args.save_every and done < last:
            return done % self.args.save_every == 0
        return done == last or time.monotonic() - self._saved >= 10 * self._cost

    def load(self, name, table=None, kind="state"):
        """What ``save`` wrote; None where nothing was saved yet.

        table: a CSV file made from ``name``; where only the table exists, InputError is raised
        instead of overwriting its rows.
        """
        path = self.folder / name

        def read():
            if path.exists():
                state = files.load_state(path, kind, mmap=False)
                self._check(path, state, unit=name)
                return state
            if table and (self.folder / table).exists():
                way = f"move {self.folder / table} away to make it anew"
                raise InputError(f"--resume: {path} is missing; {way}")

        return self.world.in_main(read) or read()  # which all processes have to read

    def for_each(self, units, do, name="run", finish=lambda diverged: None):
        """do(unit, run) for independent ``units``, shared as ``World.units`` says.

        ``do`` gets a copy of this run whose ``world`` is the processes that work on the unit.
        finish(diverged) follows in the main process, with {position of a unit that diverged: its
        message}. Raises Diverged, in the end, if there are any.
        """
        run = copy.copy(self)
        mine, run.world = self.world.units(len(units))
        began, diverged = time.monotonic(), {}
        for done, i in enumerate(mine):
            spent = time.monotonic() - began
            left = console.duration(spent / max(1, done) * (len(mine) - done))
            if len(mine) > 1:
                run.say(f"{name} {done + 1} of {len(mine)}" + f", {left} left" * (spent > 60))
            try:
                do(units[i], run)
            except Diverged as error:
                run.say(error)
                diverged[i] = str(error)  # the error itself would hold on to the network
        diverged = self.world.gather(diverged)

        def end():
            finish(diverged)
            if diverged:
                reasons = "; ".join(diverged.values())
                raise Diverged(f"{len(diverged)} of {len(units)} {name}s diverged: {reasons}")

        self.world.in_main(end)

    def table(self, name, columns, rows):
        """Write ``rows`` as the CSV file ``name`` of this run."""
        if self.world.is_main:
            files.write_csv(self.folder / name, columns, rows)
            self.keep_config()

    def concatenate(self, name, columns, parts):
        """Write those of the tables ``parts`` that exist yet as one, ``name``; returns its rows."""
        paths = [self.folder / part for part in parts]
        rows = [row for p in paths if p.exists() for row in files.read_csv(p, columns)]
        self.table(name, columns, rows)
        return rows

    def draw(self, name, make, *arguments):
        """Draw the figure ``make(*arguments)`` as ``name`` in each --plot-format."""
        if self.world.is_main and not self.args.no_plot:
            for kind in self.args.plot_format:
                draw(self.folder / f"{name}.{kind}", self.world.say, make, *arguments)


def draw(path, say, make, *arguments):
    """Draw the figure ``make(*arguments)`` into a file; what fails there costs no result."""
    try:
        with files.atomic_write(path) as file:
            plots.draw(make, arguments, file, path.suffix[1:])
        say(f"picture: {path}")
    except Exception as error:  # matplotlib may fail in any way; all numbers are written already
        install = "if matplotlib is missing, pip install -e '.[full]'; then --resume draws it"
        say(f"{path.name} is not drawn ({files.one_line(error)}); {install}")
