"""Printing that never stops a run: a reader that went away, a closed terminal, an odd character."""

import contextlib
import os
import sys
import time


def prepare():
    """Make standard streams that are closed, or cannot show a character, harmless."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # else a checkpoint may become "stderr"
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(*words, to="stdout"):
    """Print at once, if anybody reads."""
    stream = getattr(sys, to)
    try:
        print(*words, file=stream, flush=True)
    except OSError:  # the reader went away, as after | head -1; training goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def duration(seconds):
    """Seconds as a person says them: 45 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def progress(items, description, unit="steps"):
    """``items`` (a list) with tqdm's bar if stderr is a terminal, else with a line a minute.

    Of torchrun's processes, which work side by side, only the first says anything.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        yield from items
        return
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):  # tqdm is an optional extra
            from tqdm import tqdm

            yield from tqdm(items, description, unit=unit, leave=False, dynamic_ncols=True)
            return
    began = said = time.monotonic()
    for i, item in enumerate(items):
        now = time.monotonic()
        if now - said > 60:
            left = duration((now - began) * (len(items) - i) / i)
            say(f"  {description}: {i} of {len(items)} {unit}, {left} left", to="stderr")
            said = now
        yield item
