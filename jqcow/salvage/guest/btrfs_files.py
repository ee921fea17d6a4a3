"""What files of a btrfs have on its device, and when it was written."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from jqcow.salvage.guest.btrfs_chunks import gaps
from jqcow.salvage.guest.btrfs_layout import (
    EXTENT_DATA,
    FS_TREE,
    INODE_ITEM,
    LOG_TREE,
    SUBVOLUMES,
    FileExtent,
    Inode,
    Key,
    Node,
    Superblock,
)
from jqcow.salvage.guest.btrfs_trees import Trees


class Clock:
    """Tells when a transaction was, by the inodes that were changed in some."""

    def __init__(self, times_ns: dict[int, int]) -> None:
        self._generations = sorted(times_ns)
        self._times_ns: list[int] = []
        latest_ns = 0
        for generation in self._generations:
            latest_ns = max(latest_ns, times_ns[generation])
            self._times_ns.append(latest_ns)

    def time_ns(self, generation: int) -> int:
        """Return the time of the last transaction up to a generation of which it is known; 0 before."""
        index = bisect_right(self._generations, generation)
        return self._times_ns[index - 1] if index else 0


class FileRange(NamedTuple):
    """A range of logical addresses that a file occupies.

    Attributes:
        bytenr: logical address.
        length: in bytes.
        valid_bytes: how many of them are before the file's end.
        generation: the transaction that wrote it.
        number: of the file.
        offset: in the file.
        is_data: False for files of the file system itself.
    """

    bytenr: int
    length: int
    valid_bytes: int
    generation: int
    number: int
    offset: int
    is_data: bool


class FileWalk:
    """Goes through the files of all subvolumes; what several of them share is told once."""

    def __init__(self, superblock: Superblock, trees: Trees) -> None:
        self._superblock = superblock
        self._trees = trees
        self._number = 0
        self._inode: Inode | None = None
        self._told: dict[int, int] = {}

    def ranges(self) -> Iterator[FileRange]:
        """Yield what files occupy; ranges that overlap without being the same are told both."""
        seen: set[int] = set()
        for top, is_data in self._tops():
            self._number = 0
            for leaf in self._trees.leaves(*top, seen):
                if leaf is not None:
                    yield from self._of_leaf(leaf, top, is_data)

    def rest(self, bytenr: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (logical address, length) of what an extent has beside the ranges that were told."""
        starts = self._starts
        first = bisect_left(starts, bytenr)
        last = bisect_left(starts, bytenr + length, first)
        yield from gaps(((start, self._told[start]) for start in starts[first:last]), bytenr, bytenr + length)

    @cached_property
    def _starts(self) -> list[int]:
        return sorted(self._told)

    def _tops(self) -> Iterator[tuple[tuple[int, int], bool]]:
        yield (self._superblock.root, self._superblock.generation), False
        for top in self._trees.tops(_has_files):
            yield top, True

    def _of_leaf(self, leaf: Node, top: tuple[int, int], is_data: bool) -> Iterator[FileRange]:
        for key, data in leaf.items(INODE_ITEM, EXTENT_DATA):
            if key.type == INODE_ITEM:
                self._number, self._inode = key.objectid, Inode.unpack(data)
                continue
            extent = FileExtent.unpack(data)
            place = None if extent is None else extent.on_device()
            if extent is None or place is None:
                continue
            bytenr, length = place
            if self._told.get(bytenr, 0) >= length:
                continue
            self._told[bytenr] = length
            valid_bytes = length
            if not extent.is_compressed:
                valid_bytes = min(max(self._length_bytes(top, key.objectid) - key.offset, 0), length)
            yield FileRange(bytenr, length, valid_bytes, extent.generation, key.objectid, key.offset, is_data)

    def _length_bytes(self, top: tuple[int, int], number: int) -> int:
        """Return the length of a file; no end, if its inode is not placed."""
        if number != self._number:
            data = self._trees.item(*top, Key(number, INODE_ITEM, 0))
            self._number, self._inode = number, None if data is None else Inode.unpack(data)
        return 1 << 64 if self._inode is None else self._inode.length


def _has_files(tree: int) -> bool:
    return tree in (FS_TREE, LOG_TREE) or tree in SUBVOLUMES
