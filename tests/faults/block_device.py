"""A disk that logs what it is told to write and when to flush, and the states that a power cut could leave it in.

A FUSE file system shows one file, ``disk.img``, which a loop device makes a disk of. Every write and every flush is
logged in order, and so are marks, which the workload sets by writing to the file ``marks`` beside it. What was written
before a flush is on the disk; of what was written after the last one, a power cut keeps whatever it likes.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = [
    "CrashPoint",
    "Recording",
    "fuse_server",
    "make_image",
    "missing",
    "mounted",
    "recorder",
    "unmount",
    "workspace",
]

_SECTOR = 512
_HEADER = struct.Struct("<cQI")
_WRITE, _FLUSH, _MARK = b"W", b"F", b"M"
_MKFS = {
    "ext4": (
        48,
        ["mkfs.ext4", "-q", "-F", "-b", "4096", "-N", "128", "-J", "size=4", "-E", "lazy_itable_init=0", "-m", "0"],
    ),
    "xfs": (48, ["mkfs.xfs", "-q", "-f", "--unsupported", "-l", "size=6m"]),  # supported ones are 300 MB and more
    "btrfs": (128, ["mkfs.btrfs", "-q", "-f", "-m", "single"]),
}
_OPTIONS = {"xfs": ",nouuid"}
# ext4 does not mount when the two sectors of its superblock, which it checks by a checksum, are torn from each other
# ("invalid superblock checksum"); it writes them when it is mounted and unmounted, and no program can do anything
# about it, so the second of them is kept or lost as the first is
_WHOLE = {"ext4": 3}


@dataclass(frozen=True)
class Event:
    """One line of the log: a write, a flush, or a mark."""

    kind: bytes
    offset: int
    data: memoryview


@dataclass(frozen=True)
class CrashPoint:
    """The power goes before event `at`; `kept` says what becomes of the writes since the last flush before it."""

    at: int
    kept: str
    seed: int = 0

    def __str__(self) -> str:
        return f"power cut before event {self.at}, of the writes not flushed: {self.kept} (seed {self.seed})"


class Recording:
    """What a workload made a disk do, from the image that the disk began with."""

    def __init__(self, kind: str, folder: str, base: str, log: str) -> None:
        self.kind = kind
        self._folder = folder
        self._base = base
        self.events = _read_log(log)

    def marks(self, at: int | None = None) -> list[str]:
        """The marks set before an event."""
        return [bytes(event.data).decode() for event in self.events[:at] if event.kind == _MARK]

    def least(self) -> list[CrashPoint]:
        """A crash after each flush and mark, from the first mark on, with nothing that was written since the flush."""
        kinds = [event.kind for event in self.events]
        first = kinds.index(_MARK)
        return [CrashPoint(place + 1, "nothing") for place in range(first, len(kinds)) if kinds[place] != _WRITE]

    def points(self, count: int, chance: random.Random) -> list[CrashPoint]:
        """`count` different places to crash at, ascending: around each mark first, then anywhere."""
        marks = [place for place, event in enumerate(self.events) if event.kind == _MARK]
        ends = [*marks, len(self.events)]
        found = dict.fromkeys(CrashPoint(place + 1, "nothing") for place in marks)
        found.update(dict.fromkeys(CrashPoint(place, "all") for place in ends))
        if len(found) > count:
            found = dict.fromkeys(chance.sample(list(found), count))
        ways = ["all", "nothing", "some", "some", "some torn", "some torn", "the last torn"]
        while len(found) < count:
            # half of them between two marks drawn evenly, as some steps write far more than others
            first, last = chance.choice([*pairwise([0, *ends])]) if chance.random() < 0.5 else (0, len(self.events))
            found[CrashPoint(chance.randint(first, last), chance.choice(ways), chance.getrandbits(32))] = None
        return sorted(found, key=lambda point: point.at)

    def images(self, points: Sequence[CrashPoint]) -> Iterator[tuple[CrashPoint, str]]:
        """Images of the disk after each crash; each is gone when the next one is asked for."""
        durable, image = os.path.join(self._folder, "durable.img"), os.path.join(self._folder, "crashed.img")
        _copy(self._base, durable)
        done = 0
        with open(durable, "r+b", buffering=0) as disk:
            for point in sorted(points, key=lambda point: point.at):
                flushed = max((i for i in range(done, point.at) if self.events[i].kind == _FLUSH), default=done)
                for event in self.events[done:flushed]:
                    if event.kind == _WRITE:
                        os.pwrite(disk.fileno(), event.data, event.offset)
                done = flushed
                pending = [event for event in self.events[flushed : point.at] if event.kind == _WRITE]
                _copy(durable, image)
                with open(image, "r+b", buffering=0) as crashed:
                    for offset, data in _surviving(pending, point, whole=_WHOLE.get(self.kind, 0)):
                        os.pwrite(crashed.fileno(), data, offset)
                yield point, image


def missing(kind: str) -> str | None:
    """Why disks of a file system can't be made here, or None."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if not os.path.exists("/dev/loop-control"):
        return "there are no loop devices"
    tool = _MKFS[kind][1][0]
    if shutil.which(tool) is None:
        return f"there is no {tool}"
    try:
        with workspace() as folder:
            image = os.path.join(folder, "probe.img")
            make_image(image, *_MKFS[kind])
            with mounted(kind, image):
                return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{kind} can't be mounted from a file: {error}"


@contextlib.contextmanager
def workspace() -> Iterator[str]:
    """A folder in memory where there is one, so that images cost no disk writes; removed afterwards."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(
        prefix="power-cut-", dir=memory if os.access(memory, os.W_OK) else None, ignore_cleanup_errors=True
    ) as folder:
        yield folder


@contextlib.contextmanager
def mounted(kind: str, image: str) -> Iterator[str]:
    """Mount an image, as a machine does that comes up again."""
    if kind == "btrfs":  # it remembers devices by an id, which all these images share
        subprocess.run(["btrfs", "device", "scan", "--forget"], check=False, capture_output=True)
    folder = tempfile.mkdtemp(prefix="mounted-", dir=os.path.dirname(image))
    try:
        subprocess.run(
            ["mount", "-t", kind, "-o", f"loop{_OPTIONS.get(kind, '')}", image, folder],
            check=True,
            capture_output=True,
            text=True,
        )
        try:
            yield folder
        finally:
            unmount(folder)
    finally:
        os.rmdir(folder)


class _Recorder:
    """A mounted disk that logs; `recording` is there once it is unmounted."""

    def __init__(self, folder: str, marks: str) -> None:
        self.folder = folder
        self.marks = marks
        self.recording: Recording | None = None


@contextlib.contextmanager
def recorder(kind: str, workspace: str) -> Iterator[_Recorder]:
    """A new file system, mounted on a disk that logs."""
    place = tempfile.mkdtemp(prefix=f"{kind}-", dir=workspace)
    base, disk, log, shown = (os.path.join(place, name) for name in ("base.img", "disk.img", "log", "fuse"))
    make_image(base, *_MKFS[kind])
    _copy(base, disk)
    os.mkdir(shown)
    with fuse_server([__file__, disk, log, shown], shown):
        # the folder to mount on must not be on the FUSE file system
        os.symlink(os.path.join(shown, "disk.img"), os.path.join(place, "device"))
        with mounted(kind, os.path.join(place, "device")) as folder:
            made = _Recorder(folder, os.path.join(shown, "marks"))
            yield made
    made.recording = Recording(kind, place, base, log)


@contextlib.contextmanager
def fuse_server(arguments: Sequence[str], shown: str) -> Iterator[None]:
    """A Python program that serves the folder `shown` by FUSE, until the end of the block."""
    server = subprocess.Popen([sys.executable, *arguments])
    try:
        deadline = time.monotonic() + 20
        while not os.path.ismount(shown):
            if server.poll() is not None or time.monotonic() > deadline:
                raise OSError(errno.EIO, "the FUSE file system did not start")
            time.sleep(0.005)
        yield
    finally:
        unmount(shown)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def unmount(folder: str) -> None:
    """Unmount it, if need be once whoever uses it is done."""
    for _ in range(20):
        done = subprocess.run(["umount", folder], check=False, capture_output=True)
        if done.returncode == 0 or not os.path.ismount(folder):
            return
        gc.collect()  # a traceback may hold a file that is mapped
        time.sleep(0.05)
    subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def make_image(image: str, megabytes: int, command: Sequence[str]) -> None:
    """Make a file of that size and a file system in it."""
    with open(image, "wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run([*command, image], check=True, capture_output=True)


def _copy(source: str, target: str) -> None:
    """Copy a file, its holes as holes."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(old.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return
                raise
            end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            os.lseek(new.fileno(), start, os.SEEK_SET)
            while start < end:
                start += os.sendfile(new.fileno(), old.fileno(), start, end - start)


def _read_log(path: str) -> list[Event]:
    with open(path, "rb") as file:
        log = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    events, place = [], 0
    while place < len(log):
        kind, offset, length = _HEADER.unpack_from(log, place)
        place += _HEADER.size
        events.append(Event(kind, offset, log[place : place + length]))
        place += length
    return events


def _surviving(pending: Sequence[Event], point: CrashPoint, *, whole: int) -> Iterator[tuple[int, memoryview]]:
    """What is kept of the writes; the sector `whole` shares the fate of the one before it."""
    chance = random.Random(point.seed)
    torn = point.kept.endswith("torn")
    for event in pending:
        last = event is pending[-1]
        if point.kept == "nothing" or (point.kept.startswith("some") and chance.random() < 0.5):
            continue
        if torn and (last or (point.kept == "some torn" and chance.random() < 0.3)):
            kept = False
            for start in range(0, len(event.data), _SECTOR):
                if not (start and event.offset + start == whole * _SECTOR):
                    kept = chance.random() < 0.5
                if kept:
                    yield event.offset + start, event.data[start : start + _SECTOR]
        else:
            yield event.offset, event.data


def _serve(disk: str, log: str, folder: str) -> None:
    import mfusepy

    image = os.open(disk, os.O_RDWR)
    journal = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(kind: bytes, offset: int, data: bytes) -> None:
        entry = _HEADER.pack(kind, offset, len(data)) + data
        if os.write(journal, entry) != len(entry):
            raise OSError(errno.ENOSPC, "the log is full")

    class Disk(mfusepy.Operations):
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
            if path == "/disk.img":
                return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": os.fstat(image).st_size}
            if path == "/marks":
                return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": 0}
            raise OSError(errno.ENOENT, path)

        def open(self, path: str, flags: int) -> int:
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return os.pread(image, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            if path == "/marks":
                note(_MARK, 0, data)
                return len(data)
            note(_WRITE, offset, data)
            return os.pwrite(image, data, offset)

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            note(_FLUSH, 0, b"")
            return 0

    mfusepy.FUSE(Disk(), folder, foreground=True, nothreads=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
