"""A volume in several parts of the disk, shown as a disk of its own to who knows nothing of parts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from jqcow.salvage.evidence import (
    BlockSum,
    Certainty,
    FilePiece,
    GuestStructure,
    Orphans,
    PlacedDisk,
    Placement,
)


class Segment(Protocol):
    """A part of a volume."""

    @property
    def start(self) -> int:
        """Return where it begins in the volume."""
        ...

    @property
    def offset(self) -> int:
        """Return where it begins on the guest's disk."""
        ...

    @property
    def length(self) -> int:
        """Return its length in bytes."""
        ...


class MappedDisk:
    """The disk that a volume's segments make up, in ascending order and without gaps."""

    def __init__(self, disk: PlacedDisk, segments: Sequence[Segment]) -> None:
        self._disk = disk
        self._segments = segments
        self._starts = [segment.start for segment in segments]

    @property
    def size(self) -> int:
        """Return the length of the volume in bytes."""
        return self._segments[-1].start + self._segments[-1].length

    def ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (guest offset, length) of the parts of a range, in its order; what is outside is left out."""
        end = offset + length
        index = bisect_right(self._starts, offset) - 1
        while 0 <= index < len(self._segments) and offset < end:
            segment = self._segments[index]
            count = min(end, segment.start + segment.length) - offset
            if count <= 0:
                return
            yield segment.offset + offset - segment.start, count
            offset += count
            index += 1

    def read(self, offset: int, length: int) -> bytes | None:
        """Return a range; None if a byte of it is not placed with certainty."""
        pieces = [self._disk.read(place, count) for place, count in self.ranges(offset, length)]
        whole = b"".join(piece for piece in pieces if piece is not None)
        return whole if len(whole) == length else None

    def is_aligned(self, cluster_bytes: int) -> bool:
        """Return True if clusters of the disk are clusters of the volume, none in two segments."""
        return all(
            segment.start % cluster_bytes == 0 and segment.offset % cluster_bytes == 0
            for segment in self._segments
        )


class Mapped:
    """A structure in such a volume, with its places on the guest's disk."""

    def __init__(self, structure: GuestStructure, segments: Sequence[Segment]) -> None:
        self._structure = structure
        self._segments = segments

    @property
    def name(self) -> str:
        """Return what it is and where."""
        return self._structure.name

    def _view(self, disk: PlacedDisk) -> MappedDisk:
        return MappedDisk(disk, self._segments)

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield what the structure places."""
        view = self._view(disk)
        for placement in self._structure.place(view, orphans):
            done = 0
            for place, count in view.ranges(placement.guest_offset, placement.length):
                host = placement.host_offset + done
                yield replace(placement, guest_offset=place, host_offset=host, length=count)
                done += count

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what the structure has in use."""
        view = self._view(disk)
        yield from _mapped(view, self._structure.pieces(view))

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what the structure had in use."""
        view = self._view(disk)
        yield from _mapped(view, self._structure.deleted(view))

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        """Yield what the structure knows to be free."""
        view = self._view(disk)
        for offset, length in self._structure.free(view):
            yield from view.ranges(offset, length)

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        """Yield the checksums that the structure keeps, of blocks that are in one part."""
        view = self._view(disk)
        for block in self._structure.sums(view):
            for place, count in view.ranges(block.guest_offset, block.length):
                if count == block.length:
                    yield replace(block, guest_offset=place)


def _mapped(view: MappedDisk, pieces: Iterator[FilePiece]) -> Iterator[FilePiece]:
    """Yield pieces in a volume as those of the disk."""
    for piece in pieces:
        valid_bytes = piece.valid_bytes
        for place, count in view.ranges(piece.guest_offset, piece.length):
            own = min(max(valid_bytes, 0), count)
            yield replace(piece, guest_offset=place, length=count, valid_bytes=own)
            valid_bytes -= count


class Limited:
    """A structure in a volume that is not certain itself: nothing that it places is surer than that."""

    def __init__(self, structure: GuestStructure, limit: Certainty) -> None:
        self._structure = structure
        self._limit = limit

    @property
    def name(self) -> str:
        """Return what it is and where."""
        return self._structure.name

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield what the structure places, no surer than the limit."""
        for placement in self._structure.place(disk, orphans):
            yield replace(placement, certainty=min(placement.certainty, self._limit))

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what the structure has in use."""
        return self._structure.pieces(disk)

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what the structure had in use."""
        return self._structure.deleted(disk)

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        """Yield what the structure knows to be free."""
        return self._structure.free(disk)

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        """Yield the checksums that the structure keeps."""
        return self._structure.sums(disk)
