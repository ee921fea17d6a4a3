"""Which clusters of a file hold data that no surviving table names.

OR1. Where the refcounts of a range of clusters are sound, only clusters that they count can be orphans; else
    every cluster with content may be one.
OR2. A cluster that reads as zeros is no orphan: a range that is lost reads as zeros anyway.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterator

from jqcow import _native
from jqcow.ondisk import entries, layout
from jqcow.ondisk.layout import table_bytes
from jqcow.salvage.marks import NOBODY, STRUCTURE, Bits, Marks
from jqcow.salvage.shape import Damage, Damages, Shape
from jqcow.salvage.source import LOOK_BYTES, Source

SAMPLED = 256
"""So many named clusters tell whether a refcount block is sound."""
SOUND = 0.9
"""Of them so many have to be counted."""
ZEROS_MAX = 256
"""So many clusters of zeros in a row may have been written."""
CACHE_BYTES = 32 << 20
_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}
"""Of arrays of refcounts, by their width."""


class Unnamed:
    """The clusters that may be orphans, by what the refcounts say.

    Attributes:
        bits: those clusters; some may hold zeros.
        damages: what is wrong with the refcounts.
        uncounted_bytes: of the file, for which there are no sound refcounts.
        blocks: the host offsets of the refcount blocks, sound or not.
    """

    def __init__(self, source: Source, shape: Shape, marks: Marks) -> None:
        """Compare marks and refcounts; the refcount structures get their marks, too."""
        self._source, self._shape, self._marks = source, shape, marks
        self.bits = Bits(marks.cluster_count)
        self.damages = Damages()
        self.uncounted_bytes = 0
        self._sound: dict[int, int] = {}
        self._block: tuple[int, bytes] = (-1, b"")
        per_block = shape.geometry.refcounts_per_cluster
        blocks = self._find_blocks()
        self.blocks = sorted(blocks.values())
        for first in range(0, marks.cluster_count, per_block):
            stop = min(first + per_block, marks.cluster_count)
            block = blocks.get(first // per_block)
            if block is None or not self._take_block(block, first, stop):
                self._take_data(first, stop)

    def leave_out(self, marks: Marks) -> None:
        """Take out what tables of another disk name, a snapshot's."""
        left = Bits(self.bits.cluster_count)
        _native.find_unmarked(self.bits.data, 0, 0, left.cluster_count, marks.data, 0, left.data)
        self.bits = left

    def counts_once(self) -> bool:
        """Return True if sound refcounts say of the whole file that no cluster has two users."""
        order = self._shape.area.header.refcount_order
        if self.uncounted_bytes:
            return False
        if not order:
            return True
        if order not in _TYPECODES:
            return False
        for offset in self._sound.values():
            counts = array(_TYPECODES[order], self._source.pread(self._shape.geometry.cluster_bytes, offset))
            if sys.byteorder == "little":
                counts.byteswap()
            if max(counts) > 1:
                return False
        return True

    def refcount(self, cluster: int) -> int | None:
        """Return the refcount of a cluster; None where no sound block has it."""
        index, position = divmod(cluster, self._shape.geometry.refcounts_per_cluster)
        if index not in self._sound:
            return None
        if self._block[0] != index:
            self._block = (
                index,
                self._source.pread(self._shape.geometry.cluster_bytes, self._sound[index]),
            )
        return _native.refcount_get(self._block[1], position, self._shape.area.header.refcount_order)

    def _find_blocks(self) -> dict[int, int]:
        """Return the host offset of each refcount block that can be one, by its index in the table."""
        header, geometry = self._shape.area.header, self._shape.geometry
        if not header.has_refcount_table or "refcount_table_offset" in self._shape.lost:
            self.damages.append(Damage("refcount table", None, "there is none where the header says"))
            return {}
        offset = header.refcount_table_offset
        length = header.refcount_table_clusters * geometry.cluster_bytes
        if not self._marks.set_structure(offset, length):
            self.damages.append(Damage("refcount table", offset, "something else lies there, too"))
        found: dict[int, int] = {}
        table = self._source.pread(length, offset)
        for index, entry in entries.nonzero_entries(table):
            block, has_reserved = entries.split_refcount_table(entry)
            place = offset + table_bytes(index)
            if has_reserved or block % geometry.cluster_bytes or not 0 < block < self._source.size():
                self.damages.append(Damage("refcount table", place, f"entry {entry:#x} cannot be"))
            elif self._marks.of(block >> geometry.cluster_bits) != NOBODY:
                self.damages.append(Damage("refcount block", block, "something else lies there, too"))
            else:
                self._marks.set_structure(block, geometry.cluster_bytes)
                found[index] = block
        return found

    def _take_block(self, offset: int, first: int, stop: int) -> bool:
        """Take the clusters that a refcount block counts and nobody names; return if it is sound."""
        block = self._source.pread(self._shape.geometry.cluster_bytes, offset)
        order = self._shape.area.header.refcount_order
        if self._source.bad.overlaps(offset, len(block)):
            self.damages.append(Damage("refcount block", offset, "the host cannot read it"))
            return False
        named = counted = 0
        for cluster in range(first, stop, max(1, (stop - first) // SAMPLED)):
            if self._marks.of(cluster) != NOBODY:
                named += 1
                counted += bool(_native.refcount_get(block, cluster - first, order))
        if counted < named * SOUND:
            self.damages.append(
                Damage("refcount block", offset, f"of {named} clusters in use it counts {counted}")
            )
            return False
        self._sound[first // self._shape.geometry.refcounts_per_cluster] = offset
        _native.find_unmarked(block, order, 0, stop - first, self._marks.data, first, self.bits.data)
        return True

    def _take_data(self, first: int, stop: int) -> None:
        """Take the clusters in which the file has data and that nobody names."""
        bits = self._shape.geometry.cluster_bits
        self.uncounted_bytes += stop - first << bits
        end = first
        for offset, length in self._source.data_extents(first << bits, stop - first << bits):
            # A short hole was written, too: nothing else makes a file so long.
            start = offset >> bits
            start = end if start - end <= ZEROS_MAX else start
            end = -(-(offset + length) >> bits)
            for cluster in range(start, end):
                if cluster < stop and self._marks.of(cluster) == NOBODY:
                    self.bits.add(cluster)


class OrphanClusters:
    """The orphans, as `evidence.Orphans` has them; read from the file each time anew.

    Attributes:
        source: the file.
        cluster_bits: length of a cluster as a power of two.
        bits: which clusters are orphans. One that was placed may be taken out.
        zeros: those that turned out to hold zeros: they need no place, but others lie before and behind them.
    """

    def __init__(self, source: Source, cluster_bits: int, bits: Bits) -> None:
        """Take the clusters in ``bits``; those without content are taken out as they are met."""
        self.source, self.cluster_bits = source, cluster_bits
        self.bits = bits
        self.zeros = Bits(bits.cluster_count)
        self._cache: OrderedDict[int, bytes] = OrderedDict()

    @property
    def cluster_bytes(self) -> int:
        """Return the length of a cluster in bytes."""
        return 1 << self.cluster_bits

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.bits)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield (host offset, content) of each that has content."""
        for first, count in list(self.bits.runs()):
            yield from self._with_content(first << self.cluster_bits, count << self.cluster_bits)

    def _with_content(self, start: int, length: int) -> Iterator[tuple[int, bytes]]:
        step = max(LOOK_BYTES, self.cluster_bytes)
        extents = self.source.data_extents(start, length)
        seen = start
        for offset, extent_bytes in extents:
            first = max(seen, offset - offset % self.cluster_bytes)
            self._discard(seen, first)
            end = layout.round_up(offset + extent_bytes, self.cluster_bytes)
            for place in range(first, end, step):
                data = self.source.pread(min(step, end - place), place)
                for within in range(0, len(data), self.cluster_bytes):
                    content = data[within : within + self.cluster_bytes]
                    if _native.is_zero(content):
                        self._discard(place + within, place + within + 1)
                    elif (place + within) >> self.cluster_bits in self.bits:
                        yield place + within, content
            seen = max(seen, end)
        self._discard(seen, start + length)

    def _discard(self, start: int, end: int) -> None:
        for cluster in range(start >> self.cluster_bits, -(-end >> self.cluster_bits)):
            if cluster in self.bits:
                self.bits.discard(cluster)
                self.zeros.add(cluster)

    def in_file_order(self) -> Iterator[tuple[int, bytes]]:
        """Yield the same by where it lies in the file."""
        return iter(self)

    def offset_of(self, host_offset: int) -> int:
        """Return where in the file what is shown at a host offset begins: there, if it is a cluster."""
        return host_offset

    def read(self, host_offset: int) -> bytes:
        """Return the content of a cluster."""
        content = self._cache.get(host_offset)
        if content is None:
            content = self.source.pread(self.cluster_bytes, host_offset)
            self._cache[host_offset] = content
            while len(self._cache) * self.cluster_bytes > CACHE_BYTES:
                self._cache.popitem(last=False)
        return content


def mark_header(shape: Shape, marks: Marks) -> None:
    """Mark the first cluster: the header lies there, or did."""
    if marks.of(0) != STRUCTURE:
        marks.set_structure(0, shape.geometry.cluster_bytes)
