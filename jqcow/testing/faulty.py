"""Faults on a real device: a file that goes bad when you say so."""

from __future__ import annotations

import threading

from jqcow.device.base import Caching, Device, ReadBuffer, has_fixed_size
from jqcow.testing.faults import EVERYTHING, Fault, FaultPlan, no_space


class FaultyDevice:
    """A :class:`jqcow.device.base.Device` around another one, whose calls a :class:`FaultPlan` breaks.

    ``inner`` does the work; a `jqcow.device.file.FileDevice` makes it a real file. What a fault does not
    break reaches it unchanged. ``faults`` is the plan in force, or None; ``drop_barriers`` names barriers
    that report success and do nothing. Both may be changed at any time.

    Host space is counted by the length of the file: on a full disk whatever reaches past its end raises
    ``ENOSPC``. What a failed barrier loses stays readable and may yet reach the disk; to see what a power cut
    would leave, use a :class:`jqcow.testing.SimulatedDevice`.
    """

    def __init__(self, inner: Device, faults: FaultPlan | None = None, *, sector_bytes: int = 512) -> None:
        self.inner = inner
        self.faults = faults
        self.sector_bytes = sector_bytes
        self.drop_barriers: set[str] = set()
        self._counting = threading.Lock()

    @property
    def read_only(self) -> bool:
        """True when every changing method raises."""
        return self.inner.read_only

    @property
    def has_fixed_size(self) -> bool:
        """True if the device inside has it."""
        return has_fixed_size(self.inner)

    def size(self) -> int:
        """Return the current length of the device in bytes."""
        return self.inner.size()

    def pread(self, length: int, offset: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``; what lies past the end reads as zeros."""
        self._begin("pread", strikes=True)
        return self.inner.pread(length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; what lies past the end reads as zeros."""
        self._begin("pread", strikes=True)
        self.inner.pread_into(buffer, offset)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write ``buffer`` at ``offset``, or what faults leave of it."""
        data = memoryview(buffer).cast("B")
        fault = self._begin("pwrite")
        for part in self._applied_parts(fault, offset, len(data)):
            end = min(part.stop, max(part.start, self._room_end()))
            if end > part.start:
                self.inner.pwrite(data[part.start - offset : end - offset], part.start)
            if end < part.stop:
                _strike(fault)
                raise no_space()
        _strike(fault)

    def truncate(self, size_bytes: int) -> None:
        """Set the length. Growing takes no space."""
        fault = self._begin("truncate")
        if fault is None or fault.applied_bytes:
            self.inner.truncate(size_bytes)
        _strike(fault)

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space for a range, or raise."""
        fault = self._begin("allocate")
        for part in self._applied_parts(fault, offset, length):
            if part.stop > self._room_end():
                raise no_space()
            self.inner.allocate(part.start, len(part))
        _strike(fault)

    def punch(self, offset: int, length: int) -> bool:
        """Give a range back to the host. Returns False where the host cannot punch holes."""
        fault = self._begin("punch")
        punched = True
        for part in self._applied_parts(fault, offset, length):
            punched = self.inner.punch(part.start, len(part))
        _strike(fault)
        return punched

    def barrier(self, name: str) -> None:
        """Make everything changed before this call durable, unless a fault or ``drop_barriers`` forbids."""
        fault = self._begin("barrier", name)
        dropped = name in self.drop_barriers or (fault is not None and fault.applied_bytes != EVERYTHING)
        if not dropped:
            self.inner.barrier(name)
        _strike(fault)

    def forget_cached(self) -> None:
        """Have the device inside forget what it cached, if it can."""
        if isinstance(self.inner, Caching):
            self.inner.forget_cached()

    def close(self) -> None:
        """Close the device inside."""
        self.inner.close()

    def _begin(self, call: str, name: str | None = None, *, strikes: bool = False) -> Fault | None:
        """Count a call, and let it wait if it is delayed. ``strikes``: raise now what the fault raises."""
        with self._counting:
            fault = self.faults.count(call, name) if self.faults is not None else None
        if fault is not None and fault.wait is not None:
            fault.wait()
        if strikes:
            _strike(fault)
        return fault

    def _room_end(self) -> int:
        """Return the offset up to which the disk has space."""
        size_bytes = self.inner.size()
        return size_bytes + (self.faults.free_bytes(size_bytes) if self.faults is not None else EVERYTHING)

    def _applied_parts(self, fault: Fault | None, offset: int, length: int) -> list[range]:
        if fault is None:
            return [range(offset, offset + length)] if length else []
        return fault.applied_parts(offset, length, self.sector_bytes)


def _strike(fault: Fault | None) -> None:
    if fault is not None:
        fault.strike()
