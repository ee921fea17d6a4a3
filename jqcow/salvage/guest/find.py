"""What is on a guest's disk: its volumes first, then what every module recognises in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jqcow.salvage.evidence import Certainty, GuestStructure, Orphans, PlacedDisk, Volume
from jqcow.salvage.guest import btrfs, ext4, luks, lvm, ntfs, partitions, swap, xfs
from jqcow.salvage.guest.mapped import Limited, Mapped, MappedDisk
from jqcow.salvage.guest.signs import SurveyedOrphans

Finder = Callable[[list[Volume], PlacedDisk, Orphans], Iterator[GuestStructure]]


def limited(finder: Finder) -> Finder:
    """Return a finder that is no surer of anything than its volumes are, of one that may be."""

    def find_limited(volumes: list[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[GuestStructure]:
        for certainty in sorted(Certainty, reverse=True):
            alike = [volume for volume in volumes if volume.certainty == certainty]
            for structure in finder(alike, disk, orphans) if alike else ():
                yield structure if certainty == Certainty.CERTAIN else Limited(structure, certainty)

    return find_limited


FINDERS: tuple[Finder, ...] = (
    btrfs.find,
    limited(ext4.find),
    limited(xfs.find),
    limited(ntfs.find),
    luks.find,
    swap.find,
)
"""Who recognises what is in a volume; each is given all volumes, so that it takes the one that fits best."""

SIGNS = (
    partitions.GPT_SIGN,
    partitions.BOOT_SIGN,
    *lvm.SIGNS,
    *luks.SIGNS,
    swap.SWAP_SIGN,
    btrfs.SUPERBLOCK_SIGN,
)


def find(disk: PlacedDisk, orphans: Orphans) -> Iterator[GuestStructure]:
    """Yield the structures of a guest's disk that are recognised, the surest first.

    It may be asked again after more was placed: more may be recognised then.

    Args:
        disk: as far as it is placed.
        orphans: what is not; they are read once for all signs, and by the modules as they need.
    """
    surveyed = SurveyedOrphans(orphans, SIGNS)
    volumes = [Volume(0, disk.size, "the disk")]
    for table in partitions.find(disk, surveyed):
        yield table
        is_sure = all(volume.certainty == Certainty.CERTAIN for volume in table.volumes)
        volumes = table.volumes if is_sure else volumes + table.volumes
    physical = list(lvm.find(volumes, disk, surveyed))
    yield from physical
    bases = [base for found in physical for base in found.bases]
    logical = [volume for found in physical for volume in found.logical]
    plain = [volume for volume in volumes if volume not in bases]
    for volume in logical:
        if len(volume.segments) == 1:
            segment = volume.segments[0]
            plain.append(Volume(segment.offset, segment.length, f"volume {volume.name}", volume.certainty))
    yield from _in_volumes(plain, disk, surveyed)
    for volume in logical:
        view = MappedDisk(disk, volume.segments)
        if len(volume.segments) > 1 and view.is_aligned(orphans.cluster_bytes):
            whole = Volume(0, view.size, f"volume {volume.name}", volume.certainty)
            for structure in _in_volumes([whole], view, surveyed):
                yield Mapped(structure, volume.segments)


def _in_volumes(volumes: list[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[GuestStructure]:
    for finder in FINDERS if volumes else ():
        yield from finder(volumes, disk, orphans)
