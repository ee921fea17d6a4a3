"""Snapshots of version 2 that do not tell the size of their disk keep it when the disk gets another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import jqcow
from jqcow.image.amending import amend_image
from jqcow.ondisk.header import Header
from jqcow.ondisk.snapshots import read_entries
from jqcow.testing import SimulatedDevice
from tests.crash.snapshot_tables import DATA, SIZE, image_with_old_snapshots


def sizes(device: SimulatedDevice) -> list[int]:
    device.reopen()
    with jqcow.open_device(device) as image:
        return [found.disk_bytes for found in image.snapshots()]


CHANGES: dict[str, Callable[[jqcow.Image], object]] = {
    "smaller": lambda image: image.resize(SIZE // 2),
    "larger": lambda image: image.resize(2 * SIZE),
    "preallocated": lambda image: image.resize(2 * SIZE, "metadata"),
    "amended": lambda image: amend_image(image, {"compat": "1.1", "size": 2 * SIZE}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_size(change: Callable[[jqcow.Image], object]) -> None:
    device = image_with_old_snapshots()
    with jqcow.open_device(device, "r+") as image:
        change(image)
    assert sizes(device) == [SIZE, SIZE]
    device.reopen()
    with jqcow.open_device(device, "r+") as image:
        image.apply_snapshot("old")
        assert image.pread(image.size, 0) == DATA
        assert image.check().ok


def test_version_3_demands_sizes() -> None:
    device = image_with_old_snapshots()
    with jqcow.open_device(device, "r+") as image:
        amend_image(image, {"compat": "1.1"})
    header = Header.unpack(device.content())
    device.reopen()
    found = read_entries(device.pread, header.snapshots_offset, 2, header=header)
    assert header.version == 3 and all(entry.extra_bytes >= 16 for entry in found)


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_the_size_of_an_applied_snapshot(size: int) -> None:
    content = bytearray(image_with_old_snapshots().content())
    extra = content.index(b"2new", Header.unpack(content).snapshots_offset) - 24
    content[extra + 8 : extra + 16] = size.to_bytes(8, "big")
    device = SimulatedDevice(bytes(content))
    with jqcow.open_device(device, "r+") as image:
        image.apply_snapshot("new")
        assert image.size == size
    assert sizes(device) == [SIZE, size]


def test_a_snapshot_that_tells_its_size_costs_nothing() -> None:
    device = image_with_old_snapshots()
    with jqcow.open_device(device, "r+") as image:
        image.resize(2 * SIZE)
    place = Header.unpack(device.content()).snapshots_offset
    device.reopen()
    with jqcow.open_device(device, "r+") as image:
        image.resize(SIZE)
    assert Header.unpack(device.content()).snapshots_offset == place
