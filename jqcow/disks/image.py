"""A qcow2 file as a disk, read through the engine. All that `disks` asks of the engine is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from jqcow.device.base import Device
from jqcow.device.disk import Disk, Extent, ExtentKind, joined
from jqcow.device.file import path_of
from jqcow.engine.bitmaps import Bitmaps
from jqcow.engine.engine import open_engine
from jqcow.engine.mapping import MappedRun
from jqcow.engine.medium import Medium
from jqcow.engine.read import PENDING
from jqcow.ondisk import naming
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.keys import Passphrase
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, UNALLOCATED, ZERO_CLUSTER
from jqcow.ondisk.layout import DATA_FILE
from jqcow.ondisk.naming import DiskFormat, NamedFile

_KINDS: dict[int, ExtentKind] = {
    PENDING: "data",
    DATA: "data",
    ZERO_CLUSTER: "zero",
    COMPRESSED_CLUSTER: "compressed",
    UNALLOCATED: "unallocated",
}


def extent_of(run: MappedRun, offset: int) -> Extent:
    """Return what a run of an image's own tables is, at guest ``offset``."""
    return Extent(offset, run.length, _KINDS[run.kind], run.host % DATA_FILE if run.kind == DATA else None)


class ImageDisk(Disk):
    """A qcow2 image opened for reading, without what lies below it; a crashed one is replayed in memory.

    What the image has nothing of its own for is ``unallocated``, and reads as zeros. Threads may share it.
    """

    format: DiskFormat = "qcow2"

    def __init__(
        self,
        device: Device,
        *,
        snapshot: str | None = None,
        passphrase: Passphrase | None = None,
        reads_data: bool = True,
        open_data: Callable[[HeaderArea], Device | None] | None = None,
    ) -> None:
        """Read the image on ``device``, or one of its snapshots; `close` closes the device.

        An encrypted one needs a passphrase, unless only its tables are read; one with an external data
        file needs ``open_data``, which opens that. `close` closes it too.

        Raises:
            PassphraseError: the image is encrypted, and there is no passphrase, or another.
            SnapshotNotFound: there is no such snapshot.
            FormatError: not a qcow2 image; UnsupportedFeatureError where jqcow refuses it by name.
            CorruptionError: the image is damaged.
            OSError: the host failed.
        """
        self.device = device
        self._medium = Medium(device)
        engine = open_engine(self._medium, writable=False).engine
        self.area: HeaderArea = engine.blocks.area
        data_file = None if open_data is None else open_data(self.area)
        try:
            if data_file is not None:
                engine.attach(data_file)
            if reads_data or passphrase is not None:
                engine.unlock(passphrase)
            shown = None if snapshot is None else engine.public.snapshots.l1_to_show(snapshot)
        except BaseException:
            if data_file is not None:
                data_file.close()
            raise
        self._guard = engine.guard
        self._reads = engine.guest(_always, shown=shown).reads
        # One for all walks: nothing changes the tables, and a chain asks for a range in pieces.
        self._walk = self._reads.walk()
        self._walked = self._reads.of_whole_tables()

    @property
    def path(self) -> str:
        """Path of the file; of a device of the caller's own, nothing."""
        return path_of(self.device)

    @property
    def data_device(self) -> Device:
        """What holds the data: the image's own device, or its external data file."""
        data_file = self._medium.data_file
        return self.device if data_file is None else data_file.device

    @property
    def size(self) -> int:
        """Size of the disk."""
        return self._reads.tables.mapping.disk_bytes

    @property
    def bitmaps(self) -> Bitmaps:
        """The persistent bitmaps, to be looked at."""
        return self._reads.tables.bitmaps

    @property
    def is_encrypted(self) -> bool:
        """True where what lies at a host offset is not what the guest reads."""
        return self.area.header.crypt_method != 0

    @property
    def has_snapshots(self) -> bool:
        """True where the image has internal snapshots."""
        return self.area.header.nb_snapshots != 0

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
            run = self._walked.first_run(offset, end - offset, self._walk)
            yield extent_of(run, offset)
            offset += run.length

    def may_keep(self, extent: Extent) -> bool:
        """Return True if an extent without data may have host clusters all the same."""
        has_subclusters = self._reads.tables.geometry.has_subclusters
        return extent.kind == "zero" or (has_subclusters and extent.kind == "unallocated")

    def kept_clusters(self, extent: Extent) -> Iterator[Extent]:
        """Cut an extent without data where the clusters that it keeps do not follow each other on the host.

        These have the host offset of the kept range, where there is one.
        """
        return joined(self._kept_clusters(extent))

    def _kept_clusters(self, extent: Extent) -> Iterator[Extent]:
        offset, has_subclusters = extent.offset, self._reads.tables.geometry.has_subclusters
        for run in self._reads.runs(offset, extent.length):
            end = offset + run.length
            while offset < end:
                host: int | None = None
                length = end - offset
                if run.host or not has_subclusters:
                    # With standard entries each cluster of a run may keep one of its own, or none.
                    host, length = self._kept_at(offset, length)
                yield replace(extent, offset=offset, length=length, host_offset=host)
                offset += length

    def _kept_at(self, offset: int, length: int) -> tuple[int | None, int]:
        """Return what the cluster at a guest offset keeps, and how much of a range lies in it."""
        cluster_bytes = self._reads.tables.geometry.cluster_bytes
        cluster, within = divmod(offset, cluster_bytes)
        host = self._reads.entry(cluster).host
        return host % DATA_FILE + within if host else None, min(cluster_bytes - within, length)

    def close(self) -> None:
        """Close the device. A reader is waited for."""
        self._guard.end_all()
        try:
            self.device.close()
        finally:
            if self._medium.data_file is not None:
                self._medium.data_file.device.close()


def _always(changing: bool) -> None:
    """Let every request in: a layer is open until its chain is closed."""
