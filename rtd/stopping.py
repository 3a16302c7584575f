"""Ctrl-C, and SIGTERM, a cluster's warning before it kills: training stops after the step it is in, with the step's result saved.

Elsewhere (while probing, between epochs) and in training on several processes they stop a run at once, or as soon as the
checkpoint that is being written stands: what it holds stands. A second signal, while one waits, is obeyed at once.
"""

import contextlib
import signal

from rtd import distributed

_waiting, _asked = False, None


class Stopped(BaseException):
    """A signal came; like KeyboardInterrupt, not for ``except Exception`` to swallow.

    number: the signal's. between_steps: it was raised by ``steps``, where nothing is half done.
    """

    def __init__(self, number, between_steps=False):
        super().__init__()
        self.number, self.between_steps = number, between_steps


@contextlib.contextmanager
def on_signals():
    """Within the block, Ctrl-C and SIGTERM stop as this module says, by raising ``Stopped``; where ignored, they stay so."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number, _):
    global _asked
    if not _waiting or _asked:
        raise Stopped(number)
    _asked = number


def steps(batches):
    """``batches``, one by one; a signal waits for the step that works on one of them, and then ends the loop."""
    global _waiting, _asked
    _waiting, _asked = distributed.world_size() == 1, None  # several processes would stop after different steps
    try:
        for batch in batches:
            yield batch
            if _asked:
                raise Stopped(_asked, between_steps=True)
    finally:
        _waiting = False


@contextlib.contextmanager
def finishing():
    """A signal waits for the end of the block, in which a file is written, say."""
    global _waiting, _asked
    _waiting, _asked = True, None
    try:
        yield
    finally:
        _waiting = False
    if _asked:
        raise Stopped(_asked)


@contextlib.contextmanager
def saving(save):
    """Call ``save()`` if a signal ends the block between two steps of ``steps``."""
    try:
        yield
    except Stopped as stop:
        if stop.between_steps:
            save()
        raise
