"""Disks of zeros that are no file: the driver ``null-co`` of QEMU, to read from.

Such a disk is a file in memory without a name, of the disk's size, which takes no memory since it is a hole.
Nobody can write to it: what QEMU's driver throws away would fill the memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from jqcow.cli.common import CommandError
from jqcow.ondisk.naming import protocol_of

DRIVERS = ("null-co", "null-aio")
DEFAULT_BYTES = 1 << 30
"""As in QEMU."""
_OPTIONS = ("driver", "size", "read-zeroes", "latency-ns")


def is_null(name: str) -> bool:
    """Tell whether a name is that of a disk of zeros."""
    return protocol_of(name) in DRIVERS


def path_of_zeros(text: str, options: Mapping[str, object]) -> str:
    """Return the path of a new disk of zeros, which is there while this process is.

    Args:
        text: how it was named, for errors.
        options: those of the driver.

    Raises:
        CommandError: an option that the driver has not, or a size that is none.
    """
    others = sorted(options.keys() - set(_OPTIONS))
    if others:
        raise CommandError(f"Could not open '{text}': the option '{others[0]}' of null-co is not supported")
    size = str(options.get("size", DEFAULT_BYTES))
    if not size.isdecimal() or int(size) >> 63:
        raise CommandError(f"Could not open '{text}': Parameter 'size' expects a size")
    # Not at the head: most commands need no such disk.
    from jqcow.device.memory import zeros_in_memory

    return zeros_in_memory("null-co", int(size))
