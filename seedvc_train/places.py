"""Names of files: of pictures in a run, and where this machine keeps what belongs to no run's folder."""

from __future__ import annotations

import os

__all__ = ["AVERAGED", "cache_folder", "picture_name"]

AVERAGED = "_ema"
"""Ends the names of metrics of averaged weights, so that they are never compared with others."""


def cache_folder() -> str:
    """The folder for what can be made again: ``seedvc-train`` in $XDG_CACHE_HOME or else in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "seedvc-train")


def picture_name(checkpoint: str, mark: str = "") -> str:
    """Name of the picture of a checkpoint's mels, from that of its file and the mark of the metrics it belongs to."""
    return f"{checkpoint.rpartition('.')[0] or checkpoint}{mark}.png"
