"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from torch import nn

from seedvc_train.dataset import Batch
from seedvc_train.interruption import Interruption
from seedvc_train.metrics import MetricsLog
from seedvc_train.model import FlowMatching, draw_prompt_lens
from seedvc_train.model.dit import length_mask
from seedvc_train.progress import Progress
from seedvc_train.saving import Saving
from seedvc_train.settings import Settings
from seedvc_train.state import TrainingState
from seedvc_train.validation import ValidationSet

__all__ = ["Limits", "TrainingError", "train", "training_loss"]


class TrainingError(RuntimeError):
    """Training that can't go on."""


@dataclass(frozen=True)
class Limits:
    """When to stop, to save and to log, in steps (epochs for `max_epochs`), and how many batches are a step.

    The last step of an epoch takes what batches are left.
    """

    max_steps: int
    max_epochs: int
    save_every: int
    log_every: int
    accumulate: int = 1
    val_every: int = 1


def train(
    state: TrainingState,
    batches: Callable[[int, int], Iterable[Batch]],
    saving: Saving,
    settings: Settings,
    limits: Limits,
    log: MetricsLog,
    validation: ValidationSet | None = None,
) -> int:
    """Train until a limit is reached or a signal asks to stop, saving as it goes; return the exit code.

    Args:
        state: Where to begin; ends as the last step left it.
        batches: The batches of an epoch from a position on.
        saving: Where checkpoints go; finished on return.
        settings: Saved with each of them.
        limits: When to stop, save, log and validate.
        log: Where losses are written down.
        validation: On what to validate between steps, which changes nothing in the training.

    Raises:
        TrainingError: if the loss or its gradients are not finite any more; nothing is saved then. (In fp16 a step
            whose gradients overflow only lowers the loss scale; it counts as a step all the same.)
        CheckpointError: if a checkpoint can't be saved.
    """
    device = next(state.model.parameters()).device
    saved, stalled, since, logged = state.step, 0.0, time.monotonic(), state.step
    scores: dict[str, float] = {}  # of the weights as they are

    def save() -> None:
        nonlocal saved
        metrics = {} if state.running_loss is None else {"loss": state.running_loss}
        log.publish()
        saving.save(state.to_checkpoint(settings), state.step, state.epoch, metrics, settings.for_manifest(), scores)
        saved = state.step

    with (
        Interruption() as interruption,
        saving,
        log,
        Progress(state.step, limits.max_steps) as progress,
    ):
        while state.step < limits.max_steps and state.epoch < limits.max_epochs and not interruption.signal:
            for group in groups(batches(state.epoch, state.position), limits.accumulate):
                losses = []
                state.model.zero_grad(set_to_none=True)
                for batch in group:
                    with state.precision.autocast():
                        part = training_loss(state.model, batch.to(device))
                    state.precision.scaler.scale(part / len(group)).backward()  # type: ignore[no-untyped-call]
                    losses.append(part.detach())
                loss = torch.stack(losses).mean().item()
                if not math.isfinite(loss):
                    raise TrainingError(_lost(f"the loss is {loss}", state.step, saved))
                if not state.apply_gradients() and state.precision.exhausted:
                    raise TrainingError(_lost("the gradients are not finite", state.step, saved))
                state.advance(loss, len(group))
                progress.step(loss, saving.durable)
                scores = {}
                if validation and state.step % limits.val_every == 0 and not interruption.signal:
                    began = time.monotonic()
                    scores = {"val_loss": validation.loss(state.model)}
                    progress.validated(state.step, scores["val_loss"])
                    since += time.monotonic() - began  # which is no part of a step
                if state.step % limits.log_every == 0 or scores:
                    waited, stalled = saving.seconds - stalled, saving.seconds
                    seconds = (time.monotonic() - since - waited) / (state.step - logged)
                    lr = state.optimizers["cfm"].param_groups[0]["lr"]
                    log.write(
                        step=state.step,
                        epoch=state.epoch,
                        loss=loss,
                        **scores,
                        running_loss=state.running_loss,
                        lr=lr,
                        **state.precision.numbers,
                        seconds_per_step=round(seconds, 6),
                        seconds_stalled=round(waited, 6),
                    )
                    progress.logged(state.step, loss)
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


def groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of each step; fewer in the last where they don't divide."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def training_loss(model: nn.ModuleDict, batch: Batch) -> torch.Tensor:
    """The flow-matching loss of a batch, with content of the true voice in the prompt and of a shifted one after it."""
    regulate, cfm = model["length_regulator"], cast("FlowMatching", model["cfm"])
    prompt_lens = draw_prompt_lens(batch.mel_lens)
    true = regulate(batch.content, ylens=batch.mel_lens, f0=batch.f0)
    shifted = regulate(batch.shifted_content, ylens=batch.mel_lens, f0=batch.f0)
    in_prompt = length_mask(prompt_lens, true.shape[1])[..., None]
    cond = torch.where(in_prompt, true, shifted)
    return cfm.loss(batch.mel, batch.mel_lens, prompt_lens, cond, batch.style)


def _lost(what: str, step: int, saved: int) -> str:
    return (
        f"{what} in step {step + 1}; the weights are as step {step} left them and nothing was saved since "
        f"step {saved}. Lower --lr, or look for broken clips in the data"
    )
