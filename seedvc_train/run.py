"""A run's folder: where training begins in it, and what it leaves there."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from seedvc_ckpt import CheckpointError, CheckpointNotFoundError, CheckpointStore, scores
from seedvc_ckpt.export import export_to
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.manifest import library_version
from seedvc_ckpt.storage import Storage, read_file
from seedvc_ckpt.store import Resumed
from seedvc_train import events, metrics
from seedvc_train.events import EventLog
from seedvc_train.optim import set_learning_rate
from seedvc_train.pretrained import Pretrained
from seedvc_train.settings import Settings
from seedvc_train.state import TrainingState, recorded_settings
from seedvc_train.weights import StateError

__all__ = ["WEIGHTS", "ChangedRunError", "begin", "keep_config", "note_end", "note_start", "publish_weights"]

WEIGHTS = "ft_model.pth"


class ChangedRunError(ValueError):
    """The run was started with other settings or data."""


def begin(
    state: TrainingState,
    store: CheckpointStore,
    settings: Settings,
    *,
    resume: str,
    pretrained: Pretrained | None,
    lr: float | None,
    allow_changes: bool,
    say: Callable[[str], None],
    log: EventLog,
) -> str | None:
    """Put `state` where the run goes on: at a checkpoint of the store, at pretrained weights, or at step 0.

    Args:
        state: A fresh state, changed in place.
        store: The run's checkpoints; damaged ones and, unless `resume` is "auto", later ones are set aside.
        settings: What the run is to go on with.
        resume: "auto" for the newest intact checkpoint, "never", or a step.
        pretrained: Weights for a run that begins at step 0.
        lr: The learning rate, where one was asked for.
        allow_changes: Go on though settings or data changed.
        say: Called with what happened, a line at a time.
        log: Where it is noted what was set aside.

    Returns:
        The name of the checkpoint that the run goes on from; None at step 0.

    Raises:
        ChangedRunError: listing what changed.
        StateError: if a checkpoint does not fit the model, or nothing of pretrained weights does.
        CheckpointError: if there are checkpoints but none can be used.
    """
    if resume == "never":
        _set_all_aside(store, say)
    elif resume != "auto":
        for info in store.rewind(int(resume)):
            say(f"set {info.name} aside: the run goes back to step {resume}")
            log.write("set_aside", info.step, name=info.name, reason=f"the run was rewound to step {resume}")
    found = store.resume()
    if found is not None:
        for info, reason in found.rejected:
            say(f"set {info.name} aside, it is damaged: {reason}")
            log.write("set_aside", info.step, name=info.name, reason=reason)
        _go_on(state, store.location, found, settings, lr=lr, allow_changes=allow_changes, say=say)
        return found.info.name
    say("starting at step 0")
    if pretrained is not None:
        pretrained.load_into(state, say)
    return None


def _go_on(
    state: TrainingState,
    location: str,
    found: Resumed,
    settings: Settings,
    *,
    lr: float | None,
    allow_changes: bool,
    say: Callable[[str], None],
) -> None:
    recorded = recorded_settings(found.state)
    changes = recorded.changes(settings) if recorded else []
    if changes and not allow_changes:
        raise ChangedRunError(_refusal(location, found.info.name, changes))
    try:
        notes = state.restore(found.state)
    except StateError as error:
        raise StateError(
            f"can't go on from {found.info.name} in {location}: {error}\nUse the config that it was trained with, "
            "another --run-name, or start anew with --resume never"
        ) from None
    if lr is not None:
        set_learning_rate(state.optimizers, state.schedulers, lr)
    say(f"resumed from step {state.step} ({found.info.name})")
    if state.step != found.info.step:
        say(f"  its name says step {found.info.step}; going by what it holds")
    if found.rejected:
        say(f"  the {found.steps_lost} steps after it were lost with the damaged files")
    for line in [*notes, *(f"changed: {line}" for line in changes)]:
        say(f"  {line}")
    if recorded and recorded.moves_batches(settings):
        state.position = 0
        say(f"  epoch {state.epoch} starts over, since its batches are others now")


def note_start(log: EventLog, step: int, resumed: str | None, reached: int, options: Mapping[str, Any]) -> None:
    """Write down that training begins.

    Args:
        log: Where to.
        step: Steps done.
        resumed: The checkpoint that the run goes on from, if any.
        reached: The last step that was logged before.
        options: Those of the command line; what may hold a secret is left out.
    """
    given = {key: value for key, value in options.items() if value not in (None, False) and "://" not in str(value)}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seedvc-ckpt": library_version(),
    }
    about = {"options": given, "versions": versions, "machine": platform.node()}
    if resumed is None:
        log.write("started", step, **about)
    else:
        log.write("resumed", step, name=resumed, reached=reached, **about)


def note_end(log: EventLog, step: int, code: int) -> None:
    """Write down that training is over, at its limit or by a signal; `code` is the exit code."""
    if code:
        log.write("interrupted", step, signal=signal.Signals(code - 128).name)
    else:
        log.write("ended", step)


def keep_config(storage: Storage, config: str) -> None:
    """Copy the YAML into the run's folder under its own name; one of other contents there is set aside."""
    name = os.path.basename(config)
    with open(config, "rb") as file:
        content = file.read()
    if storage.stat(name) is not None:
        if read_file(storage, name) == content:
            return
        storage.set_aside(name, "the run went on with another config of this name")
    storage.publish(name, len(content), [memoryview(content)])


def publish_weights(store: CheckpointStore, say: Callable[[str], None], weights: Literal["net", "ema"] = "net") -> str:
    """Export the newest checkpoint's weights, or their averages, as the run's ``ft_model.pth`` and return its path.

    An older one of this run is replaced; any other is set aside first.
    """
    target = f"{store.location.rstrip('/')}/{WEIGHTS}"
    if (os.path.lexists(target) or store.storage.stat(WEIGHTS) is not None) and not _is_ours(store):
        moved = store.set_aside(WEIGHTS, "it was not exported from a checkpoint of this run")
        say(f"kept the {WEIGHTS} that was here as {moved}")
    export_to(store.file(), store.storage, WEIGHTS, weights=weights, overwrite=True)
    return target


def _is_ours(store: CheckpointStore) -> bool:
    try:
        manifest = CheckpointFile(store.storage, WEIGHTS).manifest()
    except CheckpointError:
        return False
    return manifest is not None and manifest.run == store.run_name and manifest.exported_from is not None


def _set_all_aside(store: CheckpointStore, say: Callable[[str], None]) -> None:
    infos = store.list()
    names: list[str] = [info.name for info in infos]
    names += [metrics.NAME, events.NAME, scores.NAME] if infos else []
    for name in names:
        try:
            store.set_aside(name, "the run was started anew with --resume never")
        except CheckpointNotFoundError:
            continue  # a run of Seed-VC's own trainer has no logs
    if infos:
        say(f"set {len(infos)} checkpoints of an earlier run aside, in {store.location}/aside")


def _refusal(location: str, name: str, changes: list[str]) -> str:
    lines = "\n  ".join(changes)
    return (
        f"{name} in {location} was made with other settings, so going on would be another run:\n  {lines}\n"
        "Set them back, accept them with --allow-changes, or start anew with --resume never or another --run-name"
    )
