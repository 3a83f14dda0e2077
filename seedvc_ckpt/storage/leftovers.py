"""Temporary files of writers that died: which they are, and that they are safe to remove."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import stat as statmodule
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

if sys.platform != "win32":
    import fcntl

__all__ = [
    "Leftover",
    "find_leftovers",
    "is_temporary",
    "process_start",
    "remove_leftover",
    "temporary_name",
    "this_machine",
    "why_dead",
]

_NAME = re.compile(r"\.tmp-[0-9a-f]{16}-([0-9]+)-([0-9]+)-(.*)", re.DOTALL)
_FOREIGN_AGE = 24 * 3600.0  # seconds; longer than any save takes on a host that we can't ask


@dataclass(frozen=True)
class Leftover:
    """A temporary file that nobody writes to any more.

    Attributes:
        name: Its name in the folder.
        size: Bytes.
        why: How we know that its writer is gone.
    """

    name: str
    size: int
    why: str


def temporary_name(host: str | None = None) -> str:
    """A name that no listing takes for a checkpoint and nobody can guess; says who is writing.

    Args:
        host: What tells this machine from others; its name by default.
    """
    host = platform.node()[:64] if host is None else host
    return f".tmp-{os.urandom(8).hex()}-{os.getpid()}-{process_start(os.getpid())}-{host}"


def this_machine() -> str:
    """This boot and process namespace, within which process numbers mean the same; "" where that is not told.

    On a server machines meet that may have one name.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            place = f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def is_temporary(name: str) -> bool:
    """Whether a name is of `temporary_name`'s making."""
    return _NAME.fullmatch(name) is not None


def why_dead(name: str, modified: float, now: Callable[[], float] = time.time, host: str | None = None) -> str | None:
    """How we know that the writer of a temporary file is gone; None if we don't.

    Args:
        name: The file's name.
        modified: When it was written, in seconds since 1970.
        now: The time by the same clock.
        host: What was given to `temporary_name` on this machine.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    process, start, wrote = match.groups()
    if wrote and wrote == (platform.node()[:64] if host is None else host):
        running = process_start(int(process))
        return None if running in (start, "0") else f"process {process} of this host is gone"
    age = now() - modified
    return f"from {wrote or 'another host'}, {age / 3600:.0f} hours old" if age > _FOREIGN_AGE else None


def process_start(process: int) -> str | None:
    """When a process started, in clock ticks since boot; tells it from a later one with its number. None: no such."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except FileNotFoundError:
        return None if os.path.isdir("/proc/self") else "0"
    except OSError:
        return "0"


def find_leftovers(folder: str) -> Iterator[Leftover]:
    """The temporary files of dead writers in a folder and its ``aside/``.

    A file counts only if all of this holds: its name is of our making; it is a regular file of this user, no symlink,
    with no more links than a publish can leave (its own and the checkpoint's); nobody holds a lock on it; and its
    writer is a process of this host that is gone, or one of another host and the file is more than a day old by the
    file system's own clock.
    """
    for below in ("", "aside"):
        try:
            with os.scandir(os.path.join(folder, below)) as entries:
                names = [os.path.join(below, entry.name) for entry in entries if _NAME.fullmatch(entry.name)]
        except OSError:
            continue
        for name in sorted(names):
            with suppress(OSError):  # removed by another collector, or not ours to look at
                found = _judge(os.path.join(folder, name), name)
                if found is not None:
                    yield found


def remove_leftover(folder: str, leftover: Leftover) -> None:
    """Remove it, after judging it once more. Raises OSError if that is refused."""
    path = os.path.join(folder, leftover.name)
    if os.path.lexists(path) and _judge(path, leftover.name) is not None:
        os.unlink(path)


def _judge(path: str, name: str) -> Leftover | None:
    before = os.lstat(path)
    owned = sys.platform == "win32" or before.st_uid == os.getuid()
    if not statmodule.S_ISREG(before.st_mode) or before.st_nlink > 2 or not owned:
        return None
    why = _writer_is_gone(path, name, before)
    if why is None or not _unlocked(path, before):
        return None
    return Leftover(name, before.st_size, why)


def _writer_is_gone(path: str, name: str, found: os.stat_result) -> str | None:
    return why_dead(os.path.basename(name), found.st_mtime, lambda: _now_of(os.path.dirname(path)))


def _unlocked(path: str, before: os.stat_result) -> bool:
    if sys.platform == "win32":
        return True
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        now = os.fstat(descriptor)
        if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _now_of(folder: str) -> float:
    """The time by the clock of the folder's file system; ours where it can't be asked."""
    probe = os.path.join(folder or ".", temporary_name())
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except OSError:
        return time.time()
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        os.unlink(probe)
