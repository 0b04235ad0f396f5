"""Errors that a user meets. Each says what came, what is allowed, where, and what to do.

`launch/train.py` and the other scripts print the message in one line and leave with `exit_code`:
2 for what the user typed, 1 for everything else. `assert` is kept for our own mistakes.
"""


class UnitdistError(Exception):
    """Base of every error that unitdist raises on purpose."""

    exit_code = 1
    speaker: int | None = None
    """The rank that prints the message; None: the rank that raised it."""


class ConfigError(UnitdistError):
    """A key, value, path or combination that the user typed cannot be used."""

    exit_code = 2


class DataError(UnitdistError):
    """The data set, or one of its files, is not what it has to be."""


class CheckpointError(UnitdistError):
    """A checkpoint is damaged, unsafe to load, or belongs to something else."""


class TrainingError(UnitdistError):
    """The training cannot go on (non-finite loss, ranks that disagree, ...)."""
