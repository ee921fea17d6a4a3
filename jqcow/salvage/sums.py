"""Orphans by checksums of blocks: those that the guest keeps, or that `jqcow protect` did.

A sum of 32 bits is right by chance once in 2**32. Where N orphans that match nothing and M places whose
content is not there meet, a chance hit comes N * M times as often. So one right sum alone is certainty only
among few, and else needs a second one beside it.

SU1. A cluster is certain in a place if every block of it that has a sum there has the right one, the place is
    the only one of that content, and chance is ruled out: by two sums in the cluster, by a neighbour in the
    file that has the right sum for the neighbouring place, or as what is left over on both sides is few.
SU2. Content that several places have is certain in them if there are as many clusters of it. Clusters of one
    place that differ are certain in none.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jqcow import _native
from jqcow.salvage.evidence import BlockSum, Certainty, Orphans, Placement
from jqcow.salvage.guestmap import GuestMap

CERTAIN_BLOCKS = 2
"""So many right sums of 32 bits are certainty."""
CHANCE_MAX = 1 << 12
"""Unmatched orphans times unmatched places of which no chance hit is feared: it comes once in a million."""
MAX_SAME = 64
"""A sum that so many blocks of clusters have is that of a common content, and says nothing."""


@dataclass
class _Class:
    """Clusters of one content, and the places that have the sums of it.

    Attributes:
        places: guest offsets.
        hosts: host offsets of the clusters.
        right: how many sums the content has right in each place.
    """

    places: list[int]
    right: int
    hosts: list[int] = field(default_factory=list)


class SumIndex:
    """Finds the places of clusters by the sums of their blocks."""

    def __init__(
        self,
        guest_map: GuestMap,
        cluster_bytes: int,
        witness: str = "checksums of file data",
        most: Certainty = Certainty.CERTAIN,
        sum_of: Callable[[bytes], int] = _native.crc32c,
    ) -> None:
        """Look for places that are open in ``guest_map``; none will be surer than ``most``.

        ``sum_of`` makes the sums that blocks have.
        """
        self._sum_of = sum_of
        self._map, self._cluster_bytes = guest_map, cluster_bytes
        self._witness, self._most = witness, most
        self._block_bytes = 0
        self._sums: dict[int, dict[int, int]] = defaultdict(dict)
        self._places: dict[tuple[int, int], list[int]] = defaultdict(list)

    def add(self, block_sum: BlockSum) -> None:
        """Take the sum of a block. All have the same length; one of another length is left out."""
        length = block_sum.length
        if not self._block_bytes and 512 <= length <= self._cluster_bytes:
            self._block_bytes = length
        within = block_sum.guest_offset % self._cluster_bytes
        guest = block_sum.guest_offset - within
        if length != self._block_bytes or within % length or not self._map.is_open(guest):
            return
        self._sums[guest][within] = block_sum.crc32c
        self._places[within, block_sum.crc32c].append(guest)

    def placements(self, orphans: Orphans) -> Iterator[Placement]:
        """Yield where orphans belong."""
        if not self._sums:
            return
        classes, unmatched = self._classes(orphans)
        by_place: dict[int, list[_Class]] = defaultdict(list)
        beside: dict[int, set[int]] = defaultdict(set)
        for found in classes:
            for guest in found.places:
                by_place[guest].append(found)
                for host in found.hosts:
                    beside[host].add(guest)
        is_few = unmatched * (len(self._sums) - len(by_place)) <= CHANCE_MAX
        for found in classes:
            is_alone = all(len(by_place[guest]) == 1 for guest in found.places)
            is_enough = len(found.hosts) >= len(found.places)
            for guest, host in zip(sorted(found.places), sorted(found.hosts), strict=False):
                is_ruled_out = found.right >= CERTAIN_BLOCKS or is_few or self._is_beside(beside, guest, host)
                is_certain = is_alone and is_enough and is_ruled_out
                certainty = min(self._most, Certainty.CERTAIN if is_certain else Certainty.LIKELY)
                yield Placement(guest, host, self._cluster_bytes, certainty, self._witness)

    def _is_beside(self, beside: dict[int, set[int]], guest: int, host: int) -> bool:
        """Return True if a neighbour in the file has the right sum for the neighbour on the disk."""
        step = self._cluster_bytes
        return any(guest + way in beside.get(host + way, ()) for way in (step, -step))

    def _classes(self, orphans: Orphans) -> tuple[list[_Class], int]:
        """Return the contents that have places, and how many clusters have none."""
        classes: dict[tuple[int, int], _Class] = {}
        unmatched = 0
        for host, content in orphans:
            places, right, digest = self._of(content)
            if not places:
                unmatched += 1
                continue
            key = digest, zlib.crc32(content)
            found = classes.setdefault(key, _Class(places, right))
            found.hosts.append(host)
        return list(classes.values()), unmatched

    def _of(self, content: bytes) -> tuple[list[int], int, int]:
        """Return the places in which all sums of a content are right, how many, and one of the sums."""
        length, right = self._block_bytes, defaultdict[int, int](int)
        digest = 0
        for within in range(0, len(content), length):
            block = content[within : within + length]
            digest = self._sum_of(block)
            places = self._places.get((within, digest), [])
            if length < len(content) and len(places) > MAX_SAME:
                if _native.is_zero(block):
                    continue
                places = places[:MAX_SAME]
            for guest in places:
                right[guest] += 1
        whole = [guest for guest, count in right.items() if count == len(self._sums[guest])]
        return whole, min((right[guest] for guest in whole), default=0), digest
