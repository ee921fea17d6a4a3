"""Places of a data file that nobody maps any more: when their space goes back to the host, and when not."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import jqcow
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from jqcow.testing.device import noise
from tests.crash.beside import CLUSTER_BYTES, DATA, SIZE
from tests.support.beside import HeldUp
from tests.support.encrypted import encryption
from tests.support.users import beside, create_simulated, open_simulated


def image_with_data(**options: Any) -> tuple[SimulatedDevice, jqcow.Image]:
    """Return an open image with eight clusters of data in a data file."""
    device = SimulatedDevice()
    image = create_simulated(device, SIZE, CLUSTER_BYTES, data_file="beside", **options)
    image.pwrite(DATA * 8, 0)
    image.flush()
    return device, image


def holes_in(device: SimulatedDevice) -> list[int]:
    """Return which of the eight clusters are holes in the data file."""
    return [cluster for cluster in range(8) if beside(device).is_hole(cluster * CLUSTER_BYTES, CLUSTER_BYTES)]


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_space_goes_back_with_the_record(is_encrypted: bool) -> None:
    device, image = image_with_data(encryption=encryption() if is_encrypted else None)
    image.discard(2 * CLUSTER_BYTES, CLUSTER_BYTES)
    image.write_zeroes(CLUSTER_BYTES, 4 * CLUSTER_BYTES)
    image.write_zeroes(CLUSTER_BYTES, 6 * CLUSTER_BYTES, unmap=False)
    assert not holes_in(device)
    image.flush()
    assert holes_in(device) == [1, 2, 4]
    zeros = bytes(CLUSTER_BYTES)
    assert image.pread(8 * CLUSTER_BYTES, 0) == b"".join((DATA, zeros * 2, DATA, zeros, DATA, zeros, DATA))
    # Not once more: the hole is not looked at.
    image.discard(CLUSTER_BYTES, CLUSTER_BYTES)
    beside(device).faults = FaultPlan(Fault(errno.EIO, call="punch"))
    image.flush()
    image.close()


def test_what_is_written_again_keeps_its_space() -> None:
    device, image = image_with_data()
    image.discard(3 * CLUSTER_BYTES, 0)
    image.pwrite(b"new", 0)
    image.flush()
    assert holes_in(device) == [1, 2]
    image.discard(CLUSTER_BYTES, 3 * CLUSTER_BYTES)
    with HeldUp(beside(device), lambda: image.pread(CLUSTER_BYTES, 5 * CLUSTER_BYTES), call="pread"):
        image.flush()
        # The reader was there before.
        assert holes_in(device) == [1, 2]
        image.pwrite(b"newer", 3 * CLUSTER_BYTES)
        image.flush()
    image.discard(CLUSTER_BYTES, 6 * CLUSTER_BYTES)
    image.flush()
    assert holes_in(device) == [1, 2, 6]
    assert image.pread(5, 3 * CLUSTER_BYTES) == b"newer"
    image.close()


def test_what_a_transaction_gives_up_goes_back_with_it() -> None:
    device, image = image_with_data()
    with image.transaction() as transaction:
        transaction.discard(CLUSTER_BYTES, 0)
        transaction.rollback()
    image.flush()
    assert not holes_in(device)
    with image.transaction() as transaction:
        transaction.discard(CLUSTER_BYTES, 0)
    assert holes_in(device) == [0]
    with image.transaction() as transaction:
        transaction.make_empty()
    assert holes_in(device) == list(range(8))
    image.close()


def test_a_writer_waits_until_its_cluster_is_punched() -> None:
    device, image = image_with_data()
    image.discard(CLUSTER_BYTES, 0)
    with HeldUp(beside(device), image.flush, call="punch") as others:
        writer = others.start(lambda: image.pwrite(b"new", 0))
        assert others.is_waiting() and not writer.done()
    assert image.pread(3, 0) == b"new"
    image.flush()
    image.close()
    with open_simulated(device) as again:
        assert again.pread(3, 0) == b"new"


def test_a_host_that_cannot_is_not_asked_again() -> None:
    device, image = image_with_data()
    beside(device).can_punch = False
    for cluster in range(3):
        image.discard(CLUSTER_BYTES, cluster * CLUSTER_BYTES)
        image.flush()
    assert not holes_in(device)
    # An error is none of the flush, which is durable.
    other, image = image_with_data()
    beside(other).faults = FaultPlan(Fault(errno.EIO, call="punch"))
    image.discard(CLUSTER_BYTES, 0)
    image.flush()
    assert not holes_in(other)
    image.close()


def test_a_device_of_fixed_size_is_told_to_discard() -> None:
    device, data = SimulatedDevice(), SimulatedDevice(noise(0, SIZE), has_fixed_size=True)
    image = jqcow.create_on_device(
        device, SIZE, cluster_size=CLUSTER_BYTES, data_device=data, data_file="beside"
    )
    image.pwrite(DATA * 8, 0)
    image.discard(2 * CLUSTER_BYTES, CLUSTER_BYTES)
    image.flush()
    assert data.content()[:CLUSTER_BYTES] == DATA != data.content()[CLUSTER_BYTES : 2 * CLUSTER_BYTES]
    assert image.pread(2 * CLUSTER_BYTES, CLUSTER_BYTES) == bytes(2 * CLUSTER_BYTES)
    image.close()
