"""Whole disks to read from, whatever their format: what may hold data, and the bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from jqcow.device.file import FileDevice
from jqcow.image import Image
from jqcow.offline.info import Format, probe_format, raw_size
from jqcow.ondisk.naming import FilePolicy
from jqcow.opening import open_to_read


class Disk(Protocol):
    """A disk to be read; offsets and lengths in bytes."""

    @property
    def size(self) -> int:
        """Size of the disk."""
        ...

    def data_extents(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what may hold data, in order; all else reads as zeros."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``.

        Raises:
            JqcowError: the range cannot be read.
            OSError: the host failed.
        """
        ...


class RawDisk:
    """A raw file; its last sector is padded with zeros."""

    def __init__(self, device: FileDevice) -> None:
        """Read from ``device``, which stays open."""
        self._device = device
        self.size = raw_size(device)

    def data_extents(self) -> Iterator[tuple[int, int]]:
        """Yield what the host does not call a hole."""
        return self._device.data_extents(0, self.size)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what lies past the end of the file reads as zeros."""
        self._device.pread_into(buffer, offset)


class ImageDisk:
    """A qcow2 image; the journal of a crashed one is replayed in memory."""

    def __init__(self, image: Image) -> None:
        """Read from ``image``, which stays open."""
        self._image = image
        self.size = image.size

    def data_extents(self) -> Iterator[tuple[int, int]]:
        """Yield what clusters hold."""
        for extent in self._image.extents():
            if extent.kind in ("data", "compressed"):
                yield extent.offset, extent.length

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from the disk."""
        self._image.pread_into(buffer, offset)


def disk_on(device: FileDevice, disk_format: Format) -> Disk:
    """Return the disk on an open file, which stays open. It names no other file."""
    # The image is never closed: closing would close the device, which is the caller's.
    return RawDisk(device) if disk_format == "raw" else ImageDisk(open_to_read(device))


@contextmanager
def open_disk(
    path: str | os.PathLike[str],
    disk_format: Format | None,
    *,
    snapshot: str | None = None,
    allow_files: FilePolicy = False,
    probe: bool = False,
) -> Iterator[tuple[Disk, Format]]:
    """Open a disk for reading, locked against writers; None tells the format by its magic.

    Args:
        path: the file.
        disk_format: None tells it by its magic.
        snapshot: id or name of an internal snapshot to read instead of the disk.
        allow_files: whether the files may be opened that the image names, as in `jqcow.open`.
        probe: tell formats of backing files that are not stored by their magic.

    Raises:
        ValueError: a snapshot of a raw file.
        JqcowError: not an image of this format, damaged, unsupported or in use, or a file is not allowed.
        OSError: the host failed.
    """
    device = FileDevice.open(path, writable=False)
    try:
        known = disk_format or probe_format(device)
        if known == "raw" and snapshot is not None:
            raise ValueError(f"{os.fspath(path)} is a raw file, which has no snapshots")
        if known == "raw":
            yield RawDisk(device), known
        else:
            with open_to_read(device, snapshot=snapshot, allow_files=allow_files, probe=probe) as image:
                yield ImageDisk(image), known
    finally:
        device.close()


def windows(disk: Disk, unit: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of whole units that may hold data: in order, apart, at most ``limit`` bytes.

    The last one ends at the end of the disk. ``limit`` is a multiple of ``unit``.
    """
    reached = 0
    for offset, length in disk.data_extents():
        start = max(reached, offset - offset % unit)
        end = min(-(-(offset + length) // unit) * unit, disk.size)
        while start < end:
            step = min(limit, end - start)
            yield start, step
            start += step
        reached = max(reached, end)
