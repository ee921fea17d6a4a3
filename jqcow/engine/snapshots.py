"""Internal snapshots (qcow2 specification, "Snapshots"): made, applied and deleted, each in one operation.

A snapshot is a copy of the active L1 table; the L2 tables and the data that both reach are shared, and
counted once for each. A change of shared data goes to a new cluster, a change of a shared L2 table to a copy
(mapping.py, G3).

N1. Everything that an L1 table reaches is counted once for that table, in the record that makes or drops
    the table's place in the image.
N2. After each of these operations COPIED is set in the active tables exactly where the refcount is 1.
N3. The clusters of a LUKS header are metadata, with one user.
N4. A snapshot that does not tell the size of its disk, as version 2 allows, has the disk's. The record that
    changes that tells the snapshot its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jqcow.engine.bitmaps import Bitmaps
from jqcow.engine.mapping import L1Table, MappingEditor
from jqcow.engine.metadata import View
from jqcow.engine.refcounts import Allocation, Refcounts
from jqcow.errors import CorruptionError, SnapshotNotFound, UnsupportedFeatureError
from jqcow.ondisk import layout, luks
from jqcow.ondisk import snapshots as tables
from jqcow.ondisk.layout import ClusterIndex, HostOffset
from jqcow.ondisk.snapshots import Snapshot, SnapshotTable

MAX_METADATA_CLUSTERS = 1 << 23
"""An image with more clusters of tables is not changed: it bounds memory."""
ID_DIGITS_MAX = 18
"""Ids of more digits are names like any other: they are not counted on."""


@dataclass(frozen=True)
class NewSnapshot:
    """What a snapshot is to be called; times in seconds and nanoseconds since 1970."""

    name: str
    date_seconds: int
    date_nanoseconds: int


def _reader(view: View) -> tables.Read:
    return lambda length, offset: view.read(HostOffset(offset), length)


class Snapshots:
    """The snapshots of one image through one view. What changes them is called inside an operation."""

    def __init__(self, view: View, mapping: MappingEditor, refcounts: Allocation, bitmaps: Bitmaps) -> None:
        self.bitmaps = bitmaps
        self.view = view
        self.mapping = mapping
        self.refcounts = refcounts
        self.geometry = view.geometry

    # Looking

    def read_table(self) -> SnapshotTable:
        """Return the snapshot table as the engine sees it now.

        Raises:
            FormatError, CorruptionError: it is not one that an image can have.
        """
        header = self.view.header
        if not header.nb_snapshots:
            return SnapshotTable((), 0)
        read = _reader(self.view)
        return tables.parse_table(read, header.snapshots_offset, header.nb_snapshots, header=header)

    def find(self, id_or_name: str) -> Snapshot:
        """Return the snapshot with this id or, where there is none, the first with this name.

        Raises:
            SnapshotNotFound: there is neither.
            TypeError: not a text: an id is one, however it looks.
        """
        if not isinstance(id_or_name, str):
            raise TypeError(f"a snapshot's id or name is a str, not {type(id_or_name).__name__}")
        found = self.read_table().snapshots
        for snapshot in found:
            if snapshot.id == id_or_name:
                return snapshot
        for snapshot in found:
            if snapshot.name == id_or_name:
                return snapshot
        raise SnapshotNotFound(id_or_name)

    @staticmethod
    def l1_of(snapshot: Snapshot) -> L1Table:
        """Return where a snapshot's L1 table is."""
        return L1Table(HostOffset(snapshot.l1_table_offset), snapshot.l1_size, snapshot.disk_bytes)

    def l1_to_show(self, id_or_name: str) -> L1Table:
        """Return the L1 table of a snapshot, to be shown instead of the disk's.

        Raises:
            SnapshotNotFound: there is no such snapshot.
            CorruptionError: its L1 table is too small for its disk.
        """
        snapshot = self.find(id_or_name)
        if snapshot.l1_size < self.geometry.l1_entries_for(snapshot.disk_bytes):
            # Otherwise a few bytes could announce a disk that takes years to walk.
            detail = f"{snapshot.l1_size} entries are too few for {snapshot.disk_bytes} bytes"
            raise CorruptionError("snapshot's L1 table", snapshot.l1_table_offset, detail)
        return self.l1_of(snapshot)

    # Changing, inside an operation

    def create(self, new: NewSnapshot) -> Snapshot:
        """Make a snapshot of the disk as it is now.

        Raises:
            UnsupportedFeatureError: the image has as many snapshots as it can have, or a refcount would not
                fit its width.
            OSError: the host has no space for the tables.
        """
        if self.geometry.has_data_file:
            raise UnsupportedFeatureError(
                "a snapshot of an image with an external data file", "there is no second place for the data"
            )
        old = self.read_table()
        if len(old.snapshots) >= tables.MAX_SNAPSHOTS:
            raise UnsupportedFeatureError(f"more than {tables.MAX_SNAPSHOTS} snapshots")
        active = self.mapping.l1
        self._share(active, is_active=True)
        snapshot = Snapshot(
            l1_table_offset=self.mapping.copy_l1(
                active.offset, layout.table_bytes(active.entry_count), active.entry_count
            ),
            l1_size=active.entry_count,
            id=_next_id(old.snapshots),
            name=new.name,
            date_seconds=new.date_seconds,
            date_nanoseconds=new.date_nanoseconds,
            vm_clock_nanoseconds=0,
            vm_state_bytes=0,
            disk_bytes=active.disk_bytes,
            icount=None,
        )
        self._write_table(old, (*old.snapshots, snapshot))
        return snapshot

    def apply(self, snapshot: Snapshot) -> None:
        """Make the disk what it was when the snapshot was made, its size included.

        Raises:
            UnsupportedFeatureError: a refcount would not fit its width.
            OSError: the host has no space for the tables.
        """
        active, taken = self.mapping.l1, self.l1_of(snapshot)
        entry_count = max(taken.entry_count, self.geometry.l1_entries_for(taken.disk_bytes))
        if entry_count > layout.MAX_L1_ENTRIES:
            # Otherwise a few bytes could ask for tables without bound.
            detail = f"a disk of {taken.disk_bytes} bytes is too large"
            raise CorruptionError("snapshot table", self.view.header.snapshots_offset, detail)
        self._share(taken)
        offset = self.mapping.copy_l1(taken.offset, layout.table_bytes(taken.entry_count), entry_count)
        self._release(active)
        self.keep_sizes()
        self.view.set_header(l1_table_offset=offset, l1_size=entry_count, size=taken.disk_bytes)
        self.set_copied_flags()

    def delete(self, snapshot: Snapshot) -> None:
        """Give up a snapshot, and all that it alone holds."""
        old = self.read_table()
        self._release(self.l1_of(snapshot))
        self.set_copied_flags()
        self._write_table(old, tuple(kept for kept in old.snapshots if kept != snapshot))

    def _share(self, l1: L1Table, *, is_active: bool = False) -> None:
        """Count all that an L1 table reaches once more (N1).

        Of what the active one has nothing has one user then: no flag stays (N2).
        """
        for l1_index, table in self.mapping.l2_tables(0, l1):
            for run in self.mapping.all_runs(table):
                self.refcounts.share(run.cluster, run.cluster_count)
                if is_active and run.copied:
                    self.mapping.set_copied(table, run.position, run.cluster_count, copied=False)
            self.refcounts.share(self.geometry.cluster_of(table), 1)
            if is_active and self.mapping.l1_is_copied(l1_index):
                self.mapping.set_l1_entry(l1_index, table, copied=False)

    def _release(self, l1: L1Table) -> None:
        """Give up an L1 table and its references to all that it reaches (N1)."""
        for _, table in self.mapping.l2_tables(0, l1):
            self.mapping.release_l2_table(table, tells=False)
        first = self.geometry.cluster_of(l1.offset)
        self.refcounts.release_metadata(first, self.geometry.clusters(layout.table_bytes(l1.entry_count)))

    def keep_sizes(self) -> None:
        """Before the disk's size or the version changes: write it to the snapshots that rely on it (N4)."""
        header, read = self.view.header, _reader(self.view)
        found = tables.read_entries(read, header.snapshots_offset, header.nb_snapshots, header=header)
        if any(entry.extra_bytes < tables.REQUIRED_EXTRA_BYTES for entry in found):
            old = self.read_table()
            self._write_table(old, old.snapshots)

    def _write_table(self, old: SnapshotTable, snapshots: tuple[Snapshot, ...]) -> None:
        """Write the snapshot table anew, in other clusters, and give up the old one."""
        data = tables.pack_table(snapshots)
        if len(data) > tables.MAX_TABLE_BYTES:
            raise UnsupportedFeatureError("a snapshot table of more than 64 MiB")
        offset = (
            self.refcounts.allocate_metadata(self.geometry.clusters(len(data))) if data else HostOffset(0)
        )
        for position in range(0, len(data), self.geometry.block_bytes):
            part = data[position : position + self.geometry.block_bytes]
            self.view.edit(HostOffset(offset + position))[: len(part)] = part
        old_offset = self.view.header.snapshots_offset
        self.view.set_header(nb_snapshots=len(snapshots), snapshots_offset=offset)
        if old.length_bytes:
            first = self.geometry.cluster_of(HostOffset(old_offset))
            self.refcounts.release_metadata(first, self.geometry.clusters(old.length_bytes))

    # The COPIED flags of the active tables

    def set_copied_flags(self, *, change: bool = True) -> int:
        """Make every COPIED flag that the active L1 table reaches say whether the refcount is 1 (N2).

        Returns how many of them did not. Without ``change`` they stay as they are.
        """
        wrong = 0
        for l1_index, table in self.mapping.l2_tables(0):
            copied = self.refcounts.get(self.geometry.cluster_of(table)) == 1
            if self.mapping.l1_is_copied(l1_index) != copied:
                wrong += 1
                if change:
                    self.mapping.set_l1_entry(l1_index, table, copied=copied)
            if self.view.geometry.has_data_file:
                for block in range(table, table + self.geometry.cluster_bytes, self.geometry.block_bytes):
                    wrong += self._set_copied_outside(HostOffset(block), change=change)
            else:
                wrong += self._set_copied_in_table(table, change=change)
        return wrong

    def _set_copied_outside(self, block: HostOffset, *, change: bool) -> int:
        """No refcount counts a cluster of a data file: each has one user."""
        codec = self.mapping.codec
        entries = codec.found(bytes(self.view.block(block)))
        positions = [found.position for found in entries if found.host and not found.copied]
        for position in positions if change else ():
            codec.set_copied(self.view.edit(block), position, position + 1, copied=True)
        return len(positions)

    def _set_copied_in_table(self, table: HostOffset, *, change: bool) -> int:
        wrong = 0
        for run in self.mapping.all_runs(table):
            if run.compressed:
                continue
            index = run.position
            for _, count, refcount in self.refcounts.runs(run.cluster, run.cluster_count):
                copied = refcount == 1
                if run.copied != copied:
                    wrong += count
                    if change:
                        self.mapping.set_copied(table, index, count, copied=copied)
                index += count
        return wrong

    # What holds data

    def data_within(self, start: int, end: int) -> Counter[ClusterIndex]:
        """Return how many references of L2 entries there are to each of the host clusters in [start, end).

        Raises:
            CorruptionError: a table is damaged: what it maps cannot be told.
            UnsupportedFeatureError: they are too many to be counted.
        """
        users: Counter[HostOffset] = Counter()
        for l1 in self.l1_tables():
            users.update(table for _, table in self.mapping.l2_tables(0, l1))
        found: Counter[ClusterIndex] = Counter()
        for table, count in users.items():
            for first, length in self.mapping.references(table):
                for cluster in range(max(first, start), min(first + length, end)):
                    found[ClusterIndex(cluster)] += count
            if len(found) > MAX_METADATA_CLUSTERS:
                raise UnsupportedFeatureError(f"more than {MAX_METADATA_CLUSTERS} clusters with refcount 0")
        return found

    # What lies where

    def named_end(self) -> int:
        """Return the cluster behind the last one that holds anything but refcounts.

        Raises:
            CorruptionError: a table is damaged: what it names cannot be told.
        """
        header, clusters = self.view.header, self.geometry.clusters
        end = max(1, clusters(header.snapshots_offset + self.read_table().length_bytes))
        end = max(end, *(cluster + 1 for _, cluster in self.bitmaps.clusters()), 0)
        seen: set[HostOffset] = set()
        for l1 in self.l1_tables():
            end = max(end, clusters(l1.offset + layout.table_bytes(l1.entry_count)))
            for _, table in self.mapping.l2_tables(0, l1):
                if table not in seen:
                    seen.add(table)
                    ends = (start + count for start, count in self.mapping.references(table))
                    end = max(end, self.geometry.cluster_of(table) + 1, *ends)
        return end

    def check_all_mapped(self) -> None:
        """Check all that the disk and its snapshots map, each L2 table once.

        Raises:
            CorruptionError: an entry is damaged, or names what lies past the end of the file.
        """
        seen: set[HostOffset] = set()
        for l1 in self.l1_tables():
            for l1_index, table in self.mapping.l2_tables(0, l1):
                if table not in seen:
                    seen.add(table)
                    self.mapping.check_l2_table(l1_index, table)

    # What holds metadata

    def l1_tables(self) -> list[L1Table]:
        """Return all L1 tables: the active one, and those of the snapshots."""
        return [self.mapping.l1, *(self.l1_of(snapshot) for snapshot in self.read_table().snapshots)]

    def find_metadata(self) -> dict[ClusterIndex, int]:
        """Return the clusters that hold metadata, with how many users each of them has.

        Raises:
            CorruptionError: one of them has two uses.
        """
        return self._survey().uses

    def survey(self) -> set[ClusterIndex]:
        """Return the clusters that hold metadata, each of them checked to be counted, and for one use.

        Done once before the first change: an allocator that finds a live table "free" destroys the image.

        Raises:
            CorruptionError: a metadata cluster has two uses, or more users than its refcount tells.
        """
        survey = self._survey()
        survey.check_counted(self.refcounts)
        return set(survey.uses)

    def _survey(self) -> _Survey:
        geometry, mapping = self.geometry, self.mapping
        survey = _Survey(self.view)
        survey.add(self._fixed_clusters())
        survey.add(("refcount block", geometry.cluster_of(at)) for _, at in self.refcounts.blocks_from_top())
        first = geometry.cluster_of(HostOffset(self.view.header.snapshots_offset))
        count = geometry.clusters(self.read_table().length_bytes)
        survey.add(("snapshot table", ClusterIndex(cluster)) for cluster in range(first, first + count))
        survey.add(self.bitmaps.clusters())
        l1_tables = self.l1_tables()
        total_bytes = sum(layout.table_bytes(l1.entry_count) for l1 in l1_tables[1:])
        if total_bytes > tables.MAX_SNAPSHOT_L1_BYTES:
            raise UnsupportedFeatureError(f"snapshots with L1 tables of {total_bytes} bytes in all")
        for number, l1 in enumerate(l1_tables):
            # Before it is walked: it lies in the file, and no other table does there.
            if number:
                survey.add(self._l1_clusters(l1))
            l2_tables = [geometry.cluster_of(table) for _, table in mapping.l2_tables(0, l1)]
            if len(l2_tables) != len(set(l2_tables)):
                raise CorruptionError("L1 table", l1.offset, "it names an L2 table twice")
            survey.add((("L2 table", cluster) for cluster in l2_tables), shared=True)
        return survey

    def _fixed_clusters(self) -> Iterator[tuple[str, ClusterIndex]]:
        """Yield the clusters of headers, refcount table and active L1 table: (structure, cluster index)."""
        header = self.view.header
        yield "header", ClusterIndex(0)
        first = self.geometry.cluster_of(HostOffset(header.refcount_table_offset))
        for position in range(0 if self.refcounts.is_lost else header.refcount_table_clusters):
            yield "refcount table", ClusterIndex(first + position)
        yield from self._l1_clusters(self.mapping.l1)
        yield from self._luks_clusters()

    def _luks_clusters(self) -> Iterator[tuple[str, ClusterIndex]]:
        """Yield the clusters of the LUKS header, if there is one (N3)."""
        pointer = luks.pointer_of(self.view.area)
        for cluster in () if pointer is None else luks.clusters_of(pointer, self.geometry):
            yield "encryption header", ClusterIndex(cluster)

    def _l1_clusters(self, l1: L1Table) -> Iterator[tuple[str, ClusterIndex]]:
        first = self.geometry.cluster_of(l1.offset)
        for position in range(self.geometry.clusters(layout.table_bytes(l1.entry_count))):
            yield "L1 table", ClusterIndex(first + position)


class _Survey:
    """Which metadata clusters there are, each with the structure that it belongs to, and how many users."""

    def __init__(self, view: View) -> None:
        self.uses: dict[ClusterIndex, int] = {}
        self._view = view
        self._geometry = view.geometry
        self._end = view.geometry.clusters(view.blocks.medium.size())
        self._structures: dict[ClusterIndex, str] = {}

    def add(self, clusters: Iterable[tuple[str, ClusterIndex]], *, shared: bool = False) -> None:
        """Add a user to each cluster. ``shared``: other L1 tables may use it too, as the same structure."""
        for structure, cluster in clusters:
            offset = self._geometry.offset_of(cluster)
            if cluster >= self._end and not self._view.holds(offset):
                raise CorruptionError(structure, offset, "it lies past the end of the file")
            known = self._structures.setdefault(cluster, structure)
            if cluster in self.uses and not (shared and known == structure):
                raise CorruptionError(structure, offset, "the cluster holds other metadata too")
            self.uses[cluster] = self.uses.get(cluster, 0) + 1
            if len(self.uses) > MAX_METADATA_CLUSTERS:
                raise UnsupportedFeatureError(f"more than {MAX_METADATA_CLUSTERS} clusters of metadata")

    def check_counted(self, refcounts: Refcounts) -> None:
        """Raise CorruptionError where a cluster has more users than its refcount tells."""
        for cluster, uses in self.uses.items():
            refcount = refcounts.get(cluster)
            if refcount < uses:
                offset = self._geometry.offset_of(cluster)
                detail = f"its refcount is {refcount}" + (f", its users are {uses}" if uses > 1 else "")
                raise CorruptionError(self._structures[cluster], offset, detail)


def _next_id(snapshots: Iterable[Snapshot]) -> str:
    """Return the id of a new snapshot, as QEMU counts: 1 more than the highest that is a number."""
    ids = (snapshot.id for snapshot in snapshots)
    numbers = (int(name) for name in ids if name.isascii() and name.isdigit() and len(name) <= ID_DIGITS_MAX)
    return str(max(numbers, default=0) + 1)
