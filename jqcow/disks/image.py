"""A qcow2 file as a disk, read through the engine. All that `disks` asks of the engine is here."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext

from jqcow.device.base import Device
from jqcow.device.disk import Disk, Extent, ExtentKind, joined
from jqcow.device.file import path_of
from jqcow.engine import recovery
from jqcow.engine.datapath import DataPath
from jqcow.engine.mapping import COMPRESSED, DATA, UNALLOCATED, ZERO, MappedRun
from jqcow.engine.medium import Medium
from jqcow.ondisk import entries, naming
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.naming import DiskFormat, NamedFile

_KINDS: dict[int, ExtentKind] = {
    DATA: "data",
    ZERO: "zero",
    COMPRESSED: "compressed",
    UNALLOCATED: "unallocated",
}


def extent_of(run: MappedRun, offset: int) -> Extent:
    """Return what a run of an image's own tables is, at guest ``offset``."""
    return Extent(offset, run.length, _KINDS[run.kind], run.host_offset if run.kind == DATA else None)


class ImageDisk(Disk):
    """A qcow2 image opened for reading, without what lies below it; a crashed one is replayed in memory.

    What the image has nothing of its own for is ``unallocated``, and reads as zeros. Threads may share it.
    """

    format: DiskFormat = "qcow2"

    def __init__(self, device: Device, *, snapshot: str | None = None) -> None:
        """Read the image on ``device``, or one of its snapshots; `close` closes the device.

        Raises:
            SnapshotNotFound: there is no such snapshot.
            FormatError: not a qcow2 image; UnsupportedFeatureError where jqcow refuses it by name.
            CorruptionError: the image is damaged.
            OSError: the host failed.
        """
        self.device = device
        store = recovery.open_store(Medium(device), writable=False).store
        if snapshot is not None:
            store.snapshots.show(snapshot)
        self.area: HeaderArea = store.metadata.area
        self._data = DataPath(store)
        # The engine's caches are not for two threads at a time.
        self._lock = threading.Lock()
        self._owner_pid = os.getpid()

    @property
    def path(self) -> str:
        """Path of the file; of a device of the caller's own, nothing."""
        return path_of(self.device)

    @property
    def size(self) -> int:
        """Size of the disk."""
        return self._data.mapping.disk_bytes

    def backing_file(self) -> NamedFile | None:
        """Return what the header names as the file below, None if it names none.

        Raises:
            FormatError, UnsupportedFeatureError: a name that jqcow refuses.
        """
        return naming.backing_file_of(self.area, self.path)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        with self._lock:
            self._data.read_into(buffer, offset)

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what the image's own tables say."""
        return joined(self._extents(length, offset))

    def _extents(self, length: int, offset: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            with self._lock:
                run = self._data.mapping.run(offset, end - offset)
            yield extent_of(run, offset)
            offset += run.length

    def kept_clusters(self, extent: Extent) -> Iterator[Extent]:
        """Cut a ``zero`` extent where the clusters that it keeps do not follow each other on the host.

        These have the host offset of the kept range, where there is one.
        """
        return joined(self._kept_clusters(extent))

    def _kept_clusters(self, extent: Extent) -> Iterator[Extent]:
        cluster_bytes = self._data.geometry.cluster_bytes
        offset = extent.offset
        while offset < extent.end:
            cluster, within = divmod(offset, cluster_bytes)
            with self._lock:
                host = self._data.mapping.l2_entry(cluster) & entries.OFFSET_MASK
            length = min(cluster_bytes - within, extent.end - offset)
            yield Extent(offset, length, "zero", host + within if host else None, extent.depth)
            offset += length

    def close(self) -> None:
        """Close the device. A reader is waited for, though not in a forked child, where it never ends."""
        with self._lock if os.getpid() == self._owner_pid else nullcontext():
            self.device.close()
