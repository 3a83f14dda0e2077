"""Tensors copied from one file to another, one at a time, checked and converted on the way."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping

import torch

from seedvc_ckpt.checkpoint import Manifest
from seedvc_ckpt.errors import ExportError
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.format.contents import TensorRef
from seedvc_ckpt.format.records import RecordSource, dtype_name, memory_of, new_storage
from seedvc_ckpt.format.torchzip import Encoded, encode_tree
from seedvc_ckpt.format.unpickle import ITEM_SIZES, Storage

__all__ = ["Safetensors", "as_safetensors", "as_torch_zip", "floating_dtype"]

Weights = Mapping[str, Mapping[str, TensorRef]]
"""The tensors of each module by their names."""

_SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype that an export converts to.

    Raises:
        ExportError: if it is not one of float64, float32, float16 and bfloat16.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ("float64", "float32", "float16", "bfloat16"):
        raise ExportError(f"can't export as {name}: choose float32, float16, bfloat16 or float64")
    found: torch.dtype = getattr(torch, name)
    return found


def as_torch_zip(
    archive: Archive,
    weights: Weights,
    manifest: Manifest,
    dtype: torch.dtype | None,
    *,
    allow_non_finite: bool,
) -> Encoded:
    """``{"net": weights}`` as a torch zip file; tensors that share memory go on sharing it."""
    by_storage: dict[str, list[tuple[str, TensorRef]]] = {}
    for module, tensors in weights.items():
        for name, ref in tensors.items():
            by_storage.setdefault(ref.storage.key, []).append((f"{module}.{name}", ref))
    moved: dict[int, TensorRef] = {}
    records = []
    for key, (record_name, users) in enumerate(by_storage.items()):
        start, end = _extent([ref for _, ref in users])
        target, old = _target(users, dtype), users[0][1].storage
        held = users[0][1].dtype if target else old.dtype
        new = Storage(str(key), target or old.dtype, (end - start) // ITEM_SIZES[held])
        for _, ref in users:
            offset = ref.offset - start // ITEM_SIZES[ref.dtype]
            place = (new, target or ref.dtype, offset, ref.shape, ref.stride)
            moved.setdefault(id(ref), TensorRef(*place))
        convert = _converter(users, dtype, allow_non_finite=allow_non_finite)
        read = _reader(archive, f"data/{record_name}", users[0][0], (start, end), convert)
        records.append(RecordSource(f"data/{key}", new.nbytes, read))
    net = {module: {name: moved[id(ref)] for name, ref in tensors.items()} for module, tensors in weights.items()}
    return encode_tree({"net": net}, records, manifest)


class Safetensors:
    """A safetensors file, ready to be written: iterating gives its bytes in order, once.

    Layout: https://huggingface.co/docs/safetensors/index#format. Written here because the library's own writer needs
    the whole file in memory.

    Attributes:
        size: Bytes of the file.
    """

    def __init__(self, records: list[tuple[str, tuple[int, ...], RecordSource]], metadata: dict[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": metadata}
        offset = 0
        for dtype, shape, record in records:
            end = offset + record.nbytes
            header[record.name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        self._head = struct.pack("<Q", len(text) + -len(text) % 8) + text.ljust(len(text) + -len(text) % 8)
        self._records = records
        self.size = len(self._head) + offset

    def __iter__(self) -> Iterator[memoryview]:
        yield memoryview(self._head)
        for *_, record in self._records:
            yield record.read()


def as_safetensors(
    archive: Archive,
    weights: Weights,
    manifest: Manifest,
    dtype: torch.dtype | None,
    *,
    allow_non_finite: bool,
) -> Safetensors:
    """The weights under names such as ``cfm.estimator.input_pos``, the manifest in the header."""
    records = []
    for module, tensors in weights.items():
        for name, ref in tensors.items():
            users = [(f"{module}.{name}", ref)]
            target = _target(users, dtype) or ref.dtype
            if target not in _SAFETENSORS_DTYPES:
                raise ExportError(f"safetensors has no type for {module}.{name} ({target}): export to .pth")
            convert = _converter(users, dtype, allow_non_finite=allow_non_finite)
            dense = _dense_reader(archive, f"{module}.{name}", ref, convert)
            record = RecordSource(f"{module}.{name}", ref.numel * ITEM_SIZES[target], dense)
            records.append((ITEM_SIZES[target], _SAFETENSORS_DTYPES[target], ref.shape, record))
    # readers want each tensor at a multiple of its element size: largest elements first, without gaps
    records.sort(key=lambda record: -record[0])
    return Safetensors([record[1:] for record in records], {"format": "pt", "seedvc_ckpt": manifest.to_json().decode()})


def _extent(refs: list[TensorRef]) -> tuple[int, int]:
    """The bytes of a storage that these tensors touch, widened to whole elements of every type."""
    extents = [ref.extent for ref in refs if 0 not in ref.shape]
    if not extents:
        return 0, 0
    if len({ref.dtype for ref in refs}) > 1:
        return 0, refs[0].storage.nbytes
    return min(start for start, _ in extents), max(end for _, end in extents)


def _target(users: list[tuple[str, TensorRef]], dtype: torch.dtype | None) -> str | None:
    """The name of the type that the tensors of a record are converted to, None where they stay as they are."""
    ref = users[0][1]
    if dtype is None or not getattr(torch, ref.dtype).is_floating_point:
        return None
    if any(other.dtype != ref.dtype for _, other in users):
        names = ", ".join(name for name, _ in users)
        raise ExportError(f"can't convert {names} to {dtype}: they share memory as different types")
    return str(dtype).removeprefix("torch.")


def _converter(
    users: list[tuple[str, TensorRef]], dtype: torch.dtype | None, *, allow_non_finite: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """From the bytes of a record, as uint8, to the bytes to be written; refuses what is not finite."""
    name, ref = users[0]
    source: torch.dtype = getattr(torch, ref.dtype)
    if not (source.is_floating_point or source.is_complex):
        return lambda content: content

    def convert(content: torch.Tensor) -> torch.Tensor:
        values = content.view(source)
        _refuse_non_finite(name, values, "", allowed=allow_non_finite)
        if dtype is None or dtype == source or not source.is_floating_point:
            return content
        converted = values.to(dtype)
        _refuse_non_finite(name, converted, f" as {dtype_name(converted)}", allowed=allow_non_finite)
        return converted.view(torch.uint8)

    return convert


def _refuse_non_finite(name: str, values: torch.Tensor, how: str, *, allowed: bool) -> None:
    if allowed:
        return
    # not every type has isfinite; those without are narrower than float32
    wide = values if values.element_size() > 1 else values.float()
    bad = int((~torch.isfinite(wide)).sum())
    if bad:
        raise ExportError(
            f"{name} has {bad:,} values that are not finite{how}: the model would produce noise or silence. Export an "
            "earlier step, or allow non-finite weights if you want them all the same"
        )


def _reader(
    archive: Archive,
    record: str,
    holds: str,
    extent: tuple[int, int],
    convert: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[], memoryview]:
    def read() -> memoryview:
        storage = new_storage(archive.records[record].size)
        archive.fill(record, memory_of(storage), holds=holds)
        content = torch.empty(0, dtype=torch.uint8).set_(storage)
        return _bytes_of(convert(content[slice(*extent)]))

    return read


def _dense_reader(
    archive: Archive, name: str, ref: TensorRef, convert: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], memoryview]:
    def read() -> memoryview:
        record = f"data/{ref.storage.key}"
        storage = new_storage(archive.records[record].size)
        archive.fill(record, memory_of(storage), holds=name)
        tensor = torch.empty(0, dtype=getattr(torch, ref.dtype))
        tensor.set_(storage, ref.offset, ref.shape, ref.stride)
        return _bytes_of(convert(tensor.contiguous().flatten().view(torch.uint8)))

    return read


def _bytes_of(content: torch.Tensor) -> memoryview:
    content = content.contiguous()
    start = content.storage_offset()
    return memory_of(content.untyped_storage())[start : start + content.numel()]
