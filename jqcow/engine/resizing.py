"""Another size for the disk, or nothing in it. The caller is alone (request.py, Q2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jqcow.engine.datafile import DataFile
from jqcow.engine.preallocating import Preallocating
from jqcow.engine.sharing import leave_to_one
from jqcow.engine.zeroing import Zeroing
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk.form import Preallocation
from jqcow.ondisk.l2 import DATA, UNALLOCATED, L2Entry
from jqcow.ondisk.layout import HostOffset
from jqcow.ondisk.preallocated import entries_for


class Resizing:
    """Changes of the whole disk; many operations, of which the last makes the change visible."""

    def __init__(self, zeroing: Zeroing) -> None:
        self.zeroing = zeroing
        self.preallocating = Preallocating(zeroing.writes)
        self.requests = zeroing.requests
        self.tables = zeroing.tables
        self.geometry = zeroing.tables.geometry
        self._cluster_bytes = self.geometry.cluster_bytes
        self._is_outside = self.geometry.has_data_file

    def is_one_operation(self, size_bytes: int) -> bool:
        """Return True if `resize` shows nothing before its last operation; else it needs a transaction."""
        old_size, backing = self.tables.mapping.disk_bytes, self.zeroing.reads.backing
        if self.tables.view.header.is_raw_outside:
            return False
        return size_bytes >= old_size and (backing is None or backing.size <= old_size)

    def resize(self, size_bytes: int, preallocation: Preallocation = "off") -> None:
        """Set the size of the disk. What is added reads as zeros; what is cut off is freed.

        ``preallocation`` of what is added, if it is not off, makes the change one for a transaction.

        Raises:
            ValueError: a disk that is not to grow cannot be preallocated.
            OSError: the disk has its old size.
        """
        old_size = self.tables.mapping.disk_bytes
        if preallocation != "off":
            self._grow_preallocated(old_size, size_bytes, preallocation)
            return
        if self._is_outside:
            self._resize_outside(old_size, size_bytes, "off")
            return
        # Growing: whoever made the image may have left mapped what lies past its end.
        self._free_past(min(old_size, size_bytes))
        # What lies behind the old end in its last cluster was never the guest's. Shrinking: whoever makes
        # the disk larger again, with whatever program, must not find the old bytes.
        within = min(old_size, size_bytes) % self._cluster_bytes
        if within:
            self.zeroing.zero_part(min(old_size, size_bytes), self._cluster_bytes - within)
        self.requests.planned(lambda: self._stage_size(size_bytes, ordered=bool(within)))
        self._hide_longer(old_size, size_bytes)

    def _hide_longer(self, old_size: int, size_bytes: int) -> None:
        backing = self.zeroing.reads.backing
        if backing is not None and size_bytes > old_size and backing.size > old_size:
            # What the backing file has there was never the guest's either.
            hidden = self.geometry.clusters(old_size) * self._cluster_bytes
            end = min(self.geometry.clusters(size_bytes), self.geometry.clusters(backing.size))
            self.zeroing.hide_new(hidden, end * self._cluster_bytes)

    def _resize_outside(self, old_size: int, size_bytes: int, preallocation: Preallocation) -> None:
        """As `resize`, where the data lies in a data file: behind the disk's end that has nobody's bytes.

        Of a smaller disk the file keeps everything until the record is durable (datafile.py, X6).
        """
        data_file = self.requests.medium.data_file
        is_raw = self.tables.view.header.is_raw_outside
        self._free_past(min(old_size, size_bytes))
        if size_bytes > old_size:
            if data_file is None:
                raise UnsupportedFeatureError("growing without the external data file", "it is not open")
            self._clear_behind(old_size, data_file, is_raw=is_raw)
            self._hide_behind(old_size)
            data_file.lengthen(size_bytes, preallocation)
            if is_raw:
                data_file.clear(old_size, size_bytes)
            first, end = self.geometry.clusters(old_size), self.geometry.clusters(size_bytes)
            if is_raw or preallocation != "off":
                places = self.zeroing.writes.places
                self.requests.planned(lambda: places.occupy(places.run_of(first, end - first)))
                self.preallocating.map_row(first, end, preallocation, self._entry_outside(old_size))
        self.requests.planned(lambda: self._stage_size(size_bytes, ordered=False))
        if preallocation == "off":
            self._hide_longer(old_size, size_bytes)

    def _clear_behind(self, old_size: int, data_file: DataFile, *, is_raw: bool) -> None:
        """Make zeros of what will be shown of the data file behind the disk's old end.

        Raises:
            UnsupportedFeatureError: in a transaction that made the disk smaller, others see data there (X4).
        """
        changes, places = self.tables.changes, self.zeroing.writes.places
        was_larger = changes.is_private and old_size < changes.reach_bytes
        if is_raw:
            if was_larger:
                places.refuse_overwriting()
            data_file.cut(old_size)
            return
        within = old_size % self._cluster_bytes
        count = self._cluster_bytes - within
        for run in self.zeroing.reads.runs(old_size, count if within else 0):
            if run.kind == DATA:
                if was_larger:
                    places.refuse_overwriting()
                self.zeroing.writes.data.pwrite(bytes(run.length), run.host)

    def _hide_behind(self, old_size: int) -> None:
        """Write zeros over what a backing file shows behind the disk's old end, in its last cluster."""
        reads, offset, within = self.zeroing.reads, old_size, old_size % self._cluster_bytes
        for run in reads.runs(old_size, self._cluster_bytes - within if within else 0):
            if run.kind == UNALLOCATED and not reads.below_reads_as_zeros(offset, run.length):
                self.zeroing.write_over(offset, run.length)
            offset += run.length

    def _entry_outside(self, old_size: int) -> Callable[[HostOffset], L2Entry]:
        """Return what makes the entries of new clusters in a data file, which all read as zeros.

        Where the file may hold old bytes there a flag says so.
        """
        is_raw = self.tables.view.header.is_raw_outside
        return partial(self.tables.mapping.codec.preallocated_zeros, as_data=is_raw)

    def _grow_preallocated(self, old_size: int, size_bytes: int, preallocation: Preallocation) -> None:
        """As `resize`, to a larger disk whose new clusters all have a place in the file."""
        if size_bytes <= old_size:
            raise ValueError("preallocation is of what a disk grows by")
        if self._is_outside:
            self._resize_outside(old_size, size_bytes, preallocation)
            return
        codec, is_encrypted = self.tables.mapping.codec, self.zeroing.writes.data.is_encrypted
        entry_for = entries_for(codec, is_encrypted=is_encrypted)
        self._free_past(old_size)
        within = old_size % self._cluster_bytes
        if within:
            self.zeroing.write_over(old_size, self._cluster_bytes - within)
        first, end = self.geometry.clusters(old_size), self.geometry.clusters(size_bytes)
        backing = self.zeroing.reads.backing
        if backing is not None and backing.size > old_size:
            # What a longer backing file has there was never the guest's.
            as_data = preallocation != "metadata" and not is_encrypted
            entry_for = partial(codec.preallocated_zeros, as_data=as_data)
        self.preallocating.map_row(first, end, preallocation, entry_for)
        self.requests.planned(lambda: self._stage_size(size_bytes, ordered=bool(within)))

    def _stage_size(self, size_bytes: int, *, ordered: bool) -> None:
        self.requests.enter_change()
        self.requests.require_live()
        tables = self.tables
        self.requests.dirty.cool()
        with tables.operation():
            if ordered:
                # The zeros behind the old end must be durable before the record that shows them.
                tables.changes.ordered = True
            tables.mapping.grow_l1(self.geometry.l1_entries_for(size_bytes))
            tables.snapshots.keep_sizes()
            tables.bitmaps.resize(size_bytes)
            tables.view.set_header(size=size_bytes)
            tables.changes.reach_bytes = max(tables.changes.reach_bytes, size_bytes)

    def make_empty(self) -> None:
        """Give up all that the disk has of its own.

        Raises:
            UnsupportedFeatureError: the bytes of a raw data file are the disk's, and stay (X3, X4).
            OSError: the transaction must go back.
        """
        if self.tables.view.header.is_raw_outside:
            self.zeroing.writes.places.refuse_overwriting()
        self._drop_tables(0)

    def _free_past(self, size_bytes: int) -> None:
        """Free the clusters that lie whole past a guest offset, and the L2 tables that map nothing else."""
        kept_tables = self.geometry.l1_entries_for(size_bytes)
        start = self.geometry.clusters(size_bytes) * self._cluster_bytes
        self.zeroing.unmap(start, kept_tables * self.tables.mapping.codec.per_table * self._cluster_bytes)
        self._drop_tables(kept_tables)

    def _drop_tables(self, first: int) -> None:
        dropped = self.requests.planned(partial(self._drop_next_table, first))
        while dropped is not None:
            dropped = self.requests.planned(partial(self._drop_next_table, dropped + 1))

    def _drop_next_table(self, first: int) -> int | None:
        """Free the next L2 table and all that it maps; return its L1 index, None where there is none."""
        self.requests.enter_change()
        tables = self.tables
        found = next(tables.mapping.l2_tables(first), None)
        if found is None:
            return None
        self.requests.require_live()
        table_bytes = tables.mapping.codec.per_table * self._cluster_bytes
        self.requests.dirty.will_stage(found[0] * table_bytes, table_bytes)
        with tables.operation():
            leave_to_one(tables, tables.mapping.drop_l2_table(found[0]))
            if self._is_outside:
                per_table = tables.mapping.codec.per_table
                self.zeroing.writes.places.vacate(found[0] * per_table, per_table)
        return found[0]
