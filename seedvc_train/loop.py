"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from seedvc_train.dataset import Batch
from seedvc_train.interruption import Interruption
from seedvc_train.metrics import MetricsLog
from seedvc_train.model import FlowMatching, draw_prompt_lens
from seedvc_train.model.dit import length_mask
from seedvc_train.optim import clip_gradients
from seedvc_train.progress import Progress
from seedvc_train.saving import Saving
from seedvc_train.settings import Settings
from seedvc_train.state import TrainingState

__all__ = ["Limits", "TrainingError", "train", "training_loss"]


class TrainingError(RuntimeError):
    """Training that can't go on."""


@dataclass(frozen=True)
class Limits:
    """When to stop, to save and to log, in steps (epochs for `max_epochs`)."""

    max_steps: int
    max_epochs: int
    save_every: int
    log_every: int


def train(
    state: TrainingState,
    batches: Callable[[int, int], Iterable[Batch]],
    saving: Saving,
    settings: Settings,
    limits: Limits,
    log: MetricsLog,
) -> int:
    """Train until a limit is reached or a signal asks to stop, saving as it goes; return the exit code.

    Args:
        state: Where to begin; ends as the last step left it.
        batches: The batches of an epoch from a position on.
        saving: Where checkpoints go; finished on return.
        settings: Saved with each of them.
        limits: When to stop, save and log.
        log: Where losses are written down.

    Raises:
        TrainingError: if the loss is not finite any more; nothing is saved then.
        CheckpointError: if a checkpoint can't be saved.
    """
    device = next(state.model.parameters()).device
    saved, stalled, since, logged = state.step, 0.0, time.monotonic(), state.step

    def save() -> None:
        nonlocal saved
        metrics = {} if state.running_loss is None else {"loss": state.running_loss}
        log.publish()
        saving.save(state.to_checkpoint(settings), state.step, state.epoch, metrics, settings.for_manifest())
        saved = state.step

    with (
        Interruption() as interruption,
        saving,
        log,
        Progress(state.step, limits.max_steps) as progress,
    ):
        while state.step < limits.max_steps and state.epoch < limits.max_epochs and not interruption.signal:
            for batch in batches(state.epoch, state.position):
                loss = training_loss(state.model, batch.to(device))
                if not math.isfinite(loss.item()):
                    raise TrainingError(_not_finite(loss.item(), state.step, saved))
                state.model.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                clip_gradients(state.model)
                for name, optimizer in state.optimizers.items():
                    optimizer.step()
                    state.schedulers[name].step()
                state.advance(loss.item())
                progress.step(loss.item(), saving.durable)
                if state.step % limits.log_every == 0:
                    waited, stalled = saving.seconds - stalled, saving.seconds
                    seconds = (time.monotonic() - since - waited) / (state.step - logged)
                    lr = state.optimizers["cfm"].param_groups[0]["lr"]
                    log.write(
                        step=state.step,
                        epoch=state.epoch,
                        loss=loss.item(),
                        running_loss=state.running_loss,
                        lr=lr,
                        seconds_per_step=round(seconds, 6),
                        seconds_stalled=round(waited, 6),
                    )
                    progress.logged(state.step, loss.item())
                    since, logged = time.monotonic(), state.step
                if state.step % limits.save_every == 0:
                    save()  # when the log has this step: a run that goes on from here lacks no line
                if state.step >= limits.max_steps or interruption.signal:
                    break
            else:
                state.next_epoch()
        if state.step > saved:
            save()
    return interruption.exit_code


def training_loss(model: nn.ModuleDict, batch: Batch) -> torch.Tensor:
    """The flow-matching loss of a batch, with content of the true voice in the prompt and of a shifted one after it."""
    regulate, cfm = model["length_regulator"], cast("FlowMatching", model["cfm"])
    prompt_lens = draw_prompt_lens(batch.mel_lens)
    true = regulate(batch.content, ylens=batch.mel_lens, f0=batch.f0)
    shifted = regulate(batch.shifted_content, ylens=batch.mel_lens, f0=batch.f0)
    in_prompt = length_mask(prompt_lens, true.shape[1])[..., None]
    cond = torch.where(in_prompt, true, shifted)
    return cfm.loss(batch.mel, batch.mel_lens, prompt_lens, cond, batch.style)


def _not_finite(loss: float, step: int, saved: int) -> str:
    return (
        f"the loss of step {step + 1} is {loss}; the weights are as step {step} left them and nothing was saved since "
        f"step {saved}. Lower --lr, or look for broken clips in the data"
    )
