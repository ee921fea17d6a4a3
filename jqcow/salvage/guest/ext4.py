"""An ext4 (or ext3, ext2) of the guest: its metadata tell their places by their checksums.

With the feature metadata_csum every inode's checksum is begun with its number, that of a directory's block
or an extent tree's node with the inode: run backwards, the checksum says who it belongs to. Without it only
superblocks and what is next to them are found, and nothing is certain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from jqcow.salvage.evidence import BlockSum, Certainty, FilePiece, Orphans, PlacedDisk, Placement, Volume
from jqcow.salvage.guest import ext4_files, ext4_find
from jqcow.salvage.guest.ext4_choice import Candidate, Choice
from jqcow.salvage.guest.ext4_index import Index
from jqcow.salvage.guest.ext4_marks import Kind
from jqcow.salvage.guest.ext4_ondisk import EXTENTS, HAS_JOURNAL, Superblock
from jqcow.salvage.guest.ext4_places import Places
from jqcow.salvage.guest.ext4_volume import Volume4
from jqcow.salvage.guest.growing import Growths

BLOCKS_TELLING = 16
"""So many blocks of a journal in one orphan do not look like another part of the file system."""

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
        self._most = Certainty.CERTAIN if is_sure and superblock.summed else Certainty.LIKELY
        self._name = f"{'ext4' if superblock.incompat & EXTENTS else 'ext2 or ext3'} in {volume.name}"
        self._index: Index | None = None

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
        if self._index is None:
            self._index = Index(self._superblock, self._offset, orphans)
        index = self._index
        index.learn(disk)
        self._superblock = index.superblock
        length = orphans.cluster_bytes
        places = Places(index.superblock, self._offset, length, index.known)
        choice = Choice(index.superblock, index.known, places, index.is_clean, orphans.read)
        decided: dict[int, list[Candidate]] = {}
        undecided: dict[tuple[int, ...], list[Candidate]] = {}
        for host_offset, marks in index.marks.items():
            choice.count(host_offset, marks)
            found = places.of_orphan(marks, index.zeros[host_offset])
            for offset, support in found.items():
                one = Candidate(host_offset, offset, support)
                if len(found) == 1:
                    decided.setdefault(offset, []).append(one)
                else:
                    undecided.setdefault(tuple(found), []).append(one)
                break
        choice.take_neighbours(decided, length)
        many_blocks = length >= BLOCKS_TELLING * index.superblock.block_bytes
        may_copy = bool(index.superblock.compat & HAS_JOURNAL) and not many_blocks
        has_old = may_copy or any(len(candidates) > 1 for candidates in decided.values())
        choice.is_whole = not has_old or not self._misses(index, disk, choice)
        at_home: set[int] = set()
        for offset, candidates in decided.items():
            chosen = choice.choose(candidates)
            if chosen and self._is_open(disk, offset, length):
                yield self._placement(offset, chosen[0], length, chosen[1])
                at_home.add(chosen[0].host_offset)
        for offsets, candidates in undecided.items():
            free = [at for at in offsets if at not in decided and self._is_open(disk, at, length)]
            for offset, candidate, certainty in choice.share_out(free, offsets, candidates):
                at_home.add(candidate.host_offset)
                yield self._placement(offset, candidate, length, certainty)
        if choice.is_whole or many_blocks:
            yield from self._of_journal(index, disk, choice, length, at_home)

    def _of_journal(
        self, index: Index, disk: PlacedDisk, choice: Choice, length: int, at_home: set[int]
    ) -> Iterator[Placement]:
        """Yield the likely places of the journal's own blocks, but for orphans that are elsewhere."""
        # Where an orphan has more than one block, a copy in it may be what is at home.
        spots = choice.spots if length == index.superblock.block_bytes else {}
        for host_offset, offset in index.journal_offsets(spots).items():
            if host_offset not in at_home and self._is_open(disk, offset, length):
                one = Candidate(host_offset, offset, [])
                yield self._placement(offset, one, length, Certainty.LIKELY)

    def _is_open(self, disk: PlacedDisk, offset: int, length: int) -> bool:
        """Return whether a place is on the disk, and nothing is there yet."""
        return 0 <= offset < disk.size and disk.read(offset, min(length, disk.size - offset)) is None

    def _placement(self, offset: int, who: Candidate, length: int, certainty: Certainty) -> Placement:
        kinds = Counter(mark.kind for mark in who.support) or Counter([Kind.JOURNAL])
        witness = f"{self._name}: {_WITNESSES[kinds.most_common(1)[0][0]]}"
        return Placement(offset, who.host_offset, length, min(certainty, self._most), witness)

    def _misses(self, index: Index, disk: PlacedDisk, choice: Choice) -> bool:
        """Return whether some of what the file system must have is neither placed nor an orphan."""
        superblock, known = index.superblock, index.known
        volume = Volume4(superblock, self._offset, disk)
        keys = {(mark.kind, mark.key) for marks in index.marks.values() for mark in marks}
        start = superblock.group_start(0) + 1 + superblock.plain_descriptor_blocks
        if superblock.groups > 1:
            for block in range(start, start + superblock.reserved_blocks):
                if (Kind.RESERVED, block) not in keys and volume.read(block) is None:
                    return True
        for group in superblock.super_groups():
            if (Kind.SUPERBLOCK, group) not in keys and volume.read(superblock.group_start(group)) is None:
                return True
        homes = []
        for number, block in known.table_blocks(superblock):
            homes.append(block)
            is_mine = number <= ext4_files.INODE_OF_USERS
            if not is_mine and (Kind.INODES, number) not in keys and volume.read(block) is None:
                return True
        return choice.misses(homes)

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what is in use, as far as it is placed; see `GuestStructure.pieces`."""
        tables = self._index.known.tables if self._index else {}
        growths = self._index.growths() if self._index else Growths()
        return ext4_files.pieces(Volume4(self._superblock, self._offset, disk), tables, growths)

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what the journal's copies of inodes had in use; see `GuestStructure.deleted`."""
        for number, inode in self._index.old_inodes() if self._index else ():
            volume = Volume4(self._superblock, self._offset, disk)
            yield from ext4_files.of_file(volume, number, inode, Growths())

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
