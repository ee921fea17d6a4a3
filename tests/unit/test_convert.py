"""Does a converted disk equal its source, take no more space than it must, and appear whole or not at all?"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
import threading
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.device import libc
from jqcow.disks.chain import open_disk
from jqcow.disks.files import probe_format
from jqcow.disks.making import create_raw
from jqcow.offline import convert as converting
from jqcow.offline.build import ImageBuilder
from jqcow.offline.compare import first_difference, nonzero_runs
from jqcow.offline.convert import ConvertReport, convert
from jqcow.offline.info import read_info
from jqcow.ondisk.blank import refcount_clusters
from jqcow.ondisk.compression import CompressionType
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import CREATED_HEADER_BYTES, INCOMPATIBLE_COMPRESSION, Header
from jqcow.ondisk.l2 import compressed_entry
from jqcow.ondisk.layout import Geometry
from jqcow.testing import SimulatedDevice
from tests.support.compressed import compressible, mixed_disk, streams_of
from tests.support.qemu import done, done_in_spite_of_load, qemu_io

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


def test_clusters_in_holes_of_the_file_are_not_read(tmp_path: Path) -> None:
    done("qemu-img", "create", "-qf", "qcow2", "-o", "preallocation=metadata", tmp_path / "a.qcow2", "1G")
    report = convert(tmp_path / "a.qcow2", tmp_path / "b.raw", target_format="raw", verify=True)
    assert report.read_bytes == 0
    qemu_io(tmp_path / "a.qcow2", "write -P 7 100M 300k", "write -P 8 700M 64k")
    report = convert(tmp_path / "a.qcow2", tmp_path / "c.qcow2", verify=True)
    assert 364 << 10 <= report.read_bytes < MIB
    # What is below is hidden by a hole of the file above.
    (tmp_path / "base.raw").write_bytes(b"below" * 20_000)
    overlay = tmp_path / "o.qcow2"
    done("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", tmp_path / "base.raw", overlay)
    qemu_io(overlay, "write -P 1 0 64k")
    with jqcow.open(overlay, allow_files=True) as image:
        host = next(image.extents()).host_offset
    assert host is not None
    with overlay.open("r+b") as file:
        libc.call("fallocate", file.fileno(), 3, ctypes.c_int64(host), ctypes.c_int64(65536))
    report = convert(overlay, tmp_path / "d.raw", target_format="raw", allow_files=True, verify=True)
    done("qemu-img", "compare", "-f", "qcow2", "-F", "raw", overlay, tmp_path / "d.raw")
    assert report.read_bytes < 64 << 10


def test_holes_of_an_encrypted_image_are_noise_to_the_guest(tmp_path: Path) -> None:
    secret = f"secret,id=s,data={'x' * 8}"
    form = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,preallocation=metadata"
    created = ("create", "-qf", "qcow2", "--object", secret, "-o", form, tmp_path / "a.qcow2", "1M")
    done_in_spite_of_load("qemu-img", *created)
    report = convert(tmp_path / "a.qcow2", tmp_path / "b.raw", target_format="raw", passphrase=b"x" * 8)
    assert report.read_bytes == report.written_bytes == MIB


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
            closing(open_disk(tmp_path / "a.raw", "raw")) as one,
            closing(open_disk(tmp_path / "b.raw", "raw")) as other,
        ):
            assert first_difference(one, other) == offset
            assert first_difference(other, one) == offset


def test_a_shorter_disk_differs_at_its_end(tmp_path: Path) -> None:
    create_raw(tmp_path / "a.raw", MIB)
    create_raw(tmp_path / "b.raw", 2 * MIB)
    with (
        closing(open_disk(tmp_path / "a.raw", "raw")) as one,
        closing(open_disk(tmp_path / "b.raw", "raw")) as other,
    ):
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
    builder = ImageBuilder(SimulatedDevice(), MIB, Form(12))
    builder.write(memoryview(b"x" * 4096), 8192)
    for offset in (8192, 4096, 16384 + 512):
        with pytest.raises(ValueError, match="in the order of the guest"):
            builder.write(memoryview(b"x" * 4096), offset)


# Compressed


def compressed(raw: Path, target: Path, **options: Any) -> ConvertReport:
    return convert(raw, target, source_format="raw", compressed=True, overwrite=True, **options)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_the_number_of_threads_changes_no_byte(
    tmp_path: Path, kind: CompressionType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.raw").write_bytes(mixed_disk(6 * MIB, seed=1))
    contents = set()
    for count in (1, 2, 7):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=count: set(range(count)))
        compressed(tmp_path / "a.raw", tmp_path / "b.qcow2", compression_type=kind)
        contents.add((tmp_path / "b.qcow2").read_bytes())
    assert len(contents) == 1


def test_what_does_not_shrink_is_stored_as_it_is(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(MIB)
    (tmp_path / "a.raw").write_bytes(noise + bytes(MIB))
    report = compressed(tmp_path / "a.raw", tmp_path / "b.qcow2")
    assert (report.written_bytes, report.compressed_bytes, report.packed_bytes) == (MIB, 0, 0)
    assert report.compression_type == "zlib"
    with jqcow.open(tmp_path / "b.qcow2") as image:
        assert image.pread(2 * MIB, 0) == noise + bytes(MIB)


def test_a_cluster_is_compressed_if_that_saves_a_sector(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(4096)
    for saved, expected in ((300, 0), (700, 4096)):
        (tmp_path / "a.raw").write_bytes(noise[: 4096 - saved] + bytes(saved))
        report = compressed(tmp_path / "a.raw", tmp_path / "b.qcow2", cluster_size=4096)
        assert report.compressed_bytes == expected


def test_a_level_trades_time_for_space(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(compressible(2 * MIB, seed=1))
    for kind, levels in (("zlib", (1, 9)), ("zstd", (1, 19))):
        fast, small = (
            compressed(tmp_path / "a.raw", tmp_path / "b", compression_type=kind, compression_level=level)
            for level in levels
        )
        assert small.packed_bytes < fast.packed_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_format": "raw"}, "raw file cannot be compressed"),
        ({"target_format": "raw", "compressed": False, "compression_type": "zstd"}, "raw file"),
        ({"compressed": False, "compression_level": 1}, "of use only"),
        ({"compression_level": 10}, "from 1 to 9"),
        ({"compression_type": "zstd", "compression_level": 23}, "from 1 to 22"),
        ({"compression_type": "lz4"}, "zlib or zstd, not lz4"),
    ],
)
def test_impossible_compressions_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    create_raw(tmp_path / "a.raw", MIB)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.raw", tmp_path / "b", **{"compressed": True, **options})
    assert not (tmp_path / "b").exists()


def test_a_type_without_compressed_clusters_is_announced_all_the_same(tmp_path: Path) -> None:
    create_raw(tmp_path / "a.raw", MIB)
    report = convert(tmp_path / "a.raw", tmp_path / "b", source_format="raw", compression_type="zstd")
    assert report.compression_type is None
    header = Header.unpack((tmp_path / "b").read_bytes()[:CREATED_HEADER_BYTES])
    assert (header.compression_type, header.incompatible_features) == (1, INCOMPATIBLE_COMPRESSION)


def test_no_thread_and_no_target_outlive_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.raw").write_bytes(compressible(8 * MIB, seed=1))

    def full(self: ImageBuilder, stream: bytes, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ImageBuilder, "write_compressed", full)
    with pytest.raises(OSError, match="No space"):
        compressed(tmp_path / "a.raw", tmp_path / "b.qcow2")
    assert not [thread for thread in threading.enumerate() if "compress" in thread.name]
    assert not (tmp_path / "b.qcow2").exists()
    assert no_partial_file(tmp_path)


def test_memory_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    """64 MiB in clusters of which each is compressed; two threads hold two batches each."""
    with (tmp_path / "a.raw").open("wb") as file:
        for seed in range(16):
            file.write(compressible(MIB, seed) * 4)
    tracemalloc.start()
    try:
        compressed(tmp_path / "a.raw", tmp_path / "b.qcow2")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 * MIB


# The builder


def pieces(streams: list[int | None], cluster_bits: int) -> tuple[SimulatedDevice, list[tuple[int, int]]]:
    """Build clusters of these compressed lengths (None: not compressed); return where the streams lie."""
    device, cluster_bytes = SimulatedDevice(), 1 << cluster_bits
    builder = ImageBuilder(device, len(streams) * cluster_bytes, Form(cluster_bits))
    for index, length in enumerate(streams):
        if length is None:
            builder.write(memoryview(b"x" * cluster_bytes), index * cluster_bytes)
        else:
            builder.write_compressed(b"c" * length, index * cluster_bytes)
    builder.finish()
    return device, [(host, length) for _, host, length in streams_of(device.content())]


def refcounts_of(device: SimulatedDevice, cluster_bits: int) -> list[int]:
    """Return the refcounts of the first refcount block."""
    table = int.from_bytes(device.pread(8, 48), "big")
    block = int.from_bytes(device.pread(8, table), "big")
    count = device.size() >> cluster_bits
    return list(struct.unpack(f">{count}H", device.pread(2 * count, block)))


def test_streams_are_packed_across_neighbouring_host_clusters() -> None:
    device, places = pieces([1, 513, 3000, 2000], 12)
    assert places == [(8192, 512), (8704, 1024), (9728, 3072), (12800, 2048)]
    # Header, L1 table, two packed clusters, L2 table, refcount table, refcount block.
    assert refcounts_of(device, 12) == [1, 1, 3, 2, 1, 1, 1]
    assert device.size() == 7 * 4096


def test_a_stream_does_not_cross_what_lies_between() -> None:
    device, places = pieces([3000, None, 512, 1000, 100], 12)
    assert places == [(8192, 3072), (11264, 512), (16384, 1024), (17408, 512)]
    assert refcounts_of(device, 12) == [1, 1, 2, 1, 2, 1, 1, 1]


def test_a_host_cluster_can_have_as_many_streams_as_sectors() -> None:
    device, places = pieces([5] * 4097, 21)
    assert places[4095:] == [(3 * 2 * MIB - 512, 512), (3 * 2 * MIB, 512)]
    assert refcounts_of(device, 21)[:4] == [1, 1, 4096, 1]


def test_what_lies_behind_a_stream_in_its_cluster_is_zero() -> None:
    device, ((host, _),) = pieces([700], 12)
    assert device.pread(4096, host) == b"c" * 700 + bytes(4096 - 700)


@pytest.mark.parametrize(
    ("offset", "length", "bits", "fields"),
    [
        (0x10000, 512, 16, (0x10000, 0)),
        (0x10001, 512, 16, (0x10001, 1)),
        (0x101FF, 1, 16, (0x101FF, 0)),
        ((1 << 54) - 512, 65535, 16, ((1 << 54) - 512, 127)),
        ((1 << 49) - 512, 2 << 20, 21, ((1 << 49) - 512, 4095)),
        ((1 << 56) - 512, 600, 9, ((1 << 56) - 512, 1)),
    ],
)
def test_compressed_entries(offset: int, length: int, bits: int, fields: tuple[int, int]) -> None:
    entry = compressed_entry(offset, length, bits)
    width = 62 - (bits - 8)
    assert entry >> 62 == 1
    assert (entry & ((1 << width) - 1), (entry & ((1 << 62) - 1)) >> width) == fields
