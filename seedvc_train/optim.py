"""Seed-VC's optimisers: one AdamW and one slowly falling learning rate for each trained module."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR

__all__ = ["LEARNING_RATE", "clip_gradients", "make_optimizers", "make_schedulers", "set_learning_rate"]

LEARNING_RATE = 1e-5
_DECAY_PER_STEP = 0.999996
_GRADIENT_NORM = 10.0


def make_optimizers(model: nn.ModuleDict, lr: float) -> dict[str, AdamW]:
    """One AdamW a module, with Seed-VC's numbers."""
    return {
        name: AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
        for name, module in model.items()
    }


def make_schedulers(optimizers: dict[str, AdamW]) -> dict[str, ExponentialLR]:
    """One scheduler an optimiser, stepped after every training step."""
    return {name: ExponentialLR(optimizer, _DECAY_PER_STEP) for name, optimizer in optimizers.items()}


def set_learning_rate(optimizers: dict[str, AdamW], schedulers: dict[str, ExponentialLR], lr: float) -> None:
    """Go on as if training had begun with `lr`: what has fallen since stays fallen in proportion."""
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] *= lr / group["initial_lr"]
            group["initial_lr"] = lr
        schedulers[name].base_lrs = [lr for _ in optimizer.param_groups]


def clip_gradients(model: nn.ModuleDict) -> None:
    """Scale each module's gradients to a norm of at most 10."""
    for module in model.values():
        torch.nn.utils.clip_grad_norm_(module.parameters(), _GRADIENT_NORM)
