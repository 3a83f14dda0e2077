"""Every error of the library.

::

    CheckpointError
    ├── CheckpointNotFoundError   (FileNotFoundError)  nothing there under that name or step
    ├── CheckpointExistsError     (FileExistsError)    the step or target is taken; nothing was overwritten
    ├── StaleStepError            (ValueError)         a later step exists already
    ├── CorruptCheckpointError                         proven damage: file, record and reason
    ├── UnsafeCheckpointError                          asks for more than plain data and tensors
    ├── PatternError              (ValueError)         a naming template that can't be used
    ├── MissingMetricError        (LookupError)        a rule or question needs a metric that no checkpoint has
    ├── LeaseHeldError            (TimeoutError)       another writer holds the run
    ├── SaveFailedError           (OSError)            a save that published nothing
    ├── StorageError              (OSError)            the storage could not be read, listed or changed
    └── ExportError                                    an export that would not load where it is meant to

Each one says what was found, where, and what to do, and survives pickling.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "ExportError",
    "LeaseHeldError",
    "MissingMetricError",
    "PatternError",
    "SaveFailedError",
    "StaleStepError",
    "StorageError",
    "UnsafeCheckpointError",
]


class CheckpointError(Exception):
    """The root of all errors raised on purpose by this library."""

    # OSError swallows and reorders its arguments; rebuilding from the instance's dict keeps pickles exact.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


def _rebuild(cls: type[CheckpointError], args: tuple[Any, ...], state: dict[str, Any]) -> CheckpointError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """The checkpoint or export target exists already and was left as it is."""


class StaleStepError(CheckpointError, ValueError):
    """A save below a step that the run has already reached."""


class CorruptCheckpointError(CheckpointError):
    """Proven damage in a checkpoint.

    Args:
        name: The file.
        record: The zip record, with the tensor that it holds where known; "" for the file as a whole.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, record: str = "", reason: str = "") -> None:
        where = f"{name}: {record}" if record else name
        super().__init__(f"{where}: {reason}")
        self.name = name
        self.record = record
        self.reason = reason


class UnsafeCheckpointError(CheckpointError):
    """A state or file that holds more than plain data and tensors, or describes them in an unsafe way."""


class PatternError(CheckpointError, ValueError):
    """A naming template, or a number put into one, that can't be used."""


class MissingMetricError(CheckpointError, LookupError):
    """A retention rule, or who asks for the best, needs a metric that no checkpoint has."""


class LeaseHeldError(CheckpointError, TimeoutError):
    """Another process is writing to this run."""


class SaveFailedError(CheckpointError, OSError):
    """A save that failed before anything was published; older checkpoints are as they were.

    Attributes:
        needed: Bytes of the file to be written, or None where unknown.
        free: Bytes free on the file system at the time, or None where unknown.
    """

    def __init__(self, message: str, *, needed: int | None = None, free: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free


class StorageError(CheckpointError, OSError):
    """The storage could not be read, listed or changed; says nothing about the checkpoints in it."""


class ExportError(CheckpointError):
    """An export that was refused.

    Attributes:
        differences: One line for each difference from the model that was expected.
    """

    def __init__(self, message: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences
