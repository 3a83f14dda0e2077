"""States of the sizes that people train: the networks of Seed-VC's presets with AdamW, after one step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seedvc_train.config import Config
from seedvc_train.dataset import Batch
from seedvc_train.model import build_model
from seedvc_train.settings import Settings
from seedvc_train.state import TrainingState

__all__ = ["PRESETS", "checkpoint_of", "preset", "preset_config", "random_batch", "stacked"]

_FILE = Path(__file__).parent.parent / "tests" / "data" / "presets.json"
PRESETS = {
    "xlsr_tiny": "config_dit_mel_seed_uvit_xlsr_tiny.yml",
    "whisper_small_wavenet": "config_dit_mel_seed_uvit_whisper_small_wavenet.yml",
    "whisper_base_f0_44k": "config_dit_mel_seed_uvit_whisper_base_f0_44k.yml",
}


def preset(name: str, *, moments: bool = True) -> TrainingState:
    """The training state of a preset, after one step or (without moments) before any.

    ``whisper_small_wavenet`` has 103 million parameters.
    """
    config = preset_config(name)
    state = TrainingState.fresh(build_model(config.model_params), 1e-5)
    if moments:
        _make_moments(state.optimizers.values())
    return state


def preset_config(name: str) -> Config:
    """The config of a preset."""
    return Config.model_validate(json.loads(_FILE.read_text())[PRESETS[name]])


def _make_moments(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
        optimizer.zero_grad()


def checkpoint_of(training: TrainingState) -> dict[str, Any]:
    """What a trainer saves of it, but for a run's settings, which are a few numbers."""
    return training.to_checkpoint(Settings({}, {}))


def stacked(millions: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of about so many million parameters in 6-million blocks, with AdamW after one step."""
    blocks = max(1, round(millions * 1e6 / (12 * 720 * 720)))
    layers = [nn.Linear(720, 720) for _ in range(12 * blocks)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    _make_moments([optimizer])
    return model, optimizer


def random_batch(frames: int = 120, seconds: float = 2.0) -> Batch:
    """One clip of noise, shaped for ``whisper_small_wavenet``."""
    content = torch.randn(1, round(50 * seconds), 768)
    lens = torch.tensor([frames])
    return Batch(torch.randn(1, 80, frames), lens, content, content.roll(1), torch.tensor([content.shape[1]]),
                 torch.randn(1, 192), None)  # fmt: skip
