"""A block device: a disk, a partition, a logical volume, a loop device.

Its size is fixed, unless somebody else gives it another one, and nothing of it reads as zeros for want of
writing. Reads and writes go through the kernel's page cache, so sectors of 4096 bytes ask for no alignment.
"""

from __future__ import annotations

import ctypes
import errno
import stat
import struct
import sys
from collections.abc import Iterator

from jqcow.device.base import ReadBuffer, no_space
from jqcow.device.file import FileDevice

if sys.platform != "win32":
    import fcntl

ALIGNMENT_BYTES = 4096
"""Of what is given back or made zeros: the largest sector, and a page of the cache."""
ZERO_OUT_MIN_BYTES = 1 << 20
"""Below this writing zeros is as fast."""

_AT_ONCE_BYTES = 256 << 20
"""The kernel hears of no signal before a call has ended."""
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_BLKGETSIZE64 = 0x80081272 if ctypes.sizeof(ctypes.c_size_t) == 8 else 0x80041272
_RANGE = struct.Struct("=QQ")
_LENGTH = struct.Struct("=Q")
_MISSING = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)


class BlockDevice(FileDevice):
    """A :class:`jqcow.device.base.Device` of fixed size on a block device."""

    has_fixed_size = True
    _known_bytes = 0
    _discards = True
    _zeroes_out = True

    def size(self) -> int:
        """Return how many bytes the device holds."""
        with self._naming_errors():
            found = fcntl.ioctl(self._descriptor, _BLKGETSIZE64, bytes(_LENGTH.size))
        self._known_bytes = int(_LENGTH.unpack(found)[0])
        return self._known_bytes

    def free_bytes(self) -> None:
        """Nobody knows how much of the device is free, but for who knows what is used."""

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole of ``buffer`` within the device, or raise."""
        self._require_room(offset + memoryview(buffer).nbytes)
        super().pwrite(buffer, offset)

    def truncate(self, size_bytes: int) -> None:
        """Raise ``ENOSPC`` if the device is smaller; else do nothing."""
        self._require_writable()
        self._require_room(size_bytes)

    def allocate(self, offset: int, length: int) -> None:
        """Raise ``ENOSPC`` if the device does not reach to the end of the range; else do nothing."""
        self._require_writable()
        self._require_room(offset + length)

    def punch(self, offset: int, length: int) -> bool:
        """Give the whole pages of a range back, where the device takes them.

        Returns False: they may hold anything.
        """
        self._require_writable()
        start, end = _aligned(offset, offset + length)
        if self._discards and start < end:
            self._discards = self._call(_BLKDISCARD, start, end - start)
        return False

    def zero_out(self, offset: int, length: int) -> bool:
        """Make a range zeros; return False, having changed nothing, where writing them is as fast."""
        self._require_writable()
        end = offset + length
        start, stop = _aligned(offset, end)
        if not self._zeroes_out or stop - start < ZERO_OUT_MIN_BYTES:
            return False
        self._require_room(end)
        self._zeroes_out = self._call(_BLKZEROOUT, start, stop - start)
        if self._zeroes_out:
            for first, last in ((offset, start), (stop, end)):
                if first < last:
                    self.pwrite(bytes(last - first), first)
        return self._zeroes_out

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield what of a range lies on the device: all of it may hold data."""
        end = min(offset + length, self.size())
        if offset < end:
            yield offset, end - offset

    def _call(self, request: int, offset: int, length: int) -> bool:
        """Ask the device for something; return False where it does not offer that."""
        for start in range(offset, offset + length, _AT_ONCE_BYTES):
            part = _RANGE.pack(start, min(_AT_ONCE_BYTES, offset + length - start))
            try:
                fcntl.ioctl(self._descriptor, request, part)
            except OSError as error:
                if error.errno in _MISSING:
                    return False
                self._name(error)
                raise
        return True

    def _require_room(self, end_bytes: int) -> None:
        if end_bytes > self._known_bytes and end_bytes > self.size():
            error = no_space("this", end_bytes, None, self._known_bytes)
            error.filename = self._path
            raise error


FileDevice.kinds[stat.S_IFBLK] = BlockDevice


def _aligned(start: int, end: int) -> tuple[int, int]:
    """Return what of a range is whole pages."""
    return -(-start // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, end // ALIGNMENT_BYTES * ALIGNMENT_BYTES
