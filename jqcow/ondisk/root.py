"""The live root: sector 0 of an image with a live journal, and the root copy.

While the journal is live, sector 0 is a root that no other program can misread: the fixed header fields
with jqcow's incompatible feature bit set, autoclear bits and backing file cleared (those of version 3, where
the image has version 2, too), then the journal extension, a one-entry feature name table (QEMU prints the
name when it refuses the image) and the end marker. The header proper is in the journal. Bytes from 512 on
are untouched.

Journal extension (type 0x6a71c057), data, big-endian::

    Byte   0 -   3:   version of the journal, 1
           4 -   7:   flags, 0
           8 -  15:   host offset of the journal range, a multiple of 4096
          16 -  23:   length of the range in bytes, a multiple of 8192, at least 65536
          24 -  39:   salt, 128 random bits; every frame of this journal carries it
          40 -  63:   reserved (0)

While a repair is being taken back sector 0 is such a root with the extension of that, of type 0x6a71c058 and
without data, instead of the journal's; the name in the table is another one.

Root copy, at host offset 4096 of the header cluster (only with clusters larger than 4 KiB)::

    Byte   0 - 511:   the root, as in sector 0
         512 - 519:   magic, "jqcowRC1"
         520 - 523:   CRC-32C of bytes 0 - 519
         524 - 1023:  reserved (0)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from operator import index

from jqcow import _native
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk.header import (
    EXTENSION_END,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_STRUCT,
    FEATURE_NAME_STRUCT,
    INCOMPATIBLE_JOURNAL,
    MAGIC,
    V3_BYTES,
    Extension,
    Header,
)
from jqcow.ondisk.layout import SECTOR_BYTES

EXTENSION_JOURNAL = 0x6A71C057
EXTENSION_UNDO = 0x6A71C058
JOURNAL_VERSION = 1
JOURNAL_STRUCT = struct.Struct(">IIQQ16s24s")
FEATURE_NAME = b"jqcow journal: run jqcow-recover"
UNDO_FEATURE_NAME = b"jqcow undo was cut off: run jqcow undo"

MIN_JOURNAL_BYTES = 64 << 10
MAX_JOURNAL_BYTES = 1 << 30
DEFAULT_JOURNAL_BYTES = 8 << 20
JOURNAL_ALIGNMENT = 4096
SALT_BYTES = 16

ROOT_COPY_OFFSET = 4096
ROOT_COPY_STRUCT = struct.Struct(">512s8sI")
ROOT_COPY_BYTES = 1024
ROOT_COPY_MAGIC = b"jqcowRC1"

MAX_LIVE_HEADER_BYTES = 4096
"""A header that uses more than this would reach the root copy."""

_ADDED_BYTES = (
    2 * EXTENSION_STRUCT.size + JOURNAL_STRUCT.size + FEATURE_NAME_STRUCT.size + EXTENSION_STRUCT.size
)
if JOURNAL_STRUCT.size != 64 or FEATURE_NAME_STRUCT.size != 48 or _ADDED_BYTES != 136:
    raise RuntimeError("the journal extension does not have its documented size")


@dataclass(frozen=True)
class JournalRange:
    """Where the journal lies: ``offset`` and ``length`` in bytes, and the salt of its frames."""

    offset: int
    length: int
    salt: bytes

    @property
    def end(self) -> int:
        """Host offset behind the last byte."""
        return self.offset + self.length

    @property
    def half_bytes(self) -> int:
        """Length of each of the two halves."""
        return self.length // 2

    def half_offset(self, epoch: int) -> int:
        """Return the host offset of the half that ``epoch`` fills: the halves are used in turn."""
        return self.offset + (epoch % 2) * self.half_bytes

    def pack(self) -> bytes:
        """Return the data of the journal extension."""
        return JOURNAL_STRUCT.pack(JOURNAL_VERSION, 0, self.offset, self.length, self.salt, bytes(24))

    @classmethod
    def unpack(cls, data: bytes) -> JournalRange:
        """Read the journal extension's data.

        Raises:
            UnsupportedFeatureError: a journal version or flag that this jqcow does not know.
            CorruptionError: a range that no journal can have.
        """
        if len(data) != JOURNAL_STRUCT.size:
            raise CorruptionError(
                "journal extension", 0, f"{len(data)} bytes instead of {JOURNAL_STRUCT.size}"
            )
        version, flags, offset, length, salt, reserved = JOURNAL_STRUCT.unpack(data)
        if version != JOURNAL_VERSION or flags or any(reserved):
            raise UnsupportedFeatureError(f"jqcow journal version {version}, flags {flags:#x}")
        if not is_journal_length(length):
            raise CorruptionError("journal extension", 0, f"a journal of {length} bytes")
        if offset % JOURNAL_ALIGNMENT or not 0 < offset <= layout.MAX_HOST_OFFSET - length:
            raise CorruptionError("journal extension", 0, f"a journal at host offset {offset:#x}")
        return cls(offset, length, salt)


def is_journal_length(length: int) -> bool:
    """Return whether a journal can have this many bytes: two aligned halves, within the bounds."""
    return MIN_JOURNAL_BYTES <= length <= MAX_JOURNAL_BYTES and length % (2 * JOURNAL_ALIGNMENT) == 0


def journal_length(length: int) -> int:
    """Return a length in bytes that a journal can have.

    Raises:
        TypeError: not a whole number.
        ValueError: not such a length.
    """
    length = index(length)
    if not is_journal_length(length):
        raise ValueError("the journal's size must be a multiple of 8192 from 64 KiB to 1 GiB")
    return length


def check_room(header: Header, used_bytes: int) -> None:
    """Raise unless the header leaves room for the live root.

    Raises:
        UnsupportedFeatureError: the header is too long to be journaled.
    """
    if not _leaves_room(header):
        raise UnsupportedFeatureError(
            "a header_length above 376", "the journal's root does not fit in sector 0"
        )
    if used_bytes > MAX_LIVE_HEADER_BYTES:
        raise UnsupportedFeatureError("a header of more than 4096 used bytes", "the journal cannot hold it")


def _leaves_room(header: Header) -> bool:
    return header.header_length + _ADDED_BYTES <= SECTOR_BYTES


def pack_root(header: Header, journal: JournalRange) -> bytes:
    """Return sector 0 of a live image: 512 bytes."""
    return _pack_refused(header, Extension(EXTENSION_JOURNAL, journal.pack()), FEATURE_NAME)


def pack_undo_root(header: Header) -> bytes:
    """Return sector 0 of an image that is being taken back: 512 bytes.

    Raises:
        FormatError: no header that a root has room for.
    """
    if (header.version > 2 and header.header_length < V3_BYTES) or not _leaves_room(header):
        raise FormatError(f"header_length {header.header_length} leaves no room in sector 0")
    return _pack_refused(header, Extension(EXTENSION_UNDO, b""), UNDO_FEATURE_NAME)


def _pack_refused(header: Header, extension: Extension, name: bytes) -> bytes:
    """Return a sector 0 that no other program opens."""
    if header.version < 3:
        # Version 2 has no feature bits. Who knows it alone refuses a 3; once closed it is a 2 again.
        header = replace(header, version=3, header_length=V3_BYTES)
    live = replace(
        header,
        incompatible_features=header.incompatible_features | INCOMPATIBLE_JOURNAL,
        autoclear_features=0,
        backing_file_offset=0,
        backing_file_size=0,
    )
    bit = INCOMPATIBLE_JOURNAL.bit_length() - 1
    names = Extension(EXTENSION_FEATURE_NAMES, FEATURE_NAME_STRUCT.pack(0, bit, name))
    root = live.pack() + extension.pack() + names.pack()
    return root.ljust(SECTOR_BYTES, b"\0")


def is_live(sector: bytes) -> bool:
    """Return True if sector 0 says that the image has a live journal."""
    return (
        len(sector) >= V3_BYTES
        and sector[:4] == MAGIC
        and int.from_bytes(sector[4:8], "big") == 3
        and bool(int.from_bytes(sector[72:80], "big") & INCOMPATIBLE_JOURNAL)
    )


def is_being_undone(sector: bytes) -> bool:
    """Return True if sector 0 says that a repair is being taken back."""
    extension = EXTENSION_STRUCT.pack(EXTENSION_UNDO, 0)
    start = Header.unpack(sector).header_length if is_live(sector) else 0
    return bool(start) and sector[start : start + len(extension)] == extension


def unpack_root(sector: bytes) -> tuple[int, JournalRange]:
    """Return ``cluster_bits`` and the journal range of a live root.

    Only these are to be trusted before replay: the header proper is in the journal.

    Raises:
        FormatError: no live root, or fields that no root can have.
        CorruptionError: the journal extension is missing or damaged, or a repair was being taken back.
    """
    header = Header.unpack(sector[:SECTOR_BYTES])
    if not layout.MIN_CLUSTER_BITS <= header.cluster_bits <= layout.MAX_CLUSTER_BITS:
        raise FormatError(f"cluster_bits {header.cluster_bits} is not in 9-21")
    position = header.header_length
    while position + EXTENSION_STRUCT.size <= SECTOR_BYTES:
        kind, length = EXTENSION_STRUCT.unpack_from(sector, position)
        position += EXTENSION_STRUCT.size
        if kind == EXTENSION_END or length > SECTOR_BYTES - position:
            break
        if kind == EXTENSION_UNDO:
            error = CorruptionError("image", 0, "a repair of it was being taken back, and that was cut off")
            error.add_note("run jqcow undo again")
            raise error
        if kind == EXTENSION_JOURNAL:
            return header.cluster_bits, JournalRange.unpack(sector[position : position + length])
        position += layout.round_up(length, 8)
    raise CorruptionError("journal extension", position, "missing from the root")


def pack_root_copy(root: bytes) -> bytes:
    """Return the root copy for a root: 1024 bytes."""
    checked = root + ROOT_COPY_MAGIC
    return ROOT_COPY_STRUCT.pack(root, ROOT_COPY_MAGIC, _native.crc32c(checked)).ljust(ROOT_COPY_BYTES, b"\0")


def unpack_root_copy(data: bytes) -> bytes | None:
    """Return the root that a root copy holds, or None where there is no valid copy."""
    if len(data) < ROOT_COPY_STRUCT.size:
        return None
    root, magic, crc = ROOT_COPY_STRUCT.unpack_from(data)
    if magic != ROOT_COPY_MAGIC or crc != _native.crc32c(root + magic) or not is_live(root):
        return None
    # In smaller clusters this place may be a guest's, who could write a root there.
    return bytes(root) if has_room_for_copy(Header.unpack(root).cluster_bits) else None


def has_room_for_copy(cluster_bits: int) -> bool:
    """Return True where the root copy lies in the header cluster: in clusters of more than 4096 bytes."""
    return 1 << min(cluster_bits, layout.MAX_CLUSTER_BITS) > ROOT_COPY_OFFSET
