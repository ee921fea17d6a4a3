"""The orphans in which blocks of an ext4 were found, and what they say whatever their places are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from itertools import chain

from jqcow.salvage.evidence import Orphans, PlacedDisk
from jqcow.salvage.guest import crc_inverse, ext4_log_places
from jqcow.salvage.guest.ext4_find import age
from jqcow.salvage.guest.ext4_folders import folder, hash_range
from jqcow.salvage.guest.ext4_journal import (
    COMMIT,
    CSUM_V3,
    DESCRIPTOR,
    SUPERBLOCK,
    WIDE,
    JournalSuperblock,
)
from jqcow.salvage.guest.ext4_log_places import LogPlaces, Spot
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
    REGULAR,
    SUPERBLOCK_BYTES,
    ExtentNode,
    Inode,
    Superblock,
)
from jqcow.salvage.guest.ext4_places import Known
from jqcow.salvage.guest.ext4_volume import Volume4, descriptors_in
from jqcow.salvage.guest.growing import Growths

MARKED_MAX = 1 << 21
"""So many orphans are remembered: what comes after is not looked at, and memory has a bound."""

JOURNAL_RUNS_MAX, JOURNAL_BLOCKS_MAX = 1 << 10, 1 << 22
"""No journal is in so many parts, or so large."""

COPIED_MAX = 1 << 16
"""So many copies of inodes are remembered of a journal that is placed."""

VARIANTS_MAX = 4096
"""So many ways to put an extent tree together are tried."""


class Index:
    """Grows with every look at the disk.

    Args:
        superblock: any copy.
        offset: of the volume on the disk, in bytes.
        orphans: read through once.

    Attributes:
        superblock: the newest copy that was seen.
        known: what was learnt.
        marks: of each orphan that has any, by host offset.
        zeros: a bit for each block of it that is zero, for orphans with inodes.
    """

    def __init__(self, superblock: Superblock, offset: int, orphans: Orphans) -> None:
        self.superblock = superblock
        self.known = Known()
        self.marks: dict[int, list[Mark]] = {}
        self.zeros: dict[int, int] = {}
        self._offset = offset
        self._orphans = orphans
        self._marker = Marker(superblock, offset, orphans.cluster_bytes)
        self._journal = JournalSuperblock(0, 1, 0, 0, CSUM_V3 | WIDE, superblock.uuid, 0)
        self._log_places = LogPlaces()
        self._nodes: dict[tuple[int, int], set[tuple[int, int]]] = {}
        self._tables_read: set[int] = set()
        self._trees: dict[int, Inode] = {}
        self._journal_read: set[int] = set()
        self._bitmaps_sought: set[int] = set()
        self._copied: list[tuple[int, int, Inode]] = []
        self._sequences: dict[int, int] = {}
        for host_offset, data in orphans:
            marks = self._marker.marks(data)
            if marks and len(self.marks) < MARKED_MAX:
                self.marks[host_offset] = marks
                self.zeros[host_offset] = self._marker.zeros(data, marks)
                for mark in marks:
                    self._take(mark, data[mark.at : mark.at + superblock.block_bytes])
        self._take_log()

    @property
    def is_clean(self) -> bool:
        """Return whether the journal has nothing that is not at home."""
        return not self.superblock.incompat & RECOVER

    def journal_offsets(self, spots: Mapping[tuple[int, int], list[Spot]]) -> dict[int, int]:
        """Return the likely guest offsets of orphans with blocks of the journal; see `ext4_log_places`."""
        size, place, number = self.superblock.block_bytes, {}, 0
        for start, count in self.known.journal:
            for block in range(start, min(start + count, start + self._journal.blocks - number)):
                place[number] = self._offset + block * size
                number += 1
        blocks = self._log_places.blocks(self._journal)
        return ext4_log_places.offsets(blocks, spots, place, self._orphans.cluster_bytes)

    def old_inodes(self) -> Iterator[tuple[int, Inode]]:
        """Yield (number, inode) of all copies of regular files' inodes, from journal and orphans."""
        yield from ((number, inode) for _, number, inode in self._copied)
        size = self.superblock.block_bytes
        for host_offset, marks in self.marks.items():
            tables = [mark.at for mark in marks if mark.kind is Kind.INODES]
            data = self._orphans.read(host_offset) if tables else b""
            for at in tables:
                yield from self._files_in(data[at : at + size])

    def growths(self) -> Growths:
        """Return how files grew, by the copies of inodes in the journal as far as that is placed."""
        growths = Growths()
        for _, number, inode in sorted(
            self._copied, key=lambda one: (self._sequences.get(one[0], 0), one[0])
        ):
            growths.add(number, inode.size, inode.changed)
        return growths

    def _files_in(self, block: bytes) -> Iterator[tuple[int, Inode]]:
        for number, inode in self._marker.inodes(block):
            if inode.kind == REGULAR and inode.has_blocks():
                yield number, inode

    def _take(self, mark: Mark, block: bytes) -> None:
        if mark.kind is Kind.DESCRIPTORS:
            self.known.take_descriptors(descriptors_in(self.superblock, mark.key, block))
        elif mark.kind is Kind.SUPERBLOCK and mark.key == 0:
            found = Superblock.unpack(block[PRIMARY_AT:][:1024] if len(block) > PRIMARY_AT else block)
            if found and age(found) > age(self.superblock):
                self.superblock = found
        elif mark.kind is Kind.JOURNAL and mark.key == SUPERBLOCK:
            self._journal = JournalSuperblock.unpack(block) or self._journal
        elif mark.kind is Kind.JOURNAL and mark.key == COMMIT:
            self.known.log.commit(mark.extra)
        elif mark.kind is Kind.EXTENTS:
            self._nodes.setdefault((mark.key, mark.extra), set()).add((mark.alone, mark.mapped))

    def _take_log(self) -> None:
        """Take the journal's descriptors in: only now it is known how to read them."""
        if self._journal.sequence and self.is_clean:
            self.known.log.expect(self._journal.sequence - 1)
        for host_offset, marks in self.marks.items():
            descriptors = [mark for mark in marks if mark.kind is Kind.JOURNAL and mark.key == DESCRIPTOR]
            data = self._orphans.read(host_offset) if descriptors else b""
            for mark in marks:
                if mark.kind is Kind.JOURNAL:
                    copied = []
                    if mark.key == DESCRIPTOR:
                        block = data[mark.at : mark.at + self.superblock.block_bytes]
                        copied = self.known.log.add(block, self._journal)
                    self._log_places.add(mark.key, mark.extra, (host_offset, mark.at), copied)

    def learn(self, disk: PlacedDisk) -> None:
        """Take in what is placed by now."""
        data = disk.read(self._offset + PRIMARY_AT, SUPERBLOCK_BYTES)
        placed = Superblock.unpack(data) if data else None
        if placed and placed.same_volume(self.superblock):
            self.superblock = placed
        volume, nodes, folders, journal = (Volume4(self.superblock, self._offset, disk) for _ in range(4))
        self.known.take_descriptors(volume.descriptors())
        self._read_tables(volume)
        for number, inode in self._trees.items():
            seed = self._marker.inode_seed(number, inode.generation)
            self.known.take_inode(nodes, inode, seed)
            if inode.kind == DIRECTORY:
                self.known.folders[seed] = folder(folders, inode)
            if inode.flags & EXTENTS_FLAG and inode.block_map[6] == 1:
                self._weigh_tree(inode, seed)
        self._hash_names()
        self._read_journal(journal)
        self.known.log.settle()
        if self.superblock.summed and self.superblock.descriptor_bytes >= 64:
            self._seek_bitmaps(volume)

    def _read_tables(self, volume: Volume4) -> None:
        """Remember the inodes whose trees or names have blocks of their own."""
        for first, block in self.known.table_blocks(self.superblock):
            if block not in self._tables_read and volume.read(block) is not None:
                self._tables_read.add(block)
                for number, inode in volume.inodes_in(block, first):
                    if inode.kind == DIRECTORY or inode.block_map[6] or inode.attributes:
                        self._trees[number] = inode

    def _weigh_tree(self, inode: Inode, seed: int) -> None:
        """Find the nodes of a tree that together map as many blocks as the inode counts."""
        root = ExtentNode.unpack(inode.block_map)
        superblock = self.superblock
        if root is None or seed in self.known.whole_trees or superblock.cluster_blocks > 1:
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
            self.known.whole_trees.add(seed)
            for (logical, _), (content, _) in zip(root.children, fitting[0], strict=True):
                self.known.sound_nodes.add((seed, logical, content))

    def _hash_names(self) -> None:
        """Find the hashes of names in blocks of directories whose index is placed."""
        size, known = self.superblock.block_bytes, self.known
        for host_offset, marks in self.marks.items():
            for mark in marks:
                key = mark.key, mark.alone
                if mark.kind is Kind.DIRECTORY and not mark.extra and key not in known.hash_ranges:
                    sought = known.folders.get(mark.key)
                    if sought and sought.leaves:
                        block = self._orphans.read(host_offset)[mark.at : mark.at + size]
                        known.hash_ranges[key] = hash_range(self.superblock, block)

    def _read_journal(self, volume: Volume4) -> None:
        """Find where the journal is, and read what is placed of it."""
        superblock = self.superblock
        if not superblock.compat & HAS_JOURNAL or not any(superblock.journal_map):
            return
        by_extents = superblock.journal_map[:2] == b"\x0a\xf3"
        mapped = itertools.islice(volume.mapped(superblock.journal_map, by_extents), 2 * JOURNAL_RUNS_MAX)
        runs = [run for run in mapped if not run.is_metadata]
        if len(runs) > JOURNAL_RUNS_MAX or sum(run.blocks for run in runs) > JOURNAL_BLOCKS_MAX:
            return
        self.known.journal = [(run.start, run.blocks) for run in runs]
        numbered = chain.from_iterable(range(run.start, run.start + run.blocks) for run in runs)
        for number, block in enumerate(numbered):
            data = volume.read(block) if block not in self._journal_read else None
            if data is not None:
                self._journal_read.add(block)
                self._take_journal_block(number, data)

    def _take_journal_block(self, number: int, data: bytes) -> None:
        """Take a block of the journal in, by its number there."""
        kind = int.from_bytes(data[4:8])
        if data[:4] != JOURNAL_MAGIC:
            self.known.log.take_placed(crc_inverse.alone(data))
            if self.superblock.summed and len(self._copied) < COPIED_MAX:
                self._copied += ((number, *found) for found in self._files_in(data))
        elif kind == SUPERBLOCK:
            self._journal = JournalSuperblock.unpack(data) or self._journal
        elif kind == DESCRIPTOR:
            first, length = self._journal.first, max(1, self._journal.blocks - self._journal.first)
            for behind, copy in enumerate(self.known.log.add(data, self._journal), 1):
                self._sequences[(number + behind - first) % length + first] = copy.sequence
        elif kind == COMMIT:
            self.known.log.commit(int.from_bytes(data[8:12]))

    def _seek_bitmaps(self, volume: Volume4) -> None:
        """Mark the bitmaps whose checksums stand in descriptors that are placed, and not sought before.

        A bitmap all of one bit is not sought: a file may have such a block too.
        """
        superblock = self.superblock
        sought: dict[tuple[int, int], list[int]] = {}
        lengths = self._marker.bitmap_bytes
        before = [crc_inverse.forward(length)(superblock.seed) for length in lengths]
        for _, found in volume.descriptors():
            bitmaps = (
                (found.block_bitmap, found.block_bitmap_sum, BLOCK_UNINIT),
                (found.inode_bitmap, found.inode_bitmap_sum, INODE_UNINIT),
            )
            for of_inodes, (block, checksum, flag) in enumerate(bitmaps):
                if block not in self._bitmaps_sought and not found.flags & flag:
                    self._bitmaps_sought.add(block)
                    sought.setdefault((checksum ^ before[of_inodes], of_inodes), []).append(block)
        for of_inodes, length in enumerate(lengths):
            for byte in (b"\0", b"\xff"):
                sought.pop((crc_inverse.alone(byte * length), of_inodes), None)
        if not sought:
            return
        self.known.bitmaps.update(sought)
        for host_offset, data in self._orphans:
            for mark in self._marker.bitmaps(data, sought):
                self.marks.setdefault(host_offset, []).append(mark)
                self.zeros.setdefault(host_offset, 0)
