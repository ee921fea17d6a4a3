"""Devices of fixed size: what they refuse, what they show, and that what was measured is enough."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

import jqcow
from jqcow.device.base import Device, has_fixed_size, write_zeros
from jqcow.device.file import FileDevice
from jqcow.device.targets import NewContent
from jqcow.device.trial import TrialDevice
from jqcow.errors import UnsupportedFeatureError
from jqcow.offline.measure import measure_size
from jqcow.testing import SimulatedDevice
from jqcow.testing.device import noise
from jqcow.testing.faulty import FaultyDevice
from tests.support.users import JOURNAL_BYTES, create_simulated, open_simulated

SIZE = 1 << 20


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(noise(0, SIZE), has_fixed_size=True)


def test_who_has_a_fixed_size(device: SimulatedDevice, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError):
        FileDevice.open("/dev/null", writable=False)
    file = FileDevice.create_temporary(tmp_path / "file")
    assert not has_fixed_size(file) and not has_fixed_size(SimulatedDevice())
    file.close()
    wrapped: tuple[Device, ...] = (device, TrialDevice(device), FaultyDevice(device))
    assert all(map(has_fixed_size, wrapped))


def test_it_neither_grows_nor_shrinks(device: SimulatedDevice) -> None:
    device.truncate(100)
    assert device.size() == SIZE and device.pread(512, 512) == noise(512, 512)
    for act in (
        lambda: device.truncate(SIZE + 1),
        lambda: device.allocate(SIZE - 1, 2),
        lambda: device.pwrite(b"ab", SIZE - 1),
    ):
        with pytest.raises(OSError, match="space") as caught:
            act()
        assert caught.value.errno == errno.ENOSPC
    device.allocate(0, SIZE)
    assert device.size() == SIZE


def test_what_is_given_back_holds_anything(device: SimulatedDevice) -> None:
    write_zeros(device, 0, 8192)
    assert device.pread(8192, 0) == bytes(8192)
    device.barrier("zeros")
    assert device.punch(0, 4096) is False
    assert device.pread(4096, 0) == noise(0, 4096)
    assert device.pread(4096, 4096) == bytes(4096)


def test_trial_gives_nothing_back(device: SimulatedDevice) -> None:
    trial = TrialDevice(device)
    assert trial.punch(0, SIZE) is False
    trial.truncate(0)
    assert not list(trial.changed()) and trial.size() == SIZE


def test_new_content_gives_up_nothing_before_it_fits(device: SimulatedDevice) -> None:
    with pytest.raises(OSError, match=f"the device has {SIZE}"):
        NewContent(device).truncate(SIZE + 1)
    with pytest.raises(OSError, match=f"the device has {SIZE}"):
        create_simulated(device, 8 << 30, 512).close()
    assert device.content() == noise(0, SIZE)


def test_end_offset_rises_and_counts_the_journal(device: SimulatedDevice) -> None:
    with create_simulated(device, SIZE, 4096) as image:
        empty = image.end_offset
        image.pwrite(b"x", 0)
        live = image.end_offset
        assert live >= empty + JOURNAL_BYTES
        image.pwrite(b"x" * 40_960, 100_000)
        assert image.end_offset >= live + 40_960
    with open_simulated(device, "r") as image:
        assert empty < image.end_offset <= live + 3 * 4096 + 40_960


@pytest.mark.parametrize(("cluster_bytes", "disk_bytes"), [(512, 400 << 10), (4096, 2 << 20)])
def test_what_was_measured_is_enough(cluster_bytes: int, disk_bytes: int) -> None:
    """However it is written to, closed and killed, with discards in between."""
    chance = Random(cluster_bytes)
    measured = measure_size(disk_bytes, cluster_size=cluster_bytes, journal_size=JOURNAL_BYTES)
    device = SimulatedDevice(noise(0, measured.fully_allocated + measured.journal), has_fixed_size=True)
    image = create_simulated(device, disk_bytes, cluster_bytes)
    for step in range(120):
        offset = chance.randrange(disk_bytes)
        length = min(disk_bytes - offset, chance.choice((512, 3 * cluster_bytes, disk_bytes // 3)))
        what = chance.choice(("write",) * 12 + ("discard",) * 3 + ("flush", "checkpoint", "close", "kill"))
        if what == "write":
            image.pwrite(bytes([step + 1]) * length, offset)
        elif what == "discard":
            image.discard(length, offset)
        elif what in ("close", "kill"):
            if what == "close":
                image.close()
            device = device.killed()
            image = open_simulated(device)
        else:
            getattr(image, what)()
    image.pwrite(b"\1" * disk_bytes, 0)
    image.close()
    with open_simulated(device, "r") as image:
        assert image.pread(disk_bytes, 0) == b"\1" * disk_bytes and not image.check().findings


def test_measure_refuses_what_no_image_can_be() -> None:
    for options in ({"cluster_size": 1000}, {"journal_size": 1}, {"target_format": "vmdk"}):
        with pytest.raises((ValueError, jqcow.JqcowError)):
            measure_size(SIZE, **options)  # type: ignore[arg-type]
    assert measure_size(1000, target_format="raw").required == 1024
