"""What is wrong with structures that only writing needs: the disk can be read all the same.

Refcounts tell a writer which clusters are free; the snapshot table and the directory of the bitmaps lead to
other things than the disk. Where they are damaged, reading goes on and says so. A check finds more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import bitmaps, entries, layout, snapshots
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import table_bytes

Read = Callable[[int, int], bytes]
"""Reads (length, offset) in bytes from the image file; what lies past its end reads as zeros."""


def warnings_of(read: Read, area: HeaderArea, file_bytes: int) -> tuple[str, ...]:
    """Return what is wrong with an image that does not stop reading its disk, in words.

    Args:
        read: reads (length, offset) in bytes from the image file, as replayed where its journal is live.
        area: the header, read the same way.
        file_bytes: length of the file.

    Raises:
        OSError: the host failed.
    """
    return tuple(_warnings(read, area, file_bytes))


def _warnings(read: Read, area: HeaderArea, file_bytes: int) -> Iterator[str]:
    for find in (check_refcount_table, _find_in_snapshot_table, _find_in_bitmaps):
        try:
            find(read, area, file_bytes)
        except (CorruptionError, FormatError) as error:
            yield str(error)


def check_refcount_table(read: Read, area: HeaderArea, file_bytes: int) -> None:
    """Raise CorruptionError or FormatError if the refcounts cannot be found; arguments as `warnings_of`."""
    header = area.header
    header.validate_refcount_table()
    start, length = header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits
    if start >= file_bytes:
        raise CorruptionError("refcount table", start, "it lies past the end of the file")
    for index, entry in entries.nonzero_entries(read(length, start)):
        place = start + table_bytes(index)
        try:
            block = entries.decode_refcount_table(entry, header.geometry)
        except DamagedEntry as error:
            raise CorruptionError("refcount table", place, str(error)) from error
        if block >= file_bytes:
            raise CorruptionError("refcount table", place, f"a block at {block:#x}, past the end of the file")


def _find_in_snapshot_table(read: Read, area: HeaderArea, file_bytes: int) -> None:
    header = area.header
    if header.nb_snapshots and header.snapshots_offset >= file_bytes:
        raise CorruptionError("snapshot table", header.snapshots_offset, "it lies past the end of the file")
    snapshots.parse_table(read, header.snapshots_offset, header.nb_snapshots, header=header)


def _find_in_bitmaps(read: Read, area: HeaderArea, file_bytes: int) -> None:
    place = bitmaps.place_of(area)
    if place is None:
        return
    if place.offset + place.length_bytes > layout.round_up(file_bytes, 1 << area.header.cluster_bits):
        raise CorruptionError("bitmap directory", place.offset, f"{place.length_bytes} bytes are not there")
