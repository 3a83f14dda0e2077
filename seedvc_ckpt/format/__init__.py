"""What is inside a checkpoint file.

Everything here works on a `Source`: named bytes with a length. Modules that need torch are imported by the caller
when they are needed, so that listing and verifying start without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

__all__ = ["Source"]


class Source(Protocol):
    """Named bytes that can be read anywhere.

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

    def announce(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Say which (start, end) will be read next, each once: what is far away is fetched ahead."""

    def map(self) -> memoryview | None:
        """The bytes mapped into memory, writable without changing the file; None where that can't be done."""
