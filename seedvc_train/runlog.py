"""A run's logs: files of JSON lines that are appended to, whether the run lies on a disk or on a server."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from seedvc_ckpt import CheckpointError, CheckpointStore
from seedvc_ckpt.storage import Storage, open_storage, read_file
from seedvc_train.places import cache_folder

__all__ = ["Copy", "Place", "RunLog", "folder_here", "parsed", "working_folder"]

_log = logging.getLogger(__name__)

Place = Callable[[bytes], Any]
"""From a line to where it belongs: something that sorts and that no two lines share; None to drop it."""

Copy = Callable[[Mapping[str, Any]], None]
"""Given each line that is written from now on."""


class RunLog:
    """Appends to a log of a run, once the lines are gone that have no place in it.

    Of a run on a server, which can't append, the log is kept in a working folder here and sent whole by `publish`.

    Args:
        store: The run, whose lease this process has.
        name: The file's name in the run.
        place: Where a line belongs.

    Attributes:
        dropped: The lines that had no place any more; what a killed process left of a line is one of them.
    """

    def __init__(self, store: CheckpointStore, name: str, place: Place) -> None:
        self._store, self._name = store, name
        self._remote = "://" in store.location
        folder = folder_here(store)
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, name)
        if self._remote:
            _fetch(store.storage, name, self.path, place)
        self.dropped = _cut(folder, name, place) if os.path.exists(self.path) else []
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._copies: list[Copy] = []
        self._wanted, self._ended = threading.Event(), threading.Event()
        self._sender = threading.Thread(target=self._send_each, name=f"seedvc-train {name}", daemon=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the log, and send it."""
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
        for copy in self._copies:
            copy(values)

    def copy_to(self, copy: Copy) -> None:
        """Give `copy` each line too that is written from now on."""
        self._copies.append(copy)

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
                self._name, len(content), [memoryview(content)], overwrite=True, before=self._store.acquire
            )
        except (CheckpointError, OSError) as error:  # checkpoints matter more, and the next one tries again
            _log.warning("%s was not sent and is kept in %s: %s", self._name, self.path, error)


def folder_here(store: CheckpointStore) -> str:
    """The run's folder, or the working folder of a run on a server."""
    return working_folder(store.storage) if "://" in store.location else store.location


def working_folder(storage: Storage) -> str:
    """Where this machine keeps what belongs to a run on a server."""
    return os.path.join(cache_folder(), hashlib.sha256(storage.location.encode()).hexdigest()[:16])


def parsed(line: bytes) -> dict[str, Any]:
    """What a line says; empty for one that is torn or no JSON object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if line.endswith(b"\n") and isinstance(found, dict) else {}


def _fetch(storage: Storage, name: str, path: str, place: Place) -> None:
    """Take the run's log from its server, with the lines that a trainer here was killed before it could send."""
    there = read_file(storage, name) if storage.stat(name) is not None else b""
    here = _read(path) if os.path.exists(path) else b""
    lines = {place(line): line for line in there.splitlines(keepends=True)}
    if there.partition(b"\n")[0] == here.partition(b"\n")[0]:  # with its times, no other run begins so
        lines = {**{place(line): line for line in here.splitlines(keepends=True)}, **lines}
    lines.pop(None, None)
    with open(path, "wb") as file:
        file.writelines(lines[at] for at in sorted(lines))


def _cut(folder: str, name: str, place: Place) -> list[bytes]:
    """Drop the lines that have no place, and return them."""
    content = _read(os.path.join(folder, name))
    lines = content.splitlines(keepends=True)
    dropped = [line for line in lines if place(line) is None]
    if dropped:
        kept = b"".join(line for line in lines if place(line) is not None)
        open_storage(folder).publish(name, len(kept), [memoryview(kept)], overwrite=True)
    return dropped


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
