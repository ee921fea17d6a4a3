"""What is damaged, what depends on it, what can be had back and how surely.

DG1. A diagnosis changes nothing, and reads no data but samples, unless the orphans were placed before.
DG2. A list in it is bounded; numbers count everything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from jqcow import _native
from jqcow.salvage.amounts import Amounts, amounts_of, lost_tables
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guestmap import TABLE
from jqcow.salvage.shape import Damage, Damages
from jqcow.salvage.source import LOOK_BYTES, Source
from jqcow.salvage.survey import Survey
from jqcow.salvage.tables import COMPRESSED, DATA, DOUBLED, STRUCTURES, ZERO, DiskTables, Fate

State = Literal["clean", "live", "damaged"]

RANGES_MAX = 1024
"""So many guest ranges are listed."""
SAMPLES = 64
"""So many orphans are looked at."""
EXTENTS_MAX = 4096
"""So many parts of a file that are no hole are counted."""
SHARED = "data cluster"
HARMLESS = ("refcount table", "refcount block", "bitmap directory", "bitmap table", SHARED)
"""Damages that keep nobody from recovering a crashed image: nothing depends on them, or is shared already."""
OVERLAP = "something else lies there, too"
MANY_CLUSTERS, MANY_BYTES = 32, 16 << 20
"""So many orphans with data, or so many bytes of them, are no leak that a crash of another program leaves."""


@dataclass(frozen=True)
class GuestRange:
    """A guest range that depends on what is damaged, and what it is now: ``lost``, or ``in doubt``."""

    offset: int
    length: int
    kind: Literal["lost", "in doubt"]


@dataclass(frozen=True)
class DiskDiagnosis:
    """What can be had back of one disk.

    Attributes:
        name: ``disk``, or ``snapshot`` with its id.
        size: in bytes.
        certain: bytes of data whose place is certain.
        likely: bytes that several facts put there.
        guess: bytes that were left over for the place, or whose cluster holds a structure.
        zero: bytes that read as zeros.
        below: bytes that no table allocates: the backing disk's, zeros without one.
        lost: bytes of which nobody knows.
        ranges: the first of those that are lost or in doubt, by offset.
        range_count: how many there are.
    """

    name: str
    size: int
    certain: int
    likely: int
    guess: int
    zero: int
    below: int
    lost: int
    ranges: tuple[GuestRange, ...]
    range_count: int


@dataclass(frozen=True)
class Step:
    """What to do next: a command, if there is one, why, and about how long it takes."""

    command: str | None
    purpose: str
    seconds: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What `jqcow.diagnose` found out.

    Attributes:
        image: name of the file.
        state: ``damaged`` where something that data depends on is lost; else ``live``, or ``clean``.
        has_live_journal: the image crashed while jqcow wrote to it.
        file_bytes: length of the file.
        stored_bytes: what of that is no hole, about.
        cluster_bytes: size of its clusters.
        inferred: numbers of the header that were lost, and told by the rest of the file.
        damages: what is wrong, the first of it.
        damage_count: how many there are.
        disks: the disk and its snapshots.
        orphan_bytes: of clusters that are in use and that no table names.
        orphans_with_data: the share of them that holds data, by samples; None where there are none.
        may_be_lost: they may belong where a table is empty.
        unreadable_bytes: what the host could not read so far.
        is_deep: the orphans were placed, and the numbers are exact.
        structures: what of the guest was recognised, if ``is_deep``.
        read_bytes_per_second: how fast the host read the samples; None where there were none.
        seconds: of the diagnosis.
    """

    image: str | None
    state: State
    has_live_journal: bool
    file_bytes: int
    stored_bytes: int
    cluster_bytes: int
    inferred: tuple[str, ...]
    damages: tuple[Damage, ...]
    damage_count: int
    disks: tuple[DiskDiagnosis, ...]
    orphan_bytes: int
    orphans_with_data: float | None
    may_be_lost: bool
    unreadable_bytes: int
    is_deep: bool
    structures: tuple[str, ...]
    read_bytes_per_second: float | None
    seconds: float
    steps: tuple[Step, ...] = ()

    @property
    def is_damaged(self) -> bool:
        """True where data depends on what is damaged: nothing is to be changed before it was copied."""
        return self.state == "damaged"


def describe(
    survey: Survey, *, image: str | None, has_live_journal: bool, damages: list[Damage], started: float
) -> Diagnosis:
    """Return what a survey found.

    Args:
        survey: of the file; its orphans may have been placed.
        image: name of the file.
        has_live_journal: the image is live.
        damages: what is wrong besides, as of the journal.
        started: when the diagnosis began, by `time.perf_counter`.
    """
    doubts = Damages()
    disks = tuple(_disk(survey, tables, doubts) for tables in (survey.tables, *survey.snapshot_tables))
    found = [*damages, *survey.damages(), *doubts]
    with_data, speed = _sample(survey)
    cluster_bytes = survey.shape.geometry.cluster_bytes
    orphan_bytes = len(survey.unnamed.bits) * cluster_bytes
    is_damaged = bool(damages) or any(
        each.structure not in HARMLESS and each.meaning != OVERLAP for each in found
    )
    held = orphan_bytes * (with_data or 0)
    is_much = held >= min(MANY_BYTES, MANY_CLUSTERS * cluster_bytes)
    return Diagnosis(
        image=image,
        state="damaged" if is_damaged else "live" if has_live_journal else "clean",
        has_live_journal=has_live_journal,
        file_bytes=survey.source.size(),
        stored_bytes=_stored_bytes(survey.source),
        cluster_bytes=cluster_bytes,
        inferred=tuple(sorted(survey.shape.inferred)),
        damages=tuple(found),
        damage_count=len(found) + doubts.left_out + _left_out(survey),
        disks=disks,
        orphan_bytes=orphan_bytes,
        orphans_with_data=with_data,
        may_be_lost=is_much and _has_hole(survey.tables),
        unreadable_bytes=survey.source.bad.total(),
        is_deep=survey.placed is not None,
        structures=() if survey.placed is None else survey.placed.structures,
        read_bytes_per_second=speed,
        seconds=time.perf_counter() - started,
    )


def _left_out(survey: Survey) -> int:
    lists = [survey.others.damages, survey.unnamed.damages, survey.tables.damages]
    lists += [tables.damages for tables in survey.snapshot_tables]
    return sum(each.left_out for each in lists)


def _has_hole(tables: DiskTables) -> bool:
    """Return True if a table is empty, or a part of one, or an entry of the L1 table before its last."""
    present = tables.fates.rstrip(bytes([Fate.ABSENT]))
    if Fate.EMPTY in tables.fates or Fate.ABSENT in present or not present:
        return True
    return any(tables.holes(index) for index in range(len(present)))


def _disk(survey: Survey, tables: DiskTables, doubts: Damages) -> DiskDiagnosis:
    if tables is not survey.tables:
        return _other_disk(tables)
    has_shared = bool(tables.counts[DOUBLED] or tables.counts[STRUCTURES]) or any(
        each.meaning == OVERLAP for each in (*survey.unnamed.damages, *survey.others.damages, *tables.damages)
    )
    # Counts do not tell how sure tables are, nor where a file was cut off, nor of streams.
    has_shared = has_shared or tables.certainty < Certainty.CERTAIN or tables.is_cut_off
    has_shared = has_shared or bool(tables.streams.twice)
    total, ranges = Amounts() if has_shared else _by_counts(tables), _Listed()
    seen: dict[int, Amounts] = {}
    lost_end = 0
    for index, fate in enumerate(tables.fates):
        if index < lost_end:
            continue
        is_placed = index in survey.guest_map.placed
        if fate == Fate.ABSENT or (fate == Fate.WHOLE and not has_shared and not is_placed):
            continue
        start, length = tables.guest_range(index)
        if count := lost_tables(survey.guest_map, index):
            lost_end = index + count
            length = sum(tables.guest_range(lost_end - 1)) - start
            total.lost += length
            ranges.add(start, length, "lost")
            continue
        offset, is_full = tables.offsets[index], length == tables.table_covers
        part = seen.get(offset) if is_full and not is_placed else None
        if part is None:
            part = amounts_of(survey.guest_map, start, length, has_shared=has_shared)
            if is_full and offset and fate == Fate.WHOLE and not is_placed:
                seen[offset] = part
        if not has_shared:
            # The rest of it is among the counts of all tables.
            certain = _placed_surely(survey, index)
            part = Amounts(likely=part.likely, guess=part.guess, lost=part.lost, certain=certain)
        total.add(part)
        if part.lost or part.likely or part.guess:
            _list_ranges(survey, start, length, ranges, doubts)
    total.below += max(0, tables.disk_bytes - _sum(total))
    total = total.capped(survey.ceiling)
    listed = tuple(ranges.ranges)
    return DiskDiagnosis(
        tables.name, tables.disk_bytes, **vars(total), ranges=listed, range_count=ranges.count
    )


class _Listed:
    """The first ranges of a disk that are lost or in doubt, neighbours as one, and how many there are."""

    def __init__(self) -> None:
        self.ranges: list[GuestRange] = []
        self.count = 0
        self._last: GuestRange | None = None

    @property
    def is_full(self) -> bool:
        """True if no more is listed."""
        return len(self.ranges) >= RANGES_MAX

    def add(self, offset: int, length: int, kind: Literal["lost", "in doubt"]) -> None:
        """Take the next range."""
        last = self._last
        if last is not None and last.kind == kind and last.offset + last.length == offset:
            self._last = GuestRange(last.offset, last.length + length, kind)
            if self.count == len(self.ranges):
                self.ranges[-1] = self._last
            return
        self._last = GuestRange(offset, length, kind)
        self.count += 1
        if not self.is_full:
            self.ranges.append(self._last)


def _by_counts(tables: DiskTables) -> Amounts:
    """Return what the entries of all tables come to; the last cluster of a disk may be cut."""
    cluster_bytes, counts = tables.shape.geometry.cluster_bytes, tables.counts
    cut = -tables.disk_bytes % cluster_bytes
    certain = (counts[DATA] + counts[COMPRESSED]) * cluster_bytes
    return Amounts(certain=max(0, certain - cut) if certain else 0, zero=counts[ZERO] * cluster_bytes)


def _placed_surely(survey: Survey, index: int) -> int:
    placed = survey.guest_map.placed.get(index)
    certain = 0 if placed is None else placed.certainties.count(Certainty.CERTAIN)
    return certain * survey.shape.geometry.cluster_bytes


def _sum(total: Amounts) -> int:
    return sum(vars(total).values())


def _list_ranges(survey: Survey, offset: int, length: int, ranges: _Listed, doubts: Damages) -> None:
    """Take the ranges of a table that are lost or in doubt; where no more are listed, the table for one."""
    if ranges.is_full:
        ranges.add(offset, length, "in doubt")
        return
    for piece in survey.guest_map.pieces(offset, length):
        if piece.kind == "lost":
            ranges.add(piece.guest_offset, piece.length, "lost")
        elif piece.kind != "below" and piece.certainty != Certainty.CERTAIN:
            ranges.add(piece.guest_offset, piece.length, "in doubt")
            if piece.witness.startswith(TABLE):
                meaning = "another guest cluster uses it, too, or a structure does"
                place = piece.guest_offset, piece.length
                doubts.append(Damage(SHARED, piece.host_offset, meaning, *place))


def _other_disk(tables: DiskTables) -> DiskDiagnosis:
    """Tell of a snapshot: what of it is lost, by its damages; how its data is shared is not looked at."""
    lost, ranges = 0, _Listed()
    cluster_bytes = tables.shape.geometry.cluster_bytes
    for index, fate in enumerate(tables.fates):
        if fate not in (Fate.LOST, Fate.TORN):
            continue
        start, covered = tables.guest_range(index)
        for first, count in tables.lost_entries(index):
            length = min(count * cluster_bytes, max(0, covered - first * cluster_bytes))
            lost += length
            if length:
                ranges.add(start + first * cluster_bytes, length, "lost")
    rest, listed = max(0, tables.disk_bytes - lost), tuple(ranges.ranges)
    return DiskDiagnosis(
        tables.name, tables.disk_bytes, rest, 0, 0, 0, 0, lost, ranges=listed, range_count=ranges.count
    )


def _sample(survey: Survey) -> tuple[float | None, float | None]:
    """Return the share of orphans that hold data, and how fast the host reads; by samples."""
    bits, source = survey.unnamed.bits, survey.source
    cluster_bits = survey.shape.geometry.cluster_bits
    looked = held = read = 0
    started = time.perf_counter()
    for number in range(SAMPLES):
        first = bits.cluster_count * number // SAMPLES
        stop = bits.cluster_count * (number + 1) // SAMPLES
        cluster = _native.refcount_find_used(bits.data, 0, first, stop)
        if cluster < 0:
            continue
        length = min(1 << cluster_bits, 64 << 10)
        looked += 1
        data = source.pread(length, cluster << cluster_bits)
        held += not _native.is_zero(data)
        read += length
    for number in range(4):
        offset, length = _some_data(source, number)
        source.pread(length, offset)
        read += length
    seconds = max(1e-6, time.perf_counter() - started)
    return (held / looked if looked else None), (read / seconds if read else None)


def _stored_bytes(source: Source) -> int:
    """Return how much of a file is no hole; of one with many holes what its beginning lets expect."""
    stored = end = 0
    for number, (offset, length) in enumerate(source.data_extents(0, source.size())):
        stored, end = stored + length, offset + length
        if number >= EXTENTS_MAX:
            return stored * source.size() // end
    return stored


def _some_data(source: Source, number: int) -> tuple[int, int]:
    """Return a range that holds data, somewhere in the file."""
    offset = source.size() * number // 4
    for start, length in source.data_extents(offset, source.size() - offset):
        return start, min(length, LOOK_BYTES)
    return 0, 0
