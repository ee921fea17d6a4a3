"""What a file has as holes, asked a region at a time: SEEK_DATA and SEEK_HOLE under clusters of an image.

Clusters that are allocated need not be written: a preallocated image is a file of holes. What lies in one
reads as zeros, so nobody needs to read it.
"""

from __future__ import annotations

from collections.abc import Iterator

from jqcow.device.base import Reader, Sparse

_NO_END = 1 << 63


class HostRegions:
    """The holes and the data of one file, which does not change meanwhile. Offsets and lengths in bytes.

    The last region that was found is kept: clusters that follow each other lie in the same one.
    """

    def __init__(self, reader: Reader) -> None:
        """Ask ``reader``; of one that cannot tell all is data."""
        self._sparse = reader if isinstance(reader, Sparse) else None
        self._size = reader.size()
        self._start = self._data_start = self._data_end = 0
        """A hole up to ``_data_start``, then data up to ``_data_end``."""

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield a range in order: (offset, length, may hold data). The rest reads as zeros.

        Raises:
            OSError: the host failed.
        """
        end = offset + length
        while offset < end:
            if not self._start <= offset < self._data_end:
                self._look(offset, end)
            is_data = offset >= self._data_start
            stop = min(end, self._data_end if is_data else self._data_start)
            yield offset, stop - offset, is_data
            offset = stop

    def _look(self, offset: int, end: int) -> None:
        found: tuple[int, int] | None = (offset, end - offset)
        if self._sparse is not None:
            reach = max(end, self._size) - offset
            found = next(iter(self._sparse.data_extents(offset, reach)), None)
        # Without data behind it a hole has no end.
        start, length = found or (_NO_END, 0)
        self._start, self._data_start, self._data_end = offset, start, start + length
