"""Everything that training changes, as one object; the only place that knows the keys of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from seedvc_train import randomness
from seedvc_train.ema import Ema
from seedvc_train.optim import clip_gradients, make_optimizers, make_schedulers
from seedvc_train.precision import Precision
from seedvc_train.settings import Settings
from seedvc_train.weights import StateError, load_weights, weights_of

__all__ = ["StateError", "TrainingState", "recorded_settings"]

_OURS = "seedvc_train"


@dataclass
class TrainingState:
    """What a run consists of between two steps.

    Attributes:
        model: ``cfm`` and ``length_regulator``.
        optimizers: One a module.
        schedulers: One an optimiser.
        precision: How the forward pass computes.
        ema: The averaged weights, where they are wanted.
        compiled: Whether the model is compiled, which changes the last bits.
        step: Steps done.
        epoch: The epoch that is running, from 0.
        position: Batches of this epoch that are consumed.
        running_loss: Loss averaged with a weight of 0.99 on the past; None before the first step.
    """

    model: nn.ModuleDict
    optimizers: dict[str, AdamW]
    schedulers: dict[str, ExponentialLR]
    precision: Precision
    ema: Ema | None = None
    compiled: bool = False
    step: int = 0
    epoch: int = 0
    position: int = 0
    running_loss: float | None = None

    @classmethod
    def fresh(
        cls,
        model: nn.ModuleDict,
        lr: float,
        *,
        precision: str = "fp32",
        ema_decay: float | None = None,
        compiled: bool = False,
    ) -> TrainingState:
        """A run at step 0, of a model on the device where it is trained."""
        optimizers = make_optimizers(model, lr)
        computing = Precision(precision, next(model.parameters()).device)
        ema = None if ema_decay is None else Ema(model, ema_decay)
        return cls(model, optimizers, make_schedulers(optimizers), computing, ema, compiled)

    @property
    def changed_by(self) -> Mapping[Optimizer, list[Tensor]]:
        """Each optimiser, and what else changes with its step alone: the averages of its module."""
        averages = {} if self.ema is None else self.ema.averages
        return {optimizer: list(averages.get(name, {}).values()) for name, optimizer in self.optimizers.items()}

    def apply_gradients(self) -> bool:
        """Clip the gradients and let the optimisers step.

        Returns:
            False if the gradients are not finite: then only the loss scale of fp16 has changed.
        """
        scaler = self.precision.scaler
        for optimizer in self.optimizers.values():
            scaler.unscale_(optimizer)
        finite = clip_gradients(self.model)
        if finite:
            for name, optimizer in self.optimizers.items():
                optimizer.step()
                self.schedulers[name].step()
            if self.ema is not None:
                self.ema.update()
        scaler.update()
        return finite

    def advance(self, loss: float, batches: int) -> None:
        """Count a finished step."""
        self.step += 1
        self.position += batches
        self.running_loss = loss if self.running_loss is None else 0.99 * self.running_loss + 0.01 * loss

    def next_epoch(self) -> None:
        """Count a finished epoch."""
        self.epoch += 1
        self.position = 0

    def to_checkpoint(self, settings: Settings) -> dict[str, Any]:
        """The state to save: Seed-VC's own keys as its trainer writes them, ours under one key beside them.

        The tensors are live. No time of day is in it, so that equal runs give equal states.
        """
        averaged = {} if self.ema is None else {"ema": self.ema.to_checkpoint()}
        return {
            "net": {name: module.state_dict() for name, module in self.model.items()},
            "optimizer": [(name, optimizer.state_dict()) for name, optimizer in self.optimizers.items()],
            "scheduler": [(name, scheduler.state_dict()) for name, scheduler in self.schedulers.items()],
            "iters": self.step,
            "epoch": self.epoch,
            **averaged,
            _OURS: {
                "position": self.position,
                "running_loss": self.running_loss,
                "loss_scale": self.precision.scaler.state_dict(),
                "averaged_updates": 0 if self.ema is None else self.ema.updates,
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
        ours = checkpoint.get(_OURS)
        missing = self._restore_optimizers(checkpoint)
        missing += self._restore_averages(checkpoint, ours)
        step, epoch = checkpoint.get("iters"), checkpoint.get("epoch")
        if type(step) is not int or type(epoch) is not int:
            raise StateError("it records no step and epoch ('iters', 'epoch'): it is no training checkpoint")
        self.step, self.epoch, self.position = step, epoch, 0
        if ours is None:
            missing += [
                f"not recorded: the position inside epoch {epoch}, which starts over",
                "not recorded: random states and the order of clips, which are drawn anew",
                "not recorded: the running loss, the settings and the data it was trained with",
            ]
            return missing
        self.position, self.running_loss = ours["position"], ours["running_loss"]
        if ours.get("loss_scale") and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(ours["loss_scale"])
        randomness.restore(ours["random"])
        then, now = ours["environment"], self._environment()
        changed = [f"{what}: {then[what]} then, {now[what]} now" for what in then if then[what] != now[what]]
        return missing + [f"{line}, so the last bits may differ" for line in changed]

    def _environment(self) -> dict[str, Any]:
        """What computes the numbers."""
        device = next(self.model.parameters()).device.type
        threads = torch.get_num_threads()
        return {"torch": str(torch.__version__), "threads": threads, "device": device, "compiled": self.compiled}

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

    def _restore_averages(self, checkpoint: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
        if self.ema is None:
            return []
        if "ema" not in checkpoint:
            self.ema.restart()
            return ["not recorded: averaged weights, which begin with the weights as they are now"]
        self.ema.restore(weights_of(checkpoint, "ema"), ours.get("averaged_updates", 0) if ours else 0)
        return []


def recorded_settings(checkpoint: dict[str, Any]) -> Settings | None:
    """The settings that a checkpoint of this trainer was made with."""
    ours = checkpoint.get(_OURS)
    return None if ours is None else Settings.from_plain(ours["settings"])
