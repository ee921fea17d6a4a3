"""Internal snapshots: references counted, COPIED flags, and metadata that is used twice."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import jqcow
from jqcow.engine.engine import Engine
from jqcow.engine.mapping import Mapping
from jqcow.engine.snapshots import NewSnapshot
from jqcow.errors import CorruptionError, SnapshotNotFound, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk import snapshots as snapshot_tables
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, ZERO_CLUSTER, L2Entry, data_entry
from jqcow.ondisk.layout import ENTRY_BYTES, ClusterIndex, GuestCluster, GuestOffset, HostOffset
from jqcow.ondisk.snapshots import Snapshot
from jqcow.testing import Fault, FaultPlan
from tests.support.qemu import check_clean, done, qemu_io
from tests.unit.engines import (
    MIB,
    SECTOR,
    changing,
    check,
    counts,
    device_of,
    engine_on,
    flush,
    map_one,
    new_engine,
    take_data,
)

PER_TABLE = SECTOR // ENTRY_BYTES


@pytest.fixture
def engine() -> Engine:
    """Map data in two L2 tables, two clusters in a row in the first one."""
    engine = new_engine()
    with changing(engine) as tables:
        for guest in (0, 1, PER_TABLE):
            map_one(tables, guest)
    return engine


def create(engine: Engine, name: str = "one") -> Snapshot:
    with changing(engine) as tables:
        return tables.snapshots.create(NewSnapshot(name, 1, 2))


def host(engine: Engine, guest: int) -> ClusterIndex:
    entry = engine.public.mapping.l2_entry(GuestCluster(guest))
    return engine.geometry.cluster_of(entry.host)


def flags(engine: Engine) -> list[bool]:
    """Return the COPIED flags of the disk's mapping: of its L2 tables, and of the data of the fixture."""
    mapping = engine.public.mapping
    return [mapping.l1_is_copied(l1_index) for l1_index, _ in mapping.l2_tables(0)] + [
        mapping.l2_entry(GuestCluster(guest)).copied for guest in (0, 1, PER_TABLE)
    ]


def table_counts(engine: Engine) -> list[int]:
    refcounts = engine.public.refcounts
    return [
        refcounts.get(engine.geometry.cluster_of(table)) for _, table in engine.public.mapping.l2_tables(0)
    ]


class TestCreating:
    def test_all_that_it_reaches_is_counted_once_more(self, engine: Engine) -> None:
        """N1: tables and data, by the snapshot and by the disk."""
        snapshot = create(engine)
        clusters = [host(engine, guest) for guest in (0, 1, PER_TABLE)]
        assert [engine.public.refcounts.get(cluster) for cluster in clusters] == [2, 2, 2]
        assert table_counts(engine) == [2, 2]
        l1 = ClusterIndex(snapshot.l1_table_offset // SECTOR)
        assert l1 != engine.public.mapping.l1.offset // SECTOR and engine.public.refcounts.get(l1) == 1
        assert check(engine).ok

    def test_nothing_is_copied_any_more(self, engine: Engine) -> None:
        """N2: writing in place would change the snapshot."""
        assert flags(engine) == [True] * 5
        create(engine)
        assert flags(engine) == [False] * 5
        assert engine.public.snapshots.set_copied_flags(change=False) == 0

    def test_what_a_zero_entry_keeps_and_compressed_clusters_are_shared_too(self, engine: Engine) -> None:
        run = take_data(engine, 2)
        place = engine.geometry.offset_of(run.start)
        with changing(engine) as tables:
            kept = L2Entry(ZERO_CLUSTER, place, True)
            packed = L2Entry(COMPRESSED_CLUSTER, HostOffset(place + SECTOR), False, SECTOR)
            tables.mapping.set_entries(GuestCluster(5), [kept, packed])
        create(engine)
        assert counts(engine, run) == [2, 2]
        assert engine.public.mapping.l2_entry(GuestCluster(5)) == kept._replace(copied=False)
        assert engine.public.mapping.l2_entry(GuestCluster(6)) == packed and check(engine).ok

    def test_what_is_said_of_it(self, engine: Engine) -> None:
        first, second = create(engine, "first"), create(engine, "second")
        assert (first.id, second.id) == ("1", "2")
        assert (first.name, first.date_seconds, first.date_nanoseconds, first.disk_bytes) == (
            "first",
            1,
            2,
            MIB,
        )
        snapshots = engine.public.snapshots
        assert snapshots.read_table().snapshots == (first, second)
        assert (snapshots.find("second"), snapshots.find("1")) == (second, first)
        with pytest.raises(SnapshotNotFound):
            snapshots.find("third")

    def test_an_id_goes_before_a_name(self, engine: Engine) -> None:
        first, second = create(engine, "2"), create(engine, "other")
        assert engine.public.snapshots.find("2") == second
        with changing(engine) as tables:
            tables.snapshots.delete(second)
        assert engine.public.snapshots.find("2") == first

    def test_where_a_refcount_has_no_room(self) -> None:
        """It is refused whole: what was shared before that cluster is undone."""
        engine = new_engine(refcount_order=1)
        with changing(engine) as tables:
            for guest in (0, PER_TABLE):
                map_one(tables, guest)
        create(engine, "a")
        create(engine, "b")
        before = engine.public.changes.operations()
        with pytest.raises(UnsupportedFeatureError, match="above 3"):
            create(engine, "c")
        assert engine.public.changes.operations() == before and check(engine).ok

    def test_where_there_are_as_many_as_there_can_be(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(snapshot_tables, "MAX_SNAPSHOTS", 1)
        create(engine)
        with pytest.raises(UnsupportedFeatureError, match="more than 1 snapshots"):
            create(engine)

    def test_a_full_host_fails_it_whole(self, engine: Engine) -> None:
        """R3: at whichever of its tables."""
        flush(engine)
        for at in (1, 2):
            device_of(engine).faults = FaultPlan(Fault(errno.ENOSPC, at=at, call="allocate"))
            with pytest.raises(OSError):
                create(engine)
            device_of(engine).faults = None
            assert engine.public.changes.is_empty and flags(engine) == [True] * 5
        create(engine)
        assert check(engine).ok


class TestChangingBesideIt:
    def test_a_new_mapping_leaves_the_snapshots_alone(self, engine: Engine) -> None:
        """G3."""
        snapshot = create(engine)
        old = host(engine, 0)
        with changing(engine) as tables:
            map_one(tables, 0)
            tables.refcounts.release(old)
        shown = Mapping(engine.public.view, engine.space, engine.public.snapshots.l1_of(snapshot))
        assert shown.run(GuestOffset(0), SECTOR).host == old * SECTOR
        assert host(engine, 0) != old and engine.public.refcounts.get(old) == 1
        assert flags(engine) == [True, False, True, False, False] and check(engine).ok


class TestApplying:
    def test_the_disk_is_as_it_was(self, engine: Engine) -> None:
        """Size included; what the disk alone had is free, and the snapshot stays."""
        old = host(engine, 0)
        snapshot = create(engine)
        with changing(engine) as tables:
            new = map_one(tables, 0)
            tables.refcounts.release(old)
            later = map_one(tables, 3 * PER_TABLE)
            tables.mapping.grow_l1(100)
            tables.view.set_header(size=3 * MIB)
        flush(engine)
        with changing(engine) as tables:
            tables.snapshots.apply(snapshot)
        assert engine.public.view.header.size == MIB and host(engine, 0) == old
        refcounts = engine.public.refcounts
        assert [refcounts.get(cluster) for cluster in (old, new, later)] == [2, 0, 0]
        assert engine.public.mapping.l1.offset != snapshot.l1_table_offset
        assert flags(engine) == [False] * 5 and check(engine).ok
        flush(engine)
        again = engine_on(device_of(engine).killed())
        assert host(again, 0) == old and check(again).ok

    def test_its_table_is_made_large_enough_for_its_disk(self, engine: Engine) -> None:
        """Other programs' snapshots may have fewer entries than their disk needs."""
        snapshot = create(engine)
        with changing(engine) as tables:
            wide = Snapshot(**{**vars(snapshot), "disk_bytes": 4 * MIB})
            tables.snapshots.apply(wide)
        assert engine.public.mapping.l1.entry_count == engine.geometry.l1_entries_for(4 * MIB)
        assert engine.public.view.header.size == 4 * MIB

    def test_a_disk_too_large_for_any_table(self, engine: Engine) -> None:
        """A few bytes could ask for tables without bound."""
        snapshot = create(engine)
        huge = Snapshot(**{**vars(snapshot), "disk_bytes": 1 << 50})
        before = engine.public.changes.operations()
        with pytest.raises(CorruptionError, match="too large"), changing(engine) as tables:
            tables.snapshots.apply(huge)
        assert engine.public.changes.operations() == before
        assert engine.geometry.l1_entries_for(1 << 50) > layout.MAX_L1_BYTES // ENTRY_BYTES


class TestDeleting:
    def test_what_it_alone_held_is_free(self, engine: Engine) -> None:
        snapshot = create(engine)
        old = host(engine, 0)
        with changing(engine) as tables:
            map_one(tables, 0)
            tables.refcounts.release(old)
        flush(engine)
        with changing(engine) as tables:
            tables.snapshots.delete(snapshot)
        refcounts = engine.public.refcounts
        assert refcounts.get(old) == 0 == refcounts.get(ClusterIndex(snapshot.l1_table_offset // SECTOR))
        assert flags(engine) == [True] * 5, "the disk has the rest for itself again (N2)"
        header = engine.public.view.header
        assert (header.nb_snapshots, header.snapshots_offset) == (0, 0) and check(engine).ok

    def test_the_others_stay(self, engine: Engine) -> None:
        made = [create(engine, name) for name in "abc"]
        with changing(engine) as tables:
            tables.snapshots.delete(made[1])
        assert engine.public.snapshots.read_table().snapshots == (made[0], made[2])
        assert table_counts(engine) == [3, 3] and flags(engine) == [False] * 5 and check(engine).ok
        assert create(engine, "d").id == "4"


class TestCopiedFlags:
    def test_wrong_ones_are_counted_and_made_right(self, engine: Engine) -> None:
        """N2: each way, in both kinds of tables; in one block of them every entry by its own refcount."""
        snapshots, mapping = engine.public.snapshots, engine.public.mapping
        first = take_data(engine, 3).start
        places = [engine.geometry.offset_of(ClusterIndex(first + at)) for at in range(3)]
        with changing(engine) as tables:
            tables.mapping.set_entries(GuestCluster(10), [data_entry(place) for place in places])
            tables.refcounts.share(ClusterIndex(first + 1), 1)
            entry = mapping.l2_entry(GuestCluster(0))
            tables.mapping.set_entries(GuestCluster(0), [entry._replace(copied=False)])
            tables.mapping.set_l1_entry(1, mapping.l2_table(1), copied=False)

        def row() -> list[bool]:
            return [mapping.l2_entry(GuestCluster(guest)).copied for guest in (10, 11, 12)]

        assert snapshots.set_copied_flags(change=False) == 3
        assert (flags(engine), row()) == ([True, False, False, True, True], [True] * 3)
        with changing(engine):
            assert snapshots.set_copied_flags() == 3
        assert (flags(engine), row()) == ([True] * 5, [True, False, True])
        assert snapshots.set_copied_flags(change=False) == 0

    def test_what_another_program_left_in_a_snapshots_tables(self, engine: Engine) -> None:
        """They are judged in the active tables alone, and become active by `apply`."""
        snapshot, old = create(engine), host(engine, 0)
        shared = engine.public.mapping.l2_table(0)
        with changing(engine) as tables:
            map_one(tables, 0)
            tables.refcounts.release(old)
            assert tables.mapping.l2_table(0) != shared
            tables.mapping.codec.set_copied(tables.view.edit(shared), 0, 2, copied=True)
            tables.snapshots.apply(snapshot)
        assert engine.public.mapping.l2_table(0) == shared and host(engine, 0) == old
        assert flags(engine) == [False] * 5 and check(engine).ok


class TestSurvey:
    """Before the first change: an allocator that finds a live table free destroys the image."""

    def test_all_metadata_is_found(self, engine: Engine) -> None:
        """What is allocated for it from then on is known too."""
        create(engine)
        flush(engine)
        used = {cluster for cluster in engine.space.metadata if engine.public.refcounts.get(cluster)}
        assert engine.public.snapshots.survey() == used
        uses = engine.public.snapshots.find_metadata()
        shared = {engine.geometry.cluster_of(table) for _, table in engine.public.mapping.l2_tables(0)}
        assert {cluster for cluster, users in uses.items() if users == 2} == shared

    @pytest.mark.parametrize("name", ["L1 table", "refcount table", "refcount block"])
    def test_a_cluster_with_two_uses(self, engine: Engine, name: str) -> None:
        """It would be changed as an L2 table."""
        header = engine.public.view.header
        places = {
            "L1 table": header.l1_table_offset,
            "refcount table": header.refcount_table_offset,
            "refcount block": engine.public.refcounts.refcount_block(0),
        }
        with changing(engine) as tables:
            tables.mapping.set_l1_entry(2, HostOffset(places[name]), copied=True)
        with pytest.raises(CorruptionError, match="holds other metadata too") as caught:
            engine.public.snapshots.survey()
        assert (caught.value.structure, caught.value.offset) == ("L2 table", places[name])

    def test_a_refcount_block_over_other_metadata(self, engine: Engine) -> None:
        header = engine.public.view.header
        with changing(engine) as tables:
            tables.view.set_entry(HostOffset(header.refcount_table_offset), 1, header.l1_table_offset)
        with pytest.raises(CorruptionError, match="holds other metadata too") as caught:
            engine.public.snapshots.survey()
        assert (caught.value.structure, caught.value.offset) == ("refcount block", header.l1_table_offset)

    def test_one_l1_table_names_an_l2_table_once(self, engine: Engine) -> None:
        """Two L1 tables may share one."""
        with changing(engine) as tables:
            tables.mapping.set_l1_entry(2, tables.mapping.l2_table(0), copied=False)
            tables.refcounts.share(tables.geometry.cluster_of(tables.mapping.l2_table(0)), 1)
        with pytest.raises(CorruptionError, match="names an L2 table twice"):
            engine.public.snapshots.survey()

    def test_a_refcount_of_0(self, engine: Engine) -> None:
        table = engine.public.mapping.l2_table(0)
        with changing(engine) as tables:
            tables.refcounts.release_metadata(tables.geometry.cluster_of(table))
        with pytest.raises(CorruptionError, match="its refcount is 0") as caught:
            engine.public.snapshots.survey()
        assert (caught.value.structure, caught.value.offset) == ("L2 table", table)
        assert engine.public.snapshots.find_metadata(), "a repair counts for itself"

    def test_fewer_than_its_users(self, engine: Engine) -> None:
        create(engine)
        with changing(engine) as tables:
            cluster = tables.geometry.cluster_of(tables.mapping.l2_table(0))
            tables.refcounts.correct(cluster, 1, 2, 1)
        with pytest.raises(CorruptionError, match="its refcount is 1, its users are 2"):
            engine.public.snapshots.survey()

    def test_past_the_end_of_the_file(self, engine: Engine) -> None:
        end = max(engine.space.frontier, device_of(engine).size() // SECTOR)
        with changing(engine) as tables:
            tables.mapping.set_l1_entry(2, HostOffset((end + 100) * SECTOR), copied=True)
        with pytest.raises(CorruptionError, match="past the end of the file"):
            engine.public.snapshots.survey()

    def test_a_table_too_small_for_its_disk_is_not_shown(self, engine: Engine) -> None:
        """A few bytes could announce a disk that takes years to walk."""
        snapshot = create(engine)
        assert engine.public.snapshots.l1_to_show("one").offset == snapshot.l1_table_offset
        table = engine.public.snapshots.read_table()
        with changing(engine) as tables:
            wide = Snapshot(**{**vars(snapshot), "disk_bytes": 4 * MIB})
            tables.snapshots._write_table(table, (wide,))
        with pytest.raises(CorruptionError, match="too few"):
            engine.public.snapshots.l1_to_show("one")


def test_runs_that_reach_over_many_blocks_of_a_table(tmp_path: Path) -> None:
    """A table of 64 KiB has 16 blocks; its first run ends in the midst of the third."""
    path = tmp_path / "a.qcow2"
    done("qemu-img", "create", "-qf", "qcow2", "-o", "preallocation=metadata", path, "512M")
    qemu_io(path, "discard 70M 64k", "discard 80M 64k", "write -c -P 3 80M 64k", "write -z -u 90M 1M")
    with jqcow.open(path, "r+") as image:
        image.create_snapshot("one")
        assert image.check().ok
        image.pwrite(b"x" * 70_000, 69 << 20)
    check_clean(path)
    with jqcow.open(path, "r+") as image:
        image.delete_snapshot("one")
        assert image.check().ok
    check_clean(path)
