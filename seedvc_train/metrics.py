"""``metrics.jsonl``: one line for each logged step of a run, and no step twice."""

from __future__ import annotations

from seedvc_ckpt import CheckpointStore
from seedvc_train.runlog import RunLog, parsed

__all__ = ["NAME", "MetricsLog"]

NAME = "metrics.jsonl"


class MetricsLog(RunLog):
    """Appends to the log of a run, after cutting it back to the step that the run goes on from.

    Args:
        store: The run, whose lease this process has.
        step: The last step to keep.

    Attributes:
        reached: The last step that was logged before it was cut; `step` where that was later.
    """

    def __init__(self, store: CheckpointStore, step: int) -> None:
        def place(line: bytes) -> int | None:
            found = _step_of(line)
            return found if found is not None and found <= step else None

        super().__init__(store, NAME, place)
        self.reached = max([step, *filter(None, map(_step_of, self.dropped))])


def _step_of(line: bytes) -> int | None:
    found = parsed(line).get("step")
    return found if isinstance(found, int) else None
