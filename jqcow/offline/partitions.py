"""Where the partitions of a disk lie: MBR with logical ones, or GPT.

Whatever a table says, a partition lies within its disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jqcow.device.disk import Disk
from jqcow.salvage.guest.partition_layout import (
    FIRST_LOGICAL,
    LOGICAL_MAX,
    PROTECTIVE,
    SECTOR_BYTES,
    SECTOR_SIZES,
    BootEntry,
    GptHeader,
    overlap,
    unpack_boot_record,
)


@dataclass(frozen=True)
class Partition:
    """A partition; ``number`` as in its table, ``offset`` and ``length`` in bytes."""

    number: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + self.length


def partitions_of(disk: Disk) -> tuple[Partition, ...]:
    """Return the partitions of a disk, by number; none where it has no table that makes sense.

    Of a GPT the copy at the end serves where the first one is damaged.

    Raises:
        JqcowError: the disk cannot be read.
        OSError: the host failed.
    """
    found = _gpt(disk)
    if found is None:
        found = list(_boot_partitions(disk))
    return tuple(part for part in found if part.offset > 0 and part.end <= disk.size)


def _read(disk: Disk, length: int, offset: int) -> bytes:
    buffer = bytearray(length)
    inside = max(0, min(length, disk.size - offset))
    disk.read_into(memoryview(buffer)[:inside], min(offset, disk.size))
    return bytes(buffer)


def _gpt(disk: Disk) -> list[Partition] | None:
    for sector_bytes in SECTOR_SIZES:
        for place in (sector_bytes, disk.size - sector_bytes):
            header = GptHeader.unpack(_read(disk, SECTOR_BYTES, place)) if place > 0 else None
            if header is None or header.lba * sector_bytes != place:
                continue
            entries = _read(disk, header.entries_length, header.entries_lba * sector_bytes)
            found = [
                Partition(number, first * sector_bytes, (last - first + 1) * sector_bytes)
                for number, first, last in header.partitions(entries)
            ]
            if found or not any(entries):
                return found
    return None


def _boot_partitions(disk: Disk) -> Iterator[Partition]:
    entries = unpack_boot_record(_read(disk, SECTOR_BYTES, 0))
    inside = all(entry.end_sector * SECTOR_BYTES <= disk.size for entry in entries)
    # The first sector of a file system ends like a boot record, too.
    if not inside or overlap(entries) or any(entry.type == PROTECTIVE for entry in entries):
        return
    number = FIRST_LOGICAL
    for entry in entries:
        if not entry.is_extended:
            yield _partition(entry.number, 0, entry)
            continue
        for start, logical in _logical(disk, entry):
            yield _partition(number, start, logical)
            number += 1


def _logical(disk: Disk, extended: BootEntry) -> Iterator[tuple[int, BootEntry]]:
    """Yield the logical partitions of an extended one, each with the sector that its entry counts from."""
    sector, seen = extended.start_sector, set[int]()
    while sector not in seen and len(seen) < LOGICAL_MAX:
        seen.add(sector)
        entries = unpack_boot_record(_read(disk, SECTOR_BYTES, sector * SECTOR_BYTES))
        yield from ((sector, entry) for entry in entries if not entry.is_extended)
        after = [entry for entry in entries if entry.is_extended]
        if not after:
            return
        sector = extended.start_sector + after[0].start_sector


def _partition(number: int, start_sector: int, entry: BootEntry) -> Partition:
    offset = (start_sector + entry.start_sector) * SECTOR_BYTES
    return Partition(number, offset, entry.sector_count * SECTOR_BYTES)
