"""A disk of the caller's own, below an image on a device of the caller's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jqcow.device.disk import Disk, Extent


@runtime_checkable
class OwnDisk(Protocol):
    """The least that jqcow asks of a disk below an image. Offsets and lengths in bytes, within the disk."""

    @property
    def size(self) -> int:
        """Size of the disk; what lies past its end reads as zeros."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        ...

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        """Return True if a range is known to read as zeros; cheap, False when unsure."""
        ...

    def close(self) -> None:
        """Release the disk. Closing again does nothing."""
        ...


class Adopted(Disk):
    """A caller's disk as a `Disk`: each range that it is asked for is one extent."""

    def __init__(self, own: OwnDisk) -> None:
        """Read from ``own``; `close` closes it."""
        self._own = own

    @property
    def size(self) -> int:
        """Size of the disk."""
        return self._own.size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        self._own.read_into(buffer, offset)

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield the range as zeros or as data."""
        yield Extent(offset, length, "zero" if self._own.reads_as_zeros(length, offset) else "data", None)

    def close(self) -> None:
        """Close the caller's disk."""
        self._own.close()
