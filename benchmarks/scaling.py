"""How the cost of a save grows with the state, and what frequent saves cost a run: `python -m benchmarks.scaling …`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time

import torch

from benchmarks.contenders import CONTENDERS
from benchmarks.measure import median_of
from benchmarks.states import stacked

__all__ = ["of_size", "training"]


def of_size(name: str, folder: str, millions: int, runs: int) -> dict[str, float]:
    """Seconds of a save of a model with AdamW of so many million parameters: until the call returns, until durable."""
    model, optimizer = stacked(millions)
    (contender,) = (found for found in CONTENDERS if found.__name__ == name)
    saver = contender(folder, [optimizer])
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saver.begin(state)()
    saver.tidy()
    calls: list[float] = []

    def save() -> None:
        began = time.perf_counter()
        finish = saver.begin(state)
        calls.append(time.perf_counter() - began)
        finish()

    durable = median_of(runs, save, saver.tidy)
    saver.close()
    return {"call": sorted(calls)[len(calls) // 2], "durable": durable}


def training(folder: str, steps: int) -> dict[str, float]:
    """Seconds of so many steps of a 6 M parameter model that saves every step, every 10, every 100, and never."""
    found = {}
    for every in (0, 1, 10, 100):
        for name in ("OursInBackground", "Ours", "TorchSave"):
            if every == 0 and name != "Ours":
                continue
            torch.manual_seed(0)
            model, optimizer = stacked(6)
            (contender,) = (found for found in CONTENDERS if found.__name__ == name)
            place = os.path.join(folder, "training")
            shutil.rmtree(place, ignore_errors=True)
            saver = contender(place, [optimizer])
            data = torch.randn(256, 720)
            began, finish = time.perf_counter(), None
            for step in range(1, steps + 1):
                model(data).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if every and step % every == 0:
                    finish = saver.begin({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            if finish is not None:
                finish()
            found[f"{name} every {every}" if every else "no saves"] = time.perf_counter() - began
            saver.close()
            shutil.rmtree(place, ignore_errors=True)
    return found


def main(what: str, folder: str, *arguments: str) -> None:
    """Measure one thing and print one JSON document."""
    if what == "training":
        print(json.dumps(training(folder, int(arguments[0]))))  # noqa: T201
    else:
        print(json.dumps(of_size(arguments[0], folder, int(arguments[1]), int(arguments[2]))))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
