"""XFS version 5: nearly every block of metadata names its address, its file system, and has a CRC-32C.

XF1. A block is believed only with the file system's UUID, a right checksum and an address inside the file
    system; a tree's block only where it was looked for.
XF2. Where the file system starts is certain only if the disk itself shows it: a superblock or a group's
    header in its place, or no second place that it fits into.

Stale blocks in freed space name their own place as rightly as live ones. Copies in the log never pass for
blocks (see `xfs_log`); a copy of the file system in one of its own files does, but then two clusters claim
one place and neither is certain (see `claims`).
"""

from __future__ import annotations

import stat
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jqcow.salvage.evidence import (
    Certainty,
    FilePiece,
    Orphans,
    PlacedDisk,
    Placement,
    Volume,
)
from jqcow.salvage.guest.claims import Claims, Window, Word, windows
from jqcow.salvage.guest.filesystem import FileSystem
from jqcow.salvage.guest.growing import Growths
from jqcow.salvage.guest.starts import Found, Seen, Start, compatible, room, start_of
from jqcow.salvage.guest.xfs_log import RECORD_BYTES_MAX, logged_inodes, named_in_log
from jqcow.salvage.guest.xfs_ondisk import (
    HEADERS,
    INODES,
    Chunk,
    Extent,
    Fork,
    GroupInodes,
    GroupSpace,
    Inode,
    Named,
    Superblock,
    named_in_block,
    sum_is_right,
)

_SECTOR_BYTES_MAX = 32768
_GROUPS_TRIED = 4096
_LEVELS_MAX = 12


@dataclass(frozen=True)
class _Shape:
    """What blocks of a tree look like."""

    magic: bytes
    owner: bytes
    header_bytes: int
    key_bytes: int
    pointer_bytes: int
    record_bytes: int

    def pointers(self, block: bytes, count: int) -> Iterator[int]:
        """Yield the pointers of a block above the leaves: they stand behind the room for all keys."""
        fanout = (len(block) - self.header_bytes) // (self.key_bytes + self.pointer_bytes)
        at = self.header_bytes + fanout * self.key_bytes
        for start in range(at, at + min(count, fanout) * self.pointer_bytes, self.pointer_bytes):
            yield int.from_bytes(block[start : start + self.pointer_bytes])


class _Trees:
    """Trees of blocks as the placed disk has them."""

    def __init__(self, disk: PlacedDisk, start: int, superblock: Superblock) -> None:
        self._disk = disk
        self._start = start
        self._superblock = superblock
        self.blocks: list[int] = []
        """Offsets in the file system of the blocks that were read."""
        self.is_whole = True
        """False once a block could not be read."""

    def block(self, magic: bytes, offset: int | None, owner: bytes) -> bytes | None:
        """Return a block of a kind, if it is placed and is what was looked for: one owner alone has it."""
        data = None
        if offset is not None:
            data = self._disk.read(self._start + offset, self._superblock.block_bytes)
        header = HEADERS[magic]
        if (
            data is None
            or data[:4] != magic
            or data[header.uuid_at : header.uuid_at + 16 + len(owner)] != self._superblock.uuid + owner
            or int.from_bytes(data[header.address_at : header.address_at + 8]) * 512 != offset
            or not sum_is_right(data, header.crc_at)
        ):
            self.is_whole = False
            return None
        self.blocks.append(offset)
        return data

    def group_leaves(self, magic: bytes, group: int, root: int, levels: int) -> Iterator[bytes]:
        """Yield the records of the leaves of a tree whose pointers are blocks of its group.

        The number of levels is the header's.
        """
        key_bytes = {b"AB3B": 8, b"AB3C": 8, b"R3FC": 4, b"RMB3": 40}.get(magic, 4)
        record_bytes = {b"AB3B": 8, b"AB3C": 8, b"R3FC": 12, b"RMB3": 24}.get(magic, 16)
        base = self._superblock.group_offset(group)
        shape = _Shape(magic, group.to_bytes(4), 56, key_bytes, 4, record_bytes)
        yield from self._leaves(shape, [root], levels - 1, base)

    def extent_leaves(self, inode: int, pointers: list[int], level: int) -> Iterator[bytes]:
        """Yield the records of the leaves below pointers of an inode's tree of extents."""
        yield from self._leaves(_Shape(b"BMA3", inode.to_bytes(8), 72, 8, 8, 16), pointers, level, None)

    def _leaves(self, shape: _Shape, pointers: list[int], level: int, base: int | None) -> Iterator[bytes]:
        """Walk level by level; a block is read once, so that a loop of pointers ends."""
        room_bytes = self._superblock.block_bytes - shape.header_bytes
        seen: set[int] = set()
        while pointers and 0 <= level < _LEVELS_MAX:
            below: list[int] = []
            for pointer in pointers:
                if pointer in seen:
                    continue
                seen.add(pointer)
                block = self.block(shape.magic, self._offset(pointer, base), shape.owner)
                if block is None or int.from_bytes(block[4:6]) != level:
                    self.is_whole = False
                    continue
                count = int.from_bytes(block[6:8])
                if level == 0:
                    count = min(count, room_bytes // shape.record_bytes)
                    yield block[shape.header_bytes : shape.header_bytes + count * shape.record_bytes]
                else:
                    below += shape.pointers(block, count)
            pointers, level = below, level - 1

    def _offset(self, pointer: int, base: int | None) -> int | None:
        if base is None:
            return self._superblock.block_offset(pointer)
        offset = base + pointer * self._superblock.block_bytes
        return offset if pointer < self._superblock.group_blocks else None


class Xfs(FileSystem):
    """An XFS file system on the guest's disk."""

    kind = "XFS"

    def __init__(self, start: int, superblock: Superblock, certainty: Certainty, place: str) -> None:
        super().__init__(start, superblock.length, certainty, place)
        self._superblock = superblock
        self._claims: Claims | None = None
        self._inode_blocks: set[int] = set()
        self._sorted_blocks: list[int] | None = None

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield the orphans that name their place; they are looked through once."""
        if self._claims is None:
            self._claims = self._gathered(orphans)
        yield from self._claims.placements(disk, self._certainty)

    def _gathered(self, orphans: Orphans) -> Claims:
        claims = Claims(orphans.cluster_bytes)
        superblock = self._superblock
        step = superblock.block_bytes
        lone: list[tuple[int, int]] = []
        for window in windows(orphans, max(step, superblock.directory_bytes, RECORD_BYTES_MAX * 5 // 4)):
            if superblock.uuid not in window.content:
                continue
            first = self.start % step if len(window.content) > step else 0
            for at in range(first, len(window.content), step):
                named = list(named_in_block(window.read, at, superblock))
                self._take(claims, window, named)
                if not named and window.content[at : at + 4] == Superblock.MAGIC:
                    copy = Superblock.unpack(window.read(at, superblock.sector_bytes) or b"")
                    if copy is not None and copy.uuid == superblock.uuid:
                        lone.append((copy.lsn, window.host_offset + at))
            self._take(claims, window, named_in_log(window.content, window.read, superblock))
        lone.sort()
        if lone and (len(lone) == 1 or lone[-1][0] > lone[-2][0]):
            # Of superblocks with nothing beside them that tells of which group, the first is the one in use.
            word = Word(Certainty.LIKELY, "XFS superblock", lone[-1][0])
            claims.say(lone[-1][1], self.start, superblock.sector_bytes, word)
        return claims

    def _take(self, claims: Claims, window: Window, named: Iterable[Named]) -> None:
        for one in named:
            word = Word(Certainty.CERTAIN if one.is_proved else Certainty.LIKELY, one.witness, one.lsn)
            claims.say(window.host_offset + one.start, self.start + one.address, one.length, word)
            if one.witness == INODES:
                self._inode_blocks.add(one.address // self._superblock.block_bytes)

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield extents that were written, of all inodes that can be read, and what metadata occupies.

        A range that files share comes once for each of them.
        """
        superblock, growths = self._superblock, self._growths(disk)
        made = self._made(disk)
        if superblock.log_block and (log := superblock.block_offset(superblock.log_block)) is not None:
            yield self._metadata(log, superblock.log_blocks * superblock.block_bytes, (made, 0, log))
        for group in range(superblock.group_count):
            trees = _Trees(disk, self.start, superblock)
            base = superblock.group_offset(group)
            yield self._metadata(base, superblock.block_bytes, (made, 0, base))
            yield from self._of_inodes(disk, trees, group, growths)
            if (space := self._space(disk, group)) is not None:
                for magic, root, levels in space.roots:
                    for _ in trees.group_leaves(magic, group, root, levels):
                        pass
            for offset in trees.blocks:
                yield self._metadata(offset, superblock.block_bytes, (made, 0, offset))

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        """Yield what the trees of free space say, as far as they are placed."""
        superblock = self._superblock
        for group in range(superblock.group_count):
            if (space := self._space(disk, group)) is None:
                continue
            magic, root, levels = space.roots[0]
            base = self.start + superblock.group_offset(group)
            trees = _Trees(disk, self.start, superblock)
            for records in trees.group_leaves(magic, group, root, levels):
                for at in range(0, len(records), 8):
                    block, count = (int.from_bytes(records[i : i + 4]) for i in (at, at + 4))
                    if block + count <= superblock.group_blocks and count:
                        yield base + block * superblock.block_bytes, count * superblock.block_bytes

    def _metadata(self, offset: int, length: int, written: tuple[int, int, int]) -> FilePiece:
        return FilePiece(self.start + offset, length, length, written, is_data=False)

    def _space(self, disk: PlacedDisk, group: int) -> GroupSpace | None:
        sector_bytes = self._superblock.sector_bytes
        offset = self.start + self._superblock.group_offset(group) + sector_bytes
        sector = disk.read(offset, sector_bytes)
        found = GroupSpace.unpack(sector, self._superblock) if sector else None
        return found if found and found.group == group else None

    def _inode(self, disk: PlacedDisk, number: int) -> Inode | None:
        offset = self._superblock.inode_offset(number)
        if offset is None:
            return None
        data = disk.read(self.start + offset, self._superblock.inode_bytes)
        inode = Inode.unpack(data, self._superblock) if data else None
        return inode if inode and inode.number == number else None

    def _made(self, disk: PlacedDisk) -> int:
        root = self._inode(disk, self._superblock.root_inode)
        return root.made_ns if root else 0

    def _chunks(self, disk: PlacedDisk, group: int, trees: _Trees) -> Iterator[Chunk]:
        """Yield the inodes that a group has.

        Where the tree of inodes is not whole, the blocks of inodes that were seen have to do: among them
        may be some of inodes deleted long ago.
        """
        superblock = self._superblock
        sector_bytes, per_block = superblock.sector_bytes, 1 << superblock.inode_bits
        offset = self.start + superblock.group_offset(group) + 2 * sector_bytes
        sector = disk.read(offset, sector_bytes)
        header = GroupInodes.unpack(sector, superblock) if sector else None
        seen: set[int] = set()
        if header is not None and header.group == group:
            for magic, root, levels in header.roots:
                for records in trees.group_leaves(magic, group, root, levels):
                    for chunk in Chunk.unpack_all(records, superblock) if magic == b"IAB3" else ():
                        yield chunk
                        seen.update(range(chunk.first, chunk.first + Chunk.INODES, per_block))
            if trees.is_whole:
                return
        first_block = group * superblock.group_blocks
        if self._sorted_blocks is None:
            self._sorted_blocks = sorted(self._inode_blocks)
        begin = bisect_left(self._sorted_blocks, first_block)
        end = bisect_left(self._sorted_blocks, first_block + superblock.group_blocks)
        for block in self._sorted_blocks[begin:end]:
            first = (block - first_block) << superblock.inode_bits
            if first not in seen:
                yield Chunk(first, 0, -1 << per_block)

    def _growths(self, disk: PlacedDisk) -> Growths:
        growths = Growths()
        for inode in logged_inodes(lambda at, length: disk.read(self.start + at, length), self._superblock):
            growths.add(inode.number, inode.size, inode.changed_ns)
        return growths

    def _of_inodes(
        self, disk: PlacedDisk, trees: _Trees, group: int, growths: Growths
    ) -> Iterator[FilePiece]:
        superblock = self._superblock
        base = group << (superblock.group_bits + superblock.inode_bits)
        for chunk in self._chunks(disk, group, trees):
            block = -1
            for index in range(Chunk.INODES):
                number = base + chunk.first + index
                is_known = block == number >> superblock.inode_bits
                if chunk.missing >> index & 1 or (is_known and chunk.free >> index & 1):
                    continue
                inode = self._inode(disk, number)
                if inode is None:
                    continue
                block = number >> superblock.inode_bits
                if not is_known and (offset := superblock.block_offset(block)) is not None:
                    yield self._metadata(offset, superblock.block_bytes, (inode.made_ns, 0, offset))
                if not chunk.free >> index & 1 and inode.mode and inode.links:
                    yield from self._of_inode(trees, inode, growths)

    def _of_inode(self, trees: _Trees, inode: Inode, growths: Growths) -> Iterator[FilePiece]:
        """Yield pieces; the first was written when the file was made, what was appended when it changed.

        What of an extent was not written yet reads as zeros, where nothing else was there before.
        """
        superblock = self._superblock
        is_data = stat.S_ISREG(inode.mode) and inode.number not in superblock.system_inodes
        forks = [] if inode.is_realtime else [(inode.data_fork, is_data)]
        if inode.attribute_fork is not None:
            forks.append((inode.attribute_fork, False))
        for fork, fork_is_data in forks:
            for extent in _extents(trees, inode.number, fork):
                offset = superblock.block_offset(extent.block)
                if offset is None or not extent.block_count:
                    continue
                length = extent.block_count * superblock.block_bytes
                if offset + length > superblock.length:
                    continue
                at = extent.file_block * superblock.block_bytes
                written = (inode.changed_ns if at else inode.made_ns, inode.number, at)
                if not fork_is_data:
                    yield self._metadata(offset, length, written)
                elif extent.unwritten:
                    yield FilePiece(self.start + offset, length, 0, written)
                elif (valid := min(length, inode.size - at)) > 0:
                    length = -(-valid // superblock.block_bytes) * superblock.block_bytes
                    changed_ns, place = inode.changed_ns, self.start + offset
                    piece = FilePiece(place, length, valid, written, changed_ns=changed_ns)
                    yield from growths.parts(piece, superblock.block_bytes)


def _extents(trees: _Trees, inode: int, fork: Fork) -> Iterator[Extent]:
    if fork.kind == 2:
        yield from Extent.unpack_all(fork.data[: min(fork.extent_count * 16, len(fork.data))])
    elif fork.kind == 3 and len(fork.data) >= 4:
        level, count = int.from_bytes(fork.data[:2]), int.from_bytes(fork.data[2:4])
        fanout = (len(fork.data) - 4) // 16
        at = 4 + fanout * 8
        pointers = [int.from_bytes(fork.data[i : i + 8]) for i in range(at, at + min(count, fanout) * 8, 8)]
        for records in trees.extent_leaves(inode, pointers, level - 1):
            yield from Extent.unpack_all(records)


@dataclass(frozen=True)
class _Sight:
    """A superblock in an orphan.

    Attributes:
        inside: its offset in the cluster.
        group: which group's it is, where the header behind it tells.
    """

    superblock: Superblock
    inside: int
    group: int | None


def _sights(orphans: Orphans) -> Iterator[_Sight]:
    for window in windows(orphans, _SECTOR_BYTES_MAX * 2):
        at = window.content.find(Superblock.MAGIC)
        while at >= 0:
            data = window.read(at, 512) or b""
            superblock = None
            if at % 512 == 0 and len(data) == 512:
                sector_bytes = int.from_bytes(data[102:104])
                sector = window.read(at, sector_bytes) if sector_bytes <= _SECTOR_BYTES_MAX else None
                superblock = Superblock.unpack(sector) if sector else None
            if superblock is not None:
                behind = window.read(at + superblock.sector_bytes, superblock.sector_bytes)
                space = GroupSpace.unpack(behind, superblock) if behind else None
                yield _Sight(superblock, at, space.group if space else None)
            at = window.content.find(Superblock.MAGIC, at + 4)


def find(volumes: Sequence[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[Xfs]:
    """Yield the XFS file systems that volumes hold, from the placed disk and from superblocks in orphans.

    Args:
        volumes: where file systems may lie; the whole disk where none is known.
        disk: as far as it is placed.
        orphans: looked through once.
    """
    volumes = volumes or [Volume(0, disk.size, "the disk")]
    found: list[Found[Superblock]] = []
    for volume in volumes:
        superblock = _superblock_at(disk, volume.offset)
        if superblock and superblock.length <= room(volume, disk):
            start = Start(volume.offset, Certainty.CERTAIN, volume.name)
            found.append(Found(superblock, superblock.length, start))
    done = {one.geometry.uuid for one in found}
    sights: dict[bytes, list[_Sight]] = {}
    for sight in _sights(orphans):
        if sight.superblock.uuid not in done:
            sights.setdefault(sight.superblock.uuid, []).append(sight)
    for seen in sights.values():
        superblock = max((sight.superblock for sight in seen), key=lambda one: one.block_count)
        best = _start(superblock, seen, volumes, disk, orphans.cluster_bytes)
        if best is not None:
            found.append(Found(superblock, superblock.length, best))
    for one in compatible(found):
        yield Xfs(one.start.offset, one.geometry, one.start.certainty, one.start.name)


def _superblock_at(disk: PlacedDisk, offset: int) -> Superblock | None:
    head = disk.read(offset, 512)
    if head is None or head[:4] != Superblock.MAGIC:
        return None
    sector_bytes = int.from_bytes(head[102:104])
    sector = disk.read(offset, sector_bytes) if 512 <= sector_bytes <= _SECTOR_BYTES_MAX else None
    return Superblock.unpack(sector) if sector else None


def _start(
    superblock: Superblock,
    seen: list[_Sight],
    volumes: Sequence[Volume],
    disk: PlacedDisk,
    cluster_bytes: int,
) -> Start | None:
    facts = Seen(
        superblock.length,
        superblock.block_bytes,
        lambda start: _agree(seen, superblock, start, cluster_bytes),
        lambda start: _is_confirmed(superblock, start, disk),
    )
    return start_of(facts, volumes, disk, cluster_bytes)


def _agree(seen: list[_Sight], superblock: Superblock, start: int, cluster_bytes: int) -> bool:
    """Return whether a superblock lies in its cluster as it must if the file system starts there.

    Others may lie otherwise: copies in files.
    """
    return any(
        (start + superblock.group_offset(sight.group) - sight.inside) % cluster_bytes == 0
        for sight in seen
        if sight.group is not None
    ) or all(sight.group is None for sight in seen)


def _is_confirmed(superblock: Superblock, start: int, disk: PlacedDisk) -> bool:
    """Return whether the placed disk has the header of a group where it must be for that start."""
    sector_bytes = superblock.sector_bytes
    for group in range(min(superblock.group_count, _GROUPS_TRIED)):
        sector = disk.read(start + superblock.group_offset(group) + sector_bytes, sector_bytes)
        space = GroupSpace.unpack(sector, superblock) if sector else None
        if space is not None and space.group == group:
            return True
    return False
