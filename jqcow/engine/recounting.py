"""All refcounts in another width: a new refcount table and new blocks, and the header that names them.

A1. The new structure is written whole behind the end of everything, and is durable before the record that
    makes the header name it.
A2. It counts what there is after that record: itself, and the old structure no more, which the record frees.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as replaced

from jqcow import _native
from jqcow.engine.clusters import ClusterRuns, Run
from jqcow.engine.tables import Tables
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import entries, layout
from jqcow.ondisk.layout import ClusterIndex, HostOffset

WRITE_BYTES = 1 << 20
"""New blocks are written so many bytes at once."""
_ADDED_MAX = 1 << 62
"""A kernel adds no more than this at once."""

Counted = tuple[int, int, int]
"""(start, count, refcount) of clusters in a row."""


@dataclass(frozen=True)
class _Place:
    """Where the new structure is to be: its clusters, the table first, and the indices of its blocks."""

    run: Run
    table_clusters: int
    indices: list[int]


class Recounting:
    """The refcounts of one image, as one view shows them, to be written in another width."""

    def __init__(self, tables: Tables, refcount_order: int) -> None:
        """Look where the old structure is.

        Raises:
            CorruptionError: the refcount table is damaged.
        """
        self._tables = tables
        self._view = tables.view
        self._refcounts = tables.refcounts
        self._old = tables.refcounts.geometry
        self._new = replaced(self._old, refcount_order=refcount_order)
        self._largest = (1 << (1 << refcount_order)) - 1
        self._blocks = sorted(tables.refcounts.blocks_from_top())
        header = tables.view.header
        first = self._old.cluster_of(HostOffset(header.refcount_table_offset))
        table = range(first, first + header.refcount_table_clusters)
        self._structure = array("Q", sorted([*table, *(self._old.cluster_of(at) for _, at in self._blocks)]))

    def check(self) -> list[int]:
        """Return which of the new blocks will be needed for what is counted now.

        Raises:
            UnsupportedFeatureError: a refcount does not fit the new width, or the new table is too large.
            CorruptionError: a cluster of the old structure has refcount 0.
        """
        per_block, needed = self._new.refcounts_per_cluster, [-1]
        for start, count, refcount in self._counted():
            if refcount > self._largest:
                offset = self._old.offset_of(ClusterIndex(start))
                detail = f"the cluster at host offset {offset:#x} has refcount {refcount}"
                raise UnsupportedFeatureError(f"a refcount above {self._largest}", detail)
            first, last = max(start // per_block, needed[-1] + 1), (start + count - 1) // per_block
            # Here: narrow refcounts may count more than fits in memory.
            self._check_table(last + 1)
            needed += range(first, last + 1)
        return needed[1:]

    def stage(self) -> None:
        """Write the new structure, and stage the header that names it; inside an operation.

        Nothing is counted or freed in the old one from here on.

        Raises:
            UnsupportedFeatureError: as `check`, or the file would be too large.
            OSError: the host has no space for it.
        """
        place = self._take(self.check())
        offset = self._old.offset_of(place.run.start)
        self._write(place, offset)
        self._view.set_header(
            refcount_order=self._new.refcount_order,
            refcount_table_offset=offset,
            refcount_table_clusters=place.table_clusters,
        )
        space = self._tables.space
        space.count_in(place.run)
        space.metadata.update(
            ClusterIndex(at) for at in range(place.run.start, place.run.start + place.run.count)
        )
        self._free_old()

    # What is counted

    def _counted(self) -> Iterator[Counted]:
        """Yield the clusters with a refcount, without the old structure's own references to itself (A2)."""
        per_block = self._old.refcounts_per_cluster
        for index, _ in self._blocks:
            for start, count, refcount in self._refcounts.runs(index * per_block, per_block):
                yield from self._without_old(start, count, refcount)

    def _without_old(self, start: int, count: int, refcount: int) -> Iterator[Counted]:
        position, end = bisect_left(self._structure, start), start + count
        while position < len(self._structure) and self._structure[position] < end:
            own = self._structure[position]
            if not refcount:
                offset = self._old.offset_of(ClusterIndex(own))
                raise CorruptionError("refcount block", offset, "a cluster in use has refcount 0")
            if start < own:
                yield start, own - start, refcount
            if refcount > 1:
                yield own, 1, refcount - 1
            start, position = own + 1, position + 1
        if refcount and start < end:
            yield start, end - start, refcount

    # Where the new structure goes

    def _check_table(self, entry_count: int) -> int:
        """Return how many clusters a refcount table takes; UnsupportedFeatureError if that are too many."""
        clusters = self._new.clusters(layout.table_bytes(entry_count))
        if clusters * self._new.cluster_bytes > layout.MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedFeatureError("a refcount table of more than 8 MiB")
        return clusters

    def _take(self, needed: list[int]) -> _Place:
        """Take clusters for the table and the blocks behind the end of everything (A1)."""
        space, geometry = self._tables.space, self._new
        start, per_block = space.frontier, geometry.refcounts_per_cluster
        total, count = 0, len(needed) + 1
        while total != count:
            # It counts itself, too.
            total = count
            own = range(start // per_block, (start + total - 1) // per_block + 1)
            indices = needed + [index for index in own if not needed or index > needed[-1]]
            table_clusters = self._check_table(indices[-1] + 1)
            count = table_clusters + len(indices)
        if (start + total) * geometry.cluster_bytes > layout.MAX_HOST_OFFSET:
            raise UnsupportedFeatureError("a file of more than 64 PiB")
        run = space.take_at_frontier(total)
        self._view.changes.taken.append(run)
        return _Place(run, table_clusters, indices)

    def _write(self, place: _Place, offset: HostOffset) -> None:
        cluster_bytes, blocks = self._new.cluster_bytes, self._view.blocks
        first = offset + place.table_clusters * cluster_bytes
        table = bytearray(place.table_clusters * cluster_bytes)
        for number, index in enumerate(place.indices):
            entries.put_entry(table, index, first + number * cluster_bytes)
        blocks.write_new(bytes(table), offset)
        pending, position = bytearray(), HostOffset(first)
        for block in self._new_blocks(place):
            pending += block
            if len(pending) >= WRITE_BYTES:
                blocks.write_new(bytes(pending), position)
                position = HostOffset(position + len(pending))
                pending.clear()
        if pending:
            blocks.write_new(bytes(pending), position)

    def _new_blocks(self, place: _Place) -> Iterator[bytearray]:
        """Yield the new blocks in order. What the new structure itself counts is behind all else."""
        order, per_block = self._new.refcount_order, self._new.refcounts_per_cluster
        number, block = 0, bytearray(self._new.cluster_bytes)
        for start, end, refcount in self._all_counted(place.run):
            position = start
            while position < end:
                index, within = divmod(position, per_block)
                if index != place.indices[number]:
                    yield block
                    number, block = number + 1, bytearray(self._new.cluster_bytes)
                    continue
                stop = min(per_block, within + end - position)
                _fill(block, order, within, stop, refcount)
                position += stop - within
        yield block

    def _all_counted(self, own: Run) -> Iterator[Counted]:
        for start, count, refcount in self._counted():
            yield start, start + count, refcount
        yield own.start, own.start + own.count, 1

    def _free_old(self) -> None:
        """The clusters of the old structure are free (A2), but for those that something else counts."""
        own = (ClusterIndex(cluster) for cluster in self._structure)
        # By the new structure, which the staged header names: a leak stays one.
        free = ClusterRuns(Run(cluster, 1) for cluster in own if not self._refcounts.get(cluster))
        for run in free:
            self._refcounts.free_as_metadata(run)


def _fill(block: bytearray, order: int, start: int, stop: int, refcount: int) -> None:
    """Set refcounts [start, stop), which are 0."""
    if refcount <= _ADDED_MAX:
        _native.refcount_add(block, order, start, stop, refcount)
        return
    for index in range(start, stop):
        _native.refcount_set(block, index, order, refcount)
