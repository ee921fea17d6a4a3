"""A damaged file, read around what the host cannot read.

RD1. What the host cannot read reads as zeros and is in ``bad``, to the sector: whoever reads asks there
    before it believes zeros. Any other error of the host is raised.
"""

from __future__ import annotations

import errno
import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

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
        laid: blocks that a journal says are so, by host offset.
    """

    def __init__(self, reader: Reader, bad: Iterable[tuple[int, int]] = ()) -> None:
        """Read ``reader``, but not what is known to be ``bad``, as (offset, length)."""
        self._reader = reader
        self._size = reader.size()
        self.bad = Ranges(bad)
        self.laid: dict[int, bytes] = {}
        self._places: list[int] = []
        self._laid_bytes = 0

    def lay_over(self, blocks: Mapping[int, bytes]) -> None:
        """Have blocks, all of one length and at multiples of it, read as a journal says they are."""
        self.laid.update(blocks)
        self._places = sorted(self.laid)
        if self._places:
            self._laid_bytes = len(self.laid[self._places[0]])
            self._size = max(self._size, self._places[-1] + self._laid_bytes)

    def size(self) -> int:
        """Return the length of the file in bytes, as it was at the beginning."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from ``offset``; what lies past the end, or is bad, reads as zeros."""
        found = self._pread(length, offset)
        first = bisect_left(self._places, offset - self._laid_bytes + 1)
        if first == len(self._places) or self._places[first] >= offset + length:
            return found
        changed = bytearray(found)
        for place in self._places[first : bisect_left(self._places, offset + length)]:
            start, stop = max(place, offset), min(place + self._laid_bytes, offset + length)
            changed[start - offset : stop - offset] = self.laid[place][start - place : stop - place]
        return bytes(changed)

    def _pread(self, length: int, offset: int) -> bytes:
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
        extents = (
            self._reader.data_extents(offset, length)
            if isinstance(self._reader, Sparse)
            else iter([(offset, length)])
        )
        end = 0
        for start, count in heapq.merge(extents, self._laid_extents(offset, length)):
            if start + count > end:
                yield max(start, end), start + count - max(start, end)
                end = start + count

    def _laid_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        first = bisect_left(self._places, offset)
        for place in self._places[first : bisect_left(self._places, offset + length)]:
            yield place, min(self._laid_bytes, offset + length - place)


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
