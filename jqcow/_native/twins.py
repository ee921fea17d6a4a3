"""The Python twins: what every kernel does, in plain Python, and what serves where no compiler was.

The tests hold the C kernels to these functions. Buffers are anything that gives contiguous bytes. Indices,
lengths and refcount orders are checked here, for the C kernels too, since C cannot refuse them.
"""

from __future__ import annotations

import struct
from array import array
from functools import cache
from itertools import islice

from jqcow._native import table_twins
from jqcow._native.buffers import Buffer, WritableBuffer, byte_view
from jqcow._native.sectors import SECTOR_BYTES, sector_kind

UNALLOCATED = 0
ZERO = 1
DATA = 2
COMPRESSED = 3

JUDGED = 7
"""So many numbers `l2_judge` counts."""
MARK_ORDER = 1
"""Marks of clusters are as refcounts of this order."""
MARK_MANY = 2
MARK_STRUCTURE = 3

count_entries = table_twins.count_entries
first_difference = table_twins.first_difference
refcount_decode = table_twins.refcount_decode
zero_run = table_twins.zero_run

_ENTRY = struct.Struct(">Q")
_EXTENDED_ENTRY = struct.Struct(">QQ")
_LOW_HALF = 0xFFFF_FFFF
_ENTRY_COMPRESSED = 1 << 62
_ENTRY_ZERO = 1
_ENTRY_OFFSET = 0x00FF_FFFF_FFFF_FE00

_CASTAGNOLI_REFLECTED = 0x82F6_3B78
_CHUNK_BYTES = 65536
_ZERO_CHUNK = bytes(_CHUNK_BYTES)
_REFCOUNT_ORDER_MAX = 6
_TWEAK_BYTES = 16
_DOUBLED_CARRY = 0x87


def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of ``data``; ``value`` is the CRC of what came before it."""
    of_byte, of_pair, of_early_pair = _crc_tables()
    view = byte_view(data)
    whole_bytes = len(view) & ~3
    crc = value ^ 0xFFFF_FFFF
    for (word,) in struct.iter_unpack("<I", view[:whole_bytes]):
        mixed = crc ^ word
        crc = of_early_pair[mixed & 0xFFFF] ^ of_pair[mixed >> 16]
    for byte in view[whole_bytes:]:
        crc = (crc >> 8) ^ of_byte[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFF_FFFF


def is_zero(data: Buffer) -> bool:
    """Return True when every byte of ``data`` is zero (and for no byte at all)."""
    view = byte_view(data)
    for start in range(0, len(view), _CHUNK_BYTES):
        chunk = view[start : start + _CHUNK_BYTES]
        if bytes(chunk) != (_ZERO_CHUNK if len(chunk) == _CHUNK_BYTES else bytes(len(chunk))):
            return False
    return True


def refcount_get(buffer: Buffer, index: int, order: int) -> int:
    """Return entry ``index`` of a refcount block whose entries take ``2**order`` bits."""
    view = byte_view(buffer)
    check_refcount_index(len(view), index, order)
    if order < 3:
        shift = (index << order) & 7
        return (view[(index << order) >> 3] >> shift) & ((1 << (1 << order)) - 1)
    width_bytes = 1 << (order - 3)
    return int.from_bytes(view[index * width_bytes : (index + 1) * width_bytes], "big")


def refcount_set(buffer: WritableBuffer, index: int, order: int, value: int) -> None:
    """Set entry ``index`` to ``value``. Raises OverflowError when it does not fit."""
    view = byte_view(buffer)
    check_refcount_index(len(view), index, order)
    check_refcount_value(value, order)
    if order < 3:
        shift = (index << order) & 7
        mask = ((1 << (1 << order)) - 1) << shift
        at = (index << order) >> 3
        view[at] = (view[at] & ~mask) | (value << shift)
        return
    width_bytes = 1 << (order - 3)
    view[index * width_bytes : (index + 1) * width_bytes] = value.to_bytes(width_bytes, "big")


def refcount_find_zero(buffer: Buffer, order: int, start: int, stop: int) -> int:
    """Return the first index in [start, stop) whose refcount is 0, or -1."""
    view = byte_view(buffer)
    check_refcount_range(len(view), order, start, stop)
    entries = _entries(view, order, start, stop)
    try:
        return start + entries.index(0)
    except ValueError:
        return -1


def refcount_find_used(buffer: Buffer, order: int, start: int, stop: int) -> int:
    """Return the first index in [start, stop) whose refcount is not 0, or -1."""
    view = byte_view(buffer)
    check_refcount_range(len(view), order, start, stop)
    entries = _entries(view, order, start, stop)
    content = entries.tobytes()
    leading_zeros = len(content) - len(content.lstrip(b"\0"))
    return start + leading_zeros // entries.itemsize if leading_zeros < len(content) else -1


def refcount_last_used(buffer: Buffer, order: int) -> int:
    """Return the last index whose refcount is not 0, or -1."""
    view = byte_view(buffer)
    entries = _entries(view, order, 0, refcount_entry_count(len(view), order))
    return (len(entries.tobytes().rstrip(b"\0")) - 1) // entries.itemsize


def refcount_run(buffer: Buffer, order: int, start: int, stop: int) -> tuple[int, int]:
    """Return ``(value, count)``: entry ``start``, and how many from there, below ``stop``, are equal to it.

    Raises IndexError for a range outside the block or without an entry.
    """
    view = byte_view(buffer)
    check_refcount_run(len(view), order, start, stop)
    entries = _entries(view, order, start, stop)
    first = entries[0]
    count = next((index for index, entry in enumerate(entries) if entry != first), len(entries))
    return refcount_get(view, start, order), count


def refcount_add(buffer: WritableBuffer, order: int, start: int, stop: int, delta: int) -> int:
    """Add ``delta`` to the entries in [start, stop) and return -1.

    Where an entry would get below 0 or past what it can hold, change nothing and return the index of the
    first such.
    """
    view = byte_view(buffer)
    check_refcount_range(len(view), order, start, stop)
    values = [refcount_get(view, index, order) + delta for index in range(start, stop)]
    largest = (1 << (1 << order)) - 1
    for index, value in enumerate(values, start):
        if not 0 <= value <= largest:
            return index
    for index, value in enumerate(values, start):
        refcount_set(view, index, order, value)
    return -1


def l2_run(
    table: Buffer, index: int, limit: int, cluster_bits: int, entry_bytes: int = 8
) -> tuple[int, int, int]:
    """Return ``(kind, host_offset, count)`` of the extent that starts at entry ``index`` of an L2 table.

    An extent has at most ``limit`` entries. ``kind`` is UNALLOCATED
    (neither offset nor zero flag), ZERO (bit 0 set; the offsets need not be contiguous), DATA (each entry is
    that before it plus a cluster, so all else in them is equal) or COMPRESSED (one entry; ``host_offset`` is
    then bits 0 to 61, the raw descriptor). Of entries longer than 8 bytes the first 8 are looked at. Raises
    IndexError for an index outside the table or a limit below 1.
    """
    view = byte_view(table)
    check_l2_range(len(view), index, limit, entry_bytes)
    (first,) = _ENTRY.unpack_from(view, index * entry_bytes)
    kind = _run_kind(first)
    if kind == COMPRESSED:
        return kind, first & (_ENTRY_COMPRESSED - 1), 1
    host_offset = first & _ENTRY_OFFSET
    expected = first
    stop = min(index + limit, len(view) // entry_bytes)
    count = 1
    words = _ENTRY.iter_unpack(view[(index + 1) * entry_bytes : stop * entry_bytes])
    for (entry,) in islice(words, 0, None, entry_bytes // 8):
        expected += 1 << cluster_bits
        if _run_kind(entry) != kind or (kind == DATA and entry != expected):
            break
        count += 1
    return kind, host_offset, count


def subcluster_run(table: Buffer, index: int, limit: int, cluster_bits: int) -> tuple[int, int]:
    """Return ``(kind, count)`` of the subclusters in a row from ``index`` on of a table of extended entries.

    Each entry of 16 bytes has 32 subclusters; the run has at most ``limit``. DATA goes on in an entry whose
    word is that before it plus a cluster; UNALLOCATED and ZERO go on where neither entry has a word. The run
    ends before an entry with a subcluster that is data and zeros, or data without a host cluster; the first
    entry is none of these. COMPRESSED ends with its entry. Raises IndexError for an index outside the table,
    and for a limit below 1.
    """
    view = byte_view(table)
    check_subcluster_range(len(view), index, limit)
    limit = min(limit, len(view) // 16 * 32 - index)
    entry, subcluster = divmod(index, 32)
    expected, bitmap = _EXTENDED_ENTRY.unpack_from(view, entry * 16)
    if expected & _ENTRY_COMPRESSED:
        return COMPRESSED, min(limit, 32 - subcluster)
    kind, count = _subcluster_kind(bitmap, subcluster), 0
    while count < limit and _subcluster_kind(bitmap, subcluster) == kind:
        count += 1
        subcluster += 1
        if subcluster < 32:
            continue
        if count >= limit or (kind != DATA and expected):
            break
        if kind == DATA:
            expected = (expected + (1 << cluster_bits)) % (1 << 64)
        entry, subcluster = entry + 1, 0
        word, bitmap = _EXTENDED_ENTRY.unpack_from(view, entry * 16)
        allocated, zeros = bitmap & _LOW_HALF, bitmap >> 32
        if word != expected or allocated & zeros or (not expected and allocated):
            break
    return kind, count


def _subcluster_kind(bitmap: int, subcluster: int) -> int:
    if bitmap >> subcluster & 1:
        return DATA
    return ZERO if bitmap >> 32 + subcluster & 1 else UNALLOCATED


def l2_judge(
    table: Buffer,
    entry_bytes: int,
    cluster_bits: int,
    reserved: int,
    host_bytes: int,
    marks: WritableBuffer | None = None,
) -> tuple[int, ...]:
    """Count what the entries of an L2 table are, and mark the host clusters that they name.

    Args:
        table: whole entries, of ``entry_bytes`` 8 or 16.
        entry_bytes: length of an entry.
        cluster_bits: the cluster size as a power of two.
        reserved: bits that no standard entry, or first word of an extended one, has set.
        host_bytes: the end of the file; no entry names a cluster there.
        marks: 2 bits for each cluster before ``host_bytes``, four to a byte from its lowest bits on: nobody,
            one or several name it, or a structure lies there, which stays. None: nothing is marked.

    Returns:
        How many entries are unallocated, zeros, data, compressed, no entry that an image can have; how many
        data clusters had a mark before; how many clusters are those of a structure.
    """
    counts = [0] * JUDGED
    view = byte_view(table)
    check_judged(cluster_bits, host_bytes, None if marks is None else byte_view(marks))
    words = _ENTRY.iter_unpack(view[: len(view) // entry_bytes * entry_bytes])
    for (entry,) in words:
        bitmap = next(words)[0] if entry_bytes == 16 else 0
        kind, clusters = _judge(entry, bitmap, entry_bytes == 16, cluster_bits, reserved, host_bytes)
        counts[kind] += 1
        for cluster in clusters if marks is not None else ():
            mark = refcount_get(marks, cluster, MARK_ORDER) if marks is not None else 0
            if mark == MARK_STRUCTURE:
                counts[6] += 1
            elif mark and kind == 2:
                counts[5] += 1
            if marks is not None and mark < MARK_MANY:
                refcount_set(marks, cluster, MARK_ORDER, mark + 1)
    return tuple(counts)


def _judge(
    entry: int, bitmap: int, extended: bool, cluster_bits: int, reserved: int, host_bytes: int
) -> tuple[int, range]:
    """Return what an entry is, as a place in what `l2_judge` counts, and the clusters that it names."""
    nothing = range(0)
    if entry & _ENTRY_COMPRESSED:
        offset_bits = 62 - (cluster_bits - 8)
        descriptor = entry & (_ENTRY_COMPRESSED - 1)
        start = descriptor & ((1 << offset_bits) - 1)
        end = min(host_bytes, (start // 512 + (descriptor >> offset_bits) + 1) * 512)
        if entry >> 63 or bitmap or not 0 < start < min(host_bytes, 1 << 56):
            return 4, nothing
        return 3, range(start >> cluster_bits, ((end - 1) >> cluster_bits) + 1)
    offset = entry & _ENTRY_OFFSET
    if entry & reserved or offset & ((1 << cluster_bits) - 1) or offset >= host_bytes:
        return 4, nothing
    if not offset and (entry >> 63 or (extended and bitmap & _LOW_HALF)):
        return 4, nothing
    if extended and bitmap & _LOW_HALF & bitmap >> 32:
        return 4, nothing
    if offset:
        return 2, range(offset >> cluster_bits, (offset >> cluster_bits) + 1)
    return int(bool(bitmap >> 32 if extended else entry & _ENTRY_ZERO)), nothing


def find_unmarked(
    block: Buffer, order: int, start: int, stop: int, marks: Buffer, first_cluster: int, bits: WritableBuffer
) -> int:
    """Set the bits of clusters that have a refcount and no mark, and return how many they are.

    Args:
        block: a refcount block whose refcounts take ``2**order`` bits.
        order: of the block.
        start: index of the refcount of ``first_cluster``.
        stop: index behind the last one that is looked at.
        marks: as in `l2_judge`.
        first_cluster: the first cluster that is looked at.
        bits: one bit a cluster, eight to a byte from its lowest bit on.
    """
    view, marked, found = byte_view(block), byte_view(marks), byte_view(bits)
    check_refcount_range(len(view), order, start, stop)
    check_marks(first_cluster, stop - start, len(marked), len(found))
    count = 0
    for index in range(start, stop):
        cluster = first_cluster + index - start
        if refcount_get(view, index, order) and not refcount_get(marked, cluster, MARK_ORDER):
            refcount_set(found, cluster, 0, 1)
            count += 1
    return count


def l2_shared(table: Buffer, entry_bytes: int, cluster_bits: int, marks: Buffer) -> tuple[int, int]:
    """Count the entries of an L2 table that name data which is not theirs alone.

    Args:
        table: whole entries, of ``entry_bytes`` 8 or 16.
        entry_bytes: length of an entry.
        cluster_bits: the cluster size as a power of two.
        marks: as in `l2_judge`; what lies past them is not looked at.

    Returns:
        How many entries name a cluster that several do, and how many one in which a structure lies.
    """
    view, marked = byte_view(table), byte_view(marks)
    many = structures = 0
    words = _ENTRY.iter_unpack(view[: len(view) // entry_bytes * entry_bytes])
    for (entry,) in islice(words, 0, None, entry_bytes // 8):
        cluster = (entry & _ENTRY_OFFSET) >> cluster_bits
        if not entry & _ENTRY_COMPRESSED and 0 < cluster < len(marked) * 4:
            mark = refcount_get(marked, cluster, MARK_ORDER)
            many += mark == MARK_MANY
            structures += mark == MARK_STRUCTURE
    return many, structures


def xts_whiten(data: WritableBuffer, tweaks: Buffer, sector_bytes: int) -> None:
    """XOR each 16-byte block of ``data`` with its XTS tweak; ``tweaks`` has that of each sector's first."""
    view, firsts = byte_view(data), byte_view(tweaks)
    check_whitening(len(view), len(firsts), sector_bytes)
    blocks, lanes = sector_bytes // _TWEAK_BYTES, len(firsts) // _TWEAK_BYTES
    # All sectors at once: a number has their tweaks side by side, and each step doubles all of them.
    tweak = int.from_bytes(firsts, "little")
    ones = int.from_bytes((1).to_bytes(_TWEAK_BYTES, "little") * lanes, "little")
    whole = bytearray(len(view))
    words = memoryview(whole).cast("Q")
    for block in range(blocks):
        packed = memoryview(tweak.to_bytes(len(firsts), "little")).cast("Q")
        for half in range(2):
            words[2 * block + half :: 2 * blocks] = packed[half::2]
        carry = tweak >> 127 & ones
        tweak = (tweak ^ carry << 127) << 1 ^ carry * _DOUBLED_CARRY
    mixed = int.from_bytes(view, "little") ^ int.from_bytes(whole, "little")
    view[:] = mixed.to_bytes(len(view), "little")


def sector_kinds(data: Buffer, host_bytes: int) -> bytes:
    """Return one byte for each sector of ``data``: what structure of an image it may be a part of.

    0 is anything else, SECTOR_ZERO has zeros alone, SECTOR_SNAPSHOT may begin a snapshot table, and
    SECTOR_COUNTS + order has small refcounts. The others have SECTOR_ALIGNMENT bits, which say what their
    offsets can be divided by, as a power of two, 63 where there are none: SECTOR_POINTERS have entries
    of a table, SECTOR_PACKED too, some of compressed clusters, and SECTOR_PAIRS have extended L2 entries.

    Args:
        data: whole sectors; what is left over is not looked at.
        host_bytes: the end of the file, which no pointer leaves.
    """
    view = byte_view(data)
    check_host_bytes(host_bytes)
    return bytes(
        sector_kind(view[start : start + SECTOR_BYTES], host_bytes)
        for start in range(0, len(view) - SECTOR_BYTES + 1, SECTOR_BYTES)
    )


def set_copied(table: WritableBuffer, start: int, stop: int, copied: bool, entry_bytes: int = 8) -> None:
    """Set or clear the COPIED flag (bit 63) of the entries in [start, stop) of an L1 or L2 table.

    Raises IndexError for a range outside the table.
    """
    view = byte_view(table)
    check_table_range(len(view), start, stop, entry_bytes)
    for place in range(start * entry_bytes, stop * entry_bytes, entry_bytes):
        view[place] = view[place] & 0x7F | (0x80 if copied else 0)


def first_host_offset(table: Buffer, place: int, kind: int) -> int:
    """Return the ``host_offset`` of a run of ``kind`` whose first entry is at ``place`` bytes."""
    entry: int = _ENTRY.unpack_from(table, place)[0]
    return entry & (_ENTRY_COMPRESSED - 1) if kind == COMPRESSED else entry & _ENTRY_OFFSET


def refcount_entry_count(length_bytes: int, order: int) -> int:
    """Return how many refcounts of ``2**order`` bits fit. Raises ValueError for an order outside 0 to 6."""
    if not 0 <= order <= _REFCOUNT_ORDER_MAX:
        raise ValueError(f"refcount order {order} is not between 0 and {_REFCOUNT_ORDER_MAX}")
    return (length_bytes * 8) >> order


def check_refcount_index(length_bytes: int, index: int, order: int) -> None:
    """Raise IndexError unless a block of ``length_bytes`` has an entry ``index``."""
    if not 0 <= index < refcount_entry_count(length_bytes, order):
        raise IndexError(f"refcount index {index} lies outside a block of {length_bytes} bytes")


def check_refcount_range(length_bytes: int, order: int, start: int, stop: int) -> None:
    """Raise IndexError unless [start, stop) lies within a block of ``length_bytes``."""
    if not 0 <= start <= stop <= refcount_entry_count(length_bytes, order):
        raise IndexError(f"refcount range {start} to {stop} lies outside a block of {length_bytes} bytes")


def check_whitening(data_bytes: int, tweak_bytes: int, sector_bytes: int) -> None:
    """Refuse lengths that do not fit: whole sectors, of whole blocks, with a tweak each."""
    if sector_bytes <= 0 or sector_bytes % _TWEAK_BYTES or tweak_bytes % _TWEAK_BYTES:
        raise ValueError(f"sectors of {sector_bytes} bytes, or {tweak_bytes} bytes of tweaks")
    if data_bytes != tweak_bytes // _TWEAK_BYTES * sector_bytes:
        raise ValueError(f"{data_bytes} bytes of data with {tweak_bytes} bytes of tweaks")


def check_judged(cluster_bits: int, host_bytes: int, marks: WritableBuffer | None) -> None:
    """Raise IndexError unless there is a mark for each cluster of a file; ValueError for a wrong size."""
    if not 9 <= cluster_bits <= 21 or host_bytes < 0:
        raise ValueError(f"clusters of 2**{cluster_bits} bytes in a file of {host_bytes} bytes")
    if marks is not None and memoryview(marks).nbytes * 4 < -(-host_bytes >> cluster_bits):
        raise IndexError(f"{memoryview(marks).nbytes * 4} marks for a file of {host_bytes} bytes")


def check_host_bytes(host_bytes: int) -> None:
    """Raise ValueError for a file of no possible length."""
    if not 0 <= host_bytes < 1 << 63:
        raise ValueError(f"a file of {host_bytes} bytes")


def check_marks(first_cluster: int, count: int, marks_bytes: int, bits_bytes: int) -> None:
    """Raise IndexError unless there is a mark and a bit for each of ``count`` clusters."""
    if first_cluster < 0 or first_cluster + count > min(marks_bytes * 4, bits_bytes * 8):
        raise IndexError(f"clusters {first_cluster} to {first_cluster + count} have no mark or no bit")


def check_refcount_run(length_bytes: int, order: int, start: int, stop: int) -> None:
    """Raise IndexError unless [start, stop) holds an entry, and lies within a block of ``length_bytes``."""
    check_refcount_range(length_bytes, order, start, stop)
    if start == stop:
        raise IndexError("a run has at least one refcount")


def check_refcount_value(value: int, order: int) -> None:
    """Raise OverflowError unless ``value`` fits ``2**order`` bits."""
    if value < 0 or value >> (1 << order):
        raise OverflowError(f"refcount {value} does not fit {1 << order} bits")


def check_l2_range(length_bytes: int, index: int, limit: int, entry_bytes: int = 8) -> None:
    """Raise IndexError unless the table has an entry ``index`` and ``limit`` is at least 1."""
    if not 0 <= index < length_bytes // entry_bytes or limit < 1:
        raise IndexError(f"L2 index {index} with limit {limit} lies outside a table of {length_bytes} bytes")


def check_subcluster_range(length_bytes: int, index: int, limit: int) -> None:
    """Raise IndexError unless the table has a subcluster ``index`` and ``limit`` is at least 1."""
    if not 0 <= index < length_bytes // 16 * 32 or limit < 1:
        raise IndexError(
            f"subcluster {index} with limit {limit} lies outside a table of {length_bytes} bytes"
        )


def check_table_range(length_bytes: int, start: int, stop: int, entry_bytes: int = 8) -> None:
    """Raise IndexError unless [start, stop) lies within a table of ``length_bytes``."""
    if not 0 <= start <= stop <= length_bytes // entry_bytes:
        raise IndexError(f"entries {start} to {stop} lie outside a table of {length_bytes} bytes")


def _run_kind(entry: int) -> int:
    if entry & _ENTRY_COMPRESSED:
        return COMPRESSED
    if entry & _ENTRY_ZERO:
        return ZERO
    return DATA if entry & _ENTRY_OFFSET else UNALLOCATED


def _entries(view: memoryview, order: int, start: int, stop: int) -> array[int]:
    """Return the entries as integers of one byte or more.

    Those of several bytes keep the file's byte order: good enough to tell zero from not zero.
    """
    if order < 3:
        return array("B", _widened(view, order)[start:stop])
    width_bytes = 1 << (order - 3)
    typecode = {1: "B", 2: "H", 4: "I", 8: "Q"}[width_bytes]
    return array(typecode, bytes(view[start * width_bytes : stop * width_bytes]))


def _widened(view: memoryview, order: int) -> bytes:
    """Return one byte for every entry of a block whose entries are narrower than a byte."""
    return b"".join(map(_widening_table(order).__getitem__, view))


@cache
def _widening_table(order: int) -> list[bytes]:
    width_bits = 1 << order
    mask = (1 << width_bits) - 1
    return [bytes((byte >> shift) & mask for shift in range(0, 8, width_bits)) for byte in range(256)]


@cache
def _crc_tables() -> tuple[list[int], list[int], list[int]]:
    """Return the CRC register after a byte, after two bytes, and after two bytes and two zero bytes.

    With the last two, two lookups take four bytes of input. Built when the first CRC is asked for.
    """
    of_byte = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_CASTAGNOLI_REFLECTED if crc & 1 else 0)
        of_byte.append(crc)
    of_pair = []
    for pair in range(65536):
        half = (pair >> 8) ^ of_byte[pair & 0xFF]
        of_pair.append((half >> 8) ^ of_byte[half & 0xFF])
    of_early_pair = [(crc >> 16) ^ of_pair[crc & 0xFFFF] for crc in of_pair]
    return of_byte, of_pair, of_early_pair
