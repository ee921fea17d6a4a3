"""What btrfs writes on a device, as far as salvage reads it. All numbers are little-endian.

The superblock, 4096 bytes, at 64 KiB, 64 MiB and 256 GiB of the device::

    Byte   0 -  31:   checksum of bytes 32 - 4095; a CRC-32C fills the first four
          32 -  47:   fsid
          48 -  55:   bytenr: where this copy lies on the device
          64 -  71:   magic, "_BHRfS_M"
          72 -  79:   generation: the transaction that wrote it
          80 -  87:   root: logical address of the root of the tree of roots
          88 -  95:   chunk_root: the same of the chunk tree
          96 - 103:   log_root: the same of the tree of logs, or 0
         136 - 143:   num_devices
         144 - 147:   sectorsize
         148 - 151:   nodesize
         160 - 163:   length of the array of system chunks
         164 - 171:   chunk_root_generation
         188 - 195:   incompat flags
         196 - 197:   csum_type: 0 is CRC-32C
         201 - 298:   the device: devid (8 bytes), total_bytes (8 bytes), ...
         571 - 586:   metadata_uuid: takes the place of fsid in nodes, where incompat bit 10 is set
         811 - 2858:  array of system chunks: pairs of a key and a chunk
        2859 - 3530:  four backups of roots, of the last four transactions

A backup of roots has 168 bytes, first of all pairs of logical address and generation (8 bytes each): of the
tree of roots, the chunk tree, the extent tree, the main file tree, the device tree, the checksum tree.

A node of a tree begins with a header::

    Byte   0 -  31:   checksum of all that follows in the node
          32 -  47:   fsid, or metadata_uuid
          48 -  55:   bytenr: the logical address of the node
          80 -  87:   generation: the transaction that wrote it
          88 -  95:   owner: the tree that it was written for
          96 -  99:   nritems
               100:   level; 0 is a leaf

Then a leaf has items of 25 bytes: key, offset of the data (from the end of the header), length of the data;
another node has pointers of 33 bytes: key, logical address, generation. A key has 17 bytes: objectid
(8 bytes), type (1 byte), offset (8 bytes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jqcow import _native

SUPERBLOCK_BYTES = 4096
SUPERBLOCK_PLACES = (64 << 10, 64 << 20, 256 << 30)
MAGIC = b"_BHRfS_M"
MAGIC_OFFSET = 64
CRC_STRUCT = struct.Struct("<I")
CHECKSUM_BYTES = 32

SUPERBLOCK_STRUCT = struct.Struct("<16sQ8x8sQQQQ32xQIIIIIQ16xQH3xQQ")
"""From the fsid to the device's total_bytes."""

BACKUPS_OFFSET = 2859
BACKUP_COUNT = 4
BACKUP_BYTES = 168
BACKUP_STRUCT = struct.Struct("<QQ16xQQQQ16xQQ")

UUID_BYTES = 16
METADATA_UUID_OFFSET = 571
SYSTEM_CHUNKS_OFFSET = 811
SYSTEM_CHUNKS_BYTES_MAX = 2048

INCOMPAT_METADATA_UUID = 1 << 10
INCOMPAT_KNOWN = 0x1_0FFF
"""What changes nothing that is read here: not bit 12 (zoned), not bits 13 and above save simple quotas."""

SIZES = tuple(1 << bits for bits in range(12, 17))
"""What a sector and a node may have in bytes."""

HEADER_STRUCT = struct.Struct("<16sQ24xQQIB")
HEADER_BYTES = 101
ITEM_STRUCT = struct.Struct("<QBQII")
POINTER_STRUCT = struct.Struct("<QBQQQ")
KEY_STRUCT = struct.Struct("<QBQ")
LEVEL_MAX = 7

ROOT_TREE = 1
EXTENT_TREE = 2
CHUNK_TREE = 3
FS_TREE = 5
CHECKSUM_TREE = 7
LOG_TREE = (1 << 64) - 6
CHECKSUMS = (1 << 64) - 10
SUBVOLUMES = range(256, (1 << 64) - 256)

INODE_ITEM = 1
EXTENT_DATA = 108
EXTENT_CHECKSUM = 128
ROOT_ITEM = 132
EXTENT_ITEM = 168
METADATA_ITEM = 169
CHUNK_ITEM = 228

CHUNK_STRUCT = struct.Struct("<Q16xQ12xHH")
STRIPE_STRUCT = struct.Struct("<QQ16x")
STRIPES_MAX = 1 << 10
CHUNK_DATA = 1
CHUNK_DUP = 1 << 5
CHUNK_OTHER_PROFILES = 0x7D8
"""RAID of any kind: such a chunk is on several devices, or may be."""

ROOT_STRUCT = struct.Struct("<160xQ8xQ32xI")
ROOT_LEVEL_OFFSET = 238
INODE_STRUCT = struct.Struct("<8xQQ100xQIQI")
EXTENT_DATA_STRUCT = struct.Struct("<Q8xB3xB")
EXTENT_PLACE_STRUCT = struct.Struct("<QQQQ")
EXTENT_PLACE_OFFSET = 21
REGULAR_EXTENT = 1
EXTENT_STRUCT = struct.Struct("<8xQQ")
EXTENT_OF_TREE = 2


def _crc_is_right(data: bytes) -> bool:
    (crc,) = CRC_STRUCT.unpack_from(data)
    return bool(crc == _native.crc32c(memoryview(data)[CHECKSUM_BYTES:]))


@dataclass(frozen=True)
class Superblock:
    """A superblock whose checksum is right; see the module's text.

    ``other_roots`` are the extent tree, the main file tree and the checksum tree: address and generation.
    """

    fsid: bytes
    bytenr: int
    generation: int
    root: int
    chunk_root: int
    log_root: int
    sector_bytes: int
    node_bytes: int
    chunk_root_generation: int
    devid: int
    device_bytes: int
    node_uuid: bytes
    system_chunks: bytes
    other_roots: tuple[tuple[int, int], ...]

    @classmethod
    def unpack(cls, data: bytes) -> Superblock | None:
        """Read a superblock; None if it is none, or of a kind that salvage does not read.

        That is: other checksums than CRC-32C, several devices, zones, an unknown incompat flag.
        """
        if len(data) != SUPERBLOCK_BYTES or data[MAGIC_OFFSET : MAGIC_OFFSET + len(MAGIC)] != MAGIC:
            return None
        fields = SUPERBLOCK_STRUCT.unpack_from(data, CHECKSUM_BYTES)
        fsid, bytenr, _, generation, root, chunk_root, log_root, devices, sector, node = fields[:10]
        system_bytes, chunk_generation, incompat, checksum_type, devid, device_bytes = fields[12:]
        known = checksum_type == 0 and devices == 1 and not incompat & ~INCOMPAT_KNOWN
        sane = sector in SIZES and node in SIZES and sector <= node and bytenr in SUPERBLOCK_PLACES
        if not (known and sane and system_bytes <= SYSTEM_CHUNKS_BYTES_MAX and _crc_is_right(data)):
            return None
        own_uuid = data[METADATA_UUID_OFFSET : METADATA_UUID_OFFSET + UUID_BYTES]
        node_uuid = own_uuid if incompat & INCOMPAT_METADATA_UUID else fsid
        chunks = data[SYSTEM_CHUNKS_OFFSET : SYSTEM_CHUNKS_OFFSET + system_bytes]
        return cls(
            fsid, bytenr, generation, root, chunk_root, log_root, sector, node, chunk_generation,
            devid, device_bytes, node_uuid, chunks, _other_roots(data, root, generation),
        )  # fmt: skip


def _other_roots(data: bytes, root: int, generation: int) -> tuple[tuple[int, int], ...]:
    """Return address and generation of the trees that a backup names beside this tree of roots."""
    for index in range(BACKUP_COUNT):
        fields = BACKUP_STRUCT.unpack_from(data, BACKUPS_OFFSET + index * BACKUP_BYTES)
        if fields[:2] == (root, generation):
            return tuple(zip(fields[2::2], fields[3::2], strict=True))
    return ()


class Key(NamedTuple):
    """What items are sorted by."""

    objectid: int
    type: int
    offset: int


@dataclass(frozen=True)
class Node:
    """A node of a tree whose checksum is right, with all its bytes."""

    bytenr: int
    generation: int
    owner: int
    count: int
    level: int
    data: bytes

    @classmethod
    def unpack(cls, data: bytes, uuid: bytes) -> Node | None:
        """Read a node of the file system with this uuid; None if it is none."""
        if len(data) not in SIZES:
            return None
        found, bytenr, generation, owner, count, level = HEADER_STRUCT.unpack_from(data, CHECKSUM_BYTES)
        entry_bytes = POINTER_STRUCT.size if level else ITEM_STRUCT.size
        fits = level <= LEVEL_MAX and HEADER_BYTES + count * entry_bytes <= len(data)
        if found != uuid or not fits or not _crc_is_right(data):
            return None
        return cls(bytenr, generation, owner, count, level, data)

    def pointers(self) -> Iterator[tuple[Key, int, int]]:
        """Yield (key, logical address, generation) of the children of a node that is no leaf."""
        if self.level:
            entries = memoryview(self.data)[HEADER_BYTES : HEADER_BYTES + self.count * POINTER_STRUCT.size]
            for objectid, kind, offset, bytenr, generation in POINTER_STRUCT.iter_unpack(entries):
                yield Key(objectid, kind, offset), bytenr, generation

    def items(self, *kinds: int) -> Iterator[tuple[Key, bytes]]:
        """Yield (key, data) of the items of a leaf that are of these types; cut short where they leave it."""
        if not self.level:
            entries = memoryview(self.data)[HEADER_BYTES : HEADER_BYTES + self.count * ITEM_STRUCT.size]
            for objectid, kind, offset, place, length in ITEM_STRUCT.iter_unpack(entries):
                if kind in kinds:
                    start = HEADER_BYTES + place
                    yield Key(objectid, kind, offset), self.data[start : start + length]


@dataclass(frozen=True)
class Chunk:
    """A range of logical addresses, and where it lies on the device: once, or twice with the same content.

    Attributes:
        logical: address of the range.
        length: in bytes.
        places: physical offsets of the range on the device.
        is_data: the chunk has file data, and perhaps nodes too.
    """

    logical: int
    length: int
    places: tuple[int, ...]
    is_data: bool

    @classmethod
    def unpack(cls, logical: int, data: bytes, devid: int) -> tuple[Chunk | None, int]:
        """Read a chunk of one device.

        Args:
            logical: its address, from its key.
            data: the item; more may follow.
            devid: of the device.

        Returns:
            The chunk, or None if it is not on this device alone; and how many bytes the item has, 0 if it is
            cut short.
        """
        if len(data) < CHUNK_STRUCT.size:
            return None, 0
        length, kind, stripe_count, _ = CHUNK_STRUCT.unpack_from(data)
        item_bytes = CHUNK_STRUCT.size + stripe_count * STRIPE_STRUCT.size
        if not 0 < stripe_count <= STRIPES_MAX or len(data) < item_bytes:
            return None, 0
        stripes = list(STRIPE_STRUCT.iter_unpack(data[CHUNK_STRUCT.size : item_bytes]))
        count = 2 if kind & CHUNK_DUP else 1
        alone = not kind & CHUNK_OTHER_PROFILES and all(owner == devid for owner, _ in stripes)
        if not alone or stripe_count != count:
            return None, item_bytes
        places = tuple(offset for _, offset in stripes)
        return cls(logical, length, places, bool(kind & CHUNK_DATA)), item_bytes


@dataclass(frozen=True)
class Root:
    """A tree, as the tree of roots names it."""

    generation: int
    bytenr: int
    reference_count: int

    @classmethod
    def unpack(cls, data: bytes) -> Root | None:
        """Read a root item; None if it is cut short."""
        if len(data) <= ROOT_LEVEL_OFFSET:
            return None
        return cls(*ROOT_STRUCT.unpack_from(data))


@dataclass(frozen=True)
class Inode:
    """What is used of an inode: its length in bytes, and when it was changed, by transaction and by clock."""

    generation: int
    length: int
    changed_ns: int

    @classmethod
    def unpack(cls, data: bytes) -> Inode | None:
        """Read an inode item; None if it is cut short."""
        if len(data) < INODE_STRUCT.size:
            return None
        generation, length, changed_s, changed_ns, modified_s, modified_ns = INODE_STRUCT.unpack_from(data)
        seconds, rest_ns = max((changed_s, changed_ns), (modified_s, modified_ns))
        return cls(generation, length, seconds * 1_000_000_000 + rest_ns)


@dataclass(frozen=True)
class FileExtent:
    """A range of a file that has an extent on the device.

    Attributes:
        generation: the transaction that wrote it.
        is_compressed: its whole extent belongs to it.
        bytenr: logical address of the extent.
        extent_bytes: length of the extent.
        offset: of the range in the extent, before compression.
        length: of the range in the file.
    """

    generation: int
    is_compressed: bool
    bytenr: int
    extent_bytes: int
    offset: int
    length: int

    @classmethod
    def unpack(cls, data: bytes) -> FileExtent | None:
        """Read a file extent item; None if it is inline, a hole, not written yet, or cut short."""
        if len(data) < EXTENT_PLACE_OFFSET + EXTENT_PLACE_STRUCT.size:
            return None
        generation, compression, kind = EXTENT_DATA_STRUCT.unpack_from(data)
        bytenr, extent_bytes, offset, length = EXTENT_PLACE_STRUCT.unpack_from(data, EXTENT_PLACE_OFFSET)
        if kind != REGULAR_EXTENT or not bytenr:
            return None
        return cls(generation, compression != 0, bytenr, extent_bytes, offset, length)

    def on_device(self) -> tuple[int, int] | None:
        """Return (logical address, length) of what the range has on the device; None if it is not in it."""
        if self.is_compressed:
            return self.bytenr, self.extent_bytes
        if self.offset + self.length > self.extent_bytes:
            return None
        return self.bytenr + self.offset, self.length
