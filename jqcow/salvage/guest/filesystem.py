"""What file systems have in common that keep no checksums of data: a place on the guest's disk."""

from __future__ import annotations

from collections.abc import Iterator

from jqcow.salvage.evidence import BlockSum, Certainty, FilePiece, PlacedDisk


class FileSystem:
    """A file system on the guest's disk.

    Attributes:
        kind: its name, for people.
        start: where it starts on the guest's disk, in bytes.
        length: its length in bytes.
    """

    kind = "file system"

    def __init__(self, start: int, length: int, certainty: Certainty, place: str) -> None:
        """Take where it is, how surely, and the name of what it is in."""
        self.start, self.length = start, length
        self._certainty = certainty
        self._place = place

    @property
    def name(self) -> str:
        """Return what it is and where."""
        return f"{self.kind} in {self._place}"

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield nothing, where what is deleted leaves no trace."""
        return iter(())

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        """Yield nothing: it keeps no checksums of data."""
        return iter(())
