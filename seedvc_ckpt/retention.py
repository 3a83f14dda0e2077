"""Which checkpoints to keep, and why: pure functions of a listing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from seedvc_ckpt.checkpoint import CheckpointInfo
from seedvc_ckpt.errors import MissingMetricError

__all__ = [
    "Metrics",
    "Mode",
    "Plan",
    "Rule",
    "keep_best",
    "keep_best_of",
    "keep_every",
    "keep_last",
    "keep_within",
    "plan",
    "ranked",
]

Metrics = Mapping[CheckpointInfo, Mapping[str, float]]
"""The metrics of each checkpoint; looked up only by rules that need them."""

Rule = Callable[[Sequence[CheckpointInfo], Metrics], Mapping[CheckpointInfo, str]]
"""From a listing, ascending by (step, epoch), to the checkpoints to keep, each with the reason."""

Mode = Literal["min", "max"]
"""Which of two values of a metric is better: the smaller or the larger."""


@dataclass(frozen=True)
class Plan:
    """What pruning keeps and removes.

    Attributes:
        keep: The checkpoints that stay, each with all reasons why.
        remove: The checkpoints that go, oldest first.
    """

    keep: Mapping[CheckpointInfo, tuple[str, ...]]
    remove: tuple[CheckpointInfo, ...]


def plan(infos: Iterable[CheckpointInfo], rules: Rule | Sequence[Rule] | None, metrics: Metrics | None = None) -> Plan:
    """Join the rules: a checkpoint stays if any rule keeps it. Without rules all stay.

    The newest and the pinned ones stay whatever the rules say.

    Raises:
        MissingMetricError: if a rule needs a metric that no checkpoint has.
    """
    listing = sorted(infos, key=lambda info: (info.step, info.epoch))
    reasons: dict[CheckpointInfo, list[str]] = {info: [] for info in listing}
    if listing:
        reasons[listing[-1]].append("newest")
    for info in listing:
        if info.pinned:
            reasons[info].append("pinned")
    rules = [rules] if callable(rules) else rules
    if not rules:
        for kept in reasons.values():
            kept.append("no rule given")
    else:
        for rule in rules:
            for info, reason in rule(listing, metrics or {}).items():
                reasons[info].append(reason)
    return Plan(
        keep={info: tuple(why) for info, why in reasons.items() if why},
        remove=tuple(info for info, why in reasons.items() if not why),
    )


def keep_last(n: int) -> Rule:
    """Keep the `n` newest checkpoints, n ≥ 1."""
    _positive("keep_last", n)

    def rule(infos: Sequence[CheckpointInfo], _metrics: Metrics) -> dict[CheckpointInfo, str]:
        return dict.fromkeys(infos[-n:], f"one of the last {n}")

    return rule


def keep_every(steps: int) -> Rule:
    """Keep each checkpoint whose step is a multiple of `steps`, steps ≥ 1."""
    _positive("keep_every", steps)

    def rule(infos: Sequence[CheckpointInfo], _metrics: Metrics) -> dict[CheckpointInfo, str]:
        return {info: f"every {steps} steps" for info in infos if info.step % steps == 0}

    return rule


def keep_within(age: timedelta) -> Rule:
    """Keep what was published at most `age` before the newest checkpoint (not before now: no clock is asked)."""
    if not isinstance(age, timedelta) or age < timedelta(0):
        raise ValueError(f"keep_within takes a timedelta of zero or more, got {age!r}")

    def rule(infos: Sequence[CheckpointInfo], _metrics: Metrics) -> dict[CheckpointInfo, str]:
        return {info: f"within {age} of the newest" for info in infos if infos[-1].modified - info.modified <= age}

    return rule


def keep_best(metric: str, n: int = 1, mode: Mode = "min", *, scored_later: bool = False) -> Rule:
    """Keep the `n` checkpoints with the smallest (or, with mode "max", largest) `metric`, n ≥ 1.

    Of equal values the newer counts as better; NaN is worse than any number. A checkpoint that lacks the metric while
    others have it is not scored yet, and stays.

    Args:
        metric: Given to `save`, or to `CheckpointStore.add_scores`.
        n: How many.
        mode: Which is better.
        scored_later: Keep all as long as none is scored, instead of raising.

    Raises:
        MissingMetricError: from the rule, if no checkpoint has the metric.
    """
    _positive("keep_best", n)
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"keep_best takes the name of a metric, got {metric!r}")
    if mode not in ("min", "max"):
        raise ValueError(f'keep_best takes mode "min" or "max", got {mode!r}')

    def rule(infos: Sequence[CheckpointInfo], metrics: Metrics) -> dict[CheckpointInfo, str]:
        try:
            best = ranked(infos, metric, mode, metrics)
        except MissingMetricError:
            if not scored_later:
                raise
            best = []
        kept = {info: f"best {metric} ({mode}), {metrics[info][metric]:.6g}" for info in best[:n]}
        return {**dict.fromkeys(set(infos) - set(best), f"no {metric} yet"), **kept}

    return rule


def keep_best_of(text: str, *, scored_later: bool = False) -> Rule:
    """`keep_best` as it is written on a command line: ``loss``, ``loss:2``, ``score:max`` or ``score:2:max``.

    Raises:
        ValueError: for anything else.
    """
    metric, *rest = text.split(":")
    mode: Mode = "min"
    if rest and rest[-1] in ("min", "max"):
        mode = "max" if rest.pop() == "max" else "min"
    if not metric or len(rest) > 1 or (rest and not rest[0].isdecimal()) or (rest and int(rest[0]) < 1):
        raise ValueError(f"{text!r}: write loss, loss:2 or score:2:max")
    return keep_best(metric, int(rest[0]) if rest else 1, mode, scored_later=scored_later)


def ranked(infos: Sequence[CheckpointInfo], metric: str, mode: Mode, metrics: Metrics) -> list[CheckpointInfo]:
    """Those of the checkpoints that have the metric, best first; the order of `keep_best`.

    Args:
        infos: Ascending by (step, epoch).
        metric: Its name.
        mode: Whether the smallest or the largest is best.
        metrics: The metrics of each checkpoint.

    Raises:
        MissingMetricError: if there are checkpoints, and none has it.
    """
    known = {info: metrics.get(info, {}) for info in infos}
    values = {info: found[metric] for info, found in known.items() if metric in found}
    if infos and not values:
        others = ", ".join(sorted({name for found in known.values() for name in found})) or "none"
        raise MissingMetricError(
            f"no checkpoint has the metric {metric!r} (they have: {others}): pass metrics={{{metric!r}: …}} to every "
            "save, score them with add_scores or seedvc-train evaluate, or choose another metric"
        )

    def badness(info: CheckpointInfo) -> tuple[bool, float]:
        value = values[info]
        if math.isnan(value):
            return True, 0.0
        return False, value if mode == "min" else -value

    newest_first = list(reversed(values))
    return sorted(newest_first, key=badness)


def _positive(rule: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{rule} takes a whole number of at least 1, got {number!r}")
