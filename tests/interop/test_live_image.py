"""A live image and QEMU: refused by name, and readable by jqcow without a change. A clean one: left alone."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow.ondisk.root import FEATURE_NAME
from tests.support.qemu import check_clean, done, qemu_io, run

SIZE = 8 << 20
CLUSTERS = [512, 4096, 65536, 2 << 20]


@pytest.fixture(params=CLUSTERS)
def live(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, bytes]]:
    """A copy of an image whose writer was cut off: its path, and what the disk holds."""
    path, copy = tmp_path / "image.qcow2", tmp_path / "live.qcow2"
    chance = random.Random(request.param)
    content = bytearray(SIZE)
    with jqcow.create(path, SIZE, cluster_size=request.param) as image:
        for _ in range(12):
            offset = chance.randrange(SIZE - 70_000)
            data = chance.randbytes(chance.randrange(1, 70_000))
            image.pwrite(data, offset)
            content[offset : offset + len(data)] = data
            image.flush()
        shutil.copyfile(path, copy)
    yield copy, bytes(content)


def test_qemu_refuses_and_names_what_to_run(live: tuple[Path, bytes]) -> None:
    path, _ = live
    for command in (
        ("qemu-img", "info", path),
        ("qemu-img", "check", path),
        ("qemu-img", "convert", "-O", "raw", path, path.with_suffix(".raw")),
        ("qemu-io", "-f", "qcow2", "-c", "read 0 512", path),
    ):
        before = path.read_bytes()
        result = run(*command)
        assert result.returncode != 0 or command[0] == "qemu-io"
        assert FEATURE_NAME.decode() in result.stdout + result.stderr
        assert path.read_bytes() == before


def test_reading_changes_nothing(live: tuple[Path, bytes]) -> None:
    """The right bytes, also from a file that cannot be written, and not one byte of it changed."""
    path, content = live
    path.chmod(0o444)
    before, times = path.read_bytes(), path.stat()
    with jqcow.open(path) as image:
        assert image.recovered is not None and not image.recovered.torn_tail
        assert image.info().journal is not None
        assert image.pread(SIZE, 0) == content
        assert image.check().ok
        image.flush()
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == times.st_mtime_ns


def test_recovered_image_belongs_to_qemu_again(live: tuple[Path, bytes]) -> None:
    path, content = live
    jqcow.open(path, "r+").close()
    check_clean(path)
    raw = path.with_suffix(".raw")
    done("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert raw.read_bytes() == content
    qemu_io(path, "write -P 0x77 1000k 64k")
    with jqcow.open(path) as image:
        assert image.recovered is None
        assert image.pread(65536, 1000 << 10) == b"\x77" * 65536


def test_clean_image_is_left_alone(tmp_path: Path) -> None:
    """Opened for writing, read, flushed and closed: not one byte differs."""
    path = tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu_io(path, "write -P 0x5a 1M 300k", "write -z 2M 64k")
    before = path.read_bytes()
    with jqcow.open(path, "r+") as image:
        image.pread(SIZE, 0)
        image.flush()
        assert image.check().ok
        image.checkpoint()
        image.pwrite(b"", 5)
        image.discard(0, 0)
        # Nothing there to free.
        image.discard(65536, 6 << 20)
        image.write_zeroes(65536, 2 << 20)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cluster_bytes", CLUSTERS)
def test_overwriting_in_place_touches_data_alone(tmp_path: Path, cluster_bytes: int) -> None:
    """Where all is allocated, the file differs only in the guest's own bytes."""
    path = tmp_path / "image.qcow2"
    chance = random.Random(cluster_bytes)
    with jqcow.create(path, SIZE, cluster_size=cluster_bytes) as image:
        image.pwrite(chance.randbytes(SIZE), 0)
    expected = bytearray(path.read_bytes())
    with jqcow.open(path, "r+") as image:
        for _ in range(20):
            offset = chance.randrange(SIZE - 40_000)
            data = chance.randbytes(chance.randrange(1, 40_000))
            position = 0
            for extent in image.extents(len(data), offset):
                assert extent.host_offset is not None
                expected[extent.host_offset : extent.host_offset + extent.length] = data[
                    position : position + extent.length
                ]
                position += extent.length
            image.pwrite(data, offset)
        image.flush()
        assert image.info().journal is None
    assert path.read_bytes() == expected


def test_qemu_and_jqcow_keep_each_other_out(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    with jqcow.create(path, SIZE):
        for command in (["write 0 512"], ["read 0 512"]):
            result = run("qemu-io", "-f", "qcow2", "-c", *command, path)
            assert "lock" in result.stdout + result.stderr
        with pytest.raises(jqcow.ImageInUse):
            jqcow.open(path)
    with jqcow.open(path):
        assert "lock" in run("qemu-io", "-f", "qcow2", "-c", "write 0 512", path).stderr
        done("qemu-img", "info", path)
        jqcow.open(path).close()
        with pytest.raises(jqcow.ImageInUse):
            jqcow.open(path, "r+")
