"""How much is tested, and the table of what it showed."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tally import Tally, measured

ROOT = Path(__file__).parent.parent
_PAGE = ROOT / "docs" / "reliability.md"
_SERVERS = {"s3", "gs", "az", "sftp"}
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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are worked on by one thread, in processes that tests start too.

    Small ones are faster so, many times where the machine is busy; and a forked child has no others to wait for.
    """
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of two made-up voices: three batches an epoch."""
    from seedvc_train.corpus import write_demo_corpus

    folder = tmp_path_factory.mktemp("recordings")
    write_demo_corpus(str(folder), clips=3)
    return folder


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
        parts = (("disks", False, "make test-full"), ("servers", True, "pytest tests/remote --full --reliability"))
        for part, on_servers, command in parts:
            rows = [found for found in findings if (found.storage in _SERVERS) == on_servers]
            if rows:  # what was not tried keeps its table
                table = re.compile(rf"(?<=<!-- {part} -->\n).*?(?=<!-- end -->)", re.DOTALL)
                before, _, after = table.sub("\0", _PAGE.read_text()).partition("\0")
                _PAGE.write_text(before + measured(rows, seed, command) + after)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of a key and of a certificate for 127.0.0.1 that only itself vouches for."""
    folder = tmp_path_factory.mktemp("certificate")
    key, found = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", found, "-days", "2"]
    extra = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, *extra], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"openssl can't make a certificate: {error}")
    return key, found
