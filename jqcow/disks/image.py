"""A qcow2 file as a disk, read through the engine. All that `disks` asks of the engine is here."""

from __future__ import annotations

from collections.abc import Iterator

from jqcow.device.base import Device
from jqcow.device.disk import Disk, Extent, ExtentKind, joined
from jqcow.device.file import path_of
from jqcow.engine.engine import open_engine
from jqcow.engine.mapping import MappedRun
from jqcow.engine.medium import Medium
from jqcow.ondisk import naming
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, UNALLOCATED, ZERO_CLUSTER
from jqcow.ondisk.naming import DiskFormat, NamedFile

_KINDS: dict[int, ExtentKind] = {
    DATA: "data",
    ZERO_CLUSTER: "zero",
    COMPRESSED_CLUSTER: "compressed",
    UNALLOCATED: "unallocated",
}


def extent_of(run: MappedRun, offset: int) -> Extent:
    """Return what a run of an image's own tables is, at guest ``offset``."""
    return Extent(offset, run.length, _KINDS[run.kind], run.host if run.kind == DATA else None)


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
        self._medium = Medium(device)
        engine = open_engine(self._medium, writable=False).engine
        shown = None if snapshot is None else engine.public.snapshots.l1_to_show(snapshot)
        self.area: HeaderArea = engine.blocks.area
        self._guard = engine.guard
        self._reads = engine.guest(_always, shown=shown).reads
        # One for all walks: nothing changes the tables, and a chain asks for a range in pieces.
        self._walk = self._reads.walk()

    @property
    def path(self) -> str:
        """Path of the file; of a device of the caller's own, nothing."""
        return path_of(self.device)

    @property
    def size(self) -> int:
        """Size of the disk."""
        return self._reads.tables.mapping.disk_bytes

    def backing_file(self) -> NamedFile | None:
        """Return what the header names as the file below, None if it names none.

        Raises:
            FormatError, UnsupportedFeatureError: a name that jqcow refuses.
        """
        return naming.backing_file_of(self.area, self.path)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        self._reads.read_into(buffer, offset)

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what the image's own tables say."""
        return joined(self._extents(length, offset))

    def _extents(self, length: int, offset: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            run = self._reads.first_run(offset, end - offset, self._walk)
            yield extent_of(run, offset)
            offset += run.length

    def kept_clusters(self, extent: Extent) -> Iterator[Extent]:
        """Cut a ``zero`` extent where the clusters that it keeps do not follow each other on the host.

        These have the host offset of the kept range, where there is one.
        """
        return joined(self._kept_clusters(extent))

    def _kept_clusters(self, extent: Extent) -> Iterator[Extent]:
        cluster_bytes = self._reads.tables.geometry.cluster_bytes
        offset = extent.offset
        while offset < extent.end:
            cluster, within = divmod(offset, cluster_bytes)
            host = self._reads.entry(cluster).host
            length = min(cluster_bytes - within, extent.end - offset)
            yield Extent(offset, length, "zero", host + within if host else None, extent.depth)
            offset += length

    def close(self) -> None:
        """Close the device. A reader is waited for."""
        self._guard.end_all()
        self.device.close()


def _always(changing: bool) -> None:
    """Let every request in: a layer is open until its chain is closed."""
