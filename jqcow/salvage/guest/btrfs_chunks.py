"""Where logical addresses of btrfs lie on its device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from jqcow.salvage.guest.btrfs_layout import (
    CHUNK_ITEM,
    KEY_STRUCT,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_PLACES,
    Chunk,
    Superblock,
)

STRIPE_BYTES = 64 << 10
RESERVED_BYTES = 1 << 20
"""The begin of a device is kept free by btrfs."""


class ChunkMap:
    """The chunks of a file system, by logical address."""

    def __init__(self, chunks: Iterable[Chunk], device_bytes: int) -> None:
        """Take the chunks that lie on the device and overlap none that came before."""
        self._chunks: list[Chunk] = []
        self._starts: list[int] = []
        for chunk in sorted(chunks, key=lambda chunk: chunk.logical):
            previous = self._chunks[-1] if self._chunks else None
            apart = previous is None or previous.logical + previous.length <= chunk.logical
            fits = all(place + chunk.length <= device_bytes for place in chunk.places)
            if apart and fits and chunk.length:
                self._chunks.append(chunk)
                self._starts.append(chunk.logical)

    @property
    def chunks(self) -> list[Chunk]:
        """Return all of them in ascending order."""
        return self._chunks

    def find(self, logical: int, length: int = 1) -> Chunk | None:
        """Return the chunk that holds a whole range; None if none does."""
        index = bisect_right(self._starts, logical) - 1
        if index < 0:
            return None
        chunk = self._chunks[index]
        return chunk if logical + length <= chunk.logical + chunk.length else None

    def places(self, logical: int, length: int) -> tuple[int, ...]:
        """Return the physical offsets of a range; none if it is in no chunk, or not in a single one."""
        chunk = self.find(logical, length)
        if chunk is None:
            return ()
        return tuple(place + logical - chunk.logical for place in chunk.places)

    def between(self, start: int, end: int) -> Iterator[Chunk]:
        """Yield the chunks that a range of addresses has a part of."""
        for chunk in self._chunks[max(bisect_right(self._starts, start) - 1, 0) :]:
            if chunk.logical >= end:
                break
            if chunk.logical + chunk.length > start:
                yield chunk

    def outside(self, device_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (physical offset, length) of what is in no chunk, and not the superblocks' either."""
        taken = [(0, RESERVED_BYTES)]
        taken += [(place, SUPERBLOCK_BYTES) for place in SUPERBLOCK_PLACES]
        taken += [(place, chunk.length) for chunk in self._chunks for place in chunk.places]
        yield from gaps(taken, 0, device_bytes)


def gaps(taken: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what a range has beside the ranges that are taken."""
    for offset, length in sorted(taken):
        if offset >= end:
            break
        if offset > start:
            yield start, offset - start
        start = max(start, offset + length)
    if start < end:
        yield start, end - start


def system_chunks(superblock: Superblock) -> Iterator[Chunk]:
    """Yield the chunks that a superblock holds itself: those that the chunk tree lies in."""
    data = superblock.system_chunks
    while len(data) >= KEY_STRUCT.size:
        _, kind, logical = KEY_STRUCT.unpack_from(data)
        if kind != CHUNK_ITEM:
            return
        chunk, item_bytes = Chunk.unpack(logical, data[KEY_STRUCT.size :], superblock.devid)
        if not item_bytes:
            return
        if chunk is not None:
            yield chunk
        data = data[KEY_STRUCT.size + item_bytes :]
