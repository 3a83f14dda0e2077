"""Copies of a state's bytes in memory that is used again and again, so that training may change the state meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from seedvc_ckpt.errors import SaveFailedError
from seedvc_ckpt.format.contents import children
from seedvc_ckpt.format.records import RecordSource, advise_huge_pages, extent_of, memory_of

__all__ = ["Copy", "StagingBuffer", "make_copies", "memory_changed_by", "moment_on_device"]

_ALIGNMENT = 64  # bytes


@dataclass(slots=True)
class Copy:
    """A record's bytes that are to be copied, and where to.

    Attributes:
        source: Where they are now.
        buffer: Where they go.
        offset: To which place there.
    """

    source: RecordSource
    buffer: torch.Tensor
    offset: int

    def place(self) -> torch.Tensor:
        """As many bytes of the buffer."""
        return self.buffer[self.offset : self.offset + self.source.nbytes]

    def content(self) -> memoryview:
        """The copied bytes."""
        return memory_of(self.buffer.untyped_storage())[self.offset :][: self.source.nbytes]


class StagingBuffer:
    """Memory for one state at a time. It is kept, since touching new memory is what takes time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def place(self, records: Sequence[RecordSource]) -> tuple[list[RecordSource], list[Copy]]:
        """Give a place to each record whose bytes may change.

        Returns:
            All records as they are to be read from the buffer, and the copies that must be made before.

        Raises:
            SaveFailedError: if there is not enough memory.
        """
        live = [record for record in records if record.memory is not None]
        self._reserve(sum(_aligned(record.nbytes) for record in live), pinned=any(map(_on_cuda, live)))
        staged: list[RecordSource] = []
        copies: list[Copy] = []
        offset = 0
        for record in records:
            if record.memory is None:
                staged.append(record)
                continue
            copy = Copy(record, self._memory, offset)
            copies.append(copy)
            staged.append(RecordSource(record.name, record.nbytes, copy.content))
            offset += _aligned(record.nbytes)
        return staged, copies

    def _reserve(self, nbytes: int, *, pinned: bool) -> None:
        if self._memory.nbytes >= nbytes and (self._memory.is_pinned() or not pinned):
            return
        self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
        try:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError:
            raise SaveFailedError(
                f"no memory for a copy of the state, {nbytes:,} bytes: use CheckpointStore.save, which needs none",
                needed=nbytes,
            ) from None
        advise_huge_pages(self._memory.data_ptr(), nbytes)


def make_copies(copies: Iterable[Copy], moment: Any = None) -> None:
    """Make the copies, each of as few instructions under Python's lock as there are; they are done on return.

    Args:
        copies: In which order.
        moment: What CUDA copies must come after, from `moment_on_device`.
    """
    stream: Any = None
    for copy in copies:
        if copy.source.on_device is None:
            content = copy.source.read()
            if content:
                begin = (ctypes.c_char * len(content)).from_buffer(content)
                ctypes.memmove(copy.buffer.data_ptr() + copy.offset, begin, len(content))
            continue
        # not run by the tests, which have no such device
        source = copy.source.on_device()
        if source.is_cuda and stream is None:
            stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
            if moment is not None:
                stream.wait_event(moment)
        with torch.cuda.stream(stream) if source.is_cuda else nullcontext():
            copy.place().copy_(source, non_blocking=source.is_cuda)
    if stream is not None:
        stream.synchronize()


def moment_on_device(copies: Iterable[Copy]) -> Any:
    """What the CUDA device has been told to do up to now; None where no bytes are there."""
    # not run by the tests, which have no such device
    return torch.cuda.current_stream().record_event() if any(_on_cuda(copy.source) for copy in copies) else None


def memory_changed_by(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Where in memory the tensors begin and end that the optimizer's `step` changes: its parameters and its state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[int, int] = {}
    pending: list[Any] = [*parameters, *optimizer.state.values()]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            start, end = extent_of(value)
            found[start] = max(end, found.get(start, end))
        else:
            pending += (child for _, child in children(value))
    return found


def _on_cuda(record: RecordSource) -> bool:
    return record.on_device is not None and record.on_device().is_cuda


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
