"""Another size for the disk: what is cut off is freed, what is added reads as zeros."""

from __future__ import annotations

import errno

import pytest

import jqcow
from jqcow.ondisk.layout import GuestOffset
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.users import in_place
from tests.unit.engines import CLUSTER, JOURNAL, MIB, OLD, SECTOR, Below, overlay


def test_back_and_forth_shows_zeros(image: jqcow.Image) -> None:
    image.resize(CLUSTER + 512)
    image.resize(MIB)
    assert image.pread(8 * CLUSTER, 0) == OLD[: CLUSTER + 512].ljust(8 * CLUSTER, b"\0")
    assert image.check().ok


def test_what_is_cut_off_is_zeroed_on_the_host(device: SimulatedDevice, image: jqcow.Image) -> None:
    """Whatever program makes the disk larger again must not find the old bytes in its last cluster."""
    image.resize(CLUSTER + 512)
    run = image._guest.reads.first_run(CLUSTER, 512)
    assert device.pread(CLUSTER, run.host) == OLD[CLUSTER : CLUSTER + 512].ljust(CLUSTER, b"\0")


def test_what_is_cut_off_is_freed_tables_included() -> None:
    device = SimulatedDevice()
    with in_place(jqcow.create_on_device(device, MIB, cluster_size=SECTOR, journal_size=JOURNAL)) as image:
        for offset in range(0, MIB, 1 << 16):
            image.pwrite(b"x" * SECTOR, offset)
        mapping, refcounts = image._engine.public.mapping, image._engine.public.refcounts
        geometry = refcounts.geometry
        tables = [table for _, table in mapping.l2_tables(0)]
        data = [run.host for run in mapping.runs(GuestOffset(0), MIB) if run.host]
        assert len(tables) == len(data) == 16
        image.resize(SECTOR)
        used = [host for host in (*tables, *data) if refcounts.get(geometry.cluster_of(host))]
        assert used == [tables[0], data[0]] and image.check().ok


def test_failed_shrinking_leaves_the_old_size(device: SimulatedDevice, image: jqcow.Image) -> None:
    device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
    with pytest.raises(OSError):
        image.resize(CLUSTER + 512)
    device.faults = None
    assert image.size == MIB and image.pread(len(OLD), 0) == OLD


@pytest.mark.parametrize(
    ("size", "below_bytes", "is_one"),
    [
        (2 * MIB, 0, True),
        (2 * MIB, MIB, True),
        (2 * MIB, MIB + 512, False),
        (MIB, MIB, True),
        (MIB - 512, 0, False),
    ],
)
def test_what_is_seen_only_at_its_end(size: int, below_bytes: int, is_one: bool) -> None:
    """Growing is one operation, unless a longer backing file has to be hidden; shrinking is many."""
    with jqcow.open_device(overlay(), "r+", backing=Below(bytes(below_bytes))) as image:
        assert image._alone().resizing.is_one_operation(size) == is_one


def test_a_longer_backing_file_is_hidden() -> None:
    """What lies behind the old end was never the guest's: neither in its last cluster nor behind it."""
    below = Below(b"\7" * (MIB + 3 * CLUSTER))
    with jqcow.open_device(overlay(), "r+", backing=below) as image:
        image.resize(MIB - CLUSTER + 512)
        image.resize(MIB + 8 * CLUSTER)
        expected = (b"\7" * 512).ljust(9 * CLUSTER, b"\0")
        assert image.pread(9 * CLUSTER, MIB - CLUSTER) == expected
        assert image.check().ok


def test_nothing_is_left_in_an_empty_disk(image: jqcow.Image) -> None:
    with image.transaction() as transaction:
        transaction.make_empty()
    assert image.size == MIB and image.pread(len(OLD), 0) == bytes(len(OLD))
    assert not list(image._engine.public.mapping.l2_tables(0)) and image.check().ok
