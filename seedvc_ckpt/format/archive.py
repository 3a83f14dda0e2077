"""A torch zip file, read with suspicion: its directory, its records, their checksums. Needs no torch."""

from __future__ import annotations

import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from seedvc_ckpt.errors import CorruptCheckpointError, UnsafeCheckpointError
from seedvc_ckpt.format import Readable, Source
from seedvc_ckpt.format import zipbytes as zb
from seedvc_ckpt.format.checksum import combined
from seedvc_ckpt.format.zipbytes import Record

if TYPE_CHECKING:
    from seedvc_ckpt.manifest import Manifest

__all__ = ["MANIFEST", "MAX_MANIFEST", "MAX_PICKLE", "MAX_RECORDS", "PICKLE", "ROOT", "Archive", "read"]

ROOT = "archive"
PICKLE = "data.pkl"
MANIFEST = "seedvc_ckpt.json"

MAX_RECORDS = 1 << 18
MAX_PICKLE = 64 << 20
MAX_MANIFEST = 1 << 20
_MAX_DIRECTORY = 64 << 20
_TAIL = 64 << 10
_CHUNK = 1 << 20  # bytes that are read and checked while the processor's cache holds them
_STRETCH = 32 << 20  # bytes that one thread reads after each other, by one request where they are far away
_SHORTEST = 4 << 20  # bytes; shorter stretches would be many requests
_SHARES = 12  # stretches of a small file: enough for all threads
_GAP = 64 << 10  # bytes between two records that cost less than another request
_KNOWN_FLAGS = 0x0808  # sizes after the data, names in UTF-8: what torch itself sets
_DESCRIPTOR_FLAG = 0x0008
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # after the pickle's protocol and, in some, its length


@dataclass(frozen=True)
class Archive:
    """The directory of a torch zip file, checked before anything in it is used.

    Attributes:
        source: Where the bytes are.
        root: The folder inside the archive that holds every record.
        records: The records by their names below the root, in the directory's order.
        end: The bytes from the central directory on.
    """

    source: Source
    root: str
    records: Mapping[str, Record]
    end: bytes
    _limits: Mapping[int, int]

    @classmethod
    def open(cls, source: Source) -> Archive:
        """Read and check the directory.

        Raises:
            CorruptCheckpointError: if the file is cut, overlaps itself, or is not laid out as torch does it.
            UnsafeCheckpointError: if it is in torch's format of before 1.6, which can't be read safely.
        """
        offset, size, count, end = _find_directory(source)
        entries = list(_entries(source.name, end[:size], count))
        names = [record.name for record in entries]
        root = names[0].partition("/")[0]
        records = {name[len(root) + 1 :]: record for name, record in zip(names, entries, strict=True)}
        if len(records) < len(names) or any(not name.startswith(root + "/") for name in names):
            raise _corrupt(source, "the zip directory", "has two records of one name, or more than one folder")
        order = sorted(record.header_offset for record in entries)
        limits = dict(pairwise([*order, offset]))
        overlapping = any(r.header_offset + zb.LOCAL.size + r.size > limits[r.header_offset] for r in entries)
        if overlapping or len(limits) < len(order) or PICKLE not in records:
            raise _corrupt(source, "the zip directory", f"has overlapping records, or none named {PICKLE}")
        return cls(source, root, records, end, limits)

    @property
    def directory_offset(self) -> int:
        """Where the central directory begins."""
        return self.source.size - len(self.end)

    @property
    def ours(self) -> bool:
        """Whether this library wrote the file."""
        return MANIFEST in self.records

    def manifest(self) -> Manifest | None:
        """What the file says of itself; None in files of others."""
        if not self.ours:
            return None
        from seedvc_ckpt.manifest import Manifest  # pydantic is slow to import, and listing has no use for it

        return Manifest.from_json(self.content(MANIFEST, MAX_MANIFEST), self.source.name)

    def pickle(self) -> bytes:
        """The pickle that describes the state."""
        return self.content(PICKLE, MAX_PICKLE)

    def content(self, name: str, limit: int) -> bytes:
        """The bytes of a small record, checked against their CRC-32."""
        record = self.records[name]
        if record.size > limit:
            raise _corrupt(self.source, name, f"is {record.size:,} bytes, more than the {limit:,} it may have")
        buffer = bytearray(record.size)
        self.fill(name, memoryview(buffer))
        return bytes(buffer)

    def announce(self, names: Iterable[str]) -> None:
        """Say that these records will be read next, each once and as a whole."""
        offsets = (self.records[name].header_offset for name in names)
        self.source.announce((offset, self._limits[offset]) for offset in offsets)

    def fill(self, name: str, buffer: memoryview, *, holds: str = "") -> None:
        """Read a whole record into `buffer`, which has its size.

        Raises:
            CorruptCheckpointError: if the bytes don't match the record's CRC-32; `holds` tells what is lost.
        """
        self._fill_and_check(name, _parts(buffer, len(buffer)), holds)

    def read_records(
        self,
        names: Iterable[str],
        into: Callable[[str], memoryview] | None = None,
        done: Callable[[str], object] = lambda _: None,
        *,
        verify: bool = True,
        holds: Callable[[str], str] = lambda _: "",
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Read records side by side, and compare each with its CRC-32.

        Args:
            names: Which.
            into: Gives the memory for a record, which has its size; without it they are only compared.
            done: Called when a record is complete; from several threads, as the others are.
            verify: Compare.
            holds: What a record holds, for the error message.
            progress: Called with the number of bytes read since the last call.

        Raises:
            CorruptCheckpointError: naming a damaged record.
        """
        pieces = [*self._pieces(names)]
        groups = [*_groups(pieces, sum(piece.last - piece.first for piece in pieces) // _SHARES)]
        left = Counter(piece.name for piece in pieces)
        crcs: dict[str, dict[int, int]] = {piece.name: {} for piece in pieces}
        guard, interrupted = threading.Lock(), threading.Event()

        def read_one(stretch: Readable, piece: _Piece) -> None:
            buffer = into(piece.name)[piece.start : piece.end] if into is not None else None
            at = piece.first if piece.start else self.data_offset(piece.name, stretch)
            crc = 0
            for part in _parts(buffer, piece.end - piece.start):
                stretch.read_into(at, part)
                crc = zlib.crc32(part, crc) if verify else 0
                at += len(part)
                progress(len(part))
                if interrupted.is_set():
                    return
            with guard:
                crcs[piece.name][piece.start] = crc
                left[piece.name] -= 1
                complete = not left[piece.name]
            if complete:
                if verify and self._joined(piece.name, crcs[piece.name]) != self.records[piece.name].crc:
                    raise _crc_error(self.source, piece.name, holds(piece.name))
                done(piece.name)

        def read(stretch: Readable, number: int) -> None:
            try:
                for piece in groups[number]:
                    if not interrupted.is_set():
                        read_one(stretch, piece)
            except Exception:
                raise
            except BaseException:
                interrupted.set()  # whoever pressed Ctrl-C does not want to wait for the other stretches
                raise

        self.source.read_in_parallel([(group[0].first, group[-1].last) for group in groups], read)

    def _pieces(self, names: Iterable[str]) -> Iterator[_Piece]:
        """The records in the file's order, the large ones cut."""
        for name in sorted(names, key=lambda name: self.records[name].header_offset):
            record = self.records[name]
            contents = record.header_offset + zb.local_header_size(record.name, record.size, record.header_offset)
            # where the contents begin in a file of others, only the header says, which the first piece reads
            edges = [*range(0, record.size, _STRETCH), record.size] if self.ours and record.size else [0, record.size]
            for start, end in pairwise(edges):
                first = contents + start if start else record.header_offset
                last = contents + end if end < record.size else self._limits[record.header_offset]
                yield _Piece(name, start, end, first, last)

    def _joined(self, name: str, crcs: Mapping[int, int]) -> int:
        """The CRC-32 of a record from those of its pieces, by where they begin."""
        crc = crcs[0]
        for start, end in pairwise([*sorted(crcs)[1:], self.records[name].size]):
            crc = combined(crc, crcs[start], end - start)
        return crc

    def check(self, name: str, content: memoryview, holds: str = "") -> None:
        """Compare a record's contents with its CRC-32."""
        if zlib.crc32(content) != self.records[name].crc:
            raise _crc_error(self.source, name, holds)

    def data_offset(self, name: str, source: Readable | None = None) -> int:
        """Where a record's contents begin; checks its local header, read from `source`, against the directory.

        Raises:
            CorruptCheckpointError: if it contradicts the directory or, in a file of this library, is not exactly what
                was written.
        """
        record, source = self.records[name], source or self.source
        if self.ours:
            expected = zb.local_header(record)
            start = record.header_offset + len(expected)
            if read(source, record.header_offset, len(expected)) != expected:
                raise _corrupt(self.source, name, "its header is not the one that was written")
            return start
        header = read(source, record.header_offset, zb.LOCAL.size)
        signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = zb.LOCAL.unpack(header)
        start = int(record.header_offset + zb.LOCAL.size + name_size + extra_size)
        if signature != zb.LOCAL_SIGNATURE or start + record.size > self._limits[record.header_offset]:
            raise _corrupt(self.source, name, "its header is damaged, or it overlaps what follows")
        found = read(source, record.header_offset + zb.LOCAL.size, name_size)
        later = bool(flags & _DESCRIPTOR_FLAG)
        sizes = {record.size, 0xFFFFFFFF} | ({0} if later else set())
        same_crc = crc == record.crc or (later and crc == 0)
        if found != record.name.encode() or method or not same_crc or not {packed, size} <= sizes:
            raise _corrupt(self.source, name, "its header contradicts the zip directory")
        return start

    def verify(
        self,
        holds: Callable[[str], str] = lambda _: "",
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Check every record's contents against its CRC-32 and, in files of this library, every other byte too.

        Args:
            holds: What a record holds, for the error message.
            progress: Called with the number of bytes checked since the last call.

        Raises:
            CorruptCheckpointError: naming the first damaged record.
        """
        self.check_layout()
        guard = threading.Lock()

        def one_at_a_time(count: int) -> None:
            with guard:
                progress(count)

        self.read_records(self.records, holds=holds, progress=one_at_a_time)

    def verify_record(self, name: str, holds: str = "") -> None:
        """Check one record's contents against its CRC-32, in bounded memory."""
        self._fill_and_check(name, _parts(None, self.records[name].size), holds)

    def _fill_and_check(self, name: str, parts: Iterable[memoryview], holds: str) -> None:
        """Read a record part by part, each into its CRC-32 while the processor's cache still holds it."""
        at, crc = self.data_offset(name), 0
        for part in parts:
            self.source.read_into(at, part)
            crc = zlib.crc32(part, crc)
            at += len(part)
        if crc != self.records[name].crc:
            raise _crc_error(self.source, name, holds)

    def check_layout(self) -> None:
        """Compare the directory, to the last byte, with what this library writes for these records.

        With their headers, which are compared when a record is read, those are all bytes outside of the records'
        contents. Files of others are laid out in many ways.
        """
        if not self.ours:
            return
        offset = 0
        for record in self.records.values():
            if record.header_offset != offset:
                raise _corrupt(self.source, "the zip directory", "is not the one that was written")
            offset += zb.local_header_size(record.name, record.size, offset) + record.size
        if zb.directory_bytes(list(self.records.values()), offset) != self.end:
            raise _corrupt(self.source, "the zip directory", "is not the one that was written")


class _Piece(NamedTuple):
    """A stretch of a record.

    Attributes:
        name: The record.
        start: First byte of it.
        end: The byte after its last.
        first: Where it begins in the file, the record's header included.
        last: Where it ends there, with what follows up to the next record.
    """

    name: str
    start: int
    end: int
    first: int
    last: int


def _groups(pieces: Iterable[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Neighbours together, up to about `size` bytes within limits."""
    limit = min(_STRETCH, max(_SHORTEST, size))
    group: list[_Piece] = []
    for piece in pieces:
        if group and (piece.last - group[0].first > limit or piece.first - group[-1].last > _GAP):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _parts(buffer: memoryview | None, size: int) -> Iterator[memoryview]:
    """A buffer in chunks; without one, a chunk's memory again and again."""
    if buffer is None:
        chunk = memoryview(bytearray(min(_CHUNK, size)))
        return (chunk[: size - done] for done in range(0, size, _CHUNK))
    return (buffer[done : done + _CHUNK] for done in range(0, size, _CHUNK))


def read(source: Readable, offset: int, size: int) -> bytes:
    """`size` bytes of `source` from `offset`."""
    buffer = bytearray(size)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def _corrupt(source: Source, record: str, reason: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(source.name, record, reason)


def _crc_error(source: Source, name: str, holds: str) -> CorruptCheckpointError:
    return _corrupt(source, f"{name} ({holds})" if holds else name, "its bytes don't match their CRC-32")


def _find_directory(source: Source) -> tuple[int, int, int, bytes]:
    """(offset, size, number of entries) of the central directory, and all bytes from there on."""
    if source.size < zb.END.size:
        raise _corrupt(source, "", f"only {source.size} bytes: not a checkpoint, or one cut short")
    tail = read(source, max(0, source.size - _TAIL), min(_TAIL, source.size))
    fields = zb.END.unpack_from(tail, len(tail) - zb.END.size)
    signature, disk, start_disk, here, count, size, offset, comment = fields
    if signature != zb.END_SIGNATURE or disk or start_disk or here != count or comment:
        raise _no_directory(source)
    end = source.size - zb.END.size
    if tail[: -zb.END.size][-zb.ZIP64_LOCATOR.size :].startswith(zb.ZIP64_LOCATOR_SIGNATURE):
        # torch writes the zip64 records whether the numbers need them or not
        offset, size, count, end = _zip64_end(source, end)
    if offset + size != end or size > _MAX_DIRECTORY or not 0 < count <= MAX_RECORDS:
        raise _corrupt(source, "the zip directory", f"{count} records, {size} bytes at {offset}: does not fit the file")
    at = offset - (source.size - len(tail))
    return offset, size, count, tail[at:] if at >= 0 else read(source, offset, source.size - offset)


def _zip64_end(source: Source, end: int) -> tuple[int, int, int, int]:
    locator_at = end - zb.ZIP64_LOCATOR.size
    at = locator_at - zb.ZIP64_END.size
    if at < 0:
        raise _no_directory(source)
    found = read(source, at, zb.ZIP64_END.size + zb.ZIP64_LOCATOR.size)
    fields = zb.ZIP64_END.unpack_from(found)
    locator = zb.ZIP64_LOCATOR.unpack_from(found, zb.ZIP64_END.size)
    signature, _, _, _, _, _, here, count, size, offset = fields
    expected = (zb.ZIP64_LOCATOR_SIGNATURE, 0, at, 1)
    if signature != zb.ZIP64_END_SIGNATURE or here != count or locator != expected:
        raise _no_directory(source)
    return offset, size, count, at


def _no_directory(source: Source) -> CorruptCheckpointError | UnsafeCheckpointError:
    head = read(source, 0, min(source.size, 512))
    if _LEGACY_MAGIC in head[:32] or head[257:262] == b"ustar":
        return UnsafeCheckpointError(
            f"{source.name} is in torch's format of before 1.6, which can't be read without risk: open it once with "
            "the program that wrote it and save it again with a torch of 1.6 or newer"
        )
    kind = "a zip file cut short or followed by other bytes" if head.startswith(b"PK") else "not a torch zip file"
    return _corrupt(source, "", f"no zip directory at its end: {kind}")


def _entries(file: str, directory: bytes, count: int) -> Iterator[Record]:
    at = 0
    for number in range(count):
        try:
            record, at = _entry(directory, at)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            reason = f"entry {number} can't be used: {error}"
            raise CorruptCheckpointError(file, "the zip directory", reason) from None
        yield record
    if at != len(directory):
        raise CorruptCheckpointError(file, "the zip directory", f"holds more than its {count} entries")


def _entry(directory: bytes, at: int) -> tuple[Record, int]:
    fields = zb.CENTRAL.unpack_from(directory, at)
    signature, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment, disk = fields[:14]
    offset = fields[16]
    end = at + zb.CENTRAL.size + name_size + extra_size
    if signature != zb.CENTRAL_SIGNATURE or end > len(directory):
        raise ValueError("no entry there")
    extra = directory[end - extra_size : end]
    size, packed, offset = _zip64_numbers(extra, [size, packed, offset])
    name = directory[at + zb.CENTRAL.size : end - extra_size].decode()
    if method or packed != size or flags & ~_KNOWN_FLAGS or comment or disk:
        raise ValueError(f"{name!r} is compressed, encrypted or split, which torch never does")
    parts = name.split("/")
    if len(parts) < 2 or not all(parts) or {".", ".."} & set(parts) or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a record's name")
    return Record(name, size, crc, offset), end


def _zip64_numbers(extra: bytes, numbers: list[int]) -> list[int]:
    """`numbers` with those that did not fit into 32 bits taken from the zip64 field."""
    if 0xFFFFFFFF not in numbers:
        return numbers
    at = 0
    while at < len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == zb.ZIP64_EXTRA:
            large = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            return [next(large, number) if number == 0xFFFFFFFF else number for number in numbers]
        at += 4 + size
    return numbers
