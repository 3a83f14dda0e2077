"""Bytes under names in one place, published whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain, count
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from seedvc_ckpt.errors import StorageError
from seedvc_ckpt.storage.condition import Finding
from seedvc_ckpt.storage.leftovers import Leftover

__all__ = [
    "Blob",
    "Entry",
    "Lease",
    "Readable",
    "Stat",
    "Storage",
    "numbered",
    "open_parent",
    "open_storage",
    "plain_location",
    "read_chunks",
    "read_file",
]

_CHUNK = 8 << 20
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)


class Stat(NamedTuple):
    """What a file is at this moment.

    Attributes:
        size: Bytes.
        modified: When the content was published (UTC).
        identity: Other numbers for a file that took the place of this one, even of the same size and time.
    """

    size: int
    modified: datetime
    identity: tuple[int | str, ...] = ()


class Entry(Protocol):
    """A file in a listing."""

    @property
    def name(self) -> str: ...  # noqa: D102

    def stat(self) -> Stat:
        """Its size and time. Raises FileNotFoundError if it is gone."""


class Readable(Protocol):
    """Bytes of a file."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""


class Blob(Readable, Protocol):
    """An open file; a context manager that closes it."""

    def announce(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Say which (start, end) will be read next, each once: a server is asked for them ahead."""

    def read_in_parallel(self, stretches: Sequence[tuple[int, int]], read: Callable[[Readable, int], object]) -> None:
        """Call `read(stretch, number)` for each (start, end), several at a time, and raise what the first one raises.

        `stretch` gives the file's bytes from start to end, to be read once, from front to back.
        """

    def map(self) -> memoryview | None:
        """The bytes mapped into memory, private to this process; None where that can't be done."""

    def __enter__(self) -> Blob: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Lease(Protocol):
    """The right to write, until `release`."""

    @property
    def epoch(self) -> int | None:
        """Larger for each holder, where a holder that lost it may not know yet; None where that can't be."""

    def check(self) -> None:
        """Make sure that it is still ours. Raises LeaseHeldError if it is not, StorageError if that can't be told."""

    def release(self) -> None:
        """Give it back, without waiting for a server to know it. Doing it twice does no harm."""

    def close(self) -> None:
        """Give it back, and wait until that is known."""


class Storage(Protocol):
    """A folder or prefix. Names hold no "/"; every call sees what is there now."""

    @property
    def location(self) -> str:
        """Where it is, for people: a path or URL without secrets."""

    def below(self, folder: str) -> Storage:
        """The folder of that name in it."""

    def list(self) -> Iterator[Entry]:
        """The files directly in it, in no order; none when it does not exist.

        Raises:
            StorageError: if it can't be listed.
        """

    def stat(self, name: str) -> Stat | None:
        """Size and time of a file, None where there is none."""

    def open(self, name: str) -> Blob:
        """Open a file for reading.

        Raises:
            CheckpointNotFoundError: if there is none.
            StorageError: if it can't be opened.
        """

    def lease(self) -> Lease:
        """Take the right to write, which one process at a time has.

        Raises:
            LeaseHeldError: if another process has it.
            StorageError: if it can't be taken.
        """

    def leftovers(self) -> Sequence[Leftover]:
        """The temporary files of writers that died."""

    def remove_leftover(self, leftover: Leftover) -> None:
        """Remove such a file, unless it has come to life. Raises StorageError if that is refused."""

    def holder(self) -> str:
        """Who has the lease now, for people; "" where nobody has it."""

    def free(self) -> int | None:
        """Bytes that are free, None where there is no such limit or it is not known."""

    def examine(self) -> Sequence[Finding]:
        """What is unusual about the place, apart from the files in it."""

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
        """Make a file of `size` bytes appear under `name`, complete and durable, or not at all.

        `before` is called when all is written, just before the file appears; what it raises stops that. `cleared` is
        called where the name is taken, though it should not be; it may move that file away, and says whether it did.

        Raises:
            FileExistsError: if the name is taken and `overwrite` is false.
            SaveFailedError: if it can't be written; nothing has changed.
        """

    def delete(self, name: str, *, seen: Stat | None = None) -> None:
        """Delete a file; where the storage can, only if it is still the one that was `seen`.

        Raises:
            FileNotFoundError: if it is gone already, where the storage tells.
            StorageError: if that is refused.
        """

    def set_aside(self, name: str, reason: str) -> str:
        """Move a file to ``aside/``, with the reason beside it, and return its new name there."""


def open_storage(
    location: str | os.PathLike[str] | Storage,
    *,
    storage_options: Mapping[str, Any] | None = None,
    fs: Any = None,
    lease_seconds: float = 30.0,
) -> Storage:
    """The storage at a path or URL. Only ``scheme://`` makes a URL: any other text is a local path as it stands.

    Args:
        location: A folder that need not exist yet; a storage is taken as it is.
        storage_options: Passed to the fsspec filesystem of a URL.
        fs: An fsspec filesystem to use instead; `location` is then a path on it.
        lease_seconds: How long a writer on a server may be silent before another may take its lease.

    Raises:
        StorageError: for a kind of storage that can't be used.
    """
    if not isinstance(location, (str, bytes, os.PathLike)):
        return location
    text = os.fspath(location)
    if not isinstance(text, str) or not text or "\0" in text:
        raise StorageError(f"a store's location is a path or URL as text, got {location!r}")
    from seedvc_ckpt.storage.local import LocalStorage

    match = _URL.match(text)
    scheme = match["scheme"].lower() if match else ""
    path = match["rest"] if match else text
    if fs is not None:
        if "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
            return LocalStorage(path)
        from seedvc_ckpt.storage.connect import open_filesystem

        return open_filesystem(fs, text, lease_seconds)
    if scheme in ("", "file", "local"):
        if not path:
            raise StorageError(f"{text!r} names no folder: write the path after it")
        return LocalStorage(path)
    from seedvc_ckpt.storage.connect import open_url  # fsspec is slow to import

    return open_url(scheme, path, storage_options or {}, lease_seconds)


def numbered(name: str) -> Iterator[str]:
    """The names that a file set aside may get: its own, then with a number added."""
    return chain([name], (f"{name}.{number}" for number in count(1)))


def read_file(storage: Storage, name: str) -> bytes:
    """The contents of a file that fits into memory. Raises as `Storage.open` does."""
    with storage.open(name) as blob:
        buffer = bytearray(blob.size)
        blob.read_into(0, memoryview(buffer))
        return bytes(buffer)


def read_chunks(blob: Blob, progress: Callable[[int], None] = lambda _: None) -> Iterator[memoryview]:
    """All bytes of a file in order, some megabytes at a time; `progress` is called with each number of bytes."""
    blob.announce([(0, blob.size)])
    for start in range(0, blob.size, _CHUNK):
        buffer = memoryview(bytearray(min(_CHUNK, blob.size - start)))
        blob.read_into(start, buffer)
        yield buffer
        progress(len(buffer))


def plain_location(url: str) -> str:
    """A location without the part that may hold a name and password, and without a query."""
    match = _URL.match(url)
    if not match or match["scheme"] in ("memory", "file", "local"):
        return url
    authority, slash, path = match["rest"].partition("/")
    if match["scheme"] not in ("abfs", "abfss"):  # there the container stands before the @
        authority = authority.rpartition("@")[2]
    return f"{match['scheme']}://{authority}{slash}{path}".partition("?")[0]


def open_parent(location: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The storage that a file lies in, and the file's name there."""
    text = os.fspath(location)
    separators = "/" if _URL.match(text) else "/" + (os.altsep or "") + os.sep
    cut = max(text.rfind(separator) for separator in separators)
    folder, name = text[: cut + 1], text[cut + 1 :]
    if not name or name in (".", ".."):
        raise StorageError(f"{text!r} names a folder where a file is meant")
    return open_storage(folder or "."), name
