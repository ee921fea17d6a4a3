"""Where orphans show a sign of a structure: one pass over them serves everyone who looks for signs.

A sign is a magic number at a fixed place in a structure that begins on a sector. Orphans are looked at in
strides: the first byte of the sign at every sector, and the whole sign only where that is right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from jqcow.salvage.evidence import Orphans

SECTOR_BYTES = 512
SIGHTINGS_MAX = 1 << 14
"""More of one sign are not remembered (EV3)."""


@dataclass(frozen=True)
class Sign:
    """A magic number.

    Attributes:
        magic: its bytes.
        offset: where they are in their sector.
        reach_bytes: how much is read from the sector on, in orphans that follow where one is too short.
    """

    magic: bytes
    offset: int
    reach_bytes: int


@dataclass(frozen=True)
class Sighting:
    """A sector of an orphan that shows a sign.

    Attributes:
        clusters: host offsets of the orphan and of those that follow it, as far as the sign's reach goes.
        start: of the sector in the first of them, in bytes.
    """

    clusters: tuple[int, ...]
    start: int

    def read(self, orphans: Orphans, offset: int, length: int) -> bytes:
        """Return bytes that are so far from the sector's begin; fewer where the sighting ends before."""
        position = self.start + offset
        if position < 0 or length <= 0:
            return b""
        cluster_bytes = orphans.cluster_bytes
        first = position // cluster_bytes
        count = -(-(position + length) // cluster_bytes) - first
        data = b"".join(orphans.read(host) for host in self.clusters[first : first + count])
        position -= first * cluster_bytes
        return data[position : position + length]

    def in_file(self, cluster_bytes: int) -> Sighting:
        """Return the same with the clusters that follow in the file: some may be no orphans, but zeros."""
        count = len(self.clusters)
        return Sighting(tuple(self.clusters[0] + index * cluster_bytes for index in range(count)), self.start)

    def moved(self, distance: int) -> Sighting:
        """Return the same with another begin, so far from it; it may be before the first orphan."""
        return Sighting(self.clusters, self.start + distance)


def windows(orphans: Orphans, reach_bytes: int) -> Iterator[tuple[tuple[int, ...], list[bytes]]]:
    """Yield the offset and the content of every orphan, with those that follow it.

    Args:
        orphans: to read, once.
        reach_bytes: how far into its followers a structure may go that begins in an orphan's last sector.
    """
    cluster_bytes = max(orphans.cluster_bytes, SECTOR_BYTES)
    count = 1 + -(-max(reach_bytes - SECTOR_BYTES, 0) // cluster_bytes)
    ahead: deque[tuple[int, bytes]] = deque()
    source = iter(orphans)
    ahead.extend(islice(source, count))
    while ahead:
        yield tuple(host for host, _ in ahead), [content for _, content in ahead]
        ahead.popleft()
        ahead.extend(islice(source, 1))


def positions(content: bytes, sign: Sign) -> Iterator[int]:
    """Yield where sectors begin that show a sign."""
    firsts = content[sign.offset :: SECTOR_BYTES]
    index = firsts.find(sign.magic[0])
    while index >= 0:
        start = index * SECTOR_BYTES
        if content.startswith(sign.magic, start + sign.offset):
            yield start
        index = firsts.find(sign.magic[0], index + 1)


class SurveyedOrphans:
    """Orphans whose signs were looked for, all at once; else they are as they were."""

    def __init__(self, orphans: Orphans, signs: tuple[Sign, ...]) -> None:
        self._orphans = orphans
        self._signs = signs
        self._sightings: dict[Sign, list[Sighting]] | None = None

    @property
    def cluster_bytes(self) -> int:
        """Return the length of a cluster in bytes."""
        return self._orphans.cluster_bytes

    def __len__(self) -> int:
        return len(self._orphans)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return iter(self._orphans)

    def read(self, host_offset: int) -> bytes:
        """Return the content of the orphan at a host offset."""
        return self._orphans.read(host_offset)

    def sightings(self, sign: Sign) -> list[Sighting]:
        """Return where a sign was seen, in the order of the file."""
        if self._sightings is None:
            self._sightings = survey(self._orphans, self._signs)
        return self._sightings.get(sign, [])


def survey(orphans: Orphans, signs: tuple[Sign, ...]) -> dict[Sign, list[Sighting]]:
    """Look for signs in all orphans, in one pass."""
    found: dict[Sign, list[Sighting]] = {sign: [] for sign in signs}
    reach_bytes = max((sign.reach_bytes for sign in signs), default=0)
    for clusters, contents in windows(orphans, reach_bytes):
        for sign in signs:
            for start in positions(contents[0], sign):
                if len(found[sign]) < SIGHTINGS_MAX:
                    count = -(-(start + sign.reach_bytes) // max(orphans.cluster_bytes, 1))
                    found[sign].append(Sighting(clusters[:count], start))
    return found


def sightings(orphans: Orphans, sign: Sign) -> list[Sighting]:
    """Return where orphans show a sign: by a pass of its own, if they were not surveyed."""
    if isinstance(orphans, SurveyedOrphans):
        return orphans.sightings(sign)
    return survey(orphans, (sign,))[sign]
