"""An ext4 as far as its blocks are placed: descriptors, inodes, and the blocks of a file."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jqcow.salvage.evidence import PlacedDisk
from jqcow.salvage.guest.ext4_ondisk import (
    EXTENTS_FLAG,
    ExtentNode,
    GroupDescriptor,
    Inode,
    Superblock,
)


@dataclass(frozen=True)
class Run:
    """Consecutive blocks of a file, or of what describes it.

    Attributes:
        logical: first block in the file; of metadata, the first that it speaks of.
        start: first block of the volume.
        blocks: how many.
        is_metadata: True for a node of an extent tree and a block of pointers.
    """

    logical: int
    start: int
    blocks: int
    is_metadata: bool = False


class Volume4:
    """Reads what is placed of one file system.

    Args:
        superblock: any copy.
        offset: of the volume on the disk, in bytes.
        disk: what is placed.
    """

    def __init__(self, superblock: Superblock, offset: int, disk: PlacedDisk) -> None:
        self.superblock = superblock
        self.offset = offset
        self._disk = disk
        self._walked: set[int] = set()

    def read(self, block: int, count: int = 1) -> bytes | None:
        """Return blocks; None where one is not placed or not in the volume."""
        size = self.superblock.block_bytes
        if not 0 <= block <= self.superblock.blocks - count:
            return None
        return self._disk.read(self.offset + block * size, count * size)

    def descriptors(self) -> Iterator[tuple[int, GroupDescriptor]]:
        """Yield the groups whose descriptor in use is placed and sound."""
        superblock = self.superblock
        for index in range(superblock.descriptor_blocks):
            data = self.read(superblock.descriptor_places(index)[0])
            if data is not None:
                yield from descriptors_in(superblock, index, data)

    def inodes(self, group: int, descriptor: GroupDescriptor) -> Iterator[tuple[int, Inode]]:
        """Yield the inodes of a group that are in use and placed."""
        superblock = self.superblock
        used = superblock.inodes_per_group - descriptor.unused_inodes
        per_block = superblock.inodes_per_block
        for index in range(-(-used // per_block)):
            number = group * superblock.inodes_per_group + index * per_block + 1
            yield from self.inodes_in(descriptor.inode_table + index, number)

    def inodes_in(self, block: int, first: int) -> Iterator[tuple[int, Inode]]:
        """Yield the inodes in use of one block of a table, if that is placed."""
        data = self.read(block)
        if data is None:
            return
        step = self.superblock.inode_bytes
        for slot in range(self.superblock.inodes_per_block):
            if data[slot * step + 1] and data[slot * step + 26 : slot * step + 28] != b"\0\0":
                inode = Inode.unpack(data[slot * step : (slot + 1) * step])
                if inode.is_used:
                    yield first + slot, inode

    def runs(self, inode: Inode) -> Iterator[Run]:
        """Yield what a file occupies, as far as its tree is placed. No block of a tree is walked twice."""
        if not inode.has_blocks():
            return
        yield from self.mapped(inode.block_map, bool(inode.flags & EXTENTS_FLAG))

    def mapped(self, block_map: bytes, by_extents: bool) -> Iterator[Run]:
        """Yield what a block map names, be it the root of an extent tree or fifteen pointers."""
        yield from self._extents(block_map, 5) if by_extents else self._pointers(block_map)

    def children(self, inode: Inode) -> Iterator[tuple[int, int]]:
        """Yield (first block in the file, block) of the nodes that an inode's placed tree names."""
        if inode.has_blocks() and inode.flags & EXTENTS_FLAG:
            yield from self._children(inode.block_map, 5)

    def _take(self, block: int) -> bytes | None:
        if block in self._walked:
            return None
        self._walked.add(block)
        return self.read(block)

    def _holds(self, start: int, blocks: int) -> bool:
        return self.superblock.first_block < start and start + blocks <= self.superblock.blocks

    def _extents(self, data: bytes, depth_max: int) -> Iterator[Run]:
        node = ExtentNode.unpack(data)
        if node is None or node.depth > depth_max:
            return
        for extent in node.extents:
            if extent.written and self._holds(extent.start, extent.blocks):
                yield Run(extent.logical, extent.start, extent.blocks)
        for logical, block in node.children:
            if self._holds(block, 1):
                yield Run(logical, block, 1, is_metadata=True)
                below = self._take(block)
                if below is not None:
                    yield from self._extents(below, node.depth - 1)

    def _children(self, data: bytes, depth_max: int) -> Iterator[tuple[int, int]]:
        node = ExtentNode.unpack(data)
        if node is None or node.depth > depth_max:
            return
        for logical, block in node.children:
            if self._holds(block, 1):
                yield logical, block
                below = self._take(block) if node.depth > 1 else None
                if below is not None:
                    yield from self._children(below, node.depth - 1)

    def _pointers(self, block_map: bytes) -> Iterator[Run]:
        """Ext2 and ext3: twelve blocks, then one that names blocks, one that names such, and again."""
        words = struct.unpack("<15I", block_map)
        per_block = self.superblock.block_bytes // 4
        yield from self._joined(words[:12], 0)
        logical = 12
        for level, pointer in enumerate(words[12:]):
            if pointer and self._holds(pointer, 1):
                yield from self._pointed(pointer, logical, level)
            logical += per_block ** (level + 1)

    def _pointed(self, block: int, logical: int, level: int) -> Iterator[Run]:
        yield Run(logical, block, 1, is_metadata=True)
        data = self._take(block)
        if data is None:
            return
        words = struct.unpack(f"<{len(data) // 4}I", data)
        if level == 0:
            yield from self._joined(words, logical)
            return
        each = len(words) ** level
        for index, pointer in enumerate(words):
            if pointer and self._holds(pointer, 1):
                yield from self._pointed(pointer, logical + index * each, level - 1)

    def _joined(self, pointers: Sequence[int], logical: int) -> Iterator[Run]:
        """Yield runs of pointers that go on one by one."""
        index = 0
        while index < len(pointers):
            first, start = index, pointers[index]
            index += 1
            while start and index < len(pointers) and pointers[index] == start + index - first:
                index += 1
            if start and self._holds(start, index - first):
                yield Run(logical + first, start, index - first)

    def directory_runs(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        """Yield (first block in the directory, block of the volume, count) of a directory."""
        limit = -(-inode.size // self.superblock.block_bytes)
        for run in self.runs(inode):
            count = min(run.blocks, limit - run.logical)
            if not run.is_metadata and count > 0:
                yield run.logical, run.start, count


def descriptors_in(superblock: Superblock, index: int, data: bytes) -> Iterator[tuple[int, GroupDescriptor]]:
    """Yield the sound descriptors in one of the blocks that hold them."""
    step, first = superblock.descriptor_bytes, index * superblock.descriptors_per_block
    for number in range(min(superblock.descriptors_per_block, superblock.groups - first)):
        found = GroupDescriptor.unpack(superblock, first + number, data[number * step : (number + 1) * step])
        if found:
            yield first + number, found
