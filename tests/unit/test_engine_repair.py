"""Refcounts made right: leaks alone or everything, in one transaction, and what is not touched."""

from __future__ import annotations

import errno

import pytest

from jqcow.engine import repair as repairs
from jqcow.engine.engine import Engine, make_writable, open_engine
from jqcow.engine.medium import Medium
from jqcow.engine.repair import RepairReport, What
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk.header import INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY
from jqcow.ondisk.l2 import data_entry
from jqcow.ondisk.layout import ClusterIndex, GuestCluster, HostOffset
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.unit.engines import (
    JOURNAL,
    PER_BLOCK,
    SECTOR,
    changing,
    check,
    device_of,
    flush,
    map_one,
    new_engine,
    take_data,
)


@pytest.fixture
def engine() -> Engine:
    """Map one guest cluster, and nothing is wrong yet."""
    engine = new_engine()
    with changing(engine) as tables:
        map_one(tables)
    return engine


def closed(engine: Engine) -> SimulatedDevice:
    """Close an image cleanly, damage included; return its device."""
    flush(engine)
    # Its own refcounts would cut the file behind the last cluster that they know.
    engine.lifecycle.kept_bytes = engine.space.frontier * SECTOR
    engine.closing.clean()
    device = device_of(engine)
    device.reopen()
    return device


def opened(device: SimulatedDevice, what: What | None) -> tuple[Engine, RepairReport | None]:
    found = open_engine(Medium(device), writable=True, journal_bytes=JOURNAL, repair=what)
    return found.engine, make_writable(found, what)


def data(engine: Engine) -> ClusterIndex:
    return engine.geometry.cluster_of(engine.public.mapping.l2_entry(GuestCluster(0)).host)


def leak(engine: Engine, count: int = 3) -> ClusterIndex:
    """Count clusters that nothing refers to."""
    return take_data(engine, count).start


def miscount(engine: Engine, *clusters: ClusterIndex) -> None:
    """Count clusters in use as free, as damage does: nobody frees them, or gives them back to the host."""
    with changing(engine) as tables:
        for cluster in clusters:
            tables.refcounts._take_reference(cluster, 1)


def make_too_low(engine: Engine) -> None:
    miscount(engine, data(engine))


def clear_flag(engine: Engine) -> None:
    with changing(engine) as tables:
        entry = tables.mapping.l2_entry(GuestCluster(0))
        tables.mapping.set_entries(GuestCluster(0), [entry._replace(copied=False)])


class TestLeaks:
    def test_they_alone_are_taken_away(self, engine: Engine) -> None:
        """Where nothing else is wrong the flags are made right too."""
        first = leak(engine)
        clear_flag(engine)
        repaired, report = opened(closed(engine), "leaks")
        assert report == RepairReport(leaks=3, copied_flags=1) and report.changed
        assert repaired.public.refcounts.is_free(first, first + 3)
        assert check(repaired).ok

    def test_what_is_too_low_stays(self, engine: Engine) -> None:
        """And so do the flags: by refcounts that are too low COPIED would allow too much."""
        first = leak(engine)
        make_too_low(engine)
        clear_flag(engine)
        repaired, report = opened(closed(engine), "leaks")
        assert report == RepairReport(leaks=3)
        assert repaired.public.refcounts.is_free(first, first + 3)
        assert repaired.public.refcounts.get(data(repaired)) == 0
        assert not repaired.public.mapping.l2_entry(GuestCluster(0)).copied

    def test_then_nothing_that_is_in_use_is_handed_out_or_cut_off(self, engine: Engine) -> None:
        """F1: the refcounts do not tell what is free, nor where the file ends."""
        make_too_low(engine)
        leak(engine)
        device = closed(engine)
        size = device.size()
        repaired, _ = opened(device, "leaks")
        assert repaired.space.search_end == 0 and repaired.lifecycle.kept_bytes == size
        with changing(repaired) as tables:
            taken = map_one(tables, 5)
        assert taken >= size // SECTOR
        flush(repaired)
        repaired.closing.clean()
        assert device.size() >= size


class TestEverything:
    def test_each_way(self, engine: Engine) -> None:
        leak(engine)
        make_too_low(engine)
        clear_flag(engine)
        repaired, report = opened(closed(engine), "all")
        assert report == RepairReport(leaks=3, too_low=1, copied_flags=1)
        assert repaired.public.refcounts.get(data(repaired)) == 1 and check(repaired).ok
        assert repaired.space.search_end == repaired.space.frontier, "free clusters may be looked for (F1)"

    def test_it_is_durable(self, engine: Engine) -> None:
        """Once it has returned: the dirty bit is gone as well, in the same record."""
        make_too_low(engine)
        with changing(engine) as tables:
            tables.view.set_header(incompatible_features=INCOMPATIBLE_DIRTY)
        repaired, _ = opened(closed(engine), None)
        again, report = opened(device_of(repaired).killed(), None)
        assert report is None and check(again).ok
        assert not again.public.view.header.incompatible_features

    def test_where_nothing_is_wrong_nothing_is_written(self, engine: Engine) -> None:
        device = closed(engine)
        device.faults = plan = FaultPlan()
        repaired, report = opened(device, "all")
        assert report == RepairReport() and not report.changed
        assert plan.calls["pwrite"] == 0 and repaired.log.journal is None

    def test_metadata_that_is_counted_as_free(self, engine: Engine) -> None:
        """A refcount block too, whose own refcount it holds."""
        refcounts, cluster_of = engine.public.refcounts, engine.geometry.cluster_of
        table = engine.public.mapping.l2_table(0)
        miscount(engine, cluster_of(refcounts.refcount_block(0)), cluster_of(table))
        repaired, report = opened(closed(engine), "all")
        assert report is not None and report.too_low == 2 and check(repaired).ok

    def test_missing_refcount_blocks_go_behind_everything(self, engine: Engine) -> None:
        """F1: what looks free may be in use."""
        table = engine.public.view.header.refcount_table_offset
        with changing(engine) as tables:
            tables.view.set_entry(HostOffset(table), 0, 0)
        used = engine.space.frontier
        repaired, report = opened(closed(engine), "all")
        assert report is not None and report.too_low > 4 and check(repaired).ok
        assert repaired.public.refcounts.refcount_block(0) >= used * SECTOR

    def test_a_table_that_is_counted_as_free_and_has_to_move(self, engine: Engine) -> None:
        """Its own refcounts are made right first: moving it gives the old clusters up."""
        engine.space.frontier = ClusterIndex(10 * PER_BLOCK)
        with changing(engine) as tables:
            run = engine.space.take_at_frontier(1)
            tables.refcounts.count_in(run)
            host = tables.geometry.offset_of(run.start)
            tables.mapping.set_entries(GuestCluster(1), [data_entry(host)])
        engine.space.frontier = ClusterIndex(64 * PER_BLOCK)
        with changing(engine) as tables:
            tables.refcounts.count_in(engine.space.take_at_frontier(1))
            header = tables.view.header
            tables.view.set_entry(HostOffset(header.refcount_table_offset), 10, 0)
        table = tables.geometry.cluster_of(HostOffset(header.refcount_table_offset))
        assert table > 64 * PER_BLOCK and header.refcount_table_clusters == 2
        miscount(engine, table, ClusterIndex(table + 1))
        device = closed(engine)
        device.truncate(engine.public.refcounts.table_entries * PER_BLOCK * SECTOR)
        repaired, report = opened(device, "all")
        assert report is not None and report.too_low == 3 and check(repaired).ok
        assert repaired.public.view.header.refcount_table_offset != header.refcount_table_offset

    def test_a_table_that_has_to_move_for_the_header(self, engine: Engine) -> None:
        """Before all other metadata, too."""
        with changing(engine) as tables:
            map_one(tables)
        engine.space.frontier = ClusterIndex(64 * PER_BLOCK)
        with changing(engine) as tables:
            tables.refcounts.count_in(engine.space.take_at_frontier(1))
            header = tables.view.header
        table = engine.geometry.cluster_of(HostOffset(header.refcount_table_offset))
        miscount(engine, table, ClusterIndex(table + 1))
        with changing(engine) as tables:
            # The lowest refcount block is lost: the header counts as free.
            tables.view.set_entry(HostOffset(header.refcount_table_offset), 0, 0)
        device = closed(engine)
        device.truncate(engine.public.refcounts.table_entries * PER_BLOCK * SECTOR)
        repaired, report = opened(device, "all")
        assert report is not None and report.too_low == 6 and check(repaired).ok

    def test_a_failure_changes_nothing(self, engine: Engine) -> None:
        """At whichever write; tried again it is made right."""
        leak(engine)
        make_too_low(engine)
        device = closed(engine)
        before = device.content()
        device.faults = plan = FaultPlan()
        opened(device, "all")
        writes = plan.calls["pwrite"]
        assert writes >= 2
        for at in range(1, writes + 1):
            device = SimulatedDevice(before)
            device.faults = FaultPlan(Fault(errno.EIO, at=at, call="pwrite"))
            failed = open_engine(Medium(device), writable=True, journal_bytes=JOURNAL, repair="all")
            with pytest.raises(OSError):
                make_writable(failed, "all")
            assert not failed.engine.log.in_transaction and failed.engine.public.changes.is_empty
            killed = device.killed()
            found = open_engine(Medium(killed), writable=False).engine
            assert found.public.refcounts.get(data(found)) == 0
            repaired, report = opened(killed, "all")
            assert report == RepairReport(leaks=3, too_low=1) and check(repaired).ok


class TestRefused:
    """A table that is damaged, or used twice, is not touched: nothing is changed."""

    def refuse(self, device: SimulatedDevice, error: type[Exception], match: str) -> None:
        device.faults = plan = FaultPlan()
        with pytest.raises(error, match=match):
            opened(device, "all")
        assert plan.calls["pwrite"] == 0

    def test_data_past_the_end_of_the_file(self, engine: Engine) -> None:
        """Unless a refcount reaches as far: then the host lost its last bytes, and it reads as zeros."""
        last = leak(engine)
        with changing(engine) as tables:
            entry = tables.mapping.l2_entry(GuestCluster(0))
            far = HostOffset((last + 3) * SECTOR)
            tables.mapping.set_entries(GuestCluster(1), [entry._replace(host=far)])
        device = closed(engine)
        self.refuse(device, CorruptionError, "past the end of the file")
        device.truncate((last + 4) * SECTOR)
        assert opened(device, "all")[1] == RepairReport(leaks=3, too_low=1)

    def test_metadata_as_data(self, engine: Engine) -> None:
        with changing(engine) as tables:
            entry = tables.mapping.l2_entry(GuestCluster(0))
            table = tables.mapping.l2_table(0)
            tables.mapping.set_entries(GuestCluster(1), [entry._replace(host=table)])
        self.refuse(closed(engine), CorruptionError, "maps metadata")

    def test_a_table_that_is_used_twice(self, engine: Engine) -> None:
        with changing(engine) as tables:
            tables.mapping.set_l1_entry(1, tables.mapping.l2_table(0), copied=True)
        self.refuse(closed(engine), CorruptionError, "names an L2 table twice")

    def test_more_references_than_the_width_holds(self) -> None:
        """Two guest clusters have one host cluster, whose refcount has a single bit."""
        engine = new_engine(refcount_order=0)
        with changing(engine) as tables:
            map_one(tables)
            tables.mapping.set_entries(GuestCluster(1), [tables.mapping.l2_entry(GuestCluster(0))])
        device = closed(engine)
        content = device.content()
        with pytest.raises(UnsupportedFeatureError, match="above 1"):
            opened(device, "all")
        assert device.content() == content, "no journal is left behind"
        found, _ = opened(device.killed(), None)
        assert found.public.refcounts.get(data(found)) == 1

    def test_a_file_too_large_to_count(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """It bounds memory."""
        device = closed(engine)
        monkeypatch.setattr(repairs, "MAX_CLUSTERS", device.size() // SECTOR - 1)
        self.refuse(device, UnsupportedFeatureError, "counting the references")


def test_the_mark_of_corruption_is_cleared_durably(engine: Engine) -> None:
    with changing(engine) as tables:
        tables.view.set_header(incompatible_features=INCOMPATIBLE_CORRUPT)
    found, _ = opened(closed(engine), "all")
    assert found.public.view.header.incompatible_features == INCOMPATIBLE_CORRUPT, "nobody checked it yet"
    repairs.clear_corrupt_bit(found.lifecycle)
    again, _ = opened(device_of(found).killed(), None)
    assert not again.public.view.header.incompatible_features
