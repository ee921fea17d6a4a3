"""Calls of the C library that Python does not have."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import Any

if sys.platform != "win32":
    import fcntl

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10
RENAME_NOREPLACE = 1
_FS_IOC_GETFLAGS = 0x80086601 if ctypes.sizeof(ctypes.c_long) == 8 else 0x80046601
_FS_IOC_SETFLAGS = 0x40086602 if ctypes.sizeof(ctypes.c_long) == 8 else 0x40046602
_FS_NOCOW_FL = 0x00800000
_FLAGS = struct.Struct("=i")
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX_BYTES = 256
_STATX_BTIME_PLACE = 80
_TIMESTAMP = struct.Struct("=qI")


def _load() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


_libc = _load()
_FLAG_MISSING = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def call(name: str, *arguments: Any) -> None:
    """Call a libc function that returns 0 or sets errno; a missing one is ENOSYS.

    The 64-bit variant is preferred: on 32-bit hosts the plain one takes 32-bit offsets.
    """
    function = getattr(_libc, f"{name}64", None) or getattr(_libc, name, None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def write_in_place(descriptor: int) -> None:
    """Have the file system write an empty file in place (FS_NOCOW_FL), where it knows of anything else."""
    try:
        (flags,) = _FLAGS.unpack(fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(_FLAGS.size)))
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, _FLAGS.pack(flags | _FS_NOCOW_FL))
    except OSError as error:
        # As in QEMU: where the file system has no such flag the file does as well without it.
        if error.errno not in _FLAG_MISSING:
            raise


def born_nanoseconds(descriptor: int) -> int:
    """Return when a file was made, in nanoseconds since 1970; 0 where nobody knows."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        call("statx", descriptor, b"", _AT_EMPTY_PATH, _STATX_BTIME, found)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            return 0
        raise
    is_known = int.from_bytes(found.raw[:4], sys.byteorder) & _STATX_BTIME
    seconds, nanoseconds = _TIMESTAMP.unpack_from(found.raw, _STATX_BTIME_PLACE)
    return int(seconds * 1_000_000_000 + nanoseconds) if is_known else 0
