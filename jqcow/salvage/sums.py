"""Orphans by checksums of blocks: those that the guest keeps, or that `jqcow protect` did.

M1. A cluster is certain in a place if every block of it that has a sum there has the right one, and they
    are as many as make a chance hit improbable: 64 bits of checksum, or all blocks of the cluster that the
    guest has in use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from jqcow import _native
from jqcow.salvage.evidence import BlockSum, Certainty, Orphans, Placement
from jqcow.salvage.guestmap import GuestMap

CERTAIN_BLOCKS = 2
"""So many right sums of 32 bits are certainty."""
MAX_SAME = 64
"""A sum that so many blocks have is that of a common content, and says nothing."""


class SumIndex:
    """Finds the places of a cluster by the sums of its blocks."""

    def __init__(self, guest_map: GuestMap, cluster_bytes: int) -> None:
        """Look for places that are open in ``guest_map``."""
        self._map, self._cluster_bytes = guest_map, cluster_bytes
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
        for host, content in orphans:
            found = self._of(content)
            for guest, right in found.items():
                wrong = len(self._sums[guest]) - right
                if wrong:
                    continue
                is_certain = right >= CERTAIN_BLOCKS or self._cluster_bytes == self._block_bytes
                certainty = Certainty.CERTAIN if is_certain and len(found) == 1 else Certainty.LIKELY
                yield Placement(guest, host, self._cluster_bytes, certainty, "checksums of file data")

    def _of(self, content: bytes) -> dict[int, int]:
        """Return how many sums are right in each place that a cluster may have."""
        right: dict[int, int] = defaultdict(int)
        for within in range(0, self._cluster_bytes, self._block_bytes):
            block = content[within : within + self._block_bytes]
            places = self._places.get((within, _native.crc32c(block)), [])
            if len(places) > MAX_SAME and _native.is_zero(block):
                continue
            for guest in places[:MAX_SAME]:
                right[guest] += 1
        return right
