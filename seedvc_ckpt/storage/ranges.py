"""A file on a server, read in ranges: what is announced arrives ahead of its reader, many requests at a time."""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from types import TracebackType

from seedvc_ckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, StorageError
from seedvc_ckpt.storage import Readable
from seedvc_ckpt.storage.bucket import Arriving, Bytes
from seedvc_ckpt.threads import in_parallel

__all__ = ["RemoteBlob"]

_BLOCK = 16 << 20  # bytes a request; more gain nothing
_WINDOW = 96 << 20  # bytes that wait to be read
_GAP = 64 << 10  # bytes between two stretches that cost less than another request
_TAIL = 256 << 10  # bytes; directory, manifest and pickle of most checkpoints in one request
_CRUMBS = 64 << 10  # bytes of a block that nobody may want: padding, and records that were read before
_READERS = 6  # threads, each with a block or a connection; they wait for the network most of the time
_LARGE = 64 << 10  # bytes whose copying takes longer than the calls around it


class RemoteBlob:
    """Bytes of a file, fetched when they are read or, once announced, before.

    Args:
        name: What errors call it.
        size: Bytes.
        fetch: Begins to read (offset, size).
        wait: Gives what that has read, or raises.
        explain: Puts an exception of a fetch in words.
        close: Called when the file is left.
        receive: Begins to receive (offset, size) straight into the reader's memory; None where only `fetch` can.
    """

    def __init__(
        self,
        name: str,
        size: int,
        fetch: Callable[[int, int], Future[Bytes]],
        wait: Callable[[Future[Bytes]], Bytes],
        explain: Callable[[Exception], str],
        close: Callable[[], object] = lambda: None,
        receive: Callable[[int, int], Arriving | None] = lambda *_: None,
    ) -> None:
        self.name = name
        self.size = size
        self._fetch = fetch
        self._wait = wait
        self._explain = explain
        self._close = close
        self._receive = receive
        self._tail: Bytes | None = None
        self._blocks: Sequence[_Block] = ()
        self._starts: Sequence[int] = ()
        self._next = 0
        self._waiting = 0  # bytes that were asked for and are not read yet
        self._guard = threading.Lock()

    def announce(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Say which (start, end) will be read next, each once, roughly in this order."""
        self._drop()
        self._blocks = [*_blocks(sorted(stretch for stretch in stretches if stretch[0] < stretch[1]))]
        self._starts = [block.start for block in self._blocks]
        self._next = 0
        self._advance()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        while buffer:
            block = self._block_at(offset)
            if block is not None:
                size = min(len(buffer), block.end - offset)
                content = self._content(block)
                _copy(content, offset - block.start, buffer[:size])
                self._consumed(block, size)
            else:
                size = min(len(buffer), self._until_announced(offset))
                buffer[:size] = self._unannounced(offset, size)
            offset, buffer = offset + size, buffer[size:]

    def read_in_parallel(self, stretches: Sequence[tuple[int, int]], read: Callable[[Readable, int], object]) -> None:
        """Each stretch over a connection or in blocks of its own."""

        def read_one(number: int) -> None:
            with closing(_Stretch(self, *stretches[number])) as stretch:
                read(stretch, number)

        in_parallel([partial(read_one, number) for number in range(len(stretches))], _READERS)

    def map(self) -> memoryview | None:
        """None: it is not on this machine."""
        return None

    def __enter__(self) -> RemoteBlob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()
        self._close()

    def _block_at(self, offset: int) -> _Block | None:
        number = bisect_right(self._starts, offset) - 1
        block = self._blocks[number] if number >= 0 else None
        return block if block is not None and offset < block.end and not block.spent else None

    def _until_announced(self, offset: int) -> int:
        number = bisect_right(self._starts, offset)
        while number < len(self._blocks) and self._blocks[number].spent:
            number += 1
        return (self._starts[number] if number < len(self._blocks) else self.size) - offset or self.size

    def _unannounced(self, offset: int, size: int) -> memoryview:
        tail = max(0, self.size - _TAIL)
        if offset < tail:
            return memoryview(self._fetched(offset, size))
        with self._guard:
            pending = self._tail is None and self._fetch(tail, self.size - tail)
            if pending:
                self._tail = self._got(pending, tail, self.size - tail)
            found = self._tail or b""
        if offset + size > self.size:
            raise self._ended(self.size)
        return memoryview(found)[offset - tail : offset - tail + size]

    def _content(self, block: _Block) -> Bytes:
        with self._guard:
            if block.future is None:
                self._sweep()
                self._begin(block)
            future = block.future
        assert future is not None  # noqa: S101 - set by _begin
        return self._got(future, block.start, block.end - block.start)

    def _consumed(self, block: _Block, size: int) -> None:
        with self._guard:
            block.left -= size
            if block.left <= 0:
                self._free(block)
        self._advance()

    def _advance(self) -> None:
        with self._guard:
            while self._next < len(self._blocks):
                block = self._blocks[self._next]
                if block.future is None and not block.spent:
                    if self._waiting and self._waiting + block.end - block.start > _WINDOW:
                        return
                    self._begin(block)
                self._next += 1

    def _sweep(self) -> None:
        """Let go of blocks of which only what nobody asked for is left."""
        for block in self._blocks[: self._next]:
            if block.future is not None and not block.spent and block.left <= _CRUMBS < block.end - block.start:
                self._free(block)

    def _begin(self, block: _Block) -> None:
        block.future = self._fetch(block.start, block.end - block.start)
        self._waiting += block.end - block.start

    def _free(self, block: _Block) -> None:
        if not block.spent:
            block.spent, block.future = True, None
            self._waiting -= block.end - block.start

    def _drop(self) -> None:
        with self._guard:
            for block in self._blocks:
                if block.future is not None:
                    block.future.cancel()
                    self._free(block)
            self._blocks = self._starts = ()

    def _fetched(self, offset: int, size: int) -> Bytes:
        return self._got(self._fetch(offset, size), offset, size)

    def _got(self, future: Future[Bytes], offset: int, size: int) -> Bytes:
        try:
            found = self._wait(future)
        except CheckpointError as error:
            raise StorageError(f"can't read {self.name}: {error}") from None
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"{self.name} was deleted or replaced while it was read") from None
        except Exception as error:  # noqa: BLE001 - whatever a client library raises
            raise StorageError(f"can't read {self.name}: {self._explain(error)}") from None
        if len(found) != size:
            raise self._ended(offset + len(found))
        return found

    def _ended(self, at: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(self.name, "", f"ends at byte {at:,}, where more should follow")


class _Stretch:
    """A stretch of a file for one thread: received into its memory, or fetched in blocks."""

    def __init__(self, blob: RemoteBlob, start: int, end: int) -> None:
        self.name = blob.name
        self.size = blob.size
        self._blob = blob
        self._start = start
        self._end = end
        self._arriving = blob._receive(start, end - start)  # noqa: SLF001
        self._block: Bytes = b""
        self._block_start = start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self._arriving is not None:
            if self._arriving.read_into(offset, buffer):
                return
            self.close()
        while buffer:
            if not self._block_start <= offset < self._block_start + len(self._block):
                if not self._start <= offset < self._end:
                    self._blob.read_into(offset, buffer)
                    return
                size = min(_BLOCK, self._end - offset)
                self._block = b""  # two at a time would be twice the memory
                self._block, self._block_start = self._blob._fetched(offset, size), offset  # noqa: SLF001
            at = offset - self._block_start
            size = min(len(buffer), len(self._block) - at)
            _copy(self._block, at, buffer[:size])
            offset, buffer = offset + size, buffer[size:]

    def close(self) -> None:
        if self._arriving is not None:
            self._arriving.close()
            self._arriving = None


class _Block:
    __slots__ = ("end", "future", "left", "spent", "start")

    def __init__(self, start: int, end: int, wanted: int) -> None:
        self.start = start
        self.end = end
        self.left = wanted
        self.spent = False
        self.future: Future[Bytes] | None = None


def _blocks(stretches: Sequence[tuple[int, int]]) -> Iterable[_Block]:
    """The stretches, joined where they are close and cut at multiples of `_BLOCK`, as servers cut files too."""
    joined: list[list[tuple[int, int]]] = []
    for start, end in stretches:
        if joined and start - joined[-1][-1][1] <= _GAP:
            joined[-1].append((start, end))
        else:
            joined.append([(start, end)])
    for group in joined:
        first, last = group[0][0], group[-1][1]
        wanted = Counter[int]()
        for start, end in group:
            for number in range(start // _BLOCK, -(-end // _BLOCK)):
                wanted[number] += min(end, (number + 1) * _BLOCK) - max(start, number * _BLOCK)
        for number in range(first // _BLOCK, -(-last // _BLOCK)):
            yield _Block(max(number * _BLOCK, first), min((number + 1) * _BLOCK, last), wanted[number])


def _copy(content: Bytes, start: int, buffer: memoryview) -> None:
    """Fill `buffer` from `start`; where it is large, other threads run meanwhile: one receives what follows."""
    size = len(buffer)
    if size < _LARGE or type(content) is not bytes or start + size > len(content):
        buffer[:] = memoryview(content)[start : start + size]
        return
    source = ctypes.c_void_p.from_buffer(ctypes.c_char_p(content)).value or 0
    ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), source + start, size)
