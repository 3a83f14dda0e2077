"""The bytes of a zip archive around its records, as this library writes them.

Everything but the records' contents follows from their names, sizes and checksums, so that a reader can regenerate
it and compare: no byte of a file goes unchecked. Layout after APPNOTE.TXT 6.3.10 (PKWARE): records are stored, not
compressed, dates are fixed, contents begin at multiples of 64 bytes, zip64 fields appear where a number needs them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ALIGNMENT",
    "CENTRAL",
    "CENTRAL_SIGNATURE",
    "END",
    "END_SIGNATURE",
    "LOCAL",
    "LOCAL_SIGNATURE",
    "ZIP64_END",
    "ZIP64_END_SIGNATURE",
    "ZIP64_EXTRA",
    "ZIP64_LOCATOR",
    "ZIP64_LOCATOR_SIGNATURE",
    "Record",
    "directory_bytes",
    "local_header",
    "local_header_size",
]

ALIGNMENT = 64

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
ZIP64_END = struct.Struct("<4sQ2H2I4Q")
ZIP64_LOCATOR = struct.Struct("<4sIQI")
LOCAL_SIGNATURE = b"PK\x03\x04"
CENTRAL_SIGNATURE = b"PK\x01\x02"
END_SIGNATURE = b"PK\x05\x06"
ZIP64_END_SIGNATURE = b"PK\x06\x06"
ZIP64_LOCATOR_SIGNATURE = b"PK\x06\x07"
ZIP64_EXTRA = 0x0001

_ALIGNMENT_EXTRA = 0xD935  # "zipalign": 2 bytes of alignment, then zeros
_DOS_DATE = 0x0021  # 1980-01-01, the first that the format can say
_MAX32 = 0xFFFFFFFF
_MAX16 = 0xFFFF


@dataclass(frozen=True)
class Record:
    """A record of an archive.

    Attributes:
        name: Full name, the archive's root folder included.
        size: Bytes.
        crc: CRC-32 of its contents.
        header_offset: Where its local header begins.
    """

    name: str
    size: int
    crc: int
    header_offset: int


def local_header_size(name: str, size: int, offset: int) -> int:
    """Bytes of the header of a record whose header begins at `offset`, padding included."""
    plain = LOCAL.size + len(name.encode()) + (20 if size >= _MAX32 else 0)
    padding = 6 + -(offset + plain + 6) % ALIGNMENT
    return plain + padding


def local_header(record: Record) -> bytes:
    """The header that precedes the record's contents, padded so that these begin at a multiple of 64."""
    encoded = record.name.encode()
    large = record.size >= _MAX32
    extra = struct.pack("<2H2Q", ZIP64_EXTRA, 16, record.size, record.size) if large else b""
    padding = local_header_size(record.name, record.size, record.header_offset)
    padding -= LOCAL.size + len(encoded) + len(extra)
    extra += struct.pack("<3H", _ALIGNMENT_EXTRA, padding - 4, ALIGNMENT).ljust(padding, b"\0")
    size32 = _MAX32 if large else record.size
    version = 45 if large else 20
    fixed = LOCAL.pack(
        LOCAL_SIGNATURE, version, 0, 0, 0, _DOS_DATE, record.crc, size32, size32, len(encoded), len(extra)
    )
    return fixed + encoded + extra


def directory_bytes(records: Sequence[Record], offset: int) -> bytes:
    """The central directory, to begin at `offset`, and the end records."""
    entries = b"".join(map(_central_entry, records))
    end = offset + len(entries)
    counted = len(records) < _MAX16 and offset < _MAX32 and len(entries) < _MAX32
    zip64 = b""
    if not counted:
        zip64 = ZIP64_END.pack(
            ZIP64_END_SIGNATURE, 44, 45, 45, 0, 0, len(records), len(records), len(entries), offset
        ) + ZIP64_LOCATOR.pack(ZIP64_LOCATOR_SIGNATURE, 0, end, 1)
    count = min(len(records), _MAX16)
    last = END.pack(END_SIGNATURE, 0, 0, count, count, min(len(entries), _MAX32), min(offset, _MAX32), 0)
    return entries + zip64 + last


def _central_entry(record: Record) -> bytes:
    encoded = record.name.encode()
    large = record.size >= _MAX32
    far = record.header_offset >= _MAX32
    numbers = ([record.size, record.size] if large else []) + ([record.header_offset] if far else [])
    extra = struct.pack(f"<2H{len(numbers)}Q", ZIP64_EXTRA, 8 * len(numbers), *numbers) if numbers else b""
    size32 = _MAX32 if large else record.size
    version = 45 if numbers else 20
    offset32 = _MAX32 if far else record.header_offset
    fixed = (CENTRAL_SIGNATURE, version, version, 0, 0, 0, _DOS_DATE, record.crc, size32, size32)
    return CENTRAL.pack(*fixed, len(encoded), len(extra), 0, 0, 0, 0, offset32) + encoded + extra
