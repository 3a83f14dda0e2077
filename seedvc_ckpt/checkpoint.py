"""What a listing tells of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

__all__ = ["CheckpointInfo"]


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as the listing shows it.

    Attributes:
        name: File name inside the store.
        step: Training steps done.
        epoch: Epoch that was running; 0 where the name does not tell.
        size: Bytes.
        modified: When the file was published (UTC).
        pinned: Whether pruning has to leave it alone.
    """

    name: str
    step: int
    epoch: int
    size: int
    modified: datetime
    pinned: bool = False
