"""Several writers at one run on a server, with stalls, kills and short leases."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

from seedvc_ckpt import CheckpointStore, LeaseHeldError
from seedvc_ckpt.storage import open_storage

WRITER = Path(__file__).with_name("writer.py")


class Writer:
    """A process of `writer.py`, and the lines that it has told."""

    def __init__(self, **arguments):
        command = [sys.executable, str(WRITER), json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.told = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.told.append(json.loads(line))

    def wait_for_anything(self):
        """Return when it has told something, so that it runs."""
        self.wait_for(None)

    def wait_for(self, event, seconds=60):
        """The first such line, or the first at all."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            for line in list(self.told):
                if event in (line["event"], None):
                    return line
            time.sleep(0.02)
        raise AssertionError((self.told, self.process.poll() is not None and self.process.stderr.read()))

    def kill(self, how=signal.SIGKILL):
        """End it, and return its lines."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return self.told


def epochs(writers, gone):
    """The leases that were told of so far."""
    lines = [line for told in (*gone, *(list(writer.told) for writer in writers)) for line in told]
    return {line["epoch"] for line in lines if line["event"] == "lease"}


def disturb(writers, gone, arguments, chance, seconds):
    """Stop and kill writers at random, for so long and until some leases were taken; returns how often."""
    count, timers = 0, []
    for writer in writers:
        writer.wait_for_anything()
    end = time.monotonic() + seconds
    latest = end + 60  # on a busy machine
    while time.monotonic() < end or (len(epochs(writers, gone)) < 4 and time.monotonic() < latest):
        time.sleep(chance.uniform(0.1, 0.8))
        number = chance.randrange(len(writers))
        count += 1
        if chance.random() < 0.3:
            gone.append(writers[number].kill())
            writers[number] = Writer(**arguments)
        else:
            holders = [writer for writer in writers if writer.told and writer.told[-1]["event"] in ("lease", "saved")]
            victim = chance.choice(holders or writers).process
            victim.send_signal(signal.SIGSTOP)
            timers.append(threading.Timer(chance.uniform(1.5, 2.5), victim.send_signal, (signal.SIGCONT,)))
            timers[-1].start()
    for timer in timers:
        timer.join()
    return count


def test_stale_writers_change_nothing(remote, chance, full, tally):
    """Five writers with leases of a second, stopped and killed at random.

    No two have one epoch, what was acknowledged is there as it was saved, and somebody always goes on.
    """
    url, options = remote
    arguments = {"do": "contend", "url": url, "options": options, "size": 1000}
    writers, gone = [Writer(**arguments) for _ in range(5)], []
    disturbances = disturb(writers, gone, arguments, chance, 120 if full else 12)
    last = Writer(**arguments)
    gone += [writer.kill() for writer in writers]
    last.wait_for("saved")
    gone.append(last.kill())

    owners, failures = defaultdict(set), []
    acknowledged, taken = {}, {}
    for number, told in enumerate(gone):
        for line in told:
            if line["event"] == "lease":
                owners[line["epoch"]].add(number)
                taken[line["epoch"]] = line["at"]
            elif line["event"] == "saved":
                acknowledged[line["step"], line["epoch"]] = line["at"]
            elif line["event"] == "failed":
                failures.append(line["why"])
    assert all(len(numbers) == 1 for numbers in owners.values()), owners
    assert len(owners) > 2, gone
    for epoch in owners:
        followed = min((at for later, at in taken.items() if later > epoch), default=float("inf"))
        late = [step for (step, of), at in acknowledged.items() if of == epoch and at > followed]
        assert len(late) <= 1, f"epoch {epoch} saved {late} after another had the lease"
    store = CheckpointStore(url, storage_options=options, read_only=True)
    found = {}
    aside = store.storage.below("aside")
    for place in (store.storage, aside):
        files = CheckpointStore(place, read_only=True)
        for info in files.list():
            files.verify(info)
            found[info.step, files.inspect(info).manifest.lease_epoch] = info
    assert set(acknowledged) <= set(found), (set(acknowledged) - set(found), failures)
    assert [info.step for info in store.list()] == sorted({info.step for info in store.list()})
    tally.record(
        cases=disturbances,
        promise="8",
        storage=url.partition(":")[0],
        how=f"5 writers, leases of 1 s, stalled and killed: {len(owners)} epochs, {len(acknowledged)} saves",
    )


def test_a_second_writer_is_told_who_is_first(remote):
    """On this machine at once, by process and host; with the first killed, the second goes on at once."""
    url, options = remote
    first = Writer(do="save_on", url=url, options=options, size=1000)
    saved = first.wait_for("saved")
    store = CheckpointStore(url, storage_options=options)
    began = time.monotonic()
    with pytest.raises(LeaseHeldError, match=f"process {first.process.pid} on "):
        store.save({"a": 1}, 1_000_000)
    assert time.monotonic() - began < 10
    assert str(first.process.pid) in store.storage.holder()
    first.kill()
    assert store.latest().step >= saved["step"]
    with store:
        store.save({"a": 1}, 1_000_000)
    assert store.storage.holder() == ""


def test_a_holder_elsewhere_is_watched(remote):
    """One that renews its lease is told of; one that is silent for as long as it said is followed."""
    url, options = remote
    first = Writer(do="contend", url=url, options=options, size=1000)
    first.wait_for("saved")
    second = CheckpointStore(open_storage(url, storage_options=options, lease_seconds=1.0))
    with pytest.raises(LeaseHeldError, match=f"process {first.process.pid} on "):
        second.acquire()
    first.kill()
    with second:
        second.acquire()
        newest = second.latest().step if second.latest() else 0
        assert second.save({"a": 1}, newest + 1).step == newest + 1
