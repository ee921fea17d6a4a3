"""Lost data: tables of zeros are looked through before a copy, and a salvage tells what it could not read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow import CorruptionError
from jqcow.cli.main import main
from jqcow.device.disk import Disk, Extent
from jqcow.offline.commit import commit
from jqcow.offline.convert import convert
from jqcow.offline.losses import Losses, LostRange, SalvagedDisk
from jqcow.offline.rebase import rebase
from jqcow.ondisk.naming import DiskFormat

CLUSTER = 4096
SPAN = 512 * CLUSTER
"""What one L2 table maps."""


def make(path: Path, base: str | None = None) -> list[int]:
    """Make an image with data in each of three L2 tables; return their host offsets."""
    base_format: DiskFormat | None = None if base is None else "raw"
    with jqcow.create(
        path,
        4 * SPAN,
        cluster_size=CLUSTER,
        backing_file=base,
        backing_format=base_format,
        journal_size=1 << 16,
    ) as image:
        for number in range(3):
            image.pwrite(bytes([number + 1]) * (4 * CLUSTER), number * SPAN)
        image.flush()
        mapping = image._engine.public.mapping
        return [int(table) for _, table in mapping.l2_tables(0)]


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def zeroed(tmp_path: Path) -> Path:
    """Return an image whose second L2 table was overwritten with zeros."""
    path = tmp_path / "zeroed.qcow2"
    poke(path, make(path)[1], bytes(CLUSTER))
    return path


def test_a_table_of_zeros_that_hides_data_is_refused(zeroed: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptionError, match="no table names it") as refused:
        convert(zeroed, tmp_path / "out")
    assert "lost data" in refused.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    convert(zeroed, tmp_path / "out", target_format="raw", salvage=True, verify=True)
    assert (tmp_path / "out").read_bytes()[SPAN : 2 * SPAN] == bytes(SPAN)


def test_an_image_that_lost_its_whole_l1_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l1.qcow2"
    make(path)
    with jqcow.open(path) as image:
        l1 = image._engine.public.mapping.l1
    poke(path, l1.offset, bytes(8 * l1.entry_count))
    with pytest.raises(CorruptionError, match="no table names it"):
        convert(path, tmp_path / "out")


def test_a_table_that_discards_emptied_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "discarded.qcow2"
    make(path)
    with jqcow.open(path, "r+") as image:
        image.discard(4 * CLUSTER, SPAN)
    assert convert(path, tmp_path / "out").lost == ()


def test_leaks_without_an_empty_table_are_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "leaks.qcow2"
    # The last of the four entries alone.
    poke(path, make(path)[1] + 3 * 8, bytes(8))
    assert main(["check", "-q", str(path)]) == 3
    convert(path, tmp_path / "out")


def test_commit_and_rebase_refuse_it_too(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * (4 * SPAN))
    path = tmp_path / "overlay.qcow2"
    poke(path, make(path, "base.raw")[1], bytes(CLUSTER))
    before = path.read_bytes()
    with pytest.raises(CorruptionError, match="no table names it"):
        commit(path, allow_files=True)
    with pytest.raises(CorruptionError, match="no table names it"):
        rebase(path, None, allow_files=True)
    assert path.read_bytes() == before
    assert (tmp_path / "base.raw").read_bytes() == b"b" * (4 * SPAN)


def test_rebase_looks_into_the_old_backing_files(zeroed: Path, tmp_path: Path) -> None:
    """What they lost would be zeros from then on."""
    (tmp_path / "new.raw").write_bytes(b"n" * (4 * SPAN))
    path = tmp_path / "overlay.qcow2"
    jqcow.create(path, 4 * SPAN, backing_file=zeroed.name, backing_format="qcow2").close()
    before = path.read_bytes()
    with pytest.raises(CorruptionError, match="no table names it"):
        rebase(path, "new.raw", "raw", allow_files=True)
    assert path.read_bytes() == before


def test_a_damaged_snapshot_table_does_not_stop_it(zeroed: Path, tmp_path: Path) -> None:
    """Then nothing tells what is lost."""
    poke(zeroed, 60, (1).to_bytes(4, "big") + (1 << 40 | 1).to_bytes(8, "big"))
    convert(zeroed, tmp_path / "out")


# Salvage


def test_each_damage_costs_what_it_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = tmp_path / "image.qcow2", tmp_path / "out"
    tables = make(path)
    with jqcow.open(path) as image:
        l1 = image._engine.public.mapping.l1.offset
    capsys.readouterr()
    poke(path, l1 + 8, (1 << 60).to_bytes(8, "big"))
    poke(path, tables[0] + 8, (1 << 57).to_bytes(8, "big"))
    poke(path, tables[2] + 2 * 8, ((1 << 63) | (1 << 50)).to_bytes(8, "big"))
    assert main(["convert", "-q", str(path), str(target)]) == 1
    assert not target.exists()
    capsys.readouterr()
    assert main(["convert", "-q", "--salvage", str(path), str(target)]) == 0
    warnings = capsys.readouterr().err.splitlines()
    ranges = [(CLUSTER, CLUSTER), (SPAN, SPAN), (2 * SPAN + 2 * CLUSTER, CLUSTER)]
    assert len(warnings) == len(ranges)
    for warning, (offset, length) in zip(warnings, ranges, strict=True):
        assert f"guest offset {offset:#x}, {length} bytes (host offset 0x" in warning
    expected = bytearray(4 * SPAN)
    for number in range(3):
        expected[number * SPAN : number * SPAN + 4 * CLUSTER] = bytes([number + 1]) * (4 * CLUSTER)
    for offset, length in ranges:
        expected[offset : offset + length] = bytes(length)
    assert target.read_bytes() == expected


def test_a_truncated_image_is_salvaged(tmp_path: Path) -> None:
    path, target = tmp_path / "image.qcow2", tmp_path / "out"
    make(path)
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"y" * (200 * CLUSTER), 16 * CLUSTER)
    with jqcow.open(path) as image:
        run = max(image.extents(), key=lambda extent: extent.host_offset or 0)
    assert run.host_offset is not None
    with path.open("r+b") as file:
        file.truncate(run.host_offset + CLUSTER)
    report = convert(path, target, target_format="raw", salvage=True, verify=True)
    assert [(lost.offset, lost.end) for lost in report.lost] == [(run.offset + CLUSTER, run.end)]
    assert target.read_bytes()[run.offset : run.end] == b"y" * CLUSTER + bytes(run.length - CLUSTER)


class _Bad(Disk):
    """A disk of 1 MiB of data with places that the host cannot read."""

    size = 1 << 20

    def __init__(self, bad: set[int], error: int) -> None:
        self.bad = bad
        self.error = error

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        yield Extent(offset, length, "data", offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if any(offset <= place < offset + len(buffer) for place in self.bad):
            raise OSError(self.error, "bad")
        buffer[:] = b"x" * len(buffer)

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("damage", ["L1 entry", "compressed cluster"])
def test_a_damaged_base_costs_an_overlay_nothing_of_its_own(damage: str, tmp_path: Path) -> None:
    """An error in a lower layer is about as much of the disk as that layer was asked for."""
    base, path, out = tmp_path / "base", tmp_path / "overlay", tmp_path / "out"
    with jqcow.create(base, 16 << 20, journal_size=1 << 16) as image:
        image.pwrite_compressed(b"base" * 16384, 0)
        image.flush()
        place = image._guest.reads.entry(0).host
        l1 = image._engine.public.mapping.l1.offset
    with jqcow.create(
        path, 16 << 20, cluster_size=4096, backing_file="base", backing_format="qcow2"
    ) as image:
        image.pwrite(b"own" * 4096, 8192)
    poke(base, *((l1, b"\x7f" * 8) if damage == "L1 entry" else (place, b"\xff" * 16)))
    report = convert(path, out, allow_files=True, salvage=True, target_format="raw")
    assert out.read_bytes()[8192 : 8192 + 3 * 4096] == b"own" * 4096
    inside = [lost for lost in report.lost if lost.offset < 8192 + 3 * 4096 and lost.end > 8192]
    assert report.lost and not inside


def test_what_the_host_cannot_read_costs_a_piece() -> None:
    told: list[LostRange] = []
    buffer = bytearray(1 << 20)
    SalvagedDisk(_Bad({5000, 100_000, 104_448}, errno.EIO), told.append).read_into(memoryview(buffer), 0)
    assert sorted(lost.offset for lost in told) == [4096, 98304, 102400]
    assert buffer.count(0) == 3 * 4096


def test_another_error_of_the_host_is_raised() -> None:
    disk = SalvagedDisk(_Bad({0}, errno.ENOMEM), lambda lost: None)
    with pytest.raises(OSError, match="bad"):
        disk.read_into(memoryview(bytearray(4096)), 0)


def test_neighbours_are_told_as_one() -> None:
    losses = Losses()
    for offset in (2048, 0, 512):
        losses.add(LostRange(offset, 512, offset + 1, "why"))
    assert losses.found() == (LostRange(0, 1024, 1, "why"), LostRange(2048, 512, 2049, "why"))
