"""Protection with QEMU as a writer: it keeps the sums, notes what it writes, and nothing is wrong by it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

import jqcow
from jqcow.offline.protect import protect, verify
from tests.support.qemu import check_clean, done, qemu_io, run

MIB = 1 << 20


@pytest.fixture(params=["512", "4k", "64k", "2M"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={request.param}", path, "16M")
    qemu_io(path, "write -q -P 1 0 3M", "write -q -P 2 5000k 77k", "write -q -P 3 15M 1M")
    protect(path)
    return path


def states(path: Path) -> set[str]:
    return {found.state for found in verify(path).ranges}


def test_what_qemu_writes_has_changed_and_nothing_else(image: Path) -> None:
    check_clean(image)
    for at in (1, 6, 10):
        qemu_io(image, f"write -q -P 9 {at}M 1000", f"discard {at + 1}M 64k")
    report = verify(image)
    assert report.ok and report.bytes_of("changed") <= 12 * MIB and states(image) == {"changed"}
    with jqcow.open(image) as opened:
        dirty = sum(extent.length for extent in opened.bitmaps.dirty_extents("jqcow-changed"))
    assert report.bytes_of("changed") == dirty
    renewed = protect(image, refresh=True)
    assert not renewed.fault and renewed.renewed_bytes == dirty
    assert verify(image).right_bytes == 16 * MIB
    check_clean(image)


@pytest.mark.parametrize("sizes", [("40M",), ("9M",), (str(9 * MIB + 512),), ("9M", "40M"), ("17M", "16M")])
def test_what_qemu_resizes_is_right(image: Path, sizes: tuple[str, ...]) -> None:
    for size in sizes:
        done("qemu-img", "resize", "-q", "--shrink", image, size)
    report = verify(image)
    assert report.ok or states(image) <= {"unsure", "changed"}
    protect(image, refresh=True)
    with jqcow.open(image) as opened:
        assert verify(image).right_bytes >= opened.size - (2 << 20)
    check_clean(image)


def test_snapshots(image: Path) -> None:
    done("qemu-img", "snapshot", "-c", "kept", image)
    qemu_io(image, "write -q -P 8 1M 64k")
    assert states(image) == {"changed"} and verify(image).ok
    refused = run("qemu-img", "snapshot", "-a", "kept", image)
    assert refused.returncode == 1 and "bitmaps" in refused.stderr
    with jqcow.open(image, "r+") as opened:
        opened.apply_snapshot("kept")
    assert verify(image).ok
    protect(image, refresh=True)
    done("qemu-img", "snapshot", "-d", "kept", image)
    assert verify(image).right_bytes == 16 * MIB


def test_copies_repairs_and_amendments(image: Path, tmp_path: Path) -> None:
    copy, own = tmp_path / "copy.qcow2", tmp_path / "own.qcow2"
    run("qemu-img", "check", "-q", "-r", "all", image)
    done("qemu-img", "amend", "-o", "lazy_refcounts=on", image)
    with jqcow.open(image) as opened:
        cluster = opened.info().cluster_size
    done("qemu-img", "convert", "--bitmaps", "-o", f"cluster_size={cluster}", "-O", "qcow2", image, copy)
    jqcow_convert(image, own, cluster)
    for path in (image, copy, own):
        report = verify(path)
        assert report.right_bytes == 16 * MIB, (path, report)


def jqcow_convert(source: Path, target: Path, cluster_bytes: int) -> None:
    from jqcow.offline.convert import convert

    convert(source, target, target_format="qcow2", cluster_size=cluster_bytes, bitmaps="all")


def test_a_qemu_that_was_killed_leaves_no_sums_to_go_by(image: Path) -> None:
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stdin is not None
    process.stdin.write(b"write -P 9 1M 64k\nflush\n")
    process.stdin.flush()
    for _ in range(100):
        if b"\x00\x00\x00\x03\x01" in image.read_bytes():
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdin.close()
    report = verify(image)
    assert report.is_protected and "in use" in report.fault
    assert "in use" in protect(image, refresh=True).fault
    assert verify(image).right_bytes == 16 * MIB
    check_clean(image)


def test_an_overlay_protects_what_is_its_own(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    qemu_io(base, "write -q -P 1 0 8M")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    qemu_io(overlay, "write -q -P 2 1M 1000")
    protect(overlay, allow_files=True)
    report = verify(overlay, allow_files=True)
    assert (report.right_bytes, report.below_bytes) == (65536, 16 * MIB - 65536)
    qemu_io(base, "write -q -P 7 4M 1M")
    assert verify(overlay, allow_files=True).right_bytes == 65536
    # What was the image's own reads the same from below.
    done("qemu-img", "commit", "-q", overlay)
    assert verify(overlay, allow_files=True).right_bytes == 65536
    with pytest.raises(jqcow.FileAccessDenied):
        verify(overlay)
