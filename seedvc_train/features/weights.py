"""Weights that others trained: read without running anything in them, and named by their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from seedvc_ckpt.errors import CheckpointError
from seedvc_ckpt.file import CheckpointFile

__all__ = ["EncoderError", "build_empty", "digest", "fill", "read_weights", "require"]

_SHOWN = 3
_Module = TypeVar("_Module", bound=nn.Module)


class EncoderError(ValueError):
    """A frozen encoder that is missing or not what it should be; the message says what and what to do."""


def require(module: str, package: str) -> None:
    """See that a package that only the encoders need is installed.

    Raises:
        EncoderError: it is not.
    """
    if find_spec(module) is None:
        raise EncoderError(f"{package} is not installed: run pip install 'seedvc-ckpt[encoders]'")


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file, or of one that ``torch.save`` wrote, by their names.

    The latter is read by the pickle reader of `seedvc_ckpt`, which builds plain data and tensors only.

    Raises:
        EncoderError: the file is missing, damaged, of another kind, or asks for more than that.
    """
    try:
        if path.endswith(".safetensors"):
            return dict(load_file(path))
        state = CheckpointFile.at(path).load()
    except (CheckpointError, OSError) as error:
        raise EncoderError(str(error)) from error
    except SafetensorError as error:
        raise EncoderError(f"{path}: not an intact safetensors file: {error}; download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise EncoderError(f"{path}: expected tensors by name, as a state dict holds them")
    return {str(name): value for name, value in state.items()}


def build_empty(build: Callable[[], _Module]) -> _Module:
    """A module without memory for its weights, for `fill`; torch's global generator stays as it is."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build()


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], path: str, *, strict: bool = True) -> None:
    """Give a module of `build_empty` its weights, as float32, and freeze it.

    Args:
        module: changed in place; every tensor of its state dict must be in ``state``.
        state: tensors by the module's names; with ``strict`` no others.
        path: what errors call the file.
        strict: whether tensors that the module does not know are an error.

    Raises:
        EncoderError: naming what is missing, of another shape, or unknown.
    """
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    try:
        unfit = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1 : 1 + _SHOWN])
        raise EncoderError(f"{path}: does not fit a {type(module).__name__}: {reason}") from error
    unknown = unfit.unexpected_keys if strict else []
    for what, names in (("lacks", unfit.missing_keys), ("holds also", unknown)):
        if names:
            rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise EncoderError(
                f"{path}: not the weights of a {type(module).__name__}: it {what} {', '.join(names[:_SHOWN])}{rest}"
            )
    module.requires_grad_(requires_grad=False).eval()


def digest(module: nn.Module) -> str:
    """Sixteen hex digits that stand for the names, shapes and bytes of a module's tensors (BLAKE2b)."""
    hashed = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {values.dtype} {list(values.shape)}\0".encode())
        hashed.update(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
    return hashed.hexdigest()
