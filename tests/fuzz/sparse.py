"""A device in memory with holes: a hostile image may name offsets that no buffer could reach."""

from __future__ import annotations

import errno
import os

from jqcow.device.base import ReadBuffer

PAGE_BYTES = 4096
MAX_FILE_BYTES = 16 << 40
"""As on ext4: growing past it fails with EFBIG."""

WRITTEN_BYTES_MAX = 128 << 20


class Unbounded(AssertionError):
    """The engine asks for more than any small image can be worth."""


class SparseDevice:
    """A file of up to 16 TiB that remembers only what was written, and refuses to be filled."""

    def __init__(self, content: bytes = b"", *, read_only: bool = False) -> None:
        self._pages: dict[int, bytearray] = {}
        self._size = 0
        self._read_only = False
        self.closed = False
        self.written_bytes = 0
        self.pwrite(content, 0)
        self._read_only = read_only
        self.written_bytes = 0

    @property
    def read_only(self) -> bool:
        """True when every changing method raises."""
        return self._read_only

    def reopen(self, *, read_only: bool) -> None:
        """Open again what was closed."""
        self._read_only = read_only
        self.closed = False

    def size(self) -> int:
        """Return the length of the device."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes; what was never written reads as zeros."""
        buffer = bytearray(self._checked(length, offset))
        self.pread_into(memoryview(buffer), offset)
        return bytes(buffer)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what was never written reads as zeros."""
        self._checked(len(buffer), offset)
        end = offset + len(buffer)
        buffer[:] = bytes(len(buffer))
        for index in self._pages_within(offset, end):
            start = index * PAGE_BYTES
            low, high = max(start, offset), min(start + PAGE_BYTES, end)
            buffer[low - offset : high - offset] = self._pages[index][low - start : high - start]

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write, growing the device where needed."""
        data = memoryview(buffer).cast("B")
        self._changes(len(data), offset, len(data))
        end = offset + len(data)
        position = offset
        while position < end:
            index, within = divmod(position, PAGE_BYTES)
            step = min(end - position, PAGE_BYTES - within)
            page = self._pages.setdefault(index, bytearray(PAGE_BYTES))
            page[within : within + step] = data[position - offset : position - offset + step]
            position += step
        self._size = max(self._size, end)

    def barrier(self, name: str) -> None:
        """Nothing to do."""
        self._changes(0, 0, 0)

    def truncate(self, size_bytes: int) -> None:
        """Set the length."""
        self._changes(0, size_bytes, 0)
        if size_bytes < self._size:
            self._zero(size_bytes, self._size)
        self._size = size_bytes

    def allocate(self, offset: int, length: int) -> None:
        """Grow the device."""
        self._changes(length, offset, 0)
        self._size = max(self._size, offset + length)

    def punch(self, offset: int, length: int) -> bool:
        """Make a range a hole."""
        self._changes(length, offset, 0)
        self._zero(offset, min(offset + length, self._size))
        return True

    def is_hole(self, offset: int, length: int) -> bool:
        """Return True if nothing of the range was written."""
        self._checked(0, offset)
        return not self._pages_within(offset, offset + length)

    def close(self) -> None:
        """Close it."""
        self.closed = True

    def _pages_within(self, start: int, end: int) -> list[int]:
        """Return the indices of the pages that hold something of a range."""
        first, past = start // PAGE_BYTES, -(-end // PAGE_BYTES)
        if past - first > len(self._pages):
            return [index for index in self._pages if first <= index < past]
        return [index for index in range(first, past) if index in self._pages]

    def _zero(self, start: int, end: int) -> None:
        for index in self._pages_within(start, end):
            low, high = max(start, index * PAGE_BYTES), min(end, (index + 1) * PAGE_BYTES)
            if high - low == PAGE_BYTES:
                del self._pages[index]
            elif low < high:
                within = low - index * PAGE_BYTES
                self._pages[index][within : within + high - low] = bytes(high - low)

    def _checked(self, length: int, offset: int) -> int:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if offset >= 1 << 63:
            raise OverflowError("Python int too large to convert to C long")
        if offset < 0 or length < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if length > 1 << 30:
            raise MemoryError
        return length

    def _changes(self, length: int, offset: int, written: int) -> None:
        # A hole may be longer than what memory holds.
        self._checked(min(length, written), offset)
        if self._read_only:
            raise Unbounded("a device that is open for reading only is changed")
        if offset + length > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self.written_bytes += written
        if self.written_bytes > WRITTEN_BYTES_MAX:
            raise Unbounded(f"more than {WRITTEN_BYTES_MAX} bytes are written")
