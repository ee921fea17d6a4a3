"""A disk as a raw binary file."""

from __future__ import annotations

import io
from typing import Any, Protocol

from jqcow.image.arguments import number, require_writable


class OpenImage(Protocol):
    """What the file asks of an open image."""

    @property
    def size(self) -> int: ...

    @property
    def mode(self) -> str: ...

    @property
    def closed(self) -> bool: ...

    def pread_into(self, buffer: memoryview, offset: int) -> None: ...

    def pwrite(self, buffer: Any, offset: int) -> int: ...

    def flush(self) -> None: ...


class ImageFile(io.RawIOBase):
    """A disk as a raw binary file with a position.

    It does what `io` says of such files; a disk has no descriptor and no other length, so ``fileno`` and
    ``truncate`` raise `io.UnsupportedOperation`. Closing leaves the image open, and flushes nothing: it may
    be closed by the garbage collector, at any time.
    """

    def __init__(self, image: OpenImage) -> None:
        """Start at offset 0."""
        super().__init__()
        self._image = image
        self._position = 0
        self._closing = False

    @property
    def mode(self) -> str:
        """``"rb"``, or ``"rb+"`` if the image was opened for writing."""
        return "rb+" if self._image.mode == "r+" else "rb"

    def readable(self) -> bool:
        """Always True."""
        self._require_open()
        return True

    def writable(self) -> bool:
        """True if the image was opened for writing."""
        self._require_open()
        return self._image.mode == "r+"

    def seekable(self) -> bool:
        """Always True."""
        self._require_open()
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; past the end is allowed, as in files."""
        offset, whence = number(offset), number(whence)
        self._require_open()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._image.size}
        if whence not in base or base[whence] + offset < 0:
            raise ValueError(f"cannot seek to {offset} from {whence}")
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        self._require_open()
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of the disk."""
        self._require_open()
        with memoryview(buffer) as whole, whole.cast("B") as view:
            require_writable(view)
            length = min(len(view), max(0, self._image.size - self._position))
            self._image.pread_into(view[:length], min(self._position, self._image.size))
        self._position += length
        return length

    def readall(self) -> bytes:
        """Read all up to the end of the disk, at once."""
        self._require_open()
        data = bytearray(max(0, self._image.size - self._position))
        self.readinto(data)
        return bytes(data)

    def write(self, buffer: Any) -> int:
        """Write at the position; what would lie past the end raises ValueError, as a disk does not grow."""
        self._require_open()
        if not self.writable():
            raise io.UnsupportedOperation("the image is open for reading only")
        written = self._image.pwrite(buffer, self._position)
        self._position += written
        return written

    def flush(self) -> None:
        """Flush the image, unless it is closed or open for reading only."""
        super().flush()
        if not self._closing and not self._image.closed and self.writable():
            self._image.flush()

    def close(self) -> None:
        """Close the file alone."""
        self._closing = True
        super().close()

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
