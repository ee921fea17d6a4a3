"""Walks over whole disks: no L2 table is met twice, and none is in no file."""

from __future__ import annotations

import pytest

import jqcow
from jqcow.ondisk.header import Header
from tests.unit.engines import MIB, SECTOR, SimulatedDevice, reopened

REACH = SECTOR // 8 * SECTOR
"""What one L2 table maps, with clusters of 512 bytes."""


@pytest.fixture
def device() -> SimulatedDevice:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, MIB, cluster_size=SECTOR) as image:
        image.pwrite(b"a" * SECTOR, 0)
        image.pwrite(b"b" * SECTOR, 4 * REACH)
    device.reopen()
    return device


def l1_entries(device: SimulatedDevice) -> int:
    """Return where the L1 table is."""
    return Header.unpack(device.pread(SECTOR, 0)).l1_table_offset


def kinds(image: jqcow.Image) -> list[str]:
    return [extent.kind for extent in image.extents()]


def test_one_l2_table_for_two_guest_ranges(device: SimulatedDevice) -> None:
    place = l1_entries(device)
    device.pwrite(device.pread(8, place), place + 8 * 7)
    with jqcow.open_device(device, "r") as image:
        for look in (lambda: kinds(image), lambda: image.reads_as_zeros(MIB - SECTOR, SECTOR)):
            with pytest.raises(jqcow.CorruptionError, match="two guest ranges: 0x0 to 0x8000 and 0x38"):
                look()
        assert image.pread(1, 7 * REACH) == b"a", "a read does not look for it"


def test_l2_table_in_no_file(device: SimulatedDevice) -> None:
    device.pwrite((1 << 63 | 1 << 40).to_bytes(8, "big"), l1_entries(device) + 8 * 7)
    with (
        jqcow.open_device(device, "r") as image,
        pytest.raises(jqcow.CorruptionError, match="past the end of the file"),
    ):
        kinds(image)


def test_l2_table_in_the_journal_alone(device: SimulatedDevice) -> None:
    """A crash may take the length of the file away; the journal has the table."""
    image = jqcow.open_device(device, "r+", journal_size=64 << 10)
    image.pwrite(b"c" * SECTOR, 9 * REACH)
    found = kinds(image)
    image.flush()
    assert found == kinds(image) == ["data", "unallocated"] * 3
    image.close()


def test_a_table_that_moves_meanwhile_is_no_damage(device: SimulatedDevice) -> None:
    """What was an L2 table is freed, and becomes one of another range, while a walk is under way."""
    with reopened(device) as image:
        walk = image.extents()
        assert next(walk).kind == "data"
        image.discard(REACH, 0)
        for _ in range(3):
            image.checkpoint()
        for number in range(8, 30):
            image.pwrite(b"d" * SECTOR, number * REACH)
        image.flush()
        assert "data" in {extent.kind for extent in walk}
