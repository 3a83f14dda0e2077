"""A folder on a local (or locally mounted) file system."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat as statmodule
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from types import TracebackType

from seedvc_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    SaveFailedError,
    StorageError,
)
from seedvc_ckpt.storage import Lease, Readable, Stat, numbered
from seedvc_ckpt.storage.condition import Finding, examine_folder
from seedvc_ckpt.storage.leftovers import Leftover, find_leftovers, remove_leftover, temporary_name
from seedvc_ckpt.threads import in_parallel

if sys.platform != "win32":
    import fcntl

__all__ = ["LocalStorage"]

_WRITE_FLAGS = (
    os.O_CREAT
    | os.O_EXCL
    | os.O_WRONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_WRITE_BACK = 32 << 20  # bytes; the disk is kept busy with so much at a time
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


_written: set[int] = set()
"""Descriptors of the files that are being written."""


def _close_in_child() -> None:
    # else a loader's worker keeps a pruned checkpoint's blocks, and the lock that says its writer lives
    for descriptor in _written:
        _close(descriptor)
    _written.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class LocalStorage:
    """Files in a folder, which is made at the first publish."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @property
    def location(self) -> str:
        """The folder's path, as it was given."""
        return self._folder

    def below(self, folder: str) -> LocalStorage:
        """The folder of that name in it."""
        return LocalStorage(self._path(folder))

    def list(self) -> Iterator[_LocalEntry]:
        """The files in the folder; symlinks to files count, those that lead nowhere don't."""
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if _may_be_file(entry):
                        yield _LocalEntry(entry)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"can't list {self._folder}: {error.strerror}") from error

    def stat(self, name: str) -> Stat | None:
        """Size and time of a file, None where there is none."""
        try:
            return _stat(os.stat(self._path(name)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"can't look at {self._path(name)}: {error.strerror}") from error

    def open(self, name: str) -> _LocalBlob:
        """Open a file for reading."""
        path = self._path(name)
        try:
            descriptor = os.open(path, _READ_FLAGS)
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"there is no file {path}") from None
        except OSError as error:
            raise StorageError(f"can't open {path}: {error.strerror}") from error
        try:
            found = os.fstat(descriptor)
            if not statmodule.S_ISREG(found.st_mode):
                raise StorageError(f"{path} is not a file")
        except OSError as error:
            _close(descriptor)
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"can't look at {path}: {error.strerror}") from error
        return _LocalBlob(path, descriptor, found.st_size)

    def lease(self) -> Lease:
        """Take the right to write to the folder, which is made where it is missing."""
        from seedvc_ckpt.storage.lease import LocalLease  # filelock is slow to import, and readers need none

        try:
            for folder in (*self._make_folder(), self._folder):
                _sync_folder(folder)
        except OSError as error:
            raise StorageError(f"can't make the folder {self._folder}: {error.strerror}") from error
        return LocalLease(self._folder)

    def leftovers(self) -> Sequence[Leftover]:
        """The temporary files of writers that died."""
        return list(find_leftovers(self._folder))

    def remove_leftover(self, leftover: Leftover) -> None:
        """Remove such a file, unless it has come to life."""
        try:
            remove_leftover(self._folder, leftover)
        except OSError as error:
            raise StorageError(f"can't remove {self._path(leftover.name)}: {error.strerror}") from error

    def holder(self) -> str:
        """Who has the lease now: process, host, since when."""
        from seedvc_ckpt.storage.lease import current_holder

        return current_holder(self._folder)

    def free(self) -> int | None:
        """Bytes that this user may still write; None where the file system does not tell."""
        try:
            return shutil.disk_usage(self._folder).free
        except OSError:
            return None

    def examine(self) -> Sequence[Finding]:
        """What is unusual about the folder's permissions and file system."""
        return list(examine_folder(self._folder))

    def publish(
        self,
        name: str,
        size: int,
        chunks: Iterable[memoryview],
        *,
        overwrite: bool = False,
        before: Callable[[], None] = lambda: None,
        cleared: Callable[[], bool] = lambda: False,  # noqa: ARG002 - a lock of the kernel's leaves no stale writer
    ) -> Stat:
        """Make a complete, durable file appear under `name`, or nothing.

        The steps and what breaks without each:

        1. make the folder, and sync the folders that were made: else a power cut takes the run's folder away;
        2. compare free space with the size: a full disk is better found before an hour of writing;
        3. write to a new file with an unpredictable name in the same folder, never through a link that someone put
           there: a crash leaves a file that no listing shows, and renaming stays on one file system;
        4. hold a lock on it while it is written: what has none belongs to a dead writer and may be removed;
        5. write until every byte is written: a nearly full disk takes a part and reports success;
        6. sync the file before it gets its name: else a power cut leaves the name with holes or nothing behind it;
        7. give it its name by a link, which fails where the name is taken (or, to overwrite, by a rename that
           replaces in one step): nobody ever sees half a file or loses another's;
        8. sync the folder: else a power cut takes the name away again.
        """
        try:
            made = self._make_folder()  # 1
            free = self._check_space(name, size)  # 2
            temporary = self._path(temporary_name())
            descriptor = os.open(temporary, _WRITE_FLAGS, 0o666)  # 3
        except OSError as error:
            raise self._failed(name, error, size) from error
        published = False
        _written.add(descriptor)
        try:
            _lock(descriptor)  # 4
            written = _write_chunks(descriptor, chunks)  # 5
            if written != size:
                raise SaveFailedError(f"{name}: {written} bytes were to be written, {size} announced", needed=size)
            _sync(descriptor)  # 6
            found = _stat(os.fstat(descriptor))
            if found.size != size:
                raise SaveFailedError(f"{name}: the file system kept {found.size} of {size} bytes", needed=size)
            before()
            _give_name(temporary, self._path(name), overwrite=overwrite)  # 7
            published = True
            for folder in (self._folder, *made):
                _sync_folder(folder)  # 8
        except (FileExistsError, CheckpointError):
            raise
        except OSError as error:
            if published and not overwrite:
                # it may vanish at a power cut, so it must not be seen as saved
                with suppress(OSError):
                    os.unlink(self._path(name))
            raise self._failed(name, error, size, free) from error
        finally:
            with suppress(OSError):  # gone when it was renamed; a leftover is in nobody's listing
                os.unlink(temporary)
            _written.discard(descriptor)
            _close(descriptor)
        return found

    def delete(self, name: str, *, seen: Stat | None = None) -> None:  # noqa: ARG002 - the lease keeps others away
        """Delete a file, or the link where it is one."""
        try:
            os.unlink(self._path(name))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"can't delete {self._path(name)}: {error.strerror}") from error

    def set_aside(self, name: str, reason: str) -> str:
        """Move a file to ``aside/`` in the folder, under its name or, where that is taken, with a number added."""
        aside = self.below("aside")
        if not os.path.lexists(self._path(name)):
            raise CheckpointNotFoundError(f"there is no file {self._path(name)} to set aside")
        try:
            os.makedirs(aside.location, exist_ok=True)
            target = next(
                candidate
                for candidate in numbered(name)
                if not os.path.lexists(os.path.join(aside.location, candidate))
            )
            note = os.fsencode(f"{reason}\n")
            aside.publish(f"{target}.reason.txt", len(note), [memoryview(note)], overwrite=True)
            os.rename(self._path(name), os.path.join(aside.location, target))
            _sync_folder(aside.location)
            _sync_folder(self._folder)
        except OSError as error:
            raise StorageError(f"can't set {self._path(name)} aside: {error}") from error
        return f"aside/{target}"

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _make_folder(self) -> tuple[str, ...]:
        """Make the folder and those above it; returns the folders whose entries changed."""
        changed = []
        folder = os.path.abspath(self._folder)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
            changed.append(folder)
        os.makedirs(self._folder, exist_ok=True)
        return tuple(changed)

    def _check_space(self, name: str, size: int) -> int | None:
        free = self.free()
        if free is not None and free < size:
            raise SaveFailedError(
                f"no room for {name} in {self._folder}: it needs {size:,} bytes, {free:,} are free. Nothing was "
                "written; make room or keep fewer checkpoints",
                needed=size,
                free=free,
            )
        return free

    def _failed(self, name: str, error: OSError, size: int, free: int | None = None) -> SaveFailedError:
        if isinstance(error, SaveFailedError):
            return error
        free = self.free() if free is None or error.errno in (errno.ENOSPC, errno.EDQUOT) else free
        known = f", {free:,} are free" if free is not None else ""
        return SaveFailedError(
            f"saving {name} in {self._folder} failed: {error.strerror or error}. It needs {size:,} bytes{known}; "
            "nothing was published and older checkpoints are as they were",
            needed=size,
            free=free,
        )


class _LocalEntry:
    __slots__ = ("_entry", "name")

    def __init__(self, entry: os.DirEntry[str]) -> None:
        self._entry = entry
        self.name = entry.name

    def stat(self) -> Stat:
        return _stat(self._entry.stat())


class _LocalBlob:
    def __init__(self, name: str, descriptor: int, size: int) -> None:
        self.name = name
        self.size = size
        self._descriptor = descriptor

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise StorageError(f"can't read {self.name}: {error.strerror}") from error
            if not got:
                raise CorruptCheckpointError(self.name, "", f"ends at byte {offset + done:,}, where more should follow")
            done += got

    def announce(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Nothing to do: the kernel reads ahead."""

    def read_in_parallel(self, stretches: Sequence[tuple[int, int]], read: Callable[[Readable, int], object]) -> None:
        in_parallel([partial(read, self, number) for number in range(len(stretches))])

    def map(self) -> memoryview | None:
        try:
            return memoryview(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)) if self.size else None
        except (OSError, ValueError) as error:  # ValueError: it was emptied since it was opened
            raise StorageError(f"can't map {self.name} into memory: {error}") from error

    def __enter__(self) -> _LocalBlob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _close(self._descriptor)


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        # a link in a circle leads nowhere, as a dangling one does; whatever can't be looked at must not vanish silently
        return error.errno != errno.ELOOP


def _stat(found: os.stat_result) -> Stat:
    modified = datetime.fromtimestamp(found.st_mtime, timezone.utc)
    return Stat(found.st_size, modified, (found.st_dev, found.st_ino, found.st_mtime_ns))


def _close(descriptor: int) -> None:
    # whatever a network file system tells only now was told by the sync before, or concerns nothing that was written
    with suppress(OSError):
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if sys.platform != "win32":
        # file systems without locks: others then judge by age
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write_chunks(descriptor: int, chunks: Iterable[memoryview]) -> int:
    written = asked = 0
    for chunk in chunks:
        for start in range(0, len(chunk), _WRITE_BACK):
            written += _write_all(descriptor, chunk[start : start + _WRITE_BACK])
            if written - asked >= _WRITE_BACK:
                _begin_write_back(descriptor, asked, written - asked)
                asked = written
    return written


def _write_all(descriptor: int, chunk: memoryview) -> int:
    done = 0
    while done < len(chunk):
        done += os.write(descriptor, chunk[done:])
    return done


def _begin_write_back(descriptor: int, start: int, size: int) -> None:
    """Let the disk begin with what is written, so that the sync at the end has less to wait for. A hint, no more.

    It only starts the writing and takes no error away from the sync: sync_file_range(2), SYNC_FILE_RANGE_WRITE.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    hint = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if hint is not None:
        hint(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), 2)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync there stops at the drive's cache
    else:
        os.fsync(descriptor)


def _sync_folder(folder: str) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync folders by themselves and refuse to be asked
            raise
    finally:
        _close(descriptor)


def _give_name(temporary: str, path: str, *, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        # a network file system may repeat a link whose answer was lost
        if not os.path.samestat(os.lstat(temporary), os.lstat(path)):
            raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        os.rename(temporary, path)
