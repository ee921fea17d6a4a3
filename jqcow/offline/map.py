"""What a guest range holds and where: the facts that ``qemu-img map`` prints, for whole images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from jqcow import _native
from jqcow.device.file import FileDevice
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.offline.info import STAT_BLOCK_BYTES, Format, probe_format, raw_size
from jqcow.offline.records import View, open_to_look
from jqcow.ondisk import entries
from jqcow.ondisk import header as headers
from jqcow.ondisk.layout import ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class MapExtent:
    """A guest range, in qemu-img's words; lengths in bytes.

    Attributes:
        start: guest offset.
        length: of the range.
        depth: 0, as there is no backing file.
        present: the range has entries of its own.
        zero: it reads as zeros.
        data: it is read from ``offset``, or decompressed.
        offset: host offset of the range, None where it has none.
        compressed: the data is compressed.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    compressed: bool = False


def map_file(
    path: str | os.PathLike[str],
    image_format: Format | None,
    start: int = 0,
    length: int | None = None,
    *,
    force_share: bool = False,
) -> list[MapExtent]:
    """Return what a range of the disk in a file holds; a live journal is replayed in memory.

    Args:
        path: the file.
        image_format: None tells it by the magic.
        start: guest offset; past the end of the disk there is nothing.
        length: at most so many bytes; None: to the end of the disk.
        force_share: look also while another program writes, unless its journal is live.

    Raises:
        JqcowError: not an image of this format, damaged, unsupported or in use by a writer.
        OSError: the host failed.
    """
    device = open_to_look(path, force_share=force_share)
    try:
        view = View(device) if (image_format or probe_format(device)) == "qcow2" else None
        size = raw_size(device) if view is None else view.header.size
        start = min(start, size)
        length = size - start if length is None else min(length, size - start)
        if view is None:
            return list(map_raw(device, start, length))
        extents = map_image(view, start, length)
        host_bytes = os.stat(path).st_blocks * STAT_BLOCK_BYTES
        is_sparse = _holds_less_than_it_counts(view, host_bytes)
        return list(_with_holes(device, extents) if is_sparse else extents)
    finally:
        device.close()


def _holds_less_than_it_counts(view: View, host_bytes: int) -> bool:
    """Tell whether clearly more clusters are in use than the host has given space to.

    This is when qemu-img looks for holes under data clusters; the limits are its own.
    """
    host_clusters = host_bytes // view.geometry.cluster_bytes
    limit = max(host_clusters * 10 // 9, host_clusters + 2)
    file_clusters = view.geometry.clusters(view.size())
    used = 0
    for first, refcounts in view.refcount_blocks():
        inside = min(view.geometry.refcounts_per_cluster, file_clusters - first)
        used += _count_used(refcounts, view.header.refcount_order, inside)
        if used >= limit:
            return True
    return False


def _count_used(refcounts: bytes, order: int, limit: int) -> int:
    """Return how many of the first ``limit`` refcounts are not 0."""
    used = position = 0
    while 0 <= position < limit:
        start = _native.refcount_find_used(refcounts, order, position, limit)
        if start < 0:
            break
        position = _native.refcount_find_zero(refcounts, order, start, limit)
        used += (position if position >= 0 else limit) - start
    return used


def _with_holes(device: FileDevice, extents: Iterable[MapExtent]) -> Iterator[MapExtent]:
    """Mark as zero what of the data lies in holes of the file: it is data that reads as zeros."""
    for extent in extents:
        if not extent.data or extent.offset is None:
            yield extent
            continue
        for part in map_raw(device, extent.offset, extent.length):
            start = extent.start + part.start - extent.offset
            yield replace(extent, start=start, length=part.length, offset=part.start, zero=part.zero)


def map_raw(device: FileDevice, start: int, length: int) -> Iterator[MapExtent]:
    """Yield what a range of a raw file holds: data and holes."""
    position, end = start, start + length
    for offset, count in device.data_extents(start, length):
        if position < offset:
            yield _raw_extent(position, offset - position, data=False)
        yield _raw_extent(offset, count, data=True)
        position = offset + count
    if position < end:
        yield _raw_extent(position, end - position, data=False)


def _raw_extent(start: int, length: int, *, data: bool) -> MapExtent:
    return MapExtent(start, length, 0, present=True, zero=not data, data=data, offset=start)


def map_image(view: View, start: int, length: int) -> Iterator[MapExtent]:
    """Yield what a guest range of a qcow2 image holds, neighbours of one kind joined.

    Raises:
        UnsupportedFeatureError: a backing file, an external data file or extended L2 entries.
        CorruptionError: a table on the way is not one that an image can have.
    """
    _refuse(view)
    joined: MapExtent | None = None
    for extent in _pieces(view, start, length):
        if joined is not None and _follows(joined, extent):
            joined = replace(joined, length=joined.length + extent.length)
            continue
        if joined is not None:
            yield joined
        joined = extent
    if joined is not None:
        yield joined


def _refuse(view: View) -> None:
    header = view.header
    if header.backing_file_offset:
        raise UnsupportedFeatureError("a backing file")
    if header.incompatible_features & headers.INCOMPATIBLE_EXTERNAL_DATA:
        raise UnsupportedFeatureError("an external data file")
    if header.incompatible_features & headers.INCOMPATIBLE_EXTENDED_L2:
        raise UnsupportedFeatureError("extended L2 entries (subclusters)")
    if header.crypt_method:
        raise UnsupportedFeatureError("encryption", f"crypt_method {header.crypt_method}")
    unknown = header.incompatible_features & ~headers.INCOMPATIBLE_KNOWN
    if unknown:
        raise UnsupportedFeatureError(f"incompatible feature bits {unknown:#x}")


def _follows(before: MapExtent, after: MapExtent) -> bool:
    if (before.present, before.zero, before.data, before.compressed) != (
        after.present,
        after.zero,
        after.data,
        after.compressed,
    ):
        return False
    if before.offset is None or after.offset is None:
        return before.offset is after.offset
    return before.offset + before.length == after.offset


def _pieces(view: View, start: int, length: int) -> Iterator[MapExtent]:
    """Yield a cluster, or all that one missing L2 table would map, at a time."""
    geometry, header = view.geometry, view.header
    table_bytes = geometry.l2_entries * geometry.cluster_bytes
    position, end = start, start + length
    while position < end:
        index = position // table_bytes
        reach = min(end, (index + 1) * table_bytes)
        table = _l2_table(view, index) if index < header.l1_size else b""
        if not any(table):
            yield MapExtent(position, reach - position, 0, present=False, zero=True, data=False, offset=None)
            position = reach
            continue
        while position < reach:
            within_table, within = divmod(position - index * table_bytes, geometry.cluster_bytes)
            (entry,) = entries.ENTRY.unpack_from(table, within_table * ENTRY_BYTES)
            count = min(reach - position, geometry.cluster_bytes - within)
            yield _entry_extent(entry, position, count, within, version=header.version)
            position += count


def _l2_table(view: View, index: int) -> bytes:
    """Return the L2 table of an L1 entry, nothing where there is none."""
    place = view.header.l1_table_offset + index * ENTRY_BYTES
    (entry,) = entries.ENTRY.unpack(view.read(ENTRY_BYTES, place))
    table = entry & entries.OFFSET_MASK
    if entry & entries.L1_RESERVED or table % view.geometry.cluster_bytes:
        raise CorruptionError("L1 table", place, f"entry {entry:#x} is not valid")
    return view.read(view.geometry.cluster_bytes, table) if table else b""


def _entry_extent(entry: int, start: int, length: int, within: int, *, version: int) -> MapExtent:
    """Return what one L2 entry says about the part of its cluster from byte ``within`` on."""
    if entry & entries.COMPRESSED:
        return MapExtent(start, length, 0, present=True, zero=False, data=True, offset=None, compressed=True)
    host = entry & entries.OFFSET_MASK
    is_zero = bool(entry & entries.ZERO) and version >= 3
    return MapExtent(
        start,
        length,
        depth=0,
        present=is_zero or bool(host),
        zero=is_zero or not host,
        data=not is_zero and bool(host),
        offset=host + within if host else None,
    )
