"""The transformer blocks of the DiT: rotary attention, SwiGLU and norms modulated by the time embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

if TYPE_CHECKING:
    from seedvc_train.config import DiTParams

__all__ = ["Transformer", "rotary_table", "rotate"]

_ROTARY_BASE = 10000.0


def rotary_table(length: int, head_size: int, device: torch.device) -> Tensor:
    """Cosine and sine (length, head_size / 2, 2) in float32 of position · 10000^(-2i/head_size).

    Su et al., "RoFormer", 2021, equation 15. Computed at every forward: next to attention it costs nothing,
    holds for any length, and leaves no cache behind to be copied, cast or moved.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = position[:, None] * (1.0 / _ROTARY_BASE**exponent)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring features of x (..., length, head_size) by the table's angle."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, valid: Tensor, rotary: Tensor) -> Tensor:
        q, k, v = self.wqkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, attn_mask=valid[:, None, None, :])
        out: Tensor = self.wo(y.transpose(1, 2).flatten(-2))
        return out


class _SwiGLU(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer", 2020, with LLaMA's width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = -(-(2 * 4 * dim // 3) // 256) * 256
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class _RMSNorm(nn.Module):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; the mean is taken in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class _AdaptiveNorm(nn.Module):
    """RMSNorm, then scaled and shifted by a projection of the time embedding where one is given."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project_layer = nn.Linear(dim, 2 * dim)
        self.norm = _RMSNorm(dim)

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        y: Tensor = self.norm(x)
        if time is None:
            return y
        scale, shift = self.project_layer(time)[:, None].chunk(2, dim=-1)
        modulated: Tensor = scale * y + shift
        return modulated


class _Block(nn.Module):
    def __init__(self, params: DiTParams) -> None:
        super().__init__()
        dim = params.hidden_dim
        self.attention = _Attention(dim, params.num_heads)
        self.feed_forward = _SwiGLU(dim)
        self.ffn_norm = _AdaptiveNorm(dim)
        self.attention_norm = _AdaptiveNorm(dim)
        if params.uvit_skip_connection:
            self.skip_in_linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, time: Tensor | None, valid: Tensor, rotary: Tensor, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = self.skip_in_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attention(self.attention_norm(x, time), valid, rotary)
        y: Tensor = x + self.feed_forward(self.ffn_norm(x, time))
        return y


class Transformer(nn.Module):
    """Pre-norm blocks with the long skips of U-ViT (Bao et al., "All are Worth Words", 2022)."""

    def __init__(self, params: DiTParams) -> None:
        super().__init__()
        self.head_size = params.hidden_dim // params.num_heads
        self.has_skips = params.uvit_skip_connection
        self.modulates_blocks = not params.time_as_token
        self.layers = nn.ModuleList(_Block(params) for _ in range(params.depth))
        self.norm = _AdaptiveNorm(params.hidden_dim)

    def forward(self, x: Tensor, time: Tensor, valid: Tensor) -> Tensor:
        """Transform the tokens.

        Args:
            x: (B, L, D).
            time: embedding of t, (B, D).
            valid: (B, L), True on the tokens that may be attended to.

        Returns:
            (B, L, D).
        """
        rotary = rotary_table(x.shape[1], self.head_size, x.device)
        modulation = time if self.modulates_blocks else None
        middle = len(self.layers) // 2
        skips: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            skip = skips.pop() if self.has_skips and i > middle else None
            x = layer(x, modulation, valid, rotary, skip)
            if self.has_skips and i < middle:
                skips.append(x)
        y: Tensor = self.norm(x, time)
        return y
