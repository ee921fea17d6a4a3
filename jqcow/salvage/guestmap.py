"""What a guest's disk consists of: what its tables say, and what evidence puts where they are lost.

GM1. Where a table is whole, nothing else is believed. Evidence fills what is lost, and nothing more. As long
    as there is data whose place nobody knows, what sectors of zeros in tables say is not certain.
GM2. A host cluster that several guest ranges of the disk name, or in which a structure lies, is right for one
    of them at most: none of them is certain. Nor is anything that a table says which is named twice.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal, NamedTuple

from jqcow import _native
from jqcow.ondisk.entries import split_l1
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, ZERO_CLUSTER
from jqcow.salvage.evidence import Certainty, Placement
from jqcow.salvage.marks import MANY, STRUCTURE, Marks
from jqcow.salvage.packed import PackedPlaces
from jqcow.salvage.tables import DiskTables, Fate

Kind = Literal["data", "compressed", "zero", "below", "lost"]

_FATES_AT_ONCE, _TABLES_KEPT = 4096, 8
TABLE = "L2 table"
"""The witness of what a table says."""
SHARED = f"{TABLE}, for a cluster that has another use, too"


class Piece(NamedTuple):
    """A guest range that has one story.

    Attributes:
        guest_offset: of the range on the disk, in bytes.
        length: of the range in bytes.
        kind: ``data``: the bytes lie in the file; ``compressed``: a cluster of them does; ``zero``;
            ``below``: the backing disk's, zeros without one; ``lost``: nobody knows.
        host_offset: of the bytes in the file; of compressed data its first byte.
        stored_bytes: of a compressed cluster, how far its data may reach; else 0.
        certainty: how surely; of what is lost GUESS.
        witness: who says so.
    """

    guest_offset: int
    length: int
    kind: Kind
    host_offset: int
    stored_bytes: int
    certainty: Certainty
    witness: str

    @property
    def end(self) -> int:
        """The guest offset behind the range."""
        return self.guest_offset + self.length


class Open(Enum):
    """Why evidence may say what lies at an entry of a table."""

    LOST = auto()
    EMPTY = auto()
    """Its table is all zeros: it may have been emptied by what damaged the file."""
    HOLE = auto()
    """Its sector of the table is all zeros: it may have been, too, but most holes are holes."""
    BEYOND = auto()
    """It names what lies past the end of the file: it is gone, unless something knows better."""
    SHARED = auto()
    """It names a cluster that has another use, too: what is certain of another one knows better."""


_KNOWN: dict[Open, int] = {
    Open.LOST: 0,
    Open.EMPTY: 0,
    Open.HOLE: Certainty.GUESS,
    Open.BEYOND: Certainty.LIKELY,
    Open.SHARED: Certainty.LIKELY,
}
"""What has to be surer than this to be believed."""


class OpenPart(NamedTuple):
    """Entries of a table that may be placed, and why."""

    entries: range
    why: Open


class _Uses(NamedTuple):
    """What entries of a table share.

    Attributes:
        twice: where compressed data starts that other entries name, too.
        has_shared: one names a cluster that has another use, too.
    """

    twice: frozenset[int]
    has_shared: bool


@dataclass
class PlacedEntries:
    """What evidence says of the entries of an L2 table that is lost, wholly or in part.

    Attributes:
        hosts: the host offset of each guest cluster's data; 0 where nothing is placed.
        stored: how far compressed data may reach that starts there; 0 where it is not compressed.
        certainties: a `Certainty` for each; 0 where nothing is placed.
        witnesses: an index into the map's witnesses for each.
    """

    hosts: array[int]
    stored: array[int]
    certainties: bytearray
    witnesses: bytearray

    @classmethod
    def none(cls, count: int) -> PlacedEntries:
        """Return ``count`` entries of which nothing is known."""
        return cls(array("Q", [0]) * count, array("I", [0]) * count, bytearray(count), bytearray(count))


@dataclass
class GuestMap:
    """The map of one disk.

    Attributes:
        tables: what the file has.
        marks: what names each cluster.
        placed: what evidence says, by L1 index.
        counted: which table's entries were counted last, and what they come to (`jqcow.salvage.amounts`).
        opens_shared: entries that name clusters with another use may be placed: something knows all content.
        packed: which compressed clusters are meant by placements behind the end of the file.
    """

    tables: DiskTables
    marks: Marks
    placed: dict[int, PlacedEntries] = field(default_factory=dict)
    opens_shared: bool = False
    packed: PackedPlaces | None = None
    counted: tuple[object, object] = ((), None)
    _witnesses: list[str] = field(default_factory=list)
    _known_uses: dict[tuple[bytes, int], _Uses] = field(default_factory=dict)
    _open: dict[int, tuple[tuple[int, bool, bool], list[OpenPart]]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Size of the disk in bytes."""
        return self.tables.disk_bytes

    def is_open(self, guest_offset: int) -> bool:
        """Return True if what lies at a guest offset is lost, and may be placed."""
        index, entry = self._entry_of(guest_offset)
        return index < len(self.tables.fates) and self._how_open(index, entry) is not None

    def _how_open(self, index: int, entry: int) -> Open | None:
        """Return why an entry may be placed; None if it may not."""
        if self.tables.fates[index] == Fate.ABSENT:
            return None
        parts = self.open_parts(index)
        place = bisect_right(parts, entry, key=lambda part: part.entries.start) - 1
        return parts[place].why if place >= 0 and entry in parts[place].entries else None

    def open_parts(self, index: int) -> list[OpenPart]:
        """Return which entries of a table may be placed, and why, in their order."""
        tables = self.tables
        known = tables.fates[index], self._may_be_wiped(index), self.opens_shared
        if index not in self._open or self._open[index][0] != known:
            self._open[index] = known, list(self._find_open(index))
        return self._open[index][1]

    def _may_be_wiped(self, index: int) -> bool:
        """Return True if zeros in a table may be wiped, or were: what was placed there is placed."""
        return not self.tables.are_empty_sure or index in self.placed

    def _find_open(self, index: int) -> Iterator[OpenPart]:
        tables, every = self.tables, range(self.tables.shape.geometry.l2_entries)
        if tables.fates[index] == Fate.LOST:
            yield OpenPart(every, Open.LOST)
            return
        if tables.fates[index] == Fate.EMPTY:
            yield from (OpenPart(every, Open.EMPTY),) if self._may_be_wiped(index) else ()
            return
        beyond = set(tables.beyond.get(index, ()))
        found = [
            (first, count, Open.BEYOND if (first, count) in beyond else Open.LOST)
            for first, count in tables.lost_entries(index)
        ]
        if self._may_be_wiped(index):
            found += [(first, count, Open.HOLE) for first, count in tables.holes(index)]
        if self.opens_shared:
            found += [(first, count, Open.SHARED) for first, count in self._shared_entries(index)]
        for first, count, why in sorted(found, key=lambda part: part[0]):
            yield OpenPart(range(first, first + count), why)

    def _shared_entries(self, index: int) -> Iterator[tuple[int, int]]:
        """Yield (first, count) of the entries of a table that name clusters with another use, too."""
        tables, table = self.tables, self.tables.read(index)
        bits, entry_bytes = tables.shape.geometry.cluster_bits, tables.shape.codec.entry_bytes
        if not any(_native.l2_shared(memoryview(table), entry_bytes, bits, self.marks.data)):
            return
        for piece in self._as_table_says(table, 0, 0, tables.table_covers, Certainty.CERTAIN):
            if piece.kind == "data" and piece.certainty < Certainty.CERTAIN:
                first = piece.guest_offset >> bits
                yield first, (piece.end - 1 >> bits) - first + 1

    def is_placed(self, guest_offset: int) -> bool:
        """Return True if what lies at a guest offset is known, if not with certainty: nothing is missed."""
        index, entry = self._entry_of(guest_offset)
        placed = self.placed.get(index)
        if placed is not None and placed.certainties[entry]:
            return True
        if index < len(self.tables.fates) and self._how_open(index, entry) in (Open.BEYOND, Open.SHARED):
            return True
        return self._is_likely(index, entry) and self.tables.likely[index][1] > Certainty.GUESS

    def _is_likely(self, index: int, entry: int) -> bool:
        """Return True if what may be the table of a lost L1 entry says something of one of its entries."""
        table = self.tables.read_likely(index)
        if table is None:
            return False
        entry_bytes = self.tables.shape.codec.entry_bytes
        return not _native.is_zero(table[entry * entry_bytes : (entry + 1) * entry_bytes])

    def place(self, placement: Placement) -> bool:
        """Take over where a whole cluster belongs; return False if something surer is there, or a table.

        Args:
            placement: of one guest cluster; its guest offset is a multiple of the cluster's length.
        """
        index, entry = self._entry_of(placement.guest_offset)
        why = self._how_open(index, entry) if index < len(self.tables.fates) else None
        if why is None:
            return False
        placed = self.placed.get(index)
        if placed is None:
            placed = self.placed[index] = PlacedEntries.none(self.tables.shape.geometry.l2_entries)
        known = placed.certainties[entry] or _KNOWN[why]
        if not known and self._is_likely(index, entry):
            known = self.tables.likely[index][1]
        if known >= placement.certainty:
            return False
        if placement.witness not in self._witnesses:
            self._witnesses.append(placement.witness)
        stream = None if self.packed is None else self.packed.at(placement.host_offset)
        placed.hosts[entry], placed.stored[entry] = stream or (placement.host_offset, 0)
        placed.certainties[entry] = placement.certainty
        placed.witnesses[entry] = min(255, self._witnesses.index(placement.witness))
        return True

    def doubt(self) -> None:
        """Have nothing that evidence placed be certain: it rests on what was supposed."""
        lowered = bytes(min(certainty, Certainty.LIKELY) for certainty in range(256))
        for placed in self.placed.values():
            placed.certainties = placed.certainties.translate(lowered)

    def _entry_of(self, guest_offset: int) -> tuple[int, int]:
        geometry = self.tables.shape.geometry
        return divmod(guest_offset // geometry.cluster_bytes, geometry.l2_entries)

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Yield what a guest range consists of, in order, without gaps."""
        end = min(offset + length, self.size)
        while offset < end:
            index = offset // self.tables.table_covers
            stop = self._absent_end(index, end) or min(end, (index + 1) * self.tables.table_covers)
            yield from self._of_table(index, offset, stop)
            offset = stop

    def _absent_end(self, index: int, end: int) -> int:
        """Return how far there is no table from an L1 entry on, at most up to ``end``; 0 if there is one."""
        fates, covers = self.tables.fates, self.tables.table_covers
        if index < len(fates) and fates[index] != Fate.ABSENT:
            return 0
        for first in range(index, len(fates), _FATES_AT_ONCE):
            some = fates[first : first + _FATES_AT_ONCE]
            count = len(some) - len(some.lstrip(bytes([Fate.ABSENT])))
            if count < len(some):
                return min(end, (first + count) * covers)
        return end

    def _of_table(self, index: int, start: int, end: int) -> Iterator[Piece]:
        tables = self.tables
        fate = tables.fates[index] if index < len(tables.fates) else Fate.ABSENT
        if fate == Fate.ABSENT:
            sure = tables.certainty
            if not tables.is_absent_sure(index):
                sure = min(sure, Certainty.LIKELY)
            yield Piece(start, end - start, "below", 0, 0, sure, "L1 table")
            return
        first_offset = index * tables.table_covers
        cluster_bytes = tables.shape.geometry.cluster_bytes
        table = b"" if fate == Fate.LOST else tables.read(index)
        position = start
        for entries, why in self.open_parts(index):
            open_start = max(start, first_offset + entries.start * cluster_bytes)
            open_end = min(end, first_offset + entries.stop * cluster_bytes)
            if open_start >= open_end:
                continue
            if position < open_start:
                said = self._as_table_says(table, first_offset, position, open_start, tables.certainty)
                yield from self._as_is_sure(index, said)
            yield from self._as_placed(index, first_offset, open_start, open_end, why)
            position = open_end
        if position < end:
            said = self._as_table_says(table, first_offset, position, end, tables.certainty)
            yield from self._as_is_sure(index, said)

    def _as_is_sure(self, index: int, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Yield pieces by a table, which are not certain where something else lies in its place."""
        if index not in self.tables.crowded:
            yield from pieces
            return
        for piece in pieces:
            yield piece._replace(
                certainty=min(piece.certainty, Certainty.LIKELY),
                witness=f"{TABLE}, which has another use, too",
            )

    def _as_table_says(
        self, table: bytes, first_offset: int, start: int, end: int, sure: Certainty
    ) -> Iterator[Piece]:
        """Yield the pieces of [start, end) by a table that maps the disk from ``first_offset`` on."""
        codec = self.tables.shape.codec
        unit = codec.subcluster_bytes
        while start < end:
            position, skipped = divmod(start - first_offset, unit)
            limit = -(-(end - first_offset) // unit) - position
            run = codec.run(table, position, limit)
            length = min(end - start, run.subcluster_count * unit - skipped)
            if run.kind == DATA:
                yield from self._data(start, length, run.host + skipped, sure)
            elif run.kind == COMPRESSED_CLUSTER:
                is_shared = run.host in self._uses(table).twice
                certainty = min(sure, Certainty.LIKELY) if is_shared else sure
                witness = SHARED if is_shared else TABLE
                yield Piece(start, length, "compressed", run.host, run.length, certainty, witness)
            else:
                kind: Kind = "zero" if run.kind == ZERO_CLUSTER else "below"
                whole = Piece(start, length, kind, 0, 0, sure, TABLE)
                if self.tables.shape.geometry.has_subclusters and self._uses(table).has_shared:
                    yield from self._without_data(whole, table, first_offset)
                else:
                    yield whole
            start += length

    def _without_data(self, piece: Piece, table: bytes, first_offset: int) -> Iterator[Piece]:
        """Yield where entries have no data; where their cluster has another use, too, that is not certain."""
        bits, entry_bytes = self.marks.cluster_bits, self.tables.shape.codec.entry_bytes
        start = piece.guest_offset
        while start < piece.end:
            position = (start - first_offset) >> bits
            stop = min(piece.end, first_offset + (position + 1 << bits))
            host = split_l1(int.from_bytes(table[position * entry_bytes :][:8], "big"))[0]
            part = piece._replace(guest_offset=start, length=stop - start)
            if host and self.marks.of(host >> bits) in (MANY, STRUCTURE):
                part = part._replace(certainty=min(piece.certainty, Certainty.LIKELY), witness=SHARED)
            yield part
            start = stop

    def has_shared_streams(self, index: int) -> bool:
        """Return True if a table names compressed data that another entry names, too."""
        return bool(self.tables.streams.twice and self._uses(self.tables.read(index)).twice)

    def _uses(self, table: bytes) -> _Uses:
        known = table, len(self.tables.streams.twice)
        if known not in self._known_uses:
            if len(self._known_uses) >= _TABLES_KEPT:
                self._known_uses.clear()
            codec = self.tables.shape.codec
            starts = Counter(found.host for found in codec.found(table) if found.length)
            shared = _native.l2_shared(table, codec.entry_bytes, self.marks.cluster_bits, self.marks.data)
            twice = {start for start, count in starts.items() if count > 1}
            twice |= self.tables.streams.twice & starts.keys()
            self._known_uses[known] = _Uses(frozenset(twice), any(shared))
        return self._known_uses[known]

    def _data(self, guest_offset: int, length: int, host_offset: int, sure: Certainty) -> Iterator[Piece]:
        """Yield a run of data, parted where its clusters are marked otherwise."""
        bits, marks, file_bytes = self.marks.cluster_bits, self.marks, self.tables.source.size()
        end = guest_offset + length
        while guest_offset < end:
            if self.tables.is_cut_off and host_offset + end - guest_offset > file_bytes:
                kept = max(0, file_bytes - host_offset)
                if not kept:
                    yield Piece(guest_offset, end - guest_offset, "lost", 0, 0, Certainty.GUESS, "nobody")
                    return
                yield from self._data(guest_offset, kept, host_offset, sure)
                guest_offset, host_offset = guest_offset + kept, host_offset + kept
                continue
            cluster = host_offset >> bits
            stop = ((host_offset + end - guest_offset - 1) >> bits) + 1
            mark, count = _native.refcount_run(marks.data, _native.MARK_ORDER, cluster, stop)
            taken = min(end - guest_offset, (cluster + count << bits) - host_offset)
            certainty, witness = sure, TABLE
            if mark in (MANY, STRUCTURE):
                certainty = min(sure, Certainty.LIKELY if mark == MANY else Certainty.GUESS)
                witness = SHARED
            yield Piece(guest_offset, taken, "data", host_offset, 0, certainty, witness)
            guest_offset += taken
            host_offset += taken

    def _as_placed(self, index: int, first_offset: int, start: int, end: int, why: Open) -> Iterator[Piece]:
        """Yield what evidence says of [start, end), which is open: see `Open`."""
        placed = self.placed.get(index)
        cluster_bytes = self.tables.shape.geometry.cluster_bytes
        while start < end:
            entry, skipped = divmod(start - first_offset, cluster_bytes)
            length = min(end - start, cluster_bytes - skipped)
            if placed is None or not placed.certainties[entry]:
                # Neighbours of which nothing is known are one piece.
                if placed is None:
                    length = end - start
                else:
                    following = placed.certainties[entry + 1 :]
                    count = len(following) - len(following.lstrip(b"\0"))
                    length = min(end - start, length + count * cluster_bytes)
                likely = self.tables.read_likely(index)
                if why == Open.SHARED:
                    said = self._as_table_says(
                        self.tables.read(index), first_offset, start, start + length, self.tables.certainty
                    )
                    yield from self._as_is_sure(index, said)
                elif why == Open.HOLE or (why == Open.EMPTY and self.tables.are_empty_sure):
                    sure = self.tables.certainty
                    if not self.tables.are_empty_sure:
                        sure = min(sure, Certainty.LIKELY)
                    yield Piece(start, length, "below", 0, 0, sure, TABLE)
                elif likely is not None:
                    sure = self.tables.likely[index][1]
                    yield from self._as_table_says(likely, first_offset, start, start + length, sure)
                else:
                    kind: Kind = "below" if why == Open.EMPTY else "lost"
                    yield Piece(start, length, kind, 0, 0, Certainty.GUESS, "nobody")
            else:
                certainty = Certainty(placed.certainties[entry])
                witness = self._witnesses[placed.witnesses[entry]]
                host, stored = placed.hosts[entry], placed.stored[entry]
                if stored:
                    yield Piece(start, length, "compressed", host, stored, certainty, witness)
                else:
                    yield Piece(start, length, "data", host + skipped, 0, certainty, witness)
            start += length
