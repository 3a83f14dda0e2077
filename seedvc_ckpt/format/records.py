"""Which bytes of memory become which records: every tensor of a state at its own size, shared memory shared."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from seedvc_ckpt.errors import CheckpointError, UnsafeCheckpointError
from seedvc_ckpt.format.contents import CONTAINERS, MAX_DEPTH, Path, TensorRef, children, path_text
from seedvc_ckpt.format.unpickle import ITEM_SIZES, STORAGE_TYPES, Storage

__all__ = [
    "RecordSource",
    "advise_huge_pages",
    "collect_tensors",
    "dtype_name",
    "extent_of",
    "lay_out",
    "memory_of",
    "new_storage",
    "typed_storage",
]

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 0)
_madvise = ctypes.CDLL(None).madvise if _MADV_HUGEPAGE else None
_DTYPE_NAMES = {getattr(torch, name): name for name in ITEM_SIZES if hasattr(torch, name)}
_PLAIN = (type(None), bool, int, float, str)
_SPARED = 64 << 10  # gaps that a strided view may carry along before it is packed, bytes


@dataclass(slots=True)
class RecordSource:
    """A record to be written.

    Attributes:
        name: Below the archive's root.
        nbytes: Its size.
        read: Gives its bytes; called once, when they are written.
        memory: The address that they are read from then, 0 if not in one piece; None for bytes that nobody changes.
        on_device: Gives its bytes as a flat uint8 tensor where they lie on another device than the CPU.
        device: That device.
        crc: The CRC-32 of its bytes where `read` makes sure of it, else None.
    """

    name: str
    nbytes: int
    read: Callable[[], memoryview]
    memory: int | None = None
    on_device: Callable[[], torch.Tensor] | None = None
    device: torch.device | None = None
    crc: int | None = None


@dataclass
class _Extent:
    """A stretch of memory that one or several tensors cover."""

    start: int
    end: int
    members: list[torch.Tensor]


def collect_tensors(state: Any) -> tuple[list[torch.Tensor], bool]:
    """All tensors of a state, each once, in the order in which they are met; and whether all else is plainly plain.

    Raises:
        UnsafeCheckpointError: for a tensor that can't be saved, and for a state that is nested too deep or contains
            itself, naming the path.
    """
    found: dict[int, torch.Tensor] = {}
    open_ids: set[int] = set()
    done: set[int] = set()
    plain = True

    def visit(value: Any, path: Path) -> None:
        nonlocal plain
        if isinstance(value, torch.Tensor):
            if id(value) not in found:
                _refuse_unusual(value, path)
                found[id(value)] = value
            return
        if not isinstance(value, CONTAINERS):
            plain = plain and type(value) in _PLAIN
            return
        if id(value) in done:
            return
        if id(value) in open_ids or len(path) > MAX_DEPTH:
            problem = "contains itself" if id(value) in open_ids else f"nests deeper than {MAX_DEPTH} levels"
            raise UnsafeCheckpointError(f"the state {problem} at {path_text(path)[:200]}: flatten it before saving")
        open_ids.add(id(value))
        plain = plain and type(value) in CONTAINERS
        for key, child in children(value):
            plain = plain and type(key) in _PLAIN
            visit(child, (*path, key))
        open_ids.remove(id(value))
        done.add(id(value))

    visit(state, ())
    return list(found.values()), plain


def lay_out(tensors: Iterable[torch.Tensor]) -> tuple[dict[int, TensorRef], list[RecordSource]]:
    """Assign each tensor, by its id, its place in a record, and list the records in the order of the tensors.

    Tensors whose memory overlaps share a record and keep their strides. A tensor that shares with none gets a record
    of its own size; one with wide gaps between its elements is packed.
    """
    # conjugation and negation may be pending on a view; in the file they are done
    plain = {id(tensor): tensor.resolve_conj().resolve_neg() for tensor in tensors}
    extents = {id(tensor): extent for extent in _merge(list(plain.values())) for tensor in extent.members}
    keys = map(str, count())
    refs: dict[int, TensorRef] = {}
    records: list[RecordSource] = []
    placed: dict[int, tuple[Storage, int]] = {}
    for original, tensor in plain.items():
        extent = extents[id(tensor)]
        alone, nbytes = len(extent.members) == 1, tensor.nbytes
        if alone and (extent.end - extent.start - nbytes > max(_SPARED, nbytes) or not nbytes):
            storage, record = _packed_record(tensor, next(keys))
            records.append(record)
            refs[original] = _ref(tensor, storage, 0, torch.empty(tensor.shape, device="meta").stride())
            continue
        if id(extent) not in placed:
            storage, record, start = _shared_record(extent, next(keys))
            records.append(record)
            placed[id(extent)] = storage, start
        storage, start = placed[id(extent)]
        offset, rest = divmod(tensor.data_ptr() - start, tensor.element_size())
        if rest:
            raise UnsafeCheckpointError(
                "the state has tensors that view the same memory at odd distances: clone() one of them before saving"
            )
        refs[original] = _ref(tensor, storage, offset, tensor.stride())
    return refs, records


def new_storage(nbytes: int) -> torch.UntypedStorage:
    """CPU memory, not initialised.

    Raises:
        CheckpointError: if there is not enough.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
    except RuntimeError:
        raise CheckpointError(
            f"no memory for a tensor of {nbytes:,} bytes: load with mmap=True, which reads what is used"
        ) from None


def advise_huge_pages(address: int, nbytes: int) -> None:
    """Ask for memory in pages of 2 MB, where the system has them; the first touch then takes a fraction of the time."""
    start, end = -(-address // _HUGE_PAGE) * _HUGE_PAGE, (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if start < end and _madvise is not None:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)


def memory_of(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a CPU storage, writable and not copied; keeps the storage alive."""
    return _memory(storage, storage.data_ptr(), storage.nbytes())


def _memory(owner: object, address: int, size: int) -> memoryview:
    if not size:
        return memoryview(bytearray())
    memory = (ctypes.c_char * size).from_address(address)
    memory._owner = owner  # type: ignore[attr-defined]  # noqa: SLF001 - lives as long as the view
    return memoryview(memory).cast("B")


def dtype_name(tensor: torch.Tensor) -> str:
    """Its dtype's name below ``torch``."""
    return _DTYPE_NAMES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")


def extent_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses between which its elements lie, gaps included."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    reach = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size() if tensor.numel() else start


def _merge(tensors: list[torch.Tensor]) -> list[_Extent]:
    """The tensors grouped by overlapping memory."""
    merged: list[_Extent] = []
    last: dict[torch.device, _Extent] = {}
    for tensor in sorted(tensors, key=torch.Tensor.data_ptr):
        start, end = extent_of(tensor)
        before = last.get(tensor.device)
        if before and start < before.end and start < end:
            before.end = max(before.end, end)
            before.members.append(tensor)
        else:
            merged.append(_Extent(start, end, [tensor]))
            if start < end:
                last[tensor.device] = merged[-1]
    return merged


def _ref(tensor: torch.Tensor, storage: Storage, offset: int, stride: tuple[int, ...]) -> TensorRef:
    return TensorRef(
        storage,
        dtype_name(tensor),
        offset,
        tuple(tensor.shape),
        tuple(stride),
        requires_grad=tensor.requires_grad,
        parameter=type(tensor) is torch.nn.Parameter,
    )


def _packed_record(tensor: torch.Tensor, key: str) -> tuple[Storage, RecordSource]:
    storage = typed_storage(key, {dtype_name(tensor)}, tensor.numel() * tensor.element_size())

    def dense() -> torch.Tensor:
        return tensor.detach().contiguous().flatten().view(torch.uint8)

    return storage, _record(f"data/{key}", storage.nbytes, dense, tensor.device, 0)


def _record(
    name: str, nbytes: int, dense: Callable[[], torch.Tensor], device: torch.device, memory: int
) -> RecordSource:
    def read() -> memoryview:
        copied = dense().cpu()
        return _memory(copied, copied.data_ptr(), nbytes)

    elsewhere = device.type != "cpu"
    return RecordSource(name, nbytes, read, memory, dense if elsewhere else None, device if elsewhere else None)


def _shared_record(extent: _Extent, key: str) -> tuple[Storage, RecordSource, int]:
    first = extent.members[0]
    dtypes = {dtype_name(member) for member in extent.members}
    base, start = 0, extent.start
    if len(dtypes) > 1 or not first.is_cpu:
        base = first.untyped_storage().data_ptr()
    if len(dtypes) > 1:  # elements of every type must begin at multiples of their size
        start = base + (extent.start - base) // 16 * 16
    nbytes = extent.end - start
    storage = typed_storage(key, dtypes, nbytes)
    if first.is_cpu:
        return storage, RecordSource(f"data/{key}", nbytes, partial(_memory, first, start, nbytes), start), start

    def dense() -> torch.Tensor:
        flat = torch.empty(0, dtype=torch.uint8, device=first.device)
        return flat.set_(first.untyped_storage(), start - base, (nbytes,), (1,))

    return storage, _record(f"data/{key}", nbytes, dense, first.device, start), start


def typed_storage(key: str, dtypes: set[str], nbytes: int) -> Storage:
    """The storage that torch's own files would have for these types."""
    (dtype,) = dtypes if len(dtypes) == 1 else {"uint8"}
    kind = dtype if dtype in STORAGE_TYPES else "uint8"
    return Storage(key, kind, nbytes // ITEM_SIZES[kind])


def _refuse_unusual(tensor: torch.Tensor, path: Path) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        if type(tensor).__name__ == "DTensor":
            hint = "a DTensor: save what tensor.full_tensor() gives, from rank 0"
        else:
            hint = f"a {type(tensor).__name__}, not a plain tensor: convert it first"
        raise UnsafeCheckpointError(f"{path_text(path)} can't be saved: it is {hint}")
    if tensor.device.type == "meta":
        raise UnsafeCheckpointError(f"{path_text(path)} can't be saved: it is on the meta device and has no data")
    if tensor.layout is not torch.strided or tensor.is_quantized or dtype_name(tensor) not in ITEM_SIZES:
        what = f"{tensor.layout}, {tensor.dtype}"
        raise UnsafeCheckpointError(f"{path_text(path)} can't be saved: {what}. Save the dense tensors it is made of")
    if vars(tensor):
        names = ", ".join(vars(tensor))
        raise UnsafeCheckpointError(
            f"{path_text(path)} has Python attributes ({names}) that would be lost: save its detach()"
        )
