"""``scores.jsonl``: what checkpoints were found to be worth, after they were saved.

One line for each time that a checkpoint was scored. It is rewritten whole under a lease of its own, so that a run can
be scored while it trains, by several processes at once, and on servers that can't append.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seedvc_ckpt.checkpoint import CheckpointInfo
from seedvc_ckpt.errors import LeaseHeldError
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.storage import Lease, Storage, read_file

__all__ = ["NAME", "Score", "Scores", "append", "comparable", "directory_digest"]

_log = logging.getLogger(__name__)

NAME = "scores.jsonl"
_LEASE = ".seedvc_ckpt.scores"  # the folder whose lease guards the file: that of the run belongs to its trainer
_PATIENCE = 60.0  # seconds; another process has the file for a fraction of one
_one_thread = threading.Lock()  # the lease belongs to the process


class Score(BaseModel):
    """A line of the file.

    Attributes:
        name: The checkpoint's file.
        step: Its step.
        epoch: Its epoch.
        size: Its bytes.
        digest: Of its zip directory, with the CRC-32s of all that it holds: another file of its name is told apart.
        scores: Its numbers, by metric.
        on: By metric, what the number was computed on. Numbers of one metric compare only where this is the same.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", ser_json_inf_nan="strings")

    name: str
    step: int
    epoch: int = 0
    size: int
    digest: str
    scores: dict[str, Annotated[float, Field(strict=False)]]
    on: dict[str, str] = {}


@dataclass(frozen=True)
class Scores:
    """The scores of the checkpoints that are there.

    Attributes:
        lines: In the order in which they were added.
        on: By metric, what its numbers have to be computed on to count.
    """

    lines: Sequence[Score]
    on: Mapping[str, str]

    @classmethod
    def read(cls, storage: Storage, infos: Iterable[CheckpointInfo], on: Mapping[str, str]) -> Scores:
        """Those lines of the file that belong to one of `infos`; what is no such line is logged and left out.

        Of each metric that `on` does not name, what counts is computed on the same as its newest score.

        Raises:
            StorageError: if it can't be read.
        """
        if storage.stat(NAME) is None:
            return cls((), on)
        there = {(info.name, info.size) for info in infos}
        parsed = _parsed(read_file(storage, NAME), storage.location)
        lines = [line for line in parsed if (line.name, line.size) in there]
        newest = {metric: line.on.get(metric, "") for line in lines for metric in line.scores}
        return cls(lines, {**newest, **on})

    def of(self, name: str, digest: str, recorded: Mapping[str, float]) -> dict[str, float]:
        """All that is known of a checkpoint: the metrics of its manifest, and its scores over them; later ones win.

        A manifest does not tell what its metrics were computed on, so that they count only where scores don't either.
        """
        found = {metric: value for metric, value in recorded.items() if not self.on.get(metric)}
        for line in self.lines:
            if (line.name, line.digest) == (name, digest):
                found.update({key: value for key, value in line.scores.items() if line.on.get(key, "") == self.on[key]})
        return found


def comparable(storage: Storage, on: Mapping[str, str]) -> list[Score]:
    """All lines of the file, of checkpoints that are gone too, each with those of its numbers that compare.

    These are the ones that are computed on what `on` says, or else on the same as the newest of their metric.

    Raises:
        StorageError: if it can't be read.
    """
    if storage.stat(NAME) is None:
        return []
    lines = list(_parsed(read_file(storage, NAME), storage.location))
    wanted = {metric: line.on.get(metric, "") for line in lines for metric in line.scores} | dict(on)
    return [
        line.model_copy(
            update={"scores": {key: it for key, it in line.scores.items() if line.on.get(key, "") == wanted[key]}}
        )
        for line in lines
    ]


def directory_digest(archive: Archive) -> str:
    """128-bit BLAKE2b, as hex, of a checkpoint's zip directory."""
    return blake2b(archive.end, digest_size=16).hexdigest()


def append(storage: Storage, score: Score) -> None:
    """Add a line, after those of all others.

    Raises:
        LeaseHeldError: if another process keeps the file for a minute.
        SaveFailedError: if it can't be written.
        StorageError: if it can't be read.
    """
    with _alone(storage) as lease:
        old = read_file(storage, NAME) if storage.stat(NAME) is not None else b""
        whole, _, torn = old.rpartition(b"\n")
        content = (whole + b"\n" if whole else b"") + (torn + b"\n" if _score(torn) else b"")
        content += score.model_dump_json().encode() + b"\n"
        storage.publish(NAME, len(content), [memoryview(content)], overwrite=True, before=lease.check)


@contextmanager
def _alone(storage: Storage) -> Iterator[Lease]:
    """The right to write the file, waited for."""
    until = time.monotonic() + _PATIENCE
    with _one_thread:
        while True:
            try:
                lease = storage.below(_LEASE).lease()
                break
            except LeaseHeldError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        try:
            yield lease
        finally:
            lease.close()


def _parsed(content: bytes, location: str) -> Iterator[Score]:
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        score = _score(line)
        if score is not None:
            yield score
        elif line.strip() and number < len(lines):  # the last one may be torn
            _log.warning("line %d of %s in %s is no score, and left out", number, NAME, location)


def _score(line: bytes) -> Score | None:
    try:
        return Score.model_validate_json(line)
    except ValidationError:
        return None
