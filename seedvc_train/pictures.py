"""Pictures of mels, as PNG files in memory; drawn by matplotlib without any display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["MelRow", "mel_picture"]

_WIDTH, _HEIGHT, _DPI = 15.0, 2.3, 100  # inches of the picture, and of each row
_DARKEST = 7.0  # ln below the loudest: about 60 dB


@dataclass(frozen=True)
class MelRow:
    """What is drawn of a clip.

    Attributes:
        title: Its name.
        heard: The content that the network hears after the prompt, (N, content_dim).
        target: The true mel, (C, T).
        sampled: What the network made of it, (C, T).
        prompt: Number of frames that were given to it.
        seconds: Duration of a frame.
        distance: Of the two mels.
    """

    title: str
    heard: Tensor
    target: Tensor
    sampled: Tensor
    prompt: int
    seconds: float
    distance: float


def mel_picture(title: str, rows: Sequence[MelRow]) -> bytes:
    """Source, target and sampled mel of each clip side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(rows) + 1.0), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, row in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        image = _draw(axes, row)
        figure.colorbar(image, ax=axes[2], label="ln mel")
    written = io.BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})  # so that equal pictures are equal files
    return written.getvalue()


def _draw(axes: Sequence[Axes], row: MelRow) -> AxesImage:
    source, target, sampled = axes
    _show(source, _stretched(row.heard, row.target.shape[1]), row, *_spread(row.heard), "viridis")
    source.set_title(f"source: content of the disguised {_shortened(row.title)}", fontsize=9)
    source.set_ylabel("content feature")
    loudest = row.target.max().item()
    _show(target, row.target, row, loudest - _DARKEST, loudest, "magma")
    target.set_title("target: true mel, the prompt left of the line", fontsize=9)
    target.set_ylabel("mel bin")
    image = _show(sampled, row.sampled, row, loudest - _DARKEST, loudest, "magma")
    sampled.set_title(f"sampled: mel distance {row.distance:.3f}", fontsize=9)
    return image


def _show(axes: Axes, values: Tensor, row: MelRow, low: float, high: float, colours: str) -> AxesImage:
    bins, frames = values.shape
    image = axes.imshow(
        values.numpy(),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, frames * row.seconds, 0, bins),
        vmin=low,
        vmax=high,
        cmap=colours,
    )
    axes.axvline(row.prompt * row.seconds, color="white", linewidth=1, linestyle="--")
    axes.set_xlabel("seconds")
    return image


def _stretched(content: Tensor, frames: int) -> Tensor:
    """(N, D) as (D, T), each frame of the mel with the content that it is made from."""
    return functional.interpolate(content.T[None], size=frames, mode="nearest")[0]


def _spread(values: Tensor) -> tuple[float, float]:
    """Where the colours of features without a unit begin and end."""
    flat = values.flatten().sort().values
    places = torch.tensor([0.01, 0.99]) * (len(flat) - 1)
    low, high = flat[places.long()].tolist()
    return low, max(high, low + 1e-6)


def _shortened(title: str) -> str:
    return title if len(title) <= 30 else f"…{title[-29:]}"
