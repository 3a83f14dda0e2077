"""Feeds the readers what a fuzzer makes of good files: `python fuzzing.py TARGET CORPUS SECONDS SEED`.

Whatever it makes, a reader answers or refuses it with a `CheckpointError`. Anything else, five seconds without an
answer, or 200 MB more memory is a finding: the process ends in an error, with the input in a file ``crash-…``,
``timeout-…`` or ``oom-…`` in the current folder.
"""

from __future__ import annotations

import importlib
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

if __name__ == "__main__":
    import atheris

    sys.path.insert(0, str(Path(__file__).parent.parent / "ckpt"))
    with atheris.instrument_imports(include=["seedvc_ckpt"]):
        for module in ("file", "format.torchzip", "naming"):
            importlib.import_module(f"seedvc_ckpt.{module}")

import states  # what is instrumented must be imported first

from seedvc_ckpt import CheckpointError, Manifest, NamePattern
from seedvc_ckpt.format import contents, unpickle

__all__ = ["TARGETS", "feed", "seeds"]

MEMORY = 200 << 20  # bytes
PATIENCE = 5  # seconds


def directory(data: bytes) -> None:
    """The zip directory, and what lies where it says."""
    archive = states.opened(data)
    for name in archive.records:
        archive.data_offset(name)
    archive.manifest()


def pickle(data: bytes) -> None:
    """The pickle, described, loaded and listed; in a zip file of its own whose checksums are right."""
    with suppress(CheckpointError):
        unpickle.list_globals(data)
    with suppress(CheckpointError):
        contents.parse(data, "fuzzed")
    states.load(states.torch_zip(data, {"data/0": bytes(12), "data/1": bytes(16)}))


def manifest(data: bytes) -> None:
    """The manifest."""
    Manifest.from_json(data, "fuzzed")


def template(data: bytes) -> None:
    """A naming pattern, and the names that it makes and finds."""
    text = data.decode(errors="surrogateescape")
    pattern = NamePattern(text)
    name = pattern.format(12, 3)
    found = pattern.parse(name)
    if found is None or found.step != 12 or found.epoch not in (0, 3):
        raise AssertionError(f"{text!r} does not find its own name {name!r}: {found}")
    pattern.parse(text)


def file(data: bytes) -> None:
    """A whole file, verified and loaded."""
    with suppress(CheckpointError):
        states.verify(data)
    states.load(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (directory, pickle, manifest, template, file)
}


def seeds(target: str) -> list[bytes]:
    """Good inputs to begin with."""
    state = {"net": {"cfm": {"w": torch.ones(3), "v": torch.zeros(2, 2).T}}, "iters": 5, "x": [1.5, None, (True, "t")]}
    ours = states.save(state, metrics={"loss": 0.5})
    stock = states.stock_save(state)
    if target == "pickle":
        return [states.opened(made).pickle() for made in (ours, stock)]
    if target == "manifest":
        return [Manifest(step=5, metrics={"loss": 0.5}, run="voice").to_json()]
    if target == "template":
        return [b"DiT_epoch_{epoch:05d}_step_{step:05d}.pth", b"{step}.pth", b"a{step:03d}b{epoch}.pth"]
    return [ours, stock]


def feed(target: str, data: bytes) -> None:
    """Give the target an input; it may refuse it."""
    with suppress(CheckpointError):
        TARGETS[target](data)


def main(target: str, corpus: str, seconds: str, seed: str) -> None:
    """Fuzz a target, adding what reaches new code to the corpus."""
    for place, good in enumerate(seeds(target)):
        Path(corpus, f"good-{place}").write_bytes(good)
        feed(target, good)
    arguments = [f"-max_total_time={seconds}", f"-seed={int(seed) % (1 << 31) + 1}", f"-timeout={PATIENCE}"]
    limits = ["-max_len=8192", "-rss_limit_mb=0", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *arguments, *limits, corpus], lambda data: feed(target, data))
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
