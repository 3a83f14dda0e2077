"""Where the numbers are computed. But for random states, all lines that only a CUDA or MPS device runs are here.

No test has run those: there was no such device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from seedvc_ckpt.threads import available_cores
from seedvc_train.model.flow_matching import FlowMatching

__all__ = [
    "DeviceError",
    "compile_model",
    "compiler_errors",
    "find_device",
    "listeners",
    "prepare_device",
    "wants_pinned_memory",
]

_COMPILER = "inductor"
_MOST_LISTENERS = 8  # clips that are heard at once; each takes up to 1 GB


class DeviceError(ValueError):
    """A device, or a property of one, that this machine or this build of torch does not have."""


def find_device(name: str | None, gpu: int | None = None) -> torch.device:
    """The device that is asked for.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None or ``auto`` for a GPU where there is one.
        gpu: Which CUDA device None and ``auto`` mean.

    Raises:
        DeviceError: if there is no such device.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        name = f"cuda:{gpu}" if name == "cuda" and gpu is not None else name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"--device {name}: there is no such device; use cpu, cuda, cuda:N or mps") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type):
        raise DeviceError(f"--device {name}: this machine or this build of torch has none; use --device cpu")
    return device


def prepare_device(device: torch.device, *, tf32: bool) -> None:
    """Make a CUDA device give the same numbers for the same inputs, and say how it multiplies float32.

    Args:
        device: The one to train on.
        tf32: Let matrix products and convolutions round their float32 inputs to 10 bits of mantissa (TF32), which
            tensor cores multiply several times as fast. Without it they don't, torch's convolutions included.

    Raises:
        DeviceError: for TF32 on another device than CUDA.
    """
    if device.type != "cuda":
        if tf32:
            raise DeviceError(f"--tf32 is a mode of CUDA devices, and this run is on {device}: leave it out")
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]


def wants_pinned_memory(device: torch.device) -> bool:
    """Whether batches reach the device without holding up training if they lie in page-locked memory."""
    return device.type == "cuda"


def compile_model(model: nn.ModuleDict) -> None:
    """Have the transformer compiled when it first runs, in place: names in the state dict stay.

    The WaveNet is left alone: torch 2.13's inductor compiles it anew for every length of mel, until torch gives it up.
    """
    transformer = cast("FlowMatching", model["cfm"]).estimator.transformer
    transformer.compile(backend=_COMPILER, dynamic=True)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """In it, what a compiler can't do is told as a `DeviceError`."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"--compile: torch can't compile the model here: {reason}\nLeave --compile out") from error


def listeners(device: torch.device) -> int:
    """How many threads hear clips at the same time on a device."""
    return min(available_cores(), _MOST_LISTENERS) if device.type == "cpu" else 2  # one decodes, one encodes
