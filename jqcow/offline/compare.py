"""Are two disks equal, byte for byte, whatever their formats?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import merge

from jqcow.device.disk import Disk
from jqcow.disks.chain import Chain
from jqcow.ondisk import layout

BUFFER_BYTES = 1 << 20
UNIT_BYTES = 4096

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def first_difference(one: Disk, other: Disk) -> int | None:
    """Return the guest offset of the first byte that differs, None where the disks are equal.

    What neither disk holds data for reads as zeros in both, and is not read. Where one disk is shorter, its
    end is the first difference, if there is none before it. Lost tables read as zeros: the caller has refused
    them (`jqcow.offline.losses.refuse_lost_data`).

    Raises:
        JqcowError: a disk cannot be read.
        OSError: the host failed.
    """
    size = min(one.size, other.size)
    buffers = bytearray(BUFFER_BYTES), bytearray(BUFFER_BYTES)
    for offset, length in _either(one, other):
        count = min(length, size - offset)
        if count <= 0:
            break
        first, second = (memoryview(buffer)[:count] for buffer in buffers)
        one.read_into(first, offset)
        other.read_into(second, offset)
        if first != second:
            return offset + _first_unequal(bytes(first), bytes(second))
    return None if one.size == other.size else size


def _either(one: Disk, other: Disk) -> Iterator[tuple[int, int]]:
    """Yield the windows in which at least one of two disks may hold data; none twice."""
    reached = 0
    found = (windows(disk, UNIT_BYTES, BUFFER_BYTES) for disk in (one, other))
    for offset, length in merge(*found):
        start, end = max(reached, offset), offset + length
        if start < end:
            yield start, end - start
            reached = end


def windows(disk: Disk, unit: int, limit: int, *, holes: bool = True) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of whole units that may hold data: in order, apart, at most ``limit`` bytes.

    The last one ends at the end of the disk. ``limit`` is a multiple of ``unit``. Without ``holes`` tables
    alone count: what lies in a hole of a chain's file is data then.
    """
    reached = 0
    find = disk.stored_extents if holes and isinstance(disk, Chain) else disk.extents
    for extent in find(disk.size, 0):
        if not extent.holds_data:
            continue
        start = max(reached, extent.offset - extent.offset % unit)
        end = min(layout.round_up(extent.end, unit), disk.size)
        while start < end:
            step = min(limit, end - start)
            yield start, step
            start += step
        reached = max(reached, end)


def _first_unequal(one: bytes, other: bytes) -> int:
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
