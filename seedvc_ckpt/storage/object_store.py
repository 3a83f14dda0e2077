"""Objects under a prefix, each written by one request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import chain, count
from types import TracebackType
from typing import Any

from seedvc_ckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, SaveFailedError, StorageError
from seedvc_ckpt.storage import Lease, Stat
from seedvc_ckpt.storage.condition import Finding, note
from seedvc_ckpt.storage.leftovers import Leftover

__all__ = ["ObjectStorage", "memory_filesystem"]


def memory_filesystem(options: Mapping[str, Any]) -> Any:
    """The fsspec store in this process's memory."""
    import fsspec

    return fsspec.filesystem("memory", skip_instance_cache=True, **options)


class ObjectStorage:
    """Objects on an fsspec filesystem.

    Only the calls that end in ``_file``, ``info`` and ``ls`` are used: the others expand globs in names.
    """

    def __init__(self, fs: Any, prefix: str, location: str) -> None:
        self._fs = fs
        self._prefix = prefix.strip("/")
        self._location = location

    @property
    def location(self) -> str:
        """The URL, as it was given."""
        return self._location

    def list(self) -> Iterator[_ObjectEntry]:
        """The objects directly under the prefix."""
        try:
            found = self._fs.ls(f"/{self._prefix}", detail=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"can't list {self._location}: {error}") from error
        for info in found:
            folder, _, name = info["name"].rpartition("/")
            if info["type"] == "file" and folder.strip("/") == self._prefix:
                yield _ObjectEntry(self, name)

    def stat(self, name: str) -> Stat | None:
        """Size and time of an object, None where there is none."""
        try:
            return _stat(self._fs.info(self._path(name)))
        except FileNotFoundError:
            return None

    def open(self, name: str) -> _ObjectBlob:
        """Open an object for reading."""
        found = self.stat(name)
        if found is None:
            raise CheckpointNotFoundError(f"there is no file {name} in {self._location}")
        return _ObjectBlob(self._fs, self._path(name), f"{self._location.rstrip('/')}/{name}", found.size)

    def lease(self) -> Lease:
        """Nothing to take: what is in this process's memory has no other writer."""
        return _NoLease()

    def leftovers(self) -> Sequence[Leftover]:
        """None: an object is put in one request."""
        return ()

    def remove_leftover(self, leftover: Leftover) -> None:
        """Nothing to remove."""

    def holder(self) -> str:
        """Nobody: see `lease`."""
        return ""

    def free(self) -> int | None:
        """Not known."""
        return None

    def examine(self) -> Sequence[Finding]:
        """What is in memory ends with the process."""
        return (note(self._location, "lies in this process's memory", "save to a disk to keep it"),)

    def publish(
        self,
        name: str,
        size: int,
        chunks: Iterable[memoryview],
        *,
        overwrite: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> Stat:
        """Put the object in one request, which fails where the name is taken unless `overwrite` is true."""
        content = b"".join(chunks)
        if len(content) != size:
            raise SaveFailedError(f"{name}: {len(content)} bytes were to be written, {size} announced", needed=size)
        try:
            before()
            self._fs.pipe_file(self._path(name), content, mode="overwrite" if overwrite else "create")
            return _stat(self._fs.info(self._path(name)))
        except FileExistsError:
            raise
        except OSError as error:
            raise SaveFailedError(f"saving {name} in {self._location} failed: {error}", needed=size) from error

    def delete(self, name: str) -> None:
        """Delete an object."""
        self._fs.rm_file(self._path(name))

    def set_aside(self, name: str, reason: str) -> str:
        """Move an object to ``aside/``, under its name or, where that is taken, with a number added."""
        content = self._fs.cat_file(self._path(name))
        for candidate in chain([name], (f"{name}.{number}" for number in count(1))):
            target = f"aside/{candidate}"
            try:
                self._fs.pipe_file(self._path(target), content, mode="create")
            except FileExistsError:
                continue
            self._fs.pipe_file(self._path(f"{target}.reason.txt"), f"{reason}\n".encode())
            self._fs.rm_file(self._path(name))
            return target
        raise AssertionError("unreachable: the numbers don't end")

    def _path(self, name: str) -> str:
        return f"/{self._prefix}/{name}" if self._prefix else f"/{name}"


class _NoLease:
    def check(self) -> None:
        return

    def release(self) -> None:
        return


class _ObjectEntry:
    __slots__ = ("_storage", "name")

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        self._storage = storage
        self.name = name

    def stat(self) -> Stat:
        found = self._storage.stat(self.name)  # the listing of fsspec's memory store has no times
        if found is None:
            raise FileNotFoundError(self.name)
        return found


class _ObjectBlob:
    def __init__(self, fs: Any, path: str, name: str, size: int) -> None:
        self._fs = fs
        self._path = path
        self.name = name
        self.size = size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not buffer:
            return
        try:
            content = self._fs.cat_file(self._path, start=offset, end=offset + len(buffer))
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"{self.name} was deleted while it was read") from None
        except OSError as error:
            raise StorageError(f"can't read {self.name}: {error}") from error
        if len(content) != len(buffer):
            at = offset + len(content)
            raise CorruptCheckpointError(self.name, "", f"ends at byte {at:,}, where more should follow")
        buffer[:] = content

    def map(self) -> memoryview | None:
        return None

    def __enter__(self) -> _ObjectBlob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


def _stat(info: Mapping[str, Any]) -> Stat:
    created: datetime = info["created"]
    return Stat(int(info["size"]), created if created.tzinfo else created.replace(tzinfo=timezone.utc))
