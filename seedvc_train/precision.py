"""The number format of a training step: float32, or half of its width where that does no harm."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["PRECISIONS", "Precision"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 1.0


class Precision:
    """How the forward pass computes, and for fp16 the factor that keeps small gradients from rounding to zero.

    Weights, gradients, optimiser and loss are float32 with any of them; the time embedding and the rotary tables too.

    Args:
        name: One of `PRECISIONS`.
        device: Where training runs.

    Attributes:
        scaler: Does nothing but for fp16.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._device = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """In it, matrix products and convolutions take and give numbers of this format."""
        return torch.autocast(self._device, PRECISIONS[self.name], enabled=self.name != "fp32")

    @property
    def numbers(self) -> dict[str, float]:
        """What is worth logging of it."""
        return {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

    @property
    def exhausted(self) -> bool:
        """Whether gradients that are not finite would not become so by scaling them less."""
        return not self.scaler.is_enabled() or self.scaler.get_scale() < _SMALLEST_SCALE
