"""The speaker of a recording disguised: other formants, another pitch, the same words at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import metadata

import numpy as np
import numpy.typing as npt
import torch

from seedvc_train.features.builtin import warp_frequencies
from seedvc_train.features.pitch import SwiftF0
from seedvc_train.features.weights import require

__all__ = ["Voice", "shift_identity", "shift_timbre"]

# H.-S. Choi et al., "Neural Analysis and Synthesis: Reconstructing Speech from Self-Supervised Representations",
# NeurIPS 2021, appendix: each ratio lies between 1 and these numbers, or between 1 and their inverse.
_FORMANTS = 1.4
_PITCH = 2.0
_INTONATION = 1.5

_SECONDS = 0.01  # from frame to frame, as the pitch comes
_INAUDIBLE = 1e-8  # mean square; what is quieter is not made louder
_MOST_GAIN = 10.0
_NO_NOISE = 0.001  # the least aperiodicity that WORLD itself gives

Numbers = npt.NDArray[np.float64]


def shift_timbre(wave: torch.Tensor, sr: int, generator: torch.Generator) -> torch.Tensor:
    """Disguise the speaker of a wave.

    The voice is taken apart by WORLD and put together again (`Voice`) with formants moved by a ratio of 1 / 1.4 to
    1.4, pitch by 1 / 2 to 2 and the height of its intonation by 1 / 1.5 to 1.5, each drawn log-uniform.

    Args:
        wave: float32 (samples,).
        sr: sample rate in Hz.
        generator: three numbers are drawn from it, and from nowhere else.

    Returns:
        float32 (samples,), finite, with no peak above 1 or that of ``wave``.

    Raises:
        EncoderError: the packages pyworld-prebuilt or swift-f0 are missing.
    """
    return Voice.of(wave, sr).disguised(generator)


def shift_identity() -> str:
    """Everything that decides what `shift_timbre` does with the numbers it draws, in one line.

    Raises:
        EncoderError: see `shift_timbre`.
    """
    require("pyworld", "pyworld-prebuilt")
    world = f"pyworld-prebuilt {metadata.version('pyworld-prebuilt')}"
    return f"timbre shift formants {_FORMANTS} pitch {_PITCH} intonation {_INTONATION} {world} {_pitch().identity}"


@dataclass(frozen=True)
class Voice:
    """A voice in the parts of the WORLD vocoder, 100 frames a second.

    M. Morise, F. Yokomori and K. Ozawa, "WORLD: a vocoder-based high-quality speech synthesis system for real-time
    applications", IEICE Transactions on Information and Systems E99-D(7), 2016. Making one takes several times
    as long as each disguise made from it.

    Attributes:
        f0: Hz, 0 where unvoiced, (frames,).
        envelope: power spectrum without its harmonics, (frames, bins from 0 to sr / 2).
        aperiodicity: the part of it that is noise, 0 to 1, of the same shape.
        power: mean square of the wave around each frame, (frames,), see `_power`.
        samples: the length of the wave.
        peak: the largest magnitude of the wave.
        sr: sample rate in Hz.
    """

    f0: Numbers
    envelope: Numbers
    aperiodicity: Numbers
    power: Numbers
    samples: int
    peak: float
    sr: int

    @classmethod
    def of(cls, wave: torch.Tensor, sr: int) -> Voice:
        """Take a float32 wave (samples,) at ``sr`` Hz apart; it has one sample at least.

        Raises:
            EncoderError: the packages pyworld-prebuilt or swift-f0 are missing.
        """
        require("pyworld", "pyworld-prebuilt")
        import pyworld

        rough = _pitch()(wave, sr).numpy().astype(np.float64)
        samples = wave.numpy().astype(np.float64)
        times = np.arange(len(rough)) * _SECONDS
        f0 = pyworld.stonemask(samples, rough, times, sr)
        envelope = pyworld.cheaptrick(samples, f0, times, sr)
        # A tone so pure that nothing is left beside it has no ratio to divide by: no noise, then.
        aperiodicity = np.nan_to_num(pyworld.d4c(samples, f0, times, sr), nan=_NO_NOISE)
        power = _power(samples, sr, len(f0))
        return cls(f0, envelope, aperiodicity, power, len(samples), float(np.abs(samples).max()), sr)

    def disguised(self, generator: torch.Generator) -> torch.Tensor:
        """The wave of the same voice under ratios drawn as `shift_timbre` says, float32 (samples,)."""
        formants, pitch, intonation = (
            limit ** (2 * torch.rand((), generator=generator, dtype=torch.float64).item() - 1)
            for limit in (_FORMANTS, _PITCH, _INTONATION)
        )
        return self.synthesize(formants, pitch, intonation)

    def synthesize(self, formants: float, pitch: float, intonation: float) -> torch.Tensor:
        """The wave of this voice changed, float32 (samples,).

        Args:
            formants: what frequencies of the envelope are multiplied by, as in `warp_frequencies`.
            pitch: what the median pitch is multiplied by.
            intonation: what the distances from the median are multiplied by, in octaves.
        """
        import pyworld

        envelope, aperiodicity = (self._warped(part, formants) for part in (self.envelope, self.aperiodicity))
        f0 = self._repitched(pitch, intonation)
        made = pyworld.synthesize(f0, envelope, aperiodicity, self.sr, 1000 * _SECONDS)[: self.samples]
        made = np.pad(made, (0, self.samples - len(made)))
        made *= self._gain(made)
        loudest = max(1.0, self.peak)
        made *= loudest / max(loudest, np.abs(made).max())
        return torch.from_numpy(made.astype(np.float32))

    def _gain(self, made: Numbers) -> Numbers:
        """What makes each moment as loud as it was, (samples,): a high pitch can have no harmonic in a low formant."""
        frames = len(self.power)
        gain = np.sqrt((self.power + _INAUDIBLE) / (_power(made, self.sr, frames) + _INAUDIBLE))
        gain = gain.clip(1 / _MOST_GAIN, _MOST_GAIN)
        return np.interp(np.arange(self.samples), np.arange(frames) * _SECONDS * self.sr, gain)

    def _repitched(self, pitch: float, intonation: float) -> Numbers:
        voiced = self.f0 > 0
        if not voiced.any():
            return self.f0
        median = np.median(self.f0[voiced])
        return np.where(voiced, median * pitch * (self.f0 / median) ** intonation, 0.0)

    def _warped(self, spectrum: Numbers, factor: float) -> Numbers:
        """Every frame's spectrum stretched over frequency, on a straight line between the logarithms of two bins."""
        bins = spectrum.shape[1]
        hz = torch.linspace(0, self.sr / 2, bins, dtype=torch.float64)
        source = warp_frequencies(hz, 1 / factor, self.sr).numpy()
        place = (source / (self.sr / 2) * (bins - 1)).clip(0, bins - 1)
        left = place.astype(int).clip(0, bins - 2)
        weight = place - left
        log = np.log(spectrum)
        warped: Numbers = np.exp(log.take(left, axis=1) * (1 - weight) + log.take(left + 1, axis=1) * weight)
        return warped


def _power(samples: Numbers, sr: int, frames: int) -> Numbers:
    """Mean square, without the mean, of the 40 ms around each hundredth of a second, (frames,)."""
    centres = np.arange(frames) * _SECONDS * sr
    first, last = (
        (centres + shift * sr).round().astype(int).clip(low, low + len(samples) - 1)
        for shift, low in ((-0.02, 0), (0.02, 1))
    )
    mean, square = (
        (total[last] - total[first]) / (last - first)
        for total in (np.concatenate([[0.0], np.cumsum(values)]) for values in (samples, samples**2))
    )
    power: Numbers = (square - mean**2).clip(min=0)
    return power


@cache
def _pitch() -> SwiftF0:
    return SwiftF0()  # WORLD's own estimators lose the pitch of noisy recordings
