"""Damage to what only writing needs: the disk is read, with a warning, and writing is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.common import EXIT_CORRUPT
from jqcow.cli.main import main
from jqcow.errors import JqcowError
from jqcow.offline.info import read_info
from jqcow.offline.warnings import read_warnings
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.header import AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS
from jqcow.testing import SimulatedDevice, enumerate_states
from tests.support.patients import Tables

CLUSTER = 4096
DATA = bytes(range(1, 256)) * 100
Damage = Callable[[Tables], None]


def tables() -> Tables:
    """Return a closed image with a snapshot, which can be damaged."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 1 << 20, cluster_size=CLUSTER) as image:
        image.pwrite(DATA, 0)
        image.create_snapshot("kept")
    return Tables(device.content())


def table_at(offset: int) -> Damage:
    return lambda tables: tables.set_entry(48, offset)


def table_clusters(count: int) -> Damage:
    return lambda tables: struct.pack_into(">I", tables.image, 56, count)


def table_over_data(tables: Tables) -> None:
    tables.set_entry(48, tables.data)


def table_over_l2(tables: Tables) -> None:
    tables.set_entry(48, tables.l2)


def entry_past_the_end(tables: Tables) -> None:
    tables.set_entry(tables.header.refcount_table_offset, 1 << 40)


def snapshots_at(offset: int) -> Damage:
    return lambda tables: tables.set_entry(64, offset)


def too_many_snapshots(tables: Tables) -> None:
    struct.pack_into(">I", tables.image, 60, 1 << 20)


def bitmaps_said_by(data: bytes) -> Damage:
    def damage(tables: Tables) -> None:
        extension = struct.pack(">II", EXTENSION_BITMAPS, len(data)) + data
        tables.image[112 : 112 + len(extension) + 8] = extension + bytes(8)
        tables.image[95] |= AUTOCLEAR_BITMAPS

    return damage


LOST_TABLES: dict[str, Damage] = {
    "misaligned": table_at(0x7777001),
    "zero": table_at(0),
    "past the end": table_at(0x70000000),
    "past 2**56": table_at(1 << 60),
    "over data": table_over_data,
    "over an L2 table": table_over_l2,
    "no clusters": table_clusters(0),
    "too many clusters": table_clusters(1 << 31),
    "entry past the end": entry_past_the_end,
}
OTHERS: dict[str, Damage] = {
    "snapshot table misaligned": snapshots_at(12345),
    "snapshot table past the end": snapshots_at(1 << 40),
    "too many snapshots": too_many_snapshots,
}
BITMAPS: dict[str, Damage] = {
    "bitmap directory past the end": bitmaps_said_by(struct.pack(">IIQQ", 1, 0, 64, 1 << 41)),
    "bitmap directory misaligned": bitmaps_said_by(struct.pack(">IIQQ", 1, 0, 64, CLUSTER + 8)),
    "bitmap directory too short": bitmaps_said_by(struct.pack(">IIQQ", 9, 0, 64, CLUSTER)),
    "no bitmaps": bitmaps_said_by(struct.pack(">IIQQ", 0, 0, 64, CLUSTER)),
    "reserved field": bitmaps_said_by(struct.pack(">IIQQ", 1, 7, 64, CLUSTER)),
    "bitmaps extension without data": bitmaps_said_by(b""),
    "bitmaps extension cut short": bitmaps_said_by(bytes(16)),
}
ALL = LOST_TABLES | OTHERS | BITMAPS
SEEN = [name for name in ALL if name != "over an L2 table"]
"""With a warning: entries of another table can look right, and only a walk of all tells."""


def damaged(name: str) -> bytes:
    image = tables()
    ALL[name](image)
    return bytes(image.image)


@pytest.fixture(params=SEEN)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(damaged(request.param))
    return path


def test_a_sound_image_has_none() -> None:
    with jqcow.open_device(SimulatedDevice(bytes(tables().image))) as image:
        assert image.warnings == ()


def test_it_is_read_with_a_warning(path: Path) -> None:
    before = path.read_bytes()
    with jqcow.open(path) as image:
        assert image.pread(len(DATA), 0) == DATA
        assert len(image.warnings) == 1
        assert [extent.kind for extent in image.extents()] == ["data", "unallocated"]
    assert read_warnings(path) == image.warnings
    facts = read_info(path)
    assert facts.virtual_size == 1 << 20
    assert path.read_bytes() == before


def test_writing_is_refused(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(JqcowError), jqcow.open(path, "r+") as image:
        image.pwrite(b"x", 1 << 19)
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", [["convert", "-q"], ["info"], ["map"], ["snapshot", "-l"]])
def test_commands_say_it(path: Path, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    target = path.parent / "copy.raw"
    code = main([*command, str(path), *([str(target)] if command[0] == "convert" else [])])
    # A snapshot table that cannot be read leaves nothing to list.
    assert code == 0 or command[0] == "snapshot"
    assert "warning: " in capfd.readouterr().err
    if target.exists():
        assert target.read_bytes()[: len(DATA)] == DATA


@pytest.mark.parametrize("name", BITMAPS)
def test_a_check_finds_it_and_checks_the_rest(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(damaged(name))
    assert main(["check", str(path)]) == EXIT_CORRUPT
    told = capfd.readouterr()
    assert "bitmap" in told.err and "allocated" in told.out


@pytest.mark.parametrize("name", LOST_TABLES)
def test_wrong_refcounts_tell_nothing_of_lost_data(name: str, tmp_path: Path) -> None:
    path, target = tmp_path / "damaged.qcow2", tmp_path / "copy.raw"
    path.write_bytes(damaged(name))
    assert main(["convert", "-q", str(path), str(target)]) == 0
    assert target.read_bytes()[: len(DATA)] == DATA


class TestRebuilding:
    """A refcount table that is lost is made anew by a repair of all."""

    @pytest.fixture(params=LOST_TABLES)
    def content(self, request: pytest.FixtureRequest) -> bytes:
        return damaged(request.param)

    def test_it_is_new(self, content: bytes) -> None:
        device = SimulatedDevice(content)
        with jqcow.open_device(device, "r+", repair="all") as image:
            assert image.repaired is not None and image.repaired.refcount_table and image.repaired.changed
            assert image.check().ok and image.pread(len(DATA), 0) == DATA
            image.pwrite(b"on", 1 << 19)
        device.reopen()
        with jqcow.open_device(device, snapshot="kept") as image:
            assert image.check().ok and image.warnings == () and image.pread(len(DATA), 0) == DATA

    def test_a_check_calls_it_corrupt(self, content: bytes) -> None:
        with jqcow.open_device(SimulatedDevice(content)) as image:
            assert image.check().errors

    def test_leaks_alone_are_refused(self, content: bytes) -> None:
        with pytest.raises(JqcowError), jqcow.open_device(SimulatedDevice(content), "r+", repair="leaks"):
            pass

    def test_after_a_crash_it_is_as_before_or_done(self, content: bytes) -> None:
        """At each moment the disk is read, and the repair can be done again."""
        device = SimulatedDevice(content)
        jqcow.open_device(device, "r+", repair="all", journal_size=1 << 16).close()
        for state in enumerate_states(device, budget=40):
            crashed = device.crash(state)
            with jqcow.open_device(crashed) as image:
                assert image.pread(len(DATA), 0) == DATA
            crashed.reopen()
            with jqcow.open_device(crashed, "r+", repair="all") as image:
                assert image.check().ok and image.pread(len(DATA), 0) == DATA

    def test_other_metadata_must_be_sound(self) -> None:
        """Nothing is guessed where the tables contradict each other too."""
        image = tables()
        table_over_data(image)
        image.set_entry(image.l2 + 8, image.l1 | COPIED)
        with (
            pytest.raises(JqcowError),
            jqcow.open_device(SimulatedDevice(bytes(image.image)), "r+", repair="all"),
        ):
            pass
