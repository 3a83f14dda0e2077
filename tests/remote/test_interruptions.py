"""Writers that are killed and interrupted while they send a checkpoint."""

from __future__ import annotations

import json
import os
import select
import signal
import time

import pytest
import torch
import writer

from seedvc_ckpt import CheckpointStore, keep_last
from seedvc_ckpt.storage import open_storage
from seedvc_ckpt.storage.leftovers import is_temporary

SIZE = 5_500_000  # floats: two parts of an upload


class Child:
    """A fork of this process that saves step after step, and can be killed."""

    def __init__(self, url, options):
        self._told, tell = os.pipe()
        self.process = os.fork()
        if self.process:
            os.close(tell)
            self._lines = b""
            return
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with CheckpointStore(url, storage_options=options, retention=keep_last(2)) as store:
                step = store.latest().step if store.latest() else 0
                while True:
                    step += 1
                    os.write(tell, b"b")
                    store.save(writer.state(step, SIZE), step)
                    os.write(tell, b"s")
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)

    def wait_until_saving(self):
        """Return when a save has begun that no other will follow before the lease is taken."""
        while not self._lines:
            ready, _, _ = select.select([self._told], [], [], 60)
            assert ready, "nothing was begun within a minute"
            self._lines = os.read(self._told, 1000)
            assert self._lines, "the writer ended"

    def end(self, how):
        """Send a signal; returns the exit status and how many saves were acknowledged."""
        os.kill(self.process, how)
        status = os.waitpid(self.process, 0)[1]
        while found := os.read(self._told, 1000):
            self._lines += found
        os.close(self._told)
        return os.waitstatus_to_exitcode(status), self._lines.count(b"s")


def settled(look):
    """What is seen when a server has done what it was asked for by a client that is gone."""
    before, found = None, look()
    while found != before:
        time.sleep(0.2)
        before, found = found, look()
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_save_publishes_nothing(how, remote, chance, full, tally):
    """Whatever is listed is complete, what was acknowledged is there, and the next writer goes on."""
    url, options = remote
    store = CheckpointStore(url, storage_options=options, read_only=True)
    cases = 60 if full else 6
    reached = in_flight = 0
    for _ in range(cases):
        child = Child(url, options)
        child.wait_until_saving()
        time.sleep(chance.uniform(0.0, 0.8))
        code, acknowledged = child.end(how)
        assert code == (130 if how == signal.SIGINT else -how)
        infos = settled(store.list)
        newest = infos[-1].step if infos else 0
        # the request that was under way when it was killed may have made one more appear
        assert newest in (reached + acknowledged, reached + acknowledged + 1)
        in_flight += newest == reached + acknowledged
        for info in infos:
            store.verify(info)
        if infos:
            state = store.load(infos[-1])
            assert state["step"] == newest
            assert torch.equal(state["net"]["cfm"]["w"], torch.full((SIZE,), float(newest)))
        reached = newest
    with CheckpointStore(url, storage_options=options) as last:
        last.save(writer.state(reached + 1, SIZE), reached + 1)
        assert last.storage.leftovers() in ([], ())
    assert not [entry.name for entry in open_storage(url, storage_options=options).list() if ".tmp-" in entry.name]
    assert in_flight
    tally.record("2", url.partition(":")[0], f"{how.name} of a writer during an upload, the next one goes on", cases)


def test_uploads_of_dead_writers_are_found(weed, chance):
    """S3 keeps the parts of an upload that nobody completes: gc aborts them, of dead writers only."""
    for number in range(20):
        url, options = weed.url(f"uploads-{number}-{chance.random()}"), weed.options
        storage = open_storage(url, storage_options=options)
        child = Child(url, options)
        child.wait_until_saving()
        time.sleep(chance.uniform(0, 0.3))
        while not any(is_temporary(entry.name) for entry in storage.list()):  # an upload that is announced
            time.sleep(0.01)
        assert storage.leftovers() == []
        child.end(signal.SIGKILL)
        uploads, leftovers = settled(lambda storage=storage: (_uploads(storage), storage.leftovers()))
        if leftovers:
            break
    assert uploads
    assert "is gone" in leftovers[0].why
    assert len(CheckpointStore(url, storage_options=options).collect_garbage()) == 1
    assert (_uploads(storage), storage.leftovers()) == ([], [])


def test_a_failed_upload_is_aborted(weed, chance):
    """An error or an interruption in the middle leaves no parts behind that somebody pays for."""
    storage = open_storage(weed.url(f"aborted-{chance.random()}"), storage_options=weed.options)
    for error in (ValueError("stopped"), KeyboardInterrupt()):

        def chunks(error=error):
            yield memoryview(bytes(20 << 20))
            assert _uploads(storage)
            raise error

        with pytest.raises(type(error)):
            storage.publish("a", 40 << 20, chunks())
        assert (_uploads(storage), list(storage.list())) == ([], [])


def _uploads(storage):
    found = storage._client.fs.call_s3("list_multipart_uploads", Bucket=storage._bucket._name, Prefix=storage._prefix)
    return [upload["UploadId"] for upload in found.get("Uploads", ())]


def test_an_upload_that_could_not_be_aborted_is_found_later(weed, chance):
    """Its announcement stays until gc has aborted it; one that names an upload elsewhere is only removed."""
    url = weed.url(f"left-{chance.random()}")
    storage = open_storage(url, storage_options=weed.options)
    other = open_storage(weed.url("neighbour"), storage_options=weed.options)
    begun = other._client.run(other._bucket.begin(f"{other._prefix}a", 1, "id", None))

    class NeverAborted:
        """The bucket, whose uploads refuse to be aborted."""

        def __getattr__(self, name):
            return getattr(storage._bucket, name)

        async def begin(self, *arguments):
            upload = await storage._bucket.begin(*arguments)
            upload.abort = self._refuse
            return upload

        async def _refuse(self):
            raise OSError("no")

    broken = open_storage(url, storage_options=weed.options)
    broken._bucket = NeverAborted()

    def chunks():
        yield memoryview(bytes(20 << 20))
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        broken.publish("a", 40 << 20, chunks())
    announced = [entry.name for entry in storage.list()]
    assert len(announced) == len(_uploads(storage)) == 1
    assert storage.leftovers() == []  # this process lives
    name = announced[0].replace(f"-{os.getpid()}-", "-1-", 1)
    storage.publish(name, 0, [])
    record = storage.read_small(announced[0])
    storage.put_small(name, record, create=False)
    far = {"key": f"{other._prefix}a", "upload": begun.id}
    storage.put_small(name.replace(".tmp-", ".tmp-0", 1)[:21] + name[21:], json.dumps(far).encode(), create=False)
    for leftover in storage.leftovers():
        storage.remove_leftover(leftover)
    assert _uploads(storage) == []
    assert _uploads(other) == [begun.id]
    other._client.run(begun.abort())
