"""The YAML config: what loads, and how a wrong one is refused."""

import copy
import json
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from types import MappingProxyType

import pydantic
import pytest
import yaml

from seedvc_train.config import Config, ConfigError, ModelParams, load_config

DATA = Path(__file__).parents[1] / "data"
PRESETS = json.loads((DATA / "presets.json").read_text())
WAVENET = PRESETS["config_dit_mel_seed_uvit_whisper_small_wavenet.yml"]
REMOVED = object()


def changed(config, **changes):
    """A copy of the config with values put at (or removed from) places written with double underscores."""
    config = copy.deepcopy(config)
    for place, value in changes.items():
        *sections, last = place.split("__")
        section = config
        for name in sections:
            section = section[name]
        if value is REMOVED:
            del section[last]
        else:
            section[last] = value
    return config


def refusal(config):
    with pytest.raises(ConfigError) as caught:
        Config.parse(config, source="run.yml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_from_yaml_with_their_numbers(name, tmp_path):
    """Seed-VC's published configs load as they are, unknown keys included."""
    path = tmp_path / name
    path.write_text(yaml.safe_dump(PRESETS[name]))
    config = load_config(path)
    raw = PRESETS[name]["model_params"]
    assert config.batch_size == PRESETS[name]["batch_size"]
    assert config.save_interval == PRESETS[name]["save_interval"]
    assert config.preprocess_params.sr == PRESETS[name]["preprocess_params"]["sr"]
    assert config.model_params.dit.model_dump(by_alias=True).items() <= raw["DiT"].items()
    assert config.model_params.length_regulator.sampling_ratios == (1, 1, 1, 1)
    assert config.model_params.speech_tokenizer.type == raw["speech_tokenizer"]["type"]
    assert (config.model_params.wavenet is None) == ("wavenet" not in raw)


def test_a_run_directorys_yaml_loads_with_defaults():
    """A config that leaves the intervals out gets Seed-VC's."""
    config = load_config(str(DATA / "run_from_seedvc" / "config_dit_mini.yml"))
    assert (config.log_interval, config.save_interval, config.epochs) == (10, 500, 1000)
    assert config.log_dir == "./runs/"


@pytest.mark.parametrize(("written", "read"), [("None", None), (None, None), (8000, 8000.0), (7600.5, 7600.5)])
def test_fmax_may_be_none_in_either_spelling(written, read):
    """The text `None`, null and a number in Hz are the three ways to write fmax."""
    config = Config.parse(changed(WAVENET, preprocess_params__spect_params__fmax=written))
    assert config.preprocess_params.spect_params.fmax == read


MODEL = "model_params__"
DIT = "model_params__DiT__"
REGULATOR = "model_params__length_regulator__"
SPECT = "preprocess_params__spect_params__"
REFUSED = [
    (f"{DIT}depth", REMOVED, "model_params.DiT.depth: missing"),
    (f"{DIT}hidden_dim", REMOVED, "model_params.DiT.hidden_dim: missing"),
    (f"{DIT}uvit_skip_connection", REMOVED, "model_params.DiT.uvit_skip_connection: missing"),
    (f"{REGULATOR}in_channels", REMOVED, "model_params.length_regulator.in_channels: missing"),
    (f"{MODEL}style_encoder", REMOVED, "model_params.style_encoder: missing"),
    (f"{MODEL}speech_tokenizer", REMOVED, "model_params.speech_tokenizer: missing"),
    (f"{MODEL}reg_loss_type", REMOVED, "model_params.reg_loss_type: missing"),
    ("model_params", REMOVED, "model_params: missing"),
    ("preprocess_params", REMOVED, "preprocess_params: missing"),
    ("preprocess_params__sr", REMOVED, "preprocess_params.sr: missing"),
    (f"{SPECT}hop_length", REMOVED, "preprocess_params.spect_params.hop_length: missing"),
    ("batch_size", REMOVED, "batch_size: missing"),
    (f"{MODEL}DiT", None, "model_params.DiT: should be a mapping, found None"),
    (f"{MODEL}wavenet", [5], "model_params.wavenet: should be a mapping, found [5]"),
    ("batch_size", 0, "batch_size: should be greater than 0, found 0"),
    ("save_interval", -5, "save_interval: should be greater than 0, found -5"),
    (f"{DIT}depth", "13", "model_params.DiT.depth: should be a valid integer, found '13'"),
    (f"{DIT}depth", 13.0, "model_params.DiT.depth: should be a valid integer, found 13.0"),
    (f"{DIT}depth", True, "model_params.DiT.depth: should be a valid integer, found True"),
    (f"{DIT}depth", None, "model_params.DiT.depth: should be a valid integer, found None"),
    (f"{DIT}time_as_token", 1, "model_params.DiT.time_as_token: should be a valid boolean, found 1"),
    (f"{DIT}time_as_token", "yes", "model_params.DiT.time_as_token: should be a valid boolean, found 'yes'"),
    (
        f"{DIT}class_dropout_prob",
        1.5,
        "model_params.DiT.class_dropout_prob: should be less than or equal to 1",
    ),
    (f"{DIT}class_dropout_prob", float("nan"), "model_params.DiT.class_dropout_prob: should be"),
    (f"{DIT}final_layer_type", "conv", "model_params.DiT.final_layer_type: should be 'mlp' or 'wavenet'"),
    (f"{DIT}target", "codes", "model_params.DiT.target: should be 'mel'"),
    (f"{DIT}content_type", "phones", "model_params.DiT.content_type: should be"),
    (f"{MODEL}dit_type", "UNet", "model_params.dit_type: should be 'DiT', found 'UNet'"),
    (f"{MODEL}reg_loss_type", "huber", "model_params.reg_loss_type: should be 'l1' or 'l2'"),
    (f"{MODEL}diffusion_type", "ddpm", "model_params.diffusion_type: should be 'flow'"),
    (f"{MODEL}style_encoder__type", "ecapa", "model_params.style_encoder.type: should be 'campplus'"),
    (
        f"{MODEL}speech_tokenizer__type",
        "cosyvoice",
        "model_params.speech_tokenizer.type: should be 'whisper' or",
    ),
    (f"{MODEL}speech_tokenizer__type", "xlsr", "model_params.speech_tokenizer.output_layer: missing"),
    (f"{DIT}is_causal", True, "model_params.DiT.is_causal: true is not implemented"),
    (f"{DIT}zero_prompt_speech_token", True, "model_params.DiT.zero_prompt_speech_token: true is not"),
    (f"{DIT}add_resblock_in_transformer", True, "model_params.DiT.add_resblock_in_transformer: true is not"),
    (f"{REGULATOR}is_discrete", True, "model_params.length_regulator.is_discrete: true is not implemented"),
    (f"{REGULATOR}vector_quantize", True, "model_params.length_regulator.vector_quantize: true is not"),
    (f"{REGULATOR}sampling_ratios", [], "model_params.length_regulator.sampling_ratios: "),
    (f"{REGULATOR}sampling_ratios", [1, 0], "model_params.length_regulator.sampling_ratios[1]: should be"),
    (f"{REGULATOR}sampling_ratios", 4, "model_params.length_regulator.sampling_ratios: "),
    (
        f"{REGULATOR}channels",
        256,
        "model_params.length_regulator.channels: 256 does not equal DiT.content_dim 512",
    ),
    (
        f"{REGULATOR}f0_condition",
        True,
        "model_params.length_regulator.f0_condition: True does not equal DiT.f0",
    ),
    (f"{DIT}f0_condition", True, "model_params.length_regulator.f0_condition: False does not equal DiT.f0"),
    (f"{DIT}num_heads", 7, "model_params.DiT.num_heads: 7 does not divide hidden_dim 512"),
    (f"{DIT}num_heads", 512, "model_params.DiT.num_heads: head size 512 / 512 is odd"),
    (f"{DIT}in_channels", 100, "model_params.DiT.in_channels: 100 does not equal spect_params.n_mels 80"),
    (f"{MODEL}wavenet", REMOVED, "model_params.wavenet: missing, and DiT.final_layer_type is wavenet"),
    (f"{MODEL}wavenet", None, "model_params.wavenet: missing, and DiT.final_layer_type is wavenet"),
    (
        f"{MODEL}wavenet__hidden_dim",
        256,
        "model_params.wavenet.hidden_dim: 256 does not equal DiT.hidden_dim 512",
    ),
    (f"{MODEL}wavenet__kernel_size", 4, "model_params.wavenet.kernel_size: 4 is even"),
    (f"{MODEL}wavenet__num_layers", 0, "model_params.wavenet.num_layers: should be greater than 0"),
    (f"{SPECT}win_length", 2048, "preprocess_params.spect_params.win_length: 2048 is larger than n_fft 1024"),
    (f"{SPECT}hop_length", 1025, "preprocess_params.spect_params.hop_length: 1025 is larger than n_fft 1024"),
    (f"{SPECT}fmax", 12000, "preprocess_params.spect_params.fmax: 12000 Hz is above half the sampling rate"),
    (f"{SPECT}fmax", "none at all", "preprocess_params.spect_params.fmax: should be a valid number"),
    (f"{SPECT}fmax", 0, "preprocess_params.spect_params.fmin: 0 Hz leaves no band below 0 Hz"),
    (f"{SPECT}fmin", 11025, "preprocess_params.spect_params.fmin: 11025 Hz leaves no band below 11025.0 Hz"),
    (f"{SPECT}fmin", -1, "preprocess_params.spect_params.fmin: should be greater than or equal to 0"),
]


@pytest.mark.parametrize(("place", "value", "problem"), REFUSED)
def test_each_defect_is_refused_at_its_place(place, value, problem):
    """One defect gives the file's name and one line that begins with the defect's place."""
    first, *problems = refusal(changed(WAVENET, **{place: value}))
    assert first == "run.yml: not a config that can be trained"
    assert len(problems) == 1
    assert problems[0].strip().startswith(problem)


def test_all_problems_are_in_one_message():
    """A missing number, a wrong type and two contradictions are reported together."""
    changes = {
        f"{DIT}depth": REMOVED,
        f"{MODEL}style_encoder__dim": "192",
        f"{DIT}num_heads": 7,
        f"{SPECT}win_length": 4096,
    }
    text = "\n".join(refusal(changed(WAVENET, **changes)))
    for problem in ("DiT.depth: missing", "style_encoder.dim: ", "DiT.num_heads: 7", "win_length: 4096"):
        assert problem in text


def test_an_unused_wavenet_section_may_have_another_width():
    """With the MLP head, the 44.1 kHz preset's leftover `wavenet` section does not have to fit."""
    changes = {f"{DIT}final_layer_type": "mlp", f"{MODEL}wavenet__hidden_dim": 256}
    assert Config.parse(changed(WAVENET, **changes)).model_params.dit.final_layer_type == "mlp"


def test_one_f0_bin_leaves_none_for_a_voiced_frame():
    """With F0, at least two bins are needed; without, their number does not matter."""
    with_f0 = {f"{DIT}f0_condition": True, f"{REGULATOR}f0_condition": True, f"{REGULATOR}n_f0_bins": 1}
    assert "n_f0_bins: 1 leaves no bin" in refusal(changed(WAVENET, **with_f0))[1]
    Config.parse(changed(WAVENET, **{f"{REGULATOR}n_f0_bins": 1}))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"# nothing but a comment\n", "the file is empty"),
        (b"- a\n- list\n", "expected a mapping with model_params and others, found a list"),
        (b"just text", "expected a mapping with model_params and others, found a str"),
        (b"a: [1, 2\nb: 3\n", "not valid YAML"),
        (b"a: \xff\xfe\x00", "not valid YAML"),
        (b"a: 2024-13-45", "not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"PK\x03\x04\x00\x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path, content, sentence):
    """Empty, not a mapping, not YAML, binary: one line with the path and what was found."""
    path = tmp_path / "run.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
def test_nesting_without_end_is_refused(tmp_path, monkeypatch, loader):
    """With or without libyaml, a file of brackets is not valid YAML rather than a crash."""
    monkeypatch.setattr(yaml, "CSafeLoader", getattr(yaml, loader))
    path = tmp_path / "run.yml"
    path.write_text("[" * 5000)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    """A path that is not a readable file is named in one sentence."""
    with pytest.raises(ConfigError, match=r"none\.yml: no such config file"):
        load_config(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="this is a folder"):
        load_config(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        load_config(tmp_path / "file" / "run.yml")


def test_load_config_names_the_file(tmp_path):
    """The message of a config with a defect begins with its path."""
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(changed(WAVENET, **{f"{DIT}depth": REMOVED})))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "model_params.DiT.depth: missing" in str(caught.value)


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_model_params_parse_any_mapping(kind):
    """A plain dict and nested dict-likes give the same ModelParams, which parses to itself."""
    raw = WAVENET["model_params"]
    params = ModelParams.parse(kind({k: kind(v) if isinstance(v, dict) else v for k, v in raw.items()}))
    assert params == Config.parse(WAVENET).model_params
    assert ModelParams.parse(params) is params


def test_model_params_report_their_place():
    """Without a file, places still begin at the YAML's root."""
    with pytest.raises(ConfigError, match=r"model_params\.DiT\.depth: missing"):
        ModelParams.parse(changed(WAVENET, **{f"{DIT}depth": REMOVED})["model_params"])
    with pytest.raises(ConfigError, match="model_params: should be a mapping, found None"):
        ModelParams.parse(None)


def test_configs_are_frozen():
    """A checked config cannot be changed into an unchecked one."""
    config = Config.parse(WAVENET)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.model_params.dit.depth = 3


def test_config_imports_without_torch():
    """A config error does not wait for torch to load."""
    code = "import sys, seedvc_train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
