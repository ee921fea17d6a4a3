"""Calls of the C library that Python does not have."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Any

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
RENAME_NOREPLACE = 1


def _load() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


_libc = _load()


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
