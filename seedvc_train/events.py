"""``events.jsonl``: what happened to a run in order of time: starts, ends, and what became of its checkpoints."""

from __future__ import annotations

from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Literal

from seedvc_ckpt import CheckpointStore
from seedvc_train.runlog import Copy, RunLog, parsed

__all__ = ["NAME", "Event", "EventLog"]

NAME = "events.jsonl"

Event = Literal["started", "resumed", "saved", "pruned", "set_aside", "ended", "interrupted", "failed"]
"""What can happen. Beside ``time`` (UTC), ``event`` and, but for "failed", ``step`` a line has:

started, resumed: ``options``, ``versions``, ``machine``; resumed: ``name`` of the checkpoint and the step ``reached``
    before the interruption, as far as it was logged
saved: ``name``, ``epoch``, ``bytes``, ``seconds_stalled`` that training waited, ``seconds_until_durable`` from the call
    on, reading it back and pruning included
pruned: ``name``
set_aside: ``name``, ``reason``
interrupted: ``signal`` where there was one
failed: ``error``
"""


class EventLog:
    """Appends to the events of a run, and keeps all that are there. The file is made by the first event.

    Left by an exception, it notes that. Of a run on a server each event is sent soon after it is written.

    Args:
        store: The run, whose lease this process has when it writes.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._log: RunLog | None = None
        self._copies: list[Copy] = []

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is None:
            return
        if isinstance(error, Exception):
            self.write("failed", error=f"{type(error).__name__}: {error}")
        elif error is not None:
            self.write("interrupted")
        self._log.close()

    def write(self, event: Event, step: int | None = None, **values: Any) -> None:
        """Add an event of now."""
        if self._log is None:
            self._log = RunLog(self._store, NAME, _place)
        at = {} if step is None else {"step": step}
        time = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        line = {"time": time, "event": event, **at, **values}
        self._log.write(**line)
        self._log.publish()
        for copy in self._copies:
            copy(line)

    def copy_to(self, copy: Copy) -> None:
        """Give `copy` each event too from now on."""
        self._copies.append(copy)


def _place(line: bytes) -> tuple[str, bytes] | None:
    found = parsed(line)
    return (str(found["time"]), line) if "time" in found and "event" in found else None
