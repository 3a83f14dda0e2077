"""What the fault tests did, counted."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import date

import torch

__all__ = ["Finding", "Tally", "measured"]


@dataclass(frozen=True)
class Finding:
    """How often a promise was tried in one way on one kind of storage, and how often it did not hold."""

    promise: str
    storage: str
    how: str
    cases: int
    violations: int


class Tally:
    """The findings of this run of the tests."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], tuple[int, int]] = {}

    def record(self, promise: str, storage: str, how: str, cases: int, violations: int = 0) -> None:
        """Add to a finding: numbers of the promises, file system or service, how it was tried."""
        before, failed = self._counts.get((promise, how, storage), (0, 0))
        self._counts[promise, how, storage] = before + cases, failed + violations

    @property
    def findings(self) -> list[Finding]:
        """In the order of promises, ways and storages."""
        return [
            Finding(promise, storage, how, *counts) for (promise, how, storage), counts in sorted(self._counts.items())
        ]


def measured(findings: list[Finding], seed: int, command: str) -> str:
    """A table of docs/reliability.md, with the command that gives it."""
    machine = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"
    rows = "".join(
        f"| {found.promise} | {found.storage} | {found.how} | {found.cases:,} | {found.violations} |\n"
        for found in findings
    )
    total = sum(found.cases for found in findings)
    return (
        f"\n`{command}` on {date.today().isoformat()}, {machine}, seed {seed}: {total:,} cases, "  # noqa: DTZ011
        f"{sum(found.violations for found in findings)} violations.\n\n"
        "| promise | storage | how it was tried | cases | violations |\n|---|---|---|---:|---:|\n"
        f"{rows}\n"
    )
