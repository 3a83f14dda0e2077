"""Numbers of a config that are right one by one and impossible together.

Everything is looked up in the raw mapping and skipped where it is missing or of the wrong type, so that a
conflict is reported in the same message as an unrelated missing number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

__all__ = ["config_conflicts", "model_conflicts"]

Conflicts = Iterator[tuple[str, str]]
_Kind = TypeVar("_Kind", int, bool, str, float)


def _found(raw: object, kind: type[_Kind], *path: str) -> _Kind | None:
    for name in path:
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return raw if type(raw) is kind else None


def _size(raw: object, *path: str) -> int | None:
    size = _found(raw, int, *path)
    return size if size is not None and size > 0 else None


def _number(raw: object, *path: str) -> float | None:
    whole = _found(raw, int, *path)
    return _found(raw, float, *path) if whole is None else whole


def config_conflicts(raw: object) -> Conflicts:
    """Conflicts of a whole config, as pairs of a place and what is wrong there."""
    yield from _spect_conflicts(raw)
    model = raw.get("model_params") if isinstance(raw, Mapping) else None
    yield from ((f"model_params.{place}", what) for place, what in model_conflicts(model))
    mels = _size(raw, "preprocess_params", "spect_params", "n_mels")
    channels = _size(model, "DiT", "in_channels")
    if mels and channels and mels != channels:
        yield "model_params.DiT.in_channels", f"{channels} does not equal spect_params.n_mels {mels}"


def _spect_conflicts(raw: object) -> Conflicts:
    spect = "preprocess_params.spect_params"
    n_fft = _size(raw, *spect.split("."), "n_fft")
    for name in ("win_length", "hop_length"):
        length = _size(raw, *spect.split("."), name)
        if n_fft and length and length > n_fft:
            yield f"{spect}.{name}", f"{length} is larger than n_fft {n_fft}"
    rate = _size(raw, "preprocess_params", "sr")
    low, high = (_number(raw, *spect.split("."), end) for end in ("fmin", "fmax"))
    top = high if high is not None else rate and rate / 2
    if low is not None and top is not None and low >= top:
        yield f"{spect}.fmin", f"{low} Hz leaves no band below {top} Hz"
    if high is not None and rate and high > rate / 2:
        yield f"{spect}.fmax", f"{high} Hz is above half the sampling rate, {rate / 2} Hz"


def model_conflicts(raw: object) -> Conflicts:
    """Conflicts of the section `model_params`, places relative to it."""
    yield from _head_conflicts(raw)
    yield from _wavenet_conflicts(raw)
    channels = _size(raw, "length_regulator", "channels")
    content = _size(raw, "DiT", "content_dim")
    if channels and content and channels != content:
        yield "length_regulator.channels", f"{channels} does not equal DiT.content_dim {content}"
    f0 = _found(raw, bool, "length_regulator", "f0_condition")
    dit_f0 = _found(raw, bool, "DiT", "f0_condition")
    if f0 is not None and dit_f0 is not None and f0 != dit_f0:
        yield "length_regulator.f0_condition", f"{f0} does not equal DiT.f0_condition {dit_f0}"
    bins = _size(raw, "length_regulator", "n_f0_bins")
    if f0 and bins == 1:
        yield "length_regulator.n_f0_bins", "1 leaves no bin for a voiced frame, at least 2 are needed"
    if _found(raw, str, "speech_tokenizer", "type") == "xlsr":
        section = raw["speech_tokenizer"] if isinstance(raw, Mapping) else {}
        if section.get("output_layer") is None:
            yield "speech_tokenizer.output_layer", "missing, and speech_tokenizer.type is xlsr"


def _head_conflicts(raw: object) -> Conflicts:
    hidden = _size(raw, "DiT", "hidden_dim")
    heads = _size(raw, "DiT", "num_heads")
    if not hidden or not heads:
        return
    if hidden % heads:
        yield "DiT.num_heads", f"{heads} does not divide hidden_dim {hidden}"
    elif hidden // heads % 2:
        yield "DiT.num_heads", f"head size {hidden} / {heads} is odd, rotary embedding needs it even"


def _wavenet_conflicts(raw: object) -> Conflicts:
    if not isinstance(raw, Mapping):
        return
    kernel = _size(raw, "wavenet", "kernel_size")
    if kernel and kernel % 2 == 0:
        yield "wavenet.kernel_size", f"{kernel} is even, an odd one is needed to keep the length"
    if _found(raw, str, "DiT", "final_layer_type") != "wavenet":
        return
    if raw.get("wavenet") is None:
        yield "wavenet", "missing, and DiT.final_layer_type is wavenet"
    width, hidden = _size(raw, "wavenet", "hidden_dim"), _size(raw, "DiT", "hidden_dim")
    if width and hidden and width != hidden:
        yield "wavenet.hidden_dim", f"{width} does not equal DiT.hidden_dim {hidden}"
