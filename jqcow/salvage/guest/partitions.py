"""Partition tables: MBR with logical partitions, and GPT at both ends of the disk.

PT1. A table among the orphans is certain only if it agrees with the size of the disk: a GPT header names the
    last sector; of boot records, one alone has partitions that end where the disk does. A file of the
    guest may hold the image of another disk, whose tables are as right as these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from jqcow.salvage.evidence import Certainty, Orphans, PlacedDisk, Volume
from jqcow.salvage.guest.opaque import Opaque, Part
from jqcow.salvage.guest.partition_layout import (
    BOOT_MAGIC,
    BOOT_MAGIC_OFFSET,
    FIRST_LOGICAL,
    GPT_MAGIC,
    LOGICAL_MAX,
    PROTECTIVE,
    SECTOR_BYTES,
    SECTOR_SIZES,
    BootEntry,
    GptHeader,
    overlap,
    unpack_boot_record,
)
from jqcow.salvage.guest.signs import Sighting, Sign, SurveyedOrphans, sightings

GPT_SIGN = Sign(GPT_MAGIC, 0, 24 << 10)
BOOT_SIGN = Sign(BOOT_MAGIC, BOOT_MAGIC_OFFSET, SECTOR_BYTES)
END_SLACK_BYTES = 2 << 20
"""Partitions are aligned: so much of a disk may be left at its end."""


class PartitionTable(Opaque):
    """A partition table.

    Attributes:
        volumes: that it names.
        parts: that it consists of; the first is that of the first sectors.
    """

    def __init__(self, kind: str, volumes: list[Volume], parts: list[Part]) -> None:
        super().__init__(kind, "the disk", parts, [])
        self.volumes = volumes
        self.parts = parts


@dataclass(frozen=True)
class _SeenHeader:
    """A GPT header with what follows of it."""

    header: GptHeader
    sector_bytes: int
    entries: bytes
    sighting: Sighting | None

    @property
    def disk_bytes(self) -> int:
        return self.header.disk_bytes(self.sector_bytes)


def find(disk: PlacedDisk, orphans: Orphans) -> Iterator[PartitionTable]:
    """Yield the partition tables of the disk: one, if it is known which; the likeliest first."""
    table = _gpt_on_disk(disk, orphans) or _gpt_among(disk, orphans)
    if table is None:
        table = _boot_table(disk, orphans)
    if table is not None:
        yield table


def disk_sizes(orphans: Orphans) -> list[int]:
    """Return the sizes in bytes that GPT headers among orphans give their disk, the best attested first.

    Several are there where files of the guest hold images of disks, or the disk was resized; its own is
    then mostly the largest, which comes first of those that are attested alike.
    """
    sizes = Counter(seen.disk_bytes for seen in _seen_headers(orphans))
    return sorted(sizes, key=lambda size: (sizes[size], size), reverse=True)


def size_by_partitions(disk_bytes: int, sectors: Iterable[bytes], orphans: Orphans) -> int | None:
    """Return the size of a disk whose own is lost, in bytes, by its GPT; None without one.

    Args:
        disk_bytes: so long the disk is at least.
        sectors: those in which the first header may be, of each length of sectors.
        orphans: where headers are looked for then.
    """
    for sector_bytes, sector in zip(SECTOR_SIZES, sectors, strict=True):
        header = GptHeader.unpack(sector)
        if header is not None and header.is_primary and header.disk_bytes(sector_bytes) >= disk_bytes:
            return header.disk_bytes(sector_bytes)
    sizes = disk_sizes(SurveyedOrphans(orphans, (GPT_SIGN,)))
    return next((size for size in sizes if size >= disk_bytes), None)


def _gpt_on_disk(disk: PlacedDisk, orphans: Orphans) -> PartitionTable | None:
    for sector_bytes in SECTOR_SIZES:
        for place in (sector_bytes, disk.size - sector_bytes):
            data = disk.read(place, SECTOR_BYTES) if place > 0 else None
            header = None if data is None else GptHeader.unpack(data)
            if header is None or header.lba * sector_bytes != place:
                continue
            seen = _SeenHeader(header, sector_bytes, _entries_on_disk(header, sector_bytes, disk), None)
            others = [
                other
                for other in _seen_headers(orphans)
                if other.header.guid == header.guid and other.header.lba == header.other_lba
            ]
            return _gpt([seen, *others], Certainty.CERTAIN)
    return None


def _entries_on_disk(header: GptHeader, sector_bytes: int, disk: PlacedDisk) -> bytes:
    """Return the entries; zeros where they are not placed, as most are: their checksum tells."""
    start = header.entries_lba * sector_bytes
    places = range(start, start + header.entries_length, SECTOR_BYTES)
    sectors = (disk.read(place, SECTOR_BYTES) or bytes(SECTOR_BYTES) for place in places)
    return b"".join(sectors)[: header.entries_length]


def _gpt_among(disk: PlacedDisk, orphans: Orphans) -> PartitionTable | None:
    everything = _seen_headers(orphans)
    fitting = [seen for seen in everything if seen.disk_bytes == disk.size]
    guids = {seen.header.guid for seen in fitting or everything}
    if len(guids) != 1:
        return None
    return _gpt(fitting or everything, Certainty.CERTAIN if fitting else Certainty.LIKELY)


def _seen_headers(orphans: Orphans) -> list[_SeenHeader]:
    found = []
    for sighting in sightings(orphans, GPT_SIGN):
        header = GptHeader.unpack(sighting.read(orphans, 0, SECTOR_BYTES))
        if header is None:
            continue
        tried = [_entries_of(header, size, sighting, orphans) for size in SECTOR_SIZES]
        read = [pair for pair in zip(SECTOR_SIZES, tried, strict=True) if pair[1]]
        sector_bytes, entries = read[0] if read else (SECTOR_BYTES, b"")
        found.append(_SeenHeader(header, sector_bytes, entries, sighting))
    return found


def _entries_of(header: GptHeader, sector_bytes: int, sighting: Sighting, orphans: Orphans) -> bytes:
    """Return the entries beside a header; b"" if their checksum is wrong, or they are not there."""
    distance = (header.entries_lba - header.lba) * sector_bytes
    length = header.entries_length
    here = orphans.cluster_bytes - (sighting.start + distance) % max(orphans.cluster_bytes, 1)
    followed = sighting.in_file(orphans.cluster_bytes)
    for seen, count in ((followed, length), (sighting, length), (sighting, min(here, length))):
        data = seen.read(orphans, distance, count)
        data += bytes(length - len(data))
        if any(True for _ in header.partitions(data)):
            return data
    return b""


def _gpt(headers: list[_SeenHeader], certainty: Certainty) -> PartitionTable:
    parts: list[Part] = []
    volumes: list[Volume] = []
    copies = Counter(seen.header.lba for seen in headers)
    for seen in headers:
        alone = copies[seen.header.lba] == 1
        sector_bytes = seen.sector_bytes
        sure = certainty if alone else min(certainty, Certainty.LIKELY)
        parts.append(Part(seen.header.lba * sector_bytes, sector_bytes, seen.sighting, sure))
        place = seen.header.entries_lba * sector_bytes
        parts.append(Part(place, seen.header.entries_length, None, sure))
        if not volumes:
            for number, first, last in seen.header.partitions(seen.entries):
                length = (last + 1 - first) * sector_bytes
                volumes.append(Volume(first * sector_bytes, length, f"partition {number}", sure))
    return PartitionTable("GPT", volumes, parts)


def _boot_table(disk: PlacedDisk, orphans: Orphans) -> PartitionTable | None:
    sector = disk.read(0, SECTOR_BYTES)
    if sector is not None:
        entries = unpack_boot_record(sector)
        if not entries or not _is_plausible(entries, disk.size):
            return None
        return _boot_partitions(disk, orphans, entries, Part(0, SECTOR_BYTES, None, Certainty.CERTAIN))
    found = []
    for sighting in sightings(orphans, BOOT_SIGN):
        if sighting.start == 0:
            entries = unpack_boot_record(sighting.read(orphans, 0, SECTOR_BYTES))
            if entries and _is_plausible(entries, disk.size):
                found.append((entries, sighting))
    tables = [_table_of(disk, orphans, entries, sighting) for entries, sighting in found]
    records = {part.sighting for table in tables for part in table.parts[1:]}
    tables = [table for table in tables if table.parts[0].sighting not in records]
    filling = [table for table in tables if table.parts[0].certainty == Certainty.CERTAIN]
    fitting = filling or tables
    return fitting[0] if len(fitting) == 1 else None


def _table_of(
    disk: PlacedDisk, orphans: Orphans, entries: tuple[BootEntry, ...], sighting: Sighting
) -> PartitionTable:
    """Return the table that a record among the orphans begins, if it is the first one."""
    certainty = Certainty.CERTAIN if _fills(entries, disk.size) else Certainty.LIKELY
    return _boot_partitions(disk, orphans, entries, Part(0, SECTOR_BYTES, sighting, certainty))


def _is_plausible(entries: tuple[BootEntry, ...], disk_bytes: int) -> bool:
    inside = all(entry.end_sector * SECTOR_BYTES <= disk_bytes for entry in entries)
    return inside and not overlap(entries) and not any(entry.type == PROTECTIVE for entry in entries)


def _fills(entries: tuple[BootEntry, ...], disk_bytes: int) -> bool:
    return disk_bytes - max(entry.end_sector for entry in entries) * SECTOR_BYTES <= END_SLACK_BYTES


def _boot_partitions(
    disk: PlacedDisk, orphans: Orphans, entries: tuple[BootEntry, ...], record: Part
) -> PartitionTable:
    volumes = []
    parts = [record]
    for entry in entries:
        if entry.is_extended:
            more_volumes, more_parts = _logical_partitions(disk, orphans, entry, record.certainty)
            volumes += more_volumes
            parts += more_parts
        else:
            name = f"partition {entry.number}"
            volumes.append(_volume(entry.start_sector, entry.sector_count, name, record.certainty))
    return PartitionTable("MBR", volumes, parts)


def _volume(start_sector: int, sector_count: int, name: str, certainty: Certainty) -> Volume:
    return Volume(start_sector * SECTOR_BYTES, sector_count * SECTOR_BYTES, name, certainty)


def _logical_partitions(
    disk: PlacedDisk, orphans: Orphans, extended: BootEntry, certainty: Certainty
) -> tuple[list[Volume], list[Part]]:
    """Follow the chain of boot records in an extended partition, as far as it can be told.

    Records among the orphans are sure where the chain goes through to the extended partition's end: each
    record then agrees with the place of the next one, and the last with the end (PT1).
    """
    volumes: list[Volume] = []
    parts: list[Part] = []
    sector = extended.start_sector
    is_tight = True
    for number in range(FIRST_LOGICAL, FIRST_LOGICAL + LOGICAL_MAX):
        entries, part = _logical_record(disk, orphans, sector, extended)
        if part is None:
            is_tight = False
            break
        parts.append(part)
        is_tight = is_tight and _gap_bytes(entries, sector, extended) <= END_SLACK_BYTES
        for entry in entries:
            if not entry.is_extended:
                start = sector + entry.start_sector
                volumes.append(_volume(start, entry.sector_count, f"partition {number}", Certainty.CERTAIN))
        after = [entry for entry in entries if entry.is_extended]
        if not after:
            break
        sector = extended.start_sector + after[0].start_sector
    if not is_tight and any(part.sighting is not None for part in parts):
        certainty = min(certainty, Certainty.LIKELY)
    return (
        [replace(volume, certainty=certainty) for volume in volumes],
        [replace(part, certainty=certainty) for part in parts],
    )


def _logical_record(
    disk: PlacedDisk, orphans: Orphans, sector: int, extended: BootEntry
) -> tuple[tuple[BootEntry, ...], Part | None]:
    place = sector * SECTOR_BYTES
    part = Part(place, SECTOR_BYTES, None, Certainty.CERTAIN)
    data = disk.read(place, SECTOR_BYTES)
    if data is not None:
        entries = _logical_entries(data, sector, extended)
        return entries, part if entries else None
    found = []
    for sighting in sightings(orphans, BOOT_SIGN):
        if (place - sighting.start) % orphans.cluster_bytes == 0 and sighting.start <= place:
            entries = _logical_entries(sighting.read(orphans, 0, SECTOR_BYTES), sector, extended)
            if entries:
                found.append((entries, replace(part, sighting=sighting)))
    tight = [fit for fit in found if _gap_bytes(fit[0], sector, extended) <= END_SLACK_BYTES]
    fitting = found if len(found) == 1 else tight
    return fitting[0] if len(fitting) == 1 else ((), None)


def _gap_bytes(entries: tuple[BootEntry, ...], sector: int, extended: BootEntry) -> int:
    """Return what lies between a logical partition and the next record, or the end of all."""
    ends = [sector + entry.end_sector for entry in entries if not entry.is_extended]
    nexts = [extended.start_sector + entry.start_sector for entry in entries if entry.is_extended]
    return ([*nexts, extended.end_sector][0] - max(ends, default=sector)) * SECTOR_BYTES


def _logical_entries(data: bytes, sector: int, extended: BootEntry) -> tuple[BootEntry, ...]:
    """Return the entries of a logical partition's boot record; none if they do not fit at a sector."""
    entries = unpack_boot_record(data)
    own = [entry for entry in entries if not entry.is_extended]
    after = [entry for entry in entries if entry.is_extended]
    if len(own) > 1 or len(after) > 1 or not entries:
        return ()
    limit = extended.end_sector
    if after:
        limit = extended.start_sector + after[0].start_sector
        if not sector < limit < extended.end_sector:
            return ()
    return entries if all(sector + entry.end_sector <= limit for entry in own) else ()
