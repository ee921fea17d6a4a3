"""The refcounts of host clusters (qcow2 specification, "Host cluster management"): read, and changed.

R1. A refcount is raised in the operation, and so in the record, that makes the reference.
R2. A cluster is handed out only if its refcount, staged changes included, is 0.
R3. The home of a metadata cluster is allocated on the host before a record names it, and that of every
    older one before the first record: a full disk fails the operation, not the checkpoint.
R4. Compressed data is packed only into sectors that no durable or staged entry names: behind what this
    process packed last, and never after the host cluster was freed or its packing was undone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, NoReturn

from jqcow import _native
from jqcow.engine.clusters import ClusterRuns, Run
from jqcow.engine.metadata import ChangeSet, View
from jqcow.engine.space import Space
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import entries, layout
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.header import Header
from jqcow.ondisk.layout import SECTOR_BYTES, ClusterIndex, Geometry, HostOffset, entry_place

SCAN_BLOCKS_PER_TAKE = 16
"""Refcount blocks searched for free clusters before the file grows instead."""


class Piece(NamedTuple):
    """Refcounts [position, stop) of the metadata block at ``block``, 0 for none: of ``first`` and on."""

    first: ClusterIndex
    block: HostOffset
    position: int
    stop: int


class Refcounts:
    """The refcounts of one image through one view, to be read."""

    def __init__(self, view: View, space: Space) -> None:
        self.view = view
        self.space = space
        self._geometry = view.geometry
        self._header: Header | None = None
        """The header that `geometry` and `table_entries` were worked out from."""
        self._table_entries = 0

    @property
    def geometry(self) -> Geometry:
        """The image's geometry. The width of refcounts is that of the header as the view shows it."""
        if self.view.header is not self._header:
            self._follow(self.view.header)
        return self._geometry

    def _follow(self, header: Header) -> None:
        """Work out what follows from a header; an amendment may have changed the width."""
        if header.refcount_order != self._geometry.refcount_order:
            self._geometry = replace(self._geometry, refcount_order=header.refcount_order)
        length_bytes = header.refcount_table_clusters * self._geometry.cluster_bytes
        self._table_entries = layout.table_entries(length_bytes)
        # Last: what was cut off before this is done again.
        self._header = header

    @property
    def largest(self) -> int:
        """The largest refcount that the image's refcount width holds."""
        return (1 << (1 << self.geometry.refcount_order)) - 1

    @property
    def is_lost(self) -> bool:
        """True if the refcount table that the header names is lost."""
        header = self.view.header
        return self.space.lost_table == (header.refcount_table_offset, header.refcount_table_clusters)

    @property
    def table_entries(self) -> int:
        """Entries in the refcount table; of one that is lost there are none: every refcount is 0."""
        if self.is_lost:
            return 0
        if self.view.header is not self._header:
            self._follow(self.view.header)
        return self._table_entries

    def refcount_block(self, index: int) -> HostOffset:
        """Return the host offset of the refcount block ``index``, 0 where all its refcounts are 0.

        Raises:
            CorruptionError: the refcount table entry is not one that an image can have.
        """
        if index >= self.table_entries:
            return HostOffset(0)
        table = HostOffset(self.view.header.refcount_table_offset)
        try:
            return entries.decode_refcount_table(self.view.entry(table, index), self.geometry)
        except DamagedEntry as error:
            raise CorruptionError("refcount table", entry_place(table, index), str(error)) from error

    def get(self, cluster: ClusterIndex) -> int:
        """Return the refcount of a host cluster, staged changes included."""
        geometry = self.geometry
        index, within = divmod(cluster, geometry.refcounts_per_cluster)
        block = self.refcount_block(index)
        if not block:
            return 0
        number, position = divmod(within, geometry.refcounts_per_block)
        data = self.view.block(HostOffset(block + number * geometry.block_bytes))
        return _native.refcount_get(data, position, geometry.refcount_order)

    def _piece(self, start: int, end: int) -> Piece:
        """Return where the refcounts of [start, end) begin, as many as lie in one metadata block."""
        geometry = self.geometry
        index, within = divmod(start, geometry.refcounts_per_cluster)
        number, position = divmod(within, geometry.refcounts_per_block)
        stop = min(position + end - start, geometry.refcounts_per_block)
        block = self.refcount_block(index)
        if block:
            block = HostOffset(block + number * geometry.block_bytes)
        return Piece(ClusterIndex(start), block, position, stop)

    def used_end(self) -> ClusterIndex:
        """Return the cluster index behind the highest cluster with a nonzero refcount.

        Refcount blocks that are in no file are passed over: a table may name more of them than can be read.

        Raises:
            CorruptionError: a refcount block is used twice, so that a search could take forever.
        """
        seen: set[int] = set()
        for index, block in self.blocks_from_top():
            if block in seen:
                raise CorruptionError("refcount table", block, "one refcount block is used twice")
            seen.add(block)
            last = self._last_used(block) if self.view.holds(block) else -1
            if last >= 0:
                return ClusterIndex(index * self.geometry.refcounts_per_cluster + last + 1)
        return ClusterIndex(0)

    def blocks_from_top(self) -> Iterator[tuple[int, HostOffset]]:
        """Yield (index, host offset) of all refcount blocks, highest index first."""
        table = HostOffset(self.view.header.refcount_table_offset)
        for base in reversed(range(0, self.table_entries, self.geometry.entries_per_block)):
            for position in range(entries.last_present(self.view.block(entry_place(table, base))), -1, -1):
                block = self.refcount_block(base + position)
                if block:
                    yield base + position, block

    def _last_used(self, block: HostOffset) -> int:
        for number in reversed(range(self.geometry.cluster_bytes // self.geometry.block_bytes)):
            data = self.view.block(HostOffset(block + number * self.geometry.block_bytes))
            last = _native.refcount_last_used(data, self.geometry.refcount_order)
            if last >= 0:
                return number * self.geometry.refcounts_per_block + last
        return -1

    def runs(self, start: int, count: int) -> Iterator[tuple[ClusterIndex, int, int]]:
        """Yield (start, count, refcount) of clusters in a row that have the same refcount."""
        end = start + count
        while start < end:
            piece = self._piece(start, end)
            value, length = 0, piece.stop - piece.position
            if piece.block:
                data = self.view.block(piece.block)
                value, length = _native.refcount_run(
                    data, self.geometry.refcount_order, piece.position, piece.stop
                )
            yield piece.first, length, value
            start += length

    def is_free(self, start: int, end: int) -> bool:
        """Return True if all clusters in [start, end) have refcount 0."""
        return not any(refcount for _, _, refcount in self.runs(start, end - start))

    def data_refcount(self, cluster: ClusterIndex) -> int:
        """Return the refcount of a cluster that a guest's entry names; it holds no metadata (G2).

        Raises:
            CorruptionError: its refcount is 0, or it holds metadata, which a guest's entry must not change.
        """
        refcount = self.get(cluster)
        if refcount == 1 and cluster not in self.space.metadata:
            return 1
        if refcount == 0:
            raise self._too_low(cluster)
        self.check_holds_data(cluster)
        return refcount

    def _too_low(self, cluster: ClusterIndex) -> CorruptionError:
        """Return the error for a cluster that is in use, and has refcount 0: it is not the only one (F1)."""
        self.space.distrust()
        offset = self.geometry.offset_of(cluster)
        return CorruptionError("refcount block", offset, "a cluster in use has refcount 0")

    def check_holds_data(self, cluster: ClusterIndex) -> None:
        """Raise CorruptionError if a cluster holds metadata: a guest's entry must not change it (G2)."""
        if cluster in self.space.metadata:
            offset = self.geometry.offset_of(cluster)
            raise CorruptionError("L2 table", offset, "a guest cluster is mapped onto metadata")


class Allocation(Refcounts):
    """The refcounts of one image through one view. What changes them is called inside an operation."""

    # Taking clusters

    def take(self, count: int) -> Run:
        """Take up to ``count`` free clusters in a row, at least one; `count_in` gives them their refcount."""
        self.search_if_short()
        changes = self.view.changes
        run = self.space.take(count, ordered=changes.is_private)
        # Among them may be freed metadata.
        self.space.metadata.difference_update(range(run.start, run.start + run.count))
        return run

    def count_in(self, run: Run) -> None:
        """Give clusters that were taken for data refcount 1 (R1).

        Raises:
            OSError: the host has no space for a refcount block.
            CorruptionError: a cluster that should be free is not.
        """
        changes = self.view.changes
        changes.taken.append(run)
        if changes.own is not None:
            changes.own.update(ClusterIndex(at) for at in range(run.start, run.start + run.count))
        self.raise_to_one(run)

    def raise_to_one(self, run: Run) -> None:
        """Give free clusters refcount 1 (R2)."""
        for piece in self._edited_pieces(run.start, run.count):
            data = self.view.edit(piece.block)
            used = _native.refcount_find_used(data, self.geometry.refcount_order, piece.position, piece.stop)
            if used >= 0:
                place = self.geometry.offset_of(ClusterIndex(piece.first + used - piece.position))
                refcount = _native.refcount_get(data, used, self.geometry.refcount_order)
                raise CorruptionError("refcount block", place, f"a free cluster has refcount {refcount}")
            _native.refcount_add(data, self.geometry.refcount_order, piece.position, piece.stop, 1)
        self.space.count_in(run)

    def allocate_metadata(self, count: int = 1) -> HostOffset:
        """Allocate ``count`` zeroed metadata clusters in a row; return their host offset.

        Raises:
            OSError: the host has no space for them.
        """
        run = self._take_home(count)
        self.raise_to_one(run)
        return self.geometry.offset_of(run.start)

    def _take_home(self, count: int) -> Run:
        """Take clusters for metadata, and allocate them on the host (R3)."""
        changes = self.view.changes
        space = self.space
        if count == 1:
            kept = next(iter(space.kept_for_tables), None)
            run = (
                space.take(1, ordered=changes.is_private) if kept is None else space.kept_for_tables.pop(kept)
            )
        else:
            run = space.take_row(count)
        changes.taken.append(run)
        offset, length = self.geometry.offset_of(run.start), count * self.geometry.cluster_bytes
        if offset + length > layout.MAX_HOST_OFFSET:
            raise UnsupportedFeatureError("a file of more than 64 PiB")
        self.view.blocks.medium.allocate(offset, length)
        for cluster in range(run.start, run.start + count):
            self.view.zero_cluster(ClusterIndex(cluster))
            self.space.metadata.add(ClusterIndex(cluster))
        return run

    def allocate_homes(self) -> None:
        """Give every metadata cluster its space on the host: who made the image may have left holes (R3).

        Raises:
            OSError: the host has no space for them; a note says how much it may take.
        """
        medium = self.view.blocks.medium
        runs = ClusterRuns(Run(cluster, 1) for cluster in sorted(self.space.metadata))
        left_bytes = sum(run.count for run in runs) * self.geometry.cluster_bytes
        for run in runs:
            length = run.count * self.geometry.cluster_bytes
            try:
                medium.allocate(self.geometry.offset_of(run.start), length)
            except OSError as error:
                # Which of them have their space already nobody can tell.
                told = f"the tables of the image may need {left_bytes} bytes, {medium.free_bytes()} are free"
                error.add_note(told)
                raise
            left_bytes -= length

    def _edited_pieces(self, start: int, count: int) -> Iterator[Piece]:
        """Yield the metadata blocks that hold the refcounts of clusters in a row; missing ones are added."""
        end = start + count
        while start < end:
            piece = self._piece(start, end)
            if piece.block:
                yield piece
                start += piece.stop - piece.position
            else:
                self._add_block(start // self.geometry.refcounts_per_cluster)

    def _add_block(self, index: int) -> None:
        """Add the refcount block ``index``. Its own refcount may be in itself, or in a further new block."""
        if index >= self.table_entries:
            self.grow_table(index)
            if self.refcount_block(index):
                return
        run = self._take_home(1)
        table = HostOffset(self.view.header.refcount_table_offset)
        self.view.set_entry(table, index, self.geometry.offset_of(run.start))
        self.raise_to_one(run)

    def grow_table(self, index: int) -> None:
        """Move the refcount table to more clusters, in a row past the end of the file.

        One that is lost is left where it is: its clusters are free, if nothing else has them.
        """
        header, is_lost = self.view.header, self.is_lost
        old_entries = self.table_entries
        clusters = self._table_clusters_for(max(index + 1, old_entries * 3 // 2))
        run = self._take_home(clusters)
        if (self.geometry.offset_of(run.start), clusters) == self.space.lost_table:
            # The header named the very place behind the end.
            run = self._take_home(clusters)
        offset = self.geometry.offset_of(run.start)
        old = HostOffset(header.refcount_table_offset)
        if not is_lost:
            self.view.copy_table(old, offset, layout.table_bytes(old_entries))
        self.view.set_header(refcount_table_offset=offset, refcount_table_clusters=clusters)
        self.raise_to_one(run)
        if not is_lost:
            self.release_metadata(self.geometry.cluster_of(old), header.refcount_table_clusters)

    def _table_clusters_for(self, entry_count: int) -> int:
        """Return how many clusters a new table at the frontier needs, to count itself and its blocks too."""
        geometry = self.geometry
        clusters = geometry.clusters(layout.table_bytes(entry_count))
        while True:
            new_blocks = clusters // geometry.refcounts_per_cluster + 2
            last_block = (self.space.frontier + clusters + new_blocks) // geometry.refcounts_per_cluster
            if layout.table_entries(clusters * geometry.cluster_bytes) > last_block:
                break
            clusters += 1
        if clusters * geometry.cluster_bytes > layout.MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedFeatureError("a refcount table of more than 8 MiB")
        return clusters

    # Sharing and releasing

    def share(self, start: ClusterIndex, count: int) -> None:
        """Add a reference to each of the clusters, which are in use.

        Raises:
            CorruptionError: one of them is free.
            UnsupportedFeatureError: its refcount does not fit the refcount's width.
        """
        for piece in self._edited_pieces(start, count):
            order = self.geometry.refcount_order
            free = _native.refcount_find_zero(self.view.block(piece.block), order, piece.position, piece.stop)
            if free >= 0:
                self._refuse(ClusterIndex(piece.first + free - piece.position), -1)
            self._add_in(piece, 1)

    def release(self, start: ClusterIndex, count: int = 1) -> list[ClusterIndex]:
        """Take a reference from each of the data clusters; those without another one are free.

        Returns those that have one left.

        Raises:
            CorruptionError: one of them is free already, or holds metadata.
        """
        return [
            ClusterIndex(cluster)
            for run in self.release_runs(start, count)
            for cluster in range(run.start, run.start + run.count)
        ]

    def release_runs(self, start: ClusterIndex, count: int) -> list[Run]:
        """As `release`; those that have one reference left are told as runs."""
        changes = self.view.changes
        left_one: list[Run] = []
        for run, left in self._take_reference(start, count):
            if left:
                left_one += (run,) if left == 1 else ()
                continue
            clusters = range(run.start, run.start + run.count)
            for cluster in () if self.space.metadata.isdisjoint(clusters) else clusters:
                self.check_holds_data(ClusterIndex(cluster))
            _stop_packing_in(run, changes, self.geometry)
            self.space.free(run.start, run.count)
            changes.freed_data.append(run)
            changes.freed_clusters += run.count
        return left_one

    def release_metadata(self, start: ClusterIndex, count: int = 1) -> None:
        """Take a reference from each of the metadata clusters; those without another one are free."""
        for run, left in self._take_reference(start, count):
            if not left:
                self.free_as_metadata(run)

    def free_as_metadata(self, run: Run) -> None:
        """Clusters have no reference any more; until the epoch is home, replay may write there (S2)."""
        changes = self.view.changes
        self.space.free(run.start, run.count)
        changes.freed_metadata.append(run)
        changes.freed_clusters += run.count

    def _add_in(self, piece: Piece, delta: int) -> bytearray:
        """Add to the refcounts of one metadata block; return it."""
        data = self.view.edit(piece.block)
        failed = _native.refcount_add(data, self.geometry.refcount_order, piece.position, piece.stop, delta)
        if failed >= 0:
            self._refuse(ClusterIndex(piece.first + failed - piece.position), delta)
        return data

    def _take_reference(self, start: int, count: int) -> list[tuple[Run, int]]:
        """Take a reference from each cluster; return runs of them with the references that they have left."""
        runs: list[tuple[Run, int]] = []
        for piece in self._edited_pieces(start, count):
            data, position = self._add_in(piece, -1), piece.position
            while position < piece.stop:
                left, length = _native.refcount_run(data, self.geometry.refcount_order, position, piece.stop)
                runs.append((Run(ClusterIndex(piece.first + position - piece.position), length), left))
                position += length
        return runs

    def _refuse(self, cluster: ClusterIndex, delta: int) -> NoReturn:
        if delta < 0:
            raise self._too_low(cluster)
        offset = self.geometry.offset_of(cluster)
        detail = f"the cluster at host offset {offset:#x} has no room for another reference"
        raise UnsupportedFeatureError(f"a refcount above {self.largest}", detail)

    # Correcting

    def correct(self, start: ClusterIndex, count: int, refcount: int, references: int) -> None:
        """Give clusters in a row the refcount ``references`` instead of ``refcount``.

        Raises:
            UnsupportedFeatureError: it does not fit the refcount's width.
            OSError: the host has no space for a refcount block.
        """
        for piece in self._edited_pieces(start, count):
            self._add_in(piece, references - refcount)
        if not references:
            # What they hold is not known: as if it were metadata, whose old blocks may still be replayed.
            self.free_as_metadata(Run(start, count))
        elif not refcount:
            self.space.withdraw(start, count)

    # Packing compressed data (R4)

    def take_packed(self, length: int) -> tuple[HostOffset, Run | None]:
        """Take whole sectors for ``length`` bytes of one compressed cluster.

        They follow those that were packed before, in the same host cluster while there is room. Returns
        their host offset, and the new cluster that was taken for them, if any.
        """
        geometry, packed_end = self.geometry, self.view.changes.packed_end
        length = layout.round_up(length, SECTOR_BYTES)
        left = -packed_end % geometry.cluster_bytes
        current = ClusterIndex(packed_end // geometry.cluster_bytes)
        has_room = bool(left) and self.get(current) < self.largest
        run = None if has_room and length <= left else self.take(1)
        if run is None or (has_room and run.start == current + 1):
            return HostOffset(packed_end), run
        return geometry.offset_of(run.start), run

    def count_in_packed(self, offset: HostOffset, length: int, run: Run | None) -> None:
        """Count one more compressed cluster in the host clusters that `take_packed` gave for it."""
        first = self.geometry.cluster_of(offset)
        if run is None or run.start != first:
            self.share(first, 1)
        if run is not None:
            self.count_in(run)
        self.view.changes.packed_end = layout.round_up(offset + length, SECTOR_BYTES)

    # Free clusters below the end of the file

    def search_if_short(self) -> None:
        """When short of clusters that read as zeros, find some that are free and not listed."""
        if not self.space.is_short or self.space.unknown:
            return
        for _ in itertools.count() if self.space.is_full else range(SCAN_BLOCKS_PER_TAKE):
            if self.space.unknown or not self.search_on():
                return

    def search_on(self) -> bool:
        """List what is free in the next block of refcounts; False if all of them were searched."""
        start, end = self.space.search_at, self.space.search_end
        if start >= end:
            return False
        per_block = self.geometry.refcounts_per_block
        stop = min(end, start - start % per_block + per_block)
        for run_start, run_end in self._free_runs(start, stop):
            self._list_free(run_start, run_end)
        self.space.search_at = stop
        return True

    def _free_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield [start, end) runs of refcount 0 within one metadata block of refcounts."""
        return (
            (first, first + count)
            for first, count, refcount in self.runs(start, stop - start)
            if not refcount
        )

    def _list_free(self, start: int, end: int) -> None:
        run_start = start
        for cluster in range(start, end):
            if self.space.is_listed(ClusterIndex(cluster)):
                if run_start < cluster:
                    self.space.add_found(ClusterIndex(run_start), cluster - run_start)
                run_start = cluster + 1
        if run_start < end:
            self.space.add_found(ClusterIndex(run_start), end - run_start)


def _stop_packing_in(run: Run, changes: ChangeSet, geometry: Geometry) -> None:
    """Nothing is packed behind what was compressed before, if that is free now (R4)."""
    if run.start <= changes.packed_end // geometry.cluster_bytes < run.start + run.count:
        changes.packed_end = 0
