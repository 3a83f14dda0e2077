"""Two checkpoints compared value by value, bit for bit."""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.format.contents import CONTAINERS, Path, TensorRef, children, path_text, read_tree
from seedvc_ckpt.format.records import memory_of, new_storage

__all__ = ["Difference", "compare"]


@dataclass(frozen=True)
class Difference:
    """One value that differs.

    Attributes:
        path: Where it is, such as ``net['cfm']['estimator.x']``.
        what: In words, what differs.
        elements: How many elements of a tensor differ in at least one bit; None for other values.
        largest: The largest absolute difference of two elements (NaN where one of them is NaN); None likewise.
    """

    path: str
    what: str
    elements: int | None = None
    largest: float | None = None


def compare(first: Archive, second: Archive) -> Iterator[Difference]:
    """Every difference between two checkpoints' states, manifests left aside.

    Tensors are read in pairs, one pair at a time, and checked against their CRCs. ``dict`` and ``OrderedDict`` count as
    equal when their items are; floats are compared by their bits.

    Raises:
        CorruptCheckpointError: if a tensor is damaged.
    """
    yield from _compare(first, second, read_tree(first), read_tree(second), ())


def _compare(first: Archive, second: Archive, one: Any, other: Any, path: Path) -> Iterator[Difference]:
    if _kind(one) is not _kind(other):
        yield Difference(path_text(path), f"{_described(one)} in the first, {_described(other)} in the second")
    elif isinstance(one, TensorRef):
        yield from _compare_tensors(first, second, one, other, path)
    elif type(one) in CONTAINERS:
        yield from _compare_containers(first, second, one, other, path)
    elif not _same(one, other):
        yield Difference(path_text(path), f"{_described(one)} in the first, {_described(other)} in the second")


def _compare_containers(
    first: Archive,
    second: Archive,
    one: Any,
    other: Any,
    path: Path,
) -> Iterator[Difference]:
    left, right = dict(children(one)), dict(children(other))
    for key, value in left.items():
        if key in right:
            yield from _compare(first, second, value, right[key], (*path, key))
        else:
            yield Difference(path_text((*path, key)), f"{_described(value)} in the first only")
    for key, value in right.items():
        if key not in left:
            yield Difference(path_text((*path, key)), f"{_described(value)} in the second only")


def _compare_tensors(
    first: Archive, second: Archive, one: TensorRef, other: TensorRef, path: Path
) -> Iterator[Difference]:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        yield Difference(path_text(path), f"{_described(one)} in the first, {_described(other)} in the second")
        return
    left, right = _read(first, one, path), _read(second, other, path)
    bits = (left.numel(), left.element_size())
    changed = (left.view(torch.uint8).reshape(bits) != right.view(torch.uint8).reshape(bits)).any(dim=1)
    if not changed.any():
        return
    wide = torch.complex128 if left.is_complex() else torch.float64
    largest = float((left[changed].to(wide) - right[changed].to(wide)).abs().max())
    count = int(changed.sum())
    yield Difference(
        path_text(path),
        f"{count:,} of {left.numel():,} elements differ, by at most {largest:.3g}",
        count,
        largest,
    )


def _read(archive: Archive, ref: TensorRef, path: Path) -> torch.Tensor:
    """The tensor's elements, flat and dense."""
    record = f"data/{ref.storage.key}"
    storage = new_storage(archive.records[record].size)
    archive.fill(record, memory_of(storage), holds=path_text(path))
    tensor = torch.empty(0, dtype=getattr(torch, ref.dtype))
    tensor.set_(storage, ref.offset, ref.shape, ref.stride)
    return tensor.contiguous().flatten()


def _kind(value: Any) -> type:
    return dict if type(value) is OrderedDict else type(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, complex):
        return _same(one.real, other.real) and _same(one.imag, other.imag)
    return bool(one == other)


def _described(value: Any) -> str:
    if isinstance(value, TensorRef):
        return f"{value.dtype} {list(value.shape)}"
    if type(value) in CONTAINERS:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    if isinstance(value, float) and math.isfinite(value):
        text = f"{value:.17g}"
    return text if len(text) <= 60 else f"{text[:57]}…"
