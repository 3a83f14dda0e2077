"""Whisper and XLS-R hear what ``transformers`` makes them hear by hand, from saved models and real loading code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from pretrained_models import WHISPER_DIM, WINDOW, XLSR_DIM, XLSR_LAYERS
from safetensors.torch import load_file, save_file

from seedvc_train.features.weights import EncoderError
from seedvc_train.features.whisper import WhisperEncoder
from seedvc_train.features.xlsr import XlsrEncoder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_models.save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def xlsr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_models.save_xlsr(tmp_path_factory.mktemp("xlsr"))


def waves(samples: int, count: int = 2) -> torch.Tensor:
    """Noise that gets louder, off centre: a normalisation shows."""
    noise = torch.randn(count, samples, generator=torch.Generator().manual_seed(samples))
    return 0.1 * noise * torch.linspace(0.1, 1, samples) + 0.02


def whisper_by_hand(folder: Path, heard: torch.Tensor) -> torch.Tensor:
    """As Seed-VC calls it, but for its half precision."""
    from transformers import AutoFeatureExtractor, WhisperModel

    model = WhisperModel.from_pretrained(folder)
    extract = AutoFeatureExtractor.from_pretrained(folder)
    inputs = extract(list(heard.numpy()), return_tensors="pt", return_attention_mask=True, sampling_rate=16_000)
    masked = model._mask_input_features(inputs.input_features, attention_mask=inputs.attention_mask)
    with torch.no_grad():
        return model.encoder(masked).last_hidden_state[:, : heard.shape[1] // 320 + 1]


def xlsr_by_hand(folder: Path, heard: torch.Tensor, output_layer: int) -> torch.Tensor:
    """As Seed-VC calls it, but for its half precision."""
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    model = Wav2Vec2Model.from_pretrained(folder).eval()
    model.encoder.layers = model.encoder.layers[:output_layer]
    extract = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    inputs = extract(
        list(heard.numpy()), return_tensors="pt", return_attention_mask=True, padding=True, sampling_rate=16_000
    )
    with torch.no_grad():
        return model(inputs.input_values).last_hidden_state


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(16_000, 51), (16_319, 51), (16_320, 52), (31_999, 100), (32_000, 100), (32_001, 100)],
)
def test_whisper_features_equal_transformers(whisper: Path, samples: int, frames: int) -> None:
    """Last hidden states, samples // 320 + 1 of them, but not more than the window has."""
    heard = waves(samples)
    encoder = WhisperEncoder(str(whisper))
    states = encoder(heard)
    assert states.shape == (2, frames, WHISPER_DIM)
    assert encoder.dim == WHISPER_DIM
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, whisper_by_hand(whisper, heard), atol=1e-6, rtol=1e-6)
    assert states.std() > 0.1


def test_whisper_takes_clips_of_thirty_seconds(tmp_path: Path) -> None:
    """The longest clip fills the window of the real models: 1500 frames, where shorter ones have one more a hop."""
    encoder = WhisperEncoder(str(pretrained_models.save_whisper(tmp_path, window=30)))
    assert encoder(waves(480_000, 1)).shape[1] == 1500
    assert encoder(waves(479_000, 1)).shape[1] == 1497


def test_whisper_refuses_what_does_not_fit_its_window(whisper: Path) -> None:
    """Nothing is cut off in silence."""
    with pytest.raises(ValueError, match=r"2.02 s of audio, but Whisper's window holds 2 s"):
        WhisperEncoder(str(whisper))(waves(16_000 * WINDOW + 320))


@pytest.mark.parametrize("output_layer", [1, 3, XLSR_LAYERS])
def test_xlsr_features_equal_transformers(xlsr: Path, output_layer: int) -> None:
    """The states after that layer, under the layer norm at the end, of input normalised clip by clip."""
    heard = waves(16_000)
    encoder = XlsrEncoder(str(xlsr), output_layer)
    states = encoder(heard)
    assert states.shape == (2, 49, XLSR_DIM)
    assert encoder.dim == XLSR_DIM
    torch.testing.assert_close(states, xlsr_by_hand(xlsr, heard, output_layer), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("normalize", "stable"), [(False, True), (True, False)])
def test_xlsr_follows_the_models_settings(tmp_path: Path, normalize: bool, stable: bool) -> None:
    """Input that is not normalised stays so; the post-norm kind has no layer norm at the end."""
    folder = pretrained_models.save_xlsr(tmp_path, normalize=normalize, stable=stable)
    heard = waves(8_000)
    torch.testing.assert_close(XlsrEncoder(str(folder), 2)(heard), xlsr_by_hand(folder, heard, 2), atol=1e-6, rtol=1e-6)


def test_without_an_output_layer_all_of_xlsr_is_run(xlsr: Path) -> None:
    """As its users would expect of a YAML that names none."""
    heard = waves(4_000)
    assert torch.equal(XlsrEncoder(str(xlsr))(heard), XlsrEncoder(str(xlsr), XLSR_LAYERS)(heard))


def test_layers_after_the_last_one_needed_are_not_loaded(xlsr: Path) -> None:
    """Half a large model is half the memory."""
    encoder = pickle.dumps(XlsrEncoder(str(xlsr), 2))
    assert len(encoder) < len(pickle.dumps(XlsrEncoder(str(xlsr)))) - 2 * 4 * XLSR_DIM * XLSR_DIM * 4


@pytest.mark.parametrize("load", [WhisperEncoder, XlsrEncoder])
def test_older_files_load_as_well(load: Callable[..., Any], whisper: Path, xlsr: Path, tmp_path: Path) -> None:
    """A pytorch_model.bin, and the names that weight norm had in the files of the hub."""
    source = whisper if load is WhisperEncoder else xlsr
    folder = Path(shutil.copytree(source, tmp_path / "old"))
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for new, old in names.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    torch.save(state, folder / "pytorch_model.bin")
    heard = waves(4_000)
    assert load(str(folder)).identity == load(str(source)).identity
    assert torch.equal(load(str(folder))(heard), load(str(source))(heard))


def test_half_precision_files_are_run_in_single_precision(whisper: Path, tmp_path: Path) -> None:
    """Large Whisper models are published as float16, which CPUs are slow at."""
    folder = Path(shutil.copytree(whisper, tmp_path / "half"))
    state = load_file(folder / "model.safetensors")
    save_file({name: value.half() for name, value in state.items()}, folder / "model.safetensors")
    states, full = WhisperEncoder(str(folder))(waves(4_000)), WhisperEncoder(str(whisper))(waves(4_000))
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, full, atol=0.02, rtol=0.02)
    assert WhisperEncoder(str(folder)).identity != WhisperEncoder(str(whisper)).identity


@pytest.mark.parametrize("load", [WhisperEncoder, XlsrEncoder])
def test_pickled_encoders_hear_the_same(load: Callable[..., Any], whisper: Path, xlsr: Path) -> None:
    """Loader processes may get a copy."""
    encoder = load(str(whisper if load is WhisperEncoder else xlsr))
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.identity == encoder.identity
    assert torch.equal(copy(waves(4_000)), encoder(waves(4_000)))


@pytest.mark.parametrize("load", [WhisperEncoder, XlsrEncoder])
def test_loading_draws_no_random_numbers_and_listening_none(
    load: Callable[..., Any], whisper: Path, xlsr: Path
) -> None:
    """Dropout is off, and torch's global generator, which a run resumes, is left alone."""
    before = torch.get_rng_state()
    encoder = load(str(whisper if load is WhisperEncoder else xlsr))
    first, again = encoder(waves(4_000)), encoder(waves(4_000))
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_identities_tell_models_and_layers_apart(whisper: Path, xlsr: Path, tmp_path: Path) -> None:
    """Not the place, but the weights and what is done with them."""
    copy = shutil.copytree(xlsr, tmp_path / "elsewhere")
    assert XlsrEncoder(str(copy), 2).identity == XlsrEncoder(str(xlsr), 2).identity
    plain = shutil.copytree(xlsr, tmp_path / "plain")
    settings = json.loads((plain / "preprocessor_config.json").read_text())
    (plain / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    encoders = XlsrEncoder(str(xlsr), 2), XlsrEncoder(str(xlsr), 3), XlsrEncoder(str(plain), 2)
    assert len({encoder.identity for encoder in (*encoders, WhisperEncoder(str(whisper)))}) == 4


def test_a_model_of_the_other_type_is_refused(whisper: Path, xlsr: Path) -> None:
    """The YAML's type and its name may contradict each other."""
    with pytest.raises(EncoderError, match="holds a model of type whisper, expected wav2vec2"):
        XlsrEncoder(str(whisper))
    with pytest.raises(EncoderError, match="holds a model of type wav2vec2, expected whisper"):
        WhisperEncoder(str(xlsr))


def test_layers_that_a_model_does_not_have_are_refused(xlsr: Path) -> None:
    """Python would quietly take all there are."""
    with pytest.raises(EncoderError, match=r"has 4 layers, speech_tokenizer\.output_layer asks for 5"):
        XlsrEncoder(str(xlsr), XLSR_LAYERS + 1)


def _edit(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | changes))

    return edit


def _cut_in_half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other_weights(folder: Path) -> None:
    save_file({"model.encoder.conv1.bias": torch.zeros(WHISPER_DIM)}, folder / "model.safetensors")


def _other_width(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.encoder.conv1.bias"] = torch.zeros(3)
    save_file(state, folder / "model.safetensors")


def _hostile(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.encoder.conv1.bias": print}, folder / "pytorch_model.bin")


def _sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json; it should be a folder that"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: can't be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: expected the settings of a model"),
        (_edit("config.json", d_model="wide"), r"config\.json describes no whisper model"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), r"has no preprocessor_config\.json or"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "its feature extractor can't be read"),
        (_edit("preprocessor_config.json", sampling_rate=8000), "made for audio at 8000 Hz, expected 16000 Hz"),
        (_edit("preprocessor_config.json", feature_size=128), "gives 128 bins and 200 frames, its encoder takes 80"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no model\.safetensors or pytorch_model\.bin"),
        (_sharded, "its weights are in several files"),
        (_cut_in_half, r"model\.safetensors: not an intact safetensors file"),
        (_other_weights, r"model\.safetensors: not the weights of a WhisperEncoder: it lacks conv1\.weight.* more"),
        (_other_width, r"model\.safetensors: does not fit a WhisperEncoder: .*conv1\.bias"),
        (_hostile, "print"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    whisper: Path, tmp_path: Path, damage: Callable[[Path], None], match: str
) -> None:
    """The message names the file and what is wrong with it."""
    folder = Path(shutil.copytree(whisper, tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(EncoderError, match=match):
        WhisperEncoder(str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "models/whisper/small"])
def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    """A mistyped path is a mistyped path."""
    with pytest.raises(EncoderError, match=f"{name}: no such folder"):
        WhisperEncoder(name)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, whisper: Path) -> None:
    """The extra for training brings no transformers."""
    monkeypatch.setattr("seedvc_train.features.weights.find_spec", lambda name: None)
    with pytest.raises(EncoderError, match=r"transformers is not installed: run pip install 'seedvc-ckpt\[encoders\]'"):
        WhisperEncoder(str(whisper))
