"""Copies that reading makes from the backing file: what gets one, and what does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import jqcow
from jqcow.ondisk.l2 import DATA, UNALLOCATED, ZERO_CLUSTER
from jqcow.testing import SimulatedDevice
from tests.unit.engines import CLUSTER, MIB, SECTOR, Below, overlay

BELOW = b"\7" * (2 * CLUSTER) + bytes(2 * CLUSTER) + b"\7" * (2 * CLUSTER + SECTOR)


@pytest.fixture
def image() -> Iterator[jqcow.Image]:
    with jqcow.open_device(overlay(), "r+", backing=Below(BELOW)) as image:
        yield image


def kinds(image: jqcow.Image, count: int = 8) -> list[int]:
    return [image._guest.reads.entry(cluster).kind for cluster in range(count)]


def copy_up(image: jqcow.Image, offset: int, length: int) -> None:
    image._guest.copying.copy_up(offset, length)


def test_every_cluster_that_a_range_touches(image: jqcow.Image) -> None:
    copy_up(image, CLUSTER - 1, 2)
    assert kinds(image, 3) == [DATA, DATA, UNALLOCATED]
    image._guest.reads.backing = None
    assert image.pread(2 * CLUSTER, 0) == BELOW[: 2 * CLUSTER] and image.check().ok


def test_zeros_are_not_copied(image: jqcow.Image) -> None:
    """And behind the end of the backing file there is nothing else."""
    copy_up(image, 0, MIB)
    assert kinds(image) == [DATA, DATA, UNALLOCATED, UNALLOCATED, DATA, DATA, DATA, UNALLOCATED]
    assert image.pread(8 * CLUSTER, 0) == BELOW.ljust(8 * CLUSTER, b"\0")


def test_what_the_disk_has_of_its_own_stays(image: jqcow.Image) -> None:
    image.pwrite(b"own", 0)
    image.discard(CLUSTER, CLUSTER)
    copy_up(image, 0, 2 * CLUSTER)
    assert kinds(image, 2) == [DATA, ZERO_CLUSTER]
    assert image.pread(2 * CLUSTER, 0) == b"own" + BELOW[3:CLUSTER] + bytes(CLUSTER)


def test_the_end_of_the_disk_cuts_the_last_cluster() -> None:
    device = SimulatedDevice()
    with (
        jqcow.create_on_device(device, CLUSTER + SECTOR, cluster_size=CLUSTER) as image,
        image.transaction() as transaction,
    ):
        transaction.set_backing_file("base.raw", "raw")
    device.reopen()
    with jqcow.open_device(device, "r+", backing=Below(BELOW)) as image:
        copy_up(image, CLUSTER, SECTOR)
        assert kinds(image, 2) == [UNALLOCATED, DATA]
        assert image.pread(SECTOR, CLUSTER) == BELOW[CLUSTER : CLUSTER + SECTOR]


def test_a_reader_does_not_wait_for_a_transaction(image: jqcow.Image) -> None:
    """A later read copies."""
    with image.transaction() as transaction:
        copy_up(image, 0, CLUSTER)
        assert kinds(image, 1) == [UNALLOCATED]
        transaction.pwrite(b"x", MIB // 2)
    copy_up(image, 0, CLUSTER)
    assert kinds(image, 1) == [DATA]


def test_a_copy_over_data_is_ordered(image: jqcow.Image) -> None:
    """W2: the guest's old content does not read as zeros."""
    image.flush()
    copy_up(image, 0, CLUSTER)
    assert image._engine.public.changes.ordered
