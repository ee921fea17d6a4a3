"""What a guest range holds and where: the facts that ``qemu-img map`` prints, for images and chains.

A range that an image has no entry for is looked up in the file below, as far as the disk of that one reaches;
what lies behind its end, and what no file of the chain holds, reads as zeros.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from jqcow import _native
from jqcow.device.file import FileDevice
from jqcow.errors import CorruptionError, JqcowError, UnsupportedFeatureError
from jqcow.offline.chain import Layer, open_layers
from jqcow.offline.info import STAT_BLOCK_BYTES, Format
from jqcow.offline.records import View
from jqcow.ondisk import entries
from jqcow.ondisk import header as headers
from jqcow.ondisk.layout import ENTRY_BYTES
from jqcow.ondisk.naming import FilePolicy

_CACHED_TABLE_BYTES = 32 << 20
_CACHE_ENTRY_BYTES = 256
"""What remembering one table takes besides its bytes: a hostile image may have millions of empty ones."""

_L1_ENTRIES_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class MapExtent:
    """A guest range, in qemu-img's words; lengths in bytes.

    Attributes:
        start: guest offset.
        length: of the range.
        depth: which file of the chain says so: 0 is the image itself, 1 the file below it.
        present: that file has entries for the range.
        zero: it reads as zeros.
        data: it is read from ``offset``, or decompressed.
        offset: host offset of the range in that file, None where it has none.
        compressed: the data is compressed.
        path: of that file.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    compressed: bool = False
    path: str = ""


def map_file(
    path: str | os.PathLike[str],
    image_format: Format | None,
    start: int = 0,
    length: int | None = None,
    *,
    allow: FilePolicy = False,
    probe: bool = False,
    force_share: bool = False,
) -> list[MapExtent]:
    """Return what a range of the disk in a file holds; a live journal is replayed in memory.

    Args:
        path: the file.
        image_format: None tells it by the magic.
        start: guest offset; past the end of the disk there is nothing.
        length: at most so many bytes; None: to the end of the disk.
        allow: which files named inside images may be opened.
        probe: tell the format of a backing file by its magic where it is not stored.
        force_share: look also while another program writes, unless its journal is live.

    Raises:
        FileAccessDenied: there is a backing file, and the policy does not allow it.
        JqcowError: not an image of this format, damaged, unsupported or in use by a writer.
        OSError: the host failed.
    """
    with ExitStack() as opened:
        layers: list[Layer] = []
        for layer in open_layers(path, image_format, allow=allow, probe=probe, force_share=force_share):
            opened.callback(layer.device.close)
            layers.append(layer)
        size = layers[0].size
        start = min(start, size)
        length = size - start if length is None else min(length, size - start)
        return list(map_chain(layers, start, length))


def map_chain(layers: list[Layer], start: int, length: int) -> Iterator[MapExtent]:
    """Yield what a guest range of a chain holds, neighbours of one kind joined; ``layers`` from the top.

    Raises:
        UnsupportedFeatureError: an external data file, extended L2 entries or encryption in one of the files.
        CorruptionError: a table on the way is not one that an image can have.
    """
    tables = _Tables()
    disks = [_LayerMap(layer, tables) for layer in layers]
    return _joined(_from_top_down(disks, start, length))


def _from_top_down(disks: list[_LayerMap], start: int, length: int) -> Iterator[MapExtent]:
    # A stack instead of recursion: a chain may be deeper than Python's calls may nest.
    waiting = [(0, disks[0].extents(start, length))]
    while waiting:
        depth, extents = waiting[-1]
        extent = next(extents, None)
        if extent is None:
            waiting.pop()
            continue
        reach = 0
        if not extent.present and depth + 1 < len(disks):
            reach = max(0, min(extent.length, disks[depth + 1].size - extent.start))
        if reach < extent.length:
            rest = replace(extent, start=extent.start + reach, length=extent.length - reach)
            if not reach:
                yield replace(extent, depth=depth, path=disks[depth].path)
                continue
            waiting.append((depth, iter((rest,))))
        waiting.append((depth + 1, disks[depth + 1].extents(extent.start, reach)))


class _LayerMap:
    """What the disk of one file holds, whatever is below it."""

    def __init__(self, layer: Layer, tables: _Tables) -> None:
        self.path = layer.path
        self.size = layer.size
        self._device = layer.device
        self._view = layer.view
        self._tables = tables
        self._is_sparse = False
        if layer.view is not None:
            with self._naming_the_file():
                _refuse(layer.view)
                host_bytes = os.stat(layer.path).st_blocks * STAT_BLOCK_BYTES
                self._is_sparse = _holds_less_than_it_counts(layer.view, host_bytes)

    def extents(self, start: int, length: int) -> Iterator[MapExtent]:
        """Yield the parts of a range of this disk; offset and length in bytes."""
        with self._naming_the_file():
            if self._view is None:
                yield from map_raw(self._device, start, length)
                return
            extents = _joined(_pieces(self._view, self._tables, start, length))
            yield from _with_holes(self._device, extents) if self._is_sparse else extents

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except JqcowError as error:
            error.add_note(f"in {self.path}")
            raise


class _Tables:
    """The L2 tables read last, of all files of a chain: fragments of one file share those of another."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._bytes = 0

    def get(self, view: View, index: int) -> bytes:
        """Return the L2 table of an L1 entry, nothing where there is none or all of it is 0."""
        key = id(view), index
        table = self._tables.get(key)
        if table is None:
            table = _l2_table(view, index)
            if _native.is_zero(table):
                table = b""
            self._tables[key] = table
            self._bytes += len(table) + _CACHE_ENTRY_BYTES
            while self._bytes > _CACHED_TABLE_BYTES:
                self._bytes -= len(self._tables.popitem(last=False)[1]) + _CACHE_ENTRY_BYTES
        else:
            self._tables.move_to_end(key)
        return table


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


def _joined(extents: Iterable[MapExtent]) -> Iterator[MapExtent]:
    """Join neighbours of one kind."""
    joined: MapExtent | None = None
    for extent in extents:
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
    if _kind(before) != _kind(after):
        return False
    if before.offset is None or after.offset is None:
        return before.offset is after.offset
    return before.offset + before.length == after.offset


def _kind(extent: MapExtent) -> tuple[int, bool, bool, bool, bool]:
    return extent.depth, extent.present, extent.zero, extent.data, extent.compressed


def _pieces(view: View, tables: _Tables, start: int, length: int) -> Iterator[MapExtent]:
    """Yield a cluster, or all that missing L2 tables would map, at a time."""
    geometry = view.geometry
    table_bytes = geometry.l2_entries * geometry.cluster_bytes
    position, end = start, start + length
    while position < end:
        index = position // table_bytes
        missing = _missing_tables(view, index)
        reach = min(end, (index + max(1, missing)) * table_bytes)
        table = b"" if missing else tables.get(view, index)
        if not table:
            yield MapExtent(position, reach - position, 0, present=False, zero=True, data=False, offset=None)
            position = reach
            continue
        while position < reach:
            within_table, within = divmod(position - index * table_bytes, geometry.cluster_bytes)
            (entry,) = entries.ENTRY.unpack_from(table, within_table * ENTRY_BYTES)
            count = min(reach - position, geometry.cluster_bytes - within)
            yield _entry_extent(entry, position, count, within, version=view.header.version)
            position += count


def _missing_tables(view: View, index: int) -> int:
    """Return how many L1 entries in a row from ``index`` on have no L2 table, or fewer of them."""
    left = view.header.l1_size - index
    if left <= 0:
        # All the rest: a hostile header may claim a disk far larger than its L1 table can map.
        return view.header.size
    place = view.header.l1_table_offset + index * ENTRY_BYTES
    if any(view.read(ENTRY_BYTES, place)):
        return 0
    window = view.read(min(left, _L1_ENTRIES_AT_ONCE) * ENTRY_BYTES, place)
    return (len(window) - len(window.lstrip(b"\0"))) // ENTRY_BYTES


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
