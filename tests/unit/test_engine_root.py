"""Sector 0 and its copy: each edge of the table of states."""

from __future__ import annotations

import errno

import pytest

from jqcow.engine.medium import Medium
from jqcow.engine.root import ROOT_COPY, SECTOR_0, Root, RootState
from jqcow.ondisk import root as roots
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import SECTOR_BYTES, Geometry
from jqcow.ondisk.root import MIN_JOURNAL_BYTES, JournalRange
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

AREA = HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1])
EXTENT = JournalRange(1 << 17, MIN_JOURNAL_BYTES, bytes(range(16)))
OLD, NEW = b"o" * SECTOR_BYTES, b"n" * SECTOR_BYTES


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(OLD + bytes((1 << 16) - SECTOR_BYTES))


@pytest.fixture
def root(device: SimulatedDevice) -> Root:
    return Root(Medium(device), Geometry(16))


def state_of(root: Root) -> RootState:
    return root.state


class TestStates:
    def test_found_is_settled_by_any_barrier(self, root: Root) -> None:
        assert state_of(root) is RootState.FOUND
        root.medium.barrier("test")
        assert state_of(root) is RootState.SETTLED

    def test_settling_needs_one_barrier(self, root: Root, device: SimulatedDevice) -> None:
        """T5."""
        for _ in range(2):
            root.settle()
            assert state_of(root) is RootState.SETTLED and device.barriers["root.settle"] == 1

    def test_written_then_settled(self, root: Root) -> None:
        root.write(NEW)
        assert state_of(root) is RootState.UNDECIDED
        root.decide()
        assert state_of(root) is RootState.WRITTEN
        root.medium.barrier("test")
        assert state_of(root) is RootState.SETTLED

    def test_a_barrier_decides_nothing(self, root: Root) -> None:
        root.write(NEW)
        root.medium.barrier("test")
        assert state_of(root) is RootState.UNDECIDED
        root.decide()
        assert state_of(root) is RootState.SETTLED

    def test_a_barrier_that_began_before_does_not_count(self, root: Root, device: SimulatedDevice) -> None:
        device.barrier_listeners.append(lambda *_: root.write(NEW))
        root.medium.barrier("test")
        device.barrier_listeners.clear()
        root.decide()
        assert state_of(root) is RootState.WRITTEN

    def test_put_back(self, root: Root, device: SimulatedDevice) -> None:
        """T6."""
        root.settle()
        root.write(NEW)
        root.put_back(OLD)
        assert state_of(root) is RootState.WRITTEN
        assert device.pread(SECTOR_BYTES, SECTOR_0) == OLD

    def test_put_back_after_the_write_failed(self, root: Root, device: SimulatedDevice) -> None:
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", applied_bytes=SECTOR_BYTES))
        with pytest.raises(OSError):
            root.write(NEW)
        root.put_back(OLD)
        assert device.pread(SECTOR_BYTES, SECTOR_0) == OLD and state_of(root) is RootState.WRITTEN

    def test_nothing_to_put_back(self, root: Root, device: SimulatedDevice) -> None:
        root.put_back(NEW)
        assert not device.changes and state_of(root) is RootState.FOUND

    def test_old_root_that_cannot_be_written(self, root: Root, device: SimulatedDevice) -> None:
        root.write(NEW)
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
        with pytest.raises(OSError):
            root.put_back(OLD)
        assert root.medium.poisoned

    def test_change_that_was_cut_off(self, root: Root) -> None:
        assert root.is_decided
        root.write(NEW)
        assert not root.is_decided


class TestCopy:
    def test_it_is_stale_until_its_root_is_decided(self, root: Root) -> None:
        assert root.leftover() is None
        root.write_copy(AREA.header, EXTENT)
        assert root.copy_is_stale and root.leftover() == EXTENT
        root.write(roots.pack_root(AREA.header, EXTENT))
        root.decide()
        assert not root.copy_is_stale and root.may_be_rewritten(EXTENT)

    def test_put_back_leaves_it_stale(self, root: Root) -> None:
        root.write_copy(AREA.header, EXTENT)
        root.write(NEW)
        root.put_back(OLD)
        assert root.copy_is_stale

    def test_one_that_names_another_range_does_not_serve(self, root: Root, device: SimulatedDevice) -> None:
        assert not root.may_be_rewritten(EXTENT)
        root.write_copy(AREA.header, EXTENT)
        other = JournalRange(EXTENT.offset * 2, EXTENT.length, EXTENT.salt)
        assert root.may_be_rewritten(EXTENT) and not root.may_be_rewritten(other)
        device.pwrite(b"torn", ROOT_COPY + 8)
        assert not root.may_be_rewritten(EXTENT)

    def test_cleared(self, root: Root, device: SimulatedDevice) -> None:
        root.write_copy(AREA.header, EXTENT)
        root.clear_copy()
        assert device.pread(roots.ROOT_COPY_BYTES, ROOT_COPY) == bytes(roots.ROOT_COPY_BYTES)

    def test_small_clusters_have_none(self, device: SimulatedDevice) -> None:
        root = Root(Medium(device), Geometry(9))
        root.write_copy(AREA.header, EXTENT)
        root.clear_copy()
        assert not device.changes and root.may_be_rewritten(EXTENT) and root.leftover() is None
