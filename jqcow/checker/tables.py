"""Tables and counters as the walks of whole images need them: decoded fast, and bounded in memory."""

from __future__ import annotations

import mmap
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from jqcow import _native

_COMPARED_CLUSTERS = 8192
"""So many clusters are looked at in one go."""

_DIFFERENCES_AT_ONCE = 64
"""Where one cluster is wrong its neighbours often are."""

_LAZY_BYTES = 1 << 20

Code = Literal["B", "H", "I", "Q"]
"""An array type code: unsigned integers of 1, 2, 4 and 8 bytes."""

REFCOUNT_CODES: dict[int, Code] = {3: "B", 4: "H", 5: "I", 6: "Q"}
"""What holds the refcounts of a refcount order; narrower ones take a byte each."""


def zeroed(code: Code, count: int) -> memoryview:
    """Return ``count`` zeros of an array type code, without touching the memory of a large array."""
    size_bytes = count * array(code).itemsize
    if size_bytes < _LAZY_BYTES:
        return memoryview(bytearray(size_bytes)).cast("B").cast(code)
    # Of shared memory, which is the default, a page is taken when it is read, too.
    store = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(store).cast("B").cast(code)


def used(*counters: memoryview) -> Iterator[int]:
    """Yield the indices at which any of the counters, of ``zeroed``, is not 0; an empty one has none."""
    arrays = [(part.cast("B"), part.itemsize.bit_length() + 2, len(part)) for part in counters if part]
    index, end = 0, max((count for *_, count in arrays), default=0)
    while index < end:
        stop = end
        for data, order, count in arrays:
            found = _native.refcount_find_used(data, order, index, min(stop, count)) if index < count else -1
            stop = found if found >= 0 else stop
        if stop < end:
            yield stop
        index = stop + 1


def layers(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, depth) of the union of ranges (start, end), cut wherever a range starts or ends.

    ``depth`` tells how many of the ranges cover the piece: however often ranges overlap, a walk over the
    pieces sees every place once.
    """
    changes: Counter[int] = Counter()
    for start, end in ranges:
        changes[start] += 1
        changes[end] -= 1
    depth = previous = 0
    for place in sorted(changes):
        if depth and place > previous:
            yield previous, place, depth
        depth += changes[place]
        previous = place


@dataclass(frozen=True)
class Counts:
    """The references to each cluster of a file, beside the refcounts."""

    references: memoryview
    refcounts: memoryview

    def is_leaked(self, cluster: int) -> bool:
        """Return True for a cluster of the file with a refcount and no reference."""
        return self.is_counted(cluster) and not self.references[cluster]

    def is_counted(self, cluster: int) -> bool:
        """Return True for a cluster of the file with a refcount."""
        return cluster < len(self.refcounts) and bool(self.refcounts[cluster])

    def differences(self) -> Iterator[tuple[int, int, int]]:
        """Yield (cluster, refcount, references) where the two differ."""
        start, end = 0, len(self.refcounts)
        while start < end:
            found = _native.first_difference(self.refcounts, self.references, start, end)
            if found < 0:
                return
            start = min(found + _DIFFERENCES_AT_ONCE, end)
            pairs = zip(self.refcounts[found:start], self.references[found:start], strict=True)
            for cluster, (stored, counted) in enumerate(pairs, found):
                if stored != counted:
                    yield cluster, stored, counted

    def _is_unused(self, start: int, stop: int) -> bool:
        """Return True if no cluster in [start, stop) has a refcount or a reference."""
        counts = (self.references[start:stop], self.refcounts[start:stop])
        return all(_native.is_zero(part.cast("B")) for part in counts)

    def end(self) -> int:
        """Return the index behind the last cluster with a refcount or a reference."""
        for stop in range(len(self.refcounts), 0, -_COMPARED_CLUSTERS):
            start = max(stop - _COMPARED_CLUSTERS, 0)
            if self._is_unused(start, stop):
                continue
            used = zip(self.references[start:stop], self.refcounts[start:stop], strict=True)
            last = max((index for index, pair in enumerate(used, start) if any(pair)), default=-1)
            if last >= 0:
                return last + 1
        return 0
