"""The trained network: a flow-matching DiT over mel frames and the length regulator that feeds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from seedvc_train.config import Config, ModelParams, load_config
from seedvc_train.model.flow_matching import FlowMatching, draw_prompt_lens, evaluating
from seedvc_train.model.length_regulator import LengthRegulator

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = [
    "FlowMatching",
    "LengthRegulator",
    "build_model",
    "draw_prompt_lens",
    "evaluating",
    "expected_tensors",
]


def build_model(model_params: ModelParams | Mapping[str, Any]) -> nn.ModuleDict:
    """Build `cfm` and `length_regulator`, freshly initialised, in training mode.

    Args:
        model_params: the section of the YAML, checked or as a plain mapping.

    Raises:
        seedvc_train.config.ConfigError: if it does not describe a network that we implement.
    """
    params = ModelParams.parse(model_params)
    return nn.ModuleDict({"cfm": FlowMatching(params), "length_regulator": LengthRegulator(params.length_regulator)})


def expected_tensors(config: str | os.PathLike[str] | Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint for this config holds, buffers included.

    Names are flattened: `cfm.<key>` and `length_regulator.<key>`. No weight is allocated.

    Raises:
        seedvc_train.config.ConfigError: if the config cannot be read or is not one that we implement.
    """
    checked = config if isinstance(config, Config) else load_config(config)
    with torch.device("meta"):
        model = build_model(checked.model_params)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
