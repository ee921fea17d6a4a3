"""The pools of free clusters: who may be handed out, and when."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from jqcow.engine.medium import Medium
from jqcow.engine.space import RECYCLE_CLUSTERS, ClusterRuns, Run, Space
from jqcow.ondisk.layout import Geometry
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

CLUSTER = 512
GEOMETRY = Geometry(9)


class TestClusterRuns:
    def test_against_a_set(self) -> None:
        """Adding and taking in any order: the same clusters as in a set, always joined."""
        chance = random.Random(1)
        runs, model = ClusterRuns(), set[int]()
        for _ in range(3000):
            if chance.random() < 0.7:
                start, count = chance.randrange(300), chance.randrange(1, 6)
                new = set(range(start, start + count))
                if new & model:
                    with pytest.raises(RuntimeError, match="listed already"):
                        runs.add(start, count)
                else:
                    runs.add(start, count)
                    model |= new
            elif model:
                start, count = runs.take(chance.randrange(1, 6))
                taken = set(range(start, start + count))
                assert start == min(model) and taken <= model
                model -= taken
            assert bool(runs) == bool(model)
            assert runs.holds(0) and runs.holds(1) == bool(model)
            assert runs.holds(len(model)) and not runs.holds(len(model) + 1)
            listed = [range(start, start + count) for start, count in runs]
            assert {cluster for part in listed for cluster in part} == model
            assert all(left.stop < right.start for left, right in itertools.pairwise(listed))
        assert all((cluster in runs) == (cluster in model) for cluster in range(310))


def cluster_count(runs: ClusterRuns) -> int:
    return sum(length for _, length in runs)


def make_space_on_device(
    clusters: int = 0, *, can_punch: bool = True
) -> tuple[Space, Medium, SimulatedDevice]:
    device = SimulatedDevice(b"\xaa" * (clusters * CLUSTER), can_punch=can_punch)
    medium = Medium(device)
    space = Space(medium, GEOMETRY)
    space.frontier = clusters
    return space, medium, device


def make_space(clusters: int = 0, *, can_punch: bool = True) -> tuple[Space, Medium]:
    space, medium, _ = make_space_on_device(clusters, can_punch=can_punch)
    return space, medium


class TestSpace:
    def test_past_the_end_is_zero_safe_until_something_was_there(self) -> None:
        """S3: after a write past the end, and without a barrier since, old bytes may show up there."""
        space, medium = make_space(4)
        assert space.take(3) == Run(4, 3, zero_safe=True)
        medium.pwrite(b"x" * 20 * CLUSTER, 7 * CLUSTER)
        medium.shrink(7 * CLUSTER)
        assert space.take(1) == Run(7, 1, zero_safe=False)
        medium.barrier("test")
        assert space.take(1) == Run(8, 1, zero_safe=True)

    def test_data_frees_wait_for_their_record(self) -> None:
        """S1: staged, in flight, released, given back, and settled by a barrier."""
        space, medium = make_space(8)
        space.begin()
        space.free_data(3)
        space.finish()
        assert space.is_pending(3)
        space.cut()
        assert space.is_pending(3) and space.take(1).start == 8
        space.publish(epoch=1)
        assert space.is_pending(3) and space.take(1).start == 9
        space.give_back()
        assert space.is_pending(3) and space.take(1).start == 10
        medium.barrier("test")
        assert space.take(1) == Run(3, 1, zero_safe=True)
        assert not space.is_pending(3)
        assert medium.pread(CLUSTER, 3 * CLUSTER) == bytes(CLUSTER)

    def test_metadata_frees_wait_for_the_next_epoch(self) -> None:
        """S2: replay may write their old blocks until a later epoch says that theirs is home."""
        space, medium = make_space(8)
        space.begin()
        space.free_metadata(2)
        space.finish()
        space.cut()
        space.publish(epoch=1)
        for _ in range(3):
            space.cut()
            space.publish(epoch=1)
            space.give_back()
            medium.barrier("test")
            assert space.is_pending(2) and 2 not in space.zero_safe
        space.cut()
        space.publish(epoch=2)
        space.give_back()
        medium.barrier("test")
        assert 2 in space.zero_safe

    def test_failed_record_keeps_its_frees_staged(self) -> None:
        space, medium = make_space(8)
        space.free_data(3)
        space.free_metadata(4)
        space.cut()
        space.free_data(5)
        space.uncut()
        space.give_back()
        medium.barrier("test")
        assert all(space.is_pending(cluster) for cluster in (3, 4, 5))
        assert not space.zero_safe and not space.unknown
        space.cut()
        space.publish(epoch=1)
        space.give_back()
        medium.barrier("test")
        assert [cluster in space.zero_safe for cluster in (3, 4, 5)] == [True, False, True]

    def test_failed_operation_leaves_unknown_clusters(self) -> None:
        """S3: what it took may hold its bytes; what it freed is not free."""
        space, medium = make_space(4)
        space.begin()
        run = space.take(2)
        space.free_data(1)
        medium.pwrite(b"half written", run.start * CLUSTER)
        space.roll_back()
        assert not space.is_pending(1)
        assert list(space.unknown) == [(4, 2)]
        # Asked for again, they are punched first, and handed out after a barrier.
        assert space.take(1) == Run(6, 1, zero_safe=True)
        medium.barrier("test")
        assert space.take(1) == Run(4, 1, zero_safe=True)

    def test_rolling_back_twice_or_without_an_operation(self) -> None:
        space, _ = make_space(4)
        space.roll_back()
        space.begin()
        space.roll_back()
        space.roll_back()
        assert not space.unknown

    def test_without_punching_free_clusters_are_unknown(self) -> None:
        """They are handed out, as not zero-safe: their data is ordered before the record."""
        space, medium = make_space(8, can_punch=False)
        space.free_data(3)
        space.cut()
        space.publish(epoch=1)
        space.give_back()
        medium.barrier("test")
        assert space.take(4) == Run(3, 1, zero_safe=False)

    def test_recycling_destroys_no_more_than_needed(self) -> None:
        space, medium = make_space(64)
        space.unknown.add(10, 50)
        space.take(1)
        space.take(100)
        assert cluster_count(space.unknown) == 50 - RECYCLE_CLUSTERS
        medium.barrier("test")
        assert cluster_count(space.zero_safe) == RECYCLE_CLUSTERS
        assert space.take(100) == Run(10, RECYCLE_CLUSTERS, zero_safe=True)
        assert cluster_count(space.unknown) == 50 - RECYCLE_CLUSTERS
        space.take(1)
        assert cluster_count(space.unknown) == 50 - 2 * RECYCLE_CLUSTERS

    def test_what_the_refcounts_call_free_is_unknown(self) -> None:
        """A hole that the host shows is no proof: the punching may have been lost in a failed barrier."""
        space, medium = make_space(16)
        medium.punch(4 * CLUSTER, 2 * CLUSTER)
        medium.barrier("test")
        space.add_found(3, 4)
        assert not space.zero_safe
        assert list(space.unknown) == [(3, 4)]

    def test_reserved_range_is_never_handed_out(self) -> None:
        """S4; a range that was given up is free under the next barrier."""
        space, medium = make_space(4)
        space.reserve(4 * CLUSTER, 16 * CLUSTER)
        assert space.frontier == 20
        assert all(space.is_pending(cluster) for cluster in range(4, 20))
        assert space.take(1).start == 20
        space.retire(4 * CLUSTER, 16 * CLUSTER)
        assert space.is_pending(4) and space.take(1).start == 21
        medium.barrier("test")
        assert space.take(1).start == 22
        space.give_back()
        medium.barrier("test")
        assert space.take(3) == Run(4, 3, zero_safe=True)


class TestWaitingForABarrier:
    """M3: a barrier covers what was done before it started, whoever else has one under way."""

    def test_punched_during_a_barrier(self) -> None:
        """S3: the punch may be lost; the cluster is zero-safe under the next barrier."""
        space, medium, device = make_space_on_device(8)
        space.unknown.add(3, 1)

        def recycle(*_: object) -> None:
            space.take(1)

        device.barrier_listeners.append(recycle)
        medium.barrier("test")
        device.barrier_listeners.clear()
        assert medium.pread(CLUSTER, 3 * CLUSTER) == bytes(CLUSTER)
        assert space.is_pending(3) and 3 not in space.zero_safe
        medium.barrier("test")
        assert 3 in space.zero_safe

    def test_journal_given_up_during_a_barrier(self) -> None:
        space, medium, device = make_space_on_device(4)
        space.reserve(4 * CLUSTER, 8 * CLUSTER)
        device.barrier_listeners.append(lambda *_: space.retire(4 * CLUSTER, 8 * CLUSTER))
        medium.barrier("test")
        device.barrier_listeners.clear()
        space.give_back()
        assert all(space.is_pending(cluster) for cluster in range(4, 12))
        assert medium.device.size() == 4 * CLUSTER and not device.changes
        medium.barrier("test")
        space.give_back()
        medium.barrier("test")
        assert list(space.zero_safe) == [(4, 8)]


class TestInterruptedPublishing:
    def test_what_waits_for_the_next_epoch_is_not_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """S2: an exception that comes at any time finds all of it done, or nothing."""
        space, _ = make_space(8)
        space.begin()
        space.free_data(2)
        space.free_metadata(3)
        space.finish()
        space.cut()

        def interrupted(_: ClusterRuns) -> Iterator[tuple[int, int]]:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(ClusterRuns, "__iter__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                space.publish(1)
        assert space.is_pending(2) and space.is_pending(3)
        space.publish(1)
        space.give_back()
        assert space.is_pending(3), "it waits for a frame of the next epoch"
        space.publish(2)
        space.give_back()
        space.medium.barrier("test")
        assert list(space.zero_safe) == [(2, 2)]


class TestFailedPunch:
    """The record that freed the cluster is durable: an error must not deny it."""

    def test_is_not_raised_when_clusters_are_given_back(self) -> None:
        space, medium, device = make_space_on_device(8)
        for cluster in (2, 4, 6):
            space.free_data(cluster)
        space.cut()
        space.publish(epoch=1)
        device.faults = FaultPlan(Fault(errno.EIO, at=2, call="punch"))
        space.give_back()
        assert device.faults.fired
        medium.barrier("test")
        assert (cluster_count(space.zero_safe), cluster_count(space.unknown)) == (2, 1)
        (failed,) = [start for start, _ in space.unknown]
        assert medium.pread(CLUSTER, failed * CLUSTER) == b"\xaa" * CLUSTER

    def test_is_raised_when_the_cluster_is_needed(self) -> None:
        """It stays listed, unknown, and the next allocation tries again."""
        space, medium, device = make_space_on_device(8)
        space.unknown.add(3, 1)
        device.faults = FaultPlan(Fault(errno.EIO, call="punch"))
        with pytest.raises(OSError) as caught:
            space.take(1)
        assert caught.value.errno == errno.EIO
        assert list(space.unknown) == [(3, 1)] and not space.zero_safe
        assert space.take(1).start == 8
        medium.barrier("test")
        assert space.take(1) == Run(3, 1, zero_safe=True)


class TestTransaction:
    def test_clusters_taken_back_are_used_again_within_it(self) -> None:
        """Its data is ordered, so they need not read as zeros; the file does not grow."""
        space, _ = make_space(8)
        space.begin_transaction()
        for _ in range(20):
            mark = space.mark()
            space.begin()
            taken = 0
            while taken < 30:
                taken += space.take(30 - taken).count
            space.finish()
            space.return_to(mark)
        assert space.frontier <= 8 + 30 + RECYCLE_CLUSTERS

    def test_a_rollback_of_many_small_changes_gives_back_few_runs(self) -> None:
        """Each run is punched by a call of its own."""
        space, medium = make_space(8)
        space.begin_transaction()
        for _ in range(100):
            change(space, take=1, data=[], metadata=[])
        space.abandon_transaction()
        medium.barrier("test")
        space.give_back()
        medium.barrier("test")
        assert list(space.zero_safe) == [(8, 100)]

    def test_fresh_clusters_are_closed_by_a_mark(self) -> None:
        """What a savepoint may come back to is not written in place."""
        space, _ = make_space(4)
        space.begin_transaction()
        assert space.fresh == set()
        space.fresh.add(7)
        mark = space.mark()
        assert space.fresh == set()
        space.fresh.add(8)
        space.return_to(mark)
        assert space.fresh == set()

    @pytest.mark.parametrize("end", [Space.end_transaction, Space.abandon_transaction])
    def test_outside_no_cluster_is_fresh_or_closed(self, end: Callable[[Space], None]) -> None:
        space, _ = make_space(4)
        assert space.fresh is None
        space.begin_transaction()
        end(space)
        assert space.fresh is None

    def test_return_to_a_mark(self) -> None:
        """What was taken since then is free with unknown content (S3); what was freed is in use."""
        space, _ = make_space(16)
        space.begin_transaction()
        change(space, take=2, data=[1], metadata=[2])
        mark = space.mark()
        for _ in range(2):
            taken = change(space, take=3, data=[3], metadata=[4])
            space.return_to(mark)
            assert [space.is_pending(cluster) for cluster in (1, 2, 3, 4)] == [True, True, False, False]
            assert list(space.unknown) == [(taken, 3)]
            assert not space.is_pending(16)
            # Out of the way of the next turn.
            space.unknown.take(3)

    def test_failed_operation_is_not_undone_again(self) -> None:
        """Its clusters are unknown already: listed twice they would be handed out twice."""
        space, _ = make_space(16)
        space.begin_transaction()
        mark = space.mark()
        space.begin()
        space.take(2)
        space.free_data(1)
        space.roll_back()
        change(space, take=1, data=[2], metadata=[])
        space.return_to(mark)
        assert list(space.unknown) == [(16, 3)]
        assert not space.is_pending(1) and not space.is_pending(2)

    def test_committed(self) -> None:
        """What it took is in use, what it freed goes the way of all frees."""
        space, medium = make_space(16)
        space.begin_transaction()
        change(space, take=2, data=[1], metadata=[])
        space.cut()
        space.publish(epoch=1)
        space.end_transaction()
        space.give_back()
        medium.barrier("test")
        assert list(space.zero_safe) == [(1, 1)] and not space.unknown
        assert space.take_at_frontier(1).start == 18

    def test_abandoned_waits_for_a_barrier(self) -> None:
        """S5: a failed record that comes back to life finds the clusters that it names untouched."""
        space, medium = make_space(16)
        space.begin_transaction()
        change(space, take=2, data=[1], metadata=[2])
        space.cut()
        medium.pwrite(b"of the transaction", 16 * CLUSTER)
        space.abandon_transaction()
        space.abandon_transaction()
        assert space.fresh is None
        assert not space.is_pending(1) and not space.is_pending(2)
        space.give_back()
        assert space.is_pending(16) and space.take(2).start == 18
        assert medium.pread(18, 16 * CLUSTER) == b"of the transaction"
        medium.barrier("test")
        assert space.take(2).start == 20
        space.give_back()
        assert medium.pread(18, 16 * CLUSTER) == bytes(18)
        assert space.take(2).start == 22
        medium.barrier("test")
        assert space.take(2) == Run(16, 2, zero_safe=True)

    def test_abandoned_frees_do_not_travel_in_the_next_record(self) -> None:
        space, medium = make_space(16)
        space.begin_transaction()
        change(space, take=1, data=[1], metadata=[2])
        space.cut()
        change(space, take=1, data=[3], metadata=[4])
        space.abandon_transaction()
        space.uncut()
        for epoch in (1, 2):
            space.cut()
            space.publish(epoch)
            medium.barrier("test")
            space.give_back()
            medium.barrier("test")
        assert not any(space.is_pending(cluster) for cluster in (1, 2, 3, 4))

    def test_marks_are_of_an_open_transaction(self) -> None:
        space, _ = make_space(16)
        with pytest.raises(RuntimeError, match="no transaction"):
            space.mark()
        space.begin_transaction()
        mark = space.mark()
        space.end_transaction()
        with pytest.raises(RuntimeError, match="no transaction"):
            space.return_to(mark)

    def test_outside_a_transaction_there_is_nothing_to_abandon(self) -> None:
        space, _ = make_space(16)
        change(space, take=1, data=[1], metadata=[2])
        space.abandon_transaction()
        assert space.is_pending(1) and space.is_pending(2)


def change(space: Space, *, take: int, data: list[int], metadata: list[int]) -> int:
    """One operation that succeeds: take clusters at the end, free some; return the first one taken."""
    space.begin()
    run = space.take_at_frontier(take)
    for cluster in data:
        space.free_data(cluster)
    for cluster in metadata:
        space.free_metadata(cluster)
    space.finish()
    return run.start
