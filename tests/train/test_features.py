"""The built-in front end gives features of any size that say what was said and not who said it."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seedvc_train.audio import slaney_edges
from seedvc_train.features import Features
from seedvc_train.features.builtin import BuiltinFrontEnd, warp_frequencies

SR = 22050


def vowel(formant: float = 1.0, seconds: float = 1.5) -> torch.Tensor:
    """A buzz whose two formants move, scaled by ``formant``, over a little noise."""
    time = np.arange(int(SR * seconds)) / SR
    wave = 0.01 * np.random.default_rng(0).standard_normal(len(time))
    for harmonic in range(1, 60):
        hz = 120.0 * harmonic
        centres = formant * (600 + 200 * np.sin(7 * time)), formant * (1500 + 500 * np.cos(5 * time))
        gain = sum(np.exp(-(((hz - centre) / 200) ** 2)) for centre in centres)
        wave += 0.1 * gain * np.sin(2 * np.pi * hz * time)
    return torch.from_numpy(wave.astype(np.float32))


def listen(wave: torch.Tensor, content_dim: int = 80, style_dim: int = 192, seed: int = 0, sr: int = SR) -> Features:
    return BuiltinFrontEnd(content_dim, style_dim)(wave, sr, [torch.Generator().manual_seed(seed)])


@pytest.mark.parametrize("content_dim", [1, 24, 80, 81, 768, 1024])
def test_content_of_any_size_has_no_dead_bins(content_dim):
    """Every bin moves over time, no two are the same, and the clip has mean 0 and deviation about 1."""
    heard = listen(vowel(), content_dim)
    for content in (heard.content, heard.shifted_contents[0]):
        assert content.shape == (75, content_dim)
        assert content.dtype == torch.float32
        assert content.std(dim=0).min() > 0.1
        assert len({tuple(column.tolist()) for column in content.T}) == content_dim
        assert content.mean(dim=0).abs().max() < 1e-4
        assert 0.5 < content.std() < 1.1


@given(style_dim=st.integers(2, 600))
@settings(max_examples=20, deadline=None)
def test_style_has_the_size_asked_for(style_dim):
    """Even or odd, below or above the number of mel bins: style fits the network, at a scale it can use."""
    style = listen(vowel(seconds=1.0), 8, style_dim).style
    assert style.shape == (style_dim,)
    assert style.dtype == torch.float32
    assert style.abs().max() < 4
    assert style[0] != style[-1]


def test_style_tells_two_vocal_tracts_apart():
    """Means and deviations differ more between speakers than between halves of one recording."""
    wave = vowel(seconds=4.0)
    first, second, other = (listen(w).style for w in (wave[: 2 * SR], wave[2 * SR :], vowel(1.25, 4.0)))
    for part in (slice(0, 96), slice(96, 192)):
        assert (first - other)[part].norm() > 2 * (first - second)[part].norm()


@pytest.mark.parametrize("samples", [22050, 30001, 44100])
def test_content_has_fifty_frames_a_second(samples):
    """N follows the duration, whatever the sample rate of the wave."""
    assert abs(len(listen(torch.randn(samples, generator=torch.Generator())).content) - 50 * samples / SR) <= 1


def test_features_come_from_the_wave_and_the_generator_alone():
    """The same generator state gives the same bits; another changes the shifted content and nothing else."""
    wave = vowel()
    first, again, other = listen(wave, seed=1), listen(wave, seed=1), listen(wave, seed=2)
    assert torch.equal(first.shifted_contents[0], again.shifted_contents[0])
    assert not torch.equal(first.shifted_contents[0], other.shifted_contents[0])
    for heard in (again, other):
        assert torch.equal(first.content, heard.content)
        assert torch.equal(first.style, heard.style)
    assert first.f0 is None


def test_shifted_content_moves_the_formants_both_ways():
    """Over many draws the disguised copy resembles speakers with higher and with lower formants."""
    wave = vowel()
    plain = listen(wave).content
    higher, lower = listen(vowel(1.15)).content, listen(vowel(0.87)).content

    def nearest(shifted: torch.Tensor) -> str:
        targets = {"plain": plain, "higher": higher, "lower": lower}
        return min(targets, key=lambda name: (shifted - targets[name]).norm().item())

    assert {nearest(listen(wave, seed=seed).shifted_contents[0]) for seed in range(12)} == {
        "plain",
        "higher",
        "lower",
    }


def test_a_silent_clip_gives_finite_features():
    """Nothing is divided by the deviation of silence."""
    heard = listen(torch.zeros(SR))
    for values in (heard.content, *heard.shifted_contents, heard.style):
        assert values.isfinite().all()
    assert heard.content.abs().max() < 1e-3


def test_a_pickled_front_end_hears_the_same():
    """Loader processes may get a copy."""
    front_end = BuiltinFrontEnd(24, 7)
    copy = pickle.loads(pickle.dumps(front_end))
    heard, copied = (f(vowel(), SR, [torch.Generator().manual_seed(3)]) for f in (front_end, copy))
    assert torch.equal(heard.shifted_contents[0], copied.shifted_contents[0])
    assert torch.equal(heard.style, copied.style)


@pytest.mark.parametrize(("content_dim", "style_dim"), [(0, 2), (1, 1)])
def test_sizes_that_cannot_be_filled_are_refused(content_dim, style_dim):
    """A style needs a mean and a deviation, content a bin."""
    with pytest.raises(ValueError, match="is below"):
        BuiltinFrontEnd(content_dim, style_dim)


@settings(deadline=None)
@given(factor=st.floats(0.7, 1.4))
def test_a_warp_is_a_stretch_with_fixed_ends(factor):
    """Low frequencies are multiplied, 0 and half the rate stay, and the order of frequencies is kept."""
    hz = slaney_edges(80, 0.0, 8000.0)
    warped = warp_frequencies(hz, factor, 16000)
    assert warped[0] == 0
    assert warped[-1].item() == pytest.approx(8000)
    assert (warped.diff() > 0).all()
    low = hz * max(factor, 1) < 4800
    torch.testing.assert_close(warped[low], hz[low] * factor)


@pytest.mark.parametrize(
    ("factor", "hz", "warped"),
    [(1.0, 5000, 5000), (1.25, 3840, 4800), (1.25, 5920, 6400), (0.8, 4800, 3840), (0.8, 6400, 5920)],
)
def test_a_warp_bends_where_the_paper_says(factor, hz, warped):
    """At 16 kHz the knee lies at 4800 Hz, before the warp or after it, and half-way to the end half is made up."""
    assert warp_frequencies(torch.tensor(float(hz)), factor, 16000).item() == pytest.approx(warped)
