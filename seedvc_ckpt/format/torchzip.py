"""States of tensors to the bytes of a torch zip file, and back."""

from __future__ import annotations

import io
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from seedvc_ckpt.errors import UnsafeCheckpointError
from seedvc_ckpt.format import contents
from seedvc_ckpt.format import zipbytes as zb
from seedvc_ckpt.format.archive import MANIFEST, MAX_MANIFEST, MAX_PICKLE, MAX_RECORDS, PICKLE, ROOT, Archive
from seedvc_ckpt.format.contents import CONTAINERS, Path, TensorRef, children, path_text
from seedvc_ckpt.format.records import RecordSource, collect_tensors, lay_out, memory_of, new_storage
from seedvc_ckpt.format.unpickle import STORAGE_TYPES, Storage, unpickle
from seedvc_ckpt.format.zipbytes import Record
from seedvc_ckpt.manifest import Manifest
from seedvc_ckpt.threads import ahead, in_parallel

__all__ = ["Encoded", "decode", "encode", "encode_tree"]

_LARGE = 1 << 20  # bytes; what is smaller is joined before it is written
_WORTH_A_THREAD = 8 << 20  # bytes of a file; below, starting a thread takes longer than it saves
_PROTOCOL = 2  # the newest that torch's weights_only reader knows


class Encoded:
    """A checkpoint file, ready to be written: iterating gives its bytes in order, once.

    Attributes:
        manifest: The manifest inside.
        records: What is in it.
    """

    def __init__(
        self, records: Sequence[RecordSource], manifest: Manifest, check: Callable[[], object] = lambda: None
    ) -> None:
        self.manifest = manifest
        self.records = records
        self.check = check

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        offset = 0
        placed = []
        for record in self.records:
            name = f"{ROOT}/{record.name}"
            placed.append(Record(name, record.nbytes, 0, offset))
            offset += zb.local_header_size(name, record.nbytes, offset) + record.nbytes
        return offset + len(zb.directory_bytes(placed, offset))

    def with_records(self, records: Sequence[RecordSource]) -> Encoded:
        """The same file, its records' bytes read from elsewhere."""
        return Encoded(records, self.manifest, self.check)

    def of_epoch(self, epoch: int | None) -> Encoded:
        """The same file, its manifest naming the lease under which it is written."""
        if epoch is None:
            return self
        manifest = self.manifest.model_copy(update={"lease_epoch": epoch})
        changed = _constant(MANIFEST, manifest.to_json())
        return Encoded([changed if old.name == MANIFEST else old for old in self.records], manifest, self.check)

    def __iter__(self) -> Iterator[memoryview]:
        chunks = _in_large_chunks(self._chunks())
        return ahead(chunks) if self.size >= _WORTH_A_THREAD else chunks

    def _chunks(self) -> Iterator[memoryview]:
        offset = 0
        written: list[Record] = []
        for source in self.records:
            content = source.read()
            crc = zlib.crc32(content) if source.crc is None else source.crc
            record = Record(f"{ROOT}/{source.name}", source.nbytes, crc, offset)
            header = zb.local_header(record)
            yield memoryview(header)
            yield content
            offset += len(header) + len(content)
            written.append(record)
        self.check()  # here it costs no time: the records are still being written
        yield memoryview(zb.directory_bytes(written, offset))


def _in_large_chunks(chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same bytes with small chunks joined; large ones are passed on as they are, not copied."""
    joined = bytearray()
    for chunk in chunks:
        if len(chunk) < _LARGE:
            joined += chunk
        if joined and (len(chunk) >= _LARGE or len(joined) >= _LARGE):
            yield memoryview(joined)
            joined = bytearray()
        if len(chunk) >= _LARGE:
            yield chunk
    if joined:
        yield memoryview(joined)


def encode(state: Any, manifest: Manifest, *, check_later: bool = False) -> Encoded:
    """A state as a file. Tensors are read when the result is iterated, and must not change until then.

    Args:
        state: What to save.
        manifest: What the file says of itself.
        check_later: Where all else is plainly plain, read the pickle back with a reader's eyes only when the result is
            iterated; such a failure can't name the path to its cause.

    Raises:
        UnsafeCheckpointError: for a state that could not be loaded again, naming the path to the part at fault.
    """
    tensors, plain = collect_tensors(state)
    refs, records = lay_out(tensors)
    manifest = manifest.model_copy(update={"torch": torch.__version__})
    if plain and check_later:
        data = _pickled(state, refs)
        return _encoded(data, len(refs), records, manifest, partial(_check, data))
    return _encoded(_checked_pickle(state, refs), len(refs), records, manifest)


def encode_tree(tree: Any, records: list[RecordSource], manifest: Manifest) -> Encoded:
    """A tree of plain values and `TensorRef` leaves as a file, its tensors' records given."""
    tensors = {id(leaf) for _, leaf in contents.walk(tree) if isinstance(leaf, TensorRef)}
    return _encoded(_checked_pickle(tree, {}), len(tensors), records, manifest)


def decode(
    archive: Archive, *, map_location: str | torch.device = "cpu", verify: bool = True, mmap: bool = False
) -> Any:
    """The state in a file.

    Args:
        archive: The open file.
        map_location: Device of all tensors.
        verify: Check every byte before any tensor is used.
        mmap: Map the file instead of reading it, where the source can; changes to the tensors stay in memory.

    Raises:
        CorruptCheckpointError: if a byte is not as it was written.
        UnsafeCheckpointError: if it holds more than plain data and tensors.
    """
    data, name = archive.pickle(), archive.source.name
    tree = contents.read_tree(archive)
    holds = contents.storage_names(tree)
    keys = {
        f"data/{leaf.storage.key}": leaf.storage.key for _, leaf in contents.walk(tree) if isinstance(leaf, TensorRef)
    }
    if verify:
        archive.check_layout()
        for record in archive.records:
            if record not in keys:
                archive.verify_record(record)
    device = torch.device(map_location)
    loaded: dict[str, torch.UntypedStorage] = {}

    def done(record: str, storage: torch.UntypedStorage) -> None:
        loaded[keys[record]] = storage if device.type == "cpu" else _moved(storage, device)

    mapped = archive.source.map() if mmap else None
    if mapped is not None:
        part = partial(_part, archive, mapped, verify=verify, holds=holds)

        def load(record: str) -> None:
            done(record, part(record))

        in_parallel([partial(load, record) for record in keys])
    else:
        storages = {record: new_storage(archive.records[record].size) for record in keys}
        archive.read_records(
            keys,
            lambda record: memory_of(storages[record]),
            lambda record: done(record, storages.pop(record)),
            verify=verify,
            holds=holds,
        )
    return unpickle(data, _TensorBuilder(loaded), name)


class _TensorBuilder:
    """Builds real tensors over loaded storages."""

    def __init__(self, storages: Mapping[str, torch.UntypedStorage]) -> None:
        self.storages = storages

    def tensor(
        self,
        storage: Storage,
        dtype: str,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *,
        requires_grad: bool,
    ) -> torch.Tensor:
        memory = self.storages[storage.key]
        tensor = torch.empty(0, dtype=getattr(torch, dtype), device=memory.device)
        return tensor.set_(memory, offset, shape, stride).requires_grad_(requires_grad)

    def parameter(self, tensor: Any, *, requires_grad: bool) -> torch.nn.Parameter:
        return torch.nn.Parameter(tensor.detach(), requires_grad=requires_grad)

    def value(self, kind: str, argument: Any) -> Any:
        if kind == "dtype":
            return getattr(torch, argument)
        return {"device": torch.device, "Size": torch.Size}[kind](argument)


class _Pickler(pickle.Pickler):
    """Pickles a state with each tensor replaced by a reference to its record, as torch's own files have it."""

    def __init__(self, file: io.BytesIO, refs: Mapping[int, TensorRef]) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self.refs = refs

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _rebuilding(self.refs[id(value)])
        if isinstance(value, TensorRef):
            return _rebuilding(value)
        return NotImplemented

    def persistent_id(self, value: Any) -> Any:
        return value.identity if type(value) is _StorageId else None


class _StorageId:
    """Stands for a storage in a pickle, until `_Pickler.persistent_id` names it."""

    __slots__ = ("identity",)

    def __init__(self, storage: Storage, kind: type) -> None:
        self.identity = ("storage", kind, storage.key, "cpu", storage.numel)


def _rebuilding(ref: TensorRef) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The call by which torch makes the tensor again: torch/_utils.py, the names its unpickler knows."""
    if ref.parameter:
        data = replace(ref, parameter=False, requires_grad=False)
        return torch._utils._rebuild_parameter, (data, ref.requires_grad, OrderedDict())  # noqa: SLF001
    typed = ref.dtype == ref.storage.dtype
    kind = getattr(torch, STORAGE_TYPES[ref.dtype]) if typed else torch.storage.UntypedStorage
    place: tuple[Any, ...] = (
        _StorageId(ref.storage, kind),
        ref.offset,
        ref.shape,
        ref.stride,
        ref.requires_grad,
        OrderedDict(),
    )
    if typed:
        return torch._utils._rebuild_tensor_v2, place  # noqa: SLF001
    return torch._utils._rebuild_tensor_v3, (*place, getattr(torch, ref.dtype))  # noqa: SLF001


def _encoded(
    data: bytes,
    tensors: int,
    records: list[RecordSource],
    manifest: Manifest,
    check: Callable[[], object] = lambda: None,
) -> Encoded:
    manifest = manifest.model_copy(
        update={"tensors": tensors, "tensor_bytes": sum(record.nbytes for record in records)}
    )
    # what a reader needs first stands at the end, next to the directory: one read fetches it all
    small = {"version": b"3\n", "byteorder": b"little", PICKLE: data, MANIFEST: manifest.to_json()}
    if len(small[MANIFEST]) > MAX_MANIFEST or len(records) + len(small) > MAX_RECORDS:
        raise UnsafeCheckpointError(
            f"a checkpoint has at most {MAX_RECORDS:,} records and {MAX_MANIFEST:,} bytes of manifest: this one would "
            f"have {len(records) + len(small):,} and {len(small[MANIFEST]):,}. Stack tensors, or give fewer metrics"
        )
    return Encoded([*records, *(_constant(name, content) for name, content in small.items())], manifest, check)


def _constant(name: str, content: bytes) -> RecordSource:
    return RecordSource(name, len(content), lambda: memoryview(content))


def _checked_pickle(state: Any, refs: Mapping[int, TensorRef]) -> bytes:
    """The pickle of a state, read back once with the eyes of a reader.

    Raises:
        UnsafeCheckpointError: naming the path to what can't be read back.
    """
    try:
        return _pickle_and_read(state, refs)
    except Exception as error:  # noqa: BLE001 - whatever a foreign object's own pickling raises
        path, value = _culprit(state, refs)
        reason = str(error) if isinstance(error, UnsafeCheckpointError) else f"{type(error).__name__}: {error}"
        raise UnsafeCheckpointError(
            f"{path_text(path)} ({type(value).__module__}.{type(value).__qualname__}) can't be saved, since it could "
            f"not be loaded again: {reason.partition(': ')[2].partition('. Nothing')[0] or reason}. Convert it to "
            "numbers, strings, lists, dicts or tensors"
        ) from None


def _pickle_and_read(state: Any, refs: Mapping[int, TensorRef]) -> bytes:
    data = _pickled(state, refs)
    _check(data)
    return data


def _pickled(state: Any, refs: Mapping[int, TensorRef]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, refs).dump(state)
    return buffer.getvalue()


def _check(data: bytes) -> None:
    contents.parse(data, "the state")
    if len(data) > MAX_PICKLE:
        raise UnsafeCheckpointError(
            f"the state: {len(data):,} bytes besides its tensors, more than the {MAX_PICKLE:,} that are read: make "
            "tensors of large lists, strings and bytes"
        )


def _culprit(value: Any, refs: Mapping[int, TensorRef], path: Path = ()) -> tuple[Path, Any]:
    """The smallest part of `value` that can't be pickled and read back by itself."""
    for key, child in children(value) if type(value) in CONTAINERS else ():
        try:
            _pickle_and_read(child, refs)
        except Exception:  # noqa: BLE001 - the same failures as above, one level further down
            return _culprit(child, refs, (*path, key))
    return path, value


def _part(
    archive: Archive, mapped: memoryview, name: str, *, verify: bool, holds: Callable[[str], str]
) -> torch.UntypedStorage:
    """A record where it lies in the mapped file."""
    start, size = archive.data_offset(name), archive.records[name].size
    if verify:
        archive.check(name, mapped[start : start + size], holds(name))
    if not size:
        return new_storage(0)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=start, count=size).untyped_storage()


def _moved(storage: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).to(device).untyped_storage()
