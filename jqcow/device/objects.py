"""Objects of the caller's own as devices: what can be read, and sought in, like a file.

Such an object has one position, so its calls go one after the other. It has no locks: who opens an image on
it keeps others from writing to it. It is only read, unless its owner says what a barrier is: an engine that
orders its writes by nothing would lose images.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jqcow.device.base import ZEROS_AT_ONCE, Device, ReadBuffer, filled_bytes
from jqcow.errors import ReadOnlyError


@runtime_checkable
class SeekableFile(Protocol):
    """What an object must have to be read: a file of `io` or of fsspec, a `BytesIO`, an `ImageFile`."""

    def read(self, length: int, /) -> bytes | None:
        """Return up to ``length`` bytes from the position on, none at the end only."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move the position; return it."""
        ...


class ObjectDevice:
    """A :class:`jqcow.device.base.Device` on a `SeekableFile`.

    Whatever the object raises passes through. What is no OSError is taken for an interrupt: a writer that is
    cut off by it has to be opened again.
    """

    def __init__(self, file: Any, barrier: Callable[[], object] | None = None) -> None:
        """Use ``file``, which stays open.

        Args:
            file: a `SeekableFile`; to be written, it also needs ``write`` and ``truncate``.
            barrier: returns when all that was written is durable, and raises OSError where it is not. Without
                it the device is read-only, and the object must not change.

        Raises:
            TypeError: the object lacks a method.
        """
        wanted = ("read", "seek") if barrier is None else ("read", "seek", "write", "truncate")
        missing = [name for name in wanted if not callable(getattr(file, name, None))]
        if missing:
            raise TypeError(f"a {type(file).__name__} has no {' and no '.join(missing)}")
        self._file = file
        self._barrier = barrier
        self._lock = threading.Lock()
        self._size = int(file.seek(0, io.SEEK_END))

    @property
    def read_only(self) -> bool:
        """True without a barrier."""
        return self._barrier is None

    def size(self) -> int:
        """Return the length in bytes."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``; what lies past the end reads as zeros."""
        return filled_bytes(self, length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; what lies past the end reads as zeros."""
        inside = max(0, min(len(buffer), self._size - offset))
        done = 0
        with self._lock:
            if inside:
                self._file.seek(offset)
            while done < inside:
                part = self._file.read(inside - done)
                if not part:
                    # A file that became shorter, or cannot tell yet.
                    break
                buffer[done : done + len(part)] = part
                done += len(part)
        if done < inside:
            raise OSError(f"the object gave {done} of {inside} bytes at offset {offset}")
        buffer[inside:] = bytes(len(buffer) - inside)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole of ``buffer`` at ``offset``, growing the object where needed."""
        self._require_writable()
        with self._lock:
            # Not every object fills what it skips.
            self._grow(offset)
            self._write(memoryview(buffer).cast("B"), offset)

    def _write(self, data: memoryview, offset: int) -> None:
        self._file.seek(offset)
        end = offset + len(data)
        while data:
            count = self._file.write(data)
            if not count:
                raise OSError("the object wrote nothing")
            data = data[count:]
        self._size = max(self._size, end)

    def _grow(self, end: int) -> None:
        zeros = memoryview(bytes(min(ZEROS_AT_ONCE, max(0, end - self._size))))
        while self._size < end:
            self._write(zeros[: end - self._size], self._size)

    def barrier(self, name: str) -> None:
        """Call the owner's barrier; ``name`` names the call site."""
        self._require_writable()
        if self._barrier is not None:
            self._barrier()

    def truncate(self, size_bytes: int) -> None:
        """Set the length. Growth reads as zeros."""
        self._require_writable()
        with self._lock:
            if size_bytes < self._size:
                self._file.truncate(size_bytes)
                self._size = size_bytes
            self._grow(size_bytes)

    def allocate(self, offset: int, length: int) -> None:
        """Grow the object to the end of a range: its zeros are written."""
        self._require_writable()
        with self._lock:
            self._grow(offset + length)

    def punch(self, offset: int, length: int) -> bool:
        """Return False: nothing is given back."""
        return False

    def close(self) -> None:
        """The object stays open: it is its owner's."""

    def _require_writable(self) -> None:
        if self._barrier is None:
            raise ReadOnlyError(
                "the object has no barrier: ObjectDevice(file, barrier) says what makes it durable"
            )


def as_device(given: object) -> Device:
    """Return a device as it is, and a `SeekableFile` as one to be read.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(given, Device):
        return given
    if not isinstance(given, SeekableFile):
        raise TypeError(f"a {type(given).__name__} has not the methods of a device, nor read and seek")
    return ObjectDevice(given)
