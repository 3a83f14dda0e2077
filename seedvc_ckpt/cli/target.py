"""What the commands' arguments stand for: a RUN, or a FILE in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from seedvc_ckpt.errors import PatternError, StorageError
from seedvc_ckpt.naming import SEED_VC, NamePattern
from seedvc_ckpt.store import CheckpointStore

if TYPE_CHECKING:
    from seedvc_ckpt.file import CheckpointFile

__all__ = ["checkpoint_at", "is_url", "pattern_option", "run_at", "step_option"]

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


def step_option(command: _F) -> _F:
    """``--step N``."""
    return click.option("--step", type=click.IntRange(min=0), help="A step of the RUN.  [default: the latest]")(command)


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


def checkpoint_at(location: str, step: int | None, pattern: NamePattern) -> CheckpointFile:
    """The file that a RUN or FILE argument means."""
    if os.path.isdir(location) or (is_url(location) and not _SUFFIX.search(location)):
        return run_at(location, pattern=pattern, read_only=True).file(step)
    if step is not None:
        raise click.UsageError("--step belongs to a RUN; a FILE is one checkpoint already")
    if not is_url(location) and not os.path.exists(location):
        raise click.UsageError(f"{_missing(location)}: it names no run's folder and no checkpoint file")
    from seedvc_ckpt.file import CheckpointFile  # listing has no use for it

    file = CheckpointFile.at(location)
    if pattern.parse(file.name):
        file.pattern = pattern
    return file


def _missing(location: str) -> str:
    return f"{location!r} is not a folder" if os.path.exists(location) else f"{location!r} does not exist"
