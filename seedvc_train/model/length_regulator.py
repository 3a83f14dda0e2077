"""From content at the encoder's frame rate to one conditioning vector per mel frame."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

from seedvc_train.model.dit import length_mask

if TYPE_CHECKING:
    from seedvc_train.config import LengthRegulatorParams

__all__ = ["LengthRegulator", "f0_to_bins"]

_LOWEST_HZ, _HIGHEST_HZ = 50.0, 1100.0


def f0_to_bins(f0: Tensor, bins: int) -> Tensor:
    """Bin of each F0: 50 Hz is 1, 1100 Hz is bins - 1, evenly on the mel scale between; unvoiced (0) is 1.

    The mel scale is 1127·ln(1 + f/700): O'Shaughnessy, "Speech Communication", 1987.
    """
    low, high = (1127 * math.log(1 + hz / 700) for hz in (_LOWEST_HZ, _HIGHEST_HZ))
    slope = (bins - 2) / (high - low)
    mel = 1127 * torch.log(1 + f0.float() / 700)
    voiced = slope * mel - (slope * low - 1)
    return torch.where(mel > 0, voiced, mel).round().clamp(1, bins - 1).long()


class LengthRegulator(nn.Module):
    """Stretch content to the mel's frames, add F0, and smooth.

    `embedding` and `mask_token` are never used: Seed-VC's checkpoints carry them.
    """

    def __init__(self, params: LengthRegulatorParams) -> None:
        super().__init__()
        channels = params.channels
        self.n_f0_bins = params.n_f0_bins
        self.f0_condition = params.f0_condition
        self.mask_token = nn.Parameter(torch.zeros(1, channels))
        if params.f0_condition:
            self.f0_mask = nn.Parameter(torch.zeros(1, channels))
        layers: list[nn.Module] = []
        for _ in params.sampling_ratios:
            layers += [nn.Conv1d(channels, channels, 3, padding=1), nn.GroupNorm(1, channels), nn.Mish()]
        self.model = nn.Sequential(*layers, nn.Conv1d(channels, channels, 1))
        self.embedding = nn.Embedding(params.content_codebook_size, channels)
        if params.f0_condition:
            self.f0_embedding = nn.Embedding(params.n_f0_bins, channels)
        self.content_in_proj = nn.Linear(params.in_channels, channels)

    def forward(self, content: Tensor, ylens: Tensor, f0: Tensor | None = None) -> Tensor:
        """Stretch every row in full, its padding included, to the longest of `ylens`.

        Args:
            content: (B, N, in_channels).
            ylens: mel frames of each item, (B,).
            f0: in Hz, 0 where unvoiced, (B, M) for any M; None stands for unknown. Not read without
                `f0_condition`.

        Returns:
            (B, ylens.max(), channels), zero from ylens on.
        """
        frames = int(ylens.max())
        x = F.interpolate(self.content_in_proj(content).transpose(1, 2), size=frames, mode="nearest")
        if self.f0_condition:
            x = x + self._f0_term(f0, frames)
        y: Tensor = self.model(x).transpose(1, 2)
        return y * length_mask(ylens, frames)[..., None].type_as(y)

    def _f0_term(self, f0: Tensor | None, frames: int) -> Tensor:
        if f0 is None:
            return self.f0_mask[..., None]
        embedded = self.f0_embedding(f0_to_bins(f0, self.n_f0_bins))
        return F.interpolate(embedded.transpose(1, 2), size=frames, mode="nearest")
