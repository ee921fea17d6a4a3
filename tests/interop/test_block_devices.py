"""Images on block devices, beside QEMU: loop devices with sectors of 512 and of 4096 bytes."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

import jqcow
from jqcow.cli import main, recover
from jqcow.errors import ImageInUse
from jqcow.offline.convert import convert
from jqcow.offline.measure import measure, measure_size
from jqcow.ondisk.entries import OFFSET_MASK
from tests.support.loops import SECTOR_SIZES, has_device_mapper, loop_device, mapped_device
from tests.support.patients import Tables
from tests.support.qemu import done, qemu_io, run

MIB = 1 << 20
DEVICE_BYTES = 40 * MIB
DISK_BYTES = 16 * MIB


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=SECTOR_SIZES)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "device.img", DEVICE_BYTES, request.param) as name:
        yield name


def check_by_both(device: str) -> None:
    """QEMU and jqcow find nothing wrong with an image on a device."""
    done("qemu-img", "check", "-q", device)
    assert main.main(["check", "-q", device]) == 0


@pytest.mark.parametrize("options", ("cluster_size=64k", "cluster_size=512", "compat=0.10", "extended_l2=on"))
def test_image_goes_both_ways(device: str, options: str) -> None:
    """QEMU makes it, jqcow writes it, QEMU writes it, jqcow reads it."""
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, device, str(DISK_BYTES))
    disk, chance = bytearray(DISK_BYTES), Random(options)
    for turn in range(3):
        with jqcow.open(device, "r+") as image:
            assert image.pread(DISK_BYTES, 0) == disk
            for _ in range(12):
                offset = chance.randrange(DISK_BYTES - 300_000)
                data = chance.randbytes(chance.choice((1, 512, 5000, 300_000)))
                image.pwrite(data, offset)
                disk[offset : offset + len(data)] = data
                if chance.random() < 0.3:
                    image.flush()
            start = 65536 * chance.randrange(100)
            image.write_zeroes(200_000, start)
            disk[start : start + 200_000] = bytes(200_000)
        check_by_both(device)
        pattern, at = 17 + turn, MIB * chance.randrange(12)
        qemu_io(Path(device), f"write -P {pattern} {at} 1M", f"discard {at + MIB} 1M")
        disk[at : at + MIB] = bytes([pattern]) * MIB
        disk[at + MIB : at + 2 * MIB] = bytes(MIB)
    check_by_both(device)
    convert(device, "copy.raw", target_format="raw")
    assert Path("copy.raw").read_bytes() == disk


def test_new_image_is_written_in_place(device: str) -> None:
    with jqcow.create(device, DISK_BYTES, overwrite=True) as image:
        image.pwrite(b"\x44" * 70_000, 100)
        assert image.pread(70_200, 0) == bytes(100) + b"\x44" * 70_000 + bytes(100)
    assert stat.S_ISBLK(os.stat(device).st_mode)
    check_by_both(device)


@pytest.mark.parametrize("preallocation", ("metadata", "falloc", "full"))
def test_preallocated_disk_is_zeros(device: str, preallocation: str) -> None:
    command = ["create", "-f", "qcow2", "--overwrite", "-o", f"preallocation={preallocation}"]
    assert main.main([*command, device, "8M"]) == 0
    assert main.main(["resize", "--preallocation", preallocation, device, "12M"]) == 0
    check_by_both(device)
    done("qemu-img", "create", "-q", "-f", "raw", "zeros.raw", "12M")
    done("qemu-img", "compare", "-f", "qcow2", "-F", "raw", device, "zeros.raw")


@pytest.mark.parametrize("options", ((), ("-c",), ("-o", "preallocation=metadata"), ("-o", "extended_l2=on")))
def test_converted_onto_a_device(device: str, options: tuple[str, ...]) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", "source.qcow2", "16M")
    qemu_io(Path("source.qcow2"), "write -P 7 100k 1M", "write -P 8 9M 10k")
    command = ["convert", "-q", "--verify", "-O", "qcow2", *options, "source.qcow2", device]
    assert main.main(command) == 1, "not without --overwrite"
    assert Path(device).stat().st_rdev == os.stat(device).st_rdev
    assert main.main([*command, "--overwrite"]) == 0
    check_by_both(device)
    done("qemu-img", "compare", "source.qcow2", device)


def test_raw_disk_onto_a_device_and_back(device: str) -> None:
    """What the disk has no data for is zeros, whatever the device held."""
    done("qemu-img", "create", "-q", "-f", "qcow2", "source.qcow2", "40M")
    qemu_io(Path("source.qcow2"), "write -P 7 100k 1M", "write -P 8 9M 10k", "write -P 9 0 512")
    convert("source.qcow2", device, target_format="raw", overwrite=True, verify=True)
    assert stat.S_ISBLK(os.stat(device).st_mode)
    done("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "source.qcow2", device)
    convert(device, "back.qcow2", source_format="raw", target_format="qcow2")
    done("qemu-img", "compare", "source.qcow2", "back.qcow2")


@pytest.mark.parametrize("target_format", ("raw", "qcow2"))
def test_device_that_is_too_small_keeps_what_it_has(device: str, target_format: str) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", device, "16M")
    options = ["-o", "preallocation=full"] if target_format == "qcow2" else []
    assert main.main(["create", "-f", target_format, "--overwrite", *options, device, "100M"]) == 1
    check_by_both(device)


def test_devices_as_backing_files(device: str) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", device, "16M")
    qemu_io(Path(device), "write -P 5 1M 1M")
    assert main.main(["create", "-f", "qcow2", "-b", device, "-F", "qcow2", "over.qcow2"]) == 0
    with jqcow.open("over.qcow2", "r+", allow_files=True) as image:
        assert image.pread(MIB, MIB) == b"\5" * MIB
        image.pwrite(b"\6", MIB + 100)
    qemu_io(Path("over.qcow2"), "read -P 5 1M 100", "read -P 6 1048676 1")
    assert main.main(["commit", "--allow-files", "over.qcow2"]) == 0
    qemu_io(Path(device), "read -P 6 1048676 1", "read -P 5 1048677 1000")
    check_by_both(device)


def test_raw_device_as_backing_file(device: str) -> None:
    assert main.main(["create", "-f", "qcow2", "-b", device, "-F", "raw", "over.qcow2"]) == 0
    held = Path("device.img").read_bytes()
    with jqcow.open("over.qcow2", "r+", allow_files=True) as image:
        assert image.size == DEVICE_BYTES
        image.pwrite(b"\6" * 600, 5 * MIB + 100)
        assert image.pread(1000, 5 * MIB)[:100] == held[5 * MIB :][:100]
    assert Path("device.img").read_bytes() == held
    assert main.main(["commit", "--allow-files", "over.qcow2"]) == 0
    done("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "over.qcow2", device)
    os.sync()
    assert Path("device.img").read_bytes()[5 * MIB + 100 :][:600] == b"\6" * 600


KILLED = """
import os, sys, jqcow
image = jqcow.open(sys.argv[1], "r+", journal_size=65536)
for number in range(40):
    image.pwrite(bytes([number + 1]) * 70_000, number * 200_000)
    image.flush()
image.pwrite(b"not flushed", 12 << 20)
os._exit(0)
"""


def test_killed_writer_is_recovered(device: str) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", device, str(DISK_BYTES))
    subprocess.run((sys.executable, "-c", KILLED, device), check=True, cwd=Path(__file__).parents[2])
    assert run("qemu-img", "check", device).returncode
    assert recover.main([device]) == 0
    check_by_both(device)
    with jqcow.open(device) as image:
        for number in range(40):
            assert image.pread(70_000, number * 200_000) == bytes([number + 1]) * 70_000


def test_locks_hold_against_qemu_and_the_kernel(device: str) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", device, str(DISK_BYTES))
    with jqcow.open(device, "r+"):
        assert run("qemu-img", "check", device).returncode
        with pytest.raises(ImageInUse):
            jqcow.open(device)
        with pytest.raises(OSError, match="busy"):
            os.open(device, os.O_RDWR | os.O_EXCL)
    with jqcow.open(device):
        done("qemu-img", "info", device)
        assert run("qemu-io", "-f", "qcow2", "-c", "write 0 512", device).returncode
    claimed = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(ImageInUse, match="mounted"):
            jqcow.open(device, "r+")
        jqcow.open(device).close()
    finally:
        os.close(claimed)


def test_full_device_loses_nothing_and_measure_tells_before(tmp_path: Path) -> None:
    measured = measure_size(DISK_BYTES, cluster_size=4096, journal_size=65536)
    enough = measured.fully_allocated + measured.journal
    for size, fits in ((enough, True), (DISK_BYTES // 2, False)):
        with loop_device(tmp_path / f"{fits}.img", size, 4096) as device:
            image = jqcow.create(device, DISK_BYTES, cluster_size=4096, journal_size=65536, overwrite=True)
            written = 0
            try:
                for offset in range(0, DISK_BYTES, 65536):
                    image.pwrite(b"\x77" * 65536, offset)
                    written += 65536
            except OSError as error:
                assert error.errno == errno.ENOSPC and not fits
            assert image.end_offset <= size
            image.close()
            assert (written == DISK_BYTES) is fits
            check_by_both(device)
            with jqcow.open(device) as again:
                assert again.pread(written, 0) == b"\x77" * written


def test_freed_clusters_go_back_to_the_device(device: str) -> None:
    """The device of a loop is a file, in which a discard makes a hole."""
    done("qemu-img", "create", "-q", "-f", "qcow2", device, str(DISK_BYTES))
    with jqcow.open(device, "r+") as image:
        image.pwrite(b"\x55" * (8 * MIB), 0)
        image.flush()
        os.sync()
        before = Path("device.img").stat().st_blocks
        image.discard(8 * MIB, 0)
        image.flush()
    os.sync()
    assert before - Path("device.img").stat().st_blocks > 6 * MIB // 512
    check_by_both(device)


@pytest.mark.parametrize("arguments", (
    ("-O", "qcow2", "--size", "3G"),
    ("-O", "qcow2", "--size", "1000"),
    ("-O", "raw", "--size", "3G"),
    ("-O", "qcow2", "source.qcow2"),
    ("-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=64", "source.qcow2"),
    ("-O", "qcow2", "-o", "preallocation=full", "source.qcow2"),
    ("-O", "qcow2", "-o", "extended_l2=on", "-f", "raw", "source.raw"),
    ("-O", "raw", "source.qcow2"),
))  # fmt: skip
def test_measure_tells_what_qemu_tells(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", "source.qcow2", "16M")
    qemu_io(Path("source.qcow2"), "write -P 7 128k 1M", "write -P 8 9M 64k")
    done("qemu-img", "bitmap", "--add", "source.qcow2", "noted")
    done("qemu-img", "convert", "-O", "raw", "source.qcow2", "source.raw")
    theirs = json.loads(done("qemu-img", "measure", "--output=json", *arguments))
    assert main.main(["measure", "--output", "json", *arguments]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert (ours.pop("journal") > 0) is (arguments[1] == "qcow2")
    assert ours == theirs


@pytest.mark.parametrize("compressed", (False, True))
def test_conversion_takes_no_more_than_was_measured(compressed: bool) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", "source.qcow2", "64M")
    chance = Random(1)
    for _ in range(40):
        qemu_io(Path("source.qcow2"), f"write -P {chance.randrange(256)} {chance.randrange(60 * MIB)} 70k")
    for cluster_size in (512, 65536):
        measured = measure("source.qcow2", cluster_size=cluster_size)
        convert(
            "source.qcow2", "target.qcow2", cluster_size=cluster_size, compressed=compressed, overwrite=True
        )
        assert Path("target.qcow2").stat().st_size <= measured.required


if has_device_mapper():

    def test_device_that_fails_loses_nothing_that_was_flushed(device: str) -> None:
        """The device mapper lets every access fail, as a disk that is pulled; then it comes back."""
        with mapped_device(device, DEVICE_BYTES) as mapped:
            jqcow.create(mapped.path, DISK_BYTES, overwrite=True).close()
            image = jqcow.open(mapped.path, "r+")
            image.pwrite(b"\x11" * MIB, 0)
            image.flush()
            image.pwrite(b"\x22" * MIB, MIB)
            mapped.fail()
            with pytest.raises(OSError, match="Input/output"):
                image.flush()
            with pytest.raises((OSError, jqcow.JqcowError)):
                image.close()
            mapped.mend()
            with jqcow.open(mapped.path, "r+") as image:
                found = image.pread(2 * MIB, 0)
                assert found[:MIB] == b"\x11" * MIB and set(found[MIB:]) <= {0, 0x22}
            check_by_both(mapped.path)


@pytest.mark.parametrize("raw", [False, True])
def test_data_file_on_a_device(device: str, raw: bool) -> None:
    """The data lies on a device that is larger than the disk, and full of noise."""
    image = Path("image")
    jqcow.create(image, 4 * MIB, data_file=device, data_file_raw=raw, overwrite=True).close()
    with jqcow.open(image, "r+", allow_files=True) as opened:
        opened.pwrite(b"\x11" * 100_000, MIB)
        opened.resize(16 * MIB)
        opened.resize(8 * MIB)
        opened.resize(16 * MIB)
        assert opened.pread(14 * MIB, 2 * MIB) == bytes(14 * MIB)
        opened.discard(65536, MIB)
        with pytest.raises(OSError, match="No space") as caught:
            opened.resize(DEVICE_BYTES + MIB)
        assert caught.value.errno == errno.ENOSPC and opened.size == 16 * MIB
        with pytest.raises(ImageInUse):
            jqcow.create("other", MIB, data_file=device, overwrite=True)
    done("qemu-img", "check", "-q", image)
    convert(image, "copy.raw", target_format="raw", allow_files=True)
    done("qemu-img", "compare", "-q", "-F", "raw", image, "copy.raw")
    if raw:
        with open(device, "rb") as file:
            assert file.read(16 * MIB) == Path("copy.raw").read_bytes()
    with pytest.raises(OSError, match="No space"):
        jqcow.create("other", DEVICE_BYTES + MIB, data_file=device, overwrite=True)
    done("qemu-img", "compare", "-q", "-F", "raw", image, "copy.raw")
    assert not os.path.exists("other")


def test_image_and_data_on_two_devices(device: str, tmp_path: Path) -> None:
    convert_options = {"target_format": "qcow2", "overwrite": True, "verify": True, "data_file": device}
    Path("source.raw").write_bytes(Random(1).randbytes(3 * MIB) + bytes(5 * MIB))
    with loop_device(tmp_path / "other.img", DEVICE_BYTES) as other:
        for raw in (False, True):
            convert("source.raw", other, data_file_raw=raw, **convert_options)  # type: ignore[arg-type]
            done("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", other, "source.raw")
            with jqcow.open(other, "r+", allow_files=True) as image:
                image.pwrite(b"\x22" * 70_000, 5 * MIB)
                image.discard(MIB, 0)
                assert image.check().ok
            done("qemu-img", "check", "-q", other)
        with pytest.raises((ValueError, ImageInUse)):
            convert("source.raw", other, **{**convert_options, "data_file": other})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("default")
def test_a_repair_tells_that_nothing_takes_it_back(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    jqcow.create(device, DISK_BYTES, overwrite=True).close()
    qemu_io(Path(device), "write -P 1 0 1M")
    assert main.main(["check", "-q", "-r", "all", device]) == 0
    # Nothing was wrong.
    assert "undo" not in capsys.readouterr().err
    with open(device, "r+b") as file:
        tables = Tables(file.read(DISK_BYTES))
        tables.set_refcount(tables.entry(tables.l2) & OFFSET_MASK, 0)
        file.seek(0)
        file.write(tables.image)
    assert main.main(["check", "-q", "-r", "all", device]) == 0
    assert f"{device} is a block device: its repair writes no undo file" in capsys.readouterr().err
    check_by_both(device)
    assert main.main(["undo", device]) == 63
    assert "undo on a block device" in capsys.readouterr().err
