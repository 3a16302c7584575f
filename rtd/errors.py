"""The two ways in which a run ends early with one sentence instead of a traceback."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names the flag or file and says what would be
    right.
    """


class Diverged(RuntimeError):
    """A loss is no longer finite: the message says where in the run, and what to try."""
