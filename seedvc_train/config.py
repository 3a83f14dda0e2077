"""The YAML config of a Seed-VC run, checked in full before anything heavy is imported.

The layout is Seed-VC's own. Keys that we do not read are ignored, so its published files load as they are; a
switch that would change the network or the loss in a way that we do not implement is refused, because the
checkpoint would then not be the model that its config promises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from seedvc_train.config_conflicts import config_conflicts, model_conflicts

__all__ = ["Config", "ConfigError", "ModelParams", "load_config", "parse_config"]


class ConfigError(ValueError):
    """A config that cannot be read or does not describe a run; the message places every problem."""


def _refuse_true(value: bool) -> bool:  # noqa: FBT001 - the signature pydantic calls
    if value:
        raise ValueError("true is not implemented")
    return value


def _written_none(value: object) -> object:
    return None if value == "None" else value  # Seed-VC writes the Python literal, which YAML reads as text


Size = Annotated[int, Field(strict=True, gt=0)]
Flag = Annotated[bool, Field(strict=True)]
Off = Annotated[bool, Field(strict=True), AfterValidator(_refuse_true)]
Probability = Annotated[float, Field(strict=True, ge=0, le=1)]
Hertz = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
OptionalHertz = Annotated[Hertz | None, BeforeValidator(_written_none)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class SpectParams(_Section):
    """The mel spectrogram; lengths in samples, frequencies in Hz, `fmax` None for half the sampling rate."""

    n_fft: Size
    win_length: Size
    hop_length: Size
    n_mels: Size
    fmin: Hertz
    fmax: OptionalHertz = None


class PreprocessParams(_Section):
    """The audio that the mel targets are made from; `sr` in Hz."""

    sr: Size
    spect_params: SpectParams


class SpeechTokenizer(_Section):
    """The frozen content encoder; `output_layer` counts the layers that are run of an XLS-R model."""

    type: Literal["whisper", "xlsr"]
    name: str
    output_layer: Size | None = None


class StyleEncoder(_Section):
    """The frozen speaker encoder; `dim` is the length of its embedding."""

    dim: Size
    type: Literal["campplus"] = "campplus"
    campplus_path: str | None = None


class LengthRegulatorParams(_Section):
    """The length regulator. The values of `sampling_ratios` do not matter, their number is its depth."""

    channels: Size
    in_channels: Size
    content_codebook_size: Size
    sampling_ratios: Annotated[tuple[Size, ...], Field(min_length=1)]
    f0_condition: Flag
    n_f0_bins: Size
    is_discrete: Off = False
    vector_quantize: Off = False


class DiTParams(_Section):
    """The diffusion transformer."""

    hidden_dim: Size
    num_heads: Size
    depth: Size
    class_dropout_prob: Probability
    in_channels: Size
    content_dim: Size
    content_codebook_size: Size
    final_layer_type: Literal["mlp", "wavenet"]
    style_condition: Flag
    style_as_token: Flag
    time_as_token: Flag
    uvit_skip_connection: Flag
    long_skip_connection: Flag
    f0_condition: Flag
    target: Literal["mel"] = "mel"
    content_type: Literal["discrete", "continuous"] = "discrete"
    is_causal: Off = False
    zero_prompt_speech_token: Off = False
    add_resblock_in_transformer: Off = False


class WavenetParams(_Section):
    """The WaveNet head; `kernel_size` is odd, so that a convolution keeps the length."""

    hidden_dim: Size
    num_layers: Size
    kernel_size: Size
    dilation_rate: Size
    p_dropout: Probability


class ModelParams(_Section):
    """The section `model_params`: everything that decides the shape of the network and its loss."""

    dit_type: Literal["DiT"]
    reg_loss_type: Literal["l1", "l2"]
    diffusion_type: Literal["flow"] = "flow"
    speech_tokenizer: SpeechTokenizer
    style_encoder: StyleEncoder
    length_regulator: LengthRegulatorParams
    dit: Annotated[DiTParams, Field(alias="DiT")]
    wavenet: WavenetParams | None = None

    @classmethod
    def parse(cls, params: ModelParams | Mapping[str, Any]) -> ModelParams:
        """Check a `model_params` mapping as it stands in a YAML; a `ModelParams` is returned unchanged.

        Raises:
            ConfigError: with every problem and its place, such as `model_params.DiT.depth: missing`.
        """
        return _checked(cls, params, model_conflicts, source="model_params", inside="model_params.")


class Config(_Section):
    """A run's YAML. Intervals count steps."""

    log_dir: str = "./runs"
    batch_size: Size
    log_interval: Size = 10
    save_interval: Size = 500
    epochs: Size = 1000
    pretrained_model: str | None = None
    preprocess_params: PreprocessParams
    model_params: ModelParams

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str = "config") -> Config:
        """Check a whole config given as a mapping; `source` is what the error calls it.

        Raises:
            ConfigError: with every problem and its place.
        """
        return _checked(cls, config, config_conflicts, source=source)


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check the YAML file at `path`.

    Raises:
        ConfigError: if the file is missing, not YAML, or not a config of a network that we train.
    """
    name = os.fspath(path)
    return parse_config(_read(name), name)


def parse_config(data: bytes, name: str) -> Config:
    """Check the contents of a YAML file, called `name` in what is said of it. Raises as `load_config` does."""
    content = _parse_yaml(data, name)
    if content is None:
        raise ConfigError(f"{name}: the file is empty, expected a Seed-VC config in YAML")
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ConfigError(f"{name}: expected a mapping with model_params and others, found a {kind}")
    return Config.parse(content, source=name)


def _read(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: no such config file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{name}: this is a folder, expected a YAML config file") from error
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error


def _parse_yaml(data: bytes, name: str) -> object:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content: object = yaml.load(data, Loader=loader)  # noqa: S506 - either loader is a safe one
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A date such as 2024-13-45 is a plain ValueError, deep nesting without libyaml a RecursionError.
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    return content


_Checked = TypeVar("_Checked", bound=_Section)


def _checked(
    kind: type[_Checked],
    raw: object,
    conflicts: Callable[[object], Iterable[tuple[str, str]]],
    source: str,
    inside: str = "",
) -> _Checked:
    problems: list[str] = []
    checked: _Checked | None = None
    try:
        checked = kind.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [f"{(inside + _place(e['loc'])).rstrip('.') or source}: {_what(e)}" for e in found]
    problems += [f"{inside}{place}: {what}" for place, what in conflicts(raw)]
    if checked is None or problems:
        raise ConfigError("\n  ".join([f"{source}: not a config that can be trained", *problems]))
    return checked


def _place(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _what(error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "model_type":
        return f"should be a mapping, found {error['input']!r:.80}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{error['msg'].removeprefix('Input ')}, found {error['input']!r:.80}"
