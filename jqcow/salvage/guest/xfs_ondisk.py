"""XFS version 5 on disk: the superblock, headers of allocation groups, inodes, extents, and blocks that name
their own address.

All numbers are big-endian, checksums alone are little-endian. A *block* is the file system's; addresses in
blocks' headers count 512 bytes (BASIC_BYTES) from the start of the file system.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jqcow import _native

BASIC_BYTES = 512
GROUP_BYTES_MIN = 16 << 20
GROUPS_MAX = 1 << 20
_LINK_BYTES_MAX = 1024
INODES = "XFS inodes"
NULL_LSN = 0xFFFF_FFFF_FFFF_FFFF

_FEATURE_SPARSE_INODES = 1 << 1
_FEATURE_META_UUID = 1 << 2
# ftype, sparse inodes, meta UUID, bigtime, needs repair, large extent counts, exchange of ranges, parents.
_FEATURES_KNOWN = 0xFF


def sum_is_right(data: bytes, crc_at: int) -> bool:
    """Return whether the CRC-32C at an offset of a structure is that of the structure with zeros there."""
    crc = _native.crc32c(data[:crc_at])
    crc = _native.crc32c(bytes(4), crc)
    crc = _native.crc32c(data[crc_at + 4 :], crc)
    return crc.to_bytes(4, "little") == data[crc_at : crc_at + 4]


@dataclass(frozen=True)
class Superblock:
    """Geometry of a file system; each allocation group starts with a copy.

    Byte   0 -   3  magic, "XFSB"
           4 -   7  bytes in a block
           8 -  15  blocks in the file system
          16 -  23  blocks in the realtime part
          32 -  47  UUID
          48 -  55  block of the log; 0: on another device
          56 -  79  inodes: root, realtime bitmap, realtime summary
          84 -  87  blocks in an allocation group
          88 -  91  allocation groups
          96 -  99  blocks in the log
         100 - 101  version in the low four bits
         102 - 103  bytes in a sector
         104 - 105  bytes in an inode
         106 - 107  inodes in a block
         120 - 124  logarithms: block, sector, inode, inodes in a block, blocks in a group
         126        1 while mkfs works
         160 - 175  inodes of quotas of users and groups
         192        logarithm of blocks in a directory block
         216 - 219  incompatible features
         224 - 227  CRC-32C of the sector
         232 - 239  inode of quotas of projects
         248 - 263  UUID in metadata, if a feature says so
    """

    block_bytes: int
    block_count: int
    uuid: bytes
    log_block: int
    system_inodes: tuple[int, ...]
    root_inode: int
    group_blocks: int
    group_count: int
    log_blocks: int
    sector_bytes: int
    inode_bytes: int
    inode_bits: int
    group_bits: int
    directory_bytes: int
    has_realtime: bool
    has_sparse_inodes: bool
    lsn: int

    STRUCT = struct.Struct(">4sIQQ8x16sQQQQ4xII4xIHHHH12xBBBBB35xQQ16xB23xI4xI4xQQ16s")
    MAGIC = b"XFSB"

    @classmethod
    def unpack(cls, data: bytes) -> Superblock | None:
        """Read a superblock with its checksum; None if it is none, or has what is not known here."""
        if data[:4] != cls.MAGIC or len(data) < cls.STRUCT.size:
            return None
        (_, block_bytes, block_count, realtime_blocks, uuid, log_block, root, bitmap, summary, group_blocks,
         group_count, log_blocks, version, sector_bytes, inode_bytes, per_block, block_log, _, _, inode_bits,
         group_bits, user_quota, group_quota, directory_log, features, _, project_quota,
         lsn, meta_uuid) = cls.STRUCT.unpack_from(data)  # fmt: skip
        if version & 0xF != 5 or features & ~_FEATURES_KNOWN:
            return None
        if sector_bytes not in (512, 1024, 2048, 4096, 8192, 16384, 32768) or len(data) < sector_bytes:
            return None
        if not 9 <= block_log <= 16 or block_bytes != 1 << block_log or block_log + directory_log > 16:
            return None
        if inode_bytes not in (256, 512, 1024, 2048) or per_block != block_bytes // inode_bytes:
            return None
        if per_block != 1 << inode_bits or not 1 <= group_count <= GROUPS_MAX:
            return None
        if group_blocks * block_bytes < GROUP_BYTES_MIN or group_blocks > 1 << 31:
            return None
        if group_bits != (group_blocks - 1).bit_length() or block_count > group_count * group_blocks:
            return None
        if block_count <= (group_count - 1) * group_blocks or log_blocks > group_blocks:
            return None
        if not sum_is_right(data[:sector_bytes], 224):
            return None
        return cls(
            block_bytes, block_count, meta_uuid if features & _FEATURE_META_UUID else uuid, log_block,
            (bitmap, summary, user_quota, group_quota, project_quota), root, group_blocks, group_count,
            log_blocks, sector_bytes, inode_bytes, inode_bits, group_bits, block_bytes << directory_log,
            realtime_blocks > 0, bool(features & _FEATURE_SPARSE_INODES), lsn,
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Return the length of the file system in bytes."""
        return self.block_count * self.block_bytes

    def group_offset(self, group: int) -> int:
        """Return where an allocation group starts in the file system, in bytes."""
        return group * self.group_blocks * self.block_bytes

    def block_offset(self, block: int) -> int | None:
        """Return where a block lies, in bytes; its number has the group in the high bits."""
        group, inside = block >> self.group_bits, block & ((1 << self.group_bits) - 1)
        if inside >= self.group_blocks or (number := group * self.group_blocks + inside) >= self.block_count:
            return None
        return number * self.block_bytes

    def inode_offset(self, inode: int) -> int | None:
        """Return where an inode lies, in bytes."""
        start = self.block_offset(inode >> self.inode_bits)
        if start is None:
            return None
        return start + (inode & ((1 << self.inode_bits) - 1)) * self.inode_bytes


@dataclass(frozen=True)
class GroupSpace:
    """Header of an allocation group for free space (AGF).

    Byte   0 -   3  magic, "XAGF"
           4 -   7  version, 1
           8 -  11  number of the group
          12 -  15  blocks of the group
          16 -  27  roots of the trees of free space by block, free space by length, owners
          28 -  39  their levels
          64 -  79  UUID
          88 -  95  root and levels of the tree of reference counts
         208 - 215  sequence number in the log
         216 - 219  CRC-32C of the sector
    """

    group: int
    roots: tuple[tuple[bytes, int, int], ...]
    lsn: int

    STRUCT = struct.Struct(">4sIII3I3I24x16s8xII112xQ")
    MAGIC = b"XAGF"

    @classmethod
    def unpack(cls, sector: bytes, superblock: Superblock) -> GroupSpace | None:
        """Read the header; None if it is not of this file system or its checksum is wrong."""
        if sector[:4] != cls.MAGIC or len(sector) != superblock.sector_bytes:
            return None
        (_, _, group, _, by_block, by_length, owners, block_levels, length_levels, owner_levels, uuid, counts,
         count_levels, lsn) = cls.STRUCT.unpack_from(sector)  # fmt: skip
        if group >= superblock.group_count or uuid != superblock.uuid or not sum_is_right(sector, 216):
            return None
        roots = (
            (b"AB3B", by_block, block_levels),
            (b"AB3C", by_length, length_levels),
            (b"RMB3", owners, owner_levels),
            (b"R3FC", counts, count_levels),
        )
        return cls(group, roots, lsn)


@dataclass(frozen=True)
class GroupInodes:
    """Header of an allocation group for inodes (AGI).

    Byte   0 -   3  magic, "XAGI"
           8 -  11  number of the group
          20 -  27  root and levels of the tree of inodes
         296 - 311  UUID
         312 - 315  CRC-32C of the sector
         320 - 327  sequence number in the log
         328 - 335  root and levels of the tree of free inodes
    """

    group: int
    roots: tuple[tuple[bytes, int, int], ...]
    lsn: int

    STRUCT = struct.Struct(">4s4xI8xII268x16s8xQII")
    MAGIC = b"XAGI"

    @classmethod
    def unpack(cls, sector: bytes, superblock: Superblock) -> GroupInodes | None:
        """Read the header; None if it is not of this file system or its checksum is wrong."""
        if sector[:4] != cls.MAGIC or len(sector) != superblock.sector_bytes:
            return None
        _, group, root, levels, uuid, lsn, free_root, free_levels = cls.STRUCT.unpack_from(sector)
        if group >= superblock.group_count or uuid != superblock.uuid or not sum_is_right(sector, 312):
            return None
        return cls(group, ((b"IAB3", root, levels), (b"FIB3", free_root, free_levels)), lsn)


@dataclass(frozen=True)
class Chunk:
    """64 inodes of a group, a record of the tree of inodes.

        Byte   0 -   3  first inode, in the group
               4 -   5  sparse inodes: a bit for each 4 inodes that have no place
               8 -  15  a bit for each inode that is free

    Attributes:
        first: number of the first in its group.
        free: bits of inodes that are free.
        missing: bits of inodes that have no place on disk.
    """

    first: int
    free: int
    missing: int

    STRUCT = struct.Struct(">IHxxQ")
    INODES = 64

    @classmethod
    def unpack_all(cls, records: bytes, superblock: Superblock) -> Iterator[Chunk]:
        """Yield the chunks of a leaf."""
        for first, holes, free in cls.STRUCT.iter_unpack(records[: len(records) // 16 * 16]):
            missing = 0
            if superblock.has_sparse_inodes:
                missing = sum(0xF << 4 * bit for bit in range(16) if holes >> bit & 1)
            yield cls(first, free, missing)


@dataclass(frozen=True)
class Extent:
    """A run of blocks of a file: 128 bits.

    Bit 127 says that it was not written yet; 54 bits of the block in the file; 52 bits of the block in the
    file system; 21 bits of how many.
    """

    unwritten: bool
    file_block: int
    block: int
    block_count: int

    STRUCT = struct.Struct(">QQ")

    @classmethod
    def unpack_all(cls, data: bytes) -> Iterator[Extent]:
        """Yield the extents of a table."""
        for high, low in cls.STRUCT.iter_unpack(data[: len(data) // 16 * 16]):
            block = (high & 0x1FF) << 43 | low >> 21
            yield cls(bool(high >> 63), high >> 9 & (1 << 54) - 1, block, low & 0x1F_FFFF)


@dataclass(frozen=True)
class Fork:
    """Where an inode has its extents.

    Attributes:
        kind: 2: a table in the inode; 3: the root of a tree in the inode; others: no extents.
        data: of the inode that the fork has.
        extent_count: of the table.
    """

    kind: int
    data: bytes
    extent_count: int


@dataclass(frozen=True)
class Inode:
    """An inode of version 3.

    Byte   0 -   1  magic, "IN"
           2 -   3  mode
           4        version, 3
           5        kind of the data fork
          16 -  19  links
          24 -  31  extents of the data fork, if they are counted largely
          40 -  47  time of the last change of data
          56 -  63  size
          76 -  79  extents of the data fork; of the attribute fork, if they are counted largely
          80 -  81  extents of the attribute fork
          82        start of the attribute fork, in 8 bytes; 0: there is none
          83        kind of the attribute fork
          90 -  91  flags
         100 - 103  CRC-32C of the inode
         112 - 119  sequence number in the log
         120 - 127  more flags
         144 - 151  time of making
         152 - 159  number
         160 - 175  UUID
         176 -      forks
    """

    number: int
    mode: int
    links: int
    size: int
    changed_ns: int
    made_ns: int
    is_realtime: bool
    data_fork: Fork
    attribute_fork: Fork | None
    lsn: int

    STRUCT = struct.Struct(">2sHBB10xI4xQ8xQ8xQ12xIHBB6xH20xQQ16xQQ16s")
    MAGIC = b"IN"

    @classmethod
    def unpack(cls, data: bytes, superblock: Superblock) -> Inode | None:
        """Read an inode; None if it is not of this file system or its checksum is wrong."""
        if data[:2] != cls.MAGIC or len(data) != superblock.inode_bytes:
            return None
        (_, mode, version, kind, links, large_count, changed, size, count, attribute_count, fork_start,
         attribute_kind, flags, lsn, flags2, made, number, uuid) = cls.STRUCT.unpack_from(data)  # fmt: skip
        if version != 3 or uuid != superblock.uuid or not sum_is_right(data, 100):
            return None
        if flags2 & 1 << 4:
            count, attribute_count = large_count, count
        split = 176 + fork_start * 8 if fork_start else len(data)
        attributes = Fork(attribute_kind, data[split:], attribute_count) if split < len(data) else None
        is_big = bool(flags2 & 1 << 3)
        return cls(
            number, mode, links, size, nanoseconds(changed, is_big), nanoseconds(made, is_big),
            bool(flags & 1), Fork(kind, data[176:split], count), attributes, lsn,
        )  # fmt: skip


def nanoseconds(stamp: int, is_big: bool) -> int:
    """Return a time as nanoseconds since 1970; big ones count nanoseconds from 2**31 seconds before it."""
    if is_big:
        return stamp - (1 << 31) * 1_000_000_000
    seconds = stamp >> 32
    return (seconds - (seconds >> 31 << 32)) * 1_000_000_000 + (stamp & 0xFFFF_FFFF)


@dataclass(frozen=True)
class Header:
    """Where the header of a kind of block has what makes it certain.

    Attributes:
        witness: the kind, for people.
        address_at: offset of the block's address, 64 bits in BASIC_BYTES.
        lsn_at: of the sequence number in the log.
        uuid_at: of the UUID.
        crc_at: of the CRC-32C.
        is_directory: blocks of this kind may be as long as directory blocks.
        is_link: they are as long as what bytes 8 to 11 say of what follows the header of 56 bytes.
    """

    witness: str
    address_at: int
    lsn_at: int
    uuid_at: int
    crc_at: int
    is_directory: bool = False
    is_link: bool = False


def _group_tree(witness: str) -> Header:
    return Header(f"XFS tree of {witness}", 16, 24, 32, 52)


def _directory(witness: str) -> Header:
    return Header(f"XFS directory {witness}", 8, 16, 24, 4, is_directory=True)


def _hashed(witness: str, *, is_directory: bool) -> Header:
    return Header(f"XFS {witness}", 16, 24, 32, 12, is_directory)


HEADERS = {
    b"AB3B": _group_tree("free space"),
    b"AB3C": _group_tree("free space by length"),
    b"RMB3": _group_tree("owners"),
    b"R3FC": _group_tree("reference counts"),
    b"IAB3": _group_tree("inodes"),
    b"FIB3": _group_tree("free inodes"),
    b"BMA3": Header("XFS extent tree", 24, 32, 40, 64),
    b"XDB3": _directory("block"),
    b"XDD3": _directory("data"),
    b"XDF3": _directory("free index"),
    b"XARM": Header("XFS attribute value", 40, 48, 16, 12),
    b"XSLM": Header("XFS symbolic link", 40, 48, 16, 12, is_link=True),
}
"""Kinds of block by the magic in their first four bytes."""

HASHED_HEADERS = {
    b"\x3d\xf1": _hashed("directory leaf", is_directory=True),
    b"\x3d\xff": _hashed("directory leaf", is_directory=True),
    b"\x3e\xbe": _hashed("hash tree", is_directory=True),
    b"\x3b\xee": _hashed("attribute leaf", is_directory=False),
}
"""Kinds of block by the magic in bytes 8 and 9."""


@dataclass(frozen=True)
class Named:
    """A structure that names its own address.

    Attributes:
        start: of it in what was looked at.
        length: in bytes.
        address: in bytes from the start of the file system.
        lsn: its sequence number in the log; 0 if it has none.
        witness: its kind.
        is_proved: whether a checksum covers all of it.
    """

    start: int
    length: int
    address: int
    lsn: int
    witness: str
    is_proved: bool = True


Read = Callable[[int, int], bytes | None]
"""Give bytes by start and length, None where there are none."""


def named_in_block(read: Read, start: int, superblock: Superblock) -> Iterator[Named]:
    """Yield what in one block of a file system names its address.

    The checksums are checked; of a structure longer than a block that cannot be read whole, the first block
    is yielded without proof.
    """
    head = read(start, 64)
    if head is None:
        return
    if head[:4] == Superblock.MAGIC or head[:4] in (GroupSpace.MAGIC, GroupInodes.MAGIC, b"XAFL"):
        yield from _named_sectors(read, start, superblock)
    elif head[:2] == Inode.MAGIC:
        yield from _named_inodes(read, start, superblock)
    elif header := HEADERS.get(head[:4]) or HASHED_HEADERS.get(head[8:10]):
        lengths = _lengths(head, header, superblock)
        for length in lengths:
            data = read(start, length)
            if data is not None and sum_is_right(data, header.crc_at):
                yield from _named_by_header(data, start, header, superblock, is_proved=True)
                return
        if max(lengths) > superblock.block_bytes and (data := read(start, superblock.block_bytes)):
            yield from _named_by_header(data, start, header, superblock, is_proved=False)


def _lengths(head: bytes, header: Header, superblock: Superblock) -> set[int]:
    lengths = {superblock.block_bytes}
    if header.is_directory:
        lengths.add(superblock.directory_bytes)
    elif header.is_link and (target_bytes := int.from_bytes(head[8:12])) <= _LINK_BYTES_MAX:
        lengths.add(-(-(56 + target_bytes) // superblock.block_bytes) * superblock.block_bytes)
    return lengths


def _named_by_header(
    data: bytes, start: int, header: Header, superblock: Superblock, *, is_proved: bool
) -> Iterator[Named]:
    if data[header.uuid_at : header.uuid_at + 16] != superblock.uuid:
        return
    address = int.from_bytes(data[header.address_at : header.address_at + 8]) * BASIC_BYTES
    if address % superblock.block_bytes or address + len(data) > superblock.length:
        return
    lsn = int.from_bytes(data[header.lsn_at : header.lsn_at + 8])
    yield Named(start, len(data), address, 0 if lsn == NULL_LSN else lsn, header.witness, is_proved)


def _named_sectors(read: Read, start: int, superblock: Superblock) -> Iterator[Named]:
    """Yield the headers of a group, each in its own sector; the superblock does not say of which group."""
    sector_bytes = superblock.sector_bytes
    for at in range(start, start + min(4 * sector_bytes, superblock.block_bytes), sector_bytes):
        sector = read(at, sector_bytes)
        if sector is None:
            return
        if found := GroupSpace.unpack(sector, superblock):
            address = superblock.group_offset(found.group) + sector_bytes
            yield Named(at, sector_bytes, address, found.lsn, "XFS group header")
        elif inodes := GroupInodes.unpack(sector, superblock):
            address = superblock.group_offset(inodes.group) + 2 * sector_bytes
            yield Named(at, sector_bytes, address, inodes.lsn, "XFS group header")
        elif sector[:4] == b"XAFL" and sector[8:24] == superblock.uuid and sum_is_right(sector, 32):
            group = int.from_bytes(sector[4:8])
            if group < superblock.group_count:
                address = superblock.group_offset(group) + 3 * sector_bytes
                yield Named(at, sector_bytes, address, int.from_bytes(sector[24:32]), "XFS group header")


def _named_inodes(read: Read, start: int, superblock: Superblock) -> Iterator[Named]:
    for at in range(start, start + superblock.block_bytes, superblock.inode_bytes):
        data = read(at, superblock.inode_bytes)
        inode = Inode.unpack(data, superblock) if data is not None else None
        address = superblock.inode_offset(inode.number) if inode else None
        if inode and address is not None:
            yield Named(at, superblock.inode_bytes, address, inode.lsn, INODES)
