"""What an ext4 has in use, and what it has free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from jqcow.salvage.evidence import FilePiece
from jqcow.salvage.guest import crc_inverse
from jqcow.salvage.guest.ext4_ondisk import (
    BLOCK_UNINIT,
    DIRECTORY,
    RESIZE,
    GroupDescriptor,
    Inode,
)
from jqcow.salvage.guest.ext4_volume import Volume4
from jqcow.salvage.guest.growing import Growths

INODE_OF_USERS = 11
"""The first inode that is not the file system's own."""


def pieces(volume: Volume4, tables: Mapping[int, GroupDescriptor], growths: Growths) -> Iterator[FilePiece]:
    """Yield the ranges in use: the file system's own, then those of each file.

    Args:
        volume: what is placed.
        tables: descriptors from any copy, for groups whose own are not placed.
        growths: how files grew, as far as the journal tells.
    """
    superblock = volume.superblock
    made = (superblock.make_seconds * 1_000_000_000, 0, 0)
    for group in superblock.super_groups():
        taken = 1 + superblock.plain_descriptor_blocks + superblock.reserved_blocks
        yield _piece(volume, superblock.group_start(group), taken, made)
    descriptors = dict(tables) | dict(volume.descriptors())
    for index in range(superblock.plain_descriptor_blocks, superblock.descriptor_blocks):
        for block in superblock.descriptor_places(index):
            yield _piece(volume, block, 1, made)
    for group, descriptor in sorted(descriptors.items()):
        yield _piece(volume, descriptor.block_bitmap, 1, made)
        yield _piece(volume, descriptor.inode_bitmap, 1, made)
        yield _piece(volume, descriptor.inode_table, superblock.table_blocks, made)
        for number, inode in volume.inodes(group, descriptor):
            yield from of_file(volume, number, inode, growths)


def _piece(volume: Volume4, block: int, count: int, written: tuple[int, int, int]) -> FilePiece:
    size = volume.superblock.block_bytes
    return FilePiece(volume.offset + block * size, count * size, count * size, written, is_data=False)


def of_file(volume: Volume4, number: int, inode: Inode, growths: Growths) -> Iterator[FilePiece]:
    """Yield what an inode has in use."""
    size = volume.superblock.block_bytes
    superblock = volume.superblock
    is_own = inode.kind == DIRECTORY or number < INODE_OF_USERS or number == superblock.orphan_inode
    if inode.attributes:
        yield _piece(volume, inode.attributes, 1, (_written(inode, 0), number, 0))
    for run in volume.runs(inode):
        if number == RESIZE and _is_overhead(volume, run.start):
            continue
        offset = run.logical * size
        written = (_written(inode, offset), number, offset)
        if is_own or run.is_metadata:
            yield _piece(volume, run.start, run.blocks, written)
        else:
            valid = max(0, min(run.blocks * size, inode.size - run.logical * size))
            place, changed_ns = volume.offset + run.start * size, _changed(inode)
            piece = FilePiece(place, run.blocks * size, valid, written, changed_ns=changed_ns)
            yield from growths.parts(piece, size)


def _is_overhead(volume: Volume4, block: int) -> bool:
    """Return whether a block is at the start of a group, for descriptors: an inode maps these once more."""
    superblock = volume.superblock
    group = superblock.group_of(block)
    return block - superblock.group_start(group) < superblock.overhead_blocks(group)


def _written(inode: Inode, offset: int) -> int:
    """Return when a part of a file was most likely written: files grow from their making to the last change.

    A time of change before the making, or after that of the inode, was set by somebody: it says nothing.
    """
    if not inode.created:
        return min(inode.modified, inode.changed)
    if not _changed(inode):
        return inode.created
    return inode.created + (inode.modified - inode.created) * min(offset, inode.size) // max(inode.size, 1)


def _changed(inode: Inode) -> int:
    """Return when a file was last written to, by a time that nobody set; 0 if it is not known."""
    return inode.modified if 0 < inode.created <= inode.modified <= inode.changed else 0


def free(volume: Volume4) -> Iterator[tuple[int, int]]:
    """Yield (guest offset, length) of free ranges, for groups whose descriptor and bitmap are placed."""
    superblock = volume.superblock
    size = superblock.block_bytes * superblock.cluster_blocks
    descriptors = dict(volume.descriptors())
    tables = _tables_by_group(volume, descriptors)
    for group, descriptor in descriptors.items():
        start = superblock.group_start(group)
        count = -(-superblock.group_blocks(group) // superblock.cluster_blocks)
        if descriptor.flags & BLOCK_UNINIT:
            used = (1 << -(-superblock.overhead_blocks(group) // superblock.cluster_blocks)) - 1
            for first, end in tables.get(group, ()):
                low, high = first // superblock.cluster_blocks, -(-end // superblock.cluster_blocks)
                used |= ((1 << (high - low)) - 1) << low
        else:
            bitmap = _bitmap(volume, descriptor)
            if bitmap is None:
                continue
            used = int.from_bytes(bitmap, "little")
        bits = format(used & ((1 << count) - 1), f"0{count}b")[::-1]
        for run in re.finditer("0+", bits):
            offset = volume.offset + start * superblock.block_bytes + run.start() * size
            yield offset, (run.end() - run.start()) * size


def _bitmap(volume: Volume4, descriptor: GroupDescriptor) -> bytes | None:
    superblock = volume.superblock
    data = volume.read(descriptor.block_bitmap)
    if data is None or not superblock.summed:
        return data
    length = superblock.blocks_per_group // superblock.cluster_blocks // 8
    crc = crc_inverse.forward(length)(superblock.seed) ^ crc_inverse.alone(data[:length])
    mask = 0xFFFF_FFFF if superblock.descriptor_bytes >= 64 else 0xFFFF
    return data if not (crc ^ descriptor.block_bitmap_sum) & mask else None


def _tables_by_group(
    volume: Volume4, descriptors: Mapping[int, GroupDescriptor]
) -> dict[int, list[tuple[int, int]]]:
    """Return where in each group bitmaps and inode tables, of whatever group, start and end."""
    superblock = volume.superblock
    found: dict[int, list[tuple[int, int]]] = {}
    for descriptor in descriptors.values():
        for first, length in (
            (descriptor.block_bitmap, 1),
            (descriptor.inode_bitmap, 1),
            (descriptor.inode_table, superblock.table_blocks),
        ):
            for group in range(superblock.group_of(first), superblock.group_of(first + length - 1) + 1):
                start = superblock.group_start(group)
                ends = max(first - start, 0), min(first + length - start, superblock.group_blocks(group))
                found.setdefault(group, []).append(ends)
    return found
