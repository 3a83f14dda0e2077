"""Small file systems of many kinds to save to: full ones, read-only ones, and one that fails as it is told."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from block_device import fuse_server, make_image, mounted, unmount, workspace

__all__ = ["filled", "loop_mounted", "missing", "passing_through", "remount"]

_MKFS = {
    "ext4": (16, ["mkfs.ext4", "-q", "-F", "-b", "4096", "-N", "256", "-E", "lazy_itable_init=0", "-m", "0"]),
    "xfs": (48, ["mkfs.xfs", "-q", "-f", "--unsupported", "-l", "size=6m"]),  # supported ones are 300 MB and more
    "btrfs": (120, ["mkfs.btrfs", "-q", "-f", "--mixed"]),  # as advised for small ones
}


def missing(*programs: str) -> str | None:
    """Why file systems can't be made here, or None."""
    if os.geteuid() != 0:
        return "mounting needs root"
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(path):
            return f"there is no {path}"
    absent = [program for program in ("mount", *programs) if shutil.which(program) is None]
    if absent:
        return f"there is no {absent[0]}"
    try:
        with loop_mounted("tmpfs"):
            return None
    except subprocess.CalledProcessError as error:
        return f"can't mount: {error.stderr}"


@contextlib.contextmanager
def loop_mounted(kind: str) -> Iterator[str]:
    """A new, small file system; its folder."""
    with workspace() as place:
        if kind == "tmpfs":
            folder = os.path.join(place, "tmpfs")
            os.mkdir(folder)
            _run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder)
            try:
                yield folder
            finally:
                unmount(folder)
            return
        image = os.path.join(place, "disk.img")
        make_image(image, *_MKFS[kind])
        with mounted(kind, image) as folder:
            yield folder


def remount(folder: str, how: str) -> None:
    """Mount it again another way: "ro", "rw", or "abort" for an ext4 whose journal failed."""
    _run("mount", "-o", f"remount,{how}", folder)


@contextlib.contextmanager
def filled(folder: str, leave: int) -> Iterator[int]:
    """Fill the file system until nothing goes in any more but about `leave` bytes; what it says is free."""
    ballast, room = os.path.join(folder, "ballast"), os.path.join(folder, "room")
    free = shutil.disk_usage(folder).free
    try:
        _grow(room, leave, 4096)
        for grain in (1 << 20, 4096):
            _grow(ballast, 1 << 40, grain)
        os.unlink(room)
        os.sync()
        yield shutil.disk_usage(folder).free
    finally:
        for path in (room, ballast):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        deadline = time.monotonic() + 20
        while shutil.disk_usage(folder).free < free - (3 << 20) and time.monotonic() < deadline:
            os.sync()  # btrfs frees the space at its next commit, or the one after it


def _grow(path: str, size: int, grain: int) -> None:
    """Add `size` bytes to a file, or as many as there is room for."""
    block = os.urandom(grain)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    try:
        for _ in range(0, size, grain):
            os.write(descriptor, block)
            if grain > 4096:
                os.fsync(descriptor)  # else more is accepted than there is room for
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def passing_through(fault: str) -> Iterator[str]:
    """A folder that shows another one, with a fault: "short writes", "no links", "links refused", "syncs fail"."""
    with workspace() as place:
        source, shown = os.path.join(place, "source"), os.path.join(place, "shown")
        os.mkdir(source)
        os.mkdir(shown)
        with fuse_server([__file__, source, shown, fault], shown):
            yield shown


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _serve(source: str, shown: str, fault: str) -> None:  # noqa: C901
    import mfusepy

    def real(path: str) -> str:
        return os.path.join(source, path.lstrip("/"))

    class Passing(mfusepy.Operations):
        use_ns = True

        def getattr(self, path, fh=None):
            found = os.fstat(fh.fh) if fh else os.lstat(real(path))
            names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_blocks")
            times = {f"st_{what}time": getattr(found, f"st_{what}time_ns") for what in "amc"}
            return {**{name: getattr(found, name) for name in names}, **times}

        def readdir(self, path, fh):
            # an entry whose inode is not told counts as deleted
            return [(name, self.getattr(os.path.join(path, name)), 0) for name in (".", "..", *os.listdir(real(path)))]

        def open(self, path, fi):
            fi.fh = os.open(real(path), fi.flags & ~os.O_NOFOLLOW)
            fi.direct_io = 1  # else the kernel takes a short write for an error
            return 0

        def create(self, path, mode, fi):
            fi.fh = os.open(real(path), fi.flags | os.O_CREAT, mode)
            fi.direct_io = 1
            return 0

        def read(self, path, size, offset, fi):
            return os.pread(fi.fh, size, offset)

        def write(self, path, data, offset, fi):
            taken = max(1, len(data) // 3) if fault == "short writes" else len(data)
            return os.pwrite(fi.fh, data[:taken], offset)

        def fsync(self, path, datasync, fi):
            if fault == "syncs fail":
                raise OSError(errno.EIO, "")
            return 0

        def release(self, path, fi):
            os.close(fi.fh)
            return 0

        def truncate(self, path, length, fh=None):
            os.truncate(fh.fh if fh else real(path), length)

        def link(self, target, source):
            if fault in ("no links", "links refused"):
                raise OSError(errno.ENOSYS if fault == "no links" else errno.EPERM, "")
            # mfusepy names its arguments as symlink's: what is made comes first
            os.link(real(source), real(target))

        def unlink(self, path):
            os.unlink(real(path))

        def rename(self, old, new):
            os.rename(real(old), real(new))

        def mkdir(self, path, mode):
            os.mkdir(real(path), mode)

        def rmdir(self, path):
            os.rmdir(real(path))

        def chmod(self, path, mode):
            os.chmod(real(path), mode)

        def statfs(self, path):
            found = os.statvfs(source)
            names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize", "f_files", "f_ffree", "f_namemax")
            return {name: getattr(found, name) for name in names}

    mfusepy.FUSE(Passing(), shown, raw_fi=True, foreground=True, nothreads=True, hard_remove=True, use_ino=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
