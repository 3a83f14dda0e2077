"""Checkpoints for PyTorch training: atomic, verified, resumable, exportable.

The names below are the public interface. Each is imported when it is first used, so that ``import seedvc_ckpt`` costs
nothing and brings in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seedvc_ckpt.checkpoint import CheckpointInfo
    from seedvc_ckpt.errors import (
        CheckpointError,
        CheckpointExistsError,
        CheckpointNotFoundError,
        CorruptCheckpointError,
        ExportError,
        LeaseHeldError,
        MissingMetricError,
        PatternError,
        SaveFailedError,
        StaleStepError,
        StorageError,
        UnsafeCheckpointError,
    )
    from seedvc_ckpt.manifest import Manifest
    from seedvc_ckpt.naming import SEED_VC, NamePattern
    from seedvc_ckpt.retention import Plan, keep_best, keep_every, keep_last, keep_within
    from seedvc_ckpt.saver import AsyncSaver
    from seedvc_ckpt.store import CheckpointStore

__all__ = [
    "SEED_VC",
    "AsyncSaver",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "CheckpointStore",
    "CorruptCheckpointError",
    "ExportError",
    "LeaseHeldError",
    "Manifest",
    "MissingMetricError",
    "NamePattern",
    "PatternError",
    "Plan",
    "SaveFailedError",
    "StaleStepError",
    "StorageError",
    "UnsafeCheckpointError",
    "keep_best",
    "keep_every",
    "keep_last",
    "keep_within",
]

_HOMES = {
    "checkpoint": ["CheckpointInfo"],
    "manifest": ["Manifest"],
    "naming": ["SEED_VC", "NamePattern"],
    "retention": ["Plan", "keep_best", "keep_every", "keep_last", "keep_within"],
    "saver": ["AsyncSaver"],
    "store": ["CheckpointStore"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
