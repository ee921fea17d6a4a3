"""A disk of the caller's own below an image on a device of the caller's own."""

from __future__ import annotations

import pytest

import jqcow
from jqcow.testing import SimulatedDevice
from tests.unit.engines import MIB, Below, overlay


def test_read_and_written_over() -> None:
    below = Below(b"\7" * 100_352)
    device = overlay()
    with jqcow.open_device(device, "r+", backing=below) as image:
        assert image.pread(MIB, 0) == below.content + bytes(MIB - below.size)
        image.pwrite(b"\1" * 10, 5000)
        image.discard(4096, 8192)
        image.write_zeroes(100, 98_304)
        assert [(extent.kind, extent.depth) for extent in image.extents(8192)] == [("data", 1), ("data", 0)]
        assert image.check().ok
    assert below.closed == 1
    device.reopen()
    expected = bytearray(below.content + bytes(MIB - below.size))
    expected[5000:5010] = b"\1" * 10
    expected[8192:12_288] = bytes(4096)
    expected[98_304:98_404] = bytes(100)
    with jqcow.open_device(device, backing=lambda named: below) as image:
        assert image.pread(MIB, 0) == bytes(expected)


def test_a_function_chooses_by_name() -> None:
    asked = []

    def choose(named: jqcow.NamedFile) -> Below:
        asked.append(named.name)
        return Below(b"\5" * 512)

    with jqcow.open_device(overlay("five"), backing=choose) as image:
        assert image.pread(2, 511) == b"\5\0"
    assert asked == ["five"]
    plain = SimulatedDevice()
    jqcow.create_on_device(plain, MIB).close()
    plain.reopen()
    jqcow.open_device(plain, backing=choose).close()
    assert asked == ["five"]


def test_refusals() -> None:
    with pytest.raises(jqcow.FileAccessDenied):
        jqcow.open_device(overlay())
    plain = SimulatedDevice()
    jqcow.create_on_device(plain, MIB).close()
    plain.reopen()
    with pytest.raises(ValueError, match="no backing file"):
        jqcow.open_device(plain, backing=Below(b""))
