"""What the engine asks of the place where bytes live.

A *barrier* is the only ordering tool: when it returns, every change made to the device before the
call is on stable storage. Between two barriers changes reach stable storage in any subset and order,
torn at 512-byte sectors; that holds for sizes and punched ranges too (docs/crash-consistency, fault model).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

ZEROS_AT_ONCE = 1 << 20

ReadBuffer = bytes | bytearray | memoryview


class Closable(Protocol):
    """What is closed when nobody needs it any more."""

    def close(self) -> None:
        """Close it."""
        ...


_Opened = TypeVar("_Opened", bound=Closable | None)


@contextmanager
def closed_on_error(opened: _Opened) -> Iterator[_Opened]:
    """Close what was opened, if anything was, unless what it is for succeeds."""
    try:
        yield opened
    except BaseException:
        if opened is not None:
            opened.close()
        raise


class Reader(Protocol):
    """What can be read like a file. All offsets and lengths are in bytes."""

    def size(self) -> int:
        """Return the current length in bytes."""
        ...

    def pread(self, length: int, offset: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``; what lies past the end reads as zeros."""
        ...


@runtime_checkable
class Device(Reader, Protocol):
    """A flat, growable array of bytes. All offsets and lengths are in bytes.

    Every method may raise the kernel's ``OSError``. After a failed write, punch, allocate or truncate
    any part of the request may have happened. After a failed barrier nothing is known about the
    changes since the last good one; the caller must not try the barrier again.
    """

    @property
    def read_only(self) -> bool:
        """True when every changing method raises."""
        ...

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; what lies past the end reads as zeros."""
        ...

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole of ``buffer`` at ``offset``, growing the device where needed, or raise."""
        ...

    def barrier(self, name: str) -> None:
        """Make everything changed before this call durable.

        ``name`` is a literal that names the one call site; docs/crash-consistency lists them all.
        """
        ...

    def truncate(self, size_bytes: int) -> None:
        """Set the length. Growth reads as zeros; shrinking discards what lay past the new end."""
        ...

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space for a range so that writing it cannot fail with ENOSPC.

        The device grows to the end of the range; bytes that were there keep their value. Where the
        file system cannot promise space this only grows the device.
        """
        ...

    def punch(self, offset: int, length: int) -> bool:
        """Give a range back to the host; it then reads as zeros. The size does not change.

        Returns False, having changed nothing, where the host cannot punch holes.
        """
        ...

    def close(self) -> None:
        """Release the device and its locks. Makes nothing durable."""
        ...


@runtime_checkable
class Caching(Protocol):
    """A device that may show what a failed barrier lost, and can stop doing so."""

    def forget_cached(self) -> None:
        """Have reads show what is durable, as far as a completed barrier covers all that is not lost."""
        ...


@runtime_checkable
class Sparse(Protocol):
    """A device that can tell where it has holes."""

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes of what may hold data, by offset. The rest reads as zeros."""
        ...


@runtime_checkable
class FixedSize(Protocol):
    """A device that may be one of fixed size, such as a block device.

    Such a device does not grow: its size is all that it can hold, and what asks for more raises ``ENOSPC``.
    It shows old bytes where nothing was written, or what was given back. So ``truncate`` changes nothing, and
    ``punch`` returns False also where the space was given back.
    """

    @property
    def has_fixed_size(self) -> bool:
        """True if the device is of fixed size."""
        ...


def has_fixed_size(device: object) -> bool:
    """Return True for a device of fixed size."""
    # Not by isinstance, which is slow: it is asked with every run of a write.
    return bool(getattr(device, "has_fixed_size", False))


class Zeroing(Protocol):
    """A device that may write zeros faster than from a buffer."""

    def zero_out(self, offset: int, length: int) -> bool:
        """Make a range of the device zeros; return False, having changed nothing, where it cannot."""
        ...


def write_zeros(device: Device, offset: int, length: int) -> None:
    """Write zeros over a range."""
    zero_out = getattr(device, "zero_out", None)
    if zero_out is not None and zero_out(offset, length):
        return
    zeros = memoryview(bytes(min(ZEROS_AT_ONCE, length)))
    for start in range(0, length, ZEROS_AT_ONCE):
        device.pwrite(zeros[: length - start], offset + start)


def hole_end(reader: Reader, offset: int, end: int) -> int:
    """Return how far a range is a hole, which reads as zeros; ``offset`` where the reader cannot tell."""
    # Not by isinstance, which looks for all that a protocol has: tables are asked about one by one.
    data_extents = getattr(reader, "data_extents", None)
    if data_extents is None:
        return offset
    start: int
    start, _ = next(iter(data_extents(offset, end - offset)), (end, 0))
    return start


def no_space(
    what: str, needed_bytes: int, free_bytes: int | None, device_bytes: int | None = None
) -> OSError:
    """Return the error of a host that has not enough space for something."""
    told = "" if free_bytes is None else f", {free_bytes} bytes are free"
    told += "" if device_bytes is None else f", the device has {device_bytes}"
    return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {what} needs {needed_bytes} bytes{told}")


@runtime_checkable
class HostSpace(Protocol):
    """A device that can tell how much space its host has left; no device has to."""

    def free_bytes(self) -> int | None:
        """Return how many bytes new data can take on the host, None where nobody knows."""
        ...


def filled_bytes(device: Device, length: int, offset: int) -> bytes:
    """Return ``length`` bytes from ``offset``, read by `Device.pread_into`."""
    buffer = bytearray(length)
    device.pread_into(memoryview(buffer), offset)
    return bytes(buffer)


def check_device(device: Device) -> None:
    """Raise TypeError for what is no device: before anything is done with it."""
    if not isinstance(device, Device):
        raise TypeError(f"a {type(device).__name__} has not the methods of a device")
