"""Names of files: of pictures in a run, and where this machine keeps what belongs to no run's folder."""

from __future__ import annotations

import os

__all__ = ["cache_folder", "picture_name"]


def cache_folder() -> str:
    """The folder for what can be made again: ``seedvc-train`` in $XDG_CACHE_HOME or else in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "seedvc-train")


def picture_name(checkpoint: str) -> str:
    """Name of the picture of a checkpoint's mels, from that of its file."""
    return f"{checkpoint.rpartition('.')[0] or checkpoint}.png"
