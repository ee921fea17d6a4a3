"""Metadata blocks: durable, staged, and as one reader sees them; what one record carries.

A block is ``min(4096, cluster size)`` bytes, keyed by its host offset. Its newest bytes are in one of these
places, looked through from the top:

    staged      a change set; only in memory
    in flight   the change set of a record that is being written
    log image   in a durable record of the running epoch, not yet in its home
    clean       equal to its home; may be forgotten and read again

Every change is staged in a `ChangeSet`. The public one belongs to the image; a user transaction has its own.
A commit cuts a set: it is frozen, and travels in one record.

D1. A staged change reaches its home only as a log image of a durable record: never from a set.
D2. A log image stays in memory, byte for byte as logged, until it is home.
D3. Returning to a mark restores every block, the header and the ordering, and names the clusters that were
    taken since. An operation's undo and a savepoint are such returns.
D4. A new metadata cluster is zeroed in the record that brings it, before its blocks.
D5. A user transaction's changes are seen by itself alone until its record is durable.
D6. A block that was read without the lock is kept only if no home was written since the reading began.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

from jqcow import _native
from jqcow.device.base import hole_end
from jqcow.engine.clusters import ClusterRuns, Run
from jqcow.engine.known import KnownPlaces
from jqcow.engine.medium import Medium
from jqcow.ondisk import entries
from jqcow.ondisk.frame import BlockOperation, DoneOperation, HeaderOperation, Operation, ZeroOperation
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.layout import ClusterIndex, Geometry, HostOffset, entry_place

Block = bytes | bytearray

CLEAN_BLOCKS_MAX = 8192
"""Clean blocks kept in memory: 32 MiB of metadata, which maps 256 GiB of 64 KiB clusters."""

AHEAD_BYTES_MAX = 2 << 20
"""The largest cluster: so much of a table is read at once."""

RUN_BLOCKS_MAX = 256
"""Log images that one write brings home."""


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
    """Changes that will travel in one record: the header first, then zeroed clusters, then blocks.

    Attributes:
        blocks: the newest bytes of every block that the set changes, by host offset.
        area: the header, if it changes.
        ordered: the data that the set maps must be durable before its record.
        taken: the runs of clusters that it took; they have a refcount in its blocks.
        freed_data: runs of data clusters whose last reference it drops.
        freed_metadata: the same of metadata clusters.
        freed_clusters: how many clusters these are.
        packed_end: where compressed data was packed last, 0: nowhere (refcounts.py, R4).
        own: in a transaction, the data clusters taken since its start or last savepoint; None outside.
        outside: in a transaction, all clusters that it wrote to in a data file (datafile.py, X4).
        vacated: places in the data file that the set gives up, and nobody has planned to write since.
        reach_bytes: in a transaction, the largest size that the disk had, in it or before it.
        done: the record declares intents up to this sequence done (destaging.py); 0: none.
    """

    def __init__(self, geometry: Geometry, *, private: bool = False, packed_end: int = 0) -> None:
        self.geometry = geometry
        self.blocks: dict[HostOffset, Block] = {}
        self.area: HeaderArea | None = None
        # T1: all data of a transaction must be durable before its record.
        self.ordered = private
        self.taken: list[Run] = []
        self.freed_data: list[Run] = []
        self.freed_metadata: list[Run] = []
        self.freed_clusters = 0
        self.packed_end = packed_end
        self.own: set[ClusterIndex] | None = set() if private else None
        self.outside: set[ClusterIndex] = set()
        self.vacated = ClusterRuns()
        self.reach_bytes = 0
        self.done = 0
        self._zeroed: dict[HostOffset, None] = {}
        self._marks: list[Mark] = []
        self._zero_block = _zero_block(geometry.block_bytes)

    def next_set(self) -> ChangeSet:
        """Return an empty set, to go on in while this one is in flight."""
        return ChangeSet(self.geometry, private=self.is_private, packed_end=self.packed_end)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to log."""
        return not self.blocks and self.area is None and not self.done

    @property
    def is_private(self) -> bool:
        """True in a transaction."""
        return self.own is not None

    def may_overwrite(self, cluster: ClusterIndex) -> bool:
        """Return True if a data cluster may be written in place, as far as the set goes (W1)."""
        return self.own is None or cluster in self.own

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
        """Return the present state; what is in own clusters belongs to it, and is not written over."""
        self.own = set()
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
        # Some of them are in use again; for the others it is no more than space.
        self.vacated = ClusterRuns()
        for cluster in list(self._zeroed)[mark.zeroed :]:
            del self._zeroed[cluster]
        if self.own is not None:
            self.own = set()
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

    @property
    def least_bytes(self) -> int:
        """Bytes that a record of this set takes at least, before it is compressed."""
        count = sum(block is not self._zero_block for block in self.blocks.values())
        return count * self.geometry.block_bytes

    def operations(self) -> list[Operation]:
        """Return the set as journal operations, in the order in which replay applies them."""
        header = [HeaderOperation(self.area.data)] if self.area is not None else []
        done = [DoneOperation(self.done)] if self.done else []
        cluster_bytes = self.geometry.cluster_bytes
        zeros = [ZeroOperation(offset, cluster_bytes) for offset in sorted(self._zeroed)]
        blocks = [
            BlockOperation(offset, block)
            for offset, block in sorted(self.blocks.items())
            if block is not self._zero_block
        ]
        return [*header, *done, *zeros, *blocks]

    def absorb(self, newer: ChangeSet) -> None:
        """Lay a newer set over this one, whose record failed: both travel in the next record."""
        self.blocks.update(newer.blocks)
        self._zeroed.update(newer._zeroed)
        self.area = newer.area or self.area
        self.ordered |= newer.ordered
        self.done = max(self.done, newer.done)
        self.taken += newer.taken
        self.freed_data += newer.freed_data
        self.freed_metadata += newer.freed_metadata
        self.freed_clusters += newer.freed_clusters
        self.packed_end = newer.packed_end
        # What this set gave up the newer one may have written.
        self.vacated = newer.vacated


class Absent(Exception):
    """A block is not in memory, and the caller does not wait for the device with the lock held."""

    def __init__(self, offset: HostOffset, generation: int) -> None:
        super().__init__(offset)
        self.offset = offset
        self.generation = generation


class Blocks:
    """The durable metadata of one image: log images over clean blocks, and the header."""

    def __init__(self, medium: Medium, area: HeaderArea) -> None:
        self.medium = medium
        self.geometry = area.header.geometry
        self.area = area
        self.images: dict[HostOffset, bytes] = {}
        self.known = KnownPlaces()
        self._clean: dict[HostOffset, bytes] = {}
        self.generation = 0
        """How often homes were written: see D6."""

    def find(self, offset: HostOffset) -> bytes | None:
        """Return the block at ``offset`` if it is in memory."""
        return self.images.get(offset) or self._clean.get(offset)

    def load(self, offset: HostOffset) -> bytes:
        """Read a clean block from the device, with the lock held."""
        block = self.medium.pread(self.geometry.block_bytes, offset)
        self._keep(offset, block)
        return block

    def load_row(self, offsets: list[HostOffset]) -> None:
        """Read blocks that are not in memory, and lie close together, in one go, with the lock held."""
        start, size = offsets[0], self.geometry.block_bytes
        data = self.medium.pread(offsets[-1] + size - start, start)
        for offset in offsets:
            self._keep(offset, data[offset - start : offset - start + size])

    def load_unlocked(self, absent: Absent) -> None:
        """Read a block from the device without the lock, for whoever looks again (D6)."""
        block = self.medium.pread(self.geometry.block_bytes, absent.offset)
        with self.medium.lock:
            if self._is_current(absent):
                self._keep(absent.offset, block)

    def _is_current(self, absent: Absent) -> bool:
        """Return True if no home was written since ``absent`` was raised (D6)."""
        return self.generation == absent.generation and absent.offset not in self.images

    def _keep(self, offset: HostOffset, block: bytes) -> None:
        if len(self._clean) >= CLEAN_BLOCKS_MAX:
            del self._clean[next(iter(self._clean))]
        self._clean[offset] = block

    def write_new(self, data: bytes, offset: HostOffset) -> None:
        """Write metadata where none was, and that no durable or staged change is about, to its home."""
        self.medium.pwrite(data, offset)
        self.forget(offset, len(data))

    def forget(self, offset: HostOffset, length: int) -> None:
        """Metadata was written where none was: blocks that were read there before do not show it.

        Who reads a table without knowing its end reads blocks behind it.
        """
        for position in range(offset, offset + length, self.geometry.block_bytes):
            self._clean.pop(HostOffset(position), None)

    def publish(self, durable: ChangeSet) -> None:
        """The record of a change set is durable: its blocks are log images now (D2)."""
        # What a transaction changed nobody else has seen yet (Q4).
        self.known.forget()
        for offset, block in durable.blocks.items():
            # The set gives its own up, one by one: where all tables changed, two copies are too many.
            durable.blocks[offset] = self.images[offset] = bytes(block)
        if durable.area is not None:
            self.area = durable.area

    def image_runs(self) -> Iterator[tuple[HostOffset, bytes]]:
        """Yield the log images, joined where they lie side by side: (host offset, bytes)."""
        run: list[bytes] = []
        start = end = HostOffset(-1)
        for offset in sorted(self.images):
            if offset != end or len(run) >= RUN_BLOCKS_MAX:
                if run:
                    yield start, b"".join(run)
                run, start = [], offset
            run.append(self.images[offset])
            end = HostOffset(offset + self.geometry.block_bytes)
        if run:
            yield start, b"".join(run)

    def images_are_home(self) -> None:
        """The checkpoint's barrier completed: log images are clean blocks now."""
        for offset, block in self.images.items():
            self._clean.pop(offset, None)
            self._keep(offset, block)
        self.images = {}
        self.generation += 1


@dataclass
class Staged:
    """What lies over the durable metadata: ``changes``, and the set whose record is being written."""

    changes: ChangeSet
    in_flight: ChangeSet | None = None

    def cut(self) -> ChangeSet | None:
        """Freeze what is staged, None if nothing is; what is staged from here on travels later."""
        if self.in_flight is not None:
            raise RuntimeError("one record is in flight at a time")
        if self.changes.is_empty:
            return None
        self.in_flight, self.changes = self.changes, self.changes.next_set()
        return self.in_flight

    def landed(self) -> None:
        """The record in flight is durable, and what it carries is in `Blocks`."""
        self.in_flight = None

    def take_back(self) -> None:
        """The record in flight failed: it travels in the next, with what was staged since the cut."""
        if self.in_flight is not None:
            self.in_flight.absorb(self.changes)
            self.changes, self.in_flight = self.in_flight, None


class View:
    """The metadata as one reader sees it: a change set over what is durable. Offsets are host offsets."""

    def __init__(self, blocks: Blocks, staged: Staged) -> None:
        self.blocks = blocks
        self.geometry = blocks.geometry
        self.staged = staged
        self._entries_per_block = blocks.geometry.entries_per_block

    @property
    def changes(self) -> ChangeSet:
        """The set that changes through this view go to."""
        return self.staged.changes

    @property
    def area(self) -> HeaderArea:
        """The header as this reader sees it."""
        changes, in_flight = self.staged.changes, self.staged.in_flight
        if changes.area is not None:
            return changes.area
        if in_flight is not None and in_flight.area is not None:
            return in_flight.area
        return self.blocks.area

    @property
    def header(self) -> Header:
        """The header's fixed fields as this reader sees them."""
        staged = self.staged
        if staged.changes.area is None and staged.in_flight is None:
            return self.blocks.area.header
        return self.area.header

    def block(self, offset: HostOffset) -> Block:
        """Return the newest bytes of the block at ``offset``; not to be changed by the caller."""
        staged = self.staged
        found = staged.changes.blocks.get(offset)
        if found is None and staged.in_flight is not None:
            found = staged.in_flight.blocks.get(offset)
        return found or self.blocks.find(offset) or self._absent(offset)

    def _absent(self, offset: HostOffset) -> Block:
        return self.blocks.load(offset)

    def entry(self, table: HostOffset, index: int) -> int:
        """Return an entry of the L1 table or the refcount table at ``table``."""
        position = index % self._entries_per_block
        start = table if position == index else entry_place(table, index - position)
        return entries.entry_at(self.block(start), position)

    def holds(self, offset: HostOffset) -> bool:
        """Return True if there is a block at ``offset``, in memory or the file: others are zeros for ever."""
        staged = self.staged
        return (
            offset < self.blocks.medium.size()
            or offset in self.blocks.images
            or offset in staged.changes.blocks
            or (staged.in_flight is not None and offset in staged.in_flight.blocks)
        )

    def read(self, offset: HostOffset, length: int) -> bytes:
        """Return ``length`` bytes of metadata from host ``offset``."""
        parts, end, size = [], offset + length, self.geometry.block_bytes
        if length <= AHEAD_BYTES_MAX:
            self._look_ahead(HostOffset(offset - offset % size), end)
        while offset < end:
            within = offset % size
            parts.append(bytes(self.block(HostOffset(offset - within))[within : within + end - offset]))
            offset = HostOffset(offset + len(parts[-1]))
        return b"".join(parts)

    def _look_ahead(self, offset: HostOffset, end: int) -> None:
        """Read what is not in memory of some blocks in a row at once."""
        row = map(HostOffset, range(offset, end, self.geometry.block_bytes))
        changes, in_flight = self.changes.blocks, self.staged.in_flight
        absent = [
            at
            for at in row
            if at not in changes
            and not (in_flight is not None and at in in_flight.blocks)
            and self.blocks.find(at) is None
        ]
        if len(absent) > 1:
            self.blocks.load_row(absent)

    def hole_end(self, offset: HostOffset, end: int) -> int:
        """Return how far blocks from ``offset`` on are a hole of the file, with nothing newer in memory."""
        end = hole_end(self.blocks.medium.device, offset, end)
        if end > offset:
            end = min((at for at in self.newest() if offset <= at < end), default=end)
        return end

    def newest(self) -> dict[int, Block]:
        """Return all blocks that differ from their homes, as this reader sees them, by host offset."""
        found: dict[int, Block] = {}
        found.update(self.blocks.images.items())
        if self.staged.in_flight is not None:
            found.update(self.staged.in_flight.blocks.items())
        found.update(self.changes.blocks.items())
        return found

    # Staging, inside an operation

    def edit(self, offset: HostOffset) -> bytearray:
        """Return the block at ``offset`` as a staged copy that the operation may change."""
        staged = self.changes.editable(offset)
        return self.changes.edit(offset, self.block(offset)) if staged is None else staged

    def set_entry(self, table: HostOffset, index: int, entry: int) -> None:
        """Stage an entry of the L1 table or the refcount table at ``table``."""
        position = index % self._entries_per_block
        entries.put_entry(self.edit(entry_place(table, index - position)), position, entry)

    def copy_table(self, source: HostOffset, target: HostOffset, length_bytes: int) -> None:
        """Stage a copy of a table in new, zeroed metadata clusters."""
        for position in range(0, length_bytes, self.geometry.block_bytes):
            used = min(self.geometry.block_bytes, length_bytes - position)
            old = self.block(HostOffset(source + position))[:used]
            if not _native.is_zero(old):
                self.edit(HostOffset(target + position))[:used] = old

    def set_header(self, **fields: int) -> None:
        """Stage other values of the header's fixed fields."""
        self.changes.area = self.area.with_header(replace(self.header, **fields))

    def set_area(self, area: HeaderArea) -> None:
        """Stage another header, extensions and backing file name included."""
        self.changes.area = area

    def zero_cluster(self, cluster: ClusterIndex) -> None:
        """Stage a new metadata cluster (D4)."""
        self.changes.zero_cluster(cluster)


class MemoryView(View):
    """The same view for those who must not wait for the device with the lock held."""

    def _absent(self, offset: HostOffset) -> Block:
        raise Absent(offset, self.blocks.generation)

    def _look_ahead(self, offset: HostOffset, end: int) -> None:
        """What is not in memory is read without the lock, block by block."""
