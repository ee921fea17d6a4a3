"""What a guest range holds and where: the facts that ``qemu-img map`` prints, for images and chains.

A range that an image has no entry for is looked up in the file below, as far as the disk of that one reaches;
what lies behind its end, and what no file of the chain holds, reads as zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from operator import index

from jqcow import _native
from jqcow.device.disk import Extent, joined
from jqcow.device.file import path_of
from jqcow.disks.chain import FileDisk, open_disk
from jqcow.disks.image import ImageDisk
from jqcow.disks.policy import NOT_FOLLOWING, Following
from jqcow.disks.raw import RawDisk
from jqcow.disks.view import FileView
from jqcow.offline.info import STAT_BLOCK_BYTES
from jqcow.ondisk.naming import DiskFormat


@dataclass(frozen=True, slots=True)
class MapLine:
    """An extent, as a map tells it.

    Attributes:
        extent: what was found; a ``zero`` one has the host offset of the clusters that it keeps.
        path: of the file that says so.
        in_hole: the extent is data in a hole of that file: it reads as zeros.
    """

    extent: Extent
    path: str
    in_hole: bool = False

    @property
    def present(self) -> bool:
        """The file has entries for the range."""
        return self.extent.kind != "unallocated"

    @property
    def zero(self) -> bool:
        """The range reads as zeros."""
        return self.in_hole or not self.extent.holds_data

    @property
    def data(self) -> bool:
        """The range is read from its host offset, or decompressed."""
        return self.extent.holds_data


def map_file(
    path: str | os.PathLike[str],
    image_format: DiskFormat | None,
    start: int = 0,
    length: int | None = None,
    *,
    following: Following = NOT_FOLLOWING,
) -> list[MapLine]:
    """Return what a range of the disk in a file holds; a live journal is replayed in memory.

    Args:
        path: the file.
        image_format: None tells it by the magic.
        start: guest offset; past the end of the disk there is nothing.
        length: at most so many bytes; None: to the end of the disk.
        following: how the names inside images are followed.

    Raises:
        JqcowError: as `jqcow.disks.chain.open_disk`, or a table on the way is damaged.
        OSError: the host failed.
    """
    with closing(open_disk(path, image_format, following=following)) as chain:
        start = min(index(start), chain.size)
        length = chain.size - start if length is None else min(index(length), chain.size - start)
        layers = [_LayerMap(layer) for layer in chain.layers]
        extents = joined(layers[extent.depth].shown(extent) for extent in chain.extents(length, start))
        return [line for extent in extents for line in layers[extent.depth].lines(extent)]


class _LayerMap:
    """What a map tells of the extents of one file."""

    def __init__(self, disk: FileDisk) -> None:
        self._disk = disk
        self._data = disk.data_device if isinstance(disk, ImageDisk) else disk.device
        self._path = path_of(self._data)
        self._is_encrypted = isinstance(disk, ImageDisk) and disk.is_encrypted
        # A hole reads as noise where data is encrypted.
        self._is_sparse = isinstance(disk, ImageDisk) and not disk.is_encrypted and _is_sparse(disk)

    def shown(self, extent: Extent) -> Extent:
        """Return an extent as it is told: encrypted data is not to be read from a host offset."""
        return replace(extent, host_offset=None) if self._is_encrypted else extent

    def lines(self, extent: Extent) -> Iterator[MapLine]:
        """Yield an extent, cut where a map makes a difference."""
        disk = self._disk
        if isinstance(disk, ImageDisk) and not disk.is_encrypted and disk.may_keep(extent):
            yield from (MapLine(part, self._path) for part in disk.kept_clusters(extent))
        elif self._is_sparse and extent.host_offset is not None:
            yield from self._with_holes(extent, extent.host_offset)
        else:
            yield MapLine(extent, self._path)

    def _with_holes(self, extent: Extent, host_offset: int) -> Iterator[MapLine]:
        for part in RawDisk(self._data).extents(extent.length, host_offset):
            offset = extent.offset + part.offset - host_offset
            shown = replace(extent, offset=offset, length=part.length, host_offset=part.offset)
            yield MapLine(shown, self._path, in_hole=part.kind == "zero")


def _is_sparse(disk: ImageDisk) -> bool:
    """Tell whether an image may have holes under its data clusters."""
    return _holds_less_than_it_counts(
        FileView.of_file(disk.device), os.stat(disk.path).st_blocks * STAT_BLOCK_BYTES
    )


def _holds_less_than_it_counts(view: FileView, host_bytes: int) -> bool:
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
