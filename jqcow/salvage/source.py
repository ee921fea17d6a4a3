"""A damaged file, read around what the host cannot read.

R1. What the host cannot read reads as zeros and is in ``bad``, to the sector: whoever reads asks there before
    it believes zeros. Any other error of the host is raised.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

from jqcow.device.base import Reader, Sparse
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.salvage.ranges import Ranges

UNREADABLE = (errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ)
"""What a host says of sectors that its medium, or its file system's checksums, lost."""

LOOK_BYTES = 1 << 20
_BLOCK_BYTES = 4096
"""Sectors that a medium loses are lost by this many bytes at a time on most; only then one by one."""


class Source:
    """Reads a file as `Reader` does.

    Attributes:
        bad: the ranges of the file that the host could not read so far.
    """

    def __init__(self, reader: Reader, bad: Iterable[tuple[int, int]] = ()) -> None:
        """Read ``reader``, but not what is known to be ``bad``, as (offset, length)."""
        self._reader = reader
        self._size = reader.size()
        self.bad = Ranges(bad)

    def size(self) -> int:
        """Return the length of the file in bytes, as it was at the beginning."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from ``offset``; what lies past the end, or is bad, reads as zeros."""
        if not self.bad.overlaps(offset, length):
            try:
                return self._reader.pread(length, offset)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
        found = bytearray(length)
        self._read_around(memoryview(found), offset)
        return bytes(found)

    def _read_around(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` by halves, as long as they cannot be read."""
        waiting = [(0, len(buffer))]
        while waiting:
            first, stop = waiting.pop()
            if self._is_known_bad(offset + first, stop - first):
                continue
            if not self.bad.overlaps(offset + first, stop - first):
                try:
                    buffer[first:stop] = self._reader.pread(stop - first, offset + first)
                    continue
                except OSError as error:
                    if error.errno not in UNREADABLE:
                        raise
            middle = _middle(offset + first, offset + stop) - offset
            if first < middle < stop:
                waiting += [(middle, stop), (first, middle)]
            else:
                self.bad.add(offset + first, stop - first)

    def _is_known_bad(self, offset: int, length: int) -> bool:
        return next(self.bad.within(offset, length), None) == (offset, length)

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what may hold data in a range, by offset; the rest reads as zeros."""
        length = min(length, self._size - offset)
        if length <= 0:
            return
        if isinstance(self._reader, Sparse):
            yield from self._reader.data_extents(offset, length)
        else:
            yield offset, length


def _middle(start: int, end: int) -> int:
    """Return where to part a range: at a block's start if one is inside, else at a sector's."""
    for unit in (_BLOCK_BYTES, SECTOR_BYTES):
        middle = start + (end - start) // 2
        middle -= middle % unit
        if middle <= start:
            middle += unit
        if start < middle < end:
            return middle
    return end
