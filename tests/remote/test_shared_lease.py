"""The lease of a run on a server: shared by a process, given back by whoever lets go of it last."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from seedvc_ckpt import CheckpointStore, LeaseHeldError
from seedvc_ckpt.storage import open_storage
from seedvc_ckpt.storage.shared_lease import PREFIX, LeaseRecord


@pytest.fixture
def place(weed, request):
    """A function that opens a storage on a place of the test's own, with a lease of a second."""
    url = weed.url(f"lease-{request.node.name}-{time.monotonic_ns()}")
    return lambda: open_storage(url, storage_options=weed.options, lease_seconds=1.0)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_lease_is_renewed_while_it_is_held(place):
    """Its file changes again and again; released, it says so, and the next epoch is one more."""
    lease = place().lease()
    first = LeaseRecord.newest(place())
    assert until(lambda: LeaseRecord.newest(place()).renewed > first.renewed + 1)
    lease.close()
    assert LeaseRecord.newest(place()).released
    again = place().lease()
    assert again.epoch == lease_epoch(place()) == first.epoch + 1
    assert list(place().names(PREFIX)) == [f"{PREFIX}{again.epoch:010d}"]
    again.close()


def lease_epoch(storage):
    return LeaseRecord.newest(storage).epoch


def test_a_forgotten_store_gives_its_lease_back(place):
    """The garbage collector may find it at any moment, also while another store takes the same lease."""
    for _ in range(4):
        store = CheckpointStore(place())
        store.acquire()
        other = CheckpointStore(place())
        thread = threading.Thread(target=other.acquire)
        thread.start()
        del store
        gc.collect()
        thread.join(30)
        assert not thread.is_alive()
        other.storage  # noqa: B018 - still referred to
        other._lease.check()
        other.close()
    del other
    gc.collect()
    assert until(lambda: LeaseRecord.newest(place()).released)


def test_a_holder_that_lost_its_lease_changes_nothing(place):
    """Taken by another epoch, it may neither save nor prune nor set aside, and says who has it now."""
    store = CheckpointStore(place())
    store.save({"a": 1}, 1)
    newest = LeaseRecord.newest(place())
    other = LeaseRecord.mine(newest.epoch + 1, 30.0)
    place().put_small(f"{PREFIX}{other.epoch:010d}", other.to_json(), create=True)
    before = {entry.name: entry.stat() for entry in place().list() if not entry.name.startswith(".")}
    for act in (
        lambda: store.save({"a": 2}, 2),
        lambda: store.save({"a": 2}, 1, overwrite=True),
        lambda: store.set_aside("DiT_epoch_00000_step_00001.pth", "why"),
        store.acquire,
    ):
        with pytest.raises(LeaseHeldError, match="was taken by process"):
            act()
    assert {entry.name: entry.stat() for entry in place().list() if not entry.name.startswith(".")} == before
    store.close()


def test_a_stale_writers_file_is_set_aside(place):
    """A checkpoint of an older epoch that came after the lease was taken makes room, also for one of its own name."""
    for late in (1, 7):  # the name that comes next, and a later step
        storage = place().below(str(late))
        with CheckpointStore(storage) as store:
            store.acquire()
            with CheckpointStore(storage.below("elsewhere")) as stale:
                stale.save({"a": "stale"}, late)
            content = _read(storage.below("elsewhere"), f"DiT_epoch_00000_step_{late:05d}.pth")
            newest = LeaseRecord.newest(storage)
            assert newest.epoch == 1
            record = LeaseRecord.mine(2, 30.0)  # as if this process had taken over from epoch 1
            storage.put_small(f"{PREFIX}{2:010d}", record.to_json(), create=True)
            store._lease._held.record = record
            storage.publish(f"DiT_epoch_00000_step_{late:05d}.pth", len(content), [memoryview(content)])
            info = store.save({"a": "mine"}, 1)
            assert [found.name for found in store.list()] == [info.name]
            assert store.load()["a"] == "mine"
            assert store.inspect().manifest.lease_epoch == 2
            assert [entry.name for entry in storage.below("aside").list() if entry.name.endswith(".pth")]


def _read(storage, name):
    from seedvc_ckpt.storage import read_file

    return read_file(storage, name)


def test_an_unreadable_lease_is_held(place):
    """Whatever stands in the file of the newest epoch is watched: silent for its time, it is followed."""
    storage = place()
    storage.put_small(f"{PREFIX}{41:010d}", b"not json", create=True)
    record = LeaseRecord.newest(storage)
    assert (record.epoch, record.released, record.known_process) == (41, False, None)
    storage.put_small(f"{PREFIX}{42:010d}", b'{"seconds": 0.5}', create=True)
    lease = storage.lease()
    assert lease.epoch == 43
    lease.close()
