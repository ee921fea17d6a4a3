"""Where on the disk an ext4 may start, by its superblocks alone.

Each copy of a superblock names its group, so its place in an orphan tells the volume's start, but for
multiples of a cluster: what is known of partitions has to say the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jqcow.salvage.evidence import Orphans, PlacedDisk, Volume
from jqcow.salvage.guest.ext4_ondisk import PRIMARY_AT, SUPERBLOCK_BYTES, SUPERBLOCK_MAGIC_AT, Superblock

FILE_SYSTEMS_MAX = 64
COPIES_MAX = 4096
"""So many file systems, and copies of one's superblock, are remembered."""

SECTOR_BYTES = 512
SLACK_BYTES = 63 * SECTOR_BYTES
"""A file system that leaves less of its volume was made for it; a partition table takes at least that."""

_EARLY_GROUPS = (1, 3, 5, 7, 9, 25, 27)


@dataclass
class Sighting:
    """Copies of one file system's superblock in orphans.

    Attributes:
        newest: the copy with the latest time, of those in use if there is one.
        copies: (group, offset in the orphan, in bytes) of each.
    """

    newest: Superblock
    copies: set[tuple[int, int]] = field(default_factory=set)

    def fits(self, offset: int, cluster_bytes: int) -> bool:
        """Return whether a volume that starts there has its superblocks where they were seen."""
        seen = {group: at for group, at in self.copies if group}
        for group, at in self.copies:
            if group and (self._place(offset, group) - at) % cluster_bytes:
                return False
        return bool(seen) or any((offset + PRIMARY_AT - at) % cluster_bytes == 0 for _, at in self.copies)

    def start(self, cluster_bytes: int) -> int:
        """Return the first offset that a volume may start at."""
        group, at = max(self.copies)
        return (at - self._place(0, group)) % cluster_bytes

    def _place(self, offset: int, group: int) -> int:
        superblock = self.newest
        return offset + (superblock.group_start(group) * superblock.block_bytes if group else PRIMARY_AT)


def age(superblock: Superblock) -> tuple[bool, int, int]:
    """Return what sorts copies of a superblock: the one in use, and the last written, is the greatest."""
    return superblock.group == 0, superblock.write_seconds, superblock.kib_written


def placed(volume: Volume, disk: PlacedDisk) -> Superblock | None:
    """Return a superblock of a volume that is placed: the first, or a backup; None without any."""
    found = _read(disk, volume.offset + PRIMARY_AT)
    if found and found.group == 0:
        return found
    for block_bytes in (4096, 1024, 2048):
        for group in _EARLY_GROUPS:
            at = group * 8 * block_bytes * block_bytes + (1024 if block_bytes == 1024 else 0)
            found = _read(disk, volume.offset + at)
            if found and found.group == group and found.block_bytes == block_bytes:
                return found
    return None


def _read(disk: PlacedDisk, offset: int) -> Superblock | None:
    data = disk.read(offset, SUPERBLOCK_BYTES)
    return Superblock.unpack(data) if data else None


def sightings(orphans: Orphans) -> list[Sighting]:
    """Return the file systems whose superblocks are in orphans."""
    found: dict[tuple[bytes, int, int], Sighting] = {}
    for _, data in orphans:
        column = data[SUPERBLOCK_MAGIC_AT::SECTOR_BYTES]
        index = column.find(0x53)
        while index >= 0:
            at = index * SECTOR_BYTES
            index = column.find(0x53, index + 1)
            superblock = Superblock.unpack(data[at : at + SUPERBLOCK_BYTES])
            if superblock is None:
                continue
            key = superblock.uuid, superblock.block_bytes, superblock.blocks_per_group
            if key not in found and len(found) >= FILE_SYSTEMS_MAX:
                continue
            seen = found.setdefault(key, Sighting(superblock))
            if len(seen.copies) < COPIES_MAX:
                seen.copies.add((superblock.group, at))
            if age(superblock) > age(seen.newest):
                seen.newest = superblock
    return list(found.values())


def volume_of(
    sighting: Sighting, volumes: Sequence[Volume], disk: PlacedDisk, cluster_bytes: int
) -> tuple[Volume, bool]:
    """Return the volume that a file system is in, and whether that is sure."""
    length = sighting.newest.blocks * sighting.newest.block_bytes
    known = list(volumes) or [Volume(0, disk.size, "the whole disk")]
    fitting = [
        volume
        for volume in known
        if sighting.fits(volume.offset, cluster_bytes) and (not volume.length or volume.length >= length)
    ]
    made_for = [volume for volume in fitting if 0 <= volume.length - length < SLACK_BYTES]
    if len(made_for) == 1:
        return made_for[0], True
    partitions = [volume for volume in made_for or fitting if volume.offset]
    if len(partitions) == 1:
        return partitions[0], not made_for
    if fitting:
        return (partitions or fitting)[0], False
    start = sighting.start(cluster_bytes)
    return Volume(start, length, f"an unknown place, such as {start}"), False


def found(
    volumes: Sequence[Volume], disk: PlacedDisk, orphans: Orphans
) -> Iterator[tuple[Superblock, Volume, bool]]:
    """Yield (superblock, volume, whether the volume is sure) of each ext4."""
    seen: list[Superblock] = []
    for volume in volumes:
        superblock = placed(volume, disk)
        if superblock:
            seen.append(superblock)
            yield superblock, volume, True
    for sighting in sightings(orphans):
        length = sighting.newest.blocks * sighting.newest.block_bytes
        if length <= disk.size and not any(sighting.newest.same_volume(other) for other in seen):
            volume, is_sure = volume_of(sighting, volumes, disk, orphans.cluster_bytes)
            yield sighting.newest, volume, is_sure
