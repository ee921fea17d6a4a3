"""A guest's disk whose tables are lost, in memory: clusters in any order, and what was placed of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from jqcow.salvage.evidence import Certainty, GuestStructure, Placement

UNIT_BYTES = 4096


class Memory:
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int) -> bytes:
        return self.data[offset : offset + length].ljust(length, b"\0")


class Orphans:
    """Clusters at host offsets that follow each other."""

    def __init__(self, clusters: Iterable[bytes], cluster_bytes: int, *, shows_zeros: bool = True) -> None:
        self.clusters = list(clusters)
        self._shows_zeros = shows_zeros
        self._cluster_bytes = cluster_bytes

    @property
    def cluster_bytes(self) -> int:
        return self._cluster_bytes

    def __len__(self) -> int:
        return len(self.clusters)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for index, content in enumerate(self.clusters):
            if self._shows_zeros or content.count(0) < len(content):
                yield index * self._cluster_bytes, content

    def read(self, host_offset: int) -> bytes:
        index, rest = divmod(host_offset, self._cluster_bytes)
        if rest:
            raise ValueError("a cluster begins elsewhere")
        return self.clusters[index] if index < len(self.clusters) else bytes(self._cluster_bytes)


class Disk:
    """What was placed for sure."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranges: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        return self._size

    def take(self, placement: Placement, orphans: Orphans) -> None:
        start = placement.host_offset % orphans.cluster_bytes
        content = orphans.read(placement.host_offset - start)[start : start + placement.length]
        self.put(placement.guest_offset, content)

    def put(self, offset: int, content: bytes) -> None:
        for start in range(0, len(content), UNIT_BYTES):
            self._ranges.setdefault(offset + start, content[start : start + UNIT_BYTES])

    def read(self, offset: int, length: int) -> bytes | None:
        if offset < 0 or length < 0 or offset + length > self._size:
            return None
        first = offset - offset % UNIT_BYTES
        pieces = [self._ranges.get(place) for place in range(first, offset + length, UNIT_BYTES)]
        known = [piece for piece in pieces if piece is not None]
        if len(known) < len(pieces):
            return None
        return b"".join(known)[offset - first : offset - first + length]


def used_clusters(raw: Path, cluster_bytes: int, write_bytes: int = 0) -> dict[int, bytes]:
    """Return the clusters of a raw disk that are not zeros, by their offset.

    Those of an aligned range of ``write_bytes`` are all used if one of them is: they were written in one go.
    """
    clusters = {}
    unit_bytes = max(cluster_bytes, write_bytes)
    with raw.open("rb") as file:
        for offset in _written(file.fileno(), raw.stat().st_size, unit_bytes):
            file.seek(offset)
            content = file.read(unit_bytes).ljust(unit_bytes, b"\0")
            for start in range(0, unit_bytes, cluster_bytes) if content.count(0) < len(content) else ():
                clusters[offset + start] = content[start : start + cluster_bytes]
    return clusters


def _written(descriptor: int, size: int, unit_bytes: int) -> Iterator[int]:
    """Yield where units begin that are no hole of a file."""
    offset = 0
    while offset < size:
        try:
            data = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:
            return
        offset = max(data - data % unit_bytes, offset)
        yield offset
        offset += unit_bytes


def runs(clusters: dict[int, bytes], run_bytes: int) -> list[list[int]]:
    """Return the offsets of clusters in groups of those that lie in one aligned range."""
    return [list(group) for _, group in groupby(sorted(clusters), key=lambda offset: offset // run_bytes)]


def place_all(
    structures: Iterable[GuestStructure], disk: Disk, orphans: Orphans
) -> dict[tuple[int, int], Placement]:
    """Ask structures until nothing new comes; return the placements by host offset and length."""
    known = list(structures)
    placed: dict[tuple[int, int], Placement] = {}
    while True:
        fresh = [
            placement
            for structure in known
            for placement in structure.place(disk, orphans)
            if (placement.host_offset, placement.length) not in placed
        ]
        if not fresh:
            return placed
        for placement in fresh:
            placed[placement.host_offset, placement.length] = placement
            if placement.certainty == Certainty.CERTAIN:
                disk.take(placement, orphans)
