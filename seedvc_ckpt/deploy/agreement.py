"""Where a config contradicts a file, or itself, in what a service sets up beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from seedvc_ckpt.deploy.loading import Shape
from seedvc_ckpt.manifest import Setting

__all__ = ["Remark", "contradictions", "flat"]

Settings = Mapping[str, Setting]

_SOUND = "preprocess_params."
_MEL = "preprocess_params.spect_params."
_TOKENIZER = "model_params.speech_tokenizer."
_F0 = ("model_params.DiT.f0_condition", "model_params.length_regulator.f0_condition")

_SECTIONS = (
    (_SOUND, "the sound's", "speech would come out at another pitch and speed"),
    (_MEL, "the mels'", "the service would give it mels that it never saw"),
    (_TOKENIZER, "the speech tokenizer's", "the service would give it content that it never heard"),
    ("model_params.style_encoder.", "the style encoder's", "the service would give it styles that it never heard"),
)
_OTHER_CONFIG = "use the config that the run was trained with"

# Length of a content feature, from the models' own configs (hidden size or d_model), by the last part of their names.
_CONTENT_DIMS = {
    "whisper-tiny": 384, "whisper-base": 512, "whisper-small": 768, "whisper-medium": 1024, "whisper-large": 1280,
    "whisper-large-v2": 1280, "whisper-large-v3": 1280, "whisper-large-v3-turbo": 1280,
    "wav2vec2-xls-r-300m": 1024, "wav2vec2-xls-r-1b": 1280, "wav2vec2-xls-r-2b": 1920, "wav2vec2-large-xlsr-53": 1024,
}  # fmt: skip
_STYLE_DIM = 192  # of the CAM++ that the services load, whatever the config says
_SAMPLE_RATES = {"22": 22050, "24": 24000, "44": 44100}
_BIGVGAN = re.compile(r"(?P<khz>\d+)khz_(?P<mels>\d+)band_(?:fmax\w+_)?(?P<hop>\d+)x$")
_HIFIGAN = (22050, 80, 256)  # the one vocoder of this type that the services load


class Remark(NamedTuple):
    """What was found, and what to do about it."""

    what: str
    remedy: str


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Setting]:
    """The plain values of a YAML by dotted names. The text "None", as Seed-VC writes it, is None."""
    found: dict[str, Setting] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found.update(flat(value, f"{name}."))
        elif value is None or isinstance(value, (str, bool, int, float)):
            found[name] = None if value == "None" else value
    return found


def contradictions(config: Settings, trained: Settings, given: Mapping[str, Shape]) -> Iterator[Remark]:
    """What of a config does not fit a file.

    Args:
        config: The plain values of the YAML.
        trained: Those that the file says it was trained with; empty where it says nothing.
        given: The shapes of the file's tensors.
    """
    yield from _of_settings(config, trained)
    if f"{_MEL}n_mels" not in trained:
        yield from _of_mels(config, given)
    yield from _of_pitch(config, trained, given)
    yield from _of_content(config, given)
    yield from _of_the_service(config)


def _of_settings(config: Settings, trained: Settings) -> Iterator[Remark]:
    differ = [name for name, then in trained.items() if not _same(name, then, config)]
    for section, what, harm in _SECTIONS:
        names = [name for name in differ if name.startswith(section) and not (section == _SOUND and _MEL in name)]
        if names:
            then, now = (
                ", ".join(f"{name.removeprefix(section)} {values.get(name, 'nothing')}" for name in names)
                for values in (trained, config)
            )
            yield Remark(f"the file was trained with {what} {then} and the config says {now}: {harm}", _OTHER_CONFIG)


def _same(name: str, then: Setting, config: Settings) -> bool:
    now = config.get(name)
    if name.endswith("campplus_path"):  # where a file lies
        return True
    if name == f"{_TOKENIZER}name":  # a folder and the hub may hold the same encoder
        return _last_part(now) == _last_part(then)
    if name == f"{_MEL}fmax":
        half = config.get(f"{_SOUND}sr")
        half = half / 2 if isinstance(half, (int, float)) else None
        return (half if now is None else now) == (half if then is None else then)
    return now == then


def _last_part(name: Setting) -> str:
    return re.split(r"[/\\]", str(name).rstrip("/\\"))[-1]


def _of_mels(config: Settings, given: Mapping[str, Shape]) -> Iterator[Remark]:
    shape = given.get("cfm.estimator.x_embedder.weight_v", ())
    bands = config.get(f"{_MEL}n_mels")
    if len(shape) == 2 and bands is not None and shape[1] != bands:
        yield Remark(
            f"the file's network makes mels of {shape[1]} bands and the config's have {bands} (spect_params.n_mels)",
            _OTHER_CONFIG,
        )


def _of_pitch(config: Settings, trained: Settings, given: Mapping[str, Shape]) -> Iterator[Remark]:
    has = "length_regulator.f0_embedding.weight" in given
    knows = has or any(name.startswith("length_regulator.") for name in given)
    says = next((trained[name] for name in _F0 if name in trained), has if knows else None)
    wants = any(config.get(name) is True for name in _F0)
    if says is True and not wants:
        yield Remark(
            "the file was trained with pitch and the config has f0_condition false: the service would leave the "
            "pitch out",
            "set f0_condition to true, or use the config that the run was trained with",
        )
    elif says is False and wants:
        yield Remark(
            "the file was trained without pitch and the config has f0_condition true: the service would add a pitch "
            "that it never learned",
            "set f0_condition to false, or use the config that the run was trained with",
        )


def _of_content(config: Settings, given: Mapping[str, Shape]) -> Iterator[Remark]:
    name = config.get(f"{_TOKENIZER}name")
    known = _CONTENT_DIMS.get(_last_part(name).lower().removesuffix(".en"))
    shape = given.get("length_regulator.content_in_proj.weight", ())
    wants = shape[1] if len(shape) == 2 else config.get("model_params.length_regulator.in_channels")
    if known is not None and wants is not None and wants != known:
        yield Remark(
            f"the file's network takes content features of {wants} numbers and those of the config's speech "
            f"tokenizer {name} have {known}",
            "name the tokenizer that the run was trained with",
        )


def _of_the_service(config: Settings) -> Iterator[Remark]:
    style = config.get("model_params.style_encoder.dim", _STYLE_DIM)
    if style != _STYLE_DIM:
        yield Remark(
            f"the config's style has {style} numbers and the services' speaker encoder gives {_STYLE_DIM}",
            f"train with style_encoder.dim {_STYLE_DIM}",
        )
    found = _vocoder(config)
    if found is None:
        return
    name, numbers = found
    places = (f"{_SOUND}sr", f"{_MEL}n_mels", f"{_MEL}hop_length")
    for place, wanted in zip(places, numbers, strict=True):
        if place in config and config[place] != wanted:
            yield Remark(
                f"the config's vocoder {name} needs {place} {wanted} and the config says {config[place]}: noise "
                "would come of the mels",
                "name the vocoder that belongs to these mels",
            )


def _vocoder(config: Settings) -> tuple[str, tuple[int, int, int]] | None:
    """The vocoder and the sample rate, bands and hop that it was made for, where they are known."""
    kind, name = config.get("model_params.vocoder.type"), str(config.get("model_params.vocoder.name"))
    if kind == "hifigan":
        return "hifigan", _HIFIGAN
    match = _BIGVGAN.search(name) if kind == "bigvgan" else None
    if match is None or match["khz"] not in _SAMPLE_RATES:
        return None
    return name, (_SAMPLE_RATES[match["khz"]], int(match["mels"]), int(match["hop"]))
