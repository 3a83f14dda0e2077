"""Everything unusual about a run, and what to do about each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from seedvc_ckpt.checkpoint import CheckpointInfo
from seedvc_ckpt.errors import CheckpointError, CorruptCheckpointError, StorageError
from seedvc_ckpt.storage import Stat, Storage
from seedvc_ckpt.storage.condition import Finding, note, problem
from seedvc_ckpt.store import CheckpointStore

__all__ = ["Finding", "diagnose"]

_OF_A_RUN = (".jsonl", ".yml", ".yaml", "ft_model.pth", "ft_model.safetensors", "model_card.md", "SHA256SUMS")
_SHOWN = 3  # names in a list of many


def diagnose(
    store: CheckpointStore,
    *,
    verify: bool = True,
    progress: Callable[[CheckpointInfo, int], None] = lambda _info, _size: None,
) -> list[Finding]:
    """Look at a run and report what is unusual, problems first; changes nothing.

    Args:
        store: The run.
        verify: Check every byte of every checkpoint.
        progress: Called with a checkpoint and the number of its bytes done since the last call.

    Raises:
        StorageError: if the run can't be listed.
    """
    infos = store.list()
    files = {entry.name: found for entry in store.storage.list() if (found := _stat(entry)) is not None}
    findings = [
        *(_contents(store, infos, progress) if verify else ()),
        *_order(store, infos),
        *_space(store, infos),
        *store.storage.examine(),
        *_temporary(store, files),
        *_strays(store, infos, files),
        *_aside(store.storage),
    ]
    if holder := store.storage.holder():
        findings.append(note(store.location, f"is being written to by {holder}", "nothing, if that is your trainer"))
    return sorted(findings, key=lambda finding: not finding.problem)


def _contents(
    store: CheckpointStore, infos: Sequence[CheckpointInfo], progress: Callable[[CheckpointInfo, int], None]
) -> Iterator[Finding]:
    for info in infos:
        try:
            for oddity in store.file(info).verify(lambda size, info=info: progress(info, size)):  # type: ignore[misc]
                yield problem(info.name, oddity, "find out which is right; training goes by what it holds")
        except CorruptCheckpointError as error:
            where = f"{error.record}: " if error.record else ""
            yield problem(
                info.name,
                f"is damaged: {where}{error.reason}",
                "restore it from a copy, or let the next resume set it aside if it is the newest",
            )
        except StorageError as error:
            yield problem(info.name, f"can't be read: {error}", "check its permissions and the disk")
        except CheckpointError as error:
            yield problem(info.name, f"is refused: {error}", "don't load it with anything else either")


def _order(store: CheckpointStore, infos: Sequence[CheckpointInfo]) -> Iterator[Finding]:
    """Steps that contradict the files' times, and several files of one step."""
    for one, other in pairwise(infos):
        if one.step == other.step:
            yield problem(
                one.name,
                f"and {other.name} are both step {one.step}; a resume takes the larger epoch",
                f"move the one that you don't want out of {store.location}",
            )
    if not infos:
        return
    newest, last_written = infos[-1], max(infos, key=lambda info: (info.modified, info.step))
    if (last_written.modified - newest.modified).total_seconds() > 1:  # as coarse as some file systems' clocks
        yield problem(
            last_written.name,
            f"was written after {newest.name}, which a resume takes: a trainer started over at a lower step, as "
            "Seed-VC's own does when it resumes, or the files were copied",
            f"to go on from step {last_written.step}: seedvc-ckpt rewind {store.location} {last_written.step}; to go "
            f"on from step {newest.step}: nothing",
        )


def _space(store: CheckpointStore, infos: Sequence[CheckpointInfo]) -> Iterator[Finding]:
    free = store.storage.free()
    if free is not None and infos and free < 2 * infos[-1].size:
        saves = free // infos[-1].size if infos[-1].size else 0
        yield problem(
            store.location,
            f"has room for {saves} more checkpoint{'s' * (saves != 1)}: {free:,} bytes are free, the newest takes "
            f"{infos[-1].size:,}",
            "free some, or prune: seedvc-ckpt prune RUN --keep-last N --dry-run shows what would go",
        )


def _temporary(store: CheckpointStore, files: Mapping[str, Stat]) -> Iterator[Finding]:
    dead = store.storage.leftovers()
    if dead:
        size = sum(leftover.size for leftover in dead)
        yield note(
            _some([leftover.name for leftover in dead]),
            f"{'was' if len(dead) == 1 else 'were'} left by writers that died ({dead[0].why}), {size:,} bytes",
            f"the next save removes {'it' if len(dead) == 1 else 'them'}, or: seedvc-ckpt gc {store.location}",
        )
    gone = {leftover.name for leftover in dead}
    for name in files:
        if name.startswith(".tmp-") and name not in gone:
            yield note(
                name,
                "is a temporary file whose writer is alive, or is not known to be dead",
                "nothing while it is being saved; one of another machine goes after a day",
            )


def _strays(store: CheckpointStore, infos: Sequence[CheckpointInfo], files: Mapping[str, Stat]) -> Iterator[Finding]:
    listed = {info.name for info in infos}
    suffix = os.path.splitext(store.pattern.template)[1]
    alike: list[str] = []
    others: list[str] = []
    for name in sorted(set(files) - listed):
        if name.endswith(".pin"):
            if name.removesuffix(".pin") not in files:
                yield note(name, "pins a checkpoint that is not there", "delete it")
        elif name.endswith(_OF_A_RUN) or name.startswith((".tmp-", ".seedvc_ckpt.")):
            continue
        else:
            (alike if suffix and suffix in name else others).append(name)
    if alike:
        yield note(
            _some(alike),
            f"{'is' if len(alike) == 1 else 'are'} not named like {store.pattern.template}: never listed, resumed from "
            "or pruned",
            "rename what should be a checkpoint; look at others with --pattern",
        )
    if others:
        yield note(
            _some(others),
            "belongs to no run of ours" if len(others) == 1 else "belong to no run of ours",
            "nothing: they are left alone",
        )


def _aside(storage: Storage) -> Iterator[Finding]:
    names = [entry.name for entry in storage.below("aside").list() if not entry.name.endswith(".reason.txt")]
    if names:
        yield note(
            "aside/",
            f"holds {len(names)} file{'s' * (len(names) != 1)} that {'were' if len(names) != 1 else 'was'} set aside",
            "read the reasons beside them, then delete what you don't need",
        )


def _stat(entry: object) -> Stat | None:
    try:
        return entry.stat()  # type: ignore[attr-defined, no-any-return]
    except OSError:
        return None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
