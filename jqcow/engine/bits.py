"""The bits of persistent dirty bitmaps through one view: read, set and joined (specification, "Bitmaps").

Bit n of a bitmap is bit n % 8 of its byte n / 8. The bytes are in clusters that the bitmap's table names; an
entry without a cluster stands for zeros, or for ones.

B6. A bitmap ends with its table: what lies behind, in the same cluster, is never read or written as an entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jqcow import _native
from jqcow.engine.metadata import View
from jqcow.engine.refcounts import Allocation
from jqcow.errors import CorruptionError
from jqcow.ondisk import entries, layout
from jqcow.ondisk.bitmaps import BitmapEntry
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.layout import HostOffset, entry_place

STEP_BYTES = 1 << 20
"""So many bytes of a bitmap are looked at in one go."""
RUN_BYTES = 512


class Bits:
    """The bits of one image's bitmaps through one view. What changes them is called inside an operation."""

    def __init__(self, view: View, refcounts: Allocation) -> None:
        self.view = view
        self.refcounts = refcounts
        self.space = refcounts.space
        self.geometry = view.geometry

    def allocated(self, entry: BitmapEntry) -> Iterator[tuple[int, HostOffset]]:
        """Yield (index, host offset) of the clusters of bits that a bitmap has."""
        block_bytes, table = self.geometry.block_bytes, HostOffset(entry.table_offset)
        for start in range(0, layout.table_bytes(entry.table_entries), block_bytes):
            block = self.view.block(HostOffset(table + start))
            if _native.is_zero(block):
                continue
            first = layout.table_entries(start)
            for index in range(first, min(first + layout.table_entries(block_bytes), entry.table_entries)):
                bits, _ = self._bits_at(entry, index)
                if bits:
                    yield index, bits

    def _bits_at(self, entry: BitmapEntry, index: int) -> tuple[HostOffset, bool]:
        if index >= entry.table_entries:
            raise RuntimeError("a bitmap ends with its table")
        table = HostOffset(entry.table_offset)
        try:
            return entries.decode_bitmap_table(self.view.entry(table, index), self.geometry)
        except DamagedEntry as error:
            raise CorruptionError("bitmap table", entry_place(table, index), str(error)) from error

    def read(self, entry: BitmapEntry, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of a bitmap."""
        parts = []
        for index, within, count in self._pieces(start, length):
            bits, all_ones = self._bits_at(entry, index)
            if bits:
                parts.append(self.view.read(HostOffset(bits + within), count))
            else:
                parts.append((b"\xff" if all_ones else b"\0") * count)
        return b"".join(parts)

    def write(self, entry: BitmapEntry, start: int, data: bytes) -> None:
        """Replace bytes of a bitmap from ``start`` on; a cluster for them is taken if they ask for one.

        Raises:
            OSError: the host has no space for it.
        """
        position = 0
        for index, within, count in self._pieces(start, len(data)):
            part = data[position : position + count]
            position += count
            bits, all_ones = self._bits_at(entry, index)
            if not bits:
                if part.count(255 if all_ones else 0) == count:
                    continue
                bits = self._take_cluster(entry, index, all_ones=all_ones)
            self.edit(HostOffset(bits + within), part)

    def _pieces(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the table entry, offset in its cluster, length) of bytes of a bitmap."""
        end, cluster_bytes = start + length, self.geometry.cluster_bytes
        while start < end:
            index, within = divmod(start, cluster_bytes)
            count = min(cluster_bytes - within, end - start)
            yield index, within, count
            start += count

    def _take_cluster(self, entry: BitmapEntry, index: int, *, all_ones: bool) -> HostOffset:
        bits = self.refcounts.allocate_metadata()
        if all_ones:
            self.edit(bits, b"\xff" * self.geometry.cluster_bytes)
        self.view.set_entry(HostOffset(entry.table_offset), index, bits)
        return bits

    def edit(self, offset: HostOffset, data: bytes) -> None:
        """Stage bytes of metadata."""
        block_bytes, position = self.geometry.block_bytes, 0
        while position < len(data):
            within = offset % block_bytes
            part = data[position : position + block_bytes - within]
            self.view.edit(HostOffset(offset - within))[within : within + len(part)] = part
            offset, position = HostOffset(offset + len(part)), position + len(part)

    def set_bits(self, entry: BitmapEntry, first: int, end: int) -> None:
        """Set bits [first, end) of a bitmap; whole clusters of them take no space."""
        per_cluster = self._bits_per_cluster
        while first < end:
            index, within = divmod(first, per_cluster)
            stop = min(end, first - within + per_cluster)
            if stop - first == per_cluster:
                self.drop_cluster(entry, index, entries.ALL_ONES)
            else:
                self._set_in_cluster(entry, first, stop)
            first = stop

    @property
    def _bits_per_cluster(self) -> int:
        return self.geometry.cluster_bytes << 3

    def _set_in_cluster(self, entry: BitmapEntry, first: int, end: int) -> None:
        start, stop = first >> 3, end + 7 >> 3
        old = self.read(entry, start, stop - start)
        mask = (1 << end - (start << 3)) - (1 << first - (start << 3))
        new = (int.from_bytes(old, "little") | mask).to_bytes(len(old), "little")
        if new != old:
            self.write(entry, start, new)

    def drop_cluster(self, entry: BitmapEntry, index: int, value: int) -> None:
        """Give a table entry another value, without a cluster, and give up the cluster that it has."""
        table = HostOffset(entry.table_offset)
        bits, _ = self._bits_at(entry, index)
        if self.view.entry(table, index) != value:
            self.view.set_entry(table, index, value)
        if bits:
            self.refcounts.release_metadata(self.geometry.cluster_of(bits))

    def mark(self, entry: BitmapEntry, offset: int, length: int) -> None:
        """Set the bits of a range of the disk, as far as there are any."""
        end = min(offset + length, self.view.header.size)
        if offset < end:
            bits = entry.granularity_bits
            self.set_bits(entry, offset >> bits, (end - 1 >> bits) + 1)

    def is_marked(self, entry: BitmapEntry, offset: int, length: int) -> bool:
        """Return True if a range of the disk is dirty all over, as far as there is a disk."""
        end = min(offset + length, self.view.header.size)
        if offset >= end:
            return True
        first, stop = offset >> entry.granularity_bits, (end - 1 >> entry.granularity_bits) + 1
        step = STEP_BYTES << 3
        return all(self._are_set(entry, start, min(stop, start + step)) for start in range(first, stop, step))

    def _are_set(self, entry: BitmapEntry, first: int, end: int) -> bool:
        start = first >> 3
        data = self.read(entry, start, (end + 7 >> 3) - start)
        mask = (1 << end - (start << 3)) - (1 << first - (start << 3))
        return int.from_bytes(data, "little") & mask == mask

    def join(self, target: BitmapEntry, other: BitmapEntry) -> None:
        """Make dirty in a bitmap what is dirty in another one too; granularities may differ."""
        shift = target.granularity_bits - other.granularity_bits
        bits = target.bits_for(self.view.header.size)
        total = bits + 7 >> 3
        # A byte of the coarser one stands for so many of the finer one: always whole ones.
        step = max(1, STEP_BYTES >> shift) if shift > 0 else max(STEP_BYTES, 1 << -shift)
        step = layout.round_up(step, self.geometry.cluster_bytes) if shift <= 0 else step
        for start in range(0, total, step):
            length = min(step, total - start)
            added = int.from_bytes(self._scaled(other, start, length, shift), "little")
            # Nothing behind the end of the disk.
            added &= (1 << bits - (start << 3)) - 1
            if added:
                joined = int.from_bytes(self.read(target, start, length), "little") | added
                self._write_joined(target, start, joined.to_bytes(length, "little"))

    def _write_joined(self, entry: BitmapEntry, start: int, data: bytes) -> None:
        """Replace bytes of a bitmap from ``start`` on; whole clusters of ones take no space."""
        position = 0
        for index, _, count in self._pieces(start, len(data)):
            part = data[position : position + count]
            if count == self.geometry.cluster_bytes and part.count(255) == count:
                self.drop_cluster(entry, index, entries.ALL_ONES)
            else:
                self.write(entry, start + position, part)
            position += count

    def _scaled(self, entry: BitmapEntry, start: int, length: int, shift: int) -> bytes:
        """Return bytes of a bitmap as one with a granularity 2**shift times as large would have them."""
        total = entry.bits_for(self.view.header.size) + 7 >> 3
        first = start << shift if shift > 0 else start >> -shift
        wanted = length << shift if shift > 0 else length + (1 << -shift) - 1 >> -shift
        data = self.read(entry, first, min(wanted, total - first))
        if _native.is_zero(data):
            return b""
        data = data.ljust(wanted, b"\0")
        for _ in range(abs(shift)):
            data = _coarser(data) if shift > 0 else _finer(data)
        return data[:length]

    def dirty_runs(self, entry: BitmapEntry) -> Iterator[tuple[int, int]]:
        """Yield [start, end) in bytes of the disk of what is dirty."""
        length = entry.bits_for(self.view.header.size) + 7 >> 3
        chunks = (
            (start, self.read(entry, start, min(STEP_BYTES, length - start)))
            for start in range(0, length, STEP_BYTES)
        )
        return dirty_ranges(chunks, entry.granularity_bits, self.view.header.size)

    def clear_tail(self, entry: BitmapEntry, end: int) -> None:
        """Clear what the last cluster of bits has behind bit ``end``: nothing there stands for the disk."""
        start, stop = end >> 3, layout.round_up(end + 7 >> 3, self.geometry.cluster_bytes)
        stop = max(stop, self.geometry.cluster_bytes)
        if end % self._bits_per_cluster or not end:
            old = self.read(entry, start, stop - start)
            if not _native.is_zero(old):
                first = old[0] & (1 << (end & 7)) - 1
                self.write(entry, start, bytes([first]) + bytes(len(old) - 1))


def dirty_ranges(
    chunks: Iterable[tuple[int, bytes]], granularity_bits: int, disk_bytes: int
) -> Iterator[tuple[int, int]]:
    """Yield [start, end) in bytes of the disk of the bits that are set, neighbours joined.

    ``chunks`` are parts of a bitmap that follow each other: (first byte, bytes).
    """
    pending: tuple[int, int] | None = None
    for first, chunk in chunks:
        for start, end in _runs_of_ones(chunk, first << 3):
            if pending is not None and pending[1] == start:
                pending = pending[0], end
                continue
            if pending is not None:
                yield _in_bytes(pending, granularity_bits, disk_bytes)
            pending = start, end
    if pending is not None:
        yield _in_bytes(pending, granularity_bits, disk_bytes)


def _in_bytes(bits: tuple[int, int], granularity_bits: int, disk_bytes: int) -> tuple[int, int]:
    return bits[0] << granularity_bits, min(bits[1] << granularity_bits, disk_bytes)


def _runs_of_ones(chunk: bytes, first: int) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of the bits that are set, the first of which is bit ``first``.

    In steps: a number in digits takes time with the square of its length.
    """
    for position in range(0, len(chunk), RUN_BYTES):
        part = chunk[position : position + RUN_BYTES]
        if _native.is_zero(part):
            continue
        digits, base = f"{int.from_bytes(part, 'little'):b}"[::-1], first + (position << 3)
        start = digits.find("1")
        while start >= 0:
            end = digits.find("0", start)
            end = len(digits) if end < 0 else end
            yield base + start, base + end
            start = digits.find("1", end)


def _finer(data: bytes) -> bytes:
    """Return a bitmap with every bit twice."""
    found = bytearray(2 * len(data))
    found[::2], found[1::2] = data.translate(_LOW_HALF_TWICE), data.translate(_HIGH_HALF_TWICE)
    return bytes(found)


def _coarser(data: bytes) -> bytes:
    """Return a bitmap of an even length with one bit for two, set if one of them is."""
    halves = data.translate(_PAIRS)
    low, high = (int.from_bytes(halves[start::2], "little") for start in (0, 1))
    return (low | high << 4).to_bytes(len(data) // 2, "little")


def _half_twice(half: int) -> int:
    return sum((half >> bit & 1) * 3 << 2 * bit for bit in range(4))


_LOW_HALF_TWICE = bytes(_half_twice(value & 15) for value in range(256))
_HIGH_HALF_TWICE = bytes(_half_twice(value >> 4) for value in range(256))
_PAIRS = bytes(sum(bool(value >> 2 * bit & 3) << bit for bit in range(4)) for value in range(256))
