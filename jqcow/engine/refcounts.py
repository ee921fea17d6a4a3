"""Refcounts and the allocation of host clusters (qcow2 specification, "Host cluster management").

R1. A refcount is raised in the operation, and so in the record, that makes the reference.
R2. A cluster is handed out only if its refcount, staged changes included, is 0.
R3. The home of a metadata cluster is allocated on the host before a record names it, and that of every
    older one before the first record: a full disk fails the operation, not the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator

from jqcow import _native
from jqcow.engine.metadata import Metadata
from jqcow.engine.space import ClusterRuns, Run, Space
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk.entries import REFCOUNT_TABLE_OFFSET_MASK, REFCOUNT_TABLE_RESERVED
from jqcow.ondisk.layout import ENTRY_BYTES

SCAN_BLOCKS_PER_TAKE = 16
"""Refcount blocks searched for free clusters before the file grows instead."""


class Refcounts:
    """The refcounts of one image, read and changed through staged metadata blocks."""

    def __init__(self, metadata: Metadata, space: Space) -> None:
        self.metadata = metadata
        self.space = space
        self.geometry = metadata.geometry
        self.metadata_clusters: set[int] = set()
        self._scan_cluster = 0
        self._scan_end = 0

    # Reading

    @property
    def table_entries(self) -> int:
        """Entries in the refcount table."""
        clusters = self.metadata.header.refcount_table_clusters
        return clusters * self.geometry.cluster_bytes // ENTRY_BYTES

    def refcount_block(self, index: int) -> int:
        """Return the host offset of the refcount block ``index``, 0 where all its refcounts are 0.

        Raises:
            CorruptionError: the refcount table entry is not one that an image can have.
        """
        if index >= self.table_entries:
            return 0
        entry_offset = self.metadata.header.refcount_table_offset + index * ENTRY_BYTES
        entry = self.metadata.entry(entry_offset)
        offset = entry & REFCOUNT_TABLE_OFFSET_MASK
        if entry & REFCOUNT_TABLE_RESERVED or offset % self.geometry.cluster_bytes:
            raise CorruptionError("refcount table", entry_offset, f"entry {entry:#x} is not valid")
        if offset >= layout.MAX_HOST_OFFSET:
            raise CorruptionError("refcount table", entry_offset, f"entry {entry:#x} is out of bounds")
        return offset

    def get(self, cluster: int) -> int:
        """Return the refcount of a host cluster, staged changes included."""
        index, within = divmod(cluster, self.geometry.refcounts_per_cluster)
        block = self.refcount_block(index)
        if not block:
            return 0
        piece, position = divmod(within, self.geometry.refcounts_per_block)
        data = self.metadata.block(block + piece * self.geometry.block_bytes)
        return _native.refcount_get(data, position, self.geometry.refcount_order)

    def used_end(self) -> int:
        """Return the cluster index behind the highest cluster with a nonzero refcount.

        Raises:
            CorruptionError: a refcount block is used twice, so that a search could take forever.
        """
        seen: set[int] = set()
        for index, block in self.blocks_from_top():
            if block in seen:
                raise CorruptionError("refcount table", block, "one refcount block is used twice")
            seen.add(block)
            last = self._last_used(block)
            if last >= 0:
                return index * self.geometry.refcounts_per_cluster + last + 1
        return 0

    def blocks_from_top(self) -> Iterator[tuple[int, int]]:
        """Yield (index, host offset) of all refcount blocks, highest index first."""
        table, per_block = self.metadata.header.refcount_table_offset, self.geometry.entries_per_block
        for base in reversed(range(0, self.table_entries, per_block)):
            entries = self.metadata.block(table + base * ENTRY_BYTES)
            # A table entry is as wide as a refcount of order 6.
            for position in range(_native.refcount_last_used(entries, 6), -1, -1):
                block = self.refcount_block(base + position)
                if block:
                    yield base + position, block

    def _last_used(self, block: int) -> int:
        for piece in reversed(range(self.geometry.cluster_bytes // self.geometry.block_bytes)):
            data = self.metadata.block(block + piece * self.geometry.block_bytes)
            last = _native.refcount_last_used(data, self.geometry.refcount_order)
            if last >= 0:
                return piece * self.geometry.refcounts_per_block + last
        return -1

    def is_free(self, start: int, end: int) -> bool:
        """Return True if all clusters in [start, end) have refcount 0."""
        return all(self.get(cluster) == 0 for cluster in range(start, end))

    # Allocation, inside an operation

    def allocate(self, count: int) -> Run:
        """Allocate up to ``count`` clusters in a row, at least one, with refcount 1.

        Raises:
            OSError: the host has no space for a refcount block.
            CorruptionError: a cluster that should be free is not.
        """
        self._search_if_short()
        run = self.space.take(count)
        self.metadata_clusters.difference_update(range(run.start, run.start + run.count))
        self._raise(run.start, run.count)
        return run

    def allocate_metadata(self, count: int = 1) -> int:
        """Allocate ``count`` zeroed metadata clusters in a row; return their host offset.

        Raises:
            OSError: the host has no space for them.
        """
        run = self.space.take(1) if count == 1 else self.space.take_at_frontier(count)
        offset = self._prepare_home(run)
        self._raise(run.start, run.count)
        return offset

    def _prepare_home(self, run: Run) -> int:
        cluster_bytes = self.geometry.cluster_bytes
        offset = run.start * cluster_bytes
        if offset + run.count * cluster_bytes > layout.MAX_HOST_OFFSET:
            raise UnsupportedFeatureError("a file of more than 64 PiB")
        # R3: the checkpoint must not be the one that finds the disk full.
        self.metadata.medium.allocate(offset, run.count * cluster_bytes)
        for cluster in range(run.start, run.start + run.count):
            self.metadata.zero_cluster(cluster * cluster_bytes)
            self.metadata_clusters.add(cluster)
        return offset

    def allocate_homes(self) -> None:
        """Give every metadata cluster its space on the host: who made the image may have left holes (R3).

        Raises:
            OSError: the host has no space for them.
        """
        cluster_bytes = self.geometry.cluster_bytes
        runs = ClusterRuns()
        for cluster in sorted(self.metadata_clusters):
            runs.add(cluster, 1)
        for start, count in runs:
            self.metadata.medium.allocate(start * cluster_bytes, count * cluster_bytes)

    def _raise(self, start: int, count: int) -> None:
        for cluster in range(start, start + count):
            before = self.get(cluster)
            if before:
                raise CorruptionError(
                    "refcount block",
                    cluster * self.geometry.cluster_bytes,
                    f"a free cluster has refcount {before}",
                )
            self._set(cluster, 1)

    def _set(self, cluster: int, value: int) -> None:
        index, within = divmod(cluster, self.geometry.refcounts_per_cluster)
        block = self.refcount_block(index) or self._add_block(index)
        piece, position = divmod(within, self.geometry.refcounts_per_block)
        data = self.metadata.edit(block + piece * self.geometry.block_bytes)
        _native.refcount_set(data, position, self.geometry.refcount_order, value)

    def _add_block(self, index: int) -> int:
        """Add the refcount block ``index``. Its own refcount may be in itself, or in a further new block."""
        if index >= self.table_entries:
            self._grow_table(index)
            existing = self.refcount_block(index)
            if existing:
                return existing
        run = self.space.take(1)
        offset = self._prepare_home(run)
        self.metadata.set_entry(self.metadata.header.refcount_table_offset + index * ENTRY_BYTES, offset)
        self._raise(run.start, 1)
        return offset

    def _grow_table(self, index: int) -> None:
        """Move the refcount table to more clusters, in a row past the end of the file."""
        header = self.metadata.header
        old_entries = self.table_entries
        entries = max(index + 1, old_entries * 3 // 2)
        clusters = self.geometry.clusters(entries * ENTRY_BYTES)
        while clusters * self.geometry.cluster_bytes // ENTRY_BYTES <= self._last_block_index(clusters):
            clusters += 1
        if clusters * self.geometry.cluster_bytes > layout.MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedFeatureError("a refcount table of more than 8 MiB")
        run = self.space.take_at_frontier(clusters)
        offset = self._prepare_home(run)
        for position in range(0, old_entries * ENTRY_BYTES, self.geometry.block_bytes):
            old = self.metadata.block(header.refcount_table_offset + position)
            if not _native.is_zero(old):
                self.metadata.edit(offset + position)[:] = old
        self.metadata.set_header(refcount_table_offset=offset, refcount_table_clusters=clusters)
        self._raise(run.start, run.count)
        first_old = header.refcount_table_offset // self.geometry.cluster_bytes
        for cluster in range(first_old, first_old + header.refcount_table_clusters):
            self.release_metadata(cluster)

    def _last_block_index(self, table_clusters: int) -> int:
        """Index of the last refcount block that a new table at the frontier, and its blocks, would need."""
        new_blocks = table_clusters // self.geometry.refcounts_per_cluster + 2
        return (self.space.frontier + table_clusters + new_blocks) // self.geometry.refcounts_per_cluster

    def release(self, cluster: int) -> None:
        """Take the reference from a data cluster, which frees it.

        Raises:
            CorruptionError, UnsupportedFeatureError: as `require_exclusive_data`.
        """
        self.require_exclusive_data(cluster)
        self._set(cluster, 0)
        self.space.free_data(cluster)

    def release_metadata(self, cluster: int) -> None:
        """Take the reference from a metadata cluster, which frees it."""
        self.require_exclusive(cluster)
        self._set(cluster, 0)
        self.space.free_metadata(cluster)

    def require_exclusive(self, cluster: int) -> None:
        """Raise unless a cluster in use has refcount 1.

        Raises:
            CorruptionError: its refcount is 0.
            UnsupportedFeatureError: it is shared; without internal snapshots no known program does that.
        """
        value = self.get(cluster)
        offset = cluster * self.geometry.cluster_bytes
        if value == 0:
            raise CorruptionError("refcount block", offset, "a cluster in use has refcount 0")
        if value > 1:
            raise UnsupportedFeatureError(
                "a cluster shared without a snapshot", f"refcount {value} at host offset {offset:#x}"
            )

    def require_exclusive_data(self, cluster: int) -> None:
        """Raise unless a cluster that a guest's entry names has refcount 1, and holds no metadata (G2).

        Raises:
            CorruptionError: it holds metadata, which a guest's entry must not change or free.
            CorruptionError, UnsupportedFeatureError: as `require_exclusive`.
        """
        self.require_exclusive(cluster)
        if cluster in self.metadata_clusters:
            offset = cluster * self.geometry.cluster_bytes
            raise CorruptionError("L2 table", offset, "a guest cluster is mapped onto metadata")

    # Free clusters below the end of the file

    def start_search(self, end_cluster: int) -> None:
        """Search the refcounts for free clusters, as allocation asks for them, up to ``end_cluster``."""
        self._scan_cluster, self._scan_end = 0, end_cluster

    def recycle(self) -> None:
        """When short of clusters that read as zeros, make some ready for use after the next barrier.

        Raises:
            OSError: the host failed; nothing is lost.
        """
        self._search_if_short()
        self.space.recycle()

    def _search_if_short(self) -> None:
        if self.space.is_short and not self.space.unknown:
            self._search_free()

    def _search_free(self) -> None:
        for _ in range(SCAN_BLOCKS_PER_TAKE):
            if self._scan_cluster >= self._scan_end or self.space.unknown:
                return
            start = self._scan_cluster
            per_block = self.geometry.refcounts_per_block
            stop = min(self._scan_end, start - start % per_block + per_block)
            for run_start, run_end in self._free_runs(start, stop):
                self._list_free(run_start, run_end)
            self._scan_cluster = stop

    def _free_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield [start, end) runs of refcount 0 within one metadata block of refcounts."""
        index, within = divmod(start, self.geometry.refcounts_per_cluster)
        block = self.refcount_block(index)
        if not block:
            yield start, stop
            return
        piece, position = divmod(within, self.geometry.refcounts_per_block)
        data = self.metadata.block(block + piece * self.geometry.block_bytes)
        order, base, limit = self.geometry.refcount_order, start - position, position + stop - start
        while position < limit:
            free = _native.refcount_find_zero(data, order, position, limit)
            if free < 0:
                return
            used = _native.refcount_find_used(data, order, free, limit)
            end = limit if used < 0 else used
            yield base + free, base + end
            position = end

    def _list_free(self, start: int, end: int) -> None:
        run_start = start
        for cluster in range(start, end):
            if self.space.is_pending(cluster):
                if run_start < cluster:
                    self.space.add_found(run_start, cluster - run_start)
                run_start = cluster + 1
        if run_start < end:
            self.space.add_found(run_start, end - run_start)
