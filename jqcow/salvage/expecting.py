"""What a guest's file systems let expect of clusters that are not placed yet, and how an orphan meets it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import log

from jqcow.salvage.evidence import FilePiece, GuestStructure, PlacedDisk
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.tables import Fate

BLOCK_BYTES = 4096
"""The unit in which file systems fill clusters, most of them."""

IMPOSSIBLE = -1000.0
"""A score that rules a place out."""

FILES_MAX = 64
"""So many files of a cluster are told apart."""

CLUSTERS_MAX = 16_384
ORPHANS_EACH = 4
"""So many clusters are expected, and so many more for each orphan: a container may claim any length."""

Order = tuple[int, int, int]


@dataclass
class Expected:
    """What a guest cluster is expected to hold.

    Attributes:
        guest: its offset on the disk in bytes.
        written: when the first of its pieces was written: see `FilePiece`.
        files: the number of each file with data in it, and where the cluster begins in that file, in bytes;
            before 0 where the file begins in the cluster.
        data: a bit for each of its blocks that a file uses.
        free: a bit for each that is free.
        tails: for each block in which a file ends, how many of its bytes are the file's.
    """

    guest: int
    written: Order | None = None
    files: dict[int, int] = field(default_factory=dict)
    data: int = 0
    free: int = 0
    tails: dict[int, int] = field(default_factory=dict)


class Expectations:
    """The clusters that are to be placed, and what is expected of them.

    Attributes:
        clusters: by guest offset.
    """

    def __init__(self, guest_map: GuestMap, cluster_bytes: int, orphan_count: int = 0) -> None:
        """Expect nothing yet of what is open in ``guest_map``, and little more than orphans can fill (S3)."""
        self._map, self._cluster_bytes = guest_map, cluster_bytes
        self._clusters_max = CLUSTERS_MAX + ORPHANS_EACH * orphan_count
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
        for offset, length in self._open_parts_of(piece.guest_offset, piece.length):
            self._use_part(piece, offset, length)

    def _open_parts_of(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (guest offset, length in bytes) of what of a range lies in open clusters."""
        tables, end = self._map.tables, min(offset + length, self._map.size)
        covers, step = tables.table_covers, self._cluster_bytes
        for index in range(offset // covers, min(-(-end // covers), len(tables.fates))):
            if tables.fates[index] == Fate.ABSENT:
                continue
            for part in self._map.open_parts(index):
                start = max(offset, index * covers + part.entries.start * step)
                stop = min(end, index * covers + part.entries.stop * step)
                if start < stop:
                    yield start, stop - start

    def _use_part(self, piece: FilePiece, offset: int, length: int) -> None:
        end_of_data = piece.guest_offset + piece.valid_bytes
        for guest, first, stop in self._clusters_of(offset, length):
            expected = self.clusters.get(guest)
            if expected is None:
                if len(self.clusters) >= self._clusters_max:
                    return
                if self._map.is_placed(guest):
                    continue
                expected = self.clusters[guest] = Expected(guest)
            position = guest - piece.guest_offset
            if piece.is_data:
                if len(expected.files) < FILES_MAX:
                    expected.files[piece.written[1]] = piece.written[2] + position
                expected.data |= ((1 << stop - first) - 1) << first
            written = (*piece.written[:2], piece.written[2] + max(0, position))
            if piece.is_data and (expected.written is None or written < expected.written):
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
        """Return the clusters of files in the order in which they were written."""
        files = (found for found in self.clusters.values() if found.files)
        return sorted(files, key=lambda found: (found.written or (0, 0, 0), found.guest))

    def by_place(self) -> list[Expected]:
        """Return all clusters in use in the order of the disk, those of the file system itself too."""
        return sorted(self.clusters.values(), key=lambda found: found.guest)


@dataclass(frozen=True)
class Fingerprint:
    """What a cluster looks like.

    Attributes:
        lengths: for each block, how many of its bytes come before the zeros at its end.
        texture: what kind of bytes it has: see `texture_of`.
    """

    lengths: tuple[int, ...]
    texture: int


def fingerprint(content: bytes, block_bytes: int) -> Fingerprint:
    """Return what a cluster looks like."""
    starts = range(0, len(content), block_bytes)
    lengths = tuple(len(content[start : start + block_bytes].rstrip(b"\0")) for start in starts)
    return Fingerprint(lengths, texture_of(content))


_TEXT = bytes(range(32, 127)) + b"\t\n\r"
_SAMPLE_BYTES = 1024


def texture_of(content: bytes) -> int:
    """Return what kind of bytes a cluster has: 0 zeros, 1 text, 2 noise, as packed data is, 3 others."""
    sample = b"".join(
        content[start : start + 64] for start in range(0, len(content), max(64, len(content) // 16))
    )
    sample = sample[:_SAMPLE_BYTES].replace(b"\0", b"") if sample.count(0) > 0.875 * len(sample) else sample
    if not sample:
        return 0
    if len(sample.translate(None, _TEXT)) * 20 < len(sample):
        return 1
    return 2 if len(set(sample)) * 4 > min(len(sample), 256) * 3 else 3


class Odds:
    """How much it tells that a cluster looks as it does, as logarithms of odds.

    What most orphans look like tells nothing; a file's end where one is expected is one in thousands.
    """

    TAIL_RIGHT, TAIL_NEAR, TAIL_SHORT = 8.0, 3.0, -2.0
    REST_MAX = 1.5
    NEAR_BYTES = 16
    """A file may end with some zeros of its own."""
    _OF_DATA = (0.08, 0.04, 0.88)
    _OF_FREE = (0.60, 0.06, 0.34)

    def __init__(self, fingerprints: Iterable[Fingerprint], block_bytes: int) -> None:
        """Take what the orphans look like."""
        self._block_bytes = block_bytes
        counts = [2, 2, 2]
        for found in fingerprints:
            for length in found.lengths:
                counts[self._class_of(length)] += 1
        shares = [count / sum(counts) for count in counts]
        self._data = [log(odds / share) for odds, share in zip(self._OF_DATA, shares, strict=True)]
        # Most of a file is full blocks, and zeros come in long runs: they tell nothing, however many.
        self._data[0], self._data[2] = min(-0.02, self._data[0]), 0.0
        self._free = [log(odds / share) for odds, share in zip(self._OF_FREE, shares, strict=True)]

    def _class_of(self, length: int) -> int:
        return 0 if not length else 2 if length == self._block_bytes else 1

    def score(self, expected: Expected, found: Fingerprint) -> float:
        """Return how well a cluster meets what is expected; IMPOSSIBLE where it cannot be it."""
        total = 0.0
        for block, valid in expected.tails.items():
            length = found.lengths[block]
            if length > valid:
                return IMPOSSIBLE
            if length == valid:
                total += self.TAIL_RIGHT
            else:
                total += self.TAIL_NEAR if valid - length < self.NEAR_BYTES else self.TAIL_SHORT
        return total + max(-self.REST_MAX, min(self.REST_MAX, self._rest(expected, found)))

    def _rest(self, expected: Expected, found: Fingerprint) -> float:
        """Return what all blocks tell in which no file ends; neighbours are alike, so the sum is bounded."""
        total = 0.0
        for block, length in enumerate(found.lengths):
            if block in expected.tails:
                continue
            if expected.data >> block & 1:
                total += self._data[self._class_of(length)]
            elif expected.free >> block & 1:
                total += self._free[self._class_of(length)]
        return total
