"""The clusters in which files have data and that evidence has not placed: all, and those that nobody has."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator


class Wanted:
    """Runs of such clusters, each of which ends where another piece of a file begins.

    Attributes:
        all: (first, count) of each.
    """

    def __init__(self, clusters: Iterable[int], is_natural: Callable[[int], bool]) -> None:
        """Take the clusters, in order; ``is_natural``: whether a run begins with a cluster."""
        self.all: list[tuple[int, int]] = []
        self._vacant: list[tuple[int, int]] | None = None
        for cluster in clusters:
            first, count = self.all[-1] if self.all else (cluster, 0)
            if count and cluster == first + count and not is_natural(cluster):
                self.all[-1] = first, count + 1
            else:
                self.all.append((cluster, 1))

    def vacant(self, holders: Container[int]) -> list[tuple[int, int]]:
        """Return (first, count) of what is in none of these; the same until something `changed`."""
        if self._vacant is None:
            self._vacant = list(self._find(holders))
        return self._vacant

    def changed(self) -> None:
        """Have what is vacant looked for anew."""
        self._vacant = None

    def _find(self, holders: Container[int]) -> Iterator[tuple[int, int]]:
        for first, count in self.all:
            start = first
            for cluster in range(first, first + count + 1):
                if cluster == first + count or cluster in holders:
                    if cluster > start:
                        yield start, cluster - start
                    start = cluster + 1
