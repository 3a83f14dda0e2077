"""What is inside a checkpoint file.

Everything here works on a `Source`: named bytes with a length. Modules that need torch are imported by the caller
when they are needed, so that listing and verifying start without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

__all__ = ["Readable", "Source"]


class Readable(Protocol):
    """Named bytes.

    Attributes:
        name: What errors call it.
        size: Bytes.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`.

        Raises:
            CorruptCheckpointError: if the bytes end before the buffer is full.
            StorageError: if reading failed.
        """


class Source(Readable, Protocol):
    """Named bytes that can be read anywhere, by any thread."""

    def announce(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Say which (start, end) will be read next, each once: what is far away is fetched ahead."""

    def read_in_parallel(self, stretches: Sequence[tuple[int, int]], read: Callable[[Readable, int], object]) -> None:
        """Call `read(stretch, number)` for each (start, end), several at a time, and raise what the first one raises.

        `stretch` gives the file's bytes from start to end, to be read once, from front to back.
        """

    def map(self) -> memoryview | None:
        """The bytes mapped into memory, writable without changing the file; None where that can't be done."""
