"""SIGINT and SIGTERM: the first asks the loop to stop, the second ends the process."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption", "ignore_in_worker"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While entered, holds the signal that asked to stop, None until one comes.

    A second signal raises SystemExit with 130 or 143 wherever the process is: saves clean up behind themselves.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number


def ignore_in_worker(_worker: int) -> None:
    """For a loader's processes: a terminal signals them too, and the step that needs them is to be finished."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
