"""The demo corpus is real audio with two voices in it, the same bytes every time."""

import os
import time

import numpy as np
import pytest
import soundfile

from seedvc_train.corpus import SAMPLE_RATE, write_demo_corpus
from seedvc_train.dataset import scan


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pitch(samples: np.ndarray) -> float:
    """Median pitch in Hz of the louder frames, by autocorrelation."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, 1024)[::512]
    loud = frames[np.square(frames).mean(axis=1) > 0.3 * np.square(samples).mean()]
    lags = np.arange(SAMPLE_RATE // 350, SAMPLE_RATE // 70)
    power = np.abs(np.fft.rfft(loud, 4096)) ** 2
    return float(np.median(SAMPLE_RATE / lags[np.fft.irfft(power)[:, lags].argmax(axis=1)]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    started = time.process_time()
    paths = write_demo_corpus(str(folder))
    return folder, paths, time.process_time() - started


def test_every_clip_is_usable(demo):
    """A scan takes all twelve clips, in the order they were written, and each lasts 2 to 6 seconds."""
    folder, paths, _ = demo
    corpus = scan(str(folder), SAMPLE_RATE, progress=False)
    assert [os.path.join(folder, clip.path) for clip in corpus.clips] == paths
    assert len(paths) == 12
    assert not corpus.skipped
    assert all(2 <= clip.samples / SAMPLE_RATE <= 6 for clip in corpus.clips)


def test_it_is_written_in_seconds(demo):
    """A first try does not wait for its data."""
    assert demo[2] < 10


def test_files_are_plain_wav(demo):
    """16-bit mono at 22050 Hz, loud but not clipped."""
    for path in demo[1]:
        info = soundfile.info(path)
        assert (info.format, info.subtype, info.channels, info.samplerate) == (
            "WAV",
            "PCM_16",
            1,
            SAMPLE_RATE,
        )
        assert 0.6 < np.abs(soundfile.read(path)[0]).max() < 0.8


def test_two_voices_differ_in_pitch(demo):
    """Every clip of the first speaker is lower than every clip of the second, both within a human range."""
    low, high = ([pitch(soundfile.read(path)[0]) for path in part] for part in (demo[1][:6], demo[1][6:]))
    assert 80 < min(low) <= max(low) < 160 < min(high) <= max(high) < 300


def test_speech_has_pauses_vowels_and_hiss(demo):
    """Each clip has near-silent frames, frames with energy below 2 kHz and frames with it above 3 kHz."""
    for path in demo[1]:
        frames = np.lib.stride_tricks.sliding_window_view(soundfile.read(path)[0], 512)[::256]
        level = np.square(frames).mean(axis=1)
        power = np.abs(np.fft.rfft(frames * np.hanning(512))) ** 2
        hz = np.arange(257) * SAMPLE_RATE / 512
        low, high = power[:, hz < 2000].sum(axis=1), power[:, hz > 3000].sum(axis=1)
        sounding = level > 1e-3 * level.max()
        assert (level < 1e-5 * level.max()).mean() > 0.05
        assert (sounding & (low > 20 * high)).mean() > 0.2
        assert (sounding & (high > 5 * low)).mean() > 0.01


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """A corpus can be made again for an old run; another seed or clip is another utterance."""
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_demo_corpus(str(tmp_path / name), seed, clips=2)
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys()
    assert len({*one.values(), *three.values()}) == 8


def test_other_files_are_left_alone(tmp_path):
    """Writing into a folder in use replaces only the clips' own names."""
    mine = tmp_path / "speaker-a" / "mine.wav"
    mine.parent.mkdir()
    mine.write_text("mine")
    paths = write_demo_corpus(str(tmp_path), clips=1)
    assert mine.read_text() == "mine"
    assert len(contents(tmp_path)) == len(paths) + 1 == 3
