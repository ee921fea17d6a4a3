"""How much of a disk can be had back, and how surely: counted over whole tables, never cluster by cluster."""

from __future__ import annotations

from dataclasses import dataclass, fields

from jqcow import _native
from jqcow.ondisk import entries
from jqcow.ondisk.layout import table_bytes
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guestmap import GuestMap, Open, Piece
from jqcow.salvage.tables import COMPRESSED, DATA, UNALLOCATED, ZERO, Fate

TABLES_AT_ONCE = 1 << 16
"""So many lost tables are counted together: an L1 table may name millions."""


@dataclass
class Amounts:
    """Bytes of a disk.

    Attributes:
        certain: data whose place is certain.
        likely: data that several facts put there.
        guess: data that was left over for the place.
        zero: what reads as zeros.
        below: what no table allocates: the backing disk's, zeros without one.
        lost: nobody knows.
    """

    certain: int = 0
    likely: int = 0
    guess: int = 0
    zero: int = 0
    below: int = 0
    lost: int = 0

    def add(self, other: Amounts) -> None:
        """Add what another part of the disk comes to."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def take(self, kind: str, certainty: Certainty, length: int) -> None:
        """Add a piece."""
        name = certainty.name.lower() if kind in ("data", "compressed") else kind
        setattr(self, name, getattr(self, name) + length)

    def capped(self, ceiling: Certainty) -> Amounts:
        """Return the same where nothing is surer than ``ceiling``."""
        found = Amounts(**{each.name: getattr(self, each.name) for each in fields(self)})
        if ceiling < Certainty.CERTAIN:
            found.certain, found.likely = 0, self.certain + self.likely
        if ceiling < Certainty.LIKELY:
            found.likely, found.guess = 0, found.likely + self.guess
        return found


def certainty_of(piece: Piece, ceiling: Certainty) -> Certainty:
    """Return how sure a piece is where nothing is surer than ``ceiling``."""
    return min(piece.certainty, ceiling)


def amounts_of(guest_map: GuestMap, offset: int, length: int, *, has_shared: bool = True) -> Amounts:
    """Return what a guest range comes to.

    Args:
        guest_map: of the disk.
        offset: of the range.
        length: of the range.
        has_shared: look for clusters that have another use, too.
    """
    found, end = Amounts(), min(offset + length, guest_map.size)
    covers = guest_map.tables.table_covers
    while offset < end:
        index = offset // covers
        stop = min(end, (index + 1) * covers)
        fate = guest_map.tables.fates[index] if index < len(guest_map.tables.fates) else Fate.ABSENT
        if fate == Fate.ABSENT:
            absent_end = _absent_end(guest_map, index, end)
            found.below += absent_end - offset
            offset = absent_end
            continue
        lost_count = lost_tables(guest_map, index)
        if lost_count:
            lost_end = min(end, (index + lost_count) * covers)
            found.lost += lost_end - offset
            offset = lost_end
            continue
        found.add(_of_table(guest_map, index, offset, stop, has_shared=has_shared))
        offset = stop
    return found


def lost_tables(guest_map: GuestMap, index: int) -> int:
    """Return how many tables from an L1 entry on are lost and have had nothing back, so many at a time."""
    tables, placed = guest_map.tables, guest_map.placed
    if tables.fates[index] != Fate.LOST:
        return 0
    fates = tables.fates[index : index + TABLES_AT_ONCE]
    count = len(fates) - len(fates.lstrip(bytes([Fate.LOST])))
    if not placed and not tables.likely:
        return count
    run = range(index, index + count)
    return next((at - index for at in run if at in placed or at in tables.likely), count)


def _absent_end(guest_map: GuestMap, index: int, end: int) -> int:
    """Return up to where no table is, from an L1 entry on, and at most to ``end``."""
    covers = guest_map.tables.table_covers
    fates = guest_map.tables.fates[index : -(-end // covers)]
    count = len(fates) - len(fates.lstrip(bytes([Fate.ABSENT])))
    return end if count == len(fates) else min(end, (index + count) * covers)


def _of_table(guest_map: GuestMap, index: int, start: int, end: int, *, has_shared: bool) -> Amounts:
    """Return what the part of a table comes to; parts of clusters are looked at one by one."""
    cluster_bytes = guest_map.tables.shape.geometry.cluster_bytes
    first, last = -(-start // cluster_bytes), end // cluster_bytes
    found = Amounts()
    if (
        index in guest_map.tables.likely
        or _names_the_cut(guest_map, index)
        or guest_map.has_shared_streams(index)
    ):
        for piece in guest_map.pieces(start, end - start):
            found.take(piece.kind, piece.certainty, piece.length)
        return found
    whole = first * cluster_bytes, max(first, last) * cluster_bytes
    parts = [(start, min(end, whole[0])), (max(start, whole[1]), end)] if first <= last else [(start, end)]
    for part_start, part_end in parts:
        for piece in guest_map.pieces(part_start, max(0, part_end - part_start)):
            found.take(piece.kind, piece.certainty, piece.length)
    if first < last:
        base = index * guest_map.tables.shape.geometry.l2_entries
        found.add(_of_known_entries(guest_map, index, first - base, last - base, has_shared=has_shared))
    return found


def _of_known_entries(guest_map: GuestMap, index: int, first: int, stop: int, *, has_shared: bool) -> Amounts:
    """Return what entries of a table come to; one that the L1 table names again and again is counted once."""
    tables = guest_map.tables
    if index in guest_map.placed or tables.fates[index] != Fate.WHOLE:
        return _of_entries(guest_map, index, first, stop, has_shared=has_shared)
    how = has_shared, index in tables.crowded, tables.are_empty_sure
    key = tables.offsets[index], first, stop, *how
    if guest_map.counted[0] != key:
        counted = _of_entries(guest_map, index, first, stop, has_shared=has_shared)
        guest_map.counted = key, counted
    known = guest_map.counted[1]
    return known if isinstance(known, Amounts) else Amounts()


def _names_the_cut(guest_map: GuestMap, index: int) -> bool:
    """Return True if a table may name the cluster within which a file was cut off."""
    tables, source = guest_map.tables, guest_map.tables.source
    within = source.size() % tables.shape.geometry.cluster_bytes
    if not tables.is_cut_off or not within or tables.fates[index] not in (Fate.WHOLE, Fate.TORN):
        return False
    table, last = tables.read(index), source.size() - within
    words = bytearray(table_bytes(2))
    for place, copied in enumerate((True, False)):
        entries.put_entry(words, place, entries.l1_entry(last, copied=copied))
    return words[: table_bytes(1)] in table or words[table_bytes(1) :] in table


def _of_entries(guest_map: GuestMap, index: int, first: int, stop: int, *, has_shared: bool) -> Amounts:
    tables, found = guest_map.tables, Amounts()
    cluster_bytes, entry_bytes = tables.shape.geometry.cluster_bytes, tables.shape.codec.entry_bytes
    placed, unknown, replaced = guest_map.placed.get(index), 0, 0
    for part, why in guest_map.open_parts(index):
        start, end = max(first, part.start), min(stop, part.stop)
        if start >= end:
            continue
        certainties = placed.certainties[start:end] if placed is not None else b""
        for certainty in Certainty:
            number = certainties.count(certainty)
            found.take("data", certainty, number * cluster_bytes)
        if why == Open.SHARED:
            replaced += len(certainties) - certainties.count(0)
            continue
        unknown += end - start
        nobody = end - start - (len(certainties) - certainties.count(0))
        kind = "below" if why in (Open.EMPTY, Open.HOLE) else "lost"
        found.take(kind, Certainty.GUESS, nobody * cluster_bytes)
    if unknown == stop - first:
        return found
    table = memoryview(tables.read(index))[first * entry_bytes : stop * entry_bytes]
    counts = _native.l2_judge(
        table, entry_bytes, guest_map.marks.cluster_bits, tables.shape.reserved, tables.source.size()
    )
    many = structures = 0
    if has_shared:
        many, structures = _native.l2_shared(
            table, entry_bytes, guest_map.marks.cluster_bits, guest_map.marks.data
        )
    sure = min(tables.certainty, Certainty.LIKELY) if index in tables.crowded else tables.certainty
    named = counts[DATA] + counts[COMPRESSED] - replaced
    many = max(0, many - replaced)
    found.take("data", sure, (named - many - structures) * cluster_bytes)
    found.likely += many * cluster_bytes
    found.guess += structures * cluster_bytes
    found.zero += counts[ZERO] * cluster_bytes
    # What is lost of a torn table reads as unallocated, and holes are.
    found.below += (counts[UNALLOCATED] - unknown) * cluster_bytes
    return found
