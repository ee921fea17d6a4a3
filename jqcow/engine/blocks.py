"""Metadata blocks: durable ones, and what a reader sees of them through the staged changes.

A block is ``min(4096, cluster size)`` bytes, keyed by its host offset. Its newest bytes are in one of these
places, looked through from the top:

    staged      a change set; only in memory
    in flight   the change set of a record that is being written
    log image   in a durable record of the running epoch, not yet in its home
    clean       equal to its home; may be forgotten and read again

D2. A log image stays in memory, byte for byte as logged, until it is home.
D5. A user transaction's changes are seen by itself alone until its record is durable.
D6. A block that was read without the lock is kept only if no home was written since the reading began.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jqcow.engine.changes import Block, ChangeSet
from jqcow.engine.medium import Medium
from jqcow.ondisk.entries import ENTRY
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.layout import ClusterIndex, HostOffset

CLEAN_BLOCKS_MAX = 8192
"""Clean blocks kept in memory: 32 MiB of metadata, which maps 256 GiB of 64 KiB clusters."""

RUN_BLOCKS_MAX = 256
"""Log images that one write brings home."""


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
        self._clean: dict[HostOffset, bytes] = {}
        self.generation = 0
        """How often homes were written: see D6."""

    def find(self, offset: HostOffset) -> bytes | None:
        """Return the block at ``offset`` if it is in memory."""
        return self.images.get(offset) or self._clean.get(offset)

    def load(self, offset: HostOffset) -> bytes:
        """Read a clean block from the device, with the lock held."""
        block = self.medium.pread(offset, self.geometry.block_bytes)
        self._keep(offset, block)
        return block

    def load_unlocked(self, absent: Absent) -> None:
        """Read a block from the device without the lock, for whoever looks again (D6)."""
        block = self.medium.pread(absent.offset, self.geometry.block_bytes)
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

    def publish(self, durable: ChangeSet) -> None:
        """The record of a change set is durable: its blocks are log images now (D2)."""
        for offset, block in durable.blocks.items():
            self.images[offset] = bytes(block)
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


class View:
    """The metadata as one reader sees it: a change set over what is durable. Offsets are host offsets."""

    def __init__(self, blocks: Blocks, staged: Staged) -> None:
        self.blocks = blocks
        self.geometry = blocks.geometry
        self.staged = staged

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

    def entry(self, offset: HostOffset) -> int:
        """Return the 8-byte table entry at host ``offset``."""
        within = offset % self.geometry.block_bytes
        value: int = ENTRY.unpack_from(self.block(HostOffset(offset - within)), within)[0]
        return value

    def read(self, offset: HostOffset, length: int) -> bytes:
        """Return ``length`` bytes of metadata from host ``offset``."""
        parts, end, size = [], offset + length, self.geometry.block_bytes
        while offset < end:
            within = offset % size
            parts.append(bytes(self.block(HostOffset(offset - within))[within : within + end - offset]))
            offset = HostOffset(offset + len(parts[-1]))
        return b"".join(parts)

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

    def set_entry(self, offset: HostOffset, value: int) -> None:
        """Stage the 8-byte table entry at host ``offset``."""
        within = offset % self.geometry.block_bytes
        ENTRY.pack_into(self.edit(HostOffset(offset - within)), within, value)

    def set_header(self, **fields: int) -> None:
        """Stage other values of the header's fixed fields."""
        self.changes.area = self.area.with_header(replace(self.header, **fields))

    def set_area(self, area: HeaderArea) -> None:
        """Stage another header, extensions and backing file name included."""
        self.changes.area = area

    def zero_cluster(self, cluster: ClusterIndex) -> None:
        """Stage a new metadata cluster (changes.py, D4)."""
        self.changes.zero_cluster(cluster)

    def require_order(self) -> None:
        """The data that the operation maps must be durable before the record that maps it."""
        self.changes.ordered = True


class MemoryView(View):
    """The same view for those who must not wait for the device with the lock held."""

    def _absent(self, offset: HostOffset) -> Block:
        raise Absent(offset, self.blocks.generation)
