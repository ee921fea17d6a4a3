"""From guest to host offsets: the L1 table and the L2 tables (qcow2 specification, "Cluster mapping").

G1. A host offset taken from a table is cluster-aligned, past the header cluster, within the file, and outside
    the journal range; otherwise the access raises and nothing is touched.
G2. A guest write in place never lands on a cluster that holds metadata.
G3. An L2 table is changed only where one L1 table alone points to it; a shared one is copied first (save A4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jqcow.engine.metadata import View
from jqcow.engine.refcounts import Allocation
from jqcow.engine.space import Space
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import entries, layout
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.header import Header
from jqcow.ondisk.l2 import (
    COMPRESSED_CLUSTER,
    DATA,
    NO_ENTRY,
    UNALLOCATED,
    ZERO_CLUSTER,
    HostRun,
    L2Entry,
    L2Run,
    codec_of,
)
from jqcow.ondisk.layout import DATA_FILE, ClusterIndex, GuestCluster, GuestOffset, HostOffset, entry_place


class MappedRun(NamedTuple):
    """``length`` guest bytes of one kind. ``host`` is the host offset of the first byte, 0 for none.

    A ZERO_CLUSTER run may keep host clusters; ``host`` is then that of its first subcluster only. So may an
    UNALLOCATED one of subclusters; such a run lies within one cluster. So does a COMPRESSED_CLUSTER run;
    ``host`` is then where its data starts, and ``packed_bytes`` how far that may reach. ``copied`` is the
    COPIED flag of all entries of a DATA run.
    """

    kind: int
    host: HostOffset
    length: int
    copied: bool = False
    packed_bytes: int = 0


class References(NamedTuple):
    """``cluster_count`` host clusters from ``cluster`` on, that the entries from ``position`` on refer to.

    ``compressed``: they are those of one entry, of a compressed cluster.
    """

    position: int
    cluster: ClusterIndex
    cluster_count: int
    copied: bool
    compressed: bool


class L1Table(NamedTuple):
    """An L1 table: host offset and number of entries, and the size of the disk that it maps."""

    offset: HostOffset
    entry_count: int
    disk_bytes: int


class Mapping:
    """The mapping of one image through one view; ``shown`` is a snapshot's table to show instead."""

    def __init__(self, view: View, space: Space, shown: L1Table | None = None) -> None:
        self.view = view
        self.space = space
        self.geometry = view.geometry
        self.codec = codec_of(view.geometry)
        self.shown = shown
        self._cluster_bytes = self.geometry.cluster_bytes
        self._subcluster_bytes = self.codec.subcluster_bytes
        self._span = self.codec.subclusters_per_block
        """Subclusters whose entries are looked at in one go."""
        self._header: Header | None = None
        """The header that `l1` was made from."""

    @property
    def l1(self) -> L1Table:
        """The L1 table that maps the disk."""
        if self.shown is not None:
            return self.shown
        header = self.view.header
        if header is not self._header:
            self._l1 = L1Table(HostOffset(header.l1_table_offset), header.l1_size, header.size)
            self._header = header
        return self._l1

    @property
    def disk_bytes(self) -> int:
        """Size of the disk."""
        return self.view.header.size if self.shown is None else self.shown.disk_bytes

    # Looking up

    def l2_table(self, l1_index: int, l1: L1Table | None = None) -> HostOffset:
        """Return the host offset of an L2 table of ``l1`` (None: of the disk's), 0 where there is none.

        Raises:
            CorruptionError: the L1 entry is not one that an image can have.
        """
        l1 = l1 or self.shown
        if l1 is None:
            header = self.view.header
            offset, entry_count = header.l1_table_offset, header.l1_size
        else:
            offset, entry_count, _ = l1
        if l1_index >= entry_count:
            return HostOffset(0)
        l1_offset = HostOffset(offset)
        try:
            table, _ = entries.decode_l1(self.view.entry(l1_offset, l1_index))
        except DamagedEntry as error:
            raise CorruptionError("L1 table", entry_place(l1_offset, l1_index), str(error)) from error
        place = entry_place(l1_offset, l1_index)
        if table:
            self._check_host("L1 table", place, table, 1)
        # A table that was cut off names nothing where it is gone.
        end = table + self._cluster_bytes if table else entry_place(l1_offset, l1_index + 1)
        if end > self.space.readable_bytes:
            self._check_end("L1 table", place, end, f"the L2 table at {table:#x}" if table else "the entry")
        return table

    def l2_tables(self, l1_index: int, l1: L1Table | None = None) -> Iterator[tuple[int, HostOffset]]:
        """Yield the L2 tables from ``l1_index`` on: (L1 index, host offset). Each may be dropped then."""
        l1 = l1 or self.l1
        while l1_index < l1.entry_count:
            table = self.l2_table(l1_index, l1)
            if table:
                yield l1_index, table
            l1_index += 1 if table else self._absent_tables(l1_index, l1)

    def l1_is_copied(self, l1_index: int) -> bool:
        """Return the COPIED flag of an entry of the active L1 table."""
        l1_offset = HostOffset(self.view.header.l1_table_offset)
        return entries.decode_l1(self.view.entry(l1_offset, l1_index))[1]

    def run(self, offset: GuestOffset, length: int) -> MappedRun:
        """Return the first run of one kind at guest ``offset``: at most ``length`` bytes, within one span.

        Raises:
            CorruptionError: a table entry on the way is not one that an image can have.
        """
        codec, unit = self.codec, self._subcluster_bytes
        subcluster, within = divmod(offset, unit)
        l1_index, position = divmod(subcluster, codec.subclusters_per_table)
        try:
            table = self.l2_table(l1_index)
            if not table:
                # Without an L2 table all that it would map is unallocated, up to the next table there is.
                tables = self._absent_tables(l1_index, self.l1)
                reach = (tables * codec.subclusters_per_table - position) * unit - within
                return MappedRun(UNALLOCATED, HostOffset(0), min(length, reach))
            limit = self._span - position % self._span
            limit = min(limit, -(-(within + length) // unit))
            kind, host, count, copied, packed_bytes = self._subclusters(table, position, limit)
        except CorruptionError as error:
            # An L1 entry maps all that its L2 table would.
            entry_count = codec.per_table if error.structure == "L1 table" else 1
            self.name_guest_range(error, offset, entry_count * self._cluster_bytes)
            raise
        length = min(length, count * unit - within)
        if kind == DATA:
            host = HostOffset(host + within)
        return MappedRun(kind, host, length, copied, packed_bytes)

    def name_guest_range(self, error: CorruptionError, offset: int, unit_bytes: int) -> None:
        """Say of an error what of the guest's disk around ``offset`` cannot be read for it."""
        start = offset - offset % unit_bytes
        error.guest_range = start, max(offset + 1, min(start + unit_bytes, self.disk_bytes)) - start

    def _subclusters(self, table: HostOffset, position: int, limit: int) -> L2Run:
        """Return the run of subclusters from ``position`` on within one span of entries, checked (G1)."""
        codec = self.codec
        l2_index, subcluster = divmod(position, codec.subclusters)
        place = HostOffset(table + l2_index * codec.entry_bytes)
        entries_at_hand, index = self._entries_at(table, l2_index)
        try:
            run = codec.run(entries_at_hand, index * codec.subclusters + subcluster, limit)
        except DamagedEntry as error:
            if limit > 1:
                # One damaged entry takes nothing from those before it.
                return self._subclusters(table, position, limit // 2)
            raise CorruptionError("L2 table", place, str(error)) from error
        if run.kind == COMPRESSED_CLUSTER:
            self._check_compressed(place, run.host, run.length)
        elif self.geometry.has_data_file:
            run = self._checked_outside(place, run, subcluster)
        elif run.host:
            host = HostOffset(run.host - subcluster * self._subcluster_bytes)
            last = subcluster + run.subcluster_count if run.kind == DATA else subcluster + 1
            count = self._check_readable(place, host, -(-last // codec.subclusters))
            if last > count * codec.subclusters:
                run = run._replace(subcluster_count=count * codec.subclusters - subcluster)
        return run

    def _entries_at(self, table: HostOffset, l2_index: int) -> tuple[bytes | bytearray, int]:
        """Return entries of an L2 table, and where among them that of ``l2_index`` is."""
        number, index = divmod(l2_index, self.codec.per_block)
        return self.view.block(HostOffset(table + number * self.geometry.block_bytes)), index

    def _checked_outside(self, place: HostOffset, run: L2Run, subcluster: int) -> L2Run:
        """Return what of a run the data file has: all, or the clusters before its end, at least one."""
        if not run.host:
            return run
        first = HostOffset(run.host - subcluster * self._subcluster_bytes)
        if first % self._cluster_bytes:
            raise CorruptionError("L2 table", place, f"offset {first - DATA_FILE:#x} is not a cluster's")
        data_file = self.space.medium.data_file
        if data_file is None or run.kind != DATA:
            return run
        subclusters = self.codec.subclusters
        count = -(-(subcluster + run.subcluster_count) // subclusters)
        # The last cluster may be cut short, with the disk.
        if data_file.reaches(first + (count - 1) * self._cluster_bytes):
            return run
        count = self.geometry.clusters(max(0, DATA_FILE + data_file.size - first))
        if not count:
            told = f"offset {first - DATA_FILE:#x} lies past the end of the data file {data_file.path!r}"
            raise CorruptionError("L2 table", place, f"{told}, which has {data_file.size} bytes")
        return run._replace(subcluster_count=count * subclusters - subcluster)

    def _check_readable(self, place: HostOffset, host: HostOffset, count: int) -> int:
        """Return how many of ``count`` host clusters lie within the file, the first of which must (G1)."""
        if count > 1 and host + (count - 1) * self._cluster_bytes >= self.space.readable_bytes:
            count = self._readable_count(host, count)
        self._check_host("L2 table", place, host, count)
        return count

    def _readable_count(self, host: HostOffset, count: int) -> int:
        """Return how many of ``count`` host clusters the file reaches to; 1 where it does not reach any."""
        if self.space.reaches(host + (count - 1) * self._cluster_bytes + 1):
            return count
        return max(1, self.geometry.clusters(self.space.readable_bytes - host))

    def _absent_tables(self, l1_index: int, l1: L1Table) -> int:
        """Return how many L2 tables are absent from ``l1_index`` on, in one block and a hole; at least 1."""
        position = l1_index % self.geometry.entries_per_block
        limit = min(self.geometry.entries_per_block, position + l1.entry_count - l1_index)
        if limit <= position:
            return 1
        block = self.view.block(entry_place(l1.offset, l1_index - position))
        present = entries.first_present(block, position, limit)
        stop = limit if present < 0 else present
        end = entry_place(l1.offset, l1_index - position + stop)
        if end > self.space.readable_bytes and not self.space.reaches(end):
            stop = max(position + 1, stop - layout.table_entries(end - self.space.readable_bytes + 7))
        elif present < 0 and stop == self.geometry.entries_per_block:
            # A table of many megabytes may take no space at all.
            table_end = entry_place(l1.offset, l1.entry_count)
            hole_end = self.view.hole_end(end, min(table_end, self.space.readable_bytes))
            stop += layout.table_entries(max(0, hole_end - end))
        return stop - position

    def runs(self, offset: GuestOffset, length: int) -> Iterator[MappedRun]:
        """Yield the runs of a guest range in order."""
        end = offset + length
        while offset < end:
            run = self.run(offset, end - offset)
            yield run
            offset = GuestOffset(offset + run.length)

    def l2_entry(self, cluster: GuestCluster) -> L2Entry:
        """Return the L2 entry of a guest cluster, `NO_ENTRY` where there is no L2 table.

        Raises:
            CorruptionError: the entry is not one that an image can have.
        """
        table = self.l2_table(cluster // self.codec.per_table)
        if not table:
            return NO_ENTRY
        return self._entry_at(table, cluster % self.codec.per_table)

    def _entry_at(self, table: HostOffset, l2_index: int) -> L2Entry:
        """Return one entry, checked (G1)."""
        codec = self.codec
        index = l2_index % codec.per_block
        place = HostOffset(table + l2_index * codec.entry_bytes)
        try:
            entry = codec.decode(self.view.block(HostOffset(place - index * codec.entry_bytes)), index)
        except DamagedEntry as error:
            raise CorruptionError("L2 table", place, str(error)) from error
        if entry.kind == COMPRESSED_CLUSTER:
            self._check_compressed(place, entry.host, entry.length)
        elif entry.host and not self.geometry.has_data_file:
            self._check_host("L2 table", place, entry.host, 1)
        return entry

    def references(self, table: HostOffset) -> Iterator[tuple[ClusterIndex, int]]:
        """Yield (start, count) of the host clusters that the entries of an L2 table refer to, in its order.

        Raises:
            CorruptionError: an entry is not one that an image can have.
        """
        for run in self.all_runs(table):
            yield run.cluster, run.cluster_count

    def check_l2_table(self, l1_index: int, table: HostOffset) -> None:
        """Check all entries of an L2 table, which ``l1_index`` has.

        Raises:
            CorruptionError: one is damaged; it says which guest range that maps.
        """
        try:
            for _ in self.references(table):
                pass
        except CorruptionError as error:
            position = (error.offset - table) // self.codec.entry_bytes
            offset = (l1_index * self.codec.per_table + position) * self._cluster_bytes
            self.name_guest_range(error, offset, self._cluster_bytes)
            raise

    def zero_entries(self, table: HostOffset, block: HostOffset) -> Iterator[tuple[int, L2Entry]]:
        """Yield (index in the table, entry) of those in a metadata block of it that have the zero flag.

        Raises:
            CorruptionError: an entry is not one that an image can have.
        """
        codec, position = self.codec, (block - table) // self.codec.entry_bytes
        end = position + codec.per_block
        while position < end:
            run = self._subclusters(table, position, end - position)
            if run.kind == ZERO_CLUSTER:
                for index in range(position, position + run.subcluster_count):
                    yield index, self._entry_at(table, index)
            position += run.subcluster_count

    def all_runs(self, table: HostOffset) -> Iterator[References]:
        """Yield the runs of host clusters that the entries of an L2 table refer to, checked (G1).

        A flag counts where they are not ``compressed``.
        """
        # The table as it is now: the caller may change flags of runs that it was given.
        data = self.view.read(table, self._cluster_bytes)
        index, per_table = 0, self.codec.per_table
        while index < per_table:
            run = self._host_run(table, data, index, per_table - index)
            if run.length:
                hosts = self.codec.hosts(L2Entry(COMPRESSED_CLUSTER, run.host, False, run.length))
                yield References(index, ClusterIndex(hosts.start), len(hosts), False, True)
            elif run.host:
                yield References(
                    index, self.geometry.cluster_of(run.host), run.entry_count, run.copied, False
                )
            index += run.entry_count

    def _host_run(self, table: HostOffset, data: bytes, index: int, limit: int) -> HostRun:
        """Return what the entries ``data`` of a table from ``index`` on refer to, checked (G1)."""
        place = HostOffset(table + index * self.codec.entry_bytes)
        try:
            run = self.codec.host_run(data, index, limit)
        except DamagedEntry as error:
            if limit > 1:
                # One damaged entry takes nothing from those before it.
                return self._host_run(table, data, index, limit // 2)
            raise CorruptionError("L2 table", place, str(error)) from error
        if run.length:
            self._check_compressed(place, run.host, run.length)
        elif run.host:
            run = run._replace(entry_count=self._check_readable(place, run.host, run.entry_count))
        return run

    def _check_compressed(self, place: HostOffset, host: HostOffset, length: int) -> None:
        hosts = self.codec.hosts(L2Entry(COMPRESSED_CLUSTER, host, False, length))
        start = self.geometry.offset_of(ClusterIndex(hosts.start))
        # Only where it starts: an entry may say more sectors than the data has.
        self._check_host("L2 table", place, start, max(1, len(hosts)), needed=1)

    def _check_host(
        self, structure: str, place: HostOffset, host: HostOffset, count: int, needed: int | None = None
    ) -> None:
        """Raise unless ``count`` clusters at ``host`` may be used by a table entry (G1).

        ``needed``: so many of them at least must lie within the file; None: all.
        """
        cluster, within = divmod(host, self._cluster_bytes)
        if within or not cluster:
            raise CorruptionError(structure, place, f"host offset {host:#x} is not a cluster's")
        # The last cluster may be cut short: programs that copy images leave zeros out.
        last = host + ((count if needed is None else needed) - 1) * self._cluster_bytes
        if last >= self.space.readable_bytes:
            self._check_end(structure, place, last + 1, f"host offset {host:#x}")
        for run in self.space.reserved:
            if run.start < cluster + count and cluster < run.start + run.count:
                raise CorruptionError(structure, place, f"host offset {host:#x} is in the journal")

    def _check_end(self, structure: str, place: HostOffset, end_bytes: int, what: str) -> None:
        """Raise unless the file reaches to host offset ``end_bytes``, which ``what`` needs (G1)."""
        if not self.space.reaches(end_bytes):
            file_bytes = self.space.medium.size()
            raise CorruptionError(
                structure, place, f"{what} lies past the end of the file, which has {file_bytes} bytes"
            )


class TableMapping(Mapping):
    """The mapping of an image that does not change, for walks: a table is looked at whole."""

    def __init__(self, view: View, space: Space, shown: L1Table | None = None) -> None:
        super().__init__(view, space, shown)
        self._span = self.codec.subclusters_per_table
        self._table = HostOffset(0)
        self._entries = b""

    def _entries_at(self, table: HostOffset, l2_index: int) -> tuple[bytes | bytearray, int]:
        """As in `Mapping`: all entries of the table, which is kept for the next call."""
        if table != self._table:
            self._entries = self.view.read(table, self._cluster_bytes)
            self._table = table
        return self._entries, l2_index


class MappingEditor(Mapping):
    """The mapping of one image, to be changed inside an operation."""

    def __init__(self, view: View, space: Space, refcounts: Allocation, shown: L1Table | None = None) -> None:
        super().__init__(view, space, shown)
        self.refcounts = refcounts

    def set_entries(self, first: GuestCluster, values: list[L2Entry]) -> None:
        """Stage L2 entries for guest clusters in a row, within one metadata block of one L2 table.

        Raises:
            OSError: the host has no space for an L2 table.
            UnsupportedFeatureError: compressed data lies too far out in the file.
        """
        table = self._own_l2_table(first // self.codec.per_table)
        self.put_entries(table, first % self.codec.per_table, values)

    def put_entries(self, table: HostOffset, l2_index: int, values: list[L2Entry]) -> None:
        """Stage entries in a row in an L2 table, within one metadata block, for all that share it (A4)."""
        codec = self.codec
        index = l2_index % codec.per_block
        block = self.view.edit(HostOffset(table + (l2_index - index) * codec.entry_bytes))
        try:
            for position, value in enumerate(values, index):
                codec.encode(block, position, value)
        except ValueError as error:
            raise UnsupportedFeatureError("compressed data this far out in the file", str(error)) from error

    def set_copied(self, table: HostOffset, position: int, count: int, *, copied: bool) -> None:
        """Set or clear the flags of ``count`` entries of a table, block by block."""
        codec, end = self.codec, position + count
        while position < end:
            number, within = divmod(position, codec.per_block)
            stop = min(within + end - position, codec.per_block)
            block = self.view.edit(HostOffset(table + number * self.geometry.block_bytes))
            codec.set_copied(block, within, stop, copied=copied)
            position += stop - within

    def _own_l2_table(self, l1_index: int) -> HostOffset:
        """Return the host offset of an L2 table that may be changed (G3)."""
        table = self.l2_table(l1_index)
        if table and self._has_one_owner(table):
            return table
        if l1_index >= self.view.header.l1_size:
            self.grow_l1(l1_index + 1)
        own = self.refcounts.allocate_metadata()
        if table:
            self.view.copy_table(table, own, self._cluster_bytes)
            self.refcounts.release_metadata(self.geometry.cluster_of(table))
        self.set_l1_entry(l1_index, own, copied=True)
        return own

    def _has_one_owner(self, table: HostOffset) -> bool:
        return self.refcounts.get(self.geometry.cluster_of(table)) == 1

    def set_l1_entry(self, l1_index: int, table: HostOffset, *, copied: bool) -> None:
        """Stage an L1 entry; ``table`` 0 for none."""
        l1_offset = HostOffset(self.view.header.l1_table_offset)
        self.view.set_entry(l1_offset, l1_index, entries.l1_entry(table, copied=copied) if table else 0)

    def drop_l2_table(self, l1_index: int) -> list[ClusterIndex]:
        """Stage an L1 entry without an L2 table, and give up the table and all that it maps.

        Returns the clusters that it leaves to one other owner (sharing.py, W5).
        """
        left_one = self.release_l2_table(self.l2_table(l1_index))
        self.set_l1_entry(l1_index, HostOffset(0), copied=False)
        return left_one

    def release_l2_table(self, table: HostOffset, *, tells: bool = True) -> list[ClusterIndex]:
        """Give up one reference to an L2 table and to all that it maps; return what has one owner left.

        Not ``tells``: return nothing. Of a whole disk it would be millions.
        """
        left_one: list[ClusterIndex] = []
        for run in self.all_runs(table):
            for left in self.refcounts.release_runs(run.cluster, run.cluster_count):
                if tells and not run.compressed:
                    left_one += map(ClusterIndex, range(left.start, left.start + left.count))
        self.refcounts.release_metadata(self.geometry.cluster_of(table))
        return left_one

    def grow_l1(self, l1_size: int) -> None:
        """Give the L1 table at least ``l1_size`` entries, in other clusters; the new entries are 0."""
        header = self.view.header
        if l1_size <= header.l1_size:
            return
        if l1_size > layout.MAX_L1_ENTRIES:
            raise UnsupportedFeatureError("an L1 table of more than 32 MiB")
        old = HostOffset(header.l1_table_offset)
        old_bytes = layout.table_bytes(header.l1_size)
        offset = self.copy_l1(old, old_bytes, l1_size)
        self.view.set_header(l1_table_offset=offset, l1_size=l1_size)
        self.refcounts.release_metadata(self.geometry.cluster_of(old), self.geometry.clusters(old_bytes))

    def copy_l1(self, source: HostOffset, length_bytes: int, entry_count: int) -> HostOffset:
        """Copy an L1 table to new clusters for so many entries; return their host offset, 0 for none."""
        if not entry_count:
            return HostOffset(0)
        clusters = self.geometry.clusters(layout.table_bytes(entry_count))
        offset = self.refcounts.allocate_metadata(clusters)
        self.view.copy_table(source, offset, length_bytes)
        return offset
