"""``seedvc-ckpt unpin``."""

from __future__ import annotations

from seedvc_ckpt.cli.pin import unpin as command

__all__ = ["command"]
