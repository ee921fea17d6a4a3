"""Zero flags are put in other words, for all owners of a table at once; headers become another version's."""

from __future__ import annotations

import pytest

from jqcow.engine.amending import Amending
from jqcow.engine.engine import Engine
from jqcow.engine.snapshots import NewSnapshot
from jqcow.errors import CorruptionError
from jqcow.ondisk.header import COMPATIBLE_LAZY_REFCOUNTS
from jqcow.ondisk.l2 import DATA, NO_ENTRY, ZERO_CLUSTER, ZERO_ENTRY, L2Entry
from jqcow.ondisk.layout import GuestCluster, HostOffset
from tests.unit.engines import SECTOR, changing, check, flush, map_one, new_engine

SNAPSHOT = NewSnapshot("kept", 0, 0)


@pytest.fixture
def engine() -> Engine:
    """Cluster 0 is data, 1 zeros, and 2 zeros that keep a cluster."""
    engine = new_engine()
    with changing(engine) as tables:
        map_one(tables)
        kept = map_one(tables, 2)
        host = engine.geometry.offset_of(kept)
        tables.mapping.set_entries(GuestCluster(1), [ZERO_ENTRY, L2Entry(ZERO_CLUSTER, host, True)])
    return engine


def over_a_file(engine: Engine) -> None:
    with changing(engine) as tables:
        tables.view.set_area(tables.view.area.with_backing_file(b"base", b"raw"))


def convert(engine: Engine) -> int:
    with changing(engine) as tables:
        amending = Amending(tables, engine.data)
        for table in amending.l2_tables():
            amending.take_zero_flags(table)
        amending.set_copied_flags()
    return amending.converted


def entries(engine: Engine) -> list[L2Entry]:
    return [engine.public.mapping.l2_entry(GuestCluster(guest)) for guest in range(3)]


def test_without_a_backing_file_they_need_no_entry(engine: Engine) -> None:
    kept = engine.geometry.cluster_of(entries(engine)[2].host)
    assert convert(engine) == 2
    assert entries(engine)[1:] == [NO_ENTRY, NO_ENTRY]
    assert engine.public.refcounts.get(kept) == 0
    assert check(engine).ok


def test_over_a_backing_file_they_get_clusters_of_zeros(engine: Engine) -> None:
    over_a_file(engine)
    kept = engine.geometry.cluster_of(entries(engine)[2].host)
    assert convert(engine) == 2
    for entry in entries(engine)[1:]:
        assert (entry.kind, entry.copied) == (DATA, True)
        assert engine.medium.pread(SECTOR, entry.host) == bytes(SECTOR)
    assert engine.public.refcounts.get(kept) == 0
    assert check(engine).ok


def test_zeros_are_written_where_old_bytes_may_be(engine: Engine) -> None:
    over_a_file(engine)
    flush(engine)
    run = engine.space.take_at_frontier(2)
    engine.medium.pwrite(b"\xee" * 2 * SECTOR, engine.geometry.offset_of(run.start))
    engine.space.give_back([run])
    engine.space.host_punches = False
    assert convert(engine) == 2
    hosts = [entry.host for entry in entries(engine)[1:]]
    assert hosts[0] == engine.geometry.offset_of(run.start)
    assert all(engine.medium.pread(SECTOR, host) == bytes(SECTOR) for host in hosts)


@pytest.mark.parametrize("is_overlay", [False, True])
def test_a_table_that_snapshots_share_changes_for_all(engine: Engine, is_overlay: bool) -> None:
    if is_overlay:
        over_a_file(engine)
    for _ in range(2):
        with changing(engine) as tables:
            tables.snapshots.create(SNAPSHOT)
    table = engine.public.mapping.l2_table(0)
    kept = engine.geometry.cluster_of(entries(engine)[2].host)
    assert engine.public.refcounts.get(kept) == 3
    assert convert(engine) == 2
    assert engine.public.mapping.l2_table(0) == table
    assert engine.public.refcounts.get(kept) == 0
    entry = entries(engine)[2]
    if is_overlay:
        assert engine.public.refcounts.get(engine.geometry.cluster_of(entry.host)) == 3
        assert not entry.copied
    else:
        assert entry == NO_ENTRY
    assert check(engine).ok


def test_what_is_left_to_the_disk_alone_gets_its_flag() -> None:
    engine = new_engine()
    with changing(engine) as tables:
        cluster = map_one(tables)
        tables.snapshots.create(SNAPSHOT)
    with changing(engine) as tables:
        # As if the snapshot had been made of zeros that keep a cluster, and the disk were what it was before.
        (snapshot,) = tables.snapshots.read_table().snapshots
        own = tables.mapping.l2_table(0)
        host = engine.geometry.offset_of(cluster)
        tables.mapping.set_entries(GuestCluster(1), [ZERO_ENTRY])
        assert tables.mapping.l2_table(0) != own
        tables.refcounts.release(cluster)
        tables.refcounts.share(cluster, 1)
        tables.mapping.put_entries(own, 0, [L2Entry(ZERO_CLUSTER, host)])
        assert tables.mapping.l2_table(0, tables.snapshots.l1_of(snapshot)) == own
    assert engine.public.refcounts.get(cluster) == 2
    convert(engine)
    assert engine.public.refcounts.get(cluster) == 1
    assert engine.public.mapping.l2_entry(GuestCluster(0)).copied
    assert check(engine).ok


def test_a_damaged_entry_is_refused_and_nothing_changes(engine: Engine) -> None:
    with changing(engine) as tables:
        table = tables.mapping.l2_table(0)
        tables.view.edit(HostOffset(table))[3 * 8 : 4 * 8] = (1 << 56 | 512 * 3).to_bytes(8, "big")
    with pytest.raises(CorruptionError):
        convert(engine)
    assert entries(engine)[1] == ZERO_ENTRY


def test_a_version_and_back(engine: Engine) -> None:
    convert(engine)
    with changing(engine) as tables:
        Amending(tables, engine.data).set_lazy_refcounts(lazy=True)
    assert engine.public.view.header.compatible_features == COMPATIBLE_LAZY_REFCOUNTS
    with changing(engine) as tables:
        tables.snapshots.create(SNAPSHOT)
        Amending(tables, engine.data).set_version(2)
    header = engine.public.view.header
    assert (header.version, header.compatible_features, header.header_length) == (2, 0, 72)
    with changing(engine) as tables:
        Amending(tables, engine.data).set_version(3)
    header = engine.public.view.header
    assert (header.version, header.header_length) == (3, 112)
    assert [found.name for found in engine.public.snapshots.read_table().snapshots] == ["kept"]
