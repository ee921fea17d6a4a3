"""Guest clusters mapped before anybody writes to them, behind the end of a disk that grows.

The tables of terabytes fit in no record. So they are not logged: they are written to clusters that nothing
names, made durable, and a record of a few entries then names them (L1 table, refcount table). The caller is
alone, in a transaction.

H1. A table that a record names and does not hold lies past the frontier, where no replay writes, and is
    written whole and durable before that record. What was read there before is forgotten.
H2. A preallocated cluster lies past the frontier, so it reads as zeros in every crash state; the space that
    it was promised on the host is durable before the record that maps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from jqcow.engine.clusters import Run
from jqcow.engine.medium import EXPECTED
from jqcow.engine.write import Writes
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk.form import Preallocation
from jqcow.ondisk.l2 import L2Entry
from jqcow.ondisk.layout import DATA_FILE, ClusterIndex, GuestCluster, HostOffset
from jqcow.ondisk.preallocated import MappedRow, refcount_block_of_ones


@dataclass(frozen=True)
class _Plan:
    """What is to be written and named; all of it lies in ``run``.

    Attributes:
        run: the clusters that were taken: L2 tables, refcount blocks, data, in this order. No data, where
            that goes to a data file.
        row: all that is mapped.
        new: the part of it that new L2 tables map; what comes before is mapped by a table that there is.
        blocks: host offsets of new refcount blocks, by their index.
    """

    run: Run
    row: MappedRow
    new: MappedRow
    blocks: dict[int, HostOffset]


class Preallocating:
    """Mapping guest clusters that have no entries, by one operation for each call."""

    def __init__(self, writes: Writes) -> None:
        self.writes = writes
        self.requests = writes.requests
        self.tables = writes.tables
        self.medium = writes.medium
        self.geometry = writes.geometry
        self._codec = writes.tables.mapping.codec

    def map_row(
        self, first: int, end: int, preallocation: Preallocation, entry_for: Callable[[HostOffset], L2Entry]
    ) -> None:
        """Map the guest clusters [first, end), which nothing is mapped behind, to new clusters of zeros.

        Args:
            first: the first of them.
            end: the one behind the last.
            preallocation: how the clusters take their space on the host.
            entry_for: makes the L2 entry of a cluster from its host offset.

        Raises:
            OSError: the host has no space for them. The transaction must go back.
            UnsupportedFeatureError: the file would be too large for its refcounts.
        """
        if first >= end:
            return
        plan = self.requests.planned(lambda: self._plan(first, end, entry_for))
        try:
            self._write(plan, preallocation)
            with self.medium.lock, self.tables.operation():
                self._stage(plan)
        except BaseException:
            self.writes.give_back([plan.run])
            with suppress(*EXPECTED):
                # Nothing names it: a host that is full gets back what it gave.
                if not self.geometry.has_data_file:
                    self.medium.punch(plan.row.host, plan.row.host_end - plan.row.host)
            raise

    def _plan(self, first: int, end: int, entry_for: Callable[[HostOffset], L2Entry]) -> _Plan:
        """Find where everything goes, and take its clusters; the L1 and refcount tables get their room."""
        self.requests.enter_change()
        self.requests.require_live()
        mapping, space, cluster_bytes = self.tables.mapping, self.tables.space, self.geometry.cluster_bytes
        per_table = self._codec.per_table
        with self.tables.operation():
            mapping.grow_l1(-(-end // per_table))
            has_table = mapping.l2_table(first // per_table)
            new_first = min(end, layout.round_up(first, per_table)) if has_table else first
            new = MappedRow(self._codec, new_first, end - new_first, HostOffset(0), entry_for)
            table_count = len(new.table_indices)
            data_count = 0 if self.geometry.has_data_file else end - first
            missing = self._find_room(table_count + data_count)
        count = table_count + len(missing) + data_count
        with self.medium.section():
            run = space.take_at_frontier(count) if count else Run(space.frontier, 0)
        block, data = ((run.start + table_count + extra) * cluster_bytes for extra in (0, len(missing)))
        places = map(HostOffset, range(block, data, cluster_bytes))
        if self.geometry.has_data_file:
            data = DATA_FILE + first * cluster_bytes
        row = MappedRow(self._codec, first, end - first, HostOffset(data), entry_for)
        return _Plan(run, row, row.behind(new_first), dict(zip(missing, places, strict=True)))

    def _find_room(self, others: int) -> list[int]:
        """Return the refcount blocks that are missing for so many clusters at the frontier, and for these."""
        refcounts = self.tables.refcounts
        missing: list[int] = []
        while True:
            start, count = self.tables.space.frontier, others + len(missing)
            if (start + count) * self.geometry.cluster_bytes > layout.MAX_HOST_OFFSET:
                raise UnsupportedFeatureError("a file of more than 64 PiB")
            indices = self._block_indices(start, count)
            if indices.stop > refcounts.table_entries:
                # The larger table takes clusters at the frontier, too.
                refcounts.grow_table(indices.stop - 1)
                continue
            found = [index for index in indices if not refcounts.refcount_block(index)]
            if len(found) == len(missing):
                return found
            missing = found

    def _block_indices(self, start: int, count: int) -> range:
        """Return the indices of the refcount blocks for clusters in a row."""
        per_block = self.geometry.refcounts_per_cluster
        return range(start // per_block, -(-(start + count) // per_block))

    def _write(self, plan: _Plan, preallocation: Preallocation) -> None:
        """Write what the record will name and not hold (H1). Durable before it: the set is ordered."""
        with self.medium.lock:
            # Not only in the checkpoint: a host that has no files of this length fails the operation.
            self.medium.grow(self.geometry.offset_of(self.tables.space.frontier))
        if not self.geometry.has_data_file:
            self.medium.take_space(plan.row.host, plan.row.host_end - plan.row.host, preallocation)
        self.medium.write_row(self.geometry.offset_of(plan.run.start), plan.new.l2_tables())
        if plan.blocks:
            self.medium.write_row(next(iter(plan.blocks.values())), self._refcount_blocks(plan))

    def _refcount_blocks(self, plan: _Plan) -> Iterator[bytes | bytearray]:
        start, end = plan.run.start, plan.run.start + plan.run.count
        return (refcount_block_of_ones(self.geometry, index, start, end) for index in plan.blocks)

    def _stage(self, plan: _Plan) -> None:
        """Name what was written, in one operation."""
        tables = self.tables
        tables.changes.ordered = True
        if plan.run.count:
            self._count_in(plan)
        start = plan.run.start
        data = start + len(plan.new.table_indices) + len(plan.blocks)
        tables.blocks.forget(self.geometry.offset_of(start), (data - start) * self.geometry.cluster_bytes)
        tables.space.metadata.update(map(ClusterIndex, range(start, data)))
        for at, l1_index in enumerate(plan.new.table_indices):
            place = self.geometry.offset_of(ClusterIndex(start + at))
            tables.mapping.set_l1_entry(l1_index, place, copied=True)
        self._map_in_old_table(plan)

    def _count_in(self, plan: _Plan) -> None:
        """Name the new refcount blocks, which count their clusters already; count the other clusters."""
        view, run, per_block = self.tables.view, plan.run, self.geometry.refcounts_per_cluster
        view.changes.taken.append(run)
        table = HostOffset(view.header.refcount_table_offset)
        for index in self._block_indices(run.start, run.count):
            if index in plan.blocks:
                view.set_entry(table, index, plan.blocks[index])
            else:
                start = max(run.start, index * per_block)
                stop = min(run.start + run.count, (index + 1) * per_block)
                self.tables.refcounts.raise_to_one(Run(ClusterIndex(start), stop - start))
        self.tables.space.count_in(run)

    def _map_in_old_table(self, plan: _Plan) -> None:
        per_block, cluster_bytes = self._codec.per_block, self.geometry.cluster_bytes
        position = plan.row.first
        while position < plan.new.first:
            stop = min(plan.new.first, position - position % per_block + per_block)
            host = plan.row.host - plan.row.first * cluster_bytes
            places = [HostOffset(host + cluster * cluster_bytes) for cluster in range(position, stop)]
            self.tables.mapping.set_entries(GuestCluster(position), [plan.row.entry_for(at) for at in places])
            position = stop
