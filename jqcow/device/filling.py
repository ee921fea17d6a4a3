"""Space of the host for a range of a device, before anything is written there; and long rows of tables."""

from __future__ import annotations

from collections.abc import Iterable

from jqcow.device.base import Device, ReadBuffer, write_zeros
from jqcow.device.file import reserve
from jqcow.ondisk.form import Preallocation

_ROW_BYTES = 1 << 20


def take_space(device: Device, offset: int, length: int, preallocation: Preallocation) -> None:
    """Give a range, which nobody uses and which reads as zeros, its space on the host.

    Args:
        device: it grows to the end of the range, unless ``preallocation`` leaves the range alone.
        offset: of the range.
        length: of the range.
        preallocation: ``falloc`` reserves space, ``full`` writes zeros too; the others leave the range alone.
            Where the host cannot reserve space zeros are written.

    Raises:
        OSError: the host has not so much space; it may have given a part.
    """
    if preallocation in ("off", "metadata") or not length:
        return
    # First, also where zeros are written: a host without the space says so at once.
    is_reserved = reserve(device, offset, length)
    if preallocation == "full" or not is_reserved:
        write_zeros(device, offset, length)


def write_row(device: Device, offset: int, parts: Iterable[ReadBuffer]) -> int:
    """Write parts one behind another from ``offset`` on, many at once; return where they end."""
    row = bytearray()
    for part in parts:
        row += part
        if len(row) >= _ROW_BYTES:
            device.pwrite(row, offset)
            offset += len(row)
            row = bytearray()
    if row:
        device.pwrite(row, offset)
    return offset + len(row)
