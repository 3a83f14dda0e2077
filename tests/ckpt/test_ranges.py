"""A file on a server, read in ranges: what is fetched, when, and how much of it waits in memory."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from seedvc_ckpt import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from seedvc_ckpt.storage.ranges import RemoteBlob
from seedvc_ckpt.threads import in_parallel

SIZE = 300 << 20
BLOCK, WINDOW = 16 << 20, 96 << 20
_PERIOD = bytes(random.Random(0).randrange(256) for _ in range(251))


def content(start, end):
    """Bytes that tell where they are from."""
    first = start % len(_PERIOD)
    return (_PERIOD * ((end - start) // len(_PERIOD) + 2))[first : first + end - start]


class Served:
    """A `RemoteBlob` whose fetches are counted."""

    def __init__(self, size=SIZE, fail=None):
        self.fetched, self.waiting, self.most = [], 0, 0
        self._guard = threading.Lock()
        self._pool = ThreadPoolExecutor(4)
        self._fail = fail
        self.blob = RemoteBlob("f", size, self._fetch, Future.result, str)

    def _fetch(self, offset, size):
        self.fetched.append((offset, offset + size))
        with self._guard:
            self.waiting += size
            self.most = max(self.most, self.waiting)
        return self._pool.submit(self._serve, offset, size)

    def _serve(self, offset, size):
        if self._fail:
            raise self._fail
        return content(offset, offset + size)

    def read(self, start, end):
        buffer = bytearray(end - start)
        self.blob.read_into(start, memoryview(buffer))
        with self._guard:
            self.waiting -= end - start
        return bytes(buffer)


def test_announced_bytes_are_fetched_once_and_little_of_them_waits():
    """Read by two threads in pieces, each byte comes over once, and never more than a window of them is ahead."""
    served = Served()
    step = 3_000_000
    stretches = [(start, min(start + step, SIZE)) for start in range(0, SIZE - (1 << 20), step)]
    served.blob.announce(stretches)

    def read(start, end):
        for at in range(start, end, 1 << 20):
            stop = min(at + (1 << 20), end)
            assert served.read(at, stop) == content(at, stop)

    in_parallel([lambda stretch=stretch: read(*stretch) for stretch in stretches], threads=2)
    assert sum(end - start for start, end in served.fetched) == SIZE
    assert served.most <= WINDOW + 3 * BLOCK
    assert served.blob._waiting == 0
    assert len(served.fetched) <= SIZE // BLOCK + 1


def test_only_what_is_announced_is_fetched():
    """Stretches far from each other are fetched without what is between, close ones together."""
    served = Served()
    stretches = [(0, 1000), (1100, 5000), (50 << 20, 51 << 20), (200 << 20, 210 << 20)]
    served.blob.announce(stretches)
    for start, end in reversed(stretches):
        assert served.read(start, end) == content(start, end)
    assert min(served.fetched) == (0, 5000)
    assert sum(end - start for start, end in served.fetched) == 5000 + (11 << 20)


def test_what_nobody_reads_does_not_hold_up_the_rest():
    """Headers that were announced and not read again are let go of when room is needed."""
    served = Served()
    served.blob.announce([(0, SIZE - (1 << 20))])
    for start in range(0, SIZE - (1 << 20), BLOCK):
        end = min(start + BLOCK, SIZE - (1 << 20))
        assert served.read(start + 100, end) == content(start + 100, end)
        assert served.blob._waiting <= WINDOW + BLOCK
    assert sum(end - start for start, end in served.fetched) == SIZE - (1 << 20)


def test_the_end_is_fetched_once():
    """Directory, manifest and pickle, which stand at the end, come with one request."""
    served = Served()
    for start, end in ((SIZE - 22, SIZE), (SIZE - 5000, SIZE - 22), (SIZE - 200_000, SIZE - 150_000)):
        assert served.read(start, end) == content(start, end)
    assert served.fetched == [(SIZE - (256 << 10), SIZE)]
    with pytest.raises(CorruptCheckpointError, match="ends at byte"):
        served.read(SIZE - 10, SIZE + 10)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(FileNotFoundError("f"), CheckpointNotFoundError), (OSError("reset"), StorageError), (ValueError(), StorageError)],
)
@pytest.mark.parametrize("announced", [False, True])
def test_a_fetch_that_fails_says_so(announced, raised, expected):
    """What was deleted is not found, every other failure is the storage's, and none is taken for damage."""
    served = Served(fail=raised)
    if announced:
        served.blob.announce([(0, 5000)])
    with served.blob, pytest.raises(expected):
        served.read(0, 1000)


def test_a_short_answer_is_damage():
    """Fewer bytes than the file is said to have."""
    blob = RemoteBlob("f", 1 << 20, lambda offset, size: _done(bytes(size - 1)), Future.result, str)
    with pytest.raises(CorruptCheckpointError):
        blob.read_into(0, memoryview(bytearray(1000)))


def _done(value):
    future = Future()
    future.set_result(value)
    return future


@pytest.mark.parametrize("size", [1, 1000, 64 << 10, (64 << 10) + 1, 3 << 20])
def test_any_piece_of_what_arrived_is_handed_over(size):
    """Small and large pieces, from any place, and nothing beyond the piece is touched."""
    served = Served()
    served.blob.announce([(0, 2 * BLOCK)])
    for start in (0, 7, BLOCK - 5, 2 * BLOCK - size):
        buffer = bytearray(b"\xaa" * (size + 20))
        served.blob.read_into(start, memoryview(buffer)[10 : 10 + size])
        assert buffer[10 : 10 + size] == content(start, start + size)
        assert bytes(buffer[:10] + buffer[10 + size :]) == b"\xaa" * 20
