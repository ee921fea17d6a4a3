"""The journal read, not obeyed: what its records hold, in words."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jqcow.checker.tables import layers
from jqcow.disks.view import FileView, open_view
from jqcow.engine.scan import Scan
from jqcow.ondisk import entries, l2, snapshots
from jqcow.ondisk.frame import (
    BlockOperation,
    DoneOperation,
    HeaderOperation,
    IntentOperation,
    Operation,
    ZeroOperation,
)
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import table_bytes, table_entries
from jqcow.ondisk.snapshots import Snapshot

_L1_STEP_BYTES = 1 << 20
_SEARCHED_L1_BYTES = 256 << 20
"""How much of the snapshots' L1 tables is searched for what a record changes; no honest image has more."""


# What the records say


@dataclass(frozen=True)
class RecordedOperation:
    """One operation of a record.

    ``kind`` is ``block``, ``zero``, ``header``, ``intent`` or ``done``; ``offset`` and ``length`` in bytes,
    on the host, and of an intent on the disk; ``meaning`` tells what the range holds after replay, in words.
    """

    kind: str
    offset: int
    length: int
    meaning: str


@dataclass(frozen=True)
class Record:
    """A record of the live epoch: where its frame lies, how long it is, and what it changes."""

    sequence: int
    epoch: int
    offset: int
    length: int
    decoded_length: int
    operations: tuple[RecordedOperation, ...]


@dataclass(frozen=True)
class HalfUse:
    """One half of the journal range: ``used_bytes`` by records of the live epoch."""

    offset: int
    length: int
    live: bool
    used_bytes: int


@dataclass(frozen=True)
class TornTailFound:
    """A record that was begun and is not whole: it was never acknowledged."""

    sequence: int
    epoch: int
    offset: int
    reason: str


@dataclass(frozen=True)
class JournalListing:
    """What the live journal of an image holds. Offsets and lengths in bytes."""

    offset: int
    length: int
    epoch: int
    stale_frames: int
    halves: tuple[HalfUse, HalfUse]
    torn_tail: TornTailFound | None
    records: tuple[Record, ...]


def read_journal(path: str | os.PathLike[str]) -> JournalListing | None:
    """List the live journal of an image file; None where the image is clean. Writes nothing.

    Raises:
        JqcowError: as `FileView.of_file`.
        OSError: the host failed.
    """
    with open_view(path) as view:
        return list_journal(view)


def list_journal(view: FileView) -> JournalListing | None:
    """List what the journal of an image holds; None where the image is clean."""
    if view.scan is None:
        return None
    scan, meanings = view.scan, _Meanings(view)
    records = tuple(
        Record(
            sequence=frame.header.sequence,
            epoch=frame.header.epoch,
            offset=frame.offset,
            length=frame.header.frame_length,
            decoded_length=frame.header.decoded_length,
            operations=tuple(meanings.describe(operation) for operation in frame.operations),
        )
        for frame in scan.frames
    )
    used = sum(record.length for record in records)
    first, second = (_half_use(scan, half, used) for half in (0, 1))
    torn = scan.torn_tail
    return JournalListing(
        offset=scan.extent.offset,
        length=scan.extent.length,
        epoch=scan.epoch,
        stale_frames=scan.stale_frames,
        halves=(first, second),
        torn_tail=None
        if torn is None
        else TornTailFound(torn.sequence, torn.epoch, torn.offset, torn.reason),
        records=records,
    )


def _half_use(scan: Scan, half: int, used_bytes: int) -> HalfUse:
    is_live = scan.epoch % 2 == half
    extent = scan.extent
    return HalfUse(extent.half_offset(half), extent.half_bytes, is_live, used_bytes if is_live else 0)


class _Meanings:
    """Tells what a metadata block holds, from the tables as they are after replay."""

    def __init__(self, view: FileView) -> None:
        self._view = view
        operations = () if view.scan is None else view.scan.operations
        done = (each.sequence for each in operations if isinstance(each, DoneOperation))
        self._done = max(done, default=0)
        self._geometry = view.geometry
        cluster_bytes, header = self._geometry.cluster_bytes, view.header
        self._codec = l2.codec_of(self._geometry)
        refcount_table_end = header.refcount_table_offset + header.refcount_table_clusters * cluster_bytes
        self._l1 = range(header.l1_table_offset, header.l1_table_offset + table_bytes(header.l1_size))
        self._refcount_table = range(header.refcount_table_offset, refcount_table_end)
        self._l2_tables = dict(self._pointers(self._l1, entries.split_l1))
        self._refcount_blocks = dict(self._pointers(self._refcount_table, entries.split_refcount_table))
        place, count = header.snapshots_offset, header.nb_snapshots
        table = snapshots.parse_table(view.read, place, count, header=header)
        self._snapshot_table = range(place, place + table.length_bytes)
        by_place = {snapshot.l1_table_offset: snapshot for snapshot in table.snapshots if snapshot.l1_size}
        self._snapshot_l1 = [by_place[offset] for offset in sorted(by_place)]
        self._snapshot_l1_offsets = sorted(by_place)
        self._snapshot_l2_tables = self._find_snapshot_l2_tables(table.snapshots)

    def _find_snapshot_l2_tables(self, found: tuple[Snapshot, ...]) -> set[int]:
        """Return the host offsets of L2 tables of snapshots that the journal writes to."""
        scan, cluster_bytes = self._view.scan, self._geometry.cluster_bytes
        changed = {
            operation.offset // cluster_bytes * cluster_bytes
            for operation in (() if scan is None else scan.operations)
            if isinstance(operation, BlockOperation | ZeroOperation)
        }
        tables: set[int] = set()
        spans = [(each.l1_table_offset, each.l1_table_offset + table_bytes(each.l1_size)) for each in found]
        left = _SEARCHED_L1_BYTES
        for first, last, _ in layers(spans):
            for start in range(first, min(last, first + left), _L1_STEP_BYTES):
                data = self._view.read(min(_L1_STEP_BYTES, last - start), start)
                offsets = {entries.split_l1(entry)[0] for _, entry in entries.nonzero_entries(data)}
                tables |= offsets & changed
                left -= len(data)
        return tables

    def _pointers(self, table: range, split: Callable[[int], tuple[int, ...]]) -> Iterator[tuple[int, int]]:
        """Yield (host offset, index) of what a table points to; ``split`` tells what its entries say."""
        data = self._view.read(len(table), table.start) if table else b""
        for index, entry in entries.nonzero_entries(data):
            offset = split(entry)[0]
            if offset:
                yield offset, index

    def describe(self, operation: Operation) -> RecordedOperation:
        """Return an operation with what it means."""
        match operation:
            case HeaderOperation(data):
                header = HeaderArea.parse(data).header
                meaning = (
                    f"header: a disk of {header.size} bytes, L1 table of {header.l1_size} entries at "
                    f"{header.l1_table_offset:#x}, refcount table at {header.refcount_table_offset:#x}"
                )
                if header.nb_snapshots:
                    meaning += f", {header.nb_snapshots} snapshots at {header.snapshots_offset:#x}"
                return RecordedOperation("header", 0, len(data), meaning)
            case IntentOperation(sequence, offset, data):
                state = "done later" if sequence <= self._done else "not done"
                meaning = f"a write to guest range {offset:#x} to {offset + len(data):#x}, {state}"
                return RecordedOperation("intent", offset, len(data), meaning)
            case DoneOperation(sequence):
                return RecordedOperation("done", 0, 0, f"writes up to record {sequence} are done")
            case ZeroOperation(offset, length):
                return RecordedOperation("zero", offset, length, f"new {self._meaning(offset, length)}")
            case BlockOperation(offset, data):
                return RecordedOperation("block", offset, len(data), self._meaning(offset, len(data)))

    def _meaning(self, offset: int, length: int) -> str:
        cluster_bytes = self._geometry.cluster_bytes
        within = offset % cluster_bytes
        cluster = offset - within
        if cluster in self._l2_tables:
            first = self._l2_tables[cluster] * self._codec.per_table + within // self._codec.entry_bytes
            return f"L2 table, {self._guest(first, length // self._codec.entry_bytes)}"
        if cluster in self._refcount_blocks:
            per_byte = self._geometry.refcounts_per_cluster / cluster_bytes
            index = self._refcount_blocks[cluster] * self._geometry.refcounts_per_cluster
            first, count = index + int(within * per_byte), int(length * per_byte)
            span = f"{first * cluster_bytes:#x} to {(first + count) * cluster_bytes:#x}"
            return f"refcount block, host range {span}"
        if offset in self._l1:
            first = table_entries(offset - self._l1.start)
            count = min(table_entries(length), self._view.header.l1_size - first)
            reach = self._codec.per_table
            return f"L1 table, {self._guest(first * reach, count * reach)}"
        if offset in self._refcount_table:
            first = table_entries(offset - self._refcount_table.start)
            return f"refcount table, entries {first} to {first + table_entries(length) - 1}"
        if offset in self._snapshot_table:
            return f"snapshot table of {self._view.header.nb_snapshots}"
        snapshot = self._snapshot_with_l1_at(offset)
        if snapshot is not None:
            first = table_entries(offset - snapshot.l1_table_offset)
            count = min(table_entries(length), snapshot.l1_size - first)
            return f"L1 table of snapshot {snapshot.id!r}, entries {first} to {first + count - 1}"
        if cluster in self._snapshot_l2_tables:
            return "L2 table of a snapshot"
        return "metadata that a later record gave up"

    def _snapshot_with_l1_at(self, offset: int) -> Snapshot | None:
        """Return the snapshot whose L1 table holds the entry at a host offset."""
        index = bisect.bisect_right(self._snapshot_l1_offsets, offset) - 1
        if index < 0:
            return None
        snapshot = self._snapshot_l1[index]
        within = offset - snapshot.l1_table_offset
        return snapshot if within < table_bytes(snapshot.l1_size) else None

    def _guest(self, first_cluster: int, count: int) -> str:
        """Return a guest range in words, cut at the end of the disk."""
        cluster_bytes, size = self._geometry.cluster_bytes, self._view.header.size
        start, end = first_cluster * cluster_bytes, (first_cluster + count) * cluster_bytes
        return f"guest range {min(start, size):#x} to {min(end, size):#x}"
