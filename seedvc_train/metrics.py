"""``metrics.jsonl``: one line for each logged step of a run, and no step twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from types import TracebackType
from typing import Any

from seedvc_ckpt.storage import Storage, open_storage, read_file

__all__ = ["MetricsLog", "working_folder"]

_log = logging.getLogger(__name__)

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to the log of a run, after cutting it back to the step that the run goes on from.

    Of a run on a server, which can't append, the log is kept in a working folder here and sent whole by `publish`.

    Args:
        storage: The run's folder.
        step: The last step to keep.
    """

    def __init__(self, storage: Storage, step: int) -> None:
        self._remote = storage if "://" in storage.location else None
        folder = working_folder(storage) if self._remote else storage.location
        self.path = os.path.join(folder, NAME)
        if self._remote:
            os.makedirs(folder, exist_ok=True)
            _fetch(self._remote, self.path)
        if os.path.exists(self.path):
            _cut(folder, self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._sending: threading.Thread | None = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._sending is not None:
            self._sending.join()
        self._send()

    def write(self, **values: Any) -> None:
        """Add a line, which a killed process leaves whole or not at all in all but the rarest cases."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def publish(self) -> None:
        """Begin to send the log as it is to the run's server; nothing to do for a run on a disk."""
        if self._remote is not None and not (self._sending and self._sending.is_alive()):
            self._sending = threading.Thread(target=self._send, name="seedvc-train log", daemon=True)
            self._sending.start()

    def _send(self) -> None:
        if self._remote is None:
            return
        with open(self.path, "rb") as file:
            content = file.read()
        try:
            self._remote.publish(NAME, len(content), [memoryview(content)], overwrite=True)
        except OSError as error:  # checkpoints matter more, and the next one tries again
            _log.warning("%s was not sent and is kept in %s: %s", NAME, self.path, error)


def working_folder(storage: Storage) -> str:
    """Where this machine keeps what belongs to a run on a server."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(storage.location.encode()).hexdigest()[:16]
    return os.path.join(cache, "seedvc-train", digest)


def _fetch(storage: Storage, path: str) -> None:
    """Take the run's log from its server, in place of what an earlier try left here."""
    content = read_file(storage, NAME) if storage.stat(NAME) is not None else b""
    with open(path, "wb") as file:
        file.write(content)


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
