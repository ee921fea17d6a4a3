"""Are two disks equal, byte for byte, whatever their formats?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import merge

from jqcow import _native
from jqcow.device.disk import Disk, Extent, read_padded
from jqcow.disks.chain import Chain
from jqcow.ondisk import layout

BUFFER_BYTES = 1 << 20
UNIT_BYTES = 4096

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@dataclass(frozen=True)
class Comparison:
    """How two disks compare; offsets in bytes.

    Attributes:
        sizes_differ: one disk is longer than the other, and they are equal up to where the shorter one ends.
        content: where the first byte is that differs; what is past the end of a disk counts as zeros. None
            where there is none.
        status: where the two first differ in what they have of their own, None if that was not asked for.
    """

    sizes_differ: bool
    content: int | None = None
    status: int | None = None


def compare_disks(
    one: Disk, other: Disk, *, strict: bool = False, progress: Progress = lambda done, total: None
) -> Comparison:
    """Compare two disks byte for byte, as ``qemu-img compare`` does.

    Args:
        one: a disk.
        other: another one.
        strict: their sizes must be equal, and so must be which ranges are data, zeros or in no file; the
            comparison ends where that differs.
        progress: called with the bytes of the larger disk that are done, and all of them.

    Raises:
        JqcowError: a disk cannot be read.
        OSError: the host failed.
    """
    sizes_differ = one.size != other.size
    if strict and sizes_differ:
        return Comparison(sizes_differ)
    size = max(one.size, other.size)
    buffers = bytearray(BUFFER_BYTES), bytearray(BUFFER_BYTES)
    for offset, length, statuses in _pieces(one, other):
        if strict and statuses[0] != statuses[1]:
            return Comparison(sizes_differ, status=offset)
        if any(status.holds_data for status in statuses):
            for start in range(offset, offset + length, BUFFER_BYTES):
                count = min(BUFFER_BYTES, offset + length - start)
                found = _differs(one, other, start, count, buffers)
                if found is not None:
                    is_behind = found >= min(one.size, other.size)
                    return Comparison(is_behind, content=found)
        progress(offset + length, size)
    return Comparison(sizes_differ)


@dataclass(frozen=True)
class _Status:
    """What a disk says of a range: that it holds data, and that a file of its chain has it."""

    holds_data: bool
    is_allocated: bool


_PAST_THE_END = _Status(holds_data=False, is_allocated=False)


def _status_of(extent: Extent | None) -> _Status:
    return _PAST_THE_END if extent is None else _Status(extent.holds_data, extent.kind != "unallocated")


def _pieces(one: Disk, other: Disk) -> Iterator[tuple[int, int, tuple[_Status, _Status]]]:
    """Yield (offset, length, statuses) of ranges in which neither disk changes its status."""
    walks = one.extents(one.size, 0), other.extents(other.size, 0)
    heads = [next(walk, None) for walk in walks]
    offset = 0
    while any(heads):
        end = min(head.end for head in heads if head is not None)
        first, second = (_status_of(head) for head in heads)
        yield offset, end - offset, (first, second)
        offset = end
        heads = [
            next(walk, None) if head is not None and head.end == end else head
            for walk, head in zip(walks, heads, strict=True)
        ]


def _differs(
    one: Disk, other: Disk, offset: int, length: int, buffers: tuple[bytearray, bytearray]
) -> int | None:
    """Return the offset of the first byte of a range that differs, None where none does."""
    first, second = (memoryview(buffer)[:length] for buffer in buffers)
    read_padded(one, first, offset)
    read_padded(other, second, offset)
    if first == second:
        return None
    return offset + _first_unequal(bytes(first), bytes(second))


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


def nonzero_runs(data: memoryview, unit: int) -> list[tuple[int, int]]:
    """Return (start, end) of the parts of ``data`` that are not zero, in steps of ``unit`` bytes."""
    runs: list[tuple[int, int]] = []
    unit_index, count = 0, len(data) // unit
    while unit_index < count:
        is_zero, length = _native.zero_run(data, unit_index, count, unit)
        if not is_zero:
            runs.append((unit_index * unit, (unit_index + length) * unit))
        unit_index += length
    rest = count * unit
    if rest < len(data) and not _native.is_zero(data[rest:]):
        # The last unit may be cut at the end of the disk.
        start = runs.pop()[0] if runs and runs[-1][1] == rest else rest
        runs.append((start, len(data)))
    return runs


def _first_unequal(one: bytes, other: bytes) -> int:
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
