"""The pools of free clusters: who may be handed out, and when."""

from __future__ import annotations

import itertools
import random

import pytest

from jqcow.engine.medium import Medium
from jqcow.engine.space import RECYCLE_CLUSTERS, ClusterRuns, Run, Space
from jqcow.ondisk.layout import Geometry
from jqcow.testing import SimulatedDevice

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
            assert runs.cluster_count == len(model) and bool(runs) == bool(model)
            listed = [range(start, start + count) for start, count in runs]
            assert {cluster for part in listed for cluster in part} == model
            assert all(left.stop < right.start for left, right in itertools.pairwise(listed))
        assert all((cluster in runs) == (cluster in model) for cluster in range(310))


def make_space(clusters: int = 0, *, can_punch: bool = True) -> tuple[Space, Medium]:
    device = SimulatedDevice(b"\xaa" * (clusters * CLUSTER), can_punch=can_punch)
    medium = Medium(device)
    space = Space(medium, GEOMETRY)
    space.frontier = clusters
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
        assert space.unknown.cluster_count == 50 - RECYCLE_CLUSTERS
        medium.barrier("test")
        assert space.zero_safe.cluster_count == RECYCLE_CLUSTERS
        assert space.take(100) == Run(10, RECYCLE_CLUSTERS, zero_safe=True)
        assert space.unknown.cluster_count == 50 - RECYCLE_CLUSTERS
        space.take(1)
        assert space.unknown.cluster_count == 50 - 2 * RECYCLE_CLUSTERS

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
