"""Time and memory of one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Peak", "median_of", "memory_peak", "sync"]


@dataclass
class Peak:
    """How far the process's resident memory rose, bytes."""

    nbytes: int = 0


@contextmanager
def memory_peak() -> Iterator[Peak]:
    """Measure how far resident memory rises above what it is now, mapped files aside."""
    Path("/proc/self/clear_refs").write_text("5")
    before, peak = _status("VmRSS") - _status("RssFile"), Peak()
    yield peak
    peak.nbytes = max(0, _status("VmHWM") - _status("RssFile") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def median_of(runs: int, act: Callable[[], object], between: Callable[[], object] = lambda: None) -> float:
    """Seconds that `act` takes, the median of several; `between` is not counted."""
    seconds = []
    for _ in range(runs):
        between()
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def sync(path: str | os.PathLike[str]) -> None:
    """Make a file, or all files in a folder, durable."""
    files = [found for found in Path(path).rglob("*") if found.is_file()] if os.path.isdir(path) else [path]
    for place in files:
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
