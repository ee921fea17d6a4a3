"""From guest to host offsets: the L1 table and the L2 tables (qcow2 specification, "Cluster mapping").

G1. A host offset taken from a table is cluster-aligned, past the header cluster, and outside the journal
    range; otherwise the access raises and nothing is touched.
G2. A guest write in place never lands on a cluster that holds metadata.
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


@dataclass(frozen=True, slots=True)
class MappedRun:
    """``length`` guest bytes of one kind. ``host_offset`` is that of the first byte, 0 where there is none.

    A ZERO run may keep host clusters; ``host_offset`` is then that of its first cluster only.
    """

    kind: int
    host_offset: int
    length: int


class Mapping:
    """The mapping of one image. Guest and host offsets are in bytes."""

    def __init__(self, metadata: Metadata, space: Space) -> None:
        self.metadata = metadata
        self.space = space
        self.geometry = metadata.geometry
        self._cluster_bytes = self.geometry.cluster_bytes
        self._l2_bits = self.geometry.l2_entries.bit_length() - 1

    # Looking up

    def l2_table(self, l1_index: int) -> int:
        """Return the host offset of an L2 table, 0 where there is none.

        Raises:
            CorruptionError: the L1 entry is not one that an image can have.
        """
        header = self.metadata.header
        if l1_index >= header.l1_size:
            return 0
        entry_offset = header.l1_table_offset + l1_index * ENTRY_BYTES
        entry = self.metadata.entry(entry_offset)
        if not entry:
            return 0
        offset = entry & entries.OFFSET_MASK
        if entry & entries.L1_RESERVED or not offset:
            raise CorruptionError("L1 table", entry_offset, f"entry {entry:#x} is not valid")
        self._check_host("L1 table", entry_offset, offset, 1)
        return offset

    def l2_tables(self, l1_index: int) -> Iterator[tuple[int, int]]:
        """Yield the L2 tables from ``l1_index`` on: (L1 index, host offset). Each may be dropped then."""
        while l1_index < self.metadata.header.l1_size:
            table = self.l2_table(l1_index)
            if table:
                yield l1_index, table
            l1_index += 1 if table else self._absent_tables(l1_index)

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
        table = self.l2_table(l1_index)
        if not table:
            # Without an L2 table all that it would map is unallocated, up to the next table there is.
            tables = self._absent_tables(l1_index)
            reach = (tables * self.geometry.l2_entries - l2_index) * self._cluster_bytes - within
            return MappedRun(UNALLOCATED, 0, min(length, reach))
        block_offset = table + (l2_index - index) * ENTRY_BYTES
        block = self.metadata.block(block_offset)
        kind, host, count = _native.l2_run(block, index, limit, self.geometry.cluster_bits)
        entry_offset = block_offset + index * ENTRY_BYTES
        if kind != COMPRESSED:
            self._check_entries(block, index, count, entry_offset)
            if host:
                self._check_host("L2 table", entry_offset, host, count if kind == DATA else 1)
        run_bytes = min(length, count * self._cluster_bytes - within)
        return MappedRun(kind, host + within if kind == DATA else host, run_bytes)

    def _absent_tables(self, l1_index: int) -> int:
        """Return how many L2 tables are absent from ``l1_index`` on, within one block; at least 1."""
        header = self.metadata.header
        position = l1_index % self.geometry.entries_per_block
        limit = min(self.geometry.entries_per_block, position + header.l1_size - l1_index)
        if limit <= position:
            return 1
        block = self.metadata.block(header.l1_table_offset + (l1_index - position) * ENTRY_BYTES)
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
        """Return the L2 entry of a guest cluster, 0 where there is no L2 table. Not for compressed ones.

        Raises:
            CorruptionError: the entry is not one that an image can have.
            UnsupportedFeatureError: the cluster is compressed.
        """
        table = self.l2_table(guest_cluster >> self._l2_bits)
        if not table:
            return 0
        entry_offset = table + (guest_cluster & (self.geometry.l2_entries - 1)) * ENTRY_BYTES
        entry = self.metadata.entry(entry_offset)
        if entry & entries.COMPRESSED:
            guest_offset = guest_cluster * self._cluster_bytes
            raise UnsupportedFeatureError("a compressed cluster", f"at guest offset {guest_offset}")
        if entry & entries.L2_RESERVED:
            raise CorruptionError("L2 table", entry_offset, f"entry {entry:#x} has reserved bits set")
        host = entry & entries.OFFSET_MASK
        if host:
            self._check_host("L2 table", entry_offset, host, 1)
        return entry

    def entry_host(self, guest_cluster: int) -> int:
        """Return the host offset in a guest cluster's entry, 0 where there is none."""
        return self.l2_entry(guest_cluster) & entries.OFFSET_MASK

    def _check_entries(self, block: bytes | bytearray, index: int, count: int, entry_offset: int) -> None:
        for position in range(index, index + count):
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
        """Stage L2 entries for guest clusters in a row, within one metadata block of one L2 table."""
        l1_index = guest_cluster >> self._l2_bits
        l2_index = guest_cluster & (self.geometry.l2_entries - 1)
        table = self.l2_table(l1_index) or self._add_l2_table(l1_index, refcounts)
        index = l2_index % self.geometry.entries_per_block
        block = self.metadata.edit(table + (l2_index - index) * ENTRY_BYTES)
        for position, value in enumerate(values, index):
            entries.ENTRY.pack_into(block, position * ENTRY_BYTES, value)

    def _add_l2_table(self, l1_index: int, refcounts: Refcounts) -> int:
        if l1_index >= self.metadata.header.l1_size:
            self.grow_l1(l1_index + 1, refcounts)
        table = refcounts.allocate_metadata()
        header = self.metadata.header
        self.metadata.set_entry(header.l1_table_offset + l1_index * ENTRY_BYTES, entries.l1_entry(table))
        return table

    def drop_l2_table(self, l1_index: int, refcounts: Refcounts) -> None:
        """Stage an L1 entry without an L2 table, and free the table."""
        table = self.l2_table(l1_index)
        self.metadata.set_entry(self.metadata.header.l1_table_offset + l1_index * ENTRY_BYTES, 0)
        refcounts.release_metadata(table // self._cluster_bytes)

    def grow_l1(self, l1_size: int, refcounts: Refcounts) -> None:
        """Give the L1 table at least ``l1_size`` entries, in other clusters; the new entries are 0."""
        header = self.metadata.header
        if l1_size <= header.l1_size:
            return
        if l1_size * ENTRY_BYTES > layout.MAX_L1_BYTES:
            raise UnsupportedFeatureError("an L1 table of more than 32 MiB")
        old_clusters = self.geometry.clusters(header.l1_size * ENTRY_BYTES)
        offset = refcounts.allocate_metadata(self.geometry.clusters(l1_size * ENTRY_BYTES))
        for position in range(0, header.l1_size * ENTRY_BYTES, self.geometry.block_bytes):
            used = min(self.geometry.block_bytes, header.l1_size * ENTRY_BYTES - position)
            old = self.metadata.block(header.l1_table_offset + position)[:used]
            if not _native.is_zero(old):
                self.metadata.edit(offset + position)[:used] = old
        self.metadata.set_header(l1_table_offset=offset, l1_size=l1_size)
        first_old = header.l1_table_offset // self._cluster_bytes
        for cluster in range(first_old, first_old + old_clusters):
            refcounts.release_metadata(cluster)

    # What holds metadata

    def metadata_clusters(self) -> Iterator[tuple[str, int]]:
        """Yield every cluster that holds metadata: (structure, cluster index)."""
        header = self.metadata.header
        yield "header", 0
        first = header.l1_table_offset // self._cluster_bytes
        for position in range(self.geometry.clusters(header.l1_size * ENTRY_BYTES)):
            yield "L1 table", first + position
        first = header.refcount_table_offset // self._cluster_bytes
        for position in range(header.refcount_table_clusters):
            yield "refcount table", first + position
        for _, table in self.l2_tables(0):
            yield "L2 table", table // self._cluster_bytes


def survey(mapping: Mapping, refcounts: Refcounts) -> set[int]:
    """Return the clusters that hold metadata, each of them checked to be used once and counted.

    Done once before the first change: an allocator that finds a live table "free" destroys the image.

    Raises:
        CorruptionError: a metadata cluster is used twice, or its refcount is 0.
    """
    found: set[int] = set()

    def add(structure: str, cluster: int) -> None:
        offset = cluster * mapping.geometry.cluster_bytes
        if cluster in found:
            raise CorruptionError(structure, offset, "the cluster holds other metadata too")
        if refcounts.get(cluster) == 0:
            raise CorruptionError(structure, offset, "its refcount is 0")
        found.add(cluster)

    for structure, cluster in mapping.metadata_clusters():
        add(structure, cluster)
    for _, block in refcounts.blocks_from_top():
        add("refcount block", block // mapping.geometry.cluster_bytes)
    return found
