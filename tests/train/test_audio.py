"""Sound files are read as they sound, or refused with a reason; mel spectrograms are the vocoders' own."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seedvc_train.audio import (
    AudioError,
    MelSpectrogram,
    decode,
    read_audio,
    slaney_edges,
    triangular_filters,
)

KINDS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}
GOLDEN = Path(__file__).parent.parent / "data" / "slaney_mel.npz"


def tone(rate: int, seconds: float = 1.5, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encode(samples: np.ndarray, rate: int, kind: str = "wav", subtype: str | None = None) -> bytes:
    container, usual = KINDS[kind]
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype or usual)
    return file.getvalue()


def noisy(kind: str) -> bytes:
    samples = tone(24000) + 0.1 * np.random.default_rng(0).standard_normal(36000).astype(np.float32)
    return encode(samples, 24000, kind)


CASES = [("wav", rate) for rate in (8000, 16000, 24000, 44100, 48000)]
CASES += [("flac", 44100), ("mp3", 44100), ("mp3", 16000), ("ogg", 32000), ("opus", 48000), ("opus", 16000)]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("kind", "rate"), CASES)
def test_a_tone_keeps_its_length_pitch_and_level(tmp_path, kind, rate, channels):
    """Any container, rate and channel count becomes a mono wave of the same sound at the asked rate."""
    path = tmp_path / f"a.{kind}"
    path.write_bytes(encode(np.stack([tone(rate)] * channels, axis=1), rate, kind))
    wave = read_audio(str(path), 22050)
    assert wave.dtype == torch.float32
    assert wave.shape == (33075,)
    spectrum = np.abs(np.fft.rfft(wave.numpy()))
    assert spectrum.argmax() / 1.5 == pytest.approx(440, abs=1)
    assert wave[2000:-2000].square().mean().sqrt().item() == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_mono_is_the_mean_of_the_channels():
    """Two channels in opposite phase cancel; one silent channel halves the level."""
    left = tone(16000)
    cancelled, _ = decode(encode(np.stack([left, -left], axis=1), 16000))
    halved, rate = decode(encode(np.stack([left, 0 * left], axis=1), 16000))
    assert rate == 16000
    assert np.abs(cancelled).max() < 1e-4
    np.testing.assert_allclose(halved, left / 2, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_twice_gives_the_same_bits(tmp_path, kind):
    """Decoding and resampling are deterministic."""
    path = tmp_path / "a"
    path.write_bytes(noisy(kind))
    assert torch.equal(read_audio(str(path), 44100), read_audio(str(path), 44100))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.9])
def test_a_file_that_was_cut_off_is_refused(kind, kept):
    """A truncated file is an error in every container, even where libsndfile silently reads the rest."""
    data = noisy(kind)
    with pytest.raises(AudioError, match=r"cut off|cannot be decoded"):
        decode(data[: int(len(data) * kept)])


def test_a_wav_that_lost_its_last_bytes_is_read():
    """A shortfall nobody can hear does not cost a clip."""
    samples, rate = decode(encode(tone(16000), 16000)[:-100])
    assert len(samples) / rate == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_of_open_length_is_read_to_its_end(size):
    """A program that writes WAV into a pipe cannot know the length; such a file is whole."""
    data = bytearray(encode(tone(16000), 16000))
    assert data[36:40] == b"data"
    struct.pack_into("<I", data, 40, size)
    assert len(decode(bytes(data))[0]) == 24000


@pytest.mark.parametrize("chunk", [b"LIST\x05\0\0\0hello\0", b"junk\0\0\0\0"])
def test_a_wav_with_other_chunks_before_its_samples_is_measured_right(chunk):
    """Chunks of odd and empty size are stepped over before the length is judged."""
    whole = encode(tone(16000), 16000)
    data = whole[:36] + chunk + whole[36:]
    assert len(decode(data)[0]) == 24000
    with pytest.raises(AudioError, match="cut off"):
        decode(data[:-8000])


UNUSABLE = {
    "empty file": b"",
    "cannot be decoded": b"RIFF? No, this is a text, and quite a long one." * 20,
    "holds no samples": encode(np.zeros(0, np.float32), 16000),
    "NaN": encode(np.array([0, np.nan, 0], np.float32), 16000, subtype="FLOAT"),
    "infinite": encode(np.array([0, -np.inf, 0], np.float32), 16000, subtype="FLOAT"),
    "peak 3.28e": encode(tone(16000) * 65536, 16000, subtype="FLOAT"),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_what_cannot_be_trained_on_is_refused_with_its_reason(reason):
    """Bytes that are no sound, or samples that would poison a loss, never become a wave."""
    with pytest.raises(AudioError, match=reason):
        decode(UNUSABLE[reason])


def test_a_damaged_header_prints_nothing(capfd):
    """A sound file without its sample chunk makes libsndfile seek before the start, quietly."""
    file = io.BytesIO()
    soundfile.write(file, tone(16000), 16000, format="AIFF")
    with pytest.raises(AudioError, match="cannot be decoded"):
        decode(file.getvalue().replace(b"SSND", b"LOST"))
    assert capfd.readouterr() == ("", "")


def test_a_float_file_a_little_over_full_scale_is_read():
    """A hot master is no error."""
    assert np.abs(decode(encode(tone(16000) * 3, 16000, subtype="FLOAT"))[0]).max() == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_decoding_stops_after_the_seconds_asked_for(kind):
    """A long file costs no more memory than the limit, and a limit does not make it look cut off."""
    data = encode(tone(16000, 3.0), 16000, kind)
    assert len(decode(data, 2.0)[0]) == 32001
    assert len(decode(data, 3.0)[0]) == 48000


def test_a_missing_file_is_an_os_error(tmp_path):
    """Reading what is not there raises what `open` raises."""
    with pytest.raises(FileNotFoundError):
        read_audio(str(tmp_path / "none.wav"), 16000)


ENCODED = [noisy(kind) for kind in ("wav", "flac", "ogg")]
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(data=st.sampled_from(ENCODED), head=st.booleans(), damage=DAMAGE)
def test_damage_never_raises_anything_else(data, head, damage):
    """Whatever bytes of a file are overwritten, it is read as finite samples or refused with `AudioError`."""
    damaged = bytearray(data)
    for place, value in damage:
        damaged[int(place * (64 if head else len(data)))] = value
    try:
        samples, _ = decode(bytes(damaged), 30.0)
    except AudioError as error:
        assert str(error)  # noqa: PT017 - both outcomes are allowed
    else:
        assert np.isfinite(samples).all()


BANKS = {
    "sr22050_n80_8000": (22050, 1024, 80, 8000.0),
    "sr22050_n80_none": (22050, 1024, 80, 11025.0),
    "sr44100_n128_none": (44100, 2048, 128, 22050.0),
}


@pytest.mark.parametrize("name", BANKS)
def test_the_filter_bank_is_slaneys(name):
    """The filters of the presets equal librosa's.

    The file was written with librosa 0.11.0 by ``np.savez_compressed(path, **{name: librosa.filters.mel(
    sr=sr, n_fft=n_fft, n_mels=n_mels, fmin=0, fmax=fmax)})`` for the rows of ``BANKS``, with fmax None where
    the name says none.
    """
    sr, n_fft, n_mels, fmax = BANKS[name]
    filters = triangular_filters(slaney_edges(n_mels, 0.0, fmax), sr, n_fft)
    np.testing.assert_allclose(filters.numpy(), np.load(GOLDEN)[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("win_length", [1024, 800])
def test_the_mel_spectrogram_follows_its_definition(win_length):
    """Frame by frame, NumPy's transform of the padded, windowed wave gives the same numbers."""
    wave = (0.1 * np.random.default_rng(1).standard_normal(5000)).astype(np.float32)
    wave[2000:4000] = 0
    mel = MelSpectrogram(22050, 1024, win_length, 256, 80, 0, None)(torch.from_numpy(wave))
    padded = np.pad(wave.astype(np.float64), 384, mode="reflect")
    window = np.zeros(1024)
    start = (1024 - win_length) // 2
    window[start : start + win_length] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win_length) / win_length)
    frames = np.stack([padded[i * 256 : i * 256 + 1024] * window for i in range(5000 // 256)])
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)
    expected = np.log(np.maximum(np.load(GOLDEN)["sr22050_n80_none"] @ magnitude.T, 1e-5))
    assert mel.shape == (80, 19)
    np.testing.assert_allclose(mel.numpy(), expected, atol=2e-4)
    assert mel.min().item() == pytest.approx(np.log(1e-5))


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(2000, 6000))
def test_a_wave_has_a_frame_per_hop(samples):
    """T is samples // hop_length, which is how targets and lengths are matched."""
    mel = MelSpectrogram(22050, 1024, 1024, 256, 80, 0, 8000)
    assert mel(torch.zeros(samples)).shape == (80, samples // 256)


@pytest.mark.parametrize(("fmin", "fmax"), [(-1.0, 8000.0), (8000.0, 8000.0), (0.0, 8001.0)])
def test_mel_bins_outside_the_spectrum_are_refused(fmin, fmax):
    """A preset for another sample rate is an error, not a spectrogram with silent bins."""
    with pytest.raises(ValueError, match="do not fit"):
        MelSpectrogram(16000, 1024, 1024, 256, 80, fmin, fmax)
