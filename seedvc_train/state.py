"""Everything that training changes, as one object; the only place that knows the keys of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR

from seedvc_train import randomness
from seedvc_train.optim import make_optimizers, make_schedulers
from seedvc_train.settings import Settings

__all__ = ["StateError", "TrainingState", "load_pretrained", "load_weights", "recorded_settings"]

_OURS = "seedvc_train"
_SHOWN = 10


class StateError(ValueError):
    """A checkpoint that does not fit the model or the optimisers of this run."""


@dataclass
class TrainingState:
    """What a run consists of between two steps.

    Attributes:
        model: ``cfm`` and ``length_regulator``.
        optimizers: One a module.
        schedulers: One an optimiser.
        step: Steps done.
        epoch: The epoch that is running, from 0.
        position: Batches of this epoch that are consumed.
        running_loss: Loss averaged with a weight of 0.99 on the past; None before the first step.
    """

    model: nn.ModuleDict
    optimizers: dict[str, AdamW]
    schedulers: dict[str, ExponentialLR]
    step: int = 0
    epoch: int = 0
    position: int = 0
    running_loss: float | None = None

    @classmethod
    def fresh(cls, model: nn.ModuleDict, lr: float) -> TrainingState:
        """A run at step 0."""
        optimizers = make_optimizers(model, lr)
        return cls(model, optimizers, make_schedulers(optimizers))

    def advance(self, loss: float) -> None:
        """Count a finished step."""
        self.step += 1
        self.position += 1
        self.running_loss = loss if self.running_loss is None else 0.99 * self.running_loss + 0.01 * loss

    def next_epoch(self) -> None:
        """Count a finished epoch."""
        self.epoch += 1
        self.position = 0

    def to_checkpoint(self, settings: Settings) -> dict[str, Any]:
        """The state to save: Seed-VC's own keys as its trainer writes them, ours under one key beside them.

        The tensors are live. No time of day is in it, so that equal runs give equal states.
        """
        return {
            "net": {name: module.state_dict() for name, module in self.model.items()},
            "optimizer": [(name, optimizer.state_dict()) for name, optimizer in self.optimizers.items()],
            "scheduler": [(name, scheduler.state_dict()) for name, scheduler in self.schedulers.items()],
            "iters": self.step,
            "epoch": self.epoch,
            _OURS: {
                "position": self.position,
                "running_loss": self.running_loss,
                "settings": settings.to_plain(),
                "random": randomness.capture(),
                "environment": self._environment(),
            },
        }

    def restore(self, checkpoint: dict[str, Any]) -> list[str]:
        """Take over a saved state, random generators last.

        Returns:
            In words, why the run may not go on bit for bit: what the checkpoint does not record, or what has changed
            in what computes the numbers. Empty for a checkpoint of this trainer, machine, torch and thread count.

        Raises:
            StateError: if it does not fit this model.
        """
        load_weights(self.model, checkpoint)
        missing = self._restore_optimizers(checkpoint)
        step, epoch = checkpoint.get("iters"), checkpoint.get("epoch")
        if type(step) is not int or type(epoch) is not int:
            raise StateError("it records no step and epoch ('iters', 'epoch'): it is no training checkpoint")
        self.step, self.epoch, self.position = step, epoch, 0
        ours = checkpoint.get(_OURS)
        if ours is None:
            missing += [
                f"not recorded: the position inside epoch {epoch}, which starts over",
                "not recorded: random states and the order of clips, which are drawn anew",
                "not recorded: the running loss, the settings and the data it was trained with",
            ]
            return missing
        self.position, self.running_loss = ours["position"], ours["running_loss"]
        randomness.restore(ours["random"])
        now = self._environment().items()
        changed = [f"{what}: {ours['environment'][what]} then, {value} now" for what, value in now
                   if ours["environment"][what] != value]  # fmt: skip
        return missing + [f"{line}, so the last bits may differ" for line in changed]

    def _environment(self) -> dict[str, Any]:
        """What computes the numbers."""
        device = next(self.model.parameters()).device.type
        return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "device": device}

    def _restore_optimizers(self, checkpoint: dict[str, Any]) -> list[str]:
        missing = []
        for key, kind, targets in (
            ("optimizer", "moments of the optimiser", self.optimizers),
            ("scheduler", "state of the learning rate", self.schedulers),
        ):
            saved = dict(checkpoint.get(key) or [])
            for name, target in targets.items():
                if name not in saved:
                    missing.append(f"not recorded: the {kind} of {name}, which starts anew")
                    continue
                try:
                    target.load_state_dict(saved[name])
                except (ValueError, KeyError) as error:
                    raise StateError(f"its {key} state of {name} does not fit: {error}") from error
        return missing


def load_weights(model: nn.ModuleDict, checkpoint: dict[str, Any]) -> None:
    """Copy the weights of ``net`` into the model; every name and shape has to fit.

    Raises:
        StateError: listing what does not fit; the model is unchanged then.
    """
    given, wanted = _net(checkpoint), model.state_dict()
    problems = [f"{name}: missing" for name in wanted if name not in given]
    problems += [f"{name}: not in the model" for name in given if name not in wanted]
    problems += _misfits(given, wanted)
    if problems:
        rest = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n  ".join(problems[:_SHOWN])
        raise StateError(f"its weights don't fit the model that the config describes:\n  {listed}{rest}")
    model.load_state_dict(given)


def load_pretrained(model: nn.ModuleDict, checkpoint: Any, name: str) -> list[str]:
    """Copy those weights of ``net`` that fit the model.

    Returns:
        In words, how many were loaded and what was not.

    Raises:
        StateError: if nothing fits.
    """
    given, wanted = _net(checkpoint), model.state_dict()
    fitting = {key: tensor for key, tensor in given.items() if key in wanted and tensor.shape == wanted[key].shape}
    if not fitting:
        raise StateError(
            f"{name} holds no weights that fit the model which the config describes ({len(given)} tensors there, "
            f"{len(wanted)} in the model): it belongs to another config"
        )
    model.load_state_dict(fitting, strict=False)
    report = [f"{len(fitting)} of the model's {len(wanted)} tensors loaded from {name}"]
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    for what, names in (
        ("missing there, left at their initial values", missing),
        ("not in the model, ignored", unexpected),
        ("of another shape, left at their initial values", _misfits(given, wanted)),
    ):
        if names:
            rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            report.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{rest}")
    return report


def _net(checkpoint: Any) -> dict[str, Any]:
    """The tensors of ``net`` under the names of the whole model, without the prefix of distributed training."""
    net = checkpoint.get("net") if isinstance(checkpoint, dict) else None
    if not isinstance(net, dict) or not all(isinstance(tensors, dict) for tensors in net.values()):
        raise StateError("it holds no weights ('net'): it is no checkpoint of Seed-VC's layout")
    return {
        f"{module}.{key.removeprefix('module.')}": tensor
        for module, tensors in net.items()
        for key, tensor in tensors.items()
    }


def _misfits(given: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {tuple(given[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]


def recorded_settings(checkpoint: dict[str, Any]) -> Settings | None:
    """The settings that a checkpoint of this trainer was made with."""
    ours = checkpoint.get(_OURS)
    return None if ours is None else Settings.from_plain(ours["settings"])
