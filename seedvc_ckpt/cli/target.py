"""What the commands' arguments stand for: a RUN, or a FILE in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from seedvc_ckpt.errors import PatternError, StorageError
from seedvc_ckpt.naming import SEED_VC, NamePattern
from seedvc_ckpt.retention import Mode
from seedvc_ckpt.store import CheckpointStore

if TYPE_CHECKING:
    from seedvc_ckpt.file import CheckpointFile

__all__ = ["Best", "Which", "best_of", "checkpoint_at", "is_url", "pattern_option", "run_at", "step_option"]

_F = TypeVar("_F", bound=Callable[..., Any])
_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


def _as_pattern(_ctx: click.Context, _parameter: click.Parameter, value: str) -> NamePattern:
    try:
        return NamePattern(value)
    except PatternError as error:
        raise click.BadParameter(str(error)) from None


def pattern_option(command: _F) -> _F:
    """``--pattern TEMPLATE``."""
    option = click.option(
        "--pattern",
        metavar="TEMPLATE",
        callback=_as_pattern,
        default=SEED_VC.template,
        help=f"How the files are named.  [default: {SEED_VC.template}]",
    )
    return option(command)


@dataclass(frozen=True)
class Best:
    """The checkpoint that is best by a metric.

    Attributes:
        metric: Its name.
        mode: Whether the smallest or the largest is best.
    """

    metric: str
    mode: Mode = "min"


Which = int | Best | None
"""A checkpoint of a run: that of a step, the best, or the latest."""


def best_of(text: str) -> Best:
    """What ``METRIC[:max]`` means."""
    metric, mark, mode = text.partition(":")
    if not metric or (mark and mode not in ("min", "max")):
        raise click.BadParameter(f"{text!r}: write val_loss or score:max")
    return Best(metric, "max" if mode == "max" else "min")


def step_option(command: _F) -> _F:
    """``--step N`` and ``--best METRIC``, both as the command's `step`."""

    @wraps(command)
    def choosing(*arguments: Any, step: int | None, best: Best | None, **options: Any) -> Any:
        if step is not None and best is not None:
            raise click.UsageError("--step and --best name one checkpoint each: give one of them")
        return command(*arguments, step=best if step is None else step, **options)

    best = click.option(
        "--best",
        metavar="METRIC[:max]",
        callback=lambda _ctx, _parameter, value: None if value is None else best_of(value),
        help="The checkpoint of the RUN with the smallest (largest) METRIC.",
    )
    step = click.option("--step", type=click.IntRange(min=0), help="A step of the RUN.  [default: the latest]")
    return cast("_F", step(best(choosing)))


def is_url(location: str) -> bool:
    """Whether it is a URL; anything else is a local path."""
    return "://" in location


def run_at(location: str, **options: Any) -> CheckpointStore:
    """The store of an existing run."""
    if not is_url(location) and not os.path.isdir(location):
        raise click.UsageError(f"{_missing(location)}: RUN is a folder with checkpoints")
    try:
        return CheckpointStore(location, **options)
    except StorageError as error:
        raise click.UsageError(str(error)) from None


def checkpoint_at(location: str, which: Which, pattern: NamePattern) -> CheckpointFile:
    """The file that a RUN or FILE argument means."""
    if os.path.isdir(location) or (is_url(location) and not _SUFFIX.search(location)):
        store = run_at(location, pattern=pattern, read_only=True)
        return store.file(store.best(which.metric, which.mode) if isinstance(which, Best) else which)
    if which is not None:
        option = "--best" if isinstance(which, Best) else "--step"
        raise click.UsageError(f"{option} belongs to a RUN; a FILE is one checkpoint already")
    if not is_url(location) and not os.path.exists(location):
        raise click.UsageError(f"{_missing(location)}: it names no run's folder and no checkpoint file")
    from seedvc_ckpt.file import CheckpointFile  # listing has no use for it

    file = CheckpointFile.at(location)
    if pattern.parse(file.name):
        file.pattern = pattern
    return file


def _missing(location: str) -> str:
    return f"{location!r} is not a folder" if os.path.exists(location) else f"{location!r} does not exist"
