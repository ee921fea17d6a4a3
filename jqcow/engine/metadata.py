"""Metadata blocks in their layers: clean, logged, in flight, staged. Nothing here does I/O but reading.

A block is `min(4096, cluster size)` bytes, keyed by its host offset. Its newest bytes are what the engine
sees; what a crash would leave is decided by the layer they are in:

    staged      changed since the last cut; only in memory
    in flight   in a record that is being appended
    logged      in a durable record of the running epoch, not yet in its home: a *log image*
    clean       equal to its home; may be forgotten and read again

D1. A staged change reaches its home only as a log image of a durable record: never from here.
D2. A log image stays in memory, byte for byte as logged, until it is home.
D3. An operation is all or nothing: rolling it back restores every block, the header and the ordering
    of the cut.
D4. A new metadata cluster is zeroed in the record that brings it, before its blocks.
D5. A user transaction's changes are seen by itself alone until its record is durable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from jqcow.engine.medium import Medium
from jqcow.engine.scan import Replayed
from jqcow.ondisk.entries import ENTRY
from jqcow.ondisk.frame import BlockOperation, HeaderOperation, Operation, ZeroOperation
from jqcow.ondisk.header import Header, HeaderArea

CLEAN_BLOCKS_MAX = 8192
"""Clean blocks kept in memory: 32 MiB of metadata, which maps 256 GiB of 64 KiB clusters."""

Block = bytes | bytearray


@dataclass
class Layer:
    """Changes that will travel in one record: zeroed clusters first, then blocks, then the header."""

    zeros: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, Block] = field(default_factory=dict)
    area: HeaderArea | None = None
    ordered: bool = False

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to log."""
        return not self.zeros and not self.blocks and self.area is None

    def operations(self) -> list[Operation]:
        """Return the layer as journal operations, in the order in which replay applies them."""
        header = [HeaderOperation(self.area.data)] if self.area is not None else []
        zeros = [ZeroOperation(offset, length) for offset, length in sorted(self.zeros.items())]
        blocks = [BlockOperation(offset, bytes(data)) for offset, data in sorted(self.blocks.items())]
        return [*header, *zeros, *blocks]

    def copy(self) -> Layer:
        """Return a layer of the same blocks; changing what it holds leaves this one alone."""
        return Layer(dict(self.zeros), dict(self.blocks), self.area, self.ordered)


@dataclass
class _Undo:
    """What an operation changed first: the staged values from before, None where nothing was staged.

    ``top`` is where the operation's newest bytes go, ``zeros`` the clusters that it was the first to zero.
    """

    top: dict[int, Block]
    blocks: dict[int, Block | None] = field(default_factory=dict)
    zeros: list[int] = field(default_factory=list)
    area: HeaderArea | None = None
    ordered: bool = False


@dataclass(frozen=True)
class MetadataMark:
    """What a transaction had staged, and the newest blocks that it saw."""

    staged: Layer
    newest: dict[int, Block]


class Metadata:
    """All metadata blocks of one image, as the engine sees them now. Offsets are host offsets in bytes."""

    def __init__(self, medium: Medium, area: HeaderArea) -> None:
        self.medium = medium
        self.geometry = area.header.geometry
        self.committed_area = area
        self.images: dict[int, bytes] = {}
        self._staged = Layer()
        self._in_flight: Layer | None = None
        self._newest: dict[int, Block] = {}
        self._private: dict[int, Block] | None = None
        self._sees_private = False
        self._clean: dict[int, bytes] = {}
        self._undo: _Undo | None = None
        self._zero_block = bytes(self.geometry.block_bytes)

    # Reading

    @property
    def area(self) -> HeaderArea:
        """The header as the engine sees it now."""
        if self._private is not None and not self._sees_private:
            return self.committed_area
        if self._staged.area is not None:
            return self._staged.area
        if self._in_flight is not None and self._in_flight.area is not None:
            return self._in_flight.area
        return self.committed_area

    @property
    def header(self) -> Header:
        """The header's fixed fields as the engine sees them now."""
        return self.area.header

    def block(self, offset: int) -> Block:
        """Return the newest bytes of the block at ``offset``; not to be changed by the caller."""
        found = self._top.get(offset) or self._newest.get(offset)
        if found is not None:
            return found
        clean = self._clean.get(offset)
        if clean is None:
            clean = self.medium.pread(self.geometry.block_bytes, offset)
            self._keep_clean(offset, clean)
        return clean

    def entry(self, offset: int) -> int:
        """Return the 8-byte table entry at host ``offset``."""
        within = offset % self.geometry.block_bytes
        value: int = ENTRY.unpack_from(self.block(offset - within), within)[0]
        return value

    def overlay(self, buffer: bytearray, offset: int) -> None:
        """Lay the newest blocks over bytes read from the device at ``offset`` (block-aligned)."""
        size = self.geometry.block_bytes
        for position in range(0, len(buffer), size):
            newest = self._top.get(offset + position) or self._newest.get(offset + position)
            if newest is not None:
                piece = min(size, len(buffer) - position)
                buffer[position : position + piece] = newest[:piece]

    @property
    def _top(self) -> dict[int, Block]:
        """Where the newest bytes are looked for first, and where staged ones go."""
        return self._private if self._private is not None and self._sees_private else self._newest

    def _keep_clean(self, offset: int, block: bytes) -> None:
        if len(self._clean) >= CLEAN_BLOCKS_MAX:
            del self._clean[next(iter(self._clean))]
        self._clean[offset] = block

    # Staging, only inside an operation

    @property
    def in_operation(self) -> bool:
        """True from `begin` until the operation is finished or rolled back."""
        return self._undo is not None

    def begin(self) -> None:
        """Start an operation: until `finish` its changes can be taken back (D3). Operations do not nest."""
        if self._undo is not None:
            raise RuntimeError("metadata operations do not nest")
        if self._private is not None and not self._sees_private:
            raise RuntimeError("a transaction is open: only it may stage")
        self._undo = _Undo(self._top, area=self._staged.area, ordered=self._staged.ordered)

    def finish(self) -> None:
        """The operation succeeded."""
        self._undo = None

    def roll_back(self) -> None:
        """Take the operation back. Where this is cut off it can be done again."""
        undo = self._undo
        if undo is None:
            return
        for offset, before in undo.blocks.items():
            if before is None:
                self._staged.blocks.pop(offset, None)
            else:
                self._staged.blocks[offset] = before
        for cluster in undo.zeros:
            self._staged.zeros.pop(cluster, None)
        self._staged.area = undo.area
        self._staged.ordered = undo.ordered
        for offset in undo.blocks:
            newest = self._find_newest(offset)
            if newest is None:
                undo.top.pop(offset, None)
            else:
                undo.top[offset] = newest
        self._undo = None

    def _blocks(self, offset: int, length: int) -> range:
        """Return the offsets of the blocks in a range."""
        return range(offset, offset + length, self.geometry.block_bytes)

    def _find_newest(self, offset: int) -> Block | None:
        """Return the bytes of the topmost layer that holds the block, or None if it is clean."""
        for layer in (self._staged, self._in_flight):
            if layer is None:
                continue
            if offset in layer.blocks:
                return layer.blocks[offset]
            if self._is_zeroed(layer, offset):
                return self._zero_block
        return self.images.get(offset)

    def edit(self, offset: int) -> bytearray:
        """Return the block at ``offset`` as a staged copy that this operation may change."""
        undo = self._require_operation()
        if offset in undo.blocks:
            staged = self._staged.blocks.get(offset)
            if isinstance(staged, bytearray):
                return staged
        copy = bytearray(self.block(offset))
        undo.blocks.setdefault(offset, self._staged.blocks.get(offset))
        self._staged.blocks[offset] = copy
        self._top[offset] = copy
        return copy

    def set_entry(self, offset: int, value: int) -> None:
        """Stage the 8-byte table entry at host ``offset``."""
        within = offset % self.geometry.block_bytes
        ENTRY.pack_into(self.edit(offset - within), within, value)

    def zero_cluster(self, cluster_offset: int) -> None:
        """Stage a new metadata cluster: all its blocks read as zeros (D4)."""
        undo = self._require_operation()
        if cluster_offset not in self._staged.zeros:
            undo.zeros.append(cluster_offset)
        self._staged.zeros[cluster_offset] = self.geometry.cluster_bytes
        for offset in self._blocks(cluster_offset, self.geometry.cluster_bytes):
            undo.blocks.setdefault(offset, self._staged.blocks.get(offset))
            self._staged.blocks.pop(offset, None)
            self._top[offset] = self._zero_block

    def set_header(self, **fields: int) -> None:
        """Stage other values of the header's fixed fields."""
        self._require_operation()
        self._staged.area = self.area.with_header(replace(self.header, **fields))

    def set_area(self, area: HeaderArea) -> None:
        """Stage another header, extensions and backing file name included."""
        self._require_operation()
        self._staged.area = area

    def require_order(self) -> None:
        """The data that this operation maps must be durable before the record that maps it."""
        self._require_operation()
        self._staged.ordered = True

    def _require_operation(self) -> _Undo:
        if self._undo is None:
            raise RuntimeError("metadata is staged only inside an operation")
        return self._undo

    # Transactions: a private view over the committed state

    @property
    def in_transaction(self) -> bool:
        """True while a user transaction stages its changes."""
        return self._private is not None

    def begin_transaction(self) -> None:
        """From here on staged changes are seen only in the private view (D5); nothing may be staged."""
        if self.has_staged or self._private is not None:
            raise RuntimeError("a transaction starts with nothing staged")
        self._private = {}

    def select_view(self, *, private: bool) -> None:
        """Choose what is seen: the transaction's own state, or what all others see.

        Whoever takes the lock chooses, before anything else: nobody relies on who had it before.
        """
        self._sees_private = private

    def mark(self) -> MetadataMark:
        """Return the transaction's state, for `return_to`. Blocks staged so far are not edited again."""
        if self._private is None:
            raise RuntimeError("no transaction is open")
        return MetadataMark(self._staged.copy(), dict(self._private))

    def return_to(self, mark: MetadataMark) -> None:
        """Undo what the transaction staged since ``mark``, which stays valid."""
        staged, newest = mark.staged.copy(), dict(mark.newest)
        self._staged, self._private = staged, newest

    def end_transaction(self) -> None:
        """The transaction's record is durable, or there was nothing to commit: everyone sees its changes."""
        self._newest.update(self._private or {})
        self._private = None

    def abandon_transaction(self) -> None:
        """Forget all that the transaction staged, also what is in flight."""
        if self._private is None:
            return
        self._staged, self._in_flight, self._private = Layer(), None, None

    # From staged to logged to home

    @property
    def has_staged(self) -> bool:
        """True if there is something to commit."""
        return not self._staged.is_empty

    @property
    def staged_blocks(self) -> int:
        """How many blocks the next record would hold."""
        return len(self._staged.blocks)

    @property
    def staged_zeros(self) -> int:
        """How many clusters the next record would zero."""
        return len(self._staged.zeros)

    def cut(self) -> Layer:
        """Freeze what is staged: it travels in the next record. Only between operations."""
        if self._undo is not None or self._in_flight is not None:
            raise RuntimeError("a cut falls between operations, and one record is in flight at a time")
        self._in_flight, self._staged = self._staged, Layer()
        return self._in_flight

    def uncut(self) -> None:
        """The record failed: what it held is staged again, under what was staged since."""
        failed, newer = self._in_flight, self._staged
        if failed is None:
            return
        for cluster, length in newer.zeros.items():
            for offset in self._blocks(cluster, length):
                failed.blocks.pop(offset, None)
        both = Layer(
            failed.zeros | newer.zeros,
            failed.blocks | newer.blocks,
            newer.area or failed.area,
            failed.ordered or newer.ordered,
        )
        self._staged, self._in_flight = both, None

    def publish(self) -> None:
        """The record is durable: its blocks are log images now. If cut off it can be done again."""
        durable = self._in_flight
        if durable is None:
            return
        for cluster, length in durable.zeros.items():
            for offset in self._blocks(cluster, length):
                self.images[offset] = self._zero_block
        for offset, data in durable.blocks.items():
            self.images[offset] = bytes(data)
        if durable.area is not None:
            self.committed_area = durable.area
        self._in_flight = None

    def take_replayed(self, replayed: Replayed) -> None:
        """Take what a journal was replayed to as log images."""
        self.committed_area = replayed.area
        self.images = dict(replayed.blocks)
        self._newest.update(self.images)

    def image_runs(self) -> Iterator[tuple[int, bytes]]:
        """Yield the log images, joined where they lie side by side: (host offset, bytes)."""
        run: list[bytes] = []
        start = end = -1
        for offset in sorted(self.images):
            if offset != end or len(run) >= 256:
                if run:
                    yield start, b"".join(run)
                run, start = [], offset
            run.append(self.images[offset])
            end = offset + self.geometry.block_bytes
        if run:
            yield start, b"".join(run)

    def images_are_home(self) -> None:
        """The checkpoint's barrier completed: log images are clean blocks now."""
        for offset, data in self.images.items():
            if self._newest.get(offset) is not None and not self._is_newer(offset):
                # In this order: without the newest bytes a clean block that is older would be seen.
                self._keep_clean(offset, data)
                del self._newest[offset]
            else:
                self._clean.pop(offset, None)
        self.images = {}

    def _is_newer(self, offset: int) -> bool:
        """True if a staged or in-flight change lies over the log image."""
        if offset in self._staged.blocks or self._is_zeroed(self._staged, offset):
            return True
        in_flight = self._in_flight
        return in_flight is not None and (offset in in_flight.blocks or self._is_zeroed(in_flight, offset))

    def _is_zeroed(self, layer: Layer, offset: int) -> bool:
        return (offset - offset % self.geometry.cluster_bytes) in layer.zeros
