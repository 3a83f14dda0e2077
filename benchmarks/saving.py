"""Saves of a training state, measured in a process of their own: `python -m benchmarks.saving CONTENDER FOLDER`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.measure import memory_peak
from benchmarks.states import checkpoint_of, preset, random_batch
from seedvc_ckpt.format.records import collect_tensors
from seedvc_train.loop import training_loss
from seedvc_train.state import TrainingState

__all__ = ["measure"]


def measure(contender: type[Contender], folder: str, *, model: str, runs: int, train: bool) -> dict[str, float]:
    """What saving the preset's training state costs.

    Returns:
        Seconds (medians): ``call`` that the call takes and ``durable`` after it was made, while nothing else runs;
        ``memory`` bytes more than before; and, in a loop of real training steps, ``stall`` of a save (the call, and
        what the next step waits) and ``delay``, by how much training is later in all, the stall included.
    """
    torch.manual_seed(0)
    training = preset(model)
    saver = contender(folder, training.optimizers.values())
    state = checkpoint_of(training)
    with memory_peak() as peak:
        saver.begin(state)()
    saver.tidy()
    calls, durables = [], []
    for _ in range(runs):
        began = time.perf_counter()
        finish = saver.begin(checkpoint_of(training))
        calls.append(time.perf_counter() - began)
        finish()
        durables.append(time.perf_counter() - began)
        saver.tidy()
    found = {
        "call": statistics.median(calls),
        "durable": statistics.median(durables),
        "memory": float(peak.nbytes),
        "bytes": float(sum(tensor.nbytes for tensor in collect_tensors(state)[0])),
    }
    if train:
        found |= _in_training(training, saver, runs)
    saver.close()
    return found


def _in_training(training: TrainingState, saver: Contender, runs: int) -> dict[str, float]:
    batch = random_batch()
    waits = _Waits(training)

    def step() -> float:
        began = time.perf_counter()
        loss = training_loss(training.model, batch)
        training.model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in training.optimizers.values():
            optimizer.step()
        return time.perf_counter() - began

    step()
    alone = statistics.median(step() for _ in range(7))
    stalls, delays = [], []
    for _ in range(runs):
        waits.seconds = 0.0
        began = time.perf_counter()
        finish = saver.begin(checkpoint_of(training))
        call = time.perf_counter() - began
        steps = [step() for _ in range(max(2, round(4.0 / alone)))]
        finish()
        stalls.append(call + waits.seconds)
        delays.append(call + sum(steps) - alone * len(steps))
        saver.tidy()
        step()
    return {"stall": statistics.median(stalls), "delay": statistics.median(delays), "step": alone}


class _Waits:
    """How long the pre-step hooks of optimizers take, which is where a saver may make a step wait."""

    def __init__(self, training: TrainingState) -> None:
        self.seconds = 0.0
        for optimizer in training.optimizers.values():
            hooks = optimizer._optimizer_step_pre_hooks  # noqa: SLF001 - there is no other way to see them
            for key, hook in list(hooks.items()):
                hooks[key] = self._timed(hook)

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            answer = hook(*arguments)
            self.seconds += time.perf_counter() - began
            return answer

        return timed


def main(name: str, folder: str, model: str, runs: str, train: str) -> None:
    """Measure and print one JSON document."""
    (contender,) = (found for found in CONTENDERS if found.__name__ == name)
    print(json.dumps(measure(contender, folder, model=model, runs=int(runs), train=train == "train")))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
