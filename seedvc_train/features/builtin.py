"""A front end without weights: enough to train, resume and test anywhere, not to convert voices well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from seedvc_train.audio import MelSpectrogram, resample, slaney_edges, triangular_filters
from seedvc_train.features import Features

_SR = 16_000
_N_FFT = 1024
_BINS = 80  # each triangle spans several bins of the transform; many more triangles would leave some empty
_WARP = (0.8, 1.25)  # wider than the paper's 0.9 to 1.1: the warp must hide a speaker, not only vary him


def warp_frequencies(hz: torch.Tensor, factor: float, sr: int, boundary: float = 4800.0) -> torch.Tensor:
    """Stretch a frequency axis as another vocal tract length would; 0 and sr / 2 stay.

    Proportional up to the boundary frequency, then one straight line to sr / 2 (N. Jaitly and G. Hinton,
    "Vocal Tract Length Perturbation (VTLP) improves speech recognition", ICML workshop on deep learning for
    audio, speech and language processing, 2013).

    Args:
        hz: frequencies from 0 to sr / 2, any shape.
        factor: above 1 moves frequencies up.
        sr: sample rate in Hz.
        boundary: the frequency in Hz that still covers the formants that matter.
    """
    half = sr / 2
    knee = boundary * min(factor, 1.0)
    slope = (half - knee) / (half - knee / factor)
    return torch.where(hz <= knee / factor, hz * factor, half - slope * (half - hz))


class BuiltinFrontEnd:
    """Log-mel content at 50 frames a second, and the statistics of the same bins as style; no pitch.

    - content: log-mel at 16 kHz, resized over frequency to ``content_dim``; every bin loses its mean over the
      clip, then the clip is divided by its standard deviation. N is samples at 16 kHz // 320.
    - shifted content: the same through mel filters on a warped axis (`warp_frequencies`), the factor drawn
      once a copy, log-uniform in 0.8 to 1.25, so that the place of the formants does not tell the speaker.
    - style: means, then standard deviations over time, of the log-mel bins, resized over frequency to
      ``style_dim`` and scaled to about -2 to 2.

    Raises:
        ValueError: content_dim is below 1 or style_dim below 2.
    """

    def __init__(self, content_dim: int, style_dim: int) -> None:
        if content_dim < 1 or style_dim < 2:
            raise ValueError(f"content_dim {content_dim} is below 1 or style_dim {style_dim} is below 2")
        self.content_dim = content_dim
        self.style_dim = style_dim
        self._mel = MelSpectrogram(_SR, _N_FFT, 640, 320, _BINS)

    @property
    def identity(self) -> str:
        """What decides its outputs: changes with them."""
        return f"builtin 1, content {self.content_dim}, style {self.style_dim}"

    def __call__(self, wave: torch.Tensor, sr: int, shifts: Sequence[torch.Generator]) -> Features:
        """Listen to a float32 wave (samples,) at ``sr`` Hz; draws one number from each of ``shifts``."""
        magnitude = self._mel.magnitude(torch.from_numpy(resample(wave.numpy(), sr, _SR)))
        plain = self._mel.log_mel(magnitude, self._mel.filters)
        shifted = tuple(self._content(self._disguised(magnitude, generator)) for generator in shifts)
        return Features(self._content(plain), shifted, self._style(plain), None)

    def _disguised(self, magnitude: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        low, high = _WARP
        factor = low * (high / low) ** torch.rand((), generator=generator).item()
        edges = warp_frequencies(slaney_edges(_BINS, 0, _SR / 2), factor, _SR)
        return self._mel.log_mel(magnitude, triangular_filters(edges, _SR, _N_FFT))

    def _content(self, mel: torch.Tensor) -> torch.Tensor:
        content = _resize(mel.T.contiguous(), self.content_dim)
        centred = content - content.mean(dim=0)
        # The floor keeps the rounding noise of a silent clip from being blown up to look like speech.
        return centred / centred.std().clamp(min=0.1)

    def _style(self, mel: torch.Tensor) -> torch.Tensor:
        spread = self.style_dim // 2
        means = _resize((mel.mean(dim=1) + 5) / 3, self.style_dim - spread)
        return torch.cat([means, _resize(mel.std(dim=1) - 2, spread)])


def _resize(values: torch.Tensor, size: int) -> torch.Tensor:
    """Means of neighbours, or a line between them, along the last axis: (..., bins) to (..., size)."""
    rows = values.reshape(-1, 1, values.shape[-1])
    if size <= values.shape[-1]:
        resized = functional.adaptive_avg_pool1d(rows, size)
    else:
        resized = functional.interpolate(rows, size, mode="linear", align_corners=True)
    return resized.reshape(*values.shape[:-1], size)
