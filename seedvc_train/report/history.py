"""What a run's folder tells of its training, as far as it is there."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from seedvc_ckpt import CheckpointError, CheckpointInfo, CheckpointStore, scores
from seedvc_ckpt.manifest import Manifest
from seedvc_ckpt.storage import Storage, read_file
from seedvc_train import events, metrics
from seedvc_train.runlog import parsed

__all__ = ["Checkpoint", "History", "Line", "read_history"]

MELS = "mels"
_PNG = b"\x89PNG\r\n\x1a\n"
_CONFIGS = (".yml", ".yaml")
_LARGEST = 1e18


@dataclass(frozen=True)
class Line:
    """A line of a log: its step, and all that stands in it."""

    step: int
    values: Mapping[str, Any]

    def number(self, key: str) -> float:
        """A value as a number; NaN where it is missing, no number, or one that nothing here can measure."""
        return measured(self.values.get(key))

    def text(self, key: str) -> str:
        """A value as text; "" where it is missing."""
        return str(self.values.get(key, ""))


def measured(value: object) -> float:
    """A value as a number that can be drawn, else NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < _LARGEST else math.nan  # type: ignore[arg-type]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the run, whether it is still there or not.

    Attributes:
        name: Its file.
        step: Its step.
        epoch: Its epoch, None where only its removal is known.
        size: Bytes; NaN where that is not known.
        fate: "here", "pinned", "pruned", "set aside" or "gone".
        reason: Why it was set aside.
        seconds_stalled: How long training waited for it; NaN where that is not known, as below.
        seconds_until_durable: How long it took from the call on.
        time: When it was saved.
        loss: The running loss when it was saved.
        scores: What it was found to be worth.
    """

    name: str
    step: int
    epoch: int | None
    size: float
    fate: str
    reason: str = ""
    seconds_stalled: float = math.nan
    seconds_until_durable: float = math.nan
    time: str = ""
    loss: float = math.nan
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def here(self) -> bool:
        """Whether its file is in the run."""
        return self.fate in ("here", "pinned")


@dataclass(frozen=True)
class History:
    """All that is known of a run.

    Attributes:
        name: The run's name.
        location: Where it lies.
        lines: The logged steps, ascending, no step twice.
        events: What happened, in the order of the log. A failure has the last step that is known of before it.
        checkpoints: Ascending by step; of two files of one name, one after the other, both.
        scores: By metric, the value of each step; only of what was computed on the same as the newest.
        scored_on: By metric, what that is; "" where it is not told.
        manifest: Of the newest checkpoint, where it has one.
        configs: The YAML files in the run, by name.
        mels: The pictures of mels, by name.
        missing: What is not there, in words.
    """

    name: str
    location: str
    lines: Sequence[Line]
    events: Sequence[Line]
    checkpoints: Sequence[Checkpoint]
    scores: Mapping[str, Mapping[int, float]]
    scored_on: Mapping[str, str]
    manifest: Manifest | None
    configs: Mapping[str, str]
    mels: Mapping[str, bytes]
    missing: Sequence[str]

    def of(self, *kinds: str) -> list[Line]:
        """The events of these kinds."""
        return [event for event in self.events if event.text("event") in kinds]

    @property
    def step(self) -> int | None:
        """The last step that is known of."""
        steps = [line.step for line in (*self.lines, *self.events)] + [it.step for it in self.checkpoints]
        return max(steps, default=None)

    def best(self, metric: str) -> int:
        """The step with the lowest score; of equal ones the newest, of NaN none while there is a number."""
        known = self.scores[metric]
        return min(known, key=lambda step: (math.isnan(known[step]), known[step], -step))


def read_history(store: CheckpointStore) -> History:
    """Read what there is; torn and foreign lines of logs are left out.

    Raises:
        StorageError: if the run can't be read.
    """
    storage, infos = store.storage, store.list()
    lines = sorted({line.step: line for line in _lines(storage, metrics.NAME)}.values(), key=lambda line: line.step)
    happened = list(_with_steps(_lines(storage, events.NAME, step=-1)))
    judged = scores.comparable(storage, {})
    scored, scores_of = _scores(judged)
    scored_on = {metric: score.on.get(metric, "") for score in judged for metric in score.scores}
    manifest = None
    if infos:
        with suppress(CheckpointError):  # a damaged one is shown by its name and size like any other
            manifest = store.file(infos[-1]).manifest()
    checkpoints = _checkpoints(infos, happened, lines, scores_of)
    names = sorted(entry.name for entry in storage.list())
    configs = {name: _text(storage, name) for name in names if name.endswith(_CONFIGS)}
    mels = dict(_pictures(storage.below(MELS)))
    there = {
        f"no {metrics.NAME}: losses, learning rate and times are not known (Seed-VC's own trainer writes none)": lines,
        f"no {events.NAME}: saves, resumes and prunings are not known, only the checkpoints that are there": happened,
        "no checkpoints": checkpoints,
        f"no {scores.NAME}: no checkpoint was scored (seedvc-train evaluate)": scored,
        f"no pictures in {MELS}/ (seedvc-train evaluate)": mels,
    }
    missing = [words for words, found in there.items() if not found]
    return History(
        store.run_name,
        store.location,
        lines,
        happened,
        checkpoints,
        scored,
        scored_on,
        manifest,
        configs,
        mels,
        missing,
    )


def _lines(storage: Storage, name: str, step: int | None = None) -> Iterator[Line]:
    """The lines of a log that have a step, or `step` where one is given."""
    if storage.stat(name) is None:
        return
    for line in read_file(storage, name).splitlines(keepends=True):
        values = parsed(line)
        found = values.get("step", step)
        if values and isinstance(found, int) and not isinstance(found, bool) and abs(found) < 1 << 53:
            yield Line(found, values)


def _with_steps(happened: Iterable[Line]) -> Iterator[Line]:
    """Each event with the last step before it, where it has none."""
    last = 0
    for event in happened:
        last = event.step if event.step >= 0 else last
        yield Line(last, event.values)


def _scores(judged: Iterable[scores.Score]) -> tuple[dict[str, dict[int, float]], dict[str, dict[str, float]]]:
    """Scores by metric and step, and by checkpoint and metric."""
    by_metric: dict[str, dict[int, float]] = {}
    by_name: dict[str, dict[str, float]] = {}
    for score in judged:
        for metric, value in score.scores.items():
            by_metric.setdefault(metric, {})[score.step] = measured(value)
            by_name.setdefault(score.name, {})[metric] = measured(value)
    return {metric: dict(sorted(values.items())) for metric, values in sorted(by_metric.items())}, by_name


def _checkpoints(
    infos: Sequence[CheckpointInfo],
    happened: Sequence[Line],
    lines: Sequence[Line],
    scores_of: Mapping[str, Mapping[str, float]],
) -> list[Checkpoint]:
    """Join the listing and the events."""
    there = {info.name: info for info in infos}
    found: dict[str, dict[str, Any]] = {}
    before: list[dict[str, Any]] = []  # files that were set aside, and others of their names since
    for event in happened:
        kind, name = event.text("event"), event.text("name")
        if kind == "saved":
            if name in found:
                before.append(found[name])
            found[name] = {
                "epoch": event.values.get("epoch"),
                "size": event.number("bytes"),
                "seconds_stalled": event.number("seconds_stalled"),
                "seconds_until_durable": event.number("seconds_until_durable"),
                "time": event.text("time"),
            }
        elif kind in ("pruned", "set_aside"):
            end = {"fate": kind.replace("_", " "), "reason": event.text("reason")}
            found.setdefault(name, {"epoch": None, "size": math.nan}).update(end)
        else:
            continue
        found[name].update(name=name, step=event.step)
    for name, info in there.items():
        known = found.setdefault(name, {"time": info.modified.isoformat(timespec="seconds")})
        if "fate" in known:  # a file of that name was brought back
            before.append(dict(known))
            del known["fate"]
        fate = "pinned" if info.pinned else "here"
        known.update(name=name, step=info.step, epoch=info.epoch, size=info.size, fate=fate, reason="")
    made = [
        Checkpoint(
            **{"fate": "gone", **known}, loss=_loss_at(lines, known["step"]), scores=scores_of.get(known["name"], {})
        )
        for known in [*before, *found.values()]
    ]
    return sorted(made, key=lambda checkpoint: (checkpoint.step, checkpoint.time))


def _loss_at(lines: Sequence[Line], step: int) -> float:
    """The running loss of the last line up to a step."""
    at = bisect_right(lines, step, key=lambda line: line.step)
    return lines[at - 1].number("running_loss") if at else math.nan


def _pictures(storage: Storage) -> Iterator[tuple[str, bytes]]:
    """Those of the folder that are PNGs, by name with numbers as numbers."""
    for name in sorted((entry.name for entry in storage.list()), key=_natural):
        if name.endswith(".png") and (content := read_file(storage, name)).startswith(_PNG):
            yield name, content


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _text(storage: Storage, name: str) -> str:
    return read_file(storage, name).decode("utf-8", "replace")
