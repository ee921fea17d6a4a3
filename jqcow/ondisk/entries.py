"""Entries of the tables of pointers: L1, refcount and bitmap tables (qcow2 specification, "Cluster mapping",
"Refcounts", "Bitmaps"). Those of L2 tables are in `jqcow.ondisk.l2`.

L1 table entry::

    Bit   0 -  8:   reserved (0)
          9 - 55:   host offset of the L2 table, cluster-aligned; 0: not allocated
         56 - 62:   reserved (0)
              63:   COPIED: the refcount of the L2 table is exactly 1

Refcount table entry::

    Bit   0 -  8:   reserved (0)
          9 - 63:   host offset of the refcount block, cluster-aligned; 0: all refcounts it covers are 0

Bitmap table entry::

    Bit        0:   without a host offset: all bits are 1, else 0
          1 -  8:   reserved (0)
          9 - 55:   host offset of a cluster of bits, cluster-aligned; 0: bit 0 says what all of them are
         56 - 63:   reserved (0)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from jqcow import _native
from jqcow.ondisk.layout import ENTRY_BYTES, MAX_HOST_OFFSET, SECTOR_BYTES, Geometry, HostOffset

ENTRY = struct.Struct(">Q")
_ENTRY_ORDER = 6
"""A table entry is as wide as a refcount of this order: kernels that search refcounts search tables too."""

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
COPIED = 1 << 63
L1_RESERVED = 0x7F00_0000_0000_01FF
REFCOUNT_TABLE_RESERVED = 0x1FF
BITMAP_TABLE_RESERVED = 0xFF00_0000_0000_01FE
ALL_ONES = 1

_GROUP = struct.Struct(f">{SECTOR_BYTES // ENTRY_BYTES}Q")
_ZERO_GROUP = bytes(SECTOR_BYTES)


def l1_entry(l2_table_offset: int, *, copied: bool = True) -> int:
    """Return the L1 entry that points to the L2 table at ``l2_table_offset`` bytes."""
    return l2_table_offset | (COPIED if copied else 0)


class DamagedEntry(ValueError):
    """An L1 or L2 entry that the specification does not allow."""


def decode_l1(entry: int) -> tuple[HostOffset, bool]:
    """Return what an L1 entry says: the host offset of the L2 table, 0 for none, and its COPIED flag.

    Raises:
        DamagedEntry: the entry is not one that an image can have.
    """
    offset = entry & OFFSET_MASK
    if entry & L1_RESERVED or bool(entry) != bool(offset):
        raise DamagedEntry(f"entry {entry:#x} is not valid")
    return HostOffset(offset), entry >= COPIED


def decode_refcount_table(entry: int, geometry: Geometry) -> HostOffset:
    """Return the host offset of a refcount block, 0 for none.

    Raises:
        DamagedEntry: the entry is not one that an image can have.
    """
    offset = entry & REFCOUNT_TABLE_OFFSET_MASK
    if entry & REFCOUNT_TABLE_RESERVED or offset % geometry.cluster_bytes or offset >= MAX_HOST_OFFSET:
        raise DamagedEntry(f"entry {entry:#x} is not valid")
    return HostOffset(offset)


def decode_bitmap_table(entry: int, geometry: Geometry) -> tuple[HostOffset, bool]:
    """Return what a bitmap table entry says: the host offset of its bits, 0 for none, and if all are 1 then.

    Raises:
        DamagedEntry: the entry is not one that an image can have.
    """
    offset = entry & OFFSET_MASK
    all_ones = bool(entry & ALL_ONES)
    if entry & BITMAP_TABLE_RESERVED or offset % geometry.cluster_bytes or (offset and all_ones):
        raise DamagedEntry(f"entry {entry:#x} is not valid")
    return HostOffset(offset), all_ones


# Tables of pointers, L1 and refcount table, as they stand: a checker tells what it finds and goes on.


def nonzero_entries(table: bytes) -> Iterator[tuple[int, int]]:
    """Yield (index, entry) of the entries of an L1 or refcount table that are not zero.

    What they say, `split_l1` and `split_refcount_table` tell.
    """
    return nonzero_words(table)


def split_l1(entry: int) -> tuple[int, bool, bool]:
    """Return what an L1 entry says, allowed or not: (host offset, COPIED flag, has reserved bits set)."""
    return entry & OFFSET_MASK, entry >= COPIED, entry & L1_RESERVED != 0


def split_refcount_table(entry: int) -> tuple[int, bool]:
    """Return what a refcount table entry says, allowed or not: (host offset, has reserved bits set)."""
    return entry & REFCOUNT_TABLE_OFFSET_MASK, entry & REFCOUNT_TABLE_RESERVED != 0


def entry_at(table: bytes | bytearray, index: int) -> int:
    """Return an entry of an L1 or refcount table."""
    entry: int = ENTRY.unpack_from(table, index * ENTRY_BYTES)[0]
    return entry


def first_present(table: bytes | bytearray, start: int, stop: int) -> int:
    """Return the first index in [start, stop) of an L1 or refcount table whose entry is not 0, else -1."""
    return _native.refcount_find_used(table, _ENTRY_ORDER, start, stop)


def last_present(table: bytes | bytearray) -> int:
    """Return the last index of an L1 or refcount table whose entry is not 0, -1 where all are."""
    return _native.refcount_last_used(table, _ENTRY_ORDER)


def put_entry(table: bytearray, index: int, entry: int) -> None:
    """Write an entry of an L1 or refcount table."""
    ENTRY.pack_into(table, index * ENTRY_BYTES, entry)


def put_l1(table: bytearray, index: int, l2_table_offset: int) -> None:
    """Write the L1 entry of an L2 table that has one owner."""
    put_entry(table, index, l1_entry(l2_table_offset))


def pack_refcount_table(geometry: Geometry, first_block: int, block_count: int) -> bytes:
    """Return the entries of refcount blocks that follow each other from host offset ``first_block`` on."""
    return b"".join(ENTRY.pack(first_block + index * geometry.cluster_bytes) for index in range(block_count))


def nonzero_words(table: bytes) -> Iterator[tuple[int, int]]:
    """Yield (index, word) of the 8-byte words that are not zero; most of a table often is."""
    whole = len(table) - len(table) % SECTOR_BYTES
    for position in range(0, whole, SECTOR_BYTES):
        group = table[position : position + SECTOR_BYTES]
        if group != _ZERO_GROUP:
            for index, word in enumerate(_GROUP.unpack(group), position // ENTRY_BYTES):
                if word:
                    yield index, word
    for index in range(whole // ENTRY_BYTES, len(table) // ENTRY_BYTES):
        word = entry_at(table, index)
        if word:
            yield index, word
