"""What FUSE asks of a disk that is shown as files, without a mount; tests/outside/test_fuse.py mounts."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.main import main
from jqcow.device import libc
from jqcow.mount import ShownDisk, mount
from jqcow.offline.shown import files_of
from jqcow.ondisk.entries import OFFSET_MASK
from tests.support.patients import Tables
from tests.unit.test_partitions import MIB, SCRIPTS, partitioned

PUNCH = libc.FALLOC_PUNCH_HOLE | libc.FALLOC_KEEP_SIZE


def disk_of(folder: Path) -> Path:
    """Make an image with two partitions, and a snapshot of what the first one held."""
    partitioned(folder / "raw", SCRIPTS["mbr"])
    with jqcow.create(folder / "vm.qcow2", 64 * MIB, cluster_size=4096) as image:
        image.pwrite((folder / "raw").read_bytes()[:512], 0)
        image.pwrite(b"before", MIB)
        image.create_snapshot("before")
        image.pwrite(b"now   ", MIB)
    return folder / "vm.qcow2"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return disk_of(tmp_path)


def shown(image: jqcow.Image, tell: Callable[[str], object] = print) -> ShownDisk:
    return ShownDisk(image, files_of(image), ready=print, tell=tell)


def refused(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == number


def test_files_that_are_only_read(disk: Path) -> None:
    with jqcow.open(disk) as image:
        files = shown(image)
        assert files.readdir("/", 0)[2:] == ["disk.img", "partition1.img", "partition2.img"]
        assert stat.S_ISDIR(files.getattr("/")["st_mode"])
        whole = files.getattr("/disk.img")
        assert (whole["st_size"], oct(whole["st_mode"])) == (64 * MIB, "0o100444")
        assert files.read("/partition1.img", 10, 0, 0) == b"now   " + bytes(4)
        assert files.read("/disk.img", 10, 64 * MIB - 4, 0) == bytes(4)
        assert files.open("/disk.img", os.O_RDONLY) == 0
        refused(errno.EROFS, lambda: files.open("/disk.img", os.O_RDWR))
        refused(errno.EROFS, lambda: files.fallocate("/disk.img", PUNCH, 0, 4096, 0))
        refused(errno.ENOENT, lambda: files.getattr("/other"))
        refused(errno.ENOENT, lambda: files.open("/other", os.O_RDONLY))
        assert files.fsync("/disk.img", 0, 0) == 0


def test_files_that_are_written(disk: Path) -> None:
    with jqcow.open(disk, "r+") as image:
        files = shown(image)
        assert files.write("/partition1.img", b"written", 8 * MIB - 4, 0) == 4
        assert image.pread(7, 9 * MIB - 4) == b"writ" + bytes(3)
        refused(errno.ENOSPC, lambda: files.write("/partition1.img", b"x", 8 * MIB, 0))
        refused(errno.EPERM, lambda: files.truncate("/disk.img", 0))
        assert files.truncate("/disk.img", 64 * MIB) == 0
        assert files.fallocate("/partition1.img", PUNCH, 0, 1 << 40, 0) == 0
        assert image.reads_as_zeros(8 * MIB, MIB)
        assert files.write("/partition2.img", b"y" * 4096, 0, 0) == 4096
        assert files.fallocate("/partition2.img", libc.FALLOC_ZERO_RANGE, 0, 2048, 0) == 0
        assert image.pread(4096, 9 * MIB) == bytes(2048) + b"y" * 2048
        refused(errno.EOPNOTSUPP, lambda: files.fallocate("/disk.img", 0, 0, 4096, 0))
        assert files.flush("/disk.img", 0) == 0


def test_damage_is_an_error_and_told(disk: Path, tmp_path: Path) -> None:
    with jqcow.open(disk, "r+") as image:
        image.pwrite(b"x" * 4096, 32 * MIB)
    tables = Tables(disk.read_bytes())
    with disk.open("r+b") as file:
        file.seek(tables.entry(tables.l1 + 8 * 16) & OFFSET_MASK)
        file.write(b"\xee" * 4096)
    told = list[str]()
    with jqcow.open(disk) as image:
        files = shown(image, told.append)
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                files.read("/disk.img", 4096, 32 * MIB, 0)
            assert caught.value.errno == errno.EIO
        assert files.read("/disk.img", 10, 64 * MIB - 4, 0) == bytes(4)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--writable", "--snapshot", "before"], "only read"),
        (["--snapshot", "none"], "no snapshot"),
        (["--image-opts"], "option"),
    ],
)
def test_refused(disk: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    (disk.parent / "empty").mkdir()
    assert main(["mount", *arguments, str(disk), str(disk.parent / "empty")]) == 1
    assert text in capfd.readouterr().err
    with jqcow.open(disk) as image, pytest.raises(OSError, match="not empty"):
        mount(image, disk.parent)
