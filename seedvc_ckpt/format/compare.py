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
from seedvc_ckpt.format.reading import TensorReader

__all__ = ["Difference", "compare"]

_FITS_INT64 = 2.0**62


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
    trees = read_tree(first), read_tree(second)
    for archive in (first, second):
        archive.announce(name for name in archive.records if name.startswith("data/"))
    yield from _Comparison(first, second).values(*trees, ())


class _Comparison:
    def __init__(self, first: Archive, second: Archive) -> None:
        self.readers = TensorReader(first), TensorReader(second)
        self.known: dict[tuple[TensorRef, TensorRef], tuple[int, float]] = {}

    def values(self, one: Any, other: Any, path: Path) -> Iterator[Difference]:
        if _kind(one) is not _kind(other):
            yield _unlike(one, other, path)
        elif isinstance(one, TensorRef):
            yield from self.tensors(one, other, path)
        elif type(one) in CONTAINERS:
            yield from self.containers(one, other, path)
        elif not _same(one, other):
            yield _unlike(one, other, path)

    def containers(self, one: Any, other: Any, path: Path) -> Iterator[Difference]:
        left, right = dict(children(one)), dict(children(other))
        for key, value in left.items():
            if key in right:
                yield from self.values(value, right[key], (*path, key))
            else:
                yield Difference(path_text((*path, key)), f"{_described(value)} in the first only")
        for key, value in right.items():
            if key not in left:
                yield Difference(path_text((*path, key)), f"{_described(value)} in the second only")

    def tensors(self, one: TensorRef, other: TensorRef, path: Path) -> Iterator[Difference]:
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            yield _unlike(one, other, path)
            return
        if (one, other) not in self.known:
            left, right = (
                reader.elements(ref, path_text(path)) for reader, ref in zip(self.readers, (one, other), strict=True)
            )
            self.known[one, other] = _differing(left, right)
        count, largest = self.known[one, other]
        if count:
            what = f"{count:,} of {one.numel:,} elements differ, by at most {largest:.3g}"
            yield Difference(path_text(path), what, count, largest)


def _unlike(one: Any, other: Any, path: Path) -> Difference:
    return Difference(path_text(path), f"{_described(one)} in the first, {_described(other)} in the second")


def _differing(left: torch.Tensor, right: torch.Tensor) -> tuple[int, float]:
    """How many elements differ in a bit, and the largest difference of two."""
    bits = (left.numel(), left.element_size())
    changed = (left.view(torch.uint8).reshape(bits) != right.view(torch.uint8).reshape(bits)).any(dim=1)
    count = int(changed.sum())
    if not count:
        return 0, 0.0
    left, right = left[changed], right[changed]
    wide = torch.complex128 if left.is_complex() else torch.float64
    distance = (left.to(wide) - right.to(wide)).abs()
    if left.dtype in (torch.int64, torch.uint64):
        # float64 rounds large numbers; where they are close to each other, whole numbers tell how close
        exact = (left.view(torch.int64) - right.view(torch.int64)).abs().to(wide)
        distance = torch.where(distance < _FITS_INT64, exact, distance)
    return count, float(distance.max())


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
