"""The saves of a run, in the background or not, and how long training waited for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from seedvc_ckpt import AsyncSaver, CheckpointError, CheckpointInfo, CheckpointStore
from seedvc_ckpt.manifest import Setting
from seedvc_ckpt.saver import PendingSave
from seedvc_train.events import EventLog

__all__ = ["Saving"]

_log = logging.getLogger(__name__)


class Saving:
    """Saves to a store. Leaving it finishes what was begun, and raises what nobody was told.

    Args:
        store: Where to.
        optimizers: Those whose `step` changes the state, each with the tensors that change after it only.
        events: Told of each save once it is durable, and of what was pruned after it.
        scored_on: What the scores that come with saves were computed on.
        in_background: Write while training goes on.
    """

    def __init__(
        self,
        store: CheckpointStore,
        optimizers: Mapping[Optimizer, Iterable[Tensor]],
        events: EventLog,
        scored_on: str = "",
        *,
        in_background: bool,
    ) -> None:
        self._durable: int | None = None
        self._store = store
        self._saver = AsyncSaver(store) if in_background else None
        self._optimizers = optimizers
        self._events = events
        self._stack = ExitStack()
        self._seconds = 0.0
        self._pending: tuple[PendingSave, float, Mapping[str, float]] | None = None  # what had been waited, scores
        self._scored_on = scored_on
        self._scoring = ThreadPoolExecutor(1, "seedvc-train scores")  # on a server it takes a while
        self._pruned = len(store.pruned)

    def __enter__(self) -> Saving:
        if self._saver is not None:
            self._stack.enter_context(self._saver)
            for optimizer, tensors in self._optimizers.items():
                self._saver.guard(optimizer, tensors)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
            self._look()
        finally:
            self._scoring.shutdown()

    def save(
        self,
        state: Any,
        step: int,
        epoch: int,
        metrics: Mapping[str, float],
        settings: Mapping[str, Setting],
        scores: Mapping[str, float],
    ) -> None:
        """Save a state whose tensors are live; its scores are kept as metrics, and written down once it is durable.

        Raises:
            CheckpointError: if it, or the one before it, can't be saved.
        """
        began, waited, metrics = time.monotonic(), self.seconds, {**metrics, **scores}
        if self._saver is None:
            info = self._store.save(state, step, epoch, metrics=metrics, settings=settings)
            self._seconds += time.monotonic() - began
            self._note(info, self.seconds - waited, self.seconds - waited, scores)
        else:
            pending = self._saver.save(state, step, epoch, metrics=metrics, settings=settings)
            self._look()  # at the one before, which it waited for
            self._pending = (pending, waited, scores) if pending else None
            self._seconds += time.monotonic() - began

    @property
    def durable(self) -> int | None:
        """The step of the newest save that is known to be durable; None before the first."""
        self._look()
        return self._durable

    def _look(self) -> None:
        if self._pending is None:
            return
        pending, waited, scores = self._pending
        if pending.info is not None:
            self._pending = None
            self._note(pending.info, self.seconds - waited, pending.seconds or 0.0, scores)

    def _note(self, info: CheckpointInfo, stalled: float, durable: float, scores: Mapping[str, float]) -> None:
        self._durable = info.step
        if scores:
            self._scoring.submit(self._score, info, scores)
        self._events.write(
            "saved",
            info.step,
            epoch=info.epoch,
            name=info.name,
            bytes=info.size,
            seconds_stalled=round(stalled, 6),
            seconds_until_durable=round(durable, 6),
        )
        pruned = self._store.pruned
        for gone in pruned[self._pruned :]:
            self._events.write("pruned", gone.step, name=gone.name)
        self._pruned = len(pruned)

    def _score(self, info: CheckpointInfo, scores: Mapping[str, float]) -> None:
        try:
            self._store.add_scores(info, scores, on=self._scored_on)
        except CheckpointError as error:  # checkpoints matter more, and evaluate scores what is not scored
            _log.warning("the scores of %s were not written down: %s", info.name, error)

    @property
    def seconds(self) -> float:
        """How long training has waited so far: in `save`, and in steps that came before the copies were made."""
        return self._seconds + (self._saver.seconds_waited if self._saver is not None else 0.0)
