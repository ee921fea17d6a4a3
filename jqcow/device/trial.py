"""A device on trial: what is changed stays in memory, and shows what would change on the one below."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from heapq import merge

from jqcow.device.base import Device, ReadBuffer, Sparse, filled_bytes, has_fixed_size
from jqcow.ondisk.layout import SECTOR_BYTES

BLOCK_BYTES = 1 << 16
_ZEROS = bytes(BLOCK_BYTES)


class Ranges:
    """Numbers, as ranges in order that do not touch."""

    def __init__(self) -> None:
        """Begin with none."""
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and number < self._ends[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of each."""
        return zip(self._starts, self._ends, strict=True)

    def add(self, start: int, end: int) -> None:
        """Add the numbers in [start, end)."""
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]


class TrialDevice:
    """Blocks in memory over a device, which is only read and stays open. Offsets and lengths are in bytes."""

    read_only = False

    def __init__(self, below: Device) -> None:
        """Begin with what ``below`` holds."""
        self.below = below
        self.old_bytes = below.size()
        self._size = self.old_bytes
        self._blocks: dict[int, bytearray] = {}
        self._hidden = Ranges()
        """Blocks that read as zeros whatever is below, but for those in memory."""

    @property
    def has_fixed_size(self) -> bool:
        """True if the device below has it."""
        return has_fixed_size(self.below)

    def size(self) -> int:
        """Return the length."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes; what lies past the end reads as zeros."""
        return filled_bytes(self, length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what lies past the end reads as zeros."""
        for start, end, index, within in _pieces(offset, len(buffer)):
            block = self._blocks.get(index)
            if block is not None:
                buffer[start:end] = block[within : within + end - start]
            elif index in self._hidden:
                buffer[start:end] = _ZEROS[: end - start]
            else:
                self.below.pread_into(buffer[start:end], offset + start)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Keep ``buffer`` in memory."""
        data = memoryview(buffer).cast("B")
        for start, end, index, within in _pieces(offset, len(data)):
            self._change(index, within, data[start:end])
        self._size = max(self._size, offset + len(data))

    def _change(self, index: int, within: int, data: memoryview | bytes) -> None:
        block = self._blocks.get(index)
        if block is None:
            block = self._blocks[index] = bytearray(self.pread(BLOCK_BYTES, index * BLOCK_BYTES))
        block[within : within + len(data)] = data

    def barrier(self, name: str) -> None:
        """Nothing is durable here."""

    def truncate(self, size_bytes: int) -> None:
        """Set the length; what is cut off reads as zeros, should it come back."""
        if self.has_fixed_size:
            return
        if size_bytes < self._size:
            self._zero(size_bytes, self._size - size_bytes)
        self._size = size_bytes

    def _zero(self, offset: int, length: int) -> None:
        end = offset + length
        first, last = -(-offset // BLOCK_BYTES), end // BLOCK_BYTES
        if first >= last:
            self._zero_parts(offset, end)
            return
        self._zero_parts(offset, first * BLOCK_BYTES)
        self._zero_parts(last * BLOCK_BYTES, end)
        self._hidden.add(first, last)
        hidden = range(first, last)
        for index in hidden if len(hidden) < len(self._blocks) else list(self._blocks):
            if index in hidden:
                self._blocks.pop(index, None)

    def _zero_parts(self, start: int, end: int) -> None:
        for at, stop, index, within in _pieces(start, end - start):
            self._change(index, within, _ZEROS[: stop - at])

    def allocate(self, offset: int, length: int) -> None:
        """Grow to the end of the range."""
        self._size = max(self._size, offset + length)

    def punch(self, offset: int, length: int) -> bool:
        """Make a range read as zeros, if the device below would."""
        if self.has_fixed_size:
            return False
        self._zero(offset, length)
        return True

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes of what may hold data, by offset; some of it twice."""
        end = offset + length
        below = data_extents_of(self.below, offset, length)
        changed = sorted(index * BLOCK_BYTES for index in self._blocks)
        ours = ((max(at, offset), BLOCK_BYTES) for at in changed if at < end and at + BLOCK_BYTES > offset)
        return merge(below, ours)

    def close(self) -> None:
        """The device below stays open."""

    def changed(
        self, unit_bytes: int = SECTOR_BYTES, also: range = range(0)
    ) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (offset, old, new) of each unit below the old end that is not as it was, in order.

        What lies behind an end is zeros. Units at the offsets ``also``, if they were written, come too.
        """
        for index in self._changed_blocks():
            start = index * BLOCK_BYTES
            if start >= self.old_bytes:
                return
            old, new = self.below.pread(BLOCK_BYTES, start), self.pread(BLOCK_BYTES, start)
            for at in range(0, BLOCK_BYTES, unit_bytes):
                before, after = old[at : at + unit_bytes], new[at : at + unit_bytes]
                is_wanted = before != after or start + at in also
                if is_wanted and start + at < self.old_bytes:
                    yield start + at, before, after

    def behind(self, unit_bytes: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, new) of each unit that begins behind the old end and is not zeros, in order.

        `changed` has the one that reaches across the end.
        """
        first = self.old_bytes + -self.old_bytes % unit_bytes
        for index in sorted(self._blocks):
            start = index * BLOCK_BYTES
            for at in range(max(start, first), min(start + BLOCK_BYTES, self._size), unit_bytes):
                new = bytes(self._blocks[index][at - start : at - start + unit_bytes])
                if new != _ZEROS[: len(new)]:
                    yield at, new

    def _changed_blocks(self) -> Iterator[int]:
        """Yield the blocks that may differ from what is below, in order: of hidden ones those with data."""
        last = -1
        for index in merge(sorted(self._blocks), self._hidden_blocks()):
            if index > last:
                yield index
                last = index

    def _hidden_blocks(self) -> Iterator[int]:
        for first, last in self._hidden:
            start, end = first * BLOCK_BYTES, min(last * BLOCK_BYTES, self.old_bytes)
            if start < end:
                for at, length in data_extents_of(self.below, start, end - start):
                    yield from range(at // BLOCK_BYTES, -(-(at + length) // BLOCK_BYTES))


def data_extents_of(device: Device, offset: int, length: int) -> Iterable[tuple[int, int]]:
    """Return (offset, length) in bytes of what may hold data on a device, by offset."""
    return device.data_extents(offset, length) if isinstance(device, Sparse) else [(offset, length)]


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range at blocks: (start and end within the range, block, place within the block)."""
    start = 0
    while start < length:
        index, within = divmod(offset + start, BLOCK_BYTES)
        end = min(length, start + BLOCK_BYTES - within)
        yield start, end, index, within
        start = end
