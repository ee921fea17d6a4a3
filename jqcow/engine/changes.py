"""What one record carries: metadata blocks, and the clusters that they take and free.

The engine stages every change in a `ChangeSet`. The public one belongs to the image; a user transaction has
its own. A commit cuts a set: it is frozen, and travels in one record.

D1. A staged change reaches its home only as a log image of a durable record: never from a set.
D3. Returning to a mark restores every block, the header and the ordering, and names the clusters that were
    taken since. An operation's undo and a savepoint are such returns.
D4. A new metadata cluster is zeroed in the record that brings it, before its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from jqcow.ondisk.frame import BlockOperation, HeaderOperation, Operation, ZeroOperation
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import ClusterIndex, Geometry, HostOffset

Block = bytes | bytearray


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` host clusters from ``start`` on; ``zero_safe`` as in space.py, S3."""

    start: ClusterIndex
    count: int
    zero_safe: bool = False


class Undone(NamedTuple):
    """What a change set took and freed since a mark, and does no more."""

    taken: list[Run]
    freed: list[Run]


@dataclass(eq=False)
class Mark:
    """A state of a change set to come back to.

    ``before`` holds the block that each change since then was the first to replace, None where there was
    none; the numbers are lengths of the set's lists.
    """

    area: HeaderArea | None
    ordered: bool
    zeroed: int
    taken: int
    freed_data: int
    freed_metadata: int
    before: dict[HostOffset, Block | None] = field(default_factory=dict)


@cache
def _zero_block(length_bytes: int) -> bytes:
    """Return the one block of zeros of this length: it is told from others by being this one."""
    return bytes(length_bytes)


class ChangeSet:
    """Changes that will travel in one record: zeroed clusters first, then blocks, then the header.

    Attributes:
        blocks: the newest bytes of every block that the set changes, by host offset.
        area: the header, if it changes.
        ordered: the data that the set maps must be durable before its record.
        taken: the runs of clusters that it took; they have a refcount in its blocks.
        freed_data: runs of data clusters whose last reference it drops.
        freed_metadata: the same of metadata clusters.
        freed_clusters: how many clusters these are.
        packed_end: where compressed data was packed last, 0: nowhere (refcounts.py, R4).
        fresh: in a transaction, the clusters taken since its start or last savepoint; None outside.
    """

    def __init__(self, geometry: Geometry, *, private: bool = False, packed_end: int = 0) -> None:
        self.geometry = geometry
        self.blocks: dict[HostOffset, Block] = {}
        self.area: HeaderArea | None = None
        self.ordered = private
        self.taken: list[Run] = []
        self.freed_data: list[Run] = []
        self.freed_metadata: list[Run] = []
        self.freed_clusters = 0
        self.packed_end = packed_end
        self.fresh: set[ClusterIndex] | None = set() if private else None
        self._zeroed: dict[HostOffset, None] = {}
        self._marks: list[Mark] = []
        self._zero_block = _zero_block(geometry.block_bytes)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to log."""
        return not self.blocks and self.area is None

    @property
    def zeroed_bytes(self) -> int:
        """Length of the clusters that the record would zero."""
        return len(self._zeroed) * self.geometry.cluster_bytes

    # Marks

    def mark(self) -> Mark:
        """Return the present state. Blocks that are staged are copied before they change again."""
        mark = Mark(
            self.area,
            self.ordered,
            len(self._zeroed),
            len(self.taken),
            len(self.freed_data),
            len(self.freed_metadata),
        )
        self._marks.append(mark)
        return mark

    def savepoint(self) -> Mark:
        """Return the present state, and close the fresh clusters: what is in them belongs to it."""
        self.fresh = set()
        return self.mark()

    def release(self, mark: Mark) -> None:
        """Nobody comes back to the newest mark: what it would restore is an older mark's to restore."""
        if self._marks.pop() is not mark:
            raise RuntimeError("marks are released in the reverse order")
        if self._marks:
            older = self._marks[-1].before
            for offset, block in mark.before.items():
                older.setdefault(offset, block)

    def return_to(self, mark: Mark) -> Undone:
        """Undo everything since ``mark``, which stays valid (D3)."""
        if not self.has_mark(mark):
            raise RuntimeError("the mark was released")
        while self._marks[-1] is not mark:
            self._restore(self._marks.pop())
        self._restore(mark)
        mark.before = {}
        freed = self.freed_data[mark.freed_data :] + self.freed_metadata[mark.freed_metadata :]
        undone = Undone(self.taken[mark.taken :], freed)
        del self.taken[mark.taken :]
        del self.freed_data[mark.freed_data :], self.freed_metadata[mark.freed_metadata :]
        self.freed_clusters -= sum(run.count for run in freed)
        self.area, self.ordered, self.packed_end = mark.area, mark.ordered, 0
        for cluster in list(self._zeroed)[mark.zeroed :]:
            del self._zeroed[cluster]
        if self.fresh is not None:
            self.fresh = set()
        return undone

    def has_mark(self, mark: Mark) -> bool:
        """Return True if ``mark`` can still be returned to."""
        return any(mark is kept for kept in self._marks)

    def _restore(self, mark: Mark) -> None:
        for offset, block in mark.before.items():
            if block is None:
                del self.blocks[offset]
            else:
                self.blocks[offset] = block

    # Staging: each of these belongs to the newest mark

    def _replace(self, offset: HostOffset, block: Block) -> None:
        if not self._marks:
            raise RuntimeError("metadata is staged only inside an operation")
        self._marks[-1].before.setdefault(offset, self.blocks.get(offset))
        self.blocks[offset] = block

    def editable(self, offset: HostOffset) -> bytearray | None:
        """Return the block at ``offset`` if it may be changed where it is, else None."""
        block = self.blocks.get(offset)
        if isinstance(block, bytearray) and self._marks and offset in self._marks[-1].before:
            return block
        return None

    def edit(self, offset: HostOffset, block: Block) -> bytearray:
        """Stage a copy of ``block`` at ``offset``, and return it to be changed."""
        copy = bytearray(block)
        self._replace(offset, copy)
        return copy

    def zero_cluster(self, cluster: ClusterIndex) -> None:
        """Stage a new metadata cluster: all its blocks read as zeros (D4)."""
        start = self.geometry.offset_of(cluster)
        for offset in range(start, start + self.geometry.cluster_bytes, self.geometry.block_bytes):
            self._replace(HostOffset(offset), self._zero_block)
        self._zeroed[start] = None

    # From staged to logged

    def operations(self) -> list[Operation]:
        """Return the set as journal operations, in the order in which replay applies them."""
        header = [HeaderOperation(self.area.data)] if self.area is not None else []
        cluster_bytes = self.geometry.cluster_bytes
        zeros = [ZeroOperation(offset, cluster_bytes) for offset in sorted(self._zeroed)]
        blocks = [
            BlockOperation(offset, bytes(block))
            for offset, block in sorted(self.blocks.items())
            if block is not self._zero_block
        ]
        return [*header, *zeros, *blocks]

    def absorb(self, newer: ChangeSet) -> None:
        """Lay a newer set over this one, whose record failed: both travel in the next record."""
        self.blocks.update(newer.blocks)
        self._zeroed.update(newer._zeroed)
        self.area = newer.area or self.area
        self.ordered |= newer.ordered
        self.taken += newer.taken
        self.freed_data += newer.freed_data
        self.freed_metadata += newer.freed_metadata
        self.freed_clusters += newer.freed_clusters
        self.packed_end = newer.packed_end
