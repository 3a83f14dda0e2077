"""What is unusual about a folder as a place for checkpoints."""

from __future__ import annotations

import os
import stat as statmodule
import sys
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Finding", "examine_folder", "note", "problem"]

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


@dataclass(frozen=True)
class Finding:
    """Something unusual, and what to do about it.

    Attributes:
        problem: Whether it endangers the run; else it is only worth knowing.
        subject: The file, or the run's location.
        what: What was found.
        remedy: What to do about it.
    """

    problem: bool
    subject: str
    what: str
    remedy: str


def problem(subject: str, what: str, remedy: str) -> Finding:
    """Something that endangers the run."""
    return Finding(problem=True, subject=subject, what=what, remedy=remedy)


def note(subject: str, what: str, remedy: str) -> Finding:
    """Something worth knowing."""
    return Finding(problem=False, subject=subject, what=what, remedy=remedy)


def examine_folder(folder: str) -> Iterator[Finding]:
    """What is unusual about a folder's permissions and file system."""
    try:
        found = os.stat(folder)
    except OSError:
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        yield problem(folder, "can't be written by this user", "give yourself write permission, or save elsewhere")
    if sys.platform == "win32":
        return
    if found.st_mode & statmodule.S_IWOTH and not found.st_mode & statmodule.S_ISVTX:
        yield problem(folder, "any user of this machine can delete and replace its files", f"run: chmod o-w {folder}")
    if os.path.islink(folder.rstrip("/")):
        yield note(
            folder,
            f"is a link to {os.path.realpath(folder)}",
            "nothing: saving, pruning and the lease work there",
        )
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        yield problem(folder, "lies on a file system that is mounted read-only", "mount it for writing")
    kind = _file_system(folder)
    if kind in _IN_MEMORY:
        yield problem(folder, f"lies in memory ({kind}): no power cut spares it", "save to a disk")


def _file_system(folder: str) -> str:
    """The type of the file system that a folder is on; "" where that is not told."""
    path, best, kind = os.path.realpath(folder), "", ""
    try:
        with open("/proc/self/mounts", "rb") as mounts:
            lines = mounts.read().decode(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split(" ")
        place = fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(best):  # of two mounts on one place the later counts
            best, kind = place, fields[2]
    return kind
