"""Where this machine keeps what belongs to no run's folder."""

from __future__ import annotations

import os

__all__ = ["cache_folder"]


def cache_folder() -> str:
    """The folder for what can be made again: ``seedvc-train`` in $XDG_CACHE_HOME or else in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "seedvc-train")
