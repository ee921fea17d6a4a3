"""A raw file made longer or shorter."""

from __future__ import annotations

import os
from contextlib import closing

from jqcow.device.base import Device
from jqcow.device.file import FileDevice
from jqcow.device.filling import take_space
from jqcow.disks.making import NO_RAW_METADATA
from jqcow.ondisk import layout
from jqcow.ondisk.form import Preallocation


def raw_size(path: str | os.PathLike[str]) -> int:
    """Return the size of the disk in a raw file, in bytes; errors as `FileDevice.open`."""
    with closing(FileDevice.open(path, writable=False)) as device:
        return layout.round_up(device.size(), layout.SECTOR_BYTES)


def resize_raw(path: str | os.PathLike[str], size: int, preallocation: Preallocation = "off") -> None:
    """Set the length of a raw file, durably. What is added is zeros, what is cut off is lost.

    Args:
        path: the file.
        size: in bytes.
        preallocation: ``falloc`` or ``full``: what is added takes its space on the host.

    Raises:
        ValueError: a preallocation that a raw file cannot have.
        ImageInUse: another process uses the file.
        OSError: the host failed.
    """
    if preallocation == "metadata":
        raise ValueError(NO_RAW_METADATA)
    with closing(FileDevice.open(path, writable=True)) as device:
        set_length(device, size, preallocation)


def set_length(device: Device, size: int, preallocation: Preallocation = "off") -> None:
    """Set the length of a raw disk's device, durably; see `resize_raw`."""
    before = device.size()
    device.truncate(size)
    if size > before:
        take_space(device, before, size - before, preallocation)
    # Durable now: the new length, for who is told that it is there.
    device.barrier("resize.raw")
