"""Frozen front ends: what a clip's content, style and pitch look like to the trained network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["Features", "FrontEnd"]


@dataclass(frozen=True)
class Features:
    """What a front end hears in one clip; all tensors float32.

    Attributes:
        content: what is said, (N, content_dim).
        shifted_contents: the same from copies whose speaker was disguised, each (N, content_dim).
        style: who says it, (style_dim,).
        f0: pitch in Hz, 0 where unvoiced, (M,); None when the front end hears no pitch.
    """

    content: torch.Tensor
    shifted_contents: tuple[torch.Tensor, ...]
    style: torch.Tensor
    f0: torch.Tensor | None


class FrontEnd(Protocol):
    """A frozen listener.

    It *must* depend on nothing but its arguments: everything random comes from ``shifts``. It *must*
    survive pickling, since loader processes may need a copy.
    """

    @property
    def identity(self) -> str:
        """Everything that decides what it hears, in one line: names, settings, digests of weights."""
        ...

    def __call__(self, wave: torch.Tensor, sr: int, shifts: Sequence[torch.Generator]) -> Features:
        """Listen to a float32 wave (samples,) at ``sr`` Hz, and to one disguised copy for each of ``shifts``."""
        ...
