"""A structure of which only its place is known: what it holds tells nothing of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jqcow.salvage.evidence import BlockSum, Certainty, FilePiece, Orphans, PlacedDisk, Placement
from jqcow.salvage.guest.signs import Sighting


@dataclass(frozen=True)
class Part:
    """A part that is recognised.

    Attributes:
        offset: on the guest's disk, in bytes.
        length: in bytes.
        sighting: where its begin is among the orphans; None if it is on the disk already.
        certainty: how surely it belongs there.
    """

    offset: int
    length: int
    sighting: Sighting | None
    certainty: Certainty


class Opaque:
    """Parts that are recognised, and ranges that may hold anything."""

    def __init__(self, kind: str, where: str, parts: list[Part], unknown: list[tuple[int, int]]) -> None:
        """Take what is known.

        Args:
            kind: what it is, for people.
            where: the name of what it is in.
            parts: that are recognised.
            unknown: (guest offset, length in bytes) of ranges that are in use, or may be.
        """
        self._kind = kind
        self._where = where
        self._parts = parts
        self._unknown = unknown

    @property
    def name(self) -> str:
        """Return what it is and where."""
        return f"{self._kind} in {self._where}"

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield the orphans that parts are in, whole clusters."""
        cluster_bytes = orphans.cluster_bytes
        for part in self._parts:
            if part.sighting is None:
                continue
            first = part.offset - part.sighting.start
            count = -(-(part.sighting.start + part.length) // cluster_bytes)
            if first < 0 or first % cluster_bytes:
                continue
            for index, host in enumerate(part.sighting.clusters[:count]):
                place = first + index * cluster_bytes
                if disk.read(place, 1) is None:
                    yield Placement(place, host, cluster_bytes, part.certainty, self._kind)

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield its parts, then what may hold anything."""
        for part in self._parts:
            yield FilePiece(part.offset, part.length, part.length, (0, 0, part.offset), False)
        for offset, length in self._unknown:
            yield FilePiece(offset, length, length, (0, 0, offset))

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield nothing: it is not known."""
        yield from ()

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        """Yield nothing: it is not known."""
        yield from ()

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        """Yield nothing: it has none."""
        yield from ()
