"""Tables, JSON and progress bars for a terminal of 80 columns."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from seedvc_ckpt.checkpoint import CheckpointInfo

__all__ = [
    "as_json",
    "columns",
    "info_fields",
    "json_option",
    "progress_bar",
    "readable_size",
    "readable_time",
    "wrapped",
]

json_option = click.option("--json", "as_json_", is_flag=True, help="Print one JSON document and nothing else.")


def as_json(document: Any) -> None:
    """Print one JSON document. Numbers that JSON lacks become null."""
    click.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def info_fields(info: CheckpointInfo) -> dict[str, Any]:
    """The fields of an info, for JSON."""
    return asdict(info)


def columns(rows: Iterable[Sequence[str]], header: Sequence[str], right: str = "") -> None:
    """Print rows under a header, each column as wide as it needs; `right` names the columns to align right."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    signs = [">" if title in right.split() else "<" for title in header]
    line = "  ".join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
    lines = [line.format(*row).rstrip() for row in table]
    click.echo("\n".join([click.style(lines[0], bold=True), *lines[1:]]))


def readable_size(size: float) -> str:
    """Bytes in decimal units, three digits: 341 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def readable_time(time: datetime) -> str:
    """Local time to the minute."""
    return time.astimezone().isoformat(" ", "minutes")[:16]


def progress_bar(size: int, label: str) -> AbstractContextManager[Any]:
    """A bar over `size` bytes on standard error; silent where that is no terminal."""
    return click.progressbar(
        length=size, label=label, file=sys.stderr, show_percent=True, hidden=not sys.stderr.isatty()
    )


def wrapped(text: str, indent: int) -> str:
    """A text that starts in column `indent`, its further lines too, in 80 columns; words are never cut."""
    space = " " * indent
    lines = textwrap.wrap(
        text, 79, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).lstrip()
