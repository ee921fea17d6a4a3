"""A raw file as a disk."""

from __future__ import annotations

from collections.abc import Iterator

from jqcow.device.base import Device, ReadBuffer, write_zeros
from jqcow.device.disk import Disk, Extent, WritableDisk
from jqcow.device.file import FileDevice, path_of
from jqcow.ondisk import layout
from jqcow.ondisk.naming import DiskFormat


class RawDisk(Disk, WritableDisk):
    """A raw file: whole sectors, the last one padded with zeros. Writes go into the file itself."""

    format: DiskFormat = "raw"

    def __init__(self, device: Device) -> None:
        """Read from ``device``, and write to it; `close` closes it."""
        self.device = device
        self._size = layout.round_up(device.size(), layout.SECTOR_BYTES)

    @property
    def path(self) -> str:
        """Path of the file; of a device of the caller's own, nothing."""
        return path_of(self.device)

    @property
    def size(self) -> int:
        """Size of the disk as it was opened or resized."""
        return self._size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what lies past the end of the file reads as zeros."""
        self.device.pread_into(buffer, offset)

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield data and holes: a raw file has all of its disk."""
        position, end = offset, offset + length
        device = self.device
        found = device.data_extents(offset, length) if isinstance(device, FileDevice) else [(offset, length)]
        for start, count in found:
            if position < start:
                yield Extent(position, start - position, "zero", position)
            yield Extent(start, count, "data", start)
            position = start + count
        if position < end:
            yield Extent(position, end - position, "zero", position)

    def resize(self, size_bytes: int) -> None:
        """Set the length of the file."""
        self.device.truncate(size_bytes)
        self._size = layout.round_up(size_bytes, layout.SECTOR_BYTES)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole of ``buffer``."""
        self.device.pwrite(buffer, offset)

    def write_zeroes(self, length: int, offset: int) -> None:
        """Punch a hole, or write zeros where the host cannot."""
        if not self.device.punch(offset, length):
            write_zeros(self.device, offset, length)

    def close(self) -> None:
        """Close the device."""
        self.device.close()
