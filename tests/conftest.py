"""How much is tested, and the table of what it showed."""

from __future__ import annotations

import platform
import random
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_PAGE = ROOT / "docs" / "reliability.md"
_TABLE = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)


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


_tally = pytest.StashKey[Tally]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="Every case of the fault tests, not a selection.")
    parser.addoption(
        "--reliability", action="store_true", help="Write what the fault tests showed into docs/reliability.md."
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tally] = Tally()


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all cases are wanted, not a fast selection."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    """Where fault tests write down what they did; printed at the end."""
    return request.config.stash[_tally]


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Random draws that --randomly-seed (printed at the start) repeats."""
    return random.Random(f"{request.config.getoption('randomly_seed')} {request.node.nodeid}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    findings = config.stash[_tally].findings
    if not findings:
        return
    seed = config.getoption("randomly_seed")
    terminalreporter.section(f"faults, seed {seed}")
    for found in findings:
        verdict = f"{found.violations} VIOLATIONS" if found.violations else "held"
        terminalreporter.line(f"{found.cases:>7,}  {verdict:<8}  {found.promise:<8} {found.storage}: {found.how}")
    terminalreporter.line(f"{sum(found.cases for found in findings):>7,}  cases")
    if config.getoption("--reliability"):
        _PAGE.write_text(_TABLE.sub(lambda _: _measured(findings, seed), _PAGE.read_text()))


def _measured(findings: list[Finding], seed: int) -> str:
    import torch

    machine = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"
    rows = "".join(
        f"| {found.promise} | {found.storage} | {found.how} | {found.cases:,} | {found.violations} |\n"
        for found in findings
    )
    total = sum(found.cases for found in findings)
    return (
        f"\n`make test-full` on {date.today().isoformat()}, {machine}, seed {seed}: {total:,} cases, "  # noqa: DTZ011
        f"{sum(found.violations for found in findings)} violations.\n\n"
        "| promise | storage | how it was tried | cases | violations |\n|---|---|---|---:|---:|\n"
        f"{rows}\n"
    )
