"""The device as the engine sees it: what is not durable yet, and nothing more after a failed barrier.

M1. A barrier that failed or was interrupted is final: it is not tried again, and no change reaches the
    device after it.

``high_water`` is at least every size that the file may have after a crash: a range past it reads as zeros in
every crash state unless it is written later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jqcow.device.base import Device, ReadBuffer
from jqcow.errors import PoisonedError


class Medium:
    """A device with memory. Offsets and lengths are in bytes; the kernel's ``OSError`` passes through."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.poisoned = False
        self.high_water = device.size()
        self.on_barrier: list[Callable[[], None]] = []

    @property
    def read_only(self) -> bool:
        """True when the device cannot be changed, from the start or since a failed barrier."""
        return self.poisoned or self.device.read_only

    def require_healthy(self) -> None:
        """Raise PoisonedError after a failed barrier."""
        if self.poisoned:
            raise PoisonedError("an earlier barrier or journal write failed: reopen the image to recover it")

    def poison(self) -> None:
        """Turn read-only for good: what is on disk can no longer be told."""
        self.poisoned = True

    @contextmanager
    def all_or_poisoned(self) -> Iterator[None]:
        """What is done inside must not stay half done: whatever is raised in it turns the medium read-only.

        For the short stretches in which memory catches up with what has become durable. An exception can
        come at any point, as a keyboard interrupt does; what is then in memory must not reach the disk.
        """
        self.poisoned = True
        yield
        self.poisoned = False

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
        self.high_water = max(self.high_water, offset + len(buffer))
        self.device.pwrite(buffer, offset)

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space, growing the device where needed."""
        self.require_healthy()
        self.high_water = max(self.high_water, offset + length)
        self.device.allocate(offset, length)

    def grow(self, size_bytes: int) -> None:
        """Set the length to at least ``size_bytes``."""
        self.require_healthy()
        if self.device.size() < size_bytes:
            self.high_water = max(self.high_water, size_bytes)
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

    def barrier(self, name: str) -> None:
        """Make everything changed so far durable, then tell the listeners.

        Raises:
            OSError: the barrier failed; the medium is read-only from here on (M1), as it is after any
                other exception that comes in between.
        """
        self.require_healthy()
        with self.all_or_poisoned():
            self.device.barrier(name)
            self.high_water = self.device.size()
            for listener in self.on_barrier:
                listener()
