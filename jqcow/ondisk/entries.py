"""Table entries: L1, L2 and refcount table (qcow2 specification, "Cluster mapping", "Refcounts").

L1 table entry::

    Bit   0 -  8:   reserved (0)
          9 - 55:   host offset of the L2 table, cluster-aligned; 0: not allocated
         56 - 62:   reserved (0)
              63:   COPIED: the refcount of the L2 table is exactly 1

L2 table entry (standard cluster)::

    Bit        0:   the cluster reads as zeros (version 3)
          1 -  8:   reserved (0)
          9 - 55:   host offset of the data, cluster-aligned; 0: not allocated
         56 - 61:   reserved (0)
              62:   0 for a standard, 1 for a compressed cluster
              63:   COPIED: the refcount of the data cluster is exactly 1

L2 table entry (compressed cluster), with x = 62 - (cluster_bits - 8)::

    Bits  0 to x-1  host offset of the first byte of the data, not aligned
          x to 61   how many 512-byte sectors the data may reach into after the one of its first byte
          62        1 for a compressed cluster
          63        0: COPIED is never set

Refcount table entry::

    Bit   0 -  8:   reserved (0)
          9 - 63:   host offset of the refcount block, cluster-aligned; 0: all refcounts it covers are 0
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from jqcow import _native
from jqcow.ondisk.layout import ENTRY_BYTES, MAX_HOST_OFFSET, SECTOR_BYTES, Geometry, HostOffset

UNALLOCATED = _native.UNALLOCATED
ZERO_CLUSTER = _native.ZERO
DATA = _native.DATA
COMPRESSED_CLUSTER = _native.COMPRESSED
"""What a guest cluster is by its L2 entry."""

ENTRY = struct.Struct(">Q")
_ENTRY_ORDER = 6
"""A table entry is as wide as a refcount of this order: kernels that search refcounts search tables too."""

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
REFCOUNT_TABLE_RESERVED = 0x1FF

_GROUP = struct.Struct(f">{SECTOR_BYTES // ENTRY_BYTES}Q")
_ZERO_GROUP = bytes(SECTOR_BYTES)


def l1_entry(l2_table_offset: int, *, copied: bool = True) -> int:
    """Return the L1 entry that points to the L2 table at ``l2_table_offset`` bytes."""
    return l2_table_offset | (COPIED if copied else 0)


def l2_entry(host_offset: int, *, copied: bool = True, zero: bool = False) -> int:
    """Return the L2 entry of a standard cluster; ``zero`` makes it read as zeros."""
    return host_offset | (COPIED if copied else 0) | (ZERO if zero else 0)


def compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return where the data of a compressed cluster may lie: (host offset, length in bytes).

    From the specification's descriptor of compressed clusters: the length runs to the end of the last sector
    that the data may reach into. How long the data is the descriptor does not tell.
    """
    offset_bits = _compressed_offset_bits(cluster_bits)
    descriptor = entry & (COMPRESSED - 1)
    offset = descriptor & (1 << offset_bits) - 1
    sectors = (descriptor >> offset_bits) + 1
    return offset, sectors * SECTOR_BYTES - offset % SECTOR_BYTES


def compressed_entry(host_offset: int, length_bytes: int, cluster_bits: int) -> int:
    """Return the L2 entry of a compressed cluster: the inverse of `compressed_extent`.

    Args:
        host_offset: where the compressed data starts, in bytes; it need not be aligned.
        length_bytes: length of the data. The entry rounds its end up to a whole sector.
        cluster_bits: the cluster size as a power of two.

    Raises:
        ValueError: no data, or more sectors or a higher offset than the descriptor has bits for.
    """
    offset_bits = _compressed_offset_bits(cluster_bits)
    if length_bytes < 1 or not 0 <= host_offset < min(1 << offset_bits, MAX_HOST_OFFSET):
        raise ValueError(f"{length_bytes} bytes at {host_offset:#x} are no compressed cluster")
    further_sectors = (host_offset + length_bytes - 1) // SECTOR_BYTES - host_offset // SECTOR_BYTES
    descriptor = further_sectors << offset_bits | host_offset
    if descriptor >= COMPRESSED:
        raise ValueError(f"{length_bytes} bytes at {host_offset:#x} reach into too many sectors")
    return COMPRESSED | descriptor


def _compressed_offset_bits(cluster_bits: int) -> int:
    """Return how many bits of the descriptor are the host offset; the rest counts sectors."""
    return 62 - (cluster_bits - 8)


class DamagedEntry(ValueError):
    """An L1 or L2 entry that the specification does not allow."""


class L2Entry(NamedTuple):
    """An L2 entry, decoded.

    Attributes:
        kind: UNALLOCATED, ZERO_CLUSTER, DATA or COMPRESSED_CLUSTER.
        host: of the cluster, 0 where it has none; of a compressed cluster the first byte of its data.
        copied: the COPIED flag.
        length: of a compressed cluster, how far in bytes its data may reach; 0 of others.
    """

    kind: int
    host: HostOffset = HostOffset(0)
    copied: bool = False
    length: int = 0


class L2Run(NamedTuple):
    """``entry_count`` L2 entries in a row of one kind, from the first one's ``host`` on.

    The host clusters of a DATA run follow each other and have the same COPIED flag. Those that a
    ZERO_CLUSTER run keeps need not. A COMPRESSED_CLUSTER run is one entry, with ``length``.
    """

    kind: int
    host: HostOffset
    entry_count: int
    copied: bool
    length: int


class FoundEntry(NamedTuple):
    """An L2 entry that is not zero as it stands, whether or not an image can have it.

    Attributes:
        position: index in its table.
        raw: the entry itself, to be shown to people.
        kind: UNALLOCATED, ZERO_CLUSTER, DATA or COMPRESSED_CLUSTER.
        host: as in `L2Entry`, aligned or not.
        copied: the COPIED flag.
        length: as in `L2Entry`.
        has_reserved: reserved bits are set. The zero flag is none of them, but version 2 does not have it.
    """

    position: int
    raw: int
    kind: int
    host: int
    copied: bool
    length: int
    has_reserved: bool


NO_ENTRY = L2Entry(UNALLOCATED)
ZERO_ENTRY = L2Entry(ZERO_CLUSTER)


def data_entry(host: HostOffset) -> L2Entry:
    """Return the entry of a data cluster that has one owner."""
    return L2Entry(DATA, host, True)


class StandardL2:
    """The codec of 8-byte L2 entries. ``index`` counts entries within a buffer."""

    entry_bytes = 8

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.per_table = geometry.cluster_bytes // self.entry_bytes
        self.per_block = geometry.block_bytes // self.entry_bytes
        self._cluster_bits = geometry.cluster_bits

    def decode(self, buffer: bytes | bytearray, index: int) -> L2Entry:
        """Return the entry at ``index``.

        Raises:
            DamagedEntry: the entry is not one that an image can have.
        """
        (entry,) = ENTRY.unpack_from(buffer, index * self.entry_bytes)
        copied = entry >= COPIED
        if entry & COMPRESSED:
            if copied:
                raise DamagedEntry(f"entry {entry:#x} is compressed and COPIED")
            host, length = compressed_extent(entry, self._cluster_bits)
            return L2Entry(COMPRESSED_CLUSTER, HostOffset(host), False, length)
        if entry & L2_RESERVED:
            raise DamagedEntry(f"entry {entry:#x} has reserved bits set")
        host = HostOffset(entry & OFFSET_MASK)
        if entry & ZERO:
            return L2Entry(ZERO_CLUSTER, host, copied)
        return L2Entry(DATA if host else UNALLOCATED, host, copied)

    def encode(self, buffer: bytearray, index: int, entry: L2Entry) -> None:
        """Write an entry at ``index``.

        Raises:
            ValueError: compressed data further out, or longer, than an entry can tell.
        """
        if entry.kind == COMPRESSED_CLUSTER:
            value = compressed_entry(entry.host, entry.length, self._cluster_bits)
        else:
            value = l2_entry(entry.host, copied=entry.copied, zero=entry.kind == ZERO_CLUSTER)
        ENTRY.pack_into(buffer, index * self.entry_bytes, value)

    def run(self, buffer: bytes | bytearray, index: int, limit: int) -> L2Run:
        """Return the run that starts at ``index``, at most ``limit`` entries of it.

        Raises:
            DamagedEntry: one of its entries is not one that an image can have.
        """
        kind, host, count = _native.l2_run(buffer, index, limit, self._cluster_bits)
        if kind == DATA:
            # The entries of a run of data differ by their offsets alone.
            (entry,) = ENTRY.unpack_from(buffer, index * self.entry_bytes)
            if entry & L2_RESERVED:
                raise DamagedEntry(f"entry {entry:#x} has reserved bits set")
            return L2Run(kind, HostOffset(host), count, entry >= COPIED, 0)
        if kind == COMPRESSED_CLUSTER:
            entry = self.decode(buffer, index)
            return L2Run(kind, entry.host, 1, False, entry.length)
        self._check_all(buffer, kind, index, count)
        return L2Run(kind, HostOffset(host), count, False, 0)

    def _check_all(self, buffer: bytes | bytearray, kind: int, index: int, count: int) -> None:
        part = memoryview(buffer)[index * self.entry_bytes : (index + count) * self.entry_bytes]
        if kind == UNALLOCATED and _native.is_zero(part):
            return
        for position in range(index, index + count):
            self.decode(buffer, position)

    def found(self, table: bytes) -> Iterator[FoundEntry]:
        """Yield the entries of a whole table that are not zero, in order; none is refused."""
        # The constructor of a named tuple would take half the time of this walk over millions of entries.
        make, mask, special = tuple.__new__, OFFSET_MASK, COMPRESSED | ZERO | L2_RESERVED
        for position, entry in _nonzero_words(table):
            host, copied = entry & mask, entry >= COPIED
            if host and not entry & special:
                yield make(FoundEntry, (position, entry, DATA, host, copied, 0, False))
            elif entry & COMPRESSED:
                first, length = compressed_extent(entry, self._cluster_bits)
                yield make(FoundEntry, (position, entry, COMPRESSED_CLUSTER, first, copied, length, False))
            else:
                kind = ZERO_CLUSTER if entry & ZERO else DATA if host else UNALLOCATED
                yield make(FoundEntry, (position, entry, kind, host, copied, 0, entry & L2_RESERVED != 0))

    def hosts(self, entry: L2Entry) -> range:
        """Return the indices of the host clusters that an entry refers to."""
        if not entry.host:
            return range(0)
        first = self.geometry.cluster_of(entry.host)
        return range(first, self.geometry.clusters(entry.host + max(1, entry.length)))

    def set_copied(self, buffer: bytearray, start: int, stop: int, *, copied: bool) -> None:
        """Set or clear the COPIED flag of the entries in [start, stop)."""
        _native.set_copied(buffer, start, stop, copied)


def codec_of(geometry: Geometry) -> StandardL2:
    """Return the codec of an image's L2 entries."""
    return StandardL2(geometry)


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


# Tables of pointers, L1 and refcount table, as they stand: a checker tells what it finds and goes on.


def nonzero_entries(table: bytes) -> Iterator[tuple[int, int]]:
    """Yield (index, entry) of the entries of an L1 or refcount table that are not zero.

    What they say, `split_l1` and `split_refcount_table` tell.
    """
    return _nonzero_words(table)


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


def _nonzero_words(table: bytes) -> Iterator[tuple[int, int]]:
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
