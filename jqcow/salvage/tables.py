"""The L1 table of a disk and its L2 tables, as far as the file still has them.

TB1. A table is *whole* if each of its entries is one that an image can have. What a whole table says is taken
    as it stands, also that nothing is allocated.
TB2. Of a *torn* table a sector counts if most of it can be: noise can not, a flipped bit costs one entry. An
    entry for what lies past the end of the file can be, in a file that was cut off: its data alone is lost.
TB3. What the tables name is marked once for each entry that names it, and the tables as structures.
TB4. A table that is named again and again is judged twice at most: it takes no time to name one.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from jqcow import _native
from jqcow.ondisk import entries
from jqcow.ondisk.layout import (
    MAX_L1_ENTRIES,
    SECTOR_BYTES,
    HostOffset,
    entry_place,
    table_bytes,
    table_entries,
)
from jqcow.ondisk.snapshots import Snapshot
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.marks import Marks, StreamStarts
from jqcow.salvage.shape import Damage, Damages, Shape
from jqcow.salvage.source import Source

UNALLOCATED, ZERO, DATA, COMPRESSED, INVALID, DOUBLED, STRUCTURES = range(_native.JUDGED)
"""The places in what `l2_judge` counts."""

LONGEST_BYTES = 1 << 56
"""So far the offsets of entries reach."""

MARKED_TIMES = 2
"""A cluster that is named twice is marked as one that is named often."""


class Fate(IntEnum):
    """What became of an L2 table."""

    ABSENT = 0
    """The L1 table has none there."""
    WHOLE = 1
    EMPTY = 2
    """It is whole, and all zeros: it may have been emptied by what damaged the file."""
    TORN = 3
    """Some of its entries are lost."""
    LOST = 4


@dataclass
class DiskTables:
    """The tables of one disk: the active one, or a snapshot's.

    Attributes:
        name: of the disk, for people.
        disk_bytes: its size.
        offsets: of the L2 table of each L1 entry; 0 where there is none, or where it is lost.
        fates: a `Fate` for each L1 entry.
        lost: of torn tables the (first entry, count) that are lost, by L1 index.
        beyond: those among them that are for what lies past the end of the file.
        likely: of lost tables the host offset of what may be them, and how surely, by L1 index.
        certainty: how surely the L1 table is that of the disk.
        are_empty_sure: a table of zeros says that nothing is allocated. False: it may have been emptied.
        damages: what is wrong, in the order of the L1 table.
        counts: what the entries are, as `l2_judge` counts them.
        crowded: the L1 indices of tables whose place has another use, too: nothing that they say is certain.
        is_cut_off: the file ends before what the tables name.
        is_l1_damaged: an entry of the L1 table is lost, or all of it.
        streams: where the compressed data starts that entries name.
    """

    name: str
    disk_bytes: int
    source: Source
    shape: Shape
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    fates: bytearray = field(default_factory=bytearray)
    lost: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    beyond: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    damages: Damages = field(default_factory=Damages)
    counts: list[int] = field(default_factory=lambda: [0] * _native.JUDGED)
    crowded: set[int] = field(default_factory=set)
    likely: dict[int, tuple[int, Certainty]] = field(default_factory=dict)
    certainty: Certainty = Certainty.CERTAIN
    are_empty_sure: bool = False
    is_cut_off: bool = False
    is_l1_damaged: bool = False
    streams: StreamStarts = field(default_factory=StreamStarts)
    _read: tuple[int, bytes] = (-1, b"")
    _holes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @cached_property
    def table_covers(self) -> int:
        """How much of the disk an L2 table maps, in bytes."""
        geometry = self.shape.geometry
        return geometry.l2_entries * geometry.cluster_bytes

    def read(self, index: int) -> bytes:
        """Return an L2 table with entries that an image can have; one that is lost is zeros."""
        length = self.shape.geometry.cluster_bytes
        if not self.offsets[index]:
            return bytes(length)
        table = self.source.pread(length, self.offsets[index])
        if self.fates[index] != Fate.TORN:
            return table
        mended, entry_bytes = bytearray(table), self.shape.codec.entry_bytes
        for first, count in self.lost[index]:
            mended[first * entry_bytes : (first + count) * entry_bytes] = bytes(count * entry_bytes)
        return bytes(mended)

    def read_likely(self, index: int) -> bytes | None:
        """Return what may be a lost table; None where nothing may."""
        if index not in self.likely:
            return None
        offset = self.likely[index][0]
        if self._read[0] != offset:
            self._read = offset, self.source.pread(self.shape.geometry.cluster_bytes, offset)
        return self._read[1]

    def adopt(self, index: int, offset: int, marks: Marks) -> None:
        """Take a table that was found for an L1 entry that was lost, and mark what it names."""
        self.offsets[index], self.fates[index] = offset, Fate.WHOLE
        self.likely.pop(index, None)
        for known in (self.lost, self.beyond, self._holes):
            known.pop(index, None)
        marks.set_structure(offset, self.shape.geometry.cluster_bytes)
        _judge_table(self, index, marks)

    def grow(self, index: int) -> bool:
        """Have an L1 entry, lost as those before it are; return False if the size of the disk is known."""
        if not {"size", "l1_size"} & (self.shape.lost | self.shape.inferred) or index >= MAX_L1_ENTRIES:
            return False
        self.is_l1_damaged = True
        more = index + 1 - len(self.fates)
        self.fates += bytes([Fate.LOST]) * more
        self.offsets.extend([0] * more)
        self.disk_bytes = max(self.disk_bytes, (index + 1) * self.table_covers)
        return True

    def end_at(self, disk_bytes: int) -> None:
        """Have the disk end where it does, after it was taken for larger."""
        self.disk_bytes = disk_bytes
        count = self.shape.geometry.l1_entries_for(disk_bytes)
        del self.fates[count:]
        self.offsets = self.offsets[:count]

    def lose_all(self, entry_count: int) -> None:
        """Take all entries of the L1 table for lost."""
        count = max(entry_count, self.shape.geometry.l1_entries_for(self.disk_bytes))
        self.is_l1_damaged = True
        self.offsets, self.fates = array("Q", bytes(table_bytes(count))), bytearray([Fate.LOST]) * count
        self.damages.append(Damage("L1 table", None, "it is lost", 0, self.disk_bytes))

    def doubt_absent(self) -> int:
        """Take entries of 0 for lost in sectors of the L1 table that have no other; return how many."""
        count = 0
        step = table_entries(SECTOR_BYTES)
        for first in range(0, len(self.fates), step):
            if any(self.fates[first : first + step]):
                continue
            for index in range(first, min(first + step, len(self.fates))):
                self.fates[index] = Fate.LOST
                count += 1
        if count:
            self.is_l1_damaged = True
            meaning = f"{count} entries are 0, and tables are in use that no entry names"
            self.damages.append(Damage("L1 table", None, meaning))
        return count

    def lost_entries(self, index: int) -> list[tuple[int, int]]:
        """Return the (first entry, count) of a table that nobody knows."""
        match self.fates[index]:
            case Fate.TORN:
                return self.lost[index]
            case Fate.LOST:
                return [(0, self.shape.geometry.l2_entries)]
        return []

    def is_absent_sure(self, index: int) -> bool:
        """Return True if an L1 entry of 0 says that there is no table; False if its sector may be wiped."""
        step = table_entries(SECTOR_BYTES)
        first = index - index % step
        return self.are_empty_sure or any(self.fates[first : first + step])

    def holes(self, index: int) -> list[tuple[int, int]]:
        """Return the (first entry, count) of sectors of a table that are zeros: they may have been wiped."""
        found = self._holes.get(index)
        if found is None:
            found = []
            if self.fates[index] in (Fate.WHOLE, Fate.TORN):
                lost = self.lost_entries(index)
                found = [part for part in self._zero_sectors(index) if not _overlaps(part, lost)]
            self._holes[index] = found
        return found

    def _zero_sectors(self, index: int) -> Iterator[tuple[int, int]]:
        kinds = _native.sector_kinds(self.read(index), self.source.size())
        each = SECTOR_BYTES // self.shape.codec.entry_bytes
        for match in _ZERO_SECTORS.finditer(kinds):
            yield match.start() * each, (match.end() - match.start()) * each

    def guest_range(self, index: int) -> tuple[int, int]:
        """Return (offset, length) in bytes of what of the disk an L1 entry maps."""
        start = index * self.table_covers
        return start, max(0, min(self.disk_bytes - start, self.table_covers))


_ZERO_SECTORS = re.compile(bytes([_native.SECTOR_ZERO]) + b"+")


def _overlaps(part: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    return any(first < part[0] + part[1] and part[0] < first + count for first, count in others)


@dataclass
class _Verdict:
    """What became of the L2 table at a host offset, and how often its entries were marked."""

    fate: Fate
    lost: list[tuple[int, int]]
    beyond: list[tuple[int, int]]
    times: int = 1


Known = dict[int, _Verdict]
"""The L2 tables that were judged, by host offset."""


def read_tables(source: Source, shape: Shape, marks: Marks, known: Known | None = None) -> DiskTables:
    """Judge the tables of the active disk, and mark what they name.

    Args:
        source: the file.
        shape: what it is read as.
        marks: of its clusters.
        known: takes the verdicts, for other disks that share tables.

    Raises:
        OSError: the host failed, other than by what it cannot read.
    """
    header = shape.area.header
    tables = DiskTables("disk", header.size, source, shape)
    if "l1_table_offset" in shape.lost:
        tables.lose_all(header.l1_size)
        return tables
    if {"l1_table_offset", "cluster_bits"} & shape.doubtful:
        tables.certainty = Certainty.LIKELY
    judge_all(tables, header.l1_table_offset, header.l1_size, marks, known)
    return tables


def read_snapshot_tables(
    source: Source, shape: Shape, snapshot: Snapshot, marks: Marks, known: Known | None = None
) -> DiskTables:
    """Judge the tables of a snapshot, and mark what they name; of tables in ``known`` that is marked already.

    Raises:
        OSError: the host failed, other than by what it cannot read.
    """
    tables = DiskTables(f"snapshot {snapshot.id}", snapshot.disk_bytes, source, shape)
    entries_max = min(snapshot.l1_size, MAX_L1_ENTRIES)
    judge_all(tables, snapshot.l1_table_offset, entries_max, marks, known)
    return tables


def judge_all(
    tables: DiskTables, l1_offset: int, l1_entries: int, marks: Marks, known: Known | None = None
) -> None:
    """Judge the L2 tables of an L1 table, and then mark what they name; TB3 needs the structures first."""
    known = {} if known is None else known
    needed = min(tables.shape.geometry.l1_entries_for(tables.disk_bytes), MAX_L1_ENTRIES)
    length = table_bytes(max(l1_entries, needed))
    l1_table = tables.source.pread(table_bytes(l1_entries), l1_offset).ljust(length, b"\0")
    marks.set_structure(l1_offset, table_bytes(l1_entries))
    tables.offsets, tables.fates = array("Q", bytes(length)), bytearray(length // table_bytes(1))
    behind = list(_behind_the_end(tables, l1_offset, table_bytes(l1_entries)))
    for start, count in behind:
        first = (start - l1_offset) // table_bytes(1)
        tables.fates[first:l1_entries] = bytes([Fate.LOST]) * (l1_entries - first)
        tables.damages.append(Damage("L1 table", start, f"the file ends {count} bytes before its end"))
    bad = {
        (place - l1_offset) // table_bytes(1)
        for start, count in tables.source.bad.within(l1_offset, table_bytes(l1_entries))
        for place in range(start, start + count, table_bytes(1))
    }
    tables.is_cut_off, tables.is_l1_damaged = bool(behind), bool(behind or bad)
    for index in sorted(bad):
        _lose(tables, index, entry_place(HostOffset(l1_offset), index), "the host cannot read the L1 entry")
    for index, entry in entries.nonzero_entries(l1_table):
        _place_table(tables, index, entry, entry_place(HostOffset(l1_offset), index), marks, known)
    places = {tables.offsets[index] for index in tables.crowded}
    for index, fate in enumerate(tables.fates):
        if fate != Fate.WHOLE:
            continue
        if tables.offsets[index] in places:
            tables.crowded.add(index)
        offset = tables.offsets[index]
        if offset in known:
            _judge_again(tables, index, known[offset], marks)
        else:
            _judge_table(tables, index, marks)
            lost, beyond = tables.lost.get(index, []), tables.beyond.get(index, [])
            known[offset] = _Verdict(Fate(tables.fates[index]), lost, beyond)


def _behind_the_end(tables: DiskTables, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield what of a range the file does not have."""
    end = tables.source.size()
    if offset + length > end:
        yield max(offset, end), offset + length - max(offset, end)


def _place_table(tables: DiskTables, index: int, entry: int, place: int, marks: Marks, known: Known) -> None:
    """Take what an L1 entry says of its L2 table, if that can be."""
    offset, _, has_reserved = entries.split_l1(entry)
    cluster_bytes = tables.shape.geometry.cluster_bytes
    if has_reserved or offset % cluster_bytes or not offset:
        tables.is_l1_damaged = True
        _lose(tables, index, place, f"its L1 entry {entry:#x} is none that an image can have")
    elif offset >= tables.source.size():
        tables.is_cut_off = True
        _lose(tables, index, offset, "the file ends before it")
    else:
        tables.offsets[index] = offset
        tables.fates[index] = Fate.WHOLE
        if not marks.set_structure(offset, cluster_bytes) and offset not in known:
            tables.crowded.add(index)
            tables.damages.append(
                Damage("L2 table", offset, "something else lies there, too", *tables.guest_range(index))
            )


def _judge_again(tables: DiskTables, index: int, verdict: _Verdict, marks: Marks) -> None:
    """Take the verdict on a table that is named once more; what it names is marked twice at most (TB4)."""
    start, covered = tables.guest_range(index)
    if verdict.fate == Fate.LOST:
        _lose(tables, index, tables.offsets[index], "most of it is no L2 table")
        return
    tables.fates[index] = verdict.fate
    if verdict.fate == Fate.TORN:
        tables.lost[index], tables.beyond[index] = verdict.lost, verdict.beyond
        meaning = "some of its entries cannot be"
        tables.damages.append(Damage("L2 table", tables.offsets[index], meaning, start, covered))
    verdict.times += 1
    if verdict.fate in (Fate.WHOLE, Fate.TORN) and verdict.times == MARKED_TIMES:
        _judge_and_mark(tables, tables.read(index), marks)


def _judge_and_mark(tables: DiskTables, table: bytes, marks: Marks) -> None:
    counts = _judge(tables, table, marks)
    for place, count in enumerate(counts):
        tables.counts[place] += count
    if counts[COMPRESSED]:
        tables.streams.take(found.host for found in tables.shape.codec.found(table) if found.length)


def _judge_table(tables: DiskTables, index: int, marks: Marks) -> None:
    """Judge a table, and mark what it names."""
    shape, offset = tables.shape, tables.offsets[index]
    length = shape.geometry.cluster_bytes
    table = tables.source.pread(length, offset)
    behind = list(_behind_the_end(tables, offset, length))
    tables.is_cut_off = tables.is_cut_off or bool(behind)
    unreadable = [*tables.source.bad.within(offset, length), *behind]
    if not unreadable and _native.is_zero(table):
        tables.fates[index] = Fate.EMPTY
        return
    if not unreadable and not _judge(tables, table)[INVALID]:
        _judge_and_mark(tables, table, marks)
        return
    lost = list(_lost_by_sector(tables, table, [(start - offset, count) for start, count in unreadable]))
    is_noise = sum(part.entry_count for part in lost if not part.is_beyond) * 2 > shape.geometry.l2_entries
    if is_noise:
        _lose(tables, index, offset, "most of it is no L2 table")
        return
    tables.fates[index] = Fate.TORN
    tables.lost[index] = [(part.first, part.entry_count) for part in _joined(lost)]
    tables.beyond[index] = [(part.first, part.entry_count) for part in _joined(lost) if part.is_beyond]
    tables.is_cut_off = tables.is_cut_off or bool(tables.beyond[index])
    start, covered = tables.guest_range(index)
    for part in _joined(lost):
        guest_offset = start + part.first * length
        meaning = "the file ends before what they name" if part.is_beyond else "they cannot be"
        tables.damages.append(
            Damage(
                "L2 table",
                offset + part.first * shape.codec.entry_bytes,
                f"{part.entry_count} of its entries are lost: {meaning}",
                guest_offset,
                max(0, min(part.entry_count * length, start + covered - guest_offset)),
            )
        )
    _judge_and_mark(tables, tables.read(index), marks)


class _Lost(NamedTuple):
    """Entries of a table that are lost; ``is_beyond``: as what they name lies past the end of the file."""

    first: int
    entry_count: int
    is_beyond: bool = False


def _joined(lost: list[_Lost]) -> Iterator[_Lost]:
    """Yield the same, neighbours that are lost alike as one."""
    pending: _Lost | None = None
    for part in lost:
        if pending is not None and (pending.first + pending.entry_count, pending.is_beyond) == part[::2]:
            pending = pending._replace(entry_count=pending.entry_count + part.entry_count)
            continue
        if pending is not None:
            yield pending
        pending = part
    if pending is not None:
        yield pending


def _lost_by_sector(tables: DiskTables, table: bytes, unreadable: list[tuple[int, int]]) -> Iterator[_Lost]:
    entry_bytes = tables.shape.codec.entry_bytes
    for start in range(0, len(table), SECTOR_BYTES):
        sector = table[start : start + SECTOR_BYTES]
        first, count = start // entry_bytes, len(sector) // entry_bytes
        if any(place < start + SECTOR_BYTES and start < place + length for place, length in unreadable):
            yield _Lost(first, count)
            continue
        if not _judge(tables, sector)[INVALID]:
            continue
        if _impossible(tables, sector) * 2 > count:
            yield _Lost(first, count)
            continue
        for index in range(count):
            entry = sector[index * entry_bytes : (index + 1) * entry_bytes]
            if _judge(tables, entry)[INVALID]:
                yield _Lost(first + index, 1, is_beyond=not _impossible(tables, entry))


def _impossible(tables: DiskTables, table: bytes) -> int:
    """Return how many entries cannot be, however long the file was."""
    shape = tables.shape
    how = shape.codec.entry_bytes, shape.geometry.cluster_bits, shape.reserved
    return _native.l2_judge(table, *how, LONGEST_BYTES)[INVALID]


def _judge(tables: DiskTables, table: bytes, marks: Marks | None = None) -> tuple[int, ...]:
    shape = tables.shape
    return _native.l2_judge(
        table,
        shape.codec.entry_bytes,
        shape.geometry.cluster_bits,
        shape.reserved,
        tables.source.size(),
        None if marks is None else marks.data,
    )


def _lose(tables: DiskTables, index: int, host_offset: int, reason: str) -> None:
    tables.fates[index] = Fate.LOST
    tables.offsets[index] = 0
    tables.damages.append(Damage("L2 table", host_offset, reason, *tables.guest_range(index)))
