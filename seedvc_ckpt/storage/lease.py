"""The right to write to a local folder: one process at a time.

The lease is an advisory lock on a file in the folder. The kernel frees it when the process ends, however it ends. It
belongs to the process and the folder: all stores of a process share it, its threads too, and a forked child does not
inherit it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from filelock import FileLock, Timeout

from seedvc_ckpt.errors import LeaseHeldError, StorageError

__all__ = ["LOCK_NAME", "LocalLease", "current_holder"]

LOCK_NAME = ".seedvc_ckpt.lock"
"""The lock file's name. It is never deleted: a second process could lock a new one while the old one is still held."""

_TIME_TO_RECORD = 1.0  # seconds from having the lock to having told who has it; it takes a millisecond


class LocalLease:
    """A share in this process's lease on a folder, until `release`.

    Raises:
        LeaseHeldError: if another process has it, naming that process.
        StorageError: if the folder can't be written or locked.
    """

    def __init__(self, folder: str) -> None:
        self._held: _Held | None = _take(os.path.realpath(folder))

    @property
    def epoch(self) -> int | None:
        """None: the kernel takes the lock away with the process, so no holder can be stale."""
        return None

    def check(self) -> None:
        """Make sure that the lease is still ours; called just before anything in the folder changes.

        Raises:
            LeaseHeldError: if the lock file was replaced, so that another process may hold a lease too.
        """
        if self._held is None or self._held.process != os.getpid():
            raise LeaseHeldError(
                "this process has no lease on the run: it was released, or belongs to a parent process"
            )
        self._held.check()

    def release(self) -> None:
        """Give the share back; with the last one the lease ends. Doing it twice does no harm."""
        held, self._held = self._held, None
        if held is not None and held.process == os.getpid():
            _returned.append(held)
            _settle()

    def close(self) -> None:
        """`release`, which is known at once."""
        self.release()


class _Held:
    """The lock that this process holds on a folder."""

    def __init__(self, folder: str, lock: FileLock) -> None:
        self.folder = folder
        self.path = os.path.join(folder, LOCK_NAME)
        self.lock = lock
        self.process = os.getpid()
        self.shares = 0
        self.identity = _identity(self.path)

    def check(self) -> None:
        if _identity(self.path) != self.identity:
            raise LeaseHeldError(
                f"the lock file {self.path} was deleted or replaced, so another process may be writing to this run: "
                "nothing was changed. Stop the other one, then start this one again"
            )

    def release(self) -> None:
        with suppress(StorageError):
            if _identity(self.path) == self.identity:  # else the record there is another process's
                _record(self.path, b"")
        self.lock.release()


_guard = threading.Lock()
_held: dict[str, _Held] = {}
_returned: deque[_Held] = deque()


def _forget_in_child() -> None:
    # the lock's descriptor is closed in the child by filelock; what another thread held at that moment is gone
    global _guard  # noqa: PLW0603
    _guard = threading.Lock()
    _held.clear()
    _returned.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def current_holder(folder: str) -> str:
    """Who has the lease on a folder now, without disturbing anybody; "" for nobody, or where that is not told."""
    identity = _identity(os.path.join(folder, LOCK_NAME))
    try:
        with open("/proc/locks") as locks:
            held = [line.split() for line in locks if " FLOCK " in line and "->" not in line]
    except OSError:
        return ""
    # by the inode alone: some file systems show another device number here
    if identity is None or not any(fields[5].rpartition(":")[2] == str(identity[1]) for fields in held):
        return ""
    return _who(_recorded(folder))


def _recorded(folder: str) -> dict[str, Any]:
    """Host, process and time of who last took the lease on a folder; empty where that is not recorded."""
    try:
        with open(os.path.join(folder, LOCK_NAME), "rb") as file:
            found = json.loads(file.read(4096))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recorded_by_holder(folder: str) -> dict[str, Any]:
    """What the process that has the lease now recorded, given a second if it has only just got it."""
    deadline = time.monotonic() + _TIME_TO_RECORD
    while not _of_this_holder(known := _recorded(folder)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return known


def _of_this_holder(known: dict[str, Any]) -> bool:
    # a writer that releases the lease clears its record; only a killed one can have left the record of an earlier one
    process = known.get("process")
    if not isinstance(process, int) or known.get("host") != socket.gethostname():
        return bool(known)
    return os.path.exists(f"/proc/{process}") or not os.path.exists("/proc/self")


def _take(folder: str) -> _Held:
    with _guard:
        held = _held.get(folder)
        if held is None:
            held = _held[folder] = _lock(folder)
        held.shares += 1
    _settle()
    return held


def _lock(folder: str) -> _Held:
    path = os.path.join(folder, LOCK_NAME)
    try:
        lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
        lock.acquire()
    except Timeout:
        raise LeaseHeldError(
            f"another process is writing to {folder}: {_who(_recorded_by_holder(folder))}. One run has one writer: "
            "stop that one, or use another folder. Reading needs no lease"
        ) from None
    except OSError as error:
        raise StorageError(f"can't lock {path}: {error.strerror or error}") from error
    record = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    _record(path, json.dumps(record).encode())
    return _Held(folder, lock)


def _record(path: str, record: bytes) -> None:
    with suppress(OSError), open(path, "r+b") as file:  # only told to people: a full disk must not stop a writer
        file.write(record)
        file.truncate()


def _settle() -> None:
    """Take back the shares that were returned, unless somebody is at it, who then sees them."""
    # a share may be returned by the garbage collector, in the middle of anything, this module included: never wait
    while _returned and _guard.acquire(blocking=False):
        try:
            while _returned:
                held = _returned.popleft()
                held.shares -= 1
                if held.shares == 0:
                    del _held[held.folder]
                    held.release()
        finally:
            _guard.release()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"can't look at the lock file {path}: {error.strerror}") from error
    return found.st_dev, found.st_ino


def _who(known: dict[str, Any]) -> str:
    if not known:
        return "unknown which"
    return f"process {known.get('process', '?')} on {known.get('host', '?')}, since {known.get('since', '?')}"
