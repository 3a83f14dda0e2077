"""Which front end a run listens with, by its YAML and what is on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from seedvc_train.features import hub
from seedvc_train.features.builtin import BuiltinFrontEnd
from seedvc_train.features.pretrained import Pretrained, is_repository, known_width
from seedvc_train.features.weights import EncoderError, require

if TYPE_CHECKING:
    import torch

    from seedvc_train.config import Config, ModelParams, SpeechTokenizer
    from seedvc_train.features import FrontEnd
    from seedvc_train.features.seedvc import ContentEncoder

__all__ = ["EncoderOptions", "choose_front_end"]

_STYLE_DIM = 192
_CAMPPLUS_REPO, _CAMPPLUS = "funasr/campplus", "campplus_cn_common.bin"
_HUB = "https://huggingface.co"
_MODEL_TYPES = {"whisper": "whisper", "xlsr": "wav2vec2"}
_PACKAGES = {  # by their modules
    "transformers": "transformers",
    "kaldi_native_fbank": "kaldi-native-fbank",
    "pyworld": "pyworld-prebuilt",
    "swift_f0": "swift-f0",
}
_CONSEQUENCES = (
    "A model trained on built-in features can't convert voices in Seed-VC's services.",
    "--features builtin takes them without these lines; with --features seedvc this is an error.",
)


@dataclass(frozen=True)
class EncoderOptions:
    """What the command line says about front ends.

    Attributes:
        features: "seedvc" for the YAML's encoders, "builtin" for those without weights, "auto" for the first where
            they are here.
        content_encoder: a folder or a repository of the hub, in place of the YAML's `speech_tokenizer.name`.
        campplus: the file ``campplus_cn_common.bin``.
        rmvpe: the file ``rmvpe.onnx``.
    """

    features: Literal["auto", "seedvc", "builtin"] = "auto"
    content_encoder: str | None = None
    campplus: str | None = None
    rmvpe: str | None = None

    @property
    def named(self) -> list[str]:
        """The options by which encoders were named."""
        named = {"--content-encoder": self.content_encoder, "--campplus": self.campplus, "--rmvpe": self.rmvpe}
        return [option for option, value in named.items() if value is not None]


def choose_front_end(
    config: Config, folder: str, options: EncoderOptions, device: torch.device | str, say: Callable[[str], None]
) -> FrontEnd:
    """Load the encoders that the YAML names, or take the built-in front end.

    What can be told without the hub is looked at first, and the hub is asked at most once for what isn't there.

    Args:
        config: the run's YAML.
        folder: where the YAML lies; `campplus_path` may be beside it.
        options: with "auto", missing encoders are an error only where one was named.
        device: where the encoders run.
        say: called with what is missing, a line at a time, before the built-in front end is taken instead.

    Raises:
        EncoderError: options contradict each other or the YAML, or encoders that were asked for can't be loaded.
    """
    params = config.model_params
    _check(options, params)
    builtin = BuiltinFrontEnd(params.length_regulator.in_channels, params.style_encoder.dim)
    if options.features == "builtin":
        return builtin
    try:
        return _seedvc(params, folder, options, device)
    except EncoderError as error:
        problems = str(error).splitlines()
        if options.features == "seedvc" or options.named:
            raise EncoderError(
                "\n  ".join(["the encoders that Seed-VC listens with can't be used:", *problems])
            ) from error
    say("training on built-in features, since the encoders that the YAML names can't be used:")
    for line in (*problems, *_CONSEQUENCES):
        say(f"  {line}")
    return builtin


def _check(options: EncoderOptions, params: ModelParams) -> None:
    if options.features == "builtin" and options.named:
        raise EncoderError(f"{options.named[0]} has no effect with --features builtin: leave one of them out")
    if options.rmvpe is not None and not params.length_regulator.f0_condition:
        raise EncoderError("--rmvpe has no effect with this YAML, whose f0_condition is false: leave it out")


def _seedvc(params: ModelParams, folder: str, options: EncoderOptions, device: torch.device | str) -> FrontEnd:
    content = options.content_encoder or params.speech_tokenizer.name
    problems = [*_misfits(params, content), *_packages()]
    campplus = ""
    if not problems:
        try:
            campplus = _find_campplus(options.campplus, params.style_encoder.campplus_path or _CAMPPLUS, folder)
        except EncoderError as error:
            problems.append(str(error))
        try:  # once the hub did not answer, it is not asked again
            _find_content(content, params.speech_tokenizer.type, ask_hub=not problems)
        except EncoderError as error:
            problems.append(str(error))
    if problems:
        raise EncoderError("\n".join(problems))
    from seedvc_train.features.campplus import CampplusEncoder
    from seedvc_train.features.pitch import pitch_estimator
    from seedvc_train.features.seedvc import SeedVCFrontEnd

    pitch = pitch_estimator(options.rmvpe) if params.length_regulator.f0_condition else None
    style = CampplusEncoder(campplus, device)
    encoder = _content_encoder(content, params.speech_tokenizer, device)
    if encoder.dim != params.length_regulator.in_channels:
        raise EncoderError(_misfit(params, content, encoder.dim))
    return SeedVCFrontEnd(encoder, style, pitch)


def _misfits(params: ModelParams, content: str) -> Iterator[str]:
    width = known_width(content)
    if width is not None and width != params.length_regulator.in_channels:
        yield _misfit(params, content, width)
    if (dim := params.style_encoder.dim) != _STYLE_DIM:
        yield f"style_encoder.dim is {dim}, but CAM++ gives {_STYLE_DIM} numbers"


def _misfit(params: ModelParams, content: str, width: int) -> str:
    return f"length_regulator.in_channels is {params.length_regulator.in_channels}, but {content} gives {width} numbers"


def _packages() -> Iterator[str]:
    for module, package in _PACKAGES.items():
        try:
            require(module, package)
        except EncoderError as error:
            yield str(error)


def _find_campplus(option: str | None, named: str, folder: str) -> str:
    if option is not None:
        if os.path.isfile(option):
            return option
        raise EncoderError(f"--campplus {option}: no such file")
    for path in (named, os.path.join(folder, named)):
        if os.path.isfile(path):
            return path
    try:
        return hub.fetch(_CAMPPLUS_REPO, _CAMPPLUS)
    except EncoderError as error:
        address = f"{_HUB}/{_CAMPPLUS_REPO}/resolve/main/{_CAMPPLUS}"
        raise EncoderError(f"{error}\n  download {address} and name the file with --campplus PATH") from error


def _find_content(name: str, kind: str, *, ask_hub: bool) -> None:
    """See that the files of the content encoder are on this machine, or bring them."""
    try:
        Pretrained.find(name, _MODEL_TYPES[kind], ask_hub=ask_hub)
    except EncoderError as error:
        if not is_repository(name):
            raise
        how = f"hf download {name} --local-dir DIR, or by hand from {_HUB}/{name}"
        raise EncoderError(
            f"there is no folder {name} here, and {error}\n  download it: {how}; then name its folder with "
            "--content-encoder DIR"
        ) from error


def _content_encoder(name: str, tokenizer: SpeechTokenizer, device: torch.device | str) -> ContentEncoder:
    if tokenizer.type == "whisper":
        from seedvc_train.features.whisper import WhisperEncoder

        return WhisperEncoder(name, device)
    from seedvc_train.features.xlsr import XlsrEncoder

    return XlsrEncoder(name, tokenizer.output_layer, device)
