"""The C kernels behind the twins' signatures. Importing this raises ImportError where they were not built.

``cffi`` releases the GIL around every call, so a kernel may run beside other threads; the caller keeps others
from changing its buffers meanwhile.
"""

from __future__ import annotations

from array import array

from jqcow._native import table_twins, twins
from jqcow._native._kernels import ffi, lib
from jqcow._native.buffers import Buffer, WritableBuffer
from jqcow._native.sectors import SECTOR_BYTES
from jqcow._native.table_twins import CountedFile, EntryCounts

_from_buffer = ffi.from_buffer


def crc32c(data: Buffer, value: int = 0) -> int:
    """See :func:`jqcow._native.twins.crc32c`."""
    view = _from_buffer(data)
    return lib.jqcow_crc32c(view, len(view), value)  # type: ignore[no-any-return]


def crc32c_portable(data: Buffer, value: int = 0) -> int:
    """The CRC that serves on processors without an instruction for it; the tests call it by name."""
    view = _from_buffer(data)
    return lib.jqcow_crc32c_portable(view, len(view), value)  # type: ignore[no-any-return]


def is_zero(data: Buffer) -> bool:
    """See :func:`jqcow._native.twins.is_zero`."""
    view = _from_buffer(data)
    return lib.jqcow_is_zero(view, len(view)) != 0  # type: ignore[no-any-return]


def refcount_get(buffer: Buffer, index: int, order: int) -> int:
    """See :func:`jqcow._native.twins.refcount_get`."""
    view = _from_buffer(buffer)
    twins.check_refcount_index(len(view), index, order)
    return lib.jqcow_refcount_get(view, index, order)  # type: ignore[no-any-return]


def refcount_set(buffer: WritableBuffer, index: int, order: int, value: int) -> None:
    """See :func:`jqcow._native.twins.refcount_set`."""
    view = _from_buffer(buffer, require_writable=True)
    twins.check_refcount_index(len(view), index, order)
    twins.check_refcount_value(value, order)
    lib.jqcow_refcount_set(view, index, order, value)


def refcount_find_zero(buffer: Buffer, order: int, start: int, stop: int) -> int:
    """See :func:`jqcow._native.twins.refcount_find_zero`."""
    view = _from_buffer(buffer)
    twins.check_refcount_range(len(view), order, start, stop)
    return lib.jqcow_refcount_find_zero(view, order, start, stop)  # type: ignore[no-any-return]


def refcount_find_used(buffer: Buffer, order: int, start: int, stop: int) -> int:
    """See :func:`jqcow._native.twins.refcount_find_used`."""
    view = _from_buffer(buffer)
    twins.check_refcount_range(len(view), order, start, stop)
    return lib.jqcow_refcount_find_used(view, order, start, stop)  # type: ignore[no-any-return]


def refcount_last_used(buffer: Buffer, order: int) -> int:
    """See :func:`jqcow._native.twins.refcount_last_used`."""
    view = _from_buffer(buffer)
    entry_count = twins.refcount_entry_count(len(view), order)
    return lib.jqcow_refcount_last_used(view, order, entry_count)  # type: ignore[no-any-return]


def refcount_run(buffer: Buffer, order: int, start: int, stop: int) -> tuple[int, int]:
    """See :func:`jqcow._native.twins.refcount_run`."""
    view = _from_buffer(buffer)
    twins.check_refcount_run(len(view), order, start, stop)
    return lib.jqcow_refcount_get(view, start, order), lib.jqcow_refcount_run(view, order, start, stop)


def refcount_add(buffer: WritableBuffer, order: int, start: int, stop: int, delta: int) -> int:
    """See :func:`jqcow._native.twins.refcount_add`."""
    view = _from_buffer(buffer, require_writable=True)
    twins.check_refcount_range(len(view), order, start, stop)
    return lib.jqcow_refcount_add(view, order, start, stop, abs(delta), delta < 0)  # type: ignore[no-any-return]


def l2_run(
    table: Buffer, index: int, limit: int, cluster_bits: int, entry_bytes: int = 8
) -> tuple[int, int, int]:
    """See :func:`jqcow._native.twins.l2_run`."""
    view = _from_buffer(table)
    twins.check_l2_range(len(view), index, limit, entry_bytes)
    limit = min(limit, len(view) // entry_bytes - index)
    packed = lib.jqcow_l2_run(view, index, limit, cluster_bits, entry_bytes)
    kind = packed & 3
    return kind, twins.first_host_offset(table, index * entry_bytes, kind), packed >> 2


def subcluster_run(table: Buffer, index: int, limit: int, cluster_bits: int) -> tuple[int, int]:
    """See :func:`jqcow._native.twins.subcluster_run`."""
    view = _from_buffer(table)
    twins.check_subcluster_range(len(view), index, limit)
    limit = min(limit, len(view) // 16 * 32 - index)
    packed = lib.jqcow_subcluster_run(view, index, limit, cluster_bits)
    return packed & 3, packed >> 2


def l2_judge(
    table: Buffer,
    entry_bytes: int,
    cluster_bits: int,
    reserved: int,
    host_bytes: int,
    marks: WritableBuffer | None = None,
) -> tuple[int, ...]:
    """See :func:`jqcow._native.twins.l2_judge`."""
    view = _from_buffer(table)
    twins.check_judged(cluster_bits, host_bytes, marks)
    counts = ffi.new("uint64_t[]", twins.JUDGED)
    marked = ffi.NULL if marks is None else _from_buffer(marks, require_writable=True)
    lib.jqcow_l2_judge(
        view, len(view) // entry_bytes, entry_bytes, cluster_bits, reserved, host_bytes, marked, counts
    )
    return tuple(counts)


def find_unmarked(
    block: Buffer, order: int, start: int, stop: int, marks: Buffer, first_cluster: int, bits: WritableBuffer
) -> int:
    """See :func:`jqcow._native.twins.find_unmarked`."""
    view, marked, found = _from_buffer(block), _from_buffer(marks), _from_buffer(bits, require_writable=True)
    twins.check_refcount_range(len(view), order, start, stop)
    twins.check_marks(first_cluster, stop - start, len(marked), len(found))
    return lib.jqcow_find_unmarked(view, order, start, stop, marked, first_cluster, found)  # type: ignore[no-any-return]


def sector_kinds(data: Buffer, host_bytes: int) -> bytes:
    """See :func:`jqcow._native.twins.sector_kinds`."""
    view = _from_buffer(data)
    twins.check_host_bytes(host_bytes)
    kinds = bytearray(len(view) // SECTOR_BYTES)
    lib.jqcow_sector_kinds(view, len(kinds), host_bytes, _from_buffer(kinds, require_writable=True))
    return bytes(kinds)


def l2_shared(table: Buffer, entry_bytes: int, cluster_bits: int, marks: Buffer) -> tuple[int, int]:
    """See :func:`jqcow._native.twins.l2_shared`."""
    view, marked = _from_buffer(table), _from_buffer(marks)
    counts = ffi.new("uint64_t[]", 2)
    lib.jqcow_l2_shared(
        view, len(view) // entry_bytes, entry_bytes, len(marked) * 4, cluster_bits, marked, counts
    )
    return counts[0], counts[1]


def set_copied(table: WritableBuffer, start: int, stop: int, copied: bool, entry_bytes: int = 8) -> None:
    """See :func:`jqcow._native.twins.set_copied`."""
    view = _from_buffer(table, require_writable=True)
    twins.check_table_range(len(view), start, stop, entry_bytes)
    lib.jqcow_set_copied(view, start, stop, copied, entry_bytes)


def xts_whiten(data: WritableBuffer, tweaks: Buffer, sector_bytes: int) -> None:
    """See :func:`jqcow._native.twins.xts_whiten`."""
    view, firsts = _from_buffer(data, require_writable=True), _from_buffer(tweaks)
    twins.check_whitening(len(view), len(firsts), sector_bytes)
    lib.jqcow_xts_whiten(view, firsts, len(view) // sector_bytes, sector_bytes)


def first_difference(first: memoryview, second: memoryview, start: int, stop: int) -> int:
    """See :func:`jqcow._native.table_twins.first_difference`."""
    table_twins.check_array_range(first, second, start, stop)
    ours, theirs = _from_buffer(first), _from_buffer(second)
    return lib.jqcow_first_difference(ours, first.itemsize, theirs, second.itemsize, start, stop)  # type: ignore[no-any-return]


def refcount_decode(block: Buffer, order: int) -> array[int]:
    """See :func:`jqcow._native.table_twins.refcount_decode`."""
    view = _from_buffer(block)
    refcounts = table_twins.decoded_array(len(view), order)
    lib.jqcow_refcount_decode(
        view, order, len(refcounts), _from_buffer(memoryview(refcounts), require_writable=True)
    )
    return refcounts


def zero_run(data: Buffer, start: int, stop: int, unit_bytes: int) -> tuple[bool, int]:
    """See :func:`jqcow._native.table_twins.zero_run`."""
    view = _from_buffer(data)
    table_twins.check_units(len(view), start, stop, unit_bytes)
    packed = lib.jqcow_zero_run(view, start, stop, unit_bytes)
    return bool(packed & 1), packed >> 1


def count_entries(
    file: CountedFile, table: Buffer, start: int, stop: int, following: int, is_active: bool, repeats: int
) -> EntryCounts:
    """See :func:`jqcow._native.table_twins.count_entries`."""
    view = _from_buffer(table)
    table_twins.check_counted(file, len(view), start, stop, following, repeats)
    arrays = (_from_buffer(file.references, require_writable=True), _from_buffer(file.refcounts))
    owners = _from_buffer(file.owners)
    widths = file.references.itemsize, file.refcounts.itemsize
    sizes = file.cluster_bits, len(file.owners), file.reserved_bits, file.refcount_max
    counting = ffi.new(
        "struct jqcow_counting *", (*arrays, owners, *widths, *sizes, *file.avoided, file.outside, following)
    )
    stopped = lib.jqcow_count_entries(counting, view, start, stop, file.entry_bytes, is_active, repeats)
    counts = (counting.following, counting.allocated, counting.fragmented, counting.compressed)
    return EntryCounts(stopped, *counts, counting.zeros)
