"""``metrics.jsonl``: one line for each logged step of a run, and no step twice."""

from __future__ import annotations

import json
import os
from types import TracebackType
from typing import Any

from seedvc_ckpt.storage import open_storage

__all__ = ["MetricsLog"]

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to the log of a run, after cutting it back to the step that the run goes on from."""

    def __init__(self, folder: str, step: int) -> None:
        path = os.path.join(folder, NAME)
        if os.path.exists(path):
            _cut(folder, path, step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, **values: Any) -> None:
        """Add a line, which a killed process leaves whole or not at all in all but the rarest cases."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()


def _cut(folder: str, path: str, step: int) -> None:
    """Drop the lines after `step`, and what a killed process left of a line."""
    with open(path, "rb") as file:
        content = file.read()
    kept = b"".join(line for line in content.splitlines(keepends=True) if _step_of(line) <= step)
    if kept != content:
        open_storage(folder).publish(NAME, len(kept), [memoryview(kept)], overwrite=True)


def _step_of(line: bytes) -> float:
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
    return found if line.endswith(b"\n") and isinstance(found, int) else float("inf")
