"""The device as the engine sees it: barriers in order, and nothing more once the state is not known.

M1. A barrier that failed is final: it is not tried again, and no change reaches the device after it, but
    the live root where closing failed.
M2. The file is made longer with the lock held, and only to the frontier, behind which nothing is written:
    growing cuts nothing off that another thread writes.
M3. What was changed while a barrier ran is not covered by it. Barriers are numbered as they start: what was
    changed when ``barriers_started`` was n is covered by each above n.
M4. The device gets one barrier at a time, and none after one that failed.
M6. A section that changes the state in memory marks it in doubt at its start and as good at its end. What
    finds it in doubt raises PoisonedError: opening the image again recovers it.
M7. A writer reads an image only after a barrier, and when the cache has forgotten what a failed one lost:
    what it reads is durable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType

from jqcow.device import filling
from jqcow.device.base import Caching, Device, HostSpace, ReadBuffer, has_fixed_size
from jqcow.engine.datafile import DataFile
from jqcow.errors import JqcowError, PoisonedError
from jqcow.ondisk.form import Preallocation
from jqcow.ondisk.layout import HostOffset

BarrierListener = Callable[[int], None]
"""Told, with the lock held, the number of a barrier that has completed (M3)."""

EXPECTED = (OSError, JqcowError)
"""What a section expects of host and image, and undoes itself. Anything else leaves it in doubt."""


class Section:
    """A critical section, as a context manager, entered with the lock held (M6)."""

    def __init__(self, medium: Medium) -> None:
        self._medium = medium

    def __enter__(self) -> None:
        self._medium.require_known()
        self._medium.in_doubt = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, EXPECTED):
            self._medium.in_doubt = False


class Medium:
    """A device with memory. Offsets and lengths are in bytes; the kernel's ``OSError`` passes through.

    ``lock`` is the image's one lock: whoever looks at its state, or changes it, holds it. No guest data is
    read or written with the lock held; metadata may be read, and space be allocated.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        # Once: to ask a protocol costs more than what is asked next.
        self._host = device if isinstance(device, HostSpace) else None
        self.has_fixed_size = has_fixed_size(device)
        """True if the device does not grow, and shows old bytes where nothing was written (space.py, S3)."""
        self.data_file: DataFile | None = None
        """The external data file, where the image has one and it is open."""
        self.poisoned = False
        self.in_doubt = False
        # Re-entrant only so that it can tell whether the calling thread has it: nobody takes it twice.
        self.lock = threading.RLock()
        self._syncing = threading.Lock()
        self.barriers_started = 0
        self.listeners: list[BarrierListener] = []

    def leave_in_doubt(self) -> None:
        """A critical section, or what one began, was left half-way: for good (M6). The lock is held."""
        self.in_doubt = True

    def require_known(self) -> None:
        """Raise PoisonedError if a critical section was left half-way (M6)."""
        if self.in_doubt:
            raise PoisonedError("an earlier call was cut off half-way: close the image and open it again")

    def require_healthy(self) -> None:
        """Raise PoisonedError after a failed barrier (M1)."""
        if self.poisoned:
            raise PoisonedError("an earlier barrier or journal write failed: reopen the image to recover it")

    def section(self) -> Section:
        """Return a critical section: the caller holds the lock, and undoes what `EXPECTED` cuts off."""
        return Section(self)

    def undo(self, action: Callable[[], None]) -> None:
        """Take something back, in a section of its own. In doubt there is nothing to take back."""
        with self.lock:
            if not self.in_doubt:
                with self.section():
                    action()

    def size(self) -> int:
        """Return the length of the device."""
        return self.device.size()

    def free_bytes(self) -> int | None:
        """Return how many bytes the host has left, None where nobody knows."""
        return None if self._host is None else self._host.free_bytes()

    def pread(self, length: int, offset: HostOffset) -> bytes:
        """Return ``length`` bytes; what lies past the end reads as zeros."""
        return self.device.pread(length, offset)

    def pread_into(self, buffer: memoryview, offset: HostOffset) -> None:
        """Fill ``buffer``; what lies past the end reads as zeros."""
        self.device.pread_into(buffer, offset)

    def pwrite(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        """Write all of ``buffer`` or raise."""
        self.require_healthy()
        self.device.pwrite(buffer, offset)

    def allocate(self, offset: HostOffset, length: int) -> None:
        """Reserve host space, growing the device where needed."""
        self.require_healthy()
        self.device.allocate(offset, length)

    def take_space(self, offset: HostOffset, length: int, preallocation: Preallocation) -> None:
        """Give a range of zeros that nobody uses yet its space on the host, as `device.filling` says."""
        self.require_healthy()
        if self.has_fixed_size:
            preallocation = "full"
        filling.take_space(self.device, offset, length, preallocation)

    def write_row(self, offset: HostOffset, parts: Iterable[ReadBuffer]) -> None:
        """Write parts one behind another."""
        self.require_healthy()
        filling.write_row(self.device, offset, parts)

    def grow(self, size_bytes: int) -> None:
        """Set the length to at least ``size_bytes``, which is the frontier (M2); the lock is held."""
        self.require_healthy()
        if self.device.size() < size_bytes:
            self.device.truncate(size_bytes)

    def shrink(self, size_bytes: int) -> None:
        """Set the length to at most ``size_bytes``, if it can be set; nothing is written behind that."""
        self.require_healthy()
        if not self.has_fixed_size and self.device.size() > size_bytes:
            self.device.truncate(size_bytes)

    def punch(self, offset: HostOffset, length: int) -> bool:
        """Give a range back to the host; False where it may read as anything."""
        self.require_healthy()
        return self.device.punch(offset, length)

    @property
    def can_forget(self) -> bool:
        """True if the device shows what is durable, and nothing that a failed barrier lost (M7)."""
        return isinstance(self.device, Caching)

    def forget_cached(self) -> None:
        """Have reads show what the disk has, if the device can (M7); a barrier has completed."""
        if isinstance(self.device, Caching):
            self.device.forget_cached()

    def barrier(self, name: str) -> None:
        """Make everything changed so far durable, then tell the listeners. The lock is free meanwhile.

        Raises:
            OSError: the barrier failed; the medium is read-only from here on (M1). After any other
                exception the barrier counts as not completed.
        """
        with self.lock:
            self.require_healthy()
            self.barriers_started += 1
            number = self.barriers_started
        # One at a time (M4): of two that overlap the kernel tells only one that pages were lost.
        with self._syncing:
            self.require_healthy()
            try:
                self._sync_data_file()
                self.device.barrier(name)
            except OSError:
                # Not by a call: nothing may come between the failure and this (M1).
                self.poisoned = True
                raise
        with self.lock, self.section():
            for listener in self.listeners:
                listener(number)

    def data_barrier(self) -> None:
        """Make the data file durable, and nothing else. The lock is free meanwhile.

        Raises:
            OSError: the barrier failed; the medium is read-only from here on (M1).
        """
        with self._syncing:
            self.require_healthy()
            try:
                self._sync_data_file()
            except OSError:
                self.poisoned = True
                raise

    def _sync_data_file(self) -> None:
        data_file = self.data_file
        if data_file is None or not data_file.is_changed:
            return
        data_file.is_changed = False
        try:
            # Durable now: all that was written to the data file. The image may name it from here on (X1).
            data_file.device.barrier("data.first")
        except BaseException:
            data_file.is_changed = True
            raise
