"""A story of raw files that are written over, or get another length: a power cut takes nothing back."""

from __future__ import annotations

from jqcow.disks.raw import RawDisk
from jqcow.offline.copy_into import copy_disk, raw_target
from jqcow.offline.resize_raw import set_length
from jqcow.testing import SimulatedDevice
from tests.crash.judge import require

OLD = b"\x11" * 65536
NEW = b"\x22" * 16384 + bytes(16384) + b"\x33" * 4096


def written_into(drop_barriers: tuple[str, ...] = ()) -> None:
    """P1: what was copied into a raw file, or its new length, is there when that was told."""
    copied = SimulatedDevice(OLD)
    copied.drop_barriers.update(drop_barriers)
    with raw_target(copied) as target:
        copy_disk(RawDisk(SimulatedDevice(NEW)), target)
    require(copied.durable_content() == NEW + OLD[len(NEW) :], "P1: a copy", drop_barriers)
    for size in (4096, 1 << 20):
        device = SimulatedDevice(OLD)
        device.drop_barriers.update(drop_barriers)
        set_length(device, size)
        require(device.durable_content() == OLD[:size].ljust(size, b"\0"), "P1: a length", drop_barriers)
