"""The right to write to a run on a server: one process at a time, shown by files that can't be created twice.

Whoever wants the lease creates the file of the next epoch, which only one can. The newest file's writer has the lease;
it rewrites the file again and again, and whoever sees it unchanged for the time that it says, by his own clock, may go
on to the next epoch. A holder that was stalled or cut off looks, before each change, whether its file is still the
newest. Only the holder removes older files, and nobody ever removes the newest: so no epoch comes twice.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone

from seedvc_ckpt.errors import CheckpointError, LeaseHeldError
from seedvc_ckpt.storage.leftovers import process_start, this_machine
from seedvc_ckpt.storage.promises import SmallFiles

__all__ = ["LeaseRecord", "SharedLease", "current_holder"]

_log = logging.getLogger(__name__)

PREFIX = ".seedvc_ckpt.lease."
_RENEWALS = 4  # within the time that a lease lasts
_AT_EXIT = 5.0  # seconds to say that the lease is free


@dataclass(frozen=True)
class LeaseRecord:
    """What the file of an epoch says.

    Attributes:
        epoch: Larger for each holder.
        host: Its machine.
        machine: Other for each boot and each container: within one, a process that is gone is known to be gone.
        process: Its number.
        start: When it started, in clock ticks since boot.
        since: When it took the lease.
        seconds: For so long it may be silent.
        token: Other for each time that it is taken.
        renewed: How often it was renewed.
        released: Whether it was given back.
    """

    epoch: int
    host: str
    machine: str
    process: int
    start: str
    since: str
    seconds: float
    token: str
    renewed: int = 0
    released: bool = False

    @classmethod
    def mine(cls, epoch: int, seconds: float) -> LeaseRecord:
        """That of this process."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        start = process_start(os.getpid()) or "0"
        return cls(epoch, platform.node(), this_machine(), os.getpid(), start, now, seconds, uuid.uuid4().hex)

    @classmethod
    def newest(cls, files: SmallFiles) -> LeaseRecord | None:
        """The record of the newest epoch; None where nobody ever had the lease."""
        while True:
            epoch = newest_epoch(files)
            if epoch is None:
                return None
            content = files.read_small(_name(epoch))
            if content is not None:
                return cls._read(epoch, content)
            # a newer holder has just removed it

    @classmethod
    def _read(cls, epoch: int, content: bytes) -> LeaseRecord:
        unknown = cls(epoch, "?", "", 0, "0", "?", 30.0, content.hex()[:64])
        try:
            found = json.loads(content)
            record = replace(unknown, **{name: type(value)(found[name]) for name, value in asdict(unknown).items()})
        except (ValueError, KeyError, TypeError):
            return unknown
        return replace(record, epoch=epoch, seconds=min(max(record.seconds, 0.1), 3600.0))

    @property
    def holder(self) -> str:
        """Who, for people."""
        return f"process {self.process} on {self.host}, since {self.since}"

    @property
    def known_process(self) -> str | None:
        """Within this machine and container "alive" or "dead"; None for others, and where it is not known."""
        if not self.machine or self.machine != this_machine() or self.start == "0":
            return None
        return "alive" if process_start(self.process) == self.start else "dead"

    @property
    def ours(self) -> bool:
        """Whether this process wrote it."""
        return self.process == os.getpid() and self.known_process == "alive"

    def to_json(self) -> bytes:
        """As it stands in the file."""
        return (json.dumps(asdict(self)) + "\n").encode()


class SharedLease:
    """A share in this process's lease on a run, until `release`."""

    def __init__(self, held: _Held) -> None:
        self._held: _Held | None = held

    @classmethod
    def take(cls, files: SmallFiles, seconds: float) -> SharedLease:
        """Take the lease, or share the one that this process has.

        Raises:
            LeaseHeldError: if another process has it; a holder on another machine is watched until it shows life.
            StorageError: if the store can't be written.
        """
        with _guard:
            lock = _locks.setdefault(files.location, threading.Lock())
        with lock:
            held = _all_held.get(files.location)
            if held is None or held.settled():
                given_back = held.record.token if held else ""
                held = _all_held[files.location] = _Held(files, _acquire(files, seconds, given_back), lock)
            held.shares += 1
        held.settle()
        return cls(held)

    @property
    def epoch(self) -> int | None:
        """Larger for each holder."""
        return self._held.record.epoch if self._held else None

    def check(self) -> None:
        """Ask the store whether the lease is still ours.

        Raises:
            LeaseHeldError: if another process has taken it.
            StorageError: if that can't be asked.
        """
        if self._held is None or self._held.record.process != os.getpid():
            raise LeaseHeldError(
                "this process has no lease on the run: it was released, or belongs to a parent process"
            )
        self._held.check()

    def release(self) -> None:
        """Give the share back; with the last one the lease ends, in a thread of its own."""
        # may be called by the garbage collector, in the thread that does the talking: never wait here
        held, self._held = self._held, None
        if held is not None and held.record.process == os.getpid():
            held.give_back()

    def close(self) -> None:
        """`release`, and wait until the store knows it."""
        held = self._held
        self.release()
        if held is not None and held.ended and held.record.process == os.getpid():
            held.thread.join(_AT_EXIT)


class _Held:
    """The lease that this process holds on a run, renewed by a thread."""

    def __init__(self, files: SmallFiles, record: LeaseRecord, lock: threading.Lock) -> None:
        self.files = files
        self.record = record
        self.shares = 0
        self.ended = False
        self._lock = lock
        self._returned: deque[None] = deque()
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._keep, name="seedvc-ckpt lease", daemon=True)
        self.thread.start()

    def check(self) -> None:
        if newest_epoch(self.files) != self.record.epoch:
            by = LeaseRecord.newest(self.files)
            raise LeaseHeldError(
                f"this process was silent for more than {self.record.seconds:.0f} s, and the lease on "
                f"{self.files.location} was taken by {by.holder if by else 'nobody known'}: nothing was changed. Stop "
                "one of the two"
            )

    def give_back(self) -> None:
        # perhaps by the garbage collector, in the middle of anything: whoever holds the lock settles it afterwards
        self._returned.append(None)
        self.settle()

    def settle(self) -> None:
        """Take back the shares that were returned, unless somebody is at it, who then sees them."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self.settled()
            finally:
                self._lock.release()

    def settled(self) -> bool:
        """Take back the shares that were returned; whether none is left. The caller has the lock."""
        while self._returned:
            self._returned.popleft()
            self.shares -= 1
        if self.shares == 0:
            self.ended = True
            self._stop.set()
        return self.ended

    def _keep(self) -> None:
        record = self.record
        while not self._stop.wait(record.seconds / _RENEWALS):
            record = replace(record, renewed=record.renewed + 1)
            try:
                self.check()
                self.files.put_small(_name(record.epoch), record.to_json(), create=False)
            except LeaseHeldError as error:
                _log.warning("%s", error)
                return
            except (CheckpointError, OSError) as error:
                _log.warning("the lease on %s could not be renewed: %s", self.files.location, error)
        with suppress(CheckpointError, OSError, RuntimeError):  # else it runs out; RuntimeError: the process ends
            if newest_epoch(self.files) == record.epoch:
                self.files.put_small(_name(record.epoch), replace(record, released=True).to_json(), create=False)


_guard = threading.Lock()
_locks: dict[str, threading.Lock] = {}
_all_held: dict[str, _Held] = {}


def _forget_in_child() -> None:
    global _guard  # noqa: PLW0603
    _guard = threading.Lock()
    _locks.clear()
    _all_held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@atexit.register
def _release_all() -> None:
    for held in list(_all_held.values()):
        held.ended = True
        held._stop.set()  # noqa: SLF001
    for held in list(_all_held.values()):
        held.thread.join(_AT_EXIT)


def current_holder(files: SmallFiles) -> str:
    """Who has the lease on a run now, for people; "" for nobody, and for this process."""
    record = LeaseRecord.newest(files)
    return record.holder if record is not None and not record.released and not record.ours else ""


def newest_epoch(files: SmallFiles) -> int | None:
    """The newest epoch of a run; None where nobody ever had its lease."""
    epochs = [name[len(PREFIX) :] for name in files.names(PREFIX)]
    return max((int(epoch) for epoch in epochs if epoch.isascii() and epoch.isdecimal()), default=None)


def _acquire(files: SmallFiles, seconds: float, given_back: str) -> LeaseRecord:
    """Take the next epoch; `given_back` is the token of a lease of this process that may not say so yet."""
    while True:
        newest = LeaseRecord.newest(files)
        free = newest is None or newest.released or newest.token == given_back or newest.known_process == "dead"
        if newest is not None and not free:
            _wait_for_silence(files, newest)
        record = LeaseRecord.mine(newest.epoch + 1 if newest else 1, seconds)
        try:
            files.put_small(_name(record.epoch), record.to_json(), create=True)
        except FileExistsError:
            continue
        if newest_epoch(files) != record.epoch:
            # the name was free because two others came and went while this process slept: the newer one has it
            with suppress(FileNotFoundError):
                files.delete(_name(record.epoch))
            continue
        for name in files.names(PREFIX):
            if name < _name(record.epoch):
                with suppress(FileNotFoundError):
                    files.delete(name)
        return record


def _wait_for_silence(files: SmallFiles, seen: LeaseRecord) -> None:
    """Return when the holder has been silent for so long as it said; raise LeaseHeldError when it shows life."""
    told = time.monotonic()
    newest: LeaseRecord | None = seen
    while seen.known_process != "alive":
        if newest != seen:
            if newest is None or newest.released:
                return
            seen = newest
            break
        if time.monotonic() - told > seen.seconds:
            return
        time.sleep(min(1.0, seen.seconds / 10))
        newest = LeaseRecord.newest(files)
    raise LeaseHeldError(
        f"another process is writing to {files.location}: {seen.holder}. One run has one writer: stop that one, or use "
        "another location. Reading needs no lease"
    )


def _name(epoch: int) -> str:
    return f"{PREFIX}{epoch:010d}"
