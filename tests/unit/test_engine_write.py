"""Writes of a guest: in place or to fresh clusters, in which order, and what a failure leaves."""

from __future__ import annotations

import errno

import pytest

import jqcow
from jqcow.engine.mapping import MappedRun
from jqcow.ondisk.layout import GuestOffset
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.beside import is_taken
from tests.support.users import in_place
from tests.unit.engines import CLUSTER, JOURNAL, MIB, OLD, SECTOR, written_image


def first_run(image: jqcow.Image, offset: int = 0) -> MappedRun:
    with image._lock:
        return image._engine.public.mapping.run(GuestOffset(offset), CLUSTER)


class TestOrder:
    """W2: what is not zero-safe becomes durable before the record that maps it."""

    def test_zeros_need_none(self, image: jqcow.Image) -> None:
        image.pwrite(b"x", MIB // 2)
        assert not image._engine.public.changes.ordered

    def test_data_behind_data_needs_it(self, image: jqcow.Image) -> None:
        image.create_snapshot("kept")
        image.pwrite(b"x", 0)
        assert image._engine.public.changes.ordered

    def test_old_bytes_of_a_host_cluster_need_it(self, image: jqcow.Image) -> None:
        """W3: what a zero entry keeps is written whole: its old bytes are not the guest's."""
        old = first_run(image).host
        image.write_zeroes(CLUSTER, 0, unmap=False)
        image.flush()
        image.pwrite(b"x", 5)
        assert first_run(image).host == old and image._engine.public.changes.ordered
        assert image.pread(CLUSTER, 0) == bytes(5) + b"x" + bytes(CLUSTER - 6)

    def test_clusters_that_cannot_be_punched_are_written_whole(self) -> None:
        """W3."""
        device = SimulatedDevice(can_punch=False)
        with written_image(device) as image:
            used = {first_run(image, offset).host for offset in range(0, len(OLD), CLUSTER)}
            image.discard(len(OLD), 0)
            image.flush()
            image.pwrite(b"x", MIB // 2 + 5)
            assert first_run(image, MIB // 2).host in used
            assert image._engine.public.changes.ordered
            assert image.pread(CLUSTER, MIB // 2) == bytes(5) + b"x" + bytes(CLUSTER - 6)
            assert image.check().ok

    def test_data_goes_before_its_entry(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        """W4: while it is written nothing is staged, and the lock is free."""
        seen: list[tuple[bool, bool]] = []
        in_place(image).checkpoint()
        device.faults = FaultPlan(
            Fault.delay(
                lambda: seen.append(
                    (image._engine.public.changes.is_empty, is_taken(image._engine.medium.lock))
                ),
                call="pwrite",
            )
        )
        image.pwrite(b"x" * CLUSTER, MIB // 2)
        assert seen == [(True, False)] and not image._engine.public.changes.is_empty


class TestFailures:
    def test_all_is_as_before(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        """W4: what it took is unknown, and nothing is staged."""
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
        with pytest.raises(OSError):
            in_place(image).pwrite(b"x" * CLUSTER, MIB // 2)
        device.faults = None
        assert image.pread(CLUSTER, MIB // 2) == bytes(CLUSTER)
        assert image._engine.public.changes.is_empty and image._engine.space.unknown.holds(1)
        image.pwrite(b"x" * CLUSTER, MIB // 2)
        assert image.pread(CLUSTER, MIB // 2) == b"x" * CLUSTER and image.check().ok

    def test_no_space_for_an_l2_table_gives_the_data_clusters_back(self) -> None:
        """The operation is undone: what it counted is free, and counted nowhere."""
        device = SimulatedDevice()
        with in_place(
            jqcow.create_on_device(device, MIB, cluster_size=SECTOR, journal_size=JOURNAL)
        ) as image:
            image.pwrite(b"first", 0)
            image.flush()
            device.faults = FaultPlan(Fault(errno.ENOSPC, call="allocate"))
            with pytest.raises(OSError):
                image.pwrite(b"x" * SECTOR, MIB // 2)
            device.faults = None
            assert image._engine.public.changes.is_empty and image.check().ok
            assert image._engine.space.unknown.holds(2), "one for the data, one for the table"
            assert image._engine.guard.oldest() == image._engine.guard.newest + 1


def test_a_cluster_is_filled_with_one_barrier_each() -> None:
    device = SimulatedDevice()
    image = jqcow.create_on_device(
        device, 1 << 20, cluster_size=65536, extended_l2=True, journal_size=1 << 16
    )
    in_place(image).pwrite(b"x" * 2048, 0)
    image.flush()
    found: list[str] = []
    device.barrier_listeners.append(lambda name, _: found.append(name))
    for start, length in ((2048, 2048), (8192, 100), (9000, 1240), (30000, 9000)):
        image.pwrite(b"y" * length, start)
        image.flush()
    assert found == ["flush.record"] * 2 + ["flush.data"] + ["flush.record"]
    image.discard(2048, 2048)
    image.flush()
    del found[:]
    image.pwrite(b"z" * 2048, 2048)
    image.flush()
    assert found == ["flush.ordered", "flush.record"]
    image.close()
    device.reopen()
    with jqcow.open_device(device, "r+", small_writes="in-place") as image:
        del found[:]
        image.pwrite(b"z" * 2048, 4096)
        image.flush()
        assert found[-2:] == ["flush.ordered", "flush.record"]
