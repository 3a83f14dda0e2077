"""Sound files in, waves and log-mel spectrograms out."""

from __future__ import annotations

import io
import math
import os
import struct

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import nn

Samples = npt.NDArray[np.float32]

_SLACK = 0.1  # seconds a file may fall short of its own header before it counts as cut off
_LOUDEST = 32.0  # +30 dB over full scale: not loud, but integers stored as floats
_UNKNOWN_LENGTH = 0x7FFF0000  # sizes from here on stand for a length that a streaming program could not know
_UNKNOWN_FRAMES = (1 << 63) - 1  # libsndfile's SF_COUNT_MAX


class AudioError(ValueError):
    """A sound file cannot be decoded; the message is the reason."""


class _Bytes(io.BytesIO):
    """Bytes that forgive libsndfile for seeking to before the beginning, as it does in damaged files."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return super().seek(max(offset, 0) if whence == os.SEEK_SET else offset, whence)


def decode(data: bytes, most_seconds: float = math.inf) -> tuple[Samples, int]:
    """Decode the bytes of a sound file: WAV, FLAC, MP3, Ogg Vorbis or Opus, as libsndfile knows them.

    A file that was cut off is an error even where the decoder would quietly return its beginning: a sentence
    that stops in the middle of a word is not the recording its owner meant to train on. A WAV header that
    leaves the length open, as streaming programs write it, is no error.

    Args:
        data: the whole file.
        most_seconds: stop decoding one sample after this many seconds.

    Returns:
        The mean of the channels as float32 (samples,), and its sample rate in Hz.

    Raises:
        AudioError: the bytes are no sound file, end too early, or hold no samples, samples that are no finite
            numbers or samples far outside -1 to 1.
    """
    if not data:
        raise AudioError("empty file")
    try:
        with soundfile.SoundFile(_Bytes(data)) as file:
            rate, announced = int(file.samplerate), int(file.frames)
            if announced >= _UNKNOWN_FRAMES:
                raise AudioError("its header does not say how long it is")
            # One read: between two of them soundfile would seek, which an MP3 decoder does only roughly.
            most = announced if most_seconds == math.inf else int(most_seconds * rate) + 1
            channels = file.read(min(announced, most), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error))
        raise AudioError(f"cannot be decoded: {reason.strip(' .')}") from error
    mono: Samples = channels.mean(axis=1)
    seconds = len(mono) / rate
    if seconds <= most_seconds and _cut_off(data, announced / rate, seconds):
        raise AudioError(f"cut off: only {seconds:.2f} s can be read, its header promises more")
    if not len(mono):
        raise AudioError("holds no samples")
    if not np.isfinite(mono).all():
        raise AudioError("holds samples that are not numbers (NaN or infinite)")
    if (peak := float(np.abs(mono).max())) > _LOUDEST:
        raise AudioError(f"peak {peak:.3g}: samples should lie between -1 and 1")
    return mono, rate


def _cut_off(data: bytes, announced: float, read: float) -> bool:
    """Whether the file ends before its container says so; both lengths in seconds."""
    if data[:4] == b"RIFF":
        return _wav_shortfall(data) > _SLACK
    if data[:4] == b"OggS":
        return _ogg_page_cut(data)
    if data[:4] == b"fLaC":
        return read < announced
    # Without one of these tags the announced length of an MP3 is a guess from its first frames.
    told = b"Xing" in data or b"Info" in data
    return told and read < announced - _SLACK


def _wav_shortfall(data: bytes) -> float:
    """Seconds by which the data chunk of a RIFF file (Microsoft, IBM 1991) reaches over the file's end."""
    position, bytes_per_second = 12, 0
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        position += 8
        if name == b"fmt " and position + 12 <= len(data):
            bytes_per_second = struct.unpack_from("<I", data, position + 8)[0]
        if name == b"data":
            missing = position + size - len(data)
            return missing / max(bytes_per_second, 1) if size < _UNKNOWN_LENGTH else 0.0
        position += size + size % 2
    return 0.0


def _ogg_page_cut(data: bytes) -> bool:
    """Whether the last page of an Ogg stream reaches over the file's end (RFC 3533, section 6)."""
    page = data.rfind(b"OggS")
    if page + 27 > len(data):
        return True
    sizes = data[page + 27 : page + 27 + data[page + 26]]
    return page + 27 + data[page + 26] + sum(sizes) > len(data)


def resample(samples: Samples, rate: int, sr: int) -> Samples:
    """Resample float32 (samples,) from ``rate`` to ``sr`` Hz; the same input always gives the same output."""
    if rate == sr:
        return samples
    return np.ascontiguousarray(soxr.resample(samples, rate, sr, quality="HQ"), dtype=np.float32)


def read_audio(path: str, sr: int) -> torch.Tensor:
    """Read a sound file of any rate and channel count as a mono wave at ``sr`` Hz.

    Returns:
        The wave, float32 (samples,).

    Raises:
        AudioError: see `decode`.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        samples, rate = decode(file.read())
    return torch.from_numpy(resample(samples, rate, sr))


def slaney_edges(n_mels: int, fmin: float, fmax: float) -> torch.Tensor:
    """The corners, in Hz, of ``n_mels`` overlapping triangles, evenly spaced on Slaney's mel scale.

    The scale is linear to 1000 Hz (3 mel per 200 Hz), then logarithmic with 27 mel for every factor of 6.4
    (M. Slaney, Auditory Toolbox version 2, Interval Research technical report 1998-010).

    Returns:
        float64 (n_mels + 2,); triangle i rises from edge i to i + 1 and falls to i + 2.
    """

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)

    mel = torch.linspace(to_mel(fmin), to_mel(fmax), n_mels + 2, dtype=torch.float64)
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


def triangular_filters(edges: torch.Tensor, sr: int, n_fft: int) -> torch.Tensor:
    """Triangles of area 1 over the bins of a discrete Fourier transform (Slaney 1998, see `slaney_edges`).

    Args:
        edges: increasing frequencies in Hz, float64 (n_mels + 2,).
        sr: sample rate in Hz.
        n_fft: length of the transform.

    Returns:
        float32 (n_mels, n_fft // 2 + 1); the height of a triangle is 2 / its width in Hz.
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sr / n_fft
    left, centre, right = (edges[i : len(edges) - 2 + i, None] for i in range(3))
    triangles = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


class MelSpectrogram(nn.Module):
    """The logarithm of a mel spectrogram, as the vocoders of Seed-VC expect it.

    The wave is reflect-padded by (n_fft - hop_length) / 2 on both sides and cut into frames that are not
    centred; a periodic Hann window of ``win_length``; magnitude sqrt(re² + im² + 1e-9); Slaney's mel filters;
    ln(max(·, 1e-5)).

    Args:
        sr: sample rate of the waves in Hz.
        n_fft: length of the transform, in samples.
        win_length: length of the window, in samples.
        hop_length: samples from one frame to the next.
        n_mels: number of mel bins.
        fmin: lowest frequency in Hz.
        fmax: highest frequency in Hz; None means sr / 2.

    Attributes:
        settings: what it was made with, by name; two of equal settings compute the same.

    Raises:
        ValueError: the frequencies are not 0 <= fmin < fmax <= sr / 2.
    """

    window: torch.Tensor
    filters: torch.Tensor

    def __init__(
        self,
        sr: int,
        n_fft: int,
        win_length: int,
        hop_length: int,
        n_mels: int,
        fmin: float = 0.0,
        fmax: float | None = None,
    ) -> None:
        super().__init__()
        top = sr / 2 if fmax is None else fmax
        if not 0 <= fmin < top <= sr / 2:
            raise ValueError(f"mel bins from {fmin} to {top} Hz do not fit into 0 to {sr / 2} Hz (sr {sr})")
        self.sr, self.n_fft, self.hop_length, self.n_mels = sr, n_fft, hop_length, n_mels
        self.settings = {
            "sr": sr,
            "n_fft": n_fft,
            "win_length": win_length,
            "hop_length": hop_length,
            "n_mels": n_mels,
            "fmin": float(fmin),
            "fmax": float(top),
        }
        self.register_buffer("window", torch.hann_window(win_length, periodic=True), persistent=False)
        filters = triangular_filters(slaney_edges(n_mels, fmin, top), sr, n_fft)
        self.register_buffer("filters", filters, persistent=False)

    def magnitude(self, wave: torch.Tensor) -> torch.Tensor:
        """Magnitude spectrum, (n_fft // 2 + 1, samples // hop_length), of a wave (samples,)."""
        pad = (self.n_fft - self.hop_length) // 2
        padded = nn.functional.pad(wave[None], (pad, pad), mode="reflect")[0]
        spectrum = torch.stft(
            padded,
            self.n_fft,
            self.hop_length,
            self.window.numel(),
            self.window,
            center=False,
            return_complex=True,
        )
        return torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + 1e-9)

    def log_mel(self, magnitude: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        """ln(max(filters · magnitude, 1e-5)), (n_mels, frames)."""
        return torch.log((filters @ magnitude).clamp(min=1e-5))

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Log-mel spectrogram, (n_mels, samples // hop_length), of a float32 wave (samples,) in -1 to 1."""
        return self.log_mel(self.magnitude(wave), self.filters)
