"""What a disk is: a size, bytes to read, and which of them are data. All offsets and lengths are in bytes.

A device holds a file's bytes; a disk is what a guest sees of them. The protocol stands below the engine:
its data path reads from the disk below an image. `jqcow.disks` makes disks of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from jqcow.device.base import ReadBuffer

ExtentKind = Literal["data", "zero", "unallocated", "compressed"]


@dataclass(frozen=True, slots=True)
class Extent:
    """A guest range of one kind; ``offset`` and ``length`` in bytes.

    ``host_offset`` is where the range lies in the file, None where nothing of it does. A ``zero`` extent
    reads as zeros though it may keep clusters; ``unallocated`` reads as zeros too, as no file has it.
    ``depth`` tells which file of the chain it was found in: 0 is the image, 1 its backing file, and so on.
    """

    offset: int
    length: int
    kind: ExtentKind
    host_offset: int | None
    depth: int = 0

    @property
    def end(self) -> int:
        """The offset behind the range."""
        return self.offset + self.length

    @property
    def holds_data(self) -> bool:
        """False where the range is known to read as zeros."""
        return self.kind in ("data", "compressed")


def joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours of one kind, of which the later one goes on where the earlier one ends on the host."""
    first: Extent | None = None
    length = 0
    for extent in extents:
        if first is not None and _continues(first, length, extent):
            length += extent.length
            continue
        if first is not None:
            yield _of_length(first, length)
        first, length = extent, extent.length
    if first is not None:
        yield _of_length(first, length)


def _continues(first: Extent, length: int, extent: Extent) -> bool:
    if (first.kind, first.depth, first.offset + length) != (extent.kind, extent.depth, extent.offset):
        return False
    if first.host_offset is None or extent.host_offset is None:
        return first.host_offset is extent.host_offset
    return first.host_offset + length == extent.host_offset


def _of_length(extent: Extent, length: int) -> Extent:
    return extent if extent.length == length else replace(extent, length=length)


@runtime_checkable
class Disk(Protocol):
    """A disk to be read. Ranges lie within it."""

    @property
    def size(self) -> int:
        """Size of the disk; what lies past its end reads as zeros."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``.

        Raises:
            JqcowError: the range cannot be read.
            OSError: the host failed.
        """
        ...

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what a range holds, in order and without a gap.

        Raises:
            CorruptionError: a table on the way is damaged.
            OSError: the host failed.
        """
        ...

    def close(self) -> None:
        """Release the disk's files. Closing again does nothing."""
        ...

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        """Return True if a range reads as zeros, as far as tables and holes tell."""
        return not any(extent.holds_data for extent in self.extents(length, offset))


class WritableDisk(Protocol):
    """A disk to be written. Who made it says when what was written is durable."""

    @property
    def size(self) -> int:
        """Size of the disk."""
        ...

    def resize(self, size_bytes: int) -> None:
        """Set the size; what is added reads as zeros."""
        ...

    def pwrite(self, buffer: ReadBuffer, offset: int) -> object:
        """Write the whole of ``buffer`` within the disk, or raise."""
        ...

    def write_zeroes(self, length: int, offset: int) -> None:
        """Make a range read as zeros."""
        ...


def found_below(disk: Disk, length: int, offset: int) -> Iterator[Extent]:
    """Yield what the disk below an image shows of a guest range, which may reach past its end."""
    inside = max(0, min(length, disk.size - offset))
    for extent in disk.extents(inside, offset) if inside else ():
        # What no file has was found in none.
        depth = 0 if extent.kind == "unallocated" else extent.depth + 1
        yield replace(extent, depth=depth)
    if inside < length:
        yield Extent(offset + inside, length - inside, "unallocated", None)


def read_padded(disk: Disk | None, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` with what a disk shows of a range that may reach past its end; zeros without a disk."""
    inside = 0 if disk is None else max(0, min(len(buffer), disk.size - offset))
    if disk is not None and inside:
        disk.read_into(buffer[:inside], offset)
    buffer[inside:] = bytes(len(buffer) - inside)


def shows_zeros(disk: Disk | None, length: int, offset: int) -> bool:
    """Return True if a range that may reach past the end of a disk reads as zeros, or there is no disk."""
    inside = 0 if disk is None else min(length, disk.size - offset)
    return disk is None or inside <= 0 or disk.reads_as_zeros(inside, offset)
