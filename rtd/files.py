"""Writing files so that a crash, a full disk or a kill never replaces a good file by half of one."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """A file object whose content stands at ``path`` after the block, all of it, or not at all.

    Written to a temporary file in the same folder, flushed to the disk, then renamed over ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write, as to a full disk, fails without saying where
        raise
