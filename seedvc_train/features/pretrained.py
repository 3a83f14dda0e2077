"""Speech encoders in the layout of ``transformers``: a folder, or a repository on Hugging Face's hub."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from seedvc_train.features import hub
from seedvc_train.features.weights import EncoderError, read_weights

__all__ = ["Pretrained", "is_repository", "known_width"]

_CONFIG = "config.json"
_EXTRACTOR = ("preprocessor_config.json", "processor_config.json")  # the second by transformers 5, with a tokenizer
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# The width of the models that Seed-VC's users name, from their repositories: no request is needed to see a misfit.
_WIDTHS = {
    "openai/whisper-tiny": 384,
    "openai/whisper-base": 512,
    "openai/whisper-small": 768,
    "openai/whisper-medium": 1024,
    "openai/whisper-large": 1280,
    "openai/whisper-large-v2": 1280,
    "openai/whisper-large-v3": 1280,
    "facebook/wav2vec2-xls-r-300m": 1024,
    "facebook/wav2vec2-xls-r-1b": 1280,
    "facebook/wav2vec2-xls-r-2b": 1920,
}


@dataclass(frozen=True)
class Pretrained:
    """The files of one pretrained model, all of one revision; nothing of them was loaded yet.

    Attributes:
        name: as it was asked for.
        config: the contents of its ``config.json``.
        extractor_folder: where the settings of its feature extractor are.
        weights: the path of its weights.
    """

    name: str
    config: dict[str, Any]
    extractor_folder: str
    weights: str

    @classmethod
    def find(cls, name: str, model_type: str, *, ask_hub: bool = True) -> Pretrained:
        """The files in the folder ``name``, or else in the hub's cache, or else, if ``ask_hub``, on the hub.

        Raises:
            EncoderError: a file is missing, the hub can't be reached, or it is a model of another type.
        """
        if os.path.isdir(name):
            config = _local(name, _CONFIG)
            extractor, weights = _local(name, *_EXTRACTOR), _local(name, *_WEIGHTS)
        elif not is_repository(name):
            raise EncoderError(f"{name}: no such folder")
        else:
            config = hub.fetch(name, _CONFIG, ask=ask_hub)
            revision = os.path.basename(os.path.dirname(config))  # the cache's folders are named by the commit
            extractor = hub.fetch(name, *_EXTRACTOR, revision=revision, ask=ask_hub)
            weights = hub.fetch(name, *_WEIGHTS, revision=revision, ask=ask_hub)
        settings = _read_config(config)
        if (found := settings.get("model_type")) != model_type:
            raise EncoderError(f"{name}: holds a model of type {found}, expected {model_type}")
        return cls(name, settings, os.path.dirname(extractor), weights)

    def parse_config(self, kind: Any) -> Any:
        """``config.json`` as this configuration class of ``transformers``."""
        from huggingface_hub.errors import StrictDataclassError

        try:
            return kind.from_dict(self.config)
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise EncoderError(f"{self.name}: {_CONFIG} describes no {kind.model_type} model: {error}") from error

    def extractor(self, kind: Any, sr: int) -> Any:
        """Its feature extractor, of this class of ``transformers``, for waves at ``sr`` Hz."""
        try:
            extractor = kind.from_pretrained(self.extractor_folder, local_files_only=True)
        except (OSError, TypeError, ValueError) as error:
            raise EncoderError(f"{self.name}: the settings of its feature extractor can't be read: {error}") from error
        if extractor.sampling_rate != sr:
            raise EncoderError(f"{self.name}: made for audio at {extractor.sampling_rate} Hz, expected {sr} Hz")
        return extractor

    def state(self, *prefixes: str) -> dict[str, Any]:
        """Its tensors by name; those below the first of ``prefixes`` that occurs, without it."""
        state = read_weights(self.weights)
        prefix = next((p for p in prefixes if any(name.startswith(p) for name in state)), "")
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def is_repository(name: str) -> bool:
    """Whether this is no folder here and could be a repository on the hub, by its name."""
    return not os.path.isdir(name) and not name.startswith(("/", ".", "~")) and name.count("/") <= 1


def known_width(name: str) -> int | None:
    """The numbers a frame of a pretrained model, where that can be told without asking the hub."""
    if name in _WIDTHS and is_repository(name):
        return _WIDTHS[name]
    config = os.path.join(name, _CONFIG) if os.path.isdir(name) else hub.cached(name, _CONFIG)
    if config is None or not os.path.isfile(config):
        return None
    settings = _read_config(config)
    width = settings.get("d_model", settings.get("hidden_size"))
    return width if isinstance(width, int) else None


def _local(folder: str, *names: str) -> str:
    for name in names:
        if os.path.isfile(path := os.path.join(folder, name)):
            return path
    if names == _WEIGHTS and os.path.isfile(os.path.join(folder, f"{_WEIGHTS[0]}.index.json")):
        raise EncoderError(f"{folder}: its weights are in several files; save them as one {_WEIGHTS[0]}")
    raise EncoderError(f"{folder}: has no {' or '.join(names)}; it should be a folder that save_pretrained wrote")


def _read_config(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path}: can't be read: {error}") from error
    if not isinstance(settings, dict):
        raise EncoderError(f"{path}: expected the settings of a model")
    return settings
