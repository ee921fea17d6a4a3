"""The external data file of an image: where the guest's data lies, by host offsets from `DATA_FILE` on.

The file has no refcounts. A guest cluster lies there at the guest's own offset, so nothing is moved, and a
new cluster is written over whatever the file holds at that place.

X1. All that was written to the data file is durable there before a record is appended that may rely on it,
    and before a barrier of the image that acknowledges it.
X2. A pair in a data file is never zero-safe: what a new cluster does not get from the guest it gets as zeros,
    or from below.
X3. The bytes of a raw data file are the disk's. A cluster becomes data in the mapping, durably, over zeros in
    the file, before the guest writes there; zeroing and discarding leave it data.
X4. A transaction overwrites no data in a data file: there is no other place to keep it in.
X5. An image whose tables map a guest cluster elsewhere than to its own offset is not changed: two could be
    one.
X6. What a smaller disk loses stays in the data file until the record of the size is durable.
X7. What the tables give up in a data file that is not raw is punched once the record is durable and no
    request uses it any more, and only where nobody has planned to write since; who comes to write waits.
X8. A raw file that a transaction lengthened is cut back when that is given up; never below the size in a
    record that may come back to life.
"""

from __future__ import annotations

import threading

from jqcow.device import filling
from jqcow.device.base import Caching, Device, ReadBuffer, has_fixed_size, write_zeros
from jqcow.device.file import path_of
from jqcow.ondisk.form import Preallocation
from jqcow.ondisk.layout import DATA_FILE, HostOffset


class DataFile:
    """A second device, which knows whether it has anything to be made durable. Its owner places the barriers.

    ``is_changed`` is set when a change has ended, well or not: a barrier covers what ended before it began.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        # What an earlier process left in the page cache may be acknowledged by the next flush.
        self.is_changed = True
        self.promised_bytes = 0
        """The disk's size in a record that may be durable, though its barrier failed (X8)."""
        self._size_lock = threading.Lock()
        self._reached_bytes = 0
        self._punches = True

    @property
    def path(self) -> str:
        """Path of the file; of a device of the caller's own, nothing."""
        return path_of(self.device)

    def settle(self) -> None:
        """Make what an earlier process left durable, and have reads show nothing else (medium.py, M7).

        Raises:
            OSError: the host failed; it may have lost something, and opening can be tried again.
        """
        # Durable now: what a killed writer left in the page cache. What a writer reads it relies on.
        self.device.barrier("open.data")
        if isinstance(self.device, Caching):
            self.device.forget_cached()

    def reaches(self, host: int) -> bool:
        """Return True if the file has the byte at a host offset: what lies behind its end is lost."""
        if host - DATA_FILE >= self._reached_bytes:
            self._reached_bytes = self.device.size()
        return host - DATA_FILE < self._reached_bytes

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self.device.size()

    def pread_into(self, buffer: memoryview, host: HostOffset) -> None:
        """Fill ``buffer``; what lies past the end reads as zeros."""
        self.device.pread_into(buffer, host - DATA_FILE)

    def pwrite(self, buffer: ReadBuffer, host: HostOffset) -> None:
        """Write all of ``buffer`` or raise."""
        try:
            self.device.pwrite(buffer, host - DATA_FILE)
        finally:
            self.is_changed = True

    def zero(self, host: HostOffset, length: int) -> None:
        """Make a range read as zeros, a hole where the host can make one; the file reaches that far then."""
        offset = host - DATA_FILE
        try:
            self.grow(offset + length)
            # A device of fixed size shows anything where it was told to discard, until the zeros are there.
            if has_fixed_size(self.device) or not self.device.punch(offset, length):
                write_zeros(self.device, offset, length)
        finally:
            self.is_changed = True

    def punch(self, host: HostOffset, length: int) -> None:
        """Give a range that nobody maps back to the host; it may hold anything. Not durable for anybody."""
        offset = host - DATA_FILE
        end = min(offset + length, self.device.size())
        if self._punches and offset < end:
            # A device of fixed size takes it, and says that it shows no zeros.
            self._punches = self.device.punch(offset, end - offset) or has_fixed_size(self.device)

    def grow(self, size_bytes: int) -> None:
        """Set the length to at least ``size_bytes``."""
        with self._size_lock:
            try:
                if self.device.size() < size_bytes:
                    # Not by its length, nor by a write: another thread may be writing there.
                    self.device.allocate(size_bytes - 1, 1)
            finally:
                self.is_changed = True

    def cut(self, size_bytes: int) -> None:
        """Set the length to at most ``size_bytes``; nobody writes behind that."""
        self._reached_bytes = 0
        try:
            if self.device.size() > size_bytes:
                self.device.truncate(size_bytes)
        finally:
            self.is_changed = True

    def clear(self, start: int, end: int) -> None:
        """Have a range of the file read as zeros that was cut off and added; nobody uses it."""
        try:
            if has_fixed_size(self.device) and start < end:
                # Such a device is never cut.
                write_zeros(self.device, start, end - start)
        finally:
            self.is_changed = True

    def lengthen(self, size_bytes: int, preallocation: Preallocation) -> None:
        """Have the file reach to ``size_bytes``, by a hole or by space of the host; nobody else uses it."""
        start = self.device.size()
        try:
            if start < size_bytes:
                self.device.truncate(size_bytes)
                filling.take_space(self.device, start, size_bytes - start, preallocation)
        finally:
            self.is_changed = True
