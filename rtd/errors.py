"""The two ways in which a run ends early with one sentence instead of a traceback."""


class InputError(ValueError):
    """A flag or file is wrong: the message names it and says what would be right."""


class Diverged(RuntimeError):
    """A loss is no longer finite: the message says where in the run, and what to try."""
