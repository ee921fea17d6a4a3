"""Clusters of files that grew in turns, put in the order of these: several change places at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

COUNTS = (24, 12, 8, 6, 4, 3)
"""So many clusters are looked at together, and all."""


def windows(indices: Sequence[int], is_timed: Callable[[int], bool]) -> Iterator[list[int]]:
    """Yield some neighbours of those of which it is known when their turn was: all, and ever fewer.

    Args:
        indices: of orphans, in the order of the file.
        is_timed: whether it is known; it may change on the way.
    """
    timed = [index for index in indices if is_timed(index)]
    for count in dict.fromkeys((len(timed), *COUNTS)):
        for start in range(len(timed) - count + 1 if count else 0):
            yield [index for index in timed[start : start + count] if is_timed(index)]


def in_turns(
    indices: Sequence[int], clusters: Mapping[int, int | None], turn_of: Callable[[int], int | None]
) -> dict[int, int | None]:
    """Return the clusters that orphans have among them, by orphan, in the order of the turns."""
    places = [
        (turn_of(cluster) or 0, cluster) for index in indices if (cluster := clusters[index]) is not None
    ]
    return dict(zip(indices, (cluster for _, cluster in sorted(places)), strict=False))
