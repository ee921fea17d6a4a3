"""The Python twins of the kernels over whole tables (tables.c); `twins` has the others, and all of them."""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from jqcow._native.buffers import Buffer, byte_view

_COMPARED = 8192
_COMPRESSED = 1 << 62
_COPIED = 1 << 63
_ZERO = 1
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_LOW_HALF = 0xFFFF_FFFF
_SECTOR_BYTES = 512
_DECODED_CODES = "BBBBHIQ"


@dataclass(frozen=True, slots=True)
class CountedFile:
    """A file whose references are counted by `count_entries`.

    Attributes:
        references: to each cluster of the file, integers of 4 or 8 bytes.
        refcounts: of each, integers of 1, 2, 4 or 8 bytes.
        owners: a byte for each; not 0 where metadata lies.
        cluster_bits: the cluster size as a power of two.
        entry_bytes: length of an L2 entry, 8 or 16.
        reserved_bits: bits that no standard entry, or first word of an extended one, has set.
        refcount_max: the most references that count.
        avoided: [first, end) of clusters that no entry may name.
        outside: what is added to an offset of an external data file, which holds all data; 0: there is none.
    """

    references: memoryview
    refcounts: memoryview
    owners: memoryview
    cluster_bits: int
    entry_bytes: int
    reserved_bits: int
    refcount_max: int
    avoided: tuple[int, int]
    outside: int


class EntryCounts(NamedTuple):
    """What `count_entries` counted before entry ``stop``.

    ``following`` is the host offset behind the last cluster, 0 before there was one; the others are numbers
    of clusters: with data or a place for it, not behind the one before, compressed, said to read as zeros.
    """

    stop: int
    following: int
    allocated: int
    fragmented: int
    compressed: int
    zeros: int


def first_difference(first: memoryview, second: memoryview, start: int, stop: int) -> int:
    """Return the first index in [start, stop) where two arrays of unsigned integers differ, else -1.

    Raises IndexError for a range outside one of them.
    """
    check_array_range(first, second, start, stop)
    for begin in range(start, stop, _COMPARED):
        end = min(begin + _COMPARED, stop)
        ours, theirs = first[begin:end].tolist(), second[begin:end].tolist()
        if ours != theirs:
            pairs = zip(ours, theirs, strict=True)
            return begin + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return -1


def refcount_decode(block: Buffer, order: int) -> array[int]:
    """Return the refcounts of ``2**order`` bits in a block; those of less than a byte take one each.

    Raises ValueError for an order outside 0 to 6.
    """
    view = byte_view(block)
    refcounts = decoded_array(len(view), order)
    if order < 3:
        mask = (1 << (1 << order)) - 1
        shifts = range(0, 8, 1 << order)
        return array("B", bytes(byte >> shift & mask for byte in view for shift in shifts))
    return array(refcounts.typecode, struct.unpack_from(f">{len(refcounts)}{refcounts.typecode}", view))


def zero_run(data: Buffer, start: int, stop: int, unit_bytes: int) -> tuple[bool, int]:
    """Return whether unit ``start`` is all zeros, and how many from there, below ``stop``, are as it is.

    Raises IndexError for a range outside the data, or without a unit.
    """
    view = byte_view(data)
    check_units(len(view), start, stop, unit_bytes)
    zeros = bytes(unit_bytes)
    is_zero = view[start * unit_bytes : (start + 1) * unit_bytes] == zeros
    index = start + 1
    while index < stop and (view[index * unit_bytes : (index + 1) * unit_bytes] == zeros) == is_zero:
        index += 1
    return is_zero, index - start


def count_entries(
    file: CountedFile, table: Buffer, start: int, stop: int, following: int, is_active: bool, repeats: int
) -> EntryCounts:
    """Count the references of the L2 entries in [start, stop) of a table, up to one that is not right.

    That one is not counted. It has reserved bits, an offset that is not a cluster's or not in the file, a
    wrong bitmap, a cluster that metadata or nothing may have, more references than count, or, in a table of
    the active disk, a COPIED flag that does not say whether the refcount is 1.

    Args:
        file: what is counted into.
        table: whole entries.
        start: the first entry.
        stop: the one behind the last.
        following: where the cluster before ended on the host, 0 for none.
        is_active: the table is one of the disk, whose COPIED flags count.
        repeats: how many references each entry is.
    """
    view = byte_view(table)
    check_counted(file, len(view), start, stop, following, repeats)
    counts = [following, 0, 0, 0, 0]
    extended = file.entry_bytes == 16
    for index in range(start, stop):
        (entry,) = struct.unpack_from(">Q", view, index * file.entry_bytes)
        bitmap = struct.unpack_from(">Q", view, index * 16 + 8)[0] if extended else 0
        if (entry or bitmap) and not _count_entry(file, entry, bitmap, counts, is_active, repeats):
            return EntryCounts(index, *counts)
    return EntryCounts(stop, *counts)


def _count_entry(
    file: CountedFile, entry: int, bitmap: int, counts: list[int], is_active: bool, repeats: int
) -> bool:
    """Count one entry; return False, having counted nothing, where something is to be said of it."""
    extended, offset, copied = file.entry_bytes == 16, entry & _OFFSET, entry >= _COPIED
    allocated, zeros = bitmap & _LOW_HALF, bitmap >> 32
    if entry & _COMPRESSED:
        return not bitmap and _count_compressed(file, entry, counts, repeats)
    is_zero = bool(not allocated and zeros) if extended else bool(entry & _ZERO)
    has_host = bool(offset or (file.outside and copied and (extended or not is_zero)))
    if entry & file.reserved_bits or offset & ((1 << file.cluster_bits) - 1):
        return False
    if extended and (allocated & zeros or (not has_host and allocated)):
        return False
    host = file.outside + offset
    if has_host and file.outside:
        if is_active and not copied:
            return False
    elif has_host:
        cluster = offset >> file.cluster_bits
        if cluster >= len(file.owners) or not _can_refer(file, cluster, repeats):
            return False
        if is_active and copied != (file.refcounts[cluster] == 1):
            return False
        file.references[cluster] += repeats
    if has_host:
        counts[1] += 1
        counts[2] += bool(counts[0] and host != counts[0])
        counts[0] = host + (1 << file.cluster_bits)
    counts[4] += is_zero
    return True


def _count_compressed(file: CountedFile, entry: int, counts: list[int], repeats: int) -> bool:
    offset_bits = 62 - (file.cluster_bits - 8)
    descriptor = entry & (_COMPRESSED - 1)
    start = descriptor & ((1 << offset_bits) - 1)
    end = (start // _SECTOR_BYTES + (descriptor >> offset_bits) + 1) * _SECTOR_BYTES
    clusters = range(start >> file.cluster_bits, ((end - 1) >> file.cluster_bits) + 1)
    if file.outside or entry >= _COPIED or clusters.stop > len(file.owners):
        return False
    if not all(_can_refer(file, cluster, repeats) for cluster in clusters):
        return False
    for cluster in clusters:
        file.references[cluster] += repeats
    for place in (1, 2, 3):
        counts[place] += 1
    return True


def _can_refer(file: CountedFile, cluster: int, repeats: int) -> bool:
    if file.owners[cluster] or file.avoided[0] <= cluster < file.avoided[1]:
        return False
    total: int = file.references[cluster] + repeats
    return total <= file.refcount_max


def check_array_range(first: memoryview, second: memoryview, start: int, stop: int) -> None:
    """Raise IndexError unless [start, stop) lies within both arrays."""
    if not 0 <= start <= stop <= min(len(first), len(second)):
        raise IndexError(f"entries {start} to {stop} lie outside arrays of {len(first)} and {len(second)}")


def decoded_array(block_bytes: int, order: int) -> array[int]:
    """Return an array of zeros for the refcounts of a block; raise ValueError for an order outside 0 to 6."""
    if not 0 <= order <= 6:
        raise ValueError(f"refcount order {order} is not between 0 and 6")
    code = _DECODED_CODES[order]
    return array(code, bytes((block_bytes * 8 >> order) * array(code).itemsize))


def check_units(data_bytes: int, start: int, stop: int, unit_bytes: int) -> None:
    """Raise IndexError unless [start, stop) has a unit, and lies within the data."""
    if unit_bytes < 1 or not 0 <= start < stop <= data_bytes // unit_bytes:
        raise IndexError(f"units {start} to {stop} of {unit_bytes} bytes lie outside {data_bytes} bytes")


def check_counted(
    file: CountedFile, table_bytes: int, start: int, stop: int, following: int, repeats: int
) -> None:
    """Refuse what C cannot: a range outside the table, arrays of different lengths."""
    if not 0 <= start <= stop <= table_bytes // file.entry_bytes:
        raise IndexError(f"entries {start} to {stop} lie outside a table of {table_bytes} bytes")
    if not 9 <= file.cluster_bits <= 21 or file.entry_bytes not in (8, 16):
        raise ValueError(f"clusters of 2**{file.cluster_bits} bytes with entries of {file.entry_bytes}")
    if not len(file.owners) == len(file.refcounts) == len(file.references):
        raise IndexError("a file's clusters differ in number")
    # What counts fits an array's entry: no sum can leave it.
    if min(following, repeats, *file.avoided) < 0 or file.refcount_max >> 8 * file.references.itemsize:
        raise ValueError(f"{repeats} references of at most {file.refcount_max}")
