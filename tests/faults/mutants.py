"""The ways of saving that look right and are not: each must be caught by a fault test, or that test shows nothing.

A mutant changes the library in the process that it is applied in; the fault tests apply it in a child of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from seedvc_ckpt import SEED_VC
from seedvc_ckpt.storage import lease, leftovers, local

__all__ = ["BY_CONTEST", "BY_POWER_CUT", "BY_SHORT_WRITE", "BY_SYSTEM_CALL"]

Mutant = Callable[[], None]


def no_file_sync() -> None:
    """The file gets its name before its bytes are on the disk, and they are never asked for."""
    local._sync = lambda descriptor: None


def no_folder_sync() -> None:
    """The name itself is never synced."""
    local._sync_folder = lambda folder: None


def named_before_sync() -> None:
    """The name is given first and the file synced after."""
    give_name, sync = local._give_name, local._sync

    def give_then_sync(temporary: str, path: str, *, overwrite: bool) -> None:
        give_name(temporary, path, overwrite=overwrite)
        descriptor = os.open(path, os.O_RDONLY)
        sync(descriptor)
        os.close(descriptor)

    local._sync, local._give_name = lambda descriptor: None, give_then_sync


def no_parent_sync() -> None:
    """Folders that were made on the way are not synced into theirs."""
    make = local.LocalStorage._make_folder

    def forget(storage: local.LocalStorage) -> tuple[str, ...]:
        make(storage)
        return ()

    local.LocalStorage._make_folder = forget


def pruned_first() -> None:
    """Room is made by deleting the older checkpoints before the new one is written."""
    publish = local.LocalStorage.publish

    def prune_and_publish(storage, name, size, chunks, **options):
        for entry in list(storage.list()):
            if SEED_VC.parse(entry.name) and entry.name != name:
                storage.delete(entry.name)
        return publish(storage, name, size, chunks, **options)

    local.LocalStorage.publish = prune_and_publish


def predictable_temporary_name() -> None:
    """The temporary file of every save has the same name."""
    local.temporary_name = lambda: ".tmp-save"


def written_in_place() -> None:
    """The bytes go straight under the final name, also over an older file."""

    def publish(storage, name, size, chunks, *, overwrite=False, before=lambda: None):
        os.makedirs(storage._folder, exist_ok=True)
        mode = os.O_TRUNC if overwrite else os.O_EXCL
        descriptor = os.open(storage._path(name), os.O_WRONLY | os.O_CREAT | mode, 0o666)
        try:
            for chunk in chunks:
                local._write_all(descriptor, chunk)
            os.fsync(descriptor)
            before()
            found = local._stat(os.fstat(descriptor))
        finally:
            os.close(descriptor)
        local._sync_folder(storage._folder)
        return found

    local.LocalStorage.publish = publish


def sync_errors_ignored() -> None:
    """What the disk answers to a sync is not looked at."""

    def ignore(act: Callable[[object], None]) -> Callable[[object], None]:
        def acting(what: object) -> None:
            with suppress(OSError):
                act(what)

        return acting

    local._sync, local._sync_folder = ignore(local._sync), ignore(local._sync_folder)


def temporary_file_left() -> None:
    """A save that failed leaves its temporary file."""
    unlink = os.unlink

    def keep(path, *arguments, **options):
        if not os.path.basename(path).startswith(".tmp-"):
            unlink(path, *arguments, **options)

    os.unlink = keep


def short_writes_ignored() -> None:
    """What a write did not take is not written again."""

    def write_once(descriptor: int, chunk: memoryview) -> int:
        os.write(descriptor, chunk)
        return len(chunk)

    local._write_all = write_once


def no_lease() -> None:
    """Nobody is kept from writing to a run that another process writes to."""
    lease.LocalLease.__init__ = lambda held, folder: setattr(held, "_held", None)
    lease.LocalLease.check = lambda held: None


def name_taken_from_others() -> None:
    """A name is given by a rename, which replaces what has it."""

    def rename(temporary: str, path: str, *, overwrite: bool) -> None:
        os.replace(temporary, path)

    local._give_name = rename


def living_writers_cleaned_up() -> None:
    """Every temporary file counts as a dead writer's."""
    leftovers._judge = lambda path, name: leftovers.Leftover(name, os.lstat(path).st_size, "it is there")


BY_POWER_CUT: list[Mutant] = [no_file_sync, no_folder_sync, named_before_sync, no_parent_sync]
BY_SYSTEM_CALL: list[Mutant] = [
    pruned_first,
    predictable_temporary_name,
    written_in_place,
    sync_errors_ignored,
    temporary_file_left,
]
BY_SHORT_WRITE: list[Mutant] = [short_writes_ignored]
BY_CONTEST: list[Mutant] = [no_lease, name_taken_from_others, living_writers_cleaned_up]
