"""The device as the engine sees it: what is not durable yet, and nothing more after a failed barrier.

M1. A barrier that failed is final: it is not tried again, and no change reaches the device after it.
M2. ``high_water`` is at least every size that the file may have after a crash: a range past it reads as
    zeros in every crash state unless it is written later.
M3. What was changed while a barrier ran is not covered by it. Barriers are numbered as they start, and one
    may start while another runs: what was changed when ``barriers_started`` was n is covered by each above n.
M4. The device gets one barrier at a time, and none after one that failed.
M5. The file ends where a sector does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from jqcow.device.base import Device, ReadBuffer
from jqcow.errors import PoisonedError
from jqcow.ondisk.layout import SECTOR_BYTES

BarrierListener = Callable[[int], None]
"""Told, with the lock held, the number of a barrier that has completed (M3)."""


class Medium:
    """A device with memory. Offsets and lengths are in bytes; the kernel's ``OSError`` passes through.

    ``lock`` is the image's one lock: whoever looks at its state, or changes it, holds it.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.poisoned = False
        # Re-entrant only so that it can tell whether the calling thread has it: nobody takes it twice.
        self.lock = threading.RLock()
        self._syncing = threading.Lock()
        self.high_water = device.size()
        self._high_since_start = self.high_water
        self.barriers_started = 0
        self.listeners: list[BarrierListener] = []

    @property
    def read_only(self) -> bool:
        """True when the device cannot be changed, from the start or since a failed barrier."""
        return self.poisoned or self.device.read_only

    def require_healthy(self) -> None:
        """Raise PoisonedError after a failed barrier."""
        if self.poisoned:
            raise PoisonedError("an earlier barrier or journal write failed: reopen the image to recover it")

    def _raise_high_water(self, end: int) -> None:
        self.high_water = max(self.high_water, end)
        self._high_since_start = max(self._high_since_start, end)

    def size(self) -> int:
        """Return the length of the device."""
        return self.device.size()

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes; what lies past the end reads as zeros."""
        return self.device.pread(length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what lies past the end reads as zeros."""
        self.device.pread_into(buffer, offset)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write all of ``buffer`` or raise."""
        self.require_healthy()
        padding = -(offset + len(buffer)) % SECTOR_BYTES
        if padding and offset + len(buffer) > self.device.size():
            # M5: a later write of the rest of the file's last sector could land without the growth that it
            # brings: a part of it would be cut off, and the sector torn.
            buffer = bytes(buffer) + bytes(padding)
        self._raise_high_water(offset + len(buffer))
        self.device.pwrite(buffer, offset)

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space, growing the device where needed."""
        self.require_healthy()
        self._raise_high_water(offset + length)
        self.device.allocate(offset, length)

    def grow(self, size_bytes: int) -> None:
        """Set the length to at least ``size_bytes``."""
        self.require_healthy()
        if self.device.size() < size_bytes:
            self._raise_high_water(size_bytes)
            self.device.truncate(size_bytes)

    def shrink(self, size_bytes: int) -> None:
        """Set the length to at most ``size_bytes``."""
        self.require_healthy()
        if self.device.size() > size_bytes:
            self.device.truncate(size_bytes)

    def punch(self, offset: int, length: int) -> bool:
        """Give a range back to the host; False where the host cannot."""
        self.require_healthy()
        return self.device.punch(offset, length)

    def barrier(self, name: str, *, unlocked: bool = False) -> None:
        """Make everything changed so far durable, then tell the listeners.

        The caller holds the lock; with ``unlocked`` it does not, and others may have it meanwhile.

        Raises:
            OSError: the barrier failed; the medium is read-only from here on (M1). After any other
                exception the barrier counts as not completed.
        """
        if not unlocked:
            number = self._start_barrier()
            self._sync(name)
            self._complete_barrier(number)
            return
        with self.lock:
            number = self._start_barrier()
        self._sync(name)
        with self.lock:
            self._complete_barrier(number)

    def _start_barrier(self) -> int:
        self.require_healthy()
        self._high_since_start = self.device.size()
        self.barriers_started += 1
        return self.barriers_started

    def _sync(self, name: str) -> None:
        # One at a time (M4): of two that overlap the kernel tells only one that pages were lost.
        with self._syncing:
            self.require_healthy()
            try:
                self.device.barrier(name)
            except OSError:
                # Not by a call: nothing may come between the failure and this (M1).
                self.poisoned = True
                raise

    def _complete_barrier(self, number: int) -> None:
        # A barrier that started since has begun to count the high water anew: the bound stays (M2).
        if number == self.barriers_started:
            self.high_water = self._high_since_start
        for listener in self.listeners:
            listener(number)
