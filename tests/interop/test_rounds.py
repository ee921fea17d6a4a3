"""jqcow and QEMU change one image in turn; after each turn both find it exact, and read the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import jqcow
from tests.interop.rounds import RawModel, Rounds
from tests.support.qemu import check_clean, compare, done

MIB = 1 << 20
TIB = 1 << 40

SHAPES = [
    pytest.param(512, 2 * MIB + 1536, id="512-byte clusters"),
    pytest.param(1024, 3 * MIB + 512, id="1 KiB clusters"),
    pytest.param(4096, 10 * MIB + 1536, id="4 KiB clusters"),
    pytest.param(65536, 20 * MIB + 1536, id="64 KiB clusters"),
    pytest.param(2 * MIB, 50 * MIB + 77 * 512, id="2 MiB clusters"),
    pytest.param(65536, 512, id="one sector"),
    pytest.param(512, 1024, id="two sectors"),
    pytest.param(65536, TIB, id="1 TiB"),
    pytest.param(65536, 8 * TIB + 512, id="8 TiB"),
]


def start(folder: Path, cluster_bytes: int, size: int, seed: int) -> Rounds:
    return Rounds(
        folder / "image.qcow2", RawModel(folder / "model.raw", size), cluster_bytes, random.Random(seed)
    )


@pytest.mark.parametrize(("cluster_bytes", "size"), SHAPES)
def test_jqcow_and_qemu_in_turn(tmp_path: Path, cluster_bytes: int, size: int) -> None:
    rounds = start(tmp_path, cluster_bytes, size, seed=cluster_bytes ^ size)
    jqcow.create(rounds.image, size, cluster_size=cluster_bytes).close()
    rounds.judge()
    for _ in range(3):
        rounds.by_jqcow(steps=40)
        rounds.by_qemu(steps=25)
    rounds.by_jqcow(steps=10)


@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536])
def test_resizing_in_turn(tmp_path: Path, cluster_bytes: int) -> None:
    """Both grow the disk, QEMU also cuts it; sizes that are no multiple of a cluster included."""
    size = 40 * cluster_bytes + 1536
    rounds = start(tmp_path, cluster_bytes, size, seed=7)
    jqcow.create(rounds.image, size, cluster_size=cluster_bytes).close()
    rounds.by_jqcow(20)
    for size in (50 * cluster_bytes + 512, 61 * cluster_bytes, 30 * cluster_bytes + 1024):
        rounds.resize_by_qemu(size)
        rounds.by_jqcow(10)
        rounds.by_qemu(10)
        rounds.resize_by_jqcow(size + 3 * cluster_bytes + 512)
        rounds.by_qemu(10)
        rounds.by_jqcow(10)


def test_growth_that_moves_the_l1_table(tmp_path: Path) -> None:
    rounds = start(tmp_path, 512, 1 * MIB, seed=3)
    jqcow.create(rounds.image, rounds.model.size, cluster_size=512).close()
    rounds.by_jqcow(20)
    rounds.resize_by_jqcow(64 * MIB)
    rounds.by_jqcow(20)
    rounds.resize_by_qemu(200 * MIB + 512)
    rounds.by_jqcow(20)
    rounds.by_qemu(20)


def test_full_disk_with_tiny_clusters_moves_the_refcount_table(tmp_path: Path) -> None:
    """512-byte clusters: one refcount block covers 128 KiB, one table cluster 8 MiB."""
    path, model = tmp_path / "image.qcow2", RawModel(tmp_path / "model.raw", 20 * MIB)
    chance = random.Random(5)
    with jqcow.create(path, model.size, cluster_size=512) as image:
        first = image.info()
        for offset in range(0, model.size, MIB):
            data = chance.randbytes(MIB)
            image.pwrite(data, offset)
            model.write(data, offset)
        assert image.info().file_size > first.file_size + model.size
    check_clean(path)
    compare(path, model.path)
    with jqcow.open(path, "r+") as image:
        image.discard(model.size, 0)
    check_clean(path)
    assert jqcow.open(path).pread(model.size, 0) == bytes(model.size)


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "lazy_refcounts=on",
        "compat=1.1",
        "compression_type=zstd",
    ],
)
def test_adopting_what_qemu_made(tmp_path: Path, options: str) -> None:
    size = 6 * MIB + 1536
    path = tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    with jqcow.open(path) as image:
        info = image.info()
    rounds = start(tmp_path, info.cluster_size, size, seed=11)
    assert info.lazy_refcounts == ("lazy" in options)
    rounds.by_qemu(15)
    rounds.by_jqcow(30)
    rounds.by_qemu(15)
    rounds.by_jqcow(15)


def test_image_converted_by_qemu(tmp_path: Path) -> None:
    """A filled image comes back from QEMU's own copy, and the copy can be changed."""
    rounds = start(tmp_path, 65536, 8 * MIB, seed=13)
    jqcow.create(rounds.image, 8 * MIB).close()
    rounds.by_jqcow(60)
    copy = tmp_path / "copy.qcow2"
    done("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", rounds.image, copy)
    rounds.image = copy
    rounds.by_jqcow(30)
    rounds.by_qemu(10)
