"""From guest to host offsets: the L1 table and the L2 tables (qcow2 specification, "Cluster mapping").

G1. A host offset taken from a table is cluster-aligned, past the header cluster, and outside the journal
    range; otherwise the access raises and nothing is touched.
G2. A guest write in place never lands on a cluster that holds metadata.
G3. An L2 table is changed only where one L1 table alone points to it; a shared one is copied first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jqcow import _native
from jqcow.engine.metadata import Metadata
from jqcow.engine.refcounts import Refcounts
from jqcow.engine.space import Space
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import entries, layout
from jqcow.ondisk.layout import ENTRY_BYTES

UNALLOCATED = _native.UNALLOCATED
ZERO = _native.ZERO
DATA = _native.DATA
COMPRESSED = _native.COMPRESSED
COPIED_BYTE = entries.COPIED >> 56
"""The COPIED flag in the first byte of an entry."""


@dataclass(frozen=True, slots=True)
class MappedRun:
    """``length`` guest bytes of one kind. ``host_offset`` is that of the first byte, 0 where there is none.

    A ZERO run may keep host clusters; ``host_offset`` is then that of its first cluster only. A COMPRESSED
    run lies within one cluster; ``host_offset`` is then its descriptor, bits 0 to 61 of the L2 entry.
    ``copied`` is the COPIED flag of all entries of a DATA run.
    """

    kind: int
    host_offset: int
    length: int
    copied: bool = False


@dataclass(frozen=True, slots=True)
class HostRun:
    """``count`` host clusters from ``cluster`` on, which the L2 entries from ``position`` on refer to.

    ``compressed``: they are those of one entry, of a compressed cluster.
    """

    position: int
    cluster: int
    count: int
    copied: bool
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class L1Table:
    """An L1 table: host offset in bytes and number of entries, and the size of the disk that it maps."""

    offset: int
    entry_count: int
    disk_bytes: int


class Mapping:
    """The mapping of one image. Guest and host offsets are in bytes."""

    def __init__(self, metadata: Metadata, space: Space) -> None:
        self.metadata = metadata
        self.space = space
        self.geometry = metadata.geometry
        self._cluster_bytes = self.geometry.cluster_bytes
        self._l2_bits = self.geometry.l2_entries.bit_length() - 1
        self.shown: L1Table | None = None
        """The L1 table to show instead of the active one: a snapshot's, in an image opened for reading."""

    @property
    def l1(self) -> L1Table:
        """The L1 table that maps the disk."""
        if self.shown is not None:
            return self.shown
        header = self.metadata.header
        return L1Table(header.l1_table_offset, header.l1_size, header.size)

    @property
    def disk_bytes(self) -> int:
        """Size of the disk."""
        return self.metadata.header.size if self.shown is None else self.shown.disk_bytes

    # Looking up

    def l2_table(self, l1_index: int, l1: L1Table | None = None) -> int:
        """Return the host offset of an L2 table of ``l1`` (None: of the disk's), 0 where there is none.

        Raises:
            CorruptionError: the L1 entry is not one that an image can have.
        """
        l1 = l1 or self.l1
        if l1_index >= l1.entry_count:
            return 0
        entry_offset = l1.offset + l1_index * ENTRY_BYTES
        entry = self.metadata.entry(entry_offset)
        if not entry:
            return 0
        offset = entry & entries.OFFSET_MASK
        if entry & entries.L1_RESERVED or not offset:
            raise CorruptionError("L1 table", entry_offset, f"entry {entry:#x} is not valid")
        self._check_host("L1 table", entry_offset, offset, 1)
        return offset

    def l2_tables(self, l1_index: int, l1: L1Table | None = None) -> Iterator[tuple[int, int]]:
        """Yield the L2 tables from ``l1_index`` on: (L1 index, host offset). Each may be dropped then."""
        l1 = l1 or self.l1
        while l1_index < l1.entry_count:
            table = self.l2_table(l1_index, l1)
            if table:
                yield l1_index, table
            l1_index += 1 if table else self._absent_tables(l1_index, l1)

    def run(self, offset: int, length: int) -> MappedRun:
        """Return the first run of one kind at guest ``offset``: at most ``length`` bytes, within one block.

        Raises:
            CorruptionError: a table entry on the way is not one that an image can have.
        """
        cluster, within = divmod(offset, self._cluster_bytes)
        l1_index, l2_index = cluster >> self._l2_bits, cluster & (self.geometry.l2_entries - 1)
        per_block = self.geometry.entries_per_block
        index = l2_index % per_block
        limit = min(per_block - index, self.geometry.clusters(within + length))
        l1 = self.l1
        table = self.l2_table(l1_index, l1)
        if not table:
            # Without an L2 table all that it would map is unallocated, up to the next table there is.
            tables = self._absent_tables(l1_index, l1)
            reach = (tables * self.geometry.l2_entries - l2_index) * self._cluster_bytes - within
            return MappedRun(UNALLOCATED, 0, min(length, reach))
        block_offset = table + (l2_index - index) * ENTRY_BYTES
        block = self.metadata.block(block_offset)
        kind, host, count = _native.l2_run(block, index, limit, self.geometry.cluster_bits)
        entry_offset = block_offset + index * ENTRY_BYTES
        if kind == COMPRESSED:
            (entry,) = entries.ENTRY.unpack_from(block, index * ENTRY_BYTES)
            self._check_entry(entry, entry_offset)
        else:
            self._check_entries(block, kind, index, count, entry_offset)
            if host:
                self._check_host("L2 table", entry_offset, host, count if kind == DATA else 1)
        run_bytes = min(length, count * self._cluster_bytes - within)
        if kind == DATA:
            return MappedRun(kind, host + within, run_bytes, copied=block[index * ENTRY_BYTES] >= COPIED_BYTE)
        return MappedRun(kind, host, run_bytes)

    def _absent_tables(self, l1_index: int, l1: L1Table) -> int:
        """Return how many L2 tables are absent from ``l1_index`` on, within one block; at least 1."""
        position = l1_index % self.geometry.entries_per_block
        limit = min(self.geometry.entries_per_block, position + l1.entry_count - l1_index)
        if limit <= position:
            return 1
        block = self.metadata.block(l1.offset + (l1_index - position) * ENTRY_BYTES)
        # An L1 entry is as wide as a refcount of order 6.
        present = _native.refcount_find_used(block, 6, position, limit)
        return (limit if present < 0 else present) - position

    def runs(self, offset: int, length: int) -> Iterator[MappedRun]:
        """Yield the runs of a guest range in order."""
        end = offset + length
        while offset < end:
            run = self.run(offset, end - offset)
            yield run
            offset += run.length

    def l2_entry(self, guest_cluster: int) -> int:
        """Return the L2 entry of a guest cluster, 0 where there is no L2 table.

        Raises:
            CorruptionError: the entry is not one that an image can have.
        """
        table = self.l2_table(guest_cluster >> self._l2_bits)
        if not table:
            return 0
        entry_offset = table + (guest_cluster & (self.geometry.l2_entries - 1)) * ENTRY_BYTES
        entry = self.metadata.entry(entry_offset)
        self._check_entry(entry, entry_offset)
        return entry

    def l1_entry(self, l1_index: int) -> int:
        """Return an entry of the active L1 table."""
        return self.metadata.entry(self.metadata.header.l1_table_offset + l1_index * ENTRY_BYTES)

    def references(self, table: int) -> Iterator[tuple[int, int]]:
        """Yield (start, count) of the host clusters that the entries of an L2 table refer to, in its order.

        Raises:
            CorruptionError: an entry is not one that an image can have.
        """
        for block in range(table, table + self._cluster_bytes, self.geometry.block_bytes):
            for run in self._host_runs(block):
                yield run.cluster, run.count

    def standard_runs(self, block: int) -> Iterator[HostRun]:
        """Yield the runs of a block of L2 entries whose COPIED flag counts: not of compressed clusters."""
        return (run for run in self._host_runs(block) if not run.compressed)

    def _host_runs(self, block: int) -> Iterator[HostRun]:
        index, per_block = 0, self.geometry.entries_per_block
        while index < per_block:
            # Taken anew each time: the caller may have changed the flags of the run before.
            data = self.metadata.block(block)
            kind, host, count = _native.l2_run(data, index, per_block - index, self.geometry.cluster_bits)
            place = block + index * ENTRY_BYTES
            if kind == DATA:
                self._check_entries(data, kind, index, count, place)
                self._check_host("L2 table", place, host, count)
                copied = data[index * ENTRY_BYTES] >= COPIED_BYTE
                yield HostRun(index, host // self._cluster_bytes, count, copied=copied)
            elif kind != UNALLOCATED:
                # Each entry has its own place: those of a zero run need not follow each other.
                count = 1
                (entry,) = entries.ENTRY.unpack_from(data, index * ENTRY_BYTES)
                self._check_entry(entry, place)
                hosts = self.hosts(entry)
                if hosts:
                    copied, compressed = entry >= entries.COPIED, kind == COMPRESSED
                    yield HostRun(index, hosts.start, len(hosts), copied=copied, compressed=compressed)
            index += count

    def hosts(self, entry: int) -> range:
        """Return the indices of the host clusters that an L2 entry refers to."""
        if entry & entries.COMPRESSED:
            offset, length = entries.compressed_extent(entry, self.geometry.cluster_bits)
            return range(offset // self._cluster_bytes, self.geometry.clusters(offset + length))
        host = entry & entries.OFFSET_MASK
        first = host // self._cluster_bytes
        return range(first, first + 1 if host else first)

    def _check_entry(self, entry: int, entry_offset: int) -> None:
        """Raise CorruptionError unless an L2 entry is one that an image can have (G1)."""
        if entry & entries.COMPRESSED:
            hosts = self.hosts(entry)
            if entry & entries.COPIED:
                raise CorruptionError("L2 table", entry_offset, f"entry {entry:#x} is compressed and COPIED")
            self._check_host("L2 table", entry_offset, hosts.start * self._cluster_bytes, len(hosts))
            return
        if entry & entries.L2_RESERVED:
            raise CorruptionError("L2 table", entry_offset, f"entry {entry:#x} has reserved bits set")
        host = entry & entries.OFFSET_MASK
        if host:
            self._check_host("L2 table", entry_offset, host, 1)

    def _check_entries(
        self, block: bytes | bytearray, kind: int, index: int, count: int, entry_offset: int
    ) -> None:
        """Raise CorruptionError where one of a run's entries has reserved bits set."""
        if kind == UNALLOCATED and _native.is_zero(
            memoryview(block)[index * ENTRY_BYTES : (index + count) * ENTRY_BYTES]
        ):
            return
        # The entries of a run of data differ by their offsets alone.
        for position in range(index, index + (1 if kind == DATA else count)):
            (entry,) = entries.ENTRY.unpack_from(block, position * ENTRY_BYTES)
            if entry & entries.L2_RESERVED:
                raise CorruptionError("L2 table", entry_offset, f"entry {entry:#x} has reserved bits set")

    def _check_host(self, structure: str, entry_offset: int, host: int, count: int) -> None:
        """Raise unless ``count`` clusters at ``host`` may be used by a table entry (G1)."""
        if host % self._cluster_bytes or host < self._cluster_bytes:
            raise CorruptionError(structure, entry_offset, f"host offset {host:#x} is not a cluster's")
        cluster = host // self._cluster_bytes
        for start, end in self.space.reserved:
            if start < cluster + count and cluster < end:
                raise CorruptionError(structure, entry_offset, f"host offset {host:#x} is in the journal")

    # Staging, inside an operation

    def set_entries(self, guest_cluster: int, values: list[int], refcounts: Refcounts) -> None:
        """Stage L2 entries for guest clusters in a row, within one metadata block of one L2 table.

        Raises:
            OSError: the host has no space for an L2 table.
        """
        table = self._own_l2_table(guest_cluster >> self._l2_bits, refcounts)
        l2_index = guest_cluster & (self.geometry.l2_entries - 1)
        index = l2_index % self.geometry.entries_per_block
        block = self.metadata.edit(table + (l2_index - index) * ENTRY_BYTES)
        for position, value in enumerate(values, index):
            entries.ENTRY.pack_into(block, position * ENTRY_BYTES, value)

    def _own_l2_table(self, l1_index: int, refcounts: Refcounts) -> int:
        """Return the host offset of an L2 table that may be changed (G3)."""
        shared = self.l2_table(l1_index)
        if shared and refcounts.get(shared // self._cluster_bytes) == 1:
            return shared
        if l1_index >= self.metadata.header.l1_size:
            self.grow_l1(l1_index + 1, refcounts)
        table = refcounts.allocate_metadata()
        if shared:
            self.copy_table(shared, table, self._cluster_bytes)
            refcounts.release_metadata(shared // self._cluster_bytes)
        self.set_l1_entry(l1_index, entries.l1_entry(table))
        return table

    def set_l1_entry(self, l1_index: int, entry: int) -> None:
        """Stage an L1 entry."""
        self.metadata.set_entry(self.metadata.header.l1_table_offset + l1_index * ENTRY_BYTES, entry)

    def copy_table(self, source: int, target: int, length: int) -> None:
        """Stage a copy of ``length`` bytes of a table in new, zeroed metadata clusters."""
        for position in range(0, length, self.geometry.block_bytes):
            used = min(self.geometry.block_bytes, length - position)
            old = self.metadata.block(source + position)[:used]
            if not _native.is_zero(old):
                self.metadata.edit(target + position)[:used] = old

    def drop_l2_table(self, l1_index: int, refcounts: Refcounts) -> None:
        """Stage an L1 entry without an L2 table, and give up the table."""
        table = self.l2_table(l1_index)
        self.set_l1_entry(l1_index, 0)
        refcounts.release_metadata(table // self._cluster_bytes)

    def grow_l1(self, l1_size: int, refcounts: Refcounts) -> None:
        """Give the L1 table at least ``l1_size`` entries, in other clusters; the new entries are 0."""
        header = self.metadata.header
        if l1_size <= header.l1_size:
            return
        if l1_size * ENTRY_BYTES > layout.MAX_L1_BYTES:
            raise UnsupportedFeatureError("an L1 table of more than 32 MiB")
        offset = refcounts.allocate_metadata(self.geometry.clusters(l1_size * ENTRY_BYTES))
        self.copy_table(header.l1_table_offset, offset, header.l1_size * ENTRY_BYTES)
        self.metadata.set_header(l1_table_offset=offset, l1_size=l1_size)
        first_old = header.l1_table_offset // self._cluster_bytes
        refcounts.release_metadata(first_old, self.geometry.clusters(header.l1_size * ENTRY_BYTES))

    # What holds metadata

    def metadata_clusters(self) -> Iterator[tuple[str, int]]:
        """Yield the clusters of header, refcount table and L1 table: (structure, cluster index)."""
        header = self.metadata.header
        yield "header", 0
        first = header.refcount_table_offset // self._cluster_bytes
        for position in range(header.refcount_table_clusters):
            yield "refcount table", first + position
        yield from self.l1_clusters(self.l1)

    def l1_clusters(self, l1: L1Table) -> Iterator[tuple[str, int]]:
        """Yield the clusters of an L1 table: (structure, cluster index)."""
        first = l1.offset // self._cluster_bytes
        for position in range(self.geometry.clusters(l1.entry_count * ENTRY_BYTES)):
            yield "L1 table", first + position
