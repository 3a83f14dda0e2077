"""The pitch of a voice, 100 frames a second: by RMVPE from a file, or by SwiftF0, which brings its weights along."""

from __future__ import annotations

import hashlib
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from seedvc_train.audio import Samples, resample, triangular_filters
from seedvc_train.features.weights import EncoderError, require

if TYPE_CHECKING:
    import onnxruntime
    import swift_f0

__all__ = ["PitchEstimator", "Rmvpe", "SwiftF0", "pitch_estimator", "require"]

_SR = 16_000
_HOP = 160
_SOURCE = "https://huggingface.co/lj1995/VoiceConversionWebUI/resolve/main/rmvpe.onnx"

Numbers = npt.NDArray[np.float64]


class PitchEstimator(Protocol):
    """Hears pitch; the same bits in any process, and picklable."""

    @property
    def identity(self) -> str:
        """Name, settings and a digest of the weights, in one line."""
        ...

    def __call__(self, wave: torch.Tensor, sr: int) -> torch.Tensor:
        """Pitch of a float32 wave (samples,) at ``sr`` Hz.

        Returns:
            Hz, float32 (samples at 16 kHz // 160 + 1,); 0 where unvoiced. Frame i is centred at i / 100 seconds.
        """
        ...


def pitch_estimator(rmvpe: str | None = None) -> PitchEstimator:
    """RMVPE, as Seed-VC has it, where its file is given; SwiftF0 otherwise.

    Raises:
        EncoderError: a package is missing, or the file is not what it should be.
    """
    return SwiftF0() if rmvpe is None else Rmvpe(rmvpe)


class SwiftF0:
    """SwiftF0 (L. Nieradzik, "SwiftF0: Fast and Accurate Monophonic Pitch Detection", arXiv 2508.18440, 2025).

    46.875 to 2093.75 Hz, at 62.5 frames a second, brought to 100 by `resample_pitch`. A frame is voiced when its
    confidence is at least 0.5, where the model is calibrated.

    Raises:
        EncoderError: the package swift-f0 is missing.
    """

    def __init__(self) -> None:
        require("swift_f0", "swift-f0")
        weights = _digest(resources.files("swift_f0").joinpath("model.onnx").read_bytes())
        self.identity = f"swift-f0 {metadata.version('swift-f0')} confidence 0.5 {weights}"
        self._detector: swift_f0.SwiftF0 | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_detector": None}  # a session of onnxruntime can't be pickled

    def __call__(self, wave: torch.Tensor, sr: int) -> torch.Tensor:
        """See `PitchEstimator`."""
        import swift_f0

        if self._detector is None:
            self._detector = swift_f0.SwiftF0(threads=1)
        samples = resample(wave.numpy(), sr, _SR)
        samples = samples / max(1.0, np.abs(samples).max(initial=0))  # the model knows no wave beyond -1 to 1
        # Mirrored, so that the last frames hear as much voice after them as before.
        heard = self._detector.detect(np.pad(samples, (0, 2 * _HOP + 256), mode="symmetric"), _SR)
        f0 = np.where(heard.confidence >= 0.5, heard.pitch_hz, 0.0)
        return torch.from_numpy(resample_pitch(f0, 100 * swift_f0.FRAME_PERIOD, len(samples) // _HOP + 1))


def resample_pitch(f0: Numbers, step: float, frames: int) -> Samples:
    """Bring a pitch track to another frame rate; both begin at time 0.

    Between two voiced frames, the logarithm moves on a straight line. Next to an unvoiced frame, the nearer of
    the two is taken as it is: nothing between a pitch and no pitch is made up.

    Args:
        f0: Hz, 0 where unvoiced, float64 (N,).
        step: how many of the new frames one of the old ones lasts.
        frames: how many new frames there should be; the last old frame lasts to the end.

    Returns:
        float32 (frames,).
    """
    position = np.minimum(np.arange(frames) / step, len(f0) - 1)
    left = position.astype(int)
    right = np.minimum(left + 1, len(f0) - 1)
    weight = position - left
    nearest = f0[np.where(weight < 0.5, left, right)]
    voiced = (f0[left] > 0) & (f0[right] > 0)
    log = np.log(np.where(f0 > 0, f0, 1.0))
    between = np.exp(log[left] * (1 - weight) + log[right] * weight)
    return np.where(voiced, between, nearest).astype(np.float32)


class Rmvpe:
    """RMVPE (H. Wei et al., "RMVPE: A Robust Model for Vocal Pitch Estimation in Polyphonic Music", Interspeech 2023).

    The network is an ONNX file: log-mel (1, 128, frames) to salience (1, frames, 360) in 0 to 1, frames a multiple
    of 32. Mel and decoding are as Seed-VC has them: see `log_mel` and `decode_salience`.

    Args:
        path: the file ``rmvpe.onnx``.

    Raises:
        EncoderError: onnxruntime is missing, or the file, or it holds something else.
    """

    def __init__(self, path: str) -> None:
        require("onnxruntime", "onnxruntime")
        self._path = path
        self._session, self._weights = _open(path)
        self.identity = f"rmvpe salience {_THRESHOLD} {self._weights}"

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_session": None}  # a session of onnxruntime can't be pickled

    def __call__(self, wave: torch.Tensor, sr: int) -> torch.Tensor:
        """See `PitchEstimator`."""
        if self._session is None:
            self._session, found = _open(self._path)
            if found != self._weights:
                raise EncoderError(f"{self._path}: was replaced by another model since training began")
        mel = log_mel(resample(wave.numpy(), sr, _SR))
        return torch.from_numpy(decode_salience(_run(self._session, mel)))


_FFT = 1024
_BINS = 128
_THRESHOLD = 0.03
_CENTS = 1997.3794084376191 + 20 * np.arange(360)  # of the salience bins, above 10 Hz
_AROUND = 4  # bins on either side of the highest that are averaged


def log_mel(samples: Samples) -> Samples:
    """What RMVPE hears: ln(max(mel, 1e-5)), (128, samples // 160 + 1), of float32 (samples,) at 16 kHz.

    Magnitudes of 1024 samples under a periodic Hann window, centred at multiples of 160, the wave mirrored at its
    ends; triangles from 30 to 8000 Hz on the mel scale 2595 lg(1 + f / 700) of D. O'Shaughnessy, "Speech
    Communication", 1987.
    """
    wave = torch.from_numpy(np.pad(samples, _FFT // 2, mode="reflect"))
    spectrum = torch.stft(wave, _FFT, _HOP, window=torch.hann_window(_FFT), center=False, return_complex=True)
    low, high = (2595 * np.log10(1 + hz / 700) for hz in (30.0, 8000.0))
    mel = torch.linspace(low, high, _BINS + 2, dtype=torch.float64)
    filters = triangular_filters(700 * (10 ** (mel / 2595) - 1), _SR, _FFT)
    values: Samples = torch.log((filters @ spectrum.abs()).clamp(min=1e-5)).numpy()
    return values


def decode_salience(salience: Samples) -> Samples:
    """Pitch in Hz, float32 (frames,), of the salience of 360 bins of 20 cents, (frames, 360).

    The mean of the cents of the highest bin and four on either side, weighted by salience; 0 where the highest is
    not above 0.03.
    """
    frames, bins = salience.shape
    highest = salience.argmax(axis=1)
    near = highest[:, None] + np.arange(-_AROUND, _AROUND + 1)
    inside = (near >= 0) & (near < bins)
    near = near.clip(0, bins - 1)
    weights = np.where(inside, salience[np.arange(frames)[:, None], near], 0).astype(np.float64)
    voiced = salience.max(axis=1) > _THRESHOLD
    cents = (weights * _CENTS[near]).sum(axis=1) / np.where(voiced, weights.sum(axis=1), 1)
    return np.where(voiced, 10 * 2 ** (cents / 1200), 0).astype(np.float32)


def _run(session: onnxruntime.InferenceSession, mel: Samples) -> Samples:
    frames = mel.shape[1]
    padded = np.pad(mel, ((0, 0), (0, -frames % 32)))
    (salience,) = session.run(None, {session.get_inputs()[0].name: padded[None]})
    if salience.shape != (1, padded.shape[1], len(_CENTS)):
        raise ValueError(f"gives {salience.shape} for {padded[None].shape}")
    heard: Samples = salience[0, :frames]
    return heard


def _open(path: str) -> tuple[Any, str]:
    """The network in a file, and a digest of it."""
    remedy = f"get {_SOURCE} and name it with --rmvpe PATH; without that option pitch is estimated by swift-f0"
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise EncoderError(f"{path}: can't be read ({error.strerror}); {remedy}") from error
    if data[:2] in (b"PK", b"\x80\x02"):
        raise EncoderError(f"{path}: holds weights for PyTorch, the same ones are needed as an ONNX model: {remedy}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # sums in one order; and loaders fork
    options.log_severity_level = 4  # what is wrong is said by our error
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        _run(session, np.zeros((_BINS, 32), dtype=np.float32))
    except Exception as error:  # the errors of onnxruntime have no parent of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EncoderError(f"{path}: not an RMVPE network in ONNX ({reason}); {remedy}") from error
    return session, _digest(data)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
