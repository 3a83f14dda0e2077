"""Resuming, exporting, looking and listing, against what the machine needs for the same bytes."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.measure import median_of, memory_peak, sync
from benchmarks.states import checkpoint_of, preset
from seedvc_ckpt import SEED_VC, CheckpointStore
from seedvc_ckpt.format.records import collect_tensors
from seedvc_ckpt.threads import available_cores

__all__ = ["exporting", "listing", "looking", "resuming"]


def resuming(folder: str, runs: int) -> dict[str, float]:
    """Seconds to go on with a 103 M parameter model and AdamW, the file in the page cache.

    Returns:
        ``resume``: newest intact found, every byte checked, model and optimizers filled; ``limit``: the CRC-32 of the
        mapped file on all cores, and its tensors copied out of it, those of the model into the model; ``torch``:
        torch.load and load_state_dict, which check nothing.
    """
    training = preset("whisper_small_wavenet")
    state = checkpoint_of(training)
    state.pop("seedvc_train")
    store = CheckpointStore(os.path.join(folder, "resume"))
    info = store.save(state, 1)
    theirs = os.path.join(folder, "theirs.pt")
    torch.save(state, theirs)
    sync(theirs)
    fresh = preset("whisper_small_wavenet", moments=False)

    def limit() -> None:
        with open(os.path.join(store.location, info.name), "rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        parts = [mapped[at : at + (4 << 20)] for at in range(0, len(mapped), 4 << 20)]
        with ThreadPoolExecutor(available_cores()) as pool:
            list(pool.map(zlib.crc32, parts))
        read = torch.load(os.path.join(store.location, info.name), mmap=True, weights_only=True)
        for name, module in fresh.model.items():
            module.load_state_dict(read["net"][name])
        [tensor.clone() for tensor in collect_tensors(read["optimizer"])[0]]

    def resume() -> None:
        found = store.resume()
        assert found is not None  # noqa: S101
        fresh.restore(found.state)

    def plain() -> None:
        fresh.restore(torch.load(theirs, weights_only=True))

    found = {"resume": median_of(runs, resume)}
    mapped_after = Path("/proc/self/maps").read_text().count(info.name)
    found |= {"limit": median_of(runs, limit), "torch": median_of(runs, plain)}
    return {**found, "still_mapped": float(mapped_after), "bytes": float(info.size)}


def exporting(folder: str, runs: int) -> dict[str, float]:
    """Seconds to export ``ft_model.pth`` from the 2.36 GB checkpoint of the 44 kHz preset.

    Returns:
        ``export``, ``cp`` of a file of the export's size with a sync after it, ``memory`` bytes, ``bytes`` exported.
    """
    state = checkpoint_of(preset("whisper_base_f0_44k"))
    store = CheckpointStore(os.path.join(folder, "export"))
    store.save(state, 1)
    del state
    target, copy = os.path.join(folder, "ft_model.pth"), os.path.join(folder, "copy.pth")
    with memory_peak() as peak:
        store.export(target)

    def cp() -> None:
        subprocess.run(["cp", target, copy], check=True)  # noqa: S607
        sync(copy)

    def without(path: str) -> None:
        if os.path.exists(path):
            os.unlink(path)

    size = os.path.getsize(target)
    return {
        "cp": median_of(runs, cp, lambda: without(copy)),
        "export": median_of(runs, lambda: store.export(target), lambda: without(target)),
        "memory": float(peak.nbytes),
        "bytes": float(size),
    }


def looking(folder: str, runs: int) -> dict[str, float]:
    """Seconds to `inspect` the checkpoint of `exporting`, warm, in a running process."""
    store = CheckpointStore(os.path.join(folder, "export"))
    return {"inspect": median_of(runs, store.inspect)}


def listing(folder: str, names: int, runs: int) -> dict[str, float]:
    """Seconds to list a run of so many (empty) checkpoints.

    Returns:
        ``ls``: the command; ``limit``: importing click and pydantic and a scandir with stat, in a process too;
        ``list``, ``latest``: in a running process.
    """
    run = os.path.join(folder, f"run-{names}")
    os.makedirs(run)
    for step in range(names):
        Path(run, SEED_VC.format(step)).touch()
    program = f"import click, pydantic, os; [entry.stat() for entry in os.scandir({run!r})]"
    command = [os.path.join(os.path.dirname(sys.executable), "seedvc-ckpt"), "ls", run]

    def quietly(arguments: list[str]) -> None:
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)

    store = CheckpointStore(run)
    return {
        "ls": median_of(runs, lambda: quietly(command)),
        "limit": median_of(runs, lambda: quietly([sys.executable, "-c", program])),
        "list": median_of(runs, store.list),
        "latest": median_of(runs, store.latest),
    }


def main(what: str, folder: str, *numbers: str) -> None:
    """Measure one thing and print one JSON document."""
    act = {"resuming": resuming, "exporting": exporting, "looking": looking, "listing": listing}[what]
    print(json.dumps(act(folder, *map(int, numbers))))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
