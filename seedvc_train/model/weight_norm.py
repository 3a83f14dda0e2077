"""Weight normalisation as Seed-VC's checkpoints store it: a direction `weight_v` and a length `weight_g`.

PyTorch's own functions either warn (the old one) or name the tensors otherwise (parametrizations).
w = g · v / ‖v‖ per output channel: Salimans and Kingma, "Weight Normalization", 2016, equation 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

__all__ = ["WeightNormConv1d", "WeightNormLinear"]


class _WeightNorm(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        self.weight_g = nn.Parameter(torch.empty(shape[0], *(1 for _ in shape[1:])))
        self.weight_v = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        with torch.no_grad():  # the effective weight starts as weight_v
            self.weight_g.copy_(self._norm())

    def _norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.weight_v, dim=tuple(range(1, self.weight_v.ndim)), keepdim=True)
        return norm

    def _weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self._norm())


class WeightNormLinear(_WeightNorm):
    """`nn.Linear` with a weight-normed weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(x, self._weight(), self.bias)


class WeightNormConv1d(_WeightNorm):
    """`nn.Conv1d` with a weight-normed weight, stride 1 and no padding."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__(out_channels, in_channels, kernel_size)
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, T) to (B, out_channels, T - (kernel_size - 1)·dilation)."""
        return F.conv1d(x, self._weight(), self.bias, dilation=self.dilation)
