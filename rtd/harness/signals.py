"""Ctrl-C and SIGTERM, a cluster's warning before it kills, stop a run where its state is whole."""

import contextlib
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal came; like KeyboardInterrupt, not for ``except Exception`` to swallow."""


@contextlib.contextmanager
def _handled(handler):
    """Within the block ``handler`` answers to ``SIGNALS``, unless they are ignored already."""
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def raising(received):
    """Within the block a signal is noted in the list ``received`` and raises ``Stopped``."""

    def handler(number, _):
        received.append(number)
        raise Stopped

    return _handled(handler)


@contextlib.contextmanager
def deferred():
    """While the block, or a function that this decorates, has state half changed, signals wait."""
    waiting = []
    try:
        with _handled(lambda number, _: waiting.append(number)):
            yield
    finally:
        for number in waiting:
            signal.raise_signal(number)
