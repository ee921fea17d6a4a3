"""Files in memory, without a name."""

from __future__ import annotations

import fcntl
import os

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def zeros_in_memory(name: str, length: int) -> str:
    """Return the path of a new file that is one hole, so takes no memory, and that nobody can write to.

    Args:
        name: what the host shows of it.
        length: in bytes.

    The file is there while this process is. Raises the kernel's ``OSError``.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, length)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return f"/proc/self/fd/{descriptor}"
