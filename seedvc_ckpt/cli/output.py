"""Tables, JSON and progress bars for a terminal of 80 columns."""

from __future__ import annotations

import json
import sys
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
    for number, row in enumerate(table):
        cells = [
            cell.rjust(width) if title in right.split() else cell.ljust(width)
            for cell, width, title in zip(row, widths, header, strict=True)
        ]
        line = "  ".join(cells).rstrip()
        click.echo(click.style(line, bold=True) if number == 0 else line)


def readable_size(size: float) -> str:
    """Bytes in decimal units, three digits: 341 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def readable_time(time: datetime) -> str:
    """Local time to the second."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def progress_bar(size: int, label: str) -> AbstractContextManager[Any]:
    """A bar over `size` bytes on standard error; silent where that is no terminal."""
    return click.progressbar(
        length=size, label=label, file=sys.stderr, show_percent=True, hidden=not sys.stderr.isatty()
    )
