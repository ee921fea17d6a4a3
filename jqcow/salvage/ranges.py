"""A set of bytes of a file or a disk, as ranges that neither overlap nor touch."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator


class Ranges:
    """Ranges in order; what is added where some lie already becomes one with them. All numbers are bytes."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Begin with ``ranges``, each (offset, length)."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for offset, length in ranges:
            self.add(offset, length)

    def add(self, offset: int, length: int) -> None:
        """Add a range; one without length adds nothing."""
        if length <= 0:
            return
        end = offset + length
        first = bisect.bisect_left(self._ends, offset)
        last = bisect.bisect_right(self._starts, end)
        if first < last:
            offset, end = min(offset, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [offset]
        self._ends[first:last] = [end]

    def overlaps(self, offset: int, length: int) -> bool:
        """Return True if a byte of a range is in the set."""
        index = bisect.bisect_right(self._ends, offset)
        return length > 0 and index < len(self._starts) and self._starts[index] < offset + length

    def has(self, offset: int, length: int) -> bool:
        """Return True if every byte of a range is in the set."""
        index = bisect.bisect_right(self._ends, offset)
        is_found = index < len(self._starts) and self._starts[index] <= offset
        return length <= 0 or (is_found and offset + length <= self._ends[index])

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what of a range is in the set."""
        end = offset + length
        for index in range(bisect.bisect_right(self._ends, offset), len(self._starts)):
            start, stop = max(offset, self._starts[index]), min(end, self._ends[index])
            if start >= stop:
                return
            yield start, stop - start

    def without(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what of a range is not in the set."""
        for start, count in self.within(offset, length):
            if start > offset:
                yield offset, start - offset
            length -= start + count - offset
            offset = start + count
        if length > 0:
            yield offset, length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of all, in order."""
        return ((start, end - start) for start, end in zip(self._starts, self._ends, strict=True))

    def __len__(self) -> int:
        """Return how many ranges there are."""
        return len(self._starts)

    def total(self) -> int:
        """Return how many bytes are in the set."""
        return sum(self._ends) - sum(self._starts)
