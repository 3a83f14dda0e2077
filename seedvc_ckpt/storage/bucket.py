"""What the stores on object stores need of one: the seam between `ObjectStorage` and a service's client library."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

__all__ = [
    "ABSENT",
    "ANY",
    "WRITE_ID",
    "Arriving",
    "Bucket",
    "Bytes",
    "ConditionFailedError",
    "Found",
    "Receiving",
    "Upload",
]

ANY = None
"""The condition that always holds."""
ABSENT = ""
"""The condition that there is no object of that name. Any other text: that its object still has this tag."""

Bytes = bytes | memoryview
"""What a service answered, wherever it lies in memory."""

WRITE_ID = "writeid"
"""The metadata by which a write whose answer was lost is recognised."""


class ConditionFailedError(Exception):
    """The condition of a write did not hold: the name is taken, or its object is another by now."""


class Found(NamedTuple):
    """An object.

    Attributes:
        key: Its name in the bucket.
        size: Bytes.
        modified: When it was written (UTC), in whole seconds: some services tell no more in every answer.
        tag: Other for other contents: an ETag or a generation.
        write_id: Who wrote it; "" where that is not told, as in listings.
    """

    key: str
    size: int
    modified: datetime
    tag: str
    write_id: str = ""


class Upload(Protocol):
    """An object on its way, which nobody sees until it is completed."""

    @property
    def id(self) -> str:
        """What the service calls it; "" where nothing is left when it is forgotten."""

    async def part(self, number: int, content: bytes, *, last: bool) -> None:
        """Send a part; they are numbered from 0, and may come in any order where `Bucket.parallel` is more than 1."""

    async def complete(self) -> None:
        """Make the object appear. Raises ConditionFailedError."""

    async def abort(self) -> None:
        """Forget it, for good."""


class Arriving(Protocol):
    """Bytes of an object on their way, for one thread."""

    def read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` from `offset`, before which nothing will be asked for any more; False if that fails."""

    def close(self) -> None:
        """Want no more of them."""


class Receiving(Protocol):
    """Connections over which bytes of one object arrive in the memory that they are for."""

    def begin(self, start: int, size: int) -> Arriving | None:
        """Ask for so many bytes; None where `Bucket.read` has to do."""

    def close(self) -> None:
        """End them."""


class Bucket(Protocol):
    """Objects of one service. Each call is one request, or one for each page; the library underneath retries.

    Every call raises what the library raises, but for a condition that does not hold and for what is not there.
    """

    @property
    def parallel(self) -> int:
        """How many parts of an upload may be under way."""

    @property
    def largest_put(self) -> int:
        """Bytes that go in one request; more go in parts."""

    @property
    def lists_uploads(self) -> bool:
        """Whether an upload that is neither completed nor aborted costs money until somebody finds it."""

    async def list(self, prefix: str) -> Sequence[Found]:
        """The objects whose name is `prefix` and more, without a further "/". None where there is no such prefix."""

    async def head(self, key: str) -> Found | None:
        """An object with its write id, None where there is none."""

    async def read(self, key: str, start: int, size: int, tag: str) -> Bytes:
        """Bytes of an object. Raises FileNotFoundError if it is gone, or no longer the one with this tag."""

    def receiving(self, key: str, tag: str) -> Receiving | None:
        """For reading much of an object with this tag; None where `read` does it all."""

    async def put(self, key: str, content: bytes, write_id: str, condition: str | None) -> None:
        """Write an object by one request. Raises ConditionFailedError."""

    async def begin(self, key: str, size: int, write_id: str, condition: str | None) -> Upload:
        """Begin to write a large object."""

    async def delete(self, key: str, tag: str | None = None) -> None:
        """Delete an object, if it still has this tag. Raises ConditionFailedError, FileNotFoundError if told."""

    async def copy(self, source: str, target: str) -> None:
        """Copy an object within the bucket, without moving its bytes here where the service can."""

    async def abort(self, key: str, upload: str) -> None:
        """Forget an upload of another process."""
