"""A guest's disk in pieces: clusters in any order, of which nobody knows the place."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from jqcow.salvage.evidence import Certainty, GuestStructure, Placement


def _written(descriptor: int, start: int, cluster_bytes: int) -> list[int]:
    """Return the guest's clusters that are not holes of a sparse file, which starts at a guest offset."""
    found: set[int] = set()
    offset, size = 0, os.fstat(descriptor).st_size
    while offset < size:
        try:
            data = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:  # no data up to the end
            break
        offset = os.lseek(descriptor, data, os.SEEK_HOLE)
        found.update(range((start + data) // cluster_bytes, -(-(start + offset) // cluster_bytes)))
    return sorted(found)


class Scattered:
    """Orphans that hold the parts of a disk that are not zeros, in an order drawn by chance.

    Attributes:
        truth: guest offset of each orphan's content by its host offset.
    """

    def __init__(self, cluster_bytes: int) -> None:
        self._cluster_bytes = cluster_bytes
        self.contents: dict[int, bytes] = {}
        self.truth: dict[int, int] = {}

    @classmethod
    def of(cls, disk: Path, cluster_bytes: int, *, chance: random.Random, start: int = 0) -> Scattered:
        """Cut a disk that starts at an offset of the guest's disk; runs of up to nine stay together."""
        orphans = cls(cluster_bytes)
        runs: list[list[tuple[int, bytes]]] = []
        with disk.open("rb") as file:
            left, last = 0, -1
            for number in _written(file.fileno(), start, cluster_bytes):
                guest_offset = number * cluster_bytes
                before = max(0, start - guest_offset)
                file.seek(guest_offset + before - start)
                content = (bytes(before) + file.read(cluster_bytes - before)).ljust(cluster_bytes, b"\0")
                if not content.strip(b"\0"):
                    continue
                left -= 1
                if left <= 0 or number != last + 1:
                    runs.append([])
                    left = chance.randrange(1, 10)
                runs[-1].append((guest_offset, content))
                last = number
        chance.shuffle(runs)
        for run in runs:
            for guest_offset, content in run:
                orphans.add(content, guest_offset)
        return orphans

    def add(self, content: bytes, guest_offset: int = -1) -> int:
        """Put a cluster behind the others and return its host offset."""
        host_offset = (len(self.contents) + 5) * self._cluster_bytes
        self.contents[host_offset] = content
        self.truth[host_offset] = guest_offset
        return host_offset

    @property
    def cluster_bytes(self) -> int:
        return self._cluster_bytes

    def __len__(self) -> int:
        return len(self.contents)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return iter(self.contents.items())

    def read(self, host_offset: int) -> bytes:
        return self.contents[host_offset]


class Placed:
    """A disk whose clusters are those that were placed; the others are zeros if it is whole."""

    def __init__(self, size: int, orphans: Scattered, *, is_whole: bool = False) -> None:
        self._size = size
        self._orphans = orphans
        self._is_whole = is_whole
        self.hosts: dict[int, int] = {}

    @classmethod
    def whole(cls, size: int, orphans: Scattered, truth: Mapping[int, int]) -> Placed:
        disk = cls(size, orphans, is_whole=True)
        disk.hosts = {guest: host for host, guest in truth.items()}
        return disk

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes | None:
        if offset < 0 or offset + length > self._size:
            return None
        step = self._orphans.cluster_bytes
        first = offset // step * step
        parts: list[bytes] = []
        for start in range(first, offset + length, step):
            if start in self.hosts:
                parts.append(self._orphans.read(self.hosts[start]))
            elif self._is_whole:
                parts.append(bytes(step))
            else:
                return None
        return b"".join(parts)[offset - first : offset - first + length]


def settle(structure: GuestStructure, disk: Placed, orphans: Scattered) -> list[Placement]:
    """Take over what is certain until nothing new comes, and return all placements."""
    found: dict[int, Placement] = {}
    for _ in range(10):
        new = [one for one in structure.place(disk, orphans) if found.get(one.host_offset) != one]
        if not new:
            break
        for placement in new:
            found[placement.host_offset] = placement
            if placement.certainty is Certainty.CERTAIN:
                disk.hosts[placement.guest_offset] = placement.host_offset
    return list(found.values())


def wrong(placements: list[Placement], orphans: Scattered) -> list[Placement]:
    """Return the placements that are certain and whose bytes are not those of their place."""
    by_guest = {guest: orphans.contents[host] for host, guest in orphans.truth.items()}
    return [
        one
        for one in placements
        if one.certainty is Certainty.CERTAIN
        and by_guest.get(one.guest_offset, b"") != orphans.contents[one.host_offset]
    ]
