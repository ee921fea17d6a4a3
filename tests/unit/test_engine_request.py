"""Requests of a guest: reads, writes, compressed writes, zeroing and resizing, and what failures leave."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

import jqcow
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

MIB = 1 << 20
CLUSTER = 4096
OLD = random.Random(1).randbytes(8 * CLUSTER)


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=1 << 17) as image:
        image.pwrite(OLD, 0)
        image.flush()
        yield image
        device.faults = None


def test_ranges_past_the_end_are_refused(image: jqcow.Image) -> None:
    for length, offset in ((1, MIB), (2, MIB - 1), (MIB + 1, 0)):
        with pytest.raises(ValueError):
            image.pread(length, offset)
        with pytest.raises(ValueError):
            image.pwrite(b"x" * length, offset)


def test_failed_read_holds_nothing_back(device: SimulatedDevice, image: jqcow.Image) -> None:
    device.faults = FaultPlan(Fault(errno.EIO, call="pread"))
    with pytest.raises(OSError):
        image.pread(CLUSTER, 0)
    guard = image._engine.guard
    assert guard.oldest() == guard.newest + 1


def test_write_in_place_takes_nothing(image: jqcow.Image) -> None:
    """W1."""
    frontier, before = image._engine.space.frontier, len(image._engine.public.changes.blocks)
    image.pwrite(b"new", 5)
    assert (image._engine.space.frontier, len(image._engine.public.changes.blocks)) == (frontier, before)
    assert image.pread(9, 0) == OLD[:5] + b"new" + OLD[8:9]


@pytest.mark.parametrize("packed", [False, True])
def test_failed_write_is_as_before(device: SimulatedDevice, image: jqcow.Image, packed: bool) -> None:
    """W4: what it took is unknown, and nothing is staged."""
    write = image.pwrite_compressed if packed else image.pwrite
    device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
    with pytest.raises(OSError):
        write(b"x" * CLUSTER, MIB // 2)
    device.faults = None
    assert image.pread(CLUSTER, MIB // 2) == bytes(CLUSTER)
    assert image._engine.public.changes.is_empty and image._engine.space.unknown.holds(1)
    write(b"x" * CLUSTER, MIB // 2)
    assert image.pread(CLUSTER, MIB // 2) == b"x" * CLUSTER and image.check().ok


def test_data_over_data_is_ordered(image: jqcow.Image) -> None:
    """W2: a compressed cluster is described only once it is durable; zeros need no order."""
    image.pwrite(b"x", MIB // 2)
    assert not image._engine.public.changes.ordered
    image.pwrite_compressed(b"x" * CLUSTER, 0)
    assert image._engine.public.changes.ordered
    assert image.pread(2 * CLUSTER, 0) == b"x" * CLUSTER + OLD[CLUSTER : 2 * CLUSTER]


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroing(image: jqcow.Image, unmap: bool) -> None:
    image.write_zeroes(2 * CLUSTER, CLUSTER // 2, unmap=unmap)
    half = CLUSTER // 2
    assert (
        image.pread(3 * CLUSTER, 0)
        == OLD[:half] + bytes(2 * CLUSTER) + OLD[-half - 5 * CLUSTER : -5 * CLUSTER]
    )
    assert image.check().ok


def test_resizing_back_and_forth_shows_zeros(image: jqcow.Image) -> None:
    image.resize(CLUSTER + 512)
    image.resize(MIB)
    assert image.pread(8 * CLUSTER, 0) == OLD[: CLUSTER + 512].ljust(8 * CLUSTER, b"\0")
    assert image.check().ok


def test_failed_resize_leaves_the_old_size(device: SimulatedDevice, image: jqcow.Image) -> None:
    device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
    with pytest.raises(OSError):
        image.resize(CLUSTER + 512)
    device.faults = None
    assert image.size == MIB and image.pread(len(OLD), 0) == OLD
