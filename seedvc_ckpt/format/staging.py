"""Copies of a state's bytes in memory that is used again and again, so that training may change the state meanwhile."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from seedvc_ckpt.errors import SaveFailedError
from seedvc_ckpt.format.contents import children
from seedvc_ckpt.format.records import RecordSource, advise_huge_pages, extent_of, memory_of

__all__ = ["Copy", "StagingBuffer", "make_copies", "moments_on_devices", "spans_changed_by"]

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


class StagingBuffer:
    """Memory for one state at a time. It is kept, since touching new memory is what takes time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

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
            copies.append(Copy(record, self._memory, offset))
            staged.append(
                RecordSource(record.name, record.nbytes, partial(_part_of, self._memory, offset, record.nbytes))
            )
            offset += _aligned(record.nbytes)
        return staged, copies

    def _reserve(self, nbytes: int, *, pinned: bool) -> None:
        if self._memory.nbytes >= nbytes and (self._memory.is_pinned() or not pinned):
            return
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # the old one goes before the new one comes
        try:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        except RuntimeError:
            raise SaveFailedError(
                f"no memory for a copy of the state, {nbytes:,} bytes: use CheckpointStore.save, which needs none",
                needed=nbytes,
            ) from None
        advise_huge_pages(self._memory.data_ptr(), nbytes)


def make_copies(copies: Iterable[Copy], moments: Mapping[torch.device, Any]) -> None:
    """Make the copies, each of as few instructions under Python's lock as there are; they are done on return.

    Args:
        copies: In which order.
        moments: What CUDA copies must come after, from `moments_on_devices`.
    """
    streams: dict[torch.device, Any] = {}
    for copy in copies:
        device = copy.source.device
        if device is None:
            content = copy.source.read()
            if content:
                begin = (ctypes.c_char * len(content)).from_buffer(content)
                ctypes.memmove(copy.buffer.data_ptr() + copy.offset, begin, len(content))
        elif copy.source.on_device is not None:  # not run by the tests, which have no such device
            if device.type == "cuda" and device not in streams:
                streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                streams[device].wait_event(moments[device])
            with torch.cuda.stream(streams[device]) if device in streams else nullcontext():
                copy.place().copy_(copy.source.on_device(), non_blocking=device.type == "cuda")
    for stream in streams.values():
        stream.synchronize()


def moments_on_devices(copies: Iterable[Copy]) -> dict[torch.device, Any]:
    """What each CUDA device that holds such bytes has been told to do up to now."""
    devices = {copy.source.device for copy in copies if _on_cuda(copy.source)}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices if device is not None}


def spans_changed_by(
    guarded: Mapping[int, tuple[torch.optim.Optimizer, Sequence[torch.Tensor]]],
) -> dict[int, tuple[int, int]]:
    """The memory that only one optimizer's `step`, or what comes after it, changes: begin -> (end, its key).

    It is that of parameters, state tensors and the further ones given with an optimizer, as far as they lie in one
    piece. What belongs to two optimizers is left out.
    """
    spans = sorted((*span, key) for key, (optimizer, more) in guarded.items() for span in _dense_spans(optimizer, more))
    found: dict[int, tuple[int, int]] = {}
    overlapping: list[tuple[int, int, int]] = []
    for span in [*spans, (sys.maxsize, sys.maxsize, 0)]:
        if overlapping and span[0] >= max(end for _, end, _ in overlapping):
            if len({key for _, _, key in overlapping}) == 1:
                found.update({begin: (end, key) for begin, end, key in overlapping})
            overlapping.clear()
        overlapping.append(span)
    return found


def _dense_spans(optimizer: torch.optim.Optimizer, more: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pending: list[Any] = [*parameters, *optimizer.state.values(), *more]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            begin, end = extent_of(value)
            if end - begin == value.nbytes:  # else another tensor may lie in the gaps
                yield begin, end
        else:
            pending += (child for _, child in children(value))


def _part_of(memory: torch.Tensor, offset: int, nbytes: int) -> memoryview:
    return memory_of(memory.untyped_storage())[offset : offset + nbytes]


def _on_cuda(record: RecordSource) -> bool:
    return record.device is not None and record.device.type == "cuda"


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
