"""A small corpus of made-up speech, to try training on without recordings.

Source and filter: a glottal pulse train and noise, shaped by moving formants. It babbles, it says nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soundfile

Array = npt.NDArray[np.float64]

SAMPLE_RATE = 22_050
_HOP = 110  # samples from one frame of the tracks to the next, 5 ms
_FRAME = 4 * _HOP
_N_FFT = 2048

# Averages of F1, F2, F3 in Hz over 33 men and 28 women, for the vowels of heed, hid, head, had, hod, hawed,
# hood, who'd, hud, heard: G. E. Peterson and H. L. Barney, "Control methods used in a study of the vowels",
# Journal of the Acoustical Society of America 24, 1952, table II.
_MEN = (
    (270, 2290, 3010), (390, 1990, 2550), (530, 1840, 2480), (660, 1720, 2410), (730, 1090, 2440),
    (570, 840, 2410), (440, 1020, 2240), (300, 870, 2240), (640, 1190, 2390), (490, 1350, 1690),
)  # fmt: skip
_WOMEN = (
    (310, 2790, 3310), (430, 2480, 3070), (610, 2330, 2990), (860, 2050, 2850), (850, 1220, 2810),
    (590, 920, 2710), (470, 1160, 2680), (370, 950, 2670), (760, 1400, 2780), (500, 1640, 1960),
)  # fmt: skip
_BANDWIDTHS = np.array([70.0, 100.0, 140.0, 220.0, 300.0])
_FRICATIVES = ((6500.0, 1400.0), (3600.0, 1100.0), (5000.0, 4000.0))  # centre, width in Hz, about s, sh, f


@dataclass(frozen=True)
class _Speaker:
    name: str
    pitch: float  # Hz
    vowels: tuple[tuple[int, int, int], ...]
    upper: tuple[int, int]  # F4 and F5 in Hz
    tempo: float


@dataclass(frozen=True)
class _Tracks:
    """What the voice does, frame by frame: (frames,), formants (frames, 5), pitch in Hz."""

    formants: Array
    voice: Array
    noise: Array
    centre: Array
    width: Array
    pitch: Array


_SPEAKERS = (
    _Speaker("speaker-a", 118.0, _MEN, (3500, 4500), 1.0),
    _Speaker("speaker-b", 212.0, _WOMEN, (4150, 5100), 1.15),
)


def write_demo_corpus(folder: str, seed: int = 0, clips: int = 6) -> list[str]:
    """Write 16-bit mono WAV files of about 2.5 to 5 s at 22050 Hz, in one folder for each of two speakers.

    The same seed gives the same bytes. Other files in the folder are left alone.

    Args:
        folder: made if it is missing.
        seed: what is babbled.
        clips: number of clips a speaker.

    Returns:
        The paths of the files, in order.
    """
    paths = []
    for number, speaker in enumerate(_SPEAKERS):
        os.makedirs(os.path.join(folder, speaker.name), exist_ok=True)
        for clip in range(clips):
            wave = _babble(speaker, np.random.default_rng([seed, number, clip]))
            paths.append(os.path.join(folder, speaker.name, f"{speaker.name}-{clip:02d}.wav"))
            soundfile.write(paths[-1], np.rint(wave * 32767).astype(np.int16), SAMPLE_RATE, subtype="PCM_16")
    return paths


def _babble(speaker: _Speaker, random: np.random.Generator) -> Array:
    """One utterance, (samples,), peak 0.7."""
    tracks = _plan(speaker, random)
    samples = len(tracks.voice) * _HOP
    source = _glottal_flow(np.interp(np.arange(samples), np.arange(len(tracks.pitch)) * _HOP, tracks.pitch))
    noise = random.standard_normal(samples)
    breath = 0.03 * noise * (0.3 + np.abs(source))
    wave = _filtered(source + breath, tracks.voice[:, None] * _formant_response(tracks.formants))
    hiss = np.exp(-0.5 * ((_frequencies() - tracks.centre[:, None]) / tracks.width[:, None]) ** 2)
    wave = wave / np.abs(wave).max() + _filtered(0.05 * noise, tracks.noise[:, None] * hiss)
    wave += 1e-4 * random.standard_normal(samples)
    return np.asarray(0.7 * wave / np.abs(wave).max(), dtype=np.float64)


def _plan(speaker: _Speaker, random: np.random.Generator) -> _Tracks:
    """Syllables of a fricative, sometimes, and a vowel, in two phrases around a pause."""
    rows: list[tuple[float, ...]] = []  # frames, vowel, voice, noise, centre, width

    def add(seconds: float, vowel: int, voice: float, noise: float, fricative: int) -> None:
        rows.append((seconds / speaker.tempo * SAMPLE_RATE / _HOP, vowel, voice, noise, *_FRICATIVES[fricative]))

    add(random.uniform(0.1, 0.2), 0, 0.0, 0.0, 0)
    for syllables in random.integers(4, 8, size=2):
        for _ in range(syllables):
            vowel, fricative = (
                int(random.integers(len(speaker.vowels))),
                int(random.integers(len(_FRICATIVES))),
            )
            if random.random() < 0.6:
                add(random.uniform(0.07, 0.13), vowel, 0.0, random.uniform(0.5, 1.0), fricative)
            add(random.uniform(0.12, 0.24), vowel, random.uniform(0.6, 1.0), 0.0, fricative)
            add(random.uniform(0.02, 0.05), vowel, 0.15, 0.0, fricative)
        add(random.uniform(0.2, 0.4), 0, 0.0, 0.0, 0)
    table = np.array(rows)
    frames = np.repeat(table[:, 1:], np.rint(table[:, 0]).astype(int), axis=0)
    upper = np.tile(np.array(speaker.upper, float), (len(frames), 1))
    formants = np.hstack([np.array(speaker.vowels, float)[frames[:, 0].astype(int)], upper])
    return _Tracks(
        formants=_smoothed(formants, 17),
        voice=_smoothed(frames[:, 1:2], 9)[:, 0],
        noise=_smoothed(frames[:, 2:3], 5)[:, 0],
        centre=frames[:, 3],
        width=frames[:, 4],
        pitch=_pitch_contour(speaker.pitch, frames[:, 1] > 0, random),
    )


def _pitch_contour(pitch: float, voiced: npt.NDArray[np.bool_], random: np.random.Generator) -> Array:
    """Pitch in Hz, (frames,): falling over the utterance, with accents and a little tremble."""
    time = np.arange(len(voiced)) * _HOP / SAMPLE_RATE
    falling = np.linspace(0.12, -0.15, len(time))
    accents = 0.12 * np.sin(2 * np.pi * random.uniform(0.7, 1.3) * time + random.uniform(0, 2 * np.pi))
    tremble = _smoothed(random.standard_normal((len(time), 1)), 9)[:, 0] * 0.03
    return np.asarray(pitch * np.exp(falling + accents + tremble + 0.03 * voiced))


def _smoothed(tracks: Array, frames: int) -> Array:
    """Each column of (frames, tracks) through a Hann kernel, as tongue and lips cannot jump."""
    kernel = np.hanning(frames + 2)[1:-1]
    kernel /= kernel.sum()
    padded = np.pad(tracks, ((frames // 2, frames // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, mode="valid") for column in padded.T], axis=1)


def _glottal_flow(pitch: Array) -> Array:
    """Derivative of the glottal flow, (samples,), for a pitch in Hz, (samples,).

    The pulse rises as half a cosine for 0.4 of the period and falls as a quarter of one for 0.16 (pulse C of
    A. E. Rosenberg, "Effect of glottal pulse shape on the quality of natural vowels", Journal of the
    Acoustical Society of America 49, 1971). The derivative stands for the radiation at the lips.
    """
    phase = np.cumsum(pitch / SAMPLE_RATE) % 1.0
    rising = 0.5 * (1 - np.cos(np.pi * phase / 0.4))
    falling = np.cos(0.5 * np.pi * (phase - 0.4) / 0.16)
    flow = np.where(phase < 0.4, rising, np.where(phase < 0.56, falling, 0.0))
    return np.asarray(np.diff(flow, prepend=0.0) * SAMPLE_RATE / pitch / 10)


def _frequencies() -> Array:
    return np.arange(_N_FFT // 2 + 1) * SAMPLE_RATE / _N_FFT


def _formant_response(formants: Array) -> npt.NDArray[np.complex128]:
    """Frequency response, (frames, bins), of resonators in a row with gain 1 at 0 Hz.

    D. H. Klatt, "Software for a cascade/parallel formant synthesizer", Journal of the Acoustical Society of
    America 67, 1980, equations 1 and 2.

    Args:
        formants: centres in Hz, (frames, 5).
    """
    c = -np.exp(-2 * np.pi * _BANDWIDTHS / SAMPLE_RATE)
    b = 2 * np.exp(-np.pi * _BANDWIDTHS / SAMPLE_RATE) * np.cos(2 * np.pi * formants / SAMPLE_RATE)
    delay = np.exp(-2j * np.pi * _frequencies() / SAMPLE_RATE)
    response = np.ones((len(formants), len(delay)), np.complex128)
    for k in range(len(c)):
        response *= (1 - b[:, k, None] - c[k]) / (1 - b[:, k, None] * delay - c[k] * delay**2)
    return response


def _filtered(source: Array, response: npt.NDArray[np.complex128] | Array) -> Array:
    """Overlap-add of Hann-windowed frames of the source, each through its own row of (frames, bins)."""
    frames = len(response)
    padded = np.pad(source, (_FRAME // 2, _FRAME))
    cut = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::_HOP][:frames]
    window = np.hanning(_FRAME + 1)[:-1]
    shaped = np.fft.irfft(np.fft.rfft(cut * window, _N_FFT) * response, _N_FFT)
    out = np.zeros(frames * _HOP + _N_FFT)
    for i in range(frames):
        out[i * _HOP : i * _HOP + _N_FFT] += shaped[i]
    return out[_FRAME // 2 : _FRAME // 2 + len(source)]
