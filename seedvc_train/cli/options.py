"""Options that several commands of ``seedvc-train`` have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["device_option", "encoder_options", "fraction"]

_F = TypeVar("_F", bound=Callable[..., Any])

fraction = click.FloatRange(0, 1, min_open=True, max_open=True)

device_option = click.option(
    "--device", help="auto, cpu, cuda, cuda:N or mps.  [default: auto, a GPU where there is one]"
)


def encoder_options(command: _F) -> _F:
    """``--content-encoder``, ``--campplus`` and ``--rmvpe``."""
    for option in (
        click.option("--rmvpe", metavar="FILE", help="Estimate pitch as Seed-VC does, by its rmvpe.onnx.  "
                     "[default: by SwiftF0]"),
        click.option("--campplus", metavar="FILE", help="The speaker encoder's weights, campplus_cn_common.bin.  "
                     "[default: the YAML's campplus_path, then the hub's]"),
        click.option("--content-encoder", metavar="DIR|NAME", help="A Whisper or XLS-R model in place of the YAML's, "
                     "on this machine or on the hub."),
    ):  # fmt: skip
        command = option(command)
    return command
