"""Blocks of an ext4 that tell what they are: found in an orphan by what stands at fixed places in a block.

Nothing here knows where a block belongs; a mark keeps what its block says of itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from jqcow import _native
from jqcow.salvage.guest import crc_inverse
from jqcow.salvage.guest.ext4_ondisk import (
    EXTENTS_FLAG,
    INLINE_FLAG,
    KINDS,
    PRIMARY_AT,
    RESIZE_INODE,
    ExtentNode,
    GroupDescriptor,
    Inode,
    Superblock,
)

JOURNAL_MAGIC = b"\xc0\x3b\x39\x98"
_DOT = b"\x0c\x00\x01\x02.\0\0\0"
_TAIL = b"\0\0\0\0\x0c\0\0\xde"
_EXTRA_SIZES = bytes(int(4 <= value <= 128 and value % 4 == 0) for value in range(256))


DESCRIPTOR_TRIES_MAX = 1 << 23
"""So often a block is compared with one of descriptors; then it is enough."""


class Kind(Enum):
    """What a block is."""

    SUPERBLOCK = auto()
    """`key` is its group."""
    DESCRIPTORS = auto()
    """`key` is the number of the block among those of all descriptors."""
    RESERVED = auto()
    """A block kept for more descriptors; `key` is its own number."""
    INODES = auto()
    """`key` is the number of the first inode, `extra` how many say so."""
    EXTENTS = auto()
    """`key` is the seed of its inode, `extra` the first block in the file that it speaks of."""
    DIRECTORY = auto()
    """`key` is the seed of its inode, `extra` the inode's number for a first block, else 0."""
    ATTRIBUTES = auto()
    """`key` is its own number."""
    BITMAP = auto()
    """A bitmap; `key` is what its checksum covers, alone, `extra` 1 for inodes, 0 for blocks."""
    JOURNAL = auto()
    """`key` is its type, `extra` its sequence number."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A block in an orphan that tells what it is.

    Attributes:
        kind: what it is.
        at: where the block starts in the orphan, in bytes.
        key, extra: see `Kind`.
        alone: of its bytes, as `crc_inverse.alone` counts it. Where the block ends in its own CRC-32C, that
            says nothing of what is before it: for superblocks and nodes of extent trees it is a CRC-32.
        mapped: how many blocks a node of an extent tree maps, or how many nodes are below it; 1 for a node of
            a directory's index.
    """

    kind: Kind
    at: int
    key: int
    extra: int
    alone: int
    mapped: int = 0


SELF_SUMMED = frozenset((Kind.SUPERBLOCK, Kind.EXTENTS))
"""Blocks that end in their own CRC-32C."""


class Marker:
    """Finds the marks of one file system.

    Args:
        superblock: any copy.
        volume_offset: of the file system on the disk, in bytes.
        cluster_bytes: length of an orphan.

    Attributes:
        bitmap_bytes: what the checksums of a bitmap of blocks, and of one of inodes, cover.
    """

    def __init__(self, superblock: Superblock, volume_offset: int, cluster_bytes: int) -> None:
        self._superblock = superblock
        size = self._size = superblock.block_bytes
        self._first = volume_offset % size
        self._tries = DESCRIPTOR_TRIES_MAX
        self.bitmap_bytes = (
            superblock.blocks_per_group // superblock.cluster_blocks // 8,
            superblock.inodes_per_group // 8,
        )
        self._count = max(0, cluster_bytes - self._first) // size
        self._descriptors_first = superblock.group_start(0) + 1 + superblock.plain_descriptor_blocks
        self._backups = [group for group in superblock.super_groups() if group]
        self._of_inode = crc_inverse.backward(8 + superblock.inode_bytes)
        self._of_attributes = crc_inverse.backward(8 + size)
        self._of_directory = crc_inverse.backward(size - 12)

    def marks(self, data: bytes) -> list[Mark]:
        """Return the marks in an orphan, in no order."""
        if _native.is_zero(data):
            return []
        found = [*self._by_first_bytes(data), *self._tables(data)]
        if self._superblock.summed:
            found += self._directories(data)
            found += self._attributes(data)
            if self._superblock.inode_bytes > 128:
                found += self._inodes(data)
        return found

    def zeros(self, data: bytes, marks: list[Mark]) -> int:
        """Return a bit for each whole block that is zero, for an orphan with inodes in it."""
        if self._count < 2 or all(mark.kind is not Kind.INODES for mark in marks):
            return 0
        view = memoryview(data)
        starts = range(self._first, self._first + self._count * self._size, self._size)
        return sum(
            1 << index for index, at in enumerate(starts) if _native.is_zero(view[at : at + self._size])
        )

    def _hits(self, data: bytes, at: int, value: int) -> Iterator[int]:
        """Yield the starts of blocks that have a byte at a place."""
        column = data[self._first + at :: self._size]
        index = column.find(value)
        while 0 <= index < self._count:
            yield self._first + index * self._size
            index = column.find(value, index + 1)

    def _mark(self, kind: Kind, data: bytes, at: int, key: int, extra: int = 0, mapped: int = 0) -> Mark:
        block = data[at : at + self._size]
        content = zlib.crc32(block) if kind in SELF_SUMMED else crc_inverse.alone(block)
        return Mark(kind, at, key, extra, content, mapped)

    def _by_first_bytes(self, data: bytes) -> Iterator[Mark]:
        for at in self._hits(data, 0, JOURNAL_MAGIC[0]):
            if data[at : at + 4] == JOURNAL_MAGIC:
                kind, sequence = struct.unpack_from(">II", data, at + 4)
                if 1 <= kind <= 5:
                    yield self._mark(Kind.JOURNAL, data, at, kind, sequence)
        if self._superblock.summed:
            for at in self._hits(data, 0, 0x0A):
                if data[at + 1] == 0xF3:
                    yield from self._extents(data, at)

    def _extents(self, data: bytes, at: int) -> Iterator[Mark]:
        node = ExtentNode.unpack(data[at : at + self._size])
        if node is None or node.first is None:
            return
        end = at + 12 + 12 * node.limit
        if end + 4 > at + self._size:
            return
        stored = int.from_bytes(data[end : end + 4], "little")
        seed = crc_inverse.backward(end - at)(stored ^ crc_inverse.alone(data[at:end]))
        mapped = sum(extent.blocks for extent in node.extents) + len(node.children)
        yield self._mark(Kind.EXTENTS, data, at, seed, node.first, mapped)

    def _tables(self, data: bytes) -> Iterator[Mark]:
        for within in {0, PRIMARY_AT} if self._size > PRIMARY_AT else {0}:
            for at in self._hits(data, within + 0x38, 0x53):
                found = Superblock.unpack(data[at + within : at + within + 1024])
                is_here = self._size == PRIMARY_AT or (found and (found.group == 0) == (within > 0))
                if found and is_here and found.same_volume(self._superblock):
                    yield self._mark(Kind.SUPERBLOCK, data, at, found.group)
        for at in range(self._first, self._first + self._count * self._size, self._size):
            word = data[at : at + 4]
            if word == b"\0\0\0\0":
                continue
            if data[at + 0x14 : at + 0x18] == b"\0\0\0\0":
                yield from self._descriptors(data, at)
            if self._superblock.compat & RESIZE_INODE:
                yield from self._reserved(data, at, int.from_bytes(word, "little"))

    def _reserved(self, data: bytes, at: int, word: int) -> Iterator[Mark]:
        """A block kept for descriptors lists its own backups: all of it follows from its number."""
        superblock = self._superblock
        if not self._backups:
            return
        number = word - self._backups[0] * superblock.blocks_per_group
        if not superblock.is_reserved(number - self._descriptors_first):
            return
        listed = self._backups[: self._size // 4]
        words = [number + group * superblock.blocks_per_group for group in listed]
        if words[-1] < 1 << 32 and data[at : at + self._size] == struct.pack(f"<{len(words)}I", *words).ljust(
            self._size, b"\0"
        ):
            yield self._mark(Kind.RESERVED, data, at, number)

    def _descriptors(self, data: bytes, at: int) -> Iterator[Mark]:
        superblock = self._superblock
        step = superblock.descriptor_bytes
        places = struct.unpack_from("<3I", data, at)
        if len(set(places)) < 3 or self._tries < 0 or (step < 64 and max(places) >= superblock.blocks):
            return
        for index in range(superblock.descriptor_blocks):
            self._tries -= 1
            group = index * superblock.descriptors_per_block
            here = min(superblock.descriptors_per_block, superblock.groups - group)
            if all(
                GroupDescriptor.unpack(superblock, group + number, data[start : start + step])
                for number in range(here)
                for start in (at + number * step,)
            ) and _native.is_zero(data[at + here * step : at + self._size]):
                yield self._mark(Kind.DESCRIPTORS, data, at, index)
                return
            if not superblock.summed:
                return

    def _inodes(self, data: bytes) -> Iterator[Mark]:
        step = self._superblock.inode_bytes
        low = data[self._first + 0x80 :: step].translate(_EXTRA_SIZES)
        high = data[self._first + 0x81 :: step]
        if 1 not in low or 0 not in high:
            return
        per_block = self._superblock.inodes_per_block
        bases: dict[int, list[int]] = {}
        slot = low.find(1)
        while 0 <= slot < self._count * per_block:
            if not high[slot]:
                number = self.inode_number(data[self._first + slot * step : self._first + (slot + 1) * step])
                if number is not None:
                    bases.setdefault(slot // per_block, []).append(number - slot % per_block)
            slot = low.find(1, slot + 1)
        for block, said in bases.items():
            base = max(said, key=said.count)
            in_range = 1 <= base <= self._superblock.inodes and base % per_block == 1 % per_block
            if in_range and said.count(base) * 2 > len(said):
                at = self._first + block * self._size
                yield self._mark(Kind.INODES, data, at, base, said.count(base))

    def inodes(self, data: bytes) -> Iterator[tuple[int, Inode]]:
        """Yield (number, inode) of those in a block of an inode table that have the checksum of it."""
        step = self._superblock.inode_bytes
        for at in range(0, self._size, step):
            slot = data[at : at + step]
            number = self.inode_number(slot) if slot[0x80:0x81].translate(_EXTRA_SIZES) == b"\1" else None
            if number is not None and (number - 1) % self._superblock.inodes_per_block == at // step:
                yield number, Inode.unpack(slot)

    def inode_number(self, data: bytes) -> int | None:
        """Return the number that an inode's checksum tells; None where the bytes are no inode."""
        if data[0x70:0x74] != b"\0\0\0\0":
            return None
        inode = Inode.unpack(data)
        if inode.kind not in KINDS or inode.checksum_bits < 32:
            return None
        if inode.flags & EXTENTS_FLAG and not inode.flags & INLINE_FLAG and data[0x28:0x2A] != b"\x0a\xf3":
            return None
        blank = b"".join((data[0x64:0x68], data[:0x7C], b"\0\0", data[0x7E:0x82], b"\0\0", data[0x84:]))
        return self._of_inode(inode.checksum ^ crc_inverse.alone(blank)) ^ self._superblock.seed

    def inode_seed(self, number: int, generation: int) -> int:
        """Return what the checksums of an inode's blocks are begun with."""
        seed = self._superblock.seed ^ 0xFFFF_FFFF
        words = struct.pack("<II", number, generation)
        return _native.crc32c(words, seed) ^ 0xFFFF_FFFF

    def _directories(self, data: bytes) -> Iterator[Mark]:
        size = self._size
        for at in self._hits(data, size - 5, 0xDE):
            if data[at + size - 12 : at + size - 4] == _TAIL:
                stored = int.from_bytes(data[at + size - 4 : at + size], "little")
                seed = self._of_directory(stored ^ crc_inverse.alone(data[at : at + size - 12]))
                dot = data[at : at + 4] if data[at + 4 : at + 12] == _DOT else b""
                yield self._mark(Kind.DIRECTORY, data, at, seed, int.from_bytes(dot, "little"))
        for at in self._hits(data, 8, _DOT[4]):
            if (
                data[at + 4 : at + 12] == _DOT
                and data[at + 24 : at + 28] == b"\0\0\0\0"
                and data[at + 29] == 8
            ):
                yield from self._hash_node(data, at, 32)
        for at in self._hits(data, 5, size >> 8 & 255):
            if data[at : at + 8] == struct.pack("<IHH", 0, size & 0xFFFF, 0):
                yield from self._hash_node(data, at, 8)

    def _hash_node(self, data: bytes, at: int, entries_at: int) -> Iterator[Mark]:
        limit, count = struct.unpack_from("<HH", data, at + entries_at)
        end, tail = entries_at + 8 * count, entries_at + 8 * limit
        if not 0 < count <= limit or tail + 8 > self._size:
            return
        block = data[at : at + self._size]
        stored = int.from_bytes(block[tail + 4 : tail + 8], "little")
        summed = block[:end] + block[tail : tail + 4] + b"\0\0\0\0"
        seed = crc_inverse.backward(len(summed))(stored ^ crc_inverse.alone(summed))
        dot = int.from_bytes(block[:4], "little")
        yield self._mark(Kind.DIRECTORY, data, at, seed, dot, mapped=int(entries_at == 8))

    def _attributes(self, data: bytes) -> Iterator[Mark]:
        for at in self._hits(data, 3, 0xEA):
            if data[at : at + 4] == b"\0\0\x02\xea" and data[at + 8 : at + 12] == b"\1\0\0\0":
                block = data[at : at + self._size]
                stored = int.from_bytes(block[16:20], "little")
                summed = crc_inverse.alone(block[:16] + b"\0\0\0\0" + block[20:])
                number = self._of_attributes(stored ^ summed) ^ self._superblock.seed
                if number < self._superblock.blocks:
                    yield self._mark(Kind.ATTRIBUTES, data, at, number)

    def bitmaps(self, data: bytes, sought: Container[tuple[int, int]]) -> Iterator[Mark]:
        """Yield the marks of bitmaps.

        Args:
            data: an orphan.
            sought: (what the checksum covers, alone; 1 for inodes, 0 for blocks) of each bitmap.
        """
        size = self._size
        for at in range(self._first, self._first + self._count * size, size):
            for of_inodes, length in enumerate(self.bitmap_bytes):
                if data[at + length : at + size].count(0xFF) == size - length:
                    key = crc_inverse.alone(data[at : at + length]), of_inodes
                    if key in sought:
                        yield self._mark(Kind.BITMAP, data, at, *key)
