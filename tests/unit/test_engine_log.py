"""The log: room for a record, the end of an epoch, and moves to another range."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from jqcow.disks.making import write_blank
from jqcow.engine.engine import Engine, open_engine
from jqcow.engine.journal import Contents
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import ChangeSet
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.frame import ZeroOperation
from jqcow.ondisk.layout import ClusterIndex, HostOffset
from jqcow.ondisk.root import MIN_JOURNAL_BYTES
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

CLUSTER_BITS = 12
CLUSTER = 1 << CLUSTER_BITS


@pytest.fixture
def device() -> SimulatedDevice:
    device = SimulatedDevice()
    write_blank(device, blank_image(1 << 20, Form(CLUSTER_BITS)))
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

    def test_zeros_of_new_clusters_take_no_room(self, engine: Engine) -> None:
        """They are named, not written: an epoch may name many more of them than a half is long (J5)."""
        none = engine.log._lengths_for([])
        assert engine.log._lengths_for([ZeroOperation(1000 * CLUSTER, 16 << 20)]) == none


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
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", at=2))
        with pytest.raises(OSError):
            log.rescue(2 * MIN_JOURNAL_BYTES, contents)
        device.faults = None
        assert log.journal is old and device.size() == size
        assert [run.start for run in engine.space.reserved] == [old.extent.offset // CLUSTER]
        log.rescue(2 * MIN_JOURNAL_BYTES, contents)
        assert log.require_journal().extent.length == 2 * MIN_JOURNAL_BYTES

    def test_failed_root_is_put_back(self, device: SimulatedDevice, engine: Engine) -> None:
        old, sector = engine.log.require_journal(), device.pread(512, 0)
        device.faults = FaultPlan(Fault(KeyboardInterrupt(), call="barrier", barrier_name="move.root"))
        with pytest.raises(KeyboardInterrupt):
            engine.log.rescue(
                MIN_JOURNAL_BYTES, Contents.opening(engine.blocks.area, old.epoch, old.sequence)
            )
        assert engine.log.journal is old and device.pread(512, 0) == sector


class TestShortOfSpace:
    @pytest.mark.parametrize(
        ("free_bytes", "length"), [(None, 8 << 20), (32 << 20, 8 << 20), (8 << 20, 2 << 20), (0, 64 << 10)]
    )
    def test_length_by_what_is_free(
        self, device: SimulatedDevice, free_bytes: int | None, length: int
    ) -> None:
        device.shown_free_bytes = free_bytes
        engine = open_engine(Medium(device), writable=True).engine
        engine.lifecycle.go_live(lambda: None)
        assert engine.log.require_journal().extent.length == length

    @pytest.mark.parametrize("room", [20 << 20, 5 << 20, 100 << 10])
    def test_shorter_until_it_fits(self, device: SimulatedDevice, room: int) -> None:
        """A host that does not tell, or tells of more than a quota allows."""
        device.shown_free_bytes = 1 << 40
        device.faults = FaultPlan(capacity_bytes=device.used_bytes + room)
        engine = open_engine(Medium(device), writable=True).engine
        engine.lifecycle.go_live(lambda: None)
        extent = engine.log.require_journal().extent
        assert room // 4 < extent.length <= min(room, 8 << 20)
        assert device.size() == extent.end

    def test_no_room_at_all(self, device: SimulatedDevice) -> None:
        size = device.size()
        device.shown_free_bytes = 50 << 10
        device.faults = FaultPlan(capacity_bytes=device.used_bytes + (50 << 10))
        engine = open_engine(Medium(device), writable=True).engine
        with pytest.raises(OSError, match="the journal needs 65536 bytes, 51200 bytes are free") as caught:
            engine.lifecycle.go_live(lambda: None)
        assert caught.value.errno == errno.ENOSPC
        assert device.size() == size and engine.log.journal is None

    def test_a_record_that_needs_more_says_how_much(self, device: SimulatedDevice, engine: Engine) -> None:
        device.faults = FaultPlan(capacity_bytes=device.used_bytes + (64 << 10))
        with pytest.raises(OSError, match=r"the journal needs [0-9]+ bytes$"):
            engine.log.make_room(changes_of(engine, 20))
        device.faults = None
        assert engine.log.make_room(changes_of(engine, 20))

    @pytest.mark.parametrize("can_forget", [True, False])
    def test_rescue_where_the_host_cannot_punch(
        self, device: SimulatedDevice, engine: Engine, monkeypatch: pytest.MonkeyPatch, can_forget: bool
    ) -> None:
        """Where what was read is durable (M7) the old range does."""
        monkeypatch.setattr(Medium, "can_forget", can_forget)
        old = engine.log.require_journal()
        device.can_punch = False
        device.faults = FaultPlan(capacity_bytes=device.used_bytes)
        refused = pytest.raises(OSError, match="the journal needs 12288 bytes")
        with nullcontext() if can_forget else refused:
            engine.log.rescue(MIN_JOURNAL_BYTES, Contents.opening(engine.blocks.area, 1, 0))
        assert engine.log.journal is old and engine.log.is_sparse == can_forget

    def test_other_errors_are_not_told_as_a_full_disk(self, device: SimulatedDevice, engine: Engine) -> None:
        device.faults = FaultPlan(
            Fault(errno.EIO, at=3, call="pwrite"), capacity_bytes=device.used_bytes + (20 << 10)
        )
        device.can_punch = False
        with pytest.raises(OSError) as caught:
            engine.log.rescue(MIN_JOURNAL_BYTES, Contents.opening(engine.blocks.area, 1, 0))
        assert device.faults.fired and caught.value.errno == errno.EIO


class TestRecycling:
    def test_failed_punch_is_raised_and_loses_nothing(self, device: SimulatedDevice, engine: Engine) -> None:
        for start in (900, 902, 904):
            engine.space.unknown.add(start, 1)
        device.faults = FaultPlan(Fault(errno.EIO, call="punch"))
        with pytest.raises(OSError):
            engine.log.recycle()
        assert device.faults.fired
        assert 900 in engine.space.unknown and 902 in engine.space.unknown
