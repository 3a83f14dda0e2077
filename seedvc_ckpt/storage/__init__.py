"""Bytes under names in one place, published whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from seedvc_ckpt.errors import StorageError
from seedvc_ckpt.storage.condition import Finding
from seedvc_ckpt.storage.leftovers import Leftover

__all__ = ["Blob", "Entry", "Stat", "Storage", "open_parent", "open_storage"]

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
    identity: tuple[int, ...] = ()


class Entry(Protocol):
    """A file in a listing."""

    @property
    def name(self) -> str: ...  # noqa: D102

    def stat(self) -> Stat:
        """Its size and time. Raises FileNotFoundError if it is gone."""


class Blob(Protocol):
    """An open file; a context manager that closes it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""

    def map(self) -> memoryview | None:
        """The bytes mapped into memory, private to this process; None where that can't be done."""

    def __enter__(self) -> Blob: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Lease(Protocol):
    """The right to write, until `release`."""

    def check(self) -> None:
        """Make sure that it is still ours. Raises LeaseHeldError if it is not."""

    def release(self) -> None:
        """Give it back. Doing it twice does no harm."""


class Storage(Protocol):
    """A folder or prefix. Names hold no "/"; every call sees what is there now."""

    @property
    def location(self) -> str:
        """Where it is, for people: a path or URL without secrets."""

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
    ) -> Stat:
        """Make a file of `size` bytes appear under `name`, complete and durable, or not at all.

        `before` is called when all is written, just before the file appears; what it raises stops that.

        Raises:
            FileExistsError: if the name is taken and `overwrite` is false.
            SaveFailedError: if it can't be written; nothing has changed.
        """

    def delete(self, name: str) -> None:
        """Delete a file. Raises FileNotFoundError if it is gone already, StorageError if that is refused."""

    def set_aside(self, name: str, reason: str) -> str:
        """Move a file to ``aside/``, with the reason beside it, and return its new name there."""


def open_storage(
    location: str | os.PathLike[str] | Storage,
    *,
    storage_options: Mapping[str, Any] | None = None,
    fs: Any = None,
) -> Storage:
    """The storage at a path or URL. Only ``scheme://`` makes a URL: any other text is a local path as it stands.

    Args:
        location: A folder that need not exist yet; a storage is taken as it is.
        storage_options: Passed to the fsspec filesystem of a URL.
        fs: An fsspec filesystem to use instead; `location` is then a path on it.

    Raises:
        StorageError: for a kind of storage that is not supported.
    """
    if not isinstance(location, (str, bytes, os.PathLike)):
        return location
    text = os.fspath(location)
    if not isinstance(text, str) or not text or "\0" in text:
        raise StorageError(f"a store's location is a path or URL as text, got {location!r}")
    from seedvc_ckpt.storage.local import LocalStorage

    match = _URL.match(text)
    scheme = match["scheme"] if match else ""
    path = match["rest"] if match else text
    if fs is None and scheme in ("", "file", "local"):
        if not path:
            raise StorageError(f"{text!r} names no folder: write the path after it")
        return LocalStorage(path)
    if fs is not None:
        protocols = [fs.protocol] if isinstance(fs.protocol, str) else list(fs.protocol)
        if "file" in protocols:
            return LocalStorage(path)
        scheme = "memory" if "memory" in protocols else protocols[0]
    if scheme != "memory":
        raise StorageError(
            f"stores on {scheme}:// are not supported by this version: use a local folder, or memory:// in tests"
        )
    from seedvc_ckpt.storage.object_store import ObjectStorage, memory_filesystem

    return ObjectStorage(fs or memory_filesystem(storage_options or {}), path, f"memory://{path}")


def open_parent(location: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The storage that a file lies in, and the file's name there."""
    text = os.fspath(location)
    separators = "/" if _URL.match(text) else "/" + (os.altsep or "") + os.sep
    cut = max(text.rfind(separator) for separator in separators)
    folder, name = text[: cut + 1], text[cut + 1 :]
    if not name or name in (".", ".."):
        raise StorageError(f"{text!r} names a folder where a file is meant")
    return open_storage(folder or "."), name
