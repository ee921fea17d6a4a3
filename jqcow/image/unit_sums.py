"""What the sums of units are at present: read from the disk, as jqcow.ondisk.protection defines them.

Y3. A unit that leaves something to the backing file has the sum of what the guest reads; one that leaves all
    of it there has none: what is below may change without this image knowing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Protocol

from jqcow.device.disk import Extent
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk.protection import Units, sum_of

BELOW, UNREADABLE = -1, -2
"""In the place of a sum: nothing of the unit is the image's own; it cannot be read."""

READ_BYTES = 4 << 20
_UNREADABLE_ERRORS = (errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ)
"""What a host says of sectors that its medium lost; every other error is raised."""


class ReadableDisk(Protocol):
    """What sums are made of."""

    def extents(self, length: int | None = None, offset: int = 0) -> Iterator[Extent]:
        """Yield what a range holds."""
        ...

    def pread(self, length: int, offset: int) -> bytes:
        """Return the bytes of a range."""
        ...


def is_unreadable(error: Exception) -> bool:
    """Return True if an error says that bytes are lost, and not that the host failed."""
    if isinstance(error, OSError):
        return error.errno in _UNREADABLE_ERRORS
    return isinstance(error, CorruptionError | FormatError)


def measure(disk: ReadableDisk, units: Units, first: int, end: int, *, has_below: bool) -> list[int]:
    """Return the sums of units [first, end), BELOW or UNREADABLE where they have none.

    Raises:
        OSError: the host failed.
        JqcowError: the disk cannot be read for a reason that is not damage.
    """
    waiting, found = [(first, end)], list[int]()
    while waiting:
        start, stop = waiting.pop()
        try:
            found += _measure(disk, units, start, stop, has_below=has_below)
        except (OSError, CorruptionError, FormatError) as error:
            if not is_unreadable(error):
                raise
            if stop - start == 1:
                found.append(UNREADABLE)
                continue
            middle = (start + stop) // 2
            waiting += [(middle, stop), (start, middle)]
    return found


def _measure(disk: ReadableDisk, units: Units, first: int, end: int, *, has_below: bool) -> list[int]:
    count = end - first
    own, has_data = kinds(disk, units, first, end, has_below=has_below)
    found = [0 if is_own else BELOW for is_own in own]
    wanted = (int.from_bytes(own, "big") & int.from_bytes(has_data, "big")).to_bytes(count, "big")
    step = max(1, READ_BYTES >> units.bits)
    start = wanted.find(1)
    while start >= 0:
        stop = wanted.find(0, start, start + step)
        stop = min(count, start + step) if stop < 0 else stop
        found[start:stop] = _read(disk, units, first + start, first + stop)
        start = wanted.find(1, stop)
    return found


def kinds(
    disk: ReadableDisk, units: Units, first: int, end: int, *, has_below: bool
) -> tuple[bytearray, bytearray]:
    """Return for units [first, end) which have something that is the image's own, and which hold data."""
    bits, offset = units.bits, first << units.bits
    own, has_data = bytearray(end - first), bytearray(end - first)
    for extent in disk.extents(min(end << bits, units.disk_bytes) - offset, offset):
        start, stop = (extent.offset >> bits) - first, (extent.end - 1 >> bits) + 1 - first
        if extent.holds_data:
            has_data[start:stop] = b"\1" * (stop - start)
        if not has_below or (extent.depth == 0 and extent.kind != "unallocated"):
            own[start:stop] = b"\1" * (stop - start)
    return own, has_data


def _read(disk: ReadableDisk, units: Units, first: int, end: int) -> list[int]:
    """Return the sums of units [first, end), which are read at once."""
    bits, unit_bytes = units.bits, units.unit_bytes
    offset = first << bits
    content = disk.pread(min(end << bits, units.disk_bytes) - offset, offset)
    starts = range(0, len(content), unit_bytes)
    return [sum_of(content[start : start + unit_bytes], unit_bytes) for start in starts]
