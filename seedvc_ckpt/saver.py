"""Saving while training goes on: the state is copied at once, written in the background."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, SupportsIndex

from seedvc_ckpt.checkpoint import CheckpointInfo
from seedvc_ckpt.errors import CheckpointError
from seedvc_ckpt.store import CheckpointStore, PreparedSave

if TYPE_CHECKING:
    import torch

    from seedvc_ckpt.format.staging import Copy, StagingBuffer
    from seedvc_ckpt.manifest import Setting

__all__ = ["AsyncSaver", "PendingSave"]

_log = logging.getLogger(__name__)

WhenBusy = Literal["wait", "skip"]


class AsyncSaver:
    """Saves to a store without holding up training.

    `save` copies what may change before the next `optimizer.step()`, and returns. The parameters and the state of
    guarded optimizers don't, until then: they are copied in the background, and `step` waits where it comes too early.
    Then the file is written, published and pruned as `CheckpointStore.save` does it. What is in it is the state at the
    moment of `save`, exactly.

    A save that fails in the background is told once: by its own `result`, or else by the next `save` or `close`; where
    neither comes any more, it is logged. The copies take as much memory as the state, once for all saves.

    Use it from one thread, between optimizer steps. Change guarded tensors by nothing but `step`, or call `wait_staged`
    first. Tensors that are changed after a `step` only, such as averaged weights, can be guarded with its optimizer.

    Args:
        store: Where to save. It is not closed.
        when_busy: What `save` does while an earlier one is not finished: "wait" for it, or "skip" this one.

    Attributes:
        seconds_waited: How long guarded steps have waited for copies so far.
    """

    def __init__(self, store: CheckpointStore, *, when_busy: WhenBusy = "wait") -> None:
        self.store = store
        self.when_busy = _checked(when_busy)
        self.seconds_waited = 0.0
        self._buffer: StagingBuffer | None = None
        self._guarded: dict[int, tuple[torch.optim.Optimizer, tuple[torch.Tensor, ...], Any]] = {}
        self._process = os.getpid()
        self._told = _Told()
        self._pending: PendingSave | None = None
        weakref.finalize(self, self._told.abandon)

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._end()
        self._told.log_rest()  # what ended the block is the news

    def guard(self, optimizer: torch.optim.Optimizer, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Let the optimizer's `step` wait while what it changes is still being copied, so that `save` need not.

        Args:
            optimizer: Before the first save.
            tensors: More that is copied before `step` begins, such as averages of the weights that are brought up to
                date after each step. Between a save and the next step nothing may change them.

        Raises:
            TypeError: for what is no torch optimizer.
        """
        import torch

        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"guard() takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if id(optimizer) in self._guarded:
            *_, hook = self._guarded[id(optimizer)]
        else:
            hook = optimizer.register_step_pre_hook(lambda *_: self._await_copies_of(optimizer))
        self._guarded[id(optimizer)] = optimizer, tuple(tensors), hook

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
        when_busy: WhenBusy | None = None,
    ) -> PendingSave | None:
        """Save the state as it is now; see `CheckpointStore.save` for all but `when_busy`.

        Args:
            state: May hold live tensors.
            step: Training steps done.
            epoch: The epoch that is running.
            metrics: Numbers to keep with it.
            settings: Plain values to keep with it.
            overwrite: Replace a checkpoint of this step.
            verify: Read the file back, in the background.
            when_busy: Instead of the saver's own.

        Returns:
            What becomes of it; None if it was skipped.

        Raises:
            CheckpointError: what an earlier save failed with, if nobody was told, or why this one can't begin, as
                `CheckpointStore.save` has it.
        """
        began = time.monotonic()
        self._refuse_other_process()
        self._told.raise_rest()
        if self._pending is not None and not self._pending.done:
            if _checked(when_busy or self.when_busy) == "skip":
                return None
            self._pending.wait()
            self._told.raise_rest()
        prepared = self.store.prepare(
            state, step, epoch, metrics=metrics, settings=settings, overwrite=overwrite, in_background=True
        )
        return self._begin(prepared, began, verify=verify)

    def close(self) -> None:
        """Finish what was begun, and free the memory. A later `save` begins anew; guards have to be set again.

        Raises:
            CheckpointError: what the last save failed with, if nobody was told.
        """
        self._end()
        self._told.raise_rest()

    def _end(self) -> None:
        if self._process != os.getpid():
            return
        if self._pending is not None:
            self._pending.wait()
        for *_, hook in self._guarded.values():
            hook.remove()
        self._guarded.clear()
        self._pending = self._buffer = None

    def _begin(self, prepared: PreparedSave, began: float, *, verify: bool) -> PendingSave:
        from seedvc_ckpt.format import staging

        self._buffer = self._buffer or staging.StagingBuffer()
        records, copies = self._buffer.place(prepared.encoded.records)
        later, at_once = self._deferred(copies)
        moments = staging.moments_on_devices(copies)
        staging.make_copies(at_once, moments)
        staged = replace(prepared, encoded=prepared.encoded.with_records(records))

        def copy(of_optimizer: int) -> None:
            staging.make_copies(later[of_optimizer], moments)

        def write() -> CheckpointInfo:
            return staged.write(verify=verify)

        self._pending = PendingSave(staged.name, list(later), copy, write, self._told, began)
        self._pending.start()
        return self._pending

    def _deferred(self, copies: Sequence[Copy]) -> tuple[dict[int, list[Copy]], list[Copy]]:
        """The copies that can wait for each optimizer's next step, and those that can't."""
        from seedvc_ckpt.format.staging import spans_changed_by

        spans = spans_changed_by({key: (optimizer, tensors) for key, (optimizer, tensors, _) in self._guarded.items()})
        later: dict[int, list[Copy]] = {key: [] for key in self._guarded}
        at_once: list[Copy] = []
        for copy in copies:
            begin = copy.source.memory or 0
            end, key = spans.get(begin, (-1, 0))
            (later[key] if begin + copy.source.nbytes <= end else at_once).append(copy)
        return later, at_once

    def _await_copies_of(self, optimizer: torch.optim.Optimizer) -> None:
        if self._pending is not None and self._process == os.getpid():
            began = time.monotonic()
            self._pending.wait_copied(id(optimizer))
            self.seconds_waited += time.monotonic() - began

    def _refuse_other_process(self) -> None:
        if self._process != os.getpid():
            raise CheckpointError(
                "this AsyncSaver belongs to the parent process, whose threads a fork does not take along: make one of "
                "your own"
            )


_unfinished: weakref.WeakSet[PendingSave] = weakref.WeakSet()


def _finish_all() -> None:
    for pending in list(_unfinished):
        if pending._process == os.getpid() and pending._thread.is_alive():  # noqa: SLF001
            pending._thread.join()  # noqa: SLF001


# The interpreter waits for our threads, but takes away the executors first with which client libraries look up names of
# hosts. Of what is called before that, the last to be registered comes first.
if hasattr(threading, "_register_atexit"):
    import concurrent.futures.thread  # noqa: F401 - registers the taking away

    threading._register_atexit(_finish_all)  # noqa: SLF001 - there is no public way


class PendingSave:
    """A save that goes on in the background.

    Attributes:
        name: The checkpoint's name.
        seconds: How long it took from the call of `save` until all was done, pruning included; None before that.
    """

    def __init__(
        self,
        name: str,
        owners: Sequence[int],
        copy: Callable[[int], object],
        write: Callable[[], CheckpointInfo],
        told: _Told,
        began: float,
    ) -> None:
        self.name = name
        self.seconds: float | None = None
        self._began = began
        self._work = [(copy, write)]
        self._finished = False
        self._copied = {owner: threading.Event() for owner in owners}
        self._told = told
        self._info: CheckpointInfo | None = None
        self._error: BaseException | None = None
        self._process = os.getpid()
        # not a daemon: the interpreter waits for it before it exits
        _unfinished.add(self)
        self._thread = threading.Thread(target=self._run, name=f"seedvc-ckpt save {name}", daemon=False)

    def __repr__(self) -> str:
        found = "in progress" if not self.done else f"failed: {self._error}" if self._error else "done"
        return f"<PendingSave {self.name}: {found}>"

    def start(self) -> None:
        """Go to the background; where no thread can be started any more, do all of it now."""
        if not threading.main_thread().is_alive():  # the interpreter exits and waits for no further thread
            self._run()
            return
        try:
            self._thread.start()
        except RuntimeError:
            self._run()

    @property
    def done(self) -> bool:
        """Whether it is durable, or has failed."""
        return self._finished

    @property
    def info(self) -> CheckpointInfo | None:
        """The checkpoint once it is durable; None before, and if it has failed."""
        return self._info

    def wait_staged(self) -> None:
        """Wait until everything is copied; from then on all tensors may be changed."""
        for owner in self._copied:
            self.wait_copied(owner)

    def wait_copied(self, owner: int) -> None:
        """Wait until what the optimizer changes is copied."""
        self._refuse_other_process()
        if owner in self._copied:
            # a thread that an interrupt kept from starting copies nothing
            while not self._copied[owner].wait(1.0) and self._thread.is_alive():
                pass

    def wait(self) -> None:
        """Wait until it is durable or has failed."""
        self._refuse_other_process()
        if self._thread.is_alive():
            self._thread.join()

    def result(self) -> CheckpointInfo:
        """Wait, and return the checkpoint.

        Raises:
            CheckpointError: if it could not be saved, as `CheckpointStore.save` has it.
        """
        self.wait()
        if self._error is not None:
            self._told.was_told(self)
            raise self._error
        if self._info is None:
            raise CheckpointError(f"the save of {self.name} was interrupted before it began: save again")
        return self._info

    def _refuse_other_process(self) -> None:
        if self._process != os.getpid():
            raise CheckpointError(f"the save of {self.name} goes on in the parent process: wait for it there")

    def _run(self) -> None:
        copy, write = self._work.pop()
        try:
            for owner, copied in self._copied.items():
                copy(owner)
                copied.set()
            del copy  # it holds the live state, which may go now
            info = write()
            self.seconds = time.monotonic() - self._began
            self._info = info
        except BaseException as error:  # noqa: BLE001 - told to the caller
            _log.debug("the save of %s failed", self.name, exc_info=error)
            _forget_frames(error)  # which hold the copies of the state
            self._error = error
            self._told.failed(self, error)
        finally:
            del write
            self._finished = True
            for copied in self._copied.values():
                copied.set()


class _Told:
    """Which failures the caller has not been told of."""

    def __init__(self) -> None:
        self._rest: list[tuple[PendingSave, BaseException]] = []
        self._guard = threading.Lock()
        self._abandoned = False

    def failed(self, save: PendingSave, error: BaseException) -> None:
        with self._guard:
            self._rest.append((save, error))
            abandoned = self._abandoned
        if abandoned:
            self.log_rest()

    def was_told(self, save: PendingSave) -> None:
        with self._guard:
            self._rest[:] = [entry for entry in self._rest if entry[0] is not save]

    def raise_rest(self) -> None:
        if told := self._next():
            raise told[1]

    def log_rest(self) -> None:
        while told := self._next():
            _log.error("the save of %s failed: %s", told[0].name, told[1])

    def abandon(self) -> None:
        """Nobody will ask any more: log what has failed, and what will."""
        self._abandoned = True
        self.log_rest()

    def _next(self) -> tuple[PendingSave, BaseException] | None:
        with self._guard:
            return self._rest.pop(0) if self._rest else None


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _checked(when_busy: WhenBusy) -> WhenBusy:
    if when_busy not in ("wait", "skip"):
        raise ValueError(f'when_busy is "wait" or "skip", got {when_busy!r}')
    return when_busy
