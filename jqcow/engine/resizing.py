"""Another size for the disk, or nothing in it. The caller is alone (request.py, Q2)."""

from __future__ import annotations

from functools import partial

from jqcow.engine.preallocating import Preallocating
from jqcow.engine.sharing import leave_to_one
from jqcow.engine.zeroing import Zeroing
from jqcow.ondisk.form import Preallocation


class Resizing:
    """Changes of the whole disk; many operations, of which the last makes the change visible."""

    def __init__(self, zeroing: Zeroing) -> None:
        self.zeroing = zeroing
        self.preallocating = Preallocating(zeroing.writes)
        self.requests = zeroing.requests
        self.tables = zeroing.tables
        self.geometry = zeroing.tables.geometry
        self._cluster_bytes = self.geometry.cluster_bytes

    def is_one_operation(self, size_bytes: int) -> bool:
        """Return True if `resize` shows nothing before its last operation; else it needs a transaction."""
        old_size, backing = self.tables.mapping.disk_bytes, self.zeroing.reads.backing
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
        # Growing: whoever made the image may have left mapped what lies past its end.
        self._free_past(min(old_size, size_bytes))
        # What lies behind the old end in its last cluster was never the guest's. Shrinking: whoever makes
        # the disk larger again, with whatever program, must not find the old bytes.
        within = min(old_size, size_bytes) % self._cluster_bytes
        if within:
            self.zeroing.zero_part(min(old_size, size_bytes), self._cluster_bytes - within)
        self.requests.planned(lambda: self._stage_size(size_bytes, ordered=bool(within)))
        backing = self.zeroing.reads.backing
        if backing is not None and size_bytes > old_size and backing.size > old_size:
            # What the backing file has there was never the guest's either.
            hidden = self.geometry.clusters(old_size) * self._cluster_bytes
            end = min(self.geometry.clusters(size_bytes), self.geometry.clusters(backing.size))
            self.zeroing.hide_new(hidden, end * self._cluster_bytes)

    def _grow_preallocated(self, old_size: int, size_bytes: int, preallocation: Preallocation) -> None:
        """As `resize`, to a larger disk whose new clusters all have a place in the file."""
        if size_bytes <= old_size:
            raise ValueError("preallocation is of what a disk grows by")
        if self.zeroing.writes.data.is_encrypted and not self.geometry.has_zero_flag:
            raise ValueError("preallocation of an encrypted disk needs compat=1.1: else it reads as noise")
        self._free_past(old_size)
        within = old_size % self._cluster_bytes
        if within:
            self.zeroing.write_over(old_size, self._cluster_bytes - within)
        first, end = self.geometry.clusters(old_size), self.geometry.clusters(size_bytes)
        backing = self.zeroing.reads.backing
        codec, is_encrypted = self.tables.mapping.codec, self.zeroing.writes.data.is_encrypted
        entry_for = codec.new_preallocated(is_encrypted=is_encrypted)
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

    def make_empty(self) -> None:
        """Give up all that the disk has of its own.

        Raises:
            OSError: the transaction must go back.
        """
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
        return found[0]
