"""Sets of the sectors of a disk: large numbers, a byte for each sector, so that all at once is one step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

SECTOR_BYTES = 512
CHUNK_BYTES = 1 << 16
_ONES = b"\1" * (CHUNK_BYTES // SECTOR_BYTES)
_ZEROS = bytes(CHUNK_BYTES)


class Sectors:
    """A set of the sectors of a disk. ``&``, ``|`` and ``-`` are what they are for sets."""

    def __init__(self, mask: bytes | bytearray) -> None:
        """Take a byte for each sector: 1 for what is in the set, else 0."""
        self._number = int.from_bytes(mask, "little")
        self.length = len(mask)

    @classmethod
    def of(cls, size: int, ranges: Iterable[tuple[int, int]]) -> Sectors:
        """Return the sectors of a disk that lie in ranges, each an offset and a length in bytes."""
        mask = bytearray(count_of(size))
        for offset, length in ranges:
            first, end = offset // SECTOR_BYTES, min(len(mask), -(-(offset + length) // SECTOR_BYTES))
            if end > first:
                mask[first:end] = b"\1" * (end - first)
        return cls(mask)

    def _made(self, number: int) -> Sectors:
        made = Sectors(b"")
        made._number, made.length = number, self.length
        return made

    def __and__(self, other: Sectors) -> Sectors:
        return self._made(self._number & other._number)

    def __or__(self, other: Sectors) -> Sectors:
        return self._made(self._number | other._number)

    def __sub__(self, other: Sectors) -> Sectors:
        return self._made(self._number & ~other._number)

    def __len__(self) -> int:
        return self._number.bit_count()

    def mask(self) -> bytes:
        """Return a byte for each sector."""
        return self._number.to_bytes(self.length, "little")

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes."""
        mask, place = self.mask(), 0
        while (first := mask.find(b"\1", place)) >= 0:
            place = mask.find(b"\0", first)
            place = len(mask) if place < 0 else place
            yield first * SECTOR_BYTES, (place - first) * SECTOR_BYTES


def count_of(size: int) -> int:
    """Return how many sectors a disk of so many bytes has."""
    return -(-size // SECTOR_BYTES)


def not_zero(path: Path, size: int) -> Sectors:
    """Return the sectors of a raw file that are not all zeros."""
    return Sectors(b"".join(_chunks_that_are_not_zero(path, size)))


def _chunks_that_are_not_zero(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for start in range(0, size, CHUNK_BYTES):
            data = os.pread(file.fileno(), min(CHUNK_BYTES, size - start), start)
            count = count_of(min(CHUNK_BYTES, size - start))
            if data == _ZEROS[: len(data)]:
                yield bytes(count)
            else:
                steps = range(0, count * SECTOR_BYTES, SECTOR_BYTES)
                yield bytes(bool(data[at : at + SECTOR_BYTES].strip(b"\0")) for at in steps)


def alike(path: Path, other: Path, size: int) -> Sectors:
    """Return the sectors that two raw files have alike. What a file lacks at its end is alike in no case."""
    parts = []
    with path.open("rb") as left, other.open("rb") as right:
        for start in range(0, size, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size - start)
            a = os.pread(left.fileno(), length, start)
            b = os.pread(right.fileno(), length, start)
            parts.append(_alike(a, b, length))
    return Sectors(b"".join(parts))


def _alike(a: bytes, b: bytes, length: int) -> bytes:
    count = count_of(length)
    if a == b and len(a) == length:
        return _ONES[:count]
    return bytes(
        len(part) == min(SECTOR_BYTES, length - at) and len(part) > 0 and part == b[at : at + SECTOR_BYTES]
        for at in range(0, count * SECTOR_BYTES, SECTOR_BYTES)
        for part in (a[at : at + SECTOR_BYTES],)
    )
