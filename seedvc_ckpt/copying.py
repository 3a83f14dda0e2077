"""A run copied between two storages, checked, and resumable."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from seedvc_ckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
    UnsafeCheckpointError,
)
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.storage import Storage, read_chunks
from seedvc_ckpt.store import CheckpointStore

__all__ = ["Copied", "CopyPlan", "copy_run", "plan_copy"]

_log = logging.getLogger(__name__)

_OURS = (".tmp-", ".seedvc_ckpt.")
_CLOCK = timedelta(seconds=1)  # servers tell times in whole seconds


@dataclass(frozen=True)
class CopyPlan:
    """What a copy has to do.

    Attributes:
        checkpoints: Name and bytes of each checkpoint to copy, ascending.
        others: The same of the run's other files.
        there: Names that are there already, alike.
    """

    checkpoints: list[tuple[str, int]]
    others: list[tuple[str, int]]
    there: list[str]

    def work(self, *, verify: bool) -> int:
        """Bytes to copy, and to read back."""
        size = sum(size for _, size in (*self.checkpoints, *self.others))
        return 2 * size if verify else size


@dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
        copied: Names of the files that were copied.
        there: Names of those that were there already, alike.
        aside: Names of older files of other contents, which were set aside for newer ones.
    """

    copied: Sequence[str]
    there: Sequence[str]
    aside: Sequence[str]


def plan_copy(source: CheckpointStore, target: CheckpointStore) -> CopyPlan:
    """What `copy_run` would do.

    Raises:
        CheckpointExistsError: if a checkpoint of one name has other contents in the target.
        CheckpointNotFoundError: if the source has no file at all.
        StorageError: if one of the two can't be read, or both are one place.
    """
    if _is_one_place(source.location, target.location):
        raise StorageError(f"{source.location} and {target.location} are one place: copy to another")
    sizes = {}
    for entry in source.storage.list():
        with suppress(FileNotFoundError):  # pruned by its writer since it was listed
            sizes[entry.name] = entry.stat().size
    names = {name: source.pattern.parse(name) for name in sizes if not name.startswith(_OURS)}
    if not names:
        raise CheckpointNotFoundError(f"there is nothing to copy in {source.location}: it holds no file")
    checkpoints = sorted((parsed, name) for name, parsed in names.items() if parsed is not None)
    plan = CopyPlan([], [], [])
    for name in (*(name for _, name in checkpoints), *sorted(name for name, parsed in names.items() if parsed is None)):
        is_checkpoint = names[name] is not None
        found = target.storage.stat(name)
        same = _same_directory if is_checkpoint else _same_bytes
        try:
            alike = found is not None and found.size == sizes[name] and same(source.storage, target.storage, name)
        except CheckpointNotFoundError:
            if _is_gone(source, name):
                continue
            raise
        if alike:
            plan.there.append(name)
        elif not is_checkpoint:
            plan.others.append((name, sizes[name]))
        elif found is None:
            plan.checkpoints.append((name, sizes[name]))
        else:
            raise CheckpointExistsError(
                f"{target.location} already has another {name}, and was left as it is: copy to another place, or move "
                "that one away"
            )
    return plan


def copy_run(
    source: CheckpointStore,
    target: CheckpointStore,
    *,
    plan: CopyPlan | None = None,
    verify: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Copied:
    """Copy all checkpoints of a run with its pins, logs, configs and exports; what is there already is not sent again.

    Every file appears in the target complete or not at all, so an interrupted copy goes on where it was. What was set
    aside in the source stays there, and what is pruned there meanwhile is left out. A file of the target that is no
    checkpoint and differs is set aside first. A damaged checkpoint keeps no other file from being copied.

    Args:
        source: From where. It needs no lease, and may be written to meanwhile.
        target: Where to; its lease is held meanwhile.
        plan: What `plan_copy` found, where it was asked just before.
        verify: Check each copied file byte by byte, where it lies now; of the checkpoints that were there already the
            newest, which an interrupted copy may have left unchecked.
        progress: Called with the number of bytes copied or checked since the last call.

    Raises:
        CorruptCheckpointError: if a checkpoint of the source is damaged. Its copy is set aside.
        CheckpointExistsError: if a checkpoint of one name has other contents in the target.
        CheckpointNotFoundError: if the source has no file at all.
        LeaseHeldError: if another process is writing to the target.
        SaveFailedError: if a file can't be written.
        StorageError: if one can't be read, or does not read back as it was.
    """
    target.acquire()
    plan = plan or plan_copy(source, target)
    copied: list[str] = []
    aside: list[str] = []
    damaged: list[CorruptCheckpointError] = []
    unchecked = _unchecked(target, plan.there) if verify else ()
    for name in (*unchecked, *(name for name, _ in plan.checkpoints)):
        try:
            if name not in unchecked and _copy(source, target, name, progress) is None:
                continue
            if verify:
                _check(source, target, name, progress)
        except CorruptCheckpointError as error:
            damaged.append(error)
        else:
            copied += [name] if name not in unchecked else []
    for name, _ in plan.others:
        if target.storage.stat(name) is not None:
            aside.append(target.set_aside(name, f"replaced by that of {source.location}"))
        crc = _copy(source, target, name, progress)
        if crc is None:
            continue
        if verify and _crc(target, name, progress) != crc:
            moved = target.set_aside(name, "it does not read back as it was sent")
            raise StorageError(_not_as_sent(target, name, "its bytes are others", moved))
        copied.append(name)
    if damaged:
        for other in damaged[1:]:
            _log.warning("damaged too: %s", other)
        raise damaged[0]
    return Copied(copied, plan.there, aside)


def _is_one_place(one: str, other: str) -> bool:
    with suppress(OSError):
        return os.path.samefile(one, other)
    return one.rstrip("/") == other.rstrip("/")


def _copy(source: CheckpointStore, target: CheckpointStore, name: str, progress: Callable[[int], None]) -> int | None:
    """Copy a file and return the CRC-32 of what was sent; None if the source has it no more."""
    try:
        return _send(source, target, name, progress)
    except CheckpointNotFoundError:
        if not _is_gone(source, name):
            raise
        return None


def _send(source: CheckpointStore, target: CheckpointStore, name: str, progress: Callable[[int], None]) -> int:
    crc = 0

    def chunks() -> Iterator[memoryview]:
        nonlocal crc
        for chunk in read_chunks(blob, progress):
            crc = zlib.crc32(chunk, crc)
            yield chunk

    with source.storage.open(name) as blob:
        target.acquire()  # asks whether the lease is still ours
        try:
            target.storage.publish(name, blob.size, chunks(), before=target.acquire)
        except FileExistsError:
            raise CheckpointExistsError(
                f"{name} appeared in {target.location} during the copy, from elsewhere"
            ) from None
    return crc


def _is_gone(source: CheckpointStore, name: str) -> bool:
    """Whether a file is in the source no more, as a pruned checkpoint."""
    if source.storage.stat(name) is not None:
        return False
    _log.warning("%s was left out: %s has it no more", name, source.location)
    return True


def _unchecked(target: CheckpointStore, there: Sequence[str]) -> Sequence[str]:
    """The checkpoints that an interrupted copy may have sent and not checked: only its last ones."""
    infos = [info for info in target.list() if info.name in there]
    last = max((info.modified for info in infos), default=None)
    return [info.name for info in infos if last and info.modified >= last - _CLOCK]


def _crc(store: CheckpointStore, name: str, progress: Callable[[int], None]) -> int:
    crc = 0
    with store.storage.open(name) as blob:
        for chunk in read_chunks(blob, progress):
            crc = zlib.crc32(chunk, crc)
    return crc


def _not_as_sent(target: CheckpointStore, name: str, why: object, moved: str) -> str:
    return (
        f"{name} does not read back from {target.location} as it was sent: {why}. It was moved to {moved} there; try "
        "again, and check that store if it comes again"
    )


def _check(source: CheckpointStore, target: CheckpointStore, name: str, progress: Callable[[int], None]) -> None:
    try:
        CheckpointFile(target.storage, name, target.pattern).verify(progress)
    except CorruptCheckpointError as error:
        moved = target.set_aside(name, str(error))
        CheckpointFile(source.storage, name, source.pattern).verify()  # whose fault it is
        raise StorageError(_not_as_sent(target, name, error, moved)) from error
    except UnsafeCheckpointError as error:  # which is no damage: its bytes are what they are
        if not _same_bytes(source.storage, target.storage, name):
            moved = target.set_aside(name, "it does not read back as it was sent")
            raise StorageError(_not_as_sent(target, name, "its bytes are others", moved)) from error


def _same_directory(source: Storage, target: Storage, name: str) -> bool:
    """Whether two files of one size have the same records with the same CRC-32s, by their directories."""
    try:
        with source.open(name) as one, target.open(name) as other:
            return Archive.open(one).end == Archive.open(other).end
    except (CorruptCheckpointError, UnsafeCheckpointError):
        return _same_bytes(source, target, name)


def _same_bytes(source: Storage, target: Storage, name: str) -> bool:
    with source.open(name) as one, target.open(name) as other:
        if one.size != other.size:
            return False
        pairs = zip(read_chunks(one), read_chunks(other), strict=True)
        return all(left == right for left, right in pairs)
