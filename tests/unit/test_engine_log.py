"""The log: room for a record, the end of an epoch, and moves to another range."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from jqcow.engine.engine import Engine, open_engine
from jqcow.engine.journal import Contents
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import ChangeSet
from jqcow.image.opening import write_blank
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.layout import ClusterIndex, HostOffset
from jqcow.ondisk.root import MIN_JOURNAL_BYTES
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

CLUSTER_BITS = 12
CLUSTER = 1 << CLUSTER_BITS


@pytest.fixture
def device() -> SimulatedDevice:
    device = SimulatedDevice()
    write_blank(device, blank_image(1 << 20, CLUSTER_BITS))
    return device


@pytest.fixture
def engine(device: SimulatedDevice) -> Iterator[Engine]:
    engine = open_engine(Medium(device), writable=True, journal_bytes=MIN_JOURNAL_BYTES).engine
    engine.lifecycle.go_live(lambda: None)
    device.barrier("test")
    yield engine


def changes_of(engine: Engine, blocks: int) -> ChangeSet:
    """Return a set of blocks that do not compress, in clusters that nothing else uses."""
    changes = ChangeSet(engine.geometry)
    changes.mark()
    for number in range(blocks):
        seed = bytes((number * 7 + at * at + (at >> 3)) % 256 for at in range(CLUSTER))
        changes.edit(HostOffset((1000 + number) * CLUSTER), seed)
    return changes


class TestRoom:
    def test_a_record_that_fits_changes_nothing(self, engine: Engine) -> None:
        journal = engine.log.require_journal()
        engine.log.make_room(changes_of(engine, 1))
        assert engine.log.journal is journal and journal.epoch == 1

    def test_a_full_half_ends_the_epoch(self, engine: Engine) -> None:
        journal = engine.log.require_journal()
        journal._position = journal.extent.half_bytes
        engine.log.make_room(changes_of(engine, 1))
        assert engine.log.journal is journal and journal.epoch == 2 and journal.epoch_is_empty

    def test_a_record_longer_than_a_half_moves_the_journal(self, engine: Engine) -> None:
        """T8."""
        old = engine.log.require_journal()
        count = old.extent.half_bytes // CLUSTER + 1
        payload = engine.log.make_room(changes_of(engine, count))
        new = engine.log.require_journal()
        assert new is not old and new.extent.half_bytes > old.extent.half_bytes
        assert new.has_room(payload) and new.sequence == old.sequence + 1
        assert engine.space.is_listed(ClusterIndex(old.extent.offset // CLUSTER))


class TestEndOfEpoch:
    def test_images_are_home(self, device: SimulatedDevice, engine: Engine) -> None:
        """T4, T7."""
        changes = changes_of(engine, 2)
        engine.space.frontier = ClusterIndex(1002)
        engine.blocks.publish(changes)
        engine.log.checkpoint()
        assert not engine.blocks.images and engine.log.require_journal().epoch == 2
        assert device.size() == 1002 * CLUSTER and not device.changes
        for offset, block in changes.blocks.items():
            assert device.pread(CLUSTER, offset) == bytes(block)

    def test_failed_write_leaves_the_epoch(self, device: SimulatedDevice, engine: Engine) -> None:
        engine.blocks.publish(changes_of(engine, 1))
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
        with pytest.raises(OSError):
            engine.log.checkpoint()
        assert engine.blocks.images and engine.log.require_journal().epoch == 1


class TestMove:
    def test_failed_range_is_given_up(self, device: SimulatedDevice, engine: Engine) -> None:
        """The old range goes on, and the file is as long as before."""
        log, old, size = engine.log, engine.log.require_journal(), device.size()
        contents = Contents.opening(engine.blocks.area, 2, old.sequence)
        device.faults = FaultPlan(Fault(errno.ENOSPC, call="pwrite", at=2))
        with pytest.raises(OSError):
            log.move(2 * MIN_JOURNAL_BYTES, contents)
        device.faults = None
        assert log.journal is old and device.size() == size
        assert [run.start for run in engine.space.reserved] == [old.extent.offset // CLUSTER]
        log.move(2 * MIN_JOURNAL_BYTES, contents)
        assert log.require_journal().extent.length == 2 * MIN_JOURNAL_BYTES

    def test_failed_root_is_put_back(self, device: SimulatedDevice, engine: Engine) -> None:
        old, sector = engine.log.require_journal(), device.pread(512, 0)
        device.faults = FaultPlan(Fault(KeyboardInterrupt(), call="barrier", barrier_name="move.root"))
        with pytest.raises(KeyboardInterrupt):
            engine.log.move(MIN_JOURNAL_BYTES, Contents.opening(engine.blocks.area, old.epoch, old.sequence))
        assert engine.log.journal is old and device.pread(512, 0) == sector


class TestRecycling:
    def test_failed_punch_is_raised_and_loses_nothing(self, device: SimulatedDevice, engine: Engine) -> None:
        for start in (900, 902, 904):
            engine.space.unknown.add(start, 1)
        device.faults = FaultPlan(Fault(errno.EIO, call="punch"))
        with pytest.raises(OSError):
            engine.log.recycle()
        assert device.faults.fired
        assert 900 in engine.space.unknown and 902 in engine.space.unknown
