"""What lies in a file beside header, the disk's tables and refcounts: marked, so that it counts for no data.

Snapshot table, L1 tables of snapshots, the LUKS header, bitmaps with their tables and their bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import bitmaps, entries, layout, luks, snapshots
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.layout import table_bytes
from jqcow.ondisk.snapshots import Snapshot
from jqcow.salvage.marks import Marks
from jqcow.salvage.shape import Damage, Damages, Shape
from jqcow.salvage.source import Source

SNAPSHOT_L1_ENTRIES_MAX = layout.MAX_L1_ENTRIES
"""So many entries the L1 tables of all snapshots may have that are looked at: it bounds the time."""
BITMAP_ENTRIES_MAX = 1 << 20
"""The same for the tables of bitmaps."""

Places = list[tuple[str, int, int]]
"""What a structure is, its host offset, its length in bytes."""


@dataclass
class Others:
    """The structures beside the disk's tables.

    Attributes:
        snapshots: those whose entry in the snapshot table can be.
        places: where the structures lie.
        damages: what is wrong with them.
    """

    snapshots: list[Snapshot] = field(default_factory=list)
    places: Places = field(default_factory=list)
    damages: Damages = field(default_factory=Damages)


def read_others(source: Source, shape: Shape) -> Others:
    """Find the structures beside the disk's tables, as far as they can be read."""
    found = Others()
    _read_snapshots(found, source, shape)
    _read_luks(found, shape)
    _read_bitmaps(found, source, shape)
    return found


def mark_others(found: Others, marks: Marks) -> None:
    """Mark where they lie."""
    for name, offset, length in found.places:
        if not marks.set_structure(offset, length):
            found.damages.append(Damage(name, offset, "something else lies there, too"))


def _read_snapshots(found: Others, source: Source, shape: Shape) -> None:
    header = shape.area.header
    if not header.nb_snapshots:
        return
    end, left = header.snapshots_offset, SNAPSHOT_L1_ENTRIES_MAX
    try:
        for entry in snapshots.read_entries(
            source.pread, header.snapshots_offset, header.nb_snapshots, header=header
        ):
            end = entry.offset + entry.length
            try:
                entry.validate(header)
            except (CorruptionError, FormatError) as error:
                found.damages.append(Damage("snapshot table", entry.offset, str(error)))
                continue
            left -= entry.snapshot.l1_size
            if left < 0:
                found.damages.append(Damage("snapshot table", entry.offset, "too long L1 tables in all"))
                break
            found.snapshots.append(entry.snapshot)
            place = entry.snapshot.l1_table_offset, table_bytes(entry.snapshot.l1_size)
            found.places.append((f"L1 table of snapshot {entry.snapshot.id}", *place))
    except (CorruptionError, FormatError) as error:
        lost = header.nb_snapshots - len(found.snapshots)
        meaning = f"{error}; it was to list {header.nb_snapshots} snapshots, {lost} of them are lost"
        found.damages.append(Damage("snapshot table", header.snapshots_offset, meaning))
    if end > header.snapshots_offset:
        found.places.append(("snapshot table", header.snapshots_offset, end - header.snapshots_offset))


def _read_luks(found: Others, shape: Shape) -> None:
    try:
        pointer = luks.pointer_of(shape.area)
    except (CorruptionError, FormatError) as error:
        found.damages.append(Damage("encryption header", None, str(error)))
        return
    if pointer is not None:
        found.places.append(("encryption header", pointer.offset, pointer.length))


def _read_bitmaps(found: Others, source: Source, shape: Shape) -> None:
    """Find the bitmaps; of a damaged directory nothing but itself counts, as in a check."""
    try:
        place = bitmaps.place_of(shape.area)
        if place is None:
            return
        found.places.append(("bitmap directory", place.offset, place.length_bytes))
        directory = bitmaps.read_directory(source.pread, shape.area)
    except (CorruptionError, FormatError) as error:
        found.damages.append(Damage("bitmap directory", None, f"{error}; the bitmaps are lost"))
        return
    left = BITMAP_ENTRIES_MAX
    for entry in directory.entries:
        length = table_bytes(entry.table_entries)
        found.places.append(("bitmap table", entry.table_offset, length))
        left -= entry.table_entries
        if left < 0:
            found.damages.append(
                Damage("bitmap directory", place.offset, "too long tables of bitmaps in all")
            )
            return
        for _, word in entries.nonzero_entries(source.pread(length, entry.table_offset)):
            try:
                bits, _ = entries.decode_bitmap_table(word, shape.geometry)
            except DamagedEntry as error:
                found.damages.append(Damage("bitmap table", entry.table_offset, str(error)))
                continue
            if bits:
                found.places.append(("bits of a bitmap", bits, shape.geometry.cluster_bytes))
