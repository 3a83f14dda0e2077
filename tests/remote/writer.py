"""A process that saves to a run again and again, telling each save that was acknowledged; killed by the tests."""

from __future__ import annotations

import json
import logging
import os
import sys
import time

import torch

from seedvc_ckpt import CheckpointError, CheckpointStore, LeaseHeldError, StaleStepError
from seedvc_ckpt.storage import leftovers, object_store, open_storage, shared_lease


def tell(**what: object) -> None:
    """One line for the parent."""
    sys.stdout.write(json.dumps({**what, "at": time.monotonic()}) + "\n")
    sys.stdout.flush()


def state(step: int, size: int) -> dict[str, object]:
    """A state that tells who made it; `size` in floats."""
    return {"writer": os.getpid(), "step": step, "net": {"cfm": {"w": torch.full((size,), float(step))}}}


def elsewhere() -> None:
    """Be a machine of one's own, so that nobody knows whether this process lives."""
    for module in (leftovers, shared_lease, object_store):
        module.this_machine = lambda: f"{os.getpid():016x}"


def contend(url: str, options: dict[str, object], size: int) -> None:
    """Take the lease whenever it is free, and save the next step while it lasts."""
    elsewhere()
    while True:
        try:
            with CheckpointStore(open_storage(url, storage_options=options, lease_seconds=1.0)) as store:
                store.acquire()
                tell(event="lease", epoch=store._lease.epoch)
                while True:
                    newest = store.latest()
                    step = newest.step + 1 if newest else 1
                    info = store.save(state(step, size), step)
                    tell(event="saved", step=info.step, epoch=store._lease.epoch)
        except (LeaseHeldError, StaleStepError) as error:
            tell(event="stopped", why=type(error).__name__)
        except CheckpointError as error:
            tell(event="failed", why=f"{type(error).__name__}: {error}")
        time.sleep(0.1)


def save_on(url: str, options: dict[str, object], size: int) -> None:
    """Save step after step from where the run is."""
    with CheckpointStore(url, storage_options=options) as store:
        step = store.latest().step if store.latest() else 0
        tell(event="began", step=step)
        while True:
            step += 1
            store.save(state(step, size), step)
            tell(event="saved", step=step)


if __name__ == "__main__":
    logging.disable()
    torch.set_num_threads(1)
    arguments = json.loads(sys.argv[1])
    {"contend": contend, "save_on": save_on}[arguments.pop("do")](**arguments)
