"""The weights that a new run starts from, taken from a file or from another run, with a report of what fitted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.file import CheckpointFile
from seedvc_train.state import TrainingState
from seedvc_train.weights import StateError, flat, misfits, weights_of

__all__ = ["Pretrained", "load_pretrained"]

_SHOWN = 10
_FILES = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class Pretrained:
    """Where they come from.

    Attributes:
        location: A file, or a run whose newest intact checkpoint is meant, as a path or URL.
        which: "net", or "ema" for the averaged weights beside it.
    """

    location: str
    which: str = "net"

    def load_into(self, state: TrainingState, say: Callable[[str], None]) -> None:
        """Load what fits into the model of a state at step 0, and report it to `say`, a line at a time.

        Raises:
            StateError: if nothing fits, or it holds no such weights.
            CheckpointError: if it can't be read.
        """
        name, checkpoint = self._read(say)
        try:
            report = load_pretrained(state.model, checkpoint, self.which)
        except StateError as error:
            raise StateError(f"can't start from {name}: {error}") from None
        if state.ema is not None:
            state.ema.restart()
        say(f"weights ({self.which}) of {name}")
        for line in report:
            say(f"  {line}")

    def _read(self, say: Callable[[str], None]) -> tuple[str, Any]:
        if not os.path.isdir(self.location) and ("://" not in self.location or self.location.endswith(_FILES)):
            return self.location, CheckpointFile.at(self.location).load()
        with CheckpointStore(self.location, read_only=True) as run:
            found = run.resume()
        if found is None:
            raise StateError(f"there is no checkpoint in {self.location} to start from: name a file")
        for info, reason in found.rejected:
            say(f"passed over {info.name} in {self.location}, it is damaged: {reason}")
        return f"{found.info.name} in {self.location}", found.state


def load_pretrained(model: nn.ModuleDict, checkpoint: Any, which: str = "net") -> list[str]:
    """Copy those weights that fit the model.

    Args:
        model: Changed in place.
        checkpoint: As it was loaded.
        which: "net" or "ema".

    Returns:
        A table of how many were loaded and what was not, in lines of at most 80 columns where names allow it.

    Raises:
        StateError: if no parameter fits; the model is unchanged then.
    """
    given, wanted = flat(weights_of(checkpoint, which)), model.state_dict()
    fitting = {name: tensor for name, tensor in given.items() if name in wanted and tensor.shape == wanted[name].shape}
    trained = {name: parameter.numel() for name, parameter in model.named_parameters()}
    share = sum(trained.get(name, 0) for name in fitting) / sum(trained.values())
    if not share:
        raise StateError(
            f"it holds no weights that fit the model which the config describes ({len(given)} tensors there, "
            f"{len(wanted)} in the model): it belongs to another config"
        )
    model.load_state_dict(fitting, strict=False)
    table = [
        ("loaded", f"of the model's {len(wanted)} tensors: {_percent(share)} of its weights", list(fitting)),
        ("missing", "left at their initial values", [name for name in wanted if name not in given]),
        ("mismatched", "of another shape, left at their initial values", misfits(given, wanted, "\n      ")),
        ("unexpected", "not in the model, ignored", [name for name in given if name not in wanted]),
    ]
    lines = [f"{what:<10} {len(names):>5}  {meaning}" for what, meaning, names in table]
    for what, _, names in table[1:]:
        if names:
            rest = [f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            lines += [f"{what}:", *(f"  {name}" for name in names[:_SHOWN]), *rest]
    if which == "net" and "ema" in checkpoint:
        lines.append("it has averaged weights too: --pretrained-weights ema takes those")
    return lines


def _percent(share: float) -> str:
    """A share that is called 100 % or 0 % only where it is."""
    return "all" if share == 1 else f"{min(99.9, max(0.1, 100 * share)):.1f} %"
