"""Persistent dirty bitmaps (qcow2 specification, "Bitmaps").

Bitmaps header extension::

    Byte  0 -  3:   number of bitmaps
          4 -  7:   reserved (0)
          8 - 15:   size of the bitmap directory in bytes
         16 - 23:   host offset of the bitmap directory

It counts only while autoclear bit 0 is set: whoever changes the image and does not know bitmaps clears that.

Bitmap directory entry, padded to a multiple of 8 bytes::

    Byte  0 -  7:   host offset of the bitmap table
          8 - 11:   entries in the bitmap table
         12 - 15:   flags: bit 0 in use, bit 1 auto, bit 2 extra data may be ignored
              16:   type, 1: dirty tracking
              17:   granularity, as a power of two in bytes
         18 - 19:   size of the name in bytes
         20 - 23:   size of the extra data in bytes
    variable:       extra data, then the name
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jqcow.errors import CorruptionError
from jqcow.ondisk import layout
from jqcow.ondisk.header import AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, Extension, Header, HeaderArea

EXTENSION_STRUCT = struct.Struct(">IIQQ")
ENTRY_STRUCT = struct.Struct(">QIIBBHI")
ALIGNMENT_BYTES = 8

MAX_BITMAPS = 65535
MAX_DIRECTORY_BYTES = 64 << 20
MAX_BITMAP_BYTES = 512 << 20
MAX_NAME_BYTES = 1023
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
"""QEMU's limits: it opens no image with a bitmap beyond them. They bound memory as well."""
MAX_TABLES_BYTES = 64 << 20
"""The most that the tables of all bitmaps may take: else one table that many have binds a walk for hours."""

IN_USE = 1 << 0
AUTO = 1 << 1
EXTRA_DATA_COMPATIBLE = 1 << 2
_KNOWN_FLAGS = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE
DIRTY_TRACKING = 1

_PARSED_GRANULARITY_BITS = 63
_FLAGS = ((IN_USE, "in-use"), (AUTO, "auto"))

Read = Callable[[int, int], bytes]
"""Reads (length, host offset) in bytes; what lies past the end of the file reads as zeros."""


@dataclass(frozen=True)
class Bitmap:
    """A persistent bitmap. ``granularity`` is what one bit stands for, in bytes.

    ``flags`` are ``in-use`` (whoever had it open did not close it, so it may be wrong) and ``auto`` (it
    takes note of every change).
    """

    flags: tuple[str, ...]
    name: str
    granularity: int

    @property
    def is_consistent(self) -> bool:
        """False if it may be wrong: all that can be done then is to remove it."""
        return "in-use" not in self.flags

    @property
    def is_enabled(self) -> bool:
        """True if it takes note of changes."""
        return "auto" in self.flags and self.is_consistent


@dataclass(frozen=True)
class BitmapEntry:
    """One entry of the bitmap directory, with the specification's fields; ``table_entries`` is a number."""

    table_offset: int
    table_entries: int
    flags: int
    type: int
    granularity_bits: int
    name: bytes
    extra: bytes = b""

    @property
    def is_in_use(self) -> bool:
        """True if whoever had it open did not close it."""
        return bool(self.flags & IN_USE)

    @property
    def is_known(self) -> bool:
        """True if jqcow knows what its bits mean, and may change them."""
        is_plain = not self.extra or bool(self.flags & EXTRA_DATA_COMPATIBLE)
        return self.type == DIRTY_TRACKING and is_plain

    @property
    def is_usable(self) -> bool:
        """True if its bits can be believed."""
        return self.is_known and not self.is_in_use

    @property
    def is_enabled(self) -> bool:
        """True if it has to take note of all changes."""
        return self.is_usable and bool(self.flags & AUTO)

    @property
    def is_kept(self) -> bool:
        """False if it should take note of changes, and jqcow does not know how."""
        return self.is_known or self.is_in_use or not self.flags & AUTO

    @property
    def text(self) -> str:
        """The name, bytes that are not UTF-8 as lone surrogates."""
        return self.name.decode("utf-8", "surrogateescape")

    @property
    def granularity(self) -> int:
        """What one bit stands for, in bytes of the disk."""
        return 1 << self.granularity_bits

    def bitmap(self) -> Bitmap:
        """Return what people are told of it."""
        flags = tuple(word for bit, word in _FLAGS if self.flags & bit)
        return Bitmap(flags, self.text, self.granularity)

    def bits_for(self, disk_bytes: int) -> int:
        """Return how many bits stand for a disk."""
        return disk_bytes + self.granularity - 1 >> self.granularity_bits

    def pack(self) -> bytes:
        """Return the entry as on disk, padded to a multiple of 8 bytes."""
        fixed = ENTRY_STRUCT.pack(
            self.table_offset,
            self.table_entries,
            self.flags,
            self.type,
            self.granularity_bits,
            len(self.name),
            len(self.extra),
        )
        entry = fixed + self.extra + self.name
        return entry.ljust(layout.round_up(len(entry), ALIGNMENT_BYTES), b"\0")

    def has_table(self, header: Header) -> bool:
        """Return True if its table can be one, and be there."""
        cluster_bytes, offset = 1 << header.cluster_bits, self.table_offset
        is_placed = offset % cluster_bytes == 0 and 0 < offset < layout.MAX_HOST_OFFSET
        return is_placed and 0 < self.table_entries <= MAX_BITMAP_BYTES // cluster_bytes

    def fault(self, header: Header) -> str:
        """Return why no image can have this entry, "" if one can: by QEMU's constraints, not all of them."""
        if not self.has_table(header):
            return f"a table of {self.table_entries} entries at {self.table_offset:#x}"
        if self.flags & ~_KNOWN_FLAGS:
            return f"flags {self.flags:#x}"
        if not MIN_GRANULARITY_BITS <= self.granularity_bits <= MAX_GRANULARITY_BITS:
            return f"a granularity of 2**{self.granularity_bits} bytes"
        if not 0 < len(self.name) <= MAX_NAME_BYTES:
            return f"a name of {len(self.name)} bytes"
        needed = table_entries_for(header, self.granularity_bits)
        if self.is_usable and self.table_entries != needed:
            return f"a table of {self.table_entries} entries instead of {needed}"
        return ""


def table_entries_for(header: Header, granularity_bits: int) -> int:
    """Return how many entries the table of a bitmap of the disk has."""
    bits = header.size + (1 << granularity_bits) - 1 >> granularity_bits
    return max(1, header.geometry.clusters(bits + 7 >> 3))


def tables_bytes(entries: Iterable[BitmapEntry]) -> int:
    """Return what the tables of bitmaps take in all."""
    return sum(layout.table_bytes(entry.table_entries) for entry in entries)


@dataclass(frozen=True)
class Directory:
    """All bitmaps of an image, and where their directory lies; ``length_bytes`` 0: there is none."""

    entries: tuple[BitmapEntry, ...] = ()
    offset: int = 0
    length_bytes: int = 0

    def find(self, name: str) -> BitmapEntry | None:
        """Return the bitmap of this name, None if there is none."""
        wanted = name.encode("utf-8", "surrogateescape")
        return next((entry for entry in self.entries if entry.name == wanted), None)


@dataclass(frozen=True)
class Place:
    """What the header extension says: how many bitmaps, in a directory of how many bytes, and where."""

    count: int
    length_bytes: int
    offset: int

    def pack(self) -> Extension:
        """Return the header extension; without bitmaps it has no data, and is to be left out."""
        data = EXTENSION_STRUCT.pack(self.count, 0, self.length_bytes, self.offset) if self.count else b""
        return Extension(EXTENSION_BITMAPS, data)


def place_of(area: HeaderArea) -> Place | None:
    """Return where the bitmap directory is; None where there are no bitmaps, or none that count.

    Raises:
        CorruptionError: it is not where one can be.
    """
    extension = area.find(EXTENSION_BITMAPS)
    if extension is None or not area.header.autoclear_features & AUTOCLEAR_BITMAPS:
        return None
    if len(extension.data) < EXTENSION_STRUCT.size:
        raise CorruptionError("bitmaps extension", 0, f"it has {len(extension.data)} bytes")
    count, reserved, length, offset = EXTENSION_STRUCT.unpack_from(extension.data)
    if reserved:
        raise CorruptionError("bitmaps extension", 0, f"its reserved field is {reserved:#x}")
    if offset % (1 << area.header.cluster_bits) or not 0 < offset < layout.MAX_HOST_OFFSET:
        raise CorruptionError("bitmap directory", offset, "not a cluster-aligned host offset")
    # Before it is read: the number says how much an entry can take at least.
    if not count * ENTRY_STRUCT.size <= length <= MAX_DIRECTORY_BYTES or not 0 < count <= MAX_BITMAPS:
        raise CorruptionError("bitmap directory", offset, f"{count} bitmaps in {length} bytes")
    return Place(count, length, offset)


def announced_in(area: HeaderArea) -> int:
    """Return how many bitmaps a header announces, damaged or not; at least 1 where that cannot be told."""
    extension = area.find(EXTENSION_BITMAPS)
    if extension is None or not area.header.autoclear_features & AUTOCLEAR_BITMAPS:
        return 0
    if len(extension.data) < EXTENSION_STRUCT.size:
        return 1
    count: int = EXTENSION_STRUCT.unpack_from(extension.data)[0]
    return max(1, count)


def read_entries(read: Read, place: Place) -> Iterator[tuple[int, BitmapEntry]]:
    """Yield (host offset, entry) of the directory as it stands, for those who judge each of them.

    Raises:
        CorruptionError: it ends within an entry.
    """
    directory, offset = read(place.length_bytes, place.offset), place.offset
    position = 0
    for _ in range(place.count):
        start = position
        name_start = start + ENTRY_STRUCT.size
        if name_start > len(directory):
            raise CorruptionError("bitmap directory", offset + start, "it ends within an entry")
        table, count, flags, kind, bits, name_bytes, extra_bytes = ENTRY_STRUCT.unpack_from(directory, start)
        extra = directory[name_start : name_start + extra_bytes]
        name_start += extra_bytes
        position = layout.round_up(name_start + name_bytes, ALIGNMENT_BYTES)
        if name_start + name_bytes > len(directory) or bits > _PARSED_GRANULARITY_BITS:
            raise CorruptionError("bitmap directory", offset + start, "an entry that no bitmap has")
        name = directory[name_start : name_start + name_bytes]
        yield offset + start, BitmapEntry(table, count, flags, kind, bits, name, extra)


def read_directory(read: Read, area: HeaderArea, *, without_broken: bool = False) -> Directory:
    """Return the bitmaps of an image, each of them one that an image can have.

    Args:
        read: reads (length, host offset) in bytes.
        area: the header of the image.
        without_broken: leave out what is damaged, up to the whole directory.

    Raises:
        CorruptionError: the directory is damaged.
    """
    kept: list[BitmapEntry] = []
    names: set[bytes] = set()
    place = None
    try:
        place = place_of(area)
        if place is None:
            return Directory()
        for offset, entry in read_entries(read, place):
            fault = entry.fault(area.header) or ("a name that another has" if entry.name in names else "")
            if fault and not without_broken:
                raise CorruptionError("bitmap directory", offset, f"bitmap {entry.text!r}: {fault}")
            if not fault:
                kept.append(entry)
                names.add(entry.name)
        if tables_bytes(kept) > MAX_TABLES_BYTES:
            raise CorruptionError("bitmap directory", place.offset, "its tables are too large in all")
    except CorruptionError:
        if not without_broken:
            raise
    if place is None:
        return Directory()
    return Directory(tuple(kept), place.offset, place.length_bytes)


def pack_directory(entries: Iterable[BitmapEntry]) -> bytes:
    """Return the directory as on disk."""
    return b"".join(entry.pack() for entry in entries)


def read_bitmaps(read: Read, area: HeaderArea) -> tuple[Bitmap, ...]:
    """Return the bitmaps of an image that are marked valid, as far as they can be told apart.

    Args:
        read: reads (length, host offset) in bytes.
        area: the header of the image.

    Raises:
        CorruptionError: the directory is not one that an image can have.
    """
    place = place_of(area)
    return () if place is None else tuple(entry.bitmap() for _, entry in read_entries(read, place))
