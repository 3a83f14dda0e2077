"""The benchmarks run, and what the documentation shows of them is what they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seedvc_ckpt import CheckpointStore

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


def test_plain_transfers_can_be_measured(weed: Any, tmp_path: Path) -> None:
    """Every way of moving a file to and from S3, in a process of its own."""
    from benchmarks.remote import DOWNLOADS, UPLOADS

    with CheckpointStore(weed.url("plain"), storage_options=weed.options) as store:
        for step in (1, 2):
            store.save({"step": step}, step)
    file = tmp_path / "file"
    file.write_bytes(bytes(20 << 20))
    commands = [("saving", way) for way in UPLOADS] + [("resuming", way) for way in DOWNLOADS]
    for what, way in commands:
        found = _measured(what, way, weed.url("plain"), json.dumps(weed.options), str(file))
        assert found["seconds"] > 0, way


def test_requests_are_counted(weed: Any) -> None:
    """`ls` and `latest` of a run on S3 make one request for each page of names."""
    reach = json.dumps({"port": weed.port, "environment": weed.environment})
    found = _measured("names", weed.url("counted"), reach, "1100")
    requests = {what: count for what, count in found.items() if not what.endswith(" bytes")}
    assert requests == {"ls lists": 2, "latest lists": 2}
    assert 100_000 < found["latest bytes"] < 1_000_000


def test_features_can_be_measured(tmp_path: Path, full: bool) -> None:
    """A step with a small encoder in it and one from the cache, in a process of its own that has nothing to warn of."""
    if not full:
        pytest.skip("it takes minutes: with --full")
    command = [sys.executable, "-m", "benchmarks.features", str(tmp_path), "2", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads(done.stdout)
    assert found["clips"] == 2
    assert all(found[f"{way} {workers}"] > 0 for way in ("cache", "off") for workers in (0, 2))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_features_have_rows_of_their_own(tmp_path: Path) -> None:
    """What `benchmarks.features` measures becomes a table: each way with its ratio to the cache's."""
    from benchmarks.report import page

    measured = {"off 0": 4.0, "off 2": 3.0, "cache 0": 0.5, "cache 2": 0.25}
    others = {"computing a clip": 2.5, "bytes a second": 520_000.0, "clips": 12, "seconds": 40.0}
    text = page({"machine": json.loads(RESULTS.read_text())["machine"], "features": {**measured, **others}}, tmp_path)
    for row in ("every step | 0 | 4.000 | 8.0", "every step | 2 | 3.000 | 12.0", "cache | 2 | 0.250 | 1.0"):
        assert f"{row} |" in text
    assert "2.5 s a clip" in text
    assert "0.52 MB" in text


def _measured(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.remote", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that speaks S3."""
    from servers import Weed

    if reason := Weed.missing():
        pytest.skip(reason)
    with Weed(tmp_path_factory.mktemp("weed")) as server:
        yield server


def test_the_page_is_that_of_the_results() -> None:
    """Tables and goals in docs/benchmarks are made from results.json, not by hand."""
    from benchmarks.report import goals, page

    found = json.loads(RESULTS.read_text())
    assert (RESULTS.parent / "README.md").read_text() == page(found, RESULTS.parent)
    assert len(goals(found)) == 17
    assert (RESULTS.parent / "saving.png").stat().st_size > 5_000
