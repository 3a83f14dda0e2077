"""The features of one clip as one safetensors file, which tells by itself whether it is whole and whose it is.

safetensors has no checksums and knows nothing of origins. The file's metadata therefore hold, under one key (several
would be written in any order), the *recipe* that the features came from and a CRC-32 for each tensor, over its name,
its shape and its bytes. Their type is float32. What was changed in the header then fits no CRC or no recipe.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

__all__ = ["DamagedFeaturesError", "as_bytes", "check", "read"]

_KEY = "seedvc_features"


class DamagedFeaturesError(ValueError):
    """A file of features is missing, damaged, or was made from something else."""


def as_bytes(tensors: Mapping[str, torch.Tensor], recipe: str) -> bytes:
    """A file of float32 tensors on the CPU; the same tensors and recipe always give the same bytes."""
    crcs = {name: _crc(name, tensor) for name, tensor in sorted(tensors.items())}
    described = json.dumps({"recipe": recipe, "crc32": crcs})
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {_KEY: described})


def check(path: str, recipe: str) -> None:
    """Look at a file's header and length, not at the tensors.

    Raises:
        DamagedFeaturesError: they are not those of a whole file made by this recipe.
    """
    read(path, recipe, ())


def read(path: str, recipe: str, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Read tensors, each checked to the last byte; their memory is that of the mapped file.

    Args:
        path: the file.
        recipe: what it should have been made from.
        names: which tensors, of those that are there; None for all.

    Raises:
        DamagedFeaturesError: the file is missing, not whole, damaged in what is read, or made by another recipe.
    """
    try:
        with safe_open(path, framework="pt") as file:
            crcs = _described(file.metadata(), recipe)
            if sorted(crcs) != sorted(file.keys()):
                raise DamagedFeaturesError("does not hold the tensors that it lists")
            found = {name: file.get_tensor(name) for name in crcs if names is None or name in names}
        for name, tensor in found.items():
            if tensor.dtype != torch.float32 or _crc(name, tensor) != crcs[name]:
                raise DamagedFeaturesError(f"{name} is damaged: its CRC-32 differs")
    except FileNotFoundError:
        raise DamagedFeaturesError(f"{path} is missing") from None
    except DamagedFeaturesError as error:
        raise DamagedFeaturesError(f"{path} {error}") from None
    except (SafetensorError, OSError) as error:
        raise DamagedFeaturesError(f"{path} can't be read: {error}") from error
    return found


def _described(metadata: Mapping[str, str] | None, recipe: str) -> dict[str, Any]:
    try:
        found = json.loads((metadata or {})[_KEY])
        of, crcs = found["recipe"], dict(found["crc32"])
    except (KeyError, TypeError, ValueError):
        raise DamagedFeaturesError("is no file of features, or its header is damaged") from None
    if of != recipe:
        raise DamagedFeaturesError("was made from another clip, with other settings, or its header is damaged")
    return crcs


def _crc(name: str, tensor: torch.Tensor) -> int:
    described = zlib.crc32(f"{name} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.contiguous().numpy().data, described)
