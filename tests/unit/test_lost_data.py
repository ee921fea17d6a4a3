"""Leaked clusters that look like lost data: told apart from harmless leaks, and freed only where asked to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import jqcow
from jqcow.checker import lost as rules
from jqcow.checker.check import Kind
from jqcow.checker.lost import MANY, Holes, LostData
from jqcow.cli.main import main
from jqcow.cli.recover import main as recover_main
from jqcow.engine.repair import What
from jqcow.offline.convert import convert
from jqcow.ondisk.entries import OFFSET_MASK
from jqcow.ondisk.l2 import StandardL2
from jqcow.ondisk.layout import Geometry
from jqcow.testing import SimulatedDevice
from tests.support.patients import Tables, check

CLUSTER = 512
REACH = CLUSTER // 8 * CLUSTER
"""Of an L2 table."""
DATA = bytes(range(1, 256)) * 40
Damage = Callable[[Tables], None]


def new_tables(*offsets: int, size: int = 4 * REACH) -> Tables:
    """Return a closed image with data at some guest offsets."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, size, cluster_size=CLUSTER) as image:
        for offset in offsets:
            image.pwrite(DATA, offset)
    return Tables(device.content())


def empty_l2(tables: Tables) -> None:
    tables.image[tables.l2 : tables.l2 + CLUSTER] = bytes(CLUSTER)


def l1_entry(index: int) -> Damage:
    return lambda tables: tables.set_entry(tables.l1 + 8 * index, 0)


def empty_l1(tables: Tables) -> None:
    for index in range(4):
        l1_entry(index)(tables)


HOLES: dict[str, Damage] = {
    "L2 table emptied": empty_l2,
    "first L1 entry": l1_entry(0),
    "L1 entry between others": l1_entry(1),
    "last L1 entry: its table is leaked": l1_entry(3),
    "L1 table emptied": empty_l1,
}
CLUSTERS = -(-len(DATA) // CLUSTER)


@pytest.fixture(params=HOLES)
def content(request: pytest.FixtureRequest) -> bytes:
    tables = new_tables(*(index * REACH for index in range(4)))
    HOLES[request.param](tables)
    return bytes(tables.image)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "holes.qcow2"
    path.write_bytes(content)
    return path


def test_they_are_errors_of_their_own(content: bytes) -> None:
    report = check(content)
    assert set(report.counts) == {Kind.LOST_DATA} and report.leaks == report.corruptions == 0
    assert report.errors == report.lost >= CLUSTERS and not report.ok


@pytest.mark.parametrize("what", ["leaks", "all"])
def test_no_repair_frees_them_unasked(what: What, content: bytes) -> None:
    device, lost = SimulatedDevice(content), check(content).lost
    with jqcow.open_device(device, "r+", repair=what) as image:
        assert image.repaired is not None and image.repaired.lost == lost and not image.repaired.changed
    assert device.content() == content, "nothing is written"
    device.reopen()
    with jqcow.open_device(device, "r+", repair=what, free_lost=True) as image:
        assert image.repaired is not None and image.repaired.leaks == lost and not image.repaired.lost
        assert image.check().ok


def test_other_leaks_beside_them_are_freed(content: bytes) -> None:
    tables = Tables(content)
    zeros = len(tables.image)
    tables.image += bytes(CLUSTER)
    tables.set_refcount(zeros, 1)
    with jqcow.open_device(SimulatedDevice(bytes(tables.image)), "r+", repair="leaks") as image:
        assert image.repaired is not None and image.repaired.leaks == 1
        assert image.repaired.lost == check(content).lost
        assert set(image.check().counts) == {Kind.LOST_DATA}


def test_zeros_that_a_lost_table_maps_stay() -> None:
    """Freed, they would be other data some day, and a table that maps free clusters looks like none."""
    tables = new_tables(0, 3 * REACH)
    zeros = tables.entry(tables.place_of(3 * REACH)) & OFFSET_MASK
    tables.image[zeros : zeros + CLUSTER] = bytes(CLUSTER)
    l1_entry(3)(tables)
    device, lost = SimulatedDevice(bytes(tables.image)), check(tables.image).lost
    assert lost == CLUSTERS + 1, "the table counts, too"
    for _ in range(2):
        with jqcow.open_device(device, "r+", repair="leaks") as image:
            assert image.repaired is not None and image.repaired.leaks == 0 and image.repaired.lost == lost
        device.reopen()


def test_so_many_entries_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind that all counts as lost."""
    tables = new_tables(0, REACH, 2 * REACH, 3 * REACH)
    l1_entry(3)(tables)
    zeros = len(tables.image)
    tables.image += bytes(CLUSTER)
    tables.set_refcount(zeros, 1)
    assert check(tables.image).leaks == 1
    monkeypatch.setattr(rules, "MAX_ENTRIES", 3)
    assert check(tables.image).leaks == 0


def test_what_a_dirty_image_does_on_opening(content: bytes) -> None:
    """It counts its refcounts anew, and leaves these."""
    tables = Tables(content)
    tables.image[79] |= 1
    with jqcow.open_device(SimulatedDevice(bytes(tables.image)), "r+") as image:
        assert image.repaired is not None and image.repaired.lost == check(content).lost
        assert set(image.check().counts) == {Kind.LOST_DATA}


def test_convert_refuses_them(path: Path, tmp_path: Path) -> None:
    with pytest.raises(jqcow.CorruptionError, match="no table names it"):
        convert(path, tmp_path / "copy")
    convert(path, tmp_path / "copy", salvage=True)


def test_a_lost_table_that_a_snapshot_shares_in_part() -> None:
    """What it maps is leaked, or counted once too often."""
    device = SimulatedDevice(bytes(new_tables(*(index * REACH for index in range(4))).image))
    with jqcow.open_device(device, "r+") as image:
        image.create_snapshot("before")
        image.pwrite(b"x" * CLUSTER, 3 * REACH)
    tables = Tables(device.content())
    l1_entry(3)(tables)
    for _ in range(2):
        device = SimulatedDevice(bytes(tables.image))
        with jqcow.open_device(device, "r+", repair="leaks") as image:
            assert image.repaired is not None and image.repaired.lost == 2, "the table and its own cluster"
            assert set(image.check().counts) == {Kind.LOST_DATA}
        tables = Tables(device.content())


def with_a_lost_sector(clusters: int) -> Tables:
    """Return an image of which a sector of an L2 table was overwritten, which mapped some clusters."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 1 << 20, cluster_size=4096) as image:
        image.pwrite(b"before" * 1000, 0)
        image.pwrite(b"x" * (clusters * 4096), 64 * 4096)
        image.pwrite(b"behind" * 1000, 128 * 4096)
    tables = Tables(device.content())
    tables.image[tables.l2 + 512 : tables.l2 + 1024] = bytes(512)
    return tables


@pytest.mark.parametrize("clusters", [MANY, 64])
def test_a_lost_sector_of_a_table(clusters: int) -> None:
    content = bytes(with_a_lost_sector(clusters).image)
    assert check(content).lost == clusters
    device = SimulatedDevice(content)
    with jqcow.open_device(device, "r+", repair="leaks") as image:
        assert image.repaired is not None and image.repaired.lost == clusters
    assert device.content() == content


def test_a_few_leaks_beside_an_empty_sector_are_harmless() -> None:
    report = check(with_a_lost_sector(MANY - 1).image)
    assert report.leaks == MANY - 1 and not report.errors


@pytest.mark.parametrize(("bits", "many"), [(12, MANY), (19, MANY), (20, 16), (21, 8)])
def test_of_large_clusters_fewer_are_many(bits: int, many: int) -> None:
    holes = Holes(1 << bits)
    holes.sectors = True
    for count in (many - 1, many):
        lost = LostData(
            lambda _: True, lambda _: False, lambda _: b"x" * 512, StandardL2(Geometry(bits)), bits, holes
        )
        lost.look_at(range(count))
        assert holes.tables == (count == many)


def test_many_leaks_are_harmless_where_all_is_mapped() -> None:
    """The rest of the only L2 table maps nothing."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 64 * 4096, cluster_size=4096) as image:
        image.pwrite(b"x" * (64 * 4096), 0)
    tables = Tables(device.content())
    for _ in range(MANY):
        tables.image += b"leaked".ljust(4096, b"\1")
        tables.set_refcount(len(tables.image) - 4096, 1)
    report = check(tables.image)
    assert report.leaks == MANY and not report.errors


def test_commands(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lost = check(path.read_bytes()).lost
    assert main(["check", str(path)]) == 2
    assert f"{lost} leaked clusters look like lost data" in capfd.readouterr().out
    assert main(["check", "--output=json", str(path)]) == 2
    told = json.loads(capfd.readouterr().out)
    assert told["lost-data"] == lost and "leaks" not in told and "corruptions" not in told
    assert main(["check", "-r", "leaks", str(path)]) == 2
    assert main(["check", "-r", "leaks", "--free-lost-data", str(path)]) == 0


def test_recovery_has_a_word_of_its_own_for_them(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lost = check(path.read_bytes()).lost
    assert recover_main([str(path)]) == 2
    told = capfd.readouterr().out
    assert f"0 errors, 0 leaked clusters, {lost} clusters of lost data?" in told
    assert "the only copy" in told and "no crash of jqcow leaves" not in told
    assert recover_main(["--output=json", str(path)]) == 2
    told = json.loads(capfd.readouterr().out)["verification"]
    assert (told["errors"], told["leaks"], told["lost"]) == (0, 0, lost)


def test_a_leak_without_a_hole_is_harmless() -> None:
    tables = new_tables(0)
    leaked = len(tables.image)
    tables.image += b"old bytes".ljust(CLUSTER, b"\1")
    tables.set_refcount(leaked, 1)
    report = check(tables.image)
    assert report.leaks == 1 and not report.errors


def test_zeros_are_no_data() -> None:
    tables = new_tables(0, 2 * REACH)
    leaked = len(tables.image)
    tables.image += bytes(CLUSTER)
    tables.set_refcount(leaked, 1)
    report = check(tables.image)
    assert report.leaks == 1 and not report.errors


def test_a_refcount_that_is_too_high_is_no_lost_data() -> None:
    tables = new_tables(0, 2 * REACH)
    tables.set_refcount(tables.data, 7)
    assert check(tables.image).lost == 0


def test_so_many_clusters_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All further ones count as lost: it bounds time."""
    monkeypatch.setattr(rules, "MAX_READ", 1)
    tables = new_tables(0, 2 * REACH)
    for _ in range(3):
        leaked = len(tables.image)
        tables.image += bytes(CLUSTER)
        tables.set_refcount(leaked, 1)
    report = check(tables.image)
    assert report.leaks == 1 and report.lost == 2


@pytest.mark.parametrize(
    ("present", "expected"),
    [((), True), ((0,), False), ((1,), True), ((0, 1, 2), False), ((0, 2), True)],
)
def test_holes_of_an_l1_table(present: tuple[int, ...], expected: bool) -> None:
    holes = Holes(CLUSTER)
    holes.see_l1_table(present)
    assert holes.tables is expected
