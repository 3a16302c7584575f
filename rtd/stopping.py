"""SIGTERM is a cluster's warning before it kills: training stops after the step it is in, with the step's result saved.

Elsewhere (while probing, between epochs) and in training on several processes it stops at once: what the last checkpoint
holds stands. A second SIGTERM is obeyed at once everywhere.
"""

import contextlib

from rtd import distributed

_waiting, _asked = False, False


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt, not for ``except Exception`` to swallow.

    between_steps: it was raised by ``steps``, where nothing is half done.
    """

    def __init__(self, between_steps=False):
        super().__init__()
        self.between_steps = between_steps


def on_sigterm(*_):
    """The signal's handler."""
    global _asked
    if not _waiting or _asked:
        raise Terminated
    _asked = True


def steps(batches):
    """``batches``, one by one; SIGTERM waits for the step that works on one of them, and then ends the loop."""
    global _waiting, _asked
    _waiting, _asked = distributed.world_size() == 1, False  # several processes would stop after different steps
    try:
        for batch in batches:
            yield batch
            if _asked:
                raise Terminated(between_steps=True)
    finally:
        _waiting = False


@contextlib.contextmanager
def saving(save):
    """Call ``save()`` if SIGTERM ends the block between two steps of ``steps``."""
    try:
        yield
    except Terminated as stop:
        if stop.between_steps:
            save()
        raise
