"""Refcounts and the allocation of host clusters (qcow2 specification, "Host cluster management").

R1. A refcount is raised in the operation, and so in the record, that makes the reference.
R2. A cluster is handed out only if its refcount, staged changes included, is 0.
R3. The home of a metadata cluster is allocated on the host before a record names it, and that of every
    older one before the first record: a full disk fails the operation, not the checkpoint.
R4. Compressed data is packed only into sectors that no durable or staged entry names: behind what this
    process packed last, and never after the host cluster was freed or its packing was undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

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
        self._packed = 0

    @property
    def largest(self) -> int:
        """The largest refcount that the image's refcount width holds."""
        return (1 << (1 << self.geometry.refcount_order)) - 1

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

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, count, refcount) of clusters in a row that have the same refcount."""
        end = start + count
        while start < end:
            step, block, position = self._place(start, end)
            if block:
                data = self.metadata.block(block)
                order = self.geometry.refcount_order
                value, length = _native.refcount_run(data, order, position, position + step)
            else:
                value, length = 0, step
            yield start, length, value
            start += length

    def _place(self, start: int, end: int) -> tuple[int, int, int]:
        """Return where the refcounts of [start, end) begin: how many lie in one block, its offset, the index.

        The offset is 0 where there is no refcount block.
        """
        index, within = divmod(start, self.geometry.refcounts_per_cluster)
        piece, position = divmod(within, self.geometry.refcounts_per_block)
        step = min(end - start, self.geometry.refcounts_per_block - position)
        block = self.refcount_block(index)
        return step, block and block + piece * self.geometry.block_bytes, position

    def is_free(self, start: int, end: int) -> bool:
        """Return True if all clusters in [start, end) have refcount 0."""
        return not any(refcount for _, _, refcount in self.runs(start, end - start))

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
        """Give free clusters refcount 1."""
        order = self.geometry.refcount_order
        for first, block, position, stop in self._blocks_for(start, count):
            data = self.metadata.edit(block)
            used = _native.refcount_find_used(data, order, position, stop)
            if used >= 0:
                place = (first + used - position) * self.geometry.cluster_bytes
                refcount = _native.refcount_get(data, used, order)
                raise CorruptionError("refcount block", place, f"a free cluster has refcount {refcount}")
            _native.refcount_add(data, order, position, stop, 1)

    def _add(self, start: int, count: int, delta: int) -> None:
        """Change the refcounts of clusters in a row by ``delta``.

        Raises:
            CorruptionError: one of them would get below 0.
            UnsupportedFeatureError: one of them would not fit the refcount's width.
        """
        for first, block, position, stop in self._blocks_for(start, count):
            data = self.metadata.edit(block)
            failed = _native.refcount_add(data, self.geometry.refcount_order, position, stop, delta)
            if failed >= 0:
                self._refuse(first + failed - position, delta)

    def _take(self, start: int, count: int) -> list[tuple[int, int]]:
        """Take a reference from each cluster; return the runs (start, count) that have none left."""
        order, freed = self.geometry.refcount_order, []
        for first, block, position, stop in self._blocks_for(start, count):
            data = self.metadata.edit(block)
            failed = _native.refcount_add(data, order, position, stop, -1)
            if failed >= 0:
                self._refuse(first + failed - position, -1)
            at = position
            while at < stop:
                refcount, length = _native.refcount_run(data, order, at, stop)
                if not refcount:
                    freed.append((first + at - position, length))
                at += length
        return freed

    def _blocks_for(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield the metadata blocks that hold the refcounts of clusters in a row; missing ones are added.

        Each with the first cluster, the block's host offset, and the range [index, end) of refcounts in it.
        """
        end = start + count
        while start < end:
            step, block, position = self._place(start, end)
            if block:
                yield start, block, position, position + step
                start += step
            else:
                self._add_block(start // self.geometry.refcounts_per_cluster)

    def _refuse(self, cluster: int, delta: int) -> NoReturn:
        offset = cluster * self.geometry.cluster_bytes
        if delta < 0:
            raise CorruptionError("refcount block", offset, "a cluster in use has refcount 0")
        detail = f"the cluster at host offset {offset:#x} has no room for another reference"
        raise UnsupportedFeatureError(f"a refcount above {self.largest}", detail)

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
        self.release_metadata(first_old, header.refcount_table_clusters)

    def _last_block_index(self, table_clusters: int) -> int:
        """Index of the last refcount block that a new table at the frontier, and its blocks, would need."""
        new_blocks = table_clusters // self.geometry.refcounts_per_cluster + 2
        return (self.space.frontier + table_clusters + new_blocks) // self.geometry.refcounts_per_cluster

    # Sharing, inside an operation

    def share(self, start: int, count: int) -> None:
        """Add a reference to each of the clusters, which are in use.

        Raises:
            CorruptionError: one of them is free.
            UnsupportedFeatureError: its refcount does not fit the refcount's width.
        """
        for run_start, _, before in self.runs(start, count):
            if not before:
                self._refuse(run_start, -1)
        self._add(start, count, 1)

    def release(self, start: int, count: int = 1) -> None:
        """Take a reference from each of the data clusters; those without another one are free.

        Raises:
            CorruptionError: one of them is free already, or holds metadata.
        """
        for cluster, run_count in self._take(start, count):
            for freed in range(cluster, cluster + run_count):
                self._check_holds_data(freed)
            if cluster <= self._packed // self.geometry.cluster_bytes < cluster + run_count:
                self.stop_packing()
            self.space.free_data(cluster, run_count)

    def release_metadata(self, start: int, count: int = 1) -> None:
        """Take a reference from each of the metadata clusters; those without another one are free."""
        for cluster, run_count in self._take(start, count):
            self.space.free_metadata(cluster, run_count)

    def data_refcount(self, cluster: int) -> int:
        """Return the refcount of a cluster that a guest's entry names; it holds no metadata (G2).

        Raises:
            CorruptionError: its refcount is 0, or it holds metadata, which a guest's entry must not change.
            UnsupportedFeatureError: it is shared, but there is no snapshot to share it with: two guest
                clusters have it, or the refcount is wrong.
        """
        refcount = self.get(cluster)
        offset = cluster * self.geometry.cluster_bytes
        if refcount == 0:
            raise CorruptionError("refcount block", offset, "a cluster in use has refcount 0")
        self._check_holds_data(cluster)
        if refcount > 1 and not self.metadata.header.nb_snapshots:
            raise UnsupportedFeatureError(
                "a cluster shared without a snapshot", f"refcount {refcount} at host offset {offset:#x}"
            )
        return refcount

    def _check_holds_data(self, cluster: int) -> None:
        if cluster in self.metadata_clusters:
            offset = cluster * self.geometry.cluster_bytes
            raise CorruptionError("L2 table", offset, "a guest cluster is mapped onto metadata")

    # Correcting, inside an operation

    def correct(self, start: int, count: int, refcount: int, references: int) -> None:
        """Give clusters in a row the refcount ``references`` instead of ``refcount``.

        Raises:
            UnsupportedFeatureError: it does not fit the refcount's width.
            OSError: the host has no space for a refcount block.
        """
        self._add(start, count, references - refcount)
        if not references:
            # What they hold is not known: as if it were metadata, whose old blocks may still be replayed.
            self.space.free_metadata(start, count)
        elif not refcount:
            self.space.withdraw(start, count)

    # Packing compressed data, inside an operation

    def allocate_packed(self, length: int) -> int:
        """Allocate whole sectors for ``length`` bytes of one compressed cluster; return their host offset.

        They follow those that were packed before, in the same host cluster while there is room (R4).

        Raises:
            OSError, CorruptionError: as `allocate`.
        """
        cluster_bytes = self.geometry.cluster_bytes
        length = layout.round_up(length, layout.SECTOR_BYTES)
        left = -self._packed % cluster_bytes
        current = self._packed // cluster_bytes
        if left and self.get(current) < self.largest:
            if length <= left:
                return self._pack(self._packed, length, (current,))
            new = self.allocate(1).start
            if new == current + 1:
                return self._pack(self._packed, length, (current,))
        else:
            new = self.allocate(1).start
        return self._pack(new * cluster_bytes, length, ())

    def _pack(self, offset: int, length: int, shared: tuple[int, ...]) -> int:
        for cluster in shared:
            self.share(cluster, 1)
        self._packed = offset + length
        return offset

    def stop_packing(self) -> None:
        """Pack what comes next into another host cluster (R4)."""
        self._packed = 0

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
