"""An image file as a clean close would leave it.

The view is metadata blocks and a header laid over a file: those that a journal leaves when it is replayed, or
those that an engine has in memory. The checks and maps of whole images look through it. Nothing here writes,
and nothing of the engine is used but the journal's scan.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

from jqcow import _native
from jqcow.device.base import Reader, hole_end
from jqcow.disks.files import open_to_read
from jqcow.engine import scan as scans
from jqcow.engine.scan import Scan
from jqcow.ondisk import entries
from jqcow.ondisk.frame import IntentOperation
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.layout import Geometry
from jqcow.ondisk.root import JournalRange

HOLE_BYTES_MIN = 1 << 16
"""Reads from this length on look for a hole first."""


class FileView:
    """Blocks and a header over a file; offsets and lengths in bytes, of the host."""

    def __init__(
        self,
        reader: Reader,
        area: HeaderArea,
        blocks: Mapping[int, bytes | bytearray],
        *,
        journal: JournalRange | None = None,
        scan: Scan | None = None,
        intents: tuple[IntentOperation, ...] = (),
    ) -> None:
        """Lay blocks and a header over a file.

        Args:
            reader: the file.
            area: the header.
            blocks: by host offset, each of the geometry's block size; not to change while the view is used.
            journal: the range of a live journal, which nothing may use; None on a clean image.
            scan: what that journal holds, where it was read.
            intents: writes of the guest that it has and the tables do not show, in their order.
        """
        self.area = area
        self.journal = journal
        self.scan = scan
        self.intents = intents
        self._reader = reader
        self._blocks = blocks
        self._block_bytes = self.geometry.block_bytes
        self._sorted_blocks = sorted(blocks)

    @classmethod
    def of_file(cls, reader: Reader, *, use_root_copy: bool = False) -> FileView:
        """Read the header, and replay the journal of a live image in memory.

        Args:
            reader: the file.
            use_root_copy: where sector 0 has no valid magic, take the root from its copy.

        Raises:
            FormatError: not a qcow2 image, or one that breaks the specification.
            UnsupportedFeatureError: a frame or operation that a newer jqcow wrote.
            CorruptionError: the header, the root or the journal is damaged.
        """
        root = scans.find_live_root(reader, use_root_copy=use_root_copy)
        if root is None:
            return cls(reader, scans.read_header(reader), {})
        scan, replayed = scans.read_journal(reader, root)
        return cls(
            reader,
            replayed.area,
            replayed.blocks,
            journal=scan.extent,
            scan=scan,
            intents=replayed.intents,
        )

    @property
    def header(self) -> Header:
        """The header's fixed fields."""
        return self.area.header

    @property
    def geometry(self) -> Geometry:
        """The geometry that follows from the header."""
        return self.header.geometry

    @property
    def blocks(self) -> Mapping[int, bytes | bytearray]:
        """What is laid over the file, by host offset."""
        return self._blocks

    @property
    def reserved(self) -> list[tuple[int, int]]:
        """The live journal's range as (offset, length), which nothing may use."""
        return [] if self.journal is None else [(self.journal.offset, self.journal.length)]

    def size(self) -> int:
        """Return the length of the file; a checkpoint first extends a live image to its last used cluster."""
        return self._reader.size() if self.journal is None else max(self._reader.size(), self._used_end())

    def _used_end(self) -> int:
        """Return the host offset behind the highest cluster with a nonzero refcount."""
        for first, refcounts in self.refcount_blocks():
            last = _native.refcount_last_used(refcounts, self.header.refcount_order)
            if last >= 0:
                return (first + last + 1) * self.geometry.cluster_bytes
        return 0

    def refcount_blocks(self) -> Iterator[tuple[int, bytes]]:
        """Yield the refcount blocks from the last to the first: (first cluster counted, refcounts).

        A block that is pointed to again is left out, and so is one past the end of the file, which is
        empty: a hostile table must not cost more than the file is long.
        """
        if not self.header.has_refcount_table:
            return
        seen: set[int] = set()
        file_bytes = self._reader.size()
        geometry, table_offset = self.geometry, self.header.refcount_table_offset
        table = self.read(self.header.refcount_table_clusters * geometry.cluster_bytes, table_offset)
        # A table has room for growth: most of its end is empty.
        for index in reversed(range(entries.last_present(table) + 1)):
            block, _ = entries.split_refcount_table(entries.entry_at(table, index))
            if block and block not in seen and (block < file_bytes or block in self._blocks):
                seen.add(block)
                yield index * geometry.refcounts_per_cluster, self.read(geometry.cluster_bytes, block)

    def read(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from host ``offset``; what lies past the end reads as zeros."""
        data = bytes(length) if self._is_hole(length, offset) else self._reader.pread(length, offset)
        if not self._blocks and offset >= len(self.area.data):
            return data
        buffer = bytearray(data)
        if offset < len(self.area.data):
            head = self.area.data[offset : offset + length]
            buffer[: len(head)] = head
        index = bisect.bisect_right(self._sorted_blocks, offset - self._block_bytes)
        for start in islice(self._sorted_blocks, index, None):
            if start >= offset + length:
                break
            first, last = max(start, offset), min(start + self._block_bytes, offset + length)
            buffer[first - offset : last - offset] = self._blocks[start][first - start : last - start]
        return bytes(buffer)

    def _is_hole(self, length: int, offset: int) -> bool:
        """Return True if the file has nothing there: tables of gigabytes may take no space at all."""
        return length >= HOLE_BYTES_MIN and hole_end(self._reader, offset, offset + length) == offset + length


@contextmanager
def open_view(path: str | os.PathLike[str], *, share_writers: bool = False) -> Iterator[FileView]:
    """Open an image file to look at it as a clean close would leave it.

    Args:
        path: the file.
        share_writers: look also while another program writes, unless its journal is live.

    Raises:
        JqcowError: as `FileView.of_file`, or a writer has the file.
        OSError: the host failed.
    """
    device, _ = open_to_read(path, "qcow2", share_writers=share_writers)
    try:
        yield FileView.of_file(device)
    finally:
        device.close()
