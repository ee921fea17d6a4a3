"""Stories of snapshot tables: one that does not tell sizes, as version 2 allows, and one that is read."""

from __future__ import annotations

import struct

from jqcow.ondisk import snapshots
from jqcow.ondisk.header import Header
from jqcow.testing import SimulatedDevice
from tests.crash.judge import require
from tests.support.users import create_simulated, open_simulated

CLUSTER_BYTES = 4096
SIZE = 64 * CLUSTER_BYTES
DATA = b"\x33" * SIZE


def image_with_old_snapshots() -> SimulatedDevice:
    """Return a closed image of version 2 with a snapshot that has no extra data, and one that has."""
    device = SimulatedDevice()
    with create_simulated(device, SIZE, CLUSTER_BYTES, compat="0.10") as image:
        image.pwrite(DATA, 0)
        image.create_snapshot("old")
        image.create_snapshot("new")
    device.reopen()
    content = bytearray(device.content())
    header = Header.unpack(content)
    old, new = snapshots.read_entries(device.pread, header.snapshots_offset, 2, header=header)
    entry = content[old.offset : old.offset + old.length]
    struct.pack_into(">I", entry, snapshots.FIXED_BYTES - 4, 0)
    del entry[snapshots.FIXED_BYTES : snapshots.FIXED_BYTES + old.extra_bytes]
    table = entry + content[new.offset : new.offset + new.length]
    content[old.offset : old.offset + len(table)] = table
    return SimulatedDevice(bytes(content))


def size_of_an_old_snapshot() -> None:
    """P1: a disk of another size does not change what a snapshot holds."""
    device = image_with_old_snapshots()
    with open_simulated(device) as image:
        image.resize(SIZE // 2)
    device.reopen()
    with open_simulated(device) as image:
        sizes = [found.disk_bytes for found in image.snapshots()]
        require(sizes == [SIZE, SIZE], "P1: a snapshot has another size")
        image.apply_snapshot("old")
        require(image.pread(image.size, 0) == DATA, "P1: a snapshot lost data")


def growth_behind_a_snapshot_table() -> None:
    """P2: the snapshot table is read in long parts, which reach to where a growth puts its tables."""
    device = SimulatedDevice()
    with create_simulated(device, SIZE, 512) as image:
        image.create_snapshot("kept")
        image.snapshots()
        image.resize(2 * SIZE, "metadata")
        image.pwrite(DATA[:512], SIZE)
        require(image.check().ok, "P2: what was preallocated is not mapped")
