"""Seed-VC's optimisers: one AdamW and one slowly falling learning rate for each trained module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR

__all__ = ["LEARNING_RATE", "clip_gradients", "make_optimizers", "make_schedulers", "set_learning_rate"]

LEARNING_RATE = 1e-5
_DECAY_PER_STEP = 0.999996
_GRADIENT_NORM = 10.0


def make_optimizers(model: nn.ModuleDict, lr: float) -> dict[str, AdamW]:
    """One AdamW a module, with Seed-VC's numbers, in torch's fused form, which all our devices have."""
    optimizers = {
        name: AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)
        for name, module in model.items()
    }
    for optimizer in optimizers.values():
        optimizer.register_load_state_dict_pre_hook(_stay_fused)
    return optimizers


def _stay_fused(_optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    # else a state that another form wrote, such as Seed-VC's own, would switch the form and so the last bits
    groups = [{**group, "fused": True, "foreach": None} for group in saved["param_groups"]]
    return {**saved, "param_groups": groups}


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


def clip_gradients(model: nn.ModuleDict) -> bool:
    """Scale each module's gradients to a norm of at most 10; return whether they are finite."""
    norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), _GRADIENT_NORM) for module in model.values()]
    return math.isfinite(sum(norms))
