"""Records read side by side: small ones together, large ones in pieces, each compared with its checksum."""

from __future__ import annotations

import itertools
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import states
import torch
from hypothesis import given
from hypothesis import strategies as st

from seedvc_ckpt import CorruptCheckpointError
from seedvc_ckpt.format import archive as archives
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.format.checksum import combined
from seedvc_ckpt.threads import in_parallel


class Tracking(states.Memory):
    """Remembers which bytes were read; its stretches are read at the same time."""

    def __init__(self, data):
        super().__init__(data)
        self.stretches, self.read, self._guard = [], [], threading.Lock()

    def read_into(self, offset, buffer):
        with self._guard:
            self.read.append((offset, offset + len(buffer)))
        super().read_into(offset, buffer)

    def read_in_parallel(self, stretches, read):
        self.stretches = stretches
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(read, self, number) for number in range(len(stretches))]:
                done.result()


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_a_checksum_is_that_of_its_pieces(first, second):
    assert combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


_crcs, _sizes = st.integers(0, (1 << 32) - 1), st.integers(0, 1 << 40)


@given(_crcs, _crcs, _crcs, _sizes, _sizes)
def test_large_pieces_may_be_joined_in_any_order(one, two, three, second, third):
    """Sizes that no test has the memory for."""
    assert combined(combined(one, two, second), three, third) == combined(
        one, combined(two, three, third), second + third
    )


def test_a_long_piece():
    assert combined(zlib.crc32(b"seed"), zlib.crc32(bytes(40 << 20)), 40 << 20) == zlib.crc32(b"seed" + bytes(40 << 20))


@pytest.fixture(params=[1000, 4096, 1 << 20])
def small_pieces(request, monkeypatch):
    monkeypatch.setattr(archives, "_STRETCH", request.param)
    monkeypatch.setattr(archives, "_SHORTEST", request.param)
    monkeypatch.setattr(archives, "_CHUNK", 700)
    return request.param


def mixed_state():
    torch.manual_seed(0)
    sizes = (0, 1, 70, 3000, 5, 4096, 1024, 1025, 20_000, 17, 0)
    return {f"w{number}": torch.randn(size) for number, size in enumerate(sizes)}


@pytest.mark.parametrize("made", [states.save, states.stock_save])
def test_every_byte_is_read_once_whatever_the_pieces(made, small_pieces):
    """Files of ours and of torch; a stretch is read from front to back, and no longer than it may be."""
    data, state = made(mixed_state()), mixed_state()
    source = Tracking(data)
    archive = Archive.open(source)
    found = {name: bytearray(archive.records[name].size) for name in archive.records}
    done, counted = [], []
    source.read.clear()
    archive.read_records(archive.records, lambda name: memoryview(found[name]), done.append, progress=counted.append)
    read = sorted(source.read)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(read))
    assert sorted(done) == sorted(archive.records)
    assert sum(counted) == sum(record.size for record in archive.records.values())
    for name, content in found.items():
        assert content == archive.content(name, 1 << 20)
    largest = max(record.size for record in archive.records.values())
    for start, end in source.stretches:
        assert end - start <= small_pieces + 200 or (not archive.ours and end - start <= largest + 200)
    loaded = states.load(data)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_damage_in_any_piece_is_found(small_pieces):
    """One bit anywhere in a record that is read in pieces, into memory or in passing; without checks it is loaded."""
    data = states.save(mixed_state())
    archive = states.opened(data)
    record = next(name for name, found in archive.records.items() if found.size == 80_000)
    for place in (0, 999, 1000, 4095, 4096, 40_000, 79_999):
        damaged = bytearray(data)
        damaged[archive.data_offset(record) + place] ^= 1
        with pytest.raises(CorruptCheckpointError, match=r"\(w8\)"):
            states.load(damaged)
        with pytest.raises(CorruptCheckpointError, match=record):
            states.verify(damaged)
        assert states.load(damaged, verify=False)["w8"].numel() == 20_000


def test_a_record_is_done_once_and_checked_before(monkeypatch):
    """What is damaged is never handed over."""
    monkeypatch.setattr(archives, "_STRETCH", 1000)
    data = bytearray(states.save({"good": torch.ones(600), "bad": torch.ones(5000)}))
    archive = states.opened(data)
    data[archive.data_offset("data/1") + 19_000] ^= 1
    done = []
    with pytest.raises(CorruptCheckpointError, match="data/1"):
        states.opened(data).read_records(["data/0", "data/1"], done=done.append)
    assert done == ["data/0"]


def test_neighbours_are_read_together_and_gaps_are_left_out():
    """Records of which the ones between are not wanted don't make one stretch with them."""
    tensor = torch.zeros(50_000)
    source = Tracking(states.save({f"w{number}": tensor + number for number in range(12)}))
    archive = Archive.open(source)
    archive.read_records(["data/0", "data/1", "data/2", "data/7", "data/8"])
    assert len(source.stretches) == 2
    assert sum(end - start for start, end in source.stretches) < 5.01 * tensor.nbytes


def test_an_interruption_ends_all_stretches_soon(monkeypatch):
    """Whoever pressed Ctrl-C does not wait until the others have read theirs."""
    monkeypatch.setattr(archives, "_CHUNK", 1000)
    source = Tracking(states.save({f"w{number}": torch.ones(500_000) for number in range(12)}))
    archive, threads, interrupted = Archive.open(source), set(), []

    def progress(_):
        threads.add(threading.get_ident())
        if len(threads) == 2 and not interrupted:
            interrupted.append(len(source.read))
            raise KeyboardInterrupt

    def two_at_a_time(stretches, read):
        in_parallel([partial(read, source, number) for number in range(len(stretches))], 2)

    source.read_in_parallel = two_at_a_time
    with pytest.raises(KeyboardInterrupt):
        archive.read_records(archive.records, progress=progress)
    assert len(source.read) - interrupted[0] < 100
