"""What a checkpoint holds, as its pickle describes it: plain values, and a `TensorRef` for each tensor. No torch."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from seedvc_ckpt.errors import CorruptCheckpointError, UnsafeCheckpointError
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.format.unpickle import DIFFERENTIABLE, ITEM_SIZES, Storage, unpickle

__all__ = [
    "CONTAINERS",
    "MAX_DEPTH",
    "Path",
    "TensorRef",
    "TorchValue",
    "children",
    "parse",
    "path_text",
    "read_tree",
    "storage_names",
    "walk",
]

MAX_DEPTH = 200
"""How deep a state may nest; pickling a deeper one would overflow the interpreter's stack."""

_MAX_REPEATED = 200_000  # values that shared containers may add when they are walked once for each place they are in
CONTAINERS = (dict, OrderedDict, Counter, list, tuple)
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, set)

Path = tuple[Any, ...]
"""The keys and indexes that lead to a value."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor as the pickle describes it.

    Attributes:
        storage: The record with its elements; several tensors may share one.
        dtype: Name below ``torch``, such as "float32".
        offset: First element inside the storage.
        shape: Lengths.
        stride: Steps between elements, in elements.
        requires_grad: As in torch.
        parameter: Whether it is a ``torch.nn.Parameter``.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    parameter: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * ITEM_SIZES[self.dtype]

    @property
    def extent(self) -> tuple[int, int]:
        """First byte and byte after the last that it touches in its storage."""
        if 0 in self.shape:
            return 0, 0
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset * ITEM_SIZES[self.dtype], (last + 1) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class TorchValue:
    """A ``torch.dtype``, ``torch.device`` or ``torch.Size`` in a tree that was read without torch."""

    kind: str
    argument: Any

    def __repr__(self) -> str:
        if self.kind == "dtype":
            return f"torch.{self.argument}"
        return f"torch.{self.kind}({self.argument!r})"


class _RefBuilder:
    def tensor(
        self,
        storage: Storage,
        dtype: str,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *,
        requires_grad: bool,
    ) -> TensorRef:
        return TensorRef(storage, dtype, offset, shape, stride, requires_grad=requires_grad)

    def parameter(self, tensor: Any, *, requires_grad: bool) -> TensorRef:
        if not isinstance(tensor, TensorRef):
            raise TypeError("a parameter without a tensor")
        if requires_grad and not DIFFERENTIABLE.match(tensor.dtype):
            raise TypeError(f"a parameter of type {tensor.dtype} that requires a gradient")
        place = (tensor.storage, tensor.dtype, tensor.offset, tensor.shape, tensor.stride)
        return TensorRef(*place, requires_grad=requires_grad, parameter=True)

    def value(self, kind: str, argument: Any) -> TorchValue:
        return TorchValue(kind, argument)


def read_tree(archive: Archive) -> Any:
    """The tree that the archive's pickle describes; reads no tensor data.

    Raises:
        CorruptCheckpointError: if a tensor's record is missing or has another size.
        UnsafeCheckpointError: if it is not a finite tree of plain values and tensors.
    """
    name = archive.source.name
    if "byteorder" in archive.records and archive.content("byteorder", 16) != b"little":
        raise UnsafeCheckpointError(f"{name} was written on a big-endian machine; only little-endian files can be read")
    tree = parse(archive.pickle(), name)
    for path, leaf in walk(tree):
        if isinstance(leaf, TensorRef):
            record = archive.records.get(f"data/{leaf.storage.key}")
            if record is None or record.size != leaf.storage.nbytes:
                found = "is missing" if record is None else f"has {record.size} bytes instead of {leaf.storage.nbytes}"
                raise CorruptCheckpointError(name, f"data/{leaf.storage.key} ({path_text(path)})", found)
    return tree


def parse(data: bytes, name: str) -> Any:
    """The tree that a pickle describes; `name` is the file, for errors.

    Raises:
        UnsafeCheckpointError: if it is not a finite tree of plain values and tensors.
    """
    tree = unpickle(data, _RefBuilder(), name)
    _check(tree, name)
    return tree


def children(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key or index, child) for each child of a container; nothing for a leaf."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def walk(tree: Any) -> Iterator[tuple[Path, Any]]:
    """Each leaf with its path, in order. Empty containers count as leaves."""
    if type(tree) not in CONTAINERS or not tree:
        yield (), tree
        return
    path: list[Any] = []
    open_containers = [children(tree)]
    while open_containers:
        for key, child in open_containers[-1]:
            if type(child) in CONTAINERS and child:
                path.append(key)
                open_containers.append(children(child))
                break
            yield (*path, key), child
        else:
            open_containers.pop()
            del path[-1:]


def path_text(path: Path) -> str:
    """A path as Python would write it: ``optimizer[0][1]['state'][3]``."""
    if not path:
        return "the state itself"
    first, *rest = path
    start = first if isinstance(first, str) and first.isidentifier() else f"[{first!r}]"
    return start + "".join(f"[{key!r}]" for key in rest)


def storage_names(tree: Any) -> Callable[[str], str]:
    """A function from a record's name to the tensor in it, "" where it holds none."""
    holders: dict[str, str] = {}
    for path, leaf in walk(tree):
        if isinstance(leaf, TensorRef) and f"data/{leaf.storage.key}" not in holders:
            holders[f"data/{leaf.storage.key}"] = path_text(path)
    return lambda record: holders.get(record, "")


def _check(tree: Any, name: str) -> None:
    """Refuse cycles, deep nesting, and sharing that would unfold into many more values than there are."""
    sizes: dict[int, int] = {}
    open_ids: set[int] = set()
    repeated = 0

    def measure(value: Any, depth: int) -> int:
        nonlocal repeated
        if type(value) not in CONTAINERS:
            if not isinstance(value, (TensorRef, TorchValue)) and type(value) not in _LEAVES:
                raise UnsafeCheckpointError(
                    f"{name}: it holds a bare {type(value).__name__.strip('_')}, not plain data"
                )
            return 1
        if id(value) in sizes:
            repeated += sizes[id(value)]
            if repeated > _MAX_REPEATED:
                raise UnsafeCheckpointError(f"{name}: it unfolds into {_MAX_REPEATED:,} values more than it holds")
            return sizes[id(value)]
        if id(value) in open_ids or depth > MAX_DEPTH:
            kind = "contains itself" if id(value) in open_ids else f"is nested deeper than {MAX_DEPTH} levels"
            raise UnsafeCheckpointError(f"{name}: it {kind}, as no state does that this library or torch wrote")
        open_ids.add(id(value))
        inside = [child for _, child in children(value)]
        if hasattr(value, "_metadata"):
            inside.append(value._metadata)  # noqa: SLF001
        size = 1 + sum(measure(child, depth + 1) for child in inside)
        open_ids.remove(id(value))
        sizes[id(value)] = size
        return size

    measure(tree, 0)
