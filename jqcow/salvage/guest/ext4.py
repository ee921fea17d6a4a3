"""An ext4 (or ext3, ext2) of the guest: its metadata tell their places by their checksums."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from jqcow.salvage.evidence import BlockSum, Certainty, FilePiece, Orphans, PlacedDisk, Placement, Volume
from jqcow.salvage.guest import crc_inverse, ext4_files, ext4_find
from jqcow.salvage.guest.ext4_choice import Candidate, Choice
from jqcow.salvage.guest.ext4_find import age
from jqcow.salvage.guest.ext4_folders import folder, hash_range
from jqcow.salvage.guest.ext4_journal import COMMIT, CSUM_V3, DESCRIPTOR, SUPERBLOCK, WIDE, JournalSuperblock
from jqcow.salvage.guest.ext4_marks import JOURNAL_MAGIC, Kind, Mark, Marker
from jqcow.salvage.guest.ext4_ondisk import (
    BLOCK_UNINIT,
    DIRECTORY,
    EXTENTS_FLAG,
    HAS_JOURNAL,
    HUGE_FILE_FLAG,
    INODE_UNINIT,
    PRIMARY_AT,
    RECOVER,
    SUPERBLOCK_BYTES,
    ExtentNode,
    Inode,
    Superblock,
)
from jqcow.salvage.guest.ext4_places import Known, Places
from jqcow.salvage.guest.ext4_volume import Volume4, descriptors_in

BLOCKS_TELLING = 16
"""So many blocks of a journal in one orphan do not look like another part of the file system."""

MARKED_MAX = 1 << 21
"""So many orphans are remembered: what comes after is not looked at, and memory has a bound."""

VARIANTS_MAX = 4096
"""So many ways to put an extent tree together are tried."""

_WITNESSES = {
    Kind.SUPERBLOCK: "superblock",
    Kind.DESCRIPTORS: "group descriptors",
    Kind.RESERVED: "reserved descriptors",
    Kind.INODES: "inode table",
    Kind.EXTENTS: "extent tree",
    Kind.DIRECTORY: "directory",
    Kind.ATTRIBUTES: "extended attributes",
    Kind.BITMAP: "bitmap",
    Kind.JOURNAL: "journal",
}


class Ext4:
    """One ext4 on the guest's disk.

    Args:
        superblock: any copy.
        volume: where it is.
        is_sure: whether it is there for certain.
    """

    def __init__(self, superblock: Superblock, volume: Volume, is_sure: bool) -> None:
        self._superblock = superblock
        self._offset = volume.offset
        self._is_sure = is_sure and superblock.summed
        self._name = f"{'ext4' if superblock.incompat & 0x40 else 'ext2 or ext3'} in {volume.name}"
        self._known = Known()
        self._marks: dict[int, list[Mark]] = {}
        self._zeros: dict[int, int] = {}
        self._marker: Marker | None = None
        self._learnt: set[int] = set()
        self._trees: dict[int, Inode] = {}
        self._journal_read: set[int] = set()
        self._bitmaps_sought: set[int] = set()
        self._nodes: dict[tuple[int, int], set[tuple[int, int]]] = {}

    @property
    def name(self) -> str:
        """Return what it is and where."""
        return self._name

    @property
    def uuid(self) -> bytes:
        """Return the file system's UUID."""
        return self._superblock.uuid

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield the orphans that tell where they belong; see `GuestStructure.place`."""
        if self._marker is None:
            self._scan(orphans)
        self._learn(disk, orphans)
        self._seek_bitmaps(disk, orphans)
        places = Places(self._superblock, self._offset, orphans.cluster_bytes, self._known)
        is_clean = not self._superblock.incompat & RECOVER
        choice = Choice(self._superblock, self._known, places, is_clean, orphans.read)
        by_offset: dict[int, list[Candidate]] = {}
        undecided: dict[tuple[int, ...], list[Candidate]] = {}
        for host_offset, marks in self._marks.items():
            choice.count(marks)
            found = places.of_orphan(marks, self._zeros[host_offset])
            if len(found) == 1:
                offset, support = found.popitem()
                by_offset.setdefault(offset, []).append(Candidate(host_offset, support))
            elif found:
                support = next(iter(found.values()))
                undecided.setdefault(tuple(found), []).append(Candidate(host_offset, support))
        choice.is_whole = (
            orphans.cluster_bytes >= BLOCKS_TELLING * self._superblock.block_bytes
            or not self._superblock.compat & HAS_JOURNAL
            or not self._misses(disk, choice)
        )
        for offset, candidates in by_offset.items():
            chosen = choice.choose(candidates)
            if chosen and self._is_free(disk, offset, orphans.cluster_bytes):
                yield self._placement(offset, chosen[0], orphans.cluster_bytes, chosen[1])
        for offsets, candidates in undecided.items():
            free = [
                offset
                for offset in offsets
                if offset not in by_offset and self._is_free(disk, offset, orphans.cluster_bytes)
            ]
            for offset, candidate in choice.share_out(free, offsets, candidates):
                yield self._placement(offset, candidate, orphans.cluster_bytes, Certainty.CERTAIN)

    def _misses(self, disk: PlacedDisk, choice: Choice) -> bool:
        """Return whether some of what the file system must have is neither placed nor an orphan."""
        superblock, known = self._superblock, self._known
        volume = Volume4(superblock, self._offset, disk)
        keys = {(mark.kind, mark.key) for marks in self._marks.values() for mark in marks}
        start = superblock.group_start(0) + 1 + superblock.plain_descriptor_blocks
        if superblock.groups > 1:
            for block in range(start, start + superblock.reserved_blocks):
                if (Kind.RESERVED, block) not in keys and volume.read(block) is None:
                    return True
        homes = []
        for group, table in known.tables.items():
            used = superblock.inodes_per_group - table.unused_inodes
            for index in range(-(-used // superblock.inodes_per_block)):
                number = group * superblock.inodes_per_group + index * superblock.inodes_per_block + 1
                homes.append(table.inode_table + index)
                if (
                    (Kind.INODES, number) not in keys
                    and number > 10
                    and volume.read(table.inode_table + index) is None
                ):
                    return True
        return choice.misses(homes)

    def _is_free(self, disk: PlacedDisk, offset: int, length: int) -> bool:
        return 0 <= offset < disk.size and disk.read(offset, min(length, disk.size - offset)) is None

    def _placement(self, offset: int, who: Candidate, length: int, certainty: Certainty) -> Placement:
        kinds = Counter(mark.kind for mark in who.support)
        witness = f"{self._name}: {_WITNESSES[kinds.most_common(1)[0][0]]}"
        most = Certainty.CERTAIN if self._is_sure else Certainty.LIKELY
        return Placement(offset, who.host_offset, length, min(certainty, most), witness)

    def _scan(self, orphans: Orphans) -> None:
        """Mark what tells what it is, and take in what needs no place: descriptors, newest superblock."""
        cluster_bytes = orphans.cluster_bytes
        self._marker = marker = Marker(self._superblock, self._offset, cluster_bytes)
        journal: JournalSuperblock | None = None
        newest = self._superblock
        for host_offset, data in orphans:
            marks = marker.marks(data)
            if not marks or len(self._marks) >= MARKED_MAX:
                continue
            self._marks[host_offset] = marks
            self._zeros[host_offset] = marker.zeros(data, marks)
            for mark in marks:
                block = data[mark.at : mark.at + self._superblock.block_bytes]
                if mark.kind is Kind.DESCRIPTORS:
                    self._known.take_descriptors(descriptors_in(self._superblock, mark.key, block))
                elif mark.kind is Kind.SUPERBLOCK and mark.key == 0:
                    found = Superblock.unpack(block[1024:2048] if len(block) > 1024 else block)
                    if found and age(found) > age(newest):
                        newest = found
                elif mark.kind is Kind.JOURNAL and mark.key == SUPERBLOCK:
                    journal = JournalSuperblock.unpack(block) or journal
        self._superblock = newest
        self._journal = journal or JournalSuperblock(0, 1, 0, 0, CSUM_V3 | WIDE, newest.uuid, 0)
        if self._journal.sequence and not newest.incompat & RECOVER:
            self._known.log.committed(self._journal.sequence - 1)
        for host_offset, marks in self._marks.items():
            for mark in marks:
                if mark.kind is Kind.JOURNAL and mark.key == COMMIT:
                    self._known.log.committed(mark.extra)
                if mark.kind is Kind.EXTENTS:
                    self._nodes.setdefault((mark.key, mark.extra), set()).add((mark.alone, mark.mapped))
            descriptors = [mark for mark in marks if mark.kind is Kind.JOURNAL and mark.key == DESCRIPTOR]
            data = orphans.read(host_offset) if descriptors else b""
            for mark in descriptors:
                self._known.log.add(data[mark.at : mark.at + self._superblock.block_bytes], self._journal)

    def _learn(self, disk: PlacedDisk, orphans: Orphans) -> None:
        """Take in what the placed part of the disk says."""
        data = disk.read(self._offset + PRIMARY_AT, SUPERBLOCK_BYTES)
        placed = Superblock.unpack(data) if data else None
        if placed and placed.same_volume(self._superblock):
            self._superblock = placed
        volume = Volume4(self._superblock, self._offset, disk)
        self._known.take_descriptors(volume.descriptors())
        for group, table in list(self._known.tables.items()):
            used = self._superblock.inodes_per_group - table.unused_inodes
            for index in range(-(-used // self._superblock.inodes_per_block)):
                block = table.inode_table + index
                if block not in self._learnt and volume.read(block) is not None:
                    self._learnt.add(block)
                    first = group * self._superblock.inodes_per_group + 1
                    for number, inode in volume.inodes_in(
                        block, first + index * self._superblock.inodes_per_block
                    ):
                        if inode.kind == DIRECTORY or inode.block_map[6] or inode.attributes:
                            self._trees[number] = inode
        nodes, folders = (Volume4(self._superblock, self._offset, disk) for _ in range(2))
        assert self._marker
        for number, inode in self._trees.items():
            seed = self._marker.inode_seed(number, inode.generation)
            self._known.take_inode(nodes, number, inode, seed)
            if inode.kind == DIRECTORY:
                self._known.folders[seed] = folder(folders, inode)
            if inode.block_map[6] == 1 and inode.flags & EXTENTS_FLAG:
                self._weigh_tree(inode, seed)
        self._hash_names(orphans)
        self._learn_journal(Volume4(self._superblock, self._offset, disk))

    def _hash_names(self, orphans: Orphans) -> None:
        """Find the hashes of names in blocks of directories whose index is placed."""
        size = self._superblock.block_bytes
        known = self._known
        for host_offset, marks in self._marks.items():
            for mark in marks:
                key = mark.key, mark.alone
                if mark.kind is Kind.DIRECTORY and not mark.extra and key not in known.hash_ranges:
                    sought = known.folders.get(mark.key)
                    if sought and sought.leaves:
                        block = orphans.read(host_offset)[mark.at : mark.at + size]
                        known.hash_ranges[key] = hash_range(self._superblock, block)

    def _weigh_tree(self, inode: Inode, seed: int) -> None:
        """Find the nodes of a tree that together map as many blocks as the inode counts."""
        root = ExtentNode.unpack(inode.block_map)
        superblock = self._superblock
        if root is None or seed in self._known.whole_trees or superblock.cluster_blocks > 1:
            return
        unit = 1 if inode.flags & HUGE_FILE_FLAG else superblock.block_bytes // 512
        mapped = inode.sectors // unit - len(root.children) - bool(inode.attributes)
        variants = [sorted(self._nodes.get((seed, logical), ())) for logical, _ in root.children]
        if not variants or math.prod(map(len, variants)) > VARIANTS_MAX:
            return
        fitting = [
            chosen for chosen in itertools.product(*variants) if sum(blocks for _, blocks in chosen) == mapped
        ]
        if len(fitting) == 1:
            self._known.whole_trees.add(seed)
            for (logical, _), (content, _) in zip(root.children, fitting[0], strict=True):
                self._known.sound_nodes.add((seed, logical, content))

    def _learn_journal(self, volume: Volume4) -> None:
        superblock = self._superblock
        if not superblock.compat & HAS_JOURNAL or not any(superblock.journal_map):
            return
        by_extents = superblock.journal_map[:2] == b"\x0a\xf3"
        runs = [run for run in volume.mapped(superblock.journal_map, by_extents) if not run.is_metadata]
        self._known.journal = [(run.start, run.blocks) for run in runs]
        for run in runs:
            for block in range(run.start, run.start + run.blocks):
                data = volume.read(block) if block not in self._journal_read else None
                if data is not None:
                    self._journal_read.add(block)
                    self._take_journal_block(data)

    def _take_journal_block(self, data: bytes) -> None:
        if data[:4] != JOURNAL_MAGIC:
            self._known.log.take_placed(crc_inverse.alone(data))
        elif data[4:8] == bytes([0, 0, 0, SUPERBLOCK]):
            self._journal = JournalSuperblock.unpack(data) or self._journal
        elif data[4:8] == bytes([0, 0, 0, DESCRIPTOR]):
            self._known.log.add(data, self._journal)
        elif data[4:8] == bytes([0, 0, 0, COMMIT]):
            self._known.log.committed(int.from_bytes(data[8:12]))

    def _seek_bitmaps(self, disk: PlacedDisk, orphans: Orphans) -> None:
        """Mark the bitmaps whose checksums stand in descriptors that are placed, and not sought before."""
        superblock = self._superblock
        if not superblock.summed or superblock.descriptor_bytes < 64 or self._marker is None:
            return
        sought: dict[tuple[int, int], list[int]] = {}
        lengths = (
            superblock.blocks_per_group // superblock.cluster_blocks // 8,
            superblock.inodes_per_group // 8,
        )
        for group, descriptor in Volume4(superblock, self._offset, disk).descriptors():
            for of_inodes, (block, checksum, flag) in enumerate(
                (
                    (descriptor.block_bitmap, descriptor.block_bitmap_sum, BLOCK_UNINIT),
                    (descriptor.inode_bitmap, descriptor.inode_bitmap_sum, INODE_UNINIT),
                )
            ):
                before = crc_inverse.forward(lengths[of_inodes])(superblock.seed)
                if block not in self._bitmaps_sought and not descriptor.flags & flag and checksum:
                    self._bitmaps_sought.add(block)
                    sought.setdefault((checksum ^ before, of_inodes), []).append(block)
        for of_inodes, length in enumerate(lengths):
            for byte in (b"\0", b"\xff"):
                sought.pop((crc_inverse.alone(byte * length), of_inodes), None)
        if not sought:
            return
        self._known.bitmaps.update(sought)
        for host_offset, data in orphans:
            for mark in self._marker.bitmaps(data, sought):
                self._marks.setdefault(host_offset, []).append(mark)
                self._zeros.setdefault(host_offset, 0)

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what is in use, as far as it is placed; see `GuestStructure.pieces`."""
        return ext4_files.pieces(Volume4(self._superblock, self._offset, disk), self._known.tables)

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        """Yield what the bitmaps of blocks have free; see `GuestStructure.free`."""
        return ext4_files.free(Volume4(self._superblock, self._offset, disk))

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        """Yield nothing: an ext4 keeps no checksums of file data."""
        return iter(())


def find(volumes: Sequence[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[Ext4]:
    """Yield every ext4 that a superblock tells of, on the disk or in an orphan.

    Args:
        volumes: where one may lie, as far as that is known.
        disk: what is placed.
        orphans: what is not.
    """
    for superblock, volume, is_sure in ext4_find.found(volumes, disk, orphans):
        yield Ext4(superblock, volume, is_sure)
