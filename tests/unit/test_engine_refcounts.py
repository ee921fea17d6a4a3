"""Refcounts: clusters taken, shared and released; blocks and tables that are added; packing; searching."""

from __future__ import annotations

import errno

import pytest

import jqcow
from jqcow.engine.clusters import Run
from jqcow.engine.engine import Engine
from jqcow.engine.metadata import ChangeSet
from jqcow.engine.refcounts import SCAN_BLOCKS_PER_TAKE
from jqcow.engine.space import RECYCLE_CLUSTERS
from jqcow.engine.tables import Tables
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk.layout import ClusterIndex, HostOffset
from jqcow.testing import Allocate, Fault, FaultPlan, SimulatedDevice
from tests.unit.engines import (
    JOURNAL,
    MIB,
    PER_BLOCK,
    SECTOR,
    changing,
    counts,
    device_of,
    flush,
    new_engine,
    take_data,
)


@pytest.fixture
def engine() -> Engine:
    return new_engine()


def set_refcount(engine: Engine, cluster: ClusterIndex, value: int) -> None:
    """Lay any refcount: what another program, or damage, left."""
    refcounts = engine.public.refcounts
    with changing(engine):
        refcounts.correct(cluster, 1, refcounts.get(cluster), value)


class TestTaking:
    def test_a_cluster_that_was_taken_is_counted_in_its_operation(self, engine: Engine) -> None:
        """R1: and its record; until then it is lent."""
        with changing(engine) as tables:
            run = tables.refcounts.take(3)
            assert engine.space.is_listed(run.start) and counts(engine, run) == [0] * run.count
            tables.refcounts.count_in(run)
        assert counts(engine, run) == [1] * run.count and not engine.space.is_listed(run.start)
        assert run in engine.public.changes.taken

    def test_a_free_cluster_with_a_refcount_is_not_handed_out(self, engine: Engine) -> None:
        """R2: the list of free ones was wrong, or the image is damaged; nothing is changed."""
        end = engine.space.frontier
        with changing(engine) as tables:
            tables.refcounts.correct(ClusterIndex(end + 1), 1, 0, 2)
        before = {offset: bytes(block) for offset, block in engine.public.changes.blocks.items()}
        with (
            pytest.raises(CorruptionError, match="a free cluster has refcount 2") as caught,
            changing(engine) as tables,
        ):
            tables.refcounts.count_in(engine.space.take_at_frontier(3))
        assert caught.value.offset == (end + 1) * SECTOR
        assert engine.public.changes.blocks == before

    def test_what_is_staged_counts(self, engine: Engine) -> None:
        """R2: not only what is durable."""
        run = take_data(engine)
        with (
            pytest.raises(CorruptionError, match="a free cluster has refcount 1"),
            changing(engine) as tables,
        ):
            tables.refcounts.count_in(run)

    def test_in_a_transaction_they_are_its_own(self, engine: Engine) -> None:
        """W1: those alone it writes in place."""
        private = Tables(engine.blocks, engine.space, ChangeSet(engine.geometry, private=True))
        with engine.medium.lock, private.operation():
            run = engine.space.take_at_frontier(2)
            private.refcounts.count_in(run)
            private.refcounts.allocate_metadata()
        assert private.changes.own == {run.start, run.start + 1}

    def test_freed_metadata_among_them_is_data_from_now_on(self, engine: Engine) -> None:
        """G2 would refuse to write there."""
        run = Run(ClusterIndex(engine.space.frontier - 1), 1)
        engine.space.metadata.add(run.start)
        engine.space.unknown.add(run.start, 1)
        engine.space.host_punches = False
        with changing(engine) as tables:
            assert tables.refcounts.take(1).start == run.start
        assert run.start not in engine.space.metadata


class TestMetadata:
    def test_its_home_is_allocated_before_its_record(self, engine: Engine) -> None:
        """R3: a full disk fails the operation. It is zeroed in the record (D4), whatever lies there."""
        device = device_of(engine)
        device.pwrite(b"\xaa" * 2 * SECTOR, engine.space.frontier * SECTOR)
        device.faults = plan = FaultPlan()
        with changing(engine) as tables:
            host = tables.refcounts.allocate_metadata(2)
        assert plan.calls["allocate"] == 1 and device.size() >= host + 2 * SECTOR
        assert engine.public.view.read(host, 2 * SECTOR) == bytes(2 * SECTOR)
        assert {host // SECTOR, host // SECTOR + 1} <= engine.space.metadata
        device.faults = FaultPlan(Fault(errno.ENOSPC, call="allocate"))
        before = engine.public.changes.operations()
        with pytest.raises(OSError), changing(engine) as tables:
            tables.refcounts.allocate_metadata()
        assert engine.public.changes.operations() == before

    def test_every_older_home_is_allocated_before_the_first_record(self) -> None:
        """R3: who made the image may have left holes."""
        device = SimulatedDevice()
        jqcow.create_on_device(device, MIB, cluster_size=SECTOR, journal_size=JOURNAL).close()
        device.reopen()
        reserved: set[HostOffset] = set()

        def look(name: str, device: SimulatedDevice) -> None:
            if name == "live.prepare":
                allocated = (change for change in device.changes if isinstance(change, Allocate))
                reserved.update(
                    HostOffset(at)
                    for change in allocated
                    for at in range(change.offset, change.offset + change.length, SECTOR)
                )

        device.barrier_listeners.append(look)
        with jqcow.open_device(device, "r+", journal_size=JOURNAL) as image:
            header = image._engine.public.view.header
            image.pwrite(b"x", 0)
            old = {0, header.refcount_table_offset, header.l1_table_offset}
            assert old <= reserved

    def test_a_file_of_more_than_64_pib(self, engine: Engine) -> None:
        engine.space.frontier = ClusterIndex(layout.MAX_HOST_OFFSET // SECTOR)
        with pytest.raises(UnsupportedFeatureError, match="64 PiB"), changing(engine) as tables:
            tables.refcounts.allocate_metadata()


class TestSharing:
    @pytest.mark.parametrize(("order", "largest"), [(0, 1), (1, 3), (2, 15), (3, 255)])
    def test_up_to_what_the_width_holds(self, order: int, largest: int) -> None:
        """One more is refused by name; all that the operation did is undone."""
        engine = new_engine(refcount_order=order)
        run = take_data(engine, 2)
        for _ in range(largest - 1):
            with changing(engine) as tables:
                tables.refcounts.share(run.start, 2)
        assert counts(engine, run) == [largest, largest] == [engine.public.refcounts.largest] * 2
        with pytest.raises(UnsupportedFeatureError, match=f"above {largest}"), changing(engine) as tables:
            tables.refcounts.share(run.start, 1)
        assert counts(engine, run) == [largest, largest]

    def test_nobody_shares_a_free_cluster(self, engine: Engine) -> None:
        run = take_data(engine, 2)
        with changing(engine) as tables:
            tables.refcounts.release(ClusterIndex(run.start + 1))
        with pytest.raises(CorruptionError, match="has refcount 0") as caught, changing(engine) as tables:
            tables.refcounts.share(run.start, 2)
        assert caught.value.offset == (run.start + 1) * SECTOR and counts(engine, run) == [1, 0]

    def test_the_last_reference_frees(self, engine: Engine) -> None:
        """S1: not before its record is durable."""
        run = take_data(engine, 3)
        with changing(engine) as tables:
            tables.refcounts.share(ClusterIndex(run.start + 1), 1)
            tables.refcounts.release(run.start, 3)
        changes = engine.public.changes
        assert counts(engine, run) == [0, 1, 0] and changes.freed_clusters == 2
        assert changes.freed_data == [Run(run.start, 1), Run(ClusterIndex(run.start + 2), 1)]
        assert [engine.space.is_listed(ClusterIndex(run.start + at)) for at in range(3)] == [
            True,
            False,
            True,
        ]
        assert not engine.space.zero_safe and not engine.space.unknown

    def test_a_free_cluster_is_not_released(self, engine: Engine) -> None:
        run = take_data(engine)
        with changing(engine) as tables:
            tables.refcounts.release(run.start)
        with pytest.raises(CorruptionError, match="has refcount 0"), changing(engine) as tables:
            tables.refcounts.release(run.start)
        assert engine.public.changes.freed_data == [Run(run.start, 1)]

    def test_metadata_is_not_released_as_data(self, engine: Engine) -> None:
        """G2: a guest's entry names it, wrongly."""
        with changing(engine) as tables:
            cluster = tables.geometry.cluster_of(tables.refcounts.allocate_metadata())
        with pytest.raises(CorruptionError, match="mapped onto metadata"), changing(engine) as tables:
            tables.refcounts.release(cluster)
        assert engine.public.refcounts.get(cluster) == 1
        with changing(engine) as tables:
            tables.refcounts.release_metadata(cluster)
        assert engine.public.changes.freed_metadata == [Run(cluster, 1)]

    def test_what_a_guests_entry_names(self, engine: Engine) -> None:
        refcounts, run = engine.public.refcounts, take_data(engine)
        assert refcounts.data_refcount(run.start) == 1
        set_refcount(engine, run.start, 2)
        assert refcounts.data_refcount(run.start) == 2, "two guest clusters may have it, without a snapshot"
        with pytest.raises(CorruptionError, match="has refcount 0"):
            refcounts.data_refcount(engine.space.frontier)
        with pytest.raises(CorruptionError, match="mapped onto metadata"):
            refcounts.data_refcount(ClusterIndex(0))


class TestCorrecting:
    def test_each_way(self, engine: Engine) -> None:
        run = take_data(engine, 3)
        with changing(engine) as tables:
            tables.refcounts.correct(run.start, 1, 1, 5)
            tables.refcounts.correct(ClusterIndex(run.start + 1), 1, 1, 0)
        assert counts(engine, run) == [5, 0, 1]

    def test_what_nobody_refers_to_waits_as_metadata_does(self, engine: Engine) -> None:
        """S2: what it held is not known, and its old blocks may still be replayed."""
        run = take_data(engine, 2)
        with changing(engine) as tables:
            tables.refcounts.correct(run.start, 2, 1, 0)
        assert engine.public.changes.freed_metadata == [Run(run.start, 2)]
        assert not engine.public.changes.freed_data

    def test_what_turns_out_to_be_in_use_is_on_no_list(self, engine: Engine) -> None:
        run = take_data(engine, 2)
        with changing(engine) as tables:
            tables.refcounts.correct(run.start, 2, 1, 0)
        engine.space.forget_frees([run])
        engine.space.unknown.add(run.start, 2)
        with changing(engine) as tables:
            tables.refcounts.correct(run.start, 1, 0, 1)
        assert list(engine.space.unknown) == [Run(ClusterIndex(run.start + 1), 1)]

    def test_more_than_the_width_holds(self) -> None:
        engine = new_engine(refcount_order=1)
        run = take_data(engine)
        with pytest.raises(UnsupportedFeatureError, match="above 3"), changing(engine) as tables:
            tables.refcounts.correct(run.start, 1, 1, 4)
        assert counts(engine, run) == [1]


def pack(engine: Engine, length: int) -> tuple[HostOffset, Run | None]:
    """Pack one compressed cluster of this length, whole."""
    with changing(engine) as tables:
        host, run = tables.refcounts.take_packed(length)
        tables.refcounts.count_in_packed(host, length, run)
    return host, run


class TestPacking:
    """R4."""

    CLUSTER = 4096

    @pytest.fixture
    def engine(self) -> Engine:
        return new_engine(cluster_bytes=self.CLUSTER)

    def test_behind_what_was_packed_last(self, engine: Engine) -> None:
        """Whole sectors; each is a reference to the host cluster."""
        first, run = pack(engine, 700)
        assert run is not None and first == run.start * self.CLUSTER
        assert pack(engine, 1) == (first + 2 * SECTOR, None)
        assert pack(engine, SECTOR) == (first + 3 * SECTOR, None)
        assert engine.public.refcounts.get(run.start) == 3

    def test_into_the_next_cluster_where_that_follows(self, engine: Engine) -> None:
        """It is counted in both."""
        first, run = pack(engine, 3000)
        host, next_run = pack(engine, 3000)
        assert run is not None and next_run is not None and next_run.start == run.start + 1
        assert host == first + 6 * SECTOR
        refcounts = engine.public.refcounts
        assert (refcounts.get(run.start), refcounts.get(next_run.start)) == (2, 1)

    def test_elsewhere_where_another_cluster_follows(self, engine: Engine) -> None:
        _, run = pack(engine, 3000)
        take_data(engine)
        host, next_run = pack(engine, 3000)
        assert run is not None and next_run is not None
        assert host == next_run.start * self.CLUSTER and engine.public.refcounts.get(run.start) == 1

    def test_not_where_the_refcount_has_no_room(self) -> None:
        engine = new_engine(cluster_bytes=self.CLUSTER, refcount_order=0)
        first, _ = pack(engine, 100)
        second, run = pack(engine, 100)
        assert run is not None and second == run.start * self.CLUSTER != first

    def test_a_full_cluster_is_left(self, engine: Engine) -> None:
        first, _ = pack(engine, 3 * SECTOR)
        assert pack(engine, 5 * SECTOR) == (first + 3 * SECTOR, None)
        host, run = pack(engine, 1)
        assert run is not None and host == run.start * self.CLUSTER == first + self.CLUSTER

    def test_never_after_its_cluster_was_freed(self, engine: Engine) -> None:
        first, run = pack(engine, 100)
        assert run is not None
        with changing(engine) as tables:
            tables.refcounts.release(run.start)
        host, other = pack(engine, 100)
        assert other is not None and host // self.CLUSTER != first // self.CLUSTER

    def test_still_where_another_reference_is_left(self, engine: Engine) -> None:
        first, run = pack(engine, 100)
        pack(engine, 100)
        assert run is not None
        with changing(engine) as tables:
            tables.refcounts.release(run.start)
        assert pack(engine, 100) == (first + 2 * SECTOR, None)

    def test_never_after_the_packing_was_undone(self, engine: Engine) -> None:
        """Nothing durable names its sectors, but the cluster is unknown and may be given back."""
        pack(engine, 100)
        before = engine.public.changes.packed_end
        with pytest.raises(OSError), changing(engine) as tables:
            host, run = tables.refcounts.take_packed(100)
            tables.refcounts.count_in_packed(host, 100, run)
            raise OSError(errno.EIO, "undone")
        host, run = pack(engine, 100)
        assert run is not None and host != before

    def test_goes_on_in_the_next_record(self, engine: Engine) -> None:
        first, _ = pack(engine, 100)
        flush(engine)
        assert pack(engine, 100) == (first + SECTOR, None)


class TestSearching:
    """Free clusters below the end of the file, that an earlier session left."""

    @pytest.fixture
    def engine(self) -> Engine:
        """Leave gaps of free clusters that nobody listed, in two blocks of refcounts."""
        engine = new_engine()
        run = take_data(engine, 2 * PER_BLOCK)
        with changing(engine) as tables:
            for start, count in ((10, 2), (20, 3), (PER_BLOCK + 100, 5)):
                tables.refcounts.release(ClusterIndex(run.start + start), count)
        flush(engine)
        self.start = run.start
        for pool in (engine.space._released, engine.space._settling):
            pool.clear()
        engine.space.zero_safe.discard(0, engine.space.frontier)
        engine.space.search_at, engine.space.search_end = run.start, engine.space.frontier
        return engine

    def found(self, engine: Engine) -> list[tuple[int, int]]:
        return [(run.start - self.start, run.count) for run in engine.space.unknown]

    def test_block_by_block(self, engine: Engine) -> None:
        """It stops at the first block that has some: the rest is searched when those are used up."""
        space, refcounts = engine.space, engine.public.refcounts
        refcounts.search_if_short()
        assert self.found(engine) == [(10, 2), (20, 3)]
        assert space.search_at % PER_BLOCK == 0
        refcounts.search_if_short()
        assert self.found(engine) == [(10, 2), (20, 3)], "there are some"
        while space.unknown:
            space.unknown.take(100)
        refcounts.search_if_short()
        assert self.found(engine) == [(PER_BLOCK + 100, 5)]

    def test_only_when_short(self, engine: Engine) -> None:
        engine.space.zero_safe.add(1 << 20, RECYCLE_CLUSTERS)
        engine.public.refcounts.search_if_short()
        assert not engine.space.unknown and engine.space.search_at == self.start

    def test_what_is_listed_is_left_out(self, engine: Engine) -> None:
        engine.space.retire([Run(ClusterIndex(self.start + 21), 1)])
        engine.public.refcounts.search_if_short()
        assert self.found(engine) == [(10, 2), (20, 1), (22, 1)]

    def test_the_journal_is_left_out(self, engine: Engine) -> None:
        """S4: its clusters have refcount 0 too."""
        engine.space.search_at = 0
        engine.public.refcounts.search_if_short()
        (reserved,) = engine.space.reserved
        assert 0 < reserved.start < self.start and engine.space.unknown
        for run in engine.space.unknown:
            assert run.start >= reserved.start + reserved.count or run.start + run.count <= reserved.start

    def test_not_past_its_end(self, engine: Engine) -> None:
        """F1: while refcounts may be too low nothing is found."""
        engine.space.search_end = ClusterIndex(self.start + 21)
        engine.public.refcounts.search_if_short()
        assert self.found(engine) == [(10, 2), (20, 1)]

    def test_a_few_blocks_at_a_time(self, engine: Engine) -> None:
        """Then the file grows instead."""
        take_data(engine, (SCAN_BLOCKS_PER_TAKE + 2) * PER_BLOCK)
        start = -(-engine.space.frontier // PER_BLOCK) * PER_BLOCK - (SCAN_BLOCKS_PER_TAKE + 1) * PER_BLOCK
        engine.space.search_at, engine.space.search_end = start, engine.space.frontier
        engine.public.refcounts.search_if_short()
        assert engine.space.search_at == start + SCAN_BLOCKS_PER_TAKE * PER_BLOCK
        assert not engine.space.unknown
