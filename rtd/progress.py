"""A progress bar where tqdm is installed and someone is watching; silence otherwise."""

import sys


def progress(iterable, description, unit, total=None):
    """``iterable`` with a bar on stderr (tqdm's, which has ``set_postfix``), or as it is.

    No bar if stderr is not a terminal or tqdm (an optional extra) is missing.
    """
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return iterable
        return tqdm(iterable, description, unit=unit, total=total, leave=False, dynamic_ncols=True)
    return iterable
