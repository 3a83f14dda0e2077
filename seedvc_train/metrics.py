"""``metrics.jsonl``: one line for each logged step of a run, and no step twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from types import TracebackType
from typing import Any

from seedvc_ckpt import CheckpointError, CheckpointStore
from seedvc_ckpt.storage import Storage, open_storage, read_file

__all__ = ["MetricsLog", "working_folder"]

_log = logging.getLogger(__name__)

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to the log of a run, after cutting it back to the step that the run goes on from.

    Of a run on a server, which can't append, the log is kept in a working folder here and sent whole by `publish`.

    Args:
        store: The run, whose lease this process has.
        step: The last step to keep.
    """

    def __init__(self, store: CheckpointStore, step: int) -> None:
        self._store = store
        self._remote = "://" in store.location
        folder = working_folder(store.storage) if self._remote else store.location
        self.path = os.path.join(folder, NAME)
        if self._remote:
            os.makedirs(folder, exist_ok=True)
            _fetch(store.storage, self.path)
        if os.path.exists(self.path):
            _cut(folder, self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._wanted, self._ended = threading.Event(), threading.Event()
        self._sender = threading.Thread(target=self._send_each, name="seedvc-train log", daemon=True)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._ended.set()
        if self._sender.ident is not None:
            self._wanted.set()
            self._sender.join()
        self._send()

    def write(self, **values: Any) -> None:
        """Add a line, which a killed process leaves whole or not at all in all but the rarest cases."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def publish(self) -> None:
        """Begin to send the log as it is to the run's server; nothing to do for a run on a disk."""
        if not self._remote:
            return
        self._wanted.set()
        if self._sender.ident is None:
            self._sender.start()

    def _send_each(self) -> None:
        while self._wanted.wait() and not self._ended.is_set():
            self._wanted.clear()
            self._send()

    def _send(self) -> None:
        if not self._remote:
            return
        try:
            content = _read(self.path)
            self._store.storage.publish(
                NAME, len(content), [memoryview(content)], overwrite=True, before=self._store.acquire
            )
        except (CheckpointError, OSError) as error:  # checkpoints matter more, and the next one tries again
            _log.warning("%s was not sent and is kept in %s: %s", NAME, self.path, error)


def working_folder(storage: Storage) -> str:
    """Where this machine keeps what belongs to a run on a server."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(storage.location.encode()).hexdigest()[:16]
    return os.path.join(cache, "seedvc-train", digest)


def _fetch(storage: Storage, path: str) -> None:
    """Take the run's log from its server, with the lines that a trainer here was killed before it could send."""
    there = read_file(storage, NAME) if storage.stat(NAME) is not None else b""
    here = _read(path) if os.path.exists(path) else b""
    lines = {_step_of(line): line for line in there.splitlines(keepends=True)}
    if there.partition(b"\n")[0] == here.partition(b"\n")[0]:  # with its times, no other run begins so
        lines = {**{_step_of(line): line for line in here.splitlines(keepends=True)}, **lines}
    with open(path, "wb") as file:
        file.writelines(lines[step] for step in sorted(lines))


def _cut(folder: str, path: str, step: int) -> None:
    """Drop the lines after `step`, and what a killed process left of a line."""
    content = _read(path)
    kept = b"".join(line for line in content.splitlines(keepends=True) if _step_of(line) <= step)
    if kept != content:
        open_storage(folder).publish(NAME, len(kept), [memoryview(kept)], overwrite=True)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _step_of(line: bytes) -> float:
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
    return found if line.endswith(b"\n") and isinstance(found, int) else float("inf")
