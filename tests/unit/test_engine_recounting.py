"""Refcounts in another width: the new structure counts itself, the old one is free, nothing else changes."""

from __future__ import annotations

import errno

import pytest

from jqcow.engine.engine import Engine
from jqcow.engine.recounting import Recounting
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk.layout import ClusterIndex
from jqcow.testing import Fault, FaultPlan
from tests.unit.engines import (
    PER_BLOCK,
    changing,
    check,
    counts,
    device_of,
    flush,
    map_one,
    new_engine,
    take_data,
)

ORDERS = range(7)


def recount(engine: Engine, order: int) -> None:
    with changing(engine) as tables:
        Recounting(tables, order).stage()


@pytest.mark.parametrize("order", ORDERS)
def test_every_width_counts_the_same(order: int) -> None:
    engine = new_engine()
    with changing(engine) as tables:
        mapped = [map_one(tables, guest) for guest in range(0, 40, 3)]
    recount(engine, order)
    assert engine.public.view.header.refcount_order == order
    assert all(engine.public.refcounts.get(cluster) == 1 for cluster in mapped)
    assert check(engine).ok
    flush(engine)
    assert check(engine).ok


def test_what_follows_counts_in_the_new_width() -> None:
    engine = new_engine()
    recount(engine, 6)
    flush(engine)
    with changing(engine) as tables:
        cluster = map_one(tables)
        tables.refcounts.correct(cluster, 1, 1, 1 << 40)
    assert engine.public.refcounts.get(cluster) == 1 << 40
    assert engine.public.refcounts.largest == (1 << 64) - 1


def test_a_width_that_holds_no_refcount_that_is_there_changes_nothing() -> None:
    engine = new_engine()
    with changing(engine) as tables:
        cluster = map_one(tables)
        tables.refcounts.share(cluster, 1)
        tables.refcounts.share(cluster, 1)
    before = device_of(engine).content()
    with pytest.raises(UnsupportedFeatureError, match="above 1") as refused:
        recount(engine, 0)
    place = engine.geometry.offset_of(cluster)
    assert f"the cluster at host offset {place:#x} has refcount 3" in str(refused.value)
    assert device_of(engine).content() == before
    assert engine.public.view.header.refcount_order == 4
    recount(engine, 1)
    assert engine.public.refcounts.get(cluster) == 3


def test_a_gap_between_counted_clusters_has_no_block() -> None:
    engine = new_engine()
    with engine.medium.lock:
        engine.space.take_at_frontier(8 * PER_BLOCK)
    far = take_data(engine)
    recount(engine, 5)
    indices = {index for index, _ in engine.public.refcounts.blocks_from_top()}
    gap = ClusterIndex(5 * PER_BLOCK)
    assert counts(engine, far) == [1]
    assert gap // engine.public.refcounts.geometry.refcounts_per_cluster not in indices
    with changing(engine) as tables:
        tables.refcounts.correct(gap, 1, 0, 1)
    assert engine.public.refcounts.get(gap) == 1


def test_the_old_structure_is_freed_as_metadata_and_a_leak_there_stays() -> None:
    engine = new_engine()
    header = engine.public.view.header
    table = engine.geometry.cluster_of(header.refcount_table_offset)  # type: ignore[arg-type]
    block = engine.geometry.cluster_of(engine.public.refcounts.refcount_block(0))
    with changing(engine) as tables:
        tables.refcounts.share(block, 1)
    recount(engine, 3)
    assert (engine.public.refcounts.get(table), engine.public.refcounts.get(block)) == (0, 1)
    freed = engine.public.changes.freed_metadata
    assert any(run.start <= table < run.start + run.count for run in freed)
    assert not any(run.start <= block < run.start + run.count for run in freed)


def test_a_structure_that_is_not_counted_is_refused() -> None:
    engine = new_engine()
    block = engine.geometry.cluster_of(engine.public.refcounts.refcount_block(0))
    with changing(engine) as tables:
        tables.refcounts.correct(block, 1, 1, 0)
    with pytest.raises(CorruptionError, match="refcount 0"):
        recount(engine, 3)


def test_a_full_disk_leaves_the_old_width() -> None:
    engine = new_engine()
    with changing(engine) as tables:
        mapped = map_one(tables)
    device_of(engine).faults = FaultPlan(Fault(errno.ENOSPC, at=2))
    with pytest.raises(OSError, match="No space"):
        recount(engine, 6)
    device_of(engine).faults = None
    assert engine.public.view.header.refcount_order == 4
    assert engine.public.refcounts.get(mapped) == 1
    recount(engine, 6)
    flush(engine)
    assert check(engine).ok


def test_refcounts_that_no_kernel_adds_at_once_are_kept() -> None:
    engine = new_engine(refcount_order=6)
    with changing(engine) as tables:
        run = tables.refcounts.take(3)
        tables.refcounts.count_in(run)
    for value in ((1 << 62) + 5, (1 << 64) - 1):
        with changing(engine) as tables:
            piece = next(tables.refcounts._edited_pieces(run.start, 1))
            data = tables.view.edit(piece.block)
            data[piece.position * 8 : piece.position * 8 + 8] = value.to_bytes(8, "big")
        with changing(engine) as tables:
            recounting = Recounting(tables, 6)
            recounting.stage()
        assert counts(engine, run)[0] == value
