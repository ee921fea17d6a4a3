"""Images that QEMU made with features: read where that is safe, refused by name otherwise, never misread."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import jqcow
from tests.support.qemu import done, qemu_io, run

SIZE = 4 << 20
PATTERN = b"\x5a" * 65536


def make(path: Path, options: str = "", *more: str) -> Path:
    """Create an image with one written cluster."""
    arguments = ["-o", options] if options else []
    done("qemu-img", "create", "-q", "-f", "qcow2", *arguments, *more, path, SIZE)
    qemu_io(path, "write -P 0x5a 64k 64k")
    return path


def require_readable(path: Path) -> jqcow.ImageInfo:
    """Reading gives what QEMU wrote, and does not change one byte of the file."""
    before = path.read_bytes()
    with jqcow.open(path) as image:
        assert image.pread(65536, 65536) == PATTERN
        assert not any(image.pread(65536, 0))
        assert image.check().ok
        info = image.info()
        with pytest.raises(jqcow.ReadOnlyError):
            image.pwrite(b"x", 0)
    assert path.read_bytes() == before
    return info


def require_refused(path: Path, mode: jqcow.image.Mode, words: str) -> None:
    """Opening is refused by name, and does not change one byte of the file."""
    before = path.read_bytes()
    with pytest.raises(jqcow.UnsupportedFeatureError, match=words) as caught:
        jqcow.open(path, mode)
    assert caught.value.feature
    assert path.read_bytes() == before
    # The refusal left no lock behind.
    done("qemu-img", "info", path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcount_widths_are_read_and_written(tmp_path: Path, bits: int) -> None:
    path = make(tmp_path / "image.qcow2", f"refcount_bits={bits}")
    assert require_readable(path).refcount_bits == bits
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"x" * 200_000, 1 << 20)
        image.discard(65536, 65536)
        assert image.check().ok
    done("qemu-img", "check", "-q", path)
    qemu_io(path, f"read -P {ord('x')} 1M 200000", "read -P 0 64k 64k")


def test_version_2_is_written_and_stays_so(tmp_path: Path) -> None:
    """While it is live it is no version 2 image, and every program refuses it."""
    path = make(tmp_path / "image.qcow2", "compat=0.10")
    assert require_readable(path).version == 2
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"x" * 200_000, 1 << 20)
        image.write_zeroes(65536, 1 << 20, unmap=False)
        image.create_snapshot("first")
        image.discard(65536, (1 << 20) + 65536)
        image.flush()
        refused = run("qemu-img", "info", "-U", path)
        assert refused.returncode and "run jqcow-recover" in refused.stderr
        assert path.read_bytes()[4:8] == (3).to_bytes(4, "big")
        assert image.info().version == 2 and image.check().ok
    assert path.read_bytes()[4:8] == (2).to_bytes(4, "big")
    done("qemu-img", "check", "-q", path)
    qemu_io(path, "read -P 0 1M 128k", f"read -P {ord('x')} 1152k 68928")


@pytest.mark.parametrize("base", [b"", b"base" * 32768], ids=["nothing below", "data below"])
def test_zeros_in_version_2(tmp_path: Path, base: bytes) -> None:
    """No entry can say zeros over a backing file that has data: they are written; a discard does nothing."""
    (tmp_path / "base.raw").write_bytes(base)
    os.truncate(tmp_path / "base.raw", 1 << 20)
    path = tmp_path / "image.qcow2"
    options = ["-o", "compat=0.10", "-b", "base.raw", "-F", "raw"]
    done("qemu-img", "create", "-q", "-f", "qcow2", *options, path)
    with jqcow.open(path, "r+", allow_files=True) as image:
        image.pwrite(b"y" * 196608, 0)
        image.write_zeroes(65536, 0)
        image.discard(65536, 65536)
        image.resize(2 << 20)
        left = image.pread(196608, 0)
        assert left == bytes(65536) + (b"y" if base else b"\0") * 65536 + b"y" * 65536
        kinds = [extent.kind for extent in image.extents(131072) if extent.depth == 0]
        assert kinds == ["data"]
        assert image.check().ok
    done("qemu-img", "check", "-q", path)
    qemu_io(path, "read -P 0 0 64k", f"read -P {ord('y')} 128k 64k", "read -P 0 1M 1M")


def test_a_small_write_takes_its_subclusters_alone(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"base" * 65536)
    path = tmp_path / "image.qcow2"
    options = ["-o", "extended_l2=on", "-b", "base.raw", "-F", "raw"]
    done("qemu-img", "create", "-q", "-f", "qcow2", *options, path)
    with jqcow.open(path, "r+", allow_files=True) as image:
        image.pwrite(b"z" * 3000, 1000)
        image.discard(2048, 8192)
        found = [(extent.offset, extent.length, extent.kind, extent.depth) for extent in image.extents(65536)]
        assert found == [
            (0, 4096, "data", 0),
            (4096, 4096, "data", 1),
            (8192, 2048, "zero", 0),
            (10240, 55296, "data", 1),
        ]
        assert image.check().ok
    done("qemu-img", "check", "-q", path)
    lines = json.loads(done("qemu-img", "map", "--output=json", path))
    assert [(line["start"], line["length"], line["depth"], line["zero"]) for line in lines[:3]] == [
        (0, 4096, 0, False), (4096, 4096, 1, False), (8192, 2048, 0, True)
    ]  # fmt: skip
    qemu_io(path, f"read -P {ord('z')} 1000 3000", "read -P 0 8192 2048")


def test_bitmaps_are_kept(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2")
    done("qemu-img", "bitmap", "--add", path, "changes")
    before = path.read_bytes()
    with jqcow.open(path) as image:
        assert image.pread(65536, 65536) == PATTERN
    assert path.read_bytes() == before
    with jqcow.open(path, "r+") as image:
        image.pwrite(PATTERN, 0)
        assert [(part.offset, part.length) for part in image.bitmaps.dirty_extents("changes")] == [(0, 65536)]
    done("qemu-img", "check", "-q", path)
    assert "changes" in done("qemu-img", "info", path)


def with_old_encryption(path: Path) -> None:
    secret = ["--object", "secret,id=key,data=password"]
    done(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        *secret,
        "-o",
        "encrypt.format=aes,encrypt.key-secret=key",
        path,
        SIZE,
    )


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_what_could_be_misread_is_refused(tmp_path: Path, mode: jqcow.image.Mode) -> None:
    path = tmp_path / "image.qcow2"
    with_old_encryption(path)
    require_refused(path, mode, "encryption")


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters_are_read_and_written_over(tmp_path: Path, compression: str) -> None:
    source = make(tmp_path / "source.qcow2")
    qemu_io(source, "write -P 0x77 192k 256k")
    path = tmp_path / "image.qcow2"
    options = f"compression_type={compression}"
    done("qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", options, source, path)
    with jqcow.open(path, "r+") as image:
        assert image.info().compression_type == compression
        assert [extent.kind for extent in image.extents(65536, 65536)] == ["compressed"]
        assert image.pread(65536, 65536) == PATTERN
        image.pwrite(b"x", 65536 + 5)
        image.write_zeroes(65536, 196608)
        image.discard(65536, 262144)
        image.pwrite_compressed(b"y" * 65536, 327680)
        image.pwrite(b"z" * 100_000, 1 << 20)
        assert image.check().ok
    done("qemu-img", "check", "-q", path)
    qemu_io(
        path,
        "read -P 0x5a 65536 5",
        f"read -P {ord('x')} 65541 1",
        "read -P 0x5a 65542 65530",
        "read -P 0 196608 131072",
        f"read -P {ord('y')} 327680 65536",
        "read -P 0x77 393216 65536",
        f"read -P {ord('z')} 1M 100000",
    )


def test_image_marked_corrupt_is_refused_for_writing(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2")
    content = bytearray(path.read_bytes())
    content[79] |= 2
    path.write_bytes(content)
    assert require_readable(path).corrupt
    require_refused(path, "r+", "marked corrupt")


def test_unknown_feature_is_refused_with_the_name_that_the_image_gives(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2")
    content = bytearray(path.read_bytes())
    content[72] |= 0x40
    table = content.find(b"dirty bit") - 2
    content[table : table + 48] = bytes([0, 62]) + b"time travel".ljust(46, b"\0")
    path.write_bytes(content)
    for mode in ("r", "r+"):
        with pytest.raises(jqcow.UnsupportedFeatureError, match=r"bit 62 \(time travel\)"):
            jqcow.open(path, mode)
