"""What a guest's file systems let expect of clusters that are not placed yet, and how an orphan meets it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jqcow.salvage.evidence import FilePiece, GuestStructure, PlacedDisk
from jqcow.salvage.guestmap import GuestMap

BLOCK_BYTES = 4096
"""The unit in which file systems fill clusters, most of them."""

IMPOSSIBLE = -1000.0
"""A score that rules a place out."""

Order = tuple[int, int, int]


@dataclass
class Expected:
    """What a guest cluster is expected to hold.

    Attributes:
        guest: its offset on the disk in bytes.
        written: when the first of its pieces was written: see `FilePiece`.
        data: a bit for each of its blocks that a file, or the file system itself, uses.
        free: a bit for each that is free.
        tails: for each block in which a file ends, how many of its bytes are the file's.
    """

    guest: int
    written: Order | None = None
    data: int = 0
    free: int = 0
    tails: dict[int, int] = field(default_factory=dict)


class Expectations:
    """The clusters that are to be placed, and what is expected of them.

    Attributes:
        clusters: by guest offset.
    """

    def __init__(self, guest_map: GuestMap, cluster_bytes: int) -> None:
        """Expect nothing yet of what is open in ``guest_map``."""
        self._map, self._cluster_bytes = guest_map, cluster_bytes
        self.block_bytes = min(BLOCK_BYTES, cluster_bytes)
        self.clusters: dict[int, Expected] = {}

    def take(self, structures: Iterable[GuestStructure], disk: PlacedDisk) -> None:
        """Take what file systems say is in use, and what they say is free."""
        for structure in structures:
            for piece in structure.pieces(disk):
                self._use(piece)
            for offset, length in structure.free(disk):
                self._free(offset, length)

    def _use(self, piece: FilePiece) -> None:
        end_of_data = piece.guest_offset + piece.valid_bytes
        for guest, first, stop in self._clusters_of(piece.guest_offset, piece.length):
            expected = self.clusters.get(guest)
            if expected is None:
                if not self._map.is_open(guest) or self._map.is_placed(guest):
                    continue
                expected = self.clusters[guest] = Expected(guest)
            expected.data |= ((1 << stop - first) - 1) << first
            position = guest - piece.guest_offset
            written = (*piece.written[:2], piece.written[2] + max(0, position))
            if expected.written is None or written < expected.written:
                expected.written = written
            tail_block = (end_of_data - guest) // self.block_bytes
            tail_bytes = (end_of_data - guest) % self.block_bytes
            if piece.is_data and tail_bytes and first <= tail_block < stop:
                expected.tails[tail_block] = tail_bytes

    def _free(self, offset: int, length: int) -> None:
        """Take what is free: of clusters that are in use in part; others hold nothing that is missed."""
        edge = min(length, self._cluster_bytes)
        for start, count in {(offset, edge), (offset + length - edge, edge)}:
            for guest, first, stop in self._clusters_of(start, count):
                expected = self.clusters.get(guest)
                if expected is not None:
                    expected.free |= ((1 << stop - first) - 1) << first

    def _clusters_of(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (guest offset, first block, block behind the last) of each cluster that a range touches."""
        end = min(offset + length, self._map.size)
        guest = offset - offset % self._cluster_bytes
        while guest < end:
            first = max(0, offset - guest) // self.block_bytes
            stop = -(-min(self._cluster_bytes, end - guest) // self.block_bytes)
            yield guest, first, stop
            guest += self._cluster_bytes

    def by_writing(self) -> list[Expected]:
        """Return what is expected in the order in which it was written."""
        return sorted(self.clusters.values(), key=lambda found: (found.written or (0, 0, 0), found.guest))

    def by_place(self) -> list[Expected]:
        """Return what is expected in the order of the disk."""
        return sorted(self.clusters.values(), key=lambda found: found.guest)


def fingerprint(content: bytes, block_bytes: int) -> tuple[int, ...]:
    """Return for each block of a cluster how many of its bytes come before the zeros at its end."""
    return tuple(
        len(content[start : start + block_bytes].rstrip(b"\0"))
        for start in range(0, len(content), block_bytes)
    )


def score(expected: Expected, lengths: tuple[int, ...], block_bytes: int) -> float:
    """Return how well a cluster with a fingerprint meets what is expected; IMPOSSIBLE where it cannot be it.

    The numbers are about logarithms of odds: a tail of the right length is one in thousands.
    """
    total = 0.0
    for block, valid in expected.tails.items():
        length = lengths[block]
        if length > valid:
            return IMPOSSIBLE
        if length == valid:
            total += 8.0
        elif valid - length < 16:
            total += 3.0
        else:
            total -= 2.0
    for block, length in enumerate(lengths):
        bit = 1 << block
        if block in expected.tails:
            continue
        if expected.data & bit:
            total += 0.3 if length == block_bytes else -0.3 if length else -0.7
        elif expected.free & bit:
            total += 0.3 if not length else -0.7
    return total
