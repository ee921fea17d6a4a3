"""A disk as files by FUSE: mounted, read and written by other programs, ended by signals and killed."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import jqcow
from jqcow.device import libc
from tests.support.qemu import done
from tests.unit.test_mount import MIB, disk_of

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
PUNCH = libc.FALLOC_PUNCH_HOLE | libc.FALLOC_KEEP_SIZE


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return disk_of(tmp_path)


@contextmanager
def started(disk: Path, directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Mount in a process of its own, as a user does."""
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "jqcow", "mount", *options, str(disk), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            assert told == f"{directory}: disk.img partition1.img partition2.img\n"
            yield process
        except BaseException:
            process.kill()
            subprocess.run(["fusermount3", "-uz", directory], check=False)
            raise


@contextmanager
def mounted(disk: Path, *options: str, how: str = "fusermount3") -> Iterator[Path]:
    """Mount, and end it as ``how`` says."""
    directory = disk.parent / "shown"
    with started(disk, directory, *options) as process:
        yield directory
        if how == "fusermount3":
            subprocess.run(["fusermount3", "-u", directory], check=True)
        else:
            process.send_signal(getattr(signal, how))
        assert process.wait(SECONDS) == 0
    assert not os.path.ismount(directory) and not os.listdir(directory)


def test_read_only(disk: Path) -> None:
    with mounted(disk) as shown:
        assert sorted(os.listdir(shown)) == ["disk.img", "partition1.img", "partition2.img"]
        assert (shown / "disk.img").stat().st_size == 64 * MIB
        assert (shown / "partition1.img").read_bytes() == b"now   " + bytes(8 * MIB - 6)
        with pytest.raises(OSError) as caught:
            (shown / "disk.img").open("r+b")
        assert caught.value.errno == errno.EROFS
        with pytest.raises(FileNotFoundError):
            (shown / "other").open()
        done(
            "qemu-img", "compare", "-q", "-U", "-f", "raw", "-F", "qcow2", str(shown / "disk.img"), str(disk)
        )
        with pytest.raises(jqcow.ImageInUse):
            jqcow.open(disk, "r+")


def test_snapshot(disk: Path) -> None:
    with mounted(disk, "--snapshot", "before") as shown, (shown / "partition1.img").open("rb") as file:
        assert file.read(6) == b"before"


def test_file_system_made_in_a_partition(disk: Path) -> None:
    """It is there when the mount has ended, in a clean image."""
    with mounted(disk, "--writable") as shown:
        subprocess.run(["mkfs.ext4", "-q", shown / "partition1.img"], check=True, capture_output=True)
        with (shown / "disk.img").open("rb") as file:
            file.seek(MIB + 1080)
            assert file.read(2) == b"\x53\xef"
    done("qemu-img", "check", "-q", str(disk))
    with jqcow.open(disk) as image:
        (disk.parent / "partition").write_bytes(image.pread(8 * MIB, MIB))
    subprocess.run(["e2fsck", "-fn", disk.parent / "partition"], check=True, capture_output=True)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_ended_by_a_signal(disk: Path, how: str) -> None:
    with mounted(disk, "--writable", how=how) as shown, (shown / "disk.img").open("r+b", buffering=0) as file:
        file.seek(0, os.SEEK_END)
        with pytest.raises(OSError) as caught:
            file.write(b"x")
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as caught:
            file.truncate(0)
        assert caught.value.errno == errno.EPERM
        file.seek(-3, os.SEEK_END)
        assert file.write(b"ends here") == 3
    with jqcow.open(disk) as image:
        assert image.recovered is None and image.info().journal is None
        assert image.pread(3, image.size - 3) == b"end"


def test_fsync_is_a_flush(disk: Path) -> None:
    """What fsync acknowledged is there though the process was killed."""
    directory = disk.parent / "shown"
    with started(disk, directory, "--writable") as process:
        opened = [os.open(directory / f"partition{number}.img", os.O_RDWR) for number in (1, 2)]
        os.pwrite(opened[1], b"acknowledged", 0)
        libc.call("fallocate", opened[0], PUNCH, ctypes.c_int64(0), ctypes.c_int64(4096))
        os.fsync(opened[0])
        process.kill()
        assert process.wait(SECONDS) == -signal.SIGKILL
        for descriptor in opened:
            with suppress(OSError):
                os.close(descriptor)
        subprocess.run(["fusermount3", "-u", directory], check=True)
    with jqcow.open(disk, "r+") as image:
        assert image.recovered is not None
        assert image.pread(12, 9 * MIB) == b"acknowledged" and image.pread(6, MIB) == bytes(6)
        assert image.check().ok
