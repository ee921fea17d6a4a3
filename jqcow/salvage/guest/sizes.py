"""How large a disk is whose size is lost, by the file systems and the boot records that are seen of it.

A file system fills its disk, or a partition that a boot record names; so the disk ends where the last of them
does. An image in a file of the guest is smaller, as a rule. It is no more than a supposition.
"""

from __future__ import annotations

from collections.abc import Iterator

from jqcow.ondisk.layout import round_up
from jqcow.salvage.guest import btrfs_layout, ext4_ondisk, xfs_ondisk
from jqcow.salvage.guest.btrfs import SUPERBLOCK_SIGN
from jqcow.salvage.guest.ntfs_scan import boots_in
from jqcow.salvage.guest.partition_layout import PROTECTIVE, SECTOR_BYTES, unpack_boot_record
from jqcow.salvage.guest.signs import positions

PARTITIONS_END_BYTES = 1 << 20
"""Disks with partitions are multiples of this, as a rule."""
_XFS_SECTOR_MAX = 32_768
_EXT4_MAGIC = ext4_ondisk.SUPERBLOCK_MAGIC.to_bytes(2, "little")


def sizes_seen(content: bytes) -> Iterator[int]:
    """Yield how long a disk is with what is seen in a cluster, in bytes."""
    for _, boot in boots_in(content):
        yield boot.length
    entries = unpack_boot_record(content[:SECTOR_BYTES])
    if entries and all(entry.type != PROTECTIVE for entry in entries):
        end = max(entry.end_sector for entry in entries) * SECTOR_BYTES
        yield round_up(end, PARTITIONS_END_BYTES)
    for at in positions(content, SUPERBLOCK_SIGN):
        found = btrfs_layout.Superblock.unpack(content[at : at + btrfs_layout.SUPERBLOCK_BYTES])
        if found is not None:
            yield found.device_bytes
    yield from _of_xfs(content)
    yield from _of_ext4(content)


def _of_xfs(content: bytes) -> Iterator[int]:
    at = content.find(xfs_ondisk.Superblock.MAGIC)
    while at >= 0:
        if at % SECTOR_BYTES == 0:
            found = xfs_ondisk.Superblock.unpack(content[at : at + _XFS_SECTOR_MAX])
            if found is not None:
                yield found.length
        at = content.find(xfs_ondisk.Superblock.MAGIC, at + 4)


def _of_ext4(content: bytes) -> Iterator[int]:
    column = content[ext4_ondisk.SUPERBLOCK_MAGIC_AT :: SECTOR_BYTES]
    index = column.find(_EXT4_MAGIC[:1])
    while index >= 0:
        at = index * SECTOR_BYTES
        found = ext4_ondisk.Superblock.unpack(content[at : at + ext4_ondisk.SUPERBLOCK_BYTES])
        if found is not None:
            yield found.blocks * found.block_bytes
        index = column.find(_EXT4_MAGIC[:1], index + 1)
