"""Data that is lost: found before a copy would make its loss final, or told piece by piece by a salvage.

A table that was overwritten with zeros is one that the specification allows: its range reads as zeros, or as
what lies below. What tells the two apart are the clusters that it named (`jqcow.checker.lost`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from jqcow.checker.check import check_structure
from jqcow.checker.findings import Kind
from jqcow.device.disk import Disk, Extent
from jqcow.disks.chain import FileDisk
from jqcow.disks.image import ImageDisk
from jqcow.disks.view import FileView, open_view
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk.header import INCOMPATIBLE_DIRTY

LOOK_BYTES = 1 << 30
"""How much of a disk is looked up at once: it bounds memory."""

PIECE_BYTES = 4096
"""What is given up where the host cannot read and nothing tells how much is lost."""

_UNREADABLE = (errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN)


# Tables of zeros


def refuse_lost_data(layers: Iterable[FileDisk]) -> None:
    """Raise CorruptionError if one of these images seems to have lost what an L2 table mapped.

    All refcounts are checked. Where they cannot tell, as the dirty bit says, or the checker does not know the
    image, or cannot walk it, nothing is raised.
    """
    for layer in layers:
        if isinstance(layer, ImageDisk):
            _refuse_lost_data_of(FileView.of_file(layer.device), layer.path)


def refuse_lost_data_in(path: str | os.PathLike[str]) -> None:
    """As `refuse_lost_data`, of one image file, without what is below it.

    Raises:
        JqcowError: the image cannot be read, or is in use.
        OSError: the host failed.
    """
    with open_view(path) as view:
        _refuse_lost_data_of(view, os.fspath(path))


def _refuse_lost_data_of(view: FileView, path: str) -> None:
    if view.header.incompatible_features & INCOMPATIBLE_DIRTY:
        return
    try:
        report = check_structure(view.read, view.size(), reserved=view.reserved)
    except (CorruptionError, FormatError):
        return
    if report.lost:
        offset = next((found.offset for found in report.findings if found.kind == Kind.LOST_DATA), 0)
        error = CorruptionError(
            "cluster", offset, "it holds data and no table names it, while a table has a hole"
        )
        error.add_note(
            f"{path} seems to have lost data: if it has not, jqcow check -r leaks --free-lost-data frees "
            "such clusters, and convert --salvage takes the disk as it reads"
        )
        raise error


# Salvage


@dataclass(frozen=True)
class LostRange:
    """A guest range that could not be read and became zeros.

    Attributes:
        offset: of the range in the guest's disk, in bytes.
        length: of the range in bytes.
        host_offset: of the table entry or data that is damaged, in the file; None where only the host knows.
        reason: the error, in one line.
    """

    offset: int
    length: int
    host_offset: int | None
    reason: str

    @property
    def end(self) -> int:
        """The guest offset behind the range."""
        return self.offset + self.length


class SalvagedDisk(Disk):
    """A disk of which what cannot be read reads as zeros. ``tell`` is given each such range once."""

    def __init__(self, disk: Disk, tell: Callable[[LostRange], None]) -> None:
        """Read from ``disk``, which the caller closes."""
        self._disk = disk
        self._tell = tell
        self._told: dict[int, int] = {}

    @property
    def size(self) -> int:
        """Size of the disk."""
        return self._disk.size

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what a range holds; what is lost is ``zero``."""
        end = offset + length
        stop = min(end, offset + LOOK_BYTES)
        while offset < end:
            try:
                found = list(self._disk.extents(stop - offset, offset))
            except (CorruptionError, OSError) as error:
                start, count = _range_of(error, offset, stop - offset)
                if start > offset:
                    # First what comes before it.
                    stop = start
                    continue
                found = [Extent(offset, count, "zero", None)]
                self._lose(error, offset, count)
            yield from found
            offset = found[-1].end
            stop = min(end, offset + LOOK_BYTES)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``, with zeros for what is lost."""
        waiting = [(0, len(buffer))]
        while waiting:
            first, stop = waiting.pop()
            try:
                self._disk.read_into(buffer[first:stop], offset + first)
            except (CorruptionError, OSError) as error:
                whole = stop - first
                start, count = _range_of(error, offset + first, whole)
                if not (isinstance(error, CorruptionError) and error.guest_range) and whole > PIECE_BYTES:
                    middle = first + -(-whole // 2 // PIECE_BYTES) * PIECE_BYTES
                    waiting += [(middle, stop), (first, middle)]
                    continue
                lost = start - offset, start - offset + count
                buffer[lost[0] : lost[1]] = bytes(count)
                self._lose(error, start, count)
                waiting += [part for part in ((lost[1], stop), (first, lost[0])) if part[0] < part[1]]

    def _lose(self, error: CorruptionError | OSError, offset: int, length: int) -> None:
        if self._told.get(offset, 0) < length:
            self._told[offset] = length
            place = error.offset if isinstance(error, CorruptionError) else None
            self._tell(LostRange(offset, length, place, str(error)))

    def close(self) -> None:
        """Close the disk below."""
        self._disk.close()


def _range_of(error: CorruptionError | OSError, offset: int, length: int) -> tuple[int, int]:
    """Return what of a range an error is about: (offset, length). Raises what no range is lost by."""
    if isinstance(error, OSError) and error.errno not in _UNREADABLE:
        raise error
    known = error.guest_range if isinstance(error, CorruptionError) else None
    if known is None:
        return offset, min(length, PIECE_BYTES)
    start = max(offset, known[0])
    count = min(offset + length, known[0] + known[1]) - start
    return (start, count) if count > 0 else (offset, min(length, PIECE_BYTES))


class Losses:
    """Collects lost ranges, each once."""

    def __init__(self) -> None:
        self._ranges: list[LostRange] = []

    def add(self, lost: LostRange) -> None:
        """Take a lost range; one that goes on where the last one ended is joined with it."""
        last = self._ranges[-1] if self._ranges else None
        if last is not None and last.end == lost.offset:
            self._ranges[-1] = replace(last, length=lost.end - last.offset)
        else:
            self._ranges.append(lost)

    def found(self) -> tuple[LostRange, ...]:
        """Return the ranges in the order of the disk; of neighbours the first one's reason."""
        joined = Losses()
        for lost in sorted(self._ranges, key=lambda lost: lost.offset):
            joined.add(lost)
        return tuple(joined._ranges)
