"""L2 table entries (qcow2 specification, "Cluster mapping", "Extended L2 Entries").

Standard cluster::

    Bit        0:   the cluster reads as zeros (version 3; reserved in extended entries)
          1 -  8:   reserved (0)
          9 - 55:   host offset of the data, cluster-aligned; 0: not allocated
         56 - 61:   reserved (0)
              62:   0 for a standard, 1 for a compressed cluster
              63:   COPIED: the refcount of the data cluster is exactly 1

Compressed cluster, with x = 62 - (cluster_bits - 8)::

    Bits  0 to x-1  host offset of the first byte of the data, not aligned
          x to 61   how many 512-byte sectors the data may reach into after the one of its first byte
          62        1 for a compressed cluster
          63        0: COPIED is never set

An extended entry is such a word and a bitmap of 8 bytes, 0 for a compressed cluster::

    Bit   0 - 31:   allocated: bit x says that subcluster x is data in the host cluster
         32 - 63:   zeros: bit 32 + x says that subcluster x reads as zeros; then bit x is 0

A *subcluster* is what one run of entries counts: a 32nd of a cluster with extended entries. With standard
ones a cluster is its only subcluster.

In an image with an external data file the offsets are of that file, and no cluster of the image is referred
to. 0 may be the offset of a cluster there: then COPIED is set. No cluster is compressed. `DATA_FILE` is added
to what stands in an entry.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain, repeat
from typing import NamedTuple

from jqcow import _native
from jqcow.ondisk.entries import COPIED, ENTRY, OFFSET_MASK, DamagedEntry, nonzero_words
from jqcow.ondisk.layout import DATA_FILE, MAX_HOST_OFFSET, SECTOR_BYTES, SUBCLUSTERS, Geometry, HostOffset

UNALLOCATED = _native.UNALLOCATED
ZERO_CLUSTER = _native.ZERO
DATA = _native.DATA
COMPRESSED_CLUSTER = _native.COMPRESSED
"""What a guest cluster, or subcluster, is by its L2 entry."""

EXTENDED = struct.Struct(">QQ")
COMPRESSED = 1 << 62
ZERO = 1
L2_RESERVED = 0x3F00_0000_0000_01FE
EXTENDED_RESERVED = L2_RESERVED | ZERO
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1


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


class L2Entry(NamedTuple):
    """An L2 entry, decoded.

    Attributes:
        kind: UNALLOCATED, ZERO_CLUSTER, DATA or COMPRESSED_CLUSTER; of an extended entry DATA if any of its
            subclusters is, else ZERO_CLUSTER if any is.
        host: of the cluster, 0 where it has none; of a compressed cluster the first byte of its data.
        copied: the COPIED flag.
        length: of a compressed cluster, how far in bytes its data may reach; 0 of others.
        allocated: of an extended entry, a bit for each subcluster that is data.
        zeros: of an extended entry, a bit for each subcluster that reads as zeros.
    """

    kind: int
    host: HostOffset = HostOffset(0)
    copied: bool = False
    length: int = 0
    allocated: int = 0
    zeros: int = 0


class L2Run(NamedTuple):
    """``subcluster_count`` subclusters in a row of one kind, from the first one's ``host`` on.

    Those of a DATA run follow each other on the host and have the same COPIED flag. Those that a ZERO_CLUSTER
    run of standard entries keeps need not. A COMPRESSED_CLUSTER run is within one entry, with ``length``.
    """

    kind: int
    host: HostOffset
    subcluster_count: int
    copied: bool
    length: int


class HostRun(NamedTuple):
    """``entry_count`` L2 entries in a row that refer to as many host clusters in a row from ``host`` on.

    ``host`` is 0 where they refer to none. With ``length`` it is one entry, of a compressed cluster.
    """

    host: HostOffset
    entry_count: int
    copied: bool
    length: int


class FoundEntry(NamedTuple):
    """An L2 entry that is not zero as it stands, whether or not an image can have it.

    Attributes:
        position: index in its table.
        raw: the entry itself, of an extended one the word without the bitmap, to be shown to people.
        kind: as in `L2Entry`.
        host: as in `L2Entry`, aligned or not.
        copied: the COPIED flag.
        length: as in `L2Entry`.
        has_reserved: reserved bits are set. The zero flag is none of them, but version 2 does not have it.
        bitmap_fault: what is wrong with the bitmap of an extended entry, "" for nothing.
    """

    position: int
    raw: int
    kind: int
    host: int
    copied: bool
    length: int
    has_reserved: bool
    bitmap_fault: str = ""


_WHOLE = range(1)
"""The part that a standard cluster is of itself."""

NO_ENTRY = L2Entry(UNALLOCATED)
ZERO_ENTRY = L2Entry(ZERO_CLUSTER)
"""The standard entry of a cluster that reads as zeros and has no host cluster."""


def data_entry(host: HostOffset) -> L2Entry:
    """Return the standard entry of a data cluster that has one owner."""
    return L2Entry(DATA, host, True)


class L2Codec(ABC):
    """How an image's L2 tables are read and written. ``index`` counts entries within a buffer.

    Attributes:
        entry_bytes: length of an entry.
        subclusters: how many of them a cluster has.
        subcluster_bytes: length of one.
        per_table: entries in a table.
        per_block: entries in a metadata block.
        subclusters_per_table: subclusters that a table maps.
        subclusters_per_block: subclusters that a metadata block maps.
        zero_entry: of a cluster that reads as zeros and has no host cluster.
    """

    entry_bytes: int
    subclusters: int
    zero_entry: L2Entry

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.subcluster_bytes = geometry.cluster_bytes // self.subclusters
        self.per_table = geometry.cluster_bytes // self.entry_bytes
        self.per_block = geometry.block_bytes // self.entry_bytes
        self.subclusters_per_table = self.per_table * self.subclusters
        self.subclusters_per_block = self.per_block * self.subclusters
        self._cluster_bits = geometry.cluster_bits
        self._is_outside = geometry.has_data_file

    def _host_of(self, entry: int) -> HostOffset:
        """Return the host offset of a standard cluster, 0 where the entry has none."""
        offset = entry & OFFSET_MASK
        reads_as_zeros = self.subclusters == 1 and entry & ZERO
        if self._is_outside and (offset or (entry >= COPIED and not reads_as_zeros)):
            return HostOffset(DATA_FILE + offset)
        return HostOffset(offset)

    # As they stand in a table

    @abstractmethod
    def decode(self, buffer: bytes | bytearray, index: int) -> L2Entry:
        """Return the entry at ``index``.

        Raises:
            DamagedEntry: the entry is not one that an image can have.
        """

    @abstractmethod
    def encode(self, buffer: bytearray, index: int, entry: L2Entry) -> None:
        """Write an entry at ``index``.

        Raises:
            ValueError: compressed data further out, or longer, than an entry can tell.
        """

    @abstractmethod
    def run(self, buffer: bytes | bytearray, position: int, limit: int) -> L2Run:
        """Return the run that starts at subcluster ``position``, at most ``limit`` of them.

        Raises:
            DamagedEntry: one of its entries is not one that an image can have.
        """

    def host_run(self, buffer: bytes | bytearray, index: int, limit: int) -> HostRun:
        """Return which clusters of the image entries refer to: at most ``limit`` of them, from ``index`` on.

        Raises:
            DamagedEntry: one of its entries is not one that an image can have.
        """
        run = self.place_run(buffer, index, limit)
        return run._replace(host=HostOffset(0)) if self._is_outside else run

    @abstractmethod
    def place_run(self, buffer: bytes | bytearray, index: int, limit: int) -> HostRun:
        """As `host_run`, also of clusters that lie in an external data file."""

    @abstractmethod
    def found(self, table: bytes) -> Iterator[FoundEntry]:
        """Yield the entries of a whole table that are not zero, in order; none is refused."""

    @abstractmethod
    def encode_row(self, buffer: bytearray, index: int, entry: L2Entry, count: int) -> None:
        """Write ``count`` entries from ``index`` on: ``entry``, and such for the host clusters behind it."""

    def set_copied(self, buffer: bytearray, start: int, stop: int, *, copied: bool) -> None:
        """Set or clear the COPIED flag of the entries in [start, stop)."""
        _native.set_copied(buffer, start, stop, copied, self.entry_bytes)

    def hosts(self, entry: L2Entry) -> range:
        """Return the indices of the host clusters of the image that an entry refers to."""
        if not entry.host or self._is_outside:
            return range(0)
        first = self.geometry.cluster_of(entry.host)
        return range(first, self.geometry.clusters(entry.host + max(1, entry.length)))

    # As a request changes them. ``part`` are the subclusters of a cluster that it is about.

    def part(self, cluster: int, start: int, end: int) -> range:
        """Return which subclusters of a guest cluster a guest range [start, end) touches."""
        if self.subclusters == 1:
            return _WHOLE
        first = cluster * self.geometry.cluster_bytes
        begin, stop = max(0, start - first), min(self.geometry.cluster_bytes, end - first)
        return range(begin // self.subcluster_bytes, -(-stop // self.subcluster_bytes))

    @abstractmethod
    def filled(self, entry: L2Entry, host: HostOffset, part: range) -> L2Entry:
        """Return the entry of a cluster with data in ``part``, in a host cluster that has one owner.

        Subclusters that are data elsewhere lose it.
        """

    @abstractmethod
    def zeroed(self, entry: L2Entry, part: range, *, unmap: bool) -> L2Entry:
        """Return the entry of a cluster whose ``part`` reads as zeros; of a compressed one all are its part.

        ``unmap`` gives up a host cluster in which nothing is left. One of compressed data goes in any case.
        """

    @abstractmethod
    def emptied(self, entry: L2Entry, part: range) -> L2Entry:
        """Return the entry of a cluster whose ``part`` shows what lies below it; else as `zeroed`.

        A host cluster in which nothing is left is given up.
        """

    @abstractmethod
    def preallocated(self, host: HostOffset) -> L2Entry:
        """Return the entry of a cluster that has a host cluster of zeros, before it is written to."""

    @abstractmethod
    def preallocated_zeros(self, host: HostOffset, *, as_data: bool) -> L2Entry:
        """Return such an entry that hides what lies below; ``as_data``: not by a flag, the host's zeros show.

        Without a zero flag it is data in any case.
        """

    def _decode_compressed(self, entry: int) -> L2Entry:
        if self._is_outside:
            raise DamagedEntry(f"entry {entry:#x} is compressed, in an image with an external data file")
        if entry >= COPIED:
            raise DamagedEntry(f"entry {entry:#x} is compressed and COPIED")
        host, length = compressed_extent(entry, self._cluster_bits)
        return L2Entry(COMPRESSED_CLUSTER, HostOffset(host), False, length)


class StandardL2(L2Codec):
    """8-byte entries."""

    entry_bytes = 8
    subclusters = 1
    zero_entry = ZERO_ENTRY

    def decode(self, buffer: bytes | bytearray, index: int) -> L2Entry:
        """See `L2Codec.decode`."""
        (entry,) = ENTRY.unpack_from(buffer, index * 8)
        if entry & COMPRESSED:
            return self._decode_compressed(entry)
        if entry & L2_RESERVED:
            raise DamagedEntry(f"entry {entry:#x} has reserved bits set")
        host, copied = self._host_of(entry), entry >= COPIED
        if entry & ZERO:
            if not self.geometry.has_zero_flag:
                raise DamagedEntry(f"entry {entry:#x} has the zero flag, which version 2 lacks")
            return L2Entry(ZERO_CLUSTER, host, copied)
        return L2Entry(DATA if host else UNALLOCATED, host, copied)

    def encode(self, buffer: bytearray, index: int, entry: L2Entry) -> None:
        """See `L2Codec.encode`."""
        if entry.kind == COMPRESSED_CLUSTER:
            value = compressed_entry(entry.host, entry.length, self._cluster_bits)
        else:
            value = l2_entry(entry.host & OFFSET_MASK, copied=entry.copied, zero=entry.kind == ZERO_CLUSTER)
        ENTRY.pack_into(buffer, index * 8, value)

    def encode_row(self, buffer: bytearray, index: int, entry: L2Entry, count: int) -> None:
        """See `L2Codec.encode_row`."""
        self.encode(buffer, index, entry)
        (first,) = ENTRY.unpack_from(buffer, index * 8)
        step = self.geometry.cluster_bytes
        struct.pack_into(f">{count}Q", buffer, index * 8, *range(first, first + count * step, step))

    def run(self, buffer: bytes | bytearray, position: int, limit: int) -> L2Run:
        """See `L2Codec.run`."""
        kind, host, count = _native.l2_run(buffer, position, limit, self._cluster_bits)
        if self._is_outside:
            kind, host, count = self._placed_outside(buffer, position, kind, count)
        if kind == DATA:
            # The entries of a run of data differ by their offsets alone.
            (entry,) = ENTRY.unpack_from(buffer, position * 8)
            if entry & L2_RESERVED:
                raise DamagedEntry(f"entry {entry:#x} has reserved bits set")
            return L2Run(kind, HostOffset(host), count, entry >= COPIED, 0)
        if kind == COMPRESSED_CLUSTER:
            found = self.decode(buffer, position)
            return L2Run(kind, found.host, 1, False, found.length)
        self._check_all(buffer, kind, position, count)
        return L2Run(kind, HostOffset(host), count, False, 0)

    def _placed_outside(
        self, buffer: bytes | bytearray, index: int, kind: int, count: int
    ) -> tuple[int, int, int]:
        """Correct a run, which the kernel takes to be in the image: one at offset 0 looks unallocated."""
        (entry,) = ENTRY.unpack_from(buffer, index * 8)
        if kind == UNALLOCATED:
            part = memoryview(buffer)[index * 8 : (index + count) * 8]
            if self._host_of(entry):
                return DATA, self._host_of(entry), 1
            count = next((at for at, (word,) in enumerate(ENTRY.iter_unpack(part)) if at and word), count)
        return kind, self._host_of(entry), count

    def _check_all(self, buffer: bytes | bytearray, kind: int, index: int, count: int) -> None:
        part = memoryview(buffer)[index * 8 : (index + count) * 8]
        if kind == UNALLOCATED and _native.is_zero(part):
            return
        for position in range(index, index + count):
            self.decode(buffer, position)

    def place_run(self, buffer: bytes | bytearray, index: int, limit: int) -> HostRun:
        """See `L2Codec.place_run`."""
        run = self.run(buffer, index, limit)
        if run.kind in (DATA, UNALLOCATED):
            return HostRun(run.host, run.subcluster_count, run.copied, 0)
        # Each entry has its own place: those of a zero run need not follow each other.
        entry = self.decode(buffer, index)
        return HostRun(entry.host, 1, entry.copied, entry.length)

    def found(self, table: bytes) -> Iterator[FoundEntry]:
        """See `L2Codec.found`."""
        # The constructor of a named tuple would take half the time of this walk over millions of entries.
        make, mask, special = tuple.__new__, OFFSET_MASK, COMPRESSED | ZERO | L2_RESERVED
        outside = self._is_outside
        for position, entry in nonzero_words(table):
            host, copied = entry & mask, entry >= COPIED
            if outside:
                host = self._host_of(entry)
            if host and not entry & special:
                yield make(FoundEntry, (position, entry, DATA, host, copied, 0, False, ""))
            elif entry & COMPRESSED:
                first, length = compressed_extent(entry, self._cluster_bits)
                yield FoundEntry(position, entry, COMPRESSED_CLUSTER, first, copied, length, False)
            else:
                kind = ZERO_CLUSTER if entry & ZERO else DATA if host else UNALLOCATED
                yield FoundEntry(position, entry, kind, host, copied, 0, entry & L2_RESERVED != 0)

    def filled(self, entry: L2Entry, host: HostOffset, part: range) -> L2Entry:
        """See `L2Codec.filled`."""
        return data_entry(host)

    def zeroed(self, entry: L2Entry, part: range, *, unmap: bool) -> L2Entry:
        """See `L2Codec.zeroed`."""
        if entry.host and entry.kind != COMPRESSED_CLUSTER and not unmap:
            return entry._replace(kind=ZERO_CLUSTER)
        return self.zero_entry

    def emptied(self, entry: L2Entry, part: range) -> L2Entry:
        """See `L2Codec.emptied`."""
        return NO_ENTRY

    def preallocated(self, host: HostOffset) -> L2Entry:
        """See `L2Codec.preallocated`."""
        return data_entry(host)

    def preallocated_zeros(self, host: HostOffset, *, as_data: bool) -> L2Entry:
        """See `L2Codec.preallocated_zeros`."""
        is_data = as_data or not self.geometry.has_zero_flag
        return L2Entry(DATA if is_data else ZERO_CLUSTER, host, True)


class ExtendedL2(L2Codec):
    """16-byte entries, with subclusters."""

    entry_bytes = 16
    subclusters = SUBCLUSTERS
    zero_entry = L2Entry(ZERO_CLUSTER, zeros=ALL_SUBCLUSTERS)

    def decode(self, buffer: bytes | bytearray, index: int) -> L2Entry:
        """See `L2Codec.decode`."""
        entry, bitmap = EXTENDED.unpack_from(buffer, index * 16)
        if entry & COMPRESSED:
            if bitmap:
                raise DamagedEntry(f"entry {entry:#x} is compressed and has subclusters")
            return self._decode_compressed(entry)
        if entry & EXTENDED_RESERVED:
            raise DamagedEntry(f"entry {entry:#x} has reserved bits set")
        host, allocated, zeros = self._host_of(entry), bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
        if host % self.geometry.cluster_bytes:
            raise DamagedEntry(f"host offset {host:#x} is not a cluster's")
        fault = _bitmap_fault(host, allocated, zeros)
        if fault:
            raise DamagedEntry(f"entry {entry:#x} has {fault}")
        kind = _kind_of(allocated, zeros)
        return L2Entry(kind, HostOffset(host), entry >= COPIED, 0, allocated, zeros)

    def encode(self, buffer: bytearray, index: int, entry: L2Entry) -> None:
        """See `L2Codec.encode`."""
        if entry.kind == COMPRESSED_CLUSTER:
            word, bitmap = compressed_entry(entry.host, entry.length, self._cluster_bits), 0
        else:
            word = l2_entry(entry.host & OFFSET_MASK, copied=entry.copied)
            bitmap = entry.zeros << SUBCLUSTERS | entry.allocated
        EXTENDED.pack_into(buffer, index * 16, word, bitmap)

    def encode_row(self, buffer: bytearray, index: int, entry: L2Entry, count: int) -> None:
        """See `L2Codec.encode_row`."""
        self.encode(buffer, index, entry)
        first, bitmap = EXTENDED.unpack_from(buffer, index * 16)
        step = self.geometry.cluster_bytes
        words = zip(range(first, first + count * step, step), repeat(bitmap))
        struct.pack_into(f">{2 * count}Q", buffer, index * 16, *chain.from_iterable(words))

    def run(self, buffer: bytes | bytearray, position: int, limit: int) -> L2Run:
        """See `L2Codec.run`."""
        index, subcluster = divmod(position, SUBCLUSTERS)
        entry = self.decode(buffer, index)
        kind, count = _native.subcluster_run(buffer, position, limit, self._cluster_bits)
        host = entry.host
        if host and kind != COMPRESSED_CLUSTER:
            host = HostOffset(host + subcluster * self.subcluster_bytes)
        return L2Run(kind, host, count, entry.copied, entry.length)

    def place_run(self, buffer: bytes | bytearray, index: int, limit: int) -> HostRun:
        """See `L2Codec.place_run`."""
        entry = self.decode(buffer, index)
        if entry.kind == COMPRESSED_CLUSTER:
            return HostRun(entry.host, 1, entry.copied, entry.length)
        if self._is_outside and not entry.host:
            is_empty, count = _native.zero_run(buffer, index, index + limit, 16)
            return HostRun(entry.host, count if is_empty else 1, entry.copied, 0)
        _, host, count = _native.l2_run(buffer, index, limit, self._cluster_bits, 16)
        # One at offset 0 of a data file looks like those that have none.
        return HostRun(entry.host, count if host or not self._is_outside else 1, entry.copied, 0)

    def found(self, table: bytes) -> Iterator[FoundEntry]:
        """See `L2Codec.found`."""
        last = -1
        for half, _ in nonzero_words(table):
            position = half // 2
            if position == last:
                continue
            last = position
            entry, bitmap = EXTENDED.unpack_from(table, position * 16)
            copied = entry >= COPIED
            if entry & COMPRESSED:
                host, length = compressed_extent(entry, self._cluster_bits)
                kind, has_reserved = COMPRESSED_CLUSTER, False
                fault = "subclusters of compressed data" if bitmap else ""
            else:
                allocated, zeros = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
                host, length, kind = self._host_of(entry), 0, _kind_of(allocated, zeros)
                has_reserved = entry & EXTENDED_RESERVED != 0
                fault = _bitmap_fault(host, allocated, zeros)
            yield FoundEntry(position, entry, kind, host, copied, length, has_reserved, fault)

    def filled(self, entry: L2Entry, host: HostOffset, part: range) -> L2Entry:
        """See `L2Codec.filled`."""
        mask = _mask(part)
        allocated = mask | (entry.allocated if entry.host == host else 0)
        zeros = entry.zeros & ~allocated
        return L2Entry(DATA, host, True, 0, allocated, zeros)

    def zeroed(self, entry: L2Entry, part: range, *, unmap: bool) -> L2Entry:
        """See `L2Codec.zeroed`."""
        return self._without(entry, part, zeros=_mask(part), unmap=unmap)

    def emptied(self, entry: L2Entry, part: range) -> L2Entry:
        """See `L2Codec.emptied`."""
        return self._without(entry, part, zeros=0, unmap=True)

    def preallocated(self, host: HostOffset) -> L2Entry:
        """See `L2Codec.preallocated`: as QEMU makes it, no subcluster is data yet."""
        return L2Entry(UNALLOCATED, host, True)

    def preallocated_zeros(self, host: HostOffset, *, as_data: bool) -> L2Entry:
        """See `L2Codec.preallocated_zeros`."""
        if as_data:
            return L2Entry(DATA, host, True, 0, ALL_SUBCLUSTERS)
        return L2Entry(ZERO_CLUSTER, host, True, 0, 0, ALL_SUBCLUSTERS)

    def _without(self, entry: L2Entry, part: range, *, zeros: int, unmap: bool) -> L2Entry:
        if entry.kind == COMPRESSED_CLUSTER:
            entry = NO_ENTRY
        allocated = entry.allocated & ~_mask(part)
        zeros |= entry.zeros & ~_mask(part)
        host, copied = entry.host, entry.copied
        if unmap and not allocated:
            host, copied = HostOffset(0), False
        return L2Entry(_kind_of(allocated, zeros), host, copied, 0, allocated, zeros)


def _mask(part: range) -> int:
    return (1 << part.stop) - (1 << part.start)


def _kind_of(allocated: int, zeros: int) -> int:
    return DATA if allocated else ZERO_CLUSTER if zeros else UNALLOCATED


def _bitmap_fault(host: int, allocated: int, zeros: int) -> str:
    if allocated & zeros:
        return "subclusters that are data and zeros"
    return "" if host or not allocated else "subclusters of data without a cluster"


def codec_of(geometry: Geometry) -> L2Codec:
    """Return the codec of an image's L2 entries."""
    return ExtendedL2(geometry) if geometry.has_subclusters else StandardL2(geometry)


def reserved_bits(geometry: Geometry) -> int:
    """Return the bits that no standard entry, or first word of an extended one, has set."""
    if geometry.has_subclusters:
        return EXTENDED_RESERVED
    return L2_RESERVED if geometry.has_zero_flag else L2_RESERVED | ZERO
