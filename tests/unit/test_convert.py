"""Does a converted disk equal its source, take no more space than it must, and appear whole or not at all?"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import jqcow
from jqcow.offline import convert as converting
from jqcow.offline.build import ImageBuilder
from jqcow.offline.compare import first_difference
from jqcow.offline.convert import convert, create_raw, nonzero_runs
from jqcow.offline.disks import open_disk
from jqcow.offline.info import probe_format, read_info
from jqcow.ondisk.blank import refcount_clusters
from jqcow.ondisk.layout import Geometry
from jqcow.testing import SimulatedDevice

MIB = 1 << 20


def scattered(path: Path, size: int, seed: int = 1) -> bytes:
    """Make a sparse raw file with data here and there; return its content."""
    source = random.Random(seed)
    content = bytearray(size)
    for _ in range(12):
        length = min(size, source.choice([1, 511, 512, 4096, 65536, 300_000]))
        offset = source.randrange(size - length + 1)
        content[offset : offset + length] = source.randbytes(length)
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, 4096):
            piece = content[offset : offset + 4096]
            if any(piece):
                file.seek(offset)
                file.write(piece)
    return bytes(content)


def no_partial_file(directory: Path) -> bool:
    return not [name for name in os.listdir(directory) if name.endswith(".partial")]


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("size", [512, 65536, 5 * MIB + 1536])
def test_raw_to_qcow2_and_back(tmp_path: Path, cluster_size: int, size: int) -> None:
    content = scattered(tmp_path / "a.raw", size)
    report = convert(tmp_path / "a.raw", tmp_path / "b.qcow2", cluster_size=cluster_size, verify=True)
    assert (report.source_format, report.target_format, report.virtual_size) == ("raw", "qcow2", size)
    with jqcow.open(tmp_path / "b.qcow2") as image:
        assert image.pread(size, 0) == content
        assert image.check().ok
    convert(tmp_path / "b.qcow2", tmp_path / "c.raw", target_format="raw", verify=True)
    assert (tmp_path / "c.raw").read_bytes() == content


def test_qcow2_to_other_clusters(tmp_path: Path) -> None:
    content = scattered(tmp_path / "a.raw", 3 * MIB)
    convert(tmp_path / "a.raw", tmp_path / "b.qcow2", cluster_size=65536)
    convert(tmp_path / "b.qcow2", tmp_path / "c.qcow2", cluster_size=512, verify=True)
    with jqcow.open(tmp_path / "c.qcow2") as image:
        assert image.pread(3 * MIB, 0) == content
        assert image.check().ok


def test_a_converted_image_can_be_written(tmp_path: Path) -> None:
    scattered(tmp_path / "a.raw", 2 * MIB)
    convert(tmp_path / "a.raw", tmp_path / "b.qcow2", cluster_size=4096)
    with jqcow.open(tmp_path / "b.qcow2", "r+") as image:
        image.pwrite(b"new" * 100_000, 1 * MIB)
        image.resize(64 * MIB)
        image.pwrite(b"far", 63 * MIB)
        assert image.check().ok


def test_the_journal_of_a_crashed_source_is_replayed_in_memory(tmp_path: Path) -> None:
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, 4 * MIB)
    image.pwrite(b"kept" * 1000, MIB)
    image.flush()
    crashed = device.killed()
    (tmp_path / "a.qcow2").write_bytes(crashed.pread(crashed.size(), 0))
    before = (tmp_path / "a.qcow2").read_bytes()
    convert(tmp_path / "a.qcow2", tmp_path / "b.raw", target_format="raw", verify=True)
    assert (tmp_path / "b.raw").read_bytes()[MIB : MIB + 4000] == b"kept" * 1000
    assert (tmp_path / "a.qcow2").read_bytes() == before


def test_zeros_take_no_space(tmp_path: Path) -> None:
    content = bytes(8 * MIB) + b"x" * 4096 + bytes(8 * MIB)
    (tmp_path / "a.raw").write_bytes(content)
    report = convert(tmp_path / "a.raw", tmp_path / "b.qcow2")
    assert report.written_bytes == 65536
    assert report.target_bytes < MIB
    convert(tmp_path / "b.qcow2", tmp_path / "c.raw", target_format="raw")
    assert (tmp_path / "c.raw").stat().st_blocks * 512 <= 65536
    assert (tmp_path / "c.raw").read_bytes() == content


def test_holes_are_not_read(tmp_path: Path) -> None:
    create_raw(tmp_path / "a.raw", 1 << 40)
    report = convert(tmp_path / "a.raw", tmp_path / "b.qcow2", verify=True)
    assert (report.read_bytes, report.written_bytes) == (0, 0)


def test_an_odd_last_sector_is_padded(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * 1000)
    assert convert(tmp_path / "a.raw", tmp_path / "b.qcow2", verify=True).virtual_size == 1024
    with jqcow.open(tmp_path / "b.qcow2") as image:
        assert image.pread(1024, 0) == b"x" * 1000 + bytes(24)


def test_an_existing_target_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    scattered(tmp_path / "a.raw", MIB)
    (tmp_path / "b.qcow2").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        convert(tmp_path / "a.raw", tmp_path / "b.qcow2")
    assert (tmp_path / "b.qcow2").read_bytes() == b"precious"
    convert(tmp_path / "a.raw", tmp_path / "b.qcow2", overwrite=True)
    assert read_info(tmp_path / "b.qcow2").format == "qcow2"
    with jqcow.open(tmp_path / "b.qcow2"), pytest.raises(jqcow.ImageInUse):
        convert(tmp_path / "a.raw", tmp_path / "b.qcow2", overwrite=True)
    assert no_partial_file(tmp_path)


def test_source_and_target_differ(tmp_path: Path) -> None:
    scattered(tmp_path / "a.raw", MIB)
    (tmp_path / "link").symlink_to(tmp_path / "a.raw")
    with pytest.raises(ValueError, match="as well as"):
        convert(tmp_path / "a.raw", tmp_path / "link", overwrite=True)


def test_nothing_is_left_when_the_source_cannot_be_read(tmp_path: Path) -> None:
    scattered(tmp_path / "a.raw", MIB)
    convert(tmp_path / "a.raw", tmp_path / "b.qcow2")
    damaged = bytearray((tmp_path / "b.qcow2").read_bytes())
    l1_table = int.from_bytes(damaged[40:48], "big")
    damaged[l1_table + 7] |= 1
    (tmp_path / "b.qcow2").write_bytes(damaged)
    with pytest.raises(jqcow.CorruptionError):
        convert(tmp_path / "b.qcow2", tmp_path / "c.raw", target_format="raw")
    assert not (tmp_path / "c.raw").exists()
    assert no_partial_file(tmp_path)


def test_verification_finds_a_difference_and_leaves_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scattered(tmp_path / "a.raw", MIB)
    monkeypatch.setattr(converting, "nonzero_runs", lambda data, unit: nonzero_runs(data, unit)[:-1])
    with pytest.raises(jqcow.JqcowError, match="differ at guest offset"):
        convert(tmp_path / "a.raw", tmp_path / "b.qcow2", verify=True)
    assert not (tmp_path / "b.qcow2").exists()
    assert no_partial_file(tmp_path)


@pytest.mark.parametrize("cluster_size", [0, 256, 1000, 4 * MIB])
def test_impossible_cluster_sizes_are_refused(tmp_path: Path, cluster_size: int) -> None:
    scattered(tmp_path / "a.raw", MIB)
    with pytest.raises(ValueError, match="cluster size"):
        convert(tmp_path / "a.raw", tmp_path / "b.qcow2", cluster_size=cluster_size)


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * (5 * MIB))
    told: list[tuple[int, int]] = []
    convert(tmp_path / "a.raw", tmp_path / "b.qcow2", progress=lambda *step: told.append(step))
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, 5 * MIB), (5 * MIB, 5 * MIB))


def test_first_difference_is_the_first(tmp_path: Path) -> None:
    content = bytearray(scattered(tmp_path / "a.raw", 4 * MIB))
    for offset in (4 * MIB - 1, 2 * MIB + 77, 0):
        content[offset] ^= 1
        (tmp_path / "b.raw").write_bytes(content)
        with (
            open_disk(tmp_path / "a.raw", "raw") as (one, _),
            open_disk(tmp_path / "b.raw", "raw") as (other, _),
        ):
            assert first_difference(one, other) == offset
            assert first_difference(other, one) == offset


def test_a_shorter_disk_differs_at_its_end(tmp_path: Path) -> None:
    create_raw(tmp_path / "a.raw", MIB)
    create_raw(tmp_path / "b.raw", 2 * MIB)
    with open_disk(tmp_path / "a.raw", "raw") as (one, _), open_disk(tmp_path / "b.raw", "raw") as (other, _):
        assert first_difference(one, other) == MIB


def test_a_crashed_image_that_lost_sector_0_is_not_taken_for_raw() -> None:
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, MIB)
    image.pwrite(b"a", 0)
    image.flush()
    crashed = device.killed()
    crashed.pwrite(bytes(512), 0)
    assert probe_format(crashed) == "qcow2"


@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
@pytest.mark.parametrize("others", [1, 255, 256, 257, 20_000, 1_000_000])
def test_refcount_blocks_count_themselves(cluster_bits: int, others: int) -> None:
    geometry = Geometry(cluster_bits)
    table, blocks = refcount_clusters(geometry, others)
    used = others + table + blocks
    assert blocks == -(-used // geometry.refcounts_per_cluster)
    assert table * geometry.cluster_bytes >= blocks * 8


def test_the_builder_refuses_to_go_back() -> None:
    builder = ImageBuilder(SimulatedDevice(), MIB, 12)
    builder.write(memoryview(b"x" * 4096), 8192)
    for offset in (8192, 4096, 16384 + 512):
        with pytest.raises(ValueError, match="in the order of the guest"):
            builder.write(memoryview(b"x" * 4096), offset)
