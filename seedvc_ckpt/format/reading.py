"""Tensors read from a file one at a time, checked, in no more memory than they need."""

from __future__ import annotations

import torch

from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.format.contents import TensorRef
from seedvc_ckpt.format.records import memory_of, new_storage
from seedvc_ckpt.format.unpickle import Storage

__all__ = ["TensorReader"]


class TensorReader:
    """Reads from the records of one file. A record is checked before the first of its bytes is used."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._checked: set[str] = set()

    def stretch(self, storage: Storage, start: int, end: int, holds: str) -> torch.Tensor:
        """The bytes of a storage from `start` to `end`, as uint8.

        Raises:
            CorruptCheckpointError: if the record is damaged; `holds` tells what is lost.
        """
        record, memory = f"data/{storage.key}", new_storage(end - start)
        if memory.nbytes() == storage.nbytes:
            self._archive.fill(record, memory_of(memory), holds=holds)
        elif start < end:
            # a view of something larger: the whole is checked once, in passing
            if record not in self._checked:
                self._archive.verify_record(record, holds)
                self._checked.add(record)
            self._archive.source.read_into(self._archive.data_offset(record) + start, memory_of(memory))
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory)

    def crc(self, storage: Storage) -> int:
        """The CRC-32 that a storage's record has, or is refused."""
        return self._archive.records[f"data/{storage.key}"].crc

    def elements(self, ref: TensorRef, holds: str) -> torch.Tensor:
        """A tensor's elements in order, flat and dense."""
        stretch = self.stretch(ref.storage, *ref.extent, holds).view(getattr(torch, ref.dtype))
        return stretch.as_strided(ref.shape, ref.stride).contiguous().flatten()
