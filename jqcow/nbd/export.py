"""An image as clients see it: what they may ask of it, and what their requests do.

O2. A request is answered after it is done, and one that asks for it (FUA, a flush) after it is durable:
    whatever was answered so survives a killed server.
"""

from __future__ import annotations

import errno

from jqcow.errors import ImageClosedError, JqcowError, PoisonedError, ReadOnlyError
from jqcow.image import Image
from jqcow.nbd.protocol import NAME_BYTES_MAX, CommandFlag, ExportFlag

BLOCK_BYTES_PREFERRED = 4096
CACHED_AT_ONCE = 1 << 20

_TOLD_AS = {
    errno.EPERM: errno.EPERM,
    errno.EACCES: errno.EPERM,
    errno.EROFS: errno.EPERM,
    errno.ENOMEM: errno.ENOMEM,
    errno.ENOSPC: errno.ENOSPC,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
}


class NotFast(Exception):
    """Zeroing a range would write zeros, and the client wants to do that itself then."""


def error_of(error: Exception, *, writes: bool) -> int:
    """Return the error that a client is told; ``writes``: a request that a full disk could have failed."""
    if isinstance(error, ImageClosedError):
        return errno.ESHUTDOWN
    if isinstance(error, NotFast):
        return errno.ENOTSUP
    if isinstance(error, ReadOnlyError):
        return errno.EIO if isinstance(error, PoisonedError) else errno.EPERM
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, ValueError) and not isinstance(error, JqcowError):
        # The range reaches past the end of the disk.
        return errno.ENOSPC if writes else errno.EINVAL
    if isinstance(error, OSError):
        return _TOLD_AS.get(error.errno or 0, errno.EIO)
    return errno.EIO


class Export:
    """An image under a name."""

    def __init__(
        self, image: Image, name: str = "", description: str = "", *, read_only: bool = False
    ) -> None:
        """Offer ``image``, which others of this process may use meanwhile.

        Raises:
            ValueError: no export can have such a name or description.
        """
        for text in (name, description):
            if len(text.encode()) > NAME_BYTES_MAX or "\0" in text:
                raise ValueError(
                    f"the name and description of an export have up to {NAME_BYTES_MAX} bytes, no NUL"
                )
        self.image = image
        self.name = name
        self.description = description
        self.read_only = read_only or image.mode == "r"
        info = image.info()
        self._cluster_bytes = info.cluster_size
        self._has_zero_flag = info.version > 2

    def flags(self, *, structured: bool) -> ExportFlag:
        """Return what a client may ask for.

        Several connections see one image: what one was answered every other sees, and a flush covers all.
        """
        can = ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH | ExportFlag.SEND_FUA | ExportFlag.SEND_CACHE
        can |= ExportFlag.CAN_MULTI_CONN
        if structured:
            can |= ExportFlag.SEND_DF
        if self.read_only:
            return can | ExportFlag.READ_ONLY
        return can | ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_FAST_ZERO

    def write_zeroes(self, length: int, offset: int, flags: int) -> None:
        """Make a range read as zeros.

        Raises:
            NotFast: zeros would have to be written, and FAST_ZERO forbids that.
            ValueError, JqcowError, OSError: as `Image.write_zeroes`.
        """
        if flags & CommandFlag.FAST_ZERO and not self._zeroes_fast(length, offset):
            raise NotFast
        self.image.write_zeroes(length, offset, unmap=not flags & CommandFlag.NO_HOLE)

    def _zeroes_fast(self, length: int, offset: int) -> bool:
        """Return True if tables tell of at least half of a range that it reads as zeros."""
        unit = self._cluster_bytes
        whole = (offset + length) // unit - -(-offset // unit)
        if self._has_zero_flag and 2 * whole * unit >= length:
            return True
        return self.image.reads_as_zeros(length, offset)

    def cache(self, length: int, offset: int) -> None:
        """Read a range for nobody: the host has it at hand then.

        Raises:
            ValueError, JqcowError, OSError: as `Image.pread`.
        """
        with memoryview(bytearray(min(length, CACHED_AT_ONCE))) as buffer:
            for position in range(offset, offset + length, CACHED_AT_ONCE):
                self.image.pread_into(buffer[: min(CACHED_AT_ONCE, offset + length - position)], position)
