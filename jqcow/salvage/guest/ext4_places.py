"""Where the marked blocks of an ext4 belong, and which of several orphans is the one at home.

EX1. A block in the journal is a copy: it never speaks for its home. Copies are told by the journal's own
    descriptors, and what these do not count is not decided when it could be a copy.
EX2. One orphan has one place. Blocks in it that name different places leave it without any.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jqcow.salvage.guest.ext4_folders import Folder
from jqcow.salvage.guest.ext4_journal import Log
from jqcow.salvage.guest.ext4_marks import Kind, Mark
from jqcow.salvage.guest.ext4_ondisk import GroupDescriptor, Inode, Superblock
from jqcow.salvage.guest.ext4_volume import Volume4

PLACES_TRIED_MAX = 64
"""A block that may be one of more, such as a block of a large directory, opens no place by itself."""

Range = tuple[int, int]
"""First block of the volume, and how many."""


@dataclass
class Known:
    """What was learnt of a file system, whatever the orphans' places are.

    Attributes:
        tables: descriptor of each group, from any copy: the places in it never change.
        nodes: blocks that may hold a node of an extent tree, by the inode's seed and first block in the file.
        folders: where the blocks of a directory are to be, by seed.
        hash_ranges: least and greatest hash of the names in a directory's block, by seed and content.
        attributes: blocks of extended attributes that an inode names.
        bitmaps: blocks of bitmaps, by what their checksum covers, alone, and 1 for inodes, 0 for blocks.
        sound_nodes: seed, first block in the file, and content of the nodes of extent trees that together
            map what the inode counts.
        whole_trees: seeds of the inodes whose nodes are all among them.
        journal: what the journal occupies.
    """

    tables: dict[int, GroupDescriptor] = field(default_factory=dict)
    nodes: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    folders: dict[int, Folder] = field(default_factory=dict)
    hash_ranges: dict[tuple[int, int], tuple[int, int] | None] = field(default_factory=dict)
    attributes: set[int] = field(default_factory=set)
    bitmaps: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    sound_nodes: set[tuple[int, int, int]] = field(default_factory=set)
    whole_trees: set[int] = field(default_factory=set)
    journal: list[Range] = field(default_factory=list)
    log: Log = field(default_factory=Log)
    _table_starts: list[tuple[int, int]] = field(default_factory=list)

    def take_descriptors(self, found: Iterable[tuple[int, GroupDescriptor]]) -> None:
        """Take descriptors in; the one with the fewest unused inodes is the newest."""
        for group, descriptor in found:
            known = self.tables.get(group)
            if known is None or descriptor.unused_inodes < known.unused_inodes:
                self.tables[group] = descriptor
        self._table_starts = sorted((known.inode_table, group) for group, known in self.tables.items())

    def table_blocks(self, superblock: Superblock) -> Iterator[tuple[int, int]]:
        """Yield (number of the first inode, block) of what is used of each inode table."""
        for group, table in self.tables.items():
            used = superblock.inodes_per_group - table.unused_inodes
            for index in range(-(-used // superblock.inodes_per_block)):
                number = group * superblock.inodes_per_group + index * superblock.inodes_per_block + 1
                yield number, table.inode_table + index

    def take_inode(self, volume: Volume4, inode: Inode, seed: int) -> None:
        """Take in where the blocks of a directory, or the nodes of a large file's tree, are to be."""
        for logical, block in volume.children(inode):
            self.nodes.setdefault((seed, logical), set()).add(block)
        if inode.attributes:
            self.attributes.add(inode.attributes)

    def table_at(self, block: int) -> tuple[int, int] | None:
        """Return (group, index in its inode table) of a block; None outside of tables."""
        index = bisect_right(self._table_starts, (block, 1 << 62)) - 1
        return (self._table_starts[index][1], block - self._table_starts[index][0]) if index >= 0 else None

    def in_journal(self, block: int) -> bool:
        """Return whether a block is the journal's."""
        return any(start <= block < start + count for start, count in self.journal)


class Places:
    """Finds the places of marked orphans.

    Args:
        superblock: any copy.
        offset: of the volume on the disk, in bytes.
        cluster_bytes: length of an orphan.
        known: what was learnt; may grow afterwards.
    """

    def __init__(self, superblock: Superblock, offset: int, cluster_bytes: int, known: Known) -> None:
        self._superblock = superblock
        self._offset = offset
        self._cluster = cluster_bytes
        self._known = known

    def of_mark(self, mark: Mark) -> list[Range] | None:
        """Return where a block may belong, the one in use first; None where nothing is known of it."""
        superblock, known = self._superblock, self._known
        match mark.kind:
            case Kind.SUPERBLOCK:
                return [(superblock.group_start(mark.key), 1)]
            case Kind.DESCRIPTORS:
                return [(block, 1) for block in superblock.descriptor_places(mark.key)]
            case Kind.RESERVED:
                return [(mark.key, 1)]
            case Kind.INODES:
                group, index = divmod(mark.key - 1, superblock.inodes_per_group)
                table = known.tables.get(group)
                return [(table.inode_table + index // superblock.inodes_per_block, 1)] if table else None
            case Kind.EXTENTS:
                blocks = known.nodes.get((mark.key, mark.extra))
                if (
                    mark.key in known.whole_trees
                    and (mark.key, mark.extra, mark.alone) not in known.sound_nodes
                ):
                    return None
                return [(block, 1) for block in sorted(blocks)] if blocks else None
            case Kind.DIRECTORY:
                return self._of_directory(mark)
            case Kind.ATTRIBUTES:
                return [(mark.key, 1)] if mark.key in known.attributes else None
            case Kind.BITMAP:
                return [(block, 1) for block in known.bitmaps.get((mark.key, mark.extra), ())] or None
        return known.journal

    def _of_directory(self, mark: Mark) -> list[Range] | None:
        folder = self._known.folders.get(mark.key)
        if folder is None:
            return None
        if mark.extra:
            return None if folder.first is None else [(folder.first, 1)]
        if sum(count for _, count in folder.rest) == 1:
            return folder.rest
        hashes = self._known.hash_ranges.get((mark.key, mark.alone))
        block = folder.block_of(*hashes, of_index=bool(mark.mapped)) if hashes else None
        return folder.rest or None if block is None else [(block, 1)]

    def of_orphan(self, marks: list[Mark], zeros: int) -> dict[int, list[Mark]]:
        """Return the guest offsets that an orphan may have, and the marks that say so.

        Args:
            marks: all in the orphan.
            zeros: a bit for each whole block in it that is zero.
        """
        places = [(mark, ranges) for mark in marks if (ranges := self.of_mark(mark)) is not None]
        tried: set[int] = set()
        for mark, ranges in places:
            if mark.kind is not Kind.JOURNAL and sum(count for _, count in ranges) <= PLACES_TRIED_MAX:
                tried.update(self._fitting(mark, ranges))
        found = {}
        for offset in sorted(tried):
            support = self._support(offset, places)
            if support and self._tables_agree(offset, marks, zeros, support):
                found[offset] = support
        return found

    def _fitting(self, mark: Mark, ranges: list[Range]) -> Iterator[int]:
        size = self._superblock.block_bytes
        for start, count in ranges:
            for block in range(start, start + count):
                offset = self._offset + block * size - mark.at
                if offset >= 0 and offset % self._cluster == 0:
                    yield offset

    def block_at(self, offset: int, at: int) -> int:
        """Return which block is so far behind a guest offset."""
        return (offset + at - self._offset) // self._superblock.block_bytes

    def _support(self, offset: int, places: list[tuple[Mark, list[Range]]]) -> list[Mark]:
        """Return the marks that agree with a place; none when one speaks against it."""
        support = []
        for mark, ranges in places:
            block = self.block_at(offset, mark.at)
            if self._known.in_journal(block):
                continue
            if not any(start <= block < start + count for start, count in ranges):
                return []
            support.append(mark)
        return [] if all(mark.kind is Kind.JOURNAL for mark in support) else support

    def _tables_agree(self, offset: int, marks: list[Mark], zeros: int, support: list[Mark]) -> bool:
        """Return whether what a place makes part of an inode table is one, or was never used."""
        superblock = self._superblock
        size, per_block = superblock.block_bytes, superblock.inodes_per_block
        if self._cluster == size:
            return True
        agreeing = {mark.at for mark in support if mark.kind is Kind.INODES}
        if not agreeing:
            return True
        first = self._offset % size
        for number, at in enumerate(range(first, self._cluster - size + 1, size)):
            if zeros >> number & 1 or at in agreeing:
                continue
            place = self._known.table_at(self.block_at(offset, at))
            if place is None or place[1] >= superblock.table_blocks:
                continue
            group, index = place
            used = superblock.inodes_per_group - self._known.tables[group].unused_inodes
            if index * per_block < used and (group or index * per_block >= 11):
                return False
        return True
