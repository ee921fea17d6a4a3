"""A device on trial: what is changed stays in memory, and shows what would change on the one below."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from jqcow.device.base import Device, ReadBuffer, Sparse
from jqcow.ondisk.layout import SECTOR_BYTES

BLOCK_BYTES = 1 << 16
_ZEROS = bytes(BLOCK_BYTES)


class TrialDevice:
    """Blocks in memory over a device, which is only read and stays open. Offsets and lengths are in bytes."""

    read_only = False

    def __init__(self, below: Device) -> None:
        """Begin with what ``below`` holds."""
        self.below = below
        self.old_bytes = below.size()
        self._size = self.old_bytes
        self._blocks: dict[int, bytearray | bytes] = {}

    def size(self) -> int:
        """Return the length."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes; what lies past the end reads as zeros."""
        buffer = bytearray(length)
        self.pread_into(memoryview(buffer), offset)
        return bytes(buffer)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what lies past the end reads as zeros."""
        for start, end, index, within in _pieces(offset, len(buffer)):
            block = self._blocks.get(index)
            if block is None:
                self.below.pread_into(buffer[start:end], offset + start)
            else:
                buffer[start:end] = block[within : within + end - start]

    def _block(self, index: int) -> bytearray | bytes:
        block = self._blocks.get(index)
        return self.below.pread(BLOCK_BYTES, index * BLOCK_BYTES) if block is None else block

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Keep ``buffer`` in memory."""
        data = memoryview(buffer).cast("B")
        for start, end, index, within in _pieces(offset, len(data)):
            self._change(index, within, data[start:end])
        self._size = max(self._size, offset + len(data))

    def _change(self, index: int, within: int, data: memoryview | bytes) -> None:
        if len(data) == BLOCK_BYTES and bytes(data) == _ZEROS:
            self._blocks[index] = _ZEROS
            return
        block = self._block(index)
        if not isinstance(block, bytearray):
            block = self._blocks[index] = bytearray(block)
        block[within : within + len(data)] = data

    def barrier(self, name: str) -> None:
        """Nothing is durable here."""

    def truncate(self, size_bytes: int) -> None:
        """Set the length; what is cut off reads as zeros, should it come back."""
        if size_bytes < self._size:
            self._zero(size_bytes, self._size - size_bytes)
        self._size = size_bytes

    def _zero(self, offset: int, length: int) -> None:
        for start, end, index, within in _pieces(offset, length):
            self._change(index, within, _ZEROS[: end - start])

    def allocate(self, offset: int, length: int) -> None:
        """Grow to the end of the range."""
        self._size = max(self._size, offset + length)

    def punch(self, offset: int, length: int) -> bool:
        """Make a range read as zeros."""
        self._zero(offset, length)
        return True

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes of what may hold data, by offset; some of it twice."""
        end = offset + length
        below = (
            self.below.data_extents(offset, length) if isinstance(self.below, Sparse) else [(offset, length)]
        )
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
        for index in sorted(self._blocks):
            start = index * BLOCK_BYTES
            if start >= self.old_bytes:
                return
            old, new = self.below.pread(BLOCK_BYTES, start), bytes(self._blocks[index])
            for at in range(0, BLOCK_BYTES, unit_bytes):
                before, after = old[at : at + unit_bytes], new[at : at + unit_bytes]
                is_wanted = before != after or start + at in also
                if is_wanted and start + at < self.old_bytes:
                    yield start + at, before, after


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range at blocks: (start and end within the range, block, place within the block)."""
    start = 0
    while start < length:
        index, within = divmod(offset + start, BLOCK_BYTES)
        end = min(length, start + BLOCK_BYTES - within)
        yield start, end, index, within
        start = end
