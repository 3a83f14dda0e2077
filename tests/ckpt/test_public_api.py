"""The names that users import."""

import importlib
import inspect
from types import ModuleType

import pytest

import seedvc_ckpt

NAMES = [
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


def test_the_public_names_are_these():
    """Nothing is added to or taken from the interface by accident; constants first, then classes, then functions."""
    assert seedvc_ckpt.__all__ == NAMES
    assert sorted(NAMES, key=lambda name: (not name.isupper(), not name[0].isupper(), name)) == NAMES
    assert set(dir(seedvc_ckpt)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_importable_and_documented(name):
    """Each name is there under `from seedvc_ckpt import …`, comes from one module, and has a docstring."""
    found = getattr(seedvc_ckpt, name)
    assert not isinstance(found, ModuleType)
    if name != "SEED_VC":
        assert inspect.getdoc(found)
        home = importlib.import_module(found.__module__)
        assert name in home.__all__
        assert getattr(home, name) is found


def test_star_import_brings_the_public_names():
    """`from seedvc_ckpt import *` gives exactly the public names."""
    scope = {}
    exec("from seedvc_ckpt import *", scope)
    assert set(scope) - {"__builtins__"} == set(NAMES)


def test_unknown_names_are_attribute_errors():
    """A misspelt name fails as it does in every module."""
    with pytest.raises(AttributeError, match="no attribute 'CheckpointShop'"):
        _ = seedvc_ckpt.CheckpointShop
    with pytest.raises(ImportError):
        exec("from seedvc_ckpt import CheckpointShop")


def test_the_store_takes_the_documented_arguments():
    """The signatures that users write against stay as documented."""
    expected = {
        "save": ["state", "step", "epoch", "metrics", "settings", "overwrite", "verify"],
        "list": [],
        "latest": [],
        "load": ["which", "map_location", "mmap", "verify", "cache_dir"],
        "resume": ["map_location", "mmap"],
        "inspect": ["which"],
        "prune": ["dry_run"],
        "scores": ["on"],
        "add_scores": ["which", "scores", "on"],
        "best": ["metric", "mode"],
        "rewind": ["step", "dry_run"],
        "close": [],
    }
    for name, parameters in expected.items():
        found = list(inspect.signature(getattr(seedvc_ckpt.CheckpointStore, name)).parameters)
        assert found == ["self", *parameters], name
    made = list(inspect.signature(seedvc_ckpt.CheckpointStore).parameters)
    assert made == ["location", "pattern", "retention", "storage_options", "fs", "read_only"]
