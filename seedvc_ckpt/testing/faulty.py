"""Storages that fail on purpose, for testing a training program.

::

    def full_disk(call: Call) -> Fault | None:
        return "midway" if call.operation == "publish" and call.number > 30 else None

    store = CheckpointStore(FaultyStorage(open_storage("runs/test"), full_disk))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeVar

from seedvc_ckpt.errors import SaveFailedError, StorageError
from seedvc_ckpt.storage import Blob, Entry, Lease, Readable, Stat, Storage
from seedvc_ckpt.storage.condition import Finding
from seedvc_ckpt.storage.leftovers import Leftover

__all__ = ["Call", "Fault", "Faults", "FaultyStorage"]

_T = TypeVar("_T")

Fault = Literal["before", "midway", "after"]
"""When a call fails: with nothing done; with half of it done; with all done, so that only the answer is lost.

Half is done of the bytes that are published and of the entries that are listed; other calls do nothing "midway".
"""


@dataclass(frozen=True)
class Call:
    """A call that is about to be made.

    Attributes:
        number: How many calls went before it.
        operation: The method of `Storage`, or "read" or "map" of an open file.
        name: The file, "" for calls about the whole place.
    """

    number: int
    operation: str
    name: str = ""


Faults = Callable[[Call], "Fault | None"]
"""Decides how a call fails; None lets it pass."""


class FaultyStorage:
    """A storage around another one, whose calls fail when `faults` says so, with the errors of a real storage.

    A failed publish raises `SaveFailedError` and has changed nothing, except "after": then the file is there and the
    error is a `StorageError`, as is that of every other call. Asking who holds the lease, what is free, what is
    unusual and which leftovers there are never fails.

    Args:
        storage: Where the files are.
        faults: Called before each call.
    """

    def __init__(self, storage: Storage, faults: Faults) -> None:
        self._storage = storage
        self._faults = faults
        self._calls = 0

    @property
    def location(self) -> str:
        """That of the storage inside."""
        return self._storage.location

    def below(self, folder: str) -> Storage:
        """The folder of that name in the storage inside, without faults."""
        return self._storage.below(folder)

    def list(self) -> Iterator[Entry]:
        """The files; a listing that fails does so at once, after half of them, or at its end."""
        fault = self._next("list", "")
        if fault == "before":
            raise _failed("list", self.location)
        entries = [*self._storage.list()]
        for entry in entries[: len(entries) // 2] if fault == "midway" else entries:
            yield _Entry(self, entry)
        if fault:
            raise _failed("list", self.location)

    def stat(self, name: str) -> Stat | None:
        """Size and time of a file, None where there is none."""
        return self._call("stat", name, lambda: self._storage.stat(name))

    def open(self, name: str) -> Blob:
        """Open a file for reading; its reads can fail too."""
        fault = self._next("open", name)
        if fault in ("before", "midway"):
            raise _failed("open", name)
        blob = self._storage.open(name)
        if fault:
            with blob:
                raise _failed("open", name)
        return _Blob(self, name, blob)

    def lease(self) -> Lease:
        """Take the right to write."""
        fault = self._next("lease", "")
        lease = None if fault in ("before", "midway") else self._storage.lease()
        if lease is None or fault:
            if lease is not None:
                lease.release()  # whoever gets an error could not do it
            raise _failed("lease", self.location)
        return lease

    def leftovers(self) -> Sequence[Leftover]:
        """The temporary files of writers that died."""
        return self._storage.leftovers()

    def remove_leftover(self, leftover: Leftover) -> None:
        """Remove such a file."""
        self._call("remove_leftover", leftover.name, lambda: self._storage.remove_leftover(leftover))

    def holder(self) -> str:
        """Who has the lease now."""
        return self._storage.holder()

    def free(self) -> int | None:
        """Bytes that are free."""
        return self._storage.free()

    def examine(self) -> Sequence[Finding]:
        """What is unusual about the place inside."""
        return self._storage.examine()

    def publish(
        self,
        name: str,
        size: int,
        chunks: Iterable[memoryview],
        *,
        overwrite: bool = False,
        before: Callable[[], None] = lambda: None,
        cleared: Callable[[], bool] = lambda: False,
    ) -> Stat:
        """Make a file appear, complete or not at all."""
        fault = self._next("publish", name)
        if fault == "before":
            raise _save_failed(name, self.location, size)
        if fault == "midway":
            chunks = _broken(chunks, size, _save_failed(name, self.location, size))
        published = self._storage.publish(name, size, chunks, overwrite=overwrite, before=before, cleared=cleared)
        if fault == "after":
            raise _failed("publish", name)
        if fault == "midway":
            raise AssertionError(f"{type(self._storage).__name__} published {name} without reading all of it")
        return published

    def delete(self, name: str, *, seen: Stat | None = None) -> None:
        """Delete a file."""
        self._call("delete", name, lambda: self._storage.delete(name, seen=seen))

    def set_aside(self, name: str, reason: str) -> str:
        """Move a file to ``aside/``."""
        return self._call("set_aside", name, lambda: self._storage.set_aside(name, reason))

    def _next(self, operation: str, name: str) -> Fault | None:
        call = Call(self._calls, operation, name)
        self._calls += 1
        return self._faults(call)

    def _call(self, operation: str, name: str, act: Callable[[], _T]) -> _T:
        fault = self._next(operation, name)
        if fault in ("before", "midway"):
            raise _failed(operation, name)
        result = act()
        if fault:
            raise _failed(operation, name)
        return result


class _Entry:
    def __init__(self, storage: FaultyStorage, entry: Entry) -> None:
        self._storage = storage
        self._entry = entry
        self.name = entry.name

    def stat(self) -> Stat:
        return self._storage._call("stat", self.name, self._entry.stat)  # noqa: SLF001


class _Readable:
    def __init__(self, storage: FaultyStorage, name: str, readable: Readable) -> None:
        self._storage = storage
        self._file = name
        self._readable = readable
        self.name = readable.name
        self.size = readable.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._storage._call("read", self._file, lambda: self._readable.read_into(offset, buffer))  # noqa: SLF001


class _Blob(_Readable):
    def __init__(self, storage: FaultyStorage, name: str, blob: Blob) -> None:
        super().__init__(storage, name, blob)
        self._blob = blob

    def announce(self, stretches: Iterable[tuple[int, int]]) -> None:
        self._blob.announce(stretches)

    def read_in_parallel(self, stretches: Sequence[tuple[int, int]], read: Callable[[Readable, int], object]) -> None:
        def read_one(stretch: Readable, number: int) -> None:
            read(_Readable(self._storage, self._file, stretch), number)

        self._blob.read_in_parallel(stretches, read_one)

    def map(self) -> memoryview | None:
        return self._storage._call("map", self._file, self._blob.map)  # noqa: SLF001

    def __enter__(self) -> Blob:
        self._blob.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blob.__exit__(kind, error, trace)


def _broken(chunks: Iterable[memoryview], size: int, error: SaveFailedError) -> Iterator[memoryview]:
    """The first half of the bytes, then the error."""
    left = size // 2
    for chunk in chunks:
        if left < len(chunk):
            yield chunk[:left]
            break
        yield chunk
        left -= len(chunk)
    raise error


def _failed(operation: str, subject: str) -> StorageError:
    return StorageError(f"a fault on purpose: {operation} of {subject} failed")


def _save_failed(name: str, location: str, size: int) -> SaveFailedError:
    return SaveFailedError(f"a fault on purpose: saving {name} in {location} failed", needed=size)
