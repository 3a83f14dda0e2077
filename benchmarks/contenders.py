"""Ways of saving a training state, ours and others', each driven the same way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.measure import sync
from seedvc_ckpt import AsyncSaver, CheckpointStore
from seedvc_ckpt.format.records import collect_tensors, lay_out

__all__ = ["CONTENDERS", "Contender", "flattened"]


class Contender:
    """Saves states into a folder; a save may return before it is durable.

    Attributes:
        label: What tables call it.
        package: What must be installed; None where nothing more is needed.
    """

    label = ""
    package: str | None = None

    def __init__(self, folder: str, optimizers: Iterable[Optimizer]) -> None:  # noqa: ARG002
        self.folder = folder
        self.saves = 0
        os.makedirs(folder, exist_ok=True)

    @classmethod
    def available(cls) -> bool:
        """Whether what it needs is installed."""
        return cls.package is None or find_spec(cls.package) is not None

    def begin(self, state: Any) -> Callable[[], object]:
        """Save; what is returned waits until the save is durable."""
        self.saves += 1
        path = os.path.join(self.folder, f"{self.saves}")
        return self.save(state, path)

    def save(self, state: Any, path: str) -> Callable[[], object]:
        """As `begin`, with the path to save to."""
        raise NotImplementedError

    def tidy(self) -> None:
        """Remove what was saved, which no measurement counts."""
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def close(self) -> None:
        """Finish."""


def flattened(state: Any) -> dict[str, torch.Tensor]:
    """All tensors of a state under made-up names."""
    return {f"t{number}": tensor for number, tensor in enumerate(collect_tensors(state)[0])}


def _done() -> None:
    pass


class Plain(Contender):
    """The same bytes, written by one call a tensor and synced: what the disk can do."""

    label = "plain write + fsync (the limit)"

    def save(self, state: Any, path: str) -> Callable[[], object]:
        records = lay_out(collect_tensors(state)[0])[1]
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        for record in records:
            os.write(descriptor, record.read())
        os.fsync(descriptor)
        os.close(descriptor)
        return _done


class TorchSave(Contender):
    """torch.save, then fsync, which Seed-VC leaves out."""

    label = "torch.save + fsync"

    def save(self, state: Any, path: str) -> Callable[[], object]:
        torch.save(state, path)
        sync(path)
        return _done


class Safetensors(Contender):
    """The tensors alone; safetensors keeps no other values."""

    label = "safetensors + fsync"

    def save(self, state: Any, path: str) -> Callable[[], object]:
        from safetensors.torch import save_file

        save_file(flattened(state), path)
        sync(path)
        return _done


class Ours(Contender):
    """CheckpointStore.save."""

    label = "seedvc-ckpt"

    def __init__(self, folder: str, optimizers: Iterable[Optimizer]) -> None:
        super().__init__(folder, optimizers)
        self.store = CheckpointStore(folder)

    def begin(self, state: Any) -> Callable[[], object]:
        self.saves += 1
        self.store.save(state, self.saves)
        return _done

    def tidy(self) -> None:
        for info in self.store.list():
            os.unlink(os.path.join(self.folder, info.name))

    def close(self) -> None:
        self.store.close()


class OursInBackground(Ours):
    """AsyncSaver with guarded optimizers."""

    label = "seedvc-ckpt AsyncSaver"

    def __init__(self, folder: str, optimizers: Iterable[Optimizer]) -> None:
        super().__init__(folder, optimizers)
        self.saver = AsyncSaver(self.store)
        for optimizer in optimizers:
            self.saver.guard(optimizer)

    def begin(self, state: Any) -> Callable[[], object]:
        self.saves += 1
        pending = self.saver.save(state, self.saves)
        if pending is None:
            raise RuntimeError("the save was skipped")
        return pending.result

    def close(self) -> None:
        self.saver.close()
        super().close()


class DistributedCheckpoint(Contender):
    """torch.distributed.checkpoint.async_save in one process."""

    label = "torch DCP async_save"

    def __init__(self, folder: str, optimizers: Iterable[Optimizer]) -> None:
        super().__init__(folder, optimizers)
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def save(self, state: Any, path: str) -> Callable[[], object]:
        import torch.distributed.checkpoint as dcp

        # it takes flat names to tensors; its own writer syncs the files
        future: Future[Any] = dcp.async_save(flattened(state), checkpoint_id=path)
        return future.result


class Lightning(Contender):
    """Lightning's AsyncCheckpointIO around its TorchCheckpointIO, synced afterwards."""

    label = "Lightning AsyncCheckpointIO"
    package = "lightning"

    def save(self, state: Any, path: str) -> Callable[[], object]:
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        plugin = AsyncCheckpointIO(TorchCheckpointIO())
        plugin.save_checkpoint(state, path)

        def finish() -> None:
            plugin.teardown()
            sync(path)

        return finish


class TorchSnapshot(Contender):
    """torchsnapshot's async_take, synced afterwards."""

    label = "torchsnapshot async_take"
    package = "torchsnapshot"

    def save(self, state: Any, path: str) -> Callable[[], object]:
        import torchsnapshot

        pending = torchsnapshot.Snapshot.async_take(path, {"state": torchsnapshot.StateDict(tensors=flattened(state))})

        def finish() -> None:
            pending.wait()
            sync(path)

        return finish


class Moonclip(Contender):
    """Moonclip's CheckpointManager: deltas, compressed by zstd; synced afterwards."""

    label = "Moonclip"
    package = "moonclip"

    def __init__(self, folder: str, optimizers: Iterable[Optimizer]) -> None:
        super().__init__(folder, optimizers)
        from moonclip import CheckpointManager

        self.manager = CheckpointManager(storage_root=folder)

    def begin(self, state: Any) -> Callable[[], object]:
        self.saves += 1
        self.manager.save(self.saves, extra={"state": flattened(state)})

        def finish() -> None:
            self.manager._mgr.flush()  # noqa: SLF001 - its own manager has no public way to wait
            sync(self.folder)

        return finish

    def tidy(self) -> None:
        """Nothing: what it writes next depends on what it wrote before."""


CONTENDERS: list[type[Contender]] = [
    Plain,
    TorchSave,
    Safetensors,
    Ours,
    OursInBackground,
    DistributedCheckpoint,
    Lightning,
    TorchSnapshot,
    Moonclip,
]
