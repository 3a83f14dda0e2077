"""The benchmarks run, and what the documentation shows of them is what they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "results.json"


@pytest.mark.parametrize("name", ["Plain", "TorchSave", "Safetensors", "Ours", "OursInBackground"])
def test_a_contender_can_be_measured(name: str, tmp_path: Path) -> None:
    """Every way of saving that needs nothing more saves a small state, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "size", str(tmp_path / "saves"), name, "6", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["call"] <= found["durable"]


def test_the_page_is_that_of_the_results() -> None:
    """Tables and goals in docs/benchmarks are made from results.json, not by hand."""
    from benchmarks.report import goals, page

    found = json.loads(RESULTS.read_text())
    assert (RESULTS.parent / "README.md").read_text() == page(found, RESULTS.parent)
    assert len(goals(found)) == 11
    assert (RESULTS.parent / "saving.png").stat().st_size > 5_000
