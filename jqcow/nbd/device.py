"""An export of another server as a file: to be read anywhere, or to be written in order."""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property

from jqcow.device.base import ReadBuffer, filled_bytes, no_space
from jqcow.device.file import FileDevice
from jqcow.device.stream import OutputStream
from jqcow.nbd.client import Connection, Export
from jqcow.nbd.protocol import STATE_ZERO, Command, ExportFlag

STEP_BYTES = 1 << 20
"""Length of one request that carries data."""
ZEROES_BYTES = 1 << 30
"""Length of one that makes zeros."""


class ExportDevice(FileDevice):
    """A read-only device on an export. There are no locks: who serves it keeps its writers apart."""

    is_on_host = False
    _connection: Connection | None = None

    def __init__(self, export: Export, name: str) -> None:
        """Connect; ``name`` is what errors call it.

        Raises:
            OSError: nobody answers, there is no such export, or the server breaks the protocol.
        """
        super().__init__(-1, name, writable=False)
        self._export = export
        self._lock = threading.Lock()
        self._connection = Connection(export)
        try:
            self._bytes, _, self._context_id = self._connection.enter()
        except BaseException:
            self.close()
            raise

    def size(self) -> int:
        """Return the size of the export in bytes."""
        return self._bytes

    def pread(self, length: int, offset: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``; what lies past the end reads as zeros."""
        return filled_bytes(self, length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; what lies past the end reads as zeros."""
        buffer = buffer.cast("B")
        inside = max(0, min(len(buffer), self._bytes - offset))
        buffer[inside:] = bytes(len(buffer) - inside)
        with self._lock:
            connection = self._open_connection()
            for start in range(0, inside, STEP_BYTES):
                part = buffer[start : min(start + STEP_BYTES, inside)]
                connection.request(Command.READ, offset + start, len(part), into=part)

    @cached_property
    def _data(self) -> list[tuple[int, int]]:
        """Start and end of what may hold data: all of it, where the server does not tell."""
        if self._context_id is None:
            return [(0, self._bytes)]
        with self._lock:
            told = self._open_connection().status(self._bytes, self._context_id)
            found = [one for one in told if not one.flags & STATE_ZERO]
        return [(one.offset, one.offset + one.length) for one in found]

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of the parts of a range that may hold data, in order."""
        end = offset + length
        for start, stop in self._data[max(0, bisect_right(self._data, (offset, end)) - 1) :]:
            if start >= end:
                return
            if stop > offset:
                yield max(start, offset), min(stop, end) - max(start, offset)

    def _open_connection(self) -> Connection:
        if self._connection is None:
            raise OSError(errno.EBADF, "the export is closed")
        return self._connection

    def free_bytes(self) -> None:
        """Nobody knows."""

    def identity(self) -> tuple[int, int]:
        """Return what tells it from files."""
        return -1, hash(self._export)

    def close(self) -> None:
        """Leave the server. Closing again does nothing."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.leave()
            connection.close()


class ExportStream(OutputStream):
    """An export that is written from its start on, in order."""

    def __init__(self, export: Export, spool_directory: str | os.PathLike[str]) -> None:
        """Connect; ``spool_directory`` is for what cannot be written in order.

        Raises:
            OSError: as `ExportDevice`, or the export is read-only.
        """
        self._connection = Connection(export)
        self.written_bytes = 0
        self.spool_directory = spool_directory
        try:
            self._bytes, self._flags, _ = self._connection.enter()
            if self._flags & ExportFlag.READ_ONLY:
                raise OSError(errno.EROFS, f"the export {export.name!r} is read-only")
        except BaseException:
            self._connection.close()
            raise

    def write(self, data: ReadBuffer) -> None:
        """Write all of ``data``, or raise ``ENOSPC`` where the export is smaller."""
        rest = memoryview(data).cast("B")
        self._require_room(len(rest))
        for start in range(0, len(rest), STEP_BYTES):
            part = rest[start : start + STEP_BYTES]
            self._connection.request(Command.WRITE, self.written_bytes, len(part), part)
            self.written_bytes += len(part)

    def write_zeros(self, length: int) -> None:
        """Make the next bytes zeros."""
        if not self._flags & ExportFlag.SEND_WRITE_ZEROES:
            super().write_zeros(length)
            return
        self._require_room(length)
        end = self.written_bytes + length
        while self.written_bytes < end:
            count = min(ZEROES_BYTES, end - self.written_bytes)
            self._connection.request(Command.WRITE_ZEROES, self.written_bytes, count)
            self.written_bytes += count

    def finish(self) -> None:
        """Have the server make durable what was written, where it can."""
        if self._flags & ExportFlag.SEND_FLUSH:
            self._connection.request(Command.FLUSH, 0, 0)

    def close(self) -> None:
        """Leave the server."""
        self._connection.leave()
        self._connection.close()

    def _require_room(self, length: int) -> None:
        if self.written_bytes + length > self._bytes:
            raise no_space("the image", self.written_bytes + length, None, self._bytes)
