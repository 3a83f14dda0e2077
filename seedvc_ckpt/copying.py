"""A run copied between two storages, checked, and resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seedvc_ckpt.errors import CheckpointExistsError, CorruptCheckpointError, StorageError
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.storage import Storage, read_chunks
from seedvc_ckpt.store import CheckpointStore

__all__ = ["Copied", "CopyPlan", "copy_run", "plan_copy"]

_OURS = (".tmp-", ".seedvc_ckpt.")


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
        checkpoints, others = (sum(size for _, size in files) for files in (self.checkpoints, self.others))
        return checkpoints * (2 if verify else 1) + others


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
        StorageError: if one of the two can't be read.
    """
    checkpoints = {info.name: info for info in source.list()}
    sizes = {entry.name: entry.stat().size for entry in source.storage.list()}
    others = sorted(name for name in sizes if name not in checkpoints and not name.startswith(_OURS))
    plan = CopyPlan([], [], [])
    for name in (*checkpoints, *others):
        found = target.storage.stat(name)
        if found is None or found.size != sizes[name]:
            alike = False
        elif name in checkpoints:
            alike = _same_directory(source.storage, target.storage, name)
        else:
            alike = _same_bytes(source.storage, target.storage, name)
        if alike:
            plan.there.append(name)
        elif name not in checkpoints:
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
    verify: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Copied:
    """Copy all checkpoints of a run with its pins, logs, configs and exports; what is there already is not sent again.

    Every file appears in the target complete or not at all, so an interrupted copy goes on where it was. What was set
    aside in the source stays there. A file of the target that is no checkpoint and differs is set aside first.

    Args:
        source: From where. It needs no lease, and may be written to meanwhile.
        target: Where to; its lease is held meanwhile.
        verify: Check each copied checkpoint byte by byte, where it lies now.
        progress: Called with the number of bytes copied or checked since the last call.

    Raises:
        CorruptCheckpointError: if a checkpoint of the source is damaged. Its copy is set aside.
        CheckpointExistsError: if a checkpoint of one name has other contents in the target.
        LeaseHeldError: if another process is writing to the target.
        SaveFailedError: if a file can't be written.
        StorageError: if one can't be read, or does not read back as it was.
    """
    target.acquire()
    plan = plan_copy(source, target)
    copied, aside = [], []
    for name, _ in plan.checkpoints:
        _copy(source, target, name, progress)
        if verify:
            _check(source, target, name, progress)
        copied.append(name)
    for name, _ in plan.others:
        if target.storage.stat(name) is not None:
            aside.append(target.set_aside(name, f"replaced by that of {source.location}"))
        _copy(source, target, name, progress)
        copied.append(name)
    return Copied(copied, plan.there, aside)


def _copy(source: CheckpointStore, target: CheckpointStore, name: str, progress: Callable[[int], None]) -> None:
    with source.storage.open(name) as blob:
        target.acquire()  # asks whether the lease is still ours
        try:
            target.storage.publish(name, blob.size, read_chunks(blob, progress), before=target.acquire)
        except FileExistsError:
            raise CheckpointExistsError(
                f"{name} appeared in {target.location} during the copy, from elsewhere"
            ) from None


def _check(source: CheckpointStore, target: CheckpointStore, name: str, progress: Callable[[int], None]) -> None:
    try:
        CheckpointFile(target.storage, name, target.pattern).verify(progress)
    except CorruptCheckpointError as error:
        moved = target.set_aside(name, str(error))
        CheckpointFile(source.storage, name, source.pattern).verify()  # whose fault it is
        raise StorageError(
            f"{name} does not read back from {target.location} as it was sent: {error}. It was moved to {moved} there; "
            "try again, and check that store if it comes again"
        ) from error


def _same_directory(source: Storage, target: Storage, name: str) -> bool:
    """Whether two files of one size have the same records with the same CRC-32s, by their directories."""
    try:
        with source.open(name) as one, target.open(name) as other:
            return Archive.open(one).end == Archive.open(other).end
    except CorruptCheckpointError:
        return False


def _same_bytes(source: Storage, target: Storage, name: str) -> bool:
    with source.open(name) as one, target.open(name) as other:
        if one.size != other.size:
            return False
        pairs = zip(read_chunks(one), read_chunks(other), strict=True)
        return all(left == right for left, right in pairs)
