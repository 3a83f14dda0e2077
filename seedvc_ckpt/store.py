"""The store: where naming, format, storage and retention meet."""

from __future__ import annotations

import json
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from operator import itemgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, SupportsIndex, cast

from seedvc_ckpt.checkpoint import CheckpointInfo
from seedvc_ckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    SaveFailedError,
    StaleStepError,
    StorageError,
)
from seedvc_ckpt.naming import SEED_VC, NamePattern, ParsedName, checked_number
from seedvc_ckpt.retention import Mode, Plan, Rule, plan, ranked
from seedvc_ckpt.storage import Entry, Lease, Stat, Storage, open_storage
from seedvc_ckpt.storage.leftovers import Leftover

if TYPE_CHECKING:
    import torch

    from seedvc_ckpt.file import CheckpointFile, Inspection
    from seedvc_ckpt.format import torchzip
    from seedvc_ckpt.manifest import Manifest, Setting
    from seedvc_ckpt.scores import Scores

__all__ = ["CheckpointStore", "PreparedSave", "Resumed"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """What `CheckpointStore.resume` found.

    Attributes:
        info: The newest intact checkpoint.
        state: Its state.
        rejected: The newer ones that are damaged, newest first, each with the reason.
    """

    info: CheckpointInfo
    state: Any
    rejected: tuple[tuple[CheckpointInfo, str], ...] = ()

    @property
    def steps_lost(self) -> int:
        """The steps between this checkpoint and the newest that was rejected; 0 when none was."""
        return self.rejected[0][0].step - self.info.step if self.rejected else 0


@dataclass(frozen=True)
class PreparedSave:
    """A save that passed all checks, to be written.

    Attributes:
        store: Where to.
        name: Under which name.
        step: Of which step.
        encoded: The file; its records may be replaced by copies before it is written.
        overwrite: Whether to replace a checkpoint of this name.
        lease: What allows it; None to take the lease when it is written.
    """

    store: CheckpointStore
    name: str
    step: int
    encoded: torchzip.Encoded
    overwrite: bool
    lease: Lease | None = None

    def write(self, *, verify: bool = False) -> CheckpointInfo:
        """The second half of a save: write the file, and prune. Raises as `CheckpointStore.save` does."""
        return self.store._write(self, verify=verify)  # noqa: SLF001 - the other half of the store's own save


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    The listing is the only index: every call looks at what is there now. Reading needs no store of its own and never
    changes anything, except that `resume` sets damaged files aside unless the store is read-only.

    One process at a time writes to a run: its first write takes the run's lease, which all stores of the process on
    this folder share, until `close`, the end of the process, or the end of the last of these stores. Other processes
    get `LeaseHeldError` when they write. Reading needs no lease, nor does pinning.

    Args:
        location: A folder or an fsspec URL (``scheme://``), made at the first save; or a storage, as
            `storage.open_storage` and `seedvc_ckpt.testing` make them.
        pattern: How the files are named; others in the folder are never looked at.
        retention: One rule or several: after each save a checkpoint stays if any rule keeps it. Default: keep all.
        storage_options: For the fsspec filesystem of a URL.
        fs: An fsspec filesystem to use instead of making one; it is neither changed nor closed.
        read_only: Refuse everything that would change the store.

    Raises:
        PatternError: for a pattern that can't be used.
        StorageError: for a location that can't be used.
    """

    def __init__(
        self,
        location: str | os.PathLike[str] | Storage,
        *,
        pattern: NamePattern | str = SEED_VC,
        retention: Rule | Sequence[Rule] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        fs: Any = None,
        read_only: bool = False,
    ) -> None:
        self.pattern = pattern if isinstance(pattern, NamePattern) else NamePattern(pattern)
        self.retention = (retention,) if callable(retention) else tuple(retention or ())
        self.read_only = read_only
        self._storage = open_storage(location, storage_options=storage_options, fs=fs)
        self._resumed: CheckpointInfo | None = None
        self._intact: set[str] = set()  # names written, or checked byte by byte, by this object
        self._pruned: list[CheckpointInfo] = []
        self._known: set[str] = set()  # names that were there when the lease was taken, or came with it
        self._lease: Lease | None = None
        self._release: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        return f"CheckpointStore({self.location!r}, pattern={self.pattern.template!r})"

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def location(self) -> str:
        """Where the checkpoints are."""
        return self._storage.location

    @property
    def storage(self) -> Storage:
        """The place that the checkpoints are in, for looking at what else is there."""
        return self._storage

    @property
    def pruned(self) -> tuple[CheckpointInfo, ...]:
        """What this object has pruned so far, first things first."""
        return tuple(self._pruned)

    @property
    def run_name(self) -> str:
        """The last part of the location; manifests name the run by it."""
        from seedvc_ckpt.file import run_name

        return run_name(self.location)

    def acquire(self) -> None:
        """Take the run's lease now, not at the first write, and remove what dead writers left in the folder.

        Raises:
            LeaseHeldError: if another process is writing to the run; it names host, process and since when.
            StorageError: if the store is read-only or the folder can't be written.
        """
        self._acquired()

    def close(self) -> None:
        """Release the lease. Reading goes on to work, and a later write takes the lease again."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()
        self._release()

    def collect_garbage(self, *, dry_run: bool = False) -> Sequence[Leftover]:
        """Remove the temporary files of writers that died, and return what was removed; with `dry_run`, would be.

        Needs no lease: a file counts only when its writer is proven to be gone.
        """
        found = self._storage.leftovers()
        if dry_run:
            return found
        self._refuse_changes("clean it up")
        removed = []
        for leftover in found:
            try:
                self._storage.remove_leftover(leftover)
                removed.append(leftover)
            except StorageError as error:
                _log.warning("not removed: %s", error)
        return removed

    def list(self) -> list[CheckpointInfo]:
        """The checkpoints, ascending by (step, epoch).

        Raises:
            StorageError: if the folder can't be listed.
        """
        return [info for info, _ in self._looked()]

    def latest(self) -> CheckpointInfo | None:
        """The checkpoint with the largest (step, epoch), or None; looks at names only."""
        while True:
            named, pins = self._listing()
            if not named:
                return None
            parsed, newest = max(named, key=itemgetter(0))
            found = self._look(parsed, newest, pins)
            if found is not None:
                return found[0]

    def save(
        self,
        state: Any,
        step: SupportsIndex,
        epoch: SupportsIndex = 0,
        *,
        metrics: Mapping[str, SupportsFloat] | None = None,
        settings: Mapping[str, Setting] | None = None,
        overwrite: bool = False,
        verify: bool = False,
    ) -> CheckpointInfo:
        """Save a state; when this returns it survives a power cut. Then prune by the store's rules.

        Args:
            state: Nested dicts, lists and tuples of tensors, numbers, strings, bytes and None.
            step: Training steps done.
            epoch: The epoch that is running.
            metrics: Numbers to keep with it, for `keep_best` and for people; tensors and arrays of one number count.
            settings: Plain values to keep with it: what the run is made with, for `deploy.check` and for people.
            overwrite: Replace a checkpoint of this step.
            verify: Read the file back and check every byte before returning.

        Returns:
            The new checkpoint.

        Raises:
            CheckpointExistsError: if the step is saved already and `overwrite` is false.
            StaleStepError: if a later step is saved already.
            UnsafeCheckpointError: if the state holds what could not be loaded again, naming the path to it.
            ValueError: for a metric that is no number, or a setting that is no plain value.
            MissingMetricError: if a retention rule needs a metric that neither this nor an older checkpoint has.
            LeaseHeldError: if another process is writing to the run.
            StorageError: if the folder can't be listed; with `verify`, also if the file can't be read back: then it
                is there. (Without, that is logged, nothing is pruned, and the save has succeeded.)
            SaveFailedError: if it can't be written. Otherwise, in all these cases, nothing has changed.
        """
        prepared = self.prepare(state, step, epoch, metrics=metrics, settings=settings, overwrite=overwrite)
        return prepared.write(verify=verify)

    def prepare(
        self,
        state: Any,
        step: SupportsIndex,
        epoch: SupportsIndex = 0,
        *,
        metrics: Mapping[str, SupportsFloat] | None = None,
        settings: Mapping[str, Setting] | None = None,
        overwrite: bool = False,
        in_background: bool = False,
    ) -> PreparedSave:
        """The first half of a save: all that can be refused is; nothing is written yet.

        Args:
            state: As for `save`. Its tensors are read by the second half and must not change until then.
            step: As for `save`.
            epoch: As for `save`.
            metrics: As for `save`.
            settings: As for `save`.
            overwrite: As for `save`.
            in_background: Take the lease now, and leave to the second half what takes long and hardly ever fails.

        Raises:
            CheckpointError: as `save` does, but for `SaveFailedError`.
        """
        self._refuse_changes("save to it")
        step, epoch = checked_number("step", step), checked_number("epoch", epoch)
        name = self.pattern.format(step, epoch)
        infos = self._without_stale(self.list())
        try:
            self._refuse_order(infos, step, name, overwrite=overwrite)
        except (CheckpointExistsError, StaleStepError):
            if self._lease is None and self._storage.holder():
                self.acquire()  # if it is another process that is ahead, that is the news
            raise
        from seedvc_ckpt.manifest import Manifest, library_version  # pydantic is slow to import

        manifest = Manifest(
            run=self.run_name,
            step=step,
            epoch=epoch,
            created=datetime.now(timezone.utc),
            library=library_version(),
            metrics={key: _metric(key, value) for key, value in (metrics or {}).items()},
            settings={key: _setting(key, value) for key, value in (settings or {}).items()},
            resumed_from=self._resumed.name if self._resumed else None,
        )
        if self.retention:
            coming = CheckpointInfo(name, step, epoch, 0, datetime.now(timezone.utc))
            others = [info for info in infos if info.name != name]
            self._plan([*others, coming], {coming: manifest.metrics})
        from seedvc_ckpt.format import torchzip  # torch takes more than a second to import

        encoded = torchzip.encode(state, manifest, check_later=in_background)
        lease = self._acquired_for(step, name, overwrite=overwrite) if in_background else None
        return PreparedSave(self, name, step, encoded, overwrite, lease)

    def load(
        self,
        which: SupportsIndex | CheckpointInfo | None = None,
        *,
        map_location: str | torch.device = "cpu",
        mmap: bool = False,
        verify: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Any:
        """The state of a checkpoint: the newest, or that of a step or info.

        Args:
            which: A step, an info from `list`, or None for the newest.
            map_location: Device of all tensors.
            mmap: Map the file instead of reading it; the tensors keep it mapped, changes to them stay in memory.
            verify: Check every byte before any tensor is used.
            cache_dir: Of a checkpoint on a server, keep a copy in this folder and map that; it is used again as long as
                the checkpoint stays what it is. Nothing is ever removed from the folder.

        Raises:
            CheckpointNotFoundError: if there is none.
            CorruptCheckpointError: if it is damaged, naming the record and tensor.
            UnsafeCheckpointError: if it holds more than plain data and tensors.
            StorageError: if it can't be read.
        """
        info = self._find(which)
        with self._proving(info, proves=verify):
            return self._file(info).load(map_location=map_location, mmap=mmap, verify=verify, cache_dir=cache_dir)

    def resume(self, *, map_location: str | torch.device = "cpu", mmap: bool = False) -> Resumed | None:
        """The newest intact checkpoint with its state, or None when there is none at all.

        Newer ones that are proven to be damaged are moved to ``aside/``, with the reason, so that the run can go on
        below their steps; a read-only store, or a process of another rank than 0, reports them only.

        Raises:
            CorruptCheckpointError: if there are checkpoints and all are damaged; then none is moved.
            UnsafeCheckpointError: if the newest asks for more than plain data, which is no damage.
            StorageError: if one can't be read, which proves nothing about it.
        """
        rejected: list[tuple[CheckpointInfo, str]] = []
        for info in reversed(self.list()):
            try:
                state = self.load(info, map_location=map_location, mmap=mmap)
            except CorruptCheckpointError as error:
                rejected.append((info, str(error)))
                continue
            if rejected and not self.read_only and _rank() == 0:
                for damaged, reason in rejected:
                    self.set_aside(damaged, reason)
            self._resumed = info
            self._known.add(info.name)
            return Resumed(info, state, tuple(rejected))
        if rejected:
            newest, reason = rejected[0]
            rest = f"and so is each of the {len(rejected)}" if len(rejected) > 1 else "and it is the only one"
            raise CorruptCheckpointError(
                newest.name,
                "",
                f"damaged ({reason}), {rest} in {self.location}. Restore one from a copy, or move what is there away "
                "to start anew",
            )
        return None

    def inspect(self, which: SupportsIndex | CheckpointInfo | None = None) -> Inspection:
        """What a checkpoint holds: keys, shapes, dtypes, bytes, manifest; reads no tensor data."""
        return self._file(self._find(which)).inspect()

    def verify(
        self,
        which: SupportsIndex | CheckpointInfo | None = None,
        *,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Check every byte of a checkpoint; `progress` is called with the number of bytes done since the last call.

        A file without a manifest whose name contradicts the step inside (``iters``) is logged as a warning.

        Raises:
            CorruptCheckpointError: naming the record, and the tensor in it, that is damaged.
        """
        info = self._find(which)
        with self._proving(info):
            for oddity in self._file(info).verify(progress):
                _log.warning("%s in %s %s", info.name, self.location, oddity)

    def file(self, which: SupportsIndex | CheckpointInfo | None = None) -> CheckpointFile:
        """A checkpoint as a file, for reading."""
        return self._file(self._find(which))

    def prune(self, *, dry_run: bool = False) -> Plan:
        """Delete what no retention rule keeps, oldest first, and return the plan; with `dry_run`, only the plan.

        What is gone already or can't be deleted is logged as a warning and does not stop the rest.
        """
        seen = self._seen()
        made = self._plan([*seen])
        if not dry_run:
            self._refuse_changes("prune it")
            if made.remove:
                self._remove(made, seen, self._acquired())
        return made

    def scores(self, *, on: Mapping[str, str] | None = None) -> dict[CheckpointInfo, dict[str, float]]:
        """The numbers known of each checkpoint, ascending: the metrics given to `save`, and scores over them.

        Each file is opened for what it says of itself; of one that can't be read for being damaged, or that is gone,
        nothing is known. Of a metric that was computed on several things only the numbers on its newest are given.

        Args:
            on: By metric, on what else the numbers must be computed.

        Raises:
            StorageError: if the run can't be read.
        """
        known, found = _Metrics(self._storage, self._file, self.list(), {}, on or {}), {}
        for info in known:
            try:
                found[info] = dict(known[info])
            except _UnjudgedError as error:
                if isinstance(error.cause, StorageError):
                    raise error.cause from None
                found[info] = {}
        return found

    def add_scores(
        self,
        which: SupportsIndex | CheckpointInfo,
        scores: Mapping[str, SupportsFloat],
        *,
        on: Mapping[str, str] | str = "",
    ) -> None:
        """Write down what a saved checkpoint was found to be worth, in the run's ``scores.jsonl``; needs no lease.

        Several processes may do so while another one trains. Another checkpoint that takes the place of this one does
        not inherit its scores.

        Args:
            which: A step, or the info that was scored.
            scores: Numbers by metric; each replaces what was known of that metric.
            on: What they were computed on, or that by metric. Numbers on something else than the newest are left
                aside, since they don't compare; metrics given to `save` count as computed on "".

        Raises:
            CheckpointNotFoundError: if there is no such checkpoint, or it is another one by now.
            ValueError: for a score that is no number.
            CorruptCheckpointError: if the checkpoint is damaged.
            StorageError: if the run can't be read or written.
        """
        self._refuse_changes("score its checkpoints")
        from seedvc_ckpt.scores import Score, append, directory_digest  # pydantic is slow to import

        info = self._find(which)
        with self._file(info).opened() as archive:
            digest = directory_digest(archive)
        now = self._storage.stat(info.name)
        if now is None or (now.size, now.modified) != (info.size, info.modified):
            raise CheckpointNotFoundError(f"{info.name} in {self.location} is another one by now: score that one")
        numbers = {metric: _metric(metric, value) for metric, value in scores.items()}
        basis = dict.fromkeys(numbers, on) if isinstance(on, str) else on
        told = {metric: basis[metric] for metric in numbers if basis.get(metric)}
        line = Score(
            name=info.name, step=info.step, epoch=info.epoch, size=info.size, digest=digest, scores=numbers, on=told
        )
        append(self._storage, line)

    def best(self, metric: str, mode: Mode = "min") -> CheckpointInfo:
        """The checkpoint with the smallest (or, with mode "max", largest) `metric`, as `keep_best` has it.

        Raises:
            CheckpointNotFoundError: if there is no checkpoint at all.
            MissingMetricError: if none has the metric.
            StorageError: if the run can't be read.
        """
        known = self.scores()
        if not known:
            raise self._none()
        return ranked(list(known), metric, mode, known)[0]

    def pin(self, which: SupportsIndex | CheckpointInfo) -> CheckpointInfo:
        """Keep a checkpoint from being pruned, by an empty file ``<name>.pin`` beside it; needs no lease.

        Returns:
            The checkpoint, pinned. Doing it twice does no harm.

        Raises:
            CheckpointNotFoundError: if there is no such checkpoint.
        """
        info = self._existing(which)
        self._refuse_changes("pin in it")
        with suppress(FileExistsError):
            self._storage.publish(f"{info.name}.pin", 0, [])
        return replace(info, pinned=True)

    def unpin(self, which: SupportsIndex | CheckpointInfo) -> CheckpointInfo:
        """Let a checkpoint be pruned again; needs no lease.

        Returns:
            The checkpoint, not pinned. Doing it twice does no harm.

        Raises:
            CheckpointNotFoundError: if there is no such checkpoint.
        """
        info = self._existing(which)
        self._refuse_changes("unpin in it")
        self._unpin(info.name)
        return replace(info, pinned=False)

    def rewind(self, step: SupportsIndex, *, dry_run: bool = False) -> tuple[CheckpointInfo, ...]:
        """Set every checkpoint after `step` aside, so that training can go on from there; nothing is deleted.

        Returns:
            What was set aside, ascending; with `dry_run`, what would be.

        Raises:
            CheckpointNotFoundError: if no checkpoint has that step.
        """
        kept, infos = self._at_step(checked_number("step", step))[0], self.list()
        later = tuple(info for info in infos if info.step > kept.step)
        if not dry_run:
            self._refuse_changes("rewind it")
            for info in reversed(later):  # newest first: stopped half-way, the run has just lost its end
                self.set_aside(info, f"the run was rewound to step {kept.step}")
        return later

    def set_aside(self, which: CheckpointInfo | str, reason: str) -> str:
        """Move a checkpoint, or another file of the run by its name, to ``aside/`` with `reason` beside it.

        Returns:
            Its name now, below the run's folder.

        Raises:
            CheckpointNotFoundError: if there is no such file.
        """
        self.acquire()
        name = which if isinstance(which, str) else which.name
        if self._storage.stat(name) is None:
            raise CheckpointNotFoundError(f"there is no file {name} in {self.location} to set aside")
        moved = self._storage.set_aside(name, reason)
        self._unpin(name)  # a later checkpoint of that name is another one
        return moved

    def export(
        self,
        target: str | os.PathLike[str],
        step: SupportsIndex | CheckpointInfo | None = None,
        *,
        expected: Mapping[str, Sequence[int]] | None = None,
        dtype: str | torch.dtype | None = None,
        weights: Literal["net", "ema"] = "net",
        overwrite: bool = False,
        allow_non_finite: bool = False,
    ) -> str:
        """Write a checkpoint's weights as Seed-VC's ``ft_model.pth`` or as safetensors; see `export.export`."""
        from seedvc_ckpt.export import export

        return export(
            self.file(step),
            target,
            expected=expected,
            dtype=dtype,
            weights=weights,
            overwrite=overwrite,
            allow_non_finite=allow_non_finite,
        )

    def _listing(self) -> tuple[Sequence[tuple[ParsedName, Entry]], set[str]]:
        """The files that the pattern names, and the names of all pin files."""
        parse, named, pins = self.pattern.parse, [], set()
        for entry in self._storage.list():
            parsed = parse(entry.name)
            if parsed is not None:
                named.append((parsed, entry))
            elif entry.name.endswith(".pin"):
                pins.add(entry.name)
        return named, pins

    def _seen(self) -> dict[CheckpointInfo, Stat]:
        """The checkpoints ascending by (step, epoch), each with what its file is at this moment."""
        return dict(self._looked())

    def _looked(self) -> Sequence[tuple[CheckpointInfo, Stat]]:
        named, pins = self._listing()
        found = filter(None, (self._look(parsed, entry, pins) for parsed, entry in named))
        return sorted(found, key=lambda seen: (seen[0].step, seen[0].epoch))

    def _look(self, parsed: ParsedName, entry: Entry, pins: set[str]) -> tuple[CheckpointInfo, Stat] | None:
        try:
            found = entry.stat()
        except FileNotFoundError:
            return None  # pruned by its writer since it was listed
        except OSError as error:
            raise StorageError(f"can't look at {entry.name} in {self.location}: {error}") from error
        pinned = f"{entry.name}.pin" in pins
        return CheckpointInfo(entry.name, parsed.step, parsed.epoch, found.size, found.modified, pinned), found

    def _file(self, info: CheckpointInfo) -> CheckpointFile:
        from seedvc_ckpt.file import CheckpointFile  # listing has no use for it

        return CheckpointFile(self._storage, info.name, self.pattern)

    def _find(self, which: SupportsIndex | CheckpointInfo | None) -> CheckpointInfo:
        if isinstance(which, CheckpointInfo):
            return which
        if which is None:
            newest = self.latest()
            if newest is None:
                raise self._none()
            return newest
        found = self._at_step(checked_number("step", which))
        if len(found) > 1:
            names = ", ".join(info.name for info in found)
            raise CheckpointError(
                f"step {found[0].step} stands for several checkpoints in {self.location}: {names}. Pass the info of "
                "the one that you mean, from list()"
            )
        return found[0]

    def _none(self) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(f"no checkpoint named like {self.pattern.template} in {self.location}")

    def _at_step(self, step: int) -> Sequence[CheckpointInfo]:
        infos = self.list()
        found = [info for info in infos if info.step == step]
        if not found:
            near = sorted(infos, key=lambda info: abs(info.step - step))[:5]
            known = ", ".join(str(info.step) for info in sorted(near, key=lambda info: info.step)) or "none"
            raise CheckpointNotFoundError(
                f"no checkpoint of step {step} in {self.location}; the nearest of its {len(infos)} are at: {known}"
            )
        return found

    def _existing(self, which: SupportsIndex | CheckpointInfo) -> CheckpointInfo:
        info = self._find(which)
        if self._storage.stat(info.name) is None:
            raise CheckpointNotFoundError(f"{info.name} is not in {self.location} any more")
        return info

    @contextmanager
    def _proving(self, info: CheckpointInfo, *, proves: bool = True) -> Iterator[None]:
        """Remember what reading a checkpoint shows: that it is intact, or that it is not."""
        try:
            yield
        except CorruptCheckpointError:
            self._intact.discard(info.name)
            raise
        if proves:
            self._intact.add(info.name)

    def _unpin(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._storage.delete(f"{name}.pin")

    def _acquired(self) -> Lease:
        self._refuse_changes("write to it")
        if self._lease is not None:
            self._lease.check()
            return self._lease
        lease = self._lease = self._storage.lease()
        self._release = weakref.finalize(self, lease.release)
        if lease.epoch is not None:
            self._known.update(entry.name for entry in self._storage.list())
        for leftover in self.collect_garbage():
            _log.info("removed %s from %s: %s", leftover.name, self.location, leftover.why)
        return lease

    def _acquired_for(self, step: int, name: str, *, overwrite: bool) -> Lease:
        first = self._lease is None
        lease = self._acquired()
        if first:  # as another writer may have left it
            self._refuse_order(self._without_stale(self.list()), step, name, overwrite=overwrite)
        return lease

    def _without_stale(self, infos: Sequence[CheckpointInfo]) -> Sequence[CheckpointInfo]:
        """The checkpoints, after setting aside what a writer added that had lost the lease by then.

        Its last upload may have been under way when this process took the lease, and so may end under a free name.
        """
        epoch = self._lease.epoch if self._lease else None
        return infos if epoch is None else [info for info in infos if not self._set_stale_aside(info, epoch)]

    def _set_stale_aside(self, info: CheckpointInfo, epoch: int) -> bool:
        if info.name in self._known:
            return False
        with suppress(CorruptCheckpointError):  # then it is for resume and verify to judge
            manifest = self._file(info).manifest()
            if manifest is not None and manifest.lease_epoch is not None and manifest.lease_epoch < epoch:
                reason = f"saved by a trainer that had lost the lease: its epoch is {manifest.lease_epoch}, not {epoch}"
                _log.warning("%s in %s was set aside: %s", info.name, self.location, reason)
                self._storage.set_aside(info.name, reason)
                return True
        self._known.add(info.name)
        return False

    def _cleared(self, name: str) -> bool:
        """Set a stale writer's file of this name aside, where it is one."""
        found = [info for info in self.list() if info.name == name]
        return not self._without_stale(found)

    def _write(self, save: PreparedSave, *, verify: bool) -> CheckpointInfo:
        # a lease that was released since the save was prepared is not taken again behind the caller's back
        lease = save.lease
        if lease is None:
            lease = self._acquired_for(save.step, save.name, overwrite=save.overwrite)  # which asks for it
        else:
            lease.check()
        encoded = save.encoded.of_epoch(lease.epoch)
        try:
            published = self._storage.publish(
                save.name,
                encoded.size,
                encoded,
                overwrite=save.overwrite,
                before=lease.check,
                cleared=lambda: self._cleared(save.name),
            )
        except FileExistsError:
            raise CheckpointExistsError(
                f"{save.name} appeared in {self.location} during the save and was left as it is: another process is "
                "saving to this run"
            ) from None
        self._known.add(save.name)
        named = self.pattern.parse(save.name) or ParsedName(save.step)  # a name without an epoch lists as epoch 0
        info = CheckpointInfo(save.name, named.step, named.epoch, published.size, published.modified)
        try:
            info = replace(info, pinned=self._storage.stat(f"{save.name}.pin") is not None)
            self._read_back(info, encoded.manifest, verify=verify)
        except StorageError as error:
            if verify:
                raise
            # it is durable, which is what was asked for; nothing older goes while it is not seen to be readable
            _log.warning("%s was saved to %s, but nothing was pruned: %s", save.name, self.location, error)
            return info
        self._intact.add(save.name)
        if self.retention:
            self._prune_after_save(lease)
        return info

    def _refuse_changes(self, what: str) -> None:
        if self.read_only:
            raise StorageError(f"the store {self.location} was opened read-only: open it without read_only to {what}")
        if _rank() != 0:
            raise CheckpointError(
                f"rank {_rank()} can't change the store {self.location}: a checkpoint is written by rank 0 alone "
                f"(sharded checkpoints are not supported). Do what is to {what} under `if rank == 0`"
            )

    def _refuse_order(self, infos: Sequence[CheckpointInfo], step: int, name: str, *, overwrite: bool) -> None:
        later = [info for info in infos if info.step > step]
        if later:
            earlier = [info.step for info in infos if info.step <= step]
            remedy = f"rewind({earlier[-1]})" if earlier else f"rewind to a step that is there ({infos[0].step} …)"
            raise StaleStepError(
                f"{self.location} already has {later[-1].name}, so step {step} would go backwards: the next resume "
                f"would take step {later[-1].step}, not this one. To branch off set the later ones aside with "
                f"{remedy}; else save at a larger step or to another folder"
            )
        same = [info for info in infos if info.step == step]
        if same and not overwrite:
            raise CheckpointExistsError(
                f"{self.location} already has {same[-1].name}; pass overwrite=True to replace it, or save at a "
                "larger step"
            )
        others = [info.name for info in same if info.name != name]
        if others:
            raise CheckpointExistsError(
                f"{self.location} already has {others[-1]}: the same step under another epoch, which {name} would "
                "not replace but stand beside. Save at a larger step"
            )

    def _read_back(self, info: CheckpointInfo, manifest: Manifest, *, verify: bool) -> None:
        try:
            file = self._file(info)
            found = file.manifest()
            if found is None or found.to_json() != manifest.to_json():  # as text: NaN is not equal to itself
                raise CorruptCheckpointError(info.name, "the manifest", f"reads {found!r}, {manifest!r} was written")
            if verify:
                file.verify()
        except CorruptCheckpointError as error:
            try:
                self._storage.set_aside(info.name, str(error))
                left = "It was set aside"
            except StorageError as refused:
                left = f"It could not be set aside ({refused})"
            raise SaveFailedError(
                f"{info.name} was written to {self.location} but does not read back as it was: {error}. {left} and "
                "nothing was pruned; check the disk before you go on",
                needed=info.size,
            ) from error

    def _plan(
        self,
        infos: Sequence[CheckpointInfo],
        metrics: Mapping[CheckpointInfo, Mapping[str, float]] | None = None,
    ) -> Plan:
        """What the rules keep, and what they may not remove."""
        judged, unjudged = [*infos], []
        known = _Metrics(self._storage, self._file, [*infos], metrics or {})
        while True:
            try:
                made = plan(judged, self.retention, known)
                break
            except _UnjudgedError as error:
                judged.remove(error.info)
                unjudged.append(error)
        keep = {**made.keep, **{error.info: (error.why,) for error in unjudged}}
        if not self._intact & {info.name for info in keep}:
            spared = [info for info in made.remove if self._resumed and info.name == self._resumed.name]
            keep.update(dict.fromkeys(spared, ("resumed from, and the only one known to be intact",)))
        in_order = {info: keep[info] for info in infos if info in keep}
        return Plan(in_order, tuple(info for info in made.remove if info not in keep))

    def _prune_after_save(self, lease: Lease) -> None:
        """Prune; whatever goes wrong is logged, because the save itself has succeeded."""
        try:
            seen = self._seen()
            self._remove(self._plan([*seen]), seen, lease)
        except CheckpointError as error:
            _log.warning("not pruned: %s: %s", self.location, error)

    def _remove(self, made: Plan, seen: Mapping[CheckpointInfo, Stat], lease: Lease) -> None:
        for info in made.remove:
            try:
                if self._storage.stat(info.name) != seen[info]:
                    _log.warning("not pruned: %s in %s is gone or was replaced", info.name, self.location)
                elif self._storage.stat(f"{info.name}.pin") is None:  # it may have been pinned since the plan was made
                    lease.check()
                    self._storage.delete(info.name, seen=seen[info])
                    self._pruned.append(info)
            except (FileNotFoundError, StorageError) as error:
                _log.warning("not pruned: %s in %s: %s", info.name, self.location, error)


class _UnjudgedError(Exception):
    def __init__(self, info: CheckpointInfo, why: str, cause: CheckpointError) -> None:
        self.info = info
        self.why = why
        self.cause = cause


class _Metrics(Mapping[CheckpointInfo, Mapping[str, float]]):
    """The metrics of manifests and the scores over them, read when a rule asks for them.

    Args:
        storage: The run.
        file: Opens a checkpoint of it.
        infos: Its checkpoints.
        coming: The metrics of a checkpoint that is not there yet.
        on: By metric, on what they must be computed, if not on the same as the newest.
    """

    def __init__(
        self,
        storage: Storage,
        file: Callable[[CheckpointInfo], CheckpointFile],
        infos: Sequence[CheckpointInfo],
        coming: Mapping[CheckpointInfo, Mapping[str, float]],
        on: Mapping[str, str] | None = None,
    ) -> None:
        self._storage = storage
        self._on = on or {}
        self._file = file
        self._infos = infos
        self._coming = coming
        self._known: dict[CheckpointInfo, Mapping[str, float]] = {}
        self._scores: Scores | CheckpointError | None = None

    def __getitem__(self, info: CheckpointInfo) -> Mapping[str, float]:
        if info not in self._known:
            scores = self._read()
            if isinstance(scores, CheckpointError):
                raise _UnjudgedError(info, "the scores can't be read", scores) from None
            self._known[info] = scores.of(info.name, *self._recorded(info))
        return self._known[info]

    def _recorded(self, info: CheckpointInfo) -> tuple[str, Mapping[str, float]]:
        """The digest of a checkpoint's directory and the metrics in its manifest."""
        if info in self._coming:
            return "", self._coming[info]
        from seedvc_ckpt.scores import directory_digest

        file = self._file(info)
        try:
            with file.opened() as archive:
                manifest = file.manifest_of(archive)
                return directory_digest(archive), manifest.metrics if manifest else {}
        except CheckpointError as error:
            raise _UnjudgedError(info, "its manifest can't be read", error) from None

    def _read(self) -> Scores | CheckpointError:
        from seedvc_ckpt.scores import Scores

        if self._scores is None:
            try:
                self._scores = Scores.read(self._storage, self._infos, self._on)
            except StorageError as error:
                self._scores = error
        return self._scores

    def __iter__(self) -> Iterator[CheckpointInfo]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def _metric(key: Any, value: Any) -> float:
    try:
        if isinstance(key, str) and not isinstance(value, str):
            return float(value.item() if hasattr(value, "item") else value)  # a loss may still carry its graph
    except (TypeError, ValueError, RuntimeError):
        pass  # said below, with the metric's name
    raise ValueError(f"metrics map names to single numbers, got {key!r}: {value!r}")


def _setting(key: Any, value: Any) -> Setting:
    try:
        plain = value is None or type(value) in (str, bool, int, float)
        if isinstance(key, str) and plain and not (isinstance(value, int) and value.bit_length() > 63):
            json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode()
            return cast("Setting", value)
    except ValueError:
        pass  # said below, with the setting's name
    raise ValueError(f"settings map names to text, finite numbers of 64 bits, booleans or None, got {key!r}: {value!r}")


def _rank() -> int:
    dist = sys.modules.get("torch.distributed")  # who has not imported it has not started it
    return int(dist.get_rank()) if dist and dist.is_available() and dist.is_initialized() else 0
