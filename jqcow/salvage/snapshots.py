"""The snapshots of a damaged file: those that their table still has, and those whose L1 tables are left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from jqcow.ondisk import entries
from jqcow.ondisk.layout import MAX_L1_ENTRIES, table_bytes, table_entries
from jqcow.ondisk.snapshots import Snapshot
from jqcow.salvage.candidates import L1Copies
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.inference import Structures
from jqcow.salvage.lookalikes import FoundL1
from jqcow.salvage.marks import Marks
from jqcow.salvage.orphans import Unnamed, mark_header
from jqcow.salvage.shape import Damage, Shape
from jqcow.salvage.source import Source
from jqcow.salvage.tables import DiskTables, judge_all

ENTRIES_MAX = 1 << 24
"""So many entries the L1 tables of all snapshots have together: as much as QEMU's largest four."""
_LOST = frozenset({"nb_snapshots", "snapshots_offset"})


NAMELESS = "lost-"
"""So the names begin of snapshots that were found without their entry; an L1 table's offset follows."""


@dataclass(frozen=True)
class FoundSnapshot:
    """A snapshot.

    Attributes:
        name: for people.
        snapshot: its entry in the snapshot table; None if that is lost.
        l1_offset: of its L1 table in the file, in bytes.
        l1_entries: length of that.
        disk_bytes: size of its disk, that of the image where it is not known.
    """

    name: str
    snapshot: Snapshot | None
    l1_offset: int
    l1_entries: int
    disk_bytes: int

    def read(self, source: Source, shape: Shape) -> tuple[DiskTables, Marks]:
        """Judge its tables; return them, and marks of what they name.

        Raises:
            OSError: the host failed, other than by what it cannot read.
        """
        marks = Marks(shape.geometry.cluster_bits, source.size())
        mark_header(shape, marks)
        tables = DiskTables(self.name, self.disk_bytes, source, shape)
        if self.snapshot is None:
            tables.certainty = Certainty.LIKELY
        judge_all(tables, self.l1_offset, self.l1_entries, marks)
        return tables, marks


def find_snapshots(
    source: Source, shape: Shape, unnamed: Unnamed | None = None
) -> tuple[list[FoundSnapshot], list[Damage]]:
    """Return the snapshots of a file, nameless ones among them where the snapshot table is lost.

    Args:
        source: the file.
        shape: of it.
        unnamed: tells which L1 tables are in use; without it all that look like one are taken.
    """
    header = shape.area.header
    structures = Structures(source)
    damages: list[Damage] = []
    found: list[FoundSnapshot] = []
    left = ENTRIES_MAX
    if header.nb_snapshots:
        for entry in structures.snapshots_at(header.snapshots_offset, header.nb_snapshots, header):
            snapshot = entry.snapshot
            size = snapshot.disk_bytes
            if shape.geometry.l1_entries_for(size) > MAX_L1_ENTRIES:
                size = header.size
            place = snapshot.l1_table_offset
            entry_count = min(snapshot.l1_size, table_entries(max(0, source.size() - place)))
            left -= max(entry_count, shape.geometry.l1_entries_for(size))
            if left < 0:
                break
            found.append(FoundSnapshot(f"snapshot {snapshot.name!r}", snapshot, place, entry_count, size))
    if len(found) < header.nb_snapshots:
        missing = header.nb_snapshots - len(found)
        damages.append(
            Damage("snapshot table", header.snapshots_offset, f"{missing} entries of it cannot be read")
        )
    if damages or _LOST & (shape.lost | shape.inferred):
        known = {one.l1_offset for one in found} | {header.l1_table_offset}
        for table in _others(structures, shape, unnamed, known):
            name = f"a snapshot whose name is lost, L1 table at {table.offset:#x}"
            found.append(FoundSnapshot(name, None, table.offset, table.entry_count, header.size))
    return found, damages


def with_names(
    found: Iterable[FoundSnapshot], known: list[Snapshot], shape: Shape, unnamed: Unnamed
) -> list[Snapshot]:
    """Return entries for the snapshots that were found without, if refcounts say that they are in use.

    Args:
        found: by `find_snapshots`.
        known: those that have entries.
        shape: of the file.
        unnamed: has the refcounts.
    """
    ids = {snapshot.id for snapshot in known}
    numbers = (str(number) for number in count(1))
    free = (number for number in numbers if number not in ids)
    return [
        Snapshot(
            l1_table_offset=one.l1_offset,
            l1_size=one.l1_entries,
            id=next(free),
            name=f"{NAMELESS}{one.l1_offset:x}",
            date_seconds=0,
            date_nanoseconds=0,
            vm_clock_nanoseconds=0,
            vm_state_bytes=0,
            disk_bytes=one.disk_bytes,
            icount=None,
        )
        for one in found
        if one.snapshot is None and unnamed.refcount(one.l1_offset >> shape.geometry.cluster_bits)
    ]


def _others(
    structures: Structures, shape: Shape, unnamed: Unnamed | None, known: set[int]
) -> Iterator[FoundL1]:
    bits = shape.geometry.cluster_bits
    known = known | {shape.area.header.refcount_table_offset}
    for table in structures.find_l1(bits):
        users = None if unnamed is None else unnamed.refcount(table.offset >> bits)
        if table.offset not in known and users != 0:
            yield table


def copies_of_l1(
    source: Source,
    shape: Shape,
    snapshots: Iterable[FoundSnapshot],
    unnamed: Unnamed,
    *,
    with_old: bool = True,
) -> L1Copies:
    """Return what L1 tables of snapshots, and old L1 tables, say.

    Args:
        source: the file.
        shape: of it.
        snapshots: what `find_snapshots` found.
        unnamed: tells what is in use. Where nothing has two users, and no other L1 table is in use, there are
            no snapshots, whatever became of the header.
        with_old: look for old L1 tables, too, which takes a pass over the file.
    """
    snapshots = list(snapshots)
    is_lost = bool(_LOST & (shape.lost | shape.inferred)) or len(snapshots) < shape.area.header.nb_snapshots
    copies = L1Copies(are_known=not is_lost and all(one.snapshot is not None for one in snapshots))
    if not snapshots and not shape.area.header.nb_snapshots and unnamed.counts_once():
        known = {shape.area.header.l1_table_offset}
        copies.are_known = not any(_others(Structures(source), shape, unnamed, known))
    for one in snapshots:
        copies.live += _entries_at(source, one.l1_offset, one.l1_entries)
        copies.places |= _clusters_of(shape, one.l1_offset, one.l1_entries)
    if with_old:
        known = {one.l1_offset for one in snapshots} | {shape.area.header.l1_table_offset}
        for table in _others(Structures(source), shape, None, known):
            copies.old += _entries_at(source, table.offset, table.entry_count)
            copies.places |= _clusters_of(shape, table.offset, table.entry_count)
    return copies


def _clusters_of(shape: Shape, offset: int, entry_count: int) -> set[int]:
    step = shape.geometry.cluster_bytes
    return set(range(offset, offset + table_bytes(entry_count), step))


def _entries_at(source: Source, offset: int, count: int) -> list[tuple[int, int]]:
    table = source.pread(table_bytes(count), offset)
    return [(index, entries.split_l1(word)[0]) for index, word in entries.nonzero_entries(table)]
