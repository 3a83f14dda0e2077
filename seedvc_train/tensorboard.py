"""A run's logs for TensorBoard: its numbers as scalars, what happens to it as text; and its scores."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from seedvc_ckpt.scores import Score

__all__ = ["FOLDER", "TensorBoard", "show_scores"]

FOLDER = "tensorboard"
_SCORES = "evaluate"  # below it, since its trainer may be writing to the folder itself

_SECONDS = 10  # between writes to the disk: what a killed trainer can lose


class TensorBoard:
    """Writes lines of logs, as `RunLog.copy_to` gives them, to event files.

    Args:
        folder: Where the files go, beside those of earlier starts.
        step: The step that the run goes on from; TensorBoard forgets what was written of later ones.
    """

    def __init__(self, folder: str, step: int) -> None:
        self._writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=_SECONDS)
        self.folder = folder
        self._step = step

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line: its numbers, and of an event also its words, under the event's name."""
        self._step = line.get("step", self._step)  # a failure has none
        event = line.get("event")
        of = "train" if event is None else event
        for key, value in line.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{of}/{key}", value, self._step)
        if event is not None:
            words = {key: value for key, value in line.items() if key not in ("step", "event")}
            text = "  \n".join(f"{key}: {value}" for key, value in words.items())
            self._writer.add_text(f"events/{event}", text, self._step)
            self._writer.flush()


def show_scores(folder: str, scores: Iterable[Score]) -> str:
    """Show scores at the steps of their checkpoints, in place of all that were shown before, if any.

    Args:
        folder: The folder of the run's other event files; these go below it.
        scores: In the order in which they were found: of two of one step the later counts.

    Returns:
        Where the files are.
    """
    shown = {(score.step, metric): value for score in scores for metric, value in score.scores.items()}
    folder = os.path.join(folder, _SCORES)
    old = [entry.path for entry in os.scandir(folder)] if os.path.isdir(folder) else []
    if shown or old:
        with closing(SummaryWriter(folder, purge_step=0)) as writer:  # so that an open TensorBoard forgets the old ones
            for (step, metric), value in sorted(shown.items()):
                writer.add_scalar(f"scores/{metric}", value, step)
    for path in old:
        with suppress(FileNotFoundError):  # another evaluation was as quick
            os.unlink(path)
    return folder
