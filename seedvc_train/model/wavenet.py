"""The WaveNet stack of gated dilated convolutions: van den Oord et al., "WaveNet", 2016, section 2.3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

from seedvc_train.model.weight_norm import WeightNormConv1d

if TYPE_CHECKING:
    from seedvc_train.config import WavenetParams

__all__ = ["ReflectConv1d", "WaveNet"]


class ReflectConv1d(nn.Module):
    """A weight-normed convolution that keeps the length: reflect padding of (kernel - 1)/2 · dilation frames.

    A signal of no more frames than that has too little to reflect; it is first lengthened with zeros at its
    end and the surplus cut off again, as EnCodec's convolutions do (Défossez et al., 2022).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.pad = (kernel_size - 1) // 2 * dilation
        # The checkpoint's name is `conv.conv`: one more level than there is to it.
        self.conv = nn.ModuleDict({"conv": WeightNormConv1d(in_channels, out_channels, kernel_size, dilation)})

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, T) to (B, out_channels, T)."""
        frames = x.shape[-1]
        if self.pad:
            x = F.pad(x, (0, max(0, self.pad - frames + 1)))
            x = F.pad(x, (self.pad, self.pad), mode="reflect")[..., : frames + 2 * self.pad]
        y: Tensor = self.conv["conv"](x)
        return y


class WaveNet(nn.Module):
    """Gated convolutions with residual and skip paths, conditioned on one vector per item."""

    def __init__(self, params: WavenetParams) -> None:
        super().__init__()
        width, layers = params.hidden_dim, params.num_layers
        self.in_layers = nn.ModuleList(
            ReflectConv1d(width, 2 * width, params.kernel_size, params.dilation_rate**i) for i in range(layers)
        )
        self.res_skip_layers = nn.ModuleList(
            ReflectConv1d(width, 2 * width if i < layers - 1 else width) for i in range(layers)
        )
        self.cond_layer = ReflectConv1d(width, 2 * width * layers)
        self.dropout = nn.Dropout(params.p_dropout)

    def forward(self, x: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        """Sum of the layers' skips.

        Args:
            x: (B, W, T), read in full by the first layer; later layers see the masked frames as zero.
            mask: (B, 1, T), 1 on the frames of an item and 0 on its padding.
            condition: (B, W).

        Returns:
            (B, W, T), zero where the mask is.
        """
        slices = self.cond_layer(condition[..., None]).chunk(len(self.in_layers), dim=1)
        skips = torch.zeros_like(x)
        for in_layer, res_skip, condition_slice in zip(self.in_layers, self.res_skip_layers, slices, strict=True):
            signal, gate = (in_layer(x) + condition_slice).chunk(2, dim=1)
            y = res_skip(self.dropout(torch.tanh(signal) * torch.sigmoid(gate)))
            if y.shape[1] > x.shape[1]:
                residual, y = y.chunk(2, dim=1)
                x = (x + residual) * mask
            skips = skips + y
        return skips * mask
