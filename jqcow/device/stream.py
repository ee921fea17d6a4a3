"""Pipes: bytes that come, or go, once and in order; and the copy of what came, which can be read anywhere.

Such a copy is a file without a name. It goes with the process that made it, however that ends.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from jqcow import _native
from jqcow.device import locks
from jqcow.device.base import ReadBuffer
from jqcow.device.file import FileDevice
from jqcow.device.names import NewFile

CHUNK_BYTES = 1 << 20
HOLE_BYTES = 4096
STANDARD_INPUT = "standard input"


class Spool(FileDevice):
    """A file without a name, in a directory for temporary files. Its path is what errors call it."""

    @classmethod
    def create(cls, directory: str | os.PathLike[str], name: str) -> Spool:
        """Create an empty one.

        Args:
            directory: where it takes its space.
            name: what it is called.

        Raises:
            OSError: the host failed.
        """
        new = NewFile.create(os.path.join(os.path.realpath(directory), "jqcow-spool"))
        try:
            # Where the file system knows no files without a name it has one up to here.
            new.remove()
            locks.lock_for_writing(new.descriptor, name)
        except BaseException:
            os.close(new.descriptor)
            raise
        return cls(new.descriptor, name, writable=True)


def spool_of(descriptor: int, directory: str | os.PathLike[str]) -> Spool:
    """Copy what a descriptor gives, to its end, into a spool; zeros become holes.

    Args:
        descriptor: of a pipe, a socket or a file; it stays open.
        directory: where the copy takes its space.

    Raises:
        OSError: reading or writing failed; the latter says where the copy lies.
    """
    spool = Spool.create(directory, STANDARD_INPUT)
    try:
        end = 0
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while count := _filled(descriptor, buffer):
            with _saying_where(directory):
                _write_sparse(spool, buffer[:count], end)
            end += count
        with _saying_where(directory):
            spool.truncate(end)
    except BaseException:
        spool.close()
        raise
    return spool


def _filled(descriptor: int, buffer: memoryview) -> int:
    """Fill a buffer, or what of it there is left to read; return how much."""
    count = 0
    while count < len(buffer):
        got = os.readv(descriptor, [buffer[count:]])
        if not got:
            break
        count += got
    return count


def _write_sparse(spool: Spool, data: memoryview, offset: int) -> None:
    start = 0
    for first in range(0, len(data), HOLE_BYTES):
        if _native.is_zero(data[first : first + HOLE_BYTES]):
            if start < first:
                spool.pwrite(data[start:first], offset + start)
            start = first + HOLE_BYTES
    if start < len(data):
        spool.pwrite(data[start:], offset + start)


@contextmanager
def _saying_where(directory: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.add_note(f"its copy lies in {os.fspath(directory)}; TMPDIR names another directory")
        raise


class OutputStream:
    """A descriptor that takes bytes in order. Nothing is synced: who reads it says what is durable.

    Attributes:
        written_bytes: how many it took so far.
        spool_directory: for what cannot be written in order.
    """

    def __init__(self, descriptor: int, spool_directory: str | os.PathLike[str]) -> None:
        """Write to ``descriptor``, which stays open.

        Raises:
            OSError: it is a terminal, which an image would only confuse.
        """
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and os.isatty(descriptor):
            raise OSError(errno.EINVAL, "an image is not written to a terminal")
        self._descriptor = descriptor
        self.written_bytes = 0
        self.spool_directory = spool_directory

    def write(self, data: ReadBuffer) -> None:
        """Write all of ``data``.

        Raises:
            BrokenPipeError: nobody reads any more.
            OSError: the host failed.
        """
        rest = memoryview(data).cast("B")
        while rest:
            count = os.write(self._descriptor, rest)
            rest = rest[count:]
            self.written_bytes += count

    def write_zeros(self, length: int) -> None:
        """Write zeros."""
        zeros = memoryview(bytes(min(length, CHUNK_BYTES)))
        for start in range(0, length, CHUNK_BYTES):
            self.write(zeros[: length - start])

    def finish(self) -> None:
        """Nothing is left to be done: who reads has it all."""

    def close(self) -> None:
        """The descriptor stays open: it is its owner's."""

    def new_spool(self) -> Spool:
        """Return an empty spool for what is to be written."""
        with _saying_where(self.spool_directory):
            return Spool.create(self.spool_directory, "the image")

    def write_spool(self, spool: Spool) -> None:
        """Write all that a spool holds."""
        end = 0
        for offset, length in spool.data_extents(0, spool.size()):
            self.write_zeros(offset - end)
            for start in range(offset, offset + length, CHUNK_BYTES):
                self.write(spool.pread(min(CHUNK_BYTES, offset + length - start), start))
            end = offset + length
        self.write_zeros(spool.size() - end)
