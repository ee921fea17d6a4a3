"""Sets of clusters kept as sorted runs."""

from __future__ import annotations

import itertools
import random

import pytest

from jqcow.engine import clusters
from jqcow.engine.clusters import ClusterRuns, Run, UnwrittenParts
from jqcow.ondisk.layout import ClusterIndex


def test_against_a_set() -> None:
    """Adding, taking and discarding in any order: the same clusters as in a set, always joined."""
    chance = random.Random(1)
    runs, model = ClusterRuns(), set[int]()
    for _ in range(3000):
        start, count = chance.randrange(300), chance.randrange(1, 6)
        new = set(range(start, start + count))
        action = chance.random()
        if action < 0.6:
            if new & model:
                with pytest.raises(RuntimeError, match="listed already"):
                    runs.add(start, count)
            else:
                runs.add(start, count)
                model |= new
        elif action < 0.75:
            runs.discard(start, count)
            model -= new
        elif model:
            run = runs.take(count)
            taken = set(range(run.start, run.start + run.count))
            assert run.start == min(model) and taken <= model
            model -= taken
        assert bool(runs) == bool(model)
        assert runs.holds(0) and runs.holds(1) == bool(model)
        assert runs.holds(len(model)) and not runs.holds(len(model) + 1)
        listed = [range(run.start, run.start + run.count) for run in runs]
        assert {cluster for part in listed for cluster in part} == model
        assert all(left.stop < right.start for left, right in itertools.pairwise(listed))
    assert all((cluster in runs) == (cluster in model) for cluster in range(310))


def test_runs_that_lie_side_by_side_are_joined() -> None:
    runs = ClusterRuns(Run(ClusterIndex(start), 2) for start in (4, 0, 2))
    assert list(runs) == [Run(ClusterIndex(0), 6)]


def test_a_part_stays_zero_safe_until_somebody_plans_to_write_it() -> None:
    unwritten, cluster = UnwrittenParts(), ClusterIndex(9)
    unwritten.taken(cluster, 32, zero_safe=True)
    assert unwritten.plan_to_write(cluster, range(3, 5))
    assert not unwritten.plan_to_write(cluster, range(4, 6))
    assert not unwritten.plan_to_write(cluster, range(5, 6))
    assert unwritten.plan_to_write(cluster, range(6, 32))
    assert unwritten.plan_to_write(cluster, range(3)) and not unwritten
    unwritten.taken(cluster, 32, zero_safe=True)
    unwritten.taken(cluster, 32, zero_safe=False)
    assert not unwritten.plan_to_write(cluster, range(1))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "UNWRITTEN_MAX", 4)
    unwritten = UnwrittenParts()
    for cluster in map(ClusterIndex, range(10)):
        unwritten.taken(cluster, 32, zero_safe=True)
    assert len(unwritten) == 4 and unwritten.plan_to_write(ClusterIndex(9), range(32))
    assert not unwritten.plan_to_write(ClusterIndex(0), range(32))
