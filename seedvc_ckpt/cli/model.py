"""The model that a YAML describes: the one place where the library asks the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import yaml

from seedvc_ckpt.bundle import ServedConfig
from seedvc_ckpt.errors import CheckpointError
from seedvc_ckpt.storage import open_parent, plain_location, read_file

__all__ = ["UnusableConfigError", "describe", "described", "read_config"]


class UnusableConfigError(Exception):
    """A config that describes no model which can be served or trained."""


def read_config(location: str) -> tuple[str, bytes]:
    """Name and bytes of the YAML at a path or URL; a call that names none is wrong."""
    try:
        storage, name = open_parent(location)
        return name, read_file(storage, name)
    except (CheckpointError, OSError) as error:
        raise click.UsageError(f"--config {plain_location(location)}: {error}") from None


def describe(name: str, content: bytes) -> ServedConfig:
    """The model that a YAML describes.

    Raises:
        UnusableConfigError: if it describes none; the message places every problem.
    """
    from seedvc_train.config import Config, ConfigError
    from seedvc_train.model import expected_tensors

    try:
        raw = yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise click.UsageError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, Mapping):
        raise click.UsageError(f"{name}: expected a mapping with model_params and others, found {type(raw).__name__}")
    try:
        config = Config.parse(raw, source=name)
        expected = expected_tensors(config)
    except ConfigError as error:
        raise UnusableConfigError(str(error)) from None
    return ServedConfig(name, content, _merged(raw, config.model_dump(mode="json", by_alias=True)), expected)


def described(named: tuple[str, bytes]) -> ServedConfig:
    """The model that a YAML describes, given by name and bytes; one that describes none is a wrong call."""
    try:
        return describe(*named)
    except UnusableConfigError as error:
        raise click.UsageError(str(error)) from None


def _merged(raw: Mapping[str, Any], checked: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with what was checked in place of what was written, and what is not checked as it was written."""
    both = {**raw, **checked}
    return {
        key: _merged(raw[key], value) if isinstance(value, Mapping) and isinstance(raw.get(key), Mapping) else value
        for key, value in both.items()
    }
