"""The pools of free clusters: who may be handed out, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

import jqcow
from jqcow.engine.clusters import Run
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import ChangeSet, Undone
from jqcow.engine.request import Guard, Request
from jqcow.engine.space import RECYCLE_CLUSTERS, Space
from jqcow.image.journals import FarJournal
from jqcow.ondisk.layout import ClusterIndex, Geometry, HostOffset
from jqcow.testing import SimulatedDevice
from tests.support.qemu import done

CLUSTER = 512
GEOMETRY = Geometry(9)


def run(start: int, count: int = 1, *, zero_safe: bool = False) -> Run:
    return Run(ClusterIndex(start), count, zero_safe)


class Pools:
    """The space of a device of so many clusters, none of which is listed."""

    def __init__(self, clusters: int, *, can_punch: bool = True) -> None:
        self.device = SimulatedDevice(b"\xaa" * (clusters * CLUSTER), can_punch=can_punch)
        self.medium = Medium(self.device)
        self.guard = Guard(self.medium)
        self.space = Space(self.medium, GEOMETRY, self.guard)
        self.space.frontier = ClusterIndex(clusters)

    def free(self, *, data: int | None = None, metadata: int | None = None) -> ChangeSet:
        """Free a cluster as an operation does; the change set will travel in a record."""
        changes = ChangeSet(GEOMETRY)
        for cluster, frees in ((data, changes.freed_data), (metadata, changes.freed_metadata)):
            if cluster is not None:
                frees.append(run(cluster))
                self.space._freed.add(cluster, 1)
        return changes

    def recycle(self, *, refill: bool = False) -> list[Run]:
        """Punch what may be punched, as the log does."""
        runs = self.space.start_recycling(refill=refill)
        for each in runs:
            punched = self.medium.punch(HostOffset(each.start * CLUSTER), each.count * CLUSTER)
            self.space.host_punches = punched
            self.space.end_recycling(each, punched=punched)
        return runs

    def barrier(self) -> None:
        self.medium.barrier("test")

    def listed(self, cluster: int) -> bool:
        return self.space.is_listed(ClusterIndex(cluster))


@pytest.fixture
def pools() -> Pools:
    return Pools(16)


class TestFrees:
    def test_data_frees_wait_for_their_record(self, pools: Pools) -> None:
        """S1: freed, released, given back, and settled by a barrier."""
        space = pools.space
        changes = pools.free(data=3)
        assert pools.listed(3) and not pools.recycle() and space.take(1).start == 16
        space.publish(changes, 1)
        assert pools.listed(3) and space.take(1).start == 17
        assert pools.recycle() == [run(3)]
        assert pools.listed(3) and space.take(1).start == 18
        pools.barrier()
        assert space.take(1) == run(3, zero_safe=True)
        assert pools.medium.pread(CLUSTER, HostOffset(3 * CLUSTER)) == bytes(CLUSTER)
        space.count_in(run(3))
        assert not pools.listed(3)

    def test_old_metadata_wait_for_the_next_epoch(self, pools: Pools) -> None:
        """S2: replay may write their old blocks until a later epoch says that theirs is home."""
        space = pools.space
        space.publish(pools.free(metadata=2), 1)
        for _ in range(3):
            space.publish(ChangeSet(GEOMETRY), 1)
            assert not pools.recycle()
            pools.barrier()
            assert pools.listed(2) and 2 not in space.zero_safe
        space.publish(ChangeSet(GEOMETRY), 2)
        assert pools.recycle() == [run(2)]
        pools.barrier()
        assert 2 in space.zero_safe

    def test_frees_wait_for_requests_that_began_before_their_record(self, pools: Pools) -> None:
        """S6: whoever began since then cannot have found the cluster in a table."""
        requests = [Request() for _ in range(3)]
        for request in requests:
            request.running.acquire()
        pools.guard.begin(requests[0])
        pools.guard.begin(requests[1])
        pools.space.publish(pools.free(data=3), 1)
        pools.guard.begin(requests[2])
        for request in requests[:2]:
            assert not pools.recycle() and pools.listed(3)
            pools.guard.end(request)
        assert pools.recycle() == [run(3)], "the third one began later"

    def test_retired_clusters_wait_for_requests_too(self, pools: Pools) -> None:
        request = Request()
        request.running.acquire()
        pools.guard.begin(request)
        pools.space.retire([run(3)])
        pools.barrier()
        assert not pools.recycle()
        pools.guard.end(request)
        assert pools.recycle() == [run(3)]

    def test_what_brings_clusters_back_is_counted(self, pools: Pools) -> None:
        pools.space.publish(ChangeSet(GEOMETRY), 1)
        assert pools.space.reuses == 1
        pools.space.undo(Undone([], []))
        assert pools.space.reuses == 2


class TestFrontier:
    def test_past_the_end_is_zero_safe(self, pools: Pools) -> None:
        """S3: the frontier never goes back."""
        first = pools.space.take(3)
        assert first == run(16, 3, zero_safe=True)
        pools.space.give_back([first])
        assert pools.space.take(1) == run(19, zero_safe=True)
        assert pools.space.take_at_frontier(2) == run(20, 2, zero_safe=True)

    def test_reserved_range_is_never_handed_out(self, pools: Pools) -> None:
        """S4; a range that was given up is free under the next barrier."""
        space = pools.space
        space.reserve(HostOffset(16 * CLUSTER), 16 * CLUSTER)
        assert space.frontier == 32 and all(pools.listed(cluster) for cluster in range(16, 32))
        assert space.take(1).start == 32
        space.unreserve(HostOffset(16 * CLUSTER), 16 * CLUSTER)
        assert pools.listed(16) and not pools.recycle()
        pools.barrier()
        assert pools.recycle() == [run(16, 16)]
        assert space.take(1).start == 33
        pools.barrier()
        assert space.take(3) == run(16, 3, zero_safe=True)


class TestFailures:
    def test_undone_operation(self, pools: Pools) -> None:
        """S3: what it took may hold its bytes; what it freed is in use."""
        space = pools.space
        taken = space.take(2)
        space.count_in(taken)
        pools.free(data=1)
        pools.free(metadata=2)
        space.undo(Undone([taken], [run(1), run(2)]))
        assert not pools.listed(1) and not pools.listed(2)
        assert list(space.unknown) == [run(16, 2)]
        assert space.take(1).start == 18, "not zero-safe: for ordered data alone"
        assert space.take(1, ordered=True) == run(16)

    def test_failed_request(self, pools: Pools) -> None:
        """What it counted belongs to its operation; the rest is unknown, once."""
        space = pools.space
        counted, lent = space.take(2), space.take(3)
        space.count_in(counted)
        for _ in range(2):
            space.give_back([counted, lent])
        assert list(space.unknown) == [run(18, 3)]

    def test_abandoned_clusters_wait_for_a_barrier(self, pools: Pools) -> None:
        """S5: a failed record that comes back to life finds the clusters that it names untouched."""
        taken = pools.space.take(2)
        pools.medium.pwrite(b"of the transaction", HostOffset(16 * CLUSTER))
        pools.space.retire([taken])
        assert not pools.recycle() and pools.space.take(2).start == 18
        assert pools.medium.pread(18, HostOffset(16 * CLUSTER)) == b"of the transaction"
        pools.barrier()
        assert pools.recycle() == [run(16, 2)]

    def test_many_small_runs_are_retired_as_few(self, pools: Pools) -> None:
        """Each run is punched by a call of its own."""
        pools.space.retire([pools.space.take(1) for _ in range(100)])
        pools.barrier()
        assert pools.recycle() == [run(16, 100)]

    def test_withdrawn_clusters_are_on_no_list(self, pools: Pools) -> None:
        space = pools.space
        space.unknown.add(2, 4)
        space.zero_safe.add(8, 2)
        space.withdraw(ClusterIndex(3), 6)
        assert list(space.unknown) == [run(2)] and list(space.zero_safe) == [run(9)]


class TestRecycling:
    def test_it_destroys_no_more_than_needed(self, pools: Pools) -> None:
        pools.space.unknown.add(0, 16)
        assert pools.recycle(refill=False) == []
        assert pools.recycle(refill=True) == [run(0, RECYCLE_CLUSTERS)]
        assert pools.recycle(refill=True) == [], "some are on their way"
        pools.barrier()
        assert pools.recycle(refill=True) == [], "not short"
        assert pools.space.take(100) == run(0, RECYCLE_CLUSTERS, zero_safe=True)
        assert pools.recycle(refill=True) == [run(RECYCLE_CLUSTERS, 8)]

    def test_while_it_runs_they_are_on_no_other_list(self, pools: Pools) -> None:
        pools.space.unknown.add(3, 1)
        assert pools.space.start_recycling(refill=True) == [run(3)]
        assert pools.listed(3) and not pools.space.unknown
        assert pools.space.start_recycling(refill=True) == []
        pools.barrier()
        assert not pools.space.zero_safe, "the punching is not known to have happened"

    def test_punched_during_a_barrier(self, pools: Pools) -> None:
        """S3, M3: the punch may be lost; the cluster is zero-safe under the next barrier."""
        pools.space.unknown.add(3, 1)

        def recycle(*_: object) -> None:
            pools.recycle(refill=True)

        pools.device.barrier_listeners.append(recycle)
        pools.barrier()
        pools.device.barrier_listeners.clear()
        assert pools.listed(3) and 3 not in pools.space.zero_safe
        pools.barrier()
        assert 3 in pools.space.zero_safe

    def test_given_up_during_a_barrier(self, pools: Pools) -> None:
        """M3: the barrier does not cover the root that no longer names them."""
        pools.device.barrier_listeners.append(lambda *_: pools.space.retire([run(3)]))
        pools.barrier()
        pools.device.barrier_listeners.clear()
        assert not pools.recycle() and pools.listed(3)
        pools.barrier()
        assert pools.recycle() == [run(3)]

    def test_what_cannot_be_punched_is_unknown(self, pools: Pools) -> None:
        pools.space.publish(pools.free(data=3), 1)
        (each,) = pools.space.start_recycling(refill=False)
        pools.space.end_recycling(each, punched=False)
        pools.barrier()
        assert list(pools.space.unknown) == [run(3)] and not pools.space.zero_safe

    def test_a_host_that_never_punches(self) -> None:
        """They are handed out, as not zero-safe: their data is ordered before the record."""
        pools = Pools(16, can_punch=False)
        pools.space.publish(pools.free(data=3), 1)
        pools.recycle()
        assert pools.space.take(4) == run(3)
        pools.space.unknown.add(5, 1)
        assert pools.recycle(refill=True) == []

    def test_what_the_refcounts_call_free_is_unknown(self, pools: Pools) -> None:
        """A hole that the host shows is no proof: the punching may have been lost in a failed barrier."""
        pools.medium.punch(HostOffset(4 * CLUSTER), 2 * CLUSTER)
        pools.barrier()
        pools.space.add_found(ClusterIndex(3), 4)
        assert list(pools.space.unknown) == [run(3, 4)] and not pools.space.zero_safe


# A journal that is laid far behind the end of the file


def test_what_is_left_before_a_journal_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    jqcow.create(path, 64 << 20).close()
    with jqcow.open(path, "r+", journal_size=FarJournal(65536)) as image:
        image.pwrite(b"\x11" * (3 << 20), 0)
        image.flush()
        assert path.stat().st_size > 1 << 30
        image.create_snapshot("one")
        first, *others = image.extents(3 << 20, 0)
    # The L2 table has the first free cluster, and no journal divides the data.
    assert (first.host_offset, first.length, others) == (5 * 65536, 3 << 20, [])
    assert path.stat().st_size < 5 << 20
    done("qemu-img", "check", path)


def test_what_does_not_fit_before_a_journal_lies_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    jqcow.create(path, 64 << 20).close()
    with jqcow.open(path, "r+", journal_size=FarJournal(65536, distance_bytes=1 << 20)) as image:
        for offset in range(0, 4 << 20, 1 << 18):
            image.pwrite(b"\x11" * (1 << 18), offset)
            image.flush()
    done("qemu-img", "check", path)
    with jqcow.open(path) as image:
        assert image.pread(4 << 20, 0) == b"\x11" * (4 << 20)
