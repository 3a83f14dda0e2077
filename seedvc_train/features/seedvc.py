"""The front end that Seed-VC's services listen with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from seedvc_train.audio import resample
from seedvc_train.features import Features
from seedvc_train.features.pitch import PitchEstimator
from seedvc_train.features.timbre import Voice, shift_identity

__all__ = ["ContentEncoder", "SeedVCFrontEnd", "StyleEncoder"]

_SR = 16_000


class ContentEncoder(Protocol):
    """Hears what is said; frozen, picklable."""

    dim: int
    identity: str

    def __call__(self, waves: torch.Tensor) -> torch.Tensor:
        """Float32 waves at 16 kHz (B, samples) to content (B, N, dim), float32 on the CPU."""
        ...


class StyleEncoder(Protocol):
    """Hears who says it; frozen, picklable."""

    dim: int
    identity: str

    def __call__(self, wave: torch.Tensor) -> torch.Tensor:
        """A float32 wave at 16 kHz (samples,) to a style (dim,), float32 on the CPU."""
        ...


class SeedVCFrontEnd:
    """Content, style and pitch as Seed-VC's trainer and services compute them.

    What is said is heard in the recording and, for the copies, in the recording with its speaker disguised
    (`features.timbre`); style and pitch always in the recording itself.

    Args:
        content: `WhisperEncoder` or `XlsrEncoder`.
        style: `CampplusEncoder`.
        pitch: for models with `f0_condition`, else None.

    Raises:
        EncoderError: a package that disguises speakers is missing.
    """

    def __init__(self, content: ContentEncoder, style: StyleEncoder, pitch: PitchEstimator | None) -> None:
        self._content = content
        self._style = style
        self._pitch = pitch
        heard_by = [content.identity, style.identity, pitch.identity if pitch else "no pitch", shift_identity()]
        self.identity = "; ".join(["seedvc 1", *heard_by])

    def __call__(self, wave: torch.Tensor, sr: int, shifts: Sequence[torch.Generator]) -> Features:
        """Listen to a float32 wave (samples,) of up to 30 s at ``sr`` Hz; see `FrontEnd`."""
        heard = _at_16_khz(wave, sr)
        waves = [heard]
        if shifts:
            voice = Voice.of(wave, sr)
            waves += [_at_16_khz(voice.disguised(generator), sr) for generator in shifts]
        content, *shifted = self._content(torch.stack(waves)).unbind()
        f0 = self._pitch(heard, _SR) if self._pitch else None
        return Features(content, tuple(shifted), self._style(heard), f0)


def _at_16_khz(wave: torch.Tensor, sr: int) -> torch.Tensor:
    return torch.from_numpy(resample(wave.numpy(), sr, _SR))
