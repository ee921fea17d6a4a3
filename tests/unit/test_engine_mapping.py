"""From guest to host offsets: runs, entries that no image can have, shared tables, a larger L1 table."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import jqcow
from jqcow.engine.engine import Engine
from jqcow.engine.mapping import L1Table, MappedRun, Mapping
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import entries, l2, layout
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.l2 import (
    COMPRESSED_CLUSTER,
    DATA,
    NO_ENTRY,
    UNALLOCATED,
    ZERO,
    ZERO_CLUSTER,
    ZERO_ENTRY,
    L2Entry,
    data_entry,
)
from jqcow.ondisk.layout import ENTRY_BYTES, ClusterIndex, GuestCluster, GuestOffset, HostOffset
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.patients import Tables, make_image
from tests.support.qemu import run
from tests.unit.engines import JOURNAL, MIB, SECTOR, changing, check, new_engine, reopened, take_data

PER_TABLE = SECTOR // ENTRY_BYTES
TABLE_SPAN = PER_TABLE * SECTOR
"""Guest bytes that one L2 table maps."""


@pytest.fixture
def engine() -> Engine:
    return new_engine()


def allocate(engine: Engine, count: int = 1) -> HostOffset:
    """Take data clusters in a row, and return where they are."""
    return engine.geometry.offset_of(take_data(engine, count).start)


def set_entries(engine: Engine, first: int, *values: L2Entry) -> None:
    with changing(engine) as tables:
        tables.mapping.set_entries(GuestCluster(first), list(values))


def set_raw(engine: Engine, place: int, value: int) -> None:
    """Lay any 8 bytes at the place of a table entry: what a damaged image holds."""
    with changing(engine) as tables:
        block = place - place % tables.geometry.block_bytes
        entries.put_entry(tables.view.edit(HostOffset(block)), (place - block) // ENTRY_BYTES, value)


def runs(engine: Engine, offset: int = 0, length: int = MIB) -> list[MappedRun]:
    return list(engine.public.mapping.runs(GuestOffset(offset), length))


class TestRuns:
    def test_entries_of_one_kind_are_one_run(self, engine: Engine) -> None:
        """Data as far as its host clusters follow each other, with one flag; zeros wherever they are kept."""
        host = allocate(engine, 6)
        at = [HostOffset(host + SECTOR * position) for position in range(6)]
        set_entries(
            engine,
            0,
            data_entry(at[0]),
            data_entry(at[1]),
            data_entry(at[3]),
            L2Entry(DATA, at[4], False),
            ZERO_ENTRY,
            L2Entry(ZERO_CLUSTER, at[5], True),
            NO_ENTRY,
            L2Entry(COMPRESSED_CLUSTER, HostOffset(at[2] + 100), False, 412),
        )
        assert runs(engine, 0, 9 * SECTOR) == [
            MappedRun(DATA, at[0], 2 * SECTOR, True),
            MappedRun(DATA, at[3], SECTOR, True),
            MappedRun(DATA, at[4], SECTOR, False),
            MappedRun(ZERO_CLUSTER, HostOffset(0), 2 * SECTOR),
            MappedRun(UNALLOCATED, HostOffset(0), SECTOR),
            MappedRun(COMPRESSED_CLUSTER, HostOffset(at[2] + 100), SECTOR, False, 412),
            MappedRun(UNALLOCATED, HostOffset(0), SECTOR),
        ]

    def test_a_range_may_begin_and_end_within_clusters(self, engine: Engine) -> None:
        """The host offset of data moves along; that of a compressed cluster is where its stream starts."""
        host = allocate(engine, 3)
        stream = HostOffset(host + 2 * SECTOR)
        set_entries(
            engine,
            0,
            data_entry(host),
            data_entry(HostOffset(host + SECTOR)),
            L2Entry(COMPRESSED_CLUSTER, stream, False, SECTOR),
        )
        assert runs(engine, 7, SECTOR) == [MappedRun(DATA, HostOffset(host + 7), SECTOR, True)]
        assert runs(engine, 2 * SECTOR + 7, 5) == [MappedRun(COMPRESSED_CLUSTER, stream, 5, False, SECTOR)]

    def test_where_tables_are_absent_a_run_reaches_to_the_next_one(self, engine: Engine) -> None:
        host = allocate(engine)
        set_entries(engine, 5 * PER_TABLE, data_entry(host))
        assert runs(engine, SECTOR, 6 * TABLE_SPAN - SECTOR) == [
            MappedRun(UNALLOCATED, HostOffset(0), 5 * TABLE_SPAN - SECTOR),
            MappedRun(DATA, host, SECTOR, True),
            MappedRun(UNALLOCATED, HostOffset(0), TABLE_SPAN - SECTOR),
        ]

    def test_past_the_l1_table_nothing_is_mapped(self, engine: Engine) -> None:
        assert sum(run.length for run in runs(engine, MIB - SECTOR, 5 * TABLE_SPAN)) == 5 * TABLE_SPAN
        assert {run.kind for run in runs(engine, MIB - SECTOR, 5 * TABLE_SPAN)} == {UNALLOCATED}

    def test_tables_are_found_wherever_they_are(self, engine: Engine) -> None:
        for l1_index in (0, 1, 17, 31):
            set_entries(engine, l1_index * PER_TABLE, ZERO_ENTRY)
        found = list(engine.public.mapping.l2_tables(0))
        assert [l1_index for l1_index, _ in found] == [0, 1, 17, 31]
        assert len({table for _, table in found}) == 4
        assert [l1_index for l1_index, _ in engine.public.mapping.l2_tables(2)] == [17, 31]

    def test_walking_a_huge_empty_disk_is_quick(self) -> None:
        """The extents of 8 TiB are found table block by table block, not cluster by cluster."""
        device = SimulatedDevice()
        size = 8 << 40
        with jqcow.create_on_device(device, size, journal_size=JOURNAL) as image:
            image.pwrite(b"x", size // 2)
            mapping = image._engine.public.mapping
            assert len(list(mapping.runs(GuestOffset(0), size))) < 100
            kinds = [(extent.kind, extent.length) for extent in image.extents()]
            assert kinds == [
                ("unallocated", size // 2),
                ("data", 65536),
                ("unallocated", size // 2 - 65536),
            ]


class TestReferences:
    def test_all_that_a_table_refers_to(self, engine: Engine) -> None:
        """What a zero entry keeps too, and each cluster that a compressed one reaches into."""
        host = allocate(engine, 5)
        first = host // SECTOR
        set_entries(
            engine,
            0,
            data_entry(host),
            data_entry(HostOffset(host + SECTOR)),
            ZERO_ENTRY,
            L2Entry(ZERO_CLUSTER, HostOffset(host + 2 * SECTOR), True),
            L2Entry(COMPRESSED_CLUSTER, HostOffset(host + 4 * SECTOR - 10), False, 11),
        )
        mapping = engine.public.mapping
        table = mapping.l2_table(0)
        assert list(mapping.references(table)) == [(first, 2), (first + 2, 1), (first + 3, 2)]
        assert [run.cluster for run in mapping.all_runs(table) if not run.compressed] == [first, first + 2]


class TestDamage:
    """G1: what no image can have raises, and names the place; nothing is touched."""

    @pytest.mark.parametrize(
        ("value", "why"),
        [
            (SECTOR + 1, "not valid"),
            (1 << 62 | SECTOR, "not valid"),
            (1 << 63, "not valid"),
        ],
        ids=["reserved low", "reserved high", "COPIED of nothing"],
    )
    def test_l1_entries(self, engine: Engine, value: int, why: str) -> None:
        set_raw(engine, engine.public.mapping.l1.offset, value)
        with pytest.raises(CorruptionError, match=why) as caught:
            runs(engine, 0, SECTOR)
        assert (caught.value.structure, caught.value.offset) == ("L1 table", engine.public.mapping.l1.offset)

    @pytest.mark.parametrize(
        "value",
        [
            l2.l2_entry(SECTOR) | 2,
            l2.COMPRESSED | entries.COPIED | SECTOR,
            l2.ZERO | 1 << 61,
        ],
        ids=["reserved bit of data", "compressed and COPIED", "reserved bit of zeros"],
    )
    def test_l2_entries(self, engine: Engine, value: int) -> None:
        set_entries(engine, 3, ZERO_ENTRY)
        mapping = engine.public.mapping
        place = mapping.l2_table(0) + 3 * ENTRY_BYTES
        set_raw(engine, place, value)
        for walk in (
            lambda: runs(engine, 3 * SECTOR, SECTOR),
            lambda: mapping.l2_entry(GuestCluster(3)),
            lambda: list(mapping.references(mapping.l2_table(0))),
        ):
            with pytest.raises(CorruptionError) as caught:
                walk()
            assert (caught.value.structure, caught.value.offset) == ("L2 table", place)

    @pytest.mark.parametrize("cluster_bytes", [4096, 65536])
    def test_a_host_offset_within_a_cluster(self, cluster_bytes: int) -> None:
        engine = new_engine(cluster_bytes=cluster_bytes)
        set_entries(engine, 0, ZERO_ENTRY)
        mapping = engine.public.mapping
        table = mapping.l2_table(0)
        set_raw(engine, table, l2.l2_entry(cluster_bytes * 4 + SECTOR))
        for walk in (lambda: runs(engine, 0, 1), lambda: mapping.l2_entry(GuestCluster(0))):
            with pytest.raises(CorruptionError, match="is not a cluster's"):
                walk()
        set_raw(engine, mapping.l1.offset, entries.l1_entry(table + SECTOR))
        with pytest.raises(CorruptionError, match="is not a cluster's"):
            mapping.l2_table(0)

    def test_the_header_cluster(self) -> None:
        """Compressed data within it: an entry of 0 and a length."""
        engine = new_engine()
        set_entries(engine, 0, ZERO_ENTRY)
        table = engine.public.mapping.l2_table(0)
        set_raw(engine, table, l2.compressed_entry(100, 10, 9))
        with pytest.raises(CorruptionError, match="is not a cluster's"):
            runs(engine, 0, 1)

    @pytest.mark.parametrize("kind", ["table", "first", "last", "compressed"])
    def test_the_journal(self, engine: Engine, kind: str) -> None:
        """Also where a run of data or a compressed cluster only reaches into it."""
        (reserved,) = engine.space.reserved
        start, mapping = reserved.start * SECTOR, engine.public.mapping
        end = start + reserved.count * SECTOR
        set_entries(engine, 0, ZERO_ENTRY)
        table = mapping.l2_table(0)
        if kind == "table":
            set_raw(engine, mapping.l1.offset, entries.l1_entry(start))
        elif kind == "compressed":
            set_raw(engine, table, l2.compressed_entry(start - 10, 11, 9))
        elif kind == "first":
            set_raw(engine, table, l2.l2_entry(start - SECTOR))
            set_raw(engine, table + ENTRY_BYTES, l2.l2_entry(start))
        else:
            set_raw(engine, table, l2.l2_entry(end - SECTOR))
        with pytest.raises(CorruptionError, match="is in the journal"):
            runs(engine, 0, 2 * SECTOR)

    def test_beside_the_journal_all_is_well(self, engine: Engine) -> None:
        (reserved,) = engine.space.reserved
        set_entries(engine, 0, ZERO_ENTRY)
        table = engine.public.mapping.l2_table(0)
        for cluster in (reserved.start - 1, reserved.start + reserved.count):
            set_raw(engine, table, l2.l2_entry(cluster * SECTOR))
            assert runs(engine, 0, SECTOR) == [MappedRun(DATA, HostOffset(cluster * SECTOR), SECTOR, True)]


class TestEditing:
    def test_entries_of_one_table_alone_are_set(self, engine: Engine) -> None:
        host = allocate(engine, 2)
        set_entries(engine, 7, data_entry(host), data_entry(HostOffset(host + SECTOR)))
        mapping = engine.public.mapping
        found = [mapping.l2_entry(GuestCluster(cluster)) for cluster in range(6, 10)]
        assert found == [NO_ENTRY, data_entry(host), data_entry(HostOffset(host + SECTOR)), NO_ENTRY]
        assert mapping.l1_is_copied(0) and check(engine).ok

    def test_a_table_with_one_owner_is_changed_where_it_is(self, engine: Engine) -> None:
        set_entries(engine, 0, ZERO_ENTRY)
        table = engine.public.mapping.l2_table(0)
        set_entries(engine, 1, ZERO_ENTRY)
        assert engine.public.mapping.l2_table(0) == table

    def test_a_shared_table_is_copied_first(self, engine: Engine) -> None:
        """G3: the other L1 table goes on with what it had."""
        host = allocate(engine)
        set_entries(engine, 1, data_entry(host))
        mapping, refcounts = engine.public.mapping, engine.public.refcounts
        shared = mapping.l2_table(0)
        with changing(engine):
            refcounts.share(engine.geometry.cluster_of(shared), 1)
        before = engine.public.view.read(shared, SECTOR)
        set_entries(engine, 0, ZERO_ENTRY)
        own = mapping.l2_table(0)
        assert own != shared and mapping.l1_is_copied(0)
        assert engine.public.view.read(shared, SECTOR) == before
        assert engine.public.view.read(own, SECTOR)[ENTRY_BYTES:] == before[ENTRY_BYTES:]
        counts = [refcounts.get(engine.geometry.cluster_of(table)) for table in (shared, own)]
        assert counts == [1, 1]

    def test_compressed_data_too_far_out(self, engine: Engine) -> None:
        far = HostOffset(layout.MAX_HOST_OFFSET)
        with pytest.raises(UnsupportedFeatureError, match="this far out"):
            set_entries(engine, 0, L2Entry(COMPRESSED_CLUSTER, far, False, 10))
        assert engine.public.changes.is_empty

    def test_a_table_is_dropped_with_all_that_it_maps(self, engine: Engine) -> None:
        host = allocate(engine, 2)
        set_entries(engine, 0, data_entry(host), L2Entry(ZERO_CLUSTER, HostOffset(host + SECTOR), True))
        mapping, refcounts = engine.public.mapping, engine.public.refcounts
        table = mapping.l2_table(0)
        with changing(engine):
            mapping.drop_l2_table(0)
        assert mapping.l2_table(0) == 0
        clusters = [engine.geometry.cluster_of(HostOffset(at)) for at in (table, host, host + SECTOR)]
        assert [refcounts.get(cluster) for cluster in clusters] == [0, 0, 0]
        assert check(engine).ok


class TestL1Growth:
    def test_entries_move_and_new_ones_are_absent(self, engine: Engine) -> None:
        set_entries(engine, 0, ZERO_ENTRY)
        mapping, old = engine.public.mapping, engine.public.mapping.l1
        tables = list(mapping.l2_tables(0))
        with changing(engine):
            mapping.grow_l1(old.entry_count + 100)
        new = mapping.l1
        assert new.entry_count == old.entry_count + 100 and new.offset != old.offset
        assert list(mapping.l2_tables(0)) == tables
        refcounts, first = engine.public.refcounts, engine.geometry.cluster_of(old.offset)
        assert [
            refcounts.get(ClusterIndex(first + at))
            for at in range(engine.geometry.clusters(old.entry_count * ENTRY_BYTES))
        ] == [0]
        assert check(engine).ok

    def test_an_entry_past_its_end_makes_it_larger(self, engine: Engine) -> None:
        entry_count = engine.public.mapping.l1.entry_count
        set_entries(engine, (entry_count + 7) * PER_TABLE, ZERO_ENTRY)
        assert engine.public.mapping.l1.entry_count == entry_count + 8 and check(engine).ok

    def test_it_is_never_smaller(self, engine: Engine) -> None:
        before = engine.public.mapping.l1
        with changing(engine) as tables:
            tables.mapping.grow_l1(before.entry_count)
            tables.mapping.grow_l1(1)
        assert engine.public.mapping.l1 == before and engine.public.changes.is_empty

    def test_its_limit(self, engine: Engine) -> None:
        """What QEMU opens; nothing is taken for more."""
        with pytest.raises(UnsupportedFeatureError, match="32 MiB"), changing(engine) as tables:
            tables.mapping.grow_l1(layout.MAX_L1_BYTES // ENTRY_BYTES + 1)
        assert engine.public.changes.is_empty

    def test_it_moves_and_the_old_one_is_freed(self) -> None:
        device = SimulatedDevice()
        with jqcow.create_on_device(device, MIB, cluster_size=SECTOR, journal_size=JOURNAL) as image:
            image.pwrite(b"first", 0)
            old = image._engine.public.view.header
            image.resize(100 * MIB)
            image.pwrite(b"last", 100 * MIB - 4)
            new = image._engine.public.view.header
            assert new.l1_size > old.l1_size and new.l1_table_offset != old.l1_table_offset
            assert image._engine.public.refcounts.get(ClusterIndex(old.l1_table_offset // SECTOR)) == 0
            assert image.check().ok
            image.flush()
            killed = device.killed()
        for each in (device, killed):
            with reopened(each) as again:
                assert again.size == 100 * MIB
                assert again.pread(5, 0) == b"first" and again.pread(4, 100 * MIB - 4) == b"last"
                assert again.check().ok

    def test_failed_growth_leaves_the_old_size(self) -> None:
        device = SimulatedDevice()
        with jqcow.create_on_device(device, MIB, cluster_size=SECTOR, journal_size=JOURNAL) as image:
            image.pwrite(b"first", 0)
            image.flush()
            before = image._engine.public.view.header
            device.faults = FaultPlan(Fault(errno.ENOSPC, call="allocate"))
            with pytest.raises(OSError):
                image.resize(100 * MIB)
            device.faults = None
            assert image._engine.public.view.header == before and image.size == MIB
            assert image.check().ok
            image.resize(100 * MIB)
            assert image.check().ok


class TestSnapshotShown:
    def test_another_table_is_shown_instead(self, engine: Engine) -> None:
        """Its own size too; the disk's table stays what changes go to."""
        set_entries(engine, 0, ZERO_ENTRY)
        empty = L1Table(engine.public.mapping.l1.offset, 0, SECTOR)
        shown = Mapping(engine.public.view, engine.space, empty)
        assert shown.disk_bytes == SECTOR and shown.l2_table(0) == 0
        assert list(shown.runs(GuestOffset(0), SECTOR)) == [MappedRun(UNALLOCATED, HostOffset(0), SECTOR)]
        assert engine.public.mapping.disk_bytes == MIB


@pytest.mark.parametrize("flags", [ZERO, ZERO | COPIED])
def test_the_zero_flag_in_version_2(tmp_path: Path, flags: int) -> None:
    """There it is reserved. Zeros would be wrong where the entry names data."""
    path = tmp_path / "old.qcow2"
    tables = Tables(make_image(path, "write -P 7 0 12k", options="cluster_size=4096,compat=0.10"))
    place = tables.place_of(4096)
    tables.set_entry(place, tables.entry(place) & ~COPIED | flags)
    path.write_bytes(tables.image)
    with jqcow.open(path) as image:
        assert image.pread(4096, 0) == image.pread(4096, 8192) == b"\7" * 4096
        for start in (0, 4096):
            with pytest.raises(CorruptionError, match="zero flag") as caught:
                image.pread(12288 - start, start)
            assert caught.value.guest_range == (4096, 4096)
        assert image.check().corruptions
    assert "Input/output error" in run("qemu-img", "convert", "-O", "raw", path, tmp_path / "raw").stderr
