"""The YAML's encoders are taken when all they need is here, and what is missing is told with its remedy."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pretrained_models
import pytest
import runs
import torch
import yaml
from hub_server import HubServer
from pretrained_models import WHISPER_DIM, XLSR_DIM

from seedvc_ckpt import CheckpointStore
from seedvc_train.audio import read_audio
from seedvc_train.config import Config
from seedvc_train.features import FrontEnd
from seedvc_train.features.builtin import BuiltinFrontEnd
from seedvc_train.features.campplus import CampplusEncoder
from seedvc_train.features.choose import EncoderOptions, choose_front_end
from seedvc_train.features.pitch import pitch_estimator
from seedvc_train.features.seedvc import SeedVCFrontEnd
from seedvc_train.features.weights import EncoderError
from seedvc_train.features.whisper import WhisperEncoder

PRESETS = json.loads((runs.DATA / "presets.json").read_text())
REPO = "someone/whisper-small-one"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper of the real window, 30 s."""
    return pretrained_models.save_whisper(tmp_path_factory.mktemp("whisper"), window=30)


@pytest.fixture(scope="module")
def xlsr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_models.save_xlsr(tmp_path_factory.mktemp("xlsr"))


@pytest.fixture(scope="module")
def campplus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_models.save_campplus(tmp_path_factory.mktemp("weights") / "campplus_cn_common.bin")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has nothing yet, and an empty cache; the working folder is empty too."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with HubServer({}).running() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield server


def config(**changes: Any) -> Config:
    """The YAML of a Whisper preset for the small models; `changes` by the sections of model_params."""
    preset = json.loads(json.dumps(PRESETS["config_dit_mel_seed_uvit_whisper_small_wavenet.yml"]))
    params = preset["model_params"]
    params["speech_tokenizer"]["name"] = REPO
    params["length_regulator"]["in_channels"] = WHISPER_DIM
    for section, values in changes.items():
        params[section].update(values)
    return Config.parse(preset)


def choose(config: Config, folder: Path | str = "", **options: Any) -> tuple[FrontEnd, list[str]]:
    """The front end and what was said."""
    said: list[str] = []
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return choose_front_end(config, str(folder), EncoderOptions(**plain), "cpu", said.append), said


def serve(hub: HubServer, folder: Path, repo: str = REPO) -> None:
    hub.files |= {f"{repo}/{path.name}": path.read_bytes() for path in folder.iterdir()}


def test_encoders_on_this_machine_are_taken_without_asking_the_hub(
    hub: HubServer, whisper: Path, campplus: Path
) -> None:
    """By options, or by the YAML, whose campplus_path may be beside it."""
    by_options, said = choose(config(), content_encoder=whisper, campplus=campplus)
    assert isinstance(by_options, SeedVCFrontEnd)
    local = config(speech_tokenizer={"name": str(whisper)})
    by_yaml, said_too = choose(local, folder=campplus.parent)
    assert by_yaml.identity == by_options.identity
    shutil.copy(campplus, "here.bin")
    as_given, _ = choose(config(speech_tokenizer={"name": str(whisper)}, style_encoder={"campplus_path": "here.bin"}))
    assert as_given.identity == by_options.identity
    assert said == said_too == hub.requests == []


def test_the_yaml_chooses_the_encoders(hub: HubServer, whisper: Path, xlsr: Path, campplus: Path) -> None:
    """Type and output_layer of the content encoder; pitch only where the model takes it."""
    layered = {"type": "xlsr", "output_layer": 2}
    xlsr_config = config(speech_tokenizer=layered, length_regulator={"in_channels": XLSR_DIM})
    heard_by, _ = choose(xlsr_config, content_encoder=xlsr, campplus=campplus)
    assert "wav2vec2" in heard_by.identity
    assert "2 layers" in heard_by.identity
    assert "no pitch" in heard_by.identity
    pitched, _ = choose(
        config(length_regulator={"f0_condition": True}, DiT={"f0_condition": True}),
        content_encoder=whisper,
        campplus=campplus,
    )
    assert "swift-f0" in pitched.identity
    wave = 0.1 * torch.sin(torch.arange(22_050) * 0.05)
    assert heard_by(wave, 22_050, []).f0 is None
    assert pitched(wave, 22_050, []).f0 is not None


def test_encoders_come_from_the_hub_once(hub: HubServer, whisper: Path, campplus: Path) -> None:
    """Through the hub's own client into its cache; the second time no request is made."""
    serve(hub, whisper)
    serve(hub, campplus.parent, "funasr/campplus")
    fetched, said = choose(config())
    assert isinstance(fetched, SeedVCFrontEnd)
    assert said == []
    assert f"GET {REPO}/model.safetensors" in hub.requests
    assert "GET funasr/campplus/campplus_cn_common.bin" in hub.requests
    hub.requests.clear()
    cached, _ = choose(config())
    assert cached.identity == fetched.identity
    assert hub.requests == []
    local, _ = choose(config(), content_encoder=whisper, campplus=campplus)
    assert local.identity == fetched.identity


def test_weights_of_older_repositories_come_from_the_hub(hub: HubServer, whisper: Path, campplus: Path) -> None:
    """A repository without safetensors, as XLS-R's: its pytorch_model.bin is fetched and read by our own reader."""
    from safetensors.torch import load_file

    serve(hub, whisper)
    del hub.files[f"{REPO}/model.safetensors"]
    torch.save(load_file(whisper / "model.safetensors"), "pytorch_model.bin")
    hub.files[f"{REPO}/pytorch_model.bin"] = Path("pytorch_model.bin").read_bytes()
    fetched, _ = choose(config(), campplus=campplus)
    assert fetched.identity == choose(config(), content_encoder=whisper, campplus=campplus)[0].identity


def test_what_is_missing_is_told_and_built_in_features_are_taken(hub: HubServer) -> None:
    """What, from where, by which option, and what it means for the model."""
    front_end, said = choose(config())
    assert isinstance(front_end, BuiltinFrontEnd)
    text = "\n".join(said)
    assert "funasr/campplus on the hub has no campplus_cn_common.bin" in text
    assert "https://huggingface.co/funasr/campplus/resolve/main/campplus_cn_common.bin" in text
    assert "--campplus PATH" in text
    assert f"https://huggingface.co/{REPO}" in text
    assert f"there is no folder {REPO} here" in text
    assert "--content-encoder DIR" in text
    assert "can't convert voices in Seed-VC's services" in text
    assert "--features builtin" in text


@pytest.mark.parametrize("missing", ["campplus", "content"])
def test_one_missing_encoder_is_enough(hub: HubServer, whisper: Path, campplus: Path, missing: str) -> None:
    """There is no half of Seed-VC's front end, and what is here is not reported."""
    if missing == "campplus":
        front_end, said = choose(config(speech_tokenizer={"name": str(whisper)}))
    else:
        front_end, said = choose(config(), folder=campplus.parent)
    assert isinstance(front_end, BuiltinFrontEnd)
    assert ("--campplus" in "".join(said)) == (missing == "campplus")
    assert ("--content-encoder" in "".join(said)) == (missing == "content")


def test_missing_encoders_that_were_asked_for_are_an_error(hub: HubServer, whisper: Path, campplus: Path) -> None:
    """By --features seedvc, or by naming one of them."""
    for options in ({"features": "seedvc"}, {"content_encoder": whisper}, {"campplus": campplus}):
        with pytest.raises(EncoderError, match="the encoders that Seed-VC listens with can't be used:\n  "):
            choose(config(), **options)


def test_a_silent_hub_is_waited_for_once_and_briefly(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would try again for minutes; two encoders are missing, one request is made."""
    monkeypatch.setattr("seedvc_train.features.hub._PATIENCE", 0.5)
    hub.silent.set()
    started = time.monotonic()
    front_end, said = choose(config())
    assert time.monotonic() - started < 10
    assert isinstance(front_end, BuiltinFrontEnd)
    assert hub.requests.count("unanswered HEAD") == 1  # beside what the client may ask for its own sake
    assert "can't be had from the hub" in said[1]


def test_no_request_is_made_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE means what it always means."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    front_end, said = choose(config())
    assert isinstance(front_end, BuiltinFrontEnd)
    assert "HF_HUB_OFFLINE" in said[1]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"length_regulator": {"in_channels": 24}}, "in_channels is 24, but openai/whisper-small gives 768"),
        ({"style_encoder": {"dim": 16}, "length_regulator": {"in_channels": 768}}, "style_encoder.dim is 16, but CAM"),
    ],
)
def test_small_models_train_on_built_in_features_at_once(hub: HubServer, changes: dict[str, Any], told: str) -> None:
    """What can't fit is told without the hub, whose models would only be downloaded for nothing."""
    front_end, said = choose(config(speech_tokenizer={"name": "openai/whisper-small"}, **changes))
    assert isinstance(front_end, BuiltinFrontEnd)
    assert told in said[1]
    assert hub.requests == []


def test_an_encoder_whose_width_does_not_fit_is_an_error_where_it_was_named(
    hub: HubServer, whisper: Path, xlsr: Path, campplus: Path
) -> None:
    """The width is read from the folder's config.json."""
    with pytest.raises(EncoderError, match=f"in_channels is 99, but .* gives {WHISPER_DIM} numbers"):
        choose(config(length_regulator={"in_channels": 99}), content_encoder=whisper, campplus=campplus)
    wrong = config(length_regulator={"in_channels": XLSR_DIM})
    with pytest.raises(EncoderError, match="holds a model of type wav2vec2, expected whisper"):
        choose(wrong, content_encoder=xlsr, campplus=campplus)


def test_built_in_features_can_be_chosen(hub: HubServer, campplus: Path) -> None:
    """In silence, and not together with encoders."""
    front_end, said = choose(config(), features="builtin")
    assert isinstance(front_end, BuiltinFrontEnd)
    assert said == hub.requests == []
    with pytest.raises(EncoderError, match="--campplus has no effect with --features builtin"):
        choose(config(), features="builtin", campplus=campplus)


def test_options_that_lead_nowhere_are_refused(hub: HubServer, whisper: Path, campplus: Path, tmp_path: Path) -> None:
    """A mistyped path, a pitch estimator for a model without pitch, a file that holds something else."""
    with pytest.raises(EncoderError, match=r"--campplus nowhere\.bin: no such file"):
        choose(config(), content_encoder=whisper, campplus="nowhere.bin")
    with pytest.raises(EncoderError, match="/nowhere: no such folder"):
        choose(config(), content_encoder="/nowhere", campplus=campplus)
    with pytest.raises(EncoderError, match="--rmvpe has no effect with this YAML"):
        choose(config(), rmvpe="rmvpe.onnx")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.bin")
    with pytest.raises(EncoderError, match=r"other\.bin: not the weights of a CampplusNetwork"):
        choose(config(), content_encoder=whisper, campplus=tmp_path / "other.bin")
    pitched = config(length_regulator={"f0_condition": True}, DiT={"f0_condition": True})
    with pytest.raises(EncoderError, match=r"nowhere\.onnx: can't be read"):
        choose(pitched, content_encoder=whisper, campplus=campplus, rmvpe="nowhere.onnx")


def test_packages_that_are_missing_are_named_with_their_extra(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, without looking further."""
    monkeypatch.setattr("seedvc_train.features.weights.find_spec", lambda name: None)
    front_end, said = choose(config())
    assert isinstance(front_end, BuiltinFrontEnd)
    for package in ("transformers", "kaldi-native-fbank", "pyworld-prebuilt", "swift-f0"):
        assert any(f"{package} is not installed: run pip install 'seedvc-ckpt[encoders]'" in line for line in said)
    assert hub.requests == []


def test_named_options_are_those_that_name_an_encoder() -> None:
    """What turns a missing encoder into an error."""
    assert EncoderOptions().named == []
    assert replace(EncoderOptions(), rmvpe="a", campplus="b").named == ["--campplus", "--rmvpe"]


@pytest.fixture(scope="module")
def front_end(whisper: Path, campplus: Path) -> SeedVCFrontEnd:
    return SeedVCFrontEnd(WhisperEncoder(str(whisper)), CampplusEncoder(str(campplus)), pitch_estimator())


@pytest.fixture(scope="module")
def wave(recordings: Path) -> torch.Tensor:
    """Made-up speech at 44.1 kHz."""
    return read_audio(str(min(recordings.rglob("*.wav"))), 44_100)[:44_100]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_recording_is_heard_as_it_is_and_its_copies_disguised(
    front_end: SeedVCFrontEnd, wave: torch.Tensor, whisper: Path, campplus: Path
) -> None:
    """Content, style and pitch are those of the parts at 16 kHz; each copy has content of its own, of one shape."""
    from seedvc_train.audio import resample

    heard = torch.from_numpy(resample(wave.numpy(), 44_100, 16_000))
    features = front_end(wave, 44_100, generators(1, 2))
    assert features.content.shape == (51, WHISPER_DIM)
    torch.testing.assert_close(features.content, WhisperEncoder(str(whisper))(heard[None])[0])
    assert torch.equal(features.style, CampplusEncoder(str(campplus))(heard))
    assert features.f0 is not None
    assert torch.equal(features.f0, pitch_estimator()(heard, 16_000))
    assert features.f0.shape == (101,)
    first, second = features.shifted_contents
    assert first.shape == second.shape == features.content.shape
    assert not torch.equal(first, second)
    assert not torch.equal(first, features.content)
    tensors = (features.content, first, second, features.style, features.f0)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in tensors)


def test_copies_depend_on_their_generator_alone(front_end: SeedVCFrontEnd, wave: torch.Tensor) -> None:
    """The same bits again, from a pickled copy too, whatever torch's global generator does; others from another."""
    before = torch.get_rng_state()
    first = front_end(wave, 44_100, generators(1)).shifted_contents[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    copy = pickle.loads(pickle.dumps(front_end))
    assert torch.equal(copy(wave, 44_100, generators(1)).shifted_contents[0], first)
    assert not torch.equal(front_end(wave, 44_100, generators(2)).shifted_contents[0], first)
    assert copy.identity == front_end.identity


def test_several_threads_may_listen_at_once(front_end: SeedVCFrontEnd, recordings: Path) -> None:
    """As a feature cache is filled: each clip's bits are those that it has alone."""
    waves = [read_audio(str(path), 22_050)[:22_050] for path in sorted(recordings.rglob("*.wav"))[:4]]
    alone = [front_end(wave, 22_050, generators(1)) for wave in waves]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda wave: front_end(wave, 22_050, generators(1)), waves * 3))
    for first, second in zip(alone * 3, together, strict=True):
        assert torch.equal(first.content, second.content)
        assert torch.equal(first.shifted_contents[0], second.shifted_contents[0])
        assert torch.equal(first.style, second.style)
        assert first.f0 is not None
        assert second.f0 is not None
        assert torch.equal(first.f0, second.f0)


def test_the_identity_names_each_part(front_end: SeedVCFrontEnd, whisper: Path, campplus: Path) -> None:
    """In one line, without paths; without pitch it is another."""
    whole = front_end.identity
    parts = [WhisperEncoder(str(whisper)).identity, CampplusEncoder(str(campplus)).identity, pitch_estimator().identity]
    assert all(part in whole for part in parts)
    assert "formants" in whole
    assert "\n" not in whole
    assert "/" not in whole
    unpitched = SeedVCFrontEnd(WhisperEncoder(str(whisper)), CampplusEncoder(str(campplus)), None)
    assert unpitched.identity != whole


def yaml_of(path: Path, encoder: Path, kind: str = "whisper", dim: int = WHISPER_DIM, *, pitch: bool = False) -> Path:
    """The mini model for a small encoder and CAM++."""
    settings = yaml.safe_load(runs.CONFIG.read_text())
    params = settings["model_params"]
    params["speech_tokenizer"] = {"type": kind, "name": str(encoder), "output_layer": 2}
    params["style_encoder"]["dim"] = 192
    params["length_regulator"] |= {"in_channels": dim, "f0_condition": pitch, "n_f0_bins": 32}
    params["DiT"]["f0_condition"] = pitch
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def small_yaml(tmp_path_factory: pytest.TempPathFactory, whisper: Path) -> Path:
    return yaml_of(tmp_path_factory.mktemp("config") / "config_dit_small.yml", whisper)


@pytest.mark.parametrize(
    ("ears", "cache", "said"),
    [
        ("whisper", "off", "seedvc 1; whisper "),
        ("whisper", "default", "seedvc 1; whisper "),
        ("xlsr", "off", "wav2vec2 "),
        ("xlsr", "default", "wav2vec2 "),
        ("swift-f0", "off", "swift-f0 "),
        ("swift-f0", "default", "swift-f0 "),
        ("rmvpe", "off", "rmvpe "),
        ("rmvpe", "default", "rmvpe "),
    ],
)
def test_an_interrupted_run_with_encoders_ends_with_the_same_bits(
    recordings: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    campplus: Path,
    ears: str,
    cache: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    full: bool,
) -> None:
    """With two loader processes and without, features kept or not, and its settings tell by what it was heard.

    Each run keeps its own features: one that read the other's would agree however they are computed.
    """
    if not full and (ears, cache) in (("xlsr", "default"), ("swift-f0", "off"), ("rmvpe", "default")):
        pytest.skip("one of the two ways to hear is enough; --full tries the other")
    options = {"campplus": campplus, "feature_cache": None if cache == "default" else cache}
    if ears == "xlsr":
        content = request.getfixturevalue("xlsr"), "xlsr", XLSR_DIM
    else:
        content = request.getfixturevalue("whisper"), "whisper", WHISPER_DIM
    options["config"] = yaml_of(tmp_path / "config_dit_small.yml", *content, pitch=ears in ("swift-f0", "rmvpe"))
    if ears == "rmvpe":
        drawn = np.random.default_rng(0).standard_normal((128, 360)).astype(np.float32)
        weight = drawn - drawn.mean(axis=0)  # loud or not, the pitch is that of the spectrum: in reach of the model
        options["rmvpe"] = pretrained_models.save_rmvpe(tmp_path / "rmvpe.onnx", weight)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    straight = runs.train(recordings, tmp_path / "straight", max_steps=4, save_every=4, **options)
    assert straight.exit_code == 0, straight.output
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    began = runs.train(recordings, tmp_path / "parted", max_steps=2, save_every=2, num_workers=2, **options)
    runs.train(recordings, tmp_path / "parted", max_steps=4, save_every=2, **options)
    for user, output in (("first", straight.output), ("second", began.output)):
        assert ("0 clips from the cache, 6 computed" in output) == (cache == "default")
        assert (tmp_path / user / "seedvc-train" / "features").exists() == (cache == "default")
    assert runs.differences(tmp_path / "straight" / "run", tmp_path / "parted" / "run") == []
    with CheckpointStore(tmp_path / "parted" / "run", read_only=True) as store:
        heard = store.load(4)["seedvc_train"]["settings"]["values"]["features"]
    assert said in heard
    assert ("no pitch" in heard) == (ears in ("whisper", "xlsr"))


def test_a_run_does_not_go_on_with_other_ears(
    recordings: Path, tmp_path: Path, small_yaml: Path, campplus: Path
) -> None:
    """What began on encoders is not continued on built-in features, which auto would fall back to in silence."""
    runs.train(recordings, tmp_path, max_steps=1, config=small_yaml, campplus=campplus, feature_cache="off")
    other = runs.train(recordings, tmp_path, max_steps=2, config=small_yaml, features="builtin")
    assert "features: seedvc 1; whisper" in str(other.exception)
    assert "builtin now" in str(other.exception)


def test_the_command_explains_a_missing_encoder(recordings: Path, tmp_path: Path, small_yaml: Path) -> None:
    """As an error of the user's, not a traceback, before a folder is made."""
    process = runs.start(recordings, tmp_path, config=small_yaml, campplus="nowhere.bin")
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "--campplus nowhere.bin: no such file" in told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
