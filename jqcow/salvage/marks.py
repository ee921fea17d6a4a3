"""What names each cluster of a file: two bits a cluster, and one bit for each orphan.

Memory is that of the clusters that are named: what nobody touches of a large array takes none.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Set
from itertools import pairwise

from jqcow import _native
from jqcow._native import MARK_MANY, MARK_ORDER, MARK_STRUCTURE
from jqcow.errors import UnsupportedFeatureError

MAX_CLUSTERS = 1 << 33
"""2 GiB of marks, 512 TiB in clusters of 64 KiB."""

_WINDOW = 1 << 16
"""Clusters that are searched at once: the kernels' twins look at all of them."""

_BYTES_AT_ONCE = 1 << 20

STARTS_MAX = 1 << 21
"""So many streams are compared, 128 GiB of them in clusters of 64 KiB."""

NOBODY, ONE, MANY, STRUCTURE = 0, 1, MARK_MANY, MARK_STRUCTURE


class Marks:
    """How often entries name each cluster: NOBODY, ONE, MANY; or a STRUCTURE lies there."""

    def __init__(self, cluster_bits: int, file_bytes: int) -> None:
        """Begin with no cluster named.

        Raises:
            UnsupportedFeatureError: a file of more clusters than can be held.
        """
        self.cluster_bits = cluster_bits
        self.cluster_count = -(-file_bytes >> cluster_bits)
        if self.cluster_count > MAX_CLUSTERS:
            raise UnsupportedFeatureError(f"a file of {self.cluster_count} clusters is too large to salvage")
        self.data = bytearray(-(-self.cluster_count // 4))

    def of(self, cluster: int) -> int:
        """Return how a cluster is marked; one past the end is not."""
        return (
            _native.refcount_get(self.data, cluster, MARK_ORDER) if cluster < self.cluster_count else NOBODY
        )

    def set_structure(self, offset: int, length: int) -> bool:
        """Mark the clusters of a structure, as far as the file has them; return False if one had a mark."""
        is_free = True
        last = min(self.cluster_count, -(-(offset + length) >> self.cluster_bits))
        for cluster in range(offset >> self.cluster_bits, last):
            is_free = is_free and self.of(cluster) == NOBODY
            _native.refcount_set(self.data, cluster, MARK_ORDER, STRUCTURE)
        return is_free


class Bits:
    """A set of clusters."""

    def __init__(self, cluster_count: int) -> None:
        """Begin with none of ``cluster_count``."""
        self.cluster_count = cluster_count
        self.data = bytearray(cluster_count + 7 >> 3)

    def __contains__(self, cluster: int) -> bool:
        """Return True if a cluster is in the set."""
        return 0 <= cluster < self.cluster_count and bool(_native.refcount_get(self.data, cluster, 0))

    def add(self, cluster: int) -> None:
        """Add a cluster."""
        _native.refcount_set(self.data, cluster, 0, 1)

    def discard(self, cluster: int) -> None:
        """Take a cluster out."""
        if cluster < self.cluster_count:
            _native.refcount_set(self.data, cluster, 0, 0)

    def discard_range(self, first: int, stop: int) -> None:
        """Take the clusters in [first, stop) out."""
        for cluster in range(first, min(stop, self.cluster_count)):
            self.discard(cluster)

    def remove(self, others: Bits) -> None:
        """Take out what is in another set of the same clusters."""
        for start in range(0, len(self.data), _BYTES_AT_ONCE):
            part = self.data[start : start + _BYTES_AT_ONCE]
            other = int.from_bytes(others.data[start : start + _BYTES_AT_ONCE], "little")
            if other:
                left = int.from_bytes(part, "little") & ~other
                self.data[start : start + len(part)] = left.to_bytes(len(part), "little")

    def __len__(self) -> int:
        """Return how many are in the set."""
        return int.from_bytes(self.data, "little").bit_count()

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first cluster, count) of neighbours in the set, in order."""
        first = None
        for window in range(0, self.cluster_count, _WINDOW):
            start, end = window, min(window + _WINDOW, self.cluster_count)
            while start < end:
                find = _native.refcount_find_used if first is None else _native.refcount_find_zero
                found = find(self.data, 0, start, end)
                if found < 0:
                    break
                if first is not None:
                    yield first, found - first
                first, start = (found, found) if first is None else (None, found)
        if first is not None:
            yield first, self.cluster_count - first

    def __iter__(self) -> Iterator[int]:
        """Yield the clusters in order."""
        for first, count in self.runs():
            yield from range(first, first + count)


class StreamStarts:
    """Where the compressed data of entries starts: marks are of clusters, which many streams share."""

    def __init__(self) -> None:
        """Begin with none."""
        self._starts, self._new = array("Q"), False
        self._twice: set[int] = set()

    def take(self, starts: Iterable[int]) -> None:
        """Take where the streams start that the entries of a table name.

        Of more than `STARTS_MAX` those are found that one table names twice.
        """
        some = array("Q", starts)
        self._new = True
        if len(self._starts) + len(some) <= STARTS_MAX:
            self._starts += some
        else:
            self._twice |= _repeated(some)

    @property
    def twice(self) -> Set[int]:
        """The starts that several entries have."""
        if self._new:
            self._twice |= _repeated(self._starts)
            self._new = False
        return self._twice


def _repeated(numbers: Iterable[int]) -> set[int]:
    return {one for one, other in pairwise(sorted(numbers)) if one == other}
