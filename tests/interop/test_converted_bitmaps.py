"""Bitmaps that go with a converted disk: QEMU finds the same in jqcow's target as in its own."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.cli.main import main
from jqcow.offline.convert import convert
from jqcow.ondisk.header import EXTENSION_BITMAPS
from tests.interop.test_bitmaps import SIZE, told, told_by_qemu
from tests.support.qemu import done, qemu_io, run

NAMES = ("fine", "off", "coarse", "ü", "clean")


def bitmaps_in(path: Path) -> Any:
    told = json.loads(done("qemu-img", "info", "--output=json", path))["format-specific"]["data"]
    return told.get("bitmaps")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    for name, granularity in zip(NAMES, ("512", "64k", "64M", "4k", "1M"), strict=True):
        done("qemu-img", "bitmap", "--add", "-g", granularity, path, name)
    qemu_io(path, "write -q 0 1M", "write -q 5M 100k", f"write -q {SIZE - 512} 512")
    done("qemu-img", "bitmap", "--disable", path, "off")
    done("qemu-img", "bitmap", "--clear", path, "clean")
    qemu_io(path, "write -q 40M 64k")
    done("qemu-img", "bitmap", "--clear", path, "clean")
    return path


def with_flags(path: Path, number: int, flags: int) -> None:
    """Say of one bitmap what its flags are."""
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack(">II", EXTENSION_BITMAPS, 24))
    place = struct.unpack_from(">Q", content, at + 24)[0]
    for _ in range(number):
        name_bytes, extra_bytes = struct.unpack_from(">HI", content, place + 18)
        place += (24 + name_bytes + extra_bytes + 7) // 8 * 8
    struct.pack_into(">I", content, place + 12, flags)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "options",
    [
        [], ["-c"], ["-o", "preallocation=metadata"], ["-o", "cluster_size=4k"],
        ["-o", "cluster_size=512,refcount_bits=1"], ["-o", "cluster_size=2M"], ["-o", "extended_l2=on"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_both_copy_the_same(tmp_path: Path, source: Path, options: list[str]) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    arguments = ["-f", "qcow2", "-O", "qcow2", "--bitmaps", *options, str(source)]
    assert main(["convert", "-q", "--verify", *arguments, str(ours)]) == 0
    done("qemu-img", "convert", *arguments, theirs)
    assert bitmaps_in(ours) == bitmaps_in(theirs)
    for name in NAMES:
        assert told(ours, name) == told(theirs, name) == told_by_qemu(ours, name), name
    done("qemu-img", "check", "-q", ours)
    done("qemu-img", "compare", "-q", source, ours)
    with jqcow.open(ours, "r+") as image:
        assert image.check().ok and image.info().journal is None
        image.pwrite(b"x", 20 << 20)
    assert (20 << 20, (20 << 20) + 512) in told(ours, "fine") and told(ours, "off") == told(theirs, "off")


def test_both_skip_what_was_left_in_use(tmp_path: Path, source: Path) -> None:
    with_flags(source, 2, 3)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    arguments = ["-f", "qcow2", "-O", "qcow2", "--bitmaps", str(source)]
    assert main(["convert", *arguments, str(ours)]) == 1 and not ours.exists()
    assert run("qemu-img", "convert", *arguments, theirs).returncode == 1
    assert main(["convert", "--skip-broken-bitmaps", *arguments, str(ours)]) == 0
    done("qemu-img", "convert", "--skip-broken-bitmaps", *arguments, theirs)
    assert bitmaps_in(ours) == bitmaps_in(theirs) and len(bitmaps_in(ours)) == len(NAMES) - 1


def test_a_crashed_source_has_the_bitmaps_of_its_journal(tmp_path: Path, source: Path) -> None:
    copy, target = tmp_path / "copy.qcow2", tmp_path / "target.qcow2"
    with jqcow.open(source, "r+") as image:
        image.discard(1 << 20, 0)
        image.bitmaps.add("new", 512)
        image.pwrite(b"x" * 65536, 30 << 20)
        image.flush()
        copy.write_bytes(source.read_bytes())
    report = convert(copy, target, bitmaps="all")
    assert report.bitmaps == (*NAMES, "new") and not report.skipped_bitmaps
    assert any(start <= 30 << 20 < end for start, end in told(target, "new"))
    assert told(target, "fine") == told(copy, "fine")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-O", "raw"], ["-O", "qcow2", "-o", "compat=0.10"], ["-O", "qcow2", "-l", "one"],
        ["-O", "qcow2", "-f", "raw"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_has_no_bitmaps(tmp_path: Path, source: Path, arguments: list[str]) -> None:
    done("qemu-img", "snapshot", "-c", "one", source)
    target = tmp_path / "target"
    assert main(["convert", "--bitmaps", *arguments, str(source), str(target)]) == 1
    assert not target.exists()


def test_skipping_is_of_what_is_copied(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "target"
    assert main(["convert", "--skip-broken-bitmaps", "-O", "qcow2", str(source), str(target)]) == 1
    assert run("qemu-img", "convert", "--skip-broken-bitmaps", "-O", "qcow2", source, target).returncode == 1


def test_what_is_damaged_stays_behind(tmp_path: Path, source: Path) -> None:
    content = bytearray(source.read_bytes())
    at = content.index(struct.pack(">II", EXTENSION_BITMAPS, 24))
    directory = struct.unpack_from(">Q", content, at + 24)[0]
    table = struct.unpack_from(">Q", content, directory)[0]
    target = tmp_path / "target.qcow2"
    # A table entry with reserved bits, bits past the end of the file, no directory at all.
    for place, value, left in ((table, 0x7F, 4), (table, 1 << 40, 4), (at + 8, 0, 0)):
        damaged = bytearray(content)
        struct.pack_into(">Q", damaged, place, value)
        source.write_bytes(damaged)
        with pytest.raises(jqcow.CorruptionError):
            convert(source, target, bitmaps="all")
        assert not target.exists()
        # Bits that nothing names any more look like lost data.
        report = convert(source, target, bitmaps="sound", salvage=True)
        assert len(report.bitmaps) == left and report.skipped_bitmaps
        assert [one["name"] for one in bitmaps_in(target) or ()] == list(report.bitmaps)
        done("qemu-img", "check", "-q", target)
        target.unlink()
