"""Preallocated disks: mapped before they are written to, in new files, in targets and behind the old end."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

import jqcow
from jqcow.device import libc
from jqcow.disks.making import create_raw
from jqcow.offline.convert import convert
from jqcow.offline.overlay import create_overlay
from jqcow.ondisk.form import Form, Preallocation
from jqcow.ondisk.l2 import codec_of
from jqcow.ondisk.layout import HostOffset
from jqcow.ondisk.preallocated import MappedRow
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

MIB = 1 << 20
MODES: tuple[Preallocation, ...] = ("metadata", "falloc", "full")


def blocks_bytes(path: Path) -> int:
    return os.stat(path).st_blocks * 512


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extended", [False, True])
def test_a_new_disk_has_its_place(tmp_path: Path, mode: Preallocation, extended: bool) -> None:
    path = tmp_path / "image"
    with jqcow.create(path, 8 * MIB, preallocation=mode, extended_l2=extended) as image:
        report = image.check()
        assert report.ok and report.allocated_clusters == 128
        assert image.pread(8 * MIB, 0) == bytes(8 * MIB)
        image.pwrite(b"x" * 4096, 5 * MIB)
    assert os.stat(path).st_size >= 8 * MIB
    assert (blocks_bytes(path) >= 8 * MIB) == (mode != "metadata")
    with jqcow.open(path) as image:
        assert image.check().ok and image.pread(4097, 5 * MIB) == (b"x" * 4096).ljust(4097, b"\0")


@pytest.mark.parametrize("mode", MODES)
def test_writing_a_new_disk_needs_no_journal(tmp_path: Path, mode: Preallocation) -> None:
    with jqcow.create(tmp_path / "image", MIB, preallocation=mode) as image:
        image.pwrite(b"x" * 100_000, 7)
        image.flush()
        assert image.info().journal is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_what_a_disk_grows_by(mode: Preallocation, cluster_size: int) -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, MIB + 512, cluster_size=cluster_size, journal_size=65536) as image:
        image.pwrite(b"x" * 512, MIB)
        image.create_snapshot("before")
        image.resize(3 * MIB, mode)
        assert image.check().ok and image.size == 3 * MIB
        assert image.pread(2 * MIB, MIB) == (b"x" * 512).ljust(2 * MIB, b"\0")
        kinds = {extent.kind for extent in image.extents(offset=MIB + cluster_size)}
        assert kinds == {"data"}
        image.apply_snapshot("before")
        image.delete_snapshot("before")
        assert image.check().ok
    device.reopen()
    with jqcow.open_device(device) as image:
        assert image.check().ok and image.size == MIB + 512


def test_only_growing_can_be_preallocated() -> None:
    with jqcow.create_on_device(SimulatedDevice(), MIB, journal_size=65536) as image:
        for size in (MIB, MIB - 512):
            with pytest.raises(ValueError, match="grows"):
                image.resize(size, "full")
        with pytest.raises(ValueError, match="preallocation is"):
            image.resize(2 * MIB, "all")  # type: ignore[arg-type]
        image.resize(MIB)
        assert image.size == MIB


def test_a_full_host_changes_nothing() -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, MIB, cluster_size=4096, journal_size=65536) as image:
        image.pwrite(b"x" * 512, 0)
        image.flush()
        for mode in ("falloc", "full"):
            device.faults = FaultPlan(Fault(errno.ENOSPC, call="allocate"))
            with pytest.raises(OSError, match="No space"):
                image.resize(4 * MIB, mode)
            device.faults = None
            assert image.size == MIB and image.check().ok
        image.resize(4 * MIB, "full")
        assert image.check().ok


def test_a_rolled_back_growth_leaves_nothing() -> None:
    with jqcow.create_on_device(SimulatedDevice(), MIB, cluster_size=4096, journal_size=65536) as image:
        with image.transaction() as transaction:
            savepoint = transaction.savepoint()
            transaction.resize(8 * MIB, "metadata")
            transaction.pwrite(b"in", 7 * MIB)
            savepoint.rollback()
            transaction.resize(2 * MIB, "metadata")
            transaction.pwrite(b"out", 2 * MIB - 3)
        assert image.check().ok and image.pread(3, 2 * MIB - 3) == b"out"


def test_a_terabyte_takes_little_memory_and_one_small_record(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "image"
    jqcow.create(path, MIB, cluster_size=2 * MIB).close()
    with jqcow.open(path, "r+") as image:
        image.resize(1 << 40, "metadata")
        journal = image.info().journal
        assert journal is not None and journal.length == 8 * MIB
        image.pwrite(b"x", (1 << 40) - 1)
    jqcow.create(tmp_path / "new", 1 << 40, cluster_size=2 * MIB, preallocation="metadata").close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    assert blocks_bytes(path) < 64 * MIB
    with jqcow.open(path) as image:
        assert image.pread(1, (1 << 40) - 1) == b"x" and image.check().ok


def test_over_a_backing_file_subclusters_are_needed(tmp_path: Path) -> None:
    jqcow.create(tmp_path / "base", MIB).close()
    for extended in (False, True):
        path = tmp_path / f"top{extended}"
        if extended:
            create_overlay(
                path,
                MIB,
                backing_file="base",
                backing_format="qcow2",
                preallocation="metadata",
                extended_l2=True,
            )
            continue
        with pytest.raises(ValueError, match="extended_l2"):
            create_overlay(path, MIB, backing_file="base", backing_format="qcow2", preallocation="full")
        assert not path.exists()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extended", [False, True])
def test_a_preallocated_target_reads_as_its_source(
    tmp_path: Path, mode: Preallocation, extended: bool
) -> None:
    with jqcow.create(tmp_path / "source", MIB + 512) as image:
        image.pwrite(b"x" * 70_000, 100_000)
        image.pwrite(b"y", MIB + 511)
    convert(tmp_path / "source", tmp_path / "target", preallocation=mode, extended_l2=extended, verify=True)
    with jqcow.open(tmp_path / "target") as image:
        report = image.check()
        assert report.ok and report.allocated_clusters == 17


def test_what_has_no_preallocation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raw"):
        create_raw(tmp_path / "raw", MIB, preallocation="metadata")
    create_raw(tmp_path / "raw", MIB, preallocation="falloc", nocow=True)
    assert blocks_bytes(tmp_path / "raw") >= MIB
    with pytest.raises(ValueError, match="compressed"):
        convert(tmp_path / "raw", tmp_path / "to", source_format="raw", compressed=True, preallocation="full")
    convert(tmp_path / "raw", tmp_path / "to", source_format="raw", target_format="raw", preallocation="full")
    assert blocks_bytes(tmp_path / "to") >= MIB


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_the_flag_does_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def ioctl(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(libc.fcntl, "ioctl", ioctl)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            jqcow.create(tmp_path / "image", MIB, nocow=True)
        assert not list(tmp_path.iterdir())
    else:
        jqcow.create(tmp_path / "image", MIB, nocow=True).close()


def test_the_flag_is_set_before_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[bytes] = []

    def ioctl(descriptor: int, request: int, data: bytes) -> bytes:
        assert os.fstat(descriptor).st_size == 0
        set_to.append(data)
        return (0x80000).to_bytes(4, "little")

    monkeypatch.setattr(libc.fcntl, "ioctl", ioctl)
    jqcow.create(tmp_path / "image", MIB, nocow=True).close()
    assert int.from_bytes(set_to[-1], "little") == 0x880000


def test_lazy_refcounts_stay(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with jqcow.create(path, MIB, lazy_refcounts=True, preallocation="metadata") as image:
        image.resize(2 * MIB, "metadata")
        image.pwrite(b"x", 0)
    with jqcow.open(path, "r+") as image:
        image.discard(MIB, 0)
        assert image.info().lazy_refcounts and not image.info().dirty
    with jqcow.open(path) as image:
        assert image.info().lazy_refcounts and not image.info().dirty and image.check().ok


@pytest.mark.parametrize("extended", [False, True])
def test_rows_are_what_their_entries_say(extended: bool) -> None:
    codec = codec_of(Form(14, has_subclusters=extended).geometry)
    for entry_for in (codec.preallocated, lambda host: codec.preallocated_zeros(host, as_data=True)):
        row = MappedRow(codec, codec.per_table - 3, codec.per_table + 5, HostOffset(1 << 20), entry_for)
        tables = list(row.l2_tables())
        assert len(tables) == len(row.table_indices) == 3
        decoded = [codec.decode(table, index) for table in tables for index in range(codec.per_table)]
        mapped = decoded[codec.per_table - 3 : 2 * codec.per_table + 2]
        assert mapped == [entry_for(HostOffset((1 << 20) + (at << 14))) for at in range(row.count)]
        assert sum(entry.host != 0 for entry in decoded) == row.count
    assert not list(row.behind(row.end).l2_tables())


def test_what_was_read_behind_the_end_before_is_not_believed() -> None:
    """The snapshot table is read in long parts: also where the new tables go."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, MIB, cluster_size=512, journal_size=65536) as image:
        image.create_snapshot("kept")
        assert len(image.snapshots()) == 1
        image.resize(3 * MIB, "metadata")
        assert image.check().ok
        image.pwrite(b"y" * 1024, 2 * MIB)
        assert image.check().ok
    device.reopen()
    with jqcow.open_device(device) as image:
        assert image.check().ok and image.pread(1024, 2 * MIB) == b"y" * 1024
