"""What the bytes of ext2, ext3 and ext4 mean. All numbers are little-endian.

Every `unpack` takes untrusted bytes and returns None where they cannot be what they should be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jqcow import _native

SUPERBLOCK_BYTES = 1024
SUPERBLOCK_MAGIC = 0xEF53
SUPERBLOCK_MAGIC_AT = 0x38
PRIMARY_AT = 1024
"""Where the first superblock lies in its volume, whatever the size of a block."""

HAS_JOURNAL, RESIZE_INODE, SPARSE_SUPER2, ORPHAN_FILE = 0x4, 0x10, 0x200, 0x1000
"""Compatible features."""

RECOVER, META_BG, EXTENTS, WIDE, CSUM_SEED, INLINE_DATA = 0x4, 0x10, 0x40, 0x80, 0x2000, 0x8000
INCOMPAT_KNOWN = (
    0x2 | RECOVER | META_BG | EXTENTS | WIDE | 0x100 | 0x200 | 0x400 | 0x1000 | CSUM_SEED | 0x3C000
)
"""Incompatible features; not among the known ones: compression, and a device that is only a journal."""

SPARSE_SUPER, GDT_CSUM, BIGALLOC, METADATA_CSUM = 0x1, 0x10, 0x200, 0x400
"""Features that allow reading."""

ROOT_INODE, RESIZE, JOURNAL = 2, 7, 8
"""Inodes whose numbers are fixed."""

GROUP_BLOCKS_MIN = 256
GROUPS_MAX = 1 << 22
"""More groups than a disk of 16 TiB has with blocks of 1 KiB; mkfs makes no group smaller than the least."""


PLAIN_GROUPS_MAX = 1 << 13
"""So many groups may each have a backup of the superblock; larger ones are made with fewer backups."""


def raw(crc32c: int) -> int:
    """Return the checksum as ext4 keeps it: without the last inversion. It is its own inverse."""
    return crc32c ^ 0xFFFF_FFFF


@dataclass(frozen=True)
class Superblock:
    """The root of all: geometry and features.

    ::

        Byte 0x00  inodes   0x04  blocks (low)   0x14  first data block   0x18  log2(block / 1 KiB)
             0x1C  log2(cluster / 1 KiB)   0x20  blocks per group   0x24  clusters per group
             0x28  inodes per group   0x30  time of the last write   0x38  magic   0x4C  revision
             0x54  first inode   0x58  bytes of an inode   0x5A  number of this copy's group
             0x5C  compatible, 0x60  incompatible, 0x64  read-only compatible features   0x68  UUID
             0xCE  reserved blocks for group descriptors   0xE0  inode of the journal
             0xEC  seed of directory hashes   0xFD  what the next but two is   0xFE  bytes of a descriptor
            0x104  first meta group   0x108  time of making   0x10C  block map and size of the journal's inode
            0x150  blocks (high)   0x160  flags   0x178  KiB written ever   0x24C  groups of the two backups
            0x270  seed of checksums   0x280  inode of the orphans
            0x3FC  CRC-32C of all before, not inverted at the end
    """

    block_bytes: int
    inodes: int
    blocks: int
    first_block: int
    blocks_per_group: int
    cluster_blocks: int
    inodes_per_group: int
    write_seconds: int
    inode_bytes: int
    group: int
    compat: int
    incompat: int
    ro_compat: int
    uuid: bytes
    reserved_blocks: int
    hash_seed: tuple[int, int, int, int]
    descriptor_bytes: int
    first_meta_group: int
    make_seconds: int
    journal_map: bytes
    journal_bytes: int
    flags: int
    kib_written: int
    backup_groups: tuple[int, int]
    orphan_inode: int
    seed: int
    summed: bool

    @classmethod
    def unpack(cls, data: bytes) -> Superblock | None:
        """Return the superblock that the bytes hold; None where none can be in them."""
        if len(data) < SUPERBLOCK_BYTES or data[0x38:0x3A] != b"\x53\xef":
            return None
        words = struct.unpack_from("<256I", data)
        short = struct.unpack_from("<512H", data)
        modern = words[0x4C // 4] > 0
        wide = modern and bool(words[0x60 // 4] & WIDE)
        ro_compat = words[0x64 // 4] if modern else 0
        summed = bool(ro_compat & METADATA_CSUM)
        if words[0x18 // 4] > 6 or (summed and raw(_native.crc32c(data[:0x3FC])) != words[0x3FC // 4]):
            return None
        block_bytes = 1024 << words[0x18 // 4]
        cluster_log = words[0x1C // 4] - words[0x18 // 4] if ro_compat & BIGALLOC else 0
        if not 0 <= cluster_log <= 20:
            return None
        seeded = modern and words[0x60 // 4] & CSUM_SEED
        found = cls(
            block_bytes=block_bytes,
            inodes=words[0],
            blocks=words[1] | (words[0x150 // 4] << 32 if wide else 0),
            first_block=words[0x14 // 4],
            blocks_per_group=words[0x20 // 4],
            cluster_blocks=1 << cluster_log,
            inodes_per_group=words[0x28 // 4],
            write_seconds=words[0x30 // 4],
            inode_bytes=short[0x58 // 2] if modern else 128,
            group=short[0x5A // 2],
            compat=words[0x5C // 4] if modern else 0,
            incompat=words[0x60 // 4] if modern else 0,
            ro_compat=ro_compat,
            uuid=bytes(data[0x68:0x78]),
            reserved_blocks=short[0xCE // 2] if modern and words[0x5C // 4] & RESIZE_INODE else 0,
            hash_seed=(words[0xEC // 4], words[0xF0 // 4], words[0xF4 // 4], words[0xF8 // 4]),
            descriptor_bytes=short[0xFE // 2] if wide else 32,
            first_meta_group=words[0x104 // 4],
            make_seconds=words[0x108 // 4],
            journal_map=bytes(data[0x10C : 0x10C + 60]) if data[0xFD] == 1 else bytes(60),
            journal_bytes=words[0x14C // 4] | words[0x148 // 4] << 32 if data[0xFD] == 1 else 0,
            flags=words[0x160 // 4],
            kib_written=words[0x178 // 4] | words[0x17C // 4] << 32,
            backup_groups=(words[0x24C // 4], words[0x250 // 4]),
            orphan_inode=words[0x280 // 4] if modern and words[0x5C // 4] & ORPHAN_FILE else 0,
            seed=words[0x270 // 4] if seeded else raw(_native.crc32c(data[0x68:0x78])),
            summed=summed,
        )
        return found if found._is_sound() else None

    def _is_sound(self) -> bool:
        size = self.inode_bytes
        bits = 8 * self.block_bytes
        return (
            not self.incompat & ~INCOMPAT_KNOWN
            and 128 <= size <= self.block_bytes
            and not size & size - 1
            and GROUP_BLOCKS_MIN <= self.blocks_per_group <= bits * self.cluster_blocks
            and self.blocks_per_group % self.cluster_blocks == 0
            and 0 < self.inodes_per_group <= bits
            and self.first_block == (1 if self.block_bytes == 1024 else 0)
            and self.first_block < self.blocks < 1 << 48
            and 0 < self.groups <= GROUPS_MAX
            and self.inodes == self.groups * self.inodes_per_group
            and 32 <= self.descriptor_bytes <= self.block_bytes
            and not self.descriptor_bytes & self.descriptor_bytes - 1
            and self.descriptor_bytes >= (64 if self.incompat & WIDE else 32)
            and self.group < self.groups
            and self.groups * (self.table_blocks + 2) <= self.blocks
            and (self.groups <= PLAIN_GROUPS_MAX or bool(self.ro_compat & SPARSE_SUPER or self.backups_named))
        )

    @property
    def backups_named(self) -> bool:
        """Return whether the superblock names the groups of its backups, two at most."""
        return bool(self.compat & SPARSE_SUPER2)

    @cached_property
    def groups(self) -> int:
        """Return how many block groups there are."""
        return -(-(self.blocks - self.first_block) // self.blocks_per_group)

    @cached_property
    def table_blocks(self) -> int:
        """Return how many blocks the inode table of a group has."""
        return -(-self.inodes_per_group * self.inode_bytes // self.block_bytes)

    @property
    def inodes_per_block(self) -> int:
        """Return how many inodes a block of an inode table holds."""
        return self.block_bytes // self.inode_bytes

    @property
    def descriptors_per_block(self) -> int:
        """Return how many group descriptors a block holds."""
        return self.block_bytes // self.descriptor_bytes

    @cached_property
    def descriptor_blocks(self) -> int:
        """Return how many blocks all group descriptors take."""
        return -(-self.groups // self.descriptors_per_block)

    @property
    def plain_descriptor_blocks(self) -> int:
        """Return how many of them lie together behind the superblocks, not in meta groups."""
        if self.incompat & META_BG:
            return min(self.first_meta_group, self.descriptor_blocks)
        return self.descriptor_blocks

    def same_volume(self, other: Superblock) -> bool:
        """Return whether two superblocks are copies of one, by what never changes but by growing."""
        return (self.uuid, self.block_bytes, self.blocks_per_group, self.inodes_per_group) == (
            other.uuid,
            other.block_bytes,
            other.blocks_per_group,
            other.inodes_per_group,
        )

    def group_start(self, group: int) -> int:
        """Return the first block of a group."""
        return self.first_block + group * self.blocks_per_group

    def group_blocks(self, group: int) -> int:
        """Return how many blocks a group has; the last one may be short."""
        return min(self.blocks_per_group, self.blocks - self.group_start(group))

    def group_of(self, block: int) -> int:
        """Return the group that a block is in."""
        return (block - self.first_block) // self.blocks_per_group

    def has_super(self, group: int) -> bool:
        """Return whether a group starts with a superblock."""
        if self.backups_named:
            return group == 0 or group in self.backup_groups
        if group <= 1 or not self.ro_compat & SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def super_groups(self) -> Iterator[int]:
        """Yield the groups that start with a superblock, in order."""
        if self.backups_named:
            yield from sorted({0, *(group for group in self.backup_groups if 0 < group < self.groups)})
        elif not self.ro_compat & SPARSE_SUPER:
            yield from range(self.groups)
        else:
            powers = (base**power for base in (3, 5, 7) for power in range(23))
            yield from sorted({0, *(group for group in powers if group < self.groups)})

    def descriptor_places(self, index: int) -> list[int]:
        """Return the blocks that hold a block of group descriptors: the one in use, then its backups."""
        if index < self.plain_descriptor_blocks:
            return [self.group_start(group) + 1 + index for group in self.super_groups()]
        first = index * self.descriptors_per_block
        copies = (first, first + 1, first + self.descriptors_per_block - 1)
        return [
            self.group_start(group) + self.has_super(group)
            for group in dict.fromkeys(copies)
            if group < self.groups
        ]

    def is_reserved(self, index: int) -> bool:
        """Return whether a block so far behind the descriptors is kept for more of them."""
        return 0 <= index < self.reserved_blocks

    def overhead_blocks(self, group: int) -> int:
        """Return how many blocks superblock and descriptors take at the start of a group."""
        taken = 0
        if self.has_super(group):
            taken = 1 + self.plain_descriptor_blocks + self.reserved_blocks
        meta = group // self.descriptors_per_block
        if self.plain_descriptor_blocks <= meta < self.descriptor_blocks:
            place = group % self.descriptors_per_block
            taken += place in (0, 1, self.descriptors_per_block - 1)
        return taken


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


BLOCK_UNINIT, INODE_UNINIT = 0x2, 0x1
"""Flags of a group: its bitmap of blocks, or of inodes, was never written."""

_DESCRIPTOR = struct.Struct("<3I4HI4H")
_DESCRIPTOR_HIGH = struct.Struct("<3I4HI2HI")
assert (_DESCRIPTOR.size, _DESCRIPTOR_HIGH.size) == (32, 32)


@dataclass(frozen=True)
class GroupDescriptor:
    """What a block group has where.

    ::

        Byte 0x00  block of the block bitmap   0x04  of the inode bitmap   0x08  of the inode table
             0x0C  free blocks   0x0E  free inodes   0x10  directories   0x12  flags
             0x18  CRC-32C of the block bitmap, 0x1A  of the inode bitmap, low halves
             0x1C  inodes at the end of the table never used   0x1E  checksum with the group's number
             0x20  the upper halves of the same, with the feature 64bit
    """

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_blocks: int
    free_inodes: int
    flags: int
    block_bitmap_sum: int
    inode_bitmap_sum: int
    unused_inodes: int

    @classmethod
    def unpack(cls, superblock: Superblock, group: int, data: bytes) -> GroupDescriptor | None:
        """Return the descriptor of a group; None where the bytes are none of this group."""
        if superblock.summed:
            crc = _native.crc32c(group.to_bytes(4, "little"), raw(superblock.seed))
            crc = _native.crc32c(data[0x20:], _native.crc32c(b"\0\0", _native.crc32c(data[:0x1E], crc)))
            if raw(crc) & 0xFFFF != int.from_bytes(data[0x1E:0x20], "little"):
                return None
        low = _DESCRIPTOR.unpack_from(data)
        high = _DESCRIPTOR_HIGH.unpack_from(data, 32) if len(data) >= 64 else (0,) * 11
        found = cls(
            block_bitmap=low[0] | high[0] << 32,
            inode_bitmap=low[1] | high[1] << 32,
            inode_table=low[2] | high[2] << 32,
            free_blocks=low[3] | high[3] << 16,
            free_inodes=low[4] | high[4] << 16,
            flags=low[6] if superblock.ro_compat & (METADATA_CSUM | GDT_CSUM) else 0,
            block_bitmap_sum=low[8] | high[8] << 16,
            inode_bitmap_sum=low[9] | high[9] << 16,
            unused_inodes=low[10] | high[6] << 16,
        )
        first, end = superblock.first_block, superblock.blocks
        sound = (
            first < found.block_bitmap < end
            and first < found.inode_bitmap < end
            and first < found.inode_table <= end - superblock.table_blocks
            and found.free_blocks <= superblock.blocks_per_group
            and found.free_inodes <= superblock.inodes_per_group
            and found.unused_inodes <= superblock.inodes_per_group
        )
        return found if sound else None


EXTENT_MAGIC = 0xF30A
WRITTEN_BLOCKS_MAX = 32768
"""An extent that says it has more blocks has so many fewer, and they were never written."""


@dataclass(frozen=True)
class Extent:
    """Consecutive blocks of a file.

    ::

        Byte 0x00  first block in the file   0x04  blocks   0x06  first block of the volume, high   0x08  low
    """

    logical: int
    blocks: int
    start: int
    written: bool


@dataclass(frozen=True)
class ExtentNode:
    """A node of an extent tree: in the inode, or a block of its own.

    ::

        Byte 0x00  magic   0x02  entries   0x04  entries that fit   0x06  levels below   0x0C  the entries
        An entry above a leaf: 0x00  first block in the file   0x04  block of the node below, low   0x08  high
    """

    depth: int
    limit: int
    extents: tuple[Extent, ...]
    children: tuple[tuple[int, int], ...]

    @classmethod
    def unpack(cls, data: bytes) -> ExtentNode | None:
        """Return the node; None where the bytes are none."""
        magic, entries, limit, depth = struct.unpack_from("<4H", data)
        if magic != EXTENT_MAGIC or entries > limit or depth > 5 or 12 + 12 * limit > len(data):
            return None
        if depth:
            below = struct.iter_unpack("<IIHH", data[12 : 12 + 12 * entries])
            return cls(depth, limit, (), tuple((first, low | high << 32) for first, low, high, _ in below))
        extents = tuple(
            Extent(first, blocks - fresh * WRITTEN_BLOCKS_MAX, low | high << 32, not fresh)
            for first, blocks, high, low in struct.iter_unpack("<IHHI", data[12 : 12 + 12 * entries])
            for fresh in (blocks > WRITTEN_BLOCKS_MAX,)
        )
        return cls(depth, limit, extents, ())

    @property
    def first(self) -> int | None:
        """Return the first block in the file that the node speaks of; None where it is empty."""
        if self.children:
            return self.children[0][0]
        return self.extents[0].logical if self.extents else None


DIRECTORY, REGULAR, SYMLINK = 0x4000, 0x8000, 0xA000
KINDS = frozenset((0x1000, 0x2000, DIRECTORY, 0x6000, REGULAR, SYMLINK, 0xC000))
HUGE_FILE_FLAG, EXTENTS_FLAG, INLINE_FLAG = 0x40000, 0x80000, 0x1000_0000

_INODE = struct.Struct("<2H5I2H3I60s4I2H4x2H")
assert _INODE.size == 128


@dataclass(frozen=True)
class Inode:
    """A file, without its name.

    ::

        Byte 0x00  mode   0x04  size (low)   0x0C  changed   0x10  modified   0x14  deleted   0x1A  links
             0x1C  sectors (low)   0x20  flags   0x28  block map, or root of the extent tree (60 bytes)
             0x64  generation   0x68  block of attributes (low)   0x6C  size (high)   0x70  zero
             0x74  sectors (high)   0x76  block of attributes (high)   0x7C  checksum (low)
             0x80  bytes used from here   0x82  checksum (high)   0x84  changed, 0x88  modified: nanoseconds
             0x90  created   0x94  its nanoseconds
    """

    mode: int
    size: int
    sectors: int
    changed: int
    modified: int
    created: int
    deleted: int
    links: int
    flags: int
    block_map: bytes
    generation: int
    attributes: int
    checksum: int
    checksum_bits: int

    @classmethod
    def unpack(cls, data: bytes) -> Inode:
        """Return the inode that the bytes hold, be they ever so wrong. Times are in nanoseconds."""
        (
            mode, _, size, _, changed, modified, deleted, _, links, sectors, flags, _, block_map,
            generation, attributes, size_high, _, sectors_high, attributes_high, checksum, _,
        ) = _INODE.unpack_from(data)  # fmt: skip
        extra = int.from_bytes(data[0x80:0x82], "little") if len(data) > 128 else 0
        extra = min(extra, len(data) - 128)
        has_high = extra >= 4
        return cls(
            mode=mode,
            size=size | size_high << 32 if mode & 0xF000 in (REGULAR, DIRECTORY) else size,
            sectors=sectors | sectors_high << 32,
            changed=_time(data, changed, 0x84, extra),
            modified=_time(data, modified, 0x88, extra),
            created=_time(data, int.from_bytes(data[0x90:0x94], "little"), 0x94, extra) if extra >= 20 else 0,
            deleted=deleted,
            links=links,
            flags=flags,
            block_map=block_map,
            generation=generation,
            attributes=attributes | attributes_high << 32,
            checksum=checksum | (int.from_bytes(data[0x82:0x84], "little") << 16 if has_high else 0),
            checksum_bits=32 if has_high else 16,
        )

    @property
    def kind(self) -> int:
        """Return the type of the file, such as `DIRECTORY`."""
        return self.mode & 0xF000

    @property
    def is_used(self) -> bool:
        """Return whether the inode is a file that is not deleted."""
        return self.mode != 0 and self.links > 0

    def has_blocks(self) -> bool:
        """Return whether its block map names blocks, and is not the target of a link, a device, or data."""
        if self.flags & INLINE_FLAG or self.kind not in (REGULAR, DIRECTORY, SYMLINK):
            return False
        if self.kind == SYMLINK and not self.flags & EXTENTS_FLAG:
            return self.size >= 60
        return True


def _time(data: bytes, seconds: int, extra_at: int, extra_bytes: int) -> int:
    signed = seconds - (1 << 32 if seconds & 1 << 31 else 0)
    if extra_at + 4 > 128 + extra_bytes:
        return signed * 1_000_000_000
    extra = int.from_bytes(data[extra_at : extra_at + 4], "little")
    return (signed + ((extra & 3) << 32)) * 1_000_000_000 + (extra >> 2)
