"""Tensors copied from one file to another, one at a time, checked and converted on the way."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from seedvc_ckpt.errors import ExportError
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.format.contents import TensorRef
from seedvc_ckpt.format.reading import TensorReader
from seedvc_ckpt.format.records import RecordSource, dtype_name, memory_of, typed_storage
from seedvc_ckpt.format.torchzip import Encoded, encode_tree
from seedvc_ckpt.format.unpickle import ITEM_SIZES
from seedvc_ckpt.manifest import Manifest

__all__ = ["Safetensors", "as_safetensors", "as_torch_zip", "floating_dtype", "non_finite"]

Weights = Mapping[str, Mapping[str, TensorRef]]
"""The tensors of each module by their names."""

_Convert = Callable[[torch.Tensor], torch.Tensor]

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
    reader = TensorReader(archive)
    moved: dict[int, TensorRef] = {}
    _announce(archive, weights)
    records = []
    for key, users in enumerate(_sharing(weights)):
        convert = _converter(*users[0], dtype, allow_non_finite=allow_non_finite)
        alone = len({replace(ref, requires_grad=False, parameter=False) for _, ref in users}) == 1
        make = _dense_record if alone else _shared_record
        record, refs = make(reader, str(key), users, _target(users[0][1], dtype), convert)
        records.append(record)
        moved.update(zip([id(ref) for _, ref in users], refs, strict=True))
    net = {module: {name: moved[id(ref)] for name, ref in tensors.items()} for module, tensors in weights.items()}
    return encode_tree({"net": net}, records, manifest)


def non_finite(
    archive: Archive, tensors: Mapping[str, TensorRef], progress: Callable[[int], None] = lambda _: None
) -> dict[str, int]:
    """How many values of each tensor are NaN or infinite, where any are; every record is checked on the way.

    Raises:
        CorruptCheckpointError: if one is damaged.
    """
    reader, found = TensorReader(archive), {}
    archive.announce({f"data/{ref.storage.key}" for ref in tensors.values()})
    for name, ref in tensors.items():
        content = reader.elements(ref, name)
        if content.is_floating_point() or content.is_complex():
            count = _count_non_finite(content)
            if count:
                found[name] = count
        progress(ref.nbytes)
    return found


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
            header[record.name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
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
    reader = TensorReader(archive)
    _announce(archive, weights)
    records: dict[str, tuple[str, tuple[int, ...], RecordSource]] = {}
    for name, ref in _named(weights):
        kind = _target(ref, dtype)
        if kind not in _SAFETENSORS_DTYPES:
            raise ExportError(f"safetensors has no type for {name} ({kind}): export to .pth")
        if name in records:
            raise ExportError(f"two tensors would both be called {name}: export to .pth")
        convert = _converter(name, ref, dtype, allow_non_finite=allow_non_finite)
        source = RecordSource(name, ref.numel * ITEM_SIZES[kind], _dense_reader(reader, name, ref, convert))
        records[name] = kind, ref.shape, source
    # readers want each tensor at a multiple of its element size: largest elements first, without gaps
    in_order = sorted(records.values(), key=lambda record: -ITEM_SIZES[record[0]])
    return Safetensors(in_order, {"format": "pt", "seedvc_ckpt": manifest.to_json().decode()})


def _named(weights: Weights) -> Iterator[tuple[str, TensorRef]]:
    for module, tensors in weights.items():
        for name, ref in tensors.items():
            yield f"{module}.{name}", ref


def _announce(archive: Archive, weights: Weights) -> None:
    archive.announce({f"data/{ref.storage.key}" for _, ref in _named(weights)})


def _sharing(weights: Weights) -> list[list[tuple[str, TensorRef]]]:
    """The tensors in groups: those of one group overlap in memory, or are one and the same."""
    order = {id(ref): number for number, (_, ref) in reversed([*enumerate(_named(weights))])}
    found: list[list[tuple[str, TensorRef]]] = []
    end = 0
    for name, ref in sorted(
        _named(weights), key=lambda user: (user[1].storage.key, user[1].extent[0], order[id(user[1])])
    ):
        before = found[-1][-1][1] if found else None
        if before is ref or (before and before.storage == ref.storage and ref.extent[0] < min(end, ref.extent[1])):
            found[-1].append((name, ref))
            end = max(end, ref.extent[1])
        else:
            found.append([(name, ref)])
            end = ref.extent[1]
    for users in found:
        if len({ref.dtype for _, ref in users}) > 1:
            raise ExportError(f"{', '.join(name for name, _ in users)} share memory as different types")
    return sorted(found, key=lambda users: order[id(users[0][1])])


def _dense_record(
    reader: TensorReader, key: str, users: list[tuple[str, TensorRef]], kind: str, convert: _Convert
) -> tuple[RecordSource, list[TensorRef]]:
    name, ref = users[0]
    storage = typed_storage(key, {kind}, ref.numel * ITEM_SIZES[kind])
    stride = torch.empty(ref.shape, device="meta").stride()
    refs = [TensorRef(storage, kind, 0, ref.shape, stride) for _ in users]
    as_it_is = kind == ref.dtype and ref.extent == (0, ref.storage.nbytes) and ref.stride == stride
    crc = reader.crc(ref.storage) if as_it_is else None
    return RecordSource(f"data/{key}", storage.nbytes, _dense_reader(reader, name, ref, convert), crc=crc), refs


def _shared_record(
    reader: TensorReader, key: str, users: list[tuple[str, TensorRef]], kind: str, convert: _Convert
) -> tuple[RecordSource, list[TensorRef]]:
    name, first = users[0]
    start, end = min(ref.extent[0] for _, ref in users), max(ref.extent[1] for _, ref in users)
    size = ITEM_SIZES[first.dtype]
    storage = typed_storage(key, {kind}, (end - start) // size * ITEM_SIZES[kind])
    refs = [TensorRef(storage, kind, ref.offset - start // size, ref.shape, ref.stride) for _, ref in users]

    def read() -> memoryview:
        return _bytes_of(convert(reader.stretch(first.storage, start, end, name)))

    return RecordSource(f"data/{key}", storage.nbytes, read), refs


def _target(ref: TensorRef, dtype: torch.dtype | None) -> str:
    """The name of the type that a tensor is exported as."""
    floating = getattr(torch, ref.dtype).is_floating_point
    return str(dtype).removeprefix("torch.") if dtype and floating else ref.dtype


def _converter(name: str, ref: TensorRef, dtype: torch.dtype | None, *, allow_non_finite: bool) -> _Convert:
    """From the bytes of a tensor, as uint8, to the bytes to be written; refuses what is not finite."""
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
    bad = 0 if allowed else _count_non_finite(values)
    if bad:
        raise ExportError(
            f"{name} has {bad:,} values that are not finite{how}: the model would produce noise or silence. Export an "
            "earlier step, or allow non-finite weights if you want them all the same"
        )


def _count_non_finite(values: torch.Tensor) -> int:
    # not every type has isfinite; those without are narrower than float32
    wide = values if values.element_size() > 1 else values.float()
    # a sum is finite only if all its terms are; finding it takes a fraction of the time
    real = torch.view_as_real(wide) if wide.is_complex() else wide
    if math.isfinite(real.sum(dtype=torch.promote_types(real.dtype, torch.float32)).item()):
        return 0
    return int((~torch.isfinite(wide)).sum())


def _dense_reader(reader: TensorReader, name: str, ref: TensorRef, convert: _Convert) -> Callable[[], memoryview]:
    return lambda: _bytes_of(convert(reader.elements(ref, name).view(torch.uint8)))


def _bytes_of(content: torch.Tensor) -> memoryview:
    content = content.contiguous()
    start = content.storage_offset()
    return memory_of(content.untyped_storage())[start : start + content.numel()]
