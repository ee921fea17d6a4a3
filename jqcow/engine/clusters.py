"""Runs of host clusters, sets of them, and what of them nobody has written."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jqcow.ondisk.layout import ClusterIndex

UNWRITTEN_MAX = 1 << 16
"""So many clusters are remembered that were written in part: it bounds memory."""


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` host clusters from ``start`` on; ``zero_safe`` as in space.py, S3."""

    start: ClusterIndex
    count: int
    zero_safe: bool = False


class ClusterRuns:
    """A set of cluster indices, kept as sorted runs [start, end)."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._runs: list[tuple[int, int]] = []
        for run in runs:
            self.add(run.start, run.count)

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __contains__(self, cluster: int) -> bool:
        place = bisect_right(self._runs, (cluster, sys.maxsize)) - 1
        return place >= 0 and cluster < self._runs[place][1]

    def __iter__(self) -> Iterator[Run]:
        """Yield the runs in order."""
        return (Run(ClusterIndex(start), end - start) for start, end in self._runs)

    def holds(self, count: int) -> bool:
        """Return True if there are at least ``count`` clusters in the set."""
        held = 0
        for run in self:
            held += run.count
            if held >= count:
                return True
        return count <= 0

    def add(self, start: int, count: int) -> None:
        """Add a run that does not overlap the set: a cluster listed twice would be handed out twice."""
        runs, end = self._runs, start + count
        first = past = bisect_left(runs, (start, start))
        overlaps_next = first < len(runs) and runs[first][0] < end
        if overlaps_next or (first and runs[first - 1][1] > start):
            raise RuntimeError(f"clusters {start}-{end} are listed already")
        if first and runs[first - 1][1] == start:
            first -= 1
            start = runs[first][0]
        if past < len(runs) and runs[past][0] == end:
            end = runs[past][1]
            past += 1
        runs[first:past] = [(start, end)]

    def update(self, runs: Iterable[Run]) -> None:
        """Add runs, of which the set may hold some already."""
        for run in runs:
            self.discard(run.start, run.count)
            self.add(run.start, run.count)

    def discard(self, start: int, count: int) -> None:
        """Remove what the set holds of a run."""
        runs, end = self._runs, start + count
        first = bisect_left(runs, (start, start))
        if first and runs[first - 1][1] > start:
            first -= 1
        past = max(first, bisect_left(runs, (end, end)))
        kept = []
        if first < past and runs[first][0] < start:
            kept.append((runs[first][0], start))
        if first < past and runs[past - 1][1] > end:
            kept.append((end, runs[past - 1][1]))
        runs[first:past] = kept

    def take(self, count: int) -> Run:
        """Remove and return the lowest run, at most ``count`` clusters of it."""
        start, end = self._runs[0]
        taken = min(count, end - start)
        if start + taken == end:
            del self._runs[0]
        else:
            self._runs[0] = (start + taken, end)
        return Run(ClusterIndex(start), taken)


class UnwrittenParts:
    """What of host clusters with subclusters is zero-safe since they were taken (space.py, S3)."""

    def __init__(self) -> None:
        self._left: dict[ClusterIndex, int] = {}
        """A bit for each subcluster."""

    def __len__(self) -> int:
        return len(self._left)

    def taken(self, cluster: ClusterIndex, subclusters: int, *, zero_safe: bool) -> None:
        """A cluster was taken for a guest cluster with so many subclusters."""
        self._left.pop(cluster, None)
        if zero_safe:
            if len(self._left) >= UNWRITTEN_MAX:
                del self._left[next(iter(self._left))]
            self._left[cluster] = (1 << subclusters) - 1

    def plan_to_write(self, cluster: ClusterIndex, part: range) -> bool:
        """Subclusters of a cluster will be written; return True if they were zero-safe."""
        left, mask = self._left.pop(cluster, 0), (1 << part.stop) - (1 << part.start)
        if left & ~mask:
            self._left[cluster] = left & ~mask
        return left & mask == mask
