"""Damaged bitmaps are told from sound ones, and given up by nothing but a repair that is asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

import jqcow
from jqcow.errors import CorruptionError
from jqcow.ondisk.header import EXTENSION_BITMAPS
from jqcow.testing import SimulatedDevice
from tests.unit.engines import CLUSTER, flags_place, reopened, written_image


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with written_image(device) as image:
        image.bitmaps.add("fine", 512)
        yield image


def broken_images(device: SimulatedDevice) -> Iterator[tuple[bytes, int]]:
    """Yield images, and how many of their two bitmaps are left when the rest is given up."""
    content = device.content()
    entry = flags_place(content) - 12
    table: int = struct.unpack_from(">Q", content, entry)[0]
    for place, data, left in (
        (entry, bytes(8), 1), (entry + 18, b"\0\0", 0), (table, b"\xff" * 8, 1), (entry + 8, b"\0\0\0\7", 1),
        (content.index(struct.pack(">II", EXTENSION_BITMAPS, 24)) + 24, b"\1" * 8, 0),
        (entry, content[40:48], 1),
    ):  # fmt: skip
        damaged = bytearray(content)
        damaged[place : place + len(data)] = data
        yield bytes(damaged), left


def test_damaged_bitmaps_are_given_up_when_asked_for(device: SimulatedDevice, image: jqcow.Image) -> None:
    image.bitmaps.add("second", 512)
    image.pwrite(b"x", 0)
    image.close()
    for damaged, left in broken_images(device):
        with reopened(SimulatedDevice(damaged)) as image, pytest.raises(CorruptionError):
            image.discard(CLUSTER, 0)
        repaired = SimulatedDevice(damaged)
        with jqcow.open_device(repaired, "r+", repair="bitmaps") as image:
            assert image.repaired is not None and image.repaired.bitmaps == 2 - left
            assert len(image.bitmaps) == left
            assert image.check().errors == image.check().lost
            image.pwrite(b"new", 8192)
